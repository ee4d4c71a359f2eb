"""The terms and gradients of ``JumpLoss``, by hand, for the fused step and for autograd alike."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae._core.world import World
from fastsae.gradients import Gradient, TiledGradient
from fastsae.reference import accumulator, centre, chunks
from fastsae.sae import selection
from fastsae.sae.losses import Weights, part_norms, quotient


def penalised(values: Tensor, norm: Tensor, tanh: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """What ``l1`` weighs of each slot, and its slopes in the value and in the norm."""
    if tanh is None:
        return values.abs() * norm, norm * values.sign(), values.abs()
    t = torch.tanh(tanh * values * norm)
    slope = tanh * (1 - t.square())
    return t, slope * norm, slope * values


def of_target(active: Tensor, target: float, of_batch: bool, world: World) -> tuple[Tensor, Tensor]:
    """What ``l0`` weighs, times the number of tokens, of each token's number of latents ``[B]``; and its slopes ``[B]``."""
    off = (world.row_mean(active) if of_batch and len(active) else active) / target - 1
    return world.sum(off.square().expand_as(active)), (2 * off / target).expand_as(active)


class PreActs:
    """``rate * sum over tokens and features of max(max(threshold, 0) - z, 0) n``, a range of features at a time."""

    def __init__(self, x: Tensor, w: Weights, features: Tensor | None, rate: float, world: World):
        """``features``: ``[F]`` bool, those that count. Processes with the same features each see all rows."""
        self.x, self.w, self.rate, self.wide, self.world = x, w, rate, accumulator(x.dtype), world
        self.xc, self.norm = centre(x, w.b_pre).to(self.wide), part_norms(w.W_dec, 1)[:, 0]
        assert w.threshold is not None and w.b_enc is not None
        F = w.W_enc.shape[0]
        features = torch.ones(F, dtype=torch.bool, device=x.device) if features is None else features
        # Cloned: the optimiser changes biases and thresholds in place, perhaps before the last range is asked for.
        self.edge = (w.threshold.clamp_min(0).to(self.wide) - w.b_enc.to(self.wide)).expand(F)
        self.chosen = features.nonzero()[:, 0]
        self.sums, self.counts = (self.norm.new_zeros(F) for _ in range(2))
        for part in chunks(len(self.chosen), max(x.shape[0], 1)):
            pick = self.chosen[part]
            short = self._short(pick)
            self.sums[pick], self.counts[pick] = world.row_sum(short), (short > 0).to(self.wide).sum(0)
        self.loss = rate * world.total(self.sums * self.norm)

    def _short(self, pick: Tensor) -> Tensor:
        """``[B, n]``: by how much scores fall short of their thresholds."""
        return (self.edge[pick] - selection.skipped(self.xc, self.w.W_enc[pick].to(self.wide), self.world)).relu_()

    def gradients(self) -> dict[str, Gradient]:
        w, pull = self.w, self.rate * self.norm * self.counts
        found: dict[str, Gradient] = {"threshold": pull, "b_enc": -pull}
        if w.b_pre is not None:
            found["b_dec"] = selection.pulled(pull, w.W_enc.to(self.wide), self.world)
        grow = self.rate * quotient(self.sums, self.norm)
        # Its size bounds the norm: a sum of norms stands for the check that all is finite.
        size = torch.linalg.vector_norm(pull) * torch.linalg.vector_norm(self.xc)
        found["W_enc"] = TiledGradient(self._encoder, len(self.norm), size=size)
        rows = (grow.unsqueeze(1), w.W_dec)
        grown = torch.linalg.vector_norm(grow * self.norm)
        found["W_dec"] = TiledGradient(lambda part: (rows[0][part] * rows[1][part]).to(w.W_dec.dtype), len(grow), size=grown)
        return found

    @torch.no_grad()
    def _encoder(self, part: slice) -> Tensor:
        out = self.w.W_enc.new_zeros(part.stop - part.start, self.xc.shape[1])
        pick = self.chosen[(self.chosen >= part.start) & (self.chosen < part.stop)]
        for some in chunks(len(pick), max(self.x.shape[0], 1)):
            short = (self._short(pick[some]) > 0).to(self.wide)
            rows = selection.skip_gradient(short, self.xc, self.world) * (-self.rate * self.norm[pick[some]]).unsqueeze(1)
            out[pick[some] - part.start] = rows.to(out.dtype)
        return out
