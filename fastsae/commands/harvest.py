"""``fastsae harvest``: activations of a language model over text, as shards on disk."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from fastsae.commands import _language
from fastsae.lm import harvest, hook_points

REFUSED = (TypeError, ValueError)
_ROWS_A_SHARD = 1 << 14  # what an interrupted run loses at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _language.add_arguments(parser, batch=16)
    parser.add_argument("--hooks", metavar="A,B", help="modules: model.layers.3 is its output, model.layers.3:input its input")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the shards; one that was begun is gone on with")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the stored activations (default: the model's)")
    parser.add_argument("--list", action="store_true", help="the model's modules, which can be hooked; nothing is run")


def run(options: argparse.Namespace) -> int:
    if not options.list and not (options.hooks and options.out):
        raise ValueError("give --hooks and --out, or --list to see what can be hooked")
    model = _language.model_of(options, logits=False)
    if options.list:
        points = hook_points(model)
        print(json.dumps(points, indent=1) if options.json else "\n".join(f"{name:<40} {kind}" for name, kind in points.items()))
        return 0
    tokens, ignored = _language.windows_of(options, _language.tokenizer_of(options.model, options.gguf))
    if not any(options.out.glob("activations*.json")):
        _language.write_windows(options.out, tokens)
    about = {"gguf": options.gguf} if options.gguf else {}
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    try:
        how: dict[str, Any] = {"ignore": ignored, "batch": options.batch, "dtype": dtype, "rows_a_shard": _ROWS_A_SHARD, "about": about}
        store = harvest(model, tokens, options.hooks.split(","), options.out, **how)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{options.out} keeps its whole shards, and the same command goes on behind them") from None
    columns = {name: [str(dtype).removeprefix("torch."), *shape] for name, (dtype, shape) in store.columns.items()}
    report = {"out": str(options.out), "rows": len(store), "shards": len(store.shards), "columns": columns, "about": store.about}
    if options.json:
        print(json.dumps(report, indent=1))
        return 0
    print(f"{len(store)} rows of {len(tokens)} windows of {tokens.shape[1]} tokens, {len(store.shards)} shards in {options.out}")
    for name, kind in columns.items():
        print(f"  {name:<32} {kind[0]} {kind[1:] or ''}".rstrip())
    return 0
