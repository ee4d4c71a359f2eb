"""Activations of a model's modules on disk, and dictionaries spliced into it: against the model run plainly and a float64 computation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsae
from fastsae import SAE, BatchTopK, JumpReLU, ReLU, TopK
from fastsae.lm import Edit, Evaluation, evaluate, harvest, harvesting, hook_points, splice, token_windows
from fastsae.store import ActivationShards

VOCAB, D, CONTEXT = 50, 16, 7


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(D, 32), nn.GELU(), nn.Linear(32, D))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x + self.drop(self.mlp(x)), "cache"


class Toy(nn.Module):
    """A residual stream without attention, whose blocks return tuples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks, self.head = nn.Embedding(VOCAB, D), nn.ModuleList([Block() for _ in range(3)]), nn.Linear(D, VOCAB)
        self.calls = 0

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x, _ = block(x)
        self.calls += 1
        return self.head(x)


@pytest.fixture
def model() -> Toy:
    return Toy().eval()


def ids(n: int = 11, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (n, CONTEXT), generator=torch.Generator().manual_seed(seed))


def hidden(model: Toy, tokens: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        first = model.blocks[0](model.embed(tokens))[0]
        return {"blocks.0": first, "blocks.1.mlp:input": first, "blocks.1.mlp": model.blocks[1].mlp(first)}


def start(kind: Any = None, **options: Any) -> SAE:
    return SAE(D, 40, kind or TopK(4), seed=3, **options).eval()


# ---------------------------------------------------------------- harvest


def test_rows_are_the_models_own(model: Toy, tmp_path: Path) -> None:
    tokens, mask = ids(), torch.ones(11, CONTEXT, dtype=torch.bool)
    mask[3, 4:] = False
    model.train()
    store = harvest(
        model, tokens, ["blocks.0", "blocks.1.mlp:input", "blocks.1.mlp"], tmp_path, mask=mask, ignore=[5], batch=4, progress=False
    )
    assert model.training and all(module.training for module in model.modules())
    assert model.calls == 0, "no forward call went on behind the last hook"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.eval()
    keep, rows = mask & (tokens != 5), store.read(0, len(store))
    for name, expected in hidden(model, tokens).items():
        assert torch.equal(rows[name], expected[keep]), name
    assert torch.equal(rows["token"].long(), tokens[keep])
    assert torch.equal(torch.stack([rows["sequence"], rows["position"]], 1).long(), keep.nonzero())
    assert store.about["model"] == "Toy" and store.about["hooks"] == list(hidden(model, tokens))


def test_a_stopped_run_goes_on_with_the_same_rows(model: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = ids(30)
    whole = harvest(model, tokens, "blocks.0", tmp_path / "whole", batch=4, rows_a_shard=13, ignore=[7], progress=False)
    done = 0

    def stops(*args: Any) -> Any:
        nonlocal done
        done += 1
        if done > 4:
            raise KeyboardInterrupt
        return run(*args)

    run = harvesting._run
    with monkeypatch.context() as patched:
        patched.setattr(harvesting, "_run", stops)
        with pytest.raises(KeyboardInterrupt):
            harvest(model, tokens, "blocks.0", tmp_path / "half", batch=4, rows_a_shard=13, ignore=[7], progress=False)
    assert 0 < len(ActivationShards(tmp_path / "half")) < len(whole)
    again = harvest(model, tokens, "blocks.0", tmp_path / "half", batch=4, rows_a_shard=13, ignore=[7], progress=False)
    for name, column in whole.read(0, len(whole)).items():
        assert torch.equal(column, again.read(0, len(again))[name]), name
    with pytest.raises(ValueError, match="is about"):
        harvest(model, ids(30, seed=2), "blocks.0", tmp_path / "half", batch=4, rows_a_shard=13, ignore=[7], progress=False)


def test_ranks_share_a_folder(model: Toy, tmp_path: Path) -> None:
    tokens = ids(10)
    for rank in (2, 0, 1):
        store = harvest(model, tokens, "blocks.0", tmp_path, rank=rank, ranks=3, dtype=torch.bfloat16, progress=False)
    assert torch.equal(store.read(0, 70)["blocks.0"], hidden(model, tokens)["blocks.0"].flatten(0, 1).bfloat16())


def test_what_cannot_be_harvested_is_named(model: Toy, tmp_path: Path) -> None:
    assert hook_points(model)["blocks.1.mlp"] == "Sequential"
    for hooks, message in (
        ("blocks.9.mlp", r"hook 'blocks.9.mlp' must be the name of a module, or name:input; there are blocks.0.mlp, blocks.1.mlp"),
        ("blocks.0:gradient", "must be the name of a module"),
        ([], "hooks must name at least one module"),
        ("blocks", r"the model did not call blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            harvest(model, ids(2), hooks, tmp_path / "none", progress=False)
    for tokens in (ids(0), ids(2)):
        with pytest.raises(ValueError, match=r"no position counts: mask and ignore leave nothing of \[\d, 7\]"):
            harvest(model, tokens, "blocks.0", tmp_path / "none", ignore=range(VOCAB), progress=False)
    with pytest.raises(TypeError, match="tokens must have dtype"):
        harvest(model, ids(2).float(), "blocks.0", tmp_path / "none", progress=False)


# ---------------------------------------------------------------- splice


@torch.no_grad()
def test_kept_error_and_no_edit_changes_no_bit(model: Toy) -> None:
    clean = model(ids())
    with splice(model, {"blocks.1": start()}) as spliced:
        assert torch.equal(model(ids()), clean)
    assert isinstance(spliced.latents["blocks.1"], fastsae.TopKLatents)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match="mine"), splice(model, {"blocks.1": start()}):
        raise RuntimeError("mine")
    assert torch.equal(model(ids()), clean) and not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_dropped_error_is_the_reconstruction(model: Toy) -> None:
    sae, resid = start(), start(ReLU())
    with splice(model, {"blocks.1": sae, "blocks.2.mlp:input": resid}, error="drop"):
        got = model(ids())
    x = sae(hidden_after(model, 1)).x_hat
    x = x + model.blocks[2].mlp(resid(x).x_hat)
    assert torch.equal(got, model.head(x))


def hidden_after(model: Toy, block: int) -> Tensor:
    x = model.embed(ids())
    for number in range(block + 1):
        x = model.blocks[number](x)[0]
    return x


@torch.no_grad()
def test_a_transcoder_stands_for_its_module(model: Toy) -> None:
    transcoder = start(d_out=D, skip=True)
    with splice(model, {"blocks.1.mlp": transcoder}, error="drop"):
        got = model(ids())
    x = hidden_after(model, 0)
    x = model.blocks[2](x + transcoder(x).x_hat)[0]
    assert torch.equal(got, model.head(x))


@torch.no_grad()
@pytest.mark.parametrize("kind", [TopK(4), BatchTopK(4.0), JumpReLU(0.05), ReLU()], ids=lambda kind: type(kind).__name__)
@pytest.mark.parametrize("error", ["keep", "drop"])
def test_edits_equal_a_float64_computation(model: Toy, kind: Any, error: Any) -> None:
    sae = start(kind)
    where = torch.zeros(11, CONTEXT, dtype=torch.bool)
    where[:, 2:4] = True
    latents = sae.encode(hidden_after(model, 1)).to_dense()
    used = (latents != 0).sum((0, 1)).argsort(descending=True)
    edits = [
        Edit(used[:3]),
        Edit([int(used[3])], scale=3.0, where=where),
        Edit(used[4:6], value=0.7),
        Edit([int(used[0])], add=-2.0, where=where),
    ]
    with splice(model, {"blocks.1": sae}, error=error, edit={"blocks.1": edits}):
        got = {}
        model.blocks[2].register_forward_pre_hook(lambda module, args: got.update(x=args[0]))
        model(ids())
    z = latents.double()
    new = z.clone()
    new[..., used[:3]] = 0
    new[..., used[3]] = torch.where(where, 3 * z[..., used[3]], z[..., used[3]])
    new[..., used[4:6]] = 0.7
    new[..., used[0]] = torch.where(where, new[..., used[0]] - 2, new[..., used[0]])
    y = hidden_after(model, 1).double() if error == "keep" else z @ sae.W_dec.double() + sae.b_dec.double()
    torch.testing.assert_close(got["x"].double(), y + (new - z) @ sae.W_dec.double(), rtol=0, atol=1e-5)


@torch.no_grad()
def test_odd_edits(model: Toy) -> None:
    sae, clean = start(), model(ids())
    with splice(model, {"blocks.1": sae}, edit={"blocks.1": [Edit([]), Edit(torch.empty(0, dtype=torch.int64), add=3.0)]}):
        assert torch.equal(model(ids()), clean), "nothing is edited"
    twice = [[Edit([7, 7], add=1.0)], [Edit([7], add=1.0)]]
    outs: list[Tensor] = []
    for edits in twice:
        with splice(model, {"blocks.1": sae}, edit={"blocks.1": edits}):
            outs.append(model(ids()))
    assert torch.equal(*outs), "a feature that is named twice is edited once"
    misfit = Edit([7], where=torch.ones(2, 2, dtype=torch.bool))
    with (
        splice(model, {"blocks.1": sae}, edit={"blocks.1": [misfit]}),
        pytest.raises(ValueError, match=r"where must have the hidden states' batch shape \[11, 7\], got \[2, 2\]"),
    ):
        model(ids())


@torch.no_grad()
def test_rows_without_an_edited_latent_keep_their_bits(model: Toy) -> None:
    sae, got = start(), {}
    model.blocks[2].register_forward_pre_hook(lambda module, args: got.update(x=args[0]))
    latents = sae.encode(hidden_after(model, 1)).to_dense()
    feature = int((latents != 0).sum((0, 1)).argmax())
    with splice(model, {"blocks.1": sae}, edit={"blocks.1": [Edit([feature])]}):
        model(ids())
    untouched = latents[..., feature] == 0
    assert 0 < int(untouched.sum()) < untouched.numel()
    assert torch.equal(got["x"][untouched], hidden_after(model, 1)[untouched])
    assert not torch.equal(got["x"][~untouched], hidden_after(model, 1)[~untouched])


def test_gradients(model: Toy) -> None:
    sae, clean = start(), torch.autograd.grad(model(ids()).square().sum(), model.embed.weight)[0]
    with splice(model, {"blocks.1": sae}):
        out = model(ids())
    spliced, to_sae = torch.autograd.grad(out.square().sum(), (model.embed.weight, sae.W_dec))
    assert torch.equal(spliced, clean), "the model's own gradient is that of the clean model"
    with splice(model, {"blocks.1": sae}, error="drop"):
        dropped = model(ids())
    assert float(to_sae.norm()) > 0 and float(torch.autograd.grad(dropped.sum(), sae.W_enc)[0].norm()) > 0


def test_wrong_splices(model: Toy) -> None:
    for call, error, message in (
        (lambda: splice(model, {"none": start()}), ValueError, "hook 'none'"),
        (lambda: splice(model, {"blocks.1": start()}, error="none"), ValueError, "error must be 'keep' or 'drop'"),  # pyright: ignore[reportArgumentType]
        (lambda: splice(model, {"blocks.1": start()}, edit={"x": []}), ValueError, "edit names 'x'"),
        (lambda: splice(model, {"blocks.1": start()}, edit={"blocks.1": [Edit([40])]}), ValueError, r"must be in 0 .. 39, got 40 to 40"),
        (lambda: splice(model, {"blocks.1": start()}, edit={"blocks.1": [Edit([1], scale=1, value=2)]}), ValueError, "scale or value"),
        (
            lambda: splice(model, {"blocks.1": object()}),
            TypeError,
            "dictionary of blocks.1 must be a fastsae.SAE or of a supported library",
        ),
    ):
        with pytest.raises(error, match=message), call():
            model(ids())


@pytest.mark.slow
@torch.no_grad()
def test_a_causal_language_model_of_transformers(tmp_path: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from fastsae._core.checkout import checkout_hidden

    with checkout_hidden():
        transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [demo])")
        config = transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=D, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1
        )
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
    tokens, mask = ids(6), torch.ones(6, CONTEXT, dtype=torch.bool)
    mask[2, 5:] = False
    store = harvest(model, tokens, ["model.layers.1", "model.layers.1.mlp"], tmp_path, mask=mask, batch=2, progress=False)
    expected = model(input_ids=tokens, attention_mask=mask.long(), output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(store.read(0, len(store))["model.layers.1"], expected[mask], rtol=1e-5, atol=1e-5)
    prompt, feature = tokens[:1, :4], 3
    plain = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    sae = start()
    with splice(model, {"model.layers.1": sae}):
        assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0), plain)
    with splice(model, {"model.layers.1": sae}, edit={"model.layers.1": [Edit([feature], add=50.0)]}):
        steered = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
        again = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False)
    assert not torch.equal(steered, plain) and torch.equal(steered, again)


