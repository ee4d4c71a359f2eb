"""Terms of an SAE's loss, shared by the autograd path (``SAE.loss``) and the fused one (``SAE.step_gradients``).

    loss = mean over prefixes of error / unit  (+ a gated SAE's error of the reconstruction from its gate / unit)
         + l1 * sum |latent| ||W_dec row|| / tokens + l0 * number of latents / tokens + AuxK

with ``error = sum (target - x_hat)^2`` and ``unit`` the number of tokens ("mse") or ``sum (target - mean target)^2`` ("fvu"; where it is
0, so is the term). A spread such as the latter is 0 where it is no more than its own rounding, see ``spread``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastsae._core import checks, flags
from fastsae._core.world import ALONE, World
from fastsae.latents import Latents, TopKLatents
from fastsae.reference import accumulator


class Loss(NamedTuple):
    """``loss []`` to call ``backward`` on; ``fvu []`` and ``l0 []`` detached, of the tokens that count."""

    loss: Tensor
    fvu: Tensor
    l0: Tensor


class Metrics(NamedTuple):
    """Of one step, each a 0-d tensor that nothing has waited for: the loss with all its terms, FVU, latents a token, the number of dead
    features, and the AuxK term before its coefficient."""

    loss: Tensor
    fvu: Tensor
    l0: Tensor
    dead: Tensor
    aux: Tensor


@dataclass(frozen=True)
class AuxK:
    """Dead features reconstruct the error: ``coefficient * min(n_dead / k, 1) * ||e - e_hat||^2 / denominator``, ``e`` the error detached.

    ``e_hat`` decodes the ``min(k, n_dead)`` largest scores among the dead features of each row. Gradients reach encoder and decoder.

    Attributes:
        k: latents of ``e_hat``; None: half the input dimension.
        coefficient: weight in the loss.
        relu: clamp those scores at 0. With ``AbsTopK``, where they are those of largest magnitude, it must be False.
        bias: ``e_hat`` includes ``b_dec``, which ``x_hat`` has already.
        denominator: "residual", ``sum (e - mean e)^2``; "total", ``sum (x - mean x)^2``; or "tokens", their number. Where it is 0 (a single
            token, rows that are equal up to rounding: see ``losses.spread``) so is the term.
        share: the factor ``min(n_dead / k, 1)``.

    Source: Gao et al. 2024 (arXiv 2406.04093). ``dictionary_learning()``, ``saelens()`` and ``sparsify()`` are each library's term and its
    gradients, for unit decoder rows, with two exceptions: sparsify's encoder ignores the gradient of its dense scores and gets none from
    the term, and dictionary_learning's term of a single token is the largest float32 (without a gradient), not 0.
    """

    k: int | None = None
    coefficient: float = 1 / 32
    relu: bool = True
    bias: bool = False
    denominator: Literal["residual", "total", "tokens"] = "residual"
    share: bool = True

    def __post_init__(self) -> None:
        if self.k is not None:
            object.__setattr__(self, "k", checks.integer("AuxK", "k", self.k, 1))
        object.__setattr__(self, "coefficient", checks.number("AuxK", "coefficient", self.coefficient))
        checks.flag("AuxK", "relu", self.relu)
        checks.flag("AuxK", "bias", self.bias)
        checks.flag("AuxK", "share", self.share)
        if self.denominator not in ("residual", "total", "tokens"):
            raise ValueError(f"AuxK: denominator must be 'residual', 'total' or 'tokens', got {self.denominator!r}")

    @classmethod
    def dictionary_learning(cls, k: int | None = None, coefficient: float = 1 / 32) -> AuxK:
        return cls(k, coefficient, share=False)

    @classmethod
    def saelens(cls, k: int | None = None, coefficient: float = 1.0) -> AuxK:
        return cls(k, coefficient, relu=False, denominator="tokens")

    @classmethod
    def sparsify(cls, k: int | None = None, coefficient: float = 1 / 32) -> AuxK:
        return cls(k, coefficient, denominator="total")


@dataclass(frozen=True)
class JumpLoss:
    """What the published ways to train a JumpReLU add to the plain one, whose ``l0`` weighs the number of latents and reaches thresholds
    alone. Needs ``JumpReLU`` with a bandwidth; with ``z`` the scores, ``f`` the latents, ``n`` the decoder's row norms:

    Attributes:
        target: ``l0`` weighs ``(L0 / target - 1)^2`` in place of ``L0``.
        of_batch: ``L0`` is the batch's mean, not each token's.
        tanh: ``l1`` weighs ``sum tanh(tanh * f n)`` in place of ``sum f n``.
        pre_acts: weight of a further term, ``sum max(max(threshold, 0) - z, 0) n`` a token, over the dead features or all of them.
        all_features: all of them; the term then takes as long as a dense encoder.
        to_scores: scores in the band get the negative of what thresholds get from them, and so do encoder and biases.

    Sources: Rajamanoharan et al. 2024 (arXiv 2407.14435, appendix F) for ``target``, a token's; "Circuits Updates, January 2025"
    (Anthropic) for the last four: ``JumpLoss(tanh=4.0, pre_acts=3e-6, all_features=True, to_scores=True)`` with ``l1``. SAELens:
    "quadratic" has ``l0 = 2 * target * l0_coefficient``; ``jumprelu_ste_to_input`` is ``to_scores``; its pre-activation loss is of dead
    features. dictionary_learning: ``of_batch``, but that it looks for the band among latents, where scores below it are not.
    """

    target: float | None = None
    of_batch: bool = False
    tanh: float | None = None
    pre_acts: float = 0.0
    all_features: bool = False
    to_scores: bool = False

    def __post_init__(self) -> None:
        for name in ("target", "tanh", "pre_acts"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, checks.number("JumpLoss", name, value, positive=name != "pre_acts"))
        for name in ("of_batch", "all_features", "to_scores"):
            checks.flag("JumpLoss", name, getattr(self, name))


AuxOption = AuxK | Literal[False] | None
"""Of one loss: False for none, None for the module's own."""


