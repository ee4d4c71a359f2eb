"""Cross-layer transcoders: for each layer i of L the files, of circuit-tracer (read and written)

W_enc_{i}.safetensors   W_enc_{i} [F, D], b_enc_{i} [F], b_dec_{i} [D], threshold_{i} [F] (JumpReLU)
W_dec_{i}.safetensors   W_dec_{i} [F, L - i, D]

or of Gemma Scope 2

params_layer_{i}.safetensors   w_enc [D, F], b_enc [F], w_dec [F, L, D], b_dec [D], threshold [F], affine_skip_connection [D, D] (or not)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae._core import checks, files
from fastsae.formats import common, pretrained, releases, weight_files


def read(folder: str | os.PathLike[str], format: str | None = None) -> list[common.Loaded]:  # noqa: A002
    """A transcoder for each layer, its targets side by side; all biases of outputs are the first one's."""
    folder = Path(folder)
    gemma = len(list(folder.glob("params_layer_*.safetensors"))) if format != "circuit_tracer" else 0
    n = gemma or (len(list(folder.glob("W_enc_*.safetensors"))) if format != "gemma_scope_2" else 0)
    if n == 0:
        raise FileNotFoundError(f"{folder} must hold W_enc_0.safetensors, W_dec_0.safetensors and so on, or params_layer_0.safetensors ..")
    layers, biases = list[dict[str, Tensor]](), list[Tensor]()
    for i in range(n):
        files_of = [f"params_layer_{i}.safetensors"] if gemma else [f"W_{part}_{i}.safetensors" for part in ("enc", "dec")]
        tensors: dict[str, Tensor] = {}
        for name in files_of:
            path = folder / name
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing, of {n} layers")
            tensors |= weight_files.read_tensors(path)
        if gemma:
            found = _of_gemma(tensors, i, n)
        else:
            names = {f"{name}_{i}": name for name in ("W_enc", "b_enc", "b_dec", "W_dec")}
            found = common.take(tensors, names, {f"threshold_{i}": "activation_function.threshold"})
        op = f"{'Gemma Scope 2' if gemma else 'circuit-tracer'}'s file"
        for name, tensor in found.items():
            checks.tensor(op, f"{name} of layer {i}", tensor)
        D = found["W_enc"].shape[-1]
        for name, wanted in (("W_dec", (None, n - i, D)), ("b_dec", (D,))):
            checks.shape(op, f"{name} of layer {i}", found[name], wanted, f"{list(wanted)} of {n} layers")
        biases.append(found.pop("b_dec"))
        layers.append(found | {"W_dec": found["W_dec"].flatten(1)})
    layers[0]["b_dec"] = torch.cat(biases)
    for layer in layers[1:]:
        layer["b_dec"] = layer["W_dec"].new_zeros(layer["W_dec"].shape[1])
    return [releases.circuit_tracer({}, layer, common.Options()) for layer in layers]


def _of_gemma(tensors: dict[str, Tensor], i: int, n: int) -> dict[str, Tensor]:
    """By the names of circuit-tracer, which leaves out what a decoder holds for earlier layers, too."""
    same = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "activation_function.threshold"}
    found = common.take(tensors, same | ({"affine_skip_connection": "W_skip"} if "affine_skip_connection" in tensors else {}))
    W_enc, W_dec = found["W_enc"], found["W_dec"]
    if W_enc.dim() != 2 or W_dec.dim() != 3 or W_dec.shape[1] != n:
        raise ValueError(f"w_enc must be [D, F] and w_dec [F, {n}, D] in layer {i}, got {list(W_enc.shape)} and {list(W_dec.shape)}")
    if float(W_dec[:, :i].norm()) > 1e-3 * float(W_dec.norm()):
        raise ValueError(f"layer {i} writes to layers before it, which no cross-layer transcoder does")
    if "W_skip" in found:  # x @ W_skip, to its own layer
        D = W_enc.shape[0]
        checks.shape("Gemma Scope 2's file", f"affine_skip_connection of layer {i}", found["W_skip"], (D, D), f"[{D}, {D}]")
        found["W_skip"] = torch.nn.functional.pad(found["W_skip"].T, (0, 0, 0, (n - i - 1) * D))
    threshold = found["activation_function.threshold"].clamp_min(0)  # below 0 its ReLU decides
    return found | {"W_enc": W_enc.T, "W_dec": W_dec[:, i:].clone(), "activation_function.threshold": threshold}


def write(op: str, folder: str | os.PathLike[str], layers: Sequence[tuple[dict[str, Tensor], Mapping[str, Any]]]) -> Path:
    """Of each layer's (tensors, configuration)."""
    folder, D, filled = Path(folder), layers[0][0]["W_enc"].shape[1], dict[Path, files.Fill]()
    b_dec = layers[0][0]["b_dec"].view(len(layers), D)
    for i, (tensors, config) in enumerate(layers):
        if "W_skip" in tensors:
            raise ValueError(f"{op}: files have no skip connections, W_skip of layer {i} would be lost")
        try:
            out = pretrained.circuit_tracer_tensors(config, tensors)
        except ValueError as error:
            raise ValueError(f"{op}: {error}") from None
        out = {name.split(".")[-1]: tensor.cpu() for name, tensor in out.items()}
        out |= {"b_dec": b_dec[i].cpu().clone(), "W_dec": out["W_dec"].unflatten(1, (-1, D))}
        parts = {"dec": {f"W_dec_{i}": out.pop("W_dec")}, "enc": {f"{name}_{i}": tensor for name, tensor in out.items()}}
        fill, about = weight_files.save_safetensors, {"format": "circuit_tracer", "config": {}}
        filled |= {folder / f"W_{part}_{i}.safetensors": partial(fill, tensors=held, about=about) for part, held in parts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    files.replace_all(filled)
    return folder
