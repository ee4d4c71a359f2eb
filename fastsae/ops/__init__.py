"""The operations, one file a family; importing this module registers all of them."""

from fastsae.ops import adam, count, decode, encode, hamming, match, pursuit, select, signum, spline, topk_changes

__all__ = ["adam", "count", "decode", "encode", "hamming", "match", "pursuit", "select", "signum", "spline", "topk_changes"]
