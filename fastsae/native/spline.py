"""The compiled spline codes, packed signs and their hashes; csrc/fastsae.h is the contract of every function."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae._core import checks
from fastsae.latents import ScoreInputs
from fastsae.native.encode import Arguments, score_refusal
from fastsae.native.hamming import code_rows, refuses_codes
from fastsae.native.loader import DTYPES, SUPPORTED, address, call, call_engine, expect

_SIGNS = {**DTYPES, torch.bool: 3}
_HASHED_AT_ONCE = 1 << 23  # words of codes that wait for their hash

refuses_spline_code = refuses_spline_hash = score_refusal("b", "neurons")


def refuses_pack_signs(z: Tensor, neurons: Tensor | None, *key: int) -> str | None:
    if z.dtype not in _SIGNS:
        return f"dtype {str(z.dtype)[6:]} ({SUPPORTED}, bool)"
    if z.numel() and z.shape[1] > 1 and z.stride(1) != 1:
        return f"z with strides {z.stride()} (supported: stride 1 along H)"
    return refuses_codes(z, neurons)


refuses_hash_signs = refuses_pack_signs


def refuses_hash_code(words: Tensor, neurons: Tensor | None, *key: int) -> str | None:
    return refuses_codes(words, neurons)


def _signs(z: Tensor) -> tuple[int, int, int, int, int]:
    """Address, type, rows, stride of a row, neurons."""
    if z.dim() != 2 or z.dtype not in _SIGNS or not z.is_cpu or (z.numel() and z.shape[1] > 1 and z.stride(1) != 1):
        raise ValueError(f"z: expected [rows, H] on cpu with stride 1 along H, got {list(z.shape)} {z.dtype} with strides {z.stride()}")
    return z.data_ptr(), _SIGNS[z.dtype], z.shape[0], z.stride(0), z.shape[1]


def _words(rows: int, neurons: int) -> Tensor:
    return torch.empty((rows, (neurons + 63) // 64), dtype=torch.int64, device="cpu")


def _hashes(rows: int, bits: int) -> Tensor:
    return torch.empty((rows,) if bits == 64 else (rows, 2), dtype=torch.int64, device="cpu")


def _key(layer: int, seed: int, bits: int) -> tuple[int, int, int]:
    return layer, seed & (2**64 - 1), bits


def pack_signs(z: Tensor, neurons: Tensor | None) -> Tensor:
    """[rows, ceil(H / 64)] int64: bit j % 64 of word j // 64 is z[row, j] > 0, and 0 where `neurons` leaves j out."""
    mask, words = checks.neuron_mask(neurons, z.shape[1]), _words(*z.shape)
    call("pack_signs", *_signs(z), address(mask), words.data_ptr())
    return words


def hash_signs(z: Tensor, neurons: Tensor | None, layer: int, seed: int, bits: int) -> Tensor:
    """[rows] int64, or [rows, 2] with 128 bits: the XOR of the keys of the neurons with z > 0 that take part."""
    mask, hashes = checks.neuron_mask(neurons, z.shape[1]), _hashes(z.shape[0], bits)
    call("hash_signs", *_signs(z), address(mask), _key(layer, seed, bits), hashes.data_ptr())
    return hashes


def hash_code(words: Tensor, neurons: Tensor | None, layer: int, seed: int, bits: int) -> Tensor:
    """The same from packed words [rows, w]; copied where the words of a code are not adjacent."""
    expect(torch.int64, words)
    mask = checks.neuron_mask(neurons, 64 * words.shape[1])
    (words, where), hashes = code_rows(words), _hashes(words.shape[0], bits)
    call("hash_code", *where, address(mask), _key(layer, seed, bits), hashes.data_ptr())
    return hashes


def spline_code(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    neurons: Tensor | None,
    packed: Tensor | None = None,
    *,
    path: str = "auto",
    stats: dict[str, int] | None = None,
) -> Tensor:
    """Packed signs of the scores x @ W.T + b, [rows, ceil(H / 64)] int64, without pre-activations.

    Args:
        x: [rows, D], any strides. W: [H, D], any strides; read in place. b: None, or [H]. neurons: None, an index or a mask.
        packed: not read: signs are screened in another number than the one `pack` writes.
        path, stats: as in ``call_engine``.
    """
    given, words = Arguments("spline_code", ScoreInputs(x, W, b)), _words(x.shape[0], W.shape[0])
    mask = checks.neuron_mask(neurons, W.shape[0])
    call_engine("spline_code", path, stats, *given.addresses, address(given.b), words.data_ptr())
    return words if mask is None else words.bitwise_and_(pack_signs(mask.unsqueeze(0), None))


def spline_hash(
    x: Tensor, W: Tensor, b: Tensor | None, neurons: Tensor | None, layer: int, seed: int, bits: int, packed: Tensor | None = None
) -> Tensor:
    """XOR of the keys of active neurons, [rows] int64 ([rows, 2] with 128 bits): codes of some rows at a time, hashed where they lie."""
    at_once = max(1024, _HASHED_AT_ONCE // max(1, (W.shape[0] + 63) // 64))
    if x.shape[0] <= at_once:
        return hash_code(spline_code(x, W, b, neurons), None, layer, seed, bits)
    return torch.cat([hash_code(spline_code(part, W, b, neurons), None, layer, seed, bits) for part in x.split(at_once)])
