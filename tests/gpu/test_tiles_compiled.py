"""The tile engine's kernels compiled: every launch for six chips, no product of strides in 32 bits; and on a GPU at size."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_marks import CPU, compiled, on_gpu

pytest.importorskip("triton")
import fastsae
from fastsae.dispatch import OPS
from fastsae.kernels import _masks, _problem, _select, _tile, adam, decode, encode, match, signum, spline
from fastsae.latents import ScoreInputs
from fastsae.ops.encode import ENCODE_TOPK

# ---------------------------------------------------------------- ahead of time


def _calls(dtype: torch.dtype, *, everything: bool) -> Iterator[Callable[[], Any]]:
    x, W = torch.zeros(300, 768, dtype=dtype), torch.zeros(24576, 768, dtype=dtype)
    vector, numbers = torch.zeros(24576, dtype=dtype), torch.zeros(24576)
    yield lambda: encode.encode_topk(x, W, None, None, None, None, None, 32, True)
    yield lambda: spline.spline_hash(x, W, vector, None, 0, 5, 128)
    yield lambda: _ragged(encode.problem(ScoreInputs(x, W, vector, None, None, None)), encode.Rule(_masks.THRESHOLD, numbers), dtype)
    m, grad = torch.zeros(512, 768), torch.zeros(300, 768)
    slots = torch.zeros(300, 32), torch.zeros(300, 32, dtype=torch.int64)
    if dtype is torch.float32:
        yield lambda: adam.adam(m, m, m, grad, *slots, None, numbers[0], 1e-3, 0.9, 0.99, 1e-8, 0.1, 3, True, True)
        yield lambda: signum.signum(m, m, grad, *slots, None, 1e-3, 0.95, 0.1, True, True)
        yield lambda: match.match_cosine(x, x, 8, True, True, 1e-8)
        yield lambda: _pair(W[:8192], 1, 1)
    if everything:
        turned, subset = W.T.contiguous().T, torch.arange(20000)
        yield lambda: encode.encode_topk(x, turned, vector, None, vector, subset, None, 32, True)
        yield lambda: encode.encode_topk(x[:, :761], W[:, :761], None, None, None, None, None, 64, True)
        yield lambda: encode.encode_topk(x, W[:1024], None, W[0], None, None, None, 32, True)
        yield lambda: _ragged(
            encode.problem(ScoreInputs(x, W, vector, None, None, None)), encode.Rule(_masks.THRESHOLD, numbers, 0.5), dtype
        )
        yield lambda: _ragged(encode.problem(ScoreInputs(x, W, vector, None, vector, None)), encode.Rule(_masks.GATED, numbers), dtype)
        yield lambda: match.match_cosine(W[:4096], W[:4096], 8, True, True, 1e-8)
        yield lambda: spline.pack_signs(x, None)
        if dtype is torch.float32:
            wide = torch.zeros(64, adam.MOST_COLUMNS)
            yield lambda: adam.adam(wide, wide, wide, wide, None, None, None, None, 1e-3, 0.9, 0.99, 1e-8, 0.1, 3, True, True)
            yield lambda: adam.grad_squares(m, grad, *slots, None, True)
            yield lambda: signum.signum(wide, wide, wide, None, None, None, 1e-3, 0.95, 0.1, True, True)
            yield lambda: _pair(W[:8192], 8, 8)
            yield lambda: encode.encode_topk(x, W, vector, None, None, torch.arange(20000), _problem.pack(W), 32, True)


def _ragged(p: _problem.Problem, rule: encode.Rule, dtype: torch.dtype) -> None:
    found = _masks.masks(p, rule)
    bits = _masks.counts(*found)
    flags = torch.zeros(8, dtype=torch.uint8)
    zeros = torch.zeros(8, dtype=torch.int64)
    _masks.write(p, rule, *found, bits, zeros[0], torch.zeros(8, dtype=dtype), zeros, flags)


def _pair(a: Tensor, k_ab: int, k_ba: int) -> None:
    tile, rows = _tile.tile_for(CPU), slice(0, a.shape[0])
    plans = match._plans(a.shape[0], a.shape[0], k_ab, k_ba, tile)
    assert plans is not None
    sides = (_problem.rounded(a, None, of_rows=of_rows) for of_rows in (True, False))
    match._emit_pair(*sides, rows, rows, plans, tile)


# Kernels that multiply matrices, and the bytes of stack that a thread of theirs may use, once a tile: elsewhere, and on sm_100, whose
# accumulators leave tensor memory with 64 columns a thread.
MATRIX = {
    "emit_kernel": (256, 1152), "mask_kernel": (320, 64), "pair_kernel": (512, 1216), "rescan_kernel": (640, 320),
    "write_kernel": (640, 1280),
}  # fmt: skip


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_compiles_within_the_chip(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel; what multiplies matrices in bfloat16 and float32, on sm_90 in all forms. The oldest chip and sm_90 are those of CI:
    FASTSAE_TEST_ARCHS=all (`make deep`) takes all six."""
    import aot

    if capability not in (80, 90) and os.environ.get("FASTSAE_TEST_ARCHS") != "all":
        pytest.skip("FASTSAE_TEST_ARCHS=all compiles for it")

    version = divmod(capability, 10)
    monkeypatch.setattr(_tile, "tile_for", lambda device: _tile._TILES[max(known for known in _tile._TILES if known <= version)])
    monkeypatch.setattr(_tile, "programs", lambda device, n_tiles: min(n_tiles, 264))
    full = capability == 90
    found: dict[tuple[Any, ...], Any] = {}
    for dtype in (torch.bfloat16, torch.float32, *((torch.float16,) if full else ())):
        for call in _calls(dtype, everything=full and dtype is not torch.float16):
            with aot.record() as launches:
                call()
            found.update({(l.name, l.signature, l.constants, l.aligned, l.options): l for l in launches})
    names = {
        name
        for module in (_tile, _select, _masks, encode, match, spline, adam, signum)
        for name in vars(module)
        if name.endswith("_kernel")
    }
    assert {launch.name for launch in found.values()} >= names - ({"sign_kernel"} if not full else set())
    # All forms of what multiplies matrices, one or two of the rest.
    chosen = [launch for launch in found.values() if launch.name in MATRIX]
    for name in sorted({launch.name for launch in found.values()} - MATRIX.keys()):
        chosen += [launch for launch in found.values() if launch.name == name][: 2 if full else 1]
    for launch in chosen:
        assert all(0 < n < 2**31 for n in launch.grid[:1]), launch
        assert all(0 < n < 2**16 for n in launch.grid[1:]), launch
        usage = aot.compile_launch(launch, capability)
        assert usage.shared <= aot.SHARED_LIMIT[capability], launch
        assert not re.search(r"tf32|\.ftz", usage.ptx), launch
        if launch.name in MATRIX:
            assert {90: "wgmma", 100: "tcgen05.mma"}.get(capability, "mma.sync") in usage.ptx, launch
            assert usage.resources["STACK"] <= MATRIX[launch.name][capability == 100], (launch, usage.resources)
            assert usage.resources["LOCAL"] == 0, launch
            # What a tile's consumer spills is spilled once a tile; nothing is in the loop over d.
            assert not any(re.match(r"(@\S+ )?(LDL|STL)", text) for text in usage.matrix_loop), launch
        elif launch.name in ("exact_kernel", "rescore_kernel", "refine_kernel", "adam_kernel", "signum_kernel", "round_kernel"):
            assert usage.resources["STACK"] == usage.resources["LOCAL"] == 0, (launch, usage.resources)


