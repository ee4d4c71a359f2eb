"""Does a dictionary that points at the true features also give them their amounts?

MMCS compares directions alone: it does not see a latent that fires on other samples than the feature does, or too weakly, as L1 makes it.
The alternative leaves scale to the coefficients: what a feature puts into each sample (coefficient times direction) against what a latent
does, ``fastsae.compare.contribution_similarity``, a product of the cosine, the correlation of the coefficients and the agreement of their
size. Its mean over true features of the best latent stands beside MMCS (truth to dictionary), for ReLU dictionaries over L1 and for TopK:
do the two choose the same dictionary, and where do they disagree?
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastsae import SAE, ReLU, SAEs, TopK
from fastsae.compare import contribution_similarity, match
from fastsae.optim import Adam, warmup_linear_decay
from fastsae.studies import Study
from fastsae.studies._toy import best, powers, sources

SIZES = {
    "smoke": {
        "minutes": 0.05, "preset": "hoagy_correlated", "n_features": 24, "d": 12, "mean_active": 2.0, "rate": 0.97, "sizes": [24, 48],
        "l1": [0.05, 0.2], "k": [2], "steps": 60, "rows": 512,
    },
    "default": {
        "minutes": 25, "preset": "hoagy_correlated", "n_features": 256, "d": 128, "mean_active": 5.0, "rate": 0.98, "sizes": [256, 1024],
        "l1": powers(-2, 0, 7), "k": [3, 5, 10], "steps": 1500, "rows": 8192,
    },
}  # fmt: skip


def run(study: Study) -> None:
    kinds: list[dict[str, dict[str, Any]]] = [
        {f"L1 {l1:g}": {"activation": ReLU(), "l1": l1} for l1 in study["l1"]},
        {f"TopK {k}": {"activation": TopK(k)} for k in study["k"]},
    ]
    rows, points = list[dict[str, Any]](), dict[str, tuple[Tensor, Tensor]]()
    for size, several in study.track([(size, several) for size in study["sizes"] for several in kinds], "dictionaries"):
        for name, (row, point) in zip(several, trained(study, size, list(several.values()))):
            points[label := f"{name}, F = {size}"] = point
            rows.append({"dictionary": label, **row})
    study.table("dictionaries", rows)
    ranks = torch.tensor([[row["mmcs"], row["amounts"]] for row in rows], dtype=torch.float64, device="cpu").T.argsort(1).argsort(1)
    agreement = float(torch.corrcoef(ranks.double())[0, 1])
    chosen, other = best(rows), best(rows, "amounts")
    apart = max(rows, key=lambda row: row["mmcs"] - row["amounts"])
    study.record(rank_correlation=agreement)
    study.say(
        f"MMCS chooses {chosen['dictionary']} (MMCS {chosen['mmcs']:.3f}, amounts {chosen['amounts']:.3f}), amounts choose "
        f"{other['dictionary']} ({other['mmcs']:.3f}, {other['amounts']:.3f}); over {len(rows)} dictionaries their ranks correlate at "
        f"{agreement:.2f}."
    )
    study.say(
        f"They are furthest apart for {apart['dictionary']}: MMCS {apart['mmcs']:.3f}, amounts {apart['amounts']:.3f}; the latent that "
        f"points best puts in {apart['length']:.2f} times a feature's length (median), and coefficients correlate at "
        f"{apart['correlation']:.2f}."
    )
    canvas, axes = study.figure(rows=1, columns=2, figsize=(13, 5))
    for column in ("mmcs", "amounts", "correlation", "length"):
        axes[0].plot([row["dictionary"] for row in rows], [row[column] for row in rows], "o", ms=4, label=column)
    axes[0].set(ylim=(0, 2), ylabel="over true features", title="MMCS, amounts and what they differ by")
    axes[0].tick_params(axis="x", rotation=90, labelsize=7)
    for label in dict.fromkeys(row["dictionary"] for row in (chosen, other, apart)):
        axes[1].plot(*points[label], ".", ms=4, alpha=0.6, label=label)
    axes[1].plot([0, 1], [0, 1], color="0.6", lw=1)
    axes[1].set(xlabel="best cosine of a true feature", ylabel="best similarity of contributions", title="Every true feature")
    study.save(canvas, "coefficients")


def trained(study: Study, size: int, kinds: list[dict[str, Any]]) -> Iterator[tuple[dict[str, float], tuple[Tensor, Tensor]]]:
    """Of each dictionary (row of the table, (best cosine, best similarity of contributions) of each true feature)."""
    data, steps = sources(study), study["steps"]
    x = data.sample(4096).x
    saes = SAEs(SAE(study["d"], size, seed=study.seed, **options).init_from(x) for options in kinds)
    opt = Adam(saes, lr=3e-3, schedule=warmup_linear_decay(steps // 20, steps // 2, steps))
    for _, x in zip(range(steps), data.batches(256)):
        opt.step(x)
    x, coefficients, features = data.sample(study["rows"])
    for sae in saes:
        with torch.no_grad():
            latents: Any = sae.encode(x)
            shared = contribution_similarity(coefficients, features, latents, sae.W_dec).amax(1)
            cosine, partner = (found[:, 0] for found in match(features, sae.W_dec).a_to_b)
            c, z = coefficients.to_dense() * features.norm(dim=1), (latents.to_dense() * sae.W_dec.norm(dim=1))[:, partner]
            row = {
                "mmcs": cosine.mean(), "amounts": shared.mean(), "correlation": torch.cosine_similarity(c, z, dim=0).mean(),
                "length": (z.norm(dim=0) / c.norm(dim=0).clamp_min(1e-12)).median(), "fvu": sae.loss(x).fvu,
            }  # fmt: skip
        yield {name: float(value) for name, value in row.items()}, (cosine, shared)
