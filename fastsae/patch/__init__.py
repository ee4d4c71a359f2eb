"""One line makes another library's SAE, trainer or runner fast without changing its results: ``fastsae.accelerate(obj)``.

    accelerate(obj)                 patches this instance (never its class, never at import) and returns it
    with accelerated(obj): ...      the same for a block
    restore(obj)                    undoes it: the class of before, nothing left behind
    report(obj)                     what is replaced by what, what is left alone and why, what runs densely as things stand
    as_saelens(sae, hook_name)      an SAE of this library as SAELens's own class, for its evaluation, its models and SAEBench
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
import types
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from torch import Tensor

from fastsae._core import checks
from fastsae.formats import pretrained
from fastsae.latents import Latents
from fastsae.packed import PackedWeights
from fastsae.patch._adapter import BASE, LIBRARIES, STATE, Adapter, Library, State, base_class, class_name, warn_once
from fastsae.sae import reconstruction as _operation
from fastsae.sae.module import SAE
from fastsae.sae.reconstruction import Reconstruction

__all__ = ["Report", "accelerate", "accelerated", "as_saelens", "encode", "reconstruct", "report", "restore"]

T = TypeVar("T")

_MODULES = {
    "dictionary_learning": "fastsae.patch.dictionary_learning",
    "sae_lens": "fastsae.patch.saelens",
    "sparsify": "fastsae.patch.sparsify",
}
"""Adapter module of each library, by the first part of its classes' module names."""


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

    Example:
        >>> from sparsify import SparseCoder, SparseCoderConfig
        >>> sae = fastsae.accelerate(SparseCoder(64, SparseCoderConfig(num_latents=512, k=8)))
        >>> loss = sae(torch.randn(32, 64)).fvu
    """
    op = "accelerate"
    if _is_accelerated(obj):
        return obj
    library, adapter = _lookup(op, obj)
    checks.flag(op, "any_version", any_version)
    reason = library.refuses(base_class(type(obj)), adapter)
    if reason is not None and not any_version:
        raise RuntimeError(f"{op}: {reason} (any_version=True goes on)")
    state = State()
    for part in adapter.parts(obj).values():
        if not _is_accelerated(part) and _is_supported(part):
            state.parts.append(accelerate(part, any_version=any_version))
    if adapter.mixin is not None or adapter.during or adapter.makes:
        obj.__class__ = _accelerated_class(type(obj))
    vars(obj)[STATE] = state
    return obj


def restore(obj: T) -> T:
    """Undoes ``accelerate``, also of the parts it took along; the object is what it was. Without effect on others. Returns ``obj``.

    Raises: RuntimeError: its class was changed since, as torch's parametrisations do.
    """
    if _is_accelerated(obj):
        if BASE in dir(type(obj)) and BASE not in vars(type(obj)):
            raise RuntimeError(f"restore: obj has become a {type(obj).__qualname__} since (a parametrisation?); undo that first")
        state = vars(obj).pop(STATE)
        obj.__class__ = base_class(type(obj))
        for part in state.parts:
            restore(part)
    return obj


@contextmanager
def accelerated(obj: T) -> Generator[T, None, None]:
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
        sae: as for ``accelerate``, or a ``fastsae.SAE``; any SAE of SAELens, a class of your own that is derived from one included.
        x: activations ``[.., D]`` as the SAE's own ``encode`` takes them.
        packed: a handle ``fastsae.pack(W)`` of the encoder's weights ``[F, D]`` (SAELens: ``sae.W_enc.T``), for many calls between which
            they do not change; SAELens's SAEs only.

    Returns:
        ``TopKLatents`` or ``RaggedLatents``: what the SAE's own ``encode`` returns, without its zeros, after its input normalisation and
        before any rescaling that its ``decode`` undoes. Differentiable like it. Hooks on dense latents do not fire. Where nothing here
        computes what an SAE of SAELens does (matching pursuit, methods of another release), its own ``encode`` runs, hooks and all, and
        what is not 0 in its dense latents is taken.

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
    if not isinstance(packed, PackedWeights):  # pyright: ignore[reportUnnecessaryIsInstance]  # of callers without a type checker
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


def as_saelens(sae: SAE[Any], hook_name: str, **metadata: Any) -> Any:
    """An SAE or transcoder of this library as an object of SAELens's own class, accelerated, in evaluation mode.

    It goes wherever SAELens's do: ``sae_lens.evals.run_evals``, ``HookedSAETransformer.run_with_saes(saes=[..])``, and, as it asks for SAEs
    of one's own, SAEBench (``load_and_format_sae(release, sae, device)``). Needs sae-lens.

    Args:
        sae: its parameters are shared, not copied: what changes one in place (``fold_W_dec_norm``) changes the other. A normalisation
            that is not folded yet is folded into copies.
        hook_name: where it reads, as the model names it: ``blocks.3.hook_resid_post`` or a module of Hugging Face's model.
        metadata: further entries of ``cfg.metadata``: ``model_name`` (SAEBench needs it), ``hook_layer``, ``hook_name_out`` (transcoders).

    A BatchTopK becomes, as SAELens saves its own, a JumpReLU at its running threshold.

    Raises: TypeError: not an ``SAE``. ValueError: SAELens has no such one (top k without ReLU or of transcoders). ImportError: no sae-lens.
    RuntimeError: another version of it than ``accelerate`` takes.
    """
    op = "as_saelens"
    if not isinstance(sae, SAE):  # pyright: ignore[reportUnnecessaryIsInstance]  # of callers without a type checker
        raise TypeError(f"{op}: sae must be a fastsae.SAE, got {type(sae).__name__}")
    library = importlib.import_module("sae_lens").SAE
    tensors, config = sae.portable()
    config, tensors = pretrained.written(op, "saelens", config, tensors, {"hook_name": hook_name, **metadata})
    kind = config["architecture"]
    config = library.get_sae_config_class_for_architecture(kind).from_dict(config | {"device": "meta"})
    made = library.get_sae_class_for_architecture(kind)(config)
    made.load_state_dict(tensors, assign=True)
    return accelerate(made.to(device=sae.W_dec.device).eval())


def is_transcoder(sae: Any) -> bool:
    """Whether a dictionary, of this library or a supported one, reads a module's input and stands for its output."""
    return sae.transcoder if isinstance(sae, SAE) else _lookup("is_transcoder", sae, "sae")[1].transcoder(sae)


