"""What a training loop takes: batches of rows, their columns by role, which of the rows count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastsae._core import checks
from fastsae._core.seeds import stream_seed
from fastsae.reference import accumulator


class Batches:
    """Endless batches of stored activations in a seeded order, whose position a checkpoint keeps.

    Args:
        x: ``[n, D]``. target: ``[n, d_out]``. mask: ``[n]``, bool or 0 and 1. size: rows a batch, at most n.
        seed: of the order; every pass has another one. The rows left over at the end of a pass are dropped.

    ``load_state_dict`` takes the seed and the position over; ValueError where the number of rows or the size is another, whose batches
    would not be those that the state goes on with.
    """

    def __init__(self, x: Tensor, target: Tensor | None = None, mask: Tensor | None = None, *, size: int, seed: int = 0):
        given: dict[str, Any] = {"x": x, "target": target, "mask": mask}
        given = {name: column for name, column in given.items() if column is not None}
        for name, column in given.items():
            if not isinstance(column, Tensor) or column.dim() == 0:
                got = list(column.shape) if isinstance(column, Tensor) else type(column).__name__
                raise TypeError(f"Batches: {name} must be a tensor of rows, got {got}")
            if column.dim() > 2:
                raise ValueError(
                    f"Batches: {name} must have shape [n, D], got {list(column.shape)}: {name}.flatten(0, -2) has a row a position"
                )
        self.columns: dict[str, Tensor] = given
        size = checks.integer("Batches", "size", size, 1, x.shape[0], f"n={x.shape[0]}")
        seed = checks.integer("Batches", "seed", seed, 0)
        if any(column.shape[0] != x.shape[0] for column in self.columns.values()):
            raise ValueError(f"Batches: x, target and mask must have as many rows, got {[c.shape[0] for c in self.columns.values()]}")
        self.size, self.seed, self.pass_number, self.position = size, seed, 0, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        n = self.columns["x"].shape[0]
        while True:
            generator = torch.Generator().manual_seed(stream_seed(self.seed, self.pass_number))
            order = torch.randperm(n, generator=generator, device="cpu").to(self.columns["x"].device)
            while self.position + self.size <= n:
                rows = order[self.position : self.position + self.size]
                self.position += self.size
                yield {name: column[rows] for name, column in self.columns.items()}
            self.pass_number, self.position = self.pass_number + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "pass_number": self.pass_number, "position": self.position, **self._order()}

    def _order(self) -> dict[str, int]:
        return {"rows": self.columns["x"].shape[0], "size": self.size}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        if missing := [name for name in ("seed", "pass_number", "position") if name not in state]:
            raise ValueError(f"Batches.load_state_dict: the state holds no {missing[0]!r}")
        for name, ours in self._order().items():
            if state.get(name, ours) != ours:
                raise ValueError(f"Batches.load_state_dict: {name} must be {state[name]} as in the state, got {ours}")
        self.seed, self.pass_number, self.position = (
            checks.integer("Batches.load_state_dict", name, state[name], 0) for name in ("seed", "pass_number", "position")
        )


def check_batches(op: str, batches: Any) -> None:
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        hint = f"{list(batches.shape)}, which iterates over rows: Batches(x, size=..)" if isinstance(batches, Tensor) else ""
        raise TypeError(f"{op}: batches must be an iterable of batches, got {type(batches).__name__} {hint}".rstrip())


def in_roles(batch: Any, device: torch.device) -> tuple[Any, ...]:
    if isinstance(batch, Tensor):
        batch = (batch,)
    elif isinstance(batch, Mapping) and "x" in batch and not set(batch) - {"x", "target", "mask"}:
        batch = (batch["x"], batch.get("target"), batch.get("mask"))
    elif not isinstance(batch, (tuple, list)) or not 1 <= len(batch) <= 3:
        got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(f"Trainer.fit: a batch must be x, (x, target), (x, target, mask) or a dict of these names, got {got}")
    return tuple(None if column is None else column.to(device, non_blocking=True) for column in batch)


def chosen(op: str, batch: Any, columns: str | Mapping[str, str]) -> dict[str, Any]:
    """The columns of a batch by their roles."""
    roles = {"x": columns} if isinstance(columns, str) else dict(columns)
    if not isinstance(batch, Mapping) or not set(roles.values()) <= set(batch):
        got = ", ".join(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"{op}: a batch must hold the columns {', '.join(roles.values())}, got {got}")
    return {**({"mask": batch["mask"]} if "mask" in batch else {}), **{role: batch[name] for role, name in roles.items()}}


def endless(op: str, batches: Iterable[Any], steps: int | None, step: Callable[[], int], skipped: Callable[[], int]) -> Iterator[Any]:
    """Batches until step ``steps``, iterated again where they end; ``step()`` and ``skipped()`` are what has become of those before."""
    while steps is None or step() < steps:
        before = step()
        for batch in batches:
            yield batch
            if step() == steps:
                return
        if steps is None:
            return
        if step() == before:
            more = f" ({skipped()} that were not finite have been skipped)" if skipped() else ""
            raise ValueError(f"{op}: batches ended after step {step()} of {steps} and give no more{more}")


def without_high_norms(x: Tensor, mask: Tensor | None, most: float) -> Tensor:
    """``[..]`` bool: the rows that count but those whose norm is above ``most`` times the median of them; nothing is waited for."""
    checks.tensor("Trainer", "x", x)
    norms = torch.linalg.vector_norm(x.detach(), dim=-1, dtype=accumulator(x.dtype))
    counted = norms
    if mask is not None:
        mask = checks.mask("Trainer", "mask", mask, x)
        checks.shape("Trainer", "mask", mask, tuple(norms.shape), str(list(norms.shape)))
        counted = norms.where(mask, torch.nan)
    kept = (norms <= most * counted.nanmedian()) | ~norms.isfinite()
    return kept if mask is None else kept & mask
