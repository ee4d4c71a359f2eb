"""CodeCounter: any order and division of a stream gives the table of one count_codes, and files and pickles keep it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastsae
from fastsae.codes import CodeCounter, count_codes
from fastsae.codes.counters import _mixed

KINDS = [None, "hll", "cpc"]


def needs(kind: str | None) -> None:
    if kind is not None:
        pytest.importorskip("datasketches", reason="datasketches is not installed (extra [studies])")


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> str | None:
    needs(request.param)
    return request.param


def stream(n: int, distinct: int, seed: int = 0, layers: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randint(-(2**63), 2**63 - 1, (max(distinct, 1),), generator=generator)
    return pool[torch.randint(0, max(distinct, 1), (n,) if layers is None else (n, layers), generator=generator)]


def expected(hashes: Tensor) -> tuple[int, int, int]:
    counts = count_codes(hashes.flatten()).counts
    return hashes.numel(), counts.shape[0], int((counts == 1).sum())


# ---------------------------------------------------------------- one stream, any way


@given(st.integers(0, 300), st.integers(1, 200), st.integers(1, 4), st.integers(0, 2**31), st.data())
def test_any_order_and_division_gives_the_table_of_one_count(n: int, distinct: int, shards: int, seed: int, data: st.DataObject) -> None:
    hashes = stream(n, distinct, seed, layers=2)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    counters = [CodeCounter(2) for _ in range(shards)]
    start = 0
    while start < n:
        size = data.draw(st.integers(1, n))
        counters[data.draw(st.integers(0, shards - 1))].update(hashes[order[start : start + size]])
        start += size
    merged = counters[0]
    for other in counters[1:]:
        assert merged.merge(other) is merged
    for layer, row in enumerate(merged.table()):
        seen, distinct_codes, singletons = expected(hashes[:, layer])
        assert row == (layer, seen, distinct_codes, singletons, distinct_codes / seen if seen else 0.0)


@given(st.integers(0, 2**31), st.lists(st.integers(0, 60), min_size=3, max_size=3), st.sampled_from(KINDS))
def test_merging_is_associative_and_commutative(seed: int, sizes: list[int], kind: str | None) -> None:
    needs(kind)

    def counters() -> list[CodeCounter]:
        result = [CodeCounter(sketch=kind) for _ in sizes]
        for i, (counter, size) in enumerate(zip(result, sizes)):
            counter.update(stream(size, 40, seed + i % 2))
        return result

    a, b, c = counters()
    left = a.merge(b).merge(c).table()
    a, b, c = counters()
    right = a.merge(b.merge(c)).table()
    a, b, c = counters()
    assert left == right == c.merge(a).merge(b).table()


def test_merging_leaves_the_other_counter_as_it_was(kind: str | None) -> None:
    a, b = CodeCounter(sketch=kind), CodeCounter(sketch=kind)
    a.update(stream(50, 20))
    b.update(stream(70, 30, 1))
    before = b.table()
    a.merge(b)
    a.update(stream(50, 20, 2))
    assert b.table() == before
    a.merge(a)
    assert a.table()[0].seen == 2 * 170


@pytest.mark.parametrize("sketch", ["hll", "cpc"])
def test_sketches_do_not_depend_on_the_division_either(sketch: str) -> None:
    needs(sketch)
    hashes = stream(30000, 10**6)
    whole, parts = CodeCounter(sketch=sketch), [CodeCounter(sketch=sketch) for _ in range(3)]
    whole.update(hashes)
    for i, part in enumerate(hashes.flip(0).split(777)):
        parts[i % 3].update(part)
    assert parts[2].merge(parts[0]).merge(parts[1]).table() == whole.table()
    row = whole.table()[0]
    assert row.singletons is None
    # Six standard errors of HLL with 2^14 registers; CPC's are smaller.
    assert abs(row.distinct - expected(hashes)[1]) < 6 * 1.04 / 2**7 * expected(hashes)[1]


def test_sketches_are_not_misled_by_linear_hashes() -> None:
    """All XOR combinations of 14 keys: a subspace over GF(2), as the codes of 14 free neurons are."""
    needs("hll")
    words = torch.arange(2**14).unsqueeze(1)
    counter = CodeCounter(sketch="hll")
    counter.update(fastsae.codes.hash_code(words))
    assert abs(counter.table()[0].distinct - 2**14) < 6 * 1.04 / 2**7 * 2**14


def test_mixing_is_a_bijection_by_known_answers() -> None:
    # splitmix64's published first outputs for state 0 are the finaliser of multiples of the golden gamma.
    gamma = np.array([0x9E3779B97F4A7C15, 0x3C6EF372FE94F82A], np.uint64).view(np.int64)
    assert _mixed(gamma).view(np.uint64).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert np.unique(_mixed(np.arange(10000))).size == 10000


def test_the_cost_of_updates_is_bounded() -> None:
    """Sorted runs at least halve in length, so that a code takes part in about log2(distinct) merges."""
    parts = torch.randint(-(2**63), 2**63 - 1, (400, 2000), generator=torch.Generator().manual_seed(0))
    counter = CodeCounter()
    runs = []
    for part in parts:
        counter.update(part)
        runs.append(len(counter._layers[0].runs))  # pyright: ignore[reportAttributeAccessIssue]
        sizes = [run[0].shape[0] for run in counter._layers[0].runs]  # pyright: ignore[reportAttributeAccessIssue]
        assert all(a >= 2 * b for a, b in pairwise(sizes))
    assert max(runs) <= 10
    assert counter.table()[0].distinct == 800_000


# ---------------------------------------------------------------- arguments


def test_layers_masks_and_shapes() -> None:
    hashes = stream(24, 9, layers=3).reshape(4, 6, 3)
    mask = torch.arange(24).reshape(4, 6) % 5 != 0
    by_tensor, by_name = CodeCounter(3), CodeCounter(["a", "b", "c"])
    by_tensor.update(hashes, mask)
    by_name.update({name: hashes[..., i] for i, name in enumerate("cba")}, mask)
    for i, (row, named) in enumerate(zip(by_tensor.table(), reversed(by_name.table()))):
        seen, distinct, singletons = expected(hashes[..., i][mask])
        assert row == (i, seen, distinct, singletons, distinct / seen)
        assert named[1:] == row[1:]
    single = CodeCounter()
    for view in (hashes[..., 0], hashes[..., :1], hashes[0, :, 0]):
        single.update(view)
    assert single.table()[0].seen == 24 + 24 + 6
    only_b = CodeCounter(["a", "b"])
    only_b.update({"b": hashes[..., 0]})
    assert [row.seen for row in only_b.table()] == [0, 24]
    assert only_b.table()[0] == ("a", 0, 0, 0, 0.0)


def test_a_wrong_update_counts_nothing() -> None:
    counter = CodeCounter(["a", "b"])
    good = stream(5, 3)
    for bad, error, message in (
        ({"a": good, "b": good.int()}, TypeError, r"hashes\['b'\] must have dtype int64, got int32"),
        ({"a": good, "x": good}, ValueError, r"hashes has a layer 'x', expected of \['a', 'b'\]"),
        (good, ValueError, r"hashes must have shape \[.., L=2\] or be a dict of layers, got \[5\]"),
        (good.tolist(), TypeError, "hashes must be a torch.Tensor, got list"),
        (torch.zeros((), dtype=torch.int64), ValueError, r"got \[\]"),
    ):
        with pytest.raises(error, match=message):
            counter.update(bad)  # pyright: ignore[reportArgumentType]
    for mask, error, message in (
        (torch.full((5,), 2.0), ValueError, r"mask must be bool, or 0 and 1 \(1: counts\), got float32 from 2 to 2"),
        (torch.ones(4, dtype=torch.bool), ValueError, r"mask must have the shape of the hashes of layer 'a' \[5\], got \[4\]"),
    ):
        with pytest.raises(error, match=message):
            counter.update({"a": good}, mask)
    assert all(row.seen == row.distinct == 0 for row in counter.table())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": 0}, ValueError, "layers must be at least 1, got 0"),
        ({"layers": "mlp"}, TypeError, "layers must be an int or a sequence of names, got str"),
        ({"layers": 2.0}, TypeError, "layers must be an int or a sequence of names, got float"),
        ({"layers": []}, ValueError, "at least one name"),
        ({"layers": ["a", "a"]}, ValueError, "each once"),
        ({"layers": ["a", 1.5]}, TypeError, "a layer's name must be a str or an int, got float"),
        ({"exact": 1}, TypeError, "exact must be a bool, got int"),
        ({"exact": False}, ValueError, "exact=False does not go with sketch=None"),
        ({"exact": True, "sketch": "hll"}, ValueError, "exact=True does not go with sketch='hll'"),
        ({"sketch": "theta"}, ValueError, "sketch must be one of hll, cpc or None, got 'theta'"),
        ({"lg_k": 3}, ValueError, "lg_k must be at least 4 and at most 21, got 3"),
        ({"lg_k": 12.0}, TypeError, "lg_k must be an int, got float"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^CodeCounter: .*{message}"):
        CodeCounter(**arguments)


def test_what_cannot_be_merged() -> None:
    counter = CodeCounter(2)
    with pytest.raises(TypeError, match="other must be a CodeCounter, got dict"):
        counter.merge({})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"must count the layers \[0, 1\], got \[0\]"):
        counter.merge(CodeCounter(1))
    needs("hll")
    with pytest.raises(ValueError, match=r"of the same kind \(exact\), got hll with lg_k=14"):
        counter.merge(CodeCounter(2, sketch="hll"))
    with pytest.raises(ValueError, match=r"\(hll with lg_k=12\), got hll with lg_k=14"):
        CodeCounter(sketch="hll", lg_k=12).merge(CodeCounter(sketch="hll"))


def test_a_sketch_without_datasketches_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketches", None)
    with pytest.raises(ImportError, match=r"pip install 'fastsae-kernels\[studies\]'"):
        CodeCounter(sketch="hll")


def test_the_table_prints_in_columns() -> None:
    counter = CodeCounter(["encoder.0", "b"])
    counter.update({"encoder.0": torch.tensor([1, 1, 2, 3]), "b": torch.arange(1234)})
    assert str(counter.table()) == (
        "layer       seen  distinct  singletons  saturation\n"
        "encoder.0      4         3           2      0.7500\n"
        "b          1,234     1,234       1,234      1.0000"
    )
    assert repr(counter) == "CodeCounter(2 layers, exact, 1238 seen)"


# ---------------------------------------------------------------- files and processes


def filled(kind: str | None) -> CodeCounter:
    counter = CodeCounter(["α", "b", 3], sketch=kind)
    counter.update({"α": stream(500, 100), 3: stream(40, 1000, 1)})
    return counter


def test_save_and_load(kind: str | None, tmp_path: Path) -> None:
    counter, path = filled(kind), tmp_path / "counts.npz"
    counter.save(path)
    loaded = CodeCounter.load(str(path))
    assert loaded.table() == counter.table()
    assert loaded.names == ["α", "b", 3]
    for each in (loaded, counter):
        each.update({"b": stream(300, 50, 2), 3: stream(300, 1000, 1)})
    assert loaded.table() == counter.table()
    counter.save(path)  # over the old file
    assert CodeCounter.load(path).table() == counter.table()
    assert os.listdir(tmp_path) == ["counts.npz"]
    assert all(array.dtype != object for array in np.load(path, allow_pickle=False).values())


def test_pickle(kind: str | None) -> None:
    counter = filled(kind)
    again = pickle.loads(pickle.dumps(counter))
    assert again.table() == counter.table()
    assert again.merge(counter).table()[0].seen == 1000


CHILD = """
import sys, torch, pickle, fastsae
counter = fastsae.codes.CodeCounter(2)
counter.update(torch.tensor([[1, 5], [1, 6], [2, 5]]) * int(sys.argv[1]))
sys.stdout.buffer.write(pickle.dumps(counter))
"""


def test_counters_of_several_processes() -> None:
    total = CodeCounter(2)
    environment = {**os.environ, "PYTHONPATH": str(Path(fastsae.__file__).parents[1])}
    for factor in ("1", "3"):
        done = subprocess.run([sys.executable, "-c", CHILD, factor], capture_output=True, env=environment, check=True)
        total.merge(pickle.loads(done.stdout))
    assert [tuple(row)[1:4] for row in total.table()] == [(6, 4, 2), (6, 4, 2)]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "counts.npz"
    filled(None).save(path)
    before = path.read_bytes()

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="no space"):
        filled(None).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["counts.npz"]


@given(st.data())
def test_a_damaged_file_is_a_value_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    needs(kind)
    path = tmp_path_factory.mktemp("damaged") / "counts.npz"
    counter = filled(kind)
    counter.save(path)
    good = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    else:
        bad = bytearray(good)
        bad[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bad)
    # A changed byte that carries no data (a date in the archive) does no harm; anything else is refused.
    loaded, refusal = None, ""
    try:
        loaded = CodeCounter.load(path)
    except ValueError as error:
        refusal = str(error)
    if loaded is not None:
        assert loaded.table() == counter.table()
    else:
        assert f"CodeCounter.load: {path} is damaged or not a saved CodeCounter" in refusal


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(100)])
def test_what_is_no_counter(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged or not a saved CodeCounter"):
        CodeCounter.load(path)
    np.savez(tmp_path / "y.npz", a=np.arange(3))
    with pytest.raises(ValueError, match="damaged or not a saved CodeCounter"):
        CodeCounter.load(tmp_path / "y.npz")
    np.save(path.with_suffix(".npy"), np.arange(3))
    with pytest.raises(ValueError, match="damaged or not a saved CodeCounter"):
        CodeCounter.load(path.with_suffix(".npy"))
    with pytest.raises(FileNotFoundError):
        CodeCounter.load(tmp_path / "nothing.npz")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("seen", lambda a: a + 1),
        ("seen", lambda a: a[:-1]),
        ("ends", lambda a: a[::-1].copy()),
        ("data", lambda a: a[::-1].copy()),
        ("counts", lambda a: a * 0),
        ("counts", lambda a: a.astype(np.float64)),
        ("about", lambda a: np.array(str(a).replace("Counter 1", "Counter 2"))),
        ("about", lambda a: np.array("[]")),
    ],
)
def test_inconsistent_content_is_refused(tmp_path: Path, name: str, change: object) -> None:
    state = filled(None).__getstate__()
    state[name] = change(state[name])  # pyright: ignore[reportCallIssue]
    np.savez(tmp_path / "x.npz", **state)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="damaged or not a saved CodeCounter"):
        CodeCounter.load(tmp_path / "x.npz")


@pytest.mark.slow
def test_ten_million_codes_stream_without_a_collision() -> None:
    """10^7 distinct random codes of 128 neurons: a 64-bit hash collides among them with probability 3e-6."""
    counter, start = CodeCounter(), time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    first = torch.arange(10_000_000)  # makes every code distinct
    for part in first.split(1_000_000):
        words = torch.stack([part, torch.randint(-(2**63), 2**63 - 1, part.shape, generator=generator)], 1)
        counter.update(fastsae.codes.hash_code(words))
    row = counter.table()[0]
    assert (row.seen, row.distinct, row.singletons) == (10_000_000, 10_000_000, 10_000_000)
    print(f"{time.perf_counter() - start:.0f} s")
