"""Kernels prove themselves: a row of the table that was never checked on this kind of chip, driver and build is checked at its first use.

First in a child process, since an illegal instruction or a GPU's sticky error cannot be caught in one's own: the samples of ``fastsae
verify`` for the operation and dtype. Then a few rows of the user's own call (of a weight gradient or an optimiser: the features of a few
rows) against the specification. Agreement is remembered in ``certified.json`` in the user's cache directory, which ``fastsae verify``
fills too. Disagreement disables the row with a warning, and the reference's result is returned; among several processes it raises, since
the others would go on with other bits. This finds gross faults, not rare ones.

``FASTSAE_AUDIT``: ``first`` (the default) as above; a number N also compares every N-th call of every row, against silent corruption in
long runs; ``off`` checks nothing.

The CPU's instruction sets on x86-64, the interpreter and the emulation of CUDA are known kinds: the test suite runs them, a user of them
pays nothing. While a CUDA graph is captured nothing can be checked: a warning says to run ``fastsae verify`` before.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae._core import files, machine, processes, triton_support
from fastsae.dispatch import OPS, Op, Row
from fastsae.native import cuda as native_cuda
from fastsae.native import loader
from fastsae.testing import Mismatch

KNOWN_LEVELS = {"portable", "avx2", "avx512_vnni", "avx512_bf16"}  # the screen of avx512 ran with emulated instructions only
_ROWS = 8  # of the user's call that are compared
_SECONDS = 1800  # a child that takes longer hangs
_OF_FEATURES = {"decode": "W", "decode_dvalues": "W", "decode_dweight": "out", "adam": "W", "grad_squares": "W", "signum": "y"}
_warned: set[str] = set()
_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from fastsae.verify import child; child(*sys.argv[2:])"

Place = torch.device | str
"""A GPU, or an instruction set of the CPU."""


def mode() -> str | int:
    """FASTSAE_AUDIT: "first", "off", or every how many calls one is compared."""
    given = os.environ.get("FASTSAE_AUDIT") or "first"
    if given in ("first", "off"):
        return given
    if given.isdecimal() and int(given) > 0:
        return int(given)
    raise ValueError(f"FASTSAE_AUDIT must be first, off or a number of calls, got {given!r}")


def known(backend: str) -> bool:
    """Whether a row runs here on a kind of machine that the test suite covers."""
    if backend == "cpu":
        return platform.machine().lower() in ("x86_64", "amd64") and loader.isa() in KNOWN_LEVELS
    return triton_support.interpreting() if backend == "triton" else native_cuda.emulating()


def guard(row: Row, function: Callable[..., Any]) -> Callable[..., Any]:
    """What a row runs: its function itself where nothing is to be checked."""
    how = mode()
    if how == "off" or (how == "first" and known(row.backend)):
        return function
    op = next(op for op in OPS.values() if any(row is other for other in op.rows))
    return Guard(op, row, function, how if isinstance(how, int) else 0)


class Guard:
    """A row's function, checked at its first use for a dtype and device; from then on one look into a dictionary."""

    def __init__(self, op: Op, row: Row, function: Callable[..., Any], every: int):
        self.op, self.row, self.function, self.every, self.target = op, row, function, every, str(row.target)
        self.ready: dict[tuple[torch.dtype, torch.device], Callable[..., Any]] = {}
        self.calls: dict[tuple[torch.dtype, torch.device], int] = {}

    def __call__(self, *args: Any) -> Any:
        run = self.ready.get((args[0].dtype, args[0].device))
        return self._look(args) if run is None else run(*args)

    def _look(self, args: tuple[Any, ...]) -> Any:
        where = place(args[0].device)
        key = args[0].dtype, args[0].device
        name = certificate(self.op.name, self.row.backend, args[0].dtype)
        if mode() == "off" or torch.compiler.is_compiling():
            return self.function(*args)
        calls = self.calls.get(key, 0)
        new = not calls and not known(self.row.backend) and name not in certified(where)
        if isinstance(where, torch.device) and torch.cuda.is_current_stream_capturing():
            if new:
                _warn(
                    f"{name} was never checked on {kind(where)}, nor can it be while a CUDA graph is captured: run `fastsae verify` before"
                )
            return self.function(*args)
        self.calls[key] = calls + 1
        result = None
        try:
            if new:
                with _one_process("checking"):
                    sure = name in certified(where) or self._passes_in_a_child(name, where)
                    result = self._compared(args)
                    if sure:
                        remember(where, [name])
            elif self.every and (calls + 1) % self.every == 0:
                result = self._compared(args)
        except Mismatch as mismatch:
            return self._disabled(name, where, mismatch, args)
        if not self.every:
            self.ready[key] = self.function
        return self.function(*args) if result is None else result

    def _passes_in_a_child(self, name: str, where: Place) -> bool:
        """Mismatch where the child finds one, is killed by a signal or hangs; False, after a warning, where it could not work."""
        dtype, device = name.split()[-1], str(where) if isinstance(where, torch.device) else "cpu"
        environment = {**os.environ, "FASTSAE_AUDIT": "off", **({"FASTSAE_ISA": where} if isinstance(where, str) else {})}
        command = [sys.executable or "python", "-c", _CHILD, json.dumps(sys.path)]
        command += [self.op.name, self.row.backend, self.target, device, dtype]
        if not triton_support.quiet():
            with suppress(OSError, ValueError, AttributeError):
                print(f"fastsae: checking {name} at its first use on {kind(where)} ...", file=sys.stderr, flush=True)
        try:
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            raise Mismatch(f"the samples took more than {_SECONDS} s") from None
        except OSError as error:
            done = subprocess.CompletedProcess(command, 1, str(error))
        if done.returncode < 0:
            raise Mismatch(f"a process that ran it died of signal {-done.returncode}")
        verdict, _, failure = done.stdout.rpartition("\n")[2].partition(" ")
        if done.returncode == 0 and verdict == "failed":
            raise Mismatch(failure)
        if done.returncode or verdict != "passed":
            said = done.stdout.strip()[-300:] or done.returncode
            _warn(f"{name} could not be checked in a process of its own ({said}), so only on this call")
        return not done.returncode and verdict == "passed"

    def _compared(self, args: tuple[Any, ...]) -> Any:
        """The result, or None where the call itself was not run; Mismatch if a part of the call is wrong."""
        part = few(self.op, args)
        if part is None:
            return None
        try:
            with torch.no_grad():
                if self.op.batched and not isinstance(_named(self.op, args).get("crow"), Tensor):
                    result = self.function(*args)
                    head = tuple(t[: part[self.op.batched[0]].shape[0]] for t in ((result,) if isinstance(result, Tensor) else result))
                    self.op.check(part, head[0] if len(head) == 1 else head)
                    return result
                copies = [arg.clone() if position in self.op.mutates else arg for position, arg in enumerate(part)]
                result = self.function(*copies)
                written = tuple(copies[position] for position in self.op.mutates)
                self.op.check(part, result if not written else written[0] if len(written) == 1 else written)
        except Mismatch:
            raise
        except Exception as error:  # no memory for the reference, or arguments that the call itself will refuse
            _warn(f"{self.op.name} could not be compared on this call: {type(error).__name__}: {error}")
        return None

    def _disabled(self, name: str, where: Place, mismatch: Mismatch, args: tuple[Any, ...]) -> Any:
        reason = f"disabled: wrong on {kind(where)}: {mismatch}"
        self.row.refuses = lambda *args: reason
        self.function, self.every = lambda *args: self.op(*args, backend="reference"), 0
        text = f"{name} is wrong on {kind(where)}: {mismatch}. Please report it with what `fastsae info` prints"
        if processes.ranks() > 1:
            raise RuntimeError(f"fastsae: {text}; FASTSAE_BACKEND=reference computes without it")
        _warn(f"{text}. This process uses it no more; this call has the reference's result")
        return self.function(*args)


