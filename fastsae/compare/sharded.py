"""Matching where a dictionary's features lie on several processes: the rows of a stay, those of b go round a ring, and every block is
matched where it is. The bits are those of one process: a score depends on its two rows alone, and ties go to the lower index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsae._core.world import ALONE, World
from fastsae.ops.match import MATCH_COSINE, MATCH_PAIR

_NONE = 1 << 62
"""Index of no match: it ranks behind all others."""


def common(op: str, worlds: Sequence[World]) -> Any:
    """The processes that hold either dictionary; ValueError where they are others."""
    found: list[Any] = [world for world in worlds if world is not ALONE]
    places = {(world.shard, world.shards, world.copies) for world in found}
    if len(places) > 1:
        raise ValueError(f"{op}: both dictionaries must lie on the same processes, got (shard, shards, copies) {sorted(places)}")
    return found[0] if found else ALONE


def everyone(t: Tensor, sizes: Sequence[int], world: Any) -> Tensor:
    """The rows of all processes, or of those of this copy, of which each has so many."""
    return t if world is ALONE else torch.cat(world.within([t] * world.shards, sizes))


def counts(numbers: Sequence[int], world: Any) -> list[list[int]]:
    """These numbers of every process, one list a number."""
    if world is ALONE:
        return [[n] for n in numbers]
    own = torch.tensor([numbers], device=world.device)
    return torch.cat(world.within([own] * world.shards, [1] * world.shards)).T.tolist()


def pair(a: Tensor, b: Tensor, k_ab: int, k_ba: int, eps: float, backend: str | None, world: Any) -> Sequence[Tensor]:
    """``MATCH_PAIR`` of all processes' rows, from those that this one has, on each of them."""
    if world is ALONE:
        return MATCH_PAIR(a, b, k_ab, k_ba, eps, backend=backend)
    ours, theirs = counts((len(a), len(b)), world)
    start = sum(ours[: world.shard])
    forward, backward, low = _none(a, k_ab), _none(b, k_ba), _none(a, 1)
    for turn, (owner, first, block) in enumerate(_blocks(b, theirs, world)):
        back = _none(block, k_ba)
        if len(a) and len(block):
            *found, lowest, at = MATCH_PAIR(a, block, min(k_ab, len(block)), min(k_ba, len(a)), eps, backend=backend)
            forward = _best(forward, (found[0], found[1] + first))
            back = _best(back, (found[2], found[3] + start))
            low = _best(low, (lowest.unsqueeze(1), at.unsqueeze(1) + first), torch.neg)
        of = (world.shard - turn) % world.shards  # whose rows were matched with this process's
        values, index = (_sent(t, owner, of, len(b), world) for t in back)
        backward = _best(backward, (values, index))
    found = [everyone(t, sizes, world) for best, sizes in ((forward, ours), (backward, theirs), (low, ours)) for t in best]
    return *found[:4], found[4].squeeze(1), found[5].squeeze(1)


def cosine(
    a: Tensor, b: Tensor, k: int, absolute: bool, exclude_self: bool, eps: float, backend: str | None, world: Any
) -> Sequence[Tensor]:
    """``MATCH_COSINE`` likewise; with ``exclude_self`` a process's rows of a are its rows of b."""
    if world is ALONE:
        return MATCH_COSINE(a, b, k, absolute, exclude_self, eps, backend=backend)
    ours, theirs = counts((len(a), len(b)), world)
    best = _none(a, k)
    for owner, first, block in _blocks(b, theirs, world):
        own = exclude_self and owner == world.shard
        if len(a) and len(block) > own:
            values, index = MATCH_COSINE(a, block, min(k, len(block) - own), absolute, own, eps, backend=backend)
            best = _best(best, (values, index + first), torch.abs if absolute else None)
    return [everyone(t, ours, world) for t in best]


def _blocks(b: Tensor, sizes: Sequence[int], world: Any) -> Iterator[tuple[int, int, Tensor]]:
    """(whose, first row of all, rows): every process's rows, this one's first."""
    for turn in range(world.shards):
        owner, after = ((world.shard + turn + more) % world.shards for more in (0, 1))
        yield owner, sum(sizes[:owner]), b
        if turn + 1 < world.shards:
            b = _sent(b, (world.shard - 1) % world.shards, (world.shard + 1) % world.shards, sizes[after], world)


def _sent(t: Tensor, to: int, source: int, rows: int, world: Any) -> Tensor:
    """``t`` goes to one process; what comes from another, of so many rows."""
    out = [t[:0]] * world.shards
    out[to] = t
    return world.within(out, [rows * (rank == source) for rank in range(world.shards)])[source]


def _none(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return rows.new_zeros(len(rows), k), torch.full((len(rows), k), _NONE, dtype=torch.int64, device=rows.device)


def _best(
    known: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], rank: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The largest of both in the order of a selection: NaN first, then by ``rank``, then by index."""
    values, index = (torch.cat(both, 1) for both in zip(known, found))
    index, order = index.sort(1)
    values = values.gather(1, order)
    ranks = (values if rank is None else rank(values)).masked_fill(index == _NONE, -torch.inf)
    order = ranks.sort(dim=1, descending=True, stable=True).indices[:, : known[0].shape[1]]
    return values.gather(1, order), index.gather(1, order)
