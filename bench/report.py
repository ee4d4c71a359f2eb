"""Runs the benches, prints one table, draws one plot, stores JSON with machine, versions and commit."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fastsae._core import files


def run(options: argparse.Namespace, root: Path, machine: dict[str, Any]) -> int:
    if options.device != "cpu":
        import torch

        if not torch.cuda.is_available():
            print("fastsae bench: no CUDA device (torch.cuda.is_available() is False)", file=sys.stderr)
            return 2
        if not options.ops:
            from bench import gpu

            out = options.out or root / "bench" / "results"
            return gpu.table(out.resolve(), minutes=options.minutes, quick=options.quick)
    known = sorted(path.stem.removeprefix("bench_") for path in (root / "bench").glob("bench_*.py"))
    unknown = [op for op in options.ops if op not in known]
    if unknown:
        print(f"fastsae bench: unknown {', '.join(unknown)}; known: {', '.join(known)}", file=sys.stderr)
        return 2
    out = options.out or root / "bench" / "results"
    out.mkdir(parents=True, exist_ok=True)
    paths = [str(root / "bench" / f"bench_{op}.py") for op in options.ops or known]
    environment = {**os.environ, "FASTSAE_BENCH_QUICK": "1" if options.quick else "0", "FASTSAE_BENCH_DEVICE": options.device}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmark.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            *paths,
            "-q",
            "-p",
            "no:cacheprovider",
            f"--benchmark-json={path}",
            "--benchmark-disable-gc",
            *(["-k", options.rows] if options.rows else []),
        ]
        stdout = sys.stderr if options.json else None
        code = subprocess.run(
            [*command, "--benchmark-columns=median,min,max,rounds"], cwd=root, env=environment, stdout=stdout, check=False
        ).returncode
        if not path.exists() or not path.read_text():
            print("fastsae bench: no figures were taken (see the output above)", file=sys.stderr)
            return code or 1
        entries = [entry["extra_info"] for entry in json.loads(path.read_text())["benchmarks"]]
    if options.device != "cpu":
        machine = {**machine, "device": options.device}
    report = {"date": datetime.date.today().isoformat(), "quick": options.quick, **machine, "results": entries}
    label = machine["gpu"][0] if options.device != "cpu" and machine["gpu"] else machine["cpu"]
    stem = f"{report['date']}-{re.sub(r'[^a-z0-9]+', '-', label.lower()).strip('-')}{'-quick' if options.quick else ''}"
    if options.ops:
        stem += "-" + "-".join(options.ops)
    if options.rows:
        stem += "-" + re.sub(r"[^a-z0-9]+", "-", options.rows.lower()).strip("-")
    files.replace_text(out / f"{stem}.json", json.dumps(report, indent=1) + "\n")
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        print_table(entries)
    drawn = []
    try:
        drawn += plot(entries, out / f"{stem}.png") + plot_growth(entries, out / f"{stem}-growth.png")
    except ImportError as error:
        print(f"no plot: {error}", file=sys.stderr)
    print("\nstored " + ", ".join([f"{out / stem}.json", *drawn]), file=sys.stderr)
    return code


def rivals(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: times for name, times in entry["others"].items() if name != entry["floor"]}


def print_table(entries: list[dict[str, Any]]) -> None:
    print(f"\n{'operation':<32} {'shape':<22} {'who':<40} {'median ms':>10} {'min .. max':>20} {'ours / it':>9} {'extra MB':>9}")
    for entry in entries:
        rows = {f"fastsae ({entry['backend']})": entry["ours"], **entry["others"]}
        for position, (who, times) in enumerate(rows.items()):
            head = f"{entry['op']:<32} {entry['shape']:<22}" if position == 0 else " " * 55
            ratio = entry["ours"]["median"] / times["median"]
            memory = entry["extra_mb"].get("ours" if position == 0 else who)
            memory_text = "" if memory is None else f"{memory:.0f}"
            mark = " *" if who == entry["floor"] else ""
            print(
                f"{head} {who + mark:<40} {times['median']:>10.3f} {times['min']:>9.3f} .. {times['max']:<8.3f} "
                f"{ratio:>8.2f} {memory_text:>9}"
            )
    print("* a floor: part of the work only. Medians of alternating runs; only ratios within one run count.")


def plot(entries: list[dict[str, Any]], path: Path) -> list[str]:
    """Our time over that of the best plain torch, by operation and shape; the names of the files written."""
    from fastsae.plots import figure

    rows = [
        (f"{entry['op']}  {entry['shape']}", entry, min(times["median"] for times in rivals(entry).values()))
        for entry in entries
        if rivals(entry)
    ]
    if not rows:
        return []
    canvas, axes = figure(figsize=(8, 0.9 + 0.36 * len(rows)))
    for position, (_, entry, best) in enumerate(reversed(rows)):
        ours = entry["ours"]["median"] / best
        axes.barh(position, ours, color="tab:green" if ours <= 1 else "tab:gray")
        axes.plot([entry["ours"]["min"] / best, entry["ours"]["max"] / best], [position, position], color="black", linewidth=1)
        axes.text(max(ours, entry["ours"]["max"] / best) * 1.03, position, f" {ours:.2g}", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in reversed(rows)], fontsize=8)
    axes.set_xlabel("our time / the best other in the run (line: min .. max)")
    axes.spines[["top", "right"]].set_visible(False)
    files.replace_figure(path, canvas, dpi=150)
    return [path.name]


def plot_growth(entries: list[dict[str, Any]], path: Path) -> list[str]:
    """Time a row and extra memory over features and over rows, of entries named "... growth" with shapes B x D x F x K."""
    from fastsae.plots import figure

    shapes = [(tuple(map(int, entry["shape"].split("x"))), entry) for entry in entries if entry["op"].endswith(" growth")]
    if len(shapes) < 4:
        return []
    canvas, axes = figure(rows=1, columns=2, figsize=(11, 4))
    common = {
        place: max(set(values), key=values.count) for place, values in ((0, [s[0] for s, _ in shapes]), (2, [s[2] for s, _ in shapes]))
    }
    for axis, grows, fixed, name in ((axes[0], 2, 0, "features F"), (axes[1], 0, 2, "rows B")):
        line = sorted({s[grows]: (s, entry) for s, entry in shapes if s[fixed] == common[fixed]}.values(), key=lambda item: item[0][grows])
        x = [s[grows] for s, _ in line]
        each = [1000 * entry["ours"]["median"] / s[0] for s, entry in line]
        axis.plot(x, each, "o-", label="microseconds a row")
        axis.plot(
            x, [each[-1] * (v / x[-1] if grows == 2 else 1) for v in x], "k:", lw=1, label="proportional to F" if grows == 2 else "constant"
        )
        dense = [s[0] * s[2] * 4 / 2**20 for s, _ in line]
        axis.plot(
            x,
            [max(entry["extra_mb"].get("ours") or 0, 0.1) for _, entry in line],
            "s-",
            color="C2",
            label="extra MB, results included (drawn from 0.1)",
        )
        axis.plot(x, dense, "--", color="0.6", label="MB of a [B, F] matrix")
        fixed_text = f"B = {line[0][0][0]}" if grows == 2 else f"F = {line[0][0][2]}"
        axis.set(
            xscale="log", yscale="log", xlabel=name, title=f"{line[0][1]['op'].removesuffix(' growth')}: {fixed_text}, D = {line[0][0][1]}"
        )
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    files.replace_figure(path, canvas, dpi=150)
    return [path.name]
