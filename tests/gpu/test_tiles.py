# pyright: reportMissingParameterType=none
# (a kernel's parameters get types at a launch)
"""The tile engine's kernels: the proven interval, buckets and their second look, masks, chunks; and every launch for six chips.

The contract suite covers the operations on small inputs, which are written out whole; here the paths for many features run on few, with
small buckets. As in test_kernels, the interpreter's tests run in a process of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from emulation import compiler
from tensor_core import CHIPS, products
from torch import Tensor
from triton_marks import CI, CPU, compiled, interpreted, on_gpu, passes_in_the_interpreter, usable

pytest.importorskip("triton")
import triton
import triton.language as tl

import fastsae
from fastsae.kernels import _problem, _select, _tile, decode, encode, match, signum, spline
from fastsae.ops.encode import ENCODE_BATCH_TOPK, ENCODE_TOPK
from fastsae.ops.match import MATCH_COSINE, MATCH_PAIR


@compiled
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    passes_in_the_interpreter(__file__)


# ---------------------------------------------------------------- the interval


def _hard_rows(kind: str, rows: int, D: int, generator: torch.Generator) -> Tensor:
    v = torch.randn(rows, D, generator=generator)
    return {
        "normal": v,
        "positive": v.abs(),  # truncation never cancels
        "one large": torch.where(torch.arange(D) == 3, 3e4, v),
        "wide": v * torch.exp2(torch.randint(-60, 30, (rows, D), generator=generator).float()),
        "tiny": v * 2.0**-110,
        "large": v * 2.0**50,
        "denormal": v * 2.0**-140,
        "beyond": v * 2.0**62,  # norms above 1e18
        "ties of rounding": 1 + 2.0**-11 * (2 * torch.randint(0, 8, (rows, D), generator=generator) + 1),
    }[kind]


@interpreted
@usable
@pytest.mark.parametrize("kind", ["normal", "positive", "one large", "wide", "tiny", "large", "denormal", "beyond", "ties of rounding"])
def test_the_interval_contains_the_exact_product(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    D = 261
    x, centre = _hard_rows(kind, 6, D, generator), None
    W = _hard_rows("normal" if kind in ("large", "beyond", "wide") else kind, 20, D, generator)
    if kind == "normal":
        centre = torch.randn(D, generator=generator)
    p = _problem.Problem(x, W, centre, None, None, None, _tile.tile_for(CPU))
    keys, e = encode.all_keys(p), torch.empty(0)
    exact = torch.where(keys < 0, keys ^ 0x7FFFFFFF, keys).view(torch.float32).double()
    # Both ends as the kernel computes them, float32, of sums as each chip's tensor cores form them, with its q; and with the one for all of
    # sums less exact than any known.
    for how, q_of in ((None, (16, 25)), ((8, 23), (4, 23)), ((16, 23), (4, 23)), *((chip, chip) for chip in CHIPS.values())):
        monkeypatch.setattr(_tile, "_INTERPRETED_SUMS", q_of)
        rounded = _problem.Operands.of(p)
        ((_, panel, _),) = rounded.panels(p)
        (a, c, back), (norm, loss, W_back) = rounded.x_factors[:, :, None], rounded.W_factors
        e = (a * norm + (c * loss + (4.0 * panel.shape[1] + 128) * 2.0**-126)).double()
        assert not e.isnan().any()
        if kind == "beyond":
            assert bool(e.isinf().all())
            return
        if how is not None and compiler() is None:
            continue
        sums = rounded.x.double() @ panel.double().T if how is None else products(rounded.x, panel, *how)
        r = (sums.float() * back * W_back).double()
        assert int(rounded.n_far) == {"one large": 1, "wide": 8}.get(kind, 0)
        for j in range(int(rounded.n_far)):
            r = (r + rounded.x_far[j].double()[:, None] * rounded.W_far[j].double()).float().double()
        assert bool(((r - e).float().double() <= exact).all())
        assert bool((exact <= (r + e).float().double()).all())
    centred = (x if centre is None else x - centre).double()
    sizes = torch.linalg.vector_norm(centred, dim=1)[:, None] * torch.linalg.vector_norm(W.double(), dim=1)
    if kind not in ("tiny", "denormal"):
        assert float((e / sizes).max()) < 3e-3  # and it screens: a thousandth of |x||w| is far below the spread of scores


@triton.jit
def _ends_kernel(
    totals, x_factors, W_factors, x_far, W_far, n_far, scale, lower, upper, n_rows, n, D,
    SCALED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, f = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = rows[:, None] * COLUMNS + f[None, :]
    inside = f < n
    row = tl.minimum(rows, n_rows - 1)
    r = _tile.screened(tl.load(totals + at), x_factors, W_factors, x_far, W_far, n_far, row, n_rows, f, n, inside)
    lo, hi = _tile.ends(r, x_factors, W_factors, scale, scale, row, n_rows, f, n, inside, D, SCALED, False)
    tl.store(lower + at, lo)
    tl.store(upper + at, hi)


@interpreted
@usable
@pytest.mark.parametrize(("D", "how"), [(5, (4, 23)), (261, (16, 25)), (4096, (8, 24))])
def test_the_factors_are_those_of_the_proof(D: int, how: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """a, c, norms and losses against (6) to (8) of the proof in float64, for rows that make each term the largest; and both ends."""
    monkeypatch.setattr(_tile, "_INTERPRETED_SUMS", how)
    g = torch.Generator().manual_seed(D)
    normal, u = torch.randn(2, D, generator=g), 2.0**-24
    lossy = torch.full((2, D), 1 + 2.0**-8 - 2.0**-12).sqrt()  # squares of which a block's sum loses almost half a unit each time
    drawn = [normal, normal.half().float(), lossy, normal * 2.0**-78, normal * 2.0**40, torch.zeros(2, D)]
    x, W = torch.cat([v[:1] for v in drawn]), torch.cat([v[1:] for v in drawn])
    x[0, 1] = 2.0**46  # an outlier column
    p = _problem.Problem(x, W, None, None, None, None, _tile.tile_for(CPU))
    rounded = _problem.Operands.of(p)
    ((_, panel, _),) = rounded.panels(p)
    (a, c, back), (norm, loss, W_back) = rounded.x_factors.double(), rounded.W_factors.double()
    assert _problem.outliers(p)[0].tolist() == [d == 1 for d in range(D)]
    near = x.double().index_fill(1, torch.tensor(1), 0)
    true_norm, W_norm, true_near = (torch.linalg.vector_norm(v.double(), dim=1) for v in (x, W, near))
    true_loss = torch.linalg.vector_norm(rounded.x[:, :D].double() * back[:, None] - near, dim=1)
    W_loss = torch.linalg.vector_norm(panel[:, :D].double() * W_back[:, None] - W.double(), dim=1)
    (n, f), chain = how, 1.01 * (-(-D // 128) + 10) * u
    q = 1.01 * (D + 64) * ((n + 1) * 2.0**-f + 2 * u) / n
    reach = true_near + true_loss
    wanted = true_loss + (q + 32 * u) * reach + (chain + 32 * u) * true_norm, reach * (1 + q + 32 * u), W_norm, W_loss
    for name, got, least in zip(("a", "c", "norm", "loss"), (a, c, norm, loss), wanted, strict=True):
        assert bool((got >= least).all()), (name, got, least)
        assert bool((got <= least * (1 + (D + 80) * 8 * u) + D**0.5 * 2.0**-60).all()), (name, got, least)
    sized = torch.nn.functional.normalize(normal) * torch.tensor([[0.99e18], [1.1e18]])  # (10): the largest that has an interval
    p = _problem.Problem(sized, sized, None, None, None, None, _tile.tile_for(CPU))
    large = _problem.Operands.of(p)
    list(large.panels(p))
    for factors in (large.x_factors, large.W_factors):
        assert factors[:2].isinf().tolist() == [[False, True]] * 2
    n = len(W)
    totals = torch.randn(8, 16, generator=g)
    floor = (4 * panel.shape[1] + 128) * 2.0**-126
    e = (a[:, None] * norm + c[:, None] * loss + floor).float().double()
    for scale in (None, torch.tensor([1.0, -2.0, -1.0, 3.0, -1.0, -(2.0**100)])):
        for sums in (totals, totals * 0):
            ends = torch.empty(2, 8, 16)
            _ends_kernel[(1,)](sums, *rounded.factors(), scale, *ends, n, n, panel.shape[1], SCALED=scale is not None, ROWS=8, COLUMNS=16)
            r = sums[:n, :n].double() * back[:, None] * W_back + x.double()[:, 1, None] * W.double()[:, 1]
            s = torch.ones(n) if scale is None else scale
            lower, upper = (torch.minimum((r - e) * s, (r + e) * s), torch.maximum((r - e) * s, (r + e) * s))
            slack = 8 * u * (r.abs() + e) * s.abs()
            assert bool((ends[0, :n, :n] <= lower + slack).all()) and bool((ends[0, :n, :n] >= lower - slack).all())
            assert bool((ends[1, :n, :n] >= upper - slack).all()) and bool((ends[1, :n, :n] <= upper + slack).all())


@interpreted
@usable
def test_keys_keep_the_order_of_values() -> None:
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([-inf, -3.0, -(2.0**-149), -0.0, 0.0, 2.0**-149, 1.0, 3.4e38, inf, nan, -nan])
    W = torch.ones(1, 1)
    p = _problem.Problem(torch.zeros(1, 1), W.expand(11, 1), None, None, values, None, _tile.tile_for(CPU))
    keys = encode.all_keys(p)[0].long()
    assert keys.diff().tolist()[0] > 0
    assert bool((keys.diff()[[0, 1, 2, 4, 5, 6, 7, 8]] > 0).all())
    assert keys[3] == keys[4]
    assert keys[9] == keys[10] == 2**31 - 1
    assert int(keys.min()) > -(2**31)
    signs = _problem.Problem(torch.zeros(1, 1), W.expand(2, 1), None, torch.tensor([1.0, -1.0]), None, None, _tile.tile_for(CPU))
    assert encode.all_keys(signs)[0].tolist() == [0, 0]  # 0 * -1 is -0


# ---------------------------------------------------------------- selection


@interpreted
@usable
@pytest.mark.parametrize(("rows", "n", "k"), [(5, 257, 40), (2, 5000, 9), (1, 64, 64)])
@pytest.mark.parametrize("most", [3, 2**31 - 1], ids=["ties", "distinct"])
def test_selects_as_a_stable_sort(rows: int, n: int, k: int, most: int) -> None:
    generator = torch.Generator().manual_seed(n)
    keys = torch.randint(-most, most, (rows, n), generator=generator).int()
    want, order = torch.sort(keys, dim=1, descending=True, stable=True)
    kept_keys, kept_ids = torch.empty((2, rows, k), dtype=torch.int32)
    _select.select(keys, None, k, kept_keys, kept_ids)
    values, indices = torch.empty(rows, k), torch.empty(rows, k, dtype=torch.int64)
    _select.rank(kept_keys, kept_ids, None, values, indices, relu=False)
    assert torch.equal(indices, order[:, :k])
    sorted_values, sorted_indices = torch.empty(rows, k), torch.empty(rows, k, dtype=torch.int64)
    _select.sort(keys, k, None, sorted_values, sorted_indices, relu=False)
    assert torch.equal(sorted_indices, order[:, :k])
    assert torch.equal(values.view(torch.int32), sorted_values.view(torch.int32))
    assert torch.equal(kept_keys.sort(1, descending=True).values, want[:, :k])


# ---------------------------------------------------------------- buckets


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Buckets of eight columns for any number of features; counts what the paths met."""
    seen = {"again": 0, "crowded": 0}

    def few(n: int, k: int, tile: _tile.Tile, *, direct: bool) -> encode.Buckets:
        return encode.Buckets(8, tile.columns // 8, -(-n // tile.columns) * 8, k)

    def counted(candidates: Callable[..., Any]) -> Callable[..., Any]:
        def run(p: _problem.Problem, plan: encode.Buckets) -> Any:
            keys, ids, counts = candidates(p, plan)
            seen["again"] += int((counts > plan.k).sum())
            return keys, ids, counts

        return run

    def watched(p: Any, keys: Any, columns: Any, plan: Any, only: Tensor | None, *rest: Any) -> None:
        seen["crowded"] += 0 if only is None else int(only.sum())
        exact(p, keys, columns, plan, only, *rest)

    exact = encode._exact
    monkeypatch.setattr(encode, "_exact", watched)
    monkeypatch.setattr(encode, "buckets", few)
    monkeypatch.setattr(encode, "_direct_candidates", counted(encode._direct_candidates))
    monkeypatch.setattr(encode, "_screened_candidates", counted(encode._screened_candidates))
    return seen


def _topk_case(kind: str, dtype: torch.dtype) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(7)
    x, W = torch.randn(4, 24, generator=generator).to(dtype), torch.randn(200, 24, generator=generator).to(dtype)
    b, b_pre, scale, features = torch.randn(200, generator=generator).to(dtype), None, None, None
    if kind == "one bucket":  # the best ones all in one bucket, and more of them than it emits
        W[8 * torch.arange(8)] = x[0] * torch.linspace(1, 2, 8, dtype=dtype)[:, None]
    elif kind == "ties":
        W, b = W[:1].expand(200, 24), None
    elif kind == "zeros":
        x, b = torch.zeros_like(x), None
    elif kind == "everything":
        W = W.T.contiguous().T
        b_pre, scale = torch.randn(24, generator=generator).to(dtype), torch.randn(200, generator=generator).to(dtype)
        features = torch.randperm(200, generator=generator)[:150]
    elif kind == "special":
        x[1, 3], x[2, 0], W[7, 2], W[9] = float("nan"), float("inf"), float("nan"), 6e4
        scale = torch.ones(200, dtype=dtype)
        scale[11], scale[12], b[13], b[14] = float("inf"), -float("inf"), float("inf"), float("nan")
    elif kind == "outliers":  # in columns that the features nearly ignore: rounded with them, a row's intervals would hold every score
        x[:3, 3:5], W[:, 3:5] = 6e4, W[:, 3:5] * 1e-4
    elif kind == "integers":
        x, W = (torch.randint(-3, 4, t.shape, generator=generator).to(dtype) for t in (x, W))
    return x, W, b, b_pre, scale, features, None


@interpreted
@usable
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["normal", "one bucket", "ties", "zeros", "everything", "special", "integers", "outliers"])
def test_buckets(kind: str, dtype: torch.dtype, small_buckets: dict[str, int], poisoned_memory: None) -> None:
    if CI and dtype is torch.float16 and kind not in ("one bucket", "everything"):
        pytest.skip("the rest in float16: make deep")
    k = 17 if kind == "one bucket" else 6
    case = _topk_case(kind, dtype)
    args = (*case, k, False)
    result = encode.encode_topk(*args)
    ENCODE_TOPK.check(args, result)
    if kind == "one bucket":
        assert small_buckets["again"]
    if kind in ("ties", "zeros", "outliers") and dtype is torch.float32:
        assert small_buckets["crowded"] == (0 if kind == "outliers" else 4)
    if kind == "everything":
        again = encode.encode_topk(case[0][2:4], *args[1:])
        assert torch.equal(result[0][2:4], again[0])
        assert torch.equal(result[1][2:4], again[1])


