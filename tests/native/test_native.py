"""What only the compiled layer can get wrong: every instruction set level, threads, page boundaries, fork, refusals.

The contract suite covers the operations; here the functions of fastsae.native.decode are called directly.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys

import pytest
import torch
from levels import codes

from fastsae.native import decode as kernels
from fastsae.native import loader

pytestmark = pytest.mark.skipif(loader.unavailable() is not None, reason=str(loader.unavailable()))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["rows", "transposed", "strided"]
SHAPES = [  # B, D, F, K
    (5, 7, 11, 3),
    (33, 100, 300, 64),
    (3, 257, 50, 150),
    (64, 512, 4096, 16),
    (1, 1, 1, 1),
    (0, 5, 5, 2),
    (4, 64, 9, 0),
    (2, 64, 512, 4),
]
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


def layout(W: torch.Tensor, how: str) -> torch.Tensor:
    """The same matrix, as a plain one, a transposed view, or every second row and third column of a larger one."""
    if how == "rows":
        return W.contiguous()
    if how == "transposed":
        return W.t().contiguous().t()
    large = torch.full((2 * W.shape[0], 3 * W.shape[1]), 7.0, dtype=W.dtype)
    large[::2, ::3] = W
    return large[::2, ::3]


def draw(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """values [B, K], indices [B, K], W [F, D], b [D], grad [B, D]"""
    B, D, F, K = shape
    g = torch.Generator().manual_seed(B * 1000 + D)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g).to(dtype)

    return normal(B, K), torch.randint(0, F, (B, K), generator=g), normal(F, D), normal(D).float(), normal(B, D)


def assert_within_two_ulp(got: torch.Tensor, terms: torch.Tensor, dim: int) -> None:
    """|got − Σ terms| <= 2 ulp of Σ |terms|, terms in float64."""
    exact, scale = terms.sum(dim), terms.abs().sum(dim)
    error = (got.double() - exact).abs() - 2 * (EPS[got.dtype] * scale + SMALLEST[got.dtype])
    assert got.shape == exact.shape
    assert (error <= 0).all(), f"{error.max().item():.3g} beyond 2 ulp"  # false for NaN


@pytest.fixture(params=codes() or ["none"])
def level(request: pytest.FixtureRequest):
    with loader.use_isa(request.param):
        assert loader.isa() == request.param  # the level that is reported is the level that runs
        yield request.param


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_level_matches_float64(level: str, shape: tuple[int, int, int, int], dtype: torch.dtype, how: str) -> None:
    values, indices, W, b, grad = draw(shape, dtype)
    F, D = W.shape
    given = layout(W, how)
    rows = W.double()[indices]  # [B, K, D]
    terms = torch.cat([values.double()[..., None] * rows, b.double().expand(len(values), 1, D)], 1)
    assert_within_two_ulp(kernels.decode(values, indices, None, given, b), terms, 1)
    assert_within_two_ulp(kernels.decode_dvalues(grad, indices.int(), None, given), grad.double()[:, None] * rows, 2)

    out = layout(torch.full((F, D), float("nan"), dtype=dtype), how)
    kernels.decode_dweight(values, indices, None, grad, out)
    products = values.double()[..., None] * grad.double()[:, None]
    exact, scale = torch.zeros(2, F, D, dtype=torch.float64)
    exact.index_add_(0, indices.flatten(), products.reshape(indices.numel(), D))
    scale.index_add_(0, indices.flatten(), products.abs().reshape(indices.numel(), D))
    assert ((out.double() - exact).abs() <= 2 * (EPS[dtype] * scale + SMALLEST[dtype])).all()
    assert not (out[scale == 0].double() != 0).any()


@pytest.mark.parametrize("how", LAYOUTS)
def test_bits_do_not_depend_on_threads_batch_or_layout(level: str, how: str) -> None:
    values, indices, W, b, grad = draw((300, 770, 2000, 37), torch.float32)
    given = layout(W, how)

    def everything() -> list[torch.Tensor]:
        out = layout(torch.empty_like(W), how)
        kernels.decode_dweight(values, indices, None, grad, out)
        return [
            kernels.decode(values, indices, None, given, b),
            kernels.decode_dvalues(grad, indices, None, given),
            out.contiguous(),
        ]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        serial = everything()
        torch.set_num_threads(2)
        threaded = everything()
    finally:
        torch.set_num_threads(before)
    for a, c in zip(serial, threaded, strict=True):
        assert torch.equal(a, c)
    y, dvalues, dweight = serial
    for part in (slice(0, 1), slice(7, 12), slice(150, 300)):
        assert torch.equal(kernels.decode(values[part], indices[part], None, given, b), y[part])
        assert torch.equal(kernels.decode_dvalues(grad[part], indices[part], None, given), dvalues[part])
    assert torch.equal(kernels.decode(values, indices, None, W, b), y)
    plain = torch.empty_like(W)
    kernels.decode_dweight(values, indices, None, grad, plain)
    assert torch.equal(plain, dweight)


@pytest.mark.parametrize("how", LAYOUTS)
def test_ragged_rows_equal_rows_of_fixed_length(level: str, how: str) -> None:
    values, indices, W, b, grad = draw((12, 130, 200, 70), torch.float32)
    given = layout(W, how)
    lengths = torch.tensor([70, 0, 1, 16, 17, 64, 0, 0, 33, 70, 5, 0])
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    keep = torch.arange(70) < lengths[:, None]
    y = kernels.decode(values[keep], indices[keep], crow, given, b)
    dvalues = kernels.decode_dvalues(grad, indices[keep], crow, given)
    assert torch.equal(dvalues, kernels.decode_dvalues(grad, indices, None, given)[keep])
    for r, length in enumerate(lengths.tolist()):
        assert torch.equal(y[r : r + 1], kernels.decode(values[r : r + 1, :length], indices[r : r + 1, :length], None, given, b))


def test_avx2_and_avx512_give_the_same_bits() -> None:
    if not {"avx2", "avx512"} <= set(loader.isa_levels()):
        pytest.skip(f"levels here: {loader.isa_levels()}")
    values, indices, W, b, grad = draw((20, 333, 100, 40), torch.float32)
    results = []
    for name in ("avx2", "avx512"):
        with loader.use_isa(name):
            results.append((kernels.decode(values, indices, None, W, b), kernels.decode_dvalues(grad, indices, None, W)))
    for a, c in zip(*results, strict=True):
        assert torch.equal(a, c)


def test_special_values_follow_ieee(level: str) -> None:
    W = torch.tensor([[float("inf"), float("nan"), -0.0], [1e-40, 1.0, -0.0]])
    zero, one = torch.tensor([[0.0]]), torch.tensor([[1.0]])
    first = kernels.decode(zero, torch.tensor([[0]]), None, W, None)
    assert first[0, :2].isnan().all()
    assert first[0, 2] == 0
    assert torch.equal(kernels.decode(one, torch.tensor([[1]]), None, W, None), W[1:])  # denormals survive
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.tensor([65504.0, 65520.0, float("nan"), float("-inf"), 2.0**-24, 3e-8, 1.00390625, 2049.0])
        ones = torch.ones(1, 1, dtype=dtype)
        got = kernels.decode(ones, torch.zeros(1, 1, dtype=torch.int64), None, torch.zeros(1, 8, dtype=dtype), x)[0]
        assert torch.equal(got.isnan(), x.isnan())
        assert torch.equal(got.nan_to_num(9.0), x.to(dtype).nan_to_num(9.0))  # rounds as torch does


class Guarded:
    """Tensors that end at a page which may not be touched."""

    def __init__(self) -> None:
        self.kept: list[mmap.mmap] = []
        self.libc = ctypes.CDLL(None, use_errno=True)

    def __call__(self, t: torch.Tensor) -> torch.Tensor:
        flat = t.contiguous()
        size = flat.numel() * flat.element_size()
        pages = -(-size // mmap.PAGESIZE)
        memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        self.kept.append(memory)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        assert self.libc.mprotect(ctypes.c_void_p(whole.data_ptr() + pages * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
        end = whole[pages * mmap.PAGESIZE - size : pages * mmap.PAGESIZE]
        guarded = end.view(flat.dtype).view(flat.shape)
        guarded.copy_(flat)
        return guarded


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect on anonymous mmap")
@pytest.mark.parametrize("D", [1, 15, 17, 63, 65, 131, 257])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_nothing_beyond_a_tensor_is_touched(level: str, dtype: torch.dtype, D: int) -> None:
    guard = Guarded()
    B, F, K = 5, 19, 7
    values, indices, W, b, grad = draw((B, D, F, K), dtype)
    indices[-1, -1] = F - 1
    v, i, g, bias = guard(values), guard(indices), guard(grad), guard(b)
    for given, out in ((guard(W), guard(W)), (guard(W.t()).t(), guard(W.t()).t())):
        assert torch.equal(kernels.decode(v, i, None, given, bias), kernels.decode(values, indices, None, given.clone(), b))
        kernels.decode_dvalues(g, guard(indices.int()), None, given)
        kernels.decode_dweight(v, i, None, g, out)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_child_of_a_threaded_parent_finishes() -> None:
    code = """
