"""Weight files of this library and of others, read without executing or trusting what is in them.

safetensors and ``.npz`` hold nothing but arrays (pickled objects are refused), ``.pt`` is read by torch's weights-only unpickler. Sizes
that a file claims are compared with what it holds before memory is asked for. What was written here is known by an entry of its own
(``about``): checksums, and the configuration, so that weights are never read with another one's. Archives have checksums anyway.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from fastsae._core import files
from fastsae._core.extras import needed

FILES: dict[str, tuple[str, str | None]] = {
    "fastsae": ("sae.safetensors", "cfg.json"),
    "sparsify": ("sae.safetensors", "cfg.json"),
    "saelens": ("sae_weights.safetensors", "cfg.json"),
    "dictionary_learning": ("ae.pt", "config.json"),
    "gemma_scope": ("params.npz", None),
    "gemma_scope_2": ("params.safetensors", "config.json"),
    "llama_scope": ("sae_weights.safetensors", "config.json"),
    "circuit_tracer": ("layer_0.safetensors", None),
    "openai": ("*.pt", None),
    "goodfire": ("*.pt", None),
    "qwen_scope": ("*.sae.pt", None),
    "deepseek_r1": ("*.pt", None),
}
"""Names of each format's weights and configuration in a folder; the file itself has to be given where the name says nothing."""
ENDS: tuple[str, ...] = (".safetensors", ".pt", ".pth", ".npz")
OPTIONAL = ("gemma_scope_2",)
"""Formats whose configuration may be missing."""

WRAPPERS = ("module", "model", "ae", "sae", "autoencoder", "transcoder", "dictionary", "state_dict")
"""What programs put before all names of a state dict."""

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
    return _read(path, names).tensors


class Read(NamedTuple):
    """What a file holds. ``more``: what is beside the tensors in a ``.pt`` file."""

    tensors: dict[str, Tensor]
    about: dict[str, Any] | None
    more: dict[str, Any] = {}  # noqa: RUF012 (never written to)


def _read(path: Path, names: Collection[str] | None, mapped: bool = False) -> Read:
    """``mapped``: tensors may be the file itself, which changes with it and takes no memory; whoever keeps them copies them."""
    readers = dict(zip(ENDS, (_read_safetensors, _read_pt, _read_pt, _read_npz)))
    reader = readers.get(path.suffix)
    if reader is None:
        if not path.exists():
            raise FileNotFoundError(f"{path} is neither a folder nor a file")
        raise ValueError(f"{path} must end in {', '.join(readers)}")
    found = reader(path, names, mapped)
    for name, tensor in found.tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type != "cpu":
            raise ValueError(f"{path}: {name} must be a dense tensor, got layout {tensor.layout} on {tensor.device}")
    return found


# ---------------------------------------------------------------- what is written here


def contents(folder: Path, kind: str, tensors: dict[str, Tensor], config: Mapping[str, Any], **more: Any) -> dict[Path, files.Fill]:
    """What fills the weights' file of a format, with the configuration and JSON values ``more`` inside, and, for other readers, the
    configuration beside it."""
    name, beside = FILES[kind]
    text = json.dumps(config, indent=1)
    about = {"format": kind, "config": config, **more}
    fill = save_pt if name.endswith(".pt") else save_safetensors
    filled: dict[Path, files.Fill] = {folder / name: lambda part: fill(part, tensors, about)}
    return filled if beside is None else {**filled, folder / beside: lambda part: part.write_text(text, encoding="utf-8")}


def save_safetensors(part: Path, tensors: dict[str, Tensor], about: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    sums = {name: _checksum(tensor) for name, tensor in tensors.items()}
    save_file(tensors, part, metadata={_ENTRY: _sealed({**about, "crc32": sums})})


def save_pt(part: Path, content: Any, about: Mapping[str, Any] | None = None) -> None:
    """``torch.save``, with the checksums whatever the process says about them."""
    kept = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        with open(part, "wb") as file:  # of Python, whose errors say what is wrong
            torch.save(content, file)
    finally:
        torch.serialization.set_crc32_options(kept)
    if about is not None:
        with open(part, "rb+") as file, zipfile.ZipFile(file, "a") as archive:  # by its name it would be made anew where opening fails
            archive.writestr(f"archive/{_ENTRY}", _sealed(about))


_ENTRY = "fastsae"


def _sealed(about: Mapping[str, Any]) -> str:
    text = json.dumps(about)
    return f"{zlib.crc32(text.encode()):08x} {text}"


def _unsealed(entry: str | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    checksum, _, text = entry.partition(" ")
    if checksum != f"{zlib.crc32(text.encode()):08x}":
        raise ValueError("the configuration inside is damaged: its checksum is another")
    about = json.loads(text)
    if not (isinstance(about, dict) and isinstance(about.get("config"), dict) and about.get("format") in FILES):
        raise ValueError("the configuration inside is none")
    return about


def _checksum(tensor: Tensor) -> int:
    """CRC-32 of dtype, shape and elements."""
    start = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode())
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, start) if tensor.numel() else start


