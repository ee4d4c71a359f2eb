"""The tile engine: products of rows and features on the tensor cores, a proven interval around each, and the exact score itself.

A kernel here is a loop over tiles (``cells``) that forms the products of a tile (``products``) and hands them to its consumer before they
leave the registers: keep the best of each bucket, keep what exceeds a threshold, keep the sign. Two kinds of problems:

    direct     half-precision inputs, nothing subtracted: the product of a tile IS the score's sum. One chain of tensor-core steps in
               ascending order of d, the same steps in every tile shape of one chip, so a score's bits do not depend on the batch.
    screened   everything else (float32 inputs, or fl(x - b_pre)): operands are rounded to float16 and the product only screens. What it
               leaves undecided is scored by ``exact``: float32, in an order that the code fixes.

The exact product of a row and a feature sums blocks of 128 columns in order: lane[j] = fma over columns j, j+32, j+64, j+96, the 32 lanes
are added pairwise as a tree, block after block. It is elementwise code, so its bits do not depend on how a tile lies over threads.

A few columns in which a chunk's rows are far larger than in the others (massive activations) would set the error of all: they are 0 in the
rounded rows, and their products are added to the screened one in float32 (``screened``).

---- The bound of a screened product, and why it holds ----

x is a row (centred, float32, taken as it is), z the same row with its m <= 16 outlier columns set to 0, w a feature; u = 2^-24; norms are
Euclidean. T = <x, w>, r* = the exact product's float32 value, t~ = the tensor cores' <z, w>, r~ = the screened product, t~ and the m other
products. z^ = p fl16(z / p) with a power of two p a row (w^ likewise, a power a feature): the largest element of a row
becomes 2^13 .. 2^14 of float16's 65504, and what falls below float16's smallest normal number is set to 0, so that no tensor core sees
a denormal. Scaling is exact in float32, both ways, except where it underflows, which (5) counts.

(1) |r* - T| <= g |x||w| + d0, g = 1.01 (ceil(D/128) + 10) u: a chain of 4 fused steps in a lane, 5 levels of the tree, one addition a
    block. Cauchy-Schwarz turns sum |x_d w_d| into |x||w|; 1.01 covers 1 / (1 - k u).
(2) l(z) = |z^ - z|, each difference exact in float32 (both numbers are multiples of the last place of z, and the difference is small).
(3) |<z^, w^> - <z, w>| = |<z^ - z, w> + <z^, w^ - w>| <= l(z)|w| + (|z| + l(z)) l(w).
(4) |t~ - <z^, w^>| <= q |z^||w^|. A product of two float16 numbers has 22 bits and is exact. A tensor-core step takes a group of n
    products and the accumulator, aligns all to the largest of them keeping f fraction bits of it, drops the rest of each (an error
    below 2^-f of the largest), adds, and rounds or truncates the sum to float32 (below 2^-23 of the sum). The largest and the sum are
    at most S = sum |z^_d w^_d| <= |z^||w^|, and there are at most (D + 64) / n groups: q = s (D + 64) with
        s = 1.01 ((n + 1) 2^-f + 2^-23) / n.
    n >= 4 and f >= 23 on all such units since Volta, and s falls with both: 1.515 * 2^-23 holds for all, and for sums of float32
    arithmetic in any order. ``_SUMS`` has n and f of the chips where they were measured (Fasi, Higham, Mikaitis and Pranesh 2021,
    "Numerical behavior of NVIDIA tensor cores"; Khattak and Mikaitis 2025; Xie et al. 2025, "MMA-Sim").
(5) d0 and the underflow of r~ on its way back to the scale of x w: each step errs by at most 2^-126, gradual or flushed, and there are
    fewer than 4 D + 100 of them: U = (4 D + 128) 2^-126. Powers are kept within 2^-60 .. 2^46, so the first of the two never underflows.
(6) |z^| <= Z = |z| + l(z) and |w^| <= |w| + l(w). Each of the m fused steps that add the other products errs by u of its sum, which is at
    most V = 1.01 (Z (|w| + l(w)) + |x||w|): less than 2^-20 V in all (from D = 50,000 on, where q adds to 1.01, as m is at most 8). So
    |r* - r~| <= E with
        E = |w| (l(z) + q Z + g |x|)  +  l(w) (Z + q Z)  +  2^-20 V  +  U.
(7) Norms are computed in float32: a sum of squares of D terms errs by less than (D + 64) 2u relatively, its root by less than that, and
    an element below 2^-63 may vanish from it: the root is multiplied by 1 + (D + 72) 2u and sqrt(D) 2^-62 is added.
(8) The ends fl(r~ - e) and fl(r~ + e) must enclose r*. fl errs by u (|r~| + e) <= 2^-22 V: with (6) less than 2^-19 V / 1.01; the
    computed e = fma(a, |w|, fma(c, l(w), U)) and the factors err by a few u, covered by 1 + 2^-20:
        a = (l(z) + (q + 2^-19) Z + (g + 2^-19) |x|) (1 + 2^-20),      c = Z (1 + q + 2^-19) (1 + 2^-20).
(9) score = fl(fl(r* scale) + bias) and both steps are monotone (falling, if scale < 0), so the ends of the interval, taken through the
    same two steps, enclose the score. An upper end that is NaN or +inf says nothing and passes every test.
(10) A row or feature with a norm above 1e18 (or infinite, or NaN) gets an infinite interval and is always undecided. For all others
    no partial sum of r* or r~ exceeds 2^127: nothing overflows unseen.
"""

