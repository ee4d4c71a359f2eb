"""Activations that others have stored: ``.npy``, safetensors, SAELens' caches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastsae._core.extras import needed
from fastsae.store.columns import Shard, from_readonly, map_safetensors, shard
from fastsae.store.shards import ActivationShards
from fastsae.store.writer import MANIFEST


def open_activations(path: str | os.PathLike[str]) -> ActivationShards:
    """Stored activations of this library or another, mapped, not read.

    Args:
        path: a folder of ``ShardWriter``; a ``.npy`` file or a folder of them (one column, ``x``, of as many rows as the first dimension
            says); a ``.safetensors`` file or a folder of them (their tensors are the columns); a folder of SAELens'
            ``CacheActivationsRunner`` (Arrow; the hook's column ``[rows * context, D]`` and ``token_ids``).

    Returns: ``ActivationShards``. Its ``about`` is empty but for SAELens' folders, where ``context_size`` is what a sequence had.

    Raises: FileNotFoundError: nothing of these is there. ValueError: damaged, or of several kinds. ImportError: Arrow without pyarrow.
    """
    path = Path(path)
    if (path / MANIFEST).exists() or any(path.glob(f"{Path(MANIFEST).stem}-*.json")):
        return ActivationShards(path)
    for ending, read in ((".arrow", _arrow), (".safetensors", lambda file, _: [map_safetensors(file)]), (".npy", _npy)):
        found = [path] if path.is_file() and path.suffix == ending else sorted(path.glob(f"*{ending}")) if path.is_dir() else []
        if found:
            about: dict[str, Any] = {}
            return ActivationShards.of(path, [part for file in found for part in read(file, about)], about)
    if not path.exists():
        raise FileNotFoundError(f"open_activations: {path} is neither a file nor a folder")
    raise FileNotFoundError(f"open_activations: {path} holds no {MANIFEST} and no .npy, .safetensors or .arrow files")


def _npy(path: Path, about: dict[str, Any]) -> Iterator[Shard]:
    try:
        array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.ndim == 0 or not array.flags.c_contiguous:
            raise ValueError(f"it must be an array [rows, ..] in C order, got {list(array.shape)}")
        yield shard(path, {"x": from_readonly(array)}, {"x": int(array.offset)})
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"open_activations: {path} is damaged or holds no numbers: {error}") from error


def _arrow(path: Path, about: dict[str, Any]) -> Iterator[Shard]:
    pa = needed("pyarrow", f"open_activations: {path} needs pyarrow", "store")
    try:
        batches = list(pa.ipc.open_stream(pa.memory_map(str(path))))
    except pa.ArrowInvalid as error:
        raise ValueError(f"open_activations: {path} is damaged: {error}") from error
    for batch in batches:
        columns: dict[str, Any] = {}
        for name, column in zip(batch.schema.names, batch.columns):
            values, shape = getattr(column, "storage", column), [len(column)]
            while hasattr(values, "flatten") and pa.types.is_nested(values.type):
                outer, values = len(values), values.flatten()
                if outer and len(values) % outer:
                    raise ValueError(f"open_activations: {path}: {name} has rows of different lengths")
                shape.append(len(values) // outer if outer else 0)
            numbers = from_readonly(values.to_numpy(zero_copy_only=True))
            context = shape[1] if len(shape) > 1 else 1
            about.setdefault("context_size", context)
            columns[name] = numbers.view(shape[0] * context, *shape[2:])
        yield shard(path, columns, {})
