"""The SAE module: its loss in plain torch, masks, gradients, files, compilation, and that it learns."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsae
from fastsae import SAE, JumpReLU, ReLU, TopK

KINDS = {
    "topk": TopK(3),
    "topk_signed": TopK(3, relu=False),
    "relu": ReLU(),
    "jumprelu": JumpReLU(0.2),
    "jumprelu_band": JumpReLU(0.2, bandwidth=0.5),
    "jumprelu_tensor": JumpReLU(torch.linspace(0, 1, 20), bandwidth=0.5),
}
each = pytest.mark.parametrize("kind", KINDS)


def build(kind: str, **options: Any) -> SAE:
    sae = SAE(7, 20, KINDS[kind], seed=3, **options)
    with torch.no_grad():  # biases that matter
        sae.b_enc.copy_(torch.linspace(-0.3, 0.3, 20))
        sae.b_dec.copy_(torch.linspace(-1, 1, 7))
    return sae


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """(dense latents, x_hat)."""
    z = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    if isinstance(sae.activation, TopK):
        top = z.topk(sae.activation.k, dim=-1)
        code = torch.zeros_like(z).scatter(-1, top.indices, top.values.relu() if sae.activation.relu else top.values)
    else:
        theta = sae.threshold if isinstance(sae.activation, JumpReLU) else torch.zeros(())
        code = z * (z > theta.clamp_min(0))
    return code, code @ sae.W_dec + sae.b_dec


@each
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)])
def test_forward(kind: str, batch: tuple[int, ...]) -> None:
    sae, x = build(kind, dtype=torch.float64), rows(*batch, 7, dtype=torch.float64)
    result = sae(x)
    code, x_hat = plain(sae, x)
    torch.testing.assert_close(result.latents.to_dense(), code, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.x_hat, x_hat, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.squared_error, (x_hat - x).square().sum(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sae.decode(sae.encode(x)), result.x_hat)


@each
def test_loss(kind: str) -> None:
    sae, x = build(kind, dtype=torch.float64), rows(2, 6, 7, dtype=torch.float64)
    code, x_hat = plain(sae, x)
    result = sae.loss(x)
    error = (x_hat - x).square().sum()
    torch.testing.assert_close(result.loss, error / 12, rtol=1e-12, atol=1e-12)
    spread = (x - x.reshape(-1, 7).mean(0)).square().sum()
    torch.testing.assert_close(result.fvu, (error / spread).detach(), rtol=1e-12, atol=1e-12)
    assert float(result.l0) == pytest.approx(float((code != 0).sum()) / 12)
    assert not result.fvu.requires_grad
    assert not result.l0.requires_grad
    penalty = (code.abs() * sae.W_dec.norm(dim=1)).sum() / 12
    torch.testing.assert_close(sae.loss(x, l1=0.7).loss, error / 12 + 0.7 * penalty, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(sae.loss(x, l1=0.7).loss, [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec])
    want = torch.autograd.grad(error / 12 + 0.7 * penalty, [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)


def test_straight_through_l0() -> None:
    sae, x = build("jumprelu_band", dtype=torch.float64), rows(6, 7, dtype=torch.float64)
    code, _ = plain(sae, x)
    assert float((sae.loss(x, l0=2.0).loss - sae.loss(x).loss).detach()) == pytest.approx(2 * float((code != 0).sum()) / 6)
    with_penalty = torch.autograd.grad(sae.loss(x, l0=2.0).loss, sae.threshold)[0]
    without = torch.autograd.grad(sae.loss(x).loss, sae.threshold)[0]
    z = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    inside = ((z - sae.threshold).abs() < 0.25).double().sum(0)
    torch.testing.assert_close(with_penalty - without, -2 * inside / 0.5 / 6, rtol=1e-11, atol=1e-11)


@each
@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_masked_tokens_take_no_part(kind: str, shape: tuple[int, ...]) -> None:
    sae, x = build(kind), rows(*shape, 7)
    mask = torch.arange(12).reshape(shape) % 3 != 1
    spoilt = torch.where(mask.unsqueeze(-1), x, float("nan"))
    for options in ({}, {"l1": 0.3}):
        kept, masked = sae.loss(x[mask], **options), sae.loss(spoilt, mask=mask, **options)
        for a, b in zip(kept, masked, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(torch.autograd.grad(kept.loss, sae.W_enc), torch.autograd.grad(masked.loss, sae.W_enc), strict=True):
            assert torch.equal(a, b)


@each
def test_nothing_unmasked(kind: str) -> None:
    sae = build(kind)
    for result in (sae.loss(rows(4, 7), mask=torch.zeros(4, dtype=torch.bool)), sae.loss(rows(0, 7)), sae.loss(rows(2, 0, 7))):
        assert [float(v.detach()) for v in result] == [0, 0, 0]
        result.loss.backward()
    assert all(p.grad is None or bool((p.grad == 0).all()) for p in sae.parameters())


def test_fvu_of_constant_rows() -> None:
    sae = SAE(7, 20, TopK(3), seed=0)
    assert float(sae.loss(torch.zeros(5, 7)).fvu) == 0  # 0 / 0
    assert float(sae.loss(torch.full((5, 7), 2.0)).fvu) == float("inf")


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    sae, x = build(kind, dtype=dtype), rows(6, 7, dtype=dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    result = sae(x)
    assert result.x_hat.dtype is dtype
    assert result.squared_error.dtype is wide
    loss = sae.loss(x)
    assert loss.loss.dtype is wide
    loss.loss.backward()
    assert sae.W_enc.grad.dtype is dtype


@each
def test_gradients_reach_every_parameter(kind: str) -> None:
    sae = build(kind)
    options = {"l0": 0.1} if getattr(sae.activation, "bandwidth", None) else {}
    sae.loss(rows(400, 7), **options).loss.backward()
    for name, parameter in sae.named_parameters():
        learns = name != "threshold" or sae.activation.bandwidth is not None
        assert bool((parameter.grad != 0).any()) == learns, name
        assert bool(parameter.grad.isfinite().all()), name


def test_start() -> None:
    sae = SAE(7, 20, JumpReLU(0.3), seed=5)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(20))
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    assert torch.equal(sae.threshold, torch.full((20,), 0.3))
    assert set(dict(sae.named_parameters())) == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
    assert set(dict(SAE(7, 20, ReLU()).named_parameters())) == {"W_enc", "b_enc", "W_dec", "b_dec"}


def test_seeds() -> None:
    before = torch.get_rng_state()
    a, b, c = SAE(7, 20, TopK(3), seed=1), SAE(7, 20, TopK(3), seed=1), SAE(7, 20, TopK(3), seed=2)
    assert torch.equal(torch.get_rng_state(), before)  # a seed leaves the global generator alone
    assert torch.equal(a.W_dec, b.W_dec)
    assert not torch.equal(a.W_dec, c.W_dec)
    torch.manual_seed(4)
    first = SAE(7, 20, TopK(3))
    torch.manual_seed(4)
    assert torch.equal(SAE(7, 20, TopK(3)).W_dec, first.W_dec)


def test_a_learnt_threshold_is_not_the_given_tensor() -> None:
    theta = torch.linspace(0, 1, 20).requires_grad_()
    sae = SAE(7, 20, JumpReLU(theta), seed=0)
    with torch.no_grad():
        sae.threshold.add_(1)
    assert torch.equal(theta, torch.linspace(0, 1, 20))
    assert sae.threshold.is_leaf


def test_decoder_normalisation() -> None:
    sae = SAE(7, 20, TopK(3), seed=1)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.1, 4, 20).unsqueeze(1))
        sae.W_dec[0] = 0
        sae.W_dec[1] = 1e-10
    before = sae.W_dec.detach().clone()
    sae.normalise_decoder_()
    torch.testing.assert_close(sae.W_dec[2:].norm(dim=1), torch.ones(18))
    assert torch.equal(sae.W_dec[:2], before[:2])
    torch.testing.assert_close(sae.W_dec[2:] * before[2:].norm(dim=1, keepdim=True), before[2:])


def test_removal_of_the_parallel_gradient() -> None:
    sae = SAE(7, 20, TopK(3), seed=1)
    sae.remove_parallel_gradient_()  # nothing to do before a backward
    sae.loss(rows(200, 7)).loss.backward()
    before = sae.W_dec.grad.clone()
    sae.remove_parallel_gradient_()
    torch.testing.assert_close((sae.W_dec.grad * sae.W_dec).sum(1), torch.zeros(20), atol=1e-5, rtol=0)  # float32 sums of 7 terms near 1
    removed = before - sae.W_dec.grad
    torch.testing.assert_close(removed, (before * sae.W_dec).sum(1, keepdim=True) * sae.W_dec, atol=1e-5, rtol=1e-4)


def toy(seed: int = 0) -> Tensor:
    """Rows with two of 12 unit features in 6 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(12, 6, generator=generator), dim=1)
    active = torch.rand(256, 12, generator=generator).topk(2, dim=1).indices
    code = torch.zeros(256, 12).scatter(1, active, torch.rand(256, 2, generator=generator) + 0.5)
    return code @ features


