"""Training's state of a sharded SAE, each process's part by torch.distributed.checkpoint: goes on, on another number of processes too."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from fastsae._core import checks, files
from fastsae._core.world import World
from fastsae.distributed.module import ShardedCrossLayerTranscoder, ShardedSAE
from fastsae.distributed.world import Ranks
from fastsae.formats import weight_files
from fastsae.optim.optimiser import Optimiser
from fastsae.sae.activations import BatchTopK, TopK
from fastsae.sae.checkpoints import KINDS, Checkpoint, Trained, alike, read, storable, trained_of
from fastsae.sae.module import SAE

warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable", UserWarning)  # of a part, which one process writes alone
_MANIFEST, _REST = "manifest.json", "rest.pt"
ShardedSAE.checkpoints = ShardedCrossLayerTranscoder.checkpoints = sys.modules[__name__]


def save_checkpoint(
    folder: str | os.PathLike[str], sae: Trained, opt: Optimiser | None = None, extra: Mapping[str, Any] | None = None
) -> Path:
    """Writes everything that training goes on from, each process the features that it holds; called by all processes.

    Args:
        folder: on a file system that all processes see; is made where it does not exist.
        sae: what ``shard`` returned, of any kind. opt: its optimiser, or None.
        extra: as in ``fastsae.save_checkpoint``; rank 0's is kept.

    The folder holds ``manifest.json``, written last, and the folder that it names; the state before is removed after that. A crash at any
    moment leaves the older state or the new one. Nothing is padded: a virtual shard is an entry of its own. For another library
    ``gathered(sae)``, for one file ``convert_checkpoint``.

    Raises: TypeError, ValueError: what is not a sharded SAE or cannot be stored. OSError: it could not be written; the older state is
    there. RuntimeError: a save in the background has failed, see ``async_save_checkpoint``.
    """
    op, world = "save_checkpoint", _world("save_checkpoint", sae)
    with world.together(op):
        begun = _begun(op, Path(folder), sae, world, opt, extra)
    return _commit(world, *begun)


def async_save_checkpoint(
    folder: str | os.PathLike[str], sae: Trained, opt: Optimiser | None = None, extra: Mapping[str, Any] | None = None
) -> Future[Path]:
    """As ``save_checkpoint``, written by a thread from a copy in the CPU's memory while training goes on; called by all processes.

    Returns: a future; ``result()`` waits, and raises what went wrong: OSError, on all processes. The next call of ``save_checkpoint``,
    ``async_save_checkpoint`` or ``load_checkpoint`` waits too, and raises RuntimeError where nothing has been written; a warning says so at
    once. Wait for the last one before ``torch.distributed.destroy_process_group``.

    Memory: the weights and moments of this process once more. A process that takes ``timeout`` (of ``shard``) longer than this one counts
    as lost.
    """
    op, world = "async_save_checkpoint", _world("async_save_checkpoint", sae)
    with world.together(op):
        folder, data, entries = _begun(op, Path(folder), sae, world, opt, extra)
        copies = {name: t.detach().to("cpu", copy=True) for name, t in entries.items()}
    saver = _SAVERS[world]
    saver.last = saver.thread.submit(_commit, world, folder, data, copies)
    saver.last.add_done_callback(_warn)
    return saver.last


class _Saver:
    """Of a group's saves the thread, the last one in it, and their number."""

    def __init__(self) -> None:
        self.thread, self.number = ThreadPoolExecutor(1, "fastsae-save"), 0
        self.last: Future[Path] | None = None


_SAVERS: WeakKeyDictionary[Ranks, _Saver] = WeakKeyDictionary()


def _warn(done: Future[Path]) -> None:
    if (error := done.exception()) is not None:
        warnings.warn(f"async_save_checkpoint: nothing has been written: {error}", stacklevel=1)


def _settled(op: str, world: Ranks) -> None:
    """Waits for a save in the background; RuntimeError where it failed."""
    saver = _SAVERS.setdefault(world, _Saver())
    if saver.last is not None:
        last, saver.last = saver.last, None
        if (error := last.exception()) is not None:
            raise RuntimeError(f"{op}: the save in the background before it has failed, and wrote nothing: {error}") from error


def _begun(
    op: str, folder: Path, sae: Trained, world: Ranks, opt: Optimiser | None, extra: Mapping[str, Any] | None
) -> tuple[Path, Path, dict[str, Tensor]]:
    """(folder, the folder of this state, what lies in it of this process), when all processes are here and rank 0 has made it."""
    _settled(op, world)
    _SAVERS[world].number += 1
    state = None if opt is None else opt.state_dict()
    rest = _rest(sae.config(), world.virtual, extra, state)
    folder.mkdir(parents=True, exist_ok=True)
    world.begin(op, 0, (str(folder), None if opt is None else opt.steps))
    data = folder / f"data-{_agreed(world, _number(folder) + 1 if world.rank == 0 else 0)}"
    if world.rank == 0:
        _make(data, rest)
    _agreed(world, 0)
    return folder, data, {} if world.copy else dict(_entries(world, sae.state_dict(), state, _stacked(sae.config())))


