"""Training goes on from what a loaded file computes; writers; the Hub."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrained_files import (
    B_DEC,
    B_ENC,
    BARE,
    COOK,
    LENS,
    LINEAR,
    NORMS,
    OURS,
    THRESHOLD,
    W_DEC,
    W_ENC,
    D,
    F,
    K,
    X,
    agrees,
    dl,
    draw,
    ours,
    own,
    saelens,
    topk,
    without_entry,
    write,
)
from torch import Tensor

from fastsae import SAE, BatchTopK, Gated, JumpReLU, ReLU, SAEs, TopK, optim
from fastsae.sae import JumpLoss
from fastsae.trainer import Trainer

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


# ---------------------------------------------------------------- training goes on from what the file computes

UNIT = W_DEC / NORMS[:, None]
GATES = {"b_gate": draw(F, seed=3), "r_mag": draw(F, seed=4) / 4, "b_mag": draw(F, seed=5)}
CODER = {"d_in": D, "num_latents": F, "k": K}


def loaded(name: str, folder: Path, W: Tensor) -> SAE:
    """A file of each format and architecture whose decoder is ``W``."""
    dtype = {"dtype": str(W.dtype).removeprefix("torch.")}
    lens, bare, cook = {**LENS, "W_dec": W}, {**BARE, "W_dec": W}, {**COOK, "W_dec": W}
    linear = {**LINEAR, "decoder.weight": W.T}
    gated = {name: lens[name] for name in ("W_enc", "W_dec", "b_dec")} | GATES
    batch = {"b_dec": B_DEC, "k": torch.tensor(K), "threshold": torch.tensor(0.3)}
    dl_gated = {"encoder.weight": W_ENC, "decoder.weight": W.T, "decoder_bias": B_DEC, "gate_bias": GATES["b_gate"]}
    dl_gated |= {"r_mag": GATES["r_mag"], "mag_bias": GATES["b_mag"]}
    jump, held = {"threshold": THRESHOLD}, torch.tensor(0.3, dtype=torch.float64)
    small = {"w_" + name[2:] if name.startswith("W_") else name: tensor for name, tensor in bare.items()}
    good = {name.replace(".", "_linear."): tensor for name, tensor in {**linear, "decoder.bias": B_DEC}.items()}
    llama = {"W_E": W_ENC.T, "b_E": B_ENC, "W_D": W, "b_D": B_DEC}
    made: dict[str, Callable[[], Path]] = {
        "saelens standard": lambda: saelens(folder, {"architecture": "standard", **dtype}, lens),
        "saelens old, normalised": lambda: saelens(folder, {"activation_fn": "relu", "normalize_sae_decoder": True, **dtype}, lens),
        "saelens topk": lambda: saelens(folder, {"architecture": "topk", "k": K, **dtype}, lens),
        "saelens topk by norms": lambda: saelens(
            folder, {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True, **dtype}, lens
        ),
        "saelens jumprelu": lambda: saelens(folder, {"architecture": "jumprelu", **dtype}, {**lens, **jump}),
        "saelens gated": lambda: saelens(folder, {"architecture": "gated", **dtype}, gated),
        "saelens transcoder": lambda: saelens(folder, {"architecture": "transcoder", "apply_b_dec_to_input": False, **dtype}, lens),
        "saelens abstopk": lambda: saelens(folder, {"architecture": "abstopk", "k": K, **dtype}, lens),
        "saelens batchtopk": lambda: saelens(
            folder, {"architecture": "batchtopk", "k": K, "rescale_acts_by_decoder_norm": False, **dtype}, {**lens, "topk_threshold": held}
        ),
        "saelens layer norm": lambda: saelens(folder, {"architecture": "standard", "normalize_activations": "layer_norm", **dtype}, lens),
        "saelens by norm": lambda: saelens(
            folder, {"architecture": "topk", "k": K, "normalize_activations": "constant_norm_rescale", **dtype}, lens
        ),
        "saelens skip transcoder": lambda: saelens(
            folder, {"architecture": "jumprelu_skip_transcoder", "apply_b_dec_to_input": False, **dtype}, {**lens, **jump, "W_skip": W[:D]}
        ),
        "sparsify": lambda: write(folder, CODER, cook, "sae.safetensors"),
        "sparsify, not normalised": lambda: write(folder, {**CODER, "normalize_decoder": False}, cook, "sae.safetensors"),
        "sparsify transcoder": lambda: write(folder, {**CODER, "transcode": True}, cook, "sae.safetensors"),
        "dl AutoEncoder": lambda: dl(folder, "AutoEncoder", {**linear, "bias": B_DEC}),
        "dl AutoEncoderNew": lambda: dl(folder, "AutoEncoderNew", {**linear, "decoder.bias": B_DEC}),
        "dl GatedAutoEncoder": lambda: dl(folder, "GatedAutoEncoder", dl_gated),
        "dl JumpReluAutoEncoder": lambda: dl(folder, "JumpReluAutoEncoder", {**bare, **jump}),
        "dl AutoEncoderTopK": lambda: dl(folder, "AutoEncoderTopK", {**linear, "b_dec": B_DEC}, k=K),
        "dl BatchTopKSAE": lambda: dl(folder, "BatchTopKSAE", {**linear, **batch}, k=K),
        "dl MatryoshkaBatchTopKSAE": lambda: dl(
            folder, "MatryoshkaBatchTopKSAE", {**bare, **batch, "group_sizes": torch.tensor([8, F - 8])}
        ),
        "gemma_scope": lambda: write(folder, None, {**bare, **jump}, "params.npz"),
        "gemma_scope_2": lambda: write(folder, None, {**small, **jump, "affine_skip_connection": W[:D]}, "params.safetensors"),
        "llama_scope": lambda: write(
            folder, {"top_k": K, "act_fn": "topk", "norm_activation": "inference"}, llama, "sae_weights.safetensors", "config.json"
        ),
        "circuit_tracer": lambda: write(folder, None, {**lens, "W_enc": W_ENC}, "layer_0.safetensors") / "layer_0.safetensors",
        "openai": lambda: of_openai(folder, linear, "ReLU"),
        "openai topk": lambda: of_openai(folder, linear, "TopK"),
        "goodfire": lambda: write(folder, None, good, "a.pt") / "a.pt",
        "qwen_scope": lambda: write(folder, None, {**lens, "W_enc": W_ENC, "W_dec": W.T}, "a.sae.pt") / "a.sae.pt",
        "deepseek_r1": lambda: write(folder, None, {**linear, "decoder.bias": B_DEC}, "a.pt") / "a.pt",
        "fastsae": lambda: own(folder, W, TopK(K)),
        "fastsae gated, tied": lambda: own(folder, W, Gated(), tied=True),
        "fastsae skip transcoder": lambda: own(folder, W, JumpReLU(0.1), d_out=D, skip=True),
        "fastsae jump": lambda: own(folder, W, JumpReLU(0.1, 0.3), l0=0.1, jump=JumpLoss(4.0, pre_acts=0.1, to_scores=True)),
    }
    options: dict[str, Any] = {"format": name} if name == "deepseek_r1" else {"k": K} if name == "qwen_scope" else {}
    return SAE.from_pretrained(made[name](), dtype=W.dtype, **options)


def of_openai(folder: Path, linear: dict[str, Tensor], activation: str) -> Path:
    state: dict[str, Any] = {"encoder.weight": W_ENC, "latent_bias": B_ENC, "decoder.weight": linear["decoder.weight"], "pre_bias": B_DEC}
    folder.mkdir(parents=True)
    torch.save({**state, "activation": activation, "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}, folder / "1.pt")
    return folder / "1.pt"


# Whose trainers keep the rows at norm 1.
RULES = {"saelens old, normalised", "sparsify", "gemma_scope", "gemma_scope_2", "openai", "openai topk"}
RULES |= {"fastsae", "fastsae gated, tied", "fastsae jump"}
RULES |= {f"dl {name}" for name in ("AutoEncoder", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE")}
RULES |= {"dl MatryoshkaBatchTopKSAE"}
EVERY = ["saelens standard", "saelens old, normalised", "saelens topk", "saelens topk by norms", "saelens jumprelu", "saelens gated"]
EVERY += ["saelens transcoder", "sparsify", "sparsify, not normalised", "sparsify transcoder", "dl AutoEncoder", "dl AutoEncoderNew"]
EVERY += ["dl GatedAutoEncoder", "dl JumpReluAutoEncoder", "dl AutoEncoderTopK", "dl BatchTopKSAE", "dl MatryoshkaBatchTopKSAE"]
EVERY += ["gemma_scope", "fastsae", "fastsae gated, tied", "fastsae skip transcoder", "fastsae jump", "saelens abstopk"]
EVERY += ["saelens batchtopk", "saelens layer norm", "saelens by norm", "saelens skip transcoder", "gemma_scope_2", "llama_scope"]
EVERY += ["circuit_tracer", "openai", "openai topk", "goodfire", "qwen_scope", "deepseek_r1"]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("unit", [True, False])
def test_a_step_of_rate_0_changes_nothing(tmp_path: Path, name: str, unit: bool) -> None:
    """Fused Adam and torch's through the Trainer; unit rows of either precision, others, some a little off, some zero."""
    near = UNIT * torch.linspace(1 - 1e-4, 1 + 1e-4, F)[:, None]
    zero = torch.cat([torch.zeros(1, D), UNIT[1:]])
    half = [UNIT.to(torch.bfloat16)] if name != "gemma_scope" else []  # NumPy has none
    for number, W in enumerate([UNIT, zero, *half] if unit else [W_DEC, near, W_DEC * 1e-3]):
        for fused in (True, False):
            if fused and W.dtype is torch.bfloat16:  # which the fused optimisers do not take
                continue
            sae = loaded(name, tmp_path / f"{number}{fused}", W)
            folded = name in ("dl AutoEncoder", "saelens topk by norms")
            assert sae.normalise_decoder is (name in RULES and (unit or folded)), (number, "a rule, where the rows are so")
            x = X.to(W.dtype)
            target = x if sae.transcoder else None
            mode = sae.train if isinstance(sae.activation, BatchTopK) else sae.eval  # its threshold is to move
            before = mode()(x, target)
            if fused:
                optim.Adam(sae.train(), lr=0.0).step(x, target=target)
            else:
                opt = torch.optim.Adam(sae.parameters(), lr=0.0)
                Trainer(sae, opt, progress=False).fit([(x, target)], 1)
            after = mode()(x, target)
            tight = {"rtol": 1e-5, "atol": 2e-5} if W.dtype is torch.float32 else {"rtol": 0.05, "atol": 0.1}
            torch.testing.assert_close(after.x_hat, before.x_hat, **tight)
            torch.testing.assert_close(after.squared_error.sum(), before.squared_error.sum(), **tight)


