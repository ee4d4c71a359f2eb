"""Configurations that hypothesis draws: the same bits on groups of 1, 2 and 4 of one set of processes, which wait for them."""

from __future__ import annotations

import sys
from datetime import timedelta
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forks import ended, fork, port
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sharded_runs import KINDS, Group, module, trained

from fastsae import AbsTopK, AuxK, BatchTopK, Gated, JumpReLU, ReLU, TopK

SIZES, STEPS = (1, 2, 4), 6  # the last one has no rows

ACTIVATIONS = st.one_of(
    st.builds(TopK, st.integers(1, 8), relu=st.booleans()),
    st.builds(AbsTopK, st.integers(1, 8)),
    st.builds(BatchTopK, st.floats(0.3, 8), rate=st.sampled_from([0.01, 0.5])),
    st.just(ReLU()),
    st.builds(JumpReLU, threshold=st.floats(0.05, 3), bandwidth=st.floats(0.1, 1)),
    st.just(Gated()),
)
OPTIONS = st.fixed_dictionaries(
    {"activation": ACTIVATIONS, "d_sae": st.integers(1, 90)},
    optional={
        "aux": st.builds(
            AuxK, st.integers(1, 9), relu=st.booleans(), bias=st.booleans(), denominator=st.sampled_from(["residual", "total", "tokens"])
        ),
        "dead_after": st.integers(1, 60),
        "objective": st.sampled_from(["mse", "fvu"]),
        "d_out": st.integers(1, 9),
        "skip": st.booleans(),
        "tied": st.booleans(),
        "l1": st.sampled_from([0.0, 0.03]),
        "l0": st.sampled_from([0.0, 0.01]),
        "normalise_decoder": st.booleans(),
        "normalise_rows": st.sampled_from(["layer_norm", "norm"]),
        "pre_bias": st.booleans(),
    },
)


def work(rank: int, folder: Path, meet: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{meet}", rank=rank, world_size=SIZES[-1], timeout=timedelta(seconds=60))
    groups = [Group(size, folder) for size in SIZES]
    while (options := pipe.recv()) is not None:
        KINDS["drawn"] = options
        found = [trained(group, "drawn", STEPS) for group in groups if rank < group.size]
        pipe.send([{name: value for name, value in one.items() if name != "numbers"} for one in found])


if __name__ == "__main__":
    count, folder = int(sys.argv[1]), Path(sys.argv[2])
    pipes, meet, tried = [Pipe() for _ in range(SIZES[-1])], port(), 0
    pids = fork(SIZES[-1], lambda rank: work(rank, folder, meet, pipes[rank][1]))

    @settings(max_examples=count, deadline=None, derandomize=True, database=None)
    @given(OPTIONS)
    def same(options: dict[str, Any]) -> None:
        global tried
        KINDS["drawn"] = options
        try:
            module("drawn", range(2))
        except (TypeError, ValueError):
            assume(False)  # no such SAE
        tried += 1
        for here, _ in pipes:
            here.send(options)
        alone, *others = pipes[0][0].recv()
        for here, _ in pipes[1:]:
            here.recv()
        for size, found in zip(SIZES[1:], others):
            assert found == alone, f"{size} processes, {options}"

    same()
    for here, _ in pipes:
        here.send(None)
    assert all(code == 0 for code, _ in ended(pids, 60)) and tried >= count // 2
    print(f"{tried} configurations")
