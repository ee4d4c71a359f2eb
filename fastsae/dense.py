"""The dense regime of ReLU, JumpReLU and Gated: at initialisation they fire on half of the features, and slots would need more memory
than the matrix ``[B, F]`` that they avoid. Loss and step then run a tile of features at a time, computing scores again in the backward:
memory is ``[B, tile]``, whatever F.

``forward`` is plain PyTorch for the autograd path; ``Backward`` has the same gradients by hand, a range of features at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsae.gradients import TiledGradient
from fastsae.losses import Pass, Weights, quotient
from fastsae.ops._common import accumulator, centre, chunks, full_precision, scores

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
    z = scores(centre(rows, w.b_pre), w.W_enc[pick], chosen(bias), None, None)
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
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, dcount: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, theta = ctx.saved_tensors
        dtheta = _dthreshold(z, theta.to(z.dtype), ctx.bandwidth, grad, dcount)
        return torch.where(z > theta.clamp_min(0), grad, 0), (dtheta if theta.dim() else dtheta.sum()).to(theta.dtype), None


def _dthreshold(z: Tensor, theta: Tensor, bandwidth: float | None, grad: Tensor, dcount: Tensor | float) -> Tensor:
    if bandwidth is None:
        return z.new_zeros(z.shape[1])
    return torch.where((z - theta).abs() < bandwidth / 2, -(theta * grad + dcount) / bandwidth, 0).sum(0)


def _decoded(code: Tensor, W: Tensor, dtype: torch.dtype) -> Tensor:
    with full_precision():
        return code.to(dtype).to(code.dtype) @ W.to(code.dtype)  # latents are in the dtype of x, sums wide


def _tile(
    xc: Tensor,
    W_enc: Tensor,
    W_dec: Tensor,
    vectors: tuple[Tensor | None, ...],
    bandwidth: float | None,
    penalised: bool,
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """One tile's (part of x_hat, of the gate's reconstruction, of the penalty, number of latents to differentiate, latents, fired)."""
    b_enc, threshold, b_gate, r_mag, b_mag = vectors
    frozen = None
    if r_mag is None:
        z = scores(xc, W_enc, b_enc, None, None)
        code, counted = _Jump.apply(z, z.new_zeros(()) if threshold is None else threshold, bandwidth)  # pyright: ignore[reportGeneralTypeIssues]
        weighed = code
    else:
        p = scores(xc, W_enc, None, None, None)
        assert b_gate is not None and b_mag is not None
        gate, magnitude = p + b_gate, p * r_mag.to(p.dtype).exp() + b_mag
        code = torch.where((gate > 0) & (magnitude > 0), magnitude, 0)
        weighed, counted = gate.relu(), None
        frozen = _decoded(weighed, W_dec.detach(), dtype)
    magnitude = (weighed.abs() * torch.linalg.vector_norm(W_dec.to(code.dtype), dim=1)).sum() if penalised else None
    hit = code.detach() != 0
    return _decoded(code, W_dec, dtype), frozen, magnitude, counted, hit.sum(), hit.any(0)


def forward(x: Tensor, w: Weights, penalised: bool) -> Pass:
    """The loss's pass over all tiles; each is computed again in the backward."""
    from torch.utils.checkpoint import checkpoint  # 60 ms that an import of fastsae need not wait for

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
            _tile, xc, W_enc, W_dec, tuple(vectors), w.bandwidth, penalised, dtype, use_reentrant=False, preserve_rng_state=False
        )  # pyright: ignore[reportGeneralTypeIssues]
        groups[group] = groups[group] + part
        sums = [other if total is None else total + other for total, other in zip(sums, others)]
        hits.append(hit)
    x_hats = torch.stack(groups).cumsum(0) + w.b_dec
    if w.skip is not None:
        x_hats = x_hats + torch.nn.functional.linear(x, w.skip)
    frozen, magnitude, counted, active = sums
    if frozen is not None:
        frozen = (frozen + w.b_dec.detach()).to(dtype)
    return Pass(x_hats.to(dtype), frozen, magnitude, counted, active, torch.cat(hits) if hits else x.new_zeros(F, dtype=torch.bool))


# ---------------------------------------------------------------- backward by hand


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


class _Tile(NamedTuple):
    """A tile's latents, the gradient of its products ``(x - b_pre) @ W_enc.T``, of its vectors, and the penalty's factor on ``W_dec``."""

    code: Tensor
    dproducts: Tensor
    vectors: dict[str, Tensor]
    shrink: Tensor | None


