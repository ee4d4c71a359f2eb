"""The processes that hold one dictionary, as a training step sees them. One process is the null object: it changes nothing, costs nothing.

Where features are sharded (``fastsae.distributed``) they are cut into ``virtual`` contiguous ranges, and a process holds some of these
virtual shards. Sums over features are taken per virtual shard and then in a fixed binary tree (``tree``), sums over rows in another one
that depends on nothing but the number of rows: the number of processes and of threads changes no bit.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


class World:
    """One process that holds all features and all rows; sums are torch's own.

    Attributes:
        virtual: number of virtual shards of all processes. cuts: where those of this process begin and end among its features (none where
            features are not cut). start: its first feature. features: of all processes.
        copies: how many processes hold the same features; they divide the rows among them. first: rows before this process's share.
        rank, shard: which of all processes this is, and which of those of its copy.
        replicated: names of parameters and buffers that every process holds whole.
    """

    virtual = copies = 1
    start = first = rank = shard = 0
    features = 0
    cuts: tuple[int, ...] = ()
    replicated: tuple[str, ...] = ()

    def whole(self, name: str) -> bool:
        """Whether every process holds all of a parameter or buffer of this name, also of a module within a module."""
        return name.rpartition(".")[2] in self.replicated

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, one after the other, from those that each has."""
        return rows

    def share(self, rows: Tensor) -> Tensor:
        """Those of all rows that this process scores: all of them, but where others hold the same features."""
        return rows

    def shares(self, t: Tensor, sizes: Tensor | None = None) -> Tensor:
        """What the processes with the same features have, in the order of rows; ``sizes``, where it is not of one a row of their share."""
        return t

    def home(self, t: Tensor) -> Tensor:
        """``[processes, own rows, ..]``: what the processes of all features have for the rows of this one, from ``t`` for its share."""
        return t.unsqueeze(0)

    def back(self, t: Tensor) -> Tensor:
        """For the rows of this process's share what their owners have, from ``t`` for own rows."""
        return t

    def tree(self, parts: Tensor) -> Tensor:
        """The sum over all virtual shards, on every process, from ``parts [own virtual shards, ..]``."""
        return parts[0]

    def total(self, t: Tensor) -> Tensor:
        """``[]``: the sum over the features of all processes, from ``t [own features]``."""
        return t.sum()

    def pick(self, rows: Tensor, at: Tensor) -> Tensor:
        """``[n, ..]``: what lies at ``at [n]`` of the rows of all processes, one after the other (of features: of the first copy)."""
        return rows[at]

    def each(self, t: Tensor) -> Tensor:
        """``[processes, ..]``: what each process has, of one shape on all."""
        return t.unsqueeze(0)

    def count(self, n: Tensor) -> Tensor:
        """The sum of an integer tensor over the processes."""
        return n

    def agree(self, op: str, well: Tensor | bool, settings: object = None) -> Tensor | bool:
        """Whether all is well on all processes; ValueError on all of them where their ``settings`` differ."""
        return well

    def together(self, op: str) -> AbstractContextManager[Any]:
        """Around what all processes do alike: the others hear of an exception that one of them raises in it."""
        return nullcontext()

    def begin(self, op: str, rows: int = 0, settings: object = None) -> None:
        """Before the first exchange: how many rows this process has; ValueError on all of them where their ``settings`` differ."""

    # ------------------------------------------------------------ sums over rows that every process has

    def sum(self, t: Tensor) -> Tensor:
        """``[]``: of all elements."""
        return t.sum()

    def each_sum(self, t: Tensor) -> Tensor:
        """``[n]``: of the elements of each ``t[i]``."""
        return t.sum(tuple(range(1, t.dim())))

    def row_sum(self, t: Tensor) -> Tensor:
        """``t.sum(0)``, in float32 at least."""
        return t.sum(0, dtype=torch.promote_types(t.dtype, torch.float32))

    def row_mean(self, t: Tensor) -> Tensor:
        """``t.mean(0)``."""
        return t.mean(0)


ALONE = World()
LARGE = 1 << 14
"""Elements, of which ``tree`` adds up two at a time."""


def tree(t: Tensor, spare: bool = False) -> Tensor:
    """The sum over the first dimension, by elementwise additions of neighbours in a binary tree: bits that depend on its size alone.
    ``spare``: where nobody needs ``t`` any more; it may hold the sums."""
    if not t.shape[0]:
        return t.new_zeros(t.shape[1:])
    if t[0].numel() >= LARGE and t.shape[0] > 1:  # what is left of the largest power of two, and the rest: little fresh memory at a time
        half = 1 << ((t.shape[0] - 1).bit_length() - 1)
        if t.shape[0] == 2:
            return t[0].add_(t[1]) if spare else t[0] + t[1]
        return tree(t[:half], spare).add_(tree(t[half:], spare))
    while (n := t.shape[0]) > 1:
        pairs = t[: n & ~1 : 2] + t[1::2]
        t = torch.cat([pairs, t[n - 1 :]]) if n % 2 else pairs
    return t[0]
