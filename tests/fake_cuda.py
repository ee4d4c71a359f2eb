"""A CUDA device that is not there: host code runs on tensors without memory as it would on a GPU, and what it does is written down.

with FakeCuda() as gpu:
    W = gpu.tensor((1 << 21, 2048), torch.bfloat16)     # any size; no memory
    kernels.decode(values, indices, None, W, None)
gpu.launches, gpu.syncs, gpu.copies, gpu.peak           # and a launch that no GPU would take has raised

Kernels do not run: results are garbage that nobody may look at. Where the host looks it would wait for a GPU: that is a sync, and it
sees ``looked``.
"""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastsae._core import flags, triton_support
from fastsae.dispatch import Op
from fastsae.native import cuda as native_cuda

LOOKS = {"item", "tolist", "numpy", "__int__", "__float__", "__bool__", "__index__", "__array__", "__contains__"}
"""Methods of a tensor whose result the host reads."""

WAITS = {
    "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "_local_scalar_dense", "equal", "is_nonzero",
    "histc", "allclose",
}  # fmt: skip
"""Operations whose CUDA implementation waits for the device, for the size of its result or the result itself."""


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel: its numbers by name as the host gave them; a tensor here would live on."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]
    device: torch.device

    @property
    def name(self) -> str:
        return self.kernel.__name__


