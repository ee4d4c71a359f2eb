"""Hamming distances against NumPy's unpacked bits, and the order of neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastsae import hamming, hamming_topk, pack_signs
from fastsae.ops import _common


def words(n: int, w: int, seed: int = 0) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (n, w), generator=torch.Generator().manual_seed(seed))


def by_numpy(a: Tensor, b: Tensor) -> np.ndarray:
    bits = [np.unpackbits(np.ascontiguousarray(t.numpy()).view(np.uint8), axis=1).astype(bool) for t in (a, b)]
    return (bits[0][:, None] != bits[1][None]).sum(-1)


@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 5), st.integers(0, 2**31))
def test_equals_numpy(n: int, m: int, w: int, seed: int) -> None:
    a, b = words(n, w, seed), words(m, w, seed + 1)
    distance = hamming(a, b)
    assert distance.dtype is torch.int32
    assert distance.tolist() == by_numpy(a, b).tolist()


def test_extremes() -> None:
    a = torch.tensor([[0], [-1], [1], [-(2**63)], [2**63 - 1]])
    assert hamming(a, a).tolist() == [[0, 64, 1, 1, 63], [64, 0, 63, 63, 1], [1, 63, 0, 2, 62], [1, 63, 2, 0, 64], [63, 1, 62, 64, 0]]
    assert hamming(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(3, 0, dtype=torch.int64)).tolist() == [[0, 0, 0]] * 2


def test_counts_the_neurons_that_differ() -> None:
    z = torch.randn(7, 100, generator=torch.Generator().manual_seed(0))
    active = z > 0
    assert torch.equal(hamming(pack_signs(z), pack_signs(z)).long(), (active[:, None] != active).sum(-1))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_writes_into_a_given_tensor(layout: str) -> None:
    a, b = words(6, 3), words(9, 3, 1)
    whole = torch.full((20, 20), -7, dtype=torch.int32)
    out = {"contiguous": whole[:6, :9].contiguous(), "transposed": whole[:9, :6].T, "strided": whole[2:14:2, 1:19:2]}[layout]
    assert hamming(a, b, out) is out
    assert out.tolist() == by_numpy(a, b).tolist()
    if layout == "strided":
        assert int((whole == -7).sum()) == 400 - 54


def test_views_of_codes() -> None:
    a = words(10, 6)
    assert hamming(a[::2, 1::2], a[1::2, 1::2]).tolist() == by_numpy(a[::2, 1::2], a[1::2, 1::2]).tolist()
    assert hamming(a.T.contiguous().T, a).tolist() == by_numpy(a, a).tolist()
    assert hamming(a[:1].expand(4, 6), a).tolist() == by_numpy(a[:1].expand(4, 6), a).tolist()


@given(st.integers(1, 15), st.integers(1, 25), st.integers(1, 4), st.data())
def test_topk_is_by_distance_then_index(n: int, m: int, w: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, m))
    seed = data.draw(st.integers(0, 2**31))
    few = words(3, w, seed)  # of which all codes are drawn: many ties
    a, b = (few[torch.randint(0, 3, (size,), generator=torch.Generator().manual_seed(seed + size))] for size in (n, m))
    distance, index = hamming_topk(a, b, k)
    full = by_numpy(a, b)
    order = np.argsort(full, axis=1, kind="stable")[:, :k]
    assert index.tolist() == order.tolist()
    assert distance.tolist() == np.take_along_axis(full, order, 1).tolist()
    assert (distance.dtype, index.dtype) == (torch.int32, torch.int64)


@pytest.mark.parametrize("elements", [1, 64 * 30, 64 * 1000])
def test_same_result_whatever_the_tiles(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    few = words(4, 1)
    a, b = (few[torch.randint(0, 4, (size,), generator=torch.Generator().manual_seed(size))] for size in (70, 53))
    whole = hamming(a, b), *hamming_topk(a, b, 9)
    monkeypatch.setattr(_common, "WORKSPACE_ELEMENTS", elements)
    for got, expected in zip((hamming(a, b), *hamming_topk(a, b, 9)), whole, strict=True):
        assert torch.equal(got, expected)


def test_more_codes_than_one_tile_of_the_default_workspace() -> None:
    a, b = words(6000, 1), words(5000, 1, 1)
    a[-1] = b[-1]
    near = hamming_topk(a, b, 2)
    assert near.distance[-1, 0] == 0
    assert near.index[-1, 0] == 4999
    alone = hamming_topk(a[-5:], b, 2)
    assert torch.equal(near.index[-5:], alone.index)
    assert torch.equal(near.distance[-5:], alone.distance)
