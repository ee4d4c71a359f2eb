"""Cross-layer transcoders against the papers' formula in plain float64, a sum over pairs of layers; files; what is selected jointly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_crosscoder import Jump, rows, select
from test_step_gradients import Largest
from torch import Tensor

import fastsae
from fastsae import SAE, AuxK, BatchTopK, Gated, JumpReLU, ReLU, TopK
from fastsae.gradients import densify
from fastsae.sae import CrossLayerTranscoder

L, D, F = 3, 5, 20
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "topk": (TopK(4), {}),
    "batchtopk": (BatchTopK(3.5), {}),
    "relu": (ReLU(), {"l1": 0.3, "dense": False}),
    "relu_dense": (ReLU(), {"l1": 0.3, "dense": True}),
    "jumprelu": (JumpReLU(torch.linspace(0, 0.6, F), bandwidth=0.7), {"l0": 0.4, "l1": 0.1, "dense": False}),
    "aux": (TopK(4), {"aux": AuxK(6), "dead_after": 20}),
    "skip": (ReLU(), {"l1": 0.3, "skip": True, "dense": True}),
    "skip_batch": (BatchTopK(3.5), {"skip": True, "aux": AuxK(6), "dead_after": 20}),
    "aux_batch": (BatchTopK(3.5), {"aux": AuxK.saelens(6), "dead_after": 20}),
}
each = pytest.mark.parametrize("kind", KINDS)


def build(kind: str, dtype: torch.dtype = torch.float64) -> CrossLayerTranscoder:
    activation, terms = KINDS[kind]
    made = CrossLayerTranscoder(L, D, F, activation, dtype=dtype, seed=1, **terms)
    with torch.no_grad():
        made.b_dec.copy_(rows(L, D, seed=7))
        for layer in made:
            layer.b_enc.copy_(torch.linspace(-0.3, 0.4, F))
            layer.silent[:8] = 10
            if layer.W_skip is not None:
                layer.W_skip.copy_(rows(*layer.W_skip.shape, seed=8))
    return made


def pair(n: int = 16, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    return rows(n, L, D, seed=2 * seed, dtype=dtype), rows(n, L, D, seed=2 * seed + 1, dtype=dtype)


def formula(clt: CrossLayerTranscoder, p: dict[str, Tensor], x: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """(loss, latents of each layer, y): ``y[m] = b_dec[m] + sum over l <= m of a[l] W_dec[l -> m]``, penalties by the norms of all rows of
    a feature side by side."""
    n, B, activation = clt.n_layers, len(x), clt.activation
    W_dec = [p[f"layers.{m}.W_dec"].view(clt.d_sae, n - m, -1) for m in range(n)]
    z = torch.stack([x[:, m] @ p[f"layers.{m}.W_enc"].T + p[f"layers.{m}.b_enc"] for m in range(n)])
    count = z.new_zeros(())
    if isinstance(activation, TopK):
        codes = z.relu() * select(z.detach(), activation.k)
    elif isinstance(activation, BatchTopK):
        codes = z.relu() * select(z.detach().flatten(), int(activation.k * B * n)).view_as(z)
    elif isinstance(activation, JumpReLU):
        each = [Jump.apply(z[m], p[f"layers.{m}.threshold"], activation.bandwidth) for m in range(n)]
        codes, count = torch.stack([code for code, _ in each]), sum(counted for _, counted in each)
    else:
        codes = z.relu()
    bias = p["layers.0.b_dec"].view(n, -1)
    y = torch.stack([sum((codes[m] @ W_dec[m][:, to - m] for m in range(to + 1)), bias[to]) for to in range(n)], 1)
    if clt.skip:
        skips = [p[f"layers.{m}.W_skip"].view(n - m, -1, x.shape[-1]) for m in range(n)]
        y = y + torch.stack([sum(x[:, m] @ skips[m][to - m].T for m in range(to + 1)) for to in range(n)], 1)
    loss = (y - t).square().sum() / B + clt.l0 * count / B
    for m in range(n):
        loss = loss + clt.l1 * (codes[m].abs() @ W_dec[m].flatten(1).norm(dim=1)).sum() / B
        if clt.aux is None:
            continue
        dead = (clt[m].silent + B).masked_fill(codes[m].detach().ne(0).any(0), 0) >= clt.dead_after
        pick = select(z[m].detach().masked_fill(~dead, -torch.inf), min(clt.aux.k, int(dead.sum())))
        e_hat = torch.einsum("bf,fmd->bmd", (z[m].relu() if clt.aux.relu else z[m]) * pick, W_dec[m])
        e = (t - y)[:, m:].detach()
        unit = (e - e.mean(0)).square().sum() if clt.aux.denominator == "residual" else B
        loss = loss + clt.aux.coefficient * min(int(dead.sum()) / clt.aux.k, 1) * (e - e_hat).square().sum() / unit
    return loss, list(codes), y


def parameters(clt: CrossLayerTranscoder) -> dict[str, Tensor]:
    return {name: t.detach().clone().requires_grad_() for name, t in clt.named_parameters() if t.requires_grad}


@each
def test_outputs_and_gradients_are_the_papers(kind: str) -> None:
    clt, (x, t) = build(kind), pair()
    p = parameters(clt)
    loss, codes, y = formula(clt, p, x, t)
    loss.backward()
    latents = clt.encode(x)
    for mine, want in zip(latents, codes):
        assert torch.allclose(mine.to_dense(), want, rtol=1e-12, atol=1e-12)
    assert torch.allclose(clt(x), y, rtol=1e-12, atol=1e-12) and torch.equal(clt(x), clt.decode(latents, x))
    other = copy.deepcopy(clt)
    ours = clt.loss(x, t)
    ours.loss.backward()
    metrics, gradients = other.step_gradients(x, t)
    fvu = (y - t).square().sum() / (t - t.mean(0)).square().sum()
    for got in (ours, metrics):
        assert torch.allclose(got.loss, loss) and torch.allclose(got.fvu, fvu)
        assert float(got.l0) == pytest.approx(sum(int((code != 0).sum()) for code in codes) / 16)
    named = dict(clt.named_parameters())
    for name, want in p.items():
        for gradient in (named[name].grad, densify(gradients[name])):
            assert gradient is not None and torch.allclose(gradient, want.grad, rtol=1e-8, atol=1e-10), name
    each_fvu = [(y[:, n] - t[:, n]).square().sum() / (t[:, n] - t[:, n].mean(0)).square().sum() for n in range(L)]
    assert torch.allclose(clt.fvu(x, t), torch.stack(each_fvu).detach())


@each
def test_many_steps_are_plain_adams(kind: str) -> None:
    clt = build(kind)
    p = parameters(clt)
    opt, plain = fastsae.optim.Adam(clt, lr=1e-3), torch.optim.Adam(p.values(), lr=1e-3)
    for step in range(100 if kind in ("topk", "batchtopk", "relu") else 10):
        x, t = pair(seed=step)
        loss, _, _ = formula(clt, p, x, t)
        plain.zero_grad()
        loss.backward()
        plain.step()
        assert torch.allclose(opt.step(x, t).loss, loss.detach(), rtol=1e-7)
    named = dict(clt.named_parameters())
    for name, want in p.items():
        assert float((named[name] - want).detach().abs().max()) < 1e-4, name  # 0.1 of a step, after a hundred
    assert not any(bool(layer.b_dec.any()) for layer in [*clt][1:])


@given(data=st.data())
def test_drawn_sizes(data: st.DataObject) -> None:
    n, d, f = (data.draw(st.integers(1, high)) for high in (4, 6, 15))
    k = data.draw(st.integers(1, f))
    activation = data.draw(st.sampled_from([TopK(k), BatchTopK(k), ReLU(), JumpReLU(0.1, bandwidth=0.5)]))
    clt = CrossLayerTranscoder(n, d, f, activation, seed=0, l1=data.draw(st.sampled_from([0.0, 0.1])))
    B = data.draw(st.integers(0, 9))
    x, t = rows(B, n, d, dtype=torch.float32), rows(B, n, d, seed=1, dtype=torch.float32)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=B, max_size=B)), dtype=torch.bool)
    metrics, gradients = copy.deepcopy(clt).step_gradients(x, t, mask)
    loss = clt.loss(x[mask], t[mask])
    loss.loss.backward()
    torch.testing.assert_close(metrics.loss, loss.loss.detach())
    for name, parameter in clt.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(densify(gradients[name]), parameter.grad, rtol=1e-4, atol=1e-5)


def test_joint_selection_is_exact_whatever_the_bound_and_ties_go_by_layer() -> None:
    clt = CrossLayerTranscoder(2, 2, 3, BatchTopK(1.25), dtype=torch.float64)
    x = torch.ones(2, 2, 2, dtype=torch.float64)  # every score is the sum of a row of W_enc
    with torch.no_grad():
        clt[0].W_enc.copy_(torch.tensor([[1.0, 1.0], [2.0, 0.0], [-1.0, 0.0]]))
        clt[1].W_enc.copy_(torch.tensor([[2.0, 0.0], [3.0, 0.0], [1.0, 1.0]]))
    for running in (-1.0, 1e-3, 1.9, 2.2, 100.0):
        for layer in clt:
            layer.running_threshold.fill_(running)
        first, second = clt.encode(x)  # 5 of 12: both 3s of layer 1, then 2s of layer 0
        assert second.to_dense().tolist() == [[0, 3, 0], [0, 3, 0]] and first.to_dense().tolist() == [[2, 2, 0], [2, 0, 0]]
    clt[0].W_enc.data.neg_()  # one layer alone has positive scores, and fewer than asked for
    clt.k = 3
    first, second = clt.encode(x)
    assert first.to_dense().tolist() == [[0, 0, 1], [0, 0, 1]] and second.to_dense().tolist() == [[2, 3, 2], [2, 3, 2]]
    clt.k = 0.2  # none
    metrics, _ = clt.step_gradients(x, x)
    assert float(metrics.l0) == 0 and float(clt[0].running_threshold) == 100
    clt.k = 1.25
    clt.step_gradients(x, x)
    assert all(float(layer.running_threshold) == pytest.approx(100 + 0.01 * (2 - 100)) for layer in clt)


def test_rows_do_not_change_with_their_batch() -> None:
    for kind in ("topk", "relu", "jumprelu"):
        clt, (x, _) = build(kind, torch.float32), pair(33, torch.float32)
        whole = clt(x)
        for n in (0, 17, 32):
            assert torch.equal(whole[n], clt(x[n])), kind  # [L, D] is a row, too


def test_layers_are_transcoders_and_make_one() -> None:
    clt, (x, _) = build("topk"), pair()
    parts = [layer(x[:, n]).x_hat.view(16, L - n, D) for n, layer in enumerate(clt)]
    want = torch.stack([sum(parts[n][:, m - n] for n in range(m + 1)) for m in range(L)], 1)
    assert torch.allclose(clt(x), want) and clt.W_dec(1).shape == (F, L - 1, D) and clt.b_dec.shape == (L, D)
    own = [SAE(D, F, TopK(4), d_out=(L - n) * D, dtype=torch.float64) for n in range(L)]
    with torch.no_grad():
        for number, layer in enumerate(own):
            layer.b_dec.copy_(torch.arange((L - number) * D))
    want = [layer(x[:, n]).x_hat.view(16, L - n, D) for n, layer in enumerate(own)]
    made = CrossLayerTranscoder.of(own)
    assert torch.allclose(made(x)[:, 2], want[0][:, 2] + want[1][:, 1] + want[2][:, 0])
    assert [p.requires_grad for name, p in made.named_parameters() if name.endswith("b_dec")] == [True, False, False]
    for wrong in (own[::-1], [own[0], SAE(D, F, TopK(3), d_out=2 * D, dtype=torch.float64), own[2]], [SAE(D, F, TopK(4))]):
        with pytest.raises(ValueError, match=r"layer \d of \d must have"):
            CrossLayerTranscoder.of(wrong)


@each
def test_files_and_checkpoints(kind: str, tmp_path: Path) -> None:
    clt, (x, t) = build(kind, torch.float32), pair(dtype=torch.float32)
    opt = fastsae.optim.Adam(clt, lr=1e-3, clip=1.0)
    opt.step(x, t)
    fastsae.save_checkpoint(tmp_path / "state.pt", clt, opt)
    again = fastsae.load_checkpoint(tmp_path / "state.pt").sae
    assert type(again) is CrossLayerTranscoder and again.config() == clt.config()
    for mine, theirs in zip(clt, again):
        theirs.dense = mine.dense  # how to compute is not configuration
    resumed = fastsae.optim.Adam(again, lr=1e-3, clip=1.0)
    fastsae.load_checkpoint(tmp_path / "state.pt", again, resumed)
    opt.step(x, t)
    resumed.step(x, t)
    assert all(torch.equal(p, q) for p, q in zip(clt.state_dict().values(), again.state_dict().values()))
    with pytest.raises(ValueError, match="3 layers, the module is SAE"):
        fastsae.load_checkpoint(tmp_path / "state.pt", SAE(D, F, TopK(4)))
    clt.save(tmp_path / "clt")
    loaded = CrossLayerTranscoder.load(tmp_path / "clt")
    assert torch.equal(loaded(x), clt.eval()(x)) and loaded.config() == clt.config() and not loaded.training


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "batchtopk"])
def test_circuit_tracers_files(kind: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    clt, (x, t) = build(kind, torch.float32), pair(dtype=torch.float32)
    clt.step_gradients(x, t)
    clt.eval().save_pretrained(tmp_path / "clt")
    held = safetensors.load_file(tmp_path / "clt" / "W_dec_1.safetensors")["W_dec_1"]
    assert torch.equal(held, clt.W_dec(1)) and held.shape == (F, L - 1, D)
    held = safetensors.load_file(tmp_path / "clt" / "W_enc_1.safetensors")
    assert set(held) == {"W_enc_1", "b_enc_1", "b_dec_1"} | (set() if kind == "relu" else {"threshold_1"})
    assert torch.equal(held["b_dec_1"], clt.b_dec[1])
    loaded = CrossLayerTranscoder.from_pretrained(tmp_path / "clt")
    assert torch.equal(loaded(x), clt(x))
    with pytest.raises(ValueError, match="cross-layer transcoder of circuit-tracer"):
        SAE.from_pretrained(tmp_path / "clt")
    (tmp_path / "clt" / "W_dec_1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="W_dec_1"):
        CrossLayerTranscoder.from_pretrained(tmp_path / "clt")
    safetensors.save_file({"W_dec_1": torch.zeros(F, L, D)}, tmp_path / "clt" / "W_dec_1.safetensors")
    with pytest.raises(ValueError, match="W_dec of layer 1"):
        CrossLayerTranscoder.from_pretrained(tmp_path / "clt")


def test_memory_of_a_step_is_no_gradients() -> None:
    """Nothing of a decoder's size is allocated beside weights and moments."""
    clt = CrossLayerTranscoder(2, 16, 2048, TopK(2), seed=0)
    x, t = rows(8, 2, 16, dtype=torch.float32), rows(8, 2, 16, seed=1, dtype=torch.float32)
    Largest.elements = 0
    with Largest():
        clt.step_gradients(x, t)
    assert Largest.elements < 2048 * 16


