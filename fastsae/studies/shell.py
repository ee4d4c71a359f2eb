"""Is there a shell of polytope boundaries, and how far can activations be scaled before a network behaves differently?

Two remarks of the authors of the polytope lens: there may be a range of distances from the origin through which many boundaries pass; and
scaling some activations of a layer breaks later layers, so that a direction means something only in a range of magnitudes. On a classifier
of digits: boundaries met for each doubling of the distance along rays from the origin, random ones and ones through images, trained and
untrained. Then the first hidden layer's activations scaled, all of them, the strongest eighth of those that are on and a random eighth:
at which factor is the first boundary of the later layers (exact), where have 5 % of their bits changed, their map by 10 % (Frobenius), the
output by 0.1 nats (KL), and is the prediction another at 8 times or an eighth? The same on the neurons of one MLP of a language model, for
every token, by the bits of later layers and the KL of the next token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastsae import polytopes
from fastsae._core import seeds
from fastsae.codes import boundary_density, pack_signs, trace
from fastsae.lm.hooks import find, watch
from fastsae.polytopes.net import Activation, Net
from fastsae.studies import Study
from fastsae.studies._language import divergence, language
from fastsae.studies._networks import digits, lines

SIZES = {
    "smoke": {
        "minutes": 0.05, "hidden": [24, 24], "epochs": 3, "rays": 10, "reach": 4.0, "steps": 2, "source": "random", "context": 16,
        "train_tokens": 16, "held_tokens": 64, "layer": 0, "last": 1, "neurons": ".1", "factors": [0.5, 2.0],
    },
    "default": {
        "minutes": 5, "hidden": [256, 256, 256], "epochs": 60, "rays": 599, "reach": 6.0, "steps": 8, "source": "smollm2", "context": 128,
        "train_tokens": 128, "held_tokens": 512, "layer": 12, "last": 29, "neurons": ".mlp.down_proj:input",
        "factors": [0.0, 0.5, 0.75, 0.875, 1.125, 1.5, 2.0, 4.0, 8.0],
    },
}  # fmt: skip
OCTAVES, SCALED = 3, 200  # of factors up and down; images
LIMITS = {"bits": 0.05, "map": 0.1, "kl": 0.1}


def run(study: Study) -> None:
    data = digits(study)
    images = data.x[: study["rays"]]
    edges, profiles, norm = rays(study, {"trained": data.net, "untrained": data.untrained}, images)
    first = next(i for i, stage in enumerate(data.net.stages) if isinstance(stage, Activation))
    front, back = Net(data.net.stages[: first + 1]), Net(data.net.stages[first + 1 :])
    h = front(images[:SCALED])
    factors = 2.0 ** torch.linspace(-OCTAVES, OCTAVES, 2 * OCTAVES * study["steps"] + 1, dtype=torch.float64, device="cpu")
    rows: list[dict[str, Any]] = []
    curves: dict[str, dict[str, Tensor]] = {}
    for name, which in chosen(h, study.generator(6)).items():
        found = polytopes.crossings(back, torch.where(which, 0, h), torch.where(which, 2**OCTAVES * h, h))
        measured = scaled(study, back, h, which, factors)
        curves[name] = {key: values.mean(1) for key, values in measured.items()}
        for way in ("down", "up"):
            rows.append({"scaled": name, "way": way, "first_boundary": nearest(found.t * 2**OCTAVES, found.segment, len(h), way)})
            rows[-1] |= {key: reached(measured[key] >= limit, factors, way) for key, limit in LIMITS.items()}
            rows[-1]["other_prediction"] = float(measured["prediction"][0 if way == "down" else -1].mean())
    study.table("scaling", rows)
    for name, (down, up) in zip(curves, zip(rows[::2], rows[1::2])):
        if name != "random eighth":
            study.say(
                f"Scaled, {name} of the first hidden layer's activations: first boundary of later layers at {down['first_boundary']:.3f} "
                f"and {up['first_boundary']:.3f}, 5 % of their bits {shown(down, up, 'bits')}, 10 % of their map {shown(down, up, 'map')}, "
                f"0.1 nats {shown(down, up, 'kl')} (medians, down and up to a factor of 8); another prediction at its end for "
                f"{down['other_prediction']:.0%} and {up['other_prediction']:.0%} of the images."
            )
    real = language_model(study)
    study.table("a_language_model", real)
    study.say(
        f"A language model, the neurons of the MLP of layer {study['layer']} scaled: "
        + "; ".join(
            f"{row['scaled']}, {row['factor']:g} times: {row['bits']:.1%} of later bits, {row['kl']:.2g} nats"
            for row in real
            if row["factor"] in (2.0, study["factors"][-1])
        )
        + "."
    )
    study.record(edges=edges, profiles=profiles, factors=factors, curves=curves)
    draw(study, (edges, profiles, norm), factors, curves, real)


def shown(down: dict[str, Any], up: dict[str, Any], key: str) -> str:
    return " and ".join("never" if math.isinf(row[key]) else f"at {row[key]:.2f}" for row in (down, up))


def rays(study: Study, nets: dict[str, Net], images: Tensor) -> tuple[Tensor, dict[str, Tensor], float]:
    """Boundaries for each doubling of the distance, ``[layers, bins]``, between edges; and the mean norm of the images."""
    norm = float(images.norm(dim=1).mean())
    radius = study["reach"] * norm
    random = seeds.normal(study.generator(5), len(images), images.shape[1])
    edges = radius * 2.0 ** torch.linspace(-10, 0, 41, dtype=torch.float64, device="cpu")  # four bins for each doubling of the distance
    profiles: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    for network, net in nets.items():
        for kind, directions in (("random", random), ("through images", images)):
            found = polytopes.shell(net, directions, radius)
            hist = torch.stack([torch.histogram(found.distance[found.layer == layer], edges).hist for layer in range(len(net.widths))])
            profiles[f"{network} {kind}"] = 4 * hist / len(directions)
            peak = int(hist.sum(0).argmax())
            rows.append({
                "network": network, "rays": kind, "crossings_a_ray": len(found.distance) / len(directions),
                "densest_doubling_at": float(edges[peak : peak + 2].mean()), "median": float(found.distance.median()),
                "per_unit_inside": float((found.distance < norm / 10).sum()) / len(directions) / (norm / 10),
                "per_unit_at_images": float(((found.distance / norm - 1).abs() < 0.2).sum()) / len(directions) / (0.4 * norm),
            })  # fmt: skip
    study.table("shell", rows)
    anyway, through, _, before = rows
    study.say(
        f"Images have norm {norm:.2f}. Most boundaries for a doubling of the distance are met at {through['densest_doubling_at']:.2f} on "
        f"rays through them (untrained: {before['densest_doubling_at']:.2f}; random rays: {anyway['densest_doubling_at']:.2f}); per unit "
        f"of distance {through['per_unit_inside']:.1f} within a tenth of their norm, {through['per_unit_at_images']:.1f} around it."
    )
    return edges, profiles, norm


def chosen(h: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Which of the neurons that are not 0 in each row are scaled."""
    on = h != 0

    def eighth(score: Tensor) -> Tensor:
        rank = score.masked_fill(~on, -1).argsort(-1, descending=True).argsort(-1)
        return on & (rank < (on.sum(-1, keepdim=True) / 8).ceil())

    noise = torch.rand(h.shape, generator=generator, dtype=torch.float32, device="cpu")
    return {"all": on, "strongest eighth": eighth(h.abs()), "random eighth": eighth(noise)}


