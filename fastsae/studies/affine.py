"""How different are the affine maps of neighbouring polytopes, and of polytopes that data lies in, by depth?

A suggestion of Black et al. 2022 without an experiment: the Frobenius norm of the difference of two polytopes' maps tells how constrained
neighbours are. For one MLP it is a quadratic form in the difference of the codes (``fastsae.polytopes.frobenius_pairs``), and neighbours
differ by ``||W_out[:, i]|| ||W_in[i]||``. Were the contributions of neurons orthogonal, a pair's squared distance would be the sum of
those squares over the neurons that differ: the ratio of the two says whether neurons that change together reinforce or cancel each other.
Where the activation is smooth the map of a soft code, the average of all maps by their probabilities, stands beside that of the hard one,
between random pairs and from the middle of one polytope to the middle of the next. Last a whole ReLU classifier, whose polytopes are those
of all its layers, by the layer of the boundary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae import polytopes
from fastsae.codes import hamming, pack_signs
from fastsae.polytopes.net import Activation, Net
from fastsae.studies import Study
from fastsae.studies._networks import Tokens, digits, pairs, tokens

SIZES = {
    "smoke": {
        "minutes": 0.05, "source": "digits", "layers": [0, 1], "hidden": [24, 24], "epochs": 3, "tokens": 0, "each": 0,
        "samples": 60, "segments": 10, "walked": 3, "boundaries": 50,
    },
    "default": {
        "minutes": 3, "source": "minilm", "layers": [0, 1, 2, 3, 4, 5], "hidden": [256, 256, 256], "epochs": 60, "tokens": 16_000,
        "each": 12, "samples": 1_000, "segments": 250, "walked": 40, "boundaries": 5_000,
    },
}  # fmt: skip


def run(study: Study) -> None:
    rows: list[dict[str, Any]] = []
    shown: dict[int, tuple[Tensor, ...]] = {}
    layers = list(zip(study["layers"], tokens(study, study["source"], study["layers"])))
    for layer, data in study.track(layers, "layers"):
        row, shown[layer] = one_layer(study, data)
        rows.append({"layer": layer, **row})
    study.table("mlps", rows)

    def span(column: str, form: str) -> str:
        """Least and largest over layers."""
        return " to ".join(format(pick(row[column] for row in rows), form) for pick in (min, max))

    study.say(
        f"Over {len(rows)} layers the map of an MLP changes by {span('neighbours', '.1%')} of its norm across one boundary and by "
        f"{span('pairs', '.0%')} between random samples, {span('over_pairs', '.1%')} as much: about what orthogonal contributions of the "
        f"{span('hamming', '.0f')} neurons that differ give, those that change together adding up to "
        f"{rows[0]['over_orthogonal']:.2f} times their squares in layer {rows[0]['layer']} and {rows[-1]['over_orthogonal']:.2f} in layer "
        f"{rows[-1]['layer']}."
    )
    study.say(
        f"Maps of soft codes differ by {span('soft_neighbours', '.2%')} from one polytope to the next and by {span('soft_pairs', '.0%')} "
        f"between random samples; the hard code's map, unlike the soft one's, misses the MLP's output, by {span('hard_error', '.0%')} "
        f"(median; {span('hard_error_centred', '.0%')} of what varies of it)."
    )
    deep = whole(study)
    study.table("whole_network", deep)
    ratios = {n: ", ".join(f"{row['over_pairs']:.1%}" for row in deep if row["network"] == n) for n in ("trained", "untrained")}
    study.say(
        f"In a ReLU classifier of digits a boundary of its layers changes the whole map by {ratios['trained']} of what two images' maps "
        f"differ by (untrained: {ratios['untrained']})."
    )
    draw(study, rows, deep, shown)


def one_layer(study: Study, data: Tokens) -> tuple[dict[str, float], tuple[Tensor, ...]]:
    """Numbers of an MLP, shares of the norm of its maps; and Hamming, hard and soft Frobenius distance of pairs."""
    pick = torch.randperm(len(data.x), generator=study.generator(7), device="cpu")[: study["samples"]]
    x, kind, net = data.x[pick], data.kind[pick], data.net
    first, act, last = net.stages
    assert isinstance(act, Activation)
    z = net.preactivations(x)[0]
    hard, soft = pack_signs(z), polytopes.soft_code(z, act.kind)
    size, soft_size = (float(polytopes.frobenius_distance(net, code, torch.zeros_like(code)).mean()) for code in (hard, soft))
    i, j = torch.triu_indices(len(x), len(x), 1, device="cpu")
    apart = kind[i] != kind[j]
    i, j = i[apart], j[apart]
    distance, soft_distance = (polytopes.frobenius_pairs(net, code)[i, j] for code in (hard, soft))
    norms = polytopes.boundary_norms(net)[0]
    bits = (z > 0).double()
    on = bits @ norms.square()
    alone = (on[i] + on[j] - 2 * ((bits * norms.square()) @ bits.T)[i, j]).sum()
    a, b = pairs(kind, study["segments"], study.generator(10), False)
    across = norms[polytopes.crossings(net, x[a], x[b]).neuron].mean()
    steps = [soft_steps(net, act, x[p], x[q]) for p, q in zip(a[: study["walked"]], b[: study["walked"]])]
    output = net(x)
    error = Net([first, Activation("relu"), last])(x) - output
    relative = [(a.norm(dim=1) / b.norm(dim=1)).median() for a, b in ((error, output), (error - error.mean(0), output - output.mean(0)))]
    apart = hamming(hard, hard)[i, j].double()
    row = {
        "on": float(bits.mean()), "hamming": float(apart.mean()),
        "neighbours": float(across) / size, "pairs": float(distance.mean()) / size,
        "over_pairs": float(across / distance.mean()), "over_orthogonal": float(distance.square().sum() / alone),
        "soft_neighbours": float(torch.cat(steps).mean()) / soft_size, "soft_pairs": float(soft_distance.mean()) / soft_size,
        "soft_over_hard": soft_size / size, "hard_error": float(relative[0]), "hard_error_centred": float(relative[1]),
    }  # fmt: skip
    few = torch.randperm(len(i), generator=study.generator(11), device="cpu")[:5_000]
    return row, (apart[few], distance[few] / size, soft_distance[few] / soft_size)


def soft_steps(net: Net, act: Activation, p: Tensor, q: Tensor) -> Tensor:
    """Distances of the soft maps in the middles of neighbouring polytopes on the way from p to q."""
    t = polytopes.crossings(net, p.unsqueeze(0), q.unsqueeze(0)).t
    t = torch.cat([t.new_zeros(1), t, t.new_ones(1)])
    middle = torch.lerp(p, q, ((t[1:] + t[:-1]) / 2).to(p.dtype).unsqueeze(1))
    soft = polytopes.soft_code(net.preactivations(middle)[0], act.kind)
    return polytopes.frobenius_distance(net, soft[:-1], soft[1:])


def whole(study: Study) -> list[dict[str, Any]]:
    """The map of a whole classifier across boundaries of each of its layers, and between images of two classes."""
    data = digits(study)
    a, b = pairs(data.y, study["segments"], study.generator(12), False)
    p, q = data.x[a], data.x[b]
    rows = []
    for network, net in (("trained", data.net), ("untrained", data.untrained)):
        maps = polytopes.affine_map(net, data.x)[0].flatten(1)
        size, distance = float(maps.norm(dim=1).mean()), float((maps[a] - maps[b]).norm(dim=1).mean())
        found = polytopes.crossings(net, p, q)
        some = torch.randperm(len(found.t), generator=study.generator(13), device="cpu")[: study["boundaries"]]
        segment, layer, neuron = found.segment[some], found.layer[some], found.neuron[some]
        norms = polytopes.boundary_norms(net, torch.lerp(p[segment], q[segment], found.t[some].float().unsqueeze(1)))
        for number, values in enumerate(norms):
            here = layer == number
            across = float(values[here, neuron[here]].mean())
            rows.append({"network": network, "layer": number, "neighbours": across / size, "pairs": distance / size})
            rows[-1]["over_pairs"] = across / distance
    return rows


def draw(study: Study, rows: list[dict[str, Any]], deep: list[dict[str, Any]], shown: dict[int, tuple[Tensor, ...]]) -> None:
    canvas, axes = study.figure(rows=1, columns=3, figsize=(15, 4.2))
    layers = [row["layer"] for row in rows]
    for column, style, label in (
        ("pairs", "C0o-", "random pairs, hard codes"), ("soft_pairs", "C0o:", "random pairs, soft codes"),
        ("neighbours", "C1o-", "neighbours, hard codes"), ("soft_neighbours", "C1o:", "neighbours, soft codes"),
    ):  # fmt: skip
        axes[0].plot(layers, [row[column] for row in rows], style, label=label)
    axes[0].set(yscale="log", xticks=layers, xlabel="layer of the MLP", ylabel="distance of maps, of a map's norm", title="One MLP")
    for network, style in (("trained", "-"), ("untrained", ":")):
        own = [row for row in deep if row["network"] == network]
        for column, colour, label in (("pairs", "C0", "pairs of images"), ("neighbours", "C1", "neighbours")):
            axes[1].plot([row["layer"] for row in own], [row[column] for row in own], f"{colour}o{style}", label=f"{label}, {network}")
    axes[1].set(yscale="log", xlabel="layer of the boundary", ylabel="distance of maps, of a map's norm", title="A whole ReLU classifier")
    axes[1].set_xticks(range(len(study["hidden"])))
    for axis in axes[:2]:
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    layer = layers[len(layers) // 2]
    apart, hard, soft = shown[layer]
    axes[2].plot(apart, hard, ".", ms=1, color="C0", label="hard codes")
    axes[2].plot(apart, soft, ".", ms=1, color="C1", label="soft codes")
    axes[2].set(xlabel="Hamming distance", ylabel="distance of maps, of a map's norm", title=f"Random pairs, MLP of layer {layer}")
    axes[2].legend(frameon=False, markerscale=8)
    study.save(canvas, "affine")
