"""Bad input to every operation: the right exception, and a message that names the argument, what came and what was expected.

Checks are the public operation's, so they hold for every backend; indices are checked by each CPU backend. A wrong device is a meta
tensor beside CPU ones.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from error_cases import ROWS, VALID, D, F, call, draw, rejects
from torch import Tensor
from torch.utils import _pytree as pytree

import fastsae
from fastsae.dispatch import OPS


def tensors(op: str) -> list[str]:
    return [name for name, value in VALID[op].items() if isinstance(value, Tensor)]


WRONG_DTYPES = (torch.int64, torch.int32, torch.uint8, torch.complex64, torch.float8_e4m3fn, torch.float32, torch.bool)
TENSORS = [pytest.param(op, name, id=f"{op}-{name}") for op in VALID for name in tensors(op)]
SEVERAL = [p for p in TENSORS if len(tensors(p.values[0])) > 1]
OF_ONE_DTYPE = [p for p in SEVERAL if not str(p.values[0]).startswith("hamming") and p.values[0] != "match"]  # match widens


@pytest.mark.parametrize("op", VALID)
def test_the_valid_arguments_are_valid(op: str) -> None:
    call(op)


def test_every_registered_operation_is_covered() -> None:
    composed = {
        "adam": "adam_",
        "grad_squares": "adam_",
        "decode_dvalues": "decode_backward",
        "decode_dweight": "decode_backward",
        "match_pair": "match",
        "topk_changes": "encode_topk",  # reached through polytopes.dictionary_crossings, whose errors tests/science has
        "signum": "adam_",  # reached through optim.Signum, which checks a gradient as adam_ does
    }
    assert {composed.get(name, name) for name in OPS} <= set(VALID)


# ---------------------------------------------------------------- tensors of every operation

INNER = {"reconstruct": r"(reconstruct|encode_topk|decode)", "decode_backward": "decode_backward", "match": "match"}


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_what_is_no_tensor(op: str, name: str) -> None:
    wrong: list[Any] = [[1.0, 2.0]]
    if (op, name) not in (("encode_threshold", "threshold"), ("match", "a"), ("match", "b")):
        wrong.append(3.0)
    for value in wrong:
        kind = "must be a (torch.Tensor|tensor|number)"
        rejects(TypeError, rf"^{INNER.get(op, op)}: {name} {kind}.*, got {type(value).__name__}", op, **{name: value})


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_wrong_dtype(op: str, name: str) -> None:
    value = VALID[op][name]
    allowed = (value.dtype, torch.bool) if op in ("pack_signs", "hash_signs") else (value.dtype,)
    for dtype in WRONG_DTYPES:
        if dtype not in allowed:
            got = str(dtype).removeprefix("torch.")
            rejects(
                TypeError, rf"^{INNER.get(op, op)}: {name} must have dtype .*, got {got}$", op, **{name: torch.zeros(value.shape).to(dtype)}
            )


@pytest.mark.parametrize(("op", "name"), OF_ONE_DTYPE)
def test_mixed_dtypes(op: str, name: str) -> None:
    # float64 beside float32, and half precision beside float32, for every argument.
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        with pytest.raises(TypeError, match=r"must have (the )?dtype .*(got|float32)"):
            call(op, **{name: VALID[op][name].to(dtype)})


@pytest.mark.parametrize(("op", "name"), SEVERAL)
def test_wrong_device(op: str, name: str) -> None:
    # Each tensor alone on another device; the message names the first that differs from the one before it.
    with pytest.raises(
        TypeError, match=rf"^{INNER.get(op, op)}: [a-zA-Z_.]+ must be on (meta|cpu) like the other tensors, got (meta|cpu)$"
    ):
        call(op, **{name: VALID[op][name].to("meta")})


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_sparse_layouts(op: str, name: str) -> None:
    rejects(
        TypeError,
        rf"^{INNER.get(op, op)}: {name} must be a dense \(strided\) tensor, got layout torch.sparse_coo$",
        op,
        **{name: VALID[op][name].to_sparse()},
    )


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_wrong_sizes(op: str, name: str) -> None:
    """One element more or fewer along each dimension, and size 1 where torch would broadcast."""
    value = VALID[op][name]
    free = {
        # dimensions that nothing else fixes
        **{(o, "x"): 1 for o in VALID},
        ("encode_topk", "W_enc"): 0,
        ("encode_pursuit", "W"): 0,
        ("match_cosine", "a"): 1,
        ("match_cosine", "b"): 1,
        ("match", "a"): 1,
        ("match", "b"): 1,
        ("hamming_topk", "a"): 1,
        ("hamming_topk", "b"): 1,
    }
    alone = op in ("select_topk", "pack_signs", "hash_signs", "hash_code", "count_codes", "neighbour_graph")
    for dim in range(value.dim()):
        if alone or ((op, name) in free and op not in ("decode", "reconstruct") and dim == 0):
            continue
        for size in (value.shape[dim] + 1, value.shape[dim] - 1, 1):
            shape = [size if d == dim else s for d, s in enumerate(value.shape)]
            with pytest.raises(ValueError, match=rf"^{INNER.get(op, op)}: .*got \[") as caught:
                call(op, **{name: torch.zeros(shape, dtype=value.dtype)})
            assert type(caught.value) is ValueError


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_wrong_number_of_dimensions(op: str, name: str) -> None:
    value = VALID[op][name]
    batched = name in ("x", "z", "words", "grad", "target")
    wrong = [torch.zeros((), dtype=value.dtype)] if (op, name) != ("encode_threshold", "threshold") else []
    if not batched and (op, name) not in (("decode", "W_dec"), ("reconstruct", "W_dec")):
        wrong.append(value.unsqueeze(0))
    for bad in wrong:
        with pytest.raises(ValueError, match=rf"^{INNER.get(op, op)}: .*got \["):
            call(op, **{name: bad})


@pytest.mark.parametrize("op", VALID)
def test_arguments_that_require_gradients_and_inference_mode_are_fine(op: str) -> None:
    floats = {
        name: VALID[op][name].clone().requires_grad_() for name in tensors(op) if VALID[op][name].is_floating_point() and name != "out"
    }
    call(op, **floats)
    with torch.inference_mode():
        call(op)


# ---------------------------------------------------------------- numbers


def integers() -> Iterator[Any]:
    for op, name, low, high in (
        ("encode_topk", "k", 1, F),
        ("match_cosine", "k", 1, 7),
        ("match", "candidates", 1, None),
        ("hamming_topk", "k", 1, 5),
        ("select_topk", "k", 1, 12),
        ("neighbour_graph", "k", 1, 4),
        ("spline_keys", "n_neurons", 0, 2**32 - 1),
        *((op, "layer", 0, 2**32 - 1) for op in ("spline_hash", "hash_signs", "hash_code", "spline_keys")),
        *((op, "seed", 0, 2**64 - 1) for op in ("spline_hash", "hash_signs", "hash_code", "spline_keys")),
    ):
        yield pytest.param(op, name, low, high, id=f"{op}-{name}")


@pytest.mark.parametrize(("op", "name", "low", "high"), list(integers()))
def test_integers(op: str, name: str, low: int, high: int | None) -> None:
    for wrong in (True, False, 2.0, "2", None, torch.tensor(2)):
        rejects(TypeError, rf"^{op}: {name} must be an int, got {type(wrong).__name__}$", op, **{name: wrong})
    for wrong in (np.bool_(True), np.float64(2.0), np.array([2])):
        rejects(TypeError, rf"^{op}: {name} must be an int, got numpy.{type(wrong).__name__}$", op, **{name: wrong})
    want = pytree.tree_leaves(call(op, **{name: 2}))
    for number in (np.int64(2), np.int32(2), np.uint8(2), np.array(2)):
        got = pytree.tree_leaves(call(op, **{name: number}))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True) if isinstance(b, Tensor))
    for wrong in (low - 1, -(10**30), *(() if high is None else (high + 1, 10**30))):
        rejects(ValueError, rf"^{op}: {name} must be at least {low}.*, got {wrong}$", op, **{name: wrong})
    call(op, **{name: low})
    if high is not None and high < 1000:
        call(op, **{name: high})


@pytest.mark.parametrize(
    ("op", "name"), [("encode_batch_topk", "k"), ("encode_threshold", "bandwidth"), ("match_cosine", "eps"), ("match", "eps")]
)
def test_positive_numbers(op: str, name: str) -> None:
    for wrong in (True, "2", torch.tensor(2.0), *(() if name == "bandwidth" else (None,))):
        rejects(TypeError, rf"^{op}: {name} must be a number, got {type(wrong).__name__}$", op, **{name: wrong})
    for wrong in (0, 0.0, -1, -1e-9, float("nan"), float("inf")):
        rejects(ValueError, rf"^{op}: {name} must be a finite number above 0, got {wrong}$", op, **{name: wrong})


def test_thresholds() -> None:
    for wrong in (True, "2", None):
        rejects(TypeError, rf"threshold must be a number, got {type(wrong).__name__}$", "encode_threshold", threshold=wrong)
    for wrong in (float("nan"), float("inf")):
        rejects(ValueError, "threshold must be a finite number, got", "encode_threshold", threshold=wrong)
    rejects(
        TypeError, "threshold must have dtype float32, got float64", "encode_threshold", threshold=torch.tensor(0.1, dtype=torch.float64)
    )
    rejects(ValueError, r"threshold must have shape \[F=12\], got \[1\]", "encode_threshold", threshold=torch.ones(1))


ODD = (
    *(1e300, -1e300, 1e39, 5e-324, 1e-300, -0.0, 0.0, -1.0, float("inf"), -float("inf"), float("nan"), True, None, "2", 2 + 0j),
    *(-1, -(2**63), 2**32, 2**62, 2**63, 2**64, 10**400, torch.tensor(2), torch.tensor(0.5), torch.tensor([2])),
    *(
        np.int64(2),
        np.uint8(2),
        np.float32(0.5),
        np.float16(0.5),
        np.float64(0.5),
        np.array(2),
        np.array(0.5),
        np.array([2]),
        np.bool_(True),
    ),
)
NUMBERS = {
    **dict.fromkeys(("encode_topk", "select_topk", "hamming_topk"), ("k",)),
    "encode_threshold": ("threshold", "bandwidth", "capacity"),
    "encode_batch_topk": ("k", "capacity"),
    "encode_gated": ("capacity",),
    "match_cosine": ("k", "eps"),
    "match": ("candidates", "eps"),
    "near_zero_counts": ("eps",),
    "neighbour_graph": ("k", "zero"),
    **dict.fromkeys(("spline_hash", "hash_signs", "hash_code"), ("layer", "seed", "bits")),
    "spline_keys": ("layer", "seed"),
    "adam_": ("step", "lr", "eps", "weight_decay"),
}


@pytest.mark.parametrize(("op", "name"), [pytest.param(op, name, id=f"{op}-{name}") for op in NUMBERS for name in NUMBERS[op]])
def test_odd_numbers(op: str, name: str) -> None:
    """A result, or an error of the operation itself that names the argument: never one from further below."""
    for value in ODD:
        if name == "capacity" and value is ODD[17]:
            continue  # that many slots are just what was asked for
        for backend in (None, "reference"):
            more = {} if op in ("match", "spline_keys", "near_zero_counts") else {"backend": backend}
            try:
                call(op, **{name: value}, **more)
            except (TypeError, ValueError) as error:
                assert str(error).startswith(f"{op}: {name} "), (value, error)  # noqa: PT017


def _sae(activation: Any = fastsae.TopK(2), **options: Any) -> Any:  # noqa: B008 (a frozen dataclass)
    """An SAE that has been through everything that takes its numbers."""
    made, x = fastsae.SAE(D, F, activation, seed=0, **options), draw(ROWS, D)
    made.loss(x).loss.backward()
    made(x)
    fastsae.optim.Adam(made, lr=1e-3).step(x)
    json.dumps(made.config())
    return made


def _optimiser(kind: Any, **options: Any) -> None:
    opt = kind(fastsae.SAE(D, F, fastsae.TopK(2), seed=0), **options)
    opt.step(draw(ROWS, D))
    saved = io.BytesIO()
    torch.save(opt.state_dict(), saved)
    saved.seek(0)
    torch.load(saved, weights_only=True)  # numbers of Python only


def _annealed(k: Any) -> None:
    made = fastsae.SAE(D, F, fastsae.TopK(2), seed=0)
    made.k = k


OWNERS: dict[str, Any] = {
    "TopK": lambda v: _sae(fastsae.TopK(v)),
    "BatchTopK": lambda v: _sae(fastsae.BatchTopK(v)),
    "rate": lambda v: _sae(fastsae.BatchTopK(2, v)),
    "threshold": lambda v: _sae(fastsae.JumpReLU(v)),
    "bandwidth": lambda v: _sae(fastsae.JumpReLU(0.1, v)),
    "bandwidth_dense": lambda v: _sae(fastsae.JumpReLU(0.1, v), dense=True),
    "l1": lambda v: _sae(fastsae.ReLU(), l1=v),
    "l0": lambda v: _sae(fastsae.JumpReLU(0.1, 0.1), l0=v),
    "aux_k": lambda v: _sae(aux=fastsae.AuxK(v)),
    "aux_coefficient": lambda v: _sae(aux=fastsae.AuxK(2, v)),
    "dead_after": lambda v: _sae(dead_after=v),
    "prefixes": lambda v: _sae(prefixes=[v, F]),
    "seed": lambda v: fastsae.SAE(D, F, fastsae.TopK(2), seed=v),
    "annealed": _annealed,
    "reconstruct": lambda v: fastsae.reconstruct(draw(ROWS, D), draw(F, D), draw(F, D), activation=fastsae.JumpReLU(v)),
    "decode_prefixes": lambda v: call("decode", prefixes=[v, F]),
    "adam_lr": lambda v: _optimiser(fastsae.optim.Adam, lr=v),
    "adam_betas": lambda v: _optimiser(fastsae.optim.Adam, betas=(v, 0.9)),
    "adam_clip": lambda v: _optimiser(fastsae.optim.Adam, clip=v),
    "signum_lr": lambda v: _optimiser(fastsae.optim.Signum, lr=v),
    "signum_momentum": lambda v: _optimiser(fastsae.optim.Signum, momentum=v),
    "fraction_above": lambda v: call("match").fraction_above(v),
    "accumulate": lambda v: fastsae.gradients.accumulate([{"W": draw(F, D)}], [v]),
    "schedule": lambda v: fastsae.optim.warmup_linear_decay(v, 2**63 - 1, 2**63 - 1)(3),
    "data": lambda v: fastsae.superposition.SuperpositionData(5, 4, mean_active=1, noise=v).sample(3),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("owner", OWNERS)
def test_odd_numbers_of_modules_and_optimisers(owner: str) -> None:
    for value in ODD:
        try:
            OWNERS[owner](value)
        except (TypeError, ValueError, FloatingPointError) as error:  # the last: a step that such a number makes infinite
            assert re.match(r"[A-Za-z_.]+: .*(must|got|overflows)", str(error)), (value, error)  # noqa: PT017


@pytest.mark.parametrize("backend", [None, "reference"])
def test_thresholds_beyond_float32_compare_as_they_are(backend: str | None) -> None:
    x = torch.cat([draw(ROWS, D), torch.full((1, D), 3e38), draw(1, D).mul(float("inf"))])
    for threshold, like in ((-1e300, 0.0), (-3e38, 0.0), (1e-300, 0.0)):
        got, want = (call("encode_threshold", x=x, bandwidth=None, threshold=t, backend=backend) for t in (threshold, like))
        assert torch.equal(got.values.nan_to_num(7), want.values.nan_to_num(7)) and torch.equal(got.col, want.col)
    kept = call("encode_threshold", x=x, bandwidth=None, threshold=1e300, backend=backend).values
    assert kept.numel() and not kept.isfinite().any()  # infinite and NaN scores alone


@pytest.mark.parametrize("bits", [0, 32, 96, 64.0, "64", True, None, torch.tensor(64)])
@pytest.mark.parametrize("op", ["spline_hash", "hash_signs", "hash_code"])
def test_bits(op: str, bits: Any) -> None:
    rejects(ValueError, "bits must be 64 or 128, got", op, bits=bits)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("encode_topk", "relu"),
        ("encode_topk", "absolute"),
        ("match_cosine", "absolute"),
        ("match_cosine", "exclude_self"),
        ("reconstruct", "return_latents"),
        ("neighbour_graph", "symmetric"),
    ],
)
@pytest.mark.parametrize("wrong", [1, 0.0, None, "no"])
def test_flags(op: str, name: str, wrong: Any) -> None:
    call(op, **{name: np.bool_(True)})
    if name != "relu" or wrong is not None:  # whose default goes by ``absolute``
        rejects(TypeError, rf"^{op}: {name} must be a bool, got {type(wrong).__name__}$", op, **{name: wrong})


def test_magnitudes_are_not_clamped() -> None:
    rejects(ValueError, r"^encode_topk: relu must be False with absolute, which .*, got True$", "encode_topk", relu=True, absolute=True)


@pytest.mark.parametrize("op", ["encode_topk", "encode_threshold", "encode_batch_topk", "encode_gated"])
@pytest.mark.parametrize("wrong", [torch.int16, torch.float32, "int32", int, None])
def test_index_dtype(op: str, wrong: Any) -> None:
    rejects(TypeError, rf"^{op}: index_dtype must be torch.int64 or torch.int32, got ", op, index_dtype=wrong)


def test_no_features_to_choose_k_from() -> None:
    with pytest.raises(ValueError, match="k must be at least 1 and at most 0"):
        fastsae.encode_topk(draw(3, 4), draw(0, 4), k=1)
    for features, count in ((torch.zeros(F, dtype=torch.bool), 0), (torch.tensor([3, 3, 4]), 2)):
        rejects(
            ValueError,
            rf"^encode_topk: k must be at most the number of features chosen \({count}\), got 3$",
            "encode_topk",
            features=features,
        )


def test_exclude_self_leaves_one_fewer() -> None:
    rejects(ValueError, r"k must be at least 1 and at most 6 \(M - 1 with exclude_self\), got 7", "match_cosine", k=7, exclude_self=True)
    with pytest.raises(ValueError, match="at most 0"):
        fastsae.match_cosine(draw(3, 4), draw(1, 4), exclude_self=True)


@pytest.mark.parametrize(
    ("op", "name"), [("encode_topk", "x"), ("encode_threshold", "W_enc"), ("encode_batch_topk", "b_enc"), ("encode_gated", "r_mag"),
                     ("decode", "W_dec"), ("reconstruct", "W_dec"), ("match_cosine", "a"), ("select_topk", "z")],
)  # fmt: skip
def test_derivatives_that_would_be_lost_in_silence(op: str, name: str) -> None:
    given = VALID[op][name]

    def total(value: Tensor) -> Tensor:
        return sum(leaf.sum() for leaf in pytree.tree_leaves(call(op, **{name: value})) if leaf.is_floating_point())  # pyright: ignore[reportReturnType]

    message = rf"^(encode_topk|decode|{op}): (forward-mode derivatives|derivatives inside torch.func) .* are not supported"
    for derive in (
        lambda: torch.func.jvp(total, (given,), (given,)),
        lambda: torch.func.jacfwd(total)(given),
        lambda: torch.func.grad(total)(given),
        lambda: torch.func.vmap(total)(given.expand(2, *given.shape).clone().requires_grad_()),
    ):
        with pytest.raises(NotImplementedError, match=message):
            derive()
    with torch.autograd.forward_ad.dual_level():
        total(given)  # no tangent, nothing to lose
        with pytest.raises(NotImplementedError, match=message):
            total(torch.autograd.forward_ad.make_dual(given, given))
