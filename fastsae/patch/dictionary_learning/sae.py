"""dictionary_learning's dictionaries: latents by the fused encoders, reconstructions from slots; see ``dictionary_learning``."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastsae._core import checks
from fastsae.latents import Latents
from fastsae.ops.decode import decode
from fastsae.ops.encode import encode_batch_topk, encode_gated, encode_threshold, encode_topk
from fastsae.patch._adapter import any_global_hook, changed, class_name, library_way, need_slots, tampered
from fastsae.patch._slots import from_dense, many_fire, reconstruction, to_dense
from fastsae.reference import accumulator
from fastsae.sae.losses import Weights
from fastsae.sae.reconstruction import Reconstruction


@dataclass(frozen=True)
class Kind:
    activation: str
    """relu, gated, jumprelu, topk or batchtopk."""
    linear: bool = True
    """encoder.weight [F, D] and decoder.weight [D, F] (nn.Linear), or W_enc [D, F] and W_dec [F, D]."""
    bias: str | None = "b_dec"
    """Name of the decoder's bias; None: the decoder's own."""
    centres: bool = True
    """The encoder subtracts it."""


KINDS = {
    "dictionary.AutoEncoder": Kind("relu", bias="bias"),
    "dictionary.AutoEncoderNew": Kind("relu", bias=None, centres=False),
    "dictionary.GatedAutoEncoder": Kind("gated", bias="decoder_bias"),
    "dictionary.JumpReluAutoEncoder": Kind("jumprelu", linear=False),
    "trainers.top_k.AutoEncoderTopK": Kind("topk"),
    "trainers.batch_top_k.BatchTopKSAE": Kind("batchtopk"),
    "trainers.matryoshka_batch_top_k.MatryoshkaBatchTopKSAE": Kind("batchtopk", linear=False),
}
"""By module below ``dictionary_learning`` and class."""


def _path(ae: Any) -> str:
    return class_name(ae).removeprefix("dictionary_learning.")


def is_known(ae: Any) -> bool:
    return _path(ae) in KINDS


def kind_of(ae: Any) -> Kind:
    return KINDS[_path(ae)]


def encoder(ae: Any) -> Tensor:
    """``[F, D]``."""
    return ae.encoder.weight if kind_of(ae).linear else ae.W_enc.T


def encoder_bias(ae: Any) -> Tensor:
    return ae.encoder.bias if kind_of(ae).linear else ae.b_enc


def decoder(ae: Any) -> Tensor:
    """``[F, D]``."""
    return ae.decoder.weight.T if kind_of(ae).linear else ae.W_dec


def decoder_bias(ae: Any) -> Tensor:
    name = kind_of(ae).bias
    return ae.decoder.bias if name is None else getattr(ae, name)


def centres(ae: Any) -> bool:
    return ae.apply_b_dec_to_input if kind_of(ae).activation == "jumprelu" else kind_of(ae).centres


def centred(ae: Any, x: Tensor) -> Tensor:
    return x - decoder_bias(ae) if centres(ae) else x


def why_dense(ae: Any) -> str | None:
    """Why the library's own methods have to run, or None."""
    if (reason := changed(ae, "encode", "decode", "forward")) is not None:
        return reason
    if any_global_hook():
        return "a global module hook"
    kind, parts = kind_of(ae), [ae]
    if kind.linear:
        for name in ("encoder", "decoder"):
            part = getattr(ae, name)
            if type(part) is not nn.Linear:
                return f"the {name} is {type(part).__name__}, not nn.Linear"
            if tampered(part):
                return f"the {name} has a hook or a forward of its own, which needs dense numbers"
            parts.append(part)
    if len({p.dtype for part in parts for name, p in part._parameters.items() if p is not None and name != "threshold"}) > 1:
        return "its parameters have several dtypes"
    if getattr(ae, "active_groups", None) is not None and ae.active_groups != len(ae.group_sizes):
        return f"only {ae.active_groups} of {len(ae.group_sizes)} groups are active"
    if kind.activation == "jumprelu" and torch.is_grad_enabled() and ae.threshold.grad_fn is not None:
        return "the threshold is computed"
    return None


def sparse(ae: Any, x: Tensor, use_threshold: bool) -> Latents:
    """The latents that ``encode`` returns, without its zeros. ``use_threshold`` counts for TopK and BatchTopK."""
    kind, W = kind_of(ae), encoder(ae)
    x = centred(ae, x)
    b = ae.mag_bias if kind.activation == "gated" else encoder_bias(ae)
    if kind.activation == "gated":
        # The gate is a step: the library's autograd gives gate_bias no gradient either.
        latents = encode_gated(x, W, b_gate=ae.gate_bias.detach(), r_mag=ae.r_mag, b_mag=b)
    elif kind.activation == "relu":
        latents = encode_threshold(x, W, b)
    elif kind.activation == "jumprelu" or use_threshold:
        latents = encode_threshold(x, W, b, threshold=threshold(ae))
    elif kind.activation == "topk":
        latents = encode_topk(x, W, b, k=int(ae.k))
    else:
        latents = encode_batch_topk(x, W, b, k=int(ae.k))[0]
    if checks.autocasting(x.device) and (kind.activation == "gated" or not kind.linear):  # a bias is added outside the product there
        latents = replace(latents, values=latents.values.to(torch.promote_types(latents.values.dtype, b.dtype)))
    return latents


