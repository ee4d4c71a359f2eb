"""Runs the table in as many processes as it takes: a row that crashes, hangs or breaks the device costs that row."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu import rows
from fastsae._core import files

BROKEN = 17
"""Exit code of a process whose device answers no more."""


@dataclass
class State:
    """What a process of the table tells the one that watches it, in a file."""

    path: Path
    done: list[str] = field(default_factory=list[str])
    running: str | None = None
    since: float = 0.0

    @classmethod
    def read(cls, path: Path) -> State:
        return cls(path, **json.loads(path.read_text())) if path.exists() else cls(path)

    def write(self) -> None:
        files.replace_text(self.path, json.dumps({"done": self.done, "running": self.running, "since": self.since}))

    def begin(self, row: str) -> None:
        self.running, self.since = row, time.time()
        self.write()

    def end(self) -> None:
        self.done.append(self.running or "")
        self.running = None
        self.write()


def supervise(command: list[str], *, grace: float = 60.0) -> int:
    """Runs ``command`` (``python -m bench.gpu``) until every row was begun once, in as many processes as that takes.

    A row that ends its process, or takes more than ``grace`` seconds and four times what it should, is noted, and the rest goes on in a
    new process. Returns the exit code of the last one, at least 1 where a row did not end well.
    """
    needs = {row.name: row.seconds for row in rows.ROWS}
    code, lost = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        command = [*command, "--begun", repr(time.time()), "--state", str(path)]
        children: list[subprocess.Popen[bytes]] = []

        def stop(*_: Any) -> None:
            for child in children:
                child.terminate()

        before = signal.signal(signal.SIGTERM, stop)
        try:
            for _ in range(len(rows.ROWS) + 1):
                child = subprocess.Popen(command)
                children[:] = [child]
                why = ""
                while child.poll() is None:
                    state = State.read(path)
                    if state.running and time.time() - state.since > grace + 4 * needs.get(state.running, 30):
                        why = f"killed after {time.time() - state.since:.0f} s"
                        child.kill()
                    time.sleep(0.2)
                code, state = child.returncode, State.read(path)
                if state.running is None:
                    break
                lost += 1
                why = why or ("the device answered no more" if code == BROKEN else f"its process ended with {code}")
                print(f"bench.gpu: {state.running}: {why}; the others go on", file=sys.stderr, flush=True)
                command += ["--lost", f"{state.running}: {why}"]
                state.end()
        finally:
            signal.signal(signal.SIGTERM, before)
    return max(code, min(lost, 1)) if code >= 0 else 1
