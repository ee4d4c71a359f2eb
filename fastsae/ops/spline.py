"""Spline codes: which ReLU neurons are on, as packed bits or as a hash, without storing pre-activations.

The code of a row names the polytope (region of one affine map) that the row lies in. Its hash is the XOR of a fixed random key for every
active neuron (Zobrist hashing): independent of order, so tiles, layers, shards and devices combine by XOR, and flipping neuron i XORs its
key. Two given codes collide with probability 2^-64 (2^-128). XOR is linear over GF(2): not adversary-proof.

Keys are Philox4x32-10 outputs (Salmon et al. 2011) for counter (neuron, layer, 0, 0) and key (seed low word, seed high word).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastsae._core import checks, seeds
from fastsae.dispatch import Op, preference
from fastsae.ops.encode import encoder_inputs
from fastsae.packed import PackedWeights
from fastsae.reference import accumulator, chunks, drawn, scores

_MASK = 0xFFFFFFFF

# ---------------------------------------------------------------- keys


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit words held in int64, which has no unsigned product."""
    high, low = factor >> 16, factor & 0xFFFF
    return (word * high + ((word * low) >> 16)) >> 16, (word * factor) & _MASK


def philox(counter: Tensor, key: int) -> Tensor:
    """Philox4x32-10: ``counter [n, 4]`` of 32-bit words in int64 and a 64-bit key to ``[n, 4]`` words."""
    c0, c1, c2, c3 = counter.unbind(1)
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _product(c0, 0xD2511F53)
        high1, low1 = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack([c0, c1, c2, c3], 1)


