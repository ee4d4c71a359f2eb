"""Held-out FVU against steps and seconds: ours, plain torch and the peers on a model's activations, from equal weights and batches.

    python -m bench.fvu                # the demo's activations (all-MiniLM-L6-v2); JSON and plot in bench/results/
    python -m bench.fvu --smoke        # tiny synthetic run, a few seconds

Everyone takes the same number of steps with the same Adam and learning rates, in turns of a few steps, so that a slow spell of the machine
meets all. Seconds are those of the steps alone, by the clock and of CPU time (which other work on the machine distorts less; over all
threads); FVU is taken by one plain torch function from everyone's weights.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench import figures, training
from fastsae._core import files
from fastsae._core.machine import machine
from fastsae._core.progress import Bar
from fastsae._core.timing import Stopwatch
from fastsae.lm import harvest, packaged
from fastsae.optim import warmup_linear_decay
from fastsae.plots import figure, finish
from fastsae.superposition import SuperpositionData
from fastsae.trainer import Batches

OURS, PLAIN = "fastsae", "plain torch"
BOUND = 1.02
"""Ours must stay below this times a peer's FVU after equal steps."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.fvu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for fvu.json and fvu.png")
    parser.add_argument("--cache", type=Path, default=Path("build/fvu-activations"), help="folder of extracted activations")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on synthetic data: checks that everything runs")
    parser.add_argument("--peers", nargs="*", default=["sparsify, torch Adam", "SAELens"], help=f"of: {'; '.join(training.PEERS)}")
    for name, kind, value in (
        ("features", int, 2048),
        ("k", int, 32),
        ("batch", int, 512),
        ("steps", int, 300),
        ("seeds", int, 3),
        ("threads", int, 1),
        ("lr", float, 4e-3),
    ):
        parser.add_argument(f"--{name}", type=kind, default=value, help="default: %(default)s")
    args = parser.parse_args()
    if unknown := set(args.peers) - set(training.PEERS):
        parser.error(f"--peers must be of {', '.join(map(repr, training.PEERS))}, got {sorted(unknown)}")
    if args.smoke:
        args.features, args.k, args.batch, args.steps, args.seeds = 256, 8, 128, 40, 2
    return args


