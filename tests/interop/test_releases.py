"""Files of published dictionaries, under the names and shapes that they have there, against their formulas in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrained_files import B_DEC, B_ENC, BARE, LINEAR, NORMS, THRESHOLD, W_DEC, W_ENC, D, F, K, X, agrees, dl, draw, saelens, topk, write
from torch import Tensor

from fastsae import SAE, BatchTopK, JumpReLU, ReLU, TopK

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

SKIP = draw(D, D, seed=11)
x, We, Wd, be, bd, theta, skip = (t.double() for t in (X, W_ENC, W_DEC, B_ENC, B_DEC, THRESHOLD, SKIP))
MAJOR = {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
ROWS = {"encoder.weight": W_ENC, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T, "decoder.bias": B_DEC}


def formula(sae: SAE, f: Tensor, y: Tensor) -> SAE:
    agrees(sae, f.float(), y.float())
    return sae


def jump(z: Tensor, threshold: Tensor = theta) -> Tensor:
    return z * (z > threshold)


def test_gemma_scope_2(tmp_path: Path) -> None:
    tensors = {"w_enc": W_ENC.T, "w_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THRESHOLD}
    hooks = {"hf_hook_point_in": "model.layers.5.output"}
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", **hooks}
    f = jump(x @ We.T + be)
    folder = write(tmp_path / "sae", config, tensors, "params.safetensors", "config.json")
    assert not formula(SAE.from_pretrained(folder), f, f @ Wd + bd).transcoder
    (folder / "config.json").unlink()  # as in some of its folders
    formula(SAE.from_pretrained(folder), f, f @ Wd + bd)
    formula(SAE.from_pretrained((folder / "params.safetensors").rename(folder / "layer_3.safetensors")), f, f @ Wd + bd)
    affine = {**tensors, "affine_skip_connection": SKIP.T}
    config |= {"affine_connection": True, "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output"}
    sae = SAE.from_pretrained(write(tmp_path / "affine", config, affine, "params.safetensors", "config.json"))
    formula(sae, f, f @ Wd + bd + x @ skip.T)
    with pytest.raises(ValueError, match="claims affine_connection=True, the tensors have none"):
        SAE.from_pretrained(write(tmp_path / "no", config, tensors, "params.safetensors", "config.json"))
    clt = {**tensors, "w_dec": draw(F, 3, D)}
    with pytest.raises(ValueError, match="a layer of a cross-layer transcoder, whose decoder writes to several layers"):
        SAE.from_pretrained(write(tmp_path / "clt", None, clt, "params.safetensors"))
    with pytest.raises(ValueError, match="architecture 'topk' is not supported; known: jump_relu"):
        SAE.from_pretrained(write(tmp_path / "k", {"architecture": "topk"}, tensors, "params.safetensors", "config.json"))


def test_circuit_tracer(tmp_path: Path) -> None:
    z = x @ We.T + be
    for name, more, f in (
        ("relu", {}, z.relu()),
        ("jump", {"activation_function.threshold": THRESHOLD}, jump(z)),
        ("skip", {"W_skip": SKIP}, z.relu()),
    ):
        folder = write(tmp_path / name, None, {**MAJOR, **more}, "layer_0.safetensors")
        y = f @ Wd + bd + (x @ skip.T if more.keys() == {"W_skip"} else 0)
        assert formula(SAE.from_pretrained(folder), f, y).transcoder
        formula(SAE.from_pretrained((folder / "layer_0.safetensors").rename(folder / "layer_7.safetensors")), f, y)
    best = z.topk(K, dim=1)  # its TopK has no ReLU, and no file has its k
    f = torch.zeros_like(z).scatter(1, best.indices, best.values)
    formula(SAE.from_pretrained(tmp_path / "relu" / "layer_7.safetensors", k=K), f, f @ Wd + bd)
    with pytest.raises(ValueError, match=f"W_enc must be feature-major, .{F}, D. beside b_enc"):
        SAE.from_pretrained(write(tmp_path / "lens", None, BARE, "layer_0.safetensors"))
    with pytest.raises(ValueError, match="a threshold is below 0, where its library keeps negative latents"):
        SAE.from_pretrained(write(tmp_path / "n", None, {**MAJOR, "activation_function.threshold": -THRESHOLD}, "layer_0.safetensors"))
    write(tmp_path / "relu", None, MAJOR, "layer_8.safetensors")
    with pytest.raises(ValueError, match="holds a transcoder a layer: give the file of one"):
        SAE.from_pretrained(tmp_path / "relu")
    cross = {"W_enc_0": W_ENC, "b_enc_0": B_ENC, "b_dec_0": B_DEC}
    write(tmp_path / "clt", None, cross, "W_enc_0.safetensors")
    write(tmp_path / "clt", None, {"W_dec_0": draw(F, 2, D)}, "W_dec_0.safetensors")
    for source in (tmp_path / "clt", tmp_path / "clt" / "W_enc_0.safetensors"):
        with pytest.raises(ValueError, match="is a cross-layer transcoder of circuit-tracer, whose decoders write to many layers"):
            SAE.from_pretrained(source)


def test_a_square_encoder_is_not_guessed(tmp_path: Path) -> None:
    W = draw(D, D, seed=1)
    tensors = {"W_enc": W, "b_enc": B_ENC[:D], "W_dec": W_DEC[:D], "b_dec": B_DEC}
    path = write(tmp_path, None, tensors, "some.safetensors") / "some.safetensors"
    with pytest.raises(ValueError, match=r"W_enc \[6, 6\] may be feature-major or not: give format='circuit_tracer'"):
        SAE.from_pretrained(path)
    f = (x @ W.double().T + be[:D]).relu()
    formula(SAE.from_pretrained(path, format="circuit_tracer"), f, f @ Wd[:D] + bd)


def test_llama_scope_of_three_versions(tmp_path: Path) -> None:
    s = D**0.5 / 2.5
    z = s * x @ We.T + be
    hyper = {"d_model": D, "d_sae": F, "act_fn": "jumprelu", "jump_relu_threshold": 0.4, "norm_activation": "dataset-wise"}
    hyper |= {"dataset_average_activation_norm": {"in": 2.5, "out": 2.5}, "hook_point_in": "h", "hook_point_out": "h"}
    folder = write(tmp_path / "first", hyper, {}, "final.safetensors", "hyperparams.json")
    (folder / "final.safetensors").unlink()
    write(folder / "checkpoints", None, ROWS, "final.safetensors")
    f = jump(z, torch.tensor(0.4 * s))  # the number is for inputs that are not scaled
    for source in (folder, folder / "checkpoints", folder / "checkpoints" / "final.safetensors"):
        formula(SAE.from_pretrained(source), f, (f @ Wd + bd) / s)
    second = {"d_model": D, "expansion_factor": 3, "hook_point_in": "h", "act_fn": "jumprelu", "norm_activation": "dataset-wise"}
    tensors = {**ROWS, "log_jumprelu_threshold": THRESHOLD.log()}
    folder = write(tmp_path / "second", second, tensors, "sae_weights.safetensors", "config.json")
    with pytest.raises(ValueError, match="it holds 0 mean norms of its inputs, scaling_factor is None: one of the two is needed"):
        SAE.from_pretrained(folder)
    f = jump(z)
    formula(SAE.from_pretrained(folder, scaling_factor=s), f, (f @ Wd + bd) / s)
    third = {"W_E": W_ENC.T, "b_E": B_ENC, "W_D": W_DEC, "b_D": B_DEC, "dataset_average_activation_norm.h": torch.tensor(2.5)}
    jumps = {**third, "activation_function.log_jumprelu_threshold": THRESHOLD.log()}
    config = {**second, "sparsity_include_decoder_norm": True}
    n = NORMS.double()
    f = z * (z * n > theta)
    formula(SAE.from_pretrained(write(tmp_path / "third", config, jumps, "sae_weights.safetensors", "config.json")), f, (f @ Wd + bd) / s)
    config |= {"act_fn": "topk", "top_k": K}
    best = (z * n).topk(K, dim=1)
    f = torch.zeros_like(z).scatter(1, best.indices, best.values)
    sae = SAE.from_pretrained(write(tmp_path / "topk", config, third, "sae_weights.safetensors", "config.json"))
    formula(sae, f, (f / n @ Wd + bd) / s)
    for change, message in (
        ({"norm_activation": "token-wise"}, r"norm_activation 'token-wise' is not supported \(it depends on each row or batch\)"),
        ({"act_fn": "batchtopk"}, "act_fn 'batchtopk' is not supported"),
        ({"sae_type": "crosscoder"}, "sae_type 'crosscoder' whose output is another hook point"),
        ({"d_model": D + 1}, "claims d_model=7"),
    ):
        with pytest.raises(ValueError, match=message):
            SAE.from_pretrained(write(tmp_path / "no", {**config, **change}, third, "sae_weights.safetensors", "config.json"))


def test_openai_goodfire_qwen_scope_and_deepseek(tmp_path: Path) -> None:
    state: dict[str, Any] = {"pre_bias": B_DEC, "encoder.weight": W_ENC, "latent_bias": B_ENC, "decoder.weight": W_DEC.T}
    state |= {name: torch.zeros(F, dtype=torch.int64) for name in ("stats_last_nonzero", "latents_activation_frequency")}
    state |= {"latents_mean_square": torch.zeros(F), "activation": "ReLU", "activation_state_dict": {}}
    torch.save(state, tmp_path / "7.pt")
    f = ((x - bd) @ We.T + be).relu()
    formula(SAE.from_pretrained(tmp_path / "7.pt"), f, f @ Wd + bd)
    torch.save({**state, "activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}, tmp_path / "8.pt")
    mean, std = X.mean(1, keepdim=True), X.std(1, keepdim=True)
    f = topk(((X - mean) / (std + 1e-5) - B_DEC) @ W_ENC.T + B_ENC)
    agrees(SAE.from_pretrained(tmp_path / "8.pt"), f, (f @ W_DEC + B_DEC) * std + mean)
    torch.save({**state, "activation": "Sine"}, tmp_path / "9.pt")
    with pytest.raises(ValueError, match="OpenAI's activation 'Sine' is not supported; known: ReLU, TopK"):
        SAE.from_pretrained(tmp_path / "9.pt")
    torch.save({**state, "activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "GELU"}}, tmp_path / "9.pt")
    with pytest.raises(ValueError, match="OpenAI's postact_fn 'GELU' is not supported"):
        SAE.from_pretrained(tmp_path / "9.pt")
    f = (x @ We.T + be).relu()
    torch.save({name.replace(".", "_linear."): t for name, t in ROWS.items()}, tmp_path / "Llama-SAE-l19.pth")
    formula(SAE.from_pretrained(tmp_path / "Llama-SAE-l19.pth"), f, f @ Wd + bd)
    torch.save(ROWS, tmp_path / "R1-SAE-l19.pt")
    with pytest.raises(ValueError, match=r"neither its name nor its tensors .* say of which format it is: give format="):
        SAE.from_pretrained(tmp_path / "R1-SAE-l19.pt")
    formula(SAE.from_pretrained(tmp_path / "R1-SAE-l19.pt", format="deepseek_r1"), f, f @ Wd + bd)
    torch.save({**MAJOR, "W_dec": W_DEC.T}, tmp_path / "layer0.sae.pt")
    f = topk(X @ W_ENC.T + B_ENC)
    with pytest.raises(ValueError, match=r"k is in the name of its repository .* give it as k="):
        SAE.from_pretrained(tmp_path / "layer0.sae.pt")
    agrees(SAE.from_pretrained(tmp_path / "layer0.sae.pt", k=K), f, f @ W_DEC + B_DEC)
    named = tmp_path / "models--Qwen--SAE-Res-Qwen3-1.7B-Base-W1K-L0_4" / "snapshots"
    named.mkdir(parents=True)
    with pytest.raises(ValueError, match=f"claims its folder's name=1024, the tensors have {F}"):
        SAE.from_pretrained((tmp_path / "layer0.sae.pt").rename(named / "layer0.sae.pt"))
    W, b = draw(1024, D), draw(1024)
    torch.save({"W_enc": W, "b_enc": b, "W_dec": W.T, "b_dec": B_DEC}, named / "layer0.sae.pt")
    f = topk(X @ W.T + b)
    agrees(SAE.from_pretrained(named / "layer0.sae.pt"), f, f @ W + B_DEC)


def test_saelens_trainers_checkpoints(tmp_path: Path) -> None:
    """``save_checkpoint`` of its trainer: training configurations, the scale of the inputs beside them."""
    base = {"d_in": D, "d_sae": F, "apply_b_dec_to_input": True, "normalize_activations": "expected_average_only_in"}
    lens = {**BARE, "topk_threshold": torch.tensor(0.3, dtype=torch.float64)}
    s, n = 1.7, NORMS.double()
    z = (s * x - bd) @ We.T + be
    for architecture, rescale in (("batchtopk", True), ("batchtopk", False), ("matryoshka_batchtopk", True)):
        config = {**base, "architecture": architecture, "k": 3.5, "topk_threshold_lr": 0.02, "rescale_acts_by_decoder_norm": rescale}
        config |= {"matryoshka_widths": [5, F]} if "matryoshka" in architecture else {}
        folder = saelens(tmp_path / f"{architecture}{rescale}", config, lens)
        (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": s}))
        sae = SAE.from_pretrained(folder)
        p = (z * n if rescale else z).relu()
        f = p * (p > 0.3)
        formula(sae, f / s if rescale else f, ((f / n if rescale else f) @ Wd + bd) / s)
        assert isinstance(sae.activation, BatchTopK) and (sae.k, sae.activation.rate) == (3.5, 0.02)
        assert sae.prefixes == config.get("matryoshka_widths")
    with pytest.raises(ValueError, match="'expected_average_only_in', whose factor the file holds"):
        SAE.from_pretrained(folder, scaling_factor=2.0)
    del lens["topk_threshold"]  # which would fire on everything
    with pytest.raises(ValueError, match=r"missing \['topk_threshold'\]"):
        SAE.from_pretrained(saelens(tmp_path / "without", {**config, "normalize_activations": "none"}, lens))


def test_dictionary_learning_of_other_times(tmp_path: Path) -> None:
    f = topk((X - B_DEC) @ W_ENC.T + B_ENC)
    linear, bare = {**LINEAR, "b_dec": B_DEC}, {**BARE}
    triton = {"encoder.weight": W_ENC, "encoder.bias": B_ENC, "decoder": W_DEC, "b_dec": B_DEC}
    for number, tensors in enumerate((linear, bare, triton, {**linear, "k": torch.tensor(float(K))}, {**linear, "k": torch.tensor([K])})):
        for kind in ("AutoEncoderTopK", "TopKSAE"):
            folder = dl(tmp_path / f"{number}{kind}", kind, tensors, k=float(K))
            agrees(SAE.from_pretrained(folder), f, f @ W_DEC + B_DEC)
    z = ((X - B_DEC) @ W_ENC.T + B_ENC).relu()
    f = z * (z > 0.8)
    sae = SAE.from_pretrained(dl(tmp_path / "b", "BatchTopKSAE", {**bare, "k": torch.tensor(2.5), "threshold": torch.tensor([0.8])}))
    agrees(sae, f, f @ W_DEC + B_DEC)
    assert sae.k == 2.5
    with pytest.raises(ValueError, match=r"k must be an int of at least 1, got 2.5"):
        SAE.from_pretrained(dl(tmp_path / "n", "AutoEncoderTopK", {**bare, "k": torch.tensor(2.5)}))
    with pytest.raises(ValueError, match="k must be an int of at least 1, got None"):  # not one that fires on everything
        SAE.from_pretrained(dl(tmp_path / "m", "BatchTopKSAE", linear))
    f = topk((X - B_DEC) @ W_ENC.T + B_ENC)
    agrees(SAE.from_pretrained(tmp_path / "m", k=K), f, f @ W_DEC + B_DEC)
    with pytest.raises(ValueError, match=f"k=3 is for files that do not hold it, this one's is {K}"):
        SAE.from_pretrained(tmp_path / "0TopKSAE", k=3)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "ae.", "module._orig_mod.ae.", "model.sae."])
def test_prefixes_of_wrappers(tmp_path: Path, prefix: str) -> None:
    f = topk((X - B_DEC) @ W_ENC.T + B_ENC)
    tensors = {prefix + name: tensor for name, tensor in {**LINEAR, "b_dec": B_DEC}.items()}
    agrees(SAE.from_pretrained(dl(tmp_path, "AutoEncoderTopK", tensors, k=K)), f, f @ W_DEC + B_DEC)


def test_dictionary_learning_backups(tmp_path: Path) -> None:
    """What it overwrites while it trains: the inputs divided by ``norm_factor``, the configuration inside."""
    counters = {"k": torch.tensor(K), "threshold": torch.tensor(0.3)}
    config = {"dict_class": "BatchTopKSAE", "activation_dim": D, "dict_size": F, "k": K}
    backup = {"step": 7, "ae": {**LINEAR, "b_dec": B_DEC, **counters}, "optimizer": {"state": {}}, "config": config, "norm_factor": 3.0}
    torch.save(backup, tmp_path / "ae.pt")
    p = ((x / 3 - bd) @ We.T + be).relu()
    f = 3 * p * (p > 0.3)
    for source in (tmp_path, tmp_path / "ae.pt", (tmp_path / "ae.pt")):
        formula(SAE.from_pretrained(source), f, f @ Wd + 3 * bd)
    (tmp_path / "ae.pt").rename(tmp_path / "backup_7.pt")
    formula(SAE.from_pretrained(tmp_path / "backup_7.pt"), f, f @ Wd + 3 * bd)


PEAK = """
import sys
from fastsae import JumpReLU, SAE
import numpy, torch, safetensors.torch
SAE(2, 3, JumpReLU(), device="meta")  # what is imported at first use is no part of a file
options = {"format": sys.argv[2]} if len(sys.argv) > 2 else {}
field = lambda name: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
import threading, time
peak, stop = [0], threading.Event()
def watch():
    while not stop.is_set():
        peak[0] = max(peak[0], field("RssAnon"))
        time.sleep(0.001)