@interpreted
@usable
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_buckets_and_whole_rows_give_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    args = (*_topk_case("normal", dtype), 9, True)
    whole = encode.encode_topk(*args)
    monkeypatch.setattr(encode, "buckets", lambda n, k, tile, *, direct: encode.Buckets(2, tile.columns // 2, -(-n // tile.columns) * 2, k))
    monkeypatch.setattr(_problem, "PANEL", 1)
    for a, b in zip(whole, encode.encode_topk(*args), strict=True):
        assert torch.equal(a, b)


@interpreted
@usable
def test_similarities_in_buckets(small_buckets: dict[str, int]) -> None:
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(20, 12, generator=generator)
    a[10:16] = -a[4]
    for absolute, exclude_self in ((True, True), (False, False)):
        args = (a, a, 5, absolute, exclude_self, 1e-8)
        MATCH_COSINE.check(args, match.match_cosine(*args))
    args = (a[:7], a.flip(0), 3, 2, 1e-8)
    MATCH_PAIR.check(args, match.match_pair(*args))


# ---------------------------------------------------------------- both directions in one pass


def _dictionaries(n: int = 36, m: int = 40) -> tuple[Tensor, Tensor]:
    """With ties in other blocks, tiles and buckets, zeros, an infinity and a NaN."""
    generator = torch.Generator().manual_seed(11)
    a, b = torch.randn(36, 5, generator=generator), torch.randn(40, 5, generator=generator)
    a[14:30], b[::9], b[30], a[33] = a[3], -a[3], a[3], 0
    a[5, 2], b[7, 1], b[35], b[25] = float("inf"), float("nan"), a[34], 0
    return a[:n], b[:m]


@interpreted
@usable
def test_a_pair_in_one_pass_has_the_bits_of_three(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    (a, b), k_ab, k_ba = _dictionaries(*((20, 24) if CI else ())), 3, 2
    units = match._unit(a, 1e-8), match._unit(b, 1e-8)
    want = *match._best(*units, k_ab), *match._best(*units[::-1], k_ba), *match._best(*units, 1, negative=True)
    seen = {"screened": 0, "whole": 0, "crowded": 0}

    def split(n: int, k: int, columns: int, members: int, shapes: Any) -> encode.Buckets | None:
        a_tile = columns // 8
        return encode.Buckets(a_tile, 8, -(-n // columns) * a_tile, k, 2) if n >= columns else None

    def settle(*args: Any, **kwargs: Any) -> Any:
        seen["screened"] += 1
        return settled(*args, **kwargs)

    def crowded(*args: Any) -> None:
        seen["crowded"] += 0 if args[4] is None else int(args[4].sum())
        exact(*args)

    def whole(*args: Any) -> None:
        seen["whole"] += 1
        added(*args)

    settled, exact, added = encode.settle, encode._exact, match._add_whole
    for module, name, value in (
        (_tile, "_INTERPRETED", _tile.Tile(16, 16, 64, 8, 1)), (encode.Buckets, "slots", property(lambda plan: 1)), (encode, "FEW", 0),
        (encode, "split", split), (encode, "settle", settle), (encode, "_exact", crowded), (match, "_add_whole", whole),
        (match, "_BLOCKS", ((16, 16),)), (match, "_WHOLE", (8, 40)),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    result = match.match_pair(a, b, k_ab, k_ba, 1e-8)
    MATCH_PAIR.check((a, b, k_ab, k_ba, 1e-8), result)
    low, low_index = -result[4].unsqueeze(1), result[5].unsqueeze(1)
    for got, expected in zip((*result[:4], low, low_index), want, strict=True):
        assert torch.equal(torch.nan_to_num(got, nan=7.0), torch.nan_to_num(expected, nan=7.0))
    # Two by two blocks of three by three (CI: one of two by two) are large enough to be screened, three times each.
    assert seen["screened"] == (3 if CI else 12)
    assert seen["whole"] == (3 if CI else 5)
    assert seen["crowded"]


@interpreted
@usable
def test_a_small_pair_is_one_block() -> None:
    a, b = _dictionaries()
    result = match.match_pair(a, b, 3, 2, 1e-8)
    MATCH_PAIR.check((a, b, 3, 2, 1e-8), result)
    few = (a[:2], b[:1], 1, 2, 1e-8)
    MATCH_PAIR.check(few, match.match_pair(*few))


def test_blocks_of_a_pair_are_bounded() -> None:
    tile = _tile._TILES[9, 0]
    for n, m, k_ab, k_ba in ((131072, 131072, 1, 1), (131072, 131072, 8, 8), (65537, 32769, 1, 4), (1 << 24, 1 << 22, 2, 1)):
        block = match._block(n, m, k_ab, k_ba, tile)
        assert block is not None
        assert block != match._WHOLE
        plans = match._plans(*block, k_ab, k_ba, tile)
        assert plans is not None
        forward, backward, lowest = plans
        assert 6 * (block[0] * (forward.entries + lowest.entries) + block[1] * backward.entries) <= 256 << 20
        for plan, lines in ((forward, block[1]), (backward, block[0]), (lowest, block[1])):
            assert plan.number * plan.deep >= lines
            assert plan.entries >= 2 * plan.k
    assert match._block(2000, 1 << 20, 5, 5, tile) == (2000, 32768)
    assert match._block(2000, 2000, 1, 1, tile) == match._block(500, 1 << 20, 90, 90, tile) == match._WHOLE
    assert match._block(1 << 17, 1 << 17, 200, 1, tile) is None
    assert match._block(64, 1 << 17, _select.MOST_KEPT + 1, 1, tile) is None
    assert match._even(8193, 8192, 128) == 4224


# ---------------------------------------------------------------- handles


def _with_handle(x: Tensor, W: Tensor, b_pre: Tensor | None, features: Tensor | None, packed: Tensor | None) -> Iterator[Any]:
    """Results of the launchers that read a handle."""
    b, theta = torch.linspace(-1, 1, W.shape[0]).to(x.dtype), torch.linspace(0, 2, W.shape[0])
    yield encode.encode_topk(x, W, b, b_pre, None, features, packed, 5, True)
    yield encode.encode_threshold(x, W, b, b_pre, theta, features, packed, theta, 0.5)
    yield encode.encode_gated(x, W, b, theta / 4, b, b_pre, packed)
    yield (spline.spline_hash(x, W, b, None, 1, 2, 128, packed),)


@interpreted
@usable
@pytest.mark.parametrize(("dtype", "subset"), [(torch.float32, True), (torch.float16, False)], ids=str)
def test_a_handle_gives_the_same_bits(
    dtype: torch.dtype, subset: bool, small_buckets: dict[str, int], monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:  # fmt: skip
    monkeypatch.setattr(_problem, "PANEL", 1)  # without a handle: many panels
    generator = torch.Generator().manual_seed(4)
    x, W = torch.randn(3, 9, generator=generator).to(dtype), torch.randn(90, 9, generator=generator).to(dtype)
    W[3], W[7], W[80] = 0, W[60], 1e-7
    W, b_pre, features = W.T.contiguous().T, torch.randn(9, generator=generator).to(dtype), None
    if subset:
        features = torch.randperm(90, generator=generator)[:70]
    packed = _problem.pack(W)
    assert packed is not None
    assert packed.numel() * 2 == 90 * (2 * 64 + 12)
    raw = list(_with_handle(x, W, b_pre, features, None))
    rounded: list[Tensor] = []
    rounding = _tile.round_rows
    monkeypatch.setattr(_tile, "round_rows", lambda v, *args, **more: (rounded.append(v), rounding(v, *args, **more)))
    for want, got in zip(raw, _with_handle(x, W, b_pre, features, packed), strict=True):
        for a, b in zip(want, got, strict=True):
            assert torch.equal(a, b)
    monkeypatch.setattr(_tile, "round_rows", rounding)
    assert rounded
    assert all(v.shape[0] == 3 for v in rounded)  # rows, never weights
    again = _problem.pack(W)
    assert again is not None
    assert torch.equal(packed.view(torch.int16), again.view(torch.int16))


@interpreted
@usable
def test_a_public_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsae import packed as module

    monkeypatch.setattr(module, "_packed", _problem.pack)  # as on a GPU
    generator = torch.Generator().manual_seed(6)
    x, W = torch.randn(2, 10, generator=generator), torch.randn(40, 10, generator=generator)
    handle = fastsae.pack(W)
    assert handle.nbytes == 40 * (2 * 64 + 12)
    for call in (
        lambda W: fastsae.encode_topk(x, W, k=4, backend="triton").to_dense(),
        lambda W: fastsae.codes.near_zero_counts(x, W, eps=0.5),
        lambda W: torch.compile(fastsae.spline_code, backend="eager", fullgraph=True)(x, W, backend="triton"),
    ):
        assert torch.equal(call(handle), call(W))
    W.mul_(2)
    for call in (lambda: fastsae.encode_topk(x, handle, k=4), lambda: fastsae.spline_code(x, handle)):
        with pytest.raises(ValueError, match="the packed weights were changed"):
            call()
    assert torch.equal(fastsae.spline_hash(x, handle.refresh(), backend="triton"), fastsae.spline_hash(x, W, backend="triton"))
    with pytest.raises(ValueError, match=r"packed \[.*\] torch.float16 on cpu is not what pack returned for W \[39, 10\]"):
        encode.encode_topk(x, W[1:], None, None, None, None, _problem.pack(W), 4, True)
    assert _problem.pack(W[:0]) is None


def test_plans_bound_what_is_looked_at_again() -> None:
    tile = _tile._TILES[9, 0]
    for n, k in ((24576, 32), (131072, 64), (1 << 20, 64), (65536, 512)):
        for direct in (True, False):
            plan = encode.buckets(n, k, tile, direct=direct)
            if plan is None:
                continue
            assert plan.number * plan.deep >= n
            assert plan.slots >= k // encode.BEST
            assert plan.entries >= 2 * k
    assert encode.buckets(131072, 64, tile, direct=True) == encode.Buckets(1, 128, 1024, 64)
    assert encode.buckets(encode.FEW, 8, tile, direct=True) is None
    assert encode.buckets(1 << 20, _select.MOST_KEPT + 1, tile, direct=True) is None


# ---------------------------------------------------------------- chunks and masks


@interpreted
@usable
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_chunks_and_panels_do_not_change_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tile, "_INTERPRETED", _tile.Tile(16, 64, 64, 8, 1))
    generator = torch.Generator().manual_seed(2)
    x, W, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((20, 20), (130, 20), (130,)))
    calls: tuple[Any, ...] = (
        lambda x: encode.encode_threshold(x, W, b, None, None, None, None, W[:, 0] / 2, 0.5),
        lambda x: encode.encode_topk(x, W, b, None, None, None, None, 5, True),
        lambda x: encode.encode_batch_topk(x, W, b, None, None, None, None, 3.3),
        lambda x: (spline.spline_code(x, W, b, None),),
    )
    if CI:  # each operation in one dtype
        calls = calls[::2] if dtype is torch.float16 else (calls[0], calls[1], calls[3])
    whole: list[tuple[Any, ...]] = [call(x) for call in calls]
    monkeypatch.setattr(_tile, "_INTERPRETED", _tile.Tile(16, 128, 64, 8, 1, parts=4))
    monkeypatch.setattr(_problem, "WORKSPACE", 1)
    monkeypatch.setattr(_problem, "PANEL", 1)
    for call, want in zip(calls, whole, strict=True):
        for a, b_ in zip(want, call(x), strict=True):
            assert torch.equal(a, b_)
    # A row keeps its bits in any batch.
    values, col, crow, flags = whole[0]
    part = calls[0](x[15:17])
    mine = slice(int(crow[15]), int(crow[17]))
    assert torch.equal(part[0], values[mine])
    assert torch.equal(part[1], col[mine])
    assert torch.equal(part[3], flags[mine])


@pytest.mark.parametrize("D", [64, 50])
@pytest.mark.parametrize("kind", ["rows", "columns", "odd columns", "columns, a subset", "rows, a subset", "inside"])
def test_direct_operands_load_wide(kind: str, D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_problem, "PANEL", 1)
    W = torch.randn(100 if kind.startswith("odd") else 96, D + 1, generator=torch.Generator().manual_seed(1)).half()
    W = W[:, 1:] if kind == "inside" else W[:, :D].contiguous()
    W = W.T.contiguous().T if "columns" in kind else W
    chosen = torch.arange(1, 80, 2) if "subset" in kind else None
    p = _problem.Problem(W, W, None, None, None, chosen, _tile.tile_for(CPU))
    tiles = _problem.Operands.of(p)
    panels = [(part, panel if panel is W else panel.clone(), named) for part, panel, named in tiles.panels(p)]
    whole = D == 64 and kind in ("rows", "columns", "rows, a subset")
    assert [panel is W for _, panel, _ in panels] == ([True] if whole else [False] * len(panels))
    rows = torch.cat([panel if named is None else panel[named] for _, panel, named in panels])
    for wide, narrow in ((tiles.x, W), (rows, W if chosen is None else W[chosen])):
        assert torch.equal(wide[:, :D], narrow)
        assert wide.shape[1] == 64 and not wide[:, D:].any()
    for v in (tiles.x, *(panel for _, panel, _ in panels)):
        assert min(v.stride()) == 1 and max(v.stride()) % 16 == 0 and v.data_ptr() % 16 == 0


@interpreted
@usable
def test_batch_topk_of_equal_scores_takes_the_first() -> None:
    args = (torch.ones(6, 4), torch.ones(9, 4), None, None, None, None, None, 2.5)
    values, col, crow, min_kept = encode.encode_batch_topk(*args)
    ENCODE_BATCH_TOPK.check(args, (values, col, crow, min_kept))
    assert crow.tolist() == [0, 9, 15, 15, 15, 15, 15]
    assert float(min_kept) == 4


@interpreted
@usable
def test_a_bad_subset_raises() -> None:
    x, W = torch.ones(2, 3), torch.ones(5, 3)
    with pytest.raises(IndexError, match="features holds 5, expected 0 <= index < 5"):
        encode.encode_topk(x, W, None, None, None, torch.tensor([1, 5]), None, 1, True)
    with pytest.raises(ValueError, match=r"number of features chosen \(2\), got 3"):
        encode.encode_topk(x, W, None, None, None, torch.tensor([1, 1, 2]), None, 3, True)
    with pytest.raises(IndexError, match="neurons must hold indices 0 <= index < 5"):
        spline.spline_code(x, W, None, torch.tensor([-1]))


# ---------------------------------------------------------------- optimisers


@interpreted
@usable
@pytest.mark.parametrize("unit", [False, True])
def test_slots_move_signum_as_the_matrix_does_that_decode_dweight_writes(unit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "SPLIT", 32)
    generator = torch.Generator().manual_seed(8)
    values, grad = torch.randn(40, 4, generator=generator), torch.randn(40, 19, generator=generator)
    indices = torch.randint(0, 11, (40, 4), generator=generator)
    indices[:, 0] = 5  # more slots than a partial sum takes
    matrix = torch.empty(12, 19)
    decode.decode_dweight(values, indices, None, grad, matrix)
    assert not matrix[11].any()
    results = []
    for given in ((grad, values, indices, None), (matrix, None, None, None)):
        y, z = torch.randn(12, 19, generator=torch.Generator().manual_seed(1)), torch.zeros(12, 19)
        y /= torch.linalg.vector_norm(y, dim=1, keepdim=True)
        signum.signum(y, z, *given, 1e-2, 0.9, 0.3, unit, unit)
        results.append((y, z))
    assert torch.equal(results[0][0], results[1][0])
    # A feature without slots has gradient 0, where a matrix of zeros has the sign of what the projection leaves: 0 as well.
    assert torch.equal(results[0][1], results[1][1])
    assert not results[0][1][11].any()


# ---------------------------------------------------------------- on a GPU: what none of the above can show


@on_gpu
@pytest.mark.parametrize("kind", ["normal", "positive", "one large"])
def test_gpu_tensor_cores_keep_the_interval(kind: str) -> None:
    """The chip's own sums against the bound, at a width where the sums are long."""
    generator = torch.Generator().manual_seed(1)
    x, W = (_hard_rows(kind, n, 4096, generator).cuda() for n in (128, 4096))
    p = _problem.Problem(x, W, None, None, None, None, _tile.tile_for(x.device))
    rounded = _problem.Operands.of(p)
    for part, panel, _ in rounded.panels(p):
        scale, features = rounded.W_factors[2, part], panel.shape[0]
        keys = torch.empty((128, features), dtype=torch.int32, device="cuda")
        scores = _problem.Problem(rounded.x, panel, None, scale, None, None, p.tile)
        encode._emit(scores, _problem.Operands.of(scores), keys, None, None)
        r = torch.where(keys < 0, keys ^ 0x7FFFFFFF, keys).view(torch.float32).double() * rounded.x_factors[2][:, None]
        exact = x.double() @ W[part].double().T
        allowed = rounded.x_factors[0][:, None] * rounded.W_factors[0, part] + rounded.x_factors[1][:, None] * rounded.W_factors[1, part]
        assert bool(((r - exact).abs() <= allowed).all())
