"""Spline codes of a model's activation layers while it runs: hooks that pack or hash pre-activations and keep nothing else."""

from __future__ import annotations

import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastsae._core import checks
from fastsae.ops.spline import hash_signs, pack_signs

_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.GELU, nn.SiLU)
_EMITS = ("hash", "code")

Layers = str | Sequence[str] | Callable[[str, nn.Module], bool]


def _is_activation(module: nn.Module) -> bool:
    if isinstance(module, _ACTIVATIONS):
        return True
    kind = type(module)  # Hugging Face's GELUActivation, NewGELUActivation, SiLUActivation, .. without importing transformers
    return kind.__module__ == "transformers.activations" and any(
        name in kind.__name__.lower() for name in ("gelu", "silu", "relu", "swish")
    )


def _all_names(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(model.named_modules(remove_duplicate=False))  # a shared activation has a name at each place


def trace_points(model: nn.Module) -> dict[str, str]:
    """``{name: class}`` of every activation module of a model, in its order: what ``trace(model, layers)`` can name.

    A module that several layers share has a name at each of its places. A gated MLP's activation is its gate's.

    Raises: TypeError: not a module.
    """
    checks.instance("trace_points", "model", model, nn.Module, "a torch.nn.Module")
    return {name: type(module).__name__ for name, module in _all_names(model) if _is_activation(module)}


def _find(model: nn.Module, layers: Any) -> dict[str, nn.Module]:
    """The activation modules that ``layers`` names, or that lie in a block it names, each once; ValueError where one names nothing."""
    modules = _all_names(model)
    activations = {name: module for name, module in modules if _is_activation(module)}
    if callable(layers):
        wanted: dict[str, Callable[[str, nn.Module], object]] = {"the callable": layers}
    elif isinstance(layers, str) or (isinstance(layers, Sequence) and all(isinstance(pattern, str) for pattern in layers)):
        # "*.mlp" also names an mlp at the top.
        patterns = [layers] if isinstance(layers, str) else layers
        wanted = {repr(p): lambda name, _, p=p: bool(name) and (fnmatchcase(name, p) or fnmatchcase(f".{name}", p)) for p in patterns}
    else:
        raise TypeError(f"trace: layers must be a pattern, a list of patterns or a callable, got {type(layers).__name__}")
    found: set[str] = set()
    for what, matches in wanted.items():
        blocks = [name for name, module in modules if matches(name, module)]
        inside = {name for name in activations if any(block in ("", name) or name.startswith(f"{block}.") for block in blocks)}
        if not inside:
            raise ValueError(f"trace: {what} {_nothing(blocks, list(activations))}")
        found |= inside
    if not found:
        raise ValueError("trace: layers must name at least one layer, got an empty list")
    result: dict[int, tuple[str, nn.Module]] = {}
    for name, module in activations.items():  # in the model's order
        if name in found:
            result.setdefault(id(module), (name, module))
    return dict(result.values())


def _nothing(blocks: list[str], activations: list[str]) -> str:
    matched = f"matches {', '.join(blocks[:3])}{' ..' if len(blocks) > 3 else ''}, without an activation module in it" if blocks else ""
    advice = "an activation that is called as a function (F.relu) cannot be traced: make it a module, or use hash_signs on its input"
    if not activations:
        return f"{matched or 'matches nothing'}; the model has no activation module; {advice}"
    alike: dict[str, list[str]] = {}  # layers that differ in their numbers are told by the pattern for all of them
    for name in activations:
        alike.setdefault(".".join("*" if part.isdigit() else part for part in name.split(".")), []).append(name)
    kinds = [names[0] if len(names) == 1 else f"{pattern} ({len(names)} layers)" for pattern, names in alike.items()]
    shown = ", ".join(kinds[:40]) + (f", .. ({len(kinds)} in all)" if len(kinds) > 40 else "")
    return f"{matched or 'matches nothing'}; it could match: {shown}; {advice}"


class Trace:
    """What ``trace`` returns: a context manager, and the codes collected in it.

    Attributes:
        layers: names of the traced activation modules, in the model's order; layer number i of the keys is ``layers[i]``.
        mask: see ``trace``; may be set between forward calls.
    """

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module], emit: str, mask: Any, neurons: Any, seed: int, bits: int) -> None:
        self.layers = tuple(modules)
        self.mask = mask
        self._modules = modules
        self._emit, self._neurons, self._seed, self._bits = emit, neurons, seed, bits
        traced = {id(module) for module in modules.values()}
        self._around = {id(module): module for module in model.modules() if traced & set(map(id, module.modules()))}
        self._handles: list[Any] = []
        self._parts: dict[str, list[Tensor]] = {name: [] for name in modules}
        self._forget()

    def __enter__(self) -> Trace:
        if self._handles:
            raise RuntimeError("trace: already entered; a trace cannot be nested in itself")
        self._thread, self._ran = threading.get_ident(), False
        begin, done, end = self._hooks_around()
        try:
            for module in self._around.values():
                self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
                self._handles.append(module.register_forward_hook(done))
                self._handles.append(module.register_forward_hook(end, always_call=True))
            for number, (name, module) in enumerate(self._modules.items()):
                self._handles.append(module.register_forward_pre_hook(self._hook(name, number), with_kwargs=True))
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._remove()
        if kind is None and not self._ran:
            warnings.warn(
                "trace: no traced layer ran in the block; calls in a compiled graph, in another thread and in a backward pass do not count",
                stacklevel=2,
            )

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def _forget(self) -> None:
        """No call is under way."""
        self._running: list[nn.Module] = []  # from the outermost module called to the innermost
        self._frame: FrameType | None = None  # of the outermost call
        self._taken: dict[str, list[Tensor]] = {}  # its codes, a tensor for each time that a layer ran
        self._mask: Tensor | None = None

    def pop(self) -> dict[str, Tensor]:
        """The codes of all forward calls since the last ``pop``, and forgets them.

        Returns:
            By layer name, in the model's order: hashes ``[rows]`` int64 (``[rows, 2]`` with ``bits=128``) or codes ``[rows, words]``.
            Rows are the unmasked positions, call after call, each call's batch dimensions flattened: the same rows in every layer. A
            layer that did not run is missing. A module that runs several times in a forward call (an activation shared by layers) is
            ``name`` the first time, then ``name#2``, ``name#3``, each with layer numbers of its own. A call is the outermost one of a
            module with traced layers in it, of the model or of a part.
        """
        taken = {name: torch.cat(parts) for name, parts in self._parts.items() if parts}
        self._parts = {name: [] for name in self.layers}
        return taken

    # ---- hooks

    def _counts(self, module: nn.Module) -> bool:
        """Not a recomputation in a backward pass (activation checkpointing), another thread's call, or a copy's of the model."""
        backward = torch._C._current_graph_task_id() != -1  # pyright: ignore[reportPrivateUsage]  # torch has no public name for it
        return id(module) in self._around and not backward and threading.get_ident() == self._thread

    def _hooks_around(self) -> tuple[Callable[..., None], ...]:
        """Hooks of every module with a traced layer in it: the outermost one that is called makes a call, which counts whole or not at
        all. ``kwargs`` is missing where another thread calls while torch adds or removes a hook."""

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            if not self._counts(module):
                return
            if self._frame is not None and not _is_running(self._frame):  # what interrupted that call was no Exception
                self._forget()
            self._running.append(module)
            if len(self._running) == 1:
                self._frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]  # inspect's way reads source files
                self._mask = self._mask_of(module, args, kwargs or {})

        def done(module: nn.Module, args: Any, output: Any) -> None:
            if self._running == [module] and self._counts(module):
                for name, parts in self._taken.items():
                    for call, codes in enumerate(parts):
                        self._parts.setdefault(name if call == 0 else f"{name}#{call + 1}", []).append(codes)

        def end(module: nn.Module, args: Any, output: Any) -> None:
            if self._running[-1:] == [module] and self._counts(module):
                self._running.pop()
                if not self._running:
                    self._forget()

        return begin, done, end

    def _hook(self, name: str, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            if self._counts(module):
                parts = self._taken.setdefault(name, [])
                parts.append(
                    self._codes(name, args[0] if args else next(iter((kwargs or {}).values())), number + len(parts) * len(self.layers))
                )
                self._ran = True

        return hook

    def _mask_of(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The mask of the rows of a call of ``module``."""
        mask = self.mask
        if isinstance(mask, str):
            given = {**dict(zip(inspect.signature(module.forward).parameters, args)), **kwargs}
            if given.get(mask) is None:
                raise ValueError(f"trace: mask={mask!r} must name an argument that the model is called with, got {', '.join(given)}")
            past: Any = given.get("past_key_values")
            mask = given[mask]
            if hasattr(past, "get_seq_length") and not hasattr(past, "cross_attention_cache"):  # a decoder's, not beside an encoder's mask
                mask = mask[:, int(past.get_seq_length()) :] if isinstance(mask, Tensor) and mask.dim() == 2 else mask
        if isinstance(mask, Tensor) and mask.dim() == 4:
            raise ValueError(f"trace: mask must have an entry a position, [batch, seq], got an attention mask of pairs {list(mask.shape)}")
        return None if mask is None else checks.mask("trace", "mask", mask)

    def _codes(self, name: str, z: Tensor, number: int) -> Tensor:
        if torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(z):  # pyright: ignore[reportAttributeAccessIssue, reportPrivateUsage]
            raise RuntimeError(f"trace: layer {name} must run eagerly and outside torch.vmap, not while it is compiled, exported or mapped")
        neurons = self._neurons.get(name) if isinstance(self._neurons, Mapping) else self._neurons
        if isinstance(neurons, Tensor):
            neurons = neurons.to(z.device)
        if self._emit == "code":
            codes = pack_signs(z, neurons=neurons)
        else:
            codes = hash_signs(z, layer=number, seed=self._seed, bits=self._bits, neurons=neurons)
        batch = z.shape[:-1]
        codes = codes.reshape(batch.numel(), *codes.shape[len(batch) :])
        if self._mask is None:
            return codes
        checks.shape("trace", "mask", self._mask, batch, f"{list(batch)}, the batch dimensions of layer {name}")
        return codes[self._mask.reshape(-1).to(codes.device)]


def _is_running(frame: FrameType) -> bool:
    at = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while at is not None and at is not frame:
        at = at.f_back
    return at is not None


def trace(
    model: nn.Module,
    layers: Layers = "*",
    *,
    emit: str = "hash",
    mask: Tensor | str | None = None,
    neurons: Tensor | Mapping[str, Tensor] | None = None,
    seed: int = 0,
    bits: int = 64,
) -> Trace:
    """Spline codes of the layers of a model while it runs: ``with trace(model, "*.mlp") as t: model(**batch); t.pop()``.

    Args:
        model: any module; call this one inside the ``with`` block.
        layers: which activation modules: a pattern of qualified names as in ``fnmatch`` (``"encoder.layer.[0-3].*"``), a list of them, or
            ``layers(name, module) -> bool``. A name of a block (``"*.mlp"``) stands for the activation modules in it.
        emit: "hash": ``hash_signs`` with the layer's number in the key; "code": ``pack_signs``.
        mask: positions that count, bool or 0 and 1, ``[batch, seq]``; or the name of the argument of the module called that holds it
            (``"attention_mask"``), read at each call; beside a cache (``past_key_values``) its columns after those in the cache.
        neurons: index or mask of the neurons that take part, for all layers or by layer name.
        seed, bits: of the hashes, as in ``hash_signs``.

    Traced are nn.ReLU, LeakyReLU, PReLU, GELU and SiLU, and Hugging Face's activation modules of these kinds: a bit is the sign of what the
    model itself gives to its activation, whose last dimension is the neurons. Pre-activations are not kept: a row costs 8 or 16 bytes, or
    one bit a neuron. The model's results and gradients do not change. It must run eagerly: a compiled graph may skip hooks. A call that
    raises leaves no rows; what runs in a backward pass (activation checkpointing computes a layer again) or in another thread than the
    block's does not count, and a block in which no traced layer ran warns. Hooks are removed on leaving the block, also by an exception,
    and what was collected can still be popped. Hashes combine over layers by ``combine_hashes``, and go into a ``CodeCounter(t.layers)``.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
        >>> with torch.no_grad(), fastsae.codes.trace(model, "*") as t:  # of a transformer: "encoder.*", mask="attention_mask"
        ...     counter = fastsae.codes.CodeCounter(t.layers)
        ...     for batch in torch.randn(4, 100, 8):
        ...         y = model(batch)
        ...         counter.update(t.pop())
        >>> print(counter.table())

    Raises:
        TypeError: an argument's type. ValueError: a value, or a pattern that names no activation module (the message lists those there
        are). Inside the block, from the model's call: a mask or ``neurons`` that does not fit.
    """
    op = "trace"
    checks.instance(op, "model", model, nn.Module, "a torch.nn.Module")
    if emit not in _EMITS:
        raise ValueError(f"{op}: emit must be one of {', '.join(_EMITS)}, got {emit!r}")
    if mask is not None and not isinstance(mask, (Tensor, str)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{op}: mask must be a tensor, the name of an argument or None, got {type(mask).__name__}")
    seed = checks.integer(op, "seed", seed, 0, 2**64 - 1)
    bits = checks.plain(bits)
    if type(bits) is not int or bits not in (64, 128):
        raise ValueError(f"{op}: bits must be 64 or 128, got {bits!r}")
    for name, module in _all_names(model):
        several = isinstance(module, nn.DataParallel) and len(module.device_ids) > 1
        if several or vars(module).get("_compiled_call_impl") is not None or hasattr(module, "_orig_mod"):
            what, instead = ("a DataParallel over several devices", ".module") if several else ("compiled", " before torch.compile")
            raise ValueError(f"{op}: model must run eagerly in one thread, got {name or 'one'} that is {what}: trace the model{instead}")
    modules = _find(model, layers)
    for name, subset in neurons.items() if isinstance(neurons, Mapping) else (("", neurons),):
        if subset is not None and not isinstance(subset, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{op}: neurons must be a tensor or a dict of tensors, got {type(subset).__name__}")
        if name and name not in modules:
            raise ValueError(f"{op}: neurons has a layer {name!r}, expected of {', '.join(modules)}")
    return Trace(model, modules, emit, mask, neurons, seed, bits)
