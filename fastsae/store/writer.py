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


def manifest_name(writer: int) -> str:
    """Of the file that says which shards one writer has finished."""
    return MANIFEST if writer == 0 else f"activations-{writer}.json"


class ShardWriter:
    """Appends rows to a folder of safetensors shards with a manifest; see ``ActivationShards`` for reading.

    Args:
        folder: made where missing. One that a writer has written to before goes on behind its last whole shard: ``rows`` says how many
            rows there are, so the caller knows where to go on.
        about: what the activations are, as JSON values: model, hook, layer, tokeniser, context length. A folder with another one is
            refused.
        rows_a_shard: rows of each shard but the last. Memory: as many rows.
        writer: number of this writer, of several that fill one folder at the same time (a rank); each has its own shards and manifest.

    ``append`` takes columns by name: ``[rows, ..]`` tensors of one height, float32, bfloat16, float16, integers or bool, on any device;
    the first call says which there are. A shard that is full is written, flushed to the disk, hashed (SHA-256) and entered into the
    manifest; a killed writer leaves whole shards. ``close`` (or the end of a ``with`` block without an exception) writes the rest.

    Raises: TypeError, ValueError: columns unlike those before. OSError that names the path: it could not be written; rows that were
    appended since the last shard are kept and tried again by the next call.
    """

    def __init__(
        self, folder: str | os.PathLike[str], about: Mapping[str, Any] | None = None, *, rows_a_shard: int = 1 << 16, writer: int = 0
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
        path = self.folder / manifest_name(self.writer)
        if path.exists():
            found = read_json(path)
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
        files.replace_text(self.folder / manifest_name(self.writer), json.dumps(manifest, indent=1) + "\n")
        self._shards, self._waiting = shards, self._waiting - rows
        self._pending = {name: [column[rows:]] for name, column in whole.items()} if self._waiting else {}
