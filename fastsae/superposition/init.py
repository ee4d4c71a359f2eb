"""Starting points of dictionaries: ``[F, D]`` with unit rows, for any F and D, seeded; and which tokens to take of a sequence.

Where F exceeds what a scheme has (singular vectors, axes, components, points), its vectors are gone through again, each time with other
noise. Noise is relative: ``noise`` times a random direction is added to a unit vector, and the sum scaled back to norm 1 (0.1: about 6
degrees; 1: 45).

Orthogonal starts are those of Sharkey, Braun & Millidge 2022 and its replication; singular vectors, axes and components were proposed in
its discussion.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from fastsae._core import checks
from fastsae.sae.module import SAE
from fastsae.superposition.data import unit_features

S = TypeVar("S", bound=SAE)


def _start(op: str, n_features: Any, noise: Any, seed: Any) -> torch.Generator:
    n_features = checks.integer(op, "n_features", n_features, 1)
    if checks.number(op, "noise", noise, positive=False) < 0:
        raise ValueError(f"{op}: noise must be at least 0, got {noise}")
    return torch.Generator().manual_seed(checks.integer(op, "seed", seed, 0))


def _matrix(op: str, name: str, value: Any) -> Tensor:
    checks.tensor(op, name, value)
    if value.dim() != 2 or 0 in value.shape:
        raise ValueError(f"{op}: {name} must have shape [n, D] with rows and columns, got {list(value.shape)}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{op}: {name} must be finite")
    return value.detach().double()


def _filled(vectors: Tensor, n_features: int, noise: float, generator: torch.Generator, like: Tensor) -> Tensor:
    """``vectors`` over and over until there are n_features, noised and of norm 1; a row of norm 0 becomes a random direction."""
    rows = vectors[torch.arange(n_features, device=vectors.device) % vectors.shape[0]]
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-30)
    directions = unit_features(n_features, rows.shape[1], generator, torch.float64).to(rows.device)
    zero = torch.linalg.vector_norm(rows, dim=1, keepdim=True) < 0.5
    rows = torch.where(zero, directions, rows + noise * directions)
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return torch.where(norm < 1e-12, directions, rows / norm.clamp_min(1e-30)).to(like.dtype)


def random_directions(n_features: int, d: int, *, seed: int = 0) -> Tensor:
    """Uniform on the sphere; what ``SAE`` starts from."""
    _start("random_directions", n_features, 0.0, seed)
    return unit_features(n_features, d, torch.Generator().manual_seed(seed))


def orthogonal(n_features: int, d: int, *, seed: int = 0) -> Tensor:
    """Random orthonormal bases, one after the other: rows of each block of D are orthogonal, the last block is cut.

    (``nn.init.orthogonal_`` of a ``[F, D]`` matrix with F > D has orthogonal columns and rows of norm ``sqrt(D / F)`` on average; here all
    rows have norm 1, and whole blocks keep orthogonal columns.)
    """
    op = "orthogonal"
    generator = _start(op, n_features, 0.0, seed)
    d = checks.integer(op, "d", d, 1)
    blocks = []
    for start in range(0, n_features, d):
        Q, R = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64, device="cpu"))
        blocks.append((Q * R.diagonal().sign())[: n_features - start])  # Haar: the signs make it unique
    return torch.cat(blocks).float()


def noised_singular_vectors(weight: Tensor, n_features: int, *, noise: float = 0.1, seed: int = 0) -> Tensor:
    """Noisy copies of the left singular vectors of a layer's weight: the main axes in which its pre-activations vary.

    Args:
        weight: ``[D, D_in]`` of the layer (torch's ``Linear.weight``) whose outputs the dictionary is for. Vectors come in order of their
            singular values, largest first.
    """
    op = "noised_singular_vectors"
    generator = _start(op, n_features, noise, seed)
    U, _, _ = torch.linalg.svd(_matrix(op, "weight", weight), full_matrices=False)
    return _filled(U.T, n_features, noise, generator, weight)


def noised_unit_vectors(n_features: int, d: int, *, noise: float = 0.1, seed: int = 0) -> Tensor:
    """Noisy copies of the axes e_0, e_1, ..: for activations with a privileged basis (after an elementwise non-linearity)."""
    op = "noised_unit_vectors"
    generator = _start(op, n_features, noise, seed)
    d = checks.integer(op, "d", d, 1)
    rows = torch.eye(d, dtype=torch.float64, device="cpu")
    return _filled(rows, n_features, noise, generator, rows[:0].float())


def principal_components(x: Tensor, n_features: int, *, noise: float = 0.1, seed: int = 0) -> Tensor:
    """Noisy copies of the principal components of data, largest variance first: each component, then each negated, and again.

    Args:
        x: ``[n, D]`` activations; their mean is removed.
    """
    op = "principal_components"
    generator = _start(op, n_features, noise, seed)
    rows = _matrix(op, "x", x)
    rows = rows - rows.mean(0)
    _, vectors = torch.linalg.eigh(rows.T @ rows)
    components = vectors.T.flip(0)
    return _filled(torch.cat([components, -components]), n_features, noise, generator, x)


def data_points(x: Tensor, n_features: int, *, noise: float = 0.0, centre: bool = True, seed: int = 0) -> Tensor:
    """Directions of random samples, each taken once before any is taken again.

    Args:
        x: ``[n, D]`` activations. centre: remove their mean first.
    """
    op = "data_points"
    generator = _start(op, n_features, noise, seed)
    rows = _matrix(op, "x", x)
    if checks.flag(op, "centre", centre):
        rows = rows - rows.mean(0)
    return _filled(rows[torch.randperm(rows.shape[0], generator=generator, device="cpu").to(rows.device)], n_features, noise, generator, x)


@torch.no_grad()
def start_from(sae: S, rows: Tensor) -> S:
    """Sets an SAE's decoder, and its encoder to the same, to ``rows [F, D]``; returns the SAE.

    Raises: TypeError, ValueError: another dtype, device or shape, a transcoder to another dimension.
    """
    op = "start_from"
    checks.tensor(op, "rows", rows)
    checks.shape(op, "rows", rows, tuple(sae.W_dec.shape), f"[F={sae.d_sae}, D={sae.d_out}]")
    if sae.d_in != sae.d_out:
        raise ValueError(f"{op}: the encoder must have the decoder's shape, got d_in={sae.d_in} and d_out={sae.d_out}")
    sae.W_dec.copy_(rows)
    sae.W_enc.copy_(sae.W_dec)
    return sae


def token_positions(length: int, count: int = 6, *, skip: int = 100) -> Tensor:
    """``[count]`` int64: positions evenly spaced over ``skip .. length - 1``, both ends among them.

    Default: 6 tokens of a sequence, none of the first 100 (whose statistics differ), which is how the activations of the polytope lens
    (Black et al. 2022, arXiv 2211.12312) were sampled from sequences of 1024.

    Raises: ValueError: fewer than ``count`` positions from ``skip`` on.
    """
    op = "token_positions"
    count = checks.integer(op, "count", count, 1)
    skip = checks.integer(op, "skip", skip, 0)
    length = checks.integer(op, "length", length, skip + count, meaning=f"skip + count, {skip} + {count}")
    last = length - 1 - skip
    return torch.tensor([skip + (place * last) // max(count - 1, 1) for place in range(count)], device="cpu")


def sample_tokens(x: Tensor, count: int = 6, *, skip: int = 100) -> Tensor:
    """``[.., T, D]`` activations of sequences to those of ``token_positions(T, count, skip=skip)``: ``[.., count, D]``."""
    checks.tensor("sample_tokens", "x", x)
    if x.dim() < 2:
        raise ValueError(f"sample_tokens: x must have shape [.., T, D], got {list(x.shape)}")
    return x.index_select(-2, token_positions(x.shape[-2], count, skip=skip).to(x.device))
