"""Builds csrc/cuda for the CPU (tests/gpu/emulate.h), so that its kernels run where there is no GPU.

``module_path()`` compiles once into build/ and gives the path for FASTSAE_CUDA_EMULATION; ``load()`` the module itself.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from places import ROOT

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
HEADERS = [ROOT / name for name in ("csrc/bind.h", "csrc/integers.h", "csrc/cpu/keys.h", "tests/gpu/emulate.h")]
HEADERS += (ROOT / "csrc" / "cuda").glob("*.h")
# No fortification: its longjmp refuses to change stacks. -O1 is quick to compile and quick enough to run.
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-DFASTSAE_EMULATE", "-D_FORTIFY_SOURCE=0"]
FLAGS += ["-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'gpu'}"]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


@cache
def module_path() -> Path:
    import pybind11

    digest = hashlib.sha256("".join(FLAGS).encode())
    files = [*SOURCES, ROOT / "csrc" / "cuda" / "bind.cpp"]
    for file in (*files, *HEADERS):
        digest.update(file.read_bytes())
    folder = ROOT / "build" / f"emulation-{digest.hexdigest()[:16]}"
    target = folder / f"_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", "-DFASTSAE_MODULE=_cuda_emulated"]
    tool = compiler()
    assert tool is not None, "no C++ compiler"

    def compile_one(source: Path) -> str:
        out = folder / f"{source.name}.o"
        subprocess.run([tool, *FLAGS, *python, "-x", "c++", "-c", str(source), "-o", str(out)], check=True)
        return str(out)

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_one, files))
    partial = target.with_suffix(".partial")
    subprocess.run([tool, "-shared", *objects, "-o", str(partial)], check=True)
    partial.replace(target)
    return target


@cache
def load() -> Any:
    spec = importlib.util.spec_from_file_location("_cuda_emulated", module_path())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
