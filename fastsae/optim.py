"""Optimisers over fused steps: exact dense Adam and signum from gradients that need not exist as matrices.

Adam, Signum                  optimisers of a ``fastsae.SAE`` or ``SAEs``; warmup_linear_decay: a schedule for them
adam_                         one step of Adam on one matrix
RowGradient, TiledGradient    the gradient of a weight as slots and rows, or as tiles made where they are read
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastsae._core import checks, finite, flags, processes
from fastsae.gradients import Gradient, RowGradient, StackedGradient, TiledGradient, norm
from fastsae.ops.adam import ADAM, DTYPES, GRAD_SQUARES, adam_, checked_gradient, checked_options
from fastsae.ops.signum import SIGNUM

__all__ = ["Adam", "RowGradient", "Signum", "TiledGradient", "adam_", "warmup_linear_decay"]

_TILE = 1 << 21  # elements of a TiledGradient that exist at a time

_Slots = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # grad, values, indices, crow


def _height(width: int) -> int:
    """Rows of a TiledGradient that exist at a time."""
    return max(1, _TILE // max(width, 1))


@dataclass
class _State:
    step: int
    buffers: tuple[Tensor, ...]  # of the parameter's shape


@dataclass(frozen=True)
class _Job:
    """One parameter of one step, or a member's part of it, checked: ``[rows, D]`` views (the weights first) and the gradient."""

    op: str
    name: str
    views: tuple[Tensor, ...]
    gradient: TiledGradient | _Slots
    unit: bool
    member: int = 0

    def size(self) -> Tensor:
        """``[]``: at least the gradient's norm."""
        if isinstance(self.gradient, TiledGradient):
            known = self.gradient.size
            return torch.stack(self.squares()).sum().sqrt() if known is None else known
        grad, values, *_ = self.gradient
        return norm(grad) if values is None else norm(values) * norm(grad)

    def squares(self) -> list[Tensor]:
        """Sums of the squares of the gradient's elements, by ranges."""
        return [GRAD_SQUARES(views[0], *tile, self.unit) for views, tile in self.tiles()]

    def tiles(self) -> Iterator[tuple[tuple[Tensor, ...], _Slots]]:
        """Ranges of rows of the views, and the gradient of each."""
        W = self.views[0]
        if not isinstance(self.gradient, TiledGradient):
            yield self.views, self.gradient
            return
        height = _height(W.shape[1])
        height = max(height - height % self.gradient.block, self.gradient.block)
        for start in range(0, W.shape[0], height):
            part = slice(start, min(start + height, W.shape[0]))
            yield (
                tuple(view[part] for view in self.views),
                checked_gradient(
                    self.op, f"gradient of {self.name}", self.gradient.compute(part).to(W.dtype), W[part]
                ),  # of autocast: narrower
            )


