"""Forward and backward of SAELens's training step by hand; see ``saelens``.

    latents as slots (a = what the decoder multiplies)      reconstruction x_hat of each Matryoshka prefix
    mse_loss_fn on [B, D] by autograd -> dL/dx_hat          da = <dL/dx_hat, W_dec[f]>        dW_dec = slots x dL/dx_hat
    through the activation to pre-activations               dW_enc = slots x sae_in           AuxK likewise, on the dead features

With ``rescale_acts_by_decoder_norm`` a score is ``p |W_dec[f]|`` and its latent is divided by that norm again: the norm decides what is
selected and cancels everywhere else, in the gradients too.

ReLU, gated and JumpReLU SAEs of which many latents fire go by torch's products on ``[B, F]``, in fewer passes than autograd makes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastsae._core.world import ALONE
from fastsae.gradients import RowGradient
from fastsae.latents import Latents, RaggedLatents, TopKLatents
from fastsae.patch import _adam
from fastsae.patch.saelens import _hooks
from fastsae.patch.saelens.sae import activation, as_asked, is_dense, kind_of, weights
from fastsae.reference import running_sums
from fastsae.sae.jump import penalised
from fastsae.sae.losses import AuxK, JumpLoss, Terms, quotient
from fastsae.sae.step import SlotPass, Slots, Sum, aux_step, encode_slots

BEST = ("topk", "abstopk", "batchtopk")


class Step:
    """Forward and backward of one step, by slots or, where many fire, by torch's products; ``run`` returns what ``_autograd`` does.

    Under autocast what is multiplied is rounded to ``low``, as there; sums are not. Slots of a TopK's kind stay in it.
    """

    def __init__(self, sae: Any, x: Tensor, dead: Tensor, coefficients: dict[str, float], low: torch.dtype | None):
        self.sae, self.x, self.dead, self.coefficients = sae, x, dead, coefficients
        self.kind = kind_of(sae).activation
        self.n_features = sae.W_dec.shape[0]
        self.hooks = _hooks.Points(sae)
        self.low = low if low is not None and sae.W_enc.dtype is torch.float32 else sae.W_enc.dtype
        self.W, self.W_dec = sae.W_enc.detach().to(self.low).T, sae.W_dec.detach().to(self.low)
        self.losses: dict[str, Tensor] = {}
        self.gradients: dict[Tensor, Any] = {}

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """What autocast makes of ``a @ b``, in the dtype of the weights."""
        return (a.to(self.low) @ b.to(self.low)).to(self.sae.W_enc.dtype)

    @torch.no_grad()
    def run(self) -> tuple[Any, dict[Tensor, Any], Tensor]:
        sae, x = self.sae, self.x
        if self.kind == "jumprelu":
            sae.threshold.data.clamp_(min=0.0)
        self.hooks.show("hook_sae_input", lambda: sae.reshape_fn_in(x))
        with _hooks.replayed(self.hooks.shown):
            sae_in = sae.process_sae_in(x)
        self.sae_in = sae_in.to(self.low)
        pre_act = self.kind == "jumprelu" and sae.cfg.pre_act_loss_coefficient is not None
        many = is_dense(sae, sae_in) or (pre_act and int(self.dead.sum()) * 8 > self.n_features)
        self.hooks.show("hook_sae_acts_pre", self._hidden)
        return (self._by_products if many else self._by_slots)(pre_act)

    def _hidden(self) -> Tensor:
        sae, gated = self.sae, self.kind == "gated"
        return self._product(self.sae_in, sae.W_enc * sae.r_mag.exp() if gated else sae.W_enc) + (sae.b_mag if gated else sae.b_enc)

    def _by_slots(self, pre_act: bool) -> tuple[Any, dict[Tensor, Any], Tensor]:
        sae, x, rows, best = self.sae, self.x, self.x.shape[0], self.kind in BEST
        w = replace(weights(sae), W_enc=self.W, W_dec=self.W_dec, bandwidth=float(sae.bandwidth) if self.kind == "jumprelu" else None)
        terms = self._terms()
        this = SlotPass(encode_slots(self.sae_in, w, activation(sae)), self.sae_in, w, terms, ALONE, outputs=False)
        slots, run = this.slots, this.run
        latents = self._latents(slots, w.rank)
        self.hooks.show("hook_sae_acts_post", lambda: as_asked(sae, latents))
        x_hats = this.outputs().to(sae.W_enc.dtype)
        self.hooks.show("hook_sae_recons", lambda: x_hats[-1].clone())
        outs, losses, G = self._errors(x_hats, w.prefixes)
        self.losses["mse_loss"] = losses[-1]
        suffix = G if len(w.prefixes) == 1 else running_sums(G.flip(0)).flip(0)
        grad, dfrozen = Sum(), None
        grad.add("b_dec", suffix[0].sum(0))
        zero = losses[-1].new_zeros(())
        penalty = zero if run.magnitude is None else terms.l1 * run.magnitude / rows
        if self.kind == "jumprelu":
            self.losses["l0_loss"] = penalty + terms.l0 * (run.active.to(zero) if run.counted is None else run.counted) / rows
        elif not best:
            self.losses["l1_loss"] = penalty
        if run.frozen is not None and this.gate is not None:  # whose reconstruction trains the decoder here, too
            difference = run.frozen - x
            self.losses["auxiliary_reconstruction_loss"] = difference.square().sum(-1).mean()
            dfrozen = (difference * (2 / rows)).to(self.low)
            grad.add("W_dec", RowGradient(*this.gate[:3], dfrozen, self.n_features))
            grad.add("b_dec", ALONE.row_sum(dfrozen))
        this.backward(grad, suffix.to(self.low), dfrozen, terms.l1 / rows, terms.l0 / rows)
        if pre_act:
            self.losses["pre_act_loss"] = zero
            if (which := self.dead.nonzero().flatten()).numel():
                self._pre_act_slots(grad, which)
        if best:
            aux = AuxK.saelens(coefficient=sae.cfg.aux_loss_coefficient) if sae.cfg.aux_loss_coefficient else None
            term = None if aux is None else aux_step(grad, self.sae_in, x, outs[-1], self.dead, w, aux, self.kind == "abstopk", ALONE)
            self.losses["auxiliary_reconstruction_loss"] = zero if term is None else sae.cfg.aux_loss_coefficient * term
        self.losses |= {f"inner_mse_loss_{width}": loss for width, loss in zip(w.prefixes, losses[:-1])}
        metrics = {"topk_threshold": self._move_threshold(slots)} if self.kind == "batchtopk" else {}
        counts = torch.bincount(slots.indices[slots.values != 0], minlength=self.n_features).to(torch.float32)
        found = grad.result(dict(sae.named_parameters()))
        self.gradients |= {getattr(sae, name): gradient for name, gradient in found.items()}
        if self.kind == "gated":
            pulled = self.gradients[sae.b_gate] + self.gradients[sae.b_mag] * sae.r_mag.exp()
        else:
            pulled = self.gradients[sae.b_enc]
        W_enc = _adam.Feature(self.gradients[sae.W_enc])
        return self._result(
            W_enc, self.gradients[sae.W_dec], pulled, self.gradients[sae.b_dec], outs[-1], lambda: as_asked(sae, latents), counts, metrics
        )

    def _terms(self) -> Terms:
        cfg = self.sae.cfg
        if self.kind != "jumprelu":
            return Terms(self.coefficients.get("l1", 0.0), 0.0, None, None)
        weight, mode, to_scores = self.coefficients["l0"], cfg.jumprelu_sparsity_loss_mode, cfg.jumprelu_ste_to_input
        if mode == "tanh":
            return Terms(weight, 0.0, None, JumpLoss(tanh=cfg.jumprelu_tanh_scale, to_scores=to_scores))
        if mode == "quadratic":
            return Terms(0.0, 2 * cfg.target_l0 * weight, None, JumpLoss(cfg.target_l0, to_scores=to_scores))
        return Terms(0.0, weight, None, JumpLoss(to_scores=to_scores))

    def _result(
        self, W_enc: Any, W_dec: Any, pulled: Tensor, b_dec: Tensor, out: Tensor, acts: Any, counts: Tensor, metrics: dict[str, Tensor]
    ) -> tuple[Any, dict[Tensor, Any], Tensor]:
        """``pulled``: the gradient of the encoder's products, summed over rows."""
        sae = self.sae
        if sae.cfg.apply_b_dec_to_input:
            b_dec = b_dec - sae.W_enc @ pulled.to(sae.W_enc.dtype)
        self._give("b_dec", b_dec)
        self.gradients |= {sae.W_enc: W_enc, sae.W_dec: W_dec}
        loss = sum(self.losses.values())
        shown = self.hooks.shown_at("hook_sae_acts_post")
        output = output_class()(
            sae_in=self.x,
            sae_out=out,
            feature_acts=acts if shown is None else shown.detach(),
            hidden_pre=None,
            loss=loss,
            losses=self.losses,
            metrics=metrics,
        )
        return output, self.gradients, counts

    def _give(self, name: str, gradient: Tensor) -> None:
        p = getattr(self.sae, name)
        self.gradients[p] = gradient.to(p.dtype)

    def _latents(self, slots: Slots, rank: Tensor | None) -> Latents:
        """As the library has them: those that were selected by ``rank * score`` times ``rank``."""
        values = slots.values.to(self.sae.W_enc.dtype)
        values = values if rank is None else values * rank[slots.indices]
        if slots.crow is None:
            return TopKLatents(values, slots.indices, self.n_features)
        return RaggedLatents(values, slots.crow, slots.indices, self.n_features, (self.x.shape[0],))

    @torch.enable_grad()
    def _errors(self, x_hats: Tensor, widths: list[int]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Outputs and squared errors of each prefix, and the loss's gradient for each ``x_hats``; by autograd, nothing is larger than x."""
        sae, x_hats = self.sae, x_hats.detach().requires_grad_()
        outs = [sae.run_time_activation_norm_fn_out(x_hats[i]) for i in range(len(widths))]
        losses = [sae.mse_loss_fn(out, self.x).sum(dim=-1).mean() for out in outs]
        (G,) = torch.autograd.grad(torch.stack(losses).sum(), x_hats)
        return [out.detach() for out in outs], [loss.detach() for loss in losses], G

    def _pre_act_slots(self, grad: Sum, which: Tensor) -> None:
        """Adds what the pre-activation loss gives, of the dead features ``which``."""
        sae = self.sae
        z = self._product(self.sae_in, self.W[which].T) + sae.b_enc[which]
        dz, factor = self._pre_act(z, sae.threshold.to(z.dtype)[which], which)
        index, pulled = which.expand_as(dz), torch.zeros_like(self.norm).index_copy_(0, which, dz.sum(0))
        grad.add("W_enc", RowGradient(dz, index, None, self.sae_in.to(dz.dtype), self.n_features))
        grad.add("b_enc", pulled)
        grad.add("threshold", -pulled)
        rows = sae.W_dec.detach()[which]
        grad.add("W_dec", RowGradient(quotient(factor, self.norm[which])[:, None], which[:, None], None, rows, self.n_features))

    @functools.cached_property
    def norm(self) -> Tensor:
        return self.sae.W_dec.norm(dim=1)

    def _l0(self, l0: Tensor) -> tuple[Tensor, Tensor]:
        """The L0 term and its gradient for the count of each row."""
        cfg, weight = self.sae.cfg, self.coefficients["l0"]
        if cfg.jumprelu_sparsity_loss_mode == "quadratic":
            off = l0 - cfg.target_l0
            return (weight * (2 / cfg.target_l0 * off**2)).mean(), weight * 4 / cfg.target_l0 * off / self.x.shape[0]
        return (weight * l0).mean(), torch.full_like(l0, weight / self.x.shape[0])

    def _pre_act(self, z: Tensor, theta: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """The pre-activation loss of dead features; its gradients for their scores ``z [B, n]`` and for the norms of their rows."""
        coefficient, norm = self.sae.cfg.pre_act_loss_coefficient, self.norm[which]
        below, weight = (theta - z).relu(), coefficient / self.x.shape[0]
        self.losses["pre_act_loss"] = coefficient * (below * norm).sum(-1).mean()
        return torch.where(theta > z, -weight * norm, 0), weight * below.sum(0)

    def _by_products(self, pre_act: bool) -> tuple[Any, dict[Tensor, Any], Tensor]:
        """Of ReLU, gated and JumpReLU, on ``[B, F]``: what the library's autograd computes, in fewer passes."""
        sae, x, rows, relu_backward = self.sae, self.x, self.x.shape[0], torch.ops.aten.threshold_backward
        p = self._product(self.sae_in, sae.W_enc)
        gate = p
        if self.kind == "gated":
            acts = torch.addcmul(sae.b_mag, p, sae.r_mag.exp()).relu_()
            gate = p.add_(sae.b_gate).relu_()
            acts = relu_backward(acts, gate, 0)
        elif self.kind == "relu":
            acts = gate = p.add_(sae.b_enc).relu_()
        else:
            acts = p.add_(sae.b_enc) * (p > sae.threshold.to(p.dtype))
        self.hooks.show("hook_sae_acts_post", acts.clone)
        x_hats = (self._product(acts, self.W_dec) + sae.b_dec).unsqueeze(0)
        self.hooks.show("hook_sae_recons", lambda: x_hats[0].clone())
        (out,), (self.losses["mse_loss"],), (G,) = self._errors(x_hats, [self.n_features])
        b_dec, W_dec, da = G.sum(0), self._product(acts.T, G), self._product(G, self.W_dec.T)
        if self.kind == "jumprelu":
            dp, factor = self._jump_product(p, acts, da, pre_act)
        else:
            weight, sums = self.coefficients["l1"] / rows, gate.sum(0)
            self.losses["l1_loss"], factor = weight * (sums * self.norm).sum(), weight * sums
            if self.kind == "relu":
                dp = relu_backward(da.add_(weight * self.norm), acts, 0)
                self._give("b_enc", dp.sum(0))
            else:
                difference = self._product(gate, self.W_dec) + sae.b_dec - x
                self.losses["auxiliary_reconstruction_loss"] = difference.square().sum(-1).mean()
                G = difference * (2 / rows)
                b_dec, W_dec = b_dec + G.sum(0), W_dec.add_(self._product(gate.T, G))
                dp = relu_backward(self._product(G, self.W_dec.T).add_(weight * self.norm), gate, 0)
                self._give("b_gate", dp.sum(0))
                dmagnitude = relu_backward(da, acts, 0)
                sums = dmagnitude.sum(0)
                self._give("b_mag", sums)
                self._give("r_mag", dmagnitude.mul(acts).sum(0) - sae.b_mag * sums)
                dp.addcmul_(dmagnitude, sae.r_mag.exp())
        W_dec.addcmul_(quotient(factor, self.norm).unsqueeze(1), sae.W_dec)
        counts = torch.count_nonzero(acts, dim=0).to(torch.float32)
        return self._result(self._product(self.sae_in.T, dp), W_dec, dp.sum(0), b_dec, out, acts, counts, {})

    def _jump_product(self, p: Tensor, acts: Tensor, da: Tensor, pre_act: bool) -> tuple[Tensor, Tensor]:
        """Of a JumpReLU: gradient of the scores ``p``, and of the norms of W_dec's rows."""
        sae, cfg, theta = self.sae, self.sae.cfg, self.sae.threshold.to(p.dtype)
        active, factor, dl0 = p > theta, torch.zeros_like(self.norm), p.new_zeros(())
        if cfg.jumprelu_sparsity_loss_mode == "tanh":
            weight = self.coefficients["l0"] / self.x.shape[0]
            size, slope, grown = penalised(acts, self.norm, cfg.jumprelu_tanh_scale)
            self.losses["l0_loss"], factor = weight * size.sum(), weight * grown.sum(0)
            da = da.add_(slope, alpha=weight)
        else:
            self.losses["l0_loss"], dl0 = self._l0(active.sum(-1).to(p.dtype))
        band = ((p - theta) / sae.bandwidth).abs_() < 0.5
        estimate = torch.addcmul(dl0.unsqueeze(-1), da, theta).div_(sae.bandwidth).mul_(band)
        dp, dtheta = da * active, -estimate.sum(0)
        dp = dp.add_(estimate) if cfg.jumprelu_ste_to_input else dp
        if pre_act:
            which = self.dead.nonzero().flatten()
            dz, below = self._pre_act(p[:, which], theta[which], which)
            dp.index_add_(1, which, dz)
            dtheta, factor = dtheta.index_add(0, which, -dz.sum(0)), factor.index_add(0, which, below)
        self._give("b_enc", dp.sum(0))
        self._give("threshold", dtheta)
        return dp, factor

    def _move_threshold(self, slots: Slots) -> Tensor:
        sae, least = self.sae, slots.min_kept
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
