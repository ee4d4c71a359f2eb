"""Rows and features of one call as the kernels over scores take them, in chunks of rows and panels of features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastsae import _checks
from fastsae.kernels import _tile
from fastsae.kernels._tile import Tile

WORKSPACE = 128 << 20  # bytes of candidates, masks and rounded rows
PANEL = 32 << 20  # bytes of rounded features
MOST_ROWS = 4096  # of a chunk


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

    @property
    def n(self) -> int:
        return self.W.shape[0] if self.chosen is None else self.chosen.shape[0]

    @property
    def direct(self) -> bool:
        return self.x.dtype is not torch.float32 and self.centre is None

    def rows(self, part: slice) -> Problem:
        return replace(self, x=self.x[part], first_row=self.first_row + part.start)

    def flags(self) -> dict[str, bool]:
        return {
            "CHOSEN": self.chosen is not None, "SCALED": self.scale is not None, "BIASED": self.bias is not None,
        }  # fmt: skip

    def tile_shape(self) -> dict[str, int]:
        return {"ROWS": self.tile.rows, "COLUMNS": self.tile.columns, "DEPTH": self.tile.depth, "GROUP": self.tile.group}

    def tiles(self, n: int) -> tuple[int]:
        n_tiles = -(-self.x.shape[0] // self.tile.rows) * -(-n // self.tile.columns)
        return (_tile.programs(self.x.device, n_tiles),)

    def strides(self) -> tuple[int, ...]:
        return (*self.x.stride(), *self.W.stride())


def problem(x: Tensor, W: Tensor, b: Tensor | None, b_pre: Tensor | None, scale: Tensor | None, features: Tensor | None) -> Problem:
    chosen = _checks.sorted_subset(features, W.shape[0], "features")  # its length is the one thing that the host waits for
    scale, bias = (None if v is None else v if chosen is None else v[chosen] for v in (scale, b))
    return Problem(x, W, _tile.wide(b_pre), _tile.wide(scale), _tile.wide(bias), chosen, _tile.tile_for(x.device))


def chunks(rows: int, bytes_per_row: int, least: int, most: int = MOST_ROWS) -> Iterator[slice]:
    """Slices of ``range(rows)`` of a bounded workspace, multiples of ``least``."""
    step = max(least, min(MOST_ROWS, most, WORKSPACE // max(bytes_per_row, 1)) // least * least)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@dataclass(frozen=True)
class Rounded:
    """The rows of a chunk in float16, and room for a panel of features."""

    x: Tensor
    x_factors: Tensor
    panel: Tensor
    W_factors: Tensor

    @staticmethod
    def of(p: Problem) -> Rounded:
        rows, width = p.x.shape[0], _tile.pitch(p.W.shape[1])
        device = p.x.device
        step = max(p.tile.columns, PANEL // (2 * width) // p.tile.columns * p.tile.columns)
        x = torch.empty((rows, width), dtype=torch.float16, device=device)
        factors = torch.empty((3, rows), dtype=torch.float32, device=device)
        _tile.round_rows(p.x, slice(0, rows), x, factors, None, p.centre, of_rows=True)
        panel = torch.empty((min(step, p.n), width), dtype=torch.float16, device=device)
        return Rounded(x, factors, panel, torch.empty((3, p.n), dtype=torch.float32, device=device))

    def panels(self, p: Problem) -> Iterator[tuple[slice, Tensor]]:
        """Ranges of features with their rounded rows, valid until the next one."""
        step = self.panel.shape[0]
        for start in range(0, p.n, step):
            part = slice(start, min(start + step, p.n))
            panel = self.panel[: part.stop - start]
            _tile.round_rows(p.W, part, panel, self.W_factors, p.chosen, None, of_rows=False)
            yield part, panel
