"""What ptxas made of the kernels: registers, programs, instructions and ALU cycles a tile, and what these predict. Nothing runs.

    python tests/gpu/sass.py            the predicted GPU table
    python tests/gpu/sass.py --write    today's figures as the budgets (sass.txt)

Cycles are of one of the four schedulers of a multiprocessor, each of which issues one instruction a cycle for its quarter of a program's
warps. A pipe takes an instruction every so many cycles (CUDA C++ programming guide, arithmetic throughput): the busiest one counts.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
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

from fastsae.kernels import _masks, _problem, _select, _tile, adam, encode, match, signum, spline
from fastsae.latents import ScoreInputs

BUDGETS = TESTS / "gpu" / "sass.txt"
CHIPS = 80, 90, 100
COLUMNS = "registers", "programs", "mma", "loop", "narrow", "outside", "cycles"

# ---------------------------------------------------------------- launches


def calls(dtype: torch.dtype, *, everything: bool) -> Iterator[Callable[[], Any]]:
    x, W = torch.zeros(300, 768, dtype=dtype), torch.zeros(24576, 768, dtype=dtype)
    vector, numbers = torch.zeros(24576, dtype=dtype), torch.zeros(24576)
    yield lambda: encode.encode_topk(x, W, None, None, None, None, None, 32, True)
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
        yield lambda: encode.encode_topk(x[:, :752], W[:, :752], None, None, None, subset, None, 64, True)
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
            for call in calls(dtype, everything=full and dtype is not torch.float16):
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


_SHAPE = {"ROWS", "COLUMNS", "DEPTH", "GROUP", "SIZE", "PARTS", "WORDS", "TILE_ROWS", "DEEP"}

# ---------------------------------------------------------------- figures

# Instruction -> (pipe, cycles an instruction keeps it). What is not here is the ALU's; "U" (uniform) and control are issued only.
_PIPES = (
    (r"FFMA|FADD|FMUL", "fma", 1), (r"IMAD", "fma", 2), (r"MUFU|POPC|FLO|BREV|I2F|F2I|F2F\b|F2F\.", "special", 8),
    (r"LD|ST[GSL]|SHFL|ATOM|RED\b|CCTL|MEMBAR", "memory", 4),
    (r"U[A-Z]|BRA|BSSY|BSYNC|EXIT|NOP|BAR|WARPSYNC|S2R|S2UR|CS2R|R2UR|DEPBAR|SYNCS|\w*MMA|WARPGROUP|ERRBAR|FENCE|CALL|RET|ACQ|ELECT", "", 0),
)  # fmt: skip
_SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # of a multiprocessor; each block takes 1 KiB more than it asks for


def cycles(code: list[str], chip: int) -> float:
    """Cycles in which a scheduler gets rid of one warp's instructions."""
    busy = {"issue": float(len(code))}
    for text in code:
        operation = re.sub(r"^@!?U?P\w+ ", "", text)
        pipe, cost = next((found for pattern, *found in _PIPES if re.match(pattern, operation)), ("alu", 2))
        busy[pipe] = busy.get(pipe, 0.0) + cost * (2 if chip == 80 and (pipe, cost) == ("fma", 1) else 1)
    return max(busy.values())


def figures(launch: aot.Launch, usage: aot.Usage, chip: int) -> dict[str, int]:
    """COLUMNS of a launch; ``narrow``: global loads of 16 bits a thread in the loop over d, ``outside``: instructions of a tile beside it."""
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
    found = [subprocess.run([aot.tool(which), "--version"], capture_output=True, text=True).stdout for which in ("ptxas", "ptxas-blackwell")]
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
