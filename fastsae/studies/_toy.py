"""What the studies of superposition share: their data, processes, and drawings."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastsae
from fastsae.studies._frame import Study
from fastsae.superposition import Run, SuperpositionData, toy_model_features, train_many


def powers(first: float, last: float, count: int) -> list[float]:
    """``count`` numbers from 10^first to 10^last, evenly spaced in their logarithms."""
    return [round(10 ** (first + (last - first) * i / max(count - 1, 1)), 4) for i in range(count)]


def train(study: Study, label: str, data: SuperpositionData | Tensor, **options: Any) -> list[Run]:
    """``train_many`` in as many processes as there are cores (in this one for the smallest size); a resumed run has those of before."""
    options.setdefault("seeds", [study.seed])
    workers = 1 if study.size == "smoke" else os.cpu_count() or 1
    known = [Run(**run) for run in study.kept(label)]

    def keep(run: Run) -> None:
        study.part(label, f"{run.n_features} {run.l1} {run.seed}", lambda: vars(run))

    return train_many(data, **options, workers=workers, callback=keep, known=known, progress=study.progress)


def sources(study: Study, features: Tensor | None = None) -> SuperpositionData:
    """The data of a study's preset, with these features ``[G, D]``; None: random ones."""
    changes = {name: study[name] for name in ("n_features", "d", "mean_active", "rate")}
    if features is not None:
        changes |= {"features": features, "n_features": len(features)}
    return SuperpositionData.preset(study["preset"], **changes, seed=1000 + study.seed)


def truth(study: Study, kind: str, n_features: int) -> Tensor | None:
    """Unit features ``[G, D]``; None for "random". "toy model": where an encoder in superposition puts them, without those it gave up."""
    if kind == "random":
        return None
    density = min(1.0, study["mean_active"] / n_features)
    made = toy_model_features(n_features, study["d"], density=density, steps=study["toy_steps"], seed=study.seed).features
    norms = made.norm(dim=1, keepdim=True)
    return (made / norms)[norms[:, 0] > 0.5]


def antipodal(dictionary: Tensor, alive: Tensor | None = None, below: float = -0.9) -> float:
    """Share of (alive) features with another one at a cosine below -0.9."""
    if alive is not None and not bool(alive.any()):
        return float("nan")
    mask = None if alive is None else (alive, alive)
    return float((fastsae.match(dictionary, dictionary, alive=mask).most_negative.similarity < below).double().mean())


def frame(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Rows of a table: those of ``sweep``, with the share of alive features that have an antipode."""
    return [{**run.row(), "antipodal": antipodal(run.dictionary, ~run.dead)} for run in runs]


def best(rows: Sequence[dict[str, Any]], column: str = "mmcs") -> dict[str, Any]:
    return max(rows, key=lambda row: row[column])


def share_between(values: Tensor, low: float, high: float) -> float:
    return float(((values > low) & (values < high)).double().mean())


def heat(axes: Any, rows: Sequence[dict[str, Any]], column: str, title: str, *, limits: tuple[float, float] | None = None) -> None:
    """A heat map over dictionary size (right) and l1 (up) with the numbers in it."""
    sizes, weights = (sorted({row[name] for row in rows}) for name in ("n_features", "l1"))
    grid = torch.full((len(weights), len(sizes)), float("nan"), dtype=torch.float64, device="cpu")
    for row in rows:
        grid[weights.index(row["l1"]), sizes.index(row["n_features"])] = row[column]
    low, high = limits or (float(grid.nan_to_num(torch.inf).min()), float(grid.nan_to_num(-torch.inf).max()))
    axes.imshow(grid.numpy(), origin="lower", aspect="auto", vmin=low, vmax=high, cmap="viridis")
    for i, j in torch.cartesian_prod(torch.arange(len(weights), device="cpu"), torch.arange(len(sizes), device="cpu")).tolist():
        value = float(grid[i, j])
        if not math.isfinite(value):  # no feature alive
            continue
        dark = value <= low + 0.6 * (high - low)
        text = f"{value:.0f}" if value == round(value) or abs(value) >= 10 else f"{value:.2f}"
        axes.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_xticks(range(len(sizes)), list(map(str, sizes)), fontsize=8)
    axes.set_yticks(range(len(weights)), [f"{weight:.3g}" for weight in weights], fontsize=8)
    axes.set(title=title, xlabel="dictionary size F", ylabel="L1")


BINS = 40


class Distribution(NamedTuple):
    """Best cosines of the true features at one moment: counts over ``BINS`` equal bins of 0 .. 1, and their mean."""

    label: str
    mean: float
    counts: list[int]


def distribution(label: str, cosines: Tensor) -> Distribution:
    counts = torch.histogram(cosines.float().clamp(0, 1), torch.linspace(0, 1, BINS + 1, device="cpu", dtype=torch.float32)).hist
    return Distribution(label, float(cosines.double().mean()), counts.long().tolist())


def ridgeline(axes: Any, distributions: Sequence[Distribution], title: str) -> None:
    """Distributions one above the other, the first at the top; heights are roots of shares."""
    edges = torch.linspace(0, 1, BINS + 1, device="cpu", dtype=torch.float32).numpy()
    for place, ((_, mean, counts), colour) in enumerate(zip(distributions, colours(len(distributions)))):
        heights = (torch.tensor(counts, dtype=torch.float32, device="cpu") / max(sum(counts), 1)).sqrt().numpy()
        axes.stairs(heights - place, edges, baseline=-place, fill=True, color=colour, alpha=0.85)
        axes.text(0.62, 0.45 - place, f"mean {mean:.2f}", fontsize=7)
    axes.set_yticks([-place for place in range(len(distributions))], [label for label, _, _ in distributions], fontsize=8)
    axes.set(title=title, xlabel="best cosine of a true feature", xlim=(0, 1.01), ylim=(0.9 - len(distributions), 1.05))


def colours(count: int) -> list[Any]:
    """``count`` colours that show an order."""
    from matplotlib import colormaps

    return [colormaps["viridis"](place / max(count, 1)) for place in range(count)]
