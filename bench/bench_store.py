"""Stored activations in shuffled order beside a sequential read of the same bytes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.harness import name, normal, shapes
from fastsae.store import ActivationShards, ShardWriter


@pytest.mark.parametrize("shape", shapes([(600_000, 768), (150_000, 2304)], [(20_000, 768)]), ids=name)
def test_iterate(shape: tuple[int, ...], compare: Callable[..., None]) -> None:
    """bfloat16 rows, batches of 4,096, files in the page cache (a cold read is the disk's)."""
    rows, width = shape
    with tempfile.TemporaryDirectory() as folder:
        block = normal(10_000, width).bfloat16()
        with ShardWriter(folder, rows_a_shard=100_000) as writer:
            for _ in range(rows // len(block)):
                writer.append({"x": block})
        store = ActivationShards(folder)
        buffer = bytearray(4 << 20)

        def sequential() -> None:
            for path in sorted(Path(folder).glob("*.safetensors")):
                with open(path, "rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass

        def shuffled() -> None:
            for _ in store.iterate(4096):
                pass

        def verify() -> None:
            found = torch.cat([batch["x"][:, 0] for batch in store.iterate(4096)])
            assert len(found) == len(store) // 4096 * 4096

        compare("store_iterate", name(shape), shuffled, {"sequential read": sequential}, verify, floor="sequential read")
