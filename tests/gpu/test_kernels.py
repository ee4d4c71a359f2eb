"""Triton kernels without a GPU: their arithmetic in the interpreter, and every launch compiled ahead of time for six chips.

Triton decides when a kernel module is imported whether it is compiled or interpreted, so the interpreter's tests run in a process of
their own with TRITON_INTERPRET=1, which ``test_in_the_interpreter`` starts. bfloat16 is compiled here but not interpreted: the
interpreter computes it wrongly.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton_marks import CI, CPU, compiled, interpreted, on_gpu, passes_in_the_interpreter, usable

pytest.importorskip("triton")

from fastsae._core import flags, triton_support
from fastsae.kernels import _problem, encode
from fastsae.kernels import decode as kernels
from fastsae.latents import ScoreInputs


@compiled
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    passes_in_the_interpreter(__file__)


# ---------------------------------------------------------------- references, term by term


def row_of_slot(indices: Tensor, crow: Tensor | None) -> Tensor:
    if crow is None:
        return torch.arange(indices.shape[0]).repeat_interleave(indices.shape[1])
    return torch.repeat_interleave(torch.arange(crow.shape[0] - 1), crow.diff())


def expected(values: Tensor, indices: Tensor, crow: Tensor | None, W: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The three results in the dtype of the arguments (float64 for an oracle)."""
    row, index, value = row_of_slot(indices, crow), indices.reshape(-1).long(), values.reshape(-1)
    return {
        "decode": torch.zeros_like(grad).index_add_(0, row, value[:, None] * W[index]),
        "dvalues": (grad[row] * W[index]).sum(1).reshape(indices.shape),
        "dweight": torch.zeros_like(W).index_add_(0, index, value[:, None] * grad[row]),
    }


def computed(values: Tensor, indices: Tensor, crow: Tensor | None, W: Tensor, grad: Tensor) -> dict[str, Tensor]:
    out = torch.full_like(W, float("nan"))  # of the strides of W
    assert kernels.decode_dweight(values, indices, crow, grad, out) is None
    return {
        "decode": kernels.decode(values, indices, crow, W, None),
        "dvalues": kernels.decode_dvalues(grad, indices, crow, W),
        "dweight": out,
    }


def assert_close(args: tuple[Any, ...], results: dict[str, Tensor], dtype: torch.dtype) -> None:
    """One rounding to the dtype, and float32 sums whose chains are at most 16 terms a block, 128 columns a block, and the block sums."""
    double = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    exact = expected(*double)
    size = expected(*[a.abs() if isinstance(a, Tensor) and a.is_floating_point() else a for a in double])
    for name, result in results.items():
        assert (result.dtype, result.shape) == (dtype, exact[name].shape), name
        allowed = torch.finfo(dtype).eps * exact[name].abs() + 80 * 2.0**-24 * size[name] + torch.finfo(dtype).smallest_normal
        assert bool(((result.double() - exact[name]).abs() <= allowed).all()), name


# ---------------------------------------------------------------- inputs


def weights(layout: str, n_features: int, D: int, dtype: torch.dtype) -> Tensor:
    if layout == "rows":
        return torch.randn(n_features, D).to(dtype)
    if layout == "columns":
        return torch.randn(D, n_features).to(dtype).T
    framed = torch.full((n_features + 2, 2 * D + 3), float("nan"), dtype=dtype)  # a view inside NaN: a stray read shows
    inside = framed[1:-1, 3 : 2 * D + 3 : 2]
    return inside.copy_(torch.randn(n_features, D))


