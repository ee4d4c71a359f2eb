"""Training's state of a sharded SAE, each process's part by torch.distributed.checkpoint: goes on, on another number of processes too."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from fastsae._core import checks, files
from fastsae.distributed.module import ShardedSAE, sharded
from fastsae.distributed.world import Ranks
from fastsae.formats import weight_files
from fastsae.optim.optimiser import Optimiser
from fastsae.sae.activations import BatchTopK, TopK
from fastsae.sae.checkpoints import Checkpoint, alike, storable
from fastsae.sae.module import SAE

_MANIFEST, _REST = "manifest.json", "rest.pt"
ShardedSAE.checkpoints = sys.modules[__name__]


def save_checkpoint(folder: str | os.PathLike[str], sae: SAE, opt: Optimiser | None = None, extra: Mapping[str, Any] | None = None) -> Path:
    """Writes everything that training goes on from, each process the features that it holds; called by all processes.

    Args:
        folder: on a file system that all processes see; is made where it does not exist.
        sae: what ``shard`` returned. opt: its optimiser, or None.
        extra: as in ``fastsae.save_checkpoint``; rank 0's is kept.

    The folder holds ``manifest.json``, written last, and the folder that it names; the state before is removed after that. A crash at any
    moment leaves the older state or the new one. Nothing is padded: a virtual shard is an entry of its own. For one file, or for
    another library, ``gathered(sae)``.

    Raises: TypeError, ValueError: what is not a sharded SAE or cannot be stored. OSError: it could not be written; the older state is
    there.
    """
    op, folder, world = "save_checkpoint", Path(folder), _world("save_checkpoint", sae)
    with world.together(op):
        state = None if opt is None else opt.state_dict()
        rest = {"config": sae.config(), "virtual": world.virtual, "extra": dict(extra or {}), "opt": state and _numbers(state)}
        rest = {part: storable(part, value) for part, value in rest.items()}
        folder.mkdir(parents=True, exist_ok=True)
        world.begin(op, 0, (str(folder), None if opt is None else opt.steps))
        data = folder / f"data-{_agreed(world, (_number(folder) + 1) if world.rank == 0 else 0)}"
        if world.rank == 0:
            shutil.rmtree(data, ignore_errors=True)  # of a save that did not end
            data.mkdir()
            files.replace(data / _REST, lambda part: weight_files.save_pt(part, rest))
        _agreed(world, 0)
        save(dict(_entries(sae, state)), checkpoint_id=data, process_group=world.callers)
        _agreed(world, 0)
        if world.rank == 0:
            files.replace_text(folder / _MANIFEST, json.dumps({"format": 1, "data": data.name}))
            for older in folder.glob("data-*"):
                if older != data:
                    shutil.rmtree(older, ignore_errors=True)
        _agreed(world, 0)
    return folder


def load_checkpoint(folder: str | os.PathLike[str], sae: SAE, opt: Optimiser | None = None) -> dict[str, Any]:
    """Reads what ``save_checkpoint`` wrote, on any number of processes, in place; called by all. Returns its ``extra``.

    Args:
        folder: as in ``save_checkpoint``. torch.distributed.checkpoint keeps its index as a pickle, which may run code: read only folders
            that you trust.
        sae: what ``shard`` returned, of the same configuration and the same ``virtual`` (see ``fastsae.load_checkpoint`` for what may
            differ). opt: its optimiser, or None.

    Raises: FileNotFoundError: there is no whole checkpoint. ValueError: it does not fit ``sae`` or ``opt``, or is damaged. All processes'
    modules are then what they were.
    """
    return restore(folder, sae, opt).extra


def restore(
    folder: str | os.PathLike[str], sae: SAE, opt: Optimiser | None, also: Callable[[dict[str, Any]], object] | None = None
) -> Checkpoint:
    """``load_checkpoint``; ``also`` takes over what it needs of ``extra``, or raises before the module is written to."""
    op, folder, world = "load_checkpoint", Path(folder), _world("load_checkpoint", sae)
    with world.together(op):
        data = folder / str(weight_files.read_json(folder / _MANIFEST)["data"])
        rest, _ = weight_files.load(data / _REST)
        if rest["virtual"] != world.virtual:
            raise ValueError(f"{op}: {folder} is of virtual={rest['virtual']}, the SAE of virtual={world.virtual}")
        fresh = SAE.from_config(rest["config"], device="meta")
        alike(sae, fresh)
        if opt is not None and rest["opt"] is None:
            raise ValueError(f"{op}: {folder} holds no optimiser's state")
        state = None if opt is None else _filled(opt, rest["opt"])
        local = {name: torch.empty_like(t) for name, t in sae.state_dict().items()}
        world.begin(op, 0, (str(folder), data.name))
        entries = dict(_entries(sae, state, local))
        try:
            load(entries, checkpoint_id=data, process_group=world.callers)
        except CheckpointException as error:  # on all processes
            raise ValueError(f"{op}: {data} is damaged or of something else: {error}") from error
        if also is not None:
            also(rest["extra"])
        _agreed(world, 0)  # nothing is written before all have read
    if opt is not None and state is not None:
        opt.load_state_dict(state)
    sae.load_state_dict(local)
    if isinstance(fresh.activation, (TopK, BatchTopK)):
        sae.k = fresh.k
    return Checkpoint(sae, rest["extra"])


def file_of(_: str, path: str | os.PathLike[str]) -> Path:
    """The folder of checkpoints."""
    return Path(path)


def exists(folder: Path) -> bool:
    """Whether there is a state to go on from."""
    return (folder / _MANIFEST).exists()


def _world(op: str, sae: Any) -> Ranks:
    checks.instance(op, "sae", sae, ShardedSAE, "what fastsae.distributed.shard returned for several virtual shards")
    return sae.world


def _agreed(world: Ranks, number: int) -> int:
    """Rank 0's number, when all processes are here."""
    return int(world.each(torch.tensor(number, device=world.device))[0])


def _number(folder: Path) -> int:
    """Of the state that the manifest names, 0 without one."""
    manifest = folder / _MANIFEST
    return int(str(weight_files.read_json(manifest)["data"]).removeprefix("data-")) if manifest.exists() else 0


def _numbers(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimiser's state without its tensors."""
    by_name = {
        name: {key: value for key, value in entry.items() if not isinstance(value, Tensor)} for name, entry in state["state"].items()
    }
    return {**state, "state": by_name}


def _filled(opt: Optimiser, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The state with room for its tensors."""
    entries = {name: {**entry, **opt.room(name)} for name, entry in numbers["state"].items()}
    return {**numbers, "state": entries}


def _entries(
    sae: ShardedSAE | SAE, state: Mapping[str, Any] | None, local: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of this process by name, one a virtual shard of what is sharded."""
    world: Any = sae.world
    tensors = [(name, f"sae.{name}", t) for name, t in (local or sae.state_dict()).items()]
    for name, entry in state["state"].items() if state else ():
        tensors += [(name, f"opt.{name}.{key}", t) for key, t in entry.items() if isinstance(t, Tensor)]
    first = world.shard * (len(world.cuts) - 1)
    for name, entry, t in tensors:
        if not sharded(world, name):
            yield entry, t
            continue
        for shard, (start, stop) in enumerate(pairwise(world.cuts), first):
            if stop > start:
                yield f"{entry}.{shard}", t[start:stop]
