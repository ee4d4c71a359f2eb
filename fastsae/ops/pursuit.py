"""Matching pursuit: the features of a row one after the other, each subtracted from what those before it have left.

    r_0 = x        f_t = the feature of the largest score <r_t, W[f]>        c_t = relu(<r_t, W[f_t]>)        r_t+1 = r_t - c_t * W[f_t]

A composition of ``encode_topk`` with k = 1, which selects, and of the gradients of ``decode``, whose order of sums the coefficients have:
no ``[B, F]`` scores, and what does not depend on the batch or the threads there does not here. The residual is in float32 (float64 stays):
the product and the difference of each of its elements are rounded once. For half precision the selection reads it rounded to their dtype.

With ``PursuitWeights`` most selections read neither weights nor packed weights. A subtraction changes the score of feature j by
``c_t * <W[f_t], W[j]>``, whose rounded value is at hand. Kept scores S move with it, and E bounds how far any documented score can be from
its S; what is below ``max S - 2 E`` is not the largest. ``encode_topk`` decides between the features left, by their documented scores.

    u = 2^-24 (float64: 2^-53), g = n u / (1 - n u) for sums of n = D + 8 terms in any order, w the largest norm of a row of W
    documented score         E = e + g w |r|
    S by a product           e = g w |r|
    after a subtraction      e += |c| (q / 2 + g w^2) + 8 u w (|r| + |c| w)        q = max_j |<W[f], W[j]>| / 127, a row's step of rounding;
                             the last term: the rounding of r, of S and of c q
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae._core import checks
from fastsae.dispatch import preference, then_any
from fastsae.latents import RaggedLatents
from fastsae.ops.decode import DECODE, DECODE_DVALUES, weight_gradient
from fastsae.ops.encode import ENCODE_TOPK, encoder_inputs
from fastsae.packed import PackedWeights
from fastsae.reference import accumulator, chunks, product, tracks

MOST = 16
"""Candidates of a row up to which their scores are what decides; with more, all scores are."""


class Rule(NamedTuple):
    """How a pursuit goes on; as the arguments of ``encode_pursuit``."""

    k: int
    tolerance: float = 0.0
    absolute: bool = False
    orthogonal: bool = False
    stop_on_repeat: bool = True


class PursuitWeights(PackedWeights):
    """A dictionary that does not change, with the rounded products of its rows with each other: what makes ``encode_pursuit`` fast.

    A handle as ``fastsae.pack`` makes, accepted by the encoders too. It takes ``F * F`` bytes more, and to make it the work of scoring F
    rows, which is the price of many calls. Results are the same bits as with the weights. Half precision has no such products, nor a gain.

    Args:
        W: ``[F, D]``, as for ``fastsae.pack``.

    Raises: as ``fastsae.pack``.
    """

    def refresh(self) -> PursuitWeights:
        super().refresh()
        W = self.weight.detach().to(accumulator(self.weight.dtype))
        self.squares = _dots(W, W, None)
        F = W.shape[0] if W.dtype is self.weight.dtype else 0
        self.rounded = torch.empty(F, F, dtype=torch.int8, device=W.device)
        """``[F, F]``: products in steps of their row's; 0 on the diagonal."""
        self.steps = W.new_empty(F)
        for rows in chunks(F, F):
            products = product(W[rows], W.T)
            products.diagonal(rows.start).zero_()
            self.steps[rows] = products.abs().amax(1).clamp_min(torch.finfo(W.dtype).tiny) / 127
            self.rounded[rows] = products.div_(self.steps[rows, None]).round_().to(torch.int8)
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form and of the products."""
        return super().nbytes + self.rounded.numel()


# ---------------------------------------------------------------- forward


def _dots(a: Tensor, b: Tensor, backend: str | None) -> Tensor:
    """``[rows]``: products of row r of ``a`` and row r of ``b``, in the order of ``decode_dvalues``."""
    rows = torch.arange(a.shape[0], device=a.device).unsqueeze(1)
    return DECODE_DVALUES(a, rows, None, b, backend=backend)[:, 0]


class _Kept:
    """Scores of the live rows, kept beside their residuals; see the module."""

    def __init__(self, r: Tensor, W: Tensor, weights: PursuitWeights, absolute: bool, backend: str | None):
        self.weights, self.absolute, self.backend = weights, absolute, backend
        self.unit = torch.finfo(r.dtype).eps / 2
        terms = (W.shape[1] + 8) * self.unit
        self.gamma, self.w = terms / (1 - terms), weights.squares.amax().sqrt() * (1 + 2 * terms)
        self.scores, self.norm = product(r, W.T), self._norm(r)
        self.error = self.gamma * self.w * self.norm
        self.block = next(width for width in range(min(128, W.shape[0]), 0, -1) if W.shape[0] % width == 0)
        self.rounded, self.wide = torch.empty_like(self.scores, dtype=torch.int8), torch.empty_like(self.scores)  # fresh memory is dear

    def _norm(self, r: Tensor) -> Tensor:
        return _dots(r, r, self.backend).sqrt() * (1 + 2 * self.gamma)

    def subtract(self, r: Tensor, f: Tensor, c: Tensor) -> None:
        w, step, size = self.w, self.weights.steps[f], c.abs()
        torch.index_select(self.weights.rounded, 0, f, out=self.rounded)
        self.scores.addcmul_(self.wide.copy_(self.rounded), (c * step).unsqueeze(1), value=-1)
        self.scores[torch.arange(f.shape[0], device=f.device), f] -= c * self.weights.squares[f]
        self.norm = self._norm(r)
        self.error += size * (step / 2 + self.gamma * w * w) + 8 * self.unit * w * (self.norm + size * w)

    def keep(self, live: Tensor) -> None:
        self.scores, self.norm, self.error = self.scores[live], self.norm[live], self.error[live]
        self.rounded, self.wide = self.rounded[: live.shape[0]], self.wide[: live.shape[0]]

    def best(self, select: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        """``[rows]``: the feature of each row's largest documented score; ``select(rows, features)`` looks itself."""
        s = (torch.abs(self.scores, out=self.wide) if self.absolute else self.scores).unflatten(1, (-1, self.block))
        sound = _in_range(self.norm) & _in_range(self.w)  # no squares beyond what float32 holds
        bound = torch.where(sound, self.error + self.gamma * self.w * self.norm, torch.inf)
        tops = s.amax(2)
        least = (tops.amax(1) - 2.01 * bound).unsqueeze(1)
        row, block = (tops >= least).nonzero(as_tuple=True)
        place, inside = (s[row, block] >= least[row]).nonzero(as_tuple=True)
        row, feature = row[place], block[place] * self.block + inside
        count = torch.bincount(row, minlength=s.shape[0])
        chosen = torch.empty_like(count)
        chosen[row] = feature  # of several, any: replaced below
        few = (count > 1) & (count <= MOST)
        if few.any():
            chosen[few] = select(few, feature[few[row]].unique())
        rest = (count == 0) | (count > MOST)  # 0: not finite
        if rest.any():
            chosen[rest] = select(rest, None)
        return chosen


