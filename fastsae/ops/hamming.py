"""Hamming distances between packed codes, all pairs or the k nearest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastsae._core import checks
from fastsae.dispatch import Op, preference
from fastsae.ops.spline import unpack_bits
from fastsae.reference import Best, accumulator, chunks, product

if TYPE_CHECKING:
    import scipy.sparse

# ---------------------------------------------------------------- references


def _tiles(a: Tensor, b: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Distances as ``|a| + |b| - 2 <a, b>``: exact in float32 below 2^24 bits."""
    width = a.shape[1] * 64
    column_tiles = list(chunks(b.shape[0], max(width, min(a.shape[0], 4096))))
    step = column_tiles[0].stop if column_tiles else 0  # the same row tiles beside every column tile, the last and narrower one too
    for columns in column_tiles:
        right = unpack_bits(b[columns]).float()
        for rows in chunks(a.shape[0], max(width, step)):
            left = unpack_bits(a[rows]).float()
            yield rows, columns, left.sum(1, keepdim=True) + right.sum(1) - 2 * product(left, right.T)


def hamming_reference(a: Tensor, b: Tensor, out: Tensor) -> None:
    for rows, columns, distance in _tiles(a, b):
        out[rows, columns] = distance.to(out.dtype)


def hamming_topk_reference(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best = Best(k)
    for rows, columns, distance in _tiles(a, b):
        best.add(rows.start, columns.start, -distance)
    near, index = best.result(a.device, torch.int32)
    return -near, index


# ---------------------------------------------------------------- samples and checks


def _codes(device: torch.device, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**63), 2**63 - 1, shape, generator=generator, device="cpu").to(device)

    for n, m, w in ((5, 7, 3), (1, 1, 1), (0, 4, 2), (4, 0, 2), (3, 2, 0), (65, 130, 16)):
        yield words(n, w), words(m, w)
    codes = words(40, 4)
    codes[10:20] = codes[3]
    yield codes[::2, 1:], codes[:, 1:]


def _pair(device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes of a moderate layer."""
    codes = torch.randint(-(2**63), 2**63 - 1, (2, 1024, 16), generator=generator, device="cpu").to(device)
    return codes[0], codes[1]


def _samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for a, b in _codes(device, generator):
        yield a, b, torch.empty(a.shape[0], b.shape[0], dtype=torch.int32, device=device)
        yield a, b, torch.empty(b.shape[0], a.shape[0], dtype=torch.int32, device=device).T


def _topk_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    for a, b in _codes(device, generator):
        for k in sorted({1, min(6, b.shape[0]), b.shape[0]}):
            if 1 <= k <= b.shape[0]:
                yield a, b, k


def _popcount(a: Tensor, b: Tensor) -> Tensor:
    """Distances one word and one bit at a time: another way than the reference's product."""
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for word in range(a.shape[1]):
        different = a[:, word : word + 1] ^ b[:, word]
        for bit in range(64):
            total += ((different >> bit) & 1).to(torch.int32)
    return total


def _check(testing: Any, args: tuple[Any, ...], result: Any) -> float:
    return testing.check_equal(_popcount(args[0], args[1]), result, "distances")


def _check_topk(testing: Any, args: tuple[Any, ...], result: Any) -> float:
    a, b, k = args
    distance, index = _popcount(a, b).sort(dim=1, stable=True)
    return testing.check_equal((distance[:, :k], index[:, :k]), result, "distance,index")


# ---------------------------------------------------------------- rows

HAMMING = Op(
    "hamming(Tensor a, Tensor b, Tensor(a!) out) -> ()",
    hamming_reference,
    fake=lambda a, b, out: None,
    samples=_samples,
    check=_check,
    workload=lambda device, dtype, generator: (*_pair(device, generator), torch.empty(1024, 1024, dtype=torch.int32, device=device)),
    mutates=(2,),
    dtypes=(torch.int64,),
)
HAMMING_TOPK = Op(
    "hamming_topk(Tensor a, Tensor b, SymInt k) -> (Tensor, Tensor)",
    hamming_topk_reference,
    fake=lambda a, b, k: (a.new_empty((a.shape[0], k), dtype=torch.int32), a.new_empty((a.shape[0], k))),
    samples=_topk_samples,
    check=_check_topk,
    workload=lambda device, dtype, generator: (*_pair(device, generator), 8),
    batched=(0,),
    dtypes=(torch.int64,),
)
for _op in (HAMMING, HAMMING_TOPK):
    _op.row("cpu", f"fastsae.native.hamming:{_op.name}", f"fastsae.native.hamming:refuses_{_op.name}")
    _op.row("cuda", f"fastsae.native.cuda:{_op.name}", f"fastsae.native.cuda:refuses_{_op.name}")

# ---------------------------------------------------------------- public


class Neighbours(NamedTuple):
    """The k nearest codes: ``distance [N, k]`` int32 ascending, ``index [N, k]`` int64."""

    distance: Tensor
    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  (hides tuple.index: the word is public)


def _inputs(op: str, a: Any, b: Any) -> None:
    checks.tensor(op, "a", a, (torch.int64,))
    checks.tensor(op, "b", b, (torch.int64,), a)
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"{op}: a [N, words] and b [M, words] must have the same number of words, got {list(a.shape)} and {list(b.shape)}")


