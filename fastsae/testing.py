"""Verification against the references: what ``fastsae verify``, the contract suite and your own tests use.

Tolerance of values: the error against float64 may be at most twice the error of the plain PyTorch computation in the same dtype, plus
two units in the last place of the sum of magnitudes. Selections may differ from float64 only inside the rounding band of their score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastsae.reference import accumulator, centre, scores


class Mismatch(AssertionError):
    """A result that its specification does not allow; the message names the first offending element."""


def _double(arg: Any) -> Any:
    return arg.double() if isinstance(arg, Tensor) and arg.dtype.is_floating_point else arg


def _magnitude(arg: Any) -> Any:
    return arg.double().abs() if isinstance(arg, Tensor) and arg.dtype.is_floating_point else arg


def check_linear(reference: Callable[..., Any], args: tuple[Any, ...], result: Tensor) -> float:
    """Checks an operation that is linear in its floating inputs; returns the error as a fraction of the allowed one.

    Args:
        reference: the specification; called in float64, in the dtype of ``args``, and on magnitudes.
        args, result: what the operation got and returned.

    Raises:
        Mismatch: shape, dtype, NaN or infinity in another place, or an error above the tolerance.
    """
    plain = reference(*args)
    exact = reference(*map(_double, args))
    size = reference(*map(_magnitude, args))
    return check_values(result, exact, plain, size)


def check_values(result: Tensor, exact: Tensor, plain: Tensor, size: Tensor) -> float:
    """Checks a result by the tolerance of values; returns the error as a fraction of the allowed one.

    Args:
        exact: in float64. plain: the plain PyTorch computation in the dtype that the result must have. size: the sum of magnitudes.
    """
    if result.shape != plain.shape or result.dtype != plain.dtype:
        raise Mismatch(f"expected {list(plain.shape)} {plain.dtype}, got {list(result.shape)} {result.dtype}")
    return _compare(result.double(), exact, plain.double(), size, torch.finfo(result.dtype))


def _compare(result: Tensor, exact: Tensor, plain: Tensor, size: Tensor, info: torch.finfo) -> float:
    if result.numel() == 0:
        return 0.0
    finite = exact.isfinite() & plain.isfinite() & size.isfinite()
    wrong = ~finite & ~((result == plain) | (result.isnan() & plain.isnan()))
    _raise_first(wrong & (exact.isnan() | exact.isinf()), result, plain, "NaN or infinity differs")
    size = size + info.tiny
    plain_error = ((plain - exact).abs() / size)[finite]
    relative = float(plain_error.max()) if plain_error.numel() else 0.0
    allowed = (2 * relative + 2 * info.eps) * size
    error = torch.where(finite, (result - exact).abs(), 0.0)
    _raise_first(
        (error > allowed) | (finite & result.isnan()),
        result,
        exact,
        f"error above 2 x plain PyTorch + 2 ulp ({2 * relative / info.eps + 2:.2f} ulp)",
    )
    return float((error / allowed).max())


def _raise_first(wrong: Tensor, got: Tensor, want: Tensor, what: str) -> None:
    if bool(wrong.any()):
        where = tuple(wrong.nonzero()[0].tolist())
        count = int(wrong.sum())
        raise Mismatch(
            f"{what}: {count} of {wrong.numel()} elements, first at {list(where)}: "
            f"got {float(got[where])!r}, expected {float(want[where])!r}"
        )


def check_equal(expected: Any, result: Any, names: str) -> float:
    """Checks integer or boolean results bit for bit; ``names`` is a comma-separated list of what the results are."""
    expected = expected if isinstance(expected, tuple) else (expected,)
    result = result if isinstance(result, (tuple, list)) else (result,)
    for name, want, got in zip(names.split(","), expected, result, strict=True):
        if got.shape != want.shape or got.dtype != want.dtype:
            raise Mismatch(f"{name}: expected {list(want.shape)} {want.dtype}, got {list(got.shape)} {got.dtype}")
        wrong = got != want
        if bool(wrong.any()):
            where = tuple(wrong.nonzero()[0].tolist())
            raise Mismatch(
                f"{name}: {int(wrong.sum())} of {wrong.numel()} differ, first at {list(where)}: got {got[where]}, expected {want[where]}"
            )
    return 0.0


# ---------------------------------------------------------------- selections


@dataclass(frozen=True)
class Score:
    """Scores ``[rows, n]`` in float64, what a value may be off, and the band within which float32 cannot order two of them.

    The band is 0 throughout where every order of summation gives the same float32 score (small integers): ties are then ties everywhere.
    """

    exact: Tensor
    tolerance: Tensor
    band: Tensor
    unit: float


def score_band(x: Tensor, W: Tensor, b: Tensor | None, b_pre: Tensor | None = None, scale: Tensor | None = None) -> Score:
    """The score of an encoder in float64 with its tolerance and its rounding band ``2 gamma_{D+3} (|b| + sum |x w|)`` + denormals."""
    xc, wide = centre(x, b_pre), accumulator(x.dtype)
    exact = scores(xc.double(), W.double(), _double(b), _double(scale))
    size = scores(_magnitude(xc), _magnitude(W), _magnitude(b), _magnitude(scale))
    plain = scores(xc, W, b, scale).double()
    # A product that underflows in float32 makes NaN of an infinite scale, where float64 has an infinity: the score is float32's.
    exact = torch.where(exact.isfinite() | plain.isfinite(), exact, plain)
    unit, tiny = torch.finfo(wide).eps / 2, torch.finfo(wide).tiny
    terms = x.shape[1] + 3
    finite = exact.isfinite() & size.isfinite() & plain.isfinite()
    relative = torch.where(finite, (plain - exact).abs() / (size + tiny), 0.0)
    worst = float(relative.max()) if relative.numel() else 0.0
    out = torch.finfo(x.dtype)
    rounding = exact.abs() * out.eps / 2 + out.smallest_normal * out.eps if x.dtype != wide else 0.0
    tolerance = (2 * worst + 4 * unit) * size + terms * tiny + rounding
    band = 2 * terms * unit / (1 - terms * unit) * size + 2 * terms * tiny
    if _sums_are_exact(size, wide, xc, W, b, scale):
        return Score(exact, torch.zeros_like(exact) + rounding, torch.zeros_like(exact), unit)
    return Score(exact, torch.where(finite, tolerance, 0.0), torch.where(finite, band, 0.0), unit)


def _sums_are_exact(size: Tensor, wide: torch.dtype, *terms: Tensor | None) -> bool:
    """Whether all terms are integers and no sum of magnitudes exceeds the mantissa."""
    integers = all(bool((t.isfinite() & (t == t.round())).all()) for t in terms if t is not None)
    return integers and bool((size <= 2 / torch.finfo(wide).eps).all())


def _same(got: Tensor, want: Tensor, tolerance: Tensor, dtype: torch.dtype, what: str) -> float:
    """Values equal within a tolerance, after both are in the range of ``dtype``; NaN where expected."""
    if got.numel() == 0:
        return 0.0
    limit = torch.finfo(dtype).max
    got = got.double()
    beyond = want.abs() > limit * (1 - torch.finfo(dtype).eps)
    wrong = (got - want).abs() > tolerance
    wrong = torch.where(beyond, ~(got * want.sign() >= limit * 0.99), wrong | (got.isnan() != want.isnan()))
    _raise_first(wrong & ~(got.isnan() & want.isnan()), got, want, what)
    ratio = (got - want).abs() / tolerance
    ratio = ratio[ratio.isfinite() & ~beyond]
    return float(ratio.max()) if ratio.numel() else 0.0


def _restrict(score: Score, chosen: Tensor | None) -> Score:
    if chosen is None:
        return score
    return Score(score.exact[:, chosen], score.tolerance[:, chosen], score.band[:, chosen], score.unit)


def _local(indices: Tensor, chosen: Tensor | None, n: int) -> Tensor:
    """Positions of feature indices among the chosen features; Mismatch where one is not chosen."""
    indices = indices.long()
    if chosen is None:
        if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= n):
            raise Mismatch(f"indices: outside 0 .. {n - 1}")
        return indices
    local = torch.searchsorted(chosen, indices).clamp_max(max(chosen.shape[0] - 1, 0))
    if indices.numel() and (chosen.numel() == 0 or bool((chosen[local] != indices).any())):
        raise Mismatch("indices: a feature that was not chosen")
    return local


def _expect(condition: Tensor, what: str) -> None:
    if not bool(condition.all()):
        raise Mismatch(f"{what}: row {int((~condition).nonzero()[0][0])}")


def by_magnitude(score: Score, result: tuple[Tensor, Tensor]) -> tuple[Score, tuple[Tensor, Tensor]]:
    """Scores and a top-k of them as magnitudes, for ``check_topk``; Mismatch where a kept value has not the sign of its score."""
    values, indices = result
    if values.shape == indices.shape and values.shape[0] == score.exact.shape[0]:
        kept, tolerance = (t.gather(1, indices) for t in (score.exact, score.tolerance))
        _expect(~((values.double() * kept < 0) & (kept.abs() > tolerance)), "the sign of a value selected by magnitude differs")
    return replace(score, exact=score.exact.abs()), (values.abs(), indices)


def check_topk(score: Score, chosen: Tensor | None, k: int, relu: bool, result: tuple[Tensor, Tensor], dtype: torch.dtype) -> float:
    """Checks the properties of an exact top-k: values, order, ties, uniqueness, and that nothing better was left out."""
    values, indices = result
    score = _restrict(score, chosen)
    rows, n = score.exact.shape
    if values.shape != (rows, k) or indices.shape != (rows, k) or values.dtype != dtype or indices.dtype != torch.int64:
        raise Mismatch(
            f"expected [{rows}, {k}] {dtype} and int64, got {list(values.shape)} {values.dtype}, {list(indices.shape)} {indices.dtype}"
        )
    local = _local(indices, chosen, n)
    if rows == 0 or k == 0:
        return 0.0
    _expect(local.sort(1).values.diff(dim=1) > 0, "indices repeat")
    kept = score.exact.gather(1, local)
    band = score.band.gather(1, local)
    tolerance = score.tolerance.gather(1, local)
    nans = score.exact.isnan()
    nan_count = nans.sum(1, keepdim=True).clamp_max(k)
    first_nans = torch.where(nans, torch.arange(n, device=nans.device), n).sort(1).values[:, :k]
    leading = torch.arange(k, device=nans.device) < nan_count
    _expect(torch.where(leading, local == first_nans, ~kept.isnan()), "NaN must come first, lower index first")
    error = _same(values, kept.relu() if relu else kept, tolerance, dtype, "values")
    finite_pair = kept[:, 1:].isfinite() & kept[:, :-1].isfinite()
    slack = torch.maximum(band[:, 1:], band[:, :-1])
    _expect(~finite_pair | (kept[:, 1:] - kept[:, :-1] <= slack), "not descending by score")
    _expect(~(kept[:, 1:] > kept[:, :-1]) | finite_pair, "not descending by score")
    if dtype in (torch.float32, torch.float64):
        tie = (values[:, 1:] == values[:, :-1]) & ((values[:, 1:] != 0) | (not relu))
        _expect(~tie | (local[:, 1:] > local[:, :-1]), "equal values: lower index first")
    worst, worst_band = kept[:, -1:], band[:, -1:]
    rejected = torch.ones_like(nans).scatter_(1, local, False) & ~nans
    better = torch.where(
        score.exact.isfinite() & worst.isfinite(), score.exact - worst > torch.maximum(score.band, worst_band), score.exact > worst
    )
    _expect(~(rejected & better & ~worst.isnan()), "a better score was left out")
    if not bool(score.band.any()):
        place = torch.arange(n, device=nans.device)
        same = kept[:, 1:] == kept[:, :-1]
        _expect(~same | (local[:, 1:] > local[:, :-1]), "equal scores: lower index first")
        _expect(~(rejected & (score.exact == worst) & (place < local[:, -1:])), "equal scores: the lower index was left out")
    return error


def _ragged_dense(
    result: tuple[Tensor, Tensor, Tensor], chosen: Tensor | None, rows: int, n: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(row, local column, kept mask [rows, n]) of a checked ragged result."""
    values, col, crow = result
    if (
        crow.shape != (rows + 1,)
        or col.shape != values.shape
        or values.dtype != dtype
        or col.dtype != torch.int64
        or crow.dtype != torch.int64
    ):
        raise Mismatch(
            f"expected crow [{rows + 1}] and equal values and col in {dtype}, got {list(crow.shape)}, {list(values.shape)} {values.dtype}"
        )
    lengths = crow.diff()
    if int(crow[0]) != 0 or int(crow[-1]) != values.shape[0] or bool((lengths < 0).any()):
        raise Mismatch("crow must rise from 0 to nnz")
    local = _local(col, chosen, n)
    row = torch.arange(rows, device=crow.device).repeat_interleave(lengths)
    if local.numel() > 1 and bool(((row[1:] == row[:-1]) & (local[1:] <= local[:-1])).any()):
        raise Mismatch("columns must ascend in a row")
    mask = torch.zeros(rows, n, dtype=torch.bool, device=crow.device)
    mask[row, local] = True
    return row, local, mask


