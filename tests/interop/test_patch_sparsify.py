"""``accelerate`` against the real sparsify: outputs, gradients, whole training steps, and what people do with a coder."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from peers import load, minilm_rows, same, same_call, same_gradients, second_derivatives
from places import ROOT
from sparsify_cases import CONFIGS, ROWS, D, F, K, library_step, make, pair, rows
from torch import Tensor

import fastsae
from fastsae.patch import sparsify as adapter

sparsify = load("sparsify", "eai-sparsify")
from sparsify import SparseCoder, SparseCoderConfig  # noqa: E402


def same_code(a: Any, b: Any) -> None:
    """Values and indices; the library's are unsorted."""
    (va, ia), (vb, ib) = a, b
    order = vb.argsort(dim=1, descending=True)
    same(va, vb.gather(1, order))
    assert torch.equal(ia[va > 0], ib.gather(1, order)[va > 0])  # zeros are ties


@given(data=st.data())
def test_outputs_and_gradients(data: st.DataObject) -> None:
    config = data.draw(st.sampled_from(CONFIGS)) | {"k": data.draw(st.sampled_from([1, K, 12]))}
    mine, theirs = pair(**config)
    n = data.draw(st.sampled_from([2, 7, ROWS]))
    y = rows(n, 2) if config.get("transcode") else None
    dead = data.draw(st.sampled_from([None, 0, 3, 50]))
    mask = None if dead is None else torch.arange(F) < dead
    variance = data.draw(st.sampled_from([None, torch.tensor(77.0)]))
    outs, grads = [], []
    for coder in (mine, theirs):
        x = rows(n).requires_grad_()
        out = coder(x, y, dead_mask=mask, total_variance=variance)
        (out.fvu + out.auxk_loss / 32 + out.multi_topk_fvu / 8 + out.sae_out.square().mean()).backward()
        outs.append(out)
        grads.append(x.grad)
    for name in ("sae_out", "fvu", "auxk_loss", "multi_topk_fvu"):
        same(getattr(outs[0], name), getattr(outs[1], name))
    assert type(outs[0]) is type(outs[1])
    same_code((outs[0].latent_acts, outs[0].latent_indices), (outs[1].latent_acts, outs[1].latent_indices))
    same(*grads)
    same_gradients(mine, theirs)


@pytest.mark.parametrize("config", [{}, {"transcode": True}])
def test_second_derivatives(config: dict[str, Any]) -> None:
    """Where the library's decoder has none (embedding_bag), those of its formula."""
    mine, theirs = pair(**config)

    def formula(coder: Any, x: Tensor) -> Tensor:
        values, indices, _ = coder.encode(x)
        return torch.einsum("nk,nkd->nd", values, coder.W_dec[indices]) + coder.b_dec

    for ours, expected in ((lambda coder, x: coder(x).sae_out, formula), (*(lambda coder, x: coder.encode(x).top_acts,) * 2,)):
        for a, b in zip(second_derivatives(mine, ours, rows()), second_derivatives(theirs, expected, rows()), strict=True):
            same(a, b)


def _encoded(coder: Any, x: Tensor) -> Any:
    values, indices, pre_acts = coder.encode(x)
    assert indices.shape == values.shape and indices.dtype is torch.int64
    return values.gather(-1, values.detach().argsort(dim=-1, descending=True)), pre_acts


@given(data=st.data())
def test_any_input_in_any_mode(data: st.DataObject) -> None:
    mine, theirs = pair(**data.draw(st.sampled_from(CONFIGS)))
    what = data.draw(st.sampled_from(["encode", "forward", "decode"]))
    if what == "encode":
        same_call(data, mine, theirs, _encoded, D, [(), (1,), (7,), (2, 5), (1, 2, 5), (0,), (2, 0)])
    elif what == "decode":
        same_call(data, mine, theirs, lambda coder, x: coder.decode(*coder.encode(x)[:2]), D, [(1,), (7,), (0,)])
    else:
        dead = torch.arange(F) < data.draw(st.sampled_from([0, 30]))
        same_call(data, mine, theirs, lambda coder, x: tuple(coder(x, dead_mask=dead))[3:], D, [(1,), (7,), (0,)])


def test_pre_acts_of_inference_tensors() -> None:
    for config in CONFIGS:
        mine, theirs = pair(**config)
        with torch.inference_mode():
            x = rows().clone()
            late, expected = mine.encode(x), theirs.encode(x).pre_acts
            x.zero_()  # has no version that would tell
        same(late.pre_acts, expected)
        with torch.inference_mode():
            made = fastsae.accelerate(make(**config))  # nor have weights that were made there
            late = made.encode(rows())
            made.encoder.weight.zero_()
            same(late.pre_acts, expected)


