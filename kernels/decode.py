"""Sparse decode on a GPU: gathers of weight rows, summed in an order that the code fixes.

    decode           for each row r, columns d:             one program: 1 warp, 512 bytes of a weight row
                         for blocks of 16 slots, in order:
                             block = 0; for each slot s:    block = fma(value[s], W[index[s], d], block)
                             total += block
                         y[r, d] = round(total + b[d])
    decode_dvalues   for each row r, 16 slots s:            one program: 2 warps
                         for blocks of 128 columns, in order:
                             lane[j] = fma over columns j, j+32, j+64, j+96 of grad[r] * W[index[s]]
                             dvalue[s] += pairwise tree over the 32 lanes
    decode_dweight   key[s] = index[s]; stable sort: slots by feature, then by row and slot     (the transposed latents)
                     for each 128 slots of one feature, but not its last: partial[c] = decode of these slots from grad
                     for each feature f:                    out[f] = sum of its partials, in order, + decode of the slots left

Bytes, for nnz slots, n rows, F features, D columns, weights of e bytes an element:
    decode           nnz (D e + 12) + n D e            each 512-byte column of W is reused from L2 by all rows where F * 512 fits there
    decode_dvalues   nnz (D e + 12) + n D e
    decode_dweight   nnz (D e + 60) + F D e + nnz / 128 * D * 8, and no [nnz, D]; one dense feature is many programs
Two operations per gathered element, so all three are bound by memory.

A matrix whose columns, not rows, are contiguous (W = parameter.T) would cost a 32-byte sector an element. Where that is more than
moving the matrix once, panels of its columns are turned into a workspace of at most 64 MiB (or 128 columns) that the gathers read;
the values, hence the bits, do not change.

Every sum is a chain of fma or a tree written out element by element, so its bits do not depend on the batch, on strides, alignment
or on how Triton lays a tile over threads. A bad index loads nothing: it makes its row (decode) or its entry (decode_dvalues) NaN, is
left out of decode_dweight, and sets the device's flag. On the CPU, where the interpreter runs, the launchers raise instead.
"""

# pyright: basic, reportMissingImports=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportReturnType=false
# Device code is Python only in form, and Triton's own annotations say constexpr where it takes and returns int.

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae._core import flags
from fastsae._core.jit import kernel
from fastsae.kernels._tile import on
from fastsae.latents import Slots

SLOTS = 16  # decode_dvalues: slots a program holds
SPLIT = 128  # decode_dweight: slots of one feature summed by one program
MAX_PARTIALS = 1 << 16  # decode_dweight: SPLIT doubles until this many partial sums suffice
PANEL_BYTES = 64 << 20  # workspace of one panel
SECTOR = 32  # bytes a GPU moves for one element at the least

REGISTERS = 96  # a thread's bound; without one ptxas spills a few on sm_100 to fit more programs

_BLOCK = tl.constexpr(16)  # slots summed before they are added to the total
_UNROLL = tl.constexpr(8)  # gathered rows in flight
_LANES = tl.constexpr(32)
_LANE_COLUMNS = tl.constexpr(4)

# ---------------------------------------------------------------- device code


@triton.jit
def _sum_slots(values, indices, W, start, end, n_features, stride_f, columns, mask):
    """Slots start .. end: (their sum over ``columns`` in float32, whether an index was bad). ``columns`` are offsets into a row of W."""
    total = tl.zeros(columns.shape, tl.float32)
    bad = end < start
    for first in range(start, end, _BLOCK):
        block = tl.zeros(columns.shape, tl.float32)
        for group in range(first, tl.minimum(first + _BLOCK, end), _UNROLL):
            for u in tl.static_range(_UNROLL):
                slot = group + u
                live = slot < end
                index = tl.load(indices + slot, mask=live, other=0).to(tl.int64)
                value = tl.load(values + slot, mask=live, other=0).to(tl.float32)
                known = (index >= 0) & (index < n_features)
                bad = bad | (live & (known == 0))
                w = tl.load(W + index * stride_f + columns, mask=mask & (live & known), other=0).to(tl.float32)
                block = tl.fma(tl.broadcast_to(value, columns.shape), w, block)
        total += block
    return total, bad