# ---------------------------------------------------------------- evaluate


@torch.no_grad()
@pytest.mark.parametrize("kind", [TopK(4), JumpReLU(0.05)], ids=["topk", "jumprelu"])
def test_evaluation_equals_a_dense_float64_computation(model: Toy, kind: Any, tmp_path: Path) -> None:
    sae, tokens = start(kind), ids(20)
    mask = torch.ones(20, CONTEXT, dtype=torch.bool)
    mask[4, 3:] = False
    found = evaluate(sae, model, tokens, "blocks.1", mask=mask, ignore=[5], ablations=("zero", "mean"), batch=6, progress=False)
    keep = mask & (tokens != 5)
    x = model.blocks[1](model.blocks[0](model.embed(tokens))[0])[0]
    x_hat, z = sae(x).x_hat, sae.encode(x).to_dense()
    rows, made = x[keep].double(), x_hat[keep].double()
    value, variance = found.values, (rows - rows.mean(0)).square().sum()
    assert value["fvu"] == pytest.approx(float((rows - made).square().sum() / variance), rel=1e-5)
    assert value["l0"] == pytest.approx(float((z[keep] != 0).sum(1).double().mean()))
    assert torch.equal(found.fired, (z[keep] != 0).sum(0)) and value["dead"] == int((found.fired == 0).sum())
    means = {"spliced": torch.where(keep[..., None], x_hat, x), "zero": torch.zeros_like(x), "mean": rows.mean(0).float().expand_as(x)}
    for name, hidden in means.items():
        logits = model.head(model.blocks[2](hidden)[0]).double()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(20, -1)
        assert value[f"ce_{name}"] == pytest.approx(float(loss[keep[:, :-1]].mean()), rel=1e-5)
        clean = model(tokens).double().log_softmax(-1)
        divergence = (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1)
        assert value[f"kl_{name}"] == pytest.approx(float(divergence[keep].mean()), rel=1e-4)
    resampled: list[float] = []
    for seed in range(60):
        pick = torch.randint(0, 20, (20,), generator=torch.Generator().manual_seed(seed))
        resampled.append(float(((x - x_hat).square().sum(-1) * keep)[pick].sum() / keep[pick].sum()))
    assert found.errors["mse"] == pytest.approx(float(torch.tensor(resampled).std()), rel=0.4)
    edges, counts = found.histogram(10)
    assert int(counts.sum()) == 40 - value["dead"] and len(edges) == 11
    assert "ce_recovered" in str(found) and '"fvu"' in found.to_json()
    found.plot(tmp_path / "density.png")


