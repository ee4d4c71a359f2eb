"""Samples of the CUDA C++ and Triton rows on the GPU, checked on the CPU: what compute-sanitizer runs.

    python -m bench.gpu_check cuda           every sample of every CUDA C++ row
    python -m bench.gpu_check triton 3       every third sample of every Triton row
    python -m bench.gpu_check --names        the names of the Triton kernels, for a sanitizer's filter

Samples are made and results are checked on the CPU, so that hardly any kernel but ours runs on the GPU, where a sanitizer makes each dear.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastsae._core import triton_support
from fastsae._core.timing import Stopwatch
from fastsae.dispatch import OPS
from fastsae.native import cuda as native_cuda
from fastsae.verify import call


def kernels() -> list[str]:
    """The Triton kernels by name."""
    package = importlib.import_module("fastsae.kernels")  # mapped by an import hook that no type checker follows
    modules = [importlib.import_module(f"fastsae.kernels.{found.name}") for found in pkgutil.iter_modules(package.__path__)]
    return sorted({name for module in modules for name in vars(module) if name.endswith("_kernel")})


def moved(value: Any, device: torch.device) -> Any:
    """A tensor on the device with its strides, as a view of a copy of what it is a view of."""
    if not isinstance(value, Tensor) or device.type == "cpu":
        return value
    whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())  # pyright: ignore[reportArgumentType, reportCallIssue]
    return whole.to(device).as_strided(value.shape, value.stride(), value.storage_offset())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("backend", nargs="?", default="cuda", choices=["cuda", "triton"])
    parser.add_argument("every", nargs="?", type=int, default=1, help="of the samples of an operation take one in so many")
    parser.add_argument("--device", default="cuda", help="cpu: in the interpreter or the emulation")
    parser.add_argument("--names", action="store_true", help="print the names of the Triton kernels and stop")
    options = parser.parse_args(arguments)
    if options.names:
        print("\n".join(kernels()))
        return 0
    cpu, device = torch.device("cpu"), torch.device(options.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print("gpu_check: no CUDA device", file=sys.stderr)
            return 2
        device = torch.device("cuda", torch.cuda.current_device())
    reason = native_cuda.unavailable(device) if options.backend == "cuda" else triton_support.unavailable(device)
    if reason is not None:
        print(f"gpu_check: {reason}", file=sys.stderr)
        return 2
    checked, watch = 0, Stopwatch()
    for op in OPS.values():
        for row in op.rows:
            if row.backend != options.backend:
                continue
            here = checked
            for args in list(op.samples(cpu, op.dtypes[0], torch.Generator().manual_seed(0)))[:: options.every]:
                if op.handle is not None:  # words packed for the CPU
                    args = (*args[: op.handle[1]], None, *args[op.handle[1] + 1 :])
                given = tuple(moved(arg, device) for arg in args)
                if row.reason(given) is not None:
                    continue
                op.check(args, pytree.tree_map(Tensor.cpu, call(op, row, given)))
                checked += 1
            print(f"[{watch.seconds():6.1f} s] {op.name}: {checked - here} samples", flush=True)
    print(f"{checked} samples of {options.backend} rows agree with their specification")
    return 0 if checked else 1


if __name__ == "__main__":
    sys.exit(main())
