"""Seeds of several random streams from one, and what is drawn from a stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def stream_seed(seed: int, stream: int) -> int:
    """A seed of 32 bits for one of several streams of a seed. (Of a larger one torch's CPU generator reads the low 32 bits only.)"""
    return int(np.random.SeedSequence([seed, stream]).generate_state(1)[0])


def normal(generator: torch.Generator | None, *shape: Any) -> Tensor:
    """Standard normal numbers in float32 on the CPU: what a seed draws depends on no default of torch's."""
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


def normal_rows(generator: torch.Generator | None, n: int, width: int, own: slice) -> Tensor:
    """``normal(generator, n, width)[own]`` to the bit, in the memory of these rows.

    torch draws 16 numbers at a time, and what is left over at the end anew with those before it: pieces are of such groups, the last one of
    at least one.
    """
    bounds = [*range(0, n, -(-(1 << 20) // (16 * width)) * 16)]
    if len(bounds) > 1 and (n - bounds[-1]) * width < 16:
        bounds.pop()
    kept = []
    for start, stop in zip(bounds, [*bounds[1:], n]):
        piece = normal(generator, stop - start, width)
        kept.append(piece[max(own.start - start, 0) : max(own.stop - start, 0)].clone())
    return torch.cat(kept)


def uniform(generator: torch.Generator | None, *shape: Any) -> Tensor:
    """As ``normal``, in 0 .. 1."""
    return torch.rand(*shape, generator=generator, dtype=torch.float32, device="cpu")
