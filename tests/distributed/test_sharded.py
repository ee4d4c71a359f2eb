"""The same bits on any number of processes, and errors that reach all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forks import script
from sharded_runs import KINDS, LONG, MANY, MANY_LONG, MANY_USED, PLANNED, RESAMPLED, STOP, USED, anew, build, dense, optimiser, train
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastsae import SAE, AuxK, BatchTopK, SAEs, TopK, distributed
from fastsae._core.world import tree
from fastsae.optim import Adam
from fastsae.sae import Crosscoder, CrossLayerTranscoder

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
SIZES, STEPS = ([1, 2, 4, 8], 1000) if DEEP else ([1, 2, 4], STOP)
MESHES: list[Any] = [(n, SIZES[-1] // n) for n in ((2, 4, 1) if DEEP else (2, 1))]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """Of one set of processes, whose first ones are the smaller groups."""
    folder = tmp_path_factory.mktemp("sharded")
    script("sharded_runs.py", ",".join(map(str, SIZES)), STEPS, folder, 7000 if DEEP else 400)
    return torch.load(folder / "results.pt")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *MANY])
def test_training_is_the_same_on_any_number_of_processes(results: dict[Any, Any], kind: str) -> None:
    first = results["stopped", kind, 1]
    for (what, of, size), found in results.items():
        if what in ("trained", "stopped") and of == kind:
            same = results[what, kind, 1]
            assert {k: v for k, v in found.items() if k != "numbers"} == {k: v for k, v in same.items() if k != "numbers"}, size
    # The same numbers as an SAE that was never sharded, until rounding has been amplified.
    sae = build(kind)
    steps = min(7, len(first["numbers"]))
    whole = torch.stack(train(sae, optimiser(sae, kind), kind, range(steps), 0, 1))
    torch.testing.assert_close(first["numbers"][:steps], whole, rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(first["numbers"][:2], whole[:2], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*LONG, *MANY_LONG])
def test_a_checkpoint_goes_on_on_any_number_of_processes(results: dict[Any, Any], kind: str) -> None:
    sizes = [size for what, of, size in results if what == "resumed" and of == kind]
    assert {1, 4} <= set(sizes)
    for size in sizes:
        resumed, stopped = results["resumed", kind, size], results["stopped", kind, 1]
        assert resumed == {name: stopped[name] for name in resumed} and len(resumed) > 5, size


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*USED, *MANY_USED])
def test_latents_outputs_and_losses(results: dict[Any, Any], kind: str) -> None:
    first = results["used", kind, 1]
    sae = build(kind)
    if first["k"] is not None:
        sae.k = first["k"]  # annealed
    x, target = first["x"], first["x"] if first["target"] is None else first["target"]
    for training in (True, False):
        sae.load_state_dict(first["state", training])
        latents, x_hat, error, loss = first[training]
        sae.train(training)
        for size in [1, *SIZES[1:], *MESHES]:
            found = results.get(("used", kind, size), first)
            assert all(map(torch.equal, first[training], found[training])), size
            if kind in MANY:
                bad, of_bad = found["bad", training]
                assert torch.equal(of_bad, dense(sae.encode(bad)))
        assert torch.equal(latents, dense(sae.encode(x)))  # the bits of one process
        exact = outputs(sae, x, latents.double())
        if kind == "rows":
            exact = exact * x.double().std(1, keepdim=True) + x.double().mean(1, keepdim=True)
        torch.testing.assert_close(x_hat.double(), exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(error.double(), (target.flatten(1).double() - exact).square().sum(1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(loss, torch.stack(sae.loss(x, first["target"])).detach(), rtol=1e-4, atol=1e-5)


def outputs(sae: Any, x: Tensor, latents: Tensor) -> Tensor:
    """What latents write, in float64."""
    if isinstance(sae, SAE):
        y = latents @ sae.W_dec.double() + sae.b_dec.double()
        return y if sae.W_skip is None else y + x.double() @ sae.W_skip.double().T
    y = sae.b_dec.double().repeat(len(x), 1, 1)
    for n, own in enumerate(latents.chunk(sae.n_layers, 1)):
        y[:, n:] += torch.einsum("bf,fmd->bmd", own, sae.W_dec(n).double())
        if sae.skip:
            y[:, n:] += (x[:, n].double() @ sae[n].W_skip.double().T).unflatten(1, (-1, sae.d_model))
    return y.flatten(1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", RESAMPLED)
def test_dead_features_start_anew_at_the_same_rows(results: dict[Any, Any], kind: str) -> None:
    first = results["resampled", kind, 1]
    torch.testing.assert_close(first["rows"], anew(build(kind), kind), rtol=1e-3, atol=1e-5)
    for (what, of, size), found in results.items():
        if what == "resampled" and of == kind:
            assert all(torch.equal(t, first[name]) if name == "rows" else t == first[name] for name, t in found.items()), size


@pytest.mark.slow
def test_all_refuse_a_step_that_is_not_finite(results: dict[Any, Any]) -> None:
    assert all(found == results["not_finite", "topk", 1] for (what, _, _), found in results.items() if what == "not_finite")


@pytest.mark.slow
def test_a_trainer_s_run_and_its_second_half(results: dict[Any, Any]) -> None:
    assert all(found == results["looped", kind, 1] for (what, kind, _), found in results.items() if what == "looped")


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_bytes_of_a_selection(results: dict[Any, Any], size: int) -> None:
    """8 k to the rows' owners and 8 back, of which the share of one's own rows is not sent."""
    got = results["counted", "topk", size]
    assert got["bytes"] == got["most"] * (size - 1) / size


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLANNED)
def test_bytes_of_a_step_are_those_of_the_plan(results: dict[Any, Any], kind: str) -> None:
    for size in SIZES:
        found = results["planned", kind, size]
        assert found["counted"] == found["planned"] and (found["counted"] > 0) is (size > 1), (size, found)


def test_a_plan_of_a_large_dictionary() -> None:
    rates = distributed.Rates(flops=4e14, memory=3e12, network=5e10, latency=2e-5)
    one, many = (distributed.plan(2**24, 4096, tokens=10**12, rates=rates, ranks=n, k=64) for n in (1, 64))
    assert one.memory > 1.6e12 > 64e9 > many.memory and one.sent == 0
    assert one.parameters == 2**24 * (2 * 4096 + 1) + 4096
    assert many.sent == 63 * (128 * (4 * 4096 + 8 * 64 + 8 + 8 * 4096) + 4 * 4096 + 32)
    assert one.product == 64 * many.product and one.steps == many.steps == -(-(10**12) // 8192)
    with pytest.raises(ValueError, match=r"plan: ranks must be"):
        distributed.plan(64, 8, tokens=1, rates=rates, ranks=0)
    with pytest.raises(ValueError, match=r"plan: rates.flops must be"):
        distributed.plan(64, 8, tokens=1, rates=rates._replace(flops=0))
    with pytest.raises(ValueError, match=r"plan: d_out must be None with several layers, got 8"):
        distributed.plan(64, 8, tokens=1, rates=rates, layers=2, d_out=8)
    with pytest.raises(ValueError, match=r"plan: skip needs d_out or cross_layer"):
        distributed.plan(64, 8, tokens=1, rates=rates, skip=True)


class Likeness:
    """In place of gloo on one process of torch's fake group: all others have what this one has."""

    def __init__(self, _: Any, rank: int, size: int, timeout: Any):
        self.rank, self.size = rank, size

    def alltoall_base(self, got: Tensor, flat: Tensor, got_sizes: list[int], sizes: list[int]) -> Any:
        own = flat.split(sizes)[self.rank]
        for part in got.split(got_sizes):
            part.copy_(own[: part.numel()])
        return self

    def allreduce(self, tensors: list[Tensor]) -> Any:
        tensors[0].mul_(self.size)
        return self

    def wait(self) -> None:
        pass


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, size: Any) -> Iterator[tuple[int, int, Any]]:
    """(processes to a copy, copies, mesh) of a world that is not there."""
    shards, copies = size if isinstance(size, tuple) else (size, 1)
    monkeypatch.setattr(dist, "ProcessGroupGloo", Likeness)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda *_: None)
    dist.init_process_group("fake", rank=shards * copies - 1, world_size=shards * copies, store=FakeStore())
    try:
        yield shards, copies, None if copies == 1 else init_device_mesh("cpu", size)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("size", [64, (16, 4)])
