"""Changes of an SAE's active set on segments: against the set itself between any two of them, and in fractions."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsae
from fastsae.polytopes import dictionaries, dictionary_crossings
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


def test_lists_of_the_encoder_prove_and_where_they_do_not_all_features_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    D, F, k = 64, 4096, 4
    sae = made(fastsae.TopK(k), D, F, 1)
    p, q = torch.randn(2, 3, D)
    found = dictionary_crossings(sae, p, q)
    asked: list[int] = []
    whole = dictionaries.Planes.lines

    def lines(self: Any, p: Tensor, q: Tensor, features: Any = None) -> Tensor:
        asked.append(F if features is None else len(features[0]))
        return whole(self, p, q, features)

    monkeypatch.setattr(dictionaries.Planes, "lines", lines)
    for lists in ((4, 16), (), (1,)):
        monkeypatch.setattr(dictionaries, "_LISTED", lists)
        monkeypatch.setattr(dictionaries, "_LEAST", 1)
        asked.clear()
        again = dictionary_crossings(sae, p, q)
        assert (max(asked) == F) == (lists != (4, 16))
        assert all(torch.equal(a, b) for a, b in zip(found[1:], again[1:]))
        torch.testing.assert_close(found.t, again.t, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", [fastsae.TopK(4), fastsae.JumpReLU(1.5)], ids=["topk", "jumprelu"])
def test_autocast_rounds_nothing(activation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of the encoder in bfloat16 would be off by more than their bound counts in."""
    torch.manual_seed(0)
    sae, seen = made(activation, 64, 4096, 1), list[torch.dtype]()
    p, q = torch.randn(2, 3, 64)
    for name in ("encode_topk", "encode_threshold"):
        encode = getattr(dictionaries, name)

        def watched(*arguments: Any, encode: Any = encode, **options: Any) -> Any:
            seen.append((latents := encode(*arguments, **options)).values.dtype)
            return latents

        monkeypatch.setattr(dictionaries, name, watched)
    want = dictionary_crossings(sae, p, q)
    with torch.autocast("cpu", torch.bfloat16):
        found = dictionary_crossings(sae, p, q)
    assert set(seen) == {torch.float32} and all(map(torch.equal, want, found))


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
    broken = made(fastsae.ReLU(), 5, 40, 0)
    with torch.no_grad():
        broken.W_enc[3, 2] = torch.nan
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
        (sae, x[:, 1:], x[:, 1:], ValueError, r"p must have two dimensions, \[.., D=5\], got \[2, 4\]"),
        (sae, x, x[:1], ValueError, r"p and q must have the same shape \[S, D\], got \[2, 5\] and \[1, 5\]"),
        (sae, x, x / 0, ValueError, "q must be finite"),
        (sae, x.long(), x, TypeError, "p must have dtype"),
    ]
    for module, p, q, error, message in wrong:
        with pytest.raises(error, match=f"^dictionary_crossings: {message}"):
            dictionary_crossings(module, p, q)
