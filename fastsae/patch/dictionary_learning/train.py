"""dictionary_learning's ``update`` without dense latents, dense gradients or a second pass of the optimiser; see ``dictionary_learning``.

    slots of the latents                     e = x - x_hat of each Matryoshka group      dL/dx_hat = -2 w e / B
    da = <dL/dx_hat, W_dec[f]>               dW_dec = slots x dL/dx_hat                  dW_enc = slots x (x - b_dec)
    dW_dec -> without its component along each feature -> clipped by the norm of all -> Adam -> unit features

Under autocast to bfloat16, as ``trainSAE`` can have it, what is multiplied is rounded, as there; sums are not. Batches may be so, too.

The weights are laid out feature-major in memory (their shapes stay), so that one pass over each forms the gradient row by row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastsae._core import checks
from fastsae.dispatch import preference, then_any
from fastsae.gradients import Gradient, RowGradient, densify, total
from fastsae.ops.decode import DECODE, DECODE_DVALUES
from fastsae.ops.encode import ENCODE_BATCH_TOPK, ENCODE_GATED, ENCODE_THRESHOLD, ENCODE_TOPK
from fastsae.ops.score_gradients import feature_sums
from fastsae.patch import _adam
from fastsae.patch._adapter import changed, tampered, warn_once
from fastsae.patch.dictionary_learning.sae import (
    centred,
    decoder,
    decoder_bias,
    encoder,
    encoder_bias,
    is_dense,
    is_known,
    kind_of,
    why_dense,
)
from fastsae.reference import running_sums
from fastsae.sae.inputs import autocast_off
from fastsae.sae.step import Groups, Slots

MANY_FIRE = "more than 1/8 of the latents fire: the library's dense forward and backward, our projection and optimiser step"
OTHER_LOSS = "its loss is not one of slots: the library's forward and backward, our projection and optimiser step"
BY_DESIGN = (MANY_FIRE, OTHER_LOSS)
"""Reasons that ``report`` states and no warning repeats."""
_UNIT = 1e-5
"""How far a feature's norm may be from 1 for the projection of the fused pass, which takes it for 1."""


class Recipe(NamedTuple):
    """What ``update`` of one trainer does around its loss."""

    clip: float | None
    constrained: bool
    """Its optimiser is ``ConstrainedAdam``."""
    project: bool
    clears_first: bool
    """Gradients are cleared before the backward, not after the step."""
    centre: Callable[[Any], Any] | None
    """Where the first step starts the decoder's bias at the geometric median: the trainer's function for it."""


def recipe(trainer: Any) -> Recipe:
    return _RECIPES[type(trainer).__qualname__]


_RECIPES = {
    "TopKTrainer": Recipe(1.0, False, True, False, lambda trainer: sys.modules[type(trainer).__module__].geometric_median),
    "BatchTopKTrainer": Recipe(1.0, False, True, False, lambda trainer: trainer.geometric_median),
    "MatryoshkaBatchTopKTrainer": Recipe(1.0, False, True, False, lambda trainer: trainer.geometric_median),
    "JumpReluTrainer": Recipe(1.0, False, True, False, None),
    "StandardTrainer": Recipe(None, True, True, True, None),
    "StandardTrainerAprilUpdate": Recipe(1.0, False, False, True, None),
    "GatedSAETrainer": Recipe(None, True, True, True, None),
}


def why_not_adam(trainer: Any) -> str | None:
    """Why not even the optimiser's step can be ours, or None."""
    ae, how = trainer.ae, recipe(trainer)
    if (reason := changed(trainer, "update")) is not None:
        return reason
    if not is_known(ae):
        return f"{type(ae).__name__} is no class of the library that is supported"
    adam: type = torch.optim.Adam
    if how.constrained:
        adam = sys.modules["dictionary_learning.trainers.trainer"].ConstrainedAdam
    if (reason := _adam.refuses(trainer.optimizer, adam)) is not None:
        return reason
    if how.constrained and [id(p) for p in getattr(trainer.optimizer, "constrained_params", ())] != [id(ae.decoder.weight)]:
        return "the optimiser constrains other parameters than the decoder"
    if parametrize.is_parametrized(ae) or not all(isinstance(W, nn.Parameter) for W in _matrices(ae)):
        return "a parameter is computed from another"
    if not _adam.holds(trainer.optimizer, ae):
        return "the optimiser does not hold the dictionary's parameters (its gradients are clipped together)"
    return None


