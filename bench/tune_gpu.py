"""Times tile shapes of the Triton kernels over scores on this GPU: what the tables of kernels/_tile.py should say for it.

    python -m bench.tune_gpu --out DIR --minutes 8
    TRITON_INTERPRET=1 python -m bench.tune_gpu --device cpu --quick       the same code in the interpreter, tiny

For each workload and dtype: first the shapes of a tile with their warps and stages, then, for the fastest, how many row tiles share their
features and how many programs a multiprocessor gets. Every candidate alternates with the tile that the table has now; a figure is the
median of the ratio to it. Candidates are compiled in parallel before anything is timed. One whose shared memory does not fit, or whose
result has other bits, is named and cannot win. DIR / <date>-<device>-tiles.json is written anew after each figure.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.gpu.harness import Bench
from fastsae._core import triton_support
from fastsae._core.machine import machine
from fastsae._core.timing import alternate
from fastsae.dispatch import OPS

Run = Callable[[], Any]

# (rows, columns, depth, warps) of a tile, columns a multiple of 64 (the words of a packed code); stages from what fits.
SHAPES = [
    (128, 128, 64, 8), (128, 128, 64, 4), (128, 256, 64, 8), (256, 128, 64, 8), (128, 128, 32, 8), (128, 128, 128, 8), (64, 128, 64, 4),
    (64, 256, 64, 8), (128, 64, 64, 4),
]  # fmt: skip
STAGES = (2, 3, 4, 5)
QUICK_SHAPES = [(16, 64, 64, 4)]
GROUPS = (4, 8, 16)
PROGRAMS = (1, 2, 3, 4)
ROUNDS = 7


def tiles() -> Any:
    """The module of the tile's tables, mapped by an import hook that no type checker follows."""
    return importlib.import_module("fastsae.kernels._tile")


@dataclass(frozen=True)
class Config:
    """A tile (``fastsae.kernels._tile.Tile``) and the programs of a persistent launch a multiprocessor."""

    tile: Any
    programs: int

    def __str__(self) -> str:
        t = self.tile
        return f"Tile({t.rows}, {t.columns}, {t.depth}, {t.warps}, {t.stages}, group={t.group}), {self.programs} programs"

    def shared_bytes(self) -> int:
        """Of the operands' stages: half-precision rows and columns."""
        return (self.tile.rows + self.tile.columns) * self.tile.depth * 2 * self.tile.stages

    @contextmanager
    def set(self) -> Generator[None]:
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(tiles(), "tile_for", return_value=self.tile))
            stack.enter_context(mock.patch.object(tiles(), "_PROGRAMS", self.programs))
            yield


@dataclass
class Workload:
    name: str
    run: Run

    def result(self, config: Config) -> tuple[Tensor, ...]:
        with config.set():
            result = self.run()
        return result if isinstance(result, tuple) else (result,)


def workloads(b: Bench, dtypes: list[torch.dtype]) -> Iterator[Workload]:
    """Made one after the other, so that the inputs of one are in memory."""
    for dtype in dtypes:
        label = str(dtype)[6:]
        rows, width, features, k = b.shape((8192, 4096, 65536, 64), (17, 32, 2112, 2))
        x, W, bias = b.normal(rows, width).to(dtype), b.unit_rows(features, width, dtype), (b.normal(features) / 10).to(dtype)
        yield Workload(f"encode_topk {label}", lambda x=x, W=W, bias=bias, k=k: _run("encode_topk", x, W, bias, *(None,) * 4, k, True))
        # About k of a row exceed it: scores of unit rows are standard normal.
        theta = torch.tensor(-statistics.NormalDist().inv_cdf(k / features), device=b.device)
        yield Workload(
            f"encode_threshold {label}",
            lambda x=x, W=W, theta=theta: _run("encode_threshold", x, W, *(None,) * 5, theta, None),
        )
        del x, W, bias
        rows, width, size = b.shape((65536, 768, 3072), (17, 32, 96))
        x, W = b.normal(rows, width).to(dtype), b.normal(size, width).to(dtype)
        yield Workload(f"spline_hash {label}", lambda x=x, W=W: _run("spline_hash", x, W, None, None, 0, 0, 64))


def _run(op: str, *args: Any) -> Any:
    return OPS[op](*args, backend="triton")


def now(device: torch.device) -> Config:
    """What the table says."""
    return Config(tiles().tile_for(device), tiles()._PROGRAMS)


def shared_limit(device: torch.device) -> int:
    if device.type != "cuda":
        return 227 << 10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def shapes(start: Config, limit: int, quick: bool) -> list[Config]:
    """The first stage's candidates: for each shape the deepest pipelines that fit, once for a program a multiprocessor and once for two."""
    found = []
    for rows, columns, depth, warps in QUICK_SHAPES if quick else SHAPES:
        made = [replace(start.tile, rows=rows, columns=columns, depth=depth, warps=warps, stages=stages) for stages in STAGES]
        configs = [Config(tile, programs) for programs in (1, 2) for tile in made if Config(tile, 1).shared_bytes() * programs <= limit]
        for programs in (1, 2):
            found += [config for config in configs if config.programs == programs][-1 if quick else -2 :]
    return [config for config in dict.fromkeys(found) if config != start]


def around(config: Config) -> list[Config]:
    """The second stage's."""
    grouped = [Config(replace(config.tile, group=group), config.programs) for group in GROUPS]
    return [c for c in dict.fromkeys([*grouped, *(Config(config.tile, programs) for programs in PROGRAMS)]) if c != config]


