"""Do spline codes cluster like activations?

The experiment behind Figure 12 of Black et al. 2022: HDBSCAN on the activations of a layer's neurons and on their spline codes. After
theirs: the whole MLP of a causal language model at 6 of the 1024 tokens of each window, evenly spaced, none of the first 100 (known: the
token); and all channels of a convolutional network at one place of the image (the digit). Beside them an MLP with GELU at tokens of words
that all occur equally often (the word). Hard codes are compared by Hamming and by Jaccard distance, soft ones (the probability that a
neuron is on, of SiLU and GELU) by the expected Hamming distance, and by the root of what is left of it without the distances that both
codes have from themselves, the Euclidean one. All clusterings get the exact graph of the k nearest neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae._core.extras import needed
from fastsae.codes import boundary_density, neighbour_graph, pack_signs
from fastsae.lm import harvest
from fastsae.polytopes import expected_hamming, soft_code
from fastsae.polytopes.net import Activation, activate
from fastsae.studies import Study
from fastsae.studies._language import language
from fastsae.studies._networks import digits, tokens

SIZES = {
    "smoke": {
        "minutes": 0.1, "source": "random", "context": 64, "skip": 8, "train_tokens": 1_024, "held_tokens": 0, "layer": 1, "gate": ".0",
        "neurons": ".1", "soft": "gelu", "words": "digits", "hidden": [32, 32], "epochs": 3, "tokens": 0, "word_layer": 1, "each": 0,
        "channels": [8, 8], "k": 20, "least": 10, "samples": 5,
    },
    "default": {
        "minutes": 10, "source": "smollm2", "context": 1024, "skip": 100, "train_tokens": 150_000, "held_tokens": 0, "layer": 12,
        "gate": ".mlp.gate_proj", "neurons": ".mlp.down_proj:input", "soft": "silu", "words": "minilm", "hidden": [], "epochs": 30,
        "tokens": 24_000, "word_layer": 3, "each": 16, "channels": [32, 64, 64], "k": 30, "least": 6, "samples": 4,
    },
}  # fmt: skip
PLACES = 6
HARD, JACCARD, SOFT, LESS_OWN, VALUES = METHODS = (
    "codes, Hamming", "codes, Jaccard", "soft codes, expected Hamming", "soft codes, Euclidean", "activations, Euclidean"
)  # fmt: skip


class Sample(NamedTuple):
    """Rows of a layer: pre-activations and activations ``[N, H]``, the kind of activation, and what each row is ``[N]``, in words."""

    z: Tensor
    neurons: Tensor
    act: str
    kind: Tensor
    word: Callable[[int], str]


def causal(study: Study) -> Sample:
    found = language(study)
    windows, _ = found.split(study["train_tokens"], study["held_tokens"], study["context"])
    hooks = [found.layer.format(study["layer"]) + study[side] for side in ("gate", "neurons")]
    places = torch.linspace(study["skip"], study["context"] - 1, PLACES, dtype=torch.float64, device="cpu").long()

    def read(part: Tensor) -> list[Tensor]:
        with TemporaryDirectory() as folder:
            shards = harvest(found.model, part, hooks, folder, dtype=torch.float32, batch=2, progress=False)
            return [rows.view(*part.shape, -1)[:, places].flatten(0, 1) for rows in shards.read(0, shards.rows, hooks).values()]

    parts = list(enumerate(windows.split(8)))
    z, neurons = zip(*(study.part("tokens", str(n), lambda part=part: read(part)) for n, part in study.track(parts, "tokens")))
    return Sample(torch.cat(z), torch.cat(neurons), study["soft"], windows[:, places].flatten(), found.word)


def words(study: Study) -> Sample:
    (data,) = tokens(study, study["words"], [study["word_layer"]])
    z = data.net.preactivations(data.x)[0]
    act = next(stage for stage in data.net.stages if isinstance(stage, Activation))
    return Sample(z, activate(z, act), act.kind, data.kind, data.names.__getitem__)


def channels(study: Study) -> Sample:
    data = digits(study, channels=study["channels"])
    z = data.net.preactivations(data.x)[-1].view(len(data.x), -1, 8, 8)[:, :, 4, 4]
    return Sample(z, z.relu(), "relu", data.y, str)


def graph(distance: Tensor, k: int) -> Any:
    """As ``fastsae.codes.neighbour_graph``, of a matrix of distances."""
    sparse = needed("scipy.sparse", "clusters needs scikit-learn and SciPy", "studies")
    near = distance.fill_diagonal_(torch.inf).topk(k, largest=False)
    ends, size = torch.arange(0, k * len(distance) + 1, k, device="cpu"), tuple(distance.shape)
    found = sparse.csr_array((near.values.double().clamp_min(1e-9).flatten().numpy(), near.indices.flatten().numpy(), ends.numpy()), size)
    return found.maximum(found.T).tocsr()


def graphs(sample: Sample, k: int) -> dict[str, Any]:
    bits = (sample.z > 0).float()
    on, both = bits.sum(1), bits @ bits.T
    found = {HARD: neighbour_graph(pack_signs(sample.z), k), JACCARD: graph(1 - both / (on.unsqueeze(1) + on - both).clamp_min(1), k)}
    if sample.act != "relu":  # whose soft code is the hard one
        soft = soft_code(sample.z, sample.act)
        found |= {SOFT: graph(expected_hamming(soft, soft), k), LESS_OWN: graph(torch.cdist(soft, soft), k)}
    return found | {VALUES: graph(torch.cdist(sample.neurons, sample.neurons), k)}


def cluster(graph: Any, least: int, samples: int) -> Tensor:
    """Labels (-1: noise) of HDBSCAN on a sparse graph of distances, each connected component on its own."""
    from scipy.sparse.csgraph import connected_components
    from sklearn.cluster import HDBSCAN

    count, component = connected_components(graph, directed=False)
    labels = torch.full((graph.shape[0],), -1, device="cpu")
    sizes = torch.bincount(torch.from_numpy(component).long(), minlength=count)
    for part in sizes.argsort(descending=True).tolist():
        if int(sizes[part]) < max(least, samples + 1):
            continue
        rows = torch.from_numpy((component == part).nonzero()[0])
        options: Any = {"allow_single_cluster": int(sizes[part]) < len(labels) // 2, "copy": True}
        method = HDBSCAN(min_cluster_size=least, min_samples=samples, metric="precomputed", **options)
        found = torch.from_numpy(method.fit_predict(graph[rows.numpy()][:, rows.numpy()])).long()
        labels[rows] = torch.where(found >= 0, found + int(labels.max()) + 1, -1)
    return labels


def run(study: Study) -> None:
    agreement = needed("sklearn.metrics", "clusters needs scikit-learn and SciPy", "studies").adjusted_mutual_info_score
    made = {"language model": causal(study), "words": words(study), "convolution": channels(study)}
    labels: dict[str, dict[str, Tensor]] = {}
    rows: list[dict[str, Any]] = []
    for source, sample in study.track(made.items(), "clustering"):
        labels[source] = {name: cluster(one, study["least"], study["samples"]) for name, one in graphs(sample, study["k"]).items()}
        for name, found in labels[source].items():
            commonest = [int(sample.kind[found == label].unique(return_counts=True)[1].max()) for label in range(int(found.max()) + 1)]
            rows.append({
                "source": source, "clustered": name, "samples": len(found), "clusters": int(found.max()) + 1,
                "noise": float((found < 0).float().mean()), "purity": sum(commonest) / max(int((found >= 0).sum()), 1),
                "with_kinds": float(agreement(sample.kind, found)), "with_activations": float(agreement(labels[source][VALUES], found)),
            })  # fmt: skip
    study.table("clusterings", rows)
    of = {(row["source"], row["clustered"]): row for row in rows}

    def listed(name: str, column: str) -> str:
        return ", ".join(f"{of[source, name][column]:.2f} ({source})" for source in made if (source, name) in of)

    alike = [source for source in made if of[source, HARD]["with_activations"] > 0.5]
    study.say(
        f"Like activations (by half or more) cluster the codes of: {', '.join(alike) or 'none'}. Clusters of codes agree with those of "
        f"activations with an adjusted mutual information of {listed(HARD, 'with_activations')}, and "
        f"with what the samples are of {listed(HARD, 'with_kinds')}, where activations have {listed(VALUES, 'with_kinds')}."
    )
    study.say(
        f"By Jaccard distance codes agree with what the samples are by {listed(JACCARD, 'with_kinds')}, soft codes by "
        f"{listed(SOFT, 'with_kinds')} (expected Hamming) and {listed(LESS_OWN, 'with_kinds')} (Euclidean)."
    )
    source = "language model"
    study.table("largest_clusters_of_codes", largest(made[source], labels[source][HARD]))
    draw(study, made[source], of)


def largest(sample: Sample, found: Tensor) -> list[dict[str, Any]]:
    rows = []
    for label in torch.bincount(found[found >= 0]).argsort(descending=True)[:12].tolist() if bool((found >= 0).any()) else []:
        kinds, counts = sample.kind[found == label].unique(return_counts=True)
        best = counts.argsort(descending=True)[:6]
        shown = ", ".join(f"{sample.word(int(kinds[i]))!r} {int(counts[i])}" for i in best)
        rows.append({"cluster": label, "size": int(counts.sum()), "kinds": len(kinds), "commonest": shown})
    return rows


def draw(study: Study, sample: Sample, of: dict[tuple[str, str], dict[str, Any]]) -> None:
    canvas, axes = study.figure(rows=1, columns=3, figsize=(16, 4.2))
    sources = list(dict.fromkeys(source for source, _ in of))
    panels = (("with_kinds", "with what samples are"), ("with_activations", "with clusters of activations"))
    for axis, (column, title) in zip(axes, panels):
        for place, name in enumerate(METHODS):
            bars = [(i + 0.17 * (place - 2), of[source, name][column]) for i, source in enumerate(sources) if (source, name) in of]
            axis.barh([at for at, _ in bars], [value for _, value in bars], height=0.15, label=name if axis is axes[0] else None)
        axis.set_yticks(range(len(sources)), sources)
        axis.invert_yaxis()
        axis.set(xlim=(0, 1), xlabel="adjusted mutual information", title=f"Agreement {title}")
    axes[0].legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    a, b = torch.randint(len(sample.z), (2, 20_000), generator=study.generator(5), device="cpu")
    packed, same = pack_signs(sample.z), (sample.kind[a] == sample.kind[b]) & (a != b)
    hamming, euclid = boundary_density(packed[a], packed[b]).pairs, (sample.neurons[a] - sample.neurons[b]).norm(dim=1)
    correlation = float(torch.corrcoef(torch.stack([hamming, euclid]))[0, 1])
    axes[2].plot(hamming[~same], euclid[~same], ",", color="0.6", label="different tokens")
    axes[2].plot(hamming[same], euclid[same], ".", ms=3, color="C0", label="same token")
    axes[2].set(xlabel="Hamming distance of codes", ylabel="Euclidean distance of activations")
    axes[2].set_title(f"Language model: pairs, correlation {correlation:.2f}")
    axes[2].legend(frameon=False, markerscale=3)
    study.save(canvas, "clusters")