import os, torch
from fastsae.native import decode as kernels
torch.set_num_threads(2)
v, i, W = torch.randn(512, 32), torch.randint(0, 4096, (512, 32)), torch.randn(4096, 256)
y = kernels.decode(v, i, None, W, None)
child = os.fork()
if child == 0:
    same = kernels.decode(v, i, None, W, None).numpy().tobytes() == y.numpy().tobytes()  # torch.equal itself would hang here
    os._exit(0 if same else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)


def test_threads_are_torch_s_own_where_they_are_not_in_the_global_scope() -> None:
    """As with torch's wheels for aarch64: every kernel ran on one thread there."""
    code = """
import ctypes
load = ctypes.CDLL.__init__
ctypes.CDLL.__init__ = lambda self, name, mode=0, *a, **o: load(self, name, ctypes.RTLD_LOCAL, *a, **o)
from fastsae import _C
assert not hasattr(ctypes.CDLL(None), "GOMP_parallel") and _C.threads_available()
"""
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)


def test_bad_indices_are_named_before_anything_is_read() -> None:
    values, indices, W, b, grad = draw((4, 8, 10, 3), torch.float32)
    for bad in (10, -1, 2**40):
        wrong = indices.clone()
        wrong[2, 1] = bad
        for call in (
            lambda i: kernels.decode(values, i, None, W, b),
            lambda i: kernels.decode_dvalues(grad, i, None, W),
            lambda i: kernels.decode_dweight(values, i, None, grad, torch.empty_like(W)),
        ):
            with pytest.raises(IndexError, match=rf"latents\.indices: {bad} at \[2, 1\] .* 10 features \(valid: 0 <= index < 10\)"):
                call(wrong)
    for crow in ([0, 2, 1, 12], [1, 2, 3, 12], [0, 1, 2, 11], [0, 1, 13, 12]):
        with pytest.raises(ValueError, match=r"latents\.crow"):
            kernels.decode(values.flatten(), indices.flatten(), torch.tensor(crow), W, b)


