"""The contract suite of the Triton rows, and what other suites have of them, in the interpreter."""

from __future__ import annotations

import os

import pytest
from places import TESTS
from triton_marks import compiled, passes_in_the_interpreter

pytest.importorskip("triton")
pytestmark = [compiled, pytest.mark.slow]


def test_the_contract_suite() -> None:
    # Derivatives are made of the operations that the rest compares, and opcheck runs for the other rows; `make deep` has both here.
    rest = "drawn" if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else "gradients and not derivatives and not opcheck"
    passes_in_the_interpreter(str(TESTS / "contract" / "test_contract.py"), "-k", f"triton and not {rest}")


def test_accesses_capacities_and_the_audit() -> None:
    paths = (str(TESTS / name) for name in ("gpu/test_accesses.py", "contract/test_capacity.py", "contract/test_audit.py"))
    passes_in_the_interpreter(*paths, "-k", "programs or triton_leaves_out or wrong_triton_kernel")
