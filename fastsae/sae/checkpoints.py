"""Training's state in one file: an SAE or a stack of them with its buffers, an optimiser, what else a run goes on from."""

from __future__ import annotations

import contextlib
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastsae._core import checks, files
from fastsae.formats import weight_files
from fastsae.sae.activations import BatchTopK, TopK
from fastsae.sae.cross_layer import CrossLayerTranscoder
from fastsae.sae.crosscoder import of_config
from fastsae.sae.module import SAE
from fastsae.sae.stack import SAEs

Trained = SAE | SAEs | CrossLayerTranscoder
KINDS = (SAE, SAEs, CrossLayerTranscoder)


class Stateful(Protocol):
    """An optimiser, of torch or of ``fastsae.optim``."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class Checkpoint(NamedTuple):
    """What ``load_checkpoint`` found."""

    sae: Any  # of the kind that was asked for, or that the file holds: ``Trained``
    extra: dict[str, Any]


def save_checkpoint(
    path: str | os.PathLike[str], sae: Trained, opt: Stateful | None = None, extra: Mapping[str, Any] | None = None
) -> Path:
    """Writes everything that training goes on from into one file; a crash at any moment leaves the older file, or the new one, whole.

    Args:
        path: of the file; its folder is made where missing. The file is written beside it under a name of its own, flushed to the disk and
            renamed: several processes may write one path, and the last one counts.
        sae: an ``SAE`` (also ``Crosscoder``), ``SAEs`` or ``CrossLayerTranscoder``, with its buffers (silent features, running threshold,
            normalisation, which is not folded here).
        opt: an optimiser with ``state_dict()``, or None.
        extra: numbers (NumPy's become Python's), text, tensors, and lists, tuples and dictionaries of them.

    Raises: TypeError: another module; anything else in ``extra`` or the optimiser's state (it could not be read back without
    running code). IsADirectoryError: ``path`` is a folder. OSError that names ``path``: it could not be written; the older file is there.
    """
    checks.instance("save_checkpoint", "sae", sae, KINDS, "an SAE, SAEs or a CrossLayerTranscoder")
    if sae.world.virtual > 1:
        raise ValueError("save_checkpoint: the SAE is sharded: fastsae.distributed.save_checkpoint writes it")
    path = file_of("save_checkpoint", path)
    content: dict[str, Any] = {"format": 1, "config": sae.config(), "sae": sae.state_dict(), "extra": dict(extra or {})}
    content |= {"opt": None if opt is None else opt.state_dict(), "stepped": _stepped(sae, opt)}
    content |= {part: storable(part, content[part]) for part in ("config", "opt", "extra")}
    files.replace(path, lambda part: weight_files.save_pt(part, content))
    return path


def _stepped(sae: Trained, opt: object) -> dict[str, Any] | None:
    """What a torch optimiser's state does not say: its class, and the names of the parameters that it numbers."""
    if not isinstance(opt, torch.optim.Optimizer) or isinstance(getattr(opt, "parameters", None), Mapping):  # by name: ours
        return None
    names = {id(p): name for name, p in sae.named_parameters()}
    return {"class": type(opt).__name__, "names": [[names.get(id(p), "") for p in group["params"]] for group in opt.param_groups]}


