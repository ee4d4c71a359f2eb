"""Files of other libraries: what they compute, in the terms of ``SAE``, and back. Behind ``SAE.from_pretrained`` and ``save_pretrained``.

A reader turns (configuration, tensors) of a format into (``SAE.config()``, tensors by ``SAE``'s names); a writer does the opposite. What
``SAE`` does not compute is refused by name.

    format                encoder        decoder        input             unit rows        keeps
    fastsae               [F, D]         [F, D]         - b_dec           as configured    as configured
    saelens               [D, F]         [F, D]         flag              older: flag    score > threshold; top k, with decoder norms or not
    sparsify              [F, D]         [F, D]         unless transcode  flag             top k
    dictionary_learning   [F, D], [D, F] [D, F], [F, D] by class          by class         by class; score > threshold
    circuit_tracer        [F, D]         [F, D]         x                 no               score > 0 or threshold
    others                                                                                 see ``releases``

Training keeps decoder rows at norm 1 where the format does so and the rows are (``common.unit``): otherwise the first step, of whatever
rate, would change what the file computes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastsae._core import checks, files
from fastsae._core.extras import needed
from fastsae.formats import common, releases, weight_files

Writable = Literal["fastsae", "saelens", "sparsify", "dictionary_learning", "circuit_tracer"]
Release = Literal["gemma_scope", "gemma_scope_2", "llama_scope", "openai", "goodfire", "qwen_scope", "deepseek_r1"]
Format = Writable | Release
WRITABLE: tuple[str, ...] = get_args(Writable)
FORMATS = (*WRITABLE, *get_args(Release))

NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
"""sparsify's names that ``SAE.save`` uses too, so that its files load there."""


# ---------------------------------------------------------------- readers


def _read_fastsae(config: dict[str, Any], tensors: dict[str, Tensor], options: common.Options) -> common.Loaded:
    return common.Loaded(config, {NAMES.get(name, name): common.owned(tensor) for name, tensor in tensors.items()})


SAELENS = {
    "standard": "relu",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "abstopk": "abstopk",
    "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "batchtopk",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_TOPK = ("topk", "abstopk")
_ROWS = {"layer_norm": "layer_norm", "constant_norm_rescale": "norm"}
"""SAELens' words for ``normalise_rows``."""
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in checks.FLOATS}


