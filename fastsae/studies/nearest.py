"""How far does choosing among linear maps go, and how much of a classifier is the choice?

A ReLU classifier is one affine map in each of its regions. Here ``fastsae.polytopes.NearestAffine`` imitates one: N centres, a map at each,
the nearest centre chooses. The centres are images, the maps those of the network there (nothing fitted), or maps, choice or both are
fitted to the network's logits on mixtures of training images; choice is fitted through a softmax over centres that sharpens, and judged
hard, on images that nothing has seen. Freezing one and learning the other tells what each carries: maps of random centres, a choice
among random maps, a choice among constants. Of the network itself: the map of one image's region applied to an image of another class,
whose answer comes out?
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsae.polytopes import NearestAffine, affine_map
from fastsae.studies import Study
from fastsae.studies._networks import digits, lines, pairs

SIZES = {
    "smoke": {"minutes": 0.05, "hidden": [16, 16], "epochs": 3, "numbers": [1, 8], "steps": 20, "fit_rows": 256},
    "default": {"minutes": 5, "hidden": [64, 64], "epochs": 60, "numbers": [1, 8, 64, 512], "steps": 1000, "fit_rows": 32768},
}  # fmt: skip
KINDS = {  # which of centres, maps and constants are fitted
    "its maps, nothing fitted": (),
    "its maps, choice fitted": ("centres",),
    "maps fitted": ("A", "c"),
    "both fitted": ("centres", "A", "c"),
    "maps fitted, random centres": ("A", "c"),
    "choice fitted, random maps": ("centres",),
    "choice of constants": ("centres", "c"),
}


def run(study: Study) -> None:
    one = digits(study)
    net, seen, generator = one.net, one.seen, study.generator(4)
    i, j = torch.randint(len(seen), (2, study["fit_rows"]), generator=generator, device="cpu")
    mixed = torch.lerp(seen[i], seen[j], torch.rand(len(i), 1, generator=generator, device="cpu", dtype=torch.float32) / 2)
    wanted, asked = net(mixed), net(one.x)
    order, rows = torch.randperm(len(seen), generator=generator, device="cpu"), list[dict[str, Any]]()
    for number, kind in study.track([(number, kind) for number in study["numbers"] for kind in KINDS], "fitting"):
        centres = seen[order[:number]]
        A, c = affine_map(net, centres)
        noise = [torch.randn(t.shape, generator=study.generator(5), device="cpu", dtype=torch.float32) for t in (centres, A)]
        centres = seen.mean(0) + seen.std(0) * noise[0] if "random centres" in kind else centres
        if kind == "choice of constants":
            A, c = 0 * A, net(centres)
        A = A.std() * noise[1] if "random maps" in kind else A
        system = fitted(study, {"centres": centres, "A": A, "c": c}, KINDS[kind], mixed, wanted)
        y = system(one.x).detach()
        agrees, right = (float((y.argmax(1) == t).double().mean()) for t in (asked.argmax(1), one.y))
        error = (y - asked).square().sum() / (asked - asked.mean(0)).square().sum()
        used = len(system.nearest(one.x).unique())
        rows.append({"kind": kind, "N": number, "agrees": agrees, "accuracy": right, "fvu": float(error), "centres_used": used})
    study.table("imitations", rows)
    best = {kind: max((row for row in rows if row["kind"] == kind), key=lambda row: row["agrees"]) for kind in KINDS}
    shown = {kind: f"{kind} {row['agrees']:.1%} (N = {row['N']})" for kind, row in best.items()}
    single = next(row["agrees"] for row in rows if row["kind"] == "maps fitted" and row["N"] == min(study["numbers"]))
    study.say(
        f"One linear map agrees with the network (accuracy {one.accuracy:.1%}) on {single:.1%} of unseen images; choosing the nearest of N "
        f"reaches, at the best N, {', '.join(list(shown.values())[:4])}; one frozen at random, {', '.join(list(shown.values())[4:])}."
    )
    a, b = pairs(one.y, 10_000, study.generator(6), False)
    A, c = affine_map(net, one.x)
    own = asked.argmax(1)
    a, b = a[own[a] != own[b]], b[own[a] != own[b]]
    answer = (torch.einsum("ned,nd->ne", A[a], one.x[b]) + c[a]).argmax(1)
    region, inside = (float((answer == own[t]).double().mean()) for t in (a, b))
    study.record(of_the_region=region, of_the_image=inside)
    study.say(
        f"The network's map of one image's region, applied to an image of another class, answers with the class of the region for "
        f"{region:.1%} of pairs and with that of the image for {inside:.1%}."
    )
    canvas, axes = study.figure(rows=1, columns=2, figsize=(12, 4.6))
    options: dict[str, Any] = {"xscale": "log", "xlabel": "maps N"}
    lines(axes[0], rows, "kind", "N", "agrees", ylim=(0, 1.02), ylabel="agrees with the network", title="Classes", **options)
    lines(axes[1], rows, "kind", "N", "fvu", yscale="log", ylabel="unexplained share", title="Logits", **options)
    study.save(canvas, "nearest")


def fitted(study: Study, start: dict[str, Tensor], learn: tuple[str, ...], x: Tensor, wanted: Tensor) -> NearestAffine:
    """Adam on the squared error of the logits; without "centres" in ``learn`` through the hard choice, else through the sharpening one."""
    parts = {name: value.clone().requires_grad_(name in learn) for name, value in start.items()}
    system = NearestAffine(*parts.values())
    if not learn:
        return system
    optimiser, generator, steps = torch.optim.Adam([parts[name] for name in learn]), study.generator(7), study["steps"]
    for step in range(steps):
        rows = torch.randint(len(x), (256,), generator=generator, device="cpu")
        if "centres" in learn:
            score = x[rows] @ parts["centres"].T - parts["centres"].square().sum(1) / 2
            each = x[rows] @ parts["A"].mT + parts["c"].unsqueeze(1)
            y = torch.einsum("bn,nbe->be", (score * 30 ** (step / steps)).softmax(1), each)
        else:
            y = system(x[rows])
        optimiser.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        optimiser.zero_grad()
        F.mse_loss(y, wanted[rows]).backward()
        optimiser.step()
    return system
