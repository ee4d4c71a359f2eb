"""Files of other libraries: each format written by hand and compared with its formula in plain PyTorch, the writers, the Hub (mocked), and
damaged or hostile files. `test_patch_*.py` compare with the libraries themselves.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import sys
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from fastsae import SAE, BatchTopK, Gated, JumpReLU, ReLU, SAEs, TopK, mmcs, optim
from fastsae.trainer import Trainer

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

D, F, K = 6, 20, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 31 * len(shape) + sum(shape)))


X = draw(9, D, seed=5)
W_ENC, W_DEC, B_ENC, B_DEC = draw(F, D, seed=1), draw(F, D, seed=2) * (1 + torch.arange(F)[:, None] / F), draw(F) / 3, draw(D) / 2
THRESHOLD = draw(F, seed=7).abs() / 2
NORMS = W_DEC.norm(dim=1)


def topk(z: Tensor, k: int = K) -> Tensor:
    best = z.topk(k, dim=-1)
    return torch.zeros_like(z).scatter(-1, best.indices, best.values.relu())


def write(folder: Path, config: dict[str, Any] | None, tensors: dict[str, Tensor], file: str, config_file: str = "cfg.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if file.endswith(".pt"):
        torch.save(tensors, folder / file)
    elif file.endswith(".npz"):
        np.savez(folder / file, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        safetensors.save_file(tensors, folder / file)
    if config is not None:
        (folder / config_file).write_text(json.dumps(config))
    return folder


def saelens(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    version = {"metadata": {"sae_lens_version": "6.54.12"}} if "architecture" in config and "old" not in config else {}
    return write(folder, {"d_in": D, "d_sae": F, "dtype": "float32", **version, **config}, tensors, "sae_weights.safetensors")


def dl(folder: Path, kind: str, tensors: dict[str, Tensor], **trainer: Any) -> Path:
    config = {"trainer": {"dict_class": kind, "activation_dim": D, "dict_size": F, **trainer}, "buffer": {}}
    return write(folder, config, tensors, "ae.pt", "config.json")


def agrees(sae: SAE, latents: Tensor, x_hat: Tensor, x: Tensor = X) -> None:
    assert not sae.training
    run = sae(x)
    assert run.latents is not None
    torch.testing.assert_close(run.latents.to_dense(), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run.x_hat, x_hat, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- SAELens

LENS = {"W_enc": W_ENC.T, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}


@pytest.mark.parametrize("pre", [True, False])
def test_saelens_standard_in_both_conventions_of_the_pre_bias(tmp_path: Path, pre: bool) -> None:
    folder = saelens(tmp_path, {"architecture": "standard", "apply_b_dec_to_input": pre, "normalize_activations": "none"}, LENS)
    f = ((X - pre * B_DEC) @ W_ENC.T + B_ENC).relu()
    agrees(SAE.from_pretrained(folder), f, f @ W_DEC + B_DEC)
    folded = SAE.from_pretrained(folder, fold_decoder_norm=True)
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(F))
    agrees(folded, f * NORMS, f @ W_DEC + B_DEC)


@pytest.mark.parametrize("rescale", [True, False])
def test_saelens_topk_with_and_without_decoder_norms(tmp_path: Path, rescale: bool) -> None:
    config = {"architecture": "topk", "k": K, "apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": rescale}
    sae = SAE.from_pretrained(saelens(tmp_path, config, LENS))
    z = (X - B_DEC) @ W_ENC.T + B_ENC
    f = topk(z * NORMS) if rescale else topk(z)
    assert not torch.equal(topk(z * NORMS) > 0, topk(z) > 0), "the norms decide"
    agrees(sae, f, (f / NORMS if rescale else f) @ W_DEC + B_DEC)
    with pytest.raises(ValueError, match="fold_decoder_norm would change"):
        SAE.from_pretrained(tmp_path, fold_decoder_norm=True)


def test_saelens_jumprelu_and_gated(tmp_path: Path) -> None:
    folder = saelens(tmp_path / "j", {"architecture": "jumprelu", "apply_b_dec_to_input": False}, {**LENS, "threshold": THRESHOLD})
    z = X @ W_ENC.T + B_ENC
    f = z.relu() * (z > THRESHOLD)
    agrees(SAE.from_pretrained(folder), f, f @ W_DEC + B_DEC)
    gates = {"b_gate": draw(F, seed=3), "r_mag": draw(F, seed=4) / 4, "b_mag": draw(F, seed=5)}
    tensors = {**{name: LENS[name] for name in ("W_enc", "W_dec", "b_dec")}, **gates}
    folder = saelens(tmp_path / "g", {"architecture": "gated", "apply_b_dec_to_input": True}, tensors)
    p = (X - B_DEC) @ W_ENC.T
    f = (p + gates["b_gate"] > 0) * (p * gates["r_mag"].exp() + gates["b_mag"]).relu()
    agrees(SAE.from_pretrained(folder), f, f @ W_DEC + B_DEC)
    agrees(SAE.from_pretrained(folder, fold_decoder_norm=True), f * NORMS, f @ W_DEC + B_DEC)


def test_a_score_equal_to_its_threshold_is_not_kept(tmp_path: Path) -> None:
    tensors = {"W_enc": torch.eye(2), "b_enc": torch.zeros(2), "W_dec": torch.eye(2), "b_dec": torch.zeros(2), "threshold": torch.ones(2)}
    folder = write(tmp_path / "g", None, tensors, "params.npz")
    sae = SAE.from_pretrained(folder)
    x = torch.tensor([[1.0, 1.0 + 2**-22], [-3.0, 0.0]])
    agrees(sae, torch.tensor([[0.0, 1.0 + 2**-22], [0.0, 0.0]]), torch.tensor([[0.0, 1.0 + 2**-22], [0.0, 0.0]]), x)


@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"])
def test_saelens_transcoders(tmp_path: Path, kind: str) -> None:
    W_dec, b_dec, skip = draw(F, 5), draw(5), draw(5, D)
    tensors = {"W_enc": W_ENC.T, "b_enc": B_ENC, "W_dec": W_dec, "b_dec": b_dec}
    tensors |= {"W_skip": skip} if "skip" in kind else {}
    tensors |= {"threshold": THRESHOLD} if "jump" in kind else {}
    folder = saelens(tmp_path, {"architecture": kind, "d_out": 5, "apply_b_dec_to_input": False}, tensors)
    z = X @ W_ENC.T + B_ENC
    f = z.relu() * (z > THRESHOLD if "jump" in kind else 1)
    agrees(SAE.from_pretrained(folder), f, f @ W_dec + b_dec + (X @ skip.T if "skip" in kind else 0))


def test_saelens_before_version_6(tmp_path: Path) -> None:
    # A top k was an activation function of the standard architecture; b_dec is subtracted by default; normalisation was a flag.
    config = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "hook_point": "blocks.0", "normalize_activations": False}
    f = topk((X - B_DEC) @ W_ENC.T + B_ENC)
    ones = {**LENS, "scaling_factor": torch.ones(F)}
    agrees(SAE.from_pretrained(saelens(tmp_path / "a", config, ones)), f, f @ W_DEC + B_DEC)
    relu = {"sae_lens_version": "5.4.1", "architecture": "standard", "old": 1, "activation_fn": "relu", "normalize_activations": None}
    f = ((X - B_DEC) @ W_ENC.T + B_ENC).relu()
    agrees(SAE.from_pretrained(saelens(tmp_path / "b", relu, LENS)), f, f @ W_DEC + B_DEC)
    factor = 1 + THRESHOLD
    tuned = saelens(tmp_path / "c", {**relu, "finetuning_scaling_factor": True}, {**LENS, "scaling_factor": factor})
    agrees(SAE.from_pretrained(tuned), f, (f * factor) @ W_DEC + B_DEC)
    odd = saelens(tmp_path / "d", relu, {**LENS, "scaling_factor": factor})
    with pytest.raises(ValueError, match="finetuning_scaling_factor false contradicts"):
        SAE.from_pretrained(odd)
    for name, value in (("activation_fn", "tanh-relu"), ("activation_fn_kwargs", {"k": K, "signed": True})):
        wrong = saelens(tmp_path / name, {**config, "activation_fn_str": "topk" if "kwargs" in name else "tanh-relu", name: value}, LENS)
        with pytest.raises(ValueError, match="not supported"):
            SAE.from_pretrained(wrong)


def test_saelens_input_scale_is_asked_for_and_folded(tmp_path: Path) -> None:
    config = {"architecture": "standard", "apply_b_dec_to_input": True, "normalize_activations": "expected_average_only_in"}
    folder = saelens(tmp_path, config, LENS)
    with pytest.raises(ValueError, match="give it as scaling_factor="):
        SAE.from_pretrained(folder)
    f = ((X * 2.5 - B_DEC) @ W_ENC.T + B_ENC).relu()
    agrees(SAE.from_pretrained(folder, scaling_factor=2.5), f, (f @ W_DEC + B_DEC) / 2.5)
    plain = saelens(tmp_path / "plain", {**config, "normalize_activations": "none"}, LENS)
    with pytest.raises(ValueError, match="scaling_factor does not go with"):
        SAE.from_pretrained(plain, scaling_factor=2.5)
    held = {**config, "normalize_activations": "constant_scalar_rescale", "activation_normalization_factor": 2.5}
    folder = saelens(tmp_path / "held", held, LENS)
    agrees(SAE.from_pretrained(folder), f, (f @ W_DEC + B_DEC) / 2.5)
    with pytest.raises(ValueError, match="constant_scalar_rescale', whose factor the file holds"):
        SAE.from_pretrained(folder, scaling_factor=2.5)
    with pytest.raises(ValueError, match="activation_normalization_factor must be a number, got str"):
        SAE.from_pretrained(saelens(tmp_path / "text", {**held, "activation_normalization_factor": "2.5"}, LENS))
    with pytest.raises(ValueError, match=r"'constant_scalar_rescale' multiplies inputs by a number .* give it as scaling_factor="):
        SAE.from_pretrained(saelens(tmp_path / "without", {**config, "normalize_activations": "constant_scalar_rescale"}, LENS))


@pytest.mark.parametrize("name", ["layer_norm", "constant_norm_rescale", "covariance_whitening", ["a"], 3])
def test_normalisations_that_depend_on_the_row_are_refused_by_name(tmp_path: Path, name: Any) -> None:
    folder = saelens(tmp_path, {"architecture": "standard", "normalize_activations": name}, LENS)
    why = {"covariance_whitening": "the file does not hold its matrices"}.get(str(name), "it depends on each row")
    why = why if isinstance(name, str) else "unknown"
    with pytest.raises(ValueError, match=rf"normalize_activations .* is not supported \({why}\)"):
        SAE.from_pretrained(folder)


@pytest.mark.parametrize("name", ["matching_pursuit", "temporal", "abstopk", "batchtopk", None])
def test_unknown_architectures_are_refused_by_name(tmp_path: Path, name: Any) -> None:
    with pytest.raises(ValueError, match=f"SAELens architecture '{name}' is not supported; known: standard, gated"):
        SAE.from_pretrained(saelens(tmp_path, {"architecture": name}, LENS))


# ---------------------------------------------------------------- sparsify

COOK = {"encoder.weight": W_ENC, "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("transcode", [False, True])
def test_sparsify(tmp_path: Path, transcode: bool, skip: bool) -> None:
    config = {"d_in": D, "num_latents": F, "expansion_factor": 32, "k": K, "transcode": transcode, "skip_connection": skip}
    W_skip = draw(D, D)
    folder = write(tmp_path, config, {**COOK, **({"W_skip": W_skip} if skip else {})}, "sae.safetensors")
    sae = SAE.from_pretrained(folder)
    f = topk((X if transcode else X - B_DEC) @ W_ENC.T + B_ENC)
    agrees(sae, f, f @ W_DEC + B_DEC + (X @ W_skip.T if skip else 0))
    again = SAE.load(sae.save(tmp_path / "own"))
    assert again.config() == sae.config()
    agrees(again.eval(), f, f @ W_DEC + B_DEC + (X @ W_skip.T if skip else 0))


def test_sparsify_traps(tmp_path: Path) -> None:
    base = {"d_in": D, "num_latents": 18, "k": K}
    narrow = {name: tensor if name == "b_dec" else tensor[:18] for name, tensor in COOK.items()}
    # num_latents 0: expansion_factor times d_in.
    folder = write(tmp_path / "zero", {**base, "num_latents": 0, "expansion_factor": 3}, narrow, "sae.safetensors")
    assert SAE.from_pretrained(folder).d_sae == 18
    refused = {
        "groupmax": ({"activation": "groupmax"}, narrow),
        "signed": ({"signed": True}, narrow),
        "encoder only": ({}, {name: tensor for name, tensor in narrow.items() if name != "W_dec"}),
        "expansion_factor": ({"num_latents": 0, "expansion_factor": "3"}, narrow),
        "claims num_latents=36": ({"num_latents": 0, "expansion_factor": 6}, narrow),
        "claims d_in=7": ({"d_in": 7}, narrow),
        "k must be an int": ({"k": math.nan}, narrow),
        r"unknown \['W_skip'\]": ({}, {**narrow, "W_skip": draw(D, D)}),
        r"missing \['W_skip'\]": ({"skip_connection": True}, narrow),
    }
    for number, (message, (change, tensors)) in enumerate(refused.items()):
        wrong = write(tmp_path / str(number), {**base, **change}, tensors, "sae.safetensors")
        with pytest.raises(ValueError, match=message):
            SAE.from_pretrained(wrong)


# ---------------------------------------------------------------- dictionary_learning

LINEAR = {"encoder.weight": W_ENC, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T}
BARE = {"W_enc": W_ENC.T, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}


def test_dictionary_learning_autoencoders(tmp_path: Path) -> None:
    folder = dl(tmp_path / "a", "AutoEncoder", {**LINEAR, "bias": B_DEC})
    f = ((X - B_DEC) @ W_ENC.T + B_ENC).relu()
    # Its own loader gives the decoder unit rows, by default.
    agrees(SAE.from_pretrained(folder), f * NORMS, f @ W_DEC + B_DEC)
    agrees(SAE.from_pretrained(folder, fold_decoder_norm=False), f, f @ W_DEC + B_DEC)
    folder = dl(tmp_path / "n", "AutoEncoderNew", {**LINEAR, "decoder.bias": B_DEC})
    f = (X @ W_ENC.T + B_ENC).relu()
    agrees(SAE.from_pretrained(folder), f, f @ W_DEC + B_DEC)
    gates = {"gate_bias": draw(F, seed=3), "r_mag": draw(F, seed=4) / 4, "mag_bias": draw(F, seed=5)}
    tensors = {"encoder.weight": W_ENC, "decoder.weight": W_DEC.T, "decoder_bias": B_DEC, **gates}
    p = (X - B_DEC) @ W_ENC.T
    f = (p + gates["gate_bias"] > 0) * (p * gates["r_mag"].exp() + gates["mag_bias"]).relu()
    agrees(SAE.from_pretrained(dl(tmp_path / "g", "GatedAutoEncoder", tensors)), f, f @ W_DEC + B_DEC)


@pytest.mark.parametrize("pre", [None, False, True])
def test_dictionary_learning_jumprelu_does_not_say_whether_it_subtracts_the_bias(tmp_path: Path, pre: bool | None) -> None:
    folder = dl(tmp_path, "JumpReluAutoEncoder", {**BARE, "threshold": THRESHOLD})
    z = (X - B_DEC * bool(pre)) @ W_ENC.T + B_ENC
    f = z.relu() * (z > THRESHOLD)
    agrees(SAE.from_pretrained(folder, pre_bias=pre), f, f @ W_DEC + B_DEC)
    other = write(tmp_path / "s", {"d_in": D, "num_latents": F, "k": K}, COOK, "sae.safetensors")
    with pytest.raises(ValueError, match="pre_bias is for dictionary_learning's JumpReluAutoEncoder"):
        SAE.from_pretrained(other, pre_bias=True)


def test_dictionary_learning_topk_and_the_buffer_k(tmp_path: Path) -> None:
    tensors = {**LINEAR, "b_dec": B_DEC, "k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.7)}
    f = topk((X - B_DEC) @ W_ENC.T + B_ENC)
    agrees(SAE.from_pretrained(dl(tmp_path / "a", "AutoEncoderTopK", tensors, k=K)), f, f @ W_DEC + B_DEC)
    with pytest.raises(ValueError, match="claims k=5, the tensors k=4"):
        SAE.from_pretrained(dl(tmp_path / "b", "AutoEncoderTopK", tensors, k=5))
    del tensors["k"], tensors["threshold"]  # before they were buffers
    agrees(SAE.from_pretrained(dl(tmp_path / "c", "AutoEncoderTopK", tensors, k=K)), f, f @ W_DEC + B_DEC)
    with pytest.raises(ValueError, match="k must be an int of at least 1, got None"):
        SAE.from_pretrained(dl(tmp_path / "d", "AutoEncoderTopK", tensors))


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.8])
@pytest.mark.parametrize("groups", [None, [4, 6, 10]])
def test_dictionary_learning_batch_topk_infers_by_its_threshold(tmp_path: Path, threshold: float, groups: list[int] | None) -> None:
    counters = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(threshold)}
    if groups is None:
        folder = dl(tmp_path, "BatchTopKSAE", {**LINEAR, "b_dec": B_DEC, **counters}, k=K)
    else:
        folder = dl(tmp_path, "MatryoshkaBatchTopKSAE", {**BARE, **counters, "group_sizes": torch.tensor(groups)}, k=K)
    sae = SAE.from_pretrained(folder)
    z = ((X - B_DEC) @ W_ENC.T + B_ENC).relu()
    f = z * (z > threshold)
    agrees(sae, f, f @ W_DEC + B_DEC)
    assert sae.prefixes == (None if groups is None else [4, 10, 20])
    assert isinstance(sae.activation, BatchTopK)
    assert sae.activation.rate == pytest.approx(0.001)
    # In training mode the batch's best are kept, whatever the threshold.
    best = z.flatten().topk(K * X.shape[0])
    f = torch.zeros(z.numel()).scatter(0, best.indices, best.values).reshape(z.shape)
    torch.testing.assert_close(sae.train().encode(X).to_dense(), f, rtol=1e-5, atol=1e-5)


def test_dictionary_learning_checkpoints_and_classes(tmp_path: Path) -> None:
    folder = dl(tmp_path, "BatchTopKSAE", {**LINEAR, "b_dec": B_DEC}, k=K)
    (folder / "checkpoints").mkdir()
    (folder / "ae.pt").rename(folder / "checkpoints" / "ae_100.pt")
    assert SAE.from_pretrained(folder / "checkpoints" / "ae_100.pt").k == K
    for kind in ("IdentityDict", "Elsewhere", None, ["AutoEncoder"]):
        with pytest.raises(ValueError, match="is not supported; known: AutoEncoder, AutoEncoderNew"):
            SAE.from_pretrained(dl(tmp_path / "x", kind, LINEAR))  # pyright: ignore[reportArgumentType]
    for groups in ([4, 6], [-1, 21], [[20]]):
        tensors = {**BARE, "k": torch.tensor(K), "group_sizes": torch.tensor(groups)}
        with pytest.raises(ValueError, match="group_sizes must be positive integers that add up to 20"):
            SAE.from_pretrained(dl(tmp_path / "m", "MatryoshkaBatchTopKSAE", tensors, k=K))


# ---------------------------------------------------------------- Gemma Scope


@pytest.mark.parametrize("names", [str, lambda name: name.replace("W_", "w_")], ids=["W_enc", "w_enc"])
def test_gemma_scope(tmp_path: Path, names: Callable[[str], str]) -> None:
    tensors = {names(name): tensor for name, tensor in {**BARE, "threshold": THRESHOLD}.items()}
    folder = write(tmp_path, None, tensors, "params.npz")
    z = X @ W_ENC.T + B_ENC
    f = z * (z > THRESHOLD)
    for source in (folder, str(folder), folder / "params.npz"):
        agrees(SAE.from_pretrained(source), f, f @ W_DEC + B_DEC)
    assert mmcs(folder, W_DEC) == pytest.approx(1, abs=1e-6)
    wide = SAE.from_pretrained(folder, dtype=torch.float64)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}


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
    jump = {"threshold": THRESHOLD}
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
        "fastsae": lambda: own(folder, W, TopK(K)),
        "fastsae gated, tied": lambda: own(folder, W, Gated(), tied=True),
        "fastsae skip transcoder": lambda: own(folder, W, JumpReLU(0.1), d_out=D, skip=True),
    }
    return SAE.from_pretrained(made[name](), dtype=W.dtype)


def own(folder: Path, W: Tensor, activation: Any, **options: Any) -> Path:
    sae = SAE(D, F, activation, seed=0, dtype=W.dtype, **options)
    with torch.no_grad():
        sae.W_dec.copy_(W)
    return sae.save(folder)


# Whose trainers keep the rows at norm 1.
RULES = {"saelens old, normalised", "sparsify", "gemma_scope", "fastsae", "fastsae gated, tied"}
RULES |= {f"dl {name}" for name in ("AutoEncoder", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE")}
RULES |= {"dl MatryoshkaBatchTopKSAE"}
EVERY = ["saelens standard", "saelens old, normalised", "saelens topk", "saelens topk by norms", "saelens jumprelu", "saelens gated"]
EVERY += ["saelens transcoder", "sparsify", "sparsify, not normalised", "sparsify transcoder", "dl AutoEncoder", "dl AutoEncoderNew"]
EVERY += ["dl GatedAutoEncoder", "dl JumpReluAutoEncoder", "dl AutoEncoderTopK", "dl BatchTopKSAE", "dl MatryoshkaBatchTopKSAE"]
EVERY += ["gemma_scope", "fastsae", "fastsae gated, tied", "fastsae skip transcoder"]


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

OURS: dict[str, Any] = {
    "topk": lambda: SAE(D, F, TopK(K), seed=0),
    "signed topk": lambda: SAE(D, F, TopK(K, relu=False), seed=0),
    "topk, bare input": lambda: SAE(D, F, TopK(K), pre_bias=False, seed=0),
    "relu": lambda: SAE(D, F, ReLU(), seed=0),
    "relu, bare input": lambda: SAE(D, F, ReLU(), pre_bias=False, seed=0),
    "jumprelu": lambda: SAE(D, F, JumpReLU(0.3), seed=0),
    "jumprelu, bare input": lambda: SAE(D, F, JumpReLU(0.3), pre_bias=False, seed=0),
    "gated": lambda: SAE(D, F, Gated(), seed=0),
    "gated, bare input": lambda: SAE(D, F, Gated(), pre_bias=False, seed=0),
    "batchtopk": lambda: SAE(D, F, BatchTopK(K), seed=0),
    "batchtopk 2.5": lambda: SAE(D, F, BatchTopK(2.5), seed=0),
    "matryoshka": lambda: SAE(D, F, BatchTopK(K), prefixes=[5, F], seed=0),
    "tied": lambda: SAE(D, F, TopK(K), tied=True, seed=0),
    "transcoder": lambda: SAE(D, F, TopK(K), d_out=D, seed=0),
    "skip transcoder": lambda: SAE(D, F, TopK(K), d_out=D, skip=True, seed=0),
    "relu transcoder": lambda: SAE(D, F, ReLU(), d_out=5, skip=True, seed=0),
    "jumprelu transcoder": lambda: SAE(D, F, JumpReLU(0.3), d_out=5, seed=0),
    "pre-bias and skip": lambda: SAE(D, F, TopK(K), d_out=D, skip=True, pre_bias=True, seed=0),
}
REFUSED = {
    "saelens": {"signed topk", "transcoder", "skip transcoder", "pre-bias and skip"},
    "sparsify": set(OURS) - {"topk", "topk, bare input", "tied", "transcoder", "skip transcoder", "pre-bias and skip"},
    "dictionary_learning": {
        "signed topk",
        "batchtopk 2.5",
        "skip transcoder",
        "relu transcoder",
        "jumprelu transcoder",
        "pre-bias and skip",
    },
    "fastsae": set(),
}


def ours(name: str) -> SAE:
    sae = OURS[name]()
    with torch.no_grad():
        for number, parameter in enumerate(sae.parameters()):
            parameter.add_(draw(*parameter.shape, seed=number) / 5)
        if isinstance(sae.activation, BatchTopK):
            sae.running_threshold.fill_(0.4)
    return sae.eval()


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
    assert asked[0][2] == ["ae.pt", "cfg.json", "config.json", "params.npz", "sae.safetensors", "sae_weights.safetensors"]
    assert asked[1] == ("owner/sae.name", "v2", ["layers.5/cfg.json", "layers.5/sae.safetensors"])
    with pytest.raises(FileNotFoundError, match=r"owner/name has no folder 'layers\.6'"):
        SAE.from_pretrained("owner/name", subfolder="layers.6")
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


# ---------------------------------------------------------------- damaged and hostile files


def without_entry(folder: Path) -> Path:
    """A folder of ``save`` as it was before the configuration was inside the weights' file."""
    path = folder / "sae.safetensors"
    safetensors.save_file({name: tensor.clone() for name, tensor in safetensors.load_file(path).items()}, path)
    return folder


