"""Activations on disk: what is read is what was written, in an order that the seed alone decides; kills and damage are noticed."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from training_runs import adam, build, data, launch, same

from fastsae import Trainer
from fastsae.store import ActivationShards, ShardWriter, open_activations
from fastsae.store import shards as module
from fastsae.store.columns import Shard
from fastsae.trainer import fit_all

pytest.importorskip("safetensors", reason="safetensors is not installed (extra [store])")

N, D = 1000, 6


def columns(n: int = N, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "mlp.3": torch.randn(n, D, generator=generator).bfloat16(),
        "resid.3": torch.randn(n, 2, D, generator=generator),
        "mask": torch.rand(n, generator=generator) < 0.8,
        "token": torch.arange(n, dtype=torch.int32) + 10_000 * seed,
    }


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 17 * 48)


@pytest.fixture
def folder(tmp_path: Path, small_blocks: None) -> Path:
    with ShardWriter(tmp_path / "acts", {"model": "m", "context": 128}, rows_a_shard=150) as writer:
        whole = columns()
        for start in range(0, N, 77):
            writer.append({name: column[start : start + 77] for name, column in whole.items()})
    return tmp_path / "acts"


def rows(batches: list[dict[str, Tensor]]) -> list[int]:
    return torch.cat([b["token"] for b in batches]).tolist()


def test_what_was_written_is_read(folder: Path) -> None:
    store, whole = ActivationShards(folder), columns()
    assert len(store) == N and store.about == {"model": "m", "context": 128} and len(store.shards) == 7
    assert store.columns["mlp.3"] == (torch.bfloat16, (D,)) and store.columns["mask"] == (torch.bool, ())
    for start, stop in ((0, N), (149, 151), (5, 5), (300, 600)):
        for name, column in store.read(start, stop).items():
            assert torch.equal(column, whole[name][start:stop]), name
    store.verify()
    assert "rows=1000" in repr(store)


def test_a_pass_has_every_row_once_and_rows_stay_together(folder: Path) -> None:
    store, whole = ActivationShards(folder), columns()
    got = list(store.iterate(64, seed=3))
    seen = rows(got)
    assert len(seen) == len(set(seen)) == N // 64 * 64
    for batch in got:
        for name, column in batch.items():
            assert torch.equal(column, whole[name][batch["token"].long()]), name
    assert rows(list(store.iterate(64, seed=3))) == seen
    for other in (list(store.iterate(64, seed=4)), list(store.iterate(64, seed=3, epoch=1))):
        assert rows(other) != seen
    spread = torch.tensor(rows(got[:1]), dtype=torch.float64)
    assert float(spread.std()) > 0.15 * N, "a batch holds rows of several places"


@given(
    st.integers(1, 200),
    st.sampled_from([1, 2, 3, 4]),
    st.integers(1, 70),
    st.integers(0, 3),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 4),
    st.integers(0, 9),
)
def test_the_order_depends_on_the_seed_alone(batch: int, ranks: int, window: int, ahead: int, readers: int, start: int, seed: int) -> None:
    store = ActivationShards.of(Path("memory"), [Shard(Path("memory"), N, columns(), {})] * 2, {})
    whole = [b["token"] for b in store.iterate(batch, seed=seed, window=window)][start : start + 3]
    parts: list[list[Tensor]] = []
    for rank in range(ranks):
        found = store.iterate(batch, seed=seed, window=window, ahead=ahead, readers=readers, rank=rank, ranks=ranks, start=start)
        parts.append([b["token"] for _, b in zip(range(3), found)])
    for number, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[number] for part in parts]), expected)


def test_training_goes_on_where_it_was_killed(tmp_path: Path, small_blocks: None) -> None:
    with ShardWriter(tmp_path / "acts", rows_a_shard=60) as writer:
        writer.append({"x": data().bfloat16(), "mask": torch.arange(200) % 7 != 0})
    store = ActivationShards(tmp_path / "acts")

    def batches() -> module.ShardBatches:
        return store.batches(20, mask="mask", seed=3, dtype=torch.float32, window=3)

    def run(sae: Any, steps: int, resume: bool = False) -> None:
        Trainer(sae, adam(sae), checkpoint=tmp_path / "run.pt", progress=False).fit(batches(), steps, resume=resume)

    whole, halves = build(), build()
    run(whole, 37)
    run(halves, 13)
    again = build()
    run(again, 37, resume=True)
    assert same(whole, again)
    other = store.batches(10, mask="mask", seed=3)
    with pytest.raises(ValueError, match=r"size must be 20 as in the state, got 10"):
        other.load_state_dict(batches().state_dict())


WRITING = """
    import sys, torch
    from fastsae.store import ShardWriter
    with ShardWriter(sys.argv[1], {"model": "m"}, rows_a_shard=50) as writer:
        print(writer.rows, flush=True)
        for row in range(writer.rows, 100_000, 10):
            writer.append({"x": torch.full((10, 300), float(row)) + torch.arange(10)[:, None]})
