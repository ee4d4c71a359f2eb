"""MMCS: matches of one direction, of both and of k = 8, beside chunked products with maxima and exact indexes (N, M, D).

Rows whose name says "inexact" find other matches than the exact ones: plain bfloat16 about 2 % of them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastsae
from bench.harness import DEVICE, checks, has_onednn, name, onednn_linear, optional, shapes, unit_rows

SHAPES = shapes([(4096, 4096, 512), (16384, 16384, 768)], [(256, 300, 32)])
LARGE = shapes([(65536, 32768, 512)], [(300, 256, 32)])
STEP = 1024
FLOOR = "oneDNN product alone (rows / 1024 times)"

Calls = dict[str, Callable[[], object]]


def _inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return unit_rows(shape[0], shape[2]), unit_rows(shape[1], shape[2], seed=1)


def _rivals(a: Tensor, b: Tensor, reduce: Callable[[Tensor], object], what: str = "max") -> Calls:
    """Chunked products that ``reduce`` takes what it needs from, and the product alone."""
    parts, low_a, low_b = a.split(STEP), a.bfloat16(), b.bfloat16()
    others: Calls = {
        f"torch chunked mm+{what}": lambda: [reduce(rows @ b.T) for rows in parts],
        f"bf16 mm+{what} (inexact)": lambda: [reduce(rows @ low_b.T) for rows in low_a.split(STEP)],
    }
    if has_onednn() and a.shape[0] % min(STEP, a.shape[0]) == 0:
        packed: Callable[..., Tensor] = onednn_linear(parts[0], b)  # all parts are as long: the same one again takes the same time
        others[f"oneDNN chunked+{what}"] = lambda: [reduce(packed()) for _ in parts]
        others[FLOOR] = lambda: [packed() for _ in parts]
    return others


def _indexes(a: Tensor, b: Tensor, k: int) -> Calls:
    """Exact searches of the libraries that are installed."""
    others: Calls = {}
    if DEVICE.type != "cpu":
        return others
    if (faiss := optional("faiss", "faiss-cpu")) is not None:
        faiss.omp_set_num_threads(torch.get_num_threads())
        x, index = a.numpy(), faiss.IndexFlatIP(b.shape[1])
        index.add(b.numpy())
        others[f"faiss IndexFlatIP k={k}"] = lambda: index.search(x, k)
    if (usearch := optional("usearch.index", "usearch")) is not None and a.shape[0] * b.shape[0] <= 2**24:  # minutes beyond
        x, y, metric = a.numpy(), b.numpy(), usearch.MetricKind.IP
        others[f"usearch exact search k={k}"] = lambda: usearch.search(y, x, k, metric, exact=True, threads=torch.get_num_threads())
    return others


@pytest.mark.seconds(60)
@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_match_cosine(shape: tuple[int, int, int], k: int, compare: Callable[..., None]) -> None:
    a, b = _inputs(shape)
    others = _rivals(a, b, lambda s: s.max(1)) if k == 1 else _rivals(a, b, lambda s: s.topk(k), "topk")
    others |= _indexes(a, b, k)
    label, verify = name(shape) + (f" k={k}" if k > 1 else ""), checks("match_cosine", a[:16], b, k, False, False, 1e-8)
    compare("match_cosine", label, lambda: fastsae.match_cosine(a, b, k=k), others, verify, floor=FLOOR if FLOOR in others else None)


@pytest.mark.seconds(160)
@pytest.mark.parametrize("shape", LARGE, ids=name)
def test_large(shape: tuple[int, int, int], compare: Callable[..., None]) -> None:
    """Beside the fastest plain torch only: a round takes a quarter of a minute."""
    a, b = _inputs(shape)
    others = _rivals(a, b, lambda s: s.max(1))
    best = "oneDNN chunked+max" if "oneDNN chunked+max" in others else "torch chunked mm+max"
    verify = checks("match_cosine", a[:16], b, 1, False, False, 1e-8)
    compare("match_cosine", name(shape), lambda: fastsae.match_cosine(a, b), {best: others[best]}, verify)


@pytest.mark.seconds(70)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_match(shape: tuple[int, int, int], compare: Callable[..., None]) -> None:
    """Both directions and each row's most negative; the rivals find both directions only."""
    a, b = _inputs(shape)
    others, verify = _rivals(a, b, lambda s: (s.max(1), s.max(0))), checks("match_pair", a[:17], b, 1, 1, 1e-8)
    compare("match, both directions", name(shape), lambda: fastsae.match(a, b), others, verify, floor=FLOOR if FLOOR in others else None)
