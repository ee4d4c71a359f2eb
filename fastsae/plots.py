"""Plots of what the library measures; matplotlib is imported on use (extra ``plot``)."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsae._core import files
from fastsae._core.extras import needed


def figure(**options: Any) -> Any:
    """``matplotlib`` figure and axes that need no display; a clear error where matplotlib is missing."""
    rows, columns = options.pop("rows", 1), options.pop("columns", 1)
    result = needed("matplotlib.figure", "plots need matplotlib", "plot").Figure(layout="constrained", **options)
    return result, result.subplots(rows, columns)


def histogram_of_matches(counts: Mapping[str, Tensor], means: Mapping[str, float], path: str | os.PathLike[str]) -> None:
    """Best cosine similarities in both directions and of random vectors: the counts of ``Match.histogram``, the means of ``Match.mmcs``."""
    canvas, axes = figure(figsize=(7, 4))
    edges = counts["edges"].numpy()
    labels = {"null": ("random vectors", "0.5"), "a_to_b": ("a → b", "C0"), "b_to_a": ("b → a", "C1")}
    for name, (label, colour) in labels.items():
        share = counts[name].double() / max(int(counts[name].sum()), 1)
        mean = "" if name == "null" else f", mean {means[name]:.3f}"
        axes.stairs(
            share.numpy(), edges, label=label + mean, fill=name == "null", alpha=0.35 if name == "null" else 1, color=colour, lw=1.5
        )
    low = min(float(edges[int(counts[name].nonzero().min())]) for name in labels if bool(counts[name].any()))
    axes.set(xlabel="best cosine similarity", ylabel="share of features", xlim=(max(-1, low - 0.05), 1.02))
    axes.set_title(f"MMCS {sum(means.values()) / 2:.3f}")
    finish(canvas, path)


def finish(canvas: Any, path: str | os.PathLike[str]) -> None:
    """Writes a figure: a legend where something has a label, no frames, plain numbers (200, not 2 × 10²) on logarithmic axes of a few
    decades, but for ticks that were chosen."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axes in canvas.axes:
        if axes.get_legend() is None and axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            if isinstance(axis.get_major_locator(), LogLocator) and high / low < 1e4:
                axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.set_minor_formatter(NullFormatter())
    files.replace_figure(path, canvas, dpi=150)


def relative_norms(shares: Tensor, path: str | os.PathLike[str], labels: Sequence[str] = (), bins: int = 50) -> None:
    """How a crosscoder's features share their decoder norms: ``shares [F, L]`` of ``compare.relative_norms``, a curve a layer (of two
    models the second's alone: the first's is its mirror image); ``labels``: the layers' names."""
    canvas, axes = figure(figsize=(7, 4))
    n = shares.shape[1]
    for layer in range(n == 2, n):
        counts, edges = torch.histogram(shares[:, layer].float().cpu(), bins, range=(0.0, 1.0))
        axes.stairs(
            counts.numpy(), edges.numpy(), fill=n == 2, alpha=0.6 if n == 2 else 1, label=labels[layer] if labels else f"layer {layer}"
        )
    axes.axvline(1 / n, color="0.5", lw=1, ls=":")
    axes.set(xlabel="share of the feature's decoder norms", ylabel="features", title="Relative decoder norms", xlim=(0, 1))
    finish(canvas, path)


def training_curves(curves: Mapping[str, Sequence[Mapping[str, float]]], path: str | os.PathLike[str]) -> None:
    """Fraction of variance unexplained over steps: of the batches as lines, of held-out data (where a step has it) as points.

    Args:
        curves: by label, a sequence of ``{"step": .., "fvu": .., "held_out_fvu": ..}``, the last optional.
    """
    canvas, axes = figure(figsize=(7, 4))
    for (label, curve), marker in zip(curves.items(), itertools.cycle("o+x^sv")):
        (line,) = axes.plot([p["step"] for p in curve], [p["fvu"] for p in curve], lw=1, alpha=0.6, label=f"{label}, batches")
        held = [(p["step"], p["held_out_fvu"]) for p in curve if "held_out_fvu" in p]
        if held:
            axes.plot(*zip(*held), marker, ms=6, color=line.get_color(), label=f"{label}, held out: {held[-1][1]:.3f} at the end")
    axes.set(xlabel="step", ylabel="fraction of variance unexplained", title="Training", yscale="log")
    axes.grid(alpha=0.25)
    finish(canvas, path)


