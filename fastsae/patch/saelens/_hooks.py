"""Hooks on an SAE's points in a fused step: each is shown, once, the dense tensor that the library's own forward pass would show it.

One that only reads leaves the step by slots. Where one writes, the step is the library's own, whose calls of the points that have been
called already give what their hooks returned, with its gradient; from then on those hooks' steps are the library's own from the start.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastsae.patch._adapter import any_global_hook

POINTS = ("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons")
Shown = tuple[str, Any, Tensor, Tensor]
"""(name, point, what its hooks were shown, what they returned)."""


class Wrote(Exception):
    """A hook has changed what it was shown."""

    def __init__(self, name: str, shown: list[Shown]):
        super().__init__(f"{name} has a hook that writes")
        self.shown, self.hooks = shown, frozenset(shown[-1][1]._forward_hooks)


def why_not_shown(sae: Any, writers: frozenset[int], readable: bool) -> str | None:
    """Why the hooks of an SAE need the library's own step, or None; ``writers``: ids of hooks that are known to write."""
    for name in POINTS:
        point = getattr(sae, name)
        more = any(
            getattr(point, kind) for kind in ("_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs")
        )
        if more or "forward" in vars(point) or any_global_hook():
            return f"{name} has a hook that is not a plain forward one"
        if point._forward_hooks and not readable:
            return f"{name} has a hook"
        if not writers.isdisjoint(point._forward_hooks):
            return f"{name} has a hook that writes"
        if point._forward_hooks and getattr(sae.activation_fn, "use_sparse_activations", False):
            return f"{name} has a hook, and latents are sparse tensors"
    return None


class Points:
    """An SAE's hook points in one step."""

    def __init__(self, sae: Any):
        self.sae = sae
        self.shown: list[Shown] = []

    def show(self, name: str, make: Callable[[], Tensor]) -> None:
        """Calls the point's hooks, if there are any, on a new tensor; ``Wrote`` if they change it or ask for its gradient."""
        point = getattr(self.sae, name)
        if not point._forward_hooks:
            return
        with torch.enable_grad():
            leaf = seen = make()
            if name != "hook_sae_input":  # of whose input no one asks a gradient, and which is the target, too
                leaf = leaf.detach().requires_grad_()
                seen = leaf.clone()
            version = seen._version
            out = point(seen)
        self.shown.append((name, point, leaf, out))
        if out is not seen or seen._version != version or seen._backward_hooks or (seen.requires_grad and seen.retains_grad):
            raise Wrote(name, self.shown)

    def shown_at(self, name: str) -> Tensor | None:
        return next((out for shown, _, _, out in self.shown if shown == name), None)


@contextmanager
def replayed(shown: list[Shown]) -> Generator[None, None, None]:
    """Calls of these points return what they returned when they were shown it, and call no hook."""
    before = [(point, point._forward_hooks) for _, point, _, _ in shown]
    for _, point, leaf, out in shown:
        point._forward_hooks = OrderedDict()
        vars(point)["forward"] = lambda given, pair=(leaf, out): _Replay.apply(given, pair) if given.requires_grad else pair[1]
    try:
        yield
    finally:
        for point, hooks in before:
            point._forward_hooks = hooks
            del vars(point)["forward"]


class _Replay(torch.autograd.Function):
    """``out``, which was computed from ``leaf``, as a function of what equals ``leaf``."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
        ctx.pair = pair
        return pair[1].detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        leaf, out = ctx.pair
        if out.requires_grad:  # into parameters, too, that a hook has used
            torch.autograd.backward(out, grad)
        return leaf.grad, None
