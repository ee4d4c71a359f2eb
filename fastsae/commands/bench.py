"""``fastsae bench``: operations beside the best plain torch, in a checkout."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastsae._core.checkout import checkout
from fastsae._core.machine import machine

REFUSED = (ValueError,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ops", nargs="*", help="names of bench/bench_*.py; default all")
    parser.add_argument("--out", type=Path, help="folder for JSON and plot; default bench/results of the checkout")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="cuda without names: the GPU table, see bench/gpu")
    parser.add_argument("--list", action="store_true", help="operations, shapes and expected minutes; nothing is run")
    parser.add_argument("--minutes", type=float, help="no row is begun that would pass them (default: no limit; 4 for the GPU table)")
    parser.add_argument("--quick", action="store_true", help="small shapes: does it run, not how fast")
    parser.add_argument("--rows", metavar="EXPRESSION", help="only rows whose name fits, as pytest's -k")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")


def run(options: argparse.Namespace) -> int:
    root = checkout()
    if root is None:
        raise ValueError("the benches live in a source checkout; clone the repository and run `make bench` there.")
    sys.path.insert(0, str(root))
    from bench import command

    return command.run(options, root, machine())
