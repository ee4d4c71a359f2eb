"""Where a segment crosses polytope boundaries: exact positions, neurons and the hashes of the regions between them.

Layer by layer (the breakpoint extension of ExactLine, Sotoudeh & Thakur 2019): along a segment a ReLU network is affine between
breakpoints, so the pre-activations of the next layer at the breakpoints so far say which of its neurons change sign between which two of
them, and where. Those positions are the new breakpoints. One product per layer serves all breakpoints of all segments, where walking from
region to region needs a forward pass for every region.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastsae._core import checks
from fastsae.ops.hamming import bit_count
from fastsae.ops.spline import checked_key, combine_hashes, hash_signs, pack_signs, spline_code, spline_keys
from fastsae.polytopes.net import (
    PIECEWISE,
    Activation,
    Add,
    Affine,
    Net,
    Norm,
    Operator,
    Save,
    Stage,
    Times,
    activate,
    check_net,
    check_points,
    full_products,
    linear_signs,
    one_layer,
)

_BLOCK = 1 << 17
"""Most elements of the pre-activations of a block of breakpoints that goes through the deeper layers at once: it stays in a cache."""
_FIRST = 1 << 21
"""The same for the first layer, whose weights may be large."""


class Crossings(NamedTuple):
    """Boundaries that segments cross, segment after segment, in the order of ``t``.

    Attributes:
        t: ``[n]`` float64, positions, 0 at p and 1 at q. layer, neuron: ``[n]`` int64, whose sign changes there.
        hash: ``[n]`` int64 (``[n, 2]`` with 128 bits), of the region that is entered, all layers together.
        offsets: ``[S + 1]`` int64; segment s has the entries ``offsets[s] : offsets[s + 1]``.
        start: ``[S]`` int64 (``[S, 2]``), the hash of the region of p.
    """

    t: Tensor
    layer: Tensor
    neuron: Tensor
    hash: Tensor
    offsets: Tensor
    start: Tensor

    @property
    def counts(self) -> Tensor:
        """``[S]`` int64: boundaries that each segment crosses."""
        return self.offsets.diff()

    @property
    def segment(self) -> Tensor:
        """``[n]`` int64: the segment of each entry."""
        return torch.arange(self.start.shape[0], device=self.t.device).repeat_interleave(self.counts, output_size=self.t.shape[0])


# ---------------------------------------------------------------- the walk


class _Block(NamedTuple):
    """Breakpoints of some segments in order, with what the network is there.

    Attributes:
        t, segment: ``[N]``. h: ``[N, width]``. saved: the same for open residual branches. scale: after a normalisation ``h`` stands for
            ``h / s + bias``, and this holds (``m [N - 1, 3]``, ``bias [width]``): ``s^2 = m0 + 2 m1 u + m2 u^2`` between breakpoints i and
            i + 1, u from 0 to 1.
    """

    t: Tensor
    segment: Tensor
    h: Tensor
    saved: tuple[Tensor, ...]
    scale: tuple[Tensor, Tensor] | None = None


def _exact_stages(op: str, net: Net) -> None:
    """ValueError where positions have no closed form."""
    last = max(i for i, stage in enumerate(net.stages) if isinstance(stage, Activation))
    state, why = "linear", ""
    saved: list[str] = []
    layer = 0
    for stage in net.stages[: last + 1]:
        if isinstance(stage, Activation):
            if state == "curved":
                raise ValueError(f"{op}: layer {layer} has no closed form: its input is not piecewise affine ({why}), got {net!r}")
            normalised = state == "scaled"
            if normalised or stage.kind not in PIECEWISE:
                state, why = "curved", f"it follows {'a normalised layer' if normalised else stage.kind}"
            layer += 1
        elif isinstance(stage, Norm):
            state, why = ("scaled", "") if state == "linear" else ("curved", "it follows a normalisation of a curve")
        elif isinstance(stage, Save):
            saved.append(state)
        elif isinstance(stage, Add) and (saved.pop() != "linear" or state != "linear"):
            state, why = "curved", "it follows a residual sum with a normalised branch"
        elif isinstance(stage, Times):
            saved.pop()
            state, why = "curved", "it follows a product of two branches"


def _walk(block: _Block, stages: Sequence[Stage], columns: Mapping[Affine, Tensor], layer: int, found: list[tuple[Tensor, ...]]) -> None:
    """Takes a block through the stages; ``found`` gets (segment, t, layer, neuron) of its crossings."""
    for place, stage in enumerate(stages):
        h = block.h
        if isinstance(stage, (Affine, Operator)):
            scaled = None if block.scale is None else (block.scale[0], stage(block.scale[1]))
            block = block._replace(h=stage(h) if scaled is None else stage.linear(h), scale=scaled)
        elif isinstance(stage, Norm):
            block = _normalised(block, stage)
        elif isinstance(stage, Save):
            block = block._replace(saved=(*block.saved, h))
        elif isinstance(stage, Add):
            block = block._replace(h=h + block.saved[-1], saved=block.saved[:-1])
        elif isinstance(stage, Activation):
            piece, neuron, t, u = _straight(block) if block.scale is None else _curved(block)
            found.append((block.segment[piece], t, torch.full_like(piece, layer), neuron))
            rest = stages[place + 1 :]
            if not rest:
                return
            block, rest = _extended(block, stage, rest, columns, piece, neuron, t, u)
            width = max(block.h.shape[1], *(s.sizes[1] for s in rest if isinstance(s, (Affine, Operator))), 1)
            for part in _parts(block, max(_BLOCK // width, 16)):
                _walk(part, rest, columns, layer + 1, found)
            return


def _straight(block: _Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sign changes between neighbouring breakpoints: (piece, neuron, t, share of the piece)."""
    z = block.h
    on = z > 0
    changed = on[1:] ^ on[:-1]
    if block.segment[0] != block.segment[-1]:
        changed &= (block.segment[1:] == block.segment[:-1]).unsqueeze(1)
    piece, neuron = changed.nonzero(as_tuple=True)
    before, after = z[piece, neuron], z[piece + 1, neuron]
    u = before / (before - after)
    return piece, neuron, torch.lerp(block.t[piece], block.t[piece + 1], u), u


