"""Files of other libraries: each format written by hand and compared with its formula in plain PyTorch, the writers, the Hub (mocked), and
damaged or hostile files. `test_patch_*.py` compare with the libraries themselves.
"""

from __future__ import annotations

import math
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
    THRESHOLD,
    W_DEC,
    W_ENC,
    D,
    F,
    K,
    X,
    abstopk,
    agrees,
    dl,
    draw,
    saelens,
    topk,
    write,
)

from fastsae import SAE, BatchTopK, mmcs

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


# ---------------------------------------------------------------- SAELens


@pytest.mark.parametrize("pre", [True, False])
def test_saelens_standard_in_both_conventions_of_the_pre_bias(tmp_path: Path, pre: bool) -> None:
    folder = saelens(tmp_path, {"architecture": "standard", "apply_b_dec_to_input": pre, "normalize_activations": "none"}, LENS)
    f = ((X - pre * B_DEC) @ W_ENC.T + B_ENC).relu()
    agrees(SAE.from_pretrained(folder), f, f @ W_DEC + B_DEC)
    folded = SAE.from_pretrained(folder, fold_decoder_norm=True)
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(F))
    agrees(folded, f * NORMS, f @ W_DEC + B_DEC)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("keep", [topk, abstopk])
def test_saelens_topk_with_and_without_decoder_norms(tmp_path: Path, rescale: bool, keep: Callable[[torch.Tensor], torch.Tensor]) -> None:
    config = {"architecture": keep.__name__, "k": K, "apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": rescale}
    sae = SAE.from_pretrained(saelens(tmp_path, config, LENS))
    z = (X - B_DEC) @ W_ENC.T + B_ENC
    f = keep(z * NORMS) if rescale else keep(z)
    assert not torch.equal(keep(z * NORMS) != 0, keep(z) != 0), "the norms decide"
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


@pytest.mark.parametrize("name", ["layer_norm", "constant_norm_rescale"])
def test_what_does_not_go_with_rows_normalised_by_themselves(tmp_path: Path, name: str) -> None:
    config = {"architecture": "skip_transcoder", "apply_b_dec_to_input": False, "normalize_activations": name}
    with pytest.raises(ValueError, match="does not go with a skip connection, which takes the rows as they are"):
        SAE.from_pretrained(saelens(tmp_path, config, {**LENS, "W_skip": draw(D, D)}))
    folder = saelens(tmp_path / "factor", {"architecture": "standard", "normalize_activations": name}, LENS)
    with pytest.raises(ValueError, match=f"scaling_factor does not go with normalize_activations '{name}'"):
        SAE.from_pretrained(folder, scaling_factor=2.0)


@pytest.mark.parametrize("name", ["covariance_whitening", ["a"], 3])
def test_unknown_normalisations_are_refused_by_name(tmp_path: Path, name: Any) -> None:
    folder = saelens(tmp_path, {"architecture": "standard", "normalize_activations": name}, LENS)
    why = "the file does not hold its matrices" if isinstance(name, str) else "unknown"
    with pytest.raises(ValueError, match=rf"normalize_activations .* is not supported \({why}\)"):
        SAE.from_pretrained(folder)


@pytest.mark.parametrize("name", ["matching_pursuit", "temporal", "softmax", None])
def test_unknown_architectures_are_refused_by_name(tmp_path: Path, name: Any) -> None:
    with pytest.raises(ValueError, match=f"SAELens architecture '{name}' is not supported; known: standard, gated"):
        SAE.from_pretrained(saelens(tmp_path, {"architecture": name}, LENS))


# ---------------------------------------------------------------- sparsify


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