# pyright: basic, reportMissingImports=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportOptionalOperand=false

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae._core import triton_support
from fastsae._core.jit import kernel

_LANES = tl.constexpr(32)
_LANE_COLUMNS = tl.constexpr(4)
_PAD = 64  # rows of operands that are made for the tiles are padded to this many columns

# ---------------------------------------------------------------- device code: numbers


@triton.jit
def ordered(value):
    """float32 as int32 in the order of values: -0 == +0, NaN above +inf; -2^31 is below them all and stands for nothing."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(value != value, 0x7FFFFFFF, key)


@triton.jit
def unordered(key):
    """The float32 whose key this is."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def popcount(word):
    """Bits set in an int32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24) & 0xFF


@triton.jit
def pack_bits(bits, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Booleans [ROWS, 32 * WORDS] to int32 words [ROWS, WORDS]: bit j % 32 of word j // 32."""
    place = tl.arange(0, 32)[None, None, :]
    return tl.sum(tl.reshape(bits, (ROWS, WORDS, 32)).to(tl.int32) << place, axis=2)


@triton.jit
def unpack_bits(words, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """int32 words [ROWS, WORDS] to 0 or 1 in int32 [ROWS, 32 * WORDS]."""
    place = tl.arange(0, 32)[None, None, :]
    return tl.reshape((words[:, :, None] >> place) & 1, (ROWS, WORDS * 32))


# ---------------------------------------------------------------- device code: tiles


@triton.jit
def n_tiles(n_rows, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.cdiv(n_rows, ROWS) * tl.cdiv(n_columns, COLUMNS)


@triton.jit
def cells(tile, n_rows, n_columns, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(row tile, column tile, rows, columns) of the tile-th one, the last two in int64 and beyond the end in the last tiles. Groups of
    GROUP row tiles share their features in L2."""
    in_group = GROUP * tl.cdiv(n_columns, COLUMNS)
    group = tile // in_group
    height = tl.minimum(tl.cdiv(n_rows, ROWS) - group * GROUP, GROUP)
    within = tile % in_group
    row_tile, column_tile = group * GROUP + within % height, within // height
    rows = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row_tile, column_tile, rows, column_tile.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def products(
    x, W, chosen, first, rows, columns, n_rows, n_columns, D, x_r, x_d, W_f, W_d,
    CHOSEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """(products [ROWS, COLUMNS] in float32, their rows, their rows of W): one chain of tensor-core steps in ascending d, of which there are
    a multiple of DEPTH. A row beyond the end stands for the last one; a column there is masked, as a clamped one would not lie beside its
    neighbours."""
    row, column, inside = tl.minimum(rows, n_rows - 1), columns, columns < n_columns
    if CHOSEN:
        column = tl.load(chosen + first + columns, mask=inside, other=0)
    d = tl.arange(0, DEPTH)
    x_at = (x + row * x_r)[:, None] + d.to(tl.int64)[None, :] * x_d
    W_at = (W + column * W_f)[None, :] + d.to(tl.int64)[:, None] * W_d
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(0, D, DEPTH):
        total = tl.dot(tl.load(x_at), tl.load(W_at, mask=inside[None, :], other=0), total)
        x_at += tl.cast(x_d, tl.int64) * DEPTH
        W_at += tl.cast(W_d, tl.int64) * DEPTH
    return total, row, column


@triton.jit
def halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right columns of a tile."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def affine(value, scale, bias, f, inside, SCALED: tl.constexpr, BIASED: tl.constexpr):
    """fl(fl(value * scale) + bias) for columns ``f``."""
    if SCALED:
        value = value * tl.load(scale + f, mask=inside, other=0)[None, :]
    if BIASED:
        value = value + tl.load(bias + f, mask=inside, other=0)[None, :]
    return value


@triton.jit
def screened(total, x_factors, W_factors, x_far, W_far, n_far, rows, n_rows, f, n, inside):
    """r~ of a tile whose accumulator is ``total``; the last arguments say where its rows and features stand in the factors."""
    back = tl.load(x_factors + 2 * n_rows + rows)[:, None]
    r = total * back * tl.load(W_factors + 2 * n + f, mask=inside, other=0)[None, :]
    if n_far is not None:
        x_at, W_at = x_far + rows, W_far + f
        for _ in range(tl.load(n_far)):
            left, right = tl.load(x_at)[:, None], tl.load(W_at, mask=inside, other=0)[None, :]
            r = tl.fma(tl.broadcast_to(left, r.shape), tl.broadcast_to(right, r.shape), r)
            x_at += n_rows
            W_at += n
    return r


@triton.jit
def half_widths(x_factors, W_factors, rows, n_rows, f, n, inside, D):
    """e of a tile."""
    a = tl.load(x_factors + rows)[:, None]
    c = tl.load(x_factors + n_rows + rows)[:, None]
    norm = tl.load(W_factors + f, mask=inside, other=0)[None, :]
    loss = tl.load(W_factors + n + f, mask=inside, other=0)[None, :]
    floor = (4.0 * D + 128.0) * 1.1754943508222875e-38
    return a * norm + (c * loss + floor)


@triton.jit
def ends(r, x_factors, W_factors, scale, bias, rows, n_rows, f, n, inside, D, SCALED: tl.constexpr, BIASED: tl.constexpr):
    """(lower, upper) of the scores of a tile of screened products, (9)."""
    e = half_widths(x_factors, W_factors, rows, n_rows, f, n, inside, D)
    if SCALED:
        e = tl.where((tl.load(scale + f, mask=inside, other=0) < 0)[None, :], -e, e)
    return affine(r - e, scale, bias, f, inside, SCALED, BIASED), affine(r + e, scale, bias, f, inside, SCALED, BIASED)


@triton.jit
def upper_key(upper):
    """The key of an upper end; NaN and +inf pass every test."""
    return tl.where(upper < float("inf"), ordered(upper), 0x7FFFFFFF)


@triton.jit
def _sum_lanes(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS, 32] -> [ROWS, COLUMNS]: neighbours are added, five times."""
    for level in tl.static_range(5):
        left, right = tl.split(tl.reshape(x, (ROWS, COLUMNS, 16 >> level, 2)))
        x = left + right
    return tl.reshape(x, (ROWS, COLUMNS))


@triton.jit
def exact(x, W, centre, D, x_d, W_d, mask, CENTRED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS]: the exact products of rows at ``x`` and features at ``W`` (pointers to first elements); 0 where not ``mask``."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(0, D, _LANES * _LANE_COLUMNS):
        lanes = tl.zeros((ROWS, COLUMNS, _LANES), tl.float32)
        for part in tl.static_range(_LANE_COLUMNS):
            d = tl.cast(block, tl.int64) + part * _LANES + tl.arange(0, _LANES)
            inside = d < D
            left = tl.load(x[:, None] + (d * x_d)[None, :], mask=inside[None, :], other=0).to(tl.float32)
            if CENTRED:
                left = left - tl.load(centre + d, mask=inside, other=0)[None, :]
            here = mask[:, :, None] & inside[None, None, :]
            right = tl.load(W[:, :, None] + (d * W_d)[None, None, :], mask=here, other=0).to(tl.float32)
            left = tl.broadcast_to(left[:, None, :], (ROWS, COLUMNS, _LANES))
            lanes = tl.fma(left, tl.broadcast_to(right, (ROWS, COLUMNS, _LANES)), lanes)
        total += _sum_lanes(lanes, ROWS, COLUMNS)
    return total


# ---------------------------------------------------------------- device code: rounded operands


@kernel(do_not_specialize=["first", "n", "n_factors"])
def round_kernel(
    v, chosen, centre, far, rounded, factors, first, n, n_factors, D, s, pitch, v_r, v_d,
    CHOSEN: tl.constexpr, CENTRED: tl.constexpr, FACTORS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + n of v in float16 [n, pitch], padded with zeros and 0 in the columns of ``far``, and three numbers a row in
    ``factors [3, n_factors]``: with FACTORS a and c of (8), otherwise the norm and the loss; then the power that scales back."""
    local = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = local < n
    row = first + local
    if CHOSEN:
        row = tl.load(chosen + row, mask=live, other=0)
    at = v + row * v_r
    largest = tl.zeros((ROWS,), tl.float32)
    for block in range(0, D, COLUMNS):
        d = tl.cast(block, tl.int64) + tl.arange(0, COLUMNS)
        value = tl.load(at[:, None] + (d * v_d)[None, :], mask=live[:, None] & (d < D)[None, :], other=0).to(tl.float32)
        if CENTRED:
            value = value - tl.load(centre + d, mask=d < D, other=0)[None, :]
            value = tl.where((d < D)[None, :], value, 0.0)
        size = tl.abs(value)
        if far is not None:
            size = tl.where(tl.load(far + d, mask=d < D, other=0)[None, :] != 0, 0.0, size)
        largest = tl.maximum(largest, tl.max(tl.where(size < 3e38, size, 3e38), axis=1))
    exponent = tl.minimum(tl.maximum(140 - (largest.to(tl.int32, bitcast=True) >> 23), -46), 60)
    forth, back = power_of_two(exponent), power_of_two(-exponent)
    squares = tl.zeros((ROWS,), tl.float32)
    near = tl.zeros((ROWS,), tl.float32)  # squares of z
    losses = tl.zeros((ROWS,), tl.float32)
    for block in range(0, pitch, COLUMNS):
        d = tl.cast(block, tl.int64) + tl.arange(0, COLUMNS)
        value = tl.load(at[:, None] + (d * v_d)[None, :], mask=live[:, None] & (d < D)[None, :], other=0).to(tl.float32)
        if CENTRED:
            value = value - tl.load(centre + d, mask=d < D, other=0)[None, :]
            value = tl.where((d < D)[None, :], value, 0.0)
        squares += tl.sum(value * value, axis=1)
        if far is not None:
            value = tl.where(tl.load(far + d, mask=d < D, other=0)[None, :] != 0, 0.0, value)
            near += tl.sum(value * value, axis=1)
        half = (value * forth[:, None]).to(tl.float16)
        half = tl.where(tl.abs(half) < 6.103515625e-05, tl.zeros_like(half), half)
        tl.store(rounded + (local * pitch)[:, None] + d[None, :], half, mask=live[:, None] & (d < pitch)[None, :])
        lost = half.to(tl.float32) * back[:, None] - value
        losses += tl.sum(lost * lost, axis=1)
    width = tl.cast(D, tl.float32)
    relative = 1.0 + (width + 72.0) * 1.1920928955078125e-07
    absolute = tl.sqrt_rn(width) * 2.168404344971009e-19
    # Not <= catches NaN.
    norm = tl.where(squares <= 1e36, tl.sqrt_rn(squares) * relative + absolute, float("inf"))
    loss = tl.where(squares <= 1e36, tl.sqrt_rn(losses) * relative + absolute, float("inf"))
    if FACTORS:
        g = 1.01 * (tl.cast((D + 127) // 128, tl.float32) + 10.0) * 5.9604644775390625e-08
        q = s * (width + 64.0)
        reach = norm + loss
        if far is not None:
            reach = tl.sqrt_rn(near) * relative + absolute + loss
        norm_factor = (loss + (q + 1.9073486328125e-06) * reach + (g + 1.9073486328125e-06) * norm) * 1.00000095367431640625
        loss_factor = reach * (1.0 + q + 1.9073486328125e-06) * 1.00000095367431640625
        norm, loss = norm_factor, loss_factor
    tl.store(factors + first + local, norm, mask=live)
    tl.store(factors + tl.cast(n_factors, tl.int64) + first + local, loss, mask=live)
    tl.store(factors + 2 * tl.cast(n_factors, tl.int64) + first + local, back, mask=live)


# ---------------------------------------------------------------- launchers


@dataclass(frozen=True)
class Tile:
    """The shape of a tile of products, and how it is launched: fixed for a chip, so the bits of a direct score depend on the chip only.
    Masks need a multiple of 64 columns, as a row's words come in pairs, and at least 32 of them in a part."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8
    registers: int | None = None  # of a thread, at most; None leaves it to the compiler
    parts: int = 1  # that the masks take a tile's columns in, one after the other

    @property
    def options(self) -> dict[str, int | bool]:
        """Launch options; without fusion, so that a score rounds where the code says."""
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}
        return options if self.registers is None else {**options, "maxnreg": self.registers}


# By capability: the largest that fits its shared memory (99 KiB on 8.6, 8.9 and 12.0) without spilling in any consumer.
_TILES = {
    (8, 0): Tile(128, 128, 64, 8, 3),
    (8, 6): Tile(128, 128, 32, 8, 3),
    (9, 0): Tile(128, 128, 64, 8, 4),
    # Tensor memory gives a thread one row of 64 columns, and numbers of so many columns do not fit its registers at once. Told nothing,
    # ptxas halves the registers, too, to fit two programs.
    (10, 0): Tile(128, 128, 64, 8, 4, registers=255, parts=4),
    (12, 0): Tile(128, 128, 32, 8, 3),
}
_INTERPRETED = Tile(32, 64, 64, 8, 1)
# n and f of (4), by capability. Another chip, and the interpreter, has the least.
_SUMS = {(8, 0): (8, 24), (8, 9): (8, 24), (9, 0): (16, 25), (10, 0): (16, 25), (12, 0): (16, 25)}
_INTERPRETED_SUMS = 4, 23
_PROGRAMS = 2  # of a persistent launch, a multiprocessor


@cache
def _chip(index: int) -> tuple[tuple[int, int], int]:
    """(capability, multiprocessors) of a device; asking torch every time costs as much as a launch."""
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


def chip(device: torch.device) -> tuple[tuple[int, int], int]:
    return _chip(torch.cuda.current_device() if device.index is None else device.index)


def tile_for(device: torch.device) -> Tile:
    if device.type == "cpu":
        return _INTERPRETED
    have = chip(device)[0]
    return _TILES[max((known for known in _TILES if known <= have), default=(8, 0))]


def slip(device: torch.device) -> float:
    """s of (4)."""
    n, f = _INTERPRETED_SUMS if device.type == "cpu" else _SUMS.get(chip(device)[0], (4, 23))
    return 1.01 * ((n + 1) * 2.0**-f + 2.0**-23) / n


def programs(device: torch.device, n_tiles: int) -> int:
    """How many programs walk over ``n_tiles`` tiles."""
    if device.type == "cpu":
        return min(n_tiles, 4)
    return min(n_tiles, _PROGRAMS * chip(device)[1])


def on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def interpreting() -> bool:
    return triton_support.interpreting()


def wide(vector: Tensor | None) -> Tensor | None:
    """A vector as the kernels read it: float32, contiguous."""
    return None if vector is None else vector.to(torch.float32).contiguous()


def pitch(D: int) -> int:
    return max(1, triton.cdiv(D, _PAD)) * _PAD


def round_rows(
    v: Tensor, rows: slice, rounded: Tensor, factors: Tensor, chosen: Tensor | None, centre: Tensor | None, *, of_rows: bool,
    far: Tensor | None = None,
) -> None:  # fmt: skip
    """Rounds ``rows`` of v [., D] into rounded [rows, pitch], without the columns ``far`` [D], and writes their numbers into the same
    columns of factors [3, .]."""
    n = rows.stop - rows.start
    along = v.stride(0) == 1 and v.stride(1) != 1
    size, columns = (32, 64) if along else (4, 256)  # rows read together where they lie side by side
    if interpreting():
        size, columns = 64, 64 * triton.cdiv(rounded.shape[1], 64)
        columns = min(triton.next_power_of_2(columns), 1024)
    round_kernel[(triton.cdiv(n, size),)](
        v, chosen, centre, far, rounded, factors,
        rows.start, n, factors.shape[1], v.shape[1], slip(v.device), rounded.shape[1], v.stride(0), v.stride(1),
        CHOSEN=chosen is not None, CENTRED=centre is not None, FACTORS=of_rows, ROWS=size, COLUMNS=columns, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
