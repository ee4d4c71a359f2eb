"""Times tile shapes of the Triton kernels over scores on this GPU: what the tables of kernels/_tile.py should say for it.

    python -m bench.tune_gpu --out DIR --minutes 8
    TRITON_INTERPRET=1 python -m bench.tune_gpu --device cpu --quick       the same code in the interpreter, tiny

For each workload and dtype two rows: the shapes of a tile with their warps and stages, then, for the fastest, how many row tiles share
their features and how many programs a multiprocessor gets. In a row all candidates alternate with the tile that the table has now. They are
compiled in parallel before anything is timed. One whose shared memory does not fit, or whose result has other bits, is named and cannot
win. DIR / <date>-<device>-tiles.json is written anew after each row.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench.gpu.harness import Bench, Call
from fastsae._core import triton_support
from fastsae._core.machine import machine
from fastsae.dispatch import OPS

# (rows, columns, depth, warps) of a tile, columns a multiple of 64 (the words of a packed code); stages from what fits.
SHAPES = [
    (128, 128, 64, 8), (128, 128, 64, 4), (128, 256, 64, 8), (256, 128, 64, 8), (128, 128, 32, 8), (128, 128, 128, 8), (64, 128, 64, 4),
    (64, 256, 64, 8), (128, 64, 64, 4),
]  # fmt: skip
STAGES = (2, 3, 4, 5)
QUICK_SHAPES = [(16, 64, 64, 4)]
GROUPS = (4, 8, 16)
PROGRAMS = (1, 2, 3, 4)
NOW = "now"


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

    def set(self) -> AbstractContextManager[Any]:
        return mock.patch.multiple(tiles(), tile_for=lambda _: self.tile, _PROGRAMS=self.programs)


class Workload(NamedTuple):
    name: str
    op: str
    args: tuple[Any, ...]

    def result(self, config: Config) -> tuple[Tensor, ...]:
        with config.set():
            result = OPS[self.op](*self.args, backend="triton")
        return result if isinstance(result, tuple) else (result,)


def workloads(b: Bench, dtypes: list[torch.dtype]) -> Iterator[Workload]:
    """Made one dtype after the other, so that the inputs of one are in memory."""
    for dtype in dtypes:
        rows, width, features, k = b.shape((8192, 4096, 65536, 64), (17, 32, 2112, 2))
        x, W, bias = b.normal(rows, width).to(dtype), b.unit_rows(features, width, dtype), (b.normal(features) / 10).to(dtype)
        # About k of a row exceed it: scores of unit rows are standard normal.
        theta = torch.tensor(-statistics.NormalDist().inv_cdf(k / features), device=b.device)
        rows, width, size = b.shape((65536, 768, 3072), (17, 32, 96))
        layer = b.normal(rows, width).to(dtype), b.normal(size, width).to(dtype)
        for op, args in (
            ("encode_topk", (x, W, bias, *(None,) * 4, k, True)),
            ("encode_threshold", (x, W, *(None,) * 5, theta, None)),
            ("spline_hash", (*layer, None, None, 0, 0, 64)),
        ):
            yield Workload(f"{op} {str(dtype)[6:]}", op, args)


def now(device: torch.device) -> Config:
    """What the table says."""
    return Config(tiles().tile_for(device), tiles()._PROGRAMS)


def shapes(start: Config, limit: int, quick: bool) -> list[Config]:
    """The first row's candidates: for each shape the deepest pipelines that fit, once for a program a multiprocessor and once for two."""
    found = []
    for rows, columns, depth, warps in QUICK_SHAPES if quick else SHAPES:
        made = [replace(start.tile, rows=rows, columns=columns, depth=depth, warps=warps, stages=stages) for stages in STAGES]
        for programs in (1, 2):
            fits = [Config(tile, programs) for tile in made if Config(tile, 1).shared_bytes() * programs <= limit]
            found += fits[-1 if quick else -2 :]
    return [config for config in dict.fromkeys(found) if config != start]


def around(config: Config) -> list[Config]:
    """The second row's."""
    grouped = [Config(replace(config.tile, group=group), config.programs) for group in GROUPS]
    return [c for c in dict.fromkeys([*grouped, *(Config(config.tile, programs) for programs in PROGRAMS)]) if c != config]


