"""A training step in a CUDA graph: what its replays count, and what is refused. On a GPU its bits; elsewhere replays are acted out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_marks import compiled, interpreted, on_gpu, passes_in_the_interpreter

import fastsae
from fastsae import SAE, AuxK, TopK
from fastsae._core import finite, flags
from fastsae.ops.adam import ADAM, adam_samples, bias_corrections
from fastsae.optim import Adam, Signum
from fastsae.optim.optimiser import Optimiser
from fastsae.patch import _adam

D, F, ROWS = 16, 96, 40
CPU = torch.device("cpu")


def rows(seed: int, **where: Any) -> Tensor:
    return torch.randn(ROWS, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device=CPU).to(**where)


def built(**where: Any) -> SAE:
    return SAE(D, F, TopK(4), seed=0, dead_after=2 * ROWS, aux=AuxK(8)).to(**where)


def counters(opt: Optimiser) -> tuple[Any, ...]:
    state = opt.state_dict()  # asks the device
    return opt.steps, state["steps"], {name: entry["step"] for name, entry in state["state"].items()}


@pytest.fixture
def acted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A CPU that answers as a GPU does, late; its one entry says whether a graph is being captured."""
    capturing, now = [False], finite.finite
    monkeypatch.setattr(finite, "finite", lambda sizes: torch.full((), bool(now(sizes)), dtype=torch.bool, device=CPU))
    monkeypatch.setattr(flags, "capturing", lambda device: capturing[0])
    return capturing


def replay(opt: Optimiser, x: Tensor, capturing: list[bool], times: int) -> None:
    """The host's counters move once, for the capture, in which nothing runs; the step runs ``times`` times."""
    before = opt.steps, {name: state.step for name, state in opt._states.items()}
    capturing[0] = True
    for _ in range(times):
        opt.steps = before[0]
        for name, state in opt._states.items():
            state.step = before[1][name]
        opt.step(x)
    capturing[0] = False


@pytest.mark.parametrize("before", [1, 3])
def test_replays_count_on_the_device(before: int, acted: list[bool]) -> None:
    sae, x = built(dtype=torch.float64), rows(1, dtype=torch.float64)
    twin = copy.deepcopy(sae)
    opt, other = (Adam(module, lr=1e-2, betas=(0.8, 0.95), clip=1.0, weight_decay=0.01) for module in (sae, twin))
    for _ in range(before):
        opt.step(x)
    replay(opt, x, acted, 4)
    opt.step(x)  # an eager one after them
    replay(opt, x, acted, 2)
    for _ in range(before + 7):
        other.step(x)
    assert counters(opt) == counters(other)
    for a, b in zip(sae.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)  # in float64; the device rounds the corrections in another order


def test_from_a_bad_batch_on_replays_change_nothing(acted: list[bool]) -> None:
    sae, x = built(), rows(1)
    opt = Adam(sae)
    opt.step(x)
    replay(opt, x, acted, 2)
    before = copy.deepcopy(sae.state_dict())
    replay(opt, x * torch.nan, acted, 1)
    replay(opt, x, acted, 2)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), sae.state_dict().values(), strict=True))
    with pytest.raises(FloatingPointError, match="step 4 is not finite"):
        fastsae.check()
    assert counters(opt) == (3, 3, dict.fromkeys(opt.parameters, 3))
    opt.step(x)
    assert opt.steps == 4


def test_what_a_graph_cannot_hold_is_refused(acted: list[bool]) -> None:
    x = rows(1)
    cases: dict[str, Any] = {
        "one of the same parameters must run before": Adam,
        "the host counts the weights of its average": Signum,
        "the host calls its schedule": lambda sae: Adam(sae, schedule=lambda step: 1.0),
        "on_nonfinite='skip' waits": lambda sae: Adam(sae, on_nonfinite="skip"),
    }
    for reason, make in cases.items():
        opt = make(built())
        acted[0] = False
        if make is not Adam:
            opt.step(x)
        before = copy.deepcopy(opt.module.state_dict()), opt.steps
        acted[0] = True
        with pytest.raises(RuntimeError, match=f"a CUDA graph cannot hold this step: {reason}"):
            opt.step(x)
        assert opt.steps == before[1]
        assert all(torch.equal(a, b) for a, b in zip(before[0].values(), opt.module.state_dict().values(), strict=True))
    p = torch.nn.Parameter(x)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        _adam.step(torch.optim.Adam([p]), {p: x})


def with_corrections(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of ``adam`` with the number of the step in a tensor; the one of the host is wrong."""
    *before, step, project, normalise = args
    number = torch.full((), float(step), dtype=torch.float64, device=CPU)
    corrections = bias_corrections(number, before[8], *before[9:11]).to(before[0].dtype)
    return *before, 10 * step, project, normalise, corrections


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_number_on_the_device_is_the_number_of_the_host(dtype: torch.dtype) -> None:
    for args in list(adam_samples(CPU, dtype, torch.Generator().manual_seed(0)))[::7]:
        written = with_corrections(tuple(t.clone() if isinstance(t, Tensor) else t for t in args))
        ADAM(*written)
        ADAM.check(args, written[:3])


@compiled
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    passes_in_the_interpreter(__file__, "-k", "the_kernel")


@interpreted
def test_the_kernel_takes_the_number_from_the_device() -> None:
    from fastsae.kernels import adam

    for args in list(adam_samples(CPU, torch.float32, torch.Generator().manual_seed(0)))[::29]:
        if args[0].is_contiguous() and 0 < args[0].shape[1] <= adam.MOST_COLUMNS:
            one, other = (tuple(t.clone() if isinstance(t, Tensor) else t for t in args) for _ in range(2))
            adam.adam(*one)
            adam.adam(*with_corrections(other))
            assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(one[:3], other[:3], strict=True))


@compiled
@pytest.mark.slow
def test_the_kernel_compiles() -> None:
    import aot

    from fastsae.kernels import adam

    m = torch.zeros(512, 768, device=CPU)
    with aot.record() as launches:
        adam.adam(m, m, m, m, None, None, None, m[0, 0], 1e-3, 0.9, 0.99, 1e-8, 0.1, 3, True, True, m[0, :2])
    usage = aot.compile_launch(launches[0], 90)
    assert usage.resources["STACK"] == usage.resources["LOCAL"] == 0


@on_gpu
@pytest.mark.parametrize("aux", [None, False], ids=["aux", "no aux"])
def test_gpu_replays_are_steps(aux: Any) -> None:
    sae = built(device="cuda")
    twin, x = copy.deepcopy(sae), rows(0, device="cuda")
    opt, other = (Adam(module, lr=1e-3, clip=1.0) for module in (sae, twin))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, makes flags and state
            opt.step(x, aux=aux)
            other.step(x, aux=aux)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        metrics = opt.step(x, aux=aux)
    for seed in range(1, 6):
        x.copy_(rows(seed))
        graph.replay()
        assert torch.equal(metrics.loss, other.step(x, aux=aux).loss)
    fastsae.check()
    assert all(torch.equal(a, b) for a, b in zip(sae.state_dict().values(), twin.state_dict().values(), strict=True))
    assert counters(opt) == counters(other)
