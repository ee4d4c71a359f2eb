"""The compiled encoders and packed handles; csrc/fastsae.h is the contract of every function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsae._core import checks
from fastsae.latents import ScoreInputs, of_inputs, to_capacity
from fastsae.native.loader import DTYPES, address, call, call_engine, load, unavailable, unsupported

_SEGMENTS = 2048  # whose changes are held at a time
_PORTABLE_WORK = 1 << 18  # multiplications below which calling torch costs more than a slow loop


def score_refusal(*names: str) -> Callable[..., str | None]:
    """The predicate of a function over scores: ``names`` are those of its optional tensors, after x and W."""

    def refuses(x: Tensor, W: Tensor, *rest: Any, **_: Any) -> str | None:
        if (reason := unavailable()) is not None:
            return reason
        dtype = x.dtype
        if dtype not in DTYPES or W.dtype is not dtype:
            return f"dtype {str((x if dtype not in DTYPES else W).dtype)[6:]} (supported: float32, bfloat16, float16, one for x and W)"
        if not (x.is_cpu and W.is_cpu):
            return f"device {(W if x.is_cpu else x).device} (supported: cpu)"
        for name, t in zip(names, rest):
            if t is not None and t.dtype is torch.float64:
                return f"dtype float64 of {name} (supported: float32, bfloat16, float16)"
            if t is not None and not t.is_cpu:
                return f"device {t.device} of {name} (supported: cpu)"
        if W.shape[0] >= 2**31:
            return f"{W.shape[0]} features (supported: fewer than 2^31)"
        if x.shape[0] * W.numel() > _PORTABLE_WORK and load().level() == "portable":
            return "instruction set level portable: at this size the product of torch is faster (supported: avx2 and above)"
        return None

    return refuses


refuses_encode_batch_topk = score_refusal("b", "b_pre", "scale", "features")
refuses_encode_threshold = score_refusal("b", "b_pre", "scale", "features", "packed", "threshold")
refuses_encode_gated = score_refusal("b_gate", "r_mag", "b_mag", "b_pre")


def refuses_encode_topk(x: Tensor, W: Tensor, *rest: Any) -> str | None:
    if W.shape[0] >= 2**30 and rest[7:] == (True,):
        return f"{W.shape[0]} features by magnitude (supported: fewer than 2^30)"
    return refuses_encode_batch_topk(x, W, *rest)


class Arguments:
    """What all functions over scores take, as addresses (``x`` and ``W`` as structures of csrc/fastsae.h), and the tensors behind them."""

    def __init__(self, op: str, inputs: ScoreInputs):
        x, W, b, b_pre, scale, features, packed = inputs
        n, d = W.shape
        if x.dtype is not W.dtype or x.shape[1] != d:
            raise ValueError(f"{op}: expected x [rows, D] and W [F, D] of one dtype and D, got {[*x.shape]} {x.dtype}, {[n, d]} {W.dtype}")
        self.op, self.size = op, n
        self.b, self.scale, self.b_pre = self.vector("b", b), self.vector("scale", scale), self.vector("b_pre", b_pre, d)
        self.features, self.count = None, n
        if (chosen := checks.sorted_subset(features, n, "features")) is not None:
            self.features, self.count = chosen.int(), chosen.shape[0]
        where, blob = (W.data_ptr(), DTYPES[W.dtype], *W.stride()), 0
        if packed is not None and packed.numel():
            words, rows = load().packed_words(n, d), (W.numel() * W.element_size() + 3) // 4
            fits = packed.numel() in (words, words + rows) and packed.is_contiguous()
            if not (fits and packed.dtype is torch.int32 and packed.is_cpu):
                raise ValueError(
                    f"{op}: packed {list(packed.shape)} {packed.dtype} on {packed.device} is not what pack returned for W {[n, d]}"
                )
            blob = packed.data_ptr()
            if packed.numel() > words:  # rows of a transposed W are part of the handle
                where = (blob + 4 * words, DTYPES[W.dtype], d, 1)
        self.tensors = inputs
        self.addresses = (
            (x.data_ptr(), DTYPES[x.dtype], x.shape[0], *x.stride(), address(self.b_pre), 0.0),
            (*where, d, self.count, address(self.features), 0.0, blob),
        )
        self.affine = address(self.scale), address(self.b)

    def vector(self, name: str, value: Tensor | None, size: int | None = None) -> Tensor | None:
        """float32, contiguous; ValueError unless its shape is [size]."""
        if value is None:
            return None
        size = self.size if size is None else size
        if value.dim() != 1 or value.shape[0] != size:
            raise ValueError(f"{self.op}: {name}: expected [{size}], got {list(value.shape)}")
        value = value if value.dtype is torch.float32 else value.float()
        return value.contiguous()


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values if dtype is torch.float32 else values.to(dtype)  # a cast that does nothing costs 2 µs


@of_inputs
def encode_topk(
    inputs: ScoreInputs,
    k: int,
    relu: bool,
    absolute: bool = False,
    *,
    path: str = "auto",
    stats: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best scores of each row (``absolute``: by magnitude) and their features, exact by the score of csrc/fastsae.h.

    Args:
        inputs: any strides, read in place; ``packed``: None, or what `pack` returned for W.
        path, stats: as in ``call_engine``.
    """
    given, rows = Arguments("encode_topk", inputs), inputs.x.shape[0]
    if not 0 <= k <= given.count:
        raise ValueError(f"encode_topk: k must be at most the number of features chosen ({given.count}), got {k}")
    values = torch.empty((rows, k), dtype=torch.float32, device="cpu")
    indices = torch.empty((rows, k), dtype=torch.int64, device="cpu")
    call_engine(
        "encode_topk", path, stats,
        *given.addresses, *given.affine, k, relu, absolute, values.data_ptr(), indices.data_ptr(),
    )  # fmt: skip
    return rounded(values, inputs.x.dtype), indices


