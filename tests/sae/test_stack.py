"""Stacked dictionaries: a member's bits are those of the same SAE trained alone; members, files and errors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsae import SAE, AuxK, BatchTopK, Gated, JumpReLU, ReLU, SAEs, TopK, Trainer, load_checkpoint, save_checkpoint
from fastsae.gradients import StackedGradient, accumulate, densify
from fastsae.optim import Adam

D, F, B, E = 12, 40, 30, 3
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "relu": (ReLU(), {"dense": False}),
    "relu_tiles": (ReLU(), {"dense": True}),
    "relu_chosen": (ReLU(), {}),  # tiles at the start
    "jumprelu": (JumpReLU(0.3, bandwidth=0.5), {"l0": 0.1, "dense": False}),
    "jumprelu_tiles": (JumpReLU(0.3, bandwidth=0.5), {"l0": 0.1, "dense": True}),
    "topk": (TopK(4), {}),
    "topk_fvu": (TopK(4), {"objective": "fvu"}),
    "tied": (TopK(4), {"tied": True}),
    "transcoder": (TopK(4), {"d_out": 7}),
    "skip": (TopK(4), {"d_out": 7, "skip": True}),
    "batchtopk": (BatchTopK(3.5), {}),
    "gated": (Gated(), {"dense": False}),
    "gated_tiles": (Gated(), {"dense": True}),
    "tied_tiles": (ReLU(), {"tied": True, "dense": True}),
    "matryoshka": (TopK(4), {"prefixes": [10, F]}),
    "aux": (TopK(4), {"aux": AuxK(5), "dead_after": 10}),
}
WAYS = {"shared": (False, 1e-2, None), "own_rows": (True, 1e-2, None), "own_rates": (False, [1e-2, 3e-3, 1e-3], 0.5)}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def singles(kind: str) -> list[SAE]:
    activation, options = KINDS[kind]
    penalised = isinstance(activation, (ReLU, Gated))
    return [SAE(D, F, activation, l1=0.02 * (e + 1) if penalised else 0.0, seed=e, **options) for e in range(E)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_member_has_the_bits_of_the_sae_alone(kind: str, way: str) -> None:
    own_rows, lr, clip = WAYS[way]
    alone = singles(kind)
    saes = SAEs(copy.deepcopy(alone))
    opt = Adam(saes, lr=lr, clip=clip)
    opts = [Adam(sae, lr=lr[e] if isinstance(lr, list) else lr, clip=clip) for e, sae in enumerate(alone)]
    lead = (E,) if own_rows else ()
    for step in range(3):
        x = normal(*lead, B, D, seed=step)
        target = normal(*lead, B, 7, seed=step + 10) if alone[0].transcoder else None
        mask = torch.arange(B) % 5 != step if way == "own_rates" else None
        metrics = opt.step(x, target=target, mask=mask)
        for e in range(E):
            mine, wanted = (None if t is None else t[e] if own_rows else t for t in (x, target))
            one = opts[e].step(mine, target=wanted, mask=mask)  # pyright: ignore[reportArgumentType]
            for ours, theirs in zip(metrics, one, strict=True):
                assert torch.equal(ours[e], theirs)
            if clip is not None:
                assert torch.equal(opt.grad_norm[e], opts[e].grad_norm)  # pyright: ignore[reportOptionalSubscript, reportArgumentType]
    for e, sae in enumerate(alone):
        for name, tensor in sae.state_dict().items():
            assert torch.equal(saes.state_dict()[name][e], tensor), name
            assert torch.equal(saes[e].state_dict()[name], tensor), name


@pytest.mark.parametrize("elements", [40, 1 << 20])
@pytest.mark.parametrize("tile", [100, 700, 1 << 21])
@pytest.mark.parametrize("mixed", [False, True])
def test_tiles_of_any_size_keep_a_members_bits(elements: int, tile: int, mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores kept or computed again, tiles of one and of several members, some members dense and others not."""
    monkeypatch.setattr("fastsae.reference.WORKSPACE_ELEMENTS", elements)
    monkeypatch.setattr("fastsae.optim.jobs.TILE", tile)
    alone = singles("relu_tiles")
    if mixed:
        alone[1].dense = False
    saes = SAEs(copy.deepcopy(alone))
    opt, opts = Adam(saes, lr=1e-2), [Adam(sae, lr=1e-2) for sae in alone]
    for step in range(3):
        x = normal(B, D, seed=step)
        opt.step(x)
        for one in opts:
            one.step(x)
    for sae, member in zip(alone, saes):
        assert torch.equal(sae.W_enc, member.W_enc) and torch.equal(sae.W_dec, member.W_dec)


@pytest.mark.parametrize("kind", ["relu", "relu_tiles"])
def test_gradients_of_members_and_of_the_stack_agree(kind: str) -> None:
    saes = SAEs(singles(kind))
    _, gradients = saes.step_gradients(normal(B, D, seed=0))
    for name in ("W_enc", "W_dec"):
        gradient = gradients[name]
        assert isinstance(gradient, StackedGradient) and gradient.joint is not None
        assert torch.equal(densify(gradient), densify(gradient.joint).reshape(E, F, D))
    twice = accumulate([gradients, gradients], [0.5, 0.5])
    torch.testing.assert_close(densify(twice["W_dec"]), densify(gradients["W_dec"]))
    assert torch.equal(twice["b_enc"], gradients["b_enc"])  # pyright: ignore[reportArgumentType]


