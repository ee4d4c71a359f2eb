"""float32 products in float32, whatever torch's settings of precision allow (TF32, bfloat16)."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from fastsae._core import checks

_C: Any = torch._C  # pyright: ignore[reportPrivateUsage] (its public getters raise where older and newer settings are in use)
_get: Any
_set: Any
if hasattr(_C, "_get_fp32_precision_getter"):
    # Each is the setting or, where unset, that of the one it belongs to: (all, all of a backend, the backend's products).
    _CHAINS = [[("generic", "all"), (backend, "all"), (backend, "matmul")] for backend in ("cuda", "mkldnn")]
    _get, _set, _FULL = _C._get_fp32_precision_getter, _C._set_fp32_precision_setter, "ieee"
else:  # torch 2.8
    _CHAINS = [[()]]
    _get, _set, _FULL = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"
_WIDE = (_FULL, "none")

_lock = threading.Lock()
_inside = 0  # settings are the process's: the first thread that enters sets, the last one that leaves restores
_changed: list[tuple[tuple[str, ...], str]] = []


@contextmanager
def full_precision(device: torch.device | None = None) -> Generator[None]:
    """Around float32 products; with a device, autocast is off on it too.

    It reads torch's newer settings, which the older ones set too, because the older getters raise where both are in use. Only what was
    set itself is changed, from the general to the particular, so that what is unset stays unset.
    """
    global _inside
    with _lock:
        _inside += 1
        for chain in _CHAINS:
            for place in chain:
                if _get(*chain[-1]) not in _WIDE and (was := _get(*place)) not in _WIDE:
                    _changed.append((place, was))
                    _set(*place, _FULL)
    try:
        with torch.autocast(device.type, enabled=False) if device is not None and checks.autocasting(device) else nullcontext():
            yield
    finally:
        with _lock:
            _inside = max(_inside - 1, 0)  # 0 in a child forked inside
            if not _inside:
                _restore()


def _restore() -> None:
    while _changed:
        place, was = _changed.pop()
        if _get(*place) == _FULL:  # else somebody has set it since
            _set(*place, was)


def _after_fork() -> None:
    """In a child there is one thread, and it is in no product."""
    global _lock, _inside
    _lock, _inside = threading.Lock(), 0
    _restore()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
