"""Every table and plot of the README and the site that shows a measurement, written from the newest result of each row in bench/results.

    python -m bench.figures      # drops results that a newer run has replaced, then writes the tables and plots

A Markdown file names a table: what stands between ``<!-- figures: NAME -->`` and ``<!-- /figures -->`` is written anew. ``docs/benchmarks``
holds a page for each machine. ``tests/project/test_figures.py`` fails where a table or plot is not that of the JSON.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bench.report import Plots, chip, conditions, digest, drawn_from, keep, plots, rivals, slug, times, times_faster
from fastsae._core import files
from fastsae.compare import MMCS_VARIANTS
from fastsae.plots import bars, figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = ROOT / "docs" / "benchmarks"
Reports = dict[Path, dict[str, Any]]
Row = Mapping[str, Any]

FRONT_SHAPE = "256x768x24576x32"
FAMILIES = {
    "Training step of a TopK SAE": "training step",
    "Many SAEs in one call": "ensemble",
    "Encode": "encode_",
    "Decode and its gradients": "decode",
    "Adam": "adam",
    "Match dictionaries (MMCS)": "match",
    "Spline codes and hashes": ("spline_", "pack_signs", "hash_"),
    "Hamming distances": "hamming",
    "One row at a time": "200 x ",
}
"""Rows of the speed table: what the names of a family's benches begin with."""
AS_GOOD = {"torch linear+where"}
"""Floors that many users would take as they are: a dense result."""
OWN = ("our", "E single steps", "one by one", "200 x decode", "200 x encode")
"""What else of ours some rows stand beside."""


def load(folder: Path = RESULTS) -> Reports:
    """What the bench has stored, oldest first."""
    found = {path: json.loads(path.read_text()) for path in folder.glob("*.json")}
    kept = {path: report for path, report in found.items() if isinstance(report.get("results"), list) and not report["quick"]}
    return dict(sorted(kept.items(), key=lambda item: (when(item[1]), item[0].name)))


def when(report: Mapping[str, Any]) -> str:
    return report.get("taken", report["date"])


def replaced(reports: Reports) -> dict[Path, list[Row]]:
    """The rows of each file that a newer file has as well. Raises ValueError where none of two is the newer."""
    newest: dict[tuple[Any, ...], Path] = {}
    old: dict[Path, list[Row]] = {}
    for path, report in reports.items():
        for row in report["results"]:
            key = chip(report), report["threads"], row["op"], row["shape"]
            before = newest.get(key, path)
            if before != path:
                if when(reports[before]) == when(report):
                    raise ValueError(f"{before.name} and {path.name} both have {row['op']} {row['shape']} of {when(report)}")
                old.setdefault(before, []).extend(r for r in reports[before]["results"] if (r["op"], r["shape"]) == key[2:])
            newest[key] = path
    return old


def prune(reports: Reports) -> None:
    """Takes replaced rows out of the files, and files without rows out of the folder, with their plots."""
    for path, rows in replaced(reports).items():
        report = reports[path]
        report["results"] = [row for row in report["results"] if row not in rows]
        if report["results"]:
            files.replace_text(path, json.dumps(report, indent=1) + "\n")
        else:
            del reports[path]
            for gone in (path, *path.parent.glob(f"{path.stem}*.png")):
                gone.unlink()


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


def full(row: Row) -> dict[str, float]:
    """Times faster than everybody who does all of the work."""
    return {who: times_faster(row, who) for who in row["others"] if (who in rivals(row) or who in AS_GOOD) and not who.startswith(OWN)}


def front(reports: Reports) -> Reports:
    """The results of the machine that the README shows: of those with a training step, the one with most rows; of as many, the last."""
    names = [chip(report) for report in reports.values() if any(row["op"] == "training step fused" for row in report["results"])]
    count = Counter(chip(report) for report in reports.values() for _ in report["results"])
    shown = max(reversed(names), key=lambda name: count[name])
    return {path: r for path, r in reports.items() if chip(r) == shown}


def rows_of(reports: Reports) -> list[Row]:
    return [row for report in reports.values() for row in report["results"] if row["others"]]


