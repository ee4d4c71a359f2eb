"""The bound of the CPU's screen (csrc/cpu/engine/bound.h) against a float64 computation of its proof, term by term; sums at their limits.

A screened product that is 0 shows its half-width as the upper end: rows that cancel in pairs have it for any elements. Every term of E is
the largest for some rows below, so weakening one of them fails here (tests/mutants.py lists which).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from levels import SCREENING
from torch import Tensor

from fastsae.latents import ScoreInputs
from fastsae.native import encode as native_encode
from fastsae.native import loader
from fastsae.native import match as native_match

pytestmark = pytest.mark.skipif(not SCREENING, reason="no level that screens here")
U = 2.0**-24
LONGEST = 65535  # elements of a row that is screened in 8-bit integers
ROTATION = {256: 256, 64: 64, 40: 1}  # of a handle, by its length


def pairs(values: Tensor, cancelling: bool) -> Tensor:
    """[rows, D / 2] -> [rows, D]: each element twice, for rows of x with both signs."""
    return torch.stack([values, -values if cancelling else values], 2).flatten(1)


def kinds(half: int) -> dict[str, Tensor]:
    """Rows [4, half], of which two times two are drawn for x and W."""
    g = torch.Generator().manual_seed(half)
    normal = torch.randn(4, half, generator=g)
    whole = torch.randint(-127, 128, (4, half), generator=g).float()
    whole[:, 0] = 127  # a step of 1: nothing is lost
    # Squares that each lose almost half a unit in the last place of a long sum.
    lossy = torch.full((4, half), 1 + 2.0**-13 - 2.0**-22).sqrt()
    return {
        "normal": normal,
        "whole": whole,
        "signs": normal.sign(),
        "lossy": lossy,
        "vanishing squares": normal * 2.0**-78,
        "tiny": normal * 2.0**-100,
        "large": normal * 2.0**50,
        "zero": torch.zeros(4, half),
    }


def rounded(v: Tensor, bf16: bool, steps: int) -> Tensor:
    """The rows, or features, as the instructions see them, in float64."""
    if bf16:
        return v.bfloat16().double()
    largest = v.abs().amax(1, keepdim=True)
    used = largest >= 2.0**-90
    step = torch.where(used, largest / steps, 0.0)
    return torch.round(v * torch.where(used, steps / largest, 0.0)).double() * step.double()


def row_steps(D: int) -> int:
    """The largest integer of a row: 64 without VNNI; at level avx2 16 bits of long rows, as many as sums of 32 bits have room for."""
    level = loader.load().level()
    if level == "avx2" and D > 2048:
        return (2**24 - 1) // (4 * math.ceil(D / 4))
    return 64 if level in ("avx2", "avx512") else 127


def proof(x: Tensor, W: Tensor, bf16: bool, above: bool = False) -> Tensor:
    """E of (6), and what (8) adds for the rounding of the ends; `above`: with as much as (7) may add to the norms."""
    D = x.shape[1]

    def sizes(v: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        norm, loss = v.double().norm(dim=1), (rounded(v, bf16, steps) - v.double()).norm(dim=1)
        return (
            (norm * (1 + (D + 80) * 4 * U) + D**0.5 * 2.0**-61, loss * (1 + (D + 80) * 4 * U) + D**0.5 * 2.0**-61)
            if above
            else (norm, loss)
        )

    (norm, loss), (W_norm, W_loss) = sizes(x, row_steps(D)), sizes(W, 127)
    g = 1.01 * (min(math.ceil(D / 16), 256) + math.ceil(D / 4096) + (6 if above else 4)) * U
    q = 1.01 * (min(D, 512) + math.ceil(D / 512) + (5 if above else 1)) * 2 * U if bf16 else 4 * U
    floor = (4 * D + 128) * 2.0**-126 if bf16 else 2.0**-94 + (2.0**-100 if above else 0)
    reach = norm + loss
    a, c = loss + (q + 2.0**-22) * reach + g * norm, reach * (1 + q + 2.0**-22)
    return (a[:, None] * W_norm + c[:, None] * W_loss + floor) * (1 + 2.0**-18 if above else 1)


def bounds(x: Tensor, W: Tensor, bf16: bool, **more: Any) -> tuple[Tensor, Tensor]:
    found = native_encode.screen_bounds(ScoreInputs(x, W, **more), bf16=bf16)
    if found is None:
        pytest.skip("this level has no such number")
    return found


@pytest.mark.parametrize("level", SCREENING)
@pytest.mark.parametrize("bf16", [False, True], ids=["int8", "bf16"])
@pytest.mark.parametrize("half", [3, 4, 20, 300, 2048, 32767])
def test_the_half_width_is_that_of_the_proof(half: int, bf16: bool, level: str) -> None:
    with loader.use_isa(level):
        drawn = kinds(half)
        x = torch.cat([pairs(v[:2], True) for v in drawn.values()])
        W = torch.cat([pairs(v[2:], False) for v in drawn.values()])
        lo, hi = bounds(x, W, bf16)
        assert torch.equal(lo, -hi)  # the products are 0
        wanted = proof(x, W, bf16)
        short = hi.double() < wanted
        assert not bool(short.any()), f"{hi[short][0].item()} where the proof asks for {wanted[short][0].item()} at {short.nonzero()[0]}"
        assert bool((hi.double() <= proof(x, W, bf16, above=True)).all())  # and it is no wider


@pytest.mark.parametrize("d", list(ROTATION))
def test_norms_and_losses_of_a_handle(d: int) -> None:
    """A handle's numbers are those of the rotated rows: loss >= |w^ - H w| / sqrt(n) and >= h |w|, norm >= |w|; integers within 127."""
    n = ROTATION[d]
    g = torch.Generator().manual_seed(d)
    H = torch.ones(1, 1, dtype=torch.float64)
    while H.shape[0] < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    # Signs of the rotation (pack.cpp): those of single elements, whose rotated rows are columns of H times them.
    signs = torch.ones(d, dtype=torch.float64)
    for i in range(d):
        h = (i * 0x9E3779B9 + 0x7F4A7C15) & 0xFFFFFFFF
        h = (h ^ (h >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
        h = (h ^ (h >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
        signs[i] = -1 if h >> 31 and n > 1 else 1
    T = torch.block_diag(*[H] * (d // n)) * signs
    grid = torch.randint(-127, 128, (8, d), generator=g).double()
    grid[:, 0] = 127
    on_grid = (grid @ T / n).float()  # rotated, its elements are integers but for rounding
    W = torch.cat([torch.randn(8, d, generator=g), on_grid, torch.eye(d)[:8] * 3e5, torch.zeros(1, d), torch.full((1, d), 2.0**-95)])
    blob = native_encode.pack(W)
    assert blob is not None
    features, words = 32, d // 4
    facts = blob[features * words :].view(torch.float32).reshape(3, features)[:, : len(W)].double()
    integers = blob[: features * words].view(words, features).T.contiguous().view(torch.uint8).reshape(features, d)[: len(W)].int() - 128
    assert int(integers.abs().max()) == 127
    H_w = W.double() @ T.T
    norm, lost = W.double().norm(dim=1), (integers.double() * facts[2][:, None] - H_w).norm(dim=1) / math.sqrt(n)
    assert bool((facts[0] >= norm).all())
    assert bool((facts[1] >= lost).all())
    assert bool((facts[1] >= 1.01 * math.log2(n) * U * norm).all())
    assert bool((facts[1] <= 1.001 * lost + 20 * U * norm + 1e-17).all())
    assert bool((facts[0] <= norm * 1.0001 + 1e-17).all())


@pytest.mark.parametrize("bf16", [False, True], ids=["int8", "bf16"])
def test_long_chains_of_equal_roundings_stay_inside(bf16: bool) -> None:
    """Each addition of a score's lane loses almost half a unit of the last place: the float32 sum is far from the true one, g covers it."""
    D = 4096
    x, W = torch.full((1, D), 1 + 2.0**-17 - 2.0**-23), torch.ones(40, D)
    W[1:] *= torch.linspace(0.5, 1.5, 39)[:, None]
    lo, hi = bounds(x, W, bf16)
    score = native_encode.encode_topk(x, W[:1], None, None, None, None, None, 1, False, path="dense")[0]
    assert 1 - score.item() / float((x.double() * W[0].double()).sum()) > 50 * U
    for f in range(40):
        score = native_encode.encode_topk(x, W[f : f + 1], None, None, None, None, None, 1, False, path="dense")[0].item()
        assert lo[0, f].item() <= score <= hi[0, f].item()


# ---------------------------------------------------------------- sums at their limits


def extreme(rows: int, D: int) -> Tensor:
    """[rows + 5, D]: rows of the largest integers that an 8-bit step has, in the orders that make partial sums largest."""
    v = torch.full((rows + 5, D), 127.0)
    v[1] = -127
    v[2, D // 2 :] = -127
    v[3, : D // 2] = -127
    v[4, ::2] = -127
    return v


@pytest.mark.parametrize("level", SCREENING)
@pytest.mark.parametrize("D", [1, 3, 4, 5, 63, 255, 257, 4095, 4097, 32768, LONGEST])
def test_sums_of_the_largest_integers(D: int, level: str) -> None:
    """255 * 127 * D is just below 2^31 for the longest row: integer sums are exact, so intervals are as narrow as a few roundings."""
    single = torch.zeros(3, D)  # one huge value: such rows are rotated where their length allows it, together with all others of a call
    single[0, 0], single[1, D - 1], single[2, D // 2] = 127, -127, 127
    with loader.use_isa(level):
        for n in (31, 33, 65) if D < 5000 else (33,):
            W = extreme(n - 5, D)
            W[[10, n - 1]] = single[:2]
            W[31:32] = single[2]  # at the panel's border
            for x, size, spread in (
                (extreme(8, D), 1.0, False),
                (extreme(1, D), 2.0**40, False),
                (torch.cat([single, W[:9]]), 2.0**-60, True),
            ):
                x = x * size
                case = (x, W, None, None, None, None)
                dense = native_encode.encode_topk(*case, None, n, False, path="dense")
                scores = torch.empty(len(x), n).scatter_(1, dense[1], dense[0])
                lo, hi = bounds(x, W, False)
                assert bool(((lo <= scores) & (scores <= hi)).all())
                reach = x.double().norm(dim=1)[:, None] * W.double().norm(dim=1)
                width = (hi.double() - lo.double()) / 2
                assert spread or bool((width <= reach * (400 + D / 16) * U).all())  # nothing is lost to rounding
                for k in (1, n):
                    want = dense[0][:, :k].contiguous(), dense[1][:, :k]
                    for path in ("screen", "rows", "blocks"):
                        for blob in (None, native_encode.pack(W)) if D < 5000 else (None,):
                            got = native_encode.encode_topk(*case, blob, k, False, path=path)
                            assert torch.equal(got[1], want[1])
                            assert torch.equal(got[0].view(torch.int32), want[0].view(torch.int32))


@pytest.mark.parametrize("level", SCREENING)
def test_rows_too_long_for_the_sums_are_not_screened(level: str) -> None:
    with loader.use_isa(level):
        for D, screens in ((LONGEST, True), (LONGEST + 1, False), (70000, False)):
            x, W = torch.ones(1, 1).expand(12, D), torch.ones(1, 1).expand(40, D)
            assert loader.load().packs(D) is screens
            assert (native_encode.screen_bounds(ScoreInputs(x, W)) is not None) is screens
            stats: dict[str, int] = {}
            values, indices = native_encode.encode_topk(x, W, None, None, None, None, None, 2, False, path="rows", stats=stats)
            assert (stats["screened_rows"] + stats["exact_rows"] > 0) is screens
            assert indices.tolist() == [[0, 1]] * 12 and bool((values == D).all())


@pytest.mark.parametrize("bf16", [False, True], ids=["int8", "bf16"])
def test_norms_at_the_largest_that_is_screened(bf16: bool) -> None:
    """|x| and |w| of 1e18 are: just below there is an interval, just above there is none, and neither overflows unseen."""
    for D in (17, 257):
        unit = torch.randn(1, D, generator=torch.Generator().manual_seed(D))
        unit /= unit.norm()
        for x_size in (1.0, 9.9e17, 1.02e18, 3e19):
            for W_size in (1.0, 9.9e17, 1.02e18, 3e19):
                x, W = unit * x_size, torch.cat([unit, -unit]) * W_size
                lo, hi = bounds(x, W, bf16)
                dense = native_encode.encode_topk(x, W, None, None, None, None, None, 2, False, path="dense")
                scores = torch.empty(1, 2).scatter_(1, dense[1], dense[0])
                outside = (lo > scores) | (hi < scores)
                assert not bool(outside.any())
                open_ = ~(lo > -math.inf) & ~(hi < math.inf)
                assert bool((open_ == (max(x_size, W_size) > 1e18)).all()), (x_size, W_size, lo, hi)


def test_steps_that_underflow_together() -> None:
    """Where (step of x) * (step of w) is flushed to zero, as MXCSR may say, a screened product is 0 and 2^-94 covers what it should be."""
    D = 4096
    x, W = torch.full((16, D), 127 * 2.0**-64), torch.zeros(256, D)
    W[::2, :48] = 127 * 2.0**-60  # steps multiply to 2^-124
    W[1::2] = 127 * 2.0**-63  # to 2^-127: lost, and yet a product 10 times as large
    case = (x, W, None, None, None, None, None, 3, False)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        want = native_encode.encode_topk(*case, path="dense")
        results = [native_encode.encode_topk(*case, path=path) for path in ("screen", "rows", "blocks")]
        lo, hi = bounds(x, W, False)
    finally:
        torch.set_flush_denormal(False)
    assert bool((want[1] % 2 == 1).all())
    assert bool((lo[:, 1::2] <= want[0][:, :1]).all()) and bool((hi[:, 1::2] >= want[0][:, :1]).all())
    for values, indices in results:
        assert torch.equal(indices, want[1]) and torch.equal(values, want[0])


@pytest.mark.parametrize("level", SCREENING)
def test_what_the_ends_leave_to_ties(level: str) -> None:
    """Upper ends that equal the threshold, scores of both zeros, a band whose edge is rounded: what an interval may not decide."""
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(20, 40, generator=g), torch.randn(600, 40, generator=g)
    with loader.use_isa(level):
        # All scores and all ends are the bias: the first features are kept, whatever comes first.
        bias = torch.full((600,), 1e30)
        for path in ("dense", "screen", "rows", "blocks"):
            values, indices = native_encode.encode_topk(x, W, bias, None, None, None, None, 7, False, path=path)
            assert torch.equal(indices, torch.arange(7).expand(20, 7)) and bool((values == 1e30).all())
        for path in ("dense", "screen"):
            _, col, crow, least = native_encode.encode_batch_topk(x, W, bias, None, None, None, None, 2.5, path=path)
            assert torch.equal(col, torch.arange(50)) and crow[1] == 50 and least == 1e30
            # k = 600: rows are full, then the first features of the next.
            _, col, crow, _ = native_encode.encode_batch_topk(x[:3], W, bias, None, None, None, None, 500.5, path=path)
            assert crow.tolist() == [0, 600, 1200, 1501] and torch.equal(col[1200:], torch.arange(301))
        # Few ties in each block: those of the first row in a later block come before those of the next row.
        few = torch.where(torch.arange(600) % 30 == 5, 1e30, -1e30)
        for path in ("dense", "screen"):
            _, col, crow, _ = native_encode.encode_batch_topk(x, W, few, None, None, None, None, 0.75, path=path)
            assert torch.equal(col, torch.arange(5, 450, 30)) and crow[1] == 15
        # A gate that is NaN is kept, in both halves of a panel; all others are shut.
        gate = torch.full((600,), -1e3)
        gate[[4, 23, 520, 596]] = math.nan
        for path in ("dense", "screen"):
            values, col, _ = native_encode.encode_gated(x, W, gate, torch.zeros(600), torch.full((600,), 1e3), None, None, path=path)
            assert torch.equal(col, torch.tensor([4, 23, 520, 596]).repeat(20)) and bool(values.isnan().all())
        # Zeros of both signs tie.
        W, scale = W[:100].clone(), torch.where(torch.arange(100) % 3 == 0, 1.0, -1.0)
        W[20:80] = 0
        bias = torch.where((torch.arange(100) >= 20) & (torch.arange(100) < 80), -0.0, -1e3)
        for path in ("dense", "screen", "rows", "blocks"):
            values, indices = native_encode.encode_topk(x, W, bias, None, scale, None, None, 30, False, path=path)
            assert torch.equal(indices, torch.arange(20, 50).expand(20, 30))
            assert bool((values.view(torch.int32) == 0).all())
        # |score - theta| = 2 u < 2.5 u, and theta - 2.5 u rounds to the score.
        theta, band, score = torch.ones(100), 5 * U, torch.full((100,), 1 - 2 * U)
        for path in ("dense", "screen"):
            _, col, _, flags = native_encode.encode_threshold(x * 0, W, score, None, None, None, None, theta, band, path=path)
            assert col.numel() == 2000 and bool((flags == 2).all())


@pytest.mark.parametrize("level", SCREENING)
def test_a_pair_in_one_pass_has_the_bits_of_three(level: str) -> None:
    """Best of rows, best of columns and lowest of rows, over several blocks: each of the three thresholds leaves open what it must."""
    with loader.use_isa(level):
        for seed, (n, k_ab, k_ba) in enumerate([(40, 3, 2), (7, 1, 1), (100, 20, 8), (30, 25, 1)]):
            g = torch.Generator().manual_seed(seed)
            a, b = torch.randn(n, 24, generator=g), torch.randn(450, 24, generator=g)
            b = torch.cat([b, b + 1e-4 * torch.randn(450, 24, generator=g)])  # twins, closer than a screened product can tell
            once = native_match.match_pair(a, b, k_ab, k_ba, 1e-8)
            for got, want in zip(once, native_match.match_pair(a, b, k_ab, k_ba, 1e-8, one_pass=False), strict=True):
                assert torch.equal(got, want)
