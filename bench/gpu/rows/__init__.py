"""What the GPU table measures, a file a family; each group of rows is a function of the ``Bench`` that times them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.gpu.harness import Bench
from bench.gpu.rows import codes, decode, encode, match, training
from bench.gpu.rows.encode import ENCODE, ENCODE_GROWTH
from bench.harness import name
from fastsae._core.timing import milliseconds


class Row(NamedTuple):
    """A group of rows; ``seconds``: what it needs before it is begun."""

    measure: Callable[[Bench], None]
    seconds: float
    shapes: str

    @property
    def name(self) -> str:
        return self.measure.__name__


def copy(b: Bench) -> None:
    """The two ceilings: what a large copy moves a second, read and written bytes together, and what cuBLAS's bf16 product computes."""
    n = (1 << 22) if b.quick else (1 << 30)
    source = b.normal(n // 4)
    target = torch.empty_like(source)
    b.copy_rate = 2 * n / _least_seconds(b, lambda _: target.copy_(source))
    size = 256 if b.quick else 8192
    left, right = b.normal(size, size).bfloat16(), b.normal(size, size).bfloat16()
    b.product_rate = 2 * size**3 / _least_seconds(b, lambda _: left @ right)
    b.say(f"copy {b.copy_rate / 1e12:.2f} TB/s, bf16 product {b.product_rate / 1e12:.0f} TFLOP/s")
    b.save()


def _least_seconds(b: Bench, call: Callable[[int], object]) -> float:
    """Of a call, after a warm-up."""
    milliseconds(call, b.device, 3)
    return 1e-3 * min(milliseconds(call, b.device, 5) for _ in range(5))


# In order of importance: what the time does not allow is at the end.
ROWS = [
    Row(copy, 5, "1 GiB; 8192x8192x8192"),
    Row(encode.encode_bf16, 30, name(ENCODE[0])),
    Row(encode.encode_fp32, 30, name(ENCODE[0])),
    Row(decode.decode, 45, name(ENCODE[0])),
    Row(training.step, 40, name(training.STEP[0])),
    Row(codes.spline_hash, 20, f"{name(codes.HASH[0][:3])}, {codes.HASH[0][3]} layers"),
    Row(match.select, 15, ", ".join(f"{rows}x{n} k={k}" for ((rows, n, k), _), _ in match.SELECT)),
    Row(codes.hamming, 15, "{0}x{0} of {1} bits k={2}".format(*codes.HAMMING[0])),
    Row(codes.signs, 10, name(codes.SIGNS[0])),
    Row(match.match, 40, "{0}x{0}x{1} k={2}".format(*match.MATCH[0])),
    Row(encode.overhead, 5, "1x64x512"),
    Row(training.optimisers, 20, name(training.STEP[0])),
    Row(encode.encode_smaller, 20, name(ENCODE_GROWTH[0])),
    Row(encode.growth, 25, ", ".join(map(name, encode.GROWTH[0]))),
    Row(encode.ragged, 20, name(ENCODE_GROWTH[0])),
    Row(encode.graphs, 15, "1 .. 256 rows x 2048x32768x64"),
    Row(encode.encode_compiled, 45, name(ENCODE[0])),
]
