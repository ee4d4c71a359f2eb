"""One line makes another library's SAE, trainer or runner fast without changing its results: ``fastsae.accelerate(obj)``.

    accelerate(obj)                 patches this instance (never its class, never at import) and returns it
    with accelerated(obj): ...      the same for a block
    restore(obj)                    undoes it: the class of before, nothing left behind
    report(obj)                     what is replaced by what, what is left alone and why, what runs densely as things stand
    encode(sae, x)                  the latents of any supported SAE, sparse; patched or not
    reconstruct(sae, x)             encode and decode of any supported SAE; with tensors it is the operation of that name

Classes are recognised by module and name, so no library is imported that the caller has not imported, and methods by their source: those
that were not tested, of another release or replaced in a class or an instance, stay the library's own, with a warning. One file a library
says what it replaces: ``saelens``, ``sparsify``, ``dictionary_learning``. Results agree with the library's own up to float32 rounding,
selections outside ties.

An accelerated object has a class made from its own one, of the same name: methods stored in the instance would stay bound to the original
in a copy, a class survives ``deepcopy`` and ``pickle`` and is found by ``super()`` and ``isinstance``. Parameters are read at every call,
so changing, replacing, moving and casting them works as before.
"""

from __future__ import annotations

import copyreg
import functools
import importlib
import re
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from fastsae._core import checks
from fastsae.latents import Latents
from fastsae.packed import PackedWeights
from fastsae.patch import _tested
from fastsae.sae import reconstruction as _operation
from fastsae.sae.module import SAE
from fastsae.sae.reconstruction import Reconstruction

__all__ = ["Adapter", "Library", "Report", "accelerate", "accelerated", "encode", "reconstruct", "report", "restore"]

T = TypeVar("T")

_LIBRARIES = {
    "dictionary_learning": "fastsae.patch.dictionary_learning",
    "sae_lens": "fastsae.patch.saelens",
    "sparsify": "fastsae.patch.sparsify",
}
"""Adapter module of each library, by the first part of its classes' module names; its ``LIBRARY`` is a ``Library``."""

