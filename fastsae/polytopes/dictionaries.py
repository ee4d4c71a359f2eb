"""Polytopes of a dictionary: where the set of active features changes along a segment, exactly.

Along a segment every score is a line. A feature cut by a threshold changes once, where its line crosses it. Of a top-k the k-th largest
line decides (the k-level of an arrangement of lines): few features ever reach it, which lists of the encoder at three points of the segment
prove. The others are dropped, and the changes among the rest are walked from one to the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F_

from fastsae._core import checks
from fastsae._core.precision import full_precision
from fastsae.ops.encode import encode_threshold, encode_topk
from fastsae.reference import chunks

_PARTS = 32
"""Parts of a segment, each with candidates of its own; even: a list stands in the middle."""
_LISTED, _LEAST = (5, 20), 64
"""The lists at the three points hold 5 k features, 64 at least; where that proves too little, 20 k, and then all."""
_NUMBERS = 8
"""Numbers that the walk holds a candidate and part."""


class DictionaryCrossings(NamedTuple):
    """Changes of the set of active features along segments, segment after segment, in the order of ``t``.

    Attributes:
        t: ``[n]`` float64, positions, 0 at p and 1 at q. leaves, enters: ``[n]`` int64, the feature that goes and the one that comes; -1
            where none does. offsets: ``[S + 1]`` int64; segment s has the entries ``offsets[s] : offsets[s + 1]``.
    """

    t: Tensor
    leaves: Tensor
    enters: Tensor
    offsets: Tensor

    @property
    def counts(self) -> Tensor:
        """``[S]`` int64: changes along each segment."""
        return self.offsets.diff()

    @property
    def segment(self) -> Tensor:
        """``[n]`` int64: the segment of each entry."""
        return torch.arange(self.counts.shape[0], device=self.t.device).repeat_interleave(self.counts, output_size=self.t.shape[0])


class Planes(NamedTuple):
    """The scores ``W (x - b_pre) + b`` of an SAE; ``threshold [F]`` (float64) is what they must be above, None for a top-k. ``longest``: of
    the rows of W."""

    W: Tensor
    b: Tensor
    b_pre: Tensor | None
    threshold: Tensor | None
    longest: float

    def lines(self, p: Tensor, q: Tensor, features: Sequence[Tensor] | None = None) -> Tensor:
        """``[2, n]`` float64: scores at p and q of some features of each segment, of all where None, one segment after the other."""
        ends = torch.stack([p, q]) - (0 if self.b_pre is None else self.b_pre.double())
        if features is None:
            parts = chunks(self.W.shape[0], max(2 * p.shape[0], self.W.shape[1]))
            return (torch.cat([ends @ self.W[part].double().T for part in parts], 2) + self.b.double()).flatten(1)
        found = [pair @ self.W.index_select(0, some).double().T + self.b[some] for some, pair in zip(features, ends.unbind(1))]
        return torch.cat(found, 1)

    def slack(self, x: Tensor) -> Tensor:
        """``[rows]``: what a score of the encoder, whose sums are in float32, is at most away from ours."""
        wide = self.W.dtype == torch.float64
        error = (x.shape[1] + 8) * torch.finfo(torch.float64 if wide else torch.float32).eps + 4 * torch.finfo(self.W.dtype).eps
        length = x.norm(dim=1) + (0 if self.b_pre is None else self.b_pre.double().norm())
        return error * (length * self.longest + 2 * self.b.double().abs().amax())


def planes_of(op: str, wanted: str, sae: Any, kinds: tuple[str, ...], **points: Any) -> Planes:
    """Of an SAE with an activation of these kinds and inputs ``[n, D]``; TypeError or ValueError ("{op}: {wanted} an SAE") otherwise."""
    kind = type(getattr(sae, "activation", None)).__name__
    if kind not in kinds or not isinstance(W := getattr(sae, "W_enc", None), Tensor) or W.dim() != 2:
        *names, last = kinds
        raise ValueError(
            f"{op}: {wanted} an SAE with {', '.join(names)} or {last} (at its running threshold), got {kind} in {type(sae).__name__}"
        )
    if getattr(getattr(sae, "world", None), "virtual", 1) > 1:
        raise ValueError(f"{op}: the SAE is sharded, this process holds a part of it: fastsae.distributed.gathered(sae) is the whole one")
    W, b = W.detach(), sae.b_enc.detach()
    for name, value in points.items():
        checks.tensor(op, name, value, like=W)
        if value.dim() != 2 or value.shape[-1] != W.shape[1]:
            raise ValueError(f"{op}: {name} must have two dimensions, [.., D={W.shape[1]}], got {list(value.shape)}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{op}: {name} must be finite, got NaN or infinity")
    if bool((getattr(sae, "scale", b) != 1).any()) and hasattr(sae, "scale"):
        raise ValueError(f"{op}: the SAE must be in the units of the data: call its fold_()")
    if (rows := getattr(sae, "normalise_rows", None)) is not None:
        raise ValueError(f"{op}: along a segment the scores of an SAE with normalise_rows={rows!r} are no straight lines")
    longest = 0.0
    for dtype in (torch.float32, torch.float64):  # what float32 overflows on
        longest = longest if 0 < longest < math.inf else float(torch.linalg.vector_norm(W.to(dtype), dim=1).amax()) * 1.001
    if not (longest < math.inf and bool(b.isfinite().all())):
        raise ValueError(f"{op}: W_enc and b_enc of the SAE must be finite, got NaN or infinity")
    raw = {"JumpReLU": "threshold", "BatchTopK": "running_threshold"}.get(kind)
    threshold = b.double() * 0 if raw is None else getattr(sae, raw).detach().double().clamp_min(0).expand_as(b)
    cut = kind not in ("TopK", "AbsTopK")
    return Planes(W, b, sae.b_dec.detach() if getattr(sae, "pre_bias", True) else None, threshold if cut else None, longest)


# ---------------------------------------------------------------- thresholds


def _by_threshold(planes: Planes, p: Tensor, q: Tensor) -> list[Tensor]:
    """[segment, t, leaves, enters, order]: what is active at one end and not at the other."""
    assert planes.threshold is not None
    (F, _), S, x = planes.W.shape, p.shape[0], torch.cat([p, q])
    rows = x.to(planes.W.dtype)
    b = planes.b.double() + 2 * planes.slack(x).amax()
    features, segment = None, torch.arange(S, device=p.device)
    if bool(rows.isfinite().all()):
        wide = torch.float64 if planes.W.dtype == torch.float64 else torch.float32
        near = encode_threshold(rows, planes.W, b.to(wide), b_pre=planes.b_pre, threshold=planes.threshold.to(wide))
        if near.col.shape[0] * 8 <= S * F:
            pair = (near.slots.row_of() % S * F + near.col).unique()
            segment, features = pair // F, (pair % F).split(torch.bincount(pair // F, minlength=S).tolist())
    feature = torch.arange(F, device=p.device).repeat(S) if features is None else torch.cat(features)
    segment = segment.repeat_interleave(F) if features is None else segment
    above = planes.lines(p, q, features) - planes.threshold[feature]
    changed = (above[0] > 0) != (above[1] > 0)
    (a, b), feature, segment = above[:, changed], feature[changed], segment[changed]
    nothing = torch.full_like(feature, -1)
    return [segment, a / (a - b), torch.where(a > 0, feature, nothing), torch.where(a > 0, nothing, feature), torch.zeros_like(feature)]


# ---------------------------------------------------------------- top-k


class _Arrangement(NamedTuple):
    """Lines ``a + t (b - a)``, ``[s, n]`` each, of the features ``ids``; -1 is a line of zeros, which stands for nothing."""

    a: Tensor
    b: Tensor
    ids: Tensor


def _arranged(lines: Tensor, ids: Tensor, again: Tensor, k: int, relu: bool, absolute: bool) -> _Arrangement:
    """Of the lines ``[2, s, n]``; those marked in ``again [s, n]`` come twice and are moved below all others."""
    least = -1 - lines.abs().amax() if lines.numel() else lines.new_zeros(())
    if absolute:  # |s| is the larger of two lines
        lines, ids = torch.stack([lines, -lines], 3).flatten(2), ids.repeat_interleave(2, 1)
        again = again.repeat_interleave(2, 1)
    a, b = lines.masked_fill(again, least)
    if relu:
        zeros = a.new_zeros(a.shape[0], k)
        a, b, ids = torch.cat([zeros, a], 1), torch.cat([zeros, b], 1), torch.cat([torch.full_like(zeros, -1, dtype=ids.dtype), ids], 1)
    return _Arrangement(a, b, ids)


def _best(values: Tensor, slope: Tensor, k: Tensor | int) -> Tensor:
    """Which are the k best of a row: by value, then the smaller slope (what was above before they met), then the first."""
    order = slope.argsort(dim=-1, stable=True)
    order = order.gather(-1, values.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    among = (torch.arange(order.shape[-1], device=order.device) < k).expand_as(order)
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, among)


def _meeting(a: Tensor, d: Tensor, t: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(of the lines inside the least at t, of equals the last; of those outside the largest, of equals the first; whether that one is above
    by more than roundings)"""
    values = a + t * d
    last = a.shape[1] - 1 - values.masked_fill(~inside, torch.inf).flip(1).argmin(1, keepdim=True)
    first = values.masked_fill(inside, -torch.inf).argmax(1, keepdim=True)
    size = sum(line.gather(1, i).abs() for line in (a, d) for i in (first, last))
    above = values.gather(1, first) - values.gather(1, last) > 8 * torch.finfo(a.dtype).eps * size
    return last, first, above & ~inside.gather(1, first) & inside.gather(1, last)


