"""Do adversarial perturbations cross more polytope boundaries than random ones of the same size?

A conjecture from the discussion of the polytope lens: perturbations of small norm may cross many boundaries, and may lead to polytopes far
from the origin. On a classifier of digits, from each test image: a random direction, the direction to another image, the gradient of the
loss, and projected gradient ascent (20 steps), each of Euclidean norm r. Crossings are counted exactly on the straight way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastsae
from fastsae._core import seeds
from fastsae.studies import Study
from fastsae.studies._networks import Digits, digits

SIZES = {
    "smoke": {"minutes": 0.05, "hidden": [24, 24], "epochs": 3, "images": 10, "radii": [0.5, 1.0]},
    "quick": {"minutes": 0.5, "hidden": [128, 128, 128], "epochs": 40, "images": 200, "radii": [0.125, 0.25, 0.5, 1.0, 2.0]},
    "default": {
        "minutes": 3,
        "hidden": [256, 256, 256],
        "epochs": 60,
        "images": 599,
        "radii": [0.0625, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0],
    },
}
STEPS = 20


def _gradient(data: Digits, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(data.net(x), y, reduction="sum"), x)
    return gradient


def _unit(v: Tensor) -> Tensor:
    return v / v.norm(dim=1, keepdim=True).clamp_min(1e-30)


def ascent(data: Digits, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """The perturbation of norm ``radius`` after ``STEPS`` steps up the loss on the sphere."""
    delta = radius * _unit(_gradient(data, x, y))
    for _ in range(STEPS):
        delta = radius * _unit(delta + radius / 5 * _unit(_gradient(data, x + delta, y)))
    return delta


def run(study: Study) -> None:
    data = digits(study)
    x, y = data.x[: study["images"]], data.y[: study["images"]]
    right = data.predict(x) == y
    x, y = x[right], y[right]
    generator = study.generator(6)
    random = _unit(seeds.normal(generator, x.shape))
    others = _unit(data.x[torch.randint(len(data.x), (len(x),), generator=generator, device="cpu")] - x + 1e-6 * random)
    gradient = _unit(_gradient(data, x, y))
    rows = []
    for radius in study.track(study["radii"], "perturbations"):
        ways = {"random": radius * random, "to another image": radius * others, "gradient": radius * gradient}
        for kind, delta in {**ways, "ascent": ascent(data, x, y, radius)}.items():
            found = fastsae.polytopes.crossings(data.net, x, x + delta)
            crossed = found.counts.double()
            by_layer = [float((found.layer == layer).sum()) / len(x) / radius for layer in range(len(data.net.widths))]
            rows.append({
                "perturbation": kind, "radius": radius, "wrong": float((data.predict(x + delta) != y).float().mean()),
                "crossings": float(crossed.mean()), "per_unit": float(crossed.mean()) / radius,
                "standard_error": float(crossed.std()) / radius / len(x) ** 0.5,
                **{f"layer_{layer}": value for layer, value in enumerate(by_layer)},
                "norm": float((x + delta).norm(dim=1).mean()),
            })  # fmt: skip
    study.table("perturbations", rows)
    study.say(f"{data.accuracy:.1%} accuracy; {len(x)} images classified rightly, of mean norm {float(x.norm(dim=1).mean()):.2f}.")

    def at(kind: str, radius: float) -> dict[str, Any]:
        return next(row for row in rows if row["perturbation"] == kind and row["radius"] == radius)

    middle = min(study["radii"], key=lambda r: abs(at("ascent", r)["wrong"] - 0.5))
    ours, chance, other = (at(kind, middle) for kind in ("ascent", "random", "to another image"))
    study.say(
        f"At r = {middle:g}, where ascent fools {ours['wrong']:.0%} (random: {chance['wrong']:.0%}), it crosses {ours['per_unit']:.1f} "
        f"boundaries per unit, random directions {chance['per_unit']:.1f} and directions to other images {other['per_unit']:.1f}: "
        f"{ours['per_unit'] / chance['per_unit']:.2f} and {ours['per_unit'] / other['per_unit']:.2f} times as many."
    )
    norms = f"{ours['norm']:.2f} (ascent), {chance['norm']:.2f} (random), {other['norm']:.2f} (to another image)"
    study.say(f"The polytopes reached are at a mean norm of {norms}.")

    canvas, axes = study.figure(rows=1, columns=3, figsize=(15, 4.2))
    for kind in ("random", "to another image", "gradient", "ascent"):
        mine = [row for row in rows if row["perturbation"] == kind]
        radii = [row["radius"] for row in mine]
        axes[0].errorbar(radii, [row["per_unit"] for row in mine], [row["standard_error"] for row in mine], fmt="o-", ms=4, label=kind)
        axes[1].plot(radii, [row["wrong"] for row in mine], "o-", ms=4, label=kind)
        axes[2].plot(radii, [row["norm"] for row in mine], "o-", ms=4, label=kind)
    axes[0].set(ylabel="boundaries per unit of perturbation", title="Boundaries crossed", ylim=(0, None))
    axes[1].set(ylabel="share of images", title="Predictions changed")
    axes[2].set(ylabel="mean norm", title="Distance of the polytopes reached from the origin")
    for axis in axes:
        axis.set(xlabel="norm of the perturbation")
    study.save(canvas, "adversarial")
