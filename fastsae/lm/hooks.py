"""Where in a model activations are read or replaced: the input or the output of a module, by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Point(NamedTuple):
    """One hook point: its name as given, the module, and whether it is the module's input."""

    name: str
    module: nn.Module
    is_input: bool


def plain(op: str, model: Any) -> nn.Module:
    """The torch module: the model itself, or the one that nnsight's ``LanguageModel`` and ``NNsight`` wrap."""
    if not isinstance(model, nn.Module):
        held = getattr(model, "__dict__", {})
        module = held.get("_module", held.get("_model"))  # of nnsight since 0.4, and before
        if not isinstance(module, nn.Module):
            raise TypeError(f"{op}: model must be a torch.nn.Module (or nnsight's wrapper of one), got {type(model).__name__}")
        model = module
    return model


def hook_points(model: Any) -> dict[str, str]:
    """``{name: class}`` of every module of a model: ``name`` stands for its output, ``name:input`` for its first input.

    TransformerLens's hook points are modules: ``blocks.3.hook_resid_post``. Of nnsight's models it is the module that they wrap."""
    return {name: type(module).__name__ for name, module in plain("hook_points", model).named_modules() if name}


def find(op: str, model: nn.Module, names: Any) -> list[Point]:
    """The points of ``names``; ValueError (with what there is) where one names nothing."""
    names = [names] if isinstance(names, str) else list(names)
    modules = dict(model.named_modules(remove_duplicate=False))
    points: list[Point] = []
    for name in names:
        path, _, side = name.partition(":") if isinstance(name, str) else ("", "", "?")
        if side not in ("", "input", "output") or path not in modules:
            last = path.rpartition(".")[2]
            near = [known for known in modules if last and known.rpartition(".")[2] == last] or [known for known in modules if known]
            shown = ", ".join(near[:20]) + (f", .. ({len(near)})" if len(near) > 20 else "")
            raise ValueError(f"{op}: hook {name!r} must be the name of a module, or name:input; there are {shown}")
        points.append(Point(name, modules[path], side == "input"))
    if not points or len({point.name for point in points}) < len(points):
        raise ValueError(f"{op}: hooks must name at least one module, each once, got {names}")
    return points


def first_tensor(values: Any) -> Tensor:
    """The hidden states among a module's inputs or outputs: the first tensor."""
    if isinstance(values, Tensor):
        return values
    if isinstance(values, Mapping):
        values = list(values.values())
    for value in values if isinstance(values, (tuple, list)) else ():
        if isinstance(value, Tensor):
            return value
    raise TypeError(f"a module must give a tensor, or a tuple that holds one, got {type(values).__name__}")


def with_first(values: Any, replaced: Tensor) -> Any:
    """``values`` with another first tensor."""
    if isinstance(values, Tensor):
        return replaced
    if isinstance(values, Mapping):
        key = next(key for key, value in values.items() if isinstance(value, Tensor))
        made = type(values)(values)  # pyright: ignore[reportCallIssue]  # a dictionary's own copy, a ModelOutput too
        made[key] = replaced  # pyright: ignore[reportIndexIssue]
        return made
    at = next(i for i, value in enumerate(values) if isinstance(value, Tensor))
    made = [replaced if i == at else value for i, value in enumerate(values)]
    return type(values)(*made) if hasattr(values, "_fields") else type(values)(made)


def watch(point: Point, seen: Callable[[Tensor], Tensor | None]) -> torch.utils.hooks.RemovableHandle:
    """Calls ``seen`` with the hidden states at a point; what it returns takes their place."""
    if not point.is_input:

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            made = seen(first_tensor(output))
            return output if made is None else with_first(output, made)

        return point.module.register_forward_hook(after)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given: Any = args if any(isinstance(value, Tensor) for value in args) else kwargs
        made = seen(first_tensor(given))
        if made is None:
            return None
        return (with_first(args, made), kwargs) if given is args else (args, with_first(kwargs, made))

    return point.module.register_forward_pre_hook(before, with_kwargs=True)


def call(model: nn.Module, ids: Tensor, mask: Tensor | None) -> Any:
    """One forward call over token ids: by Hugging Face's names where the model has them, else by position. No cache is kept."""
    names = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"input_ids": ids} if "input_ids" in names else {}
    if mask is not None and "attention_mask" in names:
        options["attention_mask"] = mask.to(torch.int64)
    if "use_cache" in names:
        options["use_cache"] = False
    return model(**options) if "input_ids" in options else model(ids, **options)
