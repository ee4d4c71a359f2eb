"""Hamming distances against NumPy's unpacked bits, the order of neighbours, boundary densities and graphs for clustering."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from levels import codes
from torch import Tensor

import fastsae
from fastsae import reference
from fastsae.codes import hamming, hamming_topk, pack_signs
from fastsae.native import hamming as native_hamming
from fastsae.native import loader


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
    monkeypatch.setattr(reference, "WORKSPACE_ELEMENTS", elements)
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


# ---------------------------------------------------------------- the compiled row

native_only = pytest.mark.skipif(loader.unavailable() is not None, reason=str(loader.unavailable()))


@pytest.fixture(params=codes() or ["none"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with loader.use_isa(request.param):
        yield request.param


@native_only
@pytest.mark.parametrize("vpopcnt", [True, False], ids=["any instruction", "without VPOPCNTDQ"])
@pytest.mark.parametrize("n", [1, 3, 4, 5, 70])
@pytest.mark.parametrize("m", [1, 15, 16, 17, 63, 64, 65, 300])
def test_every_level_counts_the_same(level: str, vpopcnt: bool, n: int, m: int) -> None:
    for w in (0, 1, 2, 7, 15, 16, 17, 31):
        a, b = words(n, w, n), words(m, w, m)
        if w:
            a[0], b[-1] = 0, -1  # the largest distance: every byte counts 8 in every half
        out = torch.full((n, m), -1, dtype=torch.int32)
        native_hamming.hamming(a, b, out, vpopcnt=vpopcnt)
        assert np.array_equal(out.numpy(), by_numpy(a, b) if w else np.zeros((n, m)))
        flipped = torch.full((m, n), -1, dtype=torch.int32).T
        native_hamming.hamming(a, b, flipped, vpopcnt=vpopcnt)
        assert torch.equal(flipped, out)
        for k in {1, min(3, m), m}:
            distance, index = native_hamming.hamming_topk(a, b, k, vpopcnt=vpopcnt)
            near = (out.long() * m + torch.arange(m)).sort(1).values[:, :k]
            assert torch.equal(distance.long() * m + index, near)


@native_only
def test_panels_and_units_of_a_large_problem(level: str) -> None:
    """Several panels of b, several blocks of a, an output that is written past the caches, and one that is not aligned for it."""
    a, b = words(2100, 9), words(2050, 9, 1)
    few = words(5, 9, 2)
    b[1000:1900] = few[torch.arange(900) % 5]  # ties across panels
    a[::3] = few[torch.arange(700) % 5]
    expected = (a.unsqueeze(1)[:50] ^ b).numpy().view(np.uint8)
    expected = np.unpackbits(expected, axis=2).sum(2)
    whole = torch.full((2100, 2064), -7, dtype=torch.int32)
    for out in (whole[:, :2050], whole[:, 3:2053]):
        whole.fill_(-7)
        hamming(a, b, out, backend="cpu")
        assert np.array_equal(out[:50].numpy(), expected)
        assert int((whole == -7).sum()) == 2100 * 14
    distance, index = hamming_topk(a, b, 40, backend="cpu")
    by_reference = hamming_topk(a, b, 40, backend="reference")
    assert torch.equal(distance, by_reference.distance)
    assert torch.equal(index, by_reference.index)


@native_only
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    a, b = words(1500, 3), words(900, 3, 1) & words(900, 3, 2)
    before = torch.get_num_threads()
    expected = hamming(a, b), *hamming_topk(a, b, 7)
    try:
        torch.set_num_threads(threads)
        got = hamming(a, b), *hamming_topk(a, b, 7)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(expected, got))


@native_only
def test_an_output_that_no_side_of_is_contiguous_is_refused_with_the_reason() -> None:
    a, whole = words(4, 2), torch.zeros(20, 20, dtype=torch.int32)
    with pytest.raises(fastsae.BackendError, match=r"out with strides \(40, 2\) \(supported: stride 1 along one dimension\)"):
        hamming(a, a, whole[:8:2, :8:2], backend="cpu")
    assert hamming(a, a, whole[:8:2, :8:2]) is not None  # the reference serves
    for out in (whole[:8:2, :1], whole[:1, :8:2], whole[:8:2, 5:9], whole[5:9, :8:2].T.contiguous()):
        n, m = out.shape
        assert torch.equal(hamming(a[:n], a[:m], out, backend="cpu"), hamming(a[:n], a[:m], backend="reference"))


@native_only
def test_topk_memory_does_not_grow_with_the_number_of_pairs() -> None:
    """The workspace is what is left: outputs of N k, and no [N, M] of any type."""
    code = """
