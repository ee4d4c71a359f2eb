"""SAEs of every kind and variant, small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastsae import SAE, AbsTopK, BatchTopK, Gated, JumpReLU, ReLU, TopK

KINDS = {
    "topk": TopK(3),
    "topk_signed": TopK(3, relu=False),
    "abstopk": AbsTopK(3),
    "relu": ReLU(),
    "jumprelu": JumpReLU(0.2),
    "jumprelu_band": JumpReLU(0.2, bandwidth=0.5),
    "jumprelu_tensor": JumpReLU(torch.linspace(0, 1, 20), bandwidth=0.5),
    "batchtopk": BatchTopK(2.5),
    "gated": Gated(torch.linspace(-1, 0.5, 20), torch.linspace(-0.5, 0.5, 20), torch.linspace(-0.3, 0.4, 20)),
}
each = pytest.mark.parametrize("kind", KINDS)


def build(kind: str, **options: Any) -> SAE:
    sae = SAE(7, 20, KINDS[kind], seed=3, **options)
    with torch.no_grad():  # biases that matter
        if "b_enc" in dict(sae.named_parameters()):
            sae.b_enc.copy_(torch.linspace(-0.3, 0.3, 20))
        sae.b_dec.copy_(torch.linspace(-1, 1, 7))
    return sae


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """(dense latents, x_hat)."""
    p = (x - sae.b_dec) @ sae.W_enc.T
    if isinstance(sae.activation, Gated):
        code = (p + sae.b_gate > 0) * (p * sae.r_mag.exp() + sae.b_mag).relu()
        return code, code @ sae.W_dec + sae.b_dec
    z = p + sae.b_enc
    if isinstance(sae.activation, BatchTopK):
        kept = z.relu().flatten().topk(min(int(sae.activation.k * z[..., 0].numel()), z.numel()))
        code = torch.zeros(z.numel(), dtype=z.dtype).scatter(0, kept.indices, kept.values).reshape(z.shape)
    elif isinstance(sae.activation, TopK):
        kept = (z.abs() if sae.activation.absolute else z).topk(sae.activation.k, dim=-1).indices
        code = torch.zeros_like(z).scatter(-1, kept, z.gather(-1, kept).relu() if sae.activation.relu else z.gather(-1, kept))
    else:
        theta = sae.threshold if isinstance(sae.activation, JumpReLU) else torch.zeros(())
        code = z * (z > theta.clamp_min(0))
    return code, code @ sae.W_dec + sae.b_dec


VARIANTS: dict[str, dict[str, Any]] = {
    "matryoshka": {"prefixes": [4, 5, 20]},
    "tied": {"tied": True},
    "transcoder": {"d_out": 5},
    "skip": {"d_out": 5, "skip": True, "prefixes": [11, 20]},
}
variant = pytest.mark.parametrize("name", VARIANTS)


def build_variant(kind: str, name: str, **options: Any) -> SAE:
    sae = SAE(7, 20, KINDS[kind], seed=3, **VARIANTS[name], **options)
    with torch.no_grad():
        for number, parameter in enumerate(sae.parameters()):
            parameter.add_(rows(*parameter.shape, seed=number, dtype=parameter.dtype), alpha=0.1)
    return sae
