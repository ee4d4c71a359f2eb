"""A sparse autoencoder or transcoder as a torch module, on the fused operations; trains with any torch optimiser or by fused steps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal

import torch
from torch import Tensor, nn

from fastsae._core import checks
from fastsae._core.world import ALONE, World
from fastsae.formats import common, modules, pretrained
from fastsae.gradients import Gradient
from fastsae.latents import Latents
from fastsae.ops.decode import decode
from fastsae.ops.encode import encode_batch_topk, encode_gated, encode_threshold, encode_topk
from fastsae.reference import accumulator
from fastsae.sae import autograd, init
from fastsae.sae.activations import Activation, BatchTopK, Gated, JumpReLU, Kind, L, ReLU, TopK, checked, with_k
from fastsae.sae.config import arguments, to_json
from fastsae.sae.hub import Published
from fastsae.sae.inputs import Encoded, Inputs, autocast_off, cast, check_x, checked_rows, checked_terms, counted, is_dense
from fastsae.sae.losses import AuxK, AuxOption, JumpLoss, Loss, Metrics, Pass, Weights, squares
from fastsae.sae.packing import Packing
from fastsae.sae.processes import Wrapped
from fastsae.sae.reconstruction import Reconstruction
from fastsae.sae.rows import KINDS, By, normalised
from fastsae.sae.step import step

if TYPE_CHECKING:
    from typing_extensions import Self


class SAE(init.Starting, Packing, Wrapped, Published, Generic[L]):
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
        activation: ``TopK(k)``, ``AbsTopK(k)``, ``BatchTopK(k)``, ``ReLU()`` (train with ``l1``), ``JumpReLU(threshold, bandwidth)`` (train
            with ``l0``) or ``Gated()`` (train with ``l1``; its loss has the gate's reconstruction error as a further term, arXiv
            2404.16014).
        prefixes: ascending dictionary sizes that end in F: the loss is the mean over the reconstructions from the features below each
            (Matryoshka, arXiv 2503.17547).
        d_out: dimension of the target of a transcoder, D or another.
        skip: a transcoder's linear path past the dictionary (starts at 0).
        tied: encoder and decoder are one parameter, ``W_dec`` (``W_enc`` is another name of it).
        pre_bias: subtract ``b_dec`` from ``x`` first; default: yes, but not for transcoders (True needs ``d_out = d_in``).
        objective: "mse", squared error a token (summed over d_out), or "fvu", fraction of variance unexplained.
        l1, l0, aux: the loss's further terms where a call gives none; see ``loss`` and ``AuxK``.
        jump: how a JumpReLU is trained, where it is not by ``l0`` alone; see ``JumpLoss``. There is no dense regime then.
        normalise_rows: each row of ``x`` is normalised by itself, and an autoencoder's reconstruction brought back: "layer_norm",
            ``(x - mean) / (std + 1e-5)`` with the deviation over D - 1 and ``x_hat = y std + mean``; "norm", to the norm ``sqrt(D)``. Loss
            and FVU are in units of the data. Rows that are constant (of norm 0) become 0. Not with ``skip`` or, but for transcoders,
            ``aux``.
        dead_after: tokens without firing after which a feature counts as dead.
        normalise_decoder: decoder rows are meant to stay of norm 1, see ``unit_rows``; default: yes, but not for transcoders.
        dense: run the loss tile by tile over F; None: where more than 1/8 of the scores would be stored, by a sample of them
            (ReLU, JumpReLU, Gated).
        dtype, device: of the parameters; None: torch's default device, as for torch's modules.
        seed: of the decoder's random directions; None draws from torch's global generator.

    Raises: TypeError, ValueError as the operations do.
    """

    b_enc: nn.Parameter  # None with Gated
    b_gate: nn.Parameter  # with Gated, as the next two
    r_mag: nn.Parameter
    b_mag: nn.Parameter
    threshold: nn.Parameter  # with JumpReLU
    W_skip: nn.Parameter | None
    normalise_rows: By | None
    silent: Tensor
    world: World = ALONE
    n_layers = 1  # more: ``Crosscoder``

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        activation: Kind[L] = TopK(64),  # noqa: B008 (a frozen dataclass)
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
        jump: JumpLoss | None = None,
        normalise_rows: By | None = None,
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
        self.activation: Activation = checked(activation, d_sae)
        if d_out is not None:
            d_out = checks.integer("SAE", "d_out", d_out, 1)
        for name, value in (("skip", skip), ("tied", tied), ("normalise_decoder", normalise_decoder), ("dense", dense)):
            if value is not None or name in ("skip", "tied"):
                checks.flag("SAE", name, value)
        if skip and d_out is None:
            raise ValueError("SAE: skip needs d_out (an autoencoder could copy its input through it)")
        pre_bias = d_out is None if pre_bias is None else checks.flag("SAE", "pre_bias", pre_bias)
        for name, wanted in (("pre_bias", pre_bias), ("tied", tied)):
            if wanted and d_out not in (None, d_in):
                raise ValueError(f"SAE: {name} needs d_out = d_in = {d_in}, got d_out={d_out}")
        if prefixes is not None:
            prefixes = [checks.integer("SAE", "prefixes", size, 1, d_sae, f"d_sae={d_sae}") for size in prefixes]
            if prefixes != sorted(set(prefixes)) or not prefixes or prefixes[-1] != d_sae:
                raise ValueError(f"SAE: prefixes must ascend strictly and end in d_sae={d_sae}, got {prefixes}")
        if objective not in ("mse", "fvu"):
            raise ValueError(f"SAE: objective must be 'mse' or 'fvu', got {objective!r}")
        if normalise_rows is not None and (normalise_rows not in KINDS or skip or (normalise_rows == "layer_norm" and d_in == 1)):
            wanted = "'layer_norm' (d_in > 1), 'norm' or None, and None with skip"
            raise ValueError(f"SAE: normalise_rows must be {wanted}, got {normalise_rows!r} with d_in={d_in}, skip={skip}")
        dead_after = checks.integer("SAE", "dead_after", dead_after, 1)
        if dtype not in checks.FLOATS:
            raise TypeError(f"SAE: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
        self.d_in, self.d_sae = d_in, d_sae
        self.transcoder, self.d_out, self.skip, self.tied = d_out is not None, d_out or d_in, skip, tied
        self.pre_bias, self.prefixes, self.objective, self.dead_after, self.dense = pre_bias, prefixes, objective, dead_after, dense
        self.normalise_decoder = not self.transcoder if normalise_decoder is None else normalise_decoder
        self.l1, self.l0, self.aux, self.jump, self.normalise_rows = l1, l0, aux, jump, normalise_rows
        self.needs_x = skip or (normalise_rows is not None and not self.transcoder)  # for ``decode``
        self.l1, self.l0, *_ = checked_terms("SAE", self)

        for name, parameter in init.parameters(self, dtype, device, seed).items():
            self.register_parameter(name, parameter)
        for name, buffer in init.buffers(self, d_sae, device).items():
            self.register_buffer(name, buffer)
        self._scaled = False

    def extra_repr(self) -> str:
        more = [f"{name}={getattr(self, name)}" for name in ("prefixes", "tied", "aux", "jump", "normalise_rows") if getattr(self, name)]
        if self.transcoder:
            more.append(f"d_out={self.d_out}, skip={self.skip}")
        if self.pre_bias is self.transcoder:
            more.append(f"pre_bias={self.pre_bias}")
        return ", ".join([f"d_in={self.d_in}, d_sae={self.d_sae}, activation={self.activation}", *more])

    # ------------------------------------------------------------ state

    @property
    def k(self) -> float:
        """Latents a row of TopK, AbsTopK and BatchTopK; assign to anneal it (rounded but for BatchTopK)."""
        return self.activation.k  # pyright: ignore[reportAttributeAccessIssue]

    @k.setter
    def k(self, value: float) -> None:
        self.activation = with_k(self.activation, value, self.d_sae)

    def buffers_changed(self) -> None:
        """Reads again what is known of the buffers on the host; whoever writes to ``scale`` calls it."""
        self._scaled = not self.scale.is_meta and bool((self.scale != 1).any())

    @property
    def unit_rows(self) -> tuple[str, ...]:
        """Parameters whose rows an optimiser keeps at norm 1 (their gradient without its component along each row)."""
        return ("W_dec",) if self.normalise_decoder else ()

    @property
    def dead_features(self) -> Tensor:
        """``[F]`` bool: silent for ``dead_after`` tokens."""
        return self.silent >= self.dead_after

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)  # pyright: ignore[reportCallIssue]
        keep_dtypes(self, exact)
        if self.tied:
            self.W_enc = self.W_dec
        return self

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride] # torch calls it by position
        self, state_dict: Any, prefix: str, *rest: Any
    ) -> None:
        for name, buffer in self.named_buffers():  # a state from before the buffers existed
            state_dict.setdefault(prefix + name, buffer)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.buffers_changed()

    @torch.no_grad()
    def _observe(self, run: Pass) -> Tensor:
        """Counts silent features and moves the running threshold, in training mode; which features are dead."""
        if not self.training:
            return self.dead_features
        rows, fired = self._in_all(run.x_hats.shape[1], run.fired)
        self.silent.add_(rows).masked_fill_(fired, 0)
        if run.min_kept is not None and isinstance(self.activation, BatchTopK):
            now, new = self.running_threshold, run.min_kept.to(self.running_threshold.dtype)
            moved = torch.where(now < 0, new, now + self.activation.rate * (new - now))
            now.copy_(torch.where(new.isfinite(), moved, now))  # a batch that kept nothing says nothing
        return self.dead_features

    # ------------------------------------------------------------ latents and back

    def encode(self, x: Tensor) -> L:
        """``[.., D]`` to latents over F features (after ``init_from(norm=)`` and until saved or folded: of the normalised input)."""
        self._check_input("SAE.encode", x)
        return self._encode(self.encoder_rows(x)).latents  # pyright: ignore[reportReturnType] # of the activation's kind

    def _check_input(self, op: str, x: Tensor) -> None:
        check_x(op, x, self.d_in, like := self.W_dec)
        if x.dtype is not like.dtype and not checks.autocasting(x.device):
            checks.narrower(op, "x", x, "the parameters", like)

    def encoder_rows(self, x: Tensor) -> Tensor:
        """``x`` as the encoder sees it before ``b_dec`` is subtracted: scaled by ``init_from``'s number, or normalised by row."""
        x = checks.widened(x, self.W_dec)
        if self.normalise_rows is not None:
            return normalised(x, self.normalise_rows)[0]
        return x * self.scale[0] if self._scaled else x

    def _encode(self, x: Tensor, scale: Tensor | None = None) -> Encoded:
        activation, W_enc, b_pre = self.activation, self._encoder(x), self.b_dec if self.pre_bias else None
        b_enc = self.b_enc if scale is None else self.b_enc * scale
        if isinstance(activation, TopK):
            k, relu, absolute = activation.k, activation.relu, activation.absolute
            return Encoded(encode_topk(x, W_enc, b_enc, k=k, b_pre=b_pre, scale=scale, relu=relu, absolute=absolute), None, None)
        if isinstance(activation, Gated):
            return Encoded(encode_gated(x, W_enc, b_gate=self.b_gate, r_mag=self.r_mag, b_mag=self.b_mag, b_pre=b_pre), None, None)
        if isinstance(activation, BatchTopK) and self.training:
            self._refuse_selection("SAE.encode")
            latents, min_kept = encode_batch_topk(x, W_enc, b_enc, k=activation.k, b_pre=b_pre, scale=scale)
            return Encoded(latents, None, min_kept)
        bandwidth = activation.bandwidth if isinstance(activation, JumpReLU) else None
        threshold = self._threshold(x.dtype)
        if bandwidth is None:
            return Encoded(encode_threshold(x, W_enc, b_enc, threshold=threshold, b_pre=b_pre, scale=scale), None, None)
        latents, counted = encode_threshold(x, W_enc, b_enc, threshold=threshold, bandwidth=bandwidth, b_pre=b_pre)
        return Encoded(latents, counted, None)

    def _threshold(self, dtype: torch.dtype) -> float | Tensor:
        if isinstance(self.activation, BatchTopK):
            return self.running_threshold.to(accumulator(dtype))
        return self.threshold if isinstance(self.activation, JumpReLU) else 0.0

    def decode(self, latents: Latents, x: Tensor | None = None) -> Tensor:
        """Latents to ``[.., d_out]``; with a skip connection, and for an autoencoder that normalises rows, also the input ``x [.., D]``."""
        self._check_needs("SAE.decode", x)
        if x is not None and self.needs_x and not self.skip:
            return self._restored("SAE.decode", decode(latents, self.W_dec, self.b_dec), x)
        x = None if x is None or not self.skip else self.encoder_rows(x)
        y = decode(latents, self.W_dec, self.b_dec, x=x, skip=None if x is None else self.W_skip)
        return y / self.scale[1] if self._scaled else y

    def _check_needs(self, op: str, x: Tensor | None) -> None:
        if self.needs_x and x is None:
            raise ValueError(f"{op}: x must be given, {'the skip connection' if self.skip else 'normalise_rows'} needs it")

    def _restored(self, op: str, y: Tensor, x: Tensor) -> Tensor:
        """The reconstruction of the normalised rows of ``x`` in its units."""
        assert self.normalise_rows is not None
        self._check_input(op, x)
        return normalised(checks.widened(x, self.W_dec), self.normalise_rows)[1].restored(y)

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, target: Tensor | None = None) -> Reconstruction[L]: ...

    def forward(self, x: Tensor, target: Tensor | None = None) -> Reconstruction[L]:
        """``Reconstruction(x_hat, latents, squared_error)`` of ``x [.., D]``; a transcoder's error is None without a ``target``."""
        latents = self.encode(x)
        x_hat = self.decode(latents, x)
        target = x if target is None and not self.transcoder else target
        error = None if target is None else squares(x_hat, target).sum(-1)
        return Reconstruction(x_hat, latents, error)  # pyright: ignore[reportArgumentType] # None only without a target

    # ------------------------------------------------------------ training

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

        In a process group of several, in training mode: in the forward of ``DistributedDataParallel``, and in ``Trainer`` where it
        averages, ``silent`` counts the rows of all processes, and the loss is that of each one's rows, AuxK's denominator too. Elsewhere
        ``silent`` counts each process's own, and AuxK raises RuntimeError. So does BatchTopK in both, which selects from and learns a
        threshold of one batch, and a loss past ``DistributedDataParallel``, of which nothing would be averaged.

        Where ReLU, JumpReLU or Gated fire on more than 1/8 of the scores this runs tile by tile over F (see ``dense``) with the same
        result up to rounding. Memory: the latents, or ``[B, tile]``.
        """
        inputs = self.step_inputs("SAE.loss", x, target, mask, l1, l0, aux)
        self._refuse_loss("SAE.loss", counted(inputs))
        return autograd.loss(inputs)

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
        """The loss's metrics and the gradient of every parameter, without autograd and without a gradient matrix: for fused optimisers.

        Args: as ``loss``.

        Returns:
            ``(Metrics(loss, fvu, l0, dead, aux), {parameter: gradient})``. Vectors (and ``W_skip``) come as tensors; ``W_enc``
            and ``W_dec`` as ``RowGradient``, or as ``TiledGradient`` in the dense regime and where a term is not made of slots
            (``l1``'s on the decoder's norms). A ``TiledGradient`` reads the weights when asked: take each range before it is changed.
            ``gradients.accumulate`` adds up micro-batches. Equal to autograd's of ``loss`` up to rounding. Metrics are not waited for; the
            host waits for a device only with ``mask``, ``aux`` (not in a CUDA graph), the ragged activations' slots, and where ReLU,
            JumpReLU or Gated have no ``dense`` to say which regime it is.
        """
        self._refuse_past_wrapper("SAE.step_gradients", forwarding=False)
        return step(self.step_inputs("SAE.step_gradients", x, target, mask, l1, l0, aux))

    def step_inputs(
        self,
        op: str,
        x: Tensor,
        target: Tensor | None = None,
        mask: Tensor | None = None,
        l1: float | None = None,
        l0: float | None = None,
        aux: AuxOption = None,
    ) -> Inputs:
        """The arguments of ``loss``, checked, with all that a loss needs of the module."""
        self._check_input(op, x)
        terms = checked_terms(op, self, l1, l0, aux)
        x, target = checked_rows(op, self, x, target, mask, self.W_dec)
        found = None
        if self._scaled:
            x, target = x * self.scale[0], None if target is None else target * self.scale[1]
        if self.normalise_rows is not None:
            target = x if target is None else target
            x, found = normalised(x, self.normalise_rows)
        weights = self._weights(x)
        as_cast = cast(x, weights)
        return Inputs(
            x=x,
            target=x if target is None else target,
            terms=terms,
            objective=self.objective,
            activation=self.activation,
            weights=weights,
            cast=as_cast,
            dense=self.jump is None and self.world.virtual == 1 and is_dense(self.activation, self.dense, *as_cast),
            autocast_off=autocast_off(x),
            encode=self._encode,
            observe=self._observe,
            parameters=dict(self.named_parameters()),
            rows=None if self.transcoder else found,
            world=self.world,
        )

    def _weights(self, x: Tensor) -> Weights:
        activation, threshold = self.activation, None
        if isinstance(activation, (ReLU, JumpReLU)) or (isinstance(activation, BatchTopK) and not self.training):
            threshold = self._threshold(x.dtype)
            threshold = threshold if isinstance(threshold, Tensor) else x.new_zeros((), dtype=accumulator(x.dtype))
        gates = (self.b_gate, self.r_mag, self.b_mag) if isinstance(activation, Gated) else (None, None, None)
        bandwidth = activation.bandwidth if isinstance(activation, JumpReLU) else None
        b_pre, prefixes = self.b_dec if self.pre_bias else None, self.prefixes or [self.d_sae]
        return Weights(self.W_enc, self.W_dec, self.b_dec, self.b_enc, b_pre, self.W_skip, threshold, *gates, bandwidth, prefixes)

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

    # ------------------------------------------------------------ files

    def config(self) -> dict[str, Any]:
        """What ``from_config`` builds an equal module of, in JSON's types; the names that sparsify knows are its own."""
        return to_json(self)

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
        return cls(**arguments(config), dtype=dtype, device=device, seed=seed)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes ``cfg.json`` and ``sae.safetensors`` into a folder, normalisation folded in; TopK ones without ``normalise_rows`` load in
        EleutherAI's sparsify. Needs safetensors.

        ``sae.safetensors`` holds checksums and the configuration too, which is what ``load`` takes: a reader gets the older module or the
        new one, whole, also where a save was interrupted; ``cfg.json`` is for other readers. What evaluation needs is kept: the running
        threshold, and the silent counts, by which features are dead. Training state (optimiser, unfolded normalisation) is what
        ``save_checkpoint`` keeps. OSError that names the file where it could not be written.
        """
        return modules.save(self, folder)

    def portable(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, configuration) with the normalisation folded in and no memory shared between tensors."""
        (tensors, bandwidth), config = self._folded(), self.config()
        if self.tied:
            tensors["W_enc"] = tensors["W_dec"].clone()
        return tensors, config | ({"bandwidth": bandwidth} if "bandwidth" in config else {})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: torch.device | str | None = None) -> SAE:
        """Reads a folder that ``save`` has written, in evaluation mode, as ``from_pretrained``. Needs safetensors. A damaged folder raises
        ValueError."""
        return modules.load(cls.from_config, folder, device)[0]

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        format: pretrained.Format | None = None,  # noqa: A002
        subfolder: str | None = None,
        revision: str | None = None,
        fold_decoder_norm: bool | None = None,
        scaling_factor: float | None = None,
        pre_bias: bool | None = None,
        k: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> SAE:
        """Reads an SAE or transcoder that this library or another has saved, or of a published release; in evaluation mode.

        Args:
            source: a folder, the weights' file in it, or a Hub repository ``"owner/name"`` (needs huggingface_hub; only files of known
                names are downloaded).
            format: "fastsae" (``save``), "saelens" (``cfg.json`` and ``sae_weights.safetensors``, of version 6 or older or of its trainer),
                "sparsify" (``cfg.json``, ``sae.safetensors``), "dictionary_learning" (``config.json``, ``ae.pt``, a checkpoint or a
                backup), "gemma_scope" (``params.npz``), "gemma_scope_2" (``params.safetensors``), "llama_scope" (``hyperparams.json`` and
                ``checkpoints/final.safetensors``, or ``config.json`` and ``sae_weights.safetensors``), "circuit_tracer" (a layer's file),
                "openai", "goodfire", "qwen_scope" or "deepseek_r1" (the file itself). None: by the names of the files and tensors.
            subfolder: path inside the folder or repository, of a folder, e.g. sparsify's hookpoint ``"layers.5.mlp"``, or of a file.
            revision: of the Hub repository: branch, tag or commit.
            fold_decoder_norm: give the decoder unit rows and the latents their norms: the same reconstruction. None: what the library's own
                loader does (dictionary_learning's ``AutoEncoder``: yes; others: no). Not for top k, whose choice it would change.
            scaling_factor: for SAELens's ``normalize_activations`` by one number ("expected_average_only_in", "constant_scalar_rescale")
                that has not been folded: the factor of the inputs, where the file does not hold it.
            pre_bias: for dictionary_learning's ``JumpReluAutoEncoder``, whose files do not say whether ``b_dec`` is subtracted from the
                input. None: no, as its loader assumes.
            k: of files that do not hold it: Qwen-Scope's outside its repository's folder, circuit-tracer's TopK, some of
                dictionary_learning's.
            dtype: of the parameters; None: the file's (SAELens: the one that its configuration names; Gemma Scope: float32).
            device: of the parameters; None: the CPU.

        Wrappers' prefixes of names (``module.``, ``_orig_mod.``, ``ae.``) are left out. Loading takes at most 1.3 times the memory of the
        tensors, beside the file's own pages (twice for a compressed ``.npz`` file).

        What differs from the other library's module: the input is flat (SAELens's ``hook_z`` SAEs: pass ``z.flatten(-2)``); SAELens's
        decoder norms of top k (``rescale_acts_by_decoder_norm``), ``finetuning_scaling_factor`` and input scale are folded into the
        weights; a BatchTopK keeps, as there, the scores above its running threshold (all positive ones where it is still -1), and the
        batch's best in training mode, and is read as a TopK where the file holds no threshold; dictionary_learning's optional threshold
        of a TopK is left out.

        ``normalise_decoder`` is what the library's trainer does (sparsify: its setting; dictionary_learning: yes, but not for
        ``AutoEncoderNew``; Gemma Scope, OpenAI: yes; SAELens: no, but for old files that say so), and only where the decoder's rows have
        norm 1, up to 2e-6 or the spacing of half precision: no step then changes what the file computes but by its learning rate.

        Refused by name: whitening that is not folded, a skip of rows that are normalised, architectures other than those of ``SAE``
        (sparsify's ``groupmax`` and signed top k; matching pursuit, temporal), cross-layer transcoders (``CrossLayerTranscoder`` reads
        those), and a square encoder of which nothing says whether it is ``[F, D]``.

        Nothing in a file is executed: tensors come from safetensors, torch's weights-only unpickler or arrays without pickles.

        Raises:
            FileNotFoundError: a folder or file that is not there. ValueError: a damaged or contradictory file, or one that is not
            supported; the message says what came. ImportError: safetensors or huggingface_hub is not installed.
        """
        options = common.Options(fold_decoder_norm, scaling_factor, pre_bias, k, dtype)
        return modules.from_pretrained(cls.from_config, source, format, subfolder, revision, options, device)


def keep_dtypes(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Buffers have the dtypes that they had, wherever they have been moved: a running mean stops moving in half precision."""
    for name, buffer in before.items():
        now = module.get_buffer(name)
        if now.dtype != buffer.dtype:
            setattr(module, name, buffer.to(now.device))
