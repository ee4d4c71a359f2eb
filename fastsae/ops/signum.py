"""One step of schedule-free sign descent on a weight matrix whose gradient need not exist as a matrix: signum.

The weights are ``y``, where gradients are taken; ``z`` follows the signs, and the average ``x`` of its path lies between the two:
``y = momentum * x + (1 - momentum) * z``. Only y and z are stored. The gradient is that of ``adam``: ``grad [F, D]``, or slots. Per row f:

    g = row f of the gradient
    g = g - <g, y[f]> y[f]                            with ``project``, for rows of norm 1
    x[f] = lerp(y[f], z[f], 1 - 1 / momentum)
    z[f] = z[f] - lr * sign(g)                        sign(0) = sign(NaN) = 0, as torch.sign
    x[f] = lerp(x[f], z[f], share)                    share: the weight of this step in the average
    y[f] = lerp(x[f], z[f], 1 - momentum)
    y[f] = y[f] / |y[f]|                              with ``normalise``, unless |y[f]| < 1e-8

A ``factor []`` that is NaN leaves y and z as they are, as in ``adam``; any other would be positive, and is not used: it changes no sign.

The C++ row takes float32 rows, or two transposed views of the same strides; the Triton row float32, row-major, at most 8192 columns.

Sign descent: Bernstein et al. 2018 (arXiv 1802.04434); schedule-free averaging around it: Defazio et al. 2024 (arXiv 2405.15682).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastsae import reference
from fastsae.dispatch import Op
from fastsae.ops.adam import (
    DTYPES,
    adam_samples,
    check_kept,
    doubled,
    gradient_tiles,
    kept_if_nan,
    matrices_refused,
    normalise_rows,
    size_of_gradient,
)
from fastsae.ops.adam import workload as adam_workload

# ---------------------------------------------------------------- reference


def _move(y: Tensor, z: Tensor, sign: Tensor, lr: float, momentum: float, share: float, normalise: bool) -> None:
    y.lerp_(z, 1 - 1 / momentum)
    z.sub_(sign, alpha=lr)
    y.lerp_(z, share)
    y.lerp_(z, 1 - momentum)
    if normalise:
        normalise_rows(y)


def signum_reference(
    y: Tensor, z: Tensor, grad: Tensor, values: Tensor | None, indices: Tensor | None, crow: Tensor | None,
    lr: float, momentum: float, share: float, project: bool, normalise: bool, factor: Tensor | None = None,
) -> None:  # fmt: skip
    for part, g in gradient_tiles(y, grad, values, indices, crow, project):
        with kept_if_nan(factor, y[part], z[part]):
            _move(y[part], z[part], g.sign(), lr, momentum, share, normalise)


# ---------------------------------------------------------------- samples and checks


def _samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    settings = ((1e-3, 0.95, 1.0), (3e-2, 0.5, 0.25), (1e-4, 1.0, 1e-3), (0.0, 0.9, 0.0))  # lr, momentum, share
    every = adam_samples(device, dtype, generator)
    for number, (W, m, _, grad, values, indices, crow, *_, project, normalise) in enumerate(itertools.islice(every, 0, None, 3)):
        factor = None if number % 4 else torch.full((), 1.0 if number % 8 else torch.nan, device=device, dtype=dtype)
        yield W, W + m, grad, values, indices, crow, *settings[number % len(settings)], project, normalise, factor


def _check(testing: Any, args: tuple[Any, ...], result: tuple[Tensor, Tensor]) -> float:
    """z against the signs of float64, either one where the gradient is within its rounding of 0; then y from the result's own z."""
    y, z, grad, values, indices, crow, lr, momentum, share, project, normalise, *factor = args
    if factor and factor[0] is not None and bool(factor[0].isnan()):
        return check_kept(testing, (y, z), result)
    new_y, new_z = result
    if new_z.shape != z.shape or new_z.dtype != z.dtype:
        raise testing.Mismatch(f"z must stay {list(z.shape)} {z.dtype}, got {list(new_z.shape)} {new_z.dtype}")
    gradient = (y, grad, values, indices, crow, project)
    tiles = gradient_tiles(*doubled(gradient))
    g = torch.cat([y.new_zeros(0, y.shape[1], dtype=torch.float64), *(g for _, g in tiles)])
    terms = y.shape[1] * (2 if project else 1) + (indices.numel() if indices is not None else 0) + 8
    band = size_of_gradient(gradient) * terms * torch.finfo(y.dtype).eps + 8 * torch.finfo(y.dtype).tiny
    rates = [z.double() - lr * sign for sign in (-1.0, 0.0, 1.0)]
    distance = torch.stack([(new_z - rate).abs() for rate in rates])
    ulp = 4 * torch.finfo(y.dtype).eps * (z.double().abs() + lr)
    wanted = g.sign().long() + 1
    off = (distance.gather(0, wanted.unsqueeze(0))[0] > ulp) & ((g.abs() > band) | (distance.amin(0) > ulp)) & g.isfinite()
    if bool(off.any()):
        at = off.nonzero()[0].tolist()
        raise testing.Mismatch(
            f"z{at} = {float(new_z[tuple(at)])}: not {float(z[tuple(at)])} less {lr} times the sign of {float(g[tuple(at)])}"
        )

    def moved(dtype: torch.dtype, normalise: bool) -> Tensor:
        w, end = y.to(dtype).clone(), new_z.to(dtype)
        w.lerp_(z.to(dtype), 1 - 1 / momentum).lerp_(end, share).lerp_(end, 1 - momentum)
        return normalise_rows(w) if normalise else w

    free = moved(torch.float64, False)
    size = (y.double().abs() + z.double().abs()) / momentum + new_z.double().abs()
    if normalise:
        norm = torch.linalg.vector_norm(free, dim=1, keepdim=True)
        size = size / torch.where(norm < 1e-8, 1.0, norm)
    return testing.check_values(new_y, moved(torch.float64, normalise), moved(y.dtype, normalise), size)


def _workload(*where: Any) -> tuple[Any, ...]:
    W, m, _, grad, values, indices, *_ = adam_workload(*where)
    return W, W + m, grad, values, indices, None, 1e-3, 0.95, 0.1, False, False, None


# ---------------------------------------------------------------- rows


def triton_refuses(y: Tensor, z: Tensor, *rest: Any) -> str | None:
    return matrices_refused((("y", y), ("z", z))) or reference.triton_refuses(y, z, *rest)


SIGNUM = Op(
    "signum(Tensor(a!) y, Tensor(b!) z, Tensor grad, Tensor? values, Tensor? indices, Tensor? crow, float lr, float momentum, "
    "float share, bool project, bool normalise, Tensor? factor=None) -> ()",
    signum_reference,
    fake=lambda *args: None,
    samples=_samples,
    check=_check,  # pyright: ignore[reportArgumentType]
    workload=_workload,
    mutates=(0, 1),
    dtypes=DTYPES,
)
SIGNUM.row("cpu", "fastsae.native.signum:signum", "fastsae.native.signum:refuses_signum")
SIGNUM.row("triton", "fastsae.kernels.signum:signum", "fastsae.ops.signum:triton_refuses")
