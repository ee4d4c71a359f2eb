"""``fastsae.optim``: every form of gradient, conversion to torch and back, state, errors."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsae
from fastsae.dispatch import OPS
from fastsae.optim import Adam, RowGradient, Signum, TiledGradient, warmup_linear_decay

B, D, F, K = 32, 20, 50, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit(W: Tensor) -> Tensor:
    return W / torch.linalg.vector_norm(W, dim=1, keepdim=True)


class Stub(nn.Module):
    """A top-k autoencoder whose gradients are written out: what a module must offer for ``Adam.step``."""

    unit_rows = ("W_dec",)

    def __init__(self) -> None:
        super().__init__()
        self.W_enc, self.W_dec = nn.Parameter(unit(normal(F, D))), nn.Parameter(unit(normal(F, D)))
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(F)), nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> tuple[fastsae.TopKLatents, Tensor]:
        latents = fastsae.encode_topk(x, self.W_enc, self.b_enc, k=K, relu=False)
        return latents, fastsae.decode(latents, self.W_dec, self.b_dec)

    def loss(self, x: Tensor) -> Tensor:
        return (self(x)[1] - x).square().sum() / x.shape[0]

    @torch.no_grad()
    def step_gradients(
        self, x: Tensor, *, target: Tensor | None = None, mask: Tensor | None = None, weight: float = 1.0
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        latents, x_hat = self(x)
        error = x_hat - (x if target is None else target)
        grad = 2 * weight / x.shape[0] * error
        dvalues = fastsae.ops.decode.decode_backward(grad, latents, self.W_dec).values
        gradients = {
            "W_enc": RowGradient(dvalues, latents.indices, None, x, F),
            "W_dec": RowGradient(latents.values, latents.indices, None, grad, F),
            "b_enc": torch.zeros(F).index_add_(0, latents.indices.flatten(), dvalues.flatten()),
            "b_dec": grad.sum(0),
        }
        return {"loss": weight * error.square().sum() / x.shape[0]}, gradients


def bits(opt: Adam) -> list[Tensor]:
    states = opt.state_dict()["state"]
    return [p.detach().clone() for p in opt.parameters.values()] + [
        s[key].clone() for s in states.values() for key in ("exp_avg", "exp_avg_sq")
    ]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def torch_step(stub: Stub, theirs: torch.optim.Optimizer, x: Tensor, clip: float | None) -> Tensor:
    """The same step with autograd, clip_grad_norm_ and hand-written unit rows."""
    theirs.zero_grad()
    loss = stub.loss(x)
    loss.backward()
    with torch.no_grad():
        grad = stub.W_dec.grad
        assert grad is not None
        grad -= (grad * stub.W_dec).sum(1, keepdim=True) * stub.W_dec
        if clip is not None:
            nn.utils.clip_grad_norm_(stub.parameters(), clip)
        theirs.step()
        stub.W_dec.copy_(unit(stub.W_dec))
    return loss.detach()


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_a_run_equals_autograd_with_torch_adam(clip: float | None, decay: float) -> None:
    ours, other = Stub(), Stub()
    schedule = warmup_linear_decay(2, 5, 12)
    opt = Adam(ours, lr=1e-2, weight_decay=decay, clip=clip, schedule=schedule)
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(theirs, schedule)
    for step in range(10):
        x = normal(B, D, seed=step)
        metrics = opt.step(x)
        loss = torch_step(other, theirs, x, clip)
        scheduler.step()
        torch.testing.assert_close(metrics["loss"], loss, rtol=1e-5, atol=0)
        for name, p in ours.named_parameters():
            difference = (p - other.get_parameter(name)).abs().max()
            assert difference <= 0.1 * 1e-2, name  # what is left of an ill-conditioned m / sqrt(v)
            assert difference <= 2e-5, name  # in practice, with selections that did not flip
    assert opt.steps == 10
    torch.testing.assert_close(torch.linalg.vector_norm(ours.W_dec, dim=1), torch.ones(F), rtol=2e-6, atol=0)


KINDS: dict[str, dict[str, Any]] = {
    "topk": {"activation": fastsae.TopK(4), "aux": fastsae.AuxK(8), "dead_after": 500},
    "batchtopk": {"activation": fastsae.BatchTopK(3.0), "prefixes": [8, 32]},
    "jumprelu": {"activation": fastsae.JumpReLU(0.1, bandwidth=0.2), "l0": 0.01},
    "relu": {"activation": fastsae.ReLU(), "l1": 0.02},
    "gated": {"activation": fastsae.Gated(), "l1": 0.02},
}


def batch(step: int, n: int = 64) -> Tensor:
    """Sparse combinations of 24 directions in 12 dimensions."""
    generator = torch.Generator().manual_seed(step)
    code = torch.rand(n, 24, generator=generator) * (torch.rand(n, 24, generator=generator) < 0.15)
    return code @ unit(normal(24, 12))


def autograd_step(sae: fastsae.SAE, theirs: torch.optim.Optimizer, loss: Tensor) -> None:
    theirs.zero_grad()
    loss.backward()
    sae.remove_parallel_gradient_()
    theirs.step()
    sae.normalise_decoder_()


def furthest(a: nn.Module, b: nn.Module) -> float:
    return max(float((p - b.get_parameter(name)).detach().abs().max()) for name, p in a.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_training_equals_autograd_with_torch_adam(kind: str) -> None:
    """After 1 and 10 steps from one state, and in what 200 free steps reach (selections flip, then runs drift apart)."""
    lr = 3e-3
    ours, other = (fastsae.SAE(12, 32, **KINDS[kind], seed=0).init_from(batch(1000, 512)) for _ in range(2))
    opt, theirs = Adam(ours, lr=lr), torch.optim.Adam(other.parameters(), lr=lr)
    losses = torch.zeros(200, 2)
    for step in range(200):
        x = batch(step)
        loss = other.loss(x).loss
        losses[step] = torch.stack([opt.step(x).loss, loss.detach()])
        autograd_step(other, theirs, loss)
        if step in (0, 9):
            assert furthest(ours, other) <= 0.1 * lr
    reached = losses[-20:].mean(0)
    assert abs(float(reached[0] / reached[1]) - 1) <= 0.01
    assert float(reached[0]) < 0.7 * float(losses[0, 0])  # it has learnt something


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "relu"])
def test_200_steps_with_replayed_selections_equal_plain_torch(kind: str) -> None:
    """Plain torch on dense latents that keep what our run has kept: then only rounding is left."""
    lr = 3e-3
    options = {"activation": KINDS[kind]["activation"]}
    ours, other = (fastsae.SAE(12, 32, **options, seed=0).init_from(batch(1000, 512)) for _ in range(2))
    opt, theirs = Adam(ours, lr=lr), torch.optim.Adam(other.parameters(), lr=lr)
    for step in range(200):
        x = batch(step)
        with torch.no_grad():
            kept = ours.encode(x).to_dense() != 0
        opt.step(x)
        latents = torch.where(kept, (x - other.b_dec) @ other.W_enc.T + other.b_enc, 0)
        autograd_step(other, theirs, (latents @ other.W_dec + other.b_dec - x).square().sum(1).mean())
    assert furthest(ours, other) <= 0.1 * lr


def test_clipping_reports_the_norm_before_it() -> None:
    stub, other = Stub(), Stub()
    opt = Adam(stub, clip=1e-3)
    opt.step(normal(B, D))
    other.loss(normal(B, D)).backward()
    grad = other.W_dec.grad
    assert grad is not None
    grad -= (grad * other.W_dec.detach()).sum(1, keepdim=True) * other.W_dec.detach()
    norm = nn.utils.clip_grad_norm_(other.parameters(), 1e-3)
    assert opt.grad_norm is not None
    torch.testing.assert_close(opt.grad_norm, norm, rtol=1e-5, atol=0)
    opt.clip = None
    opt.step(normal(B, D))
    assert opt.grad_norm is None


def test_forms_of_a_gradient_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense, by slots, by tiles (of few rows): the same bits, since a row is a row."""
    monkeypatch.setattr("fastsae.optim.jobs.TILE", 7 * D)
    _, gradients = Stub().step_gradients(normal(B, D))
    of_rows: RowGradient = gradients["W_dec"]
    matrix = torch.empty(F, D)
    OPS["decode_dweight"](of_rows.values, of_rows.indices, None, of_rows.rows, matrix)
    asked: list[slice] = []

    def compute(part: slice) -> Tensor:
        asked.append(part)
        return matrix[part]

    results = []
    for given in (of_rows, matrix, TiledGradient(compute, F)):
        stub = Stub()
        opt = Adam(stub, clip=0.1, unit_rows=())
        opt.apply({"W_dec": given})
        results.append(bits(opt))
    assert [part.start for part in asked] == 2 * list(range(0, F, 7)), "every range once for the norm and once for the step"
    # The norm is a sum of other parts: the last bit of the factor may differ, and with it those of the step.
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    plain = []
    for given in (of_rows, matrix, TiledGradient(lambda part: matrix[part], F)):
        opt = Adam(Stub())
        opt.apply({"W_dec": given})
        plain.append(bits(opt))
    assert same(plain[0], plain[1])
    assert same(plain[0], plain[2])