_BASE, _STATE = "_fastsae_base", "_fastsae_state"


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
        now: ``{method: why}`` of what takes the library's own way as the object stands (a hook that needs dense numbers).
        encode: ``(sae, x) -> Latents``, on an object patched or not. packs: it takes ``packed=`` too, a handle of the encoder's weights.
        reconstruct: ``(sae, x, target) -> Reconstruction``, likewise.
    """

    mixin: type | None
    replaces: Mapping[str, str] = field(default_factory=dict)
    leaves: Mapping[str, str] = field(default_factory=dict)
    parts: Callable[[Any], Mapping[str, Any]] = _nothing
    now: Callable[[Any], Mapping[str, str]] = _nothing
    encode: Callable[..., Latents] | None = None
    reconstruct: Callable[[Any, Tensor, Tensor | None], Reconstruction] | None = None
    packs: bool = False


@dataclass(frozen=True)
class Library:
    """A library: the name of its distribution, the versions that are tested (``low <= version < high``), adapters by ``module.Class``, and
    the fingerprints of the tested methods (see ``changed``)."""

    distribution: str
    low: str
    high: str
    adapters: Mapping[str, Adapter]
    tested: str = ""

    @property
    def version(self) -> str:
        from importlib import metadata  # loads the parsers of mail headers: too slow for an import of fastsae

        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return "unknown"

    def refuses(self) -> str | None:
        """Why the installed version is not one of those tested, or None."""
        if _numbers(self.low) <= _numbers(self.version) < _numbers(self.high):
            return None
        return f"{self.distribution} {self.version} is installed; supported: >= {self.low}, < {self.high}"


@dataclass(frozen=True)
class Report:
    """What ``accelerate`` does to an object. ``str`` of it is a table.

    Attributes:
        name: ``module.Class``. library: distribution and version. accelerated: whether it is now.
        replaced, left: ``{method: by what | why}``; parts stand as ``part.method``.
        now: of ``replaced``, what takes the library's own (dense) way as the object stands, and why.
    """

    name: str
    library: str
    accelerated: bool
    replaced: Mapping[str, str]
    left: Mapping[str, str]
    now: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{self.name} ({self.library}): {'accelerated' if self.accelerated else 'not accelerated'}"]
        for title, rows in (("replaced", self.replaced), ("left", self.left), ("dense now", self.now)):
            lines += [f"  {title:9}  {name}: {text}" for name, text in rows.items()]
        return "\n".join(lines)


@dataclass
class _State:
    """``parts``: what was accelerated together with the object, for ``restore``. ``warned``: reasons given so far."""

    parts: list[Any] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)


def accelerate(obj: T, *, any_version: bool = False) -> T:
    """Makes an SAE, a trainer or a runner of SAELens, sparsify or dictionary_learning fast; results stay the same up to rounding.

    Args:
        obj: an instance of a supported class itself (a subclass of your own may mean something else by a method that would be replaced).
            A trainer's or runner's SAE is accelerated with it, where its class is supported. A second call does nothing.
        any_version: go on where the installed library is not of a tested version. Methods whose source is not the tested one (or cannot be
            read) still take the library's own way.

    Returns: ``obj``, patched in place. ``report(obj)`` says what was done; ``restore(obj)`` undoes it.

    Raises: TypeError: not of a supported class. RuntimeError: a version of the library that was not tested.

    A pickle of an accelerated object needs fastsae where it is loaded; ``state_dict`` and the library's own files do not.
    """
    op = "accelerate"
    if _is_accelerated(obj):
        return obj
    library, adapter = _lookup(op, obj)
    checks.flag(op, "any_version", any_version)
    reason = library.refuses()
    if reason is not None and not any_version:
        raise RuntimeError(f"{op}: {reason} (any_version=True goes on)")
    state = _State()
    for part in adapter.parts(obj).values():
        if not _is_accelerated(part) and _is_supported(part):
            state.parts.append(accelerate(part, any_version=any_version))
    if adapter.mixin is not None:
        obj.__class__ = _accelerated_class(type(obj))
    vars(obj)[_STATE] = state
    return obj


def restore(obj: T) -> T:
    """Undoes ``accelerate``, also of the parts it took along; the object is what it was. Without effect on others. Returns ``obj``.

    Raises: RuntimeError: its class was changed since, as torch's parametrisations do.
    """
    if _is_accelerated(obj):
        if _BASE in dir(type(obj)) and _BASE not in vars(type(obj)):
            raise RuntimeError(f"restore: obj has become a {type(obj).__qualname__} since (a parametrisation?); undo that first")
        state = vars(obj).pop(_STATE)
        obj.__class__ = _base(type(obj))
        for part in state.parts:
            restore(part)
    return obj


@contextmanager
def accelerated(obj: T) -> Iterator[T]:
    """``accelerate`` for a block; an object that was accelerated before stays so afterwards."""
    before = _is_accelerated(obj)
    try:
        yield accelerate(obj)
    finally:
        if not before:
            restore(obj)


def report(obj: Any) -> Report:
    """What ``accelerate`` replaces of an object (or has replaced), what it leaves and why, and what is dense as the object stands.

    Raises: TypeError: not of a supported class.
    """
    library, adapter = _lookup("report", obj)
    replaced, left, now = dict(adapter.replaces), dict(adapter.leaves), dict(adapter.now(obj))
    for name, part in adapter.parts(obj).items():
        if not _is_supported(part):
            left[name] = f"{type(part).__module__}.{type(part).__qualname__} is not a supported class"
            continue
        of_part = report(part)
        for rows, more in ((replaced, of_part.replaced), (left, of_part.left), (now, of_part.now)):
            rows.update({f"{name}.{method}": text for method, text in more.items()})
    return Report(class_name(obj), f"{library.distribution} {library.version}", _is_accelerated(obj), replaced, left, now)


def encode(sae: Any, x: Tensor, *, packed: PackedWeights | None = None) -> Latents:
    """The latents of ``x`` under an SAE of this library, SAELens, sparsify or dictionary_learning, sparse; accelerated or not.

    Args:
        sae: as for ``accelerate``, or a ``fastsae.SAE``. x: activations ``[.., D]`` as the SAE's own ``encode`` takes them.
        packed: a handle ``fastsae.pack(W)`` of the encoder's weights ``[F, D]`` (SAELens: ``sae.W_enc.T``), for many calls between which
            they do not change; SAELens's SAEs only.

    Returns:
        ``TopKLatents`` or ``RaggedLatents``: what the SAE's own ``encode`` returns, without its zeros, after its input normalisation and
        before any rescaling that its ``decode`` undoes. Differentiable like it. Hooks on dense latents do not fire.

    Raises: TypeError: not an SAE of a supported class, or one whose latents have no sparse form here. ValueError: ``packed`` is a handle of
        something else, or of weights that have changed. Else as the operations do.
    """
    if isinstance(sae, SAE):
        if packed is not None:
            raise TypeError("encode: packed does not go with a fastsae.SAE")
        return sae.encode(x)
    _, adapter = _lookup("encode", sae, "sae")
    if adapter.encode is None:
        raise TypeError(f"encode: {type(sae).__name__} is not an SAE with a sparse encoder{_because(adapter)}")
    checks.tensor("encode", "x", x)
    if packed is None:
        return adapter.encode(sae, x)
    if not isinstance(packed, PackedWeights):
        raise TypeError(f"encode: packed must be a PackedWeights, got {type(packed).__name__}")
    if not adapter.packs:
        raise TypeError(f"encode: packed does not go with {type(sae).__name__}")
    return adapter.encode(sae, x, packed=packed)


@overload
def reconstruct(x: Tensor, W_enc: Tensor, W_dec: Tensor, *args: Any, **options: Any) -> Reconstruction: ...
@overload
def reconstruct(sae: Any, x: Tensor, /, *, target: Tensor | None = None) -> Reconstruction: ...


@functools.wraps(_operation.reconstruct)
def reconstruct(x: Any, *args: Any, **options: Any) -> Reconstruction:
    if isinstance(x, Tensor) or not _of_library(x):
        return _operation.reconstruct(x, *args, **options)
    return _reconstruct(x, *args, **options)


reconstruct.__doc__ = f"""{(_operation.reconstruct.__doc__ or "").rstrip()}

    ``reconstruct(sae, x, target=None)`` does it for an SAE of this library, SAELens, sparsify or dictionary_learning (accelerated or not):
    ``x_hat`` is what the SAE returns for ``x``, the latents are those of ``fastsae.encode``, and the error compares with ``target``
    (default ``x``; None for a transcoder without one).
    """


def _reconstruct(sae: Any, x: Tensor, *, target: Tensor | None = None) -> Reconstruction:
    checks.tensor("reconstruct", "x", x)
    if isinstance(sae, SAE):
        return sae(x, target)
    _, adapter = _lookup("reconstruct", sae, "sae")
    if adapter.reconstruct is None:
        raise TypeError(f"reconstruct: {type(sae).__name__} is not an SAE with a sparse encoder{_because(adapter)}")
    return adapter.reconstruct(sae, x, target)


# ---------------------------------------------------------------- for adapters


def class_name(obj: Any) -> str:
    """``module.Class`` of the library's class, whatever was made of it."""
    base = _base(type(obj))
    return f"{base.__module__}.{base.__qualname__}"


