"""Threads share no counter while each has work of its own, and read what they packed: counted, as times on two cores would be noise."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++, whose OpenMP runtime the counting program links")
def test_threads_take_their_own_units_and_read_their_own_panels(tmp_path: Path) -> None:
    sources = ["csrc/parallel.cpp", "tests/native/counting.cpp"]
    flags = ["-std=c++20", "-fopenmp", "-Icsrc", "-Wl,--no-as-needed", "-lgomp", "-ldl"]
    subprocess.run(["g++", *sources, *flags, "-o", str(tmp_path / "counting")], cwd=ROOT, check=True, timeout=120)
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_DYNAMIC": "false"}
    run = subprocess.run([str(tmp_path / "counting")], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stdout
    assert run.stdout == "192 own, 0 of another, 128 of 128 read by the thread that packed\n"
