"""The compiled steps of Adam, and the norm of a gradient; csrc/fastsae.h is the contract of every function."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae.native.decode import slot_arguments
from fastsae.native.loader import INDEX_DTYPES, address, call, expect, unavailable


def refuses_gradient(grad: Tensor, values: Tensor | None, indices: Tensor | None, crow: Tensor | None, **matrices: Tensor) -> str | None:
    """Why a step on these matrices with this gradient cannot be served, or None."""
    if (reason := unavailable()) is not None:
        return reason
    for name, t in (*matrices.items(), ("grad", grad), ("values", values)):
        if t is not None and t.dtype is not torch.float32:
            return f"dtype {str(t.dtype)[6:]} of {name} (supported: float32)"
        if t is not None and not t.is_cpu:
            return f"device {t.device} of {name} (supported: cpu)"
    if indices is not None and (not indices.is_cpu or indices.dtype not in INDEX_DTYPES):
        return f"indices {str(indices.dtype)[6:]} on {indices.device} (supported: int64, int32 on cpu)"
    if crow is not None and (not crow.is_cpu or crow.dtype is not torch.int64):
        return f"crow {str(crow.dtype)[6:]} on {crow.device} (supported: int64 on cpu)"
    strides = None
    for name, t in matrices.items():
        layout = layout_of(t)
        if layout is None:
            return f"{name} with strides {t.stride()} (supported: rows, or their transposed view)"
        if strides is not None and layout != strides:
            return f"{name} with strides {t.stride()} (supported: those of {next(iter(matrices))})"
        strides = layout
    return None


def layout_of(t: Tensor) -> tuple[int, int] | None:
    """``(stride_f, stride_d)`` of a matrix that lies as rows (``stride_d`` 1) or as their transposed view (``stride_f`` 1), else None."""
    (features, width), (f, d) = t.shape, t.stride()
    if t.is_contiguous():
        return width, 1
    if (d == 1 or width == 1) and f >= width:
        return f, 1
    return (1, d) if (f == 1 or features == 1) and d >= features else None


def same_layout(first: str, W: Tensor, **others: Tensor) -> tuple[int, int]:
    """The layout of W, which the others share; ValueError otherwise."""
    layout = layout_of(W)
    if layout is None:
        raise ValueError(f"{first}: expected rows {list(W.shape)} or their transposed view, got strides {W.stride()}")
    for name, t in others.items():
        if t.shape != W.shape or layout_of(t) != layout:
            raise ValueError(f"{name}: expected {list(W.shape)} as {first} lies, got {list(t.shape)} with strides {t.stride()}")
    return layout


class GradientArguments(NamedTuple):
    """A gradient as csrc/fastsae.h has it, the tensors that hold it, and the slots of ``call`` (None: the gradient is a matrix)."""

    where: tuple[bool | int | tuple[int, ...], ...]
    held: tuple[object, ...]
    slots: tuple[Tensor, Tensor | None, int] | None


def gradient_arguments(W: Tensor, grad: Tensor, values: Tensor | None, indices: Tensor | None, crow: Tensor | None) -> GradientArguments:
    expect(torch.float32, grad, values)
    if values is None or indices is None:
        if grad.shape != W.shape:
            raise ValueError(f"grad: expected {list(W.shape)}, got {list(grad.shape)}")
        layout, to = layout_of(grad), layout_of(W)
        if layout is None or (layout[1] != 1 and (to is None or to[1] == 1)):
            grad, layout = grad.contiguous(), (W.shape[1], 1)
        return GradientArguments((False, (0,) * 7, 0, grad.data_ptr(), *layout), (grad,), None)
    slots, rows, held = slot_arguments(indices, crow, W.shape[0])
    if values.shape != indices.shape or grad.shape != (rows, W.shape[1]):
        raise ValueError(f"values {list(values.shape)}, indices {list(indices.shape)}, grad {list(grad.shape)} for W {list(W.shape)}")
    grad, values = grad.contiguous(), values.contiguous()
    where = (True, slots, values.data_ptr(), grad.data_ptr(), W.shape[1], 1)
    return GradientArguments(where, (grad, values, held), (indices, crow, W.shape[0]))


def refuses_adam(
    W: Tensor, m: Tensor, v: Tensor,
    grad: Tensor, values: Tensor | None, indices: Tensor | None, crow: Tensor | None, factor: Tensor | None,
    *options: Any,
) -> str | None:  # fmt: skip
    if options[8:] not in ((), (None,)):
        return "corrections are given (supported: the number of the step)"
    if factor is not None and (factor.dtype is not torch.float32 or not factor.is_cpu):
        return f"factor {str(factor.dtype)[6:]} on {factor.device} (supported: float32 on cpu)"
    return refuses_gradient(grad, values, indices, crow, W=W, m=m, v=v)


def refuses_grad_squares(
    W: Tensor, grad: Tensor, values: Tensor | None, indices: Tensor | None, crow: Tensor | None, project: bool
) -> str | None:
    return refuses_gradient(grad, values, indices, crow, W=W)


def adam(
    W: Tensor, m: Tensor, v: Tensor,
    grad: Tensor, values: Tensor | None, indices: Tensor | None, crow: Tensor | None, factor: Tensor | None,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int, project: bool, normalise: bool,
    corrections: None = None,
) -> None:  # fmt: skip
    """One step of Adam on W, m, v [F, D] with the same strides, rows or their transposed view; csrc/fastsae.h has the arithmetic.

    Args:
        grad: [F, D] without slots; else [rows, D], with values, indices [rows, K], or [nnz] with crow [rows + 1].
        factor: None, or [] which multiplies the gradient; NaN: nothing is written.
    """
    if factor is not None and math.isnan(factor):
        return
    expect(torch.float32, W, m, v, factor)
    layout = same_layout("W", W, m=m, v=v)
    gradient = gradient_arguments(W, grad, values, indices, crow)
    matrices = W.data_ptr(), m.data_ptr(), v.data_ptr(), *W.shape, *layout
    options = lr, beta1, beta2, eps, weight_decay, step, project, normalise
    call("adam", gradient.where, address(factor), matrices, options, slots=gradient.slots)


def grad_squares(W: Tensor, grad: Tensor, values: Tensor | None, indices: Tensor | None, crow: Tensor | None, project: bool) -> Tensor:
    """The sum of squares of the gradient of W [F, D], []; arguments as in `adam`."""
    expect(torch.float32, W)
    layout = same_layout("W", W)
    gradient = gradient_arguments(W, grad, values, indices, crow)
    total = torch.empty((), dtype=torch.float32, device="cpu")
    matrices = W.data_ptr(), 0, 0, *W.shape, *layout
    call("grad_squares", gradient.where, matrices, project, total.data_ptr(), slots=gradient.slots)
    return total
