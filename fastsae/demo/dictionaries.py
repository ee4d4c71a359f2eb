"""The demo's dictionaries: training, what they explain, and the tokens that drive a feature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastsae
from fastsae import SAE, TopK, Trainer
from fastsae._core import files
from fastsae.demo import activations_minilm
from fastsae.demo.data import Data
from fastsae.demo.settings import Settings
from fastsae.optim import Adam, warmup_linear_decay
from fastsae.trainer import Batches

Curve = list[dict[str, float]]
"""Points ``step, fvu, held_out_fvu``, the last in some."""


@torch.no_grad()
def _fvu(sae: SAE, x: Tensor) -> float:
    error = sum(float(sae(part).squared_error.sum()) for part in x.split(4096))
    return error / float((x - x.mean(0)).square().sum())


def train(x: Tensor, held: Tensor, settings: Settings, seed: int) -> tuple[SAE, Curve]:
    """A TopK SAE in the units of ``x`` and its curve.

    Inputs are scaled to a mean square of 1 while it trains, ``b_dec`` starts at the mean; Adam in one pass with a linear warm-up of 5 % and
    a linear decay over the last half; decoder rows stay of norm 1, the gradient along them removed.
    """
    steps = settings.steps
    sae = SAE(x.shape[1], settings.features, TopK(settings.k), seed=seed).init_from(x, norm="rms")
    opt = Adam(sae, lr=settings.lr, betas=(0.9, 0.99), schedule=warmup_linear_decay(max(1, steps // 20), steps // 2, steps))
    curve: Curve = []
    every = max(1, steps // 100)

    def keep(step: int, metrics: dict[str, float]) -> None:
        curve.append({"step": step, "fvu": metrics["fvu"]})
        if step % (10 * every) == 0 or step == steps:
            curve[-1]["held_out_fvu"] = _fvu(sae, held)

    print(f"dictionary, seed {seed}: {steps} steps")
    Trainer(sae, opt, callback=keep, log_every=every).fit(Batches(x, size=settings.batch, seed=seed), steps)
    return sae.fold_(), curve


def load(settings: Settings, seed: int, data: Data, folder: Path, *, fresh: bool = False) -> tuple[SAE, Curve]:
    """From the folder where it was trained with these settings, else trained and written there."""
    record = folder / "training.json"
    key = f"{settings.key()} seed {seed}"
    if record.exists() and not fresh:
        known = json.loads(record.read_text())
        if known["key"] == key:
            print(f"dictionary, seed {seed}: from {folder}")
            return SAE.load(folder), known["curve"]
    record.unlink(missing_ok=True)
    sae, curve = train(data["x"][~data["held"]], data["x"][data["held"]], settings, seed)
    sae.save(folder)
    files.replace_text(record, json.dumps({"key": key, "curve": curve}))
    return sae, curve


@torch.no_grad()
def evaluate(sae: SAE, data: Data) -> tuple[dict[str, float], Tensor]:
    """(results, how often each feature fired on the training tokens)."""
    x, held = data["x"][~data["held"]], data["x"][data["held"]]
    fired = torch.zeros(sae.d_sae, dtype=torch.int64)
    for part in x.split(4096):
        latents: Any = sae.encode(part)
        fired += torch.bincount(latents.indices[latents.values > 0], minlength=sae.d_sae)
    result = {
        "fvu_held_out": _fvu(sae, held),
        "fvu_training": _fvu(sae, x),
        "l0": float(fired.sum() / x.shape[0]),
        "dead_features": int((fired == 0).sum()),
        "held_out_tokens": held.shape[0],
        "training_tokens": x.shape[0],
    }
    if "truth" in data:
        result["mmcs_truth_to_dictionary"] = fastsae.mmcs(data["truth"], sae.W_dec, "a_to_b")
        result["mmcs_dictionary_to_truth_alive"] = fastsae.mmcs(data["truth"], sae.W_dec, "b_to_a", alive=(None, fired > 0))
    return result, fired


@torch.no_grad()
def examples(sae: SAE, data: Data, best: Tensor, count: int = 6) -> list[dict[str, Any]]:
    """Tokens that drive the features that both seeds found, the best matched first, one feature a commonest token."""
    vocabulary = activations_minilm.words()
    x, kind = data["x"][::3], data["kind"][::3]
    latents: list[Any] = [sae.encode(part) for part in x.split(4096)]
    values, indices = torch.cat([part.values for part in latents]), torch.cat([part.indices for part in latents])
    found: dict[str, dict[str, Any]] = {}
    for feature in best.tolist():
        strength = torch.where(indices == feature, values, 0).amax(1)
        rows = strength.topk(12)
        tokens = [vocabulary[t] for t in kind[rows.indices[rows.values > 0]].tolist()]
        if len(tokens) == 12 and len(set(tokens)) > 2:
            top = max(set(tokens), key=tokens.count)
            found.setdefault(top, {"feature": feature, "tokens": sorted(set(tokens), key=tokens.index)[:8]})
        if len(found) == count:
            break
    return list(found.values())
