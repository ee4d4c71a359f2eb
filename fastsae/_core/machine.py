"""What a measured figure depends on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastsae._core.version import __version__


def versions(*more: str) -> dict[str, str]:
    """Of what every figure depends on, and of the distributions named."""
    found = {"fastsae": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("numpy", "triton", *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """CPU, threads, GPUs, versions, and the commit of the checkout (None outside one; FASTSAE_COMMIT where its git is not at hand)."""
    try:
        here = Path(__file__).resolve().parent
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
        commit = found.stdout.strip() or None
    except OSError:
        commit = None
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
        "versions": versions(),
        "commit": commit or os.environ.get("FASTSAE_COMMIT"),
    }
