"""Instruction sets that have code of their own.

Operations without products of matrices run AVX-512's code at the levels above it (FASTSAE_ONLY_SCREENS in csrc/cpu/*.isa.cpp): there the
same tests show nothing again. That each level runs what it should: tests/contract/test_golden.py and test_meets_specification.
"""

from __future__ import annotations

import os

from fastsae.native import loader

_ONLY_SCREENS = ("avx512_vnni", "avx512_bf16", "neon_dotprod", "neon_i8mm")
_screening = [level for level in loader.isa_levels() if level not in ("portable", "neon")]
# The lowest and the highest: those between differ in one instruction. `make deep` has all.
SCREENING = _screening if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else [*dict.fromkeys([*_screening[:1], *_screening[-1:]])]
"""The levels here that screen (cpu/engine), ascending."""
_WITH_PRODUCTS = ("encode", "match", "spline", "topk_changes")
_SCREENED_ONLY = "topk_changes"


def codes() -> list[str]:
    """The levels here at which decode, adam, signum, hamming, signs and hashes differ; empty where nothing is built."""
    return [level for level in loader.isa_levels() if level not in _ONLY_SCREENS]


def has_code(op: str, variant: str) -> bool:
    """Whether a variant of ``fastsae.verify.variants`` is no second name for another one's code."""
    if op == _SCREENED_ONLY and any(f"[{level}]" in variant for level in ("portable", "neon")):
        return False
    return op.startswith(_WITH_PRODUCTS) or not any(level in variant for level in _ONLY_SCREENS)
