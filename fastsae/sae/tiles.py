"""The dense regime of ReLU, JumpReLU and Gated: at initialisation they fire on half of the features, and slots would need more memory
than the matrix ``[B, F]`` that they avoid. Loss and step then run a tile of features at a time, computing scores again in the backward:
memory is ``[B, tile]``, whatever F. Where all of F is one tile, the fused step keeps its scores and computes nothing twice.

``forward`` is plain PyTorch for the autograd path; ``TilePass`` has the same numbers and gradients by hand, a range of features at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from fastsae import reference
from fastsae._core.precision import full_precision
from fastsae.gradients import TiledGradient
from fastsae.reference import centre, chunks, product, running_sums, scores
from fastsae.sae.losses import Pass, Weights, by_parts, part_norms, quotient

DENSITY = 1 / 8
"""Share of all scores from which on tiles are used: a slot takes about 32 bytes with what a step keeps beside it (value, feature, flag,
gradients, row), an entry of the dense latents 4. The bound is one of memory: on a CPU slots are still the faster ones there."""

_SAMPLE_ROWS, _SAMPLE_FEATURES = 32, 256


def measured_density(x: Tensor, w: Weights) -> float:
    """Share of stored scores, estimated on about 32 rows times 256 features, evenly spaced."""
    rows = x[:: max(1, x.shape[0] // _SAMPLE_ROWS)]
    pick = slice(None, None, max(1, w.W_enc.shape[0] // _SAMPLE_FEATURES))

    def chosen(vector: Tensor | None) -> Tensor | None:
        return vector[pick] if vector is not None and vector.dim() else vector

    bias = w.b_enc if w.r_mag is None else w.b_gate
    z = scores(centre(rows, w.b_pre), w.W_enc[pick], chosen(bias))
    theta = chosen(w.threshold)
    if theta is None:
        kept = z > 0
    else:
        kept = z > theta.clamp_min(0)
        if w.bandwidth is not None:
            kept |= (z - theta).abs() < w.bandwidth / 2
    return float(kept.float().mean()) if kept.numel() else 0.0


def _tiles(rows: int, width: int, prefixes: list[int]) -> Iterator[tuple[int, slice]]:
    """(prefix group, features); a tile lies in one group."""
    low = 0
    for group, high in enumerate(prefixes):
        for part in chunks(high - low, max(rows, width)):
            yield group, slice(part.start + low, part.stop + low)
        low = high


# ---------------------------------------------------------------- forward, for autograd


class _Jump(torch.autograd.Function):
    """(``z`` where above ``max(theta, 0)``, how many), straight-through in ``theta`` inside the band; NaN kept with zero gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, bandwidth: float | None) -> tuple[Tensor, Tensor]:
        active = (z > theta.clamp_min(0)) | z.isnan()
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return torch.where(active, z, 0), active.sum().to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, dcount: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, theta = ctx.saved_tensors
        dtheta = _dthreshold(z, theta.to(z.dtype), ctx.bandwidth, grad, dcount)
        return torch.where(z > theta.clamp_min(0), grad, 0), (dtheta if theta.dim() else dtheta.sum()).to(theta.dtype), None


def _dthreshold(z: Tensor, theta: Tensor, bandwidth: float | None, grad: Tensor, dcount: Tensor | float) -> Tensor:
    if bandwidth is None:
        return z.new_zeros(z.shape[1])
    return torch.where((z - theta).abs() < bandwidth / 2, -(theta * grad + dcount) / bandwidth, 0).sum(0)


def _decoded(code: Tensor, W: Tensor, dtype: torch.dtype) -> Tensor:
    return product(_rounded(code, dtype), W.to(code.dtype))  # latents are in the dtype of x, sums wide


