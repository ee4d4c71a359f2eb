"""Spline codes: known answers of Philox, literals that must never change, bit layout by hand, and the algebra of XOR hashes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from levels import codes
from torch import Tensor

import fastsae
from fastsae import reference, spline_code, spline_hash
from fastsae.codes import hash_code, hash_signs, pack_signs, spline_keys
from fastsae.native import loader
from fastsae.native import spline as native_spline
from fastsae.ops.spline import philox
from fastsae.testing import score_band

SEEDS = [0, 1, 2**63, 2**64 - 1]


def integers(*shape: int, seed: int = 0, high: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-high, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
    ids=["zero", "ones", "pi"],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    assert philox(torch.tensor([counter]), key[0] | key[1] << 32).tolist() == [list(words)]


def philox_by_python(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al. 2011, with Python's unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(second >> 32) ^ c[1] ^ k[0], second & 0xFFFFFFFF, (first >> 32) ^ c[3] ^ k[1], first & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(1, 40))
def test_keys_are_philox_of_neuron_layer_and_seed(layer: int, seed: int, neurons: int) -> None:
    keys = spline_keys(neurons, layer=layer, seed=seed).tolist()
    for neuron in (0, neurons - 1):
        w = philox_by_python([neuron, layer, 0, 0], [seed & 0xFFFFFFFF, seed >> 32])
        assert keys[neuron] == [signed(w[0] | w[1] << 32), signed(w[2] | w[3] << 32)]


def test_the_first_key_is_the_published_one() -> None:
    assert spline_keys(1).tolist() == [[signed(0xE169C58D6627E8D5), signed(0x9B00DBD8BC57AC4C)]]


# ---------------------------------------------------------------- literals


def small_layer() -> tuple[Tensor, Tensor, Tensor]:
    """A layer by arithmetic alone: no generator can change it."""
    x = (torch.arange(3 * 4).reshape(3, 4) * 7 % 11 - 5).float()
    W = (torch.arange(70 * 4).reshape(70, 4) * 5 % 13 - 6).float()
    return x, W, (torch.arange(70) % 5 - 2).float()


CODES = [[6659339333074187610, 53], [-6064837234830890307, 58], [6159423273775593301, 43]]
HASHES = {
    (0, 0): [-801541664858844420, 6701099870286455085, 3210243971598781178],
    (1, 0): [5487310810233463606, -702612070573338116, 3057929787921176964],
    (0, 1): [4351928092402547769, -2505177155572884437, -301344906863029963],
    (4294967295, 18446744073709551615): [2557172170205058566, -7667608597597646702, -1461820191894401826],
}
HASHES_128 = [
    [4850615363713833710, 5479743979880785357],
    [6438737251409441672, -6559728443178448876],
    [-4942427118283543411, -8961273650563829991],
]


def test_golden_codes_never_change() -> None:
    assert spline_code(*small_layer()).tolist() == CODES


def test_golden_hashes_never_change() -> None:
    for (layer, seed), expected in HASHES.items():
        assert spline_hash(*small_layer(), layer=layer, seed=seed).tolist() == expected
    assert spline_hash(*small_layer(), layer=3, seed=0x123456789ABCDEF0, bits=128).tolist() == HASHES_128


def test_golden_hashes_by_python_integers() -> None:
    """The same literals from sums and Philox in Python's integers."""
    x, W, b = (t.long().tolist() for t in small_layer())
    for row, expected in zip(x, HASHES[0, 0], strict=True):
        total = 0
        for neuron, (weights, bias) in enumerate(zip(W, b, strict=True)):
            if sum(v * w for v, w in zip(row, weights)) + bias > 0:
                words = philox_by_python([neuron, 0, 0, 0], [0, 0])
                total ^= words[0] | words[1] << 32
        assert signed(total) == expected


# ---------------------------------------------------------------- bits


