"""One step of exact dense Adam on a weight matrix whose gradient need not exist as a matrix.

Two operations carry it. The gradient is ``grad [F, D]`` itself, or comes from slots: ``values``, ``indices`` and ``crow`` as in decode
with ``grad [rows, D]``, and row f is then what decode_dweight writes there: the sum of ``value * grad[row]`` over the slots of f.

    grad_squares   sum of g^2, the square of the norm that a gradient is clipped by
    adam           one pass over W and its moments, in this order for every feature (row) f:

        g = row f of the gradient
        g = g - <g, W[f]> W[f]                            with ``project``, for rows of norm 1
        g = factor * g                                    clipping by the global norm: a tensor, so that nobody waits for it
        W[f] = (1 - lr * weight_decay) W[f]               decoupled, as AdamW
        m[f] = beta1 m[f] + (1 - beta1) g
        v[f] = beta2 v[f] + (1 - beta2) g^2
        W[f] = W[f] - lr / (1 - beta1^step) * m[f] / (sqrt(v[f]) / sqrt(1 - beta2^step) + eps)
        W[f] = W[f] / |W[f]|                              with ``normalise``, unless |W[f]| < 1e-8

``corrections [2]``, in W's dtype, are ``lr / (1 - beta1^step)`` and ``sqrt(1 - beta2^step)`` where the host has no ``step``: in a
CUDA graph. A factor that is NaN leaves W, m and v as they are: a step that shall not be taken, known to the device alone.

A feature without slots has g = 0: its moments decay and it moves all the same, which is what makes this Adam the dense one (Kingma and Ba
2015, arXiv 1412.6980; decay after Loshchilov and Hutter 2019, arXiv 1711.05101). Sums are in float32 (float64 stays).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from fastsae._core import checks, seeds
from fastsae.dispatch import Op, preference
from fastsae.gradients import RowGradient
from fastsae.latents import Slots
from fastsae.ops.decode import decode_reference, latent_samples, transposed
from fastsae.reference import chunks, drawn, triton_refuses

DTYPES = (torch.float32, torch.float64)
"""Of weights and moments. Half precision would lose most updates: keep float32 weights and cast them where they are used."""

# ---------------------------------------------------------------- reference


def gradient_tiles(
    W: Tensor, grad: Tensor, values: Tensor | None, indices: Tensor | None, crow: Tensor | None, project: bool, sign: int = -1
) -> Iterator[tuple[slice, Tensor]]:
    """Ranges of features with their rows of the gradient; ``sign`` 1 adds magnitudes up where the projection subtracts."""
    features, width = W.shape
    slots = None if values is None or indices is None else transposed(Slots(values, indices, crow), features)
    for part in chunks(features, width):
        touched = None
        if slots is None or slots.crow is None:
            g = grad[part]
        else:
            bounds = slots.crow[part.start : part.stop + 1]
            mine = slice(int(bounds[0]), int(bounds[-1]))
            g = decode_reference(slots.values[mine], slots.indices[mine], bounds - bounds[0], grad, None)
            touched = (bounds.diff() > 0).unsqueeze(1)
        if project:
            along = (g * W[part]).sum(1, keepdim=True)
            projected = torch.addcmul(g, along, W[part], value=sign)
            g = projected if touched is None else torch.where(touched, projected, g)
        yield part, g


def _move(
    W: Tensor, m: Tensor, v: Tensor, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int, normalise: bool,
    corrections: Tensor | None = None,
) -> None:  # fmt: skip
    """The weights' part of a step, given their new moments."""
    W.mul_(1 - lr * weight_decay)
    if corrections is None:
        W.addcdiv_(m, v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps), value=-lr / (1 - beta1**step))
    else:
        move, root = corrections
        W.sub_(move * m / (v.sqrt() / root + eps))
    if normalise:
        normalise_rows(W)


def bias_corrections(step: Tensor, lr: float, beta1: float, beta2: float) -> Tensor:
    """``[2]`` float64, for the number ``step []`` (float64) of a step that the device counts."""
    return torch.stack([lr / (1 - beta1**step), (1 - beta2**step).sqrt()])


def normalise_rows(W: Tensor) -> Tensor:
    """Rows of norm 1, in place; those shorter than 1e-8 stay."""
    norm = torch.linalg.vector_norm(W, dim=1, keepdim=True)
    return W.div_(torch.where(norm < 1e-8, 1.0, norm))


@contextlib.contextmanager
def kept_if_nan(factor: Tensor | None, *written: Tensor) -> Generator[None, None, None]:
    """What is written inside is undone where ``factor`` is NaN, without a look at it."""
    before = [] if factor is None else [t.clone() for t in written]
    yield
    for t, old in zip(written, before):
        t.copy_(torch.where(factor.isnan(), old, t))  # pyright: ignore[reportOptionalMemberAccess]


