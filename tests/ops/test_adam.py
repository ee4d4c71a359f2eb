"""What is special to the fused step: equality with torch's optimiser, bits that depend neither on threads nor on the gradient's form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from levels import codes
from torch import Tensor

import fastsae
from fastsae.dispatch import OPS
from fastsae.native import adam as native_adam
from fastsae.native import decode as native_decode
from fastsae.native import loader
from fastsae.optim import RowGradient

LR = 1e-2
B, D, F, K = 40, 37, 61, 5


@pytest.fixture(params=["reference", *codes()])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, and the C++ row at every level."""
    if request.param == "reference":
        yield "reference"
    else:
        with loader.use_isa(request.param):
            yield "cpu"


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unit(W: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(W, dim=1, keepdim=True)
    return W / torch.where(norm < 1e-8, 1.0, norm)


def slots(kind: str, seed: int) -> RowGradient:
    """Gradients of F features: the last ones are never touched."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn((B, D), generator=g)
    indices = torch.randint(0, F - 6, (B, K), generator=g)
    if kind == "duplicates":
        indices[:, 1] = indices[:, 0]
    if kind == "heavy":
        indices[:, 2] = 7
    if kind == "empty":
        return RowGradient(torch.empty(0, K), torch.empty(0, K, dtype=torch.int64), None, rows[:0], F)
    if kind == "ragged":
        lengths = torch.randint(0, 9, (B,), generator=g)
        crow = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        n = int(crow[-1])
        return RowGradient(torch.randn(n, generator=g), torch.randint(0, F - 6, (n,), generator=g).int(), crow, rows, F)
    return RowGradient(torch.randn((B, K), generator=g), indices, None, rows, F)


def dense(gradient: RowGradient, dtype: torch.dtype = torch.float64) -> Tensor:
    """The matrix by autograd's own rule: index_add of the products."""
    crow, indices = gradient.crow, gradient.indices.long()
    lengths = crow.diff() if crow is not None else torch.full((gradient.rows.shape[0],), K)
    row = torch.arange(gradient.rows.shape[0]).repeat_interleave(lengths)
    products = gradient.values.reshape(-1, 1).to(dtype) * gradient.rows.to(dtype)[row]
    return torch.zeros(gradient.n_features, gradient.rows.shape[1], dtype=dtype).index_add_(0, indices.reshape(-1), products)


@pytest.mark.parametrize("kind", ["plain", "duplicates", "heavy", "ragged", "empty"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_torch(backend: str, kind: str, decay: float) -> None:
    """Allowed are 0.1 lr after 1 and 10 steps: what is left of an ill-conditioned m / sqrt(v). All but a few elements agree to some ulp."""
    W, m, v = normal(F, D), torch.zeros(F, D), torch.zeros(F, D)
    leaf = W.clone().requires_grad_()
    theirs = torch.optim.AdamW([leaf], lr=LR, weight_decay=decay)
    for step in range(1, 11):
        gradient = slots(kind, seed=step)
        fastsae.optim.adam_(W, m, v, gradient, step=step, lr=LR, weight_decay=decay, backend=backend)
        leaf.grad = dense(gradient, torch.float32)
        theirs.step()
        if step in (1, 10):
            difference = (W - leaf.detach()).abs()
            assert difference.max() <= 0.1 * LR
            assert difference.quantile(0.999) <= 8 * torch.finfo(torch.float32).eps * leaf.detach().abs().max()
    state = theirs.state[leaf]
    for ours, other in ((m, state["exp_avg"]), (v, state["exp_avg_sq"])):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)  # float32 sums of up to 60 terms in another order


@pytest.mark.parametrize("kind", ["plain", "ragged", "dense"])
def test_equals_the_composition_in_torch(backend: str, kind: str) -> None:
    """Projection, clipping, decay, Adam and unit rows, composed by hand in float64."""
    W, m, v = unit(normal(F, D)), torch.zeros(F, D), torch.zeros(F, D)
    leaf = W.double().requires_grad_()
    theirs = torch.optim.AdamW([leaf], lr=LR, weight_decay=0.05)
    for step in range(1, 11):
        rows = slots("plain" if kind == "dense" else kind, seed=step)
        exact = dense(rows)
        given: Any = exact.float() if kind == "dense" else rows
        squares = OPS["grad_squares"](
            W, *((given, None, None, None) if kind == "dense" else (rows.rows, rows.values, rows.indices, rows.crow)), True, backend=backend
        )
        factor = (2.0 / (squares.sqrt() + 1e-6)).clamp_max(1.0)
        fastsae.optim.adam_(
            W, m, v, given, step=step, lr=LR, weight_decay=0.05, factor=factor, project=True, normalise=True, backend=backend
        )  # fmt: skip
        with torch.no_grad():
            leaf.grad = exact - (exact * leaf).sum(1, keepdim=True) * leaf
            norm = torch.nn.utils.clip_grad_norm_([leaf], 2.0)
            theirs.step()
            leaf.copy_(unit(leaf))
        torch.testing.assert_close(squares.sqrt().double(), norm.detach(), rtol=1e-4, atol=0)  # of weights that have drifted apart a little
        difference = (W - leaf.detach()).abs()
        assert difference.max() <= 0.1 * LR
        assert difference.quantile(0.99) <= 2e-6
        torch.testing.assert_close(torch.linalg.vector_norm(W, dim=1), torch.ones(F), rtol=2e-6, atol=0)


def test_untouched_features_move_as_dense_adam_moves_them(backend: str) -> None:
    W, m, v = normal(F, D), normal(F, D, seed=1), normal(F, D, seed=2).square()
    before = W.clone(), m.clone(), v.clone()
    fastsae.optim.adam_(W, m, v, slots("plain", 0), step=5, lr=LR, backend=backend)
    silent = slice(F - 6, F)
    torch.testing.assert_close(m[silent], 0.9 * before[1][silent])
    torch.testing.assert_close(v[silent], 0.999 * before[2][silent])
    assert (W[silent] != before[0][silent]).all()


def test_short_rows_are_not_normalised(backend: str) -> None:
    W, m, v = torch.zeros(3, D), torch.zeros(3, D), torch.ones(3, D)
    W[1], W[2] = 1e-10, 1e-3
    fastsae.optim.adam_(W, m, v, torch.zeros(3, D), step=1, normalise=True, backend=backend)
    assert torch.equal(W[:2], torch.tensor([[0.0], [1e-10]]).expand(2, D))
    torch.testing.assert_close(torch.linalg.vector_norm(W[2]), torch.tensor(1.0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads_as_in_torch(backend: str, value: float) -> None:
    gradient = slots("plain", 3)
    gradient.values[4, 2] = value
    W, m, v = normal(F, D), torch.zeros(F, D), torch.zeros(F, D)
    leaf = W.clone().requires_grad_()
    theirs = torch.optim.Adam([leaf], lr=LR)
    for step in (1, 2):
        fastsae.optim.adam_(W, m, v, gradient, step=step, lr=LR, backend=backend)
        leaf.grad = dense(gradient, torch.float32)
        theirs.step()
    assert torch.equal(W.isnan(), leaf.isnan())
    assert torch.equal(m.isfinite(), theirs.state[leaf]["exp_avg"].isfinite())
    assert int(W.isnan().any(1).sum()) == 1


def test_a_factor_that_is_nan_leaves_everything(backend: str) -> None:
    for gradient in (slots("plain", 3), normal(F, D, seed=9)):
        W, m, v = normal(F, D), normal(F, D, seed=1), normal(F, D, seed=2).square()
        before = W.clone(), m.clone(), v.clone()
        options: dict[str, Any] = {"step": 1, "weight_decay": 0.1, "project": True, "normalise": True, "backend": backend}
        fastsae.optim.adam_(W, m, v, gradient, factor=torch.tensor(float("nan")), **options)
        assert all(torch.equal(a, b) for a, b in zip((W, m, v), before))
        fastsae.optim.adam_(W, m, v, gradient, factor=torch.tensor(1.0), **options)
        assert not torch.equal(W, before[0])


needs_native = pytest.mark.skipif(loader.unavailable() is not None, reason=str(loader.unavailable()))


def everywhere(run: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Results on 1, 2 and 3 threads."""
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run())
        return results
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize("unit_rows", [False, True])
def test_bits_do_not_depend_on_threads(hot: bool, unit_rows: bool) -> None:
    """Also where a feature has so many slots that its row is split over the threads."""
    features, width = 700, 600
    indices = torch.randint(0, features, (1500, 4), generator=torch.Generator().manual_seed(0))
    if hot:
        indices[:, 0], indices[:1100, 1] = 3, 699
    gradient = RowGradient(normal(1500, 4), indices, None, normal(1500, width, seed=1), features)
    start = unit(normal(features, width, seed=2))

    def run() -> tuple[Tensor, ...]:
        W, m, v = start.clone(), normal(features, width, seed=3), normal(features, width, seed=4).square()
        fastsae.optim.adam_(W, m, v, gradient, step=3, project=unit_rows, normalise=unit_rows, backend="cpu")
        total = OPS["grad_squares"](start, gradient.rows, gradient.values, gradient.indices, None, unit_rows, backend="cpu")
        return W, m, v, total

    first, *others = everywhere(run)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@needs_native
@pytest.mark.parametrize("ragged", [False, True])
def test_many_slots_are_sorted_by_all_threads(ragged: bool) -> None:
    """In ranges of slots of 32768 and more, which must not change the order within a feature."""
    rows, k, features, width = 20_000, 5, 300, 3
    indices = torch.randint(0, features, (rows, k), generator=torch.Generator().manual_seed(0))
    values, crow = normal(rows, k), None
    if ragged:
        cuts = torch.randint(0, rows * k, (rows - 1,), generator=torch.Generator().manual_seed(1)).sort().values
        crow = torch.cat([torch.zeros(1, dtype=torch.int64), cuts, torch.tensor([rows * k])])
        indices, values = indices.flatten().int(), values.flatten()
    gradient = RowGradient(values, indices, crow, normal(rows, width, seed=1), features)

    def run() -> tuple[Tensor, ...]:
        W, m, v = normal(features, width), torch.zeros(features, width), torch.zeros(features, width)
        fastsae.optim.adam_(W, m, v, gradient, step=1, backend="cpu")
        matrix = torch.empty(features, width)
        native_decode.decode_dweight(values, indices, crow, gradient.rows, matrix)
        return W, m, v, matrix

    first, *others = everywhere(run)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    torch.testing.assert_close(first[1], 0.1 * first[3])


@needs_native
def test_a_bias_is_split_over_threads_too() -> None:
    p, g = normal(1, 100_003), normal(1, 100_003, seed=1)

    def run() -> tuple[Tensor, ...]:
        W, m, v = p.clone(), torch.zeros_like(p), torch.zeros_like(p)
        fastsae.optim.adam_(W, m, v, g, step=1, backend="cpu")
        return W, m, v

    first, *others = everywhere(run)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


@needs_native
@pytest.mark.parametrize("level", codes())
def test_slots_give_the_bits_of_the_matrix_that_decode_dweight_writes(level: str) -> None:
    with loader.use_isa(level):
        gradient = slots("ragged", 5)
        matrix = torch.empty(F, D)
        native_decode.decode_dweight(gradient.values, gradient.indices, gradient.crow, gradient.rows, matrix)
        results = []
        for given in (gradient, matrix):
            W, m, v = normal(F, D), normal(F, D, seed=1), normal(F, D, seed=2).square()
            fastsae.optim.adam_(W, m, v, given, step=2, normalise=True, backend="cpu")
            results.append((W, m, v))
        assert all(torch.equal(a, b) for a, b in zip(*results))


@needs_native
def test_avx2_and_avx512_give_the_same_bits() -> None:
    levels = [level for level in loader.isa_levels() if level != "portable"]
    results = []
    for level in levels:
        with loader.use_isa(level):
            W, m, v = unit(normal(F, D)), normal(F, D, seed=1), normal(F, D, seed=2).square()
            fastsae.optim.adam_(W, m, v, slots("heavy", 1), step=2, project=True, normalise=True, backend="cpu")
            results.append((W, m, v))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@needs_native
def test_refusals_give_the_reason() -> None:
    W, m, v, g = normal(6, 4), normal(6, 4), normal(6, 4), normal(6, 4)
    options = (None, None, None, None, 1e-3, 0.9, 0.999, 1e-8, 0.0, 1, False, False)
    assert native_adam.refuses_adam(W, m, v, g, *options) is None
    assert native_adam.refuses_adam(W.double(), m, v, g, *options) == "dtype float64 of W (supported: float32)"
    assert native_adam.refuses_adam(W, m, v.bfloat16(), g, *options) == "dtype bfloat16 of v (supported: float32)"
    other = W.T.contiguous().T
    assert native_adam.refuses_adam(other, other, other, g, *options) is None
    assert native_adam.refuses_adam(other, m, v, g, *options) == "m with strides (4, 1) (supported: those of W)"
    spread = torch.empty(12, 8)[::2, ::2]
    assert native_adam.refuses_adam(spread, m, v, g, *options) == "W with strides (16, 2) (supported: rows, or their transposed view)"
    assert native_adam.refuses_grad_squares(W, g.to("meta"), None, None, None, False) == "device meta of grad (supported: cpu)"
    with pytest.raises(fastsae.BackendError, match="those of W"):
        fastsae.optim.adam_(other, m, v, g, step=1, backend="cpu")


@needs_native
@pytest.mark.parametrize("level", codes())
@pytest.mark.parametrize("kind", ["ragged", "hot", "dense", "dense rows"])
@pytest.mark.parametrize("unit_rows", [False, True])
def test_a_transposed_view_gives_the_bits_of_the_rows(level: str, kind: str, unit_rows: bool) -> None:
    """W, moments and a dense gradient as views of [D, F] parameters, whole and a range of their columns; blocks of 128 features, more
    than 256 elements in a sum, an untouched feature that is not finite, and one with so many slots that all threads sum it."""
    features, width = (261, 300) if kind == "hot" else (F, D)

    def start(view: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        W, m, v = unit(normal(features, width)), normal(features, width, seed=1) / 10, normal(features, width, seed=2).square()
        W[1] = m[1] = 0
        W[-1, 3] = torch.inf
        return tuple(view(t) for t in (W, m, v))

    def transposed(t: Tensor) -> Tensor:
        return t.T.contiguous().T

    def columns(t: Tensor) -> Tensor:
        return torch.zeros(t.shape[1], t.shape[0] + 5).T[2:-3].copy_(t)

    indices = torch.randint(0, features - 6, (1100, 4), generator=torch.Generator().manual_seed(0))
    indices[:, 0] = 130
    hot = RowGradient(normal(1100, 4), indices, None, normal(1100, width, seed=1), features)
    matrix = normal(features, width, seed=7)
    given: Any = slots("ragged", 5) if kind == "ragged" else hot if kind == "hot" else matrix
    results = []
    with loader.use_isa(level):
        for view in (lambda t: t, transposed, columns):
            W, m, v = start(view)
            gradient = view(given) if kind == "dense" else given
            parts = (gradient, None, None, None)
            if isinstance(gradient, RowGradient):
                parts = (gradient.rows, gradient.values, gradient.indices, gradient.crow)
            finite = view(start(lambda t: t)[0].nan_to_num(posinf=1.0))
            total = OPS["grad_squares"](finite, *parts, unit_rows, backend="cpu")
            fastsae.optim.adam_(W, m, v, gradient, step=3, weight_decay=0.1, project=unit_rows, normalise=unit_rows, backend="cpu")
            results.append((W, m, v, total))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    if kind in ("ragged", "hot"):
        assert results[0][1].isfinite().all()  # an untouched feature is not projected: an infinite weight stays out of its moments


def test_narrow_slots_are_widened_exactly() -> None:
    gradient = slots("plain", 1)
    narrow = RowGradient(gradient.values.bfloat16(), gradient.indices, None, gradient.rows.half(), F)
    wide = RowGradient(narrow.values.float(), gradient.indices, None, narrow.rows.float(), F)
    results = []
    for given in (narrow, wide):
        W, m, v = normal(F, D), torch.zeros(F, D), torch.zeros(F, D)
        fastsae.optim.adam_(W, m, v, given, step=1)
        results.append(W)
    assert torch.equal(*results)


def test_autograd_sees_that_the_weights_have_changed() -> None:
    W = normal(4, 3).requires_grad_()
    loss = W.square().sum()
    fastsae.optim.adam_(W, torch.zeros(4, 3), torch.zeros(4, 3), normal(4, 3), step=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
