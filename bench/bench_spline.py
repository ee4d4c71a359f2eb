"""Spline codes and hashes of one layer beside torch's linear, packed bits and a hash a row (N, D, H); and of given signs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
import torch

import fastsae
from bench.harness import DEVICE, has_onednn, name, normal, onednn_linear, optional, shapes
from fastsae.dispatch import OPS

SHAPES = shapes([(65536, 64, 1024), (16384, 768, 3072), (262144, 2, 256)], [(512, 16, 128)])
SIGNS = shapes([(65536, 1024), (16384, 3072)], [(512, 128)])
DTYPES = [torch.float32, torch.bfloat16]


def _row_hashes(bits: np.ndarray) -> list[int] | list[bytes]:
    if (xxhash := optional("xxhash")) is not None:
        return [xxhash.xxh3_64_intdigest(row) for row in bits]
    return [hashlib.blake2b(row, digest_size=8).digest() for row in bits]


def _pack_by_numpy(active: torch.Tensor) -> np.ndarray:
    return np.packbits(active.cpu().numpy(), axis=1)


def _products(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> tuple[dict[str, Callable[[], object]], str]:
    """The layer's product by torch and by oneDNN, and the name of the floor."""
    others: dict[str, Callable[[], object]] = {"torch linear alone": lambda: torch.nn.functional.linear(x, W, b)}
    if not has_onednn(x.dtype):
        return others, "torch linear alone"
    packed = onednn_linear(x, W)
    others["oneDNN product alone"] = lambda: packed("none", None)
    return others, "oneDNN product alone"


@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_spline_hash(shape: tuple[int, int, int], compare: Callable[..., None]) -> None:
    rows, width, size = shape
    x, W, b = normal(rows, width), normal(size, width, seed=1), normal(size, seed=2)

    def verify() -> None:
        few = fastsae.spline_hash(x[:64], W, b)
        OPS["spline_hash"].check((x[:64], W, b, None, 0, 0, 64), few)

    products, floor = _products(x, W, b)
    others = {
        "torch linear, packbits, a hash a row": lambda: _row_hashes(_pack_by_numpy(torch.nn.functional.linear(x, W, b) > 0)),
        **products,
    }
    compare("spline_hash", name(shape), lambda: fastsae.spline_hash(x, W, b), others, verify, floor=floor)


@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_spline_code(shape: tuple[int, int, int], compare: Callable[..., None]) -> None:
    rows, width, size = shape
    x, W, b = normal(rows, width), normal(size, width, seed=1), normal(size, seed=2)

    def verify() -> None:
        OPS["spline_code"].check((x[:64], W, b, None), fastsae.spline_code(x[:64], W, b))

    products, floor = _products(x, W, b)
    others = {"torch linear, > 0, packbits": lambda: _pack_by_numpy(torch.nn.functional.linear(x, W, b) > 0), **products}
    compare("spline_code", name(shape), lambda: fastsae.spline_code(x, W, b), others, verify, floor=floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", SIGNS, ids=name)
def test_pack_signs(shape: tuple[int, int], dtype: torch.dtype, compare: Callable[..., None]) -> None:
    z = normal(*shape).to(dtype)
    powers = 1 << torch.arange(64, device=DEVICE)

    def verify() -> None:
        OPS["pack_signs"].check((z[:64], None), fastsae.codes.pack_signs(z[:64]))

    others = {
        "reading it (integer max)": lambda: z.view(torch.int32).max(),
        "torch > 0, shifted sum": lambda: ((z > 0).view(shape[0], -1, 64) * powers).sum(2),
        "torch > 0, numpy packbits": lambda: _pack_by_numpy(z > 0),
    }
    label = f"pack_signs {str(dtype).removeprefix('torch.')}"
    compare(label, name(shape), lambda: fastsae.codes.pack_signs(z), others, verify, floor="reading it (integer max)")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", SIGNS, ids=name)
def test_hash_signs(shape: tuple[int, int], dtype: torch.dtype, compare: Callable[..., None]) -> None:
    z = normal(*shape).to(dtype)

    def verify() -> None:
        OPS["hash_signs"].check((z[:64], None, 0, 0, 64), fastsae.codes.hash_signs(z[:64]))

    others = {
        "reading it (integer max)": lambda: z.view(torch.int32).max(),
        "torch > 0, packbits, a hash a row": lambda: _row_hashes(_pack_by_numpy(z > 0)),
    }
    label = f"hash_signs {str(dtype).removeprefix('torch.')}"
    compare(label, name(shape), lambda: fastsae.codes.hash_signs(z), others, verify, floor="reading it (integer max)")


@pytest.mark.parametrize("shape", SIGNS, ids=name)
def test_hash_code(shape: tuple[int, int], compare: Callable[..., None]) -> None:
    words = fastsae.codes.pack_signs(normal(*shape))
    rows = words.cpu().numpy()

    def verify() -> None:
        OPS["hash_code"].check((words[:64], None, 0, 0, 64), fastsae.codes.hash_code(words[:64]))

    others = {"a hash a row": lambda: _row_hashes(rows), "torch unique rows (what a hash is for)": lambda: torch.unique(words, dim=0)}
    compare("hash_code", name(shape), lambda: fastsae.codes.hash_code(words), others, verify)


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

    def python_set() -> int:
        seen: dict[int, int] = {}
        for code in hashes.tolist():
            seen[code] = seen.get(code, 0) + 1
        return len(seen)

    others = {"one torch.unique": lambda: torch.unique(hashes, return_counts=True), "Python dictionary": python_set}
    compare("CodeCounter, 20 updates", name(n), ours, others, verify, floor="one torch.unique")
