"""Gradients by hand against autograd of the loss: every activation, option and regime; slots and tiles as the optimiser reads them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastsae import SAE, AbsTopK, AuxK, BatchTopK, Gated, JumpReLU, ReLU, TopK
from fastsae.gradients import Gradient, RowGradient, TiledGradient, accumulate, densify, total
from fastsae.sae import tiles

D, F = 9, 30
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "topk": (TopK(4), {}),
    "topk_signed": (TopK(4, relu=False), {"l1": 0.2}),
    "abstopk": (AbsTopK(4), {"l1": 0.2}),
    "batchtopk": (BatchTopK(3.5), {}),
    "relu": (ReLU(), {"l1": 0.3}),
    "jumprelu": (JumpReLU(0.3), {}),
    "jumprelu_band": (JumpReLU(torch.linspace(-0.2, 1, F), bandwidth=0.7), {"l0": 0.4, "l1": 0.1}),
    "gated": (Gated(torch.linspace(-0.5, 0.3, F), torch.linspace(-0.4, 0.4, F), torch.linspace(-0.3, 0.6, F)), {"l1": 0.2}),
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fvu": {"objective": "fvu"},
    "matryoshka": {"prefixes": [5, 6, 17, F]},
    "tied": {"tied": True},
    "transcoder": {"d_out": 5},
    "skip": {"d_out": 5, "skip": True, "prefixes": [11, F]},
    "target": {"d_out": D, "tied": True},
}
AUX = {
    "none": None,
    "few": AuxK(5),
    "many": AuxK(25),
    "dictionary_learning": AuxK.dictionary_learning(),
    "saelens": AuxK.saelens(6),
    "sparsify": AuxK.sparsify(6),
    "bias": AuxK(6, relu=False, bias=True),
}
each = pytest.mark.parametrize("kind", KINDS)
# Sums in another order: differences of the size of float64's rounding times the sums' length; float32 accordingly.
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-11}


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def build(kind: str, dtype: torch.dtype = torch.float64, seed: int = 1, **options: Any) -> SAE:
    activation, terms = KINDS[kind]
    sae = SAE(D, F, activation, seed=seed, dtype=dtype, dead_after=100, **{**terms, **options})
    with torch.no_grad():  # nothing at a special place: rows of any norm, biases, a skip, some dead features
        for number, parameter in enumerate(sae.parameters()):
            parameter.add_(rows(*parameter.shape, seed=number, dtype=dtype), alpha=0.2)
        sae.silent[torch.arange(F) % 3 == 0] = 150
    return sae


def fitting(kind: str, aux: AuxK | None) -> AuxK | None:
    """The term as far as the activation takes it."""
    return None if aux is None or kind == "gated" else replace(aux, relu=aux.relu and kind != "abstopk")


def inputs(sae: SAE, n: int = 13, seed: int = 5) -> dict[str, Any]:
    dtype = sae.W_dec.dtype
    target = rows(n, sae.d_out, seed=seed + 1, dtype=dtype) if sae.transcoder else None
    return {"x": rows(n, D, seed=seed, dtype=dtype), "target": target, "mask": torch.arange(n) % 4 != 1}


def compare(
    sae: SAE, batch: dict[str, Any], tolerance: dict[str, Any] = EXACT, autocast: bool = False, **options: Any
) -> dict[str, Gradient]:
    plain = copy.deepcopy(sae)
    casting = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with casting:
        want = plain.loss(**batch, **options)
    names = [name for name, _ in plain.named_parameters()]
    expected = torch.autograd.grad(want.loss, list(plain.parameters()), allow_unused=True)
    with casting:
        metrics, got = sae.step_gradients(**batch, **options)
    assert list(got) == names
    for name, gradient, e in zip(names, got.values(), cast("tuple[Tensor | None, ...]", expected), strict=True):
        g = densify(gradient)
        e = torch.zeros_like(g) if e is None else e
        if autocast:
            g = g.to(e.dtype)  # rows in the dtype of the products
        assert g.dtype is e.dtype
        torch.testing.assert_close(g, e, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
    for name in ("loss", "fvu", "l0"):
        torch.testing.assert_close(getattr(metrics, name), getattr(want, name).detach(), **tolerance)
        assert getattr(metrics, name).shape == ()
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(dict(sae.named_buffers())[name], buffer)
    return got


@each
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("regime", [False, True], ids=["slots", "tiles"])
def test_equal_to_autograd(kind: str, shape: str, regime: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsae.reference.WORKSPACE_ELEMENTS", 100)  # several tiles
    sae = build(kind, dense=regime, **SHAPES[shape])
    got = compare(sae, inputs(sae))
    if isinstance(sae.activation, (ReLU, JumpReLU, Gated)) and regime:
        assert isinstance(got["W_dec"], TiledGradient)
    elif not sae.l1:
        assert isinstance(got["W_dec"], RowGradient)
    assert all(isinstance(got[name], Tensor) for name in got if name not in ("W_enc", "W_dec"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gated"])
@pytest.mark.parametrize("aux", AUX)
@pytest.mark.parametrize("regime", [False, True], ids=["slots", "tiles"])
def test_dead_features_reconstruct_the_error(kind: str, aux: str, regime: bool) -> None:
    cases: dict[str, dict[str, Any]] = {"few": {"prefixes": [12, F]}, "many": {"tied": True}, "saelens": {"d_out": 4}}
    options = cases.get(aux, {})
    sae = build(kind, dense=regime, aux=fitting(kind, AUX[aux]), **options)
    dead = sae.dead_features.clone()
    assert int(dead.sum()) == 10
    with torch.no_grad():  # stay asleep
        if isinstance(sae.activation, JumpReLU):
            sae.threshold[dead] = 9.0
        elif isinstance(sae.activation, ReLU):
            sae.b_enc[dead] = -9.0
    batch = inputs(sae)
    again = copy.deepcopy(sae)
    without = copy.deepcopy(sae).loss(**batch, aux=False).loss
    compare(sae, batch)
    if again.aux is None:
        return
    loss = again.loss(**batch).loss
    if not isinstance(sae.activation, (ReLU, JumpReLU)):
        dead = again.dead_features  # some woke up
    if isinstance(sae.activation, ReLU) and again.aux.relu:
        return  # what sleeps has no positive score to reconstruct with
    assert not torch.equal(loss, without)  # the term is there, and pulls at encoder and decoder rows of dead features
    assert bool(dead.any())
    for weight in (again.W_enc, again.W_dec):
        gradient = torch.autograd.grad(loss, weight, retain_graph=True)[0]
        assert bool((gradient[dead] != 0).any())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gated"])
@pytest.mark.parametrize("aux", AUX)
@pytest.mark.parametrize("asleep", [10, 0])
def test_a_captured_step_ranks_the_dead_features_without_waiting(kind: str, aux: str, asleep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs while a CUDA graph is captured, here on the CPU: the bits of the step that knows the list."""
    steps = []
    for captured in (False, True):
        monkeypatch.setattr("fastsae._core.flags.capturing", lambda device, captured=captured: captured)
        sae = build(kind, dense=False, aux=fitting(kind, AUX[aux]), prefixes=[12, F], dtype=torch.float32)
        if not asleep:
            sae.silent.zero_()
        metrics, gradients = sae.step_gradients(**inputs(sae))
        steps.append([*metrics, *map(densify, gradients.values())])
    for a, b in zip(*steps, strict=True):
        assert a.dtype is b.dtype and torch.equal(a, b)
    sae = build(kind, dense=False, aux=fitting(kind, AUX[aux]))
    compare(sae, inputs(sae))  # autograd's way, too


