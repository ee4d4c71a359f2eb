"""Sparse autoencoders and transcoders as torch modules."""

from fastsae.sae.activations import Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from fastsae.sae.losses import AuxK, Metrics
from fastsae.sae.module import SAE
from fastsae.sae.reconstruction import Reconstruction
from fastsae.sae.stack import SAEs

__all__ = ["SAE", "Activation", "AuxK", "BatchTopK", "Gated", "JumpReLU", "Metrics", "ReLU", "Reconstruction", "SAEs", "TopK"]
