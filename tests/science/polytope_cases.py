"""Small networks of which everything is known."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import fastsae
from fastsae.polytopes import (
    as_net,
)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def linear(W: Sequence[Sequence[float]] | Tensor, b: Sequence[float] | Tensor | None = None) -> nn.Linear:
    W = torch.as_tensor(W, dtype=torch.float64)
    layer = nn.Linear(W.shape[1], W.shape[0], bias=b is not None, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(W)
        if b is not None:
            layer.bias.copy_(torch.as_tensor(b, dtype=torch.float64))
    return layer


def layers(widths: Sequence[int], seed: int) -> list[nn.Linear]:
    return [linear(draw(n, m, seed=seed + i) * (2 / m) ** 0.5, draw(n, seed=seed + i) * 0.3) for i, (m, n) in enumerate(pairwise(widths))]


def relu_net(widths: Sequence[int], seed: int = 0, slope: float = 0.0, residual: bool = False) -> fastsae.polytopes.Net:
    """Linear, activation, .., with a last Linear; layers that keep the width have a skip connection around them where asked."""
    parts: list[Any] = []
    *hidden, last = layers([*widths, 3], seed)
    for layer in hidden:
        part = nn.Sequential(layer, nn.LeakyReLU(slope) if slope else nn.ReLU())
        parts.append(as_net(part, residual=True) if residual and layer.in_features == layer.out_features else part)
    return as_net([*parts, last])


class RmsNorm(nn.Module):
    """By the names of Hugging Face's Llama; Gemma's, where ``gemma``, adds 1 to its weight."""

    def __init__(self, d: int, gemma: bool) -> None:
        super().__init__()
        self.weight, self.gemma = nn.Parameter(draw(d, seed=11) * 0.3 + (0 if gemma else 1)), gemma
        setattr(self, "eps" if gemma else "variance_epsilon", 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight + self.gemma) * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()


class GatedMlp(nn.Module):
    def __init__(self, d: int, h: int, act: nn.Module, bias: bool) -> None:
        super().__init__()
        self.gate_proj = linear(draw(h, d, seed=1), draw(h) if bias else None)
        self.up_proj = linear(draw(h, d, seed=2), draw(h, seed=1) if bias else None)
        self.down_proj = linear(draw(d, h, seed=3), draw(d) if bias else None)
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LlamaDecoderLayer(nn.Module):
    def __init__(self, d: int, h: int, bias: bool) -> None:
        super().__init__()
        self.post_attention_layernorm, self.mlp = RmsNorm(d, False), GatedMlp(d, h, nn.SiLU(), bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.post_attention_layernorm(x))


class Gemma2DecoderLayer(nn.Module):
    def __init__(self, d: int, h: int, bias: bool) -> None:
        super().__init__()
        self.post_attention_layernorm, self.mlp = RmsNorm(d, True), GatedMlp(d, h, nn.GELU("tanh"), bias)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = RmsNorm(d, True), RmsNorm(d, True)
        with torch.no_grad():
            self.post_attention_layernorm.weight.zero_()  # it stands before the residual sum of the attention

    def forward(self, x: Tensor) -> Tensor:
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


def gated_model(d: int, h: int, gemma: bool = False, bias: bool = False) -> nn.Module:
    """Layers that are no transformer's but for the MLP and its norms, by the names of Hugging Face's."""
    return nn.Sequential(nn.ModuleList([(Gemma2DecoderLayer if gemma else LlamaDecoderLayer)(d, h, bias) for _ in range(2)]))