def scaled(study: Study, net: Net, h: Tensor, which: Tensor, factors: Tensor) -> dict[str, Tensor]:
    """``[factors, N]`` each: share of the bits of ``net`` changed, change of its map over the map, KL of the output, prediction changed."""
    bits, (maps, _), logits = pack_signs(torch.cat(net.preactivations(h), 1)), polytopes.affine_map(net, h), net(h)
    rows = []
    for s in study.track(factors.tolist(), "scaling"):
        y = torch.where(which, s * h, h)
        code, output = pack_signs(torch.cat(net.preactivations(y), 1)), net(y)
        change = (polytopes.affine_map(net, y)[0] - maps).flatten(1).norm(dim=1) / maps.flatten(1).norm(dim=1)
        different = (output.argmax(1) != logits.argmax(1)).float()
        rows.append((boundary_density(bits, code).pairs / sum(net.widths), change, divergence(logits, output), different))
    return dict(zip((*LIMITS, "prediction"), map(torch.stack, zip(*rows))))


def reached(there: Tensor, factors: Tensor, way: str) -> float:
    """The median over rows of the first factor away from 1 where ``there [factors, N]`` holds; infinite: it holds in less than half."""
    middle = len(factors) // 2
    place = torch.arange(1, middle + 1, device="cpu").unsqueeze(1)
    steps = torch.where(there[middle + 1 :] if way == "up" else there[:middle].flip(0), place, middle + 1).amin(0).median()
    return math.inf if int(steps) > middle else float(factors[middle + (int(steps) if way == "up" else -int(steps))])


