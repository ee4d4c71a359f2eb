"""Data and steps that are not finite, and data without a spread: what training does about them, on every path."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

import fastsae
from fastsae import SAE, AuxK, BatchTopK, Gated, JumpReLU, ReLU, SAEs, TopK, Trainer, load_checkpoint
from fastsae.gradients import RowGradient, accumulate, densify, size
from fastsae.optim import Adam, Signum, TiledGradient
from fastsae.sae.losses import spread
from fastsae.trainer import Batches

NAN, INF = float("nan"), float("inf")
KINDS: dict[str, dict[str, Any]] = {
    "topk": {"activation": TopK(4)},
    "batchtopk": {"activation": BatchTopK(3.0), "prefixes": [8, 24]},
    "jumprelu": {"activation": JumpReLU(0.1, bandwidth=0.2), "l0": 0.01, "dense": False},
    "relu": {"activation": ReLU(), "l1": 0.02, "dense": False},
    "tiles": {"activation": ReLU(), "l1": 0.02, "dense": True},
    "gated": {"activation": Gated(), "l1": 0.02},
    "transcoder": {"activation": TopK(4), "d_out": 5, "skip": True},
    "tied": {"activation": TopK(4), "tied": True},
}
WAYS: dict[str, Any] = {
    "adam": lambda sae: Adam(sae, lr=1e-2),
    "clipped": lambda sae: Adam(sae, lr=1e-2, clip=1.0),
    "signum": lambda sae: Signum(sae, lr=1e-2),
    "torch": lambda sae: torch.optim.Adam(sae.parameters(), lr=1e-2),
}
each_way = pytest.mark.parametrize("way", WAYS)


def rows(n: int = 12, d: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def build(kind: str = "topk", **options: Any) -> SAE:
    return SAE(6, 24, **{"seed": 0, **KINDS[kind], **options})


def trainer(sae: SAE, way: str, policy: str = "raise", **options: Any) -> Trainer:
    opt = WAYS[way](sae)
    if way == "torch":
        return Trainer(sae, opt, on_nonfinite=policy, progress=False, **options)  # pyright: ignore[reportArgumentType]
    opt.on_nonfinite = policy
    return Trainer(sae, opt, progress=False, **options)


def state(of: Trainer) -> Any:
    return copy.deepcopy((of.sae.state_dict(), of.sae.config(), of.opt.state_dict(), of.step))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    return all(map(finite, value.values() if isinstance(value, dict) else value)) if isinstance(value, (dict, list, tuple)) else True


# ---------------------------------------------------------------- drawn


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_drawn_batches_leave_everything_or_something_finite(kind: str, data: st.DataObject) -> None:
    """A batch that is refused might never have been: bit for bit, also for the steps after it. One that is taken leaves numbers."""
    options: dict[str, Any] = {"objective": data.draw(st.sampled_from(["mse", "fvu"])), "dead_after": 20}
    if kind != "gated":
        options["aux"] = data.draw(st.sampled_from([None, AuxK(4), AuxK.sparsify(4), AuxK.saelens(4)]))
    way = data.draw(st.sampled_from(list(WAYS)))
    damage = data.draw(st.sampled_from([NAN, INF, -INF, 3e38, 1e30, 1e12, 1e-42, 0.0, 1 / 3]))
    row, column = data.draw(st.integers(1, 11)), data.draw(st.sampled_from([0, 4, slice(None)]))
    name = data.draw(st.sampled_from(["x", "target"])) if kind == "transcoder" else "x"
    whole, hidden = data.draw(st.booleans()), data.draw(st.booleans())

    def batch(seed: int) -> dict[str, Tensor]:
        target = {"target": rows(d=5, seed=seed + 50)} if kind == "transcoder" else {}
        return {"x": rows(seed=seed), **target, "mask": torch.arange(12) >= 1}

    bad = batch(3)
    bad[name][slice(None) if whole else 0 if hidden else row, column] = damage
    taken = [batch(0), batch(1)]
    ours, other = (
        trainer(build(kind, **options), way, policy, anneal={"dead_after": lambda step: 20 + step}) for policy in ("raise", "skip")
    )
    for part in taken:
        ours.train_step(**part)
        other.train_step(**part)
        ours.step = other.step = ours.step + 1
    before = state(ours)
    try:
        ours.train_step(**bad)
        refused = False
    except FloatingPointError:
        refused = True
    if refused:
        assert same(state(ours), before)
        other.train_step(**bad)
        assert other.skipped == 1
        assert same(state(other), before)
        assert all(p.grad is None or finite(p.grad) for p in other.sae.parameters())
        assert not (hidden and not whole), "a row that does not count has no say"
        ours.train_step(**batch(4))
        other.train_step(**batch(4))
        assert same(state(ours), state(other))
    else:
        assert abs(damage) < INF or (hidden and not whole)
        assert finite(state(ours))
        if hidden and not whole:  # nothing of it is seen
            other.train_step(**batch(3))
            assert same(state(ours), state(other))
    assert finite(state(ours))


@pytest.mark.parametrize("kind", KINDS)
def test_a_bound_of_the_gradient_is_one(kind: str) -> None:
    sae = build(kind, aux=None if kind == "gated" else AuxK(4), dead_after=1)
    sae.silent += 1
    target: dict[str, Any] = {"target": rows(d=5)} if kind == "transcoder" else {}
    steps = [sae.step_gradients(rows(seed=seed) * 3, **target)[1] for seed in range(2)]
    for gradients in (*steps, accumulate(steps, [0.5, 2.0])):
        for name, gradient in gradients.items():
            assert isinstance(gradient, (Tensor, RowGradient, TiledGradient))
            bound, norm = size(gradient), torch.linalg.vector_norm(densify(gradient))
            assert bound is not None and norm * (1 - 1e-5) <= bound <= 100 * norm + 1, name


# ---------------------------------------------------------------- the words, and the edges


@each_way
def test_what_is_said(way: str) -> None:
    x, mask = rows().reshape(3, 4, 6), torch.ones(3, 4, dtype=torch.bool)
    x[1, 2, 5] = NAN
    sae = build()
    with pytest.raises(FloatingPointError, match=r"step 1 is not finite: x is not finite in row \[1, 2\] of the batch\. Nothing has"):
        trainer(sae, way).train_step(x, mask=mask)
    mask[1, 2] = False
    trainer(sae, way).train_step(x, mask=mask)
    x[0, 0, 0], x[2, 3, 1] = INF, -INF
    with pytest.raises(FloatingPointError, match=r"x is not finite in row \[0, 0\] of the batch and in 1 more"):
        trainer(sae, way).train_step(x, mask=mask)
    with pytest.raises(FloatingPointError, match=r"parameters and inputs are finite: the loss.*largest magnitude in x is 1e\+25"):
        trainer(sae, way).train_step(rows().clamp(-1, 1).sign() * 1e25)
    sae.W_dec.data[7, 2] = NAN
    for policy in ("raise", "skip"):  # no batch is to blame
        with pytest.raises(FloatingPointError, match=r"the parameter W_dec is not finite already, first at \[7, 2\]"):
            trainer(sae, way, policy).train_step(rows(200))


def test_gradients_by_hand_are_looked_at_too() -> None:
    sae = build()
    for opt in (Adam(sae), Signum(sae)):
        before = copy.deepcopy((sae.state_dict(), opt.state_dict()))
        for bad in (NAN, INF, 1e30):  # the square of the last has no place in a second moment
            matrix = torch.full((24, 6), bad)
            for g in (
                matrix,
                TiledGradient(lambda part, g=matrix: g[part], 24),
                RowGradient(matrix, torch.zeros(24, 6).long(), None, matrix, 24),
            ):
                with pytest.raises(FloatingPointError, match="apply: step 1 is not finite: parameters and inputs are finite"):
                    opt.apply({"b_dec": torch.ones(6), "W_dec": g})
        assert same((sae.state_dict(), opt.state_dict()), before)
        sae.b_enc.grad = torch.full((24,), NAN)
        with pytest.raises(FloatingPointError):
            opt.apply()
        opt.on_nonfinite = "skip"
        opt.apply()
        assert (opt.skipped, opt.steps) == (1, 0)
        opt.on_nonfinite = "ignore"  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(ValueError, match="on_nonfinite must be 'raise' or 'skip', got 'ignore'"):
            opt.apply({})
    with pytest.raises(ValueError, match=r"^Trainer: on_nonfinite must be 'raise' or 'skip', got 'warn'"):
        Trainer(sae, torch.optim.Adam(sae.parameters()), on_nonfinite="warn")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^Trainer: on_nonfinite is for torch optimisers; give Adam its own"):
        Trainer(sae, Adam(sae), on_nonfinite="skip")


@pytest.mark.parametrize("dense", [False, True])
def test_members_of_a_stack_step_together_or_not_at_all(dense: bool) -> None:
    saes = SAEs(SAE(6, 24, ReLU(), l1=0.01 * (e + 1), seed=e, dense=dense) for e in range(3))
    for opt in (Adam(saes, lr=[1e-2, 1e-3, 1e-2]), Adam(saes, clip=1.0), Signum(saes)):
        opt.step(rows())
        before = copy.deepcopy((saes.state_dict(), opt.state_dict()))
        x = rows().expand(3, -1, -1).clone()
        x[1, 4] = NAN
        with pytest.raises(FloatingPointError, match=r"x is not finite in row \[1, 4\]"):
            opt.step(x)
        opt.on_nonfinite = "skip"
        opt.step(x)
        assert same(copy.deepcopy((saes.state_dict(), opt.state_dict())), before) and opt.skipped == 1


def test_half_precision_modules_through_torch() -> None:
    for dtype, huge in ((torch.float16, 3e4), (torch.bfloat16, 1e25)):
        sae = build(dtype=dtype, objective="mse")
        run = trainer(sae, "torch")
        before = state(run)
        with pytest.raises(FloatingPointError, match="step 1 is not finite"):  # gradients overflow, or their squares
            run.train_step(torch.full((4, 6), huge, dtype=dtype))
        assert same(state(run), before)


@each_way
def test_a_rate_that_is_not_finite_changes_nothing(way: str) -> None:
    sae = build("batchtopk")
    opt, schedule = WAYS[way](sae), lambda step: NAN if step == 1 else 1.0
    if way == "torch":
        run = Trainer(sae, opt, schedule=schedule, progress=False)
    else:
        opt.schedule, run = schedule, Trainer(sae, opt, progress=False)
    run.train_step(rows())
    run.step = 1
    before = state(run)
    with pytest.raises(ValueError, match="at step 1"):
        run.train_step(rows())
    assert same(state(run), before)


# ---------------------------------------------------------------- the loop


def spoilt(every: int = 3, n: int = 12) -> list[Tensor]:
    return [rows(seed=i) if i % every else torch.full((12, 6), NAN) for i in range(n)]


@each_way
def test_skipping_equals_never_having_seen_the_batches(way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []
    ours, other = trainer(build(), way, "skip", log_every=2, callback=lambda *a: seen.append(a)), trainer(build(), way)
    ours.progress, ours.checkpoint = True, tmp_path / "run.pt"
    result = ours.fit(spoilt(), 10)
    assert result == {**other.fit([b for b in spoilt() if b.isfinite().all()], 10), "skipped": 5}
    assert same(state(ours), state(other))
    assert [(step, m["skipped"]) for step, m in seen] == [(2, 1), (4, 2), (6, 3), (8, 4), (10, 5)]
    assert ", 5 skipped" in capsys.readouterr().err
    again = trainer(build(), way, "skip", checkpoint=ours.checkpoint)
    again.load(tmp_path / "run.pt")
    assert again.skipped == 5


@each_way
def test_the_last_good_checkpoint_stays(way: str, tmp_path: Path) -> None:
    sae = build()
    run = trainer(sae, way, checkpoint=tmp_path / "run.pt", every=2)
    with pytest.raises(FloatingPointError, match="step 6 is not finite"):
        run.fit([*(rows(seed=i) for i in range(5)), torch.full((12, 6), INF)])
    assert run.step == 5 and load_checkpoint(tmp_path / "run.pt").extra["step"] == 4
    kept = (tmp_path / "run.pt").read_bytes()
    sae.b_enc.data[3] = NAN
    with pytest.raises(FloatingPointError, match=r"Trainer.save: the parameter b_enc is not finite already, first at \[3\]"):
        run.save(tmp_path / "run.pt")
    assert (tmp_path / "run.pt").read_bytes() == kept


@each_way
def test_a_run_that_skips_everything_is_no_success(way: str) -> None:
    bad = torch.full((12, 6), NAN)
    with pytest.raises(FloatingPointError, match="no step has been taken: none of the 3 batches was finite"):
        trainer(build(), way, "skip").fit([bad] * 3)
    with pytest.raises(ValueError, match=r"batches ended after step 0 of 5 and give no more \(3 that were not finite"):
        trainer(build(), way, "skip").fit([bad] * 3, 5)
    with pytest.raises(FloatingPointError, match="after step 0 100 batches in a row were not finite"):
        trainer(build(), way, "skip").fit(Batches(torch.full((50, 6), NAN), size=5), 5)


# ---------------------------------------------------------------- a device whose answer nobody waits for


@pytest.mark.parametrize(
    "made", [lambda s: Adam(s, clip=1.0), lambda s: Adam(s, lr=[1e-3, 1e-2]), lambda s: Signum(s, schedule=lambda n: n + 1)]
)
def test_an_answer_that_is_not_waited_for(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: nothing is written from a bad step on, and the next check says so and sets the counters back."""
    monkeypatch.setattr("fastsae._core.finite.finite", lambda sizes, real=fastsae._core.finite.finite: torch.tensor(real(sizes)))
    members = (SAE(6, 24, BatchTopK(3.0), seed=e) for e in range(2))
    saes: Any = SAEs(members)
    opt = made(saes)
    for seed in range(3):
        opt.step(rows(seed=seed))
    fastsae.check()
    opt.step(rows(seed=3))
    twin = copy.deepcopy((saes, opt.lr))[0]
    kept = copy.deepcopy((saes.state_dict(), {name: s.buffers for name, s in opt._states.items()}))
    counters = opt.steps, {name: s.step for name, s in opt._states.items()}
    sums = [list(getattr(opt, name)) for name in opt._SUMS]
    for x in (torch.full((12, 6), NAN), rows(seed=4), rows(seed=5)):
        opt.step(x)
        assert same((saes.state_dict(), {name: s.buffers for name, s in opt._states.items()}), kept)
    with pytest.raises(FloatingPointError, match=r"step: step 5 is not finite: .* 2 steps after it were not taken either"):
        fastsae.check()
    assert (opt.steps, {name: s.step for name, s in opt._states.items()}) == counters
    assert [list(getattr(opt, name)) for name in opt._SUMS] == sums
    fastsae.check()
    opt.step(rows(seed=6))
    assert not same(saes.state_dict(), twin.state_dict())
    opt.step(torch.full((12, 6), NAN))
    with pytest.raises(FloatingPointError):
        opt.state_dict()
    opt.on_nonfinite = "skip"
    opt.step(torch.full((12, 6), NAN))
    assert opt.skipped == 1


