"""``resample`` against Bricken et al. 2023, word by word, with fused and torch's optimisers, alone and in a stack."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sae_cases import KINDS, build
from torch import Tensor

from fastsae import SAE, AbsTopK, Gated, JumpReLU, ReLU, SAEs, TopK, optim
from fastsae.sae import resample
from fastsae.trainer import Trainer

D, F = 7, 20
DEAD = torch.arange(F) % 4 == 1


def draw(*shape: int, seed: int = 9) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stepped(sae: SAE, fused: bool, x: Tensor) -> Any:
    opt = optim.Adam(sae, lr=1e-3) if fused else torch.optim.Adam(sae.parameters(), lr=1e-3)
    Trainer(sae, opt, progress=False).fit([x], 2)
    return opt


def moments(opt: Any, p: Tensor) -> list[Tensor]:
    return [buffer for buffer in opt.state[p].values() if isinstance(buffer, Tensor) and buffer.shape == p.shape]


@pytest.mark.parametrize(("kind", "fused"), [*((kind, True) for kind in KINDS), ("jumprelu", False), ("gated", False)])
def test_what_becomes_of_each_tensor(kind: str, fused: bool) -> None:
    sae, x = build(kind, l1=0.1), draw(64, D)
    opt = stepped(sae, fused, x)
    sae.silent.fill_(3)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    before_moments = {name: [b.clone() for b in moments(opt, p)] for name, p in sae.named_parameters()}
    done = resample(sae, opt, x, dead=DEAD, generator=seeded())
    assert torch.equal(done, DEAD)
    for name, tensor in sae.state_dict().items():
        if tensor.dim() and tensor.shape[0] == F:
            assert torch.equal(tensor[~DEAD], before[name][~DEAD]), name
        else:
            assert torch.equal(tensor, before[name]), name
    assert not sae.silent[DEAD].any()
    unit = x / x.norm(dim=1, keepdim=True)
    nearest = (sae.W_dec.detach()[DEAD] @ unit.T).max(1)
    torch.testing.assert_close(nearest.values, torch.ones(int(DEAD.sum())))
    share = 0.2 * before["W_enc"][~DEAD].norm(dim=1).mean()
    torch.testing.assert_close(sae.W_enc.detach()[DEAD], unit[nearest.indices] * share)
    start = sae.activation.threshold if isinstance(sae.activation, JumpReLU) else 0.0
    for name, p in sae.named_parameters():
        if p.dim() == 1 and len(p) == F:
            want = start if name == "threshold" else 0.0
            assert torch.equal(p[DEAD], torch.as_tensor(want).expand(F)[DEAD]), name
        for old, new in zip(before_moments[name], moments(opt, p), strict=True):
            if name == "b_dec":
                assert torch.equal(new, old)
            else:
                assert not new[DEAD].any() and torch.equal(new[~DEAD], old[~DEAD])
    Trainer(sae, opt, progress=False).fit([x], 3)  # and training goes on


def test_rows_are_drawn_by_the_square_of_their_loss() -> None:
    sae, x = SAE(D, 4000, ReLU(), l1=0.3, seed=0), draw(6, D) * torch.tensor([0.3, 1, 2, 0, 3, 1.5])[:, None]
    with torch.no_grad():
        sae.W_dec.mul_(1.5)
        run = sae(x)
        loss = run.squared_error + 0.3 * run.latents.to_dense() @ sae.W_dec.norm(dim=1)
    loss[3] = 0  # a row of zeros has no direction
    p = loss.double().square() / loss.double().square().sum()
    resample(sae, None, x, dead=torch.ones(4000, dtype=torch.bool), generator=seeded())
    unit = x / x.norm(dim=1, keepdim=True).clamp_min(1e-9)
    seen = torch.bincount((sae.W_dec.detach() @ unit.T).argmax(1), minlength=6) / 4000
    assert float(((seen - p) / (p * (1 - p) / 4000 + 1e-9).sqrt()).abs().max()) < 5  # deviations of a binomial
    assert seen[3] == 0


def test_deterministic_in_a_stack_as_alone() -> None:
    x, generator = draw(40, D), seeded()
    alone = [build("topk", dead_after=1) for _ in range(3)]
    for number, sae in enumerate(alone):
        sae.silent[number :: number + 2] = 5
    saes = SAEs(copy.deepcopy(alone))
    opt = optim.Adam(saes, lr=1e-3)
    opt.apply({name: torch.ones_like(p) for name, p in saes.named_parameters()})
    with torch.no_grad():
        for name, p in saes.named_parameters():
            p.copy_(torch.stack([sae.get_parameter(name) for sae in alone]))
    done = resample(saes, opt, x, generator=seeded())
    for sae, other, own in zip(alone, saes, done, strict=True):
        assert torch.equal(resample(sae, None, x, generator=generator), own)
        assert all(torch.equal(t, other.state_dict()[name]) for name, t in sae.state_dict().items())
    for name, p in saes.named_parameters():
        held = opt.state[p]["exp_avg"]
        assert bool(held.any()) and (name == "b_dec" or not held[done].any())
    assert not resample(saes, opt, x.expand(3, -1, -1), generator=generator).any()


def test_tied_transcoders_scaled_rows_half_precision_and_frozen() -> None:
    x, target = draw(30, D), draw(30, 5, seed=2)
    for options in ({"tied": True}, {"d_out": 5, "skip": True}, {"normalise_rows": "layer_norm"}):
        sae = SAE(D, F, AbsTopK(3), seed=1, **options)  # pyright: ignore[reportArgumentType]
        wanted = target if sae.transcoder else None
        resample(sae, None, x, wanted, dead=DEAD, generator=seeded())
        out = sae.encoder_rows(x) if wanted is None else wanted
        cosines = torch.nn.functional.normalize(sae.W_dec.detach()[DEAD], dim=1) @ torch.nn.functional.normalize(out, dim=1).T
        torch.testing.assert_close(cosines.max(1).values, torch.ones(int(DEAD.sum())))
        torch.testing.assert_close(sae.W_dec.detach()[DEAD].norm(dim=1), torch.ones(int(DEAD.sum())))
    sae = SAE(D, F, Gated(), seed=1, dtype=torch.bfloat16)
    opt = optim.Adam(sae, lr=1e-3)
    opt.step(x.bfloat16())
    resample(sae, opt, x.bfloat16(), dead=DEAD, generator=seeded())
    rows = sae.W_dec.detach().clone()
    opt.step(x.bfloat16())
    assert float((sae.W_dec.detach()[DEAD] - rows[DEAD]).abs().max()) < 0.02  # from the new rows, not from the master copy of the old
    sae = SAE(D, F, TopK(3), seed=1)
    sae.W_enc.requires_grad_(False)
    before = sae.W_enc.clone()
    resample(sae, None, x, dead=DEAD, generator=seeded())
    assert torch.equal(sae.W_enc, before)


def test_edges_and_errors() -> None:
    sae, x = SAE(D, F, TopK(3), seed=0), draw(10, D)
    state = copy.deepcopy(sae.state_dict())
    assert not resample(sae, None, x).any()
    assert not resample(sae, None, torch.zeros(4, D), dead=DEAD).any()  # nothing to learn from
    assert all(torch.equal(t, state[name]) for name, t in sae.state_dict().items())
    assert resample(sae, None, x, dead=torch.ones(F, dtype=torch.bool)).all()
    for bad, error, message in (
        ({"x": x[:0]}, ValueError, "at least one token that counts"),
        ({"x": x.clone().fill_(torch.nan)}, ValueError, "not finite"),
        ({"dead": DEAD[:3]}, ValueError, r"dead must have shape \[20\]"),
        ({"dead": DEAD.int()}, TypeError, "dead must have dtype bool"),
        ({"mask": torch.zeros(10, dtype=torch.bool)}, ValueError, "at least one token that counts"),
        ({"opt": optim.Adam(SAE(D, F, TopK(3)), lr=1e-3)}, ValueError, "opt must step parameters of sae"),
        ({"share": 0.0}, ValueError, "share must be"),
        ({"sae": sae.W_enc}, TypeError, "sae must be an SAE or SAEs"),
    ):
        with pytest.raises(error, match=message):
            resample(**{"sae": sae, "opt": None, "x": x, **bad})  # pyright: ignore[reportArgumentType]
