"""A module as files of this library's format and of others': what ``save``, ``load``, ``from_pretrained`` of an ``SAE`` do."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fastsae._core import checks, files
from fastsae.formats import common, pretrained, weight_files


class Module(Protocol):
    """What files take of a module."""

    d_sae: int
    d_out: int
    tied: bool
    silent: Tensor
    W_enc: nn.Parameter
    W_dec: nn.Parameter

    def portable(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, configuration), the normalisation folded in, no memory shared between tensors."""
        ...


M = TypeVar("M", bound=Module)


def contents(sae: Module, folder: Path, **more: Any) -> dict[Path, files.Fill]:
    """What fills the files of ``save``; ``more`` as in ``weight_files.contents``."""
    tensors, config = sae.portable()
    if bool(sae.silent.any()):  # as text: other readers expect no more tensors than they know
        more["silent"] = sae.silent.tolist()
    names = {ours: theirs for theirs, ours in pretrained.NAMES.items()}
    tensors = {names.get(name, name): tensor.contiguous().cpu() for name, tensor in tensors.items()}
    return weight_files.contents(folder, "fastsae", tensors, config, **more)


def save(sae: Module, folder: str | os.PathLike[str]) -> Path:
    """``SAE.save``."""
    folder = Path(folder)
    filled = contents(sae, folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.replace_all(filled)
    return folder


def load(make: Callable[..., M], folder: str | os.PathLike[str], device: torch.device | str | None) -> tuple[M, dict[str, Any]]:
    """``SAE.load``, and the ``more`` that was written beside."""
    try:
        loaded = pretrained.read(folder, "fastsae", common.Options())
        return made(make, loaded, None, device), loaded.more
    except ValueError as error:
        raise ValueError(f"SAE.load: {folder} is not a folder that SAE.save wrote: {error}") from error


def save_stack(members: Sequence[Module], folder: str | os.PathLike[str]) -> Path:
    """``SAEs.save``."""
    folder = Path(folder)
    save, filled = secrets.token_hex(8), dict[Path, files.Fill]()
    for number, member in enumerate(members):
        filled |= contents(member, folder / str(number), stack=[save, number, len(members)])
        (folder / str(number)).mkdir(parents=True, exist_ok=True)
    files.replace_all(filled)
    return folder


def load_stack(make: Callable[..., M], folder: str | os.PathLike[str], device: torch.device | str | None) -> list[M]:
    """The members of ``SAEs.load``."""
    folder = Path(folder)
    numbers = sorted(int(part.name) for part in folder.iterdir() if part.name.isdecimal())
    if not numbers or numbers != list(range(len(numbers))):
        raise ValueError(f"SAEs.load: {folder} must hold the folders 0, 1, .., got {numbers}")
    members, first = list[M](), None
    for number in numbers:
        member, more = load(make, folder / str(number), device)
        stack = more.get("stack")  # of files from before there was one: None in all
        first = stack if number == 0 else first
        if stack != (first and [first[0], number, first[2]]):
            raise ValueError(f"SAEs.load: {folder} must hold one save, got members of several")
        members.append(member)
        if first is not None and number + 1 == first[2]:  # what follows is of an older, larger stack
            break
    if first is not None and len(members) != first[2]:
        raise ValueError(f"SAEs.load: {folder} must hold {first[2]} members, got {len(members)}")
    return members


def from_pretrained(
    make: Callable[..., M],
    source: Any,
    format: pretrained.Format | None,  # noqa: A002
    subfolder: str | None,
    revision: str | None,
    options: common.Options,
    device: torch.device | str | None,
) -> M:
    """``SAE.from_pretrained``; ``options`` unchecked."""
    op = "SAE.from_pretrained"
    checks.instance(op, "source", source, (str, os.PathLike), "a path or the name of a Hub repository")
    if format is not None and format not in pretrained.FORMATS:
        raise ValueError(f"{op}: format must be one of {', '.join(pretrained.FORMATS)} or None, got {format!r}")
    for name in ("fold_decoder_norm", "pre_bias"):
        if (value := getattr(options, name)) is not None:
            checks.flag(op, name, value)
    if options.k is not None:
        checks.integer(op, "k", options.k, 1)
    if options.dtype is not None and options.dtype not in checks.FLOATS:
        raise TypeError(f"{op}: dtype must be float32, bfloat16, float16 or float64, got {options.dtype}")
    if not Path(source).exists() and pretrained.is_repository(source):
        path = pretrained.fetch(str(source), subfolder, revision, format)
    else:
        path = Path(source, subfolder) if subfolder else Path(source)
    try:
        return made(make, pretrained.read(path, format, options), options.dtype, device)
    except ValueError as error:
        raise ValueError(f"{op}: {error}") from error


def made(make: Callable[..., M], loaded: common.Loaded, dtype: torch.dtype | None, device: torch.device | str | None) -> M:
    """The module, in evaluation mode, that has these tensors as its parameters, without a copy where dtype and device are theirs."""
    config, tensors, more = loaded
    exact = ("running_threshold",)
    try:
        dtype = dtype or tensors["W_dec"].dtype
        tensors = {name: tensor.to(device=device, dtype=tensor.dtype if name in exact else dtype) for name, tensor in tensors.items()}
        # On the meta device, so that no size that a configuration claims is ever allocated.
        sae: Any = make(config, dtype=dtype, device="meta")
        W = tensors["W_dec"]
        if W.dim() != 2 or tuple(W.shape) != (sae.d_sae, sae.d_out):
            raise ValueError(f"W_dec must have shape [F={sae.d_sae}, {sae.d_out}], got {list(W.shape)}")
        silent = W.new_tensor(more.get("silent", [0] * sae.d_sae), dtype=torch.int64)
        if bool((silent < 0).any()):
            raise ValueError(f"silent must be numbers of tokens, got {int(silent.min())}")
        state = {"silent": silent, "scale": W.new_ones(2, dtype=torch.float32)}
        if "running_threshold" in dict(sae.named_buffers()) and "running_threshold" not in tensors:
            raise ValueError("running_threshold is missing, above which evaluation keeps scores")
        sae.load_state_dict({**state, **tensors}, assign=True)
        if sae.tied:
            sae.W_enc = sae.W_dec
    except (AttributeError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"configuration and tensors do not fit: {error!r}") from error
    return sae.eval()


def save_pretrained(sae: Module, folder: str | os.PathLike[str], format: str, metadata: Any) -> Path:  # noqa: A002
    """``SAE.save_pretrained``."""
    op = "SAE.save_pretrained"
    if format not in pretrained.WRITABLE:
        raise ValueError(f"{op}: format must be one of {', '.join(pretrained.WRITABLE)}, got {format!r}")
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(f"{op}: metadata must be a mapping, got {type(metadata).__name__}")
    if format == "fastsae":
        if metadata:
            raise ValueError(f"{op}: metadata does not go with the format 'fastsae'")
        return save(sae, folder)
    tensors, config = sae.portable()
    return pretrained.write(folder, format, config, tensors, metadata)
