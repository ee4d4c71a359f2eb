"""The table of operation x backend: registration with torch.library, choice of a row, and the reasons behind it.

A row names its implementation by import string, resolved at first use, so that importing fastsae loads neither Triton nor the
compiled extension. Rows stand in order of preference and a predicate says why a row cannot serve given inputs; the reference is the
last row on every device.

Order of choice: the ``backend=`` argument, ``with use_backend(...)``, the variable ``FASTSAE_BACKEND``, then the order of rows.
A request is a backend name or a comma-separated list in order of preference; ``*`` stands for "then the order of rows". A request
without ``*`` that no named row can serve raises ``BackendError``: nothing falls back in silence.
"""

from __future__ import annotations

import importlib
import os
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from fastsae._core.precision import full_precision

BACKENDS = ("cpu", "triton", "cuda", "reference")
"""cpu: C++ (AVX-512, AVX2, portable, chosen at run time); triton: GPUs, or the interpreter on a CPU; cuda: CUDA C++; reference: PyTorch."""

LIBRARY = torch.library.Library("fastsae", "DEF")
OPS: dict[str, Op] = {}
_requested: ContextVar[str | None] = ContextVar("fastsae_backend", default=None)
_recorder: ContextVar[list[Choice] | None] = ContextVar("fastsae_recorder", default=None)
_warned: set[str] = set()


class BackendError(RuntimeError):
    """An explicitly requested backend cannot serve the inputs; the message lists every row with its reason."""


def _resolve(target: str) -> Callable[..., Any]:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclass
class Row:
    """One implementation of one operation. ``refuses(*args)``, its module's ``refuses_NAME``, returns None, or the reason why it cannot
    serve these arguments."""

    backend: str
    target: str | Callable[..., Any]
    refuses: str | Callable[..., str | None] | None = None

    def run(self) -> Callable[..., Any]:
        if isinstance(self.target, str):
            self.target = _resolve("fastsae.audit:guard")(self, _resolve(self.target))
        return self.target  # pyright: ignore[reportReturnType] # no text any more

    def reason(self, args: Sequence[Any]) -> str | None:
        if self.refuses is None:
            return None
        if isinstance(self.refuses, str):
            self.refuses = _resolve(self.refuses)
        return self.refuses(*args)


@dataclass(frozen=True)
class Choice:
    """What one call of one operation chose: the backend that ran, and why the rows before it did not."""

    op: str
    chosen: str
    reasons: tuple[tuple[str, str | None], ...]
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen}"]
        for backend, reason in self.reasons:
            verdict = "chosen" if backend == self.chosen and reason is None else reason or "accepts"
            lines.append(f"  {backend:<10} {verdict}")
        return "\n".join(lines)


