"""Files of other libraries: what they compute, in the terms of ``SAE``, and back. Behind ``SAE.from_pretrained`` and ``save_pretrained``.

A reader turns (configuration, tensors) of a format into (``SAE.config()``, tensors by ``SAE``'s names); a writer does the opposite. What
``SAE`` does not compute is refused by name.

    format                encoder        decoder        input             unit rows        keeps
    fastsae               [F, D]         [F, D]         - b_dec           as configured    as configured
    saelens               [D, F]         [F, D]         flag              older: flag    score > threshold; top k, with decoder norms or not
    sparsify              [F, D]         [F, D]         unless transcode  flag             top k
    dictionary_learning   [F, D], [D, F] [D, F], [F, D] by class          by class         by class; score > threshold
    gemma_scope           [D, F]         [F, D]         x                 yes              score > threshold

Training keeps decoder rows at norm 1 where the format does so and the rows are (``_unit``): otherwise the first step, of whatever rate,
would change what the file computes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastsae._core import checks, files
from fastsae.formats import weight_files

Writable = Literal["fastsae", "saelens", "sparsify", "dictionary_learning"]
Format = Writable | Literal["gemma_scope"]
WRITABLE: tuple[str, ...] = get_args(Writable)
FORMATS = (*WRITABLE, "gemma_scope")

NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
"""sparsify's names that ``SAE.save`` uses too, so that its files load there."""


class Options(NamedTuple):
    """What a caller may add to a file; see ``SAE.from_pretrained``."""

    fold_decoder_norm: bool | None = None
    scaling_factor: float | None = None
    pre_bias: bool | None = None
    dtype: torch.dtype | None = None


class Loaded(NamedTuple):
    """``config`` as ``SAE.config()``; ``tensors`` by ``SAE``'s names; ``more`` as in ``weight_files.contents``."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    more: dict[str, Any] = {}  # noqa: RUF012 (never written to)


# ---------------------------------------------------------------- common steps


def _take(tensors: Mapping[str, Tensor], names: Mapping[str, str], optional: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Tensors under ``SAE``'s names; ValueError for one that is missing, or there without being known."""
    optional = optional or {}
    missing, unknown = sorted(set(names) - set(tensors)), sorted(set(tensors) - set(names) - set(optional))
    if missing or unknown:
        raise ValueError(f"expected the tensors {sorted(names)}, missing {missing}, unknown {unknown}")
    named = {**optional, **names}
    return {named[name]: tensor for name, tensor in tensors.items()}


def _matrices(tensors: dict[str, Tensor], *transposed: str) -> dict[str, Tensor]:
    """``tensors`` with the matrices in ``transposed`` turned feature-major."""
    for name in ("W_enc", "W_dec", *(["W_skip"] if "W_skip" in tensors else [])):
        if tensors[name].dim() != 2:
            raise ValueError(f"{name} must be a matrix, got the shape {list(tensors[name].shape)}")
    return {name: (tensor.T if name in transposed else tensor).contiguous() for name, tensor in tensors.items()}


def _agree(what: str, claimed: Any, held: int) -> None:
    """A size that the configuration claims, where it does, is the tensors'."""
    if claimed is not None and (isinstance(claimed, bool) or not isinstance(claimed, int) or claimed != held):
        raise ValueError(f"the configuration claims {what}={claimed!r}, the tensors have {held}")


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    return value


def _flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return default if value is None else value


def _unit(W: Tensor) -> bool:
    """Whether all rows have norm 1, up to 2e-6 or, in half precision, its spacing at 1; rows of zeros stay what they are in any case."""
    tolerance = max(2e-6, torch.finfo(W.dtype).eps if W.dtype in (torch.float16, torch.bfloat16) else 0.0)
    norms = torch.cat([torch.linalg.vector_norm(part.double(), dim=1) for part in W.split(4096)])
    return bool((((norms - 1).abs() <= tolerance) | (norms == 0)).all())


