"""Where does toy data fall short of real activations?

A language model's residual stream and MLP activations by layer beside every generator preset: moments, quantiles, how sparse the neurons
are, how long the rows, how much one mean vector holds, how many dimensions the covariance fills, how alike two rows are. A generator's
assumption fails where its number lies outside what the layers span. Real rows include massive ones (Sun et al. 2024); the first token of a
window is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae.lm import harvest
from fastsae.studies import Study
from fastsae.studies._language import language
from fastsae.superposition import PRESETS, ActivationStatistics, SuperpositionData

SIZES = {
    "smoke": {
        "minutes": 0.05, "source": "random", "context": 16, "train_tokens": 512, "held_tokens": 64, "layers": [0, 1], "mlp": ".0:output",
        "rows": 256,
    },
    "default": {
        "minutes": 5, "source": "smollm2", "context": 128, "train_tokens": 16_384, "held_tokens": 1024, "layers": [0, 4, 9, 14, 19, 24, 29],
        "mlp": ".mlp.down_proj:input", "rows": 16_384,
    },
}  # fmt: skip
COLUMNS = {
    "skewness": "skewness", "kurtosis": "kurtosis", "near_zero": "entries near zero", "q99_over_q50": "heavy tails",
    "norm_spread": "spread of norms", "mean_share": "share of the mean vector", "dimensions": "dimensions filled",
    "cosine": "likeness of two rows", "neurons_kurtosis": "kurtosis of a neuron",
}  # fmt: skip


def run(study: Study) -> None:
    found = language(study)
    windows, _ = found.split(study["train_tokens"], study["held_tokens"], study["context"])
    hooks = {f"residual {n}": found.layer.format(n) for n in study["layers"]}
    hooks |= {f"mlp {n}": found.layer.format(n) + study["mlp"] for n in study["layers"]}
    folder = study.parts / "activations"
    shards = harvest(found.model, windows, [*hooks.values()], folder, ignore=found.special, dtype=torch.float32, progress=study.progress)
    rows = []
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for name, hook in study.track(hooks.items(), "layers"):
        x = shards.read(0, min(shards.rows, study["rows"]), [hook])[hook]
        rows.append({"source": name, **measured(x)})
        curves[name] = spread(x)
    real = len(rows)
    for name in study.track(PRESETS, "presets"):
        small: dict[str, Any] = {"n_features": 48, "d": 24} if study.size == "smoke" else {}
        x = SuperpositionData.preset(name, seed=study.seed, **small).sample(study["rows"]).x
        rows.append({"source": name, **measured(x)})
        curves[name] = spread(x)
    study.table("activations", rows)
    for kind in ("residual", "mlp"):
        own = [row for row in rows[:real] if row["source"].startswith(kind)]
        outside = {
            column: [row["source"] for row in rows[real:] if not min(r[column] for r in own) <= row[column] <= max(r[column] for r in own)]
            for column in COLUMNS
        }
        always = [column for column in COLUMNS if len(outside[column]) == len(PRESETS)]
        best = min(rows[real:], key=lambda row: sum(row["source"] in outside[column] for column in COLUMNS))
        misses = [words for column, words in COLUMNS.items() if best["source"] in outside[column]]
        study.say(
            f"{kind}: no generator comes into the layers' range in {', '.join(COLUMNS[column] for column in always) or 'nothing'}; nearest "
            f"is {best['source']}, which misses {len(misses)} of {len(COLUMNS)} ({', '.join(misses)})."
        )
    draw(study, rows[:real], rows[real:], curves)


def measured(x: Tensor) -> dict[str, float]:
    """Numbers that no unit of x changes.

    near_zero: share of entries within a hundredth of their root mean square. norm_spread: the 99th percentile of the rows' norms over their
    median. mean_share: of the mean squared length, the mean vector's. dimensions: (sum of eigenvalues)^2 / sum of squares of the covariance
    over D. cosine: mean |cosine| of pairs of rows. neurons_kurtosis: the median neuron's.
    """
    x = x.double()
    x = x / x.square().mean().sqrt()
    statistics = ActivationStatistics(x.shape[1], zero=0.01).update(x)
    overall = statistics.overall((0.5, 0.99))
    mean, norms = x.mean(0), x.norm(dim=1)
    covariance = (x - mean).T @ (x - mean) / len(x)
    half = len(x) // 2
    magnitudes = x.abs().flatten().sort().values
    return {
        "skewness": overall["skewness"],
        "kurtosis": overall["kurtosis"],
        "near_zero": overall["sparsity"],
        "q99_over_q50": float(magnitudes[int(0.99 * len(magnitudes))] / magnitudes[len(magnitudes) // 2].clamp_min(1e-12)),
        "norm_spread": float(norms.quantile(0.99) / norms.median().clamp_min(1e-12)),
        "mean_share": float(mean.square().sum() / x.square().sum(1).mean()),
        "dimensions": float(covariance.diagonal().sum() ** 2 / covariance.square().sum() / x.shape[1]),
        "cosine": float(torch.cosine_similarity(x[:half], x[half : 2 * half]).abs().mean()),
        "neurons_kurtosis": float(statistics.kurtosis().median()),
    }


def spread(x: Tensor) -> tuple[list[float], list[float]]:
    """Entries over their root mean square: edges and densities of a histogram."""
    values = (x / x.square().mean().sqrt()).float().flatten()
    found = torch.histogram(values, 160, range=(-8.0, 8.0), density=True)
    return found.bin_edges[:-1].tolist(), found.hist.clamp_min(1e-6).tolist()


def draw(study: Study, real: list[dict[str, Any]], toys: list[dict[str, Any]], curves: dict[str, tuple[list[float], list[float]]]) -> None:
    canvas, axes = study.figure(rows=1, columns=3, figsize=(16, 4.6))
    for axis, rows in ((axes[0], real), (axes[1], toys)):
        for row in rows:
            axis.plot(*curves[row["source"]], lw=1, label=row["source"], ls="--" if row["source"].startswith("mlp") else "-")
        axis.set(yscale="log", ylim=(1e-5, 20), xlabel="entry over the root mean square", ylabel="density")
        axis.set_title("Layers" if rows is real else "Generators")
        axis.legend(frameon=False, fontsize=6)
    for row in real:
        axes[2].scatter(row["dimensions"], row["mean_share"], color="C3" if row["source"].startswith("mlp") else "C0")
        axes[2].annotate(row["source"], (row["dimensions"], row["mean_share"]), fontsize=6)
    for row in toys:
        axes[2].scatter(row["dimensions"], row["mean_share"], marker="x", label=row["source"])
    axes[2].legend(frameon=False, fontsize=6)
    axes[2].set(xscale="log", xlabel="dimensions that the covariance fills (share of D)", ylabel="share of the mean vector")
    axes[2].set_title("Shape of the cloud (crosses: generators)")
    study.save(canvas, "activations")