def _in_range(size: Tensor) -> Tensor:
    return (size > 2**-40) & (size < 2**40)


class _Basis:
    """Orthogonal matching pursuit: the atoms of each row made orthonormal, ``atom_t = sum_s R[s, t] q_s``, by Gram and Schmidt, twice."""

    def __init__(self, x: Tensor, k: int, backend: str | None):
        self.q, self.R = x.new_zeros(x.shape[0] * k, x.shape[1]), torch.eye(k, dtype=x.dtype, device=x.device).repeat(x.shape[0], 1, 1)
        self.z, self.backend = x.new_zeros(x.shape[0], k), backend

    def fit(self, r: Tensor, live: Tensor, t: int, atoms: Tensor, takes: Tensor) -> tuple[Tensor, Tensor]:
        """What the atoms leave of the residuals, and which rows took theirs: not those in the span of what the row has."""
        before = live.unsqueeze(1) * self.z.shape[1] + torch.arange(t + 1, device=live.device)
        for _ in range(2 if t else 0):
            part = DECODE_DVALUES(atoms, before[:, :t], None, self.q, backend=self.backend)
            atoms = atoms - DECODE(part, before[:, :t], None, self.q, None, backend=self.backend)
            self.R[live, :t, t] += part
        norm = _dots(atoms, atoms, self.backend).sqrt()
        takes = takes & ~(norm <= 64 * torch.finfo(r.dtype).eps)
        q = torch.where(takes.unsqueeze(1), atoms / norm.unsqueeze(1), 0)
        z = torch.where(takes, _dots(r, q, self.backend), 0)
        self.q[before[:, t]], self.R[live, t, t], self.z[live, t] = q, torch.where(takes, norm, 1), z
        return r - z.unsqueeze(1) * q, takes

    def coefficients(self) -> Tensor:
        """``[rows, k]``: R c = z, from the last on."""
        z = self.z.clone()
        for t in reversed(range(z.shape[1])):
            z[:, t] /= self.R[:, t, t]
            z[:, :t] -= self.R[:, :t, t] * z[:, t : t + 1]
        return z


