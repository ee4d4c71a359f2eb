"""The training loop, its checkpoints, and that a run which was killed ends in the bits of one that was not."""

from __future__ import annotations

import copy
import os
import random
import signal
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import KINDS, Fused, adam, batches, build, data, launch, same

import fastsae
from fastsae import SAE, ReLU, TopK, Trainer, load_checkpoint, save_checkpoint
from fastsae.native import loader
from fastsae.trainer import Batches, linear

each = pytest.mark.parametrize("kind", KINDS)
KILLS = int(os.environ.get("FASTSAE_TEST_KILLS", "1"))  # 20 in make deep


# ---------------------------------------------------------------- the loop


@each
@pytest.mark.parametrize("make", [adam, Fused])
def test_fit_learns(kind: str, make: Any) -> None:
    sae = build(kind)
    whole = next(iter(batches(sae, size=200)))  # one small batch is too noisy to judge by

    def fvu() -> float:
        return float(copy.deepcopy(sae).loss(**whole).fvu)

    first, seen = fvu(), []
    result = Trainer(sae, make(sae, 1e-2), callback=lambda step, m: seen.append((step, m["fvu"])), log_every=50, progress=False).fit(
        batches(sae), 120
    )
    assert [step for step, _ in seen] == [50, 100, 120]
    assert result["fvu"] == seen[-1][1]
    assert fvu() < 0.6 * first
    assert set(result) >= {"loss", "fvu", "l0", "dead"}
    if sae.unit_rows:
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    else:
        assert not torch.allclose(sae.W_dec.norm(dim=1), torch.ones(32))


@each
def test_both_paths_agree(kind: str) -> None:
    plain, fused = build(kind), build(kind)
    a = Trainer(plain, adam(plain), progress=False).fit(batches(plain), 5)
    b = Trainer(fused, Fused(fused, 3e-3), progress=False).fit(batches(fused), 5)
    assert a["fvu"] == pytest.approx(b["fvu"], rel=1e-3)
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    assert a["dead"] == b["dead"]
    for name, p in plain.named_parameters():  # Adam's first steps are of size lr whatever the gradient's: a sign near 0 may differ
        assert float(((p - dict(fused.named_parameters())[name]).abs() > 1e-4).float().mean()) < 0.01, name


def test_the_loop_in_words() -> None:
    by_hand, fitted = build(), build()
    opt = adam(by_hand)
    for step, batch in zip(range(7), batches(by_hand)):
        opt.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 4)
        by_hand.k = 8 - step
        opt.zero_grad()
        by_hand.loss(**batch).loss.backward()
        by_hand.remove_parallel_gradient_()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        opt.step()
        by_hand.normalise_decoder_()
    trainer = Trainer(
        fitted, adam(fitted), schedule=lambda step: min(1.0, (step + 1) / 4), anneal={"k": linear(8, 1, 7)}, clip=0.5, progress=False
    )
    trainer.fit(batches(fitted), 7)
    assert same(by_hand, fitted)
    assert fitted.k == 2


def test_schedules() -> None:
    assert [linear(8, 2, 3)(step) for step in range(5)] == [8, 6, 4, 2, 2]


def test_kinds_of_batches() -> None:
    x, target, mask = data(40), data(40, seed=2), torch.arange(40) % 3 != 0
    results = []
    for batch in ((x, target, mask), [x, target, mask], {"x": x, "target": target, "mask": mask}):
        sae = build()
        Trainer(sae, adam(sae), progress=False).fit([batch], 3)  # a list is iterated again
        results.append(sae)
    assert same(results[0], results[1])
    assert same(results[0], results[2])
    sae = build()
    assert Trainer(sae, adam(sae), progress=False).fit(iter([x, (x,)]))["fvu"] > 0  # until the batches end
    assert Trainer(sae, adam(sae), progress=False).fit([]) == {}


def test_reduce_sees_the_gradients() -> None:
    sae, seen = build(), []

    def reduce(parameters: Any) -> None:
        seen.append([p.grad.shape for p in parameters])

    Trainer(sae, adam(sae), reduce=reduce, progress=False).fit(batches(sae), 2)
    assert seen == [[p.shape for p in sae.parameters()]] * 2


