"""How much of a dictionary is found again by other seeds, and how far the spaces of two groups of features are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from fastsae._core import checks
from fastsae._core.extras import needed
from fastsae.compare.dictionaries import Dictionary, as_dictionaries
from fastsae.compare.matching import Match, OneToOne, match


@dataclass(frozen=True, eq=False)
class Stability:
    """How the dictionaries of several seeds agree; see ``stability``.

    Attributes:
        pairs: the P pairs of dictionaries (i, j), i < j. thresholds: the T similarities asked for.
        shared: float64 ``[P, T]``, share of the smaller dictionary's (alive) features whose partner in the best one-to-one matching is
            more similar than a threshold.
        most: float64 ``[P, T]``, a proven upper bound on that share over all one-to-one matchings: the largest number of disjoint pairs
            above the threshold.
        mmcs: float64 ``[P]``, symmetric mean max cosine similarity, to which a feature may serve several times.
        exact: bool ``[P]``, whether the one-to-one matching is proven to be the best.
        found_again: one float64 ``[F]`` a dictionary, mean similarity of each feature to its partners in the other dictionaries; without
            a partner 0; NaN for a feature that is not alive.
    """

    pairs: list[tuple[int, int]]
    thresholds: list[float]
    shared: Tensor
    most: Tensor
    mmcs: Tensor
    exact: Tensor
    found_again: list[Tensor]


def stability(
    dictionaries: Sequence[Dictionary],
    *,
    thresholds: Sequence[float] = (0.7, 0.8, 0.9, 0.95),
    alive: Sequence[Tensor | None] | None = None,
    candidates: int = 16,
    most_candidates: int = 64,
    backend: str | None = None,
) -> Stability:
    """Matches every pair of dictionaries one to one, and says how much they share. No ``[F, F]`` matrix is made.

    Args:
        dictionaries: at least two of what ``match`` takes, not sharded; usually the same model with other seeds, or one run's checkpoints.
            Of decoders, or of encoders (``sae.W_enc``): features that share only one of both are common.
        thresholds: cosine similarities in (-1, 1).
        alive: masks ``[F]`` of the features that take part, or None, one a dictionary.
        candidates: nearest features looked at, of each; doubled until each feature's last one is below every threshold and the matching
            is proven to be the best, or until there are most_candidates (then see ``Stability.exact``; ``most`` counts a feature whose
            candidates are all above a threshold as found).
        backend: as in ``match_cosine``.

    Raises: as ``match``; ValueError: a threshold outside (-1, 1). Needs SciPy (extra ``studies``).

    Source: the share above 0.7 of the best one-to-one matching is that of Paulo & Belrose 2025, "Sparse autoencoders trained on the same
    data learn different features" (arXiv 2501.16615).
    """
    op = "stability"
    sides = as_dictionaries(op, list(dictionaries), [f"dictionaries[{i}]" for i in range(len(dictionaries))])
    if len(sides) < 2:
        raise ValueError(f"{op}: dictionaries must be at least two, got {len(sides)}")
    masks = [None] * len(sides) if alive is None else list(alive)
    if len(masks) != len(sides):
        raise ValueError(f"{op}: alive must have one mask or None for each of {len(sides)} dictionaries, got {len(masks)}")
    levels = [checks.number(op, "thresholds", t, positive=False) for t in thresholds]
    if not levels or not all(-1 < t < 1 for t in levels):
        raise ValueError(f"{op}: thresholds must be in (-1, 1), got {list(thresholds)}")
    first, last = (checks.integer(op, n, v, 1) for n, v in (("candidates", candidates), ("most_candidates", most_candidates)))

    pairs = list(combinations(range(len(sides)), 2))
    shared, most, means, exact = [], [], [], []
    total = [torch.zeros(side.shape[0], dtype=torch.float64, device="cpu") for side in sides]
    for i, j in pairs:
        found, best = _matched(sides[i], sides[j], (masks[i], masks[j]), min(levels), first, max(first, last), backend)
        small = min(found.shape[:2])
        paired = (best.rows >= 0) & (best.columns >= 0)
        shared.append([float((best.similarity[paired] > t).sum()) / small for t in levels])
        most.append([_most(found, t) / small for t in levels])
        means.append(found.mmcs())
        exact.append(best.exact)
        for at, own in ((i, best.rows), (j, best.columns)):
            total[at].index_add_(0, own[paired], best.similarity[paired])
    for sums, mask in zip(total, masks):
        sums /= len(sides) - 1
        if mask is not None:
            sums[~mask.cpu()] = torch.nan
    wide: Any = {"dtype": torch.float64, "device": "cpu"}
    found_all = torch.tensor(exact, dtype=torch.bool, device="cpu")
    return Stability(pairs, levels, torch.tensor(shared, **wide), torch.tensor(most, **wide), torch.tensor(means, **wide), found_all, total)


def _matched(a: Tensor, b: Tensor, alive: Any, least: float, k: int, most: int, backend: str | None) -> tuple[Match, OneToOne]:
    """With as many candidates as prove the matching and reach below ``least``, or ``most``."""
    while True:
        found = match(a, b, alive=alive, candidates=k, backend=backend)
        best = found.one_to_one()
        small, large = sorted(found.shape[:2])
        nearest = (found.a_to_b if found.shape[0] == small else found.b_to_a).similarity
        if k >= min(most, large) or (best.exact and not bool((nearest[:, -1] > least).any())):
            return found, best
        k *= 2


def _most(found: Match, threshold: float) -> int:
    """The largest number of disjoint pairs above a threshold, or a bound on it where a feature's candidates are all above."""
    sparse, graphs = (needed(name, "stability needs SciPy", "studies") for name in ("scipy.sparse", "scipy.sparse.csgraph"))
    small = found.a_to_b if found.shape[0] <= found.shape[1] else found.b_to_a
    above = small.similarity > threshold
    full = above.all(1) if above.shape[1] < max(found.shape[:2]) else torch.zeros_like(above[:, 0])
    rows, places = (above & ~full[:, None]).nonzero(as_tuple=True)
    columns = small.index[rows, places]
    width = int(small.index.max()) + 1
    graph = sparse.csr_matrix(([1] * len(rows), (rows.cpu().numpy(), columns.cpu().numpy())), shape=(len(above), width))
    return int((graphs.maximum_bipartite_matching(graph, perm_type="column") >= 0).sum()) + int(full.sum())


