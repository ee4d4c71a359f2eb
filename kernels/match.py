"""Cosine matching of two dictionaries on a GPU: the top-k of ``fastsae.kernels.encode`` over unit rows, screened and scored exactly.

    match_cosine    the k rows of b that match each row of a best, by the similarity or by its magnitude
    match_pair      the same in both directions, and the most negative match of each row of a, from one pass over the products

One pass of ``match_pair``: blocks of rows and columns, in ascending order. Of a block's tiles the largest upper ends are emitted three
times, by rows, by columns and by rows of the negated products; then each of the three is settled as a top-k is (``encode.settle``),
among what is above the k-th of the blocks before it. A tie goes to what is there, which has the lower index. One interval serves all
three, as the exact product of two rows is the same from both sides.

Memory beyond the output: the unit rows of both in float32, and twice as much again of either while they are made; then for long a those
of b in float16, and the workspace of the top-k; of ``match_pair`` the rows of both in float16, too, and at most 256 MiB of what a block
emits.
"""

# pyright: basic, reportMissingImports=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportOptionalOperand=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae._core.jit import kernel
from fastsae._core.norms import unit_rows
from fastsae.kernels import _select, _tile, encode
from fastsae.kernels._problem import MOST_ROWS, WORKSPACE, Problem, pack, rounded
from fastsae.kernels._tile import Tile, cells, half_widths, n_tiles, products, screened, upper_key
from fastsae.kernels.encode import Buckets, emit, emit_rows, topk

_BLOCKS = (8192, 32768), (8192, 16384), (8192, 8192)  # rows and columns of a block of one pass, at most; the first that has plans
_WHOLE = 2048, 4096  # of one whose scores are all written out
_EMITTED = 256 << 20  # bytes that a block emits, at most
_SHAPES = sorted(((best, a_tile) for best in (2, 3, 4) for a_tile in (1, 2, 4, 8)), key=lambda shape: shape[0] * shape[1])
_NOTHING = -(2**31)

# ---------------------------------------------------------------- device code