def tampered(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class says: it has hooks, or a ``forward`` of its own."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def warn_once(obj: Any, reason: str) -> None:
    """Says once an object why it takes the library's own way."""
    state = vars(obj).get(_STATE)
    if state is None or reason not in state.warned:
        if state is not None:
            state.warned.add(reason)
        warnings.warn(f"fastsae: {type(obj).__name__} runs as without fastsae: {reason}", stacklevel=3)


def changed(obj: Any, *methods: str) -> str | None:
    """Why these methods of an object cannot be stood for, or None: the library's are not the tested ones, or the instance has its own."""
    base = _base(type(obj))
    reason = _untested(base, methods)
    if reason is not None or torch.compiler.is_compiling():
        return reason
    name = _tested.shadowed(obj, base, methods)
    return None if name is None else f"{name} was replaced in the instance"


def _untested(base: type, methods: tuple[str, ...]) -> str | None:
    library = _library(base)
    if _tested.fingerprint(base, methods) in library.tested:
        return None
    return f"{methods[0]} of {base.__name__}, or what it calls, is not that of {library.distribution} {library.low}, which was tested"


_untested._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]  # its decorator would import torch._dynamo


# ---------------------------------------------------------------- classes


@functools.cache
def _library(base: type) -> Library:
    return _find("", base)[0]


