"""What a call costs on tiny inputs, where the host's work is all there is (B = 1, D = 64, F = 512, k = 8)."""

from __future__ import annotations

from collections.abc import Callable

from torch.nn.functional import embedding_bag, linear

import fastsae
from bench.harness import normal, unit_rows

CALLS = 200


def test_overhead(compare: Callable[..., None]) -> None:
    x, W = normal(1, 64), unit_rows(512, 64)
    latents = fastsae.encode_topk(x, W, k=8)
    leaf = W.clone().requires_grad_()
    calls: dict[str, Callable[[], object]] = {
        "decode": lambda: fastsae.decode(latents, W),
        "decode, forward and backward": lambda: fastsae.decode(latents, leaf).sum().backward(),
        "torch embedding_bag": lambda: embedding_bag(latents.indices, W, per_sample_weights=latents.values, mode="sum"),
        "encode_topk": lambda: fastsae.encode_topk(x, W, k=8),
        "torch linear+relu+topk": lambda: linear(x, W).relu().topk(8),
    }
    many = {f"{CALLS} x {who}": lambda call=call: [call() for _ in range(CALLS)] for who, call in calls.items()}
    compare(f"{CALLS} x decode", "1x64x512x8", many.pop(f"{CALLS} x decode"), many, lambda: None)
