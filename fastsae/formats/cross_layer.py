"""circuit-tracer's cross-layer transcoders: for each layer i of L the files

W_enc_{i}.safetensors   W_enc_{i} [F, D], b_enc_{i} [F], b_dec_{i} [D], threshold_{i} [F] (JumpReLU)
W_dec_{i}.safetensors   W_dec_{i} [F, L - i, D]
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


def read(folder: str | os.PathLike[str]) -> list[common.Loaded]:
    """A transcoder for each layer, its targets side by side; all biases of outputs are the first one's."""
    folder = Path(folder)
    n = len(list(folder.glob("W_enc_*.safetensors")))
    if n == 0:
        raise FileNotFoundError(f"{folder} must hold W_enc_0.safetensors, W_dec_0.safetensors and so on")
    layers, biases = list[dict[str, Tensor]](), list[Tensor]()
    for i in range(n):
        tensors: dict[str, Tensor] = {}
        for part in ("enc", "dec"):
            path = folder / f"W_{part}_{i}.safetensors"
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing, of {n} layers")
            tensors |= weight_files.read_tensors(path)
        names = {f"{name}_{i}": name for name in ("W_enc", "b_enc", "b_dec", "W_dec")}
        found = common.take(tensors, names, {f"threshold_{i}": "activation_function.threshold"})
        for name, tensor in found.items():
            checks.tensor("circuit-tracer's file", f"{name} of layer {i}", tensor)
        D = found["W_enc"].shape[-1]
        for name, wanted in (("W_dec", (None, n - i, D)), ("b_dec", (D,))):
            checks.shape("circuit-tracer's file", f"{name} of layer {i}", found[name], wanted, f"{list(wanted)} of {n} layers")
        biases.append(found.pop("b_dec"))
        layers.append(found | {"W_dec": found["W_dec"].flatten(1)})
    layers[0]["b_dec"] = torch.cat(biases)
    for layer in layers[1:]:
        layer["b_dec"] = layer["W_dec"].new_zeros(layer["W_dec"].shape[1])
    return [releases.circuit_tracer({}, layer, common.Options()) for layer in layers]


def write(op: str, folder: str | os.PathLike[str], layers: Sequence[tuple[dict[str, Tensor], Mapping[str, Any]]]) -> Path:
    """Of each layer's (tensors, configuration)."""
    folder, D, filled = Path(folder), layers[0][0]["W_enc"].shape[1], dict[Path, files.Fill]()
    b_dec = layers[0][0]["b_dec"].view(len(layers), D)
    for i, (tensors, config) in enumerate(layers):
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
