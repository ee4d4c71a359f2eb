"""Dictionaries of dictionary_learning, each beside an accelerated copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peers import load
from torch import Tensor

dictionary_learning = load("dictionary_learning", "dictionary-learning")
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder  # noqa: E402
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402

D, F, K, ROWS = 24, 96, 5, 40
CLASSES: dict[str, Callable[[], Any]] = {
    "AutoEncoder": lambda: AutoEncoder(D, F),
    "AutoEncoderNew": lambda: AutoEncoderNew(D, F),
    "GatedAutoEncoder": lambda: GatedAutoEncoder(D, F),
    "JumpReluAutoEncoder": lambda: JumpReluAutoEncoder(D, F),
    "AutoEncoderTopK": lambda: AutoEncoderTopK(D, F, K),
    "BatchTopKSAE": lambda: BatchTopKSAE(D, F, K),
    "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D, F, K, [16, 30, 50]),
}


def make(name: str, shift: float = 0.0, threshold: float | None = None) -> Any:
    """A dictionary with every parameter away from its start; ``shift`` lowers the encoder's biases, so that fewer latents fire."""
    ae = CLASSES[name]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter, p in ae.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.dim() == 2 else 0.1))
            if parameter in ("encoder.bias", "b_enc", "gate_bias"):
                p.sub_(shift)
            if parameter == "threshold":
                p.abs_()
        if threshold is not None:
            ae.threshold.fill_(threshold)
    return ae


def rows(*batch: int, seed: int = 1, width: int = D) -> Tensor:
    return torch.randn(*(batch or (ROWS,)), width, generator=torch.Generator().manual_seed(seed))
