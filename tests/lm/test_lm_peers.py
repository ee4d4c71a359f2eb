"""``evaluate`` against SAELens' own evaluation of the same dictionary, model, tokens and mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peers import load

from fastsae.lm import evaluate

sae_lens = load("sae_lens", "sae-lens")

from sae_lens.evals import get_downstream_reconstruction_metrics, get_sparsity_and_variance_metrics  # noqa: E402
from sae_lens.load_model import HookedProxyLM  # noqa: E402
from sae_lens.saes.sae import SAEMetadata  # noqa: E402
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig  # noqa: E402
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig  # noqa: E402
from sae_lens.training.activation_scaler import ActivationScaler  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

D, F, VOCAB, HOOK = 16, 64, 50, "model.layers.1"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


class Tokens:
    """What an activation store is asked for."""

    def __init__(self, tokens: torch.Tensor, batch: int):
        self.parts = iter(tokens.split(batch))

    def get_batch_tokens(self, batch: int) -> torch.Tensor:
        return next(self.parts)


@pytest.mark.parametrize("kind", ["topk", "standard"])
@pytest.mark.parametrize("ignore", [(), (7, 8)])
def test_evaluation_is_that_of_saelens(kind: str, ignore: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=D, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    model = LlamaForCausalLM(config).eval()
    more: dict[str, Any] = {"d_in": D, "d_sae": F, "metadata": SAEMetadata(hook_name=HOOK)}
    sae: Any = TopKSAE(TopKSAEConfig(k=5, **more)) if kind == "topk" else StandardSAE(StandardSAEConfig(**more))
    for p in sae.parameters():
        p.data = torch.randn_like(p) * (0.1 if p.dim() == 1 else 0.4)
    tokens = torch.randint(0, VOCAB, (12, 9))
    wrapped = HookedProxyLM(model, None)  # pyright: ignore[reportArgumentType]
    given = {"n_batches": 3, "eval_batch_size_prompts": 4, "ignore_tokens": list(ignore)}
    theirs: dict[str, float] = get_downstream_reconstruction_metrics(
        sae, wrapped, Tokens(tokens, 4), ActivationScaler(), True, True, **given  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    switches = ("l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics")
    numbers, features = get_sparsity_and_variance_metrics(
        sae, wrapped, Tokens(tokens, 4), ActivationScaler(), model_kwargs={}, **given, **{f"compute_{name}": True for name in switches}  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    theirs |= numbers
    found = evaluate(sae, model, tokens, HOOK, ignore=ignore, batch=4, progress=False)
    names = {"ce_clean": "ce_loss_without_sae", "ce_spliced": "ce_loss_with_sae", "ce_zero": "ce_loss_with_ablation"}
    names |= {"kl_spliced": "kl_div_with_sae", "kl_zero": "kl_div_with_ablation", "kl_recovered": "kl_div_score"}
    names |= {"l0": "l0", "l1": "l1", "mse": "mse", "explained_variance": "explained_variance", "cosine": "cossim", "l2_ratio": "l2_ratio"}
    for ours, name in names.items():
        assert found.values[ours] == pytest.approx(theirs[name], rel=2e-5), ours
    lost = theirs["ce_loss_with_ablation"] - theirs["ce_loss_without_sae"]  # of means that they round to float32
    assert found.values["ce_recovered"] == pytest.approx(theirs["ce_loss_score"], abs=2**-22 * theirs["ce_loss_with_ablation"] / abs(lost))
    assert found.density.tolist() == pytest.approx(features["feature_density"], rel=1e-6)
    expected = torch.tensor(features["consistent_activation_heuristic"])
    torch.testing.assert_close((found.fired / found.sequences).float(), expected, equal_nan=True)
    whole = evaluate(sae, model, tokens, HOOK, ignore=ignore, batch=12, ablations=("zero", "mean"), progress=False)
    for name, value in found.values.items():
        assert whole.values[name] == pytest.approx(value, rel=2e-5), f"{name} does not depend on batches"
    assert found.errors["ce_spliced"] > 0 and "ce_recovered_mean" in whole.values
