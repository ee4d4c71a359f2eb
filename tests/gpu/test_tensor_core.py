"""The model of tensor cores that the interpreter's tests compute with: bit for bit as MMA-Sim, and within the proof's term q."""

from __future__ import annotations

import importlib
import importlib.util
import os

import numpy as np
import pytest
import torch
from emulation import compiler
from places import TESTS
from tensor_core import CHIPS, product

pytest.importorskip("triton")
from fastsae.kernels import _tile

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
K = 32  # two groups of the longest
UNITS = {  # instructions of MMA-Sim for each line of the file
    "volta float16": ("MMA", "Volta", "m8n8k4.f32.f16.f16.f32"),
    "ampere float16": ("MMA", "Ampere", "m16n8k16.f32.f16.f16.f32"),
    "ampere bfloat16": ("MMA", "Ada Lovelace", "m16n8k16.f32.bf16.bf16.f32"),
    "hopper float16": ("WGMMA", "Hopper", "m64n8k16.f32.f16.f16"),
    "hopper bfloat16": ("WGMMA", "Hopper", "m64n8k16.f32.bf16.bf16"),
}


def vectors(n: int, seed: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(a [n, K], b [n, K], c [n]) of every kind: spread exponents, cancellation, denormals, zeros, infinities, NaN."""
    draw = np.random.RandomState(seed)  # whose stream is promised never to change
    kind = np.arange(n)[:, None] % 6
    a, b = draw.standard_normal((2, n, K))
    spread = np.exp2(draw.randint(-12, 12, (2, n, K)))
    a, b = (np.where(kind % 2 == 1, v * s, v) for v, s in zip((a, b), spread))
    b = np.where(kind == 2, np.roll(-b * np.roll(a, 1, 1) / np.where(a == 0, 1, a), 3, 1), b)
    a = np.where(kind == 3, a * 2.0**-20, a)
    b = np.where((kind == 4) & (draw.rand(n, K) < 0.6), 0, b)
    a[5::48, 7], b[29::48, 3], a[53::96, 1] = np.inf, np.nan, -np.inf
    c = draw.standard_normal(n) * np.exp2(draw.randint(-30, 14, n)) * (draw.rand(n) < 0.8)
    half = getattr(torch, dtype)
    return torch.from_numpy(a).to(half), torch.from_numpy(b).to(half), torch.from_numpy(c).float()


def computed(unit: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> np.ndarray:
    chip, dtype = unit.split()
    rows = zip(a.float().numpy(), b.float().numpy(), c.numpy())
    return np.array([product(x[None], y[:, None], z[None, None], *CHIPS[chip], dtype)[0, 0] for x, y, z in rows])


def simulated(unit: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> np.ndarray:
    kind, arch, shape = UNITS[unit]
    operation = getattr(importlib.import_module("mmasim.nv_ptx"), kind)(arch, shape)
    for start in range(0, K, operation.k):
        c = operation.dpa(a[:, start : start + operation.k], b[:, start : start + operation.k], c)
    return c.numpy()


def bits(values: np.ndarray) -> str:
    return values.astype(np.float32).tobytes().hex()


@pytest.mark.parametrize("unit", UNITS)
def test_is_mma_sim(unit: str) -> None:
    """Against what MMA-Sim 2.1.1 gave for 240 vectors; `make deep`: against itself on 10^5."""
    stored = dict(line.rsplit(" ", 1) for line in (TESTS / "gpu" / "tensor_core.txt").read_text().splitlines())
    assert bits(computed(unit, *vectors(240, 0, unit.split()[1]))) == stored[unit]
    if DEEP:
        if importlib.util.find_spec("mmasim") is None:
            pytest.skip("mmasim is not installed: only the stored vectors were compared")
        drawn = vectors(100_000, 1, unit.split()[1])
        assert bits(computed(unit, *drawn)) == bits(simulated(unit, *drawn))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("D", [64, 4096])
def test_adversaries_stay_within_the_bound(chip: str, D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """(4) of the proof in kernels/_tile.py: |r~ - <x, w>| <= q |x||w|, for what loses most."""
    fused, fraction = CHIPS[chip]
    g = np.random.RandomState(0)
    almost = np.float32(2 - 2.0**-10)
    ones, signs = np.ones(D), np.where(np.arange(D) % 2, 1.0, -1.0)
    lost = np.nextafter(np.float16(2.0 ** ((12 - fraction) / 2)), np.float16(0))  # whose square lies below what is kept beside 2^12
    swallowed = np.where(np.arange(D) == 0, 2.0**6, lost)[None]
    large = np.where(np.arange(D) % fused == 0, 2.0**6, almost * 2.0**-5)
    families = {
        "normal": (g.standard_normal((4, D)), g.standard_normal((4, D))),
        "positive": (abs(g.standard_normal((4, D))), abs(g.standard_normal((4, D)))),
        "just below": (almost * ones[None], almost * ones[None]),  # each product and each sum lose almost a unit
        "one large a group": (large[None], almost * ones[None]),
        "large first": (np.where(np.arange(D) == 0, 2.0**12, almost * 2.0**-10)[None], almost * ones[None]),
        "swallowed": (swallowed, swallowed),
        "cancels": ((large * signs)[None], almost * ones[None]),
        "rises": (np.exp2(np.arange(D) * 20.0 / D - 10)[None] * almost, almost * ones[None]),
    }
    monkeypatch.setattr(_tile, "_INTERPRETED_SUMS", CHIPS[chip])
    q = _tile.slip(torch.device("cpu")) * (D + 64)
    used = {}
    for name, (x, w) in families.items():
        x, w = x.astype(np.float16), w.astype(np.float16)
        got = product(x, w.T, np.zeros((len(x), len(w))), fused, fraction).astype(np.float64)
        exact = x.astype(np.float64) @ w.T.astype(np.float64)
        size = np.linalg.norm(x.astype(np.float64), axis=1)[:, None] * np.linalg.norm(w.astype(np.float64), axis=1)
        used[name] = float((abs(got - exact) / (q * size)).max())
    assert max(used.values()) <= 1, used
    assert used["swallowed"] > 0.9 * (D - fused) * 2.0**-fraction / q, used  # and they do lose what they can