def _read_saelens(config: dict[str, Any], tensors: dict[str, Tensor], options: common.Options) -> common.Loaded:
    architecture, k = _architecture(config)
    kind = SAELENS.get(architecture)
    if kind is None:
        raise ValueError(f"SAELens architecture {architecture!r} is not supported; known: {', '.join(SAELENS)}")
    transcoder = "transcoder" in architecture
    dtype = str(config.get("dtype", "float32")).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} of the configuration is not supported; known: {', '.join(_DTYPES)}")
    finetuned = tensors.pop("scaling_factor", None)  # up to 5.x; all ones where it was not used
    names = {name: name for name in ("W_enc", "W_dec", "b_dec")}
    names |= {name: name for name in (("b_gate", "r_mag", "b_mag") if kind == "gated" else ("b_enc",))}
    names |= {"threshold": "threshold"} if kind == "jumprelu" else {}
    names |= {"W_skip": "W_skip"} if "skip" in architecture else {}
    names |= {"topk_threshold": "running_threshold"} if kind == "batchtopk" else {}  # of a trainer's checkpoint
    found = common.take(tensors, names)
    threshold = found.pop("running_threshold", None)
    found = common.matrices(found, "W_enc", dtype=options.dtype or _DTYPES[dtype])
    common.agree("d_in", config.get("d_in"), found["W_enc"].shape[1])
    common.agree("d_sae", config.get("d_sae"), found["W_enc"].shape[0])
    if finetuned is not None and not torch.allclose(finetuned, torch.ones_like(finetuned)):
        if not common.flag(config, "finetuning_scaling_factor", False):
            raise ValueError("a scaling_factor that is not 1 beside finetuning_scaling_factor false contradicts itself")
        if finetuned.shape != (found["W_dec"].shape[0],):
            raise ValueError(f"scaling_factor must have shape [{found['W_dec'].shape[0]}], got {list(finetuned.shape)}")
        common.multiply(found["W_dec"], finetuned)
    apply = common.flag(config, "apply_b_dec_to_input", not transcoder)
    if transcoder and apply:
        raise ValueError("apply_b_dec_to_input does not go with a transcoder")
    more: dict[str, Any] = {"pre_bias": apply, "normalize_decoder": common.flag(config, "normalize_sae_decoder", False)}
    if kind in _TOPK:
        more["k"] = common.count("k", k)
    if threshold is not None:
        found["running_threshold"] = common.scalar("topk_threshold", threshold)
        more |= {"k": k, "rate": config.get("topk_threshold_lr", 0.01), "prefixes": config.get("matryoshka_widths")}
    if kind == "jumprelu" and "jumprelu_bandwidth" in config:  # trainers' checkpoints say what they trained with
        more["bandwidth"] = config["jumprelu_bandwidth"]
    if (rows := _ROWS.get(str(config.get("normalize_activations")))) is not None:
        if "W_skip" in found:
            raise ValueError("a normalisation by row does not go with a skip connection, which takes the rows as they are")
        if options.scaling_factor is not None:
            raise ValueError(f"scaling_factor does not go with normalize_activations {config['normalize_activations']!r}")
        more["normalise_rows"] = rows
    factor = 1.0 if rows else _input_factor(config, options)
    found = common.scale_inputs(found, factor)
    if common.flag(config, "rescale_acts_by_decoder_norm", False) and kind in (*_TOPK, "batchtopk"):
        found = common.fold_decoder_norm(found)
        if threshold is not None:  # of scores times the norms before they were divided by the factor
            found["running_threshold"] /= factor
    if transcoder:
        d_out = found["W_dec"].shape[1]
        common.agree("d_out", config.get("d_out"), d_out)
        more |= {"transcode": True, "d_out": d_out, "skip_connection": "W_skip" in found}
    return common.Loaded(common.config(found, kind, **more), found)


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


def _input_factor(config: dict[str, Any], options: common.Options) -> float:
    """What SAELens multiplies the inputs by, where it is one number."""
    normalise = config.get("normalize_activations")
    if normalise is None or isinstance(normalise, bool):  # of older versions
        normalise = "expected_average_only_in" if normalise else "none"
    if normalise == "none":
        if options.scaling_factor is not None:
            raise ValueError("scaling_factor does not go with normalize_activations 'none'")
        return 1.0
    if normalise not in ("expected_average_only_in", "constant_scalar_rescale"):
        known = f"none, expected_average_only_in, constant_scalar_rescale, {', '.join(_ROWS)}"
        reason = "the file does not hold its matrices" if normalise == "covariance_whitening" else "unknown"
        raise ValueError(f"normalize_activations {normalise!r} is not supported ({reason}); known: {known}")
    held = config.get("activation_normalization_factor") if normalise == "constant_scalar_rescale" else config.get("activation_scaler")
    if held is not None and options.scaling_factor is not None:
        raise ValueError(f"scaling_factor does not go with normalize_activations {normalise!r}, whose factor the file holds")
    if held is None and options.scaling_factor is None:
        raise ValueError(
            f"normalize_activations {normalise!r} multiplies inputs by a number that the file does not hold: "
            "give it as scaling_factor=, or 1.0 where your inputs are scaled already"
        )
    name = "scaling_factor" if held is None else "activation_normalization_factor" if "constant" in normalise else "activation_scaler.json"
    given = options.scaling_factor if held is None else held
    return checks.number("SAE.from_pretrained", name, given)