def why_not_fused(trainer: Any, x: Tensor) -> str | None:
    """Why forward and backward of this step are the library's own, or None."""
    ae, name = trainer.ae, type(trainer).__qualname__
    if name not in STEPS:
        return OTHER_LOSS
    if (reason := why_dense(ae)) is not None:
        return reason
    if tampered(ae):
        return "the dictionary has a hook"
    W, low = encoder(ae), _multiplied(ae)
    if low not in (W.dtype, torch.bfloat16):
        return f"autocast to {str(low)[6:]} is on"
    if x.dim() != 2 or x.shape[0] == 0 or x.dtype not in (W.dtype, low) or x.device != W.device or x.requires_grad:
        return f"the batch is {list(x.shape)} {x.dtype} on {x.device} (supported: rows of the dtype and device of the weights)"
    if any(not p.requires_grad or (p.grad is not None and not recipe(trainer).clears_first) for p in ae.parameters()):
        return "a parameter is frozen or has a gradient already"
    if kind_of(ae).activation in ("relu", "gated", "jumprelu") and _fires(ae, x.to(W.dtype)):
        return MANY_FIRE
    return None


def _multiplied(ae: Any) -> torch.dtype:
    """What products round to: the dtype of autocast where it is on, which leaves float64 alone."""
    W = encoder(ae)
    return torch.get_autocast_dtype(W.device.type) if W.dtype is torch.float32 and checks.autocasting(W.device) else W.dtype


def _fires(ae: Any, x: Tensor) -> bool:
    if kind_of(ae).activation == "jumprelu" and ae.apply_b_dec_to_input:  # the trainer's loss never subtracts it
        return True
    return is_dense(ae, x, False)


class TrainerMethods:
    """``update`` of every trainer."""

    def update(self: Any, step: int, x: Any = None, activations: Any = None) -> Any:
        x = activations if x is None else x  # the library's trainers have one name or the other
        if (reason := why_not_adam(self)) is not None:
            warn_once(self, reason)
            return super().update(step, x)  # pyright: ignore[reportAttributeAccessIssue]
        ae, how = self.ae, recipe(self)
        if step == 0 and how.centre is not None:
            ae.b_dec.data = how.centre(self)(x).to(ae.b_dec.dtype)
        x = x.to(self.device)
        reason = why_not_fused(self, x)
        if how.clears_first:
            self.optimizer.zero_grad()
        if reason is None:
            low = _multiplied(ae)
            with torch.no_grad(), autocast_off(x):
                loss, gradients = STEPS[type(self).__qualname__](self, x.to(encoder(ae).dtype), step, low)
        else:
            if reason not in BY_DESIGN:
                warn_once(self, reason)
            loss = self.loss(x, step=step)
            loss.backward()
            gradients = {p: p.grad for p in ae.parameters() if p.grad is not None}
        with autocast_off(x):
            apply(self, gradients)
        if not how.clears_first:
            self.optimizer.zero_grad()
        self.scheduler.step()
        if hasattr(self, "update_annealed_k"):  # of the main branch, after the release 0.1.0
            self.update_annealed_k(step, ae.activation_dim, self.k_anneal_steps)
        resample = getattr(self, "resample_steps", None)
        if resample is not None and step % resample == 0:
            self.resample_neurons(self.steps_since_active > resample / 2, x)
        return None if how.clears_first else loss.item()


# ---------------------------------------------------------------- the optimiser's part


def _is_feature_minor(ae: Any, p: Tensor) -> bool:
    """Whether a matrix is stored as ``[D, F]``."""
    return p is (ae.decoder.weight if kind_of(ae).linear else ae.W_enc)


def _matrices(ae: Any) -> list[Tensor]:
    return [ae.encoder.weight, ae.decoder.weight] if kind_of(ae).linear else [ae.W_enc, ae.W_dec]


