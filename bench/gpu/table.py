"""The whole table on one device: its rows in order of importance, as far as the time goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import report
from bench.gpu import rows
from bench.gpu.harness import Bench, Missing, told
from bench.gpu.supervise import BROKEN, supervise
from fastsae._core import files

MINUTES = 4.0


def device_facts(device: torch.device) -> dict[str, Any]:
    """What the device says of itself beside its name; driver, clocks and power limit where nvidia-smi answers."""
    if device.type != "cuda":
        return {}
    p = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        said = f"no nvidia-smi: {error}"
    return {
        "cuda": torch.version.cuda, "multiprocessors": p.multi_processor_count, "memory_bytes": p.total_memory,
        "capability": [p.major, p.minor], "driver_clocks_power": said,
    }  # fmt: skip


def run(
    device: torch.device, out: Path, machine: dict[str, Any], *, minutes: float, quick: bool, only: Sequence[str] = (),
    begun: float | None = None, running: Path | None = None, lost: Sequence[str] = (),
) -> int:  # fmt: skip
    """Measures the table; 0, or 1 where a row of ours was refused or failed, or BROKEN where the device answers no more.

    Args:
        begun, running, lost: when the run began, the file that tells which row runs, and how earlier processes of it ended (``supervise``).
    """
    bench = Bench(device, out, minutes, quick, machine, begun)
    for text in lost:
        row, _, why = text.partition(": ")
        if not any(note["op"] == row and note["note"].startswith("failed") for note in bench.report.notes):
            bench.note(row, "", f"failed: {why}")

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` and the process above may send it twice
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)  # `timeout` sends it: the plot is still drawn
    todo = [row for row in rows.ROWS if not only or row.name in only]
    if not quick:
        bench.say(
            f"{len(todo)} groups of rows, about {sum(row.seconds for row in todo) / 60:.0f} minutes; {bench.left() / 60:.1f} are left"
        )
    try:
        for place, row in enumerate(todo):
            if not quick and bench.left() < row.seconds:
                bench.note(row.name, "", f"not begun: {bench.left():.0f} s of {minutes * 60:.0f} left, it needs about {row.seconds:.0f}")
                continue
            bench.say(f"== {place + 1} of {len(todo)}: {row.name}")
            if not _measure(bench, row, running):
                return BROKEN
    except KeyboardInterrupt:
        bench.note("all", "", "stopped by a signal")
        if running is not None:
            running.unlink(missing_ok=True)
    finally:
        if signal.getsignal(signal.SIGTERM) is stop:
            signal.signal(signal.SIGTERM, before)
    return _finish(bench)


def _measure(bench: Bench, row: rows.Row, running: Path | None) -> bool:
    """Whether the device still answers after it."""
    if running is not None:
        files.replace_text(running, row.name)
    try:
        row.measure(bench)
    except Missing as reason:
        bench.note(row.name, "", str(reason))
    except Exception as error:
        traceback.print_exc()
        bench.note(row.name, "", f"failed: {told(error)}")
    bench.save()
    try:
        bench.clear()
    except Exception as error:  # nothing runs on this device any more
        bench.note(row.name, "", f"failed: {told(error)}")
        bench.save()
        return False
    if running is not None:
        running.unlink()
    return True


def _finish(bench: Bench) -> int:
    """Table, verdicts, notes and plot; the exit code."""
    bench.save()
    measured = [entry for entry in bench.report.entries if "ours" in entry]
    report.print_table(measured)
    for entry in measured:
        for verdict in entry.get("targets", []):
            print(f"{entry['op']:<24} {entry['shape']:<28} {verdict['text']}")
    for note in bench.report.notes:
        print(f"{note['op']} {note['shape']}: {note['note']}")
    bench.say("stored " + ", ".join([str(bench.report.path), *bench.report.draw()]))
    failed = [entry for entry in bench.report.entries if any(who.startswith("fastsae") for who in entry.get("failures", {}))]
    return 1 if failed or any(note["note"].startswith("failed") for note in bench.report.notes) else 0


def command(out: Path, *, minutes: float | None, quick: bool, only: Sequence[str] = ()) -> int:
    """The whole table on the current CUDA device, each row survived by the others."""
    if not torch.cuda.is_available():
        print("bench.gpu: no CUDA device (torch.cuda.is_available() is False); --device cpu --quick runs the same code", file=sys.stderr)
        return 2
    line = [sys.executable, "-m", "bench.gpu", "--device", "cuda", "--out", str(out), "--minutes", str(minutes or MINUTES)]
    os.chdir(Path(__file__).resolve().parents[2])
    return supervise([*line, "--quick"] if quick else line, only)


def listed() -> int:
    """Prints the rows, in order of importance."""
    print(f"{'rows':<16} {'minutes':>7}  shapes")
    for row in rows.ROWS:
        print(f"{row.name:<16} {row.seconds / 60:>7.1f}  {row.shapes}")
    print(f"{len(rows.ROWS)} groups of rows, about {sum(row.seconds for row in rows.ROWS) / 60:.0f} minutes; --minutes N begins what fits")
    return 0
