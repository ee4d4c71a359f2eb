"""Distinct codes and their multiplicities: hash first, then sort, which ``torch.unique(dim=0)`` on whole codes does many times slower."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae._core import checks
from fastsae.dispatch import Op, preference


def count_codes_reference(hashes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if hashes.dim() == 1:
        return torch.unique(hashes, return_inverse=True, return_counts=True)
    n = hashes.shape[0]
    order = torch.arange(n, device=hashes.device)
    for column in range(hashes.shape[1] - 1, -1, -1):
        order = order[hashes[order, column].sort(stable=True).indices]
    ranked = hashes[order]
    first = torch.ones(n, dtype=torch.bool, device=hashes.device)
    first[1:] = (ranked[1:] != ranked[:-1]).any(1)
    group = first.long().cumsum(0) - 1
    inverse = torch.empty_like(order).scatter_(0, order, group)
    starts = first.nonzero().flatten()
    counts = torch.cat([starts, starts.new_full((1,), n)]).diff()
    return ranked[starts], inverse, counts


def _samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for n, distinct in ((50, 9), (1, 1), (0, 1), (1000, 10**6)):
        values = torch.randint(-(2**63), 2**63 - 1, (distinct, 2), generator=generator, device="cpu").to(device)
        pick = torch.randint(0, distinct, (n,), generator=generator, device="cpu").to(device)
        yield (values[pick, 0],)
        yield (values[pick],)
        yield (torch.stack([values[pick, 0] >> 62, values[pick, 1]], 1),)


def _check(testing: Any, args: tuple[Any, ...], result: Any) -> float:
    rows = args[0].tolist()
    keys = [tuple(row) if isinstance(row, list) else row for row in rows]
    ranked = sorted(set(keys))
    place = {key: i for i, key in enumerate(ranked)}
    device = args[0].device
    unique = torch.tensor(ranked, dtype=torch.int64, device=device).reshape(len(ranked), *args[0].shape[1:])
    inverse = torch.tensor([place[key] for key in keys], dtype=torch.int64, device=device)
    counts = torch.bincount(inverse, minlength=len(ranked))
    return testing.check_equal((unique, inverse, counts), result, "unique,inverse,counts")


def _fake(hashes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    distinct = torch.library.get_ctx().new_dynamic_size()
    return hashes.new_empty((distinct, *hashes.shape[1:])), hashes.new_empty(hashes.shape[0]), hashes.new_empty(distinct)


COUNT_CODES = Op(
    "count_codes(Tensor hashes) -> (Tensor, Tensor, Tensor)",
    count_codes_reference,
    fake=_fake,
    samples=_samples,
    check=_check,
    workload=lambda device, dtype, generator: (torch.randint(0, 5000, (65536,), generator=generator, device="cpu").to(device),),
    dtypes=(torch.int64,),
)


class UniqueCodes(NamedTuple):
    """``unique [U]`` (``[U, words]``) ascending as signed integers, ``inverse [N]`` and ``counts [U]`` int64."""

    unique: Tensor
    inverse: Tensor
    counts: Tensor


def count_codes(hashes: Tensor, *, backend: str | None = None) -> UniqueCodes:
    """Distinct codes, which of them each sample has, and how often each occurs.

    Args:
        hashes: ``[N]`` int64 (64-bit hashes), or ``[N, words]`` int64 (128-bit hashes with 2 words; packed codes work too, slower).
        backend: see ``fastsae.use_backend``.

    Returns:
        ``UniqueCodes``: ``unique`` ascending (rows lexicographically), ``unique[inverse] == hashes``, ``counts`` summing to N. Exact for
        the hashes given; two of N distinct codes share a 64-bit hash with probability about N^2 / 2^65 (10^7 codes: 3e-6).

    Raises: TypeError: dtype or device. ValueError: shape.
    """
    op = "count_codes"
    checks.tensor(op, "hashes", hashes, (torch.int64,))
    if hashes.dim() not in (1, 2) or (hashes.dim() == 2 and hashes.shape[1] == 0):
        raise ValueError(f"{op}: hashes must have shape [N] or [N, words], got {list(hashes.shape)}")
    return UniqueCodes(*COUNT_CODES(hashes, backend=preference(backend)))
