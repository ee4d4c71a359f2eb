"""The four encoders against a dense formulation that shares no code with them, and hand-written cases of every order rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import fastsae
from fastsae import reference

NAN, INF = float("nan"), float("inf")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(rows: int = 9, width: int = 6, features: int = 21) -> dict[str, Tensor]:
    sizes = {"x": (rows, width), "W": (features, width), "b": (features,), "b_pre": (width,), "scale": (features,)}
    return {name: draw(*size, seed=seed).requires_grad_() for seed, (name, size) in enumerate(sizes.items())}


def dense_scores(p: dict[str, Tensor]) -> Tensor:
    return torch.nn.functional.linear(p["x"] - p["b_pre"], p["W"]) * p["scale"] + p["b"]


def same_gradients(ours: Tensor, dense: Tensor, leaves: dict[str, Tensor]) -> None:
    """Equal values, and equal gradients of a weighted sum (float64: both differ by rounding only)."""
    torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-12)
    weight = draw(*dense.shape, seed=99)
    got = torch.autograd.grad((ours * weight).sum(), list(leaves.values()), allow_unused=True, retain_graph=True)
    want = torch.autograd.grad((dense * weight).sum(), list(leaves.values()), allow_unused=True, retain_graph=True)
    for name, a, b in zip(leaves, got, want, strict=True):
        a, b = (torch.zeros_like(leaves[name]) if g is None else g for g in cast("tuple[Tensor | None, ...]", (a, b)))
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"gradient of {name}: {text}")


# ---------------------------------------------------------------- dense formulations, float64


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("subset", [None, "mask", "index"])
@pytest.mark.parametrize("k", [1, 5, 10])
def test_topk_equals_the_dense_formulation(relu: bool, subset: str | None, k: int) -> None:
    p = layer()
    mask = torch.zeros(21, dtype=torch.bool).index_fill_(0, torch.tensor([0, 2, 3, 5, 7, 11, 13, 14, 17, 20]), True)
    # Order and repetition of an index do not matter.
    features = {None: None, "mask": mask, "index": torch.cat([mask.nonzero().flatten().flip(0), torch.tensor([7, 7])])}[subset]
    ours = fastsae.encode_topk(p["x"], p["W"], p["b"], k=k, b_pre=p["b_pre"], scale=p["scale"], features=features, relu=relu)
    scores = dense_scores(p)
    masked = scores if subset is None else scores.masked_fill(~mask, -INF)
    top = masked.topk(k, dim=1)
    values = top.values.relu() if relu else top.values
    same_gradients(ours.to_dense(), torch.zeros_like(scores).scatter(1, top.indices, values), p)
    assert torch.equal(ours.indices, top.indices)
    assert ours.n_features == 21


class DenseJumpReLU(torch.autograd.Function):
    """z 1[z > theta] with the rectangle of Rajamanoharan et al. 2024, equation 11, dense."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.width = width
        return z * (z > theta.clamp_min(0))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]  (one result)
        z, theta = ctx.saved_tensors
        inside = ((z - theta).abs() < ctx.width / 2).to(z.dtype)
        return grad * (z > theta.clamp_min(0)), (-(theta / ctx.width) * inside * grad).sum_to_size(theta.shape), None