@pytest.mark.parametrize("neurons", [1, 63, 64, 65, 127, 128, 129])
def test_bit_layout(neurons: int) -> None:
    eye = torch.eye(neurons)
    for words in (pack_signs(eye), pack_signs(eye.bool()), spline_code(eye, eye)):
        assert words.shape == (neurons, (neurons + 63) // 64)
        for j in (0, neurons // 2, neurons - 1):
            expected = [0] * words.shape[1]
            expected[j // 64] = signed(1 << j % 64)
            assert words[j].tolist() == expected
    assert pack_signs(-eye).eq(0).all()
    # Bits beyond the last neuron are 0.
    everything = pack_signs(torch.ones(1, neurons))[0].tolist()
    assert sum((word & 2**64 - 1) << 64 * i for i, word in enumerate(everything)) == 2**neurons - 1


def test_zero_negative_zero_and_nan_give_no_bit() -> None:
    z = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1.0])
    assert pack_signs(z).tolist() == [0b101000]
    assert spline_code(torch.zeros(1, 0), torch.zeros(7, 0), z).tolist()[0][0] & 0b0011111 == 0b01000
    assert spline_code(torch.tensor([[float("nan")]]), torch.ones(3, 1)).tolist() == [[0]]


@given(st.data())
def test_pack_agrees_with_numpy(data: st.DataObject) -> None:
    rows, neurons = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 200))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool]))
    z = integers(rows, neurons, seed=data.draw(st.integers(0, 2**31))).to(dtype)
    bits = (z > 0).numpy() if dtype is not torch.bool else z.numpy()
    padded = np.pad(bits, ((0, 0), (0, -neurons % 64)))
    expected = (
        np.packbits(padded, axis=1, bitorder="little").reshape(rows, -1)
        if padded.size
        else np.zeros((rows, padded.shape[1] // 8), np.uint8)
    )
    expected = expected.view(np.int64)
    assert pack_signs(z).tolist() == expected.tolist()


# ---------------------------------------------------------------- hashes


@pytest.mark.parametrize("bits", [64, 128])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("layer", [0, 7, 2**32 - 1])
def test_three_ways_to_the_same_hash(bits: int, seed: int, layer: int) -> None:
    x, W, b = integers(9, 5), integers(130, 5, seed=1), integers(130, seed=2)
    key = {"layer": layer, "seed": seed, "bits": bits}
    hashes = spline_hash(x, W, b, **key)
    assert hashes.shape == ((9,) if bits == 64 else (9, 2))
    assert torch.equal(hashes, hash_code(spline_code(x, W, b), **key))
    assert torch.equal(hashes, hash_signs(x @ W.T + b, **key))
    assert torch.equal(hashes, hash_signs((x @ W.T + b) > 0, **key))
    assert torch.equal(hash_code(pack_signs(x @ W.T + b), **key), hashes)


def test_64_bits_are_the_first_of_128() -> None:
    z = integers(20, 90)
    assert torch.equal(hash_signs(z, seed=5), hash_signs(z, seed=5, bits=128)[:, 0])


@given(st.integers(0, 2**31), st.sampled_from(SEEDS), st.sampled_from([64, 128]))
def test_disjoint_neurons_combine_by_xor(draw: int, seed: int, bits: int) -> None:
    x, W, b = integers(6, 5, seed=draw), integers(77, 5, seed=draw + 1), integers(77, seed=draw + 2)
    mask = torch.rand(77, generator=torch.Generator().manual_seed(draw)) > 0.5
    key = {"seed": seed, "bits": bits}
    whole = spline_hash(x, W, b, **key)
    for part, rest in ((mask, ~mask), (mask.nonzero().flatten(), (~mask).nonzero().flatten().int())):
        assert torch.equal(spline_hash(x, W, b, neurons=part, **key) ^ spline_hash(x, W, b, neurons=rest, **key), whole)
        z = x @ W.T + b
        assert torch.equal(hash_signs(z, neurons=part, **key) ^ hash_signs(z, neurons=rest, **key), whole)
        code = spline_code(x, W, b)
        if part.dtype is not torch.bool:
            assert torch.equal(hash_code(code, neurons=part, **key) ^ hash_code(code, neurons=rest, **key), whole)
        assert torch.equal(spline_code(x, W, b, neurons=part) | spline_code(x, W, b, neurons=rest), code)
        assert torch.equal(pack_signs(z, neurons=part), spline_code(x, W, b, neurons=part))


@pytest.mark.parametrize("neuron", [0, 63, 64, 76])
def test_flipping_a_neuron_xors_its_key(neuron: int) -> None:
    z = integers(6, 77).add(0.5)
    flipped = z.clone()
    flipped[:, neuron] *= -1
    key = spline_keys(77, layer=4, seed=9)[neuron]
    assert torch.equal(hash_signs(z, layer=4, seed=9) ^ hash_signs(flipped, layer=4, seed=9), key[0].expand(6))
    assert torch.equal(hash_signs(z, layer=4, seed=9, bits=128) ^ hash_signs(flipped, layer=4, seed=9, bits=128), key.expand(6, 2))


def test_an_index_may_repeat_and_be_in_any_order() -> None:
    z = integers(6, 77)
    once, again = torch.tensor([3, 5, 70]), torch.tensor([70, 5, 3, 5, 3])
    assert torch.equal(hash_signs(z, neurons=once), hash_signs(z, neurons=again))
    assert torch.equal(hash_signs(z, neurons=torch.tensor([], dtype=torch.int64)), torch.zeros(6, dtype=torch.int64))


def test_layers_and_seeds_give_other_hashes() -> None:
    z = torch.ones(1, 77)
    hashes = [int(hash_signs(z, layer=layer, seed=seed)) for layer in (0, 1, 2**32 - 1) for seed in SEEDS]
    assert len(set(hashes)) == len(hashes)


def test_a_million_random_codes_do_not_collide() -> None:
    words = torch.randint(-(2**63), 2**63 - 1, (1_000_000, 1), generator=torch.Generator().manual_seed(0))
    # 2^20 codes in 2^64 values: a collision has probability 3e-8.
    assert np.unique(words.numpy()).size == 1_000_000
    assert np.unique(hash_code(words).numpy()).size == 1_000_000


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,), (2, 0)])
def test_batch_dimensions(batch: tuple[int, ...]) -> None:
    x, W = integers(*batch, 5), integers(70, 5, seed=1)
    assert spline_code(x, W).shape == (*batch, 2)
    assert spline_hash(x, W).shape == batch
    assert spline_hash(x, W, bits=128).shape == (*batch, 2)
    z = x @ W.T
    assert pack_signs(z).shape == (*batch, 2)
    assert hash_signs(z).shape == batch
    assert hash_signs(z, bits=128).shape == (*batch, 2)
    assert hash_code(spline_code(x, W)).shape == batch
    assert hash_code(spline_code(x, W), bits=128).shape == (*batch, 2)


