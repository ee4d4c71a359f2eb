"""The compiled CUDA kernels: loads them on first use, says why they cannot serve, passes addresses on the current stream.

The only module that imports ``fastsae._cuda``; csrc/cuda/cuda.h is the contract of every function. Tensors here are plain and detached, as
the operations give them. No function waits for the device or allocates anything but its results and workspaces, so all of them can be
captured in a CUDA graph.

``FASTSAE_CUDA_EMULATION=<path of a module>`` names a build of the same sources for the CPU (tests/emulation.py makes one): the rows then
serve CPU tensors, thread by thread in C++, for tests. ``emulating()`` tells.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastsae._core import flags
from fastsae.latents import Slots
from fastsae.native.hamming import code_rows
from fastsae.native.loader import DTYPES, INDEX_DTYPES, address, build_info

_SIGNS = {**DTYPES, torch.bool: 3, torch.float64: 4}

MOST_K = 2048
"""Most entries of a row that the selections keep."""

WORKSPACE_BYTES = 64 << 20
"""Most bytes of one workspace: a tile of distances, the partial sums of the weight gradient."""

SPLIT = 128
"""Slots that one warp of the weight gradient sums; more where the partial sums would pass WORKSPACE_BYTES."""

_module: Any = None
_reason: str | None = None
_tried = False
_devices: dict[torch.device, str | None] = {}


def emulating() -> bool:
    """Whether the kernels run on the CPU, for tests."""
    return bool(os.environ.get("FASTSAE_CUDA_EMULATION"))


def missing() -> str | None:
    """Why the compiled module cannot be loaded and what to do, or None; whatever the devices are."""
    global _module, _reason, _tried
    if _tried:
        return _reason
    _tried = True
    if emulating():
        spec = importlib.util.spec_from_file_location("_cuda_emulated", os.environ["FASTSAE_CUDA_EMULATION"])
        assert spec is not None and spec.loader is not None
        _module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(_module)
        return None
    try:
        from fastsae import _cuda
    except ImportError as error:
        built = build_info().get("cuda")
        if built is None:
            _reason = "the CUDA C++ module is not built; run `pip install -e .` in the checkout, with nvcc"
        elif not built["built"]:
            _reason = f"the CUDA C++ module was not built: {built['reason']}"
        else:
            _reason = f"the CUDA C++ module was built by {built['nvcc']} but does not load: {error}"
    else:
        _module = _cuda
    return _reason


def unavailable(device: torch.device) -> str | None:
    """None, or the reason why the kernels cannot run on ``device``; found once a device."""
    try:
        return _devices[device]
    except KeyError:
        return _devices.setdefault(device, _find_reason(device))


def _find_reason(device: torch.device) -> str | None:
    if emulating():
        return missing() if device.type == "cpu" else f"device {device.type} (FASTSAE_CUDA_EMULATION serves cpu)"
    if device.type != "cuda":
        return f"device {device.type} (supported: cuda)"
    if torch.version.hip is not None:
        return "ROCm build of torch (supported: NVIDIA GPUs)"
    if (reason := missing()) is not None:
        return reason
    if torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"compute capability {major}.{minor} (supported: 8.0 and above)"
    return None


def _refuses(first: Tensor, *tensors: Tensor | None) -> str | None:
    if (reason := unavailable(first.device)) is not None:
        return reason
    for t in tensors:
        if t is not None and t.device != first.device:
            return f"tensors on {first.device} and {t.device}"
    return None


def _dtype(t: Tensor, name: str, supported: dict[torch.dtype, int]) -> str | None:
    if t.dtype in supported:
        return None
    return f"dtype {str(t.dtype)[6:]} of {name} (supported: {', '.join(str(dtype)[6:] for dtype in supported)})"


@contextmanager
def _stream(device: torch.device) -> Generator[tuple[int, int]]:
    """Its number and that of its current stream, for launches inside."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield device.index, torch.cuda.current_stream(device).cuda_stream
    else:
        yield 0, 0


def _launch(name: str, where: tuple[int, int], *arguments: object) -> None:
    _check(getattr(_module, name)(where, *arguments), name)


