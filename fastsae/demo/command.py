"""``fastsae demo`` from its options to the files in the output folder: the whole way on the library's own functions."""

from __future__ import annotations

import argparse
import copy
import shutil
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastsae
from fastsae import SAE, TopK, Trainer, codes, plots
from fastsae._core.timing import Stopwatch, alternate, milliseconds
from fastsae.demo.page import write
from fastsae.lm import evaluate, harvest, packaged
from fastsae.lm.hooks import call
from fastsae.optim import Adam, warmup_linear_decay
from fastsae.studies import Study
from fastsae.studies._language import Language, held_out, language, name_features
from fastsae.superposition import ActivationStatistics, SuperpositionData
from fastsae.trainer import Batches

SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"tokens": 1500, "held": 254, "features": 128, "k": 4, "steps": 40, "batch": 128, "width": 32, "named": 3, "source": "random"},
    "default": {
        "tokens": 20_000, "held": 2032, "features": 2048, "k": 32, "steps": 400, "batch": 512, "width": 256, "named": 8, "source": "smollm2",
    },
}  # fmt: skip


class Source(NamedTuple):
    """A model, the module whose activations are taken, those whose codes are, tokens left out, windows to train on and held out."""

    name: str
    about: str
    found: Language
    hook: str
    layers: str
    ignore: list[int]
    windows: tuple[Tensor, Tensor]
    truth: Tensor | None = None


def smollm2(study: Study) -> Source:
    found, toy = language(study), study["source"] == "random"
    windows = found.split(study["tokens"], study["held"], 16 if toy else 128)
    about = "A random network" if toy else "SmolLM2-135M-Instruct, a language model of 30 layers, after layer 9"
    layer = found.layer.format(0 if toy else 9)
    return Source(study["source"], about, found, layer, layer, [found.bos], windows)


