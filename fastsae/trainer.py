"""Training loop: small enough to read in one sitting, and to replace by your own."""

# pyright: reportPrivateUsage=false
# ``fit_all`` takes apart what ``Trainer.fit`` does.

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fastsae._core import checks, finite, processes
from fastsae._core.progress import Bar
from fastsae.batches import Batches, check_batches, chosen, endless, in_roles, without_high_norms
from fastsae.gradients import norm
from fastsae.optim.jobs import sae_in
from fastsae.optim.optimiser import Optimiser
from fastsae.sae import checkpoints
from fastsae.sae.cross_layer import CrossLayerTranscoder
from fastsae.sae.losses import Metrics
from fastsae.sae.module import SAE
from fastsae.sae.stack import SAEs


def linear(start: float, end: float, steps: int) -> Callable[[int], float]:
    """From ``start`` to ``end`` in ``steps`` steps, then constant: for ``Trainer(anneal={"k": linear(256, 64, 1000)})``."""
    return lambda step: start + (end - start) * min(step / max(steps, 1), 1.0)


_MOST_SKIPPED = 100  # batches in a row


class Fused(Protocol):
    """An optimiser that does all of a step: ``optim.Adam``, or one of your own."""

    def step(self, x: Tensor, *, target: Tensor | None, mask: Tensor | None) -> Metrics: ...