@pytest.mark.parametrize("kind", ["topk", "abstopk"])
def test_the_auxiliary_loss_in_words(kind: str) -> None:
    sae = build(kind, l1=0.0)
    aux = AuxK(25, coefficient=0.5, relu=kind == "topk")
    x = inputs(sae)["x"]
    fires = torch.zeros(F, dtype=torch.bool)
    latents = sae.encode(x)
    fires[latents.indices[latents.values != 0]] = True  # pyright: ignore[reportAttributeAccessIssue]
    dead = (torch.arange(F) % 3 == 0) & ~fires  # silent before, and not woken by this batch
    n_dead = int(dead.sum())
    e = (x - sae.decode(latents)).detach()
    z = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)[:, dead]  # fewer dead than 25: all of them
    z = z.relu() if aux.relu else z
    e_hat = z @ sae.W_dec[dead]
    want = n_dead / 25 * (e - e_hat).square().sum() / (e - e.mean(0)).square().sum()
    difference = copy.deepcopy(sae).loss(x, aux=aux).loss - copy.deepcopy(sae).loss(x).loss
    torch.testing.assert_close(difference, 0.5 * want, **EXACT)
    metrics, _ = sae.step_gradients(x, aux=aux)
    torch.testing.assert_close(metrics.aux, want.detach(), **EXACT)
    assert int(metrics.dead) == n_dead


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("regime", [False, True], ids=["slots", "tiles"])
def test_other_dtypes(kind: str, dtype: torch.dtype, regime: bool) -> None:
    sae = build(kind, dtype=dtype, dense=regime)
    # Relative to sums of about 13 x 9 terms near 1; bfloat16 rounds latents and their gradients (2^-9) at each of three products.
    compare(sae, inputs(sae), {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.03})


