"""Reading stored activations: in order, or in a shuffled one that depends on the seed alone."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsae._core import checks
from fastsae._core.seeds import stream_seed
from fastsae.formats.weight_files import read_json
from fastsae.store.columns import Shard, digest, map_safetensors
from fastsae.store.writer import MANIFEST

_BLOCK_BYTES = 4 << 20  # of the widest column, read in one piece
_WINDOW_BLOCKS = 16


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
        manifests = sorted(folder.glob(f"{Path(MANIFEST).stem}*.json"), key=lambda path: (len(path.name), path.name))
        if not manifests:
            raise FileNotFoundError(f"ActivationShards: {folder} holds no {MANIFEST}")
        self.about: dict[str, Any] = {}
        self._digests: dict[Path, str] = {}
        shards: list[Shard] = []
        for number, path in enumerate(manifests):
            try:
                manifest = read_json(path)
                about, entries, names = dict(manifest["about"]), list(manifest["shards"]), list(manifest["columns"])
                if manifest["format"] != 1:
                    raise ValueError(f"it is of format {manifest['format']!r}, expected 1")
                for entry in entries:
                    file = folder / Path(str(entry["file"])).name
                    if file.stat().st_size != entry["bytes"]:
                        raise ValueError(f"{file} must have {entry['bytes']} bytes, got {file.stat().st_size}")
                    shards.append(map_safetensors(file))
                    if shards[-1].rows != entry["rows"] or set(shards[-1].columns) != set(names):
                        raise ValueError(
                            f"{file} must have {entry['rows']} rows of {names}, got {shards[-1].rows} of {list(shards[-1].columns)}"
                        )
                    shards[-1] = replace(shards[-1], columns={name: shards[-1].columns[name] for name in names})
                    self._digests[file] = str(entry["sha256"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"ActivationShards: {path} is damaged: {error!s}") from error
            if number and about != self.about:
                raise ValueError(f"ActivationShards: {path} is about {about!r}, {manifests[0]} about {self.about!r}")
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
    ) -> Iterator[dict[str, Tensor]]:
        """One pass over all rows, shuffled; ``{name: [rows, ..]}`` a batch, as stored. The rows left over at the end are dropped.

        Args:
            batch: rows a batch of all ranks together; rank r of R gets rows ``batch * r // R`` to ``batch * (r + 1) // R`` of it.
            seed, epoch: decide the order, alone: not the number of ranks, nor ``ahead``.
            start: number of the first batch, to go on where another iterator stopped.
            columns: which; None: all.
            window: blocks mixed with each other. A block is at most 4 MiB of neighbouring rows of the widest column; all blocks are
                permuted, then the rows of each ``window`` of them. More mix better, and read the disk in smaller pieces.
            ahead: batches that are made ready while the caller works.
        """
        op = "ActivationShards.iterate"
        batch = checks.integer(op, "batch", batch, 1, max(self.rows, 1), f"rows={self.rows}")
        ranks = checks.integer(op, "ranks", ranks, 1)
        rank = checks.integer(op, "rank", rank, 0, ranks - 1, "ranks - 1")
        start = checks.integer(op, "start", start, 0)
        ahead = checks.integer(op, "ahead", ahead, 0)
        names = self.checked_names(op, columns)
        order = _Order(
            self, checks.integer(op, "seed", seed, 0), checks.integer(op, "epoch", epoch, 0), checks.integer(op, "window", window, 1)
        )
        numbers = range(start, self.rows // batch)
        return _ahead(ahead, numbers, lambda number: order.rows(number * batch, batch, rank, ranks, names))

    def batches(self, size: int, x: str | None = None, target: str | None = None, mask: str | None = None, **options: Any) -> ShardBatches:
        """Endless batches for a ``Trainer``, whose position a checkpoint keeps.

        Args:
            size: rows a batch. x, target, mask: columns; x may be left out where there is one column besides those.
            options: ``seed``, ``rank``, ``ranks``, ``window``, ``ahead`` of ``iterate``. dtype: of x and target, e.g. ``torch.float32``;
                None: as stored.
        """
        left = [name for name in self.columns if name not in (target, mask)]
        if x is None and len(left) != 1:
            raise ValueError(f"ActivationShards.batches: x must name one of the columns {', '.join(left)}")
        given = {"x": x or left[0], "target": target, "mask": mask}
        return ShardBatches(self, size, {role: name for role, name in given.items() if name is not None}, **options)

    def checked_names(self, op: str, columns: Sequence[str] | None) -> list[str]:
        names = list(self.columns) if columns is None else list(columns)
        if unknown := [name for name in names if name not in self.columns]:
            raise ValueError(f"{op}: columns must be of {', '.join(self.columns)}, got {unknown[0]!r}")
        return names


class _Order:
    """The order of one pass: blocks permuted, then the rows of each window of them."""

    def __init__(self, store: ActivationShards, seed: int, epoch: int, window: int):
        self.shards, self.seed = store.shards, stream_seed(seed, epoch)
        order = torch.randperm(len(store.blocks), generator=torch.Generator().manual_seed(self.seed), device="cpu").tolist()
        blocks = [store.blocks[at] for at in order]
        self.windows = [sorted(blocks[at : at + window]) for at in range(0, len(blocks), window)]
        self.ends = torch.tensor([sum(stop - first for _, first, stop in w) for w in self.windows], dtype=torch.int64, device="cpu").cumsum(
            0
        )
        self.mixed = lru_cache(maxsize=2)(self._mixed)
        self.asked = -1

    def _mixed(self, number: int) -> tuple[Tensor, Tensor]:
        """Of a window: its rows in the order of the pass, and where each of its blocks begins among them."""
        sizes = torch.tensor([0, *(stop - first for _, first, stop in self.windows[number])], dtype=torch.int64, device="cpu")
        begins = sizes.cumsum(0)
        generator = torch.Generator().manual_seed(stream_seed(self.seed, number))
        return torch.randperm(int(begins[-1]), generator=generator, device="cpu"), begins

    def rows(self, start: int, count: int, rank: int, ranks: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Rows ``start`` to ``start + count`` of the pass, of them the share of a rank."""
        pieces: list[tuple[Shard, Tensor]] = []  # in the order of the result
        at = start
        while at < start + count:
            number = int(torch.searchsorted(self.ends, at, right=True))
            self._ask(number, names)
            self._ask(number + 1, names)
            begin = int(self.ends[number - 1]) if number else 0
            stop = min(start + count, int(self.ends[number]))
            order, begins = self.mixed(number)
            chosen = order[at - begin : stop - begin].sort().values  # neighbours on the disk follow each other
            edges = torch.searchsorted(chosen, begins).tolist()
            for (which, first, _), low, a, b in zip(self.windows[number], begins.tolist(), edges, edges[1:]):
                if a < b:
                    pieces.append((self.shards[which], chosen[a:b] - low + first))
            at = stop
        low, high = count * rank // ranks, count * (rank + 1) // ranks
        result = {name: self.shards[0].columns[name].new_empty((high - low, *self.shards[0].columns[name].shape[1:])) for name in names}
        at = 0
        for shard, rows in pieces:
            a, b = max(low - at, 0), min(high - at, len(rows))
            if a < b:
                for name in names:  # by NumPy: torch would start all its threads, which the caller's step needs
                    np.take(_bytes(shard.columns[name]), rows[a:b].numpy(), 0, _bytes(result[name][at + a - low : at + b - low]), "clip")
            at += len(rows)
        return result

    def _ask(self, number: int, names: Sequence[str]) -> None:
        """The system reads a window while the one before it is used."""
        if self.asked < number < len(self.windows):
            self.asked = number
            for which, first, stop in self.windows[number]:
                for name in names:
                    if self.shards[which].offsets.get(name):
                        self.shards[which].need(name, first, stop)