class FakeCuda:
    """See the module. ``device`` is not the current one outside of ``torch.cuda.device``, as a tensor's device need not be."""

    def __init__(
        self, capability: tuple[int, int] = (9, 0), multiprocessors: int = 132, index: int = 1, looked: int = 5, capturing: bool = False,
        cuda_module: bool = False,
    ):  # fmt: skip
        self.device, self.current, self.looked, self.capturing = torch.device("cuda", index), 0, looked, capturing
        self.properties = SimpleNamespace(
            major=capability[0], minor=capability[1], multi_processor_count=multiprocessors, L2_cache_size=50 << 20, total_memory=80 << 30,
            name="a GPU that is not there",
        )  # fmt: skip
        self.cuda_module = cuda_module
        self.launches: list[Launch] = []
        self.calls: list[str] = []  # of the CUDA C++ module
        self.syncs: list[str] = []
        self.copies: list[str] = []
        self.peak = 0  # most bytes at a time of tensors that were made, but for ``tensor`` and ``like``, since ``forget``
        self._made: dict[StorageWeakRef, int] = {}

    # -- tensors

    def tensor(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, *, transposed: bool = False) -> Tensor:
        shape = tuple(shape)
        peak = self.peak
        made = torch.empty(shape[::-1] if transposed else shape, dtype=dtype, device=self.device)
        self._given(made, peak)
        return made.T if transposed else made

    def like(self, value: Any) -> Any:
        """The same shape, strides and offset on the device; anything but a tensor as it is."""
        if not isinstance(value, Tensor):
            return value
        peak, size = self.peak, 1 + value.storage_offset() + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True) if n)
        with self.mode:
            flat = torch.empty(max(size, 1), dtype=value.dtype, device=self.device)
            self._given(flat, peak)
            return flat.as_strided(value.shape, value.stride(), value.storage_offset())

    def move(self, module: torch.nn.Module) -> Any:
        for values in (values for part in module.modules() for values in (part._parameters, part._buffers)):
            for name, t in values.items():
                if t is not None:
                    values[name] = torch.nn.Parameter(self.like(t)) if isinstance(t, torch.nn.Parameter) else self.like(t)
        return module

    def forget(self) -> None:
        for seen in (self.launches, self.calls, self.syncs, self.copies):
            seen.clear()
        self._made.clear()
        self.peak = 0

    def _given(self, t: Tensor, peak: int) -> None:
        self._made.pop(StorageWeakRef(t.untyped_storage()), None)
        self.peak = peak

    def made(self, t: Tensor) -> None:
        """Counts a new tensor among those that live."""
        self._made[StorageWeakRef(t.untyped_storage())] = t.untyped_storage().size()
        self._made = {ref: size for ref, size in self._made.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self._made.values()))

    # -- what the library asks

    def _launch(self, kernel: Any, args: tuple[Any, ...], grid: Any, kwargs: dict[str, Any]) -> None:
        names = [param.name for param in kernel.params]
        options = {key: value for key, value in kwargs.items() if key not in names}
        bound = kernel.signature.bind(*args, **{key: value for key, value in kwargs.items() if key in names})
        bound.apply_defaults()
        grid = grid if isinstance(grid, tuple) else (grid,)
        numbers = {name: value for name, value in bound.arguments.items() if not isinstance(value, Tensor)}
        launch = Launch(kernel, grid, numbers, options, torch.device("cuda", self.current))
        for name, value in bound.arguments.items():
            if isinstance(value, Tensor) and value.device != launch.device:
                raise AssertionError(f"{launch.name}: {name} lies on {value.device}, the launch goes to {launch.device}")
            if type(value) not in (int, float, bool, type(None)) and not isinstance(value, Tensor):
                raise AssertionError(f"{launch.name}: {name} is a {type(value).__name__}")
            if type(value) is int and not -(2**63) <= value < 2**63:
                raise AssertionError(f"{launch.name}: {name} = {value}")
        if options.get("enable_fp_fusion") is not False:  # or the compiler decides where a product and a sum round, and 3.9 warns of it
            raise AssertionError(f"{launch.name}: enable_fp_fusion = {options.get('enable_fp_fusion')}")
        if not all(type(n) is int for n in grid):
            raise AssertionError(f"{launch.name}: grid {grid}")
        # CUDA's limits, and the product that Triton's launcher forms in a C int: 0 is not launched, and neither is one that passes it.
        if not (0 <= grid[0] < 2**31 and all(0 <= n < 2**16 for n in grid[1:]) and math.prod(grid) < 2**31):
            raise AssertionError(f"{launch.name}: grid {grid}")
        self.launches.append(launch)

    def _where(self, what: str) -> str:
        frames = [f for f in traceback.extract_stack() if "/fastsae/" in f.filename or "/kernels/" in f.filename]
        place = f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].name}" if frames else "?"
        return f"{what} in {place}"

    def sync(self, what: str) -> None:
        self.syncs.append(self._where(what))

    def _module(self) -> Any:
        gpu = self

        class Module:
            MAX_K = native_cuda.MOST_K

            def __getattr__(self, name: str) -> Any:
                def call(where: tuple[int, int], *rest: Any) -> int:
                    device, stream = where
                    assert device == gpu.current == gpu.device.index, f"{name}: device {device}, current {gpu.current}"
                    assert stream == 1000 + device, f"{name}: stream {stream} of another device"
                    assert all(type(value) in (int, bool) for value in rest), f"{name}: {rest}"
                    gpu.calls.append(name)
                    return 1 << 20 if name == "by_feature_bytes" else 0

                return call

        return Module()

    @contextlib.contextmanager
    def _entered(self) -> Generator[None, None, None]:
        gpu = self

        class Device:
            def __init__(self, device: Any):
                self.index: int | None = torch.device(device).index if not isinstance(device, int) else device

            def __enter__(self) -> None:
                self.before, gpu.current = gpu.current, gpu.current if self.index is None else self.index

            def __exit__(self, *_: Any) -> None:
                gpu.current = self.before

        def stream(device: Any = None) -> Any:
            index = gpu.current if device is None else torch.device(device).index
            return SimpleNamespace(cuda_stream=1000 + index, synchronize=lambda: gpu.sync("Stream.synchronize"))

        bind = JITFunction.run
        touched: dict[Any, tuple[Any, Any]] = {}

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            gpu._launch(kernel, args, grid, kwargs)
            if kernel not in touched:
                touched[kernel] = vars(kernel).get("compile"), kernel.device_caches.pop(gpu.device.index, None)
            # Types, specialisations and options as Triton takes them, up to the compiler.
            bind(kernel, *args, grid=grid, warmup=True, **kwargs)

        def leave() -> None:
            for kernel, (compiler, known) in touched.items():
                kernel.compile = compiler
                kernel.device_caches.pop(gpu.device.index, None)
                if known is not None:
                    kernel.device_caches[gpu.device.index] = known

        major, minor = self.properties.major, self.properties.minor
        driver = SimpleNamespace(
            get_current_device=lambda: gpu.current,
            get_current_stream=lambda device: 1000 + device,
            get_current_target=lambda: GPUTarget("cuda", 10 * major + minor, 32),
        )

        patches = {
            "device": Device,
            "current_device": lambda: gpu.current,
            "current_stream": stream,
            "get_device_properties": lambda device=None: gpu.properties,
            "get_device_capability": lambda device=None: (gpu.properties.major, gpu.properties.minor),
            "is_available": lambda: True,
            "is_current_stream_capturing": lambda: gpu.capturing,
            "synchronize": lambda device=None: gpu.sync("cuda.synchronize"),
            "device_count": lambda: 2,
        }
        reason = None if self.cuda_module else "the CUDA C++ module is not there"
        with contextlib.ExitStack() as stack:
            for name, value in patches.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, value))
            stack.callback(leave)
            stack.enter_context(mock.patch.object(JITFunction, "run", run))
            stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))
            stack.enter_context(mock.patch.object(triton.compiler, "compile", lambda src, **_: src))
            stack.enter_context(mock.patch.dict(triton_support._reasons, {self.device: None}))
            stack.enter_context(mock.patch.dict(native_cuda._devices, {self.device: reason}))
            stack.enter_context(mock.patch.dict(flags._flags))
            if self.cuda_module:
                stack.enter_context(mock.patch.object(native_cuda, "_module", self._module()))
            # The dispatcher would ask an operation's fake for the shapes; here its body runs.
            stack.enter_context(mock.patch.object(Op, "__call__", lambda op, *args, backend=None: op._body(*args, backend=backend)))
            from fastsae.kernels import _tile

            _tile._chip.cache_clear()
            stack.callback(_tile._chip.cache_clear)
            stack.enter_context(self.mode)
            stack.enter_context(_Watch(self))
            stack.enter_context(_Host(self))
            yield

    def __enter__(self) -> FakeCuda:
        self.mode = FakeTensorMode()
        self._context = self._entered()
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


