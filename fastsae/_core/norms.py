"""Norms of rows of any finite size, whose squares need not fit their dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_rows(wide: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``v / max(|v|, eps)`` of each row, and (divisor, norm, factor) ``[n, 1]``: both norms of ``factor * v``.

    ``factor`` is a power of two, 1 for rows whose largest element is not extreme, so that nothing is rounded otherwise.
    """
    reach = 8 if wide.dtype is torch.float64 else 1  # of its exponents, as many more as float32 has
    largest = wide.detach().abs().amax(1, keepdim=True) if wide.shape[1] else wide.new_ones(wide.shape[0], 1)
    factor = torch.ones_like(largest).masked_fill(largest < 2.0 ** (-40 * reach), 2.0 ** (60 * reach))
    factor = factor.masked_fill(largest < 2.0 ** (-100 * reach), 2.0 ** (120 * reach))
    factor = factor.masked_fill(largest > 2.0 ** (40 * reach), 2.0 ** (-80 * reach))
    scaled = wide * factor
    norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    divisor = norm.clamp_min(factor * eps)
    return scaled / divisor, divisor, norm, factor
