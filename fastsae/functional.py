"""The operations as functions of tensors and tuples of tensors: what other libraries build on.

encode_topk, select_topk                                      latents as ``(values, indices)``
encode_threshold, encode_batch_topk, encode_gated             latents as ``(values, col, crow)`` and more
decode, decode_backward                                       reconstructions from them, and the gradients without autograd
adam_                                                         one step of Adam, also from a gradient that is slots and rows
match_cosine                                                  nearest rows
spline_code, spline_hash, pack_signs, hash_signs, hash_code   codes of neurons; hamming, hamming_topk, count_codes: of them
refuses                                                       why there is no fast row for a call, or None: call this then, or your own
API, require                                                  the version of this contract

No class of this package is needed or returned, importing prints nothing, and nothing here has state. Arguments, results, gradients and
errors are those of the operation of the same name in ``fastsae`` and ``fastsae.codes``, bit for bit; ``torch.compile`` and autocast work as
there. Ragged latents are ``values [nnz]``, features ``col [nnz]`` and ``crow [rows + 1]`` for rows of the flattened batch: row r owns the
slots ``crow[r] .. crow[r + 1] - 1``.

A library finds this module without importing it, by the entry point ``fastsae`` of the group ``sae.backends``::

    backend = entry_points(group="sae.backends")["fastsae"].load().require(api=1)
    if backend.refuses("encode_topk", x, W_enc, b_enc, k=k) is None:
        values, indices = backend.encode_topk(x, W_enc, b_enc, k=k)

``API`` is versioned semantically: additions leave it, and it rises when a call that worked would stop working or mean something else. What
will change or go away warns with a ``DeprecationWarning`` in at least two minor releases of the package first.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae._core import checks
from fastsae.dispatch import Op
from fastsae.gradients import RowGradient
from fastsae.latents import Latents, RaggedLatents, TopKLatents
from fastsae.ops import adam as _adam
from fastsae.ops import count as _count
from fastsae.ops import decode as _decode
from fastsae.ops import encode as _encode
from fastsae.ops import hamming as _hamming
from fastsae.ops import match as _match
from fastsae.ops import select as _select
from fastsae.ops import spline as _spline
from fastsae.ops.hamming import hamming
from fastsae.ops.spline import hash_code, hash_signs, pack_signs, spline_code, spline_hash

__all__ = [
    "API", "adam_", "count_codes", "decode", "decode_backward", "encode_batch_topk", "encode_gated", "encode_threshold", "encode_topk",
    "hamming", "hamming_topk", "hash_code", "hash_signs", "match_cosine", "pack_signs", "refuses", "require", "select_topk", "spline_code",
    "spline_hash",
]  # fmt: skip

API = 1


def require(api: int) -> ModuleType:
    """This module, where it is of the version asked for.

    Raises: ImportError: it is of another.
    """
    if api != API:
        raise ImportError(
            f"fastsae.functional is API {API}, and API {api} was asked for: install the release of fastsae-kernels that has it"
        )
    return sys.modules[__name__]


# ---------------------------------------------------------------- latents


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None = None,
    *,
    k: int,
    b_pre: Tensor | None = None,
    scale: Tensor | None = None,
    features: Tensor | None = None,
    relu: bool | None = None,
    absolute: bool = False,
    index_dtype: torch.dtype = torch.int64,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``fastsae.encode_topk`` as ``(values [.., k], indices [.., k])``. ``scale`` leaves the bias alone: multiply it yourself."""
    options: dict[str, Any] = {"relu": relu, "absolute": absolute, "index_dtype": index_dtype, "backend": backend}
    latents = _encode.encode_topk(x, W_enc, b_enc, k=k, b_pre=b_pre, scale=scale, features=features, **options)
    return latents.values, latents.indices


def encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None = None,
    *,
    threshold: float | Tensor = 0.0,
    b_pre: Tensor | None = None,
    scale: Tensor | None = None,
    features: Tensor | None = None,
    bandwidth: float | None = None,
    capacity: int | None = None,
    index_dtype: torch.dtype = torch.int64,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """``fastsae.encode_threshold`` as ``(values, col, crow)``; with ``bandwidth`` ``(values, col, crow, l0 [..])``."""
    options: dict[str, Any] = {"b_pre": b_pre, "scale": scale, "features": features, "index_dtype": index_dtype, "backend": backend}
    options |= {"threshold": threshold, "capacity": capacity}
    if bandwidth is None:
        return _ragged(_encode.encode_threshold(x, W_enc, b_enc, **options))
    latents, l0 = _encode.encode_threshold(x, W_enc, b_enc, bandwidth=bandwidth, **options)
    return *_ragged(latents), l0


