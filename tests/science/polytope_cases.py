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