def check_threshold(
    score: Score, chosen: Tensor | None, threshold: Tensor, bandwidth: float | None, result: tuple[Tensor, ...], dtype: torch.dtype
) -> float:
    """Checks that exactly the scores above the threshold (with a bandwidth also those in it) are stored, outside the rounding band."""
    values, col, crow, flags = result
    score = _restrict(score, chosen)
    rows, n = score.exact.shape
    row, local, stored = _ragged_dense((values, col, crow), chosen, rows, n, dtype)
    theta = threshold.double()
    theta = (theta if theta.dim() == 0 or chosen is None else theta[chosen]).expand(n)
    gap = score.exact - theta.clamp_min(0)
    slack = score.band + theta.abs() * score.unit * 2
    active = (gap > 0) | score.exact.isnan()
    sure = (gap.abs() > slack) | (score.band == 0) | ~score.exact.isfinite()
    got_active = stored
    slots = values.shape[0] if bandwidth is not None else 0
    if flags.shape != (slots,) or flags.dtype is not torch.uint8:
        raise Mismatch(f"flags: expected [{slots}] uint8, got {list(flags.shape)} {flags.dtype}")
    if bandwidth is not None:
        if bool((flags > 3).any()):
            raise Mismatch("flags: only bits 1 (active) and 2 (in the band) may be set")
        if bool((values[(flags & 1) == 0] != 0).any()):
            raise Mismatch("values: a slot that is not active must be 0")
        got_active = torch.zeros_like(stored)
        got_active[row, local] = (flags & 1).bool()
        got_band = torch.zeros_like(stored)
        got_band[row, local] = (flags & 2).bool()
        distance = (score.exact - theta).abs()
        in_band = distance < bandwidth / 2
        sure_band = ((distance - bandwidth / 2).abs() > slack + bandwidth * score.unit * 2) | ~score.exact.isfinite()
        _expect(~sure_band | (got_band == in_band), "the straight-through band differs")
        _expect(stored == (got_active | got_band), "a slot is neither active nor in the band")
    _expect(~sure | (got_active == active), "active entries differ")
    want = torch.where(got_active, score.exact, 0.0)[row, local]
    return _same(values, want, score.tolerance[row, local], dtype, "values")