def threshold(ae: Any) -> Tensor:
    """As the scores are compared with it: the library's is float32 also in a dictionary of float64."""
    W = encoder(ae)
    return ae.threshold.detach().to(device=W.device, dtype=accumulator(W.dtype))


def is_dense(ae: Any, x: Tensor, use_threshold: bool) -> bool:
    """Whether latents are better formed by torch's product: more than 1/8 fire."""
    kind = kind_of(ae)
    if kind.activation not in ("relu", "jumprelu", "gated") and not use_threshold:
        return False

    def weights() -> Weights:
        gated, b_dec = kind.activation == "gated", decoder_bias(ae)
        least = x.new_zeros(()) if kind.activation == "relu" else None if gated else threshold(ae)
        gates = (ae.gate_bias, ae.r_mag, ae.mag_bias) if gated else (None, None, None)
        b, pre = None if gated else encoder_bias(ae), b_dec if centres(ae) else None
        return Weights(encoder(ae), decoder(ae), b_dec, b, pre, None, least, *gates, None, [encoder(ae).shape[0]])

    return many_fire(x, weights)


def product(ae: Any, latents: Latents) -> Tensor:
    return decode(latents, decoder(ae)) + decoder_bias(ae)


def encode(ae: Any, x: Tensor) -> Latents:
    """``fastsae.encode``: what ``ae.encode(x)`` returns."""
    need_slots(ae, why_dense(ae))
    return sparse(ae, x, kind_of(ae).activation == "batchtopk")


def reconstruct(ae: Any, x: Tensor, target: Tensor | None) -> Reconstruction:
    """``fastsae.reconstruct``."""
    latents = encode(ae, x)
    return reconstruction(product(ae, latents), latents, x if target is None else target)


# The library's Dictionary begins with ABC: only a class that does too has its layout and can stand in its place.
class Methods(ABC):  # noqa: B024
    """``encode``, ``decode`` and ``forward`` of every dictionary; the library's own are below it.

    What returns more than latents and reconstruction (``return_topk``, ``return_active``, ``return_gate``, ``output_pre_jump``), asks for
    rescaled latents (``normalize_decoder``) or ghost gradients is the library's.
    """

    def encode(self: Any, x: Tensor, *args: Any, **options: Any) -> Any:
        use_threshold = kind_of(self).activation == "batchtopk"
        own = not args and set(options) <= {"use_threshold"} and not library_way(self, why_dense(self))
        if own and "use_threshold" in options:
            own, use_threshold = kind_of(self).activation in ("topk", "batchtopk"), bool(options["use_threshold"])
        if own and kind_of(self).activation == "batchtopk" and not use_threshold and x.dim() != 2:
            own = False  # k counts the first dimension there
        if not own or is_dense(self, x, use_threshold):
            return super().encode(x, *args, **options)  # pyright: ignore[reportAttributeAccessIssue]
        return to_dense(sparse(self, x, use_threshold))

    def decode(self: Any, f: Tensor, *args: Any, **options: Any) -> Tensor:
        # A gradient for dense latents is dense, zeros included.
        plain = bool(args or options) or f.layout is not torch.strided or (torch.is_grad_enabled() and f.requires_grad)
        plain = plain or torch.compiler.is_compiling() or torch.is_autocast_enabled(f.device.type) or f.dtype != decoder(self).dtype
        latents = None if plain or library_way(self, why_dense(self)) else from_dense(f)
        if latents is None:
            return super().decode(f, *args, **options)  # pyright: ignore[reportAttributeAccessIssue]
        return product(self, latents)

    def forward(self: Any, x: Tensor, output_features: bool = False, *args: Any, **options: Any) -> Any:
        by_threshold = kind_of(self).activation == "batchtopk"
        if (
            args
            or options
            or torch.is_autocast_enabled(x.device.type)
            or library_way(self, why_dense(self))
            or is_dense(self, x, by_threshold)
        ):
            return super().forward(x, output_features, *args, **options)  # pyright: ignore[reportAttributeAccessIssue]
        latents = sparse(self, x, by_threshold)
        x_hat = product(self, latents)
        if not output_features:
            return x_hat
        f = to_dense(latents)
        if _path(self) == "dictionary.AutoEncoderNew":
            f = f * self.decoder.weight.norm(dim=0, keepdim=True)
        return x_hat, f


def now(ae: Any) -> Iterator[tuple[str, str]]:
    """What takes the library's own way as the dictionary stands, and why."""
    if (why := why_dense(ae)) is not None:
        for method in ("encode", "decode", "forward"):
            yield method, why