def test_progress_without_tqdm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    sae = build()
    Trainer(sae, adam(sae), log_every=2).fit(batches(sae), 4)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [line.split(":")[0] for line in printed.err.splitlines()] == ["step 2 of 4", "step 4 of 4"]
    assert "FVU" in printed.err
    assert "L0 4.0" in printed.err


def test_progress_with_tqdm(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    sae = build()
    Trainer(sae, adam(sae), log_every=2).fit(batches(sae), 4)
    assert "4/4" in capsys.readouterr().err


def test_order_of_batches() -> None:
    x = torch.arange(10.0).unsqueeze(1)
    stream = iter(Batches(x, size=4, seed=1))
    first, second = torch.cat([next(stream)["x"] for _ in range(2)]), torch.cat([next(stream)["x"] for _ in range(2)])
    assert len(set(first.flatten().tolist())) == len(set(second.flatten().tolist())) == 8
    assert not torch.equal(first, second)
    other = torch.cat([batch["x"] for batch, _ in zip(Batches(x, size=4, seed=2), range(2))])
    assert not torch.equal(first, other)
    source = Batches(x, size=4, seed=1)
    stream = iter(source)
    for _ in range(3):
        next(stream)
    state, expected = source.state_dict(), next(stream)["x"]
    again = Batches(x, size=4, seed=99)
    again.load_state_dict(state)
    assert torch.equal(next(iter(again))["x"], expected)


def test_a_state_of_other_batches_is_refused() -> None:
    state = Batches(data(40), size=8).state_dict()
    with pytest.raises(ValueError, match=r"^Batches.load_state_dict: size must be 8 as in the state, got 4"):
        Batches(data(40), size=4).load_state_dict(state)
    with pytest.raises(ValueError, match=r"^Batches.load_state_dict: rows must be 40 as in the state, got 30"):
        Batches(data(30), size=8).load_state_dict(state)


def test_batches_that_have_ended_take_no_step(tmp_path: Path) -> None:
    trainer, stream = trained(checkpoint=tmp_path / "run.pt"), iter([data()] * 2)
    assert trainer.fit(stream)["loss"] > 0 and trainer.step == 2
    assert trainer.fit(stream) == {} and trainer.step == 2


def trained(**options: Any) -> Trainer:
    sae = build()
    return Trainer(sae, adam(sae), progress=False, **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Trainer(build(), None), TypeError, "opt must be an optimiser with a step method, got NoneType"),
        (lambda: Trainer(build(), Fused(build(), 1.0), schedule=abs), ValueError, "schedule is for torch optimisers; give Fused its own"),
        (lambda: Trainer(build(), Fused(build(), 1.0), clip=1.0), ValueError, "clip is for torch optimisers"),
        (lambda: Trainer(build(), adam(build()), every=0), ValueError, "every must be at least 1, got 0"),
        (lambda: Trainer(build(), adam(build()), anneal={"sparsity": abs}), ValueError, "anneal must name attributes .* got 'sparsity'"),
        (lambda: Trainer(build("relu"), adam(build()), anneal={"k": abs}), ValueError, "anneal must name attributes .* got 'k'"),
        (lambda: trained().fit(iter([data()]), 3), ValueError, "batches ended after step 1 of 3"),
        (lambda: trained().fit([], 3), ValueError, "batches ended after step 0 of 3"),
        (lambda: trained().fit([3], 3), TypeError, r"a batch must be x, \(x, target\).* got int"),
        (lambda: trained().fit([{"y": 3}], 3), TypeError, r"a batch must be .* got \['y'\]"),
        (lambda: trained().fit(data(), 3), TypeError, r"batches must be an iterable .* got Tensor \[200, 12\].*Batches\(x, size=..\)"),
        (lambda: trained().fit(None, 3), TypeError, "^Trainer.fit: batches must be an iterable of batches, got NoneType$"),  # pyright: ignore
        (lambda: trained().fit([data()], 2.5), TypeError, "^Trainer.fit: steps must be an int, got float"),  # pyright: ignore
        (lambda: trained().fit([data()], 3, resume=True), ValueError, r"^Trainer.fit: resume needs .* Trainer\(checkpoint=..\)"),
        (lambda: trained(checkpoint="/"), IsADirectoryError, "^Trainer: a checkpoint is a file, / is a folder"),
        (lambda: trained(anneal={"k": 3}), TypeError, r"^Trainer: anneal\['k'\] must be a function of the step, got int"),
        (lambda: Trainer(build(), adam(build())), ValueError, "^Trainer: opt must step parameters of sae, got Adam over others"),
        (lambda: Trainer(build(), fastsae.optim.Adam(build())), ValueError, "^Trainer: opt must step parameters of sae, got Adam over"),
        (lambda: Trainer(build(), fastsae.optim.Adam), TypeError, "opt must be an optimiser with a step method, got <class"),  # pyright: ignore
        (lambda: Trainer(torch.nn.Linear(2, 2), None), TypeError, "^Trainer: sae must be an SAE or a CrossLayerTranscoder, got Linear"),  # pyright: ignore
        (lambda: Batches(data().numpy(), size=3), TypeError, "^Batches: x must be a tensor of rows, got ndarray"),  # pyright: ignore
        (lambda: save_checkpoint("x", torch.nn.Linear(2, 2)), TypeError, "^save_checkpoint: sae must be an SAE, SAEs or .*, got Linear"),  # pyright: ignore
        (lambda: Batches(data(10), size=11), ValueError, r"size must be at least 1 and at most 10 \(n=10\), got 11"),
        (lambda: Batches(data(10), data(9), size=3), ValueError, r"must have as many rows, got \[10, 9\]"),
        (lambda: save_checkpoint("x", build(), None, {"a": {"b": object()}}), TypeError, "extra.a.b must be a number.* got object"),
        (lambda: load_checkpoint("/nowhere/at/all.pt"), FileNotFoundError, "all.pt"),
    ],
)
def test_wrong_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# ---------------------------------------------------------------- checkpoints


