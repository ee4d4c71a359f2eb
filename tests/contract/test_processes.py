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

    # two models without a word
    sae = plain()
    before = {name: t.clone() for name, t in sae.state_dict().items()}
    for opt in (Adam(sae), Signum(sae), Adam(SAEs([plain()]))):
        refused("step: in a process group of 2 each would train a model of its own", lambda: opt.step(x))
    for opt in (Adam(sae), Fused(sae, 1e-3), adam(sae)):
        refused("a process group of 2 each would train", lambda: Trainer(sae, opt, progress=False).fit([x], 1))
    parallel = DDP(sae)
    refused("SAE.loss: in a process group of 2 it was called past", lambda: parallel.module.loss(x))
    refused("SAE.step_gradients: in a process group of 2 it was called past", lambda: parallel.module.step_gradients(x))
    for other in (build(), SAE(12, 32, BatchTopK(3.0))):
        refused("would be those of each process's rows", lambda: other.loss(x))
        other.eval().loss(x)
    layers = x.view(-1, 2, 6)
    clt = CrossLayerTranscoder(2, 6, 16, TopK(3), aux=AuxK(2))
    refused("would be those of each process's rows", lambda: clt.loss(layers, layers))
    refused("step: in a process group of 2 each would train a model of its own", lambda: Adam(clt).step(layers, layers))
    refused("it was called past", lambda: DDP(clt).module.loss(layers, layers, aux=False))
    assert all(torch.equal(before[name], t) for name, t in sae.state_dict().items())

    # documented ways
    parallel(x).squared_error.mean().backward()
    assert all(p.grad is not None for p in (sae.W_enc, sae.W_dec))
    with torch.no_grad():
        parallel.module.loss(x)
    for make in (lambda s: Adam(s), lambda s: Signum(s)):
        sae = plain()
        wrapped, opt = DDP(Loss(sae)), make(sae)
        for part in x.split(50):
            wrapped(part).backward()
            opt.apply()
            sae.zero_grad()
        alike(sae)
    own = plain(seed=rank)
    opt = Adam(own)
    opt.apply(own.step_gradients(x)[1])
    Trainer(own, adam(own), reduce=lambda parameters: None, progress=False).fit([x] * 2)

    # all decide alike: only rank 1 has the bad batch, only its loss is not finite
    for bad in (torch.nan, 1e25):
        parts = [part.clone() for part in x.split(20)]
        parts[2][3] = bad if rank == 1 else 1.0
        sae = plain(objective="fvu")
        run = Trainer(sae, adam(sae), reduce=mean, progress=False)
        refused("step 3 is not finite", lambda: run.fit(parts, 5), FloatingPointError)
        assert run.step == 2
        run.on_nonfinite = "skip"
        run.fit(parts, 5)
        assert run.skipped == 1
        alike(sae)

    # each rank goes on with its own order of its own rows
    whole, part, again = plain(), plain(), plain(seed=5)
    def fit(sae, steps, path, **options):
        run = Trainer(sae, adam(sae), reduce=mean, checkpoint=path, progress=False)
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
