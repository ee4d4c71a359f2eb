"""``accelerate`` against dictionary_learning's trainers: updates, what needs the library's own, real activations."""

from __future__ import annotations

import contextlib
import copy
import warnings
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from dictionary_learning_cases import CLASSES, ROWS, D, F, K, make, rows
from hypothesis import given
from peers import aux_regime, load, minilm_rows, same, works_under_settings
from torch import Tensor, nn

import fastsae
from fastsae.patch import _tested
from fastsae.patch._adapter import changed
from fastsae.patch.dictionary_learning import train

dictionary_learning = load("dictionary_learning", "dictionary-learning")
from dictionary_learning.dictionary import AutoEncoder  # noqa: E402
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer  # noqa: E402
from dictionary_learning.trainers.gdm import GatedSAETrainer  # noqa: E402
from dictionary_learning.trainers.jumprelu import JumpReluTrainer  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer  # noqa: E402
from dictionary_learning.trainers.p_anneal import PAnnealTrainer  # noqa: E402
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer  # noqa: E402

# ---------------------------------------------------------------- trainers

LR = 1e-3
BASE: dict[str, Any] = {"steps": 1000, "activation_dim": D, "dict_size": F, "layer": 0, "lm_name": "m", "device": "cpu", "lr": LR}
TOP: dict[str, Any] = {"k": K, "threshold_start_step": 1}
TRAINERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "TopK": (TopKTrainer, TOP),
    "TopK, no AuxK": (TopKTrainer, {**TOP, "auxk_alpha": 0}),
    "BatchTopK": (BatchTopKTrainer, TOP),
    "Matryoshka": (MatryoshkaBatchTopKTrainer, {**TOP, "group_fractions": [0.25, 0.25, 0.5], "group_weights": [0.5, 0.3, 0.2]}),
    "JumpReLU": (JumpReluTrainer, {"sparsity_warmup_steps": 2}),
    "Standard": (StandardTrainer, {"sparsity_warmup_steps": 2, "resample_steps": 50}),
    "Standard, April update": (StandardTrainerAprilUpdate, {"sparsity_warmup_steps": 2}),
    "Gated": (GatedSAETrainer, {"sparsity_warmup_steps": 2}),
}


def trainer(name: str, sparse: bool) -> Any:
    cls, options = TRAINERS[name]
    torch.manual_seed(0)
    made = cls(**{**BASE, "warmup_steps": 1, **options})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter, p in made.ae.named_parameters():
            if p.dim() == 1:
                p.copy_(torch.randn(p.shape, generator=generator) / 10)
            if parameter in ("encoder.bias", "b_enc", "gate_bias") and sparse and "TopK" not in name and name != "Matryoshka":
                p.sub_(0.25 if "Standard" in name else 2.0)
            if parameter == "threshold":
                p.copy_(torch.rand(F, generator=generator) / 20 - 0.01)
    if hasattr(made, "bandwidth"):
        made.bandwidth = 0.04  # thresholds below 0, below half of it and above
    if hasattr(made, "dead_feature_threshold"):
        made.dead_feature_threshold = 2 * ROWS
    return made


