"""Do other seeds find the same features, and would a larger dictionary tell?

TopK dictionaries of one layer of a language model, the same data and several seeds, in several sizes. For every pair the best one-to-one
matching with a proven bound on what any matching could share (Paulo & Belrose 2025 report about 30 % above 0.7 for a large dictionary);
beside it the proxy of Sharkey, Braun & Millidge 2022, the mean best cosine to the next larger dictionary; how often a feature fires against
how well it is found again; how agreement grows over training; and whether what is not found again lies in the space of a few features of
the other seed, as it would if seeds only cut the same space differently.
"""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import fastsae
from fastsae import SAE, TopK
from fastsae.compare import match, principal_angles, stability
from fastsae.lm import harvest
from fastsae.store import ActivationShards
from fastsae.studies import Study
from fastsae.studies._language import language, train

SIZES = {
    "smoke": {
        "minutes": 0.05, "source": "random", "context": 16, "train_tokens": 1_024, "held_tokens": 128, "layer": 1, "sizes": [24, 48],
        "k": 4, "seeds": 2, "batch": 128, "steps": 12, "every": 4, "lr": 1e-2, "near": 4,
    },
    "default": {
        "minutes": 35, "source": "smollm2", "context": 128, "train_tokens": 100_000, "held_tokens": 1_024, "layer": 12,
        "sizes": [1024, 4096], "k": 32, "seeds": 5, "batch": 2048, "steps": 600, "every": 50, "lr": 1e-3, "near": 8,
    },
}  # fmt: skip
LEVEL = 0.7


