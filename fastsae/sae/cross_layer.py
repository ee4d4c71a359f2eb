"""Cross-layer transcoder: the latents of each layer write to this layer and all later ones. Each layer is a transcoder, an ``SAE``, whose
output is all its targets side by side, so that one decode serves them; the rows of the outputs, and of their gradient, are shared.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, Literal, cast

import torch
from torch import Tensor, nn

from fastsae._core import checks
from fastsae._core.world import World
from fastsae.formats import cross_layer, modules
from fastsae.gradients import Gradient
from fastsae.latents import Latents, RaggedLatents
from fastsae.ops.encode import encode_batch_topk, encode_threshold
from fastsae.reference import accumulator
from fastsae.sae import autograd, selection
from fastsae.sae.activations import Activation, BatchTopK, Gated, Kind, L, TopK
from fastsae.sae.inputs import Encoded, Inputs, checked_terms, counted
from fastsae.sae.losses import AuxK, AuxOption, Loss, Metrics, Pass, Terms, combine, layer_fvu, spread
from fastsae.sae.module import SAE
from fastsae.sae.processes import Wrapped
from fastsae.sae.step import SlotPass, Slots, Sum, aux_step, backward, forward


class _Shared:
    """A setting of all layers."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, clt: Any, owner: type | None = None) -> Any:
        return self if clt is None else getattr(clt.layers[0], self.name)

    def __set__(self, clt: Any, value: Any) -> None:
        for layer in clt.layers:
            setattr(layer, self.name, value)


