"""Everything that is written, and how it is compared."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsae import SAE, TopK, optim, save_checkpoint

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
D, F = 4, 12


def rows(n: int = 40, d: int = D) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(n + d))


def full(value: int, **options: Any) -> SAE:
    """A module whose weights and configuration say which one it is."""
    sae = SAE(D, F, TopK(3), seed=0, dead_after=value + 1, normalise_decoder=False, **options)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.fill_(value)
    return sae


def checkpoint(path: Path, value: int) -> None:
    sae = full(value)
    save_checkpoint(path, sae, optim.Adam(sae), {"n": value})


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def adam(sae: SAE, order: int = 1, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(list(sae.parameters())[::order], **options)
