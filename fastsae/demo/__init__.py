"""``fastsae demo``: dictionaries of real models, what their features say, matches, spline codes and speed, in minutes on two cores.

SmolLM2-135M and all-MiniLM-L6-v2 read Python's own documentation; two TopK SAEs (two seeds) learn the residual stream of each. Without
their packages the same runs on synthetic superposition data. ``demo/index.html`` tells what came of it.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

import fastsae
from fastsae import SAE, TopK, TopKLatents, codes, plots
from fastsae._core.timing import Stopwatch, alternate, milliseconds
from fastsae.demo.page import write
from fastsae.lm import evaluate, harvest, packaged
from fastsae.lm.hooks import call
from fastsae.optim import Adam
from fastsae.studies import Study
from fastsae.studies._language import Language, language, name_features, train
from fastsae.superposition import ActivationStatistics

ABOUT = {
    "smollm2": ("SmolLM2-135M-Instruct, a language model of 30 layers, after layer 9", 9),
    "minilm": ("all-MiniLM-L6-v2, an encoder of sentences with 6 layers, after layer 3", 3),
    "superposition": ("Synthetic superposition: samples made of few of many true features", 0),
    "random": ("A random network", 0),
}  # of each source, with the layer
SMOKE = {
    "context": 16, "train_tokens": 1500, "held_tokens": 256, "features": 128, "k": 4, "steps": 40, "batch": 128, "width": 32, "named": 3,
    "ablated": 2,
}  # fmt: skip
SIZE = {
    "context": 128, "train_tokens": 12_000, "held_tokens": 2000, "features": 1024, "k": 16, "steps": 600, "batch": 512, "width": 256,
    "named": 6, "ablated": 2,
}  # fmt: skip


def explore(study: Study, name: str) -> tuple[SAE, Tensor]:
    """Everything about one model; (the first dictionary, held-out rows)."""
    study.parameters["source"] = name
    found, folder = language(study), study.out / name
    hook, options = found.layer.format(ABOUT[name][1]), dict[str, Any](ignore=found.special, progress=study.progress)
    windows = found.split(study["train_tokens"], study["held_tokens"], study["context"])
    shards, held = (harvest(found.model, part, hook, folder / place, **options) for part, place in zip(windows, ("train", "held")))
    x, y = (one.read(0, one.rows, [hook])[hook] for one in (shards, held))
    kurtosis = float(ActivationStatistics(x.shape[1], sub_bins=1).update(x).kurtosis().median())
    study.say(f"{name}: {len(x)} tokens to train on, {len(y)} to judge by; excess kurtosis of a coordinate {kurtosis:.1f} (normal: 0).")

    paths, saes, curves = [folder / f"seed{seed}.pt" for seed in (0, 1)], [], {}
    for seed, path in enumerate(paths):
        path.unlink(missing_ok=True)
        curve: list[dict[str, float]] = []
        options_of: dict[str, Any] = {"callback": lambda step, seen, to=curve: to.append({"step": step, **seen})}
        options_of["log_every"] = max(1, study["steps"] // 50)
        sae = train(study, shards, hook, TopK(study["k"]), path, seed, **options_of).requires_grad_(False)
        curve[-1]["held_out_fvu"] = float(sae(y).squared_error.sum() / (y - y.mean(0)).square().sum())
        saes.append(sae)
        curves[f"seed {seed}"] = curve
    left, dead = (
        " and ".join(shown) for shown in zip(*((f"{c[-1]['held_out_fvu']:.1%}", f"{c[-1]['dead']:.0f}") for c in curves.values()))
    )
    kept = f"{study['k']} of {study['features']} features a token"
    study.say(f"{name}: with {kept} two seeds leave {left} of the variance of held-out tokens unexplained; {dead} features have died.")
    plots.training_curves(curves, folder / "training.png")
    match = fastsae.match(*paths)  # of the files, as `fastsae mmcs` has it
    match.plot(folder / "matches.png")
    study.record(**{f"{name} mmcs": match.mmcs()})
    study.say(f"{name}: MMCS between the seeds {match.mmcs():.4f}, {match.fraction_above(0.9):.0%} of the features match above 0.9.")
    if found.truth is not None:
        study.say(f"{name}: MMCS of the true features in the first dictionary {fastsae.mmcs(found.truth, paths[0], 'a_to_b'):.3f}.")
    if found.causal:
        judged = evaluate(saes[0], found.model, windows[1][:8], hook, **options).values
        loss = f"{judged['ce_clean']:.2f} nats a token, {judged['ce_spliced']:.2f} with the reconstruction in the layer's place"
        study.say(f"{name}: the model's loss is {loss}, {judged['ce_zero']:.2f} with zeros there: {judged['ce_recovered']:.0%} recovered.")
    study.table(f"{name} features", name_features(study, found, shards, hook, saes[0], windows[0]))
    spline_codes(study, found, hook, windows[1], folder / "hamming.png")
    return saes[0], y


@torch.no_grad()
def spline_codes(study: Study, found: Language, hook: str, windows: Tensor, plot: Path) -> None:
    """Which neurons of a layer are on: how many codes there are, and how far apart those of equal and of other tokens."""
    parts, number = [], {}
    counted = ~torch.isin(windows, torch.tensor(found.special, dtype=torch.int64))
    with codes.trace(found.model, f"{hook}*", emit="code") as seen:
        for part, seen.mask in zip(windows.split(8), counted.split(8)):
            call(found.model, part, None)
            parts.append(next(iter(seen.pop().values())))
    code = torch.cat(parts)
    kind = torch.tensor([number.setdefault(found.word(token), len(number)) for token in windows[counted].tolist()])
    distance, equal, bits = codes.hamming(code, code), kind[:, None] == kind, 64 * code.shape[1]
    same, other = (torch.bincount(distance[mask.triu(1)], minlength=bits + 1) for mask in (equal, ~equal))
    plots.code_distances(same, other, "token", plot)
    means = [float((counts * torch.arange(bits + 1)).sum() / counts.sum()) for counts in (same, other)]
    distinct = f"{len(codes.count_codes(codes.hash_code(code)).unique)} distinct spline codes of {len(code)} tokens"
    apart = f"equal tokens differ in {means[0]:.0f} of {bits} bits, those of different tokens in {means[1]:.0f}"
    study.say(f"{study['source']}: {distinct}; those of {apart}.")


def speed(study: Study, sae: SAE, x: Tensor) -> None:
    """Operations beside plain torch: results compared, then timed in turns."""
    W, b, D, c, k = sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, study["k"]
    z, mine, theirs = cast(TopKLatents, sae.encode(x)), copy.deepcopy(sae).requires_grad_(), copy.deepcopy(sae).requires_grad_()
    fused, plain = Adam(mine, lr=0.0), torch.optim.Adam(theirs.parameters(), lr=0.0, fused=True)  # so that all steps do equal work

    def decoded(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        return F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + b_dec

    def step() -> Tensor:
        values, indices = torch.addmm(theirs.b_enc, x - theirs.b_dec, theirs.W_enc.T).topk(k, sorted=False)
        loss = (decoded(values.relu(), indices, theirs.W_dec, theirs.b_dec) - x).square().sum() / len(x)
        plain.zero_grad()
        loss.backward()
        plain.step()
        return loss.detach()

    rows: list[dict[str, Any]] = []
    ways: list[tuple[str, str, Any, Any]] = [
        ("encode_topk", "addmm, topk", lambda: sae.encode(x).values, lambda: torch.addmm(b, x - c, W.T).topk(k).values.relu()),
        ("decode", "embedding_bag", lambda: fastsae.decode(z, D, c), lambda: decoded(z.values, z.indices, D, c)),
        ("training step", "topk, embedding_bag, fused Adam", lambda: fused.step(x).loss, step),
    ]
    for name, label, ours, torchs in ways:
        torch.testing.assert_close(ours(), torchs(), rtol=1e-3, atol=1e-3)
        clocks = {key: lambda _, way=way: milliseconds(lambda _: way()) for key, way in (("ms", ours), ("torch ms", torchs))}
        times = {key: statistics.median(found) for key, found in alternate(clocks, least=5, most=50, seconds=1).items()}
        about = {"shape": f"{len(x)} rows, D={x.shape[1]}, F={len(W)}", "backend": fastsae.explain(ours).choices[0].chosen}
        rows.append({"operation": name, **times, "ratio": times["torch ms"] / times["ms"], **about, "best_plain": label})
    study.table("speed", rows)
    plots.speed_ratios(rows, study.out / "speed.png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for results and activations (default: demo)")
    parser.add_argument("--fresh", action="store_true", help="run the models again over what the folder already holds")
    parser.add_argument("--smoke", action="store_true", help="toy models and tiny sizes, a few seconds: checks that everything runs")
    parser.add_argument("--synthetic", action="store_true", help="superposition data instead of models")
    for name, text in (("train-tokens", "of text"), ("features", "of a dictionary"), ("k", "latents a token"), ("steps", "of training")):
        parser.add_argument(f"--{name}", type=int, help=f"{text} (default: {SIZE[name.replace('-', '_')]})")


def run(args: argparse.Namespace) -> int:
    plots.figure()  # where matplotlib is missing it is said now
    watch, threads, names = Stopwatch(), torch.get_num_threads(), ["random", "superposition"] if args.smoke else []
    given = {name: value for name in ("train_tokens", "features", "k", "steps") if (value := getattr(args, name)) is not None}
    study = Study("demo", "smoke" if args.smoke else "default", 0, args.out, {**(SMOKE if args.smoke else SIZE), "lr": 4e-3, **given})
    for name in packaged.PACKAGES if not args.smoke and not args.synthetic else ():
        if package := packaged.missing(name):
            print(f"{package} is not installed, so {name} is left out (make demo installs it).")
        else:
            names.append(name)
    if not names:
        print("Synthetic superposition data instead of a real model.")
    explored: list[tuple[str, str, list[str]]] = []
    try:
        torch.set_num_threads(1 if args.smoke else threads)  # on tiny sizes threads only wait for each other
        args.out.mkdir(parents=True, exist_ok=True)
        for name in names or ["superposition"]:
            print(f"\n{ABOUT[name][0]}", flush=True)
            if args.fresh:
                shutil.rmtree(study.out / name, ignore_errors=True)
            first, found = len(study.findings), explore(study, name)
            explored.append((name, ABOUT[name][0], study.findings[first:]))
            if len(explored) == 1:
                speed(study, *found)
    except (ValueError, KeyError) as error:
        print(f"fastsae demo: {error} (--fresh makes what lies in {args.out} anew)", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    study.write(watch.seconds(), watch.cpu_seconds())
    print(f"\n{watch.seconds():.0f} s. Open {write(study, explored)}")
    return 0
