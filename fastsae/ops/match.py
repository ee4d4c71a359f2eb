"""Top-k cosine matching of two dictionaries without the ``[N, M]`` matrix; MMCS is in ``fastsae.compare``.

``match_cosine`` finds the k nearest rows of ``b`` for every row of ``a``; ``match_pair`` does both directions and the most negative
match in one pass over the tiles; ``fastsae.compare.match`` answers what people ask of two dictionaries with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae._core import checks, seeds
from fastsae._core.norms import unit_rows
from fastsae.dispatch import Op, preference, then_any
from fastsae.ops.decode import decode_slots, weight_gradient
from fastsae.reference import Best, accumulator, chunks, drawn, product, tracks

# ---------------------------------------------------------------- references


def normalise(v: Tensor, eps: float) -> Tensor:
    """``fl(v / max(|v|, eps))`` row by row, in the accumulation dtype."""
    return unit_rows(v.to(accumulator(v.dtype)), eps)[0]


def _similarity_tiles(a: Tensor, b: Tensor, eps: float) -> Iterator[tuple[slice, slice, Tensor]]:
    unit_a, unit_b = normalise(a, eps), normalise(b, eps)
    column_tiles = list(chunks(b.shape[0], min(a.shape[0], 1024)))
    step = column_tiles[0].stop if column_tiles else 0  # the same row tiles beside every column tile, the last and narrower one too
    for columns in column_tiles:
        for rows in chunks(a.shape[0], step):
            yield rows, columns, product(unit_a[rows], unit_b[columns].T)


def match_cosine_reference(a: Tensor, b: Tensor, k: int, absolute: bool, exclude_self: bool, eps: float) -> tuple[Tensor, Tensor]:
    best = Best(k, absolute)
    for rows, columns, s in _similarity_tiles(a, b, eps):
        same = None
        if exclude_self:
            row, column = (torch.arange(part.start, part.stop, device=s.device) for part in (rows, columns))
            same = row.unsqueeze(1) == column
        best.add(rows.start, columns.start, s, same)
    return best.result(a.device, a.dtype)


def match_pair_reference(a: Tensor, b: Tensor, k_ab: int, k_ba: int, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(similarity, index) a to b ``[N, k_ab]``; b to a ``[M, k_ba]``; the most negative match of each row of a ``[N]``."""
    forward, backward, negative = Best(k_ab), Best(k_ba), Best(1)
    for rows, columns, s in _similarity_tiles(a, b, eps):
        forward.add(rows.start, columns.start, s)
        backward.add(columns.start, rows.start, s.T)
        negative.add(rows.start, columns.start, -s)
    where = a.device, a.dtype
    low, low_index = negative.result(*where)
    return *forward.result(*where), *backward.result(*where), -low[:, 0], low_index[:, 0]


# ---------------------------------------------------------------- samples and checks


