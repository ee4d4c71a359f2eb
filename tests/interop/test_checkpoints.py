"""States of another model, optimiser or trainer, and damaged ones, change nothing."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from file_cases import DEEP, D, F, adam, full, rows, tree
from torch import Tensor

from fastsae import SAE, AuxK, BatchTopK, Gated, JumpReLU, ReLU, SAEs, TopK, load_checkpoint, optim, save_checkpoint
from fastsae.trainer import Batches, Trainer

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # is called, which the counting tests see; no power fails here


# ---------------------------------------------------------------- checkpoints of another model

BASE: dict[str, Any] = {"d_in": D, "d_sae": F, "activation": TopK(3)}
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # (of the file, of the module)
    "pre_bias": ({}, {"pre_bias": False}),
    "tied": ({"tied": True}, {}),
    "untied": ({}, {"tied": True}),
    "prefixes": ({}, {"prefixes": [4, F]}),
    "other prefixes": ({"prefixes": [5, F]}, {"prefixes": [4, F]}),
    "objective": ({}, {"objective": "fvu"}),
    "dtype": ({}, {"dtype": torch.bfloat16}),
    "wider": ({"dtype": torch.float64}, {}),
    "d_in": ({"d_in": D + 1}, {}),
    "d_sae": ({}, {"d_sae": F + 1}),
    "relu": ({"activation": TopK(3, relu=False)}, {}),
    "activation": ({"activation": ReLU()}, {}),
    "to gated": ({}, {"activation": Gated()}),
    "transcoder": ({"d_out": D}, {}),
    "skip": ({"d_out": D, "skip": True}, {"d_out": D}),
    "normalise_decoder": ({}, {"normalise_decoder": False}),
}


def state_of(*parts: Any) -> str:
    return repr([(type(part).__name__, None if part is None else copy.deepcopy(part.state_dict())) for part in parts])


def made(options: dict[str, Any], seed: int) -> SAE:
    return SAE(**{**BASE, **options}, seed=seed)


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_model_changes_nothing(name: str, tmp_path: Path) -> None:
    held, ours = (made(options, seed) for seed, options in enumerate(OTHERS[name]))
    path = save_checkpoint(tmp_path / "x.pt", held)
    before = state_of(ours)
    with pytest.raises(ValueError, match=r"^load_checkpoint: .*x.pt is damaged or of something else: it holds "):
        load_checkpoint(path, ours)
    assert state_of(ours) == before
    with pytest.raises(ValueError, match="it holds"):
        load_checkpoint(path, SAEs([ours]))
    save_checkpoint(path, SAEs([made({}, 0), made({}, 1)]))
    with pytest.raises(ValueError, match="it holds 2 dictionaries, the module is SAE"):
        load_checkpoint(path, ours)


def test_what_a_module_keeps_of_its_own(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "x.pt", made({"l1": 0.1, "dead_after": 5, "aux": AuxK(3), "activation": TopK(5)}, 0))
    sae = load_checkpoint(path, made({"l1": 0.2}, 1)).sae
    assert (sae.l1, sae.dead_after, sae.aux, sae.k) == (0.2, 10_000_000, None, 5)
    assert torch.equal(sae.W_enc, made({}, 0).W_enc)


def stepped(opt: Any, sae: SAE) -> Any:
    sae.loss(rows()).loss.backward()
    opt.step()
    return opt


def groups(sae: SAE) -> torch.optim.Optimizer:
    parameters = list(sae.parameters())
    return torch.optim.Adam([{"params": parameters[:2]}, {"params": parameters[2:]}])


WRONG: dict[str, tuple[Callable[[SAE], Any], Callable[[SAE], Any], str]] = {  # (of the file, ours, message)
    "none": (lambda sae: None, adam, "holds no optimiser's state"),
    "fused for torch's": (lambda sae: optim.Adam(sae), adam, "does not fit Adam: KeyError"),
    "torch's for fused": (lambda sae: stepped(adam(sae), sae), optim.Adam, "not a state of fastsae.optim.Adam"),
    "adam for sgd": (lambda sae: stepped(adam(sae), sae), lambda sae: torch.optim.SGD(sae.parameters()), "does not fit SGD: it is of Adam"),
    "sgd for adam": (lambda sae: torch.optim.SGD(sae.parameters()), adam, "does not fit Adam: it is of SGD"),
    "another order": (lambda sae: stepped(adam(sae, -1), sae), adam, r"it steps \[\['b_dec', 'W_dec', 'b_enc', 'W_enc'\]\]"),
    "groups": (lambda sae: stepped(groups(sae), sae), adam, "it has 2 groups of parameters, the optimiser 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_optimiser_of_something_else_changes_nothing(name: str, tmp_path: Path) -> None:
    held, ours = made({}, 0), made({}, 1)
    of_file, of_ours, message = WRONG[name]
    path = save_checkpoint(tmp_path / "x.pt", held, of_file(held), {"step": 1, "rng": torch.get_rng_state()})
    opt = of_ours(ours)
    if isinstance(opt, torch.optim.Optimizer):
        stepped(opt, ours)
    else:
        opt.step(rows())
    batches = Batches(rows(), size=8)
    before = state_of(ours, opt, batches)
    for load in (lambda: load_checkpoint(path, ours, opt), lambda: Trainer(ours, opt, progress=False).load(path, batches)):
        with pytest.raises(ValueError, match=rf"^load_checkpoint: .*x.pt is damaged or of something else: .*{message}"):
            load()
        assert state_of(ours, opt, batches) == before


@pytest.mark.parametrize("name", ["ASGD", "Adadelta", "Adafactor", "Adagrad", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"])
def test_every_optimiser_of_torch_goes_on(name: str, tmp_path: Path) -> None:
    """Also one whose state of a matrix is another than that of a vector."""
    ours, other = made({}, 0), made({}, 1)
    opts = [getattr(torch.optim, name)(sae.parameters(), lr=1e-3) for sae in (ours, other)]
    load_checkpoint(save_checkpoint(tmp_path / "x.pt", ours, stepped(opts[0], ours)), other, opts[1])
    for sae, opt in zip((ours, other), opts):
        opt.zero_grad()
        stepped(opt, sae)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), other.parameters()))


class Larger(SAE):
    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.gain = torch.nn.Parameter(torch.ones(3))


def test_a_module_with_more_parameters_changes_nothing(tmp_path: Path) -> None:
    held, ours = made({}, 0), Larger(**BASE, seed=1)
    path = save_checkpoint(tmp_path / "x.pt", held, optim.Adam([("W_dec", held.W_dec)], lr=0.5), {"step": 1, "rng": torch.get_rng_state()})
    opt, batches = optim.Adam([("W_dec", ours.W_dec)]), Batches(rows(), size=8)
    before = state_of(ours, opt, batches)
    for load in (lambda: load_checkpoint(path, ours, opt), lambda: Trainer(ours, opt, progress=False).load(path, batches)):
        with pytest.raises(ValueError, match="it has no 'gain', which the module has"):
            load()
        assert state_of(ours, opt, batches) == before
    with pytest.raises(TypeError, match="load_checkpoint: sae must be an SAE, SAEs or a CrossLayerTranscoder, got Linear"):
        load_checkpoint(path, torch.nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]


def test_a_damaged_optimiser_s_state_changes_nothing(tmp_path: Path) -> None:
    """Each value in turn replaced by another type, size or range."""
    for make in (optim.Adam, adam, *([optim.Signum] if DEEP else [])):
        sae = made({}, 0)
        opt = make(sae)
        stepped(opt, sae) if make is adam else opt.step(rows())
        path = save_checkpoint(tmp_path / "x.pt", sae, opt)
        whole = torch.load(path, weights_only=True)
        load_checkpoint(path, sae, opt)
        before = state_of(sae, opt)
        for change in changes(whole["opt"]):
            torch.save({**whole, "opt": change}, path)
            try:
                load_checkpoint(path, sae, opt)
            except ValueError:
                assert state_of(sae, opt) == before
                continue
            if make is not adam:  # torch's takes what it likes, but for sizes
                opt.step(rows())  # pyright: ignore[reportArgumentType, reportCallIssue]
            sae.load_state_dict(whole["sae"])
            opt.load_state_dict(whole["opt"])


def changes(value: Any, name: str = "") -> Iterator[Any]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield {other: kept for other, kept in value.items() if other != key}
            for change in changes(item, key):
                yield {**value, key: change}
    elif isinstance(value, Tensor):
        if value.dim():
            yield from (value[:-1], value.unsqueeze(0), value.bool(), "tensor", None)
    elif name in ("lr", "eps", "steps", "momentum", "betas"):
        yield from ("text", [value] * 7, {"a": 1}, -3.0)


def test_a_damaged_state_changes_nothing(tmp_path: Path) -> None:
    for options in ({}, {"activation": BatchTopK(3)}, {"activation": JumpReLU(0.1, bandwidth=0.1)}):
        sae = made(options, 1)
        path = save_checkpoint(tmp_path / "x.pt", made(options, 0))
        whole = torch.load(path, weights_only=True)
        before = state_of(sae)
        for name, tensor in whole["sae"].items():
            wrong: list[Any] = [None, "text", tensor.reshape(-1)[:0], tensor.unsqueeze(0), tensor.to("meta")]
            wrong += [tensor.to(torch.int8)] if tensor.is_floating_point() else [tensor.float()]
            wrong += [tensor.to_sparse()] if tensor.dim() else []
            wrong += [-tensor - 1] if name in ("scale", "silent") else []
            wrong += [torch.full_like(tensor, float("nan"))] if name in ("scale", "running_threshold") else []
            states = [{**whole["sae"], name: value} for value in wrong] + [{**whole["sae"], name + "2": tensor}]
            if name not in ("scale", "silent"):  # which the earliest files do not have
                states.append({other: kept for other, kept in whole["sae"].items() if other != name})
            for state in states:
                torch.save({**whole, "sae": state}, path)
                for module in (sae, None):
                    with pytest.raises(ValueError, match=r"^load_checkpoint: .*x.pt (is damaged or of something else|: )"):
                        load_checkpoint(path, module)
                assert state_of(sae) == before
        for key, value in (("format", 2), ("extra", [1]), ("config", {}), ("config", None), ("sae", None)):
            torch.save({**whole, key: value}, path)
            with pytest.raises(ValueError, match=r"^load_checkpoint: .*x.pt is damaged or of something else"):
                load_checkpoint(path, sae)
        assert state_of(sae) == before


def test_buffers_that_the_earliest_files_do_not_have(tmp_path: Path, poisoned_memory: None) -> None:
    path = save_checkpoint(tmp_path / "x.pt", made({}, 0))
    whole = torch.load(path, weights_only=True)
    torch.save({**whole, "sae": {name: tensor for name, tensor in whole["sae"].items() if name not in ("silent", "scale")}}, path)
    sae = load_checkpoint(path).sae
    assert not bool(sae.silent.any()) and bool(torch.eq(sae.scale, 1).all())
    assert torch.equal(sae.eval()(rows()).x_hat, made({}, 0).eval()(rows()).x_hat)


def test_a_trainer_that_cannot_go_on_is_what_it_was(tmp_path: Path) -> None:
    sae = made({}, 0)
    good: dict[str, Any] = {"step": 3, "rng": torch.get_rng_state(), "data": Batches(rows(), size=8).state_dict()}
    for extra in (
        {"step": "three"},
        {"step": -1},
        {"rng": torch.zeros(3, dtype=torch.uint8)},
        {"rng": 5},
        {"data": {**good["data"], "size": 9}},
        {"data": {**good["data"], "position": "x"}},
        {"data": {}},
        {"data": [1]},
        {"skipped": -1},
    ):
        path = save_checkpoint(tmp_path / "x.pt", sae, stepped(adam(sae), sae), {**good, **extra})
        ours = made({}, 1)
        trainer, batches = Trainer(ours, adam(ours), progress=False), Batches(rows(), size=8)
        before, random_state = state_of(ours, trainer.opt, batches), torch.get_rng_state()
        with pytest.raises(TypeError if "'x'" in str(extra) else ValueError):
            trainer.load(path, batches)
        assert (state_of(ours, trainer.opt, batches), trainer.step) == (before, 0)
        assert torch.equal(torch.get_rng_state(), random_state)


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    from collections import defaultdict

    class Point(NamedTuple):
        x: int

    quantised = torch.zeros(2, device="meta")
    for extra in ({"a": defaultdict(int)}, {"a": Point(1)}, {"a": {(1, 2): 3}}, {"a": np.zeros(1)}, {"a": quantised}, {"a": {1}}):
        with pytest.raises(TypeError, match=r"^save_checkpoint: (keys of )?extra.a must be"):
            save_checkpoint(tmp_path / "x.pt", full(1), None, extra)
    assert tree(tmp_path) == []


def test_numbers_of_numpy_are_written_as_pythons(tmp_path: Path) -> None:
    """A schedule of NumPy's cosine, an annealed penalty, an option set by hand: none ends a run at its first checkpoint."""
    sae = made({"activation": ReLU()}, 0)
    sae.dead_after = np.int64(7)  # pyright: ignore[reportAttributeAccessIssue]
    run = Trainer(
        sae,
        adam(sae, lr=np.float64(1e-3)),
        schedule=lambda step: 0.5 * (1 + np.cos(step / 9)),
        anneal={"l1": lambda step: np.float32(step / 4)},  # pyright: ignore[reportArgumentType]
        checkpoint=tmp_path / "x.pt",
        progress=False,
    )
    run.fit([rows()] * 3)
    checkpoint = load_checkpoint(tmp_path / "x.pt")
    assert (checkpoint.sae.l1, checkpoint.sae.dead_after) == (0.5, 7)
    lr = torch.load(tmp_path / "x.pt", weights_only=True)["opt"]["param_groups"][0]["lr"]
    assert type(lr) is float and lr == run.opt.param_groups[0]["lr"]
    assert SAE.load(sae.save(tmp_path / "folder")).l1 == 0.5
    again = save_checkpoint(tmp_path / "y.pt", sae, None, {"a": [np.float32(0.5), (np.int64(2), np.bool_(True))]})
    assert load_checkpoint(again).extra == {"a": [0.5, (2, True)]}
