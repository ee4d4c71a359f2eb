"""Rows that a trainer leaves out, and several dictionaries in one pass."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_runs import adam, build, data, same

from fastsae import SAE, ReLU, TopK, Trainer, load_checkpoint, optim
from fastsae.trainer import Batches, fit_all

# ---------------------------------------------------------------- rows of a high norm


def spiked() -> Tensor:
    """Rows of which every ninth is 50 times as long."""
    x = torch.nn.functional.normalize(data() + 0.01, dim=1)
    x[::9] *= 50
    return x


def by_hand(x: Tensor, mask: list[bool], most: float) -> list[bool]:
    """The rule, in numbers of Python."""
    norms = x.norm(dim=1).tolist()
    counted = [norm for norm, counts in zip(norms, mask) if counts]
    limit = most * statistics.median_low(counted) if counted else float("inf")
    return [counts and not norm > limit for norm, counts in zip(norms, mask)]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_rows_of_a_high_norm_count_in_nothing(fused: bool, masked: bool) -> None:
    x, mask = spiked(), (torch.arange(200) % 7 != 0 if masked else None)
    ours, theirs = build(), build()
    make: Any = optim.Adam if fused else adam
    seen: list[dict[str, float]] = []
    trainer = Trainer(ours, make(ours), max_norm=3.0, log_every=1, callback=lambda _, m: seen.append(m), progress=False)
    trainer.fit(Batches(x, None, mask, size=25, seed=1), 6)
    other, left = Trainer(theirs, make(theirs), progress=False), 0
    for _, batch in zip(range(6), Batches(x, None, mask, size=25, seed=1)):
        kept = by_hand(batch["x"], batch.get("mask", torch.ones(25)).bool().tolist(), 3.0)
        left += 25 - sum(kept)
        other.train_step(batch["x"][torch.tensor(kept)])  # as if there were no others
    assert same(ours, theirs)
    assert seen[-1]["left_out"] == left > 6


def test_ties_and_ends_of_the_rule() -> None:
    def kept(x: Tensor, most: float, mask: Tensor | None = None) -> list[bool]:
        sae, got = SAE(1, 4, TopK(1), seed=0), list[Any]()

        class Spy:
            def step(self, x: Tensor, target: Any = None, mask: Any = None) -> Any:
                got.append(mask)
                return sae.step_gradients(x, target, mask)[0]

        Trainer(sae, Spy(), max_norm=most).train_step(x.unsqueeze(-1), None, mask)
        return got[0].tolist()

    assert kept(torch.tensor([1.0, -2.0, 3.0, 4.0]), 2.0) == [True, True, True, True]  # 4 is twice the lower of 2 and 3: stays
    assert kept(torch.tensor([1.0, -2.0, 3.0, 4.1]), 2.0) == [True, True, True, False]
    assert kept(torch.tensor([1.0, 2.0, 3.0, 3.1]), 1.0, torch.tensor([1, 0, 1, 1])) == [True, False, True, False]
    assert kept(torch.tensor([1.0, 1.0, torch.inf, torch.nan]), 2.0) == [True] * 4  # on_nonfinite's
    assert kept(torch.zeros(3), 2.0) == [True] * 3
    assert kept(torch.tensor([1.0, 9.0]), 2.0, torch.zeros(2, dtype=torch.int64)) == [False] * 2
    assert kept(torch.empty(0), 2.0) == []
    assert kept(torch.tensor([3e4, 3e4, 6e4]).half(), 1.5) == [True, True, False]
    sae, x = build(), data(5)
    x[2, 3] = torch.inf
    with pytest.raises(FloatingPointError, match="x is not finite in row 2"):
        Trainer(sae, optim.Adam(sae), max_norm=2.0).train_step(x)
    for wrong, error in ((0.0, ValueError), ("3", TypeError)):
        with pytest.raises(error, match=r"^Trainer: max_norm must be a "):
            Trainer(sae, adam(sae), max_norm=wrong)  # pyright: ignore[reportArgumentType]


def test_rows_left_out_are_counted_over_a_resume(tmp_path: Path) -> None:
    def trainer() -> Trainer:
        sae = build()
        return Trainer(sae, optim.Adam(sae), max_norm=3.0, checkpoint=tmp_path / "run.pt", progress=False)

    stream = lambda: Batches(spiked(), size=25, seed=1)  # noqa: E731
    whole = trainer().fit(stream(), 6)
    (tmp_path / "run.pt").unlink()
    trainer().fit(stream(), 4)
    assert trainer().fit(stream(), 6, resume=True) == whole


# ---------------------------------------------------------------- several dictionaries


def made(name: str, folder: Path | None = None, every: int = 1000, **options: Any) -> Trainer:
    sae = {"small": lambda: build(), "large": lambda: SAE(12, 64, ReLU(), l1=0.02, seed=1), "narrow": lambda: SAE(5, 16, TopK(3), seed=2)}[
        name
    ]()
    opt = adam(sae) if name == "large" else optim.Adam(sae, lr=3e-3)
    file = None if folder is None else folder / f"{name}.pt"
    return Trainer(sae, opt, checkpoint=file, every=every, progress=False, **options)


class Columns(Batches):
    """Two hook points beside each other, and a mask."""

    def __init__(self) -> None:
        super().__init__(data(), size=20, seed=3)
        self.columns |= {"layer 1": data(), "layer 2": data(seed=5)[:, :5].contiguous(), "mask": torch.arange(200) % 7 != 0}

    def of(self, name: str) -> Columns:
        """As one trainer would read it."""
        self.columns = {"x": self.columns[name], "mask": self.columns["mask"]}
        return self


COLUMNS = {"small": "layer 1", "large": {"x": "layer 1"}, "narrow": "layer 2"}
HOOKS = {"small": "layer 1", "large": "layer 1", "narrow": "layer 2"}


def test_each_has_the_bits_that_it_has_alone(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    trainers = {name: made(name, tmp_path, every=3) for name in COLUMNS}
    result = fit_all(trainers, Columns(), 13, columns=COLUMNS, progress=False)
    for name, trainer in trainers.items():
        alone = made(name, tmp_path / "alone", every=3)
        assert alone.fit(Columns().of(HOOKS[name]), 13) == result[name]
        assert same(alone.sae, trainer.sae)
        ours, theirs = (load_checkpoint(folder / f"{name}.pt").extra for folder in (tmp_path, tmp_path / "alone"))
        assert ours["data"] == theirs["data"] and ours["step"] == theirs["step"] == 13
        resumed = made(name, tmp_path)  # alone, from the file that all have written
        resumed.fit(Columns().of(HOOKS[name]), 15, resume=True)
        alone.fit(Columns().of(HOOKS[name]), 15, resume=True)
        assert same(resumed.sae, alone.sae)


class Killed(Exception):
    pass


@pytest.mark.parametrize("missing", [False, True])
def test_resume_brings_those_behind_to_the_others(tmp_path: Path, missing: bool) -> None:
    """Killed with files of the steps 9, 8 and 5, or one not there: the bits of the run that was not."""
    whole = {name: made(name) for name in COLUMNS}
    fit_all(whole, Columns(), 13, columns=COLUMNS, progress=False)

    def die(step: int, _: Any) -> None:
        if step == 9:
            raise Killed

    every = {"small": 4, "large": 9, "narrow": 5}
    trainers = {name: made(name, tmp_path, n) for name, n in every.items()}
    trainers["narrow"].callback, trainers["narrow"].log_every = die, 1
    with pytest.raises(Killed):
        fit_all(trainers, Columns(), 13, columns=COLUMNS, progress=False)
    assert [load_checkpoint(tmp_path / f"{name}.pt").extra["step"] for name in every] == [8, 9, 5]
    if missing:
        (tmp_path / "small.pt").unlink()
    again = {name: made(name, tmp_path) for name in every}
    fit_all(again, Columns(), 13, columns=COLUMNS, resume=True, progress=False)
    for name, trainer in again.items():
        assert trainer.step == 13 and same(trainer.sae, whole[name].sae), name


def test_one_bar_shows_all(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    fit_all({"a": made("small", log_every=2), "b": made("large", log_every=2)}, [data()] * 3, 3)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 2 of 3", "step 3 of 3"]
    assert all("a: FVU" in line and "; b: FVU" in line for line in lines)


def test_until_the_batches_end_and_batches_that_are_skipped() -> None:
    stream = [data(40), data(40) * torch.nan, data(40, seed=1)]
    sae, other = build(), build()
    trainers = {
        "a": Trainer(sae, optim.Adam(sae, on_nonfinite="skip"), progress=False),
        "b": Trainer(other, adam(other), on_nonfinite="skip", progress=False),
    }
    found = fit_all(trainers, stream, progress=False)
    assert {name: (m["skipped"], trainers[name].step) for name, m in found.items()} == {"a": (1, 2), "b": (1, 2)}


def test_wrong_arguments_of_fit_all(tmp_path: Path) -> None:
    one = made("small", tmp_path)
    twice = Trainer(one.sae, optim.Adam(one.sae))
    same_file = Trainer(sae := build(), optim.Adam(sae), checkpoint=tmp_path / "small.pt")
    for trainers, options, error, message in (
        ({}, {}, ValueError, "trainers must be at least one"),
        ({"a": one, "b": twice}, {}, ValueError, "each of an SAE and a checkpoint of its own, got a, b"),
        ({"a": one, "b": same_file}, {}, ValueError, "each of an SAE and a checkpoint of its own, got a, b"),
        ({"a": one}, {"columns": {"b": "x"}}, ValueError, "columns must name a, got b"),
        ({"a": one}, {"columns": {"a": "layer 3"}}, ValueError, "a batch must hold the columns layer 3, got x, layer 1, layer 2, mask"),
        ({"a": made("small")}, {"resume": True}, ValueError, "resume needs a file to go on from"),
    ):
        with pytest.raises(error, match=f"^fit_all: .*{message}"):
            fit_all(trainers, Columns(), 3, progress=False, **options)
    with pytest.raises(TypeError, match=r"^fit_all: batches must be an iterable"):
        fit_all({"a": one}, data(), 3)
    with pytest.raises(FloatingPointError, match=r"^fit_all: a: Adam.step: step 1 is not finite: x is not finite"):
        fit_all({"a": one}, [data() * torch.inf], 3, progress=False)
