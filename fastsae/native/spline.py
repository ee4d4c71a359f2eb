"""The compiled spline codes; csrc/fastsae.h is the contract of every function."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.native import loader
from fastsae.native.encode import _PATHS, _address, _Call, _numbers, _refuses, _report

_HASHED_AT_ONCE = 1 << 23  # words of codes that wait for their hash


def refuses_spline_code(x: Tensor, W: Tensor, b: Tensor | None, neurons: Tensor | None, packed: Tensor | None = None) -> str | None:
    """Why `spline_code` cannot serve these inputs, or None."""
    return _refuses(x, W, (("b", b),), neurons)


def refuses_spline_hash(
    x: Tensor, W: Tensor, b: Tensor | None, neurons: Tensor | None, layer: int, seed: int, bits: int, packed: Tensor | None = None
) -> str | None:
    """Why `spline_hash` cannot serve these inputs, or None."""
    return refuses_spline_code(x, W, b, neurons)


def _mask(neurons: Tensor | None, size: int) -> Tensor | None:
    """The words of a mask of neurons; IndexError where an index is out of range."""
    if neurons is None:
        return None
    if neurons.dtype is not torch.bool:
        if neurons.numel() and (int(neurons.min()) < 0 or int(neurons.max()) >= size):
            raise IndexError(f"neurons must hold indices 0 <= index < {size}, got {int(neurons.min())} .. {int(neurons.max())}")
        neurons = torch.zeros(size, dtype=torch.bool, device="cpu").index_fill_(0, neurons.long(), True)
    return loader.pack_signs(neurons.contiguous().unsqueeze(0), None)


def spline_code(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    neurons: Tensor | None,
    packed: Tensor | None = None,
    *,
    path: str = "auto",
    stats: dict[str, int] | None = None,
) -> Tensor:
    """Packed signs of the scores x @ W.T + b, [rows, ceil(H / 64)] int64, without pre-activations.

    Args:
        x: [rows, D], any strides. W: [H, D], any strides; read in place. b: None, or [H]. neurons: None, an index or a mask.
        packed: not read: signs are screened in another number than the one `pack` writes.
        path, stats: as in `native_encode.encode_topk`.
    """
    call = _Call("spline_code", x, W, None, None, None)
    mask = _mask(neurons, W.shape[0])
    b = call.vector("b", b)
    words = torch.empty((x.shape[0], (W.shape[0] + 63) // 64), dtype=torch.int64, device="cpu")
    numbers = _numbers(stats)
    status = call.kernels.spline_code(
        *call.arguments, _address(b), words.data_ptr(), _PATHS[path], torch.get_num_threads(), _address(numbers)
    )
    if status != -1:
        raise MemoryError("fastsae: no memory for the workspace of spline_code")
    _report(stats, numbers)
    return words if mask is None else words.bitwise_and_(mask)


def spline_hash(
    x: Tensor, W: Tensor, b: Tensor | None, neurons: Tensor | None, layer: int, seed: int, bits: int, packed: Tensor | None = None
) -> Tensor:
    """XOR of the keys of active neurons, [rows] int64 ([rows, 2] with 128 bits): codes of some rows at a time, hashed where they lie."""
    at_once = max(1024, _HASHED_AT_ONCE // max(1, (W.shape[0] + 63) // 64))
    if x.shape[0] <= at_once:
        return loader.hash_code(spline_code(x, W, b, neurons), None, layer, seed, bits)
    return torch.cat([loader.hash_code(spline_code(part, W, b, neurons), None, layer, seed, bits) for part in x.split(at_once)])
