"""How much of a language model do its dictionaries keep, and what do their features say?

SmolLM2-135M over Python's documentation, without a network: residual activations of two layers into shards, TopK and BatchTopK dictionaries
trained from them, each judged on windows that it was not trained on (variance, cross-entropy and divergence of the model with the
reconstruction in the layer's place), ten features named by their top examples, and what the model loses where each of them is ablated.
Literature: Gao et al. 2024 (TopK, loss recovered), Bussmann et al. 2024 (BatchTopK). The dictionaries are small and see little text: the
page shows the path from a model to a judged dictionary, not the best dictionary.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from fastsae import SAE, BatchTopK, TopK, Trainer
from fastsae.lm import Edit, evaluate, harvest, splice
from fastsae.optim import Adam, warmup_linear_decay
from fastsae.store import ActivationShards, LatentStore, LatentWriter
from fastsae.studies import Study
from fastsae.studies._language import Language, language

SIZES = {
    "smoke": {
        "minutes": 0.05, "source": "random", "context": 16, "train_tokens": 1_024, "held_tokens": 128, "layers": [0, 1], "features": 64,
        "k": {"TopK": [2, 4], "BatchTopK": [4]}, "batch": 128, "steps": 10, "lr": 1e-2, "named": 3, "latent_tokens": 512,
    },
    "quick": {
        "minutes": 12, "source": "smollm2", "context": 128, "train_tokens": 100_000, "held_tokens": 4_096, "layers": [6, 12],
        "features": 4096, "k": {"TopK": [32], "BatchTopK": [32]}, "batch": 2048, "steps": 200, "lr": 1e-3, "named": 10,
        "latent_tokens": 50_000,
    },
    "default": {
        "minutes": 60, "source": "smollm2", "context": 128, "train_tokens": 500_000, "held_tokens": 8_192, "layers": [6, 12],
        "features": 16_384, "k": {"TopK": [16, 64], "BatchTopK": [32]}, "batch": 2048, "steps": 400, "lr": 1e-3, "named": 10,
        "latent_tokens": 500_000,
    },
}  # fmt: skip


def run(study: Study) -> None:
    found = language(study)
    windows, held = found.split(study["train_tokens"], study["held_tokens"], study["context"])
    hooks = [found.layer.format(number) for number in study["layers"]]
    folder = study.out / "activations"
    shards = harvest(found.model, windows, hooks, folder, ignore=[found.bos], dtype=torch.bfloat16, progress=study.progress)
    study.record(tokens=shards.rows, held_out=held.numel(), hooks=hooks)
    rows: list[dict[str, Any]] = []
    densities: dict[str, Tensor] = {}
    saes: dict[tuple[str, str, int], SAE] = {}
    for hook in hooks:
        for name, several in study["k"].items():
            for k in several:
                sae = saes[hook, name, k] = train(study, shards, hook, name, k)
                judged = evaluate(sae, found.model, held, hook, ignore=[found.bos], batch=8, progress=study.progress)
                alive = int((~sae.dead_features).sum())
                rows.append({"layer": hook, "kind": name, "k": k, "alive": alive, **judged.values})
                rows[-1] |= {f"{value}_error": judged.errors[value] for value in ("ce_recovered", "fvu", "ce_spliced")}
                densities[f"{hook} {name} {k}"] = judged.density
    columns = ["layer", "kind", "k", "l0", "fvu", "ce_clean", "ce_spliced", "ce_zero", "ce_recovered", "ce_recovered_error", "kl_spliced"]
    study.table("dictionaries", [{name: row[name] for name in (*columns, "alive", "dead", "dense")} for row in rows])
    for hook in hooks:
        best = max((row for row in rows if row["layer"] == hook), key=lambda row: row["ce_recovered"])
        study.say(
            f"{hook}: {best['kind']} with {best['l0']:.0f} latents a token keeps {1 - best['fvu']:.1%} of the variance and "
            f"{best['ce_recovered']:.1%} of the loss (± {best['ce_recovered_error']:.1%}): {best['ce_clean']:.3f} nats a token clean, "
            f"{best['ce_spliced']:.3f} with the reconstruction, {best['ce_zero']:.2f} with zeros."
        )
    named = name_features(study, found, shards, hooks[-1], saes[hooks[-1], "TopK", study["k"]["TopK"][-1]], windows)
    study.table("features", named)
    if named:
        strongest = max(named, key=lambda row: row["nats_there"])
        study.say(
            f"Without one feature, where it fires, the next token's distribution moves by {min(row['nats_there'] for row in named):.4f} to "
            f"{strongest['nats_there']:.3f} nats (KL), most for feature {strongest['feature']} ({strongest['peaks']})."
        )
    study.record(evaluations=rows)
    draw(study, rows, densities)
    shutil.rmtree(folder)


def train(study: Study, shards: ActivationShards, hook: str, name: str, k: int) -> SAE:
    """One dictionary of a layer, from its shards."""
    steps, d = study["steps"], shards.columns[hook][1][0]
    kind: Any = {"TopK": TopK, "BatchTopK": BatchTopK}[name](k)
    batches = shards.batches(study["batch"], hook, seed=study.seed, dtype=torch.float32)
    first = shards.read(0, min(shards.rows, 16_384), [hook])[hook].float()
    sae = SAE(d, study["features"], kind, dead_after=study["batch"] * max(1, steps // 4), seed=study.seed).init_from(first, norm="rms")
    opt = Adam(sae, lr=study["lr"], betas=(0.9, 0.99), schedule=warmup_linear_decay(max(1, steps // 20), steps // 2, steps))
    Trainer(sae, opt, progress=study.progress).fit(batches, steps)
    return sae.fold_().eval()


@torch.no_grad()
def name_features(study: Study, found: Language, shards: ActivationShards, hook: str, sae: SAE, windows: Tensor) -> list[dict[str, Any]]:
    """Features at even steps of density, each with the tokens on which it is largest and what ablating it does there."""
    folder = study.out / "latents"
    shutil.rmtree(folder, ignore_errors=True)
    context = windows.shape[1] - 1  # BOS is not in the shards
    with LatentWriter(folder, sae.d_sae, context) as writer:
        count = min(len(windows), study["latent_tokens"] // context)
        for first in study.track(range(0, count, 32), "latents"):
            last = min(first + 32, count)
            x = shards.read(first * context, last * context, [hook])[hook].float()
            writer.append(sae.encode(x.view(last - first, context, -1)), windows[first:last, 1:])
    store = LatentStore(folder)
    fired = store.fired()
    least = min(20, int(fired.max()))
    often = (fired >= least).nonzero().flatten()
    often = often[fired[often].argsort(stable=True)]
    chosen = often[torch.linspace(0, len(often) - 1, study["named"] + 2, dtype=torch.float64, device="cpu").round().long()[1:-1].unique()]
    rows: list[dict[str, Any]] = []
    for feature in study.track(chosen.tolist(), "features"):
        top = store.top(feature, 20, before=6, after=2)
        peaks = Counter(found.word(token) for token in top.tokens[:, 6].tolist())
        example = "".join(
            found.word(token) if at != 6 else f"[{found.word(token)}]" for at, token in enumerate(top.tokens[0].tolist()) if token >= 0
        )
        row = {"feature": feature, "fires_on": int(fired[feature]) / store.rows}
        row["peaks"] = ", ".join(f"{word.strip()!r} {n}" for word, n in peaks.most_common(3))
        rows.append({**row, "example": " ".join(example.split()), **ablated(found, hook, sae, feature, windows[top.sequence[:8].unique()])})
    shutil.rmtree(folder)
    return rows


def ablated(found: Language, hook: str, sae: SAE, feature: int, windows: Tensor) -> dict[str, float]:
    """``nats_there``: mean KL of the next token's distribution on the tokens where the feature fires, without it."""
    clean = found.logits(windows)
    with splice(found.model, {hook: sae}, edit={hook: [Edit([feature])]}) as seen:
        changed = found.logits(windows)
    latents: Any = seen.latents[hook]
    fires = ((latents.indices == feature) & (latents.values != 0)).any(-1)
    fires[:, 0] = False  # BOS, which the dictionary has not seen
    kl = torch.nn.functional.kl_div(changed.log_softmax(-1), clean.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return {"nats_there": float(kl[fires].mean()) if bool(fires.any()) else 0.0}


def draw(study: Study, rows: list[dict[str, Any]], densities: dict[str, Tensor]) -> None:
    canvas, axes = study.figure(rows=1, columns=2, figsize=(11, 4.5))
    groups = sorted({(row["layer"], row["kind"]) for row in rows})
    for axis, (value, label) in zip(axes, (("ce_recovered", "cross-entropy recovered"), ("fvu", "fraction of variance unexplained"))):
        for layer, kind in groups:
            points = sorted((row["l0"], row[value], row[f"{value}_error"]) for row in rows if (row["layer"], row["kind"]) == (layer, kind))
            l0, heights, errors = zip(*points)
            axis.errorbar(l0, heights, errors, marker="os"[kind == "BatchTopK"], capsize=3, label=f"{layer} {kind}")
        axis.set(xscale="log", xlabel="latents a token (L0)", ylabel=label)
        axis.set_xticks(ticks := sorted({round(row["l0"]) for row in rows}), [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.legend(frameon=False)
    canvas.suptitle(f"Dictionaries of {study['features']} features on windows that they were not trained on (bars: standard errors)")
    study.save(canvas, "loss_recovered")

    canvas, axes = study.figure(figsize=(7, 4))
    tokens = study.results["held_out"]
    edges = torch.linspace(-math.log10(max(tokens, 2)), 0, 41, dtype=torch.float64, device="cpu")
    for label, density in densities.items():
        heights = torch.histogram(density[density > 0].log10().clamp(float(edges[0]), 0), edges).hist
        axes.stairs(heights.numpy(), edges.numpy(), label=label, lw=1.5)
    axes.set(xlabel=f"log10 of the share of the {tokens} tokens on which a feature fires", ylabel="features", title="Feature density")
    axes.legend(frameon=False, fontsize="small")
    study.save(canvas, "density")
