"""The fixture that a bench uses: ``compare(op, shape, ours, others, verify)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import fastsae
from bench.harness import BUDGET, Call, extra_megabytes, milliseconds, spread


@pytest.fixture
def compare(benchmark: Any) -> Callable[..., None]:
    def run(op: str, shape: str, ours: Call, others: dict[str, Call], verify: Callable[[], None], floor: str | None = None) -> None:
        """Times ``ours`` and ``others`` in turn.

        ``verify`` raises where our result is wrong, and then nothing is timed. ``floor`` names the entry of ``others`` that is a bound
        on any solution (a product alone, say) rather than a rival.
        """
        verify()
        backend = "+".join(sorted({choice.chosen for choice in fastsae.explain(ours).choices})) or "torch"
        once = {"ours": milliseconds(ours), **{name: milliseconds(call) for name, call in others.items()}}
        once = {"ours": milliseconds(ours), **{name: milliseconds(call) for name, call in others.items()}}
        rounds = max(5, min(50, int(BUDGET * 1e3 / max(sum(once.values()), 1e-3))))
        times: dict[str, list[float]] = {name: [] for name in others}

        def time_others() -> None:
            for name, call in others.items():
                times[name].append(milliseconds(call))

        mine: list[float] = []
        benchmark.pedantic(lambda: mine.append(milliseconds(ours)), setup=time_others, rounds=rounds, iterations=1)
        rivals = {name: spread(values) for name, values in times.items()}
        memory = {"ours": extra_megabytes(ours), **{name: extra_megabytes(call) for name, call in others.items()}}
        benchmark.extra_info.update(op=op, shape=shape, backend=backend, ours=spread(mine), others=rivals, floor=floor, extra_mb=memory)

    return run
