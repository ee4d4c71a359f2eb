"""Where the k best features change along segments, exactly.

Along a segment every score is a line, and the k-th largest line (the k-level of an arrangement of lines) says which features are among the
k best. Few ever reach it; the others are dropped, and the changes among the rest are walked from one to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae.dispatch import Op, describe, preference, then_any
from fastsae.packed import PackedWeights
from fastsae.reference import chunks, drawn

_PIECES = 16
"""Of a segment: in each the lines are asked whether they can be among the best."""
_BELOW = -1e-300


def score_lines(W: Tensor, b: Tensor, b_pre: Tensor | None, p: Tensor, q: Tensor, features: Sequence[Tensor] | None = None) -> Tensor:
    """``[2, n]`` float64: scores at p and q of some features of each segment, of all where None, one segment after the other."""
    ends = torch.stack([p, q]) - (0 if b_pre is None else b_pre.double())
    if features is None:
        parts = chunks(W.shape[0], max(2 * p.shape[0], W.shape[1]))
        return (torch.cat([ends @ W[part].double().T for part in parts], 2) + b.double()).flatten(1)
    found = [pair @ W.index_select(0, some).double().T + b[some] for some, pair in zip(features, ends.unbind(1))]
    return torch.cat(found, 1)


# ---------------------------------------------------------------- reference


class _Arrangement(NamedTuple):
    """Lines ``a + t (b - a)``, ``[s, n]`` each, of the features ``ids``; -1 is a line of zeros, which stands for nothing."""

    a: Tensor
    b: Tensor
    ids: Tensor


def _reaching(a: Tensor, b: Tensor, k: int, relu: bool, absolute: bool) -> Tensor:
    """``[s, F]``: which lines are anywhere in a piece as large as the k-th largest of what each is at least in it."""
    result = torch.zeros_like(a, dtype=torch.bool)
    ends = [torch.lerp(a, b, g / _PIECES) for g in range(_PIECES)] + [b]
    for v, w in pairwise(ends):
        low, high = torch.minimum(v, w), torch.maximum(v, w)
        if absolute:
            low, high = torch.maximum(low, -high).clamp_min(0), torch.maximum(high, -low)
        floor = low.topk(k).values[:, -1:]
        result |= high >= (floor.clamp_min(0) if relu else floor)
    return result


def _arranged(lines: Tensor, k: int, relu: bool, absolute: bool) -> _Arrangement:
    """Of the lines ``[2, s, F]`` those that can be among the k best somewhere; the rest, to fill up, are moved below all others."""
    reaching = _reaching(lines[0], lines[1], k, relu, absolute)
    most = int(reaching.sum(1).amax()) if len(reaching) else 0
    ids = reaching.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    lines, rest = lines.gather(2, ids.expand(2, -1, -1)), ~reaching.gather(1, ids)
    least = -1 - lines.abs().amax() if lines.numel() else lines.new_zeros(())
    if absolute:  # |s| is the larger of two lines, one of which is below where both are 0
        lines = torch.stack([lines, torch.where(lines == 0, _BELOW, -lines)], 3).flatten(2)
        ids, rest = ids.repeat_interleave(2, 1), rest.repeat_interleave(2, 1)
    a, b = lines.masked_fill(rest, least)
    if relu:
        zeros = a.new_zeros(a.shape[0], k)
        a, b, ids = torch.cat([zeros, a], 1), torch.cat([zeros, b], 1), torch.cat([torch.full_like(zeros, -1, dtype=ids.dtype), ids], 1)
    return _Arrangement(a, b, ids)


def _best(values: Tensor, k: int) -> Tensor:
    """Which are the k best of a row; of equal ones the first."""
    order = values.argsort(dim=1, descending=True, stable=True)[:, :k]
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, order, True)


def _meeting(a: Tensor, d: Tensor, t: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(of the lines inside the least at t, of equals the last; of those outside the largest, of equals the first; whether that one is above
    by more than roundings)"""
    values = a + t * d
    last = a.shape[1] - 1 - values.masked_fill(~inside, torch.inf).flip(1).argmin(1, keepdim=True)
    first = values.masked_fill(inside, -torch.inf).argmax(1, keepdim=True)
    size = sum(line.gather(1, i).abs() for line in (a, d) for i in (first, last))
    above = values.gather(1, first) - values.gather(1, last) > 8 * torch.finfo(a.dtype).eps * size
    return last, first, above & ~inside.gather(1, first) & inside.gather(1, last)