class Terms(NamedTuple):
    """The checked options of one loss."""

    l1: float
    l0: float
    aux: AuxK | None
    jump: JumpLoss | None


class Pass(NamedTuple):
    """What the loss needs of one forward pass.

    x_hats: ``[P, B, D_out]``, a reconstruction a prefix. frozen: ``[B, D_out]``, a gated SAE's reconstruction from its gate. magnitude:
    ``[]``, the penalised sum, None without l1. counted: ``[]``, differentiable number of latents, None without l0. active: ``[]``, the
    number of latents. fired: ``[F]`` bool. min_kept: ``[]``, BatchTopK's smallest score.
    """

    x_hats: Tensor
    frozen: Tensor | None
    magnitude: Tensor | None
    counted: Tensor | None
    active: Tensor
    fired: Tensor
    min_kept: Tensor | None = None


def squares(a: Tensor, b: Tensor) -> Tensor:
    """``(a - b)^2`` in the accumulation dtype."""
    wide = accumulator(a.dtype)
    return ((a if a.dtype is wide else a.to(wide)) - (b if b.dtype is wide else b.to(wide))).square()


NOISE = 8
"""Roundings in a mean, see ``spread``: of equal numbers torch's means are off by up to 2.5 (CPU, up to 65,536 rows)."""


def spread(x: Tensor, world: World = ALONE) -> tuple[Tensor, Tensor]:
    """``sum (x - mean x)^2`` over rows and columns, 0 without rows; and the rounding noise in it, ``(NOISE eps)^2 rows sum (mean x)^2``.

    A spread up to that noise is 0: rows that do not differ leave the rounding error of their mean, a few eps of it in every element, and
    what is divided by that says nothing. (A column whose standard deviation is below 1e-6 of its mean counts as constant in float32.)
    """
    wide = x.to(accumulator(x.dtype))
    if not x.shape[0]:
        return wide.new_zeros(()), wide.new_zeros(())
    mean, limits = world.row_mean(wide), torch.finfo(wide.dtype)
    noise = world.sum((mean * (NOISE * limits.eps)).square()).mul(x.shape[0]).clamp_max(limits.max)  # an infinite spread stays one
    sums = world.sum((wide - mean).square())
    return torch.where(sums <= noise, 0, sums), noise


def ratio(a: Tensor, b: Tensor, noise: Tensor) -> Tensor:
    """``a / b`` with 0/0 = 0, where ``a`` up to ``noise`` is 0 as well."""
    return torch.where((b == 0) & (a <= noise), 0, a / b)


