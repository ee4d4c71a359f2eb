"""How much of a language model do its dictionaries keep, and what do their features say?

SmolLM2-135M over Python's documentation, without a network: residual activations of two layers into shards, TopK and BatchTopK dictionaries
trained from them, each judged on windows that it was not trained on (variance, cross-entropy and divergence of the model with the
reconstruction in the layer's place), ten features named by their top examples, and what the model loses where each of them is ablated.
Literature: Gao et al. 2024 (TopK, loss recovered), Bussmann et al. 2024 (BatchTopK). The dictionaries are small and see little text: the
page shows the path from a model to a judged dictionary, not the best dictionary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae import SAE, BatchTopK, TopK, plots
from fastsae.lm import Evaluation, evaluate, harvest
from fastsae.studies import Study
from fastsae.studies._language import language, name_features, train

SIZES = {
    "smoke": {
        "minutes": 0.05, "source": "random", "context": 16, "train_tokens": 1_024, "held_tokens": 128, "layers": [0, 1],
        "features": 64, "k": {"TopK": [2, 4], "BatchTopK": [4]}, "batch": 128, "steps": 10, "lr": 1e-2, "named": 3, "ablated": 8,
        "latent_tokens": 512,
    },
    "default": {
        "minutes": 18, "source": "smollm2", "context": 128, "train_tokens": 120_000, "held_tokens": 4_096, "layers": [6, 12],
        "features": 8192, "k": {"TopK": [16, 64], "BatchTopK": [32]}, "batch": 2048, "steps": 200, "lr": 1e-3, "named": 10,
        "ablated": 8, "latent_tokens": 120_000,
    },
}  # fmt: skip


def run(study: Study) -> None:
    found = language(study)
    windows, held = found.split(study["train_tokens"], study["held_tokens"], study["context"])
    hooks = [found.layer.format(number) for number in study["layers"]]
    folder = study.parts / "activations"
    shards = harvest(found.model, windows, hooks, folder, ignore=found.special, dtype=torch.bfloat16, progress=study.progress)
    study.record(tokens=shards.rows, held_out=held.numel(), hooks=hooks)
    rows: list[dict[str, Any]] = []
    fired: dict[str, Tensor] = {}
    saes: dict[tuple[str, str, int], SAE] = {}
    for hook in hooks:
        for name, several in study["k"].items():
            for k in several:
                kind, file = {"TopK": TopK, "BatchTopK": BatchTopK}[name](k), study.parts / f"{hook} {name} {k}.pt"
                sae = saes[hook, name, k] = train(study, shards, hook, kind, file, study.seed)
                made = study.part(
                    "evaluations",
                    f"{hook} {name} {k}",
                    lambda sae=sae, hook=hook: vars(evaluate(sae, found.model, held, hook, ignore=found.special, progress=study.progress)),
                )
                judged = Evaluation(**made)
                alive = int((~sae.dead_features).sum())
                rows.append({"layer": hook, "kind": name, "k": k, "alive": alive, **judged.values})
                rows[-1] |= {f"{value}_error": judged.errors[value] for value in ("ce_recovered", "fvu", "ce_spliced")}
                fired[f"{hook} {name} {k}"] = judged.fired
    columns = ["layer", "kind", "k", "l0", "fvu", "ce_clean", "ce_spliced", "ce_zero", "ce_recovered", "ce_recovered_error", "kl_spliced"]
    study.table("dictionaries", [{name: row[name] for name in (*columns, "alive", "dead", "dense")} for row in rows])
    for hook in hooks:
        best = max((row for row in rows if row["layer"] == hook), key=lambda row: row["ce_recovered"])
        study.say(
            f"{hook}: {best['kind']} with {best['l0']:.0f} latents a token keeps {1 - best['fvu']:.1%} of the variance and "
            f"{best['ce_recovered']:.1%} of the loss (± {best['ce_recovered_error']:.1%}): {best['ce_clean']:.3f} nats a token clean, "
            f"{best['ce_spliced']:.3f} with the reconstruction, {best['ce_zero']:.2f} with zeros."
        )
    sae = saes[hooks[-1], "TopK", study["k"]["TopK"][-1]]
    named = name_features(study, found, shards, hooks[-1], sae, windows[: max(1, study["latent_tokens"] // (windows.shape[1] - 1))])
    study.table("features", named)
    if named:
        strongest = max(named, key=lambda row: row["nats_there"])
        study.say(
            f"Without one feature, where it fires, the next token's distribution moves by {min(row['nats_there'] for row in named):.4f} to "
            f"{strongest['nats_there']:.3f} nats (KL), most for feature {strongest['feature']} ({strongest['peaks']})."
        )
    study.record(evaluations=rows)
    draw(study, rows, fired)


def draw(study: Study, rows: list[dict[str, Any]], fired: dict[str, Tensor]) -> None:
    canvas, axes = study.figure(rows=1, columns=2, figsize=(11, 4.5))
    groups = sorted({(row["layer"], row["kind"]) for row in rows})
    for axis, (value, label) in zip(axes, (("ce_recovered", "cross-entropy recovered"), ("fvu", "fraction of variance unexplained"))):
        for layer, kind in groups:
            points = sorted((row["l0"], row[value], row[f"{value}_error"]) for row in rows if (row["layer"], row["kind"]) == (layer, kind))
            l0, heights, errors = zip(*points)
            axis.errorbar(l0, heights, errors, marker="os"[kind == "BatchTopK"], capsize=3, label=f"{layer} {kind}")
        axis.set(xscale="log", xlabel="latents a token (L0)", ylabel=label)
        axis.set_xticks(ticks := sorted({k for several in study["k"].values() for k in several}), [str(tick) for tick in ticks])
        axis.minorticks_off()
    canvas.suptitle(f"Dictionaries of {study['features']} features on windows that they were not trained on (bars: standard errors)")
    study.save(canvas, "loss_recovered")

    study.plots.append("density.png")
    plots.feature_density(fired, study.results["held_out"], study.out / "density.png")
