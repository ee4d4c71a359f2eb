"""The contract of every operation on every backend, iterating the table: an operation or backend added later is tested as it stands.

For each operation x backend (each instruction set of the C++ rows) x dtype: results against the specification, fresh memory poisoned,
inputs untouched, the same bits on a second run and for every slice of a batch, ``opcheck``; drawn inputs with other strides, ties,
NaN, infinities and denormals. For each public operation: first and second derivatives against autograd of the reference,
``gradcheck``, batched gradients, ``vmap``, fullgraph compile.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import has_code
from perturbed import perturb
from surroundings import PRECISIONS, SETTINGS, surroundings
from torch import Tensor
from triton_marks import CI

import fastsae
from fastsae._core import triton_support
from fastsae.dispatch import OPS, Op, Row
from fastsae.native import encode as native_encode
from fastsae.testing import Mismatch
from fastsae.verify import affordable, call, devices, variants

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
FEW = CI and (triton_support.interpreting() or "FASTSAE_CUDA_EMULATION" in os.environ)
Context = Callable[[], AbstractContextManager[Any]]


def _rows() -> Iterator[Any]:
    for op in OPS.values():
        for device in devices():
            for row in op.rows:
                for name, context in variants(row, device):
                    yield pytest.param(op, row, context, device, id=f"{op.name}-{name}-{device}")


def _rows_to_draw_for() -> Iterator[Any]:
    """Each code once: the draws are the same at every level."""
    return (parameter for parameter in _rows() if has_code(parameter.values[0].name, parameter.id))


def _cases() -> Iterator[Any]:
    for parameter in _rows():
        for dtype in parameter.values[0].dtypes:
            yield pytest.param(*parameter.values, dtype, id=f"{parameter.id}-{str(dtype).removeprefix('torch.')}")


def _samples(op: Op, row: Row, device: torch.device, dtype: torch.dtype, seed: int = 0) -> list[tuple[Any, ...]]:
    """The samples that the row accepts; skips with its own reason where it accepts none. In the interpreter, which is slow, each dtype
    takes another third of them; ``make deep`` all."""
    everything = list(op.samples(device, dtype, torch.Generator().manual_seed(seed)))
    accepted = [args for args in everything if row.reason(args) is None and affordable(row, device, args)]
    if not accepted:
        pytest.skip(str(row.reason(everything[0])))
    if triton_support.interpreting() and row.backend == "triton" and not DEEP and len(accepted) > 3:
        return accepted[op.dtypes.index(dtype) % 3 :: 3]
    return accepted


def _copies(args: tuple[Any, ...]) -> list[Any]:
    return [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_floating_point():
        return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0)) and torch.equal(a.signbit(), b.signbit())
    return torch.equal(a, b)


@pytest.mark.parametrize(("op", "row", "context", "device", "dtype"), list(_cases()))
def test_meets_specification(op: Op, row: Row, context: Context, device: torch.device, dtype: torch.dtype, poisoned_memory: None) -> None:
    with context():
        for number, args in enumerate(_samples(op, row, device, dtype)):
            before = _copies(args)
            first = [t.clone() for t in _tensors(call(op, row, args))]
            try:
                op.check(args, first[0] if len(first) == 1 else tuple(first))
            except Mismatch as mismatch:
                pytest.fail(f"sample {number}: {mismatch}")
            for position, (was, now) in enumerate(zip(before, args)):
                if isinstance(was, Tensor):  # `call` gives copies of those that are written
                    assert _same_bits(was, now), f"sample {number}: argument {position} was modified"
            second = _tensors(call(op, row, args))
            assert all(_same_bits(a, b) for a, b in zip(first, second, strict=True)), f"sample {number}: a second run gives other bits"


# Not the reference: it uses torch's own products, whose bits may change with the batch. Not where a result depends on the whole batch.
_BATCHED = [case for case in _cases() if case.values[0].batched and case.values[1].backend != "reference"]


@pytest.mark.parametrize(("op", "row", "context", "device", "dtype"), _BATCHED)
def test_bits_do_not_depend_on_the_batch(op: Op, row: Row, context: Context, device: torch.device, dtype: torch.dtype) -> None:
    with context():
        samples = _samples(op, row, device, dtype)
        for args in samples[op.dtypes.index(dtype) % 3 :: 3] or samples[:1] if FEW else samples:
            rows = args[op.batched[0]].shape[0]
            whole = _tensors(call(op, row, args))
            if any(result.shape[:1] != (rows,) for result in whole):
                continue  # ragged rows cannot be sliced with their slots; tests of the operation do that
            for part in (slice(0, 1), slice(rows // 2, rows), slice(1, max(rows - 1, 1))):
                sliced = tuple(arg[part] if position in op.batched else arg for position, arg in enumerate(args))
                for a, b in zip(_tensors(call(op, row, sliced)), whole, strict=True):
                    assert _same_bits(a, b[part])


_OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize(("op", "row", "context", "device"), list(_rows()))
def test_opcheck(op: Op, row: Row, context: Context, device: torch.device, request: pytest.FixtureRequest) -> None:
    # Fake tensors, autograd and compiled calls know no instruction set: once a row. What a kernel does to its arguments, at each.
    level = re.search(r"-cpu\[(\w+)\]-", request.node.name)
    tests = _OPCHECKS if not FEW and (level is None or level[1] == "portable") else _OPCHECKS[:1]
    with context():
        samples = _samples(op, row, device, op.dtypes[0])
        for args in (samples[0], samples[len(samples) // 2], samples[-1]):
            # Equal results are compared by test_meets_specification; opcheck's allclose knows no NaN == NaN.
            if not any(isinstance(arg, Tensor) and arg.is_floating_point() and bool(arg.isnan().any()) for arg in args):
                torch.library.opcheck(getattr(torch.ops.fastsae, op.name).default, args, {"backend": row.backend}, test_utils=tests)


@pytest.mark.parametrize(("op", "row", "context", "device"), list(_rows_to_draw_for()))
@settings(max_examples=settings().max_examples // (4 if FEW else 1))
@given(seed=st.integers(0, 2**31 - 1), data=st.data())
def test_drawn_inputs(op: Op, row: Row, context: Context, device: torch.device, seed: int, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(op.dtypes))
    everything = list(op.samples(device, dtype, torch.Generator().manual_seed(seed)))
    args = data.draw(st.sampled_from(range(len(everything))).map(lambda number: everything[number]))
    args = perturb(args, data.draw(st.integers(0, 2**31 - 1)), keep=op.mutates)
    if op.handle is not None:
        weight, words = op.handle
        args = (*args[:words], None if args[words] is None else native_encode.pack(args[weight].resolve_neg()), *args[words + 1 :])
    with context():  # what a row refuses may depend on the instruction set
        if row.reason(args) is None and affordable(row, device, args):
            op.check(args, call(op, row, args))


# One at a time of what excludes another, and in the order in which they are entered.
_CHOSEN = st.lists(st.sampled_from(sorted(SETTINGS)), min_size=1, max_size=3, unique=True).filter(
    lambda names: sum(name in PRECISIONS for name in names) < 2
)


@pytest.mark.parametrize(("op", "row", "context", "device"), list(_rows_to_draw_for()))
@settings(max_examples=max(3, settings().max_examples // 6))
@given(seed=st.integers(0, 3), names=_CHOSEN, data=st.data())
def test_drawn_surroundings_change_nothing(
    op: Op, row: Row, context: Context, device: torch.device, seed: int, names: list[str], data: st.DataObject
) -> None:
    dtype = data.draw(st.sampled_from(op.dtypes))
    everything = _drawn(op.name, device, dtype, seed)
    args = data.draw(st.sampled_from(range(len(everything))).map(lambda number: everything[number]))
    if row.backend == "reference":  # whose products are torch's, and may depend on the number of threads
        names = [name for name in names if name != "one thread"]
    if any(_subnormal(arg) for arg in args):
        names = [name for name in names if name != "flush denormals"]  # which asks for another result then
    with context():
        if row.reason(args) is None and affordable(row, device, args):
            expected = _tensors(call(op, row, args))
            with surroundings(names):
                result = _tensors(call(op, row, args))
            assert all(a.device == b.device and _same_bits(a, b) for a, b in zip(result, expected, strict=True)), names


def _subnormal(arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.is_floating_point() and bool(((arg != 0) & (arg.abs() < torch.finfo(arg.dtype).tiny)).any())


@cache
def _drawn(name: str, device: torch.device, dtype: torch.dtype, seed: int) -> list[tuple[Any, ...]]:
    return list(OPS[name].samples(device, dtype, torch.Generator().manual_seed(seed)))


# ---------------------------------------------------------------- public operations


def _t(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


_INDICES = torch.randint(0, 23, (6, 5), generator=torch.Generator().manual_seed(9))


def _topk(x: Tensor, W: Tensor, b: Tensor, b_pre: Tensor, scale: Tensor) -> Tensor:
    return fastsae.encode_topk(x, W, b, k=4, b_pre=b_pre, scale=scale).values


def _select(z: Tensor) -> Tensor:
    return fastsae.ops.select.select_topk(z, k=5).values


def _topk_signed(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return fastsae.encode_topk(x, W, b, k=11, relu=False, features=torch.arange(0, 23, 2, device=x.device)).values


def _topk_absolute(x: Tensor, W: Tensor, b: Tensor, b_pre: Tensor, scale: Tensor) -> Tensor:
    return fastsae.encode_topk(x, W, b, k=6, b_pre=b_pre, scale=scale, absolute=True).values


def _relu(x: Tensor, W: Tensor, b: Tensor, b_pre: Tensor, scale: Tensor) -> Tensor:
    return fastsae.encode_threshold(x, W, b, b_pre=b_pre, scale=scale, threshold=0.3).values


def _batch_topk(x: Tensor, W: Tensor, b: Tensor, b_pre: Tensor, scale: Tensor) -> Tensor:
    return fastsae.encode_batch_topk(x, W, b, b_pre=b_pre, scale=scale, k=3.5)[0].values


def _gated(x: Tensor, W: Tensor, r_mag: Tensor, b_pre: Tensor, b_mag: Tensor) -> Tensor:
    gate = torch.linspace(-1, 1, 23, device=x.device, dtype=x.dtype)
    return fastsae.encode_gated(x, W, b_gate=gate, r_mag=r_mag, b_mag=b_mag, b_pre=b_pre).values


def _decode(values: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return fastsae.decode(fastsae.TopKLatents(values, _INDICES.to(values.device), 23), W, b)


def _decode_prefixes(values: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return fastsae.decode(fastsae.TopKLatents(values, _INDICES.to(values.device), 23), W, b, prefixes=[5, 12, 23])


def _decode_ragged(values: Tensor, W: Tensor, b: Tensor) -> Tensor:
    crow = torch.tensor([0, 3, 3, 20, 30], device=values.device)
    return fastsae.decode(fastsae.RaggedLatents(values.flatten(), crow, _INDICES.flatten().to(values.device), 23, (2, 2)), W, b)


def _reconstruct(x: Tensor, W: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    result = fastsae.reconstruct(x, W, W_dec, None, b_dec, activation=fastsae.TopK(4), b_pre=b_dec)
    return result.x_hat.sum() + result.squared_error.sum()


def _match(a: Tensor, b: Tensor) -> Tensor:
    return fastsae.match_cosine(a, b, k=3, absolute=True).similarity


_LAYER = (_t(6, 7), _t(23, 7), _t(23), _t(7), _t(23, seed=1))
_LATENTS = (_t(6, 5), _t(23, 7), _t(7))
PUBLIC: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "encode_topk": (_topk, _LAYER),
    "encode_topk_signed_subset": (_topk_signed, _LAYER[:3]),
    "encode_topk_absolute": (_topk_absolute, _LAYER),
    "encode_threshold": (_relu, _LAYER),
    "encode_batch_topk": (_batch_topk, _LAYER),
    "encode_gated": (_gated, (_LAYER[0], _LAYER[1], _LAYER[2] / 4, _LAYER[3], _LAYER[4])),
    "decode": (_decode, _LATENTS),
    "decode_prefixes": (_decode_prefixes, _LATENTS),
    "decode_ragged": (_decode_ragged, _LATENTS),
    "reconstruct": (_reconstruct, (_t(2, 3, 7), _t(23, 7), _t(23, 7, seed=2), _t(7))),
    "select_topk": (_select, (_t(6, 23),)),
    "match_cosine": (_match, (_t(6, 7), _t(9, 7))),
}


def _gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dtype: torch.dtype, device: torch.device, transposed: bool
) -> tuple[Tensor, ...]:
    leaves = []
    for tensor in inputs:
        leaf = tensor.to(device=device, dtype=dtype)
        if transposed and leaf.dim() == 2:
            leaf = leaf.T.contiguous().T
        leaves.append(leaf.detach().requires_grad_())
    result = function(*leaves)
    weight = torch.linspace(-1, 2, result.numel(), device=device, dtype=torch.float64).reshape(result.shape).to(dtype)
    return torch.autograd.grad((result * weight).sum(), leaves)


def _backends() -> Iterator[Any]:
    for device in devices():
        yield pytest.param("reference", nullcontext, device, id=f"reference-{device}")
        for row in OPS["decode"].rows[:-1]:
            for name, context in variants(row, device):
                yield pytest.param(row.backend, context, device, id=f"{name}-{device}")


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
@pytest.mark.parametrize(("backend", "context", "device"), list(_backends()))
def test_gradients(name: str, transposed: bool, backend: str, context: Context, device: torch.device) -> None:
    function, inputs = PUBLIC[name]
    sample = next(OPS["decode"].samples(device, torch.float32, torch.Generator()))
    row = next(row for row in OPS["decode"].rows if row.backend == backend)
    if (reason := row.reason(sample)) is not None:
        pytest.skip(reason)
    with context(), fastsae.use_backend(f"{backend},*"):
        got = _gradients(function, inputs, torch.float32, device, transposed)
    with fastsae.use_backend("reference"):
        exact = _gradients(function, inputs, torch.float64, device, transposed)
        plain = _gradients(function, inputs, torch.float32, device, transposed)
    for position, (g, e, p) in enumerate(zip(got, exact, plain, strict=True)):
        # Twice the error of the same computation in PyTorch, and 32 ulp of the largest gradient for another order of summation.
        allowed = 2 * (p - e).abs().max() + 32 * torch.finfo(torch.float32).eps * e.abs().max()
        assert (g - e).abs().max() <= allowed, f"gradient of input {position}"


@pytest.mark.parametrize("name", PUBLIC)
def test_gradcheck(name: str) -> None:
    function, inputs = PUBLIC[name]
    # Central differences in float64 err by about eps^2 plus 1e-16 / eps, times the inputs' curvature: 1e-5 leaves room for that alone.
    assert torch.autograd.gradcheck(function, tuple(tensor.clone().requires_grad_() for tensor in inputs), eps=1e-7, atol=1e-5)


def _second(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """The gradients of a penalty on all first gradients."""
    leaves = [tensor.to(device=device, dtype=dtype).detach().requires_grad_() for tensor in inputs]
    first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
    return torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), leaves, materialize_grads=True)


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize(("backend", "context", "device"), list(_backends()))
def test_second_derivatives(name: str, backend: str, context: Context, device: torch.device) -> None:
    function, inputs = PUBLIC[name]
    sample = next(OPS["decode"].samples(device, torch.float32, torch.Generator()))
    row = next(row for row in OPS["decode"].rows if row.backend == backend)
    if (reason := row.reason(sample)) is not None:
        pytest.skip(reason)
    with context(), fastsae.use_backend(f"{backend},*"):
        got = _second(function, inputs, torch.float32, device)
    # torch's segment_reduce has no second derivative: there it is what gradgradcheck holds.
    plain = function if name == "decode_ragged" else _reference_values(name) or function
    with fastsae.use_backend("reference"):
        exact = _second(plain, inputs, torch.float64, torch.device("cpu"))
    for position, (g, e) in enumerate(zip(got, exact, strict=True)):
        # Float32 sums over the square of the inputs, whose terms cancel: 2^9 units of the largest.
        assert (g.to(e.device) - e).abs().max() <= 2**9 * torch.finfo(torch.float32).eps * e.abs().max(), f"of input {position}"


@pytest.mark.parametrize("name", PUBLIC)
def test_second_derivatives_in_float64(name: str) -> None:
    function, inputs = PUBLIC[name]
    if name == "decode_ragged" or (reference := _reference_values(name)) is None:
        leaves = tuple(tensor.clone().requires_grad_() for tensor in inputs)
        assert torch.autograd.gradgradcheck(function, leaves, eps=1e-7, atol=1e-5, fast_mode=True)
        return
    cpu = torch.device("cpu")
    for a, b in zip(_second(function, inputs, torch.float64, cpu), _second(reference, inputs, torch.float64, cpu), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PUBLIC)
def test_batched_gradients(name: str, dtype: torch.dtype) -> None:
    """``is_grads_batched``, which ``torch.autograd.functional.jacobian(vectorize=True)`` and ``hessian`` use."""
    function, inputs = PUBLIC[name]
    leaves = [tensor.to(dtype).detach().requires_grad_() for tensor in inputs]
    result = function(*leaves)
    seeds = _t(3, max(result.numel(), 1)).to(dtype).reshape(3, *result.shape)
    for create in (False, True):
        got = torch.autograd.grad(result, leaves, seeds, is_grads_batched=True, retain_graph=True, create_graph=create)
        each = [torch.autograd.grad(result, leaves, seed, retain_graph=True) for seed in seeds]
        for a, want in zip(got, zip(*each, strict=True), strict=True):
            torch.testing.assert_close(a, torch.stack(want), rtol=1e-5, atol=1e-5)


VMAPPED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "encode_topk": lambda x, W: fastsae.encode_topk(x, W, k=3).values,
    "encode_topk_indices": lambda x, W: fastsae.encode_topk(x, W, k=3).indices,
    "encode_threshold": lambda x, W: fastsae.encode_threshold(x, W, capacity=200).values,
    "encode_batch_topk": lambda x, W: fastsae.encode_batch_topk(x, W, k=2)[1],
    "decode": lambda x, W: fastsae.decode(fastsae.TopKLatents(x[:, :5], _INDICES, 23), W),
    "select_topk": lambda x, W: fastsae.ops.select.select_topk(x, k=2).values,
    "match_cosine": lambda x, W: fastsae.match_cosine(x, W, k=2).similarity,
    "spline_code": lambda x, W: fastsae.spline_code(x, W),
    "spline_hash": lambda x, W: fastsae.spline_hash(x, W),
    "pack_signs": lambda x, W: fastsae.codes.pack_signs(x),
    "hash_signs": lambda x, W: fastsae.codes.hash_signs(x),
    "hash_code": lambda x, W: fastsae.codes.hash_code(fastsae.codes.pack_signs(x)),
}


@pytest.mark.parametrize("name", VMAPPED)
def test_vmap(name: str) -> None:
    """One call for each member where nothing requires a gradient; derivatives inside torch.func are refused (test_errors.py)."""
    x, W = _t(4, 6, 7).float(), _t(23, 7).float()
    with torch.no_grad():
        got = torch.func.vmap(VMAPPED[name], in_dims=(0, None))(x, W)
    assert torch.equal(got, torch.stack([VMAPPED[name](part, W) for part in x]))


def _reference_values(name: str) -> Callable[..., Any] | None:
    """The operation's reference on the same inputs, under autograd."""
    index = {"decode": _INDICES, "ragged": _INDICES.flatten()}
    return {
        "encode_topk": lambda x, W, b, b_pre, scale: OPS["encode_topk"].reference(x, W, b, b_pre, scale, None, None, 4, True)[0],
        "encode_topk_signed_subset": lambda x, W, b: OPS["encode_topk"].reference(
            x, W, b, None, None, torch.arange(0, 23, 2), None, 11, False
        )[0],
        "encode_topk_absolute": lambda x, W, b, b_pre, scale: OPS["encode_topk"].reference(
            x, W, b, b_pre, scale, None, None, 6, False, True
        )[0],
        "encode_threshold": lambda x, W, b, b_pre, scale: OPS["encode_threshold"].reference(
            x, W, b, b_pre, scale, None, None, torch.tensor(0.3, dtype=torch.float64), None
        )[0],
        "encode_batch_topk": lambda x, W, b, b_pre, scale: OPS["encode_batch_topk"].reference(x, W, b, b_pre, scale, None, None, 3.5)[0],
        "encode_gated": lambda x, W, r_mag, b_pre, b_mag: OPS["encode_gated"].reference(
            x, W, torch.linspace(-1, 1, 23, dtype=torch.float64), r_mag, b_mag, b_pre, None
        )[0],
        "decode": lambda values, W, b: OPS["decode"].reference(values, index["decode"], None, W, b),
        "decode_ragged": lambda values, W, b: (
            OPS["decode"].reference(values.flatten(), index["ragged"], torch.tensor([0, 3, 3, 20, 30]), W, b).reshape(2, 2, 7)
        ),
        "select_topk": lambda z: OPS["select_topk"].reference(z, 5, True)[0],
        "match_cosine": lambda a, b: OPS["match_cosine"].reference(a, b, 3, True, False, 1e-8)[0],
    }.get(name)


