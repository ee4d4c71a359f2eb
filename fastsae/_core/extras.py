"""Packages that come with an extra."""

from __future__ import annotations

import importlib
from typing import Any


def needed(module: str, text: str, extra: str) -> Any:
    """The module; ImportError with ``text`` and what to install where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{text}: pip install 'fastsae-kernels[{extra}]'") from error
