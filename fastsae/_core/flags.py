"""Two sticky flags a device, which ``fastsae.check()`` reads: a GPU kernel that meets a bad index sets the first, latents that pass their
capacity set the second. An optimiser has one of its own, for a step that was not finite.

Reading a flag waits for the GPU, so no operation does; see ``raise_if_set``.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

_watched: weakref.WeakSet[Any] = weakref.WeakSet()  # optimisers with a flag of their own
_flags: dict[torch.device, tuple[Tensor, Tensor]] = {}
_lock = threading.Lock()


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: nothing may wait then, and nothing that the host counts is seen by a replay."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def flag(device: torch.device) -> Tensor:
    """The int32 flag [1] of a device for bad indices, made at the first call."""
    return (_flags.get(device) or _create(device))[0]


def overflow(device: torch.device) -> Tensor:
    """The int32 flag [1] of a device for latents that did not fit."""
    return (_flags.get(device) or _create(device))[1]


def _create(device: torch.device) -> tuple[Tensor, Tensor]:
    with _lock:
        if device not in _flags:
            if capturing(device):
                # Made here it would lie in the graph's own memory, and each replay would clear it.
                raise RuntimeError(f"fastsae: the first operation on {device} must run before a CUDA graph is captured")
            # An ordinary tensor even when the first call happens inside inference_mode: it is cleared outside.
            with torch.inference_mode(False):
                made = torch.zeros(2, dtype=torch.int32, device=device)
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()  # once: other streams will write to it
            _flags[device] = made[:1], made[1:]
        return _flags[device]


def watch(optimiser: Any) -> None:
    """``optimiser.settle()`` is called by every check from now on."""
    _watched.add(optimiser)


def raise_if_set() -> None:
    """Waits for every device that has flags, clears them, and raises if one was set: IndexError, ValueError for a capacity, or
    FloatingPointError for a training step."""
    bad, full = _take(0), _take(1)
    if bad:
        raise IndexError(
            f"an index was out of range in an operation on {', '.join(bad)} since the last fastsae.check(): rows that used it are NaN, "
            "weight gradients left it out. Compare latents.indices with [0, n_features), or run on the CPU, where it is named"
        )
    if full:
        raise ValueError(
            f"capacity was too small for the latents of an encoder on {', '.join(full)} since the last fastsae.check(): some were left out"
        )
    for optimiser in list(_watched):
        optimiser.settle()


def _take(which: int) -> list[str]:
    found = []
    for device, pair in list(_flags.items()):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if int(pair[which]):
            pair[which].zero_()
            found.append(str(device))
    return found