class Trainer:
    """Trains an SAE, crosscoder or cross-layer transcoder with any torch optimiser, or with a fused one.

    Args:
        sae: the module, or what holds one (``torch.compile(sae)``, ``DataParallel(sae)``), whose steps are taken past the wrapper.
        opt: a torch optimiser over its parameters (the loss goes through autograd, the decoder's rows of ``sae.unit_rows`` stay of norm
            1), or an object with ``step(x, target=, mask=) -> Metrics`` that does all of it.
        schedule: factor of each group's learning rate at a step, e.g. ``fastsae.optim.warmup_linear_decay(500, 8_000, 10_000)``; a fused
            optimiser has its own.
        scheduler: of ``torch.optim.lr_scheduler``, over ``opt``, in place of a schedule: stepped after every step that was taken, its state
            is kept in the checkpoint. (ReduceLROnPlateau needs a metric: step it in ``callback``.)
        anneal: attributes of ``sae`` as functions of the step: ``{"k": linear(256, 64, 1000), "l1": ...}``.
        clip: largest norm of all gradients together (torch optimisers).
        reduce: called with the parameters between backward and step. None: in a process group of several a torch optimiser's gradients
            are averaged over its processes, each with as much weight as it has rows that count, ``silent`` counts the rows of all, and the
            first step starts from rank 0's weights and buffers (BatchTopK and fused optimisers raise RuntimeError: shard the SAE,
            ``fastsae.distributed``). ``lambda parameters: None``: each process trains a model of its own. In one model all processes take
            as many batches, the same steps and decisions; rank 0 saves; loss, fvu and l0 are those of each process's rows.
        max_norm: rows of a batch (of several layers: side by side) do not count whose norm is above ``max_norm`` times the median of the
            norms of those that the mask counts (of an even number of them, of the lower of the two in the middle): first tokens and
            attention sinks, whose norm is tens of times that of others. They are left to the mask, so that a batch keeps its size and they
            count in nothing; a row of exactly this norm stays. So does one whose norm is not finite, which ``on_nonfinite`` is for. Norms
            are float32's (float64 stays).
        on_nonfinite: what becomes of a batch whose loss, or whose gradient's norm (or its square), is not finite; a fused optimiser has
            its own. Parameters, optimiser, buffers, attributes under ``anneal`` and counters stay bit for bit what they were. "raise" (the
            default): FloatingPointError with the step and the row. "skip": go on with the next batch, as if this one had not come;
            ``skipped`` counts them, in the metrics and the progress line too. With torch optimisers a GPU's answer is waited for in
            every step.
        callback: called with ``(step, metrics)`` every ``log_every`` steps and at the last one; metrics are floats: loss, fvu, l0, dead,
            skipped (batches), left_out (rows that did not count, by mask or ``max_norm``, in all steps so far).
        checkpoint: file to save to, every ``every`` steps and at the end (by rank 0 where torch.distributed is used); of the SAE of
            ``distributed.shard`` a folder that all processes see, written by ``async_save_checkpoint`` while training goes on. What fails
            there is raised by the next save, RuntimeError, or where ``fit`` ends, OSError.
        progress: a tqdm bar where tqdm is installed, else lines on stderr.

    Raises: TypeError, ValueError: wrong arguments, an ``opt`` over other parameters than those of ``sae``. IsADirectoryError:
    ``checkpoint`` is a folder.
    """

    def __init__(
        self,
        sae: SAE | CrossLayerTranscoder | torch.nn.Module,
        opt: torch.optim.Optimizer | Fused,
        *,
        schedule: Callable[[int], float] | None = None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        anneal: Mapping[str, Callable[[int], float]] | None = None,
        clip: float | None = None,
        max_norm: float | None = None,
        reduce: Callable[[list[Tensor]], object] | None = None,
        on_nonfinite: Literal["raise", "skip"] | None = None,
        callback: Callable[[int, dict[str, float]], object] | None = None,
        log_every: int = 100,
        checkpoint: str | os.PathLike[str] | None = None,
        every: int = 1000,
        progress: bool = True,
    ):
        found: Any = sae
        if isinstance(found, torch.nn.Module):
            _, found = sae_in("Trainer", found)
        if isinstance(found, SAEs):
            raise TypeError("Trainer: sae must be one SAE, got SAEs; loop over opt.step(x)")
        checks.instance("Trainer", "sae", found, (SAE, CrossLayerTranscoder), "an SAE or a CrossLayerTranscoder")
        self.sae: SAE | CrossLayerTranscoder = found
        given: Any = opt
        if isinstance(given, type) or not callable(getattr(given, "step", None)):
            got = given if isinstance(given, type) else type(given).__name__
            raise TypeError(f"Trainer: opt must be an optimiser with a step method, got {got}")
        self.fused = "target" in inspect.signature(opt.step).parameters
        for name, value in (("schedule", schedule), ("clip", clip), ("reduce", reduce), ("on_nonfinite", on_nonfinite)):
            if self.fused and value is not None:
                raise ValueError(f"Trainer: {name} is for torch optimisers; give {type(opt).__name__} its own")
        for name, value in (("log_every", log_every), ("every", every)):
            checks.integer("Trainer", name, value, 1)
        for name, function in (anneal or {}).items():
            if not hasattr(self.sae, name):
                raise ValueError(f"Trainer: anneal must name attributes of the SAE, got {name!r}")
            if not callable(function):
                raise TypeError(f"Trainer: anneal[{name!r}] must be a function of the step, got {type(function).__name__}")
        if not _steps_any(opt, self.sae):
            raise ValueError(f"Trainer: opt must step parameters of sae, got {type(opt).__name__} over others")
        _check_scheduler(scheduler, opt, schedule or getattr(opt, "schedule", None))
        if self.sharded and not self.fused:
            raise TypeError(f"Trainer: opt must be fused, as optim.Adam, for a sharded SAE, got {type(opt).__name__}")
        clip = None if clip is None else checks.number("Trainer", "clip", clip)
        self.max_norm = None if max_norm is None else checks.number("Trainer", "max_norm", max_norm)
        self.opt: Any = opt  # of either kind, which ``fused`` tells
        self.scheduler, self.left_out = scheduler, 0
        self.schedule, self.anneal, self.clip, self.reduce = schedule, dict(anneal or {}), clip, reduce
        self.on_nonfinite = finite.policy("Trainer", on_nonfinite or "raise")
        self.callback, self.log_every, self.progress = callback, log_every, progress
        self.checkpoint, self.every = None if checkpoint is None else self._files.file_of("Trainer", checkpoint), every
        self._saving: Any = None  # the last save, a future where it is made in the background
        self.step = self.skipped = 0
        self._alike = False  # whether processes that average have started from the same weights

    def fit(self, batches: Iterable[Any], steps: int | None = None, *, resume: bool = False) -> dict[str, float]:
        """Trains on batches until step ``steps`` (counted from the very first, over resumes; None: until the batches end).

        Args:
            batches: ``x [.., D]``, ``(x, target)``, ``(x, target, mask)`` or ``{"x": .., "target": .., "mask": ..}`` each, of the shapes
                that the module's ``loss`` takes; iterated again where it ends before ``steps``. Stored activations: ``Batches(x,
                size=..)``. One with ``state_dict`` and ``load_state_dict`` (``Batches``, a stateful loader) goes on where the checkpoint
                was taken; another is the caller's to position.
            resume: go on from the checkpoint file where there is one: the bits are those of the uninterrupted run on the same instruction
                set level (``fastsae info``, FASTSAE_ISA) with the same ``torch.get_num_threads()``. Levels from avx2 on have the same bits,
                portable its own; the number of threads shows in the dense regime, whose products are torch's.

        Returns: the metrics of the last step; empty where there was none to take.

        Raises: TypeError: ``batches`` is one tensor, or a batch is nothing of the above. ValueError: batches that end before ``steps`` and
        give no more; ``resume`` without a ``checkpoint``, or from a file that is damaged or does not fit. FloatingPointError: see
        ``on_nonfinite``; under "skip" where 100 batches in a row, or without ``steps`` all of them, have been skipped; the checkpoint stays
        the last good one. RuntimeError: processes of a group that cannot train one model.
        """
        op = "Trainer.fit"
        check_batches(op, batches)
        if steps is not None:
            steps = checks.integer(op, "steps", steps, 0)
        self._begin(op, resume, batches)
        with Bar(self.progress, steps, self.step) as bar, self._late():
            for batch in endless(op, batches, steps, lambda: self.step, lambda: self.skipped):
                before = self.step
                shown = self._take(op, batch, steps, batches)
                bar.update(self.step - before)
                if shown:
                    bar.show(_summary(self._last))
            self._end(op, steps, batches)
        return self._last

    @property
    def sharded(self) -> bool:
        """Whether the processes of a group hold one dictionary (``fastsae.distributed``)."""
        return self.sae.world.virtual > 1

    @property
    def _files(self) -> Any:
        """How checkpoints are written and read."""
        return getattr(self.sae, "checkpoints", checkpoints)

    def _stored(self) -> bool:
        return self.checkpoint is not None and self._files.exists(self.checkpoint)

    def _begin(self, op: str, resume: bool, batches: Any = None) -> None:
        """What comes before the first batch."""
        if resume and self.checkpoint is None:
            raise ValueError(f"{op}: resume needs a file to go on from, Trainer(checkpoint=..)")
        if not self.sharded and (alone := int(os.environ.get("WORLD_SIZE") or 1)) > 1 and not processes.grouped():
            file = "" if self.checkpoint is None else f" and writes {self.checkpoint}"
            warnings.warn(
                f"{op}: WORLD_SIZE is {alone} and there is no process group: each process trains a model of its own{file}. For one model "
                "call torch.distributed.init_process_group(); otherwise give each process its own file",
                stacklevel=3,
            )
        self.sae.train()
        self._last: dict[str, float] = {}
        self._result: dict[str, Tensor] = {}
        self._alike = False
        self._row = 0  # batches skipped, one after the other
        if resume and self._stored():
            self.load(self.checkpoint, batches)  # pyright: ignore[reportArgumentType] # which is there
        if resume:
            self._check_alike()

    def _take(self, op: str, batch: Any, steps: int | None, batches: Any) -> bool:
        """A batch, and what is due after it: metrics (True where they have been read), the checkpoint."""
        skipped = self.skipped
        result = self.train_step(*in_roles(batch, self.sae.b_dec.device))
        if self.skipped > skipped:
            self._row += 1
            if self._row >= _MOST_SKIPPED:
                raise FloatingPointError(f"{op}: after step {self.step} {self._row} batches in a row were not finite and have been skipped")
            return False
        self._result, self._row = result, 0
        self.step += 1
        final = self.step == steps
        if shown := final or self.step % self.log_every == 0:
            self._last = self._read(result)
            if self.callback is not None:
                self.callback(self.step, self._last)
        if self.checkpoint is not None and (final or self.step % self.every == 0):
            self._keep(batches)
        return shown

    def _end(self, op: str, steps: int | None, batches: Any) -> None:
        """What comes after the last batch where their number decided."""
        if steps is None and not self._result and self._row:
            raise FloatingPointError(f"{op}: no step has been taken: none of the {self._row} batches was finite")
        if steps is None and self._result:
            self._last = self._read(self._result)
            if self.checkpoint is not None:
                self._keep(batches)

    @contextlib.contextmanager
    def _late(self) -> Generator[None]:
        """Where a GPU says late that a step was refused, ``step`` goes back with the optimiser's counter. Waits for the last save."""
        ahead = self.step - getattr(self.opt, "steps", 0)
        try:
            yield
        except FloatingPointError:
            if isinstance(self.opt, Optimiser):
                self.step = ahead + self.opt.steps
            self._written()
            raise
        self._written()

    def _keep(self, batches: Any) -> None:
        """A checkpoint, of a sharded SAE in the background."""
        how = self._files.async_save_checkpoint if self.sharded else self._files.save_checkpoint
        self._saving = self._save(how, self.checkpoint, batches)

    def _written(self) -> None:
        self._saving, last = None, self._saving
        if isinstance(last, Future):
            last.result()

    def _read(self, result: dict[str, Tensor]) -> dict[str, float]:
        """Metrics as numbers: with a fused optimiser the only wait for a device, and where one says that a step was not finite."""
        if isinstance(self.opt, Optimiser):
            self.opt.settle()
        read = {name: float(value) for name, value in result.items()}
        if self.fused and read["loss"] - read["loss"] != 0:  # of an optimiser that knows no policy
            raise FloatingPointError(f"Trainer.fit: the loss of step {self.step} is {read['loss']}")
        return {**read, "skipped": self.skipped, "left_out": int(self.left_out)}

    def train_step(self, x: Tensor, target: Tensor | None = None, mask: Tensor | None = None) -> dict[str, Tensor]:
        """One step; the metrics as 0-d tensors. It has not been taken where ``skipped`` counts one more."""
        if self.fused and not self.sharded:
            processes.refuse(
                "Trainer.train_step",
                "each would train a model of its own: shard the SAE (fastsae.distributed), over a mesh of 1 x n where each process has "
                "room for all of it, or give Trainer a torch optimiser, whose gradients it averages",
            )
        if self.max_norm is not None:
            layered = x.shape[-2:] == (self.sae.n_layers, getattr(self.sae, "d_model", None))
            mask = without_high_norms(x.flatten(-2) if layered else x, mask, self.max_norm)
        annealed = {name: getattr(self.sae, name) for name in self.anneal}
        skipped = self.skipped
        try:
            for name, value in self.anneal.items():
                setattr(self.sae, name, value(self.step))
            if self.fused:
                before = getattr(self.opt, "skipped", 0)
                metrics = self.opt.step(x, target=target, mask=mask)._asdict()
                self.skipped += getattr(self.opt, "skipped", 0) - before
            else:
                metrics = self._autograd_step(x, target, mask)
            if skipped == self.skipped and mask is not None:
                self.left_out = self.left_out + (mask == 0).sum()
            if skipped == self.skipped and self.scheduler is not None:
                self.scheduler.step()
            return metrics
        except BaseException:
            skipped = -1
            raise
        finally:
            if skipped != self.skipped:
                for name, value in annealed.items():
                    setattr(self.sae, name, value)

    def _autograd_step(self, x: Tensor, target: Tensor | None, mask: Tensor | None) -> dict[str, Tensor]:
        rate = 1.0 if self.schedule is None else self.schedule(self.step)
        if not 0 <= rate < float("inf"):
            raise ValueError(f"Trainer: schedule must give a finite factor of at least 0, got {rate} at step {self.step}")
        shared = processes.ranks() > 1
        self.sae.averaged = averaged = shared and self.reduce is None
        if averaged and not self._alike:
            for t in self.sae.state_dict().values():
                torch.distributed.broadcast(t, 0)
            self.sae.buffers_changed()
            self._alike = True
        buffers = [(buffer, buffer.clone()) for buffer in self.sae.buffers()]
        refused = True
        try:
            self.opt.zero_grad()
            result = self.sae.loss(x, target, mask=mask)
            result.loss.backward()
            parameters: list[Tensor] = [p for p in self.sae.parameters() if p.grad is not None]
            loss = result.loss.detach()
            if shared and not bool(loss.isfinite()):  # into the gradients, which all processes see
                for p in parameters:
                    p.grad.fill_(torch.nan)  # pyright: ignore[reportOptionalMemberAccess]
            if self.reduce is not None:
                self.reduce(parameters)
            elif averaged:
                _average(parameters, x.shape[:-1].numel() if mask is None else mask.sum())
            unit = self.sae if isinstance(self.sae, SAE) and self.sae.unit_rows else None
            if unit is not None:
                unit.remove_parallel_gradient_()
            sizes = [norm(p.grad) for p in parameters if p.grad is not None] + ([] if shared else [(loss - loss).abs()])
            refused = not bool(finite.finite(sizes))
        finally:
            self.sae.averaged = False
            if refused:
                self.opt.zero_grad()
                for buffer, before in buffers:
                    buffer.copy_(before)
        named = dict(self.sae.named_parameters())
        if refused and (self.on_nonfinite == "raise" or finite.spoilt(named)):
            reason = finite.culprit(named, x, target, mask) + (" (looked for in this process's rows alone)" if shared else "")
            raise FloatingPointError(
                f"Trainer: step {self.step + 1} is not finite: {reason}. Nothing has been changed; "
                "on_nonfinite='skip' leaves such batches out and counts them"
            )
        if refused:
            self.skipped += 1
        else:
            if self.clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, self.clip)
            for group in self.opt.param_groups if self.schedule is not None else ():
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * rate
            self.opt.step()
            if unit is not None:
                unit.normalise_decoder_()
        return {"loss": loss, "fvu": result.fvu, "l0": result.l0, "dead": self.sae.dead_features.sum()}

    def save(self, path: str | os.PathLike[str], batches: Any = None) -> None:
        """A checkpoint of module, optimiser, step, torch's random state and the position in ``batches``; in a process group rank 0's, and
        by it alone. FloatingPointError: a parameter is not finite; the file stays what it was."""
        self._save(self._files.save_checkpoint, path, batches)

    def _save(self, how: Callable[..., Any], path: Any, batches: Any) -> Any:
        if processes.rank() != 0 and not self.sharded:
            return None
        reason = finite.spoilt(dict(self.sae.named_parameters()))
        if not self.sae.world.agree("Trainer.save", reason is None):
            reason = reason or "a parameter on another process is not finite"
            raise FloatingPointError(f"Trainer.save: {reason}; {path} has not been touched")
        extra = {"step": self.step, "rng": torch.get_rng_state(), "skipped": self.skipped, "left_out": int(self.left_out)}
        if self.scheduler is not None:
            extra["scheduler"] = {"class": type(self.scheduler).__name__, "state": self.scheduler.state_dict()}
        if hasattr(batches, "state_dict"):
            extra["data"] = batches.state_dict()
        return how(path, self.sae, self.opt, extra)

    def load(self, path: str | os.PathLike[str], batches: Any = None) -> None:
        """Goes on from a checkpoint of ``save``; errors as ``load_checkpoint``, ValueError also where the file knows no step. After an
        error module, optimiser, batches and random state are what they were.

        In a process group the file holds rank 0's position: the other ranks' ``Batches``, which are as long, go there in an order of their
        own seed, their random state stays, and they count silent features on from rank 0's. RuntimeError for other batches with a state,
        whose position is each rank's to restore.
        """

        def also(extra: dict[str, Any]) -> None:
            if missing := [name for name in ("step", "rng") if name not in extra]:
                raise ValueError(f"Trainer.load: {path} was not written by a Trainer: extra holds no {missing[0]!r}")
            try:
                for name in ("step", "skipped", "left_out"):
                    checks.integer("its extra", name, extra.get(name, 0), 0)
                scheduler = extra.get("scheduler", {"class": None, "state": {}})
                ours = None if self.scheduler is None else type(self.scheduler).__name__
                if scheduler["class"] != ours or (self.scheduler and set(scheduler["state"]) != set(self.scheduler.state_dict())):
                    raise ValueError(f"its scheduler is {scheduler['class']}, the trainer's {ours}")
                torch.Generator().set_state(extra["rng"])
                data = dict(extra.get("data", {}))
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"Trainer.load: {path} is damaged or of something else: {error}") from error
            if "data" in extra and hasattr(batches, "load_state_dict"):
                if not isinstance(batches, Batches):
                    processes.refuse(
                        "Trainer.load",
                        f"{path} holds the position of rank 0 alone: restore that of {type(batches).__name__} on each, and hand fit an "
                        "iterable without load_state_dict",
                    )
                batches.load_state_dict({**data, **({"seed": batches.seed} if processes.rank() else {})})

        extra = self._files.restore(path, self.sae, self.opt, also=also).extra
        self.step, self.skipped, self.left_out = extra["step"], extra.get("skipped", 0), extra.get("left_out", 0)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(extra["scheduler"]["state"])
        if processes.rank() == 0:
            torch.set_rng_state(extra["rng"])

    def _check_alike(self) -> None:
        """RuntimeError where processes would go on from different steps, as where one does not see the file."""
        if (n := processes.ranks()) > 1 and not self.sharded:
            steps: list[Any] = [None] * n
            torch.distributed.all_gather_object(steps, self.step)
            if len(set(steps)) > 1:
                raise RuntimeError(f"Trainer.fit: resume must find {self.checkpoint} on all ranks, which are at the steps {steps} now")


