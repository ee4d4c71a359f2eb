"""The contract suite of the Triton rows, in the interpreter: two processes, so that two workers share it."""

from __future__ import annotations

import os

import pytest
from places import TESTS
from triton_marks import compiled, passes_in_the_interpreter

pytest.importorskip("triton")


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("part", ["drawn", "not drawn"])
def test_the_contract_suite(part: str) -> None:
    # Derivatives are made of the operations that the rest compares, and opcheck runs for the other rows; `make deep` has both here.
    rest = "" if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else " and not gradients and not derivatives and not opcheck"
    passes_in_the_interpreter(str(TESTS / "contract" / "test_contract.py"), "-k", f"triton and {part}{rest}")
