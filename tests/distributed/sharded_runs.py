"""What the processes of the tests of ``fastsae.distributed`` do: every configuration on groups of 1, 2, 4 .. of one set of processes."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forks import ended, fork, port
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import fastsae
from fastsae import SAE, AuxK, BatchTopK, Gated, JumpReLU, ReLU, SAEs, TopK, Trainer
from fastsae.distributed import (
    RankError,
    Rates,
    SettingsError,
    async_save_checkpoint,
    checkpoints,
    convert_checkpoint,
    dtensors,
    gathered,
    load_checkpoint,
    plan,
    save_checkpoint,
    shard,
)
from fastsae.gradients import densify
from fastsae.optim import Adam, Signum
from fastsae.sae import Crosscoder, CrossLayerTranscoder, JumpLoss, resample, selection
from fastsae.sae.reconstruction import Reconstruction
from fastsae.trainer import linear

D, F, V = 12, 75, 8
"""75 features in 8 virtual shards of 10: the last one has 5."""

KINDS: dict[str, dict[str, Any]] = {
    "topk": {"activation": TopK(4), "aux": AuxK(6), "dead_after": 90},
    "batchtopk": {
        "activation": BatchTopK(3.3, rate=0.2),
        "aux": AuxK(5, bias=True, denominator="total"),
        "dead_after": 60,
        "objective": "fvu",
    },
    "absolute": {"activation": fastsae.AbsTopK(4), "aux": AuxK(5, relu=False), "dead_after": 40},
    "signed": {"activation": TopK(3, relu=False), "aux": AuxK(4, relu=False, denominator="tokens", share=False), "dead_after": 40},
    "transcoder": {"activation": TopK(4), "d_out": 7, "normalise_decoder": True},
    "relu": {"activation": ReLU(), "tied": True, "l1": 0.02, "aux": AuxK(4), "dead_after": 30},
    "jumprelu": {"activation": JumpReLU(threshold=0.4, bandwidth=0.3), "l0": 0.01, "l1": 0.01, "d_out": D, "skip": True, "pre_bias": True},
    "gated": {"activation": Gated(), "l1": 0.05, "objective": "fvu"},
    "matryoshka": {"activation": BatchTopK(3), "prefixes": [10, 35, F], "aux": AuxK(5), "dead_after": 60},
    "rows": {"activation": BatchTopK(3), "normalise_rows": "layer_norm", "objective": "fvu"},
    "jump": {
        "activation": JumpReLU(threshold=torch.linspace(0.2, 12, F), bandwidth=0.3),  # the last ones never fire
        "l0": 0.5,
        "l1": 0.02,
        "dead_after": 30,
        "jump": JumpLoss(5.0, tanh=2.0, pre_acts=0.1, to_scores=True),
    },
    "jumps": {
        "activation": JumpReLU(threshold=0.4, bandwidth=0.3),
        "l0": 0.5,
        "jump": JumpLoss(6.0, of_batch=True, pre_acts=0.01, all_features=True),
        "normalise_rows": "norm",
        "d_out": 7,
    },
    "few": {"activation": TopK(2), "features": 9, "aux": AuxK(3), "dead_after": 20},  # on 8 processes three have none
}

MANY: dict[str, dict[str, Any]] = {
    "crosscoder topk": {"activation": TopK(4), "aux": AuxK(6), "dead_after": 40, "objective": "fvu"},
    "crosscoder absolute": {"activation": fastsae.AbsTopK(3)},
    "crosscoder batchtopk": {"activation": BatchTopK(3.3), "aux": AuxK(5), "dead_after": 60, "prefixes": [10, 35, F]},
    "crosscoder relu": {"activation": ReLU(), "l1": 0.02, "aux": AuxK(4), "dead_after": 30},
    "crosscoder jumprelu": {"activation": JumpReLU(threshold=0.4, bandwidth=0.3), "l0": 0.01, "l1": 0.01},
    "clt topk": {"activation": TopK(3), "aux": AuxK(4, relu=False), "dead_after": 40},
    "clt batchtopk": {"activation": BatchTopK(2.3, rate=0.2), "aux": AuxK(4), "dead_after": 60, "l1": 0.01, "skip": True},
    "clt few": {"activation": BatchTopK(2.3), "features": 9},
    "clt jumprelu": {"activation": JumpReLU(threshold=0.4, bandwidth=0.3), "l0": 0.01, "l1": 0.01},
    "clt relu": {"activation": ReLU(), "l1": 0.02},
    "stack topk": {"activation": TopK(3), "aux": AuxK(6), "dead_after": 40},
    "stack relu": {"activation": ReLU(), "tied": True},
    "stack crosscoder": {"activation": BatchTopK(2.3)},
}
"""Modules of several layers or dictionaries: three layers of four dimensions, two members."""
LAYERS = 3


def build(kind: str) -> Any:
    """Features that are equal, and so are their scores, on both sides of the borders of virtual shards; and on those of layers."""
    sae: Any = module(kind, range(2))
    for one in [sae] if isinstance(sae, SAE) else [*sae]:
        if one.d_sae == F:
            with torch.no_grad():
                for W in (one.W_enc, one.W_dec):
                    W[[9, 10, 39, 40, 74]] = W[0].clone()
                    W[20] = W[19]
    if isinstance(sae, CrossLayerTranscoder):
        with torch.no_grad():
            sae[1].W_enc.copy_(sae[0].W_enc)
    return sae


def module(kind: str, seeds: Any, **where: Any) -> Any:
    """A module of a kind; ``seeds``: of the members of a stack, the first one that of another."""
    options: dict[str, Any] = {"d_sae": F, **{**KINDS, **MANY}[kind], **where}
    options["d_sae"] = options.pop("features", F)
    make = Crosscoder if "crosscoder" in kind else CrossLayerTranscoder if "clt" in kind else SAE
    options |= {"d_in": D} if make is SAE else {"n_layers": LAYERS, "d_model": D // LAYERS}
    if "stack" not in kind:
        return make(**options, seed=None if seeds is None else seeds[0])
    return SAEs(make(**options, l1=0.01 * n, seed=None if seeds is None else seeds[n]) for n in range(2))


def batches(kind: str, steps: int) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """(x, target, mask) of all processes: rows of zeros, rows that are equal, and few enough dimensions for many ties."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        rows = 0 if step == (2 if kind in MANY else 5) else 17 + step % 9
        x = (torch.randn(rows, D, generator=generator) * 3).round()
        width = D if "clt" in kind else KINDS[kind].get("d_out") if kind in KINDS else None
        target = torch.randn(rows, width, generator=generator) if width else None
        mask = torch.rand(rows, generator=generator) < 0.8 if step % 4 == 3 else None
        if rows:
            x[step % rows], x[1] = 0, x[2]
        if "clt" in kind:
            x = x.unflatten(1, (LAYERS, -1))
            x[:, 1] = x[:, 0]  # whose encoders begin as equals
            target = None if target is None else target.unflatten(1, (LAYERS, -1))
        yield x, target, mask


