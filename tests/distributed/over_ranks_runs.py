"""What the processes of the tests of dictionaries, counters, stores and checkpoints over ranks do, on groups of 1, 2 and 4 of one set."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forks import ended, fork, port
from sharded_runs import Group, V, build, digest, raises, train
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import fastsae
from fastsae import SAE, TopK
from fastsae.codes import CodeCounter
from fastsae.compare import MMCS_VARIANTS
from fastsae.distributed import (
    RankError,
    SettingsError,
    async_save_checkpoint,
    checkpoints,
    convert_checkpoint,
    gathered,
    load_checkpoint,
    part,
    save_checkpoint,
)
from fastsae.lm import harvest
from fastsae.optim import Adam
from fastsae.store import ActivationShards, LatentStore, LatentWriter, ShardWriter, join
from fastsae.superposition import ActivationStatistics

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
    for call in (lambda: fastsae.match(whole, b), lambda: fastsae.encode_topk(b, whole, k=2)):
        raises(TypeError, "is a DTensor, of which this process holds a part", call)
    raises(ValueError, "need an alive feature", lambda: fastsae.match(pa, pb, alive=(mine[0] & False, None)))
    if group.size > 1:
        raises(SettingsError, "must be called alike", lambda: fastsae.match(pa, pb, candidates=1 + group.rank))
        error, text = (ValueError, "alive[0] must have shape") if group.rank == 0 else (RankError, "rank 0 failed in match: ValueError")
        raises(error, text, lambda: fastsae.match(pa, pb, alive=(mine[0][:1] if group.rank == 0 else mine[0], None)))
    assert all(
        torch.equal(x, y) for x, y in zip(numbers(fastsae.match(pa, pb, candidates=5)), found["torch.float32 5"]) if not x.isnan().any()
    )
    return found


def layer() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, W, b, neurons) of a layer of 150 neurons, in three words; many scores are 0."""
    generator = torch.Generator().manual_seed(1)
    x, W, b = (torch.randint(-1, 2, shape, generator=generator).float() for shape in ((11, D), (150, D), (150,)))
    return x, W, b, torch.arange(150) % 7 != 2


def spline(group: Group) -> list[Tensor]:
    """Codes and hashes of each process's rows, of neurons of which each has some."""
    x, *whole = layer()
    W, b, neurons = (t[slice(*bounds(150, group.size)[group.rank : group.rank + 2])] for t in whole)
    rows, held = x[slice(*bounds(11, group.size)[group.rank : group.rank + 2])], part(W, group.group)
    assert held.spline_code(x[0], b).shape == (3,)
    if group.size > 1:
        raises(SettingsError, "must be called alike", lambda: held.spline_hash(x, seed=group.rank))
        error, text = (ValueError, "b must have") if group.rank == 0 else (RankError, "rank 0 failed in spline_code: ValueError")
        raises(error, text, lambda: held.spline_code(x, b[1:] if group.rank == 0 else b))
    return [held.spline_code(rows), held.spline_code(rows, b, neurons=neurons), held.spline_hash(rows, b, layer=3, seed=5),
            held.spline_hash(rows, b, bits=128, neurons=neurons)]  # fmt: skip


def counted(group: Group) -> dict[str, Any]:
    """A stream of which each process has seen some batches, the last one none."""
    generator = torch.Generator().manual_seed(0)
    counter, statistics = CodeCounter(["x", "y"]), ActivationStatistics(D)
    for number in range(6):
        codes, x = torch.randint(0, 9, (5, 2), generator=generator), torch.randn(7, D, generator=generator)
        if number % max(group.size - 1, 1) == group.rank:
            counter.update(codes)
            statistics.update(x)
    before = counter.table()
    merged, found = counter.merged(group.group), statistics.merged(group.group)
    assert counter.table() == before
    kinds = CodeCounter(2 + group.rank)
    if group.size > 1:
        raises(ValueError, "other must count the layers", lambda: kinds.merged(group.group))
    return {"table": merged.table(), **found.state_dict()}


