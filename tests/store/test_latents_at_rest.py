"""Stored latents answer as the dense matrix would: by token, by feature, top examples, co-occurrence, delphi's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsae import SAE, JumpReLU, TopK
from fastsae.latents import TopKLatents
from fastsae.store import LatentStore, LatentWriter

pytest.importorskip("safetensors", reason="safetensors is not installed (extra [store])")

F, CONTEXT, N = 60, 9, 41


def stored(folder: Path, kind: Any, memory: int = 9000, **options: Any) -> tuple[LatentStore, Tensor, Tensor]:
    """(store, dense ``[N, CONTEXT, F]``, tokens)."""
    sae = SAE(12, F, kind, seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    x, tokens = torch.randn(N, CONTEXT, 12, generator=generator), torch.randint(0, 1000, (N, CONTEXT), generator=generator)
    with torch.no_grad(), LatentWriter(folder, F, CONTEXT, {"sae": "s"}, tokens_a_part=100, **options) as writer:
        for part in range(0, N, 7):
            writer.append(sae.encode(x[part : part + 7]), tokens[part : part + 7])
        dense = sae.encode(x).to_dense()
    return LatentStore(folder, memory=memory), dense, tokens


each = pytest.mark.parametrize("kind", [TopK(4), JumpReLU(0.3)], ids=["topk", "jumprelu"])


@each
def test_by_token_and_by_feature(kind: Any, tmp_path: Path) -> None:
    store, dense, tokens = stored(tmp_path, kind)
    assert (store.sequences, store.rows, store.entries) == (N, N * CONTEXT, int((dense != 0).sum()))
    for first, latents, token in store.parts():
        start = first // CONTEXT
        assert torch.equal(latents.to_dense(), dense[start : start + len(token)]) and torch.equal(
            token.long(), tokens[start : start + len(token)]
        )
    flat = dense.view(-1, F)
    assert torch.equal(store.fired(), (flat != 0).sum(0))
    for feature in range(F):
        rows, values = store.occurrences(feature)
        assert torch.equal(rows, flat[:, feature].nonzero().flatten()) and torch.equal(values, flat[rows, feature])
    assert len(list((tmp_path / "by_feature").glob("0*.safetensors"))) > 3, "several ranges, as the memory allows"
    assert not list((tmp_path / "by_feature").glob("run*"))
    store.verify()
    edges, counts = store.histogram(3, 7)
    assert int(counts.sum()) == int((flat[:, 3] != 0).sum()) and len(edges) == 8


@each
def test_top_examples(kind: Any, tmp_path: Path) -> None:
    store, dense, tokens = stored(tmp_path, kind)
    for feature in (0, 7, 31):
        found = store.top(feature, 5, before=3, after=2)
        flat = dense[..., feature].flatten()
        order = flat.argsort(descending=True, stable=True)[: min(5, int((flat != 0).sum()))]
        assert torch.equal(found.values, flat[order])
        assert torch.equal(found.sequence * CONTEXT + found.position, order)
        for row, (s, p) in enumerate(zip(found.sequence.tolist(), found.position.tolist())):
            for column, at in enumerate(range(p - 3, p + 3)):
                inside = 0 <= at < CONTEXT
                assert int(found.tokens[row, column]) == (int(tokens[s, at]) if inside else -1)
                assert float(found.activations[row, column]) == (float(dense[s, at, feature]) if inside else 0.0)
        once = store.top(feature, 50, one_a_sequence=True)
        assert len(set(once.sequence.tolist())) == len(once.sequence) == int((dense[..., feature] != 0).any(1).sum())
        assert torch.equal(once.values, dense[..., feature].max(1).values.sort(descending=True).values[: len(once.values)])


def test_top_examples_of_many_features_in_one_pass(tmp_path: Path) -> None:
    store, _dense, _ = stored(tmp_path, TopK(4))
    for chosen in (None, [40, 3, 3, 17], torch.arange(F) % 7 == 0, []):
        for once in (False, True):
            found = list(store.tops(chosen, 3, before=2, after=2, one_a_sequence=once))
            mask = torch.arange(F) % 7 == 0
            expected = (
                list(range(F))
                if chosen is None
                else mask.nonzero().flatten().tolist()
                if isinstance(chosen, Tensor)
                else sorted(set(chosen))
            )
            assert [feature for feature, _ in found] == expected
            for feature, examples in found:
                one = store.top(feature, 3, before=2, after=2, one_a_sequence=once)
                assert all(torch.equal(a, b) for a, b in zip(examples, one))
    tied = LatentWriter(tmp_path / "tied", 2, 3)
    tied.append(TopKLatents(torch.ones(5, 3, 1), torch.zeros(5, 3, 1, dtype=torch.int64), 2), torch.zeros(5, 3, dtype=torch.int32))
    tied.close()
    (_, most), (_, none) = LatentStore(tmp_path / "tied").tops(k=4, one_a_sequence=True)
    assert most.sequence.tolist() == [0, 1, 2, 3] and most.position.tolist() == [0] * 4, "equal values: the earlier token"
    assert [len(column) for column in none] == [0] * 5
    with pytest.raises(IndexError, match="features holds 60, expected 0 <= index < 60"):
        store.tops([1, F])


@each
def test_cooccurrence_is_exact(kind: Any, tmp_path: Path) -> None:
    store, dense, _ = stored(tmp_path, kind)
    fires = (dense.view(-1, F) != 0).long()
    assert np.array_equal(store.cooccurrence().toarray(), (fires.T @ fires).numpy())
    some = [5, 2, 40]
    both = (fires[:, some].T @ fires[:, some]).numpy()
    assert np.array_equal(store.cooccurrence(some).toarray(), both)
    fired = np.maximum(np.diagonal(both), 1)[:, None]
    assert np.array_equal(store.conditional(some).toarray(), both / fired), "P(j fires | i fires)"


def delphis(dense: Tensor, tokens: Tensor, splits: int) -> dict[str, dict[str, np.ndarray]]:
    """delphi's files by its documented layout: locations (sequence, position, feature - start), float16 values, the tokens."""
    edges, found = torch.linspace(0, F, steps=splits + 1).long(), {}
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist()):
        part = dense[..., start:stop]
        where = (part.abs() > 1e-5).nonzero()
        locations = np.ascontiguousarray(where.numpy().astype(np.uint16))
        values = part[tuple(where.T)].half().numpy()
        found[f"{start}_{stop - 1}.safetensors"] = {"locations": locations, "activations": values, "tokens": tokens.numpy()}
    return found