# ---------------------------------------------------------------- readers


def _read_safetensors(path: Path, names: Collection[str] | None, mapped: bool) -> Read:
    safetensors = needed("safetensors", f"reading {path.name} needs safetensors", "hub")
    try:
        # safetensors opens the name twice, and it may be another file's by then: a process's own name of an open file stays.
        with open(path, "rb") as held, safetensors.safe_open(_own_name(held, path), framework="pt") as file:
            about = _unsealed((file.metadata() or {}).get(_ENTRY))
            # What safetensors returns is the file itself, mapped, and changes or goes with it: a copy is what the checksum is of.
            kept = mapped and about is None
            tensors = {
                name: file.get_tensor(name) if kept else file.get_tensor(name).clone()
                for name in sorted(file.keys())
                if names is None or name in names
            }
        sums = None if about is None else about["crc32"]
        if sums is not None and names is None and set(sums) != set(tensors):
            raise ValueError(f"expected the tensors {sorted(sums)}, got {sorted(tensors)}")
        for name, tensor in tensors.items():
            if sums is not None and sums.get(name) != _checksum(tensor):
                raise ValueError(f"{name} is damaged: its checksum is another")
    except (safetensors.SafetensorError, ValueError, TypeError, RuntimeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    return Read(tensors, about)


def _own_name(file: Any, path: Path) -> Path:
    own = Path(f"/proc/self/fd/{file.fileno()}")
    return own if own.exists() else path


def load(path: Path, mapped: bool = False) -> tuple[Any, dict[str, Any] | None]:
    """(what ``torch.save`` wrote: numbers, text, containers and tensors; what ``save_pt`` wrote about it or None); or ValueError.

    ``mapped``: the tensors are the file itself. The archive's checksums are compared first. No tensor has more elements than its storage
    holds."""
    with open(path, "rb") as file:
        try:
            with _archive(file) as archive:
                if compressed := [member.filename for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]:
                    raise ValueError(f"{compressed[0]} is compressed, which torch.save does not do")
                _check_sums(archive)
                entry = next((name for name in archive.namelist() if name == f"archive/{_ENTRY}"), None)
                about = _unsealed(None if entry is None else archive.read(entry).decode())
            file.seek(0)
            state = torch.load(_own_name(file, path) if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # an unpickler raises what it stumbles over
            lines = str(error).strip().split("\n")
            reason = next((line.strip() for line in lines if "WeightsUnpickler error" in line), lines[0])
            if code := re.search(r"GLOBAL ([\w.]+)", str(error)):  # without torch's advice to let it run
                reason = f"it holds {code[1]}, which is no tensor, number, text or container"
            raise ValueError(f"{path} is not a file of tensors that torch.load(weights_only=True) reads: {reason}") from error
    left, seen = [("", state)], set[int]()
    while left:
        name, value = left.pop()
        if isinstance(value, Tensor) and value.layout is torch.strided:
            held = value.untyped_storage().nbytes()
            if value.numel() * value.element_size() > held:
                raise ValueError(f"{path}: {name} claims the shape {list(value.shape)} of {value.dtype} but holds {held} bytes")
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))  # containers may hold one another
            left += value.items() if isinstance(value, dict) else ((name, item) for item in value)
    return state, about


