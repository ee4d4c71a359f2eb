"""The compiled CPU kernels: loads them on first use, calls them, makes an exception of a bad status, says why they are missing.

The only module that imports ``fastsae._C``; its functions are called by name, and ``native/<family>.py`` gives them their arguments as
addresses. csrc/fastsae.h is the contract of every function. Tensors here are plain and detached: gradients, shapes across arguments and
error texts for users are the business of the public operations.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Generator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INDEX_DTYPES = {torch.int32: 0, torch.int64: 1}
SUPPORTED = "supported: float32, bfloat16, float16"
_PATHS = {"auto": 0, "dense": 1, "screen": 2, "rows": 3, "blocks": 4}
_STATS = ("screened_rows", "exact_rows", "scored", "survivors", "workspace")
_OK = -1

_C: ModuleType | None = None  # the extension, once it is loaded and its level is chosen
_module: ModuleType | None = None  # the extension, once it is loaded
_reason: str | None = None
_tried = False


def build_info() -> dict[str, Any]:
    """What the build recorded: ``native``, ``reason``, ``compiler``, ``flags``, ``levels``. Empty in a checkout that was never built."""
    path = os.path.join(os.path.dirname(os.path.dirname(__file__)), "_build_info.json")
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return {}


def unavailable() -> str | None:
    """Why the compiled kernels cannot be used here and what to do, or None."""
    global _module, _reason, _tried
    if _tried:
        return _reason
    try:
        from fastsae import _C as module  # noqa: N811
    except ImportError as error:
        info = build_info()
        if not info:
            _reason = f"the extension is not built ({error}); run `pip install -e .` in the checkout"
        elif not info["native"]:
            _reason = (
                f"the extension was not built: {info['reason']}; install a C++20 compiler (gcc or clang) and install fastsae-kernels again"
            )
        else:
            _reason = (
                f"the extension was built by {info['compiler']} but does not load: {error}; install fastsae-kernels again for this Python"
            )
    else:
        _module = module
        # The OpenMP runtime hangs in a forked child whose parent has used it.
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=module.force_serial)
    _tried = True
    return _reason


def load() -> ModuleType:
    """The extension with its level chosen, or an error that says what to do."""
    global _C
    if _C is None:
        reason = unavailable()
        if reason is not None or _module is None:
            raise RuntimeError(f"fastsae's compiled kernels are unavailable: {reason}")
        wanted = os.environ.get("FASTSAE_ISA")
        if wanted:
            _set_level(_module, wanted, f"FASTSAE_ISA={wanted!r}")
        _C = _module
    return _C


def call(name: str, *arguments: object, slots: tuple[Tensor, Tensor | None, int] | None = None) -> int:
    """The status of a compiled function for these arguments and torch's number of threads; an exception where it is bad.

    Args:
        slots: the indices, crow and number of features that a bad status may speak of.
    """
    status = getattr(_C or load(), name)(*arguments, torch.get_num_threads())
    if status != _OK:
        _raise(name, status, slots)
    return status


def _raise(name: str, status: int, slots: tuple[Tensor, Tensor | None, int] | None) -> None:
    module = load()
    if status == module.NO_MEMORY:
        raise MemoryError(f"fastsae: no memory for the workspace of {name}")
    if status == module.UNSUPPORTED or slots is None:
        return
    indices, crow, features = slots
    if status < 0 and crow is not None:
        i = -2 - status
        raise ValueError(
            f"latents.crow: crow[{i}] = {int(crow[i])}; it must start at 0, never fall and end at the number of slots, {indices.numel()}"
        )
    position = [status] if indices.dim() == 1 else list(divmod(status, indices.shape[1]))
    value = int(indices.reshape(-1)[status])
    what = "latents.indices" if crow is None else "latents.col"
    raise IndexError(f"{what}: {value} at {position} is out of range for {features} features (valid: 0 <= index < {features})")


def unsupported(status: int) -> bool:
    """Whether a status says that this level has no such function, or not for these sizes."""
    return status == load().UNSUPPORTED


def call_engine(name: str, path: str | None, stats: dict[str, int] | None, *arguments: object) -> int:
    """``call`` of a function of the tile engine.

    Args:
        path: "dense" scores everything, "screen" lets bounds choose what is scored, "rows" and "blocks" do so with all bounds of a row
            before its first score (csrc/fastsae.h), "auto" picks by measured crossover. Same bits. None: a function that has one alone.
        stats: filled with screened_rows, exact_rows, scored, survivors, workspace (bytes); see csrc/fastsae.h.
    """
    if path is not None:
        arguments = (*arguments, _PATHS[path])
    if stats is None:
        return call(name, *arguments, 0)
    numbers = torch.zeros(len(_STATS), dtype=torch.int64, device="cpu")
    status = call(name, *arguments, numbers.data_ptr())
    stats.update(zip(_STATS, numbers.tolist(), strict=True))
    return status


def address(value: Tensor | None) -> int:
    return 0 if value is None else value.data_ptr()


def expect(dtype: torch.dtype, *tensors: Tensor | None) -> None:
    """TypeError unless the tensors have the dtype and are on the CPU: a crash below, and rows have normally been asked before."""
    for t in tensors:
        if t is not None and (t.dtype is not dtype or not t.is_cpu):
            raise TypeError(f"expected {dtype} on cpu, got {t.dtype} on {t.device}")


def _set_level(module: ModuleType, level: str, given: str) -> None:
    available = module.levels()
    if level not in available:
        raise ValueError(
            f"{given}: not an instruction set level that was built and that this CPU supports (available: {', '.join(available)})"
        )
    module.set_level(level)


def isa() -> str:
    """The instruction set level that runs now."""
    return load().level()


def isa_levels() -> list[str]:
    """The levels that were built and that this CPU supports, ascending; empty where the kernels are unavailable."""
    return [] if unavailable() is not None or _module is None else _module.levels()


@contextlib.contextmanager
def use_isa(level: str) -> Generator[None, None, None]:
    """Run at `level` inside the block. For tests and benchmarks: the level is one for the whole process."""
    before, module = isa(), load()
    _set_level(module, level, f"use_isa({level!r})")
    try:
        yield
    finally:
        module.set_level(before)


def cpu_features() -> dict[str, bool]:
    """What the CPU and its operating system support, of the instruction sets that the kernels use or may use."""
    return {} if unavailable() is not None or _module is None else _module.cpu_features()


def threads_info() -> str:
    """One line on threads, for ``fastsae info``."""
    if unavailable() is not None or _module is None:
        return "none: the extension is unavailable"
    if _module.threads_available():
        return f"{torch.get_num_threads()} (torch.get_num_threads), in the OpenMP runtime that torch has loaded"
    return "1: no OpenMP runtime found in the process, or this is a forked child"
