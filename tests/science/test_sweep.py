"""Sweeps over dictionaries: convergence, bits, processes, runs that go on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsae.superposition import SuperpositionData, Training, init, sweep, train_dictionary, train_many


def test_sweep_recovers_an_easy_truth_and_says_that_it_converged() -> None:
    pytest.importorskip("pandas")
    data = SuperpositionData(16, 12, mean_active=1.5, decay=None, seed=0)
    before = data.state_dict()["generator"]
    seen = []
    frame = sweep(data, l1=[0.1], n_features=[8, 32], batch=64, lr=1e-2, window=50, cooldown=100, max_steps=900, callback=seen.append)
    assert torch.equal(before, data.state_dict()["generator"]), "the data are left as they were"
    assert list(frame.columns) == [
        "l1", "n_features", "seed", "mmcs", "recovered", "dead", "l0", "fvu", "loss", "steps", "converged", "seconds", "cpu_seconds",
    ]  # fmt: skip
    small, large = frame.to_dict("records")
    assert (small["n_features"], large["n_features"]) == (8, 32) and len(seen) == 2
    assert large["mmcs"] > 0.95 > small["mmcs"]
    assert large["recovered"] == 1 and large["converged"] is True and large["steps"] < 900
    assert large["fvu"] < small["fvu"] and 0 <= large["dead"] < 32 and large["l0"] < 6


def test_runs_keep_dictionaries_and_snapshots_and_are_reproducible() -> None:
    data = SuperpositionData(16, 12, mean_active=1.5, seed=0)
    options: dict[str, Any] = {"l1": [0.05, 0.2], "n_features": 20, "batch": 32, "stop": 30, "cooldown": 5, "snapshots": [0, 10]}
    runs = train_many(data, seeds=[0, 1], **options)
    assert [(run.l1, run.seed) for run in runs] == [(0.05, 0), (0.05, 1), (0.2, 0), (0.2, 1)]
    first = runs[0]
    assert [step for step, _ in first.snapshots] == [0, 10, 30] and first.steps == 30 and first.converged is None
    assert first.similarity is not None and torch.equal(first.snapshots[-1][1], first.similarity)
    assert first.similarity.shape == (16,) and first.learned is not None and first.learned.shape == (20,)
    assert not torch.equal(runs[0].dictionary, runs[1].dictionary)
    torch.testing.assert_close(torch.linalg.vector_norm(first.dictionary, dim=1), torch.ones(20))
    again = train_many(data, seeds=0, **{**options, "l1": 0.05})
    assert torch.equal(again[0].dictionary, first.dictionary)
    orthogonal = train_many(data, l1=0.1, n_features=12, stop=1, cooldown=0, lr=1e-9, start=_orthogonal)[0].dictionary
    torch.testing.assert_close(orthogonal @ orthogonal.T, torch.eye(12), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_dictionaries_that_train_together_have_the_bits_of_each_alone() -> None:
    """Also where one ends before the others, in the middle of a window or not."""
    data = SuperpositionData(16, 12, mean_active=1.5, seed=0)
    options: dict[str, Any] = {"batch": 32, "lr": 1e-2, "window": 15, "tolerance": 0.05, "cooldown": 20, "max_steps": 200}
    options["snapshots"] = [0, 100]
    runs = train_many(data, l1=[0.02, 0.1, 0.3], n_features=[20, 6], **options)
    assert len({run.steps for run in runs if run.n_features == 20}) > 1
    for run in runs:
        alone = train_dictionary(copy.deepcopy(data), run.l1, run.n_features, run.seed, Training(**options))
        assert (run.steps, run.converged, run.losses) == (alone.steps, alone.converged, alone.losses)
        assert (run.fvu, run.l0, run.loss) == (alone.fvu, alone.l0, alone.loss)
        for name in ("dictionary", "dead", "similarity", "learned"):
            assert torch.equal(getattr(run, name), getattr(alone, name))
        assert [step for step, _ in run.snapshots] == [step for step, _ in alone.snapshots]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(run.snapshots, alone.snapshots, strict=True))


def _orthogonal(F: int, x: Tensor, seed: int) -> Tensor:
    return init.orthogonal(F, x.shape[1], seed=seed)


def test_sweep_in_processes_and_on_activations() -> None:
    pytest.importorskip("pandas")
    x = SuperpositionData(16, 12, mean_active=1.5, seed=0).sample(500).x
    options: dict[str, Any] = {"l1": [0.1, 0.2], "n_features": 16, "batch": 32, "stop": 20, "cooldown": 5}
    options["start"] = lambda F, x, seed: _orthogonal(F, x, seed)  # of the caller's own, which workers cannot import
    here = sweep(x, **options)
    there = sweep(x, **options, workers=2)
    assert bool(here["mmcs"].isna().all()) and list(here["l1"]) == list(there["l1"])
    for column in ("fvu", "l0", "loss"):
        torch.testing.assert_close(torch.tensor(here[column]), torch.tensor(there[column]), rtol=1e-3, atol=1e-6)


def test_a_stopped_sweep_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("joblib")
    data, ended = SuperpositionData(16, 12, mean_active=1.5, seed=0), []
    options: dict[str, Any] = {"l1": 0.1, "n_features": [16, 12, 8], "batch": 32, "stop": 20, "cooldown": 5, "keep": tmp_path}

    def stop(run: Any) -> None:
        ended.append(run.n_features)
        if len(ended) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_many(data, **options, callback=stop)
    runs = train_many(data, **options)
    assert ended == [16, 12] and [run.n_features for run in runs] == [16, 12, 8]
    fresh = train_many(data, **{**options, "keep": None})
    assert all(torch.equal(a.dictionary, b.dictionary) for a, b in zip(runs, fresh, strict=True))
    kept = [run.seconds for run in train_many(data, **options)]
    assert kept == [run.seconds for run in runs]  # of the runs that were kept
    half = data.sample(64).x.bfloat16()
    assert len(train_many(half, l1=0.1, n_features=8, batch=32, stop=5, cooldown=0, keep=tmp_path)) == 1


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "sweep: data must be SuperpositionData or a tensor", {"data": [1.0]}),
        (ValueError, r"sweep: data must have shape \[n, D\] with n > 0, got \[3\]", {"data": torch.ones(3)}),
        (ValueError, "sweep: l1 must be at least 0, got -1", {"l1": -1}),
        (ValueError, r"sweep: l1 must be a number or different numbers, got \[1, 1\]", {"l1": [1, 1]}),
        (ValueError, r"sweep: n_features must be a number or different numbers, got \[\]", {"n_features": []}),
        (ValueError, "sweep: n_features must be at least 1", {"n_features": 0}),
        (ValueError, "sweep: seeds must be at least 0", {"seeds": -1}),
        (ValueError, "sweep: workers must be at least 1", {"workers": 0}),
        (ValueError, "Training: stop must be 'converged' or a number of steps, got 'never'", {"stop": "never"}),
        (TypeError, "sweep: unknown option 'steps'; those of Training are stop, batch", {"steps": 3}),
        (ValueError, "Training: batch must be at least 1", {"batch": 0}),
        (ValueError, "Training: lr must be a finite number above 0", {"lr": 0}),
        (ValueError, "Training: snapshots must be at least 0", {"snapshots": [-1]}),
    ],
)
def test_sweep_says_what_is_wrong(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"^{message}"):
        train_many(**{"data": torch.ones(4, 3), "l1": 0.1, "n_features": 4, **options})
