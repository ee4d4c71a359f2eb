"""What the references share: accumulation dtype, tiles of a bounded workspace, products in full precision, scores, top-k of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastsae._core import seeds
from fastsae._core.precision import full_precision
from fastsae.dispatch import LIBRARY

WORKSPACE_ELEMENTS = 1 << 24
"""Most elements that a reference holds in one temporary (64 MiB in float32), whatever B, F, N and M are."""


# What torch tells of its transforms nowhere else.
_functorch: Any = torch._C._functorch  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
_forward_ad: Any = forward_ad


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Sums are in float32; float64 stays."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def chunks(total: int, cost: int, least: int = 1) -> Iterator[slice]:
    """Slices of ``range(total)`` of at most ``WORKSPACE_ELEMENTS / cost`` (but at least ``least``) items."""
    step = max(least, WORKSPACE_ELEMENTS // max(cost, 1))
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def _unwrapped(t: Tensor) -> Tensor:
    """What a tensor of vmap holds; that of ``torch.func.grad`` says itself that it requires grad."""
    while not t.requires_grad and _functorch.is_functorch_wrapped_tensor(t):
        t = _functorch.get_unwrapped(t)
    return t


def tracks(op: str, *tensors: Tensor | None) -> bool:
    """Whether autograd records a call with these differentiable inputs. Derivatives that it does not record, which the kernels would drop
    in silence, raise NotImplementedError: forward-mode ones, and those of ``torch.func``."""
    given = [t for t in tensors if t is not None]
    records = torch.is_grad_enabled() and any([t.requires_grad for t in given])  # noqa: C419 (a generator costs more)
    if torch.compiler.is_compiling():
        return records
    if _forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in given):
        raise NotImplementedError(
            f"{op}: forward-mode derivatives (jvp, jacfwd, dual tensors) are not supported; use backward(), torch.autograd.grad or "
            "torch.autograd.functional"
        )
    transformed = _functorch.peek_interpreter_stack() is not None
    if transformed and torch.is_grad_enabled() and any(_unwrapped(t).requires_grad for t in given):
        raise NotImplementedError(
            f"{op}: derivatives inside torch.func (grad, vjp, jacrev, vmap of what requires grad) are not supported; use backward(), "
            "torch.autograd.grad or torch.autograd.functional, or torch.no_grad() where none are wanted"
        )
    return records


def _exact(a: Tensor, b: Tensor) -> Tensor:
    with full_precision(a.device):
        return a @ b


# For compilers, which would take the product out of its context.
LIBRARY.define("product(Tensor a, Tensor b) -> Tensor")
LIBRARY.impl("product", _exact, "CompositeExplicitAutograd")
torch.library.register_fake("fastsae::product", lambda a, b: a @ b, lib=LIBRARY)


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.ops.fastsae.product(a, b) if torch.compiler.is_compiling() else _exact(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, b = ctx.saved_tensors
        da, db = ctx.needs_input_grad

        def laid_out(like: Tensor, left: Tensor, right: Tensor) -> Tensor:
            """``left @ right`` in the layout of ``like``, as torch's own backward."""
            return product(right.mT, left.mT).mT if like.dim() == 2 and like.stride() == (1, like.shape[0]) else product(left, right)

        return laid_out(a, grad, b.mT) if da else None, laid_out(b, a.mT, grad) if db else None


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of matrices, or of as many of them, in the precision of their dtype; so is the backward, wherever it runs."""
    return _Product.apply(a, b)  # pyright: ignore[reportReturnType]


def drawn(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Callable[..., Tensor]:
    """``drawn(...)(*shape)``: normal numbers, for samples."""
    return lambda *shape: seeds.normal(generator, shape).to(device=device, dtype=dtype)


def running_sums(t: Tensor) -> Tensor:
    """``cumsum`` of floats along the first, short dimension: on a GPU torch's is not deterministic, and raises where that is asked for."""
    return t.cumsum(0) if t.is_cpu or t.shape[0] == 0 else torch.stack(list(accumulate(t.unbind(0))))


def centre(x: Tensor, b_pre: Tensor | None) -> Tensor:
    """``fl(x - b_pre)`` in the accumulation dtype."""
    wide = x.to(accumulator(x.dtype))
    return wide if b_pre is None else wide - b_pre


def scores(xc: Tensor, W: Tensor, b: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """``[rows, f]``: the scores (fl(x - b_pre) . W * scale + bias) of centred rows, by torch's own product."""
    result = product(xc, W.to(xc.dtype).T)
    if scale is not None:
        result = result * scale
    return result if b is None else result + b


def _select_rows(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, descending; equal values: lower index first, -0 == +0, NaN above +inf."""
    n = s.shape[1]
    values, indices = s.topk(min(k + 1, n), dim=1)
    # torch.topk leaves open which of equal values it takes and in what order; a stable sort does not.
    same = (values[:, 1:] == values[:, :-1]) | values[:, 1:].isnan()
    tied = same.any(1)
    if s.device.type == "cpu":
        rows = tied.nonzero().flatten()
        if rows.numel() == 0:
            return values[:, :k], indices[:, :k]
        sorted_values, sorted_indices = s[rows].sort(dim=1, descending=True, stable=True)
        values = values[:, :k].index_copy(0, rows, sorted_values[:, :k])
        return values, indices[:, :k].index_copy(0, rows, sorted_indices[:, :k])
    values, indices = s.sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


class Best:
    """Running k best of each row (``absolute``: by magnitude) over tiles whose columns ascend; equal ones: lower index first."""

    def __init__(self, k: int, absolute: bool = False):
        self.k, self.absolute = k, absolute
        self.rows: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def add(self, start: int, offset: int, s: Tensor, excluded: Tensor | None = None) -> None:
        """Scores of the rows from ``start`` on and the columns from ``offset`` on."""
        rank = s.abs() if self.absolute else s
        if excluded is not None:
            rank = rank.masked_fill(excluded, -torch.inf)
        rank, local = _select_rows(rank, min(self.k, s.shape[1]))
        value, index = s.gather(1, local), local + offset
        if start in self.rows:
            rank, value, index = (torch.cat(pair, 1) for pair in zip(self.rows[start], (rank, value, index)))
            rank, order = rank.sort(dim=1, descending=True, stable=True)
            rank, order = rank[:, : self.k], order[:, : self.k]
            value, index = value.gather(1, order), index.gather(1, order)
        self.rows[start] = (rank, value, index)

    def result(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(values in ``dtype``, indices), ``[rows, k]``."""
        kept = [self.rows[start] for start in sorted(self.rows)]
        values = [torch.empty(0, self.k, dtype=dtype, device=device), *(value.to(dtype) for _, value, _ in kept)]
        return torch.cat(values), torch.cat([torch.empty(0, self.k, dtype=torch.int64, device=device), *(index for *_, index in kept)])


def triton_refuses(*args: object) -> str | None:
    """Why Triton cannot serve these arguments: not usable on their device, or a dtype without a kernel."""
    from fastsae._core import triton_support

    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    return triton_support.unavailable(tensors[0].device) or triton_support.dtype_reason(*tensors)


def triton_refuses_scores(x: Tensor, W: Tensor, *rest: object) -> str | None:
    """As ``triton_refuses``, for kernels over scores, which number features in int32."""
    reason = triton_refuses(x, W, *rest)
    if reason is None and max(x.shape[0], W.shape[0]) >= 2**31 - 2**10:
        return f"{max(x.shape[0], W.shape[0])} rows (supported: fewer than 2^31 - 2^10)"
    return reason
