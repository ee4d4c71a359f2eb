"""Polytopes of a dictionary: where the set of active features changes along a segment, exactly.

Along a segment every score is a line. A feature cut by a threshold changes once, where its line crosses it; for a top-k see
``ops/topk_changes``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F_

from fastsae._core import checks
from fastsae._core.precision import full_precision
from fastsae.ops.encode import encode_threshold
from fastsae.ops.topk_changes import score_lines, topk_changes
from fastsae.packed import PackedWeights
from fastsae.reference import chunks

_NOT_FINITE = "{}: W_enc and b_enc of the SAE must be finite, got NaN or infinity"


class DictionaryCrossings(NamedTuple):
    """Changes of the set of active features along segments, segment after segment, in the order of ``t``.

    Attributes:
        t: ``[n]`` float64, positions, 0 at p and 1 at q. leaves, enters: ``[n]`` int64, the feature that goes and the one that comes; -1
            where none does. offsets: ``[S + 1]`` int64; segment s has the entries ``offsets[s] : offsets[s + 1]``.
    """

    t: Tensor
    leaves: Tensor
    enters: Tensor
    offsets: Tensor

    @property
    def counts(self) -> Tensor:
        """``[S]`` int64: changes along each segment."""
        return self.offsets.diff()

    @property
    def segment(self) -> Tensor:
        """``[n]`` int64: the segment of each entry."""
        return torch.arange(self.counts.shape[0], device=self.t.device).repeat_interleave(self.counts, output_size=self.t.shape[0])


class Planes(NamedTuple):
    """The scores ``W (x - b_pre) + b`` of an SAE; ``threshold [F]`` (float64) is what they must be above, None for a top-k. ``longest``: of
    the rows of W."""

    W: Tensor
    b: Tensor
    b_pre: Tensor | None
    threshold: Tensor | None
    longest: float

    def slack(self, x: Tensor) -> Tensor:
        """``[rows]``: what a score of the encoder, whose sums are in float32, is at most away from ours."""
        wide = self.W.dtype == torch.float64
        error = (x.shape[1] + 8) * torch.finfo(torch.float64 if wide else torch.float32).eps + 4 * torch.finfo(self.W.dtype).eps
        length = x.norm(dim=1) + (0 if self.b_pre is None else self.b_pre.double().norm())
        return error * (length * self.longest + 2 * self.b.double().abs().amax())


def planes_of(op: str, wanted: str, sae: Any, kinds: tuple[str, ...], **points: Any) -> Planes:
    """Of an SAE with an activation of these kinds and inputs ``[n, D]``; TypeError or ValueError ("{op}: {wanted} an SAE") otherwise."""
    kind = type(getattr(sae, "activation", None)).__name__
    if kind not in kinds or not isinstance(W := getattr(sae, "W_enc", None), Tensor) or W.dim() != 2:
        *names, last = kinds
        raise ValueError(
            f"{op}: {wanted} an SAE with {', '.join(names)} or {last} (at its running threshold), got {kind} in {type(sae).__name__}"
        )
    if getattr(getattr(sae, "world", None), "virtual", 1) > 1:
        raise ValueError(f"{op}: the SAE is sharded, this process holds a part of it: fastsae.distributed.gathered(sae) is the whole one")
    W, b = W.detach(), sae.b_enc.detach()
    for name, value in points.items():
        checks.tensor(op, name, value, like=W)
        if value.dim() != 2 or value.shape[-1] != W.shape[1]:
            raise ValueError(f"{op}: {name} must have two dimensions, [.., D={W.shape[1]}], got {list(value.shape)}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{op}: {name} must be finite, got NaN or infinity")
    if bool((getattr(sae, "scale", b) != 1).any()) and hasattr(sae, "scale"):
        raise ValueError(f"{op}: the SAE must be in the units of the data: call its fold_()")
    if (rows := getattr(sae, "normalise_rows", None)) is not None:
        raise ValueError(f"{op}: along a segment the scores of an SAE with normalise_rows={rows!r} are no straight lines")
    cut, longest = kind not in ("TopK", "AbsTopK"), 0.0  # of a top-k whoever forms the lines looks at W
    for dtype in (torch.float32, torch.float64) if cut else ():  # what float32 overflows on
        longest = longest if 0 < longest < math.inf else float(torch.linalg.vector_norm(W.to(dtype), dim=1).amax()) * 1.001
    if not (longest < math.inf and bool(b.isfinite().all())):
        raise ValueError(_NOT_FINITE.format(op))
    raw = {"JumpReLU": "threshold", "BatchTopK": "running_threshold"}.get(kind)
    threshold = b.double() * 0 if raw is None else getattr(sae, raw).detach().double().clamp_min(0).expand_as(b)
    return Planes(W, b, sae.b_dec.detach() if getattr(sae, "pre_bias", True) else None, threshold if cut else None, longest)


# ---------------------------------------------------------------- thresholds


def _by_threshold(planes: Planes, weights: Any, p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    """(t, leaves, enters, counts): what is active at one end and not at the other. ``weights``: W, or its packed form."""
    assert planes.threshold is not None
    (F, _), S, x = planes.W.shape, p.shape[0], torch.cat([p, q])
    rows = x.to(planes.W.dtype)
    b = planes.b.double() + 2 * planes.slack(x).amax()
    features, segment = None, torch.arange(S, device=p.device)
    if bool(rows.isfinite().all()):
        wide = torch.float64 if planes.W.dtype == torch.float64 else torch.float32
        near = encode_threshold(rows, weights, b.to(wide), b_pre=planes.b_pre, threshold=planes.threshold.to(wide))
        if near.col.shape[0] * 8 <= S * F:
            pair = (near.slots.row_of() % S * F + near.col).unique()
            segment, features = pair // F, (pair % F).split(torch.bincount(pair // F, minlength=S).tolist())
    feature = torch.arange(F, device=p.device).repeat(S) if features is None else torch.cat(features)
    segment = segment.repeat_interleave(F) if features is None else segment
    above = score_lines(planes.W, planes.b, planes.b_pre, p, q, features) - planes.threshold[feature]
    changed = (above[0] > 0) != (above[1] > 0)
    (a, b), feature, segment = above[:, changed], feature[changed], segment[changed]
    nothing = torch.full_like(feature, -1)
    t, leaves, enters = a / (a - b), torch.where(a > 0, feature, nothing), torch.where(a > 0, nothing, feature)
    place = torch.arange(len(t), device=p.device)
    for key in (enters, leaves, t, segment):
        place = place[key[place].argsort(stable=True)]
    return t[place], leaves[place], enters[place], torch.bincount(segment, minlength=S)


# ---------------------------------------------------------------- public


@torch.no_grad()
def dictionary_crossings(sae: nn.Module, p: Tensor, q: Tensor) -> DictionaryCrossings:
    """Every change of an SAE's set of active features on the segments from p to q, exactly.

    Args:
        sae: an ``SAE`` with TopK, AbsTopK, ReLU, JumpReLU, or BatchTopK at its running threshold, as it stands in evaluation.
        p, q: ``[S, D]``, ends of S segments, in the units of the data; any floating dtype, widened to float64.

    Returns:
        ``DictionaryCrossings(t, leaves, enters, offsets)``, ragged over segments, ascending by t. A feature is active where its score is
        above its threshold (0 with ReLU); with TopK among the k largest scores of the row, of equal ones the first, and with its ReLU above
        0; with AbsTopK among the k of largest magnitude. Of a top-k a feature leaves where another enters, at one entry; -1 stands for none
        (scores cut by a threshold, or by TopK's ReLU). Several changes may share a t. The set of p with all changes made is the set of q;
        features whose scores only touch do not change, except in p or q.

    Arithmetic is float64: changes are the places where the lines through the scores at p and q (parameters widened) meet each other, 0 or
    the threshold, to a few roundings. Where lines nearly touch, two changes less than a rounding apart may be missed or found. Of a top-k
    (a float32 or half-precision SAE on the CPU) only features are looked at that the screened ends do not prove out; elsewhere, and where
    that is too little or a threshold is passed by over 1/8 of the features, all scores are formed. No gradient. Memory beyond the result:
    64 MiB of upper ends and up to k + 2 MiB of changes for the former, blocks of 256 MiB for the latter.

    Raises: TypeError: dtype, device or type. ValueError: shapes; values that are not finite; an SAE with another activation, sharded, or in
        units that are not the data's (``fold_()``).

    Source: an SAE's polytopes as in Black et al. 2022 (arXiv 2211.12312); the k-level of an arrangement, Edelsbrunner & Welzl 1986.
    """
    op = "dictionary_crossings"
    planes = planes_of(op, "sae must be", sae, ("TopK", "AbsTopK", "ReLU", "JumpReLU", "BatchTopK"), p=p, q=q)
    if p.shape != q.shape:
        raise ValueError(f"{op}: p and q must have the same shape [S, D], got {list(p.shape)} and {list(q.shape)}")
    p, q = p.detach().double(), q.detach().double()
    module: Any = sae
    activation, weights, W = module.activation, module._encoder(p), planes.W
    with full_precision(p.device):  # autocast would round scores by more than the proof counts in
        if planes.threshold is None:
            packed = weights.words(op) if isinstance(weights, PackedWeights) else None
            t, leaves, enters, counts = topk_changes(
                W, planes.b, planes.b_pre, packed, p, q, activation.k, activation.relu, activation.absolute
            )
            if bool((counts < 0).any()):
                raise ValueError(_NOT_FINITE.format(op))
        else:
            found = [_by_threshold(planes, weights, p[part], q[part]) for part in chunks(len(p), 4 * W.shape[0])]
            none = torch.zeros(0, dtype=torch.int64, device=p.device)
            t, leaves, enters, counts = map(torch.cat, zip((p.new_empty(0), none, none, none), *found))
    return DictionaryCrossings(t, leaves, enters, F_.pad(counts.cumsum(0), (1, 0)))
