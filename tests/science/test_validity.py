"""Distances to boundaries and to changes along directions: against the network itself just before and just behind, and in fractions."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from polytope_cases import draw, gated_model, linear, relu_net
from torch import Tensor, nn

import fastsae
from fastsae.polytopes import Net, affine_map, as_net, mlp_block, rays, validity

N, M, D, RADIUS = 4, 2, 6, 3.0
Run = Callable[[Tensor], Any]


def dictionary(activation: Any, **options: Any) -> fastsae.SAE[Any]:
    sae = fastsae.SAE(D, 90, activation, dtype=torch.float64, seed=1, **options).eval()
    with torch.no_grad():
        sae.b_enc.copy_(draw(90) * 0.3)
        sae.b_dec.copy_(draw(sae.d_out))
        if isinstance(activation, fastsae.JumpReLU):
            sae.threshold.copy_(draw(90).abs() * 0.3 - 0.05)
        if isinstance(activation, fastsae.BatchTopK):
            sae.running_threshold.fill_(0.2)
        if sae.W_skip is not None:
            sae.W_skip.copy_(draw(sae.d_out, D))
    return sae


def features(sae: Any, x: Tensor) -> Tensor:
    """Scores above the threshold, in the arithmetic of a reader of the docstring."""
    z = (x - (sae.b_dec if sae.pre_bias else 0)) @ sae.W_enc.T + sae.b_enc
    raw = getattr(sae, "threshold", getattr(sae, "running_threshold", torch.zeros(1, dtype=torch.float64)))
    return z > raw.double().clamp_min(0)


def sae_map(sae: Any, x: Tensor) -> Tensor:
    return torch.einsum("nf,fo,fd->nod", features(sae, x).double(), sae.W_dec, sae.W_enc)


def sae_output(sae: Any, x: Tensor) -> Tensor:
    z = (x - (sae.b_dec if sae.pre_bias else 0)) @ sae.W_enc.T + sae.b_enc
    past = x @ sae.W_skip.T if sae.W_skip is not None else 0
    return (z * features(sae, x)) @ sae.W_dec + sae.b_dec + past


def case(name: str) -> tuple[Any, Run, Run | None, Run | None]:
    """(net or SAE, its bits, its map, its output)"""
    if name.startswith("sae"):
        _, kind, *more = name.split("-")
        made: Any = {"relu": fastsae.ReLU(), "jump": fastsae.JumpReLU(), "batch": fastsae.BatchTopK(8)}[kind]
        sae = dictionary(made, **({"d_out": 4, "skip": True} if more else {}))
        return sae, lambda x: features(sae, x), lambda x: sae_map(sae, x), lambda x: sae_output(sae, x)
    nets: dict[str, Any] = {
        "mlp": lambda: relu_net([D, 70], 1),
        "narrow": lambda: relu_net([D, 9], 1),
        "leaky": lambda: as_net([linear(draw(100, D), draw(100)), nn.LeakyReLU(-0.3), linear(draw(D, 100) * 0.1, draw(D))], residual=True),
        "deep": lambda: relu_net([D, 20, 20], 2, residual=True),
        "conv": lambda: as_net([nn.Conv2d(1, 3, 2).double(), nn.ReLU(), nn.Flatten(), linear(draw(2, 6))], input_shape=(1, 2, 3)),
        "gelu": lambda: as_net([nn.LayerNorm(D).double(), linear(draw(40, D), draw(40)), nn.GELU()]),
        "swiglu": lambda: mlp_block(gated_model(D, 60), 0),
        "geglu": lambda: mlp_block(gated_model(D, 60, gemma=True, bias=True), 0),
    }
    net: Net = nets[name]()

    def bits(x: Tensor) -> Tensor:
        return torch.cat([z > 0 for z in net.preactivations(x)], -1)

    curved = name in ("gelu", "swiglu", "geglu")
    return net, bits, None if curved else lambda x: affine_map(net, x)[0], None if curved else net


ALL = ("mlp", "narrow", "leaky", "deep", "conv", "gelu", "swiglu", "geglu", "sae-relu", "sae-jump", "sae-batch", "sae-jump-skip")


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_nothing_has_changed_before_and_all_that_was_asked_behind(name: str) -> None:
    net, bits, map_of, output_of = case(name)
    x, directions = draw(N, D, seed=3), draw(M, D, seed=4)
    maps = map_of is not None and output_of is not None
    map_change = 0.4 * map_of(x).flatten(1).norm(dim=1) if map_of is not None else None
    output_change = 0.5 if output_of is not None else None
    found = validity(net, x, directions, share=0.1, map_change=map_change, output_change=output_change, radius=RADIUS)
    unit = directions / directions.norm(dim=1, keepdim=True)
    rays_of = torch.stack([unit, -unit], 1)  # [M, 2, D]
    start = bits(x)
    need = math.ceil(0.1 * start.shape[1])

    def holds(kind: str, n: int, points: Tensor) -> Tensor:
        if kind in ("first", "bits"):
            return (bits(points) != start[n]).sum(1) >= (1 if kind == "first" else need)
        if kind == "map":
            assert map_of is not None and map_change is not None
            return (map_of(points) - map_of(x[n : n + 1])).flatten(1).norm(dim=1) >= map_change[n]
        assert output_of is not None
        return (output_of(points) - output_of(x[n : n + 1])).norm(dim=1) >= 0.5

    finite = 0
    for kind in ("first", "bits", "map", "output") if maps else ("first", "bits"):
        distance = getattr(found, kind)
        assert distance.shape == (N, M, 2) and distance.dtype is torch.float64
        for n, m, side in torch.cartesian_prod(torch.arange(N), torch.arange(M), torch.arange(2)).tolist():
            t = float(distance[n, m, side])
            before = torch.linspace(0, 1, 200, dtype=torch.float64).unsqueeze(1) * (min(t, RADIUS) * (1 - 1e-9))
            assert not bool(holds(kind, n, x[n] + before * rays_of[m, side]).any()), (kind, n, m, side)
            if math.isfinite(t):
                finite += 1
                assert bool(holds(kind, n, (x[n] + (t * (1 + 1e-9) + 1e-12) * rays_of[m, side]).unsqueeze(0))), (kind, n, m, side, t)
    assert finite > N * M
    assert maps or (found.map is None and found.output is None)


@pytest.mark.parametrize("name", ["mlp", "leaky", "sae-jump"])
def test_rays_without_end_and_blocks_of_any_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, *_ = case(name)
    x, directions = draw(N, D, seed=3), draw(M, D, seed=4)
    asked: dict[str, Any] = {"share": 0.3, "map_change": 1.0, "output_change": torch.full((N,), 2.0)}
    whole = validity(net, x, directions, **asked)
    short = validity(net, x, directions, **asked, radius=1.0)
    for ours, cut in zip(whole, short):
        assert ours is not None and cut is not None
        assert cut.equal(ours.masked_fill(ours > 1, math.inf))
    monkeypatch.setattr("fastsae.reference.WORKSPACE_ELEMENTS", 300)
    monkeypatch.setattr(rays, "_NEAR", 1)  # most pairs then take the ways of those that are not certain
    monkeypatch.setattr(rays, "_FAST", 1)
    for ours, parts in zip(whole, validity(net, x, directions, **asked)):
        torch.testing.assert_close(parts, ours, rtol=1e-12, atol=0)


def test_the_walk_finds_what_the_closed_form_does() -> None:
    net = relu_net([D, 70], 1)
    x, directions = draw(N, D, seed=3), draw(M, D, seed=4)
    closed = validity(net, x, directions, share=0.2, map_change=2.0, output_change=1.5, radius=2.0)
    walked = rays._along(
        net, x, directions / directions.norm(dim=1, keepdim=True), 2.0, rays._Asked(14, torch.full((N,), 2.0), torch.full((N,), 1.5))
    )
    for ours, other in zip(closed, walked):
        torch.testing.assert_close(other.view(N, M, 2), ours, rtol=1e-9, atol=0)


def test_first_boundaries_in_fractions() -> None:
    generator = torch.Generator().manual_seed(0)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=generator).double()

    W, b, x = whole(50, 3), whole(50), whole(40, 3)
    x[0] = 0
    directions = torch.tensor([[1.0, 0, 0], [0, 0, -2], [3, 0, 4], [2, -1, 2]], dtype=torch.float64)  # of whole lengths
    found = validity(as_net([linear(W, b), nn.ReLU()]), x, directions).first
    zero = 0
    for n in range(40):
        for m in range(4):
            length = int(directions[m].norm())
            for side, sign in enumerate((1, -1)):
                times = []
                for w, bias in zip(W.tolist(), b.tolist()):
                    z = sum(int(a) * int(v) for a, v in zip(w, x[n].tolist())) + int(bias)
                    s = Fraction(sign * sum(int(a) * int(v) for a, v in zip(w, directions[m].tolist())), length)
                    if (z > 0 and s < 0) or (z <= 0 and s > 0):
                        times.append(-z / s)
                expected = float(min(times)) if times else math.inf
                assert float(found[n, m, side]) == pytest.approx(expected, rel=1e-15 * 4, abs=0), (n, m, side)
                zero += expected == 0
    assert zero > 20  # points on a boundary that they leave at once


def test_without_biases_every_ray_from_the_origin_changes_at_once() -> None:
    net = as_net([linear(draw(500, D)), nn.ReLU(), linear(draw(2, 500))])
    x = torch.zeros(2, D, dtype=torch.float64)
    found = validity(net, x, draw(3, D), share=0.2, map_change=0.1, output_change=1.0)
    assert bool((found.first == 0).all()) and found.bits is not None and bool((found.bits == 0).all())
    assert found.map is not None and bool((found.map == 0).all()) and found.output is not None
    unit = draw(3, D) / draw(3, D).norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.output[0], 1 / torch.stack([net(unit).norm(dim=1), net(-unit).norm(dim=1)], 1))


def test_no_points_and_no_directions() -> None:
    net = relu_net([D, 7], 1)
    for n, m in ((0, 3), (2, 0)):
        for radius in (None, 1.0):
            found = validity(net, draw(n, D), draw(m, D), share=0.5, output_change=1.0, radius=radius)
            assert found.first.shape == (n, m, 2)
    deep = validity(relu_net([D, 7, 8], 1), draw(0, D), draw(3, D), share=0.5, map_change=1.0, radius=1.0)
    assert deep.first.shape == (0, 3, 2)


X = draw(N, D)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"net": 3}, TypeError, "net must be a Net .*got int"),
        ({"net": dictionary(fastsae.TopK(5))}, ValueError, "net must be a Net, or an SAE with ReLU, JumpReLU or BatchTopK .*, got TopK"),
        ({"net": nn.Linear(3, 4)}, ValueError, "net must be a Net, or an SAE .*, got NoneType"),
        ({"x": X.long()}, TypeError, "x must have dtype"),
        ({"x": X[:, 1:]}, ValueError, r"x must have shape \[.., d_in=6\], got \[4, 5\]"),
        ({"x": X[0]}, ValueError, r"x must have two dimensions, got \[6\]"),
        ({"x": X / 0}, ValueError, "x must be finite"),
        ({"directions": X * 0}, ValueError, "directions must be finite and of a length above 0, got 0"),
        ({"share": 1.5}, ValueError, "share must be at most 1, got 1.5"),
        ({"share": 0}, ValueError, "share must be a finite number above 0"),
        ({"map_change": torch.ones(3)}, ValueError, r"map_change must have shape \[N=4\], got \[3\]"),
        ({"output_change": -torch.ones(4)}, ValueError, "output_change must be above 0, got -1"),
        ({"radius": -1.0}, ValueError, "radius must be a finite number above 0"),
        ({"net": relu_net([D, 7, 7], 1)}, ValueError, "radius must be given for a net that is not a single affine layer, got Net"),
        ({"net": case("geglu")[0]}, ValueError, "radius must be given for a net that is not"),
        (
            {"net": case("swiglu")[0], "map_change": 1.0},
            ValueError,
            "net must be affine in its regions, got a SwiGLU MLP, which multiplies",
        ),
        ({"net": case("geglu")[0], "output_change": 1.0}, ValueError, "net must be affine in its regions, got a GeGLU MLP"),
        ({"net": case("gelu")[0], "output_change": 1.0}, ValueError, "net must hold no normalisation"),
        ({"net": as_net([linear(draw(4, D)), nn.GELU()]), "map_change": 1.0}, ValueError, "net must have ReLU and LeakyReLU layers alone"),
        ({"net": as_net(linear(draw(4, D)))}, ValueError, "net must have at least one activation layer"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^validity: {message}"):
        validity(**{"net": relu_net([D, 7], 1), "x": X, "directions": X, **change})
