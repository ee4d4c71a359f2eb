"""The fixture that a bench uses, ``compare(op, shape, ours, others, verify)``; ``bench.session`` keeps what it finds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import fastsae
from bench.harness import BUDGET, DEVICE, Call, extra_megabytes
from bench.session import Session
from fastsae._core.timing import alternate, milliseconds, spread


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "seconds(n): what a row takes on two cores, where that is not about 12")


@pytest.fixture
def compare(request: pytest.FixtureRequest) -> Callable[..., None]:
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
        times = {who: spread(found) for who, found in alternate(ways, least=5, most=50, seconds=BUDGET).items()}
        memory = {"ours": extra_megabytes(ours), **{who: extra_megabytes(call) for who, call in others.items()}}
        mine = times.pop("ours")
        if session is not None:
            session.keep(op=op, shape=shape, backend=backend, ours=mine, others=times, floor=floor, extra_mb=memory)

    return run
