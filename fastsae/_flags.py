"""One sticky flag a device: a GPU kernel that meets a bad index sets it, and ``fastsae.check()`` reads it.

Reading a flag waits for the GPU, so no operation does; see ``raise_if_set``.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_flags: dict[torch.device, Tensor] = {}
_lock = threading.Lock()


def flag(device: torch.device) -> Tensor:
    """The int32 flag [1] of a device, made at the first call."""
    found = _flags.get(device)
    return found if found is not None else _create(device)


def _create(device: torch.device) -> Tensor:
    with _lock:
        if device not in _flags:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                # Made here it would lie in the graph's own memory, and each replay would clear it.
                raise RuntimeError(f"fastsae: the first operation on {device} must run before a CUDA graph is captured")
            # An ordinary tensor even when the first call happens inside inference_mode: it is cleared outside.
            with torch.inference_mode(False):
                made = torch.zeros(1, dtype=torch.int32, device=device)
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()  # once: other streams will write to it
            _flags[device] = made
        return _flags[device]


def raise_if_set() -> None:
    """Waits for every device that has a flag, clears the flags, and raises IndexError if one was set."""
    bad = []
    for device, value in list(_flags.items()):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if int(value):
            value.zero_()
            bad.append(str(device))
    if bad:
        raise IndexError(
            f"an index was out of range in an operation on {', '.join(bad)} since the last fastsae.check(): rows that used it are NaN, "
            "weight gradients left it out. Compare latents.indices with [0, n_features), or run on the CPU, where it is named"
        )
