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


@pytest.mark.seconds(25)
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


@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_signum_step(shape: tuple[int, ...], compare: Callable[..., None]) -> None:
    """Sparsify's default optimiser: ours beside its own step, where it is installed, and beside our Adam step."""
    start, x = inputs(shape)
    mine, adam = training.ours_signum(start), training.ours(start)
    others = {"our Adam step": partial(adam.step, x)}
    others |= {who: partial(runner.step, x) for who, runner in training.peers(start, ["sparsify, its signum"]).items()}

    def verify() -> None:
        """The first step moves every weight that has a gradient by lr, before rows of norm 1."""
        fresh = training.ours_signum(start)
        fresh.step(x)
        moved = (fresh.weights().W_enc - start.W).abs()
        if not bool(((moved < 1e-7) | ((moved - start.lr).abs() < 1e-6)).all()):
            raise AssertionError("a weight of the encoder moved by something else than lr")

    compare("training step signum", name(shape), lambda: mine.step(x), others, verify)