def _read_sparsify(config: dict[str, Any], tensors: dict[str, Tensor], options: common.Options) -> common.Loaded:
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise ValueError(f"sparsify activation {activation!r} is not supported; known: topk")
    if common.flag(config, "signed", False):
        raise ValueError("sparsify's signed top k is not supported")
    if "W_dec" not in tensors:
        raise ValueError("the file holds an encoder only (it was saved with decoder=False)")
    skip = common.flag(config, "skip_connection", False)
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    found = common.matrices(common.take(tensors, names | ({"W_skip": "W_skip"} if skip else {})))
    F, d_in = found["W_enc"].shape
    common.agree("d_in", config.get("d_in"), d_in)
    # num_latents 0 means expansion_factor times d_in.
    common.agree("num_latents", config.get("num_latents") or d_in * common.count("expansion_factor", config.get("expansion_factor", 32)), F)
    transcode = common.flag(config, "transcode", False)
    more: dict[str, Any] = {"k": common.count("k", config.get("k", 32)), "pre_bias": not transcode}
    if transcode or skip:
        more |= {"transcode": True, "d_out": found["W_dec"].shape[1], "skip_connection": skip}
    more["normalize_decoder"] = common.flag(config, "normalize_decoder", True) and not transcode
    return common.Loaded(common.config(found, "topk", **more), found)


_DICTIONARIES = {
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu",
    "JumpReLUAutoEncoder": "jumprelu",
    "AutoEncoderTopK": "topk",
    "TopKSAE": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "batchtopk",
}
"""Activation of each class of dictionary_learning and its forks."""
_SPELLINGS = {
    "W_enc": ("encoder.weight", "W_enc"),
    "b_enc": ("encoder.bias", "b_enc"),
    "W_dec": ("decoder.weight", "W_dec", "decoder"),
    "b_dec": ("bias", "b_dec", "decoder.bias", "decoder_bias"),
    "b_gate": ("gate_bias", "b_gate"),
    "r_mag": ("r_mag",),
    "b_mag": ("mag_bias", "b_mag"),
}
"""Names that a tensor has had: of ``nn.Linear``, whose decoder is ``[D, F]``; of bare parameters, whose encoder is; both ``[F, D]``."""


def _read_dictionary_learning(config: dict[str, Any], tensors: dict[str, Tensor], options: common.Options) -> common.Loaded:
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        raise ValueError(f"the configuration must hold an object 'trainer', got {type(trainer).__name__}")
    kind = trainer.get("dict_class")
    if not isinstance(kind, str) or kind not in _DICTIONARIES:
        raise ValueError(f"dictionary_learning dict_class {kind!r} is not supported; known: {', '.join(_DICTIONARIES)}")
    activation = _DICTIONARIES[kind]
    wanted = {"W_enc", "W_dec", "b_dec", *(("b_gate", "r_mag", "b_mag") if activation == "gated" else ("b_enc",))}
    names = {next((n for n in _SPELLINGS[short] if n in tensors), _SPELLINGS[short][0]): short for short in sorted(wanted)}
    if activation == "jumprelu":
        names["threshold"] = "threshold"
    counted = {"k": "k", "threshold": "running_threshold"} if "topk" in activation else {}
    if "group_sizes" in tensors or "Matryoshka" in kind:
        names["group_sizes"] = "group_sizes"
    found = common.take(tensors, names, counted)
    k, threshold, groups = (found.pop(name, None) for name in ("k", "running_threshold", "group_sizes"))
    turned = [short for name, short in (("W_enc", "W_enc"), ("decoder.weight", "W_dec")) if name in names]
    found = common.matrices(found, *turned)
    F, d_in = found["W_enc"].shape
    common.agree("activation_dim", trainer.get("activation_dim"), d_in)
    common.agree("dict_size", trainer.get("dict_size"), F)
    open_question = activation == "jumprelu"
    if options.pre_bias is not None and not open_question:
        raise ValueError(f"pre_bias is for JumpReluAutoEncoder, whose files do not say; this is {kind}")
    more: dict[str, Any] = {"pre_bias": bool(options.pre_bias) if open_question else kind != "AutoEncoderNew"}
    more["normalize_decoder"] = kind != "AutoEncoderNew"
    if "topk" in activation:
        more["k"] = _agreed_k(k, trainer.get("k", options.k), activation == "batchtopk")
    if activation == "batchtopk" and threshold is None:  # nothing says what evaluation keeps: with -1 it would be every positive score
        activation = "topk"
    if activation == "batchtopk" and threshold is not None:
        found["running_threshold"] = common.scalar("threshold", threshold)
        beta = trainer.get("threshold_beta", 0.999)
        more["rate"] = 1 - checks.number("SAE.from_pretrained", "threshold_beta", beta, positive=False)
    if groups is not None:
        if groups.dim() != 1 or groups.dtype not in (torch.int64, torch.int32) or bool((groups < 1).any()) or int(groups.sum()) != F:
            raise ValueError(f"group_sizes must be positive integers that add up to {F}, got {groups.tolist()}")
        more["prefixes"] = groups.cumsum(0).tolist()
    if (norm := config.get("norm_factor")) is not None:  # a backup's biases are those of inputs divided by it, which the last save undoes
        norm = checks.number("SAE.from_pretrained", "norm_factor", checks.plain(norm))
        for name in ("b_enc", "b_dec", "b_gate", "b_mag", "threshold", "running_threshold"):
            if name in found and not (name == "running_threshold" and found[name] < 0):
                found[name] *= norm
    if kind == "AutoEncoder" and options.fold_decoder_norm is None:  # the library's own loader does it, where norms are not 1 yet
        norm = common.norms_of(found["W_dec"])
        if not torch.allclose(norm.float(), torch.ones_like(norm.float())):
            found = common.fold_decoder_norm(found)
    return common.Loaded(common.config(found, activation, **more), found)


