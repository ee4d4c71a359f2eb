"""A dictionary whose rows lie on several processes and that is no SAE; a sharded SAE's tensors as torch's containers of such rows."""

from __future__ import annotations

from datetime import timedelta
from functools import reduce
from itertools import accumulate
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from fastsae._core import checks, processes
from fastsae.codes import hash_code, spline_code
from fastsae.distributed.module import ShardedCrossLayerTranscoder, ShardedSAE
from fastsae.distributed.world import Ranks


class Part:
    """This process's rows of a dictionary: what ``part`` returns, for ``fastsae.match``, ``mmcs`` and ``mmcs_matrix``; or of a layer's
    weights, whose neurons lie on several processes, for ``spline_code`` and ``spline_hash``.

    Attributes:
        W_dec: ``[own features, D]``. world: the processes; ``world.features`` is F, ``world.start`` the first one of this process.
    """

    def __init__(self, W_dec: Tensor, world: Ranks):
        self.W_dec, self.world = W_dec, world

    def spline_code(self, x: Tensor, b: Tensor | None = None, *, neurons: Tensor | None = None) -> Tensor:
        """``fastsae.spline_code`` of all neurons, to the bits of one process; called by all, each with rows ``[.., D]`` of its own, any
        number of them. ``b [own neurons]``; ``neurons``: index or mask of own ones. A process sends the words of all neurons a row."""
        return self._codes("spline_code", x, b, neurons)

    def spline_hash(
        self, x: Tensor, b: Tensor | None = None, *, layer: int = 0, seed: int = 0, bits: int = 64, neurons: Tensor | None = None
    ) -> Tensor:
        """``fastsae.spline_hash`` likewise: the XOR of what the processes have for their neurons, which is all that they send."""
        return self._codes("spline_hash", x, b, neurons, layer=layer, seed=seed, bits=bits)

    def _codes(self, op: str, x: Tensor, b: Tensor | None, neurons: Tensor | None, **key: Any) -> Tensor:
        def codes(rows: Tensor) -> Tensor:
            words = _placed(spline_code(rows, self.W_dec, b, neurons=neurons), world.start, world.features)
            return hash_code(words, **key) if key else words

        with (world := self.world).together(op):
            batch, width = checks.tensor(op, "x", x).shape[:-1], x.shape[-1]
            rows = x.detach().reshape(batch.numel(), width)
            codes(rows[:0])  # which checks
            world.begin(op, len(rows), (key, str(x.dtype)))
            own = reduce(torch.bitwise_xor, world.home(codes(world.gather(rows))))
            return own.reshape(*batch, *own.shape[1:])


def _placed(words: Tensor, start: int, features: int) -> Tensor:
    """Words of the bits of all features, from those of the bits from ``start`` on."""
    at, shift = divmod(start, 64)
    placed = words.new_zeros(len(words), -(-features // 64) + 1)
    placed[:, at : at + words.shape[1]] = words << shift
    if shift:
        placed[:, at + 1 : at + 1 + words.shape[1]] |= (words >> (64 - shift)) & ((1 << shift) - 1)
    return placed[:, :-1]


def part(rows: Tensor, group: dist.ProcessGroup | None = None, *, timeout: float = 120) -> Part:
    """A dictionary ``[F, D]`` whose rows lie on the processes of a group, those of one process after the other's; called by all of them.

    Args:
        rows: ``[own features, D]``, any number of them, also none; or a DTensor sharded by its first dimension on a mesh of one.
        group: None: the default group, or that of the DTensor.
        timeout: seconds that a process waits for the others in an exchange.

    ``fastsae.match``, ``mmcs`` (every variant) and ``mmcs_matrix`` take it as any dictionary, and give all processes the same answer, the
    bits of one process with the whole dictionary. Other functions refuse it.

    Raises: RuntimeError: no process group. TypeError, ValueError: no matrix, or a DTensor that is sharded in another way.
    """
    op = "part"
    if not processes.grouped():
        raise RuntimeError(f"{op}: there is no process group: call torch.distributed.init_process_group() first")
    if isinstance(rows, DTensor):
        if rows.placements != (Shard(0),):
            raise ValueError(f"{op}: rows must be sharded by the first dimension on a mesh of one, got {rows.placements}")
        group, rows = rows.device_mesh.get_group(), rows.to_local()
    group = dist.group.WORLD if group is None else group
    assert group is not None
    world = Ranks(group, timedelta(seconds=checks.number(op, "timeout", timeout)), rows.device)
    with world.together(op):
        checks.shape(op, "rows", checks.tensor(op, "rows", rows), (None, None), "[own features, D]")
        world.begin(op, rows.shape[0], (rows.shape[1], str(rows.dtype)))
    bounds = [*accumulate(world.rows, initial=0)]
    world.sizes, world.features, world.virtual, world.start = world.rows, bounds[-1], world.size, bounds[world.rank]
    world.cuts = (0, rows.shape[0])
    return Part(rows.detach(), world)


def dtensors(sae: ShardedSAE | ShardedCrossLayerTranscoder, mesh: DeviceMesh) -> dict[str, DTensor]:
    """``sae.state_dict()`` as DTensors on the same memory, without a copy: for ``torch.distributed.checkpoint`` and tools of your own.

    Args:
        sae: what ``shard`` returned for several virtual shards. mesh: what ``shard`` was given, of a group
            ``DeviceMesh.from_group(group, "cpu")``.

    After writing to them (``torch.distributed.checkpoint.load`` does) call ``sae.weights_changed()`` and ``sae.buffers_changed()``.

    Raises: TypeError, ValueError: another module, another mesh; features that do not lie as torch's chunks of ``ceil(F / n)``, as they do
    where ``virtual`` divides F or is the number of processes n of a copy.
    """
    op = "dtensors"
    kinds = ShardedSAE, ShardedCrossLayerTranscoder
    checks.instance(op, "sae", sae, kinds, "what fastsae.distributed.shard returned for several virtual shards")
    checks.instance(op, "mesh", mesh, DeviceMesh, "a DeviceMesh")
    world = cast(Ranks, sae.world)
    if (mesh.size(0), mesh.size(), mesh.get_local_rank(0)) != (world.shards, world.size, world.shard):
        raise ValueError(f"{op}: mesh must be the one of shard, {world.shards} x {world.copies} processes, got {mesh}")
    sizes = [len(chunk) for chunk in torch.arange(world.features, device="cpu").chunk(world.shards)]
    if sizes + [0] * (world.shards - len(sizes)) != world.sizes:
        raise ValueError(f"{op}: torch cuts {world.features} features into {sizes}, they lie in {world.sizes}: let virtual divide them")
    made = {}
    for name, t in sae.state_dict().items():
        own = not world.whole(name)
        placements = [Shard(0) if own else Replicate(), *[Replicate()] * (mesh.ndim - 1)]
        shape = (world.features, *t.shape[1:]) if own else t.shape
        made[name] = DTensor.from_local(t, mesh, placements, run_check=False, shape=torch.Size(shape), stride=t.stride())
    return made