def decoder(sae: Any) -> Tensor:
    """``[F, d_out]``, what one unit of each latent adds to the reconstruction; TypeError, ValueError of one that has no such rows."""
    if isinstance(sae, SAE):
        return sae.W_dec
    adapter = _lookup("decoder", sae, "sae")[1]
    if adapter.decoder is None:
        raise TypeError(f"{type(sae).__name__} has no decoder that is known here{_because(adapter)}")
    return adapter.decoder(sae)


# ---------------------------------------------------------------- classes


def _because(adapter: Adapter) -> str:
    return "".join(f" ({why})" for why in adapter.leaves.values()) if adapter.mixin is None else ""


def _is_accelerated(obj: Any) -> bool:
    return STATE in getattr(obj, "__dict__", {})


def _of_library(obj: Any) -> bool:
    return isinstance(obj, SAE) or any(cls.__module__.split(".")[0] in _MODULES for cls in type(obj).__mro__)


def _is_supported(obj: Any) -> bool:
    try:
        _lookup("", obj)
    except TypeError:
        return False
    return True


def _lookup(op: str, obj: Any, argument: str = "obj") -> tuple[Library, Adapter]:
    if isinstance(obj, type) and obj.__module__.split(".")[0] in _MODULES:
        raise TypeError(f"{op}: {argument} must be an instance, got the class {obj.__module__}.{obj.__qualname__}")
    return _find(op, base_class(type(obj)), argument)


