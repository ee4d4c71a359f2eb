"""fastsae: exact, deterministic kernels for sparse autoencoders, dictionary matching and spline codes.

Operations (each with a PyTorch reference that every backend is verified against):
    encode_topk, encode_threshold, encode_batch_topk, encode_gated, select_topk, pack; decode, decode_backward; reconstruct
    match_cosine, match, mmcs, mmcs_matrix, MMCS_VARIANTS
    spline_code, spline_hash, pack_signs, hash_signs, hash_code, combine_hashes, spline_keys, near_zero_counts
    hamming, hamming_topk; count_codes
Built on them: trace (codes while a model runs), CodeCounter (distinct codes of a stream), boundary_density, neighbour_graph.
Polytopes: as_net, mlp_block; crossings, shell, local_complexity; affine_map, soft_affine_map, frobenius_distance, frobenius_pairs,
    frobenius_topk, boundary_norms; soft_code, expected_hamming; NearestAffine.
Superposition: superposition (data whose true features are known, initialisations, sweeps, statistics of activations); `fastsae study`.
Modules: SAE with the activations TopK, BatchTopK, JumpReLU, ReLU, Gated, and the dead-feature loss AuxK; SAEs, several of one size that
    train in one call.
Training: Trainer, save_checkpoint, load_checkpoint (fastsae.trainer: data order, schedules); optim.Adam, exact and fused, over RowGradient,
    TiledGradient and dense gradients; adam_ (one step, one matrix).
Other libraries' objects (fastsae.patch): accelerate, accelerated, restore, report; encode and reconstruct of any supported SAE.
Backends: use_backend, explain, check, BackendError; `fastsae info` and `fastsae verify` on the command line.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fastsae import optim
from fastsae._core.flags import raise_if_set as check
from fastsae._core.version import __version__ as __version__
from fastsae.codes.counters import CodeCount, CodeCounter, CodeTable
from fastsae.codes.tracing import trace
from fastsae.compare.matching import Match, match
from fastsae.compare.mmcs_variants import MMCS_VARIANTS, MmcsVariant, mmcs, mmcs_matrix
from fastsae.dispatch import BackendError, explain, use_backend
from fastsae.gradients import RowGradient, TiledGradient
from fastsae.latents import RaggedLatents, TopKLatents
from fastsae.ops.adam import adam_
from fastsae.ops.count import UniqueCodes, count_codes
from fastsae.ops.decode import DecodeGradients, decode, decode_backward
from fastsae.ops.encode import encode_batch_topk, encode_gated, encode_threshold, encode_topk
from fastsae.ops.hamming import BoundaryDensity, Neighbours, boundary_density, hamming, hamming_topk, neighbour_graph
from fastsae.ops.match import Matches, match_cosine
from fastsae.ops.select import select_topk
from fastsae.ops.spline import combine_hashes, hash_code, hash_signs, near_zero_counts, pack_signs, spline_code, spline_hash, spline_keys
from fastsae.packed import PackedWeights, pack
from fastsae.patch import accelerate, accelerated, encode, reconstruct, report, restore
from fastsae.sae.activations import BatchTopK, Gated, JumpReLU, ReLU, TopK
from fastsae.sae.losses import AuxK
from fastsae.sae.module import SAE
from fastsae.sae.reconstruction import Reconstruction
from fastsae.sae.stack import SAEs
from fastsae.trainer import Trainer, load_checkpoint, save_checkpoint

if TYPE_CHECKING:  # loaded at the first use of a name, see __getattr__
    from fastsae import superposition
    from fastsae.polytopes import (
        Crossings,
        NearestAffine,
        Net,
        Shell,
        affine_map,
        as_net,
        boundary_norms,
        crossings,
        expected_hamming,
        frobenius_distance,
        frobenius_pairs,
        frobenius_topk,
        local_complexity,
        mlp_block,
        shell,
        soft_affine_map,
        soft_code,
    )

__all__ = [
    "MMCS_VARIANTS",
    "SAE",
    "AuxK",
    "BackendError",
    "BatchTopK",
    "BoundaryDensity",
    "CodeCount",
    "CodeCounter",
    "CodeTable",
    "Crossings",
    "DecodeGradients",
    "Gated",
    "JumpReLU",
    "Match",
    "Matches",
    "MmcsVariant",
    "NearestAffine",
    "Neighbours",
    "Net",
    "PackedWeights",
    "RaggedLatents",
    "ReLU",
    "Reconstruction",
    "RowGradient",
    "SAEs",
    "Shell",
    "TiledGradient",
    "TopK",
    "TopKLatents",
    "Trainer",
    "UniqueCodes",
    "accelerate",
    "accelerated",
    "adam_",
    "affine_map",
    "as_net",
    "boundary_density",
    "boundary_norms",
    "check",
    "combine_hashes",
    "count_codes",
    "crossings",
    "decode",
    "decode_backward",
    "encode",
    "encode_batch_topk",
    "encode_gated",
    "encode_threshold",
    "encode_topk",
    "expected_hamming",
    "explain",
    "frobenius_distance",
    "frobenius_pairs",
    "frobenius_topk",
    "hamming",
    "hamming_topk",
    "hash_code",
    "hash_signs",
    "load_checkpoint",
    "local_complexity",
    "match",
    "match_cosine",
    "mlp_block",
    "mmcs",
    "mmcs_matrix",
    "near_zero_counts",
    "neighbour_graph",
    "optim",
    "pack",
    "pack_signs",
    "reconstruct",
    "report",
    "restore",
    "save_checkpoint",
    "select_topk",
    "shell",
    "soft_affine_map",
    "soft_code",
    "spline_code",
    "spline_hash",
    "spline_keys",
    "superposition",
    "trace",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """Polytopes and superposition are loaded at their first use, so that an import of fastsae stays short."""
    if name == "superposition":
        return importlib.import_module("fastsae.superposition")
    if name not in __all__:
        raise AttributeError(f"module 'fastsae' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module("fastsae.polytopes"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
