"""Cross-layer transcoders and crosscoders against the libraries that have them: circuit-tracer's loader and llamascopium's modules."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import load, same
from torch import Tensor

import fastsae
from fastsae import BatchTopK, JumpReLU, ReLU, TopK
from fastsae.gradients import densify
from fastsae.sae import Crosscoder, CrossLayerTranscoder

circuit = load("circuit_tracer.transcoder.cross_layer_transcoder", "circuit-tracer")
llama_clt = load("llamascopium.models.clt", "llamascopium")
llama_crosscoder = load("llamascopium.models.crosscoder", "llamascopium")

L, D, F, B = 3, 8, 32, 12
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@torch.no_grad()
def build(activation: Any, dtype: torch.dtype = torch.float32) -> CrossLayerTranscoder:
    clt = CrossLayerTranscoder(L, D, F, activation, seed=0, dtype=dtype)
    clt.b_dec.copy_(rows(L, D, seed=3))
    for number, layer in enumerate(clt):
        layer.b_enc.copy_(0.3 * rows(F, seed=number))
    return clt


@pytest.mark.parametrize("activation", [ReLU(), JumpReLU(torch.linspace(0, 1, F)), BatchTopK(4)], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("lazy", [False, True])
def test_circuit_tracer_loads_ours_and_we_load_its(activation: Any, lazy: bool, tmp_path: Path) -> None:
    clt, x = build(activation), rows(B, L, D)
    clt.step_gradients(x, x)
    clt.eval().save_pretrained(tmp_path / "ours")
    theirs = circuit.load_clt(str(tmp_path / "ours"), device=torch.device("cpu"), dtype=torch.float32, lazy_decoder=lazy)
    with torch.no_grad():
        same(theirs(x.transpose(0, 1)).transpose(0, 1), clt(x))
        codes = theirs.encode(x.transpose(0, 1))
        for mine, code in zip(clt.encode(x), codes):
            same(mine.to_dense(), code)
        theirs.to_safetensors(str(tmp_path / "theirs"))
    again = CrossLayerTranscoder.from_pretrained(tmp_path / "theirs")
    assert torch.equal(again(x), clt(x))


def llama(kind: str, k: int) -> Any:
    hooks = [f"layer{n}" for n in range(L)]
    options: dict[str, Any] = {"hook_points_in": hooks, "hook_points_out": [f"{hook}.out" for hook in hooks]}
    options |= {"d_model": D, "expansion_factor": F / D, "act_fn": kind, "top_k": k, "sparsity_include_decoder_norm": False}
    return llama_clt.CrossLayerTranscoder(llama_clt.CLTConfig(**options, device="cpu", dtype=torch.float64))


@torch.no_grad()
def give(theirs: Any, clt: CrossLayerTranscoder) -> None:
    """llamascopium keeps decoders by target: ``W_D[m] [m + 1, F, D]``."""
    for n, layer in enumerate(clt):
        theirs.W_E[n].copy_(layer.W_enc.T)
        theirs.b_E[n].copy_(layer.b_enc)
        theirs.b_D[n].copy_(clt.b_dec[n])
        for m in range(n, L):
            theirs.W_D[m][n].copy_(clt.W_dec(n)[:, m - n])


@pytest.mark.parametrize(
    ("kind", "activation", "k"), [("topk", TopK(4), 4), ("batchlayertopk", BatchTopK(4 / L), 4), ("relu", ReLU(), 4)], ids=lambda v: str(v)
)
def test_llamascopiums_cross_layer_transcoder(kind: str, activation: Any, k: int) -> None:
    """Outputs, gradients, and a hundred steps of Adam on its own module; its k of ``batchlayertopk`` is of all layers."""
    clt, theirs = build(activation, torch.float64), llama(kind, k)
    give(theirs, clt)
    x, target = rows(B, L, D, dtype=torch.float64), rows(B, L, D, seed=1, dtype=torch.float64)

    def loss(x: Tensor, target: Tensor) -> Tensor:
        return (theirs.decode(theirs.encode(x), batch_first=True) - target).square().sum() / len(x)

    same(theirs.encode(x).detach(), torch.stack([latents.to_dense() for latents in clt.encode(x)], 1).detach(), 1e-12)
    metrics, gradients = copy.deepcopy(clt).step_gradients(x, target)
    theirs.zero_grad()
    value = loss(x, target)
    value.backward()
    assert torch.allclose(metrics.loss, value)
    for n in range(L):
        same(theirs.W_E.grad[n].T, densify(gradients[f"layers.{n}.W_enc"]), 1e-10)
        W_dec = densify(gradients[f"layers.{n}.W_dec"]).view(F, L - n, D)
        for m in range(n, L):
            same(theirs.W_D[m].grad[n], W_dec[:, m - n], 1e-10)
    ours, opt = fastsae.optim.Adam(clt, lr=1e-3), torch.optim.Adam(theirs.parameters(), lr=1e-3)
    for step in range(100):
        x, target = rows(B, L, D, seed=2 * step, dtype=torch.float64), rows(B, L, D, seed=2 * step + 1, dtype=torch.float64)
        opt.zero_grad()
        loss(x, target).backward()
        opt.step()
        ours.step(x, target)
    for n in range(L):
        for a, b in ((theirs.W_E[n].T, clt[n].W_enc), (theirs.W_D[L - 1][n], clt.W_dec(n)[:, -1]), (theirs.b_D[n], clt.b_dec[n])):
            assert float((a - b).detach().abs().max()) < 1e-4  # 0.1 of a step


def test_llamascopiums_crosscoder() -> None:
    """ReLU, whose activation its factor of the decoder's norms does not change; with its L1 penalty, a sum over heads of norms."""
    config = {"hook_points": [f"layer{n}" for n in range(L)], "d_model": D, "expansion_factor": F / D, "act_fn": "relu"}
    theirs = llama_crosscoder.Crosscoder(llama_crosscoder.CrosscoderConfig(**config, device="cpu", dtype=torch.float64))
    ours, x = Crosscoder(L, D, F, ReLU(), l1=0.1, seed=0, dtype=torch.float64), rows(B, L, D, dtype=torch.float64)
    with torch.no_grad():
        ours.b_enc.copy_(0.3 * rows(F))
        theirs.W_E.copy_(ours.encoders.permute(1, 2, 0))
        theirs.W_D.copy_(ours.decoders.permute(1, 0, 2))
        theirs.b_E.copy_(ours.b_enc / L)  # of each head, summed
        theirs.b_D.copy_(ours.biases)
    acts = theirs.encode(x)
    same(acts[:, 0].detach(), ours.encode(x).to_dense().detach(), 1e-12)
    value = (theirs.decode(acts) - x).square().sum() / B + 0.1 * (acts * theirs.decoder_norm()).sum() / B
    value.backward()
    metrics, gradients = ours.step_gradients(x)
    assert torch.allclose(metrics.loss, value)
    same(theirs.W_E.grad.permute(2, 0, 1).flatten(1), densify(gradients["W_enc"]), 1e-10)
    same(theirs.W_D.grad.permute(1, 0, 2).flatten(1), densify(gradients["W_dec"]), 1e-10)