def inputs(form: str, n_features: int, D: int, dtype: torch.dtype, layout: str, integers: bool = False, seed: int = 0) -> tuple[Any, ...]:
    """(values, indices, crow, W, grad) with repeated features, an unused last one, rows of 0, 1, 8, 64, 65 and 130 slots."""
    torch.manual_seed(seed)
    crow = None
    if form == "ragged":
        lengths = [0, 1, 65, 8, 0, 130, 64, 0]
        crow = torch.tensor([0, *lengths]).cumsum(0)
        shape, rows = (sum(lengths),), len(lengths)
    else:
        rows, k = {"fixed": (5, 7), "one": (1, 1), "wide": (2, 67)}[form]
        shape = (rows, k)
    indices = torch.randint(0, max(1, n_features - 1), shape, dtype=torch.int32 if form == "wide" else torch.int64)
    values, W, grad = torch.randn(shape).to(dtype), weights(layout, n_features, D, dtype), torch.randn(rows, D).to(dtype)
    if integers:
        values, grad = (values * 2).round().clamp(-4, 4), (grad * 2).round().clamp(-4, 4)
        W.copy_((W * 2).round().clamp(-4, 4))
    return values, indices, crow, W, grad


# ---------------------------------------------------------------- in the interpreter


@interpreted
@usable
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "framed"])
@pytest.mark.parametrize(("form", "n_features", "D"), [("fixed", 9, 37), ("one", 1, 1), ("wide", 40, 130), ("ragged", 30, 33)])
def test_float64(form: str, n_features: int, D: int, layout: str, dtype: torch.dtype) -> None:
    if CI and ((layout != "rows" or form == "wide") if dtype is torch.float16 else (form, layout) == ("wide", "columns")):
        pytest.skip("the layouts in float16, and the widest in columns: make deep")
    args = inputs(form, n_features, D, dtype, layout)
    before = [a.clone() if isinstance(a, Tensor) else None for a in args]
    assert_close(args, computed(*args), dtype)
    for was, now in zip(before, args, strict=True):
        assert was is None or torch.equal(was, now)


@interpreted
@usable
@pytest.mark.parametrize("layout", ["columns"] if CI else ["rows", "columns"])
def test_small_integers_are_exact(layout: str) -> None:
    args = inputs("ragged", 30, 33, torch.float32, layout, integers=True)
    want, got = expected(*args), computed(*args)
    for name in want:
        assert torch.equal(want[name], got[name]), name


@interpreted
@usable
@pytest.mark.parametrize("b_dtype", [torch.float16, torch.float32], ids=str)
def test_bias_is_added_last_and_rounded_once(b_dtype: torch.dtype) -> None:
    values, indices, _, W, _ = inputs("fixed", 9, 37, torch.float16, "rows")
    b = torch.randn(74)[::2].to(b_dtype)
    exact = torch.einsum("rk,rkd->rd", values.double(), W.double()[indices]) + b.double()
    got = kernels.decode(values, indices, None, W, b)
    assert bool(((got.double() - exact).abs() <= 0.51 * 2.0**-10 * exact.abs() + 1e-6).all())
    assert torch.equal(kernels.decode(values[:, :0], indices[:, :0], None, W, b), b.half().expand(5, 37))


@interpreted
@usable
@pytest.mark.parametrize("form", ["fixed", "ragged"])
def test_order_of_summation(form: str) -> None:
    """The documented order, replayed in float32 (the interpreter does not fuse a product with its sum)."""
    values, indices, crow, W, grad = inputs(form, 30, 200, torch.float32, "rows")
    got = computed(values, indices, crow, W, grad)
    row, index, value = row_of_slot(indices, crow), indices.reshape(-1), values.reshape(-1)

    def in_blocks(terms: Tensor) -> np.ndarray:
        total = np.zeros(terms.shape[1], np.float32)
        for start in range(0, len(terms), 16):
            block = np.zeros_like(total)
            for term in terms[start : start + 16].numpy():
                block += term
            total += block
        return total

    for r in range(grad.shape[0]):
        want = in_blocks(value[row == r, None] * W[index[row == r]])
        assert np.array_equal(got["decode"][r].numpy(), want)
    for f in range(W.shape[0]):
        want = in_blocks(value[index == f, None] * grad[row[index == f]])
        assert np.array_equal(got["dweight"][f].numpy(), want)
    products = torch.nn.functional.pad(grad[row] * W[index], (0, 256 - 200)).numpy().reshape(-1, 2, 4, 32)
    lanes = products[:, :, 0] + products[:, :, 1] + products[:, :, 2] + products[:, :, 3]  # left to right
    while lanes.shape[2] > 1:
        lanes = lanes[:, :, 0::2] + lanes[:, :, 1::2]
    assert np.array_equal(got["dvalues"].reshape(-1).numpy(), lanes[:, 0, 0] + lanes[:, 1, 0])


