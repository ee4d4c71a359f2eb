"""Bad subsets, indices, latents, masks and optimiser arguments: the right exception with the right message."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from error_cases import GATES, LATENTS, OUT, ROWS, VALID, D, F, call, draw, rejects

import fastsae
from fastsae import RaggedLatents, TopKLatents

RAGGED = RaggedLatents(draw(4), torch.tensor([0, 2, 2, 3, 4]), torch.tensor([0, 11, 5, 6]), F, (2, 2))


# ---------------------------------------------------------------- subsets and indices

SUBSETS = [("encode_topk", "features"), ("encode_threshold", "features"), ("encode_batch_topk", "features")]
SUBSETS += [(op, "neurons") for op in ("spline_code", "spline_hash", "pack_signs", "hash_signs", "hash_code")]


@pytest.mark.parametrize(("op", "name"), SUBSETS)
def test_subsets(op: str, name: str) -> None:
    size = 128 if op == "hash_code" else F
    for wrong in ([1, 2], 3, slice(0, 2)):
        rejects(TypeError, rf"{name} must be a torch.Tensor, got {type(wrong).__name__}$", op, **{name: wrong})
    for dtype in (torch.float32, torch.uint8, torch.int16):
        rejects(TypeError, rf"{name} must have dtype int64, int32, bool, got ", op, **{name: torch.ones(F).to(dtype)})
    rejects(
        TypeError,
        rf"{name} must be on cpu like the other tensors, got meta",
        op,
        **{name: torch.zeros(2, dtype=torch.int64, device="meta")},
    )
    for wrong in (torch.ones(size - 1, dtype=torch.bool), torch.ones(1, dtype=torch.bool), torch.ones(1, size, dtype=torch.bool)):
        rejects(ValueError, rf"{name} must be a 1-D index or a mask", op, **{name: wrong})
    rejects(ValueError, rf"{name} must be a 1-D index or a mask", op, **{name: torch.tensor(3)})
    for wrong in (-1, size, 2**31 - 1):
        rejects(IndexError, rf"{name}.*0 <= index < {size}", op, **{name: torch.tensor([0, wrong, 1])})
        rejects(IndexError, rf"{name}.*0 <= index < {size}", op, **{name: torch.tensor([wrong], dtype=torch.int32)})


@pytest.mark.parametrize(
    "op", ["spline_code", "spline_hash", "pack_signs", "hash_signs", "hash_code", "encode_threshold", "encode_batch_topk"]
)
def test_subsets_are_checked_without_rows_too(op: str) -> None:
    first = next(iter(VALID[op]))
    name = "features" if op.startswith("encode") else "neurons"
    rejects(IndexError, "0 <= index <", op, **{first: VALID[op][first][:0], name: torch.tensor([500])})


@pytest.mark.parametrize("bad", [-1, F, 2**31 - 1])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("kind", ["topk", "ragged"])
def test_an_index_out_of_range(bad: int, index_dtype: torch.dtype, backend: str | None, kind: str) -> None:
    if kind == "topk":
        indices = LATENTS.indices.clone().to(index_dtype)
        indices[2, 1] = bad
        latents: Any = TopKLatents(LATENTS.values, indices, F)
    else:
        col = RAGGED.col.clone().to(index_dtype)
        col[2] = bad
        latents = RaggedLatents(RAGGED.values, RAGGED.crow, col, F, (4,))
    for run in (
        lambda: fastsae.decode(latents, draw(F, OUT), backend=backend),
        lambda: fastsae.ops.decode.decode_backward(draw(ROWS, OUT), latents, draw(F, OUT), backend=backend),
    ):
        with pytest.raises(IndexError, match=rf"{bad} at \[2(, 1)?\].*0 <= index < {F}"):
            run()


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("crow", [[0, 2, 2, 3, 5], [0, 2, 2, 3, 3], [1, 2, 2, 3, 4], [0, 3, 2, 3, 4], [0, -1, 2, 3, 4], [0, 9, 9, 9, 4]])
def test_bad_row_pointers(backend: str | None, crow: list[int]) -> None:
    latents = RaggedLatents(RAGGED.values, torch.tensor(crow), RAGGED.col, F, (4,))
    for run in (
        lambda: fastsae.decode(latents, draw(F, OUT), backend=backend),
        lambda: fastsae.ops.decode.decode_backward(draw(ROWS, OUT), latents, draw(F, OUT), backend=backend),
    ):
        with pytest.raises(ValueError, match=r"latents\.crow"):
            run()


@pytest.mark.parametrize(
    ("latents", "error", "message"),
    [
        (draw(ROWS, F), TypeError, "latents must be TopKLatents or RaggedLatents, got Tensor"),
        (None, TypeError, "latents must be TopKLatents or RaggedLatents, got NoneType"),
        (TopKLatents([1.0], LATENTS.indices, F), TypeError, "latents.values must be a torch.Tensor, got list"),
        (TopKLatents(LATENTS.values, LATENTS.indices.float(), F), TypeError, "latents.indices must have dtype int64, int32, got float32"),
        (TopKLatents(LATENTS.values.long(), LATENTS.indices, F), TypeError, "latents.values must have dtype"),
        (TopKLatents(LATENTS.values, LATENTS.indices[:, :1], F), ValueError, r"shape of latents.values \[4, 3\], got \[4, 1\]"),
        (TopKLatents(torch.tensor(1.0), torch.tensor(1), F), ValueError, "latents.indices must have the shape"),
        (TopKLatents(LATENTS.values, LATENTS.indices, F + 1), ValueError, r"W_dec must have shape \[F=13, D_out\], got \[12, 5\]"),
        (TopKLatents(LATENTS.values, LATENTS.indices, "12"), TypeError, "latents.n_features must be an int, got str"),
        (TopKLatents(LATENTS.values, LATENTS.indices.to("meta"), F), TypeError, "latents.indices must be on cpu"),
        (RaggedLatents(RAGGED.values, RAGGED.crow.int(), RAGGED.col, F, (4,)), TypeError, "latents.crow must have dtype int64, got int32"),
        (RaggedLatents(RAGGED.values, RAGGED.crow, RAGGED.col[:2], F, (4,)), ValueError, r"ragged latents are values \[nnz\]"),
        (RaggedLatents(RAGGED.values, RAGGED.crow[:0], RAGGED.col, F, (4,)), ValueError, r"crow \[rows \+ 1\]"),
        (
            RaggedLatents(RAGGED.values, RAGGED.crow, RAGGED.col, F, (3,)),
            ValueError,
            r"latents.batch_shape must have the 4 rows .* got \[3\]",
        ),
    ],
)
def test_wrong_latents(latents: Any, error: type[Exception], message: str) -> None:
    rejects(error, f"^decode: .*{message}", "decode", latents=latents, x=None, skip=None)
    rejects(error, f"^decode_backward: .*{message}", "decode_backward", latents=latents)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prefixes": 4}, TypeError, "prefixes must be a sequence of int, got 4"),
        ({"prefixes": [1.5, 3]}, TypeError, "prefixes must be a sequence of int"),
        ({"prefixes": "12"}, TypeError, "prefixes must be a sequence of int"),
        ({"prefixes": [True]}, TypeError, "prefixes must be a sequence of int"),
        ({"prefixes": []}, ValueError, r"prefixes must ascend strictly within 1 .. 12, got \[\]"),
        ({"prefixes": [0, 4]}, ValueError, "prefixes must ascend strictly"),
        ({"prefixes": [4, 4]}, ValueError, "prefixes must ascend strictly"),
        ({"prefixes": [5, 4]}, ValueError, "prefixes must ascend strictly"),
        ({"prefixes": [13]}, ValueError, "prefixes must ascend strictly"),
        ({"skip": None}, ValueError, "x and skip come together, got only x"),
        ({"x": None}, ValueError, "x and skip come together, got only skip"),
        ({"x": draw(3, D)}, ValueError, r"x must have the batch dimensions of latents \[4\], got \[3\]"),
        (
            {"x": draw(ROWS, D, dtype=torch.float64), "skip": draw(OUT, D, dtype=torch.float64)},
            TypeError,
            r"x must have the dtype of W_dec",
        ),
        ({"W_dec": draw(2, F, OUT)}, ValueError, "skip is for one decoder"),
        ({"W_dec": draw(2, F + 1, OUT)}, ValueError, r"W_dec must have shape .*\[L, F=12, D_out\], got \[2, 13, 5\]"),
        ({"W_dec": draw(0, F, OUT)}, ValueError, "at least one decoder"),
        ({"W_dec": draw(2, F, OUT), "x": None, "skip": None}, ValueError, r"b_dec must have shape \[L=2, D_out=5\], got \[5\]"),
        ({"W_dec": draw(1, 2, F, OUT)}, ValueError, r"got \[1, 2, 12, 5\]"),
    ],
)
def test_decode_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    rejects(error, f"^decode: .*{message}", "decode", **changes)


@pytest.mark.parametrize("op", ["decode_backward", "hamming"])
def test_a_result_cannot_be_written_into_shared_memory(op: str) -> None:
    out = VALID[op]["out"]
    rejects(ValueError, rf"^{op}: out must not be an expanded tensor", op, out=out[:1].expand(out.shape))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    ("name", "wrong", "error", "message"),
    [
        ("alive", torch.tensor([1, 2]), TypeError, "must have dtype bool, got int64"),
        ("alive", [True], TypeError, "must be a torch.Tensor, got list"),
        ("alive", torch.ones(3, dtype=torch.bool), ValueError, r"must have shape \[[67]\], got \[3\]"),
        ("alive", "none", ValueError, "need an alive feature, got"),
        ("weights", torch.ones(3), ValueError, r"must have shape \[[67]\], got \[3\]"),
        ("weights", "negative", ValueError, "must be finite and non-negative with a positive sum"),
        ("weights", "zero", ValueError, "must be finite and non-negative with a positive sum"),
        ("weights", "nan", ValueError, "must be finite and non-negative with a positive sum"),
        ("weights", "inf", ValueError, "must be finite and non-negative with a positive sum"),
    ],
)
def test_masks_and_weights_of_match(side: int, name: str, wrong: Any, error: type[Exception], message: str) -> None:
    if isinstance(wrong, str):
        size = (6, 7)[side]
        fill = {"none": False, "negative": -1.0, "zero": 0.0, "nan": float("nan"), "inf": float("inf")}[wrong]
        wrong = torch.full((size,), fill)
        if name == "weights":
            wrong[0] = 0.0 if fill == 0 else 1.0
    pair = (wrong, None) if side == 0 else (None, wrong)
    rejects(error, message, "match", **{name: pair})


@pytest.mark.parametrize("name", ["alive", "weights"])
def test_pairs_of_match(name: str) -> None:
    for wrong in ((None,), (None, None, None)):
        rejects(ValueError, rf"^match: {name} must be a pair .* got {len(wrong)}$", "match", **{name: wrong})
    for wrong in (3, torch.ones(2, 7)):
        rejects(TypeError, rf"^match: {name} must be a pair .* got {type(wrong).__name__}$", "match", **{name: wrong})


def test_questions_to_a_match() -> None:
    m = call("match")
    for run, message in (
        (lambda: m.mmcs("ab"), "direction must be 'a_to_b', 'b_to_a' or 'mean', got 'ab'"),
        (lambda: m.fraction_above(0.9, "mean"), "direction must be 'a_to_b' or 'b_to_a', got 'mean'"),
        (lambda: m.histogram(0), "bins must be at least 1, got 0"),
        (lambda: m.histogram(5, null="gauss"), "null must be 'random' or None, got 'gauss'"),
        (lambda: fastsae.compare.mmcs_matrix([draw(3, 4)], "both"), "direction must be .* got 'both'"),
        (lambda: fastsae.mmcs(draw(3, 4), draw(3, 4), "both"), "direction must be .* got 'both'"),
        (lambda: fastsae.match(torch.full((2, 3), float("nan")), draw(3, 3)).one_to_one(), "similarities must not be NaN"),
    ):
        if "NaN" in message:
            pytest.importorskip("scipy")
        with pytest.raises(ValueError, match=message):
            run()


@pytest.mark.parametrize("wrong", [None, "topk", fastsae.ReLU, 3])
def test_what_is_no_activation(wrong: Any) -> None:
    message = rf"activation must be TopK, AbsTopK, BatchTopK, JumpReLU, ReLU or Gated, got {type(wrong).__name__}"
    rejects(TypeError, message, "reconstruct", activation=wrong)


def test_reconstruct_arguments() -> None:
    gated = fastsae.Gated(**GATES)
    rejects(ValueError, "b_enc must be None", "reconstruct", activation=gated)
    rejects(ValueError, "scale does not go with a Gated activation", "reconstruct", activation=gated, b_enc=None)
    rejects(TypeError, "b_gate must be a torch.Tensor, got NoneType", "reconstruct", activation=fastsae.Gated(), b_enc=None, scale=None)
    rejects(ValueError, r"like x, or give target; got \[12, 5\]", "reconstruct", W_dec=draw(F, OUT), target=None)
    rejects(ValueError, r"x must have shape \[.., D\], got \[\]", "reconstruct", x=torch.tensor(1.0), target=None)


@pytest.mark.parametrize("op", [op for op in VALID if op not in ("match", "spline_keys", "boundary_density", "near_zero_counts")])
def test_unknown_backends(op: str) -> None:
    rejects(ValueError, "unknown name 'gpu' in 'gpu'; known: cpu, triton, cuda, reference", op, backend="gpu")


def test_wrong_inputs_leave_no_trace() -> None:
    """A refused call changes neither its output buffer nor the settings."""
    out = torch.full((F, OUT), 7.0)
    bad = TopKLatents(LATENTS.values, torch.full_like(LATENTS.indices, F), F)
    before = torch.get_float32_matmul_precision()
    with pytest.raises(IndexError):
        fastsae.ops.decode.decode_backward(draw(ROWS, OUT), bad, draw(F, OUT), out=out, backend="reference")
    assert bool((out == 7).all())
    assert torch.get_float32_matmul_precision() == before


# ---------------------------------------------------------------- adam_

ROW_GRADIENT = fastsae.optim.RowGradient(LATENTS.values, LATENTS.indices, None, draw(ROWS, D), F)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"step": 0}, ValueError, "step must be at least 1, got 0"),
        ({"step": 1.0}, TypeError, "step must be an int, got float"),
        ({"lr": -1e-3}, ValueError, "lr must be at least 0, got -0.001"),
        ({"lr": "1"}, TypeError, "lr must be a number, got str"),
        ({"eps": float("nan")}, ValueError, "eps must be a finite number, got nan"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be at least 0, got -1"),
        ({"betas": 0.9}, ValueError, "betas must be two numbers, got 0.9"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas must be at least 0 and below 1, got \(0.9, 1.0\)"),
        ({"factor": 1.0}, TypeError, "factor must be a torch.Tensor, got float"),
        ({"factor": torch.ones(1)}, ValueError, r"factor must have shape \[\], got \[1\]"),
        ({"project": 1}, TypeError, "project must be a bool, got int"),
        ({"normalise": None}, TypeError, "normalise must be a bool, got NoneType"),
        ({"W": draw(1, D).expand(F, D)}, ValueError, "W must not be an expanded tensor"),
        ({"gradient": None}, TypeError, "gradient must be a torch.Tensor or a RowGradient, got NoneType"),
        ({"n_features": F + 1}, ValueError, "gradient.n_features must be the 12 rows of the weights, got 13"),
        ({"values": draw(ROWS, 2)}, ValueError, r"gradient.indices must have shape of values \[4, 2\], got \[4, 3\]"),
        ({"values": draw(ROWS + 1, 3)}, ValueError, r"gradient.values must have shape \[n=4, K\], got \[5, 3\]"),
        (
            {"values": draw(ROWS, 3, dtype=torch.float64)},
            TypeError,
            "gradient.values must have dtype float32, bfloat16, float16, got float64",
        ),
        ({"indices": LATENTS.indices.float()}, TypeError, "gradient.indices must have dtype int64, int32, got float32"),
        ({"rows": draw(ROWS, D + 1)}, ValueError, r"gradient.rows must have shape \[n, D=8\], got \[4, 9\]"),
        ({"rows": draw(ROWS, D).to("meta")}, TypeError, "gradient.rows must be on cpu like the other tensors, got meta"),
        ({"crow": torch.arange(ROWS + 1)}, ValueError, r"gradient.values must have shape \[nnz\], got \[4, 3\]"),
        ({"crow": torch.arange(ROWS)}, ValueError, r"gradient.crow must have shape \[n \+ 1 = 5\], got \[4\]"),
        ({"crow": torch.arange(ROWS + 1).int()}, TypeError, "gradient.crow must have dtype int64, got int32"),
    ],
)
def test_adam_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    of_gradient = {name: value for name, value in changes.items() if hasattr(ROW_GRADIENT, name)}
    if of_gradient:
        changes = {"gradient": dataclasses.replace(ROW_GRADIENT, **of_gradient)}
    rejects(error, f"^adam_: {message}", "adam_", **changes)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("bad", [-1, F, 2**31 - 1])
def test_a_bad_slot_of_a_gradient_leaves_the_weights(bad: int, backend: str | None) -> None:
    indices = LATENTS.indices.clone()
    indices[2, 1] = bad
    W, m, v = matrices = [draw(F, D), torch.zeros(F, D), torch.zeros(F, D)]
    before = [t.clone() for t in matrices]
    with pytest.raises(IndexError, match=rf"{bad} at \[2, 1\].*0 <= index < {F}"):
        fastsae.optim.adam_(W, m, v, dataclasses.replace(ROW_GRADIENT, indices=indices), step=1, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(before, matrices))
