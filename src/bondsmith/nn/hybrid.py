"""HybridLinear: a few-bit matrix plus a small network on what it gets wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bondsmith.nn.linear import MPOLinear
from bondsmith.nn.packed import PackedLinear


class HybridLinear(nn.Module):
    """`y = Q x + N x + bias`: `rounded`, a `PackedLinear` that has the bias, and `network`, an `MPOLinear`, over the same features.

    >>> from bondsmith.tensor.rounding import Grid
    >>> from bondsmith.tensor.sites import Sites
    >>> network = MPOLinear(Sites((8, 1), (1, 6)), (2,), bias=False)
    >>> layer = HybridLinear(PackedLinear(6, 8, Grid(4, 2), bias=True), network)
    >>> torch.equal(layer(torch.ones(1, 6)), network(torch.ones(1, 6)))  # an empty matrix adds nothing
    True
    """

    def __init__(self, rounded: nn.Module, network: MPOLinear) -> None:
        super().__init__()
        self.rounded, self.network = rounded, network
        self.in_features, self.out_features = network.in_features, network.out_features

    def forward(self, x: Tensor) -> Tensor:
        """`(..., O)` for `x` of shape `(..., I)`."""
        y: Tensor = self.rounded(x) + self.network(x)
        return y

    def to_matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        """The `(O, I)` matrix, differentiable in scales and cores."""
        assert isinstance(self.rounded, PackedLinear)
        return self.rounded.to_matrix(dtype or torch.float32) + self.network.to_matrix(dtype)

    @torch.no_grad()
    def materialise(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ordinary `nn.Linear` with the same matrix and bias."""
        assert isinstance(self.rounded, PackedLinear)
        linear = self.rounded.materialise(dtype or torch.float32)
        linear.weight = nn.Parameter(self.to_matrix(dtype).to(linear.weight.dtype))
        return linear
