"""All-pairs Hamming distances beside a product of unpacked bits (N, M, bits)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fastsae
from bench.harness import DEVICE, name, shapes
from fastsae.dispatch import OPS

SHAPES = shapes([(4096, 4096, 1024)], [(256, 256, 128)])


@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_hamming(shape: tuple[int, int, int], compare: Callable[..., None]) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-(2**63), 2**63 - 1, (n, shape[2] // 64), generator=generator).to(DEVICE) for n in shape[:2])
    out = torch.empty(shape[0], shape[1], dtype=torch.int32, device=DEVICE)
    left, right = (((side.unsqueeze(-1) >> torch.arange(64, device=DEVICE)) & 1).float().flatten(1) for side in (a, b))

    def verify() -> None:
        OPS["hamming"].check((a[:32], b, None), fastsae.hamming(a[:32], b))

    others = {"torch product of unpacked bits": lambda: (left.sum(1, keepdim=True) + right.sum(1) - 2 * left @ right.T).int()}
    compare("hamming", name(shape), lambda: fastsae.hamming(a, b, out), others, verify)