def _rest(config: dict[str, Any], virtual: int, extra: Mapping[str, Any] | None, state: Mapping[str, Any] | None) -> dict[str, Any]:
    rest = {"config": config, "virtual": virtual, "extra": dict(extra or {}), "opt": state and _numbers(state)}
    return {part: storable(part, value) for part, value in rest.items()}


def _make(data: Path, rest: dict[str, Any]) -> None:
    shutil.rmtree(data, ignore_errors=True)  # of a save that did not end
    data.mkdir(parents=True)
    files.replace(data / _REST, lambda part: weight_files.save_pt(part, rest))


def _commit(world: Ranks, folder: Path, data: Path, entries: dict[str, Any]) -> Path:
    """Writes this process's part, and rank 0 the manifest when it knows of all: by the store, as training has the exchanges. OSError on all
    of them where one could not."""

    def attempt(write: Callable[[], object]) -> str:
        try:
            write()
        except (Exception, CheckpointException) as error:  # the others wait for what it says
            return f"{type(error).__name__} on rank {world.order[world.rank]}: {error}"
        return ""

    number, store = _SAVERS[world].number, world._store  # pyright: ignore[reportPrivateUsage] # of this folder

    def heard(key: str) -> str:  # waited for without holding the store, which training may need
        end = time.monotonic() + world.timeout.total_seconds()
        while not store.check([f"save {number} {key}"]):
            if time.monotonic() > end:
                return (
                    f"a process was lost, or has written for {world.timeout.total_seconds():g} s longer than rank {world.order[world.rank]}"
                )
            time.sleep(0.01)
        return store.get(f"save {number} {key}").decode()[1:]

    said = attempt(lambda: save(entries, checkpoint_id=data / f"part-{world.rank}", no_dist=True))
    store.set(f"save {number} {world.rank}", f" {said}")  # a store keeps nothing empty
    if world.rank == 0:
        said = next(filter(None, map(heard, map(str, range(world.size)))), "") or attempt(lambda: _name(folder, data, world.size))
        store.set(f"save {number} named", f" {said}")
    if said := heard("named"):
        raise OSError(f"save_checkpoint: {said}")
    return folder


def _name(folder: Path, data: Path, parts: int) -> None:
    files.replace_text(folder / _MANIFEST, json.dumps({"format": 1, "data": data.name, "parts": parts}))
    for older in folder.glob("data-*"):
        if older != data:
            shutil.rmtree(older, ignore_errors=True)


def convert_checkpoint(source: str | os.PathLike[str], target: str | os.PathLike[str], *, virtual: int | None = None) -> Path:
    """A folder of ``save_checkpoint`` to a file of ``fastsae.save_checkpoint``, or the other way, in one process without a group. All is
    kept: weights, buffers, the optimiser's state, ``extra``; training goes on from either.

    Args:
        source, target: a folder and a file, or a file and a folder.
        virtual: of the folder that is made: the number of virtual shards, see ``shard``. None where a file is made.

    Memory: weights and moments. Read only folders that you trust, see ``load_checkpoint``. Returns ``target``.

    Raises: FileNotFoundError. ValueError: damaged, the state of an optimiser that is not of ``fastsae.optim``, ``virtual``.
    """
    op, source, target = "convert_checkpoint", Path(source), Path(target)
    if source.is_dir() is not (virtual is None):
        raise ValueError(f"{op}: virtual must be given where source is a file and not where it is a folder, got {source}, {virtual}")
    if virtual is None:
        rest, places = _read(source)
        entries = {
            name: torch.empty(m.size, dtype=m.properties.dtype, device="cpu") for held in places.values() for name, m in held.items()
        }
        _load(entries, places)
        parts: dict[str, dict[int, Tensor]] = {}
        for name, t in entries.items():
            whole, _, number = name.rpartition(".")
            parts.setdefault(whole if number.isdigit() else name, {})[int(number) if number.isdigit() else 0] = t
        dim = _stacked(rest["config"])
        tensors = {name: torch.cat([by[n] for n in sorted(by)], dim) if len(by) > 1 else by[min(by)] for name, by in parts.items()}
        content = {"format": 1, "config": rest["config"], "extra": rest["extra"], "opt": rest["opt"], "stepped": None}
        content["sae"] = {name.removeprefix("sae."): t for name, t in tensors.items() if name.startswith("sae.")}
        for name, entry in (rest["opt"] or {"state": {}})["state"].items():
            entry |= {key.removeprefix(f"opt.{name}."): t for key, t in tensors.items() if key.startswith(f"opt.{name}.")}
        files.replace(target, lambda part: weight_files.save_pt(part, content))
        return target
    content, fresh = read(source)
    if content.get("stepped") is not None:
        raise ValueError(f"{op}: {source} must hold no state of another library's optimiser")
    first = fresh if isinstance(fresh, SAE) else fresh[0]
    features, virtual = first.d_sae, checks.integer(op, "virtual", virtual, 2)
    width = -(-features // virtual)
    cuts = [min(width * shard, features) for shard in range(virtual + 1)]
    world = World()
    world.cuts, world.replicated = tuple(cuts), Ranks.replicated
    data = target / f"data-{_number(target) + 1}"
    _make(data, _rest(content["config"], virtual, content["extra"], content["opt"]))
    entries = _entries(world, content["sae"], content["opt"], _stacked(content["config"]))
    save(dict(entries), checkpoint_id=data / "part-0", no_dist=True)
    _name(target, data, 1)
    return target


def load_checkpoint(folder: str | os.PathLike[str], sae: Trained, opt: Optimiser | None = None) -> dict[str, Any]:
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
    folder: str | os.PathLike[str], sae: Trained, opt: Optimiser | None, also: Callable[[dict[str, Any]], object] | None = None
) -> Checkpoint:
    """``load_checkpoint``; ``also`` takes over what it needs of ``extra``, or raises before the module is written to."""
    op, folder, world = "load_checkpoint", Path(folder), _world("load_checkpoint", sae)
    with world.together(op):
        _settled(op, world)
        rest, places = _read(folder)
        if rest["virtual"] != world.virtual:
            raise ValueError(f"{op}: {folder} is of virtual={rest['virtual']}, the SAE of virtual={world.virtual}")
        ours, theirs = alike(sae, trained_of(rest["config"]))
        if opt is not None and rest["opt"] is None:
            raise ValueError(f"{op}: {folder} holds no optimiser's state")
        state = None if opt is None else _filled(opt, rest["opt"])
        local = {name: torch.empty_like(t) for name, t in sae.state_dict().items()}
        _load(dict(_entries(world, local, state, _stacked(rest["config"]))), places)
        if also is not None:
            also(rest["extra"])
        world.begin(op, 0, [str(path) for path in places])  # nothing is written before all have read
    if opt is not None and state is not None:
        opt.load_state_dict(state)
    sae.load_state_dict(local)
    for one, other in zip(ours, theirs):
        if isinstance(other.activation, (TopK, BatchTopK)):
            one.k = other.k
    return Checkpoint(sae, rest["extra"])


