"""Each row of an input normalised by itself, as SAELens and OpenAI do it, and reconstructions back in the units of the data."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastsae.reference import accumulator

By = Literal["layer_norm", "norm"]
KINDS: tuple[str, ...] = get_args(By)
_EPS = 1e-5


class Rows(NamedTuple):
    """``x_hat = y * size + mean``, both ``[.., 1]`` in the accumulation dtype."""

    size: Tensor
    mean: Tensor | float

    def restored(self, y: Tensor) -> Tensor:
        return (y.to(self.size.dtype) * self.size + self.mean).to(y.dtype)


def normalised(x: Tensor, by: By) -> tuple[Tensor, Rows]:
    """``x [.., D]`` by ``SAE``'s ``normalise_rows``, in its dtype. A row without a deviation (a norm) becomes 0, with gradient 0."""
    wide = x.to(accumulator(x.dtype))
    mean = wide.mean(-1, keepdim=True) if by == "layer_norm" else 0.0
    centred = wide - mean
    squares = centred.square().sum(-1, keepdim=True)
    size = torch.where(squares == 0, 0, torch.where(squares == 0, 1.0, squares).sqrt())  # the slope of a root at 0 is none
    if by == "layer_norm":
        size = size / math.sqrt(x.shape[-1] - 1)
        return (centred / (size + _EPS)).to(x.dtype), Rows(size, mean)
    size = size / math.sqrt(x.shape[-1])
    return (centred / torch.where(size == 0, 1.0, size)).to(x.dtype), Rows(size, mean)
