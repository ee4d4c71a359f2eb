"""What the gradients of slots' scores give the inputs of an encoder: the backward of every encoder, and of the steps by hand.

With ``s`` the gradient of the scores ``b + scale * <x - b_pre, W[feature]>`` of the slots,

    dx = decode(s * scale, W)              dW = decode_dweight(s * scale, x - b_pre)      db = per-feature sums of s
    d b_pre = -sum over rows of dx         d scale = per-feature sums of s * <x - b_pre, W[feature]>
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.latents import Slots, pointers
from fastsae.ops.decode import decode_slots, value_gradient, weight_gradient
from fastsae.reference import accumulator, centre


def feature_sums(per_slot: Tensor, indices: Tensor, crow: Tensor | None, n_features: int, backend: str | None) -> Tensor:
    """``[F]``: sums over the slots of each feature, deterministic, in the accumulation dtype."""
    rows = indices.shape[0] if crow is None else crow.shape[0] - 1
    per_slot = per_slot.to(accumulator(per_slot.dtype))
    like = torch.empty((n_features, 1), dtype=per_slot.dtype, device=per_slot.device)
    return weight_gradient(per_slot, indices, crow, like.new_ones(()).expand(rows, 1), like, backend)[:, 0]


def by_features(dx_asked: bool, n_features: int, slots: int) -> bool:
    """Whether the gradient of ``b_pre`` comes from sums by feature: ``dx`` is not asked for, and forming it would read more rows of W."""
    return not dx_asked and not torch.compiler.is_compiling() and n_features < slots  # a compiler may not know the number of slots


def pre_bias_gradient(sums: Tensor, W: Tensor, b_pre: Tensor, backend: str | None) -> Tensor:
    """``[D]``: what ``b_pre`` gets from the sums ``[F]`` of the scores' gradients."""
    every = torch.arange(W.shape[0], device=W.device)
    return -decode_slots(sums.to(W.dtype).unsqueeze(0), every.unsqueeze(0), None, W, None, backend)[0].to(b_pre.dtype)


def score_gradients(
    dscore: Tensor,
    indices: Tensor,
    crow: Tensor | None,
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    b_pre: Tensor | None,
    scale: Tensor | None,
    needs: tuple[bool, bool, bool, bool, bool],
    backend: str | None,
    padded: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients for (x, W, b, b_pre, scale) from the gradient of the slots' scores; ``padded``: slots from ``crow[-1]`` on are empty."""
    dx = dW = db = db_pre = dscale = None
    rows = x.shape[0]
    if padded:
        assert crow is not None
        dscore, crow = (
            torch.where(torch.arange(indices.shape[0], device=indices.device) < crow[-1], dscore, 0),
            pointers(crow, indices.shape[0]),
        )
    through = dscore if scale is None else (dscore * scale[indices.long()]).to(dscore.dtype)
    sums = None  # of dscore, by feature
    if scale is None and needs[2]:
        sums = feature_sums(dscore, indices, crow, W.shape[0], backend)
    if needs[3] and b_pre is not None and by_features(needs[0], W.shape[0], indices.numel()):
        of = sums if sums is not None else feature_sums(through, indices, crow, W.shape[0], backend)
        db_pre = pre_bias_gradient(of, W, b_pre, backend)
    elif needs[0] or needs[3]:
        dx = decode_slots(through, indices, crow, W, None, backend)[:rows]
        if needs[3] and b_pre is not None:
            db_pre = -dx.sum(0, dtype=accumulator(dx.dtype)).to(b_pre.dtype)
    if needs[1] or needs[4]:
        xc = centre(x, b_pre).to(x.dtype) if b_pre is not None else x
        if padded and crow is not None:
            xc = torch.nn.functional.pad(xc, (0, 0, 0, crow.shape[0] - 1 - rows))
        if needs[1]:
            dW = weight_gradient(through, indices, crow, xc, W, backend)
        if needs[4] and scale is not None:
            product = value_gradient(xc, indices, crow, W, backend)
            wide = accumulator(dscore.dtype)
            dscale = feature_sums(dscore.to(wide) * product.to(wide), indices, crow, W.shape[0], backend).to(scale.dtype)
    if needs[2] and b is not None:
        db = (feature_sums(dscore, indices, crow, W.shape[0], backend) if sums is None else sums).to(b.dtype)
    return (dx if needs[0] else None), dW, db, db_pre, dscale


def band_gradient(dvalues: Slots, dl0: Tensor | float, flags: Tensor, threshold: Tensor, bandwidth: float, padded: bool = False) -> Tensor:
    """``-(threshold * dvalue + dl0) / bandwidth`` of the slots in it: what each gives its threshold, straight-through, in the accumulation
    dtype; 0 of the others.

    Args:
        dvalues: gradients of the values, where the slots are. flags: 2 in the band.
        dl0: the gradient of each row's number of active latents, or one for all.
        threshold: ``[]`` or ``[F]``. padded: as in ``score_gradients``.
    """
    grad, indices, crow = dvalues
    wide = accumulator(grad.dtype)
    theta = threshold.to(wide)
    theta = theta[indices.long()] if theta.dim() else theta
    if padded and crow is not None:  # the flags of empty slots are 0
        crow = pointers(crow, indices.shape[0])
    if isinstance(dl0, Tensor):
        dl0 = dl0.to(wide)
        if padded and crow is not None:
            dl0 = torch.nn.functional.pad(dl0, (0, crow.shape[0] - 1 - dl0.shape[0]))
        dl0 = dl0[Slots(grad, indices, crow).row_of()]
    return torch.where((flags & 2).bool(), -(theta * grad.to(wide) + dl0) / bandwidth, 0)