def _config(tensors: Mapping[str, Tensor], activation: str, **more: Any) -> dict[str, Any]:
    F, d_in = tensors["W_enc"].shape
    return {"d_in": d_in, "num_latents": F, "activation": activation, "transcode": False, **more}


def fold_decoder_norm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Unit decoder rows, their norms in the latents: the same reconstruction, for activations that commute with positive factors of
    each feature. Rows of norm 0 stay, with latents 0."""
    norm = torch.linalg.vector_norm(tensors["W_dec"].double(), dim=1)
    return _scaled(tensors, norm, torch.where(norm == 0, 1.0, norm))


def _scaled(tensors: dict[str, Tensor], latents: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """Each feature's latents times ``latents [F]`` and its decoder row divided by ``rows [F]``."""
    out = dict(tensors)
    for name in ("W_enc", "b_enc", "threshold", "b_gate", "b_mag"):
        if name in tensors:
            factor = latents.unsqueeze(1) if name == "W_enc" else latents
            out[name] = (tensors[name].double() * factor).to(tensors[name].dtype)
    out["W_dec"] = (tensors["W_dec"].double() / rows.unsqueeze(1)).to(tensors["W_dec"].dtype)
    return out


def _shift_pre_bias(tensors: dict[str, Tensor], sign: int) -> dict[str, Tensor]:
    """Moves ``-b_dec`` from the input into the biases (-1), or back (+1): the same scores up to rounding."""
    shift = sign * (tensors["W_enc"].double() @ tensors["b_dec"].double())
    out = dict(tensors)
    for name in ("b_enc", "b_gate", "b_mag"):
        if name in tensors:
            stretch = tensors["r_mag"].double().exp() if name == "b_mag" else 1.0
            out[name] = (tensors[name].double() + shift * stretch).to(tensors[name].dtype)
    return out


# ---------------------------------------------------------------- readers


def _read_fastsae(config: dict[str, Any], tensors: dict[str, Tensor], options: Options) -> Loaded:
    return Loaded(config, {NAMES.get(name, name): tensor for name, tensor in tensors.items()})


_SAELENS = {
    "standard": "relu",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "abstopk": "abstopk",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_TOPK = ("topk", "abstopk")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in checks.FLOATS}


def _read_saelens(config: dict[str, Any], tensors: dict[str, Tensor], options: Options) -> Loaded:
    architecture, k = _architecture(config)
    kind = _SAELENS.get(architecture)
    if kind is None:
        raise ValueError(f"SAELens architecture {architecture!r} is not supported; known: {', '.join(_SAELENS)}")
    transcoder = "transcoder" in architecture
    dtype = str(config.get("dtype", "float32")).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} of the configuration is not supported; known: {', '.join(_DTYPES)}")
    finetuned = tensors.pop("scaling_factor", None)  # up to 5.x; all ones where it was not used
    names = {name: name for name in ("W_enc", "W_dec", "b_dec")}
    names |= {name: name for name in (("b_gate", "r_mag", "b_mag") if kind == "gated" else ("b_enc",))}
    names |= {"threshold": "threshold"} if kind == "jumprelu" else {}
    names |= {"W_skip": "W_skip"} if "skip" in architecture else {}
    found = _matrices(_take(tensors, names), "W_enc")
    _agree("d_in", config.get("d_in"), found["W_enc"].shape[1])
    _agree("d_sae", config.get("d_sae"), found["W_enc"].shape[0])
    found = {name: tensor.to(options.dtype or _DTYPES[dtype]) for name, tensor in found.items()}
    if finetuned is not None and not torch.allclose(finetuned, torch.ones_like(finetuned)):
        if not _flag(config, "finetuning_scaling_factor", False):
            raise ValueError("a scaling_factor that is not 1 beside finetuning_scaling_factor false contradicts itself")
        if finetuned.shape != (found["W_dec"].shape[0],):
            raise ValueError(f"scaling_factor must have shape [{found['W_dec'].shape[0]}], got {list(finetuned.shape)}")
        found["W_dec"] = (found["W_dec"].double() * finetuned.double().unsqueeze(1)).to(found["W_dec"].dtype)
    found = _scaled_inputs(config, found, options)
    apply = _flag(config, "apply_b_dec_to_input", not transcoder)
    if transcoder and apply:
        raise ValueError("apply_b_dec_to_input does not go with a transcoder")
    more: dict[str, Any] = {"pre_bias": apply, "normalize_decoder": _flag(config, "normalize_sae_decoder", False)}
    if kind in _TOPK:
        more["k"] = _count("k", k)
        if _flag(config, "rescale_acts_by_decoder_norm", False):
            found = fold_decoder_norm(found)
    if transcoder:
        d_out = found["W_dec"].shape[1]
        _agree("d_out", config.get("d_out"), d_out)
        more |= {"transcode": True, "d_out": d_out, "skip_connection": "W_skip" in found}
    return Loaded(_config(found, kind, **more), found)