def _bytes(column: Tensor) -> Any:
    """``[rows, bytes of a row]``, the same memory."""
    return column.reshape(column.shape[0], -1).view(torch.uint8).numpy()


def _ahead(ahead: int, numbers: range, make: Any) -> Iterator[dict[str, Tensor]]:
    if ahead == 0:
        yield from map(make, numbers)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="fastsae-store") as pool:
        waiting: collections.deque[Future[dict[str, Tensor]]] = collections.deque()
        try:
            for number in numbers:
                waiting.append(pool.submit(make, number))
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
        **options: Any,
    ):
        self.store, self.roles, self.dtype, self.options = store, dict(roles), dtype, options
        self.size = checks.integer("ActivationShards.batches", "size", size, 1, max(len(store), 1), f"rows={len(store)}")
        self.seed = checks.integer("ActivationShards.batches", "seed", seed, 0)
        self.pass_number, self.position = 0, 0
        store.checked_names("ActivationShards.batches", list(roles.values()))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            names = list(dict.fromkeys(self.roles.values()))
            for columns in self.store.iterate(
                self.size, seed=self.seed, epoch=self.pass_number, start=self.position, columns=names, **self.options
            ):
                self.position += 1
                batch = {role: columns[name] for role, name in self.roles.items()}
                if self.dtype is not None:
                    batch |= {role: batch[role].to(self.dtype) for role in ("x", "target") if role in batch}
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
        return {
            "rows": len(self.store),
            "shards": len(self.store.shards),
            "size": self.size,
            "window": self.options.get("window", _WINDOW_BLOCKS),
        }
