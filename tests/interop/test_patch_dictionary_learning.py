"""``accelerate`` against the real dictionary_learning: outputs, gradients, whole updates, and what people do with a dictionary."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from dictionary_learning_cases import CLASSES, ROWS, D, F, K, make, rows
from hypothesis import given
from peers import load, same, same_call, same_gradients, second_derivatives
from places import ROOT
from torch import Tensor, nn

import fastsae
from fastsae.patch import dictionary_learning as library
from fastsae.patch.dictionary_learning import sae as adapter

dictionary_learning = load("dictionary_learning", "dictionary-learning")
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402


def pair(name: str, **more: Any) -> tuple[Any, Any]:
    """(accelerated, the library's own), equal."""
    return fastsae.accelerate(make(name, **more)), make(name, **more)


# ---------------------------------------------------------------- dictionaries


@given(data=st.data())
def test_outputs_and_gradients_of_any_dictionary(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(CLASSES)))
    threshold = data.draw(st.sampled_from([-1.0, 0.0, 0.8])) if "TopK" in name else None
    mine, theirs = pair(name, shift=data.draw(st.sampled_from([0.0, 2.5])), threshold=threshold)
    if name == "JumpReluAutoEncoder":
        mine.apply_b_dec_to_input = theirs.apply_b_dec_to_input = data.draw(st.booleans())
    options: dict[str, Any] = {}
    if name in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        options = data.draw(st.sampled_from([{}, {"use_threshold": True}, {"use_threshold": False}]))
    batch = data.draw(st.sampled_from([(1,), (7,), (2, 5)]))
    if name == "MatryoshkaBatchTopKSAE" and len(batch) > 1:
        batch = (9,)  # the library indexes the second dimension
    grads = []
    for ae in (mine, theirs):
        x = rows(*batch).requires_grad_()
        x_hat, f = ae(x, output_features=True)
        g = ae.encode(x, **options)
        (x_hat * rows(*batch, seed=5)).sum().backward()
        grads.append((x.grad, x_hat, f, g, ae(x)))
    for got, expected in zip(*grads):
        same(got, expected)
    same_gradients(mine, theirs)
    with torch.no_grad():
        f = theirs.encode(rows(*batch))
        same(mine.decode(f), theirs.decode(f))


@given(data=st.data())
def test_any_input_in_any_mode(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(CLASSES)))
    calls = [lambda ae, x: ae.encode(x), lambda ae, x: ae(x, output_features=True), lambda ae, x: ae.decode(ae.encode(x))]
    if "TopK" in name:
        calls += [lambda ae, x: ae.encode(x, use_threshold=True), lambda ae, x: ae.encode(x, use_threshold=False)]
    ranks = [(1,), (7,), (0,)]
    if name != "MatryoshkaBatchTopKSAE":  # it indexes the second dimension
        ranks += [(2, 5)]
    if "Batch" not in name:  # k times the first dimension is more than there are
        ranks += [(), (2, 0)]
    mine, theirs = pair(name, shift=2.5, threshold=0.5 if "TopK" in name else None)
    same_call(data, mine, theirs, data.draw(st.sampled_from(calls)), D, ranks)


