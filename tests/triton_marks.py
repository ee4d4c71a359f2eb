"""How a test of Triton kernels runs: in the interpreter, compiled ahead of time, on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from emulation import compiler

from fastsae._core import triton_support

CPU = torch.device("cpu")
CI = os.environ.get("HYPOTHESIS_PROFILE") == "ci"  # in which the interpreter, and the emulation, take a part of what `make deep` takes
interpreted = pytest.mark.skipif(not triton_support.interpreting(), reason="runs with TRITON_INTERPRET=1, see passes_in_the_interpreter")
compiled = pytest.mark.skipif(triton_support.interpreting(), reason="TRITON_INTERPRET=1: kernels are interpreted, not compiled")
on_gpu = pytest.mark.skipif(triton_support.interpreting() or not torch.cuda.is_available(), reason="needs a CUDA GPU")
usable = pytest.mark.skipif(
    triton_support.interpreting() and triton_support.unavailable(CPU) is not None, reason=str(triton_support.unavailable(CPU))
)


def passes_in_the_interpreter(*options: str) -> None:
    """The tests of files in a process of their own, where Triton interprets its kernels."""
    command = [sys.executable, "-m", "pytest", *options, "-q", "-m", "", "-p", "no:cacheprovider"]
    chip = os.environ.get("FASTSAE_TENSOR_CORE", "hopper" if compiler() else "")  # products as this chip's tensor cores form them
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FASTSAE_TENSOR_CORE": chip}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
