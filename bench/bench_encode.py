"""The encoders beside the best plain torch in the usual shapes (B, D, F, k): raw and packed weights, both layouts, easy and hard inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fastsae
from bench.harness import has_onednn, name, normal, onednn_linear, shapes, unit_rows
from fastsae.dispatch import OPS

SHAPES = shapes(
    [(256, 768, 24576, 32), (1024, 768, 24576, 64), (256, 2048, 65536, 64), (64, 4096, 131072, 64), (100, 1000, 30000, 17)],
    [(32, 64, 2048, 8)],
)
SMALL = shapes([(1, 768, 24576, 32), (4, 768, 24576, 32), (16, 768, 24576, 32)], [(1, 64, 2048, 8)])
DICTIONARIES = shapes(
    [
        *((rows, 384, 1536, 16) for rows in (16, 256, 1024)),
        (1024, 64, 512, 16),
        (256, 512, 4096, 32),
        (16, 768, 6144, 32),
        (256, 768, 6144, 32),
    ],
    [(24, 64, 512, 8)],
)
MAIN = SHAPES[0]


def plain(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, k: int) -> tuple[dict[str, Callable[[], object]], str]:
    """Rivals of encode_topk and the name of the floor among them."""
    others: dict[str, Callable[[], object]] = {"torch linear+relu+topk": lambda: torch.nn.functional.linear(x, W, b).relu().topk(k)}
    if not has_onednn(x.dtype):
        return others, ""
    linear = onednn_linear(x, W.contiguous())  # packed outside the timing, so that the layout does not matter to it
    others["oneDNN packed linear+relu+topk"] = lambda: linear("relu", b).topk(k)
    others["oneDNN product alone"] = lambda: linear("none", None)
    return others, "oneDNN product alone"


def topk(compare: Callable[..., None], label: str, shape: tuple[int, ...], x: torch.Tensor, W: torch.Tensor, packed: bool) -> None:
    k, b = shape[3], (normal(shape[2]) / 10).to(x.dtype)
    weights = fastsae.pack(W) if packed else W

    def ours() -> fastsae.TopKLatents:
        return fastsae.encode_topk(x, weights, b, k=k)

    def verify() -> None:
        few = ours().rows(slice(0, 8))
        OPS["encode_topk"].check((x[:8], W, b, None, None, None, None, k, True), (few.values, few.indices))

    others, floor = plain(x, W, b, k)
    compare(f"encode_topk {label}{' packed' if packed else ''}", name(shape), ours, others, verify, floor=floor or None)


@pytest.mark.seconds(15)
@pytest.mark.parametrize("packed", [False, True], ids=["raw", "packed"])
@pytest.mark.parametrize("layout", ["FD", "DF"])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_encode_topk(shape: tuple[int, int, int, int], layout: str, packed: bool, compare: Callable[..., None]) -> None:
    rows, width, features, _ = shape
    W = unit_rows(features, width)
    topk(compare, layout, shape, normal(rows, width), W.T.contiguous().T if layout == "DF" else W, packed)


@pytest.mark.seconds(15)
@pytest.mark.parametrize("packed", [False, True], ids=["raw", "packed"])
def test_by_magnitude(packed: bool, compare: Callable[..., None]) -> None:
    rows, width, features, k = SHAPES[0]
    x, W, b = normal(rows, width), unit_rows(features, width), normal(features) / 10
    weights = fastsae.pack(W) if packed else W

    def ours() -> fastsae.TopKLatents:
        return fastsae.encode_topk(x, weights, b, k=k, absolute=True)

    def verify() -> None:
        few = ours().rows(slice(0, 8))
        OPS["encode_topk"].check((x[:8], W, b, None, None, None, None, k, False, True), (few.values, few.indices))

    def theirs() -> torch.Tensor:
        z = torch.nn.functional.linear(x, W, b)
        return z.gather(1, z.abs().topk(k).indices)

    others = {"torch linear+abs+topk+gather": theirs, "ours, by score": lambda: fastsae.encode_topk(x, weights, b, k=k)}
    compare(f"encode_topk by magnitude{' packed' if packed else ''}", name(SHAPES[0]), ours, others, verify)


@pytest.mark.parametrize("packed", [False, True], ids=["raw", "packed"])
@pytest.mark.parametrize("shape", SMALL, ids=name)
def test_small_batch(shape: tuple[int, int, int, int], packed: bool, compare: Callable[..., None]) -> None:
    topk(compare, "FD", shape, normal(*shape[:2]), unit_rows(*shape[2:0:-1]), packed)


@pytest.mark.parametrize("packed", [False, True], ids=["raw", "packed"])
@pytest.mark.parametrize("shape", DICTIONARIES, ids=name)
def test_small_dictionary(shape: tuple[int, int, int, int], packed: bool, compare: Callable[..., None]) -> None:
    topk(compare, "small", shape, normal(*shape[:2]), unit_rows(*shape[2:0:-1]), packed)


@pytest.mark.parametrize("packed", [False, True], ids=["raw", "packed"])
def test_small_dictionary_bf16(packed: bool, compare: Callable[..., None]) -> None:
    shape = DICTIONARIES[min(2, len(DICTIONARIES) - 1)]
    topk(compare, "small bf16", shape, normal(*shape[:2]).bfloat16(), unit_rows(*shape[2:0:-1]).bfloat16(), packed)


def planted(x: torch.Tensor, W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that are sums of a few features, as activations are."""
    generator = torch.Generator().manual_seed(3)
    chosen = torch.randint(W.shape[0], (x.shape[0], 24), generator=generator)
    weight = torch.rand(*chosen.shape, 1, generator=generator)
    return (W.cpu()[chosen] * weight).sum(1).to(x) + x * (0.1 / x.shape[1] ** 0.5), W


