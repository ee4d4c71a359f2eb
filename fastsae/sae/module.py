"""A sparse autoencoder or transcoder as a torch module, on the fused operations; trains with any torch optimiser or by fused steps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastsae._core import checks, files, finite, processes, seeds
from fastsae._core.precision import full_precision
from fastsae.formats import pretrained, weight_files
from fastsae.gradients import Gradient
from fastsae.latents import Latents
from fastsae.ops.decode import decode
from fastsae.ops.encode import encode_batch_topk, encode_gated, encode_threshold, encode_topk
from fastsae.packed import PackedWeights
from fastsae.reference import accumulator
from fastsae.sae import step as _step
from fastsae.sae import tiles
from fastsae.sae.activations import Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from fastsae.sae.losses import (
    AuxK,
    Loss,
    Metrics,
    Pass,
    Terms,
    Weights,
    aux_denominator,
    combine,
    dead_share,
    features,
    fired,
    quotient,
    squares,
)
from fastsae.sae.reconstruction import Reconstruction

_PAST = (
    "it was called past DistributedDataParallel(sae), which averages gradients only of its own forward: wrap a module whose forward "
    "returns sae.loss(x).loss"
)


class SAE(nn.Module):
    """Sparse autoencoder: ``latents = activation(W_enc (x - b_dec) + b_enc)``, ``x_hat = W_dec^T latents + b_dec``.

    With ``d_out`` it is a transcoder: it reconstructs a ``target`` from ``x``, ``b_dec [d_out]`` is not subtracted from ``x``, and ``skip``
    adds ``W_skip x``. ``pre_bias`` says otherwise.

    Parameters: ``W_enc [F, D]``, ``b_enc [F]``, ``W_dec [F, d_out]`` (unit rows at the start), ``b_dec [d_out]``, feature-major; JumpReLU:
    ``threshold [F]``, raw (scores are compared with ``max(threshold, 0)``, so that one below 0 acts as ReLU and is still pulled back
    by the scores in its band; a logarithm would rescale its gradient and other libraries' files hold raw thresholds); Gated:
    ``b_gate, r_mag, b_mag [F]`` in place of ``b_enc``; ``W_skip [d_out, D]``. Buffers: ``silent [F]``, tokens since each feature last
    fired; ``running_threshold []`` (BatchTopK); ``scale [2]``, of ``init_from``'s normalisation.

    In training mode ``loss`` and ``step_gradients`` count silent features and move the running threshold; BatchTopK selects over the
    batch. In evaluation mode they leave the buffers alone and BatchTopK keeps the scores above its running threshold.

    Activations may have a narrower dtype than the parameters (a half-precision model's beside a float32 SAE): they are widened, and
    latents and reconstruction have the parameters' dtype. A wider one is a TypeError: cast it.

    Args:
        d_in: activation dimension D, at least 1.
        d_sae: number of features F, at least 1.
        activation: ``TopK(k)``, ``BatchTopK(k)``, ``ReLU()`` (train with ``l1``), ``JumpReLU(threshold, bandwidth)`` (train with ``l0``) or
            ``Gated()`` (train with ``l1``; its loss has the gate's reconstruction error as a further term, arXiv 2404.16014).
        prefixes: ascending dictionary sizes that end in F: the loss is the mean over the reconstructions from the features below each
            (Matryoshka, arXiv 2503.17547).
        d_out: dimension of the target of a transcoder, D or another.
        skip: a transcoder's linear path past the dictionary (starts at 0).
        tied: encoder and decoder are one parameter, ``W_dec`` (``W_enc`` is another name of it).
        pre_bias: subtract ``b_dec`` from ``x`` first; default: yes, but not for transcoders (True needs ``d_out = d_in``).
        objective: "mse", squared error a token (summed over d_out), or "fvu", fraction of variance unexplained.
        l1, l0, aux: the loss's further terms where a call gives none; see ``loss`` and ``AuxK``.
        dead_after: tokens without firing after which a feature counts as dead.
        normalise_decoder: decoder rows are meant to stay of norm 1, see ``unit_rows``; default: yes, but not for transcoders.
        dense: run the loss tile by tile over F; None: where more than 1/8 of the scores would be stored, by a sample of them
            (ReLU, JumpReLU, Gated).
        dtype, device: of the parameters; None: torch's default device, as for torch's modules.
        seed: of the decoder's random directions; None draws from torch's global generator.

    Raises: TypeError, ValueError as the operations do.
    """

    b_enc: nn.Parameter  # None with Gated
    W_skip: nn.Parameter | None
    silent: Tensor
    scale: Tensor
    running_threshold: Tensor
    _wrapped = False  # by DistributedDataParallel

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        activation: Activation = TopK(64),  # noqa: B008 (a frozen dataclass)
        *,
        prefixes: Sequence[int] | None = None,
        d_out: int | None = None,
        skip: bool = False,
        tied: bool = False,
        pre_bias: bool | None = None,
        objective: Literal["mse", "fvu"] = "mse",
        l1: float = 0.0,
        l0: float = 0.0,
        aux: AuxK | None = None,
        dead_after: int = 10_000_000,
        normalise_decoder: bool | None = None,
        dense: bool | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ):
        super().__init__()
        device = torch.get_default_device() if device is None else torch.device(device)
        d_in = checks.integer("SAE", "d_in", d_in, 1)
        d_sae = checks.integer("SAE", "d_sae", d_sae, 1)
        activation = _checked_activation(activation, d_sae)
        if d_out is not None:
            d_out = checks.integer("SAE", "d_out", d_out, 1)
        for name, value in (("skip", skip), ("tied", tied), ("normalise_decoder", normalise_decoder), ("dense", dense)):
            if value is not None or name in ("skip", "tied"):
                checks.flag("SAE", name, value)
        if skip and d_out is None:
            raise ValueError("SAE: skip needs d_out (an autoencoder could copy its input through it)")
        pre_bias = d_out is None if pre_bias is None else checks.flag("SAE", "pre_bias", pre_bias)
        if pre_bias and d_out not in (None, d_in):
            raise ValueError(f"SAE: pre_bias needs d_out = d_in = {d_in}, got d_out={d_out}")
        if tied and d_out not in (None, d_in):
            raise ValueError(f"SAE: tied needs d_out = d_in = {d_in}, got d_out={d_out}")
        if prefixes is not None:
            prefixes = [checks.integer("SAE", "prefixes", size, 1, d_sae, f"d_sae={d_sae}") for size in prefixes]
            if prefixes != sorted(set(prefixes)) or not prefixes or prefixes[-1] != d_sae:
                raise ValueError(f"SAE: prefixes must ascend strictly and end in d_sae={d_sae}, got {prefixes}")
        if objective not in ("mse", "fvu"):
            raise ValueError(f"SAE: objective must be 'mse' or 'fvu', got {objective!r}")
        dead_after = checks.integer("SAE", "dead_after", dead_after, 1)
        if dtype not in checks.FLOATS:
            raise TypeError(f"SAE: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
        self.d_in, self.d_sae, self.activation = d_in, d_sae, activation
        self.transcoder, self.d_out, self.skip, self.tied = d_out is not None, d_out or d_in, skip, tied
        self.pre_bias, self.prefixes, self.objective, self.dead_after, self.dense = pre_bias, prefixes, objective, dead_after, dense
        self.normalise_decoder = not self.transcoder if normalise_decoder is None else normalise_decoder
        self.l1, self.l0, self.aux = l1, l0, aux
        self.l1, self.l0, _ = self._terms("SAE", None, None, None)

        generator = None
        if seed is not None:
            generator = torch.Generator().manual_seed(checks.integer("SAE", "seed", seed, -(2**63), 2**64 - 1))

        def directions(width: int) -> Tensor:
            if device.type == "meta":
                return torch.empty(d_sae, width, device=device, dtype=dtype)
            rows = seeds.normal(generator, d_sae, width)
            return (rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)).to(device=device, dtype=dtype)

        W = directions(self.d_out)

        def vector(start: float | Tensor | None) -> nn.Parameter:
            if isinstance(start, Tensor):
                return nn.Parameter(W.new_zeros(d_sae) + start.detach().to(W))
            number = torch.tensor(start or 0.0, dtype=torch.float64, device="cpu").to(dtype).item()  # infinite beyond the dtype
            return nn.Parameter(W.new_full((d_sae,), number))  # no sum: on the meta device torch's compiler would be imported for it

        if not tied:
            self.W_enc = nn.Parameter(W.clone() if self.d_out == d_in else directions(d_in))
        if isinstance(activation, Gated):
            self.register_parameter("b_enc", None)
            self.b_gate, self.r_mag, self.b_mag = (vector(start) for start in (activation.b_gate, activation.r_mag, activation.b_mag))
        else:
            self.b_enc = vector(0.0)
        self.W_dec = nn.Parameter(W)
        if tied:
            self.W_enc = self.W_dec
        self.b_dec = nn.Parameter(W.new_zeros(self.d_out))
        self.W_skip = nn.Parameter(W.new_zeros(self.d_out, d_in)) if skip else None
        if isinstance(activation, JumpReLU):
            self.threshold = vector(activation.threshold)
        self.register_buffer("silent", torch.zeros(d_sae, dtype=torch.int64, device=device))
        self.register_buffer("scale", torch.ones(2, device=device, dtype=torch.float32))
        if isinstance(activation, BatchTopK):
            self.register_buffer("running_threshold", torch.full((), -1.0, device=device, dtype=torch.float32))
        self._scaled = False
        self._packed: PackedWeights | None = None
        self._use_packed = False

    def extra_repr(self) -> str:
        more = [f"{name}={getattr(self, name)}" for name in ("prefixes", "tied", "aux") if getattr(self, name)]
        if self.transcoder:
            more.append(f"d_out={self.d_out}, skip={self.skip}")
        if self.pre_bias is self.transcoder:
            more.append(f"pre_bias={self.pre_bias}")
        return ", ".join([f"d_in={self.d_in}, d_sae={self.d_sae}, activation={self.activation}", *more])

    # ------------------------------------------------------------ state

    @property
    def k(self) -> float:
        """Latents a row of TopK and BatchTopK; assign to anneal it (rounded for TopK)."""
        return self.activation.k  # pyright: ignore[reportAttributeAccessIssue]

    @k.setter
    def k(self, value: float) -> None:
        if not isinstance(self.activation, (TopK, BatchTopK)):
            raise AttributeError(f"SAE: {type(self.activation).__name__} has no k")
        if isinstance(self.activation, TopK) and isinstance(value := checks.plain(value), float):
            value = round(checks.number("SAE", "activation.k", value))
        self.activation = _checked_activation(replace(self.activation, k=value), self.d_sae)  # pyright: ignore[reportArgumentType]

    @property
    def packed(self) -> bool:
        """Whether evaluation encodes from a packed form of the encoder (see ``fastsae.pack``): the same bits from a quarter of the bytes.

        Off at first; it takes about ``F * D`` bytes. The form is made at the first encoding in evaluation mode, and again at the first one
        after ``train()``, a step of an optimiser or another change that torch tells of; after those that it does not (``p.data.mul_()``,
        see ``PackedWeights``) call ``weights_changed()``. Training does not use it: packing costs a step more than it saves. Nor do
        parameters that were made under ``inference_mode``, and compiled code, which could not see them change.
        """
        return self._use_packed

    @packed.setter
    def packed(self, value: bool) -> None:
        self._use_packed = checks.flag("SAE", "packed", value)
        self.weights_changed()

    def weights_changed(self) -> None:
        """Drops what was derived from the weights; ``optim.Adam`` calls it after a step."""
        self._packed = None

    def train(self, mode: bool = True) -> SAE:
        if mode:
            self.weights_changed()
        return super().train(mode)

    def _encoder(self, x: Tensor) -> Any:
        if not self._use_packed or self.training or torch.compiler.is_compiling() or checks.autocasting(x.device):
            return self.W_enc
        if self.W_enc.is_inference():
            return self.W_enc
        if self._packed is None or self._packed.weight is not self.W_enc or not self._packed.fresh:
            self._packed = PackedWeights(self.W_enc)
        return self._packed

    @property
    def unit_rows(self) -> tuple[str, ...]:
        """Parameters whose rows an optimiser keeps at norm 1 (their gradient without its component along each row)."""
        return ("W_dec",) if self.normalise_decoder else ()

    @property
    def dead_features(self) -> Tensor:
        """``[F]`` bool: silent for ``dead_after`` tokens."""
        return self.silent >= self.dead_after

    def _apply(self, fn: Any, recurse: bool = True) -> SAE:
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # pyright: ignore[reportCallIssue]
        for name, before in exact.items():  # a running mean stops moving in half precision
            now = self._buffers[name]
            if now is not None and now.dtype != before.dtype:
                self._buffers[name] = before.to(now.device)
        if self.tied:
            self.W_enc = self.W_dec
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name, buffer in self._buffers.items():  # a state from before the buffers existed
            if buffer is not None:
                state_dict.setdefault(prefix + name, buffer)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._scaled = not self.scale.is_meta and bool((self.scale != 1).any())

    @torch.no_grad()
    def _observe(self, tokens: int, run: Pass) -> None:
        if not self.training:
            return
        self.silent.add_(tokens).masked_fill_(run.fired, 0)
        if run.min_kept is not None and isinstance(self.activation, BatchTopK):
            now, new = self.running_threshold, run.min_kept.to(self.running_threshold.dtype)
            moved = torch.where(now < 0, new, now + self.activation.rate * (new - now))
            now.copy_(torch.where(new.isfinite(), moved, now))  # a batch that kept nothing says nothing

    # ------------------------------------------------------------ latents and back

    def encode(self, x: Tensor) -> Latents:
        """``[.., D]`` to latents over F features (after ``init_from(norm=)`` and until saved or folded: of the normalised input)."""
        self._check_input("SAE.encode", x)
        return self._encode(self._scale_in(x))[0]

    def _check_input(self, op: str, x: Any) -> None:
        checks.tensor(op, "x", x, like=self.W_dec)
        if x.dim() == 0 or x.shape[-1] != self.d_in:
            raise ValueError(f"{op}: x must have shape [.., d_in={self.d_in}], got {list(x.shape)}")
        if not checks.autocasting(x.device):
            checks.narrower(op, "x", x, "the parameters", self.W_dec)

    def _scale_in(self, x: Tensor) -> Tensor:
        x = checks.widened(x, self.W_dec)
        return x * self.scale[0] if self._scaled else x

    def _encode(self, x: Tensor) -> tuple[Latents, Tensor | None, Tensor | None]:
        """(latents, straight-through counts, smallest score kept by BatchTopK)."""
        activation, W_enc = self.activation, self._encoder(x)
        pre: dict[str, Any] = {"b_pre": self._b_pre}
        if isinstance(activation, TopK):
            return encode_topk(x, W_enc, self.b_enc, k=activation.k, relu=activation.relu, **pre), None, None
        if isinstance(activation, Gated):
            return encode_gated(x, W_enc, b_gate=self.b_gate, r_mag=self.r_mag, b_mag=self.b_mag, **pre), None, None
        if isinstance(activation, BatchTopK) and self.training:
            latents, min_kept = encode_batch_topk(x, W_enc, self.b_enc, k=activation.k, **pre)
            return latents, None, min_kept
        bandwidth = activation.bandwidth if isinstance(activation, JumpReLU) else None
        threshold = self._threshold(x.dtype)
        result: Any = encode_threshold(x, W_enc, self.b_enc, threshold=threshold, bandwidth=bandwidth, **pre)
        return (result, None, None) if bandwidth is None else (*result, None)

    @property
    def _b_pre(self) -> Tensor | None:
        return self.b_dec if self.pre_bias else None

    def _threshold(self, dtype: torch.dtype) -> float | Tensor:
        if isinstance(self.activation, BatchTopK):
            return self.running_threshold.to(accumulator(dtype))
        return self.threshold if isinstance(self.activation, JumpReLU) else 0.0

    def decode(self, latents: Latents, x: Tensor | None = None) -> Tensor:
        """Latents to ``[.., d_out]``; with a skip connection also the input ``x [.., D]``."""
        if self.skip and x is None:
            raise ValueError("SAE.decode: x must be given, the skip connection needs it")
        y = self._decode(latents, None if x is None else self._scale_in(x))
        return y / self.scale[1] if self._scaled else y

    def _decode(self, latents: Latents, x: Tensor | None, prefixes: list[int] | None = None) -> Tensor:
        return decode(latents, self.W_dec, self.b_dec, x=x if self.skip else None, skip=self.W_skip, prefixes=prefixes)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Reconstruction:
        """``Reconstruction(x_hat, latents, squared_error)`` of ``x [.., D]``; a transcoder's error is None without a ``target``."""
        latents = self.encode(x)
        x_hat = self.decode(latents, x)
        target = x if target is None and not self.transcoder else target
        error = None if target is None else squares(x_hat, target).sum(-1)
        return Reconstruction(x_hat, latents, error)  # pyright: ignore[reportArgumentType]

    # ------------------------------------------------------------ training

    def loss(
        self,
        x: Tensor,
        target: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        l1: float | None = None,
        l0: float | None = None,
        aux: AuxK | Literal[False] | None = None,
    ) -> Loss:
        """Mean squared error a token (summed over D; the mean over ``prefixes``), plus ``l1 * sum |latents|`` and ``l0 * number of
        latents`` a token, plus the AuxK term, plus a gated SAE's error of the reconstruction from its gate.

        Args:
            x: ``[.., D]``.
            target: ``[.., d_out]``, what is to be reconstructed; default ``x``; a transcoder needs one.
            mask: ``[..]``, bool or 0 and 1: tokens that count (False: padding, BOS; they take no part anywhere).
            l1: weight of the L1 penalty, scaled by the decoder's row norms so that it cannot be evaded; a gated SAE's is on its gate.
            l0: weight of the straight-through L0 penalty; needs ``JumpReLU(bandwidth=...)``.
            aux: the AuxK term, False for none. None in these three: the module's own.

        Returns:
            ``Loss(loss, fvu, l0)``. ``fvu = sum (x - x_hat)^2 / sum (x - mean x)^2`` of the whole dictionary, 0/0 = 0.

        In a process group of several a training mode's loss raises RuntimeError where each process would count for itself what the loss
        uses (AuxK's dead features, BatchTopK's threshold), and where ``DistributedDataParallel(sae).module.loss`` would average nothing;
        ``silent`` counts each process's rows.

        Where ReLU, JumpReLU or Gated fire on more than 1/8 of the scores this runs tile by tile over F (see ``dense``) with the same
        result up to rounding. Memory: the latents, or ``[B, tile]``.
        """
        op = "SAE.loss"
        self._check_input(op, x)
        x, target, terms = self._arguments(op, x, target, mask, l1, l0, aux)
        if self.training and processes.ranks() > 1:
            self._check_processes(op, terms)
        cast, _, w = self._cast(x, target)
        if self._is_dense(cast, w):
            with self._no_autocast(x):
                run = tiles.forward(cast, w, bool(terms.l1))
            run = run if terms.l0 else run._replace(counted=None)
        else:
            run = self._run(x, terms)
        self._observe(x.shape[0], run)
        term = None if terms.aux is None else self._aux(x, target, run.x_hats[-1], terms.aux)
        return combine(run, target, terms, self.objective, term)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> tuple[str, ...]:
        """DistributedDataParallel reads this of what it wraps, and of nothing else: how ``loss`` knows that it ought to be called by it."""
        self._wrapped = True
        return self.__dict__.get("_ignored", ())

    @_ddp_params_and_buffers_to_ignore.setter
    def _ddp_params_and_buffers_to_ignore(self, names: Sequence[str]) -> None:
        self.__dict__["_ignored"] = names

    def _check_processes(self, op: str, terms: Terms) -> None:
        """Refuses what would silently be each process's own."""
        if terms.aux is not None or isinstance(self.activation, BatchTopK):
            what = "dead features" if terms.aux is not None else "BatchTopK's threshold"
            processes.refuse(
                op,
                f"{what} would be those of each process's rows: train in one process (aux=False leaves AuxK out); where each process is to "
                "train a model of its own, by optimiser.apply(sae.step_gradients(x)[1])",
            )
        if self._wrapped and torch.is_grad_enabled() and torch.nn.parallel.DistributedDataParallel._active_ddp_module is None:
            processes.refuse(op, _PAST)

    def _run(self, x: Tensor, terms: Terms) -> Pass:
        latents, counted, min_kept = self._encode(x)
        penalised, frozen = latents, None
        if isinstance(self.activation, Gated):
            penalised = encode_threshold(x, self.W_enc, self.b_gate, b_pre=self._b_pre)
            frozen = decode(penalised, self.W_dec.detach(), self.b_dec.detach())
        magnitude = None
        if terms.l1:
            norms = torch.linalg.vector_norm(self.W_dec, dim=1)
            feature = features(penalised)
            # Of the two gathers, the one whose backward adds in a fixed order on this device.
            weights = norms[feature] if norms.is_cuda else norms.index_select(0, feature.flatten()).view_as(feature)
            magnitude = (penalised.values.abs() * weights).sum()
        values = latents.values.detach()
        return Pass(
            self._decode(latents, x, self.prefixes or [self.d_sae]),
            frozen,
            magnitude,
            counted.sum() if counted is not None and terms.l0 else None,
            (values != 0).sum(),
            fired(features(latents), values, self.d_sae),
            min_kept,
        )

    def _aux(self, x: Tensor, target: Tensor, x_hat: Tensor, aux: AuxK) -> Tensor | None:
        """The AuxK term before its coefficient. Waits for the number of dead features."""
        dead = self.dead_features
        k, share = dead_share(aux, self.d_in, int(dead.sum()))
        if k == 0 or x.shape[0] == 0:
            return None
        latents = encode_topk(x, self.W_enc, self.b_enc, k=k, b_pre=self._b_pre, features=dead, relu=aux.relu)
        e_hat = decode(latents, self.W_dec, self.b_dec if aux.bias else None)
        wide = accumulator(x_hat.dtype)
        residual = (target.to(wide) - x_hat.to(wide)).detach()
        return share * quotient(squares(e_hat.to(wide), residual).sum(), aux_denominator(aux, residual, target))

    @torch.no_grad()
    def step_gradients(
        self,
        x: Tensor,
        target: Tensor | None = None,
        mask: Tensor | None = None,
        l1: float | None = None,
        l0: float | None = None,
        aux: AuxK | Literal[False] | None = None,
    ) -> tuple[Metrics, dict[str, Gradient]]:
        """The loss's metrics and the gradient of every parameter, without autograd and without a gradient matrix: for fused optimisers.

        Args: as ``loss``.

        Returns:
            ``(Metrics(loss, fvu, l0, dead, aux), {parameter: gradient})``. Vectors (and ``W_skip``) come as tensors; ``W_enc``
            and ``W_dec`` as ``RowGradient``, or as ``TiledGradient`` in the dense regime and where a term is not made of slots
            (``l1``'s on the decoder's norms). A ``TiledGradient`` reads the weights when asked: take each range before it is changed.
            ``gradients.accumulate`` adds up micro-batches. Equal to autograd's of ``loss`` up to rounding. Metrics are not waited for; the
            host waits for a device only with ``mask``, ``aux`` and the ragged activations' slots.
        """
        self._check_input("SAE.step_gradients", x)
        if self._wrapped:
            processes.refuse("SAE.step_gradients", _PAST)
        x, target, terms = self._arguments("SAE.step_gradients", x, target, mask, l1, l0, aux)
        return _step.step(self, x, target, terms)

    def _arguments(
        self, op: str, x: Tensor, target: Tensor | None, mask: Tensor | None, l1: Any, l0: Any, aux: Any
    ) -> tuple[Tensor, Tensor, Terms]:
        """Checked: the rows that count, scaled, and the terms."""
        checks.tensor(op, "x", x, like=self.W_dec)
        if x.dim() == 0 or x.shape[-1] != self.d_in:
            raise ValueError(f"{op}: x must have shape [.., d_in={self.d_in}], got {list(x.shape)}")
        terms = self._terms(op, l1, l0, aux)
        if target is None and self.transcoder:
            raise ValueError(f"{op}: target must be given for a transcoder, got None")
        if target is not None:
            checks.tensor(op, "target", target, like=x)
            want = (*x.shape[:-1], self.d_out)
            checks.shape(op, "target", target, want, str(list(want)))
        if mask is not None:
            mask = checks.mask(op, "mask", mask, x)
            checks.shape(op, "mask", mask, tuple(x.shape[:-1]), str(list(x.shape[:-1])))
            x, target = x[mask], None if target is None else target[mask]
        rows = x.shape[:-1].numel()
        x = self._scale_in(x.reshape(rows, self.d_in))
        if target is None:
            return x, x, terms
        target = checks.widened(target.reshape(rows, self.d_out), self.W_dec)
        return x, target * self.scale[1] if self._scaled else target, terms

    def _terms(self, op: str, l1: Any, l0: Any, aux: Any) -> Terms:
        l1, l0 = self.l1 if l1 is None else l1, self.l0 if l0 is None else l0
        l1, l0 = (checks.number(op, name, value, positive=False) for name, value in (("l1", l1), ("l0", l0)))
        if l0 and getattr(self.activation, "bandwidth", None) is None:
            raise ValueError(f"{op}: l0 needs JumpReLU with a bandwidth, the activation is {self.activation}")
        aux = self.aux if aux is None else aux or None
        if aux is not None and not isinstance(aux, AuxK):
            raise TypeError(f"{op}: aux must be an AuxK, False or None, got {type(aux).__name__}")
        if aux is not None and isinstance(self.activation, Gated):
            raise ValueError(f"{op}: aux does not go with Gated, whose gate has a reconstruction error of its own")
        return Terms(l1, l0, aux)

    def _cast(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Weights]:
        """Inputs and weights as a computation outside the operations takes them: under autocast cast as they would be."""
        threshold = None
        if isinstance(self.activation, (ReLU, JumpReLU)) or (isinstance(self.activation, BatchTopK) and not self.training):
            threshold = self._threshold(x.dtype)
            threshold = threshold if isinstance(threshold, Tensor) else x.new_zeros((), dtype=accumulator(x.dtype))
        named: dict[str, Any] = {"b_pre": self._b_pre, "skip": self.W_skip}
        named |= {name: getattr(self, name, None) for name in ("W_enc", "W_dec", "b_dec", "b_enc", "b_gate", "r_mag", "b_mag")}
        cast, *tensors = checks.autocast(x, *named.values())
        bandwidth = getattr(self.activation, "bandwidth", None)
        prefixes = self.prefixes or [self.d_sae]
        weights = Weights(**dict(zip(named, tensors)), threshold=threshold, bandwidth=bandwidth, prefixes=prefixes)
        return cast, target, weights

    def _no_autocast(self, x: Tensor) -> Any:
        return torch.autocast(x.device.type, enabled=False) if checks.autocasting(x.device) else nullcontext()

    def _is_dense(self, x: Tensor, w: Weights) -> bool:
        if not isinstance(self.activation, (ReLU, JumpReLU, Gated)) or x.shape[0] == 0:
            return False
        if self.dense is not None:
            return self.dense
        with torch.no_grad():
            return tiles.measured_density(x, w) > tiles.DENSITY

    @torch.no_grad()
    def normalise_decoder_(self) -> None:
        """Scales the decoder's rows to norm 1 in place; rows shorter than 1e-8 stay."""
        norm = torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True)
        self.W_dec.div_(torch.where(norm < 1e-8, 1.0, norm))

    @torch.no_grad()
    def remove_parallel_gradient_(self) -> None:
        """Removes from the decoder's gradient the component along each (unit) row, which normalising would undo."""
        if self.W_dec.grad is not None:
            along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
            self.W_dec.grad.addcmul_(self.W_dec, along, value=-1)

    # ------------------------------------------------------------ start

    @torch.no_grad()
    def init_from(
        self,
        x: Tensor,
        target: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        b_dec: Literal["mean", "geometric_median"] | None = "mean",
        norm: Literal["rms"] | None = None,
        encoder: Literal["transpose"] | None = "transpose",
    ) -> SAE:
        """Starts from data: the decoder's bias at the centre of what is to be reconstructed, the encoder at the decoder's rows.

        Args:
            x: ``[.., D]``, a sample of activations. target, mask: as in ``loss``.
            b_dec: "mean"; "geometric_median" (Weiszfeld's iteration, less moved by outliers); None leaves it.
            norm: "rms" multiplies inputs, and targets, by one number each such that their entries have mean square 1: learning rates and
                penalties then mean the same on every layer. The loss is in these units. ``save`` and ``fold_`` fold the numbers into the
                weights.
            encoder: "transpose" sets ``W_enc = W_dec`` (where their shapes agree); None leaves it.

        Returns: the module.

        Raises: as ``loss``; ValueError: a row that is not finite, by its place; no row that counts; rows whose mean or normalisation is not
        finite. The module is then as before.
        """
        op = "SAE.init_from"
        for name, value, known in (
            ("b_dec", b_dec, ("mean", "geometric_median")),
            ("norm", norm, ("rms",)),
            ("encoder", encoder, ("transpose",)),
        ):
            if value is not None and value not in known:
                raise ValueError(f"{op}: {name} must be {' or '.join(map(repr, known))} or None, got {value!r}")
        given, scaled, factors = (x, target, mask), self._scaled, torch.ones_like(self.scale)
        self._scaled = False
        try:
            x, target, _ = self._arguments(op, x, target, mask, None, None, None)
            if x.shape[0] == 0:
                raise ValueError(f"{op}: x must hold at least one token that counts, got none")
            if norm is not None and self.transcoder and self.pre_bias:
                raise ValueError(f"{op}: norm does not go with a transcoder that has a pre_bias, whose b_dec would need two scales")
            if (bad := finite.bad_row(*given)) is not None:
                raise ValueError(f"{op}: {bad}")
            wide = accumulator(x.dtype)
            if norm == "rms":
                factors = torch.stack([1 / t.to(wide).square().mean().sqrt() for t in (x, target)]).to(factors)
                if not bool((factors.isfinite() & (factors > 0)).all()):
                    raise ValueError(f"{op}: norm='rms' needs activations that are finite and not all 0, and so their squares")
            centre = None
            if b_dec is not None:
                centre = target.to(wide).mean(0) if b_dec == "mean" else _geometric_median(target.to(wide))
                if not bool(centre.isfinite().all()):
                    raise ValueError(f"{op}: the {b_dec} of the rows must be finite, got {float(centre[~centre.isfinite()][0])}")
        except BaseException:
            self._scaled = scaled
            raise
        self.scale.copy_(factors)
        self._scaled = norm == "rms"
        if centre is not None:
            self.b_dec.copy_(centre * self.scale[1])
        if encoder == "transpose" and self.d_out == self.d_in:
            self.W_enc.copy_(self.W_dec)
        return self

    @torch.no_grad()
    def fold_(self) -> SAE:
        """Folds the normalisation of ``init_from`` into the weights: latents and reconstructions are then in the units of the data."""
        for name, tensor in self._folded().items():
            getattr(self, name).copy_(tensor)
        if isinstance(self.activation, JumpReLU) and self.activation.bandwidth is not None:
            self.activation = replace(self.activation, bandwidth=self._folded_bandwidth())
        self.scale.fill_(1)
        self._scaled = False
        return self

    def _folded_bandwidth(self) -> float | None:
        bandwidth = getattr(self.activation, "bandwidth", None)
        return bandwidth / float(self.scale[0]) if self._scaled and bandwidth is not None else bandwidth

    def _folded(self) -> dict[str, Tensor]:
        """Parameters and the running threshold in the units of the data. Every activation commutes with a positive factor."""
        tensors = {name: parameter.detach() for name, parameter in self.named_parameters()}
        if isinstance(self.activation, BatchTopK):
            tensors["running_threshold"] = self.running_threshold
        if not self._scaled:
            return tensors
        s, t = self.scale.to(torch.float64).unbind() if self.scale.device.type != "mps" else self.scale.unbind()
        factors = dict.fromkeys(("b_enc", "b_gate", "b_mag", "threshold", "running_threshold"), 1 / s)
        factors |= {"b_dec": 1 / t}
        if self.transcoder:
            factors |= {"W_dec": s / t, "W_skip": s / t}
        return {name: (tensor * factors[name]).to(tensor.dtype) if name in factors else tensor for name, tensor in tensors.items()}

    # ------------------------------------------------------------ files

    def config(self) -> dict[str, Any]:
        """What ``from_config`` builds an equal module of, in JSON's types; the names that sparsify knows are its own."""
        activation = self.activation
        config: dict[str, Any] = {"d_in": self.d_in, "num_latents": self.d_sae, "activation": type(activation).__name__.lower()}
        if isinstance(activation, TopK):
            config |= {"k": activation.k, "relu": activation.relu}
        if isinstance(activation, BatchTopK):
            config |= {"k": activation.k, "rate": activation.rate}
        if isinstance(activation, JumpReLU):
            config["bandwidth"] = activation.bandwidth
        return config | {
            "expansion_factor": 0,
            "normalize_decoder": self.normalise_decoder,
            "transcode": not self.pre_bias,  # sparsify's word for it
            "transcoder": self.transcoder,
            "pre_bias": self.pre_bias,
            "d_out": self.d_out,
            "skip_connection": self.skip,
            "tied": self.tied,
            "prefixes": self.prefixes,
            "objective": self.objective,
            "l1": checks.plain(self.l1),
            "l0": checks.plain(self.l0),
            "aux": None if self.aux is None else asdict(self.aux),
            "dead_after": checks.plain(self.dead_after),
        }

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ) -> SAE:
        """A fresh module of a ``config()``; KeyError, TypeError or ValueError where it is none."""
        kind = config["activation"]
        activation: Activation
        if kind == "topk":
            activation = TopK(config["k"], config.get("relu", True))
        elif kind == "batchtopk":
            activation = BatchTopK(config["k"], config.get("rate", 0.01))
        elif kind == "jumprelu":
            activation = JumpReLU(bandwidth=config.get("bandwidth"))
        elif kind in ("relu", "gated"):
            activation = ReLU() if kind == "relu" else Gated()
        else:
            raise ValueError(f"unknown activation {kind!r}")
        options = {name: config[name] for name in ("prefixes", "tied", "objective", "l1", "l0", "dead_after", "pre_bias") if name in config}
        options |= {"skip": config.get("skip_connection", False), "normalise_decoder": config.get("normalize_decoder")}
        transcoder = checks.flag("SAE", "transcoder", config.get("transcoder", config.get("transcode", False)))
        options["d_out"] = config["d_out"] if transcoder else None
        if not transcoder and config.get("d_out") not in (None, config["d_in"]):
            raise ValueError(f"d_out={config['d_out']!r} is for transcoders")
        options["aux"] = None if config.get("aux") is None else AuxK(**config["aux"])
        return cls(config["d_in"], config["num_latents"], activation, **options, dtype=dtype, device=device, seed=seed)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes ``cfg.json`` and ``sae.safetensors`` into a folder, normalisation folded in; TopK ones load in EleutherAI's sparsify.
        Needs safetensors.

        ``sae.safetensors`` holds checksums and the configuration too, which is what ``load`` takes: a reader gets the older module or the
        new one, whole, also where a save was interrupted; ``cfg.json`` is for other readers. Training state (optimiser, silent features,
        unfolded normalisation) is what ``save_checkpoint`` keeps. OSError that names the file where it could not be written.
        """
        folder = Path(folder)
        contents = self._files(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files.replace_all(contents)
        return folder

    def _files(self, folder: Path, **more: Any) -> dict[Path, files.Fill]:
        tensors, config = self._portable()
        names = {ours: theirs for theirs, ours in pretrained.NAMES.items()}
        tensors = {names.get(name, name): tensor.contiguous().cpu() for name, tensor in tensors.items()}
        return weight_files.contents(folder, "fastsae", tensors, config, **more)

    def _portable(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, configuration) with the normalisation folded in and no memory shared between tensors."""
        tensors, config = self._folded(), self.config()
        if self.tied:
            tensors["W_enc"] = tensors["W_dec"].clone()
        if "bandwidth" in config:
            config["bandwidth"] = self._folded_bandwidth()
        return tensors, config

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: torch.device | str | None = None) -> SAE:
        """Reads a folder that ``save`` has written, in evaluation mode, as ``from_pretrained``. Needs safetensors. A damaged folder raises
        ValueError."""
        return cls._load(folder, device)[0]

    @classmethod
    def _load(cls, folder: str | os.PathLike[str], device: torch.device | str | None) -> tuple[SAE, dict[str, Any]]:
        try:
            loaded = pretrained.read(folder, "fastsae", pretrained.Options())
            return cls._of(loaded, None, device).eval(), loaded.more
        except ValueError as error:
            raise ValueError(f"SAE.load: {folder} is not a folder that SAE.save wrote: {error}") from error

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        format: Literal["fastsae", "saelens", "sparsify", "dictionary_learning", "gemma_scope"] | None = None,  # noqa: A002
        subfolder: str | None = None,
        revision: str | None = None,
        fold_decoder_norm: bool | None = None,
        scaling_factor: float | None = None,
        pre_bias: bool | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> SAE:
        """Reads an SAE that this library, SAELens, sparsify, dictionary_learning or Gemma Scope has saved; in evaluation mode.

        Args:
            source: a folder, the weights' file in it, or a Hub repository ``"owner/name"`` (needs huggingface_hub; only files of known
                names are downloaded).
            format: "fastsae" (``save``), "saelens" (``cfg.json`` and ``sae_weights.safetensors``, of version 6 or older), "sparsify"
                (``cfg.json``, ``sae.safetensors``), "dictionary_learning" (``config.json``, ``ae.pt`` or a checkpoint) or "gemma_scope"
                (``params.npz``). None: by the names of the files.
            subfolder: path inside the folder or repository, e.g. sparsify's hookpoint ``"layers.5.mlp"``.
            revision: of the Hub repository: branch, tag or commit.
            fold_decoder_norm: give the decoder unit rows and the latents their norms: the same reconstruction. None: what the library's own
                loader does (dictionary_learning's ``AutoEncoder``: yes; others: no). Not for top k, whose choice it would change.
            scaling_factor: for SAELens's ``normalize_activations`` by one number ("expected_average_only_in", "constant_scalar_rescale")
                that has not been folded: the factor of the inputs, where the file does not hold it.
            pre_bias: for dictionary_learning's ``JumpReluAutoEncoder``, whose files do not say whether ``b_dec`` is subtracted from the
                input. None: no, as its loader assumes.
            dtype: of the parameters; None: the file's (SAELens: the one that its configuration names; Gemma Scope: float32).
            device: of the parameters; None: the CPU.

        What differs from the other library's module: the input is flat (SAELens's ``hook_z`` SAEs: pass ``z.flatten(-2)``); SAELens's
        decoder norms of top k (``rescale_acts_by_decoder_norm``), ``finetuning_scaling_factor`` and input scale are folded into the
        weights; a BatchTopK keeps, as there, the scores above its running threshold (all positive ones where it is still -1), and the
        batch's best in training mode, and is read as a TopK where the file holds no threshold; dictionary_learning's optional threshold
        of a TopK is left out.

        ``normalise_decoder`` is what the library's trainer does (sparsify: its setting; dictionary_learning: yes, but not for
        ``AutoEncoderNew``; Gemma Scope: yes; SAELens: no, but for old files that say so), and only where the decoder's rows have norm 1, up
        to 2e-6 or the spacing of half precision: no step then changes what the file computes but by its learning rate.

        Refused by name: normalisations that depend on each row (``layer_norm``, ``constant_norm_rescale``), whitening that is not folded,
        and architectures other than those of ``SAE`` (sparsify's ``groupmax`` and signed top k; matching pursuit, temporal, AbsTopK).

        Nothing in a file is executed: tensors come from safetensors, torch's weights-only unpickler or arrays without pickles.

        Raises:
            FileNotFoundError: a folder or file that is not there. ValueError: a damaged or contradictory file, or one that is not
            supported; the message says what came. ImportError: safetensors or huggingface_hub is not installed.
        """
        op = "SAE.from_pretrained"
        if not isinstance(source, (str, os.PathLike)):
            raise TypeError(f"{op}: source must be a path or the name of a Hub repository, got {type(source).__name__}")
        if format is not None and format not in pretrained.FORMATS:
            raise ValueError(f"{op}: format must be one of {', '.join(pretrained.FORMATS)} or None, got {format!r}")
        for name, value in (("fold_decoder_norm", fold_decoder_norm), ("pre_bias", pre_bias)):
            if value is not None:
                checks.flag(op, name, value)
        if dtype is not None and dtype not in checks.FLOATS:
            raise TypeError(f"{op}: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
        if not Path(source).exists() and pretrained.is_repository(source):
            path = pretrained.fetch(str(source), subfolder, revision, format)
        else:
            path = Path(source, subfolder) if subfolder else Path(source)
        options = pretrained.Options(fold_decoder_norm, scaling_factor, pre_bias, dtype)
        try:
            return cls._of(pretrained.read(path, format, options), dtype, device).eval()
        except ValueError as error:
            raise ValueError(f"{op}: {error}") from error

    @classmethod
    def _of(cls, loaded: pretrained.Loaded, dtype: torch.dtype | None, device: torch.device | str | None) -> SAE:
        """The module that has these tensors as its parameters, without a copy where dtype and device are theirs."""
        config, tensors, _ = loaded
        exact = ("running_threshold",)
        try:
            dtype = dtype or tensors["W_dec"].dtype
            tensors = {name: tensor.to(device=device, dtype=tensor.dtype if name in exact else dtype) for name, tensor in tensors.items()}
            # On the meta device, so that no size that a configuration claims is ever allocated.
            sae = cls.from_config(config, dtype=dtype, device="meta")
            W = tensors["W_dec"]
            if W.dim() != 2 or tuple(W.shape) != (sae.d_sae, sae.d_out):
                raise ValueError(f"W_dec must have shape [F={sae.d_sae}, {sae.d_out}], got {list(W.shape)}")
            state = {"silent": W.new_zeros(sae.d_sae, dtype=torch.int64), "scale": W.new_ones(2, dtype=torch.float32)}
            if isinstance(sae.activation, BatchTopK) and "running_threshold" not in tensors:
                raise ValueError("running_threshold is missing, above which evaluation keeps scores")
            sae.load_state_dict({**state, **tensors}, assign=True)
            if sae.tied:
                sae.W_enc = sae.W_dec
        except (AttributeError, KeyError, TypeError, RuntimeError, OverflowError) as error:
            raise ValueError(f"configuration and tensors do not fit: {error!r}") from error
        return sae

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        format: Literal["fastsae", "saelens", "sparsify", "dictionary_learning"] = "fastsae",  # noqa: A002
        metadata: Mapping[str, Any] | None = None,
    ) -> Path:
        """Writes a folder that another library's loader reads; returns it. Normalisation is folded in.

        Args:
            folder: is made where it does not exist.
            format: "fastsae" is ``save``. "saelens": version 6; a BatchTopK becomes, as there, a JumpReLU at its running threshold.
                "sparsify": TopK only. "dictionary_learning": the class of that activation; where it has a fixed pre-bias that differs
                from this module's, ``b_dec`` moves into or out of the encoder's bias (the same scores up to rounding).
            metadata: JSON values to write beside: SAELens's ``metadata`` (``model_name``, ``hook_name`` ..), else an entry of its own.

        Files hold what inference needs: loss options, k annealing and optimisers stay behind. What a format cannot say raises ValueError
        that names it.
        """
        op = "SAE.save_pretrained"
        if format not in pretrained.WRITABLE:
            raise ValueError(f"{op}: format must be one of {', '.join(pretrained.WRITABLE)}, got {format!r}")
        if metadata is not None and not isinstance(metadata, Mapping):
            raise TypeError(f"{op}: metadata must be a mapping, got {type(metadata).__name__}")
        if format == "fastsae":
            if metadata:
                raise ValueError(f"{op}: metadata does not go with the format 'fastsae'")
            return self.save(folder)
        tensors, config = self._portable()
        return pretrained.write(folder, format, config, tensors, metadata)


def _checked_activation(activation: Any, d_sae: int) -> Activation:
    if not isinstance(activation, (TopK, BatchTopK, JumpReLU, ReLU, Gated)):
        raise TypeError(f"SAE: activation must be TopK, BatchTopK, JumpReLU, ReLU or Gated, got {type(activation).__name__}")
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


@full_precision()
def _geometric_median(x: Tensor, steps: int = 100) -> Tensor:
    """The point of least summed distance to the rows, by Weiszfeld's iteration from the mean until it moves by less than 1e-6 of the
    median distance."""
    guess = x.mean(0)
    for _ in range(steps):
        distance = torch.linalg.vector_norm(x - guess, dim=1)
        if not bool(distance.any()):
            break
        weight = 1 / distance.clamp_min(1e-6 * float(distance.mean()))  # a row at the guess itself pulls no harder than that
        before, guess = guess, (weight @ x) / weight.sum()
        if float(torch.linalg.vector_norm(guess - before)) <= 1e-6 * float(distance.median()):
            break
    return guess
