"""Argument checks of the public operations: one sentence an error, naming operation, argument, what came and what was expected."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsae._core import flags

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDICES = (torch.int64, torch.int32)
_INT64, _LARGEST = 2**63 - 1, sys.float_info.max


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _kind(value: Any) -> str:
    """The name of a type; NumPy's with its module, whose int64 is no int."""
    kind = type(value)
    return f"numpy.{kind.__name__}" if kind.__module__ == "numpy" else kind.__name__


def instance(op: str, name: str, value: Any, kinds: type | tuple[type, ...], wanted: str) -> None:
    """``value`` is of one of these classes; TypeError otherwise."""
    if not isinstance(value, kinds):
        raise TypeError(f"{op}: {name} must be {wanted}, got {type(value).__name__}")


def tensor(op: str, name: str, value: Any, dtypes: Sequence[torch.dtype] = FLOATS, like: Tensor | None = None) -> Tensor:
    """``value`` is a dense tensor of one of ``dtypes`` on the device of ``like``; TypeError otherwise."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if type(value) is not Tensor and type(value).__name__ == "DTensor":  # whose class is slow to import
        raise TypeError(f"{op}: {name} is a DTensor, of which this process holds a part: for match and mmcs give fastsae.distributed.part")
    if value.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must have dtype {_names(dtypes)}, got {_names([value.dtype])}")
    if value.layout is not torch.strided or value.is_nested:
        raise TypeError(
            f"{op}: {name} must be a dense (strided) tensor, got {'a nested one' if value.is_nested else f'layout {value.layout}'}"
        )
    if like is not None and value.device != like.device:
        raise TypeError(f"{op}: {name} must be on {like.device} like the other tensors, got {value.device}")
    return value


def shape(op: str, name: str, value: Tensor, expected: Sequence[int | None], meaning: str) -> None:
    """``value`` has the expected shape (None: any size); ValueError otherwise. ``meaning`` spells the shape, e.g. "[F, D=768]"."""
    if value.dim() == len(expected):
        for got, want in zip(value.shape, expected):
            if want is not None and got != want:
                break
        else:
            return
    turned = value.dim() == len(expected) == 2 and all(want in (None, got) for got, want in zip(reversed(value.shape), expected))
    hint = f" (transposed? pass {name}.T)" if turned else ""
    raise ValueError(f"{op}: {name} must have shape {meaning}, got {list(value.shape)}{hint}")


def same_dtype(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.dtype is not other.dtype:
        raise TypeError(f"{op}: {name} must have the dtype of {other_name} ({_names([other.dtype])}), got {_names([value.dtype])}")


def narrower(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """``value`` has the dtype of ``other``, or one whose numbers that dtype holds; TypeError otherwise."""
    if value.dtype is not other.dtype and torch.promote_types(value.dtype, other.dtype) is not other.dtype:
        names = _names([other.dtype]), _names([value.dtype])
        raise TypeError(f"{op}: {name} must have the dtype of {other_name} ({names[0]}), got {names[1]}; {name}.to({other.dtype}) casts it")


def widened(value: Tensor, like: Tensor) -> Tensor:
    """``value`` in the dtype of ``like`` where that holds its numbers; under autocast as it is."""
    same = value.dtype is like.dtype or torch.promote_types(value.dtype, like.dtype) is not like.dtype
    return value if same or autocasting(value.device) else value.to(like.dtype)


def beside(like: Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes of a vector or number beside ``like``: its own, or float32 beside half precision."""
    return (like.dtype,) if like.dtype in (torch.float32, torch.float64) else (like.dtype, torch.float32)


def vector(op: str, name: str, value: Any, size: int, like: Tensor, size_name: str) -> Tensor | None:
    """An optional vector beside ``like``: its dtype, or float32 beside a half-precision ``like``."""
    if value is None:
        return None
    tensor(op, name, value, beside(like), like)
    if value.dim() != 1 or value.shape[0] != size:
        shape(op, name, value, (size,), f"[{size_name}={size}]")
    return value


def plain(value: Any) -> Any:
    """A NumPy number as Python's; everything else as it is."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0 else value


def mask(op: str, name: str, value: Any, like: Tensor | None = None) -> Tensor:
    """A mask as bool: what is bool, or 0 and 1 in any real dtype (1: counts), as Hugging Face's are; TypeError or ValueError otherwise."""
    tensor(op, name, value, (torch.bool, *INDICES, torch.int16, torch.int8, torch.uint8, *FLOATS), like)
    if value.dtype is torch.bool:
        return value
    counts = value != 0
    additive = value.is_floating_point() and value.numel() > 0 and not bool((value > 0).any())
    if additive or not torch.equal(counts.to(value.dtype), value):
        hint = " (an additive attention mask, 0 where a position counts? pass mask == 0)" if additive else ""
        low, high = value.min().item(), value.max().item()
        raise ValueError(f"{op}: {name} must be bool, or 0 and 1 (1: counts), got {_names([value.dtype])} from {low:g} to {high:g}{hint}")
    return counts


def integer(op: str, name: str, value: Any, low: int, high: int | None = None, meaning: str = "") -> int:
    """An int (NumPy's become Python's) in ``low .. high``, at most ``2^63 - 1``; TypeError or ValueError otherwise."""
    if type(value) is not int:
        given, value = value, plain(value)
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{op}: {name} must be an int, got {_kind(given)}")
    if high is None and isinstance(value, int) and value > _INT64:
        high = _INT64
    if value < low or (high is not None and value > high):
        upper = "" if high is None else f" and at most {high}"
        raise ValueError(f"{op}: {name} must be at least {low}{upper}{f' ({meaning})' if meaning else ''}, got {value}")
    return value  # pyright: ignore[reportReturnType]