def adam_reference(
    W: Tensor, m: Tensor, v: Tensor,
    grad: Tensor, values: Tensor | None, indices: Tensor | None, crow: Tensor | None, factor: Tensor | None,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int, project: bool, normalise: bool,
    corrections: Tensor | None = None,
) -> None:  # fmt: skip
    for part, g in gradient_tiles(W, grad, values, indices, crow, project):
        g = g if factor is None else g * factor
        with kept_if_nan(factor, W[part], m[part], v[part]):
            m[part].lerp_(g, 1 - beta1)
            v[part].mul_(beta2).addcmul_(g, g, value=1 - beta2)
            _move(W[part], m[part], v[part], lr, beta1, beta2, eps, weight_decay, step, normalise, corrections)


def grad_squares_reference(
    W: Tensor, grad: Tensor, values: Tensor | None, indices: Tensor | None, crow: Tensor | None, project: bool
) -> Tensor:
    parts = [g.square().sum(1) for _, g in gradient_tiles(W, grad, values, indices, crow, project)]
    return torch.cat([W.new_zeros(1), *parts]).sum()


# ---------------------------------------------------------------- samples and checks


def matrix_samples(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator, features: int, width: int, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """W of unit rows but one of zeros, m, v; row-major or transposed views."""

    def normal() -> Tensor:
        draw = drawn(device, dtype, generator)
        return draw(width, features).T if transposed else draw(features, width)

    W, m, v = normal(), normal(), normal()
    W /= torch.linalg.vector_norm(W, dim=1, keepdim=True).clamp_min_(1e-3)
    if features > 1:
        W[0] = m[0] = 0
    return W, m * 0.1, v.square_()


def adam_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    settings = (  # lr, beta1, beta2, eps, weight_decay, step
        (1e-3, 0.9, 0.999, 1e-8, 0.0, 1),
        (3e-2, 0.5, 0.99, 1e-6, 0.3, 7),
        (1e-3, 0.0, 0.9999, 1e-8, 0.01, 100_000),
    )
    number = 0
    for values, indices, crow, features, width in latent_samples(device, dtype, generator):
        rows = values.shape[0] if crow is None else crow.shape[0] - 1
        normal = drawn(device, dtype, generator)
        grad, dense = normal(rows, width), normal(features, width)
        for given in ((grad, values, indices, crow), (dense, None, None, None)):
            for project, normalise in ((False, False), (True, True), (True, False), (False, True)):
                number += 1
                matrices = matrix_samples(device, dtype, generator, features, width, transposed=number % 5 == 0)
                factor = None if number % 3 else seeds.uniform(generator, ()).to(device=device, dtype=dtype)
                factor = factor if number % 12 or factor is None else factor * torch.nan
                yield *matrices, *given, factor, *settings[number % len(settings)], project, normalise


def _grad_squares_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for W, _, _, grad, values, indices, crow, *_, project, normalise in adam_samples(device, dtype, generator):
        if not normalise:
            yield W, grad, values, indices, crow, project


def size_of_gradient(args: tuple[Any, ...]) -> Tensor:
    """``sum |terms|`` of every element of the gradient."""
    W, grad, values, indices, crow, project = args
    W, grad, values = (None if t is None else t.double().abs() for t in (W, grad, values))
    tiles = gradient_tiles(W, grad, values, indices, crow, project, sign=1)  # pyright: ignore[reportArgumentType]
    return torch.cat([W.new_zeros(0, W.shape[1]), *(g for _, g in tiles)])  # pyright: ignore[reportOptionalMemberAccess]


def doubled(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)


def _copies(args: tuple[Any, ...]) -> list[Any]:
    return [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]


def _check_adam(testing: Any, args: tuple[Any, ...], result: tuple[Tensor, Tensor, Tensor]) -> float:
    """Moments against float64; then the weights against those that float64 makes of the result's own moments.

    In two stages, because a step is ill-conditioned: where a gradient cancels to nothing, ``m / sqrt(v)`` is the sign of its rounding.
    """
    W, m, v, grad, values, indices, crow, factor, lr, beta1, beta2, eps, weight_decay, step, project, normalise, *corrections = args
    if factor is not None and bool(factor.isnan()):
        return check_kept(testing, (W, m, v), result)
    exact, plain = map(_copies, (doubled(args), args))
    adam_reference(*exact)
    adam_reference(*plain)
    size = size_of_gradient((W, grad, values, indices, crow, project)) * (1 if factor is None else factor.double().abs())
    old, tiny = m.double().abs(), 8 * torch.finfo(W.dtype).tiny  # each rounding of a step may be one of denormals
    new_W, new_m, new_v = result
    error = testing.check_values(new_m, exact[1], plain[1], old + (1 - beta1) * (size + old) + tiny)
    error = max(error, testing.check_values(new_v, exact[2], plain[2], v.double() + (1 - beta2) * size.square() + tiny))

    def moved(dtype: torch.dtype, normalise: bool) -> Tensor:
        w = W.to(dtype).clone()
        _move(w, new_m.to(dtype), new_v.to(dtype), lr, beta1, beta2, eps, weight_decay, step, normalise, *corrections)
        return w

    free = moved(torch.float64, False)
    size = W.double().abs() + (free - W).abs() + tiny
    if normalise:
        norm = torch.linalg.vector_norm(free, dim=1, keepdim=True)
        size = size / torch.where(norm < 1e-8, 1.0, norm)
    return max(error, testing.check_values(new_W, moved(torch.float64, normalise), moved(W.dtype, normalise), size))


def check_kept(testing: Any, args: tuple[Tensor, ...], result: tuple[Tensor, ...]) -> float:
    """A step whose factor is NaN has written nothing."""
    if not all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(args, result, strict=True)):
        raise testing.Mismatch("a factor that is NaN must leave everything as it is")
    return 0.0


