"""The arithmetic of tensor cores in C++ (tensor_core.cpp), and Triton's interpreter computing with it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from functools import cache
from typing import Any

import numpy as np
from emulation import compiler
from places import ROOT
from torch import Tensor

CHIPS = {"volta": (4, 23), "ampere": (8, 24), "hopper": (16, 25)}
"""Products that are summed at once with the accumulator, and the fraction bits kept. Turing and Ada are as Ampere, Blackwell as Hopper."""

_HALF = {"float16": (10, -14), "bfloat16": (7, -126)}


@cache
def _library() -> Any:
    source = ROOT / "tests" / "gpu" / "tensor_core.cpp"
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    target = ROOT / "build" / f"tensor-core-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so"
    if not target.exists():
        tool = compiler()
        assert tool is not None, "no C++ compiler"
        target.parent.mkdir(exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run([tool, *flags, str(source), "-o", str(partial)], check=True)
        partial.replace(target)
    return ctypes.CDLL(str(target)).tensor_core


def product(a: Any, b: Any, c: Any, fused: int, fraction: int, dtype: str = "float16") -> np.ndarray:
    """``c + a @ b`` for float32 arrays, of which a ``[m, k]`` and b ``[k, n]`` hold numbers of ``dtype``."""
    a, b, c = (np.ascontiguousarray(v, np.float32) for v in (a, b, c))
    out = np.empty_like(c)
    (m, k), n = a.shape, b.shape[1]
    assert b.shape == (k, n) and c.shape == (m, n)
    addresses = (ctypes.c_void_p(v.ctypes.data) for v in (a, b, c, out))
    _library()(*addresses, *map(ctypes.c_int64, (m, n, k)), *_HALF[dtype], fused, fraction)
    return out


def products(x: Tensor, W: Tensor, fused: int, fraction: int) -> Tensor:
    """``x @ W.T`` in float32 for two matrices of float16."""
    import torch

    zeros = np.zeros((x.shape[0], W.shape[0]), np.float32)
    return torch.from_numpy(product(x.float().numpy(), W.float().T.numpy(), zeros, fused, fraction))


def interpret_on(chip: str) -> None:
    """Triton's interpreter multiplies float16 matrices as this chip does, for the rest of the process."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from fastsae.kernels import _tile

    _tile._INTERPRETED_SUMS = CHIPS[chip]
    plain = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.data.dtype != np.float16 or d.data.dtype != np.float32:
            return plain(self, a, b, d, *rest)
        return TensorHandle(product(a.data, b.data, d.data, *CHIPS[chip]), d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot  # pyright: ignore[reportAttributeAccessIssue]
