"""Every sample of every CUDA C++ and Triton row on the GPU against its specification, and no more: what compute-sanitizer runs."""

from __future__ import annotations

import sys

import torch

from fastsae import native_cuda
from fastsae.dispatch import OPS
from fastsae.verify import call


def main(backends: tuple[str, ...] = ("cuda",), device: str = "cuda") -> int:
    if device == "cuda" and (not torch.cuda.is_available() or native_cuda.missing() is not None):
        print(f"gpu_check: no CUDA device, or no module: {native_cuda.missing()}", file=sys.stderr)
        return 2
    where = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    checked = 0
    for op in OPS.values():
        for row in op.rows:
            if row.backend in backends:
                for args in op.samples(where, op.dtypes[0], torch.Generator().manual_seed(0)):
                    if row.reason(args) is None:
                        op.check(args, call(op, row, args))
                        checked += 1
    print(f"{checked} samples of {', '.join(backends)} rows agree with their specification")
    return 0 if checked else 1


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1].split(",")) if len(sys.argv) > 1 else ("cuda",)))
