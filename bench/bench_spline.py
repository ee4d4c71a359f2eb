"""Spline codes and hashes of one layer beside torch's linear, packed bits and a hash a row (N, D, H); and of given signs."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import fastsae
from bench.harness import DEVICE, checks, has_onednn, name, normal, onednn_linear, optional, shapes

SHAPES = shapes([(65536, 64, 1024), (16384, 768, 3072), (262144, 2, 256)], [(512, 16, 128)])
SIGNS = shapes([(65536, 1024), (16384, 3072)], [(512, 128)])
READING = "reading it (integer max)"


def _row_hashes(bits: np.ndarray) -> list[int] | list[bytes]:
    if (xxhash := optional("xxhash")) is not None:
        return [xxhash.xxh3_64_intdigest(row) for row in bits]
    return [hashlib.blake2b(row, digest_size=8).digest() for row in bits]


def _packed(active: Tensor) -> np.ndarray:
    return np.packbits(active.cpu().numpy(), axis=1)


@pytest.mark.parametrize("op", ["spline_hash", "spline_code"])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_layer(shape: tuple[int, int, int], op: str, compare: Callable[..., None]) -> None:
    rows, width, size = shape
    x, W, b = normal(rows, width), normal(size, width, seed=1), normal(size, seed=2)
    others: dict[str, Callable[[], object]] = {"torch linear, > 0, packbits": lambda: _packed(linear(x, W, b) > 0)}
    if op == "spline_hash":
        others = {"torch linear, packbits, a hash a row": lambda: _row_hashes(_packed(linear(x, W, b) > 0))}
    others["torch linear alone"], floor = lambda: linear(x, W, b), "torch linear alone"
    if has_onednn(x.dtype):
        product, floor = onednn_linear(x, W), "oneDNN product alone"
        others[floor] = lambda: product("none", None)
    ours: Any = getattr(fastsae, op)
    verify = checks(op, x[:64], W, b, None, *((0, 0, 64) if op == "spline_hash" else ()))
    compare(op, name(shape), lambda: ours(x, W, b), others, verify, floor=floor)


@pytest.mark.parametrize("op", ["pack_signs", "hash_signs"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SIGNS, ids=name)
def test_signs(shape: tuple[int, int], dtype: str, op: str, compare: Callable[..., None]) -> None:
    z = normal(*shape).to(getattr(torch, dtype))
    powers = 1 << torch.arange(64, device=DEVICE)
    others: dict[str, Callable[[], object]] = {READING: lambda: z.view(torch.int32).max()}
    if op == "pack_signs":
        others["torch > 0, shifted sum"] = lambda: ((z > 0).view(shape[0], -1, 64) * powers).sum(2)
        others["torch > 0, numpy packbits"] = lambda: _packed(z > 0)
    else:
        others["torch > 0, packbits, a hash a row"] = lambda: _row_hashes(_packed(z > 0))
    ours, verify = getattr(fastsae.codes, op), checks(op, z[:64], None, *((0, 0, 64) if op == "hash_signs" else ()))
    compare(f"{op} {dtype}", name(shape), lambda: ours(z), others, verify, floor=READING)


@pytest.mark.parametrize("shape", SIGNS, ids=name)
def test_hash_code(shape: tuple[int, int], compare: Callable[..., None]) -> None:
    words = fastsae.codes.pack_signs(normal(*shape))
    rows = words.cpu().numpy()
    others = {"a hash a row": lambda: _row_hashes(rows), "torch unique rows (what a hash is for)": lambda: torch.unique(words, dim=0)}
    compare("hash_code", name(shape), lambda: fastsae.codes.hash_code(words), others, checks("hash_code", words[:64], None, 0, 0, 64))


@pytest.mark.parametrize("n", shapes([(1_000_000,)], [(10_000,)]), ids=name)
def test_code_counter(n: tuple[int], compare: Callable[..., None]) -> None:
    hashes = torch.randint(0, n[0] // 2, n, generator=torch.Generator().manual_seed(0)) * 0x1E3779B97F4A7C15

    def ours() -> fastsae.codes.CodeTable:
        counter = fastsae.codes.CodeCounter()
        for part in hashes.split(max(n[0] // 20, 1)):
            counter.update(part)
        return counter.table()

    def verify() -> None:
        unique, _, counts = fastsae.codes.count_codes(hashes)
        row = ours()[0]
        assert (row.seen, row.distinct, row.singletons) == (n[0], unique.shape[0], int((counts == 1).sum()))

    others = {"one torch.unique": lambda: torch.unique(hashes, return_counts=True), "Python dictionary": lambda: Counter(hashes.tolist())}
    compare("CodeCounter, 20 updates", name(n), ours, others, verify, floor="one torch.unique")
