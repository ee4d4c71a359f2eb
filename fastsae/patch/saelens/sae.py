"""SAELens's SAEs and transcoders: latents by the fused encoders, reconstructions from slots; see ``saelens``."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastsae._core import checks
from fastsae.dispatch import preference
from fastsae.latents import Latents, RaggedLatents, TopKLatents
from fastsae.ops.decode import decode
from fastsae.ops.pursuit import Rule, pursuit_latents
from fastsae.packed import PackedWeights
from fastsae.patch._adapter import any_global_hook, changed, class_name, library_way, need_slots, tampered, warn_once
from fastsae.patch._slots import PRODUCT, from_dense, many_fire, ragged, reconstruction, to_dense
from fastsae.reference import accumulator
from fastsae.sae.activations import AbsTopK, Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from fastsae.sae.losses import Weights, features, unranked
from fastsae.sae.reconstruction import Reconstruction
from fastsae.sae.reconstruction import encode as encode_by

BEFORE = ("hook_sae_acts_pre",)
"""Hook points at dense pre-activations: a hook there makes encoding dense."""
LATENTS = (*BEFORE, "hook_sae_acts_post")
"""And at dense latents: a hook at any of them makes ``forward`` form the latents."""


METHODS = ("encode", "decode", "forward", "forward_with_activations", "get_activation_fn")


@dataclass(frozen=True)
class Kind:
    activation: str
    """relu, jumprelu, gated, topk, abstopk, batchtopk or pursuit."""
    training: bool = False
    transcoder: bool = False
    skip: bool = False


KINDS = {
    "standard_sae.StandardSAE": Kind("relu"),
    "gated_sae.GatedSAE": Kind("gated"),
    "jumprelu_sae.JumpReLUSAE": Kind("jumprelu"),
    "topk_sae.TopKSAE": Kind("topk"),
    "abstopk_sae.AbsTopKSAE": Kind("abstopk"),
    "matching_pursuit_sae.MatchingPursuitSAE": Kind("pursuit"),
    "transcoder.Transcoder": Kind("relu", transcoder=True),
    "transcoder.SkipTranscoder": Kind("relu", transcoder=True, skip=True),
    "transcoder.JumpReLUTranscoder": Kind("jumprelu", transcoder=True),
    "transcoder.JumpReLUSkipTranscoder": Kind("jumprelu", transcoder=True, skip=True),
    "standard_sae.StandardTrainingSAE": Kind("relu", training=True),
    "gated_sae.GatedTrainingSAE": Kind("gated", training=True),
    "jumprelu_sae.JumpReLUTrainingSAE": Kind("jumprelu", training=True),
    "topk_sae.TopKTrainingSAE": Kind("topk", training=True),
    "abstopk_sae.AbsTopKTrainingSAE": Kind("abstopk", training=True),
    "matching_pursuit_sae.MatchingPursuitTrainingSAE": Kind("pursuit", training=True),
    "batchtopk_sae.BatchTopKTrainingSAE": Kind("batchtopk", training=True),
    "matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE": Kind("batchtopk", training=True),
}
"""By module below ``sae_lens.saes`` and class."""
_ACTIVATIONS = {
    "topk": ("sae_lens.saes.topk_sae", "TopK"),
    "abstopk": ("sae_lens.saes.abstopk_sae", "AbsTopK"),
    "batchtopk": ("sae_lens.saes.batchtopk_sae", "BatchTopK"),
}
"""Module and class; of other kinds it is ``nn.ReLU``."""
_SELECTS = {"topk": TopK, "abstopk": AbsTopK, "batchtopk": BatchTopK}


def _path(sae: Any) -> str:
    return class_name(sae).removeprefix("sae_lens.saes.")


def is_known(sae: Any) -> bool:
    return _path(sae) in KINDS


def kind_of(sae: Any) -> Kind:
    return KINDS[_path(sae)]


def hooked(sae: Any, names: tuple[str, ...]) -> list[str]:
    """Those of the hook points that have hooks."""
    if any_global_hook():
        return list(names)
    return [name for name in names if tampered(getattr(sae, name))]


def why_dense(sae: Any, names: tuple[str, ...] = BEFORE) -> str | None:
    """Why latents cannot be had without dense pre-activations, or None."""
    if (reason := changed(sae, *METHODS)) is not None:
        return reason
    if points := hooked(sae, names):
        return f"{points[0]} has a hook, which needs dense numbers"
    kind = kind_of(sae)
    if kind.activation == "pursuit" and checks.autocasting(sae.W_dec.device):
        return "autocast rounds the scores of a pursuit and not what they are subtracted from"
    if (reason := other_activation(sae)) is not None:
        return reason
    if len({p.dtype for name, p in sae._parameters.items() if p is not None and name != "threshold"}) > 1:
        return "its parameters have several dtypes"
    if kind.training and kind.activation == "jumprelu":
        if sae.cfg.jumprelu_ste_to_input and torch.is_grad_enabled():
            return "jumprelu_ste_to_input sends gradients to dense pre-activations"
        if not torch.compiler.is_compiling() and bool((sae.threshold < 0).any()):
            return "a threshold is below 0, where the library keeps negative latents"
    return None


def other_activation(sae: Any) -> str | None:
    """Why ``activation_fn`` is not the one of its kind as it was, or None."""
    kind, function = kind_of(sae), sae.activation_fn
    if kind.training and kind.activation == "jumprelu":  # which does not call it
        return None
    module, name = _ACTIVATIONS.get(kind.activation, ("torch.nn", "ReLU"))
    if type(function) is not getattr(sys.modules[module], name):
        return f"activation_fn is {type(function).__name__}, not {name}"
    return "activation_fn has a hook or a forward of its own" if tampered(function) else None


def scale_of(sae: Any) -> Tensor | None:
    """Norms of the decoder's rows where pre-activations are multiplied by them."""
    return sae.W_dec.norm(dim=-1) if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else None


