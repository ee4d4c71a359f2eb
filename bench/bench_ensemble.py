"""One step of E ReLU + L1 dictionaries in one call, beside E steps of single SAEs and plain torch's batched products with fused Adam.

The toy sweeps' sizes (E, B, D, F): data of 512 planted features, 5 active in a row. "trained": few latents fire (a bias below 0), "start":
half of them do, as at initialisation. Then a sweep, whose dictionaries of one size train together, beside the same dictionaries one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastsae
from bench.harness import DEVICE, shapes, unit_rows
from bench.training import step_unit_rows
from fastsae.superposition import Run, SuperpositionData, Training, train_dictionary, train_many

SHAPES = shapes([(17, 256, 256, 128), (17, 256, 256, 512), (17, 256, 256, 2048)], [(3, 32, 16, 64)])
SWEEPS = shapes([(5, 128, 64, 50), (5, 128, 512, 50)], [(2, 16, 24, 10)])


def plain(saes: fastsae.SAEs, l1: Tensor, lr: float) -> tuple[Callable[[Tensor], None], Tensor]:
    """The same loss and step by ``torch.baddbmm`` under autograd, and its ``W_dec``."""
    W_enc, b_enc, W_dec, b_dec = (p.detach().clone().requires_grad_() for p in (saes.W_enc, saes.b_enc, saes.W_dec, saes.b_dec))
    opt = torch.optim.Adam([W_enc, b_enc, W_dec, b_dec], lr=lr, fused=True)

    def step(x: Tensor) -> None:
        z = torch.baddbmm(b_enc.unsqueeze(1), x - b_dec.unsqueeze(1), W_enc.transpose(1, 2)).relu()
        y = torch.baddbmm(b_dec.unsqueeze(1), z, W_dec)
        penalty = (z * torch.linalg.vector_norm(W_dec, dim=2).unsqueeze(1)).sum((1, 2))
        (((y - x).square().sum((1, 2)) + l1 * penalty) / x.shape[0]).sum().backward()
        step_unit_rows(opt, W_dec)

    return step, W_dec


@pytest.mark.parametrize("phase", ["start", "trained"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "E{} B{} D{} F{}".format(*shape))
def test_ensemble(shape: tuple[int, ...], phase: str, compare: Callable[..., None]) -> None:
    members, rows, width, features = shape
    generator = torch.Generator().manual_seed(0)
    latents = (torch.rand(rows, 512, generator=generator) < 5 / 512) * torch.rand(rows, 512, generator=generator)
    x = latents.to(DEVICE) @ unit_rows(512, width)
    rates = torch.logspace(-3, -1, members).tolist()
    single = [fastsae.SAE(width, features, fastsae.ReLU(), l1=l1, seed=seed, device=DEVICE) for seed, l1 in enumerate(rates)]
    with torch.no_grad():
        for sae in single:
            sae.b_enc.fill_(-0.15 if phase == "trained" else 0)
    lr = 1e-6  # the latents' density stays what it is while the clock runs
    saes = fastsae.SAEs(copy.deepcopy(single))
    opt = fastsae.optim.Adam(saes, lr=lr)
    opts = [fastsae.optim.Adam(sae, lr=lr) for sae in single]
    theirs, W_dec = plain(saes, torch.tensor(rates, device=DEVICE), lr)

    def one_by_one() -> None:
        for each in opts:
            each.step(x)

    def verify() -> None:
        opt.step(x)
        one_by_one()
        theirs(x)
        if not all(torch.equal(sae.W_dec, member.W_dec) for sae, member in zip(single, saes)):
            raise AssertionError("a member's bits differ from those of the SAE alone")
        # At the first step m / sqrt(v) is the sign of a gradient, rounding included where it cancels.
        off = (saes.W_dec - W_dec).abs() > 1e-3 * lr + 1e-7
        if float(off.double().mean()) > 1e-2:
            raise AssertionError(f"{int(off.sum())} of {off.numel()} weights differ from plain torch's after one step")

    others = {"E single steps": one_by_one, "plain torch, baddbmm, fused Adam": lambda: theirs(x)}
    compare(f"ensemble {phase}", "E{} B{} D{} F{}".format(*shape), lambda: opt.step(x), others, verify)


@pytest.mark.seconds(28)
@pytest.mark.parametrize("shape", SWEEPS, ids=lambda shape: "E{} D{} F{} steps{}".format(*shape))
def test_sweep(shape: tuple[int, ...], compare: Callable[..., None]) -> None:
    members, width, features, steps = shape
    data = SuperpositionData.preset("hoagy_correlated", n_features=2 * width, d=width, rate=0.98, mean_active=5.0, seed=0)
    rates = torch.logspace(-1.5, 0, members).tolist()

    def together() -> list[Run]:
        return train_many(data, l1=rates, n_features=features, stop=steps)

    def one_by_one() -> list[Run]:
        return [train_dictionary(copy.deepcopy(data), l1, features, training=Training(stop=steps)) for l1 in rates]

    def verify() -> None:
        if not all(torch.equal(a.dictionary, b.dictionary) for a, b in zip(together(), one_by_one(), strict=True)):
            raise AssertionError("a dictionary's bits differ from those of the same one trained alone")

    compare("sweep", "E{} D{} F{} steps{}".format(*shape), together, {"one by one": one_by_one}, verify)
