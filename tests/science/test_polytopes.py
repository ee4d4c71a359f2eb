"""Polytopes: boundaries against a walk from region to region, affine maps against formed ones, soft codes at their limits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from polytope_cases import draw, layers, linear, relu_net
from torch import Tensor, nn

import fastsae
from fastsae import spline_code, spline_hash
from fastsae.codes import combine_hashes, hash_signs, pack_signs
from fastsae.polytopes import (
    NearestAffine,
    affine_map,
    as_net,
    boundaries,
    boundary_norms,
    crossings,
    expected_hamming,
    frobenius_distance,
    frobenius_pairs,
    frobenius_topk,
    local_complexity,
    mlp_block,
    shell,
    soft_affine_map,
    soft_code,
)


def walk(widths: Sequence[int], seed: int, slope: float, residual: bool, start: Tensor, end: Tensor) -> list[tuple[float, int, int]]:
    """The crossings of one segment, one forward pass a region: masks fix the region, value and slope say where it ends."""
    *hidden, _ = layers([*widths, 3], seed)
    weights = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in hidden]
    p, q = start.numpy(), end.numpy()

    def run(x: np.ndarray, masks: list[np.ndarray] | None, offset: int) -> list[np.ndarray]:
        h, found = x, []
        for i, (W, b) in enumerate(weights):
            z = W @ h + offset * b
            found.append(z)
            mask = z > 0 if masks is None else masks[i]
            a = np.where(mask, z, slope * z)
            h = h + a if residual and W.shape[0] == W.shape[1] else a
        return found

    masks = [z > 0 for z in run(p, None, 1)]
    t, result = 0.0, []
    while True:
        z, dz = run(p + t * (q - p), masks, 1), run(q - p, masks, 0)
        best = (np.inf, -1, -1)
        for i, mask in enumerate(masks):
            leaving = np.where(mask, dz[i] < 0, dz[i] > 0)
            steps = np.where(leaving, np.maximum(-z[i] / np.where(leaving, dz[i], 1), 0), np.inf)
            j = int(steps.argmin())
            best = min(best, (float(steps[j]), i, j))
        t += best[0]
        if t > 1:
            return result
        result.append((t, best[1], best[2]))
        masks[best[1]][best[2]] ^= True


@given(
    st.integers(1, 6),
    st.lists(st.integers(1, 64), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.1, -0.5]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_crossings_are_those_of_a_walk(d: int, hidden: list[int], slope: float, residual: bool, seed: int) -> None:
    net = relu_net([d, *hidden], seed, slope, residual)
    p, q = 2 * draw(2, 3, d, seed=seed + 99)
    found = crossings(net, p, q)
    assert found.offsets.shape == (4,) and found.segment.bincount(minlength=3).equal(found.counts)
    for i in range(3):
        expected = walk([d, *hidden], seed, slope, residual, p[i], q[i])
        rows = slice(int(found.offsets[i]), int(found.offsets[i + 1]))
        assert list(zip(found.layer[rows].tolist(), found.neuron[rows].tolist())) == [(layer, j) for _, layer, j in expected]
        np.testing.assert_allclose(found.t[rows].numpy(), [t for t, _, _ in expected], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bits", [64, 128])
def test_hashes_are_those_of_the_regions(bits: int) -> None:
    net = relu_net([5, 40, 30], 1)
    p, q = draw(2, 4, 5)
    found = crossings(net, p, q, seed=7, bits=bits)

    def regions(x: Tensor) -> Tensor:
        return combine_hashes([hash_signs(z, layer=i, seed=7, bits=bits) for i, z in enumerate(net.preactivations(x))])

    assert found.start.equal(regions(p))
    for i in range(4):
        rows = slice(int(found.offsets[i]), int(found.offsets[i + 1]))
        ends = torch.cat([found.t[rows], torch.ones(1, dtype=torch.float64)])
        middle = ((ends[1:] + ends[:-1]) / 2).unsqueeze(1)
        assert found.hash[rows].equal(regions(p[i] + middle * (q[i] - p[i])))
    # Every last region is that of q: the changes of parity of all neurons.
    assert found.hash[found.offsets[1:] - 1].equal(regions(q))


def test_one_layer_in_closed_form() -> None:
    W, b = draw(70, 6), draw(70)
    p, q = draw(2, 5, 6)
    found = crossings(as_net([linear(W, b), nn.GELU(), linear(draw(2, 70))]), p, q)
    assert found.counts.equal(fastsae.codes.boundary_density(spline_code(p, W, b), spline_code(q, W, b)).pairs.long())
    z0, z1 = ((x[found.segment] @ W.T + b).gather(1, found.neuron.unsqueeze(1))[:, 0] for x in (p, q))
    torch.testing.assert_close(found.t, z0 / (z0 - z1), rtol=1e-12, atol=0)
    assert found.start.equal(spline_hash(p, W, b))
    assert bool((found.t.diff()[found.segment.diff() == 0] >= 0).all())


def test_blocks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    net = relu_net([4, 30, 30, 30], 3, residual=True)
    p, q = 3 * draw(2, 9, 4)
    whole = crossings(net, p, q)
    monkeypatch.setattr(boundaries, "_BLOCK", 1)
    monkeypatch.setattr(boundaries, "_FIRST", 1)
    parts = crossings(net, p, q)
    assert all(getattr(whole, name).equal(getattr(parts, name)) for name in ("layer", "neuron", "hash", "offsets", "start"))
    torch.testing.assert_close(parts.t, whole.t, rtol=1e-12, atol=0)
    alone = [crossings(net, p[i : i + 1], q[i : i + 1]) for i in range(9)]
    assert torch.cat([one.neuron for one in alone]).equal(whole.neuron)


def test_weights_are_widened_exactly_and_no_segments_are_fine() -> None:
    module = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU())
    p, q = draw(2, 3, 4, dtype=torch.float32)
    narrow, wide = crossings(as_net(module), p, q), crossings(as_net(module.double()), p.double(), q.double())
    assert all(a.equal(b) for a, b in zip(narrow, wide))
    none = crossings(as_net(module), p[:0].double(), q[:0].double(), bits=128)
    assert none.t.shape == (0,) and none.hash.shape == (0, 2) and none.offsets.tolist() == [0] and none.start.shape == (0, 2)


# ---------------------------------------------------------------- zeros and ties


def line(module: Any, start: float = -1.0, stop: float = 1.0) -> list[tuple[float, int, int]]:
    """Crossings of the segment from start to stop of a net of one input, as (x, layer, neuron)."""
    found = crossings(as_net(module), torch.tensor([[start]], dtype=torch.float64), torch.tensor([[stop]], dtype=torch.float64))
    return [(start + t * (stop - start), i, j) for t, i, j in zip(found.t.tolist(), found.layer.tolist(), found.neuron.tolist())]


def test_several_neurons_at_one_position() -> None:
    assert line([linear([[1], [-2], [0.5], [1]], [0, 0, 0, -0.5]), nn.ReLU()]) == [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0.5, 0, 3)]


def test_a_neuron_that_is_zero_on_a_stretch_is_off_there() -> None:
    first = linear([[1], [-1]], [-0.5, -0.5])  # on above 1/2, on below -1/2
    # relu(x - 1/2) + relu(-x - 1/2) is 0 between, then minus the same: never on.
    net = [first, nn.ReLU(), linear([[1, 1], [-1, -1]]), nn.ReLU()]
    assert line(net) == [(-0.5, 0, 1), (-0.5, 1, 0), (0.5, 0, 0), (0.5, 1, 0)]


def test_a_touch_is_no_crossing() -> None:
    first = linear([[1], [-1]])
    # |x| touches 0 from above, -|x| from below; |x| - 1/4 crosses twice.
    net = [first, nn.ReLU(), linear([[1, 1], [-1, -1], [1, 1]], [0, 0, -0.25]), nn.ReLU()]
    assert line(net) == [(-0.25, 1, 2), (0, 0, 0), (0, 0, 1), (0.25, 1, 2)]


@pytest.mark.parametrize(("start", "stop", "expected"), [(0, 1, [0.0]), (1, 0, [0.0]), (0, -1, []), (-1, 0, [])])
def test_an_end_on_a_boundary(start: float, stop: float, expected: list[float]) -> None:
    # The code of an end has the neuron off, as spline_code has it.
    assert [x for x, _, _ in line([linear([[1.0]]), nn.ReLU()], start, stop)] == expected
    assert [x for x, _, _ in line([nn.LayerNorm(1, elementwise_affine=False), linear([[1.0]], [0.0]), nn.ReLU()], start, stop)] == []


# ---------------------------------------------------------------- after a normalisation


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("behind", [False, True], ids=["input", "behind-relu"])
def test_crossings_after_a_normalisation(centred: bool, behind: bool) -> None:
    from scipy.optimize import brentq, minimize_scalar

    d, h = 6, 80
    norm = (nn.LayerNorm(d, eps=1e-3) if centred else nn.RMSNorm(d, eps=1e-3)).double()
    with torch.no_grad():
        norm.weight.copy_(draw(d).abs() + 0.5)
        if centred:
            norm.bias.copy_(draw(d))
    before = [linear(draw(8, d), draw(8)), nn.ReLU(), linear(draw(d, 8), draw(d))] if behind else []
    net = as_net([*before, norm, linear(draw(h, d), draw(h) * 2), nn.GELU(), linear(draw(2, h))])
    p, q = 2 * draw(2, 12, d, seed=5)
    found = crossings(net, p, q)
    code_p, code_q = (pack_signs(net.preactivations(x)[-1]) for x in (p, q))
    twice = 0
    for i in range(12):
        mine = {j: found.t[(found.segment == i) & (found.neuron == j) & (found.layer == int(behind))].tolist() for j in range(h)}
        breaks = [0.0, *found.t[(found.segment == i) & (found.layer == 0)].tolist(), 1.0] if behind else [0.0, 1.0]

        def g(t: float, j: int, i: int = i) -> float:
            return float(net.preactivations(p[i] + t * (q[i] - p[i]))[-1][j].detach())

        z = net.preactivations(p[i] + torch.linspace(0, 1, 2001, dtype=torch.float64).unsqueeze(1) * (q[i] - p[i]))[-1]
        grid = np.unique(np.concatenate([np.linspace(0, 1, 2001), breaks]))
        for j in range(h):
            sampled = int(((z[1:, j] > 0) != (z[:-1, j] > 0)).sum())
            if len(mine[j]) != sampled:  # two roots between two samples: an extremum there decides
                assert len(mine[j]) == sampled + 2, (i, j, mine[j], sampled)
                low, high = min(pairwise(mine[j]), key=lambda pair: pair[1] - pair[0])
                sign = -1 if g(low - 1e-4, j) < 0 else 1
                best = minimize_scalar(lambda t, s=sign, j=j: s * g(t, j), bounds=(low, high), method="bounded")
                assert best.fun < 0
            for t in mine[j][:1] if i else mine[j]:
                gap = [x for x in grid if abs(x - t) > 1e-6]
                low, high = max((x for x in gap if x < t), default=0.0), min((x for x in gap if x > t), default=1.0)
                if g(low, j) * g(high, j) < 0:
                    assert t == pytest.approx(brentq(g, low, high, args=(j,), xtol=1e-15, rtol=1e-14), rel=1e-9)
            twice += len(mine[j]) > 1
    # The Hamming distance of the ends misses the neurons that cross and cross back.
    last = torch.bincount(found.segment[found.layer == int(behind)], minlength=12)
    distance = fastsae.codes.boundary_density(code_p, code_q).pairs.long()
    assert twice > 5 and bool((last >= distance).all()) and bool(((last - distance) % 2 == 0).all())
    assert int((last - distance).sum()) > 10


def test_what_has_no_closed_form_is_refused() -> None:
    act, one = nn.ReLU(), linear(draw(4, 4))
    x = draw(2, 4)
    for module, reason in (
        ([one, nn.GELU(), one, act], r"layer 1 has no closed form: .* \(it follows gelu\)"),
        ([nn.LayerNorm(4).double(), one, act, one, act], r"layer 1 .* \(it follows a normalised layer\)"),
        ([nn.LayerNorm(4).double(), one, nn.RMSNorm(4).double(), one, act], r"layer 0 .* \(it follows a normalisation of a curve\)"),
        (
            [as_net([nn.LayerNorm(4).double(), one], residual=True), act],
            r"layer 0 .* \(it follows a residual sum with a normalised branch\)",
        ),
    ):
        with pytest.raises(ValueError, match=f"^crossings: {reason}"):
            crossings(as_net(module), x, x)
    # Behind the last activation anything may come, and a linear branch is a linear map.
    crossings(as_net([as_net(one, residual=True), act, nn.LayerNorm(4).double()]), x, x + 1)


# ---------------------------------------------------------------- shells and complexity


def test_shell() -> None:
    W, b = draw(50, 4), draw(50)
    one = as_net([linear(W, b), nn.ReLU(), linear(draw(2, 50))])
    directions = 5 * draw(6, 4)
    origin = 0.1 * draw(4, seed=3)
    for centre in (None, origin):
        endless, near = shell(one, directions, origin=centre), shell(one, directions, 2.5, origin=centre)
        assert endless.start.equal(near.start)
        for i in range(6):
            everything, some = (slice(int(s.offsets[i]), int(s.offsets[i + 1])) for s in (endless, near))
            distance = endless.distance[everything]
            within = int((distance <= 2.5).sum())
            torch.testing.assert_close(distance[:within], near.distance[some], rtol=1e-9, atol=0)
            assert endless.neuron[everything][:within].equal(near.neuron[some]) and endless.hash[everything][:within].equal(near.hash[some])
        at = b if centre is None else W @ centre + b
        nearest = at.abs() / W.norm(dim=1)
        assert bool((endless.distance >= nearest[endless.neuron] * (1 - 1e-9)).all())
    deep = relu_net([4, 20, 20], 2)
    rays = shell(deep, directions, 3.0)
    unit = directions / directions.norm(dim=1, keepdim=True)
    assert rays.hash.equal(crossings(deep, torch.zeros_like(unit), 3 * unit).hash) and float(rays.distance.max()) <= 3
    with pytest.raises(ValueError, match=r"^shell: radius must be given"):
        shell(deep, directions)


@pytest.mark.parametrize("deep", [False, True])
def test_local_complexity(deep: bool) -> None:
    net = relu_net([6, 70, 20], 4) if deep else as_net([linear(draw(70, 6), draw(70)), nn.GELU(), linear(draw(2, 70))])
    x = draw(5, 6)
    found = local_complexity(net, x, 0.4, 8, seed=3)
    frame = torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).Q.T
    torch.testing.assert_close(frame @ frame.T, torch.eye(4, dtype=torch.float64))
    vertices = x.unsqueeze(1) + 0.4 * torch.cat([frame, -frame])
    expected = [((z > 0) != (z[:, :1] > 0)).any(1).sum(1) for z in net.preactivations(vertices)]
    assert found.equal(torch.stack(expected, 1)) and int(found.sum()) > 10
    assert not local_complexity(net, x, 1e-9, 12).any()


# ---------------------------------------------------------------- nets


def test_nets_see_their_modules() -> None:
    module = nn.Sequential(
        nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.LeakyReLU(0.3)), nn.Identity(), nn.Linear(6, 2)
    )
    net = as_net(module)
    x = draw(3, 4, dtype=torch.float32)
    assert (net.d_in, net.d_out, net.widths) == (4, 2, (6,))
    assert repr(net) == "Net(layer_norm 4→6 leaky_relu 6→2)"
    torch.testing.assert_close(net(x), module.eval()(x))
    with torch.no_grad():
        module[0].weight.mul_(2)
    torch.testing.assert_close(net(x), module(x))
    rms = nn.RMSNorm(4)
    torch.testing.assert_close(as_net([rms, nn.Linear(4, 2)])(x).shape, torch.Size([3, 2]))
    torch.testing.assert_close(as_net(rms)(x), rms(x))
    both = as_net([nn.Linear(4, 4), as_net([nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)], residual=True)])
    inner = both.stages[0].W.T  # pyright: ignore[reportAttributeAccessIssue]
    assert repr(both) == "Net(4→4 ( 4→6 relu 6→4 +))" and inner.shape == (4, 4)


class Gated(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4), act


def test_what_is_no_net() -> None:
    for module, error, message in (
        (3, TypeError, "module must be a torch.nn.Module, a Net or a list of them, got int"),
        (nn.Conv3d(1, 2, 3), ValueError, "Conv3d is not supported; supported: Linear, ReLU"),
        ([nn.Linear(3, 4), nn.ReLU6()], ValueError, "ReLU6 is not supported.* and a list of such parts of a module of your own"),
        (Gated(nn.SiLU()), ValueError, "SwiGLU .* multiplies two branches"),
        (Gated(nn.GELU("tanh")), ValueError, "GeGLU .* multiplies two branches"),
        (nn.LayerNorm([2, 3]), ValueError, r"LayerNorm must be over the last dimension alone, got normalized_shape=\(2, 3\)"),
        (nn.Softmax(0), ValueError, "Softmax must be over the neurons .*, got dim=0"),
        ([nn.Linear(3, 4), nn.Linear(5, 4)], ValueError, "a layer for inputs of width 5 follows one of width 4"),
        (nn.ReLU(), ValueError, "an activation must follow a Linear layer"),
    ):
        with pytest.raises(error, match=f"^as_net: {message}"):
            as_net(module)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^as_net: a residual branch must end with its input's width 3, got 4"):
        _ = as_net(nn.Linear(3, 4), residual=True) and as_net([nn.Linear(3, 3), as_net(nn.Linear(3, 4), residual=True)])


NET = relu_net([4, 6, 5], 1)
MLP = as_net([linear(draw(6, 4)), nn.ReLU(), linear(draw(2, 6))])
X = draw(3, 4)
CODES = pack_signs(draw(3, 6))
CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "crossings": (crossings, {"net": NET, "p": X, "q": X + 1}),
    "shell": (shell, {"net": NET, "directions": X, "radius": 2.0, "origin": X[0]}),
    "local_complexity": (local_complexity, {"net": NET, "x": X, "radius": 0.1, "vertices": 4}),
    "affine_map": (affine_map, {"net": NET, "x": X}),
    "soft_affine_map": (soft_affine_map, {"net": NET, "x": X}),
    "boundary_norms": (boundary_norms, {"net": NET, "x": X}),
    "frobenius_distance": (frobenius_distance, {"net": MLP, "code_a": CODES, "code_b": CODES}),
    "frobenius_pairs": (frobenius_pairs, {"net": MLP, "codes": CODES, "others": CODES}),
    "frobenius_topk": (frobenius_topk, {"net": MLP, "codes": CODES, "others": CODES, "k": 2}),
    "soft_code": (soft_code, {"z": X}),
    "expected_hamming": (expected_hamming, {"p": X.sigmoid(), "q": X.sigmoid()}),
    "NearestAffine": (NearestAffine, {"centres": X, "A": draw(3, 2, 4), "c": draw(3, 2)}),
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_tensors(name: str) -> None:
    function, valid = CALLS[name]
    function(**valid)
    for argument, value in valid.items():
        if argument == "net":
            with pytest.raises(TypeError, match=f"^{name}: net must be a Net .*, got Sequential"):
                function(**{**valid, "net": nn.Sequential()})
        if not isinstance(value, Tensor):
            continue
        for wrong, error, message in (
            ([1.0], TypeError, f"{argument} must be a torch.Tensor, got list"),
            (value.to(torch.int32), TypeError, f"{argument} must have dtype .*, got int32"),
            (value.to("meta"), TypeError, "[a-zA-Z_]+ must be on (cpu|meta) like the .*, got (cpu|meta)"),
            (value[..., :0], ValueError, f"({argument}|[a-zA-Z_ ]+) must have "),
        ):
            if name == "soft_code" and not isinstance(wrong, list) and wrong.dtype.is_floating_point:
                continue  # one tensor of any shape
            with pytest.raises(error, match=f"^{name}: {message}"):
                function(**{**valid, argument: wrong})


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("crossings", {"q": X[:2]}, ValueError, r"p and q must have the same shape \[S, d_in=4\], got \[3, 4\] and \[2, 4\]"),
        ("crossings", {"p": X / 0}, ValueError, "p must be finite"),
        ("crossings", {"bits": 32}, ValueError, "bits must be 64 or 128, got 32"),
        ("crossings", {"seed": -1}, ValueError, "seed must be at least 0"),
        ("crossings", {"net": as_net(linear(draw(2, 4)))}, ValueError, "net must have at least one activation layer"),
        ("shell", {"directions": 0 * X}, ValueError, "directions must be finite and of a length above 0"),
        ("shell", {"radius": 0.0}, ValueError, "radius must be a finite number above 0, got 0.0"),
        ("local_complexity", {"vertices": 3}, ValueError, "vertices must be even"),
        ("local_complexity", {"vertices": 10}, ValueError, "vertices must be at least 2 and at most 8"),
        ("local_complexity", {"radius": -1.0}, ValueError, "radius must be a finite number above 0"),
        ("affine_map", {"net": as_net([linear(draw(2, 4)), nn.GELU()])}, ValueError, "net must have ReLU and LeakyReLU .*, got gelu"),
        ("affine_map", {"net": as_net([nn.LayerNorm(4).double(), linear(draw(2, 4))])}, ValueError, "net must hold no normalisation"),
        ("soft_affine_map", {"beta": 1.5}, ValueError, r"beta must be in \[0, 1\], got 1.5"),
        ("soft_affine_map", {"net": as_net([linear(draw(2, 4)), nn.GELU()]), "beta": 0.5}, ValueError, "beta goes with .* not with gelu"),
        ("boundary_norms", {"net": as_net([linear(draw(2, 4)), nn.GELU()])}, ValueError, "net must have ReLU and LeakyReLU"),
        ("frobenius_distance", {"net": NET}, ValueError, "net must be one MLP"),
        ("frobenius_distance", {"code_a": CODES[:2]}, ValueError, "code_a and code_b must broadcast"),
        ("frobenius_pairs", {"codes": CODES[0]}, ValueError, "codes must have two dimensions"),
        ("frobenius_topk", {"k": 4}, ValueError, "k must be at least 1 and at most 3"),
        ("soft_code", {"kind": "mish"}, ValueError, "kind must be one of relu, .*, got 'mish'"),
        ("soft_code", {"kind": "gelu", "beta": 0.5}, ValueError, "beta goes with"),
        ("soft_code", {"z": X[0, 0]}, ValueError, r"z must have shape \[.., H\]"),
        ("expected_hamming", {"p": X * 9}, ValueError, r"p must hold probabilities in \[0, 1\]"),
        ("expected_hamming", {"q": X.sigmoid().float()}, TypeError, "q must have the dtype of p"),
        ("NearestAffine", {"A": draw(2, 2, 4)}, ValueError, r"A must have shape \[C=3, E, D=4\], got \[2, 2, 4\]"),
        ("NearestAffine", {"centres": X[:0]}, ValueError, "centres must hold at least one row"),
    ],
)
def test_wrong_values(name: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    function, valid = CALLS[name]
    with pytest.raises(error, match=f"^{name}: {message}"):
        function(**{**valid, **change})


def test_wrong_rows_of_a_system() -> None:
    system = NearestAffine(X, draw(3, 2, 4))
    with pytest.raises(ValueError, match=r"^NearestAffine: x must have shape \[.., D=4\], got \[3, 3\]"):
        system(X[:, :3])
    with pytest.raises(TypeError, match=r"^NearestAffine: x must have dtype float64, got float32"):
        system(X.float())


def test_mlp_block_of_what_is_no_transformer() -> None:
    with pytest.raises(TypeError, match=r"^mlp_block: model must be a torch.nn.Module, got int"):
        mlp_block(3, 0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^mlp_block: model must be a transformer with a ModuleList of layers, got Linear"):
        mlp_block(nn.Linear(3, 4), 0)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": Gated(nn.SiLU())}), nn.ModuleDict({"head": nn.Linear(3, 4)})])})
    with pytest.raises(ValueError, match=r"^mlp_block: SwiGLU \(Gated\) multiplies two branches"):
        mlp_block(model, 0)
    with pytest.raises(ValueError, match=r"^mlp_block: the MLP of ModuleDict is not known .* it has head"):
        mlp_block(model, 1)
    with pytest.raises(ValueError, match=r"^mlp_block: layer must be at least 0 and at most 1"):
        mlp_block(model, 2)


HUGGING_FACE = """
import torch, fastsae, transformers
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, GPTNeoXConfig, GPTNeoXModel
torch.manual_seed(0)
small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50)
x = torch.randn(5, 16, dtype=torch.float64)
for make, config, expected in (
    (BertModel, BertConfig(**small), lambda m: x + m.encoder.layer[1].output.dense(m.encoder.layer[1].intermediate(x))),
    (GPT2Model, GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50), lambda m: x + m.h[1].mlp(m.h[1].ln_2(x))),
    (GPTNeoXModel, GPTNeoXConfig(**small), lambda m: x + m.layers[1].mlp(m.layers[1].post_attention_layernorm(x))),
):
    model = make(config).double().eval()
    net = fastsae.polytopes.mlp_block(model, 1)
    torch.testing.assert_close(net(x), expected(model))
    found = fastsae.polytopes.crossings(net, x, x.flip(0))
    before, after = (fastsae.codes.pack_signs(net.preactivations(v)[0]) for v in (x, x.flip(0)))
    assert bool((found.counts >= fastsae.codes.boundary_density(before, after).pairs).all())
    inner = fastsae.polytopes.mlp_block(model, 1, norm=False, residual=False)
    A, c = fastsae.polytopes.soft_affine_map(inner, x)
    torch.testing.assert_close((A @ x.unsqueeze(2))[..., 0] + c, inner(x))
    if make is not BertModel:
        assert net.stages[1].centred
        try:
            fastsae.polytopes.mlp_block(model, 1, norm=False)
            raise SystemExit("not refused")
        except ValueError as error:
            assert "the skip connection starts before the norm" in str(error)
