"""Crosscoders against the papers' formulas in plain float64, layer by layer; and what they share with SAEs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastsae
from fastsae import AbsTopK, AuxK, BatchTopK, Gated, JumpReLU, ReLU, SAEs, TopK, plots
from fastsae.compare import exclusive, latent_scaling, layer_cosines, relative_norms, shared
from fastsae.gradients import densify
from fastsae.sae import Crosscoder

L, D, F = 3, 5, 24
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "topk": (TopK(4), {}),
    "topk_signed": (TopK(4, relu=False), {"l1": 0.2}),
    "abstopk": (AbsTopK(4), {"l1": 0.2}),
    "batchtopk": (BatchTopK(3.5), {}),
    "relu": (ReLU(), {"l1": 0.3, "dense": False}),
    "relu_dense": (ReLU(), {"l1": 0.3, "dense": True}),
    "jumprelu": (JumpReLU(torch.linspace(-0.1, 0.6, F), bandwidth=0.7), {"l0": 0.4, "l1": 0.1, "dense": False}),
    "jumprelu_dense": (JumpReLU(torch.linspace(-0.1, 0.6, F), bandwidth=0.7), {"l0": 0.4, "l1": 0.1, "dense": True}),
    "aux": (TopK(4), {"aux": AuxK(6), "dead_after": 20}),
    "aux_batch": (BatchTopK(3.5), {"aux": AuxK.saelens(6), "dead_after": 20, "l1": 0.1}),
}
each = pytest.mark.parametrize("kind", KINDS)


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def build(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> Crosscoder:
    """Layers of different norms, biases that matter, eight dead features."""
    activation, terms = KINDS[kind]
    made = Crosscoder(L, D, F, activation, dtype=dtype, seed=1, **{**terms, **options})
    with torch.no_grad():
        made.decoders.mul_((rows(F, L, 1, seed=5).abs() + 0.1).to(dtype))
        made.b_enc.copy_(torch.linspace(-0.3, 0.4, F))
        made.b_dec.copy_(torch.linspace(-1, 1, L * D))
        made.silent[:8] = 10
    return made


class Jump(torch.autograd.Function):
    """Rajamanoharan et al. 2024: z where above theta, and how many; rectangle kernel in theta alone."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, width: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z, theta)
        ctx.width = width
        on = z > theta.clamp_min(0)
        return z * on, on.sum().to(z)

    @staticmethod
    def backward(ctx: Any, dvalue: Tensor, dcount: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, theta = ctx.saved_tensors
        band = ((z - theta).abs() < ctx.width / 2).to(z) / ctx.width
        return dvalue * (z > theta.clamp_min(0)), (-band * (theta * dvalue + dcount)).sum(0), None


def select(ranked: Tensor, k: int, magnitude: bool = False) -> Tensor:
    """Mask of the k first of the last dimension, by a stable sort: equal ones by index."""
    order = (ranked.abs() if magnitude else ranked).argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, order, True)


