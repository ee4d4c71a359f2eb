# pyright: reportMissingParameterType=none
# (a kernel's parameters get types at a launch)
"""The line on stderr while a Triton kernel compiles: when it comes, what it says, what silences it.

Compiled as at a launch, by a driver that stands for a GPU; nothing is launched.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_marks import compiled

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from fastsae._core import jit
from fastsae.kernels import _masks, _select, _tile, adam, decode, encode, match, signum, spline


class Driver:
    """What Triton asks of the driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def add_kernel(x, y, n, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + at, mask=at < n)
    for _ in tl.static_range(8):  # pyright: ignore[reportGeneralTypeIssues]  (the compiler unrolls it)
        value += tl.load(y + at, mask=at < n)
    tl.store(x + at, value, mask=at < n)


def broken_kernel(x):
    tl.store(x, tl.no_such_function(1))  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture
def compile_for_sm_90(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Any], None]]:
    """Compiles a kernel of ``add_kernel``'s parameters as its first launch does, with an empty cache on disk."""
    from triton.runtime import driver

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTSAE_QUIET", raising=False)
    before = driver._active
    driver.set_active(Driver())

    def run(kernel: Any) -> None:
        kernel.warmup(torch.zeros(64), torch.zeros(64), 64, SIZE=64, grid=(1,))

    yield run
    driver._active = before


@compiled
def test_a_compilation_is_one_line_and_a_hit_is_none(compile_for_sm_90: Callable[[Any], None], capsys: pytest.CaptureFixture[str]) -> None:
    first, other = jit.kernel(add_kernel), jit.kernel(do_not_specialize=["n"])(add_kernel)
    compile_for_sm_90(first)
    out, err = capsys.readouterr()
    assert out == ""
    text, seconds, unit = err.rsplit(" ", 2)
    assert text == "fastsae: compiling test_jit.add_kernel for sm_90 (first use; Triton keeps it in its cache) ..."
    assert float(seconds) >= 0 and unit == "s\n"
    compile_for_sm_90(first)  # in memory
    assert capsys.readouterr() == ("", "")
    compile_for_sm_90(jit.kernel(add_kernel))  # on disk, as in a new process
    assert capsys.readouterr() == ("", "")
    compile_for_sm_90(other)  # n is no multiple of 16 here
    assert capsys.readouterr().err.startswith("fastsae: compiling")


@compiled
@pytest.mark.parametrize("value", ["1", "yes"])
def test_quiet(value: str, compile_for_sm_90: Callable[[Any], None], capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("FASTSAE_QUIET", value)
    compile_for_sm_90(jit.kernel(add_kernel))
    assert capsys.readouterr() == ("", "")


@compiled
def test_kernels_of_others_and_their_hooks_are_left_alone(
    compile_for_sm_90: Callable[[Any], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    seen: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda *, fn, **_: seen.append(fn.name) and None)
    compile_for_sm_90(triton.jit(add_kernel))
    assert capsys.readouterr() == ("", "")
    compile_for_sm_90(jit.kernel(add_kernel))
    assert seen == ["add_kernel", "add_kernel"]


@compiled
def test_a_failure_ends_the_line(compile_for_sm_90: Callable[[Any], None], capsys: pytest.CaptureFixture[str]) -> None:
    made = jit.kernel(broken_kernel)
    with pytest.raises(Exception, match="no_such_function"):
        made.warmup(torch.zeros(1), grid=(1,))
    err = capsys.readouterr().err
    assert " ... failed after " in err
    assert err.endswith(" s\n")


@compiled
@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_a_missing_or_closed_stderr(stream: Any, compile_for_sm_90: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    if stream is not None:
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    compile_for_sm_90(jit.kernel(add_kernel))


def test_another_triton_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the attributes that the line needs (the interpreter's functions have none) a kernel is what triton.jit made."""

    class Other:
        pass

    other = Other()
    monkeypatch.setattr(triton, "jit", lambda function, **options: other)
    assert jit.kernel(add_kernel) is other
    assert vars(other) == {}


MODULES = (_masks, _select, _tile, adam, decode, encode, match, signum, spline)


@compiled
def test_no_function_calls_itself() -> None:
    """Triton 3.4, which torch 2.8 brings, hashes the functions that a function calls without end."""
    found = {made for module in MODULES for made in vars(module).values() if isinstance(made, triton.runtime.JITFunction)}
    assert len(found) > 40
    for made in found:
        assert made.fn.__name__ not in made.fn.__code__.co_names, made


@compiled
def test_every_kernel_of_ours_is_announced() -> None:
    found = {kernel for module in MODULES for name, kernel in vars(module).items() if name.endswith("_kernel")}
    assert len(found) > 20
    for kernel in found:
        assert kernel.device_caches.default_factory.__module__ == jit.__name__, kernel
