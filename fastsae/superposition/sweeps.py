"""Many small dictionaries on one source of data, trained until they have converged, as a data frame."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from multiprocessing import current_process
from threading import Thread
from typing import Any, Literal

import torch
from torch import Tensor

from fastsae._core import checks
from fastsae._core.extras import needed
from fastsae._core.progress import Bar
from fastsae._core.seeds import stream_seed
from fastsae.compare.matching import match
from fastsae.optim import Adam
from fastsae.sae.activations import ReLU
from fastsae.sae.losses import features
from fastsae.sae.module import SAE
from fastsae.sae.stack import SAEs
from fastsae.superposition.data import SuperpositionData
from fastsae.superposition.init import start_from
from fastsae.trainer import Batches

EVALUATION = 16_384
"""Samples that fvu, l0 and dead features are measured on, after those of training."""

_NARROW = 256  # features up to which products of whole tiles cost less than slots, however few latents fire
_OVERHEAD, _PARTS = 256, 2  # what a step costs beside its products, in features; groups for each process


@dataclass(frozen=True)
class Training:
    """How every dictionary of a sweep is trained: a ReLU ``SAE`` with the loss

        mean over samples of ( sum over D of (x - x_hat)^2 + l1 * sum over F of latent )

    by ``optim.Adam``, decoder rows of norm 1. The same l1 means something else elsewhere: where the error is averaged over D, it is l1 / D;
    where the latents are averaged over F besides, as in the first replication of Sharkey et al. 2022, l1 * F / D.

    Attributes:
        stop: "converged", or a number of steps. Converged: the mean loss of the last ``window`` steps is less than ``tolerance`` (relative)
            below that of the window before, twice in a row, or ``max_steps`` are reached. Then, and before a fixed number of steps ends,
            the learning rate falls linearly to 0 over ``cooldown`` steps, which count as steps.
        batch: samples a step. lr: of Adam.
        start: None, random directions; or a function of (n_features, x ``[4096, D]``, a seed of this run's own) that gives rows ``[F, D]``,
            e.g. of ``fastsae.superposition.init``.
        snapshots: steps at which the best cosines of the true features are kept, and at the last step where there are any.
    """

    stop: Literal["converged"] | int = "converged"
    batch: int = 256
    lr: float = 3e-3
    window: int = 500
    tolerance: float = 0.01
    cooldown: int = 1000
    max_steps: int = 20_000
    start: Callable[[int, Tensor, int], Tensor] | None = None
    snapshots: Sequence[int] = ()

    def __post_init__(self) -> None:
        op = "Training"
        if self.stop != "converged":
            if isinstance(self.stop, str):
                raise ValueError(f"{op}: stop must be 'converged' or a number of steps, got {self.stop!r}")
            object.__setattr__(self, "stop", checks.integer(op, "stop", self.stop, 1))
        for name in ("batch", "window", "max_steps"):
            checks.integer(op, name, getattr(self, name), 1)
        checks.integer(op, "cooldown", self.cooldown, 0)
        for name in ("lr", "tolerance"):
            checks.number(op, name, getattr(self, name))
        for step in self.snapshots:
            checks.integer(op, "snapshots", step, 0)


@dataclass(frozen=True, eq=False)
class Run:
    """One trained dictionary.

    Attributes:
        l1, n_features, seed: what it was asked for.
        steps: trained. converged: whether the loss had stopped falling (None with a fixed number of steps).
        seconds: its share of the time, by the clock (a step's is split evenly between the dictionaries that take it); cpu_seconds: of the
            process's time meanwhile.
        fvu, l0: on fresh samples. loss: mean of the last window. losses: of every window.
        dead: features ``[F]`` bool that fire on none of ``EVALUATION`` fresh samples.
        dictionary: ``[F, D]``, the decoder's rows.
        similarity: ``[G]``, best cosine of each true feature; None without a truth. learned: ``[F]``, of each learned feature.
        snapshots: (step, ``[G]`` best cosines of the true features).
    """

    l1: float
    n_features: int
    seed: int
    steps: int
    converged: bool | None
    seconds: float
    cpu_seconds: float
    loss: float
    fvu: float
    l0: float
    dead: Tensor
    dictionary: Tensor
    similarity: Tensor | None
    learned: Tensor | None
    losses: list[float] = field(default_factory=list)
    snapshots: list[tuple[int, Tensor]] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Its line in the data frame."""
        truth = self.similarity
        own = ("l0", "fvu", "loss", "steps", "converged", "seconds", "cpu_seconds")
        return {
            **{name: getattr(self, name) for name in ("l1", "n_features", "seed")},
            "mmcs": float("nan") if truth is None else float(truth.double().mean()),
            "recovered": float("nan") if truth is None else float((truth > 0.9).double().mean()),
            "dead": int(self.dead.sum()),
            **{name: getattr(self, name) for name in own},
        }


class _Stream:
    """Batches of the data from its own beginning, for training; in between, rows to look at."""

    def __init__(self, data: SuperpositionData | Tensor, batch: int):
        self.truth = data.features if isinstance(data, SuperpositionData) else None
        self.data = data
        if isinstance(data, SuperpositionData):
            self.next: Iterator[Any] = iter(data.batches(batch))
        else:
            self.next = (columns["x"] for columns in Batches(data, size=min(batch, data.shape[0])))

    def batch(self) -> Tensor:
        return next(self.next)

    def fresh(self, rows: int) -> Tensor:
        """Rows to look at: new samples, or evenly spaced ones of given activations."""
        if isinstance(self.data, SuperpositionData):
            return self.data.sample(rows).x
        return self.data[:: max(1, self.data.shape[0] // rows)][:rows]

    def aside(self, rows: int) -> Tensor:
        """``fresh``, with the batches to come left as they are."""
        if not isinstance(self.data, SuperpositionData):
            return self.fresh(rows)
        state = self.data.state_dict()
        x = self.fresh(rows)
        self.data.load_state_dict(state)
        return x


class _Member:
    """What is one dictionary's own while several train together."""

    def __init__(self, l1: float, seed: int, training: Training):
        self.l1, self.seed, self.training = l1, seed, training
        fixed = training.stop if isinstance(training.stop, int) else None
        self.end = training.max_steps if fixed is None else fixed
        self.converged, self.flat = None if fixed else False, 0
        self.windows: list[float] = []
        self.snapshots: list[tuple[int, Tensor]] = []
        self.seconds = self.cpu_seconds = 0.0

    def rate(self, step: int) -> float:
        return self.training.lr * min(1.0, (self.end - step) / (self.training.cooldown + 1))

    def closes(self, loss: float, step: int) -> None:
        """Takes the mean loss of a window that ends at this step."""
        training, windows = self.training, self.windows
        windows.append(loss)
        if self.converged is False and len(windows) > 1 and self.end == training.max_steps:
            self.flat = self.flat + 1 if windows[-2] - windows[-1] < training.tolerance * abs(windows[-2]) else 0
            if self.flat == 2:
                self.converged, self.end = True, min(step + training.cooldown, training.max_steps)

    def run(self, step: int, sae: SAE, x: Tensor, truth: Tensor | None) -> Run:
        own = {name: getattr(self, name) for name in ("l1", "seed", "converged", "seconds", "cpu_seconds", "snapshots")}
        own |= {"loss": self.windows[-1], "losses": self.windows, "dictionary": sae.W_dec.detach().clone()}
        return Run(n_features=sae.d_sae, steps=step, **own, **_evaluated(x, sae, truth))


def train_dictionary(data: SuperpositionData | Tensor, l1: float, n_features: int, seed: int = 0, training: Training | None = None) -> Run:
    """Trains one dictionary; ``data`` is used from its present state on and moved by it. See ``sweep``."""
    return _together(data, n_features, [(l1, seed)], training or Training())[0]


def _together(
    data: SuperpositionData | Tensor,
    n_features: int,
    members: Sequence[tuple[float, int]],
    training: Training,
    done: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """Trains dictionaries of one size, (l1, seed) each, on the same batches, as one ``SAEs``; each to the bits that it has alone.

    One that has ended leaves the stack: the others' steps then cost what they would without it. ``done`` is called with it.
    """
    clock = time.perf_counter(), time.process_time()
    stream = _Stream(data, training.batch)
    truth = stream.truth
    x = stream.fresh(4096)
    saes = SAEs(_start(x, n_features, l1, seed, training) for l1, seed in members)
    opt = Adam(saes, lr=training.lr)
    going = [_Member(l1, seed, training) for l1, seed in members]
    runs: dict[tuple[float, int], Run] = {}
    losses: list[Tensor] = []  # [E] each, of the steps of this window
    wanted = set(training.snapshots)
    step = 0
    while True:
        for member, sae in zip(going, saes) if wanted else ():
            if truth is not None and (step in wanted or step >= member.end):
                member.snapshots.append((step, match(truth, sae.W_dec).a_to_b.similarity[:, 0].clone()))
        if any(step >= member.end for member in going):
            now = time.perf_counter(), time.process_time()
            for member in going:
                member.seconds += (now[0] - clock[0]) / len(going)
                member.cpu_seconds += (now[1] - clock[1]) / len(going)
            clock = now
            left = [number for number, member in enumerate(going) if step < member.end]
            x = stream.aside(EVALUATION) if left else stream.fresh(EVALUATION)
            for member, sae in zip(going, saes):
                if step >= member.end:
                    runs[member.l1, member.seed] = member.run(step, sae, x, truth)
                    done(runs[member.l1, member.seed])
            if not left:
                return [runs[job] for job in members]
            saes, opt = _only(left, saes, opt)
            going, losses = [going[number] for number in left], [loss[left] for loss in losses]
        opt.lr = [member.rate(step) for member in going]
        losses.append(opt.step(stream.batch()).loss)
        step += 1
        full = len(losses) == training.window
        if full or any(step == member.end for member in going):
            for member, own in zip(going, torch.stack(losses, 1)):
                if full or step == member.end:
                    member.closes(float(own.clone().mean()), step)
        if full:
            losses.clear()


def _start(x: Tensor, n_features: int, l1: float, seed: int, training: Training) -> SAE:
    own = stream_seed(seed, n_features)  # starts of two sizes are unrelated: one would else begin with the rows of the other
    dense = True if n_features <= _NARROW else None
    sae = SAE(x.shape[1], n_features, ReLU(), l1=l1, dense=dense, seed=own, dtype=x.dtype, device=x.device)
    if training.start is not None:
        start_from(sae, training.start(n_features, x, own).to(x))
    return sae.init_from(x)


def _only(left: list[int], saes: SAEs, opt: Adam) -> tuple[SAEs, Adam]:
    """A stack of some of the members, and its optimiser."""
    state = opt.state_dict()
    moments = {
        name: {key: value[left] if isinstance(value, Tensor) else value for key, value in entry.items()}
        for name, entry in state["state"].items()
    }
    rest = SAEs(saes[number] for number in left)
    opt = Adam(rest)
    lr = [state["lr"][number] for number in left] if isinstance(state["lr"], list) else state["lr"]
    opt.load_state_dict({**state, "state": moments, "lr": lr})
    return rest, opt


@torch.no_grad()
def _evaluated(x: Tensor, sae: SAE, truth: Tensor | None) -> dict[str, Any]:
    """What fresh samples say, and the truth."""
    error = spread = active = 0.0
    mean = x.double().mean(0)
    fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=x.device)
    for part in x.split(2048):
        result = sae(part)
        error += float(result.squared_error.double().sum())
        spread += float((part.double() - mean).square().sum())
        positive = result.latents.values > 0
        active += float(positive.sum())
        fired[features(result.latents)[positive]] = True
    similarity = learned = None
    if truth is not None:
        found = match(truth, sae.W_dec)
        similarity, learned = found.a_to_b.similarity[:, 0].clone(), found.b_to_a.similarity[:, 0].clone()
    fvu = error / spread if spread else 0.0
    return {"fvu": fvu, "l0": active / x.shape[0], "dead": ~fired, "similarity": similarity, "learned": learned}


def train_many(
    data: SuperpositionData | Tensor,
    *,
    l1: float | Sequence[float],
    n_features: int | Sequence[int],
    seeds: int | Sequence[int] = 0,
    workers: int = 1,
    keep: str | os.PathLike[str] | None = None,
    callback: Callable[[Run], object] | None = None,
    known: Sequence[Run] = (),
    progress: bool = False,
    **training: Any,
) -> list[Run]:
    """The dictionaries behind ``sweep``, same arguments; ``Run``s in the order of (n_features, l1, seed). ``known``: those of an earlier
    call with the same arguments, which are not trained again."""
    op = "sweep"
    if isinstance(data, Tensor):
        checks.tensor(op, "data", data)
        if data.dim() != 2 or data.shape[0] == 0:
            raise ValueError(f"{op}: data must have shape [n, D] with n > 0, got {list(data.shape)}")
    else:
        checks.instance(op, "data", data, SuperpositionData, "SuperpositionData or a tensor [n, D]")
    grid = [_several(op, name, value) for name, value in (("n_features", n_features), ("l1", l1), ("seeds", seeds))]
    for size in grid[0]:
        checks.integer(op, "n_features", size, 1)
    for weight in grid[1]:
        if checks.number(op, "l1", weight, positive=False) < 0:
            raise ValueError(f"{op}: l1 must be at least 0, got {weight}")
    for seed in grid[2]:
        checks.integer(op, "seeds", seed, 0)
    workers = checks.integer(op, "workers", workers, 1)
    options_there = [option.name for option in fields(Training)]
    if unknown := [name for name in training if name not in options_there]:
        raise TypeError(f"sweep: unknown option {unknown[0]!r}; those of Training are {', '.join(options_there)}")
    options = Training(**training)
    jobs = [(weight, size, seed) for size, weight, seed in itertools.product(*grid)]
    runs = {(run.l1, run.n_features, run.seed): run for run in known}
    missing = [job for job in jobs if job not in runs]

    content = pickle.dumps(data)
    workers = min(workers, len(missing)) or 1
    groups = _groups(missing, workers)
    with Bar(progress, len(missing), of="run") as bar:

        def done(run: Run) -> None:
            runs[run.l1, run.n_features, run.seed] = run
            bar.update()
            bar.show(f"F {run.n_features}, l1 {run.l1:g}, seed {run.seed}: FVU {run.fvu:.3f}")
            if callback is not None:
                callback(run)

        if workers == 1 and keep is None:
            for size, members in groups:
                _together(pickle.loads(content), size, members, options, done)
        else:
            _by_joblib(content, groups, options, workers, keep, done)
    return [runs[job] for job in jobs]


_Group = tuple[int, list[tuple[float, int]]]  # a size, and (l1, seed) of its members


def _groups(jobs: list[tuple[float, int, int]], workers: int) -> list[_Group]:
    """Jobs of one size together, the largest first; for several workers in so many parts that they end at about the same time."""
    sizes = sorted({size for _, size, _ in jobs}, reverse=True)
    whole = [(size, [(l1, seed) for l1, own, seed in jobs if own == size]) for size in sizes]
    if workers == 1:
        return whole
    share = sum(len(members) * (size + _OVERHEAD) for size, members in whole) / (_PARTS * workers)
    parts = []
    for size, members in whole:
        count = min(len(members), math.ceil(len(members) * (size + _OVERHEAD) / share))
        parts += [(size, members[part::count]) for part in range(count)]  # low and high l1, whose costs differ, in each
    return parts


def _several(op: str, name: str, value: Any) -> list[Any]:
    values = list(value) if isinstance(value, Sequence) else value.tolist() if hasattr(value, "tolist") else [value]
    values = values if isinstance(values, list) else [values]
    if not values or len(set(values)) != len(values):
        raise ValueError(f"{op}: {name} must be a number or different numbers, got {values}")
    return values


def _by_joblib(
    content: bytes, groups: list[_Group], options: Training, workers: int, keep: str | os.PathLike[str] | None, done: Callable[[Run], None]
) -> None:
    missing = "sweep with workers or keep needs joblib and cloudpickle"
    cloudpickle, joblib = (needed(name, missing, "studies") for name in ("cloudpickle", "joblib"))
    job: Any = _job if keep is None else joblib.Memory(os.fspath(keep), verbose=0).cache(_job, ignore=["packed"])
    data = "" if keep is None else _digest(pickle.loads(content))
    # Bytes, not tensors: torch would pass those through shared files that end with their process.
    # Cloudpickle's, which hold a ``start`` of the caller's script or notebook whole: workers do not import that.
    jobs = (
        joblib.delayed(job)("" if keep is None else _digest((data, *group, options)), cloudpickle.dumps((content, *group, options)))
        for group in groups
    )
    for packed in joblib.Parallel(n_jobs=workers, return_as="generator_unordered")(jobs):  # loky, or the backend of a parallel_config
        for run in pickle.loads(packed):  # pyright: ignore[reportArgumentType] # what _job returns
            done(run)


def _digest(value: Any) -> str:
    """Of all that a value holds, code of functions too. (Pickles of tensors hold addresses.)"""
    import cloudpickle

    class Digest(cloudpickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if not isinstance(obj, Tensor):
                return None
            held = obj.detach().cpu().contiguous().view(-1).view(torch.uint8)
            return str(obj.dtype), tuple(obj.shape), hashlib.sha256(held.numpy().tobytes()).hexdigest()

    Digest(out := io.BytesIO()).dump(value)
    return hashlib.sha256(out.getvalue()).hexdigest()


@functools.cache
def _end_with_parent() -> None:
    """loky's workers would train on for hours after their parent has been killed."""
    parent = os.getppid()

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    Thread(target=follow, daemon=True).start()


def _job(of: str, packed: bytes) -> bytes:
    """Runs of one group; ``of``: the digest of what is packed, by which they are kept."""
    if current_process().name.startswith("LokyProcess"):
        _end_with_parent()
    content, size, members, options = pickle.loads(packed)
    return pickle.dumps(_together(pickle.loads(content), size, members, options))


def sweep(
    data: SuperpositionData | Tensor,
    *,
    l1: float | Sequence[float],
    n_features: int | Sequence[int],
    seeds: int | Sequence[int] = 0,
    stop: Literal["converged"] | int = "converged",
    workers: int = 1,
    keep: str | os.PathLike[str] | None = None,
    callback: Callable[[Run], object] | None = None,
    progress: bool = True,
    **training: Any,
) -> Any:
    """Trains a dictionary for every (n_features, l1, seed) and returns a pandas data frame with a row for each.

    Args:
        data: ``SuperpositionData`` (left as it is; every run sees the same samples, from its present state on), or activations ``[n, D]``.
        l1: weights of the L1 penalty, at least 0; ``Training`` states the convention.
        n_features: dictionary sizes F. seeds: of the dictionaries' starts.
        stop: "converged", or a number of steps; see ``Training``.
        workers: processes; each has its share of the cores. They are joblib's: its own (loky), or those of a cluster inside ``with
            joblib.parallel_config(backend="dask")`` or "ray". The results do not depend on them but for the rounding of torch's products on
            other numbers of threads.
        keep: a folder where the runs of each group stay as it ends (``joblib.Memory``; pickles, so read only folders that you trust): the
            same call, of the same data and number of workers, goes on with those that are missing. None: nothing is kept.
        callback: called with each ``Run`` as it ends, in any order; with several workers or ``keep``, as its group ends.
        progress: a tqdm bar where tqdm is installed, else a line a dictionary, on stderr.
        training: attributes of ``Training``: batch, lr, window, tolerance, cooldown, max_steps, start, snapshots.

    Returns:
        Columns l1, n_features, seed; mmcs (truth to dictionary: mean over true features of the best cosine) and recovered (share of them
        above 0.9), NaN without a truth; dead (features that fire on none of 16,384 fresh samples), l0, fvu, loss, steps, converged,
        seconds, cpu_seconds. ``train_many`` returns the dictionaries too.

    Dictionaries of one size train together, as one ``SAEs`` on the same batches, each to the bits that it has alone; one that has
    converged leaves the stack. Several workers divide sizes and groups among them.

    Raises: TypeError, ValueError as usual. ImportError without pandas (extra ``studies``).

    Example:
        >>> data = SuperpositionData(128, 64, mean_active=3)
        >>> frame = sweep(data, l1=[0.05, 0.1, 0.2], n_features=[64, 128, 256], stop="converged")
        >>> frame.pivot(index="l1", columns="n_features", values="mmcs")
    """
    pandas = needed("pandas", "sweep needs pandas", "studies")
    options: Any = {"workers": workers, "keep": keep, "callback": callback, "progress": progress, "stop": stop, **training}
    runs = train_many(data, l1=l1, n_features=n_features, seeds=seeds, **options)
    return pandas.DataFrame([run.row() for run in runs])
