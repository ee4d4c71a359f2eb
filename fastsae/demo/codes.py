"""Spline codes of the demo's layer: how many are distinct, and how far apart those of equal words lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastsae
from fastsae import codes
from fastsae.demo.data import Data


def differing_bits(a: Tensor, b: Tensor) -> int:
    """In which row i of ``a`` and row i of ``b`` differ, over all rows."""
    return sum(int(codes.hamming(p, q).diagonal().sum()) for p, q in zip(a.split(256), b.split(256)))


def _pairs(data: Data, rows: int, each: int = 8) -> Tensor:
    """Rows of words that occur twice or more, at most ``each`` of a word, in words drawn at random until there are ``rows``."""
    generator = torch.Generator().manual_seed(0)
    pick = data["word"].nonzero().flatten()
    pick = pick[torch.randperm(pick.shape[0], generator=generator)]
    chosen: list[Tensor] = []
    kind, found = data["kind"][pick], 0
    values, counts = kind.unique(return_counts=True)
    often = values[counts > 1]
    for value in often[torch.randperm(often.shape[0], generator=generator)]:
        chosen.append(pick[(kind == value).nonzero().flatten()[:each]])
        found += chosen[-1].shape[0]
        if found >= rows:
            break
    return torch.cat(chosen)


def distances_and_counts(data: Data, rows: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Distinct codes (of all neurons, of nested random subsets), and Hamming distances by kind: (results, counts for the plot)."""
    n, neurons = data["x"].shape[0], data["W"].shape[0]
    words = torch.cat([fastsae.spline_code(part, data["W"], data["b"]) for part in data["layer_in"].split(8192)])
    own = torch.cat([codes.pack_signs(part) for part in data["pre"].split(8192)])
    order = torch.randperm(neurons, generator=torch.Generator().manual_seed(0))
    sizes = [size for size in (8 << i for i in range(20)) if size < neurons] + [neurons]
    distinct = [codes.count_codes(codes.hash_code(words, neurons=order[:size])).unique.shape[0] for size in sizes]

    pick = _pairs(data, rows)
    some, kind = words[pick], data["kind"][pick]
    distance = codes.hamming(some, some)
    same = (kind[:, None] == kind).triu(1)
    other = (kind[:, None] != kind).triu(1)
    counts = {name: torch.bincount(distance[mask], minlength=neurons + 1) for name, mask in (("same", same), ("different", other))}
    near = codes.hamming_topk(some, some, min(8, some.shape[0])).index
    nearest = near.gather(1, (near != torch.arange(near.shape[0])[:, None]).int().argmax(1, keepdim=True)).flatten()
    groups = kind.unique(return_counts=True)[1].double()
    total = pick.shape[0]
    results = {
        "neurons": neurons,
        "samples": n,
        "distinct_kinds": int(data["kind"].unique().shape[0]),
        "distinct": dict(zip(map(str, sizes), distinct)),
        "bits_other_than_the_models_own": differing_bits(words, own),
        "bits": n * neurons,
        "hamming_rows": total,
        "hamming_kinds": int(groups.shape[0]),
        "hamming_mean_same": float(distance[same].double().mean()),
        "hamming_mean_different": float(distance[other].double().mean()),
        "nearest_code_same_kind": float((kind[nearest] == kind).double().mean()),
        "nearest_code_same_kind_by_chance": float((groups * (groups - 1)).sum() / (total * (total - 1))),
    }
    return results, counts
