"""Whether methods are those of the release that was tested, by their source: a version alone does not tell.

A checkout of a library's main branch reports the last release's version, and programs replace methods of classes and of instances. What an
adapter stands for is a set of methods and all that these reach by name in their own library: other methods, functions, classes.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import textwrap
from types import CodeType, FunctionType
from typing import Any

Member = tuple[Any, str, Any]
"""(class or module, name, what it holds there)."""
_FOREIGN = "of another package"
_seen: dict[tuple[type, tuple[str, ...]], tuple[list[Member], str]] = {}


def fingerprint(cls: type, methods: tuple[str, ...]) -> str:
    """Of the methods of a class and what they reach; looked up again where any of it has been replaced since."""
    before, digest = _seen.get((cls, methods), ([], ""))
    if not before or any(holder.__dict__.get(name) is not value for holder, name, value in before):
        members = _reached(cls, methods)
        text = "\n".join(
            sorted(f"{holder.__name__}.{name} {source}" for holder, name, value in members if (source := _source(holder, value)))
        )
        digest = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
        found = {(holder, name) for holder, name, _ in members}  # what is out of reach now may come back
        lost = [(holder, name, holder.__dict__.get(name)) for holder, name, _ in before if (holder, name) not in found]
        _seen[cls, methods] = members + lost, digest
    return digest


def shadowed(obj: Any, cls: type, methods: tuple[str, ...]) -> str | None:
    """The name of a method among them that the instance holds one of its own for; after ``fingerprint``."""
    own = obj.__dict__
    return next((name for holder, name, _ in _seen[cls, methods][0] if name in own and isinstance(holder, type)), None)


def _reached(cls: type, methods: tuple[str, ...]) -> list[Member]:
    found: list[Member] = []
    waiting: list[tuple[Any, str]] = [(cls, name) for name in methods]
    asked: set[tuple[Any, str]] = set()
    while waiting:
        owner, name = waiting.pop()
        if (owner, name) in asked:
            continue
        asked.add((owner, name))
        holders = [c for c in owner.__mro__ if _package(c.__module__) == _package(cls.__module__)] if isinstance(owner, type) else [owner]
        values = [holder.__dict__.get(name) for holder in holders]
        for value in values:
            function = _function(value)
            if function is not None and _package(_module(function)) == _package(cls.__module__):
                namespaces = [sys.modules[_module(function)], *([owner] if isinstance(owner, type) else [])]
                waiting += [(namespace, n) for n in _names(function.__code__) for namespace in namespaces]
            elif isinstance(value, type) and _package(value.__module__) == _package(cls.__module__):
                waiting += [(value, n) for n, v in vars(value).items() if _function(v) is not None]
        if any(_function(value) is not None or isinstance(value, type) for value in values):
            found += zip(holders, [name] * len(holders), values)
    return found


def _package(module: str) -> str:
    return module.split(".")[0]


def _module(function: FunctionType) -> str:
    """Where it was written: decorators copy ``__module__``."""
    return function.__globals__.get("__name__", "")


def _function(value: Any) -> FunctionType | None:
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    while isinstance(value, FunctionType) and hasattr(value, "__wrapped__") and _module(value).startswith("torch."):
        value = vars(value)["__wrapped__"]  # torch.no_grad and its like
    return value if isinstance(value, FunctionType) else None


def _names(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(part) for part in code.co_consts if isinstance(part, CodeType)))


def _source(holder: Any, value: Any) -> str:
    """Its syntax tree, so that layout, comments and annotations do not count; empty where there is none, as of what a dataclass makes."""
    function = _function(value)
    if function is None:
        return ""
    if _package(_module(function)) != _package(getattr(holder, "__module__", holder.__name__)):
        made = _package(_module(function)) in sys.stdlib_module_names or _module(function).startswith("namedtuple_")
        return "" if made or not isinstance(holder, type) else _FOREIGN  # modules import from others, classes do not
    try:
        return _tree(ast.parse(textwrap.dedent(inspect.getsource(function.__code__))))
    except (OSError, TypeError, SyntaxError):
        return ""


def _tree(node: Any) -> str:
    """What every version of Python says of it: ``ast.dump`` differs between them in fields that are empty."""
    if isinstance(node, list):
        return ",".join(filter(None, map(_tree, node)))
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
        return ""
    fields = [(name, value) for name, value in ast.iter_fields(node) if value not in (None, []) and name not in _SILENT]
    return f"{type(node).__name__}({' '.join(f'{name}={_tree(value)}' for name, value in fields)})"


_SILENT = ("ctx", "kind", "type_comment", "annotation", "returns")
