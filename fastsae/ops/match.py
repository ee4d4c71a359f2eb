"""Top-k cosine matching of two dictionaries without the ``[N, M]`` matrix; MMCS and its variants: ``fastsae.compare.mmcs_variants``.

``match_cosine`` finds the k nearest rows of ``b`` for every row of ``a``; ``match_pair`` does both directions and the most negative
match in one pass over the tiles. ``match`` wraps the latter in an object that answers what people ask of two dictionaries.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae._core import checks, seeds
from fastsae._core.norms import unit_rows
from fastsae.dispatch import Op, preference, then_any
from fastsae.formats import weight_files
from fastsae.ops._common import accumulator, chunks, product, tracks
from fastsae.ops.decode import decode_slots, weight_gradient
from fastsae.ops.encode import select_topk

# ---------------------------------------------------------------- references


def normalise(v: Tensor, eps: float) -> Tensor:
    """``fl(v / max(|v|, eps))`` row by row, in the accumulation dtype."""
    return unit_rows(v.to(accumulator(v.dtype)), eps)[0]


def _similarity_tiles(a: Tensor, b: Tensor, eps: float) -> Iterator[tuple[slice, slice, Tensor]]:
    unit_a, unit_b = normalise(a, eps), normalise(b, eps)
    column_tiles = list(chunks(b.shape[0], min(a.shape[0], 1024)))
    step = column_tiles[0].stop if column_tiles else 0  # the same row tiles beside every column tile, the last and narrower one too
    for columns in column_tiles:
        for rows in chunks(a.shape[0], step):
            yield rows, columns, product(unit_a[rows], unit_b[columns].T)


class _Best:
    """Running k best of each row of a dictionary over tiles whose columns ascend."""

    def __init__(self, k: int, absolute: bool = False):
        self.k, self.absolute = k, absolute
        self.rows: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def add(self, start: int, offset: int, s: Tensor, excluded: Tensor | None = None) -> None:
        rank = s.abs() if self.absolute else s
        if excluded is not None:
            rank = rank.masked_fill(excluded, -torch.inf)
        rank, local = select_topk(rank, min(self.k, s.shape[1]))
        value, index = s.gather(1, local), local + offset
        if start in self.rows:
            rank, value, index = (torch.cat(pair, 1) for pair in zip(self.rows[start], (rank, value, index)))
            rank, order = rank.sort(dim=1, descending=True, stable=True)
            rank, order = rank[:, : self.k], order[:, : self.k]
            value, index = value.gather(1, order), index.gather(1, order)
        self.rows[start] = (rank, value, index)

    def result(self, like: Tensor) -> tuple[Tensor, Tensor]:
        kept = [self.rows[start] for start in sorted(self.rows)]
        if not kept:
            return like.new_empty(0, self.k), torch.empty(0, self.k, dtype=torch.int64, device=like.device)
        return torch.cat([value for _, value, _ in kept]).to(like.dtype), torch.cat([index for _, _, index in kept])


def match_cosine_reference(a: Tensor, b: Tensor, k: int, absolute: bool, exclude_self: bool, eps: float) -> tuple[Tensor, Tensor]:
    best = _Best(k, absolute)
    for rows, columns, s in _similarity_tiles(a, b, eps):
        same = None
        if exclude_self:
            row, column = (torch.arange(part.start, part.stop, device=s.device) for part in (rows, columns))
            same = row.unsqueeze(1) == column
        best.add(rows.start, columns.start, s, same)
    return best.result(a)


def match_pair_reference(a: Tensor, b: Tensor, k_ab: int, k_ba: int, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(similarity, index) a to b ``[N, k_ab]``; b to a ``[M, k_ba]``; the most negative match of each row of a ``[N]``."""
    forward, backward, negative = _Best(k_ab), _Best(k_ba), _Best(1)
    for rows, columns, s in _similarity_tiles(a, b, eps):
        forward.add(rows.start, columns.start, s)
        backward.add(columns.start, rows.start, s.T)
        negative.add(rows.start, columns.start, -s)
    low, low_index = negative.result(a)
    return *forward.result(a), *backward.result(b), -low[:, 0], low_index[:, 0]


