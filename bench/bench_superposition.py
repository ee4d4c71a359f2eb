"""Samples of superposition data beside the dense generator of the replications: uniforms for all [B, G], then a product with the features.

Shapes are (B, G, D); 5 features are active. "correlated" draws low-rank normals for every sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.harness import name, shapes
from fastsae.superposition import SuperpositionBatch, SuperpositionData

SHAPES = shapes([(256, 512, 256), (4096, 2048, 256), (4096, 16384, 768)], [(64, 128, 32)])


@pytest.mark.seconds(18)
@pytest.mark.parametrize("correlated", [False, True], ids=["independent", "correlated"])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_sample(shape: tuple[int, ...], correlated: bool, compare: Callable[..., None]) -> None:
    rows, G, D = shape
    data = SuperpositionData(G, D, mean_active=5, rate=0.99 ** (512 / G), covariance="low_rank" if correlated else None)
    p, features, generator = data.expected_probabilities, data.features, torch.Generator().manual_seed(1)

    inside: Any = data  # the rival draws from the same covariance

    def ours() -> SuperpositionBatch:
        return data.sample(rows)

    def dense() -> torch.Tensor:
        q = p
        if correlated:
            z = torch.randn(rows, inside._factor.shape[1], generator=generator) @ inside._factor.T
            z += inside._own * torch.randn(rows, G, generator=generator)
            q = 2 * p * torch.special.ndtr(z)
        active = torch.rand(rows, G, generator=generator) < q
        return (torch.rand(rows, G, generator=generator) * active) @ features

    def verify() -> None:
        x, latents, features = ours()
        torch.testing.assert_close(x, latents.to_dense() @ features, rtol=1e-4, atol=1e-4)
        assert abs(latents.values.shape[0] / rows - 5) < 1, "5 features are active"

    kind = "correlated" if correlated else "independent"
    compare(f"SuperpositionData.sample {kind}", name(shape), ours, {"dense uniforms and product": dense}, verify)
