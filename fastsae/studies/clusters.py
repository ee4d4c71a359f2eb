"""Do spline codes cluster like activations?

The experiment behind Figure 12 of Black et al. 2022: HDBSCAN on the activations of an MLP's neurons and on their spline codes under the
Hamming distance. Here on MLP inputs of all-MiniLM-L6-v2 whose word is known, so that clusters can be held against words. Both clusterings
get the same treatment: the graph of the k nearest neighbours, exact, as precomputed distances
(``fastsae.codes.neighbour_graph`` for codes).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastsae
from fastsae._core.extras import needed
from fastsae.polytopes.net import Activation, activate
from fastsae.studies import Study
from fastsae.studies._networks import tokens

SIZES = {
    "smoke": {
        "minutes": 0.05, "source": "digits", "hidden": [32, 32], "epochs": 3, "tokens": 0, "layer": 0, "each": 0, "k": 20, "least": 10,
        "samples": 5,
    },
    "quick": {
        "minutes": 2, "source": "minilm", "hidden": [], "epochs": 0, "tokens": 12_000, "layer": 3, "each": 12, "k": 30, "least": 6,
        "samples": 4,
    },
    "default": {
        "minutes": 5, "source": "minilm", "hidden": [], "epochs": 0, "tokens": 56_000, "layer": 3, "each": 24, "k": 40, "least": 10,
        "samples": 5,
    },
}  # fmt: skip


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


def euclidean_graph(x: Tensor, k: int) -> Any:
    """As ``fastsae.codes.neighbour_graph`` for Euclidean distances."""
    from sklearn.neighbors import NearestNeighbors

    graph = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(x.numpy()).kneighbors_graph(mode="distance")
    graph.data[graph.data == 0] = 1e-9
    return graph.maximum(graph.T).tocsr()


def run(study: Study) -> None:
    agreement = needed("sklearn.metrics", "clusters needs scikit-learn and SciPy", "studies").adjusted_mutual_info_score
    data = tokens(study)
    z = data.net.preactivations(data.x)[0]
    act = next(stage for stage in data.net.stages if isinstance(stage, Activation))
    k, least, samples = study["k"], study["least"], study["samples"]
    graphs = {
        "codes, Hamming": lambda: fastsae.codes.neighbour_graph(fastsae.codes.pack_signs(z), k),
        "activations, Euclidean": lambda: euclidean_graph(activate(z, act), k),
        "pre-activations, Euclidean": lambda: euclidean_graph(z, k),
        "MLP inputs, Euclidean": lambda: euclidean_graph(data.x, k),
    }
    labels = {name: cluster(make(), least, samples) for name, make in study.track(graphs.items(), "clustering")}
    rows = []
    for name, found in labels.items():
        inside = found >= 0
        commonest = [int(torch.bincount(data.kind[found == label]).max()) for label in range(int(found.max()) + 1)]
        rows.append({
            "clustered": name, "clusters": int(found.max()) + 1, "noise": float((~inside).float().mean()),
            "purity": sum(commonest) / max(int(inside.sum()), 1),
            "with_words": float(agreement(data.kind, found)),
            "with_words_without_noise": float(agreement(data.kind[inside], found[inside])) if bool(inside.any()) else 0.0,
            "with_codes_clusters": float(agreement(labels["codes, Hamming"], found)),
        })  # fmt: skip
    study.table("clusterings", rows)
    study.say(f"{len(data.kind)} samples of {len(data.names)} kinds: {data.source}; {z.shape[1]} neurons.")
    codes, activations = rows[0], rows[1]
    study.say(
        f"Codes give {codes['clusters']} clusters ({codes['noise']:.0%} noise, purity {codes['purity']:.2f}), activations "
        f"{activations['clusters']} ({activations['noise']:.0%} noise, purity {activations['purity']:.2f}); adjusted mutual information "
        f"with the kinds {codes['with_words']:.3f} and {activations['with_words']:.3f}, with each other "
        f"{activations['with_codes_clusters']:.3f}."
    )
    found = labels["codes, Hamming"]
    examples = []
    for label in torch.bincount(found[found >= 0]).argsort(descending=True)[:12].tolist() if bool((found >= 0).any()) else []:
        kinds, counts = data.kind[found == label].unique(return_counts=True)
        best = counts.argsort(descending=True)[:6]
        shown = ", ".join(f"{data.names[int(kinds[i])]} {int(counts[i])}" for i in best)
        examples.append({"cluster": label, "size": int(counts.sum()), "kinds": len(kinds), "commonest": shown})
    study.table("largest_clusters_of_codes", examples)

    canvas, axes = study.figure(rows=1, columns=3, figsize=(15, 4.2))
    names = list(labels)
    measures = {"with_words": "AMI with the kinds", "purity": "purity of clusters", "noise": "share of noise"}
    for place, (column, title) in enumerate(measures.items()):
        axes[0].barh([i + 0.27 * (place - 1) for i in range(len(rows))], [row[column] for row in rows], height=0.25, label=title)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].set(xlim=(0, 1), title="HDBSCAN against what each sample is")
    axes[0].legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3)
    for name in names[:2]:
        sizes = torch.bincount(labels[name][labels[name] >= 0]).sort(descending=True).values
        axes[1].plot(range(1, len(sizes) + 1), sizes, ".-", label=name)
    axes[1].set(xlabel="cluster, by size", ylabel="samples", yscale="log", title="Sizes of clusters")
    generator = study.generator(5)
    a, b = torch.randint(len(z), (2, 20_000), generator=generator, device="cpu")
    packed = fastsae.codes.pack_signs(z)
    hamming = fastsae.codes.boundary_density(packed[a], packed[b]).pairs
    euclid = (activate(z[a], act) - activate(z[b], act)).norm(dim=1)
    same = (data.kind[a] == data.kind[b]) & (a != b)
    correlation = float(torch.corrcoef(torch.stack([hamming, euclid]))[0, 1])
    axes[2].plot(hamming[~same], euclid[~same], ",", color="0.6", label="different kinds")
    axes[2].plot(hamming[same], euclid[same], ".", ms=3, color="C0", label="same kind")
    axes[2].set(xlabel="Hamming distance of codes", ylabel="Euclidean distance of activations")
    axes[2].set_title(f"Pairs of samples, correlation {correlation:.2f}")
    axes[2].legend(frameon=False, markerscale=3)
    study.say(f"Hamming distance of codes and Euclidean distance of activations of random pairs correlate at {correlation:.3f}.")
    study.save(canvas, "clusters")
