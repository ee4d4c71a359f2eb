"""Exact selection in rows of candidates: the k largest keys, equal keys by the lower index, found bit by bit, without sorting.

    select_kernel    the k-th key of a row is built from its highest bit down: a bit stays where at least k keys are not below. Where more
                     than k keys are not below it, the index that divides the equal ones is built the same way. What is kept is written
                     in the order of candidates.
    rank_kernel      the place of each of the k kept is the number of kept ones that precede it.

Integers only, so the order of operations is nobody's concern.
"""

# pyright: basic, reportMissingImports=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportOptionalOperand=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae._core.jit import kernel
from fastsae.kernels._tile import affine, exact, interpreting, on, unordered

MOST_KEPT = 512  # a row; the ranks of more are found by sorting
_SIZE = 4096  # candidates of a program at a time

# ---------------------------------------------------------------- device code


@triton.jit
def bucket_index(bucket, column, BUCKETS: tl.constexpr, DEEP: tl.constexpr):
    """The feature at place ``column`` of a bucket: a tile's buckets take its columns in turn."""
    return (bucket // BUCKETS) * (BUCKETS * DEEP) + column * BUCKETS + bucket % BUCKETS


@triton.jit
def load_candidates(
    keys, ids, rows, live, lengths, start, n, stride, n_buckets,
    EMITTED: tl.constexpr, LISTED: tl.constexpr, BUCKETS: tl.constexpr, DEEP: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """(place, key, index) of the candidates start .. start + SIZE of each row."""
    p = start + tl.arange(0, SIZE)
    mask = live[:, None] & (p[None, :] < lengths[:, None])
    at = (rows * stride)[:, None] + p[None, :]
    key = tl.load(keys + at, mask=mask, other=-(2**31))
    if EMITTED:
        column = tl.load(ids + at, mask=mask, other=0).to(tl.int32)
        index = bucket_index((p % n_buckets)[None, :], column, BUCKETS, DEEP)
    elif LISTED:
        index = tl.load(ids + at, mask=mask, other=0)
    else:
        index = tl.broadcast_to(p[None, :], key.shape)
    return p, key, index


@triton.jit
def _count(
    held, key_cut, index_cut, keys, ids, rows, live, lengths, n, stride, n_buckets,
    EQUAL: tl.constexpr, HELD: tl.constexpr,
    EMITTED: tl.constexpr, LISTED: tl.constexpr, BUCKETS: tl.constexpr, DEEP: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """[ROWS]: candidates whose key is at least ``key_cut``, or (EQUAL) equal to it with an index below ``index_cut``."""
    found = tl.zeros((ROWS,), tl.int32)
    if HELD and not EQUAL:
        found += tl.sum((held >= key_cut[:, None]).to(tl.int32), axis=1)
    else:
        for start in range(0, n, CHUNK):
            _, key, index = load_candidates(
                keys, ids, rows, live, lengths, start, n, stride, n_buckets, EMITTED, LISTED, BUCKETS, DEEP, CHUNK
            )
            hit = ((key == key_cut[:, None]) & (index < index_cut[:, None])) if EQUAL else key >= key_cut[:, None]
            found += tl.sum(hit.to(tl.int32), axis=1)
    return found


@kernel(do_not_specialize=["n_rows", "n", "k", "n_buckets", "n_slots"])
def select_kernel(
    keys, ids, counts, only, kept_keys, kept_ids, cut, flagged, slot_of, n_flagged, tile_flags,
    n_rows, n, k, n_buckets, n_slots, stride, kept_stride, tile_stride,
    EMITTED: tl.constexpr, LISTED: tl.constexpr, COUNTED: tl.constexpr, ONLY: tl.constexpr, FLAG: tl.constexpr, MAPPED: tl.constexpr,
    BUCKETS: tl.constexpr, DEEP: tl.constexpr, TILE_ROWS: tl.constexpr, HELD: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The k largest candidates of each row. Candidates are emitted by buckets, listed with their index, or indexed by their place; HELD:
    they fit into SIZE, and their keys stay in registers; what needs more than keys takes CHUNK at a time.

    FLAG: lists the buckets all of whose emitted entries were kept: only they can hide a member. Each holds n / n_buckets kept entries
    of k, which bounds their number. MAPPED: also writes the place of each in the list, and marks the tile that it belongs to."""
    # Longer than 80 lines: one kernel, whose parts share what is in registers.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < n_rows
    if ONLY:
        live = live & (tl.load(only + rows, mask=rows < n_rows, other=0) != 0)
    if tl.sum(live.to(tl.int32), axis=0) > 0:
        lengths = tl.full((ROWS,), 0, tl.int32) + n
        if COUNTED:
            lengths = tl.load(counts + rows, mask=live, other=0)
        _, held, _ = load_candidates(keys, ids, rows, live, lengths, 0, n, stride, n_buckets, EMITTED, LISTED, BUCKETS, DEEP, SIZE)
        key_cut = tl.full((ROWS,), -(2**31), tl.int32)
        index_cut = tl.full((ROWS,), 2**31 - 1, tl.int32)
        at_least = tl.full((ROWS,), 2**31 - 1, tl.int32)  # not below the cut
        step = tl.full((ROWS,), -(2**31), tl.int32)
        for _ in range(32):
            tried = key_cut ^ step
            found = _count(
                held, tried, index_cut, keys, ids, rows, live, lengths, n, stride, n_buckets,
                False, HELD, EMITTED, LISTED, BUCKETS, DEEP, ROWS, CHUNK,
            )  # fmt: skip
            key_cut = tl.where(found >= k, tried, key_cut)
            at_least = tl.where(found >= k, found, at_least)
            step = tl.where(step < 0, 1 << 30, step >> 1)
        if tl.sum((live & (at_least > k)).to(tl.int32), axis=0) > 0:
            above = _count(
                held, key_cut + 1, index_cut, keys, ids, rows, live, lengths, n, stride, n_buckets,
                False, HELD, EMITTED, LISTED, BUCKETS, DEEP, ROWS, CHUNK,
            )  # fmt: skip
            wanted = k - tl.where(key_cut == 2**31 - 1, 0, above)
            # The largest index below which fewer than the wanted number of equal keys lie.
            index_cut = tl.zeros((ROWS,), tl.int32)
            step = tl.full((ROWS,), 1 << 30, tl.int32)
            for _ in range(31):
                tried = index_cut ^ step
                found = _count(
                    held, key_cut, tried, keys, ids, rows, live, lengths, n, stride, n_buckets,
                    True, HELD, EMITTED, LISTED, BUCKETS, DEEP, ROWS, CHUNK,
                )  # fmt: skip
                index_cut = tl.where(found < wanted, tried, index_cut)
                step = step >> 1
        tl.store(cut + rows, key_cut, mask=live)
        tl.store(cut + n_rows + rows, index_cut, mask=live)
        written = tl.zeros((ROWS,), tl.int32)
        for start in range(0, n, CHUNK):
            p, key, index = load_candidates(
                keys, ids, rows, live, lengths, start, n, stride, n_buckets, EMITTED, LISTED, BUCKETS, DEEP, CHUNK
            )
            kept = (key > key_cut[:, None]) | ((key == key_cut[:, None]) & (index <= index_cut[:, None]))
            kept = kept & live[:, None] & (p[None, :] < lengths[:, None])
            number = kept.to(tl.int32)
            to = written[:, None] + tl.cumsum(number, axis=1) - 1
            kept = kept & (to < k)
            tl.store(kept_keys + (rows * kept_stride)[:, None] + to, key, mask=kept)
            tl.store(kept_ids + (rows * kept_stride)[:, None] + to, index, mask=kept)
            written += tl.sum(number, axis=1)
        if FLAG:
            slots = tl.zeros((ROWS,), tl.int32)
            for start in range(n - n_buckets, n, CHUNK):
                p, key, index = load_candidates(
                    keys, ids, rows, live, lengths, start, n, stride, n_buckets, EMITTED, LISTED, BUCKETS, DEEP, CHUNK
                )
                kept = (key > key_cut[:, None]) | ((key == key_cut[:, None]) & (index <= index_cut[:, None]))
                kept = kept & live[:, None] & (p < n)[None, :] & (key != -(2**31))
                number = kept.to(tl.int32)
                to = slots[:, None] + tl.cumsum(number, axis=1) - 1
                bucket = tl.broadcast_to((p - (n - n_buckets))[None, :], to.shape)
                tl.store(flagged + (rows * n_slots)[:, None] + to, bucket, mask=kept & (to < n_slots))
                if MAPPED:
                    here = live[:, None] & (p < n)[None, :]
                    tl.store(slot_of + (rows * n_buckets)[:, None] + bucket, tl.where(kept, to, -1).to(tl.int16), mask=here)
                    mark = tile_flags + (rows // TILE_ROWS * tile_stride)[:, None] + bucket // BUCKETS
                    tl.store(mark, 1, mask=kept)
                slots += tl.sum(number, axis=1)
            tl.store(n_flagged + rows, slots, mask=live)


@kernel(do_not_specialize=["n_rows", "k"])
def rank_kernel(
    keys, ids, chosen, values, indices, n_rows, k,
    CHOSEN: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The kept of each row by descending key, equal ones by ascending index; values in the dtype of ``values``."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < n_rows
    start = tl.program_id(1) * SIZE
    p = start + tl.arange(0, SIZE)
    mask = live[:, None] & (p < k)[None, :]
    key = tl.load(keys + (rows * k)[:, None] + p[None, :], mask=mask, other=0)
    index = tl.load(ids + (rows * k)[:, None] + p[None, :], mask=mask, other=0)
    rank = tl.zeros((ROWS, SIZE), tl.int32)
    for block in range(0, k, SIZE):
        q = block + tl.arange(0, SIZE)
        there = live[:, None] & (q < k)[None, :]
        other = tl.load(keys + (rows * k)[:, None] + q[None, :], mask=there, other=-(2**31))
        other_index = tl.load(ids + (rows * k)[:, None] + q[None, :], mask=there, other=2**31 - 1)
        before = (other[:, None, :] > key[:, :, None]) | (
            (other[:, None, :] == key[:, :, None]) & (other_index[:, None, :] < index[:, :, None])
        )
        rank += tl.sum(before.to(tl.int32), axis=2)
    value = unordered(key)
    if RELU:
        value = tl.where(value < 0, 0.0, value)
    if CHOSEN:
        feature = tl.load(chosen + index, mask=mask, other=0)
    else:
        feature = index.to(tl.int64)
    tl.store(values + (rows * k)[:, None] + rank, value.to(values.dtype.element_ty), mask=mask)
    tl.store(indices + (rows * k)[:, None] + rank, feature, mask=mask)


@kernel(do_not_specialize=["k"])
def score_kernel(
    x, W, centre, scale, bias, indices, values, k, D, x_r, x_d, W_f, W_d,
    CENTRED: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """values[row, s] = the exact score of a row and the feature that indices[row, s] names."""
    n_parts = tl.cdiv(k, COLUMNS)
    row = (tl.program_id(0) // n_parts).to(tl.int64)
    slot = tl.program_id(0) % n_parts * COLUMNS + tl.arange(0, COLUMNS)
    mask = slot < k
    f = tl.load(indices + row * k + slot, mask=mask, other=0)
    x_at = x + (row * x_r + tl.zeros((1,), tl.int64))
    total = exact(x_at, (W + f * W_f)[None, :], centre, D, x_d, W_d, mask[None, :], CENTRED, 1, COLUMNS)
    score = tl.reshape(affine(total, scale, bias, f, mask, SCALED, BIASED), (COLUMNS,))
    tl.store(values + row * k + slot, score.to(values.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- launchers


def _shape(n: int, rows: int) -> tuple[int, int]:
    """(rows, candidates) a program holds."""
    size = min(_SIZE, max(32, triton.next_power_of_2(n)))
    most = 32768 if interpreting() else 1024
    return min(triton.next_power_of_2(rows), max(1, most // size)), size


def options(n: int, rows: int) -> dict[str, int]:
    """Of a walk over n candidates a row."""
    ROWS, SIZE = _shape(n, rows)
    return {"ROWS": ROWS, "SIZE": SIZE, "num_warps": min(16, max(4, SIZE // 256)), "enable_fp_fusion": False}


def select_options(n: int, rows: int) -> dict[str, int]:
    """One warp selects where the candidates fit its registers, as a sum over several waits for all of them at each of 32 bits."""
    found = options(n, rows)
    held, size = n <= found["SIZE"], found["SIZE"]
    if not held or interpreting():
        return {**found, "HELD": held, "CHUNK": size}
    return {**found, "HELD": True, "CHUNK": min(size, 256), "num_warps": 1}


def select(keys: Tensor, ids: Tensor | None, k: int, kept_keys: Tensor, kept_ids: Tensor, counts: Tensor | None = None) -> None:
    """The k largest of keys [rows, n] into kept_keys, kept_ids [rows, k]; index ``ids`` or the place; ``counts [rows]`` live ones."""
    rows, n = keys.shape
    shape = select_options(n, rows)
    cut = torch.empty(2 * rows, dtype=torch.int32, device=keys.device)
    select_kernel[(triton.cdiv(rows, shape["ROWS"]),)](
        keys, ids, counts, None, kept_keys, kept_ids, cut, None, None, None, None,
        rows, n, k, 1, 0, keys.stride(0), kept_keys.stride(0), 0,
        EMITTED=False, LISTED=ids is not None, COUNTED=counts is not None, ONLY=False, FLAG=False, MAPPED=False,
        BUCKETS=1, DEEP=1, TILE_ROWS=1, **shape,
    )  # fmt: skip


def rank(keys: Tensor, ids: Tensor, chosen: Tensor | None, values: Tensor, indices: Tensor, *, relu: bool) -> None:
    """The kept [rows, k] in order, into values and indices (int64, through ``chosen`` where given)."""
    rows, k = keys.shape
    SIZE = min(64, max(16, triton.next_power_of_2(k)))
    ROWS = min(triton.next_power_of_2(rows), 16 if interpreting() else max(1, 1024 // (SIZE * SIZE)))
    rank_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(k, SIZE))](
        keys, ids, chosen, values, indices, rows, k,
        CHOSEN=chosen is not None, RELU=relu, ROWS=ROWS, SIZE=SIZE, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def with_signs(
    x: Tensor, W: Tensor, centre: Tensor | None, scale: Tensor | None, bias: Tensor | None, indices: Tensor, values: Tensor
) -> None:
    """The scores of what was selected by magnitude, into values [rows, k]; ``scale`` and ``bias`` of all features."""
    rows, k = indices.shape
    width = min(64, triton.next_power_of_2(max(k, 1))) if interpreting() else 16
    if values.numel():
        with on(x.device):
            score_kernel[(rows * triton.cdiv(k, width),)](
                x, W, centre, scale, bias, indices, values, k, W.shape[1], *x.stride(), *W.stride(),
                CENTRED=centre is not None, SCALED=scale is not None, BIASED=bias is not None, COLUMNS=width,
                num_warps=2, enable_fp_fusion=False,
            )  # fmt: skip


def sort(keys: Tensor, k: int, chosen: Tensor | None, values: Tensor, indices: Tensor, *, relu: bool) -> None:
    """The k largest of keys [rows, n] in order, by a stable sort of whole rows."""
    keys, order = torch.sort(keys, dim=1, descending=True, stable=True)
    keys, order = keys[:, :k], order[:, :k]
    found = torch.where(keys < 0, keys ^ 0x7FFFFFFF, keys).view(torch.float32)
    values.copy_(torch.where(found < 0, 0.0, found) if relu else found)
    indices.copy_(order if chosen is None else chosen[order])