def layer_fvu(x_hat: Tensor, x: Tensor) -> Tensor:
    """``[L]``: of ``[.., L, D]`` each layer's fraction of variance unexplained over all rows, 0/0 = 0."""
    x = x.reshape(-1, *x.shape[-2:])
    error = squares(x_hat.reshape(x.shape), x).sum((0, 2))
    return torch.stack([ratio(error[number], *spread(x[:, number])) for number in range(x.shape[1])])


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, 0 where ``b`` is, also in the gradient: the slope of a norm, an AuxK term of a single token."""
    return torch.where(b == 0, 0, a / torch.where(b == 0, 1.0, b))  # a NaN stays one


def features(latents: Latents) -> Tensor:
    """Feature of each slot, in the shape of the values."""
    return (latents.indices if isinstance(latents, TopKLatents) else latents.col).long()


def fired(feature: Tensor, values: Tensor, n_features: int) -> Tensor:
    """``[F]``: which features have a slot that is not 0; without waiting for the device."""
    hit = torch.zeros(n_features + 1, dtype=torch.bool, device=values.device)
    return hit.scatter_(0, torch.where(values != 0, feature, n_features).flatten(), True)[:n_features]


def aux_denominator(aux: AuxK, residual: Tensor, target: Tensor, world: World = ALONE) -> Tensor:
    if aux.denominator == "tokens":
        return residual.new_full((), max(residual.shape[0], 1))
    return spread(residual if aux.denominator == "residual" else target, world)[0]


def combine(
    run: Pass,
    target: Tensor,
    terms: Terms,
    objective: str,
    aux: Tensor | None,
    error: Tensor | None = None,
    whole: tuple[Tensor, Tensor] | None = None,
    world: World = ALONE,
) -> Loss:
    """The loss of one pass; ``aux`` is the AuxK term before its coefficient. ``error [P]``, ``sum (x_hat - target)^2`` of each prefix, and
    ``whole``, ``spread(target)``, where they are known."""
    tokens = max(target.shape[0], 1)
    error = squares(run.x_hats, target).sum((1, 2)) if error is None else error
    spreads, noise = spread(target) if whole is None else whole
    fit = error.mean() if run.frozen is None else error.mean() + world.sum(squares(run.frozen, target))
    loss = quotient(fit, spreads) if objective == "fvu" else fit / tokens
    if run.magnitude is not None:
        loss = loss + terms.l1 * run.magnitude / tokens
    if run.counted is not None:
        loss = loss + terms.l0 * run.counted / tokens
    if aux is not None and terms.aux is not None:
        loss = loss + terms.aux.coefficient * aux
    return Loss(loss, ratio(error[-1].detach(), spreads.detach(), noise.detach()), run.active.float() / tokens)


@dataclass
class Weights:
    """An SAE's tensors as one computation uses them: cast for autocast, the pre-bias and prefixes resolved.

    ``threshold`` is what ReLU, JumpReLU and BatchTopK in evaluation compare with, None for the others; ``r_mag`` is there for Gated only.
    A crosscoder's decoder rows are those of ``layers``, side by side; ``rank [F]`` multiplies the scores that a top k compares.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    b_enc: Tensor | None
    b_pre: Tensor | None
    skip: Tensor | None
    threshold: Tensor | None
    b_gate: Tensor | None
    r_mag: Tensor | None
    b_mag: Tensor | None
    bandwidth: float | None
    prefixes: list[int]
    layers: int = 1
    rank: Tensor | None = None

    @property
    def ranking(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """``b_enc, b_pre, scale`` of a selection."""
        b_enc = self.b_enc if self.rank is None or self.b_enc is None else self.b_enc * self.rank
        return b_enc, self.b_pre, self.rank


def unranked(values: Tensor, indices: Tensor, rank: Tensor | None) -> Tensor:
    """The scores of what was selected by ``rank * score``; 0 where ``rank`` is."""
    return values if rank is None else quotient(values, rank[indices.long()])


class DeadOnes(NamedTuple):
    """How AuxK ranks the dead features: the ``k`` best of ``features`` by scores with the vectors of ``ranking``. share: ``[]`` float64,
    the term's factor. ours: ``[F]`` bool, whose slots count; None: all."""

    k: int
    ranking: tuple[Tensor | None, Tensor | None, Tensor | None]
    features: Tensor | None
    share: Tensor
    ours: Tensor | None

    @classmethod
    def of(cls, aux: AuxK, d_in: int, dead: Tensor, w: Weights, absolute: bool, world: World = ALONE) -> DeadOnes:
        """Waits for the number of dead features. A CUDA graph cannot: while one is captured all features are ranked, those that live by a
        score that no other is below. That is a dense encoder's time, where a wait takes none; so it is done there alone."""
        k = aux.k or max(d_in // 2, 1)
        if not flags.capturing(dead.device):
            n = int(world.count(dead.sum())) // world.copies
            share = torch.full((), min(n / k, 1.0) if aux.share else 1.0, dtype=torch.float64, device=dead.device)
            return cls(min(k, n), w.ranking, dead, share, None)
        share = (dead.sum(dtype=torch.float64) / k).clamp_max(1.0) if aux.share else dead.any().to(torch.float64)
        b, b_pre, scale = w.ranking
        b = w.W_enc.new_zeros(()) if b is None else b
        if absolute:  # the least magnitude is 0
            b, scale = torch.where(dead, b, 0), torch.where(dead, w.W_enc.new_ones(()) if scale is None else scale, 0)
        else:
            b = torch.where(dead, b, -torch.inf)
        return cls(min(k, len(dead)), (b, b_pre, scale), None, share, dead)

    def kept(self, values: Tensor, indices: Tensor, rank: Tensor | None) -> tuple[Tensor, Tensor]:
        """(values of the slots, 0 in those that do not count; which are no NaN and count)."""
        values = unranked(values, indices, rank)
        if self.ours is None:
            return values, ~values.isnan()
        count = self.ours[indices.long()]
        return torch.where(count, values, 0), ~values.isnan() & count


def part_norms(W_dec: Tensor, layers: int) -> Tensor:
    """``[F, layers]`` in the accumulation dtype: norms of each decoder row's parts, whose sum the L1 penalty weighs a latent with."""
    wide = accumulator(W_dec.dtype)
    if layers == 1:
        return torch.linalg.vector_norm(W_dec, dim=1, keepdim=True, dtype=wide)
    return torch.linalg.vector_norm(W_dec.unflatten(1, (layers, -1)), dim=2, dtype=wide)


def by_parts(factors: Tensor, W_dec: Tensor) -> Tensor:
    """``[n, layers]`` times the parts of ``[n, layers * D]``."""
    return (factors.unsqueeze(2) * W_dec.unflatten(1, (factors.shape[1], -1))).flatten(1)
