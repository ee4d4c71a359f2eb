"""Steps that are not finite: when a step is one, and the words for where it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

POLICIES = ("raise", "skip")


def policy(op: str, value: Any) -> str:
    if value not in POLICIES:
        raise ValueError(f"{op}: on_nonfinite must be 'raise' or 'skip', got {value!r}")
    return value


def finite(sizes: Sequence[Tensor]) -> Tensor | bool:
    """Whether all of these (norms, at least 0) have a square that float32 holds with room to spare, which Adam's second moment needs; of
    float64 alike. On a GPU ``[]``, which nobody has waited for."""
    narrow = any(size.dtype is torch.float32 for size in sizes)
    most = 2.0**60 if narrow else 2.0**508
    if all(size.device.type == "cpu" for size in sizes):
        return all(float(size) < most for size in sizes)
    kind = torch.float32 if narrow else torch.float64
    return (torch.stack([size.to(sizes[0].device, kind) for size in sizes]) < most).all()


def spoilt(parameters: Mapping[str, Tensor]) -> str | None:
    """Which parameter is not finite, and where first."""
    bad = ((name, (~p.isfinite()).nonzero()) for name, p in parameters.items())
    return next((f"the parameter {name} is not finite already, first at {at[0].tolist()}" for name, at in bad if len(at)), None)


def bad_row(x: Tensor | None, target: Tensor | None, mask: Tensor | None) -> str | None:
    """Which row that counts is not finite."""
    for name, rows in (("x", x), ("target", target)):
        if rows is not None and rows.dim():
            bad = ~rows.isfinite().all(-1)
            bad = bad if mask is None or mask.dim() == bad.dim() else bad.any(-1)  # of several layers
            at = (bad if mask is None else bad & (mask != 0)).nonzero()
            if len(at):
                where = int(at[0]) if at.shape[1] == 1 else at[0].tolist()
                return f"{name} is not finite in row {where} of the batch" + (f" and in {len(at) - 1} more" if len(at) > 1 else "")
    return None


def culprit(parameters: Mapping[str, Tensor], x: Tensor | None = None, target: Tensor | None = None, mask: Tensor | None = None) -> str:
    """What of these is not finite, and where first. Waits for a device."""
    if (reason := spoilt(parameters) or bad_row(x, target, mask)) is not None:
        return reason
    largest = "" if x is None or not x.numel() else f" (the largest magnitude in x is {float(x.abs().max()):.3g})"
    return f"parameters and inputs are finite: the loss, or the square of a gradient, overflows{largest}"
