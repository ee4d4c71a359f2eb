"""Files of columns: what lies in them, where, and as tensors that read it when it is asked for."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae._core import files
from fastsae._core.extras import needed

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32,
}  # fmt: skip
"""Of a column, by safetensors' names."""

_HEADER_BYTES = 1 << 24


@dataclass(frozen=True)
class Shard:
    """One file: ``rows`` of every column, mapped into memory, and where the bytes of each lie in the file (0: not known)."""

    path: Path
    rows: int
    columns: Mapping[str, Tensor]
    offsets: Mapping[str, int]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a column from the file, in memory of their own: mapped pages would count with the process while the map stands."""
        out = torch.empty_like(self.columns[name][start:stop])
        flat: Any = out.view(torch.uint8).numpy().reshape(-1)
        into = memoryview(flat)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offsets[name] + start * self.columns[name][:1].nbytes)
            while into.nbytes:
                if not (read := file.readinto(into)):
                    raise ValueError(f"{self.path} is damaged: it ends inside of {name}")
                into = into[read:]
        return out

    def prefetch(self, names: Iterable[str], start: int, stop: int) -> None:
        """Asks the system to have these rows in memory soon, where it knows of that."""
        if not self.offsets or not hasattr(os, "posix_fadvise"):
            return
        with open(self.path, "rb", buffering=0) as file:
            for name in names:
                size = self.columns[name][:1].nbytes
                os.posix_fadvise(file.fileno(), self.offsets[name] + start * size, (stop - start) * size, os.POSIX_FADV_WILLNEED)


def map_safetensors(path: Path, *, same_rows: bool = True) -> Shard:
    """The columns of a safetensors file, of equally many rows unless said otherwise; ValueError where it is damaged or no such file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_BYTES):
            raise ValueError(f"{path} is damaged: it claims a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {
                name: (DTYPES[e["dtype"]], [int(n) for n in e["shape"]], int(e["data_offsets"][0]), int(e["data_offsets"][1]))
                for name, e in header.items()
            }
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged or holds other than columns of numbers: {error!r}") from error
    storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    columns: dict[str, Tensor] = {}
    for name, (dtype, shape, start, stop) in entries.items():
        count = math.prod(shape)
        if not shape or min(shape) < 0 or not 0 <= start <= stop <= size - 8 - length or stop - start != count * dtype.itemsize:
            raise ValueError(f"{path} is damaged: {name} claims {dtype} {shape} in bytes {start} to {stop} of {size - 8 - length}")
        raw = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage, 8 + length + start, (stop - start,))  # pyright: ignore[reportCallIssue, reportArgumentType]  # torch's stub lacks it
        if (8 + length + start) % dtype.itemsize:
            raw = raw.clone()  # cannot be viewed where it lies; our own files are aligned
        columns[name] = raw.view(dtype).view(shape)
    offsets = {name: 8 + length + entry[2] for name, entry in entries.items()}
    return shard(path, columns, offsets) if same_rows else Shard(path, 0, columns, offsets)


def shard(path: Path, columns: Mapping[str, Tensor], offsets: Mapping[str, int]) -> Shard:
    """A ``Shard``, whose columns must have equally many rows."""
    rows = {column.shape[0] for column in columns.values()}
    if len(rows) != 1:
        raise ValueError(f"{path} must hold columns of equally many rows, got { ({n: list(c.shape) for n, c in columns.items()}) }")
    return Shard(path, rows.pop(), columns, offsets)


def save(op: str, path: Path, columns: Mapping[str, Tensor]) -> dict[str, Any]:
    """One file of columns; its entry in a manifest."""
    save_file = needed("safetensors.torch", f"{op} needs safetensors", "store").save_file
    files.replace(path, lambda part: save_file({name: column.contiguous() for name, column in columns.items()}, part))
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest(path)}


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    found = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(1 << 22):
            found.update(chunk)
    return found.hexdigest()


def from_readonly(array: object) -> Tensor:
    """A tensor over a NumPy array that cannot be written: nothing here writes to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)  # pyright: ignore[reportArgumentType]
