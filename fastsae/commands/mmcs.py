"""``fastsae mmcs``: mean max cosine similarity of dictionaries in files or folders."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from torch import Tensor

import fastsae
from fastsae.commands._language import is_checkpoint
from fastsae.compare.dictionaries import as_dictionaries
from fastsae.formats.weight_files import read_tensors
from fastsae.sae import SAE
from fastsae.sae.checkpoints import load_checkpoint

REFUSED = (TypeError, ValueError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dictionaries", nargs="+", help="files or folders of weights, checkpoints; more than two: all pairs")
    names = sorted(fastsae.compare.MMCS_VARIANTS)
    parser.add_argument("--variant", choices=names, metavar="NAME", help=f"a published variant of the number: {', '.join(names)}")
    parser.add_argument("--alive", action="store_true", help="without dead features, of checkpoints and SAELens' folders with sparsities")
    parser.add_argument("--dead-after", type=int, metavar="N", help="for --alive: tokens of silence (default: the dictionary's own number)")
    parser.add_argument("--plot", type=Path, help="image of both directions' histograms beside random vectors (matplotlib)")
    parser.add_argument("--json", action="store_true")


def run(options: argparse.Namespace) -> int:
    paths = options.dictionaries
    if len(paths) < 2 or (options.plot and len(paths) > 2) or (options.variant and (options.plot or len(paths) > 2)):
        raise ValueError("give two dictionaries, or more of them without --plot and --variant")
    loaded = as_dictionaries("mmcs", paths, paths)
    alive = [_alive(path, options.dead_after) if options.alive else slice(None) for path in paths]
    shapes = [list(weight.shape) for weight in loaded]
    loaded = [weight[some] for weight, some in zip(loaded, alive)]
    for path, weight in zip(paths, loaded):
        if broken := int((~weight.isfinite()).any(1).sum()):
            raise ValueError(f"mmcs: {path}: {broken} of {len(weight)} features are not finite (fastsae.mmcs(.., alive=) leaves them out)")
    report: dict[str, Any] = {"dictionaries": [{"path": str(p), "shape": shape} for p, shape in zip(paths, shapes)]}
    for one, weight in zip(report["dictionaries"] if options.alive else (), loaded):
        one["alive"] = len(weight)
    if options.variant:
        report[options.variant] = fastsae.mmcs(loaded[0], loaded[1], variant=options.variant)
    elif len(paths) > 2:
        report["a_to_b"] = fastsae.compare.mmcs_matrix(loaded).tolist()
    else:
        found = fastsae.match(*loaded)
        report |= {direction: found.mmcs(direction) for direction in ("a_to_b", "b_to_a", "mean")}
        sides = {"a_to_b": found.a_to_b, "b_to_a": found.b_to_a}
        report["above 0.9"] = {name: float((side.similarity > 0.9).double().mean()) for name, side in sides.items()}
        if options.plot:
            found.plot(options.plot)
    if options.json:
        print(json.dumps(report, indent=1))
        return 0
    names = "ab" if len(paths) == 2 else [str(number) for number in range(len(paths))]
    for name, one in zip(names, report["dictionaries"]):
        alive_ones = f" ({one['alive']} alive)" if options.alive else ""
        print(f"{name}  {one['shape'][0]} features{alive_ones}, D = {one['shape'][1]}  {one['path']}")
    if options.variant:
        print(f"{options.variant}  {report[options.variant]:.4f}")
    elif len(paths) > 2:
        print("mean best cosine of the row's features in the column")
        for row in report["a_to_b"]:
            print("  ".join(f"{value:.4f}" for value in row))
    else:
        for direction in ("a_to_b", "b_to_a"):
            print(f"{direction}  {report[direction]:.4f}  above 0.9: {report['above 0.9'][direction]:.1%}")
        print(f"mean    {report['mean']:.4f}")
    return 0


def _alive(source: str, dead_after: int | None) -> Tensor:
    """``[F]`` bool: the features that a file knows to have fired lately, or at all; ValueError where it does not know."""
    path = Path(source)
    sparsity = (path if path.is_dir() else path.parent) / "sparsity.safetensors"
    if is_checkpoint(path):
        sae = load_checkpoint(path).sae
        if isinstance(sae, SAE):
            return ~sae.dead_features if dead_after is None else sae.silent < dead_after
    elif sparsity.is_file():  # SAELens: log10(share of tokens + 1e-10)
        return read_tensors(sparsity, ("sparsity",))["sparsity"] > -9.5
    raise ValueError(
        f"mmcs: {source} does not know which of its features are dead: --alive needs a checkpoint of save_checkpoint or Trainer, or "
        "SAELens' sparsity.safetensors beside"
    )
