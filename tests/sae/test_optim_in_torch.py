"""The fused optimisers where torch's are expected: schedulers, GradScaler, groups of parameters, wrapped modules, half precision."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from training_runs import adam, batches, build, data, same

from fastsae import SAE, SAEs, TopK, Trainer, optim
from fastsae.optim import Adam, RowGradient, Signum, warmup_linear_decay
from fastsae.trainer import Batches

each = pytest.mark.parametrize("kind", [Adam, Signum])
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's schedulers warn where steps come in another order
        yield


def rows(step: int) -> Tensor:
    return data(20, seed=step)


# ---------------------------------------------------------------- schedulers

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 6),
    "milestones": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 2, 5]),
    "sequence": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, total_iters=3), lr_scheduler.ExponentialLR(opt, 0.9)], [3]
    ),
    "one cycle": lambda opt: lr_scheduler.OneCycleLR(opt, 1e-2, total_steps=9),  # the last: Signum's momentum has another meaning
}


@each
def test_a_scheduler_has_the_bits_of_a_schedule(kind: type[Any]) -> None:
    ours, theirs = build(), build()
    schedule = warmup_linear_decay(3, 5, 8)
    a, b = kind(ours, lr=1e-2, schedule=schedule), kind(theirs, lr=1e-2)
    scheduler = lr_scheduler.LambdaLR(b, schedule)
    for step in range(8):
        a.step(rows(step))
        b.step(rows(step))
        scheduler.step()
    assert same(ours, theirs)
    assert b.lr == scheduler.get_last_lr()[0] == 0


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for name in SCHEDULERS for kind in (Adam, Signum)][:-1])
def test_rates_are_those_that_torch_s_own_optimiser_gets(kind: type[Any], name: str) -> None:
    """And betas, which some of them move."""
    sae, reference = build(), torch.optim.Adam([nn.Parameter(torch.zeros(()))], lr=1e-3)
    opt = kind(sae, lr=1e-3)
    ours, theirs = SCHEDULERS[name](opt), SCHEDULERS[name](reference)
    for step in range(8):
        for key in {"lr", "betas"} & set(opt.param_groups[0]):
            assert opt.param_groups[0][key] == reference.param_groups[0][key] == getattr(opt, key)
        opt.step(rows(step))
        reference.step()
        ours.step()
        theirs.step()


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("fused", [True, False])
def test_a_trainer_steps_and_resumes_a_scheduler(name: str, fused: bool, tmp_path: Path) -> None:
    def trainer() -> Trainer:
        sae = build()
        opt = Adam(sae, lr=1e-3) if fused else adam(sae)
        return Trainer(sae, opt, scheduler=SCHEDULERS[name](opt), checkpoint=tmp_path / "run.pt", progress=False)

    by_hand = build()
    opt = Adam(by_hand, lr=1e-3)
    scheduler = SCHEDULERS[name](opt)
    for _, batch in zip(range(7), batches(by_hand)):
        opt.step(**batch)
        scheduler.step()
    trainer().fit(batches(by_hand), 4)
    resumed = trainer()
    resumed.fit(batches(by_hand), 7, resume=True)
    if fused:
        assert same(resumed.sae, by_hand)
    whole = trainer()
    whole.fit(batches(by_hand), 7)
    assert same(whole.sae, resumed.sae)
    assert whole.opt.param_groups[0]["lr"] == resumed.opt.param_groups[0]["lr"]
    with pytest.raises(ValueError, match=r"its scheduler is .*, the trainer's None"):
        Trainer(sae := build(), Adam(sae) if fused else adam(sae)).load(tmp_path / "run.pt")


def test_a_skipped_batch_does_not_move_the_scheduler() -> None:
    sae = build()
    opt = Adam(sae, on_nonfinite="skip")
    scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
    Trainer(sae, opt, scheduler=scheduler, progress=False).fit([rows(0), rows(1) * torch.nan, rows(2)])
    assert scheduler.last_epoch == 2


def test_wrong_schedulers() -> None:
    sae = build()
    opt = Adam(sae)
    plateau: Any = lr_scheduler.ReduceLROnPlateau(opt)
    half = lr_scheduler.LambdaLR(opt, lambda step: 0.5)
    scheduled = Adam(sae, schedule=float)
    for of, scheduler, error, message in (
        (opt, plateau, TypeError, "step ReduceLROnPlateau in callback="),
        (opt, 0.5, TypeError, "must be one of torch.optim.lr_scheduler, got float"),
        (Adam(sae), half, ValueError, "must be over opt, got one over another"),
        (scheduled, lr_scheduler.LambdaLR(scheduled, float), ValueError, "schedule and scheduler must not both"),
    ):
        with pytest.raises(error, match=message):
            Trainer(sae, of, scheduler=scheduler)


# ---------------------------------------------------------------- groups, states, hooks


@each
def test_a_rate_that_is_set_in_the_group_counts(kind: type[Any]) -> None:
    one, other = build(), build()
    a, b = kind(one, lr=1e-3), kind(other, lr=1e-3)
    for step, lr in enumerate((1e-3, 1e-2, 3e-3)):
        a.lr = b.param_groups[0]["lr"] = lr
        assert b.lr == a.param_groups[0]["lr"] == lr
        a.step(rows(step))
        b.step(rows(step))
    assert same(one, other)
    b.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"lr must be at least 0, got -1.0"):
        b.step(rows(0))
    assert [id(p) for p in b.param_groups[0]["params"]] == [id(p) for p in other.parameters()]
    with pytest.raises(NotImplementedError, match=f"{kind.__name__}.add_param_group: parameters are stepped by name, in one group"):
        b.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


@each
def test_torch_s_way_of_a_step(kind: type[Any]) -> None:
    """zero_grad, backward, step: the bits of ``apply``, decoder rows of norm 1, hooks called."""
    one, other, seen = build(), build(), list[Any]()
    a, b = kind(one), kind(other)
    assert isinstance(a, torch.optim.Optimizer)
    a.register_step_post_hook(lambda opt, *_: seen.append(opt))
    for step in range(3):
        a.zero_grad()
        one.loss(rows(step)).loss.backward()
        assert a.step() is None
        for p in other.parameters():
            p.grad = None
        other.loss(rows(step)).loss.backward()
        b.apply()
    assert same(one, other) and seen == [a] * 3
    torch.testing.assert_close(one.W_dec.norm(dim=1), torch.ones(32))
    a.zero_grad()
    with pytest.raises(TypeError, match="x must be given"):
        a.step()


def test_copies_pickles_and_what_is_in_the_state() -> None:
    sae = build()
    opt = Adam(sae, lr=1e-2)
    scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
    opt.step(rows(0))
    scheduler.step()
    twins = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
    opt.step(rows(1))
    for twin in twins:
        twin.step(rows(1))
        assert twin.lr == 5e-3
        assert same(twin.module, sae)
    opt.state[sae.W_enc]["exp_avg"].zero_()  # as a resampling of features does
    assert not opt.state_dict()["state"]["W_enc"]["exp_avg"].any()
    assert opt.state[sae.W_enc]["step"] == 2


def test_a_state_without_a_scheduler_is_as_it_was() -> None:
    sae = build()
    opt = Adam(sae)
    opt.step(rows(0))
    assert list(opt.state_dict()) == ["steps", "lr", "betas", "eps", "weight_decay", "clip", "state"]
    for group in (3, {"lr": 1.0}):
        with pytest.raises(ValueError, match=r"Adam.load_state_dict: group must be what a scheduler keeps"):
            opt.load_state_dict({**opt.state_dict(), "group": group})


# ---------------------------------------------------------------- GradScaler


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(unscale: bool) -> None:
    """A scale that is a power of two changes no bits; a step whose gradients overflow is left out, and the scale falls."""
    one, other = build(), build()
    a, b = Adam(one), Adam(other)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        for opt, sae, scale in ((a, one, scaler.scale), (b, other, lambda loss: loss)):
            opt.zero_grad()
            scale(sae.loss(rows(step)).loss).backward()
        if step == 2:
            one.W_enc.grad[0, 0] = torch.inf  # pyright: ignore[reportOptionalSubscript]
        else:
            b.step()
        if unscale:
            scaler.unscale_(a)
        scaler.step(a)
        scaler.update()
    for name, p in one.named_parameters():
        assert torch.equal(p, dict(other.named_parameters())[name]), name
    assert (a.steps, scaler.get_scale()) == (3, 512.0)


def test_grad_scaler_with_a_fused_step_says_what_to_do() -> None:
    sae = build()
    opt, scaler = Adam(sae), torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match=r"no gradients.*A fused step forms its own.*call Adam.step\(x\) without the scaler"):
        scaler.step(opt, rows(0))


# ---------------------------------------------------------------- half precision


@each
@HALF
def test_half_precision_is_rounded_from_a_float32_run(kind: type[Any], dtype: torch.dtype) -> None:
    """Over many steps smaller than the spacing of the parameters, which alone they would lose."""
    start = [("W", torch.randn(16, 8).to(dtype)), ("b", torch.randn(16).to(dtype))]
    wide = [(name, p.float()) for name, p in start]
    half, full = kind(start, lr=1e-5, unit_rows=["W"]), kind(wide, lr=1e-5, unit_rows=["W"])
    for step in range(30):
        generator = torch.Generator().manual_seed(step)
        g = torch.randn(16, 8, generator=generator).to(dtype), torch.randn(16, generator=generator).to(dtype)
        slots = RowGradient(g[0][:6, :4], torch.arange(24).reshape(6, 4) % 16, None, g[0][:6], 16)
        for opt, cast in ((half, lambda t: t), (full, lambda t: t.float())):
            opt.apply({"W": slots if step % 2 else cast(g[0]), "b": cast(g[1])})
    for (_, p), (_, q) in zip(start, wide):
        assert p.dtype is dtype and torch.equal(p, q.to(dtype))
    assert all(torch.equal(half.state[p]["master"], q) for (_, p), (_, q) in zip(start, wide))
    assert half.state[start[0][1]][half._BUFFERS[0]].dtype is torch.float32


def halves() -> Batches:
    return Batches(data().bfloat16(), size=20, seed=3)


def half_sae(kind: str = "topk", **options: Any) -> SAE:
    return build(kind, dtype=torch.bfloat16, **options)


@each
@pytest.mark.parametrize("run", ["topk", "gated"])
def test_a_half_precision_sae_learns_and_resumes(kind: type[Any], run: str, tmp_path: Path) -> None:
    def trainer() -> Trainer:
        sae = half_sae(run)
        return Trainer(sae, kind(sae, lr=3e-3), checkpoint=tmp_path / "run.pt", every=5, progress=False)

    first = trainer()
    before = float(first.sae.loss(data().bfloat16()).fvu)
    whole = first.fit(halves(), 40)
    assert whole["fvu"] < 0.9 * before
    expected = first.sae
    (tmp_path / "run.pt").unlink()
    trainer().fit(halves(), 22)
    again = trainer()
    again.fit(halves(), 40, resume=True)
    assert same(again.sae, expected)


@HALF
def test_what_others_write_to_a_half_precision_parameter_is_taken_over(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.ones(4, dtype=dtype))
    opt = Adam([("p", p)], lr=1e-4)
    g = torch.ones(4, dtype=dtype)
    opt.apply({"p": g})
    with torch.no_grad():
        p[1] = 7.0
    opt.apply({"p": g})
    torch.testing.assert_close(opt.state[p]["master"], torch.tensor([1 - 2e-4, 7 - 1e-4, 1 - 2e-4, 1 - 2e-4]), rtol=0, atol=1e-6)
    state = opt.state_dict()
    with pytest.raises(TypeError, match=r"p must have a half-precision dtype, whose master copy the state holds, got torch.float32"):
        Adam([("p", torch.ones(4))]).load_state_dict(state)
    theirs = opt.to_torch()
    assert theirs.state[p]["exp_avg"].dtype is dtype  # as torch has it
    back = Adam.from_torch([("p", p)], theirs)
    assert back.state[p]["exp_avg"].dtype is torch.float32 and torch.equal(back.state[p]["master"], p.float())


def test_a_half_precision_stack_has_the_bits_of_its_members() -> None:
    alone = [half_sae(), half_sae(seed=1)]
    stack = SAEs(copy.deepcopy(alone))
    stacked, single = Adam(stack, lr=[1e-3, 2e-3], clip=1.0), [Adam(sae, lr=lr, clip=1.0) for sae, lr in zip(alone, (1e-3, 2e-3))]
    for step in range(4):
        stacked.step(rows(step).bfloat16())
        for opt in single:
            opt.step(rows(step).bfloat16())
    assert same(stack[0], alone[0]) and same(stack[1], alone[1])


# ---------------------------------------------------------------- wrapped modules


class Holder(nn.Module):
    def __init__(self, **parts: nn.Module):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


WRAPPERS: dict[str, Callable[[SAE], Any]] = {
    "compiled": lambda sae: torch.compile(sae, backend="eager"),
    "parallel": nn.DataParallel,
    "both": lambda sae: torch.compile(nn.DataParallel(sae), backend="eager"),
    "own": lambda sae: Holder(sae=sae),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_modules_are_found(name: str) -> None:
    plain, inner = build(), build()
    wrapped = WRAPPERS[name](inner)
    a, b = Adam(plain), Adam(wrapped)
    assert b.unit_rows == ("W_dec",) and list(b.parameters) == list(a.parameters)
    for step in range(2):
        assert torch.equal(a.step(rows(step)).loss, b.step(rows(step)).loss)
    assert same(plain, inner)
    back = Adam.from_torch(wrapped, b.to_torch())
    assert back.unit_rows == ("W_dec",) and torch.equal(back.state[inner.W_enc]["exp_avg"], b.state[inner.W_enc]["exp_avg"])
    plain, inner = build(), build()
    Trainer(plain, adam(plain), progress=False).fit(batches(plain), 3)
    wrapped = WRAPPERS[name](inner)
    trainer = Trainer(wrapped, torch.optim.Adam(wrapped.parameters(), lr=3e-3), progress=False)
    trainer.fit(batches(plain), 3)
    assert trainer.sae is inner and same(plain, inner)


def test_what_holds_more_than_an_sae_or_several() -> None:
    inner = build()
    model = Holder(embed=nn.Linear(12, 12), sae=inner)
    opt = Adam(model)
    assert opt.unit_rows == ("sae.W_dec",)
    inner.loss(model.embed(data())).loss.backward()  # pyright: ignore[reportCallIssue]
    opt.step()
    torch.testing.assert_close(inner.W_dec.norm(dim=1), torch.ones(32))
    with pytest.raises(TypeError, match=r"Adam.step: needs a module with step_gradients, got Holder"):
        opt.step(data())
    several = Holder(a=build(), b=build())
    for make in (lambda: Adam(several), lambda: Trainer(several, adam(inner))):
        with pytest.raises(
            ValueError, match=r"^(optim.Adam|Trainer): Holder must hold one SAE, got a, b: each needs an optimiser of its own"
        ):
            make()
    with pytest.raises(TypeError, match=r"^Trainer: sae must be an SAE or a CrossLayerTranscoder, got Linear"):
        Trainer(nn.Linear(2, 2), adam(inner))
    stack = Holder(saes=SAEs([SAE(12, 16, TopK(2), seed=0)]))
    assert optim.Adam(stack).members == 1
    with pytest.raises(TypeError, match=r"^Trainer: sae must be one SAE, got SAEs"):
        Trainer(stack, adam(inner))
