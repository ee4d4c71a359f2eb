"""The compiled step of sign descent; csrc/fastsae.h is its contract."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastsae.native.adam import gradient_arguments, refuses_gradient, same_layout
from fastsae.native.loader import call, expect


def refuses_signum(
    y: Tensor, z: Tensor, grad: Tensor, values: Tensor | None, indices: Tensor | None, crow: Tensor | None, *options: Any
) -> str | None:
    return refuses_gradient(grad, values, indices, crow, y=y, z=z)


def signum(
    y: Tensor, z: Tensor, grad: Tensor, values: Tensor | None, indices: Tensor | None, crow: Tensor | None,
    lr: float, momentum: float, share: float, project: bool, normalise: bool, factor: Tensor | None = None,
) -> None:  # fmt: skip
    """One step of schedule-free sign descent on y, z [F, D] with the same strides; grad, values, indices and crow as in `adam`."""
    expect(torch.float32, y, z, factor)
    if factor is not None and math.isnan(factor):
        return
    layout = same_layout("y", y, z=z)
    gradient = gradient_arguments(y, grad, values, indices, crow)
    matrices, options = (y.data_ptr(), z.data_ptr(), 0, *y.shape, *layout), (lr, momentum, share, project, normalise)
    call("signum", gradient.where, matrices, options, slots=gradient.slots)
