"""``accelerate`` against the real SAELens: training steps with hooks, under autocast, with any optimiser, in half precision; the synthetic
runner."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from peers import load, same
from saelens_cases import ROWS, D, F, rows, same_trainers, trainer_of
from torch import Tensor

import fastsae
from fastsae.patch import saelens

sae_lens = load("sae_lens", "sae-lens")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
POINTS = ("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("TopKTrainingSAE", {}),
    "matryoshka": ("MatryoshkaBatchTopKTrainingSAE", {}),
    "standard": ("StandardTrainingSAE", {"shift": 2.5}),
    "gated, many fire": ("GatedTrainingSAE", {}),
    "jumprelu": ("JumpReLUTrainingSAE", {"shift": 2.0, "jumprelu_bandwidth": 0.5}),
}


TERMS = {
    "jumprelu_bandwidth": 0.5, "l0_coefficient": 0.3, "l0_warm_up_steps": 0, "jumprelu_sparsity_loss_mode": "tanh",
    "pre_act_loss_coefficient": 0.1, "jumprelu_ste_to_input": True,
}  # fmt: skip
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "standard, many fire": ("StandardTrainingSAE", {}),
    "gated": ("GatedTrainingSAE", {"shift": 2.5}),
    "jumprelu, every term": ("JumpReLUTrainingSAE", TERMS | {"shift": 2.0}),
    "jumprelu, many fire, every term": ("JumpReLUTrainingSAE", TERMS),
}


def pair(case: str = "topk", **more: Any) -> tuple[Any, Any]:
    """(accelerated, the library's own)."""
    name, options = (CASES | MORE)[case]
    return fastsae.accelerate(trainer_of(name, **options, **more)), trainer_of(name, **options, **more)


@pytest.fixture
def autograd(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for every step that was not by hand."""
    calls: list[int] = []
    own = saelens._train._autograd
    monkeypatch.setattr(saelens._train, "_autograd", lambda *args: calls.append(1) or own(*args))
    return calls


@pytest.mark.parametrize("case", CASES)
def test_hooks_that_read_see_what_the_library_shows(case: str, autograd: list[int]) -> None:
    mine, theirs = pair(case)
    seen: list[list[tuple[str, Tensor]]] = []
    for trainer in (mine, theirs):
        own: list[tuple[str, Tensor]] = []
        seen.append(own)
        for name in POINTS:
            trainer.sae.add_hook(name, lambda given, hook, name=name, own=own: own.append((name, given.detach().clone())))
    for step in range(4):
        outs = [trainer.step(rows(seed=step)) for trainer in (mine, theirs)]
        same(outs[0].feature_acts.detach(), outs[1].feature_acts.detach())
    assert not autograd and [name for name, _ in seen[0]] == [name for name, _ in seen[1]]
    for (name, a), (_, b) in zip(*seen, strict=True):
        same(a, b)
        assert a.dtype is b.dtype, name
    same_trainers(mine, theirs)


def _scaled(given: Tensor, hook: Any) -> Tensor:
    return given * 0.9


def _in_place(given: Tensor, hook: Any) -> None:
    with torch.no_grad():
        given.mul_(0.9)


def _grown(given: Tensor, hook: Any, calls: list[int]) -> Tensor | None:
    calls.append(1)
    return given * 0.5 if len(calls) > 2 else None


WRITERS: dict[str, Callable[[Any, str, list[int]], None]] = {
    "scales": lambda sae, name, calls: sae.add_hook(name, _scaled),
    "in place": lambda sae, name, calls: sae.add_hook(name, _in_place),
    "from its third call on": lambda sae, name, calls: sae.add_hook(name, lambda given, hook: _grown(given, hook, calls)),
    "by a parameter": lambda sae, name, calls: sae.add_hook(name, lambda given, hook: given * sae.b_dec.square().sum()),
    "a gradient": lambda sae, name, calls: sae.add_hook(name, lambda given, hook: given.register_hook(lambda g: g * 2) and None),
}


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("what", WRITERS)
def test_hooks_that_write(what: str, name: str) -> None:
    if what == "a gradient" and name == "hook_sae_input":
        pytest.skip("the library's own input asks for no gradient")
    if what == "in place" and name != "hook_sae_input":
        pytest.skip("the library's own autograd needs what the hook overwrites") if name == "hook_sae_acts_post" else None
    mine, theirs = pair("topk" if name != "hook_sae_acts_pre" else "standard")
    calls: list[list[int]] = [[], []]
    for trainer, own in zip((mine, theirs), calls):
        WRITERS[what](trainer.sae, name, own)
    for step in range(5):
        x = rows(seed=step)
        outs = [trainer.step(x.clone()) for trainer in (mine, theirs)]
        same(outs[0].loss.detach(), outs[1].loss.detach())
    assert len(calls[0]) == len(calls[1]), "a hook was called twice"
    same_trainers(mine, theirs)


def test_hooks_that_come_and_go(autograd: list[int]) -> None:
    mine, theirs = pair()
    for trainer in (mine, theirs):
        trainer.step(rows())
        trainer.sae.add_hook("hook_sae_acts_post", _scaled)
        trainer.step(rows(seed=1))
        trainer.sae.reset_hooks()
        trainer.sae.add_hook("hook_sae_acts_post", lambda given, hook: None)
        trainer.step(rows(seed=2))
    assert len(autograd) == 1
    same_trainers(mine, theirs)


def _autocast(*enabled: bool) -> ExitStack:
    stack = ExitStack()
    for on in enabled:
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=on))
    return stack


BF16: dict[str, tuple[Callable[[], ExitStack], dict[str, Any], float]] = {
    "the trainer's": (_autocast, {"trainer": {"autocast": True}}, 0.1),
    "outside": (lambda: _autocast(True), {}, 0.1),
    "nested, off": (lambda: _autocast(True, False), {}, 1e-4),
    "the trainer's, off outside": (lambda: _autocast(False), {"trainer": {"autocast": True}}, 0.1),
    "weights": (_autocast, {"dtype": "bfloat16"}, 0.25),
}


STEPS = [(case, where) for where in BF16 for case in (CASES | MORE if where == "the trainer's" else ("topk", "matryoshka"))]


@pytest.mark.parametrize(("case", "where"), STEPS)
def test_steps_in_bfloat16(case: str, where: str, autograd: list[int]) -> None:
    """Moments within the rounding of bfloat16 of the library's own."""
    context, settings, bound = BF16[where]
    mine, theirs = pair(case, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(2):
            for trainer in (mine, theirs):
                with context():
                    out = trainer.step(rows(seed=step).to(trainer.sae.dtype))
                assert out.sae_out.dtype is trainer.sae.dtype and out.feature_acts.dtype is trainer.sae.dtype
    assert not autograd
    assert any("steps on dense gradients: a parameter is bfloat16" in str(w.message) for w in caught) == (where == "weights")
    for (name, p), q in zip(mine.sae.named_parameters(), theirs.sae.parameters(), strict=True):
        a, b = (trainer.optimizer.state[r]["exp_avg"].double() for trainer, r in ((mine, p), (theirs, q)))
        assert float((a - b).norm() / b.norm()) < bound and p.dtype is q.dtype and p.grad is None, name


OPTIMISERS: dict[str, Callable[[Any], Any]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "Adam, decoupled": lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.1, decoupled_weight_decay=True),
    "Adam, decay": lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.1),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", OPTIMISERS)
def test_any_optimiser_steps_on_gradients_by_hand(kind: str, case: str, autograd: list[int]) -> None:
    mine, theirs = pair(case)
    for trainer in (mine, theirs):
        trainer.optimizer = OPTIMISERS[kind](trainer.sae.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            for trainer in (mine, theirs):
                trainer.step(rows(seed=step))
    dense = [str(w.message) for w in caught if "SAETrainer steps on dense gradients" in str(w.message)]
    assert not autograd and len(dense) == (0 if kind in ("AdamW", "Adam, decoupled") else 1)
    for (name, p), q in zip(mine.sae.named_parameters(), theirs.sae.parameters(), strict=True):
        moved = (p - q).detach().abs()
        assert p.grad is None and float((moved > 2e-6).double().mean()) < 1e-3 and float(moved.max()) < 1e-4, name


def test_copies_go_on_and_states_load() -> None:
    mine, theirs = pair("standard")
    for trainer in (mine, theirs):
        trainer.data_provider = None
        trainer.step(rows())
    other = copy.deepcopy(mine)
    assert fastsae.report(other).accelerated
    for trainer in (other, theirs):
        trainer.step(rows(seed=1))
    same_trainers(other, theirs)
    for trainer, source in ((other, theirs), (theirs, other)):  # each goes on from the other's state
        trainer.sae.load_state_dict(copy.deepcopy(source.sae.state_dict()))
        trainer.optimizer.load_state_dict(copy.deepcopy(source.optimizer.state_dict()))
    for trainer in (other, theirs):
        trainer.step(rows(seed=2))
    same_trainers(other, theirs)


def test_under_no_grad() -> None:
    for trainer in pair("standard"):
        with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
            trainer.step(rows())


def test_the_synthetic_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_lens.config import LoggingConfig
    from sae_lens.synthetic import synthetic_sae_runner as module
    from sae_lens.synthetic.synthetic_model import SyntheticModel, SyntheticModelConfig

    steps: list[str] = []
    own = saelens._train._fused
    monkeypatch.setattr(saelens._train, "_fused", lambda trainer, *args: steps.append(type(trainer).__name__) or own(trainer, *args))
    trained = []
    for accelerated in (True, False):
        torch.manual_seed(0)
        model = SyntheticModel(SyntheticModelConfig(num_features=F, hidden_dim=D), device="cpu")
        name, options = CASES["topk"]
        sae = trainer_of(name, **options).sae
        config = module.SyntheticSAERunnerConfig(
            synthetic_model=model.cfg, sae=sae.cfg, training_samples=5 * ROWS, batch_size=ROWS, eval_samples=ROWS, device="cpu",
            logger=LoggingConfig(log_to_wandb=False), output_path=None, lr=1e-3,
        )  # fmt: skip
        runner = module.SyntheticSAERunner(config, override_synthetic_model=model, override_sae=sae)
        made = module.SAETrainer
        if accelerated:
            assert "trainer made in run" in fastsae.report(fastsae.accelerate(runner)).replaced["run"]
        torch.manual_seed(1)
        result = runner.run()
        assert module.SAETrainer is made and result.sae is sae and result.final_eval is not None
        trained.append(sae)
        assert steps == ["SAETrainer"] * 5
        fastsae.restore(runner)
        assert type(runner) is module.SyntheticSAERunner
    for p, q in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        assert float((p - q).detach().abs().max()) < 1e-4