def _agreed_k(held: Tensor | None, claimed: Any, fraction: bool) -> float:
    """k of the buffer (annealed in training) and of the configuration, which must not differ; some wrote it as a float."""
    if held is not None and held.numel() != 1:
        raise ValueError(f"k must be one number, got {list(held.shape)} {held.dtype}")
    found = [value.item() if isinstance(value, Tensor) else value for value in (held, claimed) if value is not None]
    k = [int(value) if isinstance(value, float) and value.is_integer() else value for value in found]
    if len(k) == 2 and k[0] != k[1]:
        raise ValueError(f"the configuration claims k={claimed!r}, the tensors k={found[0]}")
    whole = not (fraction and k and isinstance(k[0], float))
    return common.count("k", k[0] if k else None) if whole else checks.number("SAE.from_pretrained", "k", k[0])


_READERS: dict[str, Callable[[dict[str, Any], dict[str, Tensor], common.Options], common.Loaded]] = {
    "fastsae": _read_fastsae,
    "saelens": _read_saelens,
    "sparsify": _read_sparsify,
    "dictionary_learning": _read_dictionary_learning,
    "gemma_scope": releases.gemma_scope,
    "gemma_scope_2": releases.gemma_scope,
    **{name: getattr(releases, name) for name in ("llama_scope", "circuit_tracer", "openai", "goodfire", "qwen_scope", "deepseek_r1")},
}


def read(source: str | os.PathLike[str], format: str | None, options: common.Options) -> common.Loaded:  # noqa: A002
    """(configuration, tensors) of a local folder or weights' file. ValueError where it is damaged or not supported."""
    found, weights, config, tensors, more = weight_files.read_configured(source, format)
    if options.scaling_factor is not None and found not in ("saelens", "llama_scope"):
        raise ValueError(f"{weights}: scaling_factor is for SAELens's normalize_activations, this is a file of {found}")
    if options.pre_bias is not None and found != "dictionary_learning":
        raise ValueError(f"{weights}: pre_bias is for dictionary_learning's JumpReluAutoEncoder, this is a file of {found}")
    try:
        for name, tensor in tensors.items():
            if tensor.dtype not in checks.FLOATS and name not in ("k", "group_sizes", *releases.STATISTICS):
                raise ValueError(f"{name} must have dtype {', '.join(_DTYPES)}, got {str(tensor.dtype).removeprefix('torch.')}")
        loaded = _READERS[found](config, tensors, options)
        if options.k is not None and loaded.config.get("k") != options.k:
            raise ValueError(f"k={options.k} is for files that do not hold it, this one's is {loaded.config.get('k')}")
        if options.fold_decoder_norm:
            if loaded.config["activation"] in (*_TOPK, "batchtopk"):
                raise ValueError("fold_decoder_norm would change which latents a top k keeps")
            loaded = common.Loaded(loaded.config, common.fold_decoder_norm(loaded.tensors))
        config, tensors = dict(loaded.config), loaded.tensors
        if common.flag(config, "normalize_decoder", True) and tensors["W_dec"].dim() == 2 and not common.unit(tensors["W_dec"]):
            config["normalize_decoder"] = False
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{weights} (read as {found}): {error}") from error
    return common.Loaded(config, tensors, more)