def _architecture(config: dict[str, Any]) -> tuple[str, Any]:
    """(architecture, k) of a version 6 configuration or an older one, which has no architecture "topk"."""
    metadata = config.get("metadata")
    version = config.get("sae_lens_version") or (metadata.get("sae_lens_version") if isinstance(metadata, dict) else None)
    architecture = str(config.get("architecture", "standard"))
    if version and re.match(r"\d+", str(version)) and int(str(version).split(".")[0]) >= 6:
        return architecture, config.get("k")
    activation = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    if activation == "topk":
        options = config.get("activation_fn_kwargs")
        if isinstance(options, dict) and options.get("signed"):
            raise ValueError("a top k of signed values is not supported")
        return "topk", options.get("k") if isinstance(options, dict) else config.get("k")
    if activation != "relu":
        raise ValueError(f"SAELens activation_fn {activation!r} is not supported; known: relu, topk")
    return architecture, config.get("k")


def _scaled_inputs(config: dict[str, Any], tensors: dict[str, Tensor], options: Options) -> dict[str, Tensor]:
    normalise = config.get("normalize_activations")
    if normalise is None or isinstance(normalise, bool):  # of older versions
        normalise = "expected_average_only_in" if normalise else "none"
    if normalise == "none":
        if options.scaling_factor is not None:
            raise ValueError("scaling_factor does not go with normalize_activations 'none'")
        return tensors
    if normalise not in ("expected_average_only_in", "constant_scalar_rescale"):
        rows = "it depends on each row"
        reasons = {"layer_norm": rows, "constant_norm_rescale": rows, "covariance_whitening": "the file does not hold its matrices"}
        known = "none, expected_average_only_in, constant_scalar_rescale"
        raise ValueError(f"normalize_activations {normalise!r} is not supported ({reasons.get(str(normalise), 'unknown')}); known: {known}")
    held = config.get("activation_normalization_factor") if normalise == "constant_scalar_rescale" else None
    if held is not None and options.scaling_factor is not None:
        raise ValueError("scaling_factor does not go with normalize_activations 'constant_scalar_rescale', whose factor the file holds")
    if held is None and options.scaling_factor is None:
        raise ValueError(
            f"normalize_activations {normalise!r} multiplies inputs by a number that the file does not hold: "
            "give it as scaling_factor=, or 1.0 where your inputs are scaled already"
        )
    name, given = ("scaling_factor", options.scaling_factor) if held is None else ("activation_normalization_factor", held)
    factor = checks.number("SAE.from_pretrained", name, given)
    out = {name: tensor / factor if name in ("W_dec", "b_dec") else tensor for name, tensor in tensors.items()}
    out["W_enc"] = tensors["W_enc"] * factor
    return out


