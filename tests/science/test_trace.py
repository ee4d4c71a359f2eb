"""trace: the codes of what the model itself gives to its activations, whatever the model, the mask and the number of calls."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastsae.codes import CodeCounter, combine_hashes, hash_code, hash_signs, pack_signs, trace


class Block(nn.Module):
    def __init__(self, width: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, hidden), activation, nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Layer(nn.Module):
    def __init__(self, width: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), Block(width, hidden, activation)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    def __init__(self, activations: list[nn.Module], width: int = 12, hidden: int = 70) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(width, hidden, activation) for activation in activations)
        self.head = nn.Sequential(nn.Linear(width, 9), nn.ReLU(inplace=True), nn.Linear(9, 2))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def pre(self, x: Tensor) -> Iterator[Tensor]:
        """What each block's activation is given."""
        for layer in self.layers:
            yield layer.mlp.up(layer.norm(x))  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            x = layer(x)
        yield self.head[0](x)


NAMES = ["layers.0.mlp.act", "layers.1.mlp.act", "layers.2.mlp.act", "head.1"]


@pytest.fixture
def model() -> Model:
    return Model([nn.ReLU(), nn.GELU(), nn.SiLU()])


def x(*batch: int, seed: int = 0) -> Tensor:
    return torch.randn(*batch, 12, generator=torch.Generator().manual_seed(seed))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


# ---------------------------------------------------------------- what comes out


@pytest.mark.parametrize("bits", [64, 128])
def test_hashes_and_codes_are_those_of_the_models_own_pre_activations(model: Model, bits: int) -> None:
    inputs = x(3, 5)
    with torch.no_grad(), trace(model, seed=7, bits=bits) as hashes, trace(model, emit="code") as codes:
        model(inputs)
    found, packed = hashes.pop(), codes.pop()
    assert list(found) == list(packed) == list(hashes.layers) == NAMES
    for number, (name, z) in enumerate(zip(NAMES, model.pre(inputs))):
        assert torch.equal(packed[name], pack_signs(z).flatten(0, 1))
        assert torch.equal(found[name], hash_signs(z, layer=number, seed=7, bits=bits).flatten(0, 1))
        assert torch.equal(found[name], hash_code(packed[name], layer=number, seed=7, bits=bits))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("*", NAMES),
        ("*.mlp", NAMES[:3]),
        ("layers.[12].*", NAMES[1:3]),
        ("head", NAMES[3:]),
        (["head.*", "layers.0"], [NAMES[0], NAMES[3]]),
        ("*.act", NAMES[:3]),
        (lambda name, module: isinstance(module, nn.GELU), NAMES[1:2]),
        (lambda name, module: name == "layers", NAMES[:3]),
    ],
)
def test_what_a_pattern_names(model: Model, layers: object, expected: list[str]) -> None:
    with trace(model, layers) as t:  # pyright: ignore[reportArgumentType]
        model(x(4))
    assert list(t.pop()) == expected == list(t.layers)


def test_a_pattern_for_blocks_names_one_at_the_top() -> None:
    model = nn.ModuleDict({"mlp": Block(12, 9, nn.LeakyReLU())})
    assert trace(model, "*.mlp").layers == ("mlp.act",)


def test_calls_accumulate_until_pop(model: Model) -> None:
    with torch.no_grad(), trace(model, "head") as t:
        for batch in ((2, 3), (4,), (1, 1)):
            model(x(*batch))
        first = t.pop()
        assert t.pop() == {}
        model(x(5))
        model(x(0, 3))
    whole = torch.cat([hash_signs(list(model.pre(x(*b)))[3]).flatten() for b in ((2, 3), (4,), (1, 1))])
    assert torch.equal(first["head.1"], whole)
    assert t.pop()["head.1"].shape == (5,)  # also after the block


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
@pytest.mark.parametrize("emit", ["hash", "code"])
def test_masked_positions_are_left_out(model: Model, dtype: torch.dtype, emit: str) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).to(dtype)
    with trace(model, emit=emit) as whole, trace(model, emit=emit, mask=mask) as t, trace(model, emit=emit, mask="attention_mask") as named:
        model(x(2, 3), attention_mask=mask)
    every, some, by_name = whole.pop(), t.pop(), named.pop()
    for name in NAMES:
        assert torch.equal(some[name], every[name][mask.flatten().bool()])
        assert torch.equal(by_name[name], some[name])


