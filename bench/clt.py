"""One training step of a TopK cross-layer transcoder by everybody: ours, plain torch with sparse latents, and the dense formula of the
libraries that train them, all from the same weights with Adam over every parameter.

    python -m bench.clt [--shape 256 12 768 8192 32] [--sides ours plain dense] [--steps 5] [--rounds 2]

runs each side in a process of its own, one after the other, for sizes of which only one fits into the memory (566 million parameters are
9 GB with gradient and moments). ``fastsae bench clt`` has them interleaved in one process, at a smaller size.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import fastsae
from bench.harness import DEVICE, extra_megabytes, has_onednn, normal
from bench.training import Runner, check_gradients, codes
from fastsae._core.timing import Stopwatch
from fastsae.sae import CrossLayerTranscoder

Shape = tuple[int, ...]
"""(B, L, D, F, k)."""


def start(shape: Shape) -> CrossLayerTranscoder:
    _, layers, width, features, k = shape
    return CrossLayerTranscoder(layers, width, features, fastsae.TopK(k), device=DEVICE, seed=0)


def rows(shape: Shape) -> tuple[Tensor, Tensor]:
    return normal(*shape[:3], seed=1), normal(*shape[:3], seed=2)


def ours(shape: Shape, lr: float = 1e-4) -> Runner:
    clt = start(shape)
    opt = fastsae.optim.Adam(clt, lr=lr)
    return Runner(opt.step, opt, clt.state_dict, named={name: p for name, p in clt.named_parameters() if p.requires_grad})


def plain(shape: Shape, way: str = "bag", lr: float = 1e-4) -> Runner:
    """``bag``: top-k and ``embedding_bag`` over decoder rows that hold all targets; ``gathered``: the encoder's gradient from gathered rows
    besides. ``dense``: a [B, F] code of every layer and a product for each pair of layers, as llamascopium and clt-training compute it."""
    _, layers, width, features, k = shape
    clt = start(shape)
    p = {name: torch.nn.Parameter(t.detach()) for name, t in clt.named_parameters() if t.requires_grad}
    opt = torch.optim.Adam(p.values(), lr=lr, fused=True)

    def outputs(x: Tensor) -> Tensor:
        y = p["layers.0.b_dec"].view(layers, width)
        if way == "dense":
            dense = []
            for n in range(layers):
                z = functional.linear(x[:, n], p[f"layers.{n}.W_enc"], p[f"layers.{n}.b_enc"]).relu()
                values, indices = z.topk(k, sorted=False)
                dense.append(torch.zeros_like(z).scatter(1, indices, values))
            decoders = [p[f"layers.{n}.W_dec"].view(features, -1, width) for n in range(layers)]
            return torch.stack([sum((dense[n] @ decoders[n][:, m - n] for n in range(m + 1)), y[m]) for m in range(layers)], 1)
        parts = []
        for n in range(layers):
            values, indices = codes(x[:, n], p[f"layers.{n}.W_enc"], p[f"layers.{n}.b_enc"], k, way == "gathered")
            part = functional.embedding_bag(indices, p[f"layers.{n}.W_dec"], per_sample_weights=values, mode="sum")
            parts.append(functional.pad(part, (n * width, 0)))
        return sum(parts[1:], parts[0]).view(-1, layers, width) + y

    def step(x: Tensor, target: Tensor) -> None:
        ((outputs(x) - target).square().sum() / x.shape[0]).backward()
        opt.step()
        opt.zero_grad()

    return Runner(step, opt, clt.state_dict, named=p)


def sides() -> dict[str, Callable[[Shape], Runner]]:
    made: dict[str, Callable[[Shape], Runner]] = {"ours": ours, "plain": plain}
    if has_onednn():
        made["gathered"] = lambda shape: plain(shape, "gathered")
    return made | {"dense": lambda shape: plain(shape, "dense")}


def check(mine: Runner, theirs: Runner, x: Tensor, target: Tensor) -> None:
    """AssertionError unless the gradients of a first step agree: first moments to 1e-3 of their norm, which leaves room for a near tie."""
    mine.step(x, target)
    theirs.step(x, target)
    check_gradients(mine, theirs, 1e-3)


def measure(side: str, shape: Shape, steps: int) -> dict[str, float]:
    """Seconds of a step (median, by the clock and of CPU time) and extra memory of one in MB, beyond weights and moments."""
    built = sides()[side](shape)
    batch = rows(shape)
    built.step(*batch)
    built.step(*batch)
    seconds, busy = [], []
    for _ in range(steps):
        watch = Stopwatch()
        built.step(*batch)
        seconds.append(watch.seconds())
        busy.append(watch.cpu_seconds())
    extra = extra_megabytes(lambda: built.step(*batch))
    held = 3 * sum(t.numel() for t in built.named.values()) * 4 / 2**20
    times = {"seconds": statistics.median(seconds), "cpu_seconds": statistics.median(busy)}
    return {**times, "extra_mb": -1.0 if extra is None else extra, "held_mb": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=5, default=(256, 12, 768, 8192, 32), help="B L D F k")
    parser.add_argument("--sides", nargs="+", choices=["ours", "plain", "gathered", "dense"], default=["ours", "plain", "dense"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1, help="processes of each side, alternating")
    parser.add_argument("--here", action="store_true", help="one side, in this process")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.sides[0], tuple(options.shape), options.steps)))
        return
    for side in list(options.sides) * options.rounds:
        command = [sys.executable, "-m", "bench.clt", "--here", "--sides", side, "--steps", str(options.steps)]
        command += ["--shape", *(str(size) for size in options.shape)]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
        print(f"{side:9} load {os.getloadavg()[0]:.1f}  {done.stdout.strip() or done.stderr.strip()[-300:]}", flush=True)


if __name__ == "__main__":
    main()
