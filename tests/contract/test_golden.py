"""The bits of the compiled CPU rows, pinned: one hash of every sample's result for each operation and dtype, and for each instruction set
where they differ.

Only where torch itself draws the samples that golden.json was made from: its normal draws depend on its version and on the CPU.
After a change of bits that is meant: ``python tests/contract/test_golden.py`` writes golden.json anew.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsae  # noqa: F401  # pyright: ignore[reportUnusedImport]  # registers the operations
from fastsae.dispatch import OPS, Op, Row
from fastsae.native.loader import isa_levels, unavailable, use_isa
from fastsae.verify import call

CPU = torch.device("cpu")
PATH = Path(__file__).with_name("golden.json")
GOLDEN: dict[str, Any] = json.loads(PATH.read_text())
LEVELS: list[str] = GOLDEN["levels"]
REMADE = f"If the change is meant, run `python {PATH.parent.name}/{Path(__file__).name}` in tests/ and say why in the commit."


def made_by() -> list[str]:
    """What decides which samples a seed gives: torch's version and its vector instructions."""
    return [torch.__version__.partition("+")[0], torch.backends.cpu.get_cpu_capability()]


def digest(*values: Any) -> str:
    """Of dtypes, shapes and bits; of the text of anything else."""
    state = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            state.update(f"{value.dtype}{list(value.shape)}".encode())
            if value.numel():
                state.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            state.update(repr(value).encode())
    return state.hexdigest()[:16]


def key_of(name: str, dtype: torch.dtype) -> str:
    return f"{name} {str(dtype).removeprefix('torch.')}"


def names_of(op: Op) -> list[str]:
    """An operation's entries in the file: a selection by magnitude has its own."""
    return [op.name, f"{op.name}:absolute"] if op.name == "encode_topk" else [op.name]


@lru_cache(maxsize=4)  # the levels of an operation follow each other
def samples_of(name: str, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    name, _, absolute = name.partition(":")
    samples = OPS[name].samples(CPU, dtype, torch.Generator().manual_seed(0))
    if name == "encode_gated":  # torch's exp has other bits on CPUs with other vector instructions; that of 0 is 1 on all
        samples = [(*args[:3], torch.zeros_like(args[3]), *args[4:]) for args in samples]
    return [args for args in samples if name != "encode_topk" or (len(args) == 10) == bool(absolute)]


def digest_of(op: Op, samples: list[tuple[Any, ...]]) -> str:
    """Whatever the order of arguments; without what is only written and the packed words, whose padding holds anything."""
    left_out = {*op.mutates, *(op.handle or ())[1:]}
    return digest(*(sorted(digest(value) for position, value in enumerate(args) if position not in left_out) for args in samples))


def result_of(op: Op, row: Row, samples: list[tuple[Any, ...]]) -> str:
    found = []
    for args in samples:
        if row.reason(args) is None:
            result = call(op, row, args)
            found.append(digest(*((result,) if isinstance(result, Tensor) else result)))
    return digest(*found) if found else ""


def compiled_row(op: Op) -> Row | None:
    return next((row for row in op.rows if row.backend == "cpu"), None)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", sorted({key.partition(" ")[0] for key in GOLDEN["samples"]}))
def test_the_bits_are_those_of_the_file(name: str, level: str) -> None:
    op = OPS[name.partition(":")[0]]
    row = compiled_row(op)
    assert row is not None
    if level not in isa_levels():
        pytest.skip(unavailable() or f"{level} is not built or not on this CPU, which has {', '.join(isa_levels())}")
    for dtype in op.dtypes:
        key, samples = key_of(name, dtype), samples_of(name, dtype)
        if key not in GOLDEN["results"]:
            assert result_of(op, row, samples) == "", f"{key} is not in the file. {REMADE}"
            continue
        if digest_of(op, samples) != GOLDEN["samples"][key]:
            if made_by() != GOLDEN["made"]:
                pytest.skip(f"torch {made_by()} draws other samples than torch {GOLDEN['made']}, of which golden.json was made")
            pytest.fail(f"the samples of {key} are others than golden.json was made of. {REMADE}")
        pinned = GOLDEN["results"][key]
        with use_isa(level):
            assert result_of(op, row, samples) == (pinned if isinstance(pinned, str) else pinned[level]), f"{key} has other bits. {REMADE}"


def test_every_compiled_row_is_in_the_file() -> None:
    compiled = {name for op in OPS.values() if compiled_row(op) for name in names_of(op)}
    assert {key.partition(" ")[0] for key in GOLDEN["results"]} == compiled, REMADE


def remake() -> None:
    if not set(LEVELS) <= set(isa_levels()):
        raise SystemExit(f"golden.json holds {', '.join(LEVELS)}; this build or CPU has only {', '.join(isa_levels())}")
    golden: dict[str, Any] = {"made": made_by(), "levels": isa_levels(), "samples": {}, "results": {}}
    for op in OPS.values():
        row = compiled_row(op)
        for name, dtype in product(names_of(op), op.dtypes if row else ()):
            assert row is not None
            key, samples, found = key_of(name, dtype), samples_of(name, dtype), {}
            for level in isa_levels():
                with use_isa(level):
                    found[level] = result_of(op, row, samples)
            if any(found.values()):
                golden["samples"][key] = digest_of(op, samples)
                golden["results"][key] = found if len(set(found.values())) > 1 else found[isa_levels()[0]]
    PATH.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    remake()
