"""Encode: activations to latents, without the ``[B, F]`` matrix of scores.

    score[b, f] = b_enc[f] + scale[f] * sum_d fl(x[b, d] - b_pre[d]) * W_enc[f, d]

Four encoders keep different parts of a row of scores: ``encode_topk`` the k best, ``encode_threshold`` what exceeds a threshold
(ReLU, JumpReLU), ``encode_batch_topk`` the best of the whole batch, ``encode_gated`` what an own gate lets through. All of them return
slots (value, feature), and their backward is the sparse decode's (``fastsae.ops.score_gradients``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, overload

import torch
from torch import Tensor

from fastsae._core import checks
from fastsae.dispatch import Op, alone, preference, then_any
from fastsae.latents import RaggedLatents, ScoreInputs, Slots, TopKLatents, of_inputs, pointers, to_capacity
from fastsae.ops import encode_samples
from fastsae.ops.score_gradients import band_gradient, feature_sums, score_gradients
from fastsae.packed import PackedWeights
from fastsae.reference import Best, accumulator, centre, chunks, scores, tracks

# ---------------------------------------------------------------- references


@of_inputs
def encode_topk_reference(inputs: ScoreInputs, k: int, relu: bool, absolute: bool = False) -> tuple[Tensor, Tensor]:
    x = inputs.x
    chosen = checks.sorted_subset(inputs.features, inputs.W.shape[0], "encode_topk: features")
    n = inputs.W.shape[0] if chosen is None else chosen.shape[0]
    if k > n:
        raise ValueError(f"encode_topk: k must be at most the number of features chosen ({n}), got {k}")
    xc, best = centre(x, inputs.b_pre), Best(k, absolute)
    for rows in chunks(x.shape[0], n, least=64):
        for part in chunks(n, rows.stop - rows.start, least=k):
            best.add(rows.start, part.start, _tile(inputs, xc[rows], part if chosen is None else chosen[part]))
    v, i = best.result(x.device, x.dtype)
    if chosen is not None:
        i = chosen[i]
    return (v.relu() if relu else v), i


def _tile(inputs: ScoreInputs, xc: Tensor, part: slice | Tensor) -> Tensor:
    """Scores of centred rows over a range or a choice of features."""
    b, scale = (None if v is None else v[part] for v in (inputs.b, inputs.scale))
    return scores(xc, inputs.W[part], b, scale)


def _row_tiles(inputs: ScoreInputs, chosen: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """(rows, scores of those rows over all chosen features)."""
    xc = centre(inputs.x, inputs.b_pre)
    n = inputs.W.shape[0] if chosen is None else chosen.shape[0]
    for rows in chunks(xc.shape[0], n):
        tiles = chunks(n, max(xc.shape[1], rows.stop - rows.start))
        parts = [_tile(inputs, xc[rows], part if chosen is None else chosen[part]) for part in tiles]
        yield rows, torch.cat(parts, 1) if parts else xc.new_zeros(rows.stop - rows.start, 0)


class _Ragged:
    """Collects the kept entries of row tiles into values, columns and row pointers."""

    def __init__(self, like: Tensor, chosen: Tensor | None):
        self.dtype, self.chosen = like.dtype, chosen
        self.values = [like.new_empty(0, dtype=accumulator(like.dtype))]
        self.col = [torch.empty(0, dtype=torch.int64, device=like.device)]
        self.counts = [self.col[0]]

    def add(self, keep: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        row, col = keep.nonzero(as_tuple=True)
        self.values.append(values[row, col])
        self.col.append(col)
        self.counts.append(keep.sum(1))
        return row, col

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        col = torch.cat(self.col)
        counts = torch.cat(self.counts)
        crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return torch.cat(self.values).to(self.dtype), col if self.chosen is None else self.chosen[col], crow


@of_inputs
def encode_threshold_reference(
    inputs: ScoreInputs, threshold: Tensor, bandwidth: float | None, capacity: int | None = None
) -> tuple[Tensor, ...]:
    """The last result is a flag a slot: 1 active, 2 inside the straight-through band; empty without a bandwidth."""
    chosen = checks.sorted_subset(inputs.features, inputs.W.shape[0], "encode_threshold: features")
    theta = threshold.to(accumulator(inputs.x.dtype))
    if chosen is not None and theta.dim():
        theta = theta[chosen]
    kept = _Ragged(inputs.x, chosen)
    flags = [torch.empty(0, dtype=torch.uint8, device=inputs.x.device)]
    for _, s in _row_tiles(inputs, chosen):
        active = (s > theta.clamp_min(0)) | s.isnan()
        if bandwidth is None:
            kept.add(active, s)
            continue
        band = (s - theta).abs() < bandwidth / 2
        row, col = kept.add(active | band, torch.where(active, s, 0))
        flags.append(active[row, col].to(torch.uint8) + 2 * band[row, col].to(torch.uint8))
    if bandwidth is None:
        return *to_capacity("encode_threshold", capacity, *kept.result()), flags[0]
    return to_capacity("encode_threshold", capacity, *kept.result(), torch.cat(flags))


@of_inputs
def encode_batch_topk_reference(inputs: ScoreInputs, k: float, capacity: int | None = None) -> tuple[Tensor, ...]:
    x = inputs.x
    chosen = checks.sorted_subset(inputs.features, inputs.W.shape[0], "encode_batch_topk: features")
    total = int(k * x.shape[0])
    wide = accumulator(x.dtype)
    pool, pool_row, pool_col = x.new_empty(0, dtype=wide), *(torch.empty(2, 0, dtype=torch.int64, device=x.device))
    for rows, s in _row_tiles(inputs, chosen):
        # Once the pool is full, an equal score of a later row loses, so only larger ones (or NaN) can enter.
        floor = pool[-1] if pool.shape[0] == total and total else s.new_zeros(())
        row, col = ((s > floor.clamp_min(0)) | (s.isnan() & ~floor.isnan())).nonzero(as_tuple=True)
        new = s[row, col]
        if new.shape[0] > 2 * total > 0:
            least = new.detach().topk(total, sorted=False).values.amin()
            keep = ~(new < least)  # ties and NaN stay for the stable sort
            new, row, col = new[keep], row[keep], col[keep]
        pool, order = torch.cat([pool, new]).sort(descending=True, stable=True)
        order, pool = order[:total], pool[:total]
        pool_row, pool_col = torch.cat([pool_row, row + rows.start])[order], torch.cat([pool_col, col])[order]
    min_kept = pool[-1].detach().clone() if pool.shape[0] else pool.new_full((), float("inf"))
    order = torch.argsort(pool_row * max(inputs.W.shape[0], 1) + pool_col)
    crow = torch.searchsorted(pool_row[order], torch.arange(x.shape[0] + 1, device=x.device))
    col = pool_col[order]
    entries = pool[order].to(x.dtype), col if chosen is None else chosen[col], crow
    return *to_capacity("encode_batch_topk", capacity, *entries), min_kept


def encode_gated_reference(
    x: Tensor, W: Tensor, b_gate: Tensor, r_mag: Tensor, b_mag: Tensor, b_pre: Any, packed: Any, capacity: int | None = None
) -> tuple[Tensor, ...]:
    wide = accumulator(x.dtype)
    stretch = r_mag.to(wide).exp()
    kept = _Ragged(x, None)
    for _, p in _row_tiles(ScoreInputs(x, W, b_pre=b_pre), None):
        gate, magnitude = p + b_gate, p * stretch + b_mag
        kept.add(~(gate <= 0) & ~(magnitude <= 0), torch.where(gate.isnan(), gate, magnitude))
    return to_capacity("encode_gated", capacity, *kept.result())


# ---------------------------------------------------------------- rows


def _fake_ragged(x: Tensor, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    nnz = torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity
    return x.new_empty(nnz), x.new_empty(nnz, dtype=torch.int64), x.new_empty(x.shape[0] + 1, dtype=torch.int64)


@of_inputs
def _fake_threshold(inputs: ScoreInputs, threshold: Tensor, bandwidth: float | None, capacity: int | None = None) -> tuple[Tensor, ...]:
    values, col, crow = _fake_ragged(inputs.x, capacity)
    return values, col, crow, inputs.x.new_empty(0 if bandwidth is None else values.shape[0], dtype=torch.uint8)


_INPUTS = "Tensor x, Tensor W, Tensor? b, Tensor? b_pre, Tensor? scale, Tensor? features, Tensor? packed"
_CAPACITY = "SymInt? capacity=None"
ENCODE_TOPK = Op(
    f"encode_topk({_INPUTS}, SymInt k, bool relu, bool absolute=False) -> (Tensor, Tensor)",
    encode_topk_reference,
    fake=of_inputs(lambda s, k, *_: (s.x.new_empty((s.x.shape[0], k)), s.x.new_empty((s.x.shape[0], k), dtype=torch.int64))),
    samples=encode_samples.topk_samples,
    check=encode_samples.check_topk,
    workload=lambda *where: (*encode_samples.layer(*where), None, None, None, None, 32, True),
    batched=(0,),
    handle=(1, 6),
)
ENCODE_THRESHOLD = Op(
    f"encode_threshold({_INPUTS}, Tensor threshold, float? bandwidth, {_CAPACITY}) -> (Tensor, Tensor, Tensor, Tensor)",
    encode_threshold_reference,
    fake=_fake_threshold,
    samples=encode_samples.threshold_samples,
    check=encode_samples.check_threshold,
    workload=encode_samples.threshold_workload,
    handle=(1, 6),
)
ENCODE_BATCH_TOPK = Op(
    f"encode_batch_topk({_INPUTS}, float k, {_CAPACITY}) -> (Tensor, Tensor, Tensor, Tensor)",
    encode_batch_topk_reference,
    fake=of_inputs(lambda s, k, capacity=None: (*_fake_ragged(s.x, capacity), s.x.new_empty((), dtype=accumulator(s.x.dtype)))),
    samples=encode_samples.batch_topk_samples,
    check=encode_samples.check_batch_topk,
    workload=lambda *where: (*encode_samples.layer(*where), None, None, None, None, 32.0),
    handle=(1, 6),
)
ENCODE_GATED = Op(
    f"encode_gated(Tensor x, Tensor W, Tensor b_gate, Tensor r_mag, Tensor b_mag, Tensor? b_pre, Tensor? packed, {_CAPACITY})"
    " -> (Tensor, Tensor, Tensor)",
    encode_gated_reference,
    fake=lambda x, W, b_gate, r_mag, b_mag, b_pre, packed, capacity=None: _fake_ragged(x, capacity),
    samples=encode_samples.gated_samples,
    check=encode_samples.check_gated,
    workload=encode_samples.gated_workload,
    handle=(1, 6),
)
for _op in (ENCODE_TOPK, ENCODE_THRESHOLD, ENCODE_BATCH_TOPK, ENCODE_GATED):
    _op.row("cpu", f"fastsae.native.encode:{_op.name}", f"fastsae.native.encode:refuses_{_op.name}")
    _op.row("triton", f"fastsae.kernels.encode:{_op.name}", "fastsae.reference:triton_refuses_scores")

# ---------------------------------------------------------------- backward
# A class for each encoder, as a compiler takes no operation for an argument of ``apply``.


def _keep(
    ctx: Any, outputs: tuple[Tensor, ...], passes: Tensor, inputs: Any, backend: str | None, capacity: Any = None, *more: Tensor
) -> tuple[Tensor, ...]:
    """Saves for ``_through_scores``: where a value's gradient is its score's, the slots, (x, W, b, b_pre, scale), and ``more``."""
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.save_for_backward(passes, outputs[1], outputs[2] if len(outputs) > 2 else None, *inputs, *more)
    ctx.padded, ctx.backend = capacity is not None, then_any(backend)
    return outputs


def _through_scores(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of an encoder's first five inputs, (x, W, b, b_pre, scale)."""
    passes, indices, crow, x, W, b, b_pre, scale = ctx.saved_tensors[:8]
    dscore = torch.where(passes, grad, 0)
    return score_gradients(dscore, indices, crow, x, W, b, b_pre, scale, ctx.needs_input_grad[:5], ctx.backend, ctx.padded)


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *given, relu, absolute, backend = args
        values, indices = ENCODE_TOPK(*given, relu, absolute, backend=backend)
        return _keep(ctx, (values, indices), values > 0 if relu else ~values.isnan(), args[:5], backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return *_through_scores(ctx, grad), *[None] * (len(ctx.needs_input_grad) - 5)


class _EncodeBatchTopK(_EncodeTopK):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *given, capacity, backend = args
        outputs = ENCODE_BATCH_TOPK(*given, capacity, backend=backend)
        return _keep(ctx, outputs, ~outputs[0].isnan(), args[:5], backend, capacity)


class _EncodeThreshold(torch.autograd.Function):
    """With a bandwidth there is one more result, ``l0``, which has a gradient."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *given, threshold, bandwidth, capacity, backend = args
        outputs = values, _, crow, flags = ENCODE_THRESHOLD(*given, threshold, bandwidth, capacity, backend=backend)
        passes = ~values.isnan() if bandwidth is None else (flags & 1).bool() & ~values.isnan()
        ctx.bandwidth = bandwidth
        _keep(ctx, outputs, passes, args[:5], backend, capacity, flags, threshold)
        return outputs if bandwidth is None else (*outputs, active_counts(flags, crow, accumulator(values.dtype)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dthreshold = None
        if ctx.needs_input_grad[7]:
            _, col, crow, _, W, *_, flags, threshold = ctx.saved_tensors
            dthreshold = torch.zeros_like(threshold)
            if ctx.bandwidth is not None:
                band = band_gradient(Slots(grad, col, crow), rest[-1], flags, threshold, ctx.bandwidth, ctx.padded)
                sums = feature_sums(band, col, pointers(crow, col.shape[0]) if ctx.padded else crow, W.shape[0], ctx.backend)
                dthreshold = (sums if threshold.dim() else sums.sum()).to(threshold.dtype)
        return *_through_scores(ctx, grad), None, None, dthreshold, None, None, None


def active_counts(flags: Tensor, crow: Tensor, dtype: torch.dtype) -> Tensor:
    """``[rows]``: active slots of each row."""
    before = torch.cat([crow.new_zeros(1), (flags & 1).long().cumsum(0)])
    return before[crow].diff().to(dtype)


class _EncodeGated(torch.autograd.Function):
    """A gated SAE's magnitudes are scores with the scale ``exp(r_mag)`` and the bias ``b_mag``."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        x, W, b_mag, b_pre, _, b_gate, r_mag, packed, capacity, backend = args
        outputs = ENCODE_GATED(x, W, b_gate, r_mag, b_mag, b_pre, packed, capacity, backend=backend)
        return _keep(ctx, outputs, ~outputs[0].isnan(), args[:5], backend, capacity, b_gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # The gate is a step: its gradient is zero (gated SAEs train it through an auxiliary loss).
        dgate = torch.zeros_like(ctx.saved_tensors[8]) if ctx.needs_input_grad[5] else None
        return *_through_scores(ctx, grad), dgate, None, None, None, None


# ---------------------------------------------------------------- public


def encoder_inputs(
    op: str, x: Any, W: Any, name: str = "W_enc", rows: str = "F", **vectors: Any
) -> tuple[tuple[int, ...], Tensor, Tensor, Any, list[Any]]:
    """Checks, casts under autocast and flattens: (batch shape, x [rows, D], W, a handle's words, the vectors). ``name`` is that of W, and
    ``rows`` of its first size."""
    checks.tensor(op, "x", x)
    packed = None
    if isinstance(W, PackedWeights):
        packed, W = W.words(op), W.weight
    checks.tensor(op, name, W, like=x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have shape [.., D], got []")
    if W.dim() != 2 or W.shape[1] != x.shape[-1]:
        checks.shape(op, name, W, (None, x.shape[-1]), f"[{rows}, D={x.shape[-1]}] for x {list(x.shape)}")
    values = list(vectors.values())
    if checks.autocasting(x.device):
        given = W
        x, W, *values = checks.autocast(x, W, *values)
        packed = packed if W is given else None  # packed before the cast: of no use for the rounded weights
    checks.same_dtype(op, name, W, "x", x)
    for which, vector in zip(vectors, values):
        if vector is not None:
            size, label = (W.shape[1], "D") if which == "b_pre" else (W.shape[0], rows)
            checks.vector(op, which, vector, size, x, label)
    batch = x.shape[:-1]
    if len(batch) != 1:
        x = x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
    return batch, x, W, packed, values


def _score_inputs(op: str, x: Any, W: Any, b: Any, b_pre: Any, scale: Any, features: Any) -> tuple[tuple[int, ...], ScoreInputs]:
    """``encoder_inputs`` of the encoders whose arguments are those of ``encode_topk``: (batch shape, inputs)."""
    batch, x, W, packed, (b, b_pre, scale) = encoder_inputs(op, x, W, b_enc=b, b_pre=b_pre, scale=scale)
    if features is not None:
        features = checks.subset(op, "features", features, W.shape[0], x, "F")
    return batch, ScoreInputs(x, W, b, b_pre, scale, features, packed)


def _latents(
    values: Tensor, crow: Tensor, col: Tensor, dtype: torch.dtype, n_features: int, batch: tuple[int, ...], capacity: int | None
) -> RaggedLatents:
    return RaggedLatents(values, crow, col if dtype is torch.int64 else col.to(dtype), n_features, tuple(batch), capacity is not None)


def _quick_topk(x: Any, W: Any, b: Any, b_pre: Any, scale: Any, k: Any, relu: Any) -> TopKLatents | None:
    """The result where the call is ``alone`` and asks for nothing special; None where the long way has to be gone."""
    handle, W = (W, W.weight) if type(W) is PackedWeights else (None, W)
    if type(k) is not int or not (relu is None or type(relu) is bool) or not alone(x, W, b, b_pre, scale):
        return None
    quick: Any = getattr(ENCODE_TOPK.rows[0].run(), "quick", None)  # the compiled row's, unless it is audited
    found: Any = quick and quick(x, W, b, b_pre, scale, handle and handle.words("encode_topk"), k, relu is not False)
    return found and TopKLatents(found[0], found[1], W.shape[0])


def encode_topk(
    x: Tensor,
    W_enc: Tensor | PackedWeights,
    b_enc: Tensor | None = None,
    *,
    k: int,
    b_pre: Tensor | None = None,
    scale: Tensor | None = None,
    features: Tensor | None = None,
    relu: bool | None = None,
    absolute: bool = False,
    index_dtype: torch.dtype = torch.int64,
    backend: str | None = None,
) -> TopKLatents:
    """The k largest scores ``b_enc + scale * (x - b_pre) @ W_enc.T`` of each row; with ``absolute`` those of largest magnitude.

    Args:
        x: activations ``[.., D]``; float32, bfloat16, float16 or float64; any strides.
        W_enc: ``[F, D]``, dtype of ``x``; any strides, as those of a transposed ``[D, F]`` parameter; or a handle of ``fastsae.pack``.
        b_enc: ``[F]``, dtype of ``x`` or float32.
        k: latents kept a row, ``1 <= k <=`` number of features (of those chosen by ``features``).
        b_pre: ``[D]`` subtracted from ``x`` first.
        scale: ``[F]`` factor of each product, before the bias (e.g. decoder norms).
        features: restricts to a subset, as an index (order and repetition do not matter) or a mask ``[F]``: dead features for AuxK, a
            slice.
        relu: clamp the kept values at 0 after the selection; default: yes, but not with ``absolute``, where it must be False.
        absolute: select by magnitude and keep the sign (AbsTopK, arXiv 2510.00404).
        index_dtype: torch.int64 or torch.int32.
        backend: see ``fastsae.use_backend``.

    Returns:
        ``TopKLatents``: values ``[.., k]`` in the dtype of ``x``, descending by float32 score (by its magnitude); indices ``[.., k]``,
        unique in a row, in numbers of the whole dictionary.

    The selection is exact under the score, whose sums are in float32 (float64 stays); equal scores (with ``absolute`` equal magnitudes,
    so that s and -s tie): lower index first, -0 == +0; NaN ranks above +inf. Gradients (x, W_enc, b_enc, b_pre, scale) flow through
    kept entries, with ``relu`` only where the value is above 0, never through NaN. Deterministic. Memory beyond the output, whatever
    ``B`` and ``F``: temporaries of 64 MiB each in the reference; in the C++ row a copy of at most 1024 rows of ``x``, packed panels (of
    small dictionaries all, at most about 6 MiB) and candidate buffers (there 8 MiB), kept for reuse (``csrc/fastsae.h`` states the
    bytes; 3 MB at B = 256, D = 768, F = 24576, k = 32); in the Triton row chunks of rows with 128 MiB of candidates, 32 MiB of
    rounded or copied features (64 of a subset) and at most 64 bytes a feature. There the host waits for nothing but the number of
    ``features``.

    Raises:
        TypeError: dtype or device. ValueError: shape, k out of range, ``relu`` with ``absolute``. IndexError: ``features`` out of range (on
        a GPU: left out, raised by ``fastsae.check()``).

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093); Makhzani & Frey 2013 (arXiv 1312.5663).
    """
    op = "encode_topk"
    usual = features is None and backend is None and absolute is False and index_dtype is torch.int64
    if usual and (quick := _quick_topk(x, W_enc, b_enc, b_pre, scale, k, relu)) is not None:
        return quick
    batch, inputs = _score_inputs(op, x, W_enc, b_enc, b_pre, scale, features)
    F = inputs.W.shape[0]
    k = checks.integer(op, "k", k, 1, F, f"F={F}")
    absolute = checks.flag(op, "absolute", absolute)
    relu = not absolute if relu is None else checks.flag(op, "relu", relu)
    if relu and absolute:
        raise ValueError(f"{op}: relu must be False with absolute, which keeps negative scores, got True")
    dtype = checks.index_dtype(op, index_dtype, F)
    backend = preference(backend)
    if tracks(op, *inputs[:5]):
        values, indices = _EncodeTopK.apply(*inputs, k, relu, absolute, backend)  # pyright: ignore[reportGeneralTypeIssues]
    else:
        values, indices = ENCODE_TOPK(*inputs, k, relu, absolute, backend=backend)
    if len(batch) != 1:
        values, indices = values.reshape(*batch, k), indices.reshape(*batch, k)
    return TopKLatents(values, indices if dtype is torch.int64 else indices.to(dtype), F)


@overload
def encode_threshold(
    x: Tensor, W_enc: Tensor | PackedWeights, b_enc: Tensor | None = None, *, threshold: float | Tensor = 0.0, b_pre: Tensor | None = None,
    scale: Tensor | None = None, features: Tensor | None = None, bandwidth: None = None, capacity: int | None = None,
    index_dtype: torch.dtype = torch.int64, backend: str | None = None,
) -> RaggedLatents: ...  # fmt: skip
@overload
def encode_threshold(
    x: Tensor, W_enc: Tensor | PackedWeights, b_enc: Tensor | None = None, *, threshold: float | Tensor = 0.0, b_pre: Tensor | None = None,
    scale: Tensor | None = None, features: Tensor | None = None, bandwidth: float, capacity: int | None = None,
    index_dtype: torch.dtype = torch.int64, backend: str | None = None,
) -> tuple[RaggedLatents, Tensor]: ...  # fmt: skip
def encode_threshold(
    x: Tensor,
    W_enc: Tensor | PackedWeights,
    b_enc: Tensor | None = None,
    *,
    threshold: float | Tensor = 0.0,
    b_pre: Tensor | None = None,
    scale: Tensor | None = None,
    features: Tensor | None = None,
    bandwidth: float | None = None,
    capacity: int | None = None,
    index_dtype: torch.dtype = torch.int64,
    backend: str | None = None,
) -> RaggedLatents | tuple[RaggedLatents, Tensor]:
    """The scores above ``max(threshold, 0)`` (strictly): JumpReLU; with threshold 0 ReLU.

    Args:
        x, W_enc, b_enc, b_pre, scale, features, index_dtype, backend: as in ``encode_topk``.
        threshold: a number, a tensor ``[]`` or one threshold a feature ``[F]`` (raw, not its logarithm); dtype of ``x`` or float32.
        bandwidth: width of the straight-through band, above 0. With it the call returns ``(latents, l0)``: scores within
            ``bandwidth / 2`` of their threshold but not above it are stored too, as slots of value 0, so that the backward sees them.
        capacity: slots of the result, 1 .. 2^40. With it the result has exactly that many, whatever fires, the latents are ``padded``, and
            on a GPU the host waits for nothing: for CUDA graphs, and compiled code of fixed shapes. Latents that do not fit: ValueError on
            the CPU; on a GPU they are left out and ``fastsae.check()`` raises. Each 256 empty slots cost a decode and the backward about
            what a row does, so twice the usual number is ample.

    Returns:
        ``RaggedLatents`` with columns ascending and value = score; with ``bandwidth`` ``(latents, l0)``, where ``l0 [..]`` counts the
        active latents of a row, in float32 (float64 for float64).

    NaN is kept, with zero gradient. Gradients flow through the active scores to x, W_enc, b_enc, b_pre and scale, and with ``bandwidth``
    e to the threshold: ``d value / d threshold = -(threshold / e)`` and ``d l0 / d threshold = -1 / e`` where
    ``|score - threshold| < e / 2``; without it the threshold's gradient is zero. Deterministic. Memory beyond the output: temporaries
    of 64 MiB each in the reference; in the C++ row that of ``encode_topk`` and 17 bytes a latent until they are copied out; in the Triton
    row that of ``encode_topk``, made of masks, each formed twice where there are several chunks of rows (the host waits for the number of
    latents in between). The output holds what fires, at initialisation about half of ``[B, F]`` for ReLU (``SAE`` then works tile by tile).

    Raises: as ``encode_topk``; ValueError for a bandwidth not above 0.

    Source: Rajamanoharan et al. 2024, "Jumping Ahead" (arXiv 2407.14435).
    """
    op = "encode_threshold"
    batch, inputs = _score_inputs(op, x, W_enc, b_enc, b_pre, scale, features)
    x, F = inputs.x, inputs.W.shape[0]
    dtype = checks.index_dtype(op, index_dtype, F)
    bandwidth = None if bandwidth is None else float(checks.number(op, "bandwidth", bandwidth))
    wide = accumulator(x.dtype)
    if not isinstance(threshold, Tensor):
        threshold = x.new_full((), checks.within(wide, float(checks.number(op, "threshold", threshold, positive=False))), dtype=wide)
    elif threshold.dim():
        checks.vector(op, "threshold", threshold, F, x, "F")
    else:
        checks.tensor(op, "threshold", threshold, checks.beside(x), x)
    backend = preference(backend)
    capacity = None if capacity is None else checks.integer(op, "capacity", capacity, 1, 2**40)
    if tracks(op, *inputs[:5], threshold):
        values, col, crow, flags, *rest = _EncodeThreshold.apply(*inputs, threshold, bandwidth, capacity, backend)  # pyright: ignore[reportGeneralTypeIssues]
    else:
        (values, col, crow, flags), rest = ENCODE_THRESHOLD(*inputs, threshold, bandwidth, capacity, backend=backend), []
    latents = _latents(values, crow, col, dtype, F, batch, capacity)
    if bandwidth is None:
        return latents
    return latents, (rest[0] if rest else active_counts(flags, crow, wide)).reshape(batch)


def encode_batch_topk(
    x: Tensor,
    W_enc: Tensor | PackedWeights,
    b_enc: Tensor | None = None,
    *,
    k: float,
    b_pre: Tensor | None = None,
    scale: Tensor | None = None,
    features: Tensor | None = None,
    capacity: int | None = None,
    index_dtype: torch.dtype = torch.int64,
    backend: str | None = None,
) -> tuple[RaggedLatents, Tensor]:
    """The ``int(k * rows)`` largest positive scores of the whole batch.

    Args:
        x, W_enc, b_enc, b_pre, scale, features, index_dtype, backend: as in ``encode_topk``.
        k: mean number of latents a row, above 0; may be fractional. Fewer positive scores give fewer latents.
        capacity: as in ``encode_threshold``. On a GPU it must also hold the candidates: what reaches the least of the ``ceil(k)`` best of
            every row that are among the ``int(k * rows)`` best of these; more than the latents where some rows fire far more than others.

    Returns:
        ``(latents, min_kept)``: ``RaggedLatents`` with columns ascending; ``min_kept []`` (float32, or float64 for float64 inputs), the
        smallest kept score, ``+inf`` where none is kept: its running mean is the threshold for inference.

    Ties: by score, then the lower row, then the lower feature. NaN ranks above +inf and is kept, with zero gradient. Gradients flow
    through kept entries. Deterministic; a row's result depends on its batch by nature. Memory: the output and temporaries of 64 MiB
    each in the reference, 48 bytes a latent and the workspace of ``encode_topk`` in the C++ row, about 80 bytes for each of ``ceil(k) *
    rows`` candidates and that workspace in the Triton row.

    Raises: as ``encode_topk``; ValueError for k not above 0.

    Source: Bussmann, Leask & Nanda 2024, "BatchTopK sparse autoencoders" (arXiv 2412.06410).
    """
    op = "encode_batch_topk"
    batch, inputs = _score_inputs(op, x, W_enc, b_enc, b_pre, scale, features)
    F = inputs.W.shape[0]
    dtype = checks.index_dtype(op, index_dtype, F)
    k = float(checks.number(op, "k", k))
    capacity = None if capacity is None else checks.integer(op, "capacity", capacity, 1, 2**40)
    backend = preference(backend)
    if tracks(op, *inputs[:5]):
        outputs = _EncodeBatchTopK.apply(*inputs, k, capacity, backend)
    else:
        outputs = ENCODE_BATCH_TOPK(*inputs, k, capacity, backend=backend)
    values, col, crow, min_kept = outputs  # pyright: ignore[reportGeneralTypeIssues]
    return _latents(values, crow, col, dtype, F, batch, capacity), min_kept


def encode_gated(
    x: Tensor,
    W_enc: Tensor | PackedWeights,
    *,
    b_gate: Tensor,
    r_mag: Tensor,
    b_mag: Tensor,
    b_pre: Tensor | None = None,
    capacity: int | None = None,
    index_dtype: torch.dtype = torch.int64,
    backend: str | None = None,
) -> RaggedLatents:
    """Gated SAE: ``1[p + b_gate > 0] * relu(p * exp(r_mag) + b_mag)`` with ``p = (x - b_pre) @ W_enc.T``.

    Args:
        x, W_enc, b_pre, index_dtype, backend: as in ``encode_topk``. capacity: as in ``encode_threshold``.
        b_gate, r_mag, b_mag: ``[F]``, dtype of ``x`` or float32.

    Returns:
        ``RaggedLatents`` of the entries above 0, columns ascending, values in the dtype of ``x``. NaN is kept, with zero gradient.

    Gradients: x, W_enc, r_mag, b_mag, b_pre through kept entries; the gate is a step, so b_gate's is zero. Deterministic. Memory: as
    ``encode_threshold``. Raises: as ``encode_topk``.

    Source: Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders" (arXiv 2404.16014).
    """
    op = "encode_gated"
    for name, vector in (("b_gate", b_gate), ("r_mag", r_mag), ("b_mag", b_mag)):
        checks.tensor(op, name, vector)
    batch, x, W, packed, vectors = encoder_inputs(op, x, W_enc, b_gate=b_gate, r_mag=r_mag, b_mag=b_mag, b_pre=b_pre)
    b_gate, r_mag, b_mag, b_pre = vectors
    dtype = checks.index_dtype(op, index_dtype, W.shape[0])
    capacity = None if capacity is None else checks.integer(op, "capacity", capacity, 1, 2**40)
    backend = preference(backend)
    if tracks(op, x, W, *vectors):
        stretch = r_mag.to(accumulator(x.dtype)).exp()
        outputs = _EncodeGated.apply(x, W, b_mag, b_pre, stretch, b_gate, r_mag.detach(), packed, capacity, backend)
    else:
        outputs = ENCODE_GATED(x, W, b_gate, r_mag, b_mag, b_pre, packed, capacity, backend=backend)
    values, col, crow = outputs  # pyright: ignore[reportGeneralTypeIssues]
    return _latents(values, crow, col, dtype, W.shape[0], batch, capacity)
