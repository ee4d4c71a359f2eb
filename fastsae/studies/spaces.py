"""Which space do a layer's functions fill, and do regions of weights behave like polytopes of activations?

Three questions about a ReLU classifier of digits. The part after its first hidden layer is a function of that layer's activations, another
affine map in each polytope: how many principal components do these maps have over data, and does scaling some of the activations lead out
of their space? Polytopes lie in activation space; in weight space, too, an input's code is constant over a region: how far can weights and
inputs move, in parts of their own length, until the code changes? And where is training a linear regression on the gradients at the start,
``f(x, θ) ≈ f(x, θ0) + ∇f(x, θ0)·(θ - θ0)``, by the distance of θ from θ0 and by width?
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae.codes import boundary_density, pack_signs
from fastsae.polytopes import Net, affine_map
from fastsae.polytopes.net import Affine
from fastsae.studies import Study
from fastsae.studies._networks import Digits, digits, lines

SIZES = {
    "smoke": {"minutes": 0.05, "hidden": [16, 16], "widths": [8, 32], "epochs": 3, "factors": [0.5, 2.0]},
    "default": {"minutes": 2, "hidden": [128, 128], "widths": [16, 64, 256, 1024], "epochs": 60, "factors": [0.0, 0.5, 0.9, 1.1, 2.0, 4.0]},
}  # fmt: skip
REACH = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def run(study: Study) -> None:
    one = digits(study)
    scaled, moved = functions(study, one), regions(study, one)
    linear = [row for width in study["widths"] for row in linearised(study, digits(study, [width] * len(study["hidden"])), width)]
    study.table("linear in the weights", linear)
    ends = [row for row in linear if row["s"] == 1]
    holds = [max((row["distance"] for row in linear if row["width"] == end["width"] and row["error"] < 0.1), default=0.0) for end in ends]
    right = [", ".join(f"{end[name]:.0%}" for end in ends) for name in ("linear_accuracy", "accuracy")]
    study.say(
        "Towards the trained weights the linear model at the start explains 90 % of the change of the logits up to a relative distance of "
        + ", ".join(f"{far:.2f} (width {end['width']}, trained at {end['distance']:.2f})" for far, end in zip(holds, ends))
        + f"; with the trained weights it is right on {right[0]} of the images, the network on {right[1]}."
    )
    canvas, axes = study.figure(rows=1, columns=3, figsize=(16, 4.6))
    options: dict[str, Any] = {"xlabel": "factor", "ylabel": "share of the maps outside the components"}
    lines(axes[0], scaled, "scaled", "factor", "outside", title="Functions of scaled activations", **options)
    options = {"xscale": "log", "yscale": "log", "xlabel": "distance over the length"}
    lines(axes[1], moved, "moved", "distance", "bits", ylabel="share of changed bits", title="Regions in two spaces", **options)
    options |= {"ylabel": "unexplained change of the logits", "title": "Linear in the weights, by width"}
    lines(axes[2], linear, "width", "distance", "error", **options)
    study.save(canvas, "spaces")


def functions(study: Study, one: Digits) -> list[dict[str, Any]]:
    """The maps from the first hidden layer's activations to the logits: their components, and those of scaled activations."""
    rest = Net(one.net.stages[2:])
    h = Net(one.net.stages[:2])(one.x)
    maps = affine_map(rest, h)[0].flatten(1).double()
    values, basis = torch.linalg.svd(maps - maps.mean(0), full_matrices=False)[1:]
    kept = int((values.square().cumsum(0) < 0.9 * values.square().sum()).sum()) + 1
    some = torch.randperm(h.shape[1], generator=study.generator(4), device="cpu")[: h.shape[1] // 2]
    code, rows = pack_signs(rest.preactivations(h)[0]), list[dict[str, Any]]()
    for label, columns in (("some", some), ("all", slice(None))):
        for factor in study["factors"]:
            changed = h.clone()
            changed[:, columns] *= factor
            own = affine_map(rest, changed)[0].flatten(1).double() - maps.mean(0)
            outside = 1 - (own @ basis[:kept].T).square().sum() / own.square().sum()
            bits = boundary_density(code, pack_signs(rest.preactivations(changed)[0])).mean / rest.widths[0]
            right = (rest(changed).argmax(1) == one.y).double().mean()
            rows.append({"scaled": label, "factor": factor, "outside": float(outside), "bits": float(bits), "accuracy": float(right)})
    study.table("functions of scaled activations", rows)
    worst = max(rows[: len(study["factors"])], key=lambda row: row["outside"])
    study.say(
        f"{kept} of {min(maps.shape)} principal components hold 90 % of the variance of the maps behind the first layer; where half of its "
        f"activations are scaled by {worst['factor']:g}, {worst['outside']:.0%} of the squared length of the maps lies outside them (10 % "
        f"unscaled), and accuracy is {worst['accuracy']:.1%} ({one.accuracy:.1%} unscaled)."
    )
    return rows


def regions(study: Study, one: Digits) -> list[dict[str, Any]]:
    """Share of all bits that change when inputs or weights move by parts of their own length, each tensor of weights by that of its own."""
    x, weights, rows = one.x, parameters(one.net), list[dict[str, Any]]()
    code = pack_signs(torch.cat(one.net.preactivations(x), 1))
    random = [
        torch.randn(t.shape, generator=study.generator(6 + n), device="cpu", dtype=torch.float32) for n, t in enumerate([x, *weights])
    ]
    others = x[torch.randperm(len(x), generator=study.generator(5), device="cpu")] - x
    back = [a - b for a, b in zip(parameters(one.untrained), weights)]
    moves = {"inputs, at random": (random[0], None), "inputs, towards others": (others, None)}
    moves |= {"weights, at random": (0 * x, random[1:]), "weights, towards the start": (0 * x, back)}
    for label, (step, turn) in moves.items():
        for reach in REACH:
            at = x + reach * step * (x.norm(dim=1) / step.norm(dim=1).clamp_min(1e-12)).unsqueeze(1)
            net = with_weights(one.net, [t + reach * m * t.norm() / m.norm() for t, m in zip(weights, turn)] if turn else weights)
            bits = boundary_density(code, pack_signs(torch.cat(net.preactivations(at), 1))).mean / sum(net.widths)
            rows.append({"moved": label, "distance": reach, "bits": float(bits)})
    study.table("regions of inputs and of weights", rows)
    at = ", ".join(f"{row['moved']} {row['bits']:.1%}" for row in rows if row["distance"] == 0.1)
    study.say(f"Moved by a tenth of their length, the share of bits that change: {at}.")
    return rows


def linearised(study: Study, one: Digits, width: int) -> list[dict[str, Any]]:
    start, end = parameters(one.untrained), parameters(one.net)
    move, rows = [b - a for a, b in zip(start, end)], list[dict[str, Any]]()
    far = torch.cat([m.flatten() for m in move]).norm() / torch.cat([t.flatten() for t in start]).norm()
    base, slope, *_ = torch.func.jvp(lambda *weights: with_weights(one.net, list(weights))(one.x), tuple(start), tuple(move))
    for s in REACH:
        real, linear = with_weights(one.net, [a + s * m for a, m in zip(start, move)])(one.x), base + s * slope
        right = {name: float((y.argmax(1) == one.y).double().mean()) for name, y in (("accuracy", real), ("linear_accuracy", linear))}
        error = (real - linear).square().sum() / (real - base).square().sum()
        rows.append({"width": width, "s": s, "distance": float(s * far), "error": float(error), **right})
    return rows


def parameters(net: Net) -> list[Tensor]:
    return [t.detach() for stage in net.stages if isinstance(stage, Affine) for t in (stage.W, stage.b) if t is not None]


def with_weights(net: Net, weights: list[Tensor]) -> Net:
    left = iter(weights)
    return Net([Affine(next(left), next(left)) if isinstance(stage, Affine) else stage for stage in net.stages])
