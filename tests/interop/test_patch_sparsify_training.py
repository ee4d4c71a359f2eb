"""``accelerate`` against the real sparsify: training steps, its trainer, its loss terms and optimiser."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from peers import aux_regime, load, same, works_under_settings
from sparsify_cases import CONFIGS, ROWS, D, F, K, library_step, make, pair, rows
from torch import Tensor
from torch.nn.utils import prune

import fastsae
from fastsae._core import flags
from fastsae.patch import sparsify as adapter
from fastsae.patch._adapter import changed

sparsify = load("sparsify", "eai-sparsify")
from sparsify import SparseCoder, SparseCoderConfig  # noqa: E402


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_training_steps(config: dict[str, Any], fused: bool) -> None:
    mine, theirs = pair(**config)
    lr = 1e-3
    optimizers = [torch.optim.Adam(coder.parameters(), lr=lr) for coder in (mine, theirs)]
    dead = torch.arange(F) % 3 == 0
    for step in range(3):
        x = rows(seed=10 + step)
        y = rows(seed=20 + step) if config.get("transcode") else None
        mask = None if step == 1 else dead
        run = adapter.train_step if fused else None
        a = (
            run(mine, optimizers[0], x, y, dead_mask=mask, auxk_alpha=1 / 32)
            if run
            else library_step(mine, optimizers[0], x, y, mask, 1 / 32)
        )
        b = library_step(theirs, optimizers[1], x, y, mask, 1 / 32)
        for name in ("sae_out", "fvu", "auxk_loss", "multi_topk_fvu"):
            same(getattr(a, name), getattr(b, name), of=5e-6)
        for (name, p), q in zip(mine.named_parameters(), theirs.parameters()):
            assert p.grad is None
            assert float((p - q).detach().abs().max()) <= 0.02 * lr, name
            for moment in ("exp_avg", "exp_avg_sq"):
                same(optimizers[0].state[p][moment], optimizers[1].state[q][moment], of=2e-5)
    assert adapter._why_not_fused(mine, optimizers[0], rows(), None) is None
    # The optimiser goes on where the other leaves off.
    again = torch.optim.Adam(theirs.parameters(), lr=lr)
    again.load_state_dict(optimizers[0].state_dict())
    library_step(theirs, again, rows(), rows(seed=2) if config.get("transcode") else None, None, 0.0)


def _sure(coder: Any, x: Tensor, dead: Tensor) -> Tensor:
    """Which rows keep the same latents however their scores round: the library ranks rounded ones."""
    scores = coder.encode(x).pre_acts.float()
    sure = torch.ones(len(x), dtype=torch.bool)
    for of, k in ((scores, K), (scores, 4 * K), (scores.where(dead, -1.0), D // 2)):
        best = of.sort(descending=True).values
        sure &= (best[:, k] < 0.98 * best[:, k - 1]) & (best[:, k - 1] > 0)
    return sure


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_training_steps_under_autocast(config: dict[str, Any]) -> None:
    mine, theirs = pair(**config)
    optimizers = [torch.optim.Adam(coder.parameters(), lr=1e-3) for coder in (mine, theirs)]
    dead = torch.arange(F) % 3 == 0
    for step, dtype in enumerate((torch.float32, torch.bfloat16)):
        x, y = rows(200, step).to(dtype), rows(200, 20 + step).to(dtype) if config.get("transcode") else None
        with torch.autocast("cpu", torch.bfloat16):
            sure = _sure(theirs, x, dead)
            x, y = x[sure], None if y is None else y[sure]
            assert len(x) > 20 and adapter._why_not_fused(mine, optimizers[0], x, y) is None
            a = adapter.train_step(mine, optimizers[0], x, y, dead_mask=dead, auxk_alpha=1 / 32)
            b = library_step(theirs, optimizers[1], x, y, dead, 1 / 32)
        for name in ("sae_out", "fvu", "auxk_loss", "multi_topk_fvu"):
            same(getattr(a, name), getattr(b, name), of=5e-3 if step else 5e-6)  # the second's weights may round otherwise, and its y does
    for (name, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        u, v = (optimizer.state[r]["exp_avg"] for optimizer, r in zip(optimizers, (p, q), strict=True))
        assert float((u - v).norm() / v.norm()) < 2**-8 and p.dtype is q.dtype and p.grad is None, name


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there, and its device guard with it")
def test_a_training_step_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own autocast: scores of bfloat16, gradients as slots in float32; the host waits for the dead latents alone."""
    from fake_cuda import FakeCuda

    monkeypatch.setattr(adapter, "_BF16", True)
    coder = fastsae.accelerate(make(skip_connection=True))
    with FakeCuda() as gpu:
        gpu.move(coder)
        for dtype in (torch.float32, torch.bfloat16):
            for dead, waits in ((None, []), (gpu.tensor((F,), torch.bool), ["__int__ in sparsify.py", "nonzero in checks.py"])):
                x = gpu.tensor((ROWS, D), dtype)
                assert adapter._why_not_by_hand(coder, x, x) is None
                flags.flag(gpu.device)
                gpu.forget()
                out, backward = adapter._by_hand(coder, x, x, dead, None)
                gradients: Any = backward(1.0, 1 / 32, 0.0)
                assert [wait.partition(":")[0] for wait in gpu.syncs] == waits and not gpu.copies
                assert out.latent_acts.dtype is torch.bfloat16 and out.sae_out.dtype is torch.float32 is gradients[coder.W_skip].dtype
                assert {gradients[p].values.dtype for p in (coder.encoder.weight, coder.W_dec) if dead is None} <= {torch.float32}