small.update(num_key_value_heads=2, pad_token_id=0)
for kind, more in (
    ("Llama", {}), ("Llama", {"mlp_bias": True}), ("Mistral", {}), ("Qwen2", {}), ("Qwen3", {}), ("SmolLM3", {}),
    ("Gemma", {"head_dim": 8}), ("Gemma2", {"head_dim": 8}), ("Gemma3Text", {"head_dim": 8}),
):
    config = getattr(transformers, f"{kind}Config")(**small, **more)
    model = getattr(transformers, f"{kind}Model")(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer, net = model.layers[1], fastsae.polytopes.mlp_block(model, 1)
    if hasattr(layer, "pre_feedforward_layernorm"):
        wanted = x + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x)))
    else:
        wanted = x + layer.mlp(layer.post_attention_layernorm(x))
    torch.testing.assert_close(net(x), wanted, rtol=1e-5, atol=1e-5)  # these norms compute in float32
    found = fastsae.polytopes.crossings(net, x, x.flip(0))
    before, after = (fastsae.codes.pack_signs(net.preactivations(v)[0]) for v in (x, x.flip(0)))
    assert bool((found.counts >= fastsae.codes.boundary_density(before, after).pairs).all())
print("fine")
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed (extra [demo])")
def test_mlp_blocks_of_hugging_face_models(tmp_path: Path) -> None:
    # In another process, our folder on sys.path late: transformers would take a checkout's kernels/ for a package of its own.
    root = Path(fastsae.__file__).parents[1]
    code = f"import sys, transformers.models.bert.modeling_bert\nsys.path.insert(0, {str(root)!r})\n{HUGGING_FACE}"
    entries = [e for e in os.environ.get("PYTHONPATH", "").split(os.pathsep) if e and Path(e).resolve() != root.resolve()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(entries)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("fine")