def _read(folder: Path) -> tuple[dict[str, Any], dict[Path, Any]]:
    """What the manifest's state holds besides tensors, and its parts: the sizes of their tensors by name."""
    manifest = weight_files.read_json(folder / _MANIFEST)
    data = folder / str(manifest["data"])
    parts = [data / f"part-{number}" for number in range(manifest["parts"])]
    rest, _ = weight_files.load(data / _REST)
    try:
        return rest, {part: FileSystemReader(part).read_metadata().state_dict_metadata for part in parts}
    except Exception as error:  # reading damaged bytes may raise anything
        raise ValueError(f"load_checkpoint: {data} is damaged: {error!r}") from error


def _load(entries: dict[str, Any], places: Mapping[Path, Any]) -> None:
    """Fills the tensors from the parts that hold them."""
    left = dict(entries)
    try:
        for path, held in places.items():
            if mine := {name: left.pop(name) for name in held if name in left}:
                load(mine, checkpoint_id=path, no_dist=True)
    except CheckpointException as error:
        raise ValueError(f"load_checkpoint: {next(iter(places)).parent} is damaged or of something else: {error}") from error
    if left:
        raise ValueError(f"load_checkpoint: {next(iter(places)).parent} holds no {next(iter(left))}")


def file_of(_: str, path: str | os.PathLike[str]) -> Path:
    """The folder of checkpoints."""
    return Path(path)


def exists(folder: Path) -> bool:
    """Whether there is a state to go on from."""
    return (folder / _MANIFEST).exists()


def _world(op: str, sae: Any) -> Ranks:
    world = sae.world if isinstance(sae, KINDS) else None
    if not isinstance(world, Ranks):
        raise TypeError(f"{op}: sae must be what fastsae.distributed.shard returned for several virtual shards, got {type(sae).__name__}")
    return world


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


def _stacked(config: Mapping[str, Any]) -> int:
    """The dimension of features: the second one in a stack."""
    return int("dictionaries" in config)


def _entries(world: World, tensors: Mapping[str, Tensor], state: Mapping[str, Any] | None, dim: int) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of this process, of a module and its optimiser, by name, one a virtual shard of what is sharded."""
    held = [(name, f"sae.{name}", t) for name, t in tensors.items()]
    for name, entry in state["state"].items() if state else ():
        held += [(name, f"opt.{name}.{key}", t) for key, t in entry.items() if isinstance(t, Tensor)]
    first = getattr(world, "shard", 0) * (len(world.cuts) - 1)
    for name, entry, t in held:
        if world.whole(name):
            yield entry, t
            continue
        for shard, (start, stop) in enumerate(pairwise(world.cuts), first):
            if stop > start:
                yield f"{entry}.{shard}", t.narrow(dim, start, stop - start)
