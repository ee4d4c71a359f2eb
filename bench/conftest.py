"""The fixture that a bench uses, ``compare(op, shape, ours, others, verify)``; ``bench.session`` keeps what it finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import fastsae
from bench.harness import BUDGET, DEVICE, Call, extra_megabytes
from bench.session import Session
from fastsae._core.timing import alternate, milliseconds, spread


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "seconds(n): what a row takes on two cores, where that is not about 12")


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    session = request.config.stash.get(Session.KEY, None)

    def run(op: str, shape: str, ours: Call, others: dict[str, Call], verify: Callable[[], None], floor: str | None = None) -> None:
        """Times ``ours`` and ``others`` in turn.

        ``verify`` raises where our result is wrong, and then nothing is timed. ``floor`` names the entry of ``others`` that is a bound
        on any solution (a product alone, say) rather than a rival.
        """
        verify()
        backend = "+".join(sorted({choice.chosen for choice in fastsae.explain(ours).choices})) or "torch"
        ways = {who: lambda _, call=call: milliseconds(lambda _: call(), DEVICE) for who, call in {"ours": ours, **others}.items()}
        alternate(ways, least=2, most=2, seconds=0)  # warms up
        # pytest-benchmark counts all turns as one round; its JSON holds the row under extra_info.
        found = benchmark.pedantic(lambda: alternate(ways, least=5, most=50, seconds=BUDGET), rounds=1, iterations=1)
        times = {who: spread(turns) for who, turns in found.items()}
        memory = {"ours": extra_megabytes(ours), **{who: extra_megabytes(call) for who, call in others.items()}}
        row = {"op": op, "shape": shape, "backend": backend, "ours": times.pop("ours"), "others": times, "floor": floor, "extra_mb": memory}
        benchmark.extra_info.update(row)
        if session is not None:
            session.keep(**row)

    return run