def quick_topk(
    x: Tensor, W: Tensor, b: Tensor | None, b_pre: Tensor | None, scale: Tensor | None, packed: Tensor | None, k: int, relu: bool
) -> tuple[Tensor, Tensor] | None:
    """`encode_topk` of tensors that are ``dispatch.alone``, with few steps of Python on the way: those of a small call cost more than its
    kernel. None where there is something to convert, to divide or to complain about."""
    if x.dim() != 2 or W.dim() != 2 or unavailable() is not None:
        return None
    (rows, d), (n, width) = x.shape, W.shape
    if d != width or not 0 < k <= n or n >= 2**31 or (rows * n * d > _PORTABLE_WORK and load().level() == "portable"):
        return None
    for vector, size in ((b, n), (b_pre, d), (scale, n)):
        if vector is not None and (vector.dim() != 1 or vector.shape[0] != size or not vector.is_contiguous()):
            return None
    if packed is not None and packed.numel() != load().packed_words(n, d):
        return None
    values, indices = x.new_empty(rows, k), x.new_empty(rows, k, dtype=torch.int64)
    call(
        "encode_topk",
        (x.data_ptr(), 0, rows, *x.stride(), address(b_pre), 0.0),
        (W.data_ptr(), 0, *W.stride(), d, n, 0, 0.0, address(packed)),
        address(scale), address(b), k, relu, False, values.data_ptr(), indices.data_ptr(), 0, 0,
    )  # fmt: skip
    return values, indices


encode_topk.quick = quick_topk  # pyright: ignore[reportFunctionMemberAccess]


