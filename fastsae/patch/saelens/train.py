"""SAELens's training step without dense latents, dense gradients or a second pass of the optimiser; see ``saelens``.

    latents as slots (a = what the decoder multiplies)      reconstruction x_hat of each Matryoshka prefix
    mse_loss_fn on [B, D] by autograd -> dL/dx_hat          da = <dL/dx_hat, W_dec[f]>        dW_dec = slots x dL/dx_hat
    through the activation to pre-activations               dW_enc = slots x sae_in           AuxK likewise, on the dead features

With ``rescale_acts_by_decoder_norm`` a score is ``p |W_dec[f]|`` and its latent is divided by that norm again: the norm decides what is
selected and cancels everywhere else, in the gradients too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from fastsae.dispatch import preference, then_any
from fastsae.gradients import Gradient, RowGradient, total
from fastsae.latents import Latents, RaggedLatents, TopKLatents
from fastsae.ops.decode import DECODE, DECODE_DVALUES
from fastsae.ops.encode import ENCODE_BATCH_TOPK, ENCODE_THRESHOLD, ENCODE_TOPK
from fastsae.ops.score_gradients import feature_sums
from fastsae.patch import _adam
from fastsae.patch._adapter import changed, warn_once
from fastsae.patch.saelens.sae import as_asked, finish, hooked, is_dense, is_known, kind_of, other_activation, product, scale_of, sparse
from fastsae.reference import running_sums
from fastsae.sae.step import Groups, Slots

_HOOKS = ("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons")
_S = TypeVar("_S")
_C = TypeVar("_C")
CLIP = 1.0
"""Largest norm of the gradient in ``SAETrainer``."""


class TrainerMethods(Generic[_S, _C]):
    """``SAETrainer._train_step``, which ``step``, ``fit`` and the runners call.

    Generic like that class: an instance can only take a class whose layout has the same root.
    """

    def _train_step(self: Any, sae: Any, sae_in: Tensor) -> Any:
        optimiser = why_not_adam(self)
        if optimiser is not None:
            warn_once(self, optimiser)
            return super()._train_step(sae=sae, sae_in=sae_in)  # pyright: ignore[reportAttributeAccessIssue]
        sae.train()
        dead = self.dead_neurons
        reason = why_not_fused(self, sae, sae_in, dead)
        if reason is None:
            pursuit = kind_of(sae).activation == "pursuit"
            step = _pursuit(self, sae, sae_in) if pursuit else _Step(sae, sae_in, dead, self.get_coefficients()).run()
            output, gradients, counts = step
        else:
            if reason not in BY_DESIGN:
                warn_once(self, reason)
            output, gradients, counts = _autograd(self, sae, sae_in, dead)
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired[counts > 0] = 0
        self.act_freq_scores += counts
        self.n_frac_active_samples += self.cfg.train_batch_size_samples
        _adam.step(self.optimizer, gradients, CLIP)
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        return output


MANY_FIRE = "more than 1/8 of the latents fire: the library's dense forward and backward, our optimiser step"
OTHER_LOSS = "its loss is not one of slots: the library's forward and backward, our optimiser step"
BY_DESIGN = (MANY_FIRE, OTHER_LOSS)
"""Reasons that ``report`` states and no warning repeats."""


def why_not_adam(trainer: Any) -> str | None:
    """Why not even the optimiser's step can be ours, or None."""
    reason = changed(trainer, "_train_step") or _adam.refuses(trainer.optimizer)
    if reason is None and getattr(trainer, "grad_scaler", None) is not None and trainer.grad_scaler.is_enabled():  # up to 6.49
        return "its gradient scaler is on, which autocast to bfloat16 does not need"
    if reason is None and not _adam.holds(trainer.optimizer, trainer.sae):
        return "the optimiser does not hold the SAE's parameters (its gradients are clipped together)"
    return reason