@pytest.mark.parametrize("sparse", [True, False], ids=["few fire", "many fire"])
@pytest.mark.parametrize("name", TRAINERS)
def test_updates(name: str, sparse: bool) -> None:
    mine, theirs = fastsae.accelerate(trainer(name, sparse)), trainer(name, sparse)
    by_threshold = name in ("JumpReLU", "Standard", "Gated")
    fused = 0
    for step in range(5):
        x = rows(seed=10 + step)
        if by_threshold:
            assert (train.why_not_fused(mine, x) is None) == sparse, "which way is tested"
        fused += train.why_not_fused(mine, x) is None
        a, b = mine.update(step, x), theirs.update(step, x)
        assert (a is None) == (b is None)
        if b is not None:
            assert a == pytest.approx(b, rel=5e-6)
        for (parameter, p), q in zip(mine.ae.named_parameters(), theirs.ae.parameters()):
            assert p.shape == q.shape
            assert float((p - q).detach().abs().max()) <= 0.1 * LR, parameter
            if not mine.optimizer.state[p] and not theirs.optimizer.state[q]:
                continue
            for moment in ("exp_avg", "exp_avg_sq"):
                same(mine.optimizer.state[p][moment], theirs.optimizer.state[q][moment], of=3e-5)
        for p, q in zip(mine.ae.buffers(), theirs.ae.buffers()):
            torch.testing.assert_close(p, q, rtol=5e-6, atol=0)
        for counter in ("num_tokens_since_fired", "steps_since_active"):
            if getattr(theirs, counter, None) is not None:
                assert torch.equal(getattr(mine, counter), getattr(theirs, counter))
        assert mine.get_logging_parameters().keys() == theirs.get_logging_parameters().keys()
        for logged, value in theirs.get_logging_parameters().items():
            got = float(torch.as_tensor(mine.get_logging_parameters()[logged]))
            assert got == pytest.approx(float(torch.as_tensor(value).detach()), rel=1e-5), logged
        assert mine.scheduler.get_last_lr() == theirs.scheduler.get_last_lr()
    if name != "Standard, April update" and (sparse or not by_threshold):
        assert fused == 5
    if "TopK" in name and "no" not in name:
        assert theirs.dead_features > 0, "AuxK took part"
    if name != "TopK, no AuxK":  # the library's logging fails there
        log = mine.loss(rows(), step=9, logging=True)
        same(log.f, theirs.loss(rows(), step=9, logging=True).f, of=1e-3)
    assert fastsae.restore(mine) is mine and type(mine) is TRAINERS[name][0] and type(mine.ae) is type(theirs.ae)
    mine.update(5, rows())
    theirs.update(5, rows())
    for p, q in zip(mine.ae.parameters(), theirs.ae.parameters()):
        assert float((p - q).detach().abs().max()) <= 0.1 * LR


@pytest.mark.parametrize("name", ["TopK", "BatchTopK", "Standard", "Gated"])  # others fail by themselves
def test_under_other_settings(name: str) -> None:
    x = rows()

    def use(made: Any) -> list[Tensor]:
        made.update(0, x)
        return [made.ae.encode(x).detach(), made.ae(x).detach(), *(p.detach() for p in made.ae.parameters())]

    works_under_settings(lambda fast: fastsae.accelerate(trainer(name, True)) if fast else trainer(name, True), use)


BF16 = [(name, dtype) for dtype in (torch.float32, torch.bfloat16) for name in TRAINERS if name != "Standard, April update"]


