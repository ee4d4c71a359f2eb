"""``fastsae.functional``: plain tuples of the bits that the other interface returns, reasons without waiting, found without importing."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from torch import Tensor

import fastsae
from fastsae import functional as F
from fastsae import optim


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


X, W, W_DEC, B, NORMS = draw(2, 3, 8), draw(12, 8), draw(12, 5), draw(12), draw(12).abs()
GATES = {"b_gate": B, "r_mag": B, "b_mag": B}
GRAD = draw(2, 3, 5)
WORDS = torch.arange(10).reshape(5, 2)
TOPK, RAGGED = fastsae.encode_topk(X, W, B, k=3), fastsae.encode_threshold(X, W, B)
SLOTS, COLUMNS = (TOPK.values, TOPK.indices), (RAGGED.values, RAGGED.col)
PADDED = fastsae.encode_threshold(X, W, B, capacity=60)
STATE = (W, draw(12, 8), draw(12, 8).square())


def leaves(result: Any) -> list[Tensor]:
    if isinstance(result, fastsae.TopKLatents):
        return [result.values, result.indices]
    if isinstance(result, fastsae.RaggedLatents):
        return [result.values, result.col, result.crow]
    return [result] if isinstance(result, Tensor) else [leaf for part in result for leaf in leaves(part)]


def stepped(step: Callable[..., None], *gradient: Any, **slots: Any) -> tuple[Tensor, ...]:
    state = tuple(t.clone() for t in STATE)
    step(*state, *gradient, **slots, step=2)
    return state


def row_gradient(latents: Any, crow: Tensor | None) -> optim.RowGradient:
    return optim.RowGradient(*leaves(latents)[:2], crow, X.flatten(0, 1), 12)


FLAT = fastsae.encode_topk(X.flatten(0, 1), W, B, k=3)
CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "encode_topk": (
        lambda: F.encode_topk(X, W, B, k=3, scale=NORMS, relu=False, index_dtype=torch.int32),
        lambda: fastsae.encode_topk(X, W, B, k=3, scale=NORMS, relu=False, index_dtype=torch.int32),
    ),
    "encode_threshold": (lambda: F.encode_threshold(X, W, B, threshold=0.1), lambda: fastsae.encode_threshold(X, W, B, threshold=0.1)),
    "encode_threshold, l0": (lambda: F.encode_threshold(X, W, bandwidth=0.5), lambda: fastsae.encode_threshold(X, W, bandwidth=0.5)),
    "encode_batch_topk": (lambda: F.encode_batch_topk(X, W, B, k=2.5), lambda: fastsae.encode_batch_topk(X, W, B, k=2.5)),
    "encode_gated": (lambda: F.encode_gated(X, W, **GATES), lambda: fastsae.encode_gated(X, W, **GATES)),
    "select_topk": (lambda: F.select_topk(X @ W.T, k=3), lambda: fastsae.ops.select.select_topk(X @ W.T, k=3)),
    "decode": (lambda: F.decode(*SLOTS, W_DEC, draw(5)), lambda: fastsae.decode(TOPK, W_DEC, draw(5))),
    "decode, ragged": (
        lambda: F.decode(*COLUMNS, W_DEC, crow=RAGGED.crow),
        lambda: fastsae.decode(RAGGED, W_DEC).flatten(0, 1),
    ),
    "decode, padded": (
        lambda: F.decode(PADDED.values, PADDED.col, W_DEC, crow=PADDED.crow, padded=True),
        lambda: fastsae.decode(PADDED, W_DEC).flatten(0, 1),
    ),
    "decode, several": (
        lambda: F.decode(*SLOTS, torch.stack([W_DEC, W_DEC]), prefixes=[4, 12]),
        lambda: fastsae.decode(TOPK, torch.stack([W_DEC, W_DEC]), prefixes=[4, 12]),
    ),
    "decode_backward": (
        lambda: F.decode_backward(GRAD, *SLOTS, W_DEC),
        lambda: fastsae.ops.decode.decode_backward(GRAD, TOPK, W_DEC),
    ),
    "decode_backward, ragged": (
        lambda: F.decode_backward(GRAD.flatten(0, 1), *COLUMNS, W_DEC, crow=RAGGED.crow),
        lambda: fastsae.ops.decode.decode_backward(GRAD, RAGGED, W_DEC),
    ),
    "adam_": (lambda: stepped(F.adam_, W), lambda: stepped(optim.adam_, W)),
    "adam_, slots": (
        lambda: stepped(F.adam_, X.flatten(0, 1), values=FLAT.values, indices=FLAT.indices),
        lambda: stepped(optim.adam_, row_gradient(FLAT, None)),
    ),
    "adam_, ragged": (
        lambda: stepped(F.adam_, X.flatten(0, 1), values=RAGGED.values, indices=RAGGED.col, crow=RAGGED.crow),
        lambda: stepped(optim.adam_, row_gradient(RAGGED, RAGGED.crow)),
    ),
    "match_cosine": (lambda: F.match_cosine(W, W[:7], k=2, absolute=True), lambda: fastsae.match_cosine(W, W[:7], k=2, absolute=True)),
    "spline_code": (lambda: F.spline_code(X, W, B), lambda: fastsae.spline_code(X, W, B)),
    "spline_hash": (lambda: F.spline_hash(X, W, B, layer=2), lambda: fastsae.spline_hash(X, W, B, layer=2)),
    "pack_signs": (lambda: F.pack_signs(X), lambda: fastsae.codes.pack_signs(X)),
    "hash_signs": (lambda: F.hash_signs(X, bits=128), lambda: fastsae.codes.hash_signs(X, bits=128)),
    "hash_code": (lambda: F.hash_code(WORDS), lambda: fastsae.codes.hash_code(WORDS)),
    "hamming": (lambda: F.hamming(WORDS, WORDS), lambda: fastsae.codes.hamming(WORDS, WORDS)),
    "hamming_topk": (lambda: F.hamming_topk(WORDS, WORDS, 2), lambda: fastsae.codes.hamming_topk(WORDS, WORDS, 2)),
    "count_codes": (lambda: F.count_codes(WORDS), lambda: fastsae.codes.count_codes(WORDS)),
}
OPERATIONS = [name for name in F.__all__ if name not in ("API", "refuses", "require")]


@pytest.mark.parametrize("case", CASES)
def test_plain_tuples_of_the_same_bits(case: str) -> None:
    ours, other = (call() for call in CASES[case])
    assert type(ours) in (tuple, Tensor)
    assert all(type(part) is Tensor for part in ours)
    for a, b in zip(leaves(ours), leaves(other), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


def test_every_operation_is_here() -> None:
    assert {case.split(",")[0] for case in CASES} == set(OPERATIONS)
    assert set(F._CALLS) == set(OPERATIONS)
    for name in OPERATIONS:
        text = " ".join(map(str, inspect.get_annotations(getattr(F, name)).values()))
        assert "Latents" not in text and "RowGradient" not in text, f"{name} is not of tensors alone"


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(TypeError, match=r"^decode: W_dec must be a torch\.Tensor, got int"):
        F.decode(*SLOTS, 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"^decode_backward: crow must have dtype int64, got float32"):
        F.decode_backward(GRAD, *COLUMNS, W_DEC, crow=RAGGED.crow.float())
    with pytest.raises(ValueError, match=r"^decode: W_dec must"):
        F.decode(*SLOTS, W_DEC[0])
    with pytest.raises(ValueError, match=r"^adam_: values and indices must be given together, got values alone"):
        F.adam_(*STATE, W, values=W, step=1)


def test_gradients_and_compilation() -> None:
    def step(x: Tensor, W: Tensor, W_dec: Tensor) -> Tensor:
        if F.refuses("encode_topk", x, W, k=3) is not None:
            return x.sum()
        values, indices = F.encode_topk(x, W, k=3)
        values2, col, crow = F.encode_threshold(x, W, threshold=0.5)
        return F.decode(values, indices, W_dec).square().sum() + F.decode(values2, col, W_dec, crow=crow).square().sum()

    def other(x: Tensor, W: Tensor, W_dec: Tensor) -> Tensor:
        topk, ragged = fastsae.encode_topk(x, W, k=3), fastsae.encode_threshold(x, W, threshold=0.5)
        return fastsae.decode(topk, W_dec).square().sum() + fastsae.decode(ragged, W_dec).square().sum()

    results = []
    for run in (other, step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        inputs = [t.clone().requires_grad_() for t in (X.flatten(0, 1), W, W_DEC)]
        run(*inputs).backward()
        results.append([t.grad for t in inputs])
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            assert a is not None and torch.equal(a, b)


# ---------------------------------------------------------------- reasons

CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "encode_topk": ((X, W, B), {"k": 3, "scale": NORMS, "features": B > 0, "absolute": True}),
    "encode_threshold": ((X, W, B), {"threshold": B, "bandwidth": 0.1, "capacity": 40}),
    "encode_batch_topk": ((X, W, B), {"k": 2.5, "b_pre": X[0, 0]}),
    "encode_gated": ((X, W), GATES),
    "select_topk": ((X,), {"k": 3}),
    "decode": ((*SLOTS, W_DEC), {}),
    "decode_backward": ((GRAD, *SLOTS, W_DEC), {"out": W_DEC}),
    "adam_": ((*STATE, X.flatten(0, 1)), {"values": FLAT.values.bfloat16(), "indices": FLAT.indices, "step": 1, "lr": 0.1}),
    "match_cosine": ((W, W), {"k": 2, "exclude_self": True}),
    "spline_code": ((X, W, B), {"neurons": B > 0}),
    "spline_hash": ((X, W, B), {"seed": 3}),
    "pack_signs": ((X > 0,), {}),
    "hash_signs": ((X,), {"layer": 1}),
    "hash_code": ((WORDS,), {}),
    "hamming": ((WORDS, WORDS), {}),
    "hamming_topk": ((WORDS, WORDS, 2), {}),
    "count_codes": ((WORDS,), {}),
}
ALONE = {"count_codes": "count_codes has no row but the reference", "select_topk": "cuda: "}


@pytest.mark.parametrize("op", OPERATIONS)
def test_what_a_cpu_serves(op: str) -> None:
    args, options = CALLS[op]
    reason = F.refuses(op, *args, **options)
    if op in ALONE:
        assert reason is not None and reason.startswith(ALONE[op])
    else:
        assert reason is None


@pytest.mark.parametrize("op", OPERATIONS)
def test_what_a_gpu_serves_without_waiting(op: str) -> None:
    args, options = CALLS[op]
    with FakeCuda(cuda_module=True) as gpu:
        args, options = tuple(map(gpu.like, args)), {name: gpu.like(value) for name, value in options.items()}
        gpu.forget()
        assert F.refuses(op, *args, **options) == (ALONE[op] if op == "count_codes" else None)
        mixed = F.refuses(op, args[0], torch.ones(2, 2), *args[2:], **options)
        assert op in ("select_topk", "pack_signs", "hash_signs", "hash_code", "count_codes") or str(mixed).startswith("tensors on cuda")
        assert (gpu.syncs, gpu.copies, gpu.launches, gpu.calls) == ([], [], [], [])


def double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and (value.is_floating_point() or value.dtype is torch.bool) else value


@pytest.mark.parametrize(
    "op",
    [
        "encode_topk",
        "encode_threshold",
        "encode_batch_topk",
        "encode_gated",
        "select_topk",
        "decode",
        "match_cosine",
        "spline_code",
        "spline_hash",
        "pack_signs",
        "hash_signs",
    ],
)
def test_the_reasons_are_those_of_the_table(op: str) -> None:
    args, options = tuple(map(double, CALLS[op][0])), {name: double(value) for name, value in CALLS[op][1].items()}
    options.pop("features", None)
    options.pop("neurons", None)
    with pytest.raises(fastsae.BackendError) as refused:
        getattr(F, op)(*args, **options, backend="cpu")
    lines = [line.split(maxsplit=1) for line in str(refused.value).splitlines()[2:-1]]
    rows = "; ".join(f"{backend}: {why}" for backend, why in lines if backend != "reference" and "has no implementation" not in why)
    assert F.refuses(op, *args, **options) == rows


def test_autocast_and_layouts() -> None:
    half = W.bfloat16()
    assert F.refuses("encode_topk", X, half, k=3) == "mixed dtypes: bfloat16 and float32"
    assert "float64 of b" in str(F.refuses("encode_topk", X, W, b_enc=B.double(), k=3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.refuses("encode_topk", X, half, B, k=3) is None
        F.encode_topk(X, half, B, k=3)
        assert F.refuses("encode_topk", X.double(), W.double(), k=3) is not None
        assert F.refuses("encode_topk", X.double(), W, k=3) == "mixed dtypes: bfloat16 and float64"
    with FakeCuda() as gpu:
        x, w = gpu.tensor((4, 8)), gpu.tensor((12, 8), torch.bfloat16, transposed=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert F.refuses("encode_topk", x, w, k=3) is None
        assert "stride 1" in str(F.refuses("select_topk", gpu.tensor((4, 8), transposed=True), k=3))
    assert "stride 1" in str(F.refuses("pack_signs", X.mT))
    assert F.refuses("pack_signs", X[:, :2]) is None
    assert "k 4096" in str(F.refuses("select_topk", X, k=4096)) or "device cpu" in str(F.refuses("select_topk", X, k=4096))


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("encode_newer", X), "has no operation 'encode_newer'"),
        (("encode_topk", X), "1 tensors"),
        (("encode_topk", X, None), "argument 1 is NoneType"),
        (("encode_topk", X, W.to_sparse()), "argument 1 is torch.sparse_coo"),
        (("encode_topk", X, W[0]), r"argument 1 has shape \[8\] \(supported: 2 dimensions\)"),
        (("encode_topk", X.long(), W.long()), "dtype int64"),
        (("hamming", W, W), r"dtype float32 \(supported: int64\)"),
        (("encode_topk", X[0, 0, 0], W), r"argument 0 has shape \[\]"),
        (("encode_topk", X.to("meta"), W), "tensors on meta and cpu"),
    ],
)
def test_a_malformed_call_is_refused_not_raised(args: tuple[Any, ...], reason: str) -> None:
    assert re.search(reason, str(F.refuses(*args)))


# ---------------------------------------------------------------- versions, finding, importing


def test_the_version_is_asked_for() -> None:
    assert F.require(api=F.API) is F
    with pytest.raises(ImportError, match=r"fastsae\.functional is API 1, and API 2 was asked for"):
        F.require(api=2)


def test_a_library_finds_it_without_importing_it() -> None:
    found = importlib.metadata.entry_points(group="sae.backends")["fastsae"]
    assert found.value == "fastsae.functional"
    assert found.load().require(api=1) is F


def test_importing_is_silent_and_light() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); from fastsae import functional\n"
        "heavy = {'triton', 'scipy', 'matplotlib', 'pandas', 'transformers', 'fastsae._C', 'fastsae.kernels', 'fastsae.native'}\n"
        "assert not heavy & (set(sys.modules) - before), heavy & (set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
