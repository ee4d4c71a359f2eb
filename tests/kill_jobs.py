"""Runs that a test kills. As a program it reads lines ``[job, folder, event]`` of JSON, and runs each job in a fork of itself, which
SIGKILL ends at its ``event``-th call of a function (0: never). It answers ``[status, events]``."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from toy_language import WIDTH, transformers

import fastsae.commands.harvest
import fastsae.commands.latents
from fastsae import SAE, AuxK, TopK, Trainer, optim
from fastsae.__main__ import main
from fastsae.store import ActivationShards, LatentWriter

HOOK = "layers.1"


def harvest(folder: Path) -> None:
    arguments = ["harvest", "toy", str(folder.parent / "text.txt"), "--hooks", f"{HOOK},layers.0:input", "--out", str(folder / "acts")]
    assert main([*arguments, "--context", "9", "--batch", "3"]) == 0


def train(folder: Path) -> None:
    sae = SAE(WIDTH, 40, TopK(3), aux=AuxK(8), dead_after=100, seed=1)
    batches = ActivationShards(folder.parent / "input/acts").batches(20, x=HOOK, seed=2, window=2)
    trainer = Trainer(sae, optim.Adam(sae, lr=1e-3), checkpoint=folder / "run.pt", every=3, progress=False)
    trainer.fit(batches, 40, resume=True)


def store(folder: Path) -> None:
    made = ["--column", HOOK, "--out", str(folder / "store")]
    assert main(["latents", "build", str(folder.parent / "input/sae"), str(folder.parent / "input/acts"), *made]) == 0


def prepare(folder: Path) -> None:
    """What the jobs read; and each once, uninterrupted, which imports what they need."""
    (folder / "text.txt").write_text("".join(f"{n} bottles of beer on the wall, {n * n} in all.\n" for n in range(20)))
    harvest(folder / "input")
    SAE(WIDTH, 40, TopK(3), seed=1).save(folder / "input/sae")
    for job in (harvest, train, store):
        job(folder / f"{job.__name__}-first")


def small() -> None:
    """Shards and parts of a few rows, so that a short run writes several."""
    for module, name, value in (
        (fastsae.commands.harvest, "_ROWS_A_SHARD", 90),
        (fastsae.commands.latents, "_ROWS", 30),
        (fastsae.commands.latents, "LatentWriter", functools.partial(LatentWriter, tokens_a_part=100)),
    ):
        setattr(module, name, value)
    sys.modules["transformers"] = transformers()


def killed_at(event: int, job: Any, folder: Path) -> int:
    """The number of calls that the job made."""
    seen = 0

    def called(frame: Any, kind: str, value: Any) -> None:
        nonlocal seen
        seen += kind in ("call", "c_call")
        if seen == event:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(called)
    try:
        job(folder)
    finally:
        sys.setprofile(None)
    return seen


def serve() -> None:
    torch.set_num_threads(1)
    small()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    prepare(Path(sys.argv[1]))
    for line in sys.stdin:
        name, folder, event = json.loads(line)
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            code = 1
            try:
                os.write(write, str(killed_at(event, globals()[name], Path(folder))).encode())
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        os.close(write)
        events = os.read(read, 20).decode()
        os.close(read)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([status, int(events or 0)]), file=answers, flush=True)


if __name__ == "__main__":
    serve()
