"""Processes that are forks of this one, which has imported everything once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable

from places import ROOT, TESTS

Ended = list[tuple[int, float]]
"""Exit codes and times."""


def port() -> int:
    """One that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def fork(size: int, run: Callable[[int], object], failed: Callable[[int, str], object] = lambda rank, text: print(text)) -> list[int]:
    """Their process numbers, by rank. They leave without torch's end, which waits for a process that is gone."""
    pids = []
    for rank in range(size):
        if not (pid := os.fork()):
            code = 1
            try:
                run(rank)
                code = 0
            except BaseException:
                failed(rank, traceback.format_exc())
            finally:
                os._exit(code)
        pids.append(pid)
    return pids


def ended(pids: list[int], within: float, together: bool = False) -> Ended:
    """What is there after ``within`` seconds is killed; ``together``: also where one has failed."""
    found: dict[int, tuple[int, float]] = {}
    end = time.monotonic() + within
    while len(found) < len(pids):
        late = time.monotonic() > end or (together and any(code for code, _ in found.values()))
        for pid in set(pids) - set(found):
            over, status = os.waitpid(pid, os.WNOHANG)
            if over:
                found[pid] = os.waitstatus_to_exitcode(status), time.monotonic()
            elif late:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [found[pid] for pid in pids]


def script(name: str, *arguments: object) -> str:
    """What a file of this folder prints, run in a process of its own with one thread."""
    paths = os.pathsep.join(map(str, (ROOT, TESTS, TESTS / "distributed")))
    command = [sys.executable, str(TESTS / "distributed" / name), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
