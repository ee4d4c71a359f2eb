"""What is lost with a process: nothing. One of four is killed; the others end, and any number goes on to the bits of the whole run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from forks import script

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"


@pytest.mark.slow
def test_killed_runs_end_and_go_on_in_the_same_bits(tmp_path: Path) -> None:
    seed, times, others = (0, 20, "2,8,1") if DEEP else (0, 1, "2,1")
    said = script("kill_runs.py", tmp_path, seed, times, others)
    assert said.count("the others ended") == times, said