@pytest.mark.parametrize(("name", "dtype"), BF16, ids=str)
def test_updates_under_autocast(name: str, dtype: torch.dtype) -> None:
    """Losses and moments within the rounding of bfloat16 of the library's own, which selects by rounded scores; and as near as those to a
    step in float32."""
    made = [fastsae.accelerate(trainer(name, True)), trainer(name, True), trainer(name, True)]
    for step in range(2):
        x, losses = rows(600, seed=10 + step).to(dtype), []
        for one, low in zip(made, (True, True, False), strict=True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
                assert one is not made[0] or train.why_not_fused(one, x) is None
                losses.append(one.update(step, x if low else x.float()))
        assert losses[1] is None or losses[0] == pytest.approx(losses[1], rel=5e-3)
    for p, *others in zip(*(one.ae.parameters() for one in made), strict=True):
        a, b, c = (one.optimizer.state[q]["exp_avg"].double() for one, q in zip(made, (p, *others), strict=True))
        assert float((a - b).norm() / b.norm()) < 0.1
        assert float((a - c).norm()) < 1.2 * float((b - c).norm()) + 0.015 * float(c.norm())  # a latent that flips in one of them
        assert p.dtype is torch.float32 and p.grad is None


def test_weights_are_laid_out_feature_major_and_files_stay(tmp_path: Path) -> None:
    mine = fastsae.accelerate(trainer("TopK", True))
    before = {name: tensor.shape for name, tensor in mine.ae.state_dict().items()}
    parameters = list(mine.ae.parameters())
    mine.update(0, rows())
    assert all(p is q for p, q in zip(parameters, mine.ae.parameters()))
    assert {name: tensor.shape for name, tensor in mine.ae.state_dict().items()} == before
    assert mine.ae.decoder.weight.T.is_contiguous() and mine.ae.encoder.weight.is_contiguous()
    torch.save({name: tensor.cpu() for name, tensor in mine.ae.state_dict().items()}, tmp_path / "ae.pt")
    same(AutoEncoderTopK.from_pretrained(tmp_path / "ae.pt")(rows()), mine.ae(rows()))
    # The optimiser's state goes on in another trainer, whatever the layout there.
    other = trainer("TopK", True)
    other.ae.load_state_dict(mine.ae.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(mine.optimizer.state_dict()))
    other.scheduler.load_state_dict(mine.scheduler.state_dict())
    other.num_tokens_since_fired.copy_(mine.num_tokens_since_fired)
    twin = fastsae.accelerate(copy.deepcopy(other))
    for made in (mine, other, twin):
        made.update(1, rows(seed=3))
    for p, q, r in zip(mine.ae.parameters(), other.ae.parameters(), twin.ae.parameters()):
        assert float((p - q).detach().abs().max()) <= 0.1 * LR
        assert float((p - r).detach().abs().max()) <= 0.1 * LR


def test_train_sae_of_accelerated_trainers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The documented way: a function in the place of the trainer's class."""
    from dictionary_learning.training import trainSAE

    fused: list[int] = []
    monkeypatch.setitem(train.STEPS, "TopKTrainer", lambda *args, own=train.STEPS["TopKTrainer"]: fused.append(1) or own(*args))
    config = {"activation_dim": D, "dict_size": F, "k": K, "lr": 1e-3, "layer": 0, "lm_name": "m", "steps": 20, "device": "cpu", "seed": 0}
    config["warmup_steps"] = 2
    for name, cls in (("mine", lambda **more: fastsae.accelerate(TopKTrainer(**more))), ("theirs", TopKTrainer)):
        data = [rows(seed=i) for i in range(12)]
        trainSAE(data, [{"trainer": cls, **config}], steps=10, save_dir=str(tmp_path / name), save_steps=[5], device="cpu")
    assert len(fused) == 10
    for file in ("ae.pt", "checkpoints/ae_5.pt"):
        mine, theirs = (torch.load(tmp_path / name / "trainer_0" / file) for name in ("mine", "theirs"))
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert float((mine[name] - theirs[name]).abs().max()) < 1e-5, name
    assert (tmp_path / "mine/trainer_0/config.json").read_text() == (tmp_path / "theirs/trainer_0/config.json").read_text()


def test_features_that_are_not_unit_get_the_librarys_projection() -> None:
    mine, theirs = fastsae.accelerate(trainer("TopK", True)), trainer("TopK", True)
    with torch.no_grad():
        for made in (mine, theirs):
            made.ae.decoder.weight.mul_(1 + torch.arange(F) / 10)
    mine.update(1, rows())
    theirs.update(1, rows())
    same(mine.optimizer.state[mine.ae.decoder.weight]["exp_avg"], theirs.optimizer.state[theirs.ae.decoder.weight]["exp_avg"])
    same(mine.ae.decoder.weight, theirs.ae.decoder.weight, of=1e-3 * LR)


def _tried(made: Any, x: Tensor) -> Any:
    try:
        return made.update(1, x)
    except (RuntimeError, KeyError):
        return None


class AnnealingTrainer(TopKTrainer):
    """What the main branch calls TopKTrainer, under the release's version: k falls linearly from the dimension."""

    def __init__(self, *args: Any, k_anneal_steps: int, **options: Any):
        super().__init__(*args, **options)
        self.k_anneal_steps = k_anneal_steps

    def update(self, step: int, x: Tensor) -> Any:
        loss = super().update(step, x)
        share = min(step / self.k_anneal_steps, 1)
        self.ae.k.fill_(int(self.ae.activation_dim * (1 - share) + self.k * share))
        return loss


AnnealingTrainer.__module__, AnnealingTrainer.__qualname__ = TopKTrainer.__module__, TopKTrainer.__qualname__


def test_an_update_that_was_not_tested_is_the_librarys() -> None:
    made = [
        AnnealingTrainer(**{**BASE, "steps": 40, "activation_dim": 16, "k": 4, "warmup_steps": 2, "seed": 0}, k_anneal_steps=20)
        for _ in "ab"
    ]
    mine, theirs = fastsae.accelerate(made[0]), made[1]
    ks: list[int] = []
    for step in range(30):
        with (
            pytest.warns(UserWarning, match="update of .*Trainer, or what it calls, is not that") if step == 0 else contextlib.nullcontext()
        ):
            mine.update(step, rows(32, width=16, seed=step))
        theirs.update(step, rows(32, width=16, seed=step))
        ks.append(int(mine.ae.k))
    assert ks[::3] == [16, 14, 12, 10, 8, 7, 5, 4, 4, 4]
    assert fastsae.report(mine).now.keys() == {"update"} and fastsae.report(mine.ae).accelerated
    for p, q in zip(mine.ae.parameters(), theirs.ae.parameters()):
        assert float((p - q).detach().abs().max()) <= 0.1 * LR


class MainTrainer(TopKTrainer):
    """The main branch's own way: a method that its ``update`` calls last."""

    k_anneal_steps = 20

    def update_annealed_k(self, step: int, activation_dim: int, k_anneal_steps: int | None = None) -> None:
        share = min(step / (k_anneal_steps or 1), 1)
        self.ae.k.fill_(int(activation_dim * (1 - share) + self.k * share))

    def update(self, step: int, x: Tensor) -> Any:
        loss = super().update(step, x)
        self.update_annealed_k(step, self.ae.activation_dim, self.k_anneal_steps)
        return loss


MainTrainer.__module__, MainTrainer.__qualname__ = TopKTrainer.__module__, TopKTrainer.__qualname__


def test_the_main_branchs_annealing_of_k_in_our_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsae.patch._adapter._untested", lambda *asked: _tested.fingerprint(*asked) and None)  # main's own was tested
    mine, theirs = (MainTrainer(**{**BASE, "steps": 40, "activation_dim": 16, "k": 4, "warmup_steps": 2, "seed": 0}) for _ in "ab")
    assert not fastsae.report(fastsae.accelerate(mine)).now
    ks: list[int] = []
    for step in range(30):
        for each in (mine, theirs):
            each.update(step, rows(32, width=16, seed=step))
        ks.append(int(mine.ae.k))
    assert ks[::3] == [16, 14, 12, 10, 8, 7, 5, 4, 4, 4]
    for p, q in zip(mine.ae.parameters(), theirs.ae.parameters()):
        assert float((p - q).detach().abs().max()) <= 0.1 * LR


def test_methods_are_those_of_the_tested_release(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CLASSES:
        assert changed(make(name), "encode", "decode", "forward") is None, (
            f"the methods of {name} are other ones: test them, then note them"
        )
    for name in TRAINERS:
        assert changed(trainer(name, True), "update") is None, name
    mine, theirs = fastsae.accelerate(trainer("BatchTopK", True)), trainer("BatchTopK", True)
    was = BatchTopKTrainer.get_auxiliary_loss
    monkeypatch.setattr(BatchTopKTrainer, "get_auxiliary_loss", lambda self, *acts: 1 + was(self, *acts))
    assert "update of BatchTopKTrainer, or what it calls, is not that of dictionary-learning 0.1.0" in fastsae.report(mine).now["update"]
    with pytest.warns(UserWarning, match="is not that of dictionary-learning"):
        assert mine.update(1, rows()) == pytest.approx(theirs.update(1, rows()), rel=1e-5)
    monkeypatch.undo()
    assert not fastsae.report(mine).now


REASONS = [
    "optimiser", "hook", "frozen", "gradient", "autocast", "loss", "dtype", "custom", "auxiliary", "encode", "forward", "step", "computed",
]  # fmt: skip


@pytest.mark.parametrize("reason", REASONS)
def test_what_needs_the_librarys_own_update_gets_it_and_is_reported(reason: str) -> None:
    mine, theirs = trainer("TopK", True), trainer("TopK", True)
    for made in (mine, theirs):
        if reason == "optimiser":
            made.optimizer = torch.optim.SGD(made.ae.parameters(), lr=LR)
        if reason == "hook":
            made.ae.decoder.register_forward_hook(lambda module, args, out: out * 1.5)
        if reason == "frozen":
            made.ae.b_dec.requires_grad_(False)
        if reason == "gradient":
            made.ae.b_dec.grad = torch.ones(D)
        if reason == "loss":
            made.loss = lambda x, step, made=made: 2 * type(made).loss(made, x, step=step)
        if reason == "auxiliary":
            made.get_auxiliary_loss = lambda *acts, made=made: 2 * type(made).get_auxiliary_loss(made, *acts)
        if reason == "encode":
            made.ae.encode = lambda x, ae=made.ae, **options: type(ae).encode(ae, 2 * x, **options)
        if reason == "forward":
            made.ae.encoder.forward = lambda x, was=made.ae.encoder.forward: 2 * was(x)
        if reason == "step":
            made.optimizer.step = lambda: None  # pyright: ignore[reportAttributeAccessIssue]  (replaced in the instance)
        if reason == "computed":
            nn.utils.parametrizations.weight_norm(made.ae.decoder)
            made.optimizer = torch.optim.Adam(made.ae.parameters(), lr=LR)
        if reason == "custom":
            made.ae = type("Own", (AutoEncoderTopK,), {})(D, F, K)
            made.ae.load_state_dict(trainer("TopK", True).ae.state_dict())
            made.optimizer = torch.optim.Adam(made.ae.parameters(), lr=LR)
    fastsae.accelerate(mine)
    x = rows().double() if reason == "dtype" else rows()
    with warnings.catch_warnings(record=True) as said, torch.autocast("cpu", dtype=torch.float16, enabled=reason == "autocast"):
        warnings.simplefilter("always")
        a, b = (_tried(made, x) for made in (mine, theirs))
    assert any("runs as without fastsae" in str(warning.message) for warning in said)
    assert (a is None) == (b is None)
    if b is not None:
        assert a == pytest.approx(b, rel=2e-2 if reason == "autocast" else 1e-5)
        for p, q in zip(mine.ae.parameters(), theirs.ae.parameters()):
            assert float((p - q).detach().abs().max()) <= (2.1 if reason == "autocast" else 0.1) * LR
    if reason not in ("autocast", "dtype", "gradient"):
        assert "update" in fastsae.report(mine).now


@given(data=st.data())
def test_the_auxk_preset_is_the_librarys(data: st.DataObject) -> None:
    sae, x, dead, (term, gradients) = aux_regime(data, fastsae.AuxK.dictionary_learning(coefficient=0.5))
    made = TopKTrainer(**{**BASE, "activation_dim": sae.d_in, "dict_size": sae.d_sae, "k": int(sae.k), "warmup_steps": 1})
    ae = made.ae.double()
    made.num_tokens_since_fired[dead] = made.dead_feature_threshold
    with torch.no_grad():
        ae.encoder.weight.copy_(sae.W_enc)
        ae.encoder.bias.copy_(sae.b_enc)
        ae.decoder.weight.copy_(sae.W_dec.T)
        ae.b_dec.copy_(sae.b_dec)
    f, _, _, acts = ae.encode(x, return_topk=True)
    loss = 0.5 * made.get_auxiliary_loss((x - ae.decode(f)).detach(), acts)
    if x.shape[0] == 1 and dead.any():  # no variance to divide by: 0 here, the largest float32 there, and no gradient
        assert term == 0 and loss > 1e38
        return
    torch.testing.assert_close(term.float(), loss.detach().float(), rtol=1e-5, atol=1e-6)  # theirs is in float32
    if dead.any():
        loss.backward()
        theirs = {"W_enc": ae.encoder.weight, "b_enc": ae.encoder.bias, "W_dec": ae.decoder.weight, "b_dec": ae.b_dec}
        for name, p in theirs.items():
            gradient = gradients[name].T if name == "W_dec" else gradients[name]
            torch.testing.assert_close(gradient, p.grad, rtol=1e-5, atol=1e-6)


def test_trainers_that_are_left_alone_give_a_reason() -> None:
    torch.manual_seed(0)
    made = PAnnealTrainer(**{**BASE, "sparsity_warmup_steps": 2, "warmup_steps": 1})
    fastsae.accelerate(made)
    assert type(made) is PAnnealTrainer and fastsae.report(made.ae).accelerated
    assert "changes form" in fastsae.report(made).left["update"]
    made.update(0, rows())
    fastsae.restore(made)
    assert type(made.ae) is AutoEncoder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TopK", "BatchTopK", "Matryoshka", "Standard"])
def test_real_activations(name: str, tmp_path: Path) -> None:
    x = minilm_rows(tmp_path)
    made = []
    for _ in range(3):
        torch.manual_seed(0)
        cls, options = TRAINERS[name]
        made.append(cls(**{**BASE, "warmup_steps": 1, **options, "activation_dim": x.shape[1], "dict_size": 1024}))
    mine, theirs, exact = fastsae.accelerate(made[0]), made[1], made[2]
    exact.ae.double()  # the library's own step without rounding: in float32 its Matryoshka moves 0.04 % of W_enc the other way
    for step, part in enumerate(x[:256].split(64)):
        a, b = mine.update(step, part), theirs.update(step, part)
        exact.update(step, part.double())
        assert b is None or a == pytest.approx(b, rel=1e-5)
    for p, q in zip(mine.ae.parameters(), exact.ae.parameters()):
        off = (p.double() - q).detach().abs() > 0.1 * LR
        assert float(off.double().mean()) < 1e-4  # an entry of a gradient that is all rounding moves by lr either way
    with torch.no_grad():
        f, g = mine.ae.encode(x), exact.ae.encode(x.double())
        differ = (f != 0) != (g != 0)
        assert float(differ.double().mean()) < 1e-5  # scores within rounding of each other
        same(mine.ae(x), exact.ae(x.double()).float(), of=1e-3)