def test_a_mask_of_each_call(model: Model) -> None:
    masks = [torch.rand(3, n, generator=torch.Generator().manual_seed(n)) > 0.5 for n in (4, 6)]
    with trace(model, "head") as t:
        for mask in masks:
            t.mask = mask
            model(x(*mask.shape))
    with trace(model, "head", mask="attention_mask") as named:
        for mask in masks:
            model(x(*mask.shape), mask)  # as a positional argument
    found = t.pop()["head.1"]
    assert found.shape == (int(masks[0].sum() + masks[1].sum()),)
    assert torch.equal(found, named.pop()["head.1"])


def test_neurons(model: Model) -> None:
    some = torch.tensor([0, 3, 69])
    with trace(model, "*.mlp", neurons=some) as t, trace(model, neurons={"head.1": torch.tensor([True] * 4 + [False] * 5)}) as by_name:
        model(x(6))
    pre, found, named = list(model.pre(x(6))), t.pop(), by_name.pop()
    for number in range(3):
        assert torch.equal(found[NAMES[number]], hash_signs(pre[number], layer=number, neurons=some))
        assert torch.equal(named[NAMES[number]], hash_signs(pre[number], layer=number))
    assert torch.equal(named["head.1"], hash_signs(pre[3], layer=3, neurons=torch.arange(4)))


def test_an_activation_that_several_layers_share() -> None:
    """Each call of a forward pass is a layer of its own, with keys of its own."""
    shared = nn.ReLU()
    model = Model([shared, shared, shared])
    with torch.no_grad(), trace(model, "*.mlp") as t, trace(model, "layers.1.mlp.act") as one:
        for seed in (0, 1):
            model(x(4, seed=seed))
    assert t.layers == ("layers.0.mlp.act",)
    assert one.layers == ("layers.1.mlp.act",)
    found = t.pop()
    assert list(found) == ["layers.0.mlp.act", "layers.0.mlp.act#2", "layers.0.mlp.act#3"]
    pre = [torch.cat(z) for z in zip(*(model.pre(x(4, seed=seed)) for seed in (0, 1)))]
    for call, hashes in enumerate(found.values()):
        assert torch.equal(hashes, hash_signs(pre[call], layer=call))


def test_a_part_that_is_called_by_itself(model: Model) -> None:
    with trace(model, "head") as t:
        model.head(x(2))
        model.head(x(3))
    assert {name: hashes.shape for name, hashes in t.pop().items()} == {"head.1": (5,)}
    with trace(model, "head", mask="attention_mask") as t:
        with pytest.raises(ValueError, match="mask='attention_mask' must name an argument"):  # not all rows, unmasked
            model.head(x(2))
        model(x(2), torch.tensor([0, 1]))
    assert len(t.pop()["head.1"]) == 1


def test_keyword_inputs_other_dtypes_and_layouts() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, z: Tensor) -> Tensor:
            return self.act(input=z)

    model = Odd()
    for z in (x(4).bfloat16(), x(4).half(), x(4).double(), x(5, 4).transpose(0, 1), x(4)[:, ::2], torch.randn(12)):
        with trace(model, emit="code") as t:
            model(z)
        assert torch.equal(t.pop()["act"], pack_signs(z).reshape(-1, 1))


# ---------------------------------------------------------------- the model


def test_results_and_gradients_do_not_change(model: Model) -> None:
    def run() -> list[Tensor]:
        loss = model(x(3, 4)).square().sum()
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    plain = run()
    with trace(model) as t:
        traced = run()
    assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True))
    assert not any(hashes.requires_grad for hashes in t.pop().values())
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, trace(model) as t:
            model(x(2))
        assert len(t.pop()) == 4


def test_hooks_are_removed_on_leaving(model: Model) -> None:
    with trace(model) as t:
        assert hooks(model) > 0
        model(x(2))
    assert hooks(model) == 0
    model(x(2))
    assert all(hashes.shape == (2,) for hashes in t.pop().values())


