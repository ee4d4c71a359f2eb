"""What the optimisers of fused steps share: parameters and their state, the forms of a gradient, steps that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from fastsae._core import checks, finite, flags, processes
from fastsae._core.world import ALONE, World
from fastsae.gradients import Gradient, StackedGradient, TiledGradient
from fastsae.optim.jobs import Job, checked, matrix, named_parameters, rows_at_a_time, sizes, unwrapped
from fastsae.reference import accumulator
from fastsae.sae.losses import Metrics

HALF = (torch.bfloat16, torch.float16)


@dataclass
class State:
    step: int
    buffers: tuple[Tensor, ...]  # of the parameter's shape, in float32 for a parameter in half precision
    dtype: torch.dtype  # of the parameter
    master: Tensor | None = None  # what a parameter in half precision is rounded from
    version: int = -1  # of the parameter when it was

    def weights(self, p: Tensor) -> Tensor:
        """What a step moves: p, or its master copy, which takes over what others have written to p since."""
        if self.master is None:
            return p.detach()
        if self.version != p._version:
            self.master.copy_(torch.where(self.master.to(p.dtype) == p, self.master, p))
        return self.master

    def round_to(self, p: Tensor) -> None:
        if self.master is not None:
            p.detach().copy_(self.master)
            self.version = p._version


class Option:
    """An attribute that is an entry of ``param_groups[0]``, where torch's schedulers write to it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, opt: Any, owner: type | None = None) -> Any:
        return self if opt is None else opt.param_groups[0][self.name]

    def __set__(self, opt: Any, value: Any) -> None:
        opt.param_groups[0][self.name] = value


