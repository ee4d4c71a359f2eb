"""A dictionary whose rows lie on several processes and that is no SAE."""

from __future__ import annotations

from datetime import timedelta
from itertools import accumulate

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from fastsae._core import checks, processes
from fastsae.distributed.world import Ranks


class Part:
    """This process's rows of a dictionary: what ``part`` returns, for ``fastsae.match``, ``mmcs`` and ``mmcs_matrix``.

    Attributes:
        W_dec: ``[own features, D]``. world: the processes; ``world.features`` is F, ``world.start`` the first one of this process.
    """

    def __init__(self, W_dec: Tensor, world: Ranks):
        self.W_dec, self.world = W_dec, world


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