def file_of(op: str, path: str | os.PathLike[str]) -> Path:
    """The path of a file that can be written: its folder is there."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{op}: a checkpoint is a file, {path} is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def exists(path: Path) -> bool:
    """Whether there is a state to go on from."""
    return path.exists()


def load_checkpoint(
    path: str | os.PathLike[str], sae: Trained | None = None, opt: Stateful | None = None, *, device: torch.device | str | None = None
) -> Checkpoint:
    """Reads a file of ``save_checkpoint``; nothing in it is run.

    Args:
        path: of the file.
        sae: a module of these that takes the state in place; None builds a module of the stored configuration.
        opt: takes its state in place (``load_state_dict``).
        device: of a module built here; default the CPU.

    Returns: ``Checkpoint(sae, extra)``.

    A module of another configuration or dtype is refused. What the file's may differ in: ``k``, which is taken over, and ``l1``, ``l0``,
    ``aux``, ``dead_after``, ``rate`` and ``bandwidth``, where the module's own stay. Everything is compared before anything is written.

    Raises: FileNotFoundError; TypeError: ``sae`` is no module of these; ValueError for a damaged file, or one that does not fit ``sae`` or
    ``opt``. Both are then what they were.
    """
    return restore(path, sae, opt, device)


_OWN = ("k", "l1", "l0", "aux", "dead_after", "rate", "bandwidth")


def restore(
    path: str | os.PathLike[str],
    sae: Trained | None,
    opt: Stateful | None,
    device: torch.device | str | None = None,
    also: Callable[[dict[str, Any]], object] | None = None,
) -> Checkpoint:
    """``load_checkpoint``; ``also`` takes over what it needs of ``extra``, or raises before the module is written to."""
    path = Path(path)
    if sae is not None:
        checks.instance("load_checkpoint", "sae", sae, KINDS, "an SAE, SAEs or a CrossLayerTranscoder")
    with contextlib.ExitStack() as undo:
        try:
            content, fresh = read(path)
            if sae is None:
                sae = fresh.to_empty(device=device or "cpu")
                for name, buffer in sae.named_buffers():  # which the earliest files do not all have
                    buffer.fill_(name.endswith("scale"))
            ours, theirs = alike(sae, fresh)
            if missing := [name for name, _ in sae.named_parameters() if name not in content["sae"]]:  # of a subclass
                raise ValueError(f"it has no {missing[0]!r}, which the module has")
            if opt is not None:
                undo.callback(opt.load_state_dict, opt.state_dict())
                try:
                    _check_optimiser(content, sae, opt)
                    opt.load_state_dict(content["opt"])
                except Exception as error:
                    reason = error if isinstance(error, ValueError) else repr(error)
                    raise ValueError(f"its optimiser's state does not fit {type(opt).__name__}: {reason}") from error
        except (FileNotFoundError, PermissionError, IsADirectoryError, FloatingPointError):  # the last: of a step before, on a GPU
            raise
        except Exception as error:  # reading damaged bytes may raise anything
            reason = error if isinstance(error, (ValueError, RuntimeError)) else repr(error)
            raise ValueError(f"load_checkpoint: {path} is damaged or of something else: {reason}") from error
        if also is not None:
            also(content["extra"])
        undo.pop_all()
    sae.load_state_dict(content["sae"])
    for one, other in zip(ours, theirs):
        if isinstance(other.activation, (TopK, BatchTopK)):
            one.k = other.k
    return Checkpoint(sae, content["extra"])


def read(path: Path) -> tuple[dict[str, Any], Trained]:
    """What a file holds, checked, and a module of its configuration that holds nothing yet."""
    content, _ = weight_files.load(path)
    config, state, extra = content["config"], content["sae"], content["extra"]
    if content["format"] != 1 or not isinstance(extra, dict):
        raise ValueError(f"it is of format {content['format']!r}, expected 1")
    layered, stacked = "layers" in config, "dictionaries" in config
    W_dec = checks.tensor("its state", "W_dec", state["layers.0.W_dec" if layered else "W_dec"])
    if stacked and len(config["dictionaries"]) != len(W_dec):
        raise ValueError(f"it claims {len(config['dictionaries'])} dictionaries and holds {len(W_dec)}")
    fresh = trained_of(config, dtype=W_dec.dtype)
    _check_state(state, fresh)
    return content, fresh


def trained_of(config: Mapping[str, Any], **options: Any) -> Trained:
    """A module of a configuration, on the meta device."""
    make = CrossLayerTranscoder.from_config if "layers" in config else SAEs.from_config if "dictionaries" in config else of_config
    return make(config, device="meta", **options)


def alike(sae: Trained, fresh: Trained) -> tuple[list[SAE], list[SAE]]:
    """The SAEs of both, of one configuration but for what may differ; ValueError otherwise."""
    ours, theirs = ([module] if isinstance(module, SAE) else [*module] for module in (sae, fresh))
    kinds = [next((kind for kind in KINDS[:2] if isinstance(module, kind)), CrossLayerTranscoder) for module in (sae, fresh)]
    if kinds[0] is not kinds[1] or len(ours) != len(theirs):
        held = "one SAE" if kinds[1] is SAE else f"{len(theirs)} {'dictionaries' if kinds[1] is SAEs else 'layers'}"
        raise ValueError(f"it holds {held}, the module is {type(sae).__name__}")
    for one, other in zip(ours, theirs):
        own, held = ({"dtype": str(m.W_dec.dtype), **m.config()} for m in (one, other))
        if wrong := [name for name in (*held, *own) if name not in _OWN and held.get(name) != own.get(name)]:
            raise ValueError(f"it holds {wrong[0]}={held.get(wrong[0])!r}, the module has {own.get(wrong[0])!r}")
    return ours, theirs


def _check_state(state: Mapping[str, Any], fresh: Trained) -> None:
    """The names, shapes and dtypes of a module's state, and what its buffers can be; ValueError otherwise."""
    expected, parameters = fresh.state_dict(), dict(fresh.named_parameters(remove_duplicate=False))
    for name in dict.fromkeys((*expected, *state)):
        if name not in state and name in ("silent", "scale"):  # of a state from before there were these
            continue
        if name not in state or name not in expected:
            raise ValueError(f"its state {'has no' if name in expected else 'has an unknown'} {name!r}")
        held, want = state[name], expected[name]
        like = isinstance(held, Tensor) and (
            held.dtype == want.dtype if name in parameters else held.is_floating_point() == want.is_floating_point()
        )
        if not like or held.shape != want.shape or held.layout is not torch.strided or held.device.type != "cpu":
            got = f"{held.dtype} {list(held.shape)}" if isinstance(held, Tensor) else type(held).__name__
            raise ValueError(f"its {name} must be {want.dtype} {list(want.shape)}, got {got}")
        if name not in parameters and not bool(
            (held.isfinite() & ((held > 0) if name.endswith("scale") else (held >= 0) | (not name.endswith("silent")))).all()
        ):
            raise ValueError(f"its {name} is out of range")


