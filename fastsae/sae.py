"""A sparse autoencoder as a torch module, on the fused operations; trains with any torch optimiser."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsae import _checks
from fastsae.activations import JumpReLU, ReLU, TopK
from fastsae.latents import Latents
from fastsae.ops._common import accumulator
from fastsae.ops.decode import decode
from fastsae.ops.encode import encode_threshold
from fastsae.ops.reconstruct import Reconstruction, encode

_WEIGHTS = "sae.safetensors"
_CONFIG = "cfg.json"


class Loss(NamedTuple):
    """``loss []`` to call ``backward`` on; ``fvu []`` and ``l0 []`` detached, of the tokens that count."""

    loss: Tensor
    fvu: Tensor
    l0: Tensor


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """``(a - b)^2`` in the accumulation dtype."""
    wide = accumulator(a.dtype)
    return (a.to(wide) - b.to(wide)).square()


class SAE(nn.Module):
    """Sparse autoencoder: ``latents = activation(W_enc (x - b_dec) + b_enc)``, ``x_hat = W_dec^T latents + b_dec``.

    Parameters: ``W_enc [F, D]``, ``b_enc [F]``, ``W_dec [F, D]`` (unit rows at the start), ``b_dec [D]``, feature-major; with JumpReLU
    ``threshold [F]``.

    Args:
        d_in: activation dimension D, at least 1.
        d_sae: number of features F, at least 1.
        activation: ``TopK(k)``, ``ReLU()`` (train with ``l1``) or ``JumpReLU(threshold, bandwidth)`` (train with ``l0``).
        dtype, device: of the parameters.
        seed: of the decoder's random directions; None draws from torch's global generator.

    Raises: TypeError, ValueError as the operations do.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        activation: TopK | ReLU | JumpReLU = TopK(64),  # noqa: B008 (a frozen dataclass)
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ):
        super().__init__()
        _checks.integer("SAE", "d_in", d_in, 1)
        _checks.integer("SAE", "d_sae", d_sae, 1)
        if not isinstance(activation, (TopK, ReLU, JumpReLU)):
            raise TypeError(f"SAE: activation must be TopK, ReLU or JumpReLU, got {type(activation).__name__}")
        if isinstance(activation, TopK):
            _checks.integer("SAE", "activation.k", activation.k, 1, d_sae, f"d_sae={d_sae}")
        if isinstance(activation, JumpReLU):
            if isinstance(activation.threshold, Tensor):
                _checks.tensor("SAE", "activation.threshold", activation.threshold)
                if activation.threshold.dim():
                    _checks.shape("SAE", "activation.threshold", activation.threshold, (d_sae,), f"[d_sae={d_sae}] or []")
            else:
                _checks.number("SAE", "activation.threshold", activation.threshold, positive=False)
            if activation.bandwidth is not None:
                _checks.number("SAE", "activation.bandwidth", activation.bandwidth)
        if dtype not in _checks.FLOATS:
            raise TypeError(f"SAE: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
        self.d_in, self.d_sae, self.activation = d_in, d_sae, activation
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        directions = torch.randn(d_sae, d_in, generator=generator)
        directions = (directions / torch.linalg.vector_norm(directions, dim=1, keepdim=True)).to(device=device, dtype=dtype)
        self.W_enc = nn.Parameter(directions.clone())
        self.b_enc = nn.Parameter(directions.new_zeros(d_sae))
        self.W_dec = nn.Parameter(directions)
        self.b_dec = nn.Parameter(directions.new_zeros(d_in))
        if isinstance(activation, JumpReLU):
            start = activation.threshold.detach().to(directions) if isinstance(activation.threshold, Tensor) else activation.threshold
            self.threshold = nn.Parameter(directions.new_zeros(d_sae) + start)

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_sae={self.d_sae}, activation={self.activation}"

    def encode(self, x: Tensor) -> Latents:
        """``[.., D]`` to latents over F features."""
        return self._encode(x)[0]

    def _encode(self, x: Tensor) -> tuple[Latents, Tensor | None]:
        if isinstance(self.activation, JumpReLU):
            bandwidth = self.activation.bandwidth
            result = encode_threshold(x, self.W_enc, self.b_enc, threshold=self.threshold, b_pre=self.b_dec, bandwidth=bandwidth)
            return (result, None) if bandwidth is None else result
        return encode(x, self.W_enc, self.b_enc, self.activation, b_pre=self.b_dec), None

    def decode(self, latents: Latents) -> Tensor:
        """Latents to ``[.., D]``."""
        return decode(latents, self.W_dec, self.b_dec)

    def forward(self, x: Tensor) -> Reconstruction:
        """``Reconstruction(x_hat, latents, squared_error)`` of ``x [.., D]``."""
        latents = self.encode(x)
        x_hat = self.decode(latents)
        return Reconstruction(x_hat, latents, _squares(x_hat, x).sum(-1))

    def loss(self, x: Tensor, *, mask: Tensor | None = None, l1: float = 0.0, l0: float = 0.0) -> Loss:
        """Mean squared error a token (summed over D), plus ``l1 * sum |latents|`` and ``l0 * number of latents`` a token.

        Args:
            x: ``[.., D]``.
            mask: bool ``[..]``: tokens that count (False: padding, BOS; they take no part).
            l1: weight of the L1 penalty, scaled by the decoder's row norms so that it cannot be evaded.
            l0: weight of the straight-through L0 penalty; needs ``JumpReLU(bandwidth=...)``.

        Returns:
            ``Loss(loss, fvu, l0)``. ``fvu = sum (x - x_hat)^2 / sum (x - mean x)^2``, 0/0 = 0.
        """
        _checks.tensor("SAE.loss", "x", x)
        if x.dim() == 0 or x.shape[-1] != self.d_in:
            raise ValueError(f"SAE.loss: x must have shape [.., d_in={self.d_in}], got {list(x.shape)}")
        l1, l0 = (_checks.number("SAE.loss", name, value, positive=False) for name, value in (("l1", l1), ("l0", l0)))
        if mask is not None:
            _checks.tensor("SAE.loss", "mask", mask, (torch.bool,), x)
            _checks.shape("SAE.loss", "mask", mask, tuple(x.shape[:-1]), str(list(x.shape[:-1])))
            x = x[mask]
        x = x.reshape(x.shape[:-1].numel(), self.d_in)
        latents, counted = self._encode(x)
        x_hat = self.decode(latents)
        tokens = max(x.shape[0], 1)
        error = _squares(x_hat, x).sum()
        loss = error / tokens
        if l1:
            feature = latents.indices if hasattr(latents, "indices") else latents.col  # pyright: ignore[reportAttributeAccessIssue]
            norms = torch.linalg.vector_norm(self.W_dec, dim=1)
            loss = loss + l1 * (latents.values.abs() * norms[feature.long()]).sum() / tokens
        if l0:
            if counted is None:
                raise ValueError(f"SAE.loss: l0 needs JumpReLU with a bandwidth, the activation is {self.activation}")
            loss = loss + l0 * counted.sum() / tokens
        spread = _squares(x, x.to(error.dtype).mean(0)).sum() if x.shape[0] else error.new_zeros(())
        fvu = torch.where((spread == 0) & (error == 0), 0.0, error.detach() / spread.detach())
        active = (latents.values.detach() != 0).sum() / tokens
        return Loss(loss, fvu, active)

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

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes ``cfg.json`` and ``sae.safetensors`` into a folder; TopK ones load in EleutherAI's sparsify. Needs safetensors.

        Both are written under a temporary name and renamed, so that a crash leaves the older file readable.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"encoder.weight": self.W_enc, "encoder.bias": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        config: dict[str, Any] = {"d_in": self.d_in, "num_latents": self.d_sae, "activation": type(self.activation).__name__.lower()}
        if isinstance(self.activation, TopK):
            config |= {"k": self.activation.k, "relu": self.activation.relu, "expansion_factor": 0, "normalize_decoder": True}
        if isinstance(self.activation, JumpReLU):
            tensors["threshold"] = self.threshold
            config["bandwidth"] = self.activation.bandwidth
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, folder / f"{_WEIGHTS}.part")
        (folder / f"{_CONFIG}.part").write_text(json.dumps(config, indent=1))
        for name in (_WEIGHTS, _CONFIG):
            os.replace(folder / f"{name}.part", folder / name)
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: torch.device | str | None = None) -> SAE:
        """Reads a folder that ``save`` has written. Needs safetensors. A damaged folder raises ValueError."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            config = json.loads((folder / _CONFIG).read_text())
            tensors = load_file(folder / _WEIGHTS, device=str(device or "cpu"))
            kind = config["activation"]
            activation: TopK | ReLU | JumpReLU
            if kind == "topk":
                activation = TopK(config["k"], config.get("relu", True))
            elif kind == "jumprelu":
                activation = JumpReLU(bandwidth=config.get("bandwidth"))
            elif kind == "relu":
                activation = ReLU()
            else:
                raise ValueError(f"unknown activation {kind!r}")
            sae = cls(config["d_in"], config["num_latents"], activation, dtype=tensors["W_dec"].dtype, device=device, seed=0)
            names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
            sae.load_state_dict({names.get(name, name): tensor for name, tensor in tensors.items()})
        except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"SAE.load: {folder} is not a folder that SAE.save wrote: {error}") from error
        return sae
