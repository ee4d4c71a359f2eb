"""What counts as a dictionary: a tensor, an object of any library with a decoder (by the protocols below), or weights on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from fastsae._core.world import ALONE, World
from fastsae.formats import weight_files
from fastsae.ops.match import check_dictionaries


class HasDecoderRows(Protocol):
    """SAEs of this library, SAELens, sparsify, and some of dictionary_learning."""

    @property
    def W_dec(self) -> Tensor:
        """``[F, D]``; checked against ``b_dec [D]`` and ``b_enc [F]`` where the object has them."""
        ...


class HasDecoderLayer(Protocol):
    """dictionary_learning's other dictionaries, and autoencoders of two layers."""

    @property
    def decoder(self) -> torch.nn.Linear:
        """From F features to D: its weight is ``[D, F]``."""
        ...


Dictionary: TypeAlias = Tensor | HasDecoderRows | HasDecoderLayer | str | bytes | os.PathLike[str]


def world_of(value: Any) -> World:
    """The processes on which a dictionary's features lie."""
    world = getattr(value, "world", ALONE)
    return world if isinstance(world, World) and world.virtual > 1 else ALONE


def as_dictionaries(op: str, values: Sequence[Dictionary], names: Sequence[str]) -> list[Tensor]:
    """Each value as a ``[F, D]`` tensor, that of a file on the device of those that are none, of one D and on one device. Of what is
    sharded (``world_of``) this process's part."""
    sides = [_dictionary(op, name, value).detach() for name, value in zip(names, values)]
    files = [_is_path(value) for value in values]
    device = next((side.device for side, file in zip(sides, files) if not file), None)
    sides = [side.to(device) if file and device is not None else side for side, file in zip(sides, files)]
    for name, side in zip(names, sides):
        check_dictionaries(op, sides[0], side, (names[0], name))
    return sides


def _dictionary(op: str, name: str, value: Any) -> Tensor:
    """A ``[F, D]`` tensor from a tensor, an SAE with ``W_dec [F, D]`` or a linear ``decoder``, or weights on disk that hold one."""
    if isinstance(value, Tensor):
        return value
    weight = getattr(value, "W_dec", None)
    if isinstance(weight, Tensor):
        return _beside_biases(f"{op}: {name}.W_dec", weight, getattr(value, "b_dec", None), getattr(value, "b_enc", None))
    decoder = getattr(value, "decoder", None)
    if isinstance(decoder, torch.nn.Linear):
        return decoder.weight.T
    if _is_path(value):
        path = os.fsdecode(value)
        where = op if name == path else f"{op}: {name}"
        try:
            tensors = weight_files.dictionary(path)
        except ImportError as error:
            raise ImportError(f"{where}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return _beside_biases(f"{where}: {path}: W_dec", *tensors)
    expected = "a tensor [F, D], an SAE with W_dec or a linear decoder, or a file or folder of weights"
    raise TypeError(f"{op}: {name} must be {expected}, got {type(value).__name__}")


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, bytes, os.PathLike))


def _beside_biases(what: str, weight: Tensor, b_dec: Any, b_enc: Any) -> Tensor:
    """A decoder, which the lengths of ``b_dec [D]`` and ``b_enc [F]`` beside it must show to be [F, D]."""
    for axis, (name, bias) in enumerate((("b_enc", b_enc), ("b_dec", b_dec))):
        if isinstance(bias, Tensor) and weight.dim() == 2 and bias.dim() == 1 and bias.shape[0] != weight.shape[axis]:
            hint = (
                " (it looks like [D, F]: dictionaries are feature-major, pass W_dec.T)" if bias.shape[0] == weight.shape[1 - axis] else ""
            )
            want = f"[F, D={len(bias)}]" if axis else f"[F={len(bias)}, D]"
            raise ValueError(f"{what} must be {want} beside its {name}, got {list(weight.shape)}{hint}")
    return weight
