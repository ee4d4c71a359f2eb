"""Do adversarial perturbations cross more polytope boundaries than random ones of the same size?

A conjecture from the discussion of the polytope lens: perturbations of small norm may cross many boundaries, and may lead to polytopes far
from the origin. On a classifier of digits, from each test image: a random direction, the direction to another image, the gradient of the
loss, and projected gradient ascent (20 steps), each of Euclidean norm r. Crossings are counted exactly on the straight way. How far the
direction of each later layer's activations turns, and how far the map of the image's own polytope alone would turn it and fool the
classifier, says what the crossings do; the distance of a polytope from the origin is exact, a least-distance problem over all its
boundaries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsae import polytopes
from fastsae._core import seeds
from fastsae._core.extras import needed
from fastsae.polytopes.net import Activation, Net
from fastsae.studies import Study
from fastsae.studies._networks import Digits, digits

SIZES = {
    "smoke": {"minutes": 0.05, "hidden": [24, 24], "epochs": 3, "images": 10, "radii": [0.5, 1.0], "polytopes": 3},
    "default": {
        "minutes": 2, "hidden": [256, 256, 256], "epochs": 60, "images": 599, "radii": [0.0625, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0],
        "polytopes": 60,
    },
}  # fmt: skip
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


def upto(net: Net, inclusive: bool) -> list[Net]:
    """The net up to each of its activations, with it or without."""
    return [Net(net.stages[: i + inclusive]) for i, stage in enumerate(net.stages) if isinstance(stage, Activation)]


def turned(a: Tensor, b: Tensor) -> float:
    """Mean angle between rows, in degrees."""
    return float(torch.cosine_similarity(a.double(), b.double()).clamp(-1, 1).acos().rad2deg().mean())


def from_origin(net: Net, x: Tensor) -> Tensor:
    """``[N]``: distance of each point's polytope from the origin: ``min ||p||`` with every neuron's sign at p as at x, by non-negative
    least squares (Lawson & Hanson 1974, least distance programming)."""
    solve = needed("scipy.optimize", "adversarial needs SciPy", "studies").nnls
    wide, x = net.to(torch.float64), x.double()
    A, c = (torch.cat(parts, 1) for parts in zip(*(polytopes.affine_map(part, x) for part in upto(wide, False))))
    sign = torch.where((A @ x.unsqueeze(2)).squeeze(2) + c > 0, 1.0, -1.0) / A.norm(dim=2).clamp_min(1e-12)
    rows = torch.cat([A * sign.unsqueeze(2), -(c * sign).unsqueeze(2)], 2)  # sign (A p + c) >= 0
    target = torch.zeros(rows.shape[2], dtype=torch.float64, device="cpu")
    target[-1] = 1
    residuals = [row.T @ torch.from_numpy(solve(row.T.numpy(), target.numpy())[0]) - target for row in rows]
    return torch.stack([(r[:-1] / r[-1]).norm() for r in residuals])


def run(study: Study) -> None:
    data = digits(study)
    x, y = data.x[: study["images"]], data.y[: study["images"]]
    right = data.predict(x) == y
    x, y = x[right], y[right]
    generator = study.generator(6)
    random = _unit(seeds.normal(generator, x.shape))
    others = _unit(data.x[torch.randint(len(data.x), (len(x),), generator=generator, device="cpu")] - x + 1e-6 * random)
    gradient = _unit(_gradient(data, x, y))
    layers = upto(data.net, True)
    h, own = [layer(x) for layer in layers], [polytopes.affine_map(net, x) for net in (layers[-1], data.net)]
    few = study["polytopes"]
    start = float(from_origin(data.net, x[:few]).mean())
    rows = []
    for radius in study.track(study["radii"], "perturbations"):
        ways = {"random": radius * random, "to another image": radius * others, "gradient": radius * gradient}
        for kind, delta in {**ways, "ascent": ascent(data, x, y, radius)}.items():
            crossed = polytopes.crossings(data.net, x, x + delta).counts.double()
            last, logits = ((A @ (x + delta).unsqueeze(2)).squeeze(2) + c for A, c in own)
            rows.append({
                "perturbation": kind, "radius": radius, "wrong": float((data.predict(x + delta) != y).float().mean()),
                "wrong_by_own_map": float((logits.argmax(1) != y).float().mean()), "per_unit": float(crossed.mean()) / radius,
                "standard_error": float(crossed.std()) / radius / len(x) ** 0.5, "turned_input": turned(x, x + delta),
                **{f"turned_{number}": turned(before, layer(x + delta)) for number, (before, layer) in enumerate(zip(h, layers))},
                "turned_by_own_map": turned(h[-1], last), "norm": float((x + delta).norm(dim=1).mean()),
                "polytope": float(from_origin(data.net, (x + delta)[:few]).mean()),
            })  # fmt: skip
    study.table("perturbations", rows)
    of = {(row["perturbation"], row["radius"]): row for row in rows}
    middle = min(study["radii"], key=lambda radius: abs(of["ascent", radius]["wrong"] - 0.5))
    ours, chance, other = (of[kind, middle] for kind in ("ascent", "random", "to another image"))
    end = f"turned_{len(layers) - 1}"
    more = ours["per_unit"] - chance["per_unit"] > 3 * (ours["standard_error"] + chance["standard_error"])
    study.say(
        f"{'Yes' if more else 'No'}: at r = {middle:g}, where ascent fools {ours['wrong']:.0%} of {len(x)} images (random: "
        f"{chance['wrong']:.0%}), it crosses {ours['per_unit']:.1f} boundaries per unit, random directions {chance['per_unit']:.1f} and "
        f"directions to other images {other['per_unit']:.1f}; the map of the image's own polytope alone would be fooled for "
        f"{ours['wrong_by_own_map']:.0%}."
    )
    least = study["radii"][0]
    turns = [of[kind, least][end] / of[kind, least]["turned_input"] for kind in ("ascent", "random")]
    study.say(
        f"At r = {least:g} ascent turns the last hidden layer's activations {turns[0]:.2f} times as far as the image, random directions "
        f"{turns[1]:.2f} times; the image's own map alone turns them {of['ascent', least]['turned_by_own_map']:.2f} of ascent's "
        f"{of['ascent', least][end]:.2f} degrees. The polytopes reached at r = {middle:g} are {ours['polytope']:.2f} from the origin "
        f"(random: {chance['polytope']:.2f}), the images' own {start:.2f}: the points are {ours['norm']:.2f} from it."
    )
    study.record(accuracy=data.accuracy, polytope_of_images=start)
    draw(study, rows, end, start)


def draw(study: Study, rows: list[dict[str, Any]], end: str, start: float) -> None:
    canvas, axes = study.figure(rows=1, columns=4, figsize=(19, 4.2))
    panels = (("wrong", "wrong_by_own_map"), (end, "turned_by_own_map"), ("polytope", "norm"))
    for number, kind in enumerate(("random", "to another image", "gradient", "ascent")):
        mine, colour = [row for row in rows if row["perturbation"] == kind], f"C{number}"
        radii = [row["radius"] for row in mine]
        density, errors = ([row[column] for row in mine] for column in ("per_unit", "standard_error"))
        axes[0].errorbar(radii, density, errors, fmt=f"{colour}o-", ms=4, label=kind)
        for axis, (solid, dotted) in zip(axes[1:], panels):
            axis.plot(radii, [row[solid] for row in mine], f"{colour}o-", ms=4, label=kind)
            axis.plot(radii, [row[dotted] for row in mine], f"{colour}:")
    axes[0].set(ylabel="boundaries per unit of perturbation", title="Boundaries crossed", ylim=(0, None))
    axes[1].set(ylabel="share of images (dotted: by the image's own map)", title="Predictions changed")
    axes[2].set(ylabel="degrees (dotted: by the image's own map)", title="Last hidden layer's activations turned")
    axes[3].set(ylabel="mean distance from the origin (dotted: of the points)", title="Polytopes reached", ylim=(0, None))
    axes[3].axhline(start, color="0.6", lw=1)
    for axis in axes:
        axis.set(xlabel="norm of the perturbation", xscale="log")
    study.save(canvas, "adversarial")