def test_errors(tmp_path: Path) -> None:
    for arguments, message in (((0, D, F), "n_layers"), ((L, D, F, TopK(F + 1)), "activation.k"), ((L, D, F, Gated()), "got Gated")):
        with pytest.raises(ValueError, match=message):
            CrossLayerTranscoder(*arguments)
    clt, (x, t) = build("topk"), pair()
    for call in (clt.encode, clt, lambda bad: clt.loss(bad, t), lambda bad: clt.step_gradients(bad, t), lambda bad: clt.fvu(bad, t)):
        with pytest.raises(ValueError, match=r"x must have shape \[.., L=3, D=5\], got \[16, 5\]"):
            call(x[:, 0])
    with pytest.raises(ValueError, match="target must be given"):
        clt.step_gradients(x)
    with pytest.raises(ValueError, match="target must have shape"):
        clt.loss(x, t[:3])
    with pytest.raises(ValueError, match="mask must have shape"):
        clt.loss(x, t, mask=torch.ones(16, L, dtype=torch.bool))
    with pytest.raises(ValueError, match="l0 needs JumpReLU"):
        clt.loss(x, t, l0=0.1)
    with pytest.raises(TypeError, match="dtype of the parameters"):
        build("topk", torch.float32).encode(x)
    with pytest.raises(ValueError, match="latents must be those of 3 layers, got 2"):
        clt.decode(clt.encode(x)[:2])
    with pytest.raises(ValueError, match="files hold ReLU and JumpReLU"):
        clt.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="format must be 'circuit_tracer'"):
        clt.save_pretrained(tmp_path, format="saelens")
    with pytest.raises(FileNotFoundError, match="W_enc_0"):
        CrossLayerTranscoder.from_pretrained(tmp_path)


