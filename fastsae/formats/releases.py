"""Files of published dictionaries that no training library writes: what each computes, in the terms of ``SAE``.

    format           encoder    decoder     activation                            holds beside
    gemma_scope      [D, F]     [F, D]      z where z > threshold
    gemma_scope_2    [D, F]     [F, d_out]  the same                              skip [D, d_out]
    circuit_tracer   [F, D]     [F, D]      relu; z where z > threshold           skip [D, D]
    llama_scope      [F, D]     [D, F]      by its configuration                  mean norm of the inputs
                     [D, F]     [F, D]      under the names W_E, W_D
    openai           [F, D]     [D, F]      relu; top k of standard rows           k
    goodfire         [F, D]     [D, F]      relu
    deepseek_r1      [F, D]     [D, F]      relu
    qwen_scope       [F, D]     [D, F]      top k, k in the repository's name

``b_dec`` is subtracted from the input by OpenAI's alone. Names do not tell ``[F, D]`` from ``[D, F]``: ``b_enc [F]`` does, and where F = D
the format, which then has to be given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastsae._core import checks
from fastsae.formats import common
from fastsae.formats.common import Loaded, Options

BARE = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec"}
STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
"""Of training, in OpenAI's files."""


def gemma_scope(config: dict[str, Any], tensors: Mapping[str, Tensor], options: Options) -> Loaded:
    """Both; the second has a configuration, and transcoders."""
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise ValueError(f"architecture {config['architecture']!r} is not supported; known: jump_relu")
    tensors = {"W_" + name[2:] if name.startswith("w_") else name: tensor for name, tensor in tensors.items()}
    if "W_dec" in tensors and tensors["W_dec"].dim() == 3:
        raise ValueError("it is a layer of a cross-layer transcoder, whose decoder writes to several layers: SAE has one")
    skip = "affine_skip_connection" in tensors
    if common.flag(config, "affine_connection", skip) != skip:
        raise ValueError(f"the configuration claims affine_connection={not skip}, the tensors have {'one' if skip else 'none'}")
    names = {**BARE, "threshold": "threshold", **({"affine_skip_connection": "W_skip"} if skip else {})}
    found = common.matrices(common.take(tensors, names), "W_enc", "W_skip", dtype=options.dtype or torch.float32)
    more: dict[str, Any] = {}
    if skip or config.get("hf_hook_point_out", config.get("hf_hook_point_in")) != config.get("hf_hook_point_in"):
        more = {"transcode": True, "d_out": found["W_dec"].shape[1], "skip_connection": skip}
    return Loaded(common.config(found, "jumprelu", **{"pre_bias": False, "normalize_decoder": True, **more}), found)


def circuit_tracer(config: dict[str, Any], tensors: Mapping[str, Tensor], options: Options) -> Loaded:
    """One layer; ``k`` is given for its class ``TopK``, which no file names."""
    names = BARE | {name: name.split(".")[-1] for name in ("activation_function.threshold", "W_skip") if name in tensors}
    found = common.matrices(common.take(tensors, names))
    F = found["b_enc"].shape[0]
    if found["W_enc"].shape[0] != F:
        raise ValueError(f"W_enc must be feature-major, [{F}, D] beside b_enc [{F}], got {list(found['W_enc'].shape)}")
    kind, more = ("jumprelu" if "threshold" in found else "relu"), dict[str, Any]()
    if options.k is not None and kind == "relu":
        kind, more = "topk", {"k": options.k, "relu": False}
    _no_negative(found)
    more |= {"transcode": True, "d_out": found["W_dec"].shape[1], "skip_connection": "W_skip" in found}
    return Loaded(common.config(found, kind, **{"pre_bias": False, "normalize_decoder": False, **more}), found)


def _no_negative(tensors: Mapping[str, Tensor]) -> None:
    """Where a threshold alone decides: ``JumpReLU`` here is ReLU below a negative one."""
    if "threshold" in tensors and bool((tensors["threshold"] < 0).any()):
        raise ValueError("a threshold is below 0, where its library keeps negative latents and SAE does not")


