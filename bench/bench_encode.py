"""encode_topk beside the best plain torch, in TARGETS' shapes (B, D, F, k)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fastsae
from bench.harness import has_onednn, name, normal, onednn_linear, shapes, unit_rows
from fastsae.dispatch import OPS

SHAPES = shapes([(256, 768, 24576, 32), (1024, 768, 24576, 64), (256, 2048, 65536, 64), (64, 4096, 131072, 64)], [(32, 64, 2048, 8)])


@pytest.mark.parametrize("layout", ["FD", "DF"])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_encode_topk(shape: tuple[int, int, int, int], layout: str, compare: Callable[..., None]) -> None:
    rows, width, features, k = shape
    x, W, b = normal(rows, width), unit_rows(features, width), normal(features) / 10
    if layout == "DF":
        W = W.T.contiguous().T

    def ours() -> fastsae.TopKLatents:
        return fastsae.encode_topk(x, W, b, k=k)

    def verify() -> None:
        few = ours().rows(slice(0, 8))
        OPS["encode_topk"].check((x[:8], W, b, None, None, None, None, k, True), (few.values, few.indices))

    others = {"torch linear+relu+topk": lambda: torch.nn.functional.linear(x, W, b).relu().topk(k)}
    if has_onednn():
        linear = onednn_linear(x, W.contiguous())  # packed outside the timing, so that the layout does not matter to it
        others["oneDNN packed linear+relu+topk"] = lambda: linear("relu", b).topk(k)
        others["oneDNN product alone"] = lambda: linear()
    compare(f"encode_topk {layout}", name(shape), ours, others, verify, floor="oneDNN product alone")
