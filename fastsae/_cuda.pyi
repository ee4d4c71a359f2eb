"""The compiled CUDA kernels: csrc/cuda/cuda.h is the contract, csrc/bind.h how arguments come; ``native/cuda.py`` calls them."""

from typing import Any

def __getattr__(name: str) -> Any: ...  # pyright: ignore[reportIncompleteStub]  (functions are called by name)