READABLE: dict[str, Callable[[Path], Path]] = {
    "fastsae": lambda folder: without_entry(ours("topk").save(folder)),
    "saelens": lambda folder: saelens(folder, {"architecture": "topk", "k": K}, LENS),
    "sparsify": lambda folder: write(folder, {"d_in": D, "num_latents": F, "k": K}, COOK, "sae.safetensors"),
    "dictionary_learning": lambda folder: dl(
        folder, "BatchTopKSAE", {**LINEAR, "b_dec": B_DEC, "k": torch.tensor(K), "threshold": torch.tensor(0.2)}, k=K
    ),
    "gemma_scope": lambda folder: write(folder, None, {**BARE, "threshold": THRESHOLD}, "params.npz"),
}
WEIGHTS = ("sae.safetensors", "sae_weights.safetensors", "ae.pt", "params.npz")


def weights(folder: Path) -> Path:
    return next(folder / name for name in WEIGHTS if (folder / name).exists())


@pytest.mark.parametrize("format", READABLE)
def test_truncated_and_overwritten_weights(tmp_path: Path, format: str) -> None:  # noqa: A002
    path = weights(READABLE[format](tmp_path))
    raw = path.read_bytes()
    cuts = [0, 1, 7, 8, 20, len(raw) // 3, len(raw) // 2, len(raw) - 5, len(raw) - 1]
    broken = [raw[:cut] for cut in cuts] + [b"\xff" * len(raw), b"no", raw[:8] + b"\x00" * (len(raw) - 8)]
    for data in broken:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"^SAE.from_pretrained: .*" + path.name):
            SAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("format", [name for name in READABLE if name != "gemma_scope"])