def _strided_calls() -> Iterator[Callable[[], Any]]:
    """Every matrix with two strides that are not 1."""
    x, W = torch.zeros(40, 200)[:, ::2], torch.zeros(3000, 200)[:, ::2]
    vector, m, grad, dense = torch.zeros(3000), torch.zeros(3000, 100), torch.zeros(100, 40).T, torch.zeros(100, 3000).T
    slots = torch.zeros(40, 4), torch.zeros(40, 4, dtype=torch.int64)
    low_x, low_W = (t.to(torch.bfloat16).repeat(1, 2)[:, ::2] for t in (x, W))
    yield lambda: encode.encode_topk(low_x, low_W, None, None, None, None, None, 4, True)
    yield lambda: encode.encode_topk(x, W, None, x[0], None, None, None, 4, True)
    yield lambda: encode.encode_topk(x, W, None, None, None, None, None, 600, True)
    yield lambda: _ragged(
        encode.problem(ScoreInputs(low_x, low_W, None, None, None, None)), encode.Rule(_masks.THRESHOLD, vector, 0.5), x.dtype
    )
    yield lambda: _ragged(encode.problem(ScoreInputs(x, W, None, None, None, None)), encode.Rule(_masks.THRESHOLD, vector, 0.5), x.dtype)
    yield lambda: spline.hash_signs(x, torch.arange(9), 0, 5, 128)
    yield lambda: match.match_cosine(x, W, 8, True, True, 1e-8)
    yield lambda: decode.decode(*slots, None, W, None)
    yield lambda: decode.decode_dvalues(x, slots[1], None, W)
    yield lambda: decode.decode_dweight(*slots, None, x, W)
    yield lambda: _pair(torch.zeros(8192, 64), 1, 1)
    for given in ((grad, *slots, None), (dense, None, None, None)):
        yield lambda given=given: adam.adam(m, m, m, *given, None, 1e-3, 0.9, 0.99, 1e-8, 0.1, 3, True, True)
        yield lambda given=given: signum.signum(m, m, *given, 1e-3, 0.95, 0.1, True, True)


