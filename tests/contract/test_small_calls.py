"""What a small call costs is Python: its function calls are counted, where a time would be noise."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastsae
from fastsae.dispatch import alone
from fastsae.native.loader import unavailable


def function_calls(call: Callable[[], object]) -> int:
    """Python functions entered and built-in ones called, after the first call has resolved what is resolved once."""
    call()
    seen = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal seen
        seen += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


@pytest.mark.skipif(unavailable() is not None, reason="counts the way to the compiled kernels")
@pytest.mark.parametrize(("name", "most"), [("encode", 51), ("packed", 66), ("decode", 46), ("forward", 128)])
def test_a_small_call_enters_few_functions(name: str, most: int) -> None:
    x, W = torch.randn(1, 64, device="cpu", dtype=torch.float32), torch.randn(512, 64, device="cpu", dtype=torch.float32)
    latents, handle = fastsae.encode_topk(x, W, k=8), fastsae.pack(W)
    sae = fastsae.SAE(64, 512, fastsae.TopK(8), device="cpu").eval()
    calls: dict[str, Callable[[], object]] = {
        "encode": lambda: fastsae.encode_topk(x, W, k=8),
        "packed": lambda: fastsae.encode_topk(x, handle, k=8),
        "decode": lambda: fastsae.decode(latents, W),
        "forward": lambda: sae(x),
    }
    with torch.no_grad():
        assert function_calls(calls[name]) <= most


QUICK: dict[str, Callable[[Any, torch.Tensor, torch.Tensor, str | None], Any]] = {
    "plain": lambda x, W, b, backend: fastsae.encode_topk(x, W, k=5, backend=backend),
    "all vectors": lambda x, W, b, backend: fastsae.encode_topk(x, W, b, k=5, b_pre=x[0], scale=b, relu=False, backend=backend),
    "transposed": lambda x, W, b, backend: fastsae.encode_topk(x.T.contiguous().T, W.T.contiguous().T, b, k=5, backend=backend),
    "a handle": lambda x, W, b, backend: fastsae.encode_topk(x, fastsae.pack(W), b, k=5, backend=backend),
    "strided vector": lambda x, W, b, backend: fastsae.encode_topk(x, W, torch.stack([b, b], 1)[:, 0], k=5, backend=backend),
    "no row": lambda x, W, b, backend: fastsae.encode_topk(x[:0], W, b, k=5, backend=backend),
    "k = F": lambda x, W, b, backend: fastsae.encode_topk(x, W[:5], b[:5], k=5, backend=backend),
}


@pytest.mark.skipif(unavailable() is not None, reason="compares the quick way to the compiled kernels with the long one")
@pytest.mark.parametrize("case", QUICK)
def test_the_quick_way_gives_the_same(case: str) -> None:
    g = torch.Generator().manual_seed(3)
    x, W, b = torch.randn(3, 20, generator=g), torch.randn(70, 20, generator=g), torch.randn(70, generator=g)
    quick, long = QUICK[case](x, W, b, None), QUICK[case](x, W, b, "cpu")
    assert torch.equal(quick.values, long.values) and torch.equal(quick.indices, long.indices) and quick.n_features == long.n_features
    W = W[: quick.n_features]
    for weights, bias in ((W, None), (W.T.contiguous().T, x[0])):
        assert torch.equal(fastsae.decode(quick, weights, bias), fastsae.decode(quick, weights, bias, backend="cpu"))


def test_who_listens_is_not_passed_by() -> None:
    x, W = torch.randn(2, 20, device="cpu", dtype=torch.float32), torch.randn(70, 20, device="cpu", dtype=torch.float32)
    leaf = W.clone().requires_grad_()
    latents = fastsae.encode_topk(x, leaf, k=5)
    assert latents.values.requires_grad and fastsae.decode(latents.detach(), leaf).requires_grad
    assert not alone(x, leaf) and not alone(x, W.double()) and not alone(x, W, W.half())
    with torch.no_grad():
        assert alone(x, leaf) and alone(x, W, None)
        assert len(fastsae.explain(fastsae.encode_topk, x, leaf, k=5).choices) == 1
    with fastsae.use_backend("reference"):
        assert not alone(x, W)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastsae.encode_topk(x, W, k=5).values.dtype is torch.bfloat16
