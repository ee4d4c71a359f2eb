"""Inputs and rivals that the benches share, memory, and how a run is told its sizes and its device."""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsae.dispatch import OPS

QUICK = os.environ.get("FASTSAE_BENCH_QUICK") == "1"
DEVICE = torch.device(os.environ.get("FASTSAE_BENCH_DEVICE", "cpu"))
BUDGET = 0.1 if QUICK else 8.0
"""Seconds for the rounds of one comparison; at least 5 rounds are run whatever they take."""

Call = Callable[[], Any]


def shapes(full: list[tuple[int, ...]], quick: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return quick if QUICK else full


def name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def extra_megabytes(call: Callable[[], object], device: torch.device = DEVICE) -> float | None:
    """Peak memory during one call beyond what stood before it, results included; None where it cannot be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if not os.path.exists("/proc/self/clear_refs"):
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return max(0.0, peak - before)


def _status(key: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(key + ":"))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def unit_rows(rows: int, width: int, seed: int = 0) -> Tensor:
    value = normal(rows, width, seed=1000 + seed)  # apart from activations, of which a row would be a multiple
    return value / torch.linalg.vector_norm(value, dim=1, keepdim=True)


def slots(rows: int, features: int, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices ``[rows, k]``, no feature twice in a row."""
    indices = torch.rand(rows, features, generator=torch.Generator().manual_seed(1)).topk(k).indices
    return normal(rows, k), indices.to(DEVICE)


def laid(W: Tensor, layout: str) -> Tensor:
    """``W [F, D]`` as it is ("FD"), or as the transpose of a ``[D, F]`` matrix ("DF")."""
    return W.T.contiguous().T if layout == "DF" else W


def checks(op: str, *args: Any) -> Call:
    """What raises unless an operation's result agrees with its specification: of arguments with few rows."""
    return lambda: OPS[op].check(args, OPS[op](*args))


def has_onednn(dtype: torch.dtype = torch.float32) -> bool:
    """Whether oneDNN has a product of that dtype on this CPU: of bfloat16 not without AVX-512."""
    if DEVICE.type != "cpu" or not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        absent("oneDNN, bfloat16", RuntimeError("not on this CPU"))
        return False
    return True


def onednn_linear(x: Tensor, W: Tensor) -> Callable[[str, Tensor | None], Tensor]:
    """oneDNN's float32 product, which on many CPUs beats the MKL one behind ``torch.mm``; weight packed outside the timing."""
    nn: Any = torch._C._nn  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue] (torch has no public name for the packing)
    packed = nn.mkldnn_reorder_linear_weight(W.to_mkldnn(), x.shape[0]) if hasattr(nn, "mkldnn_reorder_linear_weight") else None
    weight = packed if packed is not None else W

    def run(post: str = "none", bias: Tensor | None = None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, post, [], "")

    return run


_absent: set[str] = set()


def absent(who: str, error: BaseException) -> None:
    """Warns, once in a process, that there is no row for ``who``."""
    if who not in _absent:
        _absent.add(who)
        warnings.warn(f"bench: no row for {who}: {type(error).__name__}: {error}", stacklevel=3)


def optional(module: str, distribution: str | None = None) -> Any:
    """A rival's module, or None with a warning that says what is left out."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        absent(distribution or module, error)
        return None