class DenseL0(torch.autograd.Function):
    """The Heaviside step of each score with the same rectangle, dense; no gradient to the score."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.width = width
        return (z > theta.clamp_min(0)).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]  (one result)
        z, theta = ctx.saved_tensors
        inside = ((z - theta).abs() < ctx.width / 2).to(z.dtype)
        return None, (-(1 / ctx.width) * inside * grad).sum_to_size(theta.shape), None


@pytest.mark.parametrize(
    "theta", [draw(21, seed=7).abs(), draw(21, seed=7), torch.tensor(0.4, dtype=torch.float64)], ids=["positive", "signed", "scalar"]
)
@pytest.mark.parametrize("width", [0.05, 0.7, 30.0])
def test_jumprelu_equals_the_dense_straight_through_estimator(theta: Tensor, width: float) -> None:
    p = layer()
    p["theta"] = theta.clone().requires_grad_()
    latents, l0 = fastsae.encode_threshold(
        p["x"], p["W"], p["b"], threshold=p["theta"], b_pre=p["b_pre"], scale=p["scale"], bandwidth=width
    )
    z = dense_scores(p)
    same_gradients(latents.to_dense(), DenseJumpReLU.apply(z, p["theta"], width), p)
    dense_l0 = DenseL0.apply(z, p["theta"], width).sum(1)
    torch.testing.assert_close(l0, dense_l0)
    weight = draw(9, seed=3)
    (got,) = torch.autograd.grad((l0 * weight).sum(), [p["theta"]])
    (want,) = torch.autograd.grad((dense_l0 * weight).sum(), [p["theta"]])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    # In-band scores that do not exceed the threshold are slots of value 0, and nothing else is.
    inside = ((z - p["theta"]).abs() < width / 2) & (z <= p["theta"].clamp_min(0))
    assert int((latents.values == 0).sum()) == int(inside.sum())


def test_jumprelu_both_results_add_up_in_the_threshold_gradient() -> None:
    p = layer()
    theta = draw(21, seed=7).abs().requires_grad_()
    latents, l0 = fastsae.encode_threshold(p["x"], p["W"], threshold=theta, bandwidth=0.5)
    z = torch.nn.functional.linear(p["x"], p["W"])
    (got,) = torch.autograd.grad(latents.to_dense().sum() + 3 * l0.sum(), [theta])
    (want,) = torch.autograd.grad(DenseJumpReLU.apply(z, theta, 0.5).sum() + 3 * DenseL0.apply(z, theta, 0.5).sum(), [theta])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("threshold", [0.0, 0.3, -2.0])
def test_threshold_equals_the_dense_formulation(threshold: float) -> None:
    p = layer()
    mask = torch.arange(21) % 3 != 0
    latents = fastsae.encode_threshold(p["x"], p["W"], p["b"], threshold=threshold, b_pre=p["b_pre"], scale=p["scale"], features=mask)
    z = dense_scores(p)
    same_gradients(latents.to_dense(), torch.where((z > max(threshold, 0)) & mask, z, 0), p)
    assert all(bool((columns.diff() > 0).all()) for columns in latents.col.split(latents.crow.diff().tolist()))


def test_threshold_gradient_is_zero_without_a_bandwidth() -> None:
    p = layer()
    theta = torch.full((21,), 0.2, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(fastsae.encode_threshold(p["x"], p["W"], threshold=theta).values.sum(), [theta])
    assert torch.equal(got, torch.zeros(21, dtype=torch.float64))


@pytest.mark.parametrize("k", [0.05, 0.5, 2.37, 21.0, 1e9])
def test_batch_topk_equals_the_dense_formulation(k: float) -> None:
    p = layer()
    latents, min_kept = fastsae.encode_batch_topk(p["x"], p["W"], p["b"], k=k, b_pre=p["b_pre"], scale=p["scale"])
    z = dense_scores(p)
    flat = z.flatten()
    best = flat.sort(descending=True, stable=True).indices[: int(k * 9)]
    best = best[flat[best] > 0]
    dense = torch.zeros_like(flat).index_put((best,), flat[best]).reshape(z.shape)
    same_gradients(latents.to_dense(), dense, p)
    assert latents.values.numel() == best.numel()
    assert float(min_kept) == pytest.approx(float(flat[best].detach().min()) if best.numel() else INF, rel=1e-14)
    assert not min_kept.requires_grad


def test_gated_equals_the_dense_formulation() -> None:
    p = layer()
    gates = {name: draw(21, seed=seed).requires_grad_() for seed, name in ((31, "b_gate"), (32, "r_mag"), (33, "b_mag"))}
    latents = fastsae.encode_gated(p["x"], p["W"], b_pre=p["b_pre"], **gates)
    product = torch.nn.functional.linear(p["x"] - p["b_pre"], p["W"])
    dense = (product + gates["b_gate"] > 0) * (product * gates["r_mag"].exp() + gates["b_mag"]).relu()
    same_gradients(latents.to_dense(), dense, {**p, **gates})
    assert bool((latents.values > 0).all())


# ---------------------------------------------------------------- order rules, literally


def identity(scores: list[list[float]], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(x, W) whose scores are those given: x is the identity, W the transposed scores."""
    s = torch.tensor(scores, dtype=dtype)
    return torch.eye(s.shape[0], dtype=dtype), s.T.contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_topk_takes_the_lower_index_among_equals(dtype: torch.dtype) -> None:
    x, W = identity([[1, 3, 2, 3, 3, 0, 2]], dtype)
    for k, expected in ((1, [1]), (2, [1, 3]), (3, [1, 3, 4]), (4, [1, 3, 4, 2]), (5, [1, 3, 4, 2, 6]), (7, [1, 3, 4, 2, 6, 0, 5])):
        assert fastsae.encode_topk(x, W, k=k).indices.tolist() == [expected]
    x, W = identity([[0, -0.0, 0, -1]], dtype)
    assert fastsae.encode_topk(x, W, k=3, relu=False).indices.tolist() == [[0, 1, 2]]


