"""Sparse decode: forward and both gradients. Bytes: the gathered rows, values and indices, and what is written once."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench import training
from bench.gpu.harness import Bench, Call
from bench.gpu.rows.encode import ENCODE
from bench.harness import name
from fastsae.dispatch import OPS
from fastsae.testing import check_values

Sets = list[tuple[Tensor, Tensor]]


def decode(b: Bench) -> None:
    rows, width, features, k = b.shape(*ENCODE)
    for dtype in (torch.bfloat16, torch.float32):
        W = b.unit_rows(features, width, dtype)
        sets = b.latents(rows, features, k, 2, dtype)
        grads = [b.normal(rows, width).to(dtype) for _ in sets]
        shape = name((rows, width, features, k))
        _forward(b, shape, W, sets)
        _dvalues(b, shape, W, sets, grads)
        _dweight(b, shape, W, sets, grads)
        del W, sets, grads
        b.clear()


def _row_bytes(W: Tensor, sets: Sets) -> int:
    """Of a row of W, a value and an index for every slot."""
    return sets[0][0].numel() * (W.shape[1] * W.itemsize + W.itemsize + 8)


def _label(op: str, W: Tensor) -> str:
    return f"{op} {str(W.dtype)[6:]}"


def _forward(b: Bench, shape: str, W: Tensor, sets: Sets) -> None:
    others: dict[str, Call] = {
        "torch embedding_bag": lambda i: functional.embedding_bag(sets[i % 2][1], W, per_sample_weights=sets[i % 2][0], mode="sum"),
        "torch.sparse CSR @ W": _csr(b, sets, W),
    }
    start = training.Start(W, W[0], 0)
    if (
        theirs := training.build("sparsify's decoder", lambda _: importlib.import_module("sparsify.utils").decoder_impl, start)
    ) is not None:
        others["sparsify's decoder"] = lambda i: theirs(sets[i % 2][1], sets[i % 2][0], W.mT)
    b.operation(
        "decode", _label("decode", W), shape, lambda i: (*sets[i % 2], None, W, None), others, few=8, cut=(0, 1),
        n_bytes=_row_bytes(W, sets) + sets[0][0].shape[0] * W.shape[1] * W.itemsize, targets=[("copy", 0.7, 0.9)],
    )  # fmt: skip


def _dvalues(b: Bench, shape: str, W: Tensor, sets: Sets, grads: list[Tensor]) -> None:
    b.operation(
        "decode_dvalues", _label("decode_dvalues", W), shape, lambda i: (grads[i % 2], sets[i % 2][1], None, W), {}, few=8, cut=(0, 1),
        n_bytes=_row_bytes(W, sets) + grads[0].numel() * W.itemsize, targets=[("copy", 0.7, 0.9)],
    )  # fmt: skip


def _dweight(b: Bench, shape: str, W: Tensor, sets: Sets, grads: list[Tensor]) -> None:
    out = torch.empty_like(W)

    def args(i: int) -> tuple[Any, ...]:
        return *sets[i % 2], None, grads[i % 2], out

    def verify(backend: str) -> None:
        """Some rows of the result against float64."""
        OPS["decode_dweight"](*args(0), backend=backend)
        (values, indices), grad = sets[0], grads[0]
        some = indices.flatten()[:8].unique()
        chosen = torch.isin(indices, some)
        products = values[chosen].double()[:, None] * grad[chosen.nonzero()[:, 0]].double()
        position = torch.searchsorted(some, indices[chosen])
        exact = torch.zeros(some.numel(), W.shape[1], device=b.device, dtype=torch.float64).index_add_(0, position, products)
        size = torch.zeros_like(exact).index_add_(0, position, products.abs())
        check_values(out[some], exact, exact.to(out.dtype), size)

    leaf = W.detach().clone().requires_grad_()

    def bag_backward(i: int) -> object:
        values, indices = sets[i % 2]
        return torch.autograd.grad(functional.embedding_bag(indices, leaf, per_sample_weights=values, mode="sum"), leaf, grads[i % 2])

    b.row(
        _label("decode_dweight", W), shape, b.ours("decode_dweight", args),
        {"torch embedding_bag forward + backward": bag_backward, "clearing the gradient": lambda i: out.zero_()},
        verify=verify, floor="clearing the gradient", n_bytes=_row_bytes(W, sets) + W.numel() * W.itemsize, targets=[("copy", 0.7, 0.9)],
    )  # fmt: skip


def _csr(b: Bench, sets: Sets, W: Tensor) -> Call:
    """torch's sparse product; the matrix is built outside the timing."""
    matrices: list[Tensor] = []
    rows, k = sets[0][0].shape
    crow = torch.arange(0, rows * k + 1, k, device=b.device)

    def run(i: int) -> object:
        if not matrices:
            matrices.extend(
                torch.sparse_csr_tensor(crow, indices.flatten(), values.flatten(), (rows, W.shape[0]), check_invariants=False)
                for values, indices in sets
            )
        return matrices[i % len(matrices)] @ W

    return run