@torch.no_grad()
def apply(trainer: Any, gradients: dict[Tensor, Any]) -> None:
    """Projection, clipping, Adam and unit features, from gradients by parameter (slots: feature-major; tensors: of its shape)."""
    ae, how, optimizer = trainer.ae, recipe(trainer), trainer.optimizer
    for p in _matrices(ae):
        transposed = _is_feature_minor(ae, p)
        state = optimizer.state.get(p, {})
        for name, t in (("", p), *((n, state[n]) for n in ("exp_avg", "exp_avg_sq") if n in state)):
            W = t.data.T if transposed else t.data
            if not W.is_contiguous():
                W = W.contiguous().T if transposed else W.contiguous()
                if name:
                    state[name] = W
                else:
                    t.data = W
        gradient = gradients.get(p)
        if transposed and gradient is not None:
            gradients[p] = _adam.Feature(gradient.T if isinstance(gradient, Tensor) else gradient)
    constrained: tuple[Tensor, ...] = ()
    projected: tuple[Tensor, ...] = ()
    if how.project:
        p = _matrices(ae)[1]
        constrained = (p,)
        W, norm = decoder(ae).data, None
        norm = torch.linalg.vector_norm(W, dim=1)
        if p in gradients and bool(((norm - 1).abs() <= _UNIT).all()):
            projected = (p,)
        elif p in gradients:  # not unit features yet: the library's formula on a dense gradient
            given = gradients[p]
            g = densify(given.gradient if isinstance(given, _adam.Feature) else given).to(W.dtype)
            unit = W / (norm if how.constrained else norm + 1e-6).unsqueeze(1)
            g = g.addcmul(torch.linalg.vecdot(g, unit).unsqueeze(1), unit, value=-1)
            gradients[p] = _adam.Feature(g) if isinstance(given, _adam.Feature) else g
    _adam.step(optimizer, gradients, how.clip, projected, constrained)


# ---------------------------------------------------------------- forward and backward by slots


class _Backward:
    """Gradients of a code's slots; ``xc``: what the encoder multiplied. What is multiplied is rounded to ``low``."""

    def __init__(self, ae: Any, xc: Tensor, low: torch.dtype):
        self.ae, self.xc, self.backend, self.low, self.dtype = ae, xc.to(low), then_any(preference(None)), low, xc.dtype
        self.W, self.W_dec, self.n_features = encoder(ae).to(low), decoder(ae).to(low), encoder(ae).shape[0]
        self.parts: dict[str, list[Gradient]] = {"encoder": [], "decoder": []}
        self.biases: dict[Tensor, list[Tensor]] = {}
        self.b_dec: list[Tensor] = []

    def decode(self, slots: Slots) -> Tensor:
        return DECODE(slots.values.to(self.low), slots.indices, slots.crow, self.W_dec, None, backend=self.backend).to(self.dtype)

    def dvalues(self, slots: Slots, G: Tensor) -> Tensor:
        return DECODE_DVALUES(G.to(self.low), slots.indices, slots.crow, self.W_dec, backend=self.backend).to(self.dtype)

    def into_decoder(self, slots: Slots, G: Tensor) -> None:
        values, G = slots.values.to(self.low), G.to(self.low)
        self.parts["decoder"].append(RowGradient(values, slots.indices, slots.crow, G, self.n_features))

    def sums(self, per_slot: Tensor, slots: Slots) -> Tensor:
        """``[F]``: over the slots of each feature."""
        return feature_sums(per_slot, slots.indices, slots.crow, self.n_features, self.backend)

    def into_encoder(self, slots: Slots, dvalues: Tensor, bias: Tensor, stretch: Tensor | None = None) -> None:
        """``stretch [F]``: what multiplies the product in these latents, before the bias."""
        dp = torch.where(slots.passes, dvalues, 0)
        self.biases.setdefault(bias, []).append(self.sums(dp, slots))
        dp = (dp if stretch is None else dp * stretch[slots.indices]).to(self.low)
        self.parts["encoder"].append(RowGradient(dp, slots.indices, slots.crow, self.xc, self.n_features))
        if kind_of(self.ae).activation != "jumprelu":
            self.b_dec.append(-DECODE(dp, slots.indices, slots.crow, self.W, None, backend=self.backend).to(self.dtype).sum(0))

    def result(self) -> dict[Tensor, Any]:
        W_enc, W_dec = _matrices(self.ae)
        gradients: dict[Tensor, Any] = {W_enc: total(self.parts["encoder"]), W_dec: total(self.parts["decoder"])}
        gradients |= {bias: torch.stack(sums).sum(0).to(bias.dtype) for bias, sums in self.biases.items()}
        return gradients | {decoder_bias(self.ae): torch.stack(self.b_dec).sum(0)}


