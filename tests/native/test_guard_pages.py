"""No C++ row touches memory outside its tensors: every argument ends, or begins, at a page that may not be accessed."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from fence import Fence
from levels import has_code
from torch import Tensor

from fastsae.dispatch import OPS, Op, Row
from fastsae.verify import affordable, call, variants

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="needs mmap and mprotect")

CPU = torch.device("cpu")


def rows() -> Iterator[Any]:
    for op in OPS.values():
        for row in op.rows:
            if row.backend == "cpu":
                for name, context in variants(row, CPU):
                    if has_code(op.name, name):
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
