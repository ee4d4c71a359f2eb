"""Are polytope boundaries denser between classes than within them?

A prediction of the polytope lens (Black et al. 2022): semantic boundaries coincide with many polytope boundaries. On a ReLU classifier of
scikit-learn's digits every boundary between two test images is counted exactly (``fastsae.polytopes.crossings``), for pairs of one class
and of two, per unit of Euclidean distance, layer by layer, in the trained network and in the same network before training. The second
question is where on the way they lie: around the place where the predicted class changes?
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastsae
from fastsae.studies import Study
from fastsae.studies._networks import Digits, digits, pairs

SIZES = {
    "smoke": {"minutes": 0.05, "hidden": [24, 24], "epochs": 3, "pairs": 20},
    "default": {"minutes": 4, "hidden": [256, 256, 256], "epochs": 60, "pairs": 3000},
}
WINDOW = 1.0  # of distance, around a change of the prediction


def run(study: Study) -> None:
    data = digits(study)
    study.say(f"Classifier 64-{'-'.join(map(str, study['hidden']))}-10: {data.accuracy:.1%} of {len(data.y)} images it was not trained on.")
    kinds = {
        "within": pairs(data.y, study["pairs"], study.generator(10), True),
        "between": pairs(data.y, study["pairs"], study.generator(11), False),
    }
    rows: list[dict[str, Any]] = []
    density: dict[tuple[str, str], Tensor] = {}
    found: dict[tuple[str, str], tuple[Any, Tensor]] = {}
    for network, net in (("trained", data.net), ("untrained", data.untrained)):
        for kind, (a, b) in kinds.items():
            p, q = data.x[a], data.x[b]
            crossed = fastsae.polytopes.crossings(net, p, q)
            length = (p - q).double().norm(dim=1)
            by_layer = torch.zeros(len(a), len(net.widths), dtype=torch.float64, device="cpu")
            by_layer.index_put_((crossed.segment, crossed.layer), torch.ones_like(crossed.t), accumulate=True)
            per_unit = by_layer / length.unsqueeze(1)
            density[network, kind], found[network, kind] = per_unit, (crossed, length)
            for layer in range(len(net.widths)):
                values = per_unit[:, layer]
                rows.append({
                    "network": network, "pairs": kind, "layer": layer, "crossings": float(by_layer[:, layer].mean()),
                    "distance": float(length.mean()), "per_unit": float(values.mean()),
                    "standard_error": float(values.std() / len(a) ** 0.5),
                })  # fmt: skip
    study.table("density", rows)
    for network in ("trained", "untrained"):
        ratio = density[network, "between"].mean(0) / density[network, "within"].mean(0)
        total = density[network, "between"].sum(1).mean() / density[network, "within"].sum(1).mean()
        study.say(
            f"{network}: {total:.3f} times as many boundaries per unit of distance between classes as within; by layer "
            f"{', '.join(f'{r:.3f}' for r in ratio.tolist())}."
        )

    # Pairs of two classes are farther apart, and the density may depend on distance: compare at equal distance too.
    distances = {kind: (data.x[a] - data.x[b]).double().norm(dim=1) for kind, (a, b) in kinds.items()}
    cuts = torch.quantile(distances["within"], torch.linspace(0, 1, 9, dtype=torch.float64, device="cpu"))
    bins = {kind: torch.bucketize(values, cuts[1:-1]) for kind, values in distances.items()}
    matched = []
    for network in ("trained", "untrained"):
        means = []
        for b in range(8):
            inside, across = (density[network, kind][bins[kind] == b] for kind in kinds)
            if len(inside) and len(across):
                means.append(torch.stack([inside.mean(0), across.mean(0)]))
        within, between = torch.stack(means).mean(0)
        for layer, (near, far) in enumerate(zip(within.tolist(), between.tolist())):
            matched.append({"network": network, "layer": layer, "within": near, "between": far, "ratio": far / near, "bins": len(means)})
    study.table("at_equal_distance", matched)
    shown = {n: ", ".join(f"{row['ratio']:.3f}" for row in matched if row["network"] == n) for n in ("trained", "untrained")}
    study.say(f"At equal distance, by layer: {shown['trained']} times as many between classes (trained), {shown['untrained']} (untrained).")

    # Around the first change of the trained network's prediction: boundaries per unit of distance by signed distance from it.
    a, b = kinds["between"]
    change = first_change(study, data, a, b)
    edges = torch.linspace(-WINDOW, WINDOW, 21, dtype=torch.float64, device="cpu")
    near, far = range(8, 12), (0, 1, 2, 17, 18, 19)  # bins within 0.2, and 0.7 to 1 away
    profiles: dict[str, Tensor] = {}
    rows = []
    for network in ("trained", "untrained"):
        crossed, length = found[network, "between"]
        offset = ((crossed.t - change[crossed.segment]) * length[crossed.segment]).nan_to_num(1e9)
        # What part of each segment lies in each bin: the ends cut some off.
        start, stop = (-change * length).unsqueeze(1), ((1 - change) * length).unsqueeze(1)
        covered = (torch.minimum(stop, edges[1:]) - torch.maximum(start, edges[:-1])).clamp_min(0).nan_to_num().sum(0)
        counts = torch.stack([torch.histogram(offset[crossed.layer == layer], edges).hist for layer in range(len(study["hidden"]))])
        profiles[network] = counts / covered
        for layer, count in enumerate(counts):
            at, away = (float(count[list(bins)].sum() / covered[list(bins)].sum()) for bins in (near, far))
            rows.append({"network": network, "layer": layer, "near": at, "away": away, "ratio": at / away})
    study.table("at_the_decision", rows)
    shown = {n: ", ".join(f"{row['ratio']:.2f}" for row in rows if row["network"] == n) for n in ("trained", "untrained")}
    study.say(
        f"Within 0.2 of where the prediction first changes there are, by layer, {shown['trained']} times as many boundaries per unit of "
        f"distance as 0.7 to 1 away from it; untrained, at the same places, {shown['untrained']} times "
        f"({int(change.isfinite().sum())} of {len(a)} segments change the prediction)."
    )
    study.record(profiles=profiles, edges=edges, accuracy=data.accuracy)
    draw(study, density, profiles, edges)


def first_change(study: Study, data: Digits, a: Tensor, b: Tensor) -> Tensor:
    """Where along each segment the prediction first changes, 0 .. 1; nan: nowhere."""
    t = torch.linspace(0, 1, 401, device="cpu", dtype=torch.float32)
    change = torch.full((len(a),), float("nan"), dtype=torch.float64, device="cpu")
    for i in study.track(range(len(a)), "predictions"):
        predicted = data.predict(torch.lerp(data.x[a[i]], data.x[b[i]], t.unsqueeze(1)))
        changes = (predicted[1:] != predicted[:-1]).nonzero()
        if len(changes):
            change[i] = float(t[int(changes[0])] + t[1] / 2)
    return change


def draw(study: Study, density: dict[tuple[str, str], Tensor], profiles: dict[str, Tensor], edges: Tensor) -> None:
    canvas, axes = study.figure(rows=1, columns=3, figsize=(15, 4.2))
    for axis, network in zip(axes, ("trained", "untrained")):
        totals = {kind: density[network, kind].sum(1) for kind in ("within", "between")}
        bins = torch.linspace(0, float(max(v.max() for v in totals.values())), 40, device="cpu", dtype=torch.float32).numpy()
        for (kind, values), colour in zip(totals.items(), ("C0", "C1")):
            axis.hist(values.numpy(), bins, alpha=0.55, color=colour, label=f"{kind} classes, mean {float(values.mean()):.1f}")
        axis.set(xlabel="boundaries per unit of distance", ylabel="pairs", title=f"{network} network")
        axis.set_ylim(top=1.25 * axis.get_ylim()[1])
        axis.legend(frameon=False, loc="upper left")
    centres = (edges[1:] + edges[:-1]) / 2
    for network, style in (("trained", "o-"), ("untrained", ":")):
        for layer, line in enumerate(profiles[network]):
            axes[2].plot(centres, line, style, ms=3, color=f"C{layer}", label=f"layer {layer}, {network}")
    axes[2].axvline(0, color="0.6", lw=1)
    axes[2].set(xlabel="distance from the change of the prediction", ylabel="boundaries per unit of distance", title="Around the decision")
    axes[2].set_ylim(bottom=0)
    axes[2].legend(frameon=False, fontsize=8, ncols=2)
    study.save(canvas, "density")
