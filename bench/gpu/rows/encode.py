"""The encoders: dense scores never leave the tile; growth, thresholds, CUDA graphs, host time."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import fastsae
from bench.gpu.harness import Bench, Call, Missing, at_precision
from bench.harness import name
from fastsae._core.timing import milliseconds
from fastsae.dispatch import OPS

ENCODE = (8192, 4096, 131072, 64), (32, 64, 2048, 8)
ENCODE_GROWTH = (8192, 2048, 32768, 64), (16, 32, 1024, 4)


def _encode(b: Bench, dtype: torch.dtype, sizes: tuple[tuple[int, ...], tuple[int, ...]], compiled: bool = False) -> None:
    rows, width, features, k = b.shape(*sizes)
    xs = [b.normal(rows, width).to(dtype) for _ in range(b.sets(features * width * dtype.itemsize))]
    W, bias = b.unit_rows(features, width, dtype), (b.normal(features) / 10).to(dtype)

    def args(i: int) -> tuple[Any, ...]:
        return xs[i % len(xs)], W, bias, None, None, None, None, k, True

    def plain(i: int) -> object:
        return functional.linear(xs[i % len(xs)], W, bias).relu().topk(k)

    label = f"encode_topk {str(dtype)[6:]}"
    shape = name((rows, width, features, k))
    if compiled:
        fast = torch.compile(lambda x: functional.linear(x, W, bias).relu().topk(k))
        others: dict[str, Call] = {"torch.compile linear+relu+topk": lambda i: fast(xs[i % len(xs)])}
        return b.operation("encode_topk", label + " compiled", shape, args, others, few=4, n_sets=len(xs))
    others = {}
    low_xs, low_W = ([x.bfloat16() for x in xs], W.bfloat16()) if dtype is torch.float32 else (xs, W)
    product = torch.empty(rows, features, device=b.device, dtype=torch.bfloat16)
    floor = "bf16 GEMM alone"
    others[floor] = lambda i: torch.mm(low_xs[i % len(xs)], low_W.T, out=product)
    if dtype is torch.float32:
        others["TF32 linear+relu+topk (inexact)"] = at_precision("high", plain)
        others["float32 GEMM alone"] = at_precision("highest", lambda i: functional.linear(xs[i % len(xs)], W, bias))
        targets = [(floor, 2.0, 1.5), ("TF32 linear+relu+topk (inexact)", 1.0, 1.0), ("float32 GEMM alone", 1 / 5, 1 / 5)]
    else:
        others["torch linear+relu+topk"] = plain
        targets = [(floor, 1.35, 1.10)]
    return b.operation(
        "encode_topk", label, shape, args, others, few=4, floor=floor, targets=[*targets, ("MiB", 256.0, 64.0)], n_sets=len(xs)
    )


def encode_bf16(b: Bench) -> None:
    _encode(b, torch.bfloat16, ENCODE)


def encode_fp32(b: Bench) -> None:
    _encode(b, torch.float32, ENCODE)


def encode_smaller(b: Bench) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        _encode(b, dtype, ENCODE_GROWTH)


def encode_compiled(b: Bench) -> None:
    _encode(b, torch.bfloat16, ENCODE, compiled=True)


def overhead(b: Bench) -> None:
    """Host time of a call on tiny inputs, the device not waited for: at most twice the CPU's 15 and 30 microseconds."""
    x, W = b.normal(1, 64), b.normal(512, 64)
    b.backends("encode_topk", (x, W, None, None, None, None, None, 8, True))
    latents = fastsae.encode_topk(x, W, k=8)
    leaf = W.clone().requires_grad_()
    calls: dict[str, tuple[Callable[[], object], float]] = {
        "encode_topk": (lambda: fastsae.encode_topk(x, W, k=8), 30),
        "decode": (lambda: fastsae.decode(latents, W), 30),
        "decode with gradient": (lambda: fastsae.decode(latents, leaf), 60),
    }
    for what, (call, most) in calls.items():
        for _ in range(20):
            call()
        b.wait()
        times: list[float] = []
        for _ in range(15):
            times.append(1e3 * milliseconds(lambda _, call=call: call(), repeat=50))
            b.wait()
        b.note(f"overhead {what}", "1x64x512", f"{statistics.median(times):.1f} us a call on the host, at most {most} with its launch")
    b.save()


