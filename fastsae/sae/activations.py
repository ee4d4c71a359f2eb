"""What an SAE keeps of a row of scores; arguments of ``reconstruct`` and ``SAE``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from torch import Tensor

from fastsae._core import checks
from fastsae.latents import Latents, RaggedLatents, TopKLatents

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    L = TypeVar("L", bound=Latents, default=Latents, covariant=True)
else:
    from typing import TypeVar

    L = TypeVar("L")  # Python's own knows no default before 3.13


class Kind(Generic[L]):
    """An activation, by the latents that it leaves."""

    absolute: ClassVar[bool] = False
    """Whether it selects by magnitude."""


@dataclass(frozen=True)
class TopK(Kind[TopKLatents]):
    """The k largest scores of each row, clamped at 0 with ``relu``; see ``encode_topk``."""

    k: int
    relu: bool = True


@dataclass(frozen=True)
class AbsTopK(TopK):
    """The k scores of largest magnitude of each row, with their signs; see ``encode_topk``. A latent fires where it is not 0.

    The AuxK of an SAE with it selects among the dead features by magnitude, too, and needs ``AuxK(relu=False)``.

    Source: "AbsTopK: Rethinking Sparse Autoencoders For Bidirectional Features" (arXiv 2510.00404).
    """

    relu: bool = field(default=False, init=False, repr=False)
    absolute: ClassVar[bool] = True


@dataclass(frozen=True)
class BatchTopK(Kind[RaggedLatents]):
    """The ``int(k * rows)`` largest positive scores of the batch; see ``encode_batch_topk``.

    An SAE in evaluation mode keeps the scores above its running threshold, to which each training batch brings its smallest kept score at
    ``rate`` (the first one in full; before it, every positive score is kept).
    """

    k: float
    rate: float = 0.01


@dataclass(frozen=True)
class JumpReLU(Kind[RaggedLatents]):
    """Scores above a threshold; see ``encode_threshold``. In an SAE the threshold is learnt and this one is where it starts."""

    threshold: float | Tensor = 0.001
    bandwidth: float | None = None


@dataclass(frozen=True)
class ReLU(Kind[RaggedLatents]):
    """Positive scores: ``encode_threshold`` with threshold 0."""


@dataclass(frozen=True)
class Gated(Kind[RaggedLatents]):
    """A gate of its own for every feature; see ``encode_gated``. In an SAE the three vectors are its parameters."""

    b_gate: Tensor | None = None
    r_mag: Tensor | None = None
    b_mag: Tensor | None = None


Activation = TopK | BatchTopK | JumpReLU | ReLU | Gated


def checked(activation: Any, d_sae: int) -> Activation:
    """An activation that fits an SAE of ``d_sae`` features, its numbers Python's; TypeError or ValueError otherwise."""
    if not isinstance(activation, (TopK, BatchTopK, JumpReLU, ReLU, Gated)):
        raise TypeError(f"SAE: activation must be TopK, AbsTopK, BatchTopK, JumpReLU, ReLU or Gated, got {type(activation).__name__}")
    if isinstance(activation, TopK):
        checks.flag("SAE", "activation.relu", activation.relu)
    for name in ("k", "rate", "threshold", "bandwidth"):
        value = getattr(activation, name, None)
        if not hasattr(activation, name) or (name == "bandwidth" and value is None) or (name == "threshold" and isinstance(value, Tensor)):
            continue
        if name == "k" and isinstance(activation, TopK):
            number = checks.integer("SAE", "activation.k", value, 1, d_sae, f"d_sae={d_sae}")
        else:
            number = checks.number("SAE", f"activation.{name}", value, positive=name != "threshold")
        activation = activation if number is value else replace(activation, **{name: number})
    for name in ("threshold", "b_gate", "r_mag", "b_mag"):
        value = getattr(activation, name, None)
        if isinstance(value, Tensor) or (value is not None and name != "threshold"):
            checks.tensor("SAE", f"activation.{name}", value)
            if value.dim():
                checks.shape("SAE", f"activation.{name}", value, (d_sae,), f"[d_sae={d_sae}] or []")
    return activation


def with_k(activation: Activation, k: float, d_sae: int) -> Activation:
    """The same with another k, rounded for TopK and AbsTopK; AttributeError for one that has none."""
    if not isinstance(activation, (TopK, BatchTopK)):
        raise AttributeError(f"SAE: {type(activation).__name__} has no k")
    if isinstance(activation, TopK) and isinstance(k := checks.plain(k), float):
        k = round(checks.number("SAE", "activation.k", k))
    changed: Any = {"k": k}  # of TopK an int, of BatchTopK any number
    return checked(replace(activation, **changed), d_sae)
