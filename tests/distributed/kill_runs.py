"""Runs of which a process is killed, and what goes on from their checkpoints: all processes are forks of this one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forks import ended, fork, port
from sharded_runs import batches, build, digest, optimiser, part

from fastsae.distributed import gathered, load_checkpoint, save_checkpoint, shard

STEPS, TIMEOUT = 10, 8.0


def train(rank: int, size: int, kind: str, folder: Path, kill: Callable[[int, Any], None]) -> None:
    """From the checkpoint where there is one; the digest of what rank 0 ends with is in a file."""
    sae: Any = shard(build(kind), virtual=8, timeout=TIMEOUT)
    opt, start = optimiser(sae, kind), 0
    if (folder / "manifest.json").exists():
        start = load_checkpoint(folder, sae, opt)["step"]
    for step, batch in enumerate(batches(kind, STEPS)):
        if step >= start:
            kill(step, sae.world)
            opt.step(*(part(t, rank, size, step) for t in batch))
            if step % 2:
                save_checkpoint(folder, sae, opt, {"step": step + 1})
    whole = gathered(sae)
    if whole is not None:
        state = opt.state_dict()
        (folder / f"end-{size}").write_text(digest([*whole.state_dict().values(), torch.tensor(state["steps"])]))


def start(size: int, kind: str, folder: Path, kill: Callable[[int, int, Any], None] = lambda rank, step, world: None) -> list[int]:
    meet = port()

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{meet}", rank=rank, world_size=size, timeout=timedelta(seconds=60))
        train(rank, size, kind, folder, lambda step, world: kill(rank, step, world))
        dist.barrier()

    return fork(size, run, lambda rank, text: (folder / f"error-{rank}").write_text(text))


def killed(seed: int, kind: str, folder: Path, others: list[int]) -> None:
    """One of four, at a drawn exchange and some milliseconds after it; then a run on each of ``others`` from what it has left."""
    draw = random.Random(seed)
    victim, at, exchange, delay = draw.randrange(4), draw.randrange(2, STEPS - 3), draw.randrange(30), draw.random() * 0.02

    def kill(rank: int, step: int, world: Any) -> None:
        if (rank, step) != (victim, at):
            return
        call, left = world._call, [exchange]

        def counted(*arguments: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            call(*arguments)

        world._call = counted

    folder.mkdir()
    said = f"seed {seed}: rank {victim} of 4 at step {at}, exchange {exchange}, {delay * 1e3:.0f} ms"
    codes, times = zip(*ended(start(4, kind, folder, kill), 120))
    errors = {rank: (folder / f"error-{rank}").read_text() for rank in range(4) if (folder / f"error-{rank}").exists()}
    late = max(times) - times[victim]
    assert [*codes] == [-signal.SIGKILL if rank == victim else 1 for rank in range(4)], (said, codes, errors)
    assert late < TIMEOUT + 7, (said, late)
    assert all("was lost" in text or "Connection" in text for text in errors.values()), (said, errors)
    wanted = (folder.parent / f"{kind}/end-1").read_text()
    for size in others:  # each from the same checkpoint
        again = folder.with_name(f"{folder.name}-{size}")
        shutil.copytree(folder, again)
        assert not any(code for code, _ in ended(start(size, kind, again), 240)), (
            said,
            size,
            [path.read_text() for path in again.glob("error-*")],
        )
        assert (again / f"end-{size}").read_text() == wanted, (said, size)
    print(
        f"{said}; the others ended {late:.2f} s after it: {sorted({text.splitlines()[-1][:120] for text in errors.values()})}", flush=True
    )


if __name__ == "__main__":
    base, first, times, others = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), [int(size) for size in sys.argv[4].split(",")]
    for kind in ("topk", "batchtopk"):
        (base / kind).mkdir()
        assert ended(start(1, kind, base / kind), 240)[0][0] == 0, (base / kind / "error-0").read_text()
    for seed in range(first, first + times):  # of many each goes on on one of the others, in turn
        again = others if times == 1 else [others[seed % len(others)]]
        killed(seed, ("topk", "batchtopk")[seed % 2], base / f"run-{seed}", again)
