"""Polytopes: the regions on which a network is one affine map, exactly.

net = fastsae.polytopes.as_net(torch.nn.Sequential(...))       # or fastsae.polytopes.mlp_block(model, layer) of a transformer
crossings, shell, local_complexity                   boundaries on segments, on rays, around points
dictionary_crossings                                 changes of the active features of an SAE on segments
validity                                             how far points can be pushed along directions before region, map or output change
affine_map, soft_affine_map                          the map of a region; the average over regions by probability
frobenius_distance, frobenius_pairs, frobenius_topk, boundary_norms      how far maps are apart, without forming them
soft_code, expected_hamming                          codes of smooth activations
NearestAffine                                        a map for each centre
"""

from fastsae.polytopes.affine import (
    NearestAffine,
    affine_map,
    boundary_norms,
    frobenius_distance,
    frobenius_pairs,
    frobenius_topk,
    soft_affine_map,
)
from fastsae.polytopes.boundaries import Crossings, Shell, crossings, local_complexity, shell
from fastsae.polytopes.dictionaries import DictionaryCrossings, dictionary_crossings
from fastsae.polytopes.modules import as_net, mlp_block
from fastsae.polytopes.net import Net
from fastsae.polytopes.rays import Validity, validity
from fastsae.polytopes.soft import expected_hamming, soft_code

__all__ = [
    "Crossings",
    "DictionaryCrossings",
    "NearestAffine",
    "Net",
    "Shell",
    "Validity",
    "affine_map",
    "as_net",
    "boundary_norms",
    "crossings",
    "dictionary_crossings",
    "expected_hamming",
    "frobenius_distance",
    "frobenius_pairs",
    "frobenius_topk",
    "local_complexity",
    "mlp_block",
    "shell",
    "soft_affine_map",
    "soft_code",
    "validity",
]
