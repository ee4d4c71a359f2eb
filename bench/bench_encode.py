"""The encoders beside the best plain torch in the usual shapes (B, D, F, k): raw and packed weights, both layouts, easy and hard inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import fastsae
from bench.harness import checks, has_onednn, laid, name, normal, onednn_linear, shapes, unit_rows
from fastsae.dispatch import OPS

Shape = tuple[int, ...]
SHAPES = shapes(
    [(256, 768, 24576, 32), (1024, 768, 24576, 64), (256, 2048, 65536, 64), (64, 4096, 131072, 64), (100, 1000, 30000, 17)],
    [(32, 64, 2048, 8)],
)
MAIN = SHAPES[0]
BATCHES = shapes([(rows, 768, 24576, 32) for rows in (1, 4, 16)], [(1, 64, 2048, 8)])
DICTIONARIES = shapes(
    [(rows, 384, 1536, 16) for rows in (16, 256, 1024)]
    + [(1024, 64, 512, 16), (256, 512, 4096, 32), (16, 768, 6144, 32), (256, 768, 6144, 32)],
    [(24, 64, 512, 8)],
)
SMALL = [
    *(("FD", shape) for shape in BATCHES),
    *(("small", shape) for shape in DICTIONARIES),
    ("small bf16", DICTIONARIES[min(2, len(DICTIONARIES) - 1)]),
]
GROWTH = [
    *shapes([(64, 256, 2**n, 32) for n in (12, 14, 16, 18, 20)], [(8, 64, 2048, 8)]),
    *shapes([(4**n, 256, 16384, 32) for n in range(9)], [(4, 64, 2048, 8)]),
]
packed_or_not = pytest.mark.parametrize("packed", [False, True], ids=["raw", "packed"])


def inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    rows, width, features, _ = shape
    return normal(rows, width), unit_rows(features, width), normal(features) / 10


def plain(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[dict[str, Callable[[], object]], str | None]:
    """Rivals of encode_topk and the name of the floor among them."""
    others: dict[str, Callable[[], object]] = {"torch linear+relu+topk": lambda: linear(x, W, b).relu().topk(k)}
    if not has_onednn(x.dtype):
        return others, None
    product = onednn_linear(x, W.contiguous())  # packed outside the timing, so that the layout does not matter to it
    others["oneDNN packed linear+relu+topk"] = lambda: product("relu", b).topk(k)
    others["oneDNN product alone"] = lambda: product("none", None)
    return others, "oneDNN product alone"


def topk(compare: Callable[..., None], label: str, x: Tensor, W: Tensor, k: int, packed: bool, absolute: bool = False) -> None:
    b = (normal(W.shape[0]) / 10).to(x.dtype)
    weights = fastsae.pack(W) if packed else W

    def ours() -> fastsae.TopKLatents:
        return fastsae.encode_topk(x, weights, b, k=k, absolute=absolute)

    def verify() -> None:
        few = ours().rows(slice(0, 8))
        OPS["encode_topk"].check((x[:8], W, b, None, None, None, None, k, not absolute, absolute), (few.values, few.indices))

    def by_magnitude() -> Tensor:
        z = linear(x, W, b)
        return z.gather(1, z.abs().topk(k).indices)

    others, floor = plain(x, W, b, k)
    if absolute:
        by_score = partial(fastsae.encode_topk, x, weights, b, k=k)
        others, floor = {"torch linear+abs+topk+gather": by_magnitude, "ours, by score": by_score}, None
    shape = name((*x.shape, W.shape[0], k))
    compare(f"encode_topk {label}{' packed' if packed else ''}", shape, ours, others, verify, floor=floor)


@pytest.mark.seconds(15)
@packed_or_not
@pytest.mark.parametrize("layout", ["FD", "DF"])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_encode_topk(shape: Shape, layout: str, packed: bool, compare: Callable[..., None]) -> None:
    x, W, _ = inputs(shape)
    topk(compare, layout, x, laid(W, layout), shape[3], packed)


@pytest.mark.seconds(15)
@packed_or_not
def test_by_magnitude(packed: bool, compare: Callable[..., None]) -> None:
    x, W, _ = inputs(MAIN)
    topk(compare, "by magnitude", x, W, MAIN[3], packed, absolute=True)


@packed_or_not
@pytest.mark.parametrize(("label", "shape"), SMALL, ids=lambda value: value if isinstance(value, str) else name(value))
def test_small(label: str, shape: Shape, packed: bool, compare: Callable[..., None]) -> None:
    dtype = torch.bfloat16 if "bf16" in label else torch.float32
    x, W, _ = inputs(shape)
    topk(compare, label, x.to(dtype), W.to(dtype), shape[3], packed)


def planted(x: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that are sums of a few features, as activations are."""
    generator = torch.Generator().manual_seed(3)
    chosen = torch.randint(W.shape[0], (x.shape[0], 24), generator=generator)
    weight = torch.rand(*chosen.shape, 1, generator=generator)
    return (W.cpu()[chosen] * weight).sum(1).to(x) + x * (0.1 / x.shape[1] ** 0.5), W