def test_trainer(tmp_path: Path) -> None:
    """It is a loop over steps, fused or torch's, and its second half goes on from the file."""
    data = [(*pair(dtype=torch.float32, seed=seed), torch.arange(16) != seed) for seed in range(6)]
    for fused in (True, False):
        made, states, clt = list[dict[str, float]](), list[dict[str, Tensor]](), build("topk")
        for stops in ([6], [3, 6]):
            for stop in stops:
                clt = build("skip_batch", torch.float32)
                opt = fastsae.optim.Adam(clt, lr=1e-3) if fused else torch.optim.Adam(clt.parameters(), lr=1e-3)
                trainer = fastsae.Trainer(
                    torch.nn.Sequential(clt),
                    opt,
                    anneal={"k": lambda step: 4 - step / 4},
                    checkpoint=tmp_path / f"{fused}{len(stops)}.pt",
                    progress=False,
                )
                made.append(trainer.fit(data[stops[0] % stop :], stop, resume=True))
            states.append(clt.state_dict())
        assert made[0] == made[2] and all(torch.equal(t, states[1][name]) for name, t in states[0].items())
        clt = build("skip_batch", torch.float32)
        opt = fastsae.optim.Adam(clt, lr=1e-3) if fused else torch.optim.Adam(clt.parameters(), lr=1e-3)
        for step, (x, t, mask) in enumerate(data):
            clt.k = 4 - step / 4
            if fused:
                opt.step(x, t, mask)
            else:
                opt.zero_grad()
                clt.loss(x, t, mask=mask).loss.backward()
                opt.step()
        assert all(torch.equal(t, states[0][name]) for name, t in clt.state_dict().items())
        assert made[0]["left_out"] == 6 and made[0]["dead"] == int(clt.dead_features.sum())
        x, t, mask = data[0]
        trainer = fastsae.Trainer(clt, opt, max_norm=10, progress=False)
        large = x.clone()
        large[[3, 5], 1] *= 1000  # one layer is enough
        assert trainer.fit([(large, t)], 1)["left_out"] == 2
        bad = x.clone()
        bad[[0, 4], 2] = torch.nan  # the first of them does not count
        with pytest.raises(FloatingPointError, match="x is not finite in row 4 of the batch"):
            fastsae.Trainer(clt, opt, progress=False).fit([(bad, t, mask)], 1)
    clt = build("topk")
    clt.averaged = True  # what Trainer says in a group; silent features then count all rows
    assert all(layer.averaged for layer in clt)
    with pytest.raises(TypeError, match=r"members\[0\] must be an SAE"):
        fastsae.SAEs([clt])  # pyright: ignore[reportArgumentType]


