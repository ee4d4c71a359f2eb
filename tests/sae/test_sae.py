"""The SAE module: its loss in plain torch, masks, gradients, files, compilation, and that it learns."""

from __future__ import annotations

import copy
import pickle
from typing import Any, cast

import pytest
import torch
from sae_cases import KINDS, build, each, plain, rows
from torch import Tensor

from fastsae import SAE, AbsTopK, AuxK, BatchTopK, Gated, JumpReLU, PackedWeights, ReLU, SAEs, TopK
from fastsae.codes import CodeCounter
from fastsae.optim import Adam
from fastsae.trainer import Batches, Trainer


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
@pytest.mark.parametrize("dense", [False, True, None])
def test_loss(kind: str, dense: bool | None) -> None:
    sae, x = build(kind, dtype=torch.float64, dense=dense), rows(2, 6, 7, dtype=torch.float64)
    code, x_hat = plain(sae, x)
    result = sae.loss(x)
    error = (x_hat - x).square().sum()
    penalised, leaves = code, [sae.W_enc, sae.W_dec, sae.b_dec]
    if isinstance(sae.activation, Gated):
        penalised = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_gate).relu()
        frozen = (penalised @ sae.W_dec.detach() + sae.b_dec.detach() - x).square().sum()
        leaves += [sae.b_gate, sae.r_mag, sae.b_mag]
    else:
        frozen = torch.zeros_like(error)
        leaves += [sae.b_enc]
    torch.testing.assert_close(result.loss, (error + frozen) / 12, rtol=1e-12, atol=1e-12)
    spread = (x - x.reshape(-1, 7).mean(0)).square().sum()
    torch.testing.assert_close(result.fvu, (error / spread).detach(), rtol=1e-12, atol=1e-12)
    assert float(result.l0) == pytest.approx(float((code != 0).sum()) / 12)
    assert not result.fvu.requires_grad
    assert not result.l0.requires_grad
    penalty = (penalised.abs() * sae.W_dec.norm(dim=1)).sum() / 12
    whole = (error + frozen) / 12 + 0.7 * penalty
    torch.testing.assert_close(sae.loss(x, l1=0.7).loss, whole, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(sae.loss(x, l1=0.7).loss, leaves, create_graph=True)
    want = torch.autograd.grad(whole, leaves, create_graph=True)
    second = [torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), leaves) for first in (got, want)]
    for g, w in zip((*got, *second[0]), (*want, *second[1]), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("aux", [AuxK(4), AuxK.dictionary_learning(4), AuxK.saelens(4), AuxK.sparsify(4)])
def test_the_error_of_auxk_is_detached_from_inputs_too(aux: AuxK) -> None:
    sae, x = build("topk", dtype=torch.float64, aux=aux, dead_after=1).eval(), rows(6, 7, dtype=torch.float64).requires_grad_()
    sae.silent[5:] = 1
    z = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).masked_fill(~sae.dead_features, -torch.inf)
    top = z.topk(4, dim=-1)
    e_hat = torch.zeros_like(z).scatter(-1, top.indices, top.values.relu() if aux.relu else top.values) @ sae.W_dec
    e = (x - plain(sae, x)[1]).detach()
    spread = {"residual": (e - e.mean(0)).square().sum(), "total": (x - x.mean(0)).square().sum(), "tokens": len(x)}[aux.denominator]
    leaves = [x, sae.W_enc, sae.W_dec]
    got = torch.autograd.grad(sae.loss(x).loss - sae.loss(x, aux=False).loss, leaves)
    for g, w in zip(got, torch.autograd.grad(aux.coefficient * (e_hat - e).square().sum() / spread, leaves), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)


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


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16])
def test_a_mask_of_ones_and_zeros_is_the_bool_one_wherever_a_mask_is_taken(dtype: torch.dtype) -> None:
    """Hugging Face's masks are int64, and an int64 tensor also is an index."""
    from fastsae.superposition import ActivationStatistics

    def everywhere(mask: Tensor) -> list[Tensor]:
        x, sae, saes = rows(4, 3, 7), build("topk"), SAEs([build("topk"), build("topk")])
        opt = Adam(build("topk"), lr=0.1)
        out = [*sae.loss(x, mask=mask), *sae.step_gradients(x, mask=mask)[0], sae.init_from(x, mask=mask).b_dec, *opt.step(x, mask=mask)]
        assert opt.module is not None
        out += [opt.module.W_dec, *saes.step_gradients(x.flatten(0, 1), mask=mask.flatten())[0]]
        out += saes.step_gradients(x[:2], mask=mask[:2])[0]
        out.append(saes.init_from(x.flatten(0, 1), mask=mask.flatten()).b_dec)
        counter = CodeCounter(["a"])
        counter.update({"a": torch.arange(12).reshape(4, 3)}, mask)
        statistics = ActivationStatistics(7).update(x, mask=mask)
        return [t.detach() for t in [*out, torch.tensor([counter.table()[0].seen, statistics.count])]]

    mask = torch.arange(12).reshape(4, 3) % 3 != 1
    for ours, plain_bool in zip(everywhere(mask.to(dtype)), everywhere(mask), strict=True):
        assert torch.equal(ours, plain_bool)
    sae = build("topk")
    batches = Batches(rows(12, 7), mask=mask.flatten().to(dtype), size=6)
    Trainer(sae, Adam(sae, lr=0.1), progress=False).fit(batches, 2)
    assert int(sae.silent.max()) == int(mask.sum())


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
    assert sae.W_enc.grad is not None and sae.W_enc.grad.dtype is dtype