def _because(adapter: Adapter) -> str:
    return "".join(f" ({why})" for why in adapter.leaves.values()) if adapter.mixin is None else ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _is_accelerated(obj: Any) -> bool:
    return _STATE in getattr(obj, "__dict__", {})


def _base(cls: type) -> type:
    return getattr(cls, _BASE, cls)


def _of_library(obj: Any) -> bool:
    return isinstance(obj, SAE) or type(obj).__module__.split(".")[0] in _LIBRARIES


def _is_supported(obj: Any) -> bool:
    try:
        _lookup("", obj)
    except TypeError:
        return False
    return True


def _lookup(op: str, obj: Any, argument: str = "obj") -> tuple[Library, Adapter]:
    if isinstance(obj, type) and obj.__module__.split(".")[0] in _LIBRARIES:
        raise TypeError(f"{op}: {argument} must be an instance, got the class {obj.__module__}.{obj.__qualname__}")
    return _find(op, _base(type(obj)), argument)


def _find(op: str, base: type, argument: str = "obj") -> tuple[Library, Adapter]:
    name = f"{base.__module__}.{base.__qualname__}"
    module = _LIBRARIES.get(name.split(".")[0])
    if module is not None:
        library: Library = importlib.import_module(module).LIBRARY
        if name in library.adapters:
            return library, library.adapters[name]
        known = ", ".join(sorted(cls.rsplit(".", 1)[1] for cls in library.adapters))
        raise TypeError(f"{op}: {argument} must be of a supported class of {library.distribution} ({known}), got {name}")
    hint = ""
    parents = [cls for cls in base.__mro__[1:] if cls.__module__.split(".")[0] in _LIBRARIES]
    if parents:
        hint = f" (a subclass of {parents[0].__name__}: subclasses are left alone, their methods may mean something else)"
    elif base.__name__ == "OptimizedModule":
        hint = " (a compiled module: accelerate it first, then compile it)"
    elif issubclass(base, SAE):
        hint = " (made of the fast operations as it is)"
    raise TypeError(f"{op}: {argument} must be an SAE, trainer or runner of SAELens, sparsify or dictionary_learning, got {name}{hint}")


@functools.cache
def _accelerated_class(base: type) -> type:
    _, adapter = _find("accelerate", base)
    assert adapter.mixin is not None
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    more = {_BASE: base, "__reduce_ex__": _reduce_ex}
    return types.new_class(base.__name__, (adapter.mixin, base), exec_body=lambda space: space.update(names | more))


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """Pickled and copied by its base class, accelerated again when rebuilt: a class made at run time has no name to be found by."""
    cls = type(self)
    reduced = super(cls, self).__reduce_ex__(max(int(protocol), 2))
    if isinstance(reduced, str):
        return reduced
    make, args, *rest = reduced
    make, *args = (_base(cls) if part is cls else part for part in (make, *args))
    return _rebuild, (make, tuple(args)), *rest


def _rebuild(make: Callable[..., Any] = copyreg.__newobj__, args: tuple[Any, ...] = ()) -> Any:  # pyright: ignore[reportAttributeAccessIssue]
    obj = make(*args)
    obj.__class__ = _accelerated_class(_base(type(obj)))
    return obj
