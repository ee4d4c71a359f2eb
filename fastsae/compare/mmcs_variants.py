"""MMCS (mean max cosine similarity) of dictionaries, and the numbers that publications and public code report under its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsae._core import checks
from fastsae._core.world import ALONE
from fastsae.compare.dictionaries import Dictionary, as_dictionaries, world_of
from fastsae.compare.matching import Match, match
from fastsae.latents import Latents, RaggedLatents, TopKLatents

_DIRECTIONS = ("a_to_b", "b_to_a", "mean", "small_to_large", "large_to_small")
_SUMMARIES = ("mean", "max", "above", "distance_sum")


@dataclass(frozen=True)
class MmcsVariant:
    """How a published number is read off the cosines of two dictionaries; ``mmcs(a, b, variant=...)`` takes one or its name.

    Attributes:
        direction: whose features are asked for their best: "a_to_b" those of a, "b_to_a" those of b, "mean" both, averaged;
            "small_to_large" those of the dictionary with fewer (alive) features, of a where they are equal; "large_to_small" the others.
        absolute: the best by magnitude, as a magnitude.
        one_to_one: partners by the optimal assignment, not each feature's best; the smaller dictionary's features all have one. Exact
            (``Match.one_to_one`` with candidates until it is), needs SciPy; the direction does not matter.
        exclude_self: one dictionary against itself, without the diagonal.
        summary: of the similarities: "mean"; "max"; "above", the share above ``threshold``; "distance_sum", the sum of 1 - similarity.
        threshold: of "above".
        source: where the definition is published.
    """

    direction: str = "a_to_b"
    absolute: bool = False
    one_to_one: bool = False
    exclude_self: bool = False
    summary: str = "mean"
    threshold: float = 0.9
    source: str = ""

    def __post_init__(self) -> None:
        for name, known in (("direction", _DIRECTIONS), ("summary", _SUMMARIES)):
            if getattr(self, name) not in known:
                raise ValueError(f"MmcsVariant: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("absolute", "one_to_one", "exclude_self"):
            checks.flag("MmcsVariant", name, getattr(self, name))
        checks.number("MmcsVariant", "threshold", self.threshold, positive=False)
        if self.exclude_self and (self.one_to_one or self.direction != "a_to_b"):
            raise ValueError("MmcsVariant: exclude_self goes with direction='a_to_b' and without one_to_one")


_SHARKEY = "Sharkey, Braun & Millidge 2022, Taking features out of superposition with sparse autoencoders"
_METRICS = "HoagyC/sparse_coding, standard_metrics.py"

MMCS_VARIANTS: Mapping[str, MmcsVariant] = {
    "truth_recovery": MmcsVariant("a_to_b", source=f"{_SHARKEY}: a is the truth, b what was learned"),
    "representedness": MmcsVariant("a_to_b", source=f"{_METRICS}, representedness(features, model)"),
    "larger_dictionary": MmcsVariant("small_to_large", source=f"{_SHARKEY}: the proxy without a truth, the next larger dictionary"),
    "mcs_duplicates": MmcsVariant("b_to_a", source=f"{_METRICS}, mmcs(model, model2), mcs_duplicates(ground, model), mmcs_to_fixed"),
    "big_sweep": MmcsVariant("large_to_small", source="HoagyC/sparse_coding, big_sweep.py: mcs_duplicates(smaller, larger)"),
    "both_directions": MmcsVariant("mean", source="symmetrised MMCS of later replications"),
    "absolute": MmcsVariant("mean", absolute=True, source="later replications: magnitudes, both directions"),
    "hungarian": MmcsVariant(one_to_one=True, source=f"{_METRICS}, run_mmcs_with_larger: the mean"),
    "hungarian_above": MmcsVariant(one_to_one=True, summary="above", source=f"{_METRICS}, run_mmcs_with_larger: the share above 0.9"),
    "mcc": MmcsVariant(absolute=True, one_to_one=True, source="mean correlation coefficient: SAELens' synthetic benchmark, mcc"),
    "cosine_hungarian_loss": MmcsVariant(
        one_to_one=True, summary="distance_sum", source="KempnerInstitute/overcomplete, metrics.py, cosine_hungarian_loss"
    ),
    "self_similarity": MmcsVariant(exclude_self=True, source="mean best cosine of a dictionary's features to its others"),
    "dictionary_collinearity": MmcsVariant(
        absolute=True,
        exclude_self=True,
        summary="max",
        source="KempnerInstitute/overcomplete, metrics.py, dictionary_collinearity: the largest off-diagonal magnitude",
    ),
}
"""Published variants of MMCS by the names that papers and code use; see ``mmcs``. The guide on MMCS has them as a table."""


def mmcs(a: Dictionary, b: Dictionary, direction: str = "mean", *, variant: str | MmcsVariant | None = None, **options: Any) -> float:
    """Mean max cosine similarity of two dictionaries: ``match(a, b, **options).mmcs(direction)``, or one of its published variants.

    Args:
        a, b: as in ``match``. direction: "a_to_b", "b_to_a" or "mean": MMCS is not symmetric, name the direction where you report it.
        variant: a name of ``fastsae.compare.MMCS_VARIANTS`` or an ``MmcsVariant``, in place of ``direction``. "self_similarity" and
            "dictionary_collinearity" compare a dictionary to itself: give it twice.
        options: of ``match``: ``alive``, ``weights``, ``eps``, ``backend``.

    Returns:
        A Python float. NaN where similarities are.

    Example:
        >>> truth, learned = torch.randn(20, 8), torch.randn(40, 8)
        >>> fastsae.mmcs(truth, learned, variant="truth_recovery")
        >>> fastsae.mmcs(truth, learned, variant="hungarian_above")  # needs SciPy

    Raises: as ``match``; ValueError: unknown names, ``weights`` beside ``one_to_one`` or a summary other than the mean.
    """
    if variant is None:
        return match(a, b, **options).mmcs(direction)
    if direction != "mean":
        raise ValueError(f"mmcs: give direction or variant, not both, got {direction!r} and {variant!r}")
    if isinstance(variant, str) and variant in MMCS_VARIANTS:
        variant = MMCS_VARIANTS[variant]
    if not isinstance(variant, MmcsVariant):
        raise ValueError(f"mmcs: variant must be an MmcsVariant or one of {', '.join(MMCS_VARIANTS)}, got {variant!r}")
    if (variant.one_to_one or variant.summary != "mean") and any(weight is not None for weight in options.get("weights") or ()):
        raise ValueError("mmcs: weights go with the mean of best similarities, not with one_to_one or another summary")
    found = match(a, b, **options)
    if variant.one_to_one:
        return _summary(variant, _assigned(found, variant.absolute), None)
    forward, backward = ("b_to_a", "a_to_b") if variant.direction.startswith("large") else ("a_to_b", "b_to_a")
    if variant.direction in ("small_to_large", "large_to_small"):
        directions: tuple[str, ...] = (forward if found.shape[0] <= found.shape[1] else backward,)
    else:
        directions = ("a_to_b", "b_to_a") if variant.direction == "mean" else (variant.direction,)
    values = [_summary(variant, _best(found, one, variant, options.get("backend")), found.weights[one == "b_to_a"]) for one in directions]
    return sum(values) / len(values)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or torch.equal(a.nan_to_num(), b.nan_to_num())


def _best(found: Match, direction: str, variant: MmcsVariant, backend: str | None) -> Tensor:
    if not variant.absolute and not variant.exclude_self:
        return getattr(found, direction).similarity[:, 0]
    same = not variant.exclude_self or (_same(*found.sides) and torch.equal(*found.rows))
    if not found.world.agree("mmcs", same):
        raise ValueError(
            "mmcs: a variant with exclude_self compares a dictionary to itself: a and b must be equal and have the same alive features, "
            f"got {list(found.shape[::2])} and {list(found.shape[1:])} with {len(found.rows[0])} and {len(found.rows[1])} alive"
        )
    first = int(direction == "b_to_a")
    best = found.nearest(first, absolute=variant.absolute, exclude_self=variant.exclude_self, backend=backend).similarity[:, 0]
    return best.abs() if variant.absolute else best


def _assigned(found: Match, absolute: bool) -> Tensor:
    """Similarities of the optimal pairs, from more candidates until no dummy is used: a full list always suffices."""
    candidates = 8
    while True:
        pairs = found.one_to_one(candidates, absolute=absolute)
        if pairs.exact or candidates >= max(found.shape[:2]):
            return pairs.similarity
        candidates *= 4


def _summary(variant: MmcsVariant, best: Tensor, weight: Tensor | None) -> float:
    best = best.detach().double()
    if variant.summary == "max":
        return float(best.max())
    if variant.summary == "above":
        return float((best > variant.threshold).double().mean())
    if variant.summary == "distance_sum":
        return float((1 - best).sum())
    return float(best.mean() if weight is None else (best * weight).sum() / weight.sum())


@torch.no_grad()
def contribution_similarity(coefficients: Latents, features: Tensor, latents: Latents, dictionary: Tensor) -> Tensor:
    """How alike the vectors are that feature g of one dictionary and feature j of another put into each sample, amounts included:

        S[g, j] = 2 sum over n of <c[n, g] f[g], z[n, j] d[j]> / sum over n of (|c[n, g] f[g]|^2 + |z[n, j] d[j]|^2)

    Args:
        coefficients, latents: c ``[.., G]`` and z ``[.., F]`` of the same samples. features, dictionary: f ``[G, D]`` and d ``[F, D]``.

    Returns:
        ``[G, F]`` float64 in [-1, 1]: 1 where both put the same vector into every sample, 0 where neither fires. It is a product of three:
        the cosine of f and d, the uncentred correlation of c and z, and ``2 r / (1 + r^2)``, r the ratio of the lengths that they put in
        (root mean squares). Scale moved from a feature to its coefficients changes nothing. The mean over g of the largest is a recovery
        score as MMCS is, at most the absolute MMCS: MMCS sees the first factor alone. Memory: both latents dense, in float64.

    Raises: TypeError, ValueError: latents of other samples, shapes, dtypes or devices that do not fit.
    """
    op = "contribution_similarity"
    for name, value, rows in (("features", coefficients, features), ("dictionary", latents, dictionary)):
        checks.instance(op, "coefficients" if name == "features" else "latents", value, (TopKLatents, RaggedLatents), "latents")
        checks.tensor(op, name, rows, like=features)
        checks.shape(op, name, rows, (value.n_features, features.shape[-1]), f"[{value.n_features}, D={features.shape[-1]}]")
    if coefficients.batch_shape != latents.batch_shape:
        raise ValueError(f"{op}: latents must be of the samples {[*coefficients.batch_shape]}, got {[*latents.batch_shape]}")
    f, d = features.double(), dictionary.double()
    c, z = (value.to_dense().double().reshape(-1, value.n_features) for value in (coefficients, latents))
    total = (c.square().sum(0) * f.square().sum(1)).unsqueeze(1) + z.square().sum(0) * d.square().sum(1)
    return 2 * (c.T @ z) * (f @ d.T) / torch.where(total == 0, 1, total)


def mmcs_matrix(dictionaries: Sequence[Dictionary], direction: str = "a_to_b", **options: Any) -> Tensor:
    """MMCS of all ordered pairs ``[n, n]`` float64: entry (i, j) is ``mmcs(dictionaries[i], dictionaries[j], direction)``, 1 for i = j.

    With ``direction="mean"`` it is symmetric, otherwise not (``mmcs_from_list`` of HoagyC/sparse_coding copies one direction
    over the other).
    """
    if direction not in ("a_to_b", "b_to_a", "mean"):
        raise ValueError(f"mmcs_matrix: direction must be 'a_to_b', 'b_to_a' or 'mean', got {direction!r}")
    dictionaries = list(dictionaries)
    loaded = as_dictionaries("mmcs_matrix", dictionaries, [f"dictionaries[{i}]" for i in range(len(dictionaries))])
    sides = [side if world_of(value) is ALONE else value for value, side in zip(dictionaries, loaded)]
    result = torch.eye(len(sides), dtype=torch.float64, device="cpu")
    for i in range(len(sides)):
        for j in range(i):
            pair = match(sides[i], sides[j], **options)
            forward, backward = pair.mmcs("a_to_b"), pair.mmcs("b_to_a")
            if direction == "mean":
                forward = backward = (forward + backward) / 2
            elif direction == "b_to_a":
                forward, backward = backward, forward
            result[i, j], result[j, i] = forward, backward
    return result
