"""A dictionary's evaluation in its model beside SAELens's and SAEBench core's, on the same tokens: the numbers of all three are compared.

The model has SmolLM2-135M's widths and vocabulary and random weights; 4 layers of its 30, since what is asked is the time beyond the
model's own forward calls: ``ours`` less ``3 forwards``, beside a peer less ``3 forwards, 1 up to the layer``, the calls that each makes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsae
from bench.harness import DEVICE, name, optional, shapes
from bench.peers import Tokens
from fastsae._core.checkout import checkout_hidden
from fastsae.lm import evaluate
from fastsae.patch import as_saelens

BATCH, CONTEXT, HOOK = 8, 128, "model.layers.2"


def peers(core: Any, sae: Any, model: Any, tokens: Tensor) -> dict[str, Callable[[], Any]]:
    """``{library: what evaluates sae}``, all of their metrics that a model is needed for; ``core``: SAEBench's module, or None."""
    from sae_lens import evals
    from sae_lens.training.activation_scaler import ActivationScaler

    names = ("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics")
    asked: dict[str, Any] = {"batch_size_prompts": BATCH, **{f"compute_{name}": True for name in names}}
    asked |= {f"n_eval_{name}_batches": len(tokens) // BATCH for name in ("reconstruction", "sparsity_variance")}
    scaler, config = ActivationScaler(), evals.EvalConfig(**asked)
    found: dict[str, Callable[[], Any]] = {
        "SAELens run_evals": lambda: evals.run_evals(sae, Tokens(tokens, BATCH), model, scaler, config, exclude_special_tokens=False)  # pyright: ignore[reportArgumentType]
    }
    if core is not None:
        core.general_utils.load_and_format_sae("", sae, str(DEVICE))  # gives its configuration the names that it reads
        found["SAEBench core"] = lambda: core.run_evals(sae, Tokens(tokens, BATCH), model, core.CoreEvalConfig(**asked))
    return found


@pytest.mark.seconds(240)
@pytest.mark.parametrize("shape", shapes([(2048, 576, 24576, 32)], [(1024, 64, 512, 8)]), ids=name)
def test_evaluate(shape: tuple[int, ...], compare: Callable[..., None]) -> None:
    """Tokens, D, F, k of a TopK at the third layer; the peers take SAELens's own SAE of the same weights."""
    rows, width, features, k = shape
    with checkout_hidden():
        if optional("sae_lens", "sae-lens") is None:
            pytest.skip("sae-lens is not installed")
        from sae_lens.load_model import HookedProxyLM
        from transformers import LlamaConfig, LlamaForCausalLM

        core = optional("sae_bench.evals.core.main", "sae-bench")
    torch.manual_seed(0)
    vocabulary, heads = width * 256 // 3, width // 64
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": width * 8 // 3, "vocab_size": vocabulary, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": max(heads // 3, 1)}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    model.to(DEVICE)
    wrapped: Any = HookedProxyLM(model, None, hook_names=[HOOK])  # pyright: ignore[reportArgumentType]
    tokens = torch.randint(0, vocabulary, (rows // CONTEXT, CONTEXT), device=DEVICE)
    sae = fastsae.SAE(width, features, fastsae.TopK(k), seed=0, device=DEVICE).eval()
    others = peers(core, fastsae.restore(as_saelens(sae, HOOK, model_name="random")), wrapped, tokens)

    def ours() -> Any:
        return evaluate(sae, model, tokens, HOOK, batch=BATCH, progress=False)

    @torch.no_grad()
    def forwards(layer: bool) -> None:
        for part in tokens.split(BATCH):
            for _ in range(3):
                model(part, use_cache=False)
            if layer:
                wrapped.run_with_cache(part, names_filter=[HOOK], stop_at_layer=3)

    def verify() -> None:
        mine = ours().values
        for who, call in others.items():
            groups = call()[0]
            theirs = {metric: value for group in groups.values() for metric, value in group.items()}
            for metric, other in (("ce_spliced", "ce_loss_with_sae"), ("kl_zero", "kl_div_with_ablation"), ("l0", "l0"), ("l1", "l1")):
                assert mine[metric] == pytest.approx(theirs[other], rel=1e-4), f"{metric} of {who}"

    calls = {"3 forwards": lambda: forwards(False), "3 forwards, 1 up to the layer": lambda: forwards(True)}
    compare("evaluate", name(shape), ours, others | calls, verify, floor="3 forwards")
