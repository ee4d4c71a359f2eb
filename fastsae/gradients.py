"""Gradients of a weight matrix that are not stored as a matrix: what the fused optimiser takes in place of a dense ``[F, D]`` tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class RowGradient:
    """``dW[f] = sum over slots s with feature f of values[s] * rows[r(s)]``, in slot order.

    Attributes:
        values: ``[n, K]``, or ``[nnz]`` with ``crow``. indices: the same shape, int64 or int32 features.
        crow: None, or ``[n + 1]`` int64: slots of row r are ``crow[r] .. crow[r + 1] - 1``.
        rows: ``[n, D]``, one gradient (decoder) or input (encoder) row for each row of slots.
        n_features: F.
    """

    values: Tensor
    indices: Tensor
    crow: Tensor | None
    rows: Tensor
    n_features: int


@dataclass(frozen=True, eq=False)
class TiledGradient:
    """A gradient that is computed a range of features at a time, where latents are dense: ``compute(slice)`` returns ``[len(slice), D]``.

    ``compute`` may be asked for every feature once, in ascending ranges of any size, and at most once more for a norm.
    """

    compute: Callable[[slice], Tensor]
    n_features: int


Gradient = Tensor | RowGradient | TiledGradient
