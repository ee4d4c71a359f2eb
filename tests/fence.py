"""Tensors that end, or begin, at a page that may not be accessed."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE


class Fence:
    """Tensors whose memory touches a forbidden page; they die with it."""

    def __init__(self, at_end: bool):
        self.at_end = at_end
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.maps: list[tuple[mmap.mmap, int, int]] = []

    def __enter__(self) -> Fence:
        return self

    def copy(self, value: Tensor) -> Tensor:
        span = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride())) if value.numel() else 0
        size = span * value.element_size()
        pages = -(-size // PAGE)
        region = mmap.mmap(-1, (pages + 2) * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(region))
        for guard in (start, start + (pages + 1) * PAGE):
            assert self.libc.mprotect(ctypes.c_void_p(guard), PAGE, getattr(mmap, "PROT_NONE", 0)) == 0
        self.maps.append((region, start, pages))
        if span == 0:
            return value
        offset = PAGE + (pages * PAGE - size if self.at_end else 0)
        flat = torch.frombuffer(memoryview(region), dtype=value.dtype, count=span, offset=offset)
        copy = flat.as_strided(value.shape, value.stride())
        copy.copy_(value)
        return copy

    def __exit__(self, *_: Any) -> None:
        for _region, start, pages in self.maps:
            for guard in (start, start + (pages + 1) * PAGE):
                self.libc.mprotect(ctypes.c_void_p(guard), PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