def test_the_grad_attributes_serve_too() -> None:
    ours, other = Stub(), Stub()
    opt, theirs = Adam(ours, unit_rows=()), torch.optim.Adam(other.parameters())
    for step in range(3):
        for stub in (ours, other):
            stub.zero_grad()
            stub.loss(normal(B, D, seed=step)).backward()
        opt.apply()
        theirs.step()
    for name, p in ours.named_parameters():
        assert (p - other.get_parameter(name)).abs().max() <= 1e-5


def test_vectors_numbers_and_stacks_of_matrices() -> None:
    shapes = [(), (1,), (5,), (2, 3, 4), (3, 0), (2, 3, 0)]
    ours = [(str(shape), nn.Parameter(normal(*shape))) for shape in shapes]
    other = [nn.Parameter(p.detach().clone()) for _, p in ours]
    opt, theirs = Adam(ours, lr=0.1), torch.optim.Adam(other, lr=0.1)
    for step in range(3):
        gradients = {name: normal(*p.shape, seed=step) for name, p in ours}
        opt.apply(gradients)
        for p, g in zip(other, gradients.values()):
            p.grad = g
        theirs.step()
    for (_, p), q in zip(ours, other):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_rows_of_a_stack_are_numbered_through() -> None:
    """[E, F, D] is taken as [E * F, D]."""
    p = nn.Parameter(normal(2, 5, 3))
    indices = torch.tensor([[0, 9], [4, 5]])
    gradient = RowGradient(torch.ones(2, 2), indices, None, normal(2, 3, seed=1), 10)
    opt = Adam([("W", p)], unit_rows=["W"])
    opt.apply({"W": gradient})
    torch.testing.assert_close(torch.linalg.vector_norm(p, dim=-1), torch.ones(2, 5))
    assert int((opt.state_dict()["state"]["W"]["exp_avg"] != 0).any(-1).sum()) == 4