@dataclass
class Op:
    """An operation: its schema, its reference (the specification), its rows, and what verifies a row.

    Args:
        schema: a torch.library schema without the ``backend`` argument, which is added here.
        reference: plain PyTorch on the same arguments; the last row on every device.
        fake: shapes and dtypes of the result, for torch.compile.
        samples: ``samples(device, dtype, generator)`` yields argument tuples for verification and benches.
        check: ``check(args, result)`` raises ``fastsae.testing.Mismatch`` or returns the error as a fraction of the allowed one. Given here
            with that module for a first argument, which is loaded when something is checked.
        workload: ``workload(device, dtype, generator)`` is one argument tuple of a realistic, moderate size, for timing.
        batched: positions of arguments (and results) whose first dimension is the batch; used to test that a row's bits do not
            depend on the batch it stands in. Empty where a result depends on the whole batch.
        mutates: positions of the arguments that the schema marks as written; what they hold before may be read.
        handle: positions of a weight and of its packed words (``fastsae.pack``), which change together; or None.
    """

    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    samples: Callable[..., Iterator[tuple[Any, ...]]]
    check: Callable[..., float]
    workload: Callable[..., tuple[Any, ...]]
    batched: tuple[int, ...] = ()
    mutates: tuple[int, ...] = ()
    handle: tuple[int, int] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    name: str = field(init=False)
    rows: list[Row] = field(init=False)

    def __post_init__(self) -> None:
        head, _, tail = self.schema.rpartition(") ->")
        self.name = head.partition("(")[0]
        self.rows = [Row("reference", self.reference)]
        given, self.check = self.check, lambda args, result: given(importlib.import_module("fastsae.testing"), args, result)
        LIBRARY.define(f"{head}, *, str? backend=None) ->{tail}")
        LIBRARY.impl(self.name, self._body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastsae::{self.name}", lambda *args, backend=None: self.fake(*args), lib=LIBRARY)
        self._torch_op = getattr(torch.ops.fastsae, self.name).default
        OPS[self.name] = self

    def row(self, backend: str, target: str, refuses: str | None = None) -> None:
        """Adds a row before the reference, after the rows already there."""
        if backend not in BACKENDS:
            raise ValueError(f"Op.row: unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
        self.rows.insert(len(self.rows) - 1, Row(backend, target, refuses))

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        # Torch's dispatcher costs as much as a small kernel; it is needed where something listens: compilers, modes, vmap, subclasses,
        # the profiler, a negation that was put off (``z.conj().imag``).
        if _nobody_listens() and _PLAIN.issuperset(map(type, args)) and not any(map(_negated, args)):
            return self._body(*args, backend=backend)
        return self._torch_op(*args, backend=backend)

    def reasons(self, args: Sequence[Any]) -> tuple[tuple[str, str | None], ...]:
        """Every row with the reason why it cannot serve ``args``, or None where it can."""
        return tuple((row.backend, row.reason(args)) for row in self.rows)

    def choose(self, args: Sequence[Any], backend: str | None) -> Row:
        if (request := backend or _request() or "*") == "*":
            return self._first(args)
        for name in parse_request(request):
            if name == "*":
                return self._first(args)
            for row in self.rows:
                if row.backend == name and row.reason(args) is None:
                    return row
        raise BackendError(self._refusal(args, request))

    def _first(self, args: Sequence[Any]) -> Row:
        for row in self.rows[:-1]:
            if row.reason(args) is None:
                return row
        self._warn_slow(args)
        return self.rows[-1]

    def _warn_slow(self, args: Sequence[Any]) -> None:
        device = next((a.device for a in args if isinstance(a, torch.Tensor)), None)
        if device is None or device.type != "cuda" or self.name in _warned:
            return
        _warned.add(self.name)
        reasons = "; ".join(f"{backend}: {reason}" for backend, reason in self.reasons(args)[:-1]) or "no GPU row exists yet"
        warnings.warn(f"fastsae: {self.name} runs its PyTorch reference on {device} ({reasons})", stacklevel=3)

    def _refusal(self, args: Sequence[Any], request: str) -> str:
        lines = [f"{self.name}: backend {request!r} was requested and cannot serve", f"    {describe(args)}"]
        lines += [f"  {backend:<10} {reason or 'accepts'}" for backend, reason in self.reasons(args)]
        missing = [name for name in parse_request(request) if name not in {row.backend for row in self.rows}]
        lines += [f"  {name:<10} has no implementation of {self.name}" for name in missing]
        lines.append(f"Request '{request},*' to continue with the order of rows, or see `fastsae info`.")
        return "\n".join(lines)

    def _body(self, *args: Any, backend: str | None = None) -> Any:
        row = self.choose(args, backend)
        recorder = _recorder.get()
        # A kernel writes through an address, which autograd does not see.
        if self.mutates:
            torch.autograd.graph.increment_version([args[position] for position in self.mutates if not args[position].is_inference()])
        if recorder is None:
            return _run(row, args)
        start = time.perf_counter()
        result = _run(row, args)
        recorder.append(Choice(self.name, row.backend, self.reasons(args), time.perf_counter() - start))
        return result


_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), bool, int, float}


def _negated(arg: Any) -> bool:
    return isinstance(arg, torch.Tensor) and arg.is_neg()


_torch: Any = torch._C  # pyright: ignore[reportPrivateUsage]  (what torch tells of itself nowhere else)
_VMAP_MODE = _torch._parse_dispatch_key("VmapMode")
_interpreters, _has_mode = _torch._functorch.peek_interpreter_stack, _torch._dispatch_tls_is_dispatch_key_included
_modes, _profiles, _traces = _torch._len_torch_dispatch_stack, _torch._autograd._profiler_enabled, _torch._get_tracing_state
_forward_ad: Any = torch.autograd.forward_ad
_VARIABLE = "FASTSAE_BACKEND"
# ``os.environ.get`` of a variable that is not set raises and catches two errors: 1 µs a call.
_environ, _key = getattr(os.environ, "_data", os.environ), getattr(os.environ, "encodekey", str)(_VARIABLE)


