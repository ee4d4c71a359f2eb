"""What the adapters do alike with latents: dense tensors from slots and back, which of the two is faster, errors against a target."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastsae.dispatch import batching
from fastsae.latents import Latents, RaggedLatents, TopKLatents
from fastsae.sae import tiles
from fastsae.sae.losses import Weights, squares
from fastsae.sae.reconstruction import Reconstruction

PRODUCT = 1 / 20
"""Share of latents from which on torch's product of dense latents and decoder is faster than the slots' (float32, AVX-512, one thread)."""


def to_dense(latents: Latents) -> Tensor:
    """``[.., F]``; features are unique in a row, so that nothing has to be added."""
    if isinstance(latents, TopKLatents):
        out = latents.values.new_zeros(*latents.batch_shape, latents.n_features)
        return out.scatter_(-1, latents.indices, latents.values)
    row, feature, values, rows = latents._coordinates()  # pyright: ignore[reportPrivateUsage]  # also of padded latents
    out = latents.values.new_zeros(rows * latents.n_features)
    return out.scatter_(0, row * latents.n_features + feature, values).reshape(*latents.batch_shape, latents.n_features)


def from_dense(acts: Tensor) -> RaggedLatents | None:
    """The slots of dense latents; None where a sample of rows says that more than 1/20 are not 0, and under vmap."""
    flat = acts.reshape(-1, acts.shape[-1])
    sample = flat[:: max(1, flat.shape[0] // 32)]
    if flat.shape[0] == 0 or batching() or int(torch.count_nonzero(sample)) > PRODUCT * sample.numel():
        return None
    return ragged(acts)


def ragged(acts: Tensor) -> RaggedLatents:
    """The slots of dense latents, differentiable."""
    flat = acts.reshape(-1, acts.shape[-1])
    row, col = torch.nonzero(flat, as_tuple=True)
    crow = torch.searchsorted(row, torch.arange(flat.shape[0] + 1, device=flat.device))
    return RaggedLatents(flat[row, col], crow, col, flat.shape[1], acts.shape[:-1])


def many_fire(x: Tensor, weights: Callable[[], Weights]) -> bool:
    """Whether latents are better formed by torch's product: a sample of them says that more than 1/8 fire."""
    if x.numel() == 0:
        return False
    if torch.compiler.is_compiling() or batching():  # no looking at numbers then
        return True
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return tiles.measured_density(x.reshape(-1, x.shape[-1]), weights()) > tiles.DENSITY


def reconstruction(x_hat: Tensor, latents: Latents, target: Tensor | None, of_item: tuple[int, ...] = (-1,)) -> Reconstruction:
    """With the squared error, summed over the dimensions ``of_item``; without a target there is none."""
    if target is None:
        return Reconstruction(x_hat, latents, None)  # pyright: ignore[reportArgumentType]
    if target.shape != x_hat.shape:
        raise ValueError(f"reconstruct: target must have shape {list(x_hat.shape)}, got {list(target.shape)}")
    return Reconstruction(x_hat, latents, squares(x_hat, target).sum(of_item))
