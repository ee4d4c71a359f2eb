"""What is lost with a process: nothing. One of four is killed; the others end, and any number goes on to the bits of the whole run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT, TESTS

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"


@pytest.mark.slow
def test_killed_runs_end_and_go_on_in_the_same_bits(tmp_path: Path) -> None:
    seed, times, others = (0, 20, "2,8,1") if DEEP else (0, 1, "2,1")
    paths = [str(ROOT), str(TESTS), str(TESTS / "distributed")]
    command = [sys.executable, str(TESTS / "distributed/kill_runs.py"), str(tmp_path), str(seed), str(times), others]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=7200 if DEEP else 400, check=False)
    assert done.returncode == 0 and done.stdout.count("the others ended") == times, done.stdout + done.stderr
