"""The fused Adam step of one weight matrix beside ``torch.optim.Adam(fused=True)``, in the usual training shapes (B, D, F, k).

torch gets the dense gradient for nothing ("given") or writes it first with our decode_dweight into a buffer that it keeps; ours forms it on
the way. "unit" is the decoder's step: projection and rows of norm 1, which torch does in passes of its own. "transposed" is a [D, F]
parameter seen as [F, D]. The pass for clipping is apart.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fastsae
from bench.harness import DEVICE, name, normal, shapes, unit_rows
from fastsae.dispatch import OPS

SHAPES = shapes([(256, 768, 24576, 32), (1024, 512, 8192, 32)], [(32, 64, 2048, 8)])


def _inputs(shape: tuple[int, ...], transposed: bool = False) -> tuple[fastsae.optim.RowGradient, torch.Tensor, torch.Tensor]:
    """A gradient by slots, the weights, and a buffer for the dense gradient."""
    rows, width, features, k = shape
    indices = torch.rand(rows, features, generator=torch.Generator().manual_seed(1)).topk(k).indices.to(DEVICE)
    gradient = fastsae.optim.RowGradient(normal(rows, k), indices, None, normal(rows, width, seed=2), features)
    W, buffer = unit_rows(features, width), torch.empty(features, width, device=DEVICE)
    return (gradient, W.T.contiguous().T, buffer.T.contiguous().T) if transposed else (gradient, W, buffer)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("unit", [False, True], ids=["encoder", "unit"])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_adam(shape: tuple[int, ...], unit: bool, transposed: bool, compare: Callable[..., None]) -> None:
    gradient, start, buffer = _inputs(shape, transposed)
    slots = (gradient.values, gradient.indices, None, gradient.rows)
    W, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    leaf = torch.nn.Parameter(start.clone().T if transposed else start.clone())  # contiguous, as torch steps it fastest
    leaf.grad = buffer.T if transposed else buffer
    seen = leaf.detach().T if transposed else leaf.detach()
    theirs = torch.optim.Adam([leaf], lr=1e-3, fused=True)
    steps = [0]

    def ours() -> None:
        steps[0] += 1
        fastsae.optim.adam_(W, m, v, gradient, step=steps[0], project=unit, normalise=unit)

    def given() -> None:
        theirs.step()

    @torch.no_grad()
    def formed() -> None:
        OPS["decode_dweight"](*slots, buffer)
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

    OPS["decode_dweight"](*slots, buffer)
    others = {"torch fused Adam, gradient given": given, "decode_dweight + torch fused Adam": formed}
    what = " ".join(["adam", *["unit"] * unit, *["transposed"] * transposed])
    compare(what, name(shape), ours, others, verify, floor="torch fused Adam, gradient given")


@pytest.mark.parametrize("unit", [False, True], ids=["encoder", "unit"])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_grad_squares(shape: tuple[int, ...], unit: bool, compare: Callable[..., None]) -> None:
    gradient, W, buffer = _inputs(shape)
    values, indices, rows = gradient.values, gradient.indices, gradient.rows
    OPS["decode_dweight"](values, indices, None, rows, buffer)

    def ours() -> torch.Tensor:
        return OPS["grad_squares"](W, rows, values, indices, None, unit)

    def dense() -> torch.Tensor:
        return torch.linalg.vector_norm(buffer)

    def verify() -> None:
        OPS["grad_squares"].check((W, rows, values, indices, None, unit), ours())

    compare(f"grad_squares {'unit' if unit else ''}".strip(), name(shape), ours, {"torch norm of the dense gradient": dense}, verify)
