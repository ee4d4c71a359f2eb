"""kill -9 at any point of a harvest, a training run or the building of a store: what is there is whole, and the run goes on to the same
bits. ``FASTSAE_TEST_KILLS`` says at how many points (default 2; `make deep` 20)."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT, TESTS

from fastsae import load_checkpoint
from fastsae.store import ActivationShards, LatentStore

pytest.importorskip("safetensors", reason="safetensors is not installed (extra [store])")
if not hasattr(os, "fork"):
    pytest.skip("the jobs run in forks of one process", allow_module_level=True)

KILLS = int(os.environ.get("FASTSAE_TEST_KILLS", "2"))
Run = Callable[[str, Path, int], tuple[int, int]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def run(inputs: Path) -> Generator[Run, None, None]:
    """Runs a job in a process of its own, killed at an event or not: (exit status, events)."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    with open(inputs / "errors", "w") as errors:
        command = [sys.executable, str(TESTS / "kill_jobs.py"), str(inputs)]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables)

    def ask(job: str, folder: Path, event: int = 0) -> tuple[int, int]:
        assert server.stdin is not None and server.stdout is not None
        print(json.dumps([job, str(folder), event]), file=server.stdin, flush=True)
        status, events = json.loads(server.stdout.readline() or "[1, 0]")
        assert status in (0, -9), (inputs / "errors").read_text()[-3000:]
        return status, events

    yield ask
    server.communicate()


def contents(folder: Path) -> dict[str, Any]:
    """Every file; a killed writer may leave ``.*.part*``, which nobody reads."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() if path.suffix != ".pt" else values(torch.load(path)) for path in found}


def values(content: Any) -> Any:
    """What a checkpoint holds: its bytes tell which equal names were one object in the writer's memory, too."""
    if isinstance(content, dict):
        return {name: values(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [values(value) for value in content]
    return content.numpy().tobytes() if isinstance(content, torch.Tensor) else content


def whole_rows(folder: Path, reference: Path) -> int:
    """How many rows a killed harvest has kept; they are the first ones of the whole run."""
    if not list((folder / "acts").glob("activations*.json")):
        return 0
    kept, whole = ActivationShards(folder / "acts"), ActivationShards(reference / "acts")
    kept.verify()
    for name, column in whole.read(0, len(kept)).items():
        assert torch.equal(column, kept.read(0, len(kept))[name])
    return len(kept)


def whole_steps(folder: Path, reference: Path) -> int:
    return load_checkpoint(folder / "run.pt").extra["step"] if (folder / "run.pt").exists() else 0


def whole_sequences(folder: Path, reference: Path) -> int:
    if not (folder / "store/latents.json").exists():
        return 0
    kept = LatentStore(folder / "store")
    kept.verify()
    for (_, latents, tokens), (_, all_latents, all_tokens) in zip(kept.parts(), LatentStore(reference / "store").parts()):
        assert torch.equal(latents.to_dense(), all_latents.to_dense()) and torch.equal(tokens, all_tokens)
    return kept.sequences


@pytest.mark.parametrize(("job", "kept"), [("harvest", whole_rows), ("train", whole_steps), ("store", whole_sequences)])
def test_a_killed_run_goes_on_to_the_same_bits(job: str, kept: Callable[[Path, Path], int], run: Run, inputs: Path) -> None:
    reference, before = inputs / f"{job}-whole", list[int]()
    status, events = run(job, reference, 0)
    assert status == 0 and contents(reference) == contents(inputs / f"{job}-first")
    for number in range(KILLS):
        folder, draw = inputs / f"{job}-{number}", random.Random(f"{job} {number}")
        status, _ = run(job, folder, draw.randrange(1, events))
        assert status == -9
        before.append(kept(folder, reference))
        if run(job, folder, draw.randrange(1, events))[0] == -9:  # and once more, on the way of the second run
            assert kept(folder, reference) >= before[-1]
        assert run(job, folder, 0)[0] == 0
        assert contents(folder) == contents(reference), f"killed at {before[-1]}"
    print(f"{job}: {events} events; kept {before} of {kept(reference, reference)}")
