"""The compiled encoders and packed handles: what ``native`` is to decode. csrc/fastsae.h is the contract of every function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae.latents import to_capacity
from fastsae.native import loader

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STATS = ("screened_rows", "exact_rows", "scored", "survivors", "workspace")
_PORTABLE_WORK = 1 << 18  # multiplications below which calling torch costs more than a slow loop
_PATHS = {"auto": 0, "dense": 1, "screen": 2, "rows": 3, "blocks": 4}


def _refuses(x: Tensor, W: Tensor, vectors: tuple[tuple[str, Tensor | None], ...], features: Tensor | None) -> str | None:
    if not loader._tried:
        loader.unavailable()
    if loader._reason is not None:
        return loader._reason
    dtype = x.dtype
    if dtype not in _DTYPES or W.dtype is not dtype:
        return f"dtype {str((x if dtype not in _DTYPES else W).dtype)[6:]} (supported: float32, bfloat16, float16, one for x and W)"
    if not (x.is_cpu and W.is_cpu):
        return f"device {(W if x.is_cpu else x).device} (supported: cpu)"
    for name, t in vectors:
        if t is not None and t.dtype is torch.float64:
            return f"dtype float64 of {name} (supported: float32, bfloat16, float16)"
        if t is not None and not t.is_cpu:
            return f"device {t.device} of {name} (supported: cpu)"
    if features is not None and not features.is_cpu:
        return f"device {features.device} of the subset (supported: cpu)"
    if W.shape[0] >= 2**31:
        return f"{W.shape[0]} features (supported: fewer than 2^31)"
    if x.shape[0] * W.numel() > _PORTABLE_WORK and (loader._C or loader._load()).level() == "portable":
        return "instruction set level portable: at this size the product of torch is faster (supported: avx2 and above)"
    return None


def refuses_encode_topk(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    b_pre: Tensor | None,
    scale: Tensor | None,
    features: Tensor | None,
    packed: Tensor | None,
    k: int,
    relu: bool,
) -> str | None:
    """Why `encode_topk` cannot serve these inputs, or None."""
    return _refuses(x, W, (("b", b), ("b_pre", b_pre), ("scale", scale)), features)


def refuses_encode_threshold(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    threshold: Tensor,
    b_pre: Tensor | None,
    scale: Tensor | None,
    features: Tensor | None,
    packed: Tensor | None,
    bandwidth: float | None,
    capacity: int | None = None,
) -> str | None:
    """Why `encode_threshold` cannot serve these inputs, or None."""
    return _refuses(x, W, (("b", b), ("threshold", threshold), ("b_pre", b_pre), ("scale", scale)), features)


def refuses_encode_batch_topk(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    b_pre: Tensor | None,
    scale: Tensor | None,
    features: Tensor | None,
    packed: Tensor | None,
    k: float,
    capacity: int | None = None,
) -> str | None:
    """Why `encode_batch_topk` cannot serve these inputs, or None."""
    return _refuses(x, W, (("b", b), ("b_pre", b_pre), ("scale", scale)), features)


def refuses_encode_gated(
    x: Tensor,
    W: Tensor,
    b_gate: Tensor,
    r_mag: Tensor,
    b_mag: Tensor,
    b_pre: Tensor | None,
    packed: Tensor | None,
    capacity: int | None = None,
) -> str | None:
    """Why `encode_gated` cannot serve these inputs, or None."""
    return _refuses(x, W, (("b_gate", b_gate), ("r_mag", r_mag), ("b_mag", b_mag), ("b_pre", b_pre)), None)


class _Call:
    """The arguments that all encoders share, as addresses, and the tensors behind them."""

    def __init__(self, op: str, x: Tensor, W: Tensor, b_pre: Tensor | None, features: Tensor | None, packed: Tensor | None):
        n, d = W.shape
        if x.dim() != 2 or x.shape[1] != d or x.dtype is not W.dtype or x.dtype not in _DTYPES or not (x.is_cpu and W.is_cpu):
            raise ValueError(f"{op}: x {list(x.shape)} {x.dtype}, W {list(W.shape)} {W.dtype}; expected [rows, D] and [F, D] of one dtype")
        self.op, self.kernels = op, loader._C or loader._load()
        self.size = n
        self.b_pre = self.vector("b_pre", b_pre, d)
        self.features = None
        if features is not None:
            self.features = _ascending(features, n)
            n = self.features.shape[0]
        self.count = n
        dtype = _DTYPES[x.dtype]
        address, stride_f, stride_d = W.data_ptr(), *W.stride()
        blob = 0
        if packed is not None and packed.numel():
            blob = packed.data_ptr() if packed.is_cpu else 0
            words = self.kernels.packed_words(self.size, d)
            rows = (W.numel() * W.element_size() + 3) // 4
            if not blob or packed.dtype is not torch.int32 or packed.numel() not in (words, words + rows) or not packed.is_contiguous():
                raise ValueError(
                    f"{op}: packed {list(packed.shape)} {packed.dtype} on {packed.device} is not what pack returned for W {list(W.shape)}"
                )
            if packed.numel() > words:  # rows of a transposed W are part of the handle
                address, stride_f, stride_d = blob + 4 * words, d, 1
        self.tensors = (x, W, packed)
        self.arguments = (
            x.data_ptr(), dtype, x.shape[0], *x.stride(), _address(self.b_pre), 0.0,
            address, dtype, stride_f, stride_d, d, n, _address(self.features), 0.0, blob,
        )  # fmt: skip

    def vector(self, name: str, value: Tensor | None, size: int | None = None) -> Tensor | None:
        if value is None:
            return None
        size = self.size if size is None else size
        if value.shape != (size,):
            raise ValueError(f"{self.op}: {name}: expected [{size}], got {list(value.shape)}")
        if value.dtype is not torch.float32:
            value = value.float()
        return value if value.is_contiguous() else value.contiguous()


def _address(value: Tensor | None) -> int:
    return 0 if value is None else value.data_ptr()


def _ascending(features: Tensor, n: int) -> Tensor:
    """A mask or index as ascending unique int32; IndexError where one is out of range."""
    if features.dim() != 1 or (features.dtype is torch.bool and features.shape[0] != n):
        raise ValueError(f"features: expected a 1-D index or a mask [{n}], got {list(features.shape)} {features.dtype}")
    if features.dtype is torch.bool:
        return features.nonzero().flatten().int()
    index = torch.unique(features)
    if index.numel() and (int(index[0]) < 0 or int(index[-1]) >= n):
        bad = int(index[0]) if int(index[0]) < 0 else int(index[-1])
        raise IndexError(f"features holds {bad}, expected 0 <= index < {n}")
    return index.int()


def _numbers(stats: dict[str, int] | None) -> Tensor | None:
    return None if stats is None else torch.zeros(len(_STATS), dtype=torch.int64, device="cpu")


def _report(stats: dict[str, int] | None, numbers: Tensor | None) -> None:
    if stats is not None and numbers is not None:
        stats.update(zip(_STATS, numbers.tolist(), strict=True))


def encode_topk(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    b_pre: Tensor | None,
    scale: Tensor | None,
    features: Tensor | None,
    packed: Tensor | None,
    k: int,
    relu: bool,
    *,
    path: str = "auto",
    stats: dict[str, int] | None = None,
    survived: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best scores of each row and their features, exact by the score of csrc/fastsae.h.

    Args:
        x: [rows, D], any strides. W: [F, D], any strides; read in place.
        b, scale: None, or [F]. b_pre: None, or [D]. features: None, an index or a mask. packed: None, or what `pack` returned for W.
        path: "dense" scores everything, "screen" lets bounds choose what is scored, "rows" and "blocks" do so with all bounds of a row
            before its first score (csrc/fastsae.h), "auto" picks by measured crossover. Same bits.
        stats: filled with screened_rows, exact_rows, scored, survivors, workspace (bytes); see csrc/fastsae.h.
        survived: [rows, features] uint8, set where a score was computed and not yet dropped.
    """
    call = _Call("encode_topk", x, W, b_pre, features, packed)
    if not 0 <= k <= call.count:
        raise ValueError(f"encode_topk: k must be at most the number of features chosen ({call.count}), got {k}")
    b, scale = call.vector("b", b), call.vector("scale", scale)
    values = torch.empty((x.shape[0], k), dtype=torch.float32, device="cpu")
    indices = torch.empty((x.shape[0], k), dtype=torch.int64, device="cpu")
    numbers = _numbers(stats)
    status = call.kernels.encode_topk(
        *call.arguments, _address(scale), _address(b), k, relu, values.data_ptr(), indices.data_ptr(), _PATHS[path],
        torch.get_num_threads(), _address(numbers), _address(survived),
    )  # fmt: skip
    if status != -1:
        raise MemoryError("fastsae: no memory for the workspace of encode_topk")
    _report(stats, numbers)
    return values if x.dtype is torch.float32 else values.to(x.dtype), indices


