"""What is kept of every score, one bit a score: signs, thresholds, gates. The masks are the only thing that a pass over the scores leaves.

    mask_kernel     tiles of scores to bits. A direct score decides; a screened one leaves a bit for what its interval cannot decide
    refine_kernel   the set bits of a row, ``_GATHER`` features at a time, scored exactly: decides, or writes what was kept
    write_kernel    the tiles of direct scores again, for the values: where a value goes is the number of bits before its own

Bits are int32 words [rows, 2 * ceil(n / 64)], bit f % 32 of word f // 32. Everything has its place by counting, so nothing depends on
what runs first, and there is no buffer that a row could overrun.
"""

# pyright: basic, reportMissingImports=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportOptionalOperand=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae._core.jit import kernel
from fastsae.kernels import _tile
from fastsae.kernels._problem import Operands, Problem
from fastsae.kernels._tile import affine, cells, ends, exact, half_widths, halves, n_tiles, pack_bits, popcount, products, screened

SIGN, THRESHOLD, GATED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_GATHER = 4  # features that a program, one warp, scores exactly at a time
_WORDS = 128  # of a program that walks over set bits, of which there are few

# ---------------------------------------------------------------- device code


@triton.jit
def _decide(
    total, scale, bias, theta, half, f, inside,
    KIND: tl.constexpr, BAND: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """(kept, in the band, value) of products [.., columns ``f``]. GATED: ``bias`` is the gate's, ``theta`` the magnitude's."""
    if KIND == GATED:
        gate = affine(total, scale, bias, f, inside, False, True)
        value = affine(total, scale, theta, f, inside, True, True)
        kept = ((gate <= 0) == 0) & ((value <= 0) == 0)
        value = tl.where(gate != gate, gate, value)
        band = kept
    else:
        value = affine(total, scale, bias, f, inside, SCALED, BIASED)
        if KIND == SIGN:
            kept = value > 0
            band = kept
        else:
            limit = tl.load(theta + f, mask=inside, other=0)[None, :]
            kept = (value > tl.where(limit < 0, 0.0, limit)) | (value != value)
            band = kept
            if BAND:
                band = tl.abs(value - limit) < half
                value = tl.where(kept, value, 0.0)
    return kept, band, value


@triton.jit
def _above(upper, limit):
    """Whether an upper end leaves it open that the score exceeds the limit."""
    return ((upper < float("inf")) & (upper <= limit)) == 0


@triton.jit
def _store_part(
    total, x_factors, W_factors, scale, bias, theta, kept_words, other_words, rows, row, start, first, n_rows, n_panel, n, n_words, half, D,
    KIND: tl.constexpr, BAND: tl.constexpr, SCREENED: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, TWO: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The bits of products, or screened ones, [ROWS, COLUMNS] of the panel's columns ``start`` and up."""
    local = start + tl.arange(0, COLUMNS)
    inside, f = local < n_panel, first + local
    if SCREENED:
        if KIND == GATED:
            e = half_widths(x_factors, W_factors, row, n_rows, f, n, inside, D)
            kept = _above(affine(total + e, scale, bias, f, inside, False, True), 0.0)
            kept = kept & _above(affine(total + e, scale, theta, f, inside, True, True), 0.0)
            other = kept
        else:
            low, high = ends(total, x_factors, W_factors, scale, bias, row, n_rows, f, n, inside, D, SCALED, BIASED)
            if KIND == SIGN:
                kept = low > 0
                other = _above(high, 0.0) & (kept == 0)
            else:
                limit = tl.load(theta + f, mask=inside, other=0)[None, :]
                kept = _above(high, tl.where(limit < 0, 0.0, limit))
                if BAND:
                    # Slightly below the band: its own ends round.
                    kept = kept | _above(high, limit - half - (tl.abs(limit) + half) * 9.5367431640625e-07)
                other = kept
    else:
        kept, other, _ = _decide(total, scale, bias, theta, half, f, inside, KIND, BAND, SCALED, BIASED)
    word = (first + start) // 32 + tl.arange(0, COLUMNS // 32)
    to = (rows * n_words)[:, None] + word[None, :]
    mask = (rows < n_rows)[:, None] & (word < n_words)[None, :]
    tl.store(kept_words + to, pack_bits(kept & inside[None, :], ROWS, COLUMNS // 32), mask=mask)
    if TWO:
        tl.store(other_words + to, pack_bits(other & inside[None, :], ROWS, COLUMNS // 32), mask=mask)


@triton.jit
def _store_bits(
    total, x_factors, W_factors, scale, bias, theta, kept_words, other_words, rows, row, start, first, n_rows, n_panel, n, n_words, half, D,
    KIND: tl.constexpr, BAND: tl.constexpr, SCREENED: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, TWO: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """As ``_store_part``, in PARTS of a tile one after the other: 1 or 4."""
    if PARTS == 1:
        _store_part(
            total, x_factors, W_factors, scale, bias, theta, kept_words, other_words, rows, row, start, first, n_rows, n_panel, n, n_words,
            half, D, KIND, BAND, SCREENED, SCALED, BIASED, TWO, ROWS, COLUMNS,
        )  # fmt: skip
    else:
        left, right = halves(total, ROWS, COLUMNS)
        for side in tl.static_range(2):
            near, far = halves(left if side == 0 else right, ROWS, COLUMNS // 2)
            for part in tl.static_range(2):
                _store_part(
                    near if part == 0 else far, x_factors, W_factors, scale, bias, theta, kept_words, other_words, rows, row,
                    start + (2 * side + part) * (COLUMNS // 4), first, n_rows, n_panel, n, n_words, half, D,
                    KIND, BAND, SCREENED, SCALED, BIASED, TWO, ROWS, COLUMNS // 4,
                )  # fmt: skip


@kernel(do_not_specialize=["first", "n_rows", "n", "n_words", "half"])
def mask_kernel(
    x, W, chosen, x_factors, W_factors, x_far, W_far, n_far, scale, bias, theta, kept_words, other_words,
    first, n_rows, n_panel, n, n_words, half, D, x_r, x_d, W_f, W_d,
    KIND: tl.constexpr, BAND: tl.constexpr, SCREENED: tl.constexpr, CHOSEN: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
    TWO: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Direct: kept bits, and with BAND those in the band. Screened: bits that may be kept; SIGN: sure ones, and undecided ones."""
    for tile in range(tl.program_id(0), n_tiles(n_rows, n_panel, ROWS, COLUMNS), tl.num_programs(0)):
        _row_tile, column_tile, rows, local = cells(tile, n_rows, n_panel, GROUP, ROWS, COLUMNS)
        total, row, _column = products(
            x, W, chosen, first, rows, local, n_rows, n_panel, D, x_r, x_d, W_f, W_d, CHOSEN, ROWS, COLUMNS, DEPTH
        )
        if SCREENED:
            f, inside = first + local, local < n_panel
            total = screened(total, x_factors, W_factors, x_far, W_far, n_far, row, n_rows, f, n, inside)
        _store_bits(
            total, x_factors, W_factors, scale, bias, theta, kept_words, other_words, rows, row, column_tile.to(tl.int64) * COLUMNS, first,
            n_rows, n_panel, n, n_words, half, D, KIND, BAND, SCREENED, SCALED, BIASED, TWO, ROWS, COLUMNS, PARTS,
        )  # fmt: skip


@kernel(do_not_specialize=["n_rows", "n_words", "half"])
def refine_kernel(
    x, W, chosen, centre, scale, bias, theta, kept_words, other_words, offsets, base, values, col, flags,
    n_rows, n_words, half, D, x_r, x_d, W_f, W_d,
    KIND: tl.constexpr, BAND: tl.constexpr, WRITE: tl.constexpr, CHOSEN: tl.constexpr, CENTRED: tl.constexpr, SCALED: tl.constexpr,
    BIASED: tl.constexpr, WORDS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Exact scores of the set bits of one row and WORDS words. Decides: SIGN the undecided bits, otherwise the bits that may be kept.
    WRITE: value, column and flag of every bit, in order from the offset of the first word."""
    # One dimension, as a grid's second ends at 65535; rows first, as they share their features.
    row = (tl.program_id(0) % n_rows).to(tl.int64)
    first_word = (tl.program_id(0) // n_rows).to(tl.int64) * WORDS
    word = first_word + tl.arange(0, WORDS)
    at = row * n_words + word
    there = word < n_words
    kept = tl.load(kept_words + at, mask=there, other=0)
    open_words = kept
    if BAND and WRITE:
        open_words = kept | tl.load(other_words + at, mask=there, other=0)
    if KIND == SIGN:
        open_words = tl.load(other_words + at, mask=there, other=0)
    bits = popcount(open_words)
    after = tl.cumsum(bits, axis=0)  # bits up to the end of each word
    count = tl.sum(bits, axis=0)
    bit = tl.arange(0, 32)[None, :]
    new = tl.zeros((WORDS,), tl.int32)
    band_new = tl.zeros((WORDS,), tl.int32)
    for start in range(0, count, COLUMNS):
        wanted = start + tl.arange(0, COLUMNS)
        of_word = tl.sum((after[None, :] <= wanted[:, None]).to(tl.int32), axis=1)
        hit = of_word[:, None] == tl.arange(0, WORDS)[None, :]
        mine = tl.sum(tl.where(hit, open_words[None, :], 0), axis=1)[:, None]
        number = wanted - tl.sum(tl.where(hit, (after - bits)[None, :], 0), axis=1)  # of the wanted bit in its word
        is_it = (((mine >> bit) & 1) != 0) & (popcount(mine & ((1 << bit) - 1)) == number[:, None])
        place = tl.sum(tl.where(is_it, bit, 0), axis=1)
        f = (first_word + of_word) * 32 + place
        inside = wanted < count
        here = 1 << place
        column = f
        if CHOSEN:
            column = tl.load(chosen + f, mask=inside, other=0)
        x_at = x + (row * x_r + tl.zeros((1,), tl.int64))
        total = exact(x_at, (W + column * W_f)[None, :], centre, D, x_d, W_d, inside[None, :], CENTRED, 1, COLUMNS)
        decided, banded, value = _decide(total, scale, bias, theta, half, f, inside, KIND, BAND, SCALED, BIASED)
        decided = tl.reshape(decided.to(tl.int32), (COLUMNS,))
        banded = tl.reshape(banded.to(tl.int32), (COLUMNS,))
        if WRITE:
            to = tl.load(base) + tl.load(offsets + row * n_words + first_word) + wanted
            tl.store(values + to, tl.reshape(value, (COLUMNS,)).to(values.dtype.element_ty), mask=inside)
            tl.store(col + to, column, mask=inside)
            if BAND:
                tl.store(flags + to, (decided + 2 * banded).to(tl.uint8), mask=inside)
        else:
            new += tl.sum(tl.where(hit & (decided != 0)[:, None], here[:, None], 0), axis=0)
            if BAND:
                band_new += tl.sum(tl.where(hit & (banded != 0)[:, None], here[:, None], 0), axis=0)
    if WRITE == 0:
        tl.debug_barrier()  # the words are written where they were read
        tl.store(kept_words + at, new | kept if KIND == SIGN else new, mask=there)
        if BAND:
            tl.store(other_words + at, band_new, mask=there)


@kernel(do_not_specialize=["n"])
def count_kernel(kept_words, other_words, counts, n, BAND: tl.constexpr, SIZE: tl.constexpr):
    """Bits set in each word."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    word = tl.load(kept_words + at, mask=at < n, other=0)
    if BAND:
        word = word | tl.load(other_words + at, mask=at < n, other=0)
    tl.store(counts + at, popcount(word), mask=at < n)


@kernel(do_not_specialize=["n_rows", "n_words", "half"])  # first: a multiple of 16
def write_kernel(
    x, W, chosen, names, scale, bias, theta, kept_words, other_words, offsets, base, values, col, flags,
    first, n_rows, n_panel, n_words, half, D, x_r, x_d, W_f, W_d,
    KIND: tl.constexpr, BAND: tl.constexpr, CHOSEN: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Values, columns (by ``names`` where given) and flags of the bits that ``mask_kernel`` set, from the same scores."""
    WORDS: tl.constexpr = COLUMNS // 32
    for tile in range(tl.program_id(0), n_tiles(n_rows, n_panel, ROWS, COLUMNS), tl.num_programs(0)):
        _row_tile, column_tile, rows, local = cells(tile, n_rows, n_panel, GROUP, ROWS, COLUMNS)
        live, inside, f = rows < n_rows, local < n_panel, first + local
        word = first // 32 + column_tile.to(tl.int64) * WORDS + tl.arange(0, WORDS)
        at = (rows * n_words)[:, None] + word[None, :]
        mask = live[:, None] & (word < n_words)[None, :]
        kept = tl.load(kept_words + at, mask=mask, other=0)
        stored = kept
        if BAND:
            banded = tl.load(other_words + at, mask=mask, other=0)
            stored = kept | banded
        if tl.max(tl.max((stored != 0).to(tl.int32), axis=1), axis=0) != 0:
            total, _row, _column = products(
                x, W, chosen, first, rows, local, n_rows, n_panel, D, x_r, x_d, W_f, W_d, CHOSEN, ROWS, COLUMNS, DEPTH
            )
            column = f
            if names is not None:
                column = tl.load(names + f, mask=inside, other=0)
            decided, band, value = _decide(total, scale, bias, theta, half, f, inside, KIND, BAND, SCALED, BIASED)
            bit = tl.arange(0, 32)[None, None, :]
            before = popcount(stored[:, :, None] & ((1 << bit) - 1))
            to = tl.load(offsets + at, mask=mask, other=0)[:, :, None] + before
            mine = tl.reshape(((stored[:, :, None] >> bit) & 1) != 0, (ROWS, COLUMNS))
            start = tl.load(base)
            to = tl.reshape(to, (ROWS, COLUMNS))
            tl.store(values + start + to, value.to(values.dtype.element_ty), mask=mine)
            tl.store(col + start + to, tl.broadcast_to(column[None, :], (ROWS, COLUMNS)), mask=mine)
            if BAND:
                tl.store(flags + start + to, (decided.to(tl.int32) + 2 * band.to(tl.int32)).to(tl.uint8), mask=mine)


# ---------------------------------------------------------------- launchers


@dataclass(frozen=True)
class Rule:
    """What is kept of a score. ``theta``: thresholds, or the magnitude's bias of a gated encoder; ``half`` a bandwidth."""

    kind: tl.constexpr
    theta: Tensor | None = None
    half: float | None = None

    def flags(self) -> dict[str, object]:
        return {"KIND": self.kind.value, "BAND": self.half is not None}

    @property
    def width(self) -> float:
        return 0.0 if self.half is None else self.half


def n_words(n: int) -> int:
    return 2 * triton.cdiv(n, 64)


def masks(p: Problem, rule: Rule, kept: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(kept, in the band or None): words [rows, n_words] of exact decisions, the first into ``kept`` where given."""
    rows, device, words = p.x.shape[0], p.x.device, n_words(p.n)
    if kept is None:
        kept = torch.empty((rows, words), dtype=torch.int32, device=device)
    screened_sign = rule.kind is SIGN and not p.direct
    other = torch.empty_like(kept) if screened_sign or rule.half is not None else None
    tiles = Operands.of(p)
    for part, panel, chosen in tiles.panels(p):
        n = part.stop - part.start
        mask_kernel[p.tiles(n)](
            tiles.x, panel, chosen, *tiles.factors(), p.scale, p.bias, rule.theta, kept, other,
            part.start, rows, n, p.n, words, rule.width, panel.shape[1], *tiles.x.stride(), *panel.stride(),
            SCREENED=not p.direct, TWO=other is not None and (p.direct or screened_sign), PARTS=p.tile.parts,
            **rule.flags(), **p.flags(chosen), **p.tile_shape(), **p.tile.options,
        )  # fmt: skip
    if not p.direct:
        _refine(p, rule, kept, other, None)
    return kept, None if rule.kind is SIGN else other


def _refine(p: Problem, rule: Rule, kept: Tensor, other: Tensor | None, out: tuple[Tensor | None, ...] | None) -> None:
    (rows, words), interpreted = kept.shape, _tile.interpreting()
    size = min(_WORDS, triton.next_power_of_2(words))
    refine_kernel[(rows * triton.cdiv(words, size),)](
        p.x, p.W, p.chosen, p.centre, p.scale, p.bias, rule.theta, kept, other, *(out or (None,) * 5),
        rows, words, rule.width, p.x.shape[1], *p.strides(),
        WRITE=out is not None, CENTRED=p.centre is not None, WORDS=size, COLUMNS=32 * size if interpreted else _GATHER,
        num_warps=1, enable_fp_fusion=False, **rule.flags(), **p.flags(p.chosen),
    )  # fmt: skip


def counts(kept: Tensor, other: Tensor | None) -> Tensor:
    """[rows, n_words] int32: bits set, in either mask."""
    result = torch.empty_like(kept)
    if kept.numel():
        count_kernel[(triton.cdiv(kept.numel(), 1024),)](
            kept, other, result, kept.numel(), BAND=other is not None, SIZE=1024, enable_fp_fusion=False
        )
    return result


def write(
    p: Problem, rule: Rule, kept: Tensor, other: Tensor | None, offsets: Tensor, base: Tensor, values: Tensor, col: Tensor, flags: Tensor
) -> None:  # fmt: skip
    """The kept entries: values, columns, flags from ``base []`` plus ``offsets [rows, n_words]`` on."""
    if not p.direct:
        _refine(p, rule, kept, other, (offsets, base, values, col, flags))
        return
    tiles = Operands.of(p)
    for part, panel, chosen in tiles.panels(p):
        n = part.stop - part.start
        write_kernel[p.tiles(n)](
            tiles.x, panel, chosen, p.chosen, p.scale, p.bias, rule.theta, kept, other, offsets, base, values, col, flags,
            part.start, p.x.shape[0], n, kept.shape[1], rule.width, panel.shape[1], *tiles.x.stride(), *panel.stride(),
            **rule.flags(), **p.flags(chosen), **p.tile_shape(), **p.tile.options,
        )  # fmt: skip
