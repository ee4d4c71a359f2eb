"""A region's affine map, distances between maps, soft codes, the nearest centre."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from polytope_cases import draw, linear, relu_net
from torch import Tensor, nn
from torch.nn import functional as F

import fastsae
from fastsae import spline_code
from fastsae.codes import pack_signs
from fastsae.polytopes import (
    NearestAffine,
    affine_map,
    as_net,
    boundary_norms,
    crossings,
    expected_hamming,
    frobenius_distance,
    frobenius_pairs,
    frobenius_topk,
    local_complexity,
    soft_affine_map,
    soft_code,
)

# ---------------------------------------------------------------- affine maps and their distances


@pytest.mark.parametrize(("slope", "residual"), [(0.0, False), (0.2, True)])
def test_affine_map(slope: float, residual: bool) -> None:
    net = relu_net([5, 5, 30, 30], 6, slope, residual)
    x = draw(2, 3, 5)
    A, c = affine_map(net, x)
    assert A.shape == (2, 3, 3, 5) and c.shape == (2, 3, 3)
    torch.testing.assert_close((A @ x.unsqueeze(-1))[..., 0] + c, net(x))
    torch.testing.assert_close(A[1, 2], torch.autograd.functional.jacobian(net, x[1, 2]))
    # The same map anywhere in the region, here up to the first crossing.
    found = crossings(net, x.flatten(0, 1), x.flatten(0, 1) + 1)
    inside = x + 0.9 * found.t[found.offsets[:-1]].reshape(2, 3, 1)
    torch.testing.assert_close((A @ inside.unsqueeze(-1))[..., 0] + c, net(inside))


def test_boundary_norms_are_the_change_across_a_boundary() -> None:
    net = relu_net([5, 12, 12, 12], 8, 0.1, residual=True)
    p, q = draw(2, 4, 5)
    found = crossings(net, p, q)
    step = 1e-7
    at = p[found.segment] + found.t.unsqueeze(1) * (q - p)[found.segment]
    way = (q - p)[found.segment] * step
    apart = torch.cat([found.t.diff().abs(), torch.ones(1, dtype=torch.float64)])
    alone = (apart > 1e-5) & (torch.cat([torch.ones(1, dtype=torch.float64), apart[:-1]]) > 1e-5)
    change = (affine_map(net, at + way)[0] - affine_map(net, at - way)[0]).flatten(1).norm(dim=1)
    norms = boundary_norms(net, at - way)
    mine = torch.stack([norms[layer][i, j] for i, (layer, j) in enumerate(zip(found.layer.tolist(), found.neuron.tolist()))])
    assert int(alone.sum()) > 20
    torch.testing.assert_close(mine[alone], change[alone])
    with pytest.raises(ValueError, match=r"^boundary_norms: net must be one MLP"):
        boundary_norms(net)


MLPS = {
    "relu": nn.ReLU(),
    "leaky": nn.LeakyReLU(0.25),
    "gelu": nn.GELU(),
}


@pytest.mark.parametrize("act", MLPS.values(), ids=MLPS)
def test_frobenius_distance_is_the_norm_of_the_difference(act: nn.Module) -> None:
    W_in, W_out = draw(70, 6), draw(5, 70)
    net = as_net([linear(W_in, draw(70)), act, linear(W_out)])
    x = draw(20, 6)
    z = net.preactivations(x)[0]
    slope = getattr(act, "negative_slope", 0.0)

    def formed(q: Tensor) -> Tensor:
        return torch.einsum("oh,nh,hd->nod", W_out, slope + (1 - slope) * q, W_in)

    for codes, q in ((spline_code(x, W_in, net.stages[0].b), (z > 0).double()), (soft_code(z), soft_code(z))):  # pyright: ignore
        maps = formed(q)
        expected = (maps.unsqueeze(1) - maps).flatten(2).norm(dim=2)
        torch.testing.assert_close(frobenius_distance(net, codes.unsqueeze(1), codes), expected)
        torch.testing.assert_close(frobenius_pairs(net, codes), expected)
        torch.testing.assert_close(frobenius_pairs(net, codes[:7], codes), expected[:7])
        assert not frobenius_distance(net, codes, codes).any() and not frobenius_pairs(net, codes).diagonal().any()
        near = frobenius_topk(net, codes[:7], codes, 4)
        assert near.index.equal(expected[:7].topk(4, largest=False).indices)
        torch.testing.assert_close(near.distance, expected[:7].topk(4, largest=False).values)
    if isinstance(act, nn.ReLU):
        torch.testing.assert_close(affine_map(net, x)[0], formed((z > 0).double()))
    # Flipping one neuron: the norm of its boundary.
    flipped = torch.eye(70, dtype=torch.float64)
    torch.testing.assert_close(boundary_norms(net)[0], frobenius_distance(net, flipped, 0 * flipped))


def test_frobenius_pairs_of_codes_that_hardly_differ() -> None:
    W_in, W_out = draw(100, 8), draw(8, 100)
    with torch.no_grad():
        W_in[3] *= 1e-7
    net = as_net([linear(W_in), nn.ReLU(), linear(W_out)])
    codes = (draw(1, 100) > 0).repeat(4, 1)
    codes[1, 3] ^= True
    codes[2, 5] ^= True
    packed = pack_signs(codes)
    found = frobenius_pairs(net, packed)
    assert float(found[0, 3]) == 0.0
    torch.testing.assert_close(found[0, 1], (W_out[:, 3].norm() * W_in[3].norm()), rtol=1e-12, atol=0)
    torch.testing.assert_close(found[0, 2], (W_out[:, 5].norm() * W_in[5].norm()), rtol=1e-9, atol=0)
    assert frobenius_topk(net, packed, packed, 4).index[0].tolist() == [0, 3, 1, 2]  # equal distances: the lower index


# ---------------------------------------------------------------- soft codes

SMOOTH = {
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "softmax": nn.Softmax(-1),
    "relu": nn.ReLU(),
}


@pytest.mark.parametrize("kind", SMOOTH)
@pytest.mark.parametrize("residual", [False, True])
def test_the_soft_map_gives_the_layers_output(kind: str, residual: bool) -> None:
    net = as_net([linear(draw(9, 4), draw(9)), SMOOTH[kind], linear(draw(4, 9), draw(4))], residual=residual)
    x = draw(7, 4)
    A, c = soft_affine_map(net, x)
    torch.testing.assert_close((A @ x.unsqueeze(-1))[..., 0] + c, net(x), rtol=1e-13, atol=1e-13)
    # And through two layers.
    deep = as_net([net, linear(draw(5, 4)), nn.SiLU(), linear(draw(2, 5))])
    A, c = soft_affine_map(deep, x)
    torch.testing.assert_close((A @ x.unsqueeze(-1))[..., 0] + c, deep(x), rtol=1e-12, atol=1e-12)


def test_gelus_soft_code_is_the_normal_distribution() -> None:
    z = torch.linspace(-30, 30, 601, dtype=torch.float64)
    q = soft_code(z, "gelu")
    expected = torch.tensor([0.5 * math.erfc(-v / math.sqrt(2)) for v in z.tolist()], dtype=torch.float64)
    torch.testing.assert_close(q, expected, rtol=1e-12, atol=0)  # a rounding of z changes Φ(z) by z² roundings
    torch.testing.assert_close(z * q, F.gelu(z), rtol=1e-9, atol=1e-15)
    # q is no Jacobian.
    slope = torch.autograd.functional.jacobian(F.gelu, z).diagonal()
    torch.testing.assert_close(slope, q + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["relu", "silu", "sigmoid", "tanh", "softmax"])
def test_beta_from_linear_to_hard(kind: str) -> None:
    z = draw(6, 8)
    hard = F.one_hot(z.argmax(1), 8).double() if kind == "softmax" else (z > 0).double()
    assert soft_code(z, kind, 1.0).equal(hard)
    torch.testing.assert_close(soft_code(z, kind, 1 - 1e-6), hard)
    torch.testing.assert_close(soft_code(z, kind, 0.0), torch.full_like(z, 1 / 8 if kind == "softmax" else 0.5))
    half = {"tanh": (z.tanh() + 1) / 2, "softmax": z.softmax(1)}.get(kind, z.sigmoid())
    torch.testing.assert_close(soft_code(z, kind, 0.5), half)
    assert soft_code(torch.zeros(2, 3), "silu", 1.0).equal(torch.zeros(2, 3))
    if kind in ("relu", "silu"):
        module = nn.ReLU() if kind == "relu" else nn.SiLU()
        parts = (linear(draw(9, 4), draw(9)), linear(draw(4, 9), draw(4)))
        soft, relu = as_net([parts[0], module, parts[1]]), as_net([parts[0], nn.ReLU(), parts[1]])
        x = draw(5, 4)
        for mine, expected in zip(soft_affine_map(soft, x, 1.0), affine_map(relu, x)):
            torch.testing.assert_close(mine, expected)


def test_expected_hamming() -> None:
    p, q = (draw(5, 90, seed=i).sigmoid() for i in (0, 1))
    found = expected_hamming(p, q)
    torch.testing.assert_close(found, (p.unsqueeze(1) * (1 - q) + (1 - p.unsqueeze(1)) * q).sum(2))
    draws = torch.rand(4000, 2, 90, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampled = ((draws[:, 0] < p[0]) != (draws[:, 1] < q[0])).sum(1).double()
    assert float(sampled.mean()) == pytest.approx(float(found[0, 0]), abs=4 * float(sampled.std()) / 4000**0.5)
    hard = [(v > 0.5).float() for v in (p, q)]
    assert expected_hamming(*hard).equal(fastsae.codes.hamming(pack_signs(hard[0]), pack_signs(hard[1])).float())


# ---------------------------------------------------------------- nearest centre


@given(st.integers(0, 70), st.integers(1, 9), st.integers(1, 6), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_nearest_affine_is_the_loop_over_rows(n: int, C: int, D: int, E: int, biased: bool, seed: int) -> None:
    centres, A, c = draw(C, D, seed=seed), draw(C, E, D, seed=seed), draw(C, E, seed=seed) if biased else None
    x = draw(n, D, seed=seed)
    system = NearestAffine(centres, A, c)
    y, index = system(x), system.nearest(x)
    for row in range(n):
        i = int((centres - x[row]).square().sum(1).argmin())
        assert int(index[row]) == i
        torch.testing.assert_close(y[row], A[i] @ x[row] + (0 if c is None else c[i]))
    assert y.shape == (n, E)


def test_nearest_affine_learns() -> None:
    centres, x = draw(4, 3), draw(2, 50, 3).requires_grad_()
    A, c = nn.Parameter(draw(4, 2, 3)), nn.Parameter(draw(4, 2))
    system = NearestAffine(centres, A, c)
    assert {name for name, _ in system.named_parameters()} == {"A", "c"} and set(system.state_dict()) == {"A", "c", "centres"}
    mine = torch.autograd.grad(system(x).square().sum(), (x, A, c))
    index = system.nearest(x)
    plain = (A[index] @ x.unsqueeze(-1))[..., 0] + c[index]
    for a, b in zip(mine, torch.autograd.grad(plain.square().sum(), (x, A, c))):
        torch.testing.assert_close(a, b)
    equal = NearestAffine(torch.zeros(3, 3), draw(3, 2, 3, dtype=torch.float32))
    assert not equal.nearest(draw(5, 3, dtype=torch.float32)).any()  # the lowest of equal ones


def test_autocast_changes_nothing() -> None:
    module = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3)).requires_grad_(False)
    net, x = as_net(module), draw(5, 6, dtype=torch.float32)
    p = x.sigmoid()
    system = NearestAffine(x[:3], draw(3, 2, 6, dtype=torch.float32))
    calls = (
        lambda: affine_map(net, x),
        lambda: soft_affine_map(net, x, 0.5),
        lambda: boundary_norms(net, x),
        lambda: crossings(net, x, x + 1),
        lambda: local_complexity(net, x, 0.3, 6),
        lambda: (expected_hamming(p, p), system(x)),
    )
    for call in calls:
        plain = call()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = call()
        assert all(a.equal(b) for a, b in zip(plain, found))
