"""The world of several processes: bytes move and integers add up, in a group of their own beside the caller's."""

from __future__ import annotations

import contextlib
import secrets
import threading
import zlib
from collections.abc import Generator, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastsae._core.world import World, tree


class RankError(RuntimeError):
    """Another process failed or was lost; the message names its rank and operation. This process's part is what it was before the step,
    but the group is gone where that happened within a step: go on from a checkpoint."""


class SettingsError(ValueError):
    """Processes were called with different settings; raised on all of them, and nothing has been changed."""


class Ranks(World):
    """Features sharded over the processes of ``group``, and every process with rows of its own.

    What a process raises inside ``together`` reaches the others: before the first exchange through the numbers of rows, which it takes part
    in, so that all go on; after it through the store, whereupon it leaves its group, which ends what the others wait for.

    With ``copies`` of the dictionary each is held by ``shards`` processes, ranks ``copy * shards + shard``, which score the rows they own.

    Attributes:
        rows: of every process, of the operation that is running. share_rows: of those of this copy. sizes: features of every shard. sent:
            bytes that this process has sent to others.
    """

    replicated = ("b_dec", "W_skip", "scale", "running_threshold")

    def __init__(
        self, group: dist.ProcessGroup, timeout: timedelta, device: torch.device, copies: int = 1, order: Sequence[int] | None = None
    ):
        """``order``: ranks of the group, by copy and shard."""
        self.callers, self.timeout = group, timeout
        self.device = device if device.type == "cuda" else torch.device("cpu")
        self.size, self.copies = dist.get_world_size(group), copies
        self.order = list(range(self.size)) if order is None else list(order)
        self.rank, self.shards = self.order.index(dist.get_rank(group)), self.size // copies
        self.copy, self.shard = divmod(self.rank, self.shards)
        self._of_copy = slice(self.copy * self.shards, (self.copy + 1) * self.shards)
        name = [secrets.token_hex(8)]
        dist.broadcast_object_list(name, dist.get_global_rank(group, 0), group)
        default = dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage] # torch has no public name for it
        self._store = dist.PrefixStore(f"fastsae/{name[0]}", default)  # pyright: ignore[reportPrivateImportUsage] # documented
        # Not by new_group, which all processes of the default group would have to call.
        kind: Any = dist.ProcessGroupNCCL if device.type == "cuda" else dist.ProcessGroupGloo
        self._group: Any = kind(self._store, self.rank, self.size, timeout)
        self.rows: list[int] = []
        self.sent = self._calls = 0
        self._op = "shard"
        self._begun, self._inside, self._broken = False, False, ""

    def cut(self, features: int, virtual: int) -> None:
        """Says which features this process holds."""
        width, each = -(-features // virtual), virtual // self.shards
        bounds = [min(width * shard, features) for shard in range(virtual + 1)]
        own = bounds[self.shard * each : (self.shard + 1) * each + 1]
        self.features, self.virtual, self.start, self.cuts = features, virtual, own[0], tuple(bound - own[0] for bound in own)
        self.sizes = [b - a for a, b in pairwise(bounds[::each])]

    def __deepcopy__(self, memo: Any) -> Ranks:
        return self  # the processes of a copied module are the same

    @property
    def group(self) -> Any:
        if self._broken:
            raise RankError(f"{self._op}: {self._broken}; this group can do no more, go on from a checkpoint in a new one")
        return self._group

    # ------------------------------------------------------------ exchanges

    def swap(self, out: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
        """``out[r]`` goes to process r, and ``rows[r]`` rows come from it: one all-to-all of bytes."""
        shape, width = out[0].shape[1:], out[0].shape[1:].numel()
        if self.size == 1:
            return [out[0]]
        got = out[0].new_empty(sum(rows) * width)
        flat, sizes = torch.cat([t.reshape(-1) for t in out]), [t.numel() for t in out]
        self._call("alltoall_base", got, flat, [n * width for n in rows], sizes)
        self.sent += (sum(sizes) - sizes[self.rank]) * flat.element_size()
        return [t.reshape(-1, *shape) for t in got.split([n * width for n in rows])]

    def gather(self, rows: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        return torch.cat(self.swap([rows] * self.size, self.rows if sizes is None else sizes))

    def within(self, out: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
        """``swap`` among the processes of this copy."""
        return self._some(self._of_copy, out, rows)

    def _some(self, which: slice, out: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
        every, sizes = [out[0][:0]] * self.size, [0] * self.size
        every[which], sizes[which] = out, rows
        return self.swap(every, sizes)[which]

    @property
    def share_rows(self) -> list[int]:
        return self.rows[self._of_copy]

    @property
    def first(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride] # of the operation that is running
        return sum(self.rows[: self._of_copy.start])

    def share(self, rows: Tensor) -> Tensor:
        return rows[self.first : self.first + sum(self.share_rows)]

    def shares(self, t: Tensor, sizes: Tensor | None = None) -> Tensor:
        if self.copies == 1:
            return t
        of = self._shares if sizes is None else [int(part.sum()) for part in sizes.split(self._shares)]
        return torch.cat(self._some(slice(self.shard, None, self.shards), [t] * self.copies, of))

    @property
    def _shares(self) -> list[int]:
        return [sum(self.rows[copy * self.shards : (copy + 1) * self.shards]) for copy in range(self.copies)]

    def home(self, t: Tensor) -> Tensor:
        return torch.stack(self.within(t.split(self.share_rows), [self.rows[self.rank]] * self.shards))

    def back(self, t: Tensor) -> Tensor:
        return torch.cat(self.within([t] * self.shards, self.share_rows))

    def each(self, t: Tensor) -> Tensor:
        return self.gather(t.unsqueeze(0), [1] * self.size)

    def tree(self, parts: Tensor) -> Tensor:
        return tree(torch.cat(self.within([tree(parts).unsqueeze(0)] * self.shards, [1] * self.shards)))

    def total(self, t: Tensor) -> Tensor:
        return self.tree(torch.stack([self.sum(part) for part in t.tensor_split(self.cuts[1:-1])]))

    def pick(self, rows: Tensor, at: Tensor) -> Tensor:
        sizes, asked = (self.each(torch.tensor(len(t), device=rows.device)) for t in (rows, at))
        ends = sizes.cumsum(0)
        own = self.gather(at, asked.tolist()) - (ends[self.rank] - len(rows))
        parts = [rows[of[(of >= 0) & (of < len(rows))]] for of in own.split(asked.tolist())]
        owner = torch.bucketize(at, ends, right=True)
        got = torch.cat(self.swap(parts, torch.bincount(owner, minlength=self.size).tolist()))
        return torch.empty_like(got).index_copy_(0, owner.argsort(stable=True), got)

    def count(self, n: Tensor) -> Tensor:
        if self.size > 1:
            n = n.clone()
            self._call("allreduce", [n])
        return n

    def _call(self, collective: str, *arguments: Any) -> None:
        _ = self.group  # raises where it is gone
        try:
            getattr(self._group, collective)(*arguments).wait()
        except RuntimeError as error:
            self._broken = self._told("broken") or f"a process was lost, or has not answered within {self.timeout.total_seconds():g} s"
            self._leave()
            raise RankError(f"{self._op}: {self._broken}; rank {self.order[self.rank]} ends here, go on from a checkpoint") from error

    # ------------------------------------------------------------ agreement

    def sum(self, t: Tensor) -> Tensor:
        while t.dim():
            t = tree(t)
        return t

    def each_sum(self, t: Tensor) -> Tensor:
        return torch.stack([self.sum(part) for part in t])

    def row_sum(self, t: Tensor) -> Tensor:
        return tree(t)

    def row_mean(self, t: Tensor) -> Tensor:
        return tree(t) / len(t)

    def agree(self, op: str, well: Tensor | bool, settings: object = None) -> bool:
        return all(self._alike(op, int(well), settings))

    def begin(self, op: str, rows: int = 0, settings: object = None) -> None:
        self._op, self._begun = op, True
        self.rows = self._alike(op, rows, settings)

    def _alike(self, op: str, number: int, settings: object) -> list[int]:
        """The number of every process, -1 of one that failed; what the processes do is the same."""
        said = f"{op}, {settings}"
        self._calls += 1
        heads = self.each(torch.tensor([number, zlib.crc32(said.encode())], device=self.device)).tolist()
        if (failed := next((rank for rank, (n, _) in enumerate(heads) if n < 0), None)) is not None:
            raise RankError(f"{op}: {self._told(f'{self._calls}/{failed}')}; nothing has been changed")
        if (other := next((rank for rank, (_, code) in enumerate(heads) if code != heads[0][1]), None)) is not None:
            text = torch.tensor(list(said.encode()), dtype=torch.uint8, device=self.device)
            sizes = self.each(torch.tensor(len(text), device=self.device)).tolist()
            every = [bytes(part.tolist()).decode() for part in self.gather(text, sizes).split(sizes)]
            raise SettingsError(
                f"{op}: all processes must be called alike, got {every[0]} on rank {self.order[0]} and {every[other]} on rank "
                f"{self.order[other]}"
            )
        return [n for n, _ in heads]

    @contextlib.contextmanager
    def together(self, op: str) -> Generator[None]:
        if self._inside:
            yield
            return
        _ = self.group  # raises where it is gone
        self._inside, self._begun, self._op = True, False, op
        try:
            yield
        except (RankError, SettingsError, FloatingPointError):  # which all processes know of; the last: steps that all refuse
            raise
        except BaseException as error:
            self._tell(op, error)
            raise
        finally:
            self._inside = False

    def _tell(self, op: str, error: BaseException) -> None:
        said = f"rank {self.order[self.rank]} failed in {op}: {type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):  # the store, or the others, may be gone
            if self._begun or not isinstance(error, Exception):
                self._store.set("broken", said)
                self._broken = said
                self._leave()
            else:
                self._store.set(f"{self._calls + 1}/{self.rank}", said)
                self._alike(op, -1, None)

    def _told(self, key: str) -> str:
        """What a process has written before it left, or nothing."""
        said = [""]

        def ask() -> None:
            with contextlib.suppress(RuntimeError):  # of a store whose process is gone
                said[0] = self._store.get(key).decode() if self._store.check([key]) else ""

        asking = threading.Thread(target=ask, daemon=True)  # behind a link that is cut a store never answers
        asking.start()
        asking.join(min(5, self.timeout.total_seconds()))
        return said[0]

    def _leave(self) -> None:
        """Closes the connections, so that the others' exchanges fail at once and not when their time is over."""
        if self.device.type == "cuda":
            self._group.abort()
        self._group = None