class Backward:
    """Gradients of the dense regime.

    Args:
        x: ``[B, D_in]``. w: detached. grads: ``[P, B, D_out]``, gradient of each prefix group's part of the reconstruction. frozen:
            ``[B, D_out]``, gradient of the gate's reconstruction. l1, l0: the penalties' weights, divided by the number of tokens.
    """

    def __init__(self, x: Tensor, w: Weights, grads: Tensor, frozen: Tensor | None, l1: float, l0: float):
        wide = accumulator(x.dtype)
        self.w, self.dtype, self.l1, self.l0 = w, x.dtype, l1, l0
        self.xc = centre(x, w.b_pre)
        self.grads, self.frozen = grads.to(wide), None if frozen is None else frozen.to(wide)
        # Biases and thresholds are changed in place by the optimiser, perhaps before the last tile is asked for.
        self.own = {
            name: None if t is None else t.clone() for name, t in vars(w).items() if (isinstance(t, Tensor) and t.dim() < 2) or t is None
        }
        self.enc, self.dec = _Kept(w.W_enc), _Kept(w.W_dec)
        self.last: tuple[slice, _Tile] | None = None  # the other weight asks for the same range next, mostly

    def vectors(self) -> dict[str, Tensor]:
        """Gradients ``[F]`` of b_enc, threshold, b_gate, r_mag, b_mag as far as there are any, and ``b_pre [D_in]``."""
        parts: dict[str, list[Tensor]] = {}
        b_pre = self.xc.new_zeros(self.xc.shape[1])
        for group, part in _tiles(self.xc.shape[0], self.xc.shape[1], self.w.prefixes):
            tile = self._tile(group, part, self.w.W_enc[part], self.w.W_dec[part])
            b_pre -= tile.dproducts.sum(0) @ self.w.W_enc[part].to(b_pre.dtype)
            for name, vector in tile.vectors.items():
                parts.setdefault(name, []).append(vector)
        return {name: torch.cat(vectors) for name, vectors in parts.items()} | {"b_pre": b_pre}

    def weights(self) -> tuple[TiledGradient, TiledGradient]:
        """Of W_enc and of W_dec."""
        F = self.w.W_enc.shape[0]
        return TiledGradient(self._encoder, F), TiledGradient(self._decoder, F)

    def _encoder(self, part: slice) -> Tensor:
        W_dec, known = self.dec.take(part)
        if not known:
            self.enc.keep(part)
        return self._rows(part, self.w.W_enc[part], W_dec, lambda tile, group: tile.dproducts.T @ self.xc)

    def _decoder(self, part: slice) -> Tensor:
        W_enc, known = self.enc.take(part)
        if not known:
            self.dec.keep(part)
        return self._rows(part, W_enc, self.w.W_dec[part], lambda tile, group: tile.code.T @ self.grads[group], True)

    def _rows(self, part: slice, W_enc: Tensor, W_dec: Tensor, product: Any, decoder: bool = False) -> Tensor:
        out = W_dec.new_empty(part.stop - part.start, (W_dec if decoder else W_enc).shape[1])
        for group, own in _tiles(self.xc.shape[0], self.xc.shape[1], self.w.prefixes):
            lo, hi = max(own.start, part.start), min(own.stop, part.stop)
            if lo < hi:
                local = slice(lo - part.start, hi - part.start)
                tile = self._tile(group, slice(lo, hi), W_enc[local], W_dec[local])
                with full_precision():
                    rows = product(tile, group)
                if decoder and tile.shrink is not None:
                    rows += tile.shrink.unsqueeze(1) * W_dec[local]
                out[local] = rows
        return out

    def _tile(self, group: int, part: slice, W_enc: Tensor, W_dec: Tensor) -> _Tile:
        if self.last is None or self.last[0] != part:
            self.last = None  # freed before the next one is made
            self.last = part, self._new_tile(group, part, W_enc, W_dec)
        return self.last[1]

    def _new_tile(self, group: int, part: slice, W_enc: Tensor, W_dec: Tensor) -> _Tile:
        def own(name: str) -> Any:
            vector = self.own[name]
            return vector[part] if vector is not None and vector.dim() else vector

        with full_precision():
            p = self.xc @ W_enc.to(self.xc.dtype).T
            W_dec = W_dec.to(p.dtype)
            dcode = (self.grads[group] @ W_dec.T).to(self.dtype).to(p.dtype)
            dgate = None if self.frozen is None else (self.frozen @ W_dec.T).to(self.dtype).to(p.dtype)
        norm = torch.linalg.vector_norm(W_dec, dim=1) if self.l1 else None
        if self.w.r_mag is None:
            z = p if own("b_enc") is None else p + own("b_enc")
            theta = z.new_zeros(()) if own("threshold") is None else own("threshold").to(z.dtype)
            code = torch.where((z > theta.clamp_min(0)) | z.isnan(), z, 0)
            weighed = code
            if norm is not None:
                dcode += self.l1 * norm * code.sign()
            dproducts = torch.where(z > theta.clamp_min(0), dcode, 0)
            vectors = {"b_enc": dproducts.sum(0)}
            if theta.dim():
                vectors["threshold"] = _dthreshold(z, theta, self.w.bandwidth, dcode, self.l0)
        else:
            stretch = own("r_mag").to(p.dtype).exp()
            gate, magnitude = p + own("b_gate"), p * stretch + own("b_mag")
            code, weighed = torch.where((gate > 0) & (magnitude > 0), magnitude, 0), gate.relu()
            dmagnitude = torch.where((gate > 0) & (magnitude > 0), dcode, 0)
            assert dgate is not None
            if norm is not None:
                dgate += self.l1 * norm
            dgate = torch.where(gate > 0, dgate, 0)
            dproducts = dmagnitude * stretch + dgate
            vectors = {"b_gate": dgate.sum(0), "b_mag": dmagnitude.sum(0), "r_mag": (dmagnitude * p).sum(0) * stretch}
        shrink = None
        if norm is not None:
            shrink = self.l1 * quotient(weighed.abs().sum(0), norm)
        return _Tile(code.to(self.dtype).to(p.dtype), dproducts, vectors, shrink)