def pursue(x: Tensor, W: Tensor, weights: PackedWeights | None, rule: Rule, backend: str | None) -> tuple[Tensor, ...]:
    """Of every row ``[rows, steps made]``: totals of features, in the step at which each was first chosen; the feature of each step (-1:
    none), its coefficient, and the step at which its feature was first chosen."""
    kept = isinstance(weights, PursuitWeights) and not rule.orthogonal and x.dtype is weights.steps.dtype
    cost = rule.k * x.shape[1] if rule.orthogonal else 16 * W.shape[0] if kept else 0
    parts = [_pursue(x[rows], W, weights, rule, kept, backend) for rows in chunks(max(x.shape[0], 1), cost, least=64)]
    whole = parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts)))
    made = int((whole[1] >= 0).any(0).sum())
    return tuple(part[:, :made] for part in whole)  # no step that no row made


def _pursue(x: Tensor, W: Tensor, weights: PackedWeights | None, rule: Rule, keeps: bool, backend: str | None) -> tuple[Tensor, ...]:
    k, then = rule.k, then_any(backend)
    r = x.to(accumulator(x.dtype))
    totals, coefficients = r.new_zeros(2, r.shape[0], k)
    live, steps = torch.arange(r.shape[0], device=r.device), torch.arange(k, device=r.device)
    index, slot = torch.full_like(totals, -1, dtype=torch.int64), steps.repeat(r.shape[0], 1)
    basis = _Basis(r, k, then) if rule.orthogonal else None
    kept = _Kept(r, W, weights, rule.absolute, then) if keeps and isinstance(weights, PursuitWeights) else None
    packed = None if weights is None else weights.words("encode_pursuit")

    def select(rows: Tensor | slice, features: Tensor | None) -> Tensor:
        given = r[rows].to(x.dtype), W, None, None, None, features, packed if features is None else None
        return ENCODE_TOPK(*given, 1, False, rule.absolute, backend=backend)[1][:, 0]

    for t in range(k):
        if live.numel() == 0:
            break
        f = select(slice(None), None) if kept is None else kept.best(select)
        atoms = W[f].to(r.dtype)
        c = _dots(r, atoms, then)
        c = c if rule.absolute else c.relu()
        first = torch.where(index[live] == f.unsqueeze(1), steps, t).amin(1)
        takes = c != 0
        stop = ~takes | c.isnan()
        if basis is not None:
            r, takes = basis.fit(r, live, t, atoms, takes & (first == t))
            stop |= ~takes
        else:
            totals[live, first] += c
            r = r - c.unsqueeze(1) * atoms
            if rule.stop_on_repeat:
                stop |= first < t
        index[live, t] = torch.where(takes, f, -1)
        coefficients[live, t], slot[live, t] = c, first
        if rule.tolerance > 0:
            stop |= _dots(r, r, then).sqrt() < rule.tolerance
        if kept is not None:
            kept.subtract(r, f, c)
        if stop.any():
            go = (~stop).nonzero()[:, 0]
            live, r = live[go], r[go]
            if kept is not None:
                kept.keep(go)
    if basis is not None:
        totals = torch.where(index >= 0, basis.coefficients(), 0)
        return totals, index, totals, slot
    return totals, index, coefficients, slot