def activation(sae: Any) -> Activation:
    """What this library calls it; thresholds and gates are those of the SAE."""
    kind = kind_of(sae)
    if kind.activation in _SELECTS:
        return _SELECTS[kind.activation](sae.activation_fn.k)
    if kind.activation == "relu":
        return ReLU()
    if kind.activation == "gated":  # the gate is a step: the library's autograd gives b_gate no gradient either
        return Gated(sae.b_gate.detach(), sae.r_mag, sae.b_mag)
    if not kind.training:
        return JumpReLU(sae.threshold.detach().to(accumulator(sae.W_enc.dtype)))
    learns = torch.is_grad_enabled() and sae.threshold.requires_grad
    return JumpReLU(sae.threshold.to(sae.W_enc.dtype), float(sae.bandwidth) if learns else None)


def ends(sae: Any) -> list[int]:
    """Where its Matryoshka levels end."""
    return [*getattr(sae.cfg, "matryoshka_widths", ())[:-1], sae.W_dec.shape[0]]


def weights(sae: Any) -> Weights:
    """What a step of any SAE but a matching pursuit computes with."""
    kind = kind_of(sae).activation
    threshold = sae.threshold if kind == "jumprelu" else sae.W_enc.new_zeros(()) if kind == "relu" else None
    gates = (sae.b_gate, sae.r_mag, sae.b_mag) if kind == "gated" else (None, None, None)
    b_enc = None if kind == "gated" else sae.b_enc
    return Weights(sae.W_enc.T, sae.W_dec, sae.b_dec, b_enc, None, None, threshold, *gates, None, ends(sae), rank=scale_of(sae))


def sparse(sae: Any, sae_in: Tensor, packed: PackedWeights | None = None) -> Latents:
    """Latents of what ``process_sae_in`` returned; ``packed``: a handle of ``W_enc.T``."""
    kind, W = kind_of(sae), sae.W_enc.T
    if packed is not None:
        if packed.weight.shape != W.shape or packed.weight.data_ptr() != W.data_ptr() or packed.weight.stride() != W.stride():
            raise ValueError(f"encode: packed must be fastsae.pack(sae.W_enc.T) of this {type(sae).__name__}, got {packed}")
        W = packed
    if kind.activation == "pursuit":
        cfg = sae.cfg
        steps = cfg.d_in if cfg.max_iterations is None else cfg.max_iterations
        rule = Rule(steps, cfg.residual_threshold, stop_on_repeat=cfg.stop_on_duplicate_support)
        slots = pursuit_latents(sae_in.reshape(-1, sae_in.shape[-1]), sae.W_dec, packed, rule, preference(None))
        latents = RaggedLatents(*slots, sae.W_dec.shape[0], sae_in.shape[:-1])
    else:
        scale, b_enc = scale_of(sae), None if kind.activation == "gated" else sae.b_enc
        b_enc = b_enc if scale is None or b_enc is None else b_enc * scale
        latents = encode_by(sae_in, W, b_enc, activation(sae), scale=scale)
    if checks.autocasting(sae_in.device):  # a bias in float32 makes the library's latents float32
        latents = replace(latents, values=latents.values.to(sae.W_enc.dtype))
    return latents