def _read_sparsify(config: dict[str, Any], tensors: dict[str, Tensor], options: Options) -> Loaded:
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise ValueError(f"sparsify activation {activation!r} is not supported; known: topk")
    if _flag(config, "signed", False):
        raise ValueError("sparsify's signed top k is not supported")
    if "W_dec" not in tensors:
        raise ValueError("the file holds an encoder only (it was saved with decoder=False)")
    skip = _flag(config, "skip_connection", False)
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    found = _matrices(_take(tensors, names | ({"W_skip": "W_skip"} if skip else {})))
    F, d_in = found["W_enc"].shape
    _agree("d_in", config.get("d_in"), d_in)
    # num_latents 0 means expansion_factor times d_in.
    _agree("num_latents", config.get("num_latents") or d_in * _count("expansion_factor", config.get("expansion_factor", 32)), F)
    transcode = _flag(config, "transcode", False)
    more: dict[str, Any] = {"k": _count("k", config.get("k", 32)), "pre_bias": not transcode}
    if transcode or skip:
        more |= {"transcode": True, "d_out": found["W_dec"].shape[1], "skip_connection": skip}
    more["normalize_decoder"] = _flag(config, "normalize_decoder", True) and not transcode
    return Loaded(_config(found, "topk", **more), found)


def _read_dictionary_learning(config: dict[str, Any], tensors: dict[str, Tensor], options: Options) -> Loaded:
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        raise ValueError(f"the configuration must hold an object 'trainer', got {type(trainer).__name__}")
    kind = trainer.get("dict_class")
    linear = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
    bare = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    counters = {"k": "k", "threshold": "running_threshold"}
    known: dict[Any, tuple[str, dict[str, str], dict[str, str]]] = {
        "AutoEncoder": ("relu", {**linear, "bias": "b_dec"}, {}),
        "AutoEncoderNew": ("relu", {**linear, "decoder.bias": "b_dec"}, {}),
        "GatedAutoEncoder": (
            "gated",
            {
                "encoder.weight": "W_enc",
                "decoder.weight": "W_dec",
                "decoder_bias": "b_dec",
                "gate_bias": "b_gate",
                "r_mag": "r_mag",
                "mag_bias": "b_mag",
            },
            {},
        ),
        "JumpReluAutoEncoder": ("jumprelu", {**bare, "threshold": "threshold"}, {}),
        "AutoEncoderTopK": ("topk", {**linear, "b_dec": "b_dec"}, counters),
        "BatchTopKSAE": ("batchtopk", {**linear, "b_dec": "b_dec"}, counters),
        "MatryoshkaBatchTopKSAE": ("batchtopk", {**bare, "group_sizes": "group_sizes"}, counters),
    }
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"dictionary_learning dict_class {kind!r} is not supported; known: {', '.join(known)}")
    activation, names, optional = known[kind]
    found = _take(tensors, names, optional)
    k, threshold, groups = (found.pop(name, None) for name in ("k", "running_threshold", "group_sizes"))
    found = _matrices(found, *(("W_dec",) if "decoder.weight" in names else ("W_enc",)))
    F, d_in = found["W_enc"].shape
    _agree("activation_dim", trainer.get("activation_dim"), d_in)
    _agree("dict_size", trainer.get("dict_size"), F)
    if options.pre_bias is not None and kind != "JumpReluAutoEncoder":
        raise ValueError(f"pre_bias is for JumpReluAutoEncoder, whose files do not say; this is {kind}")
    more: dict[str, Any] = {"pre_bias": kind not in ("AutoEncoderNew", "JumpReluAutoEncoder") or bool(options.pre_bias)}
    more["normalize_decoder"] = kind != "AutoEncoderNew"
    if optional:
        more["k"] = _agreed_k(k, trainer.get("k"))
    if activation == "batchtopk" and threshold is None:  # nothing says what evaluation keeps: with -1 it would be every positive score
        activation = "topk"
    if activation == "batchtopk" and threshold is not None:
        if threshold.dim() or not threshold.is_floating_point():
            raise ValueError(f"threshold must be one number, got {list(threshold.shape)} {threshold.dtype}")
        found["running_threshold"] = threshold.float()
        beta = trainer.get("threshold_beta", 0.999)
        more["rate"] = 1 - checks.number("SAE.from_pretrained", "threshold_beta", beta, positive=False)
    if groups is not None:
        if groups.dim() != 1 or groups.dtype not in (torch.int64, torch.int32) or bool((groups < 1).any()) or int(groups.sum()) != F:
            raise ValueError(f"group_sizes must be positive integers that add up to {F}, got {groups.tolist()}")
        more["prefixes"] = groups.cumsum(0).tolist()
    if kind == "AutoEncoder" and options.fold_decoder_norm is None:  # the library's own loader does it, where norms are not 1 yet
        norm = torch.linalg.vector_norm(found["W_dec"].double(), dim=1)
        if not torch.allclose(norm.float(), torch.ones_like(norm.float())):
            found = fold_decoder_norm(found)
    return Loaded(_config(found, activation, **more), found)