@kernel(do_not_specialize=["n_rows", "n_columns", "x_stride", "W_stride", "D"])
def pair_kernel(
    x, W, x_factors, W_factors, row_keys, row_places, low_keys, low_places, column_keys, column_places,
    n_rows, n_columns, x_stride, W_stride, D, x_r, W_f,
    ROW_BEST: tl.constexpr, ROW_BUCKETS: tl.constexpr, LOW_BEST: tl.constexpr, LOW_BUCKETS: tl.constexpr,
    COLUMN_BEST: tl.constexpr, COLUMN_BUCKETS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Keys of the upper ends of the best of each bucket: of rows, of rows of the negated products, of columns. ``x_stride``, ``W_stride``:
    from one number of a row to the next in the factors."""
    n_row_tiles, n_column_tiles = tl.cdiv(n_rows, ROWS), tl.cdiv(n_columns, COLUMNS)
    for tile in range(tl.program_id(0), n_tiles(n_rows, n_columns, ROWS, COLUMNS), tl.num_programs(0)):
        row_tile, column_tile, rows, columns = cells(tile, n_rows, n_columns, GROUP, ROWS, COLUMNS)
        live, inside = rows < n_rows, columns < n_columns
        total, row, column = products(x, W, None, 0, rows, columns, n_rows, n_columns, D, x_r, 1, W_f, 1, False, ROWS, COLUMNS, DEPTH)
        r = screened(total, x_factors, W_factors, None, None, None, row, x_stride, column, W_stride, inside)
        e = half_widths(x_factors, W_factors, row, x_stride, column, W_stride, inside, D)
        there = live[:, None] & inside[None, :]
        key = tl.where(there, upper_key(r + e), -(2**31))
        n_buckets = n_column_tiles * ROW_BUCKETS
        bucket = column_tile.to(tl.int64) * ROW_BUCKETS + tl.arange(0, ROW_BUCKETS)
        emit_rows(
            key, row_keys, row_places, rows, live, bucket, n_buckets, n_buckets * ROW_BEST, ROW_BEST, ROWS, ROW_BUCKETS,
            COLUMNS // ROW_BUCKETS,
        )  # fmt: skip
        # Rows of a bucket lie COLUMN_BUCKETS apart: [DEEP, COLUMN_BUCKETS * COLUMNS].
        DEEP: tl.constexpr = ROWS // COLUMN_BUCKETS
        n_buckets = n_row_tiles * COLUMN_BUCKETS
        lane = tl.arange(0, COLUMN_BUCKETS * COLUMNS)
        line = column_tile.to(tl.int64) * COLUMNS + lane % COLUMNS
        to = line * (n_buckets * COLUMN_BEST) + row_tile * COLUMN_BUCKETS + lane // COLUMNS
        turned = tl.reshape(key, (1, DEEP, COLUMN_BUCKETS * COLUMNS))
        emit(turned, column_keys, column_places, to[None, :], n_buckets, (line < n_columns)[None, :], COLUMN_BEST, DEEP)
        key = tl.where(there, upper_key(e - r), -(2**31))
        n_buckets = n_column_tiles * LOW_BUCKETS
        bucket = column_tile.to(tl.int64) * LOW_BUCKETS + tl.arange(0, LOW_BUCKETS)
        emit_rows(
            key, low_keys, low_places, rows, live, bucket, n_buckets, n_buckets * LOW_BEST, LOW_BEST, ROWS, LOW_BUCKETS,
            COLUMNS // LOW_BUCKETS,
        )  # fmt: skip


# ---------------------------------------------------------------- launchers


def _unit(v: Tensor, eps: float) -> Tensor:
    return unit_rows(v.to(torch.float32), eps)[0]


def _best(
    a: Tensor, b: Tensor, k: int, *, absolute: bool = False, exclude_self: bool = False, negative: bool = False
) -> tuple[Tensor, Tensor]:
    """(similarity [N, k] in float32, index [N, k]) of unit rows; ``negative``: the smallest similarities, negated."""
    values = torch.empty((a.shape[0], k), dtype=torch.float32, device=a.device)
    indices = torch.empty((a.shape[0], k), dtype=torch.int64, device=a.device)
    scale = values.new_full((b.shape[0],), -1.0) if negative else None
    packed = pack(b) if a.shape[0] > MOST_ROWS and b.shape[0] > encode.FEW else None  # once for all chunks of rows
    p = Problem(a, b, None, scale, None, None, _tile.tile_for(a.device), absolute, exclude_self, packed=packed)
    topk(p, k, values, indices, relu=False)
    if absolute:
        _select.with_signs(a, b, None, None, None, indices, values)
    return values, indices


def match_cosine(a: Tensor, b: Tensor, k: int, absolute: bool, exclude_self: bool, eps: float) -> tuple[Tensor, Tensor]:
    """(similarity [N, k] in the dtype of a, index [N, k]); the contract is fastsae.ops.match's."""
    similarity, index = _best(_unit(a, eps), _unit(b, eps), k, absolute=absolute, exclude_self=exclude_self)
    return similarity.to(a.dtype), index


# ---------------------------------------------------------------- launchers: both directions


class _Best:
    """The k best of each line over the blocks so far, as keys and indices in no order."""

    def __init__(self, lines: int, k: int, device: torch.device):
        self.k = k
        self.keys = torch.full((lines, k), _NOTHING, dtype=torch.int32, device=device)
        self.ids = torch.full((lines, k), 2**31 - 1, dtype=torch.int32, device=device)

    def add_emitted(self, first: int, start: int, p: Problem, plan: Buckets, keys: Tensor, places: Tensor) -> None:
        """The lines ``first`` and up of a block whose columns begin at ``start``, from what it emitted."""
        step = max(p.tile.rows, WORKSPACE // (8 * (plan.room(direct=False) + self.k)))
        for part in _ranges(p.x.shape[0], step):
            lines = slice(first + part.start, first + part.stop)
            floor = self.keys[lines].amin(1)
            found, ids, counts = encode.settle(p.rows(part), plan, keys[part], places[part], floor, spare=self.k)
            # After the candidates, what is kept so far.
            at = counts.long()[:, None] + torch.arange(self.k, device=found.device)
            ids.add_(start).scatter_(1, at, self.ids[lines])
            found.scatter_(1, at, self.keys[lines])
            _select.select(found, ids, self.k, self.keys[lines], self.ids[lines], counts.add_(self.k))

    def add_all(self, first: int, start: int, keys: Tensor) -> None:
        """As ``add_emitted``, from the keys of all scores of a block."""
        lines = slice(first, first + keys.shape[0])
        ids = torch.arange(start, start + keys.shape[1], dtype=torch.int32, device=keys.device).expand(keys.shape)
        keys, ids = torch.cat([keys, self.keys[lines]], 1), torch.cat([ids, self.ids[lines]], 1)
        _select.select(keys, ids, self.k, self.keys[lines], self.ids[lines])

    def ranked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(values, indices) in order."""
        values = torch.empty(self.keys.shape, dtype=dtype, device=self.keys.device)
        indices = torch.empty(self.keys.shape, dtype=torch.int64, device=self.keys.device)
        _select.rank(self.keys, self.ids, None, values, indices, relu=False)
        return values, indices


def _ranges(n: int, step: int) -> Iterator[slice]:
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _even(n: int, most: int, step: int) -> int:
    """The size of equal parts of n, at most ``most`` each, in multiples of ``step``."""
    return triton.cdiv(triton.cdiv(n, triton.cdiv(n, most)), step) * step


def _plans(n: int, m: int, k_ab: int, k_ba: int, tile: Tile) -> tuple[Buckets, Buckets, Buckets] | None:
    """How the rows, the columns and the rows of the negated products of a block [n, m] are split; None where it cannot be screened."""
    forward, lowest = (encode.split(m, k, tile.columns, 2 * k, _SHAPES) for k in (k_ab, 1))
    backward = encode.split(n, k_ba, tile.rows, 2 * k_ba, _SHAPES)
    if forward is None or backward is None or lowest is None:
        return None
    emitted = n * (forward.entries + lowest.entries) + m * backward.entries
    return None if 6 * emitted > _EMITTED else (forward, backward, lowest)


def _block(n: int, m: int, k_ab: int, k_ba: int, tile: Tile) -> tuple[int, int] | None:
    """Rows and columns of a block of one pass; None where three passes are better: many matches of each row of a large dictionary."""
    if max(k_ab, k_ba) > _select.MOST_KEPT:
        return None
    for rows, columns in _BLOCKS if n * m > encode.FEW**2 else ():
        size = min(n, _even(n, rows, tile.rows)), min(m, _even(m, columns, tile.columns))
        if _plans(*size, k_ab, k_ba, tile) is not None:
            return size
    return _WHOLE if min(n, m) <= encode.FEW else None


def _emit_pair(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], rows: slice, columns: slice, plans: tuple[Buckets, ...], tile: Tile
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """(keys, places) of the rows, the columns and the rows of the negated products of a block of rounded rows and their factors."""
    n, m, device = rows.stop - rows.start, columns.stop - columns.start, a[0].device
    forward, backward, lowest = plans
    found = [
        tuple(torch.empty((lines, plan.entries), dtype=dtype, device=device) for dtype in (torch.int32, torch.int16))
        for lines, plan in ((n, forward), (m, backward), (n, lowest))
    ]
    x, W = a[0][rows], b[0][columns]
    pair_kernel[(_tile.programs(device, triton.cdiv(n, tile.rows) * triton.cdiv(m, tile.columns)),)](
        x, W, a[1][:, rows], b[1][:, columns], *found[0], *found[2], *found[1],
        n, m, a[1].stride(0), b[1].stride(0), x.shape[1], x.stride(0), W.stride(0),
        ROW_BEST=forward.best, ROW_BUCKETS=forward.a_tile, LOW_BEST=lowest.best, LOW_BUCKETS=lowest.a_tile,
        COLUMN_BEST=backward.best, COLUMN_BUCKETS=backward.a_tile, GROUP=tile.group,
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, **tile.options,
    )  # fmt: skip
    return found


def _opposite(keys: Tensor) -> Tensor:
    """The keys of the negated values."""
    return torch.where((keys == 0) | (keys == 2**31 - 1), keys, -1 - keys)


def _one_pass(a: Tensor, b: Tensor, k_ab: int, k_ba: int, block: tuple[int, int]) -> tuple[_Best, _Best, _Best]:
    """The best of each row of a, of each row of b, and of each row of a among the negated similarities."""
    n, m, device, tile = a.shape[0], b.shape[0], a.device, _tile.tile_for(a.device)
    forward, backward, lowest = _Best(n, k_ab, device), _Best(m, k_ba, device), _Best(n, 1, device)
    negative = a.new_full((m,), -1.0)
    halves = None if block == _WHOLE else (rounded(a, None, of_rows=True), rounded(b, None, of_rows=False))
    for rows in _ranges(n, block[0]):
        for columns in _ranges(m, block[1]):
            plans = None if halves is None else _plans(rows.stop - rows.start, columns.stop - columns.start, k_ab, k_ba, tile)
            if halves is None or plans is None:
                _add_whole(a, b, rows, columns, forward, backward, lowest)
                continue
            by_row, by_column, by_low = _emit_pair(*halves, rows, columns, plans, tile)
            p, turned = (Problem(*sides, None, None, None, None, tile) for sides in ((a[rows], b[columns]), (b[columns], a[rows])))
            forward.add_emitted(rows.start, columns.start, p, plans[0], *by_row)
            backward.add_emitted(columns.start, rows.start, turned, plans[1], *by_column)
            negated = Problem(a[rows], b[columns], None, negative[columns], None, None, tile)
            lowest.add_emitted(rows.start, columns.start, negated, plans[2], *by_low)
    return forward, backward, lowest


def _add_whole(a: Tensor, b: Tensor, rows: slice, columns: slice, forward: _Best, backward: _Best, lowest: _Best) -> None:
    for r in range(rows.start, rows.stop, _WHOLE[0]):
        for c in range(columns.start, columns.stop, _WHOLE[1]):
            part = a[r : min(r + _WHOLE[0], rows.stop)], b[c : min(c + _WHOLE[1], columns.stop)]
            keys = encode.all_keys(Problem(*part, None, None, None, None, _tile.tile_for(a.device)))
            forward.add_all(r, c, keys)
            lowest.add_all(r, c, _opposite(keys))
            backward.add_all(c, r, keys.T)


def match_pair(a: Tensor, b: Tensor, k_ab: int, k_ba: int, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(similarity, index) a to b, b to a, and of the most negative match of each row of a; the contract is fastsae.ops.match's."""
    a_unit, b_unit = _unit(a, eps), _unit(b, eps)
    block = _block(a.shape[0], b.shape[0], k_ab, k_ba, _tile.tile_for(a.device))
    if block is None:
        forward, backward, lowest = _best(a_unit, b_unit, k_ab), _best(b_unit, a_unit, k_ba), _best(a_unit, b_unit, 1, negative=True)
    else:
        with _tile.on(a.device):
            best = _one_pass(a_unit, b_unit, k_ab, k_ba, block)
            forward, backward, lowest = (side.ranked(torch.float32) for side in best)
    return (
        forward[0].to(a.dtype), forward[1], backward[0].to(b.dtype), backward[1], -lowest[0][:, 0].to(a.dtype), lowest[1][:, 0],
    )  # fmt: skip