def _read_pt(path: Path, names: Collection[str] | None, mapped: bool) -> Read:
    state, about = load(path, mapped)
    more: dict[str, Any] = {}
    for key in ("sae", "ae", "state_dict", "model_state_dict"):  # of save_checkpoint; dictionary_learning's backups; others' checkpoints
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state, more = state[key], state
            break
    if not isinstance(state, dict):
        raise ValueError(f"{path} must hold a state dict of named tensors, got {type(state).__name__}")
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            tensors[name] = value
        elif name in ("activation", "activation_state_dict"):  # OpenAI's
            more = {**more, name: value}
        else:
            raise ValueError(f"{path} must hold a state dict of named tensors, got {type(value).__name__} for {name!r}")
    return Read({name: value for name, value in tensors.items() if names is None or name in names}, about, more)


def _read_npz(path: Path, names: Collection[str] | None, mapped: bool) -> Read:
    return Read({name: torch.from_numpy(array) for name, array in read_arrays(path, "f", names, mapped).items()}, None)


def read_arrays(path: Path, kinds: str, names: Collection[str] | None = None, mapped: bool = False) -> dict[str, Any]:
    """The arrays of an ``.npz`` file whose dtypes are of these kinds, in C order; or ValueError. ``mapped``: where they are not compressed
    they are the file itself, in the order that they have there."""
    import numpy as np

    arrays: dict[str, Any] = {}
    with open(path, "rb") as raw:
        try:
            with _archive(raw) as archive:
                for member in archive.infolist():
                    name = member.filename.removesuffix(".npy")
                    if names is not None and name not in names:
                        continue
                    with archive.open(member) as file:
                        _check_header(name, file, member.file_size, kinds)
                    with archive.open(member) as file:
                        if mapped and member.compress_type == zipfile.ZIP_STORED and member.file_size > 1 << 20:
                            arrays[name] = _mapped(raw, member)
                            while file.read(1 << 20):  # to the end, where the checksum is compared
                                pass
                            continue
                        arrays[name] = np.require(np.lib.format.read_array(file, allow_pickle=False), requirements="C")
                        if file.read(1):  # to the end, where the checksum is compared
                            raise ValueError(f"{name} is longer than its array")
                    array = arrays[name]
                    if array.dtype.kind == "U" and (np.frombuffer(array.tobytes(), array.dtype.str[0] + "u4") > 0x10FFFF).any():
                        raise ValueError(f"{name} is no text")  # Python would make an invalid string of it
        except Exception as error:  # so does a reader of archives
            raise ValueError(f"{path} is not an .npz file of numbers: {error}") from error
    return arrays


