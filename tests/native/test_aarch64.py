"""The C++ engine on aarch64, cross-compiled and emulated: which levels a CPU has, no access beyond a block, the bits of level avx2."""

from __future__ import annotations

import os
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CXX, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
GOLDEN = "bfda6a8e332c56e8"  # what the same driver prints for every level of an x86-64 CPU with fused multiply-adds
LEVELS = {
    "cortex-a72": ["portable", "neon"],
    "neoverse-n1": ["portable", "neon", "neon_dotprod"],
    "max": ["portable", "neon", "neon_dotprod", "neon_i8mm"],
}


@pytest.fixture(scope="module")
def driver() -> Path:
    if not (shutil.which(CXX) and shutil.which(QEMU)) and shutil.which("apt-get") and os.geteuid() == 0:
        for command in (["update"], ["install", "-y", "--no-install-recommends", "g++-aarch64-linux-gnu", "qemu-user"]):
            subprocess.run(["apt-get", "-q", *command], capture_output=True, timeout=300, check=False)
    if not (shutil.which(CXX) and shutil.which(QEMU)):
        said = f"NOT TESTED on aarch64: {CXX} or {QEMU} is missing (Debian: g++-aarch64-linux-gnu, qemu-user)"
        warnings.warn(said, stacklevel=1)
        pytest.skip(said)
    out = ROOT / "build" / "aarch64"
    environment = {**os.environ, "CXX": CXX, "ARCH": "aarch64", "CHECKS": "-DFASTSAE_GUARD", "RUN": "true"}
    subprocess.run(["bash", "tests/native/sanitize.sh", str(out)], cwd=ROOT, env=environment, check=True)
    return out / "driver"


@pytest.mark.slow
def test_every_level_gives_the_bits_of_avx2(driver: Path) -> None:
    """One test, so that one of two workers builds the driver, in a minute."""
    for cpu, levels in LEVELS.items():
        whole = cpu == "max" or os.environ.get("HYPOTHESIS_PROFILE") == "deep"  # the others run nothing that max does not
        command = [QEMU, "-cpu", cpu, "-L", "/usr/aarch64-linux-gnu", str(driver), "quick", *([] if whole else ["levels"])]
        run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert run.stdout.splitlines() == [f"{level}: ok {GOLDEN}" if whole else level for level in levels], run.stdout + run.stderr
        assert run.returncode == 0
