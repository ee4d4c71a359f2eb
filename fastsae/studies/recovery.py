"""Which L1 and dictionary size take features out of superposition?

The experiment of Sharkey, Braun & Millidge 2022: sparse combinations of G = 2 D random features; ReLU dictionaries over L1 x size; MMCS of
the truth with what was learned. Published picture: a ridge of good L1 at each size, and dead features beyond the true size. New here: how
the distribution of the best cosines moves during training (are features half represented, or some fully and some not at all?), and
antipodal pairs. The L1 convention is that of ``fastsae.superposition.Training``.
"""

from __future__ import annotations

from typing import Any

from fastsae.studies import Study
from fastsae.studies._toy import Distribution, best, distribution, frame, heat, powers, ridgeline, share_between, sources, train

SIZES = {
    "smoke": {
        "minutes": 0.05, "preset": "hoagy_correlated", "n_features": 24, "d": 12, "mean_active": 2.0, "rate": 0.97,
        "sizes": [12, 48], "l1": [0.05, 0.2], "stop": 60, "max_steps": 60, "cooldown": 10, "snapshots": [0, 20, 60],
    },
    "default": {
        "minutes": 12, "preset": "hoagy_correlated", "n_features": 512, "d": 256, "mean_active": 5.0, "rate": 0.99,
        "sizes": [128, 256, 512, 1024, 2048, 4096], "l1": powers(-1.75, 0, 8), "stop": "converged", "max_steps": 5000, "cooldown": 1000,
        "snapshots": [0, 100, 250, 500, 1000, 2000],
    },
}  # fmt: skip


def run(study: Study) -> None:
    G, D = study["n_features"], study["d"]
    options = {name: study[name] for name in ("stop", "max_steps", "cooldown", "snapshots", "l1")}
    runs = train(study, "dictionaries", sources(study), n_features=study["sizes"], **options)
    rows = frame(runs)
    study.table("runs", rows)

    top = best(rows)
    study.say(
        f"Best of {len(rows)} dictionaries: MMCS of the truth {top['mmcs']:.3f}, {top['recovered']:.1%} of {G} true features above 0.9, at "
        f"L1 = {top['l1']:g}, F = {top['n_features']} ({top['dead']} dead), G / D = {G / D:g}."
    )
    ridge = [best([row for row in rows if row["n_features"] == size]) for size in study["sizes"]]
    study.table("ridge", [{name: row[name] for name in ("n_features", "l1", "mmcs", "recovered", "dead", "l0", "fvu")} for row in ridge])
    places = ", ".join(f"{row['l1']:g} (F = {row['n_features']})" for row in ridge)
    alive = ", ".join(str(row["n_features"] - row["dead"]) for row in ridge)
    study.say(f"Ridge: the best L1 of each size, {places}. Alive features there: {alive}; the truth has {G}.")
    on_ridge = {row["n_features"]: next(r for r in runs if (r.n_features, r.l1) == (row["n_features"], row["l1"])) for row in ridge}
    middling = {size: share_between(r.snapshots[-1][1], 0.5, 0.9) for size, r in on_ridge.items()}
    shares = ", ".join(f"{share:.1%} (F = {size})" for size, share in middling.items())
    study.say(f"True features whose best cosine ends between 0.5 and 0.9, on the ridge: {shares}.")
    moving = {
        f"F = {size}, L1 = {r.l1:g}": [distribution(f"step {step}", cosines) for step, cosines in r.snapshots]
        for size, r in on_ridge.items()
    }
    study.record(middling=middling, distributions=moving, cpu_seconds=sum(run.cpu_seconds for run in runs))
    draw(study, rows, moving)


def draw(study: Study, rows: list[dict[str, Any]], moving: dict[str, list[Distribution]]) -> None:
    canvas, axes = study.figure(rows=2, columns=3, figsize=(15, 8.5))
    for place, (column, title, limits) in enumerate((
        ("mmcs", "MMCS of the truth", (0.2, 1.0)),
        ("recovered", "true features found (cosine > 0.9)", (0.0, 1.0)),
        ("dead", "dead features", None),
        ("fvu", "fraction of variance unexplained", (0.0, 1.0)),
        ("l0", "latents a sample (L0)", (0.0, 30.0)),
        ("antipodal", "alive features with an antipode (< -0.9)", (0.0, 1.0)),
    )):  # fmt: skip
        heat(axes[place // 3][place % 3], rows, column, title, limits=limits)
    canvas.suptitle(
        f"Recovery of {study['n_features']} features in {study['d']} dimensions, {study['mean_active']:g} active ({study['preset']})"
    )
    study.save(canvas, "heatmaps")

    canvas, axes = study.figure(rows=1, columns=len(moving), figsize=(3.6 * len(moving), 4.5))
    for axis, (title, distributions) in zip(axes, moving.items()):
        ridgeline(axis, distributions, title)
    canvas.suptitle("Best cosines of the true features during training, at each size's best L1 (heights: roots of shares)")
    study.save(canvas, "histograms")