def check_batch_topk(score: Score, chosen: Tensor | None, total: int, result: tuple[Tensor, ...], dtype: torch.dtype) -> float:
    """Checks that the kept entries are the ``total`` largest positive scores of the batch, outside the rounding band."""
    values, col, crow, min_kept = result
    score = _restrict(score, chosen)
    rows, n = score.exact.shape
    row, local, stored = _ragged_dense((values, col, crow), chosen, rows, n, dtype)
    exact, band = score.exact, score.band
    nans = exact.isnan()
    surely_positive = int((nans | (exact > band)).sum())
    maybe_positive = int((nans | (exact > -band)).sum())
    nnz = values.shape[0]
    if not min(total, surely_positive) <= nnz <= min(total, maybe_positive):
        raise Mismatch(f"kept {nnz} entries, expected {min(total, surely_positive)} .. {min(total, maybe_positive)}")
    wide = torch.promote_types(dtype, torch.float32)
    if min_kept.shape != () or min_kept.dtype != wide:
        raise Mismatch(f"min_kept: expected a {wide} number, got {list(min_kept.shape)} {min_kept.dtype}")
    _expect(~stored | nans | (exact > -band), "a score that is not positive was kept")
    if nnz == 0:
        if float(min_kept) != float("inf"):
            raise Mismatch(f"min_kept: expected inf where nothing is kept, got {float(min_kept)}")
        return 0.0
    kept = torch.where(stored & ~nans, exact, torch.inf)
    at = int(kept.argmin())
    low, low_band = kept.flatten()[at], band.flatten()[at]
    if nnz == total:
        better = torch.where(exact.isfinite() & low.isfinite(), exact - low > torch.maximum(band, low_band), exact > low)
        _expect(stored | nans | ~better, "a better score was left out")
        if bool((stored & ~nans).any()):
            _expect(stored | ~nans, "NaN ranks first and was left out")
    if nnz < total:
        _expect(stored | ~(nans | (exact > band)), "a positive score was left out")
    if not bool(band.any()):
        ranked = exact.flatten().sort(descending=True, stable=True).indices[:nnz]  # NaN first
        _expect(stored.flatten()[ranked].reshape(1, -1), "equal scores: lower row, then lower feature first")
    smallest = low if bool((stored & ~nans).any()) else low.new_full((), torch.nan)
    same = bool(min_kept.isnan()) if bool(smallest.isnan()) else float(min_kept) == float(low.to(min_kept.dtype))
    if not same and not abs(float(min_kept) - float(low)) <= 2 * float(low_band + score.tolerance.flatten()[at]):
        raise Mismatch(f"min_kept: got {float(min_kept)}, expected {float(smallest)}")
    return _same(values, exact[row, local], score.tolerance[row, local], dtype, "values")


def check_gated(gate: Score, magnitude: Score, result: tuple[Tensor, ...], dtype: torch.dtype) -> float:
    """Checks that exactly the entries with an open gate and a positive magnitude are stored, outside the rounding bands."""
    rows, n = gate.exact.shape
    row, local, stored = _ragged_dense(result, None, rows, n, dtype)  # pyright: ignore[reportArgumentType]
    nans = gate.exact.isnan() | magnitude.exact.isnan()
    opens = [~(score.exact <= 0) for score in (gate, magnitude)]
    sures = [(score.exact.abs() > score.band) | (score.band == 0) for score in (gate, magnitude)]
    closed = (sures[0] & ~opens[0]) | (sures[1] & ~opens[1])
    _expect(~(closed & stored), "an entry with a closed gate or without magnitude was kept")
    _expect(~(sures[0] & sures[1] & opens[0] & opens[1]) | stored, "an entry with an open gate was left out")
    want = torch.where(nans, torch.nan, magnitude.exact.relu())[row, local]
    return _same(result[0], want, magnitude.tolerance[row, local], dtype, "values")
