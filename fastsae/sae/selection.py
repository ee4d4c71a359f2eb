"""Selection and decoding where features are sharded: exact, and the same bits whatever the number of processes.

Every process scores all rows against its own features. What is compared across processes is a key of 8 bytes, score and feature, so that
ties are those of one process: a row's best keys go to the process that owns the row, and its k-th largest comes back. BatchTopK's last
score is found by radix selection over histograms, which are integers that add.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsae._core.world import World, tree
from fastsae.dispatch import preference, then_any
from fastsae.gradients import RowGradient, densify
from fastsae.latents import Slots
from fastsae.ops.decode import DECODE
from fastsae.ops.encode import ENCODE_BATCH_TOPK, ENCODE_TOPK
from fastsae.reference import product
from fastsae.sae.losses import Weights, unranked

LEAST = -(1 << 63)
_WORD, _LAST = 0xFFFFFFFF, 0x7FFFFFFF
_DIGIT = 11  # bits that a histogram of a radix selection tells apart


def keys(scores: Tensor, features: Tensor, absolute: bool = False) -> Tensor:
    """int64 in the order of a selection: NaN first, then score descending, -0 as +0, then feature ascending. ``absolute``: by magnitude,
    the sign in the last bit."""
    negative = scores < 0 if absolute else torch.zeros_like(features)
    bits = ((scores.abs() if absolute else scores) + 0.0).view(torch.int32).to(torch.int64)
    bits = torch.where(scores.isnan(), _LAST, torch.where(bits < 0, bits ^ _LAST, bits))
    return (bits << 32) | ((_LAST - features) << 1) | negative


def unkeyed(key: Tensor) -> tuple[Tensor, Tensor]:
    """(score, feature) of keys; a score of -0 comes out as +0."""
    bits = (key >> 32).to(torch.int32)
    scores = torch.where(bits < 0, bits ^ _LAST, bits).view(torch.float32)
    return torch.where((key & 1).bool(), -scores, scores), _LAST - ((key & _WORD) >> 1)


def rectified(scores: Tensor, relu: bool) -> Tensor:
    """Scores clamped at 0, by a comparison: which zero ``torch.relu`` returns depends on where an element lies."""
    return scores.masked_fill(scores <= 0, 0) if relu else scores


class Found(NamedTuple):
    """Best features of this process for every row: (score, feature of its own) and their keys ``[rows, k]``, the last ones LEAST where it
    has fewer."""

    scores: Tensor
    indices: Tensor
    keys: Tensor


def candidates(x: Tensor, w: Weights, k: int, world: World, among: Tensor | None = None, absolute: bool = False) -> Found:
    """What of this process can be among the k best of all; ``among [own features]``: those that take part."""
    most = min(k, w.W_enc.shape[0] if among is None else int(among.sum()))
    if most:
        inputs = (x, w.W_enc, *w.ranking, among, None)
        scores, indices = ENCODE_TOPK(*inputs, most, False, absolute, backend=preference(None))
    else:
        scores, indices = x.new_empty(x.shape[0], 0), torch.empty(x.shape[0], 0, dtype=torch.int64, device=x.device)
    own = keys(scores, indices + world.start, absolute)
    return Found(scores, indices, torch.nn.functional.pad(own, (0, k - most), value=LEAST))


def merged(own: Tensor, k: int, world: World) -> Tensor:
    """``[own rows, k]``: the largest keys of the rows of this process, descending."""
    return _sides(own, world).topk(k, dim=1).values


def _sides(t: Tensor, world: World) -> Tensor:
    """``[own rows, ..]``: what the processes of all features have for the rows of this one, side by side."""
    return world.home(t).transpose(0, 1).flatten(1)


def best(x: Tensor, w: Weights, k: int, relu: bool, world: World, absolute: bool = False) -> tuple[Tensor, Tensor]:
    """(values, features ``[own rows, k]``) of the k best of each row of this process."""
    found = candidates(x, w, k, world, absolute=absolute)
    kept, at = _sides(found.keys, world).topk(k, dim=1)
    scores, features = unkeyed(kept)
    if w.rank is not None:  # which those know that have the features
        own = unranked(found.scores, found.indices, w.rank)
        scores = _sides(torch.nn.functional.pad(own, (0, k - own.shape[1])), world).gather(1, at)
    return rectified(scores, relu), features


def top_k(x: Tensor, w: Weights, k: int, relu: bool, world: World, among: Tensor | None = None, absolute: bool = False) -> Slots:
    """Those of the k best of each row of ``world.share`` that are features of this process."""
    scores, indices, own = candidates(x, w, k, world, among, absolute)
    kept = (own >= world.back(merged(own, k, world)[:, -1:]))[:, : scores.shape[1]]
    crow = torch.cat([indices.new_zeros(1), kept.sum(1).cumsum(0)])
    at = kept.flatten().nonzero().squeeze(1)
    scores, indices = scores.flatten()[at], indices.flatten()[at]
    return Slots(unranked(rectified(scores, relu), indices, w.rank), indices, crow)


def batch_top_k(x: Tensor, w: Weights, k: float, world: World) -> tuple[Slots, Tensor]:
    """Those of the ``int(k * rows)`` largest positive scores of all rows that are of ``world.share`` and of features of this process: by
    score, then row, then feature. And the smallest kept score of all, +inf where there is none."""
    every, x, features = x.shape[0], world.share(x), w.W_enc.shape[0]
    total, rows = int(k * every), x.shape[0]
    if most := min(total, rows * features):
        inputs = (x, w.W_enc, *w.ranking, None, None)
        values, indices, crow, _ = ENCODE_BATCH_TOPK(*inputs, (most + 0.5) / rows, backend=preference(None))
    else:
        values, indices, crow = x.new_empty(0), *(torch.zeros(n, dtype=torch.int64, device=x.device) for n in (0, rows + 1))
    kept, min_kept = largest(values, place(Slots(values, indices, crow), world), every * world.features, total, world)
    crow = torch.cat([crow.new_zeros(1), kept.cumsum(0)])[crow]
    values, indices = values[kept], indices[kept]
    return Slots(unranked(values, indices, w.rank), indices, crow), min_kept


def place(slots: Slots, world: World) -> Tensor:
    """Of each slot of the rows of ``world.share``, in the order of rows and features of all processes."""
    return (slots.row_of() + world.first) * world.features + slots.indices + world.start


def largest(values: Tensor, place: Tensor, places: int, total: int, world: World) -> tuple[Tensor, Tensor]:
    """Which are among the ``total`` largest of all processes' positive scores, equal ones by ``place`` (each in ``0 .. places - 1``, once);
    and the smallest kept of all, +inf where there is none."""
    score, kept = keys(values, place) >> 32, torch.ones_like(values, dtype=torch.bool)
    if int(world.count(score.new_tensor(len(score)))) > total:
        last, left, equal = nth(score, total, 31, world)
        kept = score >= last
        if left < equal:
            first, _, _ = nth(places - 1 - place[score == last], left, places.bit_length(), world)
            kept = (score > last) | ((score == last) & (places - 1 - place >= first))
    # The least is the largest of the complements; a process that kept nothing says LEAST.
    least = ~score[kept].amin(0, keepdim=True) if bool(kept.any()) else score.new_full((1,), LEAST)
    least = ~world.each(least).amax()
    return kept, torch.where(least == ~LEAST, torch.inf, unkeyed(least << 32)[0])


def nth(integers: Tensor, n: int, bits: int, world: World) -> tuple[int, int, int]:
    """The n-th largest of all processes' integers in ``0 .. 2^bits - 1``, which of its equals it is (from 1), and how many they are."""
    top = counted = 0
    for shift in range((bits - 1) // _DIGIT * _DIGIT, -1, -_DIGIT):
        digits = (integers[integers >> (shift + _DIGIT) == top] >> shift) & ((1 << _DIGIT) - 1)
        counts = world.count(torch.bincount(digits, minlength=1 << _DIGIT))
        above = counts.flip(0).cumsum(0).flip(0)
        digit = int((above >= n).nonzero()[-1])
        counted = int(counts[digit])
        n -= int(above[digit]) - counted
        top = (top << _DIGIT) | digit
    return top, n, counted


def decode_rows(slots: Slots, W: Tensor, world: World, groups: int = 1) -> Tensor:
    """``[groups, own rows, D]``: the products of all processes' slots with ``W``, from those that are features of this process, for the
    rows of ``world.share`` of each group."""
    return at_home(by_shard(slots, W, world), world, groups)


def by_shard(slots: Slots, W: Tensor, world: World) -> Tensor:
    """``[own virtual shards * rows, D]``: the products of each virtual shard alone."""
    return DECODE(*slots.by_range(world.cuts), W, None, backend=then_any(preference(None)))


def at_home(partial: Tensor, world: World, groups: int = 1) -> Tensor:
    """``[groups, own rows, D]``: their sums over all virtual shards; overwrites them."""
    shards, width = len(world.cuts) - 1, partial.shape[1]
    rows = tree(partial.reshape(shards, len(partial) // shards, width), spare=True).reshape(groups, -1, width).transpose(0, 1)
    return tree(world.home(rows), spare=True).transpose(0, 1)


def skipped(x: Tensor, skip: Tensor, world: World) -> Tensor:
    """``x @ skip.T``. Where features are sharded the elements of x are slots of a decoder, whose sums have an order of their own: that of a
    product depends on the number of threads."""
    if world.virtual == 1:
        return product(x, skip.T)
    return DECODE(x.contiguous(), _columns(x), None, skip.T.contiguous(), None, backend=then_any(preference(None)))


def skip_gradient(G: Tensor, x: Tensor, world: World) -> Tensor:
    """``G.T @ x``, likewise."""
    if world.virtual == 1:
        return product(G.T, x)
    return densify(RowGradient(G.contiguous(), _columns(G), None, x, G.shape[1]))


def pulled(sums: Tensor, W: Tensor, world: World) -> Tensor:
    """``sums @ W`` over the features of all processes, likewise."""
    if world.virtual == 1:
        return product(sums.unsqueeze(0), W)[0]
    moved = sums.nonzero().squeeze(1)  # of few features, mostly
    shards = torch.searchsorted(moved, torch.tensor(world.cuts, device=sums.device))
    return world.tree(DECODE(sums[moved], moved, shards, W, None, backend=then_any(preference(None))))


def _columns(rows: Tensor) -> Tensor:
    return torch.arange(rows.shape[1], device=rows.device).expand(rows.shape).contiguous()
