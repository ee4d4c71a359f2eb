"""fastsae: exact, deterministic kernels for sparse autoencoders, dictionary matching and spline codes.

Operations (each with a PyTorch reference that every backend is verified against):
    encode_topk, encode_threshold, encode_batch_topk, encode_gated; pack: a handle of weights that stay; decode; reconstruct
    match_cosine, match, mmcs: two dictionaries
    spline_code, spline_hash: which neurons are on
Latents: TopKLatents, RaggedLatents. PackedWeights: what pack returns.
Modules: SAE with the activations TopK, AbsTopK, BatchTopK, JumpReLU, ReLU, Gated, and the dead-feature loss AuxK; SAEs, several of one
    size that train in one call.
Training: optim (Adam, Signum, adam_: exact and fused), Trainer, save_checkpoint, load_checkpoint; fastsae.trainer: data order, schedules.
Other libraries' objects: accelerate, accelerated, restore, report; encode and reconstruct of any supported SAE.
Backends: use_backend, explain, check (raises what a GPU has deferred), BackendError; `fastsae info`, `fastsae verify`.
More, a module each: functional (the operations for other libraries), compare, codes, polytopes, superposition,
    lm (language models), store (activations and latents at rest), distributed (SAEs sharded over processes).
"""

import importlib
from typing import TYPE_CHECKING, Any

from fastsae import compare, optim
from fastsae._core.flags import raise_if_set as check
from fastsae._core.version import __version__ as __version__
from fastsae.compare import match, match_cosine, mmcs
from fastsae.dispatch import BackendError, explain, use_backend
from fastsae.latents import RaggedLatents, TopKLatents
from fastsae.ops.decode import decode
from fastsae.ops.encode import encode_batch_topk, encode_gated, encode_threshold, encode_topk
from fastsae.ops.spline import spline_code, spline_hash
from fastsae.packed import PackedWeights, pack
from fastsae.patch import accelerate, accelerated, encode, reconstruct, report, restore
from fastsae.sae import SAE, AbsTopK, AuxK, BatchTopK, Gated, JumpReLU, ReLU, SAEs, TopK
from fastsae.sae.checkpoints import load_checkpoint, save_checkpoint
from fastsae.trainer import Trainer

if TYPE_CHECKING:  # loaded at their first use, so that an import of fastsae stays short
    from fastsae import codes, distributed, functional, lm, polytopes, store, superposition

__all__ = [
    "SAE", "AbsTopK", "AuxK", "BackendError", "BatchTopK", "Gated", "JumpReLU", "PackedWeights", "RaggedLatents", "ReLU", "SAEs", "TopK",
    "TopKLatents", "Trainer", "accelerate", "accelerated", "check", "codes", "compare", "decode", "distributed", "encode",
    "encode_batch_topk", "encode_gated", "encode_threshold", "encode_topk", "explain", "functional", "lm", "load_checkpoint", "match",
    "match_cosine", "mmcs", "optim", "pack", "polytopes", "reconstruct", "report", "restore", "save_checkpoint", "spline_code",
    "spline_hash", "store", "superposition", "use_backend",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("codes", "distributed", "functional", "lm", "polytopes", "store", "superposition"):
        return importlib.import_module(f"fastsae.{name}")
    raise AttributeError(f"module 'fastsae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
