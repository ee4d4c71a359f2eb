"""What the processes of the tests of dictionaries, counters, stores and checkpoints over ranks do, on groups of 1, 2 and 4 of one set."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharded_runs import Group, raises
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import fastsae
from fastsae import SAE, TopK
from fastsae.compare import MMCS_VARIANTS
from fastsae.distributed import RankError, SettingsError, part

D = 6


def dictionaries() -> tuple[Tensor, Tensor]:
    """Of few small integers: many equal similarities, also on both sides of every border; rows of zeros, and one that is not finite."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-1, 2, (n, D), generator=generator).float() for n in (37, 23))
    a[[0, 12, 25, 36]], b[[0, 6, 12, 22]] = a[5].clone(), b[3].clone()
    a[7] = b[9] = 0
    a[11, 2] = torch.nan
    return a, b


def bounds(n: int, size: int) -> list[int]:
    """Uneven, of four processes the second has nothing."""
    return {1: [0, n], 2: [0, n // 3, n], 4: [0, n // 4, n // 4, n // 4 + 1, n]}[size]


def numbers(m: Any) -> list[Tensor]:
    return [*m.a_to_b, *m.b_to_a, *m.most_negative, *m.rows]


def matched(group: Group) -> dict[str, Any]:
    a, b = dictionaries()
    own = [slice(*bounds(len(t), group.size)[group.rank : group.rank + 2]) for t in (a, b)]
    alive = torch.arange(len(a)) % 5 != 1, torch.arange(len(b)) != 3
    weights = torch.arange(len(a)).double(), torch.ones(len(b), dtype=torch.float64)
    pa, pb = (part(t[rows], group.group) for t, rows in zip((a, b), own))
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        ca, cb = (part(t[rows].to(dtype), group.group) for t, rows in zip((a, b), own))
        for k in (1, 5, 40):
            found[f"{dtype} {k}"] = numbers(fastsae.match(ca, cb, candidates=k))
    mine, theirs = ([t[rows] for t, rows in zip(pair, own)] for pair in (alive, weights))
    found["alive"] = numbers(fastsae.match(pa, pb, alive=mine, candidates=3))
    found["half sharded"] = numbers(fastsae.match(a, pb, alive=(alive[0], mine[1]), candidates=3))
    clean = [part(t[rows].nan_to_num(), group.group) for t, rows in zip((a, b), own)]
    found["weights"] = fastsae.mmcs(*clean, weights=theirs)
    for name, variant in MMCS_VARIANTS.items():
        found[name] = fastsae.mmcs(clean[0], clean[0 if variant.exclude_self else 1], variant=name)
    found["matrix"] = fastsae.compare.mmcs_matrix([clean[0], b, clean[1]])
    sae = group.shard(SAE(D, 41, TopK(3), seed=0))
    found["sae"] = numbers(fastsae.match(sae, pb))
    whole = distribute_tensor(a, DeviceMesh.from_group(group.group, "cpu"), [Shard(0)])
    found["dtensor"] = numbers(fastsae.match(part(whole), pb, candidates=2))
    raises(TypeError, "a is a DTensor, of which this process holds a part", lambda: fastsae.match(whole, b))
    raises(ValueError, "need an alive feature", lambda: fastsae.match(pa, pb, alive=(mine[0] & False, None)))
    if group.size > 1:
        raises(SettingsError, "must be called alike", lambda: fastsae.match(pa, pb, candidates=1 + group.rank))
        error, text = (ValueError, "alive[0] must have shape") if group.rank == 0 else (RankError, "rank 0 failed in match: ValueError")
        raises(error, text, lambda: fastsae.match(pa, pb, alive=(mine[0][:1] if group.rank == 0 else mine[0], None)))
    assert all(torch.equal(x, y) for x, y in zip(numbers(fastsae.match(pa, pb, candidates=5)), found["torch.float32 5"]) if not x.isnan().any())
    return found


WORK: dict[str, Callable[[Group], Any]] = {"matched": matched}


def main(rank: int, sizes: list[int], folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=max(sizes), timeout=timedelta(seconds=120))
    results: dict[Any, Any] = {}
    for group in [Group(size, folder) for size in sizes]:
        if rank < group.size:
            for name, work in WORK.items():
                results[name, group.size] = group.all(work(group))
        dist.barrier()
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(size) for size in sys.argv[2].split(",")], Path(sys.argv[3]), int(sys.argv[4]))