def _ragged(entries: Any, x: Tensor, op: str, capacity: int | None, with_flags: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if entries.status != -1:
        raise MemoryError(f"fastsae: no memory for the workspace of {op}")
    n = entries.count
    values, col = torch.empty(n, dtype=torch.float32, device="cpu"), torch.empty(n, dtype=torch.int64, device="cpu")
    crow = torch.empty(x.shape[0] + 1, dtype=torch.int64, device="cpu")
    flags = torch.empty(n if with_flags else 0, dtype=torch.uint8, device="cpu")
    entries.copy(values.data_ptr(), col.data_ptr(), crow.data_ptr(), _address(flags if with_flags else None), torch.get_num_threads())
    values, col, crow, *some = to_capacity(op, capacity, values, col, crow, *([flags] if with_flags else []))
    return values if x.dtype is torch.float32 else values.to(x.dtype), col, crow, some[0] if some else flags


def encode_threshold(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    threshold: Tensor,
    b_pre: Tensor | None,
    scale: Tensor | None,
    features: Tensor | None,
    packed: Tensor | None,
    bandwidth: float | None,
    capacity: int | None = None,
    *,
    path: str = "auto",
    stats: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores above max(threshold, 0), and with a bandwidth those in its band: (values, col, crow, flags); see csrc/fastsae.h."""
    call = _Call("encode_threshold", x, W, b_pre, features, packed)
    theta = call.vector("threshold", threshold if threshold.dim() else threshold.expand(call.size))
    b, scale = call.vector("b", b), call.vector("scale", scale)
    numbers = _numbers(stats)
    half = -1.0 if bandwidth is None else bandwidth / 2
    entries = call.kernels.encode_threshold(
        *call.arguments, _address(scale), _address(b), _address(theta), half, _PATHS[path], torch.get_num_threads(), _address(numbers)
    )
    _report(stats, numbers)
    return _ragged(entries, x, "encode_threshold", capacity, bandwidth is not None)


def encode_batch_topk(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    b_pre: Tensor | None,
    scale: Tensor | None,
    features: Tensor | None,
    packed: Tensor | None,
    k: float,
    capacity: int | None = None,
    *,
    path: str = "auto",
    stats: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The int(k * rows) largest positive scores of all rows: (values, col, crow, min_kept)."""
    call = _Call("encode_batch_topk", x, W, b_pre, features, packed)
    b, scale = call.vector("b", b), call.vector("scale", scale)
    numbers = _numbers(stats)
    if not k > 0:
        raise ValueError(f"encode_batch_topk: k must be above 0, got {k}")
    total = min(int(k * x.shape[0]), x.shape[0] * call.count)
    entries = call.kernels.encode_batch_topk(
        *call.arguments, _address(scale), _address(b), total, _PATHS[path], torch.get_num_threads(), _address(numbers)
    )
    _report(stats, numbers)
    values, col, crow, _ = _ragged(entries, x, "encode_batch_topk", capacity)
    return values, col, crow, torch.tensor(entries.min_kept, dtype=torch.float32, device="cpu")


def encode_gated(
    x: Tensor,
    W: Tensor,
    b_gate: Tensor,
    r_mag: Tensor,
    b_mag: Tensor,
    b_pre: Tensor | None,
    packed: Tensor | None,
    capacity: int | None = None,
    *,
    path: str = "auto",
    stats: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores that their gate lets through: (values, col, crow)."""
    call = _Call("encode_gated", x, W, b_pre, None, packed)
    stretch = call.vector("r_mag", r_mag.float().exp())
    gate, magnitude = call.vector("b_gate", b_gate), call.vector("b_mag", b_mag)
    numbers = _numbers(stats)
    entries = call.kernels.encode_gated(
        *call.arguments, _address(gate), _address(stretch), _address(magnitude), _PATHS[path], torch.get_num_threads(), _address(numbers)
    )
    _report(stats, numbers)
    return _ragged(entries, x, "encode_gated", capacity)[:3]


def pack(W: Tensor) -> Tensor | None:
    """The packed form of W [F, D] for screening, as int32 words (of a W that is not row-major its rows, too); None where no level screens.

    About a quarter of W's float32 bytes, for a W that is not row-major 1.25 times.
    """
    if loader.unavailable() is not None or W.dtype not in _DTYPES or not W.is_cpu or W.dim() != 2 or not W.numel():
        return None
    kernels = loader._C or loader._load()
    n, d = W.shape
    if not kernels.packs(d):
        return None
    words = kernels.packed_words(n, d)
    rows = 0 if W.stride(1) == 1 or d == 1 else (n * d * W.element_size() + 3) // 4
    blob = torch.empty(words + rows, dtype=torch.int32, device="cpu")
    if rows:
        copy = blob[words:].view(W.dtype)[: n * d].view(n, d)
        copy.copy_(W)
        W = copy
    status = kernels.pack(W.data_ptr(), _DTYPES[W.dtype], *W.stride(), d, n, blob.data_ptr(), torch.get_num_threads())
    if status != -1:
        raise MemoryError("fastsae: no memory for the workspace of pack")
    return blob


def screen_bounds(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    b_pre: Tensor | None,
    scale: Tensor | None,
    packed: Tensor | None = None,
    *,
    bf16: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """For tests: (lo, hi) [rows, F], the interval that the screen claims for every score; None where this level cannot screen."""
    call = _Call("screen_bounds", x, W, b_pre, None, packed)
    b, scale = call.vector("b", b), call.vector("scale", scale)
    lo, hi = torch.empty(2, x.shape[0], W.shape[0], device="cpu", dtype=torch.float32).unbind(0)
    done = call.kernels.screen_bounds(
        *call.arguments, _address(scale), _address(b), bf16, lo.data_ptr(), hi.data_ptr(), torch.get_num_threads()
    )
    return (lo, hi) if done else None
