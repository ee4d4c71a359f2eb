"""Steps of a sharded TopK SAE with Adam, in shapes (B, D, F, k): what virtual shards cost, two processes beside one, the plan's times."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bench import ranks
from bench.harness import BUDGET, name, shapes
from bench.session import Session
from fastsae._core.timing import alternate, milliseconds, spread
from fastsae.distributed import Rates, plan


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[..., list[Any]]]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ranks.pair() as asked:
        yield asked


@pytest.mark.seconds(30)
@pytest.mark.parametrize("shape", shapes([(256, 768, 24576, 32)], [(32, 64, 2048, 8)]), ids=name)
def test_virtual_shards(shape: tuple[int, ...], compare: Callable[..., None]) -> None:
    """Eight on one process beside one, whose step is that of an SAE that was never sharded."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    try:
        steps = [ranks.one(shape, virtual) for virtual in (8, 1, None)]

        def verify() -> None:
            losses = [step() for step in steps]
            assert losses[1] == losses[2] and abs(losses[0] - losses[2]) < 1e-5 * losses[2]

        compare("sharded step V=8", name(shape), steps[0], {"V=1": steps[1], "never sharded": steps[2]}, verify)
    finally:
        dist.destroy_process_group()


@pytest.mark.seconds(60)
@pytest.mark.parametrize("shape", shapes([(256, 768, 24576, 32)], [(32, 64, 2048, 8)]), ids=name)
def test_weak_scaling(shape: tuple[int, ...], ask: Callable[..., list[Any]], compare: Callable[..., None]) -> None:
    """F a process, one thread each, B rows in all: two that hold one dictionary of 2 F, beside two that know nothing of each other (what
    the machine can) and one that is alone."""
    rows, width, features, k = shape
    whole = (rows, width, 2 * features, k)

    def verify() -> None:
        first, second = ask("step", whole, 2)
        assert first == second

    others = {
        "two unconnected processes": lambda: ask("step", shape, None),
        "one process": lambda: ask("step", shape, None, of=1),
    }
    compare("two ranks' step", name(whole), lambda: ask("step", whole, 2), others, verify, floor="two unconnected processes")


@pytest.mark.seconds(30)
@pytest.mark.parametrize(
    "shape", shapes([(256, 768, 49152, 32), (1024, 512, 16384, 64), (256, 256, 8192, 16)], [(32, 64, 4096, 8)]), ids=name
)
def test_plan(shape: tuple[int, ...], ask: Callable[..., list[Any]], request: pytest.FixtureRequest) -> None:
    """Two ranks' step beside what ``plan`` says of it, with rates of the same turn."""
    rows, width, features, k = shape
    sizes: dict[str, Any] = {"tokens": 1, "ranks": 2, "batch": rows, "k": k}

    def planned(_: int) -> float:
        found = ask("rates", shape)
        rates = Rates(*(torch.tensor(found, dtype=torch.float64).mean(0)).tolist())
        return 1e3 * plan(features, width, rates=rates, **sizes).step

    ways = {"ours": lambda _: milliseconds(lambda _: ask("step", shape, 2)), "planned": planned}
    alternate(ways, least=2, most=2, seconds=0)
    found = {who: spread(turns) for who, turns in alternate(ways, least=5, most=20, seconds=BUDGET).items()}
    session = request.config.stash.get(Session.KEY, None)
    if session is not None:
        row = {"ours": found["ours"], "others": {"planned": found["planned"]}, "floor": "planned", "extra_mb": {}}
        session.keep(op="step beside its plan", shape=name(shape), backend="cpu", **row)