@pytest.mark.parametrize("kind", ["relu", "jumprelu_band", "gated"])
def test_both_regimes_agree(kind: str) -> None:
    slots, tiled = (build(kind, dense=regime, prefixes=[13, F]) for regime in (False, True))
    a, b = slots.step_gradients(**inputs(slots)), tiled.step_gradients(**inputs(tiled))
    for name, x, y in zip(a[0]._fields, a[0], b[0], strict=True):
        torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name}: {text}", **EXACT)
    for name in a[1]:
        torch.testing.assert_close(densify(a[1][name]), densify(b[1][name]), **EXACT)
    assert torch.equal(slots.silent, tiled.silent)


@pytest.mark.parametrize("kind", ["relu", "jumprelu_band", "gated"])
def test_the_regime_is_chosen_by_measured_density(kind: str) -> None:
    sae = build(kind, l1=0.0)
    x = inputs(sae)["x"]
    assert isinstance(sae.step_gradients(x)[1]["W_dec"], TiledGradient)  # about half of the features fire
    with torch.no_grad():
        (sae.b_gate if kind == "gated" else sae.b_enc).sub_(3)
        density = float((sae.encode(x).to_dense() != 0).double().mean())
    assert density < tiles.DENSITY
    assert isinstance(sae.step_gradients(x)[1]["W_dec"], RowGradient)
    assert 0 <= tiles.measured_density(x, sae.step_inputs("", x).weights) < tiles.DENSITY


@given(
    kind=st.sampled_from(list(KINDS)),
    n=st.integers(0, 9),
    d=st.integers(1, 6),
    f=st.integers(4, 40),
    data=st.data(),
)
def test_drawn(kind: str, n: int, d: int, f: int, data: st.DataObject) -> None:
    activation, terms = KINDS[kind]
    activation = {"jumprelu_band": JumpReLU(0.1, bandwidth=0.4), "gated": Gated()}.get(kind, activation)
    prefixes = data.draw(st.none() | st.sets(st.integers(1, f - 1), max_size=3))
    d_out = data.draw(st.none() | st.integers(1, 5))
    tied = d_out is None and data.draw(st.booleans())
    aux = data.draw(st.none() | st.builds(AuxK, k=st.integers(1, 8), relu=st.booleans(), bias=st.booleans(), share=st.booleans()))
    sae = SAE(
        d,
        f,
        activation,
        prefixes=None if prefixes is None else [*sorted(prefixes), f],
        d_out=d_out,
        skip=d_out is not None,
        tied=tied,
        objective="mse",
        aux=fitting(kind, aux),
        dead_after=2,
        dense=data.draw(st.none() | st.booleans()),
        dtype=torch.float64,
        seed=data.draw(st.integers(0, 99)),
        **terms,
    )
    sae.silent += torch.arange(f) % 3
    x = rows(n, d, seed=data.draw(st.integers(0, 99)))
    mask = data.draw(st.none() | st.lists(st.booleans(), min_size=n, max_size=n))
    batch = {
        "x": x,
        "target": None if d_out is None else rows(n, d_out, seed=3),
        "mask": None if mask is None else torch.tensor(mask).bool(),
    }
    compare(sae, batch)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not tensor._is_view():
                Largest.elements = max(Largest.elements, tensor.numel())
        return result