def test_hooks_are_removed_by_an_exception(model: Model) -> None:
    with pytest.raises(ZeroDivisionError), trace(model):
        raise ZeroDivisionError
    assert hooks(model) == 0
    t = trace(model)
    with pytest.raises(RuntimeError, match="normalized_shape"), t:
        model(torch.zeros(2, 3, 11))
    assert hooks(model) == 0


def test_a_failed_forward_call_does_not_disturb_the_next(model: Model) -> None:
    with trace(model) as t:
        with pytest.raises(RuntimeError):
            model(torch.zeros(2, 5))
        t.pop()
        model(x(3))
        assert list(t.pop()) == NAMES
        with pytest.raises(RuntimeError, match="already entered"), t:
            pass
        model(x(3))
    assert len(t.pop()) == 4


# ---------------------------------------------------------------- which calls count


class Stumbles(nn.Module):
    """Raises after its first activations where it is told to."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model, self.act = model, nn.ReLU()
        self.error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.model(x))
        if self.error is not None:
            raise self.error
        return self.act(h - 1)


@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt(), SystemExit(2)])
def test_a_call_that_raises_in_the_middle_leaves_no_rows(model: Model, error: BaseException) -> None:
    whole = Stumbles(model)
    with torch.no_grad(), trace(whole, mask=None) as t, trace(whole.model, "head") as inner:
        for case in (error, None, error, None):
            whole.error = case
            if case is None:
                whole(x(3))
            else:
                with pytest.raises(type(error)):
                    whole(x(2))
                whole.model.head(x(1))  # a part by itself, after the interruption
    rows = {name: len(hashes) for name, hashes in t.pop().items()}
    assert rows == dict.fromkeys(NAMES_OF_PART, 6) | {"model.head.1": 8, "act": 6, "act#2": 6}
    assert len(inner.pop()["head.1"]) == 2 + 2 + 6 + 2  # its own call was whole each time


NAMES_OF_PART = [f"model.{name}" for name in NAMES[:3]]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_rows_that_a_backward_pass_computes_again_do_not_count(model: Model, reentrant: bool, nested: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    def run(part: nn.Module, x: Tensor, use_reentrant: bool = reentrant) -> Tensor:
        return checkpoint(part, x, use_reentrant=use_reentrant)  # pyright: ignore[reportReturnType]

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.shared = model, nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.model.layers:
                x = self.shared(run(layer, x))
            return run(self.model.head, x)

    whole, inputs = Checkpointed(), x(4).requires_grad_()
    with trace(whole) as t:
        for _ in range(2):
            (run(whole, inputs, False) if nested else whole(inputs)).sum().backward()
    found = t.pop()
    assert list(found) == [*(f"model.{name}" for name in NAMES), "shared", "shared#2", "shared#3"]
    assert {len(hashes) for hashes in found.values()} == {8}
    with torch.no_grad(), trace(whole) as t:
        whole(inputs)
    assert all(torch.equal(found[name], hashes.repeat(2)) for name, hashes in t.pop().items())


def test_a_part_that_is_checkpointed_by_itself(model: Model) -> None:
    from torch.utils.checkpoint import checkpoint

    with trace(model, "head") as t:
        checkpoint(model.head, x(4).requires_grad_(), use_reentrant=False).sum().backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(t.pop()["head.1"]) == 4


def test_a_module_that_calls_itself() -> None:
    class Tree(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            return self.act(self(x - 1, depth - 1) if depth else x)

    tree = Tree()
    with trace(tree) as t:
        tree(x(4))
    assert {name: len(hashes) for name, hashes in t.pop().items()} == {"act": 4, "act#2": 4, "act#3": 4}


def test_threads_have_traces_of_their_own(model: Model) -> None:
    def run(rows: int) -> list[int]:
        with torch.no_grad(), trace(model, mask="attention_mask") as t:
            for _ in range(10):
                model(x(rows), torch.ones(rows))
        return [len(hashes) for hashes in t.pop().values()]

    with ThreadPoolExecutor(4) as pool:
        for rows, found in zip(range(1, 9), pool.map(run, range(1, 9))):
            assert found == [10 * rows] * 4
    assert hooks(model) == 0


def test_copies_and_other_ways_of_calling(model: Model) -> None:
    parameters = {name: p.detach() + 1 for name, p in model.named_parameters()}
    with torch.no_grad(), trace(model) as t:
        copied = copy.deepcopy(model)
        copied(x(5))  # another model
        torch.func.functional_call(model, parameters, (x(3),))
        nn.DataParallel(model)(x(2))  # on a CPU: the model itself
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(x(1))
        torch.func.grad(lambda v: model(v).sum())(x(1))
        with pytest.raises(RuntimeError, match=r"^trace: layer .* must run eagerly and outside torch\.vmap"):
            torch.vmap(model)(x(2))
        with pytest.raises(RuntimeError, match=r"must run eagerly"):
            torch.export.export(model, (x(2),))
    assert [len(hashes) for hashes in t.pop().values()] == [7] * 4
    copied(x(5))
    assert t.pop() == {}


def test_traces_of_one_model_and_generators(model: Model) -> None:
    def collect() -> Generator[dict[str, Tensor], None, None]:
        with trace(model, "head") as t:
            while True:
                yield t.pop()

    first, second = collect(), collect()
    next(first)
    next(second)
    model(x(3))
    assert len(next(first)["head.1"]) == len(next(second)["head.1"]) == 3
    first.close()
    model(x(2))
    assert len(next(second)["head.1"]) == 2
    second.close()
    assert hooks(model) == 0


def test_what_cannot_be_traced_says_so(model: Model) -> None:
    compiled = torch.compile(model, backend="eager")
    for whole in (compiled, nn.Sequential(compiled)):  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match=r"^trace: model must run eagerly .* that is compiled: trace the model before torch.compile"):
            trace(whole)  # pyright: ignore[reportArgumentType]
    several = nn.DataParallel(model)
    several.device_ids = [0, 1]
    with pytest.raises(ValueError, match=r"a DataParallel over several devices: trace the model\.module"):
        trace(several)
    with pytest.warns(UserWarning, match="^trace: no traced layer ran in the block"), trace(model):
        threading.Thread(target=model, args=(x(2),)).start()
    model.head.compile(backend="eager")
    with pytest.raises(ValueError, match="got head that is compiled"):
        trace(model, "*.mlp")


def test_pre_activations_are_not_kept(model: Model) -> None:
    kept = []
    with torch.no_grad(), trace(model) as t:
        handle = model.head[0].register_forward_hook(lambda module, args, z: kept.append(weakref.ref(z)))
        for _ in range(3):
            model(x(4))
        assert len(kept) == 3
        assert all(reference() is None for reference in kept)
        handle.remove()
    bytes_kept = sum(h.untyped_storage().nbytes() for h in t.pop().values())
    assert bytes_kept == 4 * 12 * 8


# ---------------------------------------------------------------- with what is built on it


def test_combined_hashes_count_regions() -> None:
    """The hash over all layers is constant on, and different between, the regions in which every layer keeps its signs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 9), nn.ReLU(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 1))
    grid = torch.cartesian_prod(torch.linspace(-3, 3, 25), torch.linspace(-3, 3, 25))
    with torch.no_grad(), trace(model) as hashes, trace(model, emit="code") as codes:
        model(grid)
    taken = list(hashes.pop().values())
    counter = CodeCounter([*hashes.layers, "both"])
    counter.update(dict(zip(counter.names, [*taken, combine_hashes(taken)])))
    patterns = torch.cat(list(codes.pop().values()), 1)
    rows = counter.table()
    assert rows[2].distinct == torch.unique(patterns, dim=0).shape[0] > max(rows[0].distinct, rows[1].distinct) > 5


