"""What a small call costs is Python: its function calls are counted, where a time would be noise."""

import sys
from collections.abc import Callable

import pytest
import torch

import fastsae
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
@pytest.mark.parametrize(("name", "most"), [("encode", 100), ("packed", 120), ("decode", 92), ("forward", 255)])
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
