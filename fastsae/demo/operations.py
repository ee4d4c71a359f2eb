"""Every operation of the demo against the best plain torch (and numpy) for it that we know: checked, then timed in turns."""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import fastsae
from fastsae import SAE
from fastsae._core.timing import alternate, milliseconds
from fastsae.demo.codes import differing_bits
from fastsae.demo.data import Data


class Case(NamedTuple):
    """An operation: ``agrees(ours(), plain[name]())`` holds for every plain version."""

    name: str
    shape: str
    ours: Callable[[], Any]
    plain: dict[str, Callable[[], Any]]
    agrees: Callable[[Any, Any], bool]


def timed(saes: list[SAE], data: Data, *, reps: int, least: float, rows: int) -> list[dict[str, Any]]:
    """A result for each operation, on so many rows; ``reps, least``: fewest turns, and seconds."""
    x = data["x"][~data["held"]][:rows].contiguous()
    layer_in = data["layer_in"][: 4 * rows].contiguous()
    results: list[dict[str, Any]] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        for cases in (_encode(saes[0], x), _decode(saes[0], x), _step(saes[0], x), _match(*saes), _codes(data, layer_in, 2 * rows)):
            results += [compare(case, reps, least) for case in cases]
    return results


def compare(case: Case, reps: int, least: float) -> dict[str, Any]:
    """Medians of alternating runs; ``ratio`` is to the fastest plain version."""
    expected: list[Any] = []
    choices = fastsae.explain(lambda: expected.append(case.ours())).choices
    for label, run in case.plain.items():
        if not case.agrees(expected[0], run()):
            raise RuntimeError(f"demo: {case.name} and plain torch ({label}) differ; please report this with the output of `fastsae info`")
    ways = {label: lambda _, run=run: milliseconds(lambda _: run()) for label, run in {"fastsae": case.ours, **case.plain}.items()}
    times = alternate(ways, least=reps, most=max(reps, 101), seconds=least)
    median = {label: statistics.median(values) for label, values in times.items()}
    best = min(case.plain, key=lambda label: median[label])
    backend = "+".join(dict.fromkeys(choice.chosen for choice in choices))
    ratio = median[best] / median["fastsae"]
    return {"operation": case.name, "shape": case.shape, "backend": backend, "ms": median, "best_plain": best, "ratio": ratio}


def _close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return bool(torch.linalg.vector_norm(a - b) <= tolerance * torch.linalg.vector_norm(b))


def _k(sae: SAE) -> int:
    return getattr(sae.activation, "k", 1)


def _encode(sae: SAE, x: Tensor) -> Iterator[Case]:
    W_enc, b_enc, b_dec, k = sae.W_enc.detach(), sae.b_enc.detach(), sae.b_dec.detach(), _k(sae)

    def plain() -> Any:
        values, indices = torch.addmm(b_enc, x - b_dec, W_enc.T).topk(k)
        return values.relu_(), indices

    yield Case(
        "encode_topk",
        f"{x.shape[0]}×{sae.d_in} → {sae.d_sae}, k={k}",
        lambda: fastsae.encode_topk(x, W_enc, b_enc, k=k, b_pre=b_dec),
        {"addmm, topk": plain},
        lambda ours, plain: _close(ours.values, plain[0]) and bool((ours.indices == plain[1]).double().mean() > 0.999),
    )