def saved(group: Group) -> dict[str, Any]:
    """In the background, while training goes on; an error there; from a folder to a file and back."""
    folder = group.folder / f"saved-{group.size}"

    def fresh() -> tuple[Any, Adam]:
        sae = group.shard(build("topk"))
        return sae, Adam(sae, lr=1e-2, clip=1.0)

    def go_on(sae: SAE, opt: Adam, steps: range) -> str:
        train(sae, opt, "topk", steps, group.rank, group.size)
        return digest(sae.state_dict().values())

    sae, opt = fresh()
    go_on(sae, opt, range(2))
    done = async_save_checkpoint(folder, sae, opt, {"note": 1})
    last = go_on(sae, opt, range(2, 4))
    assert done.result() == folder and sorted(path.name for path in folder.iterdir()) == ["data-1", "manifest.json"]
    other, again = fresh()
    assert load_checkpoint(folder, other, again) == {"note": 1}
    assert go_on(other, again, range(2, 4)) == last, "a step after the call is in what was saved"

    name = checkpoints._name
    if group.rank == 0:
        checkpoints._name = lambda *_: name(folder / "missing", folder)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        lost = async_save_checkpoint(folder, sae, opt)
        error = lost.exception()
        raises(RuntimeError, "save_checkpoint: the save in the background before it has failed", lambda: save_checkpoint(folder, sae, opt))
    checkpoints._name = name
    assert isinstance(error, OSError) and any("nothing has been written" in str(w.message) for w in seen)
    assert load_checkpoint(folder, *fresh()) == {"note": 1}, "the older state is there"
    async_save_checkpoint(folder, sae, opt, {"note": 2})
    save_checkpoint(folder, sae, opt, {"note": 3})  # waits for it
    assert load_checkpoint(folder, *fresh()) == {"note": 3}
    assert sorted(path.name for path in folder.iterdir()) == ["data-3", "manifest.json"]

    file, back = folder.with_suffix(".pt"), folder.with_name(f"back-{group.size}")
    if group.rank == 0:
        convert_checkpoint(folder, file)
        convert_checkpoint(file, back, virtual=V)
        raises(ValueError, "virtual must be given where source is a file", lambda: convert_checkpoint(file, back))
    whole, one = gathered(sae), build("topk")
    dist.barrier(group.group)
    stepped = Adam(one, lr=1.0)
    assert fastsae.load_checkpoint(file, one, stepped).extra == {"note": 3} and stepped.steps == 4 and stepped.clip == 1.0
    assert whole is None or digest(whole.state_dict().values()) == digest(one.state_dict().values())
    other, again = fresh()
    load_checkpoint(back, other, again)
    assert go_on(other, again, range(4, 6)) == go_on(sae, opt, range(4, 6))
    return {} if whole is None else {k: digest([t]) for k, t in whole.state_dict().items()}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = torch.nn.Embedding(20, D), torch.nn.Linear(D, D)

    def forward(self, ids: Tensor) -> Tensor:
        return self.block(self.embed(ids))


def stored(group: Group) -> dict[str, Any]:
    """Activations, and latents, of which each process writes its part; the same command once more writes nothing."""
    torch.manual_seed(0)
    model, tokens, out = Model(), torch.randint(0, 20, (23, 5)), group.folder / f"shards-{group.size}"
    mask = torch.rand(23, 5) < 0.8
    options = {"mask": mask, "ignore": [3], "batch": 2, "rows_a_shard": 7, "rank": group.rank, "ranks": group.size, "progress": False}
    harvest(model, tokens, "block", out, **options)
    dist.barrier(group.group)
    store = harvest(model, tokens, "block", out, **options)
    assert [path.name for path in out.glob("*.json")] == ["activations.json"]
    rows = ActivationShards(out).read(0, int((mask & (tokens != 3)).sum()))
    assert store.about == ActivationShards(out).about
    raises(ValueError, "and nothing can be added", lambda: ShardWriter(out, store.about).append(rows))

    sae, folder = SAE(D, 41, TopK(3), seed=0).eval(), group.folder / f"latents-{group.size}"
    own = slice(*bounds(len(tokens), group.size)[group.rank : group.rank + 2])
    with torch.no_grad(), LatentWriter(folder, 41, 5, tokens_a_part=10, writer=group.rank) as writer:
        for part_ in tokens[own].split(2):
            writer.append(sae.encode(model.embed(part_)), part_)
    dist.barrier(group.group)
    if group.rank == 0:
        join(folder)
    dist.barrier(group.group)
    assert [path.name for path in folder.glob("*.json")] == ["latents.json"]
    latents = LatentStore(folder)
    found = {"fired": latents.fired(), "top": [latents.top(f, 4, before=1, after=1) for f in (0, 7)]}  # all sort at the same time
    latents.verify()
    return {**rows, **found, "about": store.about}


WORK: dict[str, Callable[[Group], Any]] = {"matched": matched, "spline": spline, "counted": counted, "saved": saved, "stored": stored}


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
    sizes, meet = [int(size) for size in sys.argv[1].split(",")], port()
    found = ended(fork(sizes[-1], lambda rank: main(rank, sizes, Path(sys.argv[2]), meet)), 240, together=True)
    sys.exit(max(abs(code) for code, _ in found))
