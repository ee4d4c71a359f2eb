"""Spline codes of a real model: how many distinct ones a layer has, which tokens are neighbours, and what plain ways of asking cost.

    python -m bench.codes [--smoke] [--tokens 56000] [--out bench/results/codes]

all-MiniLM-L6-v2 reads Python's documentation; ``fastsae.codes.trace`` hashes and packs the signs before its six GELUs.
``CodeCounter`` counts codes of all neurons, ``count_codes`` those of nested random subsets; ``neighbour_graph`` joins tokens of near codes.
The plain ways are the products of 0/1 matrices of NASWOT (Mellor et al. 2021, agreement of all pairs) and TE-NAS (Chen, Gong & Wang 2021,
distinct patterns from all pairs), written here from their formulas. Writes ``codes.json`` and four plots. Needs the extra ``demo``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastsae
from fastsae._core import files
from fastsae._core.machine import machine
from fastsae._core.progress import Bar
from fastsae._core.timing import alternate, milliseconds
from fastsae.lm import packaged
from fastsae.plots import figure

ROUNDS = 5
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
    layers = [f"layer {i}" for i in range(len(codes))]
    counter = fastsae.codes.CodeCounter([*layers, *(f"layers 0..{i}" for i in range(1, len(codes)))])
    step = 8192
    for start in range(0, codes[0].shape[0], step):
        part = [h[start : start + step] for h in hashes]
        counter.update(
            {
                **dict(zip(layers, part)),
                **{f"layers 0..{i}": fastsae.codes.combine_hashes(part[: i + 1]) for i in range(1, len(codes))},
            }
        )
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
        rows.append(
            {
                "layer": layer,
                "same_token": same,
                "mean_distance": float(graph.data.mean()),
                "components": parts,
                "shares": [[round(share, 4) for share in line] for line in shares.tolist()],
            }
        )
        print(f"layer {layer}: {100 * same:.1f} % of the {k} nearest are the same token (chance {100 * chance:.1f} %), {parts} components")
    return {"sample": len(chosen), "k": k, "chance": chance, "frequent": [words[t] for t in frequent.tolist()], "layers": rows}


def unpacked(codes: Tensor, neurons: int) -> Tensor:
    return ((codes.unsqueeze(-1) >> torch.arange(64)) & 1).flatten(1)[:, :neurons].float()


def naswot(bits: Tensor) -> Tensor:
    """Neurons on which a pair agrees: ``C C' + (1 - C)(1 - C)'``."""
    return bits @ bits.T + (1 - bits) @ (1 - bits).T


def te_nas(bits: Tensor) -> int:
    """Distinct rows from all pairs: a row of n equal ones counts 1 / n."""
    apart = bits @ (1 - bits).T
    equal = (apart + apart.T == 0).sum(1)
    return round(float((1 / equal.double()).sum()))


def timing(code: Tensor, neurons: int, sizes: list[int]) -> list[dict[str, Any]]:
    """Medians of alternating calls; every pair of ways is checked to agree first."""
    rows: list[dict[str, Any]] = []
    for n in sizes:
        words = code[:n]
        bits = unpacked(words, neurons)
        z = 2 * bits - 1  # what a layer would hand over: its signs are the code
        out = torch.empty(n, n, dtype=torch.int32)
        ours: dict[str, Callable[[], Any]] = {
            "hamming, fastsae (packed codes)": lambda w=words, o=out: fastsae.codes.hamming(w, w, o),
            "agreement, NASWOT (0/1 floats)": lambda c=bits: naswot(c),
            "distinct, fastsae (pre-activations: hash_signs, count_codes)": lambda p=z: fastsae.codes.count_codes(
                fastsae.codes.hash_signs(p)
            ),
            "distinct, TE-NAS (0/1 floats)": lambda c=bits: te_nas(c),
            "distinct, torch.unique of rows": lambda c=bits: torch.unique(c, dim=0),
        }
        agreement, counts = naswot(bits), [fastsae.codes.count_codes(fastsae.codes.hash_signs(z)).unique.shape[0], te_nas(bits)]
        if not torch.equal(neurons - fastsae.codes.hamming(words, words, out), agreement.int()) or len({*counts}) > 1:
            raise RuntimeError(f"codes: the ways disagree at {n} samples ({counts})")
        ways = {name: lambda _, call=call: milliseconds(lambda _: call()) for name, call in ours.items()}
        times = alternate(ways, least=ROUNDS, most=ROUNDS, seconds=0)
        medians = {name: statistics.median(found) for name, found in times.items()}
        rows.append({"samples": n, "distinct": counts[0], "milliseconds": medians})
        print(f"{n} samples: " + ", ".join(f"{name} {value:.2f} ms" for name, value in medians.items()))
    return rows


def draw(out: Path, results: dict[str, Any]) -> list[str]:
    counts, near, tokens = results["counts"], results["neighbours"], results["tokens"]

    def finish(canvas: Any, axes: Any, name: str) -> None:
        axes.spines[["top", "right"]].set_visible(False)
        files.replace_figure(out / name, canvas, dpi=130)

    canvas, axes = figure(figsize=(7, 4.2))
    sizes = counts["sizes"]
    axes.plot(sizes, [min(2 ** min(n, 62), tokens) for n in sizes], ":", color="0.5", label="most possible: min(2^neurons, tokens)")
    for i, (name, distinct) in enumerate(counts["distinct"].items()):
        axes.plot(sizes, distinct, "o-", ms=3, color=(0.15 * i, 0.3, 0.9 - 0.15 * i), label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(n) for n in sizes], fontsize=8)
    axes.set(xlabel="neurons that take part (nested random subsets)", ylabel=f"distinct codes of {tokens:,} tokens", title="Distinct codes")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    finish(canvas, axes, "distinct.png")

    canvas, axes = figure(figsize=(7, 3.8))
    axes.bar([row["layer"] for row in near["layers"]], [100 * row["same_token"] for row in near["layers"]], color="C0", width=0.6)
    axes.axhline(100 * near["chance"], color="C1", ls="--", label=f"by chance: {100 * near['chance']:.1f} %")
    axes.set(
        xlabel="layer", ylabel=f"% of the {near['k']} nearest that are\nthe same token", title="Neighbours by Hamming distance of codes"
    )
    axes.legend(frameon=False)
    finish(canvas, axes, "neighbours.png")

    canvas, panels = figure(figsize=(11, 5), columns=2)
    labels = near["frequent"]
    images: list[Any] = []
    for axes, row in zip(panels, (near["layers"][0], near["layers"][-1])):
        images.append(axes.imshow(row["shares"], vmin=0, vmax=1, cmap="viridis"))
        axes.set_xticks(range(len(labels) + 1), [*labels, "any other"], rotation=60, ha="right")
        axes.set_yticks(range(len(labels)), labels)
        axes.set(title=f"layer {row['layer']}", xlabel="token of the neighbour", ylabel="token")
    canvas.colorbar(images[-1], ax=panels, shrink=0.8, label=f"share of the {near['k']} nearest")
    files.replace_figure(out / "graph.png", canvas, dpi=130, bbox_inches="tight")

    canvas, axes = figure(figsize=(7.5, 4.4))
    rows = results["timing"]
    for name in rows[0]["milliseconds"]:
        style = "o-" if "fastsae" in name else "s--"
        colour = "C0" if name.startswith(("hamming", "agreement")) else "C1" if "unique of rows" not in name else "C2"
        axes.plot([r["samples"] for r in rows], [r["milliseconds"][name] for r in rows], style, color=colour, ms=4, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([r["samples"] for r in rows], [str(r["samples"]) for r in rows])
    axes.set(xlabel="samples", ylabel="ms", title=f"{results['neurons']} neurons of one layer, {results['threads']} thread(s)")
    axes.set_ylim(top=30 * axes.get_ylim()[1])
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    finish(canvas, axes, "timing.png")
    return ["distinct.png", "neighbours.png", "graph.png", "timing.png"]


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
    counts = count(codes, hashes, neurons)
    near = neighbours(codes, kind, words, args.sample, args.k)
    sizes = [128, 256, 512] if args.smoke else [512, 1024, 2048, 4096]
    results = {
        "model": "all-MiniLM-L6-v2",
        "tokens": kind.shape[0],
        "kinds": int(kind.unique().shape[0]),
        "neurons": neurons,
        "layers": names,
        "threads": args.threads,
        "machine": machine(),
        "counts": counts,
        "neighbours": near,
        "timing": timing(codes[len(codes) // 2], neurons, sizes),
    }
    files.replace_text(args.out / "codes.json", json.dumps(results, indent=1) + "\n")
    written = draw(args.out, results)
    print(f"wrote codes.json, {', '.join(written)} into {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
