"""Dead features put to use again, at inputs that are reconstructed badly."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastsae._core import checks
from fastsae.ops.decode import decode
from fastsae.sae.activations import JumpReLU
from fastsae.sae.init import check_rows
from fastsae.sae.inputs import check_x, checked_rows
from fastsae.sae.jump import penalised
from fastsae.sae.losses import features, part_norms
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

    Raises: TypeError, ValueError: as ``SAE.init_from``; an optimiser over other parameters. SettingsError: processes of a sharded SAE with
    generators in different states.

    In a process group call it with the same rows and generators everywhere; of a sharded SAE with the same generators, each process with
    rows of its own (also none) and ``dead`` of its own features: what is drawn is the same for any number of processes. With ``Trainer``,
    in its ``callback``:

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
        with member.world.together(op):
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
    (rows, wanted), world = checked_rows(op, sae, x, target, mask, sae.W_dec), sae.world
    if len(rows) or world.virtual == 1:
        check_rows(op, rows, x, target, mask)
    random = (torch.default_generator if generator is None else generator).get_state().numpy().tobytes()
    world.begin(op, len(rows), (sae.config(), sae.training, share, zlib.crc32(random)))
    sizes = world.each(torch.tensor(len(rows), device=rows.device)).tolist()
    into = sae.encoder_rows(rows)
    out = into if wanted is None else wanted
    weights = _losses(sae, rows, wanted, sum(sizes[: world.rank]), sum(sizes)).square_()
    weights[(into == 0).all(1) | (out == 0).all(1)] = 0
    world.begin(op, len(rows))
    ends = torch.cat([weights.new_zeros(1), world.gather(weights)]).cumsum(0).cpu()
    if not ends[-1] > 0:
        dead.zero_()
    counts = world.each(dead.sum())  # of every process
    every = torch.rand(int(counts.sum()) // world.copies, generator=generator, dtype=torch.float64, device="cpu") * ends[-1]
    drawn = every[int(counts[: world.shard].sum()) :][: int(dead.sum())]
    # The last row that counts where rounding leads beyond it.
    at = (torch.searchsorted(ends, drawn, right=True).clamp_(max=int((ends < ends[-1]).sum())) - 1).to(rows.device)
    others = ~dead if len(every) < sae.d_sae else torch.ones_like(dead)
    norm = share * world.total(part_norms(sae.W_enc, 1)[:, 0] * others) / (world.count(others.sum()) // world.copies)
    found = {"W_dec": _unit(world.pick(out, at)), "W_enc": (_unit(world.pick(into, at)) * norm).to(rows.dtype)}
    for name in ("b_enc", "b_gate", "r_mag", "b_mag"):
        found[name] = rows.new_zeros(len(at))
    if isinstance(sae.activation, JumpReLU):
        theta = sae.activation.threshold
        own = slice(world.start, world.start + len(dead))
        found["threshold"] = theta.to(rows).expand(sae.d_sae)[own][dead] if isinstance(theta, Tensor) else rows.new_full((len(at),), theta)
    return found


def _unit(rows: Tensor) -> Tensor:
    return (rows / part_norms(rows, 1)).to(rows.dtype)


def _losses(sae: SAE, rows: Tensor, target: Tensor | None, first: int, total: int) -> Tensor:
    """``[n]`` in float64, by 4,096 of the ``total`` rows of all processes at a time, those before ``first`` lying on others."""
    norm = part_norms(sae.W_dec, sae.n_layers).sum(1).to(rows.dtype)
    ones, found = norm.new_ones(sae.d_sae, 1), [rows.new_empty(0, dtype=torch.float64)]
    for start in range(-first, total - first, _ROWS):
        part = slice(max(start, 0), max(start + _ROWS, 0))
        run = sae(rows[part], None if target is None else target[part])
        loss = run.squared_error.double() * sae.scale[1].double().square()
        if sae.l1:
            latents: Any = run.latents
            of_each = sae.world.pick(norm, features(latents).flatten()).view_as(latents.values)
            weighed, *_ = penalised(latents.values, of_each, None if sae.jump is None else sae.jump.tanh)
            loss += sae.l1 * decode(replace(latents, values=weighed), ones)[:, 0].double()
        found.append(loss)
    return torch.cat(found)
