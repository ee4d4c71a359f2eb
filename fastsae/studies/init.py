"""Does the starting point of a dictionary speed recovery up?

MMCS of the truth against steps for starts at random directions, orthogonal blocks, noisy left singular vectors of the layer that writes
the activations (here the matrix of the true features), noisy axes, principal components and data points. The author of the original
experiment believed that orthogonal starts help and expected better ones to exist; nothing was recorded. Then the same starts on a language
model, by loss and variance: a layer's residual stream, where the matrix is the one that writes to it, and its MLP's neurons, which are a
privileged basis, where it is the one that they read through.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsae.lm import harvest
from fastsae.studies import Study
from fastsae.studies._language import language
from fastsae.studies._toy import sources, train
from fastsae.superposition import init as starts

SIZES = {
    "smoke": {
        "minutes": 0.05, "preset": "hoagy_correlated", "n_features": 24, "d": 12, "mean_active": 2.0, "rate": 0.97, "dictionary": 48,
        "l1": 0.1, "steps": 60, "cooldown": 10, "seeds": 1, "every": 20,
        "source": "random", "context": 16, "train_tokens": 512, "held_tokens": 64, "layer": 1, "write": ".0", "read": ".0",
        "neurons": ".0:output", "real_features": 32, "real_l1": 0.1, "real_steps": 40, "window": 10,
    },
    "default": {
        "minutes": 15, "preset": "hoagy_correlated", "n_features": 256, "d": 128, "mean_active": 5.0, "rate": 0.98, "dictionary": 512,
        "l1": 0.1, "steps": 2000, "cooldown": 500, "seeds": 3, "every": 50,
        "source": "smollm2", "context": 128, "train_tokens": 32_768, "held_tokens": 1024, "layer": 12, "write": ".mlp.down_proj",
        "read": ".mlp.gate_proj", "neurons": ".mlp.down_proj:input", "real_features": 1024, "real_l1": 0.3, "real_steps": 300,
        "window": 30,
    },
}  # fmt: skip


def run(study: Study) -> None:
    data, d = sources(study), study["d"]
    weight = data.features.T
    schemes = named(weight, d)
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
    of_a_model(study)


def named(weight: Tensor, d: int) -> dict[str, Callable[[int, Tensor, int], Tensor]]:
    """Starts by name; weight: ``[d, ..]``, whose left singular vectors one of them takes."""
    return {
        "random directions": lambda F, x, seed: starts.random_directions(F, d, seed=seed),
        "orthogonal": lambda F, x, seed: starts.orthogonal(F, d, seed=seed),
        "singular vectors, noised": lambda F, x, seed: starts.noised_singular_vectors(weight, F, noise=0.3, seed=seed),
        "axes, noised": lambda F, x, seed: starts.noised_unit_vectors(F, d, noise=0.3, seed=seed),
        "principal components, noised": lambda F, x, seed: starts.principal_components(x, F, noise=0.3, seed=seed),
        "data points": lambda F, x, seed: starts.data_points(x, F, seed=seed),
    }


def of_a_model(study: Study) -> None:
    """The same starts on activations, whose features nobody knows."""
    found = language(study)
    windows, _ = found.split(study["train_tokens"], study["held_tokens"], study["context"])
    layer = found.layer.format(study["layer"])
    hooks = {"residual": layer, "neurons": layer + study["neurons"]}
    part: Any = found.model.get_submodule
    weights = {name: part(layer + study[to]).weight.detach() for name, to in (("residual", "write"), ("neurons", "read"))}
    folder = study.parts / "activations"
    shards = harvest(found.model, windows, [*hooks.values()], folder, ignore=found.special, dtype=torch.float32, progress=study.progress)
    rows: list[dict[str, Any]] = []
    curves: dict[str, dict[str, list[float]]] = {}
    for place, hook in hooks.items():
        x = shards.read(0, shards.rows, [hook])[hook]
        x = x - x.mean(0)
        norms = x.norm(dim=1)
        x = x[norms < 10 * norms.median()]  # without the few massive rows
        x = x / x.square().sum(1).mean().sqrt()  # the l1 of all layers means the same
        curves[place] = {}
        for name, start in named(weights[place], x.shape[1]).items():
            runs = train(
                study, f"{place}, {name}", x, l1=study["real_l1"], n_features=study["real_features"],
                seeds=[study.seed + i for i in range(study["seeds"])], stop=study["real_steps"], start=start,
                cooldown=study["real_steps"] // 2,
                window=study["window"],
            )  # fmt: skip
            each = torch.tensor([run.losses for run in runs], dtype=torch.float64, device="cpu")
            curves[place][name] = each.mean(0).tolist()
            numbers = {key: statistics.mean(run.row()[key] for run in runs) for key in ("fvu", "l0", "dead")}
            means = each.mean(0)
            losses = {"early_loss": means[len(means) // 10], "loss": means[-1], "spread": each[:, -1].max() - each[:, -1].min()}
            rows.append({"activations": place, "start": name, **{key: float(loss) for key, loss in losses.items()}, **numbers})
    study.table("starts on a model", rows)
    study.record(window=study["window"], losses=curves)
    for place in hooks:
        own = [row for row in rows if row["activations"] == place]
        early, late = (min(own, key=lambda row: row[key]) for key in ("early_loss", "loss"))
        study.say(
            f"{hooks[place]}: lowest loss after a tenth of the steps from {early['start']} ({early['early_loss']:.4f}; random directions "
            f"{own[0]['early_loss']:.4f}), at the end from {late['start']} ({late['loss']:.4f}; random directions {own[0]['loss']:.4f}, "
            f"seeds differ by {own[0]['spread']:.4f})."
        )
    canvas, axes = study.figure(rows=1, columns=2, figsize=(12, 4.8))
    for axis, (place, lines) in zip(axes, curves.items()):
        for name, losses in lines.items():
            axis.plot([study["window"] * (n + 1) for n in range(len(losses))], losses, label=name)
        axis.set(xlabel="step", ylabel="loss of the last window", yscale="log", title=f"{hooks[place]}, F = {study['real_features']}")
    study.save(canvas, "starts_on_a_model")


def _first(steps: list[int], curve: list[float], level: float) -> int | None:
    return next((step for step, value in zip(steps, curve) if value >= level), None)


def _middle(steps: list[int | None]) -> int | None:
    """The median, None where not every seed has got there."""
    known = [step for step in steps if step is not None]
    return int(statistics.median(known)) if len(known) == len(steps) else None