def minilm(study: Study) -> Source:
    model, tokenizer = packaged.load("minilm")
    special = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    found = Language(model, "encoder.layer.{}", special[0], (), tokenizer, causal=False)
    windows = held_out(packaged.minilm_windows(tokenizer, study["tokens"] + study["held"]), study["held"] // 126)
    about = "all-MiniLM-L6-v2, an encoder of sentences with 6 layers, after layer 3"
    return Source("minilm", about, found, "encoder.layer.3", "encoder.layer.3", special, windows)


def superposition(study: Study) -> Source:
    """Sparse combinations of twice as many random unit features as dimensions, 5 active on average (after Sharkey, Braun & Millidge 2022);
    token i is sample i, and the layer behind it a random one."""
    width, rows = study["width"], (study["tokens"] + study["held"]) // 127
    data = SuperpositionData(2 * width, width, mean_active=5, rate=0.99, seed=study.seed)
    x, latents, _ = data.sample(127 * rows)
    strongest = latents.to_dense().argmax(1)
    linear = nn.Linear(width, 6 * width)
    nn.init.normal_(linear.weight, std=width**-0.5, generator=study.generator(1))
    nn.init.constant_(linear.bias, -0.1)
    model = nn.Sequential()
    model.add_module("x", nn.Embedding.from_pretrained(x))
    model.add_module("mlp", nn.Sequential(linear, nn.ReLU()))
    words = SimpleNamespace(decode=lambda ids: f"feature {strongest[ids[0]]}; ")
    windows = held_out(torch.arange(127 * rows).view(rows, 127), study["held"] // 127)
    about = f"Synthetic superposition: {2 * width} true features in {width} dimensions"
    return Source("superposition", about, Language(model, "x", -1, (), words, causal=False), "x", "mlp", [], windows, data.features)


def explore(study: Study, source: Source) -> tuple[SAE, Tensor]:
    """Everything about one model; (the first dictionary, held-out rows)."""
    found, hook, folder, name = source.found, source.hook, study.out / source.name, source.name
    print(f"\n{source.about}", flush=True)
    options: dict[str, Any] = {"ignore": source.ignore, "about": {"demo": study["width"]}, "progress": study.progress}
    shards, held = (harvest(found.model, part, hook, folder / place, **options) for part, place in zip(source.windows, ("train", "held")))
    x, y = (one.read(0, one.rows, [hook])[hook] for one in (shards, held))
    kurtosis = float(ActivationStatistics(x.shape[1], sub_bins=1).update(x).kurtosis().median())
    study.say(f"{name}: {len(x)} tokens to train on, {len(y)} to judge by; excess kurtosis of a coordinate {kurtosis:.1f} (normal: 0).")

    paths = [folder / f"seed{seed}.pt" for seed in (0, 1)]
    saes, curves = zip(*(train(study, x, y, seed, path) for seed, path in enumerate(paths)))
    left, dead = [curve[-1]["held_out_fvu"] for curve in curves], [int(sae.dead_features.sum()) for sae in saes]
    study.say(
        f"{name}: with {study['k']} of {study['features']} features a token the dictionaries of two seeds leave {left[0]:.1%} and "
        f"{left[1]:.1%} of the variance of held-out tokens unexplained; {dead[0]} and {dead[1]} features have died."
    )
    plots.training_curves({f"seed {seed}": curve for seed, curve in enumerate(curves)}, folder / "training.png")
    match = fastsae.match(*paths)  # of the files, as `fastsae mmcs` has it
    match.plot(folder / "matches.png")
    study.record(**{f"{name} mmcs": match.mmcs()})
    study.say(f"{name}: MMCS between the seeds {match.mmcs():.4f}, {match.fraction_above(0.9):.0%} of the features match above 0.9.")
    if source.truth is not None:
        study.say(f"{name}: MMCS of the true features in the first dictionary {fastsae.mmcs(source.truth, paths[0], 'a_to_b'):.3f}.")
    if found.causal:
        judged = evaluate(saes[0], found.model, source.windows[1][:8], hook, ignore=source.ignore, progress=study.progress).values
        study.record(**{f"{name} evaluation": judged})
        study.say(
            f"{name}: the model's loss is {judged['ce_clean']:.2f} nats a token, {judged['ce_spliced']:.2f} with the reconstruction in the "
            f"layer's place, {judged['ce_zero']:.2f} with zeros there: {judged['ce_recovered']:.0%} recovered."
        )
    study.table(f"{name} features", name_features(study, found, shards, hook, saes[0], source.windows[0]))
    spline_codes(study, source, folder)
    return saes[0], y


def train(study: Study, x: Tensor, y: Tensor, seed: int, path: Path) -> tuple[SAE, list[dict[str, float]]]:
    """A TopK SAE, whose checkpoint is written to ``path``, and its curve."""
    steps, curve = study["steps"], []
    sae = SAE(x.shape[1], study["features"], TopK(study["k"]), dead_after=len(x), seed=seed).init_from(x, norm="rms")
    opt = Adam(sae, lr=4e-3, betas=(0.9, 0.99), schedule=warmup_linear_decay(max(1, steps // 20), steps // 2, steps))
    spread = (y - y.mean(0)).square().sum()

    @torch.no_grad()
    def keep(step: int, metrics: dict[str, float]) -> None:
        curve.append({"step": step, "fvu": metrics["fvu"]})
        if step % max(1, steps // 10) == 0 or step == steps:
            curve[-1]["held_out_fvu"] = float(copy.deepcopy(sae).fold_()(y).squared_error.sum() / spread)

    trainer = Trainer(sae, opt, callback=keep, log_every=max(1, steps // 50), checkpoint=path, every=steps, progress=study.progress)
    trainer.fit(Batches(x, size=study["batch"], seed=seed), steps)
    return sae.fold_().eval().requires_grad_(False), curve


@torch.no_grad()
def spline_codes(study: Study, source: Source, folder: Path) -> None:
    """Which neurons of a layer are on: how many codes there are, and how far apart those of equal and of other tokens."""
    windows, parts, number = source.windows[1], [], {}
    counted = ~torch.isin(windows, torch.tensor(source.ignore, dtype=torch.int64))
    with codes.trace(source.found.model, source.layers, emit="code") as seen:
        for part, seen.mask in zip(windows.split(8), counted.split(8)):
            call(source.found.model, part, None)
            parts.append(next(iter(seen.pop().values())))
    code = torch.cat(parts)
    kind = torch.tensor([number.setdefault(source.found.word(token), len(number)) for token in windows[counted].tolist()])
    distance, equal, neurons = codes.hamming(code, code), kind[:, None] == kind, 64 * code.shape[1]
    same, other = (torch.bincount(distance[mask.triu(1)], minlength=neurons + 1) for mask in (equal, ~equal))
    plots.code_distances(same, other, "token", folder / "hamming.png")
    distinct = len(codes.count_codes(codes.hash_code(code)).unique)
    means = [float((counts * torch.arange(neurons + 1)).sum() / counts.sum()) for counts in (same, other)]
    study.say(
        f"{source.name}: {distinct} distinct spline codes of {len(code)} tokens; those of equal tokens differ in {means[0]:.0f} of {neurons} "
        f"bits, those of different tokens in {means[1]:.0f}."
    )


def speed(study: Study, sae: SAE, x: Tensor) -> None:
    """Operations beside plain torch: results compared, then timed in turns."""
    W, b, D, c, k = sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, study["k"]
    latents, other = sae.encode(x), torch.randn(D.shape, generator=study.generator(3))
    mine, theirs = (copy.deepcopy(sae).requires_grad_() for _ in range(2))
    fused, plain = Adam(mine, lr=0.0), torch.optim.Adam(theirs.parameters(), lr=0.0, fused=True)  # so that all steps do equal work

    def step() -> Tensor:
        values, indices = torch.addmm(theirs.b_enc, x - theirs.b_dec, theirs.W_enc.T).topk(k, sorted=False)
        y = F.embedding_bag(indices, theirs.W_dec, per_sample_weights=values.relu(), mode="sum") + theirs.b_dec
        loss = (y - x).square().sum() / len(x)
        plain.zero_grad()
        loss.backward()
        plain.step()
        return loss.detach()

    ways: dict[str, tuple[str, Any, Any]] = {
        "encode_topk": ("addmm, topk", lambda: sae.encode(x).values, lambda: torch.addmm(b, x - c, W.T).topk(k).values.relu()),
        "decode": (
            "embedding_bag",
            lambda: fastsae.decode(latents, D, c),
            lambda: F.embedding_bag(latents.indices, D, per_sample_weights=latents.values, mode="sum") + c,
        ),
        "training step": ("topk, embedding_bag, fused Adam", lambda: fused.step(x).loss, step),
        "match": (
            "normalize, mm, max",
            lambda: fastsae.match_cosine(D, other).similarity[:, 0],
            lambda: (F.normalize(D, dim=1) @ F.normalize(other, dim=1).T).max(1).values,
        ),
    }
    rows: list[dict[str, Any]] = []
    for name, (label, ours, torchs) in ways.items():
        backend = fastsae.explain(ours).choices[0].chosen
        torch.testing.assert_close(ours(), torchs(), rtol=1e-3, atol=1e-3)
        clocks = {key: lambda _, way=way: milliseconds(lambda _: way()) for key, way in (("ms", ours), ("torch ms", torchs))}
        times = {key: statistics.median(found) for key, found in alternate(clocks, least=5, most=50, seconds=1).items()}
        shape = f"{len(x)} rows, D={x.shape[1]}, F={len(W)}, k={k}"
        rows.append({"operation": name, "shape": shape, **times, "ratio": times["torch ms"] / times["ms"], "backend": backend})
        rows[-1]["best_plain"] = label
    study.table("speed", rows)
    plots.speed_ratios(rows, study.out / "speed.png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``fastsae demo``."""
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for results and activations (default: demo)")
    parser.add_argument("--fresh", action="store_true", help="run the models again over what the folder already holds")
    parser.add_argument("--smoke", action="store_true", help="toy models and tiny sizes, a few seconds: checks that everything runs")
    parser.add_argument("--synthetic", action="store_true", help="superposition data instead of models")
    for name, text in (("tokens", "to train on"), ("features", "of a dictionary"), ("k", "latents a token"), ("steps", "of training")):
        parser.add_argument(f"--{name}", type=int, help=f"{text} (default: {SIZES['default'][name]})")


def run(args: argparse.Namespace) -> int:
    """Runs the demo with the options of ``add_arguments``; returns the exit status."""
    if absent := [name for name in ("matplotlib", "numpy", "safetensors", "scipy", "tqdm") if find_spec(name) is None]:
        print(f"fastsae demo needs {', '.join(absent)}: pip install 'fastsae-kernels[demo]'", file=sys.stderr)
        return 2
    watch, size, threads = Stopwatch(), "smoke" if args.smoke else "default", torch.get_num_threads()
    given = {name: value for name in ("tokens", "features", "k", "steps") if (value := getattr(args, name)) is not None}
    study = Study("demo", size, 0, args.out, SIZES[size] | given)
    makers = [smollm2, superposition] if args.smoke else []
    for name, maker in (("smollm2", smollm2), ("minilm", minilm)) if not makers and not args.synthetic else ():
        if package := packaged.missing(name):
            print(f"{package} is not installed, so {name} is left out (make demo installs it).")
        else:
            makers.append(maker)
    if not makers:
        makers = [superposition]
        print("Synthetic superposition data instead of a real model.")
    explored: list[tuple[Source, list[str]]] = []
    try:
        torch.set_num_threads(1 if args.smoke else threads)  # on tiny sizes threads only wait for each other
        args.out.mkdir(parents=True, exist_ok=True)
        for maker in makers:
            source, first = maker(study), len(study.findings)
            if args.fresh:
                shutil.rmtree(study.out / source.name, ignore_errors=True)
            sae, y = explore(study, source)
            explored.append((source, study.findings[first:]))
            if maker is makers[0]:
                speed(study, sae, y)
    except (ValueError, KeyError) as error:
        print(f"fastsae demo: {error} (--fresh makes what lies in {args.out} anew)", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    study.write(watch.seconds(), watch.cpu_seconds())
    print(f"\n{watch.seconds():.0f} s. Open {write(study, [(s.name, s.about, said) for s, said in explored])}")
    return 0
