"""fastsae: exact, deterministic kernels for sparse autoencoders, dictionary matching and spline codes.

Operations (each with a PyTorch reference that every backend is verified against):
    encode_topk, encode_threshold, encode_batch_topk, encode_gated, select_topk, pack; decode, decode_backward; reconstruct
    match_cosine, match, mmcs, mmcs_matrix, MMCS_VARIANTS
    spline_code, spline_hash, pack_signs, hash_signs, hash_code, combine_hashes, spline_keys, near_zero_counts
    hamming, hamming_topk; count_codes
Built on them: trace (codes while a model runs), CodeCounter (distinct codes of a stream), boundary_density, neighbour_graph.
Modules: SAE with the activations TopK, BatchTopK, JumpReLU, ReLU, Gated, and the dead-feature loss AuxK.
Training: Trainer, save_checkpoint, load_checkpoint (fastsae.trainer: data order, schedules); optim.Adam, exact and fused, over RowGradient,
    TiledGradient and dense gradients; adam_ (one step, one matrix).
Backends: use_backend, explain, check, BackendError; `fastsae info` and `fastsae verify` on the command line.
"""

from fastsae import optim
from fastsae._flags import raise_if_set as check
from fastsae.activations import BatchTopK, Gated, JumpReLU, ReLU, TopK
from fastsae.counters import CodeCount, CodeCounter, CodeTable
from fastsae.dispatch import BackendError, explain, use_backend
from fastsae.gradients import RowGradient, TiledGradient
from fastsae.latents import RaggedLatents, TopKLatents
from fastsae.losses import AuxK
from fastsae.ops.adam import adam_
from fastsae.ops.count import UniqueCodes, count_codes
from fastsae.ops.decode import DecodeGradients, decode, decode_backward
from fastsae.ops.encode import encode_batch_topk, encode_gated, encode_threshold, encode_topk
from fastsae.ops.hamming import BoundaryDensity, Neighbours, boundary_density, hamming, hamming_topk, neighbour_graph
from fastsae.ops.match import Match, Matches, match, match_cosine
from fastsae.ops.mmcs import MMCS_VARIANTS, MmcsVariant, mmcs, mmcs_matrix
from fastsae.ops.reconstruct import Reconstruction, reconstruct
from fastsae.ops.select import select_topk
from fastsae.ops.spline import combine_hashes, hash_code, hash_signs, near_zero_counts, pack_signs, spline_code, spline_hash, spline_keys
from fastsae.packed import PackedWeights, pack
from fastsae.sae import SAE
from fastsae.trace import trace
from fastsae.trainer import Trainer, load_checkpoint, save_checkpoint

__version__ = "0.1.0"

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
    "DecodeGradients",
    "Gated",
    "JumpReLU",
    "Match",
    "Matches",
    "MmcsVariant",
    "Neighbours",
    "PackedWeights",
    "RaggedLatents",
    "ReLU",
    "Reconstruction",
    "RowGradient",
    "TiledGradient",
    "TopK",
    "TopKLatents",
    "Trainer",
    "UniqueCodes",
    "adam_",
    "boundary_density",
    "check",
    "combine_hashes",
    "count_codes",
    "decode",
    "decode_backward",
    "encode_batch_topk",
    "encode_gated",
    "encode_threshold",
    "encode_topk",
    "explain",
    "hamming",
    "hamming_topk",
    "hash_code",
    "hash_signs",
    "load_checkpoint",
    "match",
    "match_cosine",
    "mmcs",
    "mmcs_matrix",
    "near_zero_counts",
    "neighbour_graph",
    "optim",
    "pack",
    "pack_signs",
    "reconstruct",
    "save_checkpoint",
    "select_topk",
    "spline_code",
    "spline_hash",
    "spline_keys",
    "trace",
    "use_backend",
]
