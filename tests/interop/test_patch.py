"""The frame of ``accelerate`` on a library made up here, and Adam's step on torch's own optimiser state. Needs no peer library."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import fastsae
from fastsae import patch
from fastsae.gradients import Gradient, RowGradient, TiledGradient, densify
from fastsae.patch import _adam
from fastsae.patch._adapter import LIBRARIES, Adapter, Library, warn_once
from fastsae.patch._tested import fingerprint, shadowed

T = TypeVar("T")


def helper(x: Tensor) -> Tensor:
    return x


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.scale = nn.Parameter(torch.ones(()))

    def encode(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def twice(self, x: Tensor) -> Tensor:
        return self.encode(helper(self.encode(x)[..., :2]))


class Trainer(Generic[T]):
    def __init__(self, sae: Any) -> None:
        self.sae = sae

    def __reduce__(self) -> Any:
        return type(self), (self.sae,), vars(self)

    def step(self) -> str:
        return "plain"


class Left:
    """Nothing of it is replaced."""


class ToyMethods:
    def encode(self: Any, x: Tensor) -> Tensor:
        if getattr(self, "odd", False):
            warn_once(self, "it is odd")
        return super().encode(x) + 1  # pyright: ignore[reportAttributeAccessIssue]


class TrainerMethods(Generic[T]):
    def step(self) -> str:
        return "fast, not " + super().step()  # pyright: ignore[reportAttributeAccessIssue]


def _latents(toy: Any, x: Tensor) -> fastsae.TopKLatents:
    return fastsae.encode_topk(x, toy.layer.weight, k=1)


def _now(toy: Any) -> dict[str, str]:
    return {"encode": "it is odd"} if getattr(toy, "odd", False) else {}


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    adapters = {
        "Toy": Adapter(ToyMethods, {"encode": "one more"}, now=_now, encode=_latents),
        "Trainer": Adapter(TrainerMethods, {"step": "a fast one"}, {"fit": "it calls step"}, parts=lambda t: {"sae": t.sae}),
        "Left": Adapter(None, leaves={"encode": "it is left"}),
    }
    library = Library("torch", "2", "100", {f"{__name__}.{name}": adapter for name, adapter in adapters.items()})
    name = __name__.split(".")[0]
    monkeypatch.setitem(sys.modules, "fastsae.patch.toy", types.ModuleType("fastsae.patch.toy"))
    monkeypatch.setitem(patch._MODULES, name, "fastsae.patch.toy")
    monkeypatch.setitem(LIBRARIES, name, library)
    yield library
    patch._accelerated_class.cache_clear()


def test_one_instance_is_patched_and_restored() -> None:
    toy, other, x = Toy(), Toy(), torch.randn(4, 2)
    before, state = toy.encode(x), dict(vars(toy))
    assert fastsae.accelerate(toy) is toy and torch.equal(toy.encode(x), before + 1)
    assert isinstance(toy, Toy) and type(toy) is not Toy and type(toy).__name__ == "Toy" and type(other) is Toy
    assert torch.equal(toy.twice(x), toy.encode(toy.encode(x)[:, :2]))
    cls = type(toy)
    assert fastsae.accelerate(toy) is toy and type(toy) is cls
    assert list(toy.state_dict()) == list(other.state_dict())
    assert fastsae.restore(toy) is toy and type(toy) is Toy and vars(toy) == state
    assert fastsae.restore(toy) is toy
    with fastsae.accelerated(toy) as given:
        assert given is toy and torch.equal(toy.encode(x), before + 1)
    assert type(toy) is Toy
    with fastsae.accelerated(fastsae.accelerate(toy)):
        pass
    assert torch.equal(toy.encode(x), before + 1)  # it was accelerated before


def test_copies_and_pickles_stay_accelerated() -> None:
    trainer = fastsae.accelerate(Trainer(Toy()))
    x = torch.randn(4, 2)
    for again in (copy.copy(trainer), copy.deepcopy(trainer), pickle.loads(pickle.dumps(trainer)), pickle.loads(pickle.dumps(trainer, 1))):
        assert type(again) is type(trainer) and again.step() == "fast, not plain"
        assert type(again.sae) is type(trainer.sae) and torch.equal(again.sae.encode(x), trainer.sae.encode(x))
        assert fastsae.report(again).accelerated
    fastsae.restore(copy.deepcopy(trainer))
    assert fastsae.report(trainer).accelerated and fastsae.report(trainer.sae).accelerated


def test_parts_go_along() -> None:
    trainer = Trainer(Toy())
    fastsae.accelerate(trainer)
    assert trainer.step() == "fast, not plain" and fastsae.report(trainer.sae).accelerated
    fastsae.restore(trainer)
    assert type(trainer) is Trainer and type(trainer.sae) is Toy
    fastsae.accelerate(trainer.sae)
    fastsae.restore(fastsae.accelerate(trainer))
    assert fastsae.report(trainer.sae).accelerated  # it was before
    odd = fastsae.accelerate(Trainer(nn.Linear(2, 2)))
    assert type(odd.sae) is nn.Linear and "torch.nn.modules.linear.Linear is not a supported class" in fastsae.report(odd).left["sae"]


def test_methods_are_known_by_their_source(monkeypatch: pytest.MonkeyPatch) -> None:
    known = fingerprint(Toy, ("twice",))
    assert known == fingerprint(Toy, ("twice",)) != fingerprint(Toy, ("encode",))
    assert shadowed(Toy(), Toy, ("twice",)) is None
    toy = Toy()
    toy.encode = lambda x: x  # pyright: ignore[reportAttributeAccessIssue]
    toy.note = 1  # pyright: ignore[reportArgumentType]
    assert shadowed(toy, Toy, ("twice",)) == "encode"  # which twice calls
    was = Toy.encode

    @functools.wraps(was)
    def wrapped(self: Toy, x: Tensor) -> Tensor:
        return 2 * was(self, x)

    plain = cast("types.FunctionType", wrapped)
    foreign = types.FunctionType(plain.__code__, {**globals(), "__name__": "elsewhere"}, closure=plain.__closure__)
    foreign.__wrapped__ = was  # pyright: ignore[reportFunctionMemberAccess]
    for other in (wrapped, foreign, torch.nn.Module.train, property(lambda self: 1)):
        monkeypatch.setattr(Toy, "encode", other)
        assert fingerprint(Toy, ("twice",)) != known
    monkeypatch.setattr(Toy, "encode", torch.no_grad()(was))
    assert fingerprint(Toy, ("twice",)) == known  # torch's decorators leave a method what it is
    monkeypatch.undo()
    assert fingerprint(Toy, ("twice",)) == known
    monkeypatch.setattr(f"{__name__}.helper", functools.partial(helper))
    assert fingerprint(Toy, ("twice",)) != known
    monkeypatch.undo()
    assert fingerprint(Toy, ("twice",)) == known
    monkeypatch.setattr(f"{__name__}.helper", lambda x: x + 1)
    assert fingerprint(Toy, ("twice",)) != known
    monkeypatch.undo()
    monkeypatch.setattr(Toy, "twice", lambda self, x: helper(x))
    assert fingerprint(Toy, ("twice",)) != known


def test_layout_comments_and_annotations_are_no_other_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = "class A:\n  def f(self, x: int, y=(1, 2)) -> int:\n    'Adds.'\n    return self.g(x + y[0])\n  def g(self, x): return x\n"
    sources = {
        "known": known,
        "same": "class A:\n  def f(self, x, y=(\n    1,\n    2,  # two\n  )):\n    return self.g((x + y[0]))\n  def g(self, x): return x\n",
        "other": known.replace("y[0]", "y[1]"),
    }
    monkeypatch.syspath_prepend(tmp_path)
    digests = {}
    for name, source in sources.items():
        (tmp_path / f"layout_{name}.py").write_text(source)
        digests[name] = fingerprint(importlib.import_module(f"layout_{name}").A, ("f",))
    assert digests["known"] == digests["same"] != digests["other"]


def test_a_class_that_was_changed_since() -> None:
    toy = fastsae.accelerate(Toy())
    nn.utils.parametrize.register_parametrization(toy, "scale", nn.Identity())
    assert fastsae.report(toy).accelerated and torch.equal(toy.encode(torch.ones(1, 2)), toy.layer(torch.ones(1, 2)) + 1)
    with pytest.raises(RuntimeError, match=r"restore: obj has become a ParametrizedToy since \(a parametrisation\?\); undo that first"):
        fastsae.restore(toy)
    nn.utils.parametrize.remove_parametrizations(toy, "scale")
    assert type(fastsae.restore(toy)) is Toy


def test_report() -> None:
    trainer = Trainer(Toy())
    report = fastsae.report(trainer)
    assert not report.accelerated and report.replaced == {"step": "a fast one", "sae.encode": "one more"}
    assert report.left == {"fit": "it calls step"} and report.now == {}
    assert str(report).splitlines()[0] == f"{__name__}.Trainer (torch {report.library.split()[1]}): not accelerated"
    fastsae.accelerate(trainer).sae.odd = True
    assert fastsae.report(trainer).now == {"sae.encode": "it is odd"} and "dense now  sae.encode: it is odd" in str(fastsae.report(trainer))
    with pytest.warns(UserWarning, match="Toy runs as without fastsae: it is odd"):
        trainer.sae.encode(torch.randn(1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.sae.encode(torch.randn(1, 2))
    left = fastsae.accelerate(Left())
    assert type(left) is Left and fastsae.report(left).left == {"encode": "it is left"}


def test_sparse_latents() -> None:
    toy, x = Toy(), torch.randn(4, 2)
    latents = fastsae.encode(toy, x)
    assert isinstance(latents, fastsae.TopKLatents) and torch.equal(latents.indices[:, 0], (x @ toy.layer.weight.T).argmax(1))
    sae = fastsae.SAE(2, 3, fastsae.TopK(1), seed=0)
    ours, result = fastsae.encode(sae, x), fastsae.reconstruct(sae, x)
    assert isinstance(ours, fastsae.TopKLatents) and torch.equal(ours.values, sae.encode(x).values)
    assert torch.equal(result.x_hat, sae(x).x_hat)
    target = torch.randn(4, 2)
    assert torch.equal(fastsae.reconstruct(sae, x, target=target).squared_error, sae(x, target).squared_error)


def test_errors(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(Toy):
        pass

    known = "Left, Toy, Trainer"
    with pytest.raises(TypeError, match=rf"accelerate: obj must be of a supported class of torch \({known}\), got {__name__}"):
        fastsae.accelerate(Mine())
    Mine.__module__ = "elsewhere"
    with pytest.raises(TypeError, match=r"got elsewhere.*a subclass of Toy: subclasses are left alone"):
        fastsae.accelerate(Mine())
    with pytest.raises(TypeError, match=rf"^accelerate: obj must be an instance, got the class {__name__}.Toy"):
        fastsae.accelerate(Toy)
    with pytest.raises(TypeError, match=r"got fastsae.sae.module.SAE \(made of the fast operations as it is\)"):
        fastsae.accelerate(fastsae.SAE(2, 3, fastsae.TopK(1)))
    with pytest.raises(TypeError, match=r"^encode: sae must be an SAE, trainer or runner .* got builtins.int"):
        fastsae.encode(3, torch.zeros(1, 2))
    for call in (fastsae.accelerate, fastsae.report):
        with pytest.raises(TypeError, match=rf"{call.__name__}: obj must be an SAE, trainer or runner of SAELens, .* got builtins.int"):
            call(3)
    with pytest.raises(TypeError, match="any_version must be a bool, got int"):
        fastsae.accelerate(Toy(), any_version=1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"encode: x must be a torch.Tensor, got int"):
        fastsae.encode(Toy(), 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"encode: packed must be a PackedWeights, got Tensor"):
        fastsae.encode(Toy(), torch.zeros(1, 2), packed=torch.zeros(3, 2))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"encode: packed does not go with Toy"):
        fastsae.encode(Toy(), torch.zeros(1, 2), packed=fastsae.pack(torch.zeros(3, 2)))
    with pytest.raises(TypeError, match=r"encode: Left is not an SAE with a sparse encoder \(it is left\)"):
        fastsae.encode(Left(), torch.zeros(1))
    with pytest.raises(TypeError, match="reconstruct: Trainer is not an SAE with a sparse encoder"):
        fastsae.reconstruct(Trainer(Toy()), torch.zeros(1))
    with pytest.raises(TypeError, match=r"reconstruct: x must be a torch.Tensor, got list"):
        fastsae.reconstruct([1.0], torch.zeros(1), torch.zeros(1), activation=fastsae.ReLU())  # pyright: ignore[reportCallIssue, reportArgumentType]
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.13.0+cpu")
    with pytest.raises(RuntimeError, match=r"torch 1.13.0\+cpu is installed; supported: >= 2, < 100 \(any_version=True goes on"):
        fastsae.accelerate(Toy())
    assert fastsae.report(fastsae.accelerate(Toy(), any_version=True)).accelerated


# ---------------------------------------------------------------- Adam on torch's state

F, D, B, K = 13, 5, 7, 3


def _draw(*shape: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [None, 0.5, 1e6])
def test_adam_is_torchs(dtype: torch.dtype, max_norm: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"slots": (F, D), "stored": (D, F), "tiles": (D, F), "dense": (F, D), "vector": (F,), "cube": (2, 3, 4), "none": (3,)}
    start = {name: _draw(*shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
    mine, theirs = ({name: nn.Parameter(value.clone()) for name, value in start.items()} for _ in range(2))
    mine["frozen"] = nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False)
    a, b = (torch.optim.Adam(list(p.values()), lr=1e-2, betas=(0.8, 0.95), eps=1e-6) for p in (mine, theirs))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.9) for opt in (a, b)]
    assert _adam.refuses(a) is None
    for _ in range(4):
        gradients: dict[Tensor, Gradient | _adam.Feature] = {mine["frozen"]: torch.ones(2, dtype=dtype)}
        for name, p in mine.items():
            if name in ("none", "frozen"):
                continue
            gradient: Gradient = _draw(*p.shape, generator=generator, dtype=dtype)
            theirs[name].grad = gradient
            if name in ("slots", "stored"):
                indices = torch.randint(0, F, (B, K), generator=generator)
                rows = _draw(B, D, generator=generator, dtype=dtype)
                gradient = RowGradient(_draw(B, K, generator=generator, dtype=dtype), indices, None, rows, F)
                whole = densify(gradient)
                theirs[name].grad = whole if name == "slots" else whole.T.contiguous()
            if name == "tiles":
                gradient = TiledGradient(lambda part, g=gradient.T: g[part], F)  # pyright: ignore[reportAttributeAccessIssue]
            gradients[p] = _adam.Feature(gradient) if name in ("stored", "tiles") else gradient
        norm = _adam.step(a, gradients, max_norm)
        if max_norm is not None:
            total = torch.nn.utils.clip_grad_norm_(list(theirs.values()), max_norm)
            assert norm is not None and float(norm) == pytest.approx(float(total), rel=1e-6)
        b.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a scheduler before its optimiser
            for schedule in schedules:
                schedule.step()
    for name, p in theirs.items():
        torch.testing.assert_close(mine[name], p, rtol=1e-5, atol=1e-6)
    left, right = a.state_dict(), b.state_dict()
    assert left["state"].keys() == right["state"].keys()
    for number, state in right["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(left["state"][number][key], value, rtol=1e-5, atol=1e-7)


def test_what_adam_refuses() -> None:
    def made(**options: Any) -> torch.optim.Adam:
        return torch.optim.Adam([nn.Parameter(torch.ones(2))], **options)

    assert _adam.refuses(torch.optim.SGD([nn.Parameter(torch.ones(1))])) == "the optimiser is torch.optim.sgd.SGD, not torch.optim.Adam"
    assert _adam.refuses(made(weight_decay=0.1)) == "the optimiser's weight_decay is 0.1"
    assert _adam.refuses(made(amsgrad=True)) == "the optimiser's amsgrad is True"
    assert _adam.refuses(made(lr=torch.tensor(0.1))) == "the optimiser's learning rate or betas are tensors"
    half = torch.optim.Adam([nn.Parameter(torch.ones(2, dtype=torch.bfloat16))])
    assert _adam.refuses(half) == "a parameter is bfloat16 (supported: float32, float64)"
    hooked = made()
    hooked.register_step_pre_hook(lambda *_: None)
    assert _adam.refuses(hooked) == "the optimiser has step hooks"
    scheduled = made()
    for _ in range(2):
        torch.optim.lr_scheduler.ConstantLR(scheduled)  # wraps its step
    assert _adam.refuses(scheduled) is None and _adam.refuses(copy.deepcopy(scheduled)) is None
    scheduled.step = lambda: None  # pyright: ignore[reportAttributeAccessIssue]  (replaced in the instance)
    assert _adam.refuses(scheduled) == "the optimiser's step was replaced in the instance"
    handle = register_optimizer_step_post_hook(lambda *_: None)
    try:
        assert _adam.refuses(made()) == "the optimiser has step hooks"
    finally:
        handle.remove()
    assert _adam.refuses(made()) is None
    p = nn.Parameter(torch.ones(2))
    p.register_hook(lambda g: g)
    assert _adam.refuses(torch.optim.Adam([p])) == "a parameter has gradient hooks"