def test_a_stack_of_which_some_have_unit_rows(tmp_path: Path) -> None:
    saes = SAEs([SAE(D, F, TopK(K), seed=seed) for seed in range(2)])
    with torch.no_grad():
        saes[1].W_dec.mul_(2)
    assert not SAEs.load(saes.save(tmp_path)).unit_rows


@pytest.mark.parametrize("kind", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_a_batch_topk_without_threshold_keeps_k_a_row(tmp_path: Path, kind: str) -> None:
    tensors = {**LINEAR, "b_dec": B_DEC} if kind == "BatchTopKSAE" else {**BARE, "group_sizes": torch.tensor([8, F - 8])}
    f = topk((X - B_DEC) @ W_ENC.T + B_ENC)
    agrees(SAE.from_pretrained(dl(tmp_path / "a", kind, tensors, k=K)), f, f @ W_DEC + B_DEC)
    agrees(SAE.from_pretrained(dl(tmp_path / "b", kind, {**tensors, "k": torch.tensor(K)})), f, f @ W_DEC + B_DEC)
    with pytest.raises(ValueError, match="k must be an int of at least 1, got None"):
        SAE.from_pretrained(dl(tmp_path / "c", kind, tensors))
    folder = without_entry(SAE(D, F, BatchTopK(K)).save(tmp_path / "own"))
    tensors = safetensors.load_file(folder / "sae.safetensors")
    tensors.pop("running_threshold")
    safetensors.save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "sae.safetensors")
    with pytest.raises(ValueError, match="running_threshold is missing"):
        SAE.load(folder)