def _mapped(raw: IO[bytes], member: zipfile.ZipInfo) -> Any:
    """An array that lies in an archive as it is; its header has been checked."""
    import numpy as np

    at = raw.tell()
    raw.seek(member.header_offset + 26)  # of the lengths of name and extra field, which the directory's entry may have otherwise
    raw.seek(sum(struct.unpack("<HH", raw.read(4))) + member.header_offset + 30)
    version = np.lib.format.read_magic(raw)
    shape, fortran, dtype = (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(raw)
    array = np.memmap(raw, dtype, "c", raw.tell(), shape, "F" if fortran else "C")
    raw.seek(at)
    return array


def _archive(file: IO[bytes]) -> zipfile.ZipFile:
    """An archive whose members claim no more than there is, or than mild compression leaves; ValueError otherwise."""
    size = file.seek(0, os.SEEK_END)
    archive = zipfile.ZipFile(file)
    members = archive.infolist()
    claimed = sum(member.file_size for member in members)
    # Numbers shrink by a few percent; a megabyte of nearly nothing does no harm.
    if claimed > 16 * size + (1 << 20) or sum(member.compress_size for member in members) > size:
        raise ValueError(f"its members claim {claimed} bytes, the file has {size}")
    # What another reader of archives could take for another one.
    if archive.comment or len(set(archive.namelist())) != len(members) or min((m.header_offset for m in members), default=0) != 0:
        raise ValueError("its directory is ambiguous")
    return archive


def _check_sums(archive: zipfile.ZipFile) -> None:
    """Every member's checksum is that of its bytes, where the archive has any (torch can be told to leave them out: all are 0)."""
    if any(member.CRC for member in archive.infolist()):
        for member in archive.infolist():
            with archive.open(member) as file:
                while file.read(1 << 22):
                    pass


def _check_header(name: str, file: Any, size: int, kinds: str) -> None:
    """An array's header claims elements of these kinds, and as many as there are bytes for; ValueError otherwise."""
    from numpy.lib import format as npy

    version = npy.read_magic(file)
    header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if header is None:
        raise ValueError(f"{name}: version {version} of the array format")
    shape, _, dtype = header(file)
    if dtype.kind not in kinds:
        expected = "floating point numbers" if kinds == "f" else "integers and text"
        raise ValueError(f"{name} must hold {expected}, got {dtype}")
    held = size - file.tell()
    if math.prod(shape) * dtype.itemsize != held:
        raise ValueError(f"{name} claims the shape {list(shape)} of {dtype} but holds {held} bytes")


def locate(source: str | os.PathLike[str], format: str | None = None) -> tuple[str, Path, Path | None]:  # noqa: A002
    """(format or "" where names do not tell, weights, configuration's file or None) of a folder or of the weights' file in it.

    ``fastsae`` and ``sparsify`` share their names, ``saelens`` and ``llama_scope`` the weights'; what is written inside, or else the
    configuration, tells them apart. Raises FileNotFoundError where a file is not there, ValueError where no known format, or more than
    one, is.
    """
    path = Path(source)
    if path.is_file():
        folder, weights = path.parent, path
        candidates = [name for name, (file, _) in FILES.items() if file == path.name]
    elif path.is_dir():
        folder, weights = path, None
        candidates = [name for name, (file, _) in FILES.items() if (path / file).is_file()]
        for place in (path, path / "checkpoints"):
            if (place / LLAMA_SCOPE[0]).is_file():
                folder, candidates = place, ["llama_scope"]
    else:
        raise FileNotFoundError(f"{path} is neither a folder nor a file")
    if weights is None and len(list(folder.glob("layer_*.safetensors"))) > 1:
        raise ValueError(f"{path} holds a transcoder a layer: give the file of one")
    if any((folder / f"W_{part}_0.safetensors").is_file() for part in ("enc", "dec")) and (weights is None or "W_" in weights.name):
        raise ValueError(f"{path} is a cross-layer transcoder of circuit-tracer, whose decoders write to many layers: SAE has one")
    if format is None and weights is not None and not candidates:
        candidates = _of_file(weights)
    if format is None:
        candidates = _of_configuration(folder, candidates)
        if len(candidates) != 1 and weights is None:
            known = ", ".join(f"{file} ({name})" for name, (file, _) in FILES.items() if "*" not in file)
            raise ValueError(f"{path} must hold one of {known}, found {candidates or 'none'}: give format=, or the file itself")
        format = candidates[0] if len(candidates) == 1 else ""  # noqa: A001
    file, config = FILES.get(format, ("", None))
    if format == "llama_scope" and (weights or folder / LLAMA_SCOPE[0]) == folder / LLAMA_SCOPE[0] and (folder / LLAMA_SCOPE[0]).is_file():
        file, config = LLAMA_SCOPE
    if weights is None and "*" in file:
        raise ValueError(f"{path}: format {format!r} has no file of a fixed name: give the file itself")
    weights = weights or folder / file
    if not weights.is_file():
        raise FileNotFoundError(f"{path}: format {format!r} needs the file {file}, which is not there")
    places = [] if config is None else [folder / config]
    if config and folder.name == "checkpoints":  # ae_1000.pt and final.safetensors lie one level deeper
        places.append(folder.parent / config)
    return format, weights, next((place for place in places if place.is_file()), None)


LLAMA_SCOPE = ("final.safetensors", "hyperparams.json")
"""Weights (in the folder ``checkpoints``) and configuration of the first Llama Scope."""


def downloads(formats: Collection[str], file: str | None) -> set[str]:
    """The files of a folder to be had for these formats, or, of the weights, ``file`` alone."""
    # A repository of circuit-tracer has a file a layer: which one has to be said.
    names = {name for known in formats if known != "circuit_tracer" for name in FILES[known] if name is not None and "*" not in name}
    names |= {LLAMA_SCOPE[1], f"checkpoints/{LLAMA_SCOPE[0]}"} if "llama_scope" in formats else set()
    names |= {"activation_scaler.json"} if "saelens" in formats else set()
    return names if file is None else {file, *(name for name in names if name.endswith(".json"))}


def _of_file(weights: Path) -> list[str]:
    """Formats of a file whose name alone says nothing."""
    beside = [weights.parent, weights.parent.parent] if weights.parent.name == "checkpoints" else [weights.parent]
    if weights.name.endswith(".sae.pt"):
        return ["qwen_scope"]
    if weights.name == LLAMA_SCOPE[0] and any((folder / LLAMA_SCOPE[1]).is_file() for folder in beside):
        return ["llama_scope"]
    if weights.suffix in (".pt", ".pth"):
        return ["dictionary_learning"] if any((folder / "config.json").is_file() for folder in beside) else []
    return ["gemma_scope"] if weights.suffix == ".npz" else []


def _of_configuration(folder: Path, candidates: list[str]) -> list[str]:
    """The candidates that the configuration beside leaves."""
    names = {FILES[name][0] for name in candidates}
    if names == {"sae.safetensors"}:
        about, config = _read(folder / "sae.safetensors", ()).about, folder / "cfg.json"
        own = "dead_after" in read_json(config) if about is None and config.is_file() else False
        return [str(about["format"]) if about is not None else "fastsae" if own else "sparsify"]
    if names == {"sae_weights.safetensors"} and len(candidates) > 1:
        return ["llama_scope" if not (folder / "cfg.json").is_file() and (folder / "config.json").is_file() else "saelens"]
    return candidates


def recognised(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """The format of tensors that only one has; ValueError where that is not so."""
    marks = {
        "openai": "latent_bias",
        "goodfire": "encoder_linear.weight",
        "circuit_tracer": "activation_function.threshold",
        "gemma_scope_2": "w_enc",
    }
    found = [name for name, mark in marks.items() if mark in tensors]
    if not found and path.suffix == ".safetensors" and {"W_enc", "W_dec", "b_enc", "b_dec"} <= set(tensors):
        if len(set(tensors["W_enc"].shape)) == 1:
            raise ValueError(
                f"{path}: W_enc {list(tensors['W_enc'].shape)} may be feature-major or not: give format='circuit_tracer' if it is"
            )
        found = ["circuit_tracer"]  # the only library that gives such tensors a file of any name
    if len(found) != 1:
        raise ValueError(f"{path}: neither its name nor its tensors {sorted(tensors)} say of which format it is: give format=")
    return found[0]


def read_configured(
    source: str | os.PathLike[str],
    format: str | None = None,  # noqa: A002
) -> tuple[str, Path, dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """(format, weights' file, configuration, tensors, ``more`` as in ``contents``) of what ``locate`` finds, without the prefixes that
    wrappers put before names; tensors may be the file itself. A configuration inside the weights' file counts; a warning says so where the
    file beside is another."""
    found, weights, beside = locate(source, format)
    tensors, about, inside = _read(weights, None, mapped=True)
    if about is not None:
        if beside is not None and read_json(beside) != about["config"]:
            said = f"{beside} is not the configuration inside {weights.name}, which counts: save again to change it"
            warnings.warn(said, stacklevel=5)
        # Another save may have come since ``locate``.
        return format or about["format"], weights, about["config"], tensors, about
    tensors = unwrapped(tensors)
    found = found or ("dictionary_learning" if isinstance(inside.get("config"), dict) else recognised(weights, tensors))
    config = inside if beside is None else {**inside, **read_json(beside)}
    if found == "dictionary_learning" and isinstance(inside.get("config"), dict):  # a backup
        config.setdefault("trainer", inside["config"])
    elif beside is None and FILES[found][1] is not None and found not in OPTIONAL:
        raise FileNotFoundError(f"{source}: format {found!r} needs the file {FILES[found][1]}, which is not there")
    if found == "saelens" and (weights.parent / "activation_scaler.json").is_file():  # of a trainer's checkpoint
        config["activation_scaler"] = read_json(weights.parent / "activation_scaler.json").get("scaling_factor")
    return found, weights, {**config, "path": str(weights)} if found == "qwen_scope" else config, tensors, {}


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without the prefixes of torch.compile, DataParallel and modules that hold the SAE."""
    names = {name: name.replace("_orig_mod.", "") for name in tensors}
    while len(heads := {name.split(".")[0] for name in names.values()}) == 1 and heads <= set(WRAPPERS):
        names = {name: short.partition(".")[2] for name, short in names.items()}
    if len(set(names.values())) != len(names):
        raise ValueError(f"the tensors {sorted(tensors)} are of more than one module")
    return {names[name]: tensor for name, tensor in tensors.items()}


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
