"""When is each feature learnt, and how suddenly?

Superposition is known to appear in phase transitions. For every true feature its best cosine is kept every few steps: when it first passes
0.9 for good, how often the feature had been active in the data by then, and how long it took from 0.5 to 0.9. If dictionaries learnt all
features a little at a time, the distribution of cosines would move as a whole; if one after the other, it stays split in two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.studies import Study
from fastsae.studies._toy import colours, share_between, train
from fastsae.superposition import SuperpositionData

SIZES = {
    "smoke": {
        "minutes": 0.05, "n_features": 24, "d": 12, "mean_active": 2.0, "rate": 0.97, "dictionary": 48, "l1": 0.1, "steps": 80,
        "cooldown": 10, "every": 20,
    },
    "default": {
        "minutes": 3, "n_features": 512, "d": 256, "mean_active": 5.0, "rate": 0.99, "dictionary": 1024, "l1": 0.1, "steps": 4000,
        "cooldown": 1000, "every": 25,
    },
}  # fmt: skip


def run(study: Study) -> None:
    data = SuperpositionData(
        study["n_features"], study["d"], mean_active=study["mean_active"], rate=study["rate"], seed=1000 + study.seed
    )  # uncorrelated: each feature's probability is known
    steps = list(range(0, study["steps"] + 1, study["every"]))
    options = {"stop": study["steps"], "cooldown": study["cooldown"], "snapshots": steps}
    (trained,) = train(study, "dictionary", data, l1=study["l1"], n_features=study["dictionary"], **options)
    cosines = torch.stack([similarity for _, similarity in trained.snapshots])  # [snapshots, G]
    seen = data.expected_probabilities * 256  # times a step at which a feature is active, on average
    at = torch.tensor(steps, device="cpu")

    learnt = _for_good(cosines, at, 0.9)
    begun = _for_good(cosines, at, 0.5)
    known = learnt >= 0
    row = {
        "true_features": study["n_features"],
        "learnt": int(known.sum()),
        "mmcs": float(cosines[-1].double().mean()),
        "median_step": float(learnt[known].double().median()) if bool(known.any()) else None,
        "median_times_active_before": float((learnt * seen)[known].median()) if bool(known.any()) else None,
        "median_steps_from_0.5_to_0.9": float((learnt - begun)[known].double().median()) if bool(known.any()) else None,
        "log_correlation": _correlation(seen[known].log(), learnt[known].clamp_min(1).double().log()),
        "most_in_between": max(share_between(now, 0.5, 0.9) for now in cosines),
        "cpu_seconds": trained.cpu_seconds,
    }
    study.table("phases", [row])
    study.record(steps=steps, learnt=learnt, begun=begun, times_a_step=seen, mean_cosine=cosines.double().mean(1))
    study.say(
        f"{row['learnt']} of {row['true_features']} features are learnt (best cosine above 0.9 for good). "
        + ("" if row["median_step"] is None else f"The median one is learnt at step {row['median_step']:.0f}, after having been active "
        f"{row['median_times_active_before']:.0f} times, and takes {row['median_steps_from_0.5_to_0.9']:.0f} steps from 0.5 to 0.9. ")
        + f"At most {row['most_in_between']:.0%} of the features are between the two at any one time."
    )  # fmt: skip
    if row["log_correlation"] is not None:
        study.say(f"Correlation of the log step at which a feature is learnt with its log frequency: {row['log_correlation']:.2f}.")

    canvas, axes = study.figure(rows=1, columns=3, figsize=(16, 4.6))
    bins = 50
    edges = torch.linspace(0, 1, bins + 1, device="cpu", dtype=torch.float32)
    image = torch.stack([torch.histogram(now.float().clamp(0, 1), edges).hist / now.shape[0] for now in cosines]).T
    shown = axes[0].imshow(image.clamp_min(1e-3).log10().numpy(), origin="lower", aspect="auto", extent=(0, steps[-1], 0, 1), cmap="magma")
    canvas.colorbar(shown, ax=axes[0], label="log10 of the share of true features")
    axes[0].set(xlabel="step", ylabel="best cosine", title="Distribution of the true features' best cosines")
    places = torch.linspace(0, cosines.shape[1] - 1, 12, device="cpu", dtype=torch.float32).long().tolist()
    for place, colour in zip(places, colours(len(places))):
        axes[1].plot(steps, cosines[:, place].tolist(), lw=1, color=colour, label=f"{float(seen[place]):.2g} a step")
    axes[1].set(xlabel="step", ylabel="best cosine", ylim=(0, 1.02), title="Single features, from common to rare")
    axes[1].legend(frameon=False, fontsize=6, ncol=2)
    axes[2].scatter(seen[known].tolist(), learnt[known].clamp_min(1).tolist(), s=8, label="learnt")
    if not known.all():
        axes[2].scatter(seen[~known].tolist(), [1.2 * steps[-1]] * int((~known).sum()), s=8, marker="x", color="C3", label="never")
    axes[2].set(xlabel="times a feature is active in a step", ylabel="step at which it is learnt", xscale="log", yscale="log")
    axes[2].set(title="When each feature is learnt")
    study.save(canvas, "phases")


def _for_good(cosines: Tensor, steps: Tensor, level: float) -> Tensor:
    """``[G]``: the first step from which on a feature's best cosine stays above ``level``; -1: never."""
    below = cosines <= level
    last = torch.where(below.any(0), below.shape[0] - 1 - below.flip(0).int().argmax(0), -1)
    return torch.where(last + 1 < below.shape[0], steps[(last + 1).clamp(max=below.shape[0] - 1)], -1)


def _correlation(a: Tensor, b: Tensor) -> float | None:
    if a.shape[0] < 3 or float(a.std()) == 0 or float(b.std()) == 0:
        return None
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])