def _dictionaries(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    normal = drawn(device, dtype, generator)
    for n, m, width in ((7, 9, 16), (1, 1, 1), (0, 4, 3), (65, 130, 33), (40, 33, 128)):
        yield normal(n, width), normal(m, width)
    yield normal(12, 20).T, normal(12, 31).T
    a = normal(10, 8)
    a[3] = 0
    yield a, torch.cat([-a, a, a[:2] * 20])
    limits = torch.finfo(dtype)  # norms and squares that overflow or vanish in the dtype
    sizes = [limits.max / 8, limits.max**0.5, limits.tiny**0.4, limits.tiny**0.5, 8 * limits.tiny, 1e-8, 0.5, limits.max**0.4]
    b = normal(8, 8).clamp(-4, 4) * torch.tensor(sizes, dtype=torch.float64, device="cpu").to(device=device, dtype=dtype).unsqueeze(1)
    yield b, torch.cat([b.flip(0), a])


def _pair(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two moderate dictionaries that share half of their features up to noise."""
    a = seeds.normal(generator, (4096, 256))
    b = torch.cat([a[:2048] + seeds.normal(generator, (2048, 256)), seeds.normal(generator, (2048, 256))])
    return a.to(device=device, dtype=dtype), b.to(device=device, dtype=dtype)


def _match_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for a, b in _dictionaries(device, dtype, generator):
        for k in sorted({1, min(5, b.shape[0]), b.shape[0]}):
            yield a, b, k, False, False, 1e-8
            yield a, b, k, True, False, 1e-8
        if b.shape[0] > 1:
            yield b, b, min(4, b.shape[0] - 1), False, True, 1e-8
            yield b, b, b.shape[0] - 1, True, True, 1e-8


def _pair_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for a, b in _dictionaries(device, dtype, generator):
        if a.shape[0]:
            yield a, b, 1, 1, 1e-8
            yield a, b, min(3, b.shape[0]), min(2, a.shape[0]), 1e-8


def _similarity_score(testing: Any, a: Tensor, b: Tensor, eps: float) -> Any:
    wide = accumulator(a.dtype)
    unit_a, unit_b = normalise(a.double(), eps), normalise(b.double(), eps)
    exact, size = unit_a @ unit_b.T, unit_a.abs() @ unit_b.abs().T
    plain = product(normalise(a, eps), normalise(b, eps).T).double()
    unit, terms = torch.finfo(wide).eps / 2, a.shape[1] + 3
    finite = exact.isfinite() & plain.isfinite()
    exact = torch.where(finite, exact, plain)
    worst = float(((plain - exact).abs() / (size + torch.finfo(wide).tiny))[finite].max()) if bool(finite.any()) else 0.0
    out = torch.finfo(a.dtype)
    rounding = exact.abs() * out.eps / 2 + out.smallest_normal * out.eps if a.dtype != wide else 0.0
    tolerance = (2 * worst + 4 * unit) * size + terms * torch.finfo(wide).tiny + rounding
    # Norms, quotients and products round: 3 (D + 3) units of the magnitudes on each side of a comparison.
    band = 6 * terms * unit * size + 2 * terms * torch.finfo(wide).tiny
    return testing.Score(exact, torch.where(finite, tolerance, 0.0), torch.where(finite, band, 0.0), unit)


def _check_match(testing: Any, args: tuple[Any, ...], result: Any) -> float:
    a, b, k, absolute, exclude_self, eps = args
    score = _similarity_score(testing, a, b, eps)
    similarity, index = result
    if absolute:
        score, (similarity, index) = testing.by_magnitude(score, (similarity, index))
    if exclude_self:
        score.exact.fill_diagonal_(-torch.inf)
    return testing.check_topk(score, None, k, False, (similarity, index), a.dtype)


def _check_pair(testing: Any, args: tuple[Any, ...], result: Any) -> float:
    a, b, k_ab, k_ba, eps = args
    score = _similarity_score(testing, a, b, eps)
    turned = testing.Score(score.exact.T, score.tolerance.T, score.band.T, score.unit)
    negative = testing.Score(-score.exact, score.tolerance, score.band, score.unit)
    return max(
        testing.check_topk(score, None, k_ab, False, result[0:2], a.dtype),
        testing.check_topk(turned, None, k_ba, False, result[2:4], b.dtype),
        testing.check_topk(negative, None, 1, False, (-result[4].unsqueeze(1), result[5].unsqueeze(1)), a.dtype),
    )


# ---------------------------------------------------------------- rows


def _fake_match(a: Tensor, b: Tensor, k: int, *_: Any) -> tuple[Tensor, Tensor]:
    return a.new_empty((a.shape[0], k)), a.new_empty((a.shape[0], k), dtype=torch.int64)


def _fake_pair(a: Tensor, b: Tensor, k_ab: int, k_ba: int, eps: float) -> tuple[Tensor, ...]:
    return *_fake_match(a, b, k_ab), *_fake_match(b, a, k_ba), a.new_empty(a.shape[0]), a.new_empty(a.shape[0], dtype=torch.int64)


MATCH_COSINE = Op(
    "match_cosine(Tensor a, Tensor b, SymInt k, bool absolute, bool exclude_self, float eps) -> (Tensor, Tensor)",
    match_cosine_reference,
    fake=_fake_match,
    samples=_match_samples,
    check=_check_match,
    workload=lambda *where: (*_pair(*where), 1, False, False, 1e-8),
)
MATCH_PAIR = Op(
    "match_pair(Tensor a, Tensor b, SymInt k_ab, SymInt k_ba, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    match_pair_reference,
    fake=_fake_pair,
    samples=_pair_samples,
    check=_check_pair,
    workload=lambda *where: (*_pair(*where), 1, 1, 1e-8),
)

for _op in (MATCH_COSINE, MATCH_PAIR):
    _op.row("cpu", f"fastsae.native.match:{_op.name}", f"fastsae.native.match:refuses_{_op.name}")
    _op.row("triton", f"fastsae.kernels.match:{_op.name}", "fastsae.reference:triton_refuses_scores")

# ---------------------------------------------------------------- backward


class _MatchCosine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, k: int, absolute: bool, exclude_self: bool, eps: float, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        similarity, index = MATCH_COSINE(a, b, k, absolute, exclude_self, eps, backend=backend)
        ctx.mark_non_differentiable(index)
        ctx.save_for_backward(a, b, index)
        ctx.eps, ctx.backend = eps, then_any(backend)
        return similarity, index

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, b, index = ctx.saved_tensors
        (unit_a, *norms_a), (unit_b, *norms_b) = (unit_rows(v.to(accumulator(v.dtype)), ctx.eps) for v in (a, b))
        grad = grad.to(unit_a.dtype)
        da = db = None
        if ctx.needs_input_grad[0]:
            da = _through_norm(unit_a, decode_slots(grad, index, None, unit_b, None, ctx.backend), *norms_a).to(a.dtype)
        if ctx.needs_input_grad[1]:
            db = _through_norm(unit_b, weight_gradient(grad, index, None, unit_a, unit_b, ctx.backend), *norms_b).to(b.dtype)
        return da, db, None, None, None, None, None


def _through_norm(unit: Tensor, grad: Tensor, divisor: Tensor, norm: Tensor, factor: Tensor) -> Tensor:
    along = (unit * grad).sum(1, keepdim=True)
    return torch.where(norm >= divisor, grad - unit * along, grad) / divisor * factor


# ---------------------------------------------------------------- public


class Matches(NamedTuple):
    """The k nearest: ``similarity [N, k]`` descending, ``index [N, k]`` int64."""

    similarity: Tensor
    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  (hides tuple.index: the word is public)


def check_dictionaries(op: str, a: Any, b: Any, names: tuple[str, str] = ("a", "b")) -> None:
    checks.tensor(op, names[0], a)
    checks.tensor(op, names[1], b, like=a)
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        hint = ""
        if a.dim() == 3 or b.dim() == 3:
            hint = " (a stack of several dictionaries: give one of them, or all to mmcs_matrix)"
        elif a.dim() == b.dim() == 2 and (a.shape[0] == b.shape[0] or a.shape[1] == b.shape[0] or a.shape[0] == b.shape[1]):
            hint = " (one of them looks like [D, F]: dictionaries are feature-major, pass W.T)"
        raise ValueError(
            f"{op}: {names[0]} [N, D] and {names[1]} [M, D] must have the same D, got {list(a.shape)} and {list(b.shape)}{hint}"
        )


def checked_eps(op: str, eps: Any, like: Tensor) -> float:
    eps, limits = float(checks.number(op, "eps", eps)), torch.finfo(accumulator(like.dtype))
    if eps > limits.max:
        raise ValueError(f"{op}: eps must be at most {limits.max:g}, got {eps}")
    return max(eps, limits.smallest_normal * limits.eps)  # only a row of zeros has a smaller norm


def match_cosine(
    a: Tensor, b: Tensor, *, k: int = 1, absolute: bool = False, exclude_self: bool = False, eps: float = 1e-8, backend: str | None = None
) -> Matches:
    """The k rows of ``b`` with the largest cosine similarity to each row of ``a``.

    Args:
        a: ``[N, D]``; float32, bfloat16, float16 or float64; any strides.
        b: ``[M, D]``, dtype of ``a``.
        k: ``1 <= k <= M`` (``M - 1`` with ``exclude_self``).
        absolute: select by magnitude and keep the sign.
        exclude_self: leave out row i of ``b`` for row i of ``a`` (the self-similarity of one dictionary).
        eps: smallest norm divided by, above 0: a zero vector has similarity 0 to everything.
        backend: see ``fastsae.use_backend``.

    Returns:
        ``Matches(similarity, index)``: ``[N, k]`` in the dtype of ``a``, descending, in -1 .. 1 up to rounding; int64.

    The similarity is the float32 (float64 for float64) product of ``fl(v / max(|v|, eps))`` with the true norm of every finite row, also
    where its square would overflow or vanish; equal ones: lower index first; NaN ranks highest. Gradients flow to ``a`` and ``b`` through
    the matches. Deterministic. Memory: the unit rows and temporaries of 64 MiB each in the reference, the unit rows (three times
    those of one side while they are made) and the workspace of ``encode_topk`` in the Triton row; nothing grows with ``N * M``.

    Raises: TypeError: dtype or device. ValueError: shape, k or eps out of range.
    """
    op = "match_cosine"
    check_dictionaries(op, a, b)
    checks.same_dtype(op, "b", b, "a", a)
    checks.flag(op, "absolute", absolute)
    limit = b.shape[0] - checks.flag(op, "exclude_self", exclude_self)
    k = checks.integer(op, "k", k, 1, limit, "M - 1 with exclude_self" if exclude_self else f"M={b.shape[0]}")
    eps = checked_eps(op, eps, a)
    backend = preference(backend)
    if tracks(op, a, b):
        similarity, index = _MatchCosine.apply(a, b, k, absolute, exclude_self, eps, backend)  # pyright: ignore[reportGeneralTypeIssues]
    else:
        similarity, index = MATCH_COSINE(a, b, k, absolute, exclude_self, eps, backend=backend)
    return Matches(similarity, index)
