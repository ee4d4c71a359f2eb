"""Signum on a GPU: one program a feature forms its gradient row as ``fastsae.kernels.adam`` does, takes its signs and moves y and z.

    g, project, signs, z, average, y, normalise: as fastsae.ops.signum states them, all in registers
    lerp(a, b, s) = fma(s, b - a, a) for |s| < 1/2, otherwise fma(a - b, 1 - s, b): the nearer side, as torch

Bytes: 16 F D for y and z, read and written once, and what decode_dweight gathers; no [F, D] gradient.
"""

# pyright: basic, reportMissingImports=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportOptionalOperand=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastsae._core.jit import kernel
from fastsae.kernels import adam
from fastsae.kernels._tile import on
from fastsae.kernels.adam import gradient_row, unit_row

# ---------------------------------------------------------------- device code


@triton.jit
def _lerp(a, b, share, COLUMNS: tl.constexpr):
    share = tl.zeros((COLUMNS,), tl.float32) + share
    return tl.where(tl.abs(share) < 0.5, tl.fma(share, b - a, a), tl.fma(a - b, 1.0 - share, b))


@kernel(do_not_specialize=["n_rows", "split"])
def signum_kernel(
    y, z, grad, values, rows, segments, chunks, partials, factor,
    n_rows, n_columns, split, stride_r, stride_g, stride_p, lr, back, share, towards,
    SPARSE: tl.constexpr, STRIDED: tl.constexpr, FACTOR: tl.constexpr, PROJECT: tl.constexpr, NORMALISE: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, COLUMNS)
    mask = d < n_columns
    at = feature * n_columns + d
    g = gradient_row(
        y, grad, values, rows, segments, chunks, partials, feature, d, at, mask, n_rows, split, stride_r, stride_g, stride_p,
        SPARSE, STRIDED, PROJECT, COLUMNS,
    )  # fmt: skip
    sign = (g > 0).to(tl.float32) - (g < 0).to(tl.float32)
    before = tl.load(z + at, mask=mask, other=0)
    average = _lerp(tl.load(y + at, mask=mask, other=0), before, back, COLUMNS)
    after = before - lr * sign
    if FACTOR:
        scale = tl.load(factor) + tl.zeros_like(sign)  # a block: the interpreter gives a number's comparison the number's type
        mask = mask & (scale == scale)  # NaN: a step that shall not be taken
    tl.store(z + at, after, mask=mask)
    w = _lerp(_lerp(average, after, share, COLUMNS), after, towards, COLUMNS)
    if NORMALISE:
        w = unit_row(w, mask, COLUMNS)
    tl.store(y + at, w, mask=mask)


# ---------------------------------------------------------------- launchers


def signum(
    y: Tensor, z: Tensor, grad: Tensor, values: Tensor | None, indices: Tensor | None, crow: Tensor | None,
    lr: float, momentum: float, share: float, project: bool, normalise: bool, factor: Tensor | None = None,
) -> None:  # fmt: skip
    """One step in place; y and z are contiguous. The contract is fastsae.ops.signum's."""
    (features, D), (size, warps) = y.shape, adam.row_size(y.shape[1])
    with on(y.device):
        split, sparse = adam.slots(values, indices, crow, grad, features)
        if features == 0 or D == 0:
            return
        signum_kernel[(features,)](
            y, z, grad, *sparse, factor,
            grad.shape[0], D, split, grad.stride(0), grad.stride(1), D, lr, 1 - 1 / momentum, share, 1 - momentum,
            SPARSE=values is not None, STRIDED=grad.stride(1) != 1, FACTOR=factor is not None, PROJECT=project, NORMALISE=normalise,
            COLUMNS=size, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