@triton.jit
def _row_slots(crow, row, k, n_slots, RAGGED: tl.constexpr):
    """Where the slots of a row start and end; inside 0 .. n_slots whatever ``crow`` holds."""
    if RAGGED:
        start = tl.maximum(tl.load(crow + row), 0)
        end = tl.minimum(tl.load(crow + row + 1), n_slots)
    else:
        start = row * k
        end = start + k
    return start, end


@kernel(do_not_specialize=["k", "n_slots", "n_features"])
def decode_kernel(
    values, indices, crow, W, b, y, flag, k, n_slots, n_features, n_columns, stride_f, stride_d, stride_y,
    RAGGED: tl.constexpr, BIAS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = d < n_columns
    start, end = _row_slots(crow, row, k, n_slots, RAGGED)
    total, bad = _sum_slots(values, indices, W, start, end, n_features, stride_f, d * stride_d, mask)
    if BIAS:
        total += tl.load(b + d, mask=mask, other=0).to(tl.float32)
    total = tl.where(bad, float("nan"), total)
    tl.store(y + row * stride_y + d, total.to(y.dtype.element_ty), mask=mask)
    tl.store(flag, 1, mask=bad)


@triton.jit
def _sum_lanes(x, ROWS: tl.constexpr):
    """[ROWS, 32] -> [ROWS]: neighbours are added, five times."""
    for level in tl.static_range(5):
        left, right = tl.split(tl.reshape(x, (ROWS, 16 >> level, 2)))
        x = left + right
    return tl.reshape(x, (ROWS,))


@kernel(do_not_specialize=["k", "n_slots", "n_features"])
def decode_dvalues_kernel(
    grad, indices, crow, W, dvalues, flag, k, n_slots, n_features, n_columns, stride_r, stride_g, stride_f, stride_d,
    RAGGED: tl.constexpr, RESUME: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first, end = _row_slots(crow, row, k, n_slots, RAGGED)
    for group in range(first + tl.program_id(1) * SLOTS, end, tl.num_programs(1) * SLOTS):
        slot = group + tl.arange(0, SLOTS)
        live = slot < end
        index = tl.load(indices + slot, mask=live, other=0).to(tl.int64)
        known = (index >= 0) & (index < n_features)
        w_rows = (W + index * stride_f)[:, None]
        w_mask = (live & known)[:, None]
        if RESUME:
            total = tl.load(dvalues + slot, mask=live, other=0)
        else:
            total = tl.zeros((SLOTS,), tl.float32)
        for block in range(0, n_columns, _LANES * _LANE_COLUMNS):
            lanes = tl.zeros((SLOTS, _LANES), tl.float32)
            for u in tl.static_range(_LANE_COLUMNS):
                d = tl.cast(block, tl.int64) + u * _LANES + tl.arange(0, _LANES)
                mask = d < n_columns
                g = tl.load(grad + row * stride_r + d * stride_g, mask=mask, other=0).to(tl.float32)
                w = tl.load(w_rows + (d * stride_d)[None, :], mask=w_mask & mask[None, :], other=0).to(tl.float32)
                lanes = tl.fma(tl.broadcast_to(g[None, :], (SLOTS, _LANES)), w, lanes)
            total += _sum_lanes(lanes, SLOTS)
        total = tl.where(known, total, float("nan"))
        if RESUME:
            tl.debug_barrier()  # what is written was read by other warps too
        tl.store(dvalues + slot, total.to(dvalues.dtype.element_ty), mask=live)
        tl.store(flag + tl.zeros((SLOTS,), tl.int32), 1, mask=live & (known == 0))


@kernel(do_not_specialize=["n_slots", "n_features"])
def sort_keys_kernel(indices, keys, flag, n_slots, n_features, SIZE: tl.constexpr):
    """The feature of each slot, -1 where it is out of range."""
    slot = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    live = slot < n_slots
    index = tl.load(indices + slot, mask=live, other=0).to(tl.int64)
    known = (index >= 0) & (index < n_features)
    tl.store(keys + slot, tl.where(known, index, -1).to(keys.dtype.element_ty), mask=live)
    tl.store(flag + tl.zeros((SIZE,), tl.int32), 1, mask=live & (known == 0))


@kernel(do_not_specialize=["n_features", "n_rows", "split"])
def decode_partials_kernel(
    values, rows, grad, segments, chunks, owner, partials, n_features, n_rows, n_columns, split, stride_r, stride_g, stride_p,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """partials[c] = the c-th full run of ``split`` slots, counted over the features that have more slots than that."""
    chunk = tl.program_id(0).to(tl.int64)
    feature = tl.load(owner + chunk)
    if feature < n_features:
        d = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        mask = d < n_columns
        start = tl.load(segments + feature) + (chunk - tl.load(chunks + feature)) * split
        total, _ = _sum_slots(values, rows, grad, start, start + split, n_rows, stride_r, d * stride_g, mask)
        tl.store(partials + chunk * stride_p + d, total, mask=mask)


@triton.jit
def sum_feature(values, rows, grad, segments, chunks, partials, feature, d, along, mask, n_rows, split, stride_r, stride_p):
    """(a feature's partial sums, in order, and its slots left; whether it has slots): columns ``d``, at ``along`` in a row of grad."""
    first = tl.load(chunks + feature)
    last = tl.load(chunks + feature + 1)
    total = tl.zeros(d.shape, tl.float32)
    for chunk in range(first, last):
        total += tl.load(partials + chunk * stride_p + d, mask=mask, other=0)
    start = tl.load(segments + feature)
    end = tl.load(segments + feature + 1)
    rest, _ = _sum_slots(values, rows, grad, start + (last - first) * split, end, n_rows, stride_r, along, mask)
    return total + rest, end > start


@kernel(do_not_specialize=["n_rows", "split"])
def decode_dweight_kernel(
    values, rows, grad, segments, chunks, partials, out, n_rows, n_columns, split, stride_r, stride_g, stride_p, stride_f, stride_d,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = d < n_columns
    total, _ = sum_feature(
        values, rows, grad, segments, chunks, partials, feature, d, d * stride_g, mask, n_rows, split, stride_r, stride_p
    )
    tl.store(out + feature * stride_f + d * stride_d, total.to(out.dtype.element_ty), mask=mask)


@kernel
def turn_kernel(source, target, n_rows, n_columns, source_r, source_c, target_r, target_c, SIZE: tl.constexpr):
    """target = source, by tiles that are read and written along the contiguous side of each."""
    r = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    c = tl.program_id(1).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = (r < n_rows)[:, None] & (c < n_columns)[None, :]
    tile = tl.load(source + (r * source_r)[:, None] + (c * source_c)[None, :], mask=mask)
    tl.store(target + (r * target_r)[:, None] + (c * target_c)[None, :], tile, mask=mask)


# ---------------------------------------------------------------- launchers


def decode(values: Tensor, indices: Tensor, crow: Tensor | None, W: Tensor, b: Tensor | None) -> Tensor:
    """y [rows, D] in the dtype of W: the bias plus the weighted sum of the rows of W that each row's slots name."""
    (n_features, D), rows = W.shape, _n_rows(indices, crow)
    check_on_cpu(indices, crow, n_features)
    y = torch.empty((rows, D), dtype=W.dtype, device=W.device)
    if rows == 0:
        return y
    values, indices, crow, k = _slots(values, indices, crow)
    b = None if b is None else b.contiguous()
    with on(W.device):
        flag = flags.flag(W.device)
        for part, panel in _panels(W, indices.numel()):
            size = _columns(panel)
            decode_kernel[rows, _blocks(panel.shape[1], size)](
                values, indices, crow, panel, None if b is None else b[part], y[:, part], flag,
                k, indices.numel(), n_features, panel.shape[1], panel.stride(0), panel.stride(1), D,
                RAGGED=crow is not None, BIAS=b is not None, COLUMNS=size, num_warps=1, maxnreg=REGISTERS, enable_fp_fusion=False,
            )  # fmt: skip
    return y


def decode_dvalues(grad: Tensor, indices: Tensor, crow: Tensor | None, W: Tensor) -> Tensor:
    """dvalues, shaped like ``indices``, in the dtype of grad [rows, D]: the dot product of a slot's row of grad and row of W."""
    n_features, rows = W.shape[0], grad.shape[0]
    check_on_cpu(indices, crow, n_features)
    shape, n_slots = indices.shape, indices.numel()
    if n_slots == 0 or rows == 0:
        return torch.empty(shape, dtype=grad.dtype, device=grad.device)
    indices, crow, k = _slots(indices, indices, crow)[1:]
    groups = triton.cdiv(n_slots, rows * SLOTS)
    with on(W.device):
        flag = flags.flag(W.device)
        panels = _panels(W, n_slots)
        several = _is_turned(W, n_slots)
        dvalues = torch.empty(n_slots, dtype=torch.float32 if several else grad.dtype, device=grad.device)
        for part, panel in panels:
            # A slot's sum does not depend on which program forms it, so a small batch may spread its rows.
            decode_dvalues_kernel[rows, min(groups, max(1, 4096 // rows))](
                grad[:, part], indices, crow, panel, dvalues, flag,
                k, n_slots, n_features, panel.shape[1], grad.stride(0), grad.stride(1), panel.stride(0), panel.stride(1),
                RAGGED=crow is not None, RESUME=part.start > 0, SLOTS=SLOTS, num_warps=2, maxnreg=REGISTERS, enable_fp_fusion=False,
            )  # fmt: skip
    return dvalues.to(grad.dtype).reshape(shape)


def decode_dweight(values: Tensor, indices: Tensor, crow: Tensor | None, grad: Tensor, out: Tensor) -> None:
    """out [F, D], every row written: the sum of value * grad[row] over the slots that name the feature, in (row, slot) order."""
    (n_features, D), n_slots = out.shape, indices.numel()
    check_on_cpu(indices, crow, n_features)
    if n_slots == 0:
        out.zero_()
        return
    with on(out.device):
        values, row, segments, split, chunks, owner = by_feature(values, indices, crow, n_features)
        if out.numel() == 0:
            return
        n_partials, turned = owner.numel(), _is_turned(out, n_features)
        bytes_per_column = max(n_partials * 4, n_features * out.element_size() if turned else 0)
        width = D if not turned and bytes_per_column * D <= PANEL_BYTES else _panel_width(D, bytes_per_column)
        if _is_turned(grad, n_slots):
            width = min(width, _panel_width(D, grad.shape[0] * grad.element_size()))
        work = torch.empty((n_features, width), dtype=out.dtype, device=out.device) if turned else None
        partials = torch.empty((n_partials, width), dtype=torch.float32, device=out.device)
        for part, panel in _panels(grad, n_slots, width):
            size, n_columns = _columns(panel), panel.shape[1]
            target = out[:, part] if work is None else work[:, :n_columns]
            if n_partials:
                decode_partials_kernel[n_partials, _blocks(n_columns, size)](
                    values, row, panel, segments, chunks, owner, partials,
                    n_features, panel.shape[0], n_columns, split, panel.stride(0), panel.stride(1), width,
                    COLUMNS=size, num_warps=1, maxnreg=REGISTERS, enable_fp_fusion=False,
                )  # fmt: skip
            decode_dweight_kernel[n_features, _blocks(n_columns, size)](
                values, row, panel, segments, chunks, partials, target,
                panel.shape[0], n_columns, split, panel.stride(0), panel.stride(1), width, target.stride(0), target.stride(1),
                COLUMNS=size, num_warps=1, maxnreg=REGISTERS, enable_fp_fusion=False,
            )  # fmt: skip
            if work is not None:
                _turn(target, out[:, part])


def by_feature(values: Tensor, indices: Tensor, crow: Tensor | None, n_features: int) -> tuple[Tensor, Tensor, Tensor, int, Tensor, Tensor]:
    """(values and rows of the slots in stable order of their feature, bounds [F + 1] of each feature's run in it, slots a chunk, first
    chunk of each feature [F + 1], feature of each chunk or F). Bad slots stand before all runs; how many chunks there are, the host need
    not know."""
    values, indices, crow, k = _slots(values, indices, crow)
    # The narrowest key that holds -1 .. F-1: a radix sort passes over each of its bytes.
    dtype = torch.int16 if n_features <= 1 << 15 else torch.int32 if n_features <= 1 << 31 else torch.int64
    keys = torch.empty(indices.shape, dtype=dtype, device=indices.device)
    sort_keys_kernel[(triton.cdiv(keys.numel(), 1024),)](
        indices, keys, flags.flag(indices.device), keys.numel(), n_features, SIZE=1024, enable_fp_fusion=False
    )
    keys, order = torch.sort(keys, stable=True)
    segments = torch.searchsorted(keys, torch.arange(-1, n_features, dtype=dtype, device=keys.device), right=True)
    row = order // max(k, 1) if crow is None else torch.searchsorted(crow, order, right=True) - 1
    split = SPLIT
    while keys.numel() // split > MAX_PARTIALS:
        split *= 2
    chunks = torch.zeros_like(segments)
    torch.cumsum((segments.diff() - 1).clamp_(min=0) // split, 0, out=chunks[1:])
    owner = torch.searchsorted(chunks, torch.arange(keys.numel() // split, device=segments.device), right=True) - 1
    return values[order], row, segments, split, chunks, owner


def _is_turned(matrix: Tensor, n_reads: int) -> bool:
    """Whether reading ``n_reads`` rows element by element moves more bytes than turning the matrix first."""
    (rows, columns), size = matrix.shape, matrix.element_size()
    touched = min(SECTOR, matrix.stride(1) * size)
    return rows > 0 and columns > 1 and n_reads * (touched - size) > rows * 2 * size


def _panel_width(columns: int, bytes_per_column: int) -> int:
    """Columns of a workspace: 256, or 128 where these would pass PANEL_BYTES; a multiple of what decode_dvalues sums at once."""
    return min(columns, 256 if bytes_per_column * 256 <= PANEL_BYTES else 128)


def _panels(matrix: Tensor, n_reads: int, width: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Column ranges that cover ``matrix``, each with its columns, in a workspace where they must be turned to be gathered by row."""
    rows, columns = matrix.shape
    turned = _is_turned(matrix, n_reads)
    if turned and width is None:
        width = _panel_width(columns, rows * matrix.element_size())
    if width is None or columns == 0:
        yield slice(0, columns), matrix
        return
    work = torch.empty((rows, width), dtype=matrix.dtype, device=matrix.device) if turned else None
    for start in range(0, columns, width):
        part = slice(start, min(start + width, columns))
        panel = matrix[:, part]
        if work is not None:
            panel = _turn(panel, work[:, : panel.shape[1]])
        yield part, panel


def _turn(source: Tensor, target: Tensor) -> Tensor:
    rows, columns = source.shape
    grid = triton.cdiv(rows, 64), triton.cdiv(columns, 64)
    turn_kernel[grid](source, target, rows, columns, *source.stride(), *target.stride(), SIZE=64, num_warps=4, enable_fp_fusion=False)
    return target


def _columns(matrix: Tensor) -> int:
    """Columns a one-warp program holds: 16 bytes a thread where rows can be read so, 2 elements elsewhere; fewer for a narrow matrix."""
    size = matrix.element_size()
    wide = matrix.stride(1) == 1 and matrix.stride(0) * size % 16 == 0 and matrix.data_ptr() % 16 == 0
    return min(512 // size if wide else 64, max(32, triton.next_power_of_2(matrix.shape[1])))


def _blocks(columns: int, size: int) -> int:
    return max(1, triton.cdiv(columns, size))  # one program a row looks at the indices even where D is 0


def _n_rows(indices: Tensor, crow: Tensor | None) -> int:
    return indices.shape[0] if crow is None else crow.shape[0] - 1


def _slots(values: Tensor, indices: Tensor, crow: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Flat contiguous values and indices (views where they can be), crow, and the slots of a row where all have the same."""
    k = indices.shape[1] if crow is None else 0
    return values.reshape(-1).contiguous(), indices.reshape(-1).contiguous(), None if crow is None else crow.contiguous(), k


def check_on_cpu(indices: Tensor, crow: Tensor | None, n_features: int) -> None:
    """In the interpreter: what elsewhere sets the device's flag raises at once."""
    if indices.device.type == "cpu":
        slots = Slots(indices, indices, crow)
        slots.safe(n_features, "latents.indices")
        if crow is not None:
            slots.bounds()
