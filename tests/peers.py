"""The libraries that ``fastsae.accelerate`` is for, imported as they are; where one is not installed its tests are skipped, and say so."""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any

import pytest
from torch._subclasses.fake_tensor import FakeTensor

from fastsae._activations_minilm import _checkout_hidden

# Read when they are imported: no network, and sparsify's decoder that runs on a CPU.
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "SPARSIFY_DISABLE_TRITON": "1"}


def load(module: str, distribution: str) -> Any:
    """The library, or a skip of the whole test module; an error where FASTSAE_REQUIRE_PEERS is 1 (``make test-peers``)."""
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)
    new = FakeTensor.__new__
    try:
        with _checkout_hidden(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        if os.environ.get("FASTSAE_REQUIRE_PEERS") == "1":
            raise
        said = f"NOT TESTED against the real {distribution}: {error} (make test-peers installs it)"
        warnings.warn(said, stacklevel=2)
        pytest.skip(said, allow_module_level=True)
    finally:
        FakeTensor.__new__ = new  # nnsight, which dictionary_learning imports, puts one there that breaks torch.compile