def test_encode_and_lazy_pre_acts() -> None:
    mine, theirs = pair()
    a, b = mine.encode(rows()), theirs.encode(rows())
    same_code(a[:2], b[:2])
    assert isinstance(a, type(b)) and len(a) == 3 and a._fields == b._fields
    assert a._pre_acts is None, "nothing dense so far"
    assert a.top_acts is a[0] and a.top_indices is a[-2]
    assert a._pre_acts is None
    same(a.pre_acts, b.pre_acts)
    values, indices, pre = a
    assert pre is a.pre_acts is a[2] is a[-1] and indices is a[1] and values is a[0]
    assert tuple(a)[2] is pre and a._asdict()["pre_acts"] is pre and a._replace(top_acts=0).pre_acts is pre
    same(pickle.loads(pickle.dumps(mine.encode(rows()))).pre_acts, b.pre_acts)
    same(copy.deepcopy(type(b)(*[t.detach() for t in a])).pre_acts, b.pre_acts)


def test_pre_acts_of_weights_that_have_changed() -> None:
    def in_place(coder: Any) -> None:
        with torch.no_grad():
            coder.encoder.weight.mul_(2)

    def step(coder: Any, **options: Any) -> None:
        coder(rows()).fvu.backward()
        torch.optim.Adam(coder.parameters(), **options).step()

    for change in (in_place, step, lambda coder: step(coder, foreach=True), lambda coder: step(coder, fused=True)):
        mine, _ = pair()
        late = mine.encode(rows())
        change(mine)
        with pytest.raises(RuntimeError, match="pre_acts: the input or the encoder's weights have changed since encode"):
            late.pre_acts  # noqa: B018


def test_the_encoder_gets_no_gradient_from_pre_acts_in_the_library_either() -> None:
    for coder in pair():
        out = coder.encode(rows())
        (out.pre_acts.sum() + 0 * out.top_acts.sum()).backward()
        assert not coder.encoder.weight.grad.any()


def test_slots_of_value_0_pass_their_gradient_on() -> None:
    # Rows with fewer than k positive scores: which zeros are kept is a tie, that the kept ones get a gradient is not.
    mine, theirs = pair()
    with torch.no_grad():
        for coder in (mine, theirs):
            coder.encoder.bias.fill_(-100.0)
            coder.encoder.bias[:K] = torch.arange(K) * 1e-3 - 50.0
    for coder in (mine, theirs):
        out = coder.encode(rows())
        assert not out.top_acts.any()
        out.top_acts.sum().backward()
        assert float(coder.encoder.bias.grad.sum()) == ROWS * K


def test_decode_and_foreign_slots() -> None:
    mine, theirs = pair()
    indices = torch.randint(0, F, (7, 9), generator=torch.Generator().manual_seed(3))
    values = torch.randn(7, 9, generator=torch.Generator().manual_seed(4))
    grads = []
    for coder in (mine, theirs):
        v = values.clone().requires_grad_()
        y = coder.decode(v, indices)
        y.backward(torch.ones(()).expand_as(y))  # an expanded gradient
        grads.append((y, v.grad))
    same(grads[0][0], grads[1][0])
    same(grads[0][1], grads[1][1])
    same_gradients(mine, theirs)
    half = [coder.to(torch.bfloat16).decode(values, indices) for coder in pair()]
    same(*half, of=2e-2)


def test_sparse_latents_and_reconstruction() -> None:
    for config in CONFIGS:
        coder = make(**config)
        latents = fastsae.encode(coder, rows())
        same_code((latents.values, latents.indices), coder.encode(rows())[:2])  # pyright: ignore[reportAttributeAccessIssue]
        run = fastsae.reconstruct(coder, rows(), target=rows(seed=2))
        if not config.get("multi_topk"):
            same(run.x_hat, coder(rows(), rows(seed=2)).sae_out)
        same(run.squared_error, (run.x_hat - rows(seed=2)).square().sum(1))
    with pytest.raises(ValueError, match="target must have shape"):
        fastsae.reconstruct(make(), rows(), target=rows(3))
    encoder_only = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K), decoder=False)
    assert fastsae.encode(encoder_only, rows()).values.shape == (ROWS, K)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="has no decoder"):
        fastsae.reconstruct(encoder_only, rows())


def test_groupmax_is_left_alone_with_a_reason() -> None:
    mine, theirs = pair(activation="groupmax", k=8)
    assert "groupmax" in fastsae.report(mine).now["encode"]
    with pytest.warns(UserWarning, match="groupmax keeps the best of each group"):
        a = mine.encode(rows())
    for got, expected in zip(a, theirs.encode(rows())):
        assert torch.equal(got, expected)
    same(mine(rows()).sae_out, theirs(rows()).sae_out)
    with pytest.raises(ValueError, match="groupmax"):
        fastsae.encode(mine, rows())


def test_annealed_k_and_bad_input() -> None:
    mine, theirs = pair()
    mine.cfg.k = theirs.cfg.k = 9  # as the trainer does
    same_code(mine.encode(rows())[:2], theirs.encode(rows())[:2])
    for x, error, message in (
        (rows()[:, :5], RuntimeError, "size of tensor"),  # b_dec is subtracted first, as in the library
        (rows().double(), TypeError, "x must have dtype float32, got float64"),
    ):
        with pytest.raises(error, match=message):
            mine.encode(x)
    mine.cfg.k = F + 1
    with pytest.raises(ValueError, match="k must be at least 1 and at most 96"):
        mine.encode(rows())


