"""A training step's gradients by hand, through the operations and without autograd: ``SAE.step_gradients``.

    encode -> slots of the latents z            dL/dx_hat of each prefix -> its suffix sums G
    decode -> x_hat                             dz = decode_dvalues(G, slots, W_dec)
    loss   -> dL/dx_hat                         dW_dec = slots x G        dW_enc = slots of dz x (x - b_pre)

Weight gradients stay slots and rows (``RowGradient``), or tiles in the dense regime (``TiledGradient``): no ``[F, D]`` gradient, no
``[B, F]`` latents. The numbers are autograd's of ``SAE.loss`` up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastsae import latents
from fastsae._core.world import ALONE, World
from fastsae.dispatch import preference, then_any
from fastsae.gradients import Gradient, RowGradient, TiledGradient, total
from fastsae.ops.decode import DECODE, DECODE_DVALUES
from fastsae.ops.encode import ENCODE_BATCH_TOPK, ENCODE_GATED, ENCODE_THRESHOLD, ENCODE_TOPK, active_counts
from fastsae.ops.score_gradients import band_gradient, feature_sums, score_gradients
from fastsae.reference import accumulator, centre, running_sums
from fastsae.sae import jump, selection, tiles
from fastsae.sae.activations import Activation, BatchTopK, TopK
from fastsae.sae.inputs import Inputs
from fastsae.sae.losses import (
    AuxK,
    DeadOnes,
    Metrics,
    Pass,
    Terms,
    Weights,
    aux_denominator,
    by_parts,
    combine,
    fired,
    part_norms,
    quotient,
    spread,
    unranked,
)


class Slots(NamedTuple):
    """Latents as slots; ``passes``: where a value's gradient is its score's; ``flags``: 1 active, 2 in the band (JumpReLU)."""

    values: Tensor
    indices: Tensor
    crow: Tensor | None
    passes: Tensor
    flags: Tensor | None = None
    min_kept: Tensor | None = None

    def row_of(self) -> Tensor:
        return latents.Slots(self.values, self.indices, self.crow).row_of()

    def complete(self, world: World) -> Slots:
        """Of all rows, from those of the rows of each process's share."""
        if world.copies == 1 or self.crow is None:
            return self
        counts = world.shares(self.crow.diff())
        values, indices, passes = (world.shares(t, counts) for t in (*self[:2], self.passes.to(torch.uint8)))
        flags = None if self.flags is None else world.shares(self.flags, counts)
        return Slots(values, indices, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), passes.bool(), flags, self.min_kept)


def encode_slots(x: Tensor, w: Weights, activation: Activation, world: World = ALONE) -> Slots:
    """The latents of any activation; BatchTopK's by a threshold where ``w`` has one, else those that the batch selects. Of a sharded
    dictionary those that are features of this process, of the rows of ``world.share``."""
    backend, rows, x = preference(None), x, world.share(x)
    if isinstance(activation, TopK) and world.virtual > 1:
        found = selection.top_k(x, w, int(activation.k), activation.relu, world, absolute=activation.absolute)
        return Slots(*found, found.values > 0 if activation.relu else ~found.values.isnan())
    if isinstance(activation, TopK):
        rule = int(activation.k), activation.relu, activation.absolute
        values, indices = ENCODE_TOPK(x, w.W_enc, *w.ranking, None, None, *rule, backend=backend)
        values = unranked(values, indices, w.rank)
        return Slots(values, indices, None, values > 0 if activation.relu else ~values.isnan())
    if w.r_mag is not None:
        values, col, crow = ENCODE_GATED(x, w.W_enc, w.b_gate, w.r_mag, w.b_mag, w.b_pre, None, backend=backend)
        return Slots(values, col, crow, ~values.isnan())
    if isinstance(activation, BatchTopK) and w.threshold is None:
        k = float(activation.k)
        if world.virtual > 1:
            found, min_kept = selection.batch_top_k(rows, w, k, world)
            return Slots(*found, ~found.values.isnan(), min_kept=min_kept)
        values, col, crow, min_kept = ENCODE_BATCH_TOPK(x, w.W_enc, *w.ranking, None, None, k, backend=backend)
        values = unranked(values, col, w.rank)
        return Slots(values, col, crow, ~values.isnan(), min_kept=min_kept)
    assert w.threshold is not None
    found = _threshold_slots(x, w, w.ranking[0], w.threshold, w.bandwidth, w.rank)
    return found._replace(values=unranked(found.values, found.indices, w.rank))