def test_combine_hashes() -> None:
    z = [torch.randn(7, n, generator=torch.Generator().manual_seed(n)) for n in (5, 64, 100)]
    hashes = [hash_signs(layer, layer=i, bits=128) for i, layer in enumerate(z)]
    before = [h.clone() for h in hashes]
    combined = combine_hashes(hashes)
    assert torch.equal(combined, hashes[0] ^ hashes[1] ^ hashes[2])
    assert torch.equal(combined, combine_hashes(iter(reversed(hashes))))
    assert torch.equal(combine_hashes(hashes[:1]), hashes[0])
    assert all(torch.equal(a, b) for a, b in zip(before, hashes))
    for wrong, error, message in (
        (hashes[0], TypeError, "hashes must be a list of tensors, got Tensor"),
        ([], ValueError, "hashes must hold at least one tensor, got none"),
        ([hashes[0], 3], TypeError, r"hashes\[1\] must be a torch.Tensor, got int"),
        ([hashes[0], hashes[0].int()], TypeError, r"hashes\[1\] must have dtype int64, got int32"),
        ([hashes[0], hashes[0][:3]], ValueError, r"hashes\[1\] must have shape \[7, 2\] like hashes\[0\], got \[3, 2\]"),
        ([hashes[0], hashes[0].to("meta")], TypeError, r"hashes\[1\] must be on cpu"),
    ):
        with pytest.raises(error, match=f"^combine_hashes: {message}"):
            combine_hashes(wrong)  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------- arguments