def test_no_neurons() -> None:
    x = integers(4, 5)
    assert spline_code(x, torch.zeros(0, 5)).shape == (4, 0)
    assert spline_hash(x, torch.zeros(0, 5)).tolist() == [0] * 4
    assert hash_signs(torch.zeros(4, 0), bits=128).tolist() == [[0, 0]] * 4


@pytest.mark.parametrize("elements", [1, 100, 3000])
def test_same_bits_whatever_the_tiles(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    x, W, b = integers(50, 5), integers(130, 5, seed=1), integers(130, seed=2)
    functions = (
        lambda: spline_code(x, W, b),
        lambda: spline_hash(x, W, b, bits=128),
        lambda: pack_signs(x @ W.T),
        lambda: hash_signs(x @ W.T),
        lambda: hash_code(spline_code(x, W)),
    )
    whole = [function() for function in functions]
    monkeypatch.setattr(reference, "WORKSPACE_ELEMENTS", elements)
    for function, expected in zip(functions, whole, strict=True):
        assert torch.equal(function(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_small_integers_are_exact_in_every_dtype(dtype: torch.dtype) -> None:
    x, W, b = integers(9, 30), integers(130, 30, seed=1), integers(130, seed=2)
    expected = pack_signs((x.long() @ W.long().T + b.long()) > 0)
    assert torch.equal(spline_code(x.to(dtype), W.to(dtype), b.to(dtype)), expected)
    assert torch.equal(spline_hash(x.to(dtype), W.to(dtype).T.contiguous().T, b.to(dtype)), hash_code(expected))


def test_the_sign_is_that_of_the_float32_score_of_half_precision_inputs() -> None:
    # The product rounds to 0 in float16 and does not in float32.
    x, W = torch.tensor([[1e-4]], dtype=torch.float16), torch.tensor([[1e-4]], dtype=torch.float16)
    assert (x @ W.T).item() == 0
    assert spline_code(x, W).item() == 1
    assert spline_code(x, W, torch.tensor([-1e-7])).item() == 0


def test_no_gradient_and_inputs_that_require_one() -> None:
    x, W, b = integers(4, 5).requires_grad_(), integers(70, 5).requires_grad_(), integers(70).requires_grad_()
    assert not spline_hash(x, W, b).requires_grad
    assert torch.equal(spline_hash(x, W, b), hash_signs(x @ W.T + b))


def test_autocast_equals_rounded_inputs() -> None:
    x, W, b = (torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(((40, 30), (130, 30), (130,))))
    with torch.autocast("cpu", torch.bfloat16):
        ours = spline_code(x, W, b)
    assert torch.equal(ours, spline_code(x.bfloat16(), W.bfloat16(), b.bfloat16()))


def test_layers_of_a_network_combine_by_xor_and_name_its_region() -> None:
    """Two inputs have the same hash exactly where the network is the same affine map."""
    torch.manual_seed(0)
    first, second = torch.nn.Linear(2, 9), torch.nn.Linear(9, 6)
    grid = torch.cartesian_prod(torch.linspace(-3, 3, 25), torch.linspace(-3, 3, 25))
    hidden = torch.relu(first(grid))
    hashes = spline_hash(grid, first.weight, first.bias, layer=0) ^ spline_hash(hidden, second.weight, second.bias, layer=1)
    pattern = torch.cat([first(grid) > 0, second(hidden) > 0], 1)
    codes, inverse = torch.unique(pattern, dim=0, return_inverse=True)
    regions = fastsae.codes.count_codes(hashes)
    assert regions.unique.shape[0] == codes.shape[0] > 20
    assert all(torch.unique(hashes[inverse == region]).numel() == 1 for region in range(codes.shape[0]))


@given(st.data())
def test_every_way_to_a_hash_gives_the_same(data: st.DataObject) -> None:
    """Fused, packed, given pre-activations, XOR of layers, sharded neurons, and everything computed in another order."""
    draw = data.draw(st.integers(0, 2**31), label="draw")
    rows, width = (data.draw(st.integers(1, high), label=name) for name, high in (("rows", 20), ("width", 40)))
    sizes = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=3), label="neurons of the layers")
    key: dict[str, Any] = {"seed": data.draw(st.sampled_from(SEEDS)), "bits": data.draw(st.sampled_from([64, 128]))}
    generator = torch.Generator().manual_seed(draw)
    x = integers(rows, width, seed=draw)
    whole: list[Tensor] = []
    for layer, size in enumerate(sizes):
        W, b = integers(size, width, seed=draw + layer + 1), integers(size, seed=draw + layer + 9)
        z = x @ W.T + b
        fused = spline_hash(x, W, b, layer=layer, **key)
        assert torch.equal(hash_code(spline_code(x, W, b), layer=layer, **key), fused)
        assert torch.equal(hash_signs(z, layer=layer, **key), fused)
        shards = torch.arange(size) % 3
        parts = [spline_hash(x, W, b, neurons=shards == shard, layer=layer, **key) for shard in (2, 0, 1)]
        assert torch.equal(fastsae.codes.combine_hashes(parts), fused)
        order, columns = torch.randperm(rows, generator=generator), torch.randperm(width, generator=generator)
        again = spline_hash(x[order][:, columns], W[:, columns].T.contiguous().T, b, layer=layer, **key)
        assert torch.equal(again, fused[order])
        whole.append(fused)
    assert torch.equal(fastsae.codes.combine_hashes(whole), fastsae.codes.combine_hashes(whole[::-1]))


KEYS = {
    (0, 0): [
        [-2204013331526194987, -7277575273911440308],
        [6679402142117448868, 684265014234019051],
        [5892734326067077929, 5012847114214249389],
    ],
    (7, 0x123456789ABCDEF0): [
        [-6543180732349329546, -5602072191837270617],
        [3703790735747653641, 8983217984904968350],
        [7224026849340844129, 8418923073748235697],
    ],
}


def test_golden_keys_never_change() -> None:
    for (layer, seed), expected in KEYS.items():
        assert spline_keys(3, layer=layer, seed=seed).tolist() == expected


def test_near_zero_counts() -> None:
    x, W, b = integers(30, 5), integers(70, 5, seed=1), integers(70, seed=2)
    z = x @ W.T + b
    for eps in (0, 1, 2.5):
        assert torch.equal(fastsae.codes.near_zero_counts(x, W, b, eps), (z.abs() <= eps).sum(1))
    assert torch.equal(fastsae.codes.near_zero_counts(x, W, None, 1), ((x @ W.T).abs() <= 1).sum(1))
    mask = torch.arange(70) % 3 == 0
    for neurons in (mask, mask.nonzero().flatten()):
        assert torch.equal(fastsae.codes.near_zero_counts(x, W, b, 1, neurons=neurons), (z[:, mask].abs() <= 1).sum(1))
    assert fastsae.codes.near_zero_counts(x.reshape(2, 15, 5), W, b, 1).shape == (2, 15)
    assert fastsae.codes.near_zero_counts(x[:0], W, b).shape == (0,)
    broken = x.clone()
    broken[0] = float("nan")
    assert int(fastsae.codes.near_zero_counts(broken, W, b, 100)[0]) == 0
    for eps, message in ((-1, "eps must be at least 0, got -1"), (float("inf"), "eps must be a finite number")):
        with pytest.raises(ValueError, match=f"^near_zero_counts: {message}"):
            fastsae.codes.near_zero_counts(x, W, b, eps)


def test_rows_without_a_near_zero_have_one_code_in_any_arithmetic() -> None:
    x, W, b = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) for shape in ((400, 768), (96, 768), (96,)))
    band = float(score_band(x, W, b).band.max())
    sure = fastsae.codes.near_zero_counts(x, W, b, 2 * band) == 0
    assert 0 < int(sure.sum()) <= 400
    assert torch.equal(spline_code(x, W, b)[sure], spline_code(x.double(), W.double(), b.double())[sure])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_signs_are_those_of_float64_outside_the_rounding_band(backend: str) -> None:
    if backend == "cpu" and loader.unavailable() is not None:
        pytest.skip(str(loader.unavailable()))
    x, W, b = (torch.randn(shape, generator=torch.Generator().manual_seed(4)) for shape in ((2048, 768), (3072, 768), (3072,)))
    score = score_band(x, W, b)
    exact = x.double() @ W.double().T + b.double()
    clear = exact.abs() > score.band
    assert int((~clear).sum()) < 1e-2 * clear.numel()  # the band is a proven bound, about 0.1 % of normal scores
    code = spline_code(x, W, b, backend=backend)
    got = ((code.unsqueeze(-1) >> torch.arange(64)) & 1).bool().flatten(1)
    assert int(((got != (exact > 0)) & clear).sum()) == 0
    # What the band is for: a product in bfloat16 has other signs.
    low = (x.bfloat16() @ W.bfloat16().T).float() + b
    assert int((((low > 0) != (exact > 0)) & clear).sum()) > 1000


