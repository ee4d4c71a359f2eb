"""What users stumbled over: latents that are handled like tensors, and messages that say what to do."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsae
from fastsae import RaggedLatents, TopKLatents
from fastsae.trainer import Batches

X, W = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) for shape in ((3, 4, 8), (16, 8)))
KINDS = {
    "topk": lambda: fastsae.encode_topk(X, W, k=3),
    "ragged": lambda: fastsae.encode_threshold(X, W, threshold=0.5),
    "padded": lambda: fastsae.encode_threshold(X, W, threshold=0.5, capacity=200),
}


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_handled_like_tensors(kind: str, tmp_path: Path) -> None:
    latents: Any = KINDS[kind]()
    dense = latents.to_dense()
    assert latents.shape == dense.shape == (3, 4, 16) and len(latents) == 3 and bool(latents[:0])
    for rows in (slice(1, 3), slice(None, -1), slice(2, 1), slice(None)):
        assert torch.equal(latents[rows].to_dense(), dense[rows])
    assert torch.equal(latents.to(torch.float64).to_dense(), dense.double())
    assert latents.to("cpu").cpu().values.data_ptr() == latents.values.data_ptr()
    meta = latents.to("meta")
    assert {getattr(meta, name).device.type for name in ("values", "indices" if kind == "topk" else "col")} == {"meta"}
    values = latents.values.clone().requires_grad_()
    made = TopKLatents(values, latents.indices, 16) if kind == "topk" else RaggedLatents(values, latents.crow, latents.col, 16, (3, 4))
    assert made.values.requires_grad and not made.detach().values.requires_grad
    torch.save(latents, tmp_path / "latents.pt")
    read = torch.load(tmp_path / "latents.pt", weights_only=True)
    assert type(read) is type(latents) and torch.equal(read.to_dense(), dense)
    with pytest.raises(TypeError, match="rows must be a slice, got int"):
        latents[0]


@pytest.mark.parametrize("kind", KINDS)
def test_latents_of_one_row(kind: str) -> None:
    encode = {"topk": lambda x: fastsae.encode_topk(x, W, k=3)}.get(kind, lambda x: fastsae.encode_threshold(x, W, threshold=0.5))
    latents: Any = encode(X[0, 0])
    assert latents.shape == (16,)
    with pytest.raises(IndexError, match="one row cannot be sliced"):
        latents[:1]


def test_sparse_tensors_come_without_torch_s_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for make in KINDS.values():
            assert make().to_csc().layout is torch.sparse_csc and make().to_csr().layout is torch.sparse_csr


def test_a_transposed_matrix_is_told() -> None:
    latents = fastsae.encode_topk(X, W, k=3)
    calls: tuple[tuple[Any, str], ...] = (
        (lambda: fastsae.encode_topk(X, W.T, k=3), r"W_enc must have shape \[F, D=8\].*pass W_enc.T"),
        (lambda: fastsae.encode_threshold(X, W.T, threshold=0.5), "pass W_enc.T"),
        (lambda: fastsae.decode(latents, W.T), "pass W_dec.T"),
        (lambda: fastsae.spline_code(X, W.T), "pass W.T"),
        (lambda: fastsae.match(W, W.T), "pass W.T"),
        (lambda: Batches(X, size=2), r"x must have shape \[n, D\], got \[3, 4, 8\]: x.flatten\(0, -2\)"),
    )
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


class _Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.getenv, ("HOME",)


@pytest.mark.parametrize("value", [_Hostile(), torch.nn.Linear(2, 2)], ids=["call", "module"])
def test_errors_of_hostile_files_do_not_advise_to_load_them(value: object, tmp_path: Path) -> None:
    torch.save({"W_dec": value}, path := tmp_path / "file.pt")
    readers: tuple[Any, ...] = (fastsae.load_checkpoint, fastsae.SAE.from_pretrained, fastsae.SAE.load, lambda p: fastsae.mmcs(p, W))
    for reader in readers:
        with pytest.raises(ValueError, match=r"it holds [a-z._]+(Linear|getenv), which is no tensor") as caught:
            reader(path)
        assert "weights_only` set to" not in str(caught.value) and "add_safe_globals" not in str(caught.value)


def test_loaded_dictionaries_are_in_one_mode(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    sae = fastsae.SAE(8, 16, fastsae.TopK(2))
    sae.save(tmp_path / "own")
    sae.save_pretrained(tmp_path / "pretrained")
    loaded = (
        fastsae.SAE.load(tmp_path / "own"),
        fastsae.SAE.from_pretrained(tmp_path / "own"),
        fastsae.SAE.from_pretrained(tmp_path / "pretrained"),
    )
    assert [one.training for one in loaded] == [False] * 3
    x: Tensor = X[0]
    assert torch.equal(loaded[0](x).x_hat, loaded[1](x).x_hat)


def test_a_sweep_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pandas")
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    data = fastsae.superposition.SuperpositionData(12, 8, mean_active=2)
    fastsae.superposition.sweep(data, l1=[0.1, 0.2], n_features=8, stop=2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["run 1 of 2", "run 2 of 2"] and "F 8, l1 0.1" in lines[0]
    fastsae.superposition.sweep(data, l1=0.1, n_features=8, stop=2, progress=False)
    assert capsys.readouterr().err == ""
