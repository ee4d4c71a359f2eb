"""``kernel``: ``triton.jit`` for what the host launches. A compilation says so in a line on stderr.

Triton compiles a kernel at the first launch of its kind, which takes seconds, and keeps the result on disk. Its hooks are of the whole
process, one at a time, and with one set it serialises the constants of everybody's kernels; so what is wrapped here is the compiler that
each of our own kernels holds. A launch of what is compiled never comes this way.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import triton

from fastsae._core import triton_support


def kernel(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """``triton.jit(function, **options)`` with a line on stderr while it compiles; FASTSAE_QUIET=1: without."""
    if function is None:
        return lambda function: kernel(function, **options)
    made = triton.jit(function, **options)
    # Whatever another version of Triton names otherwise is left alone, and the compilation silent.
    devices = getattr(made, "device_caches", None)
    bind = getattr(devices, "default_factory", None)
    if bind is None:
        return made
    name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
    ours: list[Any] = []

    def bound() -> Any:
        found = bind()
        compiler = getattr(made, "compile", None)
        if callable(compiler) and compiler not in ours:
            ours[:] = [_announced(name, compiler)]
            made.compile = ours[0]  # pyright: ignore[reportAttributeAccessIssue]
        return found

    devices.default_factory = bound  # pyright: ignore[reportOptionalMemberAccess]
    return made


def _announced(name: str, compiler: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(compiler)
    def run(src: Any, *args: Any, **kwargs: Any) -> Any:
        make_ir = getattr(src, "make_ir", None)
        if make_ir is None or triton_support.quiet():
            return compiler(src, *args, **kwargs)
        begun: list[float] = []
        arch = getattr(kwargs.get("target"), "arch", None)

        def begin(*args: Any, **kwargs: Any) -> Any:
            begun.append(time.perf_counter())
            chip = "" if arch is None else f" for sm_{arch}"
            _say(f"fastsae: compiling {name}{chip} (first use; Triton keeps it in its cache) ...", "")
            return make_ir(*args, **kwargs)

        src.make_ir = begin  # asked for only where the cache on disk does not hold the kernel
        failed = " failed after"
        try:
            made = compiler(src, *args, **kwargs)
            failed = ""
        finally:
            if begun:
                _say(f"{failed} {time.perf_counter() - begun[0]:.1f} s", "\n")
        return made

    return run


def _say(text: str, end: str) -> None:
    with suppress(OSError, ValueError, AttributeError):  # a closed or missing stderr is no reason to fail
        print(text, end=end, file=sys.stderr, flush=True)