def test_shapes_of_layers_and_stacks_in_worlds_that_are_not_there(pretended: tuple[int, int, Any]) -> None:
    shards, copies, mesh = pretended
    features, rows, x = 4 * shards, 3 * shards * copies, torch.randn(2, 3, 5, 4)
    clt = distributed.shard(CrossLayerTranscoder(5, 4, features, BatchTopK(2), device="meta"), mesh, virtual=shards, seed=0)
    assert float(Adam(clt, lr=1e-3).step(*x).l0) == 10 and [layer.W_dec.shape for layer in clt] == [(4, 4 * (5 - n)) for n in range(5)]
    assert clt.encode(x[0])[4].n_features == features and clt.decode(clt.eval().encode(x[0])).shape == (3, 5, 4)
    whole = SAEs(Crosscoder(5, 4, features, TopK(4), seed=n) for n in range(2))
    saes = distributed.shard(whole, mesh, virtual=shards)
    assert Adam(saes, lr=1e-3, clip=1.0).step(x[0].flatten(1)).loss.shape == (2,) and saes.W_dec.shape == (2, 4, 20)
    assert saes[0].silent.shape == (4,) and int(saes[0].silent.max()) == rows


@pytest.mark.parametrize("size", [64, (16, 4)])
def test_a_plan_of_layers_and_stacks(pretended: tuple[int, int, Any]) -> None:
    shards, copies, mesh = pretended
    features, ranks, x = 4 * shards, shards * copies, torch.randn(2, 3, 5, 4)
    clt = CrossLayerTranscoder(5, 4, features, TopK(2), aux=AuxK(3), dead_after=1, skip=True, seed=0)
    stack = SAEs(Crosscoder(5, 4, features, TopK(2), seed=n) for n in range(3))
    for whole, rows, options in ((clt, x, {"cross_layer": True, "skip": True, "k_aux": 3}), (stack, x[:1].flatten(2), {"members": 3})):
        module: Any = distributed.shard(whole, mesh, virtual=shards)
        opt, before = Adam(module, lr=1e-3), module.world.sent
        opt.step(*rows)
        sizes = {"ranks": ranks, "copies": copies, "batch": 3 * ranks, "k": 2, "layers": 5}
        found = distributed.plan(features, 4, tokens=1, rates=distributed.Rates(1e9, 1e9, 1e9, 1e-5), **sizes, **options)
        assert found.parameters == sum(p.numel() for p in whole.parameters())
        assert found.weights == 4 * sum(p.numel() for p in module.parameters())
        entries = opt.state_dict()["state"].values()
        assert found.moments == 4 * sum(t.numel() for entry in entries for t in entry.values() if isinstance(t, Tensor))
        assert copies > 1 or module.world.sent - before == found.sent


