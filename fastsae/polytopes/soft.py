"""Soft codes: for smooth activations the probability, instead of the fact, that a neuron is in a region.

An activation that takes the best of several affine pieces is a vector quantiser; weighing the pieces by their probabilities makes it
smooth. With β between hard (1) and linear (0) a two-piece neuron has the probability ``σ(β z / (1 - β))``: β = 1/2 gives SiLU and the
sigmoid. GELU is ``z Φ(z)``, with the normal distribution in place of the logistic one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastsae._core import checks
from fastsae.polytopes.net import GATES, Activation, full_products
from fastsae.reference import accumulator

_KINDS = ("relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "quick_gelu", "sigmoid", "tanh", "softmax")


def _logistic(z: Tensor, beta: float) -> Tensor:
    """``σ(β z / (1 - β))``, at β = 1 the step with 0 at 0."""
    return (z > 0).to(z.dtype) if beta == 1 else torch.sigmoid(z * (beta / (1 - beta)))


def _beta(op: str, beta: Any) -> float | None:
    if beta is None:
        return None
    if not 0 <= checks.number(op, "beta", beta, positive=False) <= 1:
        raise ValueError(f"{op}: beta must be in [0, 1], got {beta}")
    return float(beta)


def _code(op: str, z: Tensor, kind: str, beta: float | None) -> Tensor:
    if beta is not None and kind in ("gelu", "gelu_tanh", "quick_gelu"):
        raise ValueError(f"{op}: beta goes with the activations that are vector quantisers, not with {kind}")
    if kind in ("relu", "leaky_relu"):
        return _logistic(z, 1.0 if beta is None else beta)
    if kind == "gelu":
        return 0.5 * torch.special.erfc(z * -math.sqrt(0.5))
    if kind == "gelu_tanh":
        return torch.sigmoid(math.sqrt(8 / math.pi) * (z + 0.044715 * z**3))  # (1 + tanh(y)) / 2 is σ(2 y)
    if kind == "quick_gelu":
        return torch.sigmoid(1.702 * z)
    half = 0.5 if beta is None else beta
    if kind == "tanh":
        return _logistic(2 * z, half)
    if kind == "softmax":
        if half == 1:
            best = z == z.amax(-1, keepdim=True)
            return (best & (best.cumsum(-1) == 1)).to(z.dtype)
        return torch.softmax(z * (half / (1 - half)), -1)
    return _logistic(z, half)


def soft_code(z: Tensor, kind: str = "gelu", beta: float | None = None) -> Tensor:
    """The probability that each neuron is on (its spline code's bit is 1), from its pre-activation.

    Args:
        z: ``[.., H]`` floating. kind: "gelu": ``Φ(z)``; "gelu_tanh": its approximation by tanh; "quick_gelu": ``σ(1.702 z)``; "silu" and
            "sigmoid": ``σ(z)``; "tanh": ``σ(2 z)``, the probability of +1 beside -1; "softmax": over the last dimension; "relu" and
            "leaky_relu": the hard code.
        beta: of a β-VQ in [0, 1], for the kinds that are one (not the GELUs): ``σ(β z / (1 - β))``, for tanh and softmax with their own
            logits. 1: the hard code (0 at z = 0; softmax: the largest, of equal ones the first). 1/2: the activation itself. 0: 1/2
            everywhere (softmax: 1 / H).

    Returns:
        ``[.., H]`` in the dtype of z, computed in float32 (float64 for float64); differentiable.

    Raises: TypeError: dtype. ValueError: kind or beta.

    Source: Balestriero & Baraniuk 2018 (arXiv 1810.09274); for GELU the probability in its definition, Hendrycks & Gimpel 2016 (arXiv
    1606.08415).
    """
    op = "soft_code"
    checks.tensor(op, "z", z)
    if kind not in _KINDS:
        raise ValueError(f"{op}: kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    beta = _beta(op, beta)
    if z.dim() == 0:
        raise ValueError(f"{op}: z must have shape [.., H], got []")
    return _code(op, z.to(accumulator(z.dtype)), kind, beta).to(z.dtype)


def unit_pieces(z: Tensor, act: Activation, beta: float | None) -> tuple[Tensor, Tensor]:
    """Slope and intercept of each neuron's average affine piece at pre-activations z."""
    beta = _beta("soft_affine_map", beta)
    q = _code("soft_affine_map", z, act.kind, beta)
    if act.kind in ("relu", "leaky_relu", *GATES):
        return act.slope + (1 - act.slope) * q, torch.zeros_like(q)
    return torch.zeros_like(q), 2 * q - 1 if act.kind == "tanh" else q


@full_products
def expected_hamming(p: Tensor, q: Tensor) -> Tensor:
    """Expected Hamming distance of all pairs of soft codes, their bits drawn independently.

    Args:
        p: ``[N, H]`` probabilities in [0, 1], floating. q: ``[M, H]`` of the same dtype.

    Returns:
        ``[N, M]``, ``Σp + Σq - 2 p·q`` in the dtype of p; of hard codes (0 and 1) the Hamming distance, exact in float32 up to 2^24
        neurons. A soft code is at a distance of ``2 Σ p (1 - p)`` from itself: two draws of it differ. One product. Differentiable. Sums in
        float32 (float64 for float64).

    Raises: TypeError: dtype or device. ValueError: shape; values outside [0, 1].
    """
    op = "expected_hamming"
    checks.tensor(op, "p", p)
    checks.tensor(op, "q", q, like=p)
    checks.same_dtype(op, "q", q, "p", p)
    checks.shape(op, "p", p, (None, None), "[N, H]")
    checks.shape(op, "q", q, (None, p.shape[1]), f"[M, H={p.shape[1]}]")
    for name, code in (("p", p), ("q", q)):
        if code.numel() and not bool(((code >= 0) & (code <= 1)).all()):
            raise ValueError(f"{op}: {name} must hold probabilities in [0, 1], got {float(code.min()):g} .. {float(code.max()):g}")
    wide = accumulator(p.dtype)
    a, b = p.to(wide), q.to(wide)
    return torch.addmm(a.sum(1, keepdim=True) + b.sum(1), a, b.T, alpha=-2).to(p.dtype)
