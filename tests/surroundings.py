"""Settings of torch that belong to the process, as contexts, and what they all are at present."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_C: Any = torch._C
PLACES = [("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("mkldnn", "all"), ("mkldnn", "matmul")]
NEWER = hasattr(_C, "_get_fp32_precision_getter")  # torch 2.9


def reset_precision() -> None:
    """As torch starts."""
    torch.set_float32_matmul_precision("highest")
    for place in PLACES if NEWER else ():
        _C._set_fp32_precision_setter(*place, "none")


def _read(get: Callable[[], Any]) -> Any:
    try:
        return get()
    except RuntimeError:
        return "raises"  # the older getters do where the newer settings are in use


def precision() -> tuple[Any, ...]:
    newer = tuple(_C._get_fp32_precision_getter(*place) for place in (*PLACES, ("cuda", "conv"), ("mkldnn", "rnn"))) if NEWER else ()
    return *newer, _read(torch.get_float32_matmul_precision), _read(lambda: torch.backends.cuda.matmul.allow_tf32)


def present() -> tuple[Any, ...]:
    return (
        torch.get_default_device(), torch.get_default_dtype(), precision(), torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # pyright: ignore[reportAttributeAccessIssue]  (a property of the module)
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_anomaly_enabled(),
    )  # fmt: skip


@contextmanager
def _set(setter: Callable[[Any], Any], value: Any, before: Any) -> Generator[None, None, None]:
    setter(value)
    try:
        yield
    finally:
        setter(before)


@contextmanager
def _precise(*settings: Callable[[], Any]) -> Generator[None, None, None]:
    try:
        for setting in settings:
            setting()
        yield
    finally:
        reset_precision()


def newer(backend: str, operation: str, value: str) -> Callable[[], Any]:
    return lambda: _C._set_fp32_precision_setter(backend, operation, value)


def older(value: str) -> Callable[[], Any]:
    return lambda: torch.set_float32_matmul_precision(value)


class _Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def _allow_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


PRECISIONS: dict[str, list[Callable[[], Any]]] = {
    "medium": [older("medium")],
    "high": [older("high")],
    "allow_tf32": [_allow_tf32],
    **({
        "cuda matmul tf32": [newer("cuda", "matmul", "tf32")],
        "all tf32": [newer("generic", "all", "tf32")],
        "all bf16": [newer("generic", "all", "bf16")],
        "mkldnn bf16": [newer("mkldnn", "all", "bf16")],
        "medium, then mkldnn tf32": [older("medium"), newer("mkldnn", "matmul", "tf32")],
        "all tf32, mkldnn matmul bf16": [newer("generic", "all", "tf32"), newer("mkldnn", "matmul", "bf16")],
    } if NEWER else {}),
}  # fmt: skip
SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default device": lambda: _set(torch.set_default_device, "meta", None),
    "with device": lambda: torch.device("meta"),
    **{
        f"default {dtype}": lambda dtype=dtype: _set(torch.set_default_dtype, dtype, torch.float32)
        for dtype in (torch.bfloat16, torch.float16, torch.float64)
    },
    **{name: lambda settings=settings: _precise(*settings) for name, settings in PRECISIONS.items()},
    "deterministic": lambda: _set(torch.use_deterministic_algorithms, True, False),
    "flush denormals": lambda: _set(torch.set_flush_denormal, True, False),
    "inference": lambda: torch.inference_mode(),
    "no grad": lambda: torch.no_grad(),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "dispatch mode": _Watching,
    "one thread": lambda: _set(torch.set_num_threads, 1, torch.get_num_threads()),
}
GRADLESS = ("inference", "no grad")


@contextmanager
def surroundings(names: Iterable[str]) -> Generator[None, None, None]:
    """All of these settings; at the end they must be what they were."""
    chosen = list(names)
    if sum(name in PRECISIONS for name in chosen) > 1:
        raise ValueError("one setting of precision at a time: each ends in torch's own")
    with ExitStack() as stack:
        for name in chosen:
            stack.enter_context(SETTINGS[name]())
        before = present()
        yield
        assert present() == before, chosen
