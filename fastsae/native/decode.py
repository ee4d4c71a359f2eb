"""The compiled decode and its gradients; csrc/fastsae.h is the contract of every function."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.native.loader import DTYPES, INDEX_DTYPES, SUPPORTED, address, call, expect, unavailable


def _refuses(a: Tensor, a_name: str, indices: Tensor, crow: Tensor | None, w: Tensor, w_name: str, t: Tensor | None = None) -> str | None:
    if (reason := unavailable()) is not None:
        return reason
    dtype = w.dtype
    if dtype not in DTYPES:
        return f"dtype {str(dtype)[6:]} ({SUPPORTED})"
    if a.dtype is not dtype or (t is not None and t.dtype is not dtype):
        other = a if a.dtype is not dtype or t is None else t
        return f"mixed dtypes: {a_name} {str(other.dtype)[6:]}, {w_name} {str(dtype)[6:]}"
    if indices.dtype not in INDEX_DTYPES:
        return f"index dtype {str(indices.dtype)[6:]} (supported: int64, int32)"
    if not (w.is_cpu and a.is_cpu and indices.is_cpu and (t is None or t.is_cpu)):
        other = next(each for each in (w, a, indices, t) if each is not None and not each.is_cpu)
        return f"device {other.device} (supported: cpu)"
    if crow is not None and (not crow.is_cpu or crow.dtype is not torch.int64):
        return f"crow {str(crow.dtype)[6:]} on {crow.device} (supported: int64 on cpu)"
    return None


def refuses_decode(values: Tensor, indices: Tensor, crow: Tensor | None, W: Tensor, b: Tensor | None) -> str | None:
    if b is not None and ((b.dtype is not torch.float32 and b.dtype is not W.dtype) or not b.is_cpu):
        return f"b {str(b.dtype)[6:]} on {b.device} (supported: float32 or the dtype of W, on cpu)"
    return _refuses(values, "values", indices, crow, W, "W")


def refuses_decode_dvalues(grad: Tensor, indices: Tensor, crow: Tensor | None, W: Tensor) -> str | None:
    return _refuses(grad, "grad", indices, crow, W, "W")


def refuses_decode_dweight(values: Tensor, indices: Tensor, crow: Tensor | None, grad: Tensor, out: Tensor) -> str | None:
    return _refuses(values, "values", indices, crow, out, "out", grad)


def slot_arguments(indices: Tensor, crow: Tensor | None, features: int) -> tuple[tuple[int, ...], int, tuple[Tensor, Tensor | None]]:
    """Slots as csrc/fastsae.h has them, rows, and the tensors that hold them."""
    indices = indices.contiguous()
    if crow is None:
        if indices.dim() != 2:
            raise ValueError(f"indices: expected [rows, K] without crow, got {list(indices.shape)}")
        rows, k = indices.shape
    else:
        if indices.dim() != 1 or crow.dim() != 1 or crow.numel() == 0 or crow.dtype is not torch.int64 or not crow.is_cpu:
            raise ValueError(
                f"expected indices [nnz] and crow [rows + 1] int64, got {list(indices.shape)} and {list(crow.shape)} {crow.dtype}"
            )
        crow = crow.contiguous()
        rows, k = crow.numel() - 1, 0
    where = (indices.data_ptr(), address(crow), rows, k, indices.numel(), features, INDEX_DTYPES[indices.dtype])
    return where, rows, (indices, crow)


def decode(values: Tensor, indices: Tensor, crow: Tensor | None, W: Tensor, b: Tensor | None) -> Tensor:
    """[rows, D] in W.dtype: for each row b + the sum of values · W[indices] over its slots, in slot order.

    Args:
        values, indices: [rows, K] without `crow`, else [nnz].
        crow: None, or [rows + 1] int64: the slots of row r are crow[r] to crow[r + 1].
        W: [F, D], any strides, never copied as a whole.
        b: None, or [D] in float32 or W.dtype.

    Raises: IndexError (an index outside 0 .. F - 1), ValueError (shapes, crow).
    """
    (features, d), dtype = W.shape, W.dtype
    where, rows, _held = slot_arguments(indices, crow, features)
    if values.shape != indices.shape or (b is not None and b.shape != (d,)):
        raise ValueError(
            f"values {list(values.shape)}, indices {list(indices.shape)}, b {None if b is None else list(b.shape)} for D = {d}"
        )
    expect(dtype, values)
    values = values.contiguous()
    if b is not None:
        b = (b if b.dtype is torch.float32 else b.float()).contiguous()
    y = torch.empty((rows, d), dtype=dtype, device="cpu")
    arguments = where, DTYPES[dtype], values.data_ptr(), (W.data_ptr(), *W.stride(), d), address(b), y.data_ptr()
    call("decode", *arguments, slots=(indices, crow, features))
    return y


def quick(values: Tensor, indices: Tensor, W: Tensor, b: Tensor | None) -> Tensor | None:
    """`decode` of tensors that are ``dispatch.alone``, as `fastsae.native.encode.quick_topk`."""
    if values.dim() != 2 or W.dim() != 2 or not indices.is_cpu or indices.dtype is not torch.int64 or unavailable() is not None:
        return None
    (rows, k), (features, d) = values.shape, W.shape
    if indices.shape != values.shape or not (values.is_contiguous() and indices.is_contiguous()):
        return None
    if b is not None and (b.dim() != 1 or b.shape[0] != d or not b.is_contiguous()):
        return None
    y = W.new_empty(rows, d)
    slots = (indices.data_ptr(), 0, rows, k, rows * k, features, 1)
    weight = (W.data_ptr(), *W.stride(), d)
    call("decode", slots, 0, values.data_ptr(), weight, address(b), y.data_ptr(), slots=(indices, None, features))
    return y


decode.quick = quick  # pyright: ignore[reportFunctionMemberAccess]


def decode_dvalues(grad: Tensor, indices: Tensor, crow: Tensor | None, W: Tensor) -> Tensor:
    """The gradient of `decode` in its values: ⟨grad[r], W[index]⟩ for every slot, in grad.dtype and the shape of `indices`.

    Args: grad [rows, D]; the others as in `decode`.
    """
    (features, d), dtype = W.shape, W.dtype
    where, rows, _held = slot_arguments(indices, crow, features)
    if grad.shape != (rows, d):
        raise ValueError(f"grad: expected {[rows, d]}, got {list(grad.shape)}")
    expect(dtype, grad)
    grad = grad.contiguous()
    dvalues = torch.empty(indices.shape, dtype=dtype, device="cpu")
    arguments = where, DTYPES[dtype], grad.data_ptr(), (W.data_ptr(), *W.stride(), d), dvalues.data_ptr()
    call("decode_dvalues", *arguments, slots=(indices, crow, features))
    return dvalues


def decode_dweight(values: Tensor, indices: Tensor, crow: Tensor | None, grad: Tensor, out: Tensor) -> None:
    """The gradient of `decode` in W, written into out [F, D] (any strides): out[f] = the sum of value · grad[row] over the slots of f.

    Every row is written, zeros where a feature has no slot.
    """
    (features, d), dtype = out.shape, out.dtype
    where, rows, _held = slot_arguments(indices, crow, features)
    if values.shape != indices.shape or grad.shape != (rows, d):
        raise ValueError(f"values {list(values.shape)}, indices {list(indices.shape)}, grad {list(grad.shape)} for out {list(out.shape)}")
    expect(dtype, values, grad)
    values, grad = values.contiguous(), grad.contiguous()
    arguments = where, DTYPES[dtype], values.data_ptr(), grad.data_ptr(), (out.data_ptr(), *out.stride(), d)
    call("decode_dweight", *arguments, slots=(indices, crow, features))
