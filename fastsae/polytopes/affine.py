"""The affine maps of polytopes and how far apart they are, without forming them where that can be avoided.

For one MLP ``W_out diag(a) W_in`` with code a, ``||A_a - A_b||_F^2 = s^T M s`` with ``s = a - b`` and ``M = (W_out^T W_out) ∘ (W_in
W_in^T)``: expand the norm of ``sum_i s_i w_out_i w_in_i^T``. Flipping neuron i alone changes the map by the rank-one matrix ``w_out_i
w_in_i^T``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastsae._core import checks
from fastsae.ops.encode import encode_topk
from fastsae.ops.hamming import Neighbours
from fastsae.ops.spline import unpack_bits
from fastsae.polytopes.net import (
    PIECEWISE,
    Activation,
    Add,
    Affine,
    Mlp,
    Net,
    Norm,
    Operator,
    Save,
    check_net,
    check_points,
    full_products,
    one_mlp,
    refuse_gated,
)
from fastsae.polytopes.soft import unit_pieces
from fastsae.reference import accumulator, chunks, product

# ---------------------------------------------------------------- maps

_NO_NORM = "net must hold no normalisation (it is not affine on a region; mlp_block(norm=False))"


def _map(op: str, net: Net, x: Tensor, pieces: Any) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """At rows x: ``A [n, d_out, d_in]``, ``c [n, d_out]``, and for each activation layer its slopes and the norms of the rows that lead to
    it.

    ``pieces(z, act)`` gives slope and intercept of each neuron at pre-activations z.
    """
    d_in = x.shape[1]
    A = torch.eye(d_in, dtype=x.dtype, device=x.device).expand(x.shape[0], d_in, d_in)
    c, h = x.new_zeros(x.shape[0], d_in), x
    saved: list[tuple[Tensor, Tensor, Tensor]] = []
    layers: list[tuple[Tensor, Tensor]] = []
    for stage in net.stages:
        if isinstance(stage, Affine):
            A, c, h = stage.W @ A, stage(c), stage(h)
        elif isinstance(stage, Operator):
            A, c, h = stage.linear(A.mT).mT, stage(c), stage(h)
        elif isinstance(stage, Activation):
            slope, intercept = pieces(h, stage)
            layers.append((slope, A.norm(dim=2)))
            A, c, h = slope.unsqueeze(2) * A, slope * c + intercept, slope * h + intercept
        elif isinstance(stage, Norm):
            raise ValueError(f"{op}: {_NO_NORM}, got {net!r}")
        elif isinstance(stage, Save):
            saved.append((A, c, h))
        else:
            A, c, h = (now + before for now, before in zip((A, c, h), saved.pop()))
    return A, c, layers


def _map_inputs(op: str, net: Any, x: Any) -> tuple[Net, Tensor]:
    """The net and x in the dtype of sums."""
    net = check_net(op, net)
    refuse_gated(op, net)
    check_points(op, "x", x, net, same=True)
    wide = accumulator(x.dtype)
    return net.to(wide), x.detach().to(wide)


def _maps(net: Net, x: Tensor, rows: Tensor, op: str, beta: float | None) -> tuple[Tensor, Tensor]:
    """Those at x, ``rows`` of it in the dtype of sums."""
    A, c, _ = _map(op, net, rows.reshape(-1, x.shape[-1]), lambda z, act: unit_pieces(z, act, beta))
    return A.reshape(*x.shape[:-1], *A.shape[1:]).to(x.dtype), c.reshape(*x.shape[:-1], c.shape[1]).to(x.dtype)


@torch.no_grad()
@full_products
def affine_map(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    """The affine map of the polytope that x lies in: ``net(x') = A x' + c`` for every x' in it.

    Args:
        net: ReLU and LeakyReLU layers, residual branches. x: ``[.., d_in]`` of the net's dtype.

    Returns:
        ``A [.., d_out, d_in]``, ``c [.., d_out]`` in the dtype of x, sums in float32 (float64 for float64). A neuron at 0 counts as off. No
        gradient. Memory: a few times the widest ``[rows, width, d_in]``.

    Raises: TypeError: dtype, device or type. ValueError: shape; a smooth activation (see ``soft_affine_map``) or a normalisation.
    """
    op = "affine_map"
    wide, rows = _map_inputs(op, net, x)
    refuse_curved(op, wide)
    return _maps(wide, x, rows, op, None)


@torch.no_grad()
@full_products
def soft_affine_map(net: Net, x: Tensor, beta: float | None = None) -> tuple[Tensor, Tensor]:
    """The average of the affine maps of all polytopes, weighted by their probabilities at x: each neuron's code is drawn from its soft
    code.

    Args:
        net: any activations of ``as_net``; neurons and layers are taken as independent. x: ``[.., d_in]`` of the net's dtype.
        beta: None: each activation's own code (``soft_code``). A number in [0, 1]: that of a β-VQ (1: the hard code).

    Returns:
        ``A [.., d_out, d_in]``, ``c [.., d_out]`` as of ``affine_map``. A gate (GELU: Φ(z), SiLU: σ(z)) is the probability of the map z
        beside that of 0; sigmoid, tanh and softmax are probabilities of constants. ``A x + c`` equals ``net(x)`` for every activation with
        ``beta=None``: in one layer because ``z q(z)`` is the activation itself, and so layer by layer. A is not the Jacobian: of GELU that
        has the slope ``Φ(z) + z φ(z)``.

    Raises: as ``affine_map``; ValueError: ``beta``, or ``beta`` with GELU, whose code is no VQ.

    Source: soft VQ of Balestriero & Baraniuk 2018 (arXiv 1810.09274).
    """
    op = "soft_affine_map"
    wide, rows = _map_inputs(op, net, x)
    return _maps(wide, x, rows, op, beta)


# ---------------------------------------------------------------- distances


def _gram(op: str, net: Any) -> tuple[Tensor, Mlp]:
    """M in float64, times the squared difference of the slopes."""
    mlp = one_mlp(op, check_net(op, net))
    if mlp.act.kind not in ("relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "quick_gelu"):
        raise ValueError(f"{op}: net must have an activation that gates (ReLU, LeakyReLU, GELU, SiLU), got {mlp.act.kind}")
    W_in, W_out = mlp.W_in.detach().double(), mlp.W_out.detach().double()
    return (W_out.T @ W_out) * (W_in @ W_in.T) * (1 - mlp.act.slope) ** 2, mlp


def _codes(op: str, name: str, codes: Any, neurons: int, like: Tensor) -> Tensor:
    """Packed int64 words or a soft code, as it is; checked."""
    checks.tensor(op, name, codes, (torch.int64, *checks.FLOATS))
    if codes.device != like.device:
        raise TypeError(f"{op}: {name} must be on {like.device} like the net, got {codes.device}")
    width = (neurons + 63) // 64 if codes.dtype is torch.int64 else neurons
    if codes.dim() == 0 or codes.shape[-1] != width:
        meaning = f"{width} words" if codes.dtype is torch.int64 else f"H={neurons}"
        raise ValueError(f"{op}: {name} must have shape [.., {meaning}] of its {codes.dtype}, got {list(codes.shape)}")
    return codes


def _dense(codes: Tensor, neurons: int) -> Tensor:
    """``[n, H]`` float64."""
    return (unpack_bits(codes)[:, :neurons] if codes.dtype is torch.int64 else codes).double()


@torch.no_grad()
def frobenius_distance(net: Net, code_a: Tensor, code_b: Tensor) -> Tensor:
    """Frobenius norm of the difference of the affine maps of two polytopes of an MLP, pair by pair; no map is formed.

    Args:
        net: one MLP (Linear, ReLU / LeakyReLU / GELU / SiLU, Linear; with a norm before it the maps are those of the normalised input; a
            residual cancels). code_a, code_b: ``[.., words]`` int64 packed codes as of ``spline_code``, or ``[.., H]`` floating soft codes
            as of ``soft_code``; leading dimensions broadcast.

    Returns:
        ``[..]`` float64, ``sqrt(s^T M s)`` in float64. Equal codes: exactly 0. Unbounded where weights are. Memory: two temporaries
        ``[pairs, H]`` in chunks of 16 Mi elements, and M ``[H, H]``.

    Raises: TypeError: dtype, device or type. ValueError: shape; not one MLP, or an activation that does not gate.
    """
    op = "frobenius_distance"
    M, mlp = _gram(op, net)
    neurons = M.shape[0]
    a, b = (_codes(op, name, code, neurons, mlp.W_in) for name, code in (("code_a", code_a), ("code_b", code_b)))
    try:
        batch = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    except RuntimeError:
        raise ValueError(f"{op}: code_a and code_b must broadcast, got {list(a.shape)} and {list(b.shape)}") from None
    a, b = (code.expand(*batch, code.shape[-1]).reshape(-1, code.shape[-1]) for code in (a, b))
    result = torch.empty(a.shape[0], dtype=torch.float64, device=a.device)
    for rows in chunks(a.shape[0], neurons):
        s = _dense(a[rows], neurons) - _dense(b[rows], neurons)
        result[rows] = _norm(s, M)
    return result.reshape(batch)


def _norm(s: Tensor, M: Tensor) -> Tensor:
    return ((s @ M) * s).sum(1).clamp_min(0).sqrt()


def _near(op: str, net: Any, codes: Any, others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(M, a, a's squares, b, b's squares): codes from one origin, the mean code, so that little cancels."""
    M, mlp = _gram(op, net)
    for name, code in (("codes", codes), ("others", others)):
        if code is not None:
            _codes(op, name, code, M.shape[0], mlp.W_in)
            if code.dim() != 2:
                raise ValueError(f"{op}: {name} must have two dimensions, got {list(code.shape)}")
    a = _dense(codes, M.shape[0])
    b = a if others is None else _dense(others, M.shape[0])
    origin = b.mean(0) if b.shape[0] else b.new_zeros(b.shape[1])
    a = a - origin
    b = a if others is None else b - origin
    squares = ((a @ M) * a).sum(1)
    return M, a, squares, b, squares if others is None else ((b @ M) * b).sum(1)


@torch.no_grad()
def frobenius_pairs(net: Net, codes: Tensor, others: Tensor | None = None) -> Tensor:
    """``frobenius_distance`` of all pairs, by two products instead of N M maps.

    Args:
        net, codes ``[N, words]`` or ``[N, H]``, others ``[M, ..]`` (None: the codes themselves): as in ``frobenius_distance``.

    Returns:
        ``[N, M]`` float64, of equal codes exactly 0. Pairs whose squares cancel by more than 2^20 are computed again from their difference.
        Memory beyond the result: the codes in float64, and chunks of 16 Mi elements. Raises: as ``frobenius_distance``.
    """
    M, a, a2, b, b2 = _near("frobenius_pairs", net, codes, others)
    result = torch.empty(a.shape[0], b.shape[0], dtype=torch.float64, device=a.device)
    for rows in chunks(a.shape[0], b.shape[0]):
        sizes = a2[rows].unsqueeze(1) + b2
        square = torch.addmm(sizes, a[rows] @ M, b.T, alpha=-2)
        i, j = (square < sizes * 2.0**-20).nonzero(as_tuple=True)
        square.clamp_(min=0).sqrt_()
        for part in chunks(i.shape[0], a.shape[1]):
            s = a[rows][i[part]] - b[j[part]]
            square[i[part], j[part]] = _norm(s, M)
        result[rows] = square
    return result


@torch.no_grad()
def frobenius_topk(net: Net, codes: Tensor, others: Tensor, k: int) -> Neighbours:
    """For each code the k others with the nearest affine maps.

    Args:
        net, codes ``[N, ..]``, others ``[M, ..]``: as in ``frobenius_pairs``. k: ``1 <= k <= M``.

    Returns:
        ``Neighbours(distance [N, k] float64, index [N, k] int64)`` ascending by distance, then index; the nearest are chosen by float64
        products, the distances computed from the differences. Memory: chunks of 16 Mi elements. Raises: as ``frobenius_pairs``; ValueError:
        k.
    """
    op = "frobenius_topk"
    k = checks.integer(op, "k", k, 1)
    M, a, _, b, b2 = _near(op, net, codes, others)
    k = checks.integer(op, "k", k, 1, b.shape[0], "the number of others")
    # The nearest b has the largest a^T M b - b^T M b / 2: a top-k of scores, whose kernel never holds them all.
    index = encode_topk(a @ M, b, -0.5 * b2, k=k, relu=False).indices
    distance = torch.empty(index.shape, dtype=torch.float64, device=a.device)
    for rows in chunks(a.shape[0], k * a.shape[1]):
        s = a[rows].unsqueeze(1) - b[index[rows]]
        distance[rows] = _norm(s.flatten(0, 1), M).reshape(s.shape[:2])
    index, order = index.sort(1)
    distance, last = distance.gather(1, order).sort(dim=1, stable=True)
    return Neighbours(distance, index.gather(1, last))


@torch.no_grad()
@full_products
def boundary_norms(net: Net, x: Tensor | None = None) -> list[Tensor]:
    """How much the affine map changes across each neuron's boundary: the Frobenius norm of the rank-one difference.

    Args:
        net: ReLU and LeakyReLU layers; or one MLP as in ``frobenius_distance``.
        x: ``[B, d_in]`` of the net's dtype, where in the other neurons' regions; None: one MLP, for which it does not matter.

    Returns:
        One tensor for each activation layer: ``[H]`` float64 without x (``||W_out[:, i]|| ||W_in[i]||``), ``[B, H]`` in the dtype of x with
            it: the
        norm of the column that leads from the neuron to the output times that of the row that leads from the input to it. (The difference
        across the boundary at a point of it; x itself need not lie on it.) Memory with x: ``[rows, width, d_in + d_out]`` in chunks of 16
        Mi elements.

    Raises: TypeError: dtype, device or type. ValueError: shape; a normalisation or smooth activation with x; not one MLP without.
    """
    op = "boundary_norms"
    if x is None:
        M, _ = _gram(op, net)
        return [M.diagonal().clamp_min(0).sqrt()]
    dtype = getattr(x, "dtype", None)
    net, x = _map_inputs(op, net, x)
    refuse_curved(op, net)
    checks.shape(op, "x", x, (None, net.d_in), f"[B, d_in={net.d_in}]")
    result = [x.new_empty(x.shape[0], width) for width in net.widths]
    for rows in chunks(x.shape[0], max((*net.widths, x.shape[1])) * (x.shape[1] + (net.d_out or 1))):
        _, _, layers = _map(op, net, x[rows], lambda z, act: unit_pieces(z, act, None))
        G = torch.eye(net.d_out or 1, dtype=x.dtype, device=x.device).expand(rows.stop - rows.start, -1, -1)
        saved: list[Tensor] = []
        layer = len(layers)
        for stage in reversed(net.stages):
            if isinstance(stage, (Affine, Operator)):
                G = stage.pulled(G)
            elif isinstance(stage, Activation):
                layer -= 1
                slope, row_norms = layers[layer]
                result[layer][rows] = G.norm(dim=1) * row_norms * abs(1 - stage.slope)
                G = G * slope.unsqueeze(1)
            elif isinstance(stage, Add):
                saved.append(G)
            else:
                G = G + saved.pop()
    return [norms.to(dtype) for norms in result]


def refuse_curved(op: str, net: Net) -> None:
    """ValueError where a region has no affine map."""
    refuse_gated(op, net)
    if any(isinstance(stage, Norm) for stage in net.stages):
        raise ValueError(f"{op}: {_NO_NORM}, got {net!r}")
    smooth = next((s.kind for s in net.stages if isinstance(s, Activation) and s.kind not in PIECEWISE), None)
    if smooth is not None:
        raise ValueError(f"{op}: net must have ReLU and LeakyReLU layers alone (soft_affine_map takes smooth ones), got {smooth}")


# ---------------------------------------------------------------- a map for each centre


class NearestAffine(nn.Module):
    """A piecewise affine system with a map for each centre: ``y = A[i] x + c[i]``, i the centre nearest to x.

    Args:
        centres: ``[C, D]``. A: ``[C, E, D]``. c: ``[C, E]`` or None (zeros). One floating dtype and device; kept as they are (a
            ``Parameter`` is registered as one, others as buffers).

    Called on ``x [.., D]`` of that dtype it returns ``y [.., E]``; ``nearest(x)`` returns i ``[..]`` int64. Nearest is
    Euclidean, found as the largest ``x·μ - ||μ||² / 2`` by ``encode_topk`` (equal ones: the lower index). Rows are grouped by centre and
    multiplied in blocks of 32 rows of one centre, so that each map is read once a block and no map is copied for each row. Differentiable
    in x, A and c (the choice of the centre is not). Memory: x and y once more, padded by at most 31 rows a centre that is used, and the
    maps of 512 blocks at a time.

    Raises: TypeError: dtype, device or type. ValueError: shape.

    Example:
        >>> x, centres, A, c = torch.randn(5, 3), torch.randn(4, 3), torch.randn(4, 3, 3), torch.randn(4, 3)
        >>> system = fastsae.polytopes.NearestAffine(centres, A, c)
        >>> x = system(x)  # one step of the dynamics
    """

    BLOCK = 32

    def __init__(self, centres: Tensor, A: Tensor, c: Tensor | None = None) -> None:
        super().__init__()
        op = "NearestAffine"
        checks.tensor(op, "centres", centres)
        checks.shape(op, "centres", centres, (None, None), "[C, D]")
        C, D = centres.shape
        if C == 0:
            raise ValueError(f"{op}: centres must hold at least one row, got {list(centres.shape)}")
        checks.tensor(op, "A", A, (centres.dtype,), centres)
        checks.shape(op, "A", A, (C, None, D), f"[C={C}, E, D={D}]")
        if c is not None:
            checks.tensor(op, "c", c, (centres.dtype,), centres)
            checks.shape(op, "c", c, (C, A.shape[1]), f"[C={C}, E={A.shape[1]}]")
        for name, value in (("centres", centres), ("A", A), ("c", c)):
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)
        self.centres: Tensor
        self.A: Tensor
        self.c: Tensor | None

    def _rows(self, op: str, x: Any) -> Tensor:
        checks.tensor(op, "x", x, (self.centres.dtype,), self.centres)
        if x.dim() == 0 or x.shape[-1] != self.centres.shape[1]:
            raise ValueError(f"{op}: x must have shape [.., D={self.centres.shape[1]}], got {list(x.shape)}")
        return x.reshape(-1, x.shape[-1])

    @full_products
    def nearest(self, x: Tensor) -> Tensor:
        """The index of the centre nearest to each row of x, ``[..]`` int64."""
        return self._nearest(self._rows("NearestAffine.nearest", x)).reshape(x.shape[:-1])

    @torch.no_grad()
    def _nearest(self, rows: Tensor) -> Tensor:
        centres = self.centres.detach()
        wide = centres.to(accumulator(centres.dtype))
        half = -0.5 * wide.square().sum(1)
        return encode_topk(rows.detach(), centres, half, k=1, relu=False).indices[:, 0]

    @full_products
    def forward(self, x: Tensor) -> Tensor:
        rows = self._rows("NearestAffine", x)
        index = self._nearest(rows)
        count = torch.bincount(index, minlength=self.centres.shape[0])
        blocks = (count + self.BLOCK - 1) // self.BLOCK
        owner = torch.arange(count.shape[0], device=x.device).repeat_interleave(blocks)
        # Place of each row in the padded blocks: its centre's first block, then its rank among the centre's rows.
        order = index.argsort(stable=True)
        rank = torch.arange(rows.shape[0], device=x.device) - (count.cumsum(0) - count)[index[order]]
        place = (blocks.cumsum(0) - blocks)[index[order]] * self.BLOCK + rank
        padded = rows.new_zeros(owner.shape[0] * self.BLOCK, rows.shape[1]).index_copy(0, place, rows[order])
        parts = [
            product(part, self.A[which].mT) + (0 if self.c is None else self.c[which].unsqueeze(1))
            for part, which in zip(padded.view(-1, self.BLOCK, rows.shape[1]).split(512), owner.split(512))
        ]
        y = torch.cat(parts).flatten(0, 1) if rows.shape[0] else rows.new_zeros(0, self.A.shape[1])
        result = y[place[order.argsort()]] if rows.shape[0] else y
        return result.reshape(*x.shape[:-1], self.A.shape[1])
