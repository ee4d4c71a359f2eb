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
    files = [str(root / "bench" / f"bench_{op}.py") for op in options.ops or known]
    environment = {**os.environ, "FASTSAE_BENCH_QUICK": "1" if options.quick else "0", "FASTSAE_BENCH_DEVICE": options.device}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmark.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            *files,
            "-q",
            "-p",
            "no:cacheprovider",
            f"--benchmark-json={path}",
            "--benchmark-disable-gc",
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
    (out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        print_table(entries)
    try:
        plot(entries, out / f"{stem}.png")
    except ImportError as error:
        print(f"no plot: {error}", file=sys.stderr)
    print(f"\nstored {out / stem}.json" + (f" and {stem}.png" if (out / f"{stem}.png").exists() else ""), file=sys.stderr)
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


def plot(entries: list[dict[str, Any]], path: Path) -> None:
    """Our time over that of the best plain torch, by operation and shape."""
    from fastsae.plots import figure

    rows = [
        (f"{entry['op']}  {entry['shape']}", entry, min(times["median"] for times in rivals(entry).values()))
        for entry in entries
        if rivals(entry)
    ]
    canvas, axes = figure(figsize=(8, 0.9 + 0.36 * len(rows)))
    for position, (_, entry, best) in enumerate(reversed(rows)):
        ours = entry["ours"]["median"] / best
        axes.barh(position, ours, color="tab:green" if ours <= 1 else "tab:gray")
        axes.plot([entry["ours"]["min"] / best, entry["ours"]["max"] / best], [position, position], color="black", linewidth=1)
        axes.text(max(ours, entry["ours"]["max"] / best) * 1.03, position, f" {ours:.2f}", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in reversed(rows)], fontsize=8)
    axes.set_xlabel("our time / the best other in the run (line: min .. max)")
    axes.spines[["top", "right"]].set_visible(False)
    canvas.savefig(path, dpi=150)
