"""The compiled Hamming distances; csrc/fastsae.h is the contract of every function."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.native.loader import call, expect, unavailable


def refuses_codes(*tensors: Tensor | None) -> str | None:
    """Why no function over packed codes can serve these tensors, or None."""
    if (reason := unavailable()) is not None:
        return reason
    for t in tensors:
        if t is not None and not t.is_cpu:
            return f"device {t.device} (supported: cpu)"
    return None


def refuses_hamming(a: Tensor, b: Tensor, out: Tensor) -> str | None:
    if out.numel() and 1 not in out.shape and 1 not in out.stride():
        return f"out with strides {out.stride()} (supported: stride 1 along one dimension)"
    return refuses_codes(a, b, out)


def refuses_hamming_topk(a: Tensor, b: Tensor, k: int) -> str | None:
    if b.shape[0] >= 2**32:
        return f"{b.shape[0]} codes in b (supported: fewer than 2^32)"
    return refuses_codes(a, b)


def code_rows(codes: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Codes with stride 1 along the words, and where: their address, number, the stride of a row, words."""
    if codes.shape[1] > 1 and codes.stride(1) != 1:
        codes = codes.contiguous()
    return codes, (codes.data_ptr(), codes.shape[0], codes.stride(0), codes.shape[1])


def hamming(a: Tensor, b: Tensor, out: Tensor, *, vpopcnt: bool = True) -> None:
    """out[i, j] = the number of bits that differ between a[i] and b[j].

    Args:
        a, b: [N, words] and [M, words] int64; copied where the words of a code are not adjacent.
        out: [N, M] int32, stride 1 along one dimension.
        vpopcnt: False: as on a CPU without AVX512_VPOPCNTDQ, for tests.
    """
    if a.shape[1] != b.shape[1] or out.shape != (a.shape[0], b.shape[0]):
        raise ValueError(f"hamming: a {list(a.shape)}, b {list(b.shape)}, out {list(out.shape)}")
    expect(torch.int64, a, b)
    expect(torch.int32, out)
    (a, left), (b, right) = code_rows(a), code_rows(b)
    if (reason := refuses_hamming(a, b, out)) is not None:
        raise ValueError(f"hamming: {reason}")
    call("hamming", left, right, out.data_ptr(), *out.stride(), vpopcnt)


def hamming_topk(a: Tensor, b: Tensor, k: int, *, vpopcnt: bool = True) -> tuple[Tensor, Tensor]:
    """The k nearest rows of b for every row of a: distances [N, k] int32 ascending, indices [N, k] int64; ties by index. As `hamming`."""
    if a.shape[1] != b.shape[1] or not 0 <= k <= b.shape[0]:
        raise ValueError(f"hamming_topk: a {list(a.shape)}, b {list(b.shape)}, k {k}")
    expect(torch.int64, a, b)
    (a, left), (b, right) = code_rows(a), code_rows(b)
    distance = torch.empty((a.shape[0], k), dtype=torch.int32, device="cpu")
    index = torch.empty((a.shape[0], k), dtype=torch.int64, device="cpu")
    call("hamming_topk", left, right, k, distance.data_ptr(), index.data_ptr(), vpopcnt)
    return distance, index
