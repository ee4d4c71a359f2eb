"""What verifies the rows of the encoders: inputs that are hard for them, and checks against float64."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fastsae._core import checks
from fastsae.packed import PackedWeights
from fastsae.reference import accumulator, drawn


def encode_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    """(x, W, b, b_pre, scale, features) over shapes, both weight layouts, ties, flat rows, NaN, infinities."""
    normal = drawn(device, dtype, generator)
    for rows, width, n in ((5, 16, 40), (1, 1, 1), (0, 8, 9), (3, 0, 7), (33, 31, 129), (4, 300, 64)):
        x, W = normal(rows, width), normal(n, width)
        yield x, W, normal(n), None, None, None
        yield x, normal(width, n).T, None, normal(width), normal(n), None
        subset = torch.randperm(n, generator=generator, device="cpu")[: n // 2 + 1].to(device)
        yield x, W, normal(n), normal(width), None, subset
        mask = torch.zeros(n, dtype=torch.bool, device=device).index_fill(0, subset, True)
        yield x, W, None, None, normal(n), mask
    x, W = normal(6, 12), normal(50, 12)
    tied = W.clone()
    tied[10:30] = tied[4]
    yield x, tied, None, None, None, None
    flat = x.clone()
    flat[2] = 0
    yield flat, W, None, None, None, None
    special = x.clone()
    special[1, 3], special[3, 0], special[4, 1] = float("nan"), float("inf"), -float("inf")
    broken = W.clone()
    broken[7, 2] = float("nan")
    yield special, broken, normal(50), None, None, None
    integers = torch.randint(-4, 5, (9, 16), generator=generator, device="cpu").to(device=device, dtype=dtype)
    few = torch.randint(-2, 3, (200, 16), generator=generator, device="cpu").to(device=device, dtype=dtype)
    yield integers, few, None, None, None, None
    yield x[::2, 1::2], W[::3, 1::2], None, None, None, None
    yield normal(1, 12).expand(4, 12), W, None, None, None, None


def _packed(W: Tensor, count: int) -> Tensor | None:
    """A handle's words for every second sample, where this machine has a use for them."""
    return PackedWeights(W).words("samples") if count % 2 else None


def _room(x: Tensor, W: Tensor, count: int) -> int | None:
    """A capacity that any result fits, for every third sample."""
    return x.shape[0] * W.shape[0] + 1 if count % 3 == 1 else None


def topk_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for absolute, samples in (((), encode_samples), ((True,), _opposite_samples)):
        for count, sample in enumerate(samples(device, dtype, generator)):
            features = sample[5]
            n = sample[1].shape[0] if features is None else int(features.sum()) if features.dtype is torch.bool else features.shape[0]
            for k in sorted({1, min(n, 7), n}):
                yield *sample, _packed(sample[1], count), k, not absolute and count % 2 == 0, *absolute


def _opposite_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    """For a selection by magnitude: some of ``encode_samples``, and scores that are opposite to others, bit for bit."""
    yield from islice(encode_samples(device, dtype, generator), 0, None, 3)
    normal = drawn(device, dtype, generator)
    x, W = normal(7, 24), normal(40, 24)
    W[20:] = -W[:20]  # s and -s
    zeros = x.clone()
    zeros[3] = 0  # 0 and -0
    for scale in (None, torch.where(torch.arange(40, device=device) % 3 == 0, -1, 1).to(dtype)):
        yield zeros, W, None, None, scale, None
    special = x.clone()
    special[0, 1], special[2, 0], special[5, 3] = float("nan"), float("inf"), -float("inf")
    yield special, W, normal(40), normal(24), None, torch.arange(1, 40, 2, device=device)


def threshold_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for count, (x, W, b, b_pre, scale, features) in enumerate(encode_samples(device, dtype, generator)):
        per_feature = drawn(device, dtype, generator)(W.shape[0])
        for threshold, bandwidth in ((torch.zeros((), device=device, dtype=dtype), None), (per_feature, None), (per_feature, 0.5)):
            yield x, W, b, b_pre, scale, features, _packed(W, count), threshold, bandwidth, _room(x, W, count)


