# pyright: reportMissingParameterType=none
# (a kernel's parameters get types at a launch)
"""No program of a launch touches what another one writes, and their order changes no bit."""

from __future__ import annotations

import os

import pytest
import torch
from triton_marks import CPU, interpreted, usable

pytest.importorskip("triton")
import triton
import triton.language as tl
from accesses import ORDERS, watched

from fastsae.dispatch import OPS
from fastsae.verify import affordable, call

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"


@interpreted
@usable
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if any(row.backend == "triton" for row in op.rows)])
def test_programs_do_not_meet(name: str) -> None:
    op = OPS[name]
    row = next(row for row in op.rows if row.backend == "triton")
    samples = list(op.samples(CPU, op.dtypes[0], torch.Generator().manual_seed(0)))
    samples = [args for args in samples if row.reason(args) is None and affordable(row, CPU, args)]
    samples.sort(key=lambda args: -sum(arg.numel() for arg in args if isinstance(arg, torch.Tensor)))
    for args in samples if DEEP else samples[:1]:
        found = []
        for order in list(ORDERS.values())[0 if DEEP else 1 :]:
            with watched(order) as faults:
                result = call(op, row, args)
            assert not faults, faults
            found.append(result if isinstance(result, tuple) else (result,))
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                assert torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


@triton.jit
def _meeting_kernel(x, y, READS: tl.constexpr):
    at = tl.program_id(0)
    if READS:
        tl.store(y + at, tl.load(y + tl.num_programs(0) - 1 - at) + 1)
    else:
        tl.store(y, tl.load(x + at))


@interpreted
@usable
@pytest.mark.parametrize(("reads", "what"), [(True, "reads 4 bytes that another one writes"), (False, "bytes written with two values")])
def test_the_record_sees_programs_that_meet(reads: bool, what: str) -> None:
    x, y = torch.arange(4.0), torch.zeros(4)
    with watched(ORDERS["forward"]) as faults:
        _meeting_kernel[(4,)](x, y, READS=reads)
    assert any(what in fault for fault in faults), faults