def speed(reports: Reports) -> str:
    """A line for each family: the range over all of its sizes and kinds, and every case in which another is faster."""
    lines: list[list[str]] = []
    rows = [row for row in rows_of(front(reports)) if full(row)]
    for name, begins in FAMILIES.items():
        ratios = [(min(full(row).values()), f"{row['op']}, {row['shape']}") for row in rows if row["op"].startswith(begins)]
        if not ratios:
            continue
        values, worst = [ratio for ratio, _ in ratios], min(ratios)
        slower = f"{sum(value < 1 for value in values)} of {len(values)}"
        lines.append([name, times(statistics.median(values)), times(max(values)), slower, f"{times(worst[0])} ({worst[1]})"])
    return table(["operation", "median", "best", "slower in", "worst"], lines)


def front_rows(reports: Reports) -> dict[str, dict[str, float]]:
    """Times faster in a training step and in encode, by rival."""
    rows = {row["op"]: row for row in rows_of(front(reports)) if row["shape"] == FRONT_SHAPE}
    step, encode = full(rows["training step fused"]), full(rows["encode_topk FD"])
    libraries = {"SAELens": "SAELens", "sparsify": "sparsify, torch Adam", "dictionary_learning": "dictionary_learning"}
    return {
        "training step": {
            **{who: step[key] for who, key in libraries.items()},
            "best plain torch": min(v for who, v in step.items() if who.startswith("plain")),
        },
        "encode": {
            **{who: full(rows[f"{who} encode, sparse"])[f"{who} as it is"] for who in libraries},
            "best plain torch": min(encode.values()),
        },
    }


def front_conditions(reports: Reports) -> str:
    B, D, F, k = FRONT_SHAPE.split("x")
    found = front(reports)
    about = next(r for r in found.values() if any(row["op"] == "training step fused" for row in r["results"]))
    shape = f"TopK SAE, B = {B}, D = {D}, F = {F}, k = {k}, float32"
    return f"{chip(about)}, {about['threads']} cores, {about['date']}; {shape}; medians of alternating runs."


def dropin(reports: Reports) -> str:
    """The libraries before and after ``accelerate``."""
    lines: list[list[str]] = []
    for row in rows_of(front(reports)):
        for who, ratio in full(row).items():
            if who.endswith(" as it is"):
                memory = [f"{row['extra_mb'][key]:.0f}" for key in ("ours", who)]
                lines.append([row["op"], row["shape"], times(ratio), " / ".join(memory)])
    return table(["library and call", "B × D × F × k", "times faster", "extra MB, after / before"], sorted(lines))


def fvu(folder: Path = RESULTS) -> str:
    """Equal steps on a model's activations, from ``python -m bench.fvu``."""
    report = json.loads((folder / "fvu.json").read_text())
    lines = [
        [
            who,
            f"{statistics.mean(found['fvu']):.3f}",
            f"{statistics.mean(found['cpu_seconds']):.1f}",
            times(1 / statistics.median(found["ours_to_theirs_cpu_seconds"])),
        ]
        for who, found in report["results"].items()
    ]
    return table(["who", "held-out FVU", "CPU seconds", "fastsae is faster"], lines)


def variants() -> str:
    """The published meanings of MMCS."""
    lines: list[list[str]] = []
    for name, v in MMCS_VARIANTS.items():
        direction = {"a_to_b": "of a in b", "b_to_a": "of b in a", "mean": "both, averaged"}.get(v.direction, v.direction.replace("_", " "))
        how = [*["by magnitude"] * v.absolute, *["one to one"] * v.one_to_one, *["without itself"] * v.exclude_self]
        summary = f"share above {v.threshold}" if v.summary == "above" else v.summary.replace("_", " ")
        lines.append([f"`{name}`", "-" if v.one_to_one else direction, ", ".join(how) or "-", summary, v.source])
    return table(["variant", "best matches", "how", "summary", "source"], lines)


def machines(reports: Reports) -> str:
    found = dict.fromkeys(map(chip, reports.values()))
    lines = [[f"[{name}]({slug(name)}.md)", str(sum(len(r["results"]) for r in reports.values() if chip(r) == name))] for name in found]
    return table(["machine", "rows"], lines)


