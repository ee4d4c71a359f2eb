"""decode and its gradients beside ``F.embedding_bag`` and the dense product, in the usual shapes (B, D, F, k)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import embedding_bag

import fastsae
from bench.harness import DEVICE, name, normal, shapes, unit_rows
from fastsae.dispatch import OPS

SHAPES = shapes([(256, 768, 24576, 32), (1024, 768, 24576, 64), (256, 2048, 65536, 64), (64, 4096, 131072, 64)], [(32, 64, 2048, 8)])


def _inputs(shape: tuple[int, ...], layout: str) -> tuple[fastsae.TopKLatents, torch.Tensor, torch.Tensor]:
    rows, width, features, k = shape
    generator = torch.Generator().manual_seed(1)
    indices = torch.rand(rows, features, generator=generator).topk(k).indices.to(DEVICE)
    W = unit_rows(features, width)
    return (
        fastsae.TopKLatents(normal(rows, k).abs(), indices, features),
        W.T.contiguous().T if layout == "DF" else W,
        normal(rows, width, seed=2),
    )


@pytest.mark.parametrize("layout", ["FD", "DF"])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_decode(shape: tuple[int, ...], layout: str, compare: Callable[..., None]) -> None:
    latents, W, _ = _inputs(shape, layout)
    values, indices = latents.values, latents.indices

    def ours() -> torch.Tensor:
        return fastsae.decode(latents, W)

    def dense() -> torch.Tensor:
        return torch.zeros(shape[0], shape[2], device=DEVICE).scatter_(1, indices, values) @ W

    def verify() -> None:
        OPS["decode"].check((values[:8], indices[:8], None, W, None), fastsae.decode(latents.rows(slice(0, 8)), W))

    others = {"dense scatter+mm": dense}
    if layout == "FD":
        others["torch embedding_bag"] = lambda: embedding_bag(indices, W, per_sample_weights=values, mode="sum")
    compare(f"decode {layout}", name(shape), ours, others, verify)


@pytest.mark.seconds(25)
@pytest.mark.parametrize("layout", ["FD", "DF"])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_decode_backward(shape: tuple[int, ...], layout: str, compare: Callable[..., None]) -> None:
    latents, W, grad = _inputs(shape, layout)
    out = torch.empty_like(W)

    def ours() -> tuple[torch.Tensor, ...]:
        return fastsae.functional.decode_backward(grad, latents.values, latents.indices, W, out=out)

    def plain(decode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        leaf_values, leaf_W = latents.values.clone().requires_grad_(), W.detach().requires_grad_()
        return lambda: torch.autograd.grad(decode(leaf_values, leaf_W), (leaf_values, leaf_W), grad)

    def verify() -> None:
        ours()
        fresh = plain(lambda v, w: (v.unsqueeze(-1) * w[latents.indices]).sum(1))()
        # Float32 sums in another order; the contract suite holds the tight tolerance.
        torch.testing.assert_close(out, fresh[1], rtol=1e-4, atol=1e-4)  # pyright: ignore[reportIndexIssue]

    others = {
        "dense scatter+mm (fwd+bwd)": plain(lambda v, w: torch.zeros(shape[0], shape[2], device=DEVICE).scatter(1, latents.indices, v) @ w)
    }
    if layout == "FD":
        others["torch embedding_bag (fwd+bwd)"] = plain(lambda v, w: embedding_bag(latents.indices, w, per_sample_weights=v, mode="sum"))
    others["clearing one dense gradient"] = lambda: torch.zeros_like(W)
    compare(f"decode_backward {layout}", name(shape), ours, others, verify, floor="clearing one dense gradient")
