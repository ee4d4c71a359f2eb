"""Every study runs in its smallest size, and the frame keeps what a study finds."""

from __future__ import annotations

import json
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import ROOT

from fastsae.__main__ import main
from fastsae._core import progress
from fastsae.polytopes import as_net
from fastsae.studies import Study, _frame, _page, _toy, adversarial, names, run_study, shell
from fastsae.superposition import Run, SuperpositionData, train_many

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")


IN_CI = ("language_model", "recovery", "shell")  # all of them in make deep


@pytest.mark.parametrize("name", names() if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else IN_CI)
@pytest.mark.slow
def test_study_runs_in_its_smallest_size(name: str, tmp_path: Path) -> None:
    assert main(["study", name, "--smoke", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / f"{name}.json").read_text())
    assert report["study"] == name
    assert report["size"] == "smoke"
    assert report["versions"]["torch"] == torch.__version__
    assert report["tables"] and report["findings"] and report["plots"]
    assert all((tmp_path / plot).stat().st_size > 1000 for plot in report["plots"])
    page = (tmp_path / "README.md").read_text()
    assert all(sentence in page for sentence in report["findings"]) and all(f"]({plot})" in page for plot in report["plots"])


@pytest.mark.parametrize("name", names())
def test_study_has_its_two_sizes(name: str) -> None:
    module = _frame._module(name)
    assert list(module.SIZES) == ["smoke", "default"]
    keys = {frozenset(size) for size in module.SIZES.values()}
    assert len(keys) == 1 and "minutes" in next(iter(keys))
    assert module.__doc__


@pytest.fixture
def coin(monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(study: Study) -> None:
        with study.bar("throwing") as bar:
            heads = torch.rand(study["throws"], generator=study.generator()) < 0.5
            bar.update(study["throws"])
        share = float(heads.float().mean())
        study.table("heads", [{"throws": study["throws"], "share": share, "odds": math.inf, "side": None}])
        study.record(first=heads[:3], count=np.int64(7), nested={"a": [np.float32(0.5), (1, math.nan)]}, path=study.out)
        study.say(f"heads: {share:.3f}")
        canvas, axes = study.figure(figsize=(2, 2))
        axes.plot([0, 1])
        study.save(canvas, "line")

    sizes = {size: {"minutes": 0.1, "throws": 10**power} for size, power in (("smoke", 2), ("default", 3))}
    module = types.SimpleNamespace(SIZES=sizes, run=run, __doc__="How often does a fair coin show heads?\n\nMore.")
    monkeypatch.setattr(_frame, "names", lambda: ["coin"])
    monkeypatch.setitem(sys.modules, "fastsae.studies.coin", module)
    return module


def test_frame_keeps_what_a_study_finds(coin: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = run_study("coin", "smoke", out=tmp_path, seed=3)
    report = json.loads((tmp_path / "coin.json").read_text())
    assert report["parameters"] == {"minutes": 0.1, "throws": 100}
    assert report["seed"] == 3 and report["commit"] is not False
    assert report["tables"]["heads"][0] == {"throws": 100, "share": study.tables["heads"][0]["share"], "odds": None, "side": None}
    assert report["results"]["nested"] == {"a": [0.5, [1, None]]}
    assert report["results"]["count"] == 7 and len(report["results"]["first"]) == 3
    assert report["plots"] == ["line.png"] and (tmp_path / "line.png").exists()
    printed = capsys.readouterr().out
    assert "throws" in printed and "heads: " in printed and str(tmp_path / "coin.json") in printed
    again = run_study("coin", "smoke", out=tmp_path, seed=3, progress=False)
    assert again.tables == study.tables
    assert run_study("coin", out=tmp_path, seed=3, throws=7).tables["heads"][0]["throws"] == 7


def test_page_of_a_run(coin: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_study("coin", "smoke", out=tmp_path / "coin", seed=3, progress=False)
    page = (tmp_path / "coin" / "README.md").read_text()
    assert page.startswith("# How often does a fair coin show heads?\n\nMore.\n\nWritten by `fastsae study coin --smoke --seed 3`")
    assert "\n- heads: 0." in page and "![coin: line](line.png)" in page and "| throws | share | odds | side |" in page
    assert "| 100 |" in page and "| - | - |" in page and "Size smoke, seed 3" in page
    assert _page.table([]) == "(no rows)"
    assert _page.table([{"a": "x|y", "b": [1, 0.123456]}] * 41).endswith("| x\\|y | 1, 0.1235 |\n\n1 more rows in the JSON file.")
    (tmp_path / "coin" / "README.md").unlink()
    assert main(["study", "--pages", str(tmp_path)]) == 0
    assert (tmp_path / "coin" / "README.md").read_text() == page
    assert "[coin](coin/README.md) | How often does a fair coin show heads? | smoke |" in (tmp_path / "README.md").read_text()
    assert main(["study", "--pages", str(tmp_path / "coin")]) == 2
    assert "no NAME/NAME.json of a study in" in capsys.readouterr().err


def test_stored_pages_are_those_of_the_stored_runs(tmp_path: Path) -> None:
    stored = ROOT / "bench" / "results" / "studies"
    if not stored.exists():
        pytest.skip("not a checkout")
    for path in stored.rglob("*.json"):
        copy = tmp_path / path.name
        copy.write_bytes(path.read_bytes())
        assert _frame.write_page(copy).read_text() == path.with_name("README.md").read_text(), f"fastsae study --pages {stored}"


def test_frame_says_what_is_wrong(coin: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"name": "dice"}, "name must be one of coin, got 'dice'"),
        ({"name": "coin", "size": "huge"}, "size must be one of smoke, default, got 'huge'"),
        ({"name": "coin", "seed": -1}, "seed must be at least 0, got -1"),
        ({"name": "coin", "sides": 2}, "unknown parameter 'sides' of coin; known: minutes, throws"),
    )
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            run_study(**arguments, out=tmp_path)
    with pytest.raises(TypeError, match="got object"):
        Study("coin", "smoke", 0, tmp_path, {}).record(thing=object())
    assert main(["study", "dice"]) == 2
    assert "got 'dice'" in capsys.readouterr().err


def test_heat_map_of_what_is_missing(tmp_path: Path) -> None:
    study = Study("coin", "smoke", 0, tmp_path, {})
    canvas, axes = study.figure(figsize=(3, 2))
    cells = ((8, 0.1, 0.5), (8, 1.0, math.nan), (16, 0.1, 3.0))
    _toy.heat(axes, [{"n_features": F, "l1": l1, "antipodal": value} for F, l1, value in cells], "antipodal", "no (16, 1.0)")
    assert [text.get_text() for text in axes.texts] == ["0.50", "3"]
    assert study.save(canvas, "heat").stat().st_size > 1000
    assert math.isnan(_toy.antipodal(torch.eye(3), torch.zeros(3, dtype=torch.bool)))
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.01], [0.0, 1.0]])
    assert _toy.antipodal(rows) == pytest.approx(2 / 3)
    assert _toy.antipodal(rows, torch.tensor([True, False, True])) == 0


