"""Rows normalised by themselves: against dense float64 formulas, SAELens' own SAEs and training SAEs, and rows that have no scale."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import load
from sae_cases import KINDS, plain
from torch import Tensor

from fastsae import SAE, AuxK, Gated, ReLU, SAEs, TopK, lm, optim
from fastsae.gradients import densify
from fastsae.polytopes import dictionary_crossings
from fastsae.sae import Crosscoder

D, F, K = 7, 20, 3
SAELENS = {"layer_norm": "layer_norm", "norm": "constant_norm_rescale"}
each = pytest.mark.parametrize("by", SAELENS)


def draw(*shape: int, seed: int = 9, dtype: torch.dtype = torch.float64) -> Tensor:
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 1).to(dtype)


def build(kind: str, by: Any, **options: Any) -> SAE:
    sae = SAE(D, F, KINDS[kind], seed=3, **{"dtype": torch.float64, "normalise_rows": by, **options})
    with torch.no_grad():
        for number, p in enumerate(sae.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)).to(p) * 0.2)
    return sae


def scales(x: Tensor, by: str) -> tuple[Tensor, Tensor, Tensor | float]:
    """(normalised rows, size, mean)."""
    if by == "norm":
        size = x.norm(dim=-1, keepdim=True) / math.sqrt(D)
        return x / size, size, 0.0
    mean, size = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    return (x - mean) / (size + 1e-5), size, mean


@pytest.mark.parametrize(("kind", "by"), [*((kind, "layer_norm") for kind in KINDS), ("topk", "norm"), ("gated", "norm")])
def test_latents_reconstructions_and_gradients(kind: str, by: str) -> None:
    sae, x = build(kind, by), draw(3, 5, D).requires_grad_()
    h, size, mean = scales(x, by)
    code, y = plain(sae, h)
    expected = y * size + mean
    run = sae(x)
    torch.testing.assert_close(run.latents.to_dense(), code)
    torch.testing.assert_close(run.x_hat, expected)
    torch.testing.assert_close(sae.decode(run.latents, x), expected)
    if kind.startswith("jumprelu_"):
        return  # their thresholds' estimates are not autograd's of the formula; test_jump has them
    flat = x.reshape(-1, D)
    want = (expected.reshape(-1, D) - flat).square().sum(1).mean()
    if isinstance(sae.activation, Gated):
        gate = ((h - sae.b_dec) @ sae.W_enc.T + sae.b_gate).relu()
        frozen = (gate @ sae.W_dec.detach() + sae.b_dec.detach()) * size.detach() + (mean.detach() if isinstance(mean, Tensor) else 0)
        want = want + (frozen - x.detach()).square().sum(-1).mean()
    parameters = [p for name, p in sae.named_parameters() if name != "threshold"]
    grads = torch.autograd.grad(want, parameters, retain_graph=True)
    for dense in (True, False) if kind in ("relu", "gated") else (None,):
        sae.dense = dense
        got = copy.deepcopy(sae).step_gradients(x.detach())[1]
        loss = sae.loss(x.detach()).loss
        torch.testing.assert_close(loss, want)
        for p, e, a in zip(parameters, grads, torch.autograd.grad(loss, parameters), strict=True):
            name = next(name for name, q in sae.named_parameters() if q is p)
            torch.testing.assert_close(densify(got[name]), e, msg=lambda text, name=name: f"{name}: {text}")
            torch.testing.assert_close(a, e)
    a, b = (torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for out in (run.x_hat, expected))
    torch.testing.assert_close(a, b)


@torch.no_grad()
@each
@pytest.mark.parametrize("name", ["StandardSAE", "GatedSAE", "JumpReLUSAE", "TopKSAE", "Transcoder", "JumpReLUTranscoder"])
def test_saelens_files_both_ways(name: str, by: str, tmp_path: Path) -> None:
    load("sae_lens", "sae-lens")
    from sae_lens import saes

    module, more = (saes, {"k": K}) if name == "TopKSAE" else (saes, {}) if name.endswith("SAE") else (saes.transcoder, {"d_out": 4})
    more |= {"apply_b_dec_to_input": False} if "Transcoder" in name else {}
    theirs = getattr(module, name)(getattr(module, name + "Config")(d_in=D, d_sae=F, normalize_activations=SAELENS[by], **more))
    for number, (key, p) in enumerate(theirs.named_parameters()):
        p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)) * 0.4)
        if key == "threshold":
            p.abs_()
    theirs.save_model(tmp_path / "theirs")
    ours, x = SAE.from_pretrained(tmp_path / "theirs"), draw(4, 6, D, dtype=torch.float32)
    assert ours.normalise_rows == by
    again = SAE.load(ours.save(tmp_path / "own"))
    written = saes.SAE.load_from_disk(ours.save_pretrained(tmp_path / "back", format="saelens"))
    for code, x_hat in ((theirs.encode(x), theirs(x)), (written.encode(x), written(x)), (again.encode(x).to_dense(), again(x).x_hat)):
        torch.testing.assert_close(ours.encode(x).to_dense(), code, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours(x).x_hat, x_hat, rtol=1e-4, atol=1e-4)
    for format in ("sparsify", "dictionary_learning", "circuit_tracer"):  # noqa: A001
        with pytest.raises(ValueError, match=f"{format} has no normalisation by row"):
            ours.save_pretrained(tmp_path / "no", format=format)


@each
@pytest.mark.parametrize("kind", ["TopK", "JumpReLU"])
def test_steps_of_saelens(kind: str, by: str) -> None:
    load("sae_lens", "sae-lens")
    from sae_lens import saes
    from sae_lens.saes.sae import TrainStepInput

    more: dict[str, Any] = {"k": K, "rescale_acts_by_decoder_norm": False} if kind == "TopK" else {"jumprelu_bandwidth": 0.5}
    cfg = getattr(saes, f"{kind}TrainingSAEConfig")(d_in=D, d_sae=F, normalize_activations=SAELENS[by], **more)
    theirs = getattr(saes, f"{kind}TrainingSAE")(cfg)
    sae = build("topk" if kind == "TopK" else "jumprelu_band", by, dtype=torch.float32, l0=0.1 if kind == "JumpReLU" else 0.0)
    sae.pre_bias, sae.normalise_decoder = cfg.apply_b_dec_to_input, False
    with torch.no_grad():
        if kind == "JumpReLU":
            sae.threshold.clamp_(min=0.1)  # they keep it from going below 0
        for name, p in theirs.named_parameters():
            p.copy_(sae.get_parameter(name).T if name == "W_enc" else sae.get_parameter(name))
    theirs_opt, opt = torch.optim.Adam(theirs.parameters(), lr=1e-3), optim.Adam(sae, lr=1e-3)
    for step in range(5):
        x = draw(32, D, seed=step, dtype=torch.float32)
        given = {"sae_in": x, "coefficients": {"l0": 0.1}, "dead_neuron_mask": None}
        given |= {name: 0 for name in ("n_training_steps", "is_logging_step") if name in TrainStepInput.__dataclass_fields__}
        out = theirs.training_forward_pass(TrainStepInput(**given))
        theirs_opt.zero_grad()
        out.loss.backward()
        theirs_opt.step()
        torch.testing.assert_close(opt.step(x).loss, out.loss.detach(), rtol=1e-4, atol=1e-4)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(sae.get_parameter(name), p.T if name == "W_enc" else p, rtol=0, atol=2e-4)


@each
def test_rows_without_a_scale(by: str) -> None:
    sae, x = build("topk", by), draw(5, D)
    x[1], x[3] = 0, 2.5
    with torch.no_grad():
        h = sae.encoder_rows(x)
    assert not h[1].any()
    assert bool(h[3].any()) is (by == "norm")
    run = sae(x)
    assert torch.equal(run.x_hat[1], x[1])
    if by == "layer_norm":
        assert torch.equal(run.x_hat[3], x[3])
    x.requires_grad_()
    sae(x).squared_error.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    nan = draw(4, D).requires_grad_(False)
    nan[2, 0] = torch.nan
    run = sae(nan)
    assert run.x_hat[2].isnan().all() and run.x_hat[[0, 1, 3]].isfinite().all()
    with pytest.raises(FloatingPointError, match="x is not finite in row 2"):
        optim.Adam(build("topk", by, dtype=torch.float32), lr=1e-3).step(nan.float())
    assert float(sae.loss(x[:0].detach()).loss.detach()) == 0


@each
def test_stacks_init_half_precision_and_autocast(by: str) -> None:
    x = draw(16, D, dtype=torch.float32)
    members = [build("topk", by, dtype=torch.float32) for _ in range(2)]
    alone = copy.deepcopy(members[0])
    saes = SAEs(members)
    one, two = optim.Adam(alone, lr=1e-3), optim.Adam(saes, lr=1e-3)
    for _ in range(3):
        one.step(x)
        two.step(x)
    assert all(torch.equal(p, saes[0].get_parameter(name)) for name, p in alone.named_parameters())
    with pytest.raises(ValueError, match="normalise_rows must be None in all members"):
        SAEs([build("topk", None), build("topk", by)])
    alone.init_from(x)
    torch.testing.assert_close(alone.b_dec, scales(x, by)[0].mean(0), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="norm does not go with normalise_rows"):
        alone.init_from(x, norm="rms")
    half = copy.deepcopy(alone).to(torch.bfloat16)
    torch.testing.assert_close(half(x.bfloat16()).x_hat.float(), alone(x.bfloat16().float()).x_hat, rtol=0.1, atol=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        alone.loss(x).loss.backward()


@each
def test_an_edit_in_a_model_is_in_units_of_the_data(by: str) -> None:
    model, sae = torch.nn.Sequential(torch.nn.Identity()), build("relu", by, dtype=torch.float32)
    x = draw(6, D, dtype=torch.float32)
    with torch.no_grad(), lm.splice(model, {"0": sae}, edit={"0": [lm.Edit([4], add=2.0)]}):
        got = model(x)
    torch.testing.assert_close(got - x, 2.0 * sae.W_dec[4] * scales(x, by)[1], rtol=1e-4, atol=1e-4)


def test_what_is_refused() -> None:
    for options in ({"normalise_rows": "rms"}, {"normalise_rows": "norm", "skip": True, "d_out": D}):
        with pytest.raises(ValueError, match="normalise_rows must be"):
            SAE(D, F, ReLU(), **options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="normalise_rows must be"):
        SAE(1, F, ReLU(), normalise_rows="layer_norm")
    with pytest.raises(ValueError, match="aux does not go with normalise_rows"):
        SAE(D, F, TopK(K), normalise_rows="norm", aux=AuxK())
    sae = SAE(D, F, TopK(K), normalise_rows="norm")
    with pytest.raises(ValueError, match="x must be given, normalise_rows needs it"):
        sae.decode(sae.encode(draw(3, D, dtype=torch.float32)))
    with pytest.raises(ValueError, match="no Crosscoder"):
        Crosscoder.from_config({**SAE(D, F, TopK(K), normalise_rows="norm", pre_bias=False).config(), "n_layers": 7})
    with pytest.raises(ValueError, match="are no straight lines"):
        dictionary_crossings(sae, draw(2, D, dtype=torch.float32), draw(2, D, seed=1, dtype=torch.float32))
    assert SAE.from_config(sae.config()).normalise_rows == "norm"