@torch.no_grad()
def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """The angles between the spaces that two groups of features span, in radians, ascending.

    Args:
        a, b: ``[n, D]`` and ``[m, D]``, one feature a row, of any length; computed in float64. The rank of each group is taken as
            ``torch.linalg.matrix_rank`` sees it, so that rows that depend on others count once.

    Returns: float64 ``[min(rank a, rank b)]`` in 0 .. pi/2: 0 is a common direction. Random spaces of ranks p and q in D dimensions have
        mean squared cosines of max(p, q) / D.

    Raises: TypeError, ValueError: not two matrices of the same width, on one device, finite.

    Source: Björck & Golub 1973, "Numerical methods for computing angles between linear subspaces"; small angles are taken by their sines.
    """
    op = "principal_angles"
    bases: list[Tensor] = []
    for name, rows in (("a", a), ("b", b)):
        checks.tensor(op, name, rows, like=None if name == "a" else a)
        if rows.dim() != 2 or rows.shape[1] != a.shape[-1] or not bool(rows.isfinite().all()):
            raise ValueError(f"{op}: {name} must be finite, [n, D={a.shape[-1]}], got {list(rows.shape)}")
        u, s, v = torch.linalg.svd(rows.double(), full_matrices=False)
        bases.append(v[: int((s > s.amax(0, keepdim=True) * max(rows.shape) * torch.finfo(torch.float64).eps).sum())] if len(s) else v)
    few, many = sorted(bases, key=len)
    u, cosines, _ = torch.linalg.svd(few @ many.T, full_matrices=False)
    aligned = u.T @ few  # the principal vectors of the smaller space
    sines = torch.linalg.vector_norm(aligned - (aligned @ many.T) @ many, dim=1)
    return torch.atan2(sines, cosines.clamp(0, 1))
