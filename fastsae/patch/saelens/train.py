"""SAELens's training step: which part of it is ours as the trainer stands, and why not more; the forward and backward are ``step``'s."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from fastsae._core import checks
from fastsae.latents import RaggedLatents
from fastsae.patch import _adam
from fastsae.patch._adapter import STATE, changed, warn_once
from fastsae.patch.saelens import _hooks
from fastsae.patch.saelens.sae import as_asked, ends, finish, is_known, kind_of, other_activation, product, sparse
from fastsae.patch.saelens.step import BEST, Step, output_class

_S = TypeVar("_S")
_C = TypeVar("_C")
CLIP = 1.0
"""Largest norm of the gradient in ``SAETrainer``."""


class TrainerMethods(Generic[_S, _C]):
    """``SAETrainer._train_step``, which ``step``, ``fit`` and the runners call.

    Generic like that class: an instance can only take a class whose layout has the same root.
    """

    def _train_step(self: Any, sae: Any, sae_in: Tensor) -> Any:
        sae.train()
        dead, own = self.dead_neurons, why_not_ours(self)
        optimiser = own or why_not_adam(self)
        reason = own or why_not_fused(self, sae, sae_in, dead)
        if own or (optimiser and reason):
            warn_once(self, own or str(optimiser))
            return super()._train_step(sae=sae, sae_in=sae_in)  # pyright: ignore[reportAttributeAccessIssue]
        if reason is None:
            try:
                output, gradients, counts = _fused(self, sae, sae_in, dead)
            except _hooks.Wrote as wrote:
                vars(self)[STATE].writers |= wrote.hooks
                warn_once(self, str(wrote))
                with _hooks.replayed(wrote.shown):
                    output, gradients, counts = _autograd(self, sae, sae_in, dead)
        else:
            if reason not in BY_DESIGN:
                warn_once(self, reason)
            output, gradients, counts = _autograd(self, sae, sae_in, dead)
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired[counts > 0] = 0
        self.act_freq_scores += counts
        self.n_frac_active_samples += self.cfg.train_batch_size_samples
        if optimiser is None:
            _adam.step(self.optimizer, gradients, CLIP)
        else:
            warn_once(self, optimiser, how="steps on dense gradients")
            for p, gradient in gradients.items():
                p.grad = _adam.dense(p, gradient) if p.requires_grad else None
            nn.utils.clip_grad_norm_(sae.parameters(), CLIP)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        return output


OTHER_LOSS = "its loss is not one of slots: the library's forward and backward, our optimiser step"
BY_DESIGN = (OTHER_LOSS,)
"""Reasons that ``report`` states and no warning repeats."""


def why_not_ours(trainer: Any) -> str | None:
    """Why the whole step is the library's own, or None."""
    if (reason := changed(trainer, "_train_step")) is not None:
        return reason
    if getattr(trainer, "grad_scaler", None) is not None and trainer.grad_scaler.is_enabled():  # up to 6.49
        return "its gradient scaler is on, which autocast to bfloat16 does not need"
    if any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in trainer.sae.parameters()):
        return "a parameter has gradient hooks"
    return None


def why_not_adam(trainer: Any) -> str | None:
    """Why the optimiser's step is its own, on dense gradients, or None."""
    if (reason := _adam.refuses(trainer.optimizer)) is None and not _adam.holds(trainer.optimizer, trainer.sae):
        return "the optimiser does not hold the SAE's parameters (its gradients are clipped together)"
    return reason


def why_not_fused(trainer: Any, sae: Any, sae_in: Tensor, dead: Tensor) -> str | None:
    """Why forward and backward of this step are the library's own, or None."""
    if reason := why_never_fused(sae):
        return reason
    if not torch.is_grad_enabled():
        return "gradients are disabled"
    kind, low = kind_of(sae).activation, _autocast(trainer, sae_in)
    if low is not None and (kind == "pursuit" or low is not torch.bfloat16):
        return f"autocast to {str(low)[6:]} is on"
    if reason := _hooks.why_not_shown(sae, vars(trainer)[STATE].writers if STATE in vars(trainer) else frozenset(), kind != "pursuit"):
        return reason
    if (reason := changed(sae, "training_forward_pass")) is not None:
        return reason
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", "b_gate", "r_mag", "b_mag")
    named = [getattr(sae, name, None) for name in names[1 if kind == "pursuit" else 0 :]]  # whose encoder is its decoder
    named = [p for p in named if p is not None]
    if not all(isinstance(p, nn.Parameter) for p in named):
        return "a parameter is computed from another"
    if any(p.grad is not None for p in named) or not any(p.requires_grad for p in named):
        return "a parameter has a gradient already, or all are frozen"
    if sae_in.dim() != 2 or sae_in.shape[0] == 0 or sae_in.dtype is not sae.W_enc.dtype or sae.dtype is not sae.W_enc.dtype:
        return f"the batch is {list(sae_in.shape)} {sae_in.dtype} (supported: rows of the dtype of the weights)"
    if not (sae_in.device == sae.W_enc.device == trainer.n_forward_passes_since_fired.device):
        return f"the batch is on {sae_in.device}, the SAE on {sae.W_enc.device}"
    if (reason := other_activation(sae)) is not None:
        return reason
    by_row = sae.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm")
    if by_row and kind in BEST and (len(ends(sae)) > 1 or bool(dead.any())):
        return "a run-time normalisation together with AuxK or Matryoshka levels"
    if sae_in.shape[1] < 2 and kind in BEST:
        return "a single dimension leaves AuxK without latents"
    return None


def _autocast(trainer: Any, x: Tensor) -> torch.dtype | None:
    """What the trainer's forward pass casts to."""
    with trainer.autocast_if_enabled:
        return torch.get_autocast_dtype(x.device.type) if checks.autocasting(x.device) else None


def why_never_fused(sae: Any) -> str | None:
    """Of these, what the SAE's configuration settles."""
    if not is_known(sae):
        return f"{type(sae).__name__} is no class of the library that is supported: its forward and backward, our optimiser step"
    kind, cfg = kind_of(sae).activation, sae.cfg
    if kind == "gated" and cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):  # which its gate's own error leaves out
        return OTHER_LOSS
    return OTHER_LOSS if getattr(cfg, "lp_norm", 1) != 1 or getattr(cfg, "use_matryoshka_aux_loss", False) else None


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


def _fused(trainer: Any, sae: Any, x: Tensor, dead: Tensor) -> tuple[Any, dict[Tensor, Any], Tensor]:
    """The same, without autograd."""
    if kind_of(sae).activation == "pursuit":
        return _pursuit(trainer, sae, x)
    with torch.autocast(x.device.type, enabled=False) if checks.autocasting(x.device) else nullcontext():
        return Step(sae, x, dead, trainer.get_coefficients(), _autocast(trainer, x)).run()


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