class _Optimiser:
    """What the optimisers share: parameters and their state, the forms of a gradient, the rate of a step."""

    _OPTIONS: tuple[str, ...]
    _BUFFERS: tuple[str, ...]
    _SUMS: tuple[str, ...] = ()  # lists that count over steps

    def __init__(
        self,
        params: nn.Module | Iterable[tuple[str, Tensor]],
        lr: float | Sequence[float],
        schedule: Callable[[int], float] | None,
        unit_rows: Sequence[str] | None,
        on_nonfinite: Literal["raise", "skip"],
    ):
        op = f"optim.{type(self).__name__}"
        self.on_nonfinite = on_nonfinite
        self.skipped = 0
        self.module = params if isinstance(params, nn.Module) else None
        self.members: int | None = getattr(params, "n_dictionaries", None)
        self.parameters = _named(op, params)
        self.lr: float | Sequence[float] = list(lr) if isinstance(lr, (tuple, list)) else lr
        self._check_options(op)
        if schedule is not None and not callable(schedule):
            raise TypeError(f"{op}: schedule must be callable, got {type(schedule).__name__}")
        unit_rows = tuple(getattr(params, "unit_rows", ()) if unit_rows is None else unit_rows)
        for name in unit_rows:
            if name not in self.parameters or self.parameters[name].dim() < 2:
                matrices = [name for name, p in self.parameters.items() if p.dim() >= 2]
                raise ValueError(f"{op}: unit_rows must name matrices among {matrices}, got {name!r}")
        self.schedule, self.unit_rows = schedule, unit_rows
        self.steps = 0
        self._states: dict[str, _State] = {}
        self._flag: Tensor | None = None  # on a GPU: whether a step was refused, and the steps taken before it
        self._log: list[Any] = []  # the counters before each step since that was read

    def step(self, x: Tensor | None = None, target: Tensor | None = None, mask: Tensor | None = None, **loss_options: Any) -> Any:
        """One training step on ``x``: ``module.step_gradients(x, target=, mask=, **loss_options)``, then ``apply``.

        Returns: the metrics of ``step_gradients``: tensors, nothing has waited for them.

        Raises: what ``step_gradients`` and ``apply`` raise; the module's buffers are then as before, too. RuntimeError: in a process group
        of several processes, whose models would not be one.
        """
        kind = type(self).__name__
        if x is None:
            raise TypeError(f"{kind}.step: x must be given, the rows of a fused step; after loss.backward() it is {kind}.apply()")
        if not hasattr(self.module, "step_gradients"):
            raise TypeError(
                f"{kind}.step: needs a module with step_gradients, got {type(self.module).__name__}; use {kind}.apply(gradients)"
            )
        processes.refuse(
            f"{kind}.step",
            "each would train a model of its own. For one model: wrap a module whose forward returns sae.loss(x).loss in "
            f"DistributedDataParallel and call {kind}.apply() after backward(). For a model of its own in each: "
            f"{kind}.apply(sae.step_gradients(x)[1]), or train before the group is made",
        )
        buffers = [(buffer, buffer.clone()) for buffer in self.module.buffers()]  # pyright: ignore[reportOptionalMemberAccess]
        try:
            metrics, gradients = self.module.step_gradients(x, target=target, mask=mask, **loss_options)  # pyright: ignore[reportOptionalMemberAccess, reportCallIssue]
            refused = self._apply(gradients, getattr(metrics, "loss", None), (x, target, mask))
        except BaseException:
            _restore(buffers, True)
            raise
        _restore(buffers, refused)
        return metrics

    def apply(self, gradients: Mapping[str, Gradient | None] | None = None) -> None:
        """One step from gradients by parameter name; None: from the ``grad`` of each parameter, as after ``backward()``.

        Args:
            gradients: of a parameter, its shape: a tensor; of a matrix ``[F, D]``, or ``[E, F, D]`` taken as ``[E * F, D]``, also a
                ``RowGradient`` or a ``TiledGradient``; for ``SAEs`` also a ``StackedGradient``.

        Raises:
            TypeError, ValueError: an unknown name, a wrong type, shape, dtype or device, a parameter that has changed since its first
                step: nothing has been written. IndexError: an index out of range; the parameters before it have been stepped.
                FloatingPointError: a gradient that is not finite, see ``on_nonfinite``: nothing has been written.
        """
        self._apply(gradients)

    @torch.no_grad()
    def _apply(
        self, gradients: Mapping[str, Gradient | None] | None, loss: Tensor | None = None, batch: tuple[Tensor | None, ...] = ()
    ) -> bool | Tensor:
        """Whether the step was refused: nothing was written then."""
        op = f"{type(self).__name__}.apply"
        self._check_options(op)
        if len(self._log) >= 1000:
            self._settle()
        jobs, states = self._jobs(op, {name: p.grad for name, p in self.parameters.items()} if gradients is None else gradients)
        schedule = 1.0 if self.schedule is None else float(self.schedule(self.steps))
        rates = [lr * schedule for lr in (self.lr if isinstance(self.lr, Sequence) else [self.lr])]
        for lr in rates:
            if not 0 <= lr < float("inf"):
                raise ValueError(f"{op}: the learning rate at step {self.steps} must be finite and at least 0, got {lr}")
        norms = self._norms(jobs)
        sizes = [job.size() for job in jobs] if norms is None else [*norms]
        if isinstance(loss, Tensor):
            sizes.append((loss - loss).abs().sum())  # 0, or NaN
        taken = finite.finite(sizes)
        if isinstance(taken, Tensor) and self.on_nonfinite == "skip":
            taken = bool(taken)
        if taken is False:
            if self.on_nonfinite == "raise" or finite.spoilt(self.parameters):
                raise FloatingPointError(self._refusal("step" if batch else "apply", *batch))
            self.skipped += 1
            return True
        factors = self._factors(norms)
        refused = False if taken is True else self._deferred(taken)
        if refused is not False:
            factors = [torch.where(refused, torch.nan, f) for f in factors or [refused.new_ones((), dtype=torch.float32)]]
            factors = factors if len(factors) > 1 else factors * (self.members or 1)
        self._states.update(states)
        self.steps += 1
        for name in {job.name for job in jobs}:
            self._states[name].step += 1
        self._move(jobs, rates if len(rates) > 1 else rates * (self.members or 1), factors)
        if hasattr(self.module, "weights_changed"):
            self.module.weights_changed()  # pyright: ignore[reportOptionalMemberAccess, reportCallIssue]
        return refused

    def _refusal(self, method: str, *batch: Tensor | None) -> str:
        return (
            f"{type(self).__name__}.{method}: step {self.steps + 1} is not finite: {finite.culprit(self.parameters, *batch)}. "
            "Nothing has been changed; on_nonfinite='skip' leaves such batches out and counts them"
        )

    def _deferred(self, taken: Tensor) -> Tensor:
        """On a GPU, whose host does not wait: whether this step, or one since the last ``_settle``, is refused; no step is taken from the
        first such one on."""
        if self._flag is None:
            self._flag = torch.zeros(2, dtype=torch.int32, device=taken.device)
            flags.watch(self)
        self._log.append((self.steps, {name: s.step for name, s in self._states.items()}, [list(getattr(self, n)) for n in self._SUMS]))
        bad, count = self._flag[0], self._flag[1]
        bad.logical_or_(taken.logical_not())
        count.add_(bad == 0)
        return bad != 0

    def _settle(self) -> None:
        """FloatingPointError where a step on a GPU was refused since the last call, which this waits for; counters are then those before
        it, as weights, moments and buffers are."""
        log, self._log = self._log, []
        if not log or self._flag is None:
            return
        bad, count = self._flag.tolist()
        self._flag.zero_()
        if bad:
            self.steps, steps, sums = log[count]
            self._states = {name: _State(step, self._states[name].buffers) for name, step in steps.items()}
            for name, value in zip(self._SUMS, sums):
                setattr(self, name, value)
            raise FloatingPointError(f"{self._refusal('step')}. {len(log) - count - 1} steps after it were not taken either")

    def _move(self, jobs: Sequence[_Job], rates: Sequence[float], factors: Sequence[Tensor] | None) -> None:
        """The step itself; ``rates`` and ``factors`` by member."""
        raise NotImplementedError

    def _fresh(self, p: Tensor) -> tuple[Tensor, ...]:
        """The buffers of a parameter before its first step."""
        raise NotImplementedError

    def _check_options(self, op: str) -> None:
        for name in self._OPTIONS:  # a checkpoint holds no NumPy numbers
            value = getattr(self, name, None)
            setattr(self, name, type(value)(map(checks.plain, value)) if isinstance(value, (tuple, list)) else checks.plain(value))
        lr = self.lr
        finite.policy(op, self.on_nonfinite)
        if isinstance(lr, (tuple, list)) and len(lr) != (self.members or 1):
            raise ValueError(f"{op}: lr must be a number, or one for each of {self.members or 1} dictionaries, got {len(lr)}")

    def _norms(self, jobs: Sequence[_Job]) -> list[Tensor] | None:
        """The gradient's norm, or each member's, where it is needed; else None."""
        return None

    def _factors(self, norms: list[Tensor] | None) -> list[Tensor] | None:
        """Factors of the gradients, or None."""
        return None

    def _jobs(self, op: str, gradients: Mapping[str, Gradient | None]) -> tuple[list[_Job], dict[str, _State]]:
        """The parameters to step, everything checked, and their state, made where it is new."""
        if unknown := [name for name in gradients if name not in self.parameters]:
            raise ValueError(f"{op}: unknown parameter {unknown[0]!r}; known: {', '.join(self.parameters)}")
        jobs, fresh = [], {}
        for name, gradient in gradients.items():
            p = self.parameters[name]
            if gradient is None or (isinstance(p, nn.Parameter) and not p.requires_grad):
                continue
            checks.tensor(op, name, p, DTYPES)
            if self.module is not None and getattr(self.module, name, p) is not p:
                raise ValueError(f"{op}: {name} of the module is another parameter now: make the optimiser after changing a module")
            state = self._states.get(name) or _State(0, self._fresh(p))
            for what in ("dtype", "device", "shape"):
                was, now = getattr(state.buffers[0], what), getattr(p, what)
                if was != now:
                    error = ValueError if what == "shape" else TypeError
                    raise error(f"{op}: {name} was {was} at its first step and is {now} now: make the optimiser after changing a module")
            fresh[name] = state
            what, unit = f"gradient of {name}", name in self.unit_rows
            if isinstance(gradient, Tensor):
                checks.tensor(op, what, gradient, (p.dtype,), p)
                checks.shape(op, what, gradient, tuple(p.shape), str(list(p.shape)))
            if isinstance(gradient, StackedGradient):
                if self.members is None or gradient.n != self.members:
                    raise ValueError(f"{op}: {what} has {gradient.n} members, the module {self.members or 'is no stack'}")
                joint = gradient.joint
                fits = not isinstance(joint, TiledGradient) or joint.block <= _height(p.shape[-1])
                if joint is not None and fits and not self._by_member:
                    gradient = joint
            stacks = (p.detach(), *state.buffers)
            if self.members is not None and (self._by_member or isinstance(gradient, StackedGradient)):
                of = gradient.part if isinstance(gradient, StackedGradient) else gradient.__getitem__  # pyright: ignore[reportAttributeAccessIssue]
                parts = ((*(t[e] for t in stacks), of(e), e) for e in range(self.members))
            else:
                parts = ((*stacks, gradient, 0),)
            for *each, g, e in parts:
                views = tuple(map(_matrix, each))
                jobs.append(_Job(op, name, views, _checked(op, what, g, views[0]), unit, e))
        jobs.sort(key=lambda job: job.member)  # a member's tiles of both weights are then asked for one after the other
        return jobs, fresh

    @property
    def _by_member(self) -> bool:
        """Whether the members of a stack differ in their step."""
        return self.members is not None and isinstance(self.lr, Sequence) and len(set(self.lr)) > 1

    def state_dict(self) -> dict[str, Any]:
        """``steps``, the options, and ``state``: step and moments by parameter name. A schedule is a function and not in it."""
        self._settle()
        state = {name: {"step": s.step, **dict(zip(self._BUFFERS, s.buffers))} for name, s in self._states.items()}
        return {"steps": self.steps, **{name: getattr(self, name) for name in self._OPTIONS}, "state": state}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what ``state_dict`` gave, options included; the next step gives the bits it would have given there."""
        kind = type(self).__name__
        op = f"{kind}.load_state_dict"
        if missing := [name for name in ("steps", *self._OPTIONS, "state") if name not in state_dict]:
            raise ValueError(f"{op}: not a state of fastsae.optim.{kind}: {missing[0]!r} is missing")
        states = {name: self._checked_state(op, name, entry) for name, entry in state_dict["state"].items()}
        steps = checks.integer(op, "steps", state_dict["steps"], 0)
        before = {name: getattr(self, name) for name in self._OPTIONS}
        for name in self._OPTIONS:
            setattr(self, name, state_dict[name])
        try:
            self._check_options(op)
        except (TypeError, ValueError):
            for name, value in before.items():
                setattr(self, name, value)
            raise
        self._states, self.steps, self._log = states, steps, []
        if self._flag is not None:
            self._flag.zero_()

    def _checked_state(self, op: str, name: str, entry: Mapping[str, Any]) -> _State:
        if name not in self.parameters:
            raise ValueError(f"{op}: unknown parameter {name!r}; known: {', '.join(self.parameters)}")
        p = self.parameters[name]
        buffers = []
        for key in self._BUFFERS:
            buffer = checks.tensor(op, f"{key} of {name}", entry[key], (p.dtype,))
            checks.shape(op, f"{key} of {name}", buffer, tuple(p.shape), str(list(p.shape)))
            buffers.append(torch.zeros_like(p).copy_(buffer))
        return _State(int(entry["step"]), tuple(buffers))


class Adam(_Optimiser):
    """Adam over every feature, also those that no token touched, in one pass over weights and moments (AdamW with ``weight_decay``).

    Order of a step: gradient, without its component along the row for ``unit_rows``; clipping by the global norm; decay;
    Adam; rows of norm 1 again. Everything else agrees with ``torch.optim.Adam`` to rounding, and the state converts both ways. A parameter
    whose gradient is missing or None, or that is frozen (``requires_grad`` False), keeps its value, moments and step, as in torch.

    Args:
        params: a module (an ``SAE``, or ``SAEs``), or named parameters such as ``module.named_parameters()``; float32 or float64.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``; may be set between steps. For ``SAEs`` lr may be a list, one a member.
        clip: largest global norm of the gradient, or None; of each member's for ``SAEs``. ``grad_norm`` then holds that of the last step,
            before clipping: ``[]``, or ``[E]``.
        schedule: ``schedule(number of steps done)`` is a factor of ``lr``, e.g. ``warmup_linear_decay``; None: 1.
        unit_rows: names of matrices whose rows keep norm 1; None: what the module says in its attribute ``unit_rows``, or none.
        on_nonfinite: what becomes of a step whose loss is not finite, or whose gradient's norm is not or is so large (2^60 in float32, and
            with ``clip``, whose norm is float32's) that its square soon would not be; without ``clip`` a bound of the norm is looked at
            (``gradients.size``), which costs no pass over the gradient. Weights, moments, counters, and in ``step`` the module's buffers
            stay bit for bit what they were; of ``SAEs`` all members'. "raise": FloatingPointError, which names the row of the batch, or the
            parameter. "skip": go on with the next batch; ``skipped`` counts (a parameter that is not finite raises all the same). On a GPU
            "raise" does not wait: from such a step on nothing is written until ``fastsae.check()``, ``state_dict()`` or one of 1000 steps
            reads the device's flag and raises; "skip" waits for the answer in every step.

    Example:
        >>> opt = fastsae.optim.Adam(sae, lr=3e-4, clip=1.0, schedule=fastsae.optim.warmup_linear_decay(1000, 8000, 10000))
        >>> metrics = opt.step(x)
    """

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
        self.betas: tuple[float, float] = betas
        self.eps, self.weight_decay = eps, weight_decay
        super().__init__(params, lr, schedule, unit_rows, on_nonfinite)
        if clip is not None:
            clip = checks.number(op, "clip", clip)
        self.clip = clip
        self.grad_norm: Tensor | None = None

    def _move(self, jobs: Sequence[_Job], rates: Sequence[float], factors: Sequence[Tensor] | None) -> None:
        for job in jobs:
            scale = None if factors is None else factors[job.member].to(job.views[0])
            step = self._states[job.name].step
            options = (rates[job.member], *map(float, self.betas), float(self.eps), float(self.weight_decay), step, job.unit, job.unit)
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

    def _norms(self, jobs: Sequence[_Job]) -> list[Tensor] | None:
        if self.clip is None or not jobs:
            return None
        each = [[s for job in jobs if job.member == member for s in job.squares()] for member in range(self.members or 1)]
        return [torch.stack([s.to(squares[0].device, torch.float32) for s in squares]).sum().sqrt() for squares in each]

    def _factors(self, norms: list[Tensor] | None) -> list[Tensor] | None:
        """Those that bring the global norm down to ``clip``, of each member or one for all, as ``clip_grad_norm_`` has it."""
        self.grad_norm = None if norms is None else norms[0] if self.members is None else torch.stack(norms)
        return None if norms is None or self.clip is None else [(self.clip / (norm + 1e-6)).clamp_max(1.0) for norm in norms]

    def to_torch(self, **options: Any) -> torch.optim.Adam:
        """A ``torch.optim.Adam`` (``AdamW`` with a weight decay) over the same parameters with a copy of this state.

        It has no clipping, schedule or unit rows of its own. ``options`` go to its constructor, e.g. ``fused=True``. ValueError where the
        members of a stack have rates of their own: it knows one for a parameter.
        """
        if isinstance(self.lr, Sequence):
            raise ValueError(f"Adam.to_torch: lr must be one number, got {self.lr}")
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
        if isinstance(params, nn.Module):
            named: Any = params
        else:
            named = list(params)
        names = list(_named(op, named))
        if isinstance(optimizer, torch.optim.Optimizer):
            by_id = {id(p): name for name, p in _named(op, named).items()}
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


class Signum(_Optimiser):
    """Schedule-free sign descent, the default optimiser of sparsify's trainer: sign of the gradient, averaged along the way.

    The parameters hold ``y``, where gradients are taken. The sign of the gradient moves ``z`` by ``lr``, the average ``x`` of all z
    (weighted by the square of the largest rate so far) is what one keeps, and ``y = momentum * x + (1 - momentum) * z``; ``ops.signum``
    has the arithmetic. ``eval()`` puts x into the parameters, ``train()`` puts y back, as in the package ``schedulefree``. It needs one
    buffer a parameter (Adam: two) and no decay of the rate.

    Order of a step: gradient, without its component along the row for ``unit_rows``; signum; rows of norm 1 again (of y: x and z are not
    normalised, nor are they in sparsify, which normalises before each forward pass). A parameter whose gradient is missing or None, or
    that is frozen, keeps its value and z; a feature that no token touched has gradient 0: its z stays and its y moves towards z.

    Args:
        params: a module (an ``SAE``, or ``SAEs``), or named parameters such as ``module.named_parameters()``; float32 or float64.
        lr: of one step, the size by which each element of z moves; for ``SAEs`` it may be a list, one a member.
        momentum: above 0, at most 1. schedule, unit_rows, on_nonfinite: as in ``Adam``; a warm-up is the schedule that makes sense.

    Sources: Bernstein et al. 2018 (arXiv 1802.04434), Defazio et al. 2024 (arXiv 2405.15682).

    Example:
        >>> opt = fastsae.optim.Signum(sae, lr=5e-3 / (sae.d_sae / 2**14) ** 0.5)
        >>> metrics = opt.step(x)
        >>> opt.eval()  # before saving or evaluating; opt.train() before the next step
    """

    _OPTIONS = ("lr", "momentum", "lr_max", "weight_sum", "training")
    _BUFFERS = ("z",)
    _SUMS = ("lr_max", "weight_sum")

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
        self.momentum = momentum
        self.training = True
        super().__init__(params, lr, schedule, unit_rows, on_nonfinite)
        self.lr_max = [0.0] * (self.members or 1)
        self.weight_sum = [0.0] * (self.members or 1)

    def _apply(self, *args: Any) -> bool | Tensor:
        if not self.training:
            raise RuntimeError("Signum.apply: the parameters hold the average; call train() before the next step")
        return super()._apply(*args)

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
            self.parameters[name].detach().lerp_(state.buffers[0], share)
        if hasattr(self.module, "weights_changed"):
            self.module.weights_changed()  # pyright: ignore[reportOptionalMemberAccess, reportCallIssue]

    def _move(self, jobs: Sequence[_Job], rates: Sequence[float], factors: Sequence[Tensor] | None) -> None:
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

    load_state_dict.__doc__ = _Optimiser.load_state_dict.__doc__


@torch.no_grad()
def _restore(buffers: Iterable[tuple[Tensor, Tensor]], refused: bool | Tensor) -> None:
    """Puts back what buffers held, where ``refused``; a GPU's answer is not waited for."""
    if refused is False:
        return
    for buffer, before in buffers:
        buffer.copy_(before if refused is True else torch.where(refused, before, buffer))


