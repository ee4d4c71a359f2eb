"""Exact dense Adam, and its conversion from torch's and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastsae._core import checks
from fastsae.ops.adam import ADAM, bias_corrections, checked_options
from fastsae.optim.jobs import Job, named_parameters, squares, unwrapped
from fastsae.optim.optimiser import Optimiser, Option


class Adam(Optimiser):
    """Adam over every feature, also those that no token touched, in one pass over weights and moments (AdamW with ``weight_decay``).

    Order of a step: gradient, without its component along the row for ``unit_rows``; clipping by the global norm; decay;
    Adam; rows of norm 1 again. Everything else agrees with ``torch.optim.Adam`` to rounding, and the state converts both ways. A parameter
    whose gradient is missing or None, or that is frozen (``requires_grad`` False), keeps its value, moments and step, as in torch.

    Args:
        params: a module (an ``SAE``, or ``SAEs``; or what holds one SAE, as ``torch.compile(sae)`` does), or named parameters such as
            ``module.named_parameters()``. Those in half precision get a float32 master copy beside their moments, which steps move and
            they are rounded from: the bits of a float32 optimiser with these gradients, for 14 bytes a parameter. What else is written
            to such a parameter between steps is taken over, but not what goes past torch's version counter (``.data``).
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``; may be set between steps, also in ``param_groups[0]``. For ``SAEs`` lr
            may be a list, one a member.
        clip: largest global norm of the gradient, or None; of each member's for ``SAEs``. ``grad_norm`` then holds that of the last step,
            before clipping: ``[]``, or ``[E]``.
        schedule: ``schedule(number of steps done)`` is a factor of ``lr``, e.g. ``warmup_linear_decay``; None: 1. One of
            ``torch.optim.lr_scheduler``, stepped after each step, does the same; either, not both.
        unit_rows: names of matrices whose rows keep norm 1; None: what the module says in its attribute ``unit_rows``, or none.
        on_nonfinite: what becomes of a step whose loss is not finite, or whose gradient's norm is not or is so large (2^60 in float32, and
            with ``clip``, whose norm is float32's) that its square soon would not be; without ``clip`` a bound of the norm is looked at
            (``gradients.size``), which costs no pass over the gradient. Weights, moments, counters, and in ``step`` the module's buffers
            stay bit for bit what they were; of ``SAEs`` all members'. "raise": FloatingPointError, which names the row of the batch, or the
            parameter. "skip": go on with the next batch; ``skipped`` counts (a parameter that is not finite raises all the same). On a GPU
            "raise" does not wait: from such a step on nothing is written until ``fastsae.check()``, ``state_dict()`` or one of 1000 steps
            reads the device's flag and raises; "skip" waits for the answer in every step.

    A CUDA graph may hold a step, see "GPU, graphs, compile" in the guides; RuntimeError where it cannot.

    Example:
        >>> x, sae = torch.randn(64, 16), fastsae.SAE(16, 64, fastsae.TopK(4))
        >>> opt = fastsae.optim.Adam(sae, lr=3e-4, clip=1.0, schedule=fastsae.optim.warmup_linear_decay(1000, 8000, 10000))
        >>> metrics = opt.step(x)
    """

    betas, eps, weight_decay = Option(), Option(), Option()
    _OPTIONS = ("lr", "betas", "eps", "weight_decay", "clip")
    _BUFFERS = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: nn.Module | Iterable[tuple[str, Tensor]],
        lr: float | Sequence[float] = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        clip: float | None = None,
        schedule: Callable[[int], float] | None = None,
        unit_rows: Sequence[str] | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
    ):
        op = "optim.Adam"
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options, schedule, unit_rows, on_nonfinite)
        if clip is not None:
            clip = checks.number(op, "clip", clip)
        self.clip = clip
        self.grad_norm: Tensor | None = None

    def _move(self, jobs: Sequence[Job], rates: Sequence[float], factors: Sequence[Tensor] | None) -> None:
        known: dict[tuple[Any, ...], Tensor | None] = {}
        for job in jobs:
            scale = None if factors is None else factors[job.member].to(job.views[0])
            step, lr, betas = self._states[job.name].step, rates[job.member], tuple(map(float, self.betas))
            if (key := (step, lr, job.views[0].dtype)) not in known:
                count = self._counted(step)
                known[key] = None if count is None else bias_corrections(count, lr, *betas).to(key[2])
            options = (lr, *betas, float(self.eps), float(self.weight_decay), step, job.unit, job.unit, known[key])
            for views, tile in job.tiles():
                ADAM(*views, *tile, scale, *options)

    def _fresh(self, p: Tensor) -> tuple[Tensor, ...]:
        return torch.zeros_like(p), torch.zeros_like(p)

    def _check_options(self, op: str) -> None:
        super()._check_options(op)
        for rate in self.lr if isinstance(self.lr, (tuple, list)) and self.lr else [self.lr]:
            checked_options(op, rate, self.betas, self.eps, self.weight_decay)

    @property
    def _by_member(self) -> bool:
        return super()._by_member or (self.members is not None and self.clip is not None)

    def _norms(self, jobs: Sequence[Job]) -> list[Tensor] | None:
        if self.clip is None or not jobs:
            return None
        each = [squares([job for job in jobs if job.member == member], self.world) for member in range(self.members or 1)]
        return [torch.stack([s.to(parts[0].device, torch.float32) for s in parts]).sum().sqrt() for parts in each]

    def _factors(self, norms: list[Tensor] | None) -> list[Tensor] | None:
        """Those that bring the global norm down to ``clip``, of each member or one for all, as ``clip_grad_norm_`` has it."""
        self.grad_norm = None if norms is None else norms[0] if self.members is None else torch.stack(norms)
        return None if norms is None or self.clip is None else [(self.clip / (norm + 1e-6)).clamp_max(1.0) for norm in norms]

    def to_torch(self, **options: Any) -> torch.optim.Adam:
        """A ``torch.optim.Adam`` (``AdamW`` with a weight decay) over the same parameters with a copy of this state.

        It has no clipping, schedule or unit rows of its own, and its moments have the parameters' dtype. ``options`` go to its constructor,
        e.g. ``fused=True``. ValueError where the members of a stack have rates of their own: it knows one for a parameter.
        """
        if isinstance(self.lr, Sequence):
            raise ValueError(f"Adam.to_torch: lr must be one number, got {self.lr}")
        self.settle()
        kind = torch.optim.AdamW if self.weight_decay else torch.optim.Adam
        parameters = list(self.parameters.values())
        step = torch.empty(0, dtype=torch.float32, device="cpu")
        made = kind(parameters, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, **options)
        state = {
            number: {"step": step.new_full((), float(s.step)), **{key: buffer.clone() for key, buffer in zip(self._BUFFERS, s.buffers)}}
            for number, name in enumerate(self.parameters)
            if (s := self._states.get(name)) is not None
        }
        made.load_state_dict({"state": state, "param_groups": made.state_dict()["param_groups"]})
        return made

    @classmethod
    def from_torch(
        cls,
        params: nn.Module | Iterable[tuple[str, Tensor]],
        optimizer: torch.optim.Adam | Mapping[str, Any],
        *,
        clip: float | None = None,
        schedule: Callable[[int], float] | None = None,
        unit_rows: Sequence[str] | None = None,
    ) -> Adam:
        """From a ``torch.optim.Adam`` or ``AdamW``, or its ``state_dict()``, with a copy of its state.

        Args:
            params: as in the constructor. An optimiser's parameters are found by identity; those of a state are taken in this order.
            optimizer: with the same options in all its groups, without amsgrad and maximize; a weight decay must be AdamW's.
        """
        op = "Adam.from_torch"
        named, _ = unwrapped(op, params if isinstance(params, nn.Module) else list(params))
        names = list(named_parameters(op, named))
        if isinstance(optimizer, torch.optim.Optimizer):
            by_id = {id(p): name for name, p in named_parameters(op, named).items()}
            order = [by_id.get(id(p)) for group in optimizer.param_groups for p in group["params"]]
            if None in order:
                raise ValueError(f"{op}: parameter {order.index(None)} of the optimizer is not among {', '.join(names)}")
            state = optimizer.state_dict()
        else:
            state, order = optimizer, names
            count = sum(len(group["params"]) for group in state["param_groups"])
            if count != len(names):
                raise ValueError(f"{op}: the state has {count} parameters, expected {len(names)}: {', '.join(names)}")
        groups = state["param_groups"]
        for key in ("lr", "betas", "eps", "weight_decay"):
            if len({str(group.get(key)) for group in groups}) != 1 or key not in groups[0]:
                raise ValueError(f"{op}: {key} must be the same in every group, got {[group.get(key) for group in groups]}")
        for group in groups:
            if group.get("amsgrad") or group.get("maximize"):
                raise ValueError(f"{op}: amsgrad and maximize are not supported")
            if group["weight_decay"] and not group.get("decoupled_weight_decay"):
                raise ValueError(f"{op}: weight_decay must be decoupled (AdamW's), got the L2 penalty of torch.optim.Adam")
        lr, eps, decay = (float(groups[0][key]) for key in ("lr", "eps", "weight_decay"))
        betas = (float(groups[0]["betas"][0]), float(groups[0]["betas"][1]))
        made = cls(named, lr, betas, eps, decay, clip=clip, schedule=schedule, unit_rows=unit_rows)
        numbers = [number for group in groups for number in group["params"]]
        for number, name in zip(numbers, order, strict=True):
            if number in state["state"]:
                made._states[name] = made._checked_state(op, name, state["state"][number])  # pyright: ignore[reportArgumentType]
        made.steps = max((s.step for s in made._states.values()), default=0)
        return made