def is_dense(sae: Any, sae_in: Tensor) -> bool:
    """Whether latents are better formed by torch's product: more than 1/8 fire."""
    return kind_of(sae).activation in ("relu", "jumprelu", "gated") and many_fire(sae_in, lambda: weights(sae))


def dense_latents(sae: Any, sae_in: Tensor) -> Tensor:
    """Latents by torch's product, the formulas of the library's own ``encode``."""
    kind = kind_of(sae)
    if kind.activation == "gated":
        gate = (sae_in @ sae.W_enc + sae.b_gate > 0).to(sae.dtype)
        return gate * sae.activation_fn(sae_in @ (sae.W_enc * sae.r_mag.exp()) + sae.b_mag)
    hidden = sae_in @ sae.W_enc + sae.b_enc
    if kind.activation == "relu":
        return sae.activation_fn(hidden)
    if kind.training:
        function = sys.modules["sae_lens.saes.jumprelu_sae"].JumpReLU
        return function.apply(hidden, sae.threshold.to(hidden.dtype), sae.bandwidth, sae.cfg.jumprelu_ste_to_input)
    acts = sae.activation_fn(hidden)
    return acts * (hidden > sae.threshold).to(acts.dtype)


def as_asked(sae: Any, latents: Latents) -> Tensor:
    """What ``encode`` returns: dense, or with ``use_sparse_activations`` a COO tensor of the slots."""
    if not getattr(sae.activation_fn, "use_sparse_activations", False):
        return to_dense(latents)
    assert isinstance(latents, TopKLatents)
    shape, k = latents.batch_shape, latents.values.shape[-1]
    row = torch.arange(shape.numel(), device=latents.values.device).repeat_interleave(k)
    where = torch.stack([*torch.unravel_index(row, shape), latents.indices.flatten()])
    return torch.sparse_coo_tensor(
        where, latents.values.flatten(), (*shape, latents.n_features), check_invariants=False, device=where.device
    )


def share(sae: Any, latents: Latents) -> float:
    """How many of all latents there are."""
    if kind_of(sae).activation in _ACTIVATIONS:
        return sae.activation_fn.k / latents.n_features
    return latents.values.numel() / max(math.prod(latents.batch_shape) * latents.n_features, 1)


def product(sae: Any, latents: Latents) -> Tensor:
    """Latents times decoder, plus its bias."""
    latents = replace(latents, values=unranked(latents.values, features(latents), scale_of(sae)))
    y = decode(latents, sae.W_dec)
    return y + sae.b_dec if kind_of(sae).activation != "pursuit" or sae.cfg.apply_b_dec_to_input else y


def decoder(sae: Any) -> Tensor:
    """``Adapter.decoder``."""
    if (norm := sae.cfg.normalize_activations) in ("layer_norm", "constant_norm_rescale"):
        raise ValueError(f"normalize_activations {norm!r} makes what a latent adds depend on the row")
    scale = scale_of(sae)
    return sae.W_dec if scale is None else sae.W_dec / scale.unsqueeze(1)


def finish(sae: Any, y: Tensor) -> Tensor:
    """What comes after the product in the library's ``decode``: hook, normalisation undone, heads."""
    y = sae.hook_sae_recons(y)
    return y if kind_of(sae).transcoder else sae.reshape_fn_out(sae.run_time_activation_norm_fn_out(y), sae.d_head)


def encode(sae: Any, x: Tensor, packed: PackedWeights | None = None) -> Latents:
    """``fastsae.encode``."""
    if (reason := why_dense(sae, ())) is not None:
        if packed is not None:
            need_slots(sae, reason)
        warn_once(sae, reason, 4)
        return own_encode(sae, x)
    return sparse(sae, sae.process_sae_in(x), packed)


def own_encode(sae: Any, x: Tensor) -> Latents:
    """The slots of what the SAE's own ``encode`` returns, whatever it does."""
    acts = sae.encode(x)
    return ragged(acts if acts.layout is torch.strided else acts.to_dense())


def reconstruct(sae: Any, x: Tensor, target: Tensor | None) -> Reconstruction:
    """``fastsae.reconstruct``."""
    if why_dense(sae, ()) is not None:
        return own_reconstruct(sae, x, target)
    kind = kind_of(sae)
    latents = encode(sae, x)
    x_hat = finish(sae, product(sae, latents))
    if kind.skip:
        x_hat = x_hat + x @ sae.W_skip.T
    return _compared(sae, x_hat, latents, x, target, kind.transcoder)


