"""The processes of torch.distributed's default group, as far as training has to know of them."""

from __future__ import annotations

import torch


def ranks() -> int:
    """Processes of the group, 1 without one."""
    return torch.distributed.get_world_size() if grouped() else 1


def rank() -> int:
    """This process's number, 0 without a group."""
    return torch.distributed.get_rank() if grouped() else 0


def grouped() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def refuse(op: str, what: str) -> None:
    """RuntimeError in a group of several processes; ``what`` goes wrong there, and what to do instead."""
    if (n := ranks()) > 1:
        raise RuntimeError(f"{op}: in a process group of {n} {what}")
