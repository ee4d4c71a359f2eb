"""Seeds of several random streams from one."""

from __future__ import annotations

import numpy as np


def stream_seed(seed: int, stream: int) -> int:
    """A seed of 32 bits for one of several streams of a seed. (Of a larger one torch's CPU generator reads the low 32 bits only.)"""
    return int(np.random.SeedSequence([seed, stream]).generate_state(1)[0])
