"""What a strict type checker sees of the public API."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from package_sources import PACKAGE

SNIPPET = """
from typing import assert_type

from torch import Tensor

import fastsae
from fastsae import optim
from fastsae.compare import match
from fastsae.latents import Latents, RaggedLatents, TopKLatents


def use(x: Tensor, W: Tensor, folder: str) -> None:
    assert_type(fastsae.encode_topk(x, W, k=3), TopKLatents)
    assert_type(fastsae.encode_topk(x, W, k=3).indices, Tensor)
    sae = fastsae.SAE(4, 12, fastsae.TopK(3))
    assert_type(sae.encode(x).indices, Tensor)
    assert_type(sae(x).latents.indices, Tensor)
    assert_type(sae.eval().encode(x), TopKLatents)
    x_hat, latents, squared_error = fastsae.SAE(4, 12, fastsae.ReLU())(x)
    assert_type((x_hat, latents, squared_error), tuple[Tensor, RaggedLatents, Tensor])
    assert_type(fastsae.SAE(4, 12).encode(x), TopKLatents)
    assert_type(fastsae.SAE.load(folder).encode(x), Latents)
    assert_type(sae.loss(x).loss, Tensor)
    opt = optim.Adam(sae)
    assert_type(opt.step(x).loss, Tensor)
    assert_type(optim.Signum(fastsae.SAEs([sae])).step(x).dead, Tensor)
    assert_type(match(W, W).mmcs(), float)
"""


def test_main_results_are_typed_exactly(tmp_path: Path) -> None:
    checker = shutil.which("pyright") or shutil.which("pyright", path=str(Path(sys.executable).parent))
    if checker is None:
        pytest.skip("pyright is not installed")
    (tmp_path / "snippet.py").write_text(SNIPPET)
    settings = f'{{"include": ["."], "typeCheckingMode": "strict", "pythonVersion": "3.11", "extraPaths": ["{PACKAGE.parent}"]}}'
    (tmp_path / "pyrightconfig.json").write_text(settings)
    command = [checker, "-p", str(tmp_path), "--pythonpath", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
