"""SAEs of SAELens, each beside an accelerated copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peers import load, same
from torch import Tensor

from fastsae.patch import saelens

sae_lens = load("sae_lens", "sae-lens")
from sae_lens import saes  # noqa: E402
from sae_lens.config import LoggingConfig, SAETrainerConfig  # noqa: E402

D, F, OUT, ROWS = 24, 96, 13, 40
KINDS = {name.split(".")[1]: kind for name, kind in saelens._sae.KINDS.items()}


def options(name: str, **more: Any) -> dict[str, Any]:
    if KINDS[name].transcoder:
        more |= {"d_out": OUT, "apply_b_dec_to_input": False}
    if "TopK" in name:
        more.setdefault("k", 4.5 if "Batch" in name else 5)
    if "Matryoshka" in name:
        more.setdefault("matryoshka_widths", [10, 40, F])
    if "Pursuit" in name:
        more.setdefault("max_iterations", 6)
        more |= {"decoder_init_norm": 1.0} if KINDS[name].training else {}
    return more


def make(name: str, shift: float = 0.0, seed: int = 0, **more: Any) -> Any:
    """An SAE with every parameter away from its start; ``shift`` lowers the encoder's biases, so that fewer latents fire."""
    cls = getattr(saes, name, None) or getattr(saes.transcoder, name)
    config = getattr(saes, name + "Config", None) or getattr(saes.transcoder, name + "Config")
    sae = cls(config(**{"d_in": D, "d_sae": F} | options(name, **more)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, p in sae.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.dim() == 2 else 0.1))
            if parameter_name in ("b_enc", "b_gate"):
                p.sub_(shift)
            if parameter_name == "threshold":
                p.abs_()
            if "Pursuit" in name and p.dim() == 2:
                p.div_(1.02 * p.norm(dim=1, keepdim=True))  # with rows far from norm 1 nothing is found
    return sae


def rows(*batch: int, seed: int = 1, width: int = D) -> Tensor:
    return torch.randn(*(batch or (ROWS,)), width, generator=torch.Generator().manual_seed(seed))


def trainer_of(name: str, folder: Path | None = None, data: Any = (), steps: int = 60, trainer: Any = (), **more: Any) -> Any:
    torch.manual_seed(0)
    sae = make(name, **more)
    if "Standard" not in name and "Gated" not in name:  # close to where training starts, so that AuxK has something to do
        with torch.no_grad():
            sae.W_enc.copy_(sae.W_dec.T)
    settings: dict[str, Any] = {
        "lr_scheduler_name": "cosineannealing", "lr_end": 1e-4, "lr_warm_up_steps": 3, "lr_decay_steps": 20, "dead_feature_window": 2,
        "feature_sampling_window": 4, "checkpoint_path": None if folder is None else str(folder),
        "logger": LoggingConfig(log_to_wandb=False),
    }  # fmt: skip
    settings |= dict(trainer)
    config = SAETrainerConfig(total_training_samples=steps * ROWS, train_batch_size_samples=ROWS, lr=1e-3, **settings)
    return sae_lens.SAETrainer(config, sae, iter(data))


def same_trainers(mine: Any, theirs: Any, lr: float = 1e-3) -> None:
    """Moments and thresholds to rounding, counters and schedules exactly.

    Weights to 0.1 of a step of Adam, all but one in a thousand to 1e-3 of it: where a gradient cancels its step is its rounding's sign.
    """
    for (name, p), q in zip(mine.sae.named_parameters(), theirs.sae.named_parameters(), strict=True):
        assert name == q[0]
        moved = (p - q[1]).detach().abs()
        assert float(moved.max()) <= 0.1 * lr and float((moved > 1e-3 * lr).double().mean()) < 1e-3, name
        a, b = mine.optimizer.state[p], theirs.optimizer.state[q[1]]
        assert a.keys() == b.keys() and a["step"] == b["step"] and a["step"].dtype is b["step"].dtype
        for moment in ("exp_avg", "exp_avg_sq"):
            same(a[moment], b[moment], 1e-5)
        assert p.grad is None and q[1].grad is None
    for name, buffer in theirs.sae.named_buffers():
        same(mine.sae.get_buffer(name), buffer)
    for name in ("act_freq_scores", "n_forward_passes_since_fired"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    assert mine.n_frac_active_samples == theirs.n_frac_active_samples and mine.n_training_samples == theirs.n_training_samples
    assert mine.lr_scheduler.state_dict()["_last_lr"] == theirs.lr_scheduler.state_dict()["_last_lr"]
    assert mine.get_coefficients() == theirs.get_coefficients()


class TopK(saes.topk_sae.TopK):
    """Of the library's name, and another function."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2