def test_missing_gradients_and_frozen_parameters_are_skipped_as_in_torch() -> None:
    stub = Stub()
    opt = Adam(stub)
    opt.step(normal(B, D))
    before = {name: p.detach().clone() for name, p in stub.named_parameters()}
    stub.W_enc.requires_grad_(False)
    _, gradients = stub.step_gradients(normal(B, D, seed=1))
    del gradients["b_enc"]
    opt.apply({**gradients, "b_dec": None})
    changed = {name for name, p in stub.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"W_dec"}
    assert {name: s["step"] for name, s in opt.state_dict()["state"].items()} == {"W_enc": 1, "W_dec": 2, "b_enc": 1, "b_dec": 1}
    tensors = [("W", normal(3, 2))]  # plain tensors never require gradients
    was = tensors[0][1].clone()
    Adam(tensors).apply({"W": torch.ones(3, 2)})
    assert not torch.equal(tensors[0][1], was)


def test_an_empty_batch_is_a_step_without_gradient() -> None:
    stub = Stub()
    opt = Adam(stub, unit_rows=())
    opt.step(normal(B, D))
    before = stub.W_dec.detach().clone()
    opt.apply({"W_dec": RowGradient(torch.empty(0, K), torch.empty(0, K, dtype=torch.int64), None, torch.empty(0, D), F)})
    assert not torch.equal(stub.W_dec, before)
    opt.apply({})
    assert opt.steps == 3


# ---------------------------------------------------------------- state