class CrossLayerTranscoder(Wrapped, Generic[L]):
    """Layer l reads ``x[l]``; its latents write to the layers l .. L - 1:

        ``latents[l] = activation(W_enc[l] x[l] + b_enc[l])``
        ``y[m] = b_dec[m] + sum over l <= m of W_dec[l][:, m - l]^T latents[l]  (+ W_skip[l -> m] x[l])``

    ``layers[l]`` is an ordinary transcoder ``SAE(d_model, d_sae, d_out=(L - l) * d_model)``, its targets side by side, and the module's
    output is the sum of theirs. Parameters are those of the layers: ``layers.l.W_enc [F, d_model]``, ``layers.l.b_enc [F]``,
    ``layers.l.W_dec [F, (L - l) * d_model]``, ``layers.l.threshold [F]`` (JumpReLU), and ``layers.0.b_dec [L * d_model]``, the bias of
    all; the other layers' ``b_dec`` are 0 and frozen; with ``skip`` ``layers.l.W_skip [(L - l) * d_model, d_model]``. ``W_dec(l)`` and
    ``b_dec`` are views in the shapes above.

    TopK, JumpReLU and ReLU are of each layer. BatchTopK in training mode is one selection over tokens, layers and features: the
    ``int(k * tokens * L)`` largest positive scores, equal ones by layer, then token, then feature (in half precision, of rounded scores);
    in evaluation mode the scores above the running threshold, which all layers share.

    ``l1`` weighs a latent with the norm of its feature's decoder rows side by side (Ameisen et al. 2025). ``aux``: the dead features of
    each layer reconstruct the error of the layers they write to; the term is the sum over layers.

    Args:
        n_layers: L, at least 1. d_model: width of inputs and outputs. d_sae: features F of each layer.
        activation: ``TopK``, ``AbsTopK``, ``BatchTopK``, ``JumpReLU`` or ``ReLU``.
        skip: a linear path past the dictionary from each layer to those it writes to (starts at 0).
        l1, l0, aux, dead_after, dense, dtype, device: as in ``SAE``. seed: of layer 0; layer l has ``seed + l``.

    ``optim.Adam(clt).step(x, target)`` trains it, exactly as one step of ``loss`` and dense Adam would. Memory of a step beyond weights and
    moments: the latents, a few ``[B, L * d_model]``; no gradient of a weight's size.

    Raises: TypeError, ValueError as ``SAE``; ValueError: ``Gated``.

    Source: Lindsey et al. 2024 ("Sparse Crosscoders"); Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in
    Language Models".

    Example:
        >>> clt = fastsae.sae.CrossLayerTranscoder(3, 64, 512, fastsae.TopK(8), seed=0)
        >>> x, target = torch.randn(2, 256, 3, 64)  # inputs and outputs of the MLPs of three layers
        >>> metrics = fastsae.optim.Adam(clt, lr=3e-4).step(x, target)
    """

    layers: nn.ModuleList
    unit_rows: tuple[str, ...] = ()
    k, l1, l0, aux, dead_after = _Shared(), _Shared(), _Shared(), _Shared(), _Shared()
    averaged: Any = _Shared()

    def __init__(
        self,
        n_layers: int,
        d_model: int,
        d_sae: int,
        activation: Kind[L] = TopK(64),  # noqa: B008 (a frozen dataclass)
        *,
        skip: bool = False,
        l1: float = 0.0,
        l0: float = 0.0,
        aux: AuxK | None = None,
        dead_after: int = 10_000_000,
        dense: bool | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ):
        n_layers = checks.integer("CrossLayerTranscoder", "n_layers", n_layers, 1)
        d_model = checks.integer("CrossLayerTranscoder", "d_model", d_model, 1)
        options: dict[str, Any] = {"l1": l1, "l0": l0, "aux": aux, "dead_after": dead_after, "dense": dense, "dtype": dtype, "skip": skip}
        seeds = [None if seed is None else seed + number for number in range(n_layers)]
        self._hold(
            SAE(d_model, d_sae, activation, d_out=(n_layers - number) * d_model, device=device, seed=own, **options)
            for number, own in enumerate(seeds)
        )

    def _hold(self, layers: Iterable[SAE]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        first = self[0]
        self.n_layers, self.d_model, self.d_sae, self.skip = len(self), first.d_in, first.d_sae, first.skip
        if isinstance(first.activation, Gated):
            raise ValueError("CrossLayerTranscoder: activation must be TopK, AbsTopK, BatchTopK, JumpReLU or ReLU, got Gated")
        for layer in [*self][1:]:
            layer.b_dec.requires_grad_(False)

    @classmethod
    @torch.no_grad()
    def of(cls, layers: Sequence[SAE]) -> CrossLayerTranscoder:
        """Made of transcoders, which become its layers: layer l of L with ``d_out = (L - l) * d_in``, alike in all else; their ``b_dec``
        are added up in layer 0's. ValueError otherwise."""
        first, n = layers[0], len(layers)
        for number, layer in enumerate(layers):
            wanted = {**first.config(), "d_out": (n - number) * first.d_in}
            got = {**layer.config(), "transcoder": layer.transcoder}
            if isinstance(layer.activation, BatchTopK) or not layer.skip:
                wanted["pre_bias"], wanted["transcoder"] = False, True
            if wrong := [name for name in got if got[name] != wanted.get(name)]:
                message = f"layer {number} of {n} must have {wrong[0]}={wanted.get(wrong[0])!r}, got {got[wrong[0]]!r}"
                raise ValueError(f"CrossLayerTranscoder: {message}")
        if first.tied or first.prefixes or first.jump or first.normalise_rows:
            raise ValueError("CrossLayerTranscoder: its layers have no tied weights, prefixes, jump or normalise_rows")
        made = cls.__new__(cls)
        made._hold(layers)
        for number, layer in enumerate(layers[1:], 1):
            made.b_dec[number:] += layer.b_dec.view(n - number, -1)
            layer.b_dec.zero_()
        return made.train(first.training)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, number: int) -> SAE:
        return cast(SAE, self.layers[number])

    def __iter__(self) -> Iterator[SAE]:
        return iter(cast(Any, self.layers))

    @property
    def activation(self) -> Activation:
        return self[0].activation

    @property
    def world(self) -> World:
        """The processes that hold the layers."""
        return self[0].world

    @property
    def b_dec(self) -> Tensor:
        """``[L, d_model]``, a view."""
        return self[0].b_dec.view(self.n_layers, self.d_model)

    def W_dec(self, number: int) -> Tensor:
        """``[F, L - number, d_model]``: what layer ``number`` writes to itself and the later ones; a view."""
        return self[number].W_dec.unflatten(1, (-1, self.d_model))

    @property
    def dead_features(self) -> Tensor:
        """``[L, F]`` bool: silent for ``dead_after`` tokens."""
        return torch.stack([layer.dead_features for layer in self])

    def weights_changed(self) -> None:
        """As in ``SAE``, of every layer."""
        for layer in self:
            layer.weights_changed()

    def buffers_changed(self) -> None:
        """As in ``SAE``, of every layer."""
        for layer in self:
            layer.buffers_changed()

    # ------------------------------------------------------------ latents and back

    def _rows(self, op: str, name: str, t: Tensor, like: Tensor) -> Tensor:
        checks.tensor(op, name, t, like=like)
        if t.dim() < 2 or t.shape[-2:] != (self.n_layers, self.d_model):
            want = f"[.., L={self.n_layers}, D={self.d_model}]"
            raise ValueError(f"{op}: {name} must have shape {want}, got {list(t.shape)}")
        if not checks.autocasting(t.device):
            checks.narrower(op, name, t, "the parameters", like)
        return checks.widened(t, like)

    def encode(self, x: Tensor) -> list[L]:
        """``[.., L, d_model]`` to the latents ``[.., F]`` of each layer."""
        x = self._rows("CrossLayerTranscoder.encode", "x", x, self[0].W_dec)
        if not self._joint:
            return [cast(Any, layer.encode(x[..., number, :])) for number, layer in enumerate(self)]
        found, _ = self._encode(x.reshape(-1, self.n_layers, self.d_model))
        return [cast(Any, replace(latents, batch_shape=tuple(x.shape[:-2]))) for latents in found]

    def decode(self, latents: Sequence[Latents], x: Tensor | None = None) -> Tensor:
        """The latents of each layer to ``[.., L, d_model]``; with ``skip`` also the input."""
        op = "CrossLayerTranscoder.decode"
        if len(latents) != self.n_layers:
            raise ValueError(f"{op}: latents must be those of {self.n_layers} layers, got {len(latents)}")
        if not self.skip:
            return self._sum([layer.decode(each) for each, layer in zip(latents, self)])
        if x is None:
            raise ValueError(f"{op}: x must be given, the skip connections need it")
        x = self._rows(op, "x", x, self[0].W_dec)
        return self._sum([layer.decode(each, x[..., number, :]) for number, (each, layer) in enumerate(zip(latents, self))])

    def _sum(self, parts: Sequence[Tensor]) -> Tensor:
        """``[.., L, d_model]`` of what each layer has written."""
        width = parts[0].shape[-1]
        y = parts[0]
        for part in parts[1:]:
            y = y + nn.functional.pad(part, (width - part.shape[-1], 0))
        return y.unflatten(-1, (self.n_layers, self.d_model))

    def forward(self, x: Tensor) -> Tensor:
        """``[.., L, d_model]`` of inputs to outputs."""
        return self.decode(self.encode(x), x)

    @torch.no_grad()
    def fvu(self, x: Tensor, target: Tensor) -> Tensor:
        """``[L]``: each output's fraction of variance unexplained, ``sum (t - y)^2 / sum (t - mean t)^2`` over rows; 0/0 = 0."""
        y = self(x)
        return layer_fvu(y, self._rows("CrossLayerTranscoder.fvu", "target", target, y))

    @property
    def _joint(self) -> bool:
        return self.training and isinstance(self.activation, BatchTopK)

    def _encode(self, x: Tensor) -> tuple[list[RaggedLatents], Tensor]:
        """BatchTopK over all layers of rows ``[B, L, d_model]``, and the smallest score kept. Of a sharded dictionary the latents that are
        features of this process, of the rows of ``world.share``.

        Candidates are the scores above a bound: what last time's threshold says, and where these are too few, what no more than the number
        to be kept can lie above, from a selection of each layer alone.
        """
        assert isinstance(self.activation, BatchTopK)
        world, every = self.world, x.shape[0]
        total, running = int(self.activation.k * every * self.n_layers), self[0].running_threshold.to(accumulator(x.dtype))
        x = world.share(x)
        found = self._above(x, 0.9 * running) if total and bool(running > 0) else []
        there = sum(latents.values.numel() for latents in found)
        if not found or (there if world.virtual == 1 else int(world.count(torch.tensor(there, device=x.device)))) < total:
            found = self._above(x, self._bound(x.detach(), total))
        values = torch.cat([latents.values for latents in found]).detach()
        if world.virtual > 1:
            places = every * world.features  # of a layer
            place = [selection.place(latents.slots, world) + n * places for n, latents in enumerate(found)]
            kept, least = selection.largest(values, torch.cat(place), places * self.n_layers, total, world)
        else:
            order = values.argsort(descending=True, stable=True)[:total]  # NaN first
            kept = torch.zeros_like(values, dtype=torch.bool).index_fill_(0, order, True)
            least = values[order[-1]] if len(order) else values.new_full((), torch.inf)
        return [_only(latents, mask) for latents, mask in zip(found, kept.split([each.values.numel() for each in found]))], least

    def _above(self, x: Tensor, bound: Tensor | float) -> list[RaggedLatents]:
        return [encode_threshold(x[:, n], layer.W_enc, layer.b_enc, threshold=bound) for n, layer in enumerate(self)]

    @torch.no_grad()
    def _bound(self, x: Tensor, total: int) -> Tensor | float:
        """Just below the ``total``-th largest score; 0 where there are not so many, the largest number where none is asked for."""
        if total == 0:
            return torch.finfo(x.dtype).max
        most = x.shape[0] * self[0].W_enc.shape[0]  # of a layer
        each = min(-(-total // self.n_layers), most)
        while each:
            k = (each + 0.5) / x.shape[0]
            found = [encode_batch_topk(x[:, n], layer.W_enc, layer.b_enc, k=k)[0].values for n, layer in enumerate(self)]
            values = torch.cat(found)
            if len(values) >= total:
                last = values.nan_to_num(torch.inf, torch.inf).topk(total).values[-1]
                return torch.nextafter(last, torch.zeros_like(last))
            if each == most or all(len(own) < each for own in found):
                break
            each = min(2 * each, most)
        return 0.0

    # ------------------------------------------------------------ training

    def _inputs(
        self, op: str, x: Tensor, target: Tensor | None, mask: Tensor | None, l1: Any, l0: Any, aux: AuxOption
    ) -> tuple[list[Inputs], Tensor, Terms]:
        """Of each layer; the targets that count, ``[B, L * d_model]``; the terms of all."""
        if target is None:
            raise ValueError(f"{op}: target must be given, what the layers are to write")
        x, target = (self._rows(op, name, t, self[0].W_dec) for name, t in (("x", x), ("target", target)))
        checks.shape(op, "target", target, tuple(x.shape), str(list(x.shape)))
        if mask is not None:
            mask = checks.mask(op, "mask", mask, x)
            checks.shape(op, "mask", mask, tuple(x.shape[:-2]), str(list(x.shape[:-2])))
            x, target = x[mask], target[mask]
        x, target = x.reshape(-1, *x.shape[-2:]), target.reshape(-1, self.n_layers * self.d_model)
        terms = checked_terms(op, self[0], l1, l0, aux)
        x, target = self._all(op, x, target, terms)
        wanted = [target[:, number * self.d_model :] for number in range(self.n_layers)]  # views
        given = terms.l1, terms.l0, terms.aux or False
        inputs = [SAE.step_inputs(layer, op, x[:, n], wanted[n], None, *given) for n, layer in enumerate(self)]  # all rows are here
        if self._joint:
            latents, least = self._encode(x)
            inputs = [own._replace(encode=_known(Encoded(each, None, least))) for own, each in zip(inputs, latents)]
        return inputs, target, terms

    def _all(self, op: str, x: Tensor, target: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
        """The rows of all processes."""
        return x, target

    def loss(
        self,
        x: Tensor,
        target: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        l1: float | None = None,
        l0: float | None = None,
        aux: AuxOption = None,
    ) -> Loss:
        """Mean squared error a token, summed over layers and d_model, plus the penalties and AuxK terms of every layer.

        Args: x, target: ``[.., L, d_model]``, both needed. mask: ``[..]``. The rest as in ``SAE.loss``.

        Returns: ``Loss(loss, fvu, l0)``; fvu over all layers' outputs, l0 latents a token of all layers. In a process group it raises where
        ``SAE.loss`` does.
        """
        inputs, target, terms = self._inputs("CrossLayerTranscoder.loss", x, target, mask, l1, l0, aux)
        self._refuse_loss("CrossLayerTranscoder.loss", counted(inputs[0]))
        runs = [autograd.forward(own) for own in inputs]
        dead = [own.observe(run) for own, run in zip(inputs, runs)]
        y = self._sum([run.x_hats[0] for run in runs]).flatten(1)
        term = None
        if terms.aux is not None:
            each = [autograd.aux_term(own, y[:, -own.target.shape[1] :], of, terms.aux) for own, of in zip(inputs, dead)]
            term = _added(each)
        return combine(_merged(runs, y), target, terms, "mse", term)

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
        """As ``SAE.step_gradients``, of ``loss``; ``dead`` counts the dead features of all layers."""
        inputs, target, terms = self._inputs("CrossLayerTranscoder.step_gradients", x, target, mask, l1, l0, aux)
        self._refuse_past_wrapper("CrossLayerTranscoder.step_gradients", forwarding=False)
        with inputs[0].autocast_off:
            return self._step(inputs, target, terms)

    def _step(self, inputs: Sequence[Inputs], target: Tensor, terms: Terms) -> tuple[Metrics, dict[str, Gradient]]:
        wide, tokens, world = accumulator(inputs[0].cast[0].dtype), max(target.shape[0], 1), self.world
        y, passes, runs, dead = torch.zeros_like(target, dtype=wide), [], [], []
        partial = y.new_zeros(world.share(y).shape[0] * (len(world.cuts) - 1), y.shape[1]) if world.virtual > 1 else y
        for own in inputs:
            this, run = forward(own, _slots(own.encode(own.x)) if self._joint else None, outputs=world.virtual == 1)
            dead.append(own.observe(run))
            if isinstance(this, SlotPass) and world.virtual > 1:  # only what all layers have written is sent to the rows' owners
                run = run._replace(x_hats=selection.by_shard(this.grouped, own.weights.W_dec, world).unsqueeze(0))
            partial[:, -own.target.shape[1] :] += run.x_hats[0]
            this.run = run._replace(x_hats=run.x_hats[:, :0])  # its room serves the next layer
            passes.append(this)
            runs.append(this.run)
        if world.virtual > 1:
            y = world.gather(selection.at_home(partial, world)[0]) + self[0].b_dec
            for own in inputs:
                if own.weights.skip is not None:
                    y[:, -own.target.shape[1] :] += selection.skipped(own.x, own.weights.skip, world)
        y = y.to(inputs[0].cast[0].dtype)
        grads = y.to(wide) - target.to(wide)
        error = world.sum(grads.square())
        G = grads.mul_(2 / tokens).to(inputs[0].weights.W_dec.dtype)
        gradients: dict[str, Gradient] = {}
        terms_of_aux = []
        for number, (own, this, of) in enumerate(zip(inputs, passes, dead)):
            grad, width = Sum(), own.target.shape[1]
            if number == 0:
                grad.add("b_dec", world.row_sum(G))
            (x, w), absolute = own.cast, own.activation.absolute
            if w.skip is not None:
                grad.add("W_skip", selection.skip_gradient(G[:, -width:], x, world))
            backward(grad, this, G[:, -width:].unsqueeze(0), None, terms.l1 / tokens, terms.l0 / tokens)
            if terms.aux is not None:
                terms_of_aux.append(aux_step(grad, x, own.target, y[:, -width:], of, w, terms.aux, absolute, world))
            gradients |= {f"layers.{number}.{name}": each for name, each in grad.result(own.parameters).items()}
        aux = _added(terms_of_aux)
        loss, fvu, l0 = combine(_merged(runs, y), target, terms, "mse", aux, error.unsqueeze(0), spread(target, world), world)
        n_dead = world.count(torch.stack(dead).sum()) // world.copies
        return Metrics(loss, fvu, l0, n_dead, loss.new_zeros(()) if aux is None else aux), gradients

    # ------------------------------------------------------------ files

    def config(self) -> dict[str, Any]:
        """The layers' configurations, for ``from_config``."""
        return {"layers": [layer.config() for layer in self]}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **options: Any) -> CrossLayerTranscoder:
        return cls.of([SAE.from_config(layer, **options) for layer in config["layers"]])

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """``SAE.save`` of layer l into the folder ``l`` of this folder, all of them or, where that fails, none."""
        return modules.save_stack([*self], folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: torch.device | str | None = None) -> CrossLayerTranscoder:
        """Reads a folder that ``save`` has written; in evaluation mode. ValueError where it is damaged or of several saves."""
        return cls.of(modules.load_stack(SAE.from_config, folder, device))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        format: Literal["circuit_tracer", "gemma_scope_2"] | None = None,  # noqa: A002
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> CrossLayerTranscoder:
        """Reads a folder of circuit-tracer's cross-layer files, ``W_enc_0.safetensors``, ``W_dec_0.safetensors`` and so on, or of Gemma
        Scope 2's, ``params_layer_0.safetensors`` and so on; in evaluation mode. JumpReLU where they hold thresholds, else ReLU. An affine
        skip connection of Gemma Scope 2's is the part of ``W_skip`` that writes to its own layer, the rest is 0.

        Raises: FileNotFoundError; ValueError: a file that is missing, damaged or does not fit the others, circuit-tracer's threshold
        below 0, affine skip connections of some layers only, a layer that writes to earlier ones.
        """
        op = "CrossLayerTranscoder.from_pretrained"
        if format not in (None, "circuit_tracer", "gemma_scope_2"):
            raise ValueError(f"{op}: format must be 'circuit_tracer', 'gemma_scope_2' or None, got {format!r}")
        try:
            return cls.of([modules.made(SAE.from_config, loaded, dtype, device) for loaded in cross_layer.read(folder, format)])
        except ValueError as error:
            raise ValueError(f"{op}: {folder}: {error}") from error

    def save_pretrained(self, folder: str | os.PathLike[str], *, format: Literal["circuit_tracer"] = "circuit_tracer") -> Path:  # noqa: A002
        """Writes circuit-tracer's cross-layer files, which ``load_clt`` there reads. ReLU, JumpReLU, and BatchTopK as a JumpReLU at its
        running threshold; ValueError for another, and for ``skip``, which ``load_clt`` does not read."""
        op = "CrossLayerTranscoder.save_pretrained"
        if format != "circuit_tracer":
            raise ValueError(f"{op}: format must be 'circuit_tracer', got {format!r}")
        return cross_layer.write(op, folder, [layer.portable() for layer in self])


def _known(encoded: Encoded) -> Any:
    return lambda x: encoded


def _slots(encoded: Encoded) -> Slots:
    latents: Any = encoded.latents
    return Slots(latents.values, latents.col, latents.crow, ~latents.values.isnan(), min_kept=encoded.min_kept)


def _only(latents: RaggedLatents, kept: Tensor) -> RaggedLatents:
    """Those of some slots."""
    crow = torch.cat([latents.crow.new_zeros(1), kept.cumsum(0)])[latents.crow]
    return replace(latents, values=latents.values[kept], crow=crow, col=latents.col[kept])


def _added(terms: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of those that are there."""
    there = [term for term in terms if term is not None]
    return torch.stack(there).sum() if there else None


def _merged(runs: Sequence[Pass], y: Tensor) -> Pass:
    """The passes of all layers as one."""
    sums: dict[str, Any] = {name: _added([getattr(run, name) for run in runs]) for name in ("magnitude", "counted", "active")}
    return runs[0]._replace(x_hats=y.unsqueeze(0), **sums)