def part(t: Tensor | None, rank: int, size: int, step: int) -> Tensor | None:
    """The rows of one process: uneven, sometimes none. Cuts of fewer processes are among those of more."""
    if t is None:
        return None
    ends = sorted(torch.randint(0, len(t) + 1, (15,), generator=torch.Generator().manual_seed(step)).tolist())[16 // size - 1 :: 16 // size]
    bounds = [0, *ends[: size - 1], len(t)]
    return t[bounds[rank] : bounds[rank + 1]]


def optimiser(sae: Any, kind: str, **options: Any) -> Any:
    if kind in ("signed", "stack relu", "clt relu"):
        return Signum(sae, lr=1e-3, **options)
    clip = None if kind == "transcoder" else 0.5
    rate = [1e-2, 5e-3] if kind == "stack topk" else 1e-2
    return Adam(sae, lr=rate, clip=clip, weight_decay=0.01, schedule=lambda step: 1 / (1 + 0.1 * step), **options)


def digest(tensors: Any) -> str:
    seen = hashlib.sha256()
    for t in tensors:
        seen.update(t.detach().contiguous().numpy().tobytes())
    return seen.hexdigest()[:16]


def train(sae: Any, opt: Any, kind: str, steps: range, rank: int, size: int) -> list[Tensor]:
    """The metrics, and the norm, of each step."""
    seen = []
    for step, batch in enumerate(batches(kind, steps.stop)):
        if step in steps:
            if kind == "batchtopk":
                sae.k = 3.3 - 0.1 * step if step < 10 else 2.3
            metrics = opt.step(*(part(t, rank, size, step) for t in batch))
            norm = getattr(opt, "grad_norm", None)
            each = (*metrics, torch.zeros_like(metrics.loss) if norm is None else norm)
            seen.append(torch.stack([m.float() for m in each]))
    return seen


USED = ("topk", "batchtopk", "absolute", "few", "jumprelu", "gated", "rows")
LONG, STOP = ("topk", "batchtopk"), 16
"""Whose runs are long, and stop and go on."""
MANY_USED = ("crosscoder topk", "crosscoder batchtopk", "clt topk", "clt batchtopk", "clt few")
MANY_LONG, MANY_STOP = ("crosscoder batchtopk", "clt batchtopk", "stack topk"), 4
PLANNED = ("topk", "transcoder", "crosscoder topk", "clt topk", "stack topk")
RESAMPLED = ("rows", "jump", "transcoder")


class Group:
    """A group of the first processes, or a mesh of all, as one of them sees it; ``rank``: in the order of rows."""

    def __init__(self, size: int | tuple[int, int], folder: Path):
        self.name, self.folder, self.rank = size, folder, dist.get_rank()
        if isinstance(size, tuple):
            self.group = init_device_mesh("cpu", size)
            self.shards, self.size = size[0], size[0] * size[1]
            shard, copy = divmod(self.rank, size[1])
            self.rank = copy * self.shards + shard
        else:
            self.group, self.shards, self.size = dist.new_group(list(range(size))), size, size

    def shard(self, sae: Any, **options: Any) -> Any:
        return shard(sae, self.group, **{"virtual": V, "timeout": 60, **options})

    def all(self, value: Any) -> list[Any]:
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, (self.rank, value), None if isinstance(self.group, DeviceMesh) else self.group)
        return [value for _, value in sorted(every, key=lambda of: of[0])]


