"""The CUDA C++ rows without a GPU: the same sources run thread by thread on the CPU (emulation.py), and nvcc compiles them for six chips.

The emulation runs the threads of a block in ascending, descending and shuffled order: a missing barrier shows as another result. What
neither it nor the compiler can show is at the end, for machines with a GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch
from fence import Fence
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT
from torch import Tensor

import fastsae
from fastsae._core import checks, flags
from fastsae.dispatch import OPS
from fastsae.native import cuda as native_cuda
from fastsae.native.loader import build_info
from fastsae.verify import affordable, call

CPU = torch.device("cpu")
ROWS = [op for op in OPS.values() if any(row.backend == "cuda" for row in op.rows)]
NVCC = os.environ.get("FASTSAE_NVCC") or shutil.which("nvcc")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
on_built_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or native_cuda.missing() is not None, reason=f"needs a CUDA GPU and the module: {native_cuda.missing()}"
)
needs_compiler = pytest.mark.skipif(emulation.compiler() is None, reason="no C++ compiler: the CUDA C++ kernels were NOT run")
ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The CUDA rows on CPU tensors."""
    module = emulation.load()
    assert module.MAX_K == native_cuda.MOST_K
    monkeypatch.setenv("FASTSAE_CUDA_EMULATION", str(emulation.module_path()))
    for name, value in (("_module", module), ("_reason", None), ("_tried", True), ("_devices", {})):
        monkeypatch.setattr(native_cuda, name, value)
    yield module
    module.schedule(0)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the contract, emulated


@needs_compiler
@pytest.mark.slow
def test_the_contract_suite() -> None:
    environment = {**os.environ, "FASTSAE_CUDA_EMULATION": str(emulation.module_path()), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "tests/contract/test_contract.py", "-q", "-k", "emulated", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 4 * len(ROWS), done.stdout


@needs_compiler
@pytest.mark.parametrize("op", ROWS, ids=lambda op: op.name)
def test_nothing_outside_is_touched_in_any_order_of_threads(op: Any, emulated: Any) -> None:
    row = next(row for row in op.rows if row.backend == "cuda")
    tried = 0
    for number, args in enumerate(op.samples(CPU, op.dtypes[0], torch.Generator().manual_seed(3))):
        shared = any(isinstance(a, Tensor) and 0 in a.stride() and a.numel() > 1 for a in args)  # nothing can be copied into one
        if shared or row.reason(args) is not None or not affordable(row, CPU, args):
            continue
        tried += 1
        results = []
        for name, order in list(ORDERS.items())[:: 1 if number % 4 == 0 else 2]:
            emulated.schedule(order)
            with Fence(at_end=name != "descending") as fence:
                got = call(op, row, tuple(fence.copy(a) if isinstance(a, Tensor) else a for a in args))
                results.append([t.clone() for t in ((got,) if isinstance(got, Tensor) else got)])
        for other in results[1:]:
            assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(results[0], other, strict=True))
    assert tried > 3


RACE = """
#include "cuda/platform.h"
using namespace fastsae::cuda;
// Each thread reads what its opposite wrote; without the barrier, or with one that half of the threads skip.
__global__ void swap(int barrier, int* out) {
  __shared__ int value[64];
  value[threadIdx.x] = -1;
  __syncthreads();
  value[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (barrier == 1 || (barrier == 2 && threadIdx.x < 32)) __syncthreads();
  out[threadIdx.x] = value[63 - threadIdx.x];
}
int main() {
  for (int barrier = 0; barrier < 3; ++barrier)
    for (int order = 0; order < 3; ++order) {
      int out[64];
      emulate::schedule() = order;
      try {
        launch(swap, Where{0, nullptr}, 1, 64, barrier, out);
      } catch (const std::exception& error) {
        std::puts(error.what());
        return 0;
      }
      int missed = 0;
      for (int i = 0; i < 64; ++i) missed += out[i] != 63 - i;
      std::printf("%d %d %d\\n", barrier, order, missed);
    }
}
"""


@needs_compiler
def test_the_emulation_shows_missing_barriers(tmp_path: Path) -> None:
    source, program = tmp_path / "race.cpp", tmp_path / "race"
    source.write_text(RACE)
    subprocess.run([str(emulation.compiler()), *emulation.FLAGS, str(source), "-o", str(program)], check=True)
    lines = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()
    without, with_barrier, divergent = lines[:3], lines[3:6], lines[6:]
    assert all(int(line.split()[2]) > 0 for line in without)
    assert [line.split()[2] for line in with_barrier] == ["0", "0", "0"]
    assert divergent == ["emulation: threads wait at a barrier that others do not reach"]