def test_state_gives_the_bits_of_the_uninterrupted_run() -> None:
    xs = [normal(B, D, seed=step) for step in range(6)]
    one, two = Stub(), Stub()
    schedule = warmup_linear_decay(3, 4, 9)
    whole = Adam(one, lr=3e-3, weight_decay=0.1, clip=0.3, schedule=schedule)
    for x in xs:
        whole.step(x)
    first = Adam(two, lr=3e-3, weight_decay=0.1, clip=0.3, schedule=schedule)
    for x in xs[:3]:
        first.step(x)
    stored = pickle.loads(pickle.dumps((two.state_dict(), first.state_dict())))
    three = Stub()
    three.load_state_dict(stored[0])
    second = Adam(three, schedule=schedule)
    second.load_state_dict(stored[1])
    for x in xs[3:]:
        second.step(x)
    assert same(bits(whole), bits(second))
    assert (second.lr, second.weight_decay, second.clip, second.steps) == (3e-3, 0.1, 0.3, 6)


def test_loaded_state_is_a_copy() -> None:
    stub = Stub()
    opt = Adam(stub)
    opt.step(normal(B, D))
    other = Adam(Stub())
    other.load_state_dict(opt.state_dict())
    before = bits(opt)[-1]
    other.step(normal(B, D, seed=1))
    assert torch.equal(bits(opt)[-1], before)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("fused", [False, True])
def test_continuing_in_torch_gives_the_same_numbers(decay: float, fused: bool) -> None:
    ours = Stub()
    opt = Adam(ours, lr=1e-2, betas=(0.8, 0.99), weight_decay=decay, unit_rows=())
    for step in range(3):
        opt.step(normal(B, D, seed=step))
    other = Stub()
    other.load_state_dict(ours.state_dict())
    twin = Adam(other, unit_rows=())
    twin.load_state_dict(opt.state_dict())
    theirs = twin.to_torch(fused=fused)
    assert isinstance(theirs, torch.optim.AdamW if decay else torch.optim.Adam)
    for step in range(3, 6):
        opt.step(normal(B, D, seed=step))
        theirs.zero_grad()
        other.loss(normal(B, D, seed=step)).backward()
        theirs.step()
    for name, p in ours.named_parameters():
        assert (p - other.get_parameter(name)).abs().max() <= 2e-5, name


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("as_state", [False, True])
def test_continuing_from_torch_gives_the_same_numbers(decay: float, as_state: bool) -> None:
    other = Stub()
    kind = torch.optim.AdamW if decay else torch.optim.Adam
    theirs = kind(other.parameters(), lr=1e-2, betas=(0.8, 0.99), weight_decay=decay)

    def run(steps: range) -> None:
        for step in steps:
            theirs.zero_grad()
            other.loss(normal(B, D, seed=step)).backward()
            theirs.step()

    run(range(3))
    ours = Stub()
    ours.load_state_dict(other.state_dict())
    if as_state:
        opt = Adam.from_torch(ours, theirs.state_dict(), unit_rows=())
    else:
        opt = Adam(ours, unit_rows=())
        opt.load_state_dict(Adam.from_torch(other, theirs).state_dict())
    assert (opt.lr, opt.betas, opt.weight_decay, opt.steps) == (1e-2, (0.8, 0.99), decay, 3)
    run(range(3, 6))
    for step in range(3, 6):
        opt.step(normal(B, D, seed=step))
    for name, p in ours.named_parameters():
        assert (p - other.get_parameter(name)).abs().max() <= 2e-5, name


def test_there_and_back_is_exact() -> None:
    stub = Stub()
    opt = Adam(stub, lr=2e-3)
    for step in range(2):
        opt.step(normal(B, D, seed=step))
    back = Adam.from_torch(stub, opt.to_torch())
    assert same(bits(opt), bits(back))
    assert back.state_dict()["state"]["W_enc"]["step"] == 2
    assert back.unit_rows == ("W_dec",)


# ---------------------------------------------------------------- schedules