def trained(group: Group, kind: str, steps: int) -> dict[str, Any]:
    """Digests of metrics, weights, buffers and the gradients of one batch more."""
    sae = group.shard(build(kind))
    opt = optimiser(sae, kind)
    seen = train(sae, opt, kind, range(steps), group.rank, group.size)
    whole = gathered(sae)
    _, gradients = sae.step_gradients(*(part(t, group.rank, group.size, 1) for t in next(batches(kind, 1))))
    same = [t for name, p in sae.named_parameters() if sae.world.whole(name) for t in (p, gradients[name])]
    every = group.all((digest([*same, *seen]), {name: densify(g) for name, g in gradients.items()}))
    assert len({same for same, _ in every}) == 1 and len(same) > 1
    result = {"metrics": digest(seen), "last": digest(seen[-1:]), "numbers": torch.stack(seen)}
    for name in gradients:
        parts = [own[name] for _, own in every[: group.shards]]
        assert all(torch.equal(own[name], parts[n % group.shards]) for n, (_, own) in enumerate(every))  # of copies
        result[f"gradient of {name}"] = digest(parts[:1] if sae.world.whole(name) else [torch.cat(parts, int("stack" in kind))])
    return result | ({} if whole is None else {name: digest([t]) for name, t in whole.state_dict().items()})


def dense(latents: Any) -> Tensor:
    """``[rows, F]``, or ``[rows, L * F]`` of several layers."""
    each = latents if isinstance(latents, list) else [latents]
    return torch.cat([own.to_dense().squeeze(0) for own in each], 1).nan_to_num(7)


