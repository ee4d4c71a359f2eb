"""What the programs of a launch read and write, in Triton's interpreter, which runs them one after the other in any order.

On a GPU they run at once: a byte that one writes may be read by no other, nor written by another with another value.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

Order = Callable[[int], Iterable[int]]
ORDERS: dict[str, Order] = {
    "forward": range,
    "reversed": lambda n: reversed(range(n)),
    "shuffled": lambda n: np.random.RandomState(n).permutation(n).tolist(),
}


class _Launch:
    def __init__(self) -> None:
        self.read: list[tuple[int, np.ndarray]] = []
        self.written: list[tuple[int, np.ndarray, np.ndarray]] = []

    def faults(self) -> list[str]:
        if not self.written:
            return []
        at = np.concatenate([where for _, where, _ in self.written])
        value = np.concatenate([value for _, _, value in self.written])
        program = np.concatenate([np.full(len(where), number) for number, where, _ in self.written])
        order = np.argsort(at, kind="stable")
        at, value, program = at[order], value[order], program[order]
        again = (at[1:] == at[:-1]) & (program[1:] != program[:-1]) & (value[1:] != value[:-1])
        found = [f"{again.sum()} bytes written with two values"] if again.any() else []
        for number, where in self.read:
            first, last = np.searchsorted(at, where), np.searchsorted(at, where, side="right") - 1
            hit = first <= last
            others = hit & ((program[np.where(hit, first, 0)] != number) | (program[np.where(hit, last, 0)] != number))
            if n := int(others.sum()):
                found.append(f"program {number} reads {n} bytes that another one writes")
        return found


def _bytes(pointers: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
    pointers = np.atleast_1d(pointers)
    chosen = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64)
    return (chosen[:, None] + np.arange(size)).reshape(-1)


@contextmanager
def watched(order: Order) -> Generator[list[str], None, None]:
    """Programs run in this order; the list gets a line for each fault of a launch that ends inside."""
    faults: list[str] = []
    launches: list[_Launch] = []
    load, store, call = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store, GridExecutor.__call__

    def number(builder: Any) -> int:
        (x, y, z), (_, width, depth) = builder.grid_idx, builder.grid_dim
        return (x * width + y) * depth + z

    def masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        got = load(self, ptrs, mask, *rest)
        launches[-1].read.append((number(self), _bytes(ptrs.data, mask.data, got.data.dtype.itemsize)))
        return got

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        shape = np.atleast_1d(ptrs.data).shape
        kept = np.broadcast_to(value.data, shape)[np.broadcast_to(mask.data, shape)]
        where = _bytes(ptrs.data, mask.data, value.data.dtype.itemsize)
        launches[-1].written.append((number(self), where, np.frombuffer(kept.tobytes(), np.uint8)))
        return store(self, ptrs, value, mask, *rest)

    def atomic(self: Any, *args: Any) -> Any:
        raise AssertionError("an atomic operation")

    def programs(*args: int) -> Iterable[int]:  # the interpreter's loops over numbers of other things stay as they are
        return order(*args) if sys._getframe(1).f_code is call.__code__ else range(*args)

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        launches.append(_Launch())
        call(self, *args, **kwargs)
        faults.extend(f"{self.fn.__name__}: {fault}" for fault in launches.pop().faults())

    patches = {"create_masked_load": masked_load, "create_masked_store": masked_store}
    with (
        mock.patch.multiple(InterpreterBuilder, create_atomic_rmw=atomic, create_atomic_cas=atomic, **patches),
        mock.patch.object(GridExecutor, "__call__", launch),
        mock.patch.object(interpreter, "range", programs, create=True),
    ):
        yield faults
