"""Distinct codes against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastsae.codes import count_codes, hash_code, hash_signs


@given(st.integers(0, 200), st.sampled_from([None, 1, 2, 3]), st.integers(1, 40), st.integers(0, 2**31))
def test_equals_numpy(n: int, width: int | None, distinct: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randint(-(2**63), 2**63 - 1, (distinct,) if width is None else (distinct, width), generator=generator)
    if width is not None:
        pool[: distinct // 2, 0] = pool[0, 0]  # rows that differ only in later words
    hashes = pool[torch.randint(0, distinct, (n,), generator=generator)]
    unique, inverse, counts = count_codes(hashes)
    assert (unique.dtype, inverse.dtype, counts.dtype) == (torch.int64,) * 3
    if n:
        by_numpy = np.unique(hashes.numpy(), axis=0, return_inverse=True, return_counts=True)
        for got, expected in zip((unique, inverse, counts), by_numpy, strict=True):
            assert got.tolist() == expected.reshape(got.shape).tolist()
    assert torch.equal(unique[inverse], hashes)
    assert int(counts.sum()) == n


def test_order_is_that_of_signed_integers() -> None:
    assert count_codes(torch.tensor([3, -1, 2**63 - 1, -(2**63), 3])).unique.tolist() == [-(2**63), -1, 3, 2**63 - 1]
    rows = torch.tensor([[0, 5], [-1, 9], [0, -5], [0, 5]])
    found = count_codes(rows)
    assert found.unique.tolist() == [[-1, 9], [0, -5], [0, 5]]
    assert found.inverse.tolist() == [2, 0, 1, 2]
    assert found.counts.tolist() == [1, 1, 2]


@pytest.mark.parametrize("shape", [(0,), (0, 2)])
def test_empty(shape: tuple[int, ...]) -> None:
    unique, inverse, counts = count_codes(torch.zeros(shape, dtype=torch.int64))
    assert unique.shape == shape
    assert inverse.shape == counts.shape == (0,)


def test_views() -> None:
    codes = torch.arange(24).reshape(6, 4) % 5
    for view in (codes[:, 1], codes[::2, ::3], codes[:1, :2].expand(7, 2), codes[0, 0].expand(5)):
        found, copy = count_codes(view), count_codes(view.contiguous())
        for a, b in zip(found, copy, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("bits", [64, 128])
def test_hashes_separate_what_codes_separate(bits: int) -> None:
    z = torch.randint(0, 2, (500, 7), generator=torch.Generator().manual_seed(0)).float()
    codes, inverse = torch.unique(z, dim=0, return_inverse=True)
    found = count_codes(hash_signs(z, bits=bits))
    assert found.unique.shape[0] == codes.shape[0]
    assert all(len({int(i) for i in found.inverse[inverse == code]}) == 1 for code in range(codes.shape[0]))
    assert torch.equal(found.unique, count_codes(hash_code((z.long() << torch.arange(7)).sum(1, keepdim=True), bits=bits)).unique)
