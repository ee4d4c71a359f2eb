"""What a library would write on ``fastsae.functional`` alone, equal to its own step: a TopK SAE of SAELens, the two kernels of sparsify."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch
from peers import load, same
from torch import Tensor

F = importlib.metadata.entry_points(group="sae.backends")["fastsae"].load().require(api=1)
sae_lens = load("sae_lens", "sae-lens")
sparsify = load("sparsify", "eai-sparsify")

from sae_lens.config import LoggingConfig, SAETrainerConfig  # noqa: E402
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput  # noqa: E402
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig  # noqa: E402
from sparsify import SparseCoder, SparseCoderConfig, fused_encoder, sparse_coder  # noqa: E402

D, N_FEATURES, K, ROWS, LR = 24, 96, 5, 40, 1e-3

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def rows(seed: int) -> Tensor:
    return torch.randn(ROWS, D, generator=torch.Generator().manual_seed(seed))


def start(module: torch.nn.Module) -> None:
    """Every parameter away from its start, the same for two modules."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.dim() == 2 else 0.1))


def same_parameters(mine: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """To 0.1 of a step of Adam, all but one in a thousand to 1e-3 of it: where a gradient cancels its step is its rounding's sign."""
    for (name, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        moved = (p - q).detach().abs()
        assert float(moved.max()) <= 0.1 * LR and float((moved > 1e-3 * LR).double().mean()) < 1e-3, name


# ---------------------------------------------------------------- SAELens


class FastTopK(TopKTrainingSAE):
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        x, dead, scale = step_input.sae_in, step_input.dead_neuron_mask, None
        inputs, W, b = self.process_sae_in(x), self.W_enc.T, self.b_enc
        if self.cfg.rescale_acts_by_decoder_norm:
            scale = self.W_dec.norm(dim=-1)
            b = b * scale
        if F.refuses("encode_topk", inputs, W, b, k=self.cfg.k, scale=scale) is not None:
            return super().training_forward_pass(step_input)

        def product(values: Tensor, indices: Tensor) -> Tensor:
            return F.decode(values if scale is None else values * (1 / scale)[indices], indices, self.W_dec)

        values, indices = F.encode_topk(inputs, W, b, k=self.cfg.k, scale=scale)
        out = product(values, indices) + self.b_dec
        losses = {"mse_loss": self.mse_loss_fn(out, x).sum(dim=-1).mean(), "auxiliary_reconstruction_loss": out.new_tensor(0.0)}
        if dead is not None and (n_dead := int(dead.sum())):
            most = D // 2
            aux = product(*F.encode_topk(inputs, W, b, k=min(most, n_dead), scale=scale, features=dead, relu=False))
            error = (aux - (x - out).detach()).pow(2).sum(-1).mean()
            losses["auxiliary_reconstruction_loss"] = self.cfg.aux_loss_coefficient * min(n_dead / most, 1.0) * error
        row = torch.arange(len(x)).repeat_interleave(self.cfg.k)
        acts = torch.sparse_coo_tensor(torch.stack([row, indices.flatten()]), values.detach().flatten(), (len(x), self.cfg.d_sae))
        return TrainStepOutput(x, out, acts, hidden_pre=None, loss=sum(losses.values()), losses=losses)  # pyright: ignore[reportArgumentType]


def trainer_of(kind: type[TopKTrainingSAE], **config: Any) -> Any:
    sae = kind(TopKTrainingSAEConfig(d_in=D, d_sae=N_FEATURES, k=K, **config))
    start(sae)
    settings: Any = {
        "lr_end": LR,
        "lr_warm_up_steps": 3,
        "lr_decay_steps": 0,
        "checkpoint_path": None,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    samples = {
        "total_training_samples": 60 * ROWS,
        "train_batch_size_samples": ROWS,
        "feature_sampling_window": 4,
        "dead_feature_window": 2,
    }
    trains = SAETrainerConfig(lr=LR, lr_scheduler_name="constant", **samples, **settings)
    return sae_lens.SAETrainer(trains, sae, iter(()))


@pytest.mark.parametrize("rescale", [True, False])
def test_a_topk_training_sae_of_saelens(rescale: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = (trainer_of(kind, rescale_acts_by_decoder_norm=rescale) for kind in (FastTopK, TopKTrainingSAE))
    monkeypatch.setattr(FastTopK, "encode_with_hidden_pre", None)  # the library's own way would need it
    died = 0
    for step in range(8):
        a, b = mine.step(rows(step)), theirs.step(rows(step))
        died += int(theirs.dead_neurons.sum())
        for name in b.losses:
            same(a.losses[name].detach(), b.losses[name].detach())
        same(a.sae_out.detach(), b.sae_out.detach())
        same(a.feature_acts.to_dense(), b.feature_acts.detach())
        same_parameters(mine.sae, theirs.sae)
        assert torch.equal(mine.n_forward_passes_since_fired, theirs.n_forward_passes_since_fired)
        assert torch.equal(mine.act_freq_scores, theirs.act_freq_scores)
    assert died


# ---------------------------------------------------------------- sparsify


def fast_encoder(x: Tensor, weight: Tensor, bias: Tensor, k: int, activation: str) -> Any:
    if activation != "topk" or F.refuses("encode_topk", x, weight, bias, k=k) is not None:
        return fused_encoder.fused_encoder(x, weight, bias, k, activation)  # pyright: ignore[reportArgumentType]
    values, indices = F.encode_topk(x, weight, bias, k=k)
    return fused_encoder.EncoderOutput(values, indices, None)  # pyright: ignore[reportArgumentType]


def fast_decoder(indices: Tensor, values: Tensor, W: Tensor) -> Tensor:
    return F.decode(values, indices, W.mT)


@pytest.mark.parametrize("config", [{}, {"transcode": True, "skip_connection": True}])
def test_the_kernels_of_sparsify(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    coders = [SparseCoder(D, SparseCoderConfig(num_latents=N_FEATURES, k=K, **config)) for _ in range(2)]
    for coder in coders:
        start(coder)
    optimizers = [torch.optim.Adam(coder.parameters(), lr=LR) for coder in coders]
    calls = []
    for step in range(8):
        outs, gradients = [], []
        for fast, coder, optimizer in zip((True, False), coders, optimizers):
            with monkeypatch.context() as patched:
                if fast:
                    patched.setattr(sparse_coder, "fused_encoder", lambda *args: calls.append(1) or fast_encoder(*args))
                    patched.setattr(sparse_coder, "decoder_impl", fast_decoder)
                coder.set_decoder_norm_to_unit_norm()
                outs.append(coder(rows(step), rows(step + 50) if config else None))
            outs[-1].fvu.backward()
            coder.remove_gradient_parallel_to_decoder_directions()
            gradients.append([p.grad for p in coder.parameters()])
            optimizer.step()
            optimizer.zero_grad()
        for a, b in ((outs[0].fvu, outs[1].fvu), (outs[0].sae_out, outs[1].sae_out), *zip(*gradients, strict=True)):
            same(a, b)
        same_parameters(*coders)
    assert len(calls) == 8