def test_what_a_trainer_cannot_go_on_from(tmp_path: Path) -> None:
    sae, path = build(), tmp_path / "x.pt"
    save_checkpoint(path, sae, fastsae.optim.Adam(sae))
    with pytest.raises(ValueError, match=r"^load_checkpoint: .* its optimiser's state does not fit Adam: KeyError\('param_groups'\)"):
        trained(checkpoint=path).fit([data()], 3, resume=True)
    with pytest.raises(ValueError, match=r"^Trainer.load: .*x.pt was not written by a Trainer: extra holds no 'step'"):
        Trainer(sae, fastsae.optim.Adam(sae), checkpoint=path, progress=False).fit([data()], 3, resume=True)


@each
@pytest.mark.parametrize("make", [adam, Fused])
def test_a_resumed_run_has_the_bits_of_the_whole_one(kind: str, make: Any, tmp_path: Path) -> None:
    whole = build(kind)
    whole.init_from(data(), target=data(seed=1)[:, : whole.d_out] if whole.transcoder else None, norm="rms")
    begun = copy.deepcopy(whole)
    expected = Trainer(whole, make(whole, 3e-3), progress=False).fit(batches(whole), 23)
    path = tmp_path / "deep" / "run.pt"
    Trainer(begun, make(begun, 3e-3), checkpoint=path, progress=False).fit(batches(begun), 11)
    torch.rand(7)  # the random state of another process
    again = build(kind, seed=None)  # and other weights
    trainer = Trainer(again, make(again, 3e-3), checkpoint=path, every=5, progress=False)
    assert trainer.fit(batches(again), 23, resume=True) == expected
    assert same(whole, again)
    assert trainer.step == 23
    from_file, extra = load_checkpoint(path)
    assert same(from_file, whole)
    assert torch.equal(from_file(data()).x_hat, whole(data()).x_hat)
    assert extra["step"] == 23
    assert [p.name for p in path.parent.iterdir()] == ["run.pt"]


LEVELS = loader.isa_levels() if loader.unavailable() is None else []
OPTIMISERS: dict[str, Any] = {
    "torch": adam,
    "adam": lambda sae: fastsae.optim.Adam(sae, lr=3e-3, clip=1.0),
    "signum": lambda sae: fastsae.optim.Signum(sae, lr=3e-3),
}


