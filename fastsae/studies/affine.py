"""How different are the affine maps of neighbouring polytopes, and of polytopes that data lies in?

A suggestion of Black et al. 2022 without an experiment: the Frobenius norm of the difference of two polytopes' maps. For one MLP it is a
quadratic form in the difference of the codes, so that all pairs cost two products (``fastsae.polytopes.frobenius_pairs``). Neighbours
differ by one neuron and so by ``||W_out[:, i]|| ||W_in[i]||``. Were the neurons' contributions orthogonal, a pair's squared distance would
be the sum of those squares over the neurons that differ: the ratio of the two says whether neurons that change together reinforce or
cancel each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastsae
from fastsae import polytopes
from fastsae.ops.spline import unpack_bits
from fastsae.studies import Study
from fastsae.studies._networks import pairs, tokens

SIZES = {
    "smoke": {
        "minutes": 0.05, "source": "digits", "hidden": [32, 32], "epochs": 3, "tokens": 0, "layer": 0, "each": 0,
        "samples": 60, "segments": 10,
    },
    "quick": {
        "minutes": 1, "source": "minilm", "hidden": [], "epochs": 0, "tokens": 8_000, "layer": 3, "each": 8,
        "samples": 600, "segments": 100,
    },
    "default": {
        "minutes": 4, "source": "minilm", "hidden": [], "epochs": 0, "tokens": 56_000, "layer": 3, "each": 24,
        "samples": 3000, "segments": 1000,
    },
}  # fmt: skip


def run(study: Study) -> None:
    data = tokens(study)
    pick = torch.randperm(len(data.x), generator=study.generator(7), device="cpu")[: study["samples"]]
    x, kind = data.x[pick], data.kind[pick]
    codes = fastsae.codes.pack_signs(data.net.preactivations(x)[0])
    neurons = data.net.widths[0]
    norms = polytopes.boundary_norms(data.net)[0]
    bits = unpack_bits(codes)[:, :neurons].double()
    size = polytopes.frobenius_distance(data.net, codes, torch.zeros_like(codes))  # of the map itself: its distance from that of no neuron
    study.say(
        f"{len(x)} samples from {data.source}; {neurons} neurons, of which {float(bits.mean()):.1%} are on; mean norm of a map "
        f"{float(size.mean()):.2f}."
    )

    distance = polytopes.frobenius_pairs(data.net, codes)
    hamming = fastsae.codes.hamming(codes, codes).double()
    alone = orthogonal(bits, norms.square())
    apart = ~torch.eye(len(x), dtype=torch.bool, device="cpu")
    same = (kind.unsqueeze(1) == kind) & apart
    different = apart & ~same
    # Codes with the same number of changes, but of random neurons.
    flips = torch.randperm(len(x), generator=study.generator(8), device="cpu")
    rolled = bits[:, torch.randperm(neurons, generator=study.generator(9), device="cpu")][flips]
    shuffled = polytopes.frobenius_pairs(data.net, fastsae.codes.pack_signs(rolled > 0.5))
    shuffled_alone = orthogonal(rolled, norms.square())

    a, b = pairs(kind, study["segments"], study.generator(10), False)
    crossed = polytopes.crossings(data.net, x[a], x[b])
    across = norms[crossed.neuron]
    rows = []
    for name, where, values, expected in (
        ("same kind", same, distance, alone),
        ("different kinds", different, distance, alone),
        ("neurons shuffled", apart, shuffled, shuffled_alone),
    ):
        squares = values[where].square()
        rows.append({
            "pairs": name, "number": int(where.sum()) // 2, "hamming": float(hamming[where].mean()) if values is distance else None,
            "frobenius": float(values[where].mean()), "of_a_map": float(values[where].mean() / size.mean()),
            "squares_over_orthogonal": float(squares.sum() / expected[where].sum()),
        })  # fmt: skip
    rows.append({
        "pairs": "neighbours", "number": len(across), "hamming": 1.0, "frobenius": float(across.mean()),
        "of_a_map": float(across.mean() / size.mean()), "squares_over_orthogonal": 1.0,
    })  # fmt: skip
    study.table("distances", rows)
    i, j = torch.triu_indices(len(x), len(x), 1, device="cpu")
    few = torch.randperm(len(i), generator=study.generator(11), device="cpu")[:200_000]
    correlation = float(torch.corrcoef(torch.stack([hamming[i[few], j[few]], distance[i[few], j[few]]]))[0, 1])
    near = {
        "Hamming": fastsae.codes.hamming_topk(codes, codes, 2).index,
        "Frobenius": polytopes.frobenius_topk(data.net, codes, codes, 2).index,
    }
    own = torch.arange(len(x), device="cpu")
    nearest = {name: torch.where(index[:, 0] == own, index[:, 1], index[:, 0]) for name, index in near.items()}
    hits = {name: float((kind[index] == kind).double().mean()) for name, index in nearest.items()}
    study.table("nearest", [{"distance": name, "same_kind": share} for name, share in hits.items()])
    study.say(
        f"Neighbouring polytopes differ by {rows[3]['of_a_map']:.2%} of a map's norm, samples of the same kind by "
        f"{rows[0]['of_a_map']:.1%}, of different kinds by {rows[1]['of_a_map']:.1%}. Neurons that change together add up to "
        f"{rows[1]['squares_over_orthogonal']:.2f} times the square of orthogonal contributions "
        f"({rows[2]['squares_over_orthogonal']:.2f} with the neurons shuffled)."
    )
    study.say(
        f"Hamming and Frobenius distance of pairs correlate at {correlation:.3f}; the nearest other sample is of the same kind for "
        f"{hits['Hamming']:.1%} (Hamming) and {hits['Frobenius']:.1%} (Frobenius)."
    )
    study.record(correlation=correlation, boundary_norms=norms)

    groups = {"same kind": (distance[same], "C0"), "different kinds": (distance[different], "0.5")}
    groups["neurons shuffled"] = (shuffled[apart], "C1")
    shown = few[:8000]
    some = (hamming[i[shown], j[shown]], distance[i[shown], j[shown]])
    most = float(max(distance.max(), shuffled.max())), float(hamming.max())
    draw(study, norms, across, groups, most, some, (hamming[same], distance[same]), correlation)


def orthogonal(bits: Tensor, weight: Tensor) -> Tensor:
    """Squared distance of pairs if contributions were orthogonal: the neurons that differ, each with its squared norm."""
    on = bits @ weight
    return (on.unsqueeze(1) + on - 2 * (bits * weight) @ bits.T).clamp_min(0)


def draw(
    study: Study, norms: Tensor, across: Tensor, groups: dict[str, tuple[Tensor, str]], most: Any, some: Any, same: Any, correlation: float
) -> None:
    """``groups``: distances and colour; ``most``: the largest and the largest Hamming distance; ``some``, ``same``: both of pairs."""
    largest, furthest = most
    canvas, axes = study.figure(rows=1, columns=3, figsize=(15, 4.2))
    axes[0].hist(across.numpy(), 60, density=True, alpha=0.6, label=f"crossed between samples, mean {float(across.mean()):.3g}")
    axes[0].hist(
        norms.numpy(), 60, density=True, histtype="step", color="0.2", label=f"all {len(norms)} neurons, mean {float(norms.mean()):.3g}"
    )
    axes[0].set(xlabel="Frobenius distance of neighbouring polytopes", ylabel="density", title="Across one boundary")
    bins = torch.linspace(0, largest, 80, device="cpu", dtype=torch.float32).numpy()
    for name, (values, colour) in groups.items():
        axes[1].hist(values.numpy(), bins, density=True, histtype="stepfilled", alpha=0.4, color=colour, label=name)
    axes[1].set(xlabel="Frobenius distance", ylabel="density of pairs", title="Between the polytopes of samples")
    axes[2].plot(*some, ",", color="0.5")
    axes[2].plot(*same, ".", ms=1, color="C0", alpha=0.4, label="same kind")
    line = torch.linspace(1, furthest, 50, device="cpu", dtype=torch.float32)
    axes[2].plot(line, (line * float(norms.square().mean())).sqrt(), "k--", lw=1, label="orthogonal contributions, mean norms")
    axes[2].set(xlabel="Hamming distance", ylabel="Frobenius distance", title=f"Pairs of samples, correlation {correlation:.2f}")
    study.save(canvas, "affine")
