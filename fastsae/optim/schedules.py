"""Factors of a learning rate by the number of steps done."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fastsae._core import checks


def warmup_linear_decay(warmup: int, decay_start: int, total: int) -> Callable[[int], float]:
    """A schedule: up linearly over ``warmup`` steps, 1 until ``decay_start``, then down linearly to 0 at ``total`` steps.

    ``0 <= warmup <= decay_start <= total``. The first step has the factor ``1 / warmup``; from ``total`` on it is 0. Can be pickled.
    """
    op = "warmup_linear_decay"
    warmup = checks.integer(op, "warmup", warmup, 0)
    decay_start = checks.integer(op, "decay_start", decay_start, warmup)
    total = checks.integer(op, "total", total, decay_start)
    return partial(_warmup_linear_decay, warmup, decay_start, total)


def _warmup_linear_decay(warmup: int, decay_start: int, total: int, step: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if step < decay_start else max(0.0, (total - step) / max(total - decay_start, 1))