def _threshold_slots(
    x: Tensor, w: Weights, b: Tensor | None, threshold: Tensor, bandwidth: float | None, scale: Tensor | None = None
) -> Slots:
    outputs = ENCODE_THRESHOLD(x, w.W_enc, b, w.b_pre, scale, None, None, threshold, bandwidth, backend=preference(None))
    values, col, crow, flags = outputs
    if bandwidth is None:
        return Slots(values, col, crow, ~values.isnan())
    return Slots(values, col, crow, (flags & 1).bool() & ~values.isnan(), flags)


def decoded(slots: Slots | latents.Slots, W: Tensor, b: Tensor | None, world: World, groups: int = 1) -> Tensor:
    """``[groups * rows, D]`` of all rows, on every process; ``slots`` of the rows of ``world.share``."""
    if world.virtual == 1:
        return DECODE(slots.values, slots.indices, slots.crow, W, b, backend=then_any(preference(None)))
    own = selection.decode_rows(latents.Slots(*slots[:3]), W, world, groups)
    y = world.gather(own.transpose(0, 1)).transpose(0, 1).flatten(0, 1)
    return y if b is None else y + b


@dataclass
class Groups:
    """Slots in the order of (prefix group, row), so that each slot is decoded once for all prefixes."""

    values: Tensor
    indices: Tensor
    crow: Tensor | None
    order: Tensor | None

    @classmethod
    def of(cls, slots: Slots, prefixes: list[int], rows: int, start: int = 0) -> Groups:
        if len(prefixes) == 1:
            return cls(slots.values, slots.indices, slots.crow, None)
        flat = slots.indices.reshape(-1)
        group = torch.zeros_like(flat, dtype=torch.int64)
        for bound in prefixes[:-1]:  # a tensor of bounds would make a GPU's host wait
            group += flat >= bound - start
        row = group * rows + slots.row_of()
        row, order = torch.sort(row, stable=True)
        crow = torch.searchsorted(row, torch.arange(len(prefixes) * rows + 1, device=row.device))
        return cls(slots.values.reshape(-1)[order], slots.indices.reshape(-1)[order], crow, order)

    def restore(self, grouped: Tensor, like: Tensor) -> Tensor:
        """Per-slot numbers in the order and shape of the slots."""
        return grouped if self.order is None else torch.empty_like(grouped).index_copy_(0, self.order, grouped).reshape(like.shape)


