"""Hamming distances of packed codes, all pairs and the nearest, beside torch's products of bits and the binary indexes (N, M, bits)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import fastsae
from bench.harness import DEVICE, name, optional, shapes
from fastsae.dispatch import OPS
from fastsae.ops.spline import unpack_bits

SHAPES = shapes([(4096, 4096, 1024)], [(256, 256, 128)])


def _codes(shape: tuple[int, int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(-(2**63), 2**63 - 1, (n, shape[2] // 64), generator=generator).to(DEVICE) for n in shape[:2]]


def _bytes(codes: torch.Tensor) -> np.ndarray:
    return codes.cpu().numpy().view(np.uint8)


@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_hamming(shape: tuple[int, int, int], compare: Callable[..., None]) -> None:
    a, b = _codes(shape)
    out = torch.empty(shape[0], shape[1], dtype=torch.int32, device=DEVICE)
    left, right = unpack_bits(a).float(), unpack_bits(b).float()

    def verify() -> None:
        fastsae.codes.hamming(a, b, out)
        OPS["hamming"].check((a[:32], b, None), out[:32])

    others: dict[str, Callable[[], object]] = {
        "filling the output": lambda: out.fill_(1),
        "torch product of unpacked bits": lambda: (left.sum(1, keepdim=True) + right.sum(1) - 2 * left @ right.T).int(),
        "NASWOT: (1-c)(1-c)' + cc'": lambda: (1 - left) @ (1 - right).T + left @ right.T,
    }
    if (faiss := optional("faiss", "faiss-cpu")) is not None:
        faiss.omp_set_num_threads(torch.get_num_threads())
        x, y, distances = _bytes(a), _bytes(b), np.empty(shape[:2], np.int32)
        pointers = [faiss.swig_ptr(array) for array in (x, y, distances)]
        others["faiss hammings"] = lambda: faiss.hammings(pointers[0], pointers[1], shape[0], shape[1], shape[2] // 8, pointers[2])
    compare("hamming", name(shape), lambda: fastsae.codes.hamming(a, b, out), others, verify, floor="filling the output")


@pytest.mark.parametrize("k", [1, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_hamming_topk(shape: tuple[int, int, int], k: int, compare: Callable[..., None]) -> None:
    a, b = _codes(shape)
    left, right = unpack_bits(a).float(), unpack_bits(b).float()

    def plain() -> None:
        for rows in left.split(1024):
            (right.sum(1) - 2 * rows @ right.T).topk(k, largest=False)

    def verify() -> None:
        few = fastsae.codes.hamming_topk(a, b, k)
        OPS["hamming_topk"].check((a[:16], b, k), (few.distance[:16], few.index[:16]))

    others: dict[str, Callable[[], object]] = {"torch chunked product of unpacked bits, topk": plain}
    if (faiss := optional("faiss", "faiss-cpu")) is not None:
        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexBinaryFlat(shape[2])
        index.add(_bytes(b))
        others["faiss IndexBinaryFlat"] = lambda: index.search(_bytes(a), k)
    if (usearch := optional("usearch.index", "usearch")) is not None:
        metric, dtype = usearch.MetricKind.Hamming, usearch.ScalarKind.B1
        x, y = _bytes(a), _bytes(b)
        others["usearch exact search"] = lambda: usearch.search(y, x, k, metric, exact=True, threads=torch.get_num_threads(), dtype=dtype)
    compare("hamming_topk", f"{name(shape)} k={k}", lambda: fastsae.codes.hamming_topk(a, b, k), others, verify)