def _check_optimiser(content: Mapping[str, Any], sae: Trained, opt: Stateful) -> None:
    """What a torch optimiser's ``load_state_dict`` does not look at: ValueError where the state is of another one."""
    state, stepped, ours = content["opt"], content.get("stepped"), _stepped(sae, opt)
    if state is None:
        raise ValueError("it holds no optimiser's state")
    if ours is None or not isinstance(opt, torch.optim.Optimizer):
        return
    if len(state["param_groups"]) != len(opt.param_groups):
        raise ValueError(f"it has {len(state['param_groups'])} groups of parameters, the optimiser {len(opt.param_groups)}")
    if stepped is not None:
        kin = issubclass(getattr(torch.optim, stepped["class"], object), type(opt))
        if not kin and stepped["class"] not in [kind.__name__ for kind in type(opt).__mro__]:
            raise ValueError(f"it is of {stepped['class']}")
        if stepped["names"] != ours["names"]:
            raise ValueError(f"it steps {stepped['names']}, the optimiser {ours['names']}")
    for theirs, group in zip(state["param_groups"], opt.param_groups):
        for name, value in theirs.items():
            if isinstance(group.get(name), (int, float)) and not isinstance(value, (int, float, Tensor)):
                raise ValueError(f"{name} is {value!r}, the optimiser has {group[name]!r}")
        entries = [state["state"].get(number, {}) for number in theirs["params"]]
        kinds = {(p.dim(), frozenset(entry)) for entry, p in zip(entries, group["params"]) if entry}
        if len(kinds) > len({dim for dim, _ in kinds}):  # Adafactor has one for matrices and one for vectors
            raise ValueError(f"parameters have different states: {[sorted(entry) for entry in entries]}")
        for entry, p in zip(entries, group["params"]):
            for name, value in entry.items():
                elementwise = type(opt).__module__.startswith("torch.") and not isinstance(opt, torch.optim.LBFGS)
                if not elementwise or not isinstance(value, Tensor) or value.numel() == 1:
                    continue
                if value.dim() != p.dim() or any(size not in (1, whole) for size, whole in zip(value.shape, p.shape)):
                    raise ValueError(f"{name} has shape {list(value.shape)}, the parameter {list(p.shape)}")


def storable(name: str, value: Any) -> Any:
    """What ``torch.load(weights_only=True)`` reads back: of these types exactly, and keys that are numbers or text."""
    value = checks.plain(value)  # a schedule's rate, of NumPy's cosine
    if type(value) in (dict, OrderedDict, Counter):  # the last: a scheduler's milestones
        if wrong := [key for key in value if type(key) not in (bool, int, float, str)]:
            raise TypeError(f"save_checkpoint: keys of {name} must be numbers or text, got {type(wrong[0]).__name__}")
        return type(value)({key: storable(f"{name}.{key}", item) for key, item in value.items()})
    if type(value) in (list, tuple, torch.Size):
        return type(value)(storable(f"{name}.{index}", item) for index, item in enumerate(value))
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, torch.nn.Parameter) or value.is_quantized or value.is_nested or value.device.type == "meta":
            raise TypeError(
                f"save_checkpoint: {name} must be an ordinary tensor, got {type(value).__name__} {value.dtype} on {value.device}"
            )
    elif value is not None and type(value) not in (bool, int, float, str):
        raise TypeError(f"save_checkpoint: {name} must be a number, text, tensor, list, tuple or dict, got {type(value).__name__}")
    return value
