"""Valid arguments of every operation, and the check of an error's text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastsae
from fastsae import TopKLatents


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


ROWS, D, F, OUT = 4, 8, 12, 5
WORDS = torch.arange(10).reshape(5, 2)
LATENTS = TopKLatents(draw(ROWS, 3), torch.arange(12).reshape(ROWS, 3), F)
LAYER = {"x": draw(ROWS, D), "W_enc": draw(F, D)}
VECTORS = {"b_enc": draw(F), "b_pre": draw(D), "scale": draw(F)}
GATES = {"b_gate": draw(F), "r_mag": draw(F), "b_mag": draw(F)}
NEURONS = {"x": draw(ROWS, D), "W": draw(F, D), "b": draw(F)}
VALID: dict[str, dict[str, Any]] = {
    "encode_topk": {**LAYER, **VECTORS, "k": 3},
    "encode_threshold": {**LAYER, **VECTORS, "threshold": draw(F), "bandwidth": 0.1},
    "encode_batch_topk": {**LAYER, **VECTORS, "k": 2.5},
    "encode_gated": {**LAYER, **GATES, "b_pre": draw(D)},
    "encode_pursuit": {"x": draw(ROWS, D), "W": torch.nn.functional.normalize(draw(F, D), dim=1), "k": 3, "tolerance": 0.1},
    "decode": {"latents": LATENTS, "W_dec": draw(F, OUT), "b_dec": draw(OUT), "x": draw(ROWS, D), "skip": draw(OUT, D)},
    "decode_backward": {"grad": draw(ROWS, OUT), "latents": LATENTS, "W_dec": draw(F, OUT), "out": draw(F, OUT)},
    "reconstruct": {**LAYER, **VECTORS, "W_dec": draw(F, D), "b_dec": draw(D), "target": draw(ROWS, D), "activation": fastsae.TopK(3)},
    "match_cosine": {"a": draw(6, D), "b": draw(7, D), "k": 2},
    "match": {"a": draw(6, D), "b": draw(7, D), "candidates": 2},
    "spline_code": NEURONS,
    "spline_hash": NEURONS,
    "near_zero_counts": NEURONS,
    "pack_signs": {"z": draw(ROWS, F)},
    "hash_signs": {"z": draw(ROWS, F)},
    "hash_code": {"words": WORDS},
    "hamming": {"a": WORDS, "b": WORDS[:3], "out": torch.zeros(5, 3, dtype=torch.int32)},
    "hamming_topk": {"a": WORDS, "b": WORDS, "k": 2},
    "select_topk": {"z": draw(ROWS, F), "k": 3},
    "count_codes": {"hashes": WORDS},
    "spline_keys": {"n_neurons": 4},
    "boundary_density": {"a": WORDS, "b": WORDS + 1, "x_a": draw(5, 3), "x_b": draw(5, 3) + 1},
    "neighbour_graph": {"codes": WORDS, "k": 2},
    "adam_": {"W": draw(F, D), "exp_avg": draw(F, D), "exp_avg_sq": draw(F, D).square(), "gradient": draw(F, D), "step": 1},
}


def call(op: str, **changes: Any) -> Any:
    places = (fastsae, fastsae.codes, fastsae.compare, fastsae.optim, fastsae.ops.decode, fastsae.ops.pursuit, fastsae.ops.select)
    function = next(getattr(place, op) for place in places if hasattr(place, op))
    return function(**{**VALID[op], **changes})


def rejects(error: type[Exception], message: str, op: str, **changes: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        call(op, **changes)
    assert type(caught.value) is error, "a subclass says something else"
