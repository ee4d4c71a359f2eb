"""Encode and decode in one call: what splicing an SAE into a model, loss recovered and error terms need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, NamedTuple

import torch
from torch import Tensor

from fastsae._core import checks
from fastsae.latents import Latents
from fastsae.ops.decode import decode
from fastsae.ops.encode import encode_batch_topk, encode_gated, encode_threshold, encode_topk
from fastsae.packed import PackedWeights
from fastsae.reference import accumulator
from fastsae.sae.activations import Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK

_ROWS = 4096
"""Most rows encoded and decoded back to back where nothing has to be kept for a backward pass."""
_SCORES = 1 << 23
"""Most scores of those rows where any number of them can be kept: at initialisation ReLU keeps half."""


if TYPE_CHECKING:
    from typing_extensions import TypeVar

    Kept = TypeVar("Kept", bound=Latents | None, default=Latents | None, covariant=True)

    class Reconstruction(NamedTuple, Generic[Kept]):
        x_hat: Tensor
        latents: Kept
        squared_error: Tensor

else:  # torch's pytrees and compiler know a named tuple by its only base

    class Reconstruction(NamedTuple):
        """``x_hat [.., D_out]``, the latents (None where not asked for), and ``squared_error [..]`` in float32 (float64)."""

        x_hat: Tensor
        latents: Latents | None
        squared_error: Tensor


def encode(x: Tensor, W_enc: Tensor | PackedWeights, b_enc: Tensor | None, activation: Activation, **options: Any) -> Latents:
    """Latents of ``x`` under any activation; the straight-through ``l0`` of JumpReLU is left out."""
    if isinstance(activation, TopK):
        return encode_topk(x, W_enc, b_enc, k=activation.k, relu=activation.relu, absolute=activation.absolute, **options)
    if isinstance(activation, BatchTopK):
        return encode_batch_topk(x, W_enc, b_enc, k=activation.k, **options)[0]
    if isinstance(activation, ReLU):
        return encode_threshold(x, W_enc, b_enc, **options)
    if isinstance(activation, JumpReLU):
        if activation.bandwidth is None:
            return encode_threshold(x, W_enc, b_enc, threshold=activation.threshold, **options)
        return encode_threshold(x, W_enc, b_enc, threshold=activation.threshold, bandwidth=activation.bandwidth, **options)[0]
    checks.instance("reconstruct", "activation", activation, Gated, "TopK, AbsTopK, BatchTopK, JumpReLU, ReLU or Gated")
    if b_enc is not None:
        raise ValueError("reconstruct: a Gated activation has its own biases, b_enc must be None")
    if options.pop("scale", None) is not None:
        raise ValueError("reconstruct: scale does not go with a Gated activation (use r_mag)")
    gates = {name: getattr(activation, name) for name in ("b_gate", "r_mag", "b_mag")}
    return encode_gated(x, W_enc, **gates, **options)


def reconstruct(
    x: Tensor,
    W_enc: Tensor,
    W_dec: Tensor,
    b_enc: Tensor | None = None,
    b_dec: Tensor | None = None,
    *,
    activation: Activation,
    b_pre: Tensor | None = None,
    scale: Tensor | None = None,
    target: Tensor | None = None,
    skip: Tensor | None = None,
    return_latents: bool = True,
    backend: str | None = None,
) -> Reconstruction:
    """Encodes and decodes: ``x_hat = decode(encode(x))`` with the squared error of each row.

    Args:
        x: ``[.., D]``. W_enc: ``[F, D]``. W_dec: ``[F, D_out]``. b_enc, b_pre, scale: as in ``encode_topk``. b_dec, skip: as in ``decode``.
        activation: ``TopK``, ``AbsTopK``, ``BatchTopK``, ``JumpReLU``, ``ReLU`` or ``Gated``.
        target: ``[.., D_out]`` to compare with; default ``x`` (a transcoder must give its own).
        return_latents: False frees them: without gradients, rows are then handled in tiles and no more than one tile's latents exist
            (not for BatchTopK, whose selection spans the batch).
        backend: see ``fastsae.use_backend``.

    Returns:
        ``Reconstruction(x_hat, latents, squared_error)``; the error is ``sum((x_hat - target)^2)`` over the last dimension in float32
        (float64 stays). Gradients flow through all of it. Raises as the encoders and ``decode`` do.
    """
    op = "reconstruct"
    checks.tensor(op, "x", x)
    checks.tensor(op, "W_dec", W_dec, like=x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have shape [.., D], got []")
    checks.shape(op, "W_dec", W_dec, (None, None), "[F, D_out]")
    if target is None and W_dec.shape[1] != x.shape[-1]:
        raise ValueError(f"{op}: W_dec must have shape [F, D={x.shape[-1]}] like x, or give target; got {list(W_dec.shape)}")
    comparable = checks.FLOATS if checks.autocasting(x.device) else checks.beside(x)
    target = x if target is None else checks.tensor(op, "target", target, comparable, x)
    checks.flag(op, "return_latents", return_latents)
    if target.shape != (*x.shape[:-1], W_dec.shape[-1]):
        raise ValueError(f"{op}: target must have shape {[*x.shape[:-1], W_dec.shape[-1]]}, got {list(target.shape)}")

    def run(x: Tensor, target: Tensor) -> tuple[Tensor, Latents, Tensor]:
        latents = encode(x, W_enc, b_enc, activation, b_pre=b_pre, scale=scale, backend=backend)
        x_hat = decode(latents, W_dec, b_dec, x=x if skip is not None else None, skip=skip, backend=backend)
        wide = accumulator(x_hat.dtype)
        return x_hat, latents, (x_hat.to(wide) - target.to(wide)).square().sum(-1)

    tensors = [x, W_enc, W_dec, b_enc, b_dec, b_pre, scale, skip]
    tracks = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)
    if return_latents or tracks or isinstance(activation, BatchTopK) or x.dim() < 2:
        x_hat, latents, error = run(x, target)
        return Reconstruction(x_hat, latents if return_latents else None, error)
    flat, flat_target = x.flatten(0, -2), target.flatten(0, -2)
    step = _ROWS if isinstance(activation, TopK) else max(16, min(_ROWS, _SCORES // max(W_dec.shape[0], 1)))
    parts = [run(flat[i : i + step], flat_target[i : i + step]) for i in range(0, max(flat.shape[0], 1), step)]
    x_hat, error = torch.cat([part[0] for part in parts]), torch.cat([part[2] for part in parts])
    return Reconstruction(x_hat.reshape(*x.shape[:-1], W_dec.shape[1]), None, error.reshape(x.shape[:-1]))