# ---------------------------------------------------------------- the compiled rows

native_only = pytest.mark.skipif(loader.unavailable() is not None, reason=str(loader.unavailable()))


@pytest.fixture(params=codes() or ["none"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with loader.use_isa(request.param):
        yield request.param


@native_only
def test_compiled_keys_are_the_published_ones(level: str) -> None:
    """One active neuron hashes to its key: counter 0, key 0 gives 6627e8d5 e169c58d bc57ac4c 9b00dbd8."""
    key = native_spline.hash_code(torch.tensor([[1]]), None, 0, 0, 128)
    assert key.tolist() == [[signed(0xE169C58D6627E8D5), signed(0x9B00DBD8BC57AC4C)]]


@native_only
@pytest.mark.parametrize("layer", [0, 7, 2**32 - 1])
@pytest.mark.parametrize("seed", SEEDS)
def test_compiled_keys_are_those_of_python(layer: int, seed: int) -> None:
    everyone = torch.eye(200, dtype=torch.bool)
    assert torch.equal(hash_signs(everyone, layer=layer, seed=seed, bits=128, backend="cpu"), spline_keys(200, layer=layer, seed=seed))


@native_only
def test_golden_hashes_of_every_level(level: str) -> None:
    words = torch.tensor(CODES)
    for (layer, seed), expected in HASHES.items():
        assert hash_code(words, layer=layer, seed=seed, backend="cpu").tolist() == expected
    assert hash_code(words, layer=3, seed=0x123456789ABCDEF0, bits=128, backend="cpu").tolist() == HASHES_128


@native_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.bool])
@pytest.mark.parametrize("neurons", [1, 15, 63, 64, 65, 200, 1024])
def test_every_level_packs_and_hashes_like_the_reference(level: str, dtype: torch.dtype, neurons: int) -> None:
    for rows in (1, 3, 4, 9):
        z = integers(rows, neurons, seed=rows).to(dtype)
        wide = torch.ones(rows, neurons + 5).to(dtype)
        wide[:, 2 : neurons + 2] = z
        some = torch.rand(neurons, generator=torch.Generator().manual_seed(neurons)) > 0.4
        for view in (z, wide[:, 2 : neurons + 2], z[:1].expand(rows, neurons), wide[::2, 2 : neurons + 2]):
            for subset in (None, some, some.nonzero().flatten().flip(0).int()):
                assert torch.equal(pack_signs(view, neurons=subset, backend="cpu"), pack_signs(view, neurons=subset, backend="reference"))
                for bits in (64, 128):
                    key = {"layer": 3, "seed": 2**63 + 5, "bits": bits, "neurons": subset}
                    expected = hash_signs(view, **key, backend="reference")
                    assert torch.equal(hash_signs(view, **key, backend="cpu"), expected)
                    code = pack_signs(view)
                    if subset is None or subset.dtype is not torch.bool:
                        assert torch.equal(hash_code(code, **key, backend="cpu"), expected)
                        spread = torch.zeros(code.shape[0], 2 * code.shape[1], dtype=torch.int64)
                        spread[:, ::2] = code
                        assert torch.equal(hash_code(spread[:, ::2], **key, backend="cpu"), expected)


