"""The clock of every measured figure: a call, several ways in turns, a stretch of work."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping

import torch

CPU = torch.device("cpu")


def milliseconds(call: Callable[[int], object], device: torch.device = CPU, repeat: int = 1, first: int = 0) -> float:
    """Mean time of ``call(first), .., call(first + repeat - 1)``; on a GPU that of the kernels, by events."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for i in range(repeat):
            call(first + i)
        return (time.perf_counter() - begin) * 1e3 / repeat
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for i in range(repeat):
        call(first + i)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / repeat


def alternate(
    ways: Mapping[str, Callable[[int], float]], *, least: int, most: int, seconds: float, late: Callable[[], bool] = lambda: False
) -> dict[str, list[float]]:
    """What every way returns, turn by turn, so that a slow spell of the machine meets all.

    Args:
        ways: by name, functions of the turn's number that return its time.
        least, most, seconds: at least so many turns, then until so many seconds are over, at most so many turns.
        late: asked from the third turn on; True ends it, whatever is missing.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    begin, turn = time.monotonic(), 0
    while ways and (turn < least or (turn < most and time.monotonic() - begin < seconds)):
        if turn >= 2 and late():
            break
        for name, way in ways.items():
            times[name].append(way(turn))
        turn += 1
    return times


def spread(times: list[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "min": min(times), "max": max(times), "rounds": len(times)}


class Stopwatch:
    """Time since it was made, by the clock and of CPU: this process's threads, and the processes it started that have ended."""

    def __init__(self) -> None:
        self._clock, self._cpu = time.perf_counter(), _cpu_seconds()

    def seconds(self) -> float:
        return time.perf_counter() - self._clock

    def cpu_seconds(self) -> float:
        return _cpu_seconds() - self._cpu


def _cpu_seconds() -> float:
    return time.process_time() + sum(os.times()[2:4])
