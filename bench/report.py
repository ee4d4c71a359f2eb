"""What was measured: JSON with machine, versions and commit, one table, one plot."""

from __future__ import annotations

import datetime
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsae._core import files
from fastsae.plots import figure


@dataclass
class Report:
    """The JSON file of a run, written anew whenever something is added: what was measured survives a kill."""

    path: Path
    about: dict[str, Any]
    entries: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    notes: list[dict[str, str]] = field(default_factory=list[dict[str, str]])

    @classmethod
    def begin(cls, folder: Path, machine: dict[str, Any], device: str, *, quick: bool, more: tuple[str, ...] = ()) -> Report:
        """Of today, named after the chip, ``more`` and "quick"."""
        kind, _, number = device.partition(":")
        label = machine["cpu"] if kind == "cpu" or not machine["gpu"] else machine["gpu"][int(number or 0)]
        parts = [datetime.date.today().isoformat(), *(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in (label, *more))]
        about = {"date": parts[0], "quick": quick, **machine, "device": device}
        return cls(folder / f"{'-'.join([*parts, *['quick'] * quick])}.json", about)

    def note(self, op: str, shape: str, text: str) -> None:
        self.notes.append({"op": op, "shape": shape, "note": text})

    def text(self) -> str:
        return json.dumps({**self.about, "results": self.entries, "notes": self.notes}, indent=1) + "\n"

    def save(self, **figures: Any) -> None:
        self.about.update(figures)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        files.replace_text(self.path, self.text())

    def draw(self) -> list[str]:
        """Plots beside the file; the names of those written."""
        measured = [entry for entry in self.entries if "ours" in entry]
        try:
            return plot(measured, self.path.with_suffix(".png")) + plot_growth(
                measured, self.path.with_name(f"{self.path.stem}-growth.png")
            )
        except ImportError as error:
            print(f"no plot: {error}", file=sys.stderr)
            return []


def ratios(entry: dict[str, Any]) -> str:
    """Our median, and our time over everybody's, in a line."""
    median = entry["ours"]["median"]
    others = ", ".join(f"{who} {median / times['median']:.2f}" for who, times in entry["others"].items())
    return f"fastsae ({entry['backend']}): {median:.3f} ms; of others' time: {others or 'none'}"


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
