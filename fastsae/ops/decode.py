"""Sparse decode: y = b + sum over a row's latents of value * W[index], and its gradients.

Three operations carry it, and every encoder's backward as well (an encoder's dx is a decode, its dW a decode_dweight):

    decode          y[r]      = b + sum_s value[s] * W[index[s]]          slots s of row r, in slot order
    decode_dvalues  dvalue[s] = <grad[r], W[index[s]]>
    decode_dweight  out[f]    = sum_s value[s] * grad[r] over slots with index f, in (row, slot) order

Slots come as ``[rows, K]``, or ragged as ``[nnz]`` with ``crow [rows + 1]``. Sums are in float32 (float64 stays), in blocks of 16 slots.
No operation allocates ``[rows * K, D]`` or a dense code. The weight gradient is the decode of the transposed latents: a stable sort by
feature makes it deterministic without float atomics.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae._core import checks
from fastsae.dispatch import Op, alone, batching, preference, then_any
from fastsae.latents import Latents, RaggedLatents, Slots, TopKLatents, pointers
from fastsae.reference import accumulator, chunks, drawn, product, tracks

# ---------------------------------------------------------------- reference


def decode_reference(values: Tensor, indices: Tensor, crow: Tensor | None, W: Tensor, b: Tensor | None) -> Tensor:
    wide = accumulator(W.dtype)
    slots = Slots(values, indices, crow).safe(W.shape[0])
    values, indices = slots.values, slots.indices
    parts = [W.new_zeros(0, W.shape[1], dtype=wide)]
    if crow is None:
        rows, k = indices.shape
        for part in chunks(rows, k * W.shape[1]):
            gathered = W[indices[part]].to(wide)  # [r, K, D]
            parts.append(torch.einsum("rk,rkd->rd", values[part].to(wide), gathered))
    else:
        bounds = slots.bounds()
        for start, stop in _row_groups(bounds, W.shape[1]):
            part = slice(bounds[start], bounds[stop])
            products = values[part].to(wide).unsqueeze(1) * W[indices[part]].to(wide)  # [slots, D]
            parts.append(_segment_sum(products, crow[start : stop + 1] - bounds[start]))
    y = torch.cat(parts)
    return (y if b is None else y + b).to(W.dtype)


def decode_dvalues_reference(grad: Tensor, indices: Tensor, crow: Tensor | None, W: Tensor) -> Tensor:
    wide = accumulator(W.dtype)
    slots = Slots(grad.new_zeros(indices.shape, dtype=wide), indices, crow)
    if crow is not None:
        slots.bounds()
    slots = slots.safe(W.shape[0])
    mark, features, row = slots.values.reshape(-1), slots.indices.reshape(-1), slots.row_of()
    parts = [mark[:0]]
    for part in chunks(features.shape[0], W.shape[1]):
        parts.append((grad[row[part]].to(wide) * W[features[part]].to(wide)).sum(1) + mark[part])
    return torch.cat(parts).to(grad.dtype).reshape(indices.shape)


def decode_dweight_reference(values: Tensor, indices: Tensor, crow: Tensor | None, grad: Tensor, out: Tensor) -> None:
    out.copy_(decode_reference(*transposed(Slots(values, indices, crow), out.shape[0]), grad, None))


def transposed(slots: Slots, n_features: int) -> Slots:
    """Slots by feature, after a check of theirs: the decode of the transposed latents is the gradient of the weights."""
    if slots.crow is not None:
        slots.bounds()
    return slots.safe(n_features).by_feature(n_features)


def _segment_sum(products: Tensor, offsets: Tensor) -> Tensor:
    if products.shape[0] == 0 or products.shape[1] == 0:
        return products.new_zeros(offsets.shape[0] - 1, products.shape[1])
    return torch.segment_reduce(products, "sum", offsets=offsets, initial=0.0, unsafe=True)


def _row_groups(bounds: list[int], width: int) -> Iterator[tuple[int, int]]:
    """Groups of whole rows whose slots, times ``width``, fit the workspace."""
    most = next(chunks(1 << 62, width)).stop
    start = 0
    for row in range(1, len(bounds)):
        if bounds[row] - bounds[start] > most and row - 1 > start:
            yield start, row - 1
            start = row - 1
    if len(bounds) - 1 > start:
        yield start, len(bounds) - 1


# ---------------------------------------------------------------- samples and checks


def latent_samples(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, int, int]]:
    """(values, indices, crow, n_features, width) over sizes 0, 1, odd, powers of two and one heavy feature."""
    normal = drawn(device, dtype, generator)

    def draw(high: int, shape: Sequence[int]) -> Tensor:
        return torch.randint(0, max(high, 1), shape, generator=generator, device="cpu").to(device)

    sizes = (3, 4, 17, 33), (1, 1, 1, 1), (0, 3, 5, 7), (5, 0, 5, 7), (2, 3, 4, 0), (33, 65, 70, 64), (7, 130, 256, 130)
    for rows, k, n_features, width in sizes:
        yield normal(rows, k), draw(n_features, (rows, k)), None, n_features, width
    for lengths, n_features, width in (([2, 0, 5, 1], 11, 19), ([0, 0], 4, 5), ([], 4, 5), ([200, 1, 70, 0, 3], 300, 40)):
        crow = torch.tensor([0, *lengths], device="cpu").cumsum(0).to(device)
        nnz = sum(lengths)
        yield normal(nnz), draw(n_features, (nnz,)), crow, n_features, width
    heavy = draw(9, (300, 2))
    heavy[:, 0] = 3
    yield normal(300, 2), heavy.int(), None, 9, 24


def _weights(device: torch.device, dtype: torch.dtype, generator: torch.Generator, features: int, width: int) -> Iterator[Tensor]:
    """The two layouts: ``[F, D]``, and a transposed view of ``[D, F]``."""
    normal = drawn(device, dtype, generator)
    yield normal(features, width)
    yield normal(width, features).T


def _decode_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for values, indices, crow, n_features, width in latent_samples(device, dtype, generator):
        for W in _weights(device, dtype, generator, n_features, width):
            yield values, indices, crow, W, drawn(device, dtype, generator)(width)
            yield values, indices, crow, W, None


def _dvalues_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for values, indices, crow, n_features, width in latent_samples(device, dtype, generator):
        rows = values.shape[0] if crow is None else crow.shape[0] - 1
        for W in _weights(device, dtype, generator, n_features, width):
            grad = drawn(device, dtype, generator)(rows, width)
            yield grad, indices, crow, W
        # Of the last weights: two are always drawn.
        yield grad[:, :1].expand(rows, width) if width else grad, indices, crow, W  # pyright: ignore[reportPossiblyUnboundVariable]


def _dweight_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for values, indices, crow, n_features, width in latent_samples(device, dtype, generator):
        rows = values.shape[0] if crow is None else crow.shape[0] - 1
        grad = drawn(device, dtype, generator)(rows, width)
        yield values, indices, crow, grad, torch.empty((n_features, width), device=device, dtype=dtype)
        yield values, indices, crow, grad, torch.empty((width, n_features), device=device, dtype=dtype).T


def _workload(arrange: Any) -> Any:
    def workload(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
        normal = drawn(device, dtype, generator)
        values, indices = normal(256, 32), torch.randint(0, 16384, (256, 32), generator=generator, device="cpu").to(device)
        return arrange(values, indices, normal(16384, 512))

    return workload


def _dweight_result(values: Tensor, indices: Tensor, crow: Tensor | None, grad: Tensor, out: Tensor) -> Tensor:
    fresh = torch.empty(out.shape, device=grad.device, dtype=grad.dtype)
    decode_dweight_reference(values, indices, crow, grad, fresh)
    return fresh


# ---------------------------------------------------------------- rows

DECODE = Op(
    "decode(Tensor values, Tensor indices, Tensor? crow, Tensor W, Tensor? b) -> Tensor",
    decode_reference,
    fake=lambda values, indices, crow, W, b: W.new_empty((indices.shape[0] if crow is None else crow.shape[0] - 1, W.shape[1])),
    samples=_decode_samples,
    check=lambda testing, *given: testing.check_linear(decode_reference, *given),
    workload=_workload(lambda values, indices, W: (values, indices, None, W, None)),
    batched=(0, 1),
)
DECODE_DVALUES = Op(
    "decode_dvalues(Tensor grad, Tensor indices, Tensor? crow, Tensor W) -> Tensor",
    decode_dvalues_reference,
    fake=lambda grad, indices, crow, W: grad.new_empty(indices.shape),
    samples=_dvalues_samples,
    check=lambda testing, *given: testing.check_linear(decode_dvalues_reference, *given),
    workload=_workload(lambda values, indices, W: (values @ W[:32], indices, None, W)),
    batched=(0, 1),
)
DECODE_DWEIGHT = Op(
    "decode_dweight(Tensor values, Tensor indices, Tensor? crow, Tensor grad, Tensor(a!) out) -> ()",
    decode_dweight_reference,
    fake=lambda values, indices, crow, grad, out: None,
    samples=_dweight_samples,
    check=lambda testing, *given: testing.check_linear(_dweight_result, *given),
    workload=_workload(lambda values, indices, W: (values, indices, None, values @ W[:32], torch.empty_like(W))),
    mutates=(4,),
)
for _op in (DECODE, DECODE_DVALUES, DECODE_DWEIGHT):
    _op.row("cpu", f"fastsae.native.decode:{_op.name}", f"fastsae.native.decode:refuses_{_op.name}")
    if _op is DECODE_DWEIGHT:  # before Triton's, whose sort passes over whole keys and carries slots of 64 bits
        _op.row("cuda", "fastsae.native.cuda:decode_dweight", "fastsae.native.cuda:refuses_decode_dweight")
    _op.row("triton", f"fastsae.kernels.decode:{_op.name}", "fastsae.reference:triton_refuses")

# ---------------------------------------------------------------- backward


# The three operations are each other's derivatives, so that gradients have derivatives of any order, through the same kernels.


class _Decode(torch.autograd.Function):
    # forward(ctx, ..) rather than setup_context, which costs 25 µs a call in inspect.signature (torch 2.13).
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, crow: Tensor | None, W: Tensor, b: Tensor | None, backend: str | None) -> Tensor:
        ctx.save_for_backward(values, indices, crow, W)
        ctx.b_dtype = None if b is None else b.dtype
        ctx.backend = backend
        return DECODE(values, indices, crow, W, b, backend=backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        values, indices, crow, W = ctx.saved_tensors
        dvalues, dweight, dbias = _gradients(grad, values, indices, crow, W, ctx.b_dtype, ctx.needs_input_grad, then_any(ctx.backend))
        return dvalues, None, None, dweight, dbias, None


class _DValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, indices: Tensor, crow: Tensor | None, W: Tensor, backend: str | None) -> Tensor:
        ctx.save_for_backward(grad, indices, crow, W)
        ctx.backend = backend
        return DECODE_DVALUES(grad, indices, crow, W, backend=backend)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad, indices, crow, W = ctx.saved_tensors
        dgrad = decode_slots(g, indices, crow, W, None, ctx.backend) if ctx.needs_input_grad[0] else None
        dweight = weight_gradient(g, indices, crow, grad, W, ctx.backend) if ctx.needs_input_grad[3] else None
        return dgrad, None, None, dweight, None


class _DWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, crow: Tensor | None, grad: Tensor, like: Tensor, backend: str | None) -> Tensor:
        ctx.save_for_backward(values, indices, crow, grad)
        ctx.backend = backend
        return weight_gradient(values, indices, crow, grad, like, backend)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        values, indices, crow, grad = ctx.saved_tensors
        dvalues = value_gradient(grad, indices, crow, g, ctx.backend) if ctx.needs_input_grad[0] else None
        dgrad = decode_slots(values, indices, crow, g, None, ctx.backend) if ctx.needs_input_grad[3] else None
        return dvalues, None, None, dgrad, None, None


def _gradients(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    crow: Tensor | None,
    W: Tensor,
    b_dtype: torch.dtype | None,
    needs: Sequence[bool],
    backend: str | None,
    out: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dvalues = dweight = dbias = None
    if needs[0]:
        dvalues = value_gradient(grad, indices, crow, W, backend)
    if needs[3]:
        dweight = weight_gradient(values, indices, crow, grad, W, backend, out)
    if needs[4] and b_dtype is not None:
        dbias = grad.sum(0, dtype=accumulator(grad.dtype)).to(b_dtype)
    return dvalues, dweight, dbias


def decode_slots(values: Tensor, indices: Tensor, crow: Tensor | None, W: Tensor, b: Tensor | None, backend: str | None) -> Tensor:
    if tracks("decode", values, W, b):
        return _Decode.apply(values, indices, crow, W, b, backend)  # pyright: ignore[reportReturnType]
    return DECODE(values, indices, crow, W, b, backend=backend)


def value_gradient(grad: Tensor, indices: Tensor, crow: Tensor | None, W: Tensor, backend: str | None) -> Tensor:
    if tracks("the gradient of decode", grad, W):
        return _DValues.apply(grad, indices, crow, W, backend)  # pyright: ignore[reportReturnType]
    return DECODE_DVALUES(grad, indices, crow, W, backend=backend)


def weight_gradient(
    values: Tensor, indices: Tensor, crow: Tensor | None, grad: Tensor, W: Tensor, backend: str | None, out: Tensor | None = None
) -> Tensor:
    """A gradient in the layout of ``W``: contiguous, or transposed where ``W`` is a transposed view."""
    if tracks("the gradient of decode", values, grad):
        return _DWeight.apply(values, indices, crow, grad, W.detach(), backend)  # pyright: ignore[reportReturnType]
    if out is None and not torch.compiler.is_compiling() and batching():  # what writes into a tensor knows no batch of them
        slots = Slots(values, indices, crow).safe(W.shape[0])
        products = slots.values.reshape(-1, 1) * grad[slots.row_of()].to(accumulator(grad.dtype))
        return torch.zeros_like(W, dtype=products.dtype).index_add(0, slots.indices.reshape(-1), products).to(W.dtype)
    dweight = torch.empty_like(W, requires_grad=False) if out is None else out
    DECODE_DWEIGHT(values, indices, crow, grad, dweight, backend=backend)
    return dweight


# ---------------------------------------------------------------- public


def decode(
    latents: Latents,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    x: Tensor | None = None,
    skip: Tensor | None = None,
    prefixes: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Reconstruction from latents: ``y = b_dec + sum_k value_k * W_dec[index_k]`` (+ ``x @ skip.T``).

    Args:
        latents: ``TopKLatents`` or ``RaggedLatents`` with batch dimensions ``[..]``; values float32, bfloat16, float16 or float64.
        W_dec: ``[F, D_out]``, or ``[L, F, D_out]`` for several decoders of one code (crosscoder); dtype of the values; any strides, a
            transposed view of a ``[D_out, F]`` parameter is not copied.
        b_dec: ``[D_out]`` (``[L, D_out]``), dtype of ``W_dec`` or float32.
        x: ``[.., D_in]``, with ``skip [D_out, D_in]``: adds the skip connection of a transcoder.
        prefixes: ascending dictionary sizes, e.g. ``[1024, 4096, 16384]``: returns the reconstruction from the features below each
            (Matryoshka SAEs; Bussmann et al. 2025, arXiv 2503.17547).
        backend: see ``fastsae.use_backend``.

    Returns:
        ``[.., D_out]`` in the dtype of ``W_dec``; ``[.., L, D_out]`` with several decoders; with ``prefixes`` a leading dimension of
        their number.

    Sums are in float32 (float64 stays) in slot order, in blocks of 16 slots, bias last, rounded once. Duplicate indices add. A slot of
    value 0 adds nothing (0 times an infinite weight is NaN, as in torch) and still receives ``dvalue = <grad, W_dec[index]>``.
    Gradients: latents' values, ``W_dec`` (dense, in the layout of ``W_dec``), ``b_dec``, ``x``, ``skip``. Deterministic, batch-invariant.
    Memory beyond the output: none that grows with ``B * K * D`` (the reference: temporaries of 64 MiB each); of padded latents a row for
    each 256 slots.

    Raises:
        TypeError: dtype or device of an argument. ValueError: a shape, or prefixes not ascending in ``1 .. F``.
        IndexError: an index outside ``0 .. F-1`` (on a GPU: a NaN row, raised by ``fastsae.check()``).
    """
    op = "decode"
    if x is None and skip is None and prefixes is None and backend is None and (quick := _quick(latents, W_dec, b_dec)) is not None:
        return quick
    values, indices, crow = _slots(op, latents)
    checks.tensor(op, "W_dec", W_dec, like=values)
    if W_dec.dim() == 3:
        meaning = f"[F={latents.n_features}, D_out] or [L, F={latents.n_features}, D_out]"
        checks.shape(op, "W_dec", W_dec, (None, latents.n_features, None), meaning)
        if W_dec.shape[0] == 0:
            raise ValueError(f"{op}: W_dec must hold at least one decoder, got {list(W_dec.shape)}")
        return _decode_many(latents, W_dec, b_dec, x=x, skip=skip, prefixes=prefixes, backend=backend)
    checks.shape(op, "W_dec", W_dec, (latents.n_features, None), f"[F={latents.n_features}, D_out]")
    b_dec = checks.vector(op, "b_dec", b_dec, W_dec.shape[1], W_dec, "D_out")
    rows, crow = _own_rows(latents, crow)
    if checks.autocasting(W_dec.device):
        values, W_dec, b_dec = checks.autocast(values, W_dec, b_dec)
    checks.same_dtype(op, "W_dec", W_dec, "latents.values", values)
    backend = preference(backend)
    if prefixes is None:
        y = decode_slots(values, indices, crow, W_dec, b_dec, backend)
    else:
        y = _decode_prefixes(values, indices, crow, W_dec, b_dec, _checked_prefixes(prefixes, latents.n_features), backend)
    y = y if rows is None else y[..., :rows, :]
    if len(batch := latents.batch_shape) != 1:
        y = y.reshape(*y.shape[:-2], *batch, W_dec.shape[1])
    if skip is not None or x is not None:
        y = y + _skip(op, x, skip, latents, W_dec).to(y.dtype)
    return y