def _warn(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(f"fastsae: {text}", stacklevel=2)


# ---------------------------------------------------------------- a part of a call


def _named(op: Op, args: Sequence[Any]) -> dict[str, Any]:
    schema = getattr(torch.ops.fastsae, op.name).default._schema
    return dict(zip((argument.name for argument in schema.arguments), args))


def few(op: Op, args: Sequence[Any]) -> tuple[Any, ...] | None:
    """A call of the same kind on the first rows of ``args``, and of what is a row a feature on the features of those rows; None of nothing.

    It waits for the device once.
    """
    given = _named(op, args)

    def cut(n: int, *names: str) -> None:
        given.update({name: given[name][:n] for name in names if isinstance(given.get(name), Tensor)})

    if any(isinstance(arg, Tensor) and not arg.numel() for arg in args):
        return None
    indices, crow = given.get("indices"), given.get("crow")
    if indices is None:
        cut(_ROWS, "x", "words", *(() if op.name in _OF_FEATURES else ("z",)))
        cut(max(_ROWS, given.get("k_ba", 0)), "a", *(("out",) if op.name == "hamming" else ()))
        if op.name == "match_pair":
            cut(max(_ROWS, given["k_ab"]), "b")
    else:
        cut(_ROWS + 1, "crow")
        cut(_ROWS if crow is None else int(given["crow"][-1]), "values", "indices")
        cut(_ROWS, "grad")
    if op.name in _OF_FEATURES:
        n = given[_OF_FEATURES[op.name]].shape[0]
        whole = torch.arange(min(n, _ROWS), device=args[0].device) if indices is None else given["indices"].clamp(0, n - 1).long().unique()
        for name in ("W", "m", "v", "y", "z", "out", *(("grad",) if indices is None else ())):
            if isinstance(t := given.get(name), Tensor):
                given[name] = t.T.index_select(1, whole).T if t.stride(0) < t.stride(1) else t.index_select(0, whole)
        if indices is not None:
            given["indices"] = torch.searchsorted(whole, given["indices"].clamp(0, n - 1).long()).to(indices.dtype)
    return tuple(given.values())


# ---------------------------------------------------------------- certificates


def place(device: torch.device) -> Place:
    return device if device.type != "cpu" else loader.isa() if loader.unavailable() is None else "no extension"


def certificate(op: str, backend: str, dtype: torch.dtype) -> str:
    return f"{op} {backend} {str(dtype).removeprefix('torch.')}"


@cache
def kind(where: Place) -> str:
    """What a certificate holds for: chip, driver, versions, and a digest of what was built."""
    if isinstance(where, str):
        chip = f"{machine.processor()} {platform.machine()} {where}"
    else:
        found, driver = torch.cuda.get_device_properties(where), f"CUDA {torch.version.cuda}"
        with suppress(OSError):
            driver = Path("/proc/driver/nvidia/version").read_text().splitlines()[0].partition("Module")[2].split("  ")[1]
        chip = f"{found.name} sm_{found.major}{found.minor}, driver {driver}"
    package, digest = Path(__file__).parent, hashlib.sha256()
    kernels = package / "kernels" if (package / "kernels").exists() else package.parent / "kernels"
    for file in sorted([*package.glob("_C*"), *package.glob("_cuda*"), *kernels.glob("*.py")]):
        digest.update(file.read_bytes())
    versions = machine.versions()
    return f"{chip}, torch {versions['torch']}, triton {versions['triton']}, fastsae {versions['fastsae']} {digest.hexdigest()[:12]}"


def certificates() -> Path:
    """The file, in the cache directory that the platform's conventions name."""
    usual = {"darwin": "~/Library/Caches", "win32": os.environ.get("LOCALAPPDATA", "~")}.get(sys.platform, "~/.cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or usual).expanduser() / "fastsae" / "certified.json"


def _read() -> dict[str, list[str]]:
    try:
        found = json.loads(certificates().read_text(encoding="utf-8"))
        return {str(kind): [str(name) for name in names] for kind, names in found.items()}
    except (OSError, ValueError, AttributeError, TypeError, RuntimeError):  # none, not readable, not ours, no home
        return {}


def certified(where: Place) -> list[str]:
    """The rows that were found right on this kind of machine."""
    return _read().get(kind(where), [])


def remember(where: Place, names: Sequence[str]) -> None:
    """Adds certificates; without a home that can be written each process checks anew."""
    with suppress(OSError, RuntimeError), _one_process("writing"):
        found = _read()
        found[kind(where)] = sorted({*found.get(kind(where), []), *names})
        files.replace_text(certificates(), json.dumps(found, indent=1))


def _one_process(what: str) -> AbstractContextManager[Any]:
    """The processes of a machine one after the other: of those that check the same, one child serves them all."""
    try:
        lock = certificates().with_name(f"{what}.lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
        return files.locked(lock)
    except (OSError, RuntimeError):
        return nullcontext()