def encode_batch_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None = None,
    *,
    k: float,
    b_pre: Tensor | None = None,
    scale: Tensor | None = None,
    features: Tensor | None = None,
    capacity: int | None = None,
    index_dtype: torch.dtype = torch.int64,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``fastsae.encode_batch_topk`` as ``(values, col, crow, min_kept [])``."""
    options: dict[str, Any] = {"b_pre": b_pre, "scale": scale, "features": features, "index_dtype": index_dtype, "backend": backend}
    latents, min_kept = _encode.encode_batch_topk(x, W_enc, b_enc, k=k, capacity=capacity, **options)
    return *_ragged(latents), min_kept


def encode_gated(
    x: Tensor,
    W_enc: Tensor,
    *,
    b_gate: Tensor,
    r_mag: Tensor,
    b_mag: Tensor,
    b_pre: Tensor | None = None,
    capacity: int | None = None,
    index_dtype: torch.dtype = torch.int64,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastsae.encode_gated`` as ``(values, col, crow)``."""
    options: dict[str, Any] = {"b_pre": b_pre, "capacity": capacity, "index_dtype": index_dtype, "backend": backend}
    return _ragged(_encode.encode_gated(x, W_enc, b_gate=b_gate, r_mag=r_mag, b_mag=b_mag, **options))


