"""The peer libraries' TopK SAEs and training steps as ``fastsae.accelerate`` takes them, built from a ``training.Start``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import fastsae
from bench import training
from bench.training import Runner, Start, copy_, sparsify_coder, sparsify_step
from fastsae.patch import sparsify


@dataclass(frozen=True)
class Peer:
    """One library.

    Attributes:
        sae: an SAE for inference. encode: its latents as its own API returns them. dense: those as ``[B, F]``, to compare.
        training: a trainer with a step to call.
        encoder: the encoder's weights ``[F, D]`` as ``fastsae.encode`` takes a handle of them, where it does.
    """

    sae: Callable[[Start], Any]
    encode: Callable[[Any, Tensor], Any]
    dense: Callable[[Any], Tensor]
    training: Callable[[Start], Runner]
    encoder: Callable[[Any], Tensor] | None = None


class Tokens:
    """What the peers' evaluations ask an activation store for."""

    def __init__(self, tokens: Tensor, batch: int):
        self.tokens, self.context_size, self.store_batch_size_prompts = tokens, tokens.shape[1], batch
        self.reset_input_dataset()

    def reset_input_dataset(self) -> None:
        self.parts = iter(self.tokens.split(self.store_batch_size_prompts))

    def get_batch_tokens(self, batch: int) -> Tensor:
        return next(self.parts)


def _saelens_sae(start: Start) -> Any:
    from sae_lens import TopKSAE, TopKSAEConfig

    features, width = start.W.shape
    sae = TopKSAE(TopKSAEConfig(d_in=width, d_sae=features, k=start.k, device=str(start.W.device)))
    copy_((sae.W_enc, start.W.T), (sae.W_dec, start.W), (sae.b_dec, start.b_dec))
    return sae


def _sparsify_dense(out: Any) -> Tensor:
    return torch.zeros(out.top_acts.shape[0], out.pre_acts.shape[1]).scatter(1, out.top_indices, out.top_acts)


def _sparsify_training(start: Start) -> Runner:
    """As it is by the library's own calls, accelerated by ``train_step``."""
    made = training.sparsify(start)

    def step(x: Tensor) -> object:
        return (sparsify.train_step if fastsae.report(made.target).accelerated else sparsify_step)(made.target, made.opt, x)

    return replace(made, step=step)


def _dictionary_learning_sae(start: Start) -> Any:
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    features, width = start.W.shape
    ae = AutoEncoderTopK(width, features, start.k).to(start.W.device)
    copy_((ae.encoder.weight, start.W), (ae.decoder.weight, start.W.T), (ae.b_dec, start.b_dec))
    return ae


PEERS = {
    "SAELens": Peer(_saelens_sae, lambda sae, x: sae.encode(x), lambda acts: acts, training.saelens, lambda sae: sae.W_enc.detach().T),
    "sparsify": Peer(sparsify_coder, lambda coder, x: coder.encode(x), _sparsify_dense, _sparsify_training),
    "dictionary_learning": Peer(_dictionary_learning_sae, lambda ae, x: ae.encode(x), lambda acts: acts, training.dictionary_learning),
}


def check_encode(peer: Peer, sae: Any, accelerated: Any, x: Tensor) -> None:
    """Raises AssertionError unless all ways select the same features with the same values up to rounding; ``x`` has no near ties."""
    theirs = peer.dense(peer.encode(sae, x))
    for ours in (peer.dense(peer.encode(accelerated, x)), fastsae.encode(sae, x).to_dense()):
        if not torch.equal(ours != 0, theirs != 0):
            raise AssertionError("other features are selected")
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def check_step(mine: Runner, theirs: Runner, x: Tensor, lr: float) -> None:
    """Raises AssertionError unless one step of both is the same up to rounding, in weights and moments; tolerances of ``training``.

    A factor within 1e-3 of 1 between the moments is torch's: ``clip_grad_norm_`` sums millions of squares in float32 (against float64 it is
    off by 1e-5 to 1e-4 at these shapes, ours by 1e-7).
    """
    mine.step(x)
    theirs.step(x)
    for (name, p), q in zip(mine.module.named_parameters(), theirs.module.parameters(), strict=True):
        for moment in ("exp_avg", "exp_avg_sq"):
            a, b = mine.opt.state[p][moment], theirs.opt.state[q][moment]
            factor = float((a * b).sum(dtype=torch.float64) / a.square().sum(dtype=torch.float64).clamp_min(1e-30))
            error = float(torch.linalg.vector_norm(a * factor - b) / torch.linalg.vector_norm(b).clamp_min(1e-30))
            if not (error < 1e-5 and abs(factor - 1) < 1e-3):
                raise AssertionError(f"{moment} of {name} differs by {error:.1e} of its norm, factor {factor}")
        off = (p - q).abs() > 1e-3 * lr + 1e-6
        if not float(off.double().mean()) < 1e-3:
            raise AssertionError(f"{name} differs in {int(off.sum())} of {off.numel()} elements after one step")