def formula(c: Crosscoder, p: dict[str, Tensor], x: Tensor, silent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, latents [B, F], x_hat [B, L, D]) as Lindsey et al. 2024 write it, sums over layers spelt out."""
    W_enc, W_dec, b_dec = (p[name].unflatten(-1, (L, D)) for name in ("W_enc", "W_dec", "b_dec"))
    z = sum((x[:, n] @ W_enc[:, n].T for n in range(L)), p["b_enc"])
    length = sum(W_dec[:, n].norm(dim=1) for n in range(L))
    assert isinstance(z, Tensor) and isinstance(length, Tensor)
    activation, count = c.activation, z.new_zeros(())
    ranked = z.detach() * length.detach()
    if isinstance(activation, TopK):
        code = z * select(ranked, activation.k, activation.absolute)
        code = code.relu() if activation.relu else code
    elif isinstance(activation, BatchTopK):
        keep = select(ranked.flatten(), int(activation.k * len(x))).view_as(z)
        code = z.relu() * keep
    elif isinstance(activation, JumpReLU):
        code, count = Jump.apply(z, p["threshold"], activation.bandwidth)
    else:
        code = z.relu()
    x_hat = torch.stack([code @ W_dec[:, n] for n in range(L)], 1) + b_dec
    loss = (x_hat - x).square().sum() / len(x) + c.l1 * (code.abs() @ length).sum() / len(x) + c.l0 * count / len(x)
    if c.aux is not None:
        dead = (silent + len(x)).masked_fill(code.detach().ne(0).any(0), 0) >= c.dead_after
        k = min(c.aux.k or 0, int(dead.sum()))
        pick = select(ranked.masked_fill(~dead, -torch.inf), k)
        e_hat = torch.einsum("bf,fld->bld", (z.relu() if c.aux.relu else z) * pick, W_dec)
        e = (x - x_hat).detach()
        unit = (e - e.mean(0)).square().sum() if c.aux.denominator == "residual" else len(x)
        loss = loss + c.aux.coefficient * min(int(dead.sum()) / (c.aux.k or 1), 1) * (e - e_hat).square().sum() / unit
    return loss, code, x_hat


def plainly(c: Crosscoder, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    p = {name: t.detach().double().clone().requires_grad_() for name, t in c.named_parameters()}
    loss, code, x_hat = formula(c, p, x.double(), c.silent)
    return loss, p, code, x_hat


@each
def test_outputs_and_gradients_are_the_papers(kind: str) -> None:
    c, x = build(kind), rows(16, L, D)
    loss, p, code, x_hat = plainly(c, x)
    loss.backward()
    got = c(x)
    assert torch.allclose(got.latents.to_dense(), code, rtol=1e-12, atol=1e-12)
    assert torch.allclose(got.x_hat, x_hat, rtol=1e-12, atol=1e-12) and got.x_hat.shape == (16, L, D)
    assert torch.allclose(got.squared_error, (x_hat - x).square().sum((1, 2)))
    other = copy.deepcopy(c)
    ours = c.loss(x)
    ours.loss.backward()
    metrics, gradients = other.step_gradients(x)
    assert torch.allclose(ours.loss, loss) and torch.allclose(metrics.loss, loss)
    for name, parameter in c.named_parameters():
        for gradient in (parameter.grad, densify(gradients[name])):
            assert gradient is not None and torch.allclose(gradient, p[name].grad, rtol=1e-9, atol=1e-11), name


@each
def test_many_steps_are_plain_adams(kind: str) -> None:
    c = build(kind)
    p = {name: t.detach().clone().requires_grad_() for name, t in c.named_parameters()}
    opt, plain = fastsae.optim.Adam(c, lr=1e-3), torch.optim.Adam(p.values(), lr=1e-3)
    for step in range(100 if kind in ("topk", "batchtopk", "relu") else 10):
        x = rows(16, L, D, seed=step)
        loss, _, _ = formula(c, p, x, c.silent)
        plain.zero_grad()
        loss.backward()
        plain.step()
        assert torch.allclose(opt.step(x).loss, loss.detach(), rtol=1e-7)
    for name, parameter in c.named_parameters():
        assert float((parameter - p[name]).detach().abs().max()) < 1e-4, name  # 0.1 of a step, after a hundred


@given(data=st.data())
def test_drawn_sizes(data: st.DataObject) -> None:
    n, d, f = (data.draw(st.integers(low, high)) for low, high in ((2, 4), (1, 6), (1, 20)))
    k = data.draw(st.integers(1, f))
    activation = data.draw(st.sampled_from([TopK(k), TopK(k, relu=False), BatchTopK(k), ReLU()]))
    c = Crosscoder(n, d, f, activation, seed=0, l1=data.draw(st.sampled_from([0.0, 0.1])))
    x = rows(data.draw(st.integers(0, 9)), n, d, dtype=torch.float32)
    metrics, gradients = copy.deepcopy(c).step_gradients(x)
    loss = c.loss(x)
    loss.loss.backward()
    torch.testing.assert_close(metrics.loss, loss.loss.detach())
    for name, parameter in c.named_parameters():
        torch.testing.assert_close(densify(gradients[name]), parameter.grad, rtol=1e-4, atol=1e-5)


def test_ties_and_features_without_a_decoder() -> None:
    """Equal ``n * score``: lower feature first; a longer row wins over a higher score; length 0 has latent 0, not NaN."""
    c = Crosscoder(2, 1, 4, TopK(2))
    with torch.no_grad():
        c.b_dec.zero_()
        c.encoders.copy_(torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0], [9.0, 0.0]]).unsqueeze(2))
        c.decoders.copy_(torch.tensor([[0.5, 0.5], [1.0, 1.0], [1.0, -1.0], [0.0, 0.0]]).unsqueeze(2))
    for x in (torch.tensor([[1.0], [5.0]]), torch.tensor([1.0, 5.0])):
        latents = c.encode(x)
        assert latents.indices.tolist() == [0, 1] and latents.values.tolist() == [2.0, 1.0]
    c.k = 4
    latents = c.encode(torch.tensor([[1.0], [5.0]]))
    assert latents.indices.tolist() == [0, 1, 2, 3] and latents.values.tolist() == [2.0, 1.0, 1.0, 0.0]
    assert not c.step_gradients(torch.ones(3, 2, 1))[0].loss.isnan()


def test_batch_topk_keeps_its_threshold_in_units_of_the_ranks() -> None:
    c, x = build("batchtopk"), rows(40, L, D)
    c.step_gradients(x)
    c.eval()
    latents = c.encode(x)
    length = c.decoders.norm(dim=2).sum(1)
    z = x.flatten(1) @ c.W_enc.T + c.b_enc
    want = z * (z * length > c.running_threshold.double())
    assert torch.allclose(latents.to_dense(), want) and bool((latents.values > 0).any())


def test_rows_do_not_change_with_their_batch() -> None:
    for kind in ("topk", "relu", "jumprelu"):
        c, x = build(kind, torch.float32), rows(33, L, D, dtype=torch.float32)
        whole, alone = c(x), [c(x[n : n + 1]) for n in (0, 17, 32)]
        for n, one in zip((0, 17, 32), alone):
            assert torch.equal(whole.x_hat[n], one.x_hat[0]), kind
            assert torch.equal(whole.latents.to_dense()[n], one.latents.to_dense()[0])


def test_fvu_is_each_layers() -> None:
    c, x = build("topk"), rows(4, 9, L, D)
    x[..., 1, :] = 2.0
    y = c(x).x_hat.flatten(0, 1)
    flat = x.flatten(0, 1)
    want = [(y[:, n] - flat[:, n]).square().sum() / (flat[:, n] - flat[:, n].mean(0)).square().sum() for n in (0, 2)]
    got = c.fvu(x)
    assert torch.allclose(got[[0, 2]], torch.stack(want).detach()) and got[1] == torch.inf


def test_flat_rows_masks_and_stacks() -> None:
    c, x = build("topk", torch.float32), rows(20, L, D, dtype=torch.float32)
    mask = torch.arange(20) % 3 > 0
    a, b = (copy.deepcopy(c).step_gradients(t, mask=mask) for t in (x, x.flatten(1)))
    (alone,) = [copy.deepcopy(c).step_gradients(x[mask])]
    for name in a[1]:
        assert torch.equal(densify(a[1][name]), densify(b[1][name])) and torch.equal(densify(a[1][name]), densify(alone[1][name]))
    members = [build("topk", torch.float32), build("topk", torch.float32)]
    members[1].k = 3
    own = [copy.deepcopy(m) for m in members]
    stack = SAEs(members)
    opts = [fastsae.optim.Adam(m, lr=1e-2) for m in (stack, *own)]
    for _ in range(3):
        opts[0].step(x.flatten(1))
        for opt in opts[1:]:
            opt.step(x)
    for mine, theirs in zip(stack, own):
        assert all(torch.equal(p, q) for p, q in zip(mine.parameters(), theirs.parameters()))


@each
def test_files_and_checkpoints(kind: str, tmp_path: Path) -> None:
    c, x = build(kind, torch.float32), rows(20, L, D, dtype=torch.float32)
    opt = fastsae.optim.Adam(c, lr=1e-3)
    opt.step(x)
    fastsae.save_checkpoint(tmp_path / "state.pt", c, opt)
    again = fastsae.load_checkpoint(tmp_path / "state.pt").sae
    assert type(again) is Crosscoder and again.config() == c.config()
    again.dense = c.dense  # how to compute is not configuration
    resumed = fastsae.optim.Adam(again, lr=1e-3)
    fastsae.load_checkpoint(tmp_path / "state.pt", again, resumed)
    opt.step(x)
    resumed.step(x)
    assert all(torch.equal(p, q) for p, q in zip(c.parameters(), again.parameters()))
    c.save(tmp_path / "sae")
    loaded = Crosscoder.load(tmp_path / "sae")
    assert torch.equal(loaded(x).x_hat, c.eval()(x).x_hat) and loaded.config() == c.config()
    with pytest.raises(ValueError, match="Crosscoder"):
        fastsae.SAE.load(tmp_path / "sae")
    fastsae.SAE(3, 4, TopK(1)).save(tmp_path / "other")
    with pytest.raises(ValueError, match="no layers"):
        Crosscoder.load(tmp_path / "other")
    with pytest.raises(ValueError, match="must be 'fastsae'"):
        c.save_pretrained(tmp_path / "x", format="saelens")


def test_errors() -> None:
    for arguments, message in (
        ((1, D, F), "n_layers"),
        ((L, 0, F), "d_model"),
        ((L, D, F, TopK(F + 1)), "activation.k"),
        ((L, D, F, Gated()), "got Gated"),
    ):
        with pytest.raises(ValueError, match=message):
            Crosscoder(*arguments)
    c = build("topk")
    for call in (c.encode, c, c.loss, c.step_gradients, c.fvu, c.init_from):
        with pytest.raises(ValueError, match=r"x must have shape \[.., L=3, D=5\] or \[.., 15\], got \[4, 5\]"):
            call(rows(4, D))
    with pytest.raises(ValueError, match="target must have shape"):
        c.loss(rows(4, L, D), rows(4, D))
    with pytest.raises(TypeError, match="must have dtype"):
        c.encode(torch.zeros(4, L, D, dtype=torch.int64))


# ---------------------------------------------------------------- model diffing


def test_relative_norms_and_the_features_of_one_model() -> None:
    W = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[0.0, 1.0], [3.0, 0.0]], [[0.6, 0.8], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    share = relative_norms(W)
    assert torch.allclose(share, torch.tensor([[1.0, 0.0], [0.25, 0.75], [0.5, 0.5], [0.5, 0.5]]))
    assert exclusive(W, 0).tolist() == [True, False, False, False] and not exclusive(W, 1).any()
    assert exclusive(W, 1, least=0.7).tolist() == [False, True, False, False]
    assert shared(W).tolist() == [False, False, True, False]  # a feature without a decoder is neither
    cosines = layer_cosines(W)
    assert cosines.shape == (4, 2, 2)
    assert torch.allclose(cosines[:, 0, 1], torch.tensor([0.0, 0.0, 0.8, 0.0])) and torch.allclose(cosines[2, 0, 0], torch.tensor(1.0))
    three = relative_norms(rows(7, 3, 4))
    assert torch.allclose(three.sum(1), torch.ones(7, dtype=torch.float64))
    for wrong in (rows(7, 4), rows(7, 1, 4)):
        with pytest.raises(ValueError, match="decoders must have shape"):
            relative_norms(wrong)
    with pytest.raises(ValueError, match="layer"):
        exclusive(W, 2)


def test_latent_scaling_is_the_least_squares_factor() -> None:
    c, x = build("topk"), rows(50, L, D)
    latents, y = c.encode(x), rows(50, D, seed=3)
    got = latent_scaling(latents, c.decoders[:, 1], y)
    code = latents.to_dense()
    for f in range(F):
        design = (code[:, f : f + 1] * c.decoders[f, 1]).flatten().detach().unsqueeze(1)
        want = torch.linalg.lstsq(design, y.flatten().unsqueeze(1)).solution if bool(design.any()) else torch.zeros(1, 1)
        assert torch.allclose(got[f], want.double()[0, 0], atol=1e-10)


def test_relative_norms_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plots.relative_norms(relative_norms(build("topk").decoders)[:, :2], tmp_path / "norms.png")
    assert (tmp_path / "norms.png").stat().st_size > 5_000
