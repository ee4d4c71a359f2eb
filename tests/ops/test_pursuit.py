"""Matching pursuit: against the same in float64 where no choice is close, bits whatever the weights, ends of rows, ties, NaN, gradients."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

import fastsae
from fastsae.latents import RaggedLatents
from fastsae.ops import pursuit
from fastsae.sae import PursuitWeights, encode_pursuit


def rows_of(seed: int, *shape: int, unit: bool = False) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn / drawn.norm(dim=-1, keepdim=True) if unit else drawn


def same_bits(a: RaggedLatents, b: RaggedLatents) -> None:
    assert torch.equal(a.crow, b.crow) and torch.equal(a.col, b.col)
    assert torch.equal(a.values.nan_to_num(7), b.values.nan_to_num(7))


def by_hand(x: Tensor, W: Tensor, rule: pursuit.Rule) -> tuple[dict[int, float], float]:
    """One row in float64, and the least distance between a choice and another that could have been made, of the row's norm."""
    r, values, close, size = x.clone(), dict[int, float](), float("inf"), float(x.norm())
    for _ in range(rule.k):
        scores = W @ r
        rank = scores.abs() if rule.absolute else scores
        best = rank.topk(2).values
        f = int(rank.argmax())
        close = min(close, float(best[0] - best[1]), float(best[0]))
        c = float(scores[f])
        if not rule.absolute and c <= 0:
            break
        again = f in values
        if rule.orthogonal:
            if again:
                break
            chosen = [*values, f]
            values = dict(zip(chosen, torch.linalg.lstsq(W[chosen].T, x.unsqueeze(1)).solution[:, 0].tolist()))
            r = x - torch.tensor(list(values.values()), dtype=torch.float64) @ W[chosen]
        else:
            values[f] = values.get(f, 0.0) + c
            r = r - c * W[f]
        norm = float(r.norm())
        close = min(close, abs(norm - rule.tolerance)) if rule.tolerance else close
        if norm < rule.tolerance or (again and rule.stop_on_repeat):
            break
    return values, close / size


@given(data=st.data())
def test_against_float64_and_the_same_bits_whatever_the_weights(data: st.DataObject) -> None:
    rows, D = data.draw(st.sampled_from([1, 2, 7, 24])), data.draw(st.sampled_from([3, 16, 33, 80]))
    F = data.draw(st.sampled_from([2, 31, 128, 300]))
    steps, tolerance = data.draw(st.sampled_from([1, 2, 9])), data.draw(st.sampled_from([0.0, 1.0, 3.0]))
    rule = pursuit.Rule(steps, tolerance, *data.draw(st.tuples(*[st.booleans()] * 3)))
    x, W = rows_of(data.draw(st.integers(0, 99)), rows, D), rows_of(7, F, D, unit=True)
    options: dict[str, Any] = rule._asdict() | {"tolerance": rule.tolerance or None}
    xf, Wf = x.float(), W.float()
    Wf = Wf.T.contiguous().T if data.draw(st.booleans()) else Wf
    got = encode_pursuit(xf, Wf, **options)
    for weights in (fastsae.pack(Wf), PursuitWeights(Wf)):
        same_bits(encode_pursuit(xf, weights, **options), got)
    cut = data.draw(st.integers(0, rows))
    parts = [encode_pursuit(part, PursuitWeights(Wf), **options) for part in (xf[:cut], xf[cut:])]
    assert torch.equal(torch.cat([p.values for p in parts]), got.values) and torch.equal(torch.cat([p.col for p in parts]), got.col)
    for row in range(rows):
        want, close = by_hand(xf[row].double(), Wf.double(), rule)
        if close < 1e-4:
            continue
        span = slice(*got.crow[row : row + 2].tolist())
        assert got.col[span].tolist() == sorted(want)
        torch.testing.assert_close(got.values[span].double(), torch.tensor([want[f] for f in sorted(want)]).double(), rtol=1e-4, atol=1e-4)