def llama_scope(config: dict[str, Any], tensors: Mapping[str, Tensor], options: Options) -> Loaded:
    """Of OpenMOSS, by the names of three versions."""
    if config.get("sae_type", "sae") != "sae" or config.get("hook_point_in") != config.get("hook_point_out", config.get("hook_point_in")):
        raise ValueError(f"sae_type {config.get('sae_type')!r} whose output is another hook point than its input is not supported")
    norms = [name for name in tensors if name.startswith("dataset_average_activation_norm.")]
    logs = [name for name in tensors if name.split(".")[-1] == "log_jumprelu_threshold"]
    linear = "encoder.weight" in tensors
    names = LINEAR if linear else {"W_E": "W_enc", "b_E": "b_enc", "W_D": "W_dec", "b_D": "b_dec"}
    held = {name: tensor for name, tensor in tensors.items() if name not in norms}
    found = common.take(held, {**names, **dict.fromkeys(logs, "threshold")})
    found = common.matrices(found, "W_dec" if linear else "W_enc", dtype=options.dtype)
    F, D = found["W_enc"].shape
    common.agree("d_model", config.get("d_model"), D)
    common.agree("d_sae", config.get("d_sae"), F)
    factor = _input_factor(config, [float(tensors[name]) for name in norms], D, options)
    kind = config.get("act_fn", "jumprelu" if logs or "jump_relu_threshold" in config else None)
    more: dict[str, Any] = {"pre_bias": common.flag(config, "apply_decoder_bias_to_pre_encoder", False), "normalize_decoder": False}
    if kind not in ("relu", "jumprelu", "topk"):
        raise ValueError(f"act_fn {kind!r} is not supported; known: relu, jumprelu, topk")
    if kind == "topk":  # which keeps negative scores too
        more |= {"k": common.count("top_k", config.get("top_k")), "relu": False}
    if kind == "jumprelu" and logs:
        found["threshold"] = found["threshold"].exp()
    elif kind == "jumprelu":  # one number, of the scores of inputs that are not scaled
        number = checks.number("SAE.from_pretrained", "jump_relu_threshold", config.get("jump_relu_threshold"), positive=False)
        found["threshold"] = found["b_enc"].new_full((F,), number * factor)
    _no_negative(found)
    if common.flag(config, "sparsity_include_decoder_norm", False):  # scores are compared times the decoder's norms
        if kind == "topk":
            found = common.fold_decoder_norm(found)
        elif kind == "jumprelu":
            common.multiply(found["threshold"], common.norms_of(found["W_dec"]), divide=True)
    return Loaded(common.config(found, kind, **more), common.scale_inputs(found, factor))


def _input_factor(config: Mapping[str, Any], norms: list[float], D: int, options: Options) -> float:
    """What its inputs are multiplied by: to the norm sqrt(D) on average."""
    if (mode := config.get("norm_activation", "dataset-wise")) == "inference":  # folded
        norms = [math.sqrt(D)]
    elif mode != "dataset-wise":
        raise ValueError(f"norm_activation {mode!r} is not supported (it depends on each row or batch); known: dataset-wise, inference")
    beside = config.get("dataset_average_activation_norm")
    norms = norms or ([beside["in"]] if isinstance(beside, dict) and "in" in beside else [])
    if (len(norms) == 1) == (options.scaling_factor is not None):
        given = f"scaling_factor is {options.scaling_factor}"
        raise ValueError(f"it holds {len(norms)} mean norms of its inputs, {given}: one of the two is needed")
    if options.scaling_factor is not None:
        return checks.number("SAE.from_pretrained", "scaling_factor", options.scaling_factor)
    return math.sqrt(D) / checks.number("SAE.from_pretrained", "dataset_average_activation_norm", norms[0])


def openai(config: dict[str, Any], tensors: Mapping[str, Tensor], options: Options) -> Loaded:
    """Of arXiv 2406.04093. ``config``: what is beside the tensors."""
    if (kind := config.get("activation", "ReLU")) not in ("ReLU", "TopK"):
        raise ValueError(f"OpenAI's activation {kind!r} is not supported; known: ReLU, TopK")
    names = {"encoder.weight": "W_enc", "latent_bias": "b_enc", "decoder.weight": "W_dec", "pre_bias": "b_dec"}
    found = common.take({name: tensor for name, tensor in tensors.items() if name not in STATISTICS}, names)
    loaded = _plain(found, options, pre_bias=True, normalize_decoder=True)
    if kind == "TopK":  # each row made standard first, ``postact_fn`` after
        held = config.get("activation_state_dict", {})
        if (after := held.get("postact_fn", "ReLU")) not in ("ReLU", "Identity"):
            raise ValueError(f"OpenAI's postact_fn {after!r} is not supported; known: ReLU, Identity")
        top = {"activation": "topk", "k": common.count("k", held.get("k", options.k)), "relu": after == "ReLU"}
        return loaded._replace(config=loaded.config | top | {"normalise_rows": "layer_norm"})
    return loaded


def goodfire(config: dict[str, Any], tensors: Mapping[str, Tensor], options: Options) -> Loaded:
    return _plain(common.take(tensors, {name.replace(".", "_linear."): short for name, short in LINEAR.items()}), options)


def deepseek_r1(config: dict[str, Any], tensors: Mapping[str, Tensor], options: Options) -> Loaded:
    """A file says nothing but four tensors, so this format has to be given."""
    return _plain(common.take(tensors, LINEAR), options)


def _plain(named: dict[str, Tensor], options: Options, **more: Any) -> Loaded:
    found = common.matrices(named, "W_dec", dtype=options.dtype)
    return Loaded(common.config(found, "relu", **{"pre_bias": False, "normalize_decoder": False, **more}), found)


def qwen_scope(config: dict[str, Any], tensors: Mapping[str, Tensor], options: Options) -> Loaded:
    """``config["path"]``: of the file, in whose repository's name k is."""
    found = common.matrices(common.take(tensors, BARE), "W_dec", dtype=options.dtype)
    named = re.search(r"SAE-Res-[^/\\]+-W(\d+)K-L0_(\d+)", str(config.get("path", "")))
    if named is not None:
        common.agree("its folder's name", 1024 * int(named[1]), found["W_enc"].shape[0])
    k = int(named[2]) if named is not None else options.k
    if k is None:
        raise ValueError("k is in the name of its repository (SAE-Res-..-L0_50) and not in the file: give it as k=")
    return Loaded(common.config(found, "topk", k=common.count("k", k), pre_bias=False, normalize_decoder=False), found)
