"""Gates of SwiGLU and GeGLU against the layer itself and dense sampling; convolutional nets against their modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from polytope_cases import draw, gated_model, linear
from torch import Tensor, nn

from fastsae.codes import boundary_density, combine_hashes, hash_signs, pack_signs, trace, trace_points
from fastsae.polytopes import (
    affine_map,
    as_net,
    boundary_norms,
    crossings,
    frobenius_distance,
    frobenius_pairs,
    local_complexity,
    mlp_block,
    shell,
    soft_affine_map,
)
from fastsae.polytopes import net as nets

D, H = 16, 70
GATES = [(False, False), (False, True), (True, False), (True, True)]


@pytest.mark.parametrize(("gemma", "bias"), GATES)
@torch.no_grad()
def test_a_gated_block_is_its_layer(gemma: bool, bias: bool) -> None:
    model = gated_model(D, H, gemma, bias)
    layer: Any = model[0][1]  # pyright: ignore[reportIndexIssue]
    net, x = mlp_block(model, 1), draw(9, D)
    torch.testing.assert_close(net(x), layer(x))
    assert (net.d_in, net.d_out, net.widths) == (D, D, (H,))
    norm = layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm
    inner = mlp_block(model, 1, norm=False, residual=False)
    torch.testing.assert_close(inner.preactivations(norm(x)), net.preactivations(x))
    with trace(model, "*", emit="code") as traced:
        layer(x)
    assert next(iter(traced.pop().values())).equal(pack_signs(net.preactivations(x)[0]))
    layer.mlp.gate_proj.weight.neg_()
    torch.testing.assert_close(net(x), layer(x))
    with pytest.raises(ValueError, match="the skip connection starts before the norm"):
        mlp_block(model, 1, norm=False)


@pytest.mark.parametrize(("gemma", "bias"), [(False, False), (True, True)])
@torch.no_grad()
def test_a_million_samples_find_no_other_crossing(gemma: bool, bias: bool) -> None:
    d, h = 8, 40
    net = mlp_block(gated_model(d, h, gemma, bias), 0)
    p, q = 3 * draw(2, 1, d, seed=8)
    found = crossings(net, p, q)
    samples, on, between = 10**6, None, []
    for part in torch.arange(samples + 1, dtype=torch.float64).split(50_000):
        # The gate by its definition: the norm, then the projection.
        z = nets.Net(net.stages[:5]).preactivations(p + (part / samples).unsqueeze(1) * (q - p))[0] > 0
        z = z if on is None else torch.cat([on, z])
        step, neuron = (z[1:] != z[:-1]).nonzero(as_tuple=True)
        between.append(torch.stack([step + part[0].long() - int(on is not None), neuron]))
        on = z[-1:]
    step, neuron = torch.cat(between, 1)
    assert found.neuron.equal(neuron) and found.t.shape[0] > h // 4
    assert bool(((found.t * samples - step >= -1e-6) & (found.t * samples - step <= 1 + 1e-6)).all())
    assert found.hash[-1:].equal(hash_signs(net.preactivations(q)[0]))


@torch.no_grad()
def test_without_biases_the_regions_are_cones() -> None:
    model = gated_model(D, H, gemma=True)
    net, x = mlp_block(model, 0), draw(30, D)
    norm, gate = net.stages[1], net.stages[3]
    assert isinstance(norm, nets.Norm) and isinstance(gate, nets.Affine) and norm.weight is not None
    w = gate.W * (1 + norm.weight)
    for scale in (1e-3, 1.0, 7.0):
        assert pack_signs(net.preactivations(scale * x)[0]).equal(pack_signs(x @ w.T))
    found = crossings(net, x, x.flip(0))
    assert found.counts.equal(boundary_density(pack_signs(x @ w.T), pack_signs(x.flip(0) @ w.T)).pairs.long())
    rays = shell(net, draw(4, D), origin=x[0])  # without a radius: one affine layer
    assert rays.distance.isfinite().all() and int(rays.offsets[-1]) == rays.neuron.shape[0] > 4 * H // 4
    centred = as_net([nn.LayerNorm(D, bias=False).double(), linear(draw(H, D)), nn.SiLU()])
    inner = draw(H, D) - draw(H, D).mean(1, keepdim=True)
    assert pack_signs(nets.linear_signs(centred).preactivations(x)[0]).equal(pack_signs(x @ inner.T))
    radius = 0.05
    counted = local_complexity(net, x, radius, 2 * D)
    assert bool((counted <= ((x @ w.T).abs() <= radius * w.norm(dim=1)).sum(1, keepdim=True)).all()) and int(counted.sum()) > 0


def test_what_is_not_affine_is_refused_by_name() -> None:
    code = pack_signs(draw(2, H))
    for gemma, name in ((False, "SwiGLU"), (True, "GeGLU")):
        net, x = mlp_block(gated_model(D, H, gemma), 0, norm=False, residual=False), draw(2, D)
        calls: list[tuple[Any, tuple[Any, ...]]] = [
            (affine_map, (net, x)),
            (soft_affine_map, (net, x)),
            (boundary_norms, (net,)),
            (boundary_norms, (net, x)),
            (frobenius_distance, (net, code, code)),
            (frobenius_pairs, (net, code)),
        ]
        for function, arguments in calls:
            with pytest.raises(ValueError, match=rf"^{function.__name__}: net must be affine in its regions, got a {name} MLP"):
                function(*arguments)
    with pytest.raises(ValueError, match=r"layer 1 has no closed form: .* .it follows a product of two branches"):
        crossings(as_net([mlp_block(gated_model(D, H), 0, residual=False), linear(draw(3, D)), nn.ReLU()]), x, x)
    with pytest.raises(ValueError, match=r"^shell: radius must be given"):
        shell(mlp_block(gated_model(D, H, bias=True), 0), x)


# ---------------------------------------------------------------- images


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding="same", groups=2, bias=False),
        nn.LeakyReLU(0.1),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 9),
        nn.BatchNorm1d(9),
        nn.ReLU(),
        nn.Linear(9, 3),
    ).double()
    module(draw(50, 2, 7, 7))  # running statistics
    with torch.no_grad():
        for part in (module[1], module[8]):
            part.weight.copy_(draw(part.num_features))
            part.bias.copy_(draw(part.num_features) * 0.1)
    return module.eval()


@pytest.mark.parametrize("dense", [True, False], ids=["matrices", "operators"])
@torch.no_grad()
def test_convolutions_are_affine_layers(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not dense:
        monkeypatch.setattr(nets, "_DENSE", 0)
    module = convolutional()
    net = as_net(module, input_shape=(2, 7, 7))
    x = draw(5, 98)
    torch.testing.assert_close(net(x), module(x.view(5, 2, 7, 7)))
    assert (net.d_in, net.d_out, net.widths) == (98, 3, (64, 64, 9))
    A, c = affine_map(net, x)
    torch.testing.assert_close(torch.einsum("noi,ni->no", A, x) + c, net(x))
    wanted = torch.autograd.functional.jacobian(lambda v: module(v.view(1, 2, 7, 7))[0], x[0])
    torch.testing.assert_close(A[0], wanted)
    for norms, layer in zip(boundary_norms(net, x), net.preactivations(x)):
        assert norms.shape == layer.shape and bool(norms.isfinite().all())
    found = crossings(net, x, x.flip(0))

    def region(points: Tensor) -> Tensor:
        return combine_hashes([hash_signs(z, layer=i) for i, z in enumerate(net.preactivations(points))])

    rows = found.segment == 0
    ends = torch.cat([found.t[rows], torch.ones(1, dtype=torch.float64)])
    middle = ((ends[1:] + ends[:-1]) / 2).unsqueeze(1)
    assert found.hash[rows].equal(region(x[0] + middle * (x[4] - x[0]))) and set(found.layer.tolist()) == {0, 1, 2}
    assert local_complexity(net, x, 0.1, 10).shape == (5, 3)


@torch.no_grad()
def test_boundary_norms_of_operators_are_those_of_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = as_net(convolutional(), input_shape=(2, 7, 7)), draw(3, 98)
    matrices = boundary_norms(net, x)
    monkeypatch.setattr(nets, "_DENSE", 0)
    for ours, wanted in zip(boundary_norms(net, x), matrices):
        torch.testing.assert_close(ours, wanted)


@torch.no_grad()
def test_batch_norms_of_vectors_and_residual_images() -> None:
    norm = nn.BatchNorm1d(5).double()
    norm(3 * draw(40, 5) + 1)
    norm.eval()
    x = draw(4, 5)
    torch.testing.assert_close(as_net(norm)(x), norm(x))
    torch.testing.assert_close(as_net([norm, linear(draw(3, 5)), nn.ReLU()])(x), (norm(x) @ draw(3, 5).T).relu())
    conv, pool = nn.Conv2d(2, 2, 3, padding=1).double(), nn.AdaptiveAvgPool2d(1)
    both = as_net([conv, as_net([conv, nn.ReLU()], residual=True, input_shape=(2, 4, 4)), pool, nn.Flatten()], input_shape=(2, 4, 4))
    image = draw(3, 2, 4, 4)
    wanted = pool(conv(image) + conv(conv(image)).relu()).flatten(1)
    torch.testing.assert_close(both(image.flatten(1)), wanted)


def test_what_images_are_refused() -> None:
    conv, image = nn.Conv2d(1, 2, 3), (1, 5, 5)
    for module, shape, message in (
        (conv, None, r"input_shape must be given, \[C, H, W\]"),
        (conv, (2, 5, 5), r"a layer does not fit its input of shape \[2, 5, 5\]"),
        ([conv, nn.Linear(18, 2)], image, r"Affine must follow Flatten, got images of shape \[2, 3, 3\]"),
        ([conv, nn.Softmax(-1)], image, "Activation must follow Flatten"),
        ([conv, nn.LayerNorm(3)], image, "Norm must follow Flatten"),
        ([conv, nn.BatchNorm2d(2)], image, "BatchNorm2d must be in evaluation mode"),
        ([conv, nn.BatchNorm2d(2, track_running_stats=False).eval()], image, "BatchNorm2d must be in evaluation mode"),
        (nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), image, "Conv2d must pad with zeros, got padding_mode='reflect'"),
        (nn.Flatten(2), image, "Flatten must be of all but the batch"),
        (nn.MaxPool2d(2), image, "MaxPool2d is not supported"),
        ([conv, nn.Flatten(), nn.Linear(17, 2)], image, "a layer for inputs of width 17 follows one of width 18"),
    ):
        with pytest.raises(ValueError, match=rf"^as_net: {message}"):
            as_net(module, input_shape=shape)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^as_net: input_shape must be at least 1"):
        as_net(conv, input_shape=(0, 5, 5))


# ---------------------------------------------------------------- names of layers


def test_trace_points_are_what_a_trace_can_name() -> None:
    model = gated_model(D, H)
    points = trace_points(model)
    assert points == {"0.0.mlp.act_fn": "SiLU", "0.1.mlp.act_fn": "SiLU"}
    with trace(model, list(points)) as traced:
        model[0][0](draw(2, D))  # pyright: ignore[reportIndexIssue]
        traced.pop()
    assert trace_points(nn.Linear(3, 4)) == {}
    with pytest.raises(TypeError, match=r"^trace_points: model must be a torch.nn.Module, got int"):
        trace_points(3)  # pyright: ignore[reportArgumentType]
    # The names of a layer that a model has often are told once, as the pattern for all of them.
    with pytest.raises(ValueError, match=r"^trace: '\*.attention' matches nothing; it could match: \*\.\*\.mlp\.act_fn \(2 layers\);"):
        trace(model, "*.attention")
