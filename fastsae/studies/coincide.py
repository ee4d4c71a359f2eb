"""Do the boundaries of a dictionary lie where the network's are?

On segments between tokens, in the residual stream where it enters an MLP: every change of a TopK dictionary's active set and every polytope
boundary of the MLP, both exact. If both described the same pieces of computation, a change of the one would lie near a boundary of the
other, and segments and places rich in the one would be rich in the other. Beside it the same changes moved along the segment by random
amounts, which keeps their number and spacing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.polytopes import crossings, dictionary_crossings
from fastsae.studies import Study
from fastsae.studies._language import into_mlp

SIZES = {
    "smoke": {
        "minutes": 0.05, "source": "random", "context": 16, "train_tokens": 1_024, "held_tokens": 128, "layer": 1, "features": 64, "k": 4,
        "batch": 128, "steps": 10, "lr": 1e-2, "segments": 12, "shifts": 10, "bins": 8,
    },
    "default": {
        "minutes": 4, "source": "smollm2", "context": 128, "train_tokens": 60_000, "held_tokens": 2_048, "layer": 12, "features": 4096,
        "k": 32, "batch": 1024, "steps": 400, "lr": 1e-3, "segments": 500, "shifts": 50, "bins": 20,
    },
}  # fmt: skip


def run(study: Study) -> None:
    made = into_mlp(study)
    order = torch.randperm(len(made.x), generator=study.generator(4), device="cpu")
    count = min(study["segments"], len(order) // 2)
    ends = made.x[order[:count]], made.x[order[count : 2 * count]]
    network, dictionary = crossings(made.net, *ends), dictionary_crossings(made.sae, *ends)
    theirs = [network.t[a:b] for a, b in zip(network.offsets[:-1].tolist(), network.offsets[1:].tolist())]
    own = [dictionary.t[a:b].double() for a, b in zip(dictionary.offsets[:-1].tolist(), dictionary.offsets[1:].tolist())]
    generator = study.generator(5)
    real = measured(study, own, theirs)
    shifted = [
        measured(study, [(t + torch.rand((), generator=generator, dtype=torch.float64, device="cpu")) % 1 for t in own], theirs)
        for _ in study.track(range(study["shifts"]), "shifts")
    ]
    every = {key: torch.tensor([row[key] for row in shifted], dtype=torch.float64, device="cpu") for key in real}
    mean, spread = ({key: float(pick(values)) for key, values in every.items()} for pick in (torch.mean, torch.std))
    rows = {"as they are": real, "moved at random, mean": mean, "moved at random, standard deviation": spread}
    study.table("coincidence", [{"changes": label, **row} for label, row in rows.items()])
    numbers = torch.tensor([[len(a), len(b)] for a, b in zip(own, theirs)], dtype=torch.float64, device="cpu").T
    together = float(torch.corrcoef(numbers)[0, 1])
    sigmas = {key: (real[key] - mean[key]) / max(spread[key], 1e-12) for key in real}
    study.record(changes=numbers[0], boundaries=numbers[1], sigmas=sigmas, correlation_of_numbers=together)
    study.say(
        f"A segment between two tokens has {float(numbers[0].mean()):.0f} changes of the active set and {float(numbers[1].mean()):.0f} "
        f"boundaries of the MLP; over segments their numbers correlate with {together:.2f}."
    )
    study.say(
        f"From a change of the dictionary to the nearest boundary it is {real['median_gap']:.5f} of the segment (moved at random "
        f"{mean['median_gap']:.5f}, {sigmas['median_gap']:+.1f} standard deviations); where along a segment changes are many, boundaries "
        f"correlate with {real['correlation']:+.3f} (moved {mean['correlation']:+.3f}, {sigmas['correlation']:+.1f})."
    )
    canvas, axes = study.figure(rows=1, columns=2, figsize=(11, 4.4))
    axes[0].scatter(numbers[0].tolist(), numbers[1].tolist(), s=6, alpha=0.5)
    axes[0].set(xlabel="changes of the dictionary's active set", ylabel="boundaries of the MLP", title="Segments between tokens")
    edges = torch.linspace(0, 1, study["bins"] + 1, dtype=torch.float64, device="cpu")
    for several, label in ((own, "changes of the dictionary"), (theirs, "boundaries of the MLP")):
        hist = torch.histogram(torch.cat(several), edges, density=True)
        axes[1].stairs(hist.hist.tolist(), edges.tolist(), label=label)
    axes[1].set(xlabel="place on the segment", ylabel="density", ylim=(0, None), title="Where they lie")
    axes[1].legend(frameon=False)
    study.save(canvas, "coincide")


def measured(study: Study, own: list[Tensor], theirs: list[Tensor]) -> dict[str, float]:
    """median_gap, mean_gap: from a change to the nearest boundary, in lengths of the segment. correlation: of both numbers in bins, after
    the mean over bins of each segment and over segments of each bin is taken away."""
    gaps, counts = [], []
    for mine, boundaries in zip(own, theirs):
        if len(mine) and len(boundaries):
            after = torch.searchsorted(boundaries, mine).clamp(max=len(boundaries) - 1)
            before = (after - 1).clamp(min=0)
            gaps.append(torch.minimum((boundaries[after] - mine).abs(), (boundaries[before] - mine).abs()))
        counts.append(torch.stack([torch.histc(t, study["bins"], 0, 1) for t in (mine, boundaries)]))
    every = torch.stack(counts)  # [S, 2, bins]
    every = every - every.mean(2, keepdim=True) - every.mean(0, keepdim=True) + every.mean((0, 2), keepdim=True)
    flat = every.transpose(0, 1).flatten(1)
    gap = torch.cat(gaps) if gaps else torch.ones(1, dtype=torch.float64, device="cpu")
    return {"median_gap": float(gap.median()), "mean_gap": float(gap.mean()), "correlation": float(torch.corrcoef(flat)[0, 1].nan_to_num())}