class Sum:
    """Gradients by parameter name, added up."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Gradient]] = {}

    def add(self, name: str, gradient: Gradient | None) -> None:
        if gradient is not None:
            self.parts.setdefault(name, []).append(gradient)

    def result(self, parameters: dict[str, nn.Parameter]) -> dict[str, Gradient]:
        if "W_enc" not in parameters:  # tied
            self.parts["W_dec"] = self.parts.pop("W_dec", []) + self.parts.pop("W_enc", [])
        out: dict[str, Gradient] = {}
        for name, parameter in parameters.items():
            gradient = total(self.parts[name]) if name in self.parts else torch.zeros_like(parameter)
            out[name] = gradient.to(parameter.dtype) if isinstance(gradient, Tensor) else gradient
        return out


def step(inputs: Inputs, whole: tuple[Tensor, Tensor] | None = None) -> tuple[Metrics, dict[str, Gradient]]:
    """Metrics and gradients for the rows that count; ``whole`` is ``spread(target)`` where it is known."""
    with inputs.autocast_off:
        return _step(inputs, whole)


def _step(inputs: Inputs, whole: tuple[Tensor, Tensor] | None) -> tuple[Metrics, dict[str, Gradient]]:
    (x, w), target, terms = inputs.cast, inputs.target, inputs.terms
    P, wide, tokens, world = len(w.prefixes), accumulator(x.dtype), max(x.shape[0], 1), inputs.world
    this, run = forward(inputs)
    run = inputs.restored(run)
    dead = inputs.observe(run)

    # dL/dx_hat of each prefix; a slot of group j reaches the prefixes from j on, hence the suffix sums.
    whole = spread(target, world) if whole is None else whole
    unit = whole[0] if inputs.objective == "fvu" else x.new_full((), tokens, dtype=wide)
    scale = quotient(unit.new_full((), 2.0), unit) * (1 if inputs.rows is None else inputs.rows.size)
    grads = run.x_hats.to(wide) - target.to(wide)
    error = world.each_sum(grads.square())
    grads *= scale / P
    G = (grads if P == 1 else running_sums(grads.flip(0)).flip(0)).to(w.W_dec.dtype)
    dfrozen = None if run.frozen is None else ((run.frozen.to(wide) - target.to(wide)) * scale).to(w.W_dec.dtype)

    grad = Sum()
    grad.add("b_dec", world.row_sum(G[0]))
    if w.skip is not None:
        grad.add("W_skip", selection.skip_gradient(G[0], x, world))
    rates = terms.l1 / tokens, terms.l0 / tokens
    backward(grad, this, G, dfrozen, *rates)
    aux = None if terms.aux is None else aux_step(grad, x, target, run.x_hats[-1], dead, w, terms.aux, inputs.activation.absolute, world)
    loss, fvu, l0 = combine(run, target, terms, inputs.objective, aux, error, whole, world)
    if terms.jump is not None and terms.jump.pre_acts:
        short = jump.PreActs(x, w, None if terms.jump.all_features else dead, terms.jump.pre_acts / tokens, world)
        loss = loss + short.loss
        for name, gradient in short.gradients().items():
            grad.add(name, gradient)
    metrics = Metrics(loss, fvu, l0, world.count(dead.sum()) // world.copies, loss.new_zeros(()) if aux is None else aux)
    return metrics, grad.result(inputs.parameters)


def forward(inputs: Inputs, slots: Slots | None = None, outputs: bool = True) -> tuple[tiles.TilePass | SlotPass, Pass]:
    """What ``backward`` goes back through, and what the loss needs; ``slots``: the latents, where they are known. Without ``outputs``
    ``x_hats`` has no columns: who asks decodes ``grouped``."""
    (x, w), terms = inputs.cast, inputs.terms
    if inputs.dense:
        this = tiles.TilePass(x, w, bool(terms.l1))
    else:
        found = encode_slots(x, w, inputs.activation, inputs.world) if slots is None else slots
        this = SlotPass(found, x, w, terms, inputs.world, outputs)
    if not terms.l0 or this.run.counted is not None:
        return this, this.run
    return this, this.run._replace(counted=this.run.active.to(accumulator(x.dtype)))


def backward(grad: Sum, this: tiles.TilePass | SlotPass, G: Tensor, dfrozen: Tensor | None, l1: float, l0: float) -> None:
    """Adds the gradients of all but b_dec; ``G [P, rows, d_out]``, ``l1`` and ``l0`` divided by the number of tokens."""
    if isinstance(this, SlotPass):
        this.backward(grad, G, dfrozen, l1, l0)
        return
    for name, vector in this.begin(G, dfrozen, l1, l0).items():
        grad.add("b_dec" if name == "b_pre" else name, vector)
    for name, gradient in zip(("W_enc", "W_dec"), this.weights()):
        grad.add(name, gradient)


class SlotPass:
    """Forward and backward over slots; ``run`` is what the loss needs of the forward."""

    def __init__(self, slots: Slots, x: Tensor, w: Weights, terms: Terms, world: World, outputs: bool = True):
        self.x, self.w, self.backend, self.wide, self.world = x, w, then_any(preference(None)), accumulator(x.dtype), world
        self.jump = terms.jump
        active = world.count((slots.values != 0).sum())
        groups = Groups.of(slots, w.prefixes, world.share(x).shape[0], world.start)
        self.slots = slots.complete(world)
        self.groups = groups if self.slots is slots else Groups.of(self.slots, w.prefixes, x.shape[0], world.start)
        self.grouped = latents.Slots(groups.values, groups.indices, groups.crow)  # of the rows of ``world.share``
        x_hats = self.outputs() if outputs else x.new_empty(1, x.shape[0], 0)
        self.gate = frozen = None
        if w.r_mag is not None:  # a gated SAE's second code, of its gate alone
            gate = _threshold_slots(world.share(x), w, w.b_gate, w.W_enc.new_zeros((), dtype=self.wide), None)
            frozen = decoded(gate, w.W_dec, w.b_dec.to(w.W_dec.dtype), world)
            self.gate = gate.complete(world)
        self.penalised = penalised = self.gate or self.slots
        self.norms = part_norms(w.W_dec, w.layers) if terms.l1 else None
        self.norm = None if self.norms is None else self.norms.sum(1)
        self.sums = magnitude = counted = None  # of the penalised magnitudes of each feature
        self.pull: Tensor | float = 1.0
        if self.norm is not None:
            values, norm, tanh = penalised.values.to(self.wide), self.norm[penalised.indices.long()], self.jump and self.jump.tanh
            weighed, self.slope, self.grown = jump.penalised(values, norm, tanh)
            magnitude = weighed.sum()
            if world.virtual > 1:
                of_each = penalised.indices, penalised.crow, len(self.norm), self.backend
                self.sums = feature_sums(self.grown, *of_each)
                magnitude = world.total(self.sums * self.norm if tanh is None else feature_sums(weighed, *of_each))
        hit = fired(self.slots.indices.long(), self.slots.values, w.W_enc.shape[0])
        if self.jump is not None and self.jump.target is not None and terms.l0:
            assert self.slots.flags is not None and self.slots.crow is not None
            each = world.count(active_counts(self.slots.flags, self.slots.crow, self.wide)) / world.copies
            counted, self.pull = jump.of_target(each, self.jump.target, self.jump.of_batch, world)
        self.run = Pass(x_hats.to(x.dtype), frozen, magnitude, counted, active, hit, self.slots.min_kept)

    def outputs(self) -> Tensor:
        """``[P, rows, d_out]``, not rounded to the dtype of x."""
        x, w = self.x, self.w
        partial = decoded(self.grouped, w.W_dec, None, self.world, len(w.prefixes)).to(self.wide)
        x_hats = partial.reshape(len(w.prefixes), x.shape[0], w.W_dec.shape[1])
        x_hats = (x_hats if len(w.prefixes) == 1 else running_sums(x_hats)) + w.b_dec
        if w.skip is not None:
            x_hats += selection.skipped(x, w.skip, self.world)
        return x_hats

    def backward(self, grad: Sum, G: Tensor, dfrozen: Tensor | None, l1: float, l0: float) -> None:
        """Adds the gradients; ``l1`` and ``l0`` divided by the number of tokens."""
        x, w, slots, gate, groups, n_features = self.x, self.w, self.slots, self.gate, self.groups, self.w.W_enc.shape[0]
        xc = _centred(x, w)
        G = G.flatten(0, 1)
        grad.add("W_dec", RowGradient(groups.values, groups.indices, groups.crow, G, n_features))
        dvalues = DECODE_DVALUES(G, groups.indices, groups.crow, w.W_dec, backend=self.backend)
        dvalues = groups.restore(dvalues, slots.values)
        dgate = None
        if gate is not None and dfrozen is not None:
            dgate = DECODE_DVALUES(dfrozen, gate.indices, gate.crow, w.W_dec, backend=self.backend)
        if self.norm is not None and self.norms is not None:
            slope = (l1 * self.slope).to(dvalues.dtype)
            dvalues, dgate = (dvalues + slope, None) if dgate is None else (dvalues, dgate + slope)
            indices, crow = self.penalised.indices, self.penalised.crow
            sums = feature_sums(self.grown, indices, crow, n_features, self.backend) if self.sums is None else self.sums
            grad.add("W_dec", shrinking(l1 * quotient(sums.unsqueeze(1), self.norms), w.W_dec, self.norms))
        if slots.flags is not None and w.threshold is not None and w.bandwidth is not None:
            moved = latents.Slots(dvalues, slots.indices, slots.crow)
            band = band_gradient(moved, l0 * self.pull, slots.flags, w.threshold, w.bandwidth)
            grad.add("threshold", feature_sums(band, slots.indices, slots.crow, n_features, self.backend))
            if self.jump is not None and self.jump.to_scores:
                dvalues = torch.where(slots.passes, dvalues, 0) - band.to(dvalues.dtype)
                slots = slots._replace(passes=torch.ones_like(slots.passes))
        if gate is None or dgate is None:
            _through_scores(grad, slots, dvalues, x, xc, w, "b_enc", self.backend, world=self.world)
        else:
            _through_scores(grad, slots, dvalues, x, xc, w, "b_mag", self.backend, w.r_mag, self.world)
            _through_scores(grad, gate, dgate, x, xc, w, "b_gate", self.backend, world=self.world)


def _centred(x: Tensor, w: Weights) -> Tensor:
    return x if w.b_pre is None else centre(x, w.b_pre).to(x.dtype)


def _through_scores(
    grad: Sum,
    slots: Slots,
    dvalues: Tensor,
    x: Tensor,
    xc: Tensor,
    w: Weights,
    bias: str,
    backend: str | None,
    r_mag: Tensor | None = None,
    world: World = ALONE,
) -> None:
    """Adds what the gradient of the slots' values gives W_enc, the bias, the pre-bias and, with ``r_mag``, the magnitudes' stretch."""
    dscore = torch.where(slots.passes, dvalues, 0)
    stretch = None if r_mag is None else r_mag.to(accumulator(x.dtype)).exp()
    # What r_mag stretches, times the stretch, is a value without its bias, unless values are rounded to less than the sums: then again.
    again = stretch is not None and slots.values.dtype is not stretch.dtype
    needs = (False, False, True, w.b_pre is not None and world.virtual == 1, again)
    b, indices = getattr(w, bias), slots.indices.long()
    _, _, db, db_pre, dstretch = score_gradients(dscore, slots.indices, slots.crow, x, w.W_enc, b, w.b_pre, stretch, needs, backend)
    if w.b_pre is not None and world.virtual > 1 and db is not None:
        db_pre = -selection.pulled(db if stretch is None else db * stretch, w.W_enc, world)
    through = dscore if stretch is None else (dscore * stretch[indices]).to(dscore.dtype)
    grad.add("W_enc", RowGradient(through, slots.indices, slots.crow, xc, w.W_enc.shape[0]))
    grad.add(bias, db)
    grad.add("b_dec", db_pre)
    if dstretch is not None and stretch is not None:
        grad.add("r_mag", dstretch * stretch)
    elif stretch is not None:
        moved = dscore * (slots.values - b.to(stretch)[indices])
        grad.add("r_mag", feature_sums(moved, slots.indices, slots.crow, w.W_enc.shape[0], backend))


def shrinking(factor: Tensor, W: Tensor, norm: Tensor) -> TiledGradient:
    """``factor[f, l]`` times part l of ``W[f]``, whose norm is ``norm[f, l]``: what a penalty on its parts' norms gives a row."""
    size = torch.linalg.vector_norm(factor * norm)
    return TiledGradient(lambda part: by_parts(factor[part], W[part]).to(W.dtype), W.shape[0], size=size)