def _top(trainer: Any, x: Tensor, step: int, low: torch.dtype) -> tuple[Tensor, dict[Tensor, Any]]:
    """TopK, BatchTopK and Matryoshka: the selected latents' error, of each group, and AuxK."""
    ae, batch = trainer.ae, kind_of(trainer.ae).activation == "batchtopk"
    back = _Backward(ae, centred(ae, x), low)
    W, b, k, xc = back.W, encoder_bias(ae), int(ae.k), back.xc
    if batch:
        values, indices, crow, _ = ENCODE_BATCH_TOPK(xc, W, b, None, None, None, None, float(k), backend=preference(None))
        fired = indices[values > 0]
    else:
        values, indices = ENCODE_TOPK(xc, W, b, None, None, None, None, k, True, backend=preference(None))
        crow, fired = None, indices.flatten()
    slots = Slots(values, indices, crow, values > 0)
    if step > trainer.threshold_start_step:
        trainer.update_threshold(values)
    groups, weights = _levels(trainer, back.n_features)
    grouped = Groups.of(slots, groups, x.shape[0])
    in_groups = Slots(grouped.values, grouped.indices, grouped.crow, slots.passes)
    x_hats = running_sums(back.decode(in_groups).reshape(len(groups), x.shape[0], -1)) + decoder_bias(ae)
    errors = x - x_hats
    losses = errors.square().sum(-1).mean(1)
    loss = (losses * weights).sum()
    G = errors * (weights * (-2 / x.shape[0])).reshape(-1, 1, 1)
    G = G if len(groups) == 1 else running_sums(G.flip(0)).flip(0)
    flat = G.flatten(0, 1)
    back.b_dec.append(G[0].sum(0))
    back.into_decoder(in_groups, flat)
    back.into_encoder(slots, grouped.restore(back.dvalues(in_groups, flat), values), b)

    trainer.effective_l0 = trainer.k if batch else k
    trainer.num_tokens_since_fired += x.shape[0]
    trainer.num_tokens_since_fired[fired] = 0
    if batch or trainer.auxk_alpha > 0:
        loss = loss + trainer.auxk_alpha * _aux(trainer, back, errors[-1])
    return loss, back.result()


def _levels(trainer: Any, n_features: int) -> tuple[list[int], Tensor]:
    """Where the groups end, and each one's weight in the loss, a mean over them."""
    if type(trainer).__qualname__ != "MatryoshkaBatchTopKTrainer":
        return [n_features], trainer.ae.b_dec.new_ones(1)
    sizes = trainer.ae.group_sizes
    return sizes.cumsum(0).tolist(), trainer.ae.b_dec.new_tensor(trainer.group_weights) / len(sizes)


def _aux(trainer: Any, back: _Backward, residual: Tensor) -> Tensor:
    """AuxK as the trainers' ``get_auxiliary_loss`` has it; adds its gradients."""
    dead = trainer.num_tokens_since_fired >= trainer.dead_feature_threshold
    trainer.dead_features = int(dead.sum())
    if trainer.dead_features == 0:
        trainer.pre_norm_auxk_loss = -1
        return residual.new_zeros(())
    k, b = min(trainer.top_k_aux, trainer.dead_features), encoder_bias(trainer.ae)
    values, indices = ENCODE_TOPK(back.xc, back.W, b, None, None, dead, None, k, True, backend=preference(None))
    slots = Slots(values, indices, None, values > 0)
    difference = back.decode(slots) - residual
    error = difference.square().sum(-1).mean()
    trainer.pre_norm_auxk_loss = error
    denominator = (residual - residual.mean(0)).square().sum(-1).mean()
    ratio = error / denominator
    # nan_to_num passes no gradient where it has replaced something.
    g = difference * torch.where(ratio.isfinite(), 2 * trainer.auxk_alpha / (difference.shape[0] * denominator), 0)
    back.into_decoder(slots, g)
    back.into_encoder(slots, back.dvalues(slots, g), b)
    return ratio.nan_to_num(0.0)


def _standard(trainer: Any, x: Tensor, step: int, low: torch.dtype) -> tuple[Tensor, dict[Tensor, Any]]:
    """ReLU and L1."""
    ae = trainer.ae
    back = _Backward(ae, centred(ae, x), low)
    values, col, crow, _ = ENCODE_THRESHOLD(
        back.xc, back.W, encoder_bias(ae), None, None, None, None, x.new_zeros(()), None, backend=preference(None)
    )
    slots = Slots(values, col, crow, ~values.isnan())
    error = x - back.decode(slots) - decoder_bias(ae)
    weight = trainer.l1_penalty * trainer.sparsity_warmup_fn(step)
    loss = error.square().sum(-1).mean() + weight * values.sum(dtype=x.dtype) / x.shape[0]
    G = error * (-2 / x.shape[0])
    back.b_dec.append(G.sum(0))
    back.into_decoder(slots, G)
    back.into_encoder(slots, back.dvalues(slots, G) + weight / x.shape[0], encoder_bias(ae))
    if trainer.steps_since_active is not None:
        trainer.steps_since_active += 1
        trainer.steps_since_active[col] = 0
    return loss, back.result()