def _quick(latents: Any, W: Any, b: Any) -> Tensor | None:
    """The result where the call is ``alone`` and asks for nothing special; None where the long way has to be gone."""
    if type(latents) is not TopKLatents or type(latents.n_features) is not int or not alone(latents.values, W, b):
        return None
    if W.shape[:1] != (latents.n_features,) or type(latents.indices) is not Tensor:
        return None
    quick: Any = getattr(DECODE.rows[0].run(), "quick", None)  # the compiled row's, unless it is audited
    return None if quick is None else quick(latents.values, latents.indices, W, b)


def _decode_prefixes(
    values: Tensor, indices: Tensor, crow: Tensor | None, W: Tensor, b: Tensor | None, prefixes: Sequence[int], backend: str | None
) -> Tensor:
    parts: list[Tensor] = []
    low = 0
    for high in prefixes:
        inside = (indices >= low) & (indices < high)
        part = decode_slots(torch.where(inside, values, 0), indices, crow, W, None if parts else b, backend)
        parts.append(parts[-1] + part if parts else part)
        low = high
    return torch.stack(parts)


def _decode_many(latents: Latents, W_dec: Tensor, b_dec: Tensor | None, *, x: Any, skip: Any, prefixes: Any, backend: str | None) -> Tensor:
    layers = W_dec.shape[0]
    if skip is not None or x is not None:
        raise ValueError("decode: skip is for one decoder W_dec [F, D_out], got W_dec with 3 dimensions")
    if b_dec is not None:
        checks.tensor("decode", "b_dec", b_dec, like=W_dec)
        checks.shape("decode", "b_dec", b_dec, (layers, W_dec.shape[2]), f"[L={layers}, D_out={W_dec.shape[2]}]")
    biases = [None] * layers if b_dec is None else b_dec.unbind(0)
    return torch.stack([decode(latents, W, b, prefixes=prefixes, backend=backend) for W, b in zip(W_dec.unbind(0), biases)], dim=-2)