def nearest(factors: Tensor, row: Tensor, rows: int, way: str) -> float:
    """The median over rows of the factor nearest to 1 on one side."""
    side = factors > 1 if way == "up" else factors <= 1
    none = torch.full((rows,), math.inf if way == "up" else 0.0, dtype=torch.float64, device="cpu")
    return float(none.scatter_reduce(0, row[side], factors[side], "amin" if way == "up" else "amax").median())


@torch.no_grad()
def language_model(study: Study) -> list[dict[str, Any]]:
    """Mean share of changed bits of the layers behind an MLP and mean KL of the next token, its neurons scaled at every token."""
    found = language(study)
    _, windows = found.split(study["train_tokens"], study["held_tokens"], study["context"])
    (point,) = find("shell", found.model, found.layer.format(study["layer"]) + study["neurons"])
    later = [found.layer.format(layer) for layer in range(study["layer"] + 1, study["last"] + 1)]
    with trace(found.model, later, emit="code") as codes:
        logits, bits = found.logits(windows), codes.pop()
        widths: list[int] = []
        rows = []
        for name in ("all", "strongest eighth", "random eighth"):
            for factor in study.track(study["factors"], f"scaling, {name}"):

                def seen(h: Tensor, name: str = name, factor: float = factor) -> Tensor:
                    widths.append(h.shape[-1])
                    return torch.where(chosen(h, study.generator(8))[name], factor * h, h)

                handle = watch(point, seen)
                try:
                    kl = divergence(logits, found.logits(windows)).mean()
                finally:
                    handle.remove()
                now = codes.pop()
                changed = sum(float(boundary_density(bits[layer], now[layer]).mean) for layer in bits)
                rows.append({"scaled": name, "factor": factor, "bits": changed / len(bits) / widths[-1], "kl": float(kl)})
    return rows


def draw(study: Study, shell: tuple[Tensor, dict[str, Tensor], float], factors: Tensor, curves: Any, real: list[dict[str, Any]]) -> None:
    canvas, axes = study.figure(rows=1, columns=4, figsize=(20, 4.2))
    edges, profiles, norm = shell
    for kind, style in (("through images", "-"), ("random", ":")):
        for layer, line in enumerate(profiles[f"trained {kind}"]):
            axes[0].plot((edges[1:] * edges[:-1]).sqrt(), line, style, color=f"C{layer}", label=f"layer {layer}, {kind}")
    axes[0].axvline(norm, color="0.6", lw=1)
    axes[0].set(xscale="log", xlabel="distance from the origin (grey: images)", title="Shell, trained classifier")
    axes[0].set_ylabel("boundaries a ray and doubling of the distance")
    for name, style in zip(curves, ("-", "--", ":")):
        for colour, (key, values) in enumerate(curves[name].items()):
            axes[1].plot(factors, values, style, color=f"C{colour}", label=key if name == "all" else None)
    axes[1].set(xscale="log", ylim=(0, 1), xlabel="factor", ylabel="share changed, or nats (kl)")
    axes[1].set_title("First hidden layer of the classifier:\nall, - - strongest eighth, ··· random eighth")
    title, options = "Neurons of one MLP of a language model", {"xlabel": "factor"}
    lines(axes[2], real, "scaled", "factor", "bits", ylabel="share of later bits changed", title=title, **options)
    title = "What the model makes of it"
    lines(axes[3], real, "scaled", "factor", "kl", ylabel="KL of the next token (nats)", yscale="log", title=title, **options)
    study.save(canvas, "shell")
