"""The compiled CPU kernels: loads them on first use, checks what an address cannot tell, passes addresses, says why they are missing.

The only module that imports ``fastsae._C``. csrc/fastsae.h is the contract of every function. Tensors here are plain and detached:
gradients, shapes across arguments and error texts for users are the business of the public operations.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INDEX = {torch.int32: 0, torch.int64: 1}
_SUPPORTED = "supported: float32, bfloat16, float16"

_C: Any = None  # the extension, once it is loaded and its level is chosen
_module: Any = None  # the extension, once it is loaded
_reason: str | None = None
_tried = False


def build_info() -> dict[str, Any]:
    """What the build recorded: ``native``, ``reason``, ``compiler``, ``flags``, ``levels``. Empty in a checkout that was never built."""
    path = os.path.join(os.path.dirname(os.path.dirname(__file__)), "_build_info.json")
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return {}


def unavailable() -> str | None:
    """Why the compiled kernels cannot be used here and what to do, or None."""
    global _module, _reason, _tried
    if _tried:
        return _reason
    try:
        from fastsae import _C as module  # noqa: N811  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        info = build_info()
        if not info:
            _reason = f"the extension is not built ({error}); run `pip install -e .` in the checkout"
        elif not info["native"]:
            _reason = (
                f"the extension was not built: {info['reason']}; install a C++20 compiler (gcc or clang) and install fastsae-kernels again"
            )
        else:
            _reason = (
                f"the extension was built by {info['compiler']} but does not load: {error}; install fastsae-kernels again for this Python"
            )
    else:
        _module = module
        # The OpenMP runtime hangs in a forked child whose parent has used it.
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=module.force_serial)
    _tried = True
    return _reason


def _load() -> Any:
    """The extension with its level chosen, or an error that says what to do."""
    global _C
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(f"fastsae's compiled kernels are unavailable: {reason}")
    if _C is None:
        wanted = os.environ.get("FASTSAE_ISA")
        if wanted:
            _set_level(wanted, f"FASTSAE_ISA={wanted!r}")
        _C = _module
    return _C


def _set_level(level: str, given: str) -> None:
    available = _module.levels()
    if level not in available:
        raise ValueError(
            f"{given}: not an instruction set level that was built and that this CPU supports (available: {', '.join(available)})"
        )
    _module.set_level(level)


def isa() -> str:
    """The instruction set level that runs now."""
    return (_C or _load()).level()


def isa_levels() -> list[str]:
    """The levels that were built and that this CPU supports, ascending; empty where the kernels are unavailable."""
    return [] if unavailable() is not None else _module.levels()


@contextlib.contextmanager
def use_isa(level: str) -> Iterator[None]:
    """Run at `level` inside the block. For tests and benchmarks: the level is one for the whole process."""
    before = isa()
    _set_level(level, f"use_isa({level!r})")
    try:
        yield
    finally:
        _module.set_level(before)


def cpu_features() -> dict[str, bool]:
    """What the CPU and its operating system support, of the instruction sets that the kernels use or may use."""
    return {} if unavailable() is not None else _module.cpu_features()


def threads_info() -> str:
    """One line on threads, for ``fastsae info``."""
    if unavailable() is not None:
        return "none: the extension is unavailable"
    if _module.threads_available():
        return f"{torch.get_num_threads()} (torch.get_num_threads), in the OpenMP runtime that torch has loaded"
    return "1: no OpenMP runtime found in the process, or this is a forked child"


# ---- decode ----


def _refuses(a: Tensor, a_name: str, indices: Tensor, crow: Tensor | None, w: Tensor, w_name: str, t: Tensor | None) -> str | None:
    if not _tried:
        unavailable()
    if _reason is not None:
        return _reason
    dtype = w.dtype
    if dtype not in _DTYPES:
        return f"dtype {str(dtype)[6:]} ({_SUPPORTED})"
    if a.dtype is not dtype or (t is not None and t.dtype is not dtype):
        other = a if a.dtype is not dtype or t is None else t
        return f"mixed dtypes: {a_name} {str(other.dtype)[6:]}, {w_name} {str(dtype)[6:]}"
    if indices.dtype not in _INDEX:
        return f"index dtype {str(indices.dtype)[6:]} (supported: int64, int32)"
    if not (w.is_cpu and a.is_cpu and indices.is_cpu and (t is None or t.is_cpu)):
        other = next(each for each in (w, a, indices, t) if each is not None and not each.is_cpu)
        return f"device {other.device} (supported: cpu)"
    if crow is not None and (not crow.is_cpu or crow.dtype is not torch.int64):
        return f"crow {str(crow.dtype)[6:]} on {crow.device} (supported: int64 on cpu)"
    return None


def refuses_decode(values: Tensor, indices: Tensor, crow: Tensor | None, W: Tensor, b: Tensor | None) -> str | None:
    """Why `decode` cannot serve these inputs, or None."""
    if b is not None and ((b.dtype is not torch.float32 and b.dtype is not W.dtype) or not b.is_cpu):
        return f"b {str(b.dtype)[6:]} on {b.device} (supported: float32 or the dtype of W, on cpu)"
    return _refuses(values, "values", indices, crow, W, "W", None)


def refuses_decode_dvalues(grad: Tensor, indices: Tensor, crow: Tensor | None, W: Tensor) -> str | None:
    """Why `decode_dvalues` cannot serve these inputs, or None."""
    return _refuses(grad, "grad", indices, crow, W, "W", None)


def refuses_decode_dweight(values: Tensor, indices: Tensor, crow: Tensor | None, grad: Tensor, out: Tensor) -> str | None:
    """Why `decode_dweight` cannot serve these inputs, or None."""
    return _refuses(values, "values", indices, crow, out, "out", grad)


def _slots(indices: Tensor, crow: Tensor | None) -> tuple[Tensor, int, int, int, Tensor | None, int]:
    """Contiguous indices, rows, slots a row, slots, contiguous crow, its address."""
    if not indices.is_contiguous():
        indices = indices.contiguous()
    if crow is None:
        if indices.dim() != 2:
            raise ValueError(f"indices: expected [rows, K] without crow, got {list(indices.shape)}")
        rows, k = indices.shape
        return indices, rows, k, rows * k, None, 0
    if indices.dim() != 1 or crow.dim() != 1 or crow.numel() == 0 or crow.dtype is not torch.int64 or not crow.is_cpu:
        raise ValueError(f"expected indices [nnz] and crow [rows + 1] int64, got {list(indices.shape)} and {list(crow.shape)} {crow.dtype}")
    if not crow.is_contiguous():
        crow = crow.contiguous()
    return indices, crow.numel() - 1, 0, indices.numel(), crow, crow.data_ptr()


def _fail(status: int, indices: Tensor, crow: Tensor | None, features: int) -> None:
    if status == _module.NO_MEMORY:
        raise MemoryError("fastsae: no memory for the workspace of a decode kernel")
    if status < 0:
        assert crow is not None
        i = -2 - status
        raise ValueError(
            f"latents.crow: crow[{i}] = {int(crow[i])}; it must start at 0, never fall and end at the number of slots, {indices.numel()}"
        )
    position = [status] if indices.dim() == 1 else list(divmod(status, indices.shape[1]))
    value = int(indices.reshape(-1)[status])
    name = "latents.indices" if crow is None else "latents.col"
    raise IndexError(f"{name}: {value} at {position} is out of range for {features} features (valid: 0 <= index < {features})")


def decode(values: Tensor, indices: Tensor, crow: Tensor | None, W: Tensor, b: Tensor | None) -> Tensor:
    """[rows, D] in W.dtype: for each row b + the sum of values · W[indices] over its slots, in slot order.

    Args:
        values, indices: [rows, K] without `crow`, else [nnz].
        crow: None, or [rows + 1] int64: the slots of row r are crow[r] to crow[r + 1].
        W: [F, D], any strides, never copied as a whole.
        b: None, or [D] in float32 or W.dtype.

    Raises: IndexError (an index outside 0 .. F - 1), ValueError (shapes, crow).
    """
    kernels = _C or _load()
    features, d = W.shape
    dtype = W.dtype
    given = indices
    indices, rows, k, n, crow, crow_address = _slots(indices, crow)
    if values.shape != indices.shape or (b is not None and b.shape != (d,)):
        raise ValueError(
            f"values {list(values.shape)}, indices {list(indices.shape)}, b {None if b is None else list(b.shape)} for D = {d}"
        )
    _same(dtype, values)
    if not values.is_contiguous():
        values = values.contiguous()
    bias_address = 0
    if b is not None:
        b = b.to(torch.float32, memory_format=torch.contiguous_format)
        if not b.is_contiguous():
            b = b.contiguous()
        bias_address = b.data_ptr()
    y = torch.empty((rows, d), dtype=dtype, device="cpu")
    stride_f, stride_d = W.stride()
    status = kernels.decode(
        indices.data_ptr(), _INDEX[indices.dtype], crow_address, rows, k, n, features, _DTYPES[dtype], values.data_ptr(),
        W.data_ptr(), stride_f, stride_d, d, bias_address, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if status != -1:
        _fail(status, given, crow, features)
    return y


def decode_dvalues(grad: Tensor, indices: Tensor, crow: Tensor | None, W: Tensor) -> Tensor:
    """The gradient of `decode` in its values: ⟨grad[r], W[index]⟩ for every slot, in grad.dtype and the shape of `indices`.

    Args: grad [rows, D]; the others as in `decode`.
    """
    kernels = _C or _load()
    features, d = W.shape
    dtype = W.dtype
    given = indices
    indices, rows, k, n, crow, crow_address = _slots(indices, crow)
    if grad.shape != (rows, d):
        raise ValueError(f"grad: expected {[rows, d]}, got {list(grad.shape)}")
    _same(dtype, grad)
    if not grad.is_contiguous():
        grad = grad.contiguous()
    dvalues = torch.empty(indices.shape, dtype=dtype, device="cpu")
    stride_f, stride_d = W.stride()
    status = kernels.decode_dvalues(
        indices.data_ptr(), _INDEX[indices.dtype], crow_address, rows, k, n, features, _DTYPES[dtype], grad.data_ptr(),
        W.data_ptr(), stride_f, stride_d, d, dvalues.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if status != -1:
        _fail(status, given, crow, features)
    return dvalues


def decode_dweight(values: Tensor, indices: Tensor, crow: Tensor | None, grad: Tensor, out: Tensor, *, zero_untouched: bool = True) -> None:
    """The gradient of `decode` in W, written into out [F, D] (any strides): out[f] = the sum of value · grad[row] over the slots of f.

    Every row is written, zeros where a feature has no slot; `zero_untouched=False` leaves those rows as they are, for a caller that
    reuses `out` and knows which rows it wrote last.
    """
    kernels = _C or _load()
    features, d = out.shape
    dtype = out.dtype
    given = indices
    indices, rows, k, n, crow, crow_address = _slots(indices, crow)
    if values.shape != indices.shape or grad.shape != (rows, d):
        raise ValueError(f"values {list(values.shape)}, indices {list(indices.shape)}, grad {list(grad.shape)} for out {list(out.shape)}")
    _same(dtype, values, grad)
    if not values.is_contiguous():
        values = values.contiguous()
    if not grad.is_contiguous():
        grad = grad.contiguous()
    stride_f, stride_d = out.stride()
    status = kernels.decode_dweight(
        indices.data_ptr(), _INDEX[indices.dtype], crow_address, rows, k, n, features, _DTYPES[dtype], values.data_ptr(), grad.data_ptr(),
        out.data_ptr(), stride_f, stride_d, d, zero_untouched, torch.get_num_threads(),
    )  # fmt: skip
    if status != -1:
        _fail(status, given, crow, features)


def _same(dtype: torch.dtype, *tensors: Tensor) -> None:
    # A wrong dtype or device would be a crash below, not an exception; `refuses_*` has normally been asked before.
    for t in tensors:
        if t.dtype is not dtype or not t.is_cpu:
            raise TypeError(f"expected {dtype} on cpu, got {t.dtype} on {t.device}")


# ---- codes: Hamming distances, packed signs and their hashes ----

_SIGNS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}


def _refuses_codes(*tensors: Tensor | None) -> str | None:
    if not _tried:
        unavailable()
    if _reason is not None:
        return _reason
    for t in tensors:
        if t is not None and not t.is_cpu:
            return f"device {t.device} (supported: cpu)"
    return None


def refuses_hamming(a: Tensor, b: Tensor, out: Tensor) -> str | None:
    """Why `hamming` cannot serve these inputs, or None."""
    if out.numel() and 1 not in out.shape and 1 not in out.stride():
        return f"out with strides {out.stride()} (supported: stride 1 along one dimension)"
    return _refuses_codes(a, b, out)


def refuses_hamming_topk(a: Tensor, b: Tensor, k: int) -> str | None:
    """Why `hamming_topk` cannot serve these inputs, or None."""
    if b.shape[0] >= 2**32:
        return f"{b.shape[0]} codes in b (supported: fewer than 2^32)"
    return _refuses_codes(a, b)


def refuses_pack_signs(z: Tensor, neurons: Tensor | None) -> str | None:
    """Why `pack_signs` cannot serve these inputs, or None."""
    if z.dtype not in _SIGNS:
        return f"dtype {str(z.dtype)[6:]} ({_SUPPORTED}, bool)"
    if z.numel() and z.shape[1] > 1 and z.stride(1) != 1:
        return f"z with strides {z.stride()} (supported: stride 1 along H)"
    return _refuses_codes(z, neurons)


def refuses_hash_signs(z: Tensor, neurons: Tensor | None, layer: int, seed: int, bits: int) -> str | None:
    """Why `hash_signs` cannot serve these inputs, or None."""
    return refuses_pack_signs(z, neurons)


def refuses_hash_code(words: Tensor, neurons: Tensor | None, layer: int, seed: int, bits: int) -> str | None:
    """Why `hash_code` cannot serve these inputs, or None."""
    return _refuses_codes(words, neurons)


def _code_rows(codes: Tensor) -> tuple[Tensor, int, int]:
    """Codes with stride 1 along the words, their number, the stride of a row."""
    if codes.shape[1] > 1 and codes.stride(1) != 1:
        codes = codes.contiguous()
    return codes, codes.shape[0], codes.stride(0)


def _taking_part(neurons: Tensor | None, size: int) -> Tensor | None:
    """An index or mask as a contiguous mask [size]; IndexError where an index is out of range."""
    if neurons is None:
        return None
    if neurons.dtype is torch.bool:
        return neurons.contiguous()
    if neurons.numel() and (int(neurons.min()) < 0 or int(neurons.max()) >= size):
        raise IndexError(f"neurons must hold indices 0 <= index < {size}, got {int(neurons.min())} .. {int(neurons.max())}")
    return torch.zeros(size, dtype=torch.bool, device="cpu").index_fill_(0, neurons.long(), True)


def hamming(a: Tensor, b: Tensor, out: Tensor, *, vpopcnt: bool = True) -> None:
    """out[i, j] = the number of bits that differ between a[i] and b[j].

    Args:
        a, b: [N, words] and [M, words] int64; copied where the words of a code are not adjacent.
        out: [N, M] int32, stride 1 along one dimension.
        vpopcnt: False: as on a CPU without AVX512_VPOPCNTDQ, for tests.
    """
    kernels = _C or _load()
    if a.shape[1] != b.shape[1] or out.shape != (a.shape[0], b.shape[0]):
        raise ValueError(f"hamming: a {list(a.shape)}, b {list(b.shape)}, out {list(out.shape)}")
    _same(torch.int64, a, b)
    _same(torch.int32, out)
    (a, n, stride_a), (b, m, stride_b) = _code_rows(a), _code_rows(b)
    if (reason := refuses_hamming(a, b, out)) is not None:
        raise ValueError(f"hamming: {reason}")
    status = kernels.hamming(
        a.data_ptr(), n, stride_a, b.data_ptr(), m, stride_b, a.shape[1], out.data_ptr(), *out.stride(), vpopcnt,
        torch.get_num_threads(),
    )  # fmt: skip
    if status != -1:
        raise MemoryError("fastsae: no memory for the workspace of hamming")


def hamming_topk(a: Tensor, b: Tensor, k: int, *, vpopcnt: bool = True) -> tuple[Tensor, Tensor]:
    """The k nearest rows of b for every row of a: distances [N, k] int32 ascending, indices [N, k] int64; ties by index. As `hamming`."""
    kernels = _C or _load()
    if a.shape[1] != b.shape[1] or not 0 <= k <= b.shape[0]:
        raise ValueError(f"hamming_topk: a {list(a.shape)}, b {list(b.shape)}, k {k}")
    _same(torch.int64, a, b)
    (a, n, stride_a), (b, m, stride_b) = _code_rows(a), _code_rows(b)
    distance = torch.empty((n, k), dtype=torch.int32, device="cpu")
    index = torch.empty((n, k), dtype=torch.int64, device="cpu")
    status = kernels.hamming_topk(
        a.data_ptr(), n, stride_a, b.data_ptr(), m, stride_b, a.shape[1], k, distance.data_ptr(), index.data_ptr(), vpopcnt,
        torch.get_num_threads(),
    )  # fmt: skip
    if status != -1:
        raise MemoryError("fastsae: no memory for the workspace of hamming_topk")
    return distance, index


def _signs(z: Tensor) -> tuple[int, int, int, int, int]:
    """Address, type, rows, stride of a row, neurons."""
    if z.dim() != 2 or z.dtype not in _SIGNS or not z.is_cpu or (z.numel() and z.shape[1] > 1 and z.stride(1) != 1):
        raise ValueError(f"z: expected [rows, H] on cpu with stride 1 along H, got {list(z.shape)} {z.dtype} with strides {z.stride()}")
    return z.data_ptr(), _SIGNS[z.dtype], z.shape[0], z.stride(0), z.shape[1]


def pack_signs(z: Tensor, neurons: Tensor | None) -> Tensor:
    """[rows, ceil(H / 64)] int64: bit j % 64 of word j // 64 is z[row, j] > 0, and 0 where `neurons` leaves j out."""
    kernels = _C or _load()
    mask = _taking_part(neurons, z.shape[1])
    words = torch.empty((z.shape[0], (z.shape[1] + 63) // 64), dtype=torch.int64, device="cpu")
    status = kernels.pack_signs(*_signs(z), 0 if mask is None else mask.data_ptr(), words.data_ptr(), torch.get_num_threads())
    if status != -1:
        raise MemoryError("fastsae: no memory for the workspace of pack_signs")
    return words


def hash_signs(z: Tensor, neurons: Tensor | None, layer: int, seed: int, bits: int) -> Tensor:
    """[rows] int64, or [rows, 2] with 128 bits: the XOR of the keys of the neurons with z > 0 that take part."""
    kernels = _C or _load()
    mask = _taking_part(neurons, z.shape[1])
    hashes = torch.empty((z.shape[0],) if bits == 64 else (z.shape[0], 2), dtype=torch.int64, device="cpu")
    status = kernels.hash_signs(
        *_signs(z), 0 if mask is None else mask.data_ptr(), layer, seed & (2**64 - 1), bits, hashes.data_ptr(), torch.get_num_threads()
    )
    if status != -1:
        raise MemoryError("fastsae: no memory for the workspace of hash_signs")
    return hashes


def hash_code(words: Tensor, neurons: Tensor | None, layer: int, seed: int, bits: int) -> Tensor:
    """The same from packed words [rows, w]; copied where the words of a code are not adjacent."""
    kernels = _C or _load()
    _same(torch.int64, words)
    mask = _taking_part(neurons, 64 * words.shape[1])
    words, rows, stride = _code_rows(words)
    hashes = torch.empty((rows,) if bits == 64 else (rows, 2), dtype=torch.int64, device="cpu")
    status = kernels.hash_code(
        words.data_ptr(), rows, stride, words.shape[1], 0 if mask is None else mask.data_ptr(), layer, seed & (2**64 - 1), bits,
        hashes.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if status != -1:
        raise MemoryError("fastsae: no memory for the workspace of hash_code")
    return hashes


# ---- adam ----


def _refuses_gradient(grad: Tensor, values: Tensor | None, indices: Tensor | None, crow: Tensor | None, **matrices: Tensor) -> str | None:
    if not _tried:
        unavailable()
    if _reason is not None:
        return _reason
    for name, t in (*matrices.items(), ("grad", grad), ("values", values)):
        if t is not None and t.dtype is not torch.float32:
            return f"dtype {str(t.dtype)[6:]} of {name} (supported: float32)"
        if t is not None and not t.is_cpu:
            return f"device {t.device} of {name} (supported: cpu)"
    if indices is not None and (not indices.is_cpu or indices.dtype not in _INDEX):
        return f"indices {str(indices.dtype)[6:]} on {indices.device} (supported: int64, int32 on cpu)"
    if crow is not None and (not crow.is_cpu or crow.dtype is not torch.int64):
        return f"crow {str(crow.dtype)[6:]} on {crow.device} (supported: int64 on cpu)"
    strides = None
    for name, t in matrices.items():
        lies = _lies(t)
        if lies is None:
            return f"{name} with strides {t.stride()} (supported: rows, or their transposed view)"
        if strides is not None and lies != strides:
            return f"{name} with strides {t.stride()} (supported: those of {next(iter(matrices))})"
        strides = lies
    return None


def _lies(t: Tensor) -> tuple[int, int] | None:
    """``(stride_f, stride_d)`` of a matrix that lies as rows (``stride_d`` 1) or as their transposed view (``stride_f`` 1), else None."""
    (features, width), (f, d) = t.shape, t.stride()
    if t.is_contiguous():
        return width, 1
    if (d == 1 or width == 1) and f >= width:
        return f, 1
    return (1, d) if (f == 1 or features == 1) and d >= features else None


def refuses_adam(
    W: Tensor, m: Tensor, v: Tensor,
    grad: Tensor, values: Tensor | None, indices: Tensor | None, crow: Tensor | None, factor: Tensor | None,
    *options: float,
) -> str | None:  # fmt: skip
    """Why `adam` cannot serve these inputs, or None."""
    if factor is not None and (factor.dtype is not torch.float32 or not factor.is_cpu):
        return f"factor {str(factor.dtype)[6:]} on {factor.device} (supported: float32 on cpu)"
    return _refuses_gradient(grad, values, indices, crow, W=W, m=m, v=v)


def refuses_grad_squares(
    W: Tensor, grad: Tensor, values: Tensor | None, indices: Tensor | None, crow: Tensor | None, project: bool
) -> str | None:
    """Why `grad_squares` cannot serve these inputs, or None."""
    return _refuses_gradient(grad, values, indices, crow, W=W)


def _gradient(
    W: Tensor, grad: Tensor, values: Tensor | None, indices: Tensor | None, crow: Tensor | None
) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]]:
    """The arguments that say where a gradient lies, and the tensors that hold what they point to."""
    if values is None or indices is None:
        if grad.shape != W.shape:
            raise ValueError(f"grad: expected {list(W.shape)}, got {list(grad.shape)}")
        _same(torch.float32, grad)
        lies, to = _lies(grad), _lies(W)
        if lies is None or (lies[1] != 1 and (to is None or to[1] == 1)):
            grad, lies = grad.contiguous(), (W.shape[1], 1)
        return (False, 0, 0, 0, 0, 0, 0, 0, grad.data_ptr(), *lies), (grad,)
    if not grad.is_contiguous():
        grad = grad.contiguous()
    indices, rows, k, n, crow, crow_address = _slots(indices, crow)
    if values.shape != indices.shape or grad.shape != (rows, W.shape[1]):
        raise ValueError(f"values {list(values.shape)}, indices {list(indices.shape)}, grad {list(grad.shape)} for W {list(W.shape)}")
    _same(torch.float32, grad, values)
    if not values.is_contiguous():
        values = values.contiguous()
    where = (True, indices.data_ptr(), _INDEX[indices.dtype], crow_address, rows, k, n, values.data_ptr(), grad.data_ptr(), W.shape[1], 1)
    return where, (grad, values, indices, crow)


def adam(
    W: Tensor, m: Tensor, v: Tensor,
    grad: Tensor, values: Tensor | None, indices: Tensor | None, crow: Tensor | None, factor: Tensor | None,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int, project: bool, normalise: bool,
) -> None:  # fmt: skip
    """One step of Adam on W, m, v [F, D] with the same strides, rows or their transposed view; csrc/fastsae.h has the arithmetic.

    Args:
        grad: [F, D] without slots; else [rows, D], with values, indices [rows, K], or [nnz] with crow [rows + 1].
        factor: None, or [] which multiplies the gradient; NaN: nothing is written.
    """
    kernels = _C or _load()
    if factor is not None and math.isnan(factor):
        return
    for name, t in (("W", W), ("m", m), ("v", v)):
        if t.shape != W.shape or (lies := _lies(t)) is None or lies != _lies(W):
            raise ValueError(f"{name}: expected {list(W.shape)} as W lies, got {list(t.shape)} with strides {t.stride()}")
    _same(torch.float32, W, m, v, *(() if factor is None else (factor,)))
    where, held = _gradient(W, grad, values, indices, crow)
    status = kernels.adam(
        *where, 0 if factor is None else factor.data_ptr(), W.data_ptr(), m.data_ptr(), v.data_ptr(), *W.shape, *lies,
        lr, beta1, beta2, eps, weight_decay, step, project, normalise, torch.get_num_threads(),
    )  # fmt: skip
    del held
    if status != -1:
        _fail(status, indices, crow, W.shape[0])  # pyright: ignore[reportArgumentType]


def refuses_signum(
    y: Tensor, z: Tensor, grad: Tensor, values: Tensor | None, indices: Tensor | None, crow: Tensor | None, *options: Any
) -> str | None:
    """Why `signum` cannot serve these inputs, or None."""
    return _refuses_gradient(grad, values, indices, crow, y=y, z=z)


def signum(
    y: Tensor, z: Tensor, grad: Tensor, values: Tensor | None, indices: Tensor | None, crow: Tensor | None,
    lr: float, momentum: float, share: float, project: bool, normalise: bool, factor: Tensor | None = None,
) -> None:  # fmt: skip
    """One step of schedule-free sign descent on y, z [F, D] with the same strides; grad, values, indices and crow as in `adam`."""
    kernels = _C or _load()
    _same(torch.float32, y, z, *(() if factor is None else (factor,)))
    if factor is not None and math.isnan(factor):
        return
    if z.shape != y.shape or (lies := _lies(y)) is None or _lies(z) != lies:
        raise ValueError(f"z: expected {list(y.shape)} as y lies, got {list(z.shape)} with strides {z.stride()}")
    where, held = _gradient(y, grad, values, indices, crow)
    status = kernels.signum(
        *where, y.data_ptr(), z.data_ptr(), *y.shape, *lies, lr, momentum, share, project, normalise, torch.get_num_threads()
    )
    del held
    if status != -1:
        _fail(status, indices, crow, y.shape[0])  # pyright: ignore[reportArgumentType]


def grad_squares(W: Tensor, grad: Tensor, values: Tensor | None, indices: Tensor | None, crow: Tensor | None, project: bool) -> Tensor:
    """The sum of squares of the gradient of W [F, D], []; arguments as in `adam`."""
    kernels = _C or _load()
    if (lies := _lies(W)) is None:
        raise ValueError(f"W: expected rows {list(W.shape)} or their transposed view, got strides {W.stride()}")
    _same(torch.float32, W)
    where, held = _gradient(W, grad, values, indices, crow)
    total = torch.empty((), dtype=torch.float32, device="cpu")
    status = kernels.grad_squares(*where, W.data_ptr(), *W.shape, *lies, project, total.data_ptr(), torch.get_num_threads())
    del held
    if status != -1:
        _fail(status, indices, crow, W.shape[0])  # pyright: ignore[reportArgumentType]
    return total