def batch_topk_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for count, sample in enumerate(encode_samples(device, dtype, generator)):
        for k in (0.4, 3, 1e6):
            yield *sample, _packed(sample[1], count), float(k), _room(sample[0], sample[1], count)


def gated_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    normal = drawn(device, dtype, generator)
    for count, (x, W, _, b_pre, _, features) in enumerate(encode_samples(device, dtype, generator)):
        if features is None:
            n = W.shape[0]
            yield x, W, normal(n), normal(n) / 4, normal(n), b_pre, _packed(W, count // 4), _room(x, W, count)


def layer(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(x, W, b) of a moderate SAE with unit rows."""
    normal = drawn(device, dtype, generator)
    W = normal(16384, 512)
    return normal(256, 512), W / torch.linalg.vector_norm(W, dim=1, keepdim=True), normal(16384) / 10


def threshold_workload(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    return *layer(device, dtype, generator), None, None, None, None, torch.tensor(2.5, device=device, dtype=torch.float32), None


def gated_workload(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    x, W, b = layer(device, dtype, generator)
    return x, W, b - 2.5, b, b, None, None


def check_topk(testing: Any, args: tuple[Any, ...], result: Any) -> float:
    x, W, b, b_pre, scale, features, _, k, relu, *absolute = args
    score = testing.score_band(x, W, b, b_pre, scale)
    chosen = checks.sorted_subset(features, W.shape[0], "features")
    if absolute == [True]:
        score, result = testing.by_magnitude(score, result)
    return testing.check_topk(score, chosen, k, relu, result, x.dtype)


def _filled(testing: Any, given: list[int | None], result: Any, flagged: bool = False) -> tuple[Tensor, ...]:
    """The entries of a ragged result; Mismatch unless it has exactly the capacity that was given, slots after the entries empty."""
    values, col, crow, *rest = result
    capacity = given[0] if given else None
    if capacity is None:
        return values, col, crow, *rest
    n, slots = int(crow[-1]), [values, col, *rest[:flagged]]
    for slot in slots:
        if slot.shape != (capacity,) or bool((slot[n:] != 0).any()):
            raise testing.Mismatch(f"slots after the {n} entries must be 0, {capacity} in all, got {list(slot.shape)}: {slot[n:]}")
    return values[:n], col[:n], crow, *(slot[:n] for slot in rest[:flagged]), *rest[flagged:]


def check_threshold(testing: Any, args: tuple[Any, ...], result: Any) -> float:
    x, W, b, b_pre, scale, features, _, threshold, bandwidth, *capacity = args
    score = testing.score_band(x, W, b, b_pre, scale)
    result = _filled(testing, capacity, result, bandwidth is not None)
    return testing.check_threshold(score, checks.sorted_subset(features, W.shape[0], "features"), threshold, bandwidth, result, x.dtype)


def check_batch_topk(testing: Any, args: tuple[Any, ...], result: Any) -> float:
    x, W, b, b_pre, scale, features, _, k, *capacity = args
    score = testing.score_band(x, W, b, b_pre, scale)
    result = _filled(testing, capacity, result)
    return testing.check_batch_topk(score, checks.sorted_subset(features, W.shape[0], "features"), int(k * x.shape[0]), result, x.dtype)


def check_gated(testing: Any, args: tuple[Any, ...], result: Any) -> float:
    x, W, b_gate, r_mag, b_mag, b_pre, _, *capacity = args
    result = _filled(testing, capacity, result)
    gate = testing.score_band(x, W, b_gate, b_pre, None)
    magnitude = testing.score_band(x, W, b_mag, b_pre, r_mag.to(accumulator(x.dtype)).exp())
    # Two correct exponentials differ by 2 ulp each: 8 units of the magnitudes, which the band counts D + 3 times twice.
    extra = magnitude.band * 4 / (x.shape[1] + 3)
    magnitude = testing.Score(magnitude.exact, magnitude.tolerance + extra, magnitude.band + 2 * extra, magnitude.unit)
    return testing.check_gated(gate, magnitude, result, x.dtype)
