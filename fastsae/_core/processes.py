"""The processes of torch.distributed's default group, as far as training has to know of them."""

from __future__ import annotations

import copy
from typing import Any

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


def everyones(value: Any, group: Any = None) -> list[Any]:
    """``value`` of all processes of a group (None: the default one), pickled; without a group a copy of this one's."""
    if not grouped():
        return [copy.deepcopy(value)]
    found: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(found, value, group)
    return found
