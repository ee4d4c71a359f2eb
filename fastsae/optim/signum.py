"""Schedule-free sign descent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastsae._core import checks
from fastsae.ops.signum import SIGNUM
from fastsae.optim.jobs import Job
from fastsae.optim.optimiser import Optimiser, Option


class Signum(Optimiser):
    """Schedule-free sign descent, the default optimiser of sparsify's trainer: sign of the gradient, averaged along the way.

    The parameters hold ``y``, where gradients are taken. The sign of the gradient moves ``z`` by ``lr``, the average ``x`` of all z
    (weighted by the square of the largest rate so far) is what one keeps, and ``y = momentum * x + (1 - momentum) * z``; ``ops.signum``
    has the arithmetic. ``eval()`` puts x into the parameters, ``train()`` puts y back, as in the package ``schedulefree``. It needs one
    buffer a parameter (Adam: two) and no decay of the rate.

    Order of a step: gradient, without its component along the row for ``unit_rows``; signum; rows of norm 1 again (of y: x and z are not
    normalised, nor are they in sparsify, which normalises before each forward pass). A parameter whose gradient is missing or None, or
    that is frozen, keeps its value and z; a feature that no token touched has gradient 0: its z stays and its y moves towards z.

    Args:
        params: as in ``Adam``; the master copy of a parameter in half precision holds y (x in ``eval()``).
        lr: of one step, the size by which each element of z moves; for ``SAEs`` it may be a list, one a member.
        momentum: above 0, at most 1. schedule, unit_rows, on_nonfinite: as in ``Adam``; a warm-up is the schedule that makes sense.

    Sources: Bernstein et al. 2018 (arXiv 1802.04434), Defazio et al. 2024 (arXiv 2405.15682).

    Example:
        >>> x, sae = torch.randn(64, 16), fastsae.SAE(16, 64, fastsae.TopK(4))
        >>> opt = fastsae.optim.Signum(sae, lr=5e-3 / (sae.d_sae / 2**14) ** 0.5)
        >>> metrics = opt.step(x)
        >>> opt.eval()  # before saving or evaluating; opt.train() before the next step
    """

    momentum = Option()
    _OPTIONS = ("lr", "momentum", "lr_max", "weight_sum", "training")
    _BUFFERS = ("z",)
    _SUMS = ("lr_max", "weight_sum")
    _COUNTED_BY_HOST = "the weights of its average"

    def __init__(
        self,
        params: nn.Module | Iterable[tuple[str, Tensor]],
        lr: float | Sequence[float] = 1e-3,
        momentum: float = 0.95,
        *,
        schedule: Callable[[int], float] | None = None,
        unit_rows: Sequence[str] | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
    ):
        self.training = True
        super().__init__(params, {"lr": lr, "momentum": momentum}, schedule, unit_rows, on_nonfinite)
        self.lr_max = [0.0] * (self.members or 1)
        self.weight_sum = [0.0] * (self.members or 1)

    def _check_ready(self, op: str) -> None:
        if not self.training:
            raise RuntimeError(f"{op}: the parameters hold the average; call train() before the next step")

    @torch.no_grad()
    def eval(self) -> None:
        """Puts the average x into the parameters."""
        self._blend(False, 1 - 1 / self.momentum)

    @torch.no_grad()
    def train(self) -> None:
        """Puts y, where the next gradient is taken, into the parameters; up to rounding what ``eval`` found there."""
        self._blend(True, 1 - self.momentum)

    def _blend(self, training: bool, share: float) -> None:
        if self.training == training:
            return
        self.training = training
        for name, state in self._states.items():
            state.weights(self.parameters[name]).lerp_(state.buffers[0], share)
            state.round_to(self.parameters[name])

    def _move(self, jobs: Sequence[Job], rates: Sequence[float], factors: Sequence[Tensor] | None) -> None:
        shares = []
        for member, lr in enumerate(rates):
            self.lr_max[member] = max(lr, self.lr_max[member])
            weight = self.lr_max[member] ** 2
            self.weight_sum[member] += weight
            shares.append(weight / self.weight_sum[member] if weight else 0.0)
        for job in jobs:
            options = (rates[job.member], float(self.momentum), shares[job.member], job.unit, job.unit)
            for views, tile in job.tiles():
                SIGNUM(*views, *tile, *options, None if factors is None else factors[job.member].to(views[0]))

    def _fresh(self, p: Tensor) -> tuple[Tensor, ...]:
        return (p.detach().clone(memory_format=torch.preserve_format),)

    def _check_options(self, op: str) -> None:
        super()._check_options(op)
        for rate in self.lr if isinstance(self.lr, (tuple, list)) and self.lr else [self.lr]:
            checks.rate(op, "lr", rate)
        if not 0 < checks.number(op, "momentum", self.momentum, positive=False) <= 1:
            raise ValueError(f"{op}: momentum must be above 0 and at most 1, got {self.momentum}")

    def state_dict(self) -> dict[str, Any]:
        """``steps``, the options, what the average has seen, and ``state``: step and z by parameter name. The parameters are not in it."""
        state = super().state_dict()
        return {**state, "lr_max": list(self.lr_max), "weight_sum": list(self.weight_sum)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.lr_max, self.weight_sum = list(self.lr_max), list(self.weight_sum)

    load_state_dict.__doc__ = Optimiser.load_state_dict.__doc__
