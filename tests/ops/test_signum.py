"""``optim.Signum``: the method against its published formulas, every form of a gradient, layouts and threads, state, errors."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from levels import codes
from torch import Tensor, nn

import fastsae
from fastsae._core import triton_support
from fastsae.dispatch import OPS, use_backend
from fastsae.native import decode as native_decode
from fastsae.native import loader
from fastsae.ops import signum
from fastsae.optim import RowGradient, Signum, warmup_linear_decay

LEVELS = codes()
needs_native = pytest.mark.skipif(not LEVELS, reason=f"no C++ kernels: {loader.unavailable()}")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit(W: Tensor) -> Tensor:
    return W / torch.linalg.vector_norm(W, dim=-1, keepdim=True)


def sae(seed: int = 0) -> fastsae.SAE:
    made = fastsae.SAE(12, 48, fastsae.TopK(4), seed=seed)
    with torch.no_grad():
        made.W_dec.copy_(unit(normal(48, 12, seed=seed)))
    return made


def slots(features: int, width: int, rows: int = 60, k: int = 5) -> RowGradient:
    indices = torch.randint(0, features - 2, (rows, k), generator=torch.Generator().manual_seed(1))
    return RowGradient(normal(rows, k), indices, None, normal(rows, width, seed=2), features)


@pytest.mark.parametrize("backend", ["reference", "*"])
@pytest.mark.parametrize("momentum", [0.95, 0.5, 1.0])
def test_the_average_is_what_the_formulas_say(backend: str, momentum: float) -> None:
    """z by signs, x the mean of z weighted by the square of the largest rate, y between them; in float64, from the x that nobody stores."""
    p = nn.Parameter(normal(7, 5).double())
    opt = Signum([("p", p)], lr=1e-2, momentum=momentum, schedule=warmup_linear_decay(3, 100, 100))
    z, x, total = p.detach().clone(), p.detach().clone(), 0.0
    with use_backend(backend):
        for step in range(12):
            g = normal(7, 5, seed=10 + step).double()
            g[0] = 0
            opt.apply({"p": g})
            lr = 1e-2 * min((step + 1) / 3, 1)
            z = z - lr * g.sign()
            total += lr**2
            x = x + lr**2 / total * (z - x)
            torch.testing.assert_close(p.detach(), momentum * x + (1 - momentum) * z, rtol=0, atol=1e-12)
    assert torch.equal(p.detach()[0], normal(7, 5).double()[0])  # no gradient ever: y, x and z stay where they were
    opt.eval()
    torch.testing.assert_close(p.detach(), x, rtol=0, atol=1e-12)
    opt.train()
    torch.testing.assert_close(p.detach(), momentum * x + (1 - momentum) * z, rtol=0, atol=1e-12)


def test_a_step_on_rows_equals_autograd_and_a_plain_gradient() -> None:
    """``step`` (slots, no dense gradient), and backward with ``apply()``: the same signs but where a gradient cancels to its rounding."""
    one, two = sae(), sae()
    fused, plain = Signum(one, lr=1e-3), Signum(two, lr=1e-3)
    x = normal(64, 12, seed=3)
    for _ in range(5):
        fused.step(x)
        two.zero_grad()
        two.loss(x).loss.backward()
        plain.apply()
    for (name, a), b in zip(one.named_parameters(), two.parameters()):
        assert float(((a - b).abs() > 1e-6).double().mean()) < 0.01, name
    torch.testing.assert_close(torch.linalg.vector_norm(one.W_dec, dim=1), torch.ones(48))


def test_it_learns() -> None:
    model, data = sae(), normal(3, 256, 12, seed=4)
    opt = Signum(model, lr=2e-3)
    first = float(opt.step(data[0]).fvu)
    for step in range(150):
        opt.step(data[step % 3])
    opt.eval()
    assert float(model.loss(data[0]).fvu) < 0.6 * first


def test_stacks_and_rates_of_members() -> None:
    """A member moves as it would alone, whatever its rate."""
    x, rates = normal(32, 12, seed=5), [1e-3, 4e-3]
    singles = [sae(seed) for seed in (1, 2)]
    stack = fastsae.SAEs([sae(seed) for seed in (1, 2)])
    together = Signum(stack, lr=rates)
    alone = [Signum(model, lr=lr) for model, lr in zip(singles, rates)]
    for _ in range(3):
        together.step(x)
        for opt in alone:
            opt.step(x)
    for e, model in enumerate(singles):
        assert torch.equal(stack.W_dec[e], model.W_dec) and torch.equal(stack.W_enc[e], model.W_enc)


@needs_native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("unit_rows", [False, True])
def test_bits_depend_neither_on_layout_nor_on_threads_nor_on_the_form_of_the_gradient(level: str, unit_rows: bool) -> None:
    features, width = 2100, 70
    gradient = slots(features, width, 1200, 8)
    matrix = torch.empty(features, width)
    before, results = torch.get_num_threads(), []
    views: tuple[Callable[[Tensor], Tensor], ...] = (lambda t: t.clone(), lambda t: t.T.contiguous().T)
    with loader.use_isa(level):
        native_decode.decode_dweight(gradient.values, gradient.indices, None, gradient.rows, matrix)
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                for view in views:
                    for parts in (
                        (gradient.rows, gradient.values, gradient.indices, None),
                        (view(matrix), None, None, None),
                        (matrix, None, None, None),
                    ):
                        y, z = view(unit(normal(features, width))), view(normal(features, width, seed=1))
                        OPS["signum"](y, z, *parts, 1e-3, 0.95, 0.3, unit_rows, unit_rows, backend="cpu")
                        results.append((y, z))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@needs_native
def test_without_projection_the_kernel_has_the_bits_of_torch() -> None:
    """Elementwise operations of torch, each with one fused multiply-add: signs of a given gradient leave nothing to rounding."""
    g = normal(33, 21, seed=6)
    g[3, :4] = torch.tensor([0.0, -0.0, torch.nan, 1e-45])
    for number, (momentum, share) in enumerate([(0.95, 1.0), (0.95, 0.3), (0.6, 0.51), (1.0, 0.0)]):
        results = []
        for backend in ("reference", "cpu"):
            y, z = normal(33, 21, seed=7 + number), normal(33, 21, seed=20)
            OPS["signum"](y, z, g, None, None, None, 1e-2, momentum, share, False, False, backend=backend)
            results.append((y, z))
        if LEVELS[-1] != "portable":  # whose multiply-adds round twice
            assert all(torch.equal(a, b) for a, b in zip(*results))
        else:
            torch.testing.assert_close(*results)


def test_refusals_of_the_triton_row() -> None:
    rest = (normal(4, 3), None, None, None, 1e-3, 0.9, 0.1, False, False)
    wide = torch.empty(4, 8193)
    assert signum.triton_refuses(normal(3, 4).T, normal(4, 3), *rest) == "y is not contiguous (supported: row-major weights and moments)"
    assert signum.triton_refuses(normal(4, 3), normal(3, 4).T, *rest) == "z is not contiguous (supported: row-major weights and moments)"
    assert signum.triton_refuses(wide, wide, *rest) == "rows of 8193 (supported: at most 8192)"
    assert "device cpu" in str(signum.triton_refuses(normal(4, 3), normal(4, 3), *rest)) or triton_support.interpreting()


@given(seed=st.integers(0, 2**31 - 1), rows=st.sampled_from([0, 1, 17, 40]), width=st.sampled_from([1, 15, 16, 33]), project=st.booleans())
def test_drawn(seed: int, rows: int, width: int, project: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = int(torch.randint(3, 70, (), generator=generator))
    y, z = unit(torch.randn((features, width), generator=generator)), torch.randn((features, width), generator=generator)
    indices = torch.randint(0, features, (rows, 3), generator=generator)
    gradient = (torch.randn((rows, width), generator=generator), torch.randn((rows, 3), generator=generator), indices, None)
    args = (y, z, *gradient, 1e-2, 0.9, 0.2, project, project)
    for backend in ("reference", "*"):
        new = (y.clone(), z.clone())
        OPS["signum"](*new, *args[2:], backend=backend)
        OPS["signum"].check(args, new)


def test_state_gives_the_bits_of_the_uninterrupted_run() -> None:
    xs = [normal(32, 12, seed=step) for step in range(6)]
    one, two, three = sae(), sae(), sae(1)
    whole, first, second = Signum(one, lr=3e-3), Signum(two, lr=3e-3), Signum(three)
    for x in xs:
        whole.step(x)
    for x in xs[:3]:
        first.step(x)
    model, state = pickle.loads(pickle.dumps((two.state_dict(), first.state_dict())))
    three.load_state_dict(model)
    second.load_state_dict(state)
    for x in xs[3:]:
        second.step(x)
    assert second.lr == 3e-3 and second.steps == 6
    for optimiser in (whole, second):
        optimiser.eval()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), three.state_dict().values()))


def test_a_first_step_without_a_rate_and_frozen_parameters() -> None:
    p, q = nn.Parameter(normal(3, 4)), nn.Parameter(normal(2), requires_grad=False)
    opt = Signum([("p", p), ("q", q)], lr=0.0)
    opt.apply({"p": normal(3, 4, seed=1), "q": normal(2)})
    assert torch.equal(p.detach(), normal(3, 4)) and torch.equal(q.detach(), normal(2))
    opt.lr = 1e-2
    opt.apply({"p": normal(3, 4, seed=1), "q": None})
    torch.testing.assert_close(p.detach(), normal(3, 4) - 1e-2 * normal(3, 4, seed=1).sign())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "optim.Signum: lr must be at least 0, got -1.0"),
        ({"lr": [1e-3, 1e-3]}, ValueError, "optim.Signum: lr must be a number, or one for each of 1 dictionaries, got 2"),
        ({"momentum": 0.0}, ValueError, "optim.Signum: momentum must be above 0 and at most 1, got 0.0"),
        ({"momentum": 1.5}, ValueError, "optim.Signum: momentum must be above 0 and at most 1, got 1.5"),
        ({"momentum": "high"}, TypeError, "optim.Signum: momentum must be a number, got str"),
        ({"schedule": 0.5}, TypeError, "optim.Signum: schedule must be callable, got float"),
        ({"unit_rows": ["V"]}, ValueError, r"optim.Signum: unit_rows must name matrices among \['W'\], got 'V'"),
    ],
)
def test_wrong_construction(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        Signum([("W", normal(2, 2))], **options)


def test_wrong_use() -> None:
    opt = Signum([("W", normal(4, 3))])
    with pytest.raises(ValueError, match=r"^Signum\.apply: unknown parameter 'V'; known: W"):
        opt.apply({"V": normal(4, 3)})
    with pytest.raises(ValueError, match=r"^Signum.apply: gradient of W must have shape \[4, 3\]"):
        opt.apply({"W": normal(3, 4)})
    with pytest.raises(TypeError, match=r"^Signum\.step: needs a module with step_gradients, got NoneType; use Signum.apply"):
        opt.step(normal(4, 3))
    with pytest.raises(ValueError, match=r"not a state of fastsae\.optim\.Signum: 'momentum' is missing"):
        opt.load_state_dict(fastsae.optim.Adam([("W", normal(4, 3))]).state_dict())
    opt.eval()
    with pytest.raises(RuntimeError, match=r"call train\(\) before the next step"):
        opt.apply({"W": normal(4, 3)})
