"""The k largest entries of each row of given scores: the TopK activation of pre-activations that somebody else has computed.

``encode_topk`` is the product and this selection in one, without the scores in memory; ``select_topk`` is for scores that exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastsae._core import checks
from fastsae.dispatch import Op, preference
from fastsae.latents import TopKLatents
from fastsae.reference import Best, chunks, drawn, tracks

# ---------------------------------------------------------------- reference


def select_topk_reference(z: Tensor, k: int, relu: bool) -> tuple[Tensor, Tensor]:
    best = Best(k)
    for rows in chunks(z.shape[0], z.shape[1]):
        best.add(rows.start, 0, z[rows])
    values, indices = best.result(z.device, z.dtype)
    return (values.relu() if relu else values), indices


# ---------------------------------------------------------------- samples and checks


def _samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    normal = drawn(device, dtype, generator)
    for rows, n in ((5, 7), (1, 1), (0, 4), (3, 33), (2, 2049), (2, 2500)):
        for k in sorted({1, min(n, 17), n}):
            yield normal(rows, n), k, k % 2 == 1
    yield normal(2, 2600).round(), 260, False  # thousands of ties
    yield normal(3, 2200)[:, 9:2160], 5, True
    special = normal(4, 40)
    special[0] = 0
    special[0, ::2] = -0.0
    special[1, 3:6], special[1, 8], special[1, 9] = float("nan"), float("inf"), -float("inf")
    special[2] = -float("inf")
    special[3] = torch.finfo(dtype).tiny / 4
    for k in (3, 40):
        yield special, k, False
        yield special, k, True


def _check(testing: Any, args: tuple[Any, ...], result: tuple[Tensor, Tensor]) -> float:
    """Another way than the reference's: a stable sort of the whole row in float64."""
    z, k, relu = args
    values, indices = z.double().sort(dim=1, descending=True, stable=True)
    values = values[:, :k].relu() if relu else values[:, :k]
    want, got = values.to(z.dtype), result[0]
    if got.dtype != want.dtype:
        raise testing.Mismatch(f"values: expected {want.dtype}, got {got.dtype}")
    parts = [(v.isnan(), v.masked_fill(v.isnan(), 0)) for v in (want, got)]
    return testing.check_equal((*parts[0], indices[:, :k]), (*parts[1], result[1]), "NaN,values,indices")


# ---------------------------------------------------------------- rows

SELECT_TOPK = Op(
    "select_topk(Tensor z, SymInt k, bool relu) -> (Tensor, Tensor)",
    select_topk_reference,
    fake=lambda z, k, relu: (z.new_empty((z.shape[0], k)), z.new_empty((z.shape[0], k), dtype=torch.int64)),
    samples=_samples,
    check=_check,
    workload=lambda *where: (drawn(*where)(256, 16384), 32, True),
    batched=(0,),
)
SELECT_TOPK.row("cuda", "fastsae.native.cuda:select_topk", "fastsae.native.cuda:refuses_select_topk")

# ---------------------------------------------------------------- public


def select_topk(z: Tensor, *, k: int, relu: bool = True, index_dtype: torch.dtype = torch.int64, backend: str | None = None) -> TopKLatents:
    """The k largest of each row of pre-activations that exist already, as latents.

    Args:
        z: ``[.., F]`` float32, bfloat16, float16 or float64; any strides.
        k: latents kept a row, ``1 <= k <= F``.
        relu: clamp the kept values at 0 after the selection.
        index_dtype: torch.int64 or torch.int32.
        backend: see ``fastsae.use_backend``.

    Returns:
        ``TopKLatents``: values ``[.., k]`` in the dtype of ``z``, descending; indices ``[.., k]``, unique in a row.

    Exact and deterministic: equal values: lower index first, -0 == +0 (and may come out as +0); NaN ranks above +inf. ``torch.topk``
    leaves open which of equal values it keeps. The gradient flows through kept entries, with ``relu`` only where the value is above 0,
    never through NaN. Where only ``x`` and the weights exist, ``encode_topk`` never forms ``z``. Memory beyond the output: 8 bytes a
    latent in the CUDA row (k at most 2048); in the reference temporaries of 64 MiB each.

    Raises: TypeError: dtype. ValueError: shape or k.

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093).
    """
    op = "select_topk"
    checks.tensor(op, "z", z)
    if z.dim() == 0:
        raise ValueError(f"{op}: z must have shape [.., F], got []")
    n = z.shape[-1]
    k = checks.integer(op, "k", k, 1, n, f"F={n}")
    checks.flag(op, "relu", relu)
    dtype = checks.index_dtype(op, index_dtype, n)
    batch = z.shape[:-1]
    flat = z.reshape(batch.numel(), n)
    values, indices = SELECT_TOPK(flat.detach(), k, relu, backend=preference(backend))
    if tracks(op, z):  # the same values once more, with the gradient of a gather
        kept = values > 0 if relu else ~values.isnan()
        values = torch.where(kept, flat.gather(1, indices), values)
    values, indices = values.reshape(*batch, k), indices.reshape(*batch, k)
    return TopKLatents(values, indices if dtype is torch.int64 else indices.to(dtype), n)
