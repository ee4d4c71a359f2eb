"""Two real processes in one group: what is documented works on both, and what would train two models says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_runs import adam, batches, both, build, data

from fastsae import Trainer

SCRIPT = """
    import os, sys, torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel as DDP
    import fastsae
    from fastsae import SAE, SAEs, AuxK, BatchTopK, TopK, Trainer
    from fastsae.optim import Adam, Signum
    from fastsae.sae import CrossLayerTranscoder
    from fastsae.trainer import Batches
    from training_runs import Fused, adam, build, data, same

    rank, folder = int(sys.argv[1]), sys.argv[2]

    # in one process, before there is a group; AuxK's denominator is a number of tokens, so that the mean of the ranks' losses is the loss
    def start(seed):
        return build(aux=AuxK(8, denominator="tokens", share=False), dead_after=30, seed=seed)
    whole = {}
    for kind in ("aux", "masked"):
        masks = [torch.stack([torch.arange(10) % 3 != 0, torch.arange(10) % 3 != 1], 1).flatten()] * 10
        rows = data().split(20)
        whole[kind] = sae = start(seed=0)
        run = Trainer(sae, torch.optim.SGD(sae.parameters(), lr=0.05), clip=1.0, progress=False)
        run.fit([*zip(rows, [None] * 10, masks)] if kind == "masked" else rows, 10)

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)

    class Loss(nn.Module):
        def __init__(self, sae):
            super().__init__()
            self.sae = sae
        def forward(self, x):
            return self.sae.loss(x).loss

    def mean(parameters):
        for p in parameters:
            dist.all_reduce(p.grad)
            p.grad /= 2

    def plain(**options):
        return build(aux=None, **options)

    def refused(message, call, error=RuntimeError):
        try:
            call()
        except error as problem:
            assert message in str(problem), problem
        else:
            raise AssertionError(f"nothing was said of {message}")

    def alike(sae):
        for p in sae.parameters():
            both = [torch.empty_like(p) for _ in range(2)]
            dist.all_gather(both, p.detach())
            assert torch.equal(*both)

    x = data()[rank * 100 : rank * 100 + 100]

    # combination -> an error that says what to do: nothing has been changed
    sae, batch = plain(), SAE(12, 32, BatchTopK(3.0), seed=0)
    before = {name: t.clone() for name, t in sae.state_dict().items()}
    def fit(sae, opt, **options):
        return Trainer(sae, opt, progress=False, **options).fit([x], 1)
    parallel, deep, layers = DDP(sae), DDP(Loss(sae)), x.view(-1, 2, 6)
    clt = CrossLayerTranscoder(2, 6, 16, TopK(3), aux=AuxK(2))
    alone, past, own = "each would train a model of its own", "it was called past", "would be those of each process's rows: shard the SAE"
    none = lambda parameters: None
    for message, call in (
        (alone, lambda: Adam(sae).step(x)),
        (alone, lambda: Signum(sae).step(x)),
        (alone, lambda: Adam(parallel).step(x)),
        (alone, lambda: Adam(deep).step(x)),
        (alone, lambda: Adam(SAEs([plain()])).step(x)),
        (alone, lambda: Adam(clt).step(layers, layers)),
        (alone, lambda: fit(sae, Adam(sae))),
        (alone, lambda: fit(sae, Fused(sae, 1e-3))),
        (alone, lambda: fit(parallel, Adam(parallel))),
        (alone, lambda: fit(deep, Adam(deep))),
        (past, lambda: parallel.module.loss(x)),
        (past, lambda: parallel.module.step_gradients(x)),
        (past, lambda: fit(parallel, adam(sae), reduce=mean)),
        (own, lambda: clt.loss(layers, layers)),
        (past, lambda: DDP(clt).module.loss(layers, layers, aux=False)),
        (own, lambda: build().loss(x)),
        (own, lambda: fit(s := build(), adam(s), reduce=mean)),
        (own, lambda: fit(s := build(), adam(s), reduce=none)),
        (own, lambda: batch.loss(x)),
        (own, lambda: fit(batch, adam(batch), reduce=mean)),
        (own, lambda: DDP(Loss(batch))(x)),
        (own, lambda: DDP(batch)(x)),
        (own, lambda: fit(batch, adam(batch))),
    ):
        refused(message, call)
    for other in (build(), batch):
        other.eval().loss(x)
    assert all(torch.equal(before[name], t) for name, t in sae.state_dict().items())

    with (joined := DDP(Loss(plain()))).join():
        refused("a process that has joined would not count features", lambda: joined(x))

    # combination -> one model, that of one process with all rows
    def one_model(kind, sae):
        alike(sae)
        for name, t in whole[kind].state_dict().items():
            torch.testing.assert_close(sae.get_buffer(name) if name == "silent" else sae.state_dict()[name], t, rtol=1e-3, atol=1e-5)
    def parts(kind):
        rows = [b[:: 2] if rank == 0 else b[1 :: 2] for b in data().split(20)]
        masks = [torch.arange(10) % 3 != rank for _ in rows]
        return [*zip(rows, [None] * len(rows), masks)] if kind == "masked" else rows
    for kind in ("aux", "masked"):
        for wrap in (lambda s: s, DDP, lambda s: DDP(Loss(s))):
            sae = start(seed=rank)  # rank 0's weights count
            module = wrap(sae)
            run = Trainer(module, torch.optim.SGD(sae.parameters(), lr=0.05), clip=1.0, progress=False)
            found = run.fit(parts(kind), 10)
            one_model(kind, sae)
            dead = torch.tensor([found["dead"]])
            dist.broadcast(dead, 0)
            assert dead == found["dead"] == whole[kind].dead_features.sum() > 0
    for make in (lambda s: torch.optim.SGD(s.parameters(), lr=0.05), Adam, Signum):
        sae = start(seed=rank)
        wrapped, opt = DDP(Loss(sae)), make(sae)
        for rows in parts("aux"):
            wrapped(rows).backward()
            sae.remove_parallel_gradient_()
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
            sae.normalise_decoder_()
        alike(sae)
        assert torch.equal(sae.silent, whole["aux"].silent) or opt.__class__ is not torch.optim.SGD
        refused(past, lambda: wrapped.module(x))
    one = [sae.silent.clone() for _ in range(2)]
    dist.all_gather(one, sae.silent)
    assert torch.equal(*one)
    uneven = start(seed=0)
    run = Trainer(uneven, torch.optim.SGD(uneven.parameters(), lr=0.05), clip=1.0, progress=False)
    run.fit([b[:13] if rank == 0 else b[13:] for b in data().split(20)], 10)
    one_model("aux", uneven)
    empty = plain()
    before = empty.W_dec.detach().clone()
    Trainer(empty, adam(empty), progress=False).fit([x[: 5 * rank]], 1)
    alike(empty)
    assert not torch.equal(before, empty.W_dec) and int(empty.silent.max()) == 5

    # each a model of its own
    parallel(x).squared_error.mean().backward()
    assert all(p.grad is not None for p in (parallel.module.W_enc, parallel.module.W_dec))
    with torch.no_grad():
        parallel.module.loss(x)
    own = plain(seed=rank)
    opt = Adam(own)
    opt.apply(own.step_gradients(x)[1])
    fit(own, adam(own), reduce=none)

    # all decide alike: only rank 1 has the bad batch, only its loss is not finite
    for bad, reduce in ((torch.nan, mean), (1e25, mean), (torch.nan, None), (1e25, None)):
        parts = [part.clone() for part in x.split(20)]
        parts[2][3] = bad if rank == 1 else 1.0
        sae = plain(objective="fvu")
        run = Trainer(sae, adam(sae), reduce=reduce, progress=False)
        refused("step 3 is not finite", lambda: run.fit(parts, 5), FloatingPointError)
        assert run.step == 2
        run.on_nonfinite = "skip"
        run.fit(parts, 5)
        assert run.skipped == 1
        alike(sae)

    # each rank goes on with its own order of its own rows
    whole, part, again = plain(), plain(), plain(seed=5)
    def fit(sae, steps, path, **options):
        run = Trainer(sae, adam(sae), checkpoint=path, progress=False)
        return run, run.fit(Batches(x, size=10, seed=rank), steps, **options)
    path = f"{folder}/run.pt"
    fit(whole, 14, None)
    fit(part, 6, path, resume=True)
    dist.barrier()
    fit(again, 14, path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))
    alike(again)
    class Loader(list):
        def state_dict(self):
            return {}
        def load_state_dict(self, state):
            raise AssertionError("the position of another rank")
    run = Trainer(again, adam(again), reduce=mean, checkpoint=path, progress=False)
    refused("holds the position of rank 0 alone: restore that of Loader", lambda: run.fit(Loader([x]), 15, resume=True))
    dist.barrier()
    run = Trainer(again, adam(again), reduce=mean, checkpoint=path if rank == 0 else f"{folder}/elsewhere.pt", progress=False)
    refused("resume must find", lambda: run.fit(Batches(x, size=10, seed=rank), 15, resume=True))
    dist.barrier()
    dist.destroy_process_group()
    Adam(own).step(x)  # without a group it is a model of its own
"""


@pytest.mark.slow
def test_two_processes_of_one_group(tmp_path: Path) -> None:
    both(SCRIPT, tmp_path)


def test_processes_without_a_group_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As under torchrun, where nobody has called init_process_group."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    sae = build()
    with pytest.warns(UserWarning, match=r"WORLD_SIZE is 2 .* no process group: each process trains a model of its own and writes .*run"):
        Trainer(sae, adam(sae), checkpoint=tmp_path / "run.pt", progress=False).fit(batches(sae), 1)


def test_ignored_parameters_of_ddp_may_be_named() -> None:
    sae = build()
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(sae, ["silent"])
    assert sae._ddp_params_and_buffers_to_ignore == ["silent"]
    assert torch.isfinite(sae.loss(data()).loss)
