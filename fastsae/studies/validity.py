"""How far can a feature be pushed before a direction means something else?

The residual stream where it enters an MLP of a language model, and a TopK dictionary of it. From tokens along decoder rows, random
directions and differences of two tokens: the exact distance to the first boundary of the MLP's polytopes and to a share of changed bits,
beside what the feature itself does in the data (the 99th percentile of its activation); and what the model makes of the push, as KL of its
next token. Black et al. 2022 expected a direction to keep its meaning within a range of magnitudes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.polytopes import validity
from fastsae.studies import Study
from fastsae.studies._language import IntoMlp, divergence, into_mlp
from fastsae.studies._networks import lines

SIZES = {
    "smoke": {
        "minutes": 0.05, "source": "random", "context": 16, "train_tokens": 1_024, "held_tokens": 128, "layer": 1, "features": 64, "k": 4,
        "batch": 128, "steps": 10, "lr": 1e-2, "points": 16, "directions": 6, "share": 0.05, "pushed": 2, "scales": [0.5, 2.0],
    },
    "default": {
        "minutes": 28, "source": "smollm2", "context": 128, "train_tokens": 60_000, "held_tokens": 2_048, "layer": 12, "features": 4096,
        "k": 32, "batch": 1024, "steps": 400, "lr": 1e-3, "points": 512, "directions": 128, "share": 0.05, "pushed": 8,
        "scales": [0.125, 0.5, 1.0, 2.0, 4.0],
    },
}  # fmt: skip


def run(study: Study) -> None:
    made = into_mlp(study)
    x, count = made.x, study["directions"]
    latents: Any = made.sae.encode(x)
    dense = torch.zeros(len(x), made.sae.d_sae, device="cpu", dtype=torch.float32).scatter_(1, latents.indices, latents.values.detach())
    often = (dense > 0).sum(0).argsort(descending=True, stable=True)[: 4 * count]
    chosen = often[torch.randperm(len(often), generator=study.generator(4), device="cpu")[:count]]
    strong = torch.stack([dense[dense[:, f] > 0, f].quantile(0.99) for f in chosen])
    pairs = torch.randint(len(x), (2, count), generator=study.generator(6), device="cpu")
    directions = {
        "features": made.sae.W_dec.detach()[chosen],
        "random": torch.randn(count, x.shape[1], generator=study.generator(5), device="cpu", dtype=torch.float32),
        "between tokens": x[pairs[0]]
        - x[pairs[1]]
        + 1e-6 * torch.randn(count, x.shape[1], generator=study.generator(7), device="cpu", dtype=torch.float32),
    }
    points = x[torch.randperm(len(x), generator=study.generator(8), device="cpu")[: study["points"]]]
    norm, radius = float(points.norm(dim=1).median()), 8 * float(points.norm(dim=1).median())
    rows: list[dict[str, Any]] = []
    curves: dict[str, Tensor] = {}
    for name, rays in study.track(directions.items(), "directions"):
        found = validity(made.net, points, rays, share=study["share"], radius=None if len(made.net.widths) == 1 else radius)
        assert found.bits is not None
        push = found.bits[..., 0]  # upwards, as a feature goes
        curves[name] = push.flatten().sort().values / norm
        rows.append({
            "directions": name, "first": float(found.first.median()), "bits": float(push.median()),
            "bits_10 %": float(push.flatten().quantile(0.1)), "bits_90 %": float(push.flatten().quantile(0.9)),
            "first_over_norm": float(found.first.median()) / norm, "bits_over_norm": float(push.median()) / norm,
            "reached_by_p99": float((push <= strong).double().mean()),
        })  # fmt: skip
    study.table("distances", rows)
    features, random, between = rows
    study.say(
        f"From a token (median norm {norm:.1f}) the first boundary along a feature is at {features['first']:.4f}; {study['share']:.0%} of "
        f"the {sum(made.net.widths)} bits have changed at {features['bits']:.2f}, along random directions at {random['bits']:.2f}, between "
        f"two tokens at {between['bits']:.2f}."
    )
    study.say(
        f"A feature's own activations (99th percentile, median {float(strong.median()):.2f}) reach that far for "
        f"{features['reached_by_p99']:.0%} of tokens and features; the same length along random directions for "
        f"{random['reached_by_p99']:.0%}."
    )
    study.record(strong=strong, norm=norm)
    some = replace(made, windows=made.windows[::4])
    effects = pushed(study, some, {name: rays[: study["pushed"]] for name, rays in directions.items()}, strong) if study["pushed"] else []
    if effects:
        study.table("what the model makes of it", effects)
        at = {row["directions"]: row["kl"] for row in effects if row["scale"] == max(study["scales"])}
        study.say(
            f"Pushed at every token by {max(study['scales']):g} x the feature's 99th percentile, the next token's distribution moves by "
            + ", ".join(f"{kl:.3f} nats ({name})" for name, kl in at.items())
            + "."
        )
    draw(study, curves, effects, float(strong.median()) / norm)


@torch.no_grad()
def pushed(study: Study, made: IntoMlp, directions: dict[str, Tensor], strong: Tensor) -> list[dict[str, Any]]:
    """Mean KL of the next token where x is pushed along each direction by multiples of the features' 99th percentiles."""
    clean, module = made.found.logits(made.windows), made.found.model.get_submodule(made.hook.removesuffix(":input"))
    rows = []
    for name, rays in directions.items():
        for scale in study.track(study["scales"], f"pushing, {name}"):
            moved = [change(made, module, scale * far * ray / ray.norm(), clean) for ray, far in zip(rays, strong)]
            rows.append({"directions": name, "scale": scale, "kl": sum(moved) / len(moved), "most": max(moved)})
    return rows


def change(made: IntoMlp, module: nn.Module, push: Tensor, clean: Tensor) -> float:
    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].add_(push)  # in place: the residual stream keeps this very tensor

    handle = module.register_forward_pre_hook(add)
    try:
        changed = made.found.logits(made.windows)
    finally:
        handle.remove()
    return float(divergence(clean, changed).mean())


def draw(study: Study, curves: dict[str, Tensor], effects: list[dict[str, Any]], strong: float) -> None:
    canvas, axes = study.figure(rows=1, columns=2 if effects else 1, figsize=(12 if effects else 6.5, 4.6))
    first, second = axes if effects else (axes, None)
    for name, distances in curves.items():
        some = distances[:: max(1, len(distances) // 500)]
        first.plot(some, torch.linspace(0, 1, len(some), dtype=torch.float32, device="cpu"), label=name)
    first.axvline(strong, color="0.6", ls=":", label="a feature's 99th percentile (median)")
    first.set(xscale="log", xlabel=f"distance to {study['share']:.0%} changed bits, over the tokens' norm", ylabel="share of pairs")
    if second is not None:
        options = {"xlabel": "push, in 99th percentiles of the feature", "ylabel": "KL of the next token (nats)"}
        lines(second, effects, "directions", "scale", "kl", xscale="log", yscale="log", **options)
    study.save(canvas, "validity")