def flag(op: str, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        given, value = value, plain(value)
        if not isinstance(value, bool):
            raise TypeError(f"{op}: {name} must be a bool, got {_kind(given)}")
    return value


def number(op: str, name: str, value: Any, positive: bool = True) -> float:
    """A finite real number (NumPy's become Python's), above 0 where ``positive``; TypeError or ValueError otherwise."""
    if type(value) is not float:
        given, value = value, plain(value)
        if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
            raise TypeError(f"{op}: {name} must be a number, got {_kind(given)}")
    if not (0 < value <= _LARGEST if positive else -_LARGEST <= value <= _LARGEST):
        raise ValueError(f"{op}: {name} must be a finite number{' above 0' if positive else ''}, got {value}")
    return float(value) if isinstance(value, int) and abs(value) > _INT64 else value  # pyright: ignore[reportReturnType]


def rate(op: str, name: str, value: Any) -> float:
    """A number from 0 that float32 holds: a learning rate, a decay."""
    if not 0 <= (value := number(op, name, value, positive=False)) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{op}: {name} must be {'at least 0' if value < 0 else 'a float32'}, got {value}")
    return value


def within(like: torch.dtype, value: float) -> float:
    """A number brought into the range of a dtype: beside scores of that dtype it compares as it did."""
    largest = torch.finfo(like).max
    return value if -largest <= value <= largest else math.copysign(largest, value)


def subset(op: str, name: str, value: Any, size: int, like: Tensor, size_name: str) -> Tensor | None:
    """An optional choice of features or neurons: a 1-D index (int64, int32) or a boolean mask of ``size``."""
    if value is None:
        return None
    tensor(op, name, value, (*INDICES, torch.bool), like)
    if value.dim() != 1 or (value.dtype is torch.bool and value.shape[0] != size):
        raise ValueError(f"{op}: {name} must be a 1-D index or a mask of shape [{size_name}={size}], got {list(value.shape)} {value.dtype}")
    return value


def writable(op: str, name: str, value: Tensor) -> None:
    """A result can be written into ``value``: no two of its elements share memory; ValueError otherwise."""
    if any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape)):
        raise ValueError(f"{op}: {name} must not be an expanded tensor (elements that share memory), got strides {list(value.stride())}")


def index_dtype(op: str, value: Any, n_features: int) -> torch.dtype:
    if value not in INDICES:
        raise TypeError(f"{op}: index_dtype must be torch.int64 or torch.int32, got {value}")
    if value is torch.int32 and n_features > 2**31 - 1:
        raise ValueError(f"{op}: index_dtype int32 cannot number {n_features} features")
    return value


def autocasting(device: torch.device) -> bool:
    """Whether autocast is on for a device; False for device types that know none (meta)."""
    kind = device.type
    return (kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


def autocast(*values: Tensor | None) -> tuple[Any, ...]:
    """Under autocast: the inputs as ``F.linear`` would cast them (float64 stays); otherwise unchanged, as is what is no tensor."""
    device = next(value.device for value in values if value is not None)
    if not autocasting(device):
        return values
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(v.to(dtype) if isinstance(v, Tensor) and v.dtype in (torch.float32, torch.bfloat16, torch.float16) else v for v in values)


def sorted_subset(features: Tensor | None, size: int, what: str) -> Tensor | None:
    """A mask or index as ascending unique int64 indices. One out of range: IndexError on the CPU; on a GPU it is left out and raises at
    ``fastsae.check()``, so that the host waits for nothing but the number of indices."""
    if features is None:
        return None
    if features.dtype is torch.bool:
        if features.shape != (size,):
            raise ValueError(f"{what}: expected a 1-D index or a mask [{size}], got {list(features.shape)}")
        return features.nonzero().flatten()
    if features.device.type == "cuda":
        return _marked(features, size).nonzero().flatten()
    index = torch.unique(features.long())
    if index.numel() and (int(index[0]) < 0 or int(index[-1]) >= size):
        bad = int(index[0]) if int(index[0]) < 0 else int(index[-1])
        raise IndexError(f"{what} holds {bad}, expected 0 <= index < {size}")
    return index


def neuron_mask(neurons: Tensor | None, size: int) -> Tensor | None:
    """An index or mask as a contiguous mask ``[size]``; IndexError where an index is out of range."""
    if neurons is None:
        return None
    if neurons.dtype is torch.bool:
        return neurons.contiguous()
    if neurons.numel() and bool(((neurons < 0) | (neurons >= size)).any()):
        raise IndexError(f"neurons must hold indices 0 <= index < {size}, got {int(neurons.min())} .. {int(neurons.max())}")
    return torch.zeros(size, dtype=torch.bool, device=neurons.device).index_fill_(0, neurons.long(), True)


def _marked(features: Tensor, size: int) -> Tensor:
    """The mask ``[size]`` of an index; sets the device's flag where one is out of range."""
    bad = (features < 0) | (features >= size)
    flags.flag(features.device).logical_or_(bad.any())
    mask = torch.zeros(size + 1, dtype=torch.bool, device=features.device)
    return mask.index_fill_(0, features.long().masked_fill(bad, size), True)[:size]
