"""The loss through autograd: ``SAE.loss``. ``step`` has the same numbers and the gradients by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsae.gradients import densify
from fastsae.ops.decode import decode
from fastsae.ops.encode import encode_threshold, encode_topk
from fastsae.reference import accumulator
from fastsae.sae import tiles
from fastsae.sae.activations import Gated
from fastsae.sae.inputs import Inputs
from fastsae.sae.losses import (
    AuxK,
    DeadOnes,
    Loss,
    Pass,
    aux_denominator,
    combine,
    features,
    fired,
    part_norms,
    quotient,
    squares,
)
from fastsae.sae.step import step


def loss(inputs: Inputs) -> Loss:
    if inputs.terms.jump is not None:
        if torch.is_grad_enabled() and (inputs.x.requires_grad or inputs.target.requires_grad):
            raise ValueError("SAE.loss: x and target must not require gradients with jump, got some that do: detach them")
        return Loss(*_ByHand.apply(inputs, *inputs.parameters.values()))  # pyright: ignore[reportArgumentType] # what its forward returns
    run = inputs.restored(forward(inputs))
    dead = inputs.observe(run)
    term = None if inputs.terms.aux is None else aux_term(inputs, run.x_hats[-1], dead, inputs.terms.aux)
    return combine(run, inputs.target, inputs.terms, inputs.objective, term)


class _ByHand(torch.autograd.Function):
    """The loss with the gradients of ``step``."""

    @staticmethod
    def forward(ctx: Any, inputs: Inputs, *parameters: Tensor) -> tuple[Tensor, ...]:
        metrics, gradients = step(inputs)
        needed = zip(ctx.needs_input_grad[1:], gradients.values(), strict=True)
        ctx.save_for_backward(*(densify(gradient) if asked else None for asked, gradient in needed))
        ctx.mark_non_differentiable(metrics.fvu, metrics.l0)
        return metrics[:3]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *(None if gradient is None else (grad * gradient).to(gradient.dtype) for gradient in ctx.saved_tensors)


def forward(inputs: Inputs) -> Pass:
    """The pass over latents, or over tiles."""
    if inputs.dense:
        with inputs.autocast_off:
            run = tiles.forward(*inputs.cast, bool(inputs.terms.l1))
        return run if inputs.terms.l0 else run._replace(counted=None)
    x, w, terms = inputs.x, inputs.weights, inputs.terms
    latents, counted, min_kept = inputs.encode(x)
    penalised, frozen = latents, None
    if isinstance(inputs.activation, Gated):
        penalised = encode_threshold(x, w.W_enc, w.b_gate, b_pre=w.b_pre)
        frozen = decode(penalised, w.W_dec.detach(), w.b_dec.detach())
    magnitude = None
    if terms.l1:
        norms = part_norms(w.W_dec, w.layers).sum(1).to(w.W_dec.dtype)
        feature = features(penalised)
        # Of the two gathers, the one whose backward adds in a fixed order on this device.
        weights = norms[feature] if norms.is_cuda else norms.index_select(0, feature.flatten()).view_as(feature)
        magnitude = (penalised.values.abs() * weights).sum()
    values = latents.values.detach()
    return Pass(
        decode(latents, w.W_dec, w.b_dec, x=None if w.skip is None else x, skip=w.skip, prefixes=w.prefixes),
        frozen,
        magnitude,
        counted.sum() if counted is not None and terms.l0 else None,
        (values != 0).sum(),
        fired(features(latents), values, w.W_enc.shape[0]),
        min_kept,
    )


def aux_term(inputs: Inputs, x_hat: Tensor, dead: Tensor, aux: AuxK) -> Tensor | None:
    """The AuxK term before its coefficient. Waits for the dead features, see ``DeadOnes``."""
    x, w, absolute = inputs.x, inputs.weights, inputs.activation.absolute
    ones = DeadOnes.of(aux, x.shape[1], dead, w, absolute)
    if ones.k == 0 or x.shape[0] == 0:
        return None
    b, b_pre, scale = ones.ranking
    latents = encode_topk(x, w.W_enc, b, k=ones.k, b_pre=b_pre, scale=scale, features=ones.features, relu=aux.relu, absolute=absolute)
    latents = replace(latents, values=ones.kept(latents.values, latents.indices, w.rank)[0])
    e_hat = decode(latents, w.W_dec, w.b_dec if aux.bias else None)
    wide = accumulator(x_hat.dtype)
    residual = (inputs.target.to(wide) - x_hat.to(wide)).detach()
    return ones.share.to(wide) * quotient(squares(e_hat.to(wide), residual).sum(), aux_denominator(aux, residual, inputs.target))
