"""Superposition: data with known features, initialisations, statistics of activations, sweeps."""
