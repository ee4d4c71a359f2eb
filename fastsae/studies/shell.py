"""Is there a shell of polytope boundaries, and how far can an activation be scaled before its code changes?

Two remarks of the authors of the polytope lens: there may be a range of distances from the origin through which many boundaries pass; and a
direction means something only in a range of magnitudes. On a classifier of digits: boundaries met for each doubling of the distance along
rays from the origin, random ones and ones through images, trained and untrained; then activations of the first hidden layer scaled by s,
with the exact interval of s in which no later neuron changes sign, and how far the code and the prediction have changed beyond.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastsae
from fastsae._core import seeds
from fastsae.polytopes.net import Activation, Net
from fastsae.studies import Study
from fastsae.studies._networks import digits

SIZES = {
    "smoke": {"minutes": 0.05, "hidden": [24, 24], "epochs": 3, "rays": 10, "reach": 4.0},
    "quick": {"minutes": 0.5, "hidden": [128, 128, 128], "epochs": 40, "rays": 200, "reach": 4.0},
    "default": {"minutes": 3, "hidden": [256, 256, 256], "epochs": 60, "rays": 599, "reach": 6.0},
}


def run(study: Study) -> None:
    data = digits(study)
    images = data.x[: study["rays"]]
    norm = float(images.norm(dim=1).mean())
    radius = study["reach"] * norm
    random = seeds.normal(study.generator(5), len(images), images.shape[1])
    edges = radius * 2.0 ** torch.linspace(-10, 0, 41, dtype=torch.float64, device="cpu")  # four bins for each doubling of the distance
    profiles: dict[tuple[str, str], Tensor] = {}
    rows: list[dict[str, Any]] = []
    for network, net in (("trained", data.net), ("untrained", data.untrained)):
        for kind, directions in (("random", random), ("through images", images)):
            rays = fastsae.polytopes.shell(net, directions, radius)
            hist = torch.stack([torch.histogram(rays.distance[rays.layer == layer], edges).hist for layer in range(len(net.widths))])
            profiles[network, kind] = 4 * hist / len(directions)  # boundaries for each doubling
            peak = int(hist.sum(0).argmax())
            half = rays.distance.sort().values
            q = [float(half[int(share * (len(half) - 1))]) if len(half) else 0.0 for share in (0.1, 0.5, 0.9)]
            rows.append({
                "network": network, "rays": kind, "crossings_a_ray": len(rays.distance) / len(directions),
                "densest_doubling_at": float(edges[peak : peak + 2].mean()),
                "10 %": q[0], "median": q[1], "90 %": q[2],
                "per_unit_inside": float((rays.distance < norm / 10).sum()) / len(directions) / (norm / 10),
                "per_unit_at_images": float(((rays.distance / norm - 1).abs() < 0.2).sum()) / len(directions) / (0.4 * norm),
                "most_neurons": sum(net.widths),
            })  # fmt: skip
    study.table("shell", rows)
    through, before, anyway = rows[1], rows[3], rows[0]
    study.say(
        f"Images have norm {norm:.2f}. Along rays through them half of the boundaries within {radius:.1f} lie inside "
        f"{through['median']:.2f} (trained) and {before['median']:.2f} (untrained), along random rays (trained) inside "
        f"{anyway['median']:.2f}. Most boundaries for a doubling of the distance are met at {through['densest_doubling_at']:.2f}, "
        f"{before['densest_doubling_at']:.2f} and {anyway['densest_doubling_at']:.2f}."
    )
    study.say(
        f"Per unit of distance on rays through images (trained): {through['per_unit_inside']:.1f} boundaries within a tenth of the images' "
        f"norm of the origin, {through['per_unit_at_images']:.1f} between 0.8 and 1.2 of it."
    )

    # Scaling the first hidden layer: the network behind it, along s * h.
    first = next(i for i, stage in enumerate(data.net.stages) if isinstance(stage, Activation))
    front, back = Net(data.net.stages[: first + 1]), Net(data.net.stages[first + 1 :])
    h = front(images)
    top = study["reach"]
    found = fastsae.polytopes.crossings(back, torch.zeros_like(h), top * h)
    scale = found.t * top
    # The interval around 1 within which the code of all later layers stays.
    inside, none = scale <= 1, torch.zeros(len(h), dtype=torch.float64, device="cpu")
    below = none.scatter_reduce(0, found.segment[inside], scale[inside], "amax")
    above = (none + top).scatter_reduce(0, found.segment[~inside], scale[~inside], "amin")
    base = fastsae.codes.pack_signs(torch.cat(back.preactivations(h), 1))
    predicted = back(h).argmax(1)
    curve: list[dict[str, float]] = []
    for s in torch.linspace(0, top, 49, device="cpu", dtype=torch.float32).tolist():
        code = fastsae.codes.pack_signs(torch.cat(back.preactivations(s * h), 1))
        changed = fastsae.codes.boundary_density(base, code).pairs / sum(back.widths)
        moved = float((back(s * h).argmax(1) != predicted).float().mean())
        curve.append({"scale": s, "code_changed": float(changed.mean()), "prediction_changed": moved})
    study.table("scaling", curve[:: max(1, len(curve) // 12)])
    halved, doubled = (min(curve, key=lambda row, s=s: abs(row["scale"] - s)) for s in (0.5, 2.0))
    study.say(
        f"An activation of the first hidden layer keeps the code of all {sum(back.widths)} later neurons for s from "
        f"{float(below.median()):.3f} to {float(above.median()):.3f} (medians). Halved, {halved['code_changed']:.1%} of the bits have "
        f"changed, doubled {doubled['code_changed']:.1%}; the prediction changes for {halved['prediction_changed']:.1%} and "
        f"{doubled['prediction_changed']:.1%} of the images."
    )
    study.record(
        edges=edges, profiles={" ".join(key): value for key, value in profiles.items()}, scaling=curve, valid_from=below, valid_to=above
    )
    draw(study, edges, profiles, curve, norm, (float(below.median()), float(above.median())))


def draw(study: Study, edges: Tensor, profiles: dict[tuple[str, str], Tensor], curve: Any, norm: float, valid: tuple[float, float]) -> None:
    canvas, axes = study.figure(rows=1, columns=3, figsize=(15, 4.2))
    centres = (edges[1:] * edges[:-1]).sqrt()
    for axis, network in zip(axes, ("trained", "untrained")):
        for kind, style in (("through images", "-"), ("random", ":")):
            for layer, line in enumerate(profiles[network, kind]):
                axis.plot(centres, line, style, color=f"C{layer}", label=f"layer {layer}, {kind}")
        axis.axvline(norm, color="0.6", lw=1)
        axis.set(xscale="log", xlabel="distance from the origin (grey: images)", title=f"{network} network")
        axis.set_ylabel("boundaries a ray and doubling of the distance")
    axes[2].plot([c["scale"] for c in curve], [c["code_changed"] for c in curve], label="share of later bits changed")
    axes[2].plot([c["scale"] for c in curve], [c["prediction_changed"] for c in curve], label="predictions changed")
    axes[2].axvspan(*valid, color="C2", alpha=0.4, label="no bit changes (median interval)")
    axes[2].set(xlabel="scale of the first hidden layer's activations", ylabel="share", title="Range of validity of a direction")
    study.save(canvas, "shell")
