"""Weight files of this library and of others, read without executing or trusting what is in them.

safetensors and ``.npz`` hold nothing but arrays (pickled objects are refused), ``.pt`` is read by torch's weights-only unpickler. Sizes
that a file claims are compared with what it holds before memory is asked for.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILES: dict[str, tuple[str, str | None]] = {
    "fastsae": ("sae.safetensors", "cfg.json"),
    "sparsify": ("sae.safetensors", "cfg.json"),
    "saelens": ("sae_weights.safetensors", "cfg.json"),
    "dictionary_learning": ("ae.pt", "config.json"),
    "gemma_scope": ("params.npz", None),
}
"""Names of each format's weights and configuration in a folder."""

_JSON_BYTES = 1 << 24


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of at most 16 MiB; ValueError otherwise."""
    if path.stat().st_size > _JSON_BYTES:
        raise ValueError(f"{path} must be at most {_JSON_BYTES} bytes of JSON, got {path.stat().st_size}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_tensors(path: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors``, ``.pt`` or ``.npz`` file on the CPU, only those in ``names`` where given; or ValueError."""
    readers = {".safetensors": _read_safetensors, ".pt": _read_pt, ".pth": _read_pt, ".npz": _read_npz}
    reader = readers.get(path.suffix)
    if reader is None:
        if not path.exists():
            raise FileNotFoundError(f"{path} is neither a folder nor a file")
        raise ValueError(f"{path} must end in {', '.join(readers)}")
    tensors = reader(path, names)
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type != "cpu":
            raise ValueError(f"{path}: {name} must be a dense tensor, got layout {tensor.layout} on {tensor.device}")
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape)):
            raise ValueError(f"{path}: {name} claims the shape {list(tensor.shape)} but holds {tensor.untyped_storage().nbytes()} bytes")
    return tensors


def _read_safetensors(path: Path, names: Collection[str] | None) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f"reading {path.name} needs safetensors: pip install 'fastsae-kernels[hub]'") from error
    try:
        with safe_open(path, framework="pt") as file:  # pyright: ignore[reportArgumentType]
            # Copies: what safetensors returns is the file itself, mapped, and changes or goes with it.
            return {name: file.get_tensor(name).clone() for name in sorted(file.keys()) if names is None or name in names}
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _read_pt(path: Path, names: Collection[str] | None) -> dict[str, Tensor]:
    with open(path, "rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # an unpickler raises what it stumbles over
            lines = str(error).strip().split("\n")
            reason = next((line.strip() for line in lines if "WeightsUnpickler error" in line), lines[0])
            raise ValueError(f"{path} is not a file of tensors that torch.load(weights_only=True) reads: {reason}") from error
    if isinstance(state, dict) and {"config", "sae", "extra"} <= state.keys():  # of save_checkpoint
        state = state["sae"]
    if not isinstance(state, dict):
        raise ValueError(f"{path} must hold a state dict of named tensors, got {type(state).__name__}")
    for name, value in state.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise ValueError(f"{path} must hold a state dict of named tensors, got {type(value).__name__} for {name!r}")
    return {name: value for name, value in state.items() if names is None or name in names}


def _read_npz(path: Path, names: Collection[str] | None) -> dict[str, Tensor]:
    import numpy as np

    tensors: dict[str, Tensor] = {}
    with open(path, "rb") as raw:
        try:
            with zipfile.ZipFile(raw) as archive:
                for member in archive.infolist():
                    name = member.filename.removesuffix(".npy")
                    if names is not None and name not in names:
                        continue
                    with archive.open(member) as file:
                        _check_header(name, file, member.file_size)
                    with archive.open(member) as file:
                        array = np.lib.format.read_array(file, allow_pickle=False)
                    tensors[name] = torch.from_numpy(np.ascontiguousarray(array))
        except Exception as error:  # so does a reader of archives
            raise ValueError(f"{path} is not an .npz file of numbers: {error}") from error
    return tensors


def _check_header(name: str, file: Any, size: int) -> None:
    """An array's header claims floating point numbers, and as many as there are bytes for; ValueError otherwise."""
    from numpy.lib import format as npy

    version = npy.read_magic(file)
    header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if header is None:
        raise ValueError(f"{name}: version {version} of the array format")
    shape, _, dtype = header(file)
    if dtype.kind != "f":
        raise ValueError(f"{name} must hold floating point numbers, got {dtype}")
    held = size - file.tell()
    if math.prod(shape) * dtype.itemsize != held:
        raise ValueError(f"{name} claims the shape {list(shape)} of {dtype} but holds {held} bytes")


def locate(source: str | os.PathLike[str], format: str | None = None) -> tuple[str, Path, Path | None]:  # noqa: A002
    """(format, weights, configuration or None) of a folder or of the weights' file in it.

    ``fastsae`` and ``sparsify`` share their names; the configuration tells them apart. Raises FileNotFoundError where a file is not there,
    ValueError where no known format, or more than one, is.
    """
    path = Path(source)
    if path.is_file():
        folder, weights = path.parent, path
        ends = {".npz": ("gemma_scope",), ".pt": ("dictionary_learning",), ".pth": ("dictionary_learning",)}
        found = [name for name, (file, _) in FILES.items() if file == path.name]
        candidates = found or list(ends.get(path.suffix, ()))
    elif path.is_dir():
        folder, weights = path, None
        candidates = [name for name, (file, _) in FILES.items() if (path / file).is_file()]
    else:
        raise FileNotFoundError(f"{path} is neither a folder nor a file")
    if format is None:
        if {FILES[name][0] for name in candidates} == {"sae.safetensors"}:
            config = folder / "cfg.json"
            candidates = ["fastsae" if config.is_file() and "dead_after" in read_json(config) else "sparsify"]
        if len(candidates) != 1:
            known = ", ".join(f"{file} ({name})" for name, (file, _) in FILES.items())
            raise ValueError(f"{path} must hold one of {known}, found {candidates or 'none'}: give format=")
        format = candidates[0]  # noqa: A001
    file, config = FILES[format]
    weights = weights or folder / file
    if not weights.is_file():
        raise FileNotFoundError(f"{path}: format {format!r} needs the file {file}, which is not there")
    if config is None:
        return format, weights, None
    places = [folder / config]
    if format == "dictionary_learning" and folder.name == "checkpoints":  # ae_1000.pt lies one level deeper than its configuration
        places.append(folder.parent / config)
    for place in places:
        if place.is_file():
            return format, weights, place
    raise FileNotFoundError(f"{path}: format {format!r} needs the file {config}, which is not there")


def dictionary(source: str | os.PathLike[str]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(decoder ``[F, D]``, its bias or None, the encoder's or None) of a weights' file, of a checkpoint of this library, or of a folder
    that ``locate`` knows.

    FileNotFoundError where there is none, ValueError where it holds none."""
    path = Path(source)
    if path.is_dir():
        path = locate(path)[1]
    names = (("b_dec", "bias", "decoder_bias", "decoder.bias"), ("b_enc", "encoder.bias", "encoder_bias"))
    tensors = read_tensors(path, ("W_dec", "w_dec", "decoder.weight", *names[0], *names[1]))
    biases = [next((tensors[name] for name in some if name in tensors), None) for some in names]
    decoder = next((tensors[name] for name in ("W_dec", "w_dec") if name in tensors), None)
    if decoder is None and "decoder.weight" in tensors:
        decoder = tensors["decoder.weight"]
        decoder = decoder.T if decoder.dim() == 2 else decoder
    if decoder is None:
        raise ValueError(f"{path} holds no decoder ('W_dec' or 'decoder.weight')")
    return decoder, biases[0], biases[1]
