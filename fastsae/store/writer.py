"""Appending activations to a folder, so that a crash loses no more than the shard that was being filled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fastsae._core import checks, files
from fastsae.formats.weight_files import read_json
from fastsae.store.columns import DTYPES, save

MANIFEST = "activations.json"


def manifests(folder: Path, first: str = MANIFEST) -> tuple[list[Path], bool]:
    """The files that say what each writer of a folder has finished, ``first`` of writer 0; and whether it is one of all, by ``join``."""
    found = sorted(folder.glob(f"{Path(first).stem}*.json"), key=lambda path: (len(path.name), path.name))
    joined = bool(found) and found[0].name == first and bool(read_json(found[0]).get("joined"))
    return found[:1] if joined else found, joined


def manifest_of(folder: Path, writer: int, first: str = MANIFEST) -> tuple[Path, bool]:
    """That of one writer, and whether it is the one of all."""
    joined = manifests(folder, first)[1]
    return folder / (first if joined or writer == 0 else f"{Path(first).stem}-{writer}.json"), joined


def join(folder: str | os.PathLike[str], *, rows: int | None = None) -> bool:
    """Makes one manifest of those that several ``ShardWriter`` or ``LatentWriter`` of a folder have written, one writer's files after the
    other's; called by one process when all have ended, or with ``rows`` by each that ends.

    Args:
        rows: of activations in all: while there are fewer, others are at work, and nothing is done.

    The folder is closed then: any writer of the same ``about`` finds all that is there, and cannot add to it. Returns whether it is.

    Raises: FileNotFoundError: nothing was written. ValueError: writers differ.
    """
    folder = Path(folder)
    first, what = (MANIFEST, "shards") if manifests(folder)[0] else ("latents.json", "parts")
    paths, joined = manifests(folder, first)
    if not paths:
        raise FileNotFoundError(f"join: {folder} holds no {MANIFEST} and no {first}")
    if not joined:
        try:
            found = [read_json(path) for path in paths]
        except FileNotFoundError:  # another process has just done it
            return True
        facts = [{name: value for name, value in manifest.items() if name not in (what, "writers")} for manifest in found]
        if wrong := next((path for path, own in zip(paths, facts) if own != facts[0]), None):
            raise ValueError(f"join: {wrong} must be of what {paths[0]} is of")
        entries = [entry for manifest in found for entry in manifest[what]]
        if rows is not None and sum(entry["rows"] for entry in entries) < rows:
            return False
        files.replace_text(folder / first, json.dumps({**facts[0], what: entries, "joined": True}, indent=1) + "\n")
        for path in paths:
            if path.name != first:
                path.unlink(missing_ok=True)
    return True


class ShardWriter:
    """Appends rows to a folder of safetensors shards with a manifest; see ``ActivationShards`` for reading.

    Args:
        folder: made where missing. One that a writer has written to before goes on behind its last whole shard: ``rows`` says how many
            rows there are, so the caller knows where to go on.
        about: what the activations are, as JSON values: model, hook, layer, tokeniser, context length. A folder with another one is
            refused.
        rows_a_shard: rows of each shard but the last. Memory: as many rows.
        writer: number of this writer, of several that fill one folder at the same time (a rank); each has its own shards and manifest,
            which ``fastsae.store.join`` makes one of. writers: how many there are, if a folder of another number is to be refused.

    ``append`` takes columns by name: ``[rows, ..]`` tensors of one height, float32, bfloat16, float16, integers or bool, on any device;
    the first call says which there are. A shard that is full is written, flushed to the disk, hashed (SHA-256) and entered into the
    manifest; a killed writer leaves whole shards. ``close`` (or the end of a ``with`` block without an exception) writes the rest.

    Raises: TypeError, ValueError: columns unlike those before. OSError that names the path: it could not be written; rows that were
    appended since the last shard are kept and tried again by the next call.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        about: Mapping[str, Any] | None = None,
        *,
        rows_a_shard: int = 1 << 16,
        writer: int = 0,
        writers: int | None = None,
    ):
        self.folder = Path(folder)
        self.rows_a_shard = checks.integer("ShardWriter", "rows_a_shard", rows_a_shard, 1)
        self.writer = checks.integer("ShardWriter", "writer", writer, 0)
        self.about = json.loads(json.dumps(dict(about or {})))  # as a reader finds it
        self.columns: dict[str, list[Any]] | None = None
        self._shards: list[dict[str, Any]] = []
        self._pending: dict[str, list[Tensor]] = {}
        self._waiting = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self.writers = writers
        self._manifest, self.joined = manifest_of(self.folder, self.writer)
        if (path := self._manifest).exists():
            found = read_json(path)
            if not self.joined and found.get("writers") != writers:
                raise ValueError(f"ShardWriter: {path} is of {found.get('writers')} writers, got {writers}: go on with as many")
            if found.get("about") != self.about:
                raise ValueError(f"ShardWriter: {path} is about {found.get('about')!r}, got about={self.about!r}")
            self.columns, self._shards = found["columns"], found["shards"]

    @property
    def rows(self) -> int:
        """Rows in whole shards: where a run that was killed goes on."""
        return sum(entry["rows"] for entry in self._shards)

    def append(self, columns: Mapping[str, Tensor]) -> None:
        """Adds rows; see the class."""
        op = "ShardWriter.append"
        if self.joined:
            raise ValueError(f"{op}: {self.folder} holds all of its writers' shards, and nothing can be added")
        if not columns:
            raise ValueError(f"{op}: columns must name at least one column, got none")
        found: dict[str, list[Any]] = {}
        heights: set[int] = set()
        names = {dtype: name for name, dtype in DTYPES.items()}
        for name, column in columns.items():
            checks.tensor(op, name, column, tuple(names))
            if column.dim() == 0:
                raise ValueError(f"{op}: {name} must have shape [rows, ..], got []")
            heights.add(column.shape[0])
            found[name] = [names[column.dtype], *column.shape[1:]]
        if len(heights) != 1:
            raise ValueError(f"{op}: columns must have equally many rows, got { ({name: list(c.shape) for name, c in columns.items()}) }")
        if self.columns is None:
            self.columns = found
        if found != self.columns:
            raise ValueError(f"{op}: columns must be {self.columns} as before, got {found}")
        for name, column in columns.items():
            self._pending.setdefault(name, []).append(column.detach().to("cpu", copy=True))  # the caller may reuse its own
        self._waiting += heights.pop()
        while self._waiting >= self.rows_a_shard:
            self._write(self.rows_a_shard)

    def close(self) -> None:
        """Writes what is left as a smaller shard."""
        if self._waiting:
            self._write(self._waiting)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()

    def _write(self, rows: int) -> None:
        whole = {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in self._pending.items()}
        self._pending = {name: [column] for name, column in whole.items()}
        path = self.folder / f"{self.writer:03d}-{len(self._shards):06d}.safetensors"
        made = save("ShardWriter", path, {name: column[:rows] for name, column in whole.items()})
        shards = [*self._shards, made | {"rows": rows}]
        manifest = {"format": 1, "about": self.about, "columns": self.columns, "shards": shards}
        manifest |= {} if self.writers is None else {"writers": self.writers}
        files.replace_text(self._manifest, json.dumps(manifest, indent=1) + "\n")
        self._shards, self._waiting = shards, self._waiting - rows
        self._pending = {name: [column[rows:]] for name, column in whole.items()} if self._waiting else {}
