"""The compiled cosine matching; csrc/fastsae.h is the contract of every function."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.native.encode import rounded, score_refusal
from fastsae.native.loader import DTYPES, call_engine, expect, load, unsupported

_MOST_COLUMN_BEST = 8  # of match_pair in one pass; more take a pass for each direction
_refuses = score_refusal()


def refuses_match_cosine(a: Tensor, b: Tensor, k: int, absolute: bool, exclude_self: bool, eps: float) -> str | None:
    if b.shape[0] >= 2**30:
        return f"{b.shape[0]} rows of b (supported: fewer than 2^30)"
    if eps < 1e-30:
        return f"eps {eps} (supported: from 1e-30, below which rows of denormals count)"
    return _refuses(a, b)


def refuses_match_pair(a: Tensor, b: Tensor, k_ab: int, k_ba: int, eps: float) -> str | None:
    return refuses_match_cosine(a, b, k_ab, False, False, eps)


def _arguments(a: Tensor, b: Tensor, eps: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Both dictionaries as structures of csrc/fastsae.h, a as x and b as W."""
    expect(b.dtype, a, b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"expected a [N, D] and b [M, D], got {list(a.shape)} and {list(b.shape)}")
    return (
        (a.data_ptr(), DTYPES[a.dtype], a.shape[0], *a.stride(), 0, eps),
        (b.data_ptr(), DTYPES[b.dtype], *b.stride(), b.shape[1], b.shape[0], 0, eps, 0),
    )


def match_cosine(
    a: Tensor,
    b: Tensor,
    k: int,
    absolute: bool,
    exclude_self: bool,
    eps: float,
    *,
    path: str = "auto",
    stats: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The k rows of b most similar to each row of a: (similarity, index) [N, k]; exact by the score of csrc/fastsae.h.

    Args:
        a: [N, D], b: [M, D], any strides; read in place. path, stats: as in ``call_engine``.
    """
    if not 0 <= k <= b.shape[0] - (1 if exclude_self else 0):
        raise ValueError(f"match_cosine: k {k} for {b.shape[0]} rows of b")
    similarity = torch.empty((a.shape[0], k), dtype=torch.float32, device="cpu")
    index = torch.empty((a.shape[0], k), dtype=torch.int64, device="cpu")
    call_engine("match_cosine", path, stats, *_arguments(a, b, eps), k, absolute, exclude_self, similarity.data_ptr(), index.data_ptr())
    return rounded(similarity, a.dtype), index


def match_pair(
    a: Tensor, b: Tensor, k_ab: int, k_ba: int, eps: float, *, one_pass: bool = True, stats: dict[str, int] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both directions and each row's lowest similarity; in one pass where the level screens and k_ba is at most 8."""
    n, m = a.shape[0], b.shape[0]
    if not (0 < k_ab <= m and 0 < k_ba <= n):
        raise ValueError(f"match_pair: k_ab {k_ab}, k_ba {k_ba} for {n} and {m} rows")
    if one_pass and load().packs(a.shape[1]) and k_ba <= _MOST_COLUMN_BEST and 32 * k_ab <= m:
        shapes = ((n, k_ab), (m, k_ba), (n,))
        (ab, ba, low), (ab_index, ba_index, low_index) = (
            [torch.empty(shape, dtype=dtype, device="cpu") for shape in shapes] for dtype in (torch.float32, torch.int64)
        )
        written = (t.data_ptr() for t in (ab, ab_index, ba, ba_index, low, low_index))
        if not unsupported(call_engine("match_pair", None, stats, *_arguments(a, b, eps), k_ab, k_ba, *written)):
            return rounded(ab, a.dtype), ab_index, rounded(ba, a.dtype), ba_index, rounded(low, a.dtype), low_index
    low, low_index = match_cosine(-a, b, 1, False, False, eps)
    return *match_cosine(a, b, k_ab, False, False, eps), *match_cosine(b, a, k_ba, False, False, eps), -low[:, 0], low_index[:, 0]