@each
@pytest.mark.parametrize("regime", [False, True], ids=["slots", "tiles"])
def test_no_gradient_matrix_and_no_dense_latents(kind: str, regime: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsae.reference.WORKSPACE_ELEMENTS", 1 << 12)
    activation, terms = KINDS[kind]
    activation = {"jumprelu_band": JumpReLU(3.0, bandwidth=0.2), "gated": Gated(torch.tensor(-3.0))}.get(kind, activation)
    sae = SAE(64, 4096, activation, seed=0, dense=regime, dead_after=1, aux=fitting(kind, AuxK(8)), **terms)
    if kind in ("relu", "jumprelu"):
        with torch.no_grad():
            sae.b_enc.sub_(2.5)
    x = rows(96, 64, dtype=torch.float32)
    Largest.elements = 0
    with Largest():
        _, gradients = sae.step_gradients(x)
        for gradient in gradients.values():
            if isinstance(gradient, TiledGradient):
                for start in range(0, 4096, 64):
                    gradient.compute(slice(start, start + 64))
    # [B, F] and [F, D] have 2^18 or more; vectors 2^12, rows of both kinds 2^13.6, their slots 2^16 at most.
    assert Largest.elements <= 1 << 16


@each
def test_masked_tokens_take_no_part(kind: str) -> None:
    whole, masked = (build(kind, aux=fitting(kind, AuxK(4))) for _ in range(2))
    batch = inputs(whole)
    mask = batch["mask"]
    spoilt = torch.where(mask.unsqueeze(-1), batch["x"], float("nan"))
    kept, got = whole.step_gradients(batch["x"][mask]), masked.step_gradients(spoilt, mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(kept[0], got[0], strict=True))
    for name in kept[1]:
        assert torch.equal(densify(kept[1][name]), densify(got[1][name]))
    for a, b in zip(whole.buffers(), masked.buffers(), strict=True):
        assert torch.equal(a, b)


@each
def test_under_autocast(kind: str) -> None:
    sae = build(kind, dtype=torch.float32)
    batch = inputs(sae)
    compare(sae, batch, {"rtol": 0.05, "atol": 0.03}, autocast=True)  # as bfloat16 above


@each
def test_nothing_unmasked(kind: str) -> None:
    sae = build(kind)
    compare(sae, {"x": rows(0, D)})
    metrics, gradients = sae.step_gradients(rows(4, D), mask=torch.zeros(4, dtype=torch.bool))
    assert [float(metrics.loss), float(metrics.fvu), float(metrics.l0)] == [0, 0, 0]
    assert all(bool((densify(g) == 0).all()) for g in gradients.values())


@each
def test_the_same_bits_every_time(kind: str) -> None:
    first, second = build(kind), build(kind)
    for (_, a), (_, b) in zip(*(sae.step_gradients(**inputs(sae))[1].items() for sae in (first, second)), strict=True):
        assert torch.equal(densify(a), densify(b))


@each
@pytest.mark.parametrize("regime", [False, True], ids=["slots", "tiles"])
def test_micro_batches_add_up(kind: str, regime: bool) -> None:
    sae = build(kind, dense=regime).eval()  # where BatchTopK does not select over the batch
    x = rows(12, D, seed=8)
    whole = sae.step_gradients(x)[1]
    parts = accumulate([sae.step_gradients(part)[1] for part in x.split(6)], [0.5, 0.5])
    assert list(parts) == list(whole)
    for name in whole:
        torch.testing.assert_close(densify(parts[name]), densify(whole[name]), **EXACT)


def test_micro_batches_of_different_kinds() -> None:
    sae = build("relu")
    x = rows(12, D, seed=8)
    parts = []
    for regime, part in zip((False, True), x.split(6)):
        sae.dense = regime
        parts.append(sae.step_gradients(part, l1=0.0)[1])
    assert isinstance(parts[0]["W_enc"], RowGradient)
    assert isinstance(parts[1]["W_enc"], TiledGradient)
    summed = accumulate(parts)
    for name in summed:
        torch.testing.assert_close(densify(summed[name]), densify(parts[0][name]) + densify(parts[1][name]), **EXACT)


def test_accumulate_of_slots() -> None:
    def slots(n: int, k: int | None, seed: int) -> RowGradient:
        generator = torch.Generator().manual_seed(seed)
        crow = None if k is not None else torch.tensor([0, 3, 3, 7][: n + 1])
        shape = (n, k) if k is not None else (int(crow[-1]),)  # pyright: ignore[reportOptionalSubscript]
        index = torch.randint(0, 6, shape, generator=generator)
        return RowGradient(rows(*shape, seed=seed), index if seed % 2 else index.int(), crow, rows(n, 4, seed=seed + 50), 6)

    for parts in (
        [slots(2, 3, 1), slots(4, 3, 2)],
        [slots(2, 3, 1), slots(3, 5, 2)],
        [slots(3, None, 1), slots(3, None, 3), slots(2, 1, 4)],
    ):
        joined = total(parts)
        assert isinstance(joined, RowGradient)
        torch.testing.assert_close(densify(joined), sum(densify(part) for part in parts), **EXACT)
    first = slots(2, 3, 1)
    beside = RowGradient(rows(2, 2), torch.tensor([[0, 1], [5, 5]]), None, first.rows, 6)
    joined = total([first, beside])
    assert isinstance(joined, RowGradient)
    assert joined.rows is first.rows
    assert list(joined.values.shape) == [2, 5]
    torch.testing.assert_close(densify(joined), densify(first) + densify(beside), **EXACT)
    mixed = total([first, rows(6, 4), TiledGradient(lambda part: rows(6, 4, seed=9)[part], 6)])
    assert isinstance(mixed, TiledGradient)
    want = densify(first) + rows(6, 4) + rows(6, 4, seed=9)
    for size in (1, 4, 6):
        got = torch.cat([mixed.compute(slice(start, min(start + size, 6))) for start in range(0, 6, size)])
        torch.testing.assert_close(got, want, **EXACT)


def test_accumulate_arguments() -> None:
    a = {"b": rows(3)}
    with pytest.raises(ValueError, match="steps must hold gradients of the same parameters"):
        accumulate([])
    with pytest.raises(ValueError, match=r"same parameters, got \[\['b'\], \['c'\]\]"):
        accumulate([a, {"c": rows(3)}])
    with pytest.raises(ValueError, match="weights must be 1 numbers, one a step, got 2"):
        accumulate([a], [1.0, 2.0])


@pytest.mark.parametrize("kind", ["relu", "jumprelu_band", "gated"])
@pytest.mark.parametrize("order", ["lock step", "encoder first", "decoder first", "a norm first"])
def test_tiles_are_taken_while_weights_change(kind: str, order: str) -> None:
    """An optimiser changes the rows that it has a gradient for before it asks for the next ones, or for the other weight's."""
    sae = build(kind, dense=True, prefixes=[13, F])
    batch = inputs(sae)
    want = {name: densify(g) for name, g in copy.deepcopy(sae).step_gradients(**batch)[1].items()}
    _, got = sae.step_gradients(**batch)
    weights = {"W_enc": sae.W_enc.data, "W_dec": sae.W_dec.data}
    sizes = {"W_enc": 7, "W_dec": 7 if order == "lock step" else 11}
    parts = {name: [slice(s, min(s + size, F)) for s in range(0, F, size)] for name, size in sizes.items()}
    names = ["W_dec", "W_enc"] if order == "decoder first" else ["W_enc", "W_dec"]
    if order == "lock step":
        asked = [(name, part) for part in parts["W_enc"] for name in names]
    else:
        asked = [(name, part) for name in names for part in parts[name]]
    if order == "a norm first":
        for name, part in asked:
            got[name].compute(part)  # pyright: ignore[reportAttributeAccessIssue]
    for name in want:
        if name not in weights:
            dict(sae.named_parameters())[name].data.add_(1)
    for name, part in asked:
        torch.testing.assert_close(got[name].compute(part), want[name][part], **EXACT)  # pyright: ignore[reportAttributeAccessIssue]
        weights[name][part].add_(1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "gated"])
