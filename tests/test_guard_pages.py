"""No C++ row touches memory outside its tensors: every argument ends, or begins, at a page that may not be accessed."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsae.dispatch import OPS, Op, Row
from fastsae.verify import affordable, call, variants

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="needs mmap and mprotect")

CPU = torch.device("cpu")
PAGE = mmap.PAGESIZE


class Fence:
    """Tensors whose memory touches a forbidden page; they die with it."""

    def __init__(self, at_end: bool):
        self.at_end = at_end
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.maps: list[tuple[mmap.mmap, int, int]] = []

    def __enter__(self) -> Fence:
        return self

    def copy(self, value: Tensor) -> Tensor:
        span = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride())) if value.numel() else 0
        size = span * value.element_size()
        pages = -(-size // PAGE)
        region = mmap.mmap(-1, (pages + 2) * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(region))
        for guard in (start, start + (pages + 1) * PAGE):
            assert self.libc.mprotect(ctypes.c_void_p(guard), PAGE, mmap.PROT_NONE if hasattr(mmap, "PROT_NONE") else 0) == 0
        self.maps.append((region, start, pages))
        if span == 0:
            return value
        offset = PAGE + (pages * PAGE - size if self.at_end else 0)
        flat = torch.frombuffer(memoryview(region), dtype=value.dtype, count=span, offset=offset)
        copy = flat.as_strided(value.shape, value.stride())
        copy.copy_(value)
        return copy

    def __exit__(self, *_: Any) -> None:
        for _region, start, pages in self.maps:
            for guard in (start, start + (pages + 1) * PAGE):
                self.libc.mprotect(ctypes.c_void_p(guard), PAGE, mmap.PROT_READ | mmap.PROT_WRITE)


def rows() -> Iterator[Any]:
    for op in OPS.values():
        for row in op.rows:
            if row.backend == "cpu":
                for name, context in variants(row, CPU):
                    yield pytest.param(op, row, context, id=f"{op.name}-{name}")


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize(("op", "row", "context"), list(rows()))
def test_nothing_outside_is_touched(op: Op, row: Row, context: Callable[[], AbstractContextManager[Any]], at_end: bool) -> None:
    tried = 0
    with context():
        for dtype in op.dtypes[:1] if op.dtypes[0] is torch.int64 else (torch.float32, torch.bfloat16):
            if dtype not in op.dtypes:
                continue
            for args in op.samples(CPU, dtype, torch.Generator().manual_seed(5)):
                # An expanded tensor shares its elements: nothing can be copied into one.
                shared = any(isinstance(a, Tensor) and 0 in a.stride() and a.numel() > 1 for a in args)
                if shared or row.reason(args) is not None or not affordable(row, CPU, args):
                    continue
                tried += 1
                want = call(op, row, args)
                with Fence(at_end) as fence:
                    got = call(op, row, tuple(fence.copy(a) if isinstance(a, Tensor) else a for a in args))
                    for a, b in zip(_tensors(want), _tensors(got), strict=True):
                        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)) if a.is_floating_point() else torch.equal(a, b)
    assert tried, "no sample was accepted"


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result.clone(),) if isinstance(result, Tensor) else tuple(t.clone() for t in result)
