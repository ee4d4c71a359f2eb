"""How far along a direction a point keeps its region, its map and its output: distances on rays, for all pairs of points and directions.

In one layer neuron j is ``z_j + t s_j`` on a ray and changes at ``t = -z_j / s_j``: the first boundary has the largest ``s_j (-1 / z_j)``,
without a division a pair, and of all neurons only those with a large factor can be it, which a bound proves pair by pair (the threshold
algorithm of Fagin, Lotem & Naor 2003). Between boundaries the output is a line, and each neuron that has changed adds the tent
``|s_j| (t - t_j)`` times its output column. Several layers are walked by ``crossings``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsae._core import checks
from fastsae.polytopes.affine import affine_map, refuse_curved
from fastsae.polytopes.boundaries import crossings, unit_directions
from fastsae.polytopes.dictionaries import planes_of
from fastsae.polytopes.net import Net, check_net, check_points, linear_signs, one_layer, one_mlp
from fastsae.reference import chunks

_NEAR, _FAST = 32, 8
"""Neurons nearest to 0 of a point, and those fastest in a direction, that every pair looks at."""
_CACHED = 6
"""``chunks`` of 16 Mi elements shrunk by 2^6: they stay in a cache."""
_PAIRS = 4096
"""Rays that ``crossings`` gets at once."""


class Validity(NamedTuple):
    """Distances along the rays ``x + t d`` and ``x - t d``, d of length 1; infinite where there is no such place.

    Attributes:
        first: ``[N, M, 2]`` float64, to the first boundary; the last dimension is the side, + then -. bits, map, output: the same, to the
            stated share of changed bits and to the stated changes of map and output; None where not asked.
    """

    first: Tensor
    bits: Tensor | None
    map: Tensor | None
    output: Tensor | None


class _Asked(NamedTuple):
    """What is asked: changed bits (a number), Frobenius and Euclidean norms ``[N]``; None where not."""

    bits: int | None
    map: Tensor | None
    output: Tensor | None

    def rows(self, index: Any) -> _Asked:
        return _Asked(self.bits, *(None if norm is None else norm[index] for norm in self[1:]))


class _Layer(NamedTuple):
    """One layer with the points ``z [N, H]`` and directions ``s [M, H]`` at its neurons; rows ``W_in [H, d_in]``, ``W_out [H, d_out]``."""

    z: Tensor
    s: Tensor
    W_in: Tensor | None = None
    W_out: Tensor | None = None
    past: Tensor | None = None
    """``[M, d_out]``, the directions by a path past the layer."""
    slope: float = 0.0
    jump: Tensor | None = None

    @property
    def width(self) -> int:
        """The larger of d_in and d_out, where known."""
        return max((W.shape[1] for W in (self.W_in, self.W_out) if W is not None), default=1)

    def rates(self) -> Tensor:
        """``-1 / z``: times s it is 1 / t. A neuron at 0 is off, and on at once where it rises."""
        most = torch.finfo(torch.float64).max
        return self.z.reciprocal().neg_().masked_fill_(self.z == 0, most).clamp_(-most, most)


def _distance(rate: Tensor) -> Tensor:
    return torch.where(rate > 1e300, 0.0, torch.where(rate > 0, 1 / rate, math.inf))


# ---------------------------------------------------------------- the first boundary of one layer


def _extremes(index: Tensor, factors: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and least of ``factors [R, K] * columns [H, Q]`` at the K indices of each row: two ``[R, Q]``."""
    K, Q = index.shape[1], columns.shape[1]
    high, low = (columns.new_empty(index.shape[0], Q) for _ in range(2))
    for rows in chunks(index.shape[0], (K * Q) << _CACHED):
        products = columns[index[rows].flatten()].view(-1, K, Q).mul_(factors[rows].unsqueeze(2))
        high[rows], low[rows] = products.amax(1), products.amin(1)
    return high, low


