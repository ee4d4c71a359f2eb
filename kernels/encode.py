"""Encoders on a GPU: tiles of scores and what is kept of them, without a [B, F] matrix. ``_tile`` explains scores and screening.

Top-k of a row, after two ideas (two-stage selection as in arXiv 2506.04165, made exact by a second look):

    emit       the columns of a tile form buckets; the BEST largest keys of each bucket are emitted
    select     the k-th largest emitted key is a lower bound of the true k-th. What was not emitted is below its bucket's last emitted key,
               so only a bucket all of whose emitted keys are kept can hide a member, and at most k / BEST buckets can be such
    rescan     those buckets are looked at again, all of their columns
    select     among what was kept and what was looked at again; then rank

    direct     keys are of scores; the rescan runs the very same tile again, so its bits are the same
    screened   keys are of upper ends. The k kept are scored exactly; the least of these scores is the bound, and everything that reaches
               it with its upper end is scored exactly. Where that is more than the room for it, the row's keys are emitted again from
               exact scores, and then the first rule bounds it.

Few features, or many kept: the keys of all scores of some rows are written out and selected from.

Memory beyond the output: ``WORKSPACE`` bytes, twice that if ragged, or what a row tile needs, in chunks of rows; 64 bytes a feature; a
``PANEL``, two of a subset in half precision.
"""

# pyright: basic, reportMissingImports=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportOptionalOperand=false

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae._core import flags
from fastsae._core.jit import kernel
from fastsae.kernels import _masks, _select, _tile
from fastsae.kernels._masks import Rule
from fastsae.kernels._problem import WORKSPACE, Operands, Problem, chunks, problem
from fastsae.kernels._select import bucket_index, load_candidates
from fastsae.kernels._tile import Tile, affine, cells, ends, exact, n_tiles, ordered, products, screened, upper_key
from fastsae.latents import ScoreInputs, of_inputs

FEW = 2048  # features whose keys are all written out
BEST = 4  # emitted of a bucket
_GATHER = 16  # features that a program scores exactly at a time

# ---------------------------------------------------------------- device code: top-k


@triton.jit
def _score_key(score, MAGNITUDE: tl.constexpr):
    return ordered(tl.abs(score)) if MAGNITUDE else ordered(score)


@triton.jit
def emit(key, keys, places, to, step, mask, BEST: tl.constexpr, DEEP: tl.constexpr):
    """The BEST largest keys of each bucket of [A, DEEP, B], equal ones by the lower place, to ``to [A, B]`` and every ``step`` on."""
    place = tl.arange(0, DEEP)[None, :, None]
    for number in tl.static_range(BEST):
        largest = tl.max(key, axis=1)
        at = tl.min(tl.where(key == largest[:, None, :], place, DEEP), axis=1)
        tl.store(keys + to + number * step, largest, mask=mask)
        tl.store(places + to + number * step, at.to(tl.int16), mask=mask)
        key = tl.where(place == at[:, None, :], -(2**31), key)


