"""The SAE module: prefixes, auxiliary losses, objectives, annealing, starts from data, folding."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from sae_cases import KINDS, VARIANTS, build, build_variant, each, rows, variant

from fastsae import SAE, Gated, TopK

# ---------------------------------------------------------------- variants


@each
@variant
def test_variants_in_words(kind: str, name: str) -> None:
    sae, x = build_variant(kind, name, dtype=torch.float64), rows(9, 7, dtype=torch.float64)
    target = rows(9, sae.d_out, seed=1, dtype=torch.float64)
    latents = sae.encode(x)
    code = latents.to_dense()
    if sae.transcoder:  # x itself is encoded
        bare = copy.deepcopy(sae)
        with torch.no_grad():
            bare.b_dec.zero_()
        assert torch.equal(bare.encode(x).to_dense(), code)
    past = torch.zeros_like(target)
    if sae.skip:
        assert sae.W_skip is not None
        past = x @ sae.W_skip.T
    x_hats = [code[:, :size] @ sae.W_dec[:size] + sae.b_dec + past for size in sae.prefixes or [20]]
    torch.testing.assert_close(sae(x).x_hat, x_hats[-1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sae.decode(latents, x), x_hats[-1], rtol=1e-12, atol=1e-12)
    errors = [(x_hat - target).square().sum() for x_hat in x_hats]
    if not isinstance(sae.activation, Gated):
        torch.testing.assert_close(sae.loss(x, target).loss, sum(errors) / len(errors) / 9, rtol=1e-12, atol=1e-12)
    spread = (target - target.mean(0)).square().sum()
    torch.testing.assert_close(sae.loss(x, target).fvu, (errors[-1] / spread).detach(), rtol=1e-12, atol=1e-12)
    assert (sae(x).squared_error is None) == sae.transcoder
    torch.testing.assert_close(sae(x, target).squared_error, (x_hats[-1] - target).square().sum(1), rtol=1e-12, atol=1e-12)
    assert (sae.W_enc is sae.W_dec) == sae.tied
    assert sae.unit_rows == (() if sae.transcoder else ("W_dec",))


def test_the_fvu_objective() -> None:
    sae = build("topk", objective="fvu")
    result = sae.loss(rows(9, 7))
    torch.testing.assert_close(result.loss.detach(), result.fvu)


def test_objective_of_constant_rows_has_a_gradient() -> None:
    sae = SAE(7, 20, TopK(3), seed=0, objective="fvu")
    sae.loss(torch.zeros(5, 7)).loss.backward()  # 0 / 0
    assert all(bool((p.grad == 0).all()) for p in sae.parameters())


def test_annealing_k() -> None:
    sae, x = build("topk"), rows(5, 7)
    assert sae.k == 3
    sae.k = 6.6  # rounded: a schedule's value
    assert sae.encode(x).values.shape == (5, 7)
    assert sae.activation == TopK(7)
    signed = build("topk_signed")
    signed.k = 2
    assert signed.activation == TopK(2, relu=False)
    batch = build("batchtopk")
    batch.k = 1.2
    assert batch.encode(x).values.shape == (6,)


def test_batch_topk_in_evaluation_keeps_what_exceeds_the_running_threshold() -> None:
    sae, x = build("batchtopk"), rows(40, 7)
    z = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach()
    torch.testing.assert_close(sae.eval().encode(x).to_dense(), z.relu())  # no batch seen yet
    for _ in range(3):
        sae.train().loss(x)
    threshold = float(sae.running_threshold)
    assert threshold == pytest.approx(float(z.flatten().topk(100).values[-1]), rel=1e-5)
    sae.eval()
    torch.testing.assert_close(sae.encode(x).to_dense(), z * (z > threshold))
    torch.testing.assert_close(sae.encode(x[3:4]).to_dense(), sae.encode(x).to_dense()[3:4])  # whatever the batch
    assert sae.encode(x).values.shape[0] in (99, 100)


@pytest.mark.parametrize("name", [None, "tied"])
def test_moves(name: str | None) -> None:
    sae = build("batchtopk") if name is None else build_variant("batchtopk", name)
    sae.loss(rows(9, 7))
    running, silent = sae.running_threshold.clone(), sae.silent.clone()
    half = copy.deepcopy(sae).to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.running_threshold.dtype is half.scale.dtype is torch.float32  # a running mean needs its digits
    assert torch.equal(half.running_threshold, running)
    assert torch.equal(half.silent, silent)
    assert half(rows(4, 7, dtype=torch.bfloat16)).x_hat.dtype is torch.bfloat16
    for moved in (half, half.to("meta"), half.to_empty(device="cpu"), pickle.loads(pickle.dumps(sae)), copy.deepcopy(sae).double()):
        assert (moved.W_enc is moved.W_dec) == (name == "tied")
        assert len(list(moved.parameters())) == (3 if name == "tied" else 4)


def test_meta_is_refused_or_empty() -> None:
    sae = build("topk").to("meta")
    with pytest.raises(TypeError, match="x must be on meta like the other tensors, got cpu"):
        sae(rows(3, 7))
    empty = SAE(7, 20, TopK(3), device="meta")
    assert {p.device.type for p in [*empty.parameters(), *empty.buffers()]} == {"meta"}
    empty.to_empty(device="cpu").load_state_dict(build("topk").state_dict())
    assert torch.equal(empty(rows(3, 7)).x_hat, build("topk")(rows(3, 7)).x_hat)


def test_a_state_from_before_the_buffers() -> None:
    state = {name: tensor for name, tensor in build("topk").state_dict().items() if name not in ("silent", "scale")}
    sae = SAE(7, 20, TopK(3), seed=9)
    sae.load_state_dict(state)
    assert torch.equal(sae(rows(3, 7)).x_hat, build("topk")(rows(3, 7)).x_hat)
    with pytest.raises(RuntimeError, match="W_enc"):
        sae.load_state_dict({name: tensor for name, tensor in state.items() if name != "W_enc"})


@each
def test_autocast(kind: str) -> None:
    sae, x = build(kind), rows(6, 7)
    with torch.autocast("cpu", torch.bfloat16):
        result, loss = sae(x), sae.loss(x)
    assert result.x_hat.dtype is torch.bfloat16
    assert loss.loss.dtype is torch.float32
    loss.loss.backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in sae.parameters())
    torch.testing.assert_close(float(loss.loss.detach()), float(sae.loss(x).loss.detach()), rtol=0.05, atol=0)  # 8 bits of 3 products


# ---------------------------------------------------------------- start from data


def test_start_at_the_mean() -> None:
    x = rows(50, 7) * 3 + 2
    mask = torch.arange(50) % 2 == 0
    sae = build("topk").init_from(torch.where(mask.unsqueeze(1), x, float("nan")), mask=mask)
    torch.testing.assert_close(sae.b_dec.detach(), x[mask].mean(0))
    assert torch.equal(sae.W_enc, sae.W_dec)
    before = sae.b_dec.detach().clone()
    assert torch.equal(sae.init_from(x + 1, b_dec=None).b_dec, before)
    target = rows(50, 5)
    torch.testing.assert_close(build("topk", d_out=7).init_from(x, x + 1).b_dec.detach(), (x + 1).mean(0))
    sae = SAE(7, 20, TopK(3), d_out=5, seed=0)
    torch.testing.assert_close(sae.init_from(x, target).b_dec.detach(), target.mean(0))


def test_start_at_the_geometric_median() -> None:
    x = rows(41, 7, dtype=torch.float64)
    x[:5] += 1e4  # outliers
    point = build("topk", dtype=torch.float64).init_from(x, b_dec="geometric_median").b_dec.detach().requires_grad_()
    pull = torch.autograd.grad((x - point).norm(dim=1).sum(), point)[0]
    assert float(pull.norm()) < 1e-3  # of 41 unit vectors' sum: the minimum, to the iteration's accuracy
    assert float(point.detach().norm()) < 3
    single = build("topk").init_from(torch.ones(4, 7), b_dec="geometric_median")  # all distances 0
    torch.testing.assert_close(single.b_dec.detach(), torch.ones(7))


@each
@pytest.mark.parametrize("name", [None, *VARIANTS])
def test_normalisation_is_folded(kind: str, name: str | None, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    dtype = torch.float64
    sae = build(kind, dtype=dtype) if name is None else build_variant(kind, name, dtype=dtype)
    x = 30 * rows(40, 7, dtype=dtype) + 5
    target = 0.01 * rows(40, 5, seed=4, dtype=dtype) if sae.transcoder else None
    sae.init_from(x, target, norm="rms")
    s, t = sae.scale.double()
    torch.testing.assert_close((s * x).square().mean(), torch.ones((), dtype=dtype), rtol=1e-6, atol=0)  # the factor is a float32
    assert (float(s) == float(t)) == (target is None)
    sae.loss(x, target)  # BatchTopK's running threshold
    sae.eval()
    if kind == "batchtopk":
        sae.running_threshold.mul_(0.999)  # not exactly a score, of which rounding would decide
    plain = copy.deepcopy(sae)
    plain._scaled = False
    loss, unscaled = sae.loss(x, target), plain.loss(s * x, None if target is None else t * target)
    torch.testing.assert_close(loss.loss, unscaled.loss)
    reconstruction = sae(x, target)
    torch.testing.assert_close(reconstruction.x_hat, plain(s * x).x_hat / t)
    again = SAE.load(sae.save(tmp_path / "sae")).eval()
    assert float(again.scale[0]) == 1
    # Folded vectors and the factor are rounded: relative to values near 30.
    torch.testing.assert_close(again(x).x_hat, reconstruction.x_hat, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(again.encode(x).to_dense(), sae.encode(x).to_dense() / s, rtol=1e-6, atol=1e-6)
    if sae.unit_rows:
        assert torch.equal(again.W_dec, sae.W_dec)
    metrics, _ = sae.step_gradients(x, target)
    torch.testing.assert_close(metrics.fvu, loss.fvu)
    folded = copy.deepcopy(sae).fold_()
    torch.testing.assert_close(folded(x).x_hat, reconstruction.x_hat, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(folded.loss(x, target).fvu, loss.fvu, rtol=1e-6, atol=1e-9)
    state = SAE(7, 20, KINDS[kind], **VARIANTS.get(name or "", {}), dtype=dtype)
    state.load_state_dict(sae.state_dict())
    assert torch.equal(state.eval()(x).x_hat, reconstruction.x_hat)