def _walk(a: Tensor, d: Tensor, now: Tensor, end: Tensor, inside: Tensor) -> list[tuple[Tensor, ...]]:
    """Changes of the best lines ``a + t d [rows, m]`` from ``now`` to ``end [rows, 1]``: (row, t, leaves, enters), a list entry a round.

    ``inside`` is where they start, and is brought to where they end. The best of those outside less the least of those inside is convex in
    t, so that Newton's iteration from the end comes down to the next change, and there is none where it is not positive at the end.
    """
    found: list[tuple[Tensor, ...]] = []
    row = torch.arange(a.shape[0], device=a.device)
    while True:
        out, come, going = _meeting(a[row], d[row], end[row], inside[row])
        row, out, come = (values[going.squeeze(1)] for values in (row, out, come))
        if not row.numel():
            return found
        A, slopes, held, t = a[row], d[row], inside[row], end[row]
        going = torch.ones_like(out, dtype=torch.bool)
        while bool(going.any()):
            steeper = slopes.gather(1, come) - slopes.gather(1, out)
            meet = torch.where(steeper > 0, (A.gather(1, out) - A.gather(1, come)) / steeper, now[row])
            t = torch.where(going, torch.minimum(torch.maximum(meet, now[row]), t), t)
            next_out, next_come, above = _meeting(A, slopes, t, held)
            going = going & above & ((next_out != out) | (next_come != come))
            out, come = torch.where(going, next_out, out), torch.where(going, next_come, come)
        found.append((row, t.squeeze(1), out.squeeze(1), come.squeeze(1)))
        inside[row.unsqueeze(1), out], inside[row.unsqueeze(1), come] = False, True
        now = now.index_copy(0, row, t)


