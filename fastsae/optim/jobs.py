"""What an optimiser's step is made of: the parameters by name, and for each a job of checked views and a gradient of any kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastsae._core import checks
from fastsae._core.finite import finite
from fastsae._core.world import World, tree
from fastsae.gradients import TiledGradient, norm
from fastsae.latents import Slots
from fastsae.ops.adam import GRAD_SQUARES, checked_gradient

TILE = 1 << 21  # elements of a TiledGradient that exist at a time

Pieces = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # grad, values, indices, crow


def rows_at_a_time(width: int) -> int:
    """Rows of a TiledGradient that exist at a time."""
    return max(1, TILE // max(width, 1))


@dataclass(frozen=True)
class Job:
    """One parameter of one step, or a member's part of it, checked: ``[rows, D]`` views (the weights first) and the gradient."""

    op: str
    name: str
    views: tuple[Tensor, ...]
    gradient: TiledGradient | Pieces
    unit: bool
    member: int = 0
    vector: bool = False

    def size(self) -> Tensor:
        """``[]``: at least the gradient's norm."""
        if isinstance(self.gradient, TiledGradient):
            known = self.gradient.size
            return torch.stack(self.squares()).sum().sqrt() if known is None else known
        grad, values, *_ = self.gradient
        return norm(grad) if values is None else norm(values) * norm(grad)

    def sizes(self, cuts: Sequence[int]) -> list[Tensor]:
        """``size`` of each range of features."""
        whole = self.gradient
        if isinstance(whole, TiledGradient) or whole[1] is None or whole[2] is None:
            return [part.size() for part in self.parts(cuts)]
        ends = torch.tensor(cuts[1:-1], dtype=torch.int64, device=whole[1].device)
        place = torch.bucketize(whole[2].flatten(), ends, right=True)
        sums = whole[1].new_zeros(len(cuts) - 1, dtype=torch.float64)
        sums.index_add_(0, place, whole[1].flatten().double().square())
        return [*(sums.sqrt().to(torch.float32) * norm(whole[0]))]

    def squares(self) -> list[Tensor]:
        """Sums of the squares of the gradient's elements, by ranges."""
        return [GRAD_SQUARES(views[0], *tile, self.unit) for views, tile in self.tiles()]

    def parts(self, cuts: Sequence[int]) -> Iterator[Job]:
        """The same of ranges of features, which are the rows of a matrix and the elements of a vector."""
        whole = self.gradient
        by = None
        if not isinstance(whole, TiledGradient) and whole[1] is not None and whole[2] is not None:
            by = Slots(*whole[1:]).by_range(cuts)  # pyright: ignore[reportArgumentType] # neither is None
        for number, (start, stop) in enumerate(pairwise(cuts)):
            cut: Any = (slice(None), slice(start, stop)) if self.vector else slice(start, stop)
            if isinstance(whole, TiledGradient):
                gradient = TiledGradient(partial(_shifted, whole.compute, start), stop - start)
            elif by is None or by.crow is None:
                gradient = whole[0][cut], None, None, None
            else:
                rows = len(whole[0])
                crow = by.crow[number * rows : (number + 1) * rows + 1]
                mine = slice(int(crow[0]), int(crow[-1]))
                gradient = whole[0], by.values[mine], by.indices[mine] - start, crow - crow[0]
            yield replace(self, views=tuple(view[cut] for view in self.views), gradient=gradient)

    def tiles(self) -> Iterator[tuple[tuple[Tensor, ...], Pieces]]:
        """Ranges of rows of the views, and the gradient of each."""
        W = self.views[0]
        if not isinstance(self.gradient, TiledGradient):
            yield self.views, self.gradient
            return
        height = rows_at_a_time(W.shape[1])
        height = max(height - height % self.gradient.block, self.gradient.block)
        for start in range(0, W.shape[0], height):
            part = slice(start, min(start + height, W.shape[0]))
            tile = self.gradient.compute(part).to(W.dtype)  # of autocast: narrower
            yield tuple(view[part] for view in self.views), checked_gradient(self.op, f"gradient of {self.name}", tile, W[part])


def _shifted(compute: Callable[[slice], Tensor], by: int, rows: slice) -> Tensor:
    return compute(slice(rows.start + by, rows.stop + by))


