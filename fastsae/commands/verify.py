"""``fastsae verify``: every backend against its specification on this machine."""

from __future__ import annotations

import argparse
import json
import os
import sys

from fastsae import verify
from fastsae._core.machine import machine
from fastsae.dispatch import OPS, parse_request

REFUSED = (ValueError,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", help="comma-separated operations; default all")
    parser.add_argument("--backend", help="comma-separated backends; default FASTSAE_BACKEND, else all")
    parser.add_argument("--no-timing", action="store_true", help="verify only")
    parser.add_argument("--json", action="store_true")


def run(options: argparse.Namespace) -> int:
    request = options.backend or os.environ.get("FASTSAE_BACKEND")
    backends = None if not request else [name for name in parse_request(request) if name != "*"] or None
    names = options.ops.split(",") if options.ops else None
    if names and (unknown := [name for name in names if name not in OPS]):
        raise ValueError(f"unknown operation {', '.join(unknown)}; known: {', '.join(OPS)}")
    os.environ["FASTSAE_AUDIT"] = "off"  # what it would check is checked here
    live = sys.stderr.isatty() and not options.json
    results = verify.run(
        ops=names,
        backends=backends,
        timing=not options.no_timing,
        progress=lambda text: print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True) if live else None,
    )
    if live:
        print("\r\033[K", end="", file=sys.stderr)
    verify.remember(results)
    failures = [result for result in results if result.failure]
    if options.json:
        print(json.dumps({**machine(), "results": [result.as_dict() for result in results], "passed": not failures}, indent=1))
    else:
        print(f"{'operation':<18} {'backend':<20} {'dtype':<9} {'samples':>7}  {'error':>6}  {'ms':>9}  {'x reference':>11}")
        for result in results:
            speed = f"{result.milliseconds:9.3f}  {result.ratio:11.2f}" if result.milliseconds is not None else f"{'':>9}  {'':>11}"
            verdict = "  FAILED: " + result.failure if result.failure else ""
            backend = result.backend if result.device == "cpu" else f"{result.backend} {result.device}"
            print(f"{result.op:<18} {backend:<20} {result.dtype:<9} {result.samples:>7}  {result.error:>6.2f}  {speed}{verdict}")
        print("\nerror: largest, as a fraction of the tolerance (0: equal bit for bit, or float64 against itself)")
        print("ms, x reference: median on a moderate workload, and its ratio to the PyTorch reference in the same run")
        print(f"{len(results) - len(failures)} passed, {len(failures)} failed")
    if not results:
        print(f"fastsae verify: nothing to verify for backend {request!r} on this machine (see `fastsae info`)", file=sys.stderr)
        return 2
    return 1 if failures else 0
