"""The comparisons of whole training steps: what they time is the same step, and their scripts run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import training  # pyright: ignore[reportMissingImports]

    return training


def start_and_rows(training: Any) -> tuple[Any, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(512, 40, generator=generator)
    W /= torch.linalg.vector_norm(W, dim=1, keepdim=True)
    start = training.Start(W, 0.1 * torch.randn(40, generator=generator), 8, lr=1e-3)
    return start, training.distinct_rows(torch.randn(100, 40, generator=generator), start, 64)


@pytest.mark.parametrize("way", ["ours", "ours_autograd"])
def test_one_step_is_plain_torchs(training: Any, way: str) -> None:
    start, x = start_and_rows(training)
    for theirs in training.plain_ways(start).values():
        training.check_step(getattr(training, way)(start), theirs, x, start.lr)


def test_another_step_is_refused(training: Any) -> None:
    start, x = start_and_rows(training)
    mine = training.ours(start)
    with torch.no_grad():
        mine.weights().W_dec[3] *= 1.01
    with pytest.raises(AssertionError, match="differs"):
        training.check_step(mine, training.plain(start), x, start.lr)


def test_rows_with_near_ties_are_left_out(training: Any) -> None:
    start = training.Start(torch.eye(4), torch.zeros(4), 2)
    x = torch.tensor([[3.0, 2.0, 2.0 + 1e-6, 1.0], [4.0, 3.0, 2.0, 1.0]])
    assert torch.equal(training.distinct_rows(x, start, 1), x[1:])
    with pytest.raises(ValueError, match="2 rows without near ties"):
        training.distinct_rows(x, start, 2)


@pytest.mark.slow
def test_fvu_script_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "bench.fvu", "--smoke", "--peers", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "fvu.json").read_text())
    assert (tmp_path / "fvu.png").stat().st_size > 0
    assert report["results"]["plain torch"]["within_bound"]
    first, last = report["curves"][0]["fastsae"][0], report["curves"][0]["fastsae"][-1]
    assert last["fvu"] < first["fvu"] and last["step"] == 40