def test_refusals_give_the_reason() -> None:
    values, indices, W, b, grad = draw((4, 8, 10, 3), torch.float32)
    assert kernels.refuses_decode(values, indices, None, W, b) is None
    double = kernels.refuses_decode(values.double(), indices, None, W.double(), None)
    assert double == "dtype float64 (supported: float32, bfloat16, float16)"
    assert "mixed dtypes" in str(kernels.refuses_decode_dvalues(grad.half(), indices, None, W))
    assert "device meta" in str(kernels.refuses_decode_dweight(values.to("meta"), indices, None, grad, W))
    assert "index dtype int16" in str(kernels.refuses_decode(values, indices.short(), None, W, b))


def test_inputs_may_lie_anyhow(level: str) -> None:
    values, indices, W, b, grad = draw((6, 40, 30, 5), torch.float32)
    y = kernels.decode(values, indices, None, W, b)
    assert torch.equal(kernels.decode(values.t().contiguous().t(), indices.t().contiguous().t(), None, W, b), y)
    assert torch.equal(kernels.decode(values, indices, None, W, torch.stack([b, b], 1)[:, 0]), y)
    one = grad[:1, :1].expand(6, 40)
    assert torch.equal(kernels.decode_dvalues(one, indices, None, W), kernels.decode_dvalues(one.clone(), indices, None, W))
    repeated = W[:1].expand(30, 40)  # stride 0
    assert torch.equal(kernels.decode(values, indices, None, repeated, b), kernels.decode(values, indices, None, repeated.clone(), b))
    column = W[:, :1].expand(30, 40)
    assert torch.equal(kernels.decode(values, indices, None, column, b), kernels.decode(values, indices, None, column.clone(), b))


@pytest.mark.slow
def test_an_unknown_level_in_the_environment_is_an_error_on_use() -> None:
    code = "from fastsae.native import loader; assert loader.unavailable() is None; loader.isa()"
    for name in ("avx9", "AVX2"):
        environment = {**os.environ, "FASTSAE_ISA": name}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 1
        assert f"FASTSAE_ISA='{name}'" in run.stderr
        assert "available: portable" in run.stderr
    run = subprocess.run(
        [sys.executable, "-c", "from fastsae.native import loader; print(loader.isa())"],
        env={**os.environ, "FASTSAE_ISA": "portable"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "portable"
    with pytest.raises(ValueError, match="use_isa"), loader.use_isa("avx9"):
        pass