def outliers(x: torch.Tensor, W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Six dimensions twenty times as large as the others."""
    x = x.clone()
    x[:, [3, 77, 150, 300, 301, 700]] *= 20
    return x, W


def heavy_norms(x: torch.Tensor, W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row norms from 1 to 20, most of them small."""
    return x, W * torch.exp(3 * torch.rand(W.shape[0], 1, generator=torch.Generator().manual_seed(5)) ** 4).to(W)


@pytest.mark.parametrize("packed", [False, True], ids=["raw", "packed"])
@pytest.mark.parametrize("change", [planted, outliers, heavy_norms], ids=lambda f: f.__name__)
def test_hard_inputs(change: Callable[..., tuple[torch.Tensor, torch.Tensor]], packed: bool, compare: Callable[..., None]) -> None:
    shape = MAIN if MAIN[1] > 700 else (32, 768, 2048, 8)
    x, W = change(normal(*shape[:2]), unit_rows(*shape[2:0:-1]))
    topk(compare, change.__name__.replace("_", " "), shape, x, W, packed)


@pytest.mark.parametrize("density", ["sparse", "half"])
def test_encode_threshold(density: str, compare: Callable[..., None]) -> None:
    rows, width, features, k = MAIN
    x, W, b = normal(rows, width), unit_rows(features, width), normal(features) / 10
    theta = 0.0
    if density == "sparse":
        theta = float(torch.nn.functional.linear(x[:32], W, b).topk(k).values[:, -1].mean())

    def verify() -> None:
        got = fastsae.encode_threshold(x[:8], W, b, threshold=theta)
        OPS["encode_threshold"].check((x[:8], W, b, None, None, None, None, torch.tensor(theta), None), (*_ragged(got), _flags()))

    def torch_sparse() -> object:
        z = torch.nn.functional.linear(x, W, b)
        return torch.where(z > theta, z, 0).to_sparse_csr()

    compare(
        f"encode_threshold {density}",
        name(MAIN),
        lambda: fastsae.encode_threshold(x, W, b, threshold=theta),
        {"torch linear+where+to_sparse_csr": torch_sparse, "torch linear+where": lambda: _kept(x, W, b, theta)},
        verify,
        floor="torch linear+where",
    )


def test_encode_batch_topk(compare: Callable[..., None]) -> None:
    rows, width, features, k = MAIN
    x, W, b = normal(rows, width), unit_rows(features, width), normal(features) / 10

    def verify() -> None:
        latents, least = fastsae.encode_batch_topk(x[:8], W, b, k=k)
        OPS["encode_batch_topk"].check((x[:8], W, b, None, None, None, None, float(k)), (*_ragged(latents), least))

    def plain_batch() -> object:
        return torch.nn.functional.linear(x, W, b).relu().flatten().topk(k * rows)

    compare("encode_batch_topk", name(MAIN), lambda: fastsae.encode_batch_topk(x, W, b, k=k), {"torch linear+topk": plain_batch}, verify)


def test_encode_gated(compare: Callable[..., None]) -> None:
    rows, width, features, _ = MAIN
    x, W = normal(rows, width), unit_rows(features, width)
    gate, r, b = normal(features) / 10 - 2.5, normal(features, seed=1) / 10, normal(features, seed=2) / 10

    def verify() -> None:
        got = fastsae.encode_gated(x[:8], W, b_gate=gate, r_mag=r, b_mag=b)
        OPS["encode_gated"].check((x[:8], W, gate, r, b, None, None), _ragged(got))

    def plain_gated() -> object:
        p = torch.nn.functional.linear(x, W)
        return ((p + gate) > 0) * (p * r.exp() + b).relu()

    compare(
        "encode_gated", name(MAIN), lambda: fastsae.encode_gated(x, W, b_gate=gate, r_mag=r, b_mag=b), {"torch dense": plain_gated}, verify
    )


GROWTH_F = shapes([(64, 256, 2**n, 32) for n in (12, 14, 16, 18, 20)], [(8, 64, 2048, 8)])
GROWTH_B = shapes([(4**n, 256, 16384, 32) for n in range(9)], [(4, 64, 2048, 8)])


@pytest.mark.parametrize("shape", [*GROWTH_F, *GROWTH_B], ids=name)
def test_growth(shape: tuple[int, int, int, int], compare: Callable[..., None]) -> None:
    """Time a row grows no faster than F, memory not with B * F."""
    rows, width, features, k = shape
    x, W = normal(rows, width), unit_rows(features, width)

    def verify() -> None:
        few = fastsae.encode_topk(x[:4], W, k=k)
        OPS["encode_topk"].check((x[:4], W, None, None, None, None, None, k, True), (few.values, few.indices))

    compare("encode_topk growth", name(shape), lambda: fastsae.encode_topk(x, W, k=k), {}, verify)


def _ragged(latents: fastsae.RaggedLatents) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return latents.values, latents.col, latents.crow


def _flags() -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8)


def _kept(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, theta: float) -> torch.Tensor:
    z = torch.nn.functional.linear(x, W, b)
    return torch.where(z > theta, z, 0)
