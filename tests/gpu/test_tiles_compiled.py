"""The tile engine's kernels compiled: every launch for six chips, no product of strides in 32 bits; and on a GPU at size."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_marks import compiled, on_gpu

pytest.importorskip("triton")
import fastsae
from fastsae.dispatch import OPS
from fastsae.kernels import _masks, _select, _tile, adam, decode, encode, match, signum, spline
from fastsae.latents import ScoreInputs
from fastsae.ops.encode import ENCODE_TOPK

# ---------------------------------------------------------------- ahead of time


# Kernels that multiply matrices, and the bytes of stack that a thread of theirs may use, once a tile: elsewhere, and on sm_100, whose
# accumulators leave tensor memory with 64 columns a thread.
MATRIX = {
    "emit_kernel": (256, 1152), "mask_kernel": (320, 64), "pair_kernel": (512, 1216), "rescan_kernel": (640, 384),
    "write_kernel": (1024, 1280),
}  # fmt: skip


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_compiles_within_the_chip(capability: int) -> None:
    """Every kernel; what multiplies matrices in bfloat16 and float32, on sm_90 in all forms, within its budget (`python tests/gpu/sass.py
    --write` after a change that is wanted). CI takes sm_90 and all forms in bfloat16; FASTSAE_TEST_ARCHS=all (`make deep`) the whole."""
    import aot
    import sass

    everything = os.environ.get("FASTSAE_TEST_ARCHS") == "all"
    if capability != 90 and not everything:
        pytest.skip("FASTSAE_TEST_ARCHS=all compiles for it")
    launches = sass.launches(capability, everything=everything)
    names = {
        name
        for module in (_tile, _select, _masks, encode, match, spline, adam, signum)
        for name in vars(module)
        if name.endswith("_kernel")
    }
    assert {launch.name for launch in launches} >= names - ({"sign_kernel"} if capability != 90 else set())
    tools, budgets = sass.budgets()
    dearer = {}
    for launch in launches:
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
        if capability in sass.CHIPS and tools == sass.tools():
            key = capability, sass.name(launch)
            dearer[key] = sass.worse(sass.figures(launch, usage, capability), budgets[key])
    if tools != sass.tools():
        pytest.skip(f"compiled, but not held against the budgets: they are of {tools}, here is {sass.tools()}")
    assert not any(dearer.values()), {key: found for key, found in dearer.items() if found}


def _strided_calls() -> Iterator[Callable[[], Any]]:
    """Every matrix with two strides that are not 1."""
    from sass import pair, ragged

    x, W = torch.zeros(40, 200)[:, ::2], torch.zeros(3000, 200)[:, ::2]
    vector, m, grad, dense = torch.zeros(3000), torch.zeros(3000, 100), torch.zeros(100, 40).T, torch.zeros(100, 3000).T
    slots = torch.zeros(40, 4), torch.zeros(40, 4, dtype=torch.int64)
    low_x, low_W = (t.to(torch.bfloat16).repeat(1, 2)[:, ::2] for t in (x, W))
    yield lambda: encode.encode_topk(low_x, low_W, None, None, None, None, None, 4, True)
    yield lambda: encode.encode_topk(x, W, None, x[0], None, None, None, 4, True)
    yield lambda: encode.encode_topk(x, W, None, None, None, None, None, 600, True)
    yield lambda: ragged(
        encode.problem(ScoreInputs(low_x, low_W, None, None, None, None)), encode.Rule(_masks.THRESHOLD, vector, 0.5), x.dtype
    )
    yield lambda: ragged(encode.problem(ScoreInputs(x, W, None, None, None, None)), encode.Rule(_masks.THRESHOLD, vector, 0.5), x.dtype)
    yield lambda: spline.hash_signs(x, torch.arange(9), 0, 5, 128)
    yield lambda: match.match_cosine(x, W, 8, True, True, 1e-8)
    yield lambda: decode.decode(*slots, None, W, None)
    yield lambda: decode.decode_dvalues(x, slots[1], None, W)
    yield lambda: decode.decode_dweight(*slots, None, x, W)
    yield lambda: pair(torch.zeros(8192, 64), 1, 1)
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