def _first(layer: _Layer) -> Tensor:
    """``[N, M, 2]``: the distances of the first boundaries."""
    c, s, H = layer.rates(), layer.s, layer.s.shape[1]
    near, fast = (values.abs().topk(min(count + 1, H)) for values, count in ((c, _NEAR), (s, _FAST)))

    def chosen(best: Any, count: int, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(indices, values there, the largest of the others)"""
        index = best.indices[:, : min(count, H)]
        rest = best.values[:, count] if count < H else best.values.new_zeros(best.values.shape[0])
        return index, values.gather(1, index), rest

    index_c, top_c, rest_c = chosen(near, _NEAR, c)
    index_s, top_s, rest_s = chosen(fast, _FAST, s)
    high, low = _extremes(index_c, top_c, s.T.contiguous())
    also = _extremes(index_s, top_s, c.T.contiguous())
    high, low = torch.maximum(high, also[0].T), torch.minimum(low, also[1].T)
    wider = c.abs().topk(min(8 * _NEAR + 1, H))
    for index, rest in ((wider.indices[:, : 8 * _NEAR], wider.values[:, -1]), (None, torch.zeros_like(rest_c))):
        n, m = (torch.minimum(high, -low) < rest_c.unsqueeze(1) * rest_s).nonzero(as_tuple=True)
        for part in chunks(n.shape[0], H if index is None else index.shape[1]):
            i, j = n[part], m[part]
            if index is None:
                products = c[i] * s[j]
            else:
                products = c[i.unsqueeze(1), index[i]] * s[j.unsqueeze(1), index[i]]
            high[i, j] = torch.maximum(high[i, j], products.amax(1))
            low[i, j] = torch.minimum(low[i, j], products.amin(1))
        rest_c = rest if H > 8 * _NEAR else torch.zeros_like(rest)
    return _distance(torch.stack([high, -low], 2))


# ---------------------------------------------------------------- further along, one layer


def _root(r: Tensor, v: Tensor, norm: Tensor) -> Tensor:
    """The least u >= 0 with ``||r + u v|| >= norm``, rows of r and v; infinite where there is none."""
    a, b, c = v.square().sum(-1), (r * v).sum(-1), r.square().sum(-1) - norm.square()
    root = (b * b - a * c).clamp_min(0).sqrt()
    u = torch.where(b > 0, -c / (b + root), (root - b) / a)  # neither cancels
    return torch.where(c >= 0, 0.0, torch.where(a > 0, u, math.inf))


def _changes(layer: _Layer, on: Tensor, s: Tensor, base: Tensor | None, top: Any, whole: bool, asked: _Asked) -> list[Tensor]:
    """Distances to the changes of map and output on rays ``s [p, H]``, by the neurons of the largest rates ``top [p, K]``."""
    assert layer.W_in is not None and layer.W_out is not None
    t, index = _distance(top.values), top.indices
    there = t.isfinite()
    sign = torch.where(on[index], -1.0, 1.0) * there
    settled = torch.ones_like(there)  # all that change at one place have changed
    settled[:, :-1] = t[:, 1:] > t[:, :-1]
    settled[:, -1] = whole
    outward = layer.W_out[index]
    of_map = of_output = None
    if asked.map is not None:
        inward = layer.W_in[index]
        G = (outward @ outward.mT) * (inward @ inward.mT) * (sign.unsqueeze(2) * sign.unsqueeze(1))
        square = (2 * G.tril().sum(2) - G.diagonal(dim1=1, dim2=2)).cumsum(1) * (1 - layer.slope) ** 2
        of_map = torch.where(settled & there & (square >= asked.map.square()), t, math.inf).amin(1)
    if asked.output is not None and base is not None:
        bends = (1 - layer.slope) * s.gather(1, index).abs() * there
        v = torch.cat([base.unsqueeze(1), base.unsqueeze(1) + (bends.unsqueeze(2) * outward).cumsum(1)], 1)
        start = torch.cat([torch.zeros_like(t[:, :1]), t], 1)
        length = torch.diff(start, dim=1, append=torch.full_like(t[:, :1], math.inf))
        steps = torch.where(there, length[:, :-1], 0.0).unsqueeze(2) * v[:, :-1]
        if layer.jump is not None:
            steps = steps + (sign * layer.jump[index]).unsqueeze(2) * outward
        r = torch.cat([torch.zeros_like(v[:, :1]), steps.cumsum(1)], 1)
        u = _root(r, v, asked.output)
        known = torch.cat([torch.ones_like(settled[:, :1]), settled], 1) & start.isfinite()
        known[:, 0] &= t[:, 0] > 0
        of_output = torch.where(known & (u <= length), start + u, math.inf).amin(1)
    return [value for value in (of_map, of_output) if value is not None]


def _further(layer: _Layer, asked: _Asked, results: list[Tensor]) -> None:
    """Fills (.., bits, map, output), ``[N, M, 2]`` each, with what is asked, a point at a time."""
    H, (_, bits, *changes) = layer.s.shape[1], results
    changes = [change for change, norm in zip(changes, asked[1:]) if norm is not None]
    for n, rate in enumerate(layer.rates() if asked.bits is not None or changes else ()):
        on, here = layer.z[n] > 0, asked.rows(n)
        base = None
        if here.output is not None and layer.W_out is not None:
            base = (layer.s[:, on] * (1 - layer.slope)) @ layer.W_out[on] + layer.slope * (layer.s @ layer.W_out if layer.slope else 0)
            base = base if layer.past is None else base + layer.past
        for side, rows in ((side, rows) for rows in chunks(layer.s.shape[0], H << 2) for side in (0, 1)):
            s = (1.0 - 2 * side) * layer.s[rows]
            rates = s * rate
            if here.bits is not None:
                bits[n, rows, side] = _distance(rates.topk(here.bits).values[:, -1])
            waiting, K = torch.arange(len(s) if changes else 0, device=s.device), min(64, H)
            while waiting.numel():
                for part in chunks(len(waiting), (K * (K + 2 * layer.width)) << 2):
                    some = waiting[part]
                    ahead = None if base is None else (1.0 - 2 * side) * base[rows][some]
                    found = _changes(layer, on, s[some], ahead, rates[some].topk(K), K == H, here)
                    for change, value in zip(changes, found):
                        change[n, rows.start + some, side] = value
                missing = torch.stack([change[n, rows, side][waiting] for change in changes]).isinf().any(0)
                waiting, K = waiting[missing if K < H else ~missing & missing], min(4 * K, H)


# ---------------------------------------------------------------- several layers


def _walked(net: Net, p: Tensor, unit: Tensor, length: float, asked: _Asked) -> list[Tensor]:
    """(first, bits, map, output) on the segments from p of one length; infinite where not reached, and where not asked 0."""
    found = crossings(net, p, p + length * unit)
    S, segment, t = p.shape[0], found.segment, found.t * length
    settled = torch.ones_like(t, dtype=torch.bool)
    settled[:-1] = (segment[1:] != segment[:-1]) | (t[1:] > t[:-1])

    def least(of: Tensor, values: Tensor, where: Tensor) -> Tensor:
        none = torch.full((S,), math.inf, dtype=torch.float64, device=p.device)
        return none.scatter_reduce(0, of[where], values[where], "amin")

    result = [least(segment, t, settled), *p.new_zeros(3, S)]
    if asked.bits is not None:
        starts = torch.tensor([0, *net.widths], device=p.device).cumsum(0)
        key, order = (segment * int(starts[-1]) + starts[found.layer] + found.neuron).sort(stable=True)
        new = torch.ones_like(key, dtype=torch.bool)
        new[1:] = key[1:] != key[:-1]
        at = torch.arange(key.shape[0], device=p.device)
        again = (at - torch.where(new, at, 0).cummax(0).values if at.numel() else at) % 2
        changed = torch.empty_like(at).index_copy_(0, order, 1 - 2 * again).cumsum(0)
        before = torch.cat([changed.new_zeros(1), changed])[found.offsets[:-1]]
        result[1] = least(segment, t, settled & (changed - before[segment] >= asked.bits))
    if asked.map is not None:
        after = torch.cat([t[1:], t.new_full((min(1, t.shape[0]),), length)])
        after[found.offsets[1:][found.counts > 0] - 1] = length
        distance = torch.zeros_like(t)
        for rows in chunks(t.shape[0], 2 * (net.d_out or 1) * (net.d_in or 1)):
            of, middle = segment[rows], 0.5 * (t[rows] + after[rows])
            maps = affine_map(net, torch.stack([p[of], p[of] + middle.unsqueeze(1) * unit[of]]))[0]
            distance[rows] = (maps[1] - maps[0]).flatten(1).norm(dim=1)
        result[2] = least(segment, t, settled & (distance >= asked.map[segment]))
    if asked.output is not None:
        of, order = torch.cat([segment, torch.arange(S, device=p.device)]).sort(stable=True)
        place = torch.cat([t, t.new_full((S,), length)])[order]
        r = net(p[of] + place.unsqueeze(1) * unit[of]) - net(p)[of]
        begins = torch.ones_like(of, dtype=torch.bool)
        begins[1:] = of[1:] != of[:-1]
        r0, t0 = (torch.where(begins.view(-1, *[1] * (v.dim() - 1)), 0.0, v.roll(1, 0)) for v in (r, place))
        norm = asked.output[of]
        reached = (r.norm(dim=1) >= norm) & (r0.norm(dim=1) < norm)
        result[3] = least(of, t0 + _root(r0, r - r0, norm).clamp_max(1) * (place - t0), reached)
    return result


def _along(net: Net, x: Tensor, unit: Tensor, radius: float, asked: _Asked) -> Tensor:
    """(first, bits, map, output), ``[4, N M 2]``: segments that grow to the radius until all that is asked is found."""
    M, P = unit.shape[0], x.shape[0] * unit.shape[0] * 2
    results = x.new_full((4, P), math.inf)
    for begin in range(0, P, _PAIRS):
        rays, length = torch.arange(begin, min(begin + _PAIRS, P), device=x.device), radius / 64
        while rays.numel():
            n, m, side = rays // (2 * M), rays // 2 % M, 1.0 - 2 * (rays % 2)
            found = torch.stack(_walked(net, x[n], unit[m] * side.unsqueeze(1), length, asked.rows(n)))
            results[:, rays] = found
            rays, length = rays[found.isinf().any(0)] if length < radius else rays[:0], min(4 * length, radius)
    return results


# ---------------------------------------------------------------- public


def _dictionary(op: str, sae: Any, x: Any, directions: Any) -> tuple[Tensor, ...]:
    """(W_enc, bias with threshold and pre-bias, W_dec, thresholds, W_skip or nothing) in float64 of an SAE whose set is cut by planes."""
    planes = planes_of(op, "net must be a Net, or", sae, ("ReLU", "JumpReLU", "BatchTopK"), x=x, directions=directions)
    assert planes.threshold is not None
    W, b = planes.W.double(), planes.b.double() - planes.threshold
    bias = b if planes.b_pre is None else b - W @ planes.b_pre.double()
    skip = getattr(sae, "W_skip", None)
    return W, bias, sae.W_dec.detach().double(), planes.threshold, *(() if skip is None else (skip.detach().double(),))


def _feature_layer(sae: tuple[Tensor, ...], x: Tensor, unit: Tensor) -> _Layer:
    W, bias, W_dec, threshold, *skip = sae
    return _Layer(F.linear(x, W, bias), unit @ W.T, W, W_dec, unit @ skip[0].T if skip else None, 0.0, threshold)


def _one_layer(op: str, net: Net, x: Tensor, unit: Tensor, maps: bool) -> _Layer | None:
    """The net (float64) as one layer on these rays; None where it has to be walked."""
    signs = linear_signs(net)
    if not one_layer(signs):
        return None
    zero = signs.preactivations(torch.zeros_like(unit[:1]))[0]
    z, s = signs.preactivations(x)[0], signs.preactivations(unit)[0] - zero
    if not maps:
        return _Layer(z, s)
    try:
        mlp = one_mlp(op, net)
    except ValueError:
        return None
    return _Layer(z, s, mlp.W_in, mlp.W_out.T.contiguous(), unit if mlp.residual else None, mlp.act.slope)


def _norms(op: str, name: str, value: Any, x: Tensor) -> Tensor | None:
    """``[N]`` float64 above 0 from a number or a tensor."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return torch.full((x.shape[0],), checks.number(op, name, value), dtype=torch.float64, device=x.device)
    checks.tensor(op, name, value, like=x)
    checks.shape(op, name, value, (x.shape[0],), f"[N={x.shape[0]}]")
    if not bool((value > 0).all()):
        raise ValueError(f"{op}: {name} must be above 0, got {float(value.min()):g}")
    return value.detach().double()


@torch.no_grad()
def validity(
    net: Net | nn.Module,
    x: Tensor,
    directions: Tensor,
    *,
    share: float | None = None,
    map_change: float | Tensor | None = None,
    output_change: float | Tensor | None = None,
    radius: float | None = None,
) -> Validity:
    """How far each point can be pushed along plus and minus each direction before something changes, for all pairs.

    Args:
        net: of ``as_net`` or ``mlp_block``, as in ``crossings``; or an ``SAE`` with ReLU, JumpReLU or BatchTopK (at its running threshold),
            whose bits are its active features: scores above the threshold.
        x: ``[N, d_in]``. directions: ``[M, d_in]``, not 0; their lengths do not matter. Any floating dtypes, widened to float64.
        share: in (0, 1]: asks for the least distance at which at least ``ceil(share * bits)`` bits, of all layers, differ from those at x.
        map_change: asks for the least distance at which the Frobenius norm of the difference of the affine map from that at x is at least
            this, a number or ``[N]`` above 0 (say, 0.1 times the norm of each point's own map).
        output_change: the same for the Euclidean norm of the difference of the output.
        radius: where the rays end, above 0; None: without end, for one affine layer.

    Returns:
        ``Validity(first, bits, map, output)``, each ``[N, M, 2]`` float64: distance along + and - the direction of length 1, infinite where
        there is none within the radius. A neuron is on where its pre-activation is above 0: one that is 0 at x and rises changes at
        distance 0. What several neurons change at one place counts once all have. The change of the output behind a JumpReLU may jump.

    Arithmetic is float64, an SAE's parameters widened and its thresholds and biases summed in it: of one affine layer (with the signs of
    one: a gated MLP behind a norm without bias too) distances are the roots ``-z / s`` to a few roundings, output distances roots of a
    quadratic between two boundaries. Several layers, and biases behind a norm, are walked by ``crossings`` on segments that grow up to the
    radius. The map and output of gated, smooth or normalised nets are refused: they are not affine in a region. No gradient. Memory of one
    layer: a few times ``[N, H]`` and ``[M, H]`` float64 in blocks of 32 Mi elements, never ``[N, M, H]``; further the weights in float64.

    Raises: TypeError: dtype, device or type. ValueError: shape, range, values not finite; no radius for a net of several layers; a net that
        is refused; an SAE with another activation (TopK's set is not cut by one threshold), or in units that are not the data's.

    Source: Black et al. 2022 (arXiv 2211.12312): polytopes bound how far a direction keeps its meaning.
    """
    op = "validity"
    maps, sae = map_change is not None or output_change is not None, ()
    if isinstance(net, nn.Module):
        sae = _dictionary(op, net, x, directions)
        H = sae[0].shape[0]
    else:
        net = check_net(op, net)
        check_points(op, "x", x, net)
        check_points(op, "directions", directions, net, x)
        H = sum(net.widths)
        if maps:
            refuse_curved(op, net)
        net = net.to(torch.float64)
    for name, value in (("x", x), ("directions", directions)):
        if value.dim() != 2:
            raise ValueError(f"{op}: {name} must have two dimensions, got {list(value.shape)}")
    if not H:
        raise ValueError(f"{op}: net must have at least one activation layer, got {net!r}")
    unit, x = unit_directions(op, directions), x.detach().double()
    if not bool(x.isfinite().all()):
        raise ValueError(f"{op}: x must be finite, got NaN or infinity")
    if share is not None and not 0 < checks.number(op, "share", share) <= 1:
        raise ValueError(f"{op}: share must be at most 1, got {share}")
    bits = None if share is None else max(1, math.ceil(share * H - 1e-9))
    asked = _Asked(bits, _norms(op, "map_change", map_change, x), _norms(op, "output_change", output_change, x))
    end = math.inf if radius is None else checks.number(op, "radius", radius)
    results = [torch.full((len(x), len(unit), 2), math.inf, dtype=torch.float64, device=x.device) for _ in range(4)]
    for columns in chunks(unit.shape[0], H >> 1):
        for rows in chunks(x.shape[0], H >> 1):
            here, u = asked.rows(rows), unit[columns]
            layer = _feature_layer(sae, x[rows], u) if isinstance(net, nn.Module) else _one_layer(op, net, x[rows], u, maps)
            if layer is not None:
                results[0][rows, columns] = _first(layer)
                _further(layer, here, [result[rows, columns] for result in results])
            elif radius is None or isinstance(net, nn.Module):
                raise ValueError(f"{op}: radius must be given for a net that is not a single affine layer, got {net!r}")
            else:
                for result, found in zip(results, _along(net, x[rows], u, radius, here)):
                    result[rows, columns] = found.view(-1, len(u), 2)
    kept = [result.masked_fill_(result > end, math.inf) for result in results]
    return Validity(kept[0], *(None if want is None else found for want, found in zip(asked, kept[1:])))