@interpreted
@usable
def test_bits_do_not_depend_on_batch_or_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    values, indices, _, W, grad = inputs("wide", 40, 300, torch.float32, "rows")
    turned, ragged = W.T.contiguous().T, torch.tensor([0, 67, 134])
    assert kernels._is_turned(turned, indices.numel())
    assert not kernels._is_turned(turned, 4)
    assert not kernels._is_turned(W, 1 << 20)
    y, dvalues = kernels.decode(values, indices, None, W, None), kernels.decode_dvalues(grad, indices, None, W)
    panels = []
    monkeypatch.setattr(kernels, "_turn", lambda source, target, turn=kernels._turn: panels.append(target.shape[1]) or turn(source, target))
    monkeypatch.setattr(kernels, "PANEL_BYTES", 0)
    assert torch.equal(y, kernels.decode(values, indices, None, turned, None))
    assert torch.equal(dvalues, kernels.decode_dvalues(grad, indices, None, turned))
    assert panels == [128, 128, 44] * 2
    assert torch.equal(y[1:], kernels.decode(values[1:], indices[1:], None, W, None))
    assert torch.equal(dvalues[1:], kernels.decode_dvalues(grad[1:], indices[1:], None, W))
    assert torch.equal(y, kernels.decode(values.reshape(-1), indices.reshape(-1), ragged, W, None))
    assert torch.equal(dvalues.reshape(-1), kernels.decode_dvalues(grad, indices.reshape(-1), ragged, W))


@interpreted
@usable
@pytest.mark.parametrize("most", [1 << 16, 6])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_heavy_features_cross_splits(layout: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SPLIT", 4)
    monkeypatch.setattr(kernels, "MAX_PARTIALS", most)
    lengths = [0, 1, 3, 4, 5, 8, 9, 41, 0]
    torch.manual_seed(1)
    indices = torch.repeat_interleave(torch.arange(9), torch.tensor(lengths))
    indices = torch.cat([indices, indices.new_zeros(1)])[torch.randperm(72)].reshape(24, 3)
    indices[indices == 0] = 7  # the odd slot, so that feature 0 stays empty
    args = (torch.randn(24, 3), indices, None, weights(layout, 9, 19, torch.float32), torch.randn(24, 19))
    got, again = computed(*args), torch.empty_like(args[3])
    assert_close(args, got, torch.float32)
    kernels.decode_dweight(*args[:3], args[4], again)
    assert torch.equal(got["dweight"], again)
    assert not got["dweight"][0].any()
    assert not got["dweight"][8].any()


@interpreted
@usable
def test_a_feature_above_the_real_split() -> None:
    rows = 2 * kernels.SPLIT + 9
    args = (torch.randn(rows, 1), torch.ones(rows, 1, dtype=torch.int64), None, torch.randn(3, 5), torch.randn(rows, 5))
    out = torch.empty(3, 5)
    kernels.decode_dweight(args[0], args[1], None, args[4], out)
    assert_close(args, {"dweight": out}, torch.float32)


@interpreted
@usable
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_special_values_follow_ieee(special: float) -> None:
    values, indices, crow, W, grad = inputs("ragged", 30, 9, torch.float32, "rows")
    values[3] = special
    values[4] = 0.0
    W[int(indices[4])] = special  # zero times infinity
    grad[2, 1] = special
    want, got = expected(values, indices, crow, W, grad), computed(values, indices, crow, W, grad)
    for name in want:
        assert torch.equal(want[name].isnan(), got[name].isnan()), name
        assert torch.equal(want[name].nan_to_num(0).isinf(), got[name].nan_to_num(0).isinf()), name
        infinite = want[name].isinf()
        assert torch.equal(want[name][infinite], got[name][infinite]), name


@interpreted
@usable
@pytest.mark.parametrize(("rows", "k", "n_features", "D"), [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 4, 0), (0, 0, 0, 0), (2, 0, 0, 5)])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_sizes_of_zero(rows: int, k: int, n_features: int, D: int, layout: str) -> None:
    indices = torch.zeros(rows, k, dtype=torch.int64)
    args = (torch.ones(rows, k), indices, None, weights(layout, n_features, D, torch.float32), torch.ones(rows, D))
    assert_close(args, computed(*args), torch.float32)
    crow = torch.arange(rows + 1) * k
    args = (torch.ones(rows * k), indices.reshape(-1), crow, *args[3:])
    assert_close(args, computed(*args), torch.float32)