@pytest.mark.parametrize(
    ("activation", "options"),
    [(TopK(2), {}), (ReLU(), {"l1": 0.01}), (JumpReLU(0.05, bandwidth=0.05), {"l0": 0.01})],
    ids=["topk", "relu", "jumprelu"],
)
def test_training_reduces_the_unexplained_variance(activation: Any, options: dict[str, float]) -> None:
    x = toy()
    sae = SAE(6, 24, activation, seed=0)
    optimiser = torch.optim.Adam(sae.parameters(), lr=1e-2)
    first = float(sae.loss(x).fvu)
    for _ in range(80):
        optimiser.zero_grad()
        sae.loss(x, **options).loss.backward()
        sae.remove_parallel_gradient_()
        optimiser.step()
        sae.normalise_decoder_()
    last = sae.loss(x)
    assert float(last.fvu) < 0.25 < first
    assert float(last.l0) <= 24


@each
def test_compiles_without_graph_breaks(kind: str) -> None:
    torch._dynamo.reset()
    sae, x = build(kind), rows(5, 7)
    compiled = torch.compile(sae, fullgraph=True, backend="aot_eager")
    eager = sae(x)
    got = compiled(x)
    torch.testing.assert_close(got.x_hat, eager.x_hat)
    assert torch.equal(got.latents.to_dense(), eager.latents.to_dense())
    weights = list(sae.parameters())
    for g, w in zip(
        torch.autograd.grad(got.squared_error.sum(), weights, allow_unused=True),
        torch.autograd.grad(eager.squared_error.sum(), weights, allow_unused=True),
        strict=True,
    ):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w)


