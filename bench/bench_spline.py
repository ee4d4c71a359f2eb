"""Spline hashes of one layer beside torch's linear, packed bits and a hash a row, in TARGETS' shapes (N, D, H)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
import torch

import fastsae
from bench.harness import name, normal, shapes
from fastsae.dispatch import OPS

SHAPES = shapes([(65536, 64, 1024), (16384, 768, 3072), (262144, 2, 256)], [(512, 16, 128)])


@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_spline_hash(shape: tuple[int, int, int], compare: Callable[..., None]) -> None:
    rows, width, size = shape
    x, W, b = normal(rows, width), normal(size, width, seed=1), normal(size, seed=2)

    def plain() -> list[bytes]:
        bits = np.packbits((torch.nn.functional.linear(x, W, b) > 0).cpu().numpy(), axis=1)
        return [hashlib.blake2b(row, digest_size=8).digest() for row in bits]

    def verify() -> None:
        few = fastsae.spline_hash(x[:64], W, b)
        OPS["spline_hash"].check((x[:64], W, b, None, 0, 0, 64), few)

    others = {"torch linear, packbits, blake2b a row": plain, "torch linear alone": lambda: torch.nn.functional.linear(x, W, b)}
    compare("spline_hash", name(shape), lambda: fastsae.spline_hash(x, W, b), others, verify, floor="torch linear alone")