def _check(status: int, name: str) -> None:
    if status != 0:
        raise RuntimeError(f"fastsae: {name} could not be launched: {_module.error(status)} (CUDA error {status})")


def _flag(device: torch.device) -> Tensor:
    return flags.flag(device) if device.type == "cuda" else torch.zeros(1, dtype=torch.int32, device="cpu")


def _check_on_cpu(flag: Tensor, what: str, size: int) -> None:
    if flag.device.type == "cpu" and int(flag):
        raise IndexError(f"{what} holds an index outside 0 <= index < {size}")


# ---- select ----


def refuses_select_topk(z: Tensor, k: int, relu: bool) -> str | None:
    if (reason := _dtype(z, "z", DTYPES)) is not None:
        return reason
    if k > MOST_K:
        return f"k {k} (supported: at most {MOST_K})"
    if z.shape[1] > 1 and z.stride(1) != 1:
        return f"z with strides {z.stride()} (supported: stride 1 along F)"
    if z.shape[1] >= 2**32 - 1:
        return f"{z.shape[1]} columns (supported: fewer than 2^32 - 1)"
    return _refuses(z)


def select_topk(z: Tensor, k: int, relu: bool) -> tuple[Tensor, Tensor]:
    """The k largest of each row of z [rows, n]: (values [rows, k] in z.dtype, indices [rows, k] int64); workspace 8 bytes an entry."""
    (rows, n), device = z.shape, z.device
    values = torch.empty((rows, k), dtype=z.dtype, device=device)
    indices = torch.empty((rows, k), dtype=torch.int64, device=device)
    keys = torch.empty((rows, k), dtype=torch.int64, device=device)
    dtype = DTYPES[z.dtype]
    with _stream(device) as where:
        _launch("select_scores", where, z.data_ptr(), dtype, rows, n, z.stride(0), 0, k, False, keys.data_ptr())
        _launch("finish_scores", where, keys.data_ptr(), rows * k, relu, values.data_ptr(), dtype, indices.data_ptr())
    return values, indices


# ---- hamming ----


def refuses_hamming(a: Tensor, b: Tensor, out: Tensor) -> str | None:
    return _refuses(a, b, out)


