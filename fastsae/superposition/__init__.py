"""Superposition: data with known features, initialisations, statistics of real activations, sweeps.

SuperpositionData, PRESETS          samples with their true features; published generators by name
toy_model_features                  features as a trained toy model of superposition places them
sweep, train_many                   dictionaries over L1 x size x seeds, until converged
init                                starting points of dictionaries; which tokens of a sequence to take
ActivationStatistics                moments, quantiles, sparsity, kurtosis of a stream of activations
"""

from fastsae.superposition import init
from fastsae.superposition.data import (
    PRESETS,
    SuperpositionBatch,
    SuperpositionData,
    SuperpositionStream,
    ToyModel,
    toy_model_features,
    unit_features,
)
from fastsae.superposition.init import sample_tokens, start_from, token_positions
from fastsae.superposition.statistics import ActivationStatistics
from fastsae.superposition.sweeps import Run, Training, sweep, train_dictionary, train_many

__all__ = [
    "PRESETS", "ActivationStatistics", "Run", "SuperpositionBatch", "SuperpositionData", "SuperpositionStream", "ToyModel",
    "Training", "init", "sample_tokens", "start_from", "sweep", "token_positions", "toy_model_features", "train_dictionary",
    "train_many", "unit_features",
]  # fmt: skip
