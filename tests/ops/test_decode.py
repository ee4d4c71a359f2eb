"""Decode against a dense formulation: duplicates, zero slots, both forms of latents, prefixes, several decoders, skip, own buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastsae
from fastsae import RaggedLatents, TopKLatents, decode, reference
from fastsae.ops.decode import decode_backward


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def picks(high: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def topk(rows: int = 6, k: int = 4, features: int = 15, dtype: torch.dtype = torch.float64) -> TopKLatents:
    return TopKLatents(draw(rows, k, dtype=dtype).requires_grad_(), picks(features, rows, k), features)


def ragged(lengths: list[int], features: int = 15, dtype: torch.dtype = torch.float64) -> RaggedLatents:
    crow = torch.tensor([0, *lengths]).cumsum(0)
    return RaggedLatents(draw(sum(lengths), dtype=dtype).requires_grad_(), crow, picks(features, sum(lengths)), features, (len(lengths),))


def one_hot(latents: Any) -> Tensor:
    """``[slots, F]``, built without the library."""
    indices = latents.indices if isinstance(latents, TopKLatents) else latents.col
    return torch.nn.functional.one_hot(indices.reshape(-1).long(), latents.n_features).double()


def dense_code(latents: Any) -> Tensor:
    weighted = latents.values.reshape(-1, 1) * one_hot(latents).to(latents.values.dtype)
    if isinstance(latents, TopKLatents):
        return weighted.reshape(*latents.values.shape, latents.n_features).sum(-2)
    owner = torch.nn.functional.one_hot(torch.arange(len(latents.crow) - 1).repeat_interleave(latents.crow.diff()), len(latents.crow) - 1)
    return owner.to(weighted.dtype).T @ weighted


LATENTS = {
    "topk": lambda: topk(),
    "topk_one": lambda: topk(1, 1, 1),
    "many_slots": lambda: topk(3, 150, 15),
    "ragged": lambda: ragged([3, 0, 7, 1, 0]),
    "ragged_empty": lambda: ragged([0, 0]),
    "no_slots": lambda: topk(4, 0, 15),
    "no_rows": lambda: topk(0, 3, 15),
}


@pytest.mark.parametrize("name", LATENTS)
@pytest.mark.parametrize("transposed", [False, True])
def test_equals_the_dense_formulation(name: str, transposed: bool) -> None:
    latents = LATENTS[name]()
    W, b = draw(latents.n_features, 7, seed=2), draw(7, seed=3).requires_grad_()
    W = (W.T.contiguous().T if transposed else W).requires_grad_()
    ours, dense = decode(latents, W, b), dense_code(latents) @ W + b
    torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-12)
    weight = draw(*dense.shape, seed=4)
    got = torch.autograd.grad((ours * weight).sum(), [latents.values, W, b])
    want = torch.autograd.grad((dense * weight).sum(), [latents.values, W, b])
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    assert got[1].stride() == W.stride()


def test_duplicates_add_and_slots_of_value_zero_receive_gradients() -> None:
    W = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    values = torch.tensor([[1.0, 2.0, 0.0]]).requires_grad_()
    latents = TopKLatents(values, torch.tensor([[1, 1, 2]]), 3)
    y = decode(latents, W)
    assert y.tolist() == [[6.0, 60.0]]
    (grad,) = torch.autograd.grad(y.sum(), [values])
    assert grad.tolist() == [[22.0, 22.0, 33.0]]


def test_ragged_equals_topk() -> None:
    latents = topk(5, 3, dtype=torch.float32)
    same = RaggedLatents(latents.values.reshape(-1), torch.arange(0, 16, 3), latents.indices.reshape(-1), 15, (5,))
    W = draw(15, 40, seed=2, dtype=torch.float32)
    for backend in ("reference,*", "*"):
        torch.testing.assert_close(decode(latents, W, backend=backend), decode(same, W, backend=backend))


@pytest.mark.parametrize("kind", ["topk", "ragged"])
def test_prefixes_are_masked_decodes(kind: str) -> None:
    latents = LATENTS[kind]()
    W, b = draw(15, 7, seed=2).requires_grad_(), draw(7, seed=3).requires_grad_()
    prefixes = [1, 4, 11, 15]
    ours = decode(latents, W, b, prefixes=prefixes)
    code = dense_code(latents)
    dense = torch.stack([(code * (torch.arange(15) < size)) @ W + b for size in prefixes])
    torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-12)
    weight = draw(*dense.shape, seed=4)
    got = torch.autograd.grad((ours * weight).sum(), [latents.values, W, b])
    want = torch.autograd.grad((dense * weight).sum(), [latents.values, W, b])
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_a_prefix_of_everything_is_the_whole_decode() -> None:
    latents = topk()
    W = draw(15, 7, seed=2)
    torch.testing.assert_close(decode(latents, W, prefixes=[3, 15])[1], decode(latents, W), rtol=1e-12, atol=1e-12)
    assert decode(latents, W, prefixes=torch.tensor([3, 15])).shape == (2, 6, 7)


def test_several_decoders() -> None:
    latents = topk()
    W, b = draw(3, 15, 7, seed=2).requires_grad_(), draw(3, 7, seed=3).requires_grad_()
    ours = decode(latents, W, b)
    dense = torch.einsum("rf,lfd->rld", dense_code(latents), W) + b
    torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-12)
    weight = draw(*dense.shape, seed=4)
    got = torch.autograd.grad((ours * weight).sum(), [latents.values, W, b])
    want = torch.autograd.grad((dense * weight).sum(), [latents.values, W, b])
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    prefixed = decode(latents, W.detach(), prefixes=[4, 15])
    assert prefixed.shape == (2, 6, 3, 7)
    torch.testing.assert_close(prefixed[0, :, 1], decode(latents, W[1].detach(), prefixes=[4])[0])


def test_skip_connection() -> None:
    latents = topk()
    x, skip, W = draw(6, 5, seed=5).requires_grad_(), draw(7, 5, seed=6).requires_grad_(), draw(15, 7, seed=2)
    ours, dense = decode(latents, W, x=x, skip=skip), dense_code(latents) @ W + x @ skip.T
    torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-12)
    for a, e in zip(torch.autograd.grad(ours.square().sum(), [x, skip]), torch.autograd.grad(dense.square().sum(), [x, skip]), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    prefixed = decode(latents, W, x=x, skip=skip, prefixes=[4, 15])
    torch.testing.assert_close(prefixed[1], dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["topk", "ragged", "no_rows"])
@pytest.mark.parametrize("layout", ["none", "contiguous", "transposed", "strided"])
def test_backward_without_autograd(kind: str, layout: str) -> None:
    latents = LATENTS[kind]()
    W, b = draw(15, 7, seed=2).requires_grad_(), draw(7, seed=3).requires_grad_()
    buffers = {
        "none": None,
        "contiguous": torch.full((15, 7), torch.nan, dtype=torch.float64),
        "transposed": torch.full((7, 15), torch.nan, dtype=torch.float64).T,
        "strided": torch.full((30, 14), torch.nan, dtype=torch.float64)[::2, 1::2],
    }
    y = decode(latents, W, b)
    grad = draw(*y.shape, seed=4)
    want = torch.autograd.grad(y, [latents.values, W, b], grad)
    got = decode_backward(grad, latents, W, out=buffers[layout])
    if buffers[layout] is not None:
        assert got.weight is buffers[layout]
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
        assert not a.requires_grad
    assert got.values.shape == latents.values.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_own_buffer_gets_the_same_bits(dtype: torch.dtype) -> None:
    latents = TopKLatents(draw(50, 8, dtype=dtype), picks(40, 50, 8), 40)
    W, grad = draw(40, 33, seed=2, dtype=dtype), draw(50, 33, seed=3, dtype=dtype)
    fresh = decode_backward(grad, latents, W)
    contiguous, transposed = torch.full((40, 33), torch.nan, dtype=dtype), torch.full((33, 40), torch.nan, dtype=dtype).T
    assert torch.equal(decode_backward(grad, latents, W, out=contiguous).weight, fresh.weight)
    assert torch.equal(decode_backward(grad, latents, W, out=transposed).weight, fresh.weight)
    # A second step into the same buffer leaves nothing of the first.
    other = TopKLatents(latents.values[:1], latents.indices[:1], 40)
    assert torch.equal(decode_backward(grad[:1], other, W, out=contiguous).weight, decode_backward(grad[:1], other, W).weight)


def test_expanded_gradient() -> None:
    latents, W = topk(dtype=torch.float32), draw(15, 7, seed=2, dtype=torch.float32)
    ones = torch.ones(()).expand(6, 7)
    for a, e in zip(decode_backward(ones, latents, W), decode_backward(ones.contiguous(), latents, W), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,), (2, 0, 3)])
def test_batch_dimensions(batch: tuple[int, ...]) -> None:
    latents = TopKLatents(draw(*batch, 4).requires_grad_(), picks(15, *batch, 4), 15)
    W = draw(15, 7, seed=2)
    y = decode(latents, W)
    assert y.shape == (*batch, 7)
    assert decode(latents, W, prefixes=[2, 15]).shape == (2, *batch, 7)
    assert torch.autograd.grad(y.sum(), [latents.values])[0].shape == (*batch, 4)
    assert decode_backward(torch.ones(*batch, 7, dtype=torch.float64), latents, W).values.shape == (*batch, 4)
    flat = latents.values.reshape(-1)
    rows = flat.numel() // 4
    same = RaggedLatents(flat, torch.arange(0, 4 * rows + 1, 4), latents.indices.reshape(-1), 15, batch)
    torch.testing.assert_close(decode(same, W), y)


@pytest.mark.parametrize("elements", [1, 50, 400])
def test_integers_give_the_same_bits_whatever_the_tiles(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 9, (40,), generator=generator).tolist()
    W = torch.randint(-3, 4, (15, 7), generator=generator).float()
    for latents in (topk(40, 5, dtype=torch.float32), ragged(lengths, dtype=torch.float32)):
        values = (latents.values.detach() * 4).round()
        latents = type(latents)(**{**latents.__dict__, "values": values})
        grad = torch.randint(-3, 4, (40, 7), generator=generator).float()
        with fastsae.use_backend("reference"):
            whole = decode(latents, W), *decode_backward(grad, latents, W)
            with monkeypatch.context() as patched:
                patched.setattr(reference, "WORKSPACE_ELEMENTS", elements)
                tiled = decode(latents, W), *decode_backward(grad, latents, W)
        for a, b in zip(whole, tiled, strict=True):
            assert torch.equal(a, b)


@given(st.data())
def test_small_integers_are_exact(data: st.DataObject) -> None:
    """Sums of small integers are exact in every dtype and order."""
    rows, k, features, width = (
        data.draw(st.integers(0, high), label=name) for name, high in (("rows", 20), ("k", 9), ("features", 30), ("width", 70))
    )
    features += 1
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    values, grad = (torch.randint(-2, 3, shape, generator=generator) for shape in ((rows, k), (rows, width)))
    W = torch.randint(-2, 3, (features, width), generator=generator)
    indices = torch.randint(0, features, (rows, k), generator=generator)
    code = torch.zeros(rows, features, dtype=torch.int64).scatter_add_(1, indices, values)
    latents = TopKLatents(values.to(dtype), indices.to(data.draw(st.sampled_from([torch.int32, torch.int64]))), features)
    got = decode_backward(grad.to(dtype), latents, W.to(dtype))
    assert torch.equal(decode(latents, W.to(dtype)), (code @ W).to(dtype))
    # Sums are exact in float32; a half-precision result is that sum rounded once.
    assert torch.equal(got.weight, (code.T @ grad).to(dtype))
    assert torch.equal(got.values, (grad @ W.T).gather(1, indices).to(dtype))


def test_autocast_equals_rounded_inputs() -> None:
    latents, W, b = topk(dtype=torch.float32), draw(15, 70, seed=2, dtype=torch.float32), draw(70, seed=3, dtype=torch.float32)
    rounded = TopKLatents(latents.values.bfloat16(), latents.indices, 15)
    with torch.autocast("cpu", torch.bfloat16):
        ours = decode(latents, W, b)
    assert ours.dtype is torch.bfloat16
    assert torch.equal(ours, decode(rounded, W.bfloat16(), b.bfloat16()))


def test_gradients_of_an_encoded_and_decoded_batch_reach_every_parameter() -> None:
    W_enc, W_dec, b_enc, b_dec = (draw(*s, seed=i).requires_grad_() for i, s in enumerate(((15, 7), (15, 7), (15,), (7,))))
    x = draw(6, 7, seed=9)
    ours = decode(fastsae.encode_topk(x, W_enc, b_enc, k=4, b_pre=b_dec), W_dec, b_dec)
    scores = (x - b_dec) @ W_enc.T + b_enc
    top = scores.topk(4, dim=1)
    dense = torch.zeros_like(scores).scatter(1, top.indices, top.values.relu()) @ W_dec + b_dec
    leaves = [W_enc, W_dec, b_enc, b_dec]
    for a, e in zip(
        torch.autograd.grad((ours - x).square().sum(), leaves), torch.autograd.grad((dense - x).square().sum(), leaves), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)
