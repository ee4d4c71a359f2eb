"""``fastsae plan``: memory, bytes and time of a sharded training run, for numbers of processes."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from fastsae.distributed import Rates, plan

REFUSED = (TypeError, ValueError, OverflowError)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, kind, text in (
        ("--features", int, "F"), ("--d", int, "D"), ("--tokens", float, "of the run"),
        ("--flops", float, "a second of one process, of the encoder's product"), ("--memory", float, "bytes a second of its memory"),
        ("--network", float, "bytes a second that it sends"),
    ):  # fmt: skip
        parser.add_argument(name, type=kind, required=True, help=text)
    parser.add_argument("--latency", type=float, default=2e-5, help="seconds an exchange (default 2e-5)")
    parser.add_argument("--ranks", type=numbers, default="1,8,64,512", metavar="N,M", help="numbers of processes (default 1,8,64,512)")
    parser.add_argument("--copies", type=int, default=1, help="copies of the dictionary among them (default 1)")
    parser.add_argument("--batch", type=int, default=8192, help="tokens a step of all processes (default 8192)")
    parser.add_argument("--k", type=int, default=64, help="latents a token (default 64)")
    parser.add_argument("--k-aux", type=int, default=0, help="of the AuxK term (default 0)")
    parser.add_argument("--d-out", type=int, help="D_out of a transcoder")
    parser.add_argument("--layers", type=int, default=1, help="of a crosscoder, d numbers each (default 1)")
    parser.add_argument("--cross-layer", action="store_true", help="the layers are those of a cross-layer transcoder")
    parser.add_argument("--members", type=int, default=1, help="dictionaries of a stack (default 1)")
    parser.add_argument("--skip", action="store_true", help="of a transcoder's linear paths past the dictionary")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    rates = Rates(options.flops, options.memory, options.network, options.latency)
    names = ("batch", "k", "k_aux", "copies", "d_out", "layers", "cross_layer", "members", "skip")
    sizes: dict[str, Any] = {"tokens": int(options.tokens), **{name: getattr(options, name) for name in names}}
    plans = [plan(options.features, options.d, rates=rates, ranks=ranks, **sizes) for ranks in options.ranks]
    if options.json:
        print(json.dumps([{**asdict(p), "memory": p.memory, "step": p.step, "seconds": p.seconds} for p in plans], indent=1))
        return 0
    print(f"{plans[0].parameters:.4g} parameters, {plans[0].steps} steps of {options.batch} tokens; of each process:")
    print("  ranks    memory GB   sent MB/step   product ms   memory ms   network ms    step ms        days")
    for p in plans:
        times = "".join(f"{1e3 * t:13.2f}" for t in (p.product, p.passes, p.network, p.step))
        print(f"{p.ranks:7d}{p.memory / 1e9:13.2f}{p.sent / 1e6:15.2f}{times}{p.seconds / 86_400:12.2f}")
    return 0
