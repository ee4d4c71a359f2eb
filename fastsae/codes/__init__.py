"""Spline codes: which neurons are on, as bits and as hashes; distances, counts, and codes of a running model.

spline_code, spline_hash             of a layer's input and weights; pack_signs, hash_signs: of pre-activations; hash_code: of a code
spline_keys, combine_hashes          the keys of a layer's neurons; the hash of several layers
near_zero_counts                     how many bits lie within rounding of 0
hamming, hamming_topk                distances of codes; boundary_density: by the distance of inputs; neighbour_graph: of a point cloud
count_codes, CodeCounter             distinct codes of a batch (``UniqueCodes``), of a stream (``CodeTable`` of ``CodeCount``)
trace(model, layers)                 codes while a model runs (``Trace``); trace_points(model): the layers that it can name
"""

from fastsae.codes.counters import CodeCount, CodeCounter, CodeTable
from fastsae.codes.tracing import Trace, trace, trace_points
from fastsae.ops.count import UniqueCodes, count_codes
from fastsae.ops.hamming import BoundaryDensity, Neighbours, boundary_density, hamming, hamming_topk, neighbour_graph
from fastsae.ops.spline import (
    combine_hashes,
    hash_code,
    hash_signs,
    near_zero_counts,
    pack_signs,
    spline_code,
    spline_hash,
    spline_keys,
)

__all__ = [
    "BoundaryDensity", "CodeCount", "CodeCounter", "CodeTable", "Neighbours", "Trace", "UniqueCodes", "boundary_density",
    "combine_hashes", "count_codes", "hamming", "hamming_topk", "hash_code", "hash_signs", "near_zero_counts", "neighbour_graph",
    "pack_signs", "spline_code", "spline_hash", "spline_keys", "trace", "trace_points",
]  # fmt: skip