def _extended(
    block: _Block,
    act: Activation,
    rest: Sequence[Stage],
    columns: Mapping[Affine, Tensor],
    piece: Tensor,
    neuron: Tensor,
    t: Tensor,
    u: Tensor,
) -> tuple[_Block, Sequence[Stage]]:
    """The block behind a piecewise affine activation, with a breakpoint at each different position of its crossings.

    Where an affine map comes next and few neurons cross in a piece, it is done here too: between two old breakpoints its result is the line
    between its values there plus, for each neuron that crosses, a tent times that neuron's column. New breakpoints then need no product.
    Returns the block and the stages still to do.
    """
    n = block.t.shape[0]
    order = torch.from_numpy(np.lexsort((t.cpu().numpy(), piece.cpu().numpy()))).to(t.device)
    piece, neuron, t, u = piece[order], neuron[order], t[order], u[order]
    fresh = (t != block.t[piece]) & (t != block.t[piece + 1])
    first = fresh.clone()
    first[1:] &= (piece[1:] != piece[:-1]) | (t[1:] != t[:-1])
    piece_of, u_of = piece[first], u[first].unsqueeze(1)
    ahead = torch.bincount(piece_of, minlength=n).cumsum(0)
    place_old = torch.arange(n, device=t.device)
    place_old[1:] += ahead[:-1]
    place_new = torch.arange(piece_of.shape[0], device=t.device) + piece_of + 1

    def insert(old: Tensor, new: Tensor) -> Tensor:
        result = old.new_empty((n + new.shape[0], *old.shape[1:]))
        return result.index_copy_(0, place_old, old).index_copy_(0, place_new, new)

    def between(h: Tensor) -> Tensor:
        return torch.lerp(h.index_select(0, piece_of), h.index_select(0, piece_of + 1), u_of)

    saved = tuple(insert(h, between(h)) for h in block.saved)
    segment = insert(block.segment, block.segment[piece_of])
    z = block.h
    crossing = torch.bincount(piece, minlength=n)
    each = crossing[piece_of]  # tents that a new breakpoint lies under
    if isinstance(rest[0], Affine) and int(each.sum()) * 8 <= piece_of.shape[0] * z.shape[1]:
        begin = each.cumsum(0) - each
        row = torch.arange(each.shape[0], device=t.device).repeat_interleave(each)
        entry = torch.arange(row.shape[0], device=t.device) + ((crossing.cumsum(0) - crossing)[piece_of] - begin)[row]
        rise, fall = z[piece[entry] + 1, neuron[entry]].abs() * u_of[row, 0], z[piece[entry], neuron[entry]].abs() * (1 - u_of[row, 0])
        tents = torch.minimum(rise, fall) * (act.slope - 1)
        h = F.linear(activate(z, act), rest[0].W, rest[0].b)
        new = between(h)
        if new.shape[0]:
            new += F.embedding_bag(neuron[entry], columns[rest[0]], begin, mode="sum", per_sample_weights=tents)
        return _Block(insert(block.t, t[first]), segment, insert(h, new), saved), rest[1:]
    new = between(z)
    row = first.cumsum(0) - 1
    new[row[fresh], neuron[fresh]] = 0.0  # exactly, which the line between would miss by a rounding
    z = insert(z, new)
    z = z.relu_() if act.kind == "relu" else F.leaky_relu_(z, act.slope)
    return _Block(insert(block.t, t[first]), segment, z, saved), rest


