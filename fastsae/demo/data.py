"""The demo's data: a model's activations or synthetic superposition, what is kept of them, and how they are distributed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsae._core import files
from fastsae.demo import activations_minilm
from fastsae.demo.settings import Settings
from fastsae.formats import weight_files
from fastsae.superposition import ActivationStatistics, SuperpositionData

Data = dict[str, Tensor]
"""``activations_minilm.extract``; of synthetic data ``truth``, the true features, too."""


def synthetic(rows: int, width: int, seed: int = 0) -> Data:
    """Sparse combinations of ``2 * width`` random unit features, 5 active on average, probability decaying by 0.99 a feature, coefficients
    U[0, 1] (after Sharkey, Braun & Millidge 2022; uncorrelated); the layer whose codes are taken is a random ReLU layer."""
    source = SuperpositionData(2 * width, width, mean_active=5, rate=0.99, seed=seed)
    x: list[Tensor] = []
    strongest: list[Tensor] = []
    for start in range(0, rows, 4096):
        part, latents, _ = source.sample(min(4096, rows - start))
        largest = latents.to_dense().max(1)
        x.append(part)
        strongest.append(torch.where(largest.values > 0, largest.indices, -1))
    samples, kind = torch.cat(x), torch.cat(strongest)
    generator = torch.Generator().manual_seed(seed)
    W, b = torch.randn(6 * width, width, generator=generator) / width**0.5, torch.full((6 * width,), -0.1)
    return {
        "x": samples,
        "layer_in": samples,
        "pre": F.linear(samples, W, b).half(),
        "W": W,
        "b": b,
        "kind": kind,
        "word": kind >= 0,
        "held": torch.arange(rows) % 10 == 9,
        "truth": source.features,
    }


def load(settings: Settings, path: Path, *, fresh: bool = False) -> Data:
    """From the file where it was made with these settings, else made and written to it."""
    if path.exists() and not fresh:
        data, about = weight_files.read(path)
        if about is not None and about["config"] == {"key": settings.data_key()}:
            print(f"activations: from {path}")
            return data
    if settings.synthetic:
        data = synthetic(settings.tokens, settings.width)
    else:
        data = activations_minilm.extract(settings.tokens, settings.layer)
    data = {name: tensor.contiguous().clone() for name, tensor in data.items()}
    about = {"format": "fastsae", "config": {"key": settings.data_key()}}
    files.replace(path, lambda part: weight_files.save_safetensors(part, data, about))
    return data


def statistics(data: Data, rows: int = 8192) -> dict[str, float]:
    """Of at most ``rows`` rows, evenly spaced: what the assumptions of toy data can be held against."""
    pick = torch.linspace(0, data["x"].shape[0] - 1, min(rows, data["x"].shape[0])).long()
    x, z = data["x"][pick], data["pre"][pick].float()
    of_x, of_z, of_hidden = (
        ActivationStatistics(values.shape[1], sub_bins=1).update(values) for values in (x, z, F.relu(z) if "truth" in data else F.gelu(z))
    )
    variance, active = of_x.variance(), of_z.positive()
    spectrum = torch.linalg.eigvalsh(torch.cov(x.T.double())).clamp_min(0)
    return {
        "rows": pick.shape[0],
        "x_mean_norm": float(x.norm(dim=1).mean()),
        "x_norm_of_mean": float(of_x.mean().norm()),
        "x_excess_kurtosis_median": _median_kurtosis(of_x),
        "x_largest_coordinate_share_of_variance": float(variance.max() / variance.sum()),
        "x_effective_dimensions": float(spectrum.sum() ** 2 / spectrum.square().sum()),
        "mlp_fraction_positive": float(active.mean()),
        "mlp_neurons_below_1_percent": int((active < 0.01).sum()),
        "mlp_neurons_above_half": int((active > 0.5).sum()),
        "mlp_hidden_excess_kurtosis_median": _median_kurtosis(of_hidden),
    }


def _median_kurtosis(seen: ActivationStatistics) -> float:
    """Over columns that vary (0: normal; Laplace: 3)."""
    return float(seen.kurtosis()[seen.variance() > 0].median())
