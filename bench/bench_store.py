"""Stored activations in shuffled order beside a sequential read of the same bytes; stored latents beside delphi's cache."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.harness import name, normal, optional, shapes
from fastsae._core.checkout import checkout_hidden
from fastsae.latents import TopKLatents
from fastsae.store import ActivationShards, LatentStore, LatentWriter, ShardWriter


@pytest.mark.parametrize("shape", shapes([(600_000, 768), (150_000, 2304)], [(20_000, 768)]), ids=name)
def test_iterate(shape: tuple[int, ...], compare: Callable[..., None]) -> None:
    """bfloat16 rows, batches of 4,096, files in the page cache (a cold read is the disk's)."""
    rows, width = shape
    with tempfile.TemporaryDirectory() as folder:
        block = normal(10_000, width).bfloat16()
        with ShardWriter(folder, rows_a_shard=100_000) as writer:
            for _ in range(rows // len(block)):
                writer.append({"x": block})
        store = ActivationShards(folder)
        buffer = bytearray(4 << 20)

        def sequential() -> None:
            for path in sorted(Path(folder).glob("*.safetensors")):
                with open(path, "rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass

        def shuffled() -> None:
            for _ in store.iterate(4096):
                pass

        def verify() -> None:
            found = torch.cat([batch["x"][:, 0] for batch in store.iterate(4096)])
            assert len(found) == len(store) // 4096 * 4096

        compare("store_iterate", name(shape), shuffled, {"sequential read": sequential}, verify, floor="sequential read")


def _delphi() -> Any:
    """Its modules for caches, examples and neighbours; a skip where it is not installed."""
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    with checkout_hidden():  # its transformers would take our kernels/ for a package of its own
        modules = [optional(f"delphi.latents.{module}", "eai-delphi") for module in ("cache", "loader", "constructors", "neighbours")]
    if not all(modules):
        pytest.skip("eai-delphi is not installed")
    return modules


@pytest.fixture
def stream(request: pytest.FixtureRequest) -> Iterator[tuple[Path, list[tuple[TopKLatents, torch.Tensor]], int]]:
    """(folder, batches of latents and tokens, features): features by a Zipf law, sequences of 256 tokens."""
    rows, features, k = request.getfixturevalue("shape")
    generator = torch.Generator().manual_seed(0)
    batches: list[tuple[TopKLatents, torch.Tensor]] = []
    for _ in range(rows // 2048):
        drawn = ((features + 1.0) ** torch.rand(8, 256, k, generator=generator) - 1).long().sort(-1).values
        step = torch.arange(k)
        indices = ((drawn - step).cummax(-1).values + step).clamp_(max=features - 1)  # no feature twice
        indices = torch.minimum(indices, features - k + step)
        values = torch.empty(8, 256, k).exponential_(generator=generator) + 1e-3
        batches.append((TopKLatents(values, indices, features), torch.randint(0, 50_000, (8, 256), generator=generator)))
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder), batches, features


latents = pytest.mark.parametrize("shape", shapes([(100_352, 16_384, 32)], [(4096, 512, 8)]), ids=name)
Stream = tuple[Path, list[tuple[TopKLatents, torch.Tensor]], int]


def _theirs(cache: Any, stream: Stream) -> None:
    """As its ``LatentCache`` runs, from an SAE's top k: dense, counted, its nonzeros kept, written."""
    folder, batches, features = stream
    made = cache.LatentCache(None, {}, batch_size=8)
    made.width = features
    counts = torch.zeros(features, dtype=torch.int64)
    for number, (latents, tokens) in enumerate(batches):
        dense = torch.zeros(2048, features).scatter_(-1, latents.slots.indices, latents.slots.values).view(8, 256, features)
        made.cache.add(dense, tokens, number, "theirs")
        counts += (dense > 0).sum((0, 1))
    made.cache.save()
    made.save_splits(5, folder)


def _ours(stream: Stream) -> LatentStore:
    folder, batches, features = stream
    shutil.rmtree(folder / "ours", ignore_errors=True)
    with LatentWriter(folder / "ours", features, 256) as writer:
        for latents, tokens in batches:
            writer.append(latents, tokens)
    return LatentStore(folder / "ours")


@pytest.mark.seconds(240)
@latents
def test_cache(shape: tuple[int, ...], stream: Stream, compare: Callable[..., None]) -> None:
    """Latents of a stream to disk; delphi's files of ours are its own, byte for byte."""
    cache, folder = _delphi()[0], stream[0]

    def verify() -> None:
        _theirs(cache, stream)
        for path in _ours(stream).to_delphi(folder, "as theirs").iterdir():
            assert path.read_bytes() == (folder / "theirs" / path.name).read_bytes()

    compare("latents_cache", name(shape), lambda: _ours(stream), {"delphi": lambda: _theirs(cache, stream)}, verify)


@pytest.mark.seconds(240)
@latents
def test_examples(shape: tuple[int, ...], stream: Stream, compare: Callable[..., None]) -> None:
    """The 20 sequences in which each feature is largest, from what either has stored; ours sorts by feature every time."""
    _, loader, constructors, _ = _delphi()
    store = _ours(stream)
    cache = store.to_delphi(stream[0], "theirs")

    def ours() -> dict[int, Any]:
        shutil.rmtree(store.folder / "by_feature", ignore_errors=True)
        return {feature: found.values for feature, found in LatentStore(store.folder).tops(k=20, one_a_sequence=True)}

    def theirs() -> dict[int, Any]:
        found: dict[int, Any] = {}
        for path in cache.iterdir():
            buffer = loader.TensorBuffer(str(path), "theirs")
            for latent in buffer:
                where, values = latent.activation_data
                tokens = buffer.tokens
                windows = constructors.pool_max_activation_windows(values, tokens, where[:, 0], where[:, 1], 256)
                found[latent.latent.latent_index] = windows[1][:20].max(1).values
        return found

    def verify() -> None:
        mine = ours()
        for feature, values in theirs().items():
            assert torch.equal(values, mine[feature].half())

    compare("latents_examples", name(shape), ours, {"delphi": theirs}, verify)


@pytest.mark.seconds(400)
@latents
def test_cooccurrence(shape: tuple[int, ...], stream: Stream, compare: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Jaccard indices of all pairs that meet; delphi's dense F x F asks for CUDA, and runs here on the CPU."""
    neighbours = _delphi()[3]
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    store = _ours(stream)
    cache = store.to_delphi(stream[0], "theirs")

    def ours() -> Any:
        counts = store.cooccurrence()
        fired, rows = counts.diagonal(), np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
        return counts.data / (fired[rows] + fired[counts.indices] - counts.data)

    def theirs() -> Any:
        return neighbours.NeighbourCalculator(cache, number_of_neighbours=10)._compute_cooccurrence_neighbours()

    compare("latents_cooccurrence", name(shape), ours, {"delphi": theirs}, lambda: None)