def _parts(block: _Block, most: int) -> list[_Block]:
    """The block as runs of at most ``most`` pieces; neighbours share a breakpoint unless a segment ends there."""
    n, parts, start = block.t.shape[0], [], 0
    while n - start > most + 1:
        stop = start + most + 1
        parts.append(_rows(block, start, stop))
        start = stop if bool(block.segment[stop] != block.segment[stop - 1]) else stop - 1
    return [*parts, _rows(block, start, n)]


def _rows(block: _Block, start: int, stop: int) -> _Block:
    return _Block(block.t[start:stop], block.segment[start:stop], block.h[start:stop], tuple(h[start:stop] for h in block.saved))


# ---------------------------------------------------------------- after a normalisation


def _normalised(block: _Block, norm: Norm) -> _Block:
    h = block.h
    if norm.centred:
        h = h - h.mean(1, keepdim=True)
    before, step = h[:-1], h[1:] - h[:-1]
    moments = torch.stack([before.square().mean(1) + norm.eps, (before * step).mean(1), step.square().mean(1)], 1)
    bias = h.new_zeros(h.shape[1]) if norm.bias is None else norm.bias
    return block._replace(h=norm.scaled(h), scale=(moments, bias))


def _curved(block: _Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``_straight`` for ``g(u) = a(u) + c s(u)``, a affine, s the norm of an affine vector, and so convex.

    g has the sign of the pre-activation, is convex for c > 0 and concave for c < 0: between two points of different sign it has one root,
    between two of the same sign none or two. Roots are those of the quadratic ``a^2 = c^2 s^2`` at which a and c have opposite signs.
    """
    assert block.scale is not None
    m, c = block.scale
    pieces = (block.segment[1:] == block.segment[:-1]).unsqueeze(1)
    a0, a1 = block.h[:-1], block.h[1:] - block.h[:-1]
    m0, m1, m2 = (m[:, i : i + 1] for i in range(3))
    end = m0 + 2 * m1 + m2
    g0, g1 = block.h[:-1] + c * m0.sqrt(), block.h[1:] + c * end.sqrt()
    on0, on1 = g0 > 0, g1 > 0
    # Two roots need an extremum between, with the slopes of g at the ends of opposite signs.
    slope0, slope1 = a1 + c * m1 / m0.sqrt(), a1 + c * (m1 + m2) / end.sqrt()
    dips = (c > 0) & on0 & on1 & (slope0 < 0) & (slope1 > 0)
    bumps = (c < 0) & ~on0 & ~on1 & (slope0 > 0) & (slope1 < 0)
    piece, neuron = (((on0 != on1) | dips | bumps) & pieces).nonzero(as_tuple=True)
    single = on0[piece, neuron] != on1[piece, neuron]
    a0, a1, c = a0[piece, neuron], a1[piece, neuron], c[neuron]
    m0, m1, m2 = m[piece].unbind(1)

    def value(u: Tensor) -> Tensor:
        return a0 + a1 * u + c * (m0 + 2 * m1 * u + m2 * u * u).clamp_min(0).sqrt()

    q2, q1, q0 = a1 * a1 - c * c * m2, a0 * a1 - c * c * m1, a0 * a0 - c * c * m0
    root = (q1 * q1 - q2 * q0).clamp_min(0).sqrt()
    half = -(q1 + torch.where(q1 < 0, -root, root))
    roots = torch.stack([half / q2, q0 / half])  # the pair that cancels nothing
    roots = torch.where(roots.isfinite(), roots, 0.0).clamp(0, 1)
    # One root of g: of the two of the quadratic the one at which g is nearer 0. (The other one has a = c s there: g = 2 a.)
    error = torch.stack([value(roots[0]).abs(), value(roots[1]).abs()])
    best = roots.gather(0, error.argmin(0, keepdim=True))[0]
    low, high = roots.amin(0), roots.amax(0)
    # Two roots of g: it has the other sign between them.
    twice = ~single & (low < high) & ((value(0.5 * (low + high)) > 0) != on0[piece, neuron])

    def polished(u: Tensor) -> Tensor:
        for _ in range(2):  # Newton: the quadratic has squared what it cancels
            s = (m0 + 2 * m1 * u + m2 * u * u).sqrt()
            step = (a0 + a1 * u + c * s) / (a1 + c * (m1 + m2 * u) / s)
            better = (u - step).clamp(0, 1)
            u = torch.where(value(better).abs() < value(u).abs(), better, u)
        return u

    u = torch.cat([polished(best)[single], polished(low)[twice], polished(high)[twice]])
    piece = torch.cat([piece[single], piece[twice], piece[twice]])
    neuron = torch.cat([neuron[single], neuron[twice], neuron[twice]])
    return piece, neuron, torch.lerp(block.t[piece], block.t[piece + 1], u), u


# ---------------------------------------------------------------- public


def _segments(op: str, net: Any, p: Any, q: Any) -> tuple[Net, Tensor, Tensor]:
    net = check_net(op, net, True)
    check_points(op, "p", p, net)
    check_points(op, "q", q, net, p)
    if p.dim() != 2 or p.shape != q.shape:
        raise ValueError(f"{op}: p and q must have the same shape [S, d_in={net.d_in}], got {list(p.shape)} and {list(q.shape)}")
    for name, x in (("p", p), ("q", q)):
        if not bool(x.isfinite().all()):
            raise ValueError(f"{op}: {name} must be finite, got NaN or infinity")
    return net, p.detach().double(), q.detach().double()


@torch.no_grad()
def crossings(net: Net, p: Tensor, q: Tensor, *, seed: int = 0, bits: int = 64) -> Crossings:
    """Every polytope boundary that the segments from p to q cross, exactly.

    Args:
        net: of ``as_net`` or ``mlp_block``. Any number of ReLU and LeakyReLU layers, with residual branches; or one layer of any
            activation after them (of a GELU or SiLU neuron the boundary is where its pre-activation is 0); or one layer after a LayerNorm
            or RMSNorm. What comes behind the last activation does not matter.
        p, q: ``[S, d_in]``, ends of S segments; any floating dtype, widened to float64, as the weights are.
        seed, bits: of the hashes, as in ``spline_hash``; layer l of the net has the key ``layer=l``, as in ``trace``.

    Returns:
        ``Crossings(t, layer, neuron, hash, offsets, start)``, ragged over segments, ascending by t; equal t: by layer, then neuron.
        A neuron is on where its pre-activation is above 0. A crossing is a change from on to off or back on the way from p to q. A neuron
        that is 0 on a stretch is off there, and crosses at an end of the stretch behind which it is on. One that only touches 0 does not
        cross, in an inner point; in p or q it does where it is on beside the point: the code of p, with the crossed neurons flipped, is
        always the code of q. Several neurons may cross at one t. In a single affine layer the number of crossings is the Hamming distance
        of the codes of p and q; over several layers, and after a normalisation (whose boundaries are quadratics in t: a neuron may cross
        twice), that distance is a lower bound.

    Arithmetic is float64. Each position is a root of the computed pre-activation; its error is that of the pre-activation over its slope.
    Where a neuron nearly touches 0, two crossings less than such an error apart may be missed or found. No gradient. Memory beyond the
    result: the weights twice in float64, and the pre-activations at one block of breakpoints a layer. A block is at most 2 Mi elements in a
    net of one layer, and in deeper ones 128 Ki (16 rows of the widest layer at least) plus what is found between its breakpoints, at most
    one row a neuron and piece.

    Raises: TypeError: dtype, device or type. ValueError: shapes; values that are not finite; a layer whose input is not piecewise affine.
    """
    op = "crossings"
    _, seed, bits = checked_key(op, 0, seed, bits)
    net, p, q = _segments(op, net, p, q)
    _exact_stages(op, net)
    wide = linear_signs(net)
    columns = {stage: stage.W.T.contiguous() for stage in wide.stages if isinstance(stage, Affine)}
    found: list[tuple[Tensor, ...]] = []
    start = [p.new_empty((0, bits // 64) if bits == 128 else 0, dtype=torch.int64)]
    per_segment = 2 * max(net.widths[0], p.shape[1])
    per_call = max(1, (_FIRST if len(net.widths) == 1 else _BLOCK) // per_segment)
    for first in range(0, p.shape[0], per_call):
        rows = slice(first, min(first + per_call, p.shape[0]))
        z = wide.preactivations(p[rows])
        start.append(combine_hashes([hash_signs(layer, layer=i, seed=seed, bits=bits) for i, layer in enumerate(z)]))
        count = rows.stop - rows.start
        segment = torch.arange(first, first + count, device=p.device).repeat_interleave(2)
        t = torch.tensor([0.0, 1.0], dtype=torch.float64, device=p.device).repeat(count)
        _walk(_Block(t, segment, torch.stack([p[rows], q[rows]], 1).flatten(0, 1), ()), wide.stages, columns, 0, found)
    return _assembled(found, torch.cat(start), net.widths, seed, bits)


def _assembled(found: list[tuple[Tensor, ...]], start: Tensor, widths: Sequence[int], seed: int, bits: int) -> Crossings:
    """Sorted, touches removed, with offsets and the hashes of the regions entered."""
    device = start.device
    if found:
        segment, t, layer, neuron = (torch.cat(parts).cpu().numpy() for parts in zip(*found))
    else:
        t, (segment, layer, neuron) = np.empty(0), (np.empty(0, np.int64) for _ in range(3))
    order = np.lexsort((neuron, layer, t, segment))
    segment, t, layer, neuron = segment[order], t[order], layer[order], neuron[order]
    if t.shape[0]:  # a neuron that crosses twice at one t has touched 0
        new = np.ones(t.shape[0], bool)
        new[1:] = (segment[1:] != segment[:-1]) | (t[1:] != t[:-1]) | (layer[1:] != layer[:-1]) | (neuron[1:] != neuron[:-1])
        runs = np.flatnonzero(new)
        odd = np.diff(np.append(runs, t.shape[0])) % 2 == 1
        kept = runs[odd]
        segment, t, layer, neuron = segment[kept], t[kept], layer[kept], neuron[kept]
    offsets = np.searchsorted(segment, np.arange(start.shape[0] + 1))
    keys = torch.cat([spline_keys(width, layer=i, seed=seed) for i, width in enumerate(widths)]).numpy()[:, : bits // 64]
    first = np.cumsum([0, *widths[:-1]])
    # The prefix XOR over all segments at once: what stands before a segment is taken out again.
    prefix = np.zeros((t.shape[0] + 1, bits // 64), np.int64)
    np.bitwise_xor.accumulate(keys[first[layer] + neuron], axis=0, out=prefix[1:])
    begin = start.cpu().numpy().reshape(start.shape[0], bits // 64)
    hashes = prefix[1:] ^ (prefix[offsets[:-1]] ^ begin)[segment]
    hashes = hashes[:, 0] if bits == 64 else hashes
    where = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in (t, layer, neuron, hashes, offsets))
    return Crossings._make([*where, start])


class Shell(NamedTuple):
    """Boundaries that rays cross, by their distance from the origin.

    Attributes:
        distance: ``[n]`` float64, ascending in each ray. layer, neuron, hash, offsets ``[R + 1]``, start: as in ``Crossings``, a ray for a
            segment.
    """

    distance: Tensor
    layer: Tensor
    neuron: Tensor
    hash: Tensor
    offsets: Tensor
    start: Tensor


def unit_directions(op: str, directions: Tensor) -> Tensor:
    """Directions at length 1 in float64."""
    checks.shape(op, "directions", directions, (None, None), f"[M, d_in={directions.shape[-1]}]")
    unit = directions.detach().double()
    length = unit.norm(dim=1, keepdim=True)
    if not bool((length.isfinite() & (length > 0)).all()):
        raise ValueError(f"{op}: directions must be finite and of a length above 0, got {float(length.min()):g} .. {float(length.max()):g}")
    return unit / length


@torch.no_grad()
def shell(
    net: Net, directions: Tensor, radius: float | None = None, *, origin: Tensor | None = None, seed: int = 0, bits: int = 64
) -> Shell:
    """Every polytope boundary on rays from an origin, by distance: is there a shell that most boundaries pass through?

    Args:
        net: as in ``crossings``. directions: ``[R, d_in]`` floating, not 0; their lengths do not matter.
        radius: length of the rays; None: without end, for a single affine layer (one closed-form crossing a neuron and ray at most).
        origin: ``[d_in]``, dtype of ``directions``; default 0.
        seed, bits: as in ``crossings``.

    Returns:
        ``Shell``. The distance of a neuron's boundary from the origin itself is ``|W_i · origin + b_i| / ||W_i||``: the shortest that any
        ray finds.

    Raises: as ``crossings``; ValueError: a direction of length 0; no radius for a net of several layers.
    """
    op = "shell"
    net = check_net(op, net)
    check_points(op, "directions", directions, net)
    _, seed, bits = checked_key(op, 0, seed, bits)
    unit = unit_directions(op, directions)
    if origin is None:
        start = torch.zeros_like(unit)
    else:
        check_points(op, "origin", origin, net, directions)
        checks.shape(op, "origin", origin, (net.d_in,), f"[d_in={net.d_in}]")
        checks.same_dtype(op, "origin", origin, "directions", directions)
        start = origin.detach().double().expand_as(unit)
    if radius is not None:
        radius = checks.number(op, "radius", radius)
        found = crossings(net, start, start + radius * unit, seed=seed, bits=bits)
        return Shell(radius * found.t, *found[1:])
    wide = linear_signs(net)
    if not one_layer(wide):
        raise ValueError(f"{op}: radius must be given for a net that is not a single affine layer, got {net!r}")
    found, starts = [], [unit.new_empty((0, bits // 64) if bits == 128 else 0, dtype=torch.int64)]
    zero = wide.preactivations(torch.zeros_like(unit[:1]))[0] if unit.shape[0] else unit.new_empty(0, net.widths[0])
    for rows in (slice(i, i + max(1, _FIRST // net.widths[0])) for i in range(0, unit.shape[0], max(1, _FIRST // net.widths[0]))):
        z, slope = wide.preactivations(start[rows])[0], wide.preactivations(unit[rows])[0] - zero
        starts.append(hash_signs(z, seed=seed, bits=bits))
        # On and falling, or off and rising; a neuron that is 0 here and rises is on behind the origin.
        ray, neuron = torch.where(z > 0, slope < 0, slope > 0).nonzero(as_tuple=True)
        found.append((ray + rows.start, (z[ray, neuron] / slope[ray, neuron]).abs(), torch.zeros_like(ray), neuron))
    return Shell(*_assembled(found, torch.cat(starts), net.widths, seed, bits))


@torch.no_grad()
@full_products
def local_complexity(net: Net, x: Tensor, radius: float, vertices: int, *, seed: int = 0) -> Tensor:
    """How many neurons change sign among the vertices of a small cross-polytope around each point, layer by layer.

    Args:
        net: of ``as_net`` or ``mlp_block``, any activations. x: ``[B, d_in]``, of the dtype of the net.
        radius: distance of the vertices from x, above 0. vertices: their number, even, at most ``2 d_in``: plus and minus
            orthonormal directions, one random frame for all points.
        seed: of the frame.

    Returns:
        ``[B, layers]`` int64. The neurons counted are those whose boundary separates two vertices: in one layer it passes through the
        cross-polytope. x itself does not take part. Codes are OR-ed and AND-ed vertex by vertex, and the answer is ``popcount(OR ^ AND)``:
        memory is that of the codes of B points and of one vertex's activations. The first layer's codes are ``spline_code``'s (no
        pre-activations are stored where there is one layer).

    Raises: TypeError: dtype, device or type. ValueError: shape, radius, vertices.

    Source: the local complexity of Humayun, Balestriero & Baraniuk 2024 (arXiv 2402.15555).
    """
    op = "local_complexity"
    net = check_net(op, net, True)
    check_points(op, "x", x, net, same=True)
    checks.shape(op, "x", x, (None, net.d_in), f"[B, d_in={net.d_in}]")
    radius = float(checks.number(op, "radius", radius))
    vertices = checks.integer(op, "vertices", vertices, 2, 2 * x.shape[1], "2 d_in")
    seed = checks.integer(op, "seed", seed, 0)
    if vertices % 2:
        raise ValueError(f"{op}: vertices must be even (plus and minus each direction), got {vertices}")
    narrow = net.to(x.dtype)
    first = narrow.stages[0]
    one = len(net.widths) == 1 and isinstance(first, Affine) and isinstance(narrow.stages[1], Activation)
    normal = torch.randn(x.shape[1], vertices // 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), device="cpu")
    frame = torch.linalg.qr(normal).Q.T.to(x.device, x.dtype) * radius
    either: list[Tensor] = []
    both: list[Tensor] = []
    for step in torch.stack([frame, -frame], 1).flatten(0, 1):
        vertex = x.detach() + step
        if one and isinstance(first, Affine):
            words = [spline_code(vertex, first.W, first.b)]
        else:
            words = [pack_signs(z) for z in narrow.preactivations(vertex)]
        either = [a | b for a, b in zip(either, words)] if either else words
        both = [a & b for a, b in zip(both, words)] if both else words
    return torch.stack([bit_count(a ^ b).sum(1) for a, b in zip(either, both)], 1)