@pytest.mark.parametrize("name", [name for name in PUBLIC if _reference_values(name) is not None])
def test_gradients_equal_autograd_of_the_reference(name: str) -> None:
    function, inputs = PUBLIC[name]
    cpu = torch.device("cpu")
    ours = _gradients(function, inputs, torch.float64, cpu, False)
    reference = _reference_values(name)
    assert reference is not None
    for a, b in zip(ours, _gradients(reference, inputs, torch.float64, cpu, False), strict=True):
        # Float64 sums of a few dozen terms in another order.
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in ("encode_threshold", "encode_batch_topk", "encode_gated")])
def test_compiles_without_graph_breaks(name: str) -> None:
    function, inputs = PUBLIC[name]
    cpu = torch.device("cpu")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        _gradients(function, inputs, torch.float32, cpu, False), _gradients(compiled, inputs, torch.float32, cpu, False), strict=True
    ):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match=r"double backward|create_graph=False"):
        _second(compiled, inputs, torch.float32, cpu)


def _ragged_sum(function: Callable[..., Any]) -> Callable[..., Tensor]:
    def run(x: Tensor, W: Tensor, W_dec: Tensor) -> Tensor:
        return fastsae.decode(function(x, W), W_dec)

    return run


RAGGED = {
    "encode_threshold": lambda x, W: fastsae.encode_threshold(x, W, threshold=0.1),
    "encode_threshold_bandwidth": lambda x, W: fastsae.encode_threshold(x, W, threshold=0.1, bandwidth=0.2)[0],
    "encode_batch_topk": lambda x, W: fastsae.encode_batch_topk(x, W, k=3)[0],
    "encode_gated": lambda x, W: fastsae.encode_gated(x, W, b_gate=W[:, 0], r_mag=W[:, 1], b_mag=W[:, 2]),
}