def own_reconstruct(sae: Any, x: Tensor, target: Tensor | None) -> Reconstruction:
    """What the SAE's own ``encode`` and ``forward`` return."""
    return _compared(sae, sae(x), own_encode(sae, x), x, target, getattr(sae.cfg, "d_out", sae.cfg.d_in) != sae.cfg.d_in)


def _compared(sae: Any, x_hat: Tensor, latents: Latents, x: Tensor, target: Tensor | None, transcoder: bool) -> Reconstruction:
    target = x if target is None and not transcoder else target
    return reconstruction(x_hat, latents, target, (-2, -1) if sae.hook_z_reshaping_mode else (-1,))


class SAEMethods:
    """``encode``, ``decode`` and ``forward`` of every SAE; the library's own are below it."""

    def encode(self: Any, x: Tensor) -> Tensor:
        if library_way(self, why_dense(self)):
            return super().encode(x)  # pyright: ignore[reportAttributeAccessIssue]
        sae_in = self.process_sae_in(x)
        acts = dense_latents(self, sae_in) if is_dense(self, sae_in) else as_asked(self, sparse(self, sae_in))
        return acts if kind_of(self).activation == "pursuit" else self.hook_sae_acts_post(acts)  # which the library's does not call

    def decode(self: Any, feature_acts: Tensor) -> Tensor:
        # A gradient for dense latents is dense, zeros included.
        plain = feature_acts.layout is not torch.strided or (torch.is_grad_enabled() and feature_acts.requires_grad)
        plain = library_way(self, changed(self, *METHODS)) or plain
        latents = None if plain or torch.compiler.is_compiling() or feature_acts.dtype != self.W_dec.dtype else from_dense(feature_acts)
        if latents is None:
            return super().decode(feature_acts)  # pyright: ignore[reportAttributeAccessIssue]
        return finish(self, product(self, latents))

    def forward(self: Any, x: Tensor) -> Tensor:
        if library_way(self, why_dense(self, LATENTS)):
            return super().forward(x)  # pyright: ignore[reportAttributeAccessIssue]
        out = _autoencoded(self, x)[0]
        if self.use_error_term:
            with torch.no_grad(), sys.modules["sae_lens.saes.sae"]._disable_hooks(self):
                clean = _autoencoded(self, x)[0]
            out = out + self.hook_sae_error(x - clean)
        return self.hook_sae_output(out)


class PursuitMethods(SAEMethods):
    """Of the training SAE, whose forward pass they are in too."""

    def encode_with_hidden_pre(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        if library_way(self, why_dense(self)):
            return super().encode_with_hidden_pre(x)  # pyright: ignore[reportAttributeAccessIssue]
        acts = self.encode(x)
        return acts, torch.zeros_like(acts)


class TranscoderMethods(SAEMethods):
    """The same, and ``forward_with_activations``; a transcoder's input is what its own ``process_sae_in`` says."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if library_way(self, why_dense(self, LATENTS)):
            return super(SAEMethods, self).forward(x)  # pyright: ignore[reportAttributeAccessIssue]
        return _skipped(self, _autoencoded(self, x)[0], x)

    def forward_with_activations(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        if library_way(self, why_dense(self, LATENTS)):
            return super().forward_with_activations(x)  # pyright: ignore[reportAttributeAccessIssue]
        out, latents = _autoencoded(self, x)
        acts = latents if isinstance(latents, Tensor) else to_dense(latents)
        return _skipped(self, out, x), acts


def _skipped(sae: Any, y: Tensor, x: Tensor) -> Tensor:
    return y + x @ sae.W_skip.T.to(x.device) if kind_of(sae).skip else y


def _autoencoded(sae: Any, x: Tensor) -> tuple[Tensor, Latents | Tensor]:
    """Reconstruction and latents; dense ones where many fire."""
    sae_in = sae.process_sae_in(x)
    if is_dense(sae, sae_in):
        acts = dense_latents(sae, sae_in)
        return super(SAEMethods, sae).decode(acts), acts  # pyright: ignore[reportAttributeAccessIssue]
    latents = sparse(sae, sae_in)
    if share(sae, latents) > PRODUCT:
        acts = to_dense(latents)
        return super(SAEMethods, sae).decode(acts), acts  # pyright: ignore[reportAttributeAccessIssue]
    return finish(sae, product(sae, latents)), latents


def now(sae: Any) -> Iterator[tuple[str, str]]:
    """What takes the library's own way as the SAE stands, and why."""
    if why := why_dense(sae, BEFORE):
        yield "encode", why
    if why := why_dense(sae, LATENTS):
        yield "forward", why
