"""Runs the table in as many processes as it takes: a row that crashes, hangs or breaks the device costs that row."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu import rows

BROKEN = 17
"""Exit code of a process whose device answers no more."""


def supervise(command: list[str], only: Sequence[str] = (), *, grace: float = 60.0) -> int:
    """Runs ``command`` (``python -m bench.gpu``) until every row was begun once, in as many processes as that takes.

    A row that ends its process, or takes more than ``grace`` seconds and four times what it should, is noted, and the rest goes on in a
    new process. Returns the exit code of the last one, at least 1 where a row did not end well.
    """
    left = [row for row in rows.ROWS if not only or row.name in only]
    code, lost, children = 0, 0, list[subprocess.Popen[bytes]]()
    before = signal.signal(signal.SIGTERM, lambda *_: [child.terminate() for child in children])
    try:
        with tempfile.TemporaryDirectory() as folder:
            running = Path(folder) / "running"  # the name of the row that runs, written when it began
            command = [*command, "--begun", repr(time.time()), "--running", str(running)]
            while left:
                child = subprocess.Popen([*command, *(row.name for row in left)])
                children[:] = [child]
                why = ""
                while child.poll() is None:
                    row, since = _running(running)
                    if row is not None and time.time() - since > grace + 4 * row.seconds:
                        why = f"killed after {time.time() - since:.0f} s"
                        child.kill()
                    time.sleep(0.2)
                code, (row, _) = child.returncode, _running(running)
                if row is None:
                    break
                lost += 1
                why = why or ("the device answered no more" if code == BROKEN else f"its process ended with {code}")
                print(f"bench.gpu: {row.name}: {why}; the others go on", file=sys.stderr, flush=True)
                command += ["--lost", f"{row.name}: {why}"]
                left = left[left.index(row) + 1 :]
                running.unlink()
    finally:
        signal.signal(signal.SIGTERM, before)
    return max(code, min(lost, 1)) if code >= 0 else 1


def _running(path: Path) -> tuple[Any, float]:
    """(the row that runs, or None; when it began)."""
    try:
        name, since = path.read_text(), path.stat().st_mtime
    except FileNotFoundError:
        return None, 0.0
    return next(row for row in rows.ROWS if row.name == name), since
