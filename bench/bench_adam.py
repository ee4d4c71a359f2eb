"""The fused Adam step of one weight matrix beside ``torch.optim.Adam(fused=True)``, in the usual training shapes (B, D, F, k).

torch gets the dense gradient for nothing ("given") or writes it first with our decode_dweight into a buffer that it keeps; ours forms it on
the way. "unit" is the decoder's step: projection and rows of norm 1, which torch does in passes of its own. "transposed" is a [D, F]
parameter seen as [F, D]. The pass for clipping is apart.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastsae
from bench.harness import DEVICE, checks, laid, name, normal, shapes, slots, unit_rows
from fastsae.dispatch import OPS

SHAPES = shapes([(256, 768, 24576, 32), (1024, 512, 8192, 32)], [(32, 64, 2048, 8)])


def _inputs(shape: tuple[int, ...], layout: str = "FD") -> tuple[fastsae.optim.RowGradient, Tensor, Tensor]:
    """A gradient by slots, the weights, and a buffer for the dense gradient."""
    rows, width, features, k = shape
    values, indices = slots(rows, features, k)
    gradient = fastsae.optim.RowGradient(values, indices, None, normal(rows, width, seed=2), features)
    return gradient, laid(unit_rows(features, width), layout), laid(torch.empty(features, width, device=DEVICE), layout)


@pytest.mark.parametrize("layout", ["FD", "DF"], ids=["rows", "transposed"])
@pytest.mark.parametrize("unit", [False, True], ids=["encoder", "unit"])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_adam(shape: tuple[int, ...], unit: bool, layout: str, compare: Callable[..., None]) -> None:
    gradient, start, buffer = _inputs(shape, layout)
    transposed = layout == "DF"
    W, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    leaf = torch.nn.Parameter(start.clone().T if transposed else start.clone())  # contiguous, as torch steps it fastest
    leaf.grad = buffer.T if transposed else buffer
    seen = leaf.detach().T if transposed else leaf.detach()
    theirs = torch.optim.Adam([leaf], lr=1e-3, fused=True)
    steps = [0]

    def ours() -> None:
        steps[0] += 1
        fastsae.optim.adam_(W, m, v, gradient, step=steps[0], project=unit, normalise=unit)

    @torch.no_grad()
    def formed() -> None:
        OPS["decode_dweight"](gradient.values, gradient.indices, None, gradient.rows, buffer)
        if unit:
            buffer.addcmul_(seen, (buffer * seen).sum(1, keepdim=True), value=-1)
        theirs.step()
        if unit:
            seen.div_(torch.linalg.vector_norm(seen, dim=1, keepdim=True))

    def verify() -> None:
        ours()
        formed()
        difference = (W - seen).abs().contiguous()
        # At the first step m / sqrt(v) is the sign of a gradient, rounding included where it cancels.
        if float(difference.quantile(0.999) if difference.numel() < 1 << 24 else difference[::16].quantile(0.999)) > 1e-6:
            raise AssertionError("the step differs from torch's")

    others = {"torch fused Adam, gradient given": theirs.step, "decode_dweight + torch fused Adam": formed}
    what = " ".join(["adam", *["unit"] * unit, *["transposed"] * transposed])
    compare(what, name(shape), ours, others, verify, floor="torch fused Adam, gradient given")


@pytest.mark.parametrize("unit", [False, True], ids=["encoder", "unit"])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_grad_squares(shape: tuple[int, ...], unit: bool, compare: Callable[..., None]) -> None:
    gradient, W, buffer = _inputs(shape)
    OPS["decode_dweight"](gradient.values, gradient.indices, None, gradient.rows, buffer)
    args = W, gradient.rows, gradient.values, gradient.indices, None, unit
    others = {"torch norm of the dense gradient": lambda: torch.linalg.vector_norm(buffer)}
    label = "grad_squares unit" if unit else "grad_squares"
    compare(label, name(shape), lambda: OPS["grad_squares"](*args), others, checks("grad_squares", *args))
