"""Runs every backend of every operation against its specification on this machine: ``fastsae verify``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastsae import audit
from fastsae._core.timing import alternate, milliseconds
from fastsae.dispatch import OPS, Op, Row
from fastsae.native import loader
from fastsae.testing import Mismatch

Context = Callable[[], AbstractContextManager[Any]]


@dataclass
class Result:
    """One operation on one backend, device and dtype.

    Attributes:
        samples, refused: argument sets verified, and those that the backend refused (with the last reason).
        error: largest error as a fraction of the allowed one; 0 where results must be equal bit for bit.
        ratio: time on a realistic workload over the reference's in the same run; None where not timed.
        failure: the first mismatch, or None.
    """

    op: str
    backend: str
    device: str
    dtype: str
    samples: int = 0
    refused: int = 0
    reason: str | None = None
    error: float = 0.0
    milliseconds: float | None = None
    ratio: float | None = None
    failure: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found.append(torch.device("cuda", torch.cuda.current_device()))
    return found


def variants(row: Row, device: torch.device) -> Iterator[tuple[str, Context]]:
    """A row's name and context: the C++ rows once for every instruction set that this machine has."""
    if row.backend == "cpu" and loader.unavailable() is None and device.type == "cpu":
        for level in loader.isa_levels():
            yield f"cpu[{level}]", lambda level=level: loader.use_isa(level)
    else:
        how = {"triton": "[interpreter]", "cuda": "[emulated]"} if device.type == "cpu" else {}
        yield row.backend + how.get(row.backend, ""), nullcontext


def affordable(row: Row, device: torch.device, args: tuple[Any, ...]) -> bool:
    """Whether the arguments are small enough for Triton's interpreter or the CUDA emulation, which run a launch thread by thread."""
    most = {"triton": 700, "cuda": 20_000}.get(row.backend, 0) if device.type == "cpu" else 0
    return not most or sum(arg.numel() for arg in args if isinstance(arg, torch.Tensor)) < most


def call(op: Op, row: Row, args: tuple[Any, ...]) -> Any:
    """The row's result; for an operation that writes into arguments, the copies of them that it was given to write into."""
    copies = [arg.clone() if position in op.mutates else arg for position, arg in enumerate(args)]
    result = op(*copies, backend=row.backend)
    written = tuple(copies[position] for position in op.mutates)
    return result if not written else written[0] if len(written) == 1 else written


def verify_row(op: Op, row: Row, name: str, context: Context, device: torch.device, dtype: torch.dtype) -> Result:
    result = Result(op.name, name, str(device), str(dtype).removeprefix("torch."))
    with context():
        for args in op.samples(device, dtype, torch.Generator().manual_seed(0)):
            reason = row.reason(args)
            if reason is not None:
                result.refused, result.reason = result.refused + 1, reason
                continue
            if not affordable(row, device, args):
                continue
            try:
                result.error = max(result.error, op.check(args, call(op, row, args)))
            except Mismatch as mismatch:
                result.failure = f"sample {result.samples}: {mismatch}"
                return result
            except Exception as error:  # a crash of a backend is a finding, not the end of the table
                result.failure = f"sample {result.samples}: {type(error).__name__}: {error}"
                return result
            result.samples += 1
    return result


def time_rows(op: Op, rows: list[tuple[Row, str, Context]], device: torch.device) -> dict[str, float]:
    """Median milliseconds of each row on the operation's workload, the rows alternating."""
    args = op.workload(device, op.dtypes[0], torch.Generator().manual_seed(0))

    def timed(row: Row, context: Context) -> float:
        with context():
            return milliseconds(lambda _: op(*args, backend=row.backend), device)

    ways = {name: lambda _, row=row, context=context: timed(row, context) for row, name, context in rows if row.reason(args) is None}
    times = alternate(ways, least=6, most=6, seconds=0)
    return {name: statistics.median(turns[1:]) for name, turns in times.items()}  # the first turn warms up


def run(
    *,
    ops: list[str] | None = None,
    backends: list[str] | None = None,
    timing: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Result]:
    """Verifies rows; see ``Result``.

    Args:
        ops, backends: names to restrict to; None: all.
        timing: also time the workloads (never the interpreter's).
        progress: called with each operation's name.
    """
    results: list[Result] = []
    for op in OPS.values():
        if ops is not None and op.name not in ops:
            continue
        for device in devices():
            progress(f"{op.name} on {device}")
            found = [(row, name, context) for row in op.rows for name, context in variants(row, device)]
            found = [entry for entry in found if backends is None or entry[0].backend in backends]
            first = len(results)
            for row, name, context in found:
                for dtype in op.dtypes:
                    result = verify_row(op, row, name, context, device, dtype)
                    if result.samples or result.failure:
                        results.append(result)
            if timing:
                add_times(results[first:], op, [entry for entry in found if not entry[1].endswith(("[interpreter]", "[emulated]"))], device)
    return results


def child(name: str, backend: str, target: str, device: str, dtype: str) -> None:
    """Says whether one row is right: what ``fastsae.audit`` runs in a process of its own."""
    op = OPS[name]
    row = next(row for row in op.rows if row.backend == backend)
    row.target = target
    result = verify_row(op, row, backend, nullcontext, torch.device(device), getattr(torch, dtype))
    print(
        f"failed {' '.join(result.failure.split())}" if result.failure else "passed" if result.samples else "took none of the samples",
        end="",
    )


def remember(results: list[Result]) -> None:
    """Certificates of the rows that passed, for ``fastsae.audit``."""
    found: dict[audit.Place, list[str]] = {}
    for result in results:
        backend, _, level = result.backend.removesuffix("]").partition("[")
        if backend != "reference" and level not in ("interpreter", "emulated") and not result.failure:
            name = audit.certificate(result.op, backend, getattr(torch, result.dtype))
            found.setdefault(level or torch.device(result.device), []).append(name)
    for where, names in found.items():
        audit.remember(where, names)


def add_times(results: list[Result], op: Op, rows: list[tuple[Row, str, Context]], device: torch.device) -> None:
    if any(result.failure for result in results) or not rows:
        return  # a speed is never reported beside a wrong result
    reference = (op.rows[-1], "reference", nullcontext)
    times = time_rows(op, rows if any(name == "reference" for _, name, _ in rows) else [*rows, reference], device)
    for result in results:
        if result.dtype == str(op.dtypes[0]).removeprefix("torch.") and result.backend in times:
            result.milliseconds = times[result.backend]
            result.ratio = times[result.backend] / times["reference"]