# ---------------------------------------------------------------- writers

REFUSED = {
    "saelens": {"signed topk", "transcoder", "skip transcoder", "pre-bias and skip"},
    "sparsify": set(OURS) - {"topk", "topk, bare input", "tied", "transcoder", "skip transcoder", "pre-bias and skip"},
    "dictionary_learning": {
        "signed topk",
        "abstopk",
        "batchtopk 2.5",
        "skip transcoder",
        "relu transcoder",
        "jumprelu transcoder",
        "pre-bias and skip",
    },
    "fastsae": set(),
}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("format", REFUSED)
def test_what_is_written_reads_back_the_same(tmp_path: Path, format: str, name: str) -> None:  # noqa: A002
    sae = ours(name)
    folder = tmp_path / "new" / "folder"
    if name in REFUSED[format]:
        with pytest.raises(ValueError, match=rf"^SAE.save_pretrained: {format} (has|needs)"):
            sae.save_pretrained(folder, format=format)  # pyright: ignore[reportArgumentType]
        assert not folder.exists()
        return
    assert sae.save_pretrained(folder, format=format) == folder  # pyright: ignore[reportArgumentType]
    back = SAE.from_pretrained(folder, fold_decoder_norm=False)
    run, expected = back(X), sae(X)
    torch.testing.assert_close(run.latents.to_dense(), expected.latents.to_dense(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run.x_hat, expected.x_hat, rtol=1e-5, atol=1e-5)
    if format == "fastsae":
        assert back.config() == {**sae.config(), "normalize_decoder": False}  # rows that are not of norm 1
    half = sae.to(torch.bfloat16).save_pretrained(folder, format=format)  # pyright: ignore[reportArgumentType]
    assert SAE.from_pretrained(half).W_dec.dtype is torch.bfloat16


def test_scaled_inputs_are_folded_and_metadata_is_written(tmp_path: Path) -> None:
    sae = SAE(D, F, TopK(K), seed=0).init_from(X * 3, norm="rms").eval()
    expected = sae(X).x_hat
    for format in ("saelens", "sparsify", "dictionary_learning"):  # noqa: A001
        folder = sae.save_pretrained(tmp_path / format, format=format, metadata={"hook_name": "blocks.3"})  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(SAE.from_pretrained(folder)(X).x_hat, expected)
        assert "blocks.3" in "".join(path.read_text() for path in folder.glob("*.json"))
    with pytest.raises(ValueError, match="metadata does not go with"):
        sae.save_pretrained(tmp_path, metadata={"a": 1})
    with pytest.raises(TypeError, match="metadata must be a mapping, got list"):
        sae.save_pretrained(tmp_path, format="saelens", metadata=[1])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"^SAE.save_pretrained: metadata must hold JSON values: .* object"):
        sae.save_pretrained(tmp_path / "half", format="saelens", metadata={"a": object()})
    assert not (tmp_path / "half").exists()
    with pytest.raises(ValueError, match="format must be one of"):
        sae.save_pretrained(tmp_path, format="gemma_scope")  # pyright: ignore[reportArgumentType]