def _agreed_k(held: Tensor | None, claimed: Any) -> int:
    """k of the buffer (annealed in training) and of the configuration, which must not differ."""
    if held is not None and (held.numel() != 1 or held.is_floating_point()):
        raise ValueError(f"k must be one integer, got {list(held.shape)} {held.dtype}")
    if held is None:
        return _count("k", claimed)
    if claimed is not None and claimed != int(held):
        raise ValueError(f"the configuration claims k={claimed!r}, the tensors k={int(held)}")
    return _count("k", int(held))


def _read_gemma_scope(config: dict[str, Any], tensors: dict[str, Tensor], options: Options) -> Loaded:
    tensors = {"W_" + name[2:] if name.startswith("w_") else name: tensor for name, tensor in tensors.items()}
    names = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    found = _matrices(_take(tensors, names), "W_enc")
    found = {name: tensor.to(options.dtype or torch.float32) for name, tensor in found.items()}
    return Loaded(_config(found, "jumprelu", pre_bias=False, normalize_decoder=True), found)


_READERS: dict[str, Callable[[dict[str, Any], dict[str, Tensor], Options], Loaded]] = {
    "fastsae": _read_fastsae,
    "saelens": _read_saelens,
    "sparsify": _read_sparsify,
    "dictionary_learning": _read_dictionary_learning,
    "gemma_scope": _read_gemma_scope,
}


def read(source: str | os.PathLike[str], format: str | None, options: Options) -> Loaded:  # noqa: A002
    """(configuration, tensors) of a local folder or weights' file. ValueError where it is damaged or not supported."""
    found, weights, config, tensors, more = weight_files.read_configured(source, format)
    if options.scaling_factor is not None and found != "saelens":
        raise ValueError(f"{weights}: scaling_factor is for SAELens's normalize_activations, this is a file of {found}")
    if options.pre_bias is not None and found != "dictionary_learning":
        raise ValueError(f"{weights}: pre_bias is for dictionary_learning's JumpReluAutoEncoder, this is a file of {found}")
    try:
        for name, tensor in tensors.items():
            if tensor.dtype not in checks.FLOATS and name not in ("k", "group_sizes"):
                raise ValueError(f"{name} must have dtype {', '.join(_DTYPES)}, got {str(tensor.dtype).removeprefix('torch.')}")
        loaded = _READERS[found](config, tensors, options)
        if options.fold_decoder_norm:
            if loaded.config["activation"] in (*_TOPK, "batchtopk"):
                raise ValueError("fold_decoder_norm would change which latents a top k keeps")
            loaded = Loaded(loaded.config, fold_decoder_norm(loaded.tensors))
        config, tensors = dict(loaded.config), loaded.tensors
        if _flag(config, "normalize_decoder", True) and tensors["W_dec"].dim() == 2 and not _unit(tensors["W_dec"]):
            config["normalize_decoder"] = False
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{weights} (read as {found}): {error}") from error
    return Loaded(config, tensors, more)


# ---------------------------------------------------------------- the Hub


def check_subfolder(op: str, subfolder: str | None) -> list[str]:
    """The parts of a path inside a repository; ValueError where it is none."""
    parts = (subfolder or "").split("/")
    if subfolder is not None and any(part in ("", ".", "..") or "\\" in part or ":" in part or "*" in part for part in parts):
        raise ValueError(f"{op}: subfolder must be a relative path inside the repository, got {subfolder!r}")
    return parts