def test_members_are_views_also_after_a_move_or_a_copy() -> None:
    saes = SAEs(singles("topk"))
    with torch.no_grad():
        saes[1].b_dec.fill_(3)
    assert (saes.b_dec[1] == 3).all() and not saes.b_dec[0].any()
    other = copy.deepcopy(saes)
    other.b_dec.data.zero_()
    assert not other[1].b_dec.any() and (saes[1].b_dec == 3).all()
    double = copy.deepcopy(saes).double()
    assert double[2].W_enc.dtype is torch.float64 and double[2].W_enc.data_ptr() == double.W_enc[2].data_ptr()
    own = copy.deepcopy(saes[1])
    own.b_dec.data.zero_()
    assert (saes.b_dec[1] == 3).all()
    saes.eval()
    assert not any(member.training for member in saes)
    saes.init_from(normal(E, B, D, seed=0), norm="rms")
    assert torch.equal(saes.scale[1], saes[1].scale) and saes[1]._scaled  # pyright: ignore[reportIndexIssue]


def test_files(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    saes = SAEs(singles("relu"))
    opt = Adam(saes, lr=[1e-2, 1e-3, 1e-4])
    opt.step(normal(B, D, seed=0))
    loaded = SAEs.load(saes.save(tmp_path / "folder"))
    assert [member.l1 for member in loaded] == [member.l1 for member in saes]
    assert torch.equal(loaded.W_dec, saes.W_dec)
    assert torch.equal(SAE.load(tmp_path / "folder" / "2").W_enc, saes[2].W_enc)
    (tmp_path / "folder" / "1").rename(tmp_path / "folder" / "7")
    with pytest.raises(ValueError, match="folders 0, 1"):
        SAEs.load(tmp_path / "folder")

    path = save_checkpoint(tmp_path / "checkpoint", saes, opt)
    again = load_checkpoint(path).sae
    assert isinstance(again, SAEs)
    resumed = Adam(again, lr=1.0)
    load_checkpoint(path, again, resumed)
    opt.step(normal(B, D, seed=1))
    for member in again:
        member.dense = False  # not part of a configuration
    resumed.step(normal(B, D, seed=1))
    assert torch.equal(again.W_dec, saes.W_dec) and torch.equal(again.silent, saes.silent)
    with pytest.raises(ValueError, match="3 dictionaries"):
        load_checkpoint(path, SAE(D, F, ReLU()))


def test_errors() -> None:
    good = SAE(D, F, TopK(4))
    for members, error, match in (
        ([], ValueError, "at least one"),
        (good, TypeError, "members must be an iterable of SAEs, got SAE"),
        (None, TypeError, "members must be an iterable of SAEs, got NoneType"),
        ([good, 3], TypeError, r"members\[1\] must be an SAE, got int"),
        ([good, good], ValueError, "given twice"),
        ([good, SAE(D, F + 1, TopK(4))], ValueError, f"d_sae must be {F} in all members, got {F + 1} in 1"),
        ([good, SAE(D, F, ReLU())], ValueError, "activation must be of one kind"),
        ([good, SAE(D, F, TopK(4), dtype=torch.float64)], TypeError, "agree in dtype"),
    ):
        with pytest.raises(error, match=match):
            SAEs(members)  # pyright: ignore[reportArgumentType]
    saes = SAEs(singles("topk"))
    with pytest.raises(ValueError, match=r"x must have shape \[B, D\] or \[E=3, B, D\], got \[2, 5, 12\]"):
        saes.step_gradients(torch.zeros(2, 5, D))
    with pytest.raises(TypeError, match="Trainer: sae must be one SAE, got SAEs"):
        Trainer(saes, Adam(saes))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="lr must be a number, or one for each of 3 dictionaries, got 2"):
        Adam(saes, lr=[1e-3, 1e-3])
    with pytest.raises(ValueError, match="to_torch: lr must be one number"):
        Adam(saes, lr=[1e-3] * 3).to_torch()
    with pytest.raises(ValueError, match="has 2 members, the module 3"):
        Adam(saes).apply({"b_dec": StackedGradient(2, lambda e: torch.zeros(D))})


@pytest.mark.parametrize("activation", [TopK(2), BatchTopK(2), ReLU(), JumpReLU(0.1, 0.2), Gated()])
def test_a_step_without_rows(activation: Any) -> None:
    saes, alone = (SAEs(SAE(7, 20, activation, seed=e) for e in range(2)), SAE(7, 20, activation, seed=1))
    for x, mask in ((torch.ones(0, 7), None), (torch.ones(2, 0, 7), None), (torch.ones(3, 7), torch.zeros(3, dtype=torch.bool))):
        metrics, gradients = saes.step_gradients(x, mask=mask)
        assert metrics.loss.tolist() == [0, 0]
        for name, gradient in alone.step_gradients(x.reshape(-1, 7)[:0])[1].items():
            got = gradients[name]
            if isinstance(got, StackedGradient):
                got = densify(got.part(1))
            else:
                assert isinstance(got, torch.Tensor)
                got = got[1]
            assert torch.equal(got, densify(gradient)), name