def test_nothing_to_trace(model: Model) -> None:
    with pytest.raises(
        ValueError, match=r"^trace: '\*.attention' matches nothing; it could match: layers\.\*\.mlp\.act \(3 layers\), head.1; .*F.relu"
    ):
        trace(model, "*.attention")
    with pytest.raises(ValueError, match=r"'head.0' matches head.0, without an activation module in it; it could match: layers\.\*"):
        trace(model, ["*.mlp", "head.0"])
    with pytest.raises(ValueError, match=r"^trace: the callable matches nothing; it could match"):
        trace(model, lambda name, module: False)
    with pytest.raises(ValueError, match="matches nothing; the model has no activation module; an activation"):
        trace(nn.Linear(3, 4), "*.mlp")
    with pytest.raises(ValueError, match="at least one layer, got an empty list"):
        trace(model, [])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": 3}, TypeError, "model must be a torch.nn.Module, got int"),
        ({"layers": 3}, TypeError, "layers must be a pattern, a list of patterns or a callable, got int"),
        ({"layers": ["*", 3]}, TypeError, "layers must be a pattern, a list of patterns or a callable, got list"),
        ({"emit": "bits"}, ValueError, "emit must be one of hash, code, got 'bits'"),
        ({"mask": [1, 0]}, TypeError, "mask must be a tensor, the name of an argument or None, got list"),
        ({"neurons": 3}, TypeError, "neurons must be a tensor or a dict of tensors, got int"),
        ({"neurons": {"head.1": [3]}}, TypeError, "neurons must be a tensor or a dict of tensors, got list"),
        ({"neurons": {"head": torch.ones(9)}}, ValueError, "neurons has a layer 'head', expected of layers.0.mlp.act, "),
        ({"seed": -1}, ValueError, "seed must be at least 0 .*, got -1"),
        ({"bits": 32}, ValueError, "bits must be 64 or 128, got 32"),
    ],
)
def test_wrong_arguments(model: Model, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^trace: {message}"):
        trace(**{"model": model, **change})


def test_numpy_numbers(model: Model) -> None:
    assert type(trace(model, seed=np.int64(3), bits=np.int64(128))._bits) is int


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.full((2, 3), 2), ValueError, r"mask must be bool, or 0 and 1 \(1: counts\), got int64 from 2 to 2"),
        (torch.full((2, 3), -torch.inf), ValueError, r"mask must be bool, or 0 and 1 .*, got float32 from -inf to -inf \(an additive"),
        (torch.zeros(2, 3), ValueError, ".*an additive attention mask, 0 where a position counts"),
        (
            torch.zeros(2, 1, 3, 3),
            ValueError,
            r"mask must have an entry a position, \[batch, seq\], got an attention mask of pairs \[2, 1, 3, 3\]",
        ),
        (torch.ones(2, 4), ValueError, r"mask must have shape \[2, 3\], the batch dimensions of layer .*, got \[2, 4\]"),
        (torch.ones(2, 4, dtype=torch.bool), ValueError, r"mask must have shape \[2, 3\], the batch dimensions of layer .*, got \[2, 4\]"),
        ("padding", ValueError, "mask='padding' must name an argument that the model is called with, got x"),
        ("attention_mask", ValueError, "mask='attention_mask' must name"),
    ],
)
def test_a_mask_that_does_not_fit(model: Model, mask: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^trace: {message}"), trace(model, mask=mask):  # pyright: ignore[reportArgumentType]
        model(x(2, 3))
    assert hooks(model) == 0
