"""Small runs that several test files train, in this process and in others."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch
from places import ROOT, TESTS
from torch import Tensor

from fastsae import SAE, AuxK, BatchTopK, Gated, JumpReLU, ReLU, TopK
from fastsae.gradients import densify
from fastsae.sae.losses import Metrics
from fastsae.trainer import Batches

KINDS: dict[str, dict[str, Any]] = {
    "topk": {"activation": TopK(4), "aux": AuxK(8), "dead_after": 300},
    "batchtopk": {"activation": BatchTopK(3.0), "prefixes": [8, 32]},
    "jumprelu": {"activation": JumpReLU(0.1, bandwidth=0.2), "l0": 0.01},
    "relu": {"activation": ReLU(), "l1": 0.02},
    "gated": {"activation": Gated(), "l1": 0.02},
    "transcoder": {"activation": TopK(4), "d_out": 5, "skip": True},
    "tied": {"activation": TopK(4), "tied": True},
}


def data(n: int = 200, width: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    code = torch.rand(n, 24, generator=generator) * (torch.rand(n, 24, generator=generator) < 0.1)
    return code @ torch.nn.functional.normalize(torch.randn(24, width, generator=generator), dim=1)


def build(kind: str = "topk", **options: Any) -> SAE:
    return SAE(12, 32, **{"seed": 0, **KINDS[kind], **options})


def batches(sae: SAE, size: int = 20) -> Batches:
    target = data(seed=1)[:, : sae.d_out] if sae.transcoder else None
    return Batches(data(), target, torch.arange(200) % 7 != 0, size=size, seed=3)


class Fused:
    """A fused optimiser in miniature: gradients by hand, torch's Adam, unit rows."""

    def __init__(self, sae: SAE, lr: float):
        self.sae, self.inner = sae, torch.optim.Adam(sae.parameters(), lr=lr)

    def step(self, x: Tensor, target: Tensor | None = None, mask: Tensor | None = None) -> Metrics:
        metrics, gradients = self.sae.step_gradients(x, target, mask)
        for name, parameter in self.sae.named_parameters():
            parameter.grad = densify(gradients[name])
        if self.sae.unit_rows:
            self.sae.remove_parallel_gradient_()
        self.inner.step()
        if self.sae.unit_rows:
            self.sae.normalise_decoder_()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


def adam(sae: SAE, lr: float = 3e-3) -> torch.optim.Optimizer:
    return torch.optim.Adam(sae.parameters(), lr=lr)


def same(a: SAE, b: SAE) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def launch(code: str, *arguments: Any, **environment: str) -> subprocess.Popen[str]:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)]), **environment}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)


def both(script: str, folder: Path) -> None:
    processes = [launch(script, rank, folder, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1") for rank in range(2)]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
