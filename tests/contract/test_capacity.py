"""Ragged encoders with a capacity: the latents, gradients and reconstructions of those without, in a fixed number of slots.

The contract suite checks results with a capacity on every backend (samples of the three operations); here is what stands around them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from triton_marks import interpreted, usable

import fastsae
from fastsae import RaggedLatents
from fastsae._core import flags
from fastsae.latents import EMPTY_A_ROW, pointers
from fastsae.native import loader

ROWS, D, F = 9, 12, 70
ROOM = 3 * EMPTY_A_ROW + 5


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, W, W_DEC, BIAS, SCALE = draw(ROWS, D, seed=1), draw(F, D, seed=2), draw(F, D, seed=3), draw(F, seed=4), 1 + draw(F, seed=5).abs()
THETA = draw(F, seed=6).abs()
Encode = Callable[..., Any]
ENCODERS: dict[str, Encode] = {
    "threshold": lambda x, W, b, s, t, **more: fastsae.encode_threshold(x, W, b, scale=s, b_pre=x.new_ones(D), threshold=t, **more),
    "bandwidth": lambda x, W, b, s, t, **more: fastsae.encode_threshold(x, W, b, scale=s, threshold=t, bandwidth=0.7, **more),
    "batch_topk": lambda x, W, b, s, t, **more: fastsae.encode_batch_topk(x, W, b, scale=s, k=3.5, **more)[0],
    "gated": lambda x, W, b, s, t, **more: fastsae.encode_gated(x, W, b_gate=b, r_mag=s / 4, b_mag=t, **more),
}
BACKENDS = ["reference", "cpu"]


def serves(backend: str) -> None:
    if backend == "cpu" and loader.unavailable() is not None:
        pytest.skip(str(loader.unavailable()))


def inputs() -> list[Tensor]:
    return [t.clone().requires_grad_() for t in (X, W, BIAS, SCALE, THETA, W_DEC)]


def encoded(name: str, leaves: list[Tensor], **more: Any) -> tuple[RaggedLatents, Tensor | None]:
    result = ENCODERS[name](*leaves[:5], **more)
    return result if isinstance(result, tuple) else (result, None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ENCODERS)
def test_the_same_latents_and_gradients(name: str, backend: str) -> None:
    serves(backend)
    results = []
    for capacity in (None, ROOM):
        leaves = inputs()
        latents, l0 = encoded(name, leaves, capacity=capacity, backend=backend)
        y = fastsae.decode(latents, leaves[5], backend=backend)
        prefixes = fastsae.decode(latents, leaves[5], prefixes=[20, F], backend=backend)
        loss = (y * draw(ROWS, D, seed=7)).sum() + prefixes.square().sum() + latents.values.sum()
        if l0 is not None:
            loss = loss + (l0 * draw(ROWS, seed=8)).sum()
        results.append((latents, y, prefixes, l0, torch.autograd.grad(loss, leaves, allow_unused=True)))
    (plain, y, prefixes, l0, grads), (padded, *others) = results
    assert padded.padded
    assert not plain.padded
    n = plain.values.shape[0]
    assert 0 < n < ROOM - EMPTY_A_ROW
    assert padded.values.shape == padded.col.shape == (ROOM,)
    assert torch.equal(padded.crow, plain.crow)
    assert not padded.values[n:].any()
    assert not padded.col[n:].any()
    for latents in (padded.trim(), padded.rows(slice(None))):
        assert not latents.padded
        assert torch.equal(latents.values, plain.values)
        assert torch.equal(latents.col, plain.col)
    assert plain.trim() is plain
    assert torch.equal(y, others[0])
    assert torch.equal(prefixes, others[1])
    assert l0 is None or torch.equal(l0, others[2])
    for mine, want in zip(others[3], grads, strict=True):
        assert (mine is None) == (want is None)
        if want is not None:  # the same sums, with zeros among them
            torch.testing.assert_close(mine, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [slice(0, 0), slice(2, 5)])
def test_views_of_padded_latents(rows: slice) -> None:
    plain, padded = (fastsae.encode_threshold(X, W, capacity=capacity) for capacity in (None, ROOM))
    assert torch.equal(padded.to_dense(), plain.to_dense())
    for view in ("to_csr", "to_csc"):
        a, b = getattr(plain, view)(), getattr(padded, view)()
        assert torch.equal(a.values(), b.values())
        assert torch.equal(a.to_dense(), b.to_dense())
    assert torch.equal(padded.rows(rows).values, plain.rows(rows).values)
    leaves, spec = pytree.tree_flatten(padded)
    assert pytree.tree_unflatten(leaves, spec).padded
    assert fastsae.encode_threshold(X.reshape(3, 3, D), W, capacity=ROOM).trim().batch_shape == (3, 3)


def test_decode_backward_of_padded_latents() -> None:
    plain, padded = (fastsae.encode_threshold(X, W, capacity=capacity) for capacity in (None, ROOM))
    grad = draw(ROWS, D, seed=9)
    want, got = (fastsae.ops.decode.decode_backward(grad, latents, W_DEC) for latents in (plain, padded))
    n = plain.values.shape[0]
    assert got.values.shape == (ROOM,)
    assert torch.equal(got.values[:n], want.values)
    assert not got.values[n:].any()
    torch.testing.assert_close(got.weight, want.weight, rtol=1e-6, atol=1e-6)
    assert torch.equal(got.bias, want.bias)


@pytest.mark.parametrize("n_slots", [0, 1, EMPTY_A_ROW, ROOM])
def test_pointers_give_every_slot_a_row(n_slots: int) -> None:
    for last in {0, min(3, n_slots), n_slots}:
        rows = pointers(torch.tensor([0, 0, last]), n_slots)
        assert rows[:3].tolist() == [0, 0, last]
        assert int(rows[-1]) == n_slots
        assert bool((rows.diff()[2:] >= 0).all())
        assert bool((rows.diff()[2:] <= EMPTY_A_ROW).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ENCODERS)
def test_too_small(name: str, backend: str) -> None:
    serves(backend)
    n = encoded(name, inputs(), backend=backend)[0].values.shape[0]
    assert encoded(name, inputs(), backend=backend, capacity=n)[0].values.shape[0] == n
    with pytest.raises(ValueError, match=rf"capacity must be at least the number of latents \({n}\), got {n - 1}"):
        encoded(name, inputs(), backend=backend, capacity=n - 1)
    for wrong, error in ((0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match=r"encode_\w+: capacity must be"):
            encoded(name, inputs(), capacity=wrong)


def test_check_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: an overflow is flagged, once; a bad index comes first."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(flags, "_flags", {})
    flags.flag(cpu)
    fastsae.check()
    flags.overflow(cpu).fill_(1)
    with pytest.raises(ValueError, match=r"capacity was too small .* on cpu"):
        fastsae.check()
    fastsae.check()
    flags.overflow(cpu).fill_(1)
    flags.flag(cpu).fill_(1)
    with pytest.raises(IndexError):
        fastsae.check()
    fastsae.check()


@pytest.mark.parametrize("name", ENCODERS)
def test_compiles_with_fixed_shapes(name: str) -> None:
    def run(*leaves: Tensor) -> Tensor:
        return fastsae.decode(encoded(name, list(leaves), capacity=ROOM)[0], leaves[5]).square().sum()

    torch._dynamo.reset()
    fast = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=False)
    for leaves, other in ((inputs(), inputs()),):
        want = cast("tuple[Tensor | None, ...]", torch.autograd.grad(run(*leaves), leaves, allow_unused=True))
        got = cast("tuple[Tensor | None, ...]", torch.autograd.grad(fast(*other), other, allow_unused=True))
        for a, b in zip(want, got, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b)


# ---------------------------------------------------------------- Triton


@interpreted
@usable
@pytest.mark.parametrize(("name", "dtype"), [("bandwidth", torch.float32), ("batch_topk", torch.float32), ("gated", torch.float16)])
def test_triton_leaves_out_what_does_not_fit(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where nothing is raised: whole words are left out, nothing is written elsewhere, and the flag is set."""
    from fastsae.kernels import encode

    leaves = [t.detach().to(dtype) for t in inputs()]
    with pytest.raises(ValueError, match="capacity must be at least"):
        encoded(name, leaves, backend="triton", capacity=11)
    seen: list[bool] = []
    monkeypatch.setattr(encode, "_note_overflow", lambda op, count, capacity: seen.append(bool(count > capacity)))
    whole = encoded(name, leaves, backend="triton")[0]
    capacity = whole.values.shape[0] // 2
    latents = encoded(name, leaves, backend="triton", capacity=capacity)[0]
    assert latents.values.shape == (capacity,)
    assert int(latents.crow[-1]) <= capacity
    assert bool((latents.crow.diff() >= 0).all())
    if name != "batch_topk":  # it ranks what fitted
        written = (latents.values != 0) | (latents.col != 0)
        assert torch.equal(latents.values[written], whole.values[:capacity][written])
        assert torch.equal(latents.col[written], whole.col[:capacity][written])
    assert bool(fastsae.decode(latents, leaves[5]).isfinite().all())
    assert seen == [True]