@triton.jit
def emit_rows(
    key, keys, columns, rows, live, bucket, n_buckets, stride,
    BEST: tl.constexpr, ROWS: tl.constexpr, BUCKETS: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """The BEST largest keys of each bucket of the rows of a tile [ROWS, DEEP * BUCKETS]."""
    to = (rows * stride)[:, None] + bucket[None, :]
    mask = live[:, None] & (bucket < n_buckets)[None, :]
    emit(tl.reshape(key, (ROWS, DEEP, BUCKETS)), keys, columns, to, n_buckets, mask, BEST, DEEP)


@kernel(do_not_specialize=["first_row", "first", "n_rows", "n", "n_buckets"])  # n_panel and D: multiples of 16 load wide
def emit_kernel(
    x, W, chosen, x_factors, W_factors, x_far, W_far, n_far, scale, bias, keys, columns,
    first_row, first, n_rows, n_panel, n, n_buckets, D, stride, x_r, x_d, W_f, W_d,
    SCREENED: tl.constexpr, CHOSEN: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, MAGNITUDE: tl.constexpr, OTHERS: tl.constexpr,
    STORE: tl.constexpr, BEST: tl.constexpr, BUCKETS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Features first .. first + n_panel against all rows of the chunk: keys of the best of each bucket, or (STORE) of all scores."""
    for tile in range(tl.program_id(0), n_tiles(n_rows, n_panel, ROWS, COLUMNS), tl.num_programs(0)):
        _row_tile, column_tile, rows, local = cells(tile, n_rows, n_panel, GROUP, ROWS, COLUMNS)
        live, inside, f = rows < n_rows, local < n_panel, first + local
        total, row, _column = products(
            x, W, chosen, first, rows, local, n_rows, n_panel, D, x_r, x_d, W_f, W_d, CHOSEN, ROWS, COLUMNS, DEPTH
        )
        if SCREENED:
            r = screened(total, x_factors, W_factors, x_far, W_far, n_far, row, n_rows, f, n, inside)
            low, high = ends(r, x_factors, W_factors, scale, bias, row, n_rows, f, n, inside, D, SCALED, BIASED)
            if MAGNITUDE:
                high = tl.where((low != low) | (high != high), float("nan"), tl.maximum(tl.abs(low), tl.abs(high)))
            key = upper_key(high)
        else:
            key = _score_key(affine(total, scale, bias, f, inside, SCALED, BIASED), MAGNITUDE)
        if OTHERS:
            key = tl.where((first_row + rows)[:, None] == f[None, :], -(2**31), key)
        key = tl.where(inside[None, :], key, -(2**31))
        if STORE:
            tl.store(keys + (rows * stride)[:, None] + f[None, :], key, mask=live[:, None] & inside[None, :])
        else:
            bucket = ((first // COLUMNS + column_tile) * BUCKETS + tl.arange(0, BUCKETS)).to(tl.int64)
            emit_rows(key, keys, columns, rows, live, bucket, n_buckets, stride, BEST, ROWS, BUCKETS, COLUMNS // BUCKETS)


@kernel(do_not_specialize=["first", "n_rows", "n_buckets", "k", "tile_stride"])
def rescan_kernel(
    x, W, chosen, scale, bias, slot_of, tile_flags, keys,
    first, n_rows, n_panel, n_buckets, D, k, stride, tile_stride, x_r, x_d, W_f, W_d,
    CHOSEN: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, BUCKETS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The direct scores of all columns of the flagged buckets, as candidates k + slot * deep + column of their rows."""
    DEEP: tl.constexpr = COLUMNS // BUCKETS
    for tile in range(tl.program_id(0), n_tiles(n_rows, n_panel, ROWS, COLUMNS), tl.num_programs(0)):
        row_tile, column_tile, rows, local = cells(tile, n_rows, n_panel, GROUP, ROWS, COLUMNS)
        at_tile = first // COLUMNS + column_tile
        if tl.load(tile_flags + row_tile.to(tl.int64) * tile_stride + at_tile) != 0:
            live, inside = rows < n_rows, local < n_panel
            total, _row, _column = products(
                x, W, chosen, first, rows, local, n_rows, n_panel, D, x_r, x_d, W_f, W_d, CHOSEN, ROWS, COLUMNS, DEPTH
            )
            key = ordered(affine(total, scale, bias, first + local, inside, SCALED, BIASED))
            # [ROWS, DEEP, BUCKETS], so that there is one slot a row and bucket.
            key = tl.reshape(key, (ROWS, DEEP, BUCKETS))
            bucket = at_tile.to(tl.int64) * BUCKETS + tl.arange(0, BUCKETS)
            slot = tl.load(slot_of + (rows * n_buckets)[:, None] + bucket[None, :], mask=live[:, None], other=-1).to(tl.int32)
            at = k + slot[:, None, :] * DEEP + tl.arange(0, DEEP)[None, :, None]
            mask = tl.broadcast_to((slot >= 0)[:, None, :], (ROWS, DEEP, BUCKETS))
            tl.store(keys + (rows * stride)[:, None, None] + at, key, mask=mask)


@kernel(do_not_specialize=["n_rows", "n", "k", "room", "n_buckets", "n_slots"])
def list_kernel(
    keys, ids, slot_of, flagged, n_flagged, n_rows, n, k, room, n_buckets, n_slots,
    BUCKETS: tl.constexpr, DEEP: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The indices of the columns that were looked at again. What their buckets had emitted stands among them, so those kept give way."""
    p = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    row, at = p // room, (p % room).to(tl.int32)
    mask = row < n_rows
    first = mask & (at < k)
    f = tl.load(ids + p, mask=first, other=0)
    bucket = f // (BUCKETS * DEEP) * BUCKETS + f % BUCKETS
    again = first & (tl.load(slot_of + row * n_buckets + bucket, mask=first, other=-1) >= 0)
    column = tl.maximum(at - k, 0)
    slot = column // DEEP
    listed = mask & (at >= k) & (slot < tl.load(n_flagged + row, mask=mask, other=0))
    bucket = tl.load(flagged + row * n_slots + slot, mask=listed, other=0)
    f = bucket_index(bucket, column % DEEP, BUCKETS, DEEP)
    tl.store(ids + p, tl.where(f < n, f, -1), mask=listed)
    tl.store(keys + p, -(2**31), mask=again | (listed & (f >= n)))


@kernel(do_not_specialize=["first_row", "n_rows", "n", "n_buckets"])
def exact_kernel(
    x, W, chosen, centre, scale, bias, only, keys, columns,
    first_row, n_rows, n, n_buckets, D, stride, x_r, x_d, W_f, W_d,
    ONLY: tl.constexpr, CHOSEN: tl.constexpr, CENTRED: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, MAGNITUDE: tl.constexpr,
    OTHERS: tl.constexpr, STORE: tl.constexpr, BEST: tl.constexpr, BUCKETS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """As ``emit_kernel``, from exact scores; ONLY rows that ``only`` marks."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < n_rows
    if ONLY:
        live = live & (tl.load(only + rows, mask=live, other=0) != 0)
    if tl.sum(live.to(tl.int32), axis=0) > 0:
        row = tl.minimum(rows, n_rows - 1)
        for column_tile in range(tl.program_id(1), tl.cdiv(n, COLUMNS), tl.num_programs(1)):
            f = tl.cast(column_tile, tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
            inside = f < n
            column = f
            if CHOSEN:
                column = tl.load(chosen + f, mask=inside, other=0)
            mask = live[:, None] & inside[None, :]
            W_at = tl.broadcast_to((W + column * W_f)[None, :], (ROWS, COLUMNS))
            total = exact(x + row * x_r, W_at, centre, D, x_d, W_d, mask, CENTRED, ROWS, COLUMNS)
            key = _score_key(affine(total, scale, bias, f, inside, SCALED, BIASED), MAGNITUDE)
            if OTHERS:
                key = tl.where((first_row + rows)[:, None] == f[None, :], -(2**31), key)
            if STORE:
                tl.store(keys + (rows * stride)[:, None] + f[None, :], key, mask=mask)
            else:
                key = tl.where(inside[None, :], key, -(2**31))
                bucket = tl.cast(column_tile, tl.int64) * BUCKETS + tl.arange(0, BUCKETS)
                emit_rows(key, keys, columns, rows, live, bucket, n_buckets, stride, BEST, ROWS, BUCKETS, COLUMNS // BUCKETS)


@kernel(do_not_specialize=["n_rows", "n_entries", "n_buckets", "k", "n_extra", "n_slots"])
def widen_kernel(
    keys, columns, cut, floor, kept_keys, ids, lengths, flagged, n_flagged, crowded,
    n_rows, n_entries, n_buckets, k, n_extra, n_slots, stride, kept_stride,
    FLOORED: tl.constexpr, BUCKETS: tl.constexpr, DEEP: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Lists what may still be among the k best of a screened row: what was emitted with an upper end that reaches the least exact score of
    the k first ones (FLOORED: and exceeds the row's floor), and buckets whose last emitted one does. ``crowded`` marks rows with more of
    either than there is room for."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < n_rows
    least = tl.full((ROWS,), 2**31 - 1, tl.int32)
    for start in range(0, k, SIZE):
        p = start + tl.arange(0, SIZE)
        key = tl.load(kept_keys + (rows * kept_stride)[:, None] + p[None, :], mask=live[:, None] & (p < k)[None, :], other=2**31 - 1)
        least = tl.minimum(least, tl.min(key, axis=1))
    key_cut = tl.load(cut + rows, mask=live, other=0)
    index_cut = tl.load(cut + n_rows + rows, mask=live, other=0)
    if FLOORED:
        lowest = tl.load(floor + rows, mask=live, other=0)
    everything = tl.full((ROWS,), 0, tl.int32) + n_entries
    extra = tl.zeros((ROWS,), tl.int32)
    slots = tl.zeros((ROWS,), tl.int32)
    for start in range(0, n_entries, SIZE):
        p, key, index = load_candidates(
            keys, columns, rows, live, everything, start, n_entries, stride, n_buckets, True, False, BUCKETS, DEEP, SIZE
        )
        reaches = live[:, None] & (p < n_entries)[None, :] & (key >= least[:, None]) & (key != -(2**31))
        if FLOORED:
            reaches = reaches & (key > lowest[:, None])
        kept = (key > key_cut[:, None]) | ((key == key_cut[:, None]) & (index <= index_cut[:, None]))
        new = reaches & (kept == 0)
        number = new.to(tl.int32)
        to = extra[:, None] + tl.cumsum(number, axis=1) - 1
        tl.store(ids + (rows * kept_stride)[:, None] + k + to, index, mask=new & (to < n_extra))
        extra += tl.sum(number, axis=1)
        last = reaches & (p >= n_entries - n_buckets)[None, :]
        number = last.to(tl.int32)
        to = slots[:, None] + tl.cumsum(number, axis=1) - 1
        bucket = tl.broadcast_to((p - (n_entries - n_buckets))[None, :], to.shape)
        tl.store(flagged + (rows * n_slots)[:, None] + to, bucket, mask=last & (to < n_slots))
        slots += tl.sum(number, axis=1)
    full = (extra > n_extra) | (slots > n_slots)
    tl.store(crowded + rows, full.to(tl.int32), mask=live)
    tl.store(lengths + rows, tl.where(full, k, k + extra), mask=live)
    tl.store(n_flagged + rows, tl.where(full, 0, slots), mask=live)


@kernel(do_not_specialize=["first_row", "first", "n", "n_buckets", "n_slots"])
def rescore_kernel(
    x, W, chosen, centre, scale, bias, columns, lengths, flagged, n_flagged, ids, keys,
    first_row, first, n, n_buckets, n_slots, D, stride, emitted_stride, x_r, x_d, W_f, W_d,
    SLOTS: tl.constexpr, CHOSEN: tl.constexpr, CENTRED: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, MAGNITUDE: tl.constexpr,
    OTHERS: tl.constexpr, BEST: tl.constexpr, BUCKETS: tl.constexpr, DEEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Keys of the exact scores of a row's candidates ``first`` and up; after the listed ones stand those of the flagged buckets."""
    row = tl.program_id(0).to(tl.int64)
    listed = tl.load(lengths + row)
    end = listed
    if SLOTS:
        end = listed + tl.load(n_flagged + row) * DEEP
    for start in range(first + tl.program_id(1) * COLUMNS, end, tl.num_programs(1) * COLUMNS):
        p = start + tl.arange(0, COLUMNS)
        f = tl.load(ids + row * stride + p, mask=p < listed, other=-1)
        if SLOTS:
            place = tl.maximum(p - listed, 0)
            column = place % DEEP
            there = (p >= listed) & (p < end)
            bucket = tl.load(flagged + row * n_slots + place // DEEP, mask=there, other=0)
            there = there & (bucket_index(bucket, column, BUCKETS, DEEP) < n)
            for number in tl.static_range(BEST):  # the emitted ones are listed already
                emitted = tl.load(columns + row * emitted_stride + number * n_buckets + bucket, mask=there, other=-1)
                there = there & (emitted.to(tl.int32) != column)
            f = tl.where(p < listed, f, tl.where(there, bucket_index(bucket, column, BUCKETS, DEEP), -1))
        if OTHERS:
            f = tl.where(f == first_row + row, -1, f)
        inside = f >= 0
        at = tl.maximum(f, 0).to(tl.int64)
        column = at
        if CHOSEN:
            column = tl.load(chosen + at, mask=inside, other=0)
        W_at = (W + column * W_f)[None, :]
        x_at = x + (row * x_r + tl.zeros((1,), tl.int64))
        total = tl.zeros((1, COLUMNS), tl.float32)
        if tl.max(inside.to(tl.int32), axis=0) != 0:
            total = exact(x_at, W_at, centre, D, x_d, W_d, inside[None, :], CENTRED, 1, COLUMNS)
        key = tl.reshape(_score_key(affine(total, scale, bias, at, inside, SCALED, BIASED), MAGNITUDE), (COLUMNS,))
        tl.store(keys + row * stride + p, tl.where(inside, key, -(2**31)), mask=p < end)
        tl.store(ids + row * stride + p, f, mask=p < end)


# ---------------------------------------------------------------- launchers: top-k


@dataclass(frozen=True)
class Buckets:
    """How a top-k is split: ``number`` buckets of ``deep`` columns, ``a_tile`` of them in a tile, ``best`` emitted of each."""

    a_tile: int
    deep: int
    number: int
    k: int
    best: int = BEST

    @property
    def entries(self) -> int:
        return self.best * self.number

    @property
    def slots(self) -> int:
        return max(8, self.k // self.best)

    @property
    def extra(self) -> int:
        return max(64, 2 * self.k)

    def room(self, *, direct: bool) -> int:
        """Candidates of a row."""
        return self.k + (self.k // self.best if direct else self.slots) * self.deep + (0 if direct else self.extra)


def split(n: int, k: int, columns: int, members: int, shapes: Iterable[tuple[int, int]]) -> Buckets | None:
    """The first of ``shapes`` (emitted of a bucket, buckets of a tile of ``columns``) of whose buckets few need a second look."""
    for best, a_tile in shapes:
        number, deep = triton.cdiv(n, columns) * a_tile, columns // a_tile
        # Under random placement C(members, best) / number^(best - 1) buckets hold as many members as they emit.
        if math.comb(members, best) / number ** (best - 1) <= 1 / 64 and n // columns * a_tile * min(best, deep) >= 2 * k:
            return Buckets(a_tile, deep, number, k, best)
    return None


def buckets(n: int, k: int, tile: Tile, *, direct: bool) -> Buckets | None:
    """The coarsest buckets of which few need a second look; None where writing all keys out is better."""
    if n <= FEW or k > _select.MOST_KEPT:
        return None
    # A screened row has up to twice k candidates.
    return split(n, k, tile.columns, k if direct else 2 * k, ((BEST, a_tile) for a_tile in (1, 2, 4, 8)))


def topk(p: Problem, k: int, values: Tensor, indices: Tensor, *, relu: bool) -> None:
    """The k best scores of each row, in order, into values and indices [rows, k]."""
    rows = p.x.shape[0]
    if rows == 0 or k == 0:
        return
    plan = buckets(p.n, k, p.tile, direct=p.direct)
    with _tile.on(p.x.device):
        if plan is None:
            needed = 4 * p.n + 8 * k if k <= _select.MOST_KEPT else 16 * p.n + 32 * k
            least = 1 if needed * p.tile.rows > WORKSPACE else p.tile.rows
        else:
            needed = 6 * plan.entries + 8 * plan.room(direct=p.direct) + 8 * k + 2 * plan.number + 4 * plan.slots
            least = p.tile.rows
        for part in chunks(rows, needed + p.row_bytes, least):
            chunk = p.rows(part)
            if plan is None:
                keys = all_keys(chunk)
                if k > _select.MOST_KEPT:
                    _select.sort(keys, k, p.chosen, values[part], indices[part], relu=relu)
                    continue
                candidates, ids, counts = keys, None, None
            else:
                candidates, ids, counts = (_direct_candidates if p.direct else _screened_candidates)(chunk, plan)
            kept_keys, kept_ids = torch.empty((2, chunk.x.shape[0], k), dtype=torch.int32, device=p.x.device)
            _select.select(candidates, ids, k, kept_keys, kept_ids, counts)
            _select.rank(kept_keys, kept_ids, p.chosen, values[part], indices[part], relu=relu)


def all_keys(p: Problem) -> Tensor:
    """[rows, n]: the keys of all scores."""
    rows = p.x.shape[0]
    keys = torch.empty((rows, p.n), dtype=torch.int32, device=p.x.device)
    if p.direct:
        _emit(p, Operands.of(p), keys, None, None)
    else:
        size, columns = (4, 32) if not _tile.interpreting() else (32, 64)
        _exact(p, keys, None, None, None, min(size, triton.next_power_of_2(rows)), columns)
    return keys


def _emit(p: Problem, tiles: Operands, keys: Tensor, columns: Tensor | None, plan: Buckets | None) -> None:
    for part, panel, chosen in tiles.panels(p):
        n = part.stop - part.start
        emit_kernel[p.tiles(n)](
            tiles.x, panel, chosen, *tiles.factors(), p.scale, p.bias, keys, columns,
            p.first_row, part.start, p.x.shape[0], n, p.n, plan.number if plan else 0, panel.shape[1], keys.stride(0),
            *tiles.x.stride(), *panel.stride(),
            SCREENED=not p.direct, MAGNITUDE=p.magnitude, OTHERS=p.others, STORE=plan is None,
            BEST=plan.best if plan else 1, BUCKETS=plan.a_tile if plan else 1, **p.flags(chosen), **p.tile_shape(), **p.tile.options,
        )  # fmt: skip


def _exact(p: Problem, keys: Tensor, columns: Tensor | None, plan: Buckets | None, only: Tensor | None, size: int, width: int) -> None:
    rows, D = p.x.shape
    # Where few rows are meant, most programs have nothing to do: fewer of them, for several tiles of columns each.
    programs = min(triton.cdiv(p.n, width), 65535 if only is None else 32)
    exact_kernel[(triton.cdiv(rows, size), programs)](
        p.x, p.W, p.chosen, p.centre, p.scale, p.bias, only, keys, columns,
        p.first_row, rows, p.n, plan.number if plan else 0, D, keys.stride(0), *p.strides(),
        ONLY=only is not None, CENTRED=p.centre is not None, MAGNITUDE=p.magnitude, OTHERS=p.others, STORE=plan is None,
        BEST=plan.best if plan else 1, BUCKETS=plan.a_tile if plan else 1, ROWS=size, COLUMNS=width,
        num_warps=8, enable_fp_fusion=False, **p.flags(p.chosen),
    )  # fmt: skip


def _select_emitted(
    keys: Tensor, columns: Tensor, plan: Buckets, tile: Tile, only: Tensor | None, kept: tuple[Tensor, Tensor], cut: Tensor,
    flagged: Tensor | None, n_flagged: Tensor | None, slot_of: Tensor | None, tile_flags: Tensor | None,
) -> None:  # fmt: skip
    rows, n = keys.shape
    shape = _select.select_options(n, rows)
    _select.select_kernel[(triton.cdiv(rows, shape["ROWS"]),)](
        keys, columns, None, only, *kept, cut, flagged, slot_of, n_flagged, tile_flags,
        rows, n, plan.k, plan.number, 0 if flagged is None else flagged.shape[1], n, kept[0].stride(0),
        0 if tile_flags is None else tile_flags.shape[1],
        EMITTED=True, LISTED=False, COUNTED=False, ONLY=only is not None, FLAG=flagged is not None, MAPPED=slot_of is not None,
        BUCKETS=plan.a_tile, DEEP=plan.deep, TILE_ROWS=tile.rows, **shape,
    )  # fmt: skip


def _direct_candidates(p: Problem, plan: Buckets) -> tuple[Tensor, Tensor, Tensor]:
    rows, device, tiles = p.x.shape[0], p.x.device, Operands.of(p)
    keys = torch.empty((rows, plan.entries), dtype=torch.int32, device=device)
    columns = torch.empty((rows, plan.entries), dtype=torch.int16, device=device)
    _emit(p, tiles, keys, columns, plan)
    kept_keys, kept_ids = torch.empty((2, rows, plan.room(direct=True)), dtype=torch.int32, device=device)
    cut, n_flagged = torch.empty(2 * rows, dtype=torch.int32, device=device), torch.empty(rows, dtype=torch.int32, device=device)
    flagged = torch.empty((rows, max(1, plan.k // plan.best)), dtype=torch.int32, device=device)
    slot_of = torch.empty((rows, plan.number), dtype=torch.int16, device=device)
    tile_flags = torch.zeros((triton.cdiv(rows, p.tile.rows), triton.cdiv(p.n, p.tile.columns)), dtype=torch.int32, device=device)
    _select_emitted(keys, columns, plan, p.tile, None, (kept_keys, kept_ids), cut, flagged, n_flagged, slot_of, tile_flags)
    for part, panel, chosen in tiles.panels(p):
        n = part.stop - part.start
        rescan_kernel[p.tiles(n)](
            tiles.x, panel, chosen, p.scale, p.bias, slot_of, tile_flags, kept_keys,
            part.start, rows, n, plan.number, panel.shape[1], plan.k, kept_keys.stride(0), tile_flags.shape[1],
            *tiles.x.stride(), *panel.stride(), BUCKETS=plan.a_tile, **p.flags(chosen), **p.tile_shape(), **p.tile.options,
        )  # fmt: skip
    room = plan.room(direct=True)
    list_kernel[(triton.cdiv(rows * room, 1024),)](
        kept_keys, kept_ids, slot_of, flagged, n_flagged, rows, p.n, plan.k, room, plan.number, flagged.shape[1],
        BUCKETS=plan.a_tile, DEEP=plan.deep, SIZE=1024, enable_fp_fusion=False,
    )  # fmt: skip
    return kept_keys, kept_ids, n_flagged.mul_(plan.deep).add_(plan.k)


def _screened_candidates(p: Problem, plan: Buckets) -> tuple[Tensor, Tensor, Tensor]:
    rows, device = p.x.shape[0], p.x.device
    keys = torch.empty((rows, plan.entries), dtype=torch.int32, device=device)
    columns = torch.empty((rows, plan.entries), dtype=torch.int16, device=device)
    _emit(p, Operands.of(p), keys, columns, plan)
    return settle(p, plan, keys, columns)


def settle(p: Problem, plan: Buckets, keys: Tensor, columns: Tensor, floor: Tensor | None = None, spare: int = 0) -> tuple[Tensor, ...]:
    """Candidates that hold the k best scores of each row, from what was emitted of their upper ends: (keys of exact scores, indices, how
    many), the first two [rows, room + ``spare``]. With ``floor [rows]`` they hold those of the k best whose key exceeds it."""
    rows, device = p.x.shape[0], p.x.device
    kept_keys, kept_ids = torch.empty((2, rows, plan.room(direct=False) + spare), dtype=torch.int32, device=device)
    cut = torch.empty(2 * rows, dtype=torch.int32, device=device)
    _select_emitted(keys, columns, plan, p.tile, None, (kept_keys, kept_ids), cut, None, None, None, None)
    if floor is not None:
        kept_ids[:, : plan.k].masked_fill_(kept_keys[:, : plan.k] <= floor[:, None], -1)
    lengths, n_flagged, crowded = torch.full((3, rows), plan.k, dtype=torch.int32, device=device)
    flagged = torch.empty((rows, plan.slots), dtype=torch.int32, device=device)
    _rescore(p, plan, columns, lengths, None, n_flagged, kept_ids, kept_keys, 0)
    shape = _select.options(plan.entries, rows)
    widen_kernel[(triton.cdiv(rows, shape["ROWS"]),)](
        keys, columns, cut, floor, kept_keys, kept_ids, lengths, flagged, n_flagged, crowded,
        rows, plan.entries, plan.number, plan.k, plan.extra, plan.slots, plan.entries, kept_keys.stride(0),
        FLOORED=floor is not None, BUCKETS=plan.a_tile, DEEP=plan.deep, **shape,
    )  # fmt: skip
    _exact(p, keys, columns, plan, crowded, 1, plan.a_tile * plan.deep)
    _select_emitted(keys, columns, plan, p.tile, crowded, (kept_keys, kept_ids), cut, flagged, n_flagged, None, None)
    _rescore(p, plan, columns, lengths, flagged, n_flagged, kept_ids, kept_keys, plan.k)
    return kept_keys, kept_ids, n_flagged.mul_(plan.deep).add_(lengths)


def _rescore(
    p: Problem, plan: Buckets, columns: Tensor, lengths: Tensor, flagged: Tensor | None, n_flagged: Tensor, ids: Tensor, keys: Tensor,
    first: int,
) -> None:  # fmt: skip
    rows, D = p.x.shape
    width = 64 if _tile.interpreting() else _GATHER
    programs = min(triton.cdiv(max(1, ids.shape[1] - first), width), 1 if _tile.interpreting() else 4)
    rescore_kernel[(rows, programs)](
        p.x, p.W, p.chosen, p.centre, p.scale, p.bias, columns, lengths, flagged, n_flagged, ids, keys,
        p.first_row, first, p.n, plan.number, plan.slots, D, ids.shape[1], plan.entries, *p.strides(),
        SLOTS=flagged is not None, CENTRED=p.centre is not None, MAGNITUDE=p.magnitude, OTHERS=p.others, BEST=plan.best,
        BUCKETS=plan.a_tile, DEEP=plan.deep, COLUMNS=width, num_warps=2, enable_fp_fusion=False, **p.flags(p.chosen),
    )  # fmt: skip


@of_inputs
def encode_topk(inputs: ScoreInputs, k: int, relu: bool, absolute: bool = False) -> tuple[Tensor, Tensor]:
    """(values [rows, k] in the dtype of x, indices [rows, k] int64); the contract is fastsae.ops.encode's."""
    p, x = replace(problem(inputs), magnitude=absolute), inputs.x
    if k > p.n:
        raise ValueError(f"encode_topk: k must be at most the number of features chosen ({p.n}), got {k}")
    values = torch.empty((x.shape[0], k), dtype=x.dtype, device=x.device)
    indices = torch.empty((x.shape[0], k), dtype=torch.int64, device=x.device)
    topk(p, k, values, indices, relu=relu)
    if absolute:
        _select.with_signs(x, inputs.W, p.centre, _tile.wide(inputs.scale), _tile.wide(inputs.b), indices, values)
    return values, indices


# ---------------------------------------------------------------- launchers: ragged


def ragged(p: Problem, rule: Rule, dtype: torch.dtype, op: str, capacity: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(values [nnz], col [nnz], crow [rows + 1], flags [nnz] or [0]) of what the rule keeps. The host waits once, for nnz; not where a
    ``capacity`` is given, which nnz then is: slots after the entries are 0, entries that do not fit are left out and flagged."""
    rows, device, words = p.x.shape[0], p.x.device, _masks.n_words(p.n)
    crow = torch.zeros(rows + 1, dtype=torch.int64, device=device)
    with _tile.on(device):
        needed = (16 if capacity is None else 21) * words + p.row_bytes
        parts = list(chunks(rows, needed, p.tile.rows, 2**31 // max(p.n, 1))) if p.n else []
        held = []  # the masks of the chunks, where there is room for all: otherwise they are made again
        for part in parts:
            found = _masks.masks(p.rows(part), rule)
            torch.sum(_masks.counts(*found), 1, out=crow[part.start + 1 : part.stop + 1])
            if len(parts) == 1 or 8 * rows * words <= WORKSPACE:
                held.append(found)
        crow = torch.cumsum(crow, 0)
        if capacity is None:
            nnz, make = int(crow[-1]), torch.empty
        else:
            nnz, make = capacity, torch.zeros
            _note_overflow(op, crow[-1], capacity)
        values, col = make(nnz, dtype=dtype, device=device), make(nnz, dtype=torch.int64, device=device)
        marks = make(nnz if rule.half is not None else 0, dtype=torch.uint8, device=device)
        for number, part in enumerate(parts if nnz else []):
            chunk = p.rows(part)
            found = held[number] if held else _masks.masks(chunk, rule)
            bits = _masks.counts(*found)
            offsets = torch.cumsum(bits.view(-1), 0, dtype=torch.int32).view_as(bits).sub_(bits)
            if capacity is not None:  # words that do not fit as a whole are cleared; the number of one dimension makes them int64
                passed = offsets + bits > capacity - crow[part.start : part.start + 1]
                for words_of in found:
                    if words_of is not None:
                        words_of.masked_fill_(passed, 0)
            _masks.write(chunk, rule, *found, offsets, crow[part.start], values, col, marks)
    return values, col, crow if capacity is None else crow.clamp_(max=capacity), marks


def _note_overflow(op: str, count: Tensor, capacity: int) -> None:
    if count.device.type == "cpu":
        if int(count) > capacity:
            raise ValueError(f"{op}: capacity must be at least the number of latents ({int(count)}), got {capacity}")
    else:
        flags.overflow(count.device).logical_or_(count > capacity)


@of_inputs
def encode_threshold(
    inputs: ScoreInputs, threshold: Tensor, bandwidth: float | None, capacity: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(values, col, crow, flags: 1 active, 2 inside the band); the contract is fastsae.ops.encode's."""
    p = problem(inputs)
    theta = threshold.to(torch.float32)
    if theta.dim() and p.chosen is not None:
        theta = theta[p.chosen]
    rule = Rule(_masks.THRESHOLD, theta.expand(p.n).contiguous(), None if bandwidth is None else bandwidth / 2)
    return ragged(p, rule, inputs.x.dtype, "encode_threshold", capacity)


@of_inputs
def encode_batch_topk(inputs: ScoreInputs, k: float, capacity: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(values, col, crow, min_kept); the contract is fastsae.ops.encode's.

    The best of each row, as many as a row keeps on average, hold at least the wanted number of scores; the least of these is a bound that
    everything kept reaches. What reaches it is then sorted."""
    p, x = problem(inputs), inputs.x
    rows, device, total = x.shape[0], x.device, int(k * x.shape[0])
    each = 0 if rows == 0 else min(p.n, -(-total // rows))
    theta = torch.zeros((), dtype=torch.float32, device=device)
    if 0 < total < rows * p.n:
        best = torch.empty((rows, each), dtype=torch.float32, device=device)
        where = torch.empty((rows, each), dtype=torch.int64, device=device)
        topk(p, each, best, where, relu=False)
        bound = best.view(-1).sort(descending=True).values[total - 1]
        # Strictly above the number below the bound. Above a NaN stands NaN alone.
        theta = torch.where(bound > 0, torch.nextafter(bound, theta), theta).masked_fill(bound.isnan(), torch.inf)
    rule = Rule(_masks.THRESHOLD, theta.expand(p.n).contiguous())
    values, col, crow, _ = ragged(p, rule, torch.float32, "encode_batch_topk", capacity)
    if capacity is not None:  # empty slots after all others; what is kept is above 0
        values = torch.where(torch.arange(capacity, device=device) < crow[-1], values, -1.0)
    order = values.sort(descending=True, stable=True).indices[:total]
    kept = crow[-1:].clamp(max=order.shape[0])
    min_kept = torch.where(kept > 0, values[order[kept - 1]], torch.inf)[0] if order.shape[0] else values.new_full((), torch.inf)
    order = order.sort().values
    values, col, crow = values[order], col[order], torch.searchsorted(order, crow)
    if capacity is not None:
        values, col = (torch.nn.functional.pad(slots, (0, capacity - order.shape[0])) for slots in (values.clamp_min(0), col))
    return values.to(x.dtype), col, crow, min_kept


def encode_gated(
    x: Tensor, W: Tensor, b_gate: Tensor, r_mag: Tensor, b_mag: Tensor, b_pre: Tensor | None, packed: Tensor | None,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(values, col, crow); the contract is fastsae.ops.encode's."""
    p = problem(ScoreInputs(x, W, b_gate, b_pre, r_mag.to(torch.float32).exp(), None, packed))
    return ragged(p, Rule(_masks.GATED, _tile.wide(b_mag)), x.dtype, "encode_gated", capacity)[:3]