@each
def test_copies_keep_the_function(kind: str) -> None:
    sae, x = build(kind), rows(5, 7)
    other = SAE(7, 20, KINDS[kind], seed=99)
    other.load_state_dict(sae.state_dict())
    for again in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae)), other):
        assert torch.equal(again(x).x_hat, sae(x).x_hat)
        assert not any(p.data_ptr() == q.data_ptr() for p in again.parameters() for q in sae.parameters())


# ---------------------------------------------------------------- files


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_save_and_load(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    pytest.importorskip("safetensors")
    sae = build(kind, dtype=dtype)
    folder = sae.save(tmp_path / "a" / "sae")
    assert sorted(path.name for path in folder.iterdir()) == ["cfg.json", "sae.safetensors"]
    again = SAE.load(str(folder))
    assert type(again.activation) is type(sae.activation)
    for name, parameter in sae.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], parameter)
        assert dict(again.named_parameters())[name].dtype is dtype
    x = rows(6, 7, dtype=dtype)
    assert torch.equal(again(x).x_hat, sae(x).x_hat)
    if getattr(sae.activation, "bandwidth", None) is not None:
        assert torch.equal(again.loss(x, l0=1.0).loss, sae.loss(x, l0=1.0).loss)
    with torch.no_grad():
        sae.W_enc.add_(1)
    sae.save(folder)  # over the old one
    assert torch.equal(SAE.load(folder).W_enc, sae.W_enc)