@interpreted
@pytest.mark.parametrize(
    ("columns", "size", "weight", "crowded"), [(2, 1000, 1, 0), (16, 100, 1, 0), (2, 1000, 0.01, 0), (48, 1000, 0.01, 1)]
)
def test_outlier_columns_that_crowd_a_screened_row(columns: int, size: float, weight: float, crowded: float) -> None:
    """A model in float64 of what the screen leaves of the k best: more than the room for it only with many columns that features ignore."""
    generator = torch.Generator().manual_seed(0)
    rows, D, F, k = 16, 512, 4096, 16
    x, W = torch.randn(rows, D, generator=generator), torch.randn(F, D, generator=generator)
    far = torch.randperm(D, generator=generator)[:columns]
    x[:, far], W[:, far] = x[:, far] * size, W[:, far] * weight
    operands = _problem.Operands.of(_problem.problem(ScoreInputs(x, W, None)))
    ((_, panel, _),) = operands.panels(_problem.problem(ScoreInputs(x, W, None)))
    (a, c, back), (norm, loss, W_back) = operands.x_factors.double()[:, :, None], operands.W_factors.double()
    r = (operands.x.double() @ panel.double().T) * back * W_back
    n = int(operands.n_far)
    assert n == min(columns, 8)
    upper, scores = r + operands.x_far[:n].double().T @ operands.W_far[:n].double() + a * norm + c * loss, x.double() @ W.double().T
    assert bool((upper >= scores).all())
    least = scores.gather(1, upper.topk(k).indices).amin(1, keepdim=True)
    room = encode.Buckets(1, 128, F // 128, k).extra
    assert float(((upper >= least).sum(1) - k > room).double().mean()) == crowded


@interpreted
@usable
def test_expanded_and_strided_arguments() -> None:
    values, indices, _, W, grad = inputs("fixed", 9, 37, torch.float32, "rows")
    flat = grad[:, :1].expand(5, 37)
    wide = torch.randn(5, 14)[:, ::2]
    args = (wide, indices.T.contiguous().T, None, W, flat)
    assert_close(args, computed(*args), torch.float32)
    turned = (values, indices, None, W, grad.T.contiguous().T)
    plain = computed(values, indices, None, W, grad)
    for name, result in computed(*turned).items():
        assert torch.equal(result, plain[name]), name


@interpreted
@usable
@pytest.mark.parametrize("bad", [-1, 9, 2**40, -(2**63)])
def test_bad_index(bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values, indices, _, W, grad = inputs("fixed", 9, 37, torch.float32, "rows")
    good = computed(values, indices, None, W, grad)
    broken = indices.clone()
    broken[2, 3] = bad
    message = re.escape(f"latents.indices holds {bad} at [2, 3], expected 0 <= index < 9")
    for call in (kernels.decode, kernels.decode_dweight):
        with pytest.raises(IndexError, match=message):
            call(values, broken, None, W if call is kernels.decode else grad, None if call is kernels.decode else W)
    with pytest.raises(IndexError, match=message):
        kernels.decode_dvalues(grad, broken, None, W)

    # As on a GPU: no check before the launch.
    monkeypatch.setattr(kernels, "check_on_cpu", lambda *args: None)
    monkeypatch.setattr(flags, "_flags", {})
    flags.raise_if_set()
    for name, got in computed(values, broken, None, W, grad).items():
        wrong = got != good[name]
        if name == "decode":
            assert bool(got[2].isnan().all())
            assert not wrong[[0, 1, 3, 4]].any()
        elif name == "dvalues":
            assert bool(got[2, 3].isnan())
            assert int(wrong.sum()) == 1
        else:
            kept = torch.where(broken == bad, 0.0, values)
            assert_close((kept, indices, None, W, grad), {"dweight": got}, torch.float32)
    with pytest.raises(IndexError, match=r"out of range in an operation on cpu since the last fastsae.check\(\)"):
        flags.raise_if_set()
    flags.raise_if_set()


@interpreted
@usable
@pytest.mark.parametrize("alone", ["decode", "decode_dvalues", "decode_dweight"])
def test_each_operation_sets_the_flag(alone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "check_on_cpu", lambda *args: None)
    monkeypatch.setattr(flags, "_flags", {})
    values, indices, W, grad = torch.ones(1, 2), torch.tensor([[0, 3]]), torch.ones(3, 4), torch.ones(1, 4)
    calls = {
        "decode": lambda: kernels.decode(values, indices, None, W, None),
        "decode_dvalues": lambda: kernels.decode_dvalues(grad, indices, None, W),
        "decode_dweight": lambda: kernels.decode_dweight(values, indices, None, grad, W),
    }
    calls[alone]()
    with pytest.raises(IndexError):
        flags.raise_if_set()


@interpreted
@usable
@pytest.mark.parametrize("crow", [[0, 2, 1, 4], [1, 2, 3, 4], [0, 1, 2, 9]])
def test_a_broken_crow_is_refused_and_stays_inside(crow: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    args = (torch.ones(4), torch.zeros(4, dtype=torch.int64), torch.tensor(crow), torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"latents.crow must rise from 0 to nnz=4"):
        kernels.decode(*args, None)
    monkeypatch.setattr(kernels, "check_on_cpu", lambda *args: None)
    assert kernels.decode(*args, None).shape == (3, 4)


@interpreted
def test_the_interpreter_refuses_bfloat16() -> None:
    reason = triton_support.dtype_reason(torch.ones(1), torch.ones(1, dtype=torch.bfloat16))
    assert reason is not None
    assert reason.startswith("dtype bfloat16 (Triton's interpreter computes it wrongly")


# ---------------------------------------------------------------- reasons


def test_reasons() -> None:
    ones = torch.ones(1)
    assert triton_support.dtype_reason(ones, ones.half(), None, ones.long()) is None
    assert triton_support.dtype_reason(ones, ones.double()) == "dtype float64 (supported: float32, bfloat16, float16)"
    assert triton_support.unavailable(torch.device("mps")) == "device mps (supported: cuda)"
    if not triton_support.interpreting():
        assert triton_support.unavailable(CPU) == "device cpu (supported: cuda; set TRITON_INTERPRET=1 for the interpreter)"
    if not torch.cuda.is_available():
        assert triton_support.unavailable(torch.device("cuda", 0)) == "no CUDA device (torch.cuda.is_available() is False)"


def test_reasons_do_not_import_triton() -> None:
    code = "import sys, torch; from fastsae._core import triton_support as support"
    code += "; support.unavailable(torch.device('cpu')); assert 'triton' not in sys.modules"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_folder_is_no_package_of_its_own() -> None:
    path = kernels.__file__
    name = os.path.basename(os.path.dirname(path))
    code = f"import sys; sys.path.insert(0, {os.path.dirname(os.path.dirname(path))!r}); import {name} as found\n"
    code += "assert getattr(found, '__version__', 'N/A') == 'N/A'\ntry: import " + name + ".decode\nexcept ImportError: found.decode"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "AttributeError: this folder is the package fastsae.kernels" in done.stderr


# ---------------------------------------------------------------- ahead of time


@pytest.fixture(scope="module")
def launches() -> dict[str, list[Any]]:
    """Every launch of realistic calls, without repeats: by dtype for the usual shape, and "unusual" ones; in CI each form in one dtype."""
    import aot

    usual, unusual, found = ("fixed", "turned", "int32"), ("ragged", "odd", "strided"), {}
    for dtype, few in ((torch.float32, usual[:2]), (torch.bfloat16, usual[::2]), (torch.float16, usual[:1])):
        found[str(dtype).removeprefix("torch.")] = _record(aot, dtype, few if CI else usual)
    found["unusual"] = _record(aot, torch.float32, unusual[:2] if CI else unusual)
    found["unusual"] += _record(aot, torch.bfloat16, unusual[2:] if CI else unusual)
    return found


def _record(aot: ModuleType, dtype: torch.dtype, forms: tuple[str, ...]) -> list[Any]:
    found = {}
    for form in forms:
        n_features, D, rows, k = 512, 771 if form == "odd" else 768, 300, 33 if form == "odd" else 32
        W, grad, out = torch.zeros(n_features, D, dtype=dtype), torch.zeros(rows, D, dtype=dtype), torch.zeros(n_features, D, dtype=dtype)
        if form == "turned":
            W, out = (torch.zeros(D, n_features, dtype=dtype).T for _ in range(2))
        if form == "strided":
            W, grad = torch.zeros(n_features, 2 * D, dtype=dtype)[:, ::2], grad[:1, :1].expand(rows, D)
        values, indices = torch.zeros(rows, k, dtype=dtype), torch.zeros(rows, k, dtype=torch.int32 if form == "int32" else torch.int64)
        crow = None
        if form == "ragged":
            values, indices, crow = values.reshape(-1), indices.reshape(-1), torch.arange(rows + 1) * k
        with aot.record() as launches:
            kernels.decode(values, indices, crow, W, None)
            if form == "fixed":
                kernels.decode(values, indices, crow, W, W[0])
                kernels.decode(values.float(), indices, crow, W, W[0].float())
            kernels.decode_dvalues(grad, indices, crow, W)
            kernels.decode_dweight(values, indices, crow, grad, out)
        found.update(dict.fromkeys(launches))
    return list({(l.kernel, l.signature, l.constants, l.aligned, l.options): l for l in found}.values())


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_compiles_within_the_chip(capability: int, launches: dict[str, list[Any]]) -> None:
    """Each dtype with both index dtypes and both layouts of W (CI: each of them in one dtype); ragged, odd and strided calls on the oldest
    and on sm_90, which is the chip of CI: FASTSAE_TEST_ARCHS=all (`make deep`) takes all six."""
    import aot

    if capability != 90 and os.environ.get("FASTSAE_TEST_ARCHS") != "all":
        pytest.skip("FASTSAE_TEST_ARCHS=all compiles for it")

    chosen = [launch for name, group in launches.items() if name != "unusual" or capability in (80, 90) for launch in group]
    assert {launch.name for launch in chosen} == {name for name in vars(kernels) if name.endswith("_kernel")}
    for launch in chosen:
        usage = aot.compile_launch(launch, capability)
        assert usage.shared <= aot.SHARED_LIMIT[capability], launch
        assert usage.resources["STACK"] == usage.resources["LOCAL"] == 0, (launch, usage.resources)
        assert not re.search(r"tf32|\.ftz", usage.ptx), launch
        if launch.name not in ("turn_kernel", "sort_keys_kernel"):
            assert "fma.rn.f32" in usage.ptx, launch


@compiled
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gathers_16_bytes_a_thread(dtype: str, launches: dict[str, list[Any]]) -> None:
    import aot

    for launch in launches[dtype]:
        if launch.name in ("decode_kernel", "decode_dvalues_kernel", "decode_partials_kernel", "decode_dweight_kernel"):
            strides = dict(launch.constants)
            if strides.get("stride_d", strides.get("stride_g")) == 1:
                assert re.search(r"ld\.global\.v4\.b32", aot.compile_launch(launch, 90).ptx), launch


@compiled
def test_grids_fit_the_device(launches: dict[str, list[Any]]) -> None:
    for group in launches.values():
        for launch in group:
            assert 0 < launch.grid[0] < 2**31, launch
            assert all(0 < n < 2**16 for n in launch.grid[1:]), launch


# ---------------------------------------------------------------- on a GPU: what neither of the above can show


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [768, 771])
def test_gpu_bits_do_not_depend_on_batch_layout_or_alignment(D: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    W = torch.randn(4096, D, device="cuda").to(dtype)
    values, grad = torch.randn(513, 65, device="cuda").to(dtype), torch.randn(513, D, device="cuda").to(dtype)
    indices = torch.randint(0, 4096, (513, 65), device="cuda")
    y, dvalues = kernels.decode(values, indices, None, W, None), kernels.decode_dvalues(grad, indices, None, W)
    shifted = torch.empty(W.numel() + 1, device="cuda", dtype=dtype)[1:].view_as(W).copy_(W)
    for part in (slice(None), slice(1, 2), slice(7, 300)):
        for weight in (W, shifted, W.T.contiguous().T):
            assert torch.equal(y[part], kernels.decode(values[part], indices[part], None, weight, None))
            assert torch.equal(dvalues[part], kernels.decode_dvalues(grad[part], indices[part], None, weight))
    outs = [torch.full_like(weight, float("nan")) for weight in (W, W, W.T.contiguous().T)]
    for out in outs:
        kernels.decode_dweight(values, indices, None, grad, out)
        assert torch.equal(out, outs[0])


@on_gpu
@pytest.mark.parametrize("bad", [-1, 64, 2**40])
def test_gpu_bad_index(bad: int) -> None:
    flags.raise_if_set()
    values, W, grad = torch.randn(5, 7, device="cuda"), torch.randn(64, 33, device="cuda"), torch.randn(5, 33, device="cuda")
    indices = torch.randint(0, 64, (5, 7), device="cuda")
    indices[2, 3] = bad
    out = torch.full_like(W, float("nan"))
    y, dvalues = kernels.decode(values, indices, None, W, None), kernels.decode_dvalues(grad, indices, None, W)
    kernels.decode_dweight(values, indices, None, grad, out)
    assert y.isnan().all(1).tolist() == [False, False, True, False, False]
    assert dvalues.isnan().nonzero().tolist() == [[2, 3]]
    kept = values.clone()
    kept[2, 3] = 0
    args = (kept.cpu(), indices.where(indices != bad, 0).cpu(), None, W.cpu(), grad.cpu())
    assert_close(args, {"dweight": out.cpu()}, torch.float32)
    with pytest.raises(IndexError, match="out of range in an operation on cuda:"):
        flags.raise_if_set()
    flags.raise_if_set()


@on_gpu
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_gpu_addresses_beyond_32_bits(layout: str) -> None:
    n_features, D, last = (1 << 21) + 5, 1030, (1 << 21) + 4
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    shape = (n_features, D) if layout == "rows" else (D, n_features)
    W = torch.ones(shape, device="cuda", dtype=torch.bfloat16)
    W = W if layout == "rows" else W.T
    W[last] = 3
    indices = torch.tensor([[last, 0], [last - 1, last]], device="cuda")
    values, grad = torch.ones(2, 2, device="cuda", dtype=torch.bfloat16), torch.ones(2, D, device="cuda", dtype=torch.bfloat16)
    assert bool((kernels.decode(values, indices, None, W, None) == 4).all())
    dvalues = kernels.decode_dvalues(grad, indices, None, W).float().tolist()
    assert dvalues == [[3088.0, 1032.0], [1032.0, 3088.0]]  # 3 * 1030 and 1030, rounded to bfloat16
    kernels.decode_dweight(values, indices, None, grad, W)
    assert bool((W[last] == 2).all())
    assert bool((W[0] == 1).all())
    assert int(W.count_nonzero()) == 3 * D
