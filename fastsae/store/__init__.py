"""Activations and latents on disk: written once, read by many.

ActivationShards(folder)     what is stored, memory-mapped: ``read``, ``iterate``, ``batches`` for a ``Trainer``, ``verify``
ShardWriter(folder)          appends rows; a killed writer leaves whole shards and goes on behind them
open_activations(path)       ActivationShards of that folder, of ``.npy`` and safetensors files, or of SAELens' cached activations
LatentStore(folder)          sparse latents by token and by feature: occurrences, top examples, histograms, co-occurrence, delphi's files
LatentWriter(folder, ..)     appends them
join(folder)                 one manifest of what several writers have written
"""

from fastsae.store.latents import Examples, LatentStore, LatentWriter
from fastsae.store.shards import ActivationShards, ShardBatches
from fastsae.store.sources import open_activations
from fastsae.store.writer import ShardWriter, join

__all__ = ["ActivationShards", "Examples", "LatentStore", "LatentWriter", "ShardBatches", "ShardWriter", "join", "open_activations"]