def test_gemma_scope_2_files(tmp_path: Path) -> None:
    """Against the formula in float64: each layer's latents write to its own layer and the later ones."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    n, x, want, small = 3, rows(5, 3, D, dtype=torch.float32), torch.zeros(5, 3, D, dtype=torch.float64), dict[str, Tensor]()
    for i in range(n):
        named = {"w_enc": rows(D, F, seed=i), "w_dec": rows(F, n, D, seed=9 + i), "b_enc": rows(F, seed=i), "b_dec": rows(D, seed=i)}
        named |= {"threshold": rows(F, seed=20 + i)}
        named["w_dec"][:, :i] = 0
        z = x[:, i].double() @ named["w_enc"] + named["b_enc"]
        f = z.relu() * (z > named["threshold"])
        want += torch.einsum("bf,fld->bld", f, named["w_dec"])
        want[:, i] += named["b_dec"]
        small = {name: tensor.float().contiguous() for name, tensor in named.items()}
        safetensors.save_file(small, tmp_path / f"params_layer_{i}.safetensors")
    clt = CrossLayerTranscoder.from_pretrained(tmp_path)
    torch.testing.assert_close(clt(x).double(), want, rtol=1e-5, atol=1e-4)
    for i in range(n):
        skip, path = rows(D, D, seed=30 + i, dtype=torch.float32), tmp_path / f"params_layer_{i}.safetensors"
        (tmp_path / "affine").mkdir(exist_ok=True)
        safetensors.save_file({**safetensors.load_file(path), "affine_skip_connection": skip}, tmp_path / "affine" / path.name)
        want[:, i] += x[:, i].double() @ skip.double()
    affine = CrossLayerTranscoder.from_pretrained(tmp_path / "affine")
    torch.testing.assert_close(affine(x).double(), want, rtol=1e-5, atol=1e-4)
    affine.save(tmp_path / "own")
    assert torch.equal(CrossLayerTranscoder.load(tmp_path / "own")(x), affine(x))
    with pytest.raises(ValueError, match="W_skip of layer 0 would be lost"):
        affine.save_pretrained(tmp_path / "lost")
    with pytest.raises(ValueError, match="x must be given, the skip connections need it"):
        affine.decode(affine.encode(x))
    assert torch.equal(CrossLayerTranscoder.from_pretrained(tmp_path, format="gemma_scope_2")(x), clt(x))
    for broken, message in (
        ({"w_dec": torch.ones(F, n, D)}, "layer 2 writes to layers before it"),
        ({"w_dec": torch.ones(F, n + 1, D)}, r"w_dec \[F, 3, D\] in layer 2"),
        ({"affine_skip_connection": torch.ones(D, D)}, "layer 2 of 3 must have skip_connection=False, got True"),
        ({"affine_skip_connection": torch.ones(D, 2)}, r"affine_skip_connection of layer 2 must have shape \[5, 5\]"),
    ):
        safetensors.save_file({**small, **broken}, tmp_path / "params_layer_2.safetensors")
        with pytest.raises(ValueError, match=message):
            CrossLayerTranscoder.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="must hold W_enc_0"):
        CrossLayerTranscoder.from_pretrained(tmp_path, format="circuit_tracer")
    with pytest.raises(ValueError, match="format must be"):
        CrossLayerTranscoder.from_pretrained(tmp_path, format="sparsify")  # pyright: ignore[reportArgumentType]
