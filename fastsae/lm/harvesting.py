"""Activations of a model's modules, written to shards."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastsae._core import checks, processes
from fastsae._core.progress import track
from fastsae.lm.hooks import Point, call, find, plain, watch
from fastsae.store import ActivationShards, ShardWriter, join


class SeenAll(Exception):
    """Every hook point has been reached: the rest of the forward call is not needed."""


def harvest(
    model: Any,
    tokens: Tensor,
    hooks: str | Sequence[str],
    out: str | os.PathLike[str],
    *,
    mask: Tensor | None = None,
    ignore: Iterable[int] = (),
    batch: int = 16,
    dtype: torch.dtype | None = None,
    rank: int | None = None,
    ranks: int | None = None,
    rows_a_shard: int = 1 << 16,
    about: dict[str, Any] | None = None,
    progress: bool = True,
) -> ActivationShards:
    """Runs a model over tokens and stores what its modules give, a row a token.

    Args:
        model: any module, or nnsight's wrapper of one, on any device, called as Hugging Face's (``input_ids=``, ``attention_mask=``) or
            with the ids alone. It runs in evaluation mode without gradients; each forward call ends when the last hook point was reached.
        tokens: ids ``[sequences, context]``, integers.
        hooks: names of modules (``hook_points(model)``): ``"model.layers.3"`` is its output ``[batch, context, D]`` (the first tensor of a
            tuple), ``"model.layers.3:input"`` its first input.
        out: folder of the shards, see ``fastsae.store.ShardWriter``. One that a killed run has left is gone on with.
        mask: ``[sequences, context]``, bool or 0 and 1: positions that are no padding; handed to the model as ``attention_mask``.
        ignore: ids of tokens that are left out of the shards (BOS and other special ones), but not of the model's input.
        batch: sequences a forward call.
        dtype: of the stored activations; None: as the model gives them.
        rank, ranks: this process takes the ``rank``-th part of the batches; None: as torch.distributed's group or torchrun says. The last
            one that ends makes one manifest of all (``fastsae.store.join``). The rows, their bits and their order are those of one process;
            where a shard ends differs.
        rows_a_shard: see ``ShardWriter``.
        about: more to be stored in the manifest.
        progress: a tqdm bar where tqdm is installed.

    Returns: ``ActivationShards`` of the folder: in a process group of all rows, otherwise of those that are there. Columns: one a hook,
    and ``token``, ``position`` and ``sequence`` (int32) of each row.

    Raises: TypeError, ValueError: wrong arguments; ``out`` holds activations of another model, other tokens or hooks; a module that does
    not give ``[batch, context, D]`` or that the model never calls.
    """
    op = "harvest"
    model = plain(op, model)
    points = find(op, model, hooks)
    batch = checks.integer(op, "batch", batch, 1)
    if dtype is not None and dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{op}: dtype must be float32, bfloat16, float16 or None, got {dtype}")
    ignored = sorted({checks.integer(op, "ignore", token, 0) for token in ignore})
    keep, real = kept_positions(op, tokens, mask, ignored)
    if not bool(keep.any()):
        raise ValueError(f"{op}: no position counts: mask and ignore leave nothing of {list(tokens.shape)}")
    rank, ranks = _place(op, rank, ranks)
    batches = -(-len(tokens) // batch)
    first, last = (min(batches * number // ranks * batch, len(tokens)) for number in (rank, rank + 1))
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    digest = hashlib.sha256(tokens.cpu().to(torch.int64).contiguous().numpy().tobytes() + keep.cpu().numpy().tobytes()).hexdigest()
    facts = {"model": name, "hooks": [p.name for p in points], "context": tokens.shape[1], "sequences": len(tokens), "tokens": digest}
    facts |= {"ignore": ignored, "batch": batch, **(about or {})}
    writer = ShardWriter(out, facts, rows_a_shard=rows_a_shard, writer=rank, writers=ranks)
    if writer.joined:
        return ActivationShards(out)
    with writer, torch.no_grad(), evaluating(model):
        have = writer.rows
        device = next(model.parameters(), tokens).device
        for start in track(range(first, last, batch), "harvest", progress):
            part = slice(start, min(start + batch, last))
            kept = keep[part]
            n = int(kept.sum())
            if n <= have:  # of a run before
                have -= n
                continue
            given = None if real is None else real[part].to(device)
            found = _run(model, points, tokens[part].to(device), given, dtype)
            where = kept.nonzero().to(torch.int32)
            columns = {name: hidden.flatten(0, 1)[kept.flatten().to(hidden.device)] for name, hidden in found.items()}
            columns |= {"token": tokens[part][kept].to(torch.int32), "position": where[:, 1], "sequence": where[:, 0] + start}
            writer.append({name: column[have:] for name, column in columns.items()})
            have = 0
    return _ended(out, int(keep.sum()), rank, ranks)


def _place(op: str, rank: int | None, ranks: int | None) -> tuple[int, int]:
    group = (processes.rank(), processes.ranks()) if processes.grouped() else tuple(int(os.environ.get(n, d)) for n, d in _TORCHRUN)
    ranks = checks.integer(op, "ranks", group[1] if ranks is None else ranks, 1)
    return checks.integer(op, "rank", group[0] if rank is None else rank, 0, ranks - 1, "ranks - 1"), ranks


def _ended(out: str | os.PathLike[str], rows: int, rank: int, ranks: int) -> ActivationShards:
    """What is there, with one manifest, by the last one that ends; in a group when all have, and by rank 0."""
    together = ranks > 1 and (rank, ranks) == (processes.rank(), processes.ranks())
    if together:
        processes.everyones(None)
    if not together or rank == 0:
        join(out, rows=rows)
    if together:
        processes.everyones(None)
    return ActivationShards(out)


def kept_positions(op: str, tokens: Any, mask: Tensor | None, ignore: Iterable[int]) -> tuple[Tensor, Tensor | None]:
    """(positions of ``tokens [sequences, context]`` that count, those that are no padding or None)."""
    checks.tensor(op, "tokens", tokens, (torch.int64, torch.int32, torch.int16))
    checks.shape(op, "tokens", tokens, (None, None), "[sequences, context]")
    real = None if mask is None else checks.mask(op, "mask", mask)
    keep = torch.ones_like(tokens, dtype=torch.bool) if real is None else real
    checks.shape(op, "mask", keep, tuple(tokens.shape), f"{list(tokens.shape)}")
    ignored = sorted({checks.integer(op, "ignore", token, 0) for token in ignore})
    if ignored:
        keep = keep & ~torch.isin(tokens, torch.tensor(ignored, dtype=tokens.dtype, device=tokens.device))
    return keep, real


_TORCHRUN = (("RANK", "0"), ("WORLD_SIZE", "1"))


def _run(model: nn.Module, points: list[Point], ids: Tensor, mask: Tensor | None, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """``{hook: [batch, context, D]}`` of one forward call."""
    found: dict[str, Tensor] = {}

    def seen(name: str, hidden: Tensor) -> None:
        if hidden.dim() != 3 or hidden.shape[:2] != ids.shape:
            raise ValueError(f"harvest: {name} must give {[*ids.shape]} and a width, got {list(hidden.shape)}")
        if name not in found:  # of a module that runs several times, the first
            found[name] = hidden if dtype is None else hidden.to(dtype)
        if len(found) == len(points):
            raise SeenAll

    with contextlib.ExitStack() as stack:
        for point in points:
            stack.callback(watch(point, lambda hidden, name=point.name: seen(name, hidden)).remove)
        with contextlib.suppress(SeenAll):
            call(model, ids, mask)
    if missing := [point.name for point in points if point.name not in found]:
        raise ValueError(f"harvest: the model did not call {', '.join(missing)}")
    return {point.name: found[point.name] for point in points}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Generator[None, None, None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
