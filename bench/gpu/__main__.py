"""``python -m bench.gpu [rows] [--device cuda] [--out DIR] [--minutes 4] [--quick]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bench import gpu
from bench.gpu import rows, table
from fastsae._core.machine import machine


def main(arguments: list[str] | None = None) -> int:
    known = [row.name for row in rows.ROWS]
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(gpu.__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--minutes", type=float, default=table.MINUTES)
    parser.add_argument("--quick", action="store_true", help="small shapes: does it run, not how fast")
    parser.add_argument("--list", action="store_true", help="the rows, their shapes and expected minutes; nothing is run")
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(known)}; default all")
    parser.add_argument("--begun", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--running", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--lost", action="append", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.list:
        return table.listed()
    if unknown := [name for name in options.rows if name not in known]:
        print(f"bench.gpu: unknown {', '.join(unknown)}; known: {', '.join(known)}", file=sys.stderr)
        return 2
    if options.device.startswith("cuda") and options.running is None:
        return table.command(options.out.resolve(), minutes=options.minutes, quick=options.quick, only=options.rows)
    device = torch.device(options.device if options.device != "cuda" else f"cuda:{torch.cuda.current_device()}")
    return table.run(
        device, options.out, {**machine(), **table.device_facts(device)}, minutes=options.minutes, quick=options.quick, only=options.rows,
        begun=options.begun, running=options.running, lost=options.lost,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