@each
def test_delphis_cache_files(kind: Any, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    store, dense, tokens = stored(tmp_path / "store", kind)
    folder = store.to_delphi(tmp_path, "layers.3", splits=4)
    expected = delphis(dense, tokens, 4)
    assert {path.name for path in folder.iterdir()} == set(expected)
    for name, columns in expected.items():
        save_file(columns, tmp_path / "theirs")
        assert (folder / name).read_bytes() == (tmp_path / "theirs").read_bytes()
    back = LatentStore.from_delphi(folder, tmp_path / "back")
    assert (back.n_features, back.context, back.sequences) == (F, CONTEXT, N)
    whole = torch.cat([latents.to_dense() for _, latents, _ in back.parts()])
    kept = torch.where(dense.abs() > 1e-5, dense, 0).half()
    assert torch.equal(whole, kept) and torch.equal(back.tokens(torch.arange(N * CONTEXT)).view(N, CONTEXT), tokens)
    with pytest.raises(FileNotFoundError, match="holds no cache files of delphi"):
        LatentStore.from_delphi(tmp_path / "none", tmp_path / "again")
    (folder / "15_29.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must hold splits that start at \[0, 15, 45\], got \[0, 30, 45\]"):
        LatentStore.from_delphi(folder, tmp_path / "again")


def test_a_run_goes_on_and_writers_share(tmp_path: Path) -> None:
    _, dense, tokens = stored(tmp_path, TopK(4))
    again = LatentWriter(tmp_path, F, CONTEXT, {"sae": "s"})
    assert again.sequences == N
    other = LatentWriter(tmp_path, F, CONTEXT, {"sae": "s"}, writer=1)
    sae = SAE(12, F, TopK(4), seed=0).eval()
    more = torch.randn(2, CONTEXT, 12)
    with torch.no_grad():
        other.append(sae.encode(more), tokens[:2])
        other.close()
        extra = sae.encode(more).to_dense()
    store = LatentStore(tmp_path)
    whole = torch.cat([dense, extra]).view(-1, F)
    assert torch.equal(store.fired(), (whole != 0).sum(0)) and torch.equal(store.occurrences(5)[0], whole[:, 5].nonzero().flatten())
    with pytest.raises(ValueError, match=r"has about={'sae': 's'}, got {}"):
        LatentWriter(tmp_path, F, CONTEXT)
    with pytest.raises(ValueError, match=r"latents must be of \[2, 9\] tokens and 60 features, got \[1, 9\] of 60"):
        other.append(sae.encode(more[:1]), tokens[:2])
    with pytest.raises(ValueError, match="feature must be"):
        store.occurrences(F)


def test_damage_is_named(tmp_path: Path) -> None:
    store, _, _ = stored(tmp_path, TopK(4), dtype=torch.float16)
    store.fired()
    for file in (tmp_path / "000-000001.safetensors", tmp_path / "by_feature" / "000000.safetensors"):
        content = bytearray(file.read_bytes())
        content[-9] ^= 1
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{file.name} is damaged"):
            store.verify()
        content[-9] ^= 1
        file.write_bytes(content)
    store.verify()
    (tmp_path / "000-000001.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"000-000001.safetensors must have \d+ bytes, got 0"):
        LatentStore(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no latents.json"):
        LatentStore(tmp_path / "by_feature")