def _decode(sae: SAE, x: Tensor) -> Iterator[Case]:
    W_dec, b_dec, features, B, k = sae.W_dec.detach(), sae.b_dec.detach(), sae.d_sae, x.shape[0], _k(sae)
    with torch.no_grad():
        latents: Any = sae.encode(x)
    values, indices = latents.values, latents.indices
    grad = torch.randn(B, sae.d_in, generator=torch.Generator().manual_seed(0))

    def dense() -> Tensor:
        return torch.zeros(B, features).scatter_(1, indices, values)

    def csr() -> Tensor:
        crow = torch.arange(0, B * k + 1, k)
        return torch.sparse_csr_tensor(crow, indices.flatten(), values.flatten(), (B, features), check_invariants=False)

    shape = f"{B}×{k} of {features} → {sae.d_in}"
    yield Case(
        "decode",
        shape,
        lambda: fastsae.decode(latents, W_dec, b_dec),
        {
            "scatter, mm": lambda: torch.addmm(b_dec, dense(), W_dec),
            "embedding_bag": lambda: F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + b_dec,
            "sparse CSR": lambda: csr() @ W_dec + b_dec,
        },
        _close,
    )

    def scattered() -> Any:
        return (grad @ W_dec.T).gather(1, indices), dense().T @ grad, grad.sum(0)

    def gathered() -> Any:
        weight = torch.zeros_like(W_dec).index_add_(0, indices.flatten(), (values[:, :, None] * grad[:, None]).flatten(0, 1))
        return torch.bmm(W_dec[indices], grad[:, :, None])[:, :, 0], weight, grad.sum(0)

    def by_sorting() -> Any:
        feature, order = indices.flatten().sort()
        crow = F.pad(torch.bincount(feature, minlength=features).cumsum(0), (1, 0))
        transposed = torch.sparse_csr_tensor(crow, order // k, values.flatten()[order], (features, B), check_invariants=False)
        return torch.bmm(W_dec[indices], grad[:, :, None])[:, :, 0], transposed @ grad, grad.sum(0)

    yield Case(
        "decode_backward",
        shape,
        lambda: fastsae.functional.decode_backward(grad, latents.values, latents.indices, W_dec),
        {"scatter, mm, gather": scattered, "gather, index_add": gathered, "sort, sparse CSR": by_sorting},
        lambda ours, plain: all(map(_close, ours, plain)),
    )


def _step(sae: SAE, x: Tensor) -> Iterator[Case]:
    """Forward and backward of training."""
    mine, theirs = copy.deepcopy(sae), copy.deepcopy(sae)
    B, k = x.shape[0], _k(sae)

    def gradients(module: SAE) -> list[Tensor | None]:
        return [p.grad for p in module.parameters()]

    def ours() -> list[Tensor | None]:
        mine.zero_grad()
        mine.loss(x).loss.backward()
        return gradients(mine)

    def plain(bag: bool) -> list[Tensor | None]:
        theirs.zero_grad()
        v, i = torch.addmm(theirs.b_enc, x - theirs.b_dec, theirs.W_enc.T).topk(k, sorted=False)
        v = v.relu()
        if bag:
            y = F.embedding_bag(i, theirs.W_dec, per_sample_weights=v, mode="sum") + theirs.b_dec
        else:
            y = torch.addmm(theirs.b_dec, torch.zeros(B, sae.d_sae).scatter(1, i, v), theirs.W_dec)
        ((y - x).square().sum() / B).backward()
        return gradients(theirs)

    yield Case(
        "SAE.loss + backward",
        f"{B}×{sae.d_in}, {sae.d_sae}, k={k}",
        ours,
        {"topk, scatter, mm": lambda: plain(False), "topk, embedding_bag": lambda: plain(True)},
        lambda ours, plain: all(_close(a, b, 1e-2) for a, b in zip(ours, plain)),  # a tie within rounding moves a whole gradient row
    )


def _match(one: SAE, two: SAE) -> Iterator[Case]:
    a, b = one.W_dec.detach(), two.W_dec.detach()

    def plain() -> Any:
        similarity = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
        return similarity.max(1).values, similarity.max(0).values

    yield Case(
        "match",
        f"{a.shape[0]}×{b.shape[0]}, D={a.shape[1]}",
        lambda: fastsae.match(a, b),
        {"normalize, mm, max": plain},
        lambda ours, plain: _close(ours.a_to_b.similarity[:, 0], plain[0]) and _close(ours.b_to_a.similarity[:, 0], plain[1]),
    )


def _same_groups(ours: Tensor, plain: Any) -> bool:
    """Both hashes put rows together alike; signs within rounding of 0 may differ."""
    first, second = (torch.unique(torch.as_tensor(h), return_inverse=True)[1] for h in (ours, plain))
    pairs = torch.unique(torch.stack([first, second]), dim=1).shape[1]
    return abs(pairs - int(first.max()) - 1) <= 3 and abs(pairs - int(second.max()) - 1) <= 3


def _codes(data: Data, x: Tensor, rows: int) -> Iterator[Case]:
    W, bias = data["W"], data["b"]
    neurons = W.shape[0]
    odd = torch.randint(-(2**63), 2**63 - 1, (neurons // 64,), generator=torch.Generator().manual_seed(0)) | 1

    def packed() -> Tensor:
        return torch.from_numpy(np.packbits((F.linear(x, W, bias) > 0).numpy(), axis=1, bitorder="little").view(np.int64))

    def shifted() -> Tensor:
        active = (F.linear(x, W, bias) > 0).view(x.shape[0], -1, 64)
        return (active.long() << torch.arange(64)).sum(2)

    shape = f"{x.shape[0]}×{W.shape[1]} → {neurons} bits"
    yield Case(
        "spline_code",
        shape,
        lambda: fastsae.spline_code(x, W, bias),
        {"linear > 0, numpy.packbits": packed, "linear > 0, shifts": shifted},
        lambda ours, plain: differing_bits(ours, plain) <= max(2, 1e-6 * ours.numel() * 64),
    )
    yield Case(
        "spline_hash",
        shape,
        lambda: fastsae.spline_hash(x, W, bias),
        {
            "linear > 0, packbits, hash(bytes)": lambda: [hash(row.tobytes()) for row in packed().numpy()],
            "linear > 0, packbits, multiply-add": lambda: (packed() * odd).sum(1),
        },
        _same_groups,
    )
    words = fastsae.spline_code(x, W, bias)
    hashes = fastsae.codes.hash_code(words)
    void = words.numpy().view(f"V{8 * words.shape[1]}").ravel()
    yield Case(
        "count_codes",
        f"{words.shape[0]} codes",
        lambda: fastsae.codes.count_codes(hashes).counts,
        {
            "unique(dim=0) of codes": lambda: torch.unique(words, dim=0, return_inverse=True, return_counts=True)[2],
            "numpy.unique of bytes": lambda: torch.from_numpy(np.unique(void, return_inverse=True, return_counts=True)[2]),
            "unique of the same hashes": lambda: torch.unique(hashes, return_inverse=True, return_counts=True)[2],
        },
        lambda ours, plain: torch.equal(ours.sort().values, plain.sort().values),
    )
    yield from _distances(words[:rows].contiguous(), neurons)


def _distances(codes: Tensor, neurons: int) -> Iterator[Case]:
    floats = (codes[:, :, None] >> torch.arange(64) & 1).flatten(1).float()
    active = floats.sum(1)
    out = torch.empty(codes.shape[0], codes.shape[0], dtype=torch.int32)
    unsigned = codes.numpy().view(np.uint64).T  # bitwise_count of a signed number is that of its magnitude

    def product() -> Tensor:
        return torch.addmm(active[:, None] + active, floats, floats.T, alpha=-2)

    plain: dict[str, Callable[[], Any]] = {"mm of bits kept as float32": product}
    if (bitwise_count := getattr(np, "bitwise_count", None)) is not None:  # numpy 2
        plain["numpy.bitwise_count"] = lambda: torch.from_numpy(sum(bitwise_count(c[:, None] ^ c[None]).astype(np.int32) for c in unsigned))
    shape = f"{codes.shape[0]}×{codes.shape[0]}, {neurons} bits"

    def equal(ours: Tensor, plain: Tensor) -> bool:
        return torch.equal(ours, plain.int())

    yield Case("hamming", shape, lambda: fastsae.codes.hamming(codes, codes, out), plain, equal)
    yield Case(
        "hamming_topk",
        f"{shape}, k=2",
        lambda: fastsae.codes.hamming_topk(codes, codes, 2).distance,
        {"mm of bits kept as float32, topk": lambda: product().topk(2, largest=False).values},
        equal,
    )
