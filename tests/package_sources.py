"""The package's own source files."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import fastsae

PACKAGE = Path(fastsae.__file__).parent


def sources() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(("fastsae", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"), path
    spec = importlib.util.find_spec("fastsae.kernels")
    if spec is not None:
        for folder in spec.submodule_search_locations or ():
            for path in sorted(Path(folder).glob("*.py")):
                if not path.is_relative_to(PACKAGE):
                    yield f"fastsae.kernels.{path.stem}".removesuffix(".__init__"), path