before = field("RssAnon")
thread = threading.Thread(target=watch); thread.start()
sae = SAE.from_pretrained(sys.argv[1], **options)
stop.set(); thread.join()
print((peak[0] - before) * 1024 / sum(p.numel() * p.element_size() for p in sae.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory as Linux counts it")
@pytest.mark.parametrize("kind", ["folded", "pt", "npz"])
def test_loading_takes_no_more_than_the_tensors(tmp_path: Path, kind: str) -> None:
    """Beside the file's own pages, which are the page cache's."""
    d, f = 512, 16384
    wide = {"W_enc": torch.randn(d, f), "b_enc": torch.zeros(f), "W_dec": torch.randn(f, d), "b_dec": torch.zeros(d)}
    if kind == "pt":
        linear = {
            "encoder.weight": wide["W_dec"],
            "encoder.bias": wide["b_enc"],
            "decoder.weight": wide["W_enc"],
            "decoder.bias": wide["b_dec"],
        }
        torch.save(linear, tmp_path / "sae.pt")
        source = [str(tmp_path / "sae.pt"), "deepseek_r1"]
    elif kind == "npz":
        source = [str(write(tmp_path, None, {**wide, "threshold": wide["b_enc"]}, "params.npz"))]
    else:
        config = {"architecture": "topk", "k": 8, "rescale_acts_by_decoder_norm": True, "d_in": d, "d_sae": f}
        source = [str(saelens(tmp_path, config, wide))]
    run = subprocess.run([sys.executable, "-c", PEAK, *source], capture_output=True, text=True, check=True, env={**os.environ})
    assert float(run.stdout) < 1.3


OURS: dict[str, Callable[[], SAE]] = {
    "relu": lambda: SAE(D, F, ReLU(), d_out=D, seed=0),
    "jumprelu, skip": lambda: SAE(D, F, JumpReLU(0.3), d_out=D, skip=True, seed=0),
    "pre-bias": lambda: SAE(D, F, ReLU(), seed=0),
    "batchtopk": lambda: SAE(D, F, BatchTopK(K), d_out=D, seed=0),
}


@pytest.mark.parametrize("name", OURS)
def test_circuit_tracers_own_loader_reads_ours(tmp_path: Path, name: str) -> None:
    ours = OURS[name]()
    with torch.no_grad():
        for number, parameter in enumerate(ours.parameters()):
            parameter.add_(draw(*parameter.shape, seed=number) / 5)
        if name == "batchtopk":
            ours.running_threshold.fill_(0.4)
    ours.eval()
    path = ours.save_pretrained(tmp_path, format="circuit_tracer") / "layer_0.safetensors"
    run = ours(X)
    again = SAE.from_pretrained(path)(X)
    torch.testing.assert_close(again.x_hat, run.x_hat)
    for activation, message in ((TopK(K), "files hold ReLU and JumpReLU"),):
        with pytest.raises(ValueError, match=message):
            SAE(D, F, activation, d_out=D, seed=0).save_pretrained(tmp_path / "no", format="circuit_tracer")
    module = pytest.importorskip("circuit_tracer.transcoder.single_layer_transcoder", reason="circuit-tracer is not installed")
    for lazy in (True, False):
        theirs = module.load_relu_transcoder(str(path), 0, torch.device("cpu"), lazy_encoder=lazy, lazy_decoder=lazy)
        torch.testing.assert_close(theirs(X), run.x_hat, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs.encode(X), run.latents.to_dense(), rtol=1e-5, atol=1e-5)
        theirs.to_safetensors(str(tmp_path / "theirs.safetensors"))
        torch.testing.assert_close(SAE.from_pretrained(tmp_path / "theirs.safetensors")(X).x_hat, run.x_hat, rtol=1e-5, atol=1e-5)
