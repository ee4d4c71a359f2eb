"""Handles of weights that do not change: packed once, accepted wherever the weights are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae import _checks


class PackedWeights:
    """A dictionary ``[F, D]`` with its packed form, made by ``fastsae.pack``.

    The handle belongs to whoever made it: after the weights change, ``refresh()`` packs them again. Other memory, or a change in place that
    torch's version counter saw, raises an error at the next use; a change behind its back (``p.data.mul_()``) is the owner's business.

    Attributes:
        weight: the tensor itself; gradients flow to it.
    """

    def __init__(self, weight: Tensor):
        _checks.tensor("pack", "W", weight)
        if weight.dim() != 2:
            raise ValueError(f"pack: W must have shape [F, D], got {list(weight.shape)}")
        self.weight = weight
        self._words: Tensor | None = None
        self.refresh()

    def refresh(self) -> PackedWeights:
        """Packs the weights as they are now; returns the handle."""
        self._words = _packed(self.weight.detach())
        self._made_of = self._state()
        return self

    def _state(self) -> tuple[Any, ...]:
        weight = self.weight
        return weight.shape, weight.dtype, weight.device, weight.data_ptr(), None if weight.is_inference() else weight._version

    @property
    def fresh(self) -> bool:
        """Whether nothing that can be seen has changed the weights since they were packed."""
        return self._state() == self._made_of

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form: 0 where this CPU (or device, or dtype) has no use for one."""
        return 0 if self._words is None else self._words.numel() * self._words.element_size()

    def words(self, op: str) -> Tensor | None:
        """The packed form, for the operations; an error where the weights have changed since."""
        if not torch.compiler.is_compiling() and not self.fresh:
            raise ValueError(f"{op}: the packed weights were changed since fastsae.pack; call refresh() on the handle")
        return self._words

    def __repr__(self) -> str:
        return f"PackedWeights({list(self.weight.shape)} {str(self.weight.dtype)[6:]}, {self.nbytes} bytes)"


def _packed(W: Tensor) -> Tensor | None:
    """What the screen of this device reads of W; None where it reads W itself."""
    if W.is_cuda:
        from fastsae import _triton

        if _triton.unavailable(W.device) or _triton.dtype_reason(W):
            return None
        from fastsae.kernels import _problem

        return _problem.pack(W)
    from fastsae import native_encode

    return native_encode.pack(W)


def pack(W: Tensor) -> PackedWeights:
    """Packs weights for repeated encoding: ``encode_topk(x, pack(W), ...)`` reads fewer bytes and packs nothing.

    Args:
        W: ``[F, D]``, any strides; float32, bfloat16 or float16. float64 is accepted and gains nothing. On a GPU half precision gains
            where ``b_pre`` is given, as its products without one are the scores and need no screen.

    Returns:
        ``PackedWeights``, accepted as ``W_enc`` by the encoders and ``reconstruct`` and as ``W`` by ``spline_code`` and ``spline_hash``.
        Results are the same bits. It takes, on a CPU, about ``F * D`` bytes more than ``W``; for a ``W`` that is not row-major (a
        transposed view) also a row-major copy of it. On a GPU: ``2 * F * (D rounded up to 64) + 12 * F`` bytes.

    Raises: TypeError: no tensor, or a dtype that is not floating. ValueError: shape.
    """
    return PackedWeights(W)