def _checked_prefixes(prefixes: Any, n_features: int) -> list[int]:
    try:
        sizes = [operator.index(p) for p in prefixes]
    except TypeError:
        raise TypeError(f"decode: prefixes must be a sequence of int, got {prefixes!r}") from None
    if any(isinstance(p, bool) for p in prefixes):
        raise TypeError(f"decode: prefixes must be a sequence of int, got {prefixes!r}")
    if not sizes or sizes != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] > n_features:
        raise ValueError(f"decode: prefixes must ascend strictly within 1 .. {n_features}, got {sizes}")
    return sizes


def _skip(op: str, x: Any, skip: Any, latents: Latents, W_dec: Tensor) -> Tensor:
    if x is None or skip is None:
        raise ValueError(f"{op}: x and skip come together, got only {'x' if skip is None else 'skip'}")
    checks.tensor(op, "skip", skip, like=W_dec)
    checks.tensor(op, "x", x, like=W_dec)
    checks.same_dtype(op, "skip", skip, "x", x)
    if not checks.autocasting(W_dec.device):
        checks.same_dtype(op, "x", x, "W_dec", W_dec)
    if x.shape[:-1] != torch.Size(latents.batch_shape):
        raise ValueError(f"{op}: x must have the batch dimensions of latents {list(latents.batch_shape)}, got {list(x.shape[:-1])}")
    checks.shape(op, "skip", skip, (W_dec.shape[1], x.shape[-1]), f"[D_out={W_dec.shape[1]}, D_in={x.shape[-1]}]")
    x, skip = checks.autocast(x, skip)
    return product(x.reshape(-1, x.shape[-1]), skip.T).reshape(*x.shape[:-1], skip.shape[0])