@pytest.mark.skipif(not LEVELS, reason=f"no C++ kernels: {loader.unavailable()}")
@pytest.mark.parametrize("kind", ["topk", "batchtopk", "relu", "slots"])
def test_a_resumed_run_has_its_bits_on_every_level_and_number_of_threads(kind: str, tmp_path: Path) -> None:
    """The optimisers take turns; relu is in the dense regime, slots the same out of it."""
    threads, x = torch.get_num_threads(), data(600, 96)
    settings = [(level, n) for level in sorted({LEVELS[0], LEVELS[-1]}) for n in (1, 2)]
    if os.environ.get("HYPOTHESIS_PROFILE") == "deep":
        settings = [(level, n) for level in LEVELS for n in (1, 2, 3)] * 3

    def run(make: Any, steps: int, path: Path | None) -> SAE:
        more = {"batchtopk": {"prefixes": [64, 128]}, "slots": {"dense": False}}
        options = {**KINDS["relu" if kind == "slots" else kind], **more.get(kind, {})}
        sae = SAE(96, 128, seed=0, **options)
        Trainer(sae, make(sae), checkpoint=path, progress=False).fit(Batches(x, size=400, seed=1), steps, resume=path is not None)
        return sae

    try:
        for number, (level, n) in enumerate(settings):
            torch.set_num_threads(n)
            make = list(OPTIMISERS.values())[(number if len(settings) < 10 else number * 3 // len(settings)) % 3]
            path = tmp_path / f"{number}.pt"
            with loader.use_isa(level):
                whole, _ = run(make, 3, None), run(make, 1, path)
                assert same(whole, run(make, 3, path)), (level, n)
    finally:
        torch.set_num_threads(threads)


def test_a_checkpoint_of_everything(tmp_path: Path) -> None:
    sae = build(activation=TopK(9), dtype=torch.bfloat16, objective="fvu", l1=0.5, normalise_decoder=False)
    extra = {"a": 1, "b": [2.5, "c", None, True], "d": {"e": torch.arange(3)}}
    path = save_checkpoint(tmp_path / "x.pt", sae, None, extra)
    again, got = load_checkpoint(path)
    assert again.config() == sae.config()
    assert same(again, sae)
    assert again.W_dec.dtype is torch.bfloat16
    assert torch.equal(got.pop("d")["e"], torch.arange(3))
    assert got == {"a": 1, "b": [2.5, "c", None, True]}
    annealed = build(activation=TopK(20), dtype=torch.bfloat16, objective="fvu", normalise_decoder=False)
    assert load_checkpoint(path, annealed).sae is annealed
    assert annealed.k == 9


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "x.pt", build())
    for sae in (SAE(12, 33, TopK(4)), SAE(12, 32, ReLU())):
        with pytest.raises(ValueError, match=r"load_checkpoint: .*x.pt is damaged or of something else"):
            load_checkpoint(path, sae)
    with pytest.raises(ValueError, match="holds no optimiser's state"):
        load_checkpoint(path, build(), adam(build()))
    whole = path.read_bytes()
    for damage in (b"", whole[:200], whole[:-100], b"something else entirely"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="is damaged or of something else"):
            load_checkpoint(path)
    torch.save({"sae": {}}, path)
    with pytest.raises(ValueError, match=r"is damaged or of something else: KeyError..config"):
        load_checkpoint(path)


class Trap:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)  # pyright: ignore[reportDeprecated]  (what a trap would call)


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"config": Trap(), "sae": {}, "extra": {}, "opt": None}, "trap.pt")
    with pytest.raises(ValueError, match="is damaged or of something else"):
        load_checkpoint("trap.pt")
    assert not Path("executed").exists()


def test_a_failed_save_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_checkpoint(tmp_path / "x.pt", build(), extra={"n": 1})

    def full(content: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, build(), extra={"n": 2})
    assert load_checkpoint(path).extra["n"] == 1


SAVING = """
    import sys, torch
    from fastsae import SAE, TopK, save_checkpoint
    sae = SAE(256, 2048, TopK(4), seed=0)
    n = 0
    while True:
        with torch.no_grad():
            sae.W_enc.fill_(n), sae.W_dec.fill_(n), sae.b_dec.fill_(n)
        save_checkpoint(sys.argv[1], sae, extra={"n": n})
        print(n, flush=True)
        n += 1
"""


