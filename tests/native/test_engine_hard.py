"""The CPU engine on hard inputs: what spoils a bound, ties, numbers that are not finite."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine_cases import SCREENS, Case, draw, run, verify

from fastsae.native import loader

pytestmark = pytest.mark.skipif(loader.unavailable() is not None, reason=str(loader.unavailable()))
needs_screen = pytest.mark.skipif(not SCREENS, reason="no level that screens here")


def heavy_norms(case: Case) -> None:
    case["W"] *= torch.exp(3 * torch.rand(case["W"].shape[0], 1, generator=torch.Generator().manual_seed(5)))


def one_loud_feature(case: Case) -> None:
    case["W"][777] *= 20


def outlier_dimensions(case: Case) -> None:
    case["x"][:, 3:9] *= 20


def planted(case: Case) -> None:
    g = torch.Generator().manual_seed(6)
    chosen = torch.randint(case["W"].shape[0], (case["x"].shape[0], 12), generator=g)
    case["x"] = (case["W"][chosen] * torch.rand(*chosen.shape, 1, generator=g)).sum(1)


def one_huge_element(case: Case) -> None:
    case["x"][5, 17] = 1e6


def negative_only(case: Case) -> None:
    case["W"] = -case["W"].abs()
    case["x"] = case["x"].abs()


def cancelling_columns(case: Case) -> None:
    half = case["W"].shape[1] // 2
    case["x"][:, half : 2 * half] = case["x"][:, :half] * 1000
    case["x"][:, :half] *= 1000
    case["W"][:, half : 2 * half] = -case["W"][:, :half] + 1e-4 * case["W"][:, half : 2 * half]


def small_weights(case: Case) -> None:
    case["W"] *= 1e-12


def one_nan_in_x(case: Case) -> None:
    case["x"][4, 2] = float("nan")
    case["x"][6, 0] = float("inf")
    case["x"][7, 1] = -float("inf")


def broken_features(case: Case) -> None:
    case["W"][7, 2] = float("nan")
    case["W"][1500, 0] = float("inf")
    case["W"][2999, 3] = -float("inf")
    case["W"][31, 1] = 3e37
    case["b"] = (
        torch.zeros(case["W"].shape[0])
        .index_fill_(0, torch.tensor([40, 50]), float("inf"))
        .index_fill_(0, torch.tensor([60]), float("nan"))
    )
    case["b"][70:90] = -float("inf")


def broken_scale(case: Case) -> None:
    case["scale"] = torch.ones(case["W"].shape[0])
    case["scale"][10], case["scale"][20], case["scale"][30], case["scale"][40] = float("nan"), float("inf"), -float("inf"), 1e38
    case["b"] = torch.full((case["W"].shape[0],), -float("inf")).index_fill_(0, torch.arange(15, 2500), 0.25)


SCREENED = [heavy_norms, one_loud_feature, outlier_dimensions, planted, one_huge_element, negative_only, small_weights, broken_features]


@pytest.mark.parametrize("spoil", SCREENED, ids=lambda f: f.__name__)
def test_hard_inputs_stay_screened(spoil: Callable[[Case], None]) -> None:
    case = draw(40, 200, 3000)
    spoil(case)
    verify(case, exact_rows=0)
    verify({**case, "absolute": True})


@pytest.mark.parametrize("D", [200, 2100])  # of 8 bits, of 16 at level avx2
@pytest.mark.parametrize("spoil", [cancelling_columns, broken_scale, broken_features], ids=lambda f: f.__name__)
def test_hard_inputs(spoil: Callable[[Case], None], D: int) -> None:
    case = draw(40, D, 3000)
    case["x"][8] = 0
    spoil(case)
    verify(case)
    verify({**case, "absolute": True})


@pytest.mark.parametrize("D", [200, 2100])
def test_rows_that_are_not_finite_take_the_exact_path(D: int) -> None:
    case = draw(40, D, 3000)
    one_nan_in_x(case)
    verify(case, exact_rows=3)


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-38, 1e-30, 1e-20, 1e15, 1e19, 1e30, 1e37])
@pytest.mark.parametrize("where", ["x", "W", "both"])
def test_tiny_and_huge(size: float, where: str) -> None:
    case = draw(9, 100, 2000)
    if where in ("x", "both"):
        case["x"] *= size
    if where in ("W", "both"):
        case["W"] *= size
    case["x"][3] = torch.randn(100, generator=torch.Generator().manual_seed(1))
    verify(case, checked=where != "both" or size < 1e19)  # beyond, float32 overflows and float64 does not


@needs_screen
def test_undecided_rows_overflow_to_the_exact_path() -> None:
    case = draw(30, 64, 4000)
    case["x"][::3] = 0
    verify(case, exact_rows=10)
    flat = draw(30, 64, 4000)
    flat["W"][:] = flat["W"][0]
    verify(flat, exact_rows=30)
    integers = draw(30, 16, 5000)
    integers["x"], integers["W"] = integers["x"].round(), (integers["W"] * 4).round()
    verify(integers)


@pytest.mark.parametrize("distance", [1, 16, 32, 1000, 1999])
def test_duplicates_far_apart_take_the_lower_index(distance: int) -> None:
    case = draw(24, 80, 4000, k=20)
    best = run(case, "dense")[1][:, :3].flatten()
    for f in best.tolist():
        case["W"][(f + distance) % 4000] = case["W"][f]
    verify(case)


def test_opposite_scores_tie_by_magnitude() -> None:
    case = draw(24, 80, 4000, k=20, absolute=True)
    case["W"][2000:] = -case["W"][:2000]
    verify(case)
    values, indices = run(case, "dense")
    assert torch.equal(values[:, 0::2], -values[:, 1::2]) and torch.equal(indices[:, 0::2] + 2000, indices[:, 1::2])


def test_zero_scores_tie_whatever_their_sign() -> None:
    case = draw(6, 24, 1500, k=40)
    case["W"][100:700] = 0
    case["W"][300:500] = -0.0
    case["b"] = torch.full((1500,), -50.0)
    case["b"][100:700] = torch.where(torch.rand(600, generator=torch.Generator().manual_seed(0)) < 0.5, 0.0, -0.0)
    verify(case)
    assert torch.equal(run(case, "dense")[1][0], torch.arange(100, 140))
