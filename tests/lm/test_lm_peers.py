"""``evaluate`` and ``splice`` beside SAELens's and SAEBench's own evaluation, in TransformerLens's and nnsight's models, and with the
dictionaries of other libraries: the real packages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from peers import load
from torch import Tensor

import fastsae
from fastsae import SAE, BatchTopK, Gated, JumpReLU, ReLU, TopK
from fastsae._core.checkout import checkout_hidden
from fastsae.lm import Edit, Evaluation, evaluate, harvest, hook_points, splice
from fastsae.patch import as_saelens

sae_lens = load("sae_lens", "sae-lens")

from sae_lens.evals import get_eval_everything_config, run_evals  # noqa: E402
from sae_lens.load_model import HookedProxyLM  # noqa: E402
from sae_lens.saes.sae import SAEMetadata  # noqa: E402
from sae_lens.training.activation_scaler import ActivationScaler  # noqa: E402
from transformer_lens import HookedTransformerConfig  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from bench import peers, training  # noqa: E402  # pyright: ignore[reportMissingImports]

D, F, VOCAB, HOOK, RESID = 16, 64, 50, "model.layers.1", "blocks.1.hook_resid_post"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=D, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def lens() -> Any:
    config = {"n_layers": 3, "d_model": D, "n_ctx": 9, "d_head": 8, "n_heads": 2, "d_mlp": 32, "d_vocab": VOCAB, "act_fn": "gelu"}
    return sae_lens.HookedSAETransformer(HookedTransformerConfig(**config, normalization_type="LN", device="cpu", seed=0)).eval()


def ids(n: int = 12) -> Tensor:
    return torch.randint(0, VOCAB, (n, 9), generator=torch.Generator().manual_seed(1))


def dictionaries(kind: str, hook: str) -> tuple[Any, Any]:
    """(what ``evaluate`` takes, what SAELens takes): its own SAE both times, or one of ours and what ``as_saelens`` makes of it."""
    torch.manual_seed(0)
    activations = {"our topk": TopK(5), "our jumprelu": JumpReLU(0.3)}
    if kind in activations:
        sae: Any = SAE(D, F, activations[kind], seed=0).eval()
    else:
        name = {"topk": "TopKSAE", "standard": "StandardSAE"}[kind]
        config = getattr(sae_lens, f"{name}Config")(d_in=D, d_sae=F, **({"k": 5} if kind == "topk" else {}))
        config.metadata = SAEMetadata(hook_name=hook, model_name="tiny")
        sae = getattr(sae_lens, name)(config)
    for p in sae.parameters():
        p.data = torch.rand_like(p) if p is getattr(sae, "threshold", None) else torch.randn_like(p) * (0.1 if p.dim() == 1 else 0.4)
    return sae, sae if kind not in activations else as_saelens(sae, hook, model_name="tiny")


def assert_same(found: Evaluation, groups: Mapping[str, Mapping[str, float]], features: Mapping[str, list[float]], signed: bool) -> None:
    theirs = {name: value for group in groups.values() for name, value in group.items()}
    names = {"ce_clean": "ce_loss_without_sae", "ce_spliced": "ce_loss_with_sae", "ce_zero": "ce_loss_with_ablation"}
    names |= {"kl_spliced": "kl_div_with_sae", "kl_zero": "kl_div_with_ablation", "kl_recovered": "kl_div_score"}
    names |= {"l0": "l0", "l1": "l1", "cosine": "cossim", "l2_in": "l2_norm_in", "l2_out": "l2_norm_out", "l2_ratio": "l2_ratio"}
    names |= {"mse": "mse", "explained_variance": "explained_variance"} if signed else {}
    for ours, name in names.items():
        assert found.values[ours] == pytest.approx(theirs[name], rel=2e-5), ours
    lost = theirs["ce_loss_with_ablation"] - theirs["ce_loss_without_sae"]  # of means that they round to float32
    assert found.values["ce_recovered"] == pytest.approx(theirs["ce_loss_score"], abs=2**-22 * theirs["ce_loss_with_ablation"] / abs(lost))
    assert found.density.tolist() == pytest.approx(features["feature_density"], rel=1e-6)
    expected = torch.tensor(features["consistent_activation_heuristic"])
    torch.testing.assert_close((found.fired / found.sequences).float(), expected, equal_nan=True)


@pytest.mark.parametrize("kind", ["topk", "standard", "our topk", "our jumprelu"])
@pytest.mark.parametrize("ignore", [(), (7, 8)])
def test_evaluation_is_that_of_saelens(model: Any, kind: str, ignore: tuple[int, ...]) -> None:
    sae, theirs = dictionaries(kind, HOOK)
    wrapped = HookedProxyLM(model, None)  # pyright: ignore[reportArgumentType]
    config = get_eval_everything_config(4, n_eval_reconstruction_batches=3, n_eval_sparsity_variance_batches=3)
    store = peers.Tokens(ids(), 4)
    groups, features = run_evals(theirs, store, wrapped, ActivationScaler(), config, exclude_special_tokens=ignore)
    found = evaluate(sae, model, ids(), HOOK, ignore=ignore, batch=4, progress=False)
    assert_same(found, groups, features, True)
    through = evaluate(theirs, wrapped, ids(), f"model.{HOOK}", ignore=ignore, batch=4, progress=False)
    assert through.values == pytest.approx(found.values, rel=2e-5), "of SAELens's own objects, model and SAE"
    whole = evaluate(sae, model, ids(), HOOK, ignore=ignore, batch=12, ablations=("zero", "mean"), progress=False)
    for name, value in found.values.items():
        assert whole.values[name] == pytest.approx(value, rel=2e-5), f"{name} does not depend on batches"
    assert found.errors["ce_spliced"] > 0 and "ce_recovered_mean" in whole.values
    config = get_eval_everything_config(12, n_eval_reconstruction_batches=1)
    single = run_evals(theirs, peers.Tokens(ids(), 12), wrapped, ActivationScaler(), config, exclude_special_tokens=ignore)
    assert whole.values["reconstruction_bias"] == pytest.approx(single[0]["shrinkage"]["relative_reconstruction_bias"], rel=2e-5)


@pytest.mark.parametrize("kind", ["topk", "our topk", "our jumprelu"])
@pytest.mark.parametrize("ignore", [(), (7, 8)])
def test_evaluation_is_that_of_saebench(lens: Any, kind: str, ignore: tuple[int, ...]) -> None:
    core = load("sae_bench.evals.core.main", "sae-bench")
    sae, theirs = dictionaries(kind, RESID)
    _, theirs, _ = core.general_utils.load_and_format_sae("tiny", theirs, "cpu")
    config = core.CoreEvalConfig(batch_size_prompts=4, n_eval_reconstruction_batches=3, n_eval_sparsity_variance_batches=3)
    for name in vars(config):
        if name.startswith("compute_") or name == "exclude_special_tokens_from_reconstruction":
            setattr(config, name, True)
    groups, features = core.run_evals(theirs, peers.Tokens(ids(), 4), lens, config, ignore_tokens=set(ignore))
    found = evaluate(sae, lens, ids(), RESID, ignore=ignore, batch=4, progress=False)
    assert_same(found, groups, features, False)
    misc = core.calculate_misc_metrics(features)
    assert found.values["dead"] == pytest.approx(F * (1 - misc["frac_alive"])) and found.values["dense"] / F == misc["freq_over_10_percent"]
    if not ignore:  # every batch has as many tokens
        assert found.values["mse"] == pytest.approx(4 * 9 * groups["reconstruction_quality"]["mse"], rel=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", [TopK(4), BatchTopK(4.0), JumpReLU(0.05), ReLU(), Gated()], ids=lambda kind: type(kind).__name__)
def test_our_saes_run_in_transformerlens(lens: Any, kind: Any) -> None:
    sae = SAE(D, F, kind, seed=3).eval()
    theirs = as_saelens(sae, RESID, model_name="tiny")
    assert (theirs.cfg.d_in, theirs.cfg.d_sae, theirs.cfg.metadata.hook_name, theirs.cfg.dtype) == (D, F, RESID, "float32")
    assert theirs.W_dec.data_ptr() == sae.W_dec.data_ptr() and fastsae.report(theirs).accelerated and not theirs.training
    x = torch.randn(5, D)
    torch.testing.assert_close(theirs.encode(x), sae.encode(x).to_dense())
    torch.testing.assert_close(theirs(x), sae(x).x_hat)
    clean, spliced = lens(ids()), lens.run_with_saes(ids(), saes=[theirs])
    with splice(lens, {RESID: sae}, error="drop"):
        torch.testing.assert_close(lens(ids()), spliced, rtol=1e-5, atol=1e-5)
    with splice(lens, {RESID: sae}):
        assert torch.equal(lens(ids()), clean)
    torch.testing.assert_close(lens.run_with_saes(ids(), saes=[theirs], use_error_term=True), clean, rtol=1e-5, atol=1e-5)
    again, cache = lens.run_with_cache_with_saes(ids(), saes=[theirs])
    torch.testing.assert_close(again, spliced, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache[f"{RESID}.hook_sae_acts_post"], sae.encode(cache[f"{RESID}.hook_sae_input"]).to_dense())
    assert torch.equal(lens(ids()), clean), "nothing is left behind"


@torch.no_grad()
def test_a_transcoder_runs_in_transformerlens(lens: Any) -> None:
    sae = SAE(D, F, JumpReLU(0.05), d_out=D, skip=True, seed=1).eval()
    theirs = as_saelens(sae, "blocks.1.ln2.hook_normalized", hook_name_out="blocks.1.hook_mlp_out")
    spliced = lens.run_with_saes(ids(), saes=[theirs])
    for transcoder in (sae, theirs):
        with splice(lens, {"blocks.1.mlp": transcoder}, error="drop"):
            torch.testing.assert_close(lens(ids()), spliced, rtol=1e-5, atol=1e-5)
    mine, other = (evaluate(one, lens, ids(), "blocks.1.mlp", progress=False) for one in (sae, theirs))
    assert mine.values == pytest.approx(other.values, rel=1e-5)


def test_what_saelens_has_not() -> None:
    for sae, message in (
        (SAE(D, F, TopK(4, relu=False)), "as_saelens: saelens has no top k without ReLU"),
        (SAE(D, F, TopK(4), d_out=D), "as_saelens: saelens has no transcoder with the activation 'topk'"),
    ):
        with pytest.raises(ValueError, match=message):
            as_saelens(sae, RESID)
    with pytest.raises(TypeError, match=r"sae must be a fastsae\.SAE, got Linear"):
        as_saelens(torch.nn.Linear(2, 2), RESID)


def test_hook_points_of_transformerlens(lens: Any, tmp_path: Any) -> None:
    mask = torch.ones(12, 9, dtype=torch.bool)
    mask[3, 5:] = False
    points = ["blocks.0.hook_mlp_out", RESID]
    assert hook_points(lens)[RESID] == "HookPoint"
    store = harvest(lens, ids(), points, tmp_path, mask=mask, batch=4, progress=False)
    _, cache = lens.run_with_cache(ids(), attention_mask=mask.long())
    rows = store.read(0, len(store))
    for point in points:
        torch.testing.assert_close(rows[point], cache[point][mask], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_models_of_nnsight(model: Any) -> None:
    with checkout_hidden():
        nnsight = pytest.importorskip("nnsight", reason="nnsight is not installed (dictionary_learning brings it)")
    wrapped, sae = nnsight.NNsight(model), SAE(D, F, TopK(4), seed=3).eval()
    assert hook_points(wrapped) == hook_points(model)
    kwargs = {"hook": HOOK, "progress": False}
    assert evaluate(sae, wrapped, ids(), **kwargs).values == evaluate(sae, model, ids(), **kwargs).values
    with splice(model, {HOOK: sae}, error="drop"):
        expected = model(ids()).logits
    with splice(wrapped, {HOOK: sae}, error="drop"), wrapped.trace(ids()):
        out = wrapped.output.save()
    assert torch.equal(getattr(out, "value", out).logits, expected)


# ---------------------------------------------------------------- dictionaries of other libraries


def after(model: Any) -> Tensor:
    """What the layer behind the spliced one gets."""
    got: list[Tensor] = []
    handle = model.model.layers[2].register_forward_pre_hook(lambda module, args: got.append(args[0]))
    model(ids())
    handle.remove()
    return got[0]


@torch.no_grad()
@pytest.mark.parametrize("library", peers.PEERS)
@pytest.mark.parametrize("error", ["keep", "drop"])
def test_edits_of_every_library_equal_a_float64_computation(model: Any, library: str, error: Any) -> None:
    start = training.Start(torch.nn.functional.normalize(torch.randn(F, D), dim=1), torch.randn(D) * 0.1, 5)
    sae = training.build(library, peers.PEERS[library].sae, start)
    if sae is None:
        pytest.skip(f"{library} is not installed")
    clean, y = model(ids()).logits, after(model)
    with splice(model, {HOOK: sae}) as spliced:
        assert torch.equal(model(ids()).logits, clean)
    latents = spliced.latents[HOOK]
    assert latents is not None
    z = latents.to_dense().double()
    used = (z != 0).sum((0, 1)).argsort(descending=True)
    where = torch.arange(9) > 3
    edits = [Edit(used[:2]), Edit([int(used[2])], scale=3.0, where=where), Edit(used[3:5], value=0.7), Edit([int(used[5])], add=-2.0)]
    with splice(model, {HOOK: sae}, error=error, edit={HOOK: edits}):
        got = after(model)
    new = z.clone()
    new[..., used[:2]] = 0
    new[..., used[2]] = torch.where(where, 3 * z[..., used[2]], z[..., used[2]])
    new[..., used[3:5]] = 0.7
    new[..., used[5]] -= 2
    base = y.double() if error == "keep" else z @ start.W.double() + start.b_dec.double()
    torch.testing.assert_close(got.double(), base + (new - z) @ start.W.double(), rtol=0, atol=1e-5)


@torch.no_grad()
def test_edits_of_rescaled_and_normalised_saes(model: Any) -> None:
    def build(**options: Any) -> Any:
        sae = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=D, d_sae=F, k=5, **options))
        sae.W_dec.data = torch.randn_like(sae.W_dec)
        return sae

    sae, y = build(rescale_acts_by_decoder_norm=True), after(model)
    acts = sae.encode(y)
    feature = int((acts != 0).sum((0, 1)).argmax())
    with splice(model, {HOOK: sae}, error="drop", edit={HOOK: [Edit([feature])]}):
        got = after(model)
    torch.testing.assert_close(got, sae.decode(acts.index_fill(-1, torch.tensor([feature]), 0)), rtol=1e-5, atol=1e-5)
    normalised = build(normalize_activations="layer_norm")
    message = "dictionary of model.layers.1 cannot be edited: normalize_activations 'layer_norm' makes what a latent adds depend on the row"
    with (
        pytest.raises(ValueError, match=message),
        splice(model, {HOOK: normalised}, edit={HOOK: [Edit([1])]}),
    ):
        pass
