"""Stored latents beside delphi's own cache of the same stream: its files byte for byte, what it reads of ours, its co-occurrences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peers import load
from torch import Tensor, nn

from fastsae import SAE, TopK
from fastsae.latents import TopKLatents
from fastsae.store import LatentStore, LatentWriter

cache = load("delphi.latents.cache", "eai-delphi")
loader = load("delphi.latents.loader", "eai-delphi")
constructors = load("delphi.latents.constructors", "eai-delphi")

D, F, K, VOCAB, MODULE, BATCH, SPLITS = 8, 512, 16, 97, "layers.0", 8, 5


class Model(nn.Module):
    """What delphi asks of a model: a hooked module, a device."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Embedding(VOCAB, D)])
        self.noise = torch.randn(64, D, generator=torch.Generator().manual_seed(1))
        self.device = torch.device("cpu")

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers[0](tokens)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, LatentStore]:
    """(delphi's folder of the module, ours, the store) of 100,352 tokens."""
    folder = tmp_path_factory.mktemp("delphi")
    torch.manual_seed(0)
    model, sae = Model(), SAE(D, F, TopK(K), seed=0).eval()
    tokens = torch.randint(0, VOCAB, (392, 256))
    place = torch.randn(256, D)  # or equal tokens would have equal latents everywhere
    with torch.no_grad(), LatentWriter(folder / "store", F, 256, tokens_a_part=30_000) as writer:

        def encode(x: Tensor) -> Tensor:
            latents = sae.encode(x + place)
            writer.append(latents, tokens[writer_at[0] : writer_at[0] + len(x)])
            writer_at[0] += len(x)
            return latents.to_dense()

        writer_at = [0]
        theirs = cache.LatentCache(model, {MODULE: encode}, batch_size=BATCH)
        theirs.run(tokens.numel(), tokens)
    theirs.save_splits(SPLITS, folder / "theirs")
    store = LatentStore(folder / "store", memory=1 << 20)
    return folder / "theirs" / MODULE, store.to_delphi(folder / "ours", MODULE, SPLITS), store


def test_cache_files_are_delphis_byte_for_byte(both: tuple[Path, Path, LatentStore]) -> None:
    theirs, ours, store = both
    assert store.rows == 100_352
    names = sorted(path.name for path in theirs.iterdir())
    assert len(names) == SPLITS and names == sorted(path.name for path in ours.iterdir())
    for name in names:
        assert (theirs / name).read_bytes() == (ours / name).read_bytes(), name


def test_delphis_files_are_read(both: tuple[Path, Path, LatentStore], tmp_path: Path) -> None:
    theirs, _, store = both
    found = LatentStore.from_delphi(theirs, tmp_path)
    assert (found.n_features, found.context, found.rows) == (F, 256, store.rows)
    assert torch.equal(found.tokens(torch.arange(store.rows)), store.tokens(torch.arange(store.rows)))
    for feature in range(0, F, 9):
        (rows, values), (back, halves) = store.occurrences(feature), found.occurrences(feature)
        kept = values > 1e-5  # what delphi keeps
        assert torch.equal(rows[kept], back) and torch.equal(values[kept].half(), halves)


def test_delphi_reads_of_our_files_what_we_answer(both: tuple[Path, Path, LatentStore]) -> None:
    _, ours, store = both
    tokens = torch.cat([token for _, _, token in store.parts()]).long()
    best = dict(store.tops(range(0, F, 9), 7, before=0, after=0, one_a_sequence=True))
    seen = 0
    for path in ours.iterdir():
        for record in loader.TensorBuffer(str(path), MODULE):
            feature, (where, values) = record.latent.latent_index, record.activation_data
            if feature not in best:
                continue
            rows, own = store.occurrences(feature)
            kept = own > 1e-5
            assert torch.equal(rows[kept], where[:, 0] * 256 + where[:, 1]) and torch.equal(own[kept].half(), values)
            windows, activations = constructors.pool_max_activation_windows(values, tokens, where[:, 0], where[:, 1], 256)
            mine = best[feature]
            top = activations.max(1).values[:7]
            assert torch.equal(mine.values[: len(top)].half(), top)
            at = activations[: len(top)].argmax(1)
            clear = top[:-1] > top[1:]  # equal in half precision: in any order
            if bool(clear.all()):
                assert torch.equal(windows[: len(top)].gather(1, at[:, None]), mine.tokens[: len(top)])
            seen += 1
    assert seen > F // 18


def test_neighbours_by_cooccurrence_are_delphis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Jaccard indices; it asks for CUDA, which is not what is compared."""
    neighbours = load("delphi.latents.neighbours", "eai-delphi")
    monkeypatch.setattr(Tensor, "cuda", lambda self: self)
    generator, features = torch.Generator().manual_seed(0), 40
    indices = torch.rand(60, 32, features, generator=generator).argsort(-1)[..., :5]
    with LatentWriter(tmp_path, features, 32) as writer:
        writer.append(TopKLatents(torch.rand(indices.shape, generator=generator) + 0.1, indices, features), torch.zeros(60, 32).int())
    store = LatentStore(tmp_path)
    theirs: dict[int, list[tuple[Any, Any]]] = neighbours.NeighbourCalculator(
        store.to_delphi(tmp_path / "cache", MODULE, 3), number_of_neighbours=features - 1
    )._compute_cooccurrence_neighbours()
    counts = store.cooccurrence().toarray()
    fired = np.diagonal(counts)
    jaccard = counts / (fired[:, None] + fired - counts)
    for feature, listed in theirs.items():
        for value, other in listed:
            assert float(value) == pytest.approx(jaccard[feature, int(other)], rel=1e-6)
