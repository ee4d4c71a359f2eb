"""Reading stored activations: in order, or in a shuffled one that depends on the seed alone."""

from __future__ import annotations

import collections
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsae._core import checks
from fastsae._core.seeds import stream_seed
from fastsae.formats.weight_files import read_json
from fastsae.store.columns import Shard, digest, map_safetensors
from fastsae.store.writer import MANIFEST, manifests

_BLOCK_BYTES = 4 << 20  # of the widest column, read in one piece
_WINDOW_BLOCKS = 8  # 32 MiB, which the disk is asked for ahead


class ActivationShards:
    """Stored activations: a folder that ``ShardWriter`` has written (``open_activations`` opens files of others).

    Args:
        folder: of it. All writers' shards are read, one writer's after the other's.

    Attributes:
        about: what the writer said. columns: ``{name: (dtype, shape of a row)}``. rows: how many there are; ``len`` too.

    Opening reads manifests and headers and compares sizes; the content is mapped and read when it is used. ``verify`` reads all of it.

    Raises: FileNotFoundError: no such folder, or nothing was written there. ValueError: a manifest or a shard is damaged, or writers
    differ in what they have written.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        folder = Path(folder)
        if not (paths := manifests(folder)[0]):
            raise FileNotFoundError(f"ActivationShards: {folder} holds no {MANIFEST}")
        self.about: dict[str, Any] = {}
        self._digests: dict[Path, str] = {}
        shards: list[Shard] = []
        for number, path in enumerate(paths):
            try:
                manifest = read_json(path)
                about, entries, names = dict(manifest["about"]), list(manifest["shards"]), list(manifest["columns"])
                if manifest["format"] != 1:
                    raise ValueError(f"it is of format {manifest['format']!r}, expected 1")
                for entry in entries:
                    file = folder / Path(str(entry["file"])).name
                    if file.stat().st_size != entry["bytes"]:
                        raise ValueError(f"{file} must have {entry['bytes']} bytes, got {file.stat().st_size}")
                    found = map_safetensors(file)
                    if found.rows != entry["rows"] or set(found.columns) != set(names):
                        raise ValueError(f"{file} must have {entry['rows']} rows of {names}, got {found.rows} of {list(found.columns)}")
                    shards.append(replace(found, columns={name: found.columns[name] for name in names}))
                    self._digests[file] = str(entry["sha256"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"ActivationShards: {path} is damaged: {error!s}") from error
            if number and about != self.about:
                raise ValueError(f"ActivationShards: {path} is about {about!r}, {paths[0]} about {self.about!r}")
            self.about = about
        self._take(folder, shards)

    @classmethod
    def of(cls, path: Path, shards: Sequence[Shard], about: Mapping[str, Any]) -> ActivationShards:
        """Of columns that are mapped already."""
        self = cls.__new__(cls)
        self.about, self._digests = dict(about), {}
        self._take(path, shards)
        return self

    def _take(self, path: Path, shards: Sequence[Shard]) -> None:
        kinds = [{name: (column.dtype, tuple(column.shape[1:])) for name, column in shard.columns.items()} for shard in shards]
        for shard, kind in zip(shards, kinds):
            if kind != kinds[0]:
                raise ValueError(f"ActivationShards: {shard.path} holds {kind}, {shards[0].path} {kinds[0]}")
        if not shards:
            raise FileNotFoundError(f"ActivationShards: nothing was written to {path} yet")
        self.path, self.shards, self.columns = path, list(shards), kinds[0]
        self.rows = sum(shard.rows for shard in shards)
        widest = max(max(column[:1].nbytes for column in shard.columns.values()) if shard.rows else 1 for shard in shards)
        step = max(1, _BLOCK_BYTES // max(widest, 1))
        self.blocks = [(s, r, min(r + step, shard.rows)) for s, shard in enumerate(shards) for r in range(0, shard.rows, step)]

    def __len__(self) -> int:
        return self.rows

    def __repr__(self) -> str:
        return f"ActivationShards({str(self.path)!r}, rows={self.rows}, columns={self.columns})"

    def read(self, start: int, stop: int, columns: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Rows ``start`` to ``stop`` in the order in which they were written, as new tensors."""
        start = checks.integer("ActivationShards.read", "start", start, 0, self.rows, f"rows={self.rows}")
        stop = checks.integer("ActivationShards.read", "stop", stop, start, self.rows, f"rows={self.rows}")
        names = self.checked_names("ActivationShards.read", columns)
        parts: dict[str, list[Tensor]] = {name: [self.shards[0].columns[name][:0]] for name in names}
        first = 0
        for shard in self.shards:
            a, b = max(start - first, 0), min(stop - first, shard.rows)
            first += shard.rows
            if a < b:
                for name in names:
                    parts[name].append(shard.columns[name][a:b])
        return {name: torch.cat(parts[name]) for name in names}

    def verify(self) -> None:
        """Compares every shard's bytes with the hash in the manifest; ValueError names one that differs. Nothing to compare in files of
        other libraries."""
        for path, expected in self._digests.items():
            if digest(path) != expected:
                raise ValueError(f"ActivationShards.verify: {path} is damaged: its content has another hash than it was written with")

    def iterate(
        self,
        batch: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        ranks: int = 1,
        start: int = 0,
        columns: Sequence[str] | None = None,
        window: int = _WINDOW_BLOCKS,
        ahead: int = 2,
        readers: int = 1,
    ) -> Iterator[dict[str, Tensor]]:
        """One pass over all rows, shuffled; ``{name: [rows, ..]}`` a batch, as stored. The rows left over at the end are dropped.

        Args:
            batch: rows a batch of all ranks together; rank r of R gets rows ``batch * r // R`` to ``batch * (r + 1) // R`` of it.
            seed, epoch: decide the order, alone: not the number of ranks, nor ``ahead`` or ``readers``.
            start: number of the first batch, to go on where another iterator stopped.
            columns: which; None: all.
            window: blocks mixed with each other. A block is at most 4 MiB of neighbouring rows of the widest column; all blocks are
                permuted, then the rows of each ``window`` of them. Rows come straight from the files' pages, which the system keeps
                while it has memory for them; each rank copies its own.
            ahead: batches that are made ready while the caller works. readers: threads that make them.
        """
        op = "ActivationShards.iterate"
        batch = checks.integer(op, "batch", batch, 1, max(self.rows, 1), f"rows={self.rows}")
        ranks = checks.integer(op, "ranks", ranks, 1)
        rank = checks.integer(op, "rank", rank, 0, ranks - 1, "ranks - 1")
        start = checks.integer(op, "start", start, 0)
        ahead, readers = checks.integer(op, "ahead", ahead, 0), checks.integer(op, "readers", readers, 1)
        names = self.checked_names(op, columns)
        seed, epoch = checks.integer(op, "seed", seed, 0), checks.integer(op, "epoch", epoch, 0)
        order = _Order(self, seed, epoch, checks.integer(op, "window", window, 1), names)
        return _ahead(ahead, readers, range(start, self.rows // batch), lambda n: order.rows(n * batch, batch, rank, ranks))

    def batches(
        self, size: int, x: str | Sequence[str] | None = None, target: str | None = None, mask: str | None = None, **options: Any
    ) -> ShardBatches:
        """Endless batches for a ``Trainer``, whose position a checkpoint keeps.

        Args:
            size: rows a batch. x, target, mask: columns; x may be left out where there is one column besides those. Several x: a batch
                holds each by its own name, beside "mask", for ``fastsae.trainer.fit_all``.
            options: ``seed``, ``rank``, ``ranks``, ``window``, ``ahead``, ``readers`` of ``iterate``. dtype: of x and target, e.g.
                ``torch.float32``; None: as stored. ignore: ``{"position": 0, "token": [1, 2]}``, rows that do not count (their mask is
                False), though a batch keeps its size: where the column of integers holds that value, or one of these.
        """
        left = [name for name in self.columns if name not in (target, mask)]
        if x is None and len(left) != 1:
            raise ValueError(f"ActivationShards.batches: x must name one of the columns {', '.join(left)}")
        if x is None or isinstance(x, str):
            given = {"x": x or left[0], "target": target, "mask": mask}
        else:
            given = {**{name: name for name in x}, "mask": mask}
            if target is not None or not x or "mask" in x:
                raise ValueError(f"ActivationShards.batches: several x go without target, and none may be named mask, got {list(x)}")
        return ShardBatches(self, size, {role: name for role, name in given.items() if name is not None}, **options)

    def checked_names(self, op: str, columns: Sequence[str] | None) -> list[str]:
        names = list(self.columns) if columns is None else list(columns)
        if unknown := [name for name in names if name not in self.columns]:
            raise ValueError(f"{op}: columns must be of {', '.join(self.columns)}, got {unknown[0]!r}")
        return names


class _Order:
    """The order of one pass: blocks permuted, then the rows of each window of them."""

    def __init__(self, store: ActivationShards, seed: int, epoch: int, window: int, names: Sequence[str]):
        self.shards, self.names, self.seed = store.shards, names, stream_seed(seed, epoch)
        order = torch.randperm(len(store.blocks), generator=torch.Generator().manual_seed(self.seed), device="cpu").tolist()
        blocks = [store.blocks[at] for at in order]
        self.windows = [sorted(blocks[at : at + window]) for at in range(0, len(blocks), window)]
        sizes = [sum(stop - first for _, first, stop in blocks) for blocks in self.windows]
        self.ends = torch.tensor(sizes, dtype=torch.int64, device="cpu").cumsum(0)
        self.order = functools.lru_cache(8)(self._order)

    def rows(self, start: int, count: int, rank: int, ranks: int) -> dict[str, Tensor]:
        """Rows ``start`` to ``start + count`` of the pass, of them the share of a rank."""
        low, high = count * rank // ranks, count * (rank + 1) // ranks
        likes = {name: self.shards[0].columns[name] for name in self.names}
        result = {name: like.new_empty((high - low, *like.shape[1:])) for name, like in likes.items()}
        at = 0  # of the result
        while at < count:
            number = int(torch.searchsorted(self.ends, start + at, right=True))
            begin = int(self.ends[number - 1]) if number else 0
            stop = min(count, int(self.ends[number]) - start)
            chosen = np.sort(self.order(number)[start + at - begin : start + stop - begin])  # neighbours follow each other
            a, b = max(low, at), min(high, stop)
            if a < b:
                self._gather(number, chosen[a - at : b - at], {name: column[a - low : b - low] for name, column in result.items()})
            at = stop
        return result

    def _order(self, number: int) -> Any:
        """The order of a window's rows; the disk is asked for the next one meanwhile."""
        for which, first, stop in itertools.chain(*self.windows[number : number + 2]):
            self.shards[which].prefetch(self.names, first, stop)
        generator = torch.Generator().manual_seed(stream_seed(self.seed, number))
        rows = sum(stop - first for _, first, stop in self.windows[number])
        return torch.randperm(rows, generator=generator, device="cpu").numpy()

    def _gather(self, number: int, chosen: Any, into: Mapping[str, Tensor]) -> None:
        """Rows of a window, ascending, straight from the files' pages: a copy in between would cost as much again."""
        begin = done = 0
        for which, first, stop in self.windows[number]:
            upto = int(np.searchsorted(chosen, begin + stop - first))
            if done < upto:
                for name, out in into.items():
                    # By NumPy: torch would start all its threads, which the caller's step needs.
                    block = _bytes(self.shards[which].columns[name][first:stop])
                    np.take(block, chosen[done:upto] - begin, 0, _bytes(out[done:upto]), "clip")
            begin, done = begin + stop - first, upto


def _bytes(column: Tensor) -> Any:
    """``[rows, bytes of a row]``, the same memory."""
    return column.reshape(column.shape[0], -1).view(torch.uint8).numpy()


def _ahead(ahead: int, readers: int, numbers: range, make: Callable[[int], dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """What ``make`` gives for each number, in that order, made in threads of its own."""
    with ThreadPoolExecutor(readers, "fastsae-batches") as makers:
        waiting: collections.deque[Future[dict[str, Tensor]]] = collections.deque()
        try:
            for number in numbers:
                waiting.append(makers.submit(make, number))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class ShardBatches:
    """Endless batches ``{"x": .., "target": .., "mask": ..}``; see ``ActivationShards.batches``."""

    def __init__(
        self,
        store: ActivationShards,
        size: int,
        roles: Mapping[str, str],
        *,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        ignore: Mapping[str, int | Sequence[int]] | None = None,
        **options: Any,
    ):
        op = "ActivationShards.batches"
        self.store, self.roles, self.dtype, self.options = store, dict(roles), dtype, options
        self.size = checks.integer(op, "size", size, 1, max(len(store), 1), f"rows={len(store)}")
        self.seed = checks.integer(op, "seed", seed, 0)
        self.pass_number, self.position = 0, 0
        store.checked_names(op, [*roles.values(), *(ignore or {})])
        self.ignore: dict[str, Tensor] = {}
        for name, values in (ignore or {}).items():
            kind, shape = store.columns[name]
            if kind.is_floating_point or shape:
                raise ValueError(f"{op}: ignore must name columns of integers, one a row, got {name!r}, {kind} {list(shape)}")
            numbers = [values] if isinstance(values, int) else [checks.integer(op, f"ignore[{name!r}]", v, -(2**63)) for v in values]
            self.ignore[name] = torch.tensor(numbers, dtype=torch.int64, device="cpu")

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            names = list(dict.fromkeys([*self.roles.values(), *self.ignore]))
            for columns in self.store.iterate(
                self.size, seed=self.seed, epoch=self.pass_number, start=self.position, columns=names, **self.options
            ):
                self.position += 1
                batch = {role: columns[name] for role, name in self.roles.items()}
                if self.dtype is not None:
                    batch |= {role: column.to(self.dtype) for role, column in batch.items() if role != "mask"}
                for name, values in self.ignore.items():
                    kept = ~torch.isin(columns[name].to(torch.int64), values)
                    batch["mask"] = kept & checks.mask("ShardBatches", "mask", batch["mask"]) if "mask" in batch else kept
                yield batch
            self.pass_number, self.position = self.pass_number + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """The position: batches that were handed out. ``order`` are what the order depends on besides."""
        return {"seed": self.seed, "pass_number": self.pass_number, "position": self.position, "order": self._order()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on behind the batches that the state has seen; ValueError where the store, the size or the window is another."""
        if missing := [name for name in ("seed", "pass_number", "position", "order") if name not in state]:
            raise ValueError(f"ShardBatches.load_state_dict: the state holds no {missing[0]!r}")
        for name, ours in self._order().items():
            if state["order"].get(name) != ours:
                raise ValueError(f"ShardBatches.load_state_dict: {name} must be {state['order'].get(name)} as in the state, got {ours}")
        self.seed, self.pass_number, self.position = (
            checks.integer("ShardBatches.load_state_dict", name, state[name], 0) for name in ("seed", "pass_number", "position")
        )

    def _order(self) -> dict[str, int]:
        window = self.options.get("window", _WINDOW_BLOCKS)
        return {"rows": len(self.store), "shards": len(self.store.shards), "size": self.size, "window": window}
