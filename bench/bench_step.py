"""The whole training step of a TopK SAE (exact Adam, unit-norm decoder) beside plain torch and the peers, in the usual shapes (B, D, F, k).

Peers have a row where they are installed (`make peers`); a warning says which are left out and why.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from bench import training
from bench.harness import name


@pytest.mark.seconds(25)
@pytest.mark.parametrize("way", ["fused", "autograd"])
@pytest.mark.parametrize("shape", training.SHAPES, ids=name)
def test_step(shape: tuple[int, ...], way: str, compare: Callable[..., None]) -> None:
    start, x = training.inputs(shape)
    make = training.ours if way == "fused" else training.ours_autograd
    mine, others = make(start), training.plain_ways(start)

    def verify() -> None:
        training.check_step(make(start), others["plain torch"], x, start.lr)

    others |= training.peers(start) if way == "fused" else {}
    calls = {who: partial(runner.step, x) for who, runner in others.items()}
    compare(f"training step {way}", name(shape), lambda: mine.step(x), calls, verify)


@pytest.mark.parametrize("shape", training.SHAPES, ids=name)
def test_signum_step(shape: tuple[int, ...], compare: Callable[..., None]) -> None:
    """Sparsify's default optimiser: ours beside its own step, where it is installed, and beside our Adam step."""
    start, x = training.inputs(shape)
    mine, others = training.ours_signum(start), {"our Adam step": training.ours(start)}
    others |= training.peers(start, ["sparsify, its signum"])

    def verify() -> None:
        """The first step moves every weight that has a gradient by lr, before rows of norm 1."""
        fresh = training.ours_signum(start)
        fresh.step(x)
        moved = (fresh.weights().W_enc - start.W).abs()
        if not bool(((moved < 1e-7) | ((moved - start.lr).abs() < 1e-6)).all()):
            raise AssertionError("a weight of the encoder moved by something else than lr")

    calls = {who: partial(runner.step, x) for who, runner in others.items()}
    compare("training step signum", name(shape), lambda: mine.step(x), calls, verify)
