"""How one row of the GPU table is measured: verified, warmed up, in turns with its floor and rivals, held against its targets."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from bench import report
from bench.harness import extra_megabytes
from fastsae._core.timing import alternate, milliseconds, spread
from fastsae.dispatch import OPS

T = TypeVar("T")
R = TypeVar("R")
Call = Callable[[int], object]
"""Of the number of a call, which chooses among sets of inputs."""
Args = Callable[[int], tuple[Any, ...]]
Target = tuple[str, float, float]
"""(name of a rival or floor, must, goal) for our time over its; ("copy", must, goal) for the part of the copy rate; ("MiB", must, goal)
for memory beyond what stood before the call, result included."""

L2_ON_CPU = 32 << 20
"""Bytes that inputs must pass where the device does not tell its L2."""


class Missing(Exception):
    """A row that cannot be measured here; the message is the reason."""


def at_precision(name: str, call: Call) -> Call:
    def run(i: int) -> object:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(name)
        try:
            return call(i)
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


class Bench:
    """Measures rows, prints them as they come and keeps them in ``out / <date>-<device>-gpu.json``."""

    def __init__(self, device: torch.device, out: Path, minutes: float, quick: bool, machine: dict[str, Any], begun: float | None = None):
        self.device, self.quick = device, quick
        self.start, self.minutes = time.monotonic() - (0 if begun is None else max(0.0, time.time() - begun)), minutes
        self.seconds = 0.05 if quick else 6.0  # for the rounds of one row
        self.generator = torch.Generator(device=device).manual_seed(0)
        self.l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else L2_ON_CPU
        self.copy_rate = self.product_rate = 0.0
        self.report = report.Report.begin(out, machine, str(device), quick=quick, more=("gpu",))
        if begun is not None and self.report.path.exists():
            self.resume(json.loads(self.report.path.read_text()), begun)
        self.begun = time.time() if begun is None else begun

    def resume(self, earlier: dict[str, Any], begun: float) -> None:
        """Takes over what an earlier process of the same run has measured."""
        if earlier.get("begun") == begun:
            self.report.entries, self.report.notes = earlier["results"], earlier["notes"]
            self.copy_rate, self.product_rate = earlier["copy_bytes_per_second"], earlier["bf16_flops_per_second"]

    # -- inputs

    def shape(self, full: tuple[int, ...], quick: tuple[int, ...]) -> tuple[int, ...]:
        return quick if self.quick else full

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)

    def unit_rows(self, rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        value = self.normal(rows, width)
        return value.div_(torch.linalg.vector_norm(value, dim=1, keepdim=True)).to(dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def latents(self, rows: int, features: int, k: int, n: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """``n`` sets of values and indices."""
        return [(self.normal(rows, k).abs().to(dtype), self.integers(0, features, rows, k)) for _ in range(n)]

    def sets(self, n_bytes: int) -> int:
        """Sets of inputs that rotate so that one call does not find what the last one read."""
        return 2 if self.quick else max(2, min(64, -(-4 * self.l2 // max(n_bytes, 1))))

    # -- time

    def left(self) -> float:
        return self.minutes * 60 - (time.monotonic() - self.start)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:6.1f} s] {text}", file=sys.stderr, flush=True)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    # -- rows

    def backends(self, op: str, args: tuple[Any, ...]) -> list[str]:
        """The rows that serve these arguments, the reference apart; Missing with every row's reason where none does."""
        found = [row.backend for row in OPS[op].rows[:-1] if row.reason(args) is None]
        if not found:
            reasons = "; ".join(f"{backend}: {reason}" for backend, reason in OPS[op].reasons(args)[:-1])
            raise Missing(f"no backend but the reference serves {op}: {reasons or 'none is written'}")
        return found

    def ours(self, op: str, args: Args) -> dict[str, Call]:
        """An operation by every backend that serves it."""
        return {backend: lambda i, backend=backend: OPS[op](*args(i), backend=backend) for backend in self.backends(op, args(0))}

    def operation(
        self, op: str, label: str, shape: str, args: Args, others: Mapping[str, Call], *, few: int, cut: tuple[int, ...] = (0,),
        first: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        """A row of one operation, verified on the first ``few`` rows of its results and of the arguments in ``cut``; ``first``: by the
        backend alone that is preferred."""

        def verify(backend: str) -> None:
            found = OPS[op](*args(0), backend=backend)
            given = tuple(arg[:few] if place in cut else arg for place, arg in enumerate(args(0)))
            OPS[op].check(given, found[:few] if isinstance(found, Tensor) else tuple(part[:few] for part in found))

        ours = self.ours(op, args)
        self.row(label, shape, dict([*ours.items()][:1]) if first else ours, others, verify=verify, **options)

    def row(
        self,
        op: str,
        shape: str,
        ours: Mapping[str, Call],
        others: Mapping[str, Call],
        *,
        verify: Callable[[str], None] | None = None,
        floor: str | None = None,
        targets: Sequence[Target] = (),
        n_bytes: int | None = None,
        n_sets: int = 2,
    ) -> None:
        """One row: ``ours`` by backend in order of preference (the first is compared), ``others`` with the floor among them.

        ``n_bytes``: what a call must read and write.
        """
        self.say(f"{op} {shape}")
        failures: dict[str, str] = {}
        names = {f"fastsae ({backend})": backend for backend in ours}
        sound = self._each(names, "REFUSED", failures, verify or (lambda _: None))
        calls = {**{who: ours[names[who]] for who in sound}, **others}
        warm = self._each(calls, "no time", failures, self._warm)
        calls = {who: calls[who] for who in warm}
        ways = {
            who: lambda turn, who=who, call=call: milliseconds(call, self.device, warm[who][0], turn * 7 % n_sets)
            for who, call in calls.items()
        }
        times = alternate(ways, least=5, most=30, seconds=self.seconds, late=lambda: self.left() < 0)
        spreads = {who: {**spread(found), "first_call_s": warm[who][1]} for who, found in times.items()}
        memory = self._each(calls, "no memory", failures, lambda call: extra_megabytes(lambda: call(0), self.device))
        mine = next((who for who in sound if who in spreads), None)
        if mine is None:
            self.note(op, shape, f"not measured: {failures}")
            self.report.entries.append({"op": op, "shape": shape, "others": spreads, "failures": failures})
            self.save()
            return
        entry: dict[str, Any] = {
            "op": op, "shape": shape, "backend": mine[len("fastsae (") : -1], "ours": spreads.pop(mine),
            "others": spreads, "floor": floor, "extra_mb": {"ours": memory.pop(mine, None), **memory}, "failures": failures,
        }  # fmt: skip
        if n_bytes is not None and self.copy_rate:
            entry["bytes"] = n_bytes
            entry["of_copy_rate"] = n_bytes / (entry["ours"]["median"] * 1e-3) / self.copy_rate
        if self.device.type == "cuda" and not self.quick:  # the targets are a GPU's, at these shapes
            entry["targets"] = [self.verdict(target, entry) for target in targets]
        self.report.entries.append(entry)
        self.save()
        self.say(f"  {report.ratios(entry)} {' '.join(verdict['text'] for verdict in entry.get('targets', []))}")

    def _each(self, given: Mapping[str, T], what: str, failures: dict[str, str], do: Callable[[T], R]) -> dict[str, R]:
        """What ``do`` makes of each, by name; where it raises, the error is said and kept instead."""
        made: dict[str, R] = {}
        for who, value in given.items():
            try:
                result = do(value)
                self.wait()
                made[who] = result
            except Exception as error:
                failures[who] = told(error)
                self.say(f"  {who}: {what}: {failures[who]}")
        return made

    def _warm(self, call: Call) -> tuple[int, float]:
        """(calls that make a millisecond, seconds of the first call)."""
        begin = time.monotonic()
        call(0)
        self.wait()
        first = time.monotonic() - begin
        once = min(milliseconds(call, self.device, 1, i) for i in (1, 2))
        return max(1, min(100, int(1.0 / max(once, 1e-3)))), first

    def verdict(self, target: Target, entry: dict[str, Any]) -> dict[str, Any]:
        beside, must, goal = target
        if beside == "MiB":
            got = entry["extra_mb"]["ours"]
        elif beside == "copy":
            got = entry.get("of_copy_rate")
        else:
            times = entry["others"].get(beside)
            got = None if times is None else entry["ours"]["median"] / times["median"]
        reached = [got is not None and (got >= limit if beside == "copy" else got <= limit) for limit in (must, goal)]
        text = "goal reached" if reached[1] else "must reached" if reached[0] else "MISSED" if got is not None else "not measured"
        figures = f"{'none' if got is None else f'{got:.2f}'} of {beside}, must {must:.2f}, goal {goal:.2f}"
        return {"beside": beside, "must": must, "goal": goal, "got": got, "text": f"[{text}: {figures}]"}

    def note(self, op: str, shape: str, text: str) -> None:
        self.report.note(op, shape, text)
        self.say(f"  {op}: {text}")

    def save(self) -> None:
        self.report.save(
            begun=self.begun, copy_bytes_per_second=self.copy_rate, bf16_flops_per_second=self.product_rate, l2_bytes=self.l2,
            seconds=time.monotonic() - self.start,
        )  # fmt: skip