def test_kept_scores_hold_their_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """After every subtraction each kept score is as close to the score in float64 as is said of it, and most choices need no weights."""
    x, W = rows_of(1, 40, 48).float(), rows_of(2, 400, 48, unit=True).float()
    weights, used, asked = PursuitWeights(W), list[float](), list[int]()
    subtract, best = pursuit._Kept.subtract, pursuit._Kept.best

    def watched(self: Any, r: Tensor, f: Tensor, c: Tensor) -> None:
        subtract(self, r, f, c)
        off = (self.scores.double() - r.double() @ W.double().T).abs().amax(1)
        used.append(float((off / self.error).max()))

    def counting(self: Any, select: Any) -> Tensor:
        return best(self, lambda rows, features: asked.append(W.shape[0] if features is None else len(features)) or select(rows, features))

    monkeypatch.setattr(pursuit._Kept, "subtract", watched)
    monkeypatch.setattr(pursuit._Kept, "best", counting)
    encode_pursuit(x, weights, k=20, stop_on_repeat=False)
    assert len(used) == 20 and max(used) <= 1 and max(used) > 0.01  # neither broken nor idle
    assert sum(asked) < 0.3 * 20 * W.shape[0]


def test_near_ties_are_decided_by_the_documented_score() -> None:
    """Features that differ in the last bits, more of them than are looked at one by one, and equal ones: the lower index."""
    W = rows_of(3, 64, 32, unit=True)
    W[8:30] = W[7] + 1e-7 * rows_of(4, 22, 32)
    W[40:44] = W[39]
    W, x = W.float(), (W[7] + 0.5 * W[39] + 0.05 * rows_of(5, 20, 32)).float()
    got = encode_pursuit(x, PursuitWeights(W), k=5)
    same_bits(got, encode_pursuit(x, W, k=5))
    assert not set(got.col.tolist()) & set(range(40, 44)) and 39 in got.col.tolist()


def test_ends_of_rows() -> None:
    W = torch.eye(6)
    x = torch.tensor([[0.0] * 6, [3.0, 2.0, 1.0, 0.5, -4.0, 0.0], [-1.0] * 6])
    got = encode_pursuit(x, W, k=6).to_dense()
    assert torch.equal(got, x.relu())
    assert torch.equal(encode_pursuit(x, W, k=6, absolute=True).to_dense(), x)
    assert torch.equal(encode_pursuit(x, W, k=2, absolute=True).to_dense()[1], torch.tensor([3.0, 0, 0, 0, -4, 0]))
    got = encode_pursuit(x[1:2], W, k=6, tolerance=4.3)  # the norms that are left: 4.61, 4.15
    assert got.col.tolist() == [0, 1] and got.crow.tolist() == [0, 2] and got.batch_shape == (1,)
    pair, x = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([1.0, 0.9])  # each step leaves a part along the other
    one, on = (encode_pursuit(x, pair, k=9, absolute=True, stop_on_repeat=stop) for stop in (True, False))
    assert one.values.numel() == on.values.numel() == 2 and one.batch_shape == ()
    assert float((on.to_dense() @ pair - x).norm()) < 0.5 * float((one.to_dense() @ pair - x).norm())
    nothing = encode_pursuit(torch.zeros(0, 2), PursuitWeights(pair), k=3)
    assert nothing.values.shape == (0,) and nothing.crow.tolist() == [0]
    assert encode_pursuit(rows_of(1, 2, 3, 2).float(), pair, k=1, index_dtype=torch.int32).col.dtype is torch.int32