def used(group: Group, kind: str) -> dict[str, Any]:
    """Latents, outputs and losses of the rows of all processes."""
    sae, result = group.shard(build(kind)), {}
    opt = optimiser(sae, kind)
    train(sae, opt, kind, range(3), group.rank, group.size)
    x, target, _ = list(batches(kind, 2))[1]
    for training in (True, False):
        sae.train(training)
        whole = gathered(sae)
        own, wanted = part(x, group.rank, group.size, 1), part(target, group.rank, group.size, 1)
        assert own is not None
        latents = sae.encode(own.unsqueeze(0))
        loss = sae.loss(own, wanted)
        if "clt" in kind:
            x_hat = sae.decode(latents, own.unsqueeze(0))
            made = Reconstruction(sae(own), latents, (x_hat[0] - wanted).square().sum((1, 2)))
        else:
            made, x_hat = sae(own, wanted), sae.decode(latents, own.unsqueeze(0))
        assert torch.equal(x_hat.squeeze(0), made.x_hat)
        rows = [torch.cat(parts) for parts in zip(*group.all((dense(latents), made.x_hat.flatten(1), made.squared_error)))]
        result[training] = [*rows, torch.stack(loss)]
        if kind in MANY:
            bad = own.clone()
            bad[1:2] = torch.nan
            result["bad", training] = [torch.cat(parts) for parts in zip(*group.all((bad, dense(sae.encode(bad.unsqueeze(0))))))]
        if whole is not None:
            result["state", training], result["x"], result["target"], result["k"] = whole.state_dict(), x, target, getattr(whole, "k", None)
    return result


def resumed(group: Group, kind: str, steps: int) -> dict[str, Any]:
    """Half on the largest group, saved there, and the rest on every one."""
    half, folder = steps // 2, group.folder / f"checkpoint-{kind}"
    sae = group.shard(build(kind))
    opt = optimiser(sae, kind)
    extra = load_checkpoint(folder, sae, opt)
    assert extra == {"note": torch.tensor([1.0, 2.0]).tolist()}
    seen = train(sae, opt, kind, range(half, steps), group.rank, group.size)
    whole = gathered(sae)
    return {} if whole is None else {"last": digest(seen[-1:]), **{k: digest([t]) for k, t in whole.state_dict().items()}}


def save_half(group: Group, kind: str, steps: int) -> None:
    sae = group.shard(build(kind))
    opt = optimiser(sae, kind)
    folder = group.folder / f"checkpoint-{kind}"
    half = steps // 2
    for upto in [range(half)] if kind in MANY else [range(1), range(1, half)]:  # the second save takes the place of the first
        train(sae, opt, kind, upto, group.rank, group.size)
        save = save_checkpoint if kind in LONG else lambda *arguments: async_save_checkpoint(*arguments).result()
        save(folder, sae, opt, {"note": [1.0, 2.0]})
    assert sorted(path.name for path in folder.iterdir()) == ["data-1" if kind in MANY else "data-2", "manifest.json"]
    dist.barrier()
    if kind in MANY and group.rank == 0:
        convert_checkpoint(folder, folder.with_suffix(".pt"))
        shutil.rmtree(folder)
        convert_checkpoint(folder.with_suffix(".pt"), folder, virtual=V)
    dist.barrier()


def looped(group: Group, kind: str) -> dict[str, Any]:
    """By ``Trainer``, whose second half goes on from a folder."""
    folder = group.folder / f"trainer-{kind}-{group.name}"
    rows = torch.randn(120, D, generator=torch.Generator().manual_seed(2)).split(12)
    own = [part(x, group.rank, group.size, step) for step, x in enumerate(rows)]
    made, last, whole = [], {}, None
    for stops in ([10], [4, 10]):
        for number, stop in enumerate(stops):
            sae = group.shard(build(kind))
            raises(TypeError, "must be fused", lambda sae=sae: Trainer(sae, torch.optim.Adam(sae.parameters())))
            trainer = Trainer(sae, optimiser(sae, kind), anneal={"k": linear(4, 2, 8)}, checkpoint=folder, every=4, progress=False)
            data = own[4:] if number else own
            last, whole = trainer.fit(data, stop, resume=number == 1), gathered(sae)
        made.append({"last": last, **({} if whole is None else {k: digest([t]) for k, t in whole.state_dict().items()})})
    assert made[0] == made[1]
    assert sorted(path.name for path in folder.iterdir()) == ["data-6", "manifest.json"]  # written when fit ends, each of the six whole
    sae, named = group.shard(build(kind)), list[bool]()
    trainer = Trainer(sae, optimiser(sae, kind), checkpoint=folder, every=2, progress=False)

    def unwritten(*_: Any) -> None:
        named.append(threading.current_thread() is threading.main_thread())
        raise OSError("no room")

    for stop, error, text in ((5, RuntimeError, "the save in the background before it has failed"), (8, OSError, "no room")):
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            patch.setattr(checkpoints, "_name", unwritten)
            warnings.simplefilter("ignore", UserWarning)  # from the thread, that nothing has been written
            raises(error, text, lambda stop=stop: trainer.fit(own, stop))
        assert (folder / "data-6").exists(), "the older state"
        trainer.every = 8
    assert trainer.step == 8 and not any(named) and len(named) == (2 if group.rank == 0 else 0)
    return made[0]