class Tuner:
    def __init__(self, bench: Bench):
        self.bench, self.start = bench, now(bench.device)
        bench.report.path = bench.report.path.with_name(bench.report.path.name.replace("-gpu", "-tiles"))
        self.results = bench.report.entries

    def candidates(self) -> list[Config]:
        return shapes(self.start, shared_limit(self.bench.device), self.bench.quick)

    def time(self, work: Workload, config: Config, expected: tuple[Tensor, ...]) -> float | None:
        """The median ratio of the candidate's time to the table's tile; None where it cannot be used. Both are kept."""
        entry: dict[str, Any] = {"work": work.name, "config": str(config), **asdict(config)}
        self.results.append(entry)
        try:
            got = work.result(config)
            if not all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)):
                entry["failed"] = "other bits"
            else:
                entry.update(self._alternate(work, config))
        except Exception as error:
            entry["failed"] = f"{type(error).__name__}: {str(error).strip()[:200]}"
            self.bench.wait()  # a broken device ends the run here
        self.bench.say(f"{work.name:<26} {config}: {entry.get('failed') or '{ratio:.3f} of now, {milliseconds:.3f} ms'.format(**entry)}")
        self.save()
        return entry.get("ratio")

    def _alternate(self, work: Workload, config: Config) -> dict[str, float]:
        rounds = 1 if self.bench.quick else ROUNDS
        ways = {who: lambda _, one=one: self._once(work, one) for who, one in (("mine", config), ("now", self.start))}
        times = alternate(ways, least=rounds, most=rounds, seconds=0)
        ratios = [mine / now for mine, now in zip(times["mine"], times["now"])]
        return {
            "ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
            "milliseconds": statistics.median(times["mine"]), "now": statistics.median(times["now"]),
        }  # fmt: skip

    def _once(self, work: Workload, config: Config) -> float:
        with config.set():
            return self.bench.milliseconds(lambda _: work.run(), 1, 0)

    def tune(self, work: Workload) -> None:
        expected = work.result(self.start)
        best, least = self.start, 1.0
        for stage in range(2):
            for config in around(best)[: 1 if self.bench.quick else None] if stage else self.candidates():
                if self.bench.left() < 0:
                    self.bench.note(work.name, "", f"out of time before {config}")
                    self.save()
                    return
                ratio = self.time(work, config, expected)
                if ratio is not None and ratio < least:
                    best, least = config, ratio

    def winners(self) -> dict[str, str]:
        """The fastest configuration of each workload, and of all of them together by the geometric mean of ratios."""
        timed = [entry for entry in self.results if "ratio" in entry]
        found = {}
        for work in dict.fromkeys(entry["work"] for entry in timed):
            best = min((entry for entry in timed if entry["work"] == work), key=lambda entry: entry["ratio"])
            found[work] = f"{best['config']}: {best['ratio']:.3f}" if best["ratio"] < 1 else f"as it is: {self.start}"
        works = len(found)
        means: dict[str, float] = {}
        for config in dict.fromkeys(entry["config"] for entry in timed):
            ratios = [entry["ratio"] for entry in timed if entry["config"] == config]
            if len(ratios) == works:
                means[config] = math.exp(statistics.fmean(map(math.log, ratios)))
        if means:
            best = min(means, key=lambda config: means[config])
            found["all"] = f"{best}: {means[best]:.3f}" if means[best] < 1 else f"as it is: {self.start}"
        return found

    def save(self) -> None:
        b = self.bench
        b.report.save(
            capability=list(torch.cuda.get_device_capability(b.device)) if b.device.type == "cuda" else None, now=str(self.start),
            seconds=time.monotonic() - b.start, winners=self.winners(),
        )  # fmt: skip


def compile_all(tuner: Tuner, dtypes: list[torch.dtype], part: int, parts: int) -> None:
    """Runs every ``parts``-th candidate once, which leaves its kernels in Triton's cache."""
    for work in workloads(tuner.bench, dtypes):
        for config in tuner.candidates()[part::parts]:
            try:
                work.result(config)
                tuner.bench.wait()
            except Exception as error:  # said again where it is timed
                print(f"{work.name} {config}: {type(error).__name__}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune_gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run, not how fast")
    parser.add_argument("--compile", metavar="I/N", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and torch.cuda.is_available():
        options.device = f"cuda:{torch.cuda.current_device()}"
    device = torch.device(options.device)
    if (reason := triton_support.unavailable(device)) is not None:
        print(f"bench.tune_gpu: {reason}", file=sys.stderr)
        return 2
    dtypes = [torch.bfloat16, torch.float32] if device.type == "cuda" else [torch.float16, torch.float32]
    tuner = Tuner(Bench(device, options.out, options.minutes, options.quick, machine()))
    if options.compile:
        part, _, parts = options.compile.partition("/")
        compile_all(tuner, dtypes, int(part), int(parts))
        return 0
    if device.type == "cuda":
        n = max(1, min(12, (os.cpu_count() or 2) - 2))
        tuner.bench.say(f"compiling {len(tuner.candidates())} configurations in {n} processes")
        command = [sys.executable, "-m", "bench.tune_gpu", "--device", options.device, "--out", str(options.out)]
        command += ["--quick"] if options.quick else []
        children = [subprocess.Popen([*command, "--compile", f"{i}/{n}"]) for i in range(n)]
        for child in children:
            try:  # half of the time at the most
                child.wait(max(1.0, tuner.bench.left() - options.minutes * 30))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
    for work in workloads(tuner.bench, dtypes):
        tuner.tune(work)
    tuner.save()
    for work, text in tuner.winners().items():
        print(f"{work:<26} {text}")
    tuner.bench.say(f"stored {tuner.bench.report.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