def why_not_fused(trainer: Any, sae: Any, sae_in: Tensor, dead: Tensor) -> str | None:
    """Why forward and backward of this step are the library's own, or None."""
    if reason := why_never_fused(sae):
        return reason
    kind = kind_of(sae)
    if not isinstance(trainer.autocast_if_enabled, nullcontext) or torch.is_autocast_enabled(sae_in.device.type):
        return "autocast is on"
    if points := hooked(sae, _HOOKS):
        return f"{points[0]} has a hook"
    if (reason := changed(sae, "training_forward_pass")) is not None:
        return reason
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")[1 if kind.activation == "pursuit" else 0 :]  # whose encoder is its decoder
    named = [getattr(sae, name) for name in names if hasattr(sae, name)]
    if not all(isinstance(p, nn.Parameter) for p in named):
        return "a parameter is computed from another"
    if any(p.grad is not None for p in named) or not any(p.requires_grad for p in named):
        return "a parameter has a gradient already, or all are frozen"
    if sae_in.dim() != 2 or sae_in.shape[0] == 0 or sae_in.dtype is not sae.W_enc.dtype or sae.dtype is not sae.W_enc.dtype:
        return f"the batch is {list(sae_in.shape)} {sae_in.dtype} (supported: rows of the dtype of the weights)"
    if not (sae_in.device == sae.W_enc.device == trainer.n_forward_passes_since_fired.device):
        return f"the batch is on {sae_in.device}, the SAE on {sae.W_enc.device}"
    if kind.activation == "jumprelu":
        return MANY_FIRE if is_dense(sae, sae.process_sae_in(sae_in)) else None
    if (reason := other_activation(sae)) is not None:
        return reason
    if sae.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm") and (_widths(sae) or bool(dead.any())):
        return "a run-time normalisation together with AuxK or Matryoshka levels"
    if sae_in.shape[1] < 2:
        return "a single dimension leaves AuxK without latents"
    return None


def why_never_fused(sae: Any) -> str | None:
    """Of these, what the SAE's configuration settles."""
    if not is_known(sae):
        return f"{type(sae).__name__} is no class of the library that is supported: its forward and backward, our optimiser step"
    kind, cfg = kind_of(sae), sae.cfg
    if kind.activation not in ("topk", "abstopk", "batchtopk", "jumprelu", "pursuit"):
        return OTHER_LOSS
    if kind.activation == "jumprelu" and (cfg.jumprelu_sparsity_loss_mode == "tanh" or cfg.pre_act_loss_coefficient is not None):
        return OTHER_LOSS
    return OTHER_LOSS if getattr(cfg, "use_matryoshka_aux_loss", False) else None


def _widths(sae: Any) -> list[int]:
    """Matryoshka levels inside the dictionary."""
    return list(getattr(sae.cfg, "matryoshka_widths", ())[:-1])


def _autograd(trainer: Any, sae: Any, sae_in: Tensor, dead: Tensor) -> tuple[Any, dict[Tensor, Any], Tensor]:
    """The library's forward and backward: (output, gradients, how often each feature fired)."""
    step_input = sys.modules["sae_lens.saes.sae"].TrainStepInput(
        sae_in=sae_in,
        dead_neuron_mask=dead,
        coefficients=trainer.get_coefficients(),
        n_training_steps=trainer.n_training_steps,
        is_logging_step=trainer._is_logging_step(),
    )
    with trainer.autocast_if_enabled:
        output = sae.training_forward_pass(step_input=step_input)
    with torch.no_grad():
        firing = output.feature_acts.bool().float()
        counts = firing.sum(0)
        counts = counts.to_dense() if counts.is_sparse else counts
    output.loss.backward()
    return output, {p: p.grad for p in sae.parameters() if p.grad is not None}, counts


