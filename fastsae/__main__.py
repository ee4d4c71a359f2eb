"""Command line: ``fastsae COMMAND`` (also ``python -m fastsae``): the parser, exit codes, errors. Commands are in ``fastsae/commands``."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import fastsae
from fastsae import demo
from fastsae.commands import bench, evaluate, harvest, info, latents, mmcs, plan, verify
from fastsae.studies import _frame as study

_COMMANDS: tuple[tuple[str, Any, str], ...] = (
    ("info", info, "versions, CPU, GPU, and which backend serves which operation, with reasons"),
    ("verify", verify, "run every backend against its specification on this machine; exit code 1 on a mismatch"),
    ("bench", bench, "time operations beside the best plain torch (in a checkout)"),
    ("demo", demo, "train a dictionary on real activations and look at it"),
    ("harvest", harvest, "activations of a language model over text, as shards on disk"),
    ("eval", evaluate, "what a dictionary reconstructs, and what its model loses with it"),
    ("latents", latents, "a dictionary's latents on disk: build them from shards, look at features, hand them to delphi"),
    ("mmcs", mmcs, "mean max cosine similarity of dictionaries in files or folders"),
    ("plan", plan, "memory, bytes and time of training a sharded dictionary, for given rates of the machine"),
    ("study", study, "run an experiment: tables, plots and JSON; without a name, list them"),
)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="fastsae", description="Exact, deterministic kernels for sparse autoencoders.")
    result.add_argument("--version", action="version", version=fastsae.__version__)
    commands = result.add_subparsers(dest="command", required=True)
    for name, module, text in _COMMANDS:
        one = commands.add_parser(name, help=text)
        one.set_defaults(run=module.run, refused=getattr(module, "REFUSED", ()))
        module.add_arguments(one)
    return result


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        code = options.run(options)
        print(end="", flush=True)  # here, where a full disk or a closed pipe can be said, and not when Python ends
        return code
    except (OSError, ImportError, *options.refused) as error:
        try:
            print(end="", flush=True)
        except OSError:  # it is stdout that failed: what is left in its buffer goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader of a pipe has seen enough (`fastsae info | head`)
            return 0
        print(f"fastsae {options.command}: {str(error).removeprefix(f'{options.command}: ')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        kept = f"; {error}" if str(error) else ""
        print(f"\nfastsae {options.command}: interrupted{kept}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
