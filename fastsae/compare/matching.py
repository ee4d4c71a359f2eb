"""Two dictionaries matched in both directions, and what people ask of that: MMCS, shares, histograms, a one-to-one matching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsae._core import checks, seeds
from fastsae._core.extras import needed
from fastsae._core.world import ALONE, World
from fastsae.compare import sharded
from fastsae.compare.dictionaries import Dictionary, as_dictionaries, world_of
from fastsae.dispatch import preference
from fastsae.ops.match import Matches, checked_eps, match_cosine


@dataclass(frozen=True, eq=False)
class OneToOne:
    """A one-to-one matching: rows of a with their partners in b, and how sure it is.

    Attributes:
        rows, columns: int64 ``[min(N, M)]`` features of a and of b, paired; -1 on the side of the larger dictionary where only a dummy
            edge was left for the other.
        similarity: of the pairs; for a dummy the row's k-th candidate, an upper bound.
        bound: mean of ``similarity``, an upper bound on the best one-to-one mean; equal to it where ``exact``.
        exact: no dummy edge was used.
    """

    rows: Tensor
    columns: Tensor
    similarity: Tensor
    bound: float
    exact: bool


@dataclass(frozen=True, eq=False)
class Match:
    """How two dictionaries match, from one pass over their similarities; see ``match``."""

    a_to_b: Matches
    b_to_a: Matches
    most_negative: Matches
    """For each row of a its most negative similarity and where: antipodal pairs are near -1."""
    rows: tuple[Tensor, Tensor]
    """The rows of a and of b that took part (alive ones); indices in the results are numbers of the whole dictionaries."""
    weights: tuple[Tensor | None, Tensor | None]
    shape: tuple[int, int, int]
    sides: tuple[Tensor, Tensor]
    """Their rows that took part, of sharded dictionaries this process's, for ``one_to_one`` with more candidates than were kept."""
    eps: float
    world: World = ALONE

    def mmcs(self, direction: str = "mean") -> float:
        """Mean max cosine similarity.

        ``"a_to_b"``: for each row of a its best in b, averaged; ``"b_to_a"`` the reverse; ``"mean"`` of both. MMCS is not symmetric:
        name the direction where you report it. With ``weights`` the average is weighted by them.
        """
        if direction == "mean":
            return (self.mmcs("a_to_b") + self.mmcs("b_to_a")) / 2
        if direction not in ("a_to_b", "b_to_a"):
            raise ValueError(f"Match.mmcs: direction must be 'a_to_b', 'b_to_a' or 'mean', got {direction!r}")
        best = (self.a_to_b if direction == "a_to_b" else self.b_to_a).similarity[:, 0].double()
        weight = self.weights[0 if direction == "a_to_b" else 1]
        return float(best.mean() if weight is None else (best * weight).sum() / weight.sum())

    def fraction_above(self, similarity: float = 0.9, direction: str = "a_to_b") -> float:
        """Share of features whose best match is above ``similarity``."""
        if direction not in ("a_to_b", "b_to_a"):
            raise ValueError(f"Match.fraction_above: direction must be 'a_to_b' or 'b_to_a', got {direction!r}")
        similarity = checks.number("Match.fraction_above", "similarity", similarity, positive=False)
        return float((getattr(self, direction).similarity[:, 0] > similarity).double().mean())

    def histogram(self, bins: int = 50, null: str | None = "random", seed: int = 0) -> dict[str, Tensor]:
        """Counts of the best similarities of both directions over ``bins`` equal bins of -1 .. 1.

        Args:
            bins: number of bins.
            null: ``"random"`` adds the counts for as many random unit vectors matched against as many others; None leaves it out.
            seed: of the null.

        Returns:
            ``edges [bins + 1]``, ``a_to_b [bins]``, ``b_to_a [bins]`` and ``null [bins]``, on the CPU.
        """
        bins = checks.integer("Match.histogram", "bins", bins, 1)
        edges = torch.linspace(-1, 1, bins + 1, device="cpu", dtype=torch.float32)
        named = {"a_to_b": self.a_to_b.similarity[:, 0], "b_to_a": self.b_to_a.similarity[:, 0]}
        if null == "random":
            generator = torch.Generator().manual_seed(checks.integer("Match.histogram", "seed", seed, 0))
            n, m, width = self.shape
            first, second = (seeds.normal(generator, size, width).to(named["a_to_b"].device) for size in (n, m))
            named["null"] = match_cosine(first, second).similarity[:, 0]
        elif null is not None:
            raise ValueError(f"Match.histogram: null must be 'random' or None, got {null!r}")
        counts = {name: torch.histogram(values.detach().float().cpu().clamp(-1, 1), edges).hist.long() for name, values in named.items()}
        return {"edges": edges, **counts}

    def one_to_one(self, candidates: int | None = None, *, absolute: bool = False) -> OneToOne:
        """The best one-to-one matching on each feature's nearest candidates, by SciPy's sparse assignment.

        Args:
            candidates: of each feature of the smaller dictionary; more than ``match`` has kept cost another pass. None: those kept.
            absolute: match by magnitude, and give magnitudes as ``similarity``; costs another pass.

        A feature that finds none of its candidates free takes a dummy worth its last candidate, so ``bound`` is an upper bound on the
        optimum, and exact where no dummy is used. Needs SciPy (extra ``studies``).
        """
        sparse, graphs = (needed(name, "Match.one_to_one needs SciPy", "studies") for name in ("scipy.sparse", "scipy.sparse.csgraph"))
        small = 0 if self.shape[0] <= self.shape[1] else 1
        forward = self._candidates(small, candidates, checks.flag("Match.one_to_one", "absolute", absolute))
        if bool(forward.similarity.isnan().any()):
            raise ValueError("Match.one_to_one: similarities must not be NaN; leave broken features out with alive=")
        n, k = forward.index.shape
        width = max(int(forward.index.max()) + 1 if n else 0, 1)
        similarity = forward.similarity.detach().double().cpu().numpy()
        rows = np.repeat(np.arange(n), k + 1)
        columns = np.concatenate([forward.index.cpu().numpy(), width + np.arange(n)[:, None]], axis=1).ravel()
        # Weights must not be zero for SciPy's sparse format; 2 - similarity is in 1 .. 3.
        cost = 2 - np.concatenate([similarity, similarity[:, -1:]], axis=1)
        cost[:, -1] += 1e-12
        graph = sparse.csr_matrix((cost.ravel(), (rows, columns)), shape=(n, width + n))
        chosen, partner = graphs.min_weight_full_bipartite_matching(graph)
        dummy = partner >= width
        at = np.argmax(forward.index.cpu().numpy()[chosen] == partner[:, None], axis=1)
        value = np.where(dummy, similarity[chosen, -1], similarity[chosen, at])
        left = self.rows[small].cpu()[torch.from_numpy(chosen.astype(np.int64))]
        right = torch.from_numpy(np.where(dummy, -1, partner).astype(np.int64))
        left, right = (left, right) if small == 0 else (right, left)
        return OneToOne(left, right, torch.from_numpy(value), float(value.mean()) if n else float("nan"), not bool(dummy.any()))

    def _candidates(self, small: int, candidates: int | None, absolute: bool) -> Matches:
        kept = (self.a_to_b, self.b_to_a)[small]
        k = kept.index.shape[1]
        if candidates is not None:
            k = min(checks.integer("Match.one_to_one", "candidates", candidates, 1), self.shape[1 - small])
        if k <= kept.index.shape[1] and not absolute:
            return Matches(kept.similarity[:, :k], kept.index[:, :k])
        found = self.nearest(small, k, absolute=absolute)
        return Matches(found.similarity.abs() if absolute else found.similarity, self.rows[1 - small][found.index])

    def nearest(self, side: int, k: int = 1, *, absolute: bool = False, exclude_self: bool = False, backend: str | None = None) -> Matches:
        """Another pass: ``match_cosine`` of the rows of a (``side`` 0) or of b (1) that took part; indices are places in ``rows``."""
        few, many = self.sides[side], self.sides[1 - side]
        with self.world.together("match"):
            self.world.begin("match", 0, (side, k, absolute, exclude_self))
            found = sharded.cosine(few, many, k, absolute, exclude_self, self.eps, preference(backend), self.world)
        return Matches(found[0].to(self.a_to_b.similarity.dtype), found[1])

    def plot(self, path: Any, bins: int = 60) -> None:
        """Draws both directions' histograms with the random null. Needs matplotlib (extra ``plot``)."""
        from fastsae.plots import histogram_of_matches  # loads matplotlib's parts only where something is drawn

        means = {"a_to_b": self.mmcs("a_to_b"), "b_to_a": self.mmcs("b_to_a")}
        histogram_of_matches(self.histogram(bins), means, path)


