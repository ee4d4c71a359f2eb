"""Model diffing by a crosscoder: which of its features belong to one layer (or model) alone, and which to all.

They take a crosscoder's ``decoders [F, L, D]``; L of two models is 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae._core import checks
from fastsae.dispatch import preference, then_any
from fastsae.latents import Latents, RaggedLatents, TopKLatents
from fastsae.ops.decode import DECODE_DVALUES
from fastsae.ops.score_gradients import feature_sums


def _norms(op: str, decoders: Tensor) -> Tensor:
    checks.tensor(op, "decoders", decoders)
    if decoders.dim() != 3 or decoders.shape[1] < 2:
        raise ValueError(f"{op}: decoders must have shape [F, L, D] with L at least 2, got {list(decoders.shape)}")
    return torch.linalg.vector_norm(decoders.detach(), dim=2, dtype=torch.promote_types(decoders.dtype, torch.float32))


def relative_norms(decoders: Tensor) -> Tensor:
    """``[F, L]``, in float32 (float64 stays): each layer's share of a feature's decoder norms, ``|W[f, l]| / sum over l of |W[f, l]|``;
    1 / L everywhere for a feature without a decoder.

    Source: Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing". TypeError, ValueError: no ``[F, L, D]``
    with L at least 2.
    """
    norms = _norms("relative_norms", decoders)
    whole = norms.sum(1, keepdim=True)
    return torch.where(whole == 0, 1 / norms.shape[1], norms / whole)


def exclusive(decoders: Tensor, layer: int, *, least: float = 0.9) -> Tensor:
    """``[F]`` bool: the features of which ``layer`` has a share of at least ``least`` (a float in (1 / L, 1]), see ``relative_norms``.

    Errors: as ``relative_norms``; ValueError: a layer or share out of range.
    """
    share, L = relative_norms(decoders), decoders.shape[1]
    layer = checks.integer("exclusive", "layer", layer, 0, L - 1, f"L - 1 = {L - 1}")
    if not 1 / L < (least := checks.number("exclusive", "least", least)) <= 1:
        raise ValueError(f"exclusive: least must be in (1 / L = {1 / L:g}, 1], got {least}")
    return share[:, layer] >= least


def shared(decoders: Tensor, *, within: float = 0.1) -> Tensor:
    """``[F]`` bool: the features with a decoder whose shares are all within ``within`` of 1 / L, see ``relative_norms``.

    Errors: as ``relative_norms``; ValueError: ``within`` not above 0.
    """
    within = checks.number("shared", "within", within)
    share = relative_norms(decoders)
    return ((share - 1 / share.shape[1]).abs() <= within).all(1) & (_norms("shared", decoders) > 0).any(1)


def layer_cosines(decoders: Tensor) -> Tensor:
    """``[F, L, L]``: cosines between the decoder rows that a feature has in the layers, 0 with a row of zeros. Errors: as
    ``relative_norms``."""
    norms = _norms("layer_cosines", decoders)
    rows = decoders.detach().to(norms.dtype) / torch.where(norms == 0, 1, norms).unsqueeze(2)
    return rows @ rows.transpose(1, 2)


def latent_scaling(latents: Latents, decoder: Tensor, y: Tensor) -> Tensor:
    """``[F]``: the factor beta by which each feature alone explains ``y`` best, ``argmin sum over rows |beta z[f] W[f] - y|^2``; 0 where it
    never fires.

    Of ``y`` the errors of one model's reconstruction, or its reconstruction, without the feature, the ratio of two models' factors tells a
    feature that is truly exclusive (near 0) from one that the other model has too (Minder et al. 2025, arXiv 2504.02922).

    Args:
        latents: ``[.., F]`` of the crosscoder. decoder: ``[F, D]``, the rows of the model that has the feature, ``decoders[:, l]``.
        y: ``[.., D]``, what is to be explained.

    Raises: TypeError, ValueError: shapes, dtypes or devices that do not fit.
    """
    op = "latent_scaling"
    checks.instance(op, "latents", latents, (TopKLatents, RaggedLatents), "latents")
    checks.tensor(op, "decoder", decoder)
    checks.shape(op, "decoder", decoder, (latents.n_features, None), f"[F={latents.n_features}, D]")
    checks.tensor(op, "y", y, (decoder.dtype,), decoder)
    want = (*latents.batch_shape, decoder.shape[1])
    checks.shape(op, "y", y, want, str(list(want)))
    (values, indices, crow), backend = latents.slots, then_any(preference(None))
    values, decoder, rows = values.detach(), decoder.detach(), y.detach().reshape(-1, decoder.shape[1])
    along = DECODE_DVALUES(rows, indices, crow, decoder, backend=backend)
    wide = torch.promote_types(values.dtype, torch.float32)
    above, below = (
        feature_sums(t, indices, crow, latents.n_features, backend) for t in (along.to(wide) * values, values.to(wide).square())
    )
    below = below * decoder.to(wide).square().sum(1)
    return torch.where(below == 0, 0, above / torch.where(below == 0, 1, below))