def fetch(repository: str, subfolder: str | None, revision: str | None, format: str | None) -> Path:  # noqa: A002
    """The folder of a Hub repository, downloaded (into huggingface_hub's cache): the weights and configurations of known names only."""
    op = "SAE.from_pretrained"
    parts = check_subfolder(op, subfolder)
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(f"{op}: reading from the Hub needs huggingface_hub: pip install 'fastsae-kernels[hub]'") from error
    names = {name for known in ([format] if format else FORMATS) for name in weight_files.FILES[known] if name is not None}
    prefix = f"{subfolder}/" if subfolder else ""
    try:
        root = snapshot_download(repository, revision=revision, allow_patterns=sorted(prefix + name for name in names))
    except FileNotFoundError as error:  # no connection, and not in the cache
        raise FileNotFoundError(f"{op}: {repository} is no folder or file here, and not to be had from the Hub: {error}") from error
    folder = Path(root, *parts) if subfolder else Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(f"{op}: {repository} has no folder {subfolder!r} with {', '.join(sorted(names))}")
    return folder


def is_repository(source: Any) -> bool:
    """Whether a string reads as the name of a Hub repository."""
    return isinstance(source, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) is not None and ".." not in source


# ---------------------------------------------------------------- writers


def write(folder: str | os.PathLike[str], format: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Any) -> Path:  # noqa: A002
    """Writes an SAE (``config()``, folded tensors) as another library's loader expects it; returns the folder."""
    own = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    cfg, out = written("SAE.save_pretrained", format, config, own, metadata or {})
    out = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in out.items()}
    folder = Path(folder)
    try:
        contents = weight_files.contents(folder, format, out, cfg)
    except TypeError as error:
        raise TypeError(f"SAE.save_pretrained: metadata must hold JSON values: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    files.replace_all(contents)
    return folder


Written = tuple[dict[str, Any], dict[str, Tensor]]


def written(op: str, format: str, config: Mapping[str, Any], tensors: dict[str, Tensor], metadata: Mapping[str, Any]) -> Written:  # noqa: A002
    """(configuration, tensors) of an SAE as another library names them; ValueError that names ``op`` where it has no such SAE."""
    writers = {"saelens": _write_saelens, "sparsify": _write_sparsify, "dictionary_learning": _write_dictionary_learning}
    try:
        return writers[format](dict(config), tensors, metadata)
    except ValueError as error:
        raise ValueError(f"{op}: {format} {error}") from None


def _write_saelens(config: dict[str, Any], tensors: dict[str, Tensor], metadata: Mapping[str, Any]) -> Written:
    kind, transcoder = config["activation"], config["transcoder"]
    if kind == "topk" and not config["relu"]:
        raise ValueError("has no top k without ReLU")
    if transcoder and config["pre_bias"]:
        raise ValueError("has no transcoder that subtracts b_dec from its input")
    if transcoder and kind in (*_TOPK, "gated"):
        raise ValueError(f"has no transcoder with the activation {kind!r}")
    out = {name: tensor for name, tensor in tensors.items() if name != "running_threshold"}
    if kind == "batchtopk":  # as SAELens saves its own: the threshold of inference
        kind = "jumprelu"
        out["threshold"] = tensors["running_threshold"].clamp_min(0).to(out["b_enc"].dtype).expand_as(out["b_enc"]).contiguous()
    architecture = "standard" if kind == "relu" else kind
    if transcoder:
        architecture = ("jumprelu_" if kind == "jumprelu" else "") + ("skip_" if config["skip_connection"] else "") + "transcoder"
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": config["d_in"],
        "d_sae": config["num_latents"],
        "dtype": str(tensors["W_dec"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": config["pre_bias"],
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.0.0", "sae_lens_training_version": None, **metadata},
    }
    if kind in _TOPK:
        cfg |= {"k": config["k"], "rescale_acts_by_decoder_norm": False}
    if transcoder:
        cfg["d_out"] = tensors["W_dec"].shape[1]
    return cfg, out | {"W_enc": tensors["W_enc"].T}


def _write_sparsify(config: dict[str, Any], tensors: dict[str, Tensor], metadata: Mapping[str, Any]) -> Written:
    if config["activation"] != "topk" or not config["relu"]:
        raise ValueError(f"has top k with ReLU only, the activation is {config['activation']!r}")
    if tensors["W_dec"].shape[1] != config["d_in"]:
        raise ValueError(f"has d_out = d_in only, got d_out={tensors['W_dec'].shape[1]}, d_in={config['d_in']}")
    cfg = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": config["normalize_decoder"],
        "num_latents": config["num_latents"],
        "k": config["k"],
        "multi_topk": False,
        "skip_connection": config["skip_connection"],
        "transcode": not config["pre_bias"],
        "d_in": config["d_in"],
        **({"metadata": dict(metadata)} if metadata else {}),
    }
    names = {ours: theirs for theirs, ours in NAMES.items()}
    return cfg, {names.get(name, name): tensor for name, tensor in tensors.items()}


def _write_dictionary_learning(config: dict[str, Any], tensors: dict[str, Tensor], metadata: Mapping[str, Any]) -> Written:
    kind = config["activation"]
    if config["skip_connection"] or tensors["W_dec"].shape[1] != config["d_in"]:
        raise ValueError("has no skip connection and no d_out other than d_in")
    if kind in _TOPK and not config["relu"]:
        raise ValueError("has no top k without ReLU")
    if kind == "batchtopk" and int(config["k"]) != config["k"]:
        raise ValueError(f"needs an integer k, got {config['k']}")
    matryoshka = kind == "batchtopk" and config["prefixes"]
    classes = {"topk": "AutoEncoderTopK", "batchtopk": "BatchTopKSAE", "jumprelu": "JumpReluAutoEncoder", "gated": "GatedAutoEncoder"}
    name = "MatryoshkaBatchTopKSAE" if matryoshka else classes.get(kind, "AutoEncoder" if config["pre_bias"] else "AutoEncoderNew")
    wants = name not in ("JumpReluAutoEncoder", "AutoEncoderNew")
    if wants != config["pre_bias"]:
        tensors = _shift_pre_bias(tensors, 1 if wants else -1)
    trainer: dict[str, Any] = {"dict_class": name, "activation_dim": config["d_in"], "dict_size": config["num_latents"]}
    bare = name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE")
    out: dict[str, Tensor] = {}
    if kind in ("topk", "batchtopk"):
        trainer["k"] = int(config["k"])
        out["k"] = torch.tensor(trainer["k"], dtype=torch.int, device="cpu")
        out["threshold"] = tensors.get("running_threshold", torch.tensor(-1.0, device="cpu", dtype=torch.float32)).float()
    if matryoshka:
        ends = config["prefixes"]
        trainer["group_sizes"] = [end - start for start, end in zip([0, *ends], ends)]
        out["group_sizes"] = torch.tensor(trainer["group_sizes"], device="cpu")
    if kind == "jumprelu":
        out["threshold"] = tensors["threshold"]
    if bare:
        out |= {"W_enc": tensors["W_enc"].T, "b_enc": tensors["b_enc"], "W_dec": tensors["W_dec"], "b_dec": tensors["b_dec"]}
    else:
        out |= {"encoder.weight": tensors["W_enc"], "decoder.weight": tensors["W_dec"].T}
        bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}.get(name, "b_dec")
        out[bias] = tensors["b_dec"]
        if kind == "gated":
            out |= {"gate_bias": tensors["b_gate"], "r_mag": tensors["r_mag"], "mag_bias": tensors["b_mag"]}
        else:
            out["encoder.bias"] = tensors["b_enc"]
    return {"trainer": trainer, **({"metadata": dict(metadata)} if metadata else {})}, out