def _check_grad_squares(testing: Any, args: tuple[Any, ...], result: Tensor) -> float:
    exact, plain = grad_squares_reference(*doubled(args)), grad_squares_reference(*args)
    return testing.check_values(result, exact, plain, size_of_gradient(args).square().sum())


def workload(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    values = drawn(device, dtype, generator)(256, 32)
    indices = torch.randint(0, 16384, (256, 32), generator=generator, device="cpu").to(device)
    W, m, v = matrix_samples(device, dtype, generator, 16384, 512, False)
    return W, m, v, values @ W[:32], values, indices, None, None, 1e-3, 0.9, 0.999, 1e-8, 0.0, 10, False, False


# ---------------------------------------------------------------- rows


def matrices_refused(matrices: tuple[tuple[str, Tensor], ...]) -> str | None:
    """Why a Triton program cannot hold rows of these weights and their state, or None."""
    for name, matrix in matrices:
        if not matrix.is_contiguous():
            return f"{name} is not contiguous (supported: row-major weights and moments)"
        if matrix.shape[1] > 8192:
            return f"rows of {matrix.shape[1]} (supported: at most 8192)"
    return None


def triton_refuses_adam(W: Tensor, m: Tensor, v: Tensor, *rest: Any) -> str | None:
    return matrices_refused((("W", W), ("m", m), ("v", v))) or triton_refuses(W, m, v, *rest)


def triton_refuses_grad_squares(W: Tensor, *rest: Any) -> str | None:
    return triton_refuses_adam(W, W, W, *rest)


ADAM = Op(
    "adam(Tensor(a!) W, Tensor(b!) m, Tensor(c!) v, Tensor grad, Tensor? values, Tensor? indices, Tensor? crow, Tensor? factor, float lr, "
    "float beta1, float beta2, float eps, float weight_decay, int step, bool project, bool normalise, "
    "Tensor? corrections=None) -> ()",
    adam_reference,
    fake=lambda *args: None,
    samples=adam_samples,
    check=_check_adam,  # pyright: ignore[reportArgumentType]
    workload=workload,
    mutates=(0, 1, 2),
    dtypes=DTYPES,
)
GRAD_SQUARES = Op(
    "grad_squares(Tensor W, Tensor grad, Tensor? values, Tensor? indices, Tensor? crow, bool project) -> Tensor",
    grad_squares_reference,
    fake=lambda W, *args: W.new_empty(()),
    samples=_grad_squares_samples,
    check=_check_grad_squares,
    workload=lambda *args: (lambda W, m, v, grad, values, indices, *_: (W, grad, values, indices, None, True))(*workload(*args)),
    dtypes=DTYPES,
)
for _op in (ADAM, GRAD_SQUARES):
    _op.row("cpu", f"fastsae.native.adam:{_op.name}", f"fastsae.native.adam:refuses_{_op.name}")
    _op.row("triton", f"fastsae.kernels.adam:{_op.name}", f"fastsae.ops.adam:triton_refuses_{_op.name}")

# ---------------------------------------------------------------- public


def checked_gradient(op: str, name: str, gradient: Any, W: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``(grad, values, indices, crow)`` of a dense gradient or a ``RowGradient`` of ``W [F, D]``, all of W's dtype."""
    features, width = W.shape
    if not isinstance(gradient, RowGradient):
        if not isinstance(gradient, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor or a RowGradient, got {type(gradient).__name__}")
        checks.tensor(op, name, gradient, (W.dtype,), W)
        checks.shape(op, name, gradient, (features, width), f"[F={features}, D={width}]")
        return gradient, None, None, None
    narrower = tuple(dtype for dtype in checks.FLOATS if torch.promote_types(dtype, W.dtype) == W.dtype)
    values = checks.tensor(op, f"{name}.values", gradient.values, narrower, W)
    indices = checks.tensor(op, f"{name}.indices", gradient.indices, checks.INDICES, W)
    rows = checks.tensor(op, f"{name}.rows", gradient.rows, narrower, W)
    if gradient.n_features != features:
        raise ValueError(f"{op}: {name}.n_features must be the {features} rows of the weights, got {gradient.n_features}")
    checks.shape(op, f"{name}.rows", rows, (None, width), f"[n, D={width}]")
    n = rows.shape[0]
    if gradient.crow is None:
        checks.shape(op, f"{name}.values", values, (n, None), f"[n={n}, K]")
    else:
        crow = checks.tensor(op, f"{name}.crow", gradient.crow, (torch.int64,), W)
        checks.shape(op, f"{name}.crow", crow, (n + 1,), f"[n + 1 = {n + 1}]")
        checks.shape(op, f"{name}.values", values, (None,), "[nnz]")
    checks.shape(op, f"{name}.indices", indices, tuple(values.shape), f"of values {list(values.shape)}")
    return rows.to(W.dtype), values.to(W.dtype), indices, gradient.crow


@torch.no_grad()
def adam_(
    W: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor | RowGradient,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    factor: Tensor | None = None,
    project: bool = False,
    normalise: bool = False,
    backend: str | None = None,
) -> None:
    """One step of Adam (AdamW with ``weight_decay``) in place, in one pass and without a dense gradient. ``fastsae.optim.Adam`` calls it.

    Args:
        W, exp_avg, exp_avg_sq: ``[F, D]``, float32 or float64, written. The C++ row takes float32 rows, or three transposed
            views of the same strides (``[D, F]`` parameters), to the same bits; the Triton row contiguous ones.
        gradient: ``[F, D]``, or a ``RowGradient`` of F features whose values and rows have W's dtype or a narrower one.
        step: number of this step, 1 for the first.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``; results agree with it to rounding.
        factor: ``[]``, dtype of W: multiplies the gradient, after the projection; NaN: nothing is written.
        project: remove from the gradient of each row its component along the row (of norm 1).
        normalise: scale each row to norm 1 afterwards; rows shorter than 1e-8 stay.

    Raises:
        TypeError, ValueError: dtype, device, shape, range. IndexError: an index outside ``0 .. F - 1``; nothing has been written then.

    Memory beyond the arguments: 32 bytes a slot and a feature, one row a thread (transposed: 514 KiB; with ``project`` or
    ``normalise`` 1 KiB * D); in the Triton row about 60 bytes a slot, and a row of float32 for every 128 slots.
    Deterministic, whatever the number of threads.
    """
    op = "adam_"
    checks.tensor(op, "W", W, DTYPES)
    checks.shape(op, "W", W, (None, None), "[F, D]")
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        checks.tensor(op, name, moment, (W.dtype,), W)
        checks.shape(op, name, moment, tuple(W.shape), f"[F={W.shape[0]}, D={W.shape[1]}]")
    for name, written in (("W", W), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        checks.writable(op, name, written)
    grad, values, indices, crow = checked_gradient(op, "gradient", gradient, W)
    step = checks.integer(op, "step", step, 1)
    checked_options(op, lr, betas, eps, weight_decay)
    if factor is not None:
        checks.tensor(op, "factor", factor, (W.dtype,), W)
        checks.shape(op, "factor", factor, (), "[]")
    checks.flag(op, "project", project)
    checks.flag(op, "normalise", normalise)
    options = (float(lr), float(betas[0]), float(betas[1]), float(eps), float(weight_decay), step, project, normalise)
    ADAM(W, exp_avg, exp_avg_sq, grad, values, indices, crow, factor, *options, backend=preference(backend))


def checked_options(op: str, lr: Any, betas: Any, eps: Any, weight_decay: Any) -> None:
    """Numbers from 0, and two betas in ``[0, 1)``."""
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        checks.rate(op, name, value)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{op}: betas must be two numbers, got {betas!r}")
    for beta in betas:
        if not 0 <= checks.number(op, "betas", beta, positive=False) < 1:
            raise ValueError(f"{op}: betas must be at least 0 and below 1, got {betas}")