def _rounded(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype is dtype else t.to(dtype).to(t.dtype)


def _tile(
    xc: Tensor,
    W_enc: Tensor,
    W_dec: Tensor,
    vectors: tuple[Tensor | None, ...],
    bandwidth: float | None,
    penalised: int,
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """One tile's (part of x_hat, of the gate's reconstruction, of the penalty, number of latents to differentiate, latents, fired);
    ``penalised``: parts of a decoder's row whose norms count, 0 without a penalty."""
    b_enc, threshold, b_gate, r_mag, b_mag = vectors
    frozen = None
    if r_mag is None:
        z = scores(xc, W_enc, b_enc)
        code, counted = _Jump.apply(z, z.new_zeros(()) if threshold is None else threshold, bandwidth)  # pyright: ignore[reportGeneralTypeIssues]
        weighed = code
    else:
        p = scores(xc, W_enc, None)
        assert b_gate is not None and b_mag is not None
        gate, magnitude = p + b_gate, p * r_mag.to(p.dtype).exp() + b_mag
        code = torch.where((gate > 0) & (magnitude > 0), magnitude, 0)
        weighed, counted = gate.relu(), None
        frozen = _decoded(weighed, W_dec.detach(), dtype)
    magnitude = (weighed.abs() * part_norms(W_dec, penalised).sum(1)).sum() if penalised else None
    hit = code.detach() != 0
    return _decoded(code, W_dec, dtype), frozen, magnitude, counted, hit.sum(), hit.any(0)


def forward(x: Tensor, w: Weights, penalised: bool) -> Pass:
    """The loss's pass over all tiles; each is computed again in the backward."""
    from torch.utils.checkpoint import checkpoint  # 60 ms that an import of fastsae need not wait for

    reference.tracks("SAE.loss", x, w.W_enc, w.W_dec, w.b_dec)
    F, rows, dtype = w.W_enc.shape[0], x.shape[0], x.dtype
    tiles = list(_tiles(rows, x.shape[1], w.prefixes))
    sizes = [part.stop - part.start for _, part in tiles]
    xc = centre(x, w.b_pre)

    def split(t: Tensor | None) -> tuple[Tensor | None, ...]:  # one backward for all the slices, not one [F, D] for each
        return t.split(sizes) if t is not None and t.dim() else (t,) * len(tiles)

    columns = [split(t) for t in (w.W_enc, w.W_dec, w.b_enc, w.threshold, w.b_gate, w.r_mag, w.b_mag)]
    groups = [xc.new_zeros(rows, w.W_dec.shape[1])] * len(w.prefixes)
    sums: list[Any] = [None, None, None, xc.new_zeros((), dtype=torch.int64)]
    hits = []
    for (group, _), (W_enc, W_dec, *vectors) in zip(tiles, zip(*columns), strict=True):
        part, *others, hit = checkpoint(
            _tile, xc, W_enc, W_dec, tuple(vectors), w.bandwidth, penalised * w.layers, dtype, use_reentrant=False, preserve_rng_state=False
        )  # pyright: ignore[reportGeneralTypeIssues]
        groups[group] = groups[group] + part
        sums = [other if total is None else total + other for total, other in zip(sums, others)]
        hits.append(hit)
    x_hats = running_sums(torch.stack(groups)) + w.b_dec
    if w.skip is not None:
        x_hats = x_hats + product(x, w.skip.T)
    frozen, magnitude, counted, active = sums
    if frozen is not None:
        frozen = (frozen + w.b_dec.detach()).to(dtype)
    return Pass(x_hats.to(dtype), frozen, magnitude, counted, active, torch.cat(hits) if hits else x.new_zeros(F, dtype=torch.bool))


# ---------------------------------------------------------------- forward and backward by hand

# Comparisons into floats, and this function, are vector code on a CPU; ``torch.where`` with flags that nobody can predict, as half of all
# scores are, takes 30 times as long there.


def _masked(flags: Tensor, values: Tensor) -> Tensor:
    """``values``, overwritten: 0 where ``flags`` (1 or 0) is 0."""
    return torch.ops.aten.threshold_backward.grad_input(values, flags, 0.5, grad_input=values)


def _flags(comparison: Any, a: Tensor, b: Tensor | float) -> Tensor:
    """``comparison(a, b)`` as 1.0 and 0.0."""
    return comparison(a, b, out=torch.empty_like(a))


class _Kept:
    """A weight's rows as they were, for the other weight's gradient, which needs them after this one's optimiser step has changed them.

    Where both are asked for the same range before the next one, no more than that range is held.
    """

    def __init__(self, W: Tensor):
        self.W = W
        self.pieces: list[tuple[int, Tensor]] = []

    def keep(self, part: slice) -> None:
        self.pieces.append((part.start, self.W[part].clone()))

    def take(self, part: slice) -> tuple[Tensor, bool]:
        """(rows of ``part``, whether all of them had been kept); what is taken is forgotten."""
        rows, found, left = self.W[part], 0, []
        for start, piece in self.pieces:
            lo, hi = max(start, part.start), min(start + piece.shape[0], part.stop)
            if lo >= hi:
                left.append((start, piece))
                continue
            rows = rows.clone() if found == 0 else rows
            rows[lo - part.start : hi - part.start] = piece[lo - start : hi - start]
            found += hi - lo
            left += [(s, p) for s, p in ((start, piece[: lo - start]), (hi, piece[hi - start :])) if p.shape[0]]
        self.pieces = left
        return rows, found >= part.stop - part.start


class _Scored(NamedTuple):
    """A tile's scores (Gated: its products; ReLU: clamped at 0), latents, and what the penalty weighs, summed over rows."""

    scores: Tensor
    code: Tensor
    weighed: Tensor | None


class _Tile(NamedTuple):
    """A tile's latents, the gradient of its products ``(x - b_pre) @ W_enc.T``, of its vectors, and the penalty's factor on ``W_dec``."""

    code: Tensor
    dproducts: Tensor
    vectors: dict[str, Tensor]
    shrink: Tensor | None


class TilePass:
    """One pass of the dense regime: ``run`` is what the loss needs of the forward; then ``begin``, and the gradients.

    Args:
        x: ``[B, D_in]``. w: detached. penalised: whether the loss has an L1 term.
    """

    def __init__(self, x: Tensor, w: Weights, penalised: bool):
        self.w, self.dtype = w, x.dtype
        self.xc = centre(x, w.b_pre)
        self.ranges = list(_tiles(x.shape[0], x.shape[1], w.prefixes))
        # Biases and thresholds are changed in place by the optimiser, perhaps before the last tile is asked for.
        self.own: dict[str, Any] = {
            name: None if t is None else t.clone() for name, t in vars(w).items() if (isinstance(t, Tensor) and t.dim() < 2) or t is None
        }
        self.norms = part_norms(w.W_dec, w.layers) if penalised else None
        self.norm = None if self.norms is None else self.norms.sum(1)
        whole = x.shape[0] * w.W_enc.shape[0] <= reference.WORKSPACE_ELEMENTS
        self.scored: list[_Scored] | None = [] if whole else None
        self.held: list[_Tile] | None = None
        self.sizes: list[tuple[Tensor, Tensor, Tensor]] = []  # norms of each tile's dproducts, code and shrinking part
        self.enc, self.dec = _Kept(w.W_enc), _Kept(w.W_dec)
        self.last: tuple[slice, _Tile] | None = None  # the other weight asks for the same range next, mostly
        self.run = self._forward(x)

    def _forward(self, x: Tensor) -> Pass:
        w, dtype = self.w, self.dtype
        groups: list[Any] = [None] * len(w.prefixes)
        frozen = magnitude = None
        counts = []
        for group, part in self.ranges:
            scored = self._score(part, w.W_enc[part])
            W_dec = w.W_dec[part]
            y = _decoded(scored.code, W_dec, dtype)
            groups[group] = y if groups[group] is None else groups[group].add_(y)
            counts.append(_flags(torch.ne, scored.code, 0).sum(0))
            if w.r_mag is not None:
                y = _decoded((scored.scores + self.own["b_gate"][part]).relu_(), W_dec, dtype)
                frozen = y if frozen is None else frozen.add_(y)
            if self.norm is not None:
                total = torch.dot(scored.weighed, self.norm[part])  # pyright: ignore[reportArgumentType]
                magnitude = total if magnitude is None else magnitude + total
            if self.scored is not None:
                self.scored.append(scored)
        x_hats = groups[0].unsqueeze(0) if len(groups) == 1 else running_sums(torch.stack(groups))
        x_hats += w.b_dec
        if w.skip is not None:
            x_hats += product(x, w.skip.T)
        if frozen is not None:
            frozen = (frozen + w.b_dec).to(dtype)
        count = counts[0] if len(counts) == 1 else torch.cat(counts)
        return Pass(x_hats.to(dtype), frozen, magnitude, None, count.to(torch.int64).sum(), count > 0)

    def _score(self, part: slice, W_enc: Tensor) -> _Scored:
        p = product(self.xc, W_enc.to(self.xc.dtype).T)
        if self.w.r_mag is not None:
            gate, magnitude, _, both = self._gated(part, p)
            code, weighed = _masked(both, magnitude), gate.relu_()
        else:
            if self.own["b_enc"] is not None:
                p += self.own["b_enc"][part]
            theta = self._theta(part, p)
            if theta is None:
                code = weighed = p.relu_()
            else:
                dropped = _flags(torch.le, p, theta.clamp_min(0))
                code = weighed = _masked(dropped.neg_().add_(1), p.clone())  # NaN is not dropped
        return _Scored(p, _rounded(code, self.dtype), weighed.sum(0) if self.norm is not None else None)

    def _theta(self, part: slice, z: Tensor) -> Tensor | None:
        """Thresholds of a tile; None: ReLU's 0."""
        theta = self.own["threshold"]
        return theta[part].to(z.dtype) if theta is not None and theta.dim() else None

    def _gated(self, part: slice, p: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(gate, magnitude, stretch, 1 where both are above 0)."""
        stretch = self.own["r_mag"][part].to(p.dtype).exp()
        gate, magnitude = p + self.own["b_gate"][part], p * stretch + self.own["b_mag"][part]
        return gate, magnitude, stretch, _flags(torch.gt, gate, 0).mul_(_flags(torch.gt, magnitude, 0))

    # ------------------------------------------------------------ gradients

    def begin(self, grads: Tensor, frozen: Tensor | None, l1: float, l0: float) -> dict[str, Tensor]:
        """Gradients ``[F]`` of b_enc, threshold, b_gate, r_mag, b_mag as far as there are any, and ``b_pre [D_in]``; then ``weights``.

        Args:
            grads: ``[P, B, D_out]``, gradient of each prefix group's part of the reconstruction. frozen: ``[B, D_out]``, gradient of the
                gate's reconstruction. l1, l0: the penalties' weights, divided by the number of tokens.
        """
        wide = self.xc.dtype
        self.grads, self.frozen, self.l1, self.l0 = grads.to(wide), None if frozen is None else frozen.to(wide), l1, l0
        parts: dict[str, list[Tensor]] = {}
        b_pre = None
        tiles = []
        for number, (group, part) in enumerate(self.ranges):
            W_enc = self.w.W_enc[part]
            tile = self._new_tile(group, part, W_enc, self.w.W_dec[part], None if self.scored is None else self.scored[number])
            if self.w.b_pre is not None:
                ends = tile.vectors["b_enc"] if self.w.r_mag is None else tile.dproducts.sum(0)
                with full_precision():
                    pulled = -(ends @ W_enc.to(wide))
                b_pre = pulled if b_pre is None else b_pre + pulled
            shrunk = tile.code.new_zeros(()) if tile.shrink is None else vector_norm(tile.shrink * self.norms[part])  # pyright: ignore[reportOptionalSubscript]
            self.sizes.append((vector_norm(tile.dproducts), vector_norm(tile.code), shrunk))
            for name, vector in tile.vectors.items():
                parts.setdefault(name, []).append(vector)
            if self.scored is not None:
                tiles.append(tile)
            else:
                self.last = part, tile
        if self.scored is not None:
            self.held, self.scored = tiles, None
        vectors = {name: torch.cat(vectors) if len(vectors) > 1 else vectors[0] for name, vectors in parts.items()}
        return vectors if b_pre is None else {**vectors, "b_pre": b_pre}

    def weights(self) -> tuple[TiledGradient, TiledGradient]:
        """Of W_enc and of W_dec."""
        F = self.w.W_enc.shape[0]
        settled = self.held is not None
        left, code, shrunk = (torch.stack(sizes).sum() for sizes in zip(*self.sizes))
        encoder, decoder = left * vector_norm(self.xc), code * vector_norm(self.grads) + shrunk
        return TiledGradient(self._encoder, F, settled, size=encoder), TiledGradient(self._decoder, F, settled, size=decoder)

    @torch.no_grad()
    def _encoder(self, part: slice) -> Tensor:
        W_enc = W_dec = self.w.W_dec[part]
        if self.held is None:
            W_enc, (W_dec, known) = self.w.W_enc[part], self.dec.take(part)
            if not known:
                self.enc.keep(part)
        return self._rows(part, W_enc, W_dec, decoder=False)

    @torch.no_grad()
    def _decoder(self, part: slice) -> Tensor:
        W_enc = W_dec = self.w.W_dec[part]
        if self.held is None:
            W_enc, known = self.enc.take(part)
            if not known:
                self.dec.keep(part)
        return self._rows(part, W_enc, W_dec, decoder=True)

    def _rows(self, part: slice, W_enc: Tensor, W_dec: Tensor, decoder: bool) -> Tensor:
        out = W_dec.new_empty(part.stop - part.start, self.grads.shape[2] if decoder else self.xc.shape[1])
        for number, (group, own) in enumerate(self.ranges):
            lo, hi = max(own.start, part.start), min(own.stop, part.stop)
            if lo >= hi:
                continue
            local, columns = slice(lo - part.start, hi - part.start), slice(None)
            if self.held is not None:
                tile, columns = self.held[number], slice(lo - own.start, hi - own.start)
            else:
                tile = self._tile(group, slice(lo, hi), W_enc[local], W_dec[local])
            left, right = (tile.code, self.grads[group]) if decoder else (tile.dproducts, self.xc)
            into = out[local] if out.dtype is right.dtype else None
            with full_precision():
                rows = torch.mm(left[:, columns].T, right, out=into)
            if decoder and tile.shrink is not None:
                rows += by_parts(tile.shrink[columns], W_dec[local].to(rows.dtype))
            if into is None:
                out[local] = rows
        return out

    def _tile(self, group: int, part: slice, W_enc: Tensor, W_dec: Tensor) -> _Tile:
        if self.last is None or self.last[0] != part:
            self.last = None  # freed before the next one is made
            self.last = part, self._new_tile(group, part, W_enc, W_dec, None)
        return self.last[1]

    def _new_tile(self, group: int, part: slice, W_enc: Tensor, W_dec: Tensor, scored: _Scored | None) -> _Tile:
        scored = self._score(part, W_enc) if scored is None else scored
        p, code = scored.scores, scored.code
        norm = None
        W_dec = W_dec.to(p.dtype)
        dcode = _rounded(product(self.grads[group], W_dec.T), self.dtype)
        dgate = None if self.frozen is None else _rounded(product(self.frozen, W_dec.T), self.dtype)
        if self.norm is not None:
            norm = self.norm[part]
        if self.w.r_mag is None:
            theta = self._theta(part, p)
            if norm is not None:
                dcode += (self.l1 * norm) if theta is None else self.l1 * norm * code.sign()
            passes = _flags(torch.gt, p, 0 if theta is None else theta.clamp_min(0))
            vectors = {}
            if theta is not None:
                vectors["threshold"] = _dthreshold(p, theta, self.w.bandwidth, dcode, self.l0)
            dproducts = _masked(passes, dcode)
            vectors["b_enc"] = dproducts.sum(0)
        else:
            gate, _, stretch, both = self._gated(part, p)
            dmagnitude = _masked(both, dcode)
            assert dgate is not None
            if norm is not None:
                dgate += self.l1 * norm
            dgate = _masked(_flags(torch.gt, gate, 0), dgate)
            dproducts = dmagnitude * stretch + dgate
            vectors = {"b_gate": dgate.sum(0), "b_mag": dmagnitude.sum(0), "r_mag": (dmagnitude * p).sum(0) * stretch}
        shrink = None
        if self.norms is not None and scored.weighed is not None:
            shrink = self.l1 * quotient(scored.weighed.unsqueeze(1), self.norms[part])
        return _Tile(code, dproducts, vectors, shrink)
