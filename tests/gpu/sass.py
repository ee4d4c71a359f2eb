"""What ptxas made of the kernels: registers, programs, instructions and ALU cycles a tile, and what these predict. Nothing runs.

    python tests/gpu/sass.py            the predicted GPU table
    python tests/gpu/sass.py --write    today's figures as the budgets (sass.txt)

Cycles are of one of the four schedulers of a multiprocessor, each of which issues one instruction a cycle for its quarter of a program's
warps. A pipe takes an instruction every so many cycles (CUDA C++ programming guide, arithmetic throughput): the busiest one counts.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.append(str(Path(__file__).parents[1]))

import aot
import torch
import triton
from places import TESTS
from torch import Tensor
from triton_marks import CPU

from fastsae.kernels import _masks, _problem, _tile, adam, encode, match, signum, spline
from fastsae.latents import ScoreInputs

BUDGETS = TESTS / "gpu" / "sass.txt"
CHIPS = 80, 90, 100
COLUMNS = "registers", "programs", "mma", "loop", "narrow", "outside", "cycles"

# ---------------------------------------------------------------- launches


def calls(dtype: torch.dtype, *, everything: bool) -> Iterator[Callable[[], Any]]:
    x, W = torch.zeros(300, 768, dtype=dtype), torch.zeros(24576, 768, dtype=dtype)
    vector, numbers = torch.zeros(24576, dtype=dtype), torch.zeros(24576)
    many = torch.zeros(131072, 64, dtype=dtype)  # selects among as many as the table's shape
    yield lambda: encode.encode_topk(x[:, :64], many, None, None, None, None, None, 64, True)
    yield lambda: spline.spline_hash(x, W, vector, None, 0, 5, 128)
    yield lambda: ragged(encode.problem(ScoreInputs(x, W, vector, None, None, None)), encode.Rule(_masks.THRESHOLD, numbers), dtype)
    m, grad = torch.zeros(512, 768), torch.zeros(300, 768)
    slots = torch.zeros(300, 32), torch.zeros(300, 32, dtype=torch.int64)
    if dtype is torch.float32:
        yield lambda: adam.adam(m, m, m, grad, *slots, None, numbers[0], 1e-3, 0.9, 0.99, 1e-8, 0.1, 3, True, True)
        yield lambda: signum.signum(m, m, grad, *slots, None, 1e-3, 0.95, 0.1, True, True)
        yield lambda: match.match_cosine(x, x, 8, True, True, 1e-8)
        yield lambda: pair(W[:8192], 1, 1)
    if everything:
        turned, subset = W.T.contiguous().T, torch.arange(20000)
        yield lambda: encode.encode_topk(x, turned, vector, None, vector, None, None, 32, True)
        yield lambda: encode.encode_topk(x, W, None, None, None, subset, None, 64, True)
        yield lambda: encode.encode_topk(x, W[:1024], None, W[0], None, None, None, 32, True)
        yield lambda: ragged(
            encode.problem(ScoreInputs(x, W, vector, None, None, None)), encode.Rule(_masks.THRESHOLD, numbers, 0.5), dtype
        )
        yield lambda: ragged(encode.problem(ScoreInputs(x, W, vector, None, vector, None)), encode.Rule(_masks.GATED, numbers), dtype)
        yield lambda: match.match_cosine(W[:4096], W[:4096], 8, True, True, 1e-8)
        yield lambda: spline.pack_signs(x, None)
        if dtype is torch.float32:
            wide = torch.zeros(64, adam.MOST_COLUMNS)
            yield lambda: adam.adam(wide, wide, wide, wide, None, None, None, None, 1e-3, 0.9, 0.99, 1e-8, 0.1, 3, True, True)
            yield lambda: adam.grad_squares(m, grad, *slots, None, True)
            yield lambda: signum.signum(wide, wide, wide, None, None, None, 1e-3, 0.95, 0.1, True, True)
            yield lambda: pair(W[:8192], 8, 8)
            yield lambda: encode.encode_topk(x, W, vector, None, None, torch.arange(20000), _problem.pack(W), 32, True)


def ragged(p: _problem.Problem, rule: encode.Rule, dtype: torch.dtype) -> None:
    found = _masks.masks(p, rule)
    bits = _masks.counts(*found)
    flags = torch.zeros(8, dtype=torch.uint8)
    zeros = torch.zeros(8, dtype=torch.int64)
    _masks.write(p, rule, *found, bits, zeros[0], torch.zeros(8, dtype=dtype), zeros, flags)


def pair(a: Tensor, k_ab: int, k_ba: int) -> None:
    tile, rows = _tile.tile_for(CPU), slice(0, a.shape[0])
    plans = match._plans(a.shape[0], a.shape[0], k_ab, k_ba, tile)
    assert plans is not None
    sides = (_problem.rounded(a, None, of_rows=of_rows) for of_rows in (True, False))
    match._emit_pair(*sides, rows, rows, plans, tile)


def launches(capability: int, *, everything: bool = True) -> list[aot.Launch]:
    """What is compiled for a chip: all forms of what multiplies matrices, one or two of the rest."""
    full, version = capability == 90, divmod(capability, 10)
    tile = _tile._TILES[max(known for known in _tile._TILES if known <= version)]
    found: dict[tuple[Any, ...], aot.Launch] = {}
    with mock.patch.multiple(_tile, tile_for=lambda device: tile, programs=lambda device, n_tiles: min(n_tiles, 264)):
        for dtype in (torch.bfloat16, torch.float32, *((torch.float16,) if full and everything else ())):
            for call in calls(dtype, everything=full and dtype is not torch.float16 and (everything or dtype is torch.bfloat16)):
                with aot.record() as launched:
                    call()
                found.update({(l.name, l.signature, l.constants, l.aligned, l.options): l for l in launched})
    chosen = [launch for launch in found.values() if "DEPTH" in dict(launch.constants)]
    for which in sorted({launch.name for launch in found.values()} - {launch.name for launch in chosen}):
        chosen += [launch for launch in found.values() if launch.name == which][: 2 if full else 1]
    return chosen


def name(launch: aot.Launch) -> str:
    """The kernel, what it reads, and its flags."""
    flags = [key if value is True else f"{key}={value}" for key, value in launch.constants if key.isupper() and value and key not in _SHAPE]
    turned = ["turned"] if dict(launch.constants).get("W_f") == 1 else []
    return " ".join([launch.name, launch.signature[0][1].lstrip("*"), *turned, *flags])


_SHAPE = {"ROWS", "COLUMNS", "DEPTH", "GROUP", "SIZE", "CHUNK", "PARTS", "WORDS", "TILE_ROWS", "DEEP"}

# ---------------------------------------------------------------- figures

# Instruction -> (pipe, cycles an instruction keeps it). What is not here is the ALU's; "U" (uniform) and control are issued only.
_PIPES = (
    (r"FFMA|FADD|FMUL", "fma", 1), (r"IMAD", "fma", 2), (r"MUFU|POPC|FLO|BREV|I2F|F2I|F2F\b|F2F\.", "special", 8),
    (r"LD|ST[GSL]|SHFL|ATOM|RED\b|CCTL|MEMBAR", "memory", 4),
    (r"U[A-Z]|BRA|BSSY|BSYNC|EXIT|NOP|BAR|WARPSYNC|S2R|S2UR|CS2R|R2UR|DEPBAR|SYNCS|\w*MMA|WARPGROUP|FENCE|CALL|RET|ELECT", "", 0),
)  # fmt: skip
_SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # of a multiprocessor; each block takes 1 KiB more than it asks for


def cycles(code: list[str], chip: int, times: Sequence[float] = ()) -> float:
    """Cycles in which a scheduler gets rid of one warp's instructions, each of them ``times`` or once."""
    busy = dict.fromkeys(("issue", "alu", "fma", "special", "memory", ""), 0.0)
    for text, n in zip(code, times or [1.0] * len(code), strict=True):
        operation = re.sub(r"^@!?U?P\w+ ", "", text)
        pipe, cost = next(((pipe, cost) for pattern, pipe, cost in _PIPES if re.match(pattern, operation)), ("alu", 2))
        busy[pipe] += n * cost * (2 if chip == 80 and (pipe, cost) == ("fma", 1) else 1)
        busy["issue"] += n
    return max(busy.values())


