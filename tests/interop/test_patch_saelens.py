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
from peers import load, minilm_rows, same, same_call, same_gradients, second_derivatives
from places import ROOT
from saelens_cases import KINDS, OUT, ROWS, D, F, make, options, rows, same_trainers, trainer_of
from torch import Tensor

import fastsae
from fastsae.patch import saelens

sae_lens = load("sae_lens", "sae-lens")
from sae_lens import saes  # noqa: E402
from sae_lens.config import LoggingConfig  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def pair(name: str, **more: Any) -> tuple[Any, Any]:
    """(accelerated, the library's own), equal."""
    return fastsae.accelerate(make(name, **more)), make(name, **more)


# ---------------------------------------------------------------- SAEs


@given(data=st.data())
def test_outputs_and_gradients_of_any_sae(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(KINDS)))
    kind = KINDS[name]
    more: dict[str, Any] = {"shift": data.draw(st.sampled_from([0.0, 2.5]))}
    normalisations = ["none", "layer_norm", "constant_norm_rescale", "expected_average_only_in", "covariance_whitening"]
    more["normalize_activations"] = data.draw(st.sampled_from(normalisations[: 4 if "Pursuit" in name else 5]))
    if not kind.transcoder:
        more["apply_b_dec_to_input"] = data.draw(st.booleans())
    if "topk" in kind.activation:
        more["rescale_acts_by_decoder_norm"] = data.draw(st.booleans())
        more["k"] = data.draw(st.sampled_from([1, 5, F]))
    heads = not kind.transcoder and not kind.training and data.draw(st.booleans())
    if heads:
        more["reshape_activations"] = "hook_z"
    # The library's JumpReLU has a backward for 2 dimensions only, its pursuit takes no single vector.
    batches: list[tuple[int, ...]] = [(1,), (7,), (2, 5), ()]
    batch = data.draw(st.sampled_from(batches[: 2 if name == "JumpReLUTrainingSAE" else 3 if "Pursuit" in name else 4]))
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
    assert isinstance(latents, fastsae.TopKLatents if KINDS[name].activation in ("topk", "abstopk") else fastsae.RaggedLatents)
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
    same(fastsae.encode(sae, rows()).to_dense(), sae.encode(rows()))  # its own, without the zeros


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
        mine.to(dtype=dtype)
        theirs.to(dtype=dtype)
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
    left = saes.TemporalSAE(saes.TemporalSAEConfig(d_in=D, d_sae=F, n_heads=4, bottleneck_factor=1))
    assert "on the other tokens" in str(fastsae.report(fastsae.accelerate(left))) and type(left) is saes.TemporalSAE
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got list"):
        fastsae.encode(make("TopKSAE"), [1.0])
    with pytest.raises(ValueError, match=r"target must have shape \[40, 24\], got \[40, 2\]"):
        fastsae.reconstruct(make("TopKSAE"), rows(), target=torch.zeros(ROWS, 2))


def test_any_sae_has_a_sparse_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every class that the library registers, and of a class of one's own: what the SAE's own ``encode`` gives, without its zeros."""
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    class Doubled(saes.TopKSAE):
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().encode(x)

    made: list[Any] = [Doubled(saes.TopKSAEConfig(d_in=D, d_sae=F, k=5))]
    for registry in (SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY):
        for name, (cls, config) in registry.items():
            more: dict[str, Any] = {"k": 5} if "topk" in name else {}
            more |= {"d_out": OUT, "apply_b_dec_to_input": False} if "transcoder" in name else {}
            more |= {"matryoshka_widths": [10, F]} if "matryoshka" in name else {"max_iterations": 4} if "pursuit" in name else {}
            more |= {"decoder_init_norm": 1.0} if "pursuit" in name and registry is SAE_TRAINING_CLASS_REGISTRY else {}
            more |= {"n_heads": 4, "bottleneck_factor": 1} if name == "temporal" else {}
            made.append(cls(config(d_in=D, d_sae=F, **more)))
    for sae in made:
        x = rows(2, 5, seed=3)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of methods that are not the tested ones, in another version
            latents, run = fastsae.encode(sae, x), fastsae.reconstruct(sae, x)
            same(latents.to_dense(), sae.encode(x))
            same(run.x_hat, sae(x), 2e-5)
            assert latents.values.numel() <= x.shape[:-1].numel() * F
    with pytest.raises(TypeError, match="a subclass of TopKSAE: subclasses are left alone"):
        fastsae.accelerate(made[0])
    sae = make("TopKSAE")
    monkeypatch.setattr(saes.TopKSAE, "encode", lambda self, x: torch.ones(*x.shape[:-1], F))
    with pytest.warns(UserWarning, match="encode of TopKSAE, or what it calls, is not that of sae-lens"):
        assert torch.equal(fastsae.encode(sae, rows()).to_dense(), torch.ones(ROWS, F))


def test_another_version_is_refused_where_its_methods_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    monkeypatch.setattr(metadata, "version", lambda name: "7.0.1")
    assert fastsae.report(fastsae.accelerate(make("TopKSAE"))).accelerated  # its methods are the tested ones
    monkeypatch.setattr(saes.TopKSAE, "encode", lambda self, x: x)
    with pytest.raises(RuntimeError, match=r"sae-lens 7.0.1 is installed; supported: >= 6.49, < 6.55 .any_version=True goes on"):
        fastsae.accelerate(make("TopKSAE"))
    assert fastsae.report(fastsae.accelerate(make("TopKSAE"), any_version=True)).accelerated


# ---------------------------------------------------------------- training


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
                original = saelens._train.Step.run
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(saelens._train.Step, "run", lambda step: steps.append(1) or original(step))
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


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """Rows of the demo's language model, centred and of mean square 1."""
    return minilm_rows(tmp_path_factory.mktemp("hidden"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TopKTrainingSAE", "BatchTopKTrainingSAE", "JumpReLUTrainingSAE"])
def test_real_activations(name: str, hidden: Tensor) -> None:
    x = hidden[:256]
    mine, theirs = (trainer_of(name, d_in=384, d_sae=1024, trainer={"dead_feature_window": 1}) for _ in range(2))
    fastsae.accelerate(mine)
    for part in x.split(64):
        mine.step(part)
        theirs.step(part)
    same_trainers(mine, theirs)
    with torch.no_grad():
        a, b = mine.sae.encode(hidden), theirs.sae.encode(hidden)
        differ = (a != 0) != (b != 0)
        assert float(differ.double().mean()) < 1e-5  # ties, and scores within rounding of each other
        same(a * ~differ, b * ~differ, 1e-5)
        same(mine.sae(x), theirs.sae(x), 1e-5)


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