@pytest.mark.parametrize("orthogonal", [False, True])
def test_nan_and_sizes_beyond_squares(orthogonal: bool) -> None:
    W = rows_of(1, 40, 16, unit=True).float()
    x = rows_of(2, 6, 16).float()
    x[1, 3], x[2], x[3], x[4] = float("nan"), x[2] * 1e-30, x[3] * 1e30, float("inf")
    got = encode_pursuit(x, W, k=4, orthogonal=orthogonal)
    same_bits(encode_pursuit(x, PursuitWeights(W), k=4, orthogonal=orthogonal), got)
    dense = got.to_dense()
    assert got.col[got.crow[1]] == 0 and dense[1, 0].isnan() and dense[[0, 5]].isfinite().all()
    plain = encode_pursuit(x[[0, 5]], W, k=4, orthogonal=orthogonal)
    assert torch.equal(plain.to_dense(), dense[[0, 5]])
    broken = W.clone()
    broken[9] = float("nan")
    got = encode_pursuit(x[:1], PursuitWeights(broken), k=4, orthogonal=orthogonal)
    assert got.col.tolist() == [9] and got.values.isnan().all()
    assert torch.allclose(encode_pursuit(x[3:4] / 1e30, W, k=4).to_dense() * 1e30, encode_pursuit(x[3:4], W, k=4).to_dense(), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_residual_in_float32(dtype: torch.dtype) -> None:
    W, x = rows_of(1, 300, 64, unit=True).to(dtype), rows_of(2, 20, 64).to(dtype)
    got = encode_pursuit(x, W, k=12)
    same_bits(encode_pursuit(x, PursuitWeights(W), k=12), got)
    assert PursuitWeights(W).nbytes == fastsae.pack(W).nbytes == PursuitWeights(W.float()).nbytes - 300 * 300
    wide = encode_pursuit(x.float(), W.float() / W.float().norm(dim=1, keepdim=True), k=12)
    left = [(x.float() - latents.to_dense().float() @ W.float()).norm() for latents in (got, wide)]
    assert got.values.dtype is dtype and float(left[0]) < 1.02 * float(left[1])


@pytest.mark.parametrize("rule", [{}, {"absolute": True}, {"orthogonal": True}, {"stop_on_repeat": False, "tolerance": 1.5}], ids=str)
def test_gradients(rule: dict[str, Any]) -> None:
    """Of the values, with the choices as they are; the same through the features of a batch whose rows end at different steps."""
    x, W = rows_of(5, 2, 4).requires_grad_(), rows_of(6, 7, 4, unit=True).requires_grad_()

    def dense(x: Tensor, W: Tensor) -> Tensor:
        return encode_pursuit(x, W, k=4, **rule).to_dense()

    assert torch.autograd.gradcheck(dense, (x, W))
    assert torch.autograd.gradgradcheck(dense, (x, W))
    bad = x.detach().clone()
    bad[1, 2] = float("nan")
    bad.requires_grad_()
    values = encode_pursuit(bad, W, k=4, **rule).values
    grads = torch.autograd.grad(values.sum(), (bad, W))
    assert all(g.isfinite().all() for g in grads) and not grads[0][1].any() and grads[0][0].any()


def test_orthogonal_ends_with_the_span() -> None:
    """Once a row is fitted, or the next feature is a combination of those that it has, nothing is added."""
    W = torch.cat([torch.eye(3), torch.tensor([[0.6, 0.8, 0.0]])])
    got = encode_pursuit(torch.tensor([[1.0, 2.0, 0.0]]), W, k=4, orthogonal=True)
    assert torch.allclose(got.to_dense() @ W, torch.tensor([[1.0, 2.0, 0.0]]), atol=1e-6) and got.values.numel() == 2
    assert not pursuit.encode_pursuit(torch.zeros(2, 3), W, k=4, orthogonal=True).values.numel()


def test_threads_do_not_matter() -> None:
    W, x = rows_of(1, 500, 96, unit=True).float(), rows_of(2, 130, 96).float()
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append([encode_pursuit(x, w, k=8, tolerance=5.0, orthogonal=o) for w in (W, PursuitWeights(W)) for o in (False, True)])
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results):
        same_bits(a, b)


def test_what_is_refused() -> None:
    W = rows_of(1, 5, 4, unit=True).float()
    W[2] *= 1.1
    with pytest.raises(ValueError, match=r"encode_pursuit: W must have rows of norm 1, got norm 1.1 in row 2; divide it"):
        encode_pursuit(torch.ones(2, 4), W, k=2)
    with pytest.raises(ValueError, match=r"encode_pursuit: W must have at least one row, got \[0, 4\]"):
        encode_pursuit(torch.ones(2, 4), W[:0], k=2)
    W = W / W.norm(dim=1, keepdim=True)
    with pytest.raises(ValueError, match="k must be"):
        encode_pursuit(torch.ones(2, 4), W, k=0)
    with pytest.raises(ValueError, match="tolerance must be a finite number above 0, got 0"):
        encode_pursuit(torch.ones(2, 4), W, k=2, tolerance=0.0)
    handle = PursuitWeights(W)
    W.mul_(-1)
    with pytest.raises(ValueError, match=r"encode_pursuit: the packed weights were changed .* call refresh"):
        encode_pursuit(torch.ones(2, 4), handle, k=2)
    same_bits(encode_pursuit(torch.ones(2, 4), handle.refresh(), k=2), encode_pursuit(torch.ones(2, 4), W, k=2))