def data(args: argparse.Namespace) -> tuple[Tensor, Tensor, str]:
    """Training and held-out rows, scaled so that their mean distance from the mean is 1, and what they are."""
    absent = None if args.smoke else packaged.missing("minilm")
    if args.smoke or absent:
        if absent:
            print(f"{absent} is not installed: synthetic superposition data instead of a model's activations")
        width, source = 64 if args.smoke else 256, "synthetic superposition"
        rows = SuperpositionData(2 * width, width, mean_active=5, rate=0.99, seed=0).sample(4000 if args.smoke else 56_000).x
        apart = torch.arange(len(rows)) % 10 == 9
    else:
        model, tokenizer = packaged.load("minilm")
        hook, special = "encoder.layer.3", [tokenizer.cls_token_id, tokenizer.sep_token_id]
        found = harvest(model, packaged.minilm_windows(tokenizer, 56_000), hook, args.cache, ignore=special, batch=32)
        rows, source = found.read(0, found.rows, [hook])[hook], "all-MiniLM-L6-v2, layer 3, Python's documentation"
        apart = (torch.arange(len(rows)) // 126) % 10 == 9
    x, held = rows[~apart], rows[apart]
    scale = 1 / (x - x.mean(0)).norm(dim=1).mean()
    return x * scale, held * scale, source


@torch.no_grad()
def fvu(weights: training.Weights, x: Tensor, k: int) -> float:
    """``sum (x - x_hat)^2 / sum (x - mean x)^2``."""
    error = 0.0
    for part in x.split(2048):
        top = functional.linear(part - weights.b_dec, weights.W_enc, weights.b_enc).topk(k)
        y = functional.embedding_bag(top.indices, weights.W_dec.contiguous(), per_sample_weights=top.values.relu(), mode="sum")
        error += float((y + weights.b_dec - part).square().sum())
    return error / float((x - x.mean(0)).square().sum())


def train(args: argparse.Namespace, seed: int, x: Tensor, held: Tensor) -> dict[str, list[dict[str, float]]]:
    """By name: points ``{"step", "seconds", "cpu_seconds", "fvu"}``, the first before any step."""
    directions = torch.randn(args.features, x.shape[1], generator=torch.Generator().manual_seed(seed))
    W = directions / torch.linalg.vector_norm(directions, dim=1, keepdim=True)
    start = training.Start(W, x.mean(0), args.k, args.lr, (0.9, 0.99))
    runners = {OURS: training.ours(start), PLAIN: training.plain(start), **training.peers(start, args.peers)}
    curves: dict[str, list[dict[str, float]]] = {
        who: [{"step": 0, "seconds": 0.0, "cpu_seconds": 0.0, "fvu": fvu(runner.weights(), held, args.k)}]
        for who, runner in runners.items()
    }
    schedule = warmup_linear_decay(max(1, args.steps // 20), args.steps // 2, args.steps)
    batches = iter(Batches(x, size=args.batch, seed=seed))
    turn = max(1, args.steps // 15)
    order = list(runners)
    with Bar(True, args.steps * len(runners), label=f"seed {seed}") as progress:
        for first in range(0, args.steps, turn):
            steps = range(first, min(first + turn, args.steps))
            rows = [next(batches)["x"] for _ in steps]
            for who in order:
                watch = Stopwatch()
                for step, batch in zip(steps, rows):
                    runners[who].set_lr(args.lr * schedule(step))
                    runners[who].step(batch)
                before, spent = curves[who][-1], {"seconds": watch.seconds(), "cpu_seconds": watch.cpu_seconds()}
                point = {"step": steps.stop, **{key: before[key] + value for key, value in spent.items()}}
                curves[who].append({**point, "fvu": fvu(runners[who].weights(), held, args.k)})
                progress.update(len(steps))
            order = order[1:] + order[:1]  # nobody is always the one after somebody
    return curves


def summary(curves: list[dict[str, list[dict[str, float]]]]) -> dict[str, dict[str, Any]]:
    """At the end, by name: FVU and seconds of each seed, ours divided by theirs."""
    result: dict[str, dict[str, Any]] = {}
    for who in curves[0]:
        theirs, mine = ([seed[name][-1] for seed in curves] for name in (who, OURS))
        names = ("fvu", "seconds", "cpu_seconds")
        found: dict[str, Any] = {name: [end[name] for end in theirs] for name in names}
        found |= {f"ours_to_theirs_{name}": [a[name] / b[name] for a, b in zip(mine, theirs)] for name in names}
        result[who] = {**found, "within_bound": max(found["ours_to_theirs_fvu"]) <= BOUND}
    return result


def plot(curves: list[dict[str, list[dict[str, float]]]], title: str, path: Path) -> None:
    canvas, panels = figure(figsize=(10, 4), columns=2)
    for axes, key, label in zip(panels, ("cpu_seconds", "step"), ("CPU seconds of training", "steps")):
        for number, who in enumerate(curves[0]):
            for seed, curve in enumerate(curves):
                x, y = ([point[name] for point in curve[who][1:]] for name in (key, "fvu"))
                label_of = f"{who}: {statistics.mean(c[who][-1]['fvu'] for c in curves):.4f}" if seed == 0 and key != "step" else None
                axes.plot(x, y, color=f"C{number}", lw=1.2, alpha=0.8, label=label_of)
        axes.set(xlabel=label, yscale="log", ylabel="held-out FVU (legend: mean at the end)")
        axes.grid(alpha=0.25, which="both")
    canvas.suptitle(title, fontsize=10)
    finish(canvas, path)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    x, held, source = data(args)
    curves = [train(args, seed, x, held) for seed in range(args.seeds)]
    found = summary(curves)
    settings = {name: getattr(args, name) for name in ("features", "k", "batch", "steps", "seeds", "lr")}
    shape = {"source": source, "training_rows": x.shape[0], "held_out_rows": held.shape[0], "D": x.shape[1]}
    about = {"date": datetime.date.today().isoformat(), **machine(), "settings": settings, "data": shape}
    report = {**about, "results": found, "curves": curves}
    args.out.mkdir(parents=True, exist_ok=True)
    files.replace_text(args.out / "fvu.json", json.dumps(report, indent=1) + "\n")
    title = f"{source}: D {x.shape[1]}, F {args.features}, k {args.k}, batch {args.batch}, {args.threads} thread(s), {args.seeds} seeds"
    plot(curves, title, args.out / "fvu.png")
    print(figures.fvu(args.out))
    print(f"stored {args.out / 'fvu.json'} and fvu.png")


if __name__ == "__main__":
    main()
