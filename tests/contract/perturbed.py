"""Arguments of an operation made harder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def perturb(args: tuple[Any, ...], seed: int, keep: tuple[int, ...] = ()) -> tuple[Any, ...]:
    """The same kind of arguments made harder: other strides, ties, zeros, denormals, scaled by powers of two, NaN and infinities.

    Shapes, dtypes and integer arguments stay valid. ``keep`` lists positions of tensors whose contents and strides stay.
    """
    generator = torch.Generator().manual_seed(seed)

    def choose(n: int) -> int:
        return int(torch.randint(0, n, (), generator=generator, device="cpu"))

    changed = []
    for position, arg in enumerate(args):
        if not isinstance(arg, Tensor) or position in keep:
            changed.append(arg)
            continue
        if arg.is_floating_point() and arg.numel():
            arg = _harder(arg.clone(), choose)
        changed.append(_restride(arg, choose(5)))
    return tuple(changed)


def _harder(value: Tensor, choose: Callable[[int], int]) -> Tensor:
    flat = value.reshape(-1)
    kind = choose(10)
    at = choose(flat.shape[0])
    if kind == 0 and value.dim():
        value[choose(value.shape[0])] = value[choose(value.shape[0])].clone()
    elif kind == 1:
        value = value.round()
    elif kind == 2:
        value = value * 2.0 ** (choose(40) - 20) if value.dtype is not torch.float16 else value
    elif kind == 3 and value.dim():
        value[choose(value.shape[0])] = 0
    elif kind == 4:
        flat[at] = torch.finfo(value.dtype).tiny / 4
    elif kind == 5:
        flat[at] = float("nan")
    elif kind == 6:
        flat[at] = float("inf") if choose(2) else -float("inf")
    elif kind == 7:
        value = torch.where(value > 0, value, -0.0)
    return value


def _restride(value: Tensor, kind: int) -> Tensor:
    """The same contents in other strides: as given, transposed storage, every second element of a larger buffer, an offset; or the negative
    in memory, as of ``z.conj().imag``."""
    if kind == 1 and value.dim() == 2:
        return value.T.contiguous().T
    if kind == 2 and value.dim() >= 1:
        wide = value.new_zeros(*value.shape[:-1], 2 * value.shape[-1])
        wide[..., ::2] = value
        return wide[..., ::2]
    if kind == 3 and value.dim() >= 1:
        padded = torch.cat([value.new_zeros(3), value.reshape(-1)])
        return padded[3:].reshape(value.shape)
    if kind == 4 and value.is_floating_point():
        return torch._neg_view(-value)  # pyright: ignore[reportPrivateImportUsage]
    return value
