"""Files of other libraries, written by hand, and what they compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsae import SAE, AbsTopK, BatchTopK, Gated, JumpReLU, ReLU, TopK

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

D, F, K = 6, 20, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 31 * len(shape) + sum(shape)))


X = draw(9, D, seed=5)
W_ENC, W_DEC, B_ENC, B_DEC = draw(F, D, seed=1), draw(F, D, seed=2) * (1 + torch.arange(F)[:, None] / F), draw(F) / 3, draw(D) / 2
THRESHOLD = draw(F, seed=7).abs() / 2
NORMS = W_DEC.norm(dim=1)


def topk(z: Tensor, k: int = K) -> Tensor:
    best = z.topk(k, dim=-1)
    return torch.zeros_like(z).scatter(-1, best.indices, best.values.relu())


def abstopk(z: Tensor) -> Tensor:
    best = z.abs().topk(K, dim=-1).indices
    return torch.zeros_like(z).scatter(-1, best, z.gather(-1, best))


def write(folder: Path, config: dict[str, Any] | None, tensors: dict[str, Tensor], file: str, config_file: str = "cfg.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if file.endswith(".pt"):
        torch.save(tensors, folder / file)
    elif file.endswith(".npz"):
        np.savez(folder / file, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        safetensors.save_file(tensors, folder / file)
    if config is not None:
        (folder / config_file).write_text(json.dumps(config))
    return folder


def saelens(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    version = {"metadata": {"sae_lens_version": "6.54.12"}} if "architecture" in config and "old" not in config else {}
    return write(folder, {"d_in": D, "d_sae": F, "dtype": "float32", **version, **config}, tensors, "sae_weights.safetensors")


def dl(folder: Path, kind: str, tensors: dict[str, Tensor], **trainer: Any) -> Path:
    config = {"trainer": {"dict_class": kind, "activation_dim": D, "dict_size": F, **trainer}, "buffer": {}}
    return write(folder, config, tensors, "ae.pt", "config.json")


def agrees(sae: SAE, latents: Tensor, x_hat: Tensor, x: Tensor = X) -> None:
    assert not sae.training
    run = sae(x)
    assert run.latents is not None
    torch.testing.assert_close(run.latents.to_dense(), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run.x_hat, x_hat, rtol=1e-5, atol=1e-5)


LENS = {"W_enc": W_ENC.T, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
COOK = {"encoder.weight": W_ENC, "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
LINEAR = {"encoder.weight": W_ENC, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T}
BARE = {"W_enc": W_ENC.T, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}


def own(folder: Path, W: Tensor, activation: Any, **options: Any) -> Path:
    sae = SAE(D, F, activation, seed=0, dtype=W.dtype, **options)
    with torch.no_grad():
        sae.W_dec.copy_(W)
    return sae.save(folder)


OURS: dict[str, Any] = {
    "topk": lambda: SAE(D, F, TopK(K), seed=0),
    "signed topk": lambda: SAE(D, F, TopK(K, relu=False), seed=0),
    "abstopk": lambda: SAE(D, F, AbsTopK(K), seed=0),
    "topk, bare input": lambda: SAE(D, F, TopK(K), pre_bias=False, seed=0),
    "relu": lambda: SAE(D, F, ReLU(), seed=0),
    "relu, bare input": lambda: SAE(D, F, ReLU(), pre_bias=False, seed=0),
    "jumprelu": lambda: SAE(D, F, JumpReLU(0.3), seed=0),
    "jumprelu, bare input": lambda: SAE(D, F, JumpReLU(0.3), pre_bias=False, seed=0),
    "gated": lambda: SAE(D, F, Gated(), seed=0),
    "gated, bare input": lambda: SAE(D, F, Gated(), pre_bias=False, seed=0),
    "batchtopk": lambda: SAE(D, F, BatchTopK(K), seed=0),
    "batchtopk 2.5": lambda: SAE(D, F, BatchTopK(2.5), seed=0),
    "matryoshka": lambda: SAE(D, F, BatchTopK(K), prefixes=[5, F], seed=0),
    "tied": lambda: SAE(D, F, TopK(K), tied=True, seed=0),
    "transcoder": lambda: SAE(D, F, TopK(K), d_out=D, seed=0),
    "skip transcoder": lambda: SAE(D, F, TopK(K), d_out=D, skip=True, seed=0),
    "relu transcoder": lambda: SAE(D, F, ReLU(), d_out=5, skip=True, seed=0),
    "jumprelu transcoder": lambda: SAE(D, F, JumpReLU(0.3), d_out=5, seed=0),
    "pre-bias and skip": lambda: SAE(D, F, TopK(K), d_out=D, skip=True, pre_bias=True, seed=0),
}


def ours(name: str) -> SAE:
    sae = OURS[name]()
    with torch.no_grad():
        for number, parameter in enumerate(sae.parameters()):
            parameter.add_(draw(*parameter.shape, seed=number) / 5)
        if isinstance(sae.activation, BatchTopK):
            sae.running_threshold.fill_(0.4)
    return sae.eval()


def without_entry(folder: Path) -> Path:
    """A folder of ``save`` as it was before the configuration was inside the weights' file."""
    path = folder / "sae.safetensors"
    safetensors.save_file({name: tensor.clone() for name, tensor in safetensors.load_file(path).items()}, path)
    return folder