GROWTH = (
    [(1024, 512, 2**n) for n in (12, 14, 16, 18, 20)] + [(n, 512, 65536) for n in (1, 64, 8192, 65536)],
    [(8, 32, 1024), (8, 32, 2048)],
)


def growth(b: Bench) -> None:
    """Time a row and memory over F and B."""
    for rows, width, features in GROWTH[b.quick]:
        x, W = b.normal(rows, width).bfloat16(), b.unit_rows(features, width, torch.bfloat16)
        args = (x, W, None, None, None, None, None, 32, True)
        shape = name((rows, width, features))
        b.operation("encode_topk", "encode_topk growth bfloat16", shape, lambda _, args=args: args, {}, few=4, first=True)
        del x, W, args
        b.clear()


def ragged(b: Bench) -> None:
    """What exceeds a threshold, about k of a row; once with a capacity, where the host does not wait for the number."""
    rows, width, features, k = b.shape(ENCODE_GROWTH[0], (16, 32, 1024, 4))
    theta = torch.tensor(-statistics.NormalDist().inv_cdf(k / features), device=b.device)  # scores are standard normal
    for dtype in (torch.bfloat16, torch.float32):
        xs = [b.normal(rows, width).to(dtype) for _ in range(b.sets(rows * width * dtype.itemsize))]
        W = b.unit_rows(features, width, dtype)
        for capacity in (None, 2 * rows * k):

            def args(i: int, xs: Any = xs, W: Tensor = W, capacity: int | None = capacity) -> tuple[Any, ...]:
                return xs[i % len(xs)], W, None, None, None, None, None, theta, None, capacity

            def verify(backend: str, args: Any = args) -> None:
                values, col, crow, flags = OPS["encode_threshold"](*args(0), backend=backend)
                few, n = args(0), int(crow[8])
                OPS["encode_threshold"].check((few[0][:8], *few[1:-1], None), (values[:n], col[:n], crow[:9], flags))

            def plain(i: int, xs: Any = xs, W: Tensor = W) -> object:
                z = functional.linear(xs[i % len(xs)], W)
                row, col = (z > theta).nonzero(as_tuple=True)
                return z[row, col], row, col

            b.row(
                f"encode_threshold {str(dtype)[6:]}{'' if capacity is None else ' capacity'}", f"{rows}x{width}x{features} about {k} a row",
                b.ours("encode_threshold", args), {"torch linear + nonzero": plain}, verify=verify, n_sets=len(xs),
            )  # fmt: skip
        del xs, W
        b.clear()


def graphs(b: Bench) -> None:
    """Encode and decode of few rows replayed from a CUDA graph: without the host's part, which the overhead row times."""
    if b.device.type != "cuda":
        raise Missing(f"device {b.device.type} has no graphs (supported: cuda)")
    width, features, k = (64, 2048, 8) if b.quick else (2048, 32768, 64)
    W, W_dec = b.unit_rows(features, width, torch.bfloat16), b.unit_rows(features, width, torch.bfloat16)
    for rows in (1, 16, 256):
        x = b.normal(rows, width).bfloat16()
        ways = {
            "fastsae": lambda x=x: fastsae.decode(fastsae.encode_topk(x, W, k=k), W_dec),
            "torch": lambda x=x: _dense_code(x, W, k) @ W_dec,
        }
        calls: dict[str, Call] = {}
        for who, way in ways.items():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles
                for _ in range(3):
                    way()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                way()
            calls[who] = lambda i, graph=graph: graph.replay()
        backend = b.backends("encode_topk", (x, W, None, None, None, None, None, k, True))[0]
        b.row("encode+decode in a graph", f"{rows}x{width}x{features}x{k}", {backend: calls.pop("fastsae")}, calls)


def _dense_code(x: Tensor, W: Tensor, k: int) -> Tensor:
    values, indices = functional.linear(x, W).relu().topk(k)
    return torch.zeros(x.shape[0], W.shape[0], device=x.device, dtype=x.dtype).scatter(1, indices, values)