@pytest.mark.parametrize("size", [64, 512, (16, 4), (1, 32)])
def test_bytes_and_shapes_of_worlds_that_are_not_there(pretended: tuple[int, int, Any]) -> None:
    shards, copies, mesh = pretended
    ranks, rows, d, features = shards * copies, 3, 12, 4 * max(shards, 16)
    whole = SAE(d, features, TopK(4), aux=AuxK(6), dead_after=1, device="meta")
    sae: Any = distributed.shard(whole, mesh, virtual=max(shards, 2), seed=0)
    sae.silent.fill_(5)
    opt = Adam(sae, lr=1e-3)
    before = sae.world.sent
    metrics = opt.step(torch.randn(rows, d, generator=torch.Generator().manual_seed(0)))
    rates = distributed.Rates(1e9, 1e9, 1e9, 1e-5)
    found = distributed.plan(features, d, tokens=1, rates=rates, ranks=ranks, copies=copies, batch=rows * ranks, k=4, k_aux=6)
    assert sae.W_enc.shape == sae.W_dec.shape == (features // shards, d) and sae.silent.shape == (features // shards,)
    assert found.weights == 4 * sum(p.numel() for p in sae.parameters())
    entries = opt.state_dict()["state"].values()
    assert found.moments == 4 * sum(t.numel() for entry in entries for t in entry.values() if isinstance(t, Tensor))
    assert int(metrics.dead) % shards == 0
    # With copies the latents of this process's features are not quite as many as of others.
    assert sae.world.sent - before == (pytest.approx(found.sent, rel=0.2) if copies > 1 else found.sent)


def test_what_needs_a_group() -> None:
    with pytest.raises(RuntimeError, match=r"there is no process group: call torch.distributed.init_process_group"):
        distributed.shard(build("topk"))
    sae = build("topk")
    assert distributed.gathered(sae) is sae
    with pytest.raises(TypeError, match=r"sae must be what fastsae.distributed.shard returned"):
        distributed.save_checkpoint("nowhere", sae)
    assert isinstance(sae, SAE) and sae.world.virtual == 1


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 8, 12])
def test_a_tree_is_a_sum_and_has_subtrees(n: int) -> None:
    t = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tree(t).double(), t.double().sum(0))
    parts: list[Tensor] = list(t.split(4)) if n % 4 == 0 and n else [t]
    assert torch.equal(tree(torch.stack([tree(part) for part in parts])), tree(t))


@pytest.mark.slow
def test_drawn_configurations(tmp_path: Path) -> None:
    assert int(script("drawn_runs.py", 400 if DEEP else 10, tmp_path).split()[0]) > 0
