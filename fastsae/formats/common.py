"""What the readers of all formats do alike: tensors under ``SAE``'s names, checks of what a configuration claims, exact rewritings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """What a caller may add to a file; see ``SAE.from_pretrained``."""

    fold_decoder_norm: bool | None = None
    scaling_factor: float | None = None
    pre_bias: bool | None = None
    k: int | None = None
    dtype: torch.dtype | None = None


class Loaded(NamedTuple):
    """``config`` as ``SAE.config()``; ``tensors`` by ``SAE``'s names; ``more`` as in ``weight_files.contents``."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    more: dict[str, Any] = {}  # noqa: RUF012 (never written to)


def take(tensors: Mapping[str, Tensor], names: Mapping[str, str], optional: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Tensors under ``SAE``'s names; ValueError for one that is missing, or there without being known."""
    optional = optional or {}
    missing, unknown = sorted(set(names) - set(tensors)), sorted(set(tensors) - set(names) - set(optional))
    if missing or unknown:
        raise ValueError(f"expected the tensors {sorted(names)}, missing {missing}, unknown {unknown}")
    named = {**optional, **names}
    return {named[name]: tensor for name, tensor in tensors.items()}


def matrices(tensors: Mapping[str, Tensor], *transposed: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """``tensors`` in memory of their own (a file's may be the file itself), the matrices in ``transposed`` turned feature-major."""
    for name in ("W_enc", "W_dec", *(["W_skip"] if "W_skip" in tensors else [])):
        if tensors[name].dim() != 2:
            raise ValueError(f"{name} must be a matrix, got the shape {list(tensors[name].shape)}")
    return {name: owned(tensor.T if name in transposed else tensor, dtype) for name, tensor in tensors.items()}


def owned(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous copy, made without a second one on the way."""
    return tensor.to(dtype=dtype or tensor.dtype, copy=True, memory_format=torch.contiguous_format)


def agree(what: str, claimed: Any, held: int) -> None:
    """A size that the configuration claims, where it does, is the tensors'."""
    if claimed is not None and (isinstance(claimed, bool) or not isinstance(claimed, int) or claimed != held):
        raise ValueError(f"the configuration claims {what}={claimed!r}, the tensors have {held}")


def count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    return value


def scalar(name: str, value: Tensor) -> Tensor:
    """A threshold of all features."""
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(f"{name} must be one number, got {list(value.shape)} {value.dtype}")
    return owned(value.reshape(()), torch.float32)


def flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return default if value is None else value


def unit(W: Tensor) -> bool:
    """Whether all rows have norm 1, up to 2e-6 or, in half precision, its spacing at 1; rows of zeros stay what they are in any case."""
    tolerance = max(2e-6, torch.finfo(W.dtype).eps if W.dtype in (torch.float16, torch.bfloat16) else 0.0)
    norms = norms_of(W)
    return bool((((norms - 1).abs() <= tolerance) | (norms == 0)).all())


def norms_of(W: Tensor) -> Tensor:
    """Norms of the rows in float64, a few rows at a time."""
    out = torch.empty(W.shape[0], dtype=torch.float64, device=W.device)  # first: pieces between the copies would keep their room
    for part, norms in zip(W.split(_few(W)), out.split(_few(W))):
        norms.copy_(torch.linalg.vector_norm(part.double(), dim=1))
    return out


def _few(tensor: Tensor) -> int:
    """Rows of about a megabyte in float64."""
    return max(1, (1 << 17) * max(tensor.shape[0], 1) // max(tensor.numel(), 1))


def config(tensors: Mapping[str, Tensor], activation: str, **more: Any) -> dict[str, Any]:
    F, d_in = tensors["W_enc"].shape
    return {"d_in": d_in, "num_latents": F, "activation": activation, "transcode": False, **more}


def fold_decoder_norm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Unit decoder rows, their norms in the latents, in place: the same reconstruction, for activations that commute with positive factors
    of each feature. Rows of norm 0 stay, with latents 0."""
    norm = norms_of(tensors["W_dec"])
    for name in ("W_enc", "b_enc", "threshold", "b_gate", "b_mag"):
        if name in tensors:
            multiply(tensors[name], norm)
    multiply(tensors["W_dec"], torch.where(norm == 0, 1.0, norm), divide=True)
    return tensors


def scale_inputs(tensors: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """What multiplies its inputs by a number and divides its outputs by it, without doing so; in place."""
    tensors["W_enc"].mul_(factor)
    for name in ("W_dec", "b_dec"):
        tensors[name].div_(factor)
    return tensors


def multiply(tensor: Tensor, factor: Tensor, divide: bool = False) -> None:
    """Each row times, or divided by, its factor, in place and rounded once."""
    for part, by in zip(tensor.split(_few(tensor)), factor.double().split(_few(tensor))):
        by = by.reshape(-1, *[1] * (part.dim() - 1))
        part.copy_(part.double() / by if divide else part.double() * by)


def shift_pre_bias(tensors: dict[str, Tensor], sign: int) -> dict[str, Tensor]:
    """Moves ``-b_dec`` from the input into the biases (-1), or back (+1): the same scores up to rounding."""
    shift = sign * (tensors["W_enc"].double() @ tensors["b_dec"].double())
    out = dict(tensors)
    for name in ("b_enc", "b_gate", "b_mag"):
        if name in tensors:
            stretch = tensors["r_mag"].double().exp() if name == "b_mag" else 1.0
            out[name] = (tensors[name].double() + shift * stretch).to(tensors[name].dtype)
    return out
