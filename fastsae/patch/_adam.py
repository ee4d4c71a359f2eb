"""``torch.optim.Adam``'s step from gradients that need not exist as matrices, on that optimiser's own state.

For trainers that build such an optimiser: its ``state_dict``, learning-rate schedulers and parameter groups stay what they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.optim.optimizer as _every_optimiser
from torch import Tensor, nn

from fastsae._core import flags
from fastsae.dispatch import preference, then_any
from fastsae.gradients import Gradient, RowGradient, densify
from fastsae.ops.adam import ADAM, DTYPES, checked_gradient
from fastsae.ops.decode import DECODE_DWEIGHT
from fastsae.optim.jobs import Job, checked


@dataclass(frozen=True)
class Feature:
    """A gradient of the feature-major view ``[F, D]`` of a parameter stored as ``[D, F]``."""

    gradient: Gradient


def refuses(optimizer: Any, adam: type = torch.optim.Adam) -> str | None:
    """Why ``step`` cannot stand for ``optimizer.step()``, or None; ``adam`` is the class that it must be of."""
    if type(optimizer) not in ((adam, torch.optim.AdamW) if adam is torch.optim.Adam else (adam,)):
        return f"the optimiser is {type(optimizer).__module__}.{type(optimizer).__qualname__}, not torch.optim.Adam"
    kinds = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
    every = [hook for kind in kinds for hook in getattr(_every_optimiser, kind).values()]
    foreign = any(getattr(hook, "__module__", "").split(".")[0] != "fastsae" for hook in every)
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks or foreign:
        return "the optimiser has step hooks"
    if "step" in vars(optimizer) and getattr(optimizer.step, "__wrapped__", None) is not type(optimizer).step:  # schedulers wrap it
        return "the optimiser's step was replaced in the instance"
    for group in optimizer.param_groups:
        if group["weight_decay"] != 0 and not _decoupled(optimizer, group):
            return f"the optimiser's weight_decay is {group['weight_decay']}"
        for name, plain in (("amsgrad", False), ("maximize", False), ("capturable", False), ("differentiable", False)):
            if group.get(name, plain) != plain:
                return f"the optimiser's {name} is {group[name]}"
        if isinstance(group["lr"], Tensor) or any(isinstance(beta, Tensor) for beta in group["betas"]):
            return "the optimiser's learning rate or betas are tensors"
        for p in group["params"]:
            if type(p) not in (nn.Parameter, Tensor):
                return f"a parameter is a {type(p).__name__}"
            if p.dtype not in DTYPES:
                return f"a parameter is {str(p.dtype)[6:]} (supported: float32, float64)"
            if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
                return "a parameter has gradient hooks"
    return None


def _decoupled(optimizer: Any, group: Mapping[str, Any]) -> bool:
    """Whether weights decay by themselves and not through the gradient."""
    return isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)


def dense(p: Tensor, gradient: Gradient | Feature) -> Tensor:
    """A gradient as ``p.grad`` holds it, laid out like ``p``."""
    turned = isinstance(gradient, Feature)
    given = gradient.gradient if turned else gradient
    if isinstance(given, Tensor):
        return (given.T if turned else given).to(p.dtype)
    out = torch.empty_like(p)
    rows = out.T if turned else out
    if isinstance(given, RowGradient):
        DECODE_DWEIGHT(*given.slots, given.rows, rows, backend=then_any(preference(None)))
    else:
        rows.copy_(densify(given))
    return out


def holds(optimizer: Any, module: nn.Module) -> bool:
    """Whether the optimiser has the module's parameters and no others."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in module.parameters()}


@torch.no_grad()
def step(
    optimizer: torch.optim.Adam,
    gradients: Mapping[Tensor, Gradient | Feature],
    max_norm: float | None = None,
    project: Collection[Tensor] = (),
    normalise: Collection[Tensor] = (),
) -> Tensor | None:
    """``clip_grad_norm_(parameters, max_norm)`` and ``optimizer.step()``; returns the norm before clipping.

    Args:
        optimizer: one that ``refuses`` does not refuse.
        gradients: by parameter; of its shape, or ``Feature`` of its transpose. A parameter without one is left alone, as in torch.
        max_norm: of all gradients together, as ``torch.nn.utils.clip_grad_norm_`` takes it; None: no clipping.
        project: weights of unit features, from whose gradient the component along each feature is removed first.
        normalise: weights whose features have norm 1 afterwards. Both need feature-major memory.
    """
    if any(flags.capturing(p.device) for p in gradients):  # the number of the step would stay what it is now
        raise RuntimeError("an accelerated step of torch's Adam cannot be captured in a CUDA graph: capture one of fastsae.optim.Adam")
    projected, normalised = {id(p) for p in project}, {id(p) for p in normalise}
    jobs = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p not in gradients or not p.requires_grad:
                continue
            state = optimizer.state[p]
            if not state:
                state["step"] = torch.zeros((), device="cpu", dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            gradient = gradients[p]
            tensors = p.detach(), state["exp_avg"], state["exp_avg_sq"]
            if isinstance(gradient, Feature):
                whole = id(p) in projected or id(p) in normalised  # rows have to be features
                gradient, tensors = _oriented(gradient.gradient, tensors, whole)
            elif p.dim() != 2:
                tensors = tuple(t.reshape(1, -1) if t.is_contiguous() else t.unsqueeze(0) for t in tensors)
                gradient = gradient.reshape(1, -1)  # pyright: ignore[reportAttributeAccessIssue]
            jobs.append((group, state, job_of(tensors, gradient, id(p) in projected), id(p) in normalised))
    norm = factor = None
    if max_norm is not None:
        squares = [square for _, _, job, _ in jobs for square in job.squares()]
        nothing = torch.zeros((), dtype=torch.float32, device="cpu")
        norm = torch.stack([square.to(torch.float32) for square in squares]).sum().sqrt() if squares else nothing
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for group, state, job, normal in jobs:
        state["step"] += 1
        beta1, beta2 = group["betas"]
        # The library's step makes everything NaN of a norm that is; a NaN here would leave everything as it is.
        scale = None if factor is None else factor.nan_to_num(torch.inf).to(job.views[0])
        decay = float(group["weight_decay"])
        options = (float(group["lr"]), beta1, beta2, group["eps"], decay, int(state["step"]), job.unit, normal)
        for views, tile in job.tiles():
            ADAM(*views, *tile, scale, *options)
    optimizer._opt_called = True  # pyright: ignore[reportAttributeAccessIssue]  # what schedulers look for before their first step
    return norm


def _oriented(gradient: Gradient, tensors: tuple[Tensor, ...], whole: bool) -> tuple[Gradient, tuple[Tensor, ...]]:
    """The gradient of feature-major views and those views; or, where only the reference takes such views, both as they are stored."""
    views = tuple(t.T for t in tensors)
    if whole or not isinstance(gradient, RowGradient):
        return gradient, views
    given = checked_gradient("step", "gradient", gradient, views[0])
    request = preference(None)
    if ADAM.choose((*views, *given, None, 0.0, 0.0, 0.0, 0.0, 0.0, 1, False, False), request).backend != "reference":
        return gradient, views
    out = torch.empty_like(tensors[0])
    rows, values, indices, crow = given
    DECODE_DWEIGHT(values, indices, crow, rows, out.T, backend=then_any(request))
    return out, tensors


def job_of(views: tuple[Tensor, ...], gradient: Any, unit: bool) -> Job:
    """One parameter's part of a step; see ``Job``."""
    return Job("step", "a parameter", views, checked("step", "gradient", gradient, views[0]), unit)