def _gated(trainer: Any, x: Tensor, step: int, low: torch.dtype) -> tuple[Tensor, dict[Tensor, Any]]:
    """Gates and magnitudes; L1 and a reconstruction of its own (the decoder detached) train the gates."""
    ae, rows = trainer.ae, x.shape[0]
    back = _Backward(ae, centred(ae, x), low)
    stretch, preferred = ae.r_mag.detach().exp(), preference(None)
    values, col, crow = ENCODE_GATED(back.xc, back.W, ae.gate_bias, ae.r_mag, ae.mag_bias, None, None, backend=preferred)
    slots = Slots(values, col, crow, ~values.isnan())
    values, col, crow, _ = ENCODE_THRESHOLD(back.xc, back.W, ae.gate_bias, None, None, None, None, x.new_zeros(()), None, backend=preferred)
    gate = Slots(values, col, crow, ~values.isnan())
    error = x - back.decode(slots) - ae.decoder_bias
    gate_error = x - back.decode(gate) - ae.decoder_bias
    weight = trainer.l1_penalty * trainer.sparsity_warmup_fn(step)
    loss = (error.square().sum() + weight * gate.values.sum(dtype=x.dtype) + gate_error.square().sum()) / rows
    G = error * (-2 / rows)
    back.b_dec.append(G.sum(0))
    back.into_decoder(slots, G)
    da = back.dvalues(slots, G)
    back.into_encoder(slots, da, ae.mag_bias, stretch)
    back.into_encoder(gate, back.dvalues(gate, gate_error * (-2 / rows)) + weight / rows, ae.gate_bias)
    dr_mag = back.sums(torch.where(slots.passes, da * (slots.values - ae.mag_bias[slots.indices]), 0), slots)
    return loss, back.result() | {ae.r_mag: dr_mag.to(ae.r_mag.dtype)}


def _jumprelu(trainer: Any, x: Tensor, step: int, low: torch.dtype) -> tuple[Tensor, dict[Tensor, Any]]:
    """JumpReLU and the squared distance of L0 from its target, straight-through in the thresholds.

    As in the library, the count compares latents, not scores, with the thresholds: zeros count where a threshold is below 0, and are in its
    band where it is near 0.
    """
    ae, width, rows = trainer.ae, float(trainer.bandwidth), x.shape[0]
    back = _Backward(ae, x, low)
    theta = ae.threshold.detach()
    least = theta.clamp_max(0)  # scores above a negative threshold are kept, negative ones too: as scores above 0 of a raised bias
    values, col, crow, flags = ENCODE_THRESHOLD(
        back.xc, back.W, ae.b_enc - least, None, None, None, None, theta - least, width, backend=preference(None)
    )
    active, band = (flags & 1).bool(), (flags & 2).bool()
    values = torch.where(active, values + least[col], 0)
    slots = Slots(values, col, crow, active & ~values.isnan())
    error = x - back.decode(slots) - ae.b_dec
    counts = torch.bincount(col[active], minlength=back.n_features)
    trainer.num_tokens_since_fired += rows
    trainer.num_tokens_since_fired[back.sums(values, slots) > 0] = 0
    trainer.dead_features = (trainer.num_tokens_since_fired > trainer.dead_feature_threshold).sum().item()
    l0 = torch.where(theta < 0, rows, counts).sum().to(x.dtype) / rows
    weight = trainer.sparsity_coefficient * trainer.sparsity_warmup_fn(step)
    loss = error.square().sum(-1).mean() + weight * (l0 / trainer.target_l0 - 1).square()
    dl0 = weight * 2 * (l0 / trainer.target_l0 - 1) / trainer.target_l0 / rows
    G = error * (-2 / rows)
    back.b_dec.append(G.sum(0))
    back.into_decoder(slots, G)
    da = back.dvalues(slots, G)
    back.into_encoder(slots, da, ae.b_enc)
    per_slot = torch.where(band, theta[col] * da + torch.where(active, dl0, 0), 0)
    dtheta = back.sums(per_slot, slots) + torch.where((theta / width).abs() < 0.5, (rows - counts) * dl0, 0)
    return loss, back.result() | {ae.threshold: (-dtheta / width).to(theta.dtype)}


STEPS: dict[str, Callable[[Any, Tensor, int, torch.dtype], tuple[Tensor, dict[Tensor, Any]]]] = {
    "TopKTrainer": _top,
    "BatchTopKTrainer": _top,
    "MatryoshkaBatchTopKTrainer": _top,
    "StandardTrainer": _standard,
    "GatedSAETrainer": _gated,
    "JumpReluTrainer": _jumprelu,
}
