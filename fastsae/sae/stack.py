"""Several SAEs of one size whose parameters lie stacked, ``[E, F, D]``, and train in one call: sweeps over penalties and seeds, several
hook points.

A member's numbers are, bit for bit, those of the same SAE trained alone. What a step saves is the host's time of E calls: where latents
are sparse, one call of each operation serves all members (``_JointPass``), and one call of the optimiser a parameter. Where they are dense
the members' products are the work; they follow one another (one batched product takes as long, and its bits are nobody's promise), and
share what does not depend on the member and the optimiser's calls. Where some are dense and some are not, each takes its own way.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastsae._core import checks
from fastsae._core.world import World
from fastsae.dispatch import preference, then_any
from fastsae.formats import modules
from fastsae.gradients import Gradient, RowGradient, StackedGradient, TiledGradient, total
from fastsae.ops.decode import DECODE, DECODE_DVALUES
from fastsae.ops.score_gradients import by_features, feature_sums, pre_bias_gradient
from fastsae.packed import share
from fastsae.reference import accumulator, centre
from fastsae.sae.crosscoder import of_config
from fastsae.sae.inputs import Inputs
from fastsae.sae.losses import AuxOption, Metrics, Pass, combine, fired, quotient, spread
from fastsae.sae.module import SAE, keep_dtypes
from fastsae.sae.step import Slots, encode_slots, shrinking, step

if TYPE_CHECKING:
    from typing_extensions import Self

_SAME = ("n_layers", "d_in", "d_sae", "d_out", "transcoder", "skip", "tied", "prefixes", "normalise_decoder", "normalise_rows")


class SAEs(nn.Module):
    """E dictionaries of one size for ``optim.Adam``: ``opt.step(x)`` trains all of them, each to the bits that it would have alone.

    Parameters and buffers are those of ``SAE`` with a dimension in front: ``W_enc, W_dec [E, F, D]``, ``b_enc [E, F]``, ``silent [E, F]``.
    The SAEs given become the members: their parameters and buffers are views of the stack from then on. ``saes[e]`` is such a member, an
    ordinary ``SAE``; ``copy.deepcopy(saes[e])`` is one of its own.

    Args:
        members: ``SAE`` modules with equal dimensions, kind of activation, dtype and device. Penalties, seeds, ``k``, thresholds, ``aux``
            and the objective are each member's own.

    Raises: TypeError: a member that is no ``SAE``, or of another dtype or device. ValueError: no members, or members that do not agree.

    Example:
        >>> x = torch.randn(64, 256)
        >>> saes = fastsae.SAEs(fastsae.SAE(256, 512, fastsae.ReLU(), l1=l1, seed=0) for l1 in torch.logspace(-3, 0, 17).tolist())
        >>> opt = fastsae.optim.Adam(saes, lr=1e-3)  # or one rate a member: lr=[...]
        >>> metrics = opt.step(x)  # metrics.loss [17]
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    threshold: nn.Parameter  # with JumpReLU
    silent: Tensor

    def __init__(self, members: Iterable[SAE]):
        super().__init__()
        checks.instance("SAEs", "members", members, Iterable, "an iterable of SAEs")
        members = tuple(members)
        if not members:
            raise ValueError("SAEs: members must hold at least one SAE, got none")
        for number, member in enumerate(members):
            checks.instance("SAEs", f"members[{number}]", member, SAE, "an SAE")
            first = members[0]
            if member.world is not first.world:
                raise ValueError(f"SAEs: members[{number}] is sharded by itself: fastsae.distributed.shard takes a stack of whole SAEs")
            for name in _SAME:
                if getattr(member, name) != getattr(first, name):
                    raise ValueError(f"SAEs: {name} must be {getattr(first, name)} in all members, got {getattr(member, name)} in {number}")
            if type(member.activation) is not type(first.activation):
                raise ValueError(f"SAEs: activation must be of one kind, got {first.activation} and {member.activation}")
            for what in ("dtype", "device"):
                if getattr(member.W_dec, what) != getattr(first.W_dec, what):
                    raise TypeError(
                        f"SAEs: members must agree in {what}, got {getattr(first.W_dec, what)} and {getattr(member.W_dec, what)}"
                    )
            if any(member is other for other in members[:number]):
                raise ValueError(f"SAEs: members[{number}] is given twice")
        self._members = members
        for name, parameter in members[0].named_parameters():
            self.register_parameter(name, nn.Parameter(torch.stack([m.get_parameter(name).detach() for m in members])))
            self.get_parameter(name).requires_grad_(parameter.requires_grad)
        for name, _ in members[0].named_buffers():
            self.register_buffer(name, torch.stack([m.get_buffer(name) for m in members]))
        self._tie()

    # ------------------------------------------------------------ members

    @property
    def members(self) -> tuple[SAE, ...]:
        """The SAEs; their parameters and buffers are views of the stacked ones."""
        if (
            self._members[-1].W_dec.data_ptr() != self.W_dec[-1].data_ptr()
            or self._members[-1].silent.data_ptr() != self.silent[-1].data_ptr()
        ):
            self._tie()  # the module was moved or copied
        return self._members

    def _tie(self) -> None:
        if self.tied:
            self.W_enc = self.W_dec
        for number, member in enumerate(self._members):
            for name, parameter in list(member.named_parameters(remove_duplicate=False)):
                view = self.get_parameter(name).detach()[number]
                if parameter.device.type == view.device.type:
                    parameter.data = view
                else:
                    setattr(member, name, nn.Parameter(view, requires_grad=parameter.requires_grad))
            if member.tied:
                member.W_enc = member.W_dec
            for name in dict(member.named_buffers()):
                setattr(member, name, self.get_buffer(name)[number])
            member.buffers_changed()
            member.train(self.training)
            member.weights_changed()
        share(self)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, number: int) -> SAE:
        return self.members[number]

    def __iter__(self) -> Iterator[SAE]:
        return iter(self.members)

    @property
    def n_dictionaries(self) -> int:
        return len(self._members)

    @property
    def world(self) -> World:
        """The processes that hold the members."""
        return self._members[0].world

    @property
    def unit_rows(self) -> tuple[str, ...]:
        """As in ``SAE``."""
        return self._members[0].unit_rows

    @property
    def tied(self) -> bool:
        return self._members[0].tied

    def weights_changed(self) -> None:
        """As in ``SAE``, of every member."""
        for member in self._members:
            member.weights_changed()

    def extra_repr(self) -> str:
        return f"{len(self)} of {self._members[0].extra_repr()}"

    def train(self, mode: bool = True) -> Self:
        for member in self._members:
            member.train(mode)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)  # pyright: ignore[reportCallIssue]
        keep_dtypes(self, exact)
        self._tie()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] # torch calls it by position
        super()._load_from_state_dict(*args)
        self._tie()

    # ------------------------------------------------------------ training

    @torch.no_grad()
    def step_gradients(
        self,
        x: Tensor,
        target: Tensor | None = None,
        mask: Tensor | None = None,
        l1: float | None = None,
        l0: float | None = None,
        aux: AuxOption = None,
    ) -> tuple[Metrics, dict[str, Gradient]]:
        """``SAE.step_gradients`` of every member.

        Args:
            x: ``[B, D]``, the same rows for all members, or ``[E, B, D]``, rows for each.
            target: ``[B, d_out]`` or ``[E, B, d_out]``. mask: ``[B]`` or ``[E, B]``, bool or 0 and 1.
            l1, l0, aux: for all members; None: each member's own.

        Returns:
            ``(Metrics, {parameter: gradient})``: metrics are ``[E]`` each; gradients of the stacked parameters, tensors or
            ``StackedGradient``.
        """
        op = "SAEs.step_gradients"
        if self.world.virtual > 1:
            with self.world.together(op):
                batches = self._batches(op, x, target, mask)
                return self._stacked([m.step_gradients(*batch, l1, l0, aux) for m, batch in zip(self.members, batches)])
        checks.tensor(op, "x", x)
        if not checks.autocasting(x.device):
            checks.narrower(op, "x", x, "the parameters", self.W_dec)
            x = checks.widened(x, self.W_dec)  # once for all members
        inputs = [m.step_inputs(op, *batch, l1, l0, aux) for m, batch in zip(self.members, self._batches(op, x, target, mask))]
        with inputs[0].autocast_off:
            if not (any(member.dense for member in inputs) or checks.autocasting(x.device)) and (slots := _slots(inputs)) is not None:
                return _JointPass(self, inputs, slots).run()
            whole: dict[Any, tuple[Tensor, Tensor]] = {}
            for member in inputs:
                if _place(member.target) not in whole:
                    whole[_place(member.target)] = spread(member.target)
            return self._stacked([step(member, whole[_place(member.target)]) for member in inputs])

    def _stacked(self, results: list[tuple[Metrics, dict[str, Gradient]]]) -> tuple[Metrics, dict[str, Gradient]]:
        """From those of each member."""
        metrics = Metrics(*(torch.stack(values) for values in zip(*(metrics for metrics, _ in results))))
        return metrics, {name: _stacked([gradients[name] for _, gradients in results]) for name, _ in self.named_parameters()}

    def _batches(self, op: str, x: Tensor, target: Tensor | None, mask: Tensor | None) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
        """(x, target, mask) of each member."""
        n = len(self._members)
        mask = None if mask is None else checks.mask(op, "mask", mask)
        columns = []
        for name, value, own, meaning in (("x", x, 3, "D"), ("target", target, 3, "d_out"), ("mask", mask, 2, "")):
            if value is None:
                columns.append([None] * n)
                continue
            checks.tensor(op, name, value, (torch.bool,) if name == "mask" else checks.FLOATS)
            if value.dim() not in (own, own - 1) or (value.dim() == own and value.shape[0] != n):
                tail = f", {meaning}" if meaning else ""
                raise ValueError(f"{op}: {name} must have shape [B{tail}] or [E={n}, B{tail}], got {list(value.shape)}")
            columns.append(list(value) if value.dim() == own else [value] * n)
        if target is None and mask is not None and x.dim() == 2 and mask.dim() == 1:  # one selection for all
            checks.shape(op, "mask", mask, tuple(x.shape[:-1]), str(list(x.shape[:-1])))
            columns = [[x[mask]] * n, [None] * n, [None] * n]
        return list(zip(*columns))

    @torch.no_grad()
    def init_from(self, x: Tensor, target: Tensor | None = None, *, mask: Tensor | None = None, **options: Any) -> Self:
        """``SAE.init_from`` of every member; x, target and mask as in ``step_gradients``."""
        for member, (rows, wanted, chosen) in zip(self.members, self._batches("SAEs.init_from", x, target, mask)):
            member.init_from(rows, wanted, mask=chosen, **options)
        return self

    # ------------------------------------------------------------ files

    def config(self) -> dict[str, Any]:
        """The members' configurations, for ``from_config``."""
        return {"dictionaries": [member.config() for member in self._members]}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **options: Any) -> SAEs:
        return cls(of_config(member, **options) for member in config["dictionaries"])

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """``SAE.save`` of member e into the folder ``e`` of this folder, all of them or, where that fails, none."""
        return modules.save_stack(self.members, folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: torch.device | str | None = None) -> SAEs:
        """Reads a folder that ``save`` has written; in evaluation mode. ValueError where it is damaged or of several saves."""
        members = modules.load_stack(of_config, folder, device)
        for member in members:  # as in one SAE: no step may change rows that are not of norm 1, and all members step alike
            member.normalise_decoder = all(other.normalise_decoder for other in members)
        return cls(members).eval()