def anew(sae: SAE, kind: str, group: Any = None) -> Tensor:
    """Every third feature, after three steps, from rows that are taken five at a time; and another step."""
    rank, size, start = (group.rank, group.size, sae.world.start) if group else (0, 1, 0)
    opt = optimiser(sae, kind)
    train(sae, opt, kind, range(3), rank, size)
    batch = [part(t, rank, size, 3) for t in list(batches(kind, 4))[3]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastsae.sae.resampling._ROWS", 5)
        dead = torch.arange(start, start + len(sae.silent)) % 3 == 0
        done = resample(sae, opt, *batch[:2], mask=batch[2], dead=dead, generator=torch.Generator().manual_seed(4))  # pyright: ignore[reportArgumentType]
    assert torch.equal(done, dead)
    rows = sae.W_dec.detach().clone()
    train(sae, opt, kind, range(3, 4), rank, size)
    return rows


def resampled(group: Group, kind: str) -> dict[str, Any]:
    sae = group.shard(build(kind))
    rows = torch.cat(group.all(anew(sae, kind, group))[: group.shards])
    whole = gathered(sae)
    return {} if whole is None else {"rows": rows, **{k: digest([t]) for k, t in whole.state_dict().items()}}


def contained(group: Group) -> None:
    """In torch's containers, on the same memory; torch's own checkpoints of them, read whole and by each process."""
    mesh: Any = group.group if isinstance(group.group, DeviceMesh) else DeviceMesh.from_group(group.group, "cpu")
    own = dist.group.WORLD if isinstance(group.group, DeviceMesh) else group.group
    clt = CrossLayerTranscoder(2, 4, 80, TopK(2), skip=True, seed=0)
    few = SAE(D, 5, BatchTopK(2), seed=0)  # of 5 features four processes hold 2, 2, 1 and none
    for number, (kind, virtual) in enumerate(((SAE(D, 80, BatchTopK(2), seed=0), V), (few, max(group.shards, 2)), (clt, V))):
        sae: Any = group.shard(kind, virtual=virtual)
        held, whole, folder = dtensors(sae, mesh), gathered(sae), group.folder / f"contained-{group.name}-{number}"
        state = {name: t.full_tensor() for name, t in held.items()}
        assert whole is None or all(torch.equal(state[name], t) for name, t in whole.state_dict().items())
        assert all(t.to_local().data_ptr() == sae.state_dict()[name].data_ptr() for name, t in held.items())
        save(held, checkpoint_id=folder, process_group=own)
        W_enc = next(name for name in state if name.endswith("W_enc"))
        with torch.no_grad():
            sae.get_parameter(W_enc).zero_()
        load(held, checkpoint_id=folder, process_group=own)
        assert torch.equal(part_ := sae.get_parameter(W_enc), state[W_enc][sae.world.start :][: len(part_)])
        read = {name: torch.empty_like(t) for name, t in state.items()}
        load(read, checkpoint_id=folder, no_dist=True)
        assert all(torch.equal(t, read[name]) for name, t in state.items())
    if group.shards > 1:
        raises(ValueError, "they lie in", lambda: dtensors(group.shard(build("topk")), mesh))
    raises(TypeError, "sae must be what fastsae.distributed.shard returned", lambda: dtensors(build("topk"), mesh))


def not_finite(group: Group, kind: str, steps: int) -> dict[str, Any]:
    """A bad row on the last process alone: all refuse the step, and go on."""
    sae = group.shard(build(kind))
    x = next(batches(kind, 1))[0]
    own = part(x, group.rank, group.size, 0)
    assert own is not None
    last = group.rank == group.size - 1
    bad = torch.cat([own, torch.full((1, D), torch.nan)]) if last else own
    opt = optimiser(sae, kind)
    opt.step(own)
    before = digest(sae.state_dict().values())
    found = f"row {len(own)} of" if last else "parameters and inputs are finite"
    raises(FloatingPointError, found, lambda: opt.step(bad))
    assert digest(sae.state_dict().values()) == before
    opt.on_nonfinite = "skip"
    opt.step(bad)
    assert opt.skipped == 1 and opt.steps == 1 and digest(sae.state_dict().values()) == before
    opt.step(own)
    whole = gathered(sae)
    if last:
        with torch.no_grad():
            sae.W_enc[:1] = torch.nan
    raises(FloatingPointError, "parameter W_enc is not finite" if last else "finite", lambda: opt.step(own))
    return {} if whole is None else {k: digest([t]) for k, t in whole.state_dict().items()}


def raises(kind: type[BaseException], text: str, call: Callable[[], object]) -> None:
    with pytest.raises(kind, match=re.escape(text)) as caught:
        call()
    assert type(caught.value) is kind


def refused(group: Group) -> None:
    """Errors before the first exchange, and settings that differ, leave everything as it was; all know who failed."""
    sae, first, x = group.shard(build("topk")), group.rank == 0, torch.ones(3, D)
    opt = optimiser(sae, "topk")
    error = ValueError if first else RankError
    text = "x must have shape" if first else "rank 0 failed in Adam.step: ValueError: SAE.step_gradients: x must have shape"
    raises(error, text, lambda: opt.step(x[:, :5] if first else x))
    raises(SettingsError, "must be called alike, got SAE.encode", lambda: sae.encode(x) if first else sae.loss(x))
    opt.lr = 1.0 if first else 2.0
    raises(SettingsError, "must be called alike, got Adam.apply, ([1.0", lambda: opt.step(x))
    opt.lr = 1e-2
    sae.k = 3 if first else 4
    raises(SettingsError, "'k': 3", lambda: opt.step(x))
    sae.k = 4
    assert opt.steps == 0 and not bool(sae.silent.any())
    opt.step(x)
    generator = torch.Generator().manual_seed(group.rank)
    raises(SettingsError, "called alike, got resample", lambda: resample(sae, None, x, generator=generator))
    assert not resample(sae, None, x[:0], dead=sae.silent >= 0, generator=torch.Generator().manual_seed(0)).any()
    raises(ValueError, "init_from: call it before", lambda: sae.init_from(x))
    raises(ValueError, "gathered(sae) is the whole one", lambda: sae.portable())
    raises(ValueError, "fastsae.distributed.save_checkpoint", lambda: fastsae.save_checkpoint(group.folder / "x.pt", sae))
    raises(FileNotFoundError, "manifest.json", lambda: load_checkpoint(group.folder / "nowhere", sae, opt))
    raises(ValueError, "members[1] is sharded by itself", lambda: SAEs([sae, group.shard(build("topk"))]))
    clt, x3 = group.shard(build("clt topk")), torch.ones(3, LAYERS, D // LAYERS)
    text = "x must have shape" if first else "rank 0 failed in CrossLayerTranscoder.encode: ValueError"
    raises(error, text, lambda: clt.encode(x if first else x3))
    text = "target must have shape" if first else "rank 0 failed in Adam.step: ValueError: CrossLayerTranscoder.step_gradients: target"
    raises(error, text, lambda: Adam(clt).step(x3, x3[:, 1:] if first else x3))
    crosscoder = group.shard(build("crosscoder topk"))
    text = "x must have shape" if first else "rank 0 failed in Crosscoder.encode: ValueError"
    raises(error, text, lambda: crosscoder.encode(x[:, 1:] if first else x))
    raises(ValueError, "gathered(sae) is the whole one", lambda: clt.save(group.folder / "clt"))
    raises(ValueError, "fastsae.distributed.save_checkpoint", lambda: fastsae.save_checkpoint(group.folder / "x.pt", clt))

    raises(ValueError, "virtual must be the", lambda: group.shard(build("topk"), virtual=3 * group.size // 2))
    raises(SettingsError, "must be called alike", lambda: group.shard(SAE(D, F, TopK(4), seed=group.rank)))
    raises(SettingsError, "'virtual': 8", lambda: group.shard(build("topk"), virtual=8 if first else 16))
    error, text = (ValueError, "virtual must") if first else (RankError, "rank 0 failed in shard: ValueError: shard: virtual must be")
    raises(error, text, lambda: group.shard(build("topk"), virtual=5 if first else 8))
    raises(ValueError, "seed must be given", lambda: group.shard(SAE(D, F, TopK(4), device="meta")))
    raises(ValueError, "and only for one, got 3", lambda: group.shard(build("topk"), seed=3))
    raises(SettingsError, "'seed': 0", lambda: group.shard(SAE(D, F, TopK(4), device="meta"), seed=group.rank))
    flat, cube = init_device_mesh("cpu", (1, group.size)), init_device_mesh("cpu", (1, 1, group.size))
    raises(ValueError, "must have one dimension, or two and all", lambda: shard(build("topk"), cube))
    raises(ValueError, "virtual must be at least 2", lambda: shard(build("topk"), flat, virtual=1))
    raises(TypeError, "must be float32", lambda: group.shard(build("topk").double()))
    raises(TypeError, "sae must be", lambda: group.shard(torch.nn.Linear(2, 2)))


def broken(group: Group) -> None:
    """Within a step: whoever raises leaves, and the others end at once."""
    sae, start = group.shard(build("batchtopk")), time.monotonic()
    opt, last = optimiser(sae, "batchtopk"), group.rank == group.size - 1
    before = digest(sae.state_dict().values())
    opt.schedule = (lambda step: 1 / step) if last else opt.schedule
    error = ZeroDivisionError if last else RankError
    text = "division" if last else f"rank {group.size - 1} failed in Adam.step: ZeroDivisionError"
    raises(error, text, lambda: opt.step(torch.ones(2, D)))
    assert digest(sae.state_dict().values()) == before
    raises(RankError, "this group can do no more", lambda: sae.encode(torch.ones(2, D)))
    assert time.monotonic() - start < 20, "it took as long as the timeout"

    sae = group.shard(build("topk"), timeout=30)
    sae.encode(torch.ones(2, D))
    if last:
        os._exit(0)  # a process that is lost
    raises(RankError, "a process was lost, or has not answered within 30 s", lambda: sae.encode(torch.ones(2, D)))
    assert time.monotonic() - start < 25


def drawn(group: Group, *kinds: str) -> None:
    """Each its own features of an SAE that never was anywhere: the bits of one process."""
    for kind in kinds:
        whole = module(kind, (3, 3))
        if kind == "transcoder":
            assert not torch.equal(whole.W_enc[:, :7], whole.W_dec)
        sae = group.shard(module(kind, None, device="meta"), seed=3)
        made = gathered(sae)
        assert sae.training and (made is None) is (group.rank > 0) and (made is None or type(made) is type(whole))
        assert made is None or all(torch.equal(t, made.state_dict()[name]) for name, t in whole.state_dict().items())
        assert made is None or made.state_dict().keys() == whole.state_dict().keys()


def counted(group: Group) -> dict[str, float]:
    """Bytes that a process sends for one selection, a row of the whole batch."""
    sae: Any = group.shard(build("topk"))
    rows = torch.randn(16 * group.size, D, generator=torch.Generator().manual_seed(0))
    with sae.world.together("test"):
        sae.world.begin("test", 16)
        before = sae.world.sent
        selection.top_k(rows, sae._weights(rows), 4, True, sae.world)
    return {"bytes": (sae.world.sent - before) / len(rows), "most": 8 * 4 + 8}


def planned(group: Group, kind: str) -> dict[str, float]:
    """Bytes that a process sends in a step, as counted and as ``plan`` says."""
    sae, spec, layers = group.shard(build(kind)), {**KINDS, **MANY}[kind], 1 if kind in KINDS or "stack" in kind else LAYERS
    for name, buffer in sae.named_buffers():
        if name.endswith("silent"):
            buffer.fill_(1000)
    opt, n = Adam(sae, lr=1e-3), 32 // group.size  # of many rows fewer than k_aux features would stay dead
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(group.rank))
    target = torch.randn(n, spec["d_out"]) if "d_out" in spec else None
    before = sae.world.sent
    opt.step(*([x.unflatten(1, (LAYERS, -1))] * 2 if "clt" in kind else (x, target)), l1=0.0)
    sizes = {"batch": n * group.size, "k": spec["activation"].k, "k_aux": spec["aux"].k if "aux" in spec else 0, "d_out": spec.get("d_out")}
    sizes |= {"layers": layers, "cross_layer": "clt" in kind, "members": 2 if "stack" in kind else 1}
    found = plan(F, D // layers, tokens=1, rates=Rates(1e9, 1e9, 1e9, 1e-5), ranks=group.size, **sizes)
    return {"counted": sae.world.sent - before, "planned": found.sent}


def of(group: Group, steps: int, deep: bool) -> Iterator[tuple[tuple[str, str, Any], Any]]:
    """All that is compared between groups; in CI less of it for meshes and for two processes."""
    mesh = isinstance(group.name, tuple)
    few = not deep and (mesh or group.size == 2)
    kinds = ["topk", "batchtopk", "absolute", "gated", "matryoshka"][: 5 if group.shards > 1 else 1] if few else KINDS
    for kind in kinds:
        yield ("stopped", kind, group.name), trained(group, kind, STOP if kind in LONG else 7)
        if deep and not mesh:
            yield ("trained", kind, group.name), trained(group, kind, steps if kind in LONG else 50)
    for kind in ("absolute", "gated") if few else USED:
        yield ("used", kind, group.name), used(group, kind)
    for kind in LONG[1:] if few else LONG:
        yield ("resumed", kind, group.name), resumed(group, kind, STOP)
    for kind in RESAMPLED[:1] if few else RESAMPLED:
        yield ("resampled", kind, group.name), resampled(group, kind)
    if (mesh and group.shards > 1) or not few:
        drawn(group, "batchtopk", "jumprelu", "transcoder", "relu", "few", "gated", "rows", "jump")
        contained(group)
        yield ("not_finite", "topk", group.name), not_finite(group, "topk", steps)
        yield ("looped", "topk", group.name), looped(group, "topk")
    if not mesh:
        yield ("counted", "topk", group.name), counted(group)
        for kind in PLANNED:
            yield ("planned", kind, group.name), planned(group, kind)


def of_many(group: Group, deep: bool) -> Iterator[tuple[tuple[str, str, Any], Any]]:
    """The same of several layers or dictionaries."""
    all_of = deep or group.name in (1, 4)
    kinds = MANY if all_of else MANY_LONG if group.shards > 1 else ["clt batchtopk"]
    for kind in kinds:
        yield ("stopped", kind, group.name), trained(group, kind, MANY_STOP)
        if deep and group.size == group.shards:
            yield ("trained", kind, group.name), trained(group, kind, 50)
        if kind in MANY_LONG and all_of:
            yield ("resumed", kind, group.name), resumed(group, kind, MANY_STOP)
        if kind in MANY_USED and (deep or group.name == 1 or kind in ("crosscoder topk", "clt batchtopk")):
            yield ("used", kind, group.name), used(group, kind)
    if deep or group.name in (1, 2):
        drawn(group, "crosscoder topk", "clt jumprelu", "stack topk")
        yield ("looped", "crosscoder topk", group.name), looped(group, "crosscoder topk")


def main(rank: int, sizes: list[int], steps: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=max(sizes), timeout=timedelta(seconds=300))
    deep = steps > STOP
    results: dict[Any, Any] = {}
    groups = [Group(size, folder) for size in sizes]
    meshes = [Group((n, sizes[-1] // n), folder) for n in ((2, 4, 1) if deep else (2, 1))]
    for kind in (*LONG, *MANY_LONG):
        save_half(groups[-1], kind, STOP if kind in LONG else MANY_STOP)
    for group in [*groups, *meshes]:
        if rank < group.size:
            results |= of(group, steps, deep)
            results |= of_many(group, deep)
        dist.barrier()
    refused(groups[-1])
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    broken(groups[-1])


if __name__ == "__main__":
    numbers, steps, folder, within = sys.argv[1:]
    sizes, meet = [int(size) for size in numbers.split(",")], port()
    found = ended(fork(sizes[-1], lambda rank: main(rank, sizes, int(steps), Path(folder), meet)), float(within), together=True)
    sys.exit(max(abs(code) for code, _ in found))