def one_row(scores: list[float]) -> dict[str, Tensor]:
    """One row of width 0 whose scores are the biases, so that NaN, infinities and signed zeros reach the selection as they are."""
    return {"x": torch.zeros(1, 0), "W_enc": torch.zeros(len(scores), 0), "b_enc": torch.tensor(scores)}


def test_topk_ranks_nan_above_infinity_and_orders_infinities() -> None:
    row = one_row([1.0, NAN, INF, -INF, NAN, 5.0, INF])
    latents = fastsae.encode_topk(**row, k=7, relu=False)
    assert latents.indices.tolist() == [[1, 4, 2, 6, 5, 0, 3]]
    assert str(latents.values.tolist()) == "[[nan, nan, inf, inf, 5.0, 1.0, -inf]]"
    assert fastsae.encode_topk(**row, k=3).indices.tolist() == [[1, 4, 2]]


def test_topk_clamps_after_the_selection() -> None:
    row = one_row([-3.0, -1.0, -2.0, 0.5])
    latents = fastsae.encode_topk(**row, k=3)
    assert latents.indices.tolist() == [[3, 1, 2]]
    assert latents.values.tolist() == [[0.5, 0.0, 0.0]]
    assert fastsae.encode_topk(**row, k=3, relu=False).values.tolist() == [[0.5, -1.0, -2.0]]


def test_signed_zeros_are_equal() -> None:
    assert fastsae.encode_topk(**one_row([-0.0, 0.0, -0.0, 0.0]), k=4, relu=False).indices.tolist() == [[0, 1, 2, 3]]
    assert fastsae.encode_threshold(**one_row([-0.0, 0.0, 1e-30])).col.tolist() == [2]


def test_threshold_is_strict_and_keeps_nan() -> None:
    row = one_row([1.0, 2.0, NAN, 2.5, INF, -INF, -1.0])
    latents = fastsae.encode_threshold(**row, threshold=2.0)
    assert latents.col.tolist() == [2, 3, 4]
    assert str(latents.values.tolist()) == "[nan, 2.5, inf]"
    assert fastsae.encode_threshold(**row, threshold=-5.0).col.tolist() == [0, 1, 2, 3, 4]  # never below 0
    assert fastsae.encode_threshold(**row, threshold=torch.tensor([0, 3.0, 0, 2.5, 0, 0, -9])).col.tolist() == [0, 2, 4]


def test_batch_topk_breaks_ties_by_row_then_feature() -> None:
    x, W = identity([[2, 1, 2], [2, 2, 0], [3, 1, 2]])
    expected = {1 / 3: [(2, 0)], 2 / 3: [(0, 0), (2, 0)], 1: [(0, 0), (0, 2), (2, 0)], 4 / 3: [(0, 0), (0, 2), (1, 0), (2, 0)]}
    for k, cells in expected.items():
        latents, min_kept = fastsae.encode_batch_topk(x, W, k=k + 1e-9)
        row = torch.arange(3).repeat_interleave(latents.crow.diff())
        assert list(zip(row.tolist(), latents.col.tolist())) == cells
        assert float(min_kept) == (3 if k < 0.5 else 2)


def test_batch_topk_with_fewer_positives_than_asked() -> None:
    x, W = identity([[-1, 0, 2], [-3, -0.0, -1]])
    latents, min_kept = fastsae.encode_batch_topk(x, W, k=2)
    assert latents.crow.tolist() == [0, 1, 1]
    assert (latents.col.tolist(), latents.values.tolist(), float(min_kept)) == ([2], [2.0], 2.0)