def outliers(x: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """Six dimensions twenty times as large as the others."""
    x = x.clone()
    x[:, [3, 77, 150, 300, 301, 700]] *= 20
    return x, W


def heavy_norms(x: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """Row norms from 1 to 20, most of them small."""
    return x, W * torch.exp(3 * torch.rand(W.shape[0], 1, generator=torch.Generator().manual_seed(5)) ** 4).to(W)


@packed_or_not
@pytest.mark.parametrize("change", [planted, outliers, heavy_norms], ids=lambda f: f.__name__)
def test_hard_inputs(change: Callable[..., tuple[Tensor, Tensor]], packed: bool, compare: Callable[..., None]) -> None:
    shape = MAIN if MAIN[1] > 700 else (32, 768, 2048, 8)
    x, W = change(*inputs(shape)[:2])
    topk(compare, change.__name__.replace("_", " "), x, W, shape[3], packed)


@pytest.mark.parametrize("density", ["sparse", "half"])
def test_encode_threshold(density: str, compare: Callable[..., None]) -> None:
    x, W, b = inputs(MAIN)
    theta = 0.0 if density == "half" else float(linear(x[:32], W, b).topk(MAIN[3]).values[:, -1].mean())

    def dense() -> Tensor:
        z = linear(x, W, b)
        return torch.where(z > theta, z, 0)

    others = {"torch linear+where+to_sparse_csr": lambda: dense().to_sparse_csr(), "torch linear+where": dense}
    verify = checks("encode_threshold", x[:8], W, b, None, None, None, None, torch.tensor(theta), None)

    def ours() -> fastsae.RaggedLatents:
        return fastsae.encode_threshold(x, W, b, threshold=theta)

    compare(f"encode_threshold {density}", name(MAIN), ours, others, verify, floor="torch linear+where")


def test_encode_batch_topk(compare: Callable[..., None]) -> None:
    (x, W, b), k = inputs(MAIN), MAIN[3]
    others = {"torch linear+topk": lambda: linear(x, W, b).relu().flatten().topk(k * len(x))}
    verify = checks("encode_batch_topk", x[:8], W, b, None, None, None, None, float(k))
    compare("encode_batch_topk", name(MAIN), lambda: fastsae.encode_batch_topk(x, W, b, k=k), others, verify)


def test_encode_gated(compare: Callable[..., None]) -> None:
    x, W, b = inputs(MAIN)
    gate, r, b = b - 2.5, normal(len(b), seed=1) / 10, normal(len(b), seed=2) / 10

    def ours() -> fastsae.RaggedLatents:
        return fastsae.encode_gated(x, W, b_gate=gate, r_mag=r, b_mag=b)

    def dense() -> Tensor:
        p = linear(x, W)
        return ((p + gate) > 0) * (p * r.exp() + b).relu()

    compare("encode_gated", name(MAIN), ours, {"torch dense": dense}, checks("encode_gated", x[:8], W, gate, r, b, None, None))


@pytest.mark.parametrize("shape", GROWTH, ids=name)
def test_growth(shape: Shape, compare: Callable[..., None]) -> None:
    """Time a row grows no faster than F, memory not with B * F."""
    x, W, _ = inputs(shape)
    verify = checks("encode_topk", x[:4], W, None, None, None, None, None, shape[3], True)
    compare("encode_topk growth", name(shape), lambda: fastsae.encode_topk(x, W, k=shape[3]), {}, verify)