def _slots(inputs: list[Inputs]) -> list[Slots] | None:
    """Latents of each member for one call of each further operation, or None where that does not serve: several prefixes, a gate, a skip,
    AuxK, ``jump``, normalised rows, crosscoders, members with different bandwidths, numbers of latents or tokens."""
    w = inputs[0].weights
    if any(member.terms.jump is not None or member.rows is not None for member in inputs):
        return None
    if len(w.prefixes) > 1 or w.skip is not None or w.r_mag is not None or w.layers > 1 or any(member.terms.aux for member in inputs):
        return None
    if len({(m.x.shape[0], m.x.dtype, bool(m.terms.l0), m.weights.bandwidth) for m in inputs}) > 1:
        return None
    slots = [encode_slots(*member.cast, member.activation) for member in inputs]
    return None if slots[0].crow is None and len({s.values.shape for s in slots}) > 1 else slots


def _stacked(parts: list[Gradient]) -> Gradient:
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) == len(parts):
        return torch.stack(tensors)
    tiles = [part for part in parts if isinstance(part, TiledGradient) and part.settled]
    return StackedGradient(len(parts), parts.__getitem__, _end_to_end(tiles) if len(tiles) == len(parts) else None)


def _end_to_end(tiles: list[TiledGradient]) -> TiledGradient:
    """The members' gradients one below the other, asked for by whole members."""
    F = tiles[0].n_features

    def compute(part: slice) -> Tensor:
        each = [(tiles[e], e * F) for e in range(part.start // F, -(-part.stop // F))]
        rows = [tile.compute(slice(max(part.start - low, 0), min(part.stop - low, F))) for tile, low in each]
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    sizes = [tile.size for tile in tiles]
    known = None if any(size is None for size in sizes) else torch.stack(sizes).sum()  # pyright: ignore[reportArgumentType]
    return TiledGradient(compute, len(tiles) * F, settled=True, block=F, size=known)


def _place(t: Tensor) -> tuple[Any, ...]:
    return t.data_ptr(), t.stride(), t.shape


def _together(rows: list[Tensor]) -> Tensor:
    """``[E, B, D]``, or ``[1, B, D]`` where all members have the same rows."""
    same = len({_place(t) for t in rows}) == 1
    return rows[0].unsqueeze(0) if same else torch.stack(rows)


class _JointPass:
    """A step of all members by one call of each operation. Rows are ``(member, token)``, features ``(member, feature)``: a member's slots
    and rows lie together, so that sums over its tokens are taken on slices of the shape that it would have alone."""

    def __init__(self, saes: SAEs, inputs: list[Inputs], slots: list[Slots]):
        self.saes, self.inputs, self.slots = saes, inputs, slots
        self.E, self.B, self.F = len(slots), inputs[0].x.shape[0], saes.W_dec.shape[1]
        self.wide, self.backend = accumulator(inputs[0].x.dtype), then_any(preference(None))
        self.W_dec, self.W_enc = saes.W_dec.detach().flatten(0, 1), saes.W_enc.detach().flatten(0, 1)
        self.values, self.passes = (torch.cat([getattr(s, name) for s in slots]) for name in ("values", "passes"))
        self.indices = torch.cat([s.indices + e * self.F for e, s in enumerate(slots)])
        self.ends, crows = [0], []
        for s in slots:
            if s.crow is not None:
                crows.append(s.crow[:-1] + self.ends[-1])
            self.ends.append(self.ends[-1] + s.values.shape[0])
        self.crow = torch.cat([*crows, crows[0].new_tensor([self.ends[-1]])]) if crows else None

    def each(self, joint: Tensor) -> list[Tensor]:
        """Of a tensor over slots, those of each member."""
        return [joint[a:b] for a, b in zip(self.ends, self.ends[1:])]

    def run(self) -> tuple[Metrics, dict[str, Gradient]]:
        wide, tokens = self.wide, max(self.B, 1)
        x, target = _together([member.x for member in self.inputs]), _together([member.target for member in self.inputs])
        terms = [member.terms for member in self.inputs]
        values, indices, crow = self.values, self.indices, self.crow
        # In place wherever a result is not needed: fresh pages for [E, B, D] cost more than the arithmetic.
        partial = DECODE(values, indices, crow, self.W_dec, None, backend=self.backend).to(wide)
        x_hats = partial.reshape(self.E, self.B, self.saes.W_dec.shape[-1]).add_(self.saes.b_dec.detach().unsqueeze(1)).to(x.dtype)

        norm, magnitudes = None, [None] * self.E
        if any(t.l1 for t in terms):
            norm = torch.linalg.vector_norm(self.W_dec, dim=1, dtype=wide)
            weighed = self.each(values.to(wide).abs() * norm[indices])
            magnitudes = [part.sum() if t.l1 else None for part, t in zip(weighed, terms)]
        hits = fired(indices, values, self.E * self.F).reshape(self.E, self.F)
        runs, dead = [], []
        for e, (member, active) in enumerate(zip(self.inputs, self.each(values != 0))):
            count = active.sum()
            counted = count.to(wide) if terms[e].l0 else None
            runs.append(Pass(x_hats[e : e + 1], None, magnitudes[e], counted, count, hits[e], self.slots[e].min_kept))
            dead.append(member.observe(runs[-1]))

        each_target = target.expand(self.E, -1, -1)
        units = [spread(t)[0] if m.objective == "fvu" else x.new_full((), tokens, dtype=wide) for m, t in zip(self.inputs, each_target)]
        unit = torch.stack(units)
        scale = quotient(torch.full_like(unit, 2.0), unit).reshape(-1, 1, 1)
        G = (x_hats.to(wide) - target.to(wide)).mul_(scale).to(self.W_dec.dtype)
        gradients = self.backward(x, G, norm, [t.l1 / tokens for t in terms], [t.l0 / tokens for t in terms])
        rows = []
        for e, (member, run) in enumerate(zip(self.inputs, runs)):
            loss, fvu, l0 = combine(run, each_target[e], terms[e], member.objective, None)
            rows.append((loss, fvu, l0, dead[e].sum(), loss.new_zeros(())))
        return Metrics(*(torch.stack(column) for column in zip(*rows))), gradients

    def backward(self, x: Tensor, G: Tensor, norm: Tensor | None, l1: list[float], l0: list[float]) -> dict[str, Gradient]:
        """As ``step.SlotPass.backward``, over all members."""
        E, F, wide, backend, saes = self.E, self.F, self.wide, self.backend, self.saes
        indices, crow = self.indices, self.crow
        rows = G.flatten(0, 1)
        parts: dict[str, list[Gradient]] = {"W_dec": [RowGradient(self.values, indices, crow, rows, E * F)]}
        dvalues = DECODE_DVALUES(rows, indices, crow, self.W_dec, backend=backend)
        if norm is not None:
            rate = torch.tensor(l1, dtype=wide, device=x.device).repeat_interleave(F)
            dvalues = dvalues + (rate[indices] * norm[indices] * self.values.sign()).to(dvalues.dtype)
            sums = feature_sums(self.values.abs(), indices, crow, E * F, backend)
            parts["W_dec"].append(shrinking((rate * quotient(sums, norm)).unsqueeze(1), self.W_dec, norm.unsqueeze(1)))
        dscore = torch.where(self.passes, dvalues, 0)
        parts["b_dec"] = [torch.stack([g.sum(0, dtype=wide) for g in G])]
        sums = feature_sums(dscore, indices, crow, E * F, backend).reshape(E, F)
        w = self.inputs[0].weights
        if w.b_pre is None:
            xc = x.expand(E, -1, -1)
        else:
            xc = centre(x, saes.b_dec.detach().unsqueeze(1)).to(x.dtype)
            parts["b_dec"].append(self.pre_bias(dscore, sums))
        parts["W_enc"] = [RowGradient(dscore, indices, crow, xc.flatten(0, 1), E * F)]
        parts["b_enc"] = [sums.to(saes.b_enc.dtype)]
        if self.slots[0].flags is not None and w.threshold is not None and w.bandwidth is not None:
            flags = torch.cat([s.flags for s in self.slots])  # pyright: ignore[reportCallIssue, reportArgumentType]
            theta = saes.threshold.detach().to(wide).reshape(-1)[indices]  # pyright: ignore[reportOptionalMemberAccess]
            pull = torch.tensor(l0, dtype=wide, device=x.device).repeat_interleave(F)[indices]
            per_slot = torch.where((flags & 2).bool(), -(theta * dvalues.to(wide) + pull) / w.bandwidth, 0)
            parts["threshold"] = [feature_sums(per_slot, indices, crow, E * F, backend).reshape(E, F)]
        if saes.tied:
            parts["W_dec"] += parts.pop("W_enc")
        out: dict[str, Gradient] = {}
        for name, parameter in saes.named_parameters():
            gradients = parts[name] if name in parts else [torch.zeros_like(parameter)]
            if all(isinstance(g, Tensor) for g in gradients):
                out[name] = total(gradients).to(parameter.dtype)  # pyright: ignore[reportAttributeAccessIssue]
            else:
                out[name] = StackedGradient(E, lambda e, gradients=gradients: total([self.part(g, e) for g in gradients]), total(gradients))
        return out

    def own(self, e: int, crow: Tensor | None) -> tuple[slice, slice, Tensor | None]:
        """Member e's slots, its rows, and where its rows begin among them."""
        slots, rows = slice(self.ends[e], self.ends[e + 1]), slice(e * self.B, (e + 1) * self.B)
        return slots, rows, None if crow is None else crow[rows.start : rows.stop + 1] - self.ends[e]

    def pre_bias(self, dscore: Tensor, sums: Tensor) -> Tensor:
        """``[E, D]``: gradients of the pre-biases, each in the way that its member alone has it (``score_gradients``)."""
        b_dec, each = self.saes.b_dec, []
        for e, W_enc in enumerate(self.W_enc.detach().reshape(self.E, self.F, -1)):
            slots, _, crow = self.own(e, self.crow)
            if by_features(False, self.F, self.indices[slots].numel()):
                each.append(pre_bias_gradient(sums[e], W_enc, b_dec, self.backend))
                continue
            dx = DECODE(dscore[slots], self.indices[slots] - e * self.F, crow, W_enc, None, backend=self.backend)
            each.append(-dx.sum(0, dtype=self.wide).to(b_dec.dtype))
        return torch.stack(each)

    def part(self, gradient: Gradient, e: int) -> Gradient:
        """Member e's part of a gradient over all features."""
        if isinstance(gradient, TiledGradient):
            low = e * self.F
            return TiledGradient(lambda tile: gradient.compute(slice(tile.start + low, tile.stop + low)), self.F, size=gradient.size)
        assert isinstance(gradient, RowGradient)
        slots, rows, crow = self.own(e, gradient.crow)
        return RowGradient(gradient.values[slots], gradient.indices[slots] - e * self.F, crow, gradient.rows[rows], self.F)