def test_tiles_keep_nan_with_zero_gradient(kind: str) -> None:
    sae = build(kind, l1=0.0)
    with torch.no_grad():
        sae.W_enc[3] = float("nan")
    x = inputs(sae)["x"]
    made = tiles.TilePass(x, sae.step_inputs("", x).weights, False)
    nan, rest = torch.arange(F) == 3, torch.arange(F) != 3
    assert bool(made.run.x_hats.isnan().all()) == (kind != "gated")  # a gate that is NaN is shut
    assert bool(made.run.fired[nan]) == (kind != "gated")
    for vector in made.begin(torch.ones_like(made.run.x_hats), torch.ones_like(x), 0.0, 0.0).values():
        if vector.shape == (F,):
            assert bool((vector[nan] == 0).all() if kind != "gated" else vector[rest].isfinite().all())
            assert bool(vector[rest].isfinite().all())


def test_running_threshold_and_silence() -> None:
    sae = build("batchtopk", dtype=torch.float32)
    x = rows(12, D, dtype=torch.float32)
    assert float(sae.running_threshold) == -1
    first = float(sae.step_inputs("", x).encode(x).min_kept)  # pyright: ignore[reportArgumentType]
    sae.step_gradients(x)
    assert float(sae.running_threshold) == pytest.approx(first)
    second = float(sae.step_inputs("", x).encode(2 * x).min_kept)  # pyright: ignore[reportArgumentType]
    sae.loss(2 * x)
    assert float(sae.running_threshold) == pytest.approx(first + 0.01 * (second - first))
    sae.step_gradients(torch.full_like(x, -1e9) * 0 + sae.b_dec.detach(), mask=torch.zeros(12).bool())  # nothing kept: +inf, not learnt
    assert float(sae.running_threshold) == pytest.approx(first + 0.01 * (second - first))
    before = copy.deepcopy(sae.state_dict())
    sae.eval()
    sae.loss(x)
    compare(sae, {"x": x}, {"rtol": 1e-4, "atol": 1e-5})  # float32, as in test_other_dtypes
    assert all(torch.equal(a, b) for a, b in zip(before.values(), sae.state_dict().values(), strict=True))
    z = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    torch.testing.assert_close(sae.encode(x).to_dense(), z * (z > sae.running_threshold))

    sae = SAE(2, 3, ReLU(), dead_after=5)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0]]))
    for tokens, expected in (([[1, 0], [2, 0]], [0, 2, 2]), ([[-1, 0]] * 3, [3, 5, 0]), ([[0, 1]], [4, 0, 1])):
        metrics, _ = sae.step_gradients(torch.tensor(tokens, dtype=torch.float32))
        assert sae.silent.tolist() == expected
        assert int(metrics.dead) == int((sae.silent >= 5).sum())