def spline_keys(n_neurons: int, *, layer: int = 0, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """``[n_neurons, 2]`` int64 keys of the neurons of a layer; the first column serves 64-bit hashes.

    Args:
        n_neurons: number of neurons, below 2^32.
        layer: number of the layer, 0 .. 2^32 - 1.
        seed: 0 .. 2^64 - 1; record it with the hashes.
        device: of the result.
    """
    n_neurons = checks.integer("spline_keys", "n_neurons", n_neurons, 0, 2**32 - 1)
    layer, seed, _ = checked_key("spline_keys", layer, seed)
    neuron = torch.arange(n_neurons, device=device)
    zero = torch.zeros_like(neuron)
    words = philox(torch.stack([neuron, zero + layer, zero, zero], 1), seed)
    return torch.stack([words[:, 0] | (words[:, 1] << 32), words[:, 2] | (words[:, 3] << 32)], 1)


# ---------------------------------------------------------------- references


def _selected(active: Tensor, neurons: Tensor | None) -> Tensor:
    mask = checks.neuron_mask(neurons, active.shape[1])
    return active if mask is None else active & mask


def _pack(active: Tensor) -> Tensor:
    """``[n, H]`` bool to ``[n, ceil(H / 64)]`` int64: bit j % 64 of word j // 64."""
    rows, size = active.shape
    words = (size + 63) // 64
    padded = torch.nn.functional.pad(active, (0, words * 64 - size)).reshape(rows, words, 4, 16)
    # Sixteen bits at a time as a product with powers of two, exact in float32: many times faster than shifting every bit as int64.
    powers = torch.exp2(torch.arange(16, dtype=torch.float32, device=active.device))
    shift = 16 * torch.arange(4, device=active.device)
    result = torch.zeros(rows, words, dtype=torch.int64, device=active.device)
    for part in chunks(rows, max(words, 1) * 64):
        result[part] = ((padded[part].float() @ powers).long() << shift).sum(-1)
    return result


def unpack_bits(words: Tensor) -> Tensor:
    """``[n, w]`` int64 to ``[n, 64 w]`` bool."""
    return ((words.unsqueeze(-1) >> torch.arange(64, device=words.device)) & 1).bool().flatten(1)


def _xor(active: Tensor, layer: int, seed: int, bits: int) -> Tensor:
    """XOR of the keys of active neurons: bit by bit the parity of a product, exact in float32 below 2^24 neurons."""
    keys = spline_keys(active.shape[1], layer=layer, seed=seed & (2**64 - 1), device=active.device)[:, : bits // 64]
    key_bits = unpack_bits(keys.flatten().unsqueeze(1)).reshape(active.shape[1], bits).float()
    parts = [keys.new_zeros(0, bits // 64)]
    for part in chunks(active.shape[0], max(active.shape[1], bits)):
        odd = (active[part].float() @ key_bits).long() & 1
        parts.append(_pack(odd.bool()))
    result = torch.cat(parts)
    return result[:, 0] if bits == 64 else result


def _scores(x: Tensor, W: Tensor, b: Tensor | None) -> Iterator[Tensor]:
    """Tiles of rows, at least one."""
    for rows in chunks(max(x.shape[0], 1), max(W.shape[0], x.shape[1])):
        yield scores(x[rows].to(accumulator(x.dtype)), W, b)


def _active(x: Tensor, W: Tensor, b: Tensor | None, neurons: Tensor | None) -> Iterator[Tensor]:
    neurons = checks.neuron_mask(neurons, W.shape[0])
    return (_selected(z > 0, neurons) for z in _scores(x, W, b))


def spline_code_reference(x: Tensor, W: Tensor, b: Tensor | None, neurons: Tensor | None, packed: Tensor | None = None) -> Tensor:
    return torch.cat([_pack(active) for active in _active(x, W, b, neurons)])


def spline_hash_reference(
    x: Tensor, W: Tensor, b: Tensor | None, neurons: Tensor | None, layer: int, seed: int, bits: int, packed: Tensor | None = None
) -> Tensor:
    return torch.cat([_xor(active, layer, seed, bits) for active in _active(x, W, b, neurons)])


def pack_signs_reference(z: Tensor, neurons: Tensor | None) -> Tensor:
    return _pack(_selected(z > 0, neurons))


def hash_signs_reference(z: Tensor, neurons: Tensor | None, layer: int, seed: int, bits: int) -> Tensor:
    return _xor(_selected(z > 0, neurons), layer, seed, bits)


def hash_code_reference(words: Tensor, neurons: Tensor | None, layer: int, seed: int, bits: int) -> Tensor:
    neurons = checks.neuron_mask(neurons, words.shape[1] * 64)
    tiles = chunks(max(words.shape[0], 1), words.shape[1] * 64)
    return torch.cat([_xor(_selected(unpack_bits(words[rows]), neurons), layer, seed, bits) for rows in tiles])


# ---------------------------------------------------------------- samples and checks


def _layer_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    normal = drawn(device, dtype, generator)
    for rows, width, size in ((5, 16, 64), (1, 1, 1), (0, 4, 10), (3, 0, 65), (9, 33, 130), (4, 2, 63)):
        yield normal(rows, width), normal(size, width), normal(size), None
        mask = seeds.uniform(generator, size).to(device) > 0.5
        yield normal(rows, width), normal(width, size).T, None, mask
        yield normal(rows, width), normal(size, width), None, mask.nonzero().flatten()
    special = normal(4, 8)
    special[1], special[2, 3] = 0, float("nan")
    yield special, normal(70, 8), None, None


def _layer(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(x, W, b) of a moderate MLP layer."""
    normal = drawn(device, dtype, generator)
    return normal(2048, 384), normal(1536, 384), normal(1536)


def _hash_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for sample in _layer_samples(device, dtype, generator):
        yield *sample, 0, 0, 64
        yield *sample, 7, 0x1234_5678_9ABC_DEF0, 128


def _sign_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for x, W, _, neurons in _layer_samples(device, dtype, generator):
        z = x @ W.T
        yield z, neurons
        yield z.T.contiguous().T, neurons


def _with_keys(samples: Any) -> Any:
    def keyed(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
        for first, neurons in samples(device, dtype, generator):
            yield first, neurons, 3, 99, 64
            yield first, neurons, 0, -(2**63), 128

    return keyed


def _word_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for z, neurons in _sign_samples(device, dtype, generator):
        words = _pack(z > 0)
        if neurons is not None and neurons.dtype is torch.bool:
            neurons = neurons.nonzero().flatten()
        yield words, neurons


def _sure_bits(testing: Any, x: Tensor, W: Tensor, b: Tensor | None, neurons: Tensor | None) -> tuple[Tensor, Tensor]:
    """(bits by float64, where float32 must agree)."""
    score = testing.score_band(x, W, b)
    everything = torch.ones_like(score.exact, dtype=torch.bool)
    sure = (score.exact.abs() > score.band) | (score.band == 0) | ~score.exact.isfinite() | ((x == 0).all(1, keepdim=True) & (b is None))
    return _selected(score.exact > 0, neurons), sure | ~_selected(everything, neurons)


def _check_code(testing: Any, args: tuple[Any, ...], result: Tensor) -> float:
    bits, sure = _sure_bits(testing, *args)
    expected = _pack(bits)
    if result.shape != expected.shape or result.dtype != torch.int64:
        raise testing.Mismatch(f"expected {list(expected.shape)} int64, got {list(result.shape)} {result.dtype}")
    got = unpack_bits(result)
    if bool(got[:, bits.shape[1] :].any()):
        raise testing.Mismatch("bits beyond the last neuron must be 0")
    return testing.check_equal(bits | ~sure, got[:, : bits.shape[1]] | ~sure, "bits")


def _check_hash(testing: Any, args: tuple[Any, ...], result: Tensor) -> float:
    *layer, number, seed, bits = args
    active, sure = _sure_bits(testing, *layer)
    expected = _xor(active, number, seed, bits)
    if result.shape != expected.shape:
        raise testing.Mismatch(f"expected {list(expected.shape)}, got {list(result.shape)}")
    certain = sure.all(1)
    return testing.check_equal(expected[certain], result[certain], "hashes")


# ---------------------------------------------------------------- rows


def _fake_code(x: Tensor, size: int) -> Tensor:
    return x.new_empty((x.shape[0], (size + 63) // 64), dtype=torch.int64)


def _fake_hash(x: Tensor, bits: int) -> Tensor:
    return x.new_empty((x.shape[0],) if bits == 64 else (x.shape[0], 2), dtype=torch.int64)


SPLINE_CODE = Op(
    "spline_code(Tensor x, Tensor W, Tensor? b, Tensor? neurons, Tensor? packed=None) -> Tensor",
    spline_code_reference,
    fake=lambda x, W, *_: _fake_code(x, W.shape[0]),
    samples=_layer_samples,
    check=_check_code,
    workload=lambda *where: (*_layer(*where), None),
    batched=(0,),
)
SPLINE_HASH = Op(
    "spline_hash(Tensor x, Tensor W, Tensor? b, Tensor? neurons, int layer, int seed, int bits, Tensor? packed=None) -> Tensor",
    spline_hash_reference,
    fake=lambda x, W, b, neurons, layer, seed, bits, packed=None: _fake_hash(x, bits),
    samples=_hash_samples,
    check=_check_hash,
    workload=lambda *where: (*_layer(*where), None, 0, 0, 64),
    batched=(0,),
)
PACK_SIGNS = Op(
    "pack_signs(Tensor z, Tensor? neurons) -> Tensor",
    pack_signs_reference,
    fake=lambda z, neurons: _fake_code(z, z.shape[1]),
    samples=_sign_samples,
    check=lambda testing, args, result: testing.check_equal(pack_signs_reference(*args), result, "words"),
    workload=lambda *where: (_layer(*where)[0] @ _layer(*where)[1].T, None),
    batched=(0,),
)
HASH_SIGNS = Op(
    "hash_signs(Tensor z, Tensor? neurons, int layer, int seed, int bits) -> Tensor",
    hash_signs_reference,
    fake=lambda z, neurons, layer, seed, bits: _fake_hash(z, bits),
    samples=_with_keys(_sign_samples),
    check=lambda testing, args, result: testing.check_equal(hash_signs_reference(*args), result, "hashes"),
    workload=lambda *where: (_layer(*where)[0] @ _layer(*where)[1].T, None, 0, 0, 64),
    batched=(0,),
)
HASH_CODE = Op(
    "hash_code(Tensor words, Tensor? neurons, int layer, int seed, int bits) -> Tensor",
    hash_code_reference,
    fake=lambda words, neurons, layer, seed, bits: _fake_hash(words, bits),
    samples=_with_keys(_word_samples),
    check=lambda testing, args, result: testing.check_equal(hash_code_reference(*args), result, "hashes"),
    workload=lambda *where: (spline_code_reference(*_layer(*where), None), None, 0, 0, 64),
    batched=(0,),
    dtypes=(torch.float32,),
)
for _op in (PACK_SIGNS, HASH_SIGNS, HASH_CODE):
    _op.row("cpu", f"fastsae.native.spline:{_op.name}", f"fastsae.native.spline:refuses_{_op.name}")
    _op.row("cuda", f"fastsae.native.cuda:{_op.name}", f"fastsae.native.cuda:refuses_{_op.name}")
    _op.row("triton", f"fastsae.kernels.spline:{_op.name}", "fastsae.reference:triton_refuses")

for _op in (SPLINE_CODE, SPLINE_HASH):
    _op.row("cpu", f"fastsae.native.spline:{_op.name}", f"fastsae.native.spline:refuses_{_op.name}")
    _op.row("triton", f"fastsae.kernels.spline:{_op.name}", "fastsae.reference:triton_refuses_scores")

# ---------------------------------------------------------------- public


def checked_key(op: str, layer: Any, seed: Any, bits: Any = 64) -> tuple[int, int, int]:
    if type(checks.plain(bits)) is not int or bits not in (64, 128):
        raise ValueError(f"{op}: bits must be 64 or 128, got {bits!r}")
    return checks.integer(op, "layer", layer, 0, 2**32 - 1), checks.integer(op, "seed", seed, 0, 2**64 - 1), int(bits)


def _signed(seed: int) -> int:
    """A seed of 64 bits as the int64 that a torch schema carries."""
    return seed - 2**64 if seed >= 2**63 else seed


def _layer_inputs(op: str, x: Any, W: Any, b: Any, neurons: Any) -> tuple[Any, ...]:
    """Checks, casts under autocast and flattens: (batch shape, x [rows, D], W, b, neurons, a handle's words)."""
    batch, x, W, packed, (b,) = encoder_inputs(op, x, W, "W", "H", b=b)
    neurons = checks.subset(op, "neurons", neurons, W.shape[0], x, "H")
    return batch, x.detach(), W.detach(), None if b is None else b.detach(), neurons, packed


def _sign_inputs(op: str, z: Any, neurons: Any) -> tuple[Any, ...]:
    checks.tensor(op, "z", z, (*checks.FLOATS, torch.bool))
    if z.dim() == 0:
        raise ValueError(f"{op}: z must have shape [.., H], got []")
    neurons = checks.subset(op, "neurons", neurons, z.shape[-1], z, "H")
    return z.shape[:-1], z.detach().reshape(z.shape[:-1].numel(), z.shape[-1]), neurons


def spline_code(
    x: Tensor, W: Tensor | PackedWeights, b: Tensor | None = None, *, neurons: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Packed spline code of a layer: bit j is ``(x @ W.T + b)[j] > 0``.

    Args:
        x: inputs of the layer ``[.., D]``; float32, bfloat16, float16 or float64; any strides.
        W: ``[H, D]``, dtype of ``x``; any strides; or a handle of ``fastsae.pack``, which spares a GPU the rounding of the weights (on a
            CPU signs are screened in another number, so there it only stands for its weights). b: ``[H]``, dtype of ``x`` or float32.
        neurons: index or mask ``[H]`` of the neurons that take part; the bits of the others are 0.
        backend: see ``fastsae.use_backend``.

    Returns:
        ``[.., ceil(H / 64)]`` int64: bit ``j % 64`` of word ``j // 64``; bits beyond H are 0.

    The sign is that of the float32 score, bias last; 0, -0 and NaN give 0. A model that computes in bfloat16 may see other signs:
    for those use ``pack_signs`` on its own pre-activations. No gradient. Deterministic. Pre-activations are never stored beyond a
    few temporaries of at most 64 MiB each in the reference.

    Raises: TypeError: dtype or device. ValueError: shape. IndexError: ``neurons`` out of range.

    Source: Black et al. 2022, "Interpreting neural networks through the polytope lens" (arXiv 2211.12312).
    """
    batch, x, W, b, neurons, packed = _layer_inputs("spline_code", x, W, b, neurons)
    words = SPLINE_CODE(x, W, b, neurons, packed, backend=preference(backend))
    return words.reshape(*batch, words.shape[-1])


def spline_hash(
    x: Tensor,
    W: Tensor | PackedWeights,
    b: Tensor | None = None,
    *,
    layer: int = 0,
    seed: int = 0,
    bits: int = 64,
    neurons: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Hash of the spline code of a layer: the XOR of the keys of the active neurons. XOR the hashes of layers for a multi-layer code.

    Args:
        x, W, b, neurons, backend: as in ``spline_code``.
        layer: number of the layer, 0 .. 2^32 - 1, part of the key: give each layer its own.
        seed: 0 .. 2^64 - 1; record it with the hashes.
        bits: 64 or 128.

    Returns:
        ``[..]`` int64, or ``[.., 2]`` with ``bits=128``. Equals ``hash_code(spline_code(x, W, b), ...)``.

    Raises: as ``spline_code``; ValueError for layer, seed or bits.
    """
    layer, seed, bits = checked_key("spline_hash", layer, seed, bits)
    batch, x, W, b, neurons, packed = _layer_inputs("spline_hash", x, W, b, neurons)
    result = SPLINE_HASH(x, W, b, neurons, layer, _signed(seed), bits, packed, backend=preference(backend))
    return result.reshape((*batch, *result.shape[1:]))


def pack_signs(z: Tensor, *, neurons: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Packed code of pre-activations that a model has computed: bit j is ``z[.., j] > 0``.

    Args:
        z: ``[.., H]`` floating, or bool. neurons, backend: as in ``spline_code``.

    Returns:
        ``[.., ceil(H / 64)]`` int64 as in ``spline_code``. NaN gives 0. Raises: TypeError, ValueError, IndexError as there.
    """
    batch, z, neurons = _sign_inputs("pack_signs", z, neurons)
    words = PACK_SIGNS(z, neurons, backend=preference(backend))
    return words.reshape(*batch, words.shape[-1])


def hash_signs(
    z: Tensor, *, layer: int = 0, seed: int = 0, bits: int = 64, neurons: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Hash of pre-activations that a model has computed; equals ``hash_code(pack_signs(z), ...)``. Arguments as in ``spline_hash``."""
    layer, seed, bits = checked_key("hash_signs", layer, seed, bits)
    batch, z, neurons = _sign_inputs("hash_signs", z, neurons)
    result = HASH_SIGNS(z, neurons, layer, _signed(seed), bits, backend=preference(backend))
    return result.reshape((*batch, *result.shape[1:]))


def hash_code(
    words: Tensor, *, layer: int = 0, seed: int = 0, bits: int = 64, neurons: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Hash of packed codes: the same value as ``spline_hash`` and ``hash_signs`` give for the neurons behind the bits.

    Args:
        words: ``[.., w]`` int64 as ``spline_code`` and ``pack_signs`` return them.
        layer, seed, bits, backend: as in ``spline_hash``. neurons: index, or mask ``[64 w]``, of the bits that take part.

    Returns:
        ``[..]`` int64, or ``[.., 2]`` with ``bits=128``. Raises: TypeError, ValueError, IndexError as there.
    """
    op = "hash_code"
    layer, seed, bits = checked_key(op, layer, seed, bits)
    checks.tensor(op, "words", words, (torch.int64,))
    if words.dim() == 0:
        raise ValueError(f"{op}: words must have shape [.., w], got []")
    neurons = checks.subset(op, "neurons", neurons, words.shape[-1] * 64, words, "64 w")
    flat = words.reshape(words.shape[:-1].numel(), words.shape[-1])
    result = HASH_CODE(flat, neurons, layer, _signed(seed), bits, backend=preference(backend))
    return result.reshape((*words.shape[:-1], *result.shape[1:]))


def near_zero_counts(
    x: Tensor, W: Tensor | PackedWeights, b: Tensor | None = None, eps: float = 1e-5, *, neurons: Tensor | None = None
) -> Tensor:
    """Neurons of each row whose score is so near 0 that other arithmetic may give another sign, and with it another code.

    Args:
        x, W, b, neurons: as in ``spline_code``. eps: counted is ``|score| <= eps``, 0 or more; NaN is not.

    Returns:
        ``[..]`` int64. A row with 0 has the same code in any arithmetic whose scores err by less than ``eps``.

    In PyTorch on any device, in chunks of rows (a few temporaries of at most 64 MiB each). No gradient.

    Raises: as ``spline_code``; ValueError: ``eps`` negative or not finite.
    """
    op = "near_zero_counts"
    batch, x, weights, b, neurons, _ = _layer_inputs(op, x, W, b, neurons)
    eps = float(checks.number(op, "eps", eps, positive=False))
    if eps < 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")
    neurons = checks.neuron_mask(neurons, weights.shape[0])
    return torch.cat([_selected(z.abs() <= eps, neurons).sum(1) for z in _scores(x, weights, b)]).reshape(batch)


def combine_hashes(hashes: Iterable[Tensor]) -> Tensor:
    """The hash of several layers' codes together: the XOR of the layers' hashes, in any order.

    Args:
        hashes: at least one int64 tensor of one shape and device, of layers with different ``layer=`` numbers and the same seed. (Two equal
            numbers would give the same key to two neurons, and two equal layers would cancel.)

    Returns:
        Of the shape of each: ``combine_hashes([hash_signs(z0, layer=0), hash_signs(z1, layer=1)])`` names the region in which both layers
        keep their signs; a prefix of the layers names the coarser region. Raises: TypeError: dtype or device. ValueError: shapes, nothing.
    """
    op = "combine_hashes"
    if isinstance(hashes, Tensor) or not hasattr(hashes, "__iter__"):
        raise TypeError(f"{op}: hashes must be a list of tensors, got {type(hashes).__name__}")
    layers = list(hashes)
    if not layers:
        raise ValueError(f"{op}: hashes must hold at least one tensor, got none")
    total = checks.tensor(op, "hashes[0]", layers[0], (torch.int64,)).clone()
    for number, layer in enumerate(layers[1:], 1):
        checks.tensor(op, f"hashes[{number}]", layer, (torch.int64,), total)
        checks.shape(op, f"hashes[{number}]", layer, total.shape, f"{list(total.shape)} like hashes[0]")
        total ^= layer
    return total
