"""``reconstruct`` is the composition of an encoder and ``decode``, in tiles of rows where latents are not asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import fastsae
from fastsae import AbsTopK, BatchTopK, Gated, JumpReLU, ReLU, TopK, reconstruct
from fastsae.sae import reconstruction as module


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def arguments(d_out: int = 6) -> dict[str, Any]:
    return {
        "x": draw(11, 6),
        "W_enc": draw(20, 6, seed=1),
        "W_dec": draw(20, d_out, seed=2),
        "b_dec": draw(d_out, seed=3),
        "b_pre": draw(6, seed=4),
    }


GATES = {name: draw(20, seed=seed) for seed, name in ((5, "b_gate"), (6, "r_mag"), (7, "b_mag"))}
ACTIVATIONS = [
    TopK(3),
    TopK(4, relu=False),
    AbsTopK(4),
    BatchTopK(2.5),
    ReLU(),
    JumpReLU(0.3),
    JumpReLU(draw(20, seed=8), bandwidth=0.5),
    Gated(**GATES),
]


def encode_by_hand(activation: Any, x: Tensor, W: Tensor, b: Tensor | None, b_pre: Tensor) -> Any:
    match activation:
        case TopK():
            rule = {"relu": activation.relu, "absolute": activation.absolute}
            return fastsae.encode_topk(x, W, b, k=activation.k, b_pre=b_pre, **rule)
        case BatchTopK():
            return fastsae.encode_batch_topk(x, W, b, k=activation.k, b_pre=b_pre)[0]
        case ReLU():
            return fastsae.encode_threshold(x, W, b, b_pre=b_pre)
        case JumpReLU(bandwidth=None):
            return fastsae.encode_threshold(x, W, b, threshold=activation.threshold, b_pre=b_pre)
        case JumpReLU():
            assert activation.bandwidth is not None
            return fastsae.encode_threshold(x, W, b, threshold=activation.threshold, bandwidth=activation.bandwidth, b_pre=b_pre)[0]
        case _:
            return fastsae.encode_gated(x, W, **GATES, b_pre=b_pre)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: type(a).__name__)
def test_is_the_composition(activation: Any) -> None:
    a = arguments()
    b_enc = None if isinstance(activation, Gated) else draw(20, seed=9)
    result = reconstruct(**a, b_enc=b_enc, activation=activation)
    latents = encode_by_hand(activation, a["x"], a["W_enc"], b_enc, a["b_pre"])
    x_hat = fastsae.decode(latents, a["W_dec"], a["b_dec"])
    for got, want in zip(pytree.tree_leaves(result.latents), pytree.tree_leaves(latents), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(result.x_hat, x_hat)
    torch.testing.assert_close(result.squared_error, (x_hat - a["x"]).square().sum(1))


@pytest.mark.parametrize("rows", [1, 4, 5, 100])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: type(a).__name__)
def test_tiles_of_rows_without_latents(monkeypatch: pytest.MonkeyPatch, activation: Any, rows: int) -> None:
    a = arguments()
    a["x"] = a["x"][:10].reshape(2, 5, 6)
    whole = reconstruct(**a, activation=activation)
    monkeypatch.setattr(module, "_ROWS", rows)
    tiled = reconstruct(**a, activation=activation, return_latents=False)
    assert tiled.latents is None
    # float64: torch's own products may sum in another order for another number of rows.
    torch.testing.assert_close(tiled.x_hat, whole.x_hat, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(tiled.squared_error, whole.squared_error, rtol=1e-12, atol=1e-12)
    assert tiled.squared_error.shape == (2, 5)


@pytest.mark.parametrize("return_latents", [True, False])
def test_transcoder(return_latents: bool) -> None:
    a = arguments(d_out=9)
    target, skip = draw(11, 9, seed=10), draw(9, 6, seed=11)
    result = reconstruct(**a, activation=TopK(3), target=target, skip=skip, return_latents=return_latents)
    latents = fastsae.encode_topk(a["x"], a["W_enc"], k=3, b_pre=a["b_pre"])
    expected = latents.to_dense() @ a["W_dec"] + a["b_dec"] + a["x"] @ skip.T
    torch.testing.assert_close(result.x_hat, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.squared_error, (expected - target).square().sum(1), rtol=1e-12, atol=1e-12)


def test_scale_reaches_the_encoder() -> None:
    a, scale = arguments(), draw(20, seed=12)
    result = reconstruct(**a, activation=TopK(3), scale=scale)
    latents = fastsae.encode_topk(a["x"], a["W_enc"], k=3, b_pre=a["b_pre"], scale=scale)
    assert result.latents is not None
    assert torch.equal(result.latents.values, latents.values)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("return_latents", [True, False])
def test_gradients_flow_through_everything(activation: Any, return_latents: bool) -> None:
    a = {name: tensor.requires_grad_() for name, tensor in arguments().items()}
    result = reconstruct(**a, activation=activation, return_latents=return_latents)
    grads = torch.autograd.grad(result.x_hat.sum() + result.squared_error.sum(), list(a.values()))
    latents = encode_by_hand(activation, a["x"], a["W_enc"], None, a["b_pre"])
    x_hat = fastsae.decode(latents, a["W_dec"], a["b_dec"])
    expected = torch.autograd.grad(x_hat.sum() + (x_hat - a["x"]).square().sum(), list(a.values()))
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [(), (0,), (2, 0), (3,), (2, 3)])
@pytest.mark.parametrize("return_latents", [True, False])
def test_batch_dimensions(batch: tuple[int, ...], return_latents: bool) -> None:
    a = {**arguments(), "x": draw(*batch, 6)}
    result = reconstruct(**a, activation=TopK(3), return_latents=return_latents)
    assert result.x_hat.shape == (*batch, 6)
    assert result.squared_error.shape == batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    a = {name: tensor.to(dtype) for name, tensor in arguments().items()}
    result = reconstruct(**a, activation=TopK(3))
    assert result.x_hat.dtype is dtype
    assert result.squared_error.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    # The error of a half-precision reconstruction is that of the values returned, summed in float32.
    torch.testing.assert_close(result.squared_error, (result.x_hat.to(result.squared_error.dtype) - a["x"]).square().sum(1))


def test_squared_error_is_zero_for_a_perfect_dictionary() -> None:
    x = torch.eye(5) * 3
    result = reconstruct(x, torch.eye(5), torch.eye(5), activation=TopK(1))
    assert result.squared_error.tolist() == [0.0] * 5


def test_autocast() -> None:
    a = {name: tensor.float() for name, tensor in arguments().items()}
    with torch.autocast("cpu", torch.bfloat16):
        result = reconstruct(**a, activation=TopK(3))
    expected = reconstruct(**{name: tensor.bfloat16() for name, tensor in a.items()}, activation=TopK(3), target=a["x"])
    assert torch.equal(result.x_hat, expected.x_hat)
    assert torch.equal(result.squared_error, expected.squared_error)
