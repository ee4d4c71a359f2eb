"""The processes of torch.distributed's default group, as far as training has to know of them."""

from __future__ import annotations

import torch


def ranks() -> int:
    """Processes of the group, 1 without one."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def refuse(op: str, what: str) -> None:
    """RuntimeError in a group of several processes; ``what`` goes wrong there, and what to do instead."""
    if (n := ranks()) > 1:
        raise RuntimeError(f"{op}: in a process group of {n} {what}")