def _find(op: str, base: type, argument: str = "obj") -> tuple[Library, Adapter]:
    name = f"{base.__module__}.{base.__qualname__}"
    module = _MODULES.get(name.split(".")[0])
    if module is not None:
        importlib.import_module(module)
        library = LIBRARIES[name.split(".")[0]]
        if name in library.adapters:
            return library, library.adapters[name]
        if (rest := _rest(op, base)) is not None:
            return rest
        known = ", ".join(sorted(cls.rsplit(".", 1)[1] for cls in library.adapters))
        raise TypeError(f"{op}: {argument} must be of a supported class of {library.distribution} ({known}), got {name}")
    if (rest := _rest(op, base)) is not None:
        return rest
    hint = ""
    parents = [cls for cls in base.__mro__[1:] if cls.__module__.split(".")[0] in _MODULES]
    if parents:
        hint = f" (a subclass of {parents[0].__name__}: subclasses are left alone, their methods may mean something else)"
    elif base.__name__ == "OptimizedModule":
        hint = " (a compiled module: accelerate it first, then compile it)"
    elif issubclass(base, SAE):
        hint = " (made of the fast operations as it is)"
    raise TypeError(f"{op}: {argument} must be an SAE, trainer or runner of SAELens, sparsify or dictionary_learning, got {name}{hint}")


def _rest(op: str, base: type) -> tuple[Library, Adapter] | None:
    """For an SAE of no class that is known, derived from a library's: what its own ``encode`` gives."""
    if op not in ("encode", "reconstruct"):
        return None
    for cls in base.__mro__:
        if module := _MODULES.get(cls.__module__.split(".")[0]):
            importlib.import_module(module)
            library = LIBRARIES[cls.__module__.split(".")[0]]
            if library.rest is not None and library.base == f"{cls.__module__}.{cls.__qualname__}":
                return library, library.rest
    return None


@functools.cache
def _accelerated_class(base: type) -> type:
    _, adapter = _find("accelerate", base)
    bases = (base,) if adapter.mixin is None else (adapter.mixin, base)
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    more = {BASE: base, "__reduce_ex__": _reduce_ex, **{method: _during(base, method) for method in adapter.during}}
    more |= {method: _making(base, method, name) for method, name in adapter.makes.items()}
    return types.new_class(base.__name__, bases, exec_body=lambda space: space.update(names | more))


def _during(base: type, method: str) -> Callable[[Any, Any], Any]:
    def run(self: Any, trainer: Any) -> Any:
        with accelerated(trainer):
            return getattr(base, method)(self, trainer)

    return run


def _making(base: type, method: str, name: str) -> Callable[..., Any]:
    def run(self: Any) -> Any:
        own = getattr(base, method)
        if name not in own.__code__.co_names or not isinstance(own.__globals__.get(name), type):
            warn_once(self, f"{method} makes no {name}")
            return own(self)
        # The library's function, in whose eyes alone the class is another one: its module stays as it is.
        made = {name: lambda *args, **options: accelerate(own.__globals__[name](*args, **options))}
        return types.FunctionType(own.__code__, own.__globals__ | made, method, own.__defaults__, own.__closure__)(self)

    return run


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """Pickled and copied by its base class, accelerated again when rebuilt: a class made at run time has no name to be found by."""
    cls = type(self)
    reduced = super(cls, self).__reduce_ex__(max(int(protocol), 2))
    if isinstance(reduced, str):
        return reduced
    make, args, *rest = reduced
    make, *args = (base_class(cls) if part is cls else part for part in (make, *args))
    return _rebuild, (make, tuple(args)), *rest


def _rebuild(make: Callable[..., Any] = copyreg.__newobj__, args: tuple[Any, ...] = ()) -> Any:  # pyright: ignore[reportAttributeAccessIssue]
    obj = make(*args)
    obj.__class__ = _accelerated_class(base_class(type(obj)))
    return obj
