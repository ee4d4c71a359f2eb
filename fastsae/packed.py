"""Handles of weights that do not change: packed once, accepted wherever the weights are."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastsae._core import checks

_live: weakref.WeakValueDictionary[int, Unchanged] = weakref.WeakValueDictionary()
"""By id: those whose tensors no optimiser has stepped."""
_stacks: weakref.WeakValueDictionary[int, torch.nn.Module] = weakref.WeakValueDictionary()
"""By the memory of its parameters: a module that others' parameters are views of (``SAEs``), which count their own writes alone."""
_hooks: list[Any] = []


def share(stack: torch.nn.Module) -> None:
    """Lets those who watch memory that ``stack`` owns see writes to its parameters."""
    _stacks.update({address: stack for p in stack.parameters(recurse=False) if (address := _memory(p)) is not None})


def _storage(t: Any) -> int:
    return t.untyped_storage()._cdata


def _memory(t: Tensor) -> int | None:
    """The address of the storage object, which all views of a tensor share."""
    try:
        return _storage(getattr(t, "_local_tensor", t))  # of a DTensor, this process's part
    except Exception:  # a sparse or an uninitialised parameter, which nobody watches
        return None


def _stepped(optimizer: Any, args: Any, kwargs: Any) -> None:
    """After every ``torch.optim`` step: the fused ones write without telling torch's version counter."""
    if watched := [unchanged for reference in _live.valuerefs() if (unchanged := reference()) is not None]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        stepped = [p for p in parameters if p.grad is not None] or parameters  # a hook of the optimiser's own may have cleared them
        changed = set(map(_memory, stepped))
        for unchanged in watched:
            if any(storage.cdata in changed for storage in unchanged.storages):
                _live.pop(id(unchanged), None)


class Unchanged:
    """Knows whether tensors hold what they held when it was made, as far as torch tells (``PackedWeights`` says how far)."""

    def __init__(self, *tensors: Tensor):
        if not _hooks:
            from torch.optim.optimizer import register_optimizer_step_post_hook

            _hooks.append(register_optimizer_step_post_hook(_stepped))
        self.tensors, self.states = tensors, [self._state(t) for t in tensors]
        self.storages = [StorageWeakRef(t.untyped_storage()) for t in tensors]  # so that no other storage gets their address
        _live[id(self)] = self

    @staticmethod
    def _state(t: Tensor) -> tuple[Any, ...]:
        memory, writes = _storage(t), -1 if t.is_inference() else t._version
        if _stacks and (stack := _stacks.get(memory)) is not None:
            writes += sum(p._version for p in stack.parameters(recurse=False) if not p.is_inference())
        return t.shape, t.stride(), t.dtype, t.data_ptr(), memory, writes

    def holds(self) -> bool:
        return _live.get(id(self)) is self and [self._state(t) for t in self.tensors] == self.states


class PackedWeights:
    """A dictionary ``[F, D]`` with its packed form, made by ``fastsae.pack``.

    The handle belongs to whoever made it: after the weights change, ``refresh()`` packs them again. Its next use raises an error after a
    change that torch tells of: a step of any ``torch.optim`` optimiser on them or on what they are a view of, a write in place that counts
    in ``_version``, other memory (``p.data = ...``). A write that torch keeps to itself is the owner's business: through ``p.data``,
    NumPy, DLPack or a raw address, by replaying a CUDA graph, by FSDP's gathering of shards, by an optimiser that is none of torch's.

    Attributes:
        weight: the tensor itself; gradients flow to it.
    """

    def __init__(self, weight: Tensor):
        checks.tensor("pack", "W", weight)
        if weight.dim() != 2:
            raise ValueError(f"pack: W must have shape [F, D], got {list(weight.shape)}")
        self.weight = weight
        self._words: Tensor | None = None
        self._unchanged: Unchanged | None = None  # of a copy, which is out of date
        self.refresh()

    def refresh(self) -> PackedWeights:
        """Packs the weights as they are now; returns the handle."""
        if self.weight.is_inference():
            raise ValueError("pack: W must not be an inference tensor, whose changes torch does not count; clone it outside inference_mode")
        self._unchanged = Unchanged(self.weight)
        self._words = _packed(self.weight.detach().resolve_neg())
        return self

    @property
    def fresh(self) -> bool:
        """Whether nothing that can be seen has changed the weights since they were packed."""
        return self._unchanged is not None and self._unchanged.holds()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form: 0 where this CPU (or device, or dtype) has no use for one."""
        return 0 if self._words is None else self._words.numel() * self._words.element_size()

    def words(self, op: str) -> Tensor | None:
        """The packed form, for the operations; an error where the weights have changed since. None for a compiler, whose code could not
        see that they do."""
        if torch.compiler.is_compiling():
            return None
        if not self.fresh:
            raise ValueError(
                f"{op}: the packed weights were changed since fastsae.pack (or its handle copied); call refresh() on the handle"
            )
        return self._words

    def __getstate__(self) -> dict[str, Any]:
        return {"weight": self.weight, "_words": None, "_unchanged": None}  # a copy is of other memory: out of date

    def __repr__(self) -> str:
        return f"PackedWeights({list(self.weight.shape)} {str(self.weight.dtype)[6:]}, {self.nbytes} bytes)"


def _packed(W: Tensor) -> Tensor | None:
    """What the screen of this device reads of W; None where it reads W itself."""
    if W.is_cuda:
        from fastsae._core import triton_support

        if triton_support.unavailable(W.device) or triton_support.dtype_reason(W):
            return None
        from fastsae.kernels import _problem  # pyright: ignore[reportMissingImports]  (mapped when installed)

        return _problem.pack(W)
    from fastsae.native import encode as native_encode

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

    Raises: TypeError: no tensor, or a dtype that is not floating. ValueError: shape, or an inference tensor. Compiled code reads the
    weights themselves.
    """
    return PackedWeights(W)
