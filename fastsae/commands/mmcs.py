"""``fastsae mmcs``: mean max cosine similarity of dictionaries in files or folders."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import fastsae
from fastsae.compare.dictionaries import as_dictionaries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dictionaries", nargs="+", help="files or folders of weights, checkpoints; more than two: all pairs")
    names = sorted(fastsae.compare.MMCS_VARIANTS)
    parser.add_argument("--variant", choices=names, metavar="NAME", help=f"a published variant of the number: {', '.join(names)}")
    parser.add_argument("--plot", type=Path, help="image of both directions' histograms beside random vectors (matplotlib)")
    parser.add_argument("--json", action="store_true")


def run(options: argparse.Namespace) -> int:
    paths = options.dictionaries
    if len(paths) < 2 or (options.plot and len(paths) > 2) or (options.variant and (options.plot or len(paths) > 2)):
        print("fastsae mmcs: give two dictionaries, or more of them without --plot and --variant", file=sys.stderr)
        return 2
    try:
        loaded = as_dictionaries("mmcs", paths, paths)
        for path, weight in zip(paths, loaded):
            if broken := int((~weight.isfinite()).any(1).sum()):
                raise ValueError(
                    f"mmcs: {path}: {broken} of {len(weight)} features are not finite (fastsae.mmcs(.., alive=) leaves them out)"
                )
        report: dict[str, Any] = {"dictionaries": [{"path": str(p), "shape": list(w.shape)} for p, w in zip(paths, loaded)]}
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
    except (TypeError, ValueError) as error:
        print(f"fastsae {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(report, indent=1))
        return 0
    names = "ab" if len(paths) == 2 else [str(number) for number in range(len(paths))]
    for name, one in zip(names, report["dictionaries"]):
        print(f"{name}  {one['shape'][0]} features, D = {one['shape'][1]}  {one['path']}")
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
