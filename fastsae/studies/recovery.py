"""Which L1 and dictionary size take features out of superposition?

The experiment of Sharkey, Braun & Millidge 2022: sparse combinations of G = 2 D random features; ReLU dictionaries over L1 x size; MMCS of
the truth with what was learned. Published picture: a ridge of good L1 at each size, and dead features beyond the true size. New here: the
same with features where a toy model's encoder puts them (Elhage et al. 2022), antipodal pairs, and how the distribution of the best cosines
moves during training (are features half represented, or some fully and some not at all?). The L1 convention is that of
``fastsae.superposition.Training``.
"""

from __future__ import annotations

from typing import Any

from fastsae.studies import Study
from fastsae.studies._toy import (
    Distribution,
    antipodal,
    best,
    distribution,
    frame,
    heat,
    powers,
    ridgeline,
    share_between,
    sources,
    train,
    truth,
)  # fmt: skip
from fastsae.superposition import SuperpositionData

SIZES = {
    "smoke": {
        "minutes": 0.05, "preset": "hoagy_correlated", "n_features": 24, "d": 12, "mean_active": 2.0, "rate": 0.97,
        "truths": ["random", "toy model"], "toy_steps": 50, "sizes": [12, 48], "l1": [0.05, 0.2], "stop": 60, "max_steps": 60,
        "cooldown": 10, "snapshots": [0, 20, 60],
    },
    "default": {
        "minutes": 12, "preset": "hoagy_correlated", "n_features": 512, "d": 256, "mean_active": 5.0, "rate": 0.99,
        "truths": ["random", "toy model"], "toy_steps": 1000, "sizes": [256, 512, 1024], "l1": powers(-1.5, -0.25, 5),
        "stop": "converged", "max_steps": 4000, "cooldown": 1000, "snapshots": [0, 100, 250, 500, 1000, 2000],
    },
}  # fmt: skip


def run(study: Study) -> None:
    for kind in study["truths"]:
        of_truth(study, kind, sources(study, truth(study, kind, study["n_features"])))


def of_truth(study: Study, kind: str, data: SuperpositionData) -> None:
    options = {name: study[name] for name in ("stop", "max_steps", "cooldown", "snapshots", "l1")}
    runs = train(study, kind, data, n_features=study["sizes"], **options)
    rows = frame(runs)
    study.table(f"runs, {kind}", rows)

    top = best(rows)
    ridge = [best([row for row in rows if row["n_features"] == size]) for size in study["sizes"]]
    columns = ("n_features", "l1", "mmcs", "recovered", "dead", "antipodal", "l0", "fvu")
    study.table(f"ridge, {kind}", [{name: row[name] for name in columns} for row in ridge])
    on_ridge = {row["n_features"]: next(r for r in runs if (r.n_features, r.l1) == (row["n_features"], row["l1"])) for row in ridge}
    places, alive = [f"{row['l1']:g}" for row in ridge], [str(row["n_features"] - row["dead"]) for row in ridge]
    middling = {size: share_between(r.snapshots[-1][1], 0.5, 0.9) for size, r in on_ridge.items()}
    study.say(
        f"Truth {kind!r}, {data.n_features} features in {study['d']} dimensions, {antipodal(data.features):.0%} with an antipode: the best "
        f"of {len(rows)} dictionaries (L1 = {top['l1']:g}, F = {top['n_features']}, {top['dead']} dead) finds {top['recovered']:.1%} of "
        f"them (cosine above 0.9; MMCS {top['mmcs']:.3f})."
    )
    study.say(
        f"By size {', '.join(map(str, study['sizes']))} the best L1 is {', '.join(places)}; features alive there: {', '.join(alive)}; true "
        f"features half found, at a cosine of 0.5 to 0.9: {', '.join(f'{share:.1%}' for share in middling.values())}."
    )
    moving = {
        f"F = {size}, L1 = {r.l1:g}": [distribution(f"step {step}", cosines) for step, cosines in r.snapshots]
        for size, r in on_ridge.items()
    }
    study.record(**{kind: {"middling": middling, "distributions": moving, "cpu_seconds": sum(run.cpu_seconds for run in runs)}})
    draw(study, kind, rows, moving)


def draw(study: Study, kind: str, rows: list[dict[str, Any]], moving: dict[str, list[Distribution]]) -> None:
    suffix = "" if kind == "random" else f"_{kind.replace(' ', '_')}"
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
    canvas.suptitle(f"Recovery of {study['n_features']} features in {study['d']} dimensions, {study['mean_active']:g} active ({kind})")
    study.save(canvas, f"heatmaps{suffix}")

    canvas, axes = study.figure(rows=1, columns=len(moving), figsize=(3.6 * len(moving), 4.5))
    for axis, (title, distributions) in zip(axes, moving.items()):
        ridgeline(axis, distributions, title)
    canvas.suptitle("Best cosines of the true features during training, at each size's best L1 (heights: roots of shares)")
    study.save(canvas, f"histograms{suffix}")