def hamming(a: Tensor, b: Tensor, out: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Number of differing bits of all pairs of packed codes.

    Args:
        a: ``[N, words]`` int64 as ``spline_code`` returns them; any strides. b: ``[M, words]`` int64.
        out: ``[N, M]`` int32 to write into: at 4096 x 4096, filling fresh memory costs more than the distances.
        backend: see ``fastsae.use_backend``.

    Returns:
        ``[N, M]`` int32, 0 .. 64 * words (``out`` where given). Exact. Memory beyond it: temporaries of 64 MiB each in the reference.

    Raises: TypeError: dtype or device. ValueError: shape.
    """
    op = "hamming"
    _inputs(op, a, b)
    if out is None:
        out = torch.empty(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    else:
        checks.tensor(op, "out", out, (torch.int32,), a)
        checks.shape(op, "out", out, (a.shape[0], b.shape[0]), f"[N={a.shape[0]}, M={b.shape[0]}]")
        checks.writable(op, "out", out)
    HAMMING(a, b, out, backend=preference(backend))
    return out


def hamming_topk(a: Tensor, b: Tensor, k: int, *, backend: str | None = None) -> Neighbours:
    """The k nearest rows of ``b`` for every row of ``a``, by distance, then the lower index.

    Args:
        a, b, backend: as in ``hamming``. k: ``1 <= k <= M``.

    Returns:
        ``Neighbours(distance, index)``: ``[N, k]`` int32 ascending; int64. Exact. Nothing grows with ``N * M``.

    Raises: TypeError: dtype or device. ValueError: shape or k.
    """
    op = "hamming_topk"
    _inputs(op, a, b)
    k = checks.integer(op, "k", k, 1, b.shape[0], f"M={b.shape[0]}")
    return Neighbours(*HAMMING_TOPK(a, b, k, backend=preference(backend)))


class BoundaryDensity(NamedTuple):
    """``mean``: a number; ``pairs [..]``: what it is the mean of."""

    mean: Tensor
    pairs: Tensor


def bit_count(words: Tensor) -> Tensor:
    """Bits that are set in each int64: pairs, nibbles and bytes are summed inside the word (masks also undo the sign of shifts)."""
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (words * 0x0101010101010101) >> 56


def boundary_density(a: Tensor, b: Tensor, x_a: Tensor | None = None, x_b: Tensor | None = None) -> BoundaryDensity:
    """How many polytope boundaries separate the inputs of pairs, per unit of distance between them.

    Args:
        a, b: packed codes ``[.., words]`` int64 of the two inputs of each pair, one layer's or several layers' side by side.
        x_a, x_b: those inputs ``[.., D]`` (of an MLP: its input, the residual stream); floating, of one dtype.

    Returns:
        ``BoundaryDensity(mean, pairs [..])``: of each pair ``Hamming(a, b) / ||x_a - x_b||`` (Euclidean), or the Hamming distance itself
        without inputs, and the mean over pairs (NaN where there are none). Two equal inputs with equal codes have density 0, equal inputs
        with different codes infinity. float32; float64 for float64 inputs.

    For one affine layer the Hamming distance is the number of boundaries that the segment between the inputs crosses; over several layers
    it is a lower bound. Along a path x of samples, with ``codes = spline_code(x, ...)``: ``boundary_density(codes[:-1], codes[1:], x[:-1],
    x[1:])``. Divide by the number of neurons to compare layers of different width. No gradient. Memory: a few temporaries of the inputs'
    size.

    Raises: TypeError: dtype or device. ValueError: shape, or only one of ``x_a`` and ``x_b``.

    Source: the quantity of Black et al. 2022 (arXiv 2211.12312) in the form of later work: one pair's Hamming over Euclidean distance.
    """
    op = "boundary_density"
    checks.tensor(op, "a", a, (torch.int64,))
    checks.tensor(op, "b", b, (torch.int64,), a)
    if a.dim() == 0 or a.shape != b.shape:
        raise ValueError(f"{op}: a and b must have the same shape [.., words], got {list(a.shape)} and {list(b.shape)}")
    if (x_a is None) != (x_b is None):
        raise ValueError(f"{op}: x_a and x_b must be given together, got {'x_b' if x_a is None else 'x_a'} alone")
    crossed = bit_count(a ^ b).sum(-1)
    if x_a is None or x_b is None:
        pairs = crossed.to(torch.float32)
        return BoundaryDensity(pairs.mean(), pairs)
    checks.tensor(op, "x_a", x_a, like=a)
    checks.tensor(op, "x_b", x_b, like=a)
    checks.same_dtype(op, "x_b", x_b, "x_a", x_a)
    for name, x in (("x_a", x_a), ("x_b", x_b)):
        if x.shape[:-1] != a.shape[:-1] or x.dim() != a.dim() or x.shape != x_a.shape:
            raise ValueError(f"{op}: {name} must have shape {[*a.shape[:-1], 'D']} for codes {list(a.shape)}, got {list(x.shape)}")
    wide = accumulator(x_a.dtype)
    distance = torch.linalg.vector_norm(x_a.detach().to(wide) - x_b.detach().to(wide), dim=-1)
    pairs = torch.where((crossed == 0) & (distance == 0), 0.0, crossed.to(wide) / distance)
    return BoundaryDensity(pairs.mean(), pairs)


def neighbour_graph(
    codes: Tensor, k: int, *, symmetric: bool = True, zero: float = 0.5, backend: str | None = None
) -> scipy.sparse.csr_array:
    """Hamming distances of every code to its k nearest others, as a sparse matrix for clustering with a precomputed metric.

    Args:
        codes: ``[N, words]`` int64, N >= 2. k: ``1 <= k <= N - 1``; of equal distances the lower index counts as nearer.
        symmetric: an edge in both directions where either code is among the other's k; False: row i holds i's own k.
        zero: stored in place of the distance 0 of equal codes: graph algorithms take a stored 0 for no edge. Any value below 1 keeps the
            order of distances.
        backend: see ``fastsae.use_backend``.

    Returns:
        ``scipy.sparse.csr_array [N, N]`` float64 with sorted indices; the diagonal is empty. Exact. Memory: ``O(N k)``.

    HDBSCAN needs at least ``min_samples`` neighbours a row (take ``k >= min_samples``) and a connected graph: where
    ``scipy.sparse.csgraph.connected_components`` finds several components, take a larger k or cluster each on its own.

    Example:
        >>> from sklearn.cluster import HDBSCAN
        >>> graph = fastsae.codes.neighbour_graph(fastsae.codes.pack_signs(torch.randn(200, 64)), k=30)
        >>> labels = HDBSCAN(min_cluster_size=20, min_samples=10, metric="precomputed").fit_predict(graph)

    Raises: TypeError: dtype. ValueError: shape, k or zero. ImportError: without SciPy.
    """
    op = "neighbour_graph"
    checks.tensor(op, "codes", codes, (torch.int64,))
    if codes.dim() != 2 or codes.shape[0] < 2:
        raise ValueError(f"{op}: codes must have shape [N, words] with N at least 2, got {list(codes.shape)}")
    n = codes.shape[0]
    k = checks.integer(op, "k", k, 1, n - 1, "N - 1")
    checks.flag(op, "symmetric", symmetric)
    if not isinstance(zero := checks.plain(zero), (int, float)) or isinstance(zero, bool) or not 0 <= zero < 1:
        raise ValueError(f"{op}: zero must be a number of at least 0 and below 1, got {zero!r}")
    try:
        from scipy.sparse import csr_array
    except ImportError as error:
        raise ImportError(f"{op} needs SciPy: pip install 'fastsae-kernels[studies]'") from error
    near = hamming_topk(codes, codes, k + 1, backend=backend)
    # A code is among its own nearest unless k others are equal to it and come before: then the last one goes.
    others = near.index != torch.arange(n, device=codes.device).unsqueeze(1)
    others[:, -1] &= ~others.all(1)
    row, column, distance = torch.arange(n, device="cpu").repeat_interleave(k), near.index[others].cpu(), near.distance[others].cpu()
    if symmetric:
        place, first = torch.cat([row * n + column, column * n + row]).sort()
        distance = torch.cat([distance, distance])[first]
        kept = torch.ones_like(place, dtype=torch.bool)
        kept[1:] = place[1:] != place[:-1]
        place, distance = place[kept], distance[kept]
    else:
        place, first = (row * n + column).sort()
        distance = distance[first]
    row, column = place // n, place % n
    crow = torch.searchsorted(row, torch.arange(n + 1, device="cpu"))
    value = torch.where(distance == 0, float(zero), distance.double())
    graph = csr_array((value.numpy(), column.numpy(), crow.numpy()), shape=(n, n))
    graph.has_sorted_indices = True
    return graph