def run(study: Study) -> None:
    found = language(study)
    windows, _ = found.split(study["train_tokens"], study["held_tokens"], study["context"])
    hook = found.layer.format(study["layer"])
    shards = harvest(
        found.model, windows, hook, study.parts / "activations", ignore=found.special, dtype=torch.bfloat16, progress=study.progress
    )
    sample = shards.read(0, min(shards.rows, 16_384), [hook])[hook].float()
    study.record(tokens=shards.rows, hook=hook)
    sets = {size: [trained(study, shards, hook, size, study.seed + n) for n in range(study["seeds"])] for size in study["sizes"]}

    rows: list[dict[str, Any]] = []
    again: dict[int, Tensor] = {}
    frequencies: dict[int, Tensor] = {}
    for size, made in sets.items():
        fired = [frequency(sae, sample) for sae, _ in made]
        alive = [own > 0 for own in fired]
        result = stability([sae for sae, _ in made], thresholds=(0.5, LEVEL, 0.9), alive=alive)
        again[size], frequencies[size] = result.found_again[0][alive[0]], fired[0][alive[0]]
        larger = dict(pairwise(study["sizes"])).get(size)
        best = []
        for place in range(len(made) if larger else 0):  # of another seed: of the same one the first features start alike
            other = sets[larger][(place + 1) % len(made)][0]
            best.append(match(made[place][0], other, alive=(alive[place], frequency(other, sample) > 0)).mmcs("a_to_b"))
        rows.append({
            "features": size, "alive": statistics.mean(int(own.sum()) for own in alive),
            "fvu": statistics.mean(float(sae.loss(sample).fvu) for sae, _ in made),
            **{f"shared_{level:g}": float(share) for level, share in zip(result.thresholds, result.shared.mean(0))},
            f"most_{LEVEL:g}": float(result.most.mean(0)[1]), "proven": f"{int(result.exact.sum())}/{len(result.pairs)}",
            "mmcs_of_seeds": float(result.mmcs.mean()), "mmcs_with_larger": statistics.mean(best) if best else None,
        })  # fmt: skip
    study.table("sizes", rows)
    for row in rows:
        study.say(
            f"F = {row['features']}: two seeds share {row[f'shared_{LEVEL:g}']:.0%} of their alive features one to one above {LEVEL:g} "
            f"(no matching shares more than {row[f'most_{LEVEL:g}']:.0%}); mean best cosine between seeds {row['mmcs_of_seeds']:.3f}"
            + ("." if row["mmcs_with_larger"] is None else f", to the next larger dictionary {row['mmcs_with_larger']:.3f}.")
        )
    size = study["sizes"][0]
    often = rank_correlation(frequencies[size], again[size])
    study.say(f"Rank correlation of how often a feature fires with how well other seeds find it again (F = {size}): {often:.2f}.")

    curves = {size: over_steps(study, size, made) for size, made in sets.items()}
    study.record(curves=curves, rank_correlation=often)
    for size, points in curves.items():
        a, b = points[len(points) // 2], points[-1]
        study.say(
            f"F = {size}: from step {a['step']} to {b['step']} the shared ones went from {a['shared']:.1%} to {b['shared']:.1%}, the mean "
            f"best cosine from {a['mmcs']:.3f} to {b['mmcs']:.3f}."
        )
    spans = [{"features": size, **span(study, sets[size][0][0], sets[size][1][0], sample)} for size in study["sizes"]]
    study.table("spaces", spans)
    study.say(
        f"Of a feature that the other seed lacks, the space of its {study['near']} nearest features there holds "
        f"{spans[-1]['held_of_lost']:.0%} of the squared length on average at F = {study['sizes'][-1]}; of random directions "
        f"{spans[-1]['held_of_random']:.0%}."
    )
    draw(study, again, frequencies, curves)


def trained(study: Study, shards: ActivationShards, hook: str, size: int, seed: int) -> tuple[SAE, dict[int, Tensor]]:
    """A dictionary and its decoder over training, by step."""
    folder = study.parts / f"F {size} seed {seed}"
    folder.mkdir(exist_ok=True)

    def keep(step: int, sae: SAE) -> None:
        torch.save(sae.W_dec.detach().bfloat16(), folder / f"{step}.pt")

    file = folder / "checkpoint"
    sae = train(study, shards, hook, TopK(study["k"]), file, seed, size, keep, log_every=study["every"])
    return sae, {int(path.stem): torch.load(path).float() for path in folder.glob("*.pt")}


@torch.no_grad()
def frequency(sae: SAE, x: Tensor) -> Tensor:
    """Share of rows on which each feature is among the k."""
    counts = torch.zeros(sae.d_sae, dtype=torch.float64, device="cpu")
    for part in x.split(2048):
        latents: Any = sae.encode(part)
        counts += torch.bincount(latents.indices[latents.values > 0], minlength=sae.d_sae)
    return counts / len(x)


def over_steps(study: Study, size: int, made: list[tuple[SAE, dict[int, Tensor]]]) -> list[dict[str, float]]:
    """The first two seeds' agreement at each kept step; dead features count."""
    first, second = made[0][1], made[1][1]
    points = []
    for step in study.track(sorted(first.keys() & second.keys()), f"steps of F = {size}"):
        at = stability([first[step], second[step]], thresholds=(LEVEL,), most_candidates=16)
        middle = (at.found_again[0] > 0.5) & (at.found_again[0] < 0.9)
        points.append({"step": step, "shared": float(at.shared), "in_between": float(middle.double().mean()), "mmcs": float(at.mmcs)})
    return points


def span(study: Study, a: SAE, b: SAE, sample: Tensor) -> dict[str, float]:
    """How much of a's features that b lacks, and of random directions, lies in the space of their nearest features of b."""
    kept = b.W_dec.detach()[frequency(b, sample) > 0]
    alive = a.W_dec.detach()[frequency(a, sample) > 0]
    lost = alive[fastsae.match(alive, kept).a_to_b.similarity[:, 0] < LEVEL]
    random = torch.randn(200, kept.shape[1], generator=study.generator(5), device="cpu", dtype=torch.float32)
    held = []
    for rows in (lost[:200], random):
        near = fastsae.match_cosine(rows, kept, k=min(study["near"], len(kept))).index if len(rows) else []
        held.append([float(principal_angles(row[None], kept[nearest])[0].cos() ** 2) for row, nearest in zip(rows, near)])
    return {
        "lost": len(lost) / max(len(alive), 1),
        "held_of_lost": statistics.mean(held[0] or [0.0]),
        "held_of_random": statistics.mean(held[1]),
    }


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's; ties in the order of features."""
    ranks = torch.stack([t.argsort(stable=True).argsort().double() for t in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1]) if len(a) > 2 else 0.0


def draw(study: Study, again: dict[int, Tensor], frequencies: dict[int, Tensor], curves: dict[int, list[dict[str, float]]]) -> None:
    canvas, axes = study.figure(rows=1, columns=3, figsize=(16, 4.6))
    for size, values in again.items():
        axes[0].hist(values.tolist(), bins=40, range=(0, 1), density=True, histtype="step", label=f"F = {size}")
        axes[1].scatter(frequencies[size].tolist(), values.tolist(), s=3, alpha=0.4, label=f"F = {size}")
        steps = [point["step"] for point in curves[size]]
        for name, label, style in (("mmcs", "mean best cosine", "o--"), ("shared", f"shared above {LEVEL:g}", "o-")):
            axes[2].plot(steps, [point[name] for point in curves[size]], style, ms=3, label=f"{label}, F = {size}")
    axes[0].set(
        xlabel="mean cosine to its partners in other seeds", ylabel="density of alive features", title="How well features are found again"
    )
    axes[1].set(
        xlabel="share of tokens on which it fires", ylabel="mean cosine to its partners", xscale="log", title="By how often they fire"
    )
    axes[2].set(xlabel="step", ylabel="of two seeds", title="Over training")
    axes[2].set_ylim(bottom=0)
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
    study.save(canvas, "stability")