"""


def test_a_killed_writer_leaves_whole_shards_and_goes_on(tmp_path: Path) -> None:
    path, before = tmp_path / "acts", 0
    for turn in range(3):
        process = launch(WRITING, path)
        assert process.stdout is not None
        assert int(process.stdout.readline()) == before
        time.sleep(0.05 + 0.11 * turn)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not list(path.glob("*.json")):
            continue
        store = ActivationShards(path)
        store.verify()
        before = len(store)
        x = store.read(0, before)["x"]
        assert torch.equal(x[:, 0], torch.arange(before, dtype=torch.float32)) and before % 50 == 0
    assert before > 0


def test_several_writers_fill_one_folder(tmp_path: Path) -> None:
    for number in (1, 0, 10):
        with ShardWriter(tmp_path, {"model": "m"}, writer=number) as writer:
            writer.append({"token": columns(20, seed=number)["token"]})
    assert ActivationShards(tmp_path).read(0, 60)["token"][::20].tolist() == [0, 10_000, 100_000]
    with ShardWriter(tmp_path, {"model": "another"}, writer=2) as writer:
        writer.append({"token": columns(20)["token"]})
    with pytest.raises(ValueError, match=r"activations-2.json is about {'model': 'another'}, .*activations.json about {'model': 'm'}"):
        ActivationShards(tmp_path)


def test_damage_is_named(folder: Path) -> None:
    file, manifest = folder / "000-000002.safetensors", folder / "activations.json"
    content, text = file.read_bytes(), manifest.read_text()
    flipped = bytearray(content)
    flipped[-20] ^= 4
    file.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"000-000002.safetensors is damaged: its content has another hash"):
        ActivationShards(folder).verify()
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"activations.json is damaged: .*000-000002.safetensors must have \d+ bytes, got \d+"):
        ActivationShards(folder)
    header = bytearray(content)
    header[:8] = (1 << 40).to_bytes(8, "little")
    file.write_bytes(header)
    with pytest.raises(ValueError, match=r"claims a header of \d+ bytes"):
        ActivationShards(folder)
    claims = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    claims["mlp.3"]["shape"][0] = 1 << 50
    made = json.dumps(claims).encode()
    file.write_bytes(len(made).to_bytes(8, "little") + made + content[8 + int.from_bytes(content[:8], "little") :])
    listed = json.loads(text)
    listed["shards"][2]["bytes"] = file.stat().st_size
    manifest.write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"mlp.3 claims torch.bfloat16"):
        ActivationShards(folder)
    manifest.write_text(text[:100])
    with pytest.raises(ValueError, match=r"activations.json is not a JSON file"):
        ActivationShards(folder)
    with pytest.raises(FileNotFoundError, match=r"holds no activations.json"):
        ActivationShards(folder.parent)


def test_wrong_arguments(folder: Path, tmp_path: Path) -> None:
    writer, good = ShardWriter(tmp_path / "w"), columns(4)
    for change, error, message in (
        ({}, ValueError, "columns must name at least one column"),
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.zeros(2, dtype=torch.complex64)}, TypeError, "x must have dtype"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape \[rows, ..\], got \[\]"),
        ({"x": torch.zeros(2), "y": torch.zeros(3)}, ValueError, "columns must have equally many rows"),
    ):
        with pytest.raises(error, match=message):
            writer.append(change)  # pyright: ignore[reportArgumentType]
    writer.append(good)
    with pytest.raises(ValueError, match=r"columns must be .* as before, got"):
        writer.append({"mlp.3": good["mlp.3"]})
    with pytest.raises(ValueError, match=r"is about .*, got about=\{'model': 'x'\}"):
        ShardWriter(folder, {"model": "x"})
    store = ActivationShards(folder)
    for call, message in (
        (lambda: store.iterate(N + 1), r"batch must be at most rows=1000 \(1000\)|batch must be .*1000"),
        (lambda: store.iterate(4, rank=2, ranks=2), "rank must be"),
        (lambda: store.iterate(4, columns=["y"]), "columns must be of mlp.3, resid.3, mask, token, got 'y'"),
        (lambda: store.batches(4), "x must name one of the columns"),
        (lambda: store.read(3, N + 1), "stop must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_full_disk_keeps_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, whole = ShardWriter(tmp_path, rows_a_shard=10), columns(25)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("fastsae._core.files.replace", full)
        with pytest.raises(OSError, match="No space left"):
            writer.append(whole)
    writer.close()
    assert torch.equal(ActivationShards(tmp_path).read(0, 25)["token"], whole["token"])


def test_files_of_others(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    x = torch.randn(30, D, generator=torch.Generator().manual_seed(0))
    (tmp_path / "npy").mkdir()
    for number, part in enumerate(x.split(12)):
        np.save(tmp_path / "npy" / f"{number}.npy", part.numpy())
    save_file({"x": x, "y": x[:, :2].contiguous()}, tmp_path / "one.safetensors")
    for path in (tmp_path / "npy", tmp_path / "one.safetensors"):
        store = open_activations(path)
        assert torch.equal(store.read(0, 30)["x"], x)
        assert sum(len(b["x"]) for b in store.iterate(7)) == 28
        store.verify()
    assert torch.equal(open_activations(tmp_path / "npy" / "0.npy").read(0, 12)["x"], x[:12])
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"objects.npy is damaged or holds no numbers"):
        open_activations(tmp_path / "objects.npy")
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
        open_activations(tmp_path / "none")


def test_saelens_caches(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (it comes with the peers)")
    x = torch.randn(8, 5, D, generator=torch.Generator().manual_seed(0))
    token = torch.arange(40, dtype=torch.int32).view(8, 5)
    features = datasets.Features(
        {"blocks.0": datasets.Array2D(shape=(5, D), dtype="float32"), "token_ids": datasets.Sequence(datasets.Value("int32"), length=5)}
    )
    datasets.Dataset.from_dict({"blocks.0": x.numpy(), "token_ids": token.numpy()}, features=features).save_to_disk(tmp_path / "cache")
    store = open_activations(tmp_path / "cache")
    assert store.about == {"context_size": 5} and len(store) == 40
    found = store.read(0, 40)
    assert torch.equal(found["blocks.0"], x.view(40, D)) and torch.equal(found["token_ids"].view(8, 5), token)


# ---------------------------------------------------------------- rows that do not count, several columns


def test_rows_are_left_out_by_a_stored_column(folder: Path) -> None:
    store = ActivationShards(folder)
    gone = [3, 500, 501]
    found = store.batches(50, x="mlp.3", mask="mask", ignore={"token": gone}, seed=2, ahead=0)
    plain = store.iterate(50, seed=2)
    for batch, columns in zip(found, plain):
        assert set(batch) == {"x", "mask"} and batch["mask"].dtype is torch.bool
        expected = [bool(counts) and token not in gone for counts, token in zip(columns["mask"], columns["token"].tolist())]
        assert batch["mask"].tolist() == expected and torch.equal(batch["x"], columns["mlp.3"])
    alone = next(iter(store.batches(N, x="mlp.3", ignore={"token": 7, "mask": 0}, ahead=0)))  # no mask given: one is made
    assert int(alone["mask"].sum()) == int(store.read(0, N)["mask"].sum()) - int(store.read(7, 8)["mask"])
    assert next(iter(store.batches(N, x="mlp.3", ignore={"token": []}, ahead=0)))["mask"].all()
    for ignore, error, message in (
        ({"position": 0}, ValueError, "columns must be of .*, got 'position'"),
        ({"mlp.3": 0}, ValueError, r"ignore must name columns of integers, one a row, got 'mlp.3', torch.bfloat16 \[6\]"),
        ({"token": [0.5]}, TypeError, r"ignore\['token'\] must be an int, got float"),
    ):
        with pytest.raises(error, match=f"^ActivationShards.batches: {message}"):
            store.batches(4, x="mlp.3", ignore=ignore)


def test_one_pass_feeds_several_dictionaries(tmp_path: Path, small_blocks: None) -> None:
    with ShardWriter(tmp_path / "store", rows_a_shard=60) as writer:
        writer.append(
            {"layer 1": data().bfloat16(), "layer 2": data(seed=1).bfloat16(), "position": torch.arange(200, dtype=torch.int32) % 8}
        )
    store = ActivationShards(tmp_path / "store")
    hooks = {"a": "layer 1", "b": "layer 2", "c": "layer 2"}

    def trainer(name: str) -> Trainer:
        sae = build("relu" if name == "c" else "topk")
        return Trainer(sae, adam(sae), progress=False)

    options: dict[str, Any] = {"seed": 3, "dtype": torch.float32, "ignore": {"position": 0}}
    together = {name: trainer(name) for name in hooks}
    found = fit_all(together, store.batches(20, ["layer 1", "layer 2"], **options), 12, columns=hooks, progress=False)
    for name, hook in hooks.items():
        alone = trainer(name)
        assert alone.fit(store.batches(20, hook, **options), 12) == found[name] and same(alone.sae, together[name].sae)
        assert found[name]["left_out"] > 20
    for x, target in (([], None), (["layer 1"], "layer 2")):
        with pytest.raises(ValueError, match=r"^ActivationShards.batches: several x go without target, and none may be named mask"):
            store.batches(4, x, target)
