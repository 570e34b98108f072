"""A linear layer of a few exact channels and a network for the others.

Legend: `T` tokens, `O`/`I` features, `p` exact channels, on the input side (columns of the weight) or the output side (rows).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bondsmith.nn.linear import MPOLinear, reorder, weight_of
from bondsmith.tensor.exact import ExactCut, Side
from bondsmith.tensor.sites import Sites


class ExactLinear(nn.Module):
    """`y = W x + bias` where `count` columns (or rows) of `W` are those of `exact`, the others a network.

    `sites` and `bonds` are those of the network, `(O, I - p)` or `(O - p, I)`. `order` sorts the inputs so that those of
    `exact` come first, or puts the outputs back in their places. ValueError for bad bonds.

    >>> layer = ExactLinear(2, Sites((8, 1), (1, 6)), (3,), side="columns", bias=True)
    >>> layer(torch.zeros(5, 8)).shape, tuple(layer.exact.weight.shape)
    (torch.Size([5, 8]), (8, 2))
    """

    order: Tensor

    def __init__(
        self,
        count: int,
        sites: Sites,
        bonds: tuple[int, ...],
        *,
        side: Side,
        bias: bool,
        gauge: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.side, self.count = side, count
        columns = side == "columns"
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_features = sites.in_features + (count if columns else 0)
        self.out_features = sites.out_features + (0 if columns else count)
        self.network = MPOLinear(sites, bonds, bias=False, gauge=gauge, **factory)
        shape = (count, self.out_features) if columns else (self.in_features, count)
        self.exact = nn.Linear(*shape, bias=False, **factory)
        self.bias = nn.Parameter(torch.zeros(self.out_features, **factory)) if bias else None
        features = self.in_features if columns else self.out_features
        self.register_buffer("order", torch.arange(features, dtype=torch.int32, device=device))

    @classmethod
    def from_cut(
        cls, cut: ExactCut, *, bias: Tensor | None = None, gauge: bool = True, dtype: torch.dtype | None = None
    ) -> ExactLinear:
        """The layer with these channels and cores, their device, and `dtype` or theirs.

        >>> from bondsmith.tensor import exact_cut
        >>> cut = exact_cut(torch.randn(8, 6), 2, 3, side="rows")
        >>> layer, x = ExactLinear.from_cut(cut), torch.randn(5, 6)
        >>> torch.allclose(layer(x), x @ cut.to_matrix().T, atol=1e-5)
        True
        """
        mpo, dtype = cut.mpo, dtype or cut.exact.dtype
        count = cut.exact.shape[1 if cut.side == "columns" else 0]
        layer = cls(count, mpo.sites, mpo.bonds, side=cut.side, bias=bias is not None, gauge=gauge, device="meta")
        layer.network = MPOLinear.from_mpo(mpo, gauge=gauge, dtype=dtype)
        layer.exact.weight = nn.Parameter(cut.exact.to(dtype).clone(memory_format=torch.contiguous_format))
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(mpo.device, dtype, copy=True))
        layer.order = (cut.order if cut.side == "columns" else cut.order.argsort()).to(torch.int32)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """`(..., O)` for `x` of shape `(..., I)`."""
        if self.side == "columns":
            chosen, others = reorder(x, self.order).split((self.count, self.in_features - self.count), -1)
            y = self.network(others) + self.exact(chosen)
        else:
            y = reorder(torch.cat((self.exact(x), self.network(x)), -1), self.order)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def to_matrix(self) -> Tensor:
        """The `(O, I)` matrix, differentiable in channels and cores."""
        network = self.network.to_matrix()
        if self.side == "columns":
            return torch.cat((weight_of(self.exact), network), 1).index_select(1, self.order.argsort())
        return torch.cat((weight_of(self.exact), network)).index_select(0, self.order)

    @torch.no_grad()
    def materialise(self) -> nn.Linear:
        """An ordinary `nn.Linear` with the same matrix and bias."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.to_matrix())
        linear.register_parameter("bias", None if self.bias is None else nn.Parameter(self.bias.detach().clone()))
        return linear

    def extra_repr(self) -> str:
        return f"{self.out_features}x{self.in_features}, {self.count} exact {self.side}, bias={self.bias is not None}"