def test_a_loaded_module_trains(tmp_path: Path) -> None:
    sae = SAE.from_pretrained(saelens(tmp_path, {"architecture": "topk", "k": K}, LENS)).train()
    before = (tmp_path / "sae_weights.safetensors").read_bytes()
    sae.loss(X).loss.backward()
    torch.optim.SGD(sae.parameters(), lr=0.1).step()
    assert (tmp_path / "sae_weights.safetensors").read_bytes() == before
    assert sae.W_enc.is_contiguous()
    assert int(sae.silent.max()) == X.shape[0]


def test_pre_bias_is_an_option_of_its_own() -> None:
    sae = ours("relu, bare input")
    f = (X @ sae.W_enc.T + sae.b_enc).relu()
    agrees(sae, f, f @ sae.W_dec + sae.b_dec)
    assert "pre_bias=False" in repr(sae)
    sae.train()
    sae.loss(X).loss.backward()
    _, gradients = sae.step_gradients(X)
    for name, parameter in sae.named_parameters():
        gradient = gradients[name]
        dense = gradient if isinstance(gradient, Tensor) else gradient.compute(slice(0, F))  # pyright: ignore[reportAttributeAccessIssue]
        torch.testing.assert_close(dense, parameter.grad, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="pre_bias needs d_out = d_in = 6, got d_out=5"):
        SAE(D, F, ReLU(), d_out=5, pre_bias=True)
    with pytest.raises(TypeError, match="pre_bias must be a bool"):
        SAE(D, F, ReLU(), pre_bias=1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="two scales"):
        ours("pre-bias and skip").init_from(X, X, norm="rms")