@pytest.mark.parametrize("k", [0.4, 1.0, 5.0])
def test_batch_topk_of_nothing_positive_reports_infinity(k: float) -> None:
    latents, min_kept = fastsae.encode_batch_topk(torch.ones(2, 3), -torch.ones(4, 3), k=k)
    assert latents.crow.tolist() == [0, 0, 0]
    assert float(min_kept) == INF
    assert min_kept.dtype is torch.float32


def test_batch_topk_takes_the_integer_part() -> None:
    x, W = identity([[5, 4, 3, 2, 1]])
    assert fastsae.encode_batch_topk(x, W, k=2.999)[0].values.tolist() == [5.0, 4.0]
    assert fastsae.encode_batch_topk(x, W, k=0.999)[0].values.tolist() == []


def test_batch_topk_keeps_nan_first() -> None:
    latents, min_kept = fastsae.encode_batch_topk(**one_row([1.0, NAN, INF, NAN, 3.0]), k=3)
    assert latents.col.tolist() == [1, 2, 3]
    assert float(min_kept) == INF
    latents, min_kept = fastsae.encode_batch_topk(**one_row([1.0, NAN, INF, NAN, 3.0]), k=2)
    assert latents.col.tolist() == [1, 3]
    assert bool(min_kept.isnan())


def test_gated_gate_is_strict_and_zero_magnitude_is_left_out() -> None:
    p = torch.tensor([[1.0, 1.0, 1.0, 1.0, NAN]])
    x, W = torch.ones(1, 1), p.T.contiguous()
    latents = fastsae.encode_gated(
        x, W, b_gate=torch.tensor([-1.0, -0.5, 5.0, 5.0, 0.0]), r_mag=torch.zeros(5), b_mag=torch.tensor([9.0, 1.0, -1.0, -0.5, 0.0])
    )
    assert latents.col.tolist() == [1, 3, 4]
    assert str(latents.values.tolist()) == "[2.0, 0.5, nan]"