def _changes(lines: _Arrangement, k: int, bounds: Tensor) -> tuple[list[Tensor], Tensor]:
    """([segment, t, leaves, enters, order], which segments are proven): no score that is missing reaches a k-th best one, where at 0, 1/2
    and 1 they are at most ``bounds [s, 3]``."""
    a, b, ids = lines
    s, n = a.shape
    grid = torch.linspace(0, 1, _PARTS + 1, dtype=a.dtype, device=a.device).unsqueeze(1)
    d = b - a
    at = a.unsqueeze(1) + grid * d.unsqueeze(1)
    at[:, -1] = b
    low, high = torch.minimum(at[:, :-1], at[:, 1:]), torch.maximum(at[:, :-1], at[:, 1:])
    floor = low.topk(k).values[..., -1:]
    ceiling = high.topk(k + 1).values[..., -1:] if n > k else torch.full_like(floor, -torch.inf)
    half = grid[: _PARTS // 2 + 1, 0] * 2
    missing = torch.cat([torch.lerp(bounds[:, i : i + 1], bounds[:, i + 1 : i + 2], half).unfold(1, 2, 1).amax(2) for i in range(2)], 1)
    proven = (missing < floor.squeeze(2)).all(1)

    sure = low > ceiling
    open_ = (high >= floor) & ~sure
    most = max(int(open_.sum(2).amax()), 1) if s else 1
    column = open_.to(torch.uint8).argsort(dim=2, descending=True, stable=True)[..., :most]
    there = open_.gather(2, column)
    least = at.amin() - 1 if s else 0.0

    def some(values: Tensor) -> Tensor:
        return values.unsqueeze(1).expand_as(open_).gather(2, column)

    slopes = some(d).masked_fill(~there, 0.0)
    tied = slopes.clone()
    tied[:, 0] = 0.0  # at p the first of equals is in
    start = _best(at[:, :-1].gather(2, column).masked_fill(~there, least), tied, k - sure.sum(2, keepdim=True))
    inside = start.flatten(0, 1).clone()
    borders = grid.squeeze(1).expand(s, -1)
    found = _walk(
        some(a).masked_fill(~there, least).flatten(0, 1),
        slopes.flatten(0, 1),
        borders[:, :-1].reshape(-1, 1),
        borders[:, 1:].reshape(-1, 1),
        inside,
    )
    order = torch.cat([torch.full_like(row, i) for i, (row, *_) in enumerate(found)]) if found else column.new_empty(0)
    row, t, out, come = (torch.cat(parts) for parts in zip(*found)) if found else (order, a.new_empty(0), order, order)
    flat = column.flatten(0, 1)
    out, come = flat[row, out], flat[row, come]

    # What a border finds otherwise, by a rounding or because scores are equal in q, changes there.
    def whole(chosen: Tensor) -> Tensor:
        return sure.scatter(2, column, (chosen & there) | sure.gather(2, column))

    ended = whole(inside.view_as(column))
    follows = torch.cat([whole(start)[:, 1:], _best(b, torch.zeros_like(b), k).unsqueeze(1)], 1)
    gone, new = (ended & ~follows).nonzero(), (follows & ~ended).nonzero()
    segment = torch.cat([row // _PARTS, gone[:, 0]])
    part = torch.cat([row % _PARTS, gone[:, 1]])
    out, come = torch.cat([out, gone[:, 2]]), torch.cat([come, new[:, 2]])
    order = torch.cat([part[: len(row)] * (1 << 32) + order, gone[:, 1] * (1 << 32) + (1 << 31)])
    return [segment, torch.cat([t, borders[gone[:, 0], gone[:, 1] + 1]]), ids[segment, out], ids[segment, come], order], proven


def _by_level(planes: Planes, weights: Any, p: Tensor, q: Tensor, k: int, relu: bool, absolute: bool) -> list[Tensor]:
    """[segment, t, leaves, enters, order] of a top-k; ``weights``: W, or its packed form."""
    F, found = planes.W.shape[0], list[list[Tensor]]()
    rest = torch.arange(p.shape[0], device=p.device)  # segments not done
    for length in (*(max(factor * k, _LEAST) for factor in _LISTED), F):
        P, Q = p[rest], q[rest]
        if 3 * length < F:
            x = torch.stack([P, (P + Q) / 2, Q], 1).flatten(0, 1)
            rows = x.to(planes.W.dtype)
            best = encode_topk(rows, weights, planes.b, b_pre=planes.b_pre, k=length, relu=False, absolute=absolute)
            least = best.values[:, -1].double()
            bounds = (least.abs() if absolute else least) + planes.slack(x)
            bounds = bounds.masked_fill(~rows.isfinite().all(1), torch.inf).view(-1, 3)
            index = best.indices.view(-1, 3 * length).sort().values
            again = F_.pad(index[:, 1:] == index[:, :-1], (1, 0))
        elif length < F:
            continue
        else:
            bounds = P.new_full((1, 3), torch.finfo(P.dtype).min).expand(len(P), 3)
            index = torch.arange(F, device=p.device).expand(len(P), F)
            again = torch.zeros((), dtype=torch.bool, device=p.device).expand_as(index)
        open_ = [rest[:0]]
        for part in chunks(len(P), index.shape[1] * _PARTS * _NUMBERS):
            lines = planes.lines(P[part], Q[part], index[part].unbind() if length < F else None).view(2, -1, index.shape[1])
            changes, proven = _changes(_arranged(lines, index[part], again[part], k, relu, absolute), k, bounds[part])
            kept = proven[changes[0]]
            found.append([rest[part][changes[0][kept]], *(values[kept] for values in changes[1:])])
            open_.append(rest[part][~proven])
        rest = torch.cat(open_)
    return [torch.cat(parts) for parts in zip(*found)] if found else [rest, p.new_empty(0), rest, rest, rest]


# ---------------------------------------------------------------- public


@torch.no_grad()
def dictionary_crossings(sae: nn.Module, p: Tensor, q: Tensor) -> DictionaryCrossings:
    """Every change of an SAE's set of active features on the segments from p to q, exactly.

    Args:
        sae: an ``SAE`` with TopK, AbsTopK, ReLU, JumpReLU, or BatchTopK at its running threshold, as it stands in evaluation.
        p, q: ``[S, D]``, ends of S segments, in the units of the data; any floating dtype, widened to float64.

    Returns:
        ``DictionaryCrossings(t, leaves, enters, offsets)``, ragged over segments, ascending by t. A feature is active where its score is
        above its threshold (0 with ReLU); with TopK among the k largest scores of the row, of equal ones the first, and with its ReLU above
        0; with AbsTopK among the k of largest magnitude. Of a top-k a feature leaves where another enters, at one entry; -1 stands for none
        (scores cut by a threshold, or by TopK's ReLU). Several changes may share a t. The set of p with all changes made is the set of q;
        features whose scores only touch do not change, except in p or q.

    Arithmetic is float64: changes are the places where the lines through the scores at p and q (parameters widened) meet each other, 0 or
    the threshold, to a few roundings. Where lines nearly touch, two changes less than a rounding apart may be missed or found. Of a top-k
    only features are looked at that lists of 5 k best ones at p, q and between do not prove out, with the rounding of the encoder counted
    in; a segment for which they do not suffice (ends far apart, k large beside F) takes the scores of all features, as does a threshold
    that over 1/8 of the features pass. No gradient. Memory beyond the result: blocks of 128 MiB, and of one segment 1 KiB a feature.

    Raises: TypeError: dtype, device or type. ValueError: shapes; values that are not finite; an SAE with another activation, sharded, or in
        units that are not the data's (``fold_()``).

    Source: an SAE's polytopes as in Black et al. 2022 (arXiv 2211.12312); the k-level of an arrangement, Edelsbrunner & Welzl 1986.
    """
    op = "dictionary_crossings"
    planes = planes_of(op, "sae must be", sae, ("TopK", "AbsTopK", "ReLU", "JumpReLU", "BatchTopK"), p=p, q=q)
    if p.shape != q.shape:
        raise ValueError(f"{op}: p and q must have the same shape [S, D], got {list(p.shape)} and {list(q.shape)}")
    S, p, q = p.shape[0], p.detach().double(), q.detach().double()
    activation: Any = sae.activation
    with full_precision(p.device):  # autocast would round the encoder's lists by more than the proof counts in
        if planes.threshold is None:
            found = _by_level(planes, sae._encoder(p), p, q, activation.k, activation.relu, activation.absolute)
        else:
            per_segment = 4 * planes.W.shape[0]
            parts = [(part.start, _by_threshold(planes, p[part], q[part])) for part in chunks(S, per_segment)]
            found = [torch.cat(part) for part in zip(*([rows + first, *rest] for first, (rows, *rest) in parts))] if parts else []
    if not found:
        empty = torch.zeros(0, dtype=torch.int64, device=p.device)
        found = [empty, p.new_empty(0), empty, empty, empty]
    segment, t, leaves, enters, order = (values.cpu().numpy() for values in found)
    place = torch.from_numpy(np.lexsort((enters, leaves, t, order, segment) if planes.threshold is None else (enters, leaves, t, segment)))
    place = place.to(p.device)
    segment = found[0][place]
    offsets = torch.searchsorted(segment, torch.arange(S + 1, device=p.device))
    return DictionaryCrossings(found[1][place], found[2][place], found[3][place], offsets)
