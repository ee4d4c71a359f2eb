"""The training step of a TopK cross-layer transcoder beside plain torch and the dense formula, in shapes (B, L, D, F, k).

``python -m bench.clt`` has the size of the issue, (256, 12, 768, 8192, 32), one side after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from bench import clt
from bench.harness import name, shapes


@pytest.mark.seconds(40)
@pytest.mark.parametrize("shape", shapes([(256, 6, 768, 4096, 32)], [(32, 3, 64, 512, 8)]), ids=name)
def test_clt_step(shape: tuple[int, ...], compare: Callable[..., None]) -> None:
    sides, batch = clt.sides(), clt.rows(shape)
    mine = sides.pop("ours")(shape)

    def verify() -> None:
        clt.check(clt.ours(shape), clt.plain(shape), *batch)

    calls = {f"{who} torch": partial(make(shape).step, *batch) for who, make in sides.items()}
    compare("cross-layer transcoder step", name(shape), lambda: mine.step(*batch), calls, verify)
