"""fastsae: exact, deterministic kernels for sparse autoencoders, dictionary matching and spline codes.

Operations (each with a PyTorch reference that every backend is verified against):
    encode_topk, encode_threshold, encode_batch_topk, encode_gated; decode, decode_backward; reconstruct
    match_cosine, match, mmcs, mmcs_matrix
    spline_code, spline_hash, pack_signs, hash_signs, hash_code, spline_keys; hamming, hamming_topk; count_codes
Modules: SAE with the activations TopK, BatchTopK, JumpReLU, ReLU, Gated, and the dead-feature loss AuxK.
Training: Trainer, save_checkpoint, load_checkpoint (fastsae.trainer: data order, schedules; fastsae.gradients: of fused steps).
Backends: use_backend, explain, check, BackendError; `fastsae info` and `fastsae verify` on the command line.
"""

from fastsae._flags import raise_if_set as check
from fastsae.activations import BatchTopK, Gated, JumpReLU, ReLU, TopK
from fastsae.dispatch import BackendError, explain, use_backend
from fastsae.latents import RaggedLatents, TopKLatents
from fastsae.losses import AuxK
from fastsae.ops.count import UniqueCodes, count_codes
from fastsae.ops.decode import DecodeGradients, decode, decode_backward
from fastsae.ops.encode import encode_batch_topk, encode_gated, encode_threshold, encode_topk
from fastsae.ops.hamming import Neighbours, hamming, hamming_topk
from fastsae.ops.match import Match, Matches, match, match_cosine, mmcs, mmcs_matrix
from fastsae.ops.reconstruct import Reconstruction, reconstruct
from fastsae.ops.spline import hash_code, hash_signs, pack_signs, spline_code, spline_hash, spline_keys
from fastsae.sae import SAE
from fastsae.trainer import Trainer, load_checkpoint, save_checkpoint

__version__ = "0.1.0"

__all__ = [
    "SAE",
    "AuxK",
    "BackendError",
    "BatchTopK",
    "DecodeGradients",
    "Gated",
    "JumpReLU",
    "Match",
    "Matches",
    "Neighbours",
    "RaggedLatents",
    "ReLU",
    "Reconstruction",
    "TopK",
    "TopKLatents",
    "Trainer",
    "UniqueCodes",
    "check",
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
    "pack_signs",
    "reconstruct",
    "save_checkpoint",
    "spline_code",
    "spline_hash",
    "spline_keys",
    "use_backend",
]