class _Watch(TorchDispatchMode):
    """Operations that wait, copies between devices, sizes."""

    def __init__(self, gpu: FakeCuda):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, name, gpu = kwargs or {}, func._schema.name.removeprefix("aten::"), self.gpu
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        tensors += [t for a in args if isinstance(a, (list, tuple)) for t in a if isinstance(t, Tensor)]
        on_gpu = any(t.device.type == "cuda" for t in tensors)
        if on_gpu and (name in WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None)):
            gpu.sync(name)
        if on_gpu and name in ("index", "index_put_", "_index_put_impl_", "index_put") and any(t.dtype is torch.bool for t in tensors[1:]):
            gpu.sync(f"{name} by a mask")
        if name in ("_to_copy", "copy_"):
            target = kwargs.get("device") or args[0].device if name == "_to_copy" else args[0].device
            source = args[0].device if name == "_to_copy" else args[1].device
            if target is not None and {source.type, torch.device(target).type} == {"cpu", "cuda"}:
                gpu.copies.append(gpu._where(f"{source.type} to {torch.device(target).type}"))
        for key in ("out", "grad_input"):  # a stand-in of such an overload would copy, and ask for a device guard
            if isinstance(kwargs.get(key), Tensor):
                return kwargs[key]
        result = func(*args, **kwargs)
        given = {t.untyped_storage()._cdata for t in tensors}
        for t in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(t, Tensor) and t.device.type == "cuda" and t.untyped_storage()._cdata not in given:
                gpu.made(t)
        return result


class _Host(TorchFunctionMode):
    """What reads a tensor's elements or address on the host; and what asks for a device guard, which a CPU build of torch has not."""

    def __init__(self, gpu: FakeCuda):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        t = args[0] if args and isinstance(args[0], Tensor) else None
        if t is None or t.device.type != "cuda":
            return func(*args, **kwargs)
        if name == "data_ptr":
            return 0 if t.numel() == 0 else (1 << 40) + t.storage_offset() * t.element_size()
        if name == "cpu":
            self.gpu.sync("cpu")
            return torch.empty(t.shape, dtype=t.dtype)
        if name in LOOKS:
            self.gpu.sync(name)
            looked = self.gpu.looked
            if name in ("tolist", "numpy", "__array__"):
                return torch.full(t.shape, looked).tolist() if name == "tolist" else torch.full(t.shape, looked).numpy()
            return {"__float__": float, "__bool__": bool}.get(name, int)(looked)
        if name == "nonzero":
            self.gpu.sync(name)
            if kwargs.get("as_tuple"):
                return tuple(torch.empty(t.numel(), dtype=torch.int64, device=t.device) for _ in t.shape)
            return torch.empty((t.numel(), t.dim()), dtype=torch.int64, device=t.device)
        if name == "__invert__":
            return torch.ops.aten.bitwise_not.default(t)
        if name == "contiguous":
            return t if t.is_contiguous() else torch.ops.aten.clone.default(t, memory_format=torch.contiguous_format)
        if name == "copy_":
            return torch.ops.aten.copy_.default(*args, **kwargs)
        if name == "__getitem__":
            return _get(t, args[1])
        if name == "__setitem__":
            index, value = args[1], args[2]
            parts = index if isinstance(index, tuple) else (index,)
            if any(isinstance(part, Tensor) for part in parts):
                value = value if isinstance(value, Tensor) else torch.full((), value, dtype=t.dtype, device=t.device)
                torch.ops.aten.index_put_(t, list(parts), value)
            else:
                target = _get(t, index)
                target.copy_(value) if isinstance(value, Tensor) else target.fill_(value)
            return None
        return func(*args, **kwargs)


def _get(t: Tensor, index: Any) -> Tensor:
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is Ellipsis for part in parts):
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        parts[at : at + 1] = [slice(None)] * (t.dim() - sum(part is not None and part is not Ellipsis for part in parts))
    d, tensors = 0, []
    for part in parts:
        if part is None:
            t = t.unsqueeze(d)
            d += 1
        elif isinstance(part, slice):
            start, stop, step = part.indices(t.shape[d])
            t = torch.ops.aten.slice.Tensor(t, d, start, max(start, stop), step)
            d += 1
        elif isinstance(part, Tensor):
            tensors.append((d, part))
            d += part.dim() if part.dtype is torch.bool else 1
        else:
            t = torch.ops.aten.select.int(t, d, int(part))
    if tensors:
        indices: list[Any] = [None] * t.dim()
        for at, part in tensors:
            indices[at] = part
        while indices and indices[-1] is None:
            indices.pop()
        t = torch.ops.aten.index.Tensor(t, indices)
    return t
