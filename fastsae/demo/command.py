"""``fastsae demo`` from its options to the files in the output folder."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import fastsae
from fastsae import SAE, plots
from fastsae._core import files
from fastsae._core.machine import machine
from fastsae._core.timing import Stopwatch
from fastsae.demo import codes, dictionaries
from fastsae.demo import data as activations
from fastsae.demo.data import Data
from fastsae.demo.settings import Settings, chosen


def run(args: argparse.Namespace) -> int:
    """Runs the demo with the options of ``add_arguments``; returns the exit status."""
    absent = [name for name in ("matplotlib", "numpy", "safetensors", "tqdm") if find_spec(name) is None]
    if absent:
        print(f"fastsae demo needs {', '.join(absent)}: pip install 'fastsae-kernels[demo]'", file=sys.stderr)
        return 2
    threads = torch.get_num_threads()
    try:
        if args.smoke:
            torch.set_num_threads(1)  # on tiny sizes threads only wait for each other, for many times as long on a busy machine
        return _run(chosen(args), args.out, smoke=args.smoke, fresh=args.fresh)
    finally:
        torch.set_num_threads(threads)


class _Stages(dict[str, float]):
    """Seconds by stage."""

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        watch = Stopwatch()
        yield
        self[name] = watch.seconds()


def _run(settings: Settings, out: Path, *, smoke: bool, fresh: bool) -> int:
    from fastsae.demo.operations import timed  # needs numpy

    out.mkdir(parents=True, exist_ok=True)
    seconds = _Stages()
    try:
        with seconds.stage("activations"):
            data = activations.load(settings, out / "activations.safetensors", fresh=fresh)
        with seconds.stage("training"):
            trained = [dictionaries.load(settings, seed, data, out / f"sae-seed{seed}", fresh=fresh) for seed in settings.seeds]
    except (ValueError, KeyError) as error:
        print(f"fastsae demo: {error} (--fresh makes what lies in {out} anew)", file=sys.stderr)
        return 2
    saes, curves = [sae for sae, _ in trained], [curve for _, curve in trained]
    with seconds.stage("statistics"):
        statistics = activations.statistics(data)
    with seconds.stage("evaluation"):
        evaluated = [dictionaries.evaluate(sae, data) for sae in saes]
        fired = [count for _, count in evaluated]
        match, similarity = _matched(saes, fired)
        best = match.rows[0][match.a_to_b.similarity[:, 0].sort(descending=True).indices]
        examples = [] if settings.synthetic else dictionaries.examples(saes[0], data, best)
    with seconds.stage("spline codes"):
        of_codes, distances = codes.distances_and_counts(data, 500 if smoke else 3000)
    with seconds.stage("timing"):
        timings = timed(saes, data, reps=3, least=0.0, rows=256) if smoke else timed(saes, data, reps=7, least=0.3, rows=1024)

    source, kind, kinds = _source(settings, data)
    with seconds.stage("plots"):
        labels = [f"seed {seed}" for seed in settings.seeds]
        plots.training_curves(dict(zip(labels, curves)), out / "training.png")
        match.plot(out / "matches.png", bins=120)
        plots.feature_density(dict(zip(labels, fired)), int((~data["held"]).sum()), out / "density.png")
        plots.code_distances(distances["same"], distances["different"], kind, out / "hamming.png")
        plots.distinct_codes(of_codes["distinct"], of_codes["samples"], of_codes["distinct_kinds"], kinds, out / "codes.png")
        plots.speed_ratios(timings, out / "timing.png")
    results = {
        "source": source,
        "kind": kind,
        "settings": asdict(settings),
        "machine": machine(),
        "activations": statistics,
        "dictionaries": {str(seed): result for seed, (result, _) in zip(settings.seeds, evaluated)},
        "mmcs": similarity,
        "codes": of_codes,
        "operations": timings,
        "examples": examples,
        "seconds": seconds,
    }
    files.replace_text(out / "demo.json", json.dumps(results, indent=1, ensure_ascii=False))
    _print_findings(results)
    _print_timings(results)
    print(f"\n{sum(seconds.values()):.0f} s ({', '.join(f'{name} {value:.0f}' for name, value in seconds.items())})")
    written = ["demo.json", *sorted(path.name for path in out.glob("*.png")), *(f"sae-seed{seed}/" for seed in settings.seeds)]
    print(f"In {out}/: {', '.join(written)}")
    return 0


def _source(settings: Settings, data: Data) -> tuple[str, str, str]:
    """(the data, what a pair of codes has in common, what kinds of samples there are), in words."""
    n = data["x"].shape[0]
    if settings.synthetic:
        found = f"synthetic superposition: {n} samples, {data['truth'].shape[0]} features in {settings.width} dimensions"
        return found, "strongest feature", "strongest feature"
    return f"all-MiniLM-L6-v2 on Python's documentation: {n} tokens, residual stream after layer {settings.layer}, its MLP", "word", "token"


def _matched(saes: list[SAE], fired: list[torch.Tensor]) -> tuple[fastsae.compare.Match, dict[str, float]]:
    """The two dictionaries' match, and its summary beside that of random vectors."""
    match = fastsae.match(*saes, alive=(fired[0] > 0, fired[1] > 0))
    random = torch.randn(2, *saes[0].W_dec.shape, generator=torch.Generator().manual_seed(0))
    return match, {
        "a_to_b": match.mmcs("a_to_b"),
        "b_to_a": match.mmcs("b_to_a"),
        "above_0.9": match.fraction_above(0.9),
        "most_negative": float(match.most_negative.similarity.min()),
        "random": fastsae.mmcs(random[0], random[1], "a_to_b"),
    }


