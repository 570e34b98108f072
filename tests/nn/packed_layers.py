"""Packed layers with given grids and shapes."""

from __future__ import annotations

import torch

from bondsmith.nn.packed import PackedLinear
from bondsmith.tensor.rounding import Grid, round_to_nearest

INT4 = Grid(4, 64, symmetric=False)


def layer(grid: Grid, rows: int = 128, columns: int = 192, bias: bool = True) -> PackedLinear:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(rows, columns, generator=generator)
    return PackedLinear.from_rounded(
        round_to_nearest(W, grid), torch.randn(rows, generator=generator) if bias else None
    )