def by_shard(jobs: Sequence[Job], world: World) -> tuple[list[list[Job]], list[Job]]:
    """The jobs of each virtual shard of this process, and those of what all processes hold; all of them where features are not sharded."""
    if world.virtual == 1:
        return [], [*jobs]
    own, shared = ([job for job in jobs if world.whole(job.name) is whole] for whole in (False, True))
    return [list(parts) for parts in zip(*(job.parts(world.cuts) for job in own))], shared


def squares(jobs: Sequence[Job], world: World) -> list[Tensor]:
    """Whose sum is the square of the whole gradient's norm, also of what other processes hold."""
    shards, shared = by_shard(jobs, world)
    parts = [world.tree(torch.stack([tree(torch.stack([s for job in each for s in job.squares()])) for each in shards]))] if shards else []
    return parts + [s for job in shared for s in job.squares()]


def sizes(jobs: Sequence[Job], world: World) -> list[Tensor]:
    """The size of each job; where features are sharded of its part of each virtual shard, so that a bound on them is everybody's."""
    found = [job.size() for job in jobs]
    if world.virtual == 1 or finite([2 * size for size in found]) is True:  # then those of its parts are, too
        return found
    return [s for size, job in zip(found, jobs) for s in ([size] if world.whole(job.name) else job.sizes(world.cuts))]


def checked(op: str, what: str, gradient: Any, W: Tensor) -> TiledGradient | Pieces:
    """The gradient of one matrix."""
    if isinstance(gradient, TiledGradient):
        if gradient.n_features != W.shape[0]:
            raise ValueError(f"{op}: {what}.n_features must be the {W.shape[0]} rows of the weights, got {gradient.n_features}")
        return gradient
    if isinstance(gradient, Tensor):
        gradient = gradient.reshape(W.shape)
        if gradient.dtype is not W.dtype:  # of half precision: widened a range at a time
            return TiledGradient(gradient.__getitem__, W.shape[0], size=norm(gradient))
        return gradient, None, None, None
    return checked_gradient(op, what, gradient, W)


def matrix(p: Tensor) -> Tensor:
    """``[rows, D]`` on the same memory; a vector or number is one row."""
    return p.detach().flatten(0, -2) if p.dim() > 1 else p.detach().view(1, p.numel())


def sae_in(op: str, module: nn.Module) -> tuple[str, nn.Module]:
    """(prefix of its names, the one SAE) that a module is or holds, as torch.compile's, DataParallel's or one's own does; the module itself
    where it holds none. ValueError: several."""
    if hasattr(type(module), "step_gradients"):
        return "", module
    found = {name: part for name, part in module.named_modules() if hasattr(type(part), "step_gradients")}
    found = {name: part for name, part in found.items() if not any(name.startswith(f"{outer}.") for outer in found)}  # not a CLT's layers
    if len(found) > 1:
        raise ValueError(f"{op}: {type(module).__name__} must hold one SAE, got {', '.join(found)}: each needs an optimiser of its own")
    return next(((f"{name}.", part) for name, part in found.items()), ("", module))


def unwrapped(op: str, params: Any) -> tuple[Any, list[str]]:
    """(what parameters are taken from: past a wrapper that adds none to an SAE's; names of those with unit rows)."""
    if not isinstance(params, nn.Module):
        return params, []
    prefix, inner = sae_in(op, params)
    if len(list(inner.parameters())) == len(list(params.parameters())):
        prefix, params = "", inner
    return params, [prefix + name for name in getattr(inner, "unit_rows", ())]


def named_parameters(op: str, params: Any) -> dict[str, Tensor]:
    """Checked parameters by name."""
    if isinstance(params, Mapping) or not isinstance(params, (nn.Module, Iterable)):
        raise TypeError(f"{op}: params must be a module or named parameters, got {type(params).__name__}")
    parameters: dict[str, Tensor] = {}
    for entry in params.named_parameters() if isinstance(params, nn.Module) else params:
        if not isinstance(entry, tuple) or len(entry) != 2 or not isinstance(entry[0], str):
            raise TypeError(f"{op}: params must be a module or pairs of name and parameter, got {type(entry).__name__}")
        name, p = entry
        checks.tensor(op, name, p)
        if name in parameters:
            raise ValueError(f"{op}: {name!r} is given twice")
        if other := next((known for known, q in parameters.items() if q is p), None):
            raise ValueError(f"{op}: {name!r} and {other!r} are the same parameter")
        if p.dim() != 2 and not p.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous or a matrix, got {list(p.shape)} with strides {list(p.stride())}")
        checks.writable(op, name, p)
        parameters[name] = p
    if not parameters:
        raise ValueError(f"{op}: there are no parameters")
    return parameters
