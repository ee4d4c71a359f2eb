"""The list of mutants names texts that exist; `python tests/mutate.py` (make deep) runs it."""

from __future__ import annotations

from mutants import MUTANTS
from places import ROOT


def test_every_mutant_changes_one_place_and_names_a_test() -> None:
    assert len({(m.path, m.old, m.new) for m in MUTANTS}) == len(MUTANTS)
    for m in MUTANTS:
        assert (ROOT / m.path).read_text().count(m.old) == 1, f"{m.path}: {m.old!r} does not occur exactly once"
        assert m.old != m.new
        assert bool(m.test) != bool(m.slack), f"{m.path}: {m.old!r}: a test that kills it, or why none can"
        if m.test:
            path, name = m.test.removeprefix("interpreted ").split("::")
            assert f"def {name}(" in (ROOT / path).read_text(), m.test
