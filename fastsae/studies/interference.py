"""How strongly may features interfere before sparse dictionaries lose them?

The ratio G / D goes up at a fixed D and a fixed number of active features, all equally likely: what changes is how many directions crowd
into the space, so how large the nearest of them overlap. Two truths: random unit features, among which antipodal pairs are next to
impossible, and features where a toy model's encoder puts them (Elhage et al. 2022), which likes antipodes. MMCS is compared with that of as
many random directions, which grows with F by itself. Where features are lost: is it a limit, or training? Steps, samples and dictionary
sizes are swept there. A run has converged if its loss stopped falling (less than 1 % in 500 steps, twice) before the steps were over.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch

import fastsae
from fastsae.studies import Study
from fastsae.studies._toy import antipodal, distribution, frame, powers, ridgeline, train, truth
from fastsae.superposition import Run, SuperpositionData, unit_features

SIZES = {
    "smoke": {
        "minutes": 0.05, "truths": ["random", "toy model"], "toy_steps": 50, "d": 12, "ratios": [1, 4], "mean_active": 2.0,
        "over": 2, "l1": [0.1], "seeds": 1, "max_steps": 60, "cooldown": 10, "window": 20, "limit": 4,
        "limit_over": [2], "limit_steps": [60],
    },
    "default": {
        "minutes": 40, "truths": ["random", "toy model"], "toy_steps": 2000, "d": 32, "ratios": [1, 4, 16], "mean_active": 2.0,
        "over": 2, "l1": powers(-1.5, 0, 4), "seeds": 3, "max_steps": 5000, "cooldown": 800, "window": 500, "limit": 16,
        "limit_over": [2, 4], "limit_steps": [1250, 5000],
    },
}  # fmt: skip


def run(study: Study) -> None:
    rows: list[dict[str, Any]] = []
    winners: dict[str, Run] = {}
    for kind in study["truths"]:
        for ratio in study["ratios"]:
            data, F = made(study, kind, ratio), ratio * study["d"] * study["over"]
            row, winners[f"{kind}, {ratio}"] = judged(study, f"{kind}, G over D = {ratio}", data, F, study["l1"], study["max_steps"])
            # What a dictionary of random directions would score, and how near the truth's own features come to each other.
            row["chance"] = fastsae.mmcs(data.features, unit_features(F, study["d"], study.generator(ratio)), "a_to_b")
            row["overlap"] = float(fastsae.match_cosine(data.features, data.features, exclude_self=True).similarity.mean())
            row["sqrt(2 ln G / D)"] = math.sqrt(2 * math.log(data.n_features) / study["d"])
            rows.append({"truth": kind, "ratio": ratio, "n_true": data.n_features, "antipodes": antipodal(data.features), **row})
    study.table("best L1 of each ratio", rows)
    for kind in study["truths"]:
        own = [row for row in rows if row["truth"] == kind]
        lost = [row["ratio"] for row in own if row["recovered"] < 0.5]
        study.say(
            f"Truth {kind!r}: MMCS {own[0]['mmcs']:.3f} at G / D = {own[0]['ratio']}, {own[-1]['mmcs']:.3f} at {own[-1]['ratio']} (random "
            f"directions: {own[0]['chance']:.3f}, {own[-1]['chance']:.3f}). "
            + (f"Fewer than half of the features are found from G / D = {lost[0]} on. " if lost else "More than half are found at all. ")
            + f"With an antipode are up to {max(row['antipodes'] for row in own):.1%} of the true features, and up to "
            f"{max(row['antipodal'] for row in own):.1%} of the alive ones of a dictionary."
        )
    edges = [f"{row['truth']} {row['ratio']}" for row in rows if row["l1"] == max(study["l1"])]
    late = [f"{row['truth']} {row['ratio']}" for row in rows if row["converged"] < 1]
    study.say(f"At the grid's largest L1: {', '.join(edges) or 'none'}. Not converged in every seed: {', '.join(late) or 'none'}.")
    limits(study, rows)
    draw(study, rows, winners)


def made(study: Study, kind: str, ratio: int) -> SuperpositionData:
    features = truth(study, kind, ratio * study["d"])
    count = ratio * study["d"] if features is None else len(features)
    return SuperpositionData(
        count, study["d"], mean_active=study["mean_active"], decay=None, features=features, seed=1000 + study.seed
    )  # fmt: skip


def judged(
    study: Study, label: str, data: SuperpositionData, F: int, l1: list[float], steps: int, batch: int = 256
) -> tuple[dict[str, Any], Run]:
    """The L1 with the highest mean MMCS over seeds, means over seeds there, and its first run."""
    seeds = [study.seed + number for number in range(study["seeds"])]
    options = {"stop": "converged", "max_steps": steps, "cooldown": study["cooldown"], "window": study["window"], "batch": batch}
    runs = train(study, label, data, n_features=F, l1=l1, seeds=seeds, **options)
    groups = [[run for run in runs if run.l1 == weight] for weight in l1]
    own = max(groups, key=lambda group: sum(run.row()["mmcs"] for run in group))
    table = frame(own)
    row: dict[str, Any] = {"n_features": F, "l1": own[0].l1}
    row |= {name: statistics.mean(r[name] for r in table) for name in ("mmcs", "recovered", "dead", "antipodal", "l0", "fvu", "steps")}
    row["spread"] = max(r["mmcs"] for r in table) - min(r["mmcs"] for r in table)
    row["converged"] = statistics.mean(run.steps < steps for run in own)
    return {**row, "cpu_seconds": sum(run.cpu_seconds for run in runs)}, own[0]


def limits(study: Study, rows: list[dict[str, Any]]) -> None:
    """More steps, more samples a step, larger dictionaries, at one ratio, at the L1 that was best there and the next larger."""
    ratio, kind = study["limit"], study["truths"][0]
    data, found = made(study, kind, ratio), next(row["l1"] for row in rows if (row["truth"], row["ratio"]) == (kind, ratio))
    place = study["l1"].index(found)
    near = study["l1"][place : place + 2]
    table = []
    for over in study["limit_over"]:
        for steps, batch in [*((steps, 256) for steps in study["limit_steps"]), (study["limit_steps"][-1] // 4, 1024)]:
            label = f"{ratio}, F over G = {over}, {steps} steps of {batch}"
            row, _ = judged(study, label, data, ratio * over * study["d"], near, steps, batch)
            table.append({"F / G": over, "most_steps": steps, "batch": batch, **row})
    study.table(f"training at G / D = {ratio}", table)
    least, most = (fn(table, key=lambda row: row["recovered"]) for fn in (min, max))
    said = [f"{row['recovered']:.1%} (F = {row['F / G']} G, {row['steps']:.0f} steps of {row['batch']})" for row in (least, most)]
    study.say(f"At G / D = {ratio} the share of features found goes from {said[0]} to {said[1]} by training and size alone.")


def draw(study: Study, rows: list[dict[str, Any]], winners: dict[str, Run]) -> None:
    found = [distribution(label, torch.as_tensor(run.similarity, device="cpu")) for label, run in winners.items()]
    study.record(distributions=found)
    canvas, axes = study.figure(rows=1, columns=len(study["truths"]) + 1, figsize=(6 * (len(study["truths"]) + 1), 4.8))
    for kind, axis in zip(study["truths"], axes):
        own = [row for row in rows if row["truth"] == kind]
        for column, label, style in (
            ("mmcs", "MMCS of the truth", "o-"),
            ("recovered", "share above 0.9", "s-"),
            ("chance", "MMCS of random directions", "k:"),
            ("overlap", "mean nearest overlap of the truth", "k--"),
        ):
            axis.plot(study["ratios"], [row[column] for row in own], style, label=label)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="G / D", ylim=(0, 1.02), title=f"{kind}: D = {study['d']}, {study['mean_active']:g} active, F = {study['over']} G")
        axis.set_xticks(study["ratios"], list(map(str, study["ratios"])))
        axis.legend(frameon=False, fontsize=8, loc="lower left")
    ridgeline(axes[-1], found, "Best cosines at the end (heights: roots of shares)")
    study.save(canvas, "interference")