import resource, torch, fastsae
a = torch.randint(-2**62, 2**62, (20000, 1)); b = torch.randint(-2**62, 2**62, (40000, 1))
fastsae.codes.hamming_topk(a[:100], b[:100], 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fastsae.codes.hamming_topk(a, b, 2, backend="cpu")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(fastsae.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    # 20000 * 2 results of 12 bytes and a few 100 KiB of workspace; the distances alone would be 3 GB. 16 MiB leave room for the allocator.
    assert int(done.stdout) < 16 << 10


# ---------------------------------------------------------------- boundaries between inputs


def test_boundary_density_by_hand() -> None:
    a, b = torch.tensor([[0b1011, -1], [5, 5]]), torch.tensor([[0b0001, 0], [5, 5]])
    pairs = fastsae.codes.boundary_density(a, b)
    assert pairs.pairs.tolist() == [66, 0]
    assert pairs.mean.item() == 33
    x_a, x_b = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[3.0, 4.0], [1.0, 1.0]])
    found = fastsae.codes.boundary_density(a, b, x_a, x_b)
    assert found.pairs.tolist() == pytest.approx([66 / 5, 0])
    assert found.mean.item() == pytest.approx(33 / 5)
    assert fastsae.codes.boundary_density(a[:1], b[:1], x_a[1:], x_b[1:]).pairs.tolist() == [float("inf")]
    assert fastsae.codes.boundary_density(a, b, x_a.double(), x_b.double()).mean.dtype is torch.float64
    assert fastsae.codes.boundary_density(a, b, x_a.bfloat16(), x_b.bfloat16()).mean.dtype is torch.float32
    assert fastsae.codes.boundary_density(a[:0], b[:0]).mean.isnan()
    assert fastsae.codes.boundary_density(a[0], b[0]).pairs.shape == ()


@given(st.integers(0, 40), st.integers(0, 6), st.integers(0, 2**31))
def test_boundary_density_counts_bits(n: int, w: int, seed: int) -> None:
    a, b = words(n, w, seed), words(n, w, seed + 1)
    assert fastsae.codes.boundary_density(a, b).pairs.tolist() == (np.diag(by_numpy(a, b)).tolist() if w else [0] * n)


def test_boundary_density_along_a_segment_is_the_number_of_crossings_of_one_layer() -> None:
    """Any division of a segment crosses the same boundaries: densities times steps sum to the Hamming distance of its ends."""
    generator = torch.Generator().manual_seed(0)
    W, b = torch.randn(100, 5, generator=generator, dtype=torch.float64), torch.randn(100, generator=generator, dtype=torch.float64)
    p, q = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    x = p + torch.linspace(0, 1, 50, dtype=torch.float64).unsqueeze(1) * (q - p)
    codes = fastsae.spline_code(x, W, b)
    found = fastsae.codes.boundary_density(codes[:-1], codes[1:], x[:-1], x[1:])
    steps = (x[1:] - x[:-1]).norm(dim=1)
    assert (found.pairs * steps).sum().item() == pytest.approx(int(hamming(codes[:1], codes[-1:])))


def test_boundary_density_errors() -> None:
    a, x = words(4, 2), torch.randn(4, 3)
    cases: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((3, a), TypeError, "a must be a torch.Tensor, got int"),
        ((a.int(), a), TypeError, "a must have dtype int64, got int32"),
        ((a, a[:3]), ValueError, r"a and b must have the same shape \[.., words\], got \[4, 2\] and \[3, 2\]"),
        ((a, a, x), ValueError, "x_a and x_b must be given together, got x_a alone"),
        ((a, a, x, x.double()), TypeError, r"x_b must have the dtype of x_a \(float32\), got float64"),
        ((a, a, x[:3], x[:3]), ValueError, r"x_a must have shape \[4, 'D'\] for codes \[4, 2\], got \[3, 3\]"),
        ((a, a, x, x[:, :2]), ValueError, r"x_b must have shape \[4, 'D'\] for codes \[4, 2\], got \[4, 2\]"),
        ((a, a.to("meta")), TypeError, "b must be on cpu"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=f"^boundary_density: {message}"):
            fastsae.codes.boundary_density(*arguments)


# ---------------------------------------------------------------- graphs for clustering


