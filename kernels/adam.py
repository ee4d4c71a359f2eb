"""Exact dense Adam on a GPU: one program a feature forms its gradient row, moves its moments and its weights, and is done with them.

    g = sum of the feature's partial sums, in order, + decode of the slots left       (as decode_dweight, the same bits); or a row of grad
    project, clip, decay, moments, weights, normalise: as fastsae.ops.adam states them, all in registers

Bytes: 24 F D for W, m and v, read and written once, and what decode_dweight gathers; no [F, D] gradient. With ``SQUARES`` the same
program leaves |g|^2 of each feature instead and writes nothing else.
"""

# pyright: basic, reportMissingImports=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportOptionalOperand=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae._core.jit import kernel
from fastsae.kernels import decode
from fastsae.kernels._tile import on
from fastsae.kernels.decode import sum_feature

MOST_COLUMNS = 8192  # of a row that one program holds

# ---------------------------------------------------------------- device code


@triton.jit
def gradient_row(
    W, grad, values, rows, segments, chunks, partials, feature, d, at, mask, n_rows, split, stride_r, stride_g, stride_p,
    SPARSE: tl.constexpr, STRIDED: tl.constexpr, PROJECT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of row ``feature`` of W, elements ``at``, columns ``d``; with PROJECT without its component along the row."""
    touched = feature >= 0
    along = d
    if STRIDED:
        along = d.to(tl.int64) * stride_g
    if SPARSE:
        g, touched = sum_feature(values, rows, grad, segments, chunks, partials, feature, d, along, mask, n_rows, split, stride_r, stride_p)
    else:
        g = tl.load(grad + feature * stride_r + along, mask=mask, other=0)
    if PROJECT:
        w = tl.load(W + at, mask=mask, other=0)
        g = tl.where(touched, g - tl.sum(g * w, axis=0) * w, g)
    return g


@triton.jit
def unit_row(w, mask, COLUMNS: tl.constexpr):
    """A row of norm 1; one shorter than 1e-8 stays."""
    norm = tl.sqrt_rn(tl.sum(tl.where(mask, w * w, 0.0), axis=0))
    return tl.div_rn(w, tl.zeros((COLUMNS,), tl.float32) + tl.where(norm < 1e-8, 1.0, norm))


@kernel(do_not_specialize=["n_rows", "split"])
def adam_kernel(
    W, m, v, grad, values, rows, segments, chunks, partials, factor, squares, corrections,
    n_rows, n_columns, split, stride_r, stride_g, stride_p,
    beta1, rest1, beta2, rest2, keep, move, root, eps,
    SPARSE: tl.constexpr, STRIDED: tl.constexpr, FACTOR: tl.constexpr, PROJECT: tl.constexpr, NORMALISE: tl.constexpr,
    SQUARES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, COLUMNS)
    mask = d < n_columns
    at = feature * n_columns + d
    g = gradient_row(
        W, grad, values, rows, segments, chunks, partials, feature, d, at, mask, n_rows, split, stride_r, stride_g, stride_p,
        SPARSE, STRIDED, PROJECT, COLUMNS,
    )  # fmt: skip
    if SQUARES:
        tl.store(squares + feature, tl.sum(g * g, axis=0))
    else:
        if FACTOR:
            scale = tl.load(factor) + tl.zeros_like(g)  # a block: the interpreter gives a number's comparison the number's type
            g = g * scale
            mask = mask & (scale == scale)  # NaN: a step that shall not be taken
        moment = beta1 * tl.load(m + at, mask=mask, other=0) + rest1 * g
        second = beta2 * tl.load(v + at, mask=mask, other=0) + rest2 * (g * g)
        tl.store(m + at, moment, mask=mask)
        tl.store(v + at, second, mask=mask)
        if corrections is not None:
            move = tl.load(corrections)
            root = tl.load(corrections + 1)
        w = keep * tl.load(W + at, mask=mask, other=0)
        w = w - move * tl.div_rn(moment, tl.div_rn(tl.sqrt_rn(second), root) + eps)
        if NORMALISE:
            w = unit_row(w, mask, COLUMNS)
        tl.store(W + at, w, mask=mask)


# ---------------------------------------------------------------- launchers


def adam(
    W: Tensor, m: Tensor, v: Tensor, grad: Tensor, values: Tensor | None, indices: Tensor | None, crow: Tensor | None,
    factor: Tensor | None, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int, project: bool,
    normalise: bool, corrections: Tensor | None = None,
) -> None:  # fmt: skip
    """One step in place; W, m and v are contiguous. The contract is fastsae.ops.adam's."""
    numbers = (beta1, 1 - beta1, beta2, 1 - beta2, 1 - lr * weight_decay, lr / (1 - beta1**step), math.sqrt(1 - beta2**step), eps)
    _launch((W, m, v), grad, values, indices, crow, factor, None, numbers, corrections, project=project, normalise=normalise)


def grad_squares(
    W: Tensor, grad: Tensor, values: Tensor | None, indices: Tensor | None, crow: Tensor | None, project: bool
) -> Tensor:  # fmt: skip
    """[]: the sum of the squares of the gradient, feature by feature, then of these."""
    squares = torch.zeros(W.shape[0], dtype=torch.float32, device=W.device)
    _launch((W, None, None), grad, values, indices, crow, None, squares, (0.0,) * 8, project=project, normalise=False)
    return squares.sum()


def _launch(
    matrices: tuple[Tensor, Tensor | None, Tensor | None], grad: Tensor, values: Tensor | None, indices: Tensor | None, crow: Tensor | None,
    factor: Tensor | None, squares: Tensor | None, numbers: tuple[float, ...], corrections: Tensor | None = None, *, project: bool,
    normalise: bool,
) -> None:  # fmt: skip
    (features, D), device = matrices[0].shape, matrices[0].device
    size, warps = row_size(D)
    with on(device):
        split, sparse = slots(values, indices, crow, grad, features)
        if features == 0 or D == 0:
            return
        adam_kernel[(features,)](
            *matrices, grad, *sparse, factor, squares, corrections,
            grad.shape[0], D, split, grad.stride(0), grad.stride(1), D, *numbers,
            SPARSE=values is not None, STRIDED=grad.stride(1) != 1, FACTOR=factor is not None, PROJECT=project, NORMALISE=normalise,
            SQUARES=squares is not None, COLUMNS=size, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip


def row_size(D: int) -> tuple[int, int]:
    """(columns, warps) of a program that holds a row of D."""
    size = max(32, triton.next_power_of_2(D))
    return size, min(16, max(1, size // 512))


def slots(
    values: Tensor | None, indices: Tensor | None, crow: Tensor | None, grad: Tensor, features: int
) -> tuple[int, tuple[Tensor | None, ...]]:  # fmt: skip
    """What ``gradient_row`` reads beside ``grad``: (slots a partial sum, the slots by feature and the partial sums of features with many);
    nothing where ``grad`` is the gradient."""
    if values is None or indices is None:
        return 0, (None,) * 5
    decode.check_on_cpu(indices, crow, features)
    D = grad.shape[1]
    size = min(512, row_size(D)[0])
    values, row, segments, split, chunks, owner = decode.by_feature(values, indices, crow, features)
    partials = torch.empty((owner.numel(), D), dtype=torch.float32, device=grad.device)
    if partials.numel():
        decode.decode_partials_kernel[owner.numel(), triton.cdiv(D, size)](
            values, row, grad, segments, chunks, owner, partials,
            features, grad.shape[0], D, split, grad.stride(0), grad.stride(1), D, COLUMNS=size, num_warps=1, maxnreg=decode.REGISTERS,
            enable_fp_fusion=False,
        )  # fmt: skip
    return split, (values, row, segments, chunks, partials)
