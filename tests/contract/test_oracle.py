"""Every native operation against tests/oracle.c, bit for bit: many small problems, each on several levels, paths and layouts.

A case is one call of a kernel whose result is compared. A problem is drawn from its number alone, so a failure names what draws it again:
`check(number)`. HYPOTHESIS_PROFILE=deep runs 10^6 cases, ci 20,000.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from typing import Any

import numpy as np
import pytest
import torch
from oracle_problems import CC, POOLS, RULES, SIZE, Draw, Problem, i64, inf, nan, p
from places import TESTS

import fastsae
from fastsae.native import loader

pytestmark = [
    pytest.mark.skipif(loader.unavailable() is not None, reason=str(loader.unavailable())),
    pytest.mark.skipif(CC is None, reason="no C compiler"),
]
CASES = {"deep": 1_000_000, "ci": 20_000}.get(os.environ.get("HYPOTHESIS_PROFILE", ""), 4_000)
PARTS = 8


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    assert CC is not None
    library = tmp_path_factory.mktemp("oracle") / "oracle.so"
    command = [CC, "-O2", "-ffp-contract=off", "-shared", "-fPIC", str(TESTS / "contract" / "oracle.c")]
    # With the CPU's own FMA fmaf() is an instruction; the bits are the same without.
    done = subprocess.run([*command, "-march=native", "-o", str(library), "-lm"], capture_output=True, text=True, check=False)
    if done.returncode:
        subprocess.run([*command, "-o", str(library), "-lm"], check=True)
    lib = ctypes.CDLL(str(library))
    lib.threshold.restype = lib.gated.restype = lib.batch_topk.restype = ctypes.c_int64
    lib.grad_squares.restype = ctypes.c_float
    return lib


# ---------------------------------------------------------------- comparing


def check(number: int, oracle: ctypes.CDLL) -> int:
    problem = Problem(oracle, number)
    problem.run()
    return problem.cases


@pytest.mark.parametrize("part", range(PARTS))
def test_every_operation_has_the_bits_of_the_oracle(part: int, oracle: ctypes.CDLL) -> None:
    cases, number = 0, part
    while cases < CASES / PARTS:
        cases += check(number, oracle)
        number += PARTS


def test_references_select_as_the_oracle(oracle: ctypes.CDLL) -> None:
    """Sums of small integers are exact in any order, so that the references' selections must be the oracle's, too: ties, -0, NaN."""
    ctypes.c_int.in_dll(oracle, "fused").value = 1
    for number in range(CASES // 200):
        problem, draw = Problem(oracle, number), Draw(number)
        problem.said = "reference"
        rows, d, n = draw.randint(1, 6), draw.randint(1, 9), draw.choice((1, draw.randint(1, 40), 70))
        sizes, kinds = (rows * d, n * d, n, n), ("integers", "signs", "zeros")
        x, w, b, theta = (np.resize(POOLS[draw.choice(kinds)][draw.randrange(SIZE - 700) :], size) for size in sizes)
        if draw.random() < 0.3:
            x[0], w[-1] = draw.choice((nan, inf, -inf)), draw.choice((1, nan))
        x, w = x.reshape(rows, d), w.reshape(n, d)
        chosen = np.array([f for f in range(n) if draw.random() < 0.6] or [0], np.int32) if draw.random() < 0.4 else None
        m = n if chosen is None else len(chosen)
        now = np.empty((rows, m), np.float32)
        oracle.products(p(x), i64(rows), p(w), p(chosen), i64(m), i64(d), None, ctypes.c_float(0), p(now))
        tensors = [torch.from_numpy(a) for a in (x, w, b)]
        options: dict[str, Any] = {"features": None if chosen is None else torch.from_numpy(chosen).long(), "backend": "reference"}

        k, (relu, absolute) = draw.choice((1, draw.randint(1, m), m)), draw.choice(RULES)
        values, indices = np.empty((rows, k), np.float32), np.empty((rows, k), np.int64)
        oracle.topk(p(now), i64(rows), i64(m), p(chosen), None, p(b), i64(k), int(relu), int(absolute), 0, p(values), p(indices))
        got = fastsae.encode_topk(*tensors, k=k, relu=relu, absolute=absolute, **options)
        problem.same("encode_topk", f"k={k}", values=(got.values + 0.0, values), indices=(got.indices, indices))

        out = np.empty(rows * m, np.float32), np.empty(rows * m, np.int64), np.empty(rows + 1, np.int64), np.empty(rows * m, np.uint8)
        found = oracle.threshold(p(now), i64(rows), i64(m), p(chosen), None, p(b), p(theta), ctypes.c_float(-1), *map(p, out))
        ragged = fastsae.encode_threshold(*tensors, threshold=torch.from_numpy(theta), **options)
        problem.same("encode_threshold", "", values=(ragged.values, out[0][:found]), col=(ragged.col, out[1][:found]),
                     crow=(ragged.crow, out[2]))  # fmt: skip

        least, total = np.empty(1, np.float32), draw.randint(1, m)
        found = oracle.batch_topk(p(now), i64(rows), i64(m), p(chosen), None, p(b), i64(total * rows), *map(p, out[:3]), p(least))
        ragged, min_kept = fastsae.encode_batch_topk(*tensors, k=total, **options)
        problem.same("encode_batch_topk", f"k={total}", values=(ragged.values, out[0][:found]), col=(ragged.col, out[1][:found]),
                     crow=(ragged.crow, out[2]), min_kept=(min_kept, least[0]))  # fmt: skip

        selected = fastsae.ops.select.select_topk(torch.from_numpy(now), k=k, relu=relu, backend="reference")
        oracle.topk(p(now), i64(rows), i64(m), None, None, None, i64(k), int(relu), 0, 0, p(values), p(indices))
        problem.same("select_topk", f"k={k}", values=(selected.values + 0.0, values), indices=(selected.indices, indices))
        code = fastsae.spline_code(*tensors, backend="reference")
        if chosen is None:
            words = np.empty((rows, (n + 63) // 64), np.int64)
            oracle.signs(p(now), i64(rows), i64(n), p(b), None, p(words))
            problem.same("spline_code", "", words=(code, words))


def test_the_published_key(oracle: ctypes.CDLL) -> None:
    """Philox4x32-10 of zeros (Salmon et al. 2011, known answers): both sides of the comparison at once would not show a wrong constant."""
    words, out = np.array([1], np.uint64), np.empty(2, np.uint64)
    oracle.hash(p(words), i64(1), i64(1), None, ctypes.c_uint32(0), ctypes.c_uint64(0), 128, p(out))
    assert [f"{int(word) & 0xFFFFFFFF:08x} {int(word) >> 32:08x}" for word in out] == ["6627e8d5 e169c58d", "bc57ac4c 9b00dbd8"]
