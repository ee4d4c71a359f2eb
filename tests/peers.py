"""The libraries that ``fastsae.accelerate`` is for, imported as they are; where one is not installed its tests are skipped, and say so."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from surroundings import surroundings
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastsae._activations_minilm import _checkout_hidden

# Read when they are imported: no network, and sparsify's decoder that runs on a CPU.
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "SPARSIFY_DISABLE_TRITON": "1"}


def load(module: str, distribution: str) -> Any:
    """The library, or a skip of the whole test module; an error where FASTSAE_REQUIRE_PEERS is 1 (``make test-peers``)."""
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)
    new = FakeTensor.__new__
    try:
        with _checkout_hidden(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        if os.environ.get("FASTSAE_REQUIRE_PEERS") == "1":
            raise
        said = f"NOT TESTED against the real {distribution}: {error} (make test-peers installs it)"
        warnings.warn(said, stacklevel=2)
        pytest.skip(said, allow_module_level=True)
    finally:
        FakeTensor.__new__ = new  # nnsight, which dictionary_learning imports, puts one there that breaks torch.compile


ROUNDING = 2e-6
"""Of the largest entry: sums of at most 96 float32 terms in another order, some 1e-7 where measured."""


def same(a: Tensor, b: Tensor, of: float = ROUNDING) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype and a.layout == b.layout
    if a.layout is not torch.strided:
        a, b = a.to_dense(), b.to_dense()
    assert float((a.detach() - b.detach()).abs().max()) <= of * max(float(b.detach().abs().max()), 1e-6)


def same_gradients(a: Any, b: Any) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            same(p.grad, q.grad)


def second_derivatives(module: Any, function: Any, x: Tensor) -> list[Tensor]:
    """The gradients of a penalty on all first gradients of ``function(module, x)``: of x and of every parameter."""
    leaves = [x.clone().requires_grad_(), *module.parameters()]
    first = torch.autograd.grad(function(module, leaves[0]).square().sum(), leaves, create_graph=True, allow_unused=True)
    penalty = torch.stack([g.square().sum() for g in first if g is not None]).sum()
    return list(torch.autograd.grad(penalty, leaves, materialize_grads=True))


def works_under_settings(make: Callable[[bool], Any], use: Callable[[Any], list[Tensor]]) -> None:
    """``use`` of ``make(accelerated)`` gives under other defaults of torch what it gives of the library's own object there."""
    for name in ("default device", "with device", "default torch.bfloat16", "default torch.float64", "deterministic"):
        results = []
        for accelerated in (True, False):
            made = make(accelerated)
            with surroundings([name]):
                results.append(use(made))
        for mine, theirs in zip(*results, strict=True):
            assert mine.device == theirs.device, name
            same(mine, theirs, 2e-5)
