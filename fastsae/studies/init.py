"""Does the starting point of a dictionary speed recovery up?

MMCS of the truth against steps for starts at random directions, orthogonal blocks, noisy left singular vectors of the layer that writes
the activations (here the matrix of the true features), noisy axes, principal components and data points. The author of the original
experiment believed that orthogonal starts help and expected better ones to exist; nothing was recorded.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from fastsae.studies import Study
from fastsae.studies._toy import sources, train
from fastsae.superposition import init as starts

SIZES = {
    "smoke": {
        "minutes": 0.05, "preset": "hoagy_correlated", "n_features": 24, "d": 12, "mean_active": 2.0, "rate": 0.97, "dictionary": 48,
        "l1": 0.1, "steps": 60, "cooldown": 10, "seeds": 1, "every": 20,
    },
    "quick": {
        "minutes": 2, "preset": "hoagy_correlated", "n_features": 256, "d": 128, "mean_active": 5.0, "rate": 0.98, "dictionary": 512,
        "l1": 0.1, "steps": 2000, "cooldown": 500, "seeds": 2, "every": 50,
    },
    "default": {
        "minutes": 6, "preset": "hoagy_correlated", "n_features": 512, "d": 256, "mean_active": 5.0, "rate": 0.99, "dictionary": 1024,
        "l1": 0.1, "steps": 4000, "cooldown": 1000, "seeds": 3, "every": 50,
    },
}  # fmt: skip


def run(study: Study) -> None:
    data, d = sources(study), study["d"]
    weight = data.features.T
    schemes: dict[str, Callable[[int, Tensor, int], Tensor]] = {
        "random directions": lambda F, x, seed: starts.random_directions(F, d, seed=seed),
        "orthogonal": lambda F, x, seed: starts.orthogonal(F, d, seed=seed),
        "singular vectors, noised": lambda F, x, seed: starts.noised_singular_vectors(weight, F, noise=0.3, seed=seed),
        "axes, noised": lambda F, x, seed: starts.noised_unit_vectors(F, d, noise=0.3, seed=seed),
        "principal components, noised": lambda F, x, seed: starts.principal_components(x, F, noise=0.3, seed=seed),
        "data points": lambda F, x, seed: starts.data_points(x, F, seed=seed),
    }
    snapshots = list(range(0, study["steps"] + 1, study["every"]))
    seeds = [study.seed + i for i in range(study["seeds"])]
    curves: dict[str, list[float]] = {}
    rows = []
    for name, start in schemes.items():
        runs = train(
            study, name, data, l1=study["l1"], n_features=study["dictionary"], seeds=seeds, stop=study["steps"], start=start,
            cooldown=study["cooldown"], snapshots=snapshots,
        )  # fmt: skip
        each = torch.stack([torch.stack([cosines.double().mean() for _, cosines in r.snapshots]) for r in runs])
        curves[name] = each.mean(0).tolist()
        reached = {level: [_first(snapshots, curve, level) for curve in each.tolist()] for level in (0.5, 0.8, 0.95)}
        rows.append({
            "start": name,
            "at_0": curves[name][0],
            **{f"steps_to_{level:g}": _middle(steps) for level, steps in reached.items()},
            "mmcs": statistics.mean(r.row()["mmcs"] for r in runs),
            "spread": max(each[:, -1].tolist()) - min(each[:, -1].tolist()),
            "dead": statistics.mean(r.row()["dead"] for r in runs),
            "fvu": statistics.mean(r.fvu for r in runs),
            "cpu_seconds": sum(r.cpu_seconds for r in runs),
        })  # fmt: skip
    study.table("starts", rows)
    study.record(steps=snapshots, curves=curves)
    top = max(rows, key=lambda row: row["mmcs"])
    fast = [row for row in rows if row["steps_to_0.8"] is not None]
    sentence = f"Highest MMCS at the end: {top['start']}, {top['mmcs']:.3f} (random directions: {rows[0]['mmcs']:.3f})."
    if fast:
        first = min(fast, key=lambda row: row["steps_to_0.8"])
        sentence += f" First at 0.8: {first['start']}, after {first['steps_to_0.8']} steps (random directions: {rows[0]['steps_to_0.8']})."
    study.say(sentence)

    canvas, axis = study.figure(figsize=(7.5, 4.8))
    for name, curve in curves.items():
        axis.plot(snapshots, curve, label=name)
    axis.set(xlabel="step", ylabel="MMCS of the truth", ylim=(0, 1.02))
    axis.set(
        title=f"Starts of F = {study['dictionary']} (G = {study['n_features']}, D = {study['d']}, L1 = {study['l1']:g}, {len(seeds)} seeds)"
    )
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    study.save(canvas, "starts")


def _first(steps: list[int], curve: list[float], level: float) -> int | None:
    return next((step for step, value in zip(steps, curve) if value >= level), None)


def _middle(steps: list[int | None]) -> int | None:
    """The median, None where not every seed has got there."""
    known = [step for step in steps if step is not None]
    return int(statistics.median(known)) if len(known) == len(steps) else None
