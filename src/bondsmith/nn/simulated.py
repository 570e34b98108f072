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
    keeps: bool
    _kept: tuple[Tensor, int, Tensor] | None = None  # the weight, its version, and it rounded

    @classmethod
    def of(cls, core: nn.Linear, grid: Grid, keeps: bool = True) -> SimulatedLinear:
        """Returns the layer that shares the weight of `core`; it `keeps` the rounded one until the weight moves, as its version tells."""
        layer = cls(1, 1, bias=False, device="meta")
        layer.in_features, layer.out_features = core.in_features, core.out_features
        layer.weight, layer.grid, layer.keeps = core.weight, grid, keeps
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """`(..., O)`."""
        return F.linear(x, _StraightThrough.apply(self.weight, self._rounded()))

    @torch.no_grad()
    def _rounded(self) -> Tensor:
        """The rounded weight, made again when it has moved: searching its scales takes ten times as long as multiplying by it."""
        weight, kept = self.weight, self._kept
        if not self.keeps or kept is None or kept[0] is not weight or kept[1] != weight._version:
            rounded = round_to_nearest(weight.detach(), self.grid).dequantize(weight.dtype)
            if not self.keeps:
                return rounded
            kept = self._kept = (weight, weight._version, rounded)
        return kept[2]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def simulate_rounding(model: nn.Module, grid: Grid, keeps: bool = True) -> None:
    """Makes every core of every network one that is rounded in each forward pass; their names and weights stay.

    Without `keeps` it is rounded anew in every pass: for weights that are gathered from shards, whose version says nothing.
    """
    for layer in list(model.modules()):
        if isinstance(layer, MPOLinear):
            for k, core in enumerate(layer.cores):
                if type(core) is nn.Linear and core.weight.numel():
                    layer.cores[k] = SimulatedLinear.of(core, grid, keeps)