def feature_density(fired: Mapping[str, Tensor], samples: int, path: str | os.PathLike[str], bins: int = 50) -> None:
    """How often features fire, as log10 of the share of samples; features that never fire stand in the legend.

    Args:
        fired: by label, the number of samples ``[F]`` on which each feature fired. samples: the number of samples seen.
    """
    canvas, axes = figure(figsize=(7, 4))
    edges = torch.linspace(-math.log10(max(samples, 2)), 0, bins + 1, device="cpu", dtype=torch.float32)
    for label, count in fired.items():
        alive = count[count > 0].float().cpu()
        heights = torch.histogram((alive / samples).log10().clamp(float(edges[0]), 0), edges).hist
        dead = f"{count.shape[0] - alive.shape[0]} of {count.shape[0]} features never fire"
        axes.stairs(heights.numpy(), edges.numpy(), label=f"{label}: {dead}", lw=1.5)
    axes.set(xlabel=f"log10 of the share of the {samples} tokens on which a feature fires", ylabel="features", title="Feature density")
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    finish(canvas, path)


def values_of_feature(edges: Tensor, counts: Tensor, feature: int, path: str | os.PathLike[str]) -> None:
    """How strongly a feature fires where it does: ``counts [bins]`` of its values between ``edges [bins + 1]``."""
    canvas, axes = figure(figsize=(7, 4))
    axes.stairs(counts.numpy(), edges.numpy(), fill=True, alpha=0.6)
    axes.set(xlabel="value", ylabel="tokens", title=f"Feature {feature}: {int(counts.sum())} tokens")
    finish(canvas, path)


def code_distances(same: Tensor, different: Tensor, kind: str, path: str | os.PathLike[str]) -> None:
    """Distributions of Hamming distances of pairs of the same and of different kind.

    Args:
        same, different: numbers of pairs at each distance ``[H + 1]``. kind: what a pair has in common, in one word.
    """
    canvas, axes = figure(figsize=(7, 4))
    last = max(int(counts.nonzero().max()) for counts in (same, different) if bool(counts.any())) + 1
    step = max(1, last // 70)
    for counts, label, colour in ((different, f"different {kind}", "0.55"), (same, f"same {kind}", "C0")):
        total = max(int(counts.sum()), 1)
        share = torch.nn.functional.pad(counts, (0, -counts.shape[0] % step)).view(-1, step).sum(1).double() / total
        mean = float((counts * torch.arange(counts.shape[0], device="cpu")).sum()) / total
        edges = torch.arange(share.shape[0] + 1, device="cpu") * step
        told = f"{label}: {total:,} pairs, mean {mean:.0f} bits"
        axes.stairs(share.numpy(), edges.numpy(), fill=True, alpha=0.45, color=colour, label=told)
        axes.stairs(share.numpy(), edges.numpy(), color=colour)
    axes.set(xlabel=f"Hamming distance of the spline codes (of {same.shape[0] - 1} neurons)", ylabel=f"share of pairs per {step} bits")
    axes.set(xlim=(0, last * 1.03), title=f"Distances of spline codes by {kind}", ylim=(0, 1.3 * axes.get_ylim()[1]))
    axes.legend(frameon=False, loc="upper left")
    finish(canvas, path)


def bars(axes: Any, values: Sequence[float], labels: Sequence[str], texts: Sequence[str], colours: Sequence[str]) -> None:
    """Times faster from above to below on a logarithmic axis; the right end of the axis is for the texts."""
    axes.barh(range(len(values)), [value - 1 for value in values], left=1, color=colours, height=0.7)
    axes.axvline(1, color="0.2", linewidth=1)
    for place, (value, text) in enumerate(zip(values, texts)):
        axes.text(1.04 * max(value, 1), place, text, va="center", fontsize=8)
    low, high = min(0.7, 0.8 * min(values)), max(1.6, *values)
    axes.set(xscale="log", xlim=(low, high * (high / low) ** 0.9), ylim=(len(values) - 0.4, -0.6))
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(values)), labels, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def speed_ratios(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Speed of each operation as a ratio to the best plain version.

    Args:
        rows: ``{"operation", "shape", "backend", "ratio", "best_plain"}`` each, as in ``demo.json``.
    """
    canvas, axes = figure(figsize=(8.5, 0.55 * len(rows) + 1.3))
    labels = [f"{row['operation']}\n{row['shape']}" for row in rows]
    texts = [f"{row['ratio']:.2f}× ({row['backend']} against {row['best_plain']})" for row in rows]
    colours = ["0.7" if row["backend"] == "reference" else "C0" for row in rows]
    bars(axes, [row["ratio"] for row in rows], labels, texts, colours)
    axes.set(xlabel="speed relative to the best plain torch or numpy version", title="Grey: fastsae runs its PyTorch reference here")
    finish(canvas, path)