# ---------------------------------------------------------------- samples and checks


def _dictionaries(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    def normal(*shape: int) -> Tensor:
        return seeds.normal(generator, shape).to(device=device, dtype=dtype)

    for n, m, width in ((7, 9, 16), (1, 1, 1), (0, 4, 3), (65, 130, 33), (40, 33, 128)):
        yield normal(n, width), normal(m, width)
    yield normal(12, 20).T, normal(12, 31).T
    a = normal(10, 8)
    a[3] = 0
    yield a, torch.cat([-a, a, a[:2] * 20])
    limits = torch.finfo(dtype)  # norms and squares that overflow or vanish in the dtype
    sizes = [limits.max / 8, limits.max**0.5, limits.tiny**0.4, limits.tiny**0.5, 8 * limits.tiny, 1e-8, 0.5, limits.max**0.4]
    b = normal(8, 8).clamp(-4, 4) * torch.tensor(sizes, dtype=torch.float64, device="cpu").to(device=device, dtype=dtype).unsqueeze(1)
    yield b, torch.cat([b.flip(0), a])


def _pair(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two moderate dictionaries that share half of their features up to noise."""
    a = seeds.normal(generator, (4096, 256))
    b = torch.cat([a[:2048] + seeds.normal(generator, (2048, 256)), seeds.normal(generator, (2048, 256))])
    return a.to(device=device, dtype=dtype), b.to(device=device, dtype=dtype)


def _match_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple]:
    for a, b in _dictionaries(device, dtype, generator):
        for k in sorted({1, min(5, b.shape[0]), b.shape[0]}):
            yield a, b, k, False, False, 1e-8
            yield a, b, k, True, False, 1e-8
        if b.shape[0] > 1:
            yield b, b, min(4, b.shape[0] - 1), False, True, 1e-8
            yield b, b, b.shape[0] - 1, True, True, 1e-8


def _pair_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple]:
    for a, b in _dictionaries(device, dtype, generator):
        if a.shape[0]:
            yield a, b, 1, 1, 1e-8
            yield a, b, min(3, b.shape[0]), min(2, a.shape[0]), 1e-8


def _similarity_score(a: Tensor, b: Tensor, eps: float) -> Any:
    from fastsae.testing import Score

    wide = accumulator(a.dtype)
    unit_a, unit_b = normalise(a.double(), eps), normalise(b.double(), eps)
    exact, size = unit_a @ unit_b.T, unit_a.abs() @ unit_b.abs().T
    plain = product(normalise(a, eps), normalise(b, eps).T).double()
    unit, terms = torch.finfo(wide).eps / 2, a.shape[1] + 3
    finite = exact.isfinite() & plain.isfinite()
    exact = torch.where(finite, exact, plain)
    worst = float(((plain - exact).abs() / (size + torch.finfo(wide).tiny))[finite].max()) if bool(finite.any()) else 0.0
    out = torch.finfo(a.dtype)
    rounding = exact.abs() * out.eps / 2 + out.smallest_normal * out.eps if a.dtype != wide else 0.0
    tolerance = (2 * worst + 4 * unit) * size + terms * torch.finfo(wide).tiny + rounding
    # Norms, quotients and products round: 3 (D + 3) units of the magnitudes on each side of a comparison.
    band = 6 * terms * unit * size + 2 * terms * torch.finfo(wide).tiny
    return Score(exact, torch.where(finite, tolerance, 0.0), torch.where(finite, band, 0.0), unit)


def _check_match(args: tuple, result: Any) -> float:
    from fastsae.testing import Mismatch, Score, check_topk

    a, b, k, absolute, exclude_self, eps = args
    score = _similarity_score(a, b, eps)
    similarity, index = result
    exact = score.exact.clone()
    if absolute:
        signed = exact.gather(1, index)
        wrong = (similarity.double() * signed < 0) & (signed.abs() > score.tolerance.gather(1, index))
        if bool(wrong.any()):
            raise Mismatch("similarity: the sign of a match by magnitude differs")
        exact, similarity = exact.abs(), similarity.abs()
    if exclude_self:
        exact.fill_diagonal_(-torch.inf)
    return check_topk(Score(exact, score.tolerance, score.band, score.unit), None, k, False, (similarity, index), a.dtype)


def _check_pair(args: tuple, result: Any) -> float:
    from fastsae.testing import Score, check_topk

    a, b, k_ab, k_ba, eps = args
    score = _similarity_score(a, b, eps)
    turned = Score(score.exact.T, score.tolerance.T, score.band.T, score.unit)
    negative = Score(-score.exact, score.tolerance, score.band, score.unit)
    return max(
        check_topk(score, None, k_ab, False, result[0:2], a.dtype),
        check_topk(turned, None, k_ba, False, result[2:4], b.dtype),
        check_topk(negative, None, 1, False, (-result[4].unsqueeze(1), result[5].unsqueeze(1)), a.dtype),
    )


# ---------------------------------------------------------------- rows


def _fake_match(a: Tensor, b: Tensor, k: int, *_: Any) -> tuple[Tensor, Tensor]:
    return a.new_empty((a.shape[0], k)), a.new_empty((a.shape[0], k), dtype=torch.int64)


def _fake_pair(a: Tensor, b: Tensor, k_ab: int, k_ba: int, eps: float) -> tuple[Tensor, ...]:
    return *_fake_match(a, b, k_ab), *_fake_match(b, a, k_ba), a.new_empty(a.shape[0]), a.new_empty(a.shape[0], dtype=torch.int64)


MATCH_COSINE = Op(
    "match_cosine(Tensor a, Tensor b, SymInt k, bool absolute, bool exclude_self, float eps) -> (Tensor, Tensor)",
    match_cosine_reference,
    fake=_fake_match,
    samples=_match_samples,
    check=_check_match,
    workload=lambda *where: (*_pair(*where), 1, False, False, 1e-8),
)
MATCH_PAIR = Op(
    "match_pair(Tensor a, Tensor b, SymInt k_ab, SymInt k_ba, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    match_pair_reference,
    fake=_fake_pair,
    samples=_pair_samples,
    check=_check_pair,
    workload=lambda *where: (*_pair(*where), 1, 1, 1e-8),
)

for _op in (MATCH_COSINE, MATCH_PAIR):
    _op.row("cpu", f"fastsae.native.match:{_op.name}", f"fastsae.native.match:refuses_{_op.name}")
    _op.row("triton", f"fastsae.kernels.match:{_op.name}", "fastsae.ops._common:triton_refuses_scores")

# ---------------------------------------------------------------- backward


class _MatchCosine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, k: int, absolute: bool, exclude_self: bool, eps: float, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        similarity, index = MATCH_COSINE(a, b, k, absolute, exclude_self, eps, backend=backend)
        ctx.mark_non_differentiable(index)
        ctx.save_for_backward(a, b, index)
        ctx.eps, ctx.backend = eps, then_any(backend)
        return similarity, index

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, b, index = ctx.saved_tensors
        (unit_a, *norms_a), (unit_b, *norms_b) = (unit_rows(v.to(accumulator(v.dtype)), ctx.eps) for v in (a, b))
        grad = grad.to(unit_a.dtype)
        da = db = None
        if ctx.needs_input_grad[0]:
            da = _through_norm(unit_a, decode_slots(grad, index, None, unit_b, None, ctx.backend), *norms_a).to(a.dtype)
        if ctx.needs_input_grad[1]:
            db = _through_norm(unit_b, weight_gradient(grad, index, None, unit_a, unit_b, ctx.backend), *norms_b).to(b.dtype)
        return da, db, None, None, None, None, None


def _through_norm(unit: Tensor, grad: Tensor, divisor: Tensor, norm: Tensor, factor: Tensor) -> Tensor:
    along = (unit * grad).sum(1, keepdim=True)
    return torch.where(norm >= divisor, grad - unit * along, grad) / divisor * factor


# ---------------------------------------------------------------- public


class Matches(NamedTuple):
    """The k nearest: ``similarity [N, k]`` descending, ``index [N, k]`` int64."""

    similarity: Tensor
    index: Tensor


def _check_dictionaries(op: str, a: Any, b: Any, names: tuple[str, str] = ("a", "b")) -> None:
    checks.tensor(op, names[0], a)
    checks.tensor(op, names[1], b, like=a)
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        hint = ""
        if a.dim() == 3 or b.dim() == 3:
            hint = " (a stack of several dictionaries: give one of them, or all to mmcs_matrix)"
        elif a.dim() == b.dim() == 2 and (a.shape[0] == b.shape[0] or a.shape[1] == b.shape[0] or a.shape[0] == b.shape[1]):
            hint = " (one of them looks like [D, F]: dictionaries are feature-major, pass W.T)"
        raise ValueError(
            f"{op}: {names[0]} [N, D] and {names[1]} [M, D] must have the same D, got {list(a.shape)} and {list(b.shape)}{hint}"
        )


def _checked_eps(op: str, eps: Any, like: Tensor) -> float:
    eps, limits = float(checks.number(op, "eps", eps)), torch.finfo(accumulator(like.dtype))
    if eps > limits.max:
        raise ValueError(f"{op}: eps must be at most {limits.max:g}, got {eps}")
    return max(eps, limits.smallest_normal * limits.eps)  # only a row of zeros has a smaller norm


def match_cosine(
    a: Tensor, b: Tensor, *, k: int = 1, absolute: bool = False, exclude_self: bool = False, eps: float = 1e-8, backend: str | None = None
) -> Matches:
    """The k rows of ``b`` with the largest cosine similarity to each row of ``a``.

    Args:
        a: ``[N, D]``; float32, bfloat16, float16 or float64; any strides.
        b: ``[M, D]``, dtype of ``a``.
        k: ``1 <= k <= M`` (``M - 1`` with ``exclude_self``).
        absolute: select by magnitude and keep the sign.
        exclude_self: leave out row i of ``b`` for row i of ``a`` (the self-similarity of one dictionary).
        eps: smallest norm divided by, above 0: a zero vector has similarity 0 to everything.
        backend: see ``fastsae.use_backend``.

    Returns:
        ``Matches(similarity, index)``: ``[N, k]`` in the dtype of ``a``, descending, in -1 .. 1 up to rounding; int64.

    The similarity is the float32 (float64 for float64) product of ``fl(v / max(|v|, eps))`` with the true norm of every finite row, also
    where its square would overflow or vanish; equal ones: lower index first; NaN ranks highest. Gradients flow to ``a`` and ``b`` through
    the matches. Deterministic. Memory: the unit rows and temporaries of 64 MiB each in the reference, the unit rows and the workspace of
    ``encode_topk`` in the Triton row; nothing grows with ``N * M``.

    Raises: TypeError: dtype or device. ValueError: shape, k or eps out of range.
    """
    op = "match_cosine"
    _check_dictionaries(op, a, b)
    checks.same_dtype(op, "b", b, "a", a)
    checks.flag(op, "absolute", absolute)
    limit = b.shape[0] - checks.flag(op, "exclude_self", exclude_self)
    k = checks.integer(op, "k", k, 1, limit, "M - 1 with exclude_self" if exclude_self else f"M={b.shape[0]}")
    eps = _checked_eps(op, eps, a)
    backend = preference(backend)
    if tracks(op, a, b):
        similarity, index = _MatchCosine.apply(a, b, k, absolute, exclude_self, eps, backend)  # pyright: ignore[reportGeneralTypeIssues]
    else:
        similarity, index = MATCH_COSINE(a, b, k, absolute, exclude_self, eps, backend=backend)
    return Matches(similarity, index)


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
    """The dictionaries as given (no copies), for ``one_to_one`` with more candidates than the pass kept."""
    eps: float

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
        try:
            import numpy as np
            from scipy.sparse import csr_matrix
            from scipy.sparse.csgraph import min_weight_full_bipartite_matching
        except ImportError as error:
            raise ImportError("Match.one_to_one needs SciPy: pip install 'fastsae-kernels[studies]'") from error
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
        worth = np.concatenate([similarity, similarity[:, -1:]], axis=1)
        cost = (2 - worth + np.concatenate([np.zeros((n, k)), np.full((n, 1), 1e-12)], axis=1)).ravel()
        chosen, partner = min_weight_full_bipartite_matching(csr_matrix((cost, (rows, columns)), shape=(n, width + n)))
        dummy = partner >= width
        value = np.where(dummy, similarity[chosen, -1], 0.0)
        at = np.argmax(forward.index.cpu().numpy()[chosen] == partner[:, None], axis=1)
        value = np.where(dummy, value, similarity[chosen, at])
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
        few, many = self.sides[small][self.rows[small]], self.sides[1 - small][self.rows[1 - small]]
        found = match_cosine(few, many, k=k, absolute=absolute, eps=self.eps)
        return Matches(found.similarity.abs() if absolute else found.similarity, self.rows[1 - small][found.index])

    def plot(self, path: Any, bins: int = 60) -> None:
        """Draws both directions' histograms with the random null. Needs matplotlib (extra ``plot``)."""
        from fastsae.plots import histogram_of_matches

        histogram_of_matches(self, path, bins)


def as_dictionaries(op: str, values: Sequence[Any], names: Sequence[str]) -> list[Tensor]:
    """Each value as a ``[F, D]`` tensor, that of a file on the device of those that are none, of one D and on one device."""
    sides = [_dictionary(op, name, value).detach() for name, value in zip(names, values)]
    files = [isinstance(value, (str, bytes)) or hasattr(value, "__fspath__") for value in values]
    device = next((side.device for side, file in zip(sides, files) if not file), None)
    sides = [side.to(device) if file and device is not None else side for side, file in zip(sides, files)]
    for name, side in zip(names, sides):
        _check_dictionaries(op, sides[0], side, (names[0], name))
    return sides


def _dictionary(op: str, name: str, value: Any) -> Tensor:
    """A ``[F, D]`` tensor from a tensor, an SAE with ``W_dec [F, D]`` or a linear ``decoder``, or weights on disk that hold one."""
    if isinstance(value, Tensor):
        return value
    weight = getattr(value, "W_dec", None)
    if isinstance(weight, Tensor):
        return _beside_biases(f"{op}: {name}.W_dec", weight, getattr(value, "b_dec", None), getattr(value, "b_enc", None))
    decoder = getattr(value, "decoder", None)
    if isinstance(decoder, torch.nn.Linear):  # its weight is [D, F]
        return decoder.weight.T
    if isinstance(value, (str, bytes)) or hasattr(value, "__fspath__"):
        path = os.fsdecode(value)
        where = op if name == path else f"{op}: {name}"
        try:
            tensors = weight_files.dictionary(path)
        except ImportError as error:
            raise ImportError(f"{where}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return _beside_biases(f"{where}: {path}: W_dec", *tensors)
    expected = "a tensor [F, D], an SAE with W_dec or a linear decoder, or a file or folder of weights"
    raise TypeError(f"{op}: {name} must be {expected}, got {type(value).__name__}")


def _beside_biases(what: str, weight: Tensor, b_dec: Any, b_enc: Any) -> Tensor:
    """A decoder, which the lengths of ``b_dec [D]`` and ``b_enc [F]`` beside it must show to be [F, D]."""
    for axis, (name, bias) in enumerate((("b_enc", b_enc), ("b_dec", b_dec))):
        if isinstance(bias, Tensor) and weight.dim() == 2 and bias.dim() == 1 and bias.shape[0] != weight.shape[axis]:
            hint = (
                " (it looks like [D, F]: dictionaries are feature-major, pass W_dec.T)" if bias.shape[0] == weight.shape[1 - axis] else ""
            )
            want = f"[F, D={len(bias)}]" if axis else f"[F={len(bias)}, D]"
            raise ValueError(f"{what} must be {want} beside its {name}, got {list(weight.shape)}{hint}")
    return weight


def _both(op: str, name: str, pair: Any) -> tuple[Any, Any]:
    """An optional pair for a and b."""
    if pair is None:
        return None, None
    if not isinstance(pair, (tuple, list)):
        raise TypeError(f"{op}: {name} must be a pair (for a, for b) of tensors or None, got {type(pair).__name__}")
    if len(pair) != 2:
        raise ValueError(f"{op}: {name} must be a pair (for a, for b) of tensors or None, got {len(pair)}")
    return pair[0], pair[1]


def _alive(op: str, mask: Any, position: int, rows: int, like: Tensor) -> Tensor:
    if mask is None:
        return torch.arange(rows, device=like.device)
    checks.tensor(op, f"alive[{position}]", mask, (torch.bool,), like)
    checks.shape(op, f"alive[{position}]", mask, (rows,), f"[{rows}]")
    return mask.nonzero().flatten()


def match(
    a: Any,
    b: Any,
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

    No gradients. Raises as ``match_cosine``; ValueError where no feature is alive.

    Source: Sharkey, Braun & Millidge 2022, "Taking features out of superposition with sparse autoencoders".
    """
    op = "match"
    a, b = as_dictionaries(op, (a, b), "ab")
    if a.dtype != b.dtype:
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        a, b = a.to(dtype), b.to(dtype)
    rows_a, rows_b = (_alive(op, mask, i, side.shape[0], side) for i, (mask, side) in enumerate(zip(_both(op, "alive", alive), (a, b))))
    if not rows_a.shape[0] or not rows_b.shape[0]:
        raise ValueError(f"{op}: both dictionaries need an alive feature, got {rows_a.shape[0]} in a and {rows_b.shape[0]} in b")
    candidates = checks.integer(op, "candidates", candidates, 1)
    checked: list[Tensor | None] = []
    for position, (side, rows, weight) in enumerate(zip((a, b), (rows_a, rows_b), _both(op, "weights", weights))):
        if weight is not None:
            checks.tensor(op, f"weights[{position}]", weight, like=side)
            checks.shape(op, f"weights[{position}]", weight, (side.shape[0],), f"[{side.shape[0]}]")
            weight = weight.detach()[rows].double()
            if not bool((weight >= 0).all()) or not 0 < float(weight.sum()) < float("inf"):
                raise ValueError(
                    f"{op}: weights[{position}] of the alive features must be finite and non-negative with a positive sum, "
                    f"got a least of {float(weight.min())} and a sum of {float(weight.sum())}"
                )
        checked.append(weight)
    side_a = a if rows_a.shape[0] == a.shape[0] else a[rows_a]
    side_b = b if rows_b.shape[0] == b.shape[0] else b[rows_b]
    n, m = side_a.shape[0], side_b.shape[0]
    eps = _checked_eps(op, eps, side_a)
    ab, ab_at, ba, ba_at, low, low_at = MATCH_PAIR(side_a, side_b, min(candidates, m), min(candidates, n), eps, backend=preference(backend))
    return Match(
        Matches(ab, rows_b[ab_at]),
        Matches(ba, rows_a[ba_at]),
        Matches(low, rows_b[low_at]),
        (rows_a, rows_b),
        (checked[0], checked[1]),
        (n, m, a.shape[1]),
        (a, b),
        eps,
    )