def _slots(op: str, latents: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checked (values, indices, crow) with batch dimensions flattened."""
    if isinstance(latents, (TopKLatents, RaggedLatents)):
        checks.integer(op, "latents.n_features", latents.n_features, 0)
    if isinstance(latents, TopKLatents):
        values = checks.tensor(op, "latents.values", latents.values)
        indices = checks.tensor(op, "latents.indices", latents.indices, checks.INDICES, values)
        if values.shape != indices.shape or values.dim() == 0:
            raise ValueError(f"{op}: latents.indices must have the shape of latents.values {list(values.shape)}, got {list(indices.shape)}")
        if values.dim() == 2:
            return values, indices, None
        if values.dim() == 1:
            return values.unsqueeze(0), indices.unsqueeze(0), None
        return values.flatten(0, -2), indices.flatten(0, -2), None
    if isinstance(latents, RaggedLatents):
        values = checks.tensor(op, "latents.values", latents.values)
        col = checks.tensor(op, "latents.col", latents.col, checks.INDICES, values)
        crow = checks.tensor(op, "latents.crow", latents.crow, (torch.int64,), values)
        if values.dim() != 1 or col.shape != values.shape or crow.dim() != 1 or crow.shape[0] == 0:
            raise ValueError(
                f"{op}: ragged latents are values [nnz], col [nnz], crow [rows + 1], "
                f"got {list(values.shape)}, {list(col.shape)}, {list(crow.shape)}"
            )
        if math.prod(latents.batch_shape) != crow.shape[0] - 1:
            rows = crow.shape[0] - 1
            raise ValueError(f"{op}: latents.batch_shape must have the {rows} rows of latents.crow, got {list(latents.batch_shape)}")
        return values, col, crow
    raise TypeError(f"{op}: latents must be TopKLatents or RaggedLatents, got {type(latents).__name__}")


def _own_rows(latents: Latents, crow: Tensor | None) -> tuple[int | None, Tensor | None]:
    """(rows, crow) with rows of their own for the empty slots of padded latents; None rows where there are none."""
    if crow is None or not isinstance(latents, RaggedLatents) or not latents.padded:
        return None, crow
    return crow.shape[0] - 1, pointers(crow, latents.values.shape[0])


class DecodeGradients(NamedTuple):
    """Gradients of ``decode``: values in the shape of the latents' values, weight ``[F, D_out]``, bias ``[D_out]``."""

    values: Tensor
    weight: Tensor
    bias: Tensor


def decode_backward(
    grad: Tensor, latents: Latents, W_dec: Tensor, *, out: Tensor | None = None, backend: str | None = None
) -> DecodeGradients:
    """The gradients of ``decode(latents, W_dec, b_dec)`` without autograd, the weight's into a buffer of your own.

    Args:
        grad: ``[.., D_out]``, gradient of the reconstruction; dtype of ``W_dec``; may be expanded.
        latents, W_dec: as in ``decode``, one decoder.
        out: ``[F, D_out]``, any strides, overwritten with the gradient of ``W_dec``: saves allocating and clearing it at every step.

    Returns:
        ``DecodeGradients(values, weight, bias)``; ``weight`` is ``out`` where given. Deterministic. Raises as ``decode`` does.
    """
    op = "decode_backward"
    values, indices, crow = _slots(op, latents)
    checks.tensor(op, "W_dec", W_dec, (values.dtype,), values)
    checks.shape(op, "W_dec", W_dec, (latents.n_features, None), f"[F={latents.n_features}, D_out]")
    checks.tensor(op, "grad", grad, (W_dec.dtype,), W_dec)
    want = (*latents.batch_shape, W_dec.shape[1])
    checks.shape(op, "grad", grad, want, str(list(want)))
    if out is not None:
        checks.tensor(op, "out", out, (W_dec.dtype,), W_dec)
        checks.shape(op, "out", out, tuple(W_dec.shape), f"[F={latents.n_features}, D_out={W_dec.shape[1]}]")
        checks.writable(op, "out", out)
    rows = indices.shape[0] if crow is None else crow.shape[0] - 1
    flat = grad.reshape(rows, W_dec.shape[1])
    padded, crow = _own_rows(latents, crow)
    if padded is not None and crow is not None:
        flat = torch.nn.functional.pad(flat, (0, 0, 0, crow.shape[0] - 1 - rows))
    with torch.no_grad():
        needs = (True, False, False, True, True)
        dvalues, dweight, dbias = _gradients(flat, values, indices, crow, W_dec, W_dec.dtype, needs, preference(backend), out)
    return DecodeGradients(dvalues.reshape(latents.values.shape), dweight, dbias)  # pyright: ignore[reportArgumentType, reportOptionalMemberAccess]