def _checked(op: str, what: str, gradient: Any, W: Tensor) -> Any:
    """The gradient of one matrix."""
    if isinstance(gradient, TiledGradient):
        if gradient.n_features != W.shape[0]:
            raise ValueError(f"{op}: {what}.n_features must be the {W.shape[0]} rows of the weights, got {gradient.n_features}")
        return gradient
    if isinstance(gradient, Tensor):
        return gradient.reshape(W.shape), None, None, None
    return checked_gradient(op, what, gradient, W)


def _named(op: str, params: Any) -> dict[str, Tensor]:
    """Checked parameters by name."""
    if isinstance(params, Mapping) or not isinstance(params, (nn.Module, Iterable)):
        raise TypeError(f"{op}: params must be a module or named parameters, got {type(params).__name__}")
    parameters: dict[str, Tensor] = {}
    for entry in params.named_parameters() if isinstance(params, nn.Module) else params:
        if not isinstance(entry, tuple) or len(entry) != 2 or not isinstance(entry[0], str):
            raise TypeError(f"{op}: params must be a module or pairs of name and parameter, got {type(entry).__name__}")
        name, p = entry
        checks.tensor(op, name, p, DTYPES)
        if name in parameters:
            raise ValueError(f"{op}: {name!r} is given twice")
        if other := next((known for known, q in parameters.items() if q is p), None):
            raise ValueError(f"{op}: {name!r} and {other!r} are the same parameter")
        if p.dim() != 2 and not p.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous or a matrix, got {list(p.shape)} with strides {list(p.stride())}")
        checks.writable(op, name, p)
        parameters[name] = p
    if not parameters:
        raise ValueError(f"{op}: there are no parameters")
    return parameters


def _matrix(p: Tensor) -> Tensor:
    """``[rows, D]`` on the same memory; a vector or number is one row."""
    return p.detach().flatten(0, -2) if p.dim() > 1 else p.detach().view(1, p.numel())


def warmup_linear_decay(warmup: int, decay_start: int, total: int) -> Callable[[int], float]:
    """A schedule: up linearly over ``warmup`` steps, 1 until ``decay_start``, then down linearly to 0 at ``total`` steps.

    ``0 <= warmup <= decay_start <= total``. The first step has the factor ``1 / warmup``; from ``total`` on it is 0. Can be pickled.
    """
    op = "warmup_linear_decay"
    warmup = checks.integer(op, "warmup", warmup, 0)
    decay_start = checks.integer(op, "decay_start", decay_start, warmup)
    total = checks.integer(op, "total", total, decay_start)
    return partial(_warmup_linear_decay, warmup, decay_start, total)


def _warmup_linear_decay(warmup: int, decay_start: int, total: int, step: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if step < decay_start else max(0.0, (total - step) / max(total - decay_start, 1))