class Optimiser(torch.optim.Optimizer):
    """What the optimisers share: parameters and their state, the forms of a gradient, the rate of a step.

    To torch they are optimisers with one group of parameters: ``param_groups[0]["lr"]`` (and betas, ..) may be read and set,
    ``torch.optim.lr_scheduler`` takes them (one rate for all members of ``SAEs``), and ``torch.amp.GradScaler`` where gradients come from
    ``backward()``. ``state_dict`` is their own.
    """

    lr = Option()
    _OPTIONS: tuple[str, ...]
    _BUFFERS: tuple[str, ...]
    _SUMS: tuple[str, ...] = ()  # lists that count over steps
    _COUNTED_BY_HOST: str | None = None  # what a step takes from counters of the host, beside its number

    def __init__(
        self,
        params: nn.Module | Iterable[tuple[str, Tensor]],
        options: dict[str, Any],
        schedule: Callable[[int], float] | None,
        unit_rows: Sequence[str] | None,
        on_nonfinite: Literal["raise", "skip"],
    ):
        op = f"optim.{type(self).__name__}"
        self.on_nonfinite = on_nonfinite
        self.skipped = 0
        params, rows = unwrapped(op, params)
        self.module = params if isinstance(params, nn.Module) else None
        self.members: int | None = getattr(params, "n_dictionaries", None)
        self.world: World = getattr(params, "world", ALONE)
        self.parameters = named_parameters(op, params)
        lr = options["lr"]
        super().__init__(list(self.parameters.values()), {**options, "lr": list(lr) if isinstance(lr, (tuple, list)) else lr})
        self._check_options(op)
        if schedule is not None and not callable(schedule):
            raise TypeError(f"{op}: schedule must be callable, got {type(schedule).__name__}")
        unit_rows = tuple(rows if unit_rows is None else unit_rows)
        for name in unit_rows:
            if name not in self.parameters or self.parameters[name].dim() < 2:
                matrices = [name for name, p in self.parameters.items() if p.dim() >= 2]
                raise ValueError(f"{op}: unit_rows must name matrices among {matrices}, got {name!r}")
        self.schedule, self.unit_rows = schedule, unit_rows
        self.steps = 0
        self._states: dict[str, State] = {}
        self._flag: Tensor | None = None  # on a GPU: whether a step was refused, the steps taken before it, and those of all time
        self._captured = False  # in a CUDA graph, whose replays count on the GPU alone
        self._log: list[Any] = []  # the counters before each step since that was read

    @overload
    def step(self, x: Tensor, target: Tensor | None = None, mask: Tensor | None = None, **loss_options: Any) -> Metrics: ...
    @overload
    def step(self, x: None = None) -> None: ...
    def step(  # pyright: ignore[reportIncompatibleMethodOverride] # torch's takes a closure
        self, x: Tensor | None = None, target: Tensor | None = None, mask: Tensor | None = None, **loss_options: Any
    ) -> Metrics | None:
        """One training step on ``x``: ``module.step_gradients(x, target=, mask=, **loss_options)``, then ``apply``.

        Without ``x``, after ``loss.backward()``, it is ``apply()``, as torch's are called.

        Returns: the metrics of ``step_gradients``: tensors, nothing has waited for them. None without ``x``.

        Raises: what ``step_gradients`` and ``apply`` raise; the module's buffers are then as before, too. RuntimeError: in a process group
        of several processes, whose models would not be one. TypeError: neither ``x`` nor gradients.
        """
        kind = type(self).__name__
        if x is None:
            if not self._has_gradients():
                raise TypeError(f"{kind}.step: x must be given, the rows of a fused step, or gradients, by loss.backward() before it")
            return self.apply()
        step_gradients = getattr(self.module, "step_gradients", None)
        if self.module is None or step_gradients is None:
            got = type(self.module).__name__
            raise TypeError(f"{kind}.step: needs a module with step_gradients, got {got}; use {kind}.apply(gradients)")
        if self.world.virtual == 1:
            processes.refuse(
                f"{kind}.step",
                "each would train a model of its own. For one model: shard it (fastsae.distributed), over a mesh of 1 x n where each has "
                "room for all of it, or wrap a module whose forward returns sae.loss(x).loss in DistributedDataParallel and call "
                f"{kind}.apply() after backward(). For a model of its own in each: {kind}.apply(sae.step_gradients(x)[1]), or train before "
                "the group is made",
            )
        buffers = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        try:
            with self.world.together(f"{kind}.step"):
                metrics, gradients = step_gradients(x, target=target, mask=mask, **loss_options)
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
        with self.world.together(op := f"{type(self).__name__}.apply"):
            self.world.begin(op)
            self._apply(gradients)

    @torch.no_grad()
    def _apply(
        self, gradients: Mapping[str, Gradient | None] | None, loss: Tensor | None = None, batch: tuple[Tensor | None, ...] = ()
    ) -> bool | Tensor:
        """Whether the step was refused: nothing was written then."""
        op = f"{type(self).__name__}.apply"
        self._opt_called = True  # which a scheduler of torch looks at
        self._check_ready(op)
        self._check_options(op)
        capturing = flags.capturing(next(iter(self.parameters.values())).device)
        if not capturing and (self._captured or len(self._log) >= 1000):
            self.settle()
        jobs, states = self._jobs(op, {name: p.grad for name, p in self.parameters.items()} if gradients is None else gradients)
        if capturing:
            self._check_capture(op, states)
        schedule = 1.0 if self.schedule is None else float(self.schedule(self.steps))
        rates = [lr * schedule for lr in (self.lr if isinstance(self.lr, Sequence) else [self.lr])]
        for lr in rates:
            if not 0 <= lr < float("inf"):
                raise ValueError(f"{op}: the learning rate at step {self.steps} must be finite and at least 0, got {lr}")
        norms = self._norms(jobs)
        known = sizes(jobs, self.world) if norms is None else [*norms]
        if isinstance(loss, Tensor):
            known.append((loss - loss).abs().sum())  # 0, or NaN
        settings = rates, self.steps, self.on_nonfinite, [getattr(self, name) for name in self._OPTIONS]
        taken = self.world.agree(op, finite.finite(known), settings)
        if isinstance(taken, Tensor) and self.on_nonfinite == "skip":
            taken = bool(taken)
        if taken is False:
            if self.on_nonfinite == "raise" or not self.world.agree(op, finite.spoilt(self.parameters) is None):
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
        stepped = dict.fromkeys(job.name for job in jobs)
        for name in stepped:
            self._states[name].step += 1
        self._move(jobs, rates if len(rates) > 1 else rates * (self.members or 1), factors)
        for name in stepped:
            self._states[name].round_to(self.parameters[name])
        return refused

    def _refusal(self, method: str, *batch: Tensor | None) -> str:
        return (
            f"{type(self).__name__}.{method}: step {self.steps + 1} is not finite: {finite.culprit(self.parameters, *batch)}"
            f"{'' if self.world.virtual == 1 else ' (looked for in the rows and features of this process alone)'}. "
            "Nothing has been changed; on_nonfinite='skip' leaves such batches out and counts them"
        )

    def _check_capture(self, op: str, states: Mapping[str, State]) -> None:
        """RuntimeError where a replay would not be the step that it looks like."""
        known = self._flag is not None and all(self._states.get(name) is state for name, state in states.items())
        reasons = (
            (self._COUNTED_BY_HOST, f"the host counts {self._COUNTED_BY_HOST}"),
            (self.schedule, "the host calls its schedule"),
            (self.on_nonfinite == "skip", "on_nonfinite='skip' waits for the GPU"),
            (self.world.virtual > 1, "its features are sharded"),
            (not known or len(states) < len(self._states), "one of the same parameters must run before, which makes their state"),
        )
        if reason := next((reason for holds, reason in reasons if holds), None):
            raise RuntimeError(f"{op}: a CUDA graph cannot hold this step: {reason}")
        self._captured = True

    def _counted(self, step: int) -> Tensor | None:
        """``[]`` float64: the number of a step as a CUDA graph that is being captured counts it; None: none is."""
        if self._flag is None or not flags.capturing(self._flag.device):
            return None
        return self._flag[2].to(torch.float64) + (step - self.steps)

    def _deferred(self, taken: Tensor) -> Tensor:
        """On a GPU, whose host does not wait: whether this step, or one since the last ``settle``, is refused; no step is taken from the
        first such one on."""
        if self._flag is None:
            self._flag = torch.zeros(3, dtype=torch.int32, device=taken.device)
            self._flag[2].fill_(self.steps)
            flags.watch(self)
        self._log.append((self.steps, {name: s.step for name, s in self._states.items()}, [list(getattr(self, n)) for n in self._SUMS]))
        bad, counts = self._flag[0], self._flag[1:]
        bad.logical_or_(taken.logical_not())
        counts.add_(bad == 0)
        return bad != 0

    def settle(self) -> None:
        """FloatingPointError where a step on a GPU was refused since the last call, which this waits for; counters are then those before
        it, as weights, moments and buffers are. Where a CUDA graph holds a step, they are the GPU's, which counts replays."""
        log, self._log = self._log, []
        if self._flag is None or not (log or self._captured):
            return
        bad, count, total = self._flag.tolist()
        self._flag[:2].zero_()
        if self._captured:
            ahead, self.steps = total - self.steps, total
            self._states = {name: replace(state, step=state.step + ahead) for name, state in self._states.items()}
            if bad:
                raise FloatingPointError(f"{self._refusal('step')}. It, and all after it, were not taken")
        elif bad:
            self.steps, steps, sums = log[count]
            self._states = {name: replace(self._states[name], step=step) for name, step in steps.items()}
            for name, value in zip(self._SUMS, sums):
                setattr(self, name, value)
            raise FloatingPointError(f"{self._refusal('step')}. {len(log) - count - 1} steps after it were not taken either")

    def _move(self, jobs: Sequence[Job], rates: Sequence[float], factors: Sequence[Tensor] | None) -> None:
        """The step itself; ``rates`` and ``factors`` by member."""
        raise NotImplementedError

    def _fresh(self, p: Tensor) -> tuple[Tensor, ...]:
        """The buffers of a parameter before its first step."""
        raise NotImplementedError

    def _check_ready(self, op: str) -> None:
        """RuntimeError where the parameters are not those that a step is taken from."""

    def _check_options(self, op: str) -> None:
        for name in self._OPTIONS:  # a checkpoint holds no NumPy numbers
            value = getattr(self, name, None)
            setattr(self, name, type(value)(map(checks.plain, value)) if isinstance(value, (tuple, list)) else checks.plain(value))
        lr = self.lr
        finite.policy(op, self.on_nonfinite)
        if isinstance(lr, (tuple, list)) and len(lr) != (self.members or 1):
            raise ValueError(f"{op}: lr must be a number, or one for each of {self.members or 1} dictionaries, got {len(lr)}")

    def _norms(self, jobs: Sequence[Job]) -> list[Tensor] | None:
        """The gradient's norm, or each member's, where it is needed; else None."""
        return None

    def _factors(self, norms: list[Tensor] | None) -> list[Tensor] | None:
        """Factors of the gradients, or None."""
        return None

    def _jobs(self, op: str, gradients: Mapping[str, Gradient | None]) -> tuple[list[Job], dict[str, State]]:
        """The parameters to step, everything checked, and their state, made where it is new."""
        if unknown := [name for name in gradients if name not in self.parameters]:
            raise ValueError(f"{op}: unknown parameter {unknown[0]!r}; known: {', '.join(self.parameters)}")
        jobs, fresh = [], {}
        for name, gradient in gradients.items():
            p = self.parameters[name]
            if gradient is None or (isinstance(p, nn.Parameter) and not p.requires_grad):
                continue
            checks.tensor(op, name, p)
            if self.module is not None and getattr(self.module, name, p) is not p:
                raise ValueError(f"{op}: {name} of the module is another parameter now: make the optimiser after changing a module")
            state = self._states.get(name) or self._first_state(p)
            was_of = {"dtype": state.dtype, "device": state.buffers[0].device, "shape": state.buffers[0].shape}
            for what, was in was_of.items():
                now = getattr(p, what)
                if was != now:
                    error = ValueError if what == "shape" else TypeError
                    raise error(f"{op}: {name} was {was} at its first step and is {now} now: make the optimiser after changing a module")
            fresh[name] = state
            what, unit = f"gradient of {name}", name in self.unit_rows
            if isinstance(gradient, Tensor):
                checks.tensor(op, what, gradient, checks.beside(p), p)
                checks.shape(op, what, gradient, tuple(p.shape), str(list(p.shape)))
            if isinstance(gradient, StackedGradient):
                if self.members is None or gradient.n != self.members:
                    raise ValueError(f"{op}: {what} has {gradient.n} members, the module {self.members or 'is no stack'}")
                joint = gradient.joint
                fits = not isinstance(joint, TiledGradient) or joint.block <= rows_at_a_time(p.shape[-1])
                if joint is not None and fits and not self._by_member:
                    gradient = joint
            stacks = (state.weights(p), *state.buffers)
            if self.members is not None and (self._by_member or isinstance(gradient, StackedGradient)):
                of = gradient.part if isinstance(gradient, StackedGradient) else gradient.__getitem__  # pyright: ignore[reportAttributeAccessIssue]
                parts = ((*(t[e] for t in stacks), of(e), e) for e in range(self.members))
            else:
                parts = ((*stacks, gradient, 0),)
            for *each, g, e in parts:
                views = tuple(map(matrix, each))
                jobs.append(Job(op, name, views, checked(op, what, g, views[0]), unit, e, each[0].dim() == 1))
        jobs.sort(key=lambda job: job.member)  # a member's tiles of both weights are then asked for one after the other
        return jobs, fresh

    def _first_state(self, p: Tensor) -> State:
        master = p.detach().to(torch.float32) if p.dtype in HALF else None
        return State(0, self._fresh(p if master is None else master), p.dtype, master)

    @property
    def _by_member(self) -> bool:
        """Whether the members of a stack are stepped one by one: where rates differ, or each is cut by feature."""
        differ = isinstance(self.lr, Sequence) and len(set(self.lr)) > 1
        return self.members is not None and (differ or self.world.virtual > 1)

    def state_dict(self) -> dict[str, Any]:
        """``steps``, the options, and ``state``: step, moments and master copy by parameter name. A schedule is a function and not in it;
        ``group`` is what a scheduler of torch keeps in ``param_groups``."""
        self.settle()
        state = {name: self._entry(s) for name, s in self._states.items()}
        group = {name: value for name, value in self.param_groups[0].items() if name not in self.defaults and name != "params"}
        options = {name: getattr(self, name) for name in self._OPTIONS}
        return {"steps": self.steps, **options, "state": state, **({"group": group} if group else {})}

    def _entry(self, s: State) -> dict[str, Any]:
        return {"step": s.step, **dict(zip(self._BUFFERS, s.buffers)), **({} if s.master is None else {"master": s.master})}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what ``state_dict`` gave, options included; the next step gives the bits it would have given there."""
        kind = type(self).__name__
        op = f"{kind}.load_state_dict"
        if missing := [name for name in ("steps", *self._OPTIONS, "state") if name not in state_dict]:
            raise ValueError(f"{op}: not a state of fastsae.optim.{kind}: {missing[0]!r} is missing")
        group = state_dict.get("group", {})
        if not isinstance(group, Mapping) or {"params", *self.defaults} & set(group):
            raise ValueError(f"{op}: group must be what a scheduler keeps in param_groups, got {group!r}")
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
        self.param_groups[0].update(group)
        if self._flag is not None:
            self._flag.zero_()
            self._flag[2].fill_(steps)

    def room(self, name: str) -> dict[str, Tensor]:
        """What a state holds of a parameter, in its shape, to be filled."""
        if name not in self.parameters:
            raise ValueError(f"{type(self).__name__}: unknown parameter {name!r}; known: {', '.join(self.parameters)}")
        return {key: torch.empty_like(self.parameters[name]) for key in self._BUFFERS}

    def _checked_state(self, op: str, name: str, entry: Mapping[str, Any]) -> State:
        if name not in self.parameters:
            raise ValueError(f"{op}: unknown parameter {name!r}; known: {', '.join(self.parameters)}")
        p = self.parameters[name]
        wide = accumulator(p.dtype)
        held: dict[str, Tensor] = {}
        for key in (*self._BUFFERS, *(("master",) if "master" in entry else ())):
            buffer = checks.tensor(op, f"{key} of {name}", entry[key], checks.beside(p))
            checks.shape(op, f"{key} of {name}", buffer, tuple(p.shape), str(list(p.shape)))
            held[key] = torch.zeros_like(p, dtype=wide).copy_(buffer)
        if "master" in held and p.dtype not in HALF:
            raise TypeError(f"{op}: {name} must have a half-precision dtype, whose master copy the state holds, got {p.dtype}")
        state = self._first_state(p)
        return replace(
            state, step=int(entry["step"]), buffers=tuple(held[key] for key in self._BUFFERS), master=held.get("master", state.master)
        )

    # ------------------------------------------------------------ what torch expects of an optimiser

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """By parameter, as torch's: ``step`` (a copy) and the buffers themselves, which may be written to between steps."""
        return {self.parameters[name]: self._entry(s) for name, s in self._states.items()}

    @state.setter
    def state(self, value: object) -> None:  # pyright: ignore[reportIncompatibleVariableOverride] # torch's is an attribute
        """torch's constructor sets an empty one."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """NotImplementedError: there is one group, made by the constructor."""
        if self.param_groups:
            raise NotImplementedError(
                f"{type(self).__name__}.add_param_group: parameters are stepped by name, in one group (a module's steps and clip need all "
                "of them): name all in the constructor, or make an optimiser for those of another rate"
            )
        self.param_groups.append({**self.defaults, **param_group})

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for p in self.parameters.values())

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What GradScaler.step asks first, and nobody else: RuntimeError where there is nothing to unscale."""
        if not self._has_gradients():
            raise RuntimeError(
                "GradScaler.step: there are no gradients, by scaler.scale(loss).backward(). A fused step forms its own, whose sums are in "
                f"float32 and need no scale: call {type(self).__name__}.step(x) without the scaler"
            )
        return False

    def __getstate__(self) -> dict[str, Any]:
        """All of it, for copies and pickles; a scheduler's wrapper around ``step`` stays with the scheduler."""
        return {name: value for name, value in self.__dict__.items() if name != "step"}


@torch.no_grad()
def _restore(buffers: Iterable[tuple[Tensor, Tensor]], refused: bool | Tensor) -> None:
    """Puts back what buffers held, where ``refused``; a GPU's answer is not waited for."""
    if refused is False:
        return
    for buffer, before in buffers:
        buffer.copy_(before if refused is True else torch.where(refused, before, buffer))