ENCODERS: dict[str, Callable[..., Any]] = {
    "topk": lambda x, W, b: fastsae.encode_topk(x, W, b, k=3, relu=False),
    "threshold": lambda x, W, b: fastsae.encode_threshold(x, W, b, threshold=0.5),
    "bandwidth": lambda x, W, b: fastsae.encode_threshold(x, W, b, threshold=0.5, bandwidth=0.25)[0],
    "batch_topk": lambda x, W, b: fastsae.encode_batch_topk(x, W, b, k=2.5)[0],
    "gated": lambda x, W, b: fastsae.encode_gated(x, W, b_gate=b, r_mag=b.nan_to_num(0) / 8, b_mag=b),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_nan_passes_no_gradient(name: str) -> None:
    W = draw(12, 4, dtype=torch.float32)
    b = draw(12, seed=1, dtype=torch.float32)
    b[3] = NAN
    W, b = W.requires_grad_(), b.requires_grad_()
    x = draw(5, 4, seed=2, dtype=torch.float32).requires_grad_()
    latents = ENCODERS[name](x, W, b)
    assert bool(latents.values.isnan().any())
    for grad in torch.autograd.grad(latents.values.nan_to_num(0).sum(), [x, W]):
        assert bool(grad.isfinite().all())
    assert bool((torch.autograd.grad(ENCODERS[name](x, W, b).values.nan_to_num(0).sum(), [W])[0][3] == 0).all())


# ---------------------------------------------------------------- tiles, batches, dtypes


@pytest.mark.parametrize("elements", [1, 200, 1000])
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("subset", [False, True])
def test_integers_give_the_same_bits_whatever_the_tiles(monkeypatch: pytest.MonkeyPatch, name: str, elements: int, subset: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-3, 4, (100, 5), generator=generator).float()
    W = torch.randint(-2, 3, (90, 5), generator=generator).float()
    b = torch.randint(-2, 3, (90,), generator=generator).float()
    features = torch.arange(0, 90, 2) if subset else None
    functions = {
        "topk": lambda: fastsae.encode_topk(x, W, b, k=13, features=features),
        "threshold": lambda: fastsae.encode_threshold(x, W, b, threshold=1.0, features=features),
        "bandwidth": lambda: fastsae.encode_threshold(x, W, b, threshold=1.0, bandwidth=3.0, features=features),
        "batch_topk": lambda: fastsae.encode_batch_topk(x, W, b, k=3.3, features=features),
        "gated": lambda: fastsae.encode_gated(x, W, b_gate=b, r_mag=torch.zeros(90), b_mag=b),
    }
    leaves = pytree.tree_leaves
    with fastsae.use_backend("reference"):
        whole = leaves(functions[name]())
        monkeypatch.setattr(reference, "WORKSPACE_ELEMENTS", elements)
        tiled = leaves(functions[name]())
    for a, b in zip(whole, tiled, strict=True):
        assert torch.equal(a, b)


@given(st.data())
def test_small_integers_are_exact(data: st.DataObject) -> None:
    """Scores of small integers are exact in every dtype, so selections and values are those of integer arithmetic, ties included."""
    rows, width, features = (data.draw(st.integers(1, high), label=name) for name, high in (("rows", 9), ("width", 17), ("features", 40)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    x, W, b = (torch.randint(-2, 3, shape, generator=generator) for shape in ((rows, width), (features, width), (features,)))
    k = data.draw(st.integers(1, features))
    exact = x @ W.T + b
    order = exact.sort(dim=1, descending=True, stable=True)
    x, W, b = (t.to(dtype) for t in (x, W, b))
    latents = fastsae.encode_topk(x, W, b, k=k, relu=False)
    assert torch.equal(latents.indices, order.indices[:, :k])
    assert torch.equal(latents.values, order.values[:, :k].to(dtype))
    assert torch.equal(fastsae.encode_threshold(x, W, b).to_dense(), exact.relu().to(dtype))
    flat = exact.flatten().sort(descending=True, stable=True)
    kept = flat.indices[: k * rows][flat.values[: k * rows] > 0]
    dense = torch.zeros(exact.numel(), dtype=dtype).index_put((kept,), exact.flatten()[kept].to(dtype))
    assert torch.equal(fastsae.encode_batch_topk(x, W, b, k=k)[0].to_dense(), dense.reshape(exact.shape))


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,), (2, 0, 3), (1, 1, 2, 1)])
def test_batch_dimensions(name: str, batch: tuple[int, ...]) -> None:
    x, W, b = torch.randint(-3, 4, (*batch, 5)).float(), torch.randint(-3, 4, (8, 5)).float(), torch.randint(-1, 2, (8,)).float()
    latents = ENCODERS[name](x, W, b)
    assert tuple(latents.batch_shape) == batch
    assert latents.to_dense().shape == (*batch, 8)
    assert torch.equal(latents.to_dense().reshape(-1, 8), ENCODERS[name](x.reshape(-1, 5), W, b).to_dense())


def test_l0_has_the_batch_dimensions() -> None:
    x, W = draw(2, 3, 4, dtype=torch.bfloat16), draw(7, 4, dtype=torch.bfloat16)
    latents, l0 = fastsae.encode_threshold(x, W, threshold=0.3, bandwidth=0.4)
    assert l0.shape == (2, 3)
    assert l0.dtype is torch.float32
    assert torch.equal(l0, (latents.to_dense() != 0).sum(-1).to(torch.float32))
    assert fastsae.encode_threshold(x[0, 0], W, bandwidth=0.4)[1].shape == ()


@pytest.mark.parametrize("name", ["encode_topk", "encode_threshold", "encode_batch_topk", "encode_gated"])
def test_index_dtype(name: str) -> None:
    x, W, b = draw(3, 4, dtype=torch.float32), draw(7, 4, dtype=torch.float32), draw(7, dtype=torch.float32)
    options = {"encode_topk": {"k": 3}, "encode_batch_topk": {"k": 3}, "encode_gated": {"b_gate": b, "r_mag": b, "b_mag": b}}.get(name, {})

    def indices(dtype: torch.dtype) -> Tensor:
        latents = getattr(fastsae, name)(x, W, **options, index_dtype=dtype)
        latents = latents[0] if isinstance(latents, tuple) else latents
        return latents.indices if name == "encode_topk" else latents.col

    assert indices(torch.int32).dtype is torch.int32
    assert torch.equal(indices(torch.int32).long(), indices(torch.int64))


