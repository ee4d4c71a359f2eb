"""Why the Triton rows cannot serve a device or a dtype, and Triton's settings, without importing Triton to find out."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sysconfig

import torch
from torch import Tensor

_SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)
_reasons: dict[torch.device, str | None] = {}
_interpreting: bool | None = None


def interpreting() -> bool:
    """Whether TRITON_INTERPRET asks for the interpreter. Read once: kernels are bound to it when their module is imported."""
    global _interpreting
    if _interpreting is None:
        _interpreting = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")
    return _interpreting


def quiet() -> bool:
    """Whether FASTSAE_QUIET asks for no line while a kernel compiles."""
    return os.environ.get("FASTSAE_QUIET", "") not in ("", "0")


def cache_directory() -> str:
    """Where Triton keeps compiled kernels."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    return os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache")


def unavailable(device: torch.device) -> str | None:
    """None, or the reason why Triton kernels cannot run on ``device``; found once per device."""
    try:
        return _reasons[device]
    except KeyError:
        return _reasons.setdefault(device, _find_reason(device))


def _find_reason(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        return _interpreter_reason() if interpreting() else "device cpu (supported: cuda; set TRITON_INTERPRET=1 for the interpreter)"
    if device.type != "cuda":
        return f"device {device.type} (supported: cuda)"
    if torch.version.hip is not None:
        return "ROCm build of torch (supported: NVIDIA GPUs)"
    if not torch.cuda.is_available():
        return "no CUDA device (torch.cuda.is_available() is False)"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} (supported: 8.0 and above)"
    return None if interpreting() else _launcher_reason()


def _interpreter_reason() -> str | None:
    numpy, triton = (importlib.metadata.version(name) for name in ("numpy", "triton"))
    if _release(numpy) >= (2, 4) and _release(triton) < (3, 9):
        return f"the interpreter of triton {triton} cannot run loops under numpy {numpy} (supported: numpy below 2.4, or triton 3.9)"
    return None


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _launcher_reason() -> str | None:
    # Triton builds a small C launcher on the user's machine.
    if not os.environ.get("CC") and shutil.which("gcc") is None and shutil.which("clang") is None:
        return "Triton needs a C compiler for its launcher and found none (install gcc or clang, or set CC)"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = os.path.join(sysconfig.get_paths(scheme=scheme)["include"], "Python.h")
    if not os.path.exists(header):
        return f"Triton needs Python's C headers for its launcher and {header} does not exist (install python3-dev)"
    return None


def dtype_reason(*tensors: Tensor | None) -> str | None:
    """None, or which dtype among the floating tensors the Triton kernels do not compute."""
    for tensor in tensors:
        if tensor is None or not tensor.dtype.is_floating_point:
            continue
        if tensor.dtype not in _SUPPORTED:
            return f"dtype {str(tensor.dtype).removeprefix('torch.')} (supported: float32, bfloat16, float16)"
        if tensor.dtype is torch.bfloat16 and interpreting():
            return "dtype bfloat16 (Triton's interpreter computes it wrongly; supported there: float32, float16)"
    return None
