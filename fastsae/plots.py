"""Plots of what the library measures; matplotlib is imported on use (extra ``plot``)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsae.ops.match import Match


def figure(**options: Any) -> Any:
    """``matplotlib`` figure and axes that need no display; a clear error where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'fastsae-kernels[plot]'") from error
    rows, columns = options.pop("rows", 1), options.pop("columns", 1)
    result = Figure(layout="constrained", **options)
    FigureCanvasAgg(result)
    return result, result.subplots(rows, columns)


def histogram_of_matches(match: Match, path: str | os.PathLike[str], bins: int = 60) -> None:
    """Best cosine similarities in both directions, with as many random vectors matched against as many others."""
    counts = match.histogram(bins)
    canvas, axes = figure(figsize=(7, 4))
    edges = counts["edges"].numpy()
    labels = {"a_to_b": "a → b", "b_to_a": "b → a", "null": "random vectors"}
    for name, label in labels.items():
        share = counts[name].double() / max(int(counts[name].sum()), 1)
        axes.stairs(share.numpy(), edges, label=label, fill=name == "null", alpha=0.35 if name == "null" else 1, color="0.5" if name == "null" else None)
    low = min(float(edges[int(counts[name].nonzero().min())]) for name in labels if bool(counts[name].any()))
    axes.set(xlabel="best cosine similarity", ylabel="share of features", xlim=(max(-1, low - 0.05), 1.02), title=f"MMCS {match.mmcs('mean'):.3f}")
    axes.legend(frameon=False)
    canvas.savefig(path, dpi=150)
