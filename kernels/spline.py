"""Spline codes on a GPU: the sign of every pre-activation as a bit, and the XOR of the keys of active neurons.

    spline_code    tiles of scores to sign bits (``_masks``); what a screened interval cannot decide is scored exactly
    pack_signs     the same bits from pre-activations in memory
    hash           bits of 64 neurons at a time against their keys, XORed place by place, then as a tree: integers, so in any order

Keys are Philox4x32-10 outputs for counter (neuron, layer, 0, 0) and key (seed low word, seed high word), made once a call.
Bytes of a hash: the bits and 8 or 16 bytes a row; of a code: those of the operands and one bit a score.
"""

# pyright: basic, reportMissingImports=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportOptionalOperand=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae._core import flags
from fastsae._core.jit import kernel
from fastsae.kernels import _masks, _tile
from fastsae.kernels._masks import Rule
from fastsae.kernels._problem import chunks, problem, steps
from fastsae.kernels._tile import pack_bits, unpack_bits
from fastsae.latents import ScoreInputs

# ---------------------------------------------------------------- device code


@kernel(do_not_specialize=["n_rows", "n", "n_words"])
def sign_kernel(z, words, n_rows, n, n_words, z_r, z_c, ROWS: tl.constexpr, WORDS: tl.constexpr):
    n_parts = tl.cdiv(n_words, WORDS)
    rows = (tl.program_id(0) // n_parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = (tl.program_id(0) % n_parts).to(tl.int64) * WORDS
    column = first * 32 + tl.arange(0, 32 * WORDS)
    live = rows < n_rows
    value = tl.load(z + (rows * z_r)[:, None] + (column * z_c)[None, :], mask=live[:, None] & (column < n)[None, :], other=0)
    word = first + tl.arange(0, WORDS)
    tl.store(
        words + (rows * n_words)[:, None] + word[None, :], pack_bits(value > 0, ROWS, WORDS), mask=live[:, None] & (word < n_words)[None, :]
    )


@kernel(do_not_specialize=["n", "layer", "seed"])
def key_kernel(keys, n, layer, seed, SIZE: tl.constexpr):
    """keys [n, 2]: two int64 of each neuron."""
    neuron = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    zero = tl.zeros((SIZE,), tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, neuron.to(tl.uint32), zero + tl.cast(layer, tl.uint32), zero, zero, 10)
    at = keys + neuron.to(tl.int64) * 2
    tl.store(at, w0.to(tl.int64) | (w1.to(tl.int64) << 32), mask=neuron < n)
    tl.store(at + 1, w2.to(tl.int64) | (w3.to(tl.int64) << 32), mask=neuron < n)


@triton.jit
def _xor(x, ROWS: tl.constexpr):
    """[ROWS, 64] -> [ROWS]."""
    for level in tl.static_range(6):
        left, right = tl.split(tl.reshape(x, (ROWS, 32 >> level, 2)))
        x = left ^ right
    return tl.reshape(x, (ROWS,))


@kernel(do_not_specialize=["n_rows", "n_words"])
def hash_kernel(words, keys, out, n_rows, n_words, PARTS: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < n_rows
    first = tl.zeros((ROWS, 64), tl.int64)  # of the neurons at each place of the words
    second = tl.zeros((ROWS, 64), tl.int64)
    for word in range(0, n_words, 2):
        at = (rows * n_words)[:, None] + (word + tl.arange(0, 2))[None, :]
        chosen = (-unpack_bits(tl.load(words + at, mask=live[:, None], other=0), ROWS, 2)).to(tl.int64)  # all bits or none
        key = keys + (word * 32 + tl.arange(0, 64)).to(tl.int64) * 2
        first = first ^ (chosen & tl.load(key)[None, :])
        if PARTS == 2:
            second = second ^ (chosen & tl.load(key + 1)[None, :])
    tl.store(out + rows * PARTS, _xor(first, ROWS), mask=live)
    if PARTS == 2:
        tl.store(out + rows * PARTS + 1, _xor(second, ROWS), mask=live)


# ---------------------------------------------------------------- launchers


def spline_code(x: Tensor, W: Tensor, b: Tensor | None, neurons: Tensor | None, packed: Tensor | None = None) -> Tensor:
    """[rows, ceil(H / 64)] int64: bit j % 64 of word j // 64 is the sign of neuron j's score."""
    return _code(x, W, b, neurons, packed).view(torch.int64)


def spline_hash(
    x: Tensor, W: Tensor, b: Tensor | None, neurons: Tensor | None, layer: int, seed: int, bits: int, packed: Tensor | None = None
) -> Tensor:
    """[rows] int64, or [rows, 2] for 128 bits: XOR of the keys of active neurons."""
    return _hash(_code(x, W, b, neurons, packed), layer, seed, bits)


def pack_signs(z: Tensor, neurons: Tensor | None) -> Tensor:
    return _signs(z, neurons).view(torch.int64)


def hash_signs(z: Tensor, neurons: Tensor | None, layer: int, seed: int, bits: int) -> Tensor:
    return _hash(_signs(z, neurons), layer, seed, bits)


def hash_code(words: Tensor, neurons: Tensor | None, layer: int, seed: int, bits: int) -> Tensor:
    halves = words.new_empty((words.shape[0], 2 * words.shape[1]), dtype=torch.int32)
    halves.view(torch.int64).copy_(words)
    with _tile.on(words.device):
        return _hash(_restrict(halves, neurons, words.shape[1] * 64), layer, seed, bits)


def _code(x: Tensor, W: Tensor, b: Tensor | None, neurons: Tensor | None, packed: Tensor | None) -> Tensor:
    p = problem(ScoreInputs(x, W, b, packed=packed))
    words = torch.empty((x.shape[0], _masks.n_words(p.n)), dtype=torch.int32, device=x.device)
    with _tile.on(x.device):
        parts = (
            [slice(0, x.shape[0])]
            if p.direct and steps(p.x, turned=False)
            else chunks(x.shape[0], 8 * words.shape[1] + p.row_bytes, p.tile.rows, 1 << 16)
        )
        for part in parts if words.numel() else ():
            _masks.masks(p.rows(part), Rule(_masks.SIGN), words[part])
        return _restrict(words, neurons, p.n)


def _signs(z: Tensor, neurons: Tensor | None) -> Tensor:
    with _tile.on(z.device):
        return _restrict(_pack(z), neurons, z.shape[1])


def _pack(z: Tensor) -> Tensor:
    rows, n = z.shape
    words = torch.empty((rows, _masks.n_words(n)), dtype=torch.int32, device=z.device)
    if words.numel():
        ROWS, WORDS = min(8, triton.next_power_of_2(rows)), min(8, triton.next_power_of_2(words.shape[1]))
        grid = triton.cdiv(rows, ROWS) * triton.cdiv(words.shape[1], WORDS)
        sign_kernel[(grid,)](z, words, rows, n, words.shape[1], *z.stride(), ROWS=ROWS, WORDS=WORDS, num_warps=4, enable_fp_fusion=False)
    return words


def _restrict(words: Tensor, neurons: Tensor | None, size: int) -> Tensor:
    """The bits of the chosen neurons. A bad index raises on the CPU and sets the device's flag elsewhere."""
    if neurons is None:
        return words
    mask = neurons
    if neurons.dtype is not torch.bool:
        bad = (neurons < 0) | (neurons >= size)
        if neurons.device.type == "cpu":
            if bool(bad.any()):
                raise IndexError(f"neurons must hold indices 0 <= index < {size}, got {int(neurons.min())} .. {int(neurons.max())}")
        else:
            flags.flag(neurons.device).logical_or_(bad.any())
        mask = torch.zeros(size + 1, dtype=torch.bool, device=neurons.device)
        mask = mask.index_fill_(0, neurons.long().masked_fill(bad, size), True)[:size]
    return words & _pack(mask.to(torch.float32)[None])


def _hash(words: Tensor, layer: int, seed: int, bits: int) -> Tensor:
    (rows, n_words), parts, device = words.shape, bits // 64, words.device
    out = torch.zeros((rows, parts), dtype=torch.int64, device=device)
    if words.numel():
        with _tile.on(device):
            n = 32 * n_words
            keys = torch.empty((n, 2), dtype=torch.int64, device=device)
            size = min(256, triton.next_power_of_2(n))
            key_kernel[(triton.cdiv(n, size),)](keys, n, layer, seed, SIZE=size, num_warps=4, enable_fp_fusion=False)
            ROWS = min(256, triton.next_power_of_2(rows)) if _tile.interpreting() else 16
            hash_kernel[(triton.cdiv(rows, ROWS),)](
                words, keys, out, rows, n_words, PARTS=parts, ROWS=ROWS, num_warps=4, enable_fp_fusion=False
            )
    return out[:, 0] if parts == 1 else out