def page(name: str, reports: Reports) -> str:
    """Of one machine: a section for each run, with its plots and a table of all rows."""
    parts = [
        f"# {name}",
        "Written by `python -m bench.figures`. Each section is one run of `fastsae bench`. "
        "In a run everybody takes turns on the same inputs. Only ratios within one run count. "
        "A *floor* does a part of the work only, such as the product alone.",
    ]
    for path, report in sorted(reports.items()):
        parts += [f"## {path.stem.removeprefix(report['date'] + '-').removeprefix(slug(report['cpu']) + '-').replace('-', ' ')}"]
        parts += [f"{conditions(report)}. [JSON](../../bench/results/{path.name})"]
        parts += [f"![{plot.stem}](../../bench/results/{plot.name})" for plot in plots(path, report, report["results"])]
        lines: list[list[str]] = []
        for row in report["results"]:
            ratios = sorted((times_faster(row, who), who) for who in row["others"])
            memory = " / ".join(
                "-" if row["extra_mb"].get(key) is None else f"{row['extra_mb'][key]:.0f}"
                for key in ("ours", *[who for _, who in ratios[:1]])
            )
            others = "; ".join(f"{times(ratio)} {who}{' *(floor)*' * (who == row['floor'])}" for ratio, who in ratios)
            lines.append([row["op"], row["shape"], row["backend"], f"{row['ours']['median']:.3g}", others or "-", memory])
        parts.append(table(["operation", "size", "backend", "fastsae, ms", "times faster than", "extra MB, ours / first"], lines))
    return "\n\n".join(parts) + "\n"


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def texts(reports: Reports) -> dict[Path, str]:
    """What each Markdown file must hold."""
    blocks: dict[str, Callable[[], str]] = {
        "speed": partial(speed, reports),
        "conditions": partial(front_conditions, reports),
        "dropin": partial(dropin, reports),
        "fvu": fvu,
        "variants": variants,
        "machines": partial(machines, reports),
    }
    wanted = {
        PAGES / f"{slug(name)}.md": page(name, {path: r for path, r in reports.items() if chip(r) == name})
        for name in dict.fromkeys(map(chip, reports.values()))
    }
    for path in documents():
        if path not in wanted:
            marked = r"(<!-- figures: (\w+) -->\n).*?(<!-- /figures -->)"
            wanted[path] = re.sub(marked, lambda m: f"{m[1]}{blocks[m[2]]()}\n{m[3]}", path.read_text(), flags=re.DOTALL)
    return wanted


def draw_front(ratios: dict[str, dict[str, float]], path: Path, name: str, key: str) -> None:
    canvas, panels = figure(figsize=(9, 2.5), columns=2)
    for axes, (what, by) in zip(panels, ratios.items()):
        bars(axes, list(by.values()), list(by), list(map(times, by.values())), ["C0"] * (len(by) - 1) + ["0.6"])
        highest = max(by.values())
        axes.set(xscale="linear", xlim=(0, 1.15 * highest), title=f"{what}: fastsae is .. times faster than")
        axes.xaxis.set_major_formatter("{x:g}×")
        axes.title.set_fontsize(10)
    canvas.suptitle(name, fontsize=9)
    keep(path, canvas, key)


def all_plots(reports: Reports) -> Plots:
    found: Plots = {}
    for path, report in reports.items():
        found |= plots(path, report, report["results"])
    ratios, name = front_rows(reports), front_conditions(reports)
    key = digest([name, ratios])
    found[RESULTS / "speed.png"] = key, partial(draw_front, ratios, RESULTS / "speed.png", name, key)
    return found


def main() -> None:
    reports = load()
    prune(reports)
    for path, text in texts(reports).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace_text(path, text)
    for path, (key, draw) in all_plots(reports).items():
        if drawn_from(path) != key:
            draw()
    print(f"{len(rows_of(reports))} rows of {len(reports)} runs; tables and plots are written")


if __name__ == "__main__":
    main()