def test_thresholds_and_biases_of_other_dtypes() -> None:
    for name in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        mine, theirs = (ae.double() for ae in pair(name))
        for ae in (mine, theirs):
            ae.threshold = torch.tensor(0.5)  # float32, as the trainers leave it
        x = rows().double()
        same(mine.encode(x, use_threshold=True), theirs.encode(x, use_threshold=True))
        same(mine(x), theirs(x))
        assert not fastsae.report(mine).now
    mine, theirs = (ae.double() for ae in pair("GatedAutoEncoder", shift=2.5))
    for ae in (mine, theirs):
        ae.r_mag = nn.Parameter(ae.r_mag.detach().float())
    with pytest.warns(UserWarning, match="its parameters have several dtypes"):
        same(mine.encode(rows().double()), theirs.encode(rows().double()))
    assert fastsae.report(mine).now["encode"] == "its parameters have several dtypes"


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_second_derivatives(name: str) -> None:
    mine, theirs = pair(name, shift=2.5)
    for function in (lambda sae, x: sae(x), lambda sae, x: sae.encode(x)):
        for a, b in zip(second_derivatives(mine, function, rows()), second_derivatives(theirs, function, rows()), strict=True):
            same(a, b)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_gradients_through_the_dense_latents(name: str) -> None:
    mine, theirs = pair(name, shift=2.5)
    for ae in (mine, theirs):
        f = ae.encode(rows())
        ((f * rows(width=F, seed=3)).sum() + ae.decode(f).square().sum()).backward()
    same_gradients(mine, theirs)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_sparse_latents_and_reconstruction(name: str) -> None:
    ae = make(name, shift=2.5)
    latents = fastsae.encode(ae, rows())
    assert isinstance(latents, fastsae.TopKLatents if name == "AutoEncoderTopK" else fastsae.RaggedLatents)
    same(latents.to_dense(), ae.encode(rows()))
    run = fastsae.reconstruct(ae, rows())
    same(run.x_hat, ae(rows()))
    same(run.squared_error, (run.x_hat - rows()).square().sum(1))
    with pytest.raises(ValueError, match="target must have shape"):
        fastsae.reconstruct(ae, rows(), target=rows(3))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AutoEncoderTopK", {"return_topk": True}),
        ("AutoEncoderTopK", {"return_topk": True, "use_threshold": True}),
        ("BatchTopKSAE", {"return_active": True, "use_threshold": False}),
        ("MatryoshkaBatchTopKSAE", {"return_active": True}),
        ("GatedAutoEncoder", {"return_gate": True}),
        ("GatedAutoEncoder", {"normalize_decoder": True}),
        ("JumpReluAutoEncoder", {"output_pre_jump": True}),
    ],
)
def test_what_returns_more_is_the_librarys_own(name: str, options: dict[str, Any]) -> None:
    mine, theirs = pair(name, shift=2.5)
    got, expected = mine.encode(rows(), **options), theirs.encode(rows(), **options)
    for a, b in zip(got, expected) if isinstance(got, tuple) else [(got, expected)]:
        assert torch.equal(a, b)
    if "normalize_decoder" in options:
        same(mine(rows(), normalize_decoder=True), theirs(rows(), normalize_decoder=True))
    assert any(key in " ".join(fastsae.report(mine).left) for key in options)


def test_ghost_gradients_and_inactive_groups_are_the_librarys_own() -> None:
    mine, theirs = pair("AutoEncoder")
    for a, b in zip(mine(rows(), True, torch.ones(F)), theirs(rows(), True, torch.ones(F))):
        assert torch.equal(a, b)
    mine, theirs = pair("MatryoshkaBatchTopKSAE")
    mine.active_groups = theirs.active_groups = 2
    assert "only 2 of 3 groups are active" in fastsae.report(mine).now["encode"]
    with pytest.warns(UserWarning, match="only 2 of 3 groups"):
        assert torch.equal(mine.encode(rows()), theirs.encode(rows()))
    mine, theirs = pair("BatchTopKSAE")  # k counts the first of several dimensions
    same(mine.encode(rows(2, 6), use_threshold=False), theirs.encode(rows(2, 6), use_threshold=False))


def test_hooks_on_the_linear_layers_fire() -> None:
    mine, theirs = pair("AutoEncoderTopK")
    seen: list[Tensor] = []
    for ae in (mine, theirs):
        ae.encoder.register_forward_hook(lambda module, args, out: seen.append(out))
        ae.out = ae(rows()) if ae is theirs else None
    assert "encoder has a hook" in fastsae.report(mine).now["forward"]
    with pytest.warns(UserWarning, match="encoder has a hook"):
        assert torch.equal(mine(rows()), theirs.out)
    assert torch.equal(seen[0], seen[1])