@pytest.mark.parametrize("config", CONFIGS[1:4:2], ids=str)
def test_under_other_settings(config: dict[str, Any]) -> None:
    x, y, dead = rows(), rows(seed=2) if config.get("transcode") else None, torch.arange(F) % 3 == 0

    def use(coder: Any) -> list[Tensor]:
        optimizer = torch.optim.Adam(coder.parameters(), lr=1e-3)
        if fastsae.report(coder).accelerated:
            out = adapter.train_step(coder, optimizer, x, y, dead_mask=dead, auxk_alpha=1 / 32)
        else:
            out = library_step(coder, optimizer, x, y, dead, 1 / 32)
        return [out.sae_out.detach(), out.fvu.detach(), out.auxk_loss.detach(), *(p.detach() for p in coder.parameters())]

    works_under_settings(lambda fast: fastsae.accelerate(make(**config)) if fast else make(**config), use)


def test_other_optimisers_step_on_dense_gradients() -> None:
    mine, theirs = pair()
    optimizers = [torch.optim.SGD(coder.parameters(), lr=0.1) for coder in (mine, theirs)]
    assert "SGD" in str(adapter._why_not_fused(mine, optimizers[0], rows(), None))
    adapter.train_step(mine, optimizers[0], rows())
    library_step(theirs, optimizers[1], rows(), None, None, 0.0)
    for p, q in zip(mine.parameters(), theirs.parameters()):
        same(p, q)


STEPS: dict[str, Any] = {
    "a hook": lambda coder, optimizer: coder.register_forward_hook(lambda module, args, out: out._replace(fvu=3 * out.fvu)),
    "a gradient": lambda coder, optimizer: coder.W_dec.register_hook(lambda g: g * 2),
    "a frozen bias": lambda coder, optimizer: coder.b_dec.requires_grad_(False),
    "a pruned decoder": lambda coder, optimizer: prune.random_unstructured(coder, "W_dec", 0.1),
    "an encode of its own": lambda coder, optimizer: setattr(coder, "encode", lambda x, was=coder.encode: was(2 * x)),
    "a decode of its own": lambda coder, optimizer: setattr(coder, "decode", lambda *slots, was=coder.decode: 2 * was(*slots)),
    "a step of its own": lambda coder, optimizer: setattr(optimizer, "step", lambda: None),
}


