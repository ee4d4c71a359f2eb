"""The CUDA C++ kernels on threads of the system, under ThreadSanitizer: what two threads touch between two barriers. `make deep`."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulation
import pytest
from places import TESTS


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("HYPOTHESIS_PROFILE") != "deep", reason="half a minute of compiling and many threads: make deep")
@pytest.mark.skipif(emulation.compiler() is None, reason="no C++ compiler: the CUDA C++ kernels were NOT run")
def test_threads_of_a_block_do_not_race(tmp_path: Path) -> None:
    flags = [*emulation.FLAGS, "-DFASTSAE_EMULATE_THREADS", "-fsanitize=thread", "-g", "-pthread"]

    def compile_one(source: Path) -> str:
        out = tmp_path / f"{source.name}.o"
        subprocess.run([str(emulation.compiler()), *flags, "-x", "c++", "-c", str(source), "-o", str(out)], check=True)
        return str(out)

    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(compile_one, [*emulation.SOURCES, TESTS / "gpu" / "threads.cpp"]))
    program = str(tmp_path / "threads")
    subprocess.run([str(emulation.compiler()), "-fsanitize=thread", "-pthread", *objects, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = subprocess.run([program, "without a barrier"], capture_output=True, text=True)
    assert "data race" in seen.stderr and seen.returncode == 66  # what it gives where it has found one