def figures(launch: aot.Launch, usage: aot.Usage, chip: int) -> dict[str, int]:
    """COLUMNS of a launch; ``narrow``: global loads of 16 bits a thread in the loop over d, ``outside``: the tile's others."""
    warps, registers = dict(launch.options).get("num_warps", 4), usage.resources["REG"]
    programs = min(65536 // (warps * 32 * -(-registers // 8) * 8), _SHARED[chip] // (usage.shared + 1024), 64 // warps, 32)
    loop, outside = usage.matrix_loop, usage.outside
    return dict(zip(COLUMNS, (
        registers, programs, sum(bool(aot.MATRIX.search(text)) for text in loop), len(loop),
        sum(bool(re.search(r"LDG\S*\.[US]16", text)) for text in loop), len(outside), round(cycles(outside, chip) * warps / 4),
    ), strict=True))  # fmt: skip


# ---------------------------------------------------------------- budgets


def tools() -> str:
    """The compiler that the figures depend on."""
    found = [
        subprocess.run([aot.tool(which), "--version"], capture_output=True, text=True).stdout for which in ("ptxas", "ptxas-blackwell")
    ]
    return f"triton {triton.__version__}, ptxas " + " and ".join(re.findall(r"V([\d.]+)", "".join(found)))


def budgets() -> tuple[str, dict[tuple[int, str], dict[str, int]]]:
    """(the tools they are of, figures by chip and name)."""
    first, *lines = BUDGETS.read_text().splitlines()
    found = {}
    for line in lines:
        chip, *numbers, which = line.split(maxsplit=len(COLUMNS) + 1)
        found[int(chip), which] = dict(zip(COLUMNS, map(int, numbers), strict=True))
    return first, found


def worse(got: dict[str, int], budget: dict[str, int]) -> dict[str, tuple[int, int]]:
    """What is dearer than its budget: more of it, or fewer programs."""
    return {key: (got[key], budget[key]) for key in COLUMNS if (got[key] < budget[key] if key == "programs" else got[key] > budget[key])}


# ---------------------------------------------------------------- the predicted table

_CORES, _CLOCK = 132, 1.755e9  # multiprocessors and Hz of an H200
_COPY, _L2, _CUBLAS = 4.3e12, 5.5e12, 790e12  # bytes a second, bytes a second, operations a second: measured by others


_LATENCY = {"LDG": 600, "LDS": 30, "SHFL": 24, "BAR.SYNC": 30}  # cycles; of what is not here 2: half of it waits for what stands before


@cache
def _made(which: str) -> tuple[aot.Launch, aot.Usage]:
    launch = next(launch for launch in launches(90) if name(launch) == which)
    return launch, aot.compile_launch(launch, 90)


def _product(which: str, rows: int, n: int, D: int) -> float:
    """Milliseconds of a kernel over tiles: the loop over d is bound by the tensor cores (2,048 multiplications a cycle) or by shared
    memory (128 bytes a cycle: a step's operands are written once and read, the features by both warpgroups), and what follows it waits
    for it where a multiprocessor holds one program."""
    got, tile = figures(*_made(which), 90), _tile._TILES[9, 0]
    step = 2 * tile.depth * (2 * tile.rows + 3 * tile.columns) / 128
    loop = D / tile.depth * max(tile.rows * tile.columns * tile.depth / 2048, step)
    each = loop + got["cycles"] if got["programs"] == 1 else max(loop, got["cycles"])
    tiles = math.ceil(rows / tile.rows) * math.ceil(n / tile.columns)
    return math.ceil(tiles / _CORES) * each / _CLOCK * 1e3


def _programs(which: str, number: float, *trips: float) -> float:
    """Milliseconds of so many programs, whose loops are taken so many times, by their first instruction: by what the schedulers issue, or
    by the latency of one instruction after the other of as many programs as a multiprocessor holds."""
    launch, usage = _made(which)
    times = [1.0] * len(usage.code)
    for (first, last), n in zip(usage.loops, trips, strict=True):
        times[first : last + 1] = [already * n for already in times[first : last + 1]]
    latency = 0.0
    for place, text in enumerate(usage.code):
        batched = any("LDG" in before for before in usage.code[max(0, place - 40) : place])  # loads that are under way together
        wait = 2 if "LDG" in text and batched else next((n for key, n in _LATENCY.items() if key in text), 2)
        latency += wait * times[place]
    got = figures(launch, usage, 90)
    issued = cycles(usage.code, 90, times) * dict(launch.options).get("num_warps", 4) / 4
    return number / _CORES * max(issued, latency / got["programs"]) / _CLOCK * 1e3


def predict() -> None:
    """The GPU table for one H200, as multiples of cuBLAS's product in bfloat16. Not counted: how a tile's loop fills, launches, rows that
    are scored exactly as a whole, the kernels that prepare and rank."""
    B, D, F, k = 8192, 4096, 131072, 64
    emitted = "select_kernel i32 EMITTED FLAG MAPPED BUCKETS=1 HELD"
    select = 2 * _programs(emitted, B, 32, 0, 0, 16, 4)  # of what was emitted, and of the candidates; no ties
    rounding = F * D * 6 / _COPY * 1e3
    screened = "emit_kernel fp16 SCREENED BEST=4 BUCKETS=1"
    signs, open_bits = 65536, 0.008 * 3072  # undecided of a row: 1.1 % with the q of all chips
    refined = _programs("refine_kernel fp32 BIASED", signs, open_bits / 4 + 0.5, 6)
    hashed = _programs("hash_kernel i32", signs / 16, 48)
    for what, shape, parts, must in (
        ("encode_topk bf16", (B, D, F), {"product": _product("emit_kernel bf16 BEST=4 BUCKETS=1", B, F, D), "select": select}, 1.35),
        ("encode_topk fp32", (B, D, F), {
            "product": _product(screened, B, F, D), "rounding, 4 chunks": 4 * rounding, "select": 1.5 * select,
            "scores": 1.2 * B * k * D * 4 / _COPY * 1e3,
        }, 2.0),
        ("match_cosine fp32", (F, D, F), {
            "product": _product(screened, F, F, D), "rounding, once": rounding, "select": 1.5 * select * F / B,
            "scores": 1.5 * F * 8 * D * 4 / _COPY * 1e3,
        }, 1.35),
        ("spline_hash bf16", (signs, 768, 3072), {
            "product": _product("mask_kernel bf16 BIASED", signs, 3072, 768), "hash": hashed,
        }, 1.5),
        ("spline_hash fp32", (signs, 768, 3072), {
            "product": _product("mask_kernel fp16 SCREENED BIASED TWO", signs, 3072, 768), "hash": hashed,
            "rounding": signs * 768 * 6 / _COPY * 1e3, "undecided": max(refined, signs * open_bits * 768 * 4 / _L2 * 1e3),
        }, 3.0),
    ):  # fmt: skip
        floor = 2 * shape[0] * shape[1] * shape[2] / _CUBLAS * 1e3
        text = ", ".join(f"{part} {ms:.2f}" for part, ms in parts.items())
        print(f"{what:18} {sum(parts.values()) / floor:5.2f} x cuBLAS (must {must}) = ({text}) / {floor:.2f} ms")


def write() -> None:
    lines = [tools()]
    for chip in CHIPS:
        for which, launch in {name(launch): launch for launch in launches(chip)}.items():
            numbers = figures(launch, aot.compile_launch(launch, chip), chip)
            lines.append(" ".join([f"{chip:<3}", *(f"{numbers[key]:>5}" for key in COLUMNS), which]))
            print(lines[-1], flush=True)
    BUDGETS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write() if sys.argv[1:] == ["--write"] else predict()
