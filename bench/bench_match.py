"""Both directions of MMCS beside chunked products and maxima, in TARGETS' shapes (N, M, D)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fastsae
from bench.harness import has_onednn, name, onednn_linear, shapes, unit_rows
from fastsae.dispatch import OPS

SHAPES = shapes([(4096, 4096, 512), (16384, 16384, 768)], [(256, 300, 32)])


@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_match_cosine(shape: tuple[int, int, int], compare: Callable[..., None]) -> None:
    a, b = unit_rows(shape[0], shape[2]), unit_rows(shape[1], shape[2], seed=1)

    def chunked(product: Callable[[slice], torch.Tensor]) -> Callable[[], object]:
        return lambda: [product(slice(i, i + 1024)).max(1) for i in range(0, shape[0], 1024)]

    def verify() -> None:
        few = fastsae.match_cosine(a[:16], b)
        OPS["match_cosine"].check((a[:16], b, 1, False, False, 1e-8), (few.similarity, few.index))

    others: dict[str, Callable[[], object]] = {"torch chunked mm+max": chunked(lambda rows: a[rows] @ b.T)}
    if has_onednn():
        packed = onednn_linear(a[:1024], b)
        others["oneDNN product alone (rows / 1024 times)"] = lambda: [packed() for _ in range(0, shape[0], 1024)]
    compare(
        "match_cosine", name(shape), lambda: fastsae.match_cosine(a, b), others, verify, floor="oneDNN product alone (rows / 1024 times)"
    )