def hamming(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out[i, j] (int32, any strides) = the number of bits that differ between a[i] and b[j], [N, words] and [M, words] int64."""
    (a, left), (b, right) = code_rows(a), code_rows(b)
    with _stream(a.device) as where:
        _launch("hamming", where, *left[:3], *right, out.data_ptr(), *out.stride())


def refuses_hamming_topk(a: Tensor, b: Tensor, k: int) -> str | None:
    if k > MOST_K:
        return f"k {k} (supported: at most {MOST_K})"
    if b.shape[0] >= 2**32 - 1:
        return f"{b.shape[0]} codes in b (supported: fewer than 2^32 - 1)"
    return _refuses(a, b)


def hamming_topk(a: Tensor, b: Tensor, k: int, *, workspace: int = WORKSPACE_BYTES) -> tuple[Tensor, Tensor]:
    """The k nearest rows of b for every row of a: distances [N, k] int32 ascending, indices [N, k] int64; ties by index.

    Distances are formed in tiles of at most ``workspace`` bytes; the best keys so far (8 bytes each) go from tile to tile.
    """
    a, b = code_rows(a)[0], code_rows(b)[0]
    (n, words), m, device = a.shape, b.shape[0], a.device
    distance = torch.empty((n, k), dtype=torch.int32, device=device)
    index = torch.empty((n, k), dtype=torch.int64, device=device)
    if n == 0:
        return distance, index
    width = min(m, max(64, workspace // 4 // min(n, 4096)))
    height = min(n, max(1, workspace // 4 // width))
    keys = torch.empty((n, k), dtype=torch.int64, device=device)
    tile = torch.empty((height, width), dtype=torch.int32, device=device)
    with _stream(device) as where:
        for top in range(0, n, height):
            rows = min(height, n - top)
            left, best = a[top : top + rows], keys[top : top + rows]
            for first in range(0, m, width):
                columns = min(width, m - first)
                right = b[first : first + columns]
                sides = left.data_ptr(), rows, a.stride(0), right.data_ptr(), columns, b.stride(0), words
                _launch("hamming", where, *sides, tile.data_ptr(), width, 1)
                _launch("select_distances", where, tile.data_ptr(), rows, columns, width, first, k, first > 0, best.data_ptr())
        _launch("finish_distances", where, keys.data_ptr(), n * k, distance.data_ptr(), index.data_ptr())
    return distance, index


# ---- signs ----


def refuses_pack_signs(z: Tensor, neurons: Tensor | None, *key: int) -> str | None:
    if (reason := _dtype(z, "z", _SIGNS)) is not None:
        return reason
    if z.numel() and z.shape[1] > 1 and z.stride(1) != 1:
        return f"z with strides {z.stride()} (supported: stride 1 along H)"
    if z.shape[1] >= 2**32:
        return f"{z.shape[1]} neurons (supported: fewer than 2^32)"
    return _refuses(z, neurons)


refuses_hash_signs = refuses_pack_signs


def refuses_hash_code(words: Tensor, neurons: Tensor | None, *key: int) -> str | None:
    if words.shape[1] >= 2**26:
        return f"{words.shape[1]} words (supported: fewer than 2^26)"
    return _refuses(words, neurons)


def _taking_part(neurons: Tensor | None, size: int, where: tuple[int, int]) -> Tensor | None:
    """An index or mask as a contiguous mask [size]; a bad index sets the device's flag."""
    if neurons is None:
        return None
    if neurons.dtype is torch.bool:
        return neurons.contiguous()
    neurons = neurons.contiguous()
    mask = torch.empty(size, dtype=torch.bool, device=neurons.device)
    flag = _flag(neurons.device)
    given = neurons.data_ptr(), INDEX_DTYPES[neurons.dtype], neurons.numel()
    _launch("mark", where, *given, size, mask.data_ptr(), flag.data_ptr())
    _check_on_cpu(flag, "neurons", size)
    return mask


def pack_signs(z: Tensor, neurons: Tensor | None) -> Tensor:
    """[rows, ceil(H / 64)] int64: bit j % 64 of word j // 64 is z[row, j] > 0, and 0 where `neurons` leaves j out."""
    (rows, size), device = z.shape, z.device
    words = torch.empty((rows, (size + 63) // 64), dtype=torch.int64, device=device)
    with _stream(device) as where:
        mask = _taking_part(neurons, size, where)
        _launch("pack_signs", where, z.data_ptr(), _SIGNS[z.dtype], rows, z.stride(0), size, address(mask), words.data_ptr())
    return words


def _hashed(name: str, given: tuple[int, ...], rows: Tensor, size: int, neurons: Tensor | None, key: tuple[int, int, int]) -> Tensor:
    """``name`` launched on what is given, with the keys of the neurons that take part."""
    layer, seed, bits = key
    hashes = torch.empty(rows.shape[:1] if bits == 64 else (rows.shape[0], 2), dtype=torch.int64, device=rows.device)
    keys = torch.empty((bits // 64, size), dtype=torch.int64, device=rows.device)
    with _stream(rows.device) as where:
        mask = _taking_part(neurons, size, where)
        _launch("neuron_keys", where, size, address(mask), layer, seed & (2**64 - 1), bits, keys.data_ptr())
        _launch(name, where, *given, keys.data_ptr(), bits, hashes.data_ptr())
    return hashes


def hash_signs(z: Tensor, neurons: Tensor | None, layer: int, seed: int, bits: int) -> Tensor:
    """[rows] int64, or [rows, 2] with 128 bits: the XOR of the keys of the neurons with z > 0 that take part; workspace [bits/64, H]."""
    return _hashed(
        "hash_signs", (z.data_ptr(), _SIGNS[z.dtype], z.shape[0], z.stride(0), z.shape[1]), z, z.shape[1], neurons, (layer, seed, bits)
    )


def hash_code(words: Tensor, neurons: Tensor | None, layer: int, seed: int, bits: int) -> Tensor:
    """The same from packed words [rows, w]; copied where the words of a code are not adjacent."""
    words, given = code_rows(words)
    return _hashed("hash_code", given, words, 64 * words.shape[1], neurons, (layer, seed, bits))


# ---- transposed latents ----


def by_feature(indices: Tensor, n_features: int) -> tuple[Tensor, Tensor]:
    """The slots by feature: (order [n] int32, segments [F + 1] int32, both to be read as unsigned).

    The slots of feature f are order[segments[f] : segments[f + 1]], ascending; slots with a bad index come after segments[F] and set the
    device's flag. A radix sort over the bits that F needs; workspace 12 bytes a slot and the sort's own.
    """
    device, n = indices.device, indices.numel()
    indices = indices.contiguous()
    order = torch.empty(n, dtype=torch.int32, device=device)
    segments = torch.empty(n_features + 1, dtype=torch.int32, device=device)
    flag = _flag(device)
    with _stream(device) as where:
        size = _module.by_feature_bytes(where, n, n_features)
        _check(max(0, -size), "by_feature's sort")
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        _launch(
            "by_feature", where, indices.data_ptr(), INDEX_DTYPES[indices.dtype], n, n_features, workspace.data_ptr(), order.data_ptr(),
            segments.data_ptr(), flag.data_ptr(),
        )  # fmt: skip
    _check_on_cpu(flag, "latents.indices", n_features)
    return order, segments


def refuses_decode_dweight(values: Tensor, indices: Tensor, crow: Tensor | None, grad: Tensor, out: Tensor) -> str | None:
    if (reason := _dtype(out, "out", DTYPES)) is not None:
        return reason
    if values.dtype is not out.dtype or grad.dtype is not out.dtype:
        return f"mixed dtypes: values {str(values.dtype)[6:]}, grad {str(grad.dtype)[6:]}, out {str(out.dtype)[6:]}"
    if out.shape[1] > 1 and out.stride(1) != 1:
        return f"out with strides {out.stride()} (supported: stride 1 along D)"
    if max(indices.numel(), out.shape[0], grad.shape[0]) >= 2**32 - 1:
        return f"{indices.numel()} slots, {out.shape[0]} features (supported: fewer than 2^32 - 1)"
    return _refuses(values, indices, grad, out, crow)


def decode_dweight(values: Tensor, indices: Tensor, crow: Tensor | None, grad: Tensor, out: Tensor) -> None:
    """out [F, D], every row written: the sum of value * grad[row] over the slots that name the feature, in (row, slot) order.

    csrc/cuda/by_feature.cu has the order of summation. Workspace: `by_feature`'s, 8 bytes a slot, partial sums of at most
    WORKSPACE_BYTES, and a copy of ``grad`` where its rows are not contiguous.
    """
    (n_features, D), n, device = out.shape, indices.numel(), out.device
    if crow is not None and device.type == "cpu":
        Slots(values, indices, crow).bounds()
    if n == 0 or out.numel() == 0 or grad.shape[0] == 0:
        if n:
            by_feature(indices, n_features)  # a bad index is still reported
        out.zero_()
        return
    k = indices.shape[1] if crow is None else 0
    values, grad = values.contiguous(), grad if grad.stride(1) == 1 else grad.contiguous()
    crow = None if crow is None else crow.contiguous()
    split = SPLIT
    while n // split * D * 4 > WORKSPACE_BYTES:
        split *= 2
    dtype = DTYPES[out.dtype]
    with _stream(device) as where:
        order, segments = by_feature(indices, n_features)
        row = torch.empty(n, dtype=torch.int32, device=device)
        value = torch.empty(n, dtype=torch.float32, device=device)
        partials = torch.empty((n // split, D), dtype=torch.float32, device=device)
        given = order.data_ptr(), n, values.data_ptr(), dtype, address(crow), grad.shape[0], k
        _launch("permute_slots", where, *given, row.data_ptr(), value.data_ptr())
        _launch(
            "sum_by_feature", where, segments.data_ptr(), n, n_features, row.data_ptr(), value.data_ptr(), grad.data_ptr(), dtype,
            grad.stride(0), D, split, partials.data_ptr(), out.data_ptr(), out.stride(0),
        )  # fmt: skip
