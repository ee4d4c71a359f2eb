"""What adapters of libraries are made of: an ``Adapter`` a class, a ``Library`` of them, and what their methods ask of an object."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook  # pyright: ignore[reportPrivateUsage]  # torch has no public name for it

from fastsae.gradients import Gradient
from fastsae.latents import Latents
from fastsae.patch import _tested
from fastsae.sae.reconstruction import Reconstruction

BASE, STATE = "_fastsae_base", "_fastsae_state"

LIBRARIES: dict[str, Library] = {}
"""By the first part of their classes' module names; an adapter module enters its own."""


def _nothing(obj: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Adapter:
    """What there is for one class of a library.

    Attributes:
        mixin: its methods go before those of the class and reach them by ``super()``; None: nothing is replaced, ``leaves`` says why.
        replaces: ``{method: by what}``.
        leaves: ``{method or part: why it is left alone}``.
        parts: ``{attribute: object}`` that are accelerated with it (a trainer's SAE).
        during: methods that get a trainer, which is accelerated while they run.
        makes: ``{method: class}``: of their module, whose instances that the method makes are accelerated.
        now: ``{method: why}`` of what takes the library's own way as the object stands (a hook that needs dense numbers).
        encode: ``(sae, x) -> Latents``, on an object patched or not. packs: it takes ``packed=`` too, a handle of the encoder's weights.
        reconstruct: ``(sae, x, target) -> Reconstruction``, likewise.
        transcoder: whether it reads a module's input and stands for its output.
        decoder: ``[F, d_out]``, what one unit of each latent adds to the reconstruction; ValueError where that depends on the row.
        methods: what it stands for: where their source is a tested one the library's version does not matter.
    """

    mixin: type | None
    replaces: Mapping[str, str] = field(default_factory=dict)
    leaves: Mapping[str, str] = field(default_factory=dict)
    parts: Callable[[Any], Mapping[str, Any]] = _nothing
    during: tuple[str, ...] = ()
    makes: Mapping[str, str] = field(default_factory=dict)
    now: Callable[[Any], Mapping[str, str]] = _nothing
    encode: Callable[..., Latents] | None = None
    reconstruct: Callable[[Any, Tensor, Tensor | None], Reconstruction] | None = None
    transcoder: Callable[[Any], bool] = lambda sae: False
    decoder: Callable[[Any], Tensor] | None = None
    packs: bool = False
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Library:
    """A library: the name of its distribution, the versions that are tested (``low <= version < high``), adapters by ``module.Class``, the
    fingerprints of the tested methods (see ``changed``); for ``encode`` and ``reconstruct``, the adapter of what is derived from ``base``
    (``module.Class``) and has none of its own."""

    distribution: str
    low: str
    high: str
    adapters: Mapping[str, Adapter]
    tested: str = ""
    base: str = ""
    rest: Adapter | None = None

    @property
    def version(self) -> str:
        from importlib import metadata  # loads the parsers of mail headers: too slow for an import of fastsae

        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return "unknown"

    def refuses(self, cls: type, adapter: Adapter) -> str | None:
        """Why the installed version is not one of those tested, or None; what a class does counts, where the adapter says what that is."""
        if adapter.methods and _tested.fingerprint(cls, adapter.methods) in self.tested:
            return None
        if _numbers(self.low) <= _numbers(self.version) < _numbers(self.high):
            return None
        return f"{self.distribution} {self.version} is installed; supported: >= {self.low}, < {self.high}"


@dataclass
class State:
    """``parts``: what was accelerated together with the object, for ``restore``. ``warned``: reasons given so far. ``writers``: ids of
    hooks that have changed what they were shown. ``pending``: gradients
    by parameter that wait for an optimiser's step; None: for none."""

    parts: list[Any] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)
    writers: frozenset[int] = frozenset()
    pending: list[Mapping[Tensor, Gradient]] | None = None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def base_class(cls: type) -> type:
    return getattr(cls, BASE, cls)


def class_name(obj: Any) -> str:
    """``module.Class`` of the library's class, whatever was made of it."""
    base = base_class(type(obj))
    return f"{base.__module__}.{base.__qualname__}"


def any_global_hook() -> bool:
    """Whether there is a hook on every module's calls."""
    return bool(_has_any_global_hook())


def tampered(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class says: it has hooks, or a ``forward`` of its own."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds) or "forward" in module.__dict__


def warn_once(obj: Any, reason: str, stacklevel: int = 3, how: str = "runs as without fastsae") -> None:
    """Says once an object why it takes the library's own way."""
    state = vars(obj).get(STATE)
    if state is None or reason not in state.warned:
        if state is not None:
            state.warned.add(reason)
        warnings.warn(f"fastsae: {type(obj).__name__} {how}: {reason}", stacklevel=stacklevel)


def library_way(obj: Any, reason: str | None) -> bool:
    """Whether there is a reason for the library's own way; says it once."""
    if reason is not None and not torch.compiler.is_compiling():
        warn_once(obj, reason, 4)
    return reason is not None


def need_slots(sae: Any, reason: str | None) -> None:
    """``fastsae.encode`` of an SAE whose latents have to be dense is an error, and why."""
    if reason is not None:
        raise ValueError(f"encode: {type(sae).__name__} has no sparse latents here: {reason}")


def changed(obj: Any, *methods: str) -> str | None:
    """Why these methods of an object cannot be stood for, or None: the library's are not the tested ones, or the instance has its own."""
    base = base_class(type(obj))
    reason = _untested(base, methods)
    if reason is not None or torch.compiler.is_compiling():
        return reason
    name = _tested.shadowed(obj, base, methods)
    return None if name is None else f"{name} was replaced in the instance"


def _untested(base: type, methods: tuple[str, ...]) -> str | None:
    library = LIBRARIES[base.__module__.split(".")[0]]
    if _tested.fingerprint(base, methods) in library.tested:
        return None
    tested = f"{library.distribution} {library.low} (to < {library.high})"
    return f"{methods[0]} of {base.__name__}, or what it calls, is not that of {tested}, which was tested"


_untested._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]  # its decorator would import torch._dynamo
