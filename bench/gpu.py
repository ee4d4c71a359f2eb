"""The GPU table: every row measured beside its floor and rivals on one device, results kept as they come.

    fastsae bench --device cuda --out DIR            the whole table
    python -m bench.gpu --device cpu --quick         the same code on small shapes, anywhere

Kernel time by CUDA events around as many calls as make a millisecond; ours, the floor and the rivals alternate; median of at least 5 rounds
after a warm-up, with min and max. Inputs are random, and as many sets of them rotate as pass the L2 cache four times over. A result that
its specification refuses is reported and not timed. After each row the JSON is written anew: what was measured survives a kill.
Rows whose backend is missing say why, in place of a time. On a GPU the rows run in a process of their own (``supervise``): one that
crashes, hangs or leaves the device broken is noted, and the others go on in a new process.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import fastsae
from fastsae._core import files
from fastsae._core.checkout import checkout_hidden
from fastsae.dispatch import OPS

Call = Callable[[int], object]
Target = tuple[str, float, float]
"""(name of a rival or floor, must, goal) for our time over its; ("copy", must, goal) for the part of the copy rate; ("MiB", must, goal)
for memory beyond what stood before the call, result included."""

BROKEN = 17
"""Exit code of a process whose device answers no more."""

L2_ON_CPU = 32 << 20
"""Bytes that inputs must pass where the device does not tell its L2."""


class Missing(Exception):
    """A row that cannot be measured here; the message is the reason."""


class Bench:
    """Measures rows, prints them as they come and keeps them in ``out / <date>-<device>-gpu.json``."""

    def __init__(self, device: torch.device, out: Path, minutes: float, quick: bool, machine: dict[str, Any], begun: float | None = None):
        self.device, self.quick, self.machine = device, quick, machine
        self.start, self.minutes = time.monotonic() - (0 if begun is None else max(0.0, time.time() - begun)), minutes
        self.seconds = 0.3 if quick else 6.0  # for the rounds of one row
        self.entries: list[dict[str, Any]] = []
        self.notes: list[dict[str, str]] = []
        self.generator = torch.Generator(device=device).manual_seed(0)
        is_cuda = device.type == "cuda"
        self.l2 = torch.cuda.get_device_properties(device).L2_cache_size if is_cuda else L2_ON_CPU
        self.copy_rate = self.product_rate = 0.0
        label = machine["gpu"][device.index or 0] if is_cuda else machine["cpu"]
        stem = f"{datetime.date.today().isoformat()}-{re.sub(r'[^a-z0-9]+', '-', label.lower()).strip('-')}-gpu{'-quick' if quick else ''}"
        self.path = out / f"{stem}.json"
        if begun is not None and self.path.exists():
            self.resume(json.loads(self.path.read_text()), begun)
        self.begun = time.time() if begun is None else begun

    def resume(self, report: dict[str, Any], begun: float) -> None:
        """Takes over what an earlier process of the same run has measured."""
        if report.get("begun") == begun:
            self.entries, self.notes = report["results"], report["notes"]
            self.copy_rate, self.product_rate = report["copy_bytes_per_second"], report["bf16_flops_per_second"]

    # -- inputs

    def shape(self, full: tuple[int, ...], quick: tuple[int, ...]) -> tuple[int, ...]:
        return quick if self.quick else full

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)

    def unit_rows(self, rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        value = self.normal(rows, width)
        return value.div_(torch.linalg.vector_norm(value, dim=1, keepdim=True)).to(dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

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

    def milliseconds(self, call: Call, repeat: int, first: int) -> float:
        """Mean time of ``repeat`` calls on the sets from ``first`` on."""
        if self.device.type != "cuda":
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

    def extra_megabytes(self, call: Call) -> float | None:
        if self.device.type != "cuda":
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        result = call(0)
        self.wait()
        del result
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20

    # -- rows

    def backends(self, op: str, args: tuple) -> list[str]:
        """The rows that serve these arguments, the reference apart; Missing with every row's reason where none does."""
        found = [row.backend for row in OPS[op].rows[:-1] if row.reason(args) is None]
        if not found:
            reasons = "; ".join(f"{backend}: {reason}" for backend, reason in OPS[op].reasons(args)[:-1])
            raise Missing(f"no backend but the reference serves {op}: {reasons or 'none is written'}")
        return found

    def row(
        self,
        op: str,
        shape: str,
        ours: dict[str, Call],
        others: dict[str, Call],
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
        for backend in list(ours):
            try:
                if verify is not None:
                    verify(backend)
                self.wait()
            except Exception as error:
                failures[f"fastsae ({backend})"] = f"{type(error).__name__}: {str(error)[:300]}"
                self.say(f"  fastsae ({backend}) REFUSED: {failures[f'fastsae ({backend})']}")
                del ours[backend]
        calls = {f"fastsae ({backend})": call for backend, call in ours.items()} | others
        repeat: dict[str, int] = {}
        first_call: dict[str, float] = {}
        for who, call in list(calls.items()):
            try:
                begin = time.monotonic()
                call(0)
                self.wait()
                first_call[who] = time.monotonic() - begin
                once = min(self.milliseconds(call, 1, i) for i in (1, 2))
                repeat[who] = max(1, min(100, int(1.0 / max(once, 1e-3))))
            except Exception as error:
                failures[who] = f"{type(error).__name__}: {str(error)[:300]}"
                self.say(f"  no time for {who}: {failures[who]}")
                del calls[who]
                self.wait()
        times: dict[str, list[float]] = {who: [] for who in calls}
        begin, turn = time.monotonic(), 0
        while calls and (turn < 5 or (turn < 30 and time.monotonic() - begin < self.seconds)):
            if turn >= 2 and self.left() < 0:
                break
            for who, call in calls.items():
                times[who].append(self.milliseconds(call, repeat[who], turn * 7 % n_sets))
            turn += 1
        spreads = {
            who: {"median": statistics.median(t), "min": min(t), "max": max(t), "rounds": len(t), "first_call_s": first_call[who]}
            for who, t in times.items()
        }
        memory: dict[str, float | None] = {}
        for who, call in calls.items():
            try:
                memory[who] = self.extra_megabytes(call)
            except Exception as error:  # torn down below if it was the device
                failures[who] = f"memory: {type(error).__name__}: {str(error)[:300]}"
                memory[who] = None
        mine = next((f"fastsae ({backend})" for backend in ours if f"fastsae ({backend})" in spreads), None)
        if mine is None:
            self.note(op, shape, f"not measured: {failures}")
            self.entries.append({"op": op, "shape": shape, "others": spreads, "failures": failures})
            self.save()
            return
        entry: dict[str, Any] = {
            "op": op, "shape": shape, "backend": mine[len("fastsae (") : -1], "ours": spreads.pop(mine),
            "others": spreads, "floor": floor, "extra_mb": {"ours": memory.pop(mine), **memory}, "failures": failures,
        }  # fmt: skip
        median = entry["ours"]["median"]
        if n_bytes is not None and self.copy_rate:
            entry["bytes"] = n_bytes
            entry["of_copy_rate"] = n_bytes / (median * 1e-3) / self.copy_rate
        if self.device.type == "cuda" and not self.quick:  # the targets are a GPU's, at these shapes
            entry["targets"] = [self.verdict(target, entry) for target in targets]
        self.entries.append(entry)
        self.save()
        ratios = ", ".join(f"{who} {median / t['median']:.2f}" for who, t in spreads.items())
        verdicts = " ".join(verdict["text"] for verdict in entry.get("targets", []))
        self.say(f"  {mine}: {median:.3f} ms; of others' time: {ratios or 'none'} {verdicts}")

    def verdict(self, target: Target, entry: dict[str, Any]) -> dict[str, Any]:
        beside, must, goal = target
        if beside == "MiB":
            got = entry["extra_mb"]["ours"]
            reached = [got is not None and got <= limit for limit in (must, goal)]
        elif beside == "copy":
            got = entry.get("of_copy_rate")
            reached = [got is not None and got >= limit for limit in (must, goal)]
        else:
            times = entry["others"].get(beside)
            got = None if times is None else entry["ours"]["median"] / times["median"]
            reached = [got is not None and got <= limit for limit in (must, goal)]
        text = "goal reached" if reached[1] else "must reached" if reached[0] else "MISSED" if got is not None else "not measured"
        figures = f"{'none' if got is None else f'{got:.2f}'} of {beside}, must {must:.2f}, goal {goal:.2f}"
        return {"beside": beside, "must": must, "goal": goal, "got": got, "text": f"[{text}: {figures}]"}

    def note(self, op: str, shape: str, text: str) -> None:
        self.notes.append({"op": op, "shape": shape, "note": text})
        self.say(f"  {op}: {text}")

    def save(self) -> None:
        report = {
            "date": datetime.date.today().isoformat(), "begun": self.begun, "quick": self.quick, **self.machine, "device": str(self.device),
            "copy_bytes_per_second": self.copy_rate, "bf16_flops_per_second": self.product_rate, "l2_bytes": self.l2,
            "seconds": time.monotonic() - self.start,
            "results": self.entries, "notes": self.notes,
        }  # fmt: skip
        files.replace_text(self.path, json.dumps(report, indent=1) + "\n")


@contextmanager
def precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def sparsify_decoder(b: Bench) -> Any:
    """sparsify's decoder of (indices, values, W_dec.mT), or None with a note that says why."""
    if b.device.type == "cpu":
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    try:
        with checkout_hidden():
            from sparsify.utils import decoder_impl  # pyright: ignore[reportMissingImports]
    except Exception as error:
        b.note("decode", "", f"no row for sparsify: {type(error).__name__}: {error}")
        return None
    return decoder_impl


# ---------------------------------------------------------------- the rows


def copy(b: Bench) -> None:
    """The two ceilings: what a large copy moves a second, read and written bytes together, and what cuBLAS's bf16 product computes."""
    n = (1 << 22) if b.quick else (1 << 30)
    source, target = b.normal(n // 4), torch.empty(n // 4, device=b.device)
    b.milliseconds(lambda _: target.copy_(source), 3, 0)
    best = min(b.milliseconds(lambda _: target.copy_(source), 5, 0) for _ in range(5))
    b.copy_rate = 2 * n / (best * 1e-3)
    size = 256 if b.quick else 8192
    left, right = b.normal(size, size).bfloat16(), b.normal(size, size).bfloat16()
    b.milliseconds(lambda _: left @ right, 3, 0)
    b.product_rate = 2 * size**3 / (min(b.milliseconds(lambda _: left @ right, 5, 0) for _ in range(5)) * 1e-3)
    b.say(f"copy {b.copy_rate / 1e12:.2f} TB/s, bf16 product {b.product_rate / 1e12:.0f} TFLOP/s")
    b.save()


ENCODE = (8192, 4096, 131072, 64), (32, 64, 2048, 8)
ENCODE_GROWTH = (8192, 2048, 32768, 64), (16, 32, 1024, 4)


def _encode(b: Bench, dtype: torch.dtype, sizes: tuple[tuple[int, ...], tuple[int, ...]], compiled: bool = False) -> None:
    rows, width, features, k = b.shape(*sizes)
    xs = [b.normal(rows, width).to(dtype) for _ in range(b.sets(features * width * dtype.itemsize))]
    W, bias = b.unit_rows(features, width, dtype), (b.normal(features) / 10).to(dtype)

    def args(i: int) -> tuple:
        return xs[i % len(xs)], W, bias, None, None, None, None, k, True

    ours: dict[str, Call] = {
        backend: lambda i, backend=backend: OPS["encode_topk"](*args(i), backend=backend) for backend in b.backends("encode_topk", args(0))
    }

    def verify(backend: str) -> None:
        few = (xs[0][:4], *args(0)[1:])
        whole = OPS["encode_topk"](*args(0), backend=backend)
        OPS["encode_topk"].check(few, (whole[0][:4], whole[1][:4]))

    def plain(i: int) -> object:
        return functional.linear(xs[i % len(xs)], W, bias).relu().topk(k)

    label = f"encode_topk {str(dtype)[6:]}"
    shape = "x".join(map(str, (rows, width, features, k)))
    if compiled:
        fast = torch.compile(lambda x: functional.linear(x, W, bias).relu().topk(k))
        others: dict[str, Call] = {"torch.compile linear+relu+topk": lambda i: fast(xs[i % len(xs)])}
        return b.row(label + " compiled", shape, ours, others, verify=verify, n_sets=len(xs))
    others = {}
    low_xs, low_W = ([x.bfloat16() for x in xs], W.bfloat16()) if dtype is torch.float32 else (xs, W)
    product = torch.empty(rows, features, device=b.device, dtype=torch.bfloat16)
    floor, memory = "bf16 GEMM alone", ("MiB", 256.0, 64.0)
    others[floor] = lambda i: torch.mm(low_xs[i % len(xs)], low_W.T, out=product)
    if dtype is torch.float32:

        def tf32(i: int) -> object:
            with precision("high"):
                return functional.linear(xs[i % len(xs)], W, bias).relu().topk(k)

        def alone(i: int) -> object:
            with precision("highest"):
                return functional.linear(xs[i % len(xs)], W, bias)

        others["TF32 linear+relu+topk (inexact)"] = tf32
        others["float32 GEMM alone"] = alone
        targets: list[Target] = [(floor, 2.0, 1.5), ("TF32 linear+relu+topk (inexact)", 1.0, 1.0), ("float32 GEMM alone", 1 / 5, 1 / 5)]
        return b.row(label, shape, ours, others, verify=verify, floor=floor, targets=[*targets, memory], n_sets=len(xs))
    others["torch linear+relu+topk"] = plain
    return b.row(label, shape, ours, others, verify=verify, floor=floor, targets=[(floor, 1.35, 1.10), memory], n_sets=len(xs))


def encode_bf16(b: Bench) -> None:
    _encode(b, torch.bfloat16, ENCODE)


def encode_fp32(b: Bench) -> None:
    _encode(b, torch.float32, ENCODE)


def encode_smaller(b: Bench) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        _encode(b, dtype, ENCODE_GROWTH)


def encode_compiled(b: Bench) -> None:
    _encode(b, torch.bfloat16, ENCODE, compiled=True)


def _latents(b: Bench, rows: int, features: int, k: int, n: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    return [(b.normal(rows, k).abs().to(dtype), b.integers(0, features, rows, k)) for _ in range(n)]


def decode(b: Bench) -> None:
    """Forward and both gradients; bytes: the gathered rows, values and indices, and what is written once."""
    rows, width, features, k = b.shape(*ENCODE)
    decoder = sparsify_decoder(b)
    for dtype in (torch.bfloat16, torch.float32):
        e, n = dtype.itemsize, rows * k
        W = b.unit_rows(features, width, dtype)
        sets = _latents(b, rows, features, k, 2, dtype)
        grads = [b.normal(rows, width).to(dtype) for _ in sets]
        shape, tag = "x".join(map(str, (rows, width, features, k))), str(dtype)[6:]

        def forward(i: int, W: Tensor = W, sets: Any = sets) -> tuple:
            return *sets[i % len(sets)], None, W, None

        def check_forward(backend: str, forward: Any = forward) -> None:
            values, indices, _, W, _ = forward(0)
            OPS["decode"].check((values[:8], indices[:8], None, W, None), OPS["decode"](*forward(0), backend=backend)[:8])

        others: dict[str, Call] = {
            "torch embedding_bag": lambda i, W=W, sets=sets: functional.embedding_bag(
                sets[i % 2][1], W, per_sample_weights=sets[i % 2][0], mode="sum"
            ),
            "torch.sparse CSR @ W": _csr(b, sets, W, rows, features, k),
        }
        if decoder is not None:
            others["sparsify's decoder"] = lambda i, W=W, sets=sets: decoder(sets[i % 2][1], sets[i % 2][0], W.mT)
        b.row(
            f"decode {tag}", shape, _by_backend(b, "decode", forward), others, verify=check_forward,
            n_bytes=n * (width * e + e + 8) + rows * width * e, targets=[("copy", 0.7, 0.9)],
        )  # fmt: skip

        def dvalues(i: int, W: Tensor = W, sets: Any = sets, grads: Any = grads) -> tuple:
            return grads[i % 2], sets[i % 2][1], None, W

        def check_dvalues(backend: str, dvalues: Any = dvalues) -> None:
            grad, indices, _, W = dvalues(0)
            result = OPS["decode_dvalues"](*dvalues(0), backend=backend)
            OPS["decode_dvalues"].check((grad[:8], indices[:8], None, W), result[:8])

        b.row(
            f"decode_dvalues {tag}", shape, _by_backend(b, "decode_dvalues", dvalues), {}, verify=check_dvalues,
            n_bytes=n * (width * e + 8 + e) + rows * width * e, targets=[("copy", 0.7, 0.9)],
        )  # fmt: skip
        out = torch.empty_like(W)

        def dweight(i: int, sets: Any = sets, grads: Any = grads, out: Tensor = out) -> tuple:
            return *sets[i % 2], None, grads[i % 2], out

        def check_dweight(backend: str, dweight: Any = dweight, out: Tensor = out) -> None:
            OPS["decode_dweight"](*dweight(0), backend=backend)
            values, indices, _, grad, _ = dweight(0)
            some = indices.flatten()[:8].unique()  # rows of the result against float64
            chosen = torch.isin(indices, some)
            slots = chosen.nonzero()
            products = values[chosen].double()[:, None] * grad[slots[:, 0]].double()
            position = torch.searchsorted(some, indices[chosen])
            exact = torch.zeros(some.numel(), width, device=b.device, dtype=torch.float64).index_add_(0, position, products)
            size = torch.zeros_like(exact).index_add_(0, position, products.abs())
            from fastsae.testing import check_values

            check_values(out[some], exact, exact.to(out.dtype), size)

        leaf = W.detach().clone().requires_grad_()

        def bag_backward(i: int, leaf: Tensor = leaf, sets: Any = sets, grads: Any = grads) -> object:
            values, indices = sets[i % 2]
            return torch.autograd.grad(functional.embedding_bag(indices, leaf, per_sample_weights=values, mode="sum"), leaf, grads[i % 2])

        b.row(
            f"decode_dweight {tag}", shape, _by_backend(b, "decode_dweight", dweight),
            {"torch embedding_bag forward + backward": bag_backward, "clearing the gradient": lambda i, out=out: out.zero_()},
            verify=check_dweight, floor="clearing the gradient", n_bytes=n * (width * e + e + 8) + features * width * e,
            targets=[("copy", 0.7, 0.9)],
        )  # fmt: skip
        del W, out, leaf, sets, grads, others
        _clear(b)


def _csr(b: Bench, sets: Any, W: Tensor, rows: int, features: int, k: int) -> Call:
    """torch's sparse product; the matrix is built outside the timing."""
    matrices: list[Tensor] = []
    crow = torch.arange(0, rows * k + 1, k, device=b.device)

    def run(i: int) -> object:
        if not matrices:
            matrices.extend(
                torch.sparse_csr_tensor(crow, indices.flatten(), values.flatten(), (rows, features), check_invariants=False)
                for values, indices in sets
            )
        return matrices[i % len(matrices)] @ W

    return run


def _by_backend(b: Bench, op: str, args: Callable[[int], tuple]) -> dict[str, Call]:
    return {backend: lambda i, backend=backend: OPS[op](*args(i), backend=backend) for backend in b.backends(op, args(0))}


def _clear(b: Bench) -> None:
    if b.device.type == "cuda":
        torch.cuda.synchronize(b.device)
        torch.cuda.empty_cache()


def step(b: Bench) -> None:
    """The whole training step of a TopK SAE with exact Adam and unit-norm decoder rows."""
    from bench import training

    rows, width, features, k = b.shape((8192, 2048, 65536, 64), (32, 64, 2048, 8))
    start = training.Start(b.unit_rows(features, width), torch.zeros(width, device=b.device), k)
    x = b.normal(rows + rows // 4, width)
    probe = x if b.device.type == "cpu" else x[: rows + 64]
    choice = b.backends("encode_topk", (probe[:8], start.W, None, None, None, None, None, k, True))
    xs = [b.normal(rows, width) for _ in range(2)]
    mine = training.ours(start)
    others = {**training.plain_ways(start), "dense torch (scatter, linear, Adam)": dense(start)}
    others |= training.peers(start, ["sparsify, torch Adam"] if "sparsify, torch Adam" in training.PEERS else None)
    calls: dict[str, Call] = {who: lambda i, runner=runner: runner.step(xs[i % 2]) for who, runner in others.items()}

    def verify(_: str) -> None:
        training.check_step(
            training.ours(start), training.plain(start), training.distinct_rows(x[: rows // 8], start, rows // 16), start.lr
        )
        _clear(b)

    # Bytes of an exact Adam: weights and moments read and written once.
    half, low, product = start.W.bfloat16(), xs[0].bfloat16(), torch.empty(rows, features, device=b.device, dtype=torch.bfloat16)
    states = [torch.zeros_like(start.W) for _ in range(6)]

    def floor(_: int) -> None:
        torch.mm(low, half.T, out=product)
        for state in states:
            state.add_(1)

    calls["one bf16 GEMM, one pass over weights and moments"] = floor
    targets = [("sparsify, torch Adam", 1 / 1.5, 1 / 2), ("dense torch (scatter, linear, Adam)", 1 / 3, 1 / 4)]
    shape = "x".join(map(str, (rows, width, features, k)))
    b.row(
        "training step", shape, {choice[0]: lambda i: mine.step(xs[i % 2])}, calls, verify=verify,
        floor="one bf16 GEMM, one pass over weights and moments", targets=targets,
    )  # fmt: skip


def optimisers(b: Bench) -> None:
    """One weight matrix from slots. torch gets the dense gradient for nothing ("given"), or our decode_dweight writes it first."""
    rows, width, features, k = b.shape((8192, 2048, 65536, 64), (32, 64, 2048, 8))
    shape = "x".join(map(str, (rows, width, features, k)))
    sets, grads = _latents(b, rows, features, k, 2, torch.float32), [b.normal(rows, width) for _ in range(2)]
    gathered = rows * k * (width * 4 + 12)
    lr, momentum, share = 1e-3, 0.95, 0.1

    def adam(W: Tensor, m: Tensor, v: Tensor, slots: tuple) -> tuple:
        return W, m, v, *slots, None, lr, 0.9, 0.999, 1e-8, 0.0, 10, False, False

    def signum(y: Tensor, z: Tensor, slots: tuple) -> tuple:
        return y, z, *slots, lr, momentum, share, False, False

    def torch_signum(y: Tensor, z: Tensor, g: Tensor) -> None:
        y.lerp_(z, 1 - 1 / momentum)
        z.sub_(g.sign(), alpha=lr)
        y.lerp_(z, share).lerp_(z, 1 - momentum)

    for op, args, n_states in (("adam", adam, 2), ("signum", signum, 1)):
        W, dense = b.unit_rows(features, width), torch.empty(features, width, device=b.device)
        states = [torch.zeros_like(W) for _ in range(n_states)]
        twin = [t.clone() for t in (W, *states)]

        def slots(i: int) -> tuple:
            return grads[i % 2], *sets[i % 2], None

        def ours(i: int, args: Any = args, W: Tensor = W, states: Any = states) -> tuple:
            return args(W, *states, slots(i))

        def verify(backend: str, op: str = op, args: Any = args, last: int = n_states + 1) -> None:
            n, some = max(1, features // 16), slice(0, rows // 16)
            few = (grads[0][some], sets[0][0][some], sets[0][1][some] % n, None)
            before = args(b.unit_rows(n, width), *(torch.zeros(n, width, device=b.device) for _ in range(1, last)), few)
            after = [t.clone() for t in before[:last]]
            OPS[op](*after, *before[last:], backend=backend)
            OPS[op].check(before, tuple(after))

        if op == "adam":
            leaf = torch.nn.Parameter(twin[0])
            leaf.grad = dense
            theirs = torch.optim.Adam([leaf], lr=lr, fused=True)

            def given(_: int, theirs: Any = theirs) -> None:
                theirs.step()

        else:

            def given(_: int, twin: Any = twin, dense: Tensor = dense) -> None:
                torch_signum(*twin, dense)

        def formed(i: int, given: Call = given, dense: Tensor = dense) -> None:
            OPS["decode_dweight"](*sets[i % 2], None, grads[i % 2], dense)
            given(i)

        def one_pass(_: int, W: Tensor = W, states: Any = states) -> None:
            for t in (W, *states):
                t.add_(0)

        floor = "one pass over weights and state"
        others: dict[str, Call] = {floor: one_pass, f"torch {op}, gradient given": given, f"decode_dweight + torch {op}": formed}
        if op == "signum" and b.device.type == "cuda":
            fast = torch.compile(torch_signum)
            others["torch.compile signum, gradient given"] = lambda _, fast=fast, twin=twin, dense=dense: fast(*twin, dense)
        dense.copy_(W)
        b.row(
            f"{op} float32", shape, _by_backend(b, op, ours), others, verify=verify, floor=floor,
            n_bytes=gathered + 8 * features * width * (1 + n_states),
        )  # fmt: skip
        del W, dense, states, twin, others, given, formed, one_pass, ours
        _clear(b)


def dense(start: Any) -> Any:
    """What the dense libraries do: a [B, F] code, two products forward and their gradients, fused Adam."""
    from bench.training import Runner, Weights

    W_enc, W_dec = (torch.nn.Parameter(start.W.clone()) for _ in range(2))
    b_enc, b_dec = torch.nn.Parameter(start.W.new_zeros(start.W.shape[0])), torch.nn.Parameter(start.b_dec.clone())
    opt = torch.optim.Adam([W_enc, b_enc, W_dec, b_dec], lr=start.lr, betas=start.betas, fused=True)

    def run(x: Tensor) -> None:
        values, indices = functional.linear(x - b_dec, W_enc, b_enc).relu().topk(start.k)
        code = torch.zeros(x.shape[0], W_enc.shape[0], device=x.device).scatter(1, indices, values)
        ((code @ W_dec + b_dec - x).square().sum() / x.shape[0]).backward()
        with torch.no_grad():
            grad = W_dec.grad
            assert grad is not None
            grad.addcmul_(W_dec, (grad * W_dec).sum(1, keepdim=True), value=-1)
            opt.step()
            W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True))
        opt.zero_grad()

    return Runner(run, lambda: Weights(W_enc, b_enc, W_dec, b_dec), lambda lr: None)


def match(b: Bench) -> None:
    rows, width, k = b.shape((131072, 4096, 8), (256, 32, 3))
    a, other = b.unit_rows(rows, width), b.unit_rows(rows, width)

    def args(_: int) -> tuple:
        return a, other, k, False, False, 1e-8

    low_a, low_b, part = a.bfloat16(), other.bfloat16(), min(rows, 8192)
    product = torch.empty(part, rows, device=b.device, dtype=torch.bfloat16)

    def floor(_: int) -> None:
        for rows_of in low_a.split(part):
            torch.mm(rows_of, low_b.T, out=product[: rows_of.shape[0]])

    def inexact(_: int) -> object:
        return [(rows_of @ low_b.T).topk(k) for rows_of in low_a.split(part)]

    def verify(backend: str) -> None:
        similarity, index = OPS["match_cosine"](*args(0), backend=backend)
        OPS["match_cosine"].check((a[:4], *args(0)[1:]), (similarity[:4], index[:4]))

    b.row(
        "match_cosine", f"{rows}x{rows}x{width} k={k}", _by_backend(b, "match_cosine", args),
        {"bf16 GEMM alone": floor, "bf16 GEMM + topk (inexact)": inexact}, verify=verify, floor="bf16 GEMM alone",
        targets=[("bf16 GEMM alone", 1.35, 1.1)],
    )  # fmt: skip


def spline_hash(b: Bench) -> None:
    rows, width, size, layers = b.shape((65536, 768, 3072, 12), (128, 16, 96, 2))
    for dtype, must, goal in ((torch.bfloat16, 1.5, 1.2), (torch.float32, 3.0, 2.0)):
        x = b.normal(rows, width).to(dtype)
        Ws = [b.normal(size, width).to(dtype) for _ in range(layers)]
        bias = b.normal(size).to(dtype)
        names = b.backends("spline_hash", (x, Ws[0], bias, None, 0, 0, 64))
        low = [W.bfloat16() for W in Ws]
        low_x, product = x.bfloat16(), torch.empty(rows, size, device=b.device, dtype=torch.bfloat16)

        def run(_: int, backend: str, x: Tensor = x, Ws: Any = Ws, bias: Tensor = bias) -> None:
            for layer, W in enumerate(Ws):
                OPS["spline_hash"](x, W, bias, None, layer, 0, 64, backend=backend)

        def verify(backend: str, x: Tensor = x, Ws: Any = Ws, bias: Tensor = bias) -> None:
            hashes = OPS["spline_hash"](x, Ws[0], bias, None, 0, 0, 64, backend=backend)
            OPS["spline_hash"].check((x[:64], Ws[0], bias, None, 0, 0, 64), hashes[:64])

        def floor(_: int, low: Any = low, low_x: Tensor = low_x, product: Tensor = product) -> None:
            for W in low:
                torch.mm(low_x, W.T, out=product)

        def packed(_: int, x: Tensor = x, Ws: Any = Ws, bias: Tensor = bias) -> None:
            for layer, W in enumerate(Ws):
                fastsae.codes.hash_signs(functional.linear(x, W, bias), layer=layer)

        b.row(
            f"spline_hash {str(dtype)[6:]}", f"{rows}x{width}x{size} {layers} layers",
            {name: lambda i, name=name: run(i, name) for name in names},
            {"bf16 GEMM alone": floor, "torch linear + hash_signs": packed}, verify=verify, floor="bf16 GEMM alone",
            targets=[("bf16 GEMM alone", must, goal)],
        )  # fmt: skip


def select(b: Bench) -> None:
    """Rows of given scores: the selection alone, read once at the least."""
    for (rows, n, k), dtype in (
        (b.shape((8192, 131072, 64), (4, 2500, 8)), torch.bfloat16),
        (b.shape((8192, 16384, 32), (4, 2500, 8)), torch.float32),
        (b.shape((8192, 16384, 512), (4, 2500, 300)), torch.float32),
    ):
        zs = [b.normal(rows, n).to(dtype) for _ in range(b.sets(rows * n * dtype.itemsize))]

        def args(i: int, zs: Any = zs, k: int = k) -> tuple:
            return zs[i % len(zs)], k, False

        def verify(backend: str, zs: Any = zs, k: int = k) -> None:
            values, indices = OPS["select_topk"](zs[0], k, False, backend=backend)
            OPS["select_topk"].check((zs[0][:16], k, False), (values[:16], indices[:16]))

        b.row(
            f"select_topk {str(dtype)[6:]}", f"{rows}x{n} k={k}", _by_backend(b, "select_topk", args),
            {"torch.topk": lambda i, zs=zs, k=k: zs[i % len(zs)].topk(k)}, verify=verify,
            n_bytes=rows * n * dtype.itemsize + rows * k * (dtype.itemsize + 8), n_sets=len(zs),
        )  # fmt: skip


def hamming(b: Bench) -> None:
    n, bits, k = b.shape((16384, 1024, 8), (64, 128, 3))
    codes = [torch.randint(-(2**63), 2**63 - 1, (n, bits // 64), generator=b.generator, device=b.device) for _ in range(2)]
    out = torch.empty(n, n, dtype=torch.int32, device=b.device)
    unpacked = [((c.unsqueeze(-1) >> torch.arange(64, device=b.device)) & 1).to(torch.bfloat16).flatten(1) for c in codes]

    def check(backend: str) -> None:
        OPS["hamming"](*codes, out, backend=backend)
        OPS["hamming"].check((codes[0][:32], codes[1], None), out[:32])

    def product(_: int) -> object:
        x, y = unpacked
        return x.sum(1, keepdim=True, dtype=torch.float32) + y.sum(1, dtype=torch.float32) - 2 * (x @ y.T)

    b.row(
        "hamming", f"{n}x{n} {bits} bits", _by_backend(b, "hamming", lambda i: (*codes, out)),
        {"filling the output": lambda i: out.fill_(1), "bf16 product of unpacked bits (inexact)": product}, verify=check,
        floor="filling the output", n_bytes=n * n * 4,
    )  # fmt: skip

    def check_topk(backend: str) -> None:
        distance, index = OPS["hamming_topk"](*codes, k, backend=backend)
        OPS["hamming_topk"].check((codes[0][:16], codes[1], k), (distance[:16], index[:16]))

    b.row(
        "hamming_topk", f"{n}x{n} {bits} bits k={k}", _by_backend(b, "hamming_topk", lambda i: (*codes, k)),
        {"bf16 product of unpacked bits + topk (inexact)": lambda i: product(i).topk(k, largest=False)},  # pyright: ignore
        verify=check_topk,
    )  # fmt: skip


def signs(b: Bench) -> None:
    rows, size = b.shape((65536, 3072), (128, 96))
    z = [b.normal(rows, size).bfloat16() for _ in range(b.sets(rows * size * 2))]
    for op, rest, written in (("pack_signs", (None,), size // 8), ("hash_signs", (None, 0, 0, 64), 8)):

        def args(i: int, rest: tuple = rest) -> tuple:
            return (z[i % len(z)], *rest)

        def verify(backend: str, op: str = op, rest: tuple = rest) -> None:
            OPS[op].check((z[0][:64], *rest), OPS[op](*args(0, rest), backend=backend)[:64])

        b.row(
            f"{op} bfloat16", f"{rows}x{size}", _by_backend(b, op, args), {"z > 0": lambda i: z[i % len(z)] > 0}, verify=verify,
            n_bytes=rows * (size * 2 + written), n_sets=len(z),
        )  # fmt: skip


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
    for name, (call, most) in calls.items():
        for _ in range(20):
            call()
        b.wait()
        times = []
        for _ in range(15):
            begin = time.perf_counter()
            for _ in range(50):
                call()
            times.append((time.perf_counter() - begin) / 50 * 1e6)
            b.wait()
        b.note(f"overhead {name}", "1x64x512", f"{statistics.median(times):.1f} us a call on the host, at most {most} with its launch")
    b.save()


def growth(b: Bench) -> None:
    """Time a row and memory over F and B."""
    for rows, width, features in b_shapes(b):
        x, W = b.normal(rows, width).bfloat16(), b.unit_rows(features, width, torch.bfloat16)
        args = (x, W, None, None, None, None, None, 32, True)
        names = b.backends("encode_topk", args)[:1]

        def verify(backend: str, args: tuple = args) -> None:
            few = tuple(t[:4] for t in OPS["encode_topk"](*args, backend=backend))
            OPS["encode_topk"].check((args[0][:4], *args[1:]), few)

        b.row(
            "encode_topk growth bfloat16", f"{rows}x{width}x{features}",
            {name: lambda i, name=name, args=args: OPS["encode_topk"](*args, backend=name) for name in names}, {}, verify=verify,
        )  # fmt: skip
        del x, W, args
        _clear(b)


def b_shapes(b: Bench) -> list[tuple[int, int, int]]:
    if b.quick:
        return [(8, 32, 1024), (8, 32, 2048)]
    return [(1024, 512, 2**n) for n in (12, 14, 16, 18, 20)] + [(n, 512, 65536) for n in (1, 64, 8192, 65536)]


def ragged(b: Bench) -> None:
    """What exceeds a threshold, about k of a row; once with a capacity, where the host does not wait for the number."""
    rows, width, features, k = b.shape(ENCODE_GROWTH[0], (16, 32, 1024, 4))
    theta = torch.tensor(-statistics.NormalDist().inv_cdf(k / features), device=b.device)  # scores are standard normal
    for dtype in (torch.bfloat16, torch.float32):
        xs = [b.normal(rows, width).to(dtype) for _ in range(b.sets(rows * width * dtype.itemsize))]
        W = b.unit_rows(features, width, dtype)
        for capacity in (None, 2 * rows * k):

            def args(i: int, xs: Any = xs, W: Tensor = W, capacity: int | None = capacity) -> tuple:
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
                _by_backend(b, "encode_threshold", args), {"torch linear + nonzero": plain}, verify=verify, n_sets=len(xs),
            )  # fmt: skip
        del xs, W
        _clear(b)


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


# In order of importance: what the time does not allow is at the end. Seconds: what a row needs before it is begun.
ROWS: list[tuple[Callable[[Bench], None], float]] = [
    (copy, 5), (encode_bf16, 30), (encode_fp32, 30), (decode, 45), (step, 40), (spline_hash, 20), (select, 15), (hamming, 15), (signs, 10),
    (match, 40), (overhead, 5), (optimisers, 20), (encode_smaller, 20), (growth, 25), (ragged, 20), (graphs, 15),
    (encode_compiled, 45),
]  # fmt: skip


@dataclass
class State:
    """What a process of the table tells the one that watches it, in a file."""

    path: Path
    done: list[str] = field(default_factory=list)
    running: str | None = None
    since: float = 0.0

    @classmethod
    def read(cls, path: Path) -> State:
        return cls(path, **json.loads(path.read_text())) if path.exists() else cls(path)

    def write(self) -> None:
        files.replace_text(self.path, json.dumps({"done": self.done, "running": self.running, "since": self.since}))

    def begin(self, row: str) -> None:
        self.running, self.since = row, time.time()
        self.write()

    def end(self) -> None:
        self.done.append(self.running or "")
        self.running = None
        self.write()


def device_facts(device: torch.device) -> dict[str, Any]:
    """What the device says of itself beside its name; driver, clocks and power limit where nvidia-smi answers."""
    if device.type != "cuda":
        return {}
    p = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        said = f"no nvidia-smi: {error}"
    return {
        "cuda": torch.version.cuda, "multiprocessors": p.multi_processor_count, "memory_bytes": p.total_memory,
        "capability": [p.major, p.minor], "driver_clocks_power": said,
    }  # fmt: skip


def supervise(command: list[str], *, grace: float = 60.0) -> int:
    """Runs ``command`` (a ``main`` of this module) until every row was begun once, in as many processes as that takes.

    A row that ends its process, or takes more than ``grace`` seconds and four times what it should, is noted, and the rest goes on in a
    new process. Returns the exit code of the last one, at least 1 where a row did not end well.
    """
    needs = {row.__name__: seconds for row, seconds in ROWS}
    code, lost = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        command = [*command, "--begun", repr(time.time()), "--state", str(path)]
        children: list[subprocess.Popen[bytes]] = []

        def stop(*_: Any) -> None:
            for child in children:
                child.terminate()

        before = signal.signal(signal.SIGTERM, stop)
        try:
            for _ in range(len(ROWS) + 1):
                child = subprocess.Popen(command)
                children[:] = [child]
                why = ""
                while child.poll() is None:
                    state = State.read(path)
                    if state.running and time.time() - state.since > grace + 4 * needs.get(state.running, 30):
                        why = f"killed after {time.time() - state.since:.0f} s"
                        child.kill()
                    time.sleep(0.2)
                code, state = child.returncode, State.read(path)
                if state.running is None:
                    break
                lost += 1
                why = why or ("the device answered no more" if code == BROKEN else f"its process ended with {code}")
                print(f"bench.gpu: {state.running}: {why}; the others go on", file=sys.stderr, flush=True)
                command += ["--lost", f"{state.running}: {why}"]
                state.end()
        finally:
            signal.signal(signal.SIGTERM, before)
    return max(code, min(lost, 1)) if code >= 0 else 1


def run(
    device: torch.device, out: Path, machine: dict[str, Any], *, minutes: float, quick: bool, only: list[str] | None = None,
    begun: float | None = None, state: State | None = None, lost: Sequence[str] = (),
) -> int:  # fmt: skip
    """Measures the table; 0, or 1 where a row of ours was refused or failed, or BROKEN where the device answers no more.

    Args:
        begun, state, lost: when the run began, the rows that earlier processes of it have done, and how some of them ended (``supervise``).
    """
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(device, out, minutes, quick, machine, begun)
    for text in lost:
        row, _, why = text.partition(": ")
        if not any(note["op"] == row and note["note"].startswith("failed") for note in bench.notes):
            bench.note(row, "", f"failed: {why}")

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` and the process above may send it twice
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)  # `timeout` sends it: the plot is still drawn
    try:
        for row, seconds in ROWS:
            if (only and row.__name__ not in only) or (state is not None and row.__name__ in state.done):
                continue
            if not quick and bench.left() < seconds:
                bench.note(row.__name__, "", f"not begun: {bench.left():.0f} s of {minutes * 60:.0f} left, it needs about {seconds:.0f}")
                continue
            if state is not None:
                state.begin(row.__name__)
            try:
                row(bench)
            except Missing as reason:
                bench.note(row.__name__, "", str(reason))
            except Exception as error:
                traceback.print_exc()
                bench.note(row.__name__, "", f"failed: {type(error).__name__}: {str(error)[:300]}")
            bench.save()
            try:
                _clear(bench)
            except Exception as error:  # nothing runs on this device any more
                bench.note(row.__name__, "", f"failed: {type(error).__name__}: {str(error)[:300]}")
                bench.save()
                return BROKEN
            if state is not None:
                state.end()
    except KeyboardInterrupt:
        bench.note("all", "", "stopped by a signal")
        if state is not None:
            state.end()
    finally:
        if signal.getsignal(signal.SIGTERM) is stop:
            signal.signal(signal.SIGTERM, before)
    bench.save()
    from bench.report import plot, print_table

    measured = [entry for entry in bench.entries if "ours" in entry]
    print_table(measured)
    for entry in measured:
        for verdict in entry.get("targets", []):
            print(f"{entry['op']:<24} {entry['shape']:<28} {verdict['text']}")
    for note in bench.notes:
        print(f"{note['op']} {note['shape']}: {note['note']}")
    try:
        plot(measured, bench.path.with_suffix(".png"))
    except ImportError as error:
        print(f"no plot: {error}", file=sys.stderr)
    bench.say(f"stored {bench.path}")
    failed = [entry for entry in bench.entries if any(who.startswith("fastsae") for who in entry.get("failures", {}))]
    return 1 if failed or any(note["note"].startswith("failed") for note in bench.notes) else 0


def table(out: Path, *, minutes: float, quick: bool, only: Sequence[str] = ()) -> int:
    """The whole table on the current CUDA device, each row survived by the others."""
    command = [sys.executable, "-m", "bench.gpu", *only, "--device", "cuda", "--out", str(out), "--minutes", str(minutes)]
    os.chdir(Path(__file__).resolve().parent.parent)
    return supervise([*command, "--quick"] if quick else command)


def main(arguments: list[str] | None = None) -> int:
    from fastsae._core.machine import machine

    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--quick", action="store_true", help="small shapes: does it run, not how fast")
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(row.__name__ for row, _ in ROWS)}; default all")
    parser.add_argument("--begun", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--lost", action="append", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.rows if name not in [row.__name__ for row, _ in ROWS]]:
        print(f"bench.gpu: unknown {', '.join(unknown)}; known: {', '.join(row.__name__ for row, _ in ROWS)}", file=sys.stderr)
        return 2
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("bench.gpu: no CUDA device (torch.cuda.is_available() is False); --device cpu --quick runs the same code", file=sys.stderr)
        return 2
    if options.device.startswith("cuda") and options.state is None:
        return table(options.out.resolve(), minutes=options.minutes, quick=options.quick, only=options.rows)
    device = torch.device(options.device if options.device != "cuda" else f"cuda:{torch.cuda.current_device()}")
    state = None if options.state is None else State.read(options.state)
    return run(
        device, options.out, {**machine(), **device_facts(device)}, minutes=options.minutes, quick=options.quick, only=options.rows,
        begun=options.begun, state=state, lost=options.lost,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
