"""Tables and plots of the documents are those of the JSON in bench/results: `make figures` writes them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

pytest.importorskip("matplotlib")

from bench import figures, report


@pytest.fixture(scope="module")
def reports() -> figures.Reports:
    return figures.load()


def test_texts_are_those_of_the_results(reports: figures.Reports) -> None:
    wrong = [path.name for path, text in figures.texts(reports).items() if not path.exists() or path.read_text() != text]
    assert wrong == [], "run `make figures`"
    assert {path.name for path in figures.PAGES.glob("*.md")} == {
        path.name for path in figures.texts(reports) if path.parent == figures.PAGES
    }


def test_plots_are_those_of_the_results(reports: figures.Reports) -> None:
    plots = figures.all_plots(reports)
    assert [path.name for path, (key, _) in plots.items() if report.drawn_from(path) != key] == [], "run `make figures`"
    beside = {path for path in figures.RESULTS.glob("*.png") if path.name != "fvu.png"}
    assert beside == set(plots), "a plot without its result"


def test_replaced_results_left_the_tree(reports: figures.Reports) -> None:
    assert figures.replaced(reports) == {}


def run_of(date: str, *rows: tuple[str, float], **about: Any) -> dict[str, Any]:
    entries = [
        {
            "op": op,
            "shape": "2x2",
            "backend": "cpu",
            "ours": {"median": 1.0},
            "others": {"torch": {"median": ratio}},
            "floor": None,
            "extra_mb": {},
        }
        for op, ratio in rows
    ]
    versions = {"torch": "2"}
    common = {"quick": False, "cpu": "chip", "gpu": [], "cores": 2, "threads": 2, "commit": "c", "versions": versions, "notes": []}
    return {"date": date, **common, **about, "results": entries}


def test_a_newer_run_replaces_rows(tmp_path: Path) -> None:
    runs = {
        "a": run_of("2026-01-01", ("encode_topk", 2.0), ("decode", 3.0)),
        "b": run_of("2026-01-02", ("encode_topk", 0.5)),
        "c": run_of("2026-01-03", ("encode_topk", 9.0), level="avx2"),
        "d": run_of("2026-01-01", ("match", 1.0)),
        "e": run_of("2026-01-01", ("match", 4.0), taken="2026-01-01T10:00:00"),
    }
    for name, content in runs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "d.png").write_bytes(b"")
    reports = figures.load(tmp_path)
    figures.prune(reports)
    left = {path.stem: [row["op"] for row in r["results"]] for path, r in figures.load(tmp_path).items()}
    assert left == {"a": ["decode"], "b": ["encode_topk"], "c": ["encode_topk"], "e": ["match"]}  # another level is another machine
    assert not (tmp_path / "d.png").exists()
    same = {tmp_path / name: run_of("2026-01-01", ("decode", 1.0)) for name in "xy"}
    with pytest.raises(ValueError, match=r"x and y both have decode 2x2 of 2026-01-01"):
        figures.replaced(same)


def test_a_run_on_a_busy_machine_says_so() -> None:
    quiet, loud = (run_of("2026-01-01", load=[load, 0, 0]) for load in (0.1, 3.0))
    assert "load 0.1 before it," not in report.conditions(quiet) and report.conditions(quiet).endswith("load 0.1 before it")
    assert report.conditions(loud).endswith("load 3.0 before it (BUSY)")
    assert report.conditions(run_of("2026-01-01")).endswith("load before it not recorded")


def test_times_faster() -> None:
    assert [report.times(value) for value in (0.5, 0.994, 0.996, 2.04, 9.96, 260.8)] == ["0.50×", "0.99×", "1.0×", "2.0×", "10×", "261×"]


def test_the_readme_has_no_other_figure() -> None:
    """Outside of generated blocks, code and versions no number is a measurement."""
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"<!-- figures: .*?<!-- /figures -->|```.*?```", "", text, flags=re.DOTALL)
    assert re.findall(r"\d+(?:\.\d+)?\s?(?:×|%|ms|MB|GB|seconds)|\b\d+(?:\.\d+)? times", text) == []
