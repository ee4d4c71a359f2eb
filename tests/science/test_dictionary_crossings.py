"""Changes of an SAE's active set on segments: against the set itself between any two of them, and in fractions."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastsae
from fastsae.native import loader
from fastsae.ops import topk_changes
from fastsae.ops.topk_changes import TOPK_CHANGES
from fastsae.packed import PackedWeights
from fastsae.polytopes import dictionary_crossings
from fastsae.sae import AbsTopK

S = 3
KINDS: list[Any] = [lambda k: fastsae.TopK(k), lambda k: fastsae.TopK(k, relu=False), AbsTopK, lambda k: fastsae.ReLU()]
KINDS += [lambda k: fastsae.JumpReLU(0.3), fastsae.BatchTopK]


def made(activation: Any, D: int, F: int, seed: int, dtype: torch.dtype = torch.float32) -> fastsae.SAE[Any]:
    sae = fastsae.SAE(D, F, activation, dtype=dtype, seed=seed).eval()
    with torch.no_grad():
        sae.b_enc.copy_(torch.randn(F) * 0.3)
        sae.b_dec.copy_(torch.randn(D) * 0.3)
        if isinstance(activation, fastsae.BatchTopK):
            sae.running_threshold.fill_(0.2)
    return sae


@torch.no_grad()
def active(sae: Any, x: Tensor) -> Tensor:
    """The set as the docstring states it."""
    z = (x - sae.b_dec.double()) @ sae.W_enc.double().T + sae.b_enc.double()
    if isinstance(sae.activation, fastsae.TopK):
        best = (z.abs() if sae.activation.absolute else z).argsort(dim=-1, descending=True, stable=True)[..., : sae.activation.k]
        kept = torch.zeros_like(z, dtype=torch.bool).scatter(-1, best, True)
        return kept & (z > 0) if sae.activation.relu else kept
    return z > getattr(sae, "threshold", getattr(sae, "running_threshold", torch.zeros(()))).double()


def sets(found: Any, start: Tensor, segment: int) -> list[tuple[float, float, Tensor]]:
    """(from, to, the set there), with each change checked against the set that it changes."""
    rows = range(int(found.offsets[segment]), int(found.offsets[segment + 1]))
    places = [0.0, *(float(found.t[i]) for i in rows), 1.0]
    assert places == sorted(places)
    result, held = [], start.clone()
    for before, (t, then) in zip([None, *rows], pairwise(places)):
        if before is not None:
            leaves, enters = int(found.leaves[before]), int(found.enters[before])
            assert leaves != enters
            if leaves >= 0:
                assert held[leaves]
                held[leaves] = False
            if enters >= 0:
                assert not held[enters]
                held[enters] = True
        result.append((t, then, held.clone()))
    return result


@pytest.mark.parametrize("trial", range(24))
def test_the_set_between_two_changes_is_that_of_the_encoder(trial: int) -> None:
    torch.manual_seed(trial)
    F, D, k = (int(torch.randint(*between, ())) for between in ((10, 500), (2, 12), (1, 10)))
    dtype = (torch.float32, torch.float64, torch.bfloat16)[trial // 4 % 3]
    sae = made(KINDS[trial % 6](k), D, F, trial, dtype)
    if trial % 7 == 0:
        with torch.no_grad():
            sae.W_enc[1], sae.b_enc[1] = sae.W_enc[0], sae.b_enc[0]
    p, q = torch.randn(2, S, D, dtype=torch.float64)
    q = p + 0.1 * (q - p) if trial % 4 == 0 else q
    found = dictionary_crossings(sae, p, q)
    for s in range(S):
        for t, then, held in (parts := sets(found, active(sae, p[s]), s)):
            if then - t > 1e-9:
                u = t + (then - t) * torch.tensor([[1e-4], [0.5], [1 - 1e-4]], dtype=torch.float64)
                assert bool((active(sae, p[s] + u * (q[s] - p[s])) == held).all())
        assert torch.equal(parts[-1][2], active(sae, q[s]))


@pytest.mark.parametrize("trial", range(9))
def test_in_fractions_with_many_ties(trial: int) -> None:
    torch.manual_seed(trial)
    F, D, k = int(torch.randint(8, 30, ())), 2, int(torch.randint(1, 6, ()))
    sae: Any = made([lambda k: fastsae.TopK(k), lambda k: fastsae.TopK(k, relu=False), AbsTopK][trial % 3](k), D, F, trial, torch.float64)
    with torch.no_grad():
        for values in (sae.W_enc, sae.b_enc, sae.b_dec):
            values.copy_(torch.randint(-2, 3, values.shape))
    p, q = torch.randint(-2, 3, (2, S, D)).double()
    found = dictionary_crossings(sae, p, q)
    ends = [(x - sae.b_dec) @ sae.W_enc.T + sae.b_enc for x in (p, q)]
    for s in range(S):
        lines = [(Fraction(int(a)), Fraction(int(b - a))) for a, b in zip(*(end[s] for end in ends))]
        both = [(sign * a, sign * d) for a, d in [*lines, (Fraction(0), Fraction(0))] for sign in (1, -1)]
        meet = {(c - a) / (d - e) for (a, d), (c, e) in combinations(both, 2) if d != e}
        places = [Fraction(0), *sorted(t for t in meet if 0 < t < 1), Fraction(1)]
        parts = sets(found, active(sae, p[s]), s)
        for t, then in pairwise(places):
            middle = (t + then) / 2
            score = [a + middle * d for a, d in lines]
            size = [abs(z) for z in score] if sae.activation.absolute else score
            best = sorted(range(F), key=lambda i: (-size[i], i))[:k]
            want = {i for i in best if not sae.activation.relu or score[i] > 0}
            held = next(held for start, end, held in parts if start <= middle <= end and (end > start))
            # Lines that are equal all along are one to the k-th place: which of them stands there is told by the ties of p.
            assert sorted(lines[i] for i in want) == sorted(lines[i] for i in held.nonzero().flatten().tolist()), (s, middle)
        assert torch.equal(parts[-1][2], active(sae, q[s]))


def test_what_the_screen_leaves_open_is_asked_of_all_features(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sae = made(fastsae.TopK(4), 64, 4096, 1)
    p, q = torch.randn(2, 5, 64)
    found = dictionary_crossings(sae, p, q)
    whole = TOPK_CHANGES.__call__
    asked: list[int] = []

    def undecided(*args: Any, backend: str | None = None) -> tuple[Tensor, ...]:
        """As if the screen had decided segments 0 and 3 alone."""
        t, leaves, enters, counts = whole(*args, backend=backend)
        asked.append(len(counts))
        if backend == "reference":
            return t, leaves, enters, counts
        kept = torch.tensor([True, False, False, True, False])
        made = kept.repeat_interleave(counts)
        return t[made], leaves[made], enters[made], counts.masked_fill(~kept, -1)

    monkeypatch.setattr(topk_changes, "TOPK_CHANGES", undecided)
    again = dictionary_crossings(sae, p, q)
    assert asked == [5, 3]
    assert all(torch.equal(a, b) for a, b in zip(found[1:], again[1:]))
    torch.testing.assert_close(found.t, again.t, rtol=0, atol=1e-12)


KIND = st.sampled_from(("normal", "integers", "copies", "zeros", "huge", "tiny", "outlier"))


@settings(max_examples=settings().max_examples // 2)
@given(KIND, st.sampled_from((1, 3, 17, 100)), st.sampled_from((5, 40, 700)), st.integers(1, 40), st.integers(0, 2**20))
def test_the_compiled_walk_finds_what_the_reference_does(kind: str, D: int, F: int, k: int, seed: int) -> None:
    torch.manual_seed(seed)
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    W, b, (p, q) = torch.randn(F, D), torch.randn(F) * (seed % 2), torch.randn(2, 5, D, dtype=torch.float64)
    if kind == "integers":
        W, b, (p, q) = (torch.randint(-2, 3, shape).double() for shape in ((F, D), (F,), (2, 5, D)))
    elif kind == "copies":
        W[F // 2 :] = W[: F - F // 2].clone()
    elif kind == "zeros":
        W[::2], b[::2] = 0, 0
    elif kind == "outlier":
        p[:, 0] += 200
        q[:, 0] += 200
    else:
        scale = {"huge": 1e3, "tiny": 1e-4}.get(kind, 1.0)
        W, p = W * scale, p * scale
    W, b, k = W.to(dtype), b.to(dtype), min(k, F)
    W = W.T.contiguous().T if seed % 4 == 1 else W
    args = (W, b, b.new_ones(D) if seed % 5 else None, PackedWeights(W).words("test") if seed % 4 < 3 else None, p, q, k)
    for relu, absolute in ((True, False), (False, False), (False, True)):
        if TOPK_CHANGES.reasons((*args, relu, absolute))[0][1] is not None:
            return
        got, want = (TOPK_CHANGES(*args, relu, absolute, backend=backend) for backend in ("cpu", "reference"))
        for result in (got, want):
            TOPK_CHANGES.check((*args, relu, absolute), result)
        if kind not in ("integers", "copies", "zeros"):
            assert bool(((got[3] == want[3]) | (got[3] < 0)).all())
        # The bits depend neither on other segments nor on a handle.
        alone = TOPK_CHANGES(W.contiguous(), b, args[2], None, p[3:4], q[3:4], k, relu, absolute, backend="cpu")
        rows = slice(int(got[3][:3].clamp_min(0).sum()), int(got[3][:4].clamp_min(0).sum()))
        assert all(map(torch.equal, alone, (*(values[rows] for values in got[:3]), got[3][3:4])))


@pytest.mark.parametrize("backend", ["*", "reference"])
@pytest.mark.parametrize("activation", [fastsae.TopK(4), fastsae.JumpReLU(1.5)], ids=["topk", "jumprelu"])
def test_autocast_rounds_nothing(activation: Any, backend: str) -> None:
    torch.manual_seed(0)
    sae = made(activation, 64, 4096, 1)
    p, q = torch.randn(2, 3, 64)
    with fastsae.use_backend(backend):
        want = dictionary_crossings(sae, p, q)
        with torch.autocast("cpu", torch.bfloat16):
            found = dictionary_crossings(sae, p, q)
    assert want.counts.sum() > 9 and all(map(torch.equal, want, found))


def test_sizes_and_wrong_arguments() -> None:
    sae = made(fastsae.TopK(3), 5, 40, 0)
    none = dictionary_crossings(sae, torch.zeros(0, 5), torch.zeros(0, 5))
    assert none.t.shape == (0,) and none.offsets.tolist() == [0]
    assert none.counts.shape == (0,)
    x = torch.randn(2, 5)
    assert dictionary_crossings(sae, x, x).counts.tolist() == [0, 0]
    assert dictionary_crossings(made(fastsae.TopK(40, relu=False), 5, 40, 0), x, -x).counts.tolist() == [0, 0]
    scaled = made(fastsae.TopK(3), 5, 40, 0)
    scaled.scale.fill_(2.0)
    broken, unbounded = made(fastsae.ReLU(), 5, 40, 0), made(fastsae.TopK(3), 5, 40, 0)
    with torch.no_grad():
        broken.W_enc[3, 2], unbounded.W_enc[3, 2] = torch.nan, torch.inf
    wrong: list[tuple[Any, Any, Any, type[Exception], str]] = [
        (fastsae.SAE(5, 40, fastsae.Gated()), x, x, ValueError, "sae must be an SAE with TopK, .* or BatchTopK .*got Gated"),
        (3, x, x, ValueError, "sae must be an SAE with .*, got NoneType in int"),
        (scaled, x, x, ValueError, "the SAE must be in the units of the data"),
        (
            fastsae.SAE(5, 40, fastsae.TopK(3), normalise_rows="layer_norm"),
            x,
            x,
            ValueError,
            "along a segment the scores of an SAE with normalise_rows='layer_norm'",
        ),
        (broken, x, x, ValueError, "W_enc and b_enc of the SAE must be finite"),
        (unbounded, x, x, ValueError, "W_enc and b_enc of the SAE must be finite"),
        (sae, x[:, 1:], x[:, 1:], ValueError, r"p must have two dimensions, \[.., D=5\], got \[2, 4\]"),
        (sae, x, x[:1], ValueError, r"p and q must have the same shape \[S, D\], got \[2, 5\] and \[1, 5\]"),
        (sae, x, x / 0, ValueError, "q must be finite"),
        (sae, x.long(), x, TypeError, "p must have dtype"),
    ]
    for k in (0, 41):
        if loader.unavailable() is None and loader.load().packs(5):
            with pytest.raises(ValueError, match=rf"^topk_changes: k must be above 0 and at most .* \(40\), got {k}"):
                TOPK_CHANGES(sae.W_enc.detach(), sae.b_enc.detach(), None, None, x.double(), x.double(), k, True, False, backend="cpu")
    for module, p, q, error, message in wrong:
        with pytest.raises(error, match=f"^dictionary_crossings: {message}"):
            dictionary_crossings(module, p, q)
