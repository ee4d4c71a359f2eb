"""Hamming distances between packed codes, all pairs or the k nearest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae import _checks
from fastsae.dispatch import Op, preference
from fastsae.ops._common import chunks, full_precision
from fastsae.ops.encode import merge_topk, select_topk

# ---------------------------------------------------------------- references


def _bits(words: Tensor) -> Tensor:
    """``[n, w]`` int64 to ``[n, 64 w]`` float32 zeros and ones."""
    return ((words.unsqueeze(-1) >> torch.arange(64, device=words.device)) & 1).float().flatten(1)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """``|a| + |b| - 2 <a, b>``: exact in float32 below 2^24 bits."""
    with full_precision():
        return a.sum(1, keepdim=True) + b.sum(1) - 2 * (a @ b.T)


def _tiles(a: Tensor, b: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    width = a.shape[1] * 64
    column_tiles = list(chunks(b.shape[0], max(width, min(a.shape[0], 4096))))
    step = column_tiles[0].stop if column_tiles else 0  # the same row tiles beside every column tile, the last and narrower one too
    for columns in column_tiles:
        right = _bits(b[columns])
        for rows in chunks(a.shape[0], max(width, step)):
            yield rows, columns, _distances(_bits(a[rows]), right)


def hamming_reference(a: Tensor, b: Tensor, out: Tensor) -> None:
    for rows, columns, distance in _tiles(a, b):
        out[rows, columns] = distance.to(out.dtype)


def hamming_topk_reference(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best: dict[int, tuple[Tensor, Tensor]] = {}
    for rows, columns, distance in _tiles(a, b):
        near, index = select_topk(-distance, min(k, distance.shape[1]))
        index = index + columns.start
        if rows.start in best:
            near, index = merge_topk([best[rows.start][0], near], [best[rows.start][1], index], k)
        best[rows.start] = (near, index)
    if not best:
        return torch.empty(0, k, dtype=torch.int32, device=a.device), torch.empty(0, k, dtype=torch.int64, device=a.device)
    kept = [best[start] for start in sorted(best)]
    return (-torch.cat([near for near, _ in kept])).to(torch.int32), torch.cat([index for _, index in kept])


# ---------------------------------------------------------------- samples and checks


def _codes(device: torch.device, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**63), 2**63 - 1, shape, generator=generator).to(device)

    for n, m, w in ((5, 7, 3), (1, 1, 1), (0, 4, 2), (4, 0, 2), (3, 2, 0), (65, 130, 16)):
        yield words(n, w), words(m, w)
    codes = words(40, 4)
    codes[10:20] = codes[3]
    yield codes[::2, 1:], codes[:, 1:]


def _pair(device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes of a moderate layer."""
    codes = torch.randint(-(2**63), 2**63 - 1, (2, 1024, 16), generator=generator).to(device)
    return codes[0], codes[1]


def _samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple]:
    for a, b in _codes(device, generator):
        yield a, b, torch.empty(a.shape[0], b.shape[0], dtype=torch.int32, device=device)
        yield a, b, torch.empty(b.shape[0], a.shape[0], dtype=torch.int32, device=device).T


def _topk_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple]:
    for a, b in _codes(device, generator):
        for k in sorted({1, min(6, b.shape[0]), b.shape[0]}):
            if 1 <= k <= b.shape[0]:
                yield a, b, k


def _popcount(a: Tensor, b: Tensor) -> Tensor:
    """Distances one word and one bit at a time: another way than the reference's product."""
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for word in range(a.shape[1]):
        different = a[:, word : word + 1] ^ b[:, word]
        for bit in range(64):
            total += ((different >> bit) & 1).to(torch.int32)
    return total


def _check(args: tuple, result: Any) -> float:
    from fastsae.testing import check_equal

    return check_equal(_popcount(args[0], args[1]), result, "distances")


def _check_topk(args: tuple, result: Any) -> float:
    from fastsae.testing import check_equal

    a, b, k = args
    distance, index = _popcount(a, b).sort(dim=1, stable=True)
    return check_equal((distance[:, :k], index[:, :k]), result, "distance,index")


# ---------------------------------------------------------------- rows

HAMMING = Op(
    "hamming(Tensor a, Tensor b, Tensor(a!) out) -> ()",
    hamming_reference,
    fake=lambda a, b, out: None,
    samples=_samples,
    check=_check,
    workload=lambda device, dtype, generator: (*_pair(device, generator), torch.empty(1024, 1024, dtype=torch.int32, device=device)),
    mutates=(2,),
    dtypes=(torch.int64,),
)
HAMMING_TOPK = Op(
    "hamming_topk(Tensor a, Tensor b, SymInt k) -> (Tensor, Tensor)",
    hamming_topk_reference,
    fake=lambda a, b, k: (a.new_empty((a.shape[0], k), dtype=torch.int32), a.new_empty((a.shape[0], k))),
    samples=_topk_samples,
    check=_check_topk,
    workload=lambda device, dtype, generator: (*_pair(device, generator), 8),
    batched=(0,),
    dtypes=(torch.int64,),
)

# ---------------------------------------------------------------- public


class Neighbours(NamedTuple):
    """The k nearest codes: ``distance [N, k]`` int32 ascending, ``index [N, k]`` int64."""

    distance: Tensor
    index: Tensor


def _inputs(op: str, a: Any, b: Any) -> None:
    _checks.tensor(op, "a", a, (torch.int64,))
    _checks.tensor(op, "b", b, (torch.int64,), a)
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"{op}: a [N, words] and b [M, words] must have the same number of words, got {list(a.shape)} and {list(b.shape)}")


def hamming(a: Tensor, b: Tensor, out: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Number of differing bits of all pairs of packed codes.

    Args:
        a: ``[N, words]`` int64 as ``spline_code`` returns them; any strides. b: ``[M, words]`` int64.
        out: ``[N, M]`` int32 to write into: at 4096 x 4096, filling fresh memory costs more than the distances.
        backend: see ``fastsae.use_backend``.

    Returns:
        ``[N, M]`` int32, 0 .. 64 * words (``out`` where given). Exact. Memory beyond it: temporaries of 64 MiB each in the reference.

    Raises: TypeError: dtype or device. ValueError: shape.
    """
    op = "hamming"
    _inputs(op, a, b)
    if out is None:
        out = torch.empty(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    else:
        _checks.tensor(op, "out", out, (torch.int32,), a)
        _checks.shape(op, "out", out, (a.shape[0], b.shape[0]), f"[N={a.shape[0]}, M={b.shape[0]}]")
        _checks.writable(op, "out", out)
    HAMMING(a, b, out, backend=preference(backend))
    return out


def hamming_topk(a: Tensor, b: Tensor, k: int, *, backend: str | None = None) -> Neighbours:
    """The k nearest rows of ``b`` for every row of ``a``, by distance, then the lower index.

    Args:
        a, b, backend: as in ``hamming``. k: ``1 <= k <= M``.

    Returns:
        ``Neighbours(distance, index)``: ``[N, k]`` int32 ascending; int64. Exact. Nothing grows with ``N * M``.

    Raises: TypeError: dtype or device. ValueError: shape or k.
    """
    op = "hamming_topk"
    _inputs(op, a, b)
    _checks.integer(op, "k", k, 1, b.shape[0], f"M={b.shape[0]}")
    return Neighbours(*HAMMING_TOPK(a, b, k, backend=preference(backend)))