def test_autocast() -> None:
    for name in ("AutoEncoderTopK", "AutoEncoder"):
        mine, theirs = pair(name, shift=2.5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            a, b = mine.encode(rows()), theirs.encode(rows())
            y, z = mine(rows()), theirs(rows())
        assert a.dtype is b.dtype and y.dtype is z.dtype
        agreement = float(((a != 0) == (b != 0)).float().mean())
        print(f"{name}, bf16 autocast: {agreement:.2%} of the latents agree on firing")
        assert agreement > 0.99


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_only_the_instance_is_patched_copied_saved_and_restored(name: str, tmp_path: Path) -> None:
    ae, other = make(name, shift=2.5), make(name, shift=2.5)
    cls, state = type(ae), {key: tensor.clone() for key, tensor in ae.state_dict().items()}
    assert fastsae.accelerate(ae) is ae is fastsae.accelerate(ae)
    assert fastsae.report(ae).accelerated and type(other) is cls and isinstance(ae, cls)
    expected = other(rows())
    buffer = io.BytesIO()
    torch.save(ae, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(ae), pickle.loads(pickle.dumps(ae)), torch.load(buffer, weights_only=False)):
        assert fastsae.report(again).accelerated
        same(again(rows()), expected)
    torch.save(ae.state_dict(), tmp_path / "ae.pt")
    more = {"normalize_decoder": False} if name == "AutoEncoder" else {}
    same(cls.from_pretrained(tmp_path / "ae.pt", **more)(rows()), expected)
    assert all(torch.equal(tensor, state[key]) for key, tensor in ae.state_dict().items())
    with torch.no_grad():  # changed in place, through .data, and replaced
        for target in (ae, other):
            for p in target.parameters():
                p.data.mul_(1.25)
            if name == "AutoEncoder":
                target.decoder.weight = nn.Parameter(target.decoder.weight.data.roll(1, 1))
                target.scale_biases(2.0)
    same(ae(rows()), other(rows()))
    same(ae.double()(rows().double()), other.double()(rows().double()), of=1e-12)
    half, plain = ae.to(torch.bfloat16)(rows().bfloat16()), other.to(torch.bfloat16)(rows().bfloat16())
    assert half.dtype is plain.dtype is torch.bfloat16
    assert fastsae.restore(ae) is ae and type(ae) is cls and "_fastsae_state" not in vars(ae)


@pytest.mark.parametrize("name", ["AutoEncoderTopK", "AutoEncoder"])
def test_compiled(name: str) -> None:
    ae = fastsae.accelerate(make(name, shift=2.5))
    expected = ae(rows())
    y = torch.compile(ae, backend="aot_eager", fullgraph=name == "AutoEncoder")(rows())  # the buffer k is read in Python
    same(y, expected)
    y.sum().backward()
    assert bool(ae.encoder.weight.grad.any())


def test_refused() -> None:
    class Own(AutoEncoderTopK):
        pass

    with pytest.raises(TypeError, match="a subclass of AutoEncoderTopK: subclasses are left alone"):
        fastsae.accelerate(Own(D, F, K))
    with pytest.raises(TypeError, match=r"must be of a supported class of dictionary-learning .*, got .*IdentityDict"):
        fastsae.accelerate(dictionary_learning.dictionary.IdentityDict(D))


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(library.LIBRARY), "version", "0.2.0")
    with pytest.raises(RuntimeError, match=r"dictionary-learning 0.2.0 is installed; supported: >= 0.1.0, < 0.2"):
        fastsae.accelerate(make("AutoEncoder"))


# ---------------------------------------------------------------- trainers


def test_is_known_names_every_dictionary() -> None:
    assert {name.split(".")[-1] for name in adapter.KINDS} == set(CLASSES)


def test_the_bench_compares_equal_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import peers, training  # pyright: ignore[reportMissingImports]

    W = rows(F, seed=0)
    start = training.Start(W / torch.linalg.vector_norm(W, dim=1, keepdim=True), torch.zeros(D), K, lr=1e-3)
    x = training.distinct_rows(rows(60), start, ROWS)
    peer = peers.PEERS["dictionary_learning"]
    peers.check_encode(peer, peer.sae(start), fastsae.accelerate(peer.sae(start)), x)
    mine, theirs = peer.training(start), peer.training(start)
    fastsae.accelerate(mine.target)
    peers.check_step(mine, theirs, x, start.lr)


@pytest.mark.parametrize("name", ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder"])
def test_vmap_as_in_the_library(name: str) -> None:
    x = torch.randn(5, 1, D, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine, theirs = (torch.vmap(model)(x) for model in pair(name))
    torch.testing.assert_close(mine, theirs)
