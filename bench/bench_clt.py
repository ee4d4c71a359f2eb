"""One training step of a TopK cross-layer transcoder by everybody, in shapes (B, L, D, F, k): ours, plain torch with sparse latents, and
the dense formula of the libraries that train them, all from the same weights with Adam over every parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fastsae
from bench.harness import DEVICE, has_onednn, name, normal, shapes
from bench.training import Runner, check_gradients, codes
from fastsae.sae import CrossLayerTranscoder

Shape = tuple[int, ...]
"""(B, L, D, F, k)."""


def start(shape: Shape) -> CrossLayerTranscoder:
    _, layers, width, features, k = shape
    return CrossLayerTranscoder(layers, width, features, fastsae.TopK(k), device=DEVICE, seed=0)


def rows(shape: Shape) -> tuple[Tensor, Tensor]:
    return normal(*shape[:3], seed=1), normal(*shape[:3], seed=2)


def ours(shape: Shape, lr: float = 1e-4) -> Runner:
    clt = start(shape)
    opt = fastsae.optim.Adam(clt, lr=lr)
    return Runner(opt.step, opt, clt.state_dict, named={key: p for key, p in clt.named_parameters() if p.requires_grad})


def plain(shape: Shape, way: str = "bag", lr: float = 1e-4) -> Runner:
    """``bag``: top-k and ``embedding_bag`` over decoder rows that hold all targets; ``gathered``: the encoder's gradient from gathered rows
    besides. ``dense``: a [B, F] code of every layer and a product for each pair of layers, as llamascopium and clt-training compute it."""
    _, layers, width, features, k = shape
    clt = start(shape)
    p = {key: torch.nn.Parameter(t.detach()) for key, t in clt.named_parameters() if t.requires_grad}
    opt = torch.optim.Adam(p.values(), lr=lr, fused=True)

    def outputs(x: Tensor) -> Tensor:
        y = p["layers.0.b_dec"].view(layers, width)
        if way == "dense":
            dense = []
            for n in range(layers):
                z = functional.linear(x[:, n], p[f"layers.{n}.W_enc"], p[f"layers.{n}.b_enc"]).relu()
                values, indices = z.topk(k, sorted=False)
                dense.append(torch.zeros_like(z).scatter(1, indices, values))
            decoders = [p[f"layers.{n}.W_dec"].view(features, -1, width) for n in range(layers)]
            return torch.stack([sum((dense[n] @ decoders[n][:, m - n] for n in range(m + 1)), y[m]) for m in range(layers)], 1)
        parts = []
        for n in range(layers):
            values, indices = codes(x[:, n], p[f"layers.{n}.W_enc"], p[f"layers.{n}.b_enc"], k, way == "gathered")
            part = functional.embedding_bag(indices, p[f"layers.{n}.W_dec"], per_sample_weights=values, mode="sum")
            parts.append(functional.pad(part, (n * width, 0)))
        return sum(parts[1:], parts[0]).view(-1, layers, width) + y

    def step(x: Tensor, target: Tensor) -> None:
        ((outputs(x) - target).square().sum() / x.shape[0]).backward()
        opt.step()
        opt.zero_grad()

    return Runner(step, opt, clt.state_dict, named=p)


def sides() -> dict[str, Callable[[Shape], Runner]]:
    made: dict[str, Callable[[Shape], Runner]] = {"ours": ours, "plain": plain}
    if has_onednn():
        made["gathered"] = lambda shape: plain(shape, "gathered")
    return made | {"dense": lambda shape: plain(shape, "dense")}


@pytest.mark.seconds(40)
@pytest.mark.parametrize("shape", shapes([(256, 6, 768, 4096, 32)], [(32, 3, 64, 512, 8)]), ids=name)
def test_clt_step(shape: Shape, compare: Callable[..., None]) -> None:
    made, batch = sides(), rows(shape)
    mine = made.pop("ours")(shape)

    def verify() -> None:
        both = ours(shape), plain(shape)
        for runner in both:
            runner.step(*batch)
        check_gradients(*both, 1e-3)  # of a first step; room for a near tie

    calls = {f"{who} torch": partial(make(shape).step, *batch) for who, make in made.items()}
    compare("cross-layer transcoder step", name(shape), lambda: mine.step(*batch), calls, verify)
