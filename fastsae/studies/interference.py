"""How strongly may features interfere before sparse dictionaries lose them?

The ratio G / D goes from 1 to 32 at a fixed D and a fixed number of active features, all equally likely: what changes is how many
directions crowd into the space, so how large the nearest of them overlap. A low ratio favours antipodal pairs; the strongly interfering
regime is the one thought relevant to real networks. MMCS is compared with that of as many random directions, which grows with F by itself.
"""

from __future__ import annotations

import math

import torch

import fastsae
from fastsae.studies import Study
from fastsae.studies._toy import best, distribution, frame, powers, ridgeline, train
from fastsae.superposition import SuperpositionData, unit_features

SIZES = {
    "smoke": {
        "minutes": 0.05, "d": 12, "ratios": [1, 4], "mean_active": 2.0, "over": 2, "l1": [0.1], "stop": 60, "max_steps": 60,
        "cooldown": 10,
    },
    "quick": {
        "minutes": 3, "d": 64, "ratios": [1, 2, 4, 8, 16, 32], "mean_active": 3.0, "over": 2, "l1": powers(-1.25, -0.75, 2),
        "stop": "converged", "max_steps": 2000, "cooldown": 600,
    },
    "default": {
        "minutes": 13, "d": 128, "ratios": [1, 2, 4, 8, 16, 32], "mean_active": 5.0, "over": 2, "l1": powers(-1.5, -0.5, 4),
        "stop": "converged", "max_steps": 8000, "cooldown": 1000,
    },
}  # fmt: skip


def run(study: Study) -> None:
    D = study["d"]
    rows, winners = [], {}
    for ratio in study["ratios"]:
        G, F = ratio * D, ratio * D * study["over"]
        data = SuperpositionData(G, D, mean_active=study["mean_active"], decay=None, seed=1000 + study.seed)
        options = {name: study[name] for name in ("stop", "max_steps", "cooldown", "l1")}
        runs = train(study, f"G / D = {ratio}", data, n_features=F, **options)
        table = frame(runs)
        row = best(table)
        winners[ratio] = next(r for r in runs if r.l1 == row["l1"])
        # What a dictionary of random directions would score, and how near the truth's own features come to each other.
        chance = fastsae.mmcs(data.features, unit_features(F, D, study.generator(ratio)), "a_to_b")
        overlap = float(fastsae.match_cosine(data.features, data.features, exclude_self=True).similarity.mean())
        expected = math.sqrt(2 * math.log(G) / D)
        rows.append({"ratio": ratio, "n_true": G, **row, "chance": chance, "overlap": overlap, "sqrt(2 ln G / D)": expected})
    columns = ["ratio", "n_true", "n_features", "l1", "mmcs", "chance", "recovered", "overlap", "sqrt(2 ln G / D)", "dead", "antipodal"]
    columns += ["l0", "fvu", "steps", "converged", "cpu_seconds"]
    study.table("best L1 of each ratio", [{name: row[name] for name in columns} for row in rows])
    lost = [row for row in rows if row["recovered"] < 0.5]
    study.say(
        f"MMCS of the truth is {rows[0]['mmcs']:.3f} at G / D = {rows[0]['ratio']} and {rows[-1]['mmcs']:.3f} at {rows[-1]['ratio']} "
        f"(random directions: {rows[0]['chance']:.3f} and {rows[-1]['chance']:.3f}). "
        + (f"Fewer than half of the features are found from G / D = {lost[0]['ratio']} on." if lost else "More than half are found at all.")
    )
    study.say(
        f"Antipodes among the alive features: {rows[0]['antipodal']:.1%} at G / D = {rows[0]['ratio']}, {rows[-1]['antipodal']:.1%} at "
        f"{rows[-1]['ratio']}."
    )
    found = [distribution(f"G / D = {ratio}", torch.as_tensor(r.similarity, device="cpu")) for ratio, r in winners.items()]
    study.record(distributions=found)

    canvas, axes = study.figure(rows=1, columns=2, figsize=(12, 4.5))
    ratios = [row["ratio"] for row in rows]
    for column, label, style in (
        ("mmcs", "MMCS of the truth", "o-"),
        ("recovered", "share above 0.9", "s-"),
        ("chance", "MMCS of random directions", "k:"),
        ("overlap", "mean nearest overlap of the truth", "k--"),
    ):
        axes[0].plot(ratios, [row[column] for row in rows], style, label=label)
    axes[0].set_xscale("log", base=2)
    axes[0].set(xlabel="G / D", ylim=(0, 1.02), title=f"D = {D}, {study['mean_active']:g} active, F = {study['over']} G, best L1")
    axes[0].set_xticks(ratios, list(map(str, ratios)))
    ridgeline(axes[1], found, "At the end (heights: roots of shares)")
    study.save(canvas, "interference")
