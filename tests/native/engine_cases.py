"""Cases of the CPU engine, and what holds for each result."""

from __future__ import annotations

from typing import Any

import torch
from levels import SCREENING
from torch import Tensor

from fastsae.dispatch import OPS
from fastsae.latents import ScoreInputs
from fastsae.native import encode as native_encode
from fastsae.native import loader

CHECK = OPS["encode_topk"].check
RULES = (False, False), (True, False), (False, True)  # relu and absolute
SCREENS = bool(SCREENING)
Case = dict[str, Any]


def draw(rows: int, d: int, features: int, seed: int = 0, **more: Any) -> Case:
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(features, d, generator=g)
    case = {
        "x": torch.randn(rows, d, generator=g),
        "W": W / W.norm(dim=1, keepdim=True),
        "b": None,
        "b_pre": None,
        "scale": None,
        "k": 16,
        "relu": False,
    }
    return {**case, **more}


def run(case: Case, path: str, packed: bool = False, **more: Any) -> tuple[Tensor, Tensor]:
    words = native_encode.pack(case["W"]) if packed else None
    names = ("x", "W", "b", "b_pre", "scale", "features")
    rule = case["k"], case["relu"], case.get("absolute", False)
    return native_encode.encode_topk(*(case.get(name) for name in names), words, *rule, path=path, **more)  # pyright: ignore[reportArgumentType]


def arguments(case: Case) -> tuple[Any, ...]:
    return (case["x"], case["W"], case["b"], case["b_pre"], case["scale"], None, None, case["k"], case["relu"], case.get("absolute", False))


def assert_enclosed(case: Case) -> None:
    """Every score lies in the interval that the screen claims for it, packed or not, for both numbers: the superset property."""
    n = case["W"].shape[0]
    scores = torch.empty(case["x"].shape[0], n)
    every = {**case, "k": n, "relu": False, "absolute": False}
    values, indices = run(every, "dense")
    scores.scatter_(1, indices, values)
    for packed in (None, native_encode.pack(case["W"])):
        for bf16 in (False, True):
            for W in (case["W"], case["W"].T.contiguous().T):
                inputs = ScoreInputs(case["x"], W, case["b"], case["b_pre"], case["scale"], packed=packed)
                bounds = native_encode.screen_bounds(inputs, bf16=bf16)
                if bounds is None:
                    continue
                lo, hi = bounds
                # An end that is NaN decides nothing. A score that is NaN must not be excluded from above.
                above, below = scores > hi, scores < lo
                assert not bool(above.any()), f"a score above its interval: {scores[above][0]} > {hi[above][0]}"
                assert not bool(below.any()), f"a score below its interval: {scores[below][0]} < {lo[below][0]}"
                lost = scores.isnan() & (hi < float("inf"))
                assert not bool(lost.any()), f"a NaN score under {hi[lost][0]}"


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(a[1], b[1])
    assert torch.equal(a[0].view(torch.int32), b[0].view(torch.int32))


def columns(case: Case) -> Case:
    return {**case, "W": case["W"].T.contiguous().T}


def verify(case: Case, exact_rows: int | None = None, checked: bool = True, rowwise: bool = True) -> dict[str, int]:
    """Screened = dense, bit for bit, in both layouts; dense = float64 outside the rounding band."""
    dense = run(case, "dense")
    if checked:
        CHECK(arguments(case), dense)
    same(run(columns(case), "dense"), dense)
    if not SCREENS:
        return {}
    rows = case["x"].shape[0]
    stats: dict[str, int] = {}
    screened = run(case, "screen", stats=stats)
    same(screened, dense)
    same(run(columns(case), "screen"), dense)
    same(run(case, "screen", packed=True), dense)
    same(run(columns(case), "screen", packed=True), dense)
    for path in ("rows", "blocks") if rowwise else ():  # all intervals of a row before its first score
        counts: dict[str, int] = {}
        same(run(case, path, stats=counts), dense)
        assert counts["screened_rows"] + counts["exact_rows"] == rows
        assert exact_rows is None or counts["exact_rows"] == exact_rows, path
        same(run(case, path, packed=True), dense)
        same(run(columns(case), path, packed=True), dense)
    assert_enclosed(case)
    for level in SCREENING[:-1]:
        with loader.use_isa(level):
            for path in ("screen", "rows", "blocks") if rowwise else ("screen",):
                same(run(case, path), dense)
    assert stats["screened_rows"] + stats["exact_rows"] == rows
    if exact_rows is not None:
        assert stats["exact_rows"] == exact_rows
    return stats
