"""What does a dictionary of spline codes find that one of activations does not?

Two TopK dictionaries of the same tokens at one MLP of a language model: of the residual stream that enters it, and of the code of its
neurons, +1 where a neuron (of a gated MLP the gate) is on and -1 where it is off, which keeps nothing of magnitudes. For every feature of
the one the feature of the other that fires most alike (correlation over tokens that neither was trained on); what has no partner, how much
it is about the token itself, and its strongest tokens.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from fastsae import SAE, TopK
from fastsae.optim import Adam, warmup_linear_decay
from fastsae.polytopes import Net
from fastsae.studies import Study
from fastsae.studies._language import Language, into_mlp

SIZES = {
    "smoke": {
        "minutes": 0.05, "source": "random", "context": 16, "train_tokens": 1_024, "held_tokens": 256, "layer": 1, "features": 64, "k": 4,
        "batch": 128, "steps": 20, "lr": 1e-2, "least": 2, "named": 4,
    },
    "default": {
        "minutes": 13, "source": "smollm2", "context": 128, "train_tokens": 60_000, "held_tokens": 8_192, "layer": 12, "features": 2048,
        "k": 32, "batch": 1024, "steps": 400, "lr": 1e-3, "least": 10, "named": 20,
    },
}  # fmt: skip
ALIKE = 0.5


def run(study: Study) -> None:
    made = into_mlp(study)
    hook = made.hook
    coded = of_codes(study, made.net, made.training, hook)
    tokens = made.tokens
    fires = {"activations": latents(made.sae, made.x), "codes": latents(coded, code(made.net, made.x))}
    kept = {name: ((dense > 0).sum(0) >= study["least"]).nonzero().flatten() for name, dense in fires.items()}
    unit = {name: standardised(dense[:, kept[name]]) for name, dense in fires.items()}
    alike = unit["codes"].T @ unit["activations"]
    best = {"codes": alike.amax(1), "activations": alike.amax(0)}
    rows: list[dict[str, Any]] = []
    purity = {name: about_the_token(fires[name][:, kept[name]], tokens) for name in fires}
    for name, sae, x in (("activations", made.sae, made.x), ("codes", coded, code(made.net, made.x))):
        alone = best[name] < ALIKE
        rows.append({
            "dictionary of": name, "fvu": float(sae.loss(x).fvu), "features": len(kept[name]),
            "median_correlation": float(best[name].median()), "alone": float(alone.double().mean()),
            "token_purity": float(purity[name].mean()), "token_purity_alone": float(purity[name][alone].mean()),
        })  # fmt: skip
    study.table("dictionaries", rows)
    study.say(
        f"{rows[1]['alone']:.0%} of the features of codes have no partner among those of activations (correlation of at least {ALIKE:g} "
        f"over tokens), {rows[0]['alone']:.0%} of those of activations none among those of codes; medians of the best correlations "
        f"{rows[1]['median_correlation']:.2f} and {rows[0]['median_correlation']:.2f}."
    )
    study.say(
        f"On its ten strongest tokens a feature of codes sees its commonest token {rows[1]['token_purity']:.0%} of the time, one of "
        f"activations {rows[0]['token_purity']:.0%}."
    )
    named = []
    for place in best["codes"].argsort(stable=True)[: study["named"]].tolist():
        feature = int(kept["codes"][place])
        about = {"feature": feature, "best_correlation": float(best["codes"][place])}
        named.append(about | words(made.found, fires["codes"][:, feature], tokens))
    study.table("features of codes alone", named)
    canvas, axes = study.figure(rows=1, columns=2, figsize=(11, 4.4))
    for name in fires:
        axes[0].hist(best[name].tolist(), bins=40, range=(0, 1), density=True, histtype="step", label=f"of {name}")
        axes[1].scatter(best[name].tolist(), purity[name].tolist(), s=4, alpha=0.5, label=f"of {name}")
    axes[0].set(xlabel="correlation with the most alike feature of the other", ylabel="density of features")
    axes[1].set(xlabel="correlation with the most alike feature of the other", ylabel="share of the commonest token")
    study.save(canvas, "code_features")


def code(net: Net, x: Tensor) -> Tensor:
    """``[N, H]`` of +1 and -1."""
    return torch.where(torch.cat(net.preactivations(x), 1) > 0, 1.0, -1.0)


def of_codes(study: Study, net: Net, shards: Any, hook: str) -> SAE:
    first = code(net, shards.read(0, min(shards.rows, 16_384), [hook])[hook].float())
    sae = SAE(first.shape[1], study["features"], TopK(study["k"]), seed=study.seed).init_from(first, norm="rms")
    steps = study["steps"]
    opt = Adam(sae, lr=study["lr"], betas=(0.9, 0.99), schedule=warmup_linear_decay(max(1, steps // 20), steps // 2, steps))
    batches = iter(shards.batches(study["batch"], hook, seed=study.seed, dtype=torch.float32))
    for _ in study.track(range(steps), "dictionary of codes"):
        opt.step(code(net, next(batches)["x"]))
    return sae.fold_().eval()


@torch.no_grad()
def latents(sae: SAE, x: Tensor) -> Tensor:
    found: Any = sae.encode(x)
    return found.to_dense().clamp_min(0)


def standardised(dense: Tensor) -> Tensor:
    centred = dense - dense.mean(0)
    return centred / centred.norm(dim=0).clamp_min(1e-12)


def about_the_token(dense: Tensor, tokens: Tensor) -> Tensor:
    """``[F]`` float64: share of the commonest token among the ten strongest."""
    top = tokens[dense.topk(min(10, len(dense)), dim=0).indices].T
    return torch.tensor([Counter(row).most_common(1)[0][1] / len(row) for row in top.tolist()], dtype=torch.float64, device="cpu")


def words(found: Language, fires: Tensor, tokens: Tensor) -> dict[str, Any]:
    strongest = Counter(found.word(token).strip() for token in tokens[fires.topk(min(20, len(fires))).indices].tolist())
    return {"fires_on": float((fires > 0).double().mean()), "strongest": ", ".join(f"{word!r} {n}" for word, n in strongest.most_common(4))}