def test_a_trainer_goes_back_with_an_answer_that_is_late(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fastsae._core.finite.finite", lambda sizes, real=fastsae._core.finite.finite: torch.tensor(real(sizes)))
    run = trainer(build(), "adam", log_every=4, checkpoint=tmp_path / "run.pt", every=2)
    with pytest.raises(FloatingPointError, match="step 4 is not finite"):
        run.fit([*(rows(seed=i) for i in range(3)), torch.full((12, 6), NAN), *(rows(seed=i) for i in range(9))])
    assert run.step == run.opt.steps == 3
    run.opt.step(torch.full((12, 6), NAN))
    with pytest.raises(FloatingPointError, match="step 4 is not finite"):  # and not that the file is damaged
        run.load(tmp_path / "run.pt")
    run.load(tmp_path / "run.pt")
    assert run.step == run.opt.steps == 2


# ---------------------------------------------------------------- no spread


@pytest.mark.parametrize("value", [1 / 3, 1e4 / 3, 0.1, -7.7e8, 1e15, 1e-20])
@pytest.mark.parametrize("n", [1, 2, 7, 513, 5000])
def test_equal_rows_have_no_spread(n: int, value: float) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        if abs(value) < torch.finfo(dtype).max:
            assert float(spread(torch.full((n, 9), value, dtype=dtype))[0]) == 0
    x = torch.full((n, 9), value, dtype=torch.float64) * (1 + 1e-9 * rows(n, 9).double())
    assert n == 1 or float(spread(x)[0]) == pytest.approx(float((x - x.mean(0)).square().sum()), rel=1e-12)  # what is not noise stays


def test_a_spread_that_is_none_of_noise_keeps_its_bits() -> None:
    for scale in (1e-15, 1.0, 1e15):
        x = (rows(300, 20) + 1000) * scale
        assert float(spread(x)[0]) == float((x - x.mean(0)).square().sum())
    for bad in (NAN, INF):
        assert not bool(spread(torch.tensor([[bad], [1.0]]))[0] == 0)
    assert float(spread(torch.tensor([[3e38], [-3e38]]))[0]) == INF


@pytest.mark.parametrize("way", ["adam", "torch"])
@pytest.mark.parametrize("kind", ["topk", "tiles", "batchtopk"])
@pytest.mark.parametrize("objective", ["mse", "fvu"])
def test_equal_rows_train_without_explosions(objective: Any, kind: str, way: str) -> None:
    """The loss of rows that are equal up to rounding was 1e13, and Adam's second moment then stood still for thousands of steps."""
    x = torch.full((257, 6), 1 / 3)
    for aux in (AuxK(4), AuxK.sparsify(4)):
        losses = []
        for stacked in (False, True):
            sae = build(kind, objective=objective, aux=aux, dead_after=1)
            sae.silent += 10
            if stacked and way == "adam":
                losses.append(float(Adam(SAEs([sae]), lr=1e-2).step(x).loss))
            else:
                run = trainer(sae, way)
                losses.append(float(run.train_step(x)["loss"]))
                moments = run.opt.state_dict()["state"].values()
                assert max(float(s["exp_avg_sq"].max()) for s in moments) < 10
        assert losses[0] == losses[1] < 10
    sae = build(kind)
    with torch.no_grad():
        sae.b_dec.copy_(x[0] * (1 + 1e-7))
        sae.W_dec.zero_()
    assert float(sae.loss(x).fvu) == float(sae.step_gradients(x)[0].fvu) == 0  # both are rounding
    sae.b_dec.data.zero_()
    assert float(sae.loss(x).fvu) == float(sae.step_gradients(x)[0].fvu) == INF


# ---------------------------------------------------------------- a start


def test_a_start_from_rows_that_are_not_finite_is_refused() -> None:
    sae = build().init_from(rows(), norm="rms")
    kept = copy.deepcopy(sae.state_dict())
    x, mask = rows(), torch.arange(12) != 7
    x[7, 2] = -INF
    for call, message in (
        (lambda: sae.init_from(x), r"SAE.init_from: x is not finite in row 7 of the batch"),
        (lambda: SAEs([sae]).init_from(x.expand(1, -1, -1)), "x is not finite in row 7"),
        (lambda: sae.init_from(rows(), x), "target is not finite in row 7"),
        (lambda: sae.init_from(rows() * 1e30, norm="rms"), "and so their squares"),
        (lambda: sae.init_from(rows().abs() * (3e38 / 4)), "the mean of the rows must be finite, got inf"),
        (lambda: sae.init_from(rows(d=5)), r"x must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert same(sae.state_dict(), kept) and sae._scaled
    sae.init_from(x, mask=mask)
    assert finite(sae.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_of_data_that_are_not_finite_is_none(kind: str) -> None:
    """The share of a spread that is NaN is NaN, not 0."""
    target: dict[str, Any] = {"target": rows(d=5)} if kind == "transcoder" else {}
    x = target.get("target", rows()).clone()
    for bad in (NAN, INF):
        x[3, 1] = bad
        data = {"x": rows(), "target": x} if target else {"x": x}
        for training in (True, False):
            sae = build(kind, objective="fvu").train(training)
            assert not finite(sae.loss(**data).loss) and not finite(sae.step_gradients(**data)[0].loss)
            assert not finite(SAEs([sae]).step_gradients(**data)[0].loss)