@each
def test_gradients_reach_every_parameter(kind: str) -> None:
    sae = build(kind)
    options = {"l0": 0.1} if getattr(sae.activation, "bandwidth", None) else {}
    sae.loss(rows(400, 7), **options).loss.backward()
    for name, parameter in sae.named_parameters():
        learns = name != "threshold" or (isinstance(sae.activation, JumpReLU) and sae.activation.bandwidth is not None)
        assert parameter.grad is not None, name
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
    assert sae.W_dec.grad is not None
    before = sae.W_dec.grad.clone()
    sae.remove_parallel_gradient_()
    assert sae.W_dec.grad is not None
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
    gradients, wanted = (torch.autograd.grad(out.squared_error.sum(), weights, allow_unused=True) for out in (got, eager))
    for g, w in zip(cast("tuple[Tensor | None, ...]", gradients), wanted, strict=True):
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
        (lambda: SAE(4, 8, TopK), TypeError, "activation must be TopK, AbsTopK, BatchTopK, JumpReLU, ReLU or Gated, got type"),
        (lambda: SAE(4, 8, BatchTopK(0)), ValueError, "activation.k must be a finite number above 0, got 0"),
        (lambda: SAE(4, 8, BatchTopK(3, rate=0.0)), ValueError, "activation.rate must be a finite number above 0, got 0.0"),
        (lambda: SAE(4, 8, Gated(b_mag=0.5)), TypeError, "activation.b_mag must be a torch.Tensor, got float"),
        (lambda: SAE(4, 8, Gated(b_gate=torch.ones(7))), ValueError, r"activation.b_gate must have shape \[d_sae=8\] or \[\], got \[7\]"),
        (lambda: SAE(4, 8, TopK(2), d_out=0), ValueError, "d_out must be at least 1, got 0"),
        (lambda: SAE(4, 8, TopK(2), skip=True), ValueError, "skip needs d_out"),
        (lambda: SAE(4, 8, TopK(2), skip=1), TypeError, "skip must be a bool, got int"),
        (lambda: SAE(4, 8, TopK(2), d_out=5, tied=True), ValueError, "tied needs d_out = d_in = 4, got d_out=5"),
        (lambda: SAE(4, 8, TopK(2), prefixes=[2, 7]), ValueError, r"prefixes must ascend strictly and end in d_sae=8, got \[2, 7\]"),
        (lambda: SAE(4, 8, TopK(2), prefixes=[4, 2, 8]), ValueError, "prefixes must ascend strictly"),
        (lambda: SAE(4, 8, TopK(2), prefixes=[]), ValueError, "prefixes must ascend strictly"),
        (lambda: SAE(4, 8, TopK(2), prefixes=[0, 8]), ValueError, r"prefixes must be at least 1 and at most 8 \(d_sae=8\), got 0"),
        (lambda: SAE(4, 8, TopK(2), prefixes=[2.0, 8]), TypeError, "prefixes must be an int, got float"),
        (lambda: SAE(4, 8, TopK(2), objective="l2"), ValueError, "objective must be 'mse' or 'fvu', got 'l2'"),
        (lambda: SAE(4, 8, TopK(2), dead_after=0), ValueError, "dead_after must be at least 1, got 0"),
        (lambda: SAE(4, 8, TopK(2), l1=float("nan")), ValueError, "l1 must be a finite number, got nan"),
        (lambda: SAE(4, 8, TopK(2), l0=0.1), ValueError, "SAE: l0 needs JumpReLU with a bandwidth"),
        (lambda: SAE(4, 8, TopK(2), aux=32), TypeError, "aux must be an AuxK, False or None, got int"),
        (lambda: SAE(4, 8, Gated(), aux=AuxK()), ValueError, "aux does not go with Gated"),
        (lambda: SAE(4, 8, AbsTopK(2), aux=AuxK()), ValueError, "SAE: aux must have relu=False with AbsTopK"),
        (lambda: AuxK(0), ValueError, "AuxK: k must be at least 1, got 0"),
        (lambda: AuxK(coefficient=0), ValueError, "AuxK: coefficient must be a finite number above 0, got 0"),
        (lambda: AuxK(relu=1), TypeError, "AuxK: relu must be a bool, got int"),
        (lambda: AuxK(denominator="none"), ValueError, "denominator must be 'residual', 'total' or 'tokens', got 'none'"),
        (lambda: SAE(7, 20, TopK(3), d_out=3).loss(rows(4, 7)), ValueError, r"SAE\.loss: target must be given for a transcoder, got None"),
        (lambda: build("topk").loss(rows(4, 7), rows(4, 6)), ValueError, r"SAE\.loss: target must have shape \[4, 7\], got \[4, 6\]"),
        (lambda: build("topk").loss(rows(4, 7), [1]), TypeError, r"SAE\.loss: target must be a torch.Tensor, got list"),
        (lambda: build("topk").step_gradients(rows(4, 6)), ValueError, r"SAE\.step_gradients: x must have shape \[.., d_in=7\]"),
        (lambda: build("topk").step_gradients(rows(4, 7).double()), TypeError, r"SAE\.step_gradients: x must have the dtype of the param"),
        (lambda: build("topk").step_gradients(rows(4, 7).to("meta")), TypeError, "x must be on cpu .* got meta"),
        (lambda: SAE(7, 20, TopK(3), d_out=3, skip=True).decode(build("topk").encode(rows(1, 7))), ValueError, "decode: x must be given"),
        (lambda: setattr(build("topk"), "k", 21), ValueError, r"activation.k must be at least 1 and at most 20 \(d_sae=20\), got 21"),
        (lambda: build("relu").k, AttributeError, "no attribute 'k'"),
        (lambda: setattr(build("relu"), "k", 3), AttributeError, "ReLU has no k"),
        (
            lambda: build("topk").init_from(rows(4, 7), b_dec="median"),
            ValueError,
            r"SAE\.init_from: b_dec must be 'mean' or 'geometric_median'",
        ),
        (lambda: build("topk").init_from(rows(4, 7), norm="l2"), ValueError, r"norm must be 'rms' or None, got 'l2'"),
        (lambda: build("topk").init_from(rows(4, 7), encoder="random"), ValueError, r"encoder must be 'transpose' or None, got 'random'"),
        (lambda: build("topk").init_from(rows(0, 7)), ValueError, "x must hold at least one token that counts, got none"),
        (
            lambda: build("topk").init_from(0 * rows(4, 7), norm="rms"),
            ValueError,
            "norm='rms' needs activations that are finite and not all 0",
        ),
        (lambda: SAE(4, 8, JumpReLU(torch.ones(7))), ValueError, r"activation.threshold must have shape \[d_sae=8\]"),
        (lambda: SAE(4, 8, JumpReLU("0.1")), TypeError, "activation.threshold must be a number, got str"),
        (lambda: SAE(4, 8, JumpReLU(float("nan"))), ValueError, "activation.threshold must be a finite number"),
        (lambda: SAE(4, 8, JumpReLU(0.1, bandwidth=0.0)), ValueError, "activation.bandwidth must be a finite number above 0, got 0.0"),
        (lambda: SAE(4, 8, TopK(2), dtype=torch.int64), TypeError, "dtype must be float32.* got torch.int64"),
        (lambda: build("topk").loss([1]), TypeError, r"SAE\.loss: x must be a torch.Tensor, got list"),
        (lambda: build("topk").loss(rows(7, 6)), ValueError, r"x must have shape \[.., d_in=7\], got \[7, 6\]"),
        (lambda: build("topk").loss(torch.tensor(1.0)), ValueError, r"x must have shape \[.., d_in=7\], got \[\]"),
        (lambda: build("topk").loss(rows(4, 7), mask=torch.ones(5).bool()), ValueError, r"mask must have shape \[4\], got \[5\]"),
        (
            lambda: build("topk").loss(rows(4, 7), mask=torch.arange(4)),
            ValueError,
            r"mask must be bool, or 0 and 1 \(1: counts\), got int64 from 0 to 3",
        ),
        (lambda: build("topk").loss(rows(4, 7), mask=torch.full((4,), -1e9)), ValueError, r"an additive attention mask.*pass mask == 0"),
        (lambda: build("topk").loss(rows(4, 7), mask=torch.zeros(4)), ValueError, "an additive attention mask"),
        (lambda: build("topk").loss(rows(4, 7), mask=torch.tensor([0, 1, float("nan"), 1])), ValueError, "mask must be bool, or 0 and 1"),
        (lambda: build("topk").loss(rows(4, 7), mask=[1, 1, 0, 1]), TypeError, "mask must be a torch.Tensor, got list"),
        (
            lambda: build("topk").loss(rows(4, 7), mask=torch.ones(4, dtype=torch.cfloat)),
            TypeError,
            "mask must have dtype bool, .*complex64",
        ),
        (lambda: build("topk").loss(rows(4, 7), l1="x"), TypeError, "l1 must be a number, got str"),
        (lambda: build("topk").loss(rows(4, 7), l0=1.0), ValueError, "l0 needs JumpReLU with a bandwidth"),
        (lambda: build("topk")(rows(4, 6)), ValueError, r"^SAE.encode: x must have shape \[.., d_in=7\], got \[4, 6\]"),
        (lambda: build("topk").loss(rows(4, 7).double()), TypeError, r"^SAE.loss: x must have the dtype of the parameters \(float32\)"),
        (
            lambda: build("topk")(rows(4, 7).double()),
            TypeError,
            r"^SAE.encode: x must have the dtype of the parameters \(float32\), got float64",
        ),
        (lambda: build("topk")(rows(4, 7).to("meta")), TypeError, "^SAE.encode: x must be on cpu like the other tensors, got meta"),
    ],
)
def test_wrong_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("stacked", [False, True])
def test_packed_encoding_follows_the_weights(stacked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, and one packing a change: by the optimiser, in place, by loading, by a copy."""
    sae = SAE(64, 300, TopK(5), seed=0)
    module = SAEs([sae, SAE(64, 300, TopK(5), seed=1)]) if stacked else sae
    opt = Adam(module, lr=1e-2)
    made = []
    pack = PackedWeights.refresh
    monkeypatch.setattr(PackedWeights, "refresh", lambda handle: (made.append(handle), pack(handle))[1])
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))

    def same(sae: SAE, packings: int) -> None:
        made.clear()
        _, latents = (sae.encode(x) for _ in range(2))
        sae.packed = False
        plain = sae.encode(x)
        sae.packed = True
        assert torch.equal(latents.values, plain.values) and torch.equal(latents.indices, plain.indices)  # pyright: ignore[reportAttributeAccessIssue]
        assert len(made) == packings

    sae.packed = True
    sae.encode(x)
    assert sae.packed and not made  # training encodes from the weights
    module.eval()
    same(sae, 1)
    sae.encode(x)
    opt.step(x)
    same(sae, 1)
    sae.encode(x)
    with torch.no_grad():
        sae.W_enc.mul_(-1)
    same(sae, 1)
    sae.encode(x)
    same(copy.deepcopy(sae), 1)
    sae.encode(x)
    module.load_state_dict(module.state_dict())
    sae.W_enc.data.mul_(-1)  # behind the back of the version counter
    sae.weights_changed()
    same(sae, 1)
    with pytest.raises(TypeError, match="packed must be a bool, got int"):
        sae.packed = 1  # pyright: ignore[reportAttributeAccessIssue]


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrower_activations_are_widened(kind: str, dtype: torch.dtype) -> None:
    """A model's half-precision activations beside a float32 SAE, everywhere; only what would lose digits is refused."""
    x = rows(9, 7).to(dtype).requires_grad_()
    sae, other = build(kind, dtype=torch.float32), build(kind, dtype=torch.float32)
    got, want = sae(x), other(x.float())
    assert got.x_hat.dtype is got.latents.values.dtype is torch.float32
    assert torch.equal(got.x_hat, want.x_hat) and torch.equal(got.squared_error, want.squared_error)
    assert torch.equal(*(torch.autograd.grad(result.x_hat.sum(), x)[0] for result in (got, want)))
    assert torch.equal(sae.loss(x).loss, other.loss(x.float()).loss)
    for module in (sae, other):
        Adam(module, lr=1e-2).step(x if module is sae else x.float())
    stack = SAEs([build(kind, dtype=torch.float32)])
    Adam(stack, lr=1e-2).step(x)
    assert all(torch.equal(p, q) for p, q in zip(sae.parameters(), other.parameters(), strict=True))
    for p, q in zip(stack.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p[0], q)
    for narrow in (torch.bfloat16, torch.float16):
        if narrow is not dtype:
            with pytest.raises(TypeError, match=r"^SAE.encode: x must have the dtype of the parameters .*; x.to\(torch.*\) casts it$"):
                build(kind, dtype=narrow)(x)


def test_a_transcoder_takes_narrower_targets() -> None:
    sae = SAE(7, 20, TopK(3), d_out=5, skip=True, seed=0)
    x, target = rows(9, 7).bfloat16(), rows(9, 5).bfloat16()
    assert torch.equal(sae(x, target).squared_error, sae(x.float(), target.float()).squared_error)
    assert torch.equal(sae.loss(x, target).loss, sae.loss(x.float(), target.float()).loss)
    assert torch.equal(sae.step_gradients(x, target)[0].loss, sae.step_gradients(x.float(), target.float())[0].loss)