def test_calls_of_an_evaluation(model: Toy) -> None:
    evaluate(start(), model, ids(12), "blocks.1", batch=4, progress=False)
    assert model.calls == 3 * 3, "clean, spliced and ablated"
    transcoder = evaluate(start(d_out=D), model, ids(12), "blocks.1.mlp", batch=4, progress=False)
    assert transcoder.values["fvu"] > 0
    with pytest.raises(ValueError, match="no position counts"):
        evaluate(start(), model, ids(2), "blocks.1", ignore=range(VOCAB), progress=False)
    with pytest.raises(ValueError, match="ablations must be of zero and mean, got 'noise'"):
        evaluate(start(), model, ids(2), "blocks.1", ablations=["noise"], progress=False)


def test_an_evaluation_reports_and_ends_on_the_way(model: Toy) -> None:
    def same(one: Evaluation, other: Evaluation) -> bool:
        return one.as_dict() == other.as_dict() and torch.equal(one.fired, other.fired)

    seen: list[Evaluation] = []
    whole = evaluate(start(), model, ids(12), "blocks.1", batch=4, progress=False, callback=seen.append)
    half = evaluate(start(), model, ids(12), "blocks.1", batch=4, progress=False, callback=lambda found: found.tokens > 4 * CONTEXT)
    assert [found.tokens for found in seen] == [28, 56, 84] and same(seen[2], whole) and same(half, seen[1])
    assert same(half, evaluate(start(), model, ids(12)[:8], "blocks.1", batch=4, progress=False)), "that of the tokens so far"


def test_windows_of_texts() -> None:
    class Letters:
        bos_token_id, eos_token_id = 1, 2

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

    texts = ["abcde", "", "fghijkl"]
    expected = [[1, *b"abc"], [1, *b"de", 2], [1, 2, *b"fg"], [1, *b"hij"], [1, *b"kl", 2]]
    assert token_windows(texts, 4, Letters()).tolist() == expected
    assert token_windows(texts, 4, Letters(), most=2).tolist() == expected[:2]
    assert token_windows([[5, 6, 7], range(3)], 2).tolist() == [[5, 6], [7, 0], [1, 2]]
    with pytest.raises(TypeError, match="texts must be ids where no tokenizer is given"):
        token_windows(texts, 4)
    with pytest.raises(ValueError, match="must fill at least one window of 50 tokens, got 15 tokens"):
        token_windows(texts, 50, Letters())