@native_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sign_of_every_kind_of_float(level: str, dtype: torch.dtype) -> None:
    """All 16-bit patterns, or as many float32 ones around every boundary; also where the CPU takes denormals as zero."""
    if dtype is torch.float32:
        edges = torch.tensor([0, 1, 0x007FFFFF, 0x00800000, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF])
        bits = torch.cat([edges, edges | 1 << 31]).to(torch.int32)
    else:
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    z = bits.view(dtype).unsqueeze(0)
    infinity = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}[dtype]
    expected = pack_signs((bits > 0) & (bits <= infinity)).unsqueeze(0)
    assert torch.equal(expected, pack_signs(z, backend="reference"))
    assert torch.equal(pack_signs(z, backend="cpu"), expected)
    supported = torch.set_flush_denormal(True)
    try:
        assert torch.equal(pack_signs(z, backend="cpu"), expected)
    finally:
        if supported:
            torch.set_flush_denormal(False)


@native_only
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_codes_do_not_depend_on_threads_or_batch(threads: int) -> None:
    z = integers(3000, 300)
    before = torch.get_num_threads()
    expected = pack_signs(z, backend="reference"), hash_signs(z, bits=128, backend="reference")
    try:
        torch.set_num_threads(threads)
        got = pack_signs(z, backend="cpu"), hash_signs(z, bits=128, backend="cpu")
        assert all(torch.equal(a, b) for a, b in zip(expected, got))
        assert torch.equal(hash_code(got[0], bits=128, backend="cpu"), got[1])
        assert torch.equal(hash_signs(z[1234:1240], bits=128, backend="cpu"), got[1][1234:1240])
    finally:
        torch.set_num_threads(before)


