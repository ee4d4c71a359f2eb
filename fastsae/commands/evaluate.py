"""``fastsae eval``: what a dictionary reconstructs of a module's activations, and what the model loses with it in the module's place."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from fastsae import plots
from fastsae._core import files
from fastsae._core.progress import Bar
from fastsae.commands import _language
from fastsae.lm import Evaluation, evaluate

REFUSED = (TypeError, ValueError)
_SHOWN = ("fvu", "l0", "ce_recovered", "ce_recovered_mean")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sae", metavar="SAE", help="what SAE.from_pretrained reads, of this library or another, or a checkpoint")
    _language.add_arguments(parser, batch=8)
    parser.add_argument("--hook", required=True, metavar="MODULE", help="the module that the dictionary stands for")
    parser.add_argument("--ablations", default="zero", help="what the loss is compared to: zero, mean or zero,mean (default: zero)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for evaluation.json, written as it goes, and density.png")


def run(options: argparse.Namespace) -> int:
    if options.out is not None:
        plots.figure()  # an ImportError now, not after the evaluation
        options.out.mkdir(parents=True, exist_ok=True)
    sae = _language.dictionary_of(options.sae)
    model = _language.model_of(options, logits=True)
    tokens, ignored = _language.windows_of(options, _language.tokenizer_of(options.model, options.gguf))
    facts = {"sae": options.sae, "model": options.model, "hook": options.hook, "windows": list(tokens.shape), "ignore": ignored}
    so_far, partial = _SoFar(facts, -(-len(tokens) // max(options.batch, 1)), options.out), False
    options_of: dict[str, Any] = {"ignore": ignored, "ablations": options.ablations.split(","), "batch": options.batch, "progress": False}
    with so_far.bar:
        try:
            on = next(model.parameters()).device
            found = evaluate(sae.to(on), model, tokens, options.hook, callback=so_far, **options_of)
        except KeyboardInterrupt:
            if so_far.last is None:
                raise
            found, partial = so_far.last, True
            print("\nfastsae eval: interrupted; these are the numbers so far", file=sys.stderr)
    report = so_far.write(found, partial=partial)
    print(json.dumps(report, indent=1) if options.json else found)
    if options.out is not None:
        found.plot(options.out / "density.png")
    return 130 if partial else 0


class _SoFar:
    """The numbers of a run that goes on: on a bar where tqdm is installed, once a second in the folder's JSON, and for an interrupt."""

    def __init__(self, facts: dict[str, Any], batches: int, out: Path | None):
        self.facts, self.out, self.written = facts, out, 0.0
        self.last: Evaluation | None = None
        self.bar = Bar(True, batches, label="eval")

    def __call__(self, found: Evaluation) -> None:
        self.last = found
        self.bar.update()
        if time.monotonic() - self.written > 1:
            self.bar.show(", ".join(f"{name} {found.values[name]:.4g}" for name in _SHOWN if name in found.values))
            self.write(found, partial=True)
            self.written = time.monotonic()

    def write(self, found: Evaluation, *, partial: bool) -> dict[str, Any]:
        report = {**self.facts, "partial": partial, **found.as_dict()}
        if self.out is not None:
            files.replace_text(self.out / "evaluation.json", json.dumps(report, indent=1) + "\n")
        return report