def _average(parameters: Sequence[Tensor], rows: int | Tensor) -> None:
    """Of the gradients of all processes, by their numbers of rows."""
    own = parameters[0].new_tensor(float(rows), dtype=torch.float32)
    whole = own.clone()
    torch.distributed.all_reduce(whole)
    for p in parameters:
        torch.distributed.all_reduce(p.grad.mul_(own / whole.clamp_min(1)))  # pyright: ignore[reportOptionalMemberAccess] # they have one


def fit_all(
    trainers: Mapping[str, Trainer],
    batches: Iterable[Any],
    steps: int | None = None,
    *,
    columns: Mapping[str, str | Mapping[str, str]] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Trains several dictionaries, of any sizes and hook points, in one pass: every batch is read once and goes to all of them.

    Each ends in the bits that ``trainer.fit`` over the same batches gives it alone, with its own optimiser, callback and checkpoint.

    Args:
        trainers: by name; each with a checkpoint of its own, or none.
        batches, steps: as in ``Trainer.fit``.
        columns: of a batch that is a dictionary, what each trainer takes: the name of its x, or ``{"x": .., "target": .., "mask": ..}``;
            a mask that is not named is the column "mask" where there is one. None: all of the batch, as ``Trainer.fit`` takes it.
            ``shards.batches(size, ["layer_5", "layer_11"])`` gives such batches.
        resume: each goes on from its checkpoint where there is one. Files may be of different steps, as after a crash: batches go on where
            the one furthest behind was, and the others wait until it has come to them. (Batches without a state are the caller's to
            position there.)
        progress: one bar for all; the trainers' own are not shown.

    Returns: the metrics of each one's last step.

    Raises: as ``Trainer.fit``; a FloatingPointError says whose step it was. ValueError: no trainers, two of one file, a column that the
    batch does not have.
    """
    op = "fit_all"
    check_batches(op, batches)
    steps = None if steps is None else checks.integer(op, "steps", steps, 0)
    files = [trainer.checkpoint for trainer in trainers.values() if trainer.checkpoint is not None]
    if not trainers or len(set(files)) < len(files) or len({id(trainer.sae) for trainer in trainers.values()}) < len(trainers):
        raise ValueError(f"{op}: trainers must be at least one, each of an SAE and a checkpoint of its own, got {', '.join(trainers)}")
    if columns is not None and set(columns) != set(trainers):
        raise ValueError(f"{op}: columns must name {', '.join(trainers)}, got {', '.join(columns)}")
    for trainer in trainers.values():
        trainer._begin(op, resume)
    waiting = dict.fromkeys(trainers, 0)  # batches that a trainer has seen already
    if resume:
        last = min(trainers.values(), key=lambda trainer: trainer.step + trainer.skipped)
        if last._stored():
            last.load(last.checkpoint, batches)  # pyright: ignore[reportArgumentType] # which is there
        waiting = {name: trainer.step + trainer.skipped - last.step - last.skipped for name, trainer in trainers.items()}

    def done() -> int:
        return min(trainer.step for trainer in trainers.values())

    with Bar(progress, steps, done()) as bar, contextlib.ExitStack() as late:
        for trainer in trainers.values():
            late.enter_context(trainer._late())
        for batch in endless(op, batches, steps, done, lambda: sum(trainer.skipped for trainer in trainers.values())):
            before, shown = done(), False
            for name, trainer in trainers.items():
                waiting[name] -= 1
                if waiting[name] < 0 and trainer.step != steps:
                    try:
                        shown |= trainer._take(op, batch if columns is None else chosen(op, batch, columns[name]), steps, batches)
                    except FloatingPointError as error:
                        raise FloatingPointError(f"{op}: {name}: {error}") from error
            bar.update(done() - before)
            if shown:
                bar.show("; ".join(f"{name}: {_summary(trainer._last)}" for name, trainer in trainers.items() if trainer._last))
        for trainer in trainers.values():
            trainer._end(op, steps, batches)
    return {name: trainer._last for name, trainer in trainers.items()}


def _check_scheduler(scheduler: Any, opt: Any, schedule: object) -> None:
    if scheduler is None:
        return
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError("Trainer: scheduler must step without a metric: step ReduceLROnPlateau in callback=")
    if not all(callable(getattr(scheduler, name, None)) for name in ("step", "state_dict", "load_state_dict")):
        raise TypeError(f"Trainer: scheduler must be one of torch.optim.lr_scheduler, got {type(scheduler).__name__}")
    if getattr(scheduler, "optimizer", opt) is not opt:
        raise ValueError("Trainer: scheduler must be over opt, got one over another optimiser")
    if schedule is not None:
        raise ValueError("Trainer: schedule and scheduler must not both be given")


def _steps_any(opt: Any, sae: torch.nn.Module) -> bool:
    """Whether an optimiser holds a parameter of the module, as far as it says which it holds."""
    held = getattr(opt, "parameters", None)  # by name in optim
    if isinstance(held, Mapping):
        held = held.values()
    else:
        held = [p for group in getattr(opt, "param_groups", ()) for p in group["params"]]
        if not held:
            return True
    ours = {id(p) for p in sae.parameters()}
    return any(id(p) in ours for p in held)


def _summary(metrics: dict[str, float]) -> str:
    text = f"FVU {metrics['fvu']:.3f}, L0 {metrics['l0']:.1f}, dead {metrics['dead']:.0f}"
    text += f", {metrics['skipped']:.0f} skipped" if metrics["skipped"] else ""
    return text + (f", {metrics['left_out']:.0f} rows left out" if metrics["left_out"] else "")
