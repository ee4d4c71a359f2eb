"""How many features are there, if nobody tells? Dictionaries against larger ones.

The proxy of Sharkey, Braun & Millidge 2022 for an unknown number of features: a dictionary's mean best cosine to the next larger one, at
equal L1, is high where both hold the same features. Larger dictionaries take longer, so that "not yet converged" looks like "too large":
all are trained until their loss has stopped falling, and the number of steps is part of the result. Here the truth is known and the proxy
can be judged. Besides: alive features and the truth's MMCS.
"""

from __future__ import annotations

from itertools import pairwise

import fastsae
from fastsae.studies import Study
from fastsae.studies._toy import frame, powers, sources, train

SIZES = {
    "smoke": {
        "minutes": 0.05, "preset": "hoagy_correlated", "n_features": 24, "d": 12, "mean_active": 2.0, "rate": 0.97, "sizes": [12, 24, 48],
        "l1": [0.1], "stop": 60, "max_steps": 60, "cooldown": 10,
    },
    "default": {
        "minutes": 14, "preset": "hoagy_correlated", "n_features": 256, "d": 128, "mean_active": 5.0, "rate": 0.98,
        "sizes": [64, 128, 256, 512, 1024, 2048], "l1": powers(-1.5, -0.5, 5), "stop": "converged", "max_steps": 12000, "cooldown": 1000,
    },
}  # fmt: skip
AS_GOOD = 0.02


def run(study: Study) -> None:
    G, sizes = study["n_features"], study["sizes"]
    options = {name: study[name] for name in ("stop", "max_steps", "cooldown", "l1")}
    runs = train(study, "dictionaries", sources(study), n_features=sizes, **options)
    by_place = {(r.l1, r.n_features): r for r in runs}
    rows = []
    for row in frame(runs):
        r = by_place[row["l1"], row["n_features"]]
        following = dict(pairwise(sizes)).get(r.n_features)
        with_larger = None
        if following is not None and bool((~r.dead).any()):
            other = by_place[r.l1, following]
            found = fastsae.match(r.dictionary, other.dictionary, alive=(~r.dead, ~other.dead)) if bool((~other.dead).any()) else None
            with_larger = None if found is None else found.mmcs("a_to_b")
        rows.append({**row, "alive": row["n_features"] - row["dead"], "with_larger": with_larger})
    names = ("l1", "n_features", "with_larger", "mmcs", "recovered", "alive", "fvu", "l0", "steps", "converged", "cpu_seconds")
    study.table("runs", [{name: row[name] for name in names} for row in rows])

    # At each L1: the size that agrees best with its successor, the last one that agrees about as well, alive features of the largest.
    estimates = []
    for weight in study["l1"]:
        own = [row for row in rows if row["l1"] == weight]
        known = [row for row in own if row["with_larger"] is not None]
        peak = max(known, key=lambda row: row["with_larger"]) if known else None
        estimates.append({
            "l1": weight, "best_with_larger": peak and peak["with_larger"], "at_size": peak and peak["n_features"],
            "alive_there": peak and peak["alive"], "mmcs_there": peak and peak["mmcs"],
            "last_as_good": peak and max(row["n_features"] for row in known if row["with_larger"] > peak["with_larger"] - AS_GOOD),
            "alive_in_largest": own[-1]["alive"],
        })  # fmt: skip
    study.table("estimates", estimates)
    known = [row for row in estimates if row["best_with_larger"] is not None]
    if known:
        top = max(known, key=lambda row: row["best_with_larger"])
        place = f"L1 = {top['l1']:g}, F = {top['at_size']}, with {top['alive_there']} features alive"
        study.say(
            f"Agreement with the next larger dictionary peaks at {top['best_with_larger']:.3f} for {place}. "
            f"The truth has {G} features, and its MMCS is {top['mmcs_there']:.3f} there."
        )
        last = sorted({row["last_as_good"] for row in known})
        study.say(f"It stays within {AS_GOOD:g} of each L1's peak up to F = {' or '.join(map(str, last))}.")
    steps = {size: max(row["steps"] for row in rows if row["n_features"] == size) for size in sizes}
    slow = sum(row["converged"] is False for row in rows)
    study.say(f"Most steps to converge, by size: {steps}; {slow} of {len(rows)} runs had not converged at {study['max_steps']} steps.")

    canvas, axes = study.figure(rows=1, columns=3, figsize=(15, 4.5))
    for column, title, axis in (
        ("with_larger", "mean best cosine to the next larger dictionary", axes[0]),
        ("mmcs", "MMCS of the truth", axes[1]),
        ("alive", "alive features", axes[2]),
    ):
        for weight in study["l1"]:
            own = [row for row in rows if row["l1"] == weight and row[column] is not None]
            axis.plot([row["n_features"] for row in own], [row[column] for row in own], "o-", label=f"L1 = {weight:.3g}")
        axis.axvline(G, color="0.6", ls=":")
        axis.set_ylim(0, 1.02 if column != "alive" else None)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, list(map(str, sizes)))
        axis.set(xlabel="dictionary size F (dotted: true features)", title=title)
    axes[2].axhline(G, color="0.6", ls=":")
    study.save(canvas, "larger")