# ---------------------------------------------------------------- backward


class _Pursue(torch.autograd.Function):
    """The choices are given. A row's coefficients solve ``M c = atoms x``: of a pursuit ``M = I + (the products of its atoms with those
    before them)``, of an orthogonal one all their products. With ``M^T s = dL/dc``, ``dx = s atoms``, and for ``s_i c_j`` of each product
    that M holds both of its atoms get their share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, weights: PackedWeights | None, rule: Rule, backend: str | None) -> tuple[Tensor, Tensor]:
        totals, index, coefficients, slot = pursue(x, W, weights, rule, backend)
        ctx.mark_non_differentiable(index)
        ctx.save_for_backward(x, W, index, coefficients, slot)
        ctx.orthogonal, ctx.backend = rule.orthogonal, then_any(backend)
        return totals, index

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W, index, c, slot = ctx.saved_tensors
        passes = (index >= 0) & ~c.isnan() & (c != 0)
        f, c = index.clamp_min(0), torch.where(passes, c, 0)
        atoms = torch.where(passes.unsqueeze(2), W[f].to(c.dtype), 0)
        M = product(atoms, atoms.mT)
        g = torch.where(passes, grad.gather(1, slot), 0).unsqueeze(2)
        again = torch.is_grad_enabled()  # for derivatives of these derivatives
        M = M + torch.diag_embed((~passes).to(c.dtype)) if ctx.orthogonal else M.tril(-1)
        if ctx.orthogonal:
            s = torch.linalg.solve(M, g)
        else:
            s = torch.linalg.solve_triangular(M.mT, g, upper=True, unitriangular=True)
        if again:
            scores = product(atoms, x.to(c.dtype).unsqueeze(2))
            if ctx.orthogonal:
                c = torch.linalg.solve(M, scores)[:, :, 0]
            else:
                c = torch.linalg.solve_triangular(M, scores, upper=False, unitriangular=True)[:, :, 0]
        share = s * c.unsqueeze(1)
        share = share if ctx.orthogonal else share.tril(-1)
        dx = product(s.mT, atoms)[:, 0].to(x.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None, None
        rows = torch.where(passes.unsqueeze(2), s * x.to(c.dtype).unsqueeze(1), 0) - product(share + share.mT, atoms)
        of, rows = f.reshape(-1, 1), rows.flatten(0, 1).to(W.dtype)
        if again:
            return dx, torch.zeros_like(W).index_add(0, of[:, 0], rows), None, None, None
        dW = weight_gradient(rows.new_ones(()).expand(of.shape).contiguous(), of, None, rows, W, ctx.backend)
        return dx, dW, None, None, None


# ---------------------------------------------------------------- public


def pursuit_latents(x: Tensor, W: Tensor, weights: PackedWeights | None, rule: Rule, backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """``(values, crow, col)`` of checked rows ``[rows, D]``; W as it is, of any norms."""
    if tracks("encode_pursuit", x, W):
        totals, index = _Pursue.apply(x, W, weights, rule, backend)  # pyright: ignore[reportGeneralTypeIssues]
    else:
        totals, index, *_ = pursue(x, W, weights, rule, backend)
    fires = totals.detach() != 0
    order = index.masked_fill(~fires, W.shape[0]).argsort(dim=1, stable=True)
    fires = fires.gather(1, order)
    crow = torch.nn.functional.pad(fires.sum(1).cumsum(0), (1, 0))
    return totals.gather(1, order)[fires].to(x.dtype), crow, index.gather(1, order)[fires]


def encode_pursuit(
    x: Tensor,
    W: Tensor | PackedWeights,
    *,
    k: int,
    tolerance: float | None = None,
    absolute: bool = False,
    orthogonal: bool = False,
    stop_on_repeat: bool = True,
    index_dtype: torch.dtype = torch.int64,
    backend: str | None = None,
) -> RaggedLatents:
    """Matching pursuit: up to k times the feature of the largest score of what is left of a row, subtracted with that score.

    Args:
        x: ``[.., D]``; float32, bfloat16, float16 or float64; any strides. Its mean or a decoder's bias is to be subtracted before.
        W: ``[F, D]``, dtype of ``x``, any strides; rows of norm 1, within 1e-3 (half precision 1e-2); or a handle of ``fastsae.pack``; or a
            ``PursuitWeights``, which pays where the same weights encode many rows.
        k: steps at most, at least 1.
        tolerance: a row ends once the norm of its residual is below it, looked at after each step; above 0; None: it does not.
        absolute: the largest magnitude, with its sign, rather than the largest score, which has to be above 0.
        orthogonal: orthogonal matching pursuit: after each step the coefficients are those of least squares on the features chosen; they
            may be below 0. A feature chosen again, or one in the span of the others, ends the row instead.
        stop_on_repeat: whether a row ends with the first step that chooses a feature again, which adds to its value; else it goes on.
        index_dtype: torch.int64 or torch.int32.
        backend: see ``fastsae.use_backend``.

    Returns:
        ``RaggedLatents``: the features chosen, columns ascending, values in the dtype of ``x``.

    A row also ends where no score is above 0 (``absolute``: all are 0), or with a coefficient that is NaN, which is kept (with
    ``orthogonal`` the row's values are then NaN). Each selection is the one of ``encode_topk`` with k = 1 of the residual, ties and NaN
    included; the coefficient is that score with the sums of ``decode``'s gradients. Deterministic, the same for every batch, number of
    threads and kind of W. Gradients (x and W): of the values with the choices as they are, through all earlier residuals, as autograd of
    the formula gives, of any order; never through NaN. Memory: the residuals, and with ``orthogonal``, or in the backward, ``k``
    rows of D for each row (the first in chunks of 64 MiB); with ``PursuitWeights`` 64 rows of scores or 4 MiB. The host waits once a step.

    Raises: TypeError: dtype or device. ValueError: shape, k, tolerance, or a row of W whose norm is not 1.

    Source: Mallat & Zhang 1993, "Matching pursuits with time-frequency dictionaries"; Pati, Rezaiifar & Krishnaprasad 1993, "Orthogonal
    matching pursuit"; as an SAE: Costa et al. 2025 (arXiv 2506.03093).
    """
    op = "encode_pursuit"
    batch, flat, weight, *_ = encoder_inputs(op, x, W, "W")
    k = checks.integer(op, "k", k, 1)
    below = 0.0 if tolerance is None else checks.number(op, "tolerance", tolerance)
    rule = Rule(k, below, *(checks.flag(op, *given) for given in (("absolute", absolute), ("orthogonal", orthogonal))))
    rule = rule._replace(stop_on_repeat=checks.flag(op, "stop_on_repeat", stop_on_repeat))
    dtype = checks.index_dtype(op, index_dtype, weight.shape[0])
    if not weight.shape[0]:
        raise ValueError(f"{op}: W must have at least one row, got {list(weight.shape)}")
    norms = torch.linalg.vector_norm(weight.detach(), dim=1, dtype=accumulator(weight.dtype))
    off = (norms - 1).abs() > (1e-3 if weight.dtype in (torch.float32, torch.float64) else 1e-2)
    if off.any():
        row = int(off.nonzero()[0])
        raise ValueError(f"{op}: W must have rows of norm 1, got norm {float(norms[row]):.6g} in row {row}; divide it by its norms first")
    weights = W if isinstance(W, PackedWeights) and weight is W.weight else None  # not where autocast rounds them
    values, crow, col = pursuit_latents(flat, weight, weights, rule, preference(backend))
    return RaggedLatents(values, crow, col if dtype is torch.int64 else col.to(dtype), weight.shape[0], tuple(batch))