def batching() -> bool:
    """Whether tensors may stand for a batch of tensors: ``torch.vmap``, or a backward of batched gradients (``is_grads_batched``)."""
    return _interpreters() is not None or _has_mode(_VMAP_MODE)


def _nobody_listens() -> bool:
    return not torch.compiler.is_compiling() and not (_modes() or batching() or _profiles() or _traces())


_EXACT = {torch.Tensor, torch.nn.Parameter}


def alone(a: Any, b: Any, *optional: Any) -> bool:
    """Whether the call is all there is to see: float32 tensors of torch's own classes on the CPU, which nobody differentiates, compiles,
    batches, records or casts, and no request for a backend. A small call that is alone goes straight to the compiled kernels."""
    if a is None or b is None or not _nobody_listens():
        return False
    grad = torch.is_grad_enabled()
    for t in (a, b, *optional):
        if t is not None and (
            type(t) not in _EXACT
            or t.dtype is not torch.float32
            or not t.is_cpu
            or t.layout is not torch.strided
            or t.is_nested
            or t.is_neg()
            or (grad and t.requires_grad)
        ):
            return False
    return _forward_ad._current_level < 0 and _recorder.get() is None and _request() is None and not _torch._is_any_autocast_enabled()


def _run(row: Row, args: Sequence[Any]) -> Any:
    run = row.run()
    # The public operation has already cast its inputs; casting again inside would round the fp32 sums.
    if _torch._is_any_autocast_enabled():
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False), full_precision():
            return run(*args)
    if row.backend == "reference":  # the others have products of their own
        with full_precision():
            return run(*args)
    return run(*args)


def parse_request(request: Any, source: str = "backend") -> list[str]:
    """The names of a request, in order; an unknown name raises ValueError. ``source`` is where the request came from."""
    if not isinstance(request, str):
        raise TypeError(f"{source} must be a str, got {type(request).__name__}")
    names = [name.strip() for name in request.split(",")]
    for name in names:
        if name != "*" and name not in BACKENDS:
            raise ValueError(f"{source}: unknown name {name!r} in {request!r}; known: {', '.join(BACKENDS)}, or '*' for the order of rows")
    return names


def _request() -> str | None:
    """What ``use_backend`` or the environment asks for; None: nothing."""
    request = _requested.get()
    if request is None and _key in _environ and (request := os.environ[_VARIABLE] or None) is not None:
        parse_request(request, _VARIABLE)
    return request


def preference(backend: str | None) -> str | None:
    """The request in force for this call, so that a backward pass in another thread or after the ``with`` block keeps it."""
    if backend is not None:
        parse_request(backend)
        return backend
    # A compiled function asks when it runs: reading a ContextVar would break the graph.
    return None if torch.compiler.is_compiling() else _request() or "*"


def then_any(backend: str | None) -> str | None:
    """The same preference for a helper operation (a gradient, a composed part), which may continue with the order of rows."""
    return backend if backend is None or backend == "*" else f"{backend},*"


@contextmanager
def use_backend(backend: str) -> Generator[None, None, None]:
    """Requests a backend for the calls inside the ``with`` block (and for their backward passes).

    Args:
        backend: a name of ``fastsae.dispatch.BACKENDS``, or several separated by commas in order of preference; ``*`` stands for
            "then the order of rows".

    Raises:
        ValueError: an unknown name. A call inside that no named row can serve raises ``BackendError``.
    """
    parse_request(backend)
    token = _requested.set(backend)
    try:
        yield
    finally:
        _requested.reset(token)


@dataclass(frozen=True)
class Explanation:
    """The choices that one call made, in order; printing it shows every row with its reason."""

    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        return "\n".join(str(choice) for choice in self.choices)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Runs ``function(*args, **kwargs)`` and reports which backend each operation in it took, and why the others did not.

    Example:
        >>> latents = fastsae.encode_topk(torch.randn(4, 8), torch.randn(32, 8), k=2)
        >>> print(fastsae.explain(fastsae.decode, latents, torch.randn(32, 8)))
    """
    choices: list[Choice] = []
    token = _recorder.set(choices)
    try:
        function(*args, **kwargs)
    finally:
        _recorder.reset(token)
    return Explanation(tuple(choices))


def describe(args: Sequence[Any]) -> str:
    """One line about arguments: shape, dtype, device of tensors; the value of the rest."""
    parts = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            parts.append(f"{list(arg.shape)} {str(arg.dtype).removeprefix('torch.')} {arg.device}")
        elif arg is not None:
            parts.append(repr(arg))
    return ", ".join(parts)