@pytest.mark.slow
def test_a_kill_during_a_save_leaves_a_checkpoint(tmp_path: Path) -> None:
    path, draw = tmp_path / "x.pt", random.Random(0)
    for _ in range(KILLS):
        process = launch(SAVING, path)
        assert process.stdout is not None
        known = int(process.stdout.readline())
        time.sleep(draw.uniform(0, 0.1))  # somewhere in a later save
        process.send_signal(signal.SIGKILL)
        known = max([known, *map(int, process.stdout.read().split())])
        process.wait()
        sae, extra = load_checkpoint(path)
        assert extra["n"] in (known, known + 1)  # renamed, and killed before it could say so
        assert all(bool((weight == extra["n"]).all()) for weight in (sae.W_enc, sae.W_dec, sae.b_dec))


TRAINING = """
    import os, signal, sys
    from fastsae import Trainer, save_checkpoint
    from training_runs import Fused, adam, batches, build
    kind, path, result, stop, fused = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5] == "1"
    sae = build(kind)
    kill = lambda step, metrics: os.kill(os.getpid(), signal.SIGKILL) if step == stop else None
    opt = Fused(sae, 3e-3) if fused else adam(sae)
    Trainer(sae, opt, checkpoint=path, every=3, log_every=1, callback=kill, progress=False).fit(batches(sae), 20, resume=True)
    save_checkpoint(result, sae)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "fused"), [("topk", 0), ("batchtopk", 1)])
def test_a_killed_run_ends_in_the_same_bits(kind: str, fused: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(path: Path, result: Path) -> None:
        monkeypatch.setattr(sys, "argv", ["", kind, str(path), str(result), "-1", str(fused)])
        exec(textwrap.dedent(TRAINING), {})

    train(tmp_path / "whole.pt", tmp_path / "a.pt")
    draw = random.Random(fused)
    for stop in sorted(draw.sample(range(1, 20), min(KILLS, 19))):
        assert launch(TRAINING, kind, tmp_path / "run.pt", tmp_path / "b.pt", stop, fused).wait() == -signal.SIGKILL
    train(tmp_path / "run.pt", tmp_path / "b.pt")
    assert same(load_checkpoint(tmp_path / "a.pt").sae, load_checkpoint(tmp_path / "b.pt").sae)


# ---------------------------------------------------------------- several processes

PARALLEL = """
    import sys, torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    from fastsae import Trainer, save_checkpoint
    from training_runs import adam, batches, build, data, same

    class Loss(nn.Module):
        def __init__(self, sae):
            super().__init__()
            self.sae = sae
        def forward(self, x):
            return self.sae.loss(x).loss

    kind, rank, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x = data()[:160]
    sae = build(kind, aux=None)
    parallel = DistributedDataParallel(Loss(sae))
    opt = adam(sae)
    for batch in x.split(40):
        opt.zero_grad()
        parallel(batch[rank::2]).backward()
        sae.remove_parallel_gradient_()
        opt.step()
        sae.normalise_decoder_()
    save_checkpoint(f"{folder}/ddp{rank}.pt", sae)

    sae = build(kind, aux=None)
    def reduce(parameters):
        for p in parameters:
            dist.all_reduce(p.grad)
            p.grad /= 2
    Trainer(sae, adam(sae), reduce=reduce, checkpoint=f"{folder}/loop.pt", progress=False).fit([b[rank::2] for b in x.split(40)], 4)
    save_checkpoint(f"{folder}/hook{rank}.pt", sae)
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["topk", "gated"])
def test_two_processes(kind: str, tmp_path: Path) -> None:
    processes = [launch(PARALLEL, kind, rank, tmp_path, OMP_NUM_THREADS="1") for rank in range(2)]
    for process in processes:
        errors = process.communicate(timeout=240)[1]
        assert process.returncode == 0, errors
    one = build(kind, aux=None)
    Trainer(one, adam(one), progress=False).fit(list(data()[:160].split(40)), 4)
    assert load_checkpoint(tmp_path / "loop.pt").extra["step"] == 4  # rank 0 wrote it
    for way in ("ddp", "hook"):
        first, second = (load_checkpoint(tmp_path / f"{way}{rank}.pt").sae for rank in range(2))
        for name, p in first.named_parameters():
            assert torch.equal(p, dict(second.named_parameters())[name])
            # The mean over two halves is the mean over the whole, up to rounding, which Adam's first steps magnify where it is near 0.
            assert float(((p - dict(one.named_parameters())[name]).abs() > 1e-4).float().mean()) < 0.01, name