@pytest.mark.parametrize("name", RAGGED)
def test_ragged_compiles_without_graph_breaks(name: str) -> None:
    function = _ragged_sum(RAGGED[name])
    inputs = (_t(6, 7), _t(23, 7), _t(23, 7, seed=5))
    cpu = torch.device("cpu")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        _gradients(function, inputs, torch.float32, cpu, False), _gradients(compiled, inputs, torch.float32, cpu, False), strict=True
    ):
        torch.testing.assert_close(a, b)


CODES = {
    "spline_code": lambda x, W: fastsae.spline_code(x, W),
    "spline_hash": lambda x, W: fastsae.spline_hash(x, W, bits=128, seed=2**63),
    "pack_signs": lambda x, W: fastsae.codes.pack_signs(x),
    "hash_signs": lambda x, W: fastsae.codes.hash_signs(x),
    "hash_code": lambda x, W: fastsae.codes.hash_code(fastsae.codes.pack_signs(x)),
    "hamming": lambda x, W: fastsae.codes.hamming(fastsae.codes.pack_signs(x), fastsae.codes.pack_signs(W)),
    "hamming_topk": lambda x, W: fastsae.codes.hamming_topk(fastsae.codes.pack_signs(x), fastsae.codes.pack_signs(W), 3),
    "count_codes": lambda x, W: fastsae.codes.count_codes(fastsae.codes.hash_signs(x)),
    "combine_hashes": lambda x, W: fastsae.codes.combine_hashes([fastsae.codes.hash_signs(x), fastsae.codes.hash_signs(-x, layer=1)]),
    "boundary_density": lambda x, W: fastsae.codes.boundary_density(fastsae.codes.pack_signs(x), fastsae.codes.pack_signs(-x), x, x + 1),
}


@pytest.mark.parametrize("name", CODES)
def test_codes_compile_without_graph_breaks(name: str) -> None:
    torch._dynamo.reset()
    x, W = _t(6, 7).float(), _t(23, 7).float()
    compiled = torch.compile(CODES[name], fullgraph=True, backend="aot_eager")
    for a, b in zip(_tensors(CODES[name](x, W)), _tensors(compiled(x, W)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    from torch._inductor import config

    torch._dynamo.reset()
    function, inputs = PUBLIC["reconstruct"]
    cpu = torch.device("cpu")
    compiled = torch.compile(function, fullgraph=True)
    expected = _gradients(function, inputs, torch.float32, cpu, False)
    with config.patch(compile_threads=1):  # no processes of its own for two kernels
        got = _gradients(compiled, inputs, torch.float32, cpu, False)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b)