@pytest.mark.parametrize("what", STEPS)
def test_training_steps_of_what_was_changed(what: str) -> None:
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        coder = fastsae.accelerate(make()) if fused else make()
        optimizer = torch.optim.Adam(coder.parameters(), lr=1e-3)
        STEPS[what](coder, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                for step in range(2):
                    if fused:
                        adapter.train_step(coder, optimizer, rows(seed=step))
                    else:
                        library_step(coder, optimizer, rows(seed=step), None, None, 0.0)
            except (RuntimeError, AssertionError) as error:  # a pruned tensor's graph serves once
                results.append(type(error))
                continue
        results.append([p.detach().clone() for p in coder.parameters()])
    if isinstance(results[1], type):
        assert results[0] is results[1]
    else:
        for p, q in zip(*results, strict=True):
            assert float((p - q).abs().max()) <= 1e-5


def test_methods_are_those_of_the_tested_release(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(changed(make(), *adapter._METHODS) is None for _ in range(2))
    mine, theirs = pair()
    module = importlib.import_module("sparsify.sparse_coder")
    monkeypatch.setattr(module, "fused_encoder", lambda x, *rest, was=module.fused_encoder: was(2 * x, *rest))
    with pytest.warns(UserWarning, match="encode of SparseCoder, or what it calls, is not that of eai-sparsify 1.3.3"):
        assert torch.equal(mine(rows()).fvu, theirs(rows()).fvu)
    assert "is not that of" in fastsae.report(mine).now["encode"]
    with pytest.raises(ValueError, match="has no sparse latents here: encode of SparseCoder, or what it calls"):
        fastsae.encode(mine, rows())
    torch.compiler.reset()
    assert torch.equal(torch.compile(mine, backend="eager")(rows()).fvu, theirs(rows()).fvu)
    monkeypatch.undo()
    torch.compiler.reset()
    assert not fastsae.report(mine).now


def test_a_trainer_takes_its_coders_along() -> None:
    from sparsify.trainer import Trainer

    trainer = object.__new__(Trainer)  # its constructor wants a model and its dataset
    trainer.saes = {"layers.0": make(), "layers.1": make(transcode=True)}
    trainer.cfg, trainer.optimizers = SimpleNamespace(loss_fn="kl"), []  # pyright: ignore[reportAttributeAccessIssue]
    fastsae.accelerate(trainer)
    report = fastsae.report(trainer)
    assert all(fastsae.report(coder).accelerated for coder in trainer.saes.values())
    assert "saes['layers.1'].encode" in report.replaced and "slots" in report.replaced["fit"] and "loss_fn is 'kl'" in report.now["fit"]
    fastsae.restore(trainer)
    assert all(type(coder) is SparseCoder for coder in trainer.saes.values())


FITS: dict[str, dict[str, Any]] = {
    "signum": {"optimizer": "signum", "lr": 1e-3},
    "adam": {"optimizer": "adam", "lr": 1e-3, "lr_warmup_steps": 1, "auxk_alpha": 1 / 32, "dead_feature_threshold": 20},
    "adam, accumulated": {"optimizer": "adam", "lr": 1e-3, "lr_warmup_steps": 1, "grad_acc_steps": 2, "micro_acc_steps": 2},
    "signum, accumulated": {"optimizer": "signum", "lr": 1e-3, "grad_acc_steps": 2, "micro_acc_steps": 2, "layers": [0, 1]},
    "muon": {"optimizer": "muon", "lr": 1e-3},
}


@pytest.mark.parametrize("case", FITS)
def test_fit_of_the_real_trainer(case: str, tmp_path: Path) -> None:
    """``Trainer.fit`` on a small model: the same coder, files and optimiser's state after ten batches, accelerated or not."""
    from sparsify.config import TrainConfig
    from sparsify.trainer import Trainer
    from transformers import GPT2Config, GPT2Model

    class Rows(list[Any]):
        def select(self, indices: Any) -> Any:
            return Rows(self[i] for i in indices)

    tokens = torch.randint(0, 50, (20, 8), generator=torch.Generator().manual_seed(0))
    data = Rows({"input_ids": row} for row in tokens)
    trainers: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for accelerated in (True, False):
            torch.manual_seed(0)
            model = GPT2Model(GPT2Config(vocab_size=50, n_positions=8, n_embd=D, n_layer=2, n_head=2)).eval()
            options = FITS[case] if "layers" in FITS[case] else {"hookpoints": ["h.0"], **FITS[case]}
            folder = {"save_dir": str(tmp_path), "run_name": str(accelerated), "log_to_wandb": False}
            coder = SparseCoderConfig(num_latents=F, k=K, multi_topk="acc" in case)
            trainer = Trainer(TrainConfig(coder, batch_size=2, **options, **folder), data, model)  # pyright: ignore[reportArgumentType]
            if accelerated:
                fastsae.accelerate(trainer)
                assert fastsae.report(trainer).now == ({"fit": "there are several optimisers"} if case == "muon" else {})
            trainer.fit()
            trainers.append(trainer)
    mine, theirs = trainers
    for optimizer, other in zip(mine.optimizers, theirs.optimizers, strict=True):
        assert vars(optimizer).keys() == vars(other).keys() and getattr(optimizer.step, "__func__", 0) is getattr(other.step, "__func__", 0)
        assert optimizer.param_groups[0].keys() == other.param_groups[0].keys()
        for key, value in optimizer.param_groups[0].items():
            assert key == "params" or value == pytest.approx(other.param_groups[0][key]), key
    for name, coder in mine.saes.items():
        same(coder(rows()).sae_out, theirs.saes[name](rows()).sae_out, of=1e-3)
        for (which, p), q in zip(coder.named_parameters(), theirs.saes[name].parameters(), strict=True):
            off = (p - q).detach().abs() > 0.1 * 1e-3
            assert float(off.double().mean()) <= (0.01 if "signum" in case else 0.0), which  # signs of gradients that cancel
            assert p.grad is None
        saved = SparseCoder.load_from_disk(tmp_path / "True" / name)
        other = SparseCoder.load_from_disk(tmp_path / "False" / name)
        assert all(float((a - b).detach().abs().mean()) < 1e-4 for a, b in zip(saved.parameters(), other.parameters(), strict=True))


def test_hooks_on_the_coder_fire() -> None:
    coder = fastsae.accelerate(make())
    seen: list[Any] = []
    coder.register_forward_hook(lambda module, args, out: seen.append(out))
    out = coder(rows())
    assert seen == [out]


# ---------------------------------------------------------------- its terms and its optimiser


@given(data=st.data())
def test_the_auxk_preset_is_the_librarys(data: st.DataObject) -> None:
    sae, x, dead, (term, gradients) = aux_regime(data, fastsae.AuxK.sparsify(coefficient=0.5))
    config = SparseCoderConfig(num_latents=sae.d_sae, k=int(sae.k))
    coder = SparseCoder(sae.d_in, config, dtype=torch.float64)
    with torch.no_grad():
        for p, value in (
            (coder.encoder.weight, sae.W_enc),
            (coder.encoder.bias, sae.b_enc),
            (coder.W_dec, sae.W_dec),
            (coder.b_dec, sae.b_dec),
        ):
            assert p is not None
            p.copy_(value)
    variance = torch.tensor(1.0, dtype=torch.float64) if x.shape[0] == 1 else None
    loss = 0.5 * coder(x, dead_mask=dead, total_variance=variance).auxk_loss
    if x.shape[0] == 1:  # no variance to divide by: 0 here
        assert term == 0 and (not dead.any() or loss > 0)
        return
    torch.testing.assert_close(term, loss.detach(), rtol=1e-9, atol=1e-11)
    if dead.any():
        loss.backward()
        assert coder.W_dec is not None and coder.encoder.weight.grad is not None
        torch.testing.assert_close(gradients["W_dec"], coder.W_dec.grad, rtol=1e-9, atol=1e-11)
        assert not coder.encoder.weight.grad.any(), "the library's encoder ignores dense scores"


@pytest.mark.parametrize("unit", [False, True])
def test_signum_is_the_trainers(unit: bool) -> None:
    """``optim.Signum`` on a coder against the trainer's own: without unit rows to the rounding of a blend, and up to the signs of gradients
    that cancel with them, where its projection rounds otherwise; then the averages that both keep."""
    schedulefree = load("schedulefree", "schedulefree")
    from sparsify.sign_sgd import SignSGD

    theirs, ours = make(normalize_decoder=unit), make(normalize_decoder=unit)
    for coder in (theirs, ours):
        if unit:
            coder.set_decoder_norm_to_unit_norm()
    reference = schedulefree.ScheduleFreeWrapper(SignSGD(theirs.parameters(), lr=1e-3), momentum=0.95)
    reference.train()
    signum = fastsae.optim.Signum(ours, lr=1e-3, unit_rows=["W_dec"] if unit else [])
    generator = torch.Generator().manual_seed(3)
    for _ in range(8):
        x = torch.randn(ROWS, D, generator=generator)
        if unit:
            theirs.set_decoder_norm_to_unit_norm()
        theirs(x).fvu.backward()
        if unit:
            theirs.remove_gradient_parallel_to_decoder_directions()
            ours(x).fvu.backward()
        else:  # the same gradients
            for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                mine.grad = None if other.grad is None else other.grad.clone()
        reference.step()
        reference.zero_grad()
        signum.apply()
        ours.zero_grad()
    if unit:
        theirs.set_decoder_norm_to_unit_norm()  # ours is at the end of a step, its own at the start of the next
    reference.eval()
    signum.eval()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        allowed = 0.02 if unit else 0.0
        assert float(((mine - other).abs() > 2e-6).double().mean()) <= allowed, name
