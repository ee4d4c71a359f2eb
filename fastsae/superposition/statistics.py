"""How real activations are distributed, from one pass over a stream: where the assumptions of toy data hold, and where they fail."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsae._core import checks, processes

_LOW, _HIGH = -24, 16
"""Binary exponents of the magnitudes that have bins of their own: 2^-24 to 2^16."""


class ActivationStatistics:
    """Moments, quantiles and sparsity of activations, per neuron and over all of them, from a stream.

    Args:
        n_neurons: their number D.
        sub_bins: bins per factor of 2 in magnitude, for quantiles: the relative error of a quantile is at most ``0.5 / sub_bins``.
        zero: magnitudes up to this count as 0 in ``sparsity`` (a ReLU's zeros: 0; a GELU's tail: more).

    ``update(x)`` takes ``[.., D]`` of any floating dtype and device; sums are kept in float64 on the CPU, counts in int64. Memory: about
    ``640 * sub_bins * D`` bytes for the bins. NaN and infinite entries raise. Statistics of a merge are those of one stream: counts,
    sparsity and quantiles are equal, moments equal up to the rounding of float64 (Chan, Golub & LeVeque 1983; Pebay 2008).

    Quantiles come from bins of constant relative width, as in DDSketch (Masson, Rim & Lee 2019); magnitudes below ``2^-24`` count as 0
    there, those above ``2^16`` as ``2^16``. (All of them enter moments as they are.)

    Example:
        >>> statistics = ActivationStatistics(3072)
        >>> for x in torch.randn(3, 2, 16, 3072):
        ...     statistics = statistics.update(x, mask=torch.ones(2, 16))
        >>> statistics.kurtosis()  # [3072], excess: 0 for a normal distribution
        >>> statistics.overall()["sparsity"]
    """

    def __init__(self, n_neurons: int, *, sub_bins: int = 16, zero: float = 0.0):
        op = "ActivationStatistics"
        self.n_neurons = checks.integer(op, "n_neurons", n_neurons, 1)
        self.sub_bins = checks.integer(op, "sub_bins", sub_bins, 1, 1024)
        self.zero = checks.number(op, "zero", zero, positive=False)
        if zero < 0:
            raise ValueError(f"{op}: zero must be at least 0, got {zero}")
        self.count = 0
        """Rows seen."""
        # Mean, and sums of the 2nd, 3rd and 4th powers about it.
        self._moments = torch.zeros(4, n_neurons, dtype=torch.float64, device="cpu")
        self._zeros = torch.zeros(n_neurons, dtype=torch.int64, device="cpu")
        self._positive = torch.zeros(n_neurons, dtype=torch.int64, device="cpu")
        self._range = torch.tensor([[math.inf], [-math.inf]], dtype=torch.float64, device="cpu").repeat(1, n_neurons)
        self._half = (_HIGH - _LOW) * self.sub_bins + 1  # bins of one sign; the last one is the overflow
        self._bins = torch.zeros(n_neurons, 2 * self._half + 1, dtype=torch.int64, device="cpu")

    def update(self, x: Tensor, mask: Tensor | None = None) -> ActivationStatistics:
        """Counts a batch ``[.., D]``; ``mask [..]``, bool or 0 and 1: rows that count. Returns itself.

        Raises: TypeError, ValueError: arguments, and entries that are not finite (nothing is counted then).
        """
        op = "ActivationStatistics.update"
        checks.tensor(op, "x", x)
        if x.dim() == 0 or x.shape[-1] != self.n_neurons:
            raise ValueError(f"{op}: x must have shape [.., D={self.n_neurons}], got {list(x.shape)}")
        if mask is not None:
            mask = checks.mask(op, "mask", mask, x)
            checks.shape(op, "mask", mask, tuple(x.shape[:-1]), str(list(x.shape[:-1])))
        rows = (x.reshape(-1, self.n_neurons) if mask is None else x[mask]).detach().cpu()
        if not bool(rows.isfinite().all()):
            raise ValueError(f"{op}: x must be finite")
        step = max(1, (1 << 22) // self.n_neurons)
        for start in range(0, rows.shape[0], step):
            self._add(rows[start : start + step].double())
        return self

    def _add(self, x: Tensor) -> None:
        mean = x.mean(0)
        centred = x - mean
        squares = centred.square()
        moments = torch.stack([mean, squares.sum(0), (squares * centred).sum(0), squares.square().sum(0)])
        self._combine(x.shape[0], moments)
        self._zeros += (x.abs() <= self.zero).sum(0)
        self._positive += (x > self.zero).sum(0)
        self._widen(x.amin(0), x.amax(0))
        place = self._place(x) + torch.arange(self.n_neurons, device="cpu") * self._bins.shape[1]
        self._bins += torch.bincount(place.flatten(), minlength=self._bins.numel()).view_as(self._bins)

    def _place(self, x: Tensor) -> Tensor:
        """Bin of each value: negative ones from the largest magnitude on, zero in the middle, positive ones ascending."""
        mantissa, exponent = torch.frexp(x.abs())  # magnitude = mantissa * 2^exponent, mantissa in [0.5, 1)
        inner = ((exponent - 1 - _LOW) * self.sub_bins + ((2 * mantissa - 1) * self.sub_bins).long()).clamp_(max=self._half - 1)
        offset = torch.where((x == 0) | (inner < 0), 0, inner + 1)
        return torch.where(x < 0, self._half - offset, self._half + offset)

    def _combine(self, count: int, other: Tensor) -> None:
        if count == 0:
            return
        n, m = self.count, count
        total = n + m
        (mean_a, a2, a3, a4), (mean_b, b2, b3, b4) = self._moments, other
        d = mean_b - mean_a
        third = a3 + b3 + d**3 * (n * m * (n - m) / total**2) + 3 * d * (n * b2 - m * a2) / total
        fourth = (
            a4
            + b4
            + d**4 * (n * m * (n * n - n * m + m * m) / total**3)
            + 6 * d**2 * (n * n * b2 + m * m * a2) / total**2
            + 4 * d * (n * b3 - m * a3) / total
        )
        self._moments = torch.stack([mean_a + d * (m / total), a2 + b2 + d**2 * (n * m / total), third, fourth])
        self.count = total

    def merge(self, other: ActivationStatistics) -> ActivationStatistics:
        """Adds what another object of the same size has seen; ``other`` stays as it is. Returns itself."""
        op = "ActivationStatistics.merge"
        checks.instance(op, "other", other, ActivationStatistics, "ActivationStatistics")
        mine, theirs = ((s.n_neurons, s.sub_bins, s.zero) for s in (self, other))
        if mine != theirs:
            raise ValueError(f"{op}: other must have (n_neurons, sub_bins, zero) = {mine}, got {theirs}")
        self._combine(other.count, other._moments)
        self._zeros += other._zeros
        self._positive += other._positive
        self._bins += other._bins
        self._widen(*other._range)
        return self

    def _widen(self, low: Tensor, high: Tensor) -> None:
        self._range = torch.stack([torch.minimum(self._range[0], low), torch.maximum(self._range[1], high)])

    def merged(self, group: Any = None) -> ActivationStatistics:
        """What those of all processes of a torch.distributed group have seen together: a new object, of the same bits on each of them;
        called by all. None: the default group; a copy without one. Raises as ``merge``, on all processes."""
        first, *others = processes.everyones(self, group)
        for other in others:
            first.merge(other)
        return first

    # ------------------------------------------------------------ results, [D] in float64

    def _seen(self) -> int:
        if self.count == 0:
            raise ValueError("ActivationStatistics: nothing has been counted yet")
        return self.count

    def mean(self) -> Tensor:
        """``[D]``."""
        self._seen()
        return self._moments[0].clone()

    def variance(self) -> Tensor:
        """``[D]``, divided by the number of rows."""
        return self._moments[1] / self._seen()

    def skewness(self) -> Tensor:
        """``[D]``: third central moment over sd^3; 0 for a neuron that never changes."""
        return _standardised(self._moments[2] / self._seen(), self.variance(), 1.5)

    def kurtosis(self) -> Tensor:
        """``[D]``: excess kurtosis, fourth central moment over variance^2, minus 3 (normal: 0, Laplace: 3); -3 for a constant neuron."""
        return _standardised(self._moments[3] / self._seen(), self.variance(), 2.0) - 3

    def sparsity(self) -> Tensor:
        """``[D]``: share of rows whose magnitude is at most ``zero``."""
        return self._zeros.double() / self._seen()

    def positive(self) -> Tensor:
        """``[D]``: share of rows above ``zero``."""
        return self._positive.double() / self._seen()

    def minimum(self) -> Tensor:
        """``[D]``."""
        self._seen()
        return self._range[0].clone()

    def maximum(self) -> Tensor:
        """``[D]``."""
        self._seen()
        return self._range[1].clone()

    def quantiles(self, q: Sequence[float]) -> Tensor:
        """``[len(q), D]``: the value at rank ``ceil(q n)`` (at least 1) of the n rows, up to the width of a bin; 0 and 1 are exact."""
        self._seen()
        return self._quantiles("ActivationStatistics.quantiles", q, self._bins, *self._range)

    def _quantiles(self, op: str, q: Sequence[float], bins: Tensor, low: Tensor, high: Tensor) -> Tensor:
        for share in q:
            if not 0 <= checks.number(op, "q", share, positive=False) <= 1:
                raise ValueError(f"{op}: q must be in 0 .. 1, got {share}")
        below, count = bins.cumsum(1), int(bins[0].sum())
        edges = torch.arange(self._half, dtype=torch.float64, device="cpu")
        octave, part = torch.floor(edges / self.sub_bins), edges % self.sub_bins
        middle = torch.exp2(octave + _LOW) * (1 + (part + 0.5) / self.sub_bins)
        middle[-1] = 2.0**_HIGH
        values = torch.cat([-middle.flip(0), torch.zeros(1, dtype=torch.float64, device="cpu"), middle])
        result = []
        for share in q:
            rank = max(1, math.ceil(share * count))
            at = torch.searchsorted(below, torch.full((bins.shape[0], 1), rank, device="cpu")).squeeze(1)
            found = torch.minimum(torch.maximum(values[at], low), high)
            result.append(low if share == 0 else high if share == 1 else found)
        return torch.stack(result) if result else torch.empty(0, bins.shape[0], dtype=torch.float64, device="cpu")

    def overall(self, q: Sequence[float] = (0.01, 0.25, 0.5, 0.75, 0.99)) -> dict[str, Any]:
        """The same over all entries as if they were one neuron's: ``count, mean, variance, skewness, kurtosis, sparsity, positive,
        minimum, maximum`` as numbers and ``quantiles`` by q."""
        rows = self._seen()
        one = ActivationStatistics(1, sub_bins=self.sub_bins, zero=self.zero)
        for column in range(self.n_neurons):
            one._combine(rows, self._moments[:, column : column + 1])
        low, high = self._range[0].min().view(1), self._range[1].max().view(1)
        quantiles = self._quantiles("ActivationStatistics.overall", q, self._bins.sum(0, keepdim=True), low, high)[:, 0]
        return {
            "count": one.count,
            **{name: float(getattr(one, name)()) for name in ("mean", "variance", "skewness", "kurtosis")},
            "sparsity": float(self._zeros.sum()) / one.count,
            "positive": float(self._positive.sum()) / one.count,
            "minimum": float(low),
            "maximum": float(high),
            "quantiles": dict(zip(map(float, q), quantiles.tolist())),
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, for files and other processes."""
        names = ("_moments", "_zeros", "_positive", "_range", "_bins")
        about = {"n_neurons": self.n_neurons, "sub_bins": self.sub_bins, "zero": self.zero, "count": self.count}
        return {**about, **{name[1:]: getattr(self, name).clone() for name in names}}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> ActivationStatistics:
        """What ``state_dict`` gave."""
        made = cls(state["n_neurons"], sub_bins=state["sub_bins"], zero=state["zero"])
        made.count = checks.integer("ActivationStatistics.from_state_dict", "count", state["count"], 0)
        for name in ("moments", "zeros", "positive", "range", "bins"):
            own = getattr(made, f"_{name}")
            given = checks.tensor("ActivationStatistics.from_state_dict", name, state[name], (own.dtype,))
            checks.shape("ActivationStatistics.from_state_dict", name, given, tuple(own.shape), str(list(own.shape)))
            setattr(made, f"_{name}", given.clone())
        return made


def _standardised(moment: Tensor, variance: Tensor, power: float) -> Tensor:
    scale = variance**power
    return torch.where(scale > 0, moment / torch.where(scale > 0, scale, 1.0), 0.0)
