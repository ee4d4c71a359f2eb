"""Coders of sparsify, each beside an accelerated copy."""

from __future__ import annotations

from typing import Any

import torch
from peers import load
from torch import Tensor

import fastsae

sparsify = load("sparsify", "eai-sparsify")
from sparsify import SparseCoder, SparseCoderConfig  # noqa: E402

D, F, K, ROWS = 24, 96, 5, 40


def make(**config: Any) -> Any:
    """A coder with every parameter away from its start."""
    coder = SparseCoder(D, SparseCoderConfig(**{"num_latents": F, "k": K, **config}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in coder.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.dim() == 2 else 0.1))
    return coder


def pair(**config: Any) -> tuple[Any, Any]:
    """(accelerated, the library's own), equal."""
    return fastsae.accelerate(make(**config)), make(**config)


def rows(n: int = ROWS, seed: int = 1) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


CONFIGS: list[dict[str, Any]] = [
    {},
    {"multi_topk": True},
    {"transcode": True},
    {"transcode": True, "skip_connection": True},
    {"skip_connection": True, "multi_topk": True},
    {"normalize_decoder": False},
]


def library_step(coder: Any, optimizer: Any, x: Tensor, y: Tensor | None, dead: Tensor | None, alpha: float) -> Any:
    """What the trainer's hook and loop do with one batch."""
    project = coder.cfg.normalize_decoder and not coder.cfg.transcode
    if project:
        coder.set_decoder_norm_to_unit_norm()
    out = coder(x=x, y=y, dead_mask=dead)
    (out.fvu + alpha * out.auxk_loss + out.multi_topk_fvu / 8).backward()
    if project:
        coder.remove_gradient_parallel_to_decoder_directions()
    optimizer.step()
    optimizer.zero_grad()
    return out
