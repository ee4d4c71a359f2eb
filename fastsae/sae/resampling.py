"""Dead features put to use again, at inputs that are reconstructed badly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastsae._core import checks
from fastsae.ops.decode import decode
from fastsae.sae.activations import JumpReLU
from fastsae.sae.init import check_rows
from fastsae.sae.inputs import check_x, checked_rows
from fastsae.sae.losses import part_norms
from fastsae.sae.module import SAE
from fastsae.sae.stack import SAEs

_ROWS = 4096


@torch.no_grad()
def resample(
    sae: SAE | SAEs,
    opt: torch.optim.Optimizer | None,
    x: Tensor,
    target: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    dead: Tensor | None = None,
    share: float = 0.2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Starts dead features anew, each at a row drawn with a probability proportional to the square of the row's loss.

    The loss of a row is its squared error plus ``l1``'s term. The feature's decoder row becomes the row of ``target`` (``x``) at norm 1,
    its encoder row that of ``x`` at ``share`` times the mean norm of the encoder rows of the other features (of all where all are dead),
    its biases 0, a threshold what it was at the start; a tied row has norm 1. Rows of ``x`` are taken as the encoder sees them before
    ``b_dec`` is subtracted (``SAE.encoder_rows``). The optimiser's moments of all of these become 0, and ``silent`` too. Rows that are 0
    are not drawn; where nothing is left to draw (no loss at all) nothing is changed. Frozen parameters stay.

    Args:
        sae: what trains; of ``SAEs`` each member draws for itself, one after the other.
        opt: the optimiser over its parameters, fused or torch's; None: there is none yet.
        x: ``[.., D]`` (for ``SAEs`` also ``[E, B, D]``), finite; the paper takes 819,200 rows. target, mask: as in ``SAE.loss``.
        dead: ``[F]`` bool (``[E, F]``), what to start anew. None: ``dead_features``.
        generator: of the CPU; the result depends on nothing else. None: torch's global one. BatchTopK selects over 4,096 rows at a time.

    Returns: ``[F]`` bool (``[E, F]``): the features that were started anew.

    Raises: TypeError, ValueError: as ``SAE.init_from``; a sharded SAE; an optimiser over other parameters.

    In a process group call it with the same rows and generators everywhere. With ``Trainer``, in its ``callback``:

        >>> sae, x = fastsae.SAE(16, 64, fastsae.ReLU(), l1=0.1, dead_after=256, seed=0), torch.randn(512, 16)
        >>> opt = fastsae.optim.Adam(sae, lr=1e-3)
        >>> revive = lambda step, metrics: resample(sae, opt, x, generator=torch.Generator().manual_seed(step))
        >>> metrics = fastsae.Trainer(sae, opt, callback=revive, log_every=10, progress=False).fit([x], 20)

    Source: Bricken et al. 2023, "Towards Monosemanticity", appendix "Neuron Resampling".
    """
    op = "resample"
    checks.instance(op, "sae", sae, (SAE, SAEs), "an SAE or SAEs")
    share = checks.number(op, "share", share)
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"{op}: generator must be one of the CPU, got {generator.device}")
    members = (sae,) if isinstance(sae, SAE) else sae.members
    if members[0].world.virtual > 1:
        raise ValueError(f"{op}: sae is sharded: resample before fastsae.distributed.shard, or fastsae.distributed.gathered(sae)")
    held = {name: p for name, p in sae.named_parameters() if name not in ("b_dec", "W_skip") and p.requires_grad}
    if opt is not None and not {id(p) for group in opt.param_groups for p in group["params"]} & {id(p) for p in held.values()}:
        raise ValueError(f"{op}: opt must step parameters of sae, got {type(opt).__name__} over others")
    start = [member.dead_features for member in members]
    start = torch.stack(start) if isinstance(sae, SAEs) else start[0]
    if dead is not None:
        checks.tensor(op, "dead", dead, (torch.bool,), sae.silent)
        checks.shape(op, "dead", dead, tuple(start.shape), str(list(start.shape)))
    start = (start if dead is None else dead).clone()
    given, new = ((x, 3), (target, 3), (mask, 2)), list[dict[str, Tensor]]()
    for number, (member, own) in enumerate(zip(members, start.view(len(members), -1))):
        batch: list[Any] = [t[number] if t is not None and len(start.shape) == 2 and t.dim() == n else t for t, n in given]
        new.append(_anew(op, member, own, share, generator, *batch))
    for name, p in held.items():
        if (values := [each[name] for each in new if name in each]) and bool(start.any()):
            p[start] = torch.cat(values)
            for key, buffer in ({} if opt is None else opt.state.get(p, {})).items():
                if isinstance(buffer, Tensor) and buffer.shape == p.shape and key != "master":
                    buffer[start] = 0
    sae.silent[start] = 0
    sae.weights_changed()
    return start


def _anew(
    op: str, sae: SAE, dead: Tensor, share: float, generator: torch.Generator | None, x: Tensor, target: Tensor | None, mask: Tensor | None
) -> dict[str, Tensor]:
    """The rows of the parameters of the features ``dead``, by name; clears ``dead`` where no row can be drawn."""
    check_x(op, x, sae.d_in, sae.W_dec)
    rows, wanted = checked_rows(op, sae, x, target, mask, sae.W_dec)
    check_rows(op, rows, x, target, mask)
    into = sae.encoder_rows(rows)
    out = into if wanted is None else wanted
    weights = torch.cat([*_losses(sae, rows, wanted)]).square_().cpu()
    weights[((into == 0).all(1) | (out == 0).all(1)).cpu()] = 0
    ends = weights.cumsum(0)
    if not ends[-1] > 0:
        dead.zero_()
    drawn = torch.rand(int(dead.sum()), generator=generator, dtype=torch.float64, device="cpu") * ends[-1]
    # The last row that counts where rounding leads beyond it.
    at = torch.searchsorted(ends, drawn, right=True).clamp_(max=int((ends < ends[-1]).sum())).to(rows.device)
    others = sae.W_enc if bool(dead.all()) else sae.W_enc[~dead]
    norm = share * part_norms(others, 1).mean()
    found = {"W_dec": _unit(out[at]), "W_enc": (_unit(into[at]) * norm).to(rows.dtype)}
    for name in ("b_enc", "b_gate", "r_mag", "b_mag"):
        found[name] = rows.new_zeros(len(at))
    if isinstance(sae.activation, JumpReLU):
        theta = sae.activation.threshold
        found["threshold"] = theta.to(rows).expand(sae.d_sae)[dead] if isinstance(theta, Tensor) else rows.new_full((len(at),), theta)
    return found


def _unit(rows: Tensor) -> Tensor:
    return (rows / part_norms(rows, 1)).to(rows.dtype)


def _losses(sae: SAE, rows: Tensor, target: Tensor | None) -> Iterator[Tensor]:
    """``[n]`` in float64, of 4,096 rows each."""
    norm = part_norms(sae.W_dec, sae.n_layers).sum(1, keepdim=True).to(rows.dtype)
    for x, y in zip(rows.split(_ROWS), rows.split(_ROWS) if target is None else target.split(_ROWS)):
        run = sae(x, None if target is None else y)
        loss = run.squared_error.double() * sae.scale[1].double().square()
        if sae.l1:
            latents: Any = run.latents
            loss += sae.l1 * decode(replace(latents, values=latents.values.abs()), norm)[:, 0].double()
        yield loss
