"""Two processes of one thread each, which do the same on demand: what the benches of ``fastsae.distributed`` time."""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

import fastsae
from fastsae import SAE, TopK
from fastsae.distributed import Rates, part, shard
from fastsae.optim import Adam

Shape = tuple[int, ...]


def one(shape: Shape, virtual: int | None) -> Callable[[], float]:
    """A step of F features in all, in this process, of its rows of B, and the loss; ``virtual`` None: of a process that is alone."""
    rows, width, features, k = shape
    sae = SAE(width, features, TopK(k), seed=0)
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
    if virtual is not None:
        sae, x = shard(sae, virtual=virtual), x.tensor_split(dist.get_world_size())[dist.get_rank()]
    opt = Adam(sae, lr=1e-4)
    if virtual is not None:
        return lambda: float(opt.step(x).loss)

    def alone() -> float:  # which opt.step refuses in a group
        metrics, gradients = sae.step_gradients(x)
        opt.apply(gradients)
        return float(metrics.loss)

    return alone


def rates(shape: Shape) -> Rates:
    """As ``plan`` takes them, of this shape, while the other process measures too."""
    rows, width, features, k = shape
    world, W = part(torch.zeros(1, 1)).world, torch.randn(features // 2, width)
    x, other, large = torch.randn(rows, width), torch.empty_like(W), torch.zeros(1 << 22)

    def swapped(t: torch.Tensor) -> None:
        world.swap([t, t], [len(t)] * 2)

    calls = {
        "product": lambda: fastsae.encode_topk(x, W, k=k),
        "copy": lambda: other.copy_(W),
        "sent": lambda: swapped(large),
        "exchange": lambda: swapped(large[:4]),
    }
    took = {name: min(_seconds(call) for _ in range(7)) for name, call in calls.items()}
    return Rates(2.0 * rows * W.numel() / took["product"], 2.0 * W.nbytes / took["copy"], large.nbytes / took["sent"], took["exchange"])


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _work(rank: int, port: int, orders: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    made: dict[Any, Callable[[], float]] = {}
    while (order := orders.recv()) is not None:
        what, arguments = order
        if what == "rates":
            orders.send(rates(*arguments))
            continue
        if arguments not in made:
            made[arguments] = one(*arguments)
        orders.send(made[arguments]())


@contextmanager
def pair() -> Generator[Callable[..., list[Any]]]:
    """``ask(what, *arguments, of=2)``: "step" with those of ``one``, or "rates"; the answers of the first ``of`` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(2)]
    processes = [context.Process(target=_work, args=(rank, port, pipe[1]), daemon=True) for rank, pipe in enumerate(pipes)]
    for process, (_, theirs) in zip(processes, pipes):
        process.start()
        theirs.close()  # one that fails is heard of

    def ask(what: str, *arguments: Any, of: int = 2) -> list[Any]:
        for ours, _ in pipes[:of]:
            ours.send((what, arguments))
        return [ours.recv() for ours, _ in pipes[:of]]

    try:
        yield ask
        for ours, _ in pipes:
            ours.send(None)
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            process.kill()
