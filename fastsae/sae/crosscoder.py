"""Crosscoder: one set of latents for several layers or models, an ``SAE`` over their activations side by side with norms of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastsae._core import checks
from fastsae.formats import pretrained
from fastsae.latents import Latents
from fastsae.sae.activations import BatchTopK, Gated, Kind, L, TopK
from fastsae.sae.config import arguments
from fastsae.sae.inputs import Encoded, Inputs
from fastsae.sae.losses import AuxK, Weights, features, layer_fvu, part_norms, squares, unranked
from fastsae.sae.module import SAE
from fastsae.sae.reconstruction import Reconstruction

if TYPE_CHECKING:
    from typing_extensions import Self


class Crosscoder(SAE[L]):
    """One set of latents for L layers (or models): ``latents = activation(sum over l of W_enc[l] x[l] + b_enc)``,
    ``x_hat[l] = W_dec[l]^T latents + b_dec[l]``.

    It is an ``SAE`` over rows of ``L * d_model`` numbers, the layers side by side: parameters ``W_enc, W_dec [F, L * d_model]``,
    ``b_enc [F]``, ``b_dec [L * d_model]``, which is not subtracted from ``x``; ``encoders``, ``decoders`` and ``biases`` are views by
    layer. What differs is how long a decoder row is: ``n[f] = sum over l of |W_dec[f, l]|`` (Lindsey et al. 2024).

    - ``l1`` weighs a latent with ``n``; its gradient reaches each layer's decoder by that layer's norm.
    - TopK, AbsTopK and BatchTopK compare ``n * score`` (no gradient through ``n``), and AuxK likewise; the latents are the scores
      themselves, those of TopK in descending order of ``n * score``. A feature with ``n = 0`` has the latent 0. BatchTopK's running
      threshold is one of ``n * score``.
    - The loss is the squared error summed over layers; ``fvu`` has one number a layer.

    Wherever ``SAE`` takes ``x [.., d_in]`` this takes ``x [.., L, d_model]``, or ``[.., L * d_model]`` flat; targets likewise, masks
    ``[..]``. Reconstructions are ``[.., L, d_model]``. ``optim.Adam(crosscoder).step(x)``, ``Trainer``, ``SAEs`` (rows flat), ``save``,
    ``load`` and checkpoints are those of ``SAE``.

    Args:
        n_layers: L, at least 2. d_model: width of each layer. d_sae: number of features F.
        activation: ``TopK``, ``AbsTopK``, ``BatchTopK``, ``ReLU`` (train with ``l1``) or ``JumpReLU`` (with ``l0``).
        prefixes, objective, l1, l0, aux, dead_after, dense, dtype, device, seed: as in ``SAE``.

    Raises: TypeError, ValueError as ``SAE``; ValueError: ``Gated``.

    Source: Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing"; BatchTopK after Minder et al. 2025
    (arXiv 2504.02922).
    """

    def __init__(
        self,
        n_layers: int,
        d_model: int,
        d_sae: int,
        activation: Kind[L] = TopK(64),  # noqa: B008 (a frozen dataclass)
        *,
        prefixes: Sequence[int] | None = None,
        objective: Literal["mse", "fvu"] = "mse",
        l1: float = 0.0,
        l0: float = 0.0,
        aux: AuxK | None = None,
        dead_after: int = 10_000_000,
        dense: bool | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ):
        n_layers = checks.integer("Crosscoder", "n_layers", n_layers, 2)
        d_model = checks.integer("Crosscoder", "d_model", d_model, 1)
        if isinstance(activation, Gated):
            raise ValueError("Crosscoder: activation must be TopK, AbsTopK, BatchTopK, JumpReLU or ReLU, got Gated")
        options: dict[str, Any] = {"prefixes": prefixes, "objective": objective, "l1": l1, "l0": l0, "aux": aux, "dead_after": dead_after}
        options |= {"dense": dense, "dtype": dtype, "device": device, "seed": seed}
        super().__init__(n_layers * d_model, d_sae, activation, pre_bias=False, normalise_decoder=False, **options)
        self.n_layers, self.d_model = n_layers, d_model

    def extra_repr(self) -> str:
        return f"n_layers={self.n_layers}, d_model={self.d_model}, {super().extra_repr()}"

    @property
    def encoders(self) -> Tensor:
        """``[F, L, d_model]``, a view."""
        return self._parts(self.W_enc)

    @property
    def decoders(self) -> Tensor:
        """``[F, L, d_model]``, a view; for ``fastsae.compare``'s ``relative_norms``, ``exclusive`` and the rest."""
        return self._parts(self.W_dec)

    @property
    def biases(self) -> Tensor:
        """``b_dec`` as ``[L, d_model]``, a view."""
        return self._parts(self.b_dec)

    def _parts(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.n_layers, self.d_model))

    def _flat(self, op: str, name: str, t: Tensor) -> Tensor:
        """Rows side by side; TypeError or ValueError otherwise."""
        checks.tensor(op, name, t, like=self.W_dec)
        if t.dim() >= 2 and t.shape[-2:] == (self.n_layers, self.d_model):
            return t.flatten(-2)
        if t.dim() == 0 or t.shape[-1] != self.d_in:
            want = f"[.., L={self.n_layers}, D={self.d_model}] or [.., {self.d_in}]"
            raise ValueError(f"{op}: {name} must have shape {want}, got {list(t.shape)}")
        return t

    def _rank(self) -> Tensor | None:
        """``[F]``: what a top k multiplies scores with."""
        if not isinstance(self.activation, (TopK, BatchTopK)):
            return None
        return part_norms(self.W_dec.detach(), self.n_layers).sum(1).to(self.W_dec.dtype)

    def _weights(self, x: Tensor) -> Weights:
        return replace(super()._weights(x), layers=self.n_layers, rank=self._rank())

    def _encode(self, x: Tensor, scale: Tensor | None = None) -> Encoded:
        rank = self._rank() if scale is None else scale
        found = super()._encode(x, rank)
        latents: Any = found.latents
        return found._replace(latents=replace(latents, values=unranked(latents.values, features(latents), rank)))

    def encode(self, x: Tensor) -> L:
        """``[.., L, d_model]`` to latents ``[.., F]``."""
        return super().encode(self._flat("Crosscoder.encode", "x", x))

    def decode(self, latents: Latents, x: Tensor | None = None) -> Tensor:
        """Latents to ``[.., L, d_model]``; ``x`` plays no part."""
        return self._parts(super().decode(latents))

    def forward(self, x: Tensor, target: Tensor | None = None) -> Reconstruction[L]:
        """``Reconstruction(x_hat [.., L, d_model], latents, squared_error [..])``, the error summed over layers."""
        flat = self._flat("Crosscoder.forward", "x", x)
        wanted = flat if target is None else self._flat("Crosscoder.forward", "target", target)
        latents = super().encode(flat)
        x_hat = self.decode(latents)
        return Reconstruction(x_hat, latents, squares(x_hat.flatten(-2), wanted).sum(-1))

    def step_inputs(self, op: str, x: Tensor, target: Tensor | None = None, *rest: Any, **terms: Any) -> Inputs:
        target = None if target is None else self._flat(op, "target", target)
        return super().step_inputs(op, self._flat(op, "x", x), target, *rest, **terms)

    def init_from(self, x: Tensor, target: Tensor | None = None, *, mask: Tensor | None = None, **options: Any) -> Self:
        """``SAE.init_from``, its ``norm`` one number for all layers."""
        target = None if target is None else self._flat("Crosscoder.init_from", "target", target)
        return super().init_from(self._flat("Crosscoder.init_from", "x", x), target, mask=mask, **options)

    @torch.no_grad()
    def fvu(self, x: Tensor) -> Tensor:
        """``[L]``: each layer's fraction of variance unexplained, ``sum (x - x_hat)^2 / sum (x - mean x)^2`` over rows; 0/0 = 0."""
        return layer_fvu(self(x).x_hat, self._parts(self._flat("Crosscoder.fvu", "x", x)))

    # ------------------------------------------------------------ files

    def config(self) -> dict[str, Any]:
        return {"n_layers": self.n_layers, **super().config()}

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ) -> Crosscoder:
        if "n_layers" not in config:
            raise ValueError("it is of an SAE, which has no layers")
        n_layers = checks.integer("Crosscoder", "n_layers", config["n_layers"], 2)
        options = arguments({name: value for name, value in config.items() if name != "n_layers"})
        d_in = checks.integer("Crosscoder", "d_in", options.pop("d_in"), n_layers)
        fixed = {"pre_bias": False, "tied": False, "skip": False, "normalise_decoder": False, "d_out": None}
        fixed |= {"jump": None, "normalise_rows": None}
        if d_in % n_layers or any(options.pop(name, value) != value for name, value in fixed.items()):
            raise ValueError(f"it has settings that no Crosscoder of {n_layers} layers has")
        return cls(n_layers, d_in // n_layers, **options, dtype=dtype, device=device, seed=seed)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        format: pretrained.Writable = "fastsae",  # noqa: A002
        metadata: Mapping[str, Any] | None = None,
    ) -> Path:
        """``SAE.save_pretrained`` in the format "fastsae", the only one that has a place for layers; ValueError for another."""
        if format != "fastsae":
            raise ValueError(f"Crosscoder.save_pretrained: format must be 'fastsae', got {format!r}")
        return super().save_pretrained(folder, format=format, metadata=metadata)


def of_config(config: Mapping[str, Any], **options: Any) -> SAE:
    """A fresh ``Crosscoder`` or ``SAE``, whichever a configuration is of."""
    return (Crosscoder if "n_layers" in config else SAE).from_config(config, **options)
