"""Activations on disk: written once, read by many runs in an order that a seed decides.

ActivationShards(folder)     what is stored, memory-mapped: ``read``, ``iterate``, ``batches`` for a ``Trainer``, ``verify``
ShardWriter(folder)          appends rows; a killed writer leaves whole shards and goes on behind them
open_activations(path)       ActivationShards of that folder, of ``.npy`` and safetensors files, or of SAELens' cached activations
"""

from fastsae.store.shards import ActivationShards, ShardBatches
from fastsae.store.sources import open_activations
from fastsae.store.writer import ShardWriter

__all__ = ["ActivationShards", "ShardBatches", "ShardWriter", "open_activations"]
