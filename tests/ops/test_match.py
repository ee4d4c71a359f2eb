"""Matching against the full matrix of cosines, SciPy's assignment, and the published variants of MMCS on small examples."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from places import ROOT
from torch import Tensor

import fastsae
from fastsae import match, match_cosine, mmcs, reference
from fastsae.compare import MMCS_VARIANTS, MmcsVariant, contribution_similarity, mmcs_matrix
from fastsae.latents import TopKLatents
from fastsae.native import loader

optimize = pytest.importorskip("scipy.optimize")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cosines(a: Tensor, b: Tensor, eps: float = 1e-8) -> Tensor:
    a, b = (v / v.square().sum(1, keepdim=True).sqrt().clamp_min(eps) for v in (a, b))
    return a @ b.T


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("k", [1, 4, 12])
def test_match_cosine_equals_the_full_matrix(absolute: bool, exclude_self: bool, k: int) -> None:
    a, b = draw(9, 5).requires_grad_(), draw(13, 5, seed=1).requires_grad_()
    full = cosines(a, b)
    rank = full.abs() if absolute else full
    if exclude_self:
        rank = rank.masked_fill(torch.eye(9, 13, dtype=torch.bool), -2)
    index = rank.topk(k, dim=1).indices
    ours = match_cosine(a, b, k=k, absolute=absolute, exclude_self=exclude_self)
    assert torch.equal(ours.index, index)
    dense = full.gather(1, index)
    torch.testing.assert_close(ours.similarity, dense, rtol=1e-12, atol=1e-12)
    weight = draw(9, k, seed=2)
    got = torch.autograd.grad((ours.similarity * weight).sum(), [a, b])
    want = torch.autograd.grad((dense * weight).sum(), [a, b])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)


def test_absolute_keeps_the_sign() -> None:
    a = torch.tensor([[1.0, 0.0]])
    b = torch.tensor([[1.0, 1.0], [-2.0, 0.0], [0.0, 3.0]])
    ours = match_cosine(a, b, k=3, absolute=True)
    assert ours.index.tolist() == [[1, 0, 2]]
    assert ours.similarity[0, 0] == -1
    assert ours.similarity[0, 2] == 0
    assert match_cosine(a, b).index.tolist() == [[0]]


def test_ties_take_the_lower_index() -> None:
    a = torch.tensor([[3.0, 4.0]])
    b = torch.tensor([[0.0, 1.0], [6.0, 8.0], [3.0, 4.0], [-3.0, -4.0], [12.0, 16.0]])
    assert match_cosine(a, b, k=3).index.tolist() == [[1, 2, 4]]
    assert match_cosine(a, b, k=4, absolute=True).index.tolist() == [[1, 2, 3, 4]]


def test_zero_vectors_are_similar_to_nothing() -> None:
    a = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    ours = match_cosine(a, torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]), k=3)
    assert ours.similarity.tolist() == [[0, 0, 0], [1, 0, -1]]
    assert ours.index.tolist() == [[0, 1, 2], [2, 1, 0]]


def test_gradient_of_a_zero_vector_is_that_of_its_quotient_by_eps() -> None:
    a, b = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True), torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    (grad,) = torch.autograd.grad(match_cosine(a, b, eps=0.5).similarity.sum(), [a])
    torch.testing.assert_close(grad, torch.tensor([[1.2, 1.6]], dtype=torch.float64))


def test_eps_bounds_the_norm() -> None:
    a = torch.tensor([[0.3, 0.4]])
    assert match_cosine(a, a, eps=2.0).similarity.item() == pytest.approx(0.25 / 4)


def test_nan_ranks_first() -> None:
    b = torch.tensor([[1.0, 0.0], [float("nan"), 0.0], [2.0, 0.0]])
    assert match_cosine(torch.tensor([[1.0, 0.0]]), b, k=3).index.tolist() == [[1, 0, 2]]


@pytest.mark.parametrize("elements", [1, 40, 300])
def test_same_result_whatever_the_tiles(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    """Rows of one nonzero entry of +-2^n have exact cosines, -1, 0 or 1, with many ties."""
    generator = torch.Generator().manual_seed(0)

    def rows(n: int) -> Tensor:
        at, power = torch.randint(0, 4, (n, 1), generator=generator), torch.randint(-3, 4, (n, 1), generator=generator)
        sign = torch.randint(0, 2, (n, 1), generator=generator) * 2 - 1
        return torch.zeros(n, 4).scatter(1, at, sign * 2.0**power)

    a, b = rows(70), rows(53)
    for options in ({"k": 5}, {"k": 5, "absolute": True}, {"k": 7, "exclude_self": True}):
        monkeypatch.undo()
        whole = match_cosine(a, b, **options)
        monkeypatch.setattr(reference, "WORKSPACE_ELEMENTS", elements)
        tiled = match_cosine(a, b, **options)
        assert torch.equal(whole.index, tiled.index)
        assert torch.equal(whole.similarity, tiled.similarity)
    monkeypatch.undo()
    whole = match(a, b, candidates=6)
    monkeypatch.setattr(reference, "WORKSPACE_ELEMENTS", elements)
    tiled = match(a, b, candidates=6)
    for side in ("a_to_b", "b_to_a", "most_negative"):
        assert torch.equal(getattr(whole, side).index, getattr(tiled, side).index)
        assert torch.equal(getattr(whole, side).similarity, getattr(tiled, side).similarity)


@pytest.mark.parametrize("shape", [(2000, 20000), (20000, 2000)])
def test_more_rows_than_one_tile_of_the_default_workspace(shape: tuple[int, int]) -> None:
    a, b = draw(shape[0], 3, dtype=torch.float32), draw(shape[1], 3, seed=1, dtype=torch.float32)
    b[-1] = a[-1] * 2
    found = match_cosine(a[-3:], b)
    whole = match_cosine(a, b)
    assert torch.equal(whole.index[-1], torch.tensor([shape[1] - 1]))
    torch.testing.assert_close(whole.similarity[-3:], found.similarity)


# ---------------------------------------------------------------- match


def test_match_gives_both_directions_and_the_most_negative() -> None:
    a, b = draw(9, 5), draw(13, 5, seed=1)
    full = cosines(a, b)
    m = match(a, b, candidates=3)
    torch.testing.assert_close(m.a_to_b.similarity, full.topk(3, dim=1).values)
    assert torch.equal(m.a_to_b.index, full.topk(3, dim=1).indices)
    torch.testing.assert_close(m.b_to_a.similarity, full.T.topk(3, dim=1).values)
    assert torch.equal(m.b_to_a.index, full.T.topk(3, dim=1).indices)
    torch.testing.assert_close(m.most_negative.similarity, full.min(1).values)
    assert torch.equal(m.most_negative.index, full.min(1).indices)
    forward, backward = float(full.max(1).values.mean()), float(full.max(0).values.mean())
    assert m.mmcs("a_to_b") == pytest.approx(forward, abs=1e-12)
    assert m.mmcs("b_to_a") == pytest.approx(backward, abs=1e-12)
    assert m.mmcs() == m.mmcs("mean") == pytest.approx((forward + backward) / 2, abs=1e-12)
    assert mmcs(a, b) == m.mmcs()
    assert mmcs(a, b, "b_to_a") == m.mmcs("b_to_a")
    assert m.fraction_above(0.5) == pytest.approx(float((full.max(1).values > 0.5).double().mean()))
    assert m.fraction_above(0.5, "b_to_a") == pytest.approx(float((full.max(0).values > 0.5).double().mean()))


def test_alive_features_keep_their_numbers() -> None:
    a, b = draw(9, 5), draw(13, 5, seed=1)
    alive_a, alive_b = torch.arange(9) % 2 == 0, torch.arange(13) > 3
    m = match(a, b, alive=(alive_a, alive_b), candidates=2)
    full = cosines(a, b).masked_fill(~alive_b, -9)[alive_a]
    assert torch.equal(m.a_to_b.index, full.topk(2, dim=1).indices)
    back = cosines(b, a).masked_fill(~alive_a, -9)[alive_b]
    assert torch.equal(m.b_to_a.index, back.topk(2, dim=1).indices)
    assert torch.equal(m.most_negative.index, full.masked_fill(full == -9, 9).argmin(1))
    assert torch.equal(m.rows[0], alive_a.nonzero().flatten())
    assert m.mmcs("a_to_b") == pytest.approx(float(full.max(1).values.mean()), abs=1e-12)
    assert match(a, b, alive=(None, alive_b)).a_to_b.index.shape == (9, 1)


def test_weights_carry_the_scale() -> None:
    a, b = draw(9, 5), draw(13, 5, seed=1)
    weight_a, weight_b = draw(9, seed=2).abs(), draw(13, seed=3).abs()
    full = cosines(a, b)
    m = match(a, b, weights=(weight_a, weight_b))
    assert m.mmcs("a_to_b") == pytest.approx(float((full.max(1).values * weight_a).sum() / weight_a.sum()), abs=1e-12)
    assert m.mmcs("b_to_a") == pytest.approx(float((full.max(0).values * weight_b).sum() / weight_b.sum()), abs=1e-12)
    alive = torch.arange(9) < 4
    part = match(a, b, alive=(alive, None), weights=(weight_a, None))
    assert part.mmcs("a_to_b") == pytest.approx(float((full.max(1).values * weight_a)[:4].sum() / weight_a[:4].sum()), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_histogram_counts_every_feature_once(dtype: torch.dtype) -> None:
    a, b = draw(50, 5, dtype=dtype), draw(70, 5, seed=1, dtype=dtype)
    b[:20] = a[:20]
    m = match(a, b)
    counts = m.histogram(bins=10, seed=3)
    assert counts["edges"].tolist() == pytest.approx([i / 5 - 1 for i in range(11)], abs=1e-7)
    assert int(counts["a_to_b"].sum()) == int(counts["null"].sum()) == 50
    assert int(counts["b_to_a"].sum()) == 70
    assert int(counts["a_to_b"][-1]) >= 20  # the copies, which rounding may have put just above 1
    best = m.a_to_b.similarity[:, 0].float().clamp(-1, 1).numpy()
    assert counts["a_to_b"].tolist() == np.histogram(best, bins=counts["edges"].numpy())[0].tolist()
    assert "null" not in m.histogram(null=None)
    assert torch.equal(m.histogram(10, seed=3)["null"], counts["null"])


# ---------------------------------------------------------------- one to one


@pytest.mark.parametrize(("n", "m"), [(7, 7), (7, 12), (12, 7), (1, 5)])
def test_one_to_one_with_all_candidates_is_the_optimum(n: int, m: int) -> None:
    a, b = draw(n, 4), draw(m, 4, seed=1)
    full = cosines(a, b)
    rows, columns = optimize.linear_sum_assignment(full.numpy(), maximize=True)
    found = match(a, b, candidates=max(n, m)).one_to_one()
    assert found.exact
    assert found.bound == pytest.approx(float(full[rows, columns].mean()), abs=1e-9)
    assert sorted(zip(found.rows.tolist(), found.columns.tolist())) == sorted(zip(rows.tolist(), columns.tolist()))
    torch.testing.assert_close(found.similarity, full[found.rows, found.columns])


@pytest.mark.parametrize("candidates", [1, 2, 3, 5])
@pytest.mark.parametrize(("n", "m"), [(20, 25), (25, 20)])
def test_one_to_one_with_few_candidates_is_an_upper_bound(candidates: int, n: int, m: int) -> None:
    a, b = draw(n, 3), draw(m, 3, seed=1)
    full = cosines(a, b)
    rows, columns = optimize.linear_sum_assignment(full.numpy(), maximize=True)
    best = float(full[rows, columns].mean())
    found = match(a, b, candidates=candidates).one_to_one()
    assert found.bound >= best - 1e-9
    small, large = (found.rows, found.columns) if n <= m else (found.columns, found.rows)
    assert sorted(small.tolist()) == list(range(min(n, m)))
    partners = large[large >= 0].tolist()
    assert len(set(partners)) == len(partners)
    assert found.exact == (len(partners) == min(n, m))
    if found.exact:
        assert found.bound == pytest.approx(best, abs=1e-9)
    paired = large >= 0
    torch.testing.assert_close(found.similarity[paired], full[found.rows[paired], found.columns[paired]])


def test_one_to_one_uses_a_dummy_where_two_features_want_one_partner() -> None:
    a, b = torch.tensor([[1.0, 0.0], [1.0, 0.1]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert not match(a, b).one_to_one(candidates=1).exact
    found = match(a, b).one_to_one(candidates=2)
    assert found.exact
    assert found.columns.tolist() == [0, 1]


def test_one_to_one_on_alive_features_keeps_their_numbers() -> None:
    a, b = draw(6, 4), draw(9, 4, seed=1)
    alive = torch.arange(9) >= 3
    found = match(a, b, alive=(None, alive)).one_to_one(candidates=9)
    rows, columns = optimize.linear_sum_assignment(cosines(a, b[3:]).numpy(), maximize=True)
    assert sorted(zip(found.rows.tolist(), found.columns.tolist())) == sorted(zip(rows.tolist(), (columns + 3).tolist()))


# ---------------------------------------------------------------- published variants


def test_truth_recovery_is_a_to_b_with_the_truth_first() -> None:
    """The mean over ground-truth features of the signed maximum over learned features; the later code reverses the direction."""
    truth, learned = draw(6, 4), draw(10, 4, seed=1)
    learned[:6] = truth * torch.tensor([[2.0], [1.0], [-1.0], [3.0], [0.5], [-2.0]])
    by_loop = [max(float(torch.nn.functional.cosine_similarity(t, v, dim=0)) for v in learned) for t in truth]
    assert mmcs(truth, learned, "a_to_b") == pytest.approx(sum(by_loop) / 6, abs=1e-9)
    reverse = [max(float(torch.nn.functional.cosine_similarity(t, v, dim=0)) for t in truth) for v in learned]
    assert mmcs(truth, learned, "b_to_a") == pytest.approx(sum(reverse) / 10, abs=1e-9)
    assert match(truth, learned).fraction_above(0.9) >= 4 / 6


def test_absolute_cosines_find_flipped_features() -> None:
    truth = draw(60, 40)
    assert match_cosine(truth, -truth, absolute=True).similarity.double().mean() == pytest.approx(-1)
    assert match(truth, -truth).most_negative.similarity.mean() == pytest.approx(-1)


def test_a_dictionary_against_a_larger_one_and_against_itself() -> None:
    small = draw(8, 16)
    large = torch.cat([draw(8, 16, seed=1), small * 3])
    assert mmcs(small, large, "a_to_b") == pytest.approx(1)
    assert mmcs(small, large, "b_to_a") < 1
    assert match_cosine(small, small, exclude_self=True).similarity.max() < 1


def test_mmcs_matrix() -> None:
    sides = [draw(5, 4), draw(8, 4, seed=1), draw(3, 4, seed=2)]
    forward = mmcs_matrix(sides)
    for i in range(3):
        for j in range(3):
            assert float(forward[i, j]) == pytest.approx(mmcs(sides[i], sides[j], "a_to_b"), abs=1e-12)
    assert torch.equal(mmcs_matrix(sides, "b_to_a"), forward.T)
    mean = mmcs_matrix(sides, "mean")
    assert torch.equal(mean, mean.T)
    torch.testing.assert_close(mean, (forward + forward.T) / 2)
    assert not torch.allclose(forward, forward.T)


def plain(a: Tensor, b: Tensor) -> dict[str, float]:
    """Every variant by its definition, from the full matrix of cosines."""
    full, own = cosines(a, b), cosines(a, a).fill_diagonal_(-2)
    rows, columns = optimize.linear_sum_assignment(1 - full.numpy())
    pairs = full[rows, columns]
    by_size = full.max(1) if a.shape[0] <= b.shape[0] else full.max(0)
    by_size_turned = full.max(0) if a.shape[0] <= b.shape[0] else full.max(1)
    magnitude = full.abs()
    rows, columns = optimize.linear_sum_assignment(1 - magnitude.numpy())
    return {
        "truth_recovery": float(full.max(1).values.mean()),
        "representedness": float(full.max(1).values.mean()),
        "larger_dictionary": float(by_size.values.mean()),
        "mcs_duplicates": float(full.max(0).values.mean()),
        "big_sweep": float(by_size_turned.values.mean()),
        "both_directions": float(full.max(1).values.mean() + full.max(0).values.mean()) / 2,
        "absolute": float(magnitude.max(1).values.mean() + magnitude.max(0).values.mean()) / 2,
        "hungarian": float(pairs.mean()),
        "hungarian_above": float((pairs > 0.9).double().mean()),
        "mcc": float(magnitude[rows, columns].mean()),
        "cosine_hungarian_loss": float((1 - pairs).sum()),
        "self_similarity": float(own.max(1).values.mean()),
        "dictionary_collinearity": float(cosines(a, a).fill_diagonal_(0).abs().max()),
    }


@pytest.mark.parametrize("shape", [(30, 47), (47, 30), (40, 40)])
@pytest.mark.parametrize("name", MMCS_VARIANTS)
def test_variants_by_their_definitions(name: str, shape: tuple[int, int]) -> None:
    a, b = draw(shape[0], 6), draw(shape[1], 6, seed=1)
    b[:12] = -2 * a[:12]
    b[12:20] = a[12:20] + 0.1 * draw(8, 6, seed=2)
    other = a if MMCS_VARIANTS[name].exclude_self else b
    assert mmcs(a, other, variant=name) == pytest.approx(plain(a, b)[name], abs=1e-9)
    assert mmcs(a, other, variant=MMCS_VARIANTS[name]) == mmcs(a, other, variant=name)
    assert MMCS_VARIANTS[name].source


def test_variants_take_the_options_of_match() -> None:
    a, b = draw(20, 6), draw(33, 6, seed=1)
    alive = torch.arange(33) % 3 > 0
    for name, expected in plain(a, b[alive]).items():
        if not MMCS_VARIANTS[name].exclude_self:
            assert mmcs(a, b, variant=name, alive=(None, alive)) == pytest.approx(expected, abs=1e-9)
    weight = draw(20, seed=2).abs()
    best = cosines(a, b).abs().max(1).values
    loud = mmcs(a, b, variant=MmcsVariant("a_to_b", absolute=True), weights=(weight, None))
    assert loud == pytest.approx(float((best * weight).sum() / weight.sum()), abs=1e-9)


def test_what_variants_refuse() -> None:
    a, b = draw(9, 6), draw(12, 6, seed=1)
    for options, message in (
        ({"variant": "median"}, r"^mmcs: variant must be .*truth_recovery.* got 'median'"),
        ({"variant": "mcc", "direction": "a_to_b"}, "^mmcs: give direction or variant"),
        ({"variant": "self_similarity"}, r"^mmcs: a variant with exclude_self .* got \[9, 6\] and \[12, 6\]"),
        ({"variant": "self_similarity", "b": a + 1}, "^mmcs: a variant with exclude_self .* a and b must be equal"),
        ({"variant": "mcc", "weights": (torch.ones(9, dtype=torch.float64), None)}, "^mmcs: weights go with the mean"),
    ):
        with pytest.raises(ValueError, match=message):
            mmcs(a, **{"b": b, **options})
    for wrong in (
        lambda: MmcsVariant("up"),
        lambda: MmcsVariant(summary="median"),
        lambda: MmcsVariant(exclude_self=True, one_to_one=True),
    ):
        with pytest.raises(ValueError, match=r"^MmcsVariant: "):
            wrong()


# ---------------------------------------------------------------- size and exactness

native_only = pytest.mark.skipif(loader.unavailable() is not None, reason=str(loader.unavailable()))
MEMORY = """
import sys
import torch
from bench.harness import extra_megabytes, unit_rows
import fastsae
torch.set_num_threads(1)
a, b = unit_rows(16384, 512), unit_rows(8192, 512, seed=1)
fastsae.match(a[:64], b[:64])
print(extra_megabytes(lambda: fastsae.match(a, b)))
"""


@pytest.mark.slow
@native_only
def test_memory_of_a_match() -> None:
    """300 MB above the inputs at 65,536 x 32,768 x 512: beside 192 MiB of inputs; here a quarter of it at a quarter of the rows."""
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, check=True)
    if done.stdout.strip() == "None":
        pytest.skip("this system shows no peak of memory")
    assert float(done.stdout) <= 300 / 4


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=native_only)])
def test_every_match_is_right_where_plain_bfloat16_gets_some_wrong(backend: str) -> None:
    a, b = (torch.nn.functional.normalize(draw(4096, 512, seed=seed, dtype=torch.float32)) for seed in (0, 1))
    exact = a.double() @ b.double().T
    best = exact.max(1).values
    # Rounding of norms, quotients and products in float32, on both sides of a comparison.
    band = 6 * (512 + 3) * 2.0**-24 * float((a.abs() @ b.abs().T).max())

    def wrong(index: Tensor) -> int:
        return int((exact.gather(1, index.unsqueeze(1))[:, 0] != best).sum())

    ours = match_cosine(a, b, backend=backend).index[:, 0]
    lost = best - exact.gather(1, ours.unsqueeze(1))[:, 0]
    assert float(lost.max()) <= band
    # Outside the band: the second best is farther than that, and then only one answer is right.
    clear = exact.topk(2, dim=1).values.diff(dim=1)[:, 0].abs() > band
    assert int(clear.sum()) > 4000
    assert torch.equal(ours[clear], exact.argmax(1)[clear])
    low = (a.bfloat16() @ b.bfloat16().T).max(1).indices
    assert wrong(ours) <= 4096 - int(clear.sum())
    assert 20 < wrong(low) < 400  # about 2 %


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e-12, 1e19, 1e37])
def test_cosines_and_their_gradients_do_not_depend_on_the_size_of_rows(size: float, dtype: torch.dtype, backend: str | None) -> None:
    """Rows whose squares overflow or vanish have the cosines that they have."""
    generator = torch.Generator().manual_seed(0)
    size = size if dtype is torch.float32 else size**8
    a, b = torch.randn(5, 12, generator=generator), torch.randn(9, 12, generator=generator)
    results = []
    for factor in (1.0, size):
        leaves = [a.to(dtype).mul(factor).requires_grad_(), b.to(dtype).mul(factor).requires_grad_()]
        found = fastsae.match_cosine(*leaves, k=3, eps=1e-35 if dtype is torch.float32 else 1e-300, backend=backend)
        grads = [g * factor for g in torch.autograd.grad(found.similarity.square().sum(), leaves)]
        pair = fastsae.match(*leaves, eps=1e-35 if dtype is torch.float32 else 1e-300, backend=backend)
        results.append((found.similarity, *grads, pair.a_to_b.similarity, pair.b_to_a.similarity, pair.most_negative.similarity))
        results[-1] += (found.index, pair.a_to_b.index, pair.b_to_a.index, pair.most_negative.index)
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6 if dtype is torch.float32 else 1e-14)


def test_a_row_of_zeros_has_similarity_0_whatever_eps() -> None:
    b = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for eps in (5e-324, 1e-40, 1e-8, 1e38):
        for backend in (None, "reference"):
            assert not fastsae.match_cosine(torch.zeros(2, 3), b, eps=eps, backend=backend).similarity.any()
    with pytest.raises(ValueError, match=r"^match_cosine: eps must be at most 3.40282e\+38, got 1e\+39"):
        fastsae.match_cosine(b, b, eps=1e39)


def test_contributions_are_compared_as_vectors_whatever_carries_the_scale() -> None:
    f, d = draw(5, 4), draw(7, 4, seed=1)
    c, z = (TopKLatents(draw(30, 3, seed=n), draw(30, F, seed=n + 1).argsort(1)[:, :3], F) for n, F in ((2, 5), (4, 7)))
    got = contribution_similarity(c, f, z, d)
    put, found = (dense.to_dense().unsqueeze(2) * rows for dense, rows in ((c, f), (z, d)))  # [samples, features, D]
    for g in range(5):
        for j in range(7):
            ours, theirs = put[:, g], found[:, j]
            want = 2 * (ours * theirs).sum() / (ours.square().sum() + theirs.square().sum())
            torch.testing.assert_close(got[g, j], want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(contribution_similarity(c, f, TopKLatents(z.values / 8, z.indices, 7), d * 8), got)
    assert float((got.abs() - cosines(f, d).abs()).max()) <= 1e-12
    own = contribution_similarity(c, f, c, f)
    torch.testing.assert_close(own.diagonal(), torch.ones(5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^contribution_similarity: latents must be of the samples \[30\], got \[9\]"):
        contribution_similarity(c, f, z[:9], d)
