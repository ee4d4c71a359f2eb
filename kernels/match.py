"""Cosine matching of two dictionaries on a GPU: the top-k of ``fastsae.kernels.encode`` over unit rows, screened and scored exactly.

    match_cosine    the k rows of b that match each row of a best, by the similarity or by its magnitude
    match_pair      the same in both directions, and the most negative match of each row of a: three passes over the products

Memory beyond the output: the unit rows of both in float32 and the workspace of the top-k.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportOptionalOperand=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels import _tile
from fastsae.kernels._problem import Problem
from fastsae.kernels._tile import exact
from fastsae.kernels.encode import topk

# ---------------------------------------------------------------- device code


@triton.jit(do_not_specialize=["k", "D"])
def similarity_kernel(x, W, indices, values, k, D, x_r, x_d, W_f, W_d, COLUMNS: tl.constexpr):
    """values[row, s] = the exact product of a row and the feature that indices[row, s] names."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = slot < k
    f = tl.load(indices + row * k + slot, mask=mask, other=0)
    x_at = x + (row * x_r + tl.zeros((1,), tl.int64))
    total = exact(x_at, (W + f * W_f)[None, :], x, D, x_d, W_d, mask[None, :], False, 1, COLUMNS)
    tl.store(values + row * k + slot, tl.reshape(total, (COLUMNS,)), mask=mask)


# ---------------------------------------------------------------- launchers


def _unit(v: Tensor, eps: float) -> Tensor:
    wide = v.to(torch.float32)
    return wide / torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min(eps)


def _best(
    a: Tensor, b: Tensor, k: int, *, absolute: bool = False, exclude_self: bool = False, negative: bool = False
) -> tuple[Tensor, Tensor]:
    """(similarity [N, k] in float32, index [N, k]) of unit rows; ``negative``: the smallest similarities, negated."""
    values = torch.empty((a.shape[0], k), dtype=torch.float32, device=a.device)
    indices = torch.empty((a.shape[0], k), dtype=torch.int64, device=a.device)
    scale = values.new_full((b.shape[0],), -1.0) if negative else None
    topk(Problem(a, b, None, scale, None, None, _tile.tile_for(a.device), absolute, exclude_self), k, values, indices, relu=False)
    if absolute and values.numel():
        width = min(64, triton.next_power_of_2(k)) if _tile.interpreting() else 16
        with _tile.on(a.device):
            similarity_kernel[(a.shape[0], triton.cdiv(k, width))](
                a, b, indices, values, k, a.shape[1], *a.stride(), *b.stride(), COLUMNS=width, num_warps=2, enable_fp_fusion=False
            )
    return values, indices


def match_cosine(a: Tensor, b: Tensor, k: int, absolute: bool, exclude_self: bool, eps: float) -> tuple[Tensor, Tensor]:
    """(similarity [N, k] in the dtype of a, index [N, k]); the contract is fastsae.ops.match's."""
    similarity, index = _best(_unit(a, eps), _unit(b, eps), k, absolute=absolute, exclude_self=exclude_self)
    return similarity.to(a.dtype), index


def match_pair(a: Tensor, b: Tensor, k_ab: int, k_ba: int, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(similarity, index) a to b, b to a, and of the most negative match of each row of a; the contract is fastsae.ops.match's."""
    a_unit, b_unit = _unit(a, eps), _unit(b, eps)
    forward, backward, lowest = _best(a_unit, b_unit, k_ab), _best(b_unit, a_unit, k_ba), _best(a_unit, b_unit, 1, negative=True)
    return (
        forward[0].to(a.dtype), forward[1], backward[0].to(b.dtype), backward[1], -lowest[0][:, 0].to(a.dtype), lowest[1][:, 0],
    )  # fmt: skip
