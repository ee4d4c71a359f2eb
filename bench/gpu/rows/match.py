"""Dictionaries against each other, and the selection of given scores."""

from __future__ import annotations

import torch

from bench.gpu.harness import Bench

MATCH = (131072, 4096, 8), (256, 32, 3)


def match(b: Bench) -> None:
    rows, width, k = b.shape(*MATCH)
    a, other = b.unit_rows(rows, width), b.unit_rows(rows, width)
    low_a, low_b, part = a.bfloat16(), other.bfloat16(), min(rows, 8192)
    product = torch.empty(part, rows, device=b.device, dtype=torch.bfloat16)

    def floor(_: int) -> None:
        for rows_of in low_a.split(part):
            torch.mm(rows_of, low_b.T, out=product[: rows_of.shape[0]])

    def inexact(_: int) -> object:
        return [(rows_of @ low_b.T).topk(k) for rows_of in low_a.split(part)]

    b.operation(
        "match_cosine", "match_cosine", f"{rows}x{rows}x{width} k={k}", lambda _: (a, other, k, False, False, 1e-8),
        {"bf16 GEMM alone": floor, "bf16 GEMM + topk (inexact)": inexact}, few=4, floor="bf16 GEMM alone",
        targets=[("bf16 GEMM alone", 1.35, 1.1)],
    )  # fmt: skip


SELECT = (
    (((8192, 131072, 64), (4, 2500, 8)), torch.bfloat16),
    (((8192, 16384, 32), (4, 2500, 8)), torch.float32),
    (((8192, 16384, 512), (4, 2500, 300)), torch.float32),
)


def select(b: Bench) -> None:
    """Rows of given scores: the selection alone, read once at the least."""
    for sizes, dtype in SELECT:
        rows, n, k = b.shape(*sizes)
        zs = [b.normal(rows, n).to(dtype) for _ in range(b.sets(rows * n * dtype.itemsize))]
        b.operation(
            "select_topk", f"select_topk {str(dtype)[6:]}", f"{rows}x{n} k={k}", lambda i, zs=zs, k=k: (zs[i % len(zs)], k, False),
            {"torch.topk": lambda i, zs=zs, k=k: zs[i % len(zs)].topk(k)}, few=16,
            n_bytes=rows * n * dtype.itemsize + rows * k * (dtype.itemsize + 8), n_sets=len(zs),
        )  # fmt: skip