def _pursuit(trainer: Any, sae: Any, x: Tensor) -> tuple[Any, dict[Tensor, Any], Tensor]:
    """What ``_autograd`` returns, of a matching pursuit: by autograd over slots."""
    latents = sparse(sae, sae.process_sae_in(x))
    out = finish(sae, product(sae, latents))
    loss = sae.mse_loss_fn(out, x).sum(dim=-1).mean()
    loss.backward()
    assert isinstance(latents, RaggedLatents)
    latents, out, metrics = replace(latents, values=latents.values.detach()), out.detach(), {}
    l0 = latents.crow.diff().to(torch.float32)
    if trainer._is_logging_step():
        norm = (x - out).norm(dim=-1)
        metrics = {"max_l0": l0.max(), "min_l0": l0.min(), "residual_norm": norm.mean()}
        metrics["residual_threshold_converged_portion"] = (norm < sae.cfg.residual_threshold).float().mean()
    output = output_class()(
        sae_in=x,
        sae_out=out,
        feature_acts=lambda: as_asked(sae, latents),
        hidden_pre=None,
        loss=loss.detach(),
        losses={"mse_loss": loss.detach()},
        metrics=metrics,
    )
    counts = torch.bincount(latents.col, minlength=latents.n_features).to(torch.float32)
    return output, {p: p.grad for p in sae.parameters() if p.grad is not None}, counts


@dataclass
class _Code:
    """Slots of one code: ``a [slots]``, what the decoder multiplies; ``slots``: as selected."""

    slots: Slots
    a: Tensor