# ---------------------------------------------------------------- each way through the kernels


def best(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = z.sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


@needs_compiler
@pytest.mark.parametrize(
    ("n", "k", "kind"),
    [
        (2048, 2048, "normal"),  # few
        (2049, 256, "normal"),  # maxima
        (3000, 257, "normal"),  # radix
        (2500, 2048, "normal"),
        (6000, 3, "equal"),  # more keys reach the bound than fit
        (6000, 200, "two"),
        (5000, 40, "ascending"),  # all of the best in neighbouring columns
        (4096, 8, "NaN"),
        (2600, 300, "denormal"),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_select_takes_every_way(n: int, k: int, kind: str, order: str, emulated: Any) -> None:
    z = draw(2, n)
    z = {
        "normal": z,
        "equal": torch.full_like(z, -3.0),
        "two": (z > 0).float(),
        "ascending": torch.arange(2.0 * n).reshape(2, n),
        "NaN": z.masked_fill(z > 1.5, float("nan")),
        "denormal": z * 1e-42,
    }[kind]
    emulated.schedule(ORDERS[order])
    values, indices = native_cuda.select_topk(z, k, False)
    expected = best(z, k)
    assert torch.equal(indices, expected[1])
    assert torch.equal(values.nan_to_num(9), expected[0].nan_to_num(9))


@needs_compiler
@settings(max_examples=15)
@given(st.integers(1, 3), st.integers(1, 2300), st.integers(1, 400), st.integers(1, 50), st.integers(0, 2**31))
def test_select_drawn(rows: int, n: int, k: int, levels: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTSAE_CUDA_EMULATION", "1")
        patch.setattr(native_cuda, "_module", emulation.load())
        z = torch.randint(-levels, levels, (rows, n), generator=torch.Generator().manual_seed(seed)).float()
        values, indices = native_cuda.select_topk(z, min(k, n), False)
        assert torch.equal(indices, best(z, min(k, n))[1])
        assert torch.equal(values, best(z, min(k, n))[0])


@needs_compiler
@pytest.mark.parametrize(("m", "k"), [(300, 7), (300, 300), (70, 65)])
def test_hamming_tiles_are_merged(m: int, k: int, emulated: Any) -> None:
    a = torch.randint(-(2**63), 2**63 - 1, (5, 2), generator=torch.Generator().manual_seed(1))
    b = torch.randint(-4, 4, (m, 2), generator=torch.Generator().manual_seed(2))  # many equal distances, across tiles
    whole = native_cuda.hamming_topk(a, b, k)
    tiled = native_cuda.hamming_topk(a, b, k, workspace=64 * 4 * 2)
    distance = fastsae.codes.hamming(a, b, backend="reference")
    order = distance.sort(dim=1, stable=True)
    for got in (whole, tiled):
        assert torch.equal(got[0], order.values[:, :k])
        assert torch.equal(got[1], order.indices[:, :k])


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [40, 37])
def test_heavy_features_cross_cuts(D: int, dtype: torch.dtype, emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_cuda, "SPLIT", 16)
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 9, (70, 3), generator=generator)
    indices[:, 0], indices[40:, 1] = 4, 4  # of 100 slots and more, several cuts; others lie inside one piece
    values, grad = (torch.randint(-4, 5, shape, generator=generator).to(dtype) for shape in ((70, 3), (70, D)))
    out = torch.full((9, D), float("nan"), dtype=dtype)
    native_cuda.decode_dweight(values, indices, None, grad, out)
    exact = torch.zeros(9, D, dtype=torch.float64)
    exact.index_add_(0, indices.flatten(), values.flatten().double()[:, None] * grad.double().repeat_interleave(3, 0))
    assert torch.equal(out, exact.to(dtype))  # small integers: every sum is exact


@needs_compiler
def test_the_order_of_summation(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 slots, fused; a piece between two cuts first, then the pieces in order: term by term."""
    monkeypatch.setattr(native_cuda, "SPLIT", 32)
    values, grad, out = draw(90, 1), draw(90, 5, seed=1), torch.empty(2, 5)
    indices = torch.zeros(90, 1, dtype=torch.int64)
    indices[0] = 1  # feature 0 has slots 1 .. 89: positions 0 .. 88 of the sorted slots, cuts at 32 and 64
    native_cuda.decode_dweight(values, indices, None, grad, out)

    def piece(slots: range) -> Tensor:
        total = torch.zeros(5)
        for start in range(slots.start, slots.stop, 16):
            block = torch.zeros(5, dtype=torch.float64)
            for slot in range(start, min(start + 16, slots.stop)):  # one rounding: the product of two floats is exact in double
                block = (values[slot].double() * grad[slot].double() + block).float().double()
            total = total + block.float()
        return total

    expected = torch.zeros(5) + piece(range(1, 33)) + piece(range(33, 65))
    for start in (65, 81):
        expected = expected + piece(range(start, min(start + 16, 90)))
    # Through double a fused product is rounded twice in rare cases: equal to one unit of the sum.
    torch.testing.assert_close(out[0], expected, rtol=3e-7, atol=1e-7)
    assert torch.equal(out[1], values[0] * grad[0])


@needs_compiler
@pytest.mark.parametrize("bad", [-1, 9, 2**40, -(2**63)])
def test_a_bad_index(bad: int, emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    indices = torch.randint(0, 9, (6, 4), generator=torch.Generator().manual_seed(0))
    indices[2, 3] = bad
    values, grad, out = draw(6, 4), draw(6, 8), torch.empty(9, 8)
    with pytest.raises(IndexError, match=r"latents\.indices"):
        native_cuda.decode_dweight(values, indices, None, grad, out)
    with pytest.raises(IndexError, match="neurons"):
        native_cuda.pack_signs(grad, torch.tensor([0, bad]))
    # As on a GPU: a flag and no error; the slot is left out.
    flag = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(native_cuda, "_flag", lambda device: flag)
    monkeypatch.setattr(native_cuda, "_check_on_cpu", lambda *args: None)
    native_cuda.decode_dweight(values, indices, None, grad, out)
    assert int(flag) == 1
    kept, expected = values.clone(), torch.empty(9, 8)
    kept[2, 3] = 0
    fastsae.dispatch.OPS["decode_dweight"].reference(kept, indices.where(indices != bad, 0), None, grad, expected)
    torch.testing.assert_close(out, expected)


@needs_compiler
def test_by_feature_is_the_transposed_latents(emulated: Any) -> None:
    indices = torch.randint(0, 20, (13, 5), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    order, segments = native_cuda.by_feature(indices, 33)
    flat = indices.flatten().long()
    assert torch.equal(order.long(), flat.sort(stable=True).indices)
    assert torch.equal(segments.long(), torch.searchsorted(flat.sort().values, torch.arange(34)))


def test_chosen_features_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: ascending, unique, a bad index sets the flag and is left out."""
    flag = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(flags, "flag", lambda device: flag)
    assert checks._marked(torch.tensor([3, 1, 3]), 5).nonzero().flatten().tolist() == [1, 3]
    assert int(flag) == 0
    for bad in (-1, 5, 2**40):
        flag.zero_()
        assert checks._marked(torch.tensor([4, bad, 0]), 5).nonzero().flatten().tolist() == [0, 4]
        assert int(flag) == 1


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    z = draw(2, 3)
    assert native_cuda.refuses_select_topk(z, 2, True) == "device cpu (supported: cuda)"
    assert "float64" in str(native_cuda.refuses_select_topk(z.double(), 2, True))
    assert "at most 2048" in str(native_cuda.refuses_select_topk(draw(1, 4096), 4000, True))
    assert "strides" in str(native_cuda.refuses_select_topk(draw(3, 2).T, 2, True))
    assert "float64 of out" in str(native_cuda.refuses_decode_dweight(z, z.long(), None, z, z.double()))
    assert "stride 1 along D" in str(native_cuda.refuses_decode_dweight(z, z.long(), None, z, draw(3, 2).T))
    assert native_cuda.unavailable(CPU) == "device cpu (supported: cuda)"
    monkeypatch.setattr(native_cuda, "build_info", lambda: {"cuda": {"built": False, "reason": "nvcc was not found"}})
    for name, value in (("_tried", False), ("_reason", None), ("_module", None)):
        monkeypatch.setattr(native_cuda, name, value)
    monkeypatch.setitem(sys.modules, "fastsae._cuda", None)
    monkeypatch.delattr(fastsae, "_cuda", raising=False)
    assert native_cuda.missing() == "the CUDA C++ module was not built: nvcc was not found"


# ---------------------------------------------------------------- compiled


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: the CUDA C++ sources were NOT compiled")
@pytest.mark.parametrize("source", emulation.SOURCES, ids=lambda source: source.stem)
def test_compiles_for_every_chip_without_spills(source: Path, tmp_path: Path) -> None:
    """No spills, no stack, shared memory that every chip gives, and of our own kernels two full blocks a multiprocessor.

    CI takes sm_90, as it was built: FASTSAE_TEST_ARCHS=all (`make deep`) compiles for all six, which costs a minute.
    """
    archs = re.findall(r'"(\d+)"', re.search(r"CUDA_ARCHS = \(([^)]*)\)", (ROOT / "setup.py").read_text())[1])  # pyright: ignore
    assert archs == ["80", "86", "89", "90", "100", "120"]
    if os.environ.get("FASTSAE_TEST_ARCHS") != "all":
        archs = ["90"]
    log = ROOT / "build" / f"objects{sysconfig.get_config_var('EXT_SUFFIX')}" / "cuda" / f"{source.name}.log"
    newest = max(file.stat().st_mtime for file in (*emulation.SOURCES, *emulation.HEADERS))
    said = log.read_text() if archs == ["90"] and log.exists() and log.stat().st_mtime > newest else ""
    if "sm_90" not in said:
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        options = ["-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}", "-c", "--threads", "2"]
        command = [str(NVCC), *options, *targets, str(source), "-o", str(tmp_path / f"{source.stem}.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said = done.stderr
    assert "warning" not in said, said
    pattern = r"Compiling entry function '(\w+)' for 'sm_(\d+)'(.*?)Used (\d+) registers([^\n]*)"
    kernels = re.findall(pattern, said, re.DOTALL)
    for name, arch, notes, registers, rest in kernels:
        spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", notes)
        assert spilled == [("0", "0", "0")], f"{name} sm_{arch}: {spilled}"
        shared = sum(map(int, re.findall(r"(\d+) bytes smem", rest)))
        assert shared <= 48 << 10, f"{name} sm_{arch}: {shared} bytes of shared memory"
        if source.stem == "sort":  # CUB's: its blocks are of its own size
            continue
        threads = 512 if "select_kernel" in name else 256 if "hamming" in name or "hash" in name or "pack" in name else 128
        assert int(registers) * threads <= 65536 // 2, f"{name} sm_{arch}: {registers} registers: not two blocks a multiprocessor"
    assert {arch for _, arch, *_ in kernels} >= set(archs)
    assert len(kernels) >= len(archs) * {"by_feature": 17, "hamming": 1, "select": 6, "signs": 20, "sort": 4}[source.stem], len(kernels)


@pytest.mark.skipif(NVCC is None or "cuda" not in build_info(), reason="nvcc is not installed: the CUDA C++ module was NOT built")
def test_the_module_is_built_where_nvcc_is() -> None:
    built = build_info()["cuda"]
    if "FASTSAE_CUDA=" in built["reason"]:  # left out, or not asked for without a GPU
        pytest.skip(built["reason"])
    assert built["built"], built["reason"]
    assert native_cuda.missing() is None


# ---------------------------------------------------------------- on a GPU


def encode_and_decode(x: Tensor, W: Tensor, W_dec: Tensor) -> Tensor:
    return fastsae.decode(fastsae.encode_topk(x, W, k=16), W_dec)


def _graph(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles, makes the flag
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


GRAPHED: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "encode_decode": (encode_and_decode, ("encode_topk", "decode")),
    "threshold": (lambda x, W, W_dec: fastsae.decode(_threshold(x, W), W_dec), ("encode_threshold", "decode")),
    "batch_topk": (
        lambda x, W, W_dec: fastsae.decode(fastsae.encode_batch_topk(x, W, k=16, capacity=8192)[0], W_dec),
        ("encode_batch_topk", "decode"),
    ),
    "dweight": (lambda x, W, W_dec: _dweight(x, W), ("decode_dweight",)),
    "select": (lambda x, W, W_dec: fastsae.ops.select.select_topk(x, k=16).values, ("select_topk",)),
    "hash": (lambda x, W, W_dec: fastsae.codes.hash_signs(x), ("hash_signs",)),
    "hamming": (
        lambda x, W, W_dec: fastsae.codes.hamming_topk(fastsae.codes.pack_signs(x), fastsae.codes.pack_signs(W), 8).distance,
        ("hamming_topk",),
    ),
}


def _threshold(x: Tensor, W: Tensor) -> fastsae.RaggedLatents:
    return fastsae.encode_threshold(x, W, threshold=32.0, capacity=16384)  # scores have a standard deviation of 16


def _dweight(x: Tensor, W: Tensor) -> Tensor:
    out = torch.empty_like(W)
    indices = (x[:, :16].abs() * 1000).long() % W.shape[0]
    OPS["decode_dweight"](x[:, :16].contiguous(), indices, None, x, out)
    return out


@on_gpu
@pytest.mark.parametrize("name", GRAPHED)
def test_gpu_graph_capture(name: str) -> None:
    run, ops = GRAPHED[name]
    x, W, W_dec = (torch.randn(shape, device="cuda") for shape in ((64, 256), (4096, 256), (4096, 256)))
    choices = fastsae.explain(run, x, W, W_dec).choices
    if any(choice.chosen == "reference" for choice in choices if choice.op in ops):
        pytest.skip(f"the reference serves here: {choices}")
    graph, result = _graph(lambda: run(x, W, W_dec))
    for seed in (1, 2):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(result, run(x, W, W_dec))
    fastsae.check()


@on_gpu
@pytest.mark.parametrize("name", GRAPHED)
def test_gpu_no_operation_waits_for_the_device(name: str) -> None:
    run, ops = GRAPHED[name]
    x, W, W_dec = (torch.randn(shape, device="cuda") for shape in ((64, 256), (4096, 256), (4096, 256)))
    choices = fastsae.explain(run, x, W, W_dec).choices  # warms up
    if any(choice.chosen == "reference" for choice in choices if choice.op in ops):
        pytest.skip(f"the reference serves here: {choices}")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(x, W, W_dec)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_built_gpu
def test_gpu_streams_are_respected() -> None:
    z = torch.zeros(4096, 4096, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        z.fill_(1.0)  # after the sleep: a launch on another stream would see zeros
        latents = fastsae.ops.select.select_topk(z, k=4, backend="cuda")
        words = fastsae.codes.pack_signs(z, backend="cuda")
    side.synchronize()
    assert bool((latents.values == 1).all())
    assert bool((words == -1).all())


@on_built_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpu_of_the_tensors_is_used() -> None:
    z = torch.randn(64, 4096, device="cuda:1")
    assert torch.cuda.current_device() == 0
    latents = fastsae.ops.select.select_topk(z, k=7, backend="cuda")
    assert latents.values.device == z.device
    assert torch.equal(latents.indices.cpu(), best(z.cpu(), 7)[1])
    assert torch.cuda.current_device() == 0


@on_built_gpu
def test_gpu_equals_the_emulation() -> None:
    if emulation.compiler() is None:
        pytest.skip("no C++ compiler")
    z, indices, grad = draw(6, 5000), torch.randint(0, 40, (60, 7)), draw(60, 72)
    values = draw(60, 7, seed=4)
    outs = [torch.empty(40, 72), torch.empty(40, 72, device="cuda")]
    native_cuda.decode_dweight(values.cuda(), indices.cuda(), None, grad.cuda(), outs[1])
    selected = native_cuda.select_topk(z.cuda(), 300, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTSAE_CUDA_EMULATION", "1")
        patch.setattr(native_cuda, "_module", emulation.load())
        native_cuda.decode_dweight(values, indices, None, grad, outs[0])
        expected = native_cuda.select_topk(z, 300, True)
    assert torch.equal(outs[0], outs[1].cpu())
    assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, selected))


@on_gpu
def test_gpu_overflow_of_a_capacity_is_flagged() -> None:
    fastsae.check()
    x, W = torch.randn(64, 256, device="cuda"), torch.randn(4096, 256, device="cuda")
    for encode in (
        lambda **more: fastsae.encode_threshold(x, W, **more),
        lambda **more: fastsae.encode_batch_topk(x, W, k=16, **more)[0],
        lambda **more: fastsae.encode_gated(x, W, b_gate=W[:, 0], r_mag=W[:, 1], b_mag=W[:, 2], **more),
    ):
        whole = encode()
        latents = encode(capacity=100)
        assert latents.values.shape == (100,)
        assert int(latents.crow[-1]) <= 100
        with pytest.raises(ValueError, match="capacity was too small"):
            fastsae.check()
        room = encode(capacity=2 * whole.values.shape[0])
        assert torch.equal(room.trim().values, whole.values)
        fastsae.check()


@on_gpu
def test_gpu_first_operation_in_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags, "_flags", {})
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="must run before a CUDA graph is captured"), torch.cuda.graph(graph):
        flags.flag(torch.device("cuda", torch.cuda.current_device()))


@on_built_gpu
def test_gpu_bad_index_sets_the_flag() -> None:
    flags.raise_if_set()
    indices = torch.randint(0, 64, (5, 7), device="cuda")
    indices[2, 3] = 64
    out = torch.empty(64, 32, device="cuda")
    native_cuda.decode_dweight(torch.randn(5, 7, device="cuda"), indices, None, torch.randn(5, 32, device="cuda"), out)
    assert bool(out.isfinite().all())
    with pytest.raises(IndexError, match="out of range in an operation on cuda:"):
        fastsae.check()
    fastsae.check()