@given(st.integers(2, 40), st.integers(1, 3), st.booleans(), st.sampled_from([0.0, 0.5]), st.integers(0, 2**31), st.data())
def test_neighbour_graph_equals_numpy(n: int, w: int, symmetric: bool, zero: float, seed: int, data: st.DataObject) -> None:
    pytest.importorskip("scipy", reason="SciPy is not installed (extra [studies])")
    k = data.draw(st.integers(1, n - 1))
    few = words(data.draw(st.integers(1, 6)), w, seed)  # equal codes, more of them than k
    codes = few[torch.randint(0, few.shape[0], (n,), generator=torch.Generator().manual_seed(seed))]
    graph = fastsae.codes.neighbour_graph(codes, k, symmetric=symmetric, zero=zero)
    full = by_numpy(codes, codes)
    expected: dict[tuple[int, int], float] = {}
    for i in range(n):
        others = sorted((full[i, j], j) for j in range(n) if j != i)[:k]
        for distance, j in others:
            for edge in ((i, j), (j, i)) if symmetric else ((i, j),):
                expected[edge] = max(float(distance), zero)
    assert graph.shape == (n, n)
    assert graph.dtype == np.float64
    stored = graph.tocoo()
    assert dict(zip(zip(stored.row.tolist(), stored.col.tolist()), stored.data.tolist(), strict=True)) == expected
    assert graph.nnz == len(expected)
    for i in range(n):
        assert sorted(graph.indices[graph.indptr[i] : graph.indptr[i + 1]]) == graph.indices[graph.indptr[i] : graph.indptr[i + 1]].tolist()


def test_neighbour_graph_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = words(5, 2)
    for arguments, error, message in (
        ({"codes": codes.tolist()}, TypeError, "codes must be a torch.Tensor, got list"),
        ({"codes": codes.int()}, TypeError, "codes must have dtype int64, got int32"),
        ({"codes": codes[0]}, ValueError, r"codes must have shape \[N, words\] with N at least 2, got \[2\]"),
        ({"codes": codes[:1]}, ValueError, r"with N at least 2, got \[1, 2\]"),
        ({"k": 0}, ValueError, r"k must be at least 1 and at most 4 \(N - 1\), got 0"),
        ({"k": 5}, ValueError, "got 5"),
        ({"k": 2.0}, TypeError, "k must be an int, got float"),
        ({"symmetric": 1}, TypeError, "symmetric must be a bool, got int"),
        ({"zero": 1}, ValueError, "zero must be a number of at least 0 and below 1, got 1"),
        ({"zero": "0"}, ValueError, "zero must be a number of at least 0 and below 1, got '0'"),
    ):
        with pytest.raises(error, match=f"^neighbour_graph: .*{message}"):
            fastsae.codes.neighbour_graph(**{"codes": codes, "k": 2, **arguments})
    for name in [name for name in sys.modules if name.split(".")[0] == "scipy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"neighbour_graph needs SciPy: pip install 'fastsae-kernels\[studies\]'"):
        fastsae.codes.neighbour_graph(codes, 2)


def clustered(groups: int, each: int, neurons: int, flips: int, copies: int) -> tuple[Tensor, np.ndarray]:
    """Codes around ``groups`` random codes, ``flips`` neurons apart, and ``copies`` equal ones in each group."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.rand(groups, neurons, generator=generator) > 0.5
    group = torch.arange(groups * each) % groups
    bits = centre[group]
    for row in range(groups * (copies + 1), groups * each):
        bits[row, torch.randperm(neurons, generator=generator)[:flips]] ^= True
    return pack_signs(bits), group.numpy()


def cluster(make: Callable[..., Any], codes: Tensor, k: int) -> np.ndarray:
    """The example of neighbour_graph's documentation."""
    graph = fastsae.codes.neighbour_graph(codes, k=k)
    return make(min_cluster_size=20, min_samples=10, metric="precomputed").fit_predict(graph)


@pytest.mark.parametrize("library", ["sklearn.cluster", "hdbscan"])
def test_hdbscan_finds_groups_of_codes(library: str) -> None:
    pytest.importorskip("scipy", reason="SciPy is not installed (extra [studies])")
    module = pytest.importorskip(library, reason=f"{library.split('.')[0]} is not installed")
    codes, group = clustered(groups=4, each=60, neurons=300, flips=20, copies=25)
    labels = cluster(module.HDBSCAN, codes, k=100)  # more than a group has, so that the graph is connected
    assert set(labels.tolist()) - {-1} == {0, 1, 2, 3}
    assert (labels == -1).mean() < 0.1
    for label in range(4):
        assert np.unique(group[labels == label]).size == 1