def test_damaged_configurations(tmp_path: Path, format: str) -> None:  # noqa: A002
    folder = READABLE[format](tmp_path)
    path = folder / ("config.json" if format == "dictionary_learning" else "cfg.json")
    good = json.loads(path.read_text())
    for text in ("", "{", "[1]", "null", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\x00"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"^SAE.from_pretrained: .*cfg.json|config.json"):
            SAE.from_pretrained(folder, format=format)  # pyright: ignore[reportArgumentType]
    inner = good["trainer"] if format == "dictionary_learning" else good
    sizes = {"fastsae": "num_latents", "saelens": "d_sae", "sparsify": "num_latents", "dictionary_learning": "dict_size"}
    for key in (sizes[format], "k"):
        # A size no machine has; sizes that are none. Nothing of that size is ever asked for.
        for value in (10**14, -3, 2.5, math.nan, "20", [20], {"a": 1}):
            changed = {**inner, key: value}
            path.write_text(json.dumps({**good, "trainer": changed} if format == "dictionary_learning" else changed))
            with pytest.raises(ValueError, match=r"^SAE.from_pretrained: "):
                SAE.from_pretrained(folder, format=format)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("format", READABLE)
def test_wrong_shapes_and_names(tmp_path: Path, format: str) -> None:  # noqa: A002
    path = weights(READABLE[format](tmp_path))
    config = next((p for p in tmp_path.glob("*.json")), None)
    text = None if config is None else config.read_text()
    from fastsae.formats.weight_files import read_tensors

    good = read_tensors(path)
    for name in good:
        if name in ("k", "threshold") and good[name].dim() == 0:
            continue
        wrong = [{n: t for n, t in good.items() if n != name}, {**good, name + "2": good[name]}, {**good, name: good[name][:-1]}]
        wrong += [{**good, name: good[name].unsqueeze(0)}, {**good, name: torch.zeros(0)}, {**good, name: good[name].to(torch.int32)}]
        for tensors in wrong:
            write(tmp_path, None, tensors, path.name)
            if config is not None and text is not None:
                config.write_text(text)
            with pytest.raises(ValueError, match=r"^SAE.from_pretrained: "):
                SAE.from_pretrained(tmp_path)


SETTINGS = {  # what each format's configuration may say, with values that it may not
    "fastsae": {
        **dict.fromkeys(("d_in", "num_latents", "d_out", "dead_after", "k"), ("1", 2.5, -1, True, [1], {})),
        **dict.fromkeys(("skip_connection", "tied", "transcoder", "relu", "pre_bias", "normalize_decoder"), ("false", 1, 0, [], {})),
        **dict.fromkeys(("l1", "l0"), ("0", None, True, [1], math.nan, math.inf)),
        "activation": ("TopK", "softmax", None, 1, ["topk"]),
        "objective": ("l2", None, 1, ["mse"]),
        "prefixes": (3, "ab", [3], [3.0, F], [F, 3, F], [True, F], {"a": 1}),
        "aux": (True, 1, "aux", [1], {"k": "1"}, {"k": -1}, {"other": 1}, {"coefficient": math.nan}),
    },
    "saelens": {
        **dict.fromkeys(("d_in", "d_sae", "k"), ("1", 2.5, -1, True, [1], {})),
        **dict.fromkeys(("apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "normalize_sae_decoder"), ("false", 1, 0, [], {})),
        "dtype": ("int8", 1, ["float32"]),
    },
    "sparsify": {
        **dict.fromkeys(("d_in", "num_latents", "k"), ("1", 2.5, -1, True, [1])),
        **dict.fromkeys(("skip_connection", "transcode", "normalize_decoder", "signed"), ("false", 1, 0, [], {})),
    },
    "dictionary_learning": {
        **dict.fromkeys(("activation_dim", "dict_size", "k"), ("1", 2.5, -1, True, [1], {})),
        "threshold_beta": ("0.9", math.nan, True, [1]),
        "dict_class": (None, 1, ["AutoEncoder"]),
    },
}


@pytest.mark.parametrize("format", SETTINGS)
def test_settings_of_another_type_are_refused(tmp_path: Path, format: str) -> None:  # noqa: A002
    folder = READABLE[format](tmp_path)
    path = folder / ("config.json" if format == "dictionary_learning" else "cfg.json")
    good = json.loads(path.read_text())
    for key, wrong in SETTINGS[format].items():
        for value in wrong:
            inner = {**good.get("trainer", good), key: value}
            path.write_text(json.dumps({**good, "trainer": inner} if "trainer" in good else inner))
            with pytest.raises(ValueError, match=r"^SAE.from_pretrained: "):
                pytest.fail(f"{key} = {value!r} is taken: {SAE.from_pretrained(folder, format=format)}")  # pyright: ignore[reportArgumentType]


class Bomb:
    """Unpickling it would run a command."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_pickles_execute_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    folder = READABLE["dictionary_learning"](tmp_path / "dl")
    torch.save({"encoder.weight": Bomb(mark)}, folder / "ae.pt")
    with pytest.raises(ValueError, match=r"ae.pt is not a file of tensors that torch.load\(weights_only=True\) reads"):
        SAE.from_pretrained(folder)
    (folder / "ae.pt").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(ValueError, match="weights_only=True"):
        SAE.from_pretrained(folder)
    torch.save([W_ENC], folder / "ae.pt")
    with pytest.raises(ValueError, match="must hold a state dict of named tensors, got list"):
        SAE.from_pretrained(folder)
    folder = READABLE["gemma_scope"](tmp_path / "gemma")
    np.savez(folder / "params.npz", W_enc=np.array([Bomb(mark)], dtype=object), W_dec=np.array([Bomb(mark)], dtype=object))
    with pytest.raises(ValueError, match="W_enc must hold floating point numbers, got object"):
        SAE.from_pretrained(folder)
    with pytest.raises(ValueError, match="floating point"):
        mmcs(folder / "params.npz", W_DEC)
    for name in ("sae.safetensors", "sae_weights.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(mark)))
        with pytest.raises(ValueError, match="not a safetensors file"):
            mmcs(tmp_path / name, W_DEC)
    assert not mark.exists()


def test_huge_claims(tmp_path: Path) -> None:
    # safetensors: a header longer than the file, and tensors beyond its end.
    folder = READABLE["saelens"](tmp_path / "lens")
    header = json.dumps({"W_enc": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4 * 10**18]}}).encode()
    for raw in ((2**63 - 1).to_bytes(8, "little") + b"{}", len(header).to_bytes(8, "little") + header):
        weights(folder).write_bytes(raw)
        with pytest.raises(ValueError, match="not a safetensors file"):
            SAE.from_pretrained(folder)
    # .pt: an expanded tensor claims more than its storage holds.
    folder = READABLE["dictionary_learning"](tmp_path / "dl")
    torch.save({"encoder.weight": torch.zeros(1, 1).expand(10**8, 10**8), "b_dec": B_DEC}, folder / "ae.pt")
    with pytest.raises(ValueError, match=r"encoder.weight claims the shape \[100000000, 100000000\] of torch.float32 but holds 4 bytes"):
        SAE.from_pretrained(folder)
    torch.save({"encoder.weight": W_ENC.to_sparse(), "b_dec": B_DEC}, folder / "ae.pt")
    with pytest.raises(ValueError, match="must be a dense tensor"):
        SAE.from_pretrained(folder)
    # .npz: a header that claims more than the member holds.
    folder = READABLE["gemma_scope"](tmp_path / "gemma")
    for claim, message in (("(100000000, 100000000)", "but holds"), ("(2, -1)", "not an .npz file"), ("__import__('os')", "not an .npz")):
        buffer = io.BytesIO()
        np.save(buffer, np.zeros((2, 2), dtype=np.float32))
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {claim}, }}".encode()
        text += b" " * (117 - len(text)) + b"\n"
        with zipfile.ZipFile(folder / "params.npz", "w") as archive:
            archive.writestr("W_enc.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(16))
        with pytest.raises(ValueError, match=message):
            SAE.from_pretrained(folder)
    # A configuration of many gigabytes is not read.
    folder = READABLE["sparsify"](tmp_path / "sparsify")
    with open(folder / "cfg.json", "wb") as file:
        file.truncate(1 << 36)
    with pytest.raises(ValueError, match="must be at most 16777216 bytes of JSON"):
        SAE.from_pretrained(folder)


def test_arguments(tmp_path: Path) -> None:
    folder = READABLE["sparsify"](tmp_path / "a")
    for bad, kind, message in (
        ({"format": "safetensors"}, ValueError, "format must be one of fastsae, saelens"),
        ({"dtype": torch.int8}, TypeError, "dtype must be float32"),
        ({"fold_decoder_norm": 1}, TypeError, "fold_decoder_norm must be a bool"),
        ({"pre_bias": "yes"}, TypeError, "pre_bias must be a bool"),
        ({"scaling_factor": 2.0}, ValueError, "scaling_factor is for SAELens"),
        ({"format": "saelens"}, FileNotFoundError, "needs the file sae_weights.safetensors"),
    ):
        with pytest.raises(kind, match=rf"^(SAE.from_pretrained: .*|{folder}.*){message}"):
            SAE.from_pretrained(folder, **bad)
    with pytest.raises(TypeError, match="source must be a path or the name of a Hub repository, got int"):
        SAE.from_pretrained(3)  # pyright: ignore[reportArgumentType]
    READABLE["saelens"](folder)
    with pytest.raises(ValueError, match=r"must hold one of .*give format="):
        SAE.from_pretrained(folder)
    assert SAE.from_pretrained(folder, format="saelens", device="cpu").k == K
    (folder / "cfg.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"needs the file cfg\.json"):
        SAE.from_pretrained(folder, format="sparsify")
    lens = saelens(tmp_path / "s", {"architecture": "standard", "normalize_activations": True}, LENS)
    for factor in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="scaling_factor must be a finite number above 0"):
            SAE.from_pretrained(lens, scaling_factor=factor)


@given(data=st.data())
def test_flipped_bytes_load_or_raise_value_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Nothing but ValueError, whatever bytes of the weights or the configuration are changed, cut out or repeated."""
    folder = tmp_path_factory.mktemp("flipped")
    READABLE[data.draw(st.sampled_from(sorted(READABLE)))](folder)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, min(300, len(raw) - 1)), st.integers(max(0, len(raw) - 300), len(raw) - 1)))
        kind = data.draw(st.sampled_from(["set", "cut", "repeat"]))
        piece = raw[at : at + data.draw(st.integers(1, 16))]
        if kind == "set":
            raw[at] = data.draw(st.integers(0, 255))
        else:
            raw[at : at + len(piece)] = b"" if kind == "cut" else piece + piece
        if not raw:
            break
    path.write_bytes(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the unpickler
        try:
            sae = SAE.from_pretrained(folder)
        except ValueError:
            return
        assert sae(X[:, : sae.d_in]).x_hat.shape == (9, sae.d_out)
