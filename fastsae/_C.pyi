"""The compiled CPU kernels: csrc/fastsae.h is the contract, csrc/bind.h how arguments come; ``native/loader.py`` calls them by name."""

# ruff: noqa: N999

from typing import Any

def __getattr__(name: str) -> Any: ...  # pyright: ignore[reportIncompleteStub]  (functions are called by name)
