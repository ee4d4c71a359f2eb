"""The whole training step of a TopK SAE (exact Adam, unit-norm decoder) beside plain torch and the peers, in the usual shapes (B, D, F, k).

Peers have a row where they are installed (`make peers`); a warning says which are left out and why.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from bench import training
from bench.harness import DEVICE, name, normal, shapes, unit_rows

SHAPES = shapes([(256, 768, 24576, 32), (1024, 512, 8192, 32)], [(32, 64, 2048, 8)])


def inputs(shape: tuple[int, ...]) -> tuple[training.Start, torch.Tensor]:
    rows, width, features, k = shape
    start = training.Start(unit_rows(features, width), torch.zeros(width, device=DEVICE), k)
    return start, training.distinct_rows(normal(rows + rows // 4, width, seed=1), start, rows)


@pytest.mark.parametrize("way", ["fused", "autograd"])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_step(shape: tuple[int, ...], way: str, compare: Callable[..., None]) -> None:
    start, x = inputs(shape)
    make = training.ours if way == "fused" else training.ours_autograd
    mine, others = make(start), training.plain_ways(start)

    def verify() -> None:
        training.check_step(make(start), others["plain torch"], x, start.lr)

    others |= training.peers(start) if way == "fused" else {}
    calls = {who: partial(runner.step, x) for who, runner in others.items()}
    compare(f"training step {way}", name(shape), lambda: mine.step(x), calls, verify)
