"""Gradients of a weight matrix that are not stored as a matrix: what the fused optimiser takes in place of a dense ``[F, D]`` tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from fastsae._core import checks
from fastsae.dispatch import OPS, preference, then_any
from fastsae.latents import Slots


@dataclass(frozen=True, eq=False)
class RowGradient:
    """``dW[f] = sum over slots s with feature f of values[s] * rows[r(s)]``, in slot order.

    Attributes:
        values: ``[n, K]``, or ``[nnz]`` with ``crow``. indices: the same shape, int64 or int32 features.
        crow: None, or ``[n + 1]`` int64: slots of row r are ``crow[r] .. crow[r + 1] - 1``.
        rows: ``[n, D]``, one gradient (decoder) or input (encoder) row for each row of slots.
        n_features: F.
    """

    values: Tensor
    indices: Tensor
    crow: Tensor | None
    rows: Tensor
    n_features: int

    @property
    def slots(self) -> Slots:
        return Slots(self.values, self.indices, self.crow)


@dataclass(frozen=True, eq=False)
class TiledGradient:
    """A gradient that is computed a range of features at a time, where latents are dense: ``compute(slice)`` returns ``[len(slice), D]``.

    ``compute`` may be asked for every feature once, in ascending ranges of any size, and at most once more for a norm. Rows that it has
    returned may be changed in the weight before the next call, also before the other weight's gradient is asked for (which then costs
    a copy of those rows until it is; asking for both weights' gradients range by range keeps one range).

    Attributes:
        compute: as above. n_features: F.
        settled: whether it reads no weight but the rows asked for, so that order costs nothing.
        block: ranges begin and end at its multiples: members of a stack, whose bits are those of a range of their own.
        size: ``[]``, at least its Frobenius norm (a bound that costs little), or None: an optimiser then computes it once more.
    """

    compute: Callable[[slice], Tensor]
    n_features: int
    settled: bool = False
    block: int = 1
    size: Tensor | None = None


@dataclass(frozen=True, eq=False)
class StackedGradient:
    """The gradient of a stack ``[E, F, D]`` of matrices, by member: ``part(e)`` is that of member e, of any kind but this one.

    ``joint`` is the same for the stack as one matrix ``[E * F, D]``, where there is such: for an optimiser that treats all members alike.
    """

    n: int
    part: Callable[[int], Gradient]
    joint: Gradient | None = None


Gradient = Tensor | RowGradient | TiledGradient | StackedGradient


def size(gradient: Tensor | RowGradient | TiledGradient) -> Tensor | None:
    """``[]``: at least the Frobenius norm, from what there is: of slots ``|values| |rows|`` (Cauchy and Schwarz, for features that differ
    within a row of slots). NaN and infinities show in it, and nothing is waited for."""
    if isinstance(gradient, TiledGradient):
        return gradient.size
    if isinstance(gradient, RowGradient):
        return norm(gradient.values) * norm(gradient.rows)
    return norm(gradient)


def norm(t: Tensor) -> Tensor:
    """``[]``: of all elements, in float32 or wider."""
    return torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32))


def accumulate(steps: Sequence[Mapping[str, Gradient]], weights: Sequence[float] | None = None) -> dict[str, Gradient]:
    """The sum of the gradients of several micro-batches, each ``{parameter: gradient}`` as ``SAE.step_gradients`` returns them.

    Slots are concatenated and their rows stacked, dense tensors added; nothing of the size of a weight is formed.

    Args:
        steps: gradients with the same names, taken at the same weights.
        weights: factor of each (``1 / n`` for the mean of n equal micro-batches); default 1.

    Raises: ValueError where names or numbers differ, or nothing is given.
    """
    if not steps or any(set(step) != set(steps[0]) for step in steps):
        raise ValueError(f"accumulate: steps must hold gradients of the same parameters, got {[sorted(step) for step in steps]}")
    if weights is not None:
        if len(weights) != len(steps):
            raise ValueError(f"accumulate: weights must be {len(steps)} numbers, one a step, got {len(weights)}")
        weights = [w if isinstance(w, Tensor) else checks.number("accumulate", "weights", w, positive=False) for w in weights]
        steps = [{name: _scaled(gradient, weight) for name, gradient in step.items()} for step, weight in zip(steps, weights)]
    return {name: total([step[name] for step in steps]) for name in steps[0]}


def total(gradients: Sequence[Gradient]) -> Gradient:
    """The sum of gradients of one parameter; sets of slots stay one set of slots, different kinds become tiles."""
    if all(isinstance(gradient, Tensor) for gradient in gradients):
        return sum(gradients[1:], gradients[0])  # pyright: ignore[reportArgumentType, reportCallIssue, reportReturnType, reportOperatorIssue]
    if all(isinstance(gradient, StackedGradient) for gradient in gradients):
        return StackedGradient(gradients[0].n, lambda e: total([gradient.part(e) for gradient in gradients]))  # pyright: ignore[reportAttributeAccessIssue]
    slots = [gradient for gradient in gradients if isinstance(gradient, RowGradient)]
    gradients = [*([reduce(_joined, slots)] if slots else []), *(part for part in gradients if not isinstance(part, RowGradient))]
    if len(gradients) == 1:
        return gradients[0]
    tiles = [_tile(gradient) for gradient in gradients]
    n_features = next(gradient.n_features for gradient in gradients if isinstance(gradient, (RowGradient, TiledGradient)))
    sizes = [size(gradient) for gradient in gradients]  # pyright: ignore[reportArgumentType]
    known = None if any(part is None for part in sizes) else torch.stack(sizes).sum()  # pyright: ignore[reportArgumentType]
    return TiledGradient(lambda part: sum((tile(part) for tile in tiles[1:]), tiles[0](part)), n_features, size=known)


def densify(gradient: Gradient) -> Tensor:
    """The gradient as a tensor ``[F, D]``: for tests, and for optimisers that know no other kind."""
    if isinstance(gradient, RowGradient):
        out = gradient.rows.new_empty(gradient.n_features, gradient.rows.shape[1])
        _run("decode_dweight", *gradient.slots, gradient.rows, out)
        return out
    if isinstance(gradient, StackedGradient):
        return torch.stack([densify(gradient.part(e)) for e in range(gradient.n)])
    return gradient.compute(slice(0, gradient.n_features)) if isinstance(gradient, TiledGradient) else gradient


def _scaled(gradient: Gradient, weight: float) -> Gradient:
    if isinstance(gradient, RowGradient):
        return replace(gradient, values=gradient.values * weight)
    if isinstance(gradient, TiledGradient):
        known = None if gradient.size is None else gradient.size * abs(weight)
        return replace(gradient, compute=lambda part: gradient.compute(part) * weight, size=known)
    if isinstance(gradient, StackedGradient):
        return StackedGradient(gradient.n, lambda e: _scaled(gradient.part(e), weight))
    return gradient * weight


def _joined(a: RowGradient, b: RowGradient) -> RowGradient:
    fixed = a.crow is None and b.crow is None
    indices = (a.indices, b.indices) if a.indices.dtype is b.indices.dtype else (a.indices.long(), b.indices.long())
    if fixed and a.rows is b.rows:
        return replace(a, values=torch.cat([a.values, b.values], 1), indices=torch.cat(indices, 1))
    rows = torch.cat([a.rows, b.rows])
    if fixed and a.values.shape[1] == b.values.shape[1]:
        return RowGradient(torch.cat([a.values, b.values]), torch.cat(indices), None, rows, a.n_features)
    first, second = a.slots.flat(), b.slots.flat()
    assert first.crow is not None and second.crow is not None
    crow = torch.cat([first.crow, second.crow[1:] + a.values.numel()])
    return RowGradient(torch.cat([first.values, second.values]), torch.cat([i.reshape(-1) for i in indices]), crow, rows, a.n_features)


def _run(operation: str, *args: Tensor | None) -> Tensor:
    """An operation by its name in the table: operations take these gradients, so that this module stands below them."""
    return OPS[operation](*args, backend=then_any(preference(None)))


def _tile(gradient: Gradient) -> Callable[[slice], Tensor]:
    """``compute`` of any gradient; of slots through their transpose, sorted by feature at the first call."""
    if isinstance(gradient, TiledGradient):
        return gradient.compute
    if isinstance(gradient, Tensor):
        return lambda part: gradient[part]
    assert isinstance(gradient, RowGradient)
    transposed: list[Slots] = []

    def compute(part: slice) -> Tensor:
        if not transposed:
            slots = gradient.slots
            transposed.append(slots._replace(indices=slots.indices.long()).by_feature(gradient.n_features))
        values, rows, crow = transposed[0]
        assert crow is not None
        start, stop, _ = part.indices(gradient.n_features)
        mine = slice(int(crow[start]), int(crow[stop]))
        return _run("decode", values[mine], rows[mine], crow[start : stop + 1] - mine.start, gradient.rows, None)

    return compute