def test_how_far_polytopes_are_from_the_origin() -> None:
    pytest.importorskip("scipy")
    first, last = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))
        first.bias.copy_(torch.tensor([-1.0, -4.0, 1.0]))
    x = torch.tensor([[3.0, 3.0], [3.0, 0.0], [0.0, 3.0], [0.5, 0.5]])  # cut by x = 1 and y = 2
    found = adversarial.from_origin(as_net(torch.nn.Sequential(first, torch.nn.ReLU(), last)), x)
    assert found.tolist() == pytest.approx([math.sqrt(5), 1.0, 2.0, 0.0], abs=1e-9)


def test_the_factor_where_something_changes() -> None:
    factors = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    there = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]]).bool()
    assert shell.reached(there, factors, "down") == 0.25 and shell.reached(there, factors, "up") == math.inf
    assert shell.nearest(torch.tensor([0.5, 0.9, 1.5, 3.0]).double(), torch.tensor([0, 0, 0, 0]), 1, "down") == pytest.approx(0.9)
    assert shell.nearest(torch.tensor([1.5]).double(), torch.tensor([0]), 1, "up") == 1.5


def test_numbers_stand_on_one_line() -> None:
    report = {"a": [1, -2.5, None, 1e-9], "b": ["x, 1", [1, 2]], "c": [], "d": [True, 1], "e": [[0.5], [None]]}
    text = _frame._compact(report)
    assert json.loads(text) == report
    assert "[1, -2.5, null, 1e-09]" in text and "[1, 2]" in text


def test_command_lists_the_studies(coin: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study"]) == 0
    line = capsys.readouterr().out.splitlines()[1].split(maxsplit=2)
    assert line == ["coin", "0.1", "How often does a fair coin show heads?"]


def test_bar_without_tqdm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tqdm.auto", None)
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    study = Study("coin", "smoke", 0, tmp_path, {})
    assert list(study.track(range(4), "throwing")) == [0, 1, 2, 3]
    assert capsys.readouterr().err.startswith("throwing 2 of 4\n")


def test_an_interrupted_study_goes_on(coin: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    thrown: list[int] = []

    def run(study: Study) -> None:
        def throw(number: int) -> dict[str, Any]:
            thrown.append(number)
            if thrown == [0, 1, 2]:
                raise KeyboardInterrupt
            return {"number": number, "heads": torch.tensor([number, 1]), "nested": [0.5, (math.nan, None)]}

        study.table("throws", [study.part("throw: a", f"number {i}", lambda i=i: throw(i)) for i in range(4)])

    coin.run = run
    command = ["study", "coin", "--smoke", "--out", str(tmp_path)]
    assert main(command) == 130
    assert "--resume goes on" in capsys.readouterr().err and not (tmp_path / "coin.json").exists()
    assert main([*command, "--seed", "1", "--resume"]) == 2
    assert "is of another study, size, seed or parameters" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert thrown == [0, 1, 2, 2, 3] and not (tmp_path / "parts").exists()
    rows = json.loads((tmp_path / "coin.json").read_text())["tables"]["throws"]
    assert [row["number"] for row in rows] == [0, 1, 2, 3] and rows[2]["heads"] == [2, 1]
    assert main(command) == 0 and thrown[5:] == [0, 1, 2, 3]  # from the beginning, where it is not asked to go on


def test_dictionaries_of_an_interrupted_sweep_stay(tmp_path: Path) -> None:
    data, options = SuperpositionData(24, 12, mean_active=2), {"l1": [0.05, 0.1], "n_features": [12, 24], "stop": 8, "snapshots": [4]}
    whole = _toy.train(Study("coin", "smoke", 0, tmp_path / "a", {}), "runs", data, **options)
    study = Study("coin", "smoke", 0, tmp_path / "b", {})
    _toy.train(study, "runs", data, **{**options, "n_features": [24]})
    calls: list[Any] = []
    again = train_many(data, **options, known=[Run(**run) for run in study.kept("runs")], callback=calls.append)
    assert [run.n_features for run in calls] == [12, 12]
    for one, other in zip(whole, again):
        assert (one.l1, one.n_features, one.loss, one.fvu) == (other.l1, other.n_features, other.loss, other.fvu)
        assert torch.equal(one.dictionary, other.dictionary) and torch.equal(one.snapshots[0][1], other.snapshots[0][1])
