"""Sparse autoencoders and transcoders as torch modules.

module       SAE: parameters, latents and back      config, init, packing, processes: what it is made of
inputs       what one loss is computed from, made once by the module      rows: normalised by themselves
autograd     its loss through autograd              step: its gradients by hand, over slots      tiles: both where latents are dense
losses       the terms, shared by all of them       jump: those of JumpReLU alone       activations, reconstruction
crosscoder, cross_layer: SAEs over several layers, or one for each
stack        SAEs: several in one step              checkpoints: what training goes on from      resampling

``encode_pursuit`` and its ``PursuitWeights`` are of ``fastsae.ops.pursuit``: latents found one after the other.
"""

from fastsae.ops.pursuit import PursuitWeights, encode_pursuit
from fastsae.sae.activations import AbsTopK, Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from fastsae.sae.cross_layer import CrossLayerTranscoder
from fastsae.sae.crosscoder import Crosscoder
from fastsae.sae.losses import AuxK, JumpLoss, Metrics
from fastsae.sae.module import SAE
from fastsae.sae.reconstruction import Reconstruction
from fastsae.sae.resampling import resample
from fastsae.sae.stack import SAEs

__all__ = [
    "SAE", "AbsTopK", "Activation", "AuxK", "BatchTopK", "CrossLayerTranscoder", "Crosscoder", "Gated", "JumpLoss", "JumpReLU", "Metrics",
    "PursuitWeights", "ReLU", "Reconstruction", "SAEs", "TopK", "encode_pursuit", "resample",
]  # fmt: skip