def _ragged(entries: Any, x: Tensor, op: str, capacity: int | None, with_flags: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = load().entries_count(entries.address)
    values, col = torch.empty(n, dtype=torch.float32, device="cpu"), torch.empty(n, dtype=torch.int64, device="cpu")
    crow = torch.empty(x.shape[0] + 1, dtype=torch.int64, device="cpu")
    flags = torch.empty(n if with_flags else 0, dtype=torch.uint8, device="cpu")
    where = values.data_ptr(), col.data_ptr(), crow.data_ptr(), address(flags if with_flags else None)
    call("copy_entries", entries.address, *where)
    values, col, crow, *some = to_capacity(op, capacity, values, col, crow, *([flags] if with_flags else []))
    return rounded(values, x.dtype), col, crow, some[0] if some else flags


@of_inputs
def encode_threshold(
    inputs: ScoreInputs,
    threshold: Tensor,
    bandwidth: float | None,
    capacity: int | None = None,
    *,
    path: str = "auto",
    stats: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores above max(threshold, 0), and with a bandwidth those in its band: (values, col, crow, flags); see csrc/fastsae.h."""
    given = Arguments("encode_threshold", inputs)
    theta = given.vector("threshold", threshold if threshold.dim() else threshold.expand(given.size))
    half, entries = -1.0 if bandwidth is None else bandwidth / 2, load().Entries()
    call_engine("encode_threshold", path, stats, *given.addresses, *given.affine, address(theta), half, entries.address)
    return _ragged(entries, inputs.x, "encode_threshold", capacity, bandwidth is not None)


@of_inputs
def encode_batch_topk(
    inputs: ScoreInputs, k: float, capacity: int | None = None, *, path: str = "auto", stats: dict[str, int] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The int(k * rows) largest positive scores of all rows: (values, col, crow, min_kept)."""
    given, rows = Arguments("encode_batch_topk", inputs), inputs.x.shape[0]
    if not k > 0:
        raise ValueError(f"encode_batch_topk: k must be above 0, got {k}")
    total = min(int(k * rows), rows * given.count)
    entries, min_kept = load().Entries(), torch.empty((), dtype=torch.float32, device="cpu")
    call_engine(
        "encode_batch_topk", path, stats, *given.addresses, *given.affine, total, min_kept.data_ptr(), entries.address,
    )  # fmt: skip
    values, col, crow, _ = _ragged(entries, inputs.x, "encode_batch_topk", capacity)
    return values, col, crow, min_kept


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
    given = Arguments("encode_gated", ScoreInputs(x, W, b_pre=b_pre, packed=packed))
    stretch = given.vector("r_mag", r_mag.float().exp())
    gate, magnitude, entries = given.vector("b_gate", b_gate), given.vector("b_mag", b_mag), load().Entries()
    where = address(gate), address(stretch), address(magnitude), entries.address
    call_engine("encode_gated", path, stats, *given.addresses, *where)
    return _ragged(entries, x, "encode_gated", capacity)[:3]


def refuses_topk_changes(W: Tensor, b: Tensor, b_pre: Tensor | None, packed: Tensor | None, *ends: Any) -> str | None:
    p, q = ends[:2]
    if W.shape[0] >= 2**30:
        return f"{W.shape[0]} features (supported: fewer than 2^30)"
    if not (p.is_cpu and q.is_cpu and p.dtype is q.dtype is torch.float64):
        return f"ends {p.dtype} on {p.device}, {q.dtype} on {q.device} (supported: float64 on the cpu)"
    if (reason := refuses_encode_batch_topk(W, W, b, b_pre)) is not None:
        return reason
    if not load().packs(W.shape[1]):
        return f"instruction set level {load().level()} cannot screen D = {W.shape[1]}"
    if W.stride(1) != 1 and (packed is None or packed.numel() == load().packed_words(*W.shape)):
        return "W of columns without a packed handle (supported: rows, or fastsae.pack)"
    return None


def topk_changes(
    W: Tensor,
    b: Tensor,
    b_pre: Tensor | None,
    packed: Tensor | None,
    p: Tensor,
    q: Tensor,
    k: int,
    relu: bool,
    absolute: bool,
) -> tuple[Tensor, ...]:
    """Changes of the k best on segments: (t, leaves, enters, counts); counts of -1: undecided."""
    if not 0 < k <= W.shape[0]:
        raise ValueError(f"topk_changes: k must be above 0 and at most the number of features ({W.shape[0]}), got {k}")
    capacity, S = 32 * k + 64, len(p)
    counts, found = torch.empty(S, dtype=torch.int64, device="cpu"), list[tuple[Tensor, ...]]()
    at = torch.empty(min(S, _SEGMENTS), capacity, dtype=torch.float64, device="cpu")
    leaves, enters = torch.empty(2, *at.shape, dtype=torch.int32, device="cpu")
    for first in range(0, max(S, 1), _SEGMENTS):
        part, count = slice(first, first + _SEGMENTS), counts[first : first + _SEGMENTS]
        ends = torch.stack([p[part], q[part]], 1).flatten(0, 1)
        given = Arguments("topk_changes", ScoreInputs(ends.to(W.dtype), W, b, b_pre, packed=packed))
        status = call(
            "topk_changes", *given.addresses, address(given.b), ends.data_ptr(), k, relu, absolute, capacity,
            at.data_ptr(), leaves.data_ptr(), enters.data_ptr(), count.data_ptr(),
        )  # fmt: skip
        if unsupported(status):
            count.fill_(-1)
        made = torch.arange(capacity, device="cpu") < count.unsqueeze(1)
        found.append(tuple(values[: len(count)][made] for values in (at, leaves, enters)))
    t, gone, new = (torch.cat(parts) for parts in zip(*found))
    return t, gone.long(), new.long(), counts


def pack(W: Tensor) -> Tensor | None:
    """The packed form of W [F, D] for screening, as int32 words (of a W that is not row-major its rows, too); None where no level screens.

    About a quarter of W's float32 bytes, for a W that is not row-major 1.25 times.
    """
    if unavailable() is not None or W.dtype not in DTYPES or not W.is_cpu or W.dim() != 2 or not W.numel():
        return None
    n, d = W.shape
    if not load().packs(d):
        return None
    words = load().packed_words(n, d)
    rows = 0 if W.stride(1) == 1 or d == 1 else (n * d * W.element_size() + 3) // 4
    blob = torch.empty(words + rows, dtype=torch.int32, device="cpu")
    if rows:
        copy = blob[words:].view(W.dtype)[: n * d].view(n, d)
        copy.copy_(W)
        W = copy
    call("pack", (W.data_ptr(), DTYPES[W.dtype], *W.stride(), d, n, 0, 0.0, 0), blob.data_ptr())
    return blob


def screen_bounds(inputs: ScoreInputs, *, bf16: bool = False) -> tuple[Tensor, Tensor] | None:
    """For tests: (lo, hi) [rows, F], the interval that the screen claims for every score; None where this level cannot screen."""
    given = Arguments("screen_bounds", inputs)
    lo, hi = torch.empty(2, inputs.x.shape[0], inputs.W.shape[0], device="cpu", dtype=torch.float32).unbind(0)
    status = call("screen_bounds", *given.addresses, *given.affine, bf16, lo.data_ptr(), hi.data_ptr())
    return None if unsupported(status) else (lo, hi)