def select_topk(
    z: Tensor, *, k: int, relu: bool = True, index_dtype: torch.dtype = torch.int64, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest of each row of scores ``z [.., F]`` that exist, as ``encode_topk`` would select them (``fastsae.ops.select``)."""
    latents = _select.select_topk(z, k=k, relu=relu, index_dtype=index_dtype, backend=backend)
    return latents.values, latents.indices


def _ragged(latents: RaggedLatents) -> tuple[Tensor, Tensor, Tensor]:
    return latents.values, latents.col, latents.crow


# ---------------------------------------------------------------- reconstructions


def decode(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    crow: Tensor | None = None,
    padded: bool = False,
    x: Tensor | None = None,
    skip: Tensor | None = None,
    prefixes: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """``fastsae.decode`` of ``values [.., K]`` and ``indices [.., K]``, or with ``crow`` of ragged ``values [nnz]`` and ``indices [nnz]``.

    ``padded``: slots follow those of the last row, as an encoder's ``capacity`` leaves them. With ``crow`` the result has one batch
    dimension, the rows.
    """
    latents = _latents("decode", values, indices, crow, padded, W_dec)
    return _decode.decode(latents, W_dec, b_dec, x=x, skip=skip, prefixes=prefixes, backend=backend)


def decode_backward(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    *,
    crow: Tensor | None = None,
    padded: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``decode`` without autograd: of ``values``, of ``W_dec`` (in ``out`` where given), of ``b_dec [D_out]``.

    Args:
        grad: ``[.., D_out]``, gradient of the reconstruction; dtype of ``W_dec``; may be expanded.
        values, indices, W_dec, crow, padded: as in ``decode``; one decoder ``[F, D_out]``.
        out: ``[F, D_out]``, any strides, overwritten: saves allocating and clearing it at every step.
    """
    latents = _latents("decode_backward", values, indices, crow, padded, W_dec)
    dvalues, dweight, dbias = _decode.decode_backward(grad, latents, W_dec, out=out, backend=backend)
    return dvalues, dweight, dbias


def _latents(op: str, values: Tensor, indices: Tensor, crow: Tensor | None, padded: bool, W_dec: Tensor) -> Latents:
    checks.tensor(op, "W_dec", W_dec)
    n_features = W_dec.shape[-2] if W_dec.dim() > 1 else 0
    if crow is None:
        return TopKLatents(values, indices, n_features)
    checks.tensor(op, "crow", crow, (torch.int64,))
    return RaggedLatents(values, crow, indices, n_features, (crow.numel() - 1,), checks.flag(op, "padded", padded))


# ---------------------------------------------------------------- training, matching, codes


def adam_(
    W: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    values: Tensor | None = None,
    indices: Tensor | None = None,
    crow: Tensor | None = None,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    factor: Tensor | None = None,
    project: bool = False,
    normalise: bool = False,
    backend: str | None = None,
) -> None:
    """``fastsae.optim.adam_``: one step in place, from ``grad [F, D]``, or from slots ``values``, ``indices`` of rows ``grad [n, D]``.

    With slots (``[n, K]``, or ``[nnz]`` with ``crow [n + 1]``) the gradient of feature f is the sum of ``value * grad[row]`` over the slots
    with index f, and is never formed as a matrix: for a decoder values are the latents' and rows the reconstruction's gradient, for an
    encoder values are the scores' gradient and rows the inputs.
    """
    if (values is None) != (indices is None):
        raise ValueError(f"adam_: values and indices must be given together, got {'indices' if values is None else 'values'} alone")
    gradient = grad if values is None or indices is None else RowGradient(values, indices, crow, grad, W.shape[0])
    _adam.adam_(
        W, exp_avg, exp_avg_sq, gradient, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, factor=factor,
        project=project, normalise=normalise, backend=backend,
    )  # fmt: skip


def match_cosine(
    a: Tensor, b: Tensor, *, k: int = 1, absolute: bool = False, exclude_self: bool = False, eps: float = 1e-8, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """``fastsae.match_cosine`` as ``(similarity [N, k], index [N, k])``."""
    similarity, index = _match.match_cosine(a, b, k=k, absolute=absolute, exclude_self=exclude_self, eps=eps, backend=backend)
    return similarity, index


def hamming_topk(a: Tensor, b: Tensor, k: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """``fastsae.codes.hamming_topk`` as ``(distance [N, k], index [N, k])``."""
    distance, index = _hamming.hamming_topk(a, b, k, backend=backend)
    return distance, index


def count_codes(hashes: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``fastsae.codes.count_codes`` as ``(unique, inverse, counts)``."""
    unique, inverse, counts = _count.count_codes(hashes, backend=backend)
    return unique, inverse, counts


# ---------------------------------------------------------------- reasons


def refuses(op: str, *tensors: Any, **options: Any) -> str | None:
    """Why a call of an operation of this module would run no fast row, or None: the reasons of the table of backends.

    Args:
        op: its name. tensors, options: what the call would be given. Options may be left out, but for tensors and ``k``.

    Returns:
        The reason of each row, or why the tensors do not go together, or that there is no such operation (in an older release). Of dtype,
        device, layout and sizes alone: no element is read, nothing waits for a GPU. Under autocast it is asked for the dtype that the
        operation will cast to. Shapes that do not match are left for the call to report. Compiled code asks when it is compiled.
    """
    call = _CALLS.get(op)
    if call is None:
        return f"fastsae.functional has no operation {op!r}"
    if len(tensors) < len(call.ranks):
        return f"{len(tensors)} tensors (expected at least {len(call.ranks)})"
    for position, rank in enumerate(call.ranks):
        t = tensors[position]
        if not isinstance(t, Tensor) or t.layout is not torch.strided:
            return f"argument {position} is {t.layout if isinstance(t, Tensor) else type(t).__name__} (supported: a strided torch.Tensor)"
        if t.dim() == 0 or (rank and t.dim() != rank):
            return f"argument {position} has shape {list(t.shape)} (supported: {rank or 'at least 1'} dimensions)"
    first, named = tensors[0], dict(zip(call.names, tensors)) | {_IN_SCHEMAS.get(name, name): value for name, value in options.items()}
    given = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if others := {str(t.device) for t in given.values() if t.device != first.device}:
        return f"tensors on {first.device} and {', '.join(sorted(others))}"
    if first.dtype not in call.dtypes:
        return f"dtype {str(first.dtype)[6:]} (supported: {', '.join(str(dtype)[6:] for dtype in call.dtypes)})"
    if call.casts and checks.autocasting(first.device):
        given = {name: _cast(t) for name, t in given.items()}
    floats = {str(t.dtype)[6:] for name in call.names[: len(call.ranks)] if (t := given[name]).is_floating_point()}
    if len(floats) > 1:
        return f"mixed dtypes: {' and '.join(sorted(floats))}"
    if "crow" not in given:
        given |= {name: _rows(given[name]) for name in _OF_ROWS if name in given}
    arguments: dict[str, Any] = {"k": named.get("k", 1), "eps": named.get("eps", 1e-8), **given, **call.more(given)}
    for operation in call.operations:
        args = [arguments.get(name) for name in _parameters(operation.schema)]
        reasons: list[str] = []
        for row in operation.rows[:-1]:
            if (reason := row.reason(args)) is None:
                break
            reasons.append(f"{row.backend}: {reason}")
        else:
            return "; ".join(reasons) or f"{operation.name} has no row but the reference"
    return None


refuses._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]  # its decorator would import torch._dynamo


def _cast(t: Tensor) -> Tensor:
    """In place of what autocast makes of it."""
    return _of_dtype(t, torch.get_autocast_dtype(t.device.type)) if t.dtype in (torch.float32, torch.bfloat16, torch.float16) else t


def _of_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype is dtype else torch.empty((), dtype=dtype, device=t.device).expand(t.shape)


def _rows(t: Tensor) -> Tensor:
    """``[rows, last]``: in place of a flattened batch, of which the table reads shape and last stride."""
    return t if t.dim() == 2 else t.detach().as_strided((t.shape[:-1].numel(), t.shape[-1]), (0, t.stride(-1)))


@functools.cache
def _parameters(schema: str) -> list[str]:
    """Their names, without types and defaults."""
    return [part.split("=")[0].split()[-1] for part in schema.partition("(")[2].rpartition(") ->")[0].split(", ")]


def _widened(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``adam_`` widens slots and their rows."""
    return {name: _of_dtype(given[name], given["W"].dtype) for name in ("grad", "values") if "values" in given}


class _Call(NamedTuple):
    """How a call of a public function becomes arguments of operations in the table, by name."""

    operations: tuple[Op, ...]
    names: Sequence[str]
    """Of its positional arguments, in the schema; keywords have the same name there."""
    ranks: tuple[int, ...]
    """Dimensions of those that every call has; 0: any number but none."""
    dtypes: tuple[torch.dtype, ...] = checks.FLOATS
    casts: bool = False
    more: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = lambda given: {}


_IN_SCHEMAS = {"b_enc": "b", "b_dec": "b"}
_OF_ROWS = ("x", "z", "words", "values", "indices")
_SCORES, _SIGNS, _WORDS = ("x", "W", "b"), (*checks.FLOATS, torch.bool), (torch.int64,)
_CALLS = {
    "encode_topk": _Call((_encode.ENCODE_TOPK,), _SCORES, (0, 2), casts=True),
    "encode_threshold": _Call((_encode.ENCODE_THRESHOLD,), _SCORES, (0, 2), casts=True),
    "encode_batch_topk": _Call((_encode.ENCODE_BATCH_TOPK,), _SCORES, (0, 2), casts=True),
    "encode_gated": _Call((_encode.ENCODE_GATED,), _SCORES, (0, 2), casts=True),
    "select_topk": _Call((_select.SELECT_TOPK,), ("z",), (0,)),
    "decode": _Call((_decode.DECODE,), ("values", "indices", "W", "b"), (0, 0, 0), casts=True),
    "decode_backward": _Call(
        (_decode.DECODE_DVALUES, _decode.DECODE_DWEIGHT),
        ("grad", "values", "indices", "W"),
        (0, 0, 0, 2),
        more=lambda given: {"grad": _rows(given["grad"]), "out": given.get("out", given["W"])},
    ),
    "adam_": _Call((_adam.ADAM,), ("W", "m", "v", "grad"), (2, 2, 2), _adam.DTYPES, more=_widened),
    "match_cosine": _Call((_match.MATCH_COSINE,), ("a", "b"), (2, 2)),
    "spline_code": _Call((_spline.SPLINE_CODE,), _SCORES, (0, 2), casts=True),
    "spline_hash": _Call((_spline.SPLINE_HASH,), _SCORES, (0, 2), casts=True),
    "pack_signs": _Call((_spline.PACK_SIGNS,), ("z",), (0,), _SIGNS),
    "hash_signs": _Call((_spline.HASH_SIGNS,), ("z",), (0,), _SIGNS),
    "hash_code": _Call((_spline.HASH_CODE,), ("words",), (0,), _WORDS),
    "hamming": _Call(
        (_hamming.HAMMING,),
        ("a", "b", "out"),
        (2, 2),
        _WORDS,
        more=lambda given: {"out": given.get("out", given["a"].new_empty((0, 0), dtype=torch.int32))},
    ),
    "hamming_topk": _Call((_hamming.HAMMING_TOPK,), ("a", "b", "k"), (2, 2), _WORDS),
    "count_codes": _Call((_count.COUNT_CODES,), ("hashes",), (0,), _WORDS),
}
