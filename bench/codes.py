"""Spline codes of a real model: how many distinct ones a layer has, and which tokens are neighbours.

    python -m bench.codes [--smoke] [--tokens 56000] [--out bench/results/codes]

all-MiniLM-L6-v2 reads Python's documentation; ``fastsae.codes.trace`` hashes and packs the signs before its six GELUs.
``CodeCounter`` counts codes of all neurons, ``count_codes`` those of nested random subsets; ``neighbour_graph`` joins tokens of near codes.
Writes ``codes.json`` and a plot. Needs the extra ``demo``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastsae
from fastsae import plots
from fastsae._core import files
from fastsae._core.machine import machine
from fastsae._core.progress import Bar
from fastsae.lm import packaged

FREQUENT = 12


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.codes", description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--tokens", type=int, default=56_000, help="tokens to read, at least (default: 56000)")
    parser.add_argument("--sample", type=int, default=8192, help="tokens of the neighbour graphs (default: 8192)")
    parser.add_argument("--k", type=int, default=16, help="neighbours of a token (default: 16)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and fastsae (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("bench/results/codes"), help="folder (default: bench/results/codes)")
    parser.add_argument("--smoke", action="store_true", help="2,000 tokens and small samples: does it run?")
    args = parser.parse_args()
    if args.smoke:
        args.tokens, args.sample = 2000, 512
    return args


@torch.inference_mode()
def read(tokens: int, batch: int = 32) -> tuple[list[Tensor], list[Tensor], list[str], Tensor, list[str]]:
    """(codes a layer, hashes a layer, names of the layers, token numbers, the vocabulary)."""
    model, tokenizer = packaged.load("minilm")
    sequences = packaged.minilm_windows(tokenizer, tokens)
    inner = torch.ones_like(sequences)
    inner[:, [0, -1]] = 0  # [CLS] and [SEP] do not count
    codes: list[dict[str, Tensor]] = []
    hashes: list[dict[str, Tensor]] = []
    with (
        fastsae.codes.trace(model, "encoder.*", emit="hash") as hashed,
        fastsae.codes.trace(model, "encoder.*", emit="code") as packed,
        Bar(True, int(inner.sum()), of="token", label="reading") as progress,
    ):
        for part, mask in zip(sequences.split(batch), inner.split(batch)):
            hashed.mask = packed.mask = mask
            model(input_ids=part)
            hashes.append(hashed.pop())
            codes.append(packed.pop())
            progress.update(int(mask.sum()))
    names = list(codes[0])
    joined = [[torch.cat([part[name] for part in parts]) for name in names] for parts in (codes, hashes)]
    vocabulary = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return joined[0], joined[1], names, sequences[:, 1:-1].flatten(), vocabulary


def count(codes: list[Tensor], hashes: list[Tensor], neurons: int) -> dict[str, Any]:
    """Distinct codes of every layer, of the layers up to it, and of nested random subsets of its neurons."""
    layers = {f"layer {i}": one for i, one in enumerate(hashes)}
    upto = {f"layers 0..{i}": fastsae.codes.combine_hashes(hashes[: i + 1]) for i in range(1, len(hashes))}
    counter = fastsae.codes.CodeCounter([*layers, *upto])
    counter.update({**layers, **upto})
    table = counter.table()
    print(table)
    order = torch.randperm(neurons, generator=torch.Generator().manual_seed(0))
    sizes = [n for n in (4, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024) if n < neurons] + [neurons]
    subsets = {
        name: [fastsae.codes.count_codes(fastsae.codes.hash_code(code, neurons=order[:n])).unique.shape[0] for n in sizes]
        for name, code in zip(layers, codes)
    }
    return {"table": [row._asdict() for row in table], "sizes": sizes, "distinct": subsets}


def neighbours(codes: list[Tensor], kind: Tensor, words: list[str], sample: int, k: int) -> dict[str, Any]:
    """How often a neighbour by Hamming distance is the same token, by layer; and for the most frequent tokens, which token it is."""
    from scipy.sparse.csgraph import connected_components

    chosen = torch.randperm(kind.shape[0], generator=torch.Generator().manual_seed(1))[:sample]
    mine = kind[chosen]
    counts = torch.bincount(mine, minlength=len(words))
    chance = float((counts * (counts - 1)).sum()) / (len(mine) * (len(mine) - 1))
    frequent = counts.argsort(descending=True, stable=True)[:FREQUENT]
    place = torch.full((len(words),), FREQUENT).scatter(0, frequent, torch.arange(FREQUENT))[mine]
    rows: list[dict[str, Any]] = []
    for layer, code in enumerate(codes):
        graph = fastsae.codes.neighbour_graph(code[chosen], k, symmetric=False)
        row = torch.arange(len(chosen)).repeat_interleave(k)
        column = torch.from_numpy(graph.indices.astype("int64"))
        same = float((mine[row] == mine[column]).double().mean())
        between = torch.bincount(place[row] * (FREQUENT + 1) + place[column], minlength=(FREQUENT + 1) ** 2)
        shares = between.view(FREQUENT + 1, -1)[:FREQUENT].double()
        shares /= shares.sum(1, keepdim=True)
        parts = int(connected_components(graph, directed=False)[0])
        found = {"layer": layer, "same_token": same, "mean_distance": float(graph.data.mean()), "components": parts}
        rows.append({**found, "shares": [[round(share, 4) for share in line] for line in shares.tolist()]})
        print(f"layer {layer}: {100 * same:.1f} % of the {k} nearest are the same token (chance {100 * chance:.1f} %), {parts} components")
    return {"sample": len(chosen), "k": k, "chance": chance, "frequent": [words[t] for t in frequent.tolist()], "layers": rows}


def draw(near: dict[str, Any], path: Path) -> None:
    canvas, axes = plots.figure(figsize=(7, 3.8))
    axes.bar([row["layer"] for row in near["layers"]], [100 * row["same_token"] for row in near["layers"]], color="C0", width=0.6)
    axes.axhline(100 * near["chance"], color="C1", ls="--", label=f"by chance: {100 * near['chance']:.1f} %")
    axes.set(xlabel="layer", ylabel=f"% of the {near['k']} nearest that are\nthe same token")
    axes.set_title("Neighbours by Hamming distance of codes")
    plots.finish(canvas, path)


def main() -> int:
    args = arguments()
    if (absent := packaged.missing("minilm")) is not None:
        print(f"bench.codes needs {absent}: pip install 'fastsae-kernels[demo]'", file=sys.stderr)
        return 1
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    codes, hashes, names, kind, words = read(args.tokens)
    # The model's MLP width, from its words: 64 neurons each.
    neurons = codes[0].shape[1] * 64
    for number, (code, value) in enumerate(zip(codes, hashes)):
        if not torch.equal(fastsae.codes.hash_code(code, layer=number), value):
            raise RuntimeError(f"codes: hashes of {names[number]} while it ran and of its packed codes differ")
    about = {"model": "all-MiniLM-L6-v2", "tokens": kind.shape[0], "kinds": int(kind.unique().shape[0]), "neurons": neurons}
    near = neighbours(codes, kind, words, args.sample, args.k)
    results = {**about, "layers": names, "threads": args.threads, "machine": machine(), "counts": count(codes, hashes, neurons)}
    files.replace_text(args.out / "codes.json", json.dumps({**results, "neighbours": near}, indent=1) + "\n")
    draw(near, args.out / "neighbours.png")
    print(f"wrote codes.json and neighbours.png into {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