@compiled
def test_no_stride_is_multiplied_in_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    import aot

    monkeypatch.setattr(_tile, "tile_for", lambda device: _tile._TILES[9, 0])
    found: dict[tuple[Any, ...], Any] = {}
    for call in _strided_calls():
        with aot.record() as launches:
            call()
        found.update({(l.name, tuple(name for name, _ in l.constants)): l for l in launches})
    modules = (_tile, _select, _masks, encode, match, spline, adam, signum, decode)
    names = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {launch.name for launch in found.values()} == names
    for launch in found.values():
        # Tiles of rows times tiles of columns are programs, of which there are fewer than 2^31.
        assert aot.narrow_products(launch) <= {"n_tiles"}, launch


# ---------------------------------------------------------------- on a GPU: what none of the above can show


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gpu_topk_at_size(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, W = torch.randn(300, 512, device="cuda").to(dtype), torch.randn(20000, 512, device="cuda").to(dtype)
    W[::100] = x[0] / 20
    args = (x, W, None, None, None, None, None, 64, True)
    result = encode.encode_topk(*args)
    ENCODE_TOPK.check(args, result)
    for part in (slice(0, 1), slice(7, 200)):
        for weight in (W, W.T.contiguous().T):
            assert all(torch.equal(a, b[part]) for a, b in zip(encode.encode_topk(x[part], weight, *args[2:]), result, strict=True))


@on_gpu
def test_gpu_handle() -> None:
    torch.manual_seed(0)
    x, W = torch.randn(300, 512, device="cuda"), torch.randn(20000, 512, device="cuda")
    handle = fastsae.pack(W)
    assert handle.nbytes == 20000 * (2 * 512 + 12)
    for k in (8, 64):
        raw, got = fastsae.encode_topk(x, W, k=k), fastsae.encode_topk(x, handle, k=k)
        assert torch.equal(raw.values, got.values)
        assert torch.equal(raw.indices, got.indices)
    assert torch.equal(fastsae.spline_hash(x, W), fastsae.spline_hash(x, handle))


@on_gpu
def test_gpu_pair_at_size() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(9000, 256, device="cuda"), torch.randn(20000, 256, device="cuda")
    b[:4000] = a[:4000] + torch.randn(4000, 256, device="cuda") / 2
    b[100:200] = b[0]
    assert match._block(9000, 20000, 3, 2, _tile.tile_for(a.device)) not in (None, match._WHOLE)
    result = match.match_pair(a, b, 3, 2, 1e-8)
    units = match._unit(a, 1e-8), match._unit(b, 1e-8)
    want = *match._best(*units, 3), *match._best(*units[::-1], 2), *match._best(*units, 1, negative=True)
    for got, expected in zip((*result[:4], -result[4].unsqueeze(1), result[5].unsqueeze(1)), want, strict=True):
        assert torch.equal(got, expected)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpu_encode_and_decode_in_a_graph(dtype: torch.dtype) -> None:
    from fastsae.kernels import decode

    torch.manual_seed(0)
    x, W = torch.randn(64, 256, device="cuda").to(dtype), torch.randn(8192, 256, device="cuda").to(dtype)

    def run() -> tuple[Tensor, Tensor]:
        values, indices = encode.encode_topk(x, W, None, None, None, None, None, 16, True)
        return indices, decode.decode(values, indices, None, W, None)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.copy_(torch.randn(64, 256, device="cuda").to(dtype))
    graph.replay()
    for a, b in zip(captured, run(), strict=True):
        assert torch.equal(a, b)


def test_the_table_names_the_rows() -> None:
    rows = {name for name, op in OPS.items() if any(row.backend == "triton" for row in op.rows)}
    assert {"encode_topk", "encode_threshold", "encode_batch_topk", "encode_gated", "match_cosine", "match_pair"} <= rows
    assert {"spline_code", "spline_hash", "pack_signs", "hash_signs", "hash_code", "adam", "grad_squares", "signum"} <= rows