def candidates(b: Bench) -> list[Config]:
    limit = torch.cuda.get_device_properties(b.device).shared_memory_per_block_optin if b.device.type == "cuda" else 227 << 10
    return shapes(now(b.device), limit, b.quick)


def tune(b: Bench, work: Workload) -> None:
    """Both rows of a workload."""
    start = now(b.device)
    expected = work.result(start)
    ways = {str(config): config for config in candidates(b)}
    for stage in range(2):
        if b.left() < 0:
            b.note(work.name, "", "out of time")
            return
        ways |= {NOW: start}

        def verify(way: str, ways: dict[str, Config] = ways) -> None:
            if not all(torch.equal(one, other) for one, other in zip(expected, work.result(ways[way]), strict=True)):
                raise AssertionError("other bits")

        ours: dict[str, Call] = {way: lambda _, config=config: work.result(config) for way, config in ways.items()}
        b.row(work.name, f"stage {stage + 1}", {NOW: ours.pop(NOW), **ours}, {}, verify=verify, n_sets=1)
        best = min(ratios := measured(b.report.entries[-1]), key=lambda way: ratios[way], default=NOW)
        ways = {str(config): config for config in around(ways[best])[: 1 if b.quick else None]}
        save(b)


def measured(entry: dict[str, Any]) -> dict[str, float]:
    """Each candidate's time over that of the table's tile."""
    times = {who[len("fastsae (") : -1]: found["median"] for who, found in entry["others"].items()} if "ours" in entry else {}
    return {NOW: 1.0, **{way: median / entry["ours"]["median"] for way, median in times.items()}}


def winners(b: Bench) -> dict[str, str]:
    """The fastest configuration of each workload, and of all of them together by the geometric mean of ratios."""
    works: dict[str, dict[str, float]] = {}
    for entry in b.report.entries:
        works[entry["op"]] = {**measured(entry), **works.get(entry["op"], {})}
    common = set[str]().union(*works.values()).intersection(*works.values())
    means = {way: math.exp(statistics.fmean(math.log(ratios[way]) for ratios in works.values())) for way in sorted(common)}
    found = {work: min(ratios.items(), key=lambda item: item[1]) for work, ratios in {**works, "all": means}.items() if ratios}
    return {work: f"{now(b.device) if way == NOW else way}: {ratio:.3f}" for work, (way, ratio) in found.items()}


def save(b: Bench) -> None:
    capability = list(torch.cuda.get_device_capability(b.device)) if b.device.type == "cuda" else None
    b.report.save(capability=capability, now=str(now(b.device)), winners=winners(b))


def compile_part(b: Bench, dtypes: list[torch.dtype], part: int, parts: int) -> None:
    """Runs every ``parts``-th candidate once, which leaves its kernels in Triton's cache."""
    for work in workloads(b, dtypes):
        for config in candidates(b)[part::parts]:
            try:
                work.result(config)
                b.wait()
            except Exception as error:  # said again where it is timed
                print(f"{work.name} {config}: {type(error).__name__}", file=sys.stderr)


def compile_all(b: Bench, command: list[str], most: float) -> None:
    n = max(1, min(12, (os.cpu_count() or 2) - 2))
    b.say(f"compiling {len(candidates(b))} configurations in {n} processes")
    children = [subprocess.Popen([*command, "--compile", f"{i}/{n}"]) for i in range(n)]
    for child in children:
        try:
            child.wait(max(1.0, b.left() - most))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


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
    b = Bench(device, options.out, options.minutes, options.quick, machine())
    b.report.path = b.report.path.with_name(b.report.path.name.replace("-gpu", "-tiles"))
    if options.compile:
        compile_part(b, dtypes, *map(int, options.compile.split("/")))
        return 0
    if device.type == "cuda":
        command = [sys.executable, "-m", "bench.tune_gpu", "--device", options.device, "--out", str(options.out)]
        compile_all(b, command + ["--quick"] * options.quick, options.minutes * 30)  # half of the time at the most
    for work in workloads(b, dtypes):
        tune(b, work)
    save(b)
    for work, text in winners(b).items():
        print(f"{work:<26} {text}")
    b.say(f"stored {b.report.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
