"""The packed form of an encoder, for evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastsae._core import checks
from fastsae.packed import PackedWeights

if TYPE_CHECKING:
    from typing_extensions import Self


class Packing(nn.Module):
    """A module whose ``W_enc`` has a packed form, kept until the weights change."""

    W_enc: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self._packed: PackedWeights | None = None
        self._use_packed = False

    @property
    def packed(self) -> bool:
        """Whether evaluation encodes from a packed form of the encoder (see ``fastsae.pack``): the same bits from a quarter of the bytes.

        Off at first; it takes about ``F * D`` bytes. The form is made at the first encoding in evaluation mode, and again at the first one
        after ``train()``, a step of an optimiser or another change that torch tells of; after those that it does not (``p.data.mul_()``,
        see ``PackedWeights``) call ``weights_changed()``. Training does not use it: packing costs a step more than it saves. Nor do
        parameters that were made under ``inference_mode``, and compiled code, which could not see them change.
        """
        return self._use_packed

    @packed.setter
    def packed(self, value: bool) -> None:
        self._use_packed = checks.flag("SAE", "packed", value)
        self.weights_changed()

    def weights_changed(self) -> None:
        """Drops what was derived from the weights."""
        self._packed = None

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.weights_changed()
        return super().train(mode)

    def _encoder(self, x: Tensor) -> Tensor | PackedWeights:
        """What rows like ``x`` are encoded from now."""
        if not self._use_packed or self.training or torch.compiler.is_compiling() or checks.autocasting(x.device):
            return self.W_enc
        if self.W_enc.is_inference():
            return self.W_enc
        if self._packed is None or self._packed.weight is not self.W_enc or not self._packed.fresh:
            self._packed = PackedWeights(self.W_enc)
        return self._packed
