"""What a call costs on tiny inputs, where the host's work is all there is (B = 1, D = 64, F = 512, k = 8)."""

from __future__ import annotations

from collections.abc import Callable

import torch

import fastsae
from bench.harness import normal, unit_rows

CALLS = 200


def _many(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            call()

    return run


def test_overhead(compare: Callable[..., None]) -> None:
    x, W = normal(1, 64), unit_rows(512, 64)
    latents = fastsae.encode_topk(x, W, k=8)
    leaf = W.clone().requires_grad_()

    def step() -> None:
        fastsae.decode(latents, leaf).sum().backward()

    others = {
        f"{CALLS} x decode, forward and backward": _many(step),
        f"{CALLS} x torch embedding_bag": _many(
            lambda: torch.nn.functional.embedding_bag(latents.indices, W, per_sample_weights=latents.values, mode="sum")
        ),
        f"{CALLS} x encode_topk": _many(lambda: fastsae.encode_topk(x, W, k=8)),
        f"{CALLS} x torch linear+relu+topk": _many(lambda: torch.nn.functional.linear(x, W).relu().topk(8)),
    }
    compare(f"{CALLS} x decode", "1x64x512x8", _many(lambda: fastsae.decode(latents, W)), others, lambda: None)
