"""Rows and features of one call as the kernels over scores take them, in chunks of rows and panels of features."""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastsae._core import checks
from fastsae.kernels import _tile
from fastsae.kernels._tile import Tile
from fastsae.latents import ScoreInputs

WORKSPACE = 128 << 20  # bytes of candidates, masks and rounded rows
PANEL = 32 << 20  # bytes of rounded or copied features
MOST_ROWS = 4096  # of a chunk of a top-k
_FAR, _ABOVE = 8, 8  # outlier columns of a chunk, at most; how many times the median of the columns' sizes each of them exceeds


@dataclass(frozen=True)
class Problem:
    """Rows and features, and what turns their products into scores."""

    x: Tensor
    W: Tensor
    centre: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    chosen: Tensor | None
    tile: Tile
    magnitude: bool = False
    others: bool = False  # row i against all features but i
    first_row: int = 0
    packed: Tensor | None = None  # what ``pack`` made of W

    @property
    def n(self) -> int:
        return self.W.shape[0] if self.chosen is None else self.chosen.shape[0]

    @property
    def direct(self) -> bool:
        # Of a magnitude the sign comes from the exact product.
        return self.x.dtype is not torch.float32 and self.centre is None and not self.magnitude

    @property
    def row_bytes(self) -> int:
        """Of a row in ``Operands``, at most."""
        return 2 * _tile.pitch(self.W.shape[1]) + 64

    def rows(self, part: slice) -> Problem:
        return replace(self, x=self.x[part], first_row=self.first_row + part.start)

    def flags(self, chosen: Tensor | None) -> dict[str, bool]:
        return {"CHOSEN": chosen is not None, "SCALED": self.scale is not None, "BIASED": self.bias is not None}

    def tile_shape(self) -> dict[str, int]:
        return {"ROWS": self.tile.rows, "COLUMNS": self.tile.columns, "DEPTH": self.tile.depth, "GROUP": self.tile.group}

    def tiles(self, n: int) -> tuple[int]:
        n_tiles = -(-self.x.shape[0] // self.tile.rows) * -(-n // self.tile.columns)
        return (_tile.programs(self.x.device, n_tiles),)

    def strides(self) -> tuple[int, ...]:
        return (*self.x.stride(), *self.W.stride())


def problem(inputs: ScoreInputs) -> Problem:
    x, W, b, b_pre, scale, features, packed = inputs
    chosen = checks.sorted_subset(features, W.shape[0], "features")  # its length is the one thing that the host waits for
    scale, bias = (None if v is None else v if chosen is None else v[chosen] for v in (scale, b))
    packed = _checked(packed, W)
    return Problem(x, W, _tile.wide(b_pre), _tile.wide(scale), _tile.wide(bias), chosen, _tile.tile_for(x.device), packed=packed)


def chunks(rows: int, bytes_per_row: int, least: int, most: int = MOST_ROWS) -> Iterator[slice]:
    """Slices of ``range(rows)`` of a bounded workspace, multiples of ``least``; never more than ``most``."""
    least = min(least, max(most, 1))
    step = max(least, min(most, WORKSPACE // max(bytes_per_row, 1)) // least * least)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def rounded(v: Tensor, centre: Tensor | None, *, of_rows: bool, far: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(rows in float16 [n, pitch] without the columns ``far``, their three numbers [3, n])."""
    n = v.shape[0]
    halves = torch.empty((n, _tile.pitch(v.shape[1])), dtype=torch.float16, device=v.device)
    factors = torch.empty((3, n), dtype=torch.float32, device=v.device)
    _tile.round_rows(v, slice(0, n), halves, factors, None, centre, of_rows=of_rows, far=far)
    return halves, factors


def outliers(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """(which columns of x [D] are far larger than the others in some row; room for as many of them as there can be, these first; how many
    these are [1]). They differ between chunks: what they change is how much a screen leaves undecided."""
    low, high = torch.aminmax(p.x, dim=0)
    size = torch.maximum(-low, high).float() if p.centre is None else torch.maximum(p.centre - low, high - p.centre)
    size, D = size.nan_to_num(nan=0.0), len(size)  # or columns with a NaN would stand first without being far
    largest, columns = size.sort(descending=True)
    far = size > torch.maximum(_ABOVE * largest[D // 2 :][:1], largest[min(_FAR, D - 1) :][:1])
    return far.view(torch.uint8), columns[:_FAR], far.sum(dtype=torch.int32)


def steps(v: Tensor, *, turned: bool) -> bool:
    """Whether tiles load v's rows, or (``turned``) columns, 16 bytes at a time and in whole steps: Triton asks for multiples of 16."""
    (n, D), (r, d) = v.shape, v.stride()
    lines = (d == 1 and r % 16 == 0) or (turned and r == 1 and d % 16 == 0 and n % 16 == 0)
    return lines and D % _tile.pitch(1) == 0 < D and v.storage_offset() % 8 == 0


@dataclass(frozen=True)
class Operands:
    """What the tiles of a chunk multiply. Direct: rows and features themselves, or copies that load wide. Screened: the rows in float16
    without their outlier columns; the features as ``pack`` rounded them, or room for a panel of them; the outlier columns in float32."""

    x: Tensor
    x_factors: Any = None
    panel: Any = None
    W_factors: Any = None
    x_far: Any = None
    W_far: Any = None
    n_far: Any = None

    def factors(self) -> tuple[Any, ...]:
        return self.x_factors, self.W_factors, self.x_far, self.W_far, self.n_far

    @staticmethod
    def of(p: Problem) -> Operands:
        if p.direct:
            if steps(p.x, turned=False):
                return Operands(p.x)
            x = p.x.new_zeros((p.x.shape[0], _tile.pitch(p.x.shape[1])))  # rows that load so
            x[:, : p.x.shape[1]].copy_(p.x)
            return Operands(x)
        far, columns, n_far = outliers(p)
        x, factors = rounded(p.x, p.centre, of_rows=True, far=far)
        x_far, W_far = p.x.T[columns].float(), (p.W.T[columns] if p.chosen is None else p.W[p.chosen, columns[:, None]]).float()
        if p.centre is not None:
            x_far -= p.centre[columns, None]
        rest = x_far.contiguous(), W_far.contiguous(), n_far
        if p.packed is not None:
            panel, W_factors = _parts(p.packed, p.W)
            return Operands(x, factors, panel, W_factors if p.chosen is None else W_factors.index_select(1, p.chosen), *rest)
        return Operands(x, factors, None, factors.new_empty((3, p.n)), *rest)

    def panels(self, p: Problem) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Ranges of features with their rows, valid until the next one, and which of these they are (None: all, in order)."""
        if self.panel is not None or (p.direct and steps(p.W, turned=p.chosen is None)):
            if p.n:
                yield slice(0, p.n), p.W if self.panel is None else self.panel, p.chosen
            return
        step = max(p.tile.columns, PANEL // (2 * self.x.shape[1]) // p.tile.columns * p.tile.columns)
        room = self.x.new_zeros((min(step, p.n), self.x.shape[1]))
        for start in range(0, p.n, step):
            part = slice(start, min(start + step, p.n))
            panel = room[: part.stop - start]
            if p.direct:
                panel[:, : p.W.shape[1]].copy_(p.W[part] if p.chosen is None else p.W[p.chosen[part]])
            else:
                _tile.round_rows(p.W, part, panel, self.W_factors, p.chosen, None, of_rows=False)
            yield part, panel, None


# ---------------------------------------------------------------- handles


def pack(W: Tensor) -> Tensor | None:
    """What the screen reads of W [F, D]: its rows in float16, padded, then three float32 numbers a feature, all as [.] float16. None of an
    empty W."""
    if not W.numel():
        return None
    packed = torch.empty(_packed_size(W), dtype=torch.float16, device=W.device)
    with _tile.on(W.device):
        _tile.round_rows(W, slice(0, W.shape[0]), *_parts(packed, W), None, None, of_rows=False)
    return packed


def _packed_size(W: Tensor) -> int:
    return W.shape[0] * (_tile.pitch(W.shape[1]) + 6)


def _parts(packed: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    n, width = W.shape[0], _tile.pitch(W.shape[1])
    return packed[: n * width].view(n, width), packed[n * width :].view(torch.float32).view(3, n)


def _checked(packed: Tensor | None, W: Tensor) -> Tensor | None:
    """The handle's words if they are ours. In the interpreter they may be the compiled extension's, which are of no use here."""
    if packed is None or (packed.dtype is torch.int32 and packed.device.type == "cpu"):
        return None
    if packed.dtype is not torch.float16 or packed.shape != (_packed_size(W),) or packed.device != W.device:
        raise ValueError(f"packed {list(packed.shape)} {packed.dtype} on {packed.device} is not what pack returned for W {list(W.shape)}")
    return packed
