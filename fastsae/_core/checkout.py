"""The checkout that the package runs from, if it runs from one."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def checkout() -> Path | None:
    """The root of the checkout, if it has the benches; None for an installed package."""
    return _ROOT if (_ROOT / "bench" / "harness.py").exists() else None


@contextmanager
def checkout_hidden() -> Generator[None]:
    """transformers asks whether a package ``kernels`` is installed, and a checkout on ``sys.path`` has a folder of that name."""
    before = sys.path[:]
    if (_ROOT / "pyproject.toml").exists():
        sys.path[:] = [entry for entry in before if Path(entry).resolve() != _ROOT]
    try:
        yield
    finally:
        sys.path[:] = before
