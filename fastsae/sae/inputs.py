"""The arguments of one loss, checked, with all that it needs of a module: ``step`` and ``autograd`` ask the module for nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsae._core import checks
from fastsae._core.world import ALONE, World
from fastsae.latents import Latents
from fastsae.sae import tiles
from fastsae.sae.activations import AbsTopK, Activation, BatchTopK, Gated, JumpReLU, ReLU
from fastsae.sae.config import Settings
from fastsae.sae.losses import AuxK, Pass, Terms, Weights


class Encoded(NamedTuple):
    """Latents; ``counted []``, their number, differentiable in a threshold (JumpReLU with a bandwidth); ``min_kept []``, the smallest
    score that BatchTopK's selection kept."""

    latents: Latents
    counted: Tensor | None
    min_kept: Tensor | None


class Inputs(NamedTuple):
    """What one loss is computed from: a module makes it once a step.

    Attributes:
        x: ``[B, D]``, the rows that count, scaled. target: ``[B, d_out]``, likewise; ``x`` itself where none was given.
        terms, objective, activation: of the loss.
        weights: the parameters. cast: ``x`` and the weights as operations cast them under autocast, the same ones without it.
        dense: whether to go tile by tile over F.
        autocast_off: what computes with ``cast`` runs in it.
        encode: the latents of rows, by the operations, which cast for themselves.
        observe: takes notice of a pass (silent features, running threshold) where the module trains, and returns ``[F]`` bool, which
            features are dead.
        parameters: by name; a tied encoder has none of its own.
        world: the processes that hold the dictionary; where features are sharded ``weights`` and ``parameters`` are this process's part,
            and the rows those of all processes.
    """

    x: Tensor
    target: Tensor
    terms: Terms
    objective: str
    activation: Activation
    weights: Weights
    cast: tuple[Tensor, Weights]
    dense: bool
    autocast_off: AbstractContextManager[Any]
    encode: Callable[[Tensor], Encoded]
    observe: Callable[[Pass], Tensor]
    parameters: dict[str, nn.Parameter]
    world: World = ALONE


def check_x(op: str, x: Any, d_in: int, like: Tensor) -> None:
    """``[.., d_in]`` on the device of the parameters; TypeError or ValueError otherwise."""
    checks.tensor(op, "x", x, like=like)
    if x.dim() == 0 or x.shape[-1] != d_in:
        raise ValueError(f"{op}: x must have shape [.., d_in={d_in}], got {list(x.shape)}")


def checked_rows(
    op: str, sae: Settings, x: Tensor, target: Tensor | None, mask: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The rows that count, ``[B, D]`` and ``[B, d_out]``, in the dtype of the parameters; ``x`` has been checked."""
    if target is None and sae.transcoder:
        raise ValueError(f"{op}: target must be given for a transcoder, got None")
    if target is not None:
        checks.tensor(op, "target", target, like=x)
        want = (*x.shape[:-1], sae.d_out)
        checks.shape(op, "target", target, want, str(list(want)))
    if mask is not None:
        mask = checks.mask(op, "mask", mask, x)
        checks.shape(op, "mask", mask, tuple(x.shape[:-1]), str(list(x.shape[:-1])))
        x, target = x[mask], None if target is None else target[mask]
    rows = x.shape[:-1].numel()
    x = checks.widened(x.reshape(rows, sae.d_in), like)
    return x, None if target is None else checks.widened(target.reshape(rows, sae.d_out), like)


def checked_terms(op: str, sae: Settings, l1: Any = None, l0: Any = None, aux: Any = None) -> Terms:
    """Of a loss, the module's own where None is given."""
    l1, l0 = sae.l1 if l1 is None else l1, sae.l0 if l0 is None else l0
    l1, l0 = (checks.number(op, name, value, positive=False) for name, value in (("l1", l1), ("l0", l0)))
    if l0 and getattr(sae.activation, "bandwidth", None) is None:
        raise ValueError(f"{op}: l0 needs JumpReLU with a bandwidth, the activation is {sae.activation}")
    aux = sae.aux if aux is None else aux or None
    if aux is not None and not isinstance(aux, AuxK):
        raise TypeError(f"{op}: aux must be an AuxK, False or None, got {type(aux).__name__}")
    if aux is not None and isinstance(sae.activation, Gated):
        raise ValueError(f"{op}: aux does not go with Gated, whose gate has a reconstruction error of its own")
    if aux is not None and aux.relu and isinstance(sae.activation, AbsTopK):
        raise ValueError(f"{op}: aux must have relu=False with AbsTopK, whose scores may be negative, got {aux}")
    return Terms(l1, l0, aux)


def cast(x: Tensor, w: Weights) -> tuple[Tensor, Weights]:
    """As operations cast them under autocast; thresholds are compared as they are."""
    if not checks.autocasting(x.device):
        return x, w
    names = ("W_enc", "W_dec", "b_dec", "b_enc", "b_pre", "skip", "b_gate", "r_mag", "b_mag")
    rows, *tensors = checks.autocast(x, *(getattr(w, name) for name in names))
    return rows, replace(w, **dict(zip(names, tensors)))


def autocast_off(x: Tensor) -> AbstractContextManager[Any]:
    return torch.autocast(x.device.type, enabled=False) if checks.autocasting(x.device) else nullcontext()


def is_dense(activation: Activation, asked: bool | None, x: Tensor, w: Weights) -> bool:
    """Whether a loss goes tile by tile: as asked, or by a sample of the scores."""
    if not isinstance(activation, (ReLU, JumpReLU, Gated)) or x.shape[0] == 0:
        return False
    if asked is not None:
        return asked
    with torch.no_grad(), autocast_off(x):
        return tiles.measured_density(x, w) > tiles.DENSITY


def counted(inputs: Inputs) -> str | None:
    """What a loss uses that is counted over batches, and so by each process for itself."""
    if isinstance(inputs.activation, BatchTopK):
        return "BatchTopK's threshold"
    return None if inputs.terms.aux is None else "dead features"
