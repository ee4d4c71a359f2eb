"""Boundaries on segments (segments, layers, width) and of dictionaries (segments, D, F, k), distances of maps (codes, neurons, D), maps by
nearest centre (rows, centres, D).

``fastsae bench polytopes``; the walks from region to region take minutes at the full size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import fastsae
from bench.harness import DEVICE, name, normal, shapes
from fastsae import polytopes

SEGMENTS = shapes([(256, 4, 256)], [(6, 3, 24)])
ACTIVE = shapes([(64, 768, 65536, 32)], [(4, 16, 400, 4)])
CODES = shapes([(4096, 512, 128)], [(64, 70, 16)])
CENTRES = shapes([(65536, 1024, 64)], [(300, 9, 8)])


def relu_net(layers: int, width: int) -> nn.Sequential:
    """He-initialised, biases of standard deviation 0.1, so that every layer has many boundaries between two normal points."""
    net = nn.Sequential()
    for layer in range(layers):
        linear = nn.Linear(width, width, dtype=torch.float64, device=DEVICE)
        with torch.no_grad():
            linear.weight.copy_(normal(width, width, seed=layer) * (2 / width) ** 0.5)
            linear.bias.copy_(normal(width, seed=layer + 100) * 0.1)
        net.extend([linear, nn.ReLU()])
    return net.append(nn.Linear(width, 10, dtype=torch.float64, device=DEVICE))


@torch.no_grad()
def walk(layers: Sequence[tuple[Tensor, Tensor]], p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """(t, neuron over all layers) of all crossings, segment after segment: a forward pass for each region of all segments side by side.

    A region is a mask; value and slope of all pre-activations in it (two rows of one product) say which neuron ends it, and where.
    """
    d, h, masks = q - p, p, []
    for W, b in layers:
        z = torch.addmm(b, h, W.T)
        masks.append(z > 0)
        h = z.relu()
    mask = torch.cat(masks, 1)
    widths = [W.shape[0] for W, _ in layers]
    t, live = torch.zeros(len(p), dtype=p.dtype, device=p.device), torch.arange(len(p), device=p.device)
    found = []
    while len(live):
        on = mask[live]
        rows = torch.cat([torch.addcmul(p[live], t[live].unsqueeze(1), d[live]), d[live]])
        values, slopes = [], []
        for (W, b), part in zip(layers, on.split(widths, 1)):
            z = rows @ W.T
            z[: len(live)] += b
            values.append(z[: len(live)])
            slopes.append(z[len(live) :])
            rows = torch.cat([values[-1] * part, slopes[-1] * part])
        z, slope = torch.cat(values, 1), torch.cat(slopes, 1)
        step, neuron = torch.where((slope < 0) == on, -z / slope, torch.inf).clamp_min_(0).min(1)
        after = t[live] + step
        inside = after <= 1
        live, neuron, after = live[inside], neuron[inside], after[inside]
        t[live] = after
        mask[live, neuron] ^= True
        found.append((live, after, neuron))
    segment, t, neuron = (torch.cat(parts) for parts in zip(*found))
    order = segment.argsort(stable=True)
    return t[order], neuron[order]


@pytest.mark.seconds(370)
@pytest.mark.parametrize("shape", SEGMENTS, ids=name)
def test_crossings(shape: tuple[int, int, int], compare: Callable[..., None]) -> None:
    segments, depth, width = shape
    module = relu_net(depth, width)
    net = polytopes.as_net(module)
    layers = [(one.weight.detach(), one.bias.detach()) for one in module if isinstance(one, nn.Linear)][:-1]
    p, q = (normal(segments, width, seed=seed).double() for seed in (1, 2))

    def verify() -> None:
        found = polytopes.crossings(net, p, q)
        t, neuron = walk(layers, p, q)
        torch.testing.assert_close(found.t, t, rtol=1e-9, atol=1e-12)
        assert neuron.equal(found.layer * width + found.neuron)

    def one_by_one() -> None:
        for a, b in zip(p.split(1), q.split(1)):
            walk(layers, a, b)

    others = {
        "a forward per region, segments side by side": lambda: walk(layers, p, q),
        "a forward per region, one segment after another": one_by_one,
    }
    compare("crossings", name(shape), lambda: polytopes.crossings(net, p, q), others, verify)


@pytest.mark.seconds(40)
@pytest.mark.parametrize("shape", ACTIVE, ids=name)
def test_dictionary_crossings(shape: tuple[int, int, int, int], compare: Callable[..., None]) -> None:
    segments, d, size, k = shape
    sae = fastsae.SAE(d, size, fastsae.TopK(k), device=DEVICE).eval()
    p, q = normal(segments, d, seed=1), normal(segments, d, seed=2)
    ends, sae.packed = torch.cat([p, q]), True
    W = sae.W_enc.detach().double()

    def verify() -> None:
        found = polytopes.dictionary_crossings(sae, p[:2], q[:2])
        for s in range(2):
            middle = torch.lerp(p[s], q[s], 0.5).double()
            here = (found.segment == s) & (found.t <= 0.5)
            held = set(sae.encode(p[s : s + 1]).indices[0].tolist()) - set(found.leaves[here].tolist()) | set(found.enters[here].tolist())
            assert set((W @ middle).topk(k).indices.tolist()) <= held

    others = {
        "packed encode of both ends": lambda: sae.encode(ends),
        "encode at 100 points of each (misses changes)": lambda: [sae.encode(torch.lerp(p, q, i / 99)) for i in range(100)],
        "all scores of both ends, float64": lambda: ends.double() @ W.T,
    }
    compare(
        "dictionary_crossings",
        name(shape),
        lambda: polytopes.dictionary_crossings(sae, p, q),
        others,
        verify,
        floor="packed encode of both ends",
    )


@pytest.mark.parametrize("shape", CODES, ids=name)
def test_frobenius_pairs(shape: tuple[int, int, int], compare: Callable[..., None]) -> None:
    codes, neurons, d = shape
    W_in, W_out = normal(neurons, d, seed=1), normal(d, neurons, seed=2)
    first, second = nn.Linear(d, neurons), nn.Linear(neurons, d)
    with torch.no_grad():
        first.weight.copy_(W_in)
        second.weight.copy_(W_out)
    net = polytopes.as_net(nn.Sequential(first, nn.ReLU(), second).to(DEVICE))
    on = normal(codes, neurons, seed=3) > 0
    packed = fastsae.codes.pack_signs(on)

    def forming() -> Tensor:
        maps = torch.stack([(W_out * row) @ W_in for row in on.float()]).flatten(1)
        squares = maps.square().sum(1)
        return torch.addmm(squares.unsqueeze(1) + squares, maps, maps.T, alpha=-2).clamp_min_(0).sqrt_()

    def verify() -> None:
        found = polytopes.frobenius_pairs(net, packed)
        for i, j in ((0, 1), (1, 0), (3, codes - 1), (5, 5)):
            s = on[i].double() - on[j].double()
            expected = ((W_out.double() * s) @ W_in.double()).norm()
            torch.testing.assert_close(found[i, j], expected, rtol=1e-10, atol=0)

    compare(
        "frobenius_pairs",
        name(shape),
        lambda: polytopes.frobenius_pairs(net, packed),
        {"forming the maps (float32)": forming},
        verify,
    )


@pytest.mark.parametrize("shape", CENTRES, ids=name)
def test_nearest_affine(shape: tuple[int, int, int], compare: Callable[..., None]) -> None:
    rows, centres, d = shape
    x, mu, A, c = normal(rows, d, seed=1), normal(centres, d, seed=2), normal(centres, d, d, seed=3), normal(centres, d, seed=4)
    system = polytopes.NearestAffine(mu, A, c)

    def gathering(part: int) -> Tensor:
        result = []
        for some in x.split(part):
            index = torch.addmm(-0.5 * mu.square().sum(1), some, mu.T).argmax(1)
            result.append(torch.baddbmm(c[index].unsqueeze(2), A[index], some.unsqueeze(2))[:, :, 0])
        return torch.cat(result)

    def loop() -> Tensor:
        index = torch.addmm(-0.5 * mu.square().sum(1), x, mu.T).argmax(1)
        y = torch.empty_like(x)
        for i in range(centres):
            mine = (index == i).nonzero()[:, 0]
            y[mine] = torch.addmm(c[i], x[mine], A[i].T)
        return y

    def verify() -> None:
        index, y = system.nearest(x), system(x)
        assert float((index == (x.double() @ mu.double().T - 0.5 * mu.double().square().sum(1)).argmax(1)).double().mean()) > 0.999
        for row in range(0, rows, max(1, rows // 500)):
            torch.testing.assert_close(y[row], A[index[row]] @ x[row] + c[index[row]], rtol=1e-4, atol=1e-4)

    others = {
        "gather + bmm": lambda: gathering(rows),
        "gather + bmm, 2048 rows at a time": lambda: gathering(2048),
        "a product for each centre": loop,
    }
    compare("NearestAffine", name(shape), lambda: system(x), others, verify)