class _Step:
    """Forward and backward of one step, by slots; ``run`` returns what ``_autograd`` does."""

    def __init__(self, sae: Any, x: Tensor, dead: Tensor, coefficients: dict[str, float]):
        self.sae, self.x, self.dead, self.coefficients = sae, x, dead, coefficients
        self.kind, self.backend = kind_of(sae), then_any(preference(None))
        self.absolute = self.kind.activation == "abstopk"
        self.W, self.n_features = sae.W_enc.detach().T, sae.W_dec.shape[0]

    @torch.no_grad()
    def run(self) -> tuple[Any, dict[Tensor, Any], Tensor]:
        sae, x, jump = self.sae, self.x, self.kind.activation == "jumprelu"
        if jump:
            sae.threshold.data.clamp_(min=0.0)
        self.sae_in = sae.process_sae_in(x)
        scale = None if jump else scale_of(sae)
        self.scale = scale
        self.b = sae.b_enc if scale is None else sae.b_enc * scale
        code = self._code()
        widths = [*_widths(sae), self.n_features]
        groups = Groups.of(code.slots._replace(values=code.a), widths, x.shape[0])
        partial = DECODE(groups.values, groups.indices, groups.crow, sae.W_dec, None, backend=self.backend)
        x_hats = running_sums(partial.reshape(len(widths), x.shape[0], -1)) + sae.b_dec
        outs, losses, G = self._errors(x_hats, widths)
        terms: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        dl0, aux = None, None
        if jump:
            terms["l0_loss"], dl0 = self._l0(code)
        else:
            terms["auxiliary_reconstruction_loss"], aux = self._aux(outs[-1])
        losses = {"mse_loss": losses[-1], **terms, **{f"inner_mse_loss_{w}": loss for w, loss in zip(widths, losses[:-1])}}
        if self.kind.activation == "batchtopk":
            metrics["topk_threshold"] = self._move_threshold(code)

        suffix = G if len(widths) == 1 else running_sums(G.flip(0)).flip(0)
        rows = suffix.flatten(0, 1)
        W_dec: list[Gradient] = [RowGradient(groups.values, groups.indices, groups.crow, rows, self.n_features)]
        da = groups.restore(DECODE_DVALUES(rows, groups.indices, groups.crow, sae.W_dec, backend=self.backend), code.a)
        gradients: dict[Tensor, Any] = {}
        if dl0 is not None:
            dp, dtheta = self._through_jump(code, da, dl0)
            gradients[sae.threshold] = dtheta.to(sae.threshold.dtype)
        else:
            dp = torch.where(code.slots.passes, da, 0)
        W_enc: list[Gradient] = [self._encoder(code, dp)]
        b_enc = self._sums(code, dp)
        if aux is not None:
            aux_code, aux_grad = aux
            W_dec.append(RowGradient(aux_code.a, aux_code.slots.indices, None, aux_grad, self.n_features))
            dp = DECODE_DVALUES(aux_grad, aux_code.slots.indices, None, sae.W_dec, backend=self.backend)
            W_enc.append(self._encoder(aux_code, dp))
            b_enc = b_enc + self._sums(aux_code, dp)
        b_dec = suffix[0].sum(0)
        if sae.cfg.apply_b_dec_to_input:
            b_dec = b_dec - sae.W_enc @ b_enc.to(sae.W_enc.dtype)
        gradients |= {sae.W_enc: _adam.Feature(total(W_enc)), sae.W_dec: total(W_dec)}
        gradients |= {sae.b_enc: b_enc.to(sae.b_enc.dtype), sae.b_dec: b_dec}

        fired = code.a != 0
        counts = torch.bincount(code.slots.indices[fired], minlength=self.n_features).to(torch.float32)
        loss = sum(losses.values())
        latents = self._latents(code)
        output = output_class()(
            sae_in=x,
            sae_out=outs[-1],
            feature_acts=lambda: as_asked(sae, latents),
            hidden_pre=None,
            loss=loss,
            losses=losses,
            metrics=metrics,
        )
        return output, gradients, counts

    def _code(self) -> _Code:
        sae, preferred = self.sae, preference(None)
        if self.kind.activation == "jumprelu":
            theta = sae.threshold.detach().to(self.sae_in.dtype)
            outputs = ENCODE_THRESHOLD(
                self.sae_in, self.W, self.b, None, None, None, None, theta, float(sae.bandwidth), backend=preferred
            )  # fmt: skip
            values, col, crow, flags = outputs
            return _Code(Slots(values, col, crow, (flags & 1).bool(), flags), values)
        if self.kind.activation in ("topk", "abstopk"):
            rule = sae.activation_fn.k, not self.absolute, self.absolute
            values, indices = ENCODE_TOPK(self.sae_in, self.W, self.b, None, self.scale, None, None, *rule, backend=preferred)
            return _Code(Slots(values, indices, None, values == values if self.absolute else values > 0), self._unscaled(values, indices))
        k = float(sae.activation_fn.k)
        values, col, crow, min_kept = ENCODE_BATCH_TOPK(self.sae_in, self.W, self.b, None, self.scale, None, None, k, backend=preferred)
        return _Code(Slots(values, col, crow, values > 0, min_kept=min_kept), self._unscaled(values, col))

    def _unscaled(self, values: Tensor, indices: Tensor) -> Tensor:
        return values if self.scale is None else values * (1 / self.scale)[indices]

    def _latents(self, code: _Code) -> Latents:
        slots = code.slots
        if slots.crow is None:
            return TopKLatents(slots.values, slots.indices, self.n_features)
        return RaggedLatents(slots.values, slots.crow, slots.indices, self.n_features, (self.x.shape[0],))

    @torch.enable_grad()
    def _errors(self, x_hats: Tensor, widths: list[int]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Outputs and squared errors of each prefix, and the loss's gradient for each ``x_hats``; by autograd, nothing is larger than x."""
        sae, x_hats = self.sae, x_hats.detach().requires_grad_()
        outs = [sae.run_time_activation_norm_fn_out(x_hats[i]) for i in range(len(widths))]
        losses = [sae.mse_loss_fn(out, self.x).sum(dim=-1).mean() for out in outs]
        (G,) = torch.autograd.grad(torch.stack(losses).sum(), x_hats)
        return [out.detach() for out in outs], [loss.detach() for loss in losses], G

    def _aux(self, x_hat: Tensor) -> tuple[Tensor, tuple[_Code, Tensor] | None]:
        """The AuxK term as the library scales it; the dead features' code, and the gradient for what it decodes to."""
        sae, n_dead = self.sae, int(self.dead.sum())
        if n_dead == 0:
            return x_hat.new_tensor(0.0), None
        most = self.x.shape[1] // 2
        k, share = min(most, n_dead), min(n_dead / most, 1.0)
        residual = self.x - x_hat
        rule = k, False, self.absolute
        values, indices = ENCODE_TOPK(self.sae_in, self.W, self.b, None, self.scale, self.dead, None, *rule, backend=preference(None))
        a = self._unscaled(values, indices)
        difference = DECODE(a, indices, None, sae.W_dec, None, backend=self.backend) - residual
        weight = sae.cfg.aux_loss_coefficient * share
        loss = weight * difference.square().sum(-1).mean()
        return loss, (_Code(Slots(values, indices, None, values == values), a), difference * (2 * weight / self.x.shape[0]))

    def _l0(self, code: _Code) -> tuple[Tensor, Tensor]:
        """The L0 term and its gradient for the count of each row."""
        cfg, rows = self.sae.cfg, self.x.shape[0]
        crow, flags = code.slots.crow, code.slots.flags
        assert crow is not None and flags is not None
        before = torch.cat([crow.new_zeros(1), (flags & 1).long().cumsum(0)])
        l0 = before[crow].diff().to(code.a.dtype)
        weight = self.coefficients["l0"]
        if cfg.jumprelu_sparsity_loss_mode == "quadratic":
            return (weight * (2 / cfg.target_l0 * (l0 - cfg.target_l0) ** 2)).mean(), weight * 4 / cfg.target_l0 * (
                l0 - cfg.target_l0
            ) / rows
        return (weight * l0).mean(), torch.full_like(l0, weight / rows)

    def _through_jump(self, code: _Code, da: Tensor, dl0: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients for the slots' pre-activations, and for the thresholds: straight-through inside the band."""
        sae, slots = self.sae, code.slots
        assert slots.flags is not None
        theta = sae.threshold.detach().to(da.dtype)[slots.indices]
        estimate = (theta * da + dl0[slots.row_of()]) / sae.bandwidth
        estimate = torch.where((slots.flags & 2).bool(), estimate, 0)
        dp = torch.where(slots.passes, da, 0)
        return dp + estimate if sae.cfg.jumprelu_ste_to_input else dp, -self._sums(code, estimate)

    def _encoder(self, code: _Code, dp: Tensor) -> RowGradient:
        return RowGradient(dp, code.slots.indices, code.slots.crow, self.sae_in, self.n_features)

    def _sums(self, code: _Code, per_slot: Tensor) -> Tensor:
        return feature_sums(per_slot, code.slots.indices, code.slots.crow, self.n_features, self.backend)

    def _move_threshold(self, code: _Code) -> Tensor:
        sae, least = self.sae, code.slots.min_kept
        assert least is not None
        if bool(torch.isfinite(least)):
            lr = sae.cfg.topk_threshold_lr
            sae.topk_threshold = (1 - lr) * sae.topk_threshold + lr * least.to(sae.topk_threshold.dtype)
        return sae.topk_threshold


_outputs: list[type] = []


def output_class() -> Callable[..., Any]:
    """``TrainStepOutput`` whose dense latents are made when asked for."""
    if not _outputs:
        base = sys.modules["sae_lens.saes.sae"].TrainStepOutput

        class TrainStepOutput(base):
            """SAELens's ``TrainStepOutput`` of a fused step: ``feature_acts`` is made when read, ``hidden_pre`` never was."""

            @property
            def feature_acts(self) -> Any:
                if callable(self._feature_acts):
                    self._feature_acts = self._feature_acts()
                return self._feature_acts

            @feature_acts.setter
            def feature_acts(self, value: Any) -> None:
                self._feature_acts = value

            @property
            def hidden_pre(self) -> Tensor:
                raise RuntimeError(
                    "TrainStepOutput.hidden_pre: a step of an accelerated trainer forms no [B, F] pre-activations, and the weights have "
                    "moved since; call sae.encode_with_hidden_pre before the step, or fastsae.restore(trainer)"
                )

            @hidden_pre.setter
            def hidden_pre(self, value: Any) -> None:
                pass

            def __repr__(self) -> str:
                return f"TrainStepOutput(loss={self.loss}, losses={self.losses}, metrics={self.metrics}, ..)"

        TrainStepOutput.__module__ = base.__module__
        TrainStepOutput.__qualname__ = base.__qualname__
        _outputs.append(TrainStepOutput)
    return _outputs[0]