def _walk(a: Tensor, d: Tensor, inside: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Changes of the best lines ``a + t d [s, n]`` from 0 to 1: (row, t, leaves, enters), one of each row a round.

    ``inside`` is where they start, and is brought to where they end. The best of those outside less the least of those inside is convex in
    t, so that Newton's iteration from the end comes down to the next change, and there is none where it is not positive at the end.
    """
    row, now = torch.arange(len(a), device=a.device), torch.zeros_like(a[:, :1])
    while True:
        out, come, going = _meeting(a[row], d[row], torch.ones_like(now[row]), inside[row])
        row, out, come = (values[going.squeeze(1)] for values in (row, out, come))
        if not row.numel():
            return
        A, slopes, held, before = a[row], d[row], inside[row], now[row]
        t, going = torch.ones_like(before), torch.ones_like(out, dtype=torch.bool)
        while bool(going.any()):
            steeper = slopes.gather(1, come) - slopes.gather(1, out)
            meet = torch.where(steeper > 0, (A.gather(1, out) - A.gather(1, come)) / steeper, before)
            t = torch.where(going, torch.minimum(torch.maximum(meet, before), t), t)
            next_out, next_come, above = _meeting(A, slopes, t, held)
            going = going & above & ((next_out != out) | (next_come != come))
            out, come = torch.where(going, next_out, out), torch.where(going, next_come, come)
        yield row, t.squeeze(1), out.squeeze(1), come.squeeze(1)
        inside[row.unsqueeze(1), out], inside[row.unsqueeze(1), come] = False, True
        now = now.index_copy(0, row, t)


def _changes(lines: _Arrangement, k: int) -> tuple[Tensor, ...]:
    """(t, leaves, enters, counts) of a block of segments."""
    a, b, ids = lines
    inside = _best(a, k)
    found = list(_walk(a, b - a, inside))
    # What is equal in q, or apart by a rounding, changes there.
    follows = _best(b, k)
    (ended, gone), (_, new) = ((one & ~other).nonzero(as_tuple=True) for one, other in ((inside, follows), (follows, inside)))
    segment, t, leaves, enters = (torch.cat(parts) for parts in zip(*found, (ended, torch.ones_like(b[ended, gone]), gone, new)))
    leaves, enters = ids[segment, leaves], ids[segment, enters]
    place = segment.argsort(stable=True)
    place = place[leaves[place] != enters[place]]  # of a magnitude its other line
    return t[place], leaves[place], enters[place], torch.bincount(segment[place], minlength=len(a))


def topk_changes_reference(
    W: Tensor, b: Tensor, b_pre: Tensor | None, packed: Tensor | None, p: Tensor, q: Tensor, k: int, relu: bool, absolute: bool
) -> tuple[Tensor, ...]:
    nothing = torch.zeros(0, dtype=torch.int64, device=p.device)
    found: list[tuple[Tensor, ...]] = [(p.new_empty(0), nothing, nothing, nothing)]
    for block in chunks(len(p), 8 * len(W)):
        lines = score_lines(W, b, b_pre, p[block], q[block]).view(2, -1, len(W))
        finite = lines.isfinite().all(2).all(0)
        counts = torch.where(finite, 0, -1)
        if bool(finite.any()) and not (absolute and k == len(W)):  # then all are among the best everywhere
            t, leaves, enters, counts[finite] = _changes(_arranged(lines[:, finite], k, relu, absolute), k)
            found.append((t, leaves, enters, counts))
        else:
            found.append((*found[0][:3], counts))
    return tuple(torch.cat(parts) for parts in zip(*found))


# ---------------------------------------------------------------- samples and checks


def _samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    normal = drawn(device, dtype, generator)
    for count, (S, D, F, k) in enumerate(((3, 24, 300, 5), (1, 2, 9, 9), (0, 4, 8, 2), (2, 33, 130, 1), (2, 17, 70, 20))):
        W, (p, q) = normal(F, D), normal(2, S, D).double()
        q = p + 0.1 * (q - p) if count % 2 else q
        packed = PackedWeights(W).words("samples") if count % 2 else None
        for relu, absolute in ((True, False), (False, False), (False, True)):
            yield W, normal(F), normal(D) if count % 2 else None, packed, p, q, k, relu, absolute
    few = torch.randint(-2, 3, (70, 4), generator=generator, device="cpu").to(device=device, dtype=dtype)
    ends = few[:4].double().view(2, 2, 4)
    for relu, absolute in ((True, False), (False, True)):
        yield few[4:64], few[4:64, 0].clone(), few[-1], None, *ends, 6, relu, absolute


def _check(testing: Any, args: tuple[Any, ...], result: Any) -> float:
    """The changes made one after the other, against the k best between any two of them. Equal features are one: which of them is among the
    best may turn on a rounding."""
    W, b, b_pre, _, p, q, k, relu, absolute = args
    n, integers = int(result[3].clamp_min(0).sum()), (torch.int64, torch.int64, torch.int64)
    if [values.dtype for values in result] != [torch.float64, *integers] or [values.shape for values in result] != [(n,)] * 3 + [(len(p),)]:
        raise testing.Mismatch(f"t,leaves,enters,counts: {n} changes of {len(p)} segments, but got {describe(result)}")
    if bool((result[3] < -1).any()) or any(bool(((ids < -1) | (ids >= len(W))).any()) for ids in result[1:3]):
        raise testing.Mismatch("leaves,enters,counts: out of range")
    t, leaves, enters, counts = (values.tolist() for values in result)
    lines = score_lines(W, b, b_pre, p, q).view(2, len(p), len(W))
    distinct, kind, copies = torch.cat([W, b.unsqueeze(1)], 1).unique(dim=0, return_inverse=True, return_counts=True)
    one = torch.zeros(len(distinct), dtype=torch.int64, device=W.device).scatter(0, kind, torch.arange(len(W), device=W.device))
    first = 0
    for s, count in enumerate(counts):
        rows, first = range(first, first + max(count, 0)), first + max(count, 0)
        if count < 0:  # left to the reference, or not finite
            continue
        size = 1e-9 * (1 + float(lines[:, s].abs().amax()))

        def scores(at: float, s: int = s) -> Tensor:
            score = torch.lerp(lines[0, s], lines[1, s], at)
            return score.abs() if absolute else score

        def best(score: Tensor) -> Tensor:
            kept = score.argsort(descending=True, stable=True)[:k]
            return torch.bincount(kind[kept[score[kept] > 0] if relu else kept], minlength=len(copies))

        def compare(held: Tensor, score: Tensor, where: str, s: int = s, size: float = size) -> None:
            got, want = (score[one].repeat_interleave(times).sort().values for times in (held, best(score)))
            if got.shape != want.shape or bool(((got - want).abs() > size).any()):
                raise testing.Mismatch(f"leaves,enters: {where} of segment {s} other features are the {k} best")

        held, places = best(scores(0.0)), [0.0, *(t[i] for i in rows), 1.0]
        if not all(before <= after for before, after in pairwise(places)):
            raise testing.Mismatch(f"t: {places[1:-1]} of segment {s} is not ascending in [0, 1]")
        for (before, after), row in zip(pairwise(places), [*rows, None]):
            if after - before > 1e-7:
                compare(held, scores((before + after) / 2), f"between {before} and {after}")
            if row is None:
                continue
            score, (gone, new) = scores(after), (leaves[row], enters[row])
            sides = [float(score[i]) if i >= 0 else 0.0 for i in (gone, new)]
            told = gone != new and (gone < 0 or held[kind[gone]] > 0) and (new < 0 or held[kind[new]] < copies[kind[new]])
            if not told or abs(sides[0] - sides[1]) > size:
                raise testing.Mismatch(
                    f"leaves,enters: {gone}, {new} at {after} of segment {s} do not meet there, or stand on the wrong sides"
                )
            for feature, by in ((gone, -1), (new, 1)):
                if feature >= 0:
                    held[kind[feature]] += by
        compare(held, scores(1.0), "at the end")
    return 0.0


def _workload(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    normal = drawn(device, dtype, generator)
    return normal(4096, 256), normal(4096), None, None, *normal(2, 16, 256).double(), 16, True, False


def _fake(W: Tensor, b: Tensor, b_pre: Any, packed: Any, p: Tensor, *_: Any) -> tuple[Tensor, ...]:
    n = torch.library.get_ctx().new_dynamic_size()
    return p.new_empty(n), *(p.new_empty(size, dtype=torch.int64) for size in (n, n, p.shape[0]))


TOPK_CHANGES = Op(
    "topk_changes(Tensor W, Tensor b, Tensor? b_pre, Tensor? packed, Tensor p, Tensor q, SymInt k, bool relu, bool absolute)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    topk_changes_reference,
    fake=_fake,
    samples=_samples,
    check=_check,
    workload=_workload,
    handle=(0, 3),
)
TOPK_CHANGES.row("cpu", "fastsae.native.encode:topk_changes", "fastsae.native.encode:refuses_topk_changes")


def topk_changes(
    W: Tensor, b: Tensor, b_pre: Tensor | None, packed: Tensor | None, p: Tensor, q: Tensor, k: int, relu: bool, absolute: bool
) -> tuple[Tensor, ...]:
    """(t, leaves, enters, counts ``[S]``) of segments from p to q ``[S, D]`` float64, for scores as in ``encode_topk``; counts of -1: a
    score is not finite."""
    args, options = (W, b, b_pre, packed), (k, relu, absolute)
    t, leaves, enters, counts = TOPK_CHANGES(*args, p, q, *options, backend=then_any(preference(None)))
    left = counts < 0  # the screen decides too little, or there are very many changes
    if not bool(left.any()):
        return t, leaves, enters, counts
    *rest, more = TOPK_CHANGES(*args, p[left], q[left], *options, backend="reference")
    segment = torch.arange(len(p), device=p.device)
    order = torch.cat([segment.repeat_interleave(counts.clamp_min(0)), segment[left].repeat_interleave(more.clamp_min(0))]).argsort(
        stable=True
    )
    counts[left] = more
    return *(torch.cat(both)[order] for both in zip((t, leaves, enters), rest)), counts
