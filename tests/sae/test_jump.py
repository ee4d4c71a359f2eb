"""JumpReLU's published losses against a dense float64 reference, a step and ten; and against SAELens' own training SAE."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peers import load
from torch import Tensor

from fastsae import SAE, JumpReLU, ReLU, SAEs, optim
from fastsae.gradients import densify
from fastsae.sae import Crosscoder, JumpLoss

D, F, BAND, L1, L0 = 6, 24, 0.8, 0.3, 0.2
LOSSES = {
    "to scores": JumpLoss(to_scores=True),
    "target": JumpLoss(target=5.0),
    "target of the batch": JumpLoss(target=5.0, of_batch=True, to_scores=True),
    "tanh": JumpLoss(tanh=2.0),
    "pre-activations of the dead": JumpLoss(pre_acts=0.1),
    "anthropic": JumpLoss(tanh=4.0, pre_acts=0.1, all_features=True, to_scores=True),
    "all": JumpLoss(7.0, False, 3.0, 0.2, True, True),
    "plain": JumpLoss(),
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tied": True},
    "skip": {"d_out": 5, "skip": True},
    "rows": {"normalise_rows": "layer_norm"},
}
SHAPES["matryoshka"] = {"prefixes": [5, F]}


class Jump(torch.autograd.Function):
    """(z H(z - theta), H(z - theta)) with the rectangle's estimates."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, to_scores: bool) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(z, theta)
        ctx.to_scores = to_scores
        on = (z > theta.clamp_min(0)).to(z)
        return z * on, on

    @staticmethod
    def backward(ctx: Any, df: Tensor, dh: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, theta = ctx.saved_tensors
        pull = ((z - theta).abs() < BAND / 2) * (theta * df + dh) / BAND
        return df * (z > theta.clamp_min(0)) + (pull if ctx.to_scores else 0), -pull.sum(0), None


def reference(sae: SAE, jump: JumpLoss, x: Tensor, target: Tensor, dead: Tensor) -> Tensor:
    shift = size = None
    h = x
    if sae.normalise_rows:
        shift, size = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        h = (x - shift) / (size + 1e-5)
    z = (h - sae.b_dec if sae.pre_bias else h) @ sae.W_enc.T + sae.b_enc
    f, on = Jump.apply(z, sae.threshold, jump.to_scores)  # pyright: ignore[reportGeneralTypeIssues]
    norm, loss = sae.W_dec.norm(dim=1), torch.zeros((), dtype=x.dtype)
    for end in sae.prefixes or [F]:
        y = f[:, :end] @ sae.W_dec[:end] + sae.b_dec + (h @ sae.W_skip.T if sae.W_skip is not None else 0)
        y = y if size is None else y * size + shift
        loss = loss + (y - target).square().sum(1).mean() / len(sae.prefixes or [F])
    magnitude = f.abs() * norm if jump.tanh is None else torch.tanh(jump.tanh * f * norm)
    n = on.sum(1)
    if jump.target is not None:
        n = ((n.mean() if jump.of_batch else n) / jump.target - 1).square().mean()
    edge = sae.threshold + (sae.threshold.clamp_min(0) - sae.threshold).detach()
    short = (edge - z).relu() * norm
    short = short if jump.all_features else short[:, dead]
    return loss + L1 * magnitude.sum(1).mean() + L0 * n.mean() + jump.pre_acts * short.sum(1).mean()


def build(jump: JumpLoss | None, **options: Any) -> SAE:
    options = {"l1": L1, "l0": L0, "dead_after": 100, "dtype": torch.float64, "seed": 0, "jump": jump, **options}
    sae = SAE(D, F, JumpReLU(torch.linspace(-0.2, 1.2, F), BAND), **options)
    with torch.no_grad():
        for number, p in enumerate(sae.parameters()):
            p.add_(draw(*p.shape, seed=number, dtype=p.dtype), alpha=0.2)
        sae.silent[::3] = 150
    return sae


def draw(*shape: int, seed: int = 9, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def still_dead(sae: SAE, x: Tensor) -> Tensor:
    """As a step counts them: those that fired in it are none."""
    fired = copy.deepcopy(sae).encode(x).to_dense().ne(0).any(0)
    return sae.dead_features & ~fired


@pytest.mark.parametrize(
    ("name", "shape"), [*((name, "plain") for name in LOSSES), *(("all", shape) for shape in SHAPES if shape != "plain")]
)
def test_equal_to_the_dense_reference(name: str, shape: str) -> None:
    sae, x = build(LOSSES[name], **SHAPES[shape]), draw(11, D)
    target = draw(11, sae.d_out, seed=10) if sae.transcoder else None
    want = reference(sae, LOSSES[name], x, x if target is None else target, still_dead(sae, x))
    expected = torch.autograd.grad(want, list(sae.parameters()))
    metrics, got = copy.deepcopy(sae).step_gradients(x, target)
    torch.testing.assert_close(metrics.loss, want.detach())
    for (parameter, gradient), e in zip(got.items(), expected, strict=True):
        torch.testing.assert_close(
            densify(gradient), e, rtol=1e-9, atol=1e-10, msg=lambda text, parameter=parameter: f"{parameter}: {text}"
        )
    loss = sae.loss(x, target)
    (2 * loss.loss).backward()
    torch.testing.assert_close(loss.loss, want)
    for p, e in zip(sae.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, 2 * e, rtol=1e-9, atol=1e-10)


def test_ten_steps_alone_in_a_stack_and_of_torch() -> None:
    options, jump = {"dtype": torch.float32}, LOSSES["all"]
    alone, members = build(jump, **options), [build(jump, **options) for _ in range(2)]
    plain = copy.deepcopy(alone)
    members[1] = build(None, **options)
    saes, x = SAEs(members), draw(32, D, dtype=torch.float32)
    one, two, torchs = optim.Adam(alone, lr=1e-3), optim.Adam(saes, lr=1e-3), torch.optim.Adam(plain.parameters(), lr=1e-3)
    for _ in range(10):
        one.step(x)
        two.step(x)
        torchs.zero_grad()
        plain.loss(x).loss.backward()
        plain.remove_parallel_gradient_()
        torchs.step()
        plain.normalise_decoder_()
    for key, p in alone.named_parameters():
        assert torch.equal(p, saes[0].get_parameter(key)), key
        torch.testing.assert_close(p, plain.get_parameter(key), rtol=0, atol=1e-4)
    assert not torch.equal(saes[0].W_enc, saes[1].W_enc)


@pytest.mark.parametrize("mode", ["step", "tanh", "quadratic"])
@pytest.mark.parametrize("ste", [True, False])
def test_equal_to_saelens(mode: str, ste: bool) -> None:
    load("sae_lens", "sae-lens")
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    more: dict[str, Any] = {"jumprelu_ste_to_input": True} if ste else {}
    fields = JumpReLUTrainingSAEConfig.__dataclass_fields__
    if not {"target_l0", *more} <= set(fields):
        pytest.skip("this version of sae-lens has no such loss")
    cfg = JumpReLUTrainingSAEConfig(
        d_in=D, d_sae=F, dtype="float32", jumprelu_bandwidth=BAND, jumprelu_sparsity_loss_mode=mode, pre_act_loss_coefficient=0.1,
        target_l0=4.0, **more,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    theirs, scale = JumpReLUTrainingSAE(cfg), {"step": L0, "tanh": 0.0, "quadratic": 2 * 4.0 * L0}[mode]
    jump = JumpLoss(4.0 if mode == "quadratic" else None, False, 4.0 if mode == "tanh" else None, 0.1, False, ste)
    sae = build(jump, dtype=torch.float32, l1=L0 if mode == "tanh" else 0.0, l0=scale, pre_bias=cfg.apply_b_dec_to_input)
    x = draw(16, D, dtype=torch.float32)
    with torch.no_grad():
        sae.threshold.clamp_(min=0)
        for name, p in theirs.named_parameters():
            p.copy_(sae.get_parameter(name).T if name == "W_enc" else sae.get_parameter(name))
    given = {"sae_in": x, "coefficients": {"l0": L0}, "dead_neuron_mask": still_dead(sae, x)}
    given |= {name: 0 for name in ("n_training_steps", "is_logging_step") if name in TrainStepInput.__dataclass_fields__}
    theirs.training_forward_pass(TrainStepInput(**given)).loss.backward()
    _, gradients = sae.step_gradients(x)
    for name, p in theirs.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(densify(gradients[name]), p.grad.T if name == "W_enc" else p.grad, rtol=1e-4, atol=1e-5)


def test_odd_batches() -> None:
    empty = build(LOSSES["all"])
    metrics, gradients = empty.step_gradients(draw(0, D))
    assert float(metrics.loss) == 0
    assert all(not densify(gradient).any() for gradient in gradients.values())
    x = draw(8, D)
    x[2, 1] = torch.nan
    with pytest.raises(FloatingPointError, match="x is not finite in row 2"):
        optim.Adam(build(LOSSES["all"], dtype=torch.float32), lr=1e-3).step(x.float())
    frozen = build(LOSSES["all"])
    frozen.W_dec.requires_grad_(False)
    frozen.loss(draw(8, D)).loss.backward()
    assert frozen.W_dec.grad is None
    assert frozen.W_enc.grad is not None
    half = build(LOSSES["anthropic"], dtype=torch.bfloat16)
    half.loss(draw(8, D, dtype=torch.bfloat16)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters())
    full = build(LOSSES["anthropic"], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        full.loss(draw(8, D, dtype=torch.float32)).loss.backward()


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="jump needs JumpReLU with a bandwidth"):
        SAE(D, F, ReLU(), jump=JumpLoss(tanh=1.0))
    with pytest.raises(ValueError, match="jump needs JumpReLU with a bandwidth"):
        SAE(D, F, JumpReLU(0.1), jump=JumpLoss(tanh=1.0))
    with pytest.raises(ValueError, match="not dense=True"):
        SAE(D, F, JumpReLU(0.1, 0.1), jump=JumpLoss(), dense=True)
    with pytest.raises(TypeError, match="jump must be a JumpLoss or None, got dict"):
        SAE(D, F, JumpReLU(0.1, 0.1), jump={})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="JumpLoss: target must be"):
        JumpLoss(target=0.0)
    with pytest.raises(ValueError, match="x and target must not require gradients with jump"):
        build(JumpLoss()).loss(draw(3, D).requires_grad_())
    with pytest.raises(ValueError, match="no Crosscoder"):
        Crosscoder.from_config({**build(JumpLoss()).config(), "n_layers": 2})
    assert SAE.from_config(build(LOSSES["all"]).config()).jump == LOSSES["all"]