@pytest.mark.parametrize("name", ENCODERS)
def test_autocast_equals_rounded_inputs(name: str) -> None:
    x, W, b = (draw(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(((4, 300), (40, 300), (40,))))
    with torch.autocast("cpu", torch.bfloat16):
        ours = ENCODERS[name](x, W, b)
    # The gate's magnitude is computed from a bias that autocast has rounded first; so is the expected one.
    expected = ENCODERS[name](x.bfloat16(), W.bfloat16(), b.bfloat16())
    if name == "gated":
        with torch.autocast("cpu", torch.bfloat16):
            expected = fastsae.encode_gated(x.bfloat16(), W.bfloat16(), b_gate=b.bfloat16(), r_mag=b.bfloat16() / 8, b_mag=b.bfloat16())
    assert ours.values.dtype is torch.bfloat16
    for a, e in zip(pytree.tree_leaves(ours), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(a, e)


def test_autocast_leaves_float64_alone() -> None:
    x, W = draw(3, 4), draw(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fastsae.encode_topk(x, W, k=2).values, fastsae.encode_topk(x, W, k=2).values.double())
        assert fastsae.encode_topk(x, W, k=2).values.dtype is torch.float64


@pytest.mark.parametrize("name", ENCODERS)
def test_matmul_precision_changes_nothing_and_is_restored(name: str) -> None:
    x, W, b = (draw(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(((16, 256), (64, 256), (64,))))
    expected = ENCODERS[name](x, W, b)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        ours = ENCODERS[name](x, W, b)
        assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(IndexError):
            fastsae.encode_topk(x, W, k=1, features=torch.tensor([64]))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    for a, e in zip(pytree.tree_leaves(ours), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_transposed_view_gives_the_same_result(name: str) -> None:
    x, W, b = torch.randint(-3, 4, (6, 5)).float(), torch.randint(-3, 4, (8, 5)).float(), torch.randint(-1, 2, (8,)).float()
    view = W.T.contiguous().T.requires_grad_()
    ours, expected = ENCODERS[name](x, view, b), ENCODERS[name](x, W, b)
    for a, e in zip(pytree.tree_leaves(ours), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(a, e)
    (grad,) = torch.autograd.grad(ours.values.sum(), [view])
    assert grad.stride() == view.stride()


class StraightThrough(torch.autograd.Function):
    """(JumpReLU(z), its step) in plain torch, with the straight-through gradients of ``encode_threshold``."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, e: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z, theta)
        ctx.e = e
        return z * (z > theta), (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, dstep: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, theta = ctx.saved_tensors
        band = ((z - theta).abs() < ctx.e / 2).to(z.dtype)
        return grad * (z > theta), (-(theta * grad + dstep) / ctx.e * band).sum(0), None


def test_second_derivatives_of_the_straight_through_gradient() -> None:
    x, W, W_dec, theta = draw(5, 4), draw(9, 4), draw(9, 4), draw(9).abs()

    def ours(x: Tensor, W: Tensor, W_dec: Tensor, theta: Tensor) -> Tensor:
        latents, l0 = fastsae.encode_threshold(x, W, threshold=theta, bandwidth=0.5)
        return (fastsae.decode(latents, W_dec) - x).square().sum() + (l0 * x[:, 0]).sum()

    def plain(x: Tensor, W: Tensor, W_dec: Tensor, theta: Tensor) -> Tensor:
        z, step = StraightThrough.apply(x @ W.T, theta, 0.5)  # pyright: ignore[reportGeneralTypeIssues]
        return (z @ W_dec - x).square().sum() + (step.sum(1) * x[:, 0]).sum()

    results = []
    for function in (ours, plain):
        leaves = [t.double().detach().requires_grad_() for t in (x, W, W_dec, theta)]
        first = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
        results.append(torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_default_bias_and_half_precision_beside_a_float32_bias() -> None:
    x, W, b = draw(3, 8, dtype=torch.bfloat16), draw(9, 8, dtype=torch.bfloat16), draw(9, dtype=torch.float32)
    latents = fastsae.encode_topk(x, W, b, k=9, relu=False)
    assert latents.values.dtype is torch.bfloat16
    # The bias is added in float32 before the only rounding.
    assert torch.equal(latents.to_dense(), (x.float() @ W.float().T + b).bfloat16())
