"""Spline codes: of a layer, of given signs, and their distances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import fastsae
from bench.gpu.harness import Bench
from fastsae.dispatch import OPS
from fastsae.ops.spline import unpack_bits

HASH = (65536, 768, 3072, 12), (128, 16, 96, 2)
HAMMING = (16384, 1024, 8), (64, 128, 3)
SIGNS = (65536, 3072), (128, 96)


def spline_hash(b: Bench) -> None:
    rows, width, size, layers = b.shape(*HASH)
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


def hamming(b: Bench) -> None:
    n, bits, k = b.shape(*HAMMING)
    codes = [torch.randint(-(2**63), 2**63 - 1, (n, bits // 64), generator=b.generator, device=b.device) for _ in range(2)]
    out = torch.empty(n, n, dtype=torch.int32, device=b.device)
    unpacked = [unpack_bits(c).to(torch.bfloat16) for c in codes]

    def check(backend: str) -> None:
        OPS["hamming"](*codes, out, backend=backend)
        OPS["hamming"].check((codes[0][:32], codes[1], None), out[:32])

    def product(_: int) -> object:
        x, y = unpacked
        return x.sum(1, keepdim=True, dtype=torch.float32) + y.sum(1, dtype=torch.float32) - 2 * (x @ y.T)

    b.row(
        "hamming", f"{n}x{n} {bits} bits", b.ours("hamming", lambda i: (*codes, out)),
        {"filling the output": lambda i: out.fill_(1), "bf16 product of unpacked bits (inexact)": product}, verify=check,
        floor="filling the output", n_bytes=n * n * 4,
    )  # fmt: skip

    b.operation(
        "hamming_topk", "hamming_topk", f"{n}x{n} {bits} bits k={k}", lambda i: (*codes, k),
        {"bf16 product of unpacked bits + topk (inexact)": lambda i: product(i).topk(k, largest=False)}, few=16,  # pyright: ignore
    )  # fmt: skip


def signs(b: Bench) -> None:
    rows, size = b.shape(*SIGNS)
    z = [b.normal(rows, size).bfloat16() for _ in range(b.sets(rows * size * 2))]
    for op, rest, written in (("pack_signs", (None,), size // 8), ("hash_signs", (None, 0, 0, 64), 8)):
        b.operation(
            op, f"{op} bfloat16", f"{rows}x{size}", lambda i, rest=rest: (z[i % len(z)], *rest),
            {"z > 0": lambda i: z[i % len(z)] > 0}, few=64, n_bytes=rows * (size * 2 + written), n_sets=len(z),
        )  # fmt: skip
