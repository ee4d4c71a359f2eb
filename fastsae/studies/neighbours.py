"""Does the nearest polytope of a token hold the same computation?

A search engine for computations (Black et al. 2022 hoped for one) without clicks: the code of a token is the sign of every neuron of every
MLP, of a gated one (SmolLM2) its gates, packed to one bit each. For tokens of one text the nearest codes among all tokens of other windows
by Hamming distance, layer by layer and over all layers, beside the nearest by cosine of the activations that enter the MLP. Inside one
layer the distance is the number of boundaries between the two. Whether neighbours compute the same is asked three ways: are they the same
token, does the model predict the same next token, and how many boundaries of the other layers lie between them?
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae.codes import CodeCounter, boundary_density, hamming_topk, hash_code, trace
from fastsae.compare import match_cosine
from fastsae.lm.hooks import find, watch
from fastsae.studies import Study
from fastsae.studies._language import Language, language

SIZES = {
    "smoke": {
        "minutes": 0.05, "source": "random", "context": 16, "train_tokens": 512, "held_tokens": 16, "layers": [0, 1], "queries": 16,
        "shown": 2,
    },
    "default": {
        "minutes": 18, "source": "smollm2", "context": 128, "train_tokens": 200_000, "held_tokens": 128, "layers": [0, 6, 12, 18, 24, 29],
        "queries": 1000, "shown": 4,
    },
}  # fmt: skip


def run(study: Study) -> None:
    found, layers = language(study), study["layers"]
    windows, _ = found.split(study["train_tokens"], study["held_tokens"], study["context"])
    codes, x, predicted = read(study, found, windows)
    at = (~torch.isin(windows, torch.tensor(found.special, device="cpu"))).nonzero()
    window, token = at[:, 0], windows[at[:, 0], at[:, 1]]
    query = torch.randperm(len(at), generator=study.generator(4), device="cpu")[: study["queries"]]
    k, counter = study["context"], CodeCounter(layers)  # of so many neighbours at least one is of another window
    near = {"all layers, code": hamming_topk(codes[query].flatten(1), codes.flatten(1), k).index}
    for layer in study.track(layers, "searching"):
        own, inputs = codes[:, layer].contiguous(), x[layer]
        counter.update({layer: hash_code(own)})
        near[f"layer {layer}, code"] = hamming_topk(own[query], own, k).index
        near[f"layer {layer}, cosine"] = match_cosine(inputs[query], inputs, k=k).index
    near["at random"] = torch.randint(len(at), (len(query), k), generator=study.generator(5), device="cpu")
    canvas, axes = study.figure(rows=1, columns=2, figsize=(13, 5))
    rows, partners = dict[str, dict[str, Any]](), dict[str, Tensor]()
    for name, index in near.items():
        elsewhere = (window[index] != window[query].unsqueeze(1)).to(torch.uint8)
        partners[name] = partner = index.gather(1, elsewhere.argmax(1, keepdim=True))[:, 0]
        same = [float((values[query] == values[partner]).double().mean()) for values in (token, predicted)]
        between = boundary_density(codes[query], codes[partner]).pairs.mean(0)
        rows[name] = {"nearest by": name, "same_token": same[0], "same_prediction": same[1], "boundaries": float(between.sum())}
        if "cosine" not in name:
            axes[0].plot(between.tolist(), ".-", label=name)
    study.table("neighbours", rows.values())
    study.table("distinct_codes", [entry._asdict() for entry in counter.table()])
    best, random = rows["all layers, code"], rows["at random"]
    study.say(
        f"Of {len(query)} tokens among {len(at)}, the nearest polytope of another window over all {codes.shape[1]} layers is the same "
        f"token for {best['same_token']:.0%} and predicts the same next token for {best['same_prediction']:.0%} (a random one "
        f"{random['same_prediction']:.0%}); {best['boundaries']:.0f} boundaries lie between, {random['boundaries']:.0f} at random."
    )
    each = {kind: [rows[f"layer {layer}, {kind}"]["same_prediction"] for layer in layers] for kind in ("code", "cosine")}
    one = [float((partners[f"layer {n}, code"] == partners[f"layer {n}, cosine"]).double().mean()) for n in layers]
    listed = [", ".join(f"{value:.0%}" for value in values) for values in (*each.values(), one)]
    study.say(
        f"In layers {', '.join(map(str, layers))} the nearest code predicts the same for {listed[0]}, the nearest by cosine for "
        f"{listed[1]}; both are the same place in the text for {listed[2]}."
    )
    for kind, values in each.items():
        axes[1].plot(layers, values, "o-", label=f"of one layer, {kind}")
    axes[1].axhline(best["same_prediction"], ls=":", color="0.4", label="all layers, code")
    axes[0].set(xlabel="layer", ylabel="boundaries between (mean)", title="Between a token and its neighbour")
    axes[1].set(xlabel="layer", ylabel="share of tokens", ylim=(0, 1), title="The model predicts the same next token")
    study.save(canvas, "neighbours")
    text = {name: [context(found, windows, *at[row].tolist()) for row in partner.tolist()] for name, partner in partners.items()}
    own = [context(found, windows, *at[row].tolist()) for row in query.tolist()]
    shown = [(name, i) for i in range(study["shown"]) for name in near if name != "at random"]
    study.table("examples", [{"nearest by": name, "token": own[i], "neighbour": text[name][i]} for name, i in shown])


@torch.no_grad()
def read(study: Study, found: Language, windows: Tensor) -> tuple[Tensor, dict[int, Tensor], Tensor]:
    """Without special tokens: (codes ``[tokens, layers, words]``, what enters the MLPs of the layers in bfloat16, tokens predicted)."""
    points = find("study", found.model, [found.mlp_input(layer) for layer in study["layers"]])
    x: list[list[Tensor]] = [[] for _ in points]
    codes, predicted, handles = list[Tensor](), list[Tensor](), list[Any]()
    with trace(found.model, emit="code") as traced:
        for point, parts in zip(points, x):
            handles.append(watch(point, lambda h, parts=parts: parts.append(h[traced.mask].bfloat16())))
        for part in study.track(windows.split(16), "reading"):
            traced.mask = kept = ~torch.isin(part, torch.tensor(found.special, device="cpu"))
            predicted.append(found.logits(part)[kept].argmax(-1))
            codes.append(torch.stack(list(traced.pop().values()), 1))
    for handle in handles:
        handle.remove()
    return torch.cat(codes), dict(zip(study["layers"], map(torch.cat, x))), torch.cat(predicted)


def context(found: Language, windows: Tensor, window: int, place: int) -> str:
    """A token in brackets behind the eight before it."""
    words = [found.word(token) for token in windows[window, max(0, place - 8) : place + 1].tolist()]
    return " ".join(f"{''.join(words[:-1])}[{words[-1]}]".split())