# ---------------------------------------------------------------- the Hub


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "repo", {"d_in": D, "num_latents": F, "k": K}, COOK, "sae.safetensors")
    write(root / "layers.5", {"d_in": D, "num_latents": F, "k": K + 1}, COOK, "sae.safetensors")
    asked: list[Any] = []

    def snapshot_download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, allow_patterns))
        return str(root)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert SAE.from_pretrained("owner/sae-name").k == K
    assert SAE.from_pretrained("owner/sae.name", subfolder="layers.5", revision="v2", format="sparsify").k == K + 1
    weights = ["ae.pt", "checkpoints/final.safetensors", "params.npz", "params.safetensors", "sae.safetensors", "sae_weights.safetensors"]
    configurations = ["activation_scaler.json", "cfg.json", "config.json", "hyperparams.json"]
    assert asked[0][2] == sorted(weights + configurations)
    assert asked[1] == ("owner/sae.name", "v2", ["layers.5/cfg.json", "layers.5/sae.safetensors"])
    with pytest.raises(FileNotFoundError, match=r"owner/name has no folder or file 'layers\.6'"):
        SAE.from_pretrained("owner/name", subfolder="layers.6")
    write(root / "layers", None, {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}, "layer_3.safetensors")
    assert SAE.from_pretrained("owner/name", subfolder="layers/layer_3.safetensors").transcoder
    assert asked[-1][2] == [f"layers/{name}" for name in (*configurations, "layer_3.safetensors")]
    for bad in ("../other", "a/../../b", "/etc", "a//b", "", ".", "a\\b", "*"):
        with pytest.raises(ValueError, match="subfolder must be a relative path inside the repository"):
            SAE.from_pretrained("owner/name", subfolder=bad)
    for bad in ("one/two/three", "../name", "owner/na me", "nowhere", "./nowhere", "-a/b", tmp_path / "no" / "no"):
        with pytest.raises(FileNotFoundError, match="neither a folder nor a file"):
            SAE.from_pretrained(bad)

    def offline(repository: str, **_: Any) -> str:
        raise FileNotFoundError("no connection")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=offline))
    with pytest.raises(FileNotFoundError, match=r"owner/name is no folder or file here, and not to be had from the Hub: no connection"):
        SAE.from_pretrained("owner/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install 'fastsae-kernels\\[hub\\]'"):
        SAE.from_pretrained("owner/name")
