"""Where an SAE starts: its parameters, the centre and scale of data, and that scale folded back into the weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fastsae._core import checks, finite, seeds
from fastsae._core.precision import full_precision
from fastsae.reference import accumulator
from fastsae.sae.activations import BatchTopK, Gated, JumpReLU
from fastsae.sae.config import Settings


def buffers(sae: Settings, features: int, device: torch.device) -> dict[str, Tensor]:
    """By name, of an SAE that has seen nothing."""
    made = {"silent": torch.zeros(features, dtype=torch.int64, device=device)}
    made["scale"] = torch.ones(2, device=device, dtype=torch.float32)
    if isinstance(sae.activation, BatchTopK):
        made["running_threshold"] = torch.full((), -1.0, device=device, dtype=torch.float32)
    return made


def parameters(
    sae: Settings, dtype: torch.dtype, device: torch.device, seed: int | None, own: slice | None = None
) -> dict[str, nn.Parameter | None]:
    """By name, in the order of an SAE's state: decoder rows uniform on the sphere, the encoder at them where shapes agree, biases 0.
    ``own``: a range of features, whose numbers are those that the whole has."""
    generator = None
    if seed is not None:
        generator = torch.Generator().manual_seed(checks.integer("SAE", "seed", seed, -(2**63), 2**64 - 1))

    def directions(width: int) -> Tensor:
        if device.type == "meta":
            return torch.empty(sae.d_sae, width, device=device, dtype=dtype)
        shape = sae.d_sae, width
        rows = seeds.normal(generator, *shape) if own is None else seeds.normal_rows(generator, *shape, own)
        return (rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)).to(device=device, dtype=dtype)

    W = directions(sae.d_out)

    def vector(start: float | Tensor | None) -> nn.Parameter:
        if isinstance(start, Tensor):
            start = start.detach()[own] if own is not None and start.dim() else start.detach()
            return nn.Parameter(W.new_zeros(len(W)) + start.to(W))
        number = torch.tensor(start or 0.0, dtype=torch.float64, device="cpu").to(dtype).item()  # infinite beyond the dtype
        return nn.Parameter(W.new_full((len(W),), number))  # no sum: on the meta device torch's compiler would be imported for it

    made: dict[str, nn.Parameter | None] = {}
    if not sae.tied:
        made["W_enc"] = nn.Parameter(W.clone() if sae.d_out == sae.d_in else directions(sae.d_in))
    activation = sae.activation
    if isinstance(activation, Gated):
        made["b_enc"] = None
        made |= {name: vector(getattr(activation, name)) for name in ("b_gate", "r_mag", "b_mag")}
    else:
        made["b_enc"] = vector(0.0)
    made["W_dec"] = nn.Parameter(W)
    if sae.tied:
        made["W_enc"] = made["W_dec"]
    made["b_dec"] = nn.Parameter(W.new_zeros(sae.d_out))
    made["W_skip"] = nn.Parameter(W.new_zeros(sae.d_out, sae.d_in)) if sae.skip else None
    if isinstance(activation, JumpReLU):
        made["threshold"] = vector(activation.threshold)
    return made


# ---------------------------------------------------------------- data


def check_options(op: str, b_dec: str | None, norm: str | None, encoder: str | None) -> None:
    for name, value, known in (
        ("b_dec", b_dec, ("mean", "geometric_median")),
        ("norm", norm, ("rms",)),
        ("encoder", encoder, ("transpose",)),
    ):
        if value is not None and value not in known:
            raise ValueError(f"{op}: {name} must be {' or '.join(map(repr, known))} or None, got {value!r}")


def measured(
    op: str, x: Tensor, target: Tensor, b_dec: Literal["mean", "geometric_median"] | None, norm: Literal["rms"] | None, scale: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Of finite rows, at least one: factors ``[2]`` of inputs and targets, like ``scale``, and the centre ``[d_out]`` of the targets
    as they are. ValueError where a result is not finite."""
    wide, factors, centre = accumulator(x.dtype), torch.ones_like(scale), None
    if norm == "rms":
        factors = torch.stack([1 / t.to(wide).square().mean().sqrt() for t in (x, target)]).to(factors)
        if not bool((factors.isfinite() & (factors > 0)).all()):
            raise ValueError(f"{op}: norm='rms' needs activations that are finite and not all 0, and so their squares")
    if b_dec is not None:
        centre = target.to(wide).mean(0) if b_dec == "mean" else _geometric_median(target.to(wide))
        if not bool(centre.isfinite().all()):
            raise ValueError(f"{op}: the {b_dec} of the rows must be finite, got {float(centre[~centre.isfinite()][0])}")
    return factors, centre


def check_rows(op: str, rows: Tensor, x: Tensor, target: Tensor | None, mask: Tensor | None) -> None:
    """There are rows that count, and those of ``x`` and ``target`` as they were given are finite; ValueError otherwise."""
    if rows.shape[0] == 0:
        raise ValueError(f"{op}: x must hold at least one token that counts, got none")
    if (bad := finite.bad_row(x, target, mask)) is not None:
        raise ValueError(f"{op}: {bad}")


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


def folded(tensors: dict[str, Tensor], scale: Tensor, transcoder: bool) -> dict[str, Tensor]:
    """Parameters and the running threshold in the units of the data. Every activation commutes with a positive factor."""
    s, t = scale.to(torch.float64).unbind() if scale.device.type != "mps" else scale.unbind()
    factors = dict.fromkeys(("b_enc", "b_gate", "b_mag", "threshold", "running_threshold"), 1 / s)
    factors |= {"b_dec": 1 / t}
    if transcoder:
        factors |= {"W_dec": s / t, "W_skip": s / t}
    return {name: (tensor * factors[name]).to(tensor.dtype) if name in factors else tensor for name, tensor in tensors.items()}