# ---------------------------------------------------------------- the Hub


def check_subfolder(op: str, subfolder: str | None) -> list[str]:
    """The parts of a path inside a repository; ValueError where it is none."""
    parts = (subfolder or "").split("/")
    if subfolder is not None and any(part in ("", ".", "..") or "\\" in part or ":" in part or "*" in part for part in parts):
        raise ValueError(f"{op}: subfolder must be a relative path inside the repository, got {subfolder!r}")
    return parts


def fetch(repository: str, subfolder: str | None, revision: str | None, format: str | None) -> Path:  # noqa: A002
    """The folder or file of a Hub repository, downloaded (into huggingface_hub's cache): only the weights and configurations of known
    names, or the file that ``subfolder`` names with the configurations beside."""
    op = "SAE.from_pretrained"
    parts = check_subfolder(op, subfolder)
    hub = needed("huggingface_hub", f"{op}: reading from the Hub needs huggingface_hub", "hub")
    of_file = parts[-1].endswith(weight_files.ENDS)
    names = weight_files.downloads([format] if format else FORMATS, parts[-1] if of_file else None)
    prefix = "/".join([*(parts[:-1] if of_file else parts), ""]).lstrip("/")
    try:
        root = hub.snapshot_download(repository, revision=revision, allow_patterns=sorted(prefix + name for name in names))
    except FileNotFoundError as error:  # no connection, and not in the cache
        raise FileNotFoundError(f"{op}: {repository} is no folder or file here, and not to be had from the Hub: {error}") from error
    folder = Path(root, *parts) if subfolder else Path(root)
    if not folder.exists():
        raise FileNotFoundError(f"{op}: {repository} has no folder or file {subfolder!r} with {', '.join(sorted(names))}")
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
    writers["circuit_tracer"] = _write_circuit_tracer
    try:
        if config.get("normalise_rows") is not None and format != "saelens":
            raise ValueError("has no normalisation by row")
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
        "normalize_activations": {ours: theirs for theirs, ours in _ROWS.items()}.get(config["normalise_rows"], "none"),
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
        tensors = common.shift_pre_bias(tensors, 1 if wants else -1)
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


def _write_circuit_tracer(config: dict[str, Any], tensors: dict[str, Tensor], metadata: Mapping[str, Any]) -> Written:
    """``metadata`` has no place beside the weights, but inside."""
    if tensors["W_dec"].shape[1] != config["d_in"]:
        raise ValueError(f"has d_out = d_in only, got d_out={tensors['W_dec'].shape[1]}, d_in={config['d_in']}")
    return dict(metadata), circuit_tracer_tensors(config, tensors)


def circuit_tracer_tensors(config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names of a layer's file."""
    kind = config["activation"]
    if kind not in ("relu", "jumprelu", "batchtopk"):
        raise ValueError(f"files hold ReLU and JumpReLU, the activation is {kind!r}")
    if config["pre_bias"]:
        tensors = common.shift_pre_bias(tensors, -1)
    out = {name: tensors[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "W_skip") if name in tensors}
    threshold = tensors.get("threshold", tensors.get("running_threshold"))
    if threshold is not None:  # its gate has no ReLU
        out["activation_function.threshold"] = threshold.clamp_min(0).to(out["b_enc"].dtype).expand_as(out["b_enc"]).contiguous()
    return out
