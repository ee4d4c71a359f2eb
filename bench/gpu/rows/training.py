"""The whole training step, and the optimisers of one weight matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench import training
from bench.gpu.harness import Bench, Call
from bench.harness import name
from fastsae.dispatch import OPS

STEP = (8192, 2048, 65536, 64), (32, 64, 2048, 8)


def step(b: Bench) -> None:
    """The whole training step of a TopK SAE with exact Adam and unit-norm decoder rows."""
    rows, width, features, k = b.shape(*STEP)
    start = training.Start(b.unit_rows(features, width), torch.zeros(width, device=b.device), k)
    x = b.normal(rows + rows // 4, width)
    probe = x if b.device.type == "cpu" else x[: rows + 64]
    choice = b.backends("encode_topk", (probe[:8], start.W, None, None, None, None, None, k, True))
    xs = [b.normal(rows, width) for _ in range(2)]
    mine = training.ours(start)
    others = {**training.plain_ways(start), "dense torch (scatter, linear, Adam)": training.plain(start, "dense")}
    others |= training.peers(start, ["sparsify, torch Adam"])
    calls: dict[str, Call] = {who: lambda i, runner=runner: runner.step(xs[i % 2]) for who, runner in others.items()}

    def verify(_: str) -> None:
        some = training.distinct_rows(x[: rows // 8], start, rows // 16)
        training.check_step(training.ours(start), training.plain(start), some, start.lr)
        b.clear()

    # Bytes of an exact Adam: weights and moments read and written once.
    half, low, product = start.W.bfloat16(), xs[0].bfloat16(), torch.empty(rows, features, device=b.device, dtype=torch.bfloat16)
    states = [torch.zeros_like(start.W) for _ in range(6)]

    def one_pass(_: int) -> None:
        torch.mm(low, half.T, out=product)
        for state in states:
            state.add_(1)

    floor = "one bf16 GEMM, one pass over weights and moments"
    calls[floor] = one_pass
    targets = [("sparsify, torch Adam", 1 / 1.5, 1 / 2), ("dense torch (scatter, linear, Adam)", 1 / 3, 1 / 4)]
    b.row(
        "training step", name((rows, width, features, k)), {choice[0]: lambda i: mine.step(xs[i % 2])}, calls, verify=verify,
        floor=floor, targets=targets,
    )  # fmt: skip


LR, MOMENTUM, SHARE = 1e-3, 0.95, 0.1  # of the optimisers below
N_STATES = {"adam": 2, "signum": 1}


def optimisers(b: Bench) -> None:
    """One weight matrix from slots. torch gets the dense gradient for nothing ("given"), or our decode_dweight writes it first."""
    for op in N_STATES:
        _optimiser(b, op)
        b.clear()


def _arguments(op: str, states: list[Tensor], slots: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of the operation, whose first arguments are the weights and their state."""
    rest = (None, LR, 0.9, 0.999, 1e-8, 0.0, 10, False, False) if op == "adam" else (LR, MOMENTUM, SHARE, False, False)
    return *states, *slots, *rest


def _torch_signum(y: Tensor, z: Tensor, g: Tensor) -> None:
    y.lerp_(z, 1 - 1 / MOMENTUM)
    z.sub_(g.sign(), alpha=LR)
    y.lerp_(z, SHARE).lerp_(z, 1 - MOMENTUM)


def _optimiser(b: Bench, op: str) -> None:
    rows, width, features, k = b.shape(*STEP)
    n_states = N_STATES[op]
    sets, grads = b.latents(rows, features, k, 2, torch.float32), [b.normal(rows, width) for _ in range(2)]
    W, dense = b.unit_rows(features, width), torch.empty(features, width, device=b.device)
    states = [W, *(torch.zeros_like(W) for _ in range(n_states))]
    twin = [t.clone() for t in states]

    def args(i: int) -> tuple[Any, ...]:
        return _arguments(op, states, (grads[i % 2], *sets[i % 2], None))

    def verify(backend: str) -> None:
        n, some = max(1, features // 16), slice(0, rows // 16)
        few = [b.unit_rows(n, width), *(torch.zeros(n, width, device=b.device) for _ in range(n_states))]
        before = _arguments(op, few, (grads[0][some], sets[0][0][some], sets[0][1][some] % n, None))
        after = [t.clone() for t in few]
        OPS[op](*after, *before[len(few) :], backend=backend)
        OPS[op].check(before, tuple(after))

    leaf = torch.nn.Parameter(twin[0])
    leaf.grad = dense
    adam = torch.optim.Adam([leaf], lr=LR, fused=True)

    def given(_: int) -> None:
        if op == "adam":
            adam.step()
        else:
            _torch_signum(twin[0], twin[1], dense)

    def formed(i: int) -> None:
        OPS["decode_dweight"](*sets[i % 2], None, grads[i % 2], dense)
        given(i)

    def one_pass(_: int) -> None:
        for t in states:
            t.add_(0)

    floor = "one pass over weights and state"
    others: dict[str, Call] = {floor: one_pass, f"torch {op}, gradient given": given, f"decode_dweight + torch {op}": formed}
    if op == "signum" and b.device.type == "cuda":
        fast = torch.compile(_torch_signum)
        others["torch.compile signum, gradient given"] = lambda _: fast(twin[0], twin[1], dense)
    dense.copy_(W)
    b.row(
        f"{op} float32", name((rows, width, features, k)), b.ours(op, args), others, verify=verify, floor=floor,
        n_bytes=rows * k * (width * 4 + 12) + 8 * features * width * (1 + n_states),
    )  # fmt: skip
