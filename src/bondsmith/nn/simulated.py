"""Cores that are rounded in every forward pass while their full numbers are trained: what rounds well later is learned now."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from bondsmith.nn.linear import MPOLinear
from bondsmith.tensor.rounding import Grid, round_to_nearest


class SimulatedLinear(nn.Linear):
    """`y = round(W) x`; the gradient passes the rounding as if it were not there (Bengio et al. 2013, the straight-through estimator).

    >>> core = nn.Linear(4, 3, bias=False)
    >>> simulated = SimulatedLinear.of(core, Grid(4, 4))
    >>> simulated.weight is core.weight, simulated(torch.eye(4)).unique().numel() <= 3 * 16
    (True, True)
    """

    grid: Grid

    @classmethod
    def of(cls, core: nn.Linear, grid: Grid) -> SimulatedLinear:
        """Returns the layer that shares the weight of `core`."""
        layer = cls(1, 1, bias=False, device="meta")
        layer.in_features, layer.out_features, layer.weight, layer.grid = (
            core.in_features,
            core.out_features,
            core.weight,
            grid,
        )
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """`(..., O)`."""
        return F.linear(x, _Rounding.apply(self.weight, self.grid))


class _Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, grid: Grid) -> Tensor:
        return round_to_nearest(weight, grid).dequantize(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def simulate_rounding(model: nn.Module, grid: Grid) -> None:
    """Makes every core of every network one that is rounded in each forward pass; their names and weights stay."""
    for layer in list(model.modules()):
        if isinstance(layer, MPOLinear):
            for k, core in enumerate(layer.cores):
                if type(core) is nn.Linear and core.weight.numel():
                    layer.cores[k] = SimulatedLinear.of(core, grid)