def _both(op: str, name: str, pair: Any) -> tuple[Any, Any]:
    """An optional pair for a and b."""
    if pair is None:
        return None, None
    checks.instance(op, name, pair, (tuple, list), "a pair (for a, for b) of tensors or None")
    if len(pair) != 2:
        raise ValueError(f"{op}: {name} must be a pair (for a, for b) of tensors or None, got {len(pair)}")
    return pair[0], pair[1]


def _alive(op: str, mask: Any, position: int, rows: int, like: Tensor) -> Tensor:
    if mask is None:
        return torch.arange(rows, device=like.device)
    checks.tensor(op, f"alive[{position}]", mask, (torch.bool,), like)
    checks.shape(op, f"alive[{position}]", mask, (rows,), f"[{rows}]")
    return mask.nonzero().flatten()


class _Own(NamedTuple):
    """Of one dictionary the rows of this process that take part, their numbers and weights, and the features of all processes."""

    rows: Tensor
    numbers: Tensor
    weights: Tensor | None
    features: int


def _own(op: str, position: int, side: Tensor, held: World, world: Any, mask: Any, weight: Any) -> _Own:
    rows = _alive(op, mask, position, side.shape[0], side)
    if weight is not None:
        checks.tensor(op, f"weights[{position}]", weight, like=side)
        checks.shape(op, f"weights[{position}]", weight, (side.shape[0],), f"[{side.shape[0]}]")
    features, start = (held.features, held.start) if held is not ALONE else (side.shape[0], 0)
    if held is ALONE and world is not ALONE:  # each process takes a share of what all of them have
        bounds = [side.shape[0] * shard // world.shards for shard in (world.shard, world.shard + 1)]
        rows = rows[(rows >= bounds[0]) & (rows < bounds[1])]
    taken = side if rows.shape[0] == side.shape[0] else side[rows]
    return _Own(taken, rows + start, None if weight is None else weight.detach()[rows].double(), features)


def match(
    a: Dictionary,
    b: Dictionary,
    *,
    alive: Sequence[Tensor | None] | None = None,
    weights: Sequence[Tensor | None] | None = None,
    candidates: int = 1,
    eps: float = 1e-8,
    backend: str | None = None,
) -> Match:
    """Matches two dictionaries in both directions, in one pass.

    Args:
        a, b: ``[N, D]`` and ``[M, D]`` tensors; SAEs of this library, SAELens, sparsify or dictionary_learning (a ``W_dec`` or a linear
            ``decoder``); or their files or folders, see ``SAE.from_pretrained``, read to the other side's device. Of two dtypes both are
            widened to what holds them, at least float32. A ``[D, F]`` matrix given by mistake raises where the shapes tell: one side
            only, or a ``W_dec`` beside its ``b_dec`` or ``b_enc``. Where nothing tells (two bare ``[D, F]`` tensors) rows are features.
        alive: masks ``([N], [M])`` of the features that take part; None: all.
        weights: non-negative ``([N], [M])``, e.g. the mean coefficient of each feature: ``mmcs`` becomes a weighted mean, in which
            coefficients carry the scale and unit features do not. This is our reading of a metric proposed beside MMCS that has no
            published definition.
        candidates: matches kept a feature (``similarity`` and ``index`` have as many columns).
        eps, backend: as in ``match_cosine``.

    Returns:
        ``Match``: ``a_to_b``, ``b_to_a`` and ``most_negative`` as ``Matches``; ``mmcs(direction)``, ``fraction_above``, ``histogram``,
        ``one_to_one``, ``plot``.

    Sharded dictionaries (of ``fastsae.distributed.shard``, or ``fastsae.distributed.part``): called by all processes, which get the same
    ``Match`` of the whole dictionaries, the bits of one process. Masks and weights are then of what each process gives: its own part, or
    the whole of a dictionary that is not sharded. A process's rows stay where they are and those of b go round; half precision is widened.

    No gradients. Raises as ``match_cosine``; ValueError where no feature is alive.

    Source: Sharkey, Braun & Millidge 2022, "Taking features out of superposition with sparse autoencoders".
    """
    op = "match"
    world = sharded.common(op, (world_of(a), world_of(b)))
    with world.together(op):
        sides = as_dictionaries(op, (a, b), "ab")
        dtype = sides[0].dtype
        if dtype != sides[1].dtype:
            dtype = torch.promote_types(torch.promote_types(dtype, sides[1].dtype), torch.float32)
        wide = dtype if world is ALONE else torch.promote_types(dtype, torch.float32)  # a rounded score says nothing of ties
        candidates = checks.integer(op, "candidates", candidates, 1)
        eps = checked_eps(op, eps, sides[0].to(wide))
        options = zip(sides, (a, b), _both(op, "alive", alive), _both(op, "weights", weights))
        own = [
            _own(op, position, side.to(wide), world_of(value), world, mask, weight)
            for position, (side, value, mask, weight) in enumerate(options)
        ]
        settings = [(side.features, side.weights is None) for side in own]
        world.begin(op, 0, (candidates, eps, str(dtype), sides[0].shape[1], settings))
        counts = sharded.counts([len(side.rows) for side in own], world)
        rows_a, rows_b = (sharded.everyone(side.numbers, each, world) for side, each in zip(own, counts))
        weighed = [None if side.weights is None else sharded.everyone(side.weights, each, world) for side, each in zip(own, counts)]
    n, m = map(sum, counts)
    if not n or not m:
        raise ValueError(f"{op}: both dictionaries need an alive feature, got {n} in a and {m} in b")
    for position, weight in enumerate(weighed):
        if weight is not None and (not bool((weight >= 0).all()) or not 0 < float(weight.sum()) < float("inf")):
            raise ValueError(
                f"{op}: weights[{position}] of the alive features must be finite and non-negative with a positive sum, "
                f"got a least of {float(weight.min())} and a sum of {float(weight.sum())}"
            )
    taken = own[0].rows, own[1].rows
    with world.together(op):
        world.begin(op)
        found = sharded.pair(*taken, min(candidates, m), min(candidates, n), eps, preference(backend), world)
    ab, ba, low = (Matches(found[at].to(dtype), rows[found[at + 1]]) for at, rows in ((0, rows_b), (2, rows_a), (4, rows_b)))
    return Match(ab, ba, low, (rows_a, rows_b), (weighed[0], weighed[1]), (n, m, sides[0].shape[1]), taken, eps, world)
