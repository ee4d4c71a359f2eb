"""Matching, counters, stores and checkpoints over processes: the answer of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forks import script
from over_ranks_runs import D, dictionaries, layer, numbers
from torch import Tensor

import fastsae
from fastsae import SAE, TopK
from fastsae.compare import MMCS_VARIANTS

SIZES = [1, 2, 4]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    script("over_ranks_runs.py", ",".join(map(str, SIZES)), folder)
    return torch.load(folder / "results.pt", weights_only=False)


def same(one: Any, other: Any) -> bool:
    """Bit for bit, but for the sign of a zero and the payload of a NaN."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(7), other.nan_to_num(7)) and torch.equal(one.isnan(), other.isnan())
    return all(map(same, one, other)) if isinstance(one, (list, tuple)) else one == other


def test_dictionaries_match_as_on_one_process(results: dict[Any, Any]) -> None:
    a, b = dictionaries()
    alive = torch.arange(len(a)) % 5 != 1, torch.arange(len(b)) != 3
    weights = torch.arange(len(a)).double(), torch.ones(len(b), dtype=torch.float64)
    clean = a.nan_to_num(), b
    want: dict[str, Any] = {
        f"{dtype} {k}": numbers(fastsae.match(a.to(dtype), b.to(dtype), candidates=k))
        for dtype in (torch.float32, torch.bfloat16)
        for k in (1, 5, 40)
    }
    want["alive"] = want["half sharded"] = numbers(fastsae.match(a, b, alive=alive, candidates=3))
    want["weights"] = fastsae.mmcs(*clean, weights=weights)
    want |= {name: fastsae.mmcs(clean[0], clean[0 if v.exclude_self else 1], variant=name) for name, v in MMCS_VARIANTS.items()}
    want["matrix"] = fastsae.compare.mmcs_matrix([clean[0], b, clean[1]])
    want["sae"] = numbers(fastsae.match(SAE(D, 41, TopK(3), seed=0), b))
    want["dtensor"] = numbers(fastsae.match(a, b, candidates=2))
    for size in SIZES:
        for of_rank in results["matched", size]:
            assert set(of_rank) == set(want)
            wrong = [name for name, value in of_rank.items() if not same(value, want[name])]
            assert not wrong, (size, wrong)


def test_codes_of_neurons_on_several_processes(results: dict[Any, Any]) -> None:
    x, W, b, neurons = layer()
    want = [fastsae.spline_code(x, W), fastsae.spline_code(x, W, b, neurons=neurons), fastsae.spline_hash(x, W, b, layer=3, seed=5)]
    want.append(fastsae.spline_hash(x, W, b, bits=128, neurons=neurons))
    for size in SIZES:
        assert all(torch.equal(torch.cat(own), whole) for own, whole in zip(zip(*results["spline", size]), want, strict=True)), size


def test_counters_are_those_of_one_stream(results: dict[Any, Any]) -> None:
    """Moments up to the rounding of float64, the same bits on every process; all else exactly."""
    (first,) = results["counted", 1]
    assert first["table"][0].seen == 30 and first["count"] == 42
    for size in SIZES[1:]:
        for of_rank in results["counted", size]:
            torch.testing.assert_close(of_rank["moments"], first["moments"], rtol=1e-12, atol=1e-12)
            assert torch.equal(of_rank["moments"], results["counted", size][0]["moments"])
            assert all(same(value, first[name]) for name, value in of_rank.items() if name != "moments")


def test_a_save_in_the_background(results: dict[Any, Any]) -> None:
    assert all(results["saved", size][0] == results["saved", 1][0] for size in SIZES)


def test_what_lies_on_disk_has_the_rows_of_one_process_in_their_order(results: dict[Any, Any]) -> None:
    first = results["stored", 1][0]
    assert torch.equal(first["sequence"], first["sequence"].sort().values) and int(first["sequence"][-1]) == 22
    for size in SIZES:
        for of_rank in results["stored", size]:
            wrong = [name for name, value in of_rank.items() if not same(value, first[name])]
            assert not wrong, (size, wrong)