def test_autocast() -> None:
    mine, theirs = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = mine.encode(rows()), theirs.encode(rows())
        assert a.top_acts.dtype is b.top_acts.dtype is torch.bfloat16
        y, z = mine(rows()), theirs(rows())
    kept = [{(r, int(f)) for r in range(ROWS) for f in out.top_indices[r]} for out in (a, b)]
    agreement = len(kept[0] & kept[1]) / (ROWS * K)
    print(f"bf16 autocast: {agreement:.1%} of the selected features agree")
    assert agreement > 0.95
    same(y.fvu, z.fvu, of=0.02)


def test_only_the_instance_is_patched_copied_saved_and_restored(tmp_path: Path) -> None:
    coder, other = make(), make()
    state = {name: tensor.clone() for name, tensor in coder.state_dict().items()}
    assert fastsae.accelerate(coder) is coder is fastsae.accelerate(coder)
    assert "encode_topk" in str(fastsae.report(coder)) and fastsae.report(coder).accelerated
    assert type(other) is SparseCoder and isinstance(coder, SparseCoder)
    expected = other(rows()).sae_out
    buffer = io.BytesIO()
    torch.save(coder, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(coder), pickle.loads(pickle.dumps(coder)), torch.load(buffer, weights_only=False)):
        assert fastsae.report(again).accelerated
        same(again(rows()).sae_out, expected)
    coder.save_to_disk(tmp_path / "layer")
    back = SparseCoder.load_from_disk(tmp_path / "layer")
    same(back(rows()).sae_out, expected)
    assert coder.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in coder.state_dict().items())
    with torch.no_grad():  # changed in place, through .data, and replaced
        for target in (coder, other):
            target.encoder.weight.mul_(1.5)
            target.b_dec.data.add_(0.1)
            assert target.W_dec is not None
            target.W_dec = torch.nn.Parameter(target.W_dec.data.roll(1, 0))
    same(coder(rows()).sae_out, other(rows()).sae_out)
    same(coder.double()(rows().double()).fvu, other.double()(rows().double()).fvu, of=1e-12)
    assert fastsae.restore(coder) is coder and type(coder) is SparseCoder and "_fastsae_state" not in vars(coder)
    with fastsae.accelerated(coder):
        assert type(coder) is not SparseCoder
    assert type(coder) is SparseCoder


def test_compiled() -> None:
    coder = fastsae.accelerate(make())
    expected = coder(rows())
    compiled = torch.compile(coder, backend="aot_eager", fullgraph=True)
    out = compiled(rows())
    same(out.sae_out, expected.sae_out)
    out.fvu.backward()
    assert bool(coder.encoder.weight.grad.any())


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(adapter.LIBRARY), "version", "1.2.0")
    with pytest.raises(RuntimeError, match=r"eai-sparsify 1.2.0 is installed; supported: >= 1.3.3, < 1.4"):
        fastsae.accelerate(make())
    assert fastsae.report(fastsae.accelerate(make(), any_version=True)).accelerated


def test_the_bench_compares_equal_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import peers, training  # pyright: ignore[reportMissingImports]

    W = torch.randn(F, D, generator=torch.Generator().manual_seed(0))
    start = training.Start(W / torch.linalg.vector_norm(W, dim=1, keepdim=True), torch.zeros(D), K, lr=1e-3)
    x = training.distinct_rows(rows(60), start, ROWS)
    peer = peers.PEERS["sparsify"]
    peers.check_encode(peer, peer.sae(start), fastsae.accelerate(peer.sae(start)), x)
    mine, theirs = peer.training(start), peer.training(start)
    fastsae.accelerate(mine.target)
    peers.check_step(mine, theirs, x, start.lr)


@pytest.mark.slow
def test_real_activations(tmp_path: Path) -> None:
    x = minilm_rows(tmp_path)
    coders = [SparseCoder(x.shape[1], SparseCoderConfig(num_latents=1024, k=16)) for _ in range(2)]
    coders[1].load_state_dict(coders[0].state_dict())
    optimizers = [torch.optim.Adam(coder.parameters(), lr=1e-3) for coder in coders]
    fastsae.accelerate(coders[0])
    for part in x[:256].split(64):
        a = adapter.train_step(coders[0], optimizers[0], part)
        b = library_step(coders[1], optimizers[1], part, None, None, 0.0)
        same(a.fvu, b.fvu, of=1e-5)
    for p, q in zip(coders[0].parameters(), coders[1].parameters()):
        off = (p - q).detach().abs() > 1e-4
        assert float(off.double().mean()) < 1e-4  # an entry of a gradient that is all rounding moves by lr either way
    a, b = coders[0](x), coders[1](x)
    same(a.fvu, b.fvu, of=1e-4)
    chosen = [torch.zeros(x.shape[0], 1024).scatter_(1, out.latent_indices, 1.0) for out in (a, b)]
    assert float((chosen[0] != chosen[1]).double().mean()) < 1e-5  # scores within rounding of each other