def aux_step(
    grad: Sum, x: Tensor, target: Tensor, x_hat: Tensor, dead: Tensor, w: Weights, aux: AuxK, absolute: bool, world: World
) -> Tensor | None:
    """The AuxK term before its coefficient; adds its gradients. Waits for the dead features, see ``DeadOnes``."""
    ones = DeadOnes.of(aux, x.shape[1], dead, w, absolute, world)
    if ones.k == 0 or x.shape[0] == 0:
        return None
    wide, backend = accumulator(x.dtype), then_any(preference(None))
    if world.virtual > 1:
        slots = selection.top_k(world.share(x), w, ones.k, aux.relu, world, dead, absolute)
        passes = ~slots.values.isnan()
    else:
        values, indices = ENCODE_TOPK(x, w.W_enc, *ones.ranking, ones.features, None, ones.k, aux.relu, absolute, backend=backend)
        values, passes = ones.kept(values, indices, w.rank)
        slots = latents.Slots(values, indices, None)
    e_hat = decoded(slots, w.W_dec, w.b_dec.to(w.W_dec.dtype) if aux.bias else None, world).to(wide)
    residual = target.to(wide) - x_hat.to(wide)
    denominator = aux_denominator(aux, residual, target, world)
    passes = slots.values > 0 if aux.relu else passes
    values, indices, crow, passes, *_ = Slots(*slots, passes).complete(world)
    difference = e_hat - residual
    factor = 2 * aux.coefficient * ones.share
    g = (difference * quotient(factor.to(wide), denominator)).to(w.W_dec.dtype)
    dvalues = DECODE_DVALUES(g, indices, crow, w.W_dec, backend=backend)
    grad.add("W_dec", RowGradient(values, indices, crow, g, w.W_enc.shape[0]))
    if aux.bias:
        grad.add("b_dec", world.row_sum(g))
    # The rows of the main slots where there are such: their sets of slots then lie side by side on one copy of the rows.
    xc = next((part.rows for part in grad.parts["W_enc"] if isinstance(part, RowGradient)), None)
    xc = _centred(x, w) if xc is None else xc
    _through_scores(grad, Slots(values, indices, crow, passes), dvalues, x, xc, w, "b_enc", backend, world=world)
    return ones.share.to(wide) * quotient(world.sum(difference.square()), denominator)
