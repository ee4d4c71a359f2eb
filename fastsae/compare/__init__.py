"""Dictionaries compared: matching in both directions, MMCS (mean max cosine similarity) and what publications report under its name.

match(a, b)                          ``Match``: nearest features of both, histogram, one-to-one matching
mmcs(a, b), mmcs_matrix(list)        one number; all ordered pairs of several dictionaries
MMCS_VARIANTS, MmcsVariant           the published numbers by name
contribution_similarity              amounts besides directions: what features put into samples
relative_norms, exclusive, shared    model diffing: whose feature it is, by a crosscoder's decoders; layer_cosines, latent_scaling
stability(dictionaries)              several seeds: what they share, one to one; principal_angles(a, b) of two groups of features
match_cosine(a, b, k=1)              the operation under them: ``Matches``, the k nearest rows
Dictionary                           what they take: a tensor ``[F, D]``, an SAE of any library, a file or folder of weights
"""

from fastsae.compare.dictionaries import Dictionary
from fastsae.compare.diffing import exclusive, latent_scaling, layer_cosines, relative_norms, shared
from fastsae.compare.matching import Match, OneToOne, match
from fastsae.compare.mmcs_variants import MMCS_VARIANTS, MmcsVariant, contribution_similarity, mmcs, mmcs_matrix
from fastsae.compare.several import Stability, principal_angles, stability
from fastsae.ops.match import Matches, match_cosine

__all__ = [
    "MMCS_VARIANTS", "Dictionary", "Match", "Matches", "MmcsVariant", "OneToOne", "Stability", "contribution_similarity", "exclusive",
    "latent_scaling", "layer_cosines", "match", "match_cosine", "mmcs", "mmcs_matrix", "principal_angles", "relative_norms", "shared",
    "stability",
]  # fmt: skip
