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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsae.dispatch import preference, then_any
from fastsae.gradients import Gradient, RowGradient, total
from fastsae.latents import Latents, RaggedLatents, TopKLatents
from fastsae.ops.decode import DECODE, DECODE_DVALUES
from fastsae.ops.encode import ENCODE_BATCH_TOPK, ENCODE_GATED, ENCODE_THRESHOLD, ENCODE_TOPK
from fastsae.ops.score_gradients import feature_sums
from fastsae.patch import _adam
from fastsae.patch.saelens import _hooks
from fastsae.patch.saelens.sae import as_asked, is_dense, kind_of, scale_of
from fastsae.reference import running_sums
from fastsae.sae.losses import quotient
from fastsae.sae.step import Groups, Slots


def widths(sae: Any) -> list[int]:
    """Matryoshka levels inside the dictionary."""
    return list(getattr(sae.cfg, "matryoshka_widths", ())[:-1])


@dataclass
class _Code:
    """Slots of one code: ``a [slots]``, what the decoder multiplies; ``slots``: as selected."""

    slots: Slots
    a: Tensor


class Step:
    """Forward and backward of one step, by slots or, where many fire, by torch's products; ``run`` returns what ``_autograd`` does.

    Under autocast what is multiplied is rounded to ``low``, as there; sums are not. Slots of a TopK's kind stay in it.
    """

    def __init__(self, sae: Any, x: Tensor, dead: Tensor, coefficients: dict[str, float], low: torch.dtype | None):
        self.sae, self.x, self.dead, self.coefficients = sae, x, dead, coefficients
        self.kind, self.backend = kind_of(sae).activation, then_any(preference(None))
        self.absolute, self.n_features = self.kind == "abstopk", sae.W_dec.shape[0]
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
        sae, x, jump = self.sae, self.x, self.kind == "jumprelu"
        scale = scale_of(sae)
        self.scale = scale
        self.b: Any = None if self.kind == "gated" else sae.b_enc if scale is None else sae.b_enc * scale
        code = self._code()
        latents = self._latents(code)
        self.hooks.show("hook_sae_acts_post", lambda: as_asked(sae, latents))
        ends = [*widths(sae), self.n_features]
        groups = Groups.of(code.slots._replace(values=code.a), ends, x.shape[0])
        partial = self._decode(groups)
        x_hats = running_sums(partial.reshape(len(ends), x.shape[0], -1)) + sae.b_dec
        self.hooks.show("hook_sae_recons", lambda: x_hats[-1].clone())
        outs, losses, G = self._errors(x_hats, ends)
        self.losses["mse_loss"] = losses[-1]
        suffix = G if len(ends) == 1 else running_sums(G.flip(0)).flip(0)
        b_dec = suffix[0].sum(0)
        rows = suffix.flatten(0, 1).to(self.low)
        W_dec: list[Gradient] = [RowGradient(groups.values, groups.indices, groups.crow, rows.to(code.a.dtype), self.n_features)]
        da = groups.restore(DECODE_DVALUES(rows, groups.indices, groups.crow, self.W_dec, backend=self.backend), code.a).to(code.a.dtype)
        if jump:
            W_enc, b_enc = self._jump(code, da, W_dec, pre_act)
        elif self.kind in ("relu", "gated"):
            W_enc, b_enc, more = (self._l1 if self.kind == "relu" else self._gate)(code, da, W_dec)
            b_dec = b_dec + more
        else:
            dp = torch.where(code.slots.passes, da, 0)
            W_enc, b_enc = [self._encoder(code.slots, dp)], self._sums(code.slots, dp)
            self.losses["auxiliary_reconstruction_loss"], aux = self._aux(outs[-1])
            if aux is not None:
                aux_code, aux_grad = aux
                W_dec.append(RowGradient(aux_code.a, aux_code.slots.indices, None, aux_grad, self.n_features))
                dp = DECODE_DVALUES(aux_grad, aux_code.slots.indices, None, self.W_dec, backend=self.backend)
                W_enc.append(self._encoder(aux_code.slots, dp))
                b_enc = b_enc + self._sums(aux_code.slots, dp)
            self._give("b_enc", b_enc)
        self.losses |= {f"inner_mse_loss_{width}": loss for width, loss in zip(ends, losses[:-1])}
        metrics = {"topk_threshold": self._move_threshold(code)} if self.kind == "batchtopk" else {}
        fired = code.a != 0
        counts = torch.bincount(code.slots.indices[fired], minlength=self.n_features).to(torch.float32)
        acts = lambda: as_asked(sae, latents)  # noqa: E731
        return self._result(_adam.Feature(total(W_enc)), total(W_dec), b_enc, b_dec, outs[-1], acts, counts, metrics)

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

    def _decode(self, slots: Any) -> Tensor:
        return DECODE(slots.values.to(self.low), slots.indices, slots.crow, self.W_dec, None, backend=self.backend)

    def _code(self) -> _Code:
        sae, preferred = self.sae, preference(None)
        if self.kind == "gated":
            gates = sae.b_gate, sae.r_mag, sae.b_mag
            values, col, crow = ENCODE_GATED(self.sae_in, self.W, *gates, None, None, backend=preferred)
            values = values.to(sae.W_enc.dtype)
            return _Code(Slots(values, col, crow, ~values.isnan()), values)
        if self.kind == "relu":
            slots = self._above_zero(self.b)
            return _Code(slots, slots.values)
        if self.kind == "jumprelu":
            rule = sae.threshold.detach(), float(sae.bandwidth)
            values, col, crow, flags = ENCODE_THRESHOLD(self.sae_in, self.W, self.b, None, None, None, None, *rule, backend=preferred)
            values = values.to(sae.W_enc.dtype)
            return _Code(Slots(values, col, crow, (flags & 1).bool(), flags), values)
        if self.kind in ("topk", "abstopk"):
            rule = sae.activation_fn.k, not self.absolute, self.absolute
            values, indices = ENCODE_TOPK(self.sae_in, self.W, self.b, None, self.scale, None, None, *rule, backend=preferred)
            return _Code(Slots(values, indices, None, values == values if self.absolute else values > 0), self._unscaled(values, indices))
        k = float(sae.activation_fn.k)
        values, col, crow, min_kept = ENCODE_BATCH_TOPK(self.sae_in, self.W, self.b, None, self.scale, None, None, k, backend=preferred)
        return _Code(Slots(values, col, crow, values > 0, min_kept=min_kept), self._unscaled(values, col))

    def _above_zero(self, b: Tensor) -> Slots:
        zero = self.x.new_zeros(())
        values, col, crow, _ = ENCODE_THRESHOLD(self.sae_in, self.W, b, None, None, None, None, zero, None, backend=preference(None))
        values = values.to(self.sae.W_enc.dtype)
        return Slots(values, col, crow, ~values.isnan())

    def _unscaled(self, values: Tensor, indices: Tensor) -> Tensor:
        return values if self.scale is None else (values * (1 / self.scale)[indices]).to(values.dtype)

    def _latents(self, code: _Code) -> Latents:
        slots, values = code.slots, code.slots.values.to(self.sae.W_enc.dtype)
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
        slots = Slots(values, indices, None, values == values)
        difference = self._decode(slots._replace(values=a)) - residual
        weight = sae.cfg.aux_loss_coefficient * share
        loss = weight * difference.square().sum(-1).mean()
        return loss, (_Code(slots, a), (difference * (2 * weight / self.x.shape[0])).to(self.low))

    def _l1(self, code: _Code, da: Tensor, W_dec: list[Gradient]) -> tuple[list[Gradient], Tensor, float]:
        """The rest of the step of a ReLU: gradient for W_enc, of its products, and what else b_dec gets."""
        self.losses["l1_loss"], slope = self._penalty(code.slots, self.coefficients["l1"], None, W_dec)
        dp = torch.where(code.slots.passes, da + slope, 0)
        pulled = self._sums(code.slots, dp)
        self._give("b_enc", pulled)
        return [self._encoder(code.slots, dp)], pulled, 0.0

    def _gate(self, code: _Code, da: Tensor, W_dec: list[Gradient]) -> tuple[list[Gradient], Tensor, Tensor]:
        """Of a gated SAE: L1 and a reconstruction of their own train the gates."""
        sae, slots = self.sae, code.slots
        gate, stretch = self._above_zero(sae.b_gate), sae.r_mag.exp()
        self.losses["l1_loss"], slope = self._penalty(gate, self.coefficients["l1"], None, W_dec)
        difference = self._decode(gate) + sae.b_dec - self.x
        self.losses["auxiliary_reconstruction_loss"] = difference.square().sum(-1).mean()
        G = difference * (2 / self.x.shape[0])
        W_dec.append(RowGradient(gate.values, gate.indices, gate.crow, G, self.n_features))
        dgate = DECODE_DVALUES(G.to(self.low), gate.indices, gate.crow, self.W_dec, backend=self.backend)
        dgate, dmagnitude = torch.where(gate.passes, dgate + slope, 0), torch.where(slots.passes, da, 0)
        sums = self._sums(gate, dgate), self._sums(slots, dmagnitude)
        stretched = dmagnitude * (slots.values - sae.b_mag[slots.indices])
        for name, gradient in (("b_gate", sums[0]), ("b_mag", sums[1]), ("r_mag", self._sums(slots, stretched))):
            self._give(name, gradient)
        through = self._encoder(slots, dmagnitude * stretch[slots.indices])
        return [through, self._encoder(gate, dgate)], sums[0] + sums[1] * stretch, G.sum(0)

    def _jump(self, code: _Code, da: Tensor, W_dec: list[Gradient], pre_act: bool) -> tuple[list[Gradient], Tensor]:
        """Of a JumpReLU: straight-through inside the band, for the thresholds and, as an option, the scores."""
        sae, slots, crow, flags = self.sae, code.slots, code.slots.crow, code.slots.flags
        assert flags is not None and crow is not None
        if sae.cfg.jumprelu_sparsity_loss_mode == "tanh":
            self.losses["l0_loss"], slope = self._penalty(slots, self.coefficients["l0"], sae.cfg.jumprelu_tanh_scale, W_dec)
            da, dl0 = da + slope, da.new_zeros(self.x.shape[0])
        else:
            before = torch.cat([crow.new_zeros(1), (flags & 1).long().cumsum(0)])
            self.losses["l0_loss"], dl0 = self._l0(before[crow].diff().to(code.a.dtype))
        theta = sae.threshold.detach().to(da.dtype)
        estimate = torch.where((flags & 2).bool(), (theta[slots.indices] * da + dl0[slots.row_of()]) / sae.bandwidth, 0)
        dp = torch.where(slots.passes, da, 0)
        dp = dp + estimate if sae.cfg.jumprelu_ste_to_input else dp
        W_enc: list[Gradient] = [self._encoder(slots, dp)]
        pulled, dtheta = self._sums(slots, dp), -self._sums(slots, estimate)
        if pre_act and (which := self.dead.nonzero().flatten()).numel():
            dz, factor = self._pre_act(self._product(self.sae_in, self.W[which].T) + self.b[which], theta[which], which)
            W_enc.append(RowGradient(dz, which.expand_as(dz), None, self.sae_in.to(dz.dtype), self.n_features))
            W_dec.append(self._shrink(torch.zeros_like(self.norm).index_copy_(0, which, factor)))
            pulled, dtheta = pulled.index_add(0, which, dz.sum(0)), dtheta.index_add(0, which, -dz.sum(0))
        elif pre_act:
            self.losses["pre_act_loss"] = da.new_tensor(0.0)
        self._give("b_enc", pulled)
        self._give("threshold", dtheta)
        return W_enc, pulled

    @functools.cached_property
    def norm(self) -> Tensor:
        return self.sae.W_dec.norm(dim=1)

    def _shrink(self, factor: Tensor) -> Gradient:
        """Of W_dec, from ``factor [F]`` of its norms: rows of its own, as slots."""
        which = factor.nonzero()
        return RowGradient(quotient(factor, self.norm)[which], which, None, self.sae.W_dec.detach()[which.flatten()], self.n_features)

    def _penalty(self, slots: Slots, weight: float, steepness: float | None, W_dec: list[Gradient]) -> tuple[Tensor, Tensor]:
        """Mean over rows of ``weight * sum of value |W_dec[f]|``, or of ``tanh(steepness * ..)``, and its gradient for the values."""
        norm = self.norm[slots.indices]
        size, slope = _steep(slots.values * norm, weight / self.x.shape[0], steepness)
        W_dec.append(self._shrink(self._sums(slots, slope * slots.values)))
        return size.sum(), slope * norm

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

    def _encoder(self, slots: Slots, dp: Tensor) -> RowGradient:
        return RowGradient(dp, slots.indices, slots.crow, self.sae_in.to(dp.dtype), self.n_features)

    def _sums(self, slots: Slots, per_slot: Tensor) -> Tensor:
        return feature_sums(per_slot, slots.indices, slots.crow, self.n_features, self.backend)

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
            size, slope = _steep(acts * self.norm, self.coefficients["l0"] / self.x.shape[0], cfg.jumprelu_tanh_scale)
            self.losses["l0_loss"], factor = size.sum(), (slope * acts).sum(0)
            da = da.addcmul_(slope, self.norm)
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

    def _move_threshold(self, code: _Code) -> Tensor:
        sae, least = self.sae, code.slots.min_kept
        assert least is not None
        if bool(torch.isfinite(least)):
            lr = sae.cfg.topk_threshold_lr
            sae.topk_threshold = (1 - lr) * sae.topk_threshold + lr * least.to(sae.topk_threshold.dtype)
        return sae.topk_threshold


def _steep(sizes: Tensor, weight: float, steepness: float | None) -> tuple[Tensor, Tensor]:
    """``weight * sizes``, or ``weight * tanh(steepness * sizes)``, and its slope."""
    if steepness is None:
        return weight * sizes, torch.full_like(sizes, weight)
    sizes = torch.tanh(steepness * sizes)
    return weight * sizes, (1 - sizes.square()).mul_(weight * steepness)


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
