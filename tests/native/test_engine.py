"""The CPU engine behind encode_topk: screening and dense scoring give the same bits, on inputs made to break one of them."""

from __future__ import annotations

import pytest
import torch
from engine_cases import CHECK, RULES, SCREENS, Case, arguments, assert_enclosed, columns, draw, run, same, verify
from hypothesis import given
from hypothesis import strategies as st
from levels import SCREENING
from torch import Tensor

import fastsae
from fastsae.native import encode as native_encode
from fastsae.native import loader
from fastsae.native import match as native_match
from fastsae.native import spline as native_spline

pytestmark = pytest.mark.skipif(loader.unavailable() is not None, reason=str(loader.unavailable()))
needs_screen = pytest.mark.skipif(not SCREENS, reason="no level that screens here")


@pytest.mark.parametrize("d", [1, 2, 15, 31, 32, 33, 130, 513, 1023, 4097])
@pytest.mark.parametrize("relu", [False, True])
def test_awkward_widths(d: int, relu: bool) -> None:
    verify(draw(13, d, 999, b=torch.randn(999), relu=relu))


@pytest.mark.parametrize("features", [1, 2, 31, 32, 33, 129, 1000, 2049])
def test_awkward_feature_counts(features: int) -> None:
    for k in {1, (features + 1) // 2, features}:
        verify(draw(5, 40, features, k=k))


@pytest.mark.parametrize("rows", [1, 2, 11, 12, 13, 25, 100])
def test_awkward_row_counts(rows: int) -> None:
    verify(draw(rows, 64, 700), exact_rows=0)


@needs_screen
def test_more_rows_than_a_chunk() -> None:
    stats = verify(draw(2100, 32, 600, k=5))
    assert stats["exact_rows"] == 0
    wide = verify(draw(300, 16, 30000, k=3000), rowwise=False)  # buffers of 64 MiB allow fewer rows at a time
    assert wide["workspace"] < 200 << 20


@pytest.mark.parametrize("name", ["b", "b_pre", "scale", "all"])
def test_parameters(name: str) -> None:
    g = torch.Generator().manual_seed(3)
    d, n = 96, 3000
    scale = torch.randn(n, generator=g)
    scale[::7] = 0.0
    scale[5::11] *= -30
    given_ = {"b": torch.randn(n, generator=g), "b_pre": torch.randn(d, generator=g) * 3, "scale": scale}
    for absolute in (False, True):
        verify(draw(37, d, n, absolute=absolute, **(given_ if name == "all" else {name: given_[name]})))


@needs_screen
@pytest.mark.parametrize("k", [1, 8, 64])
def test_few_scores_are_computed(k: int) -> None:
    stats = verify(draw(64, 256, 16384, k=k), exact_rows=0)
    assert stats["scored"] / 64 < 16 * k + 120


@needs_screen
@pytest.mark.parametrize("path", ["rows", "blocks"])
@pytest.mark.parametrize(("d", "features", "k"), [(384, 1536, 16), (64, 512, 8), (256, 4096, 64)])
def test_hardly_more_than_the_best_are_scored(path: str, d: int, features: int, k: int) -> None:
    stats: dict[str, int] = {}
    run(draw(64, d, features, k=k), path, stats=stats)
    assert stats["exact_rows"] == 0
    assert stats["scored"] / 64 < 3 * k + 16


@needs_screen
@pytest.mark.parametrize("packed", [False, True])
def test_small_dictionaries_and_large_subsets_screen_by_themselves(packed: bool) -> None:
    """What "auto" takes here: small dictionaries, few rows of a handle, k up to half of the features."""
    for rows, d, features, k in ((1, 64, 300, 4), (13, 40, 128, 64), (50, 96, 700, 16), (600, 256, 2000, 16)):
        case, stats = draw(rows, d, features, k=k), {}
        same(run(case, "auto", packed=packed, stats=stats), run(case, "dense"))
        assert (stats["screened_rows"] > 0) == (packed or rows >= 12)
    case = draw(100, 64, 900, k=8)
    case["features"] = torch.arange(0, 900, 2)
    for path in ("rows", "blocks", "auto"):
        same(run(case, path, packed=packed), run(case, "dense"))
        for dtype in (torch.bfloat16, torch.float16):
            half = {**case, "x": case["x"].to(dtype), "W": case["W"].to(dtype)}
            values, indices = run(half, path, packed=packed)
            want = run(half, "dense")
            assert torch.equal(indices, want[1]) and torch.equal(values.view(torch.int16), want[0].view(torch.int16))


@needs_screen
def test_rows_that_screening_cannot_tell_apart_are_left_to_the_exact_path() -> None:
    """Most rows of a few are undecided: the next ones are not screened at all, and the bits are the same."""
    case = draw(700, 64, 600, k=8)
    case["x"][:500] = 0
    for path in ("rows", "blocks"):
        stats: dict[str, int] = {}
        same(run(case, path, stats=stats), run(case, "dense"))
        assert 500 <= stats["exact_rows"] <= 700


@pytest.mark.parametrize("path", ["dense", "screen", "rows", "blocks", "auto"])
@pytest.mark.parametrize("layout", ["FD", "DF"])
def test_bits_depend_on_nothing_but_the_row(path: str, layout: str) -> None:
    case = draw(50, 300, 5000, b=torch.randn(5000))
    case["x"][7] = 0
    if layout == "DF":
        case = columns(case)
    threads = torch.get_num_threads()
    whole = run(case, path)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            same(run(case, path), whole)
            for part in (slice(0, 1), slice(7, 8), slice(3, 20), slice(49, 50)):
                same(run({**case, "x": case["x"][part]}, path), (whole[0][part], whole[1][part]))
    finally:
        torch.set_num_threads(threads)
    shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    same(run({**case, "x": case["x"][shuffled]}, path), (whole[0][shuffled], whole[1][shuffled]))


def test_levels_with_fused_multiply_add_agree() -> None:
    case = draw(10, 5000, 300, scale=torch.randn(300))
    results = []
    for level in loader.isa_levels():
        with loader.use_isa(level):
            results.append(run(case, "auto"))
            CHECK(arguments(case), results[-1])
            if level != "portable":
                same(results[-1], results[1])


def test_strided_inputs_are_read_in_place() -> None:
    case = draw(20, 64, 1000)
    want = run(case, "dense")
    wide = torch.zeros(2000, 100)
    wide[::2, 7:71] = case["W"]
    rows = torch.zeros(64, 41)
    rows[:, 1::2] = case["x"].T
    for path in ("dense", "screen", "rows", "blocks"):
        same(run({**case, "W": wide[::2, 7:71]}, path), want)
        same(run({**case, "W": wide.T.contiguous().T[::2].T.contiguous().T[:, 7:71]}, path), want)
        same(run({**case, "x": rows[:, 1::2].T}, path), want)
        tall = torch.zeros(64, 1200)
        tall[:, 3:1003] = case["W"].T
        same(run({**case, "W": tall[:, 3:1003].T}, path), want)
    same(run({**case, "x": case["x"][:1].expand(5, 64)}, "screen"), tuple(t[:1].expand(5, 16).contiguous() for t in want))  # pyright: ignore[reportArgumentType]


def test_refusals_name_the_reason() -> None:
    case = draw(3, 8, 20)
    ask = native_encode.refuses_encode_topk
    x, W = case["x"], case["W"]
    assert ask(x, W, None, None, None, None, None, 4, True) is None
    assert ask(x, W, W[:, 0].bfloat16(), None, None, torch.arange(3), None, 2, True) is None
    assert "float64" in str(ask(x.double(), W.double(), None, None, None, None, None, 4, True))
    assert "float64" in str(ask(x, W, W[:, 0].double(), None, None, None, None, 4, True))
    with loader.use_isa("portable"):
        assert "portable" in str(ask(x.expand(1000, 3, 8).reshape(3000, 8), W, None, None, None, None, None, 2, True))
    with pytest.raises(ValueError, match="expected"):
        native_encode.encode_topk(x, W, torch.zeros(3), None, None, None, None, 4, True)
    with pytest.raises(ValueError, match="got 21"):
        native_encode.encode_topk(x, W, None, None, None, None, None, 21, True)
    with pytest.raises(IndexError, match="holds 20"):
        native_encode.encode_topk(x, W, None, None, None, torch.tensor([3, 20]), None, 1, True)


def drawn(data: st.DataObject) -> tuple[Case, torch.Generator]:
    rows, d, n = (data.draw(st.integers(1, most)) for most in (30, 80, 700))
    if data.draw(st.booleans()):
        d = data.draw(st.sampled_from([256, 250, 512, 64, 16, 1000]))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    relu, absolute = data.draw(st.sampled_from(RULES))
    case = draw(rows, d, n, k=data.draw(st.integers(1, n)), relu=relu, absolute=absolute)
    for name in ("x", "W"):
        t = case[name]
        kind = data.draw(st.sampled_from(["plain", "integers", "powers", "few", "wild", "peaked"]))
        if kind == "integers":
            t.mul_(2).round_()
        elif kind == "powers":
            t.mul_(torch.exp2(torch.randint(-140, 100, t.shape[:1], generator=g).float())[:, None])
        elif kind == "few":
            t.copy_(t[torch.randint(min(3, t.shape[0]), t.shape[:1], generator=g)])
        elif kind == "peaked":
            t[:, : max(1, t.shape[1] // 50)] *= 1000
        elif kind == "wild":
            wild = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -1e-42, 0.0, -0.0])
            spots = torch.randint(t.numel(), (max(1, t.numel() // 100),), generator=g)
            t.view(-1)[spots] = wild[torch.randint(7, spots.shape, generator=g)]
    for name, size in (("b", n), ("b_pre", d), ("scale", n)):
        if data.draw(st.booleans()):
            case[name] = torch.randn(size, generator=g) * data.draw(st.sampled_from([0.0, 1.0, 1e-30, 1e30]))
    return case, g


@given(st.data())
def test_screened_equals_dense_on_anything(data: st.DataObject) -> None:
    case, g = drawn(data)
    dense = run(case, "dense")
    for variant in (case, columns(case)):
        same(run(variant, "dense"), dense)
        for level in SCREENING:
            with loader.use_isa(level):
                for path in ("screen", "rows"):
                    same(run(variant, path), dense)
                same(run(variant, "screen", packed=True), dense)
    for level in SCREENING:
        with loader.use_isa(level):
            assert_enclosed(case)
    codes = native_spline.spline_code(case["x"], case["W"], case["b"], None, path="dense")
    for level in SCREENING:
        with loader.use_isa(level):
            assert torch.equal(native_spline.spline_code(case["x"], case["W"], case["b"], None, path="screen"), codes)
    chosen = torch.randperm(case["W"].shape[0], generator=g)[: case["k"]]
    subset = {**case, "features": chosen, "k": max(1, chosen.numel() // 2)}
    few = run(subset, "dense")
    for variant in (subset, columns(subset)):
        same(run(variant, "dense"), few)
        if SCREENS:
            same(run(variant, "screen"), few)
    ascending = chosen.sort().values
    part = {**case, "W": case["W"][ascending], "k": subset["k"]}
    part |= {name: None if case[name] is None else case[name][ascending] for name in ("b", "scale")}
    values, local = run(part, "dense")
    same((values, ascending[local]), few)


def same_entries(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    for s, t in zip(a, b, strict=True):
        if s.is_floating_point():
            s, t = s.view(torch.int32), t.view(torch.int32)
        assert torch.equal(s, t)


@given(st.data())
def test_cuts_screened_equal_dense_on_anything(data: st.DataObject) -> None:
    case, g = drawn(data)
    x, W, b, b_pre, scale, n = case["x"], case["W"], case["b"], case["b_pre"], case["scale"], case["W"].shape[0]
    theta = torch.randn(n, generator=g) * data.draw(st.sampled_from([0.0, 1.0, 3.0])) + data.draw(st.sampled_from([0.0, 2.0, 10.0]))
    band = data.draw(st.sampled_from([None, 0.3, 5.0]))
    chosen = data.draw(st.sampled_from([None, torch.randperm(n, generator=g)[: n // 2 + 1]]))
    k = data.draw(st.sampled_from([0.2, 1.0, 7.5, 1e9]))
    calls = [
        lambda W, words, path: native_encode.encode_threshold(x, W, b, b_pre, scale, chosen, words, theta, band, path=path),
        lambda W, words, path: native_encode.encode_batch_topk(x, W, b, b_pre, scale, chosen, words, k, path=path),
        lambda W, words, path: native_encode.encode_gated(
            x, W, theta - 2, theta / 4 if b is None else b, theta if scale is None else scale, b_pre, words, path=path
        ),
    ]
    for call in calls:
        dense = call(W, None, "dense")
        for weight in (W, W.T.contiguous().T):
            same_entries(call(weight, None, "dense"), dense)
            for level in SCREENING:
                with loader.use_isa(level):
                    same_entries(call(weight, None, "screen"), dense)
                    same_entries(call(weight, native_encode.pack(weight), "screen"), dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_exactly(dtype: torch.dtype) -> None:
    case = draw(40, 200, 3000, b=torch.randn(3000))
    x, W = case["x"].to(dtype), case["W"].to(dtype)
    wide = native_encode.encode_topk(x.float(), W.float(), case["b"], None, None, None, None, 16, False, path="dense")
    for weight in (W, W.T.contiguous().T):
        for path in ("dense", "screen"):
            for words in (None, native_encode.pack(weight)):
                values, indices = native_encode.encode_topk(x, weight, case["b"], None, None, None, words, 16, False, path=path)
                assert torch.equal(indices, wide[1])
                assert torch.equal(values, wide[0].to(dtype))


def test_dense_firing_is_not_screened_in_vain() -> None:
    case = draw(64, 128, 8192)
    stats: dict[str, int] = {}
    inputs = (case["x"], case["W"], None, None, None, None, None, torch.zeros(()), None)
    got = native_encode.encode_threshold(*inputs, stats=stats)
    assert stats["scored"] <= 64 * 8192
    same_entries(got, native_encode.encode_threshold(*inputs, path="dense"))


def test_a_handle_that_is_out_of_date_is_refused() -> None:
    case = draw(20, 64, 4096)
    W = case["W"]
    handle = fastsae.pack(W)
    want = fastsae.encode_topk(case["x"], W, k=8)
    got = fastsae.encode_topk(case["x"], handle, k=8)
    same((got.values, got.indices), (want.values, want.indices))
    W.mul_(-1)
    with pytest.raises(ValueError, match="refresh"):
        fastsae.encode_topk(case["x"], handle, k=8)
    got, want = fastsae.encode_topk(case["x"], handle.refresh(), k=8), fastsae.encode_topk(case["x"], W, k=8)
    same((got.values, got.indices), (want.values, want.indices))
    assert handle.nbytes in (0, 4096 * (64 + 12))
    assert "4096, 64" in repr(handle)
    with pytest.raises(TypeError, match="pack: W"):
        fastsae.pack(W.tolist())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="pack: W"):
        fastsae.pack(W[0])


def test_gradients_reach_the_weights_behind_a_handle() -> None:
    case = draw(9, 32, 100)
    W = case["W"].requires_grad_()
    got = torch.autograd.grad(fastsae.encode_topk(case["x"], fastsae.pack(W), k=4).values.sum(), W)[0]
    assert torch.equal(got, torch.autograd.grad(fastsae.encode_topk(case["x"], W, k=4).values.sum(), W)[0])


def test_a_nan_score_passes_an_infinite_threshold() -> None:
    case = draw(64, 64, 4096)
    case["W"][7, 3] = float("nan")
    theta = torch.full((4096,), 30.0).index_fill_(0, torch.tensor([7]), float("inf"))
    for path in ("dense", "screen", "auto"):
        values, col, crow, _ = native_encode.encode_threshold(case["x"], case["W"], None, None, None, None, None, theta, None, path=path)
        assert bool(values.isnan().all())
        assert torch.equal(col, torch.full((64,), 7))
        assert torch.equal(crow, torch.arange(65))


@needs_screen
def test_scores_too_close_to_screen_are_given_up() -> None:
    g = torch.Generator().manual_seed(0)
    common = torch.randn(256, generator=g)
    common *= 16 / common.norm()
    case = draw(64, 256, 8192, k=32)
    case["x"], case["W"] = torch.randn(64, 256, generator=g) + 20 * common, torch.randn(8192, 256, generator=g) * 1e-2 + common
    stats = verify(case, exact_rows=64)
    assert stats["scored"] <= 64 * (4 * 32 + 256 + 8192 / 4)
    similar = native_match.match_cosine(case["x"], case["W"], 8, False, False, 1e-8, path="screen", stats=stats)
    same(similar, native_match.match_cosine(case["x"], case["W"], 8, False, False, 1e-8, path="dense"))
    assert stats["exact_rows"] == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_flushed_denormals_give_the_same_bits_on_every_way(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    small = {torch.float32: 2.0**-70, torch.bfloat16: 2.0**-70, torch.float16: 3e-5}[dtype]
    x, W = (torch.randn(64, 64, generator=g) * small).to(dtype), (torch.randn(4096, 64, generator=g) * small).to(dtype)
    threads = torch.get_num_threads()
    native_encode.encode_topk(x, W, None, None, None, None, None, 8, False)  # the pool's threads exist before the flag is set
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        results = []
        for count in (1, 2, threads):
            torch.set_num_threads(count)
            for weight in (W, W.T.contiguous().T, W.repeat_interleave(2, 1)[:, ::2]):
                for path in ("dense", "screen"):
                    results.append(native_encode.encode_topk(x, weight, None, None, None, None, None, 8, False, path=path))
        short = [native_spline.spline_code(x[:, :8], W[:, :8], None, None, path=path) for path in ("dense", "screen")]
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    for values, indices in results[1:]:
        assert torch.equal(indices, results[0][1])
        assert torch.equal(values, results[0][0])
    assert torch.equal(*short)


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1.0, 1e19, 1e37])
def test_cosines_do_not_depend_on_the_size_of_rows(size: float) -> None:
    case = draw(20, 40, 300)
    want = native_match.match_cosine(case["x"], case["W"], 3, False, False, 1e-37, path="dense")
    for path in ("dense", "screen"):
        got = native_match.match_cosine(case["x"] * size, case["W"] * size, 3, False, False, 1e-37, path=path)
        assert torch.equal(got[1], want[1])
        # Scaling rounds each element once; powers of two would not.
        torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-6)
    one = torch.tensor([[3e38]])
    assert native_match.match_cosine(one, -one, 1, False, False, 1e-8)[0].item() == -1


def test_native_arguments_are_checked() -> None:
    case = draw(3, 8, 20)
    x, W = case["x"], case["W"]
    with pytest.raises(ValueError, match="mask"):
        native_encode.encode_topk(x, W, None, None, None, torch.ones(21, dtype=torch.bool), None, 1, True)
    with pytest.raises(ValueError, match="packed"):
        native_encode.encode_topk(x, W, None, None, None, None, torch.zeros(5, dtype=torch.int32), 1, True)
    with pytest.raises(ValueError, match="k must be above 0"):
        native_encode.encode_batch_topk(x, W, None, None, None, None, None, -1.0)
