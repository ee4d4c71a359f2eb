"""Ahead-of-time compilation of Triton kernels, no GPU needed: records what the launchers launch, and compiles it for a chip.

with record() as launches:
    kernels.decode(values, indices, None, W, None)      # CPU tensors; nothing runs, the results are garbage
usage = compile_launch(launches[0], 90)                 # registers, spills, shared memory, PTX
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unittest import mock

import torch
import triton
from places import ROOT
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction

SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Most shared memory a block may use, in bytes, by compute capability (CUDA C++ programming guide, technical specifications)."""

MATRIX = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")
"""An instruction of tensor cores (HFMA2.MMA is none)."""

_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
    torch.bool: "i1", torch.uint8: "u8",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


def tool(name: str) -> str:
    """A program of CUDA that Triton brings."""
    return os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)


@dataclass(frozen=True)
class Launch:
    """One launch as Triton's own launcher would specialise it: types, constants, 16-byte alignment, options."""

    kernel: JITFunction[Any]
    grid: tuple[int, ...]
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__


@dataclass(frozen=True)
class Usage:
    """What the compiler made of a launch on one chip."""

    ptx: str
    cubin: bytes
    shared: int

    @cached_property
    def resources(self) -> dict[str, int]:
        """REG, STACK, LOCAL, SHARED as cuobjdump reports them; a spill shows in STACK or LOCAL."""
        line = next(line for line in self._dump("--dump-resource-usage").splitlines() if "REG:" in line)
        return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", line)}

    @cached_property
    def code(self) -> list[str]:
        """All instructions, up to the jump to itself that ends them, in which padding follows."""
        return [text for _, text in self._addressed]

    @cached_property
    def loops(self) -> list[tuple[int, int]]:
        """First and last instruction of each loop, as places in ``code``; by the first, outer ones before inner ones."""
        places = {address: place for place, (address, _) in enumerate(self._addressed)}
        ends: dict[int, int] = {}
        for place, (_, text) in enumerate(self._addressed):
            branch = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
            if branch and (first := places.get(int(branch[1], 16), place)) < place:
                ends[first] = place  # several jumps to one place are one loop
        return sorted(ends.items(), key=lambda loop: (loop[0], -loop[1]))

    @cached_property
    def matrix_loop(self) -> list[str]:
        """The instructions of the smallest loop that holds a tensor-core instruction; none where there is none."""
        first, last = self._matrix_loop
        return self.code[first : last + 1]

    @cached_property
    def outside(self) -> list[str]:
        """The other instructions of the smallest loop around it, which is the loop over tiles, or of the kernel."""
        first, last = self._matrix_loop
        around = [(b - a, a, b) for a, b in self.loops if a < first <= last < b]
        _, start, end = min(around, default=(0, 0, len(self.code) - 1))
        return self.code[start:first] + self.code[last + 1 : end + 1]

    @cached_property
    def _matrix_loop(self) -> tuple[int, int]:
        held = [(b - a, a, b) for a, b in self.loops if any(map(MATRIX.search, self.code[a : b + 1]))]
        return min(held, default=(0, 0, -1))[1:]

    @cached_property
    def _addressed(self) -> list[tuple[int, str]]:
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", self._dump("--dump-sass"))
        code = [(int(address, 16), text) for address, text in found]
        end = next(place for place, (at, text) in enumerate(code) if re.search(rf"\bBRA\b.*0x{at:x}\b", text))
        return code[:end]

    def _dump(self, what: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            return subprocess.run([tool("cuobjdump"), what, file.name], check=True, capture_output=True, text=True).stdout


@contextmanager
def record() -> Generator[list[Launch], None, None]:
    """Collects launches instead of running them."""
    launches: list[Launch] = []

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_specialise(self, grid, args, kwargs))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def _specialise(kernel: JITFunction[Any], grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    options = tuple((key, kwargs.pop(key)) for key in _OPTIONS if key in kwargs)
    bound = kernel.signature.bind(*args, **kwargs)
    bound.apply_defaults()
    signature, constants, aligned = [], [], []
    for param in kernel.params:
        value = bound.arguments[param.name]
        free = not param.do_not_specialize
        if param.is_constexpr or value is None or (type(value) is int and value == 1 and free):
            signature.append((param.name, "constexpr"))
            constants.append((param.name, value))
        elif isinstance(value, torch.Tensor):
            signature.append((param.name, "*" + _TYPES[value.dtype]))
            if value.data_ptr() % 16 == 0 and free:
                aligned.append(param.num)
        elif isinstance(value, float):
            signature.append((param.name, "fp32"))
        else:
            signature.append((param.name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0 and free:
                aligned.append(param.num)
    grid = grid if isinstance(grid, tuple) else (grid,)
    return Launch(kernel, grid, tuple(signature), tuple(constants), tuple(aligned), options)


def _source(launch: Launch) -> ASTSource:
    attrs = {(number,): [["tt.divisibility", 16]] for number in launch.aligned}
    return ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), attrs)


def narrow_products(launch: Launch) -> set[str]:
    """The functions of a launch's code that multiply two integers, neither of them a constant, in 32 bits: a stride times a column may
    pass 2^31."""
    target = GPUTarget("cuda", 90, 32)
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(dict(launch.options))
    generators = backend.get_codegen_implementation(options)  # pyright: ignore[reportAttributeAccessIssue]  (every backend has it)
    code = str(_source(launch).make_ir(target, options, generators, backend.get_module_map(), context))
    found, function, made = set(), "", {}
    for line in code.splitlines():
        if name := re.search(r"tt\.func \w+ @\"?([\w.]+?)(__.*)?\"?\(", line):
            function, made = name[1], {}
        elif operation := re.match(r"\s*(%[\w#]+)(?::\d+)? = (\S+)\s*(.*)", line):
            made[operation[1]] = operation[2], operation[3]
            if operation[2] == "arith.muli" and re.search(r": (i32|tensor<.*xi32>) loc", line):
                factors = re.findall(r"%[\w#]+", operation[3])[:2]
                if not any(_is_constant(factor, made) for factor in factors):
                    found.add(function.rpartition(".")[2])
    return found


def _is_constant(value: str, made: dict[str, Any]) -> bool:
    operation, rest = made.get(value, ("", ""))
    if operation in ("tt.splat", "tt.broadcast", "tt.expand_dims", "arith.extsi", "arith.bitcast"):
        return _is_constant(re.findall(r"%[\w#]+", rest)[0], made)
    return operation == "arith.constant"


def compile_launch(launch: Launch, capability: int) -> Usage:
    # Triton's key holds its version, the kernel's source and the options: what another test or an earlier run compiled is the same.
    with mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": str(ROOT / "build" / "triton")}):
        compiled = triton.compile(_source(launch), target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    return Usage(compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata.shared)