def test_warmup_linear_decay() -> None:
    factors = [warmup_linear_decay(4, 6, 10)(step) for step in range(12)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert [warmup_linear_decay(0, 0, 2)(step) for step in range(3)] == [1.0, 0.5, 0.0]
    assert [warmup_linear_decay(0, 2, 2)(step) for step in range(3)] == [1.0, 1.0, 0.0]
    assert pickle.loads(pickle.dumps(warmup_linear_decay(4, 6, 10)))(0) == 0.25
    for arguments, message in (
        ((-1, 2, 3), "warmup must be at least 0"),
        ((4, 3, 9), "decay_start must be at least 4"),
        ((1, 5, 4), "total"),
    ):
        with pytest.raises(ValueError, match=message):
            warmup_linear_decay(*arguments)
    with pytest.raises(TypeError, match="warmup must be an int, got float"):
        warmup_linear_decay(1.0, 2, 3)  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("params", "options", "error", "message"),
    [
        (3, {}, TypeError, "params must be a module or named parameters, got int"),
        ([normal(2, 2)], {}, TypeError, "params must be a module or pairs of name and parameter, got Tensor"),
        ({"W": normal(2, 2)}, {}, TypeError, "params must be a module or named parameters, got dict"),
        ([], {}, ValueError, "there are no parameters"),
        ([("W", normal(2, 2)), ("W", normal(2, 2))], {}, ValueError, "'W' is given twice"),
        ([("W", normal(2, 2).int())], {}, TypeError, "W must have dtype float32, bfloat16, float16, float64, got int32"),
        ([("W", normal(1, 2).expand(2, 2))], {}, ValueError, "W must not be an expanded tensor"),
        ([("W", normal(2, 3, 4).transpose(0, 1))], {}, ValueError, r"W must be contiguous or a matrix, got \[3, 2, 4\]"),
        ([("W", normal(2, 2))], {"lr": -1.0}, ValueError, "lr must be at least 0, got -1.0"),
        ([("W", normal(2, 2))], {"betas": (0.9, 1.5)}, ValueError, "betas must be at least 0 and below 1"),
        ([("W", normal(2, 2))], {"clip": 0.0}, ValueError, "clip must be a finite number above 0, got 0.0"),
        ([("W", normal(2, 2))], {"schedule": 0.5}, TypeError, "schedule must be callable, got float"),
        ([("W", normal(2, 2)), ("b", normal(2))], {"unit_rows": ["b"]}, ValueError, r"unit_rows must name matrices among \['W'\], got 'b'"),
        ([("W", normal(2, 2))], {"unit_rows": ["V"]}, ValueError, r"unit_rows must name matrices among \['W'\], got 'V'"),
    ],
)
def test_wrong_construction(params: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^optim.Adam: {message}"):
        Adam(params, **options)


@pytest.mark.parametrize(
    ("name", "gradient", "error", "message"),
    [
        ("V", normal(F, D), ValueError, "unknown parameter 'V'; known: W_enc, W_dec, b_enc, b_dec"),
        ("W_enc", 3.0, TypeError, "gradient of W_enc must be a torch.Tensor or a RowGradient, got float"),
        ("W_enc", normal(F, D + 1), ValueError, r"gradient of W_enc must have shape \[50, 20\], got \[50, 21\]"),
        ("b_enc", normal(F, 1), ValueError, r"gradient of b_enc must have shape \[50\], got \[50, 1\]"),
        ("W_enc", normal(F, D).double(), TypeError, "gradient of W_enc must have dtype float32, got float64"),
        ("W_enc", normal(F, D).to("meta"), TypeError, "gradient of W_enc must be on cpu like the other tensors, got meta"),
        (
            "W_enc",
            TiledGradient(lambda part: normal(F, D)[part], F - 1),
            ValueError,
            "n_features must be the 50 rows of the weights, got 49",
        ),
        (
            "W_enc",
            TiledGradient(lambda part: normal(F, D - 1)[part], F),
            ValueError,
            r"gradient of W_enc must have shape .* got \[50, 19\]",
        ),
        ("b_enc", TiledGradient(lambda part: normal(F, 1)[part], F), ValueError, "n_features must be the 1 rows of the weights, got 50"),
        (
            "W_enc",
            RowGradient(normal(2, 3), torch.zeros(2, 3).long(), None, normal(2, D), F + 1),
            ValueError,
            "gradient of W_enc.n_features must be the 50 rows of the weights, got 51",
        ),
    ],
)
def test_wrong_gradients(name: str, gradient: Any, error: type[Exception], message: str) -> None:
    stub = Stub()
    opt = Adam(stub)
    before = bits(opt)
    with pytest.raises(error, match=f"^Adam.apply: .*{message}"):
        opt.apply({"b_dec": normal(D), name: gradient} if "Tiled" not in type(gradient).__name__ else {name: gradient})
    assert same(before, bits(opt)[: len(before)]), "nothing has been written"


def test_a_module_that_has_changed() -> None:
    stub = Stub()
    opt = Adam(stub)
    opt.step(normal(B, D))
    stub.double()
    with pytest.raises(TypeError, match=r"^Adam.apply: W_enc was torch.float32 at its first step and is torch.float64 now"):
        opt.apply({"W_enc": normal(F, D).double()})
    stub.half()
    with pytest.raises(TypeError, match=r"^Adam.apply: W_enc was torch.float32 at its first step and is torch.float16 now"):
        opt.apply({"W_enc": normal(F, D).half()})


def test_a_step_needs_a_module_that_knows_its_gradients() -> None:
    for params, kind in ((nn.Linear(2, 2), "Linear"), ([("W", normal(2, 2))], "NoneType")):
        with pytest.raises(TypeError, match=rf"Adam.step: needs a module with step_gradients, got {kind}"):
            Adam(params).step(normal(2, 2))
    for opt in (Adam(nn.Linear(2, 2)), Signum(nn.Linear(2, 2))):
        with pytest.raises(TypeError, match=rf"^{type(opt).__name__}.step: x must be given.*or gradients, by loss.backward\(\)"):
            opt.step()


def test_a_parameter_that_was_replaced_is_not_left_behind_in_silence() -> None:
    sae = fastsae.SAE(4, 8, fastsae.TopK(2), seed=0)
    opt = Adam(sae)
    sae.W_dec = nn.Parameter(sae.W_dec.detach().clone())
    with pytest.raises(ValueError, match=r"^Adam.apply: W_dec of the module is another parameter now: make the optimiser after"):
        opt.step(normal(5, 4).float())


def test_options_may_be_set_and_are_checked() -> None:
    stub = Stub()
    opt = Adam(stub)
    opt.lr = float("nan")
    with pytest.raises(ValueError, match=r"Adam\.apply: lr must be a finite number, got nan"):
        opt.step(normal(B, D))
    opt.lr = 0.0
    before = stub.W_enc.detach().clone()
    opt.step(normal(B, D))
    assert torch.equal(stub.W_enc, before)


def test_wrong_states() -> None:
    stub = Stub()
    opt = Adam(stub)
    opt.step(normal(B, D))
    good = opt.state_dict()
    with pytest.raises(ValueError, match=r"not a state of fastsae\.optim\.Adam: 'steps' is missing"):
        opt.load_state_dict({"state": {}})
    with pytest.raises(ValueError, match="unknown parameter 'V'; known: W_enc"):
        opt.load_state_dict({**good, "state": {"V": good["state"]["W_enc"]}})
    with pytest.raises(ValueError, match=r"exp_avg of b_enc must have shape \[50\], got \[50, 20\]"):
        opt.load_state_dict({**good, "state": {"b_enc": good["state"]["W_enc"]}})


def test_torch_optimisers_that_do_not_convert() -> None:
    stub = Stub()
    matrices, vectors = [stub.W_enc, stub.W_dec], [stub.b_enc, stub.b_dec]
    for optimizer, message in (
        (torch.optim.Adam(stub.parameters(), amsgrad=True), "amsgrad and maximize are not supported"),
        (torch.optim.Adam(stub.parameters(), maximize=True), "amsgrad and maximize are not supported"),
        (torch.optim.Adam(stub.parameters(), weight_decay=0.1), r"weight_decay must be decoupled \(AdamW's\)"),
        (torch.optim.Adam([{"params": matrices}, {"params": vectors, "lr": 1.0}]), "lr must be the same in every group"),
        (torch.optim.SGD(stub.parameters()), "betas must be the same in every group, got"),
        (torch.optim.Adam(nn.Linear(2, 2).parameters()), "parameter 0 of the optimizer is not among W_enc, W_dec"),
        (torch.optim.Adam(matrices).state_dict(), "the state has 2 parameters, expected 4"),
    ):
        with pytest.raises(ValueError, match=f"^Adam.from_torch: {message}"):
            Adam.from_torch(stub, optimizer)  # pyright: ignore[reportArgumentType]


def test_one_parameter_twice_and_a_broken_schedule_are_refused() -> None:
    p = torch.nn.Parameter(torch.ones(3, 4))
    with pytest.raises(ValueError, match="the same parameter"):
        Adam([("a", p), ("b", p)])
    opt = Adam([("a", p)], schedule=lambda step: float("nan"))
    with pytest.raises(ValueError, match="learning rate at step 0"):
        opt.apply({"a": torch.ones(3, 4)})
    assert torch.equal(p, torch.ones(3, 4))