@native_only
@pytest.mark.parametrize("rows", [4096, 5003])
def test_codes_of_many_rows_do_not_depend_on_threads(rows: int) -> None:
    x, W = torch.randn(rows, 40, generator=torch.Generator().manual_seed(0)), integers(600, 40)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = spline_code(x, W, backend="cpu")
        for threads in (2, 3):  # ranges of rows instead of blocks of features
            torch.set_num_threads(threads)
            assert torch.equal(spline_code(x, W, backend="cpu"), expected)
        assert torch.equal(spline_code(x[4000:4003], W, backend="cpu"), expected[4000:4003])
    finally:
        torch.set_num_threads(before)


@native_only
def test_what_the_compiled_rows_refuse() -> None:
    for z, reason in (
        (integers(4, 5).double(), "dtype float64"),
        (integers(5, 4).T, r"z with strides \(1, 4\) \(supported: stride 1 along H\)"),
    ):
        for run in (pack_signs, hash_signs):
            with pytest.raises(fastsae.BackendError, match=reason):
                run(z, backend="cpu")
            assert torch.equal(run(z), run(z.float().contiguous()))


@pytest.mark.slow
def test_ten_million_random_codes_do_not_collide() -> None:
    """10^7 distinct random codes of 1024 neurons: a collision among their 64-bit hashes has probability 3e-6."""
    generator, hashes = torch.Generator().manual_seed(0), []
    for start in range(0, 10_000_000, 500_000):
        words = torch.randint(-(2**63), 2**63 - 1, (500_000, 16), generator=generator)
        words[:, 7] = torch.arange(start, start + 500_000)  # distinct for certain
        hashes.append(hash_code(words))
    ranked = torch.cat(hashes).sort().values
    assert not bool((ranked[1:] == ranked[:-1]).any())
