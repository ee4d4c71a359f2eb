"""What was measured: JSON with machine, versions and commit, one table, one plot."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastsae._core import files
from fastsae.native import loader
from fastsae.plots import bars, figure


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
        now = datetime.datetime.now(datetime.timezone.utc)
        parts = [now.date().isoformat(), *map(slug, (label, *more))]
        about = {"date": parts[0], "taken": now.isoformat(timespec="seconds"), "quick": quick, **machine, "device": device}
        about |= {
            "level": None if loader.unavailable() else loader.isa(),
            "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        }
        if busy(about):
            print(f"bench: the machine is busy: {conditions(about)}", file=sys.stderr)
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
        try:
            return [draw() or path.name for path, (_, draw) in plots(self.path, self.about, self.entries).items()]
        except ImportError as error:
            print(f"no plot: {error}", file=sys.stderr)
            return []


Plots = dict[Path, tuple[str, Callable[[], None]]]
"""By path: the digest of what is drawn, which the file carries, and what draws it."""


def plots(path: Path, about: Mapping[str, Any], entries: Sequence[dict[str, Any]]) -> Plots:
    """Of one run, beside its JSON file."""
    measured = [entry for entry in entries if "ours" in entry]
    found: Plots = {}
    for ending, draw, drawn in (
        ("", plot, [entry for entry in measured if rivals(entry)]),
        ("-growth", plot_growth, [entry for entry in measured if entry["op"].endswith(" growth")]),
    ):
        if len(drawn) >= (1 if draw is plot else 4):
            target = path.with_name(f"{path.stem}{ending}.png")
            key = digest([draw.__name__, title(about), drawn])
            found[target] = key, partial(draw, drawn, target, title(about), key)
    return found


def digest(drawn: Any) -> str:
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16]


def drawn_from(path: Path) -> str | None:
    """The digest in a plot's file."""
    found = re.search(rb"tEXtDescription\0([0-9a-f]{16})", path.read_bytes()[:4096]) if path.exists() else None
    return found[1].decode() if found else None


def keep(path: Path, canvas: Any, key: str) -> None:
    files.replace_figure(path, canvas, dpi=150, metadata={"Description": key, "Software": None})


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def chip(about: Mapping[str, Any]) -> str:
    """What was measured on: the GPU's name, or the CPU's with its instruction set."""
    if str(about.get("device", "cpu")).startswith("cuda") and about["gpu"]:
        return about["gpu"][0]
    return about["cpu"] + (f", {about['level']}" if about.get("level") else "")


def busy(about: Mapping[str, Any]) -> bool:
    """Whether other work ran before the run: more than a quarter of a core."""
    return bool(about.get("load")) and about["load"][0] > 0.25


def conditions(about: Mapping[str, Any]) -> str:
    """Threads, date, commit, torch, and the load before the run, in a line."""
    load = "load before it not recorded" if not about.get("load") else f"load {about['load'][0]:.1f} before it{' (BUSY)' * busy(about)}"
    threads = f"{about['threads']} of {about['cores']} cores"
    return f"{threads}, {about['date']}, commit {about['commit']}, torch {about['versions']['torch']}, {load}"


def title(about: Mapping[str, Any]) -> str:
    return f"{chip(about)}\n{conditions(about)}"


def times_faster(entry: Mapping[str, Any], who: str) -> float:
    return entry["others"][who]["median"] / entry["ours"]["median"]


def times(value: float) -> str:
    """``2.5×``: two digits."""
    return f"{value:.2f}×" if value < 0.995 else f"{value:.1f}×" if value < 9.95 else f"{value:.0f}×"


def ratios(entry: dict[str, Any]) -> str:
    """Our median, and our time over everybody's, in a line."""
    median = entry["ours"]["median"]
    others = ", ".join(f"{who} {median / times['median']:.2f}" for who, times in entry["others"].items())
    return f"fastsae ({entry['backend']}): {median:.3f} ms; of others' time: {others or 'none'}"


def rivals(entry: Mapping[str, Any]) -> dict[str, Any]:
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


def plot(entries: Sequence[dict[str, Any]], path: Path, title: str, key: str) -> None:
    """How many times faster ours is than the fastest rival, by operation and shape."""
    canvas, axes = figure(figsize=(9, 1.4 + 0.26 * len(entries)))
    best = [min(rivals(entry), key=lambda who, entry=entry: entry["others"][who]["median"]) for entry in entries]
    values = [times_faster(entry, who) for entry, who in zip(entries, best)]
    labels = [f"{entry['op']}  {entry['shape']}" for entry in entries]
    bars(axes, values, labels, [f"{times(v)} {who}" for v, who in zip(values, best)], ["C0" if v >= 1 else "C3" for v in values])
    axes.set_xlabel("times faster than the fastest other in the run (longer is better; red: slower)")
    axes.set_title(title, fontsize=9)
    keep(path, canvas, key)


def plot_growth(entries: Sequence[dict[str, Any]], path: Path, title: str, key: str) -> None:
    """Time a row and extra memory over features and over rows, of entries named "... growth" with shapes B x D x F x K."""
    shapes = [tuple(map(int, entry["shape"].split("x"))) for entry in entries]
    canvas, panels = figure(rows=1, columns=2, figsize=(11, 4))
    for axes, grows, fixed, what in zip(panels, (2, 0), (0, 2), ("features F", "rows B")):
        common = statistics.mode(s[fixed] for s in shapes)
        found = {s[grows]: (s, entry) for s, entry in zip(shapes, entries) if s[fixed] == common}
        x, line = sorted(found), [found[size] for size in sorted(found)]
        each = [1000 * entry["ours"]["median"] / s[0] for s, entry in line]
        axes.plot(x, each, "o-", label="microseconds a row")
        expected = [each[-1] * (size / x[-1] if grows == 2 else 1) for size in x]
        axes.plot(x, expected, "k:", lw=1, label="proportional to F" if grows == 2 else "constant")
        extra = [max(entry["extra_mb"].get("ours") or 0, 0.1) for _, entry in line]
        axes.plot(x, extra, "s-", color="C2", label="extra MB, results included (drawn from 0.1)")
        axes.plot(x, [s[0] * s[2] * 4 / 2**20 for s, _ in line], "--", color="0.6", label="MB of a [B, F] matrix")
        constant = f"{'B' if grows == 2 else 'F'} = {common}, D = {line[0][0][1]}"
        axes.set(xscale="log", yscale="log", xlabel=what, title=f"{line[0][1]['op'].removesuffix(' growth')}: {constant}")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    canvas.suptitle(title, fontsize=9)
    keep(path, canvas, key)
