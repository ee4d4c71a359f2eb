"""What an SAE keeps of a row of scores; arguments of ``reconstruct`` and ``SAE``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TopK:
    """The k largest scores of each row, clamped at 0 with ``relu``; see ``encode_topk``."""

    k: int
    relu: bool = True


@dataclass(frozen=True)
class BatchTopK:
    """The ``int(k * rows)`` largest positive scores of the batch; see ``encode_batch_topk``.

    An SAE in evaluation mode keeps the scores above its running threshold, to which each training batch brings its smallest kept score at
    ``rate`` (the first one in full; before it, every positive score is kept).
    """

    k: float
    rate: float = 0.01


@dataclass(frozen=True)
class JumpReLU:
    """Scores above a threshold; see ``encode_threshold``. In an SAE the threshold is learnt and this one is where it starts."""

    threshold: float | Tensor = 0.001
    bandwidth: float | None = None


@dataclass(frozen=True)
class ReLU:
    """Positive scores: ``encode_threshold`` with threshold 0."""


@dataclass(frozen=True)
class Gated:
    """A gate of its own for every feature; see ``encode_gated``. In an SAE the three vectors are its parameters."""

    b_gate: Tensor | None = None
    r_mag: Tensor | None = None
    b_mag: Tensor | None = None


Activation = TopK | BatchTopK | JumpReLU | ReLU | Gated
