"""Matching pursuit beside k packed encodes of one feature, and beside SAELens' own, whose stopping rules are ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastsae
from bench.harness import name, normal, optional, shapes, unit_rows
from fastsae.sae import PursuitWeights, encode_pursuit

SHAPES = shapes([(256, 768, 24576, 32)], [(32, 64, 2048, 8)])
TOLERANCE = 1e-2


@pytest.mark.seconds(200)
@pytest.mark.parametrize("weights", [fastsae.pack, PursuitWeights], ids=["packed", "frozen"])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_pursuit(shape: tuple[int, int, int, int], weights: Callable[..., Any], compare: Callable[..., None]) -> None:
    rows, width, features, k = shape
    x, W = normal(rows, width), unit_rows(features, width)
    packed, handle = fastsae.pack(W), weights(W)

    def ours() -> fastsae.RaggedLatents:
        return encode_pursuit(x, handle, k=k, tolerance=TOLERANCE)

    def encodes() -> None:
        for _ in range(k):
            fastsae.encode_topk(x, packed, k=1)

    others: dict[str, Callable[[], object]] = {"k packed encodes": encodes}
    theirs = optional("sae_lens.saes.matching_pursuit_sae", "sae-lens")
    if theirs is not None:
        others["SAELens"] = lambda: theirs._encode_matching_pursuit(x, W, TOLERANCE, k, True)

    def verify() -> None:
        few = encode_pursuit(x[:8], W, k=k, tolerance=TOLERANCE)
        got = ours()
        assert torch.equal(few.values, got.values[: few.values.numel()]) and torch.equal(few.col, got.col[: few.col.numel()])
        if theirs is not None:
            same = theirs._encode_matching_pursuit(x[:8], W, TOLERANCE, k, True)
            torch.testing.assert_close(same, few.to_dense(), rtol=1e-4, atol=1e-4)

    with torch.no_grad():
        compare(f"encode_pursuit {'frozen' if weights is PursuitWeights else 'packed'}", name(shape), ours, others, verify)