def test_saved_names_are_those_of_sparsify(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    folder = SAE(7, 20, TopK(3), seed=0).save(tmp_path / "sae")
    assert {name: list(t.shape) for name, t in safetensors.load_file(folder / "sae.safetensors").items()} == {
        "encoder.weight": [20, 7],
        "encoder.bias": [20],
        "W_dec": [20, 7],
        "b_dec": [7],
    }
    config = json.loads((folder / "cfg.json").read_text())
    assert (config["d_in"], config["num_latents"], config["k"], config["activation"]) == (7, 20, 3, "topk")


DAMAGES = {
    "broken json": ("cfg.json", lambda raw: b"{"),
    "another json": ("cfg.json", lambda raw: b"[1]"),
    "no json at all": ("cfg.json", lambda raw: b"\xff\xfe\x00"),
    "missing key": ("cfg.json", lambda raw: raw.replace(b'"d_in"', b'"width"')),
    "other activation": ("cfg.json", lambda raw: raw.replace(b'"topk"', b'"softmax"')),
    "other size": ("cfg.json", lambda raw: raw.replace(b"20", b"21")),
    "size as text": ("cfg.json", lambda raw: raw.replace(b"20", b'"20"')),
    "k out of range": ("cfg.json", lambda raw: raw.replace(b'"k": 3', b'"k": 300')),
    "empty weights": ("sae.safetensors", lambda raw: b""),
    "cut header": ("sae.safetensors", lambda raw: raw[:50]),
    "cut weights": ("sae.safetensors", lambda raw: raw[:-4]),
    "wrong name": ("sae.safetensors", lambda raw: raw.replace(b"encoder.bias", b"encoder.Bias")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_a_clear_error(tmp_path: Path, damage: str) -> None:
    pytest.importorskip("safetensors")
    folder = SAE(7, 20, TopK(3), seed=0).save(tmp_path / "sae")
    name, change = DAMAGES[damage]
    raw = (folder / name).read_bytes()
    assert change(raw) != raw
    (folder / name).write_bytes(change(raw))
    with pytest.raises(ValueError, match=r"SAE\.load: .* is not a folder that SAE\.save wrote"):
        SAE.load(folder)


@pytest.mark.parametrize("name", ["cfg.json", "sae.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    pytest.importorskip("safetensors")
    folder = SAE(7, 20, TopK(3), seed=0).save(tmp_path / "sae")
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        SAE.load(folder)


def test_an_interrupted_save_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    sae = SAE(7, 20, TopK(3), seed=0)
    folder = sae.save(tmp_path / "sae")

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        SAE(7, 20, TopK(3), seed=1).save(folder)
    assert torch.equal(SAE.load(folder).W_dec, sae.W_dec)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SAE(0, 4), ValueError, "d_in must be at least 1, got 0"),
        (lambda: SAE(4, 0), ValueError, "d_sae must be at least 1, got 0"),
        (lambda: SAE(4, -1), ValueError, "d_sae must be at least 1, got -1"),
        (lambda: SAE(True, 4), TypeError, "d_in must be an int, got bool"),
        (lambda: SAE(4.0, 4), TypeError, "d_in must be an int, got float"),
        (lambda: SAE(4, 8, TopK(9)), ValueError, r"activation.k must be at least 1 and at most 8 .* got 9"),
        (lambda: SAE(4, 8, TopK(0)), ValueError, "activation.k"),
        (lambda: SAE(4, 8, TopK), TypeError, "activation must be TopK, ReLU or JumpReLU, got type"),
        (lambda: SAE(4, 8, fastsae.BatchTopK(3)), TypeError, "got BatchTopK"),
        (lambda: SAE(4, 8, JumpReLU(torch.ones(7))), ValueError, r"activation.threshold must have shape \[d_sae=8\]"),
        (lambda: SAE(4, 8, JumpReLU("0.1")), TypeError, "activation.threshold must be a number, got str"),
        (lambda: SAE(4, 8, JumpReLU(float("nan"))), ValueError, "activation.threshold must be a finite number"),
        (lambda: SAE(4, 8, JumpReLU(0.1, bandwidth=0.0)), ValueError, "activation.bandwidth must be a finite number above 0, got 0.0"),
        (lambda: SAE(4, 8, TopK(2), dtype=torch.int64), TypeError, "dtype must be float32.* got torch.int64"),
        (lambda: build("topk").loss([1]), TypeError, r"SAE\.loss: x must be a torch.Tensor, got list"),
        (lambda: build("topk").loss(rows(7, 6)), ValueError, r"x must have shape \[.., d_in=7\], got \[7, 6\]"),
        (lambda: build("topk").loss(torch.tensor(1.0)), ValueError, r"x must have shape \[.., d_in=7\], got \[\]"),
        (lambda: build("topk").loss(rows(4, 7), mask=torch.ones(5).bool()), ValueError, r"mask must have shape \[4\], got \[5\]"),
        (lambda: build("topk").loss(rows(4, 7), mask=torch.ones(4)), TypeError, "mask must have dtype bool, got float32"),
        (lambda: build("topk").loss(rows(4, 7), l1="x"), TypeError, "l1 must be a number, got str"),
        (lambda: build("topk").loss(rows(4, 7), l0=1.0), ValueError, "l0 needs JumpReLU with a bandwidth"),
        (lambda: build("topk")(rows(4, 6)), ValueError, r"W_enc must have shape \[F, D=6\]"),
        (lambda: build("topk")(rows(4, 7).double()), TypeError, r"W_enc must have the dtype of x \(float64\), got float32"),
        (lambda: build("topk")(rows(4, 7).to("meta")), TypeError, "W_enc must be on meta"),
    ],
)
def test_wrong_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
