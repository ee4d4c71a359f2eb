"""decode and its gradients beside ``F.embedding_bag`` and the dense product, in the usual shapes (B, D, F, k)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

import fastsae
from bench.harness import DEVICE, checks, laid, name, normal, shapes, slots, unit_rows

SHAPES = shapes([(256, 768, 24576, 32), (1024, 768, 24576, 64), (256, 2048, 65536, 64), (64, 4096, 131072, 64)], [(32, 64, 2048, 8)])


def _inputs(shape: tuple[int, ...], layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """Values, indices, W."""
    rows, width, features, k = shape
    values, indices = slots(rows, features, k)
    return values.abs(), indices, laid(unit_rows(features, width), layout)


@pytest.mark.parametrize("layout", ["FD", "DF"])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_decode(shape: tuple[int, ...], layout: str, compare: Callable[..., None]) -> None:
    values, indices, W = _inputs(shape, layout)
    latents = fastsae.TopKLatents(values, indices, shape[2])
    others = {"dense scatter+mm": lambda: torch.zeros(shape[0], shape[2], device=DEVICE).scatter_(1, indices, values) @ W}
    if layout == "FD":
        others["torch embedding_bag"] = lambda: embedding_bag(indices, W, per_sample_weights=values, mode="sum")
    verify = checks("decode", values[:8], indices[:8], None, W, None)
    compare(f"decode {layout}", name(shape), lambda: fastsae.decode(latents, W), others, verify)


@pytest.mark.seconds(25)
@pytest.mark.parametrize("layout", ["FD", "DF"])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_decode_backward(shape: tuple[int, ...], layout: str, compare: Callable[..., None]) -> None:
    values, indices, W = _inputs(shape, layout)
    grad, out = normal(shape[0], shape[1], seed=2), torch.empty_like(W)

    def ours() -> object:
        return fastsae.functional.decode_backward(grad, values, indices, W, out=out)

    def plain(decode: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Any]:
        leaf_values, leaf_W = values.clone().requires_grad_(), W.detach().requires_grad_()
        return lambda: torch.autograd.grad(decode(leaf_values, leaf_W), (leaf_values, leaf_W), grad)

    def verify() -> None:
        ours()
        fresh = plain(lambda v, w: (v.unsqueeze(-1) * w[indices]).sum(1))()
        # Float32 sums in another order; the contract suite holds the tight tolerance.
        torch.testing.assert_close(out, fresh[1], rtol=1e-4, atol=1e-4)

    floor = "clearing one dense gradient"
    others = {"dense scatter+mm (fwd+bwd)": plain(lambda v, w: torch.zeros(shape[0], shape[2], device=DEVICE).scatter(1, indices, v) @ w)}
    if layout == "FD":
        others["torch embedding_bag (fwd+bwd)"] = plain(lambda v, w: embedding_bag(indices, w, per_sample_weights=v, mode="sum"))
    others[floor] = lambda: torch.zeros_like(W)
    compare(f"decode_backward {layout}", name(shape), ours, others, verify, floor=floor)