def _print_findings(results: dict[str, Any]) -> None:
    stats, codes, match = results["activations"], results["codes"], results["mmcs"]
    full, samples = codes["distinct"][str(codes["neurons"])], codes["samples"]
    largest, rare = stats["x_largest_coordinate_share_of_variance"], stats["mlp_neurons_below_1_percent"]
    rows = [
        ("data", results["source"]),
        ("mean norm; of the mean", f"{stats['x_mean_norm']:.2f}; {stats['x_norm_of_mean']:.2f}"),
        ("excess kurtosis of a coordinate", f"{stats['x_excess_kurtosis_median']:.2f} (median; normal: 0)"),
        ("effective dimensions", f"{stats['x_effective_dimensions']:.0f}; largest coordinate {largest:.0%} of the variance"),
        ("MLP pre-activations > 0", f"{stats['mlp_fraction_positive']:.1%}; {rare} of {codes['neurons']} neurons below 1 %"),
    ]
    for seed, sae in results["dictionaries"].items():
        fvu = f"FVU {sae['fvu_held_out']:.3f} held out, {sae['fvu_training']:.3f} training"
        dead = f"dead {sae['dead_features']} of {results['settings']['features']}"
        rows.append((f"dictionary, seed {seed}", f"{fvu}; L0 {sae['l0']:.1f}; {dead}"))
        if "mmcs_truth_to_dictionary" in sae:
            back = sae["mmcs_dictionary_to_truth_alive"]
            rows.append(("  recovery", f"MMCS truth → dictionary {sae['mmcs_truth_to_dictionary']:.3f}, alive features → truth {back:.3f}"))
    same = f"same {results['kind']}"
    rows += [
        ("MMCS between the seeds", f"{match['a_to_b']:.3f} and {match['b_to_a']:.3f} (alive); random vectors {match['random']:.3f}"),
        ("  above 0.9", f"{match['above_0.9']:.0%} of the features"),
        ("distinct spline codes", f"{full} of {samples} ({full / samples:.1%}) with {codes['neurons']} neurons"),
        ("  of few neurons", ", ".join(f"{size}: {count}" for size, count in list(codes["distinct"].items())[:5])),
        ("mean Hamming distance", f"{codes['hamming_mean_same']:.0f} bits {same}, {codes['hamming_mean_different']:.0f} different"),
        ("  nearest code", f"{codes['nearest_code_same_kind']:.0%} {same} (by chance {codes['nearest_code_same_kind_by_chance']:.1%})"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows))


def _print_timings(results: dict[str, Any]) -> None:
    print(f"\n{'operation':<20}{'shape':<28}{'backend':<15}{'ms':>8}{'torch ms':>10}{'ratio':>7}  best plain version")
    for row in results["operations"]:
        times = f"{row['ms']['fastsae']:>8.1f}{row['ms'][row['best_plain']]:>10.1f}{row['ratio']:>7.2f}"
        print(f"{row['operation']:<20}{row['shape']:<28}{row['backend']:<15}{times}  {row['best_plain']}")
    print("Medians of alternating runs; ratio above 1: fastsae is faster. Backend 'reference' is PyTorch itself: expect 1 or less there.")
    for feature in results["examples"]:
        print(f"feature {feature['feature']:>5}: {', '.join(feature['tokens'])}")
