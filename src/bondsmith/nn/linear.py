"""A linear layer whose weight is a network: what every compressed matrix becomes.

- Every core is an `nn.Linear` without bias, so LoRA, GPTQ hooks, FSDP and quantisers see it; the contraction calls it.
- `contract` site by site, or `materialise` the matrix for one GEMM: a threshold on the tokens, fixed at construction,
  decides, for matrix cuts too.
- Training keeps the input and, of two sites, what passes between them; longer chains and built matrices are computed
  again in backward.
- A core that somebody wrapped or hooked is always called, never read past; of a plain one the weight is read, which is faster.
  A core may be a `PackedLinear`.

Legend: `T` tokens, `O`/`I` features, `k` the bond of a matrix cut, `a, b` bonds, `o, i` legs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from bondsmith.nn.kernels import gemm_dtype
from bondsmith.nn.packed import PackedLinear
from bondsmith.tensor.algebra import canonical
from bondsmith.tensor.contract import core_to_weight, sweep, weight_to_core
from bondsmith.tensor.gauge import left_factor, pivot
from bondsmith.tensor.mpo import MPO, fold
from bondsmith.tensor.sites import Sites, clip_bonds

# Gathering the outputs saves k^2 multiply-adds a token. It pays up to so many tokens, and on a CPU where k^2 is more than so many outputs.
GATHER_UP_TO = 256
GATHER_FROM = 50


class MPOLinear(nn.Module):
    """`y = W x + bias` with `W` `(O, I)` a network over `sites` with `bonds`; initialised like `nn.Linear`.

    With `gauge` every core but the last is an identity block over the `(a o i - b, b)` rest that is stored, its rows
    ordered by `pivots` (one core after the other): the square of every bond is saved. In a matrix cut `k` rows of `W`
    are then those of the last core. ValueError for bad bonds.

    >>> layer = MPOLinear(Sites((8, 1), (1, 6)), (3,), bias=True)
    >>> layer(torch.zeros(2, 5, 6)).shape, [tuple(core.weight.shape) for core in layer.cores]
    (torch.Size([2, 5, 8]), [(8, 3), (3, 6)])
    """

    bias: nn.Parameter | None
    pivots: Tensor | None

    def __init__(
        self,
        sites: Sites,
        bonds: int | Sequence[int],
        *,
        bias: bool,
        gauge: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.sites, self.bonds, self.gauge = sites, clip_bonds(sites, bonds), gauge and sites.n > 1
        self.in_features, self.out_features = sites.in_features, sites.out_features
        sites.parameters(self.bonds, self.gauge)  # raises where the gauge has no room
        self._shapes = sites.core_shapes(self.bonds)
        self._from_right = sites.sweeps_from_right(self.bonds)
        self._is_cut = sites.is_matrix_cut
        self._gather_below = (GATHER_UP_TO * self.in_features + 1) if self.gauge else 0
        self._gathers_on_cpu = self.gauge and self._is_cut and self.bonds[0] ** 2 > GATHER_FROM * self.out_features
        self._materialise_from = sites.materialise_from(self.bonds) * self.in_features
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.cores = nn.ModuleList(_empty_core(*shape, **factory) for shape in self._weight_shapes())
        self.bias = nn.Parameter(torch.empty(self.out_features, **factory)) if bias else None
        rows = sum(self._rows())
        self.register_buffer("pivots", torch.empty(rows, dtype=torch.int32, device=device) if self.gauge else None)
        if not _stored(self.cores[0]).is_meta:
            self.reset_parameters()

    @classmethod
    def from_mpo(
        cls, mpo: MPO, *, bias: Tensor | None = None, gauge: bool = False, dtype: torch.dtype | None = None
    ) -> MPOLinear:
        """The layer with these cores, their device, and `dtype` or theirs; `gauge` pivots it without loss.

        Bonds over the exact ones shrink to these.

        >>> mpo = MPO((torch.randn(1, 6, 1, 2), torch.randn(2, 1, 4, 1)))
        >>> layer = MPOLinear.from_mpo(mpo, gauge=True)
        >>> torch.allclose(layer.to_matrix(), mpo.to_matrix(), atol=1e-5), sum(p.numel() for p in layer.parameters())
        (True, 16)
        """
        if mpo.batch:
            raise ValueError(f"{mpo}: a layer holds one network, not a batch")
        if mpo.sites.clip(mpo.bonds) != mpo.bonds:
            mpo = canonical(mpo, -1)
        layer = cls(mpo.sites, mpo.bonds, bias=bias is not None, gauge=gauge, device="meta")
        pivots = None
        if layer.gauge:
            pivoted = pivot(mpo)
            weights = [*pivoted.rests, core_to_weight(pivoted.last, layer._from_right)]
            pivots = torch.cat(pivoted.orders).to(torch.int32)
        else:
            weights = [core_to_weight(core, layer._from_right) for core in mpo.cores]
        for core, weight in zip(layer.cores, weights, strict=True):
            core.weight = nn.Parameter(weight.to(dtype or mpo.dtype).clone(memory_format=torch.contiguous_format))
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(mpo.device, dtype or mpo.dtype, copy=True))
        layer.pivots = pivots
        return layer

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random cores whose matrix has entries of the variance `1 / (3 I)` that `nn.Linear` starts with; zero bias."""
        spread = (1 / (3 * self.in_features)) ** 0.5
        for bond in self.bonds:
            spread /= bond**0.5
        spreads = [spread ** (1 / self.sites.n)] * self.sites.n
        if self.pivots is not None:  # the rests multiply rows of what lies to their right into like rows
            spreads = [*(bond**-0.5 for bond in self.bonds), (1 / (3 * self.in_features)) ** 0.5]
            self.pivots.copy_(torch.cat([torch.arange(rows) for rows in self._rows()]))
        for core, each in zip(self.cores, spreads, strict=True):
            nn.init.normal_(_stored(core), 0.0, each)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """`(..., O)` for `x` of shape `(..., I)`."""
        if self._is_cut:
            few = x.numel() < self._materialise_from or (self._gathers_on_cpu and x.device.type == "cpu")
            if few or not all(_is_readable(core) for core in self.cores):
                return self._forward_cut(x)
        chain = self.sites.n > 2 or x.numel() >= self._materialise_from  # two sites keep one intermediate, no more
        if chain and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            y: Tensor = checkpoint(self._forward_network, x, use_reentrant=False)
            return y
        return self._forward_network(x)

    def to_matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        """The `(O, I)` matrix, differentiable in the cores, with whatever adapters they carry; packed cores in `dtype`."""
        weights = [weight_of(core, dtype) for core in self.cores]
        wide = gemm_dtype(weights[-1])
        if self._is_cut:
            left = weights[0] if self.pivots is None else left_factor(weights[0], self.pivots)
            matrix: Tensor = left.to(wide) @ weights[1].to(wide)
            return matrix.to(weights[1].dtype)
        cores = self._pivoted_cores(weights) if self.pivots is not None else []
        for k in range(len(cores), self.sites.n):
            cores.append(weight_to_core(weights[k], self._shapes[k], self._from_right))
        return fold([core.to(wide) for core in cores]).to(weights[-1].dtype)

    @torch.no_grad()
    def to_mpo(self) -> MPO:
        """The network with all numbers of every core, detached, packed ones unpacked; adapters are left out."""
        weights = [core.to_matrix() if isinstance(core, PackedLinear) else _stored(core) for core in self.cores]
        cores = self._pivoted_cores(weights) if self.pivots is not None else []
        for k in range(len(cores), self.sites.n):
            cores.append(weight_to_core(weights[k], self._shapes[k], self._from_right))
        return MPO(tuple(core.detach() for core in cores))

    @torch.no_grad()
    def materialise(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ordinary `nn.Linear` with the same matrix and bias; `dtype` is that of packed cores, float32 by default."""
        weight = self.to_matrix(dtype)
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight)
        linear.register_parameter("bias", None if self.bias is None else nn.Parameter(self.bias.detach().clone()))
        return linear

    def extra_repr(self) -> str:
        gauge = ", gauge" if self.gauge else ""
        shape = f"{self.out_features}x{self.in_features} as {self.sites}, bonds {self.bonds}"
        return f"{shape}{gauge}, bias={self.bias is not None}"

    def _forward_cut(self, x: Tensor) -> Tensor:
        cores: Any = self._modules["cores"]  # not `self.cores`, nor `core(x)`: 5 us of 12, which count when decoding
        first, last = cores._modules.values()
        pivots, bias = self._buffers["pivots"], self.bias
        y: Tensor
        if pivots is None:
            y = applied(first, applied(last, x))
        elif x.numel() < self._gather_below:
            z = applied(last, x)
            y = reorder(torch.cat((z, applied(first, z)), -1), pivots)
        elif not _is_plain(first) or (self._gathers_on_cpu and x.device.type == "cpu"):
            y = self._gathered(x, first, last, pivots)
        else:
            y = F.linear(applied(last, x), left_factor(_stored(first), pivots))
        return y if bias is None else y + bias.to(y.dtype)  # under autocast as nn.Linear

    def _gathered(self, x: Tensor, first: nn.Module, last: nn.Module, pivots: Tensor) -> Tensor:
        """All outputs, pivots first, then put in order; for many tokens both parts are written where they belong at once."""
        in_place = _is_plain(first) and _is_plain(last) and x.dtype == _stored(first).dtype
        if torch.is_grad_enabled() or not in_place or torch.is_autocast_enabled(x.device.type):
            z = applied(last, x)
            return reorder(torch.cat((z, applied(first, z)), -1), pivots)
        k, rows = self.bonds[0], x.reshape(-1, self.in_features)
        y = x.new_empty(len(rows), self.out_features)
        torch.mm(rows, _stored(last).T, out=y[:, :k])
        torch.mm(y[:, :k], _stored(first).T, out=y[:, k:])
        return y.index_select(-1, pivots).reshape(*x.shape[:-1], self.out_features)

    def _forward_network(self, x: Tensor) -> Tensor:
        if x.numel() >= self._materialise_from and all(_is_readable(core) for core in self.cores):
            return F.linear(x, self.to_matrix(x.dtype), self.bias)
        layers: list[Callable[[Tensor], Tensor]] = [partial(applied, core) for core in self.cores]
        if self.pivots is not None:
            stored = [weight_of(core, x.dtype) for core in self.cores[:-1]]
            weights = [core_to_weight(core, self._from_right) for core in self._pivoted_cores(stored)]
            layers[:-1] = [partial(F.linear, weight=weight) for weight in weights]
        y = sweep(self.sites, self.bonds, layers, x, self._from_right)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _pivoted_cores(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """All cores but the last from their stored `weights`, identity blocks put back."""
        assert self.pivots is not None
        orders = self.pivots.split(self._rows())
        stored = zip(weights, orders, self._shapes, strict=False)
        return [left_factor(weight, order).reshape(shape) for weight, order, shape in stored]

    def _rows(self) -> list[int]:
        """The rows `a o i` of every core but the last as an `(a o i, b)` matrix."""
        return [a * o * i for a, o, i, _ in self._shapes[:-1]]

    def _weight_shapes(self) -> list[tuple[int, int]]:
        shapes = [(a * o, i * b) if self._from_right else (b * o, i * a) for a, o, i, b in self._shapes]
        if self.gauge:
            shapes[:-1] = [(a * o * i - b, b) for a, o, i, b in self._shapes[:-1]]
        return shapes


def applied(core: nn.Module, x: Tensor) -> Tensor:
    """`core(x)`, in a third of the time of a module's call where that does nothing else."""
    y: Tensor = F.linear(x, _stored(core)) if _is_plain(core) else core(x)
    return y


def reorder(y: Tensor, order: Tensor) -> Tensor:
    """`y[..., order]` for a permutation `order`."""
    if not torch.is_grad_enabled():
        return y.index_select(-1, order)  # 3 us less, which counts when decoding
    moved: Tensor = _Reorder.apply(y, order)
    return moved


class _Reorder(torch.autograd.Function):
    """`y[..., order]` for a permutation, whose gradient is a gather too: autograd's own would add row by row."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, order: Tensor) -> Tensor:
        return y.index_select(-1, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return gradient.index_select(-1, order.argsort()), None


def _empty_core(rows: int, columns: int, **factory: Any) -> nn.Linear:
    """An uninitialised layer: `nn.Linear` would draw random numbers, and warns where a full bond leaves no rows."""
    core = nn.Linear(1, 1, bias=False, device="meta")
    core.in_features, core.out_features = columns, rows
    core.weight = nn.Parameter(torch.empty(rows, columns, **factory))
    return core


def _is_plain(core: nn.Module) -> bool:
    """Whether reading the weight is the same as calling the core: no adapter, no other kind of layer, no hook."""
    return type(core) is nn.Linear and _is_untouched(core)


def _is_readable(core: nn.Module) -> bool:
    """The same, for a core that may be packed."""
    return type(core) in (nn.Linear, PackedLinear) and _is_untouched(core)


def _is_untouched(core: nn.Module) -> bool:
    """No hook, and no forward of its own (accelerate's offloading puts one in)."""
    hooks = core._forward_hooks or core._forward_pre_hooks or core._backward_hooks or core._backward_pre_hooks
    return not hooks and "forward" not in core.__dict__


def _stored(core: nn.Module) -> Tensor:
    return cast(Tensor, core.weight)


def weight_of(core: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The `(out, in)` matrix that calling `core` multiplies by: adapters and all; a packed one in `dtype` or float32."""
    if _is_plain(core):
        return _stored(core)
    if isinstance(core, PackedLinear) and _is_readable(core):
        return core.to_matrix(dtype or torch.float32)
    like, in_features = next(core.parameters(), torch.empty(0, dtype=dtype)), cast(int, core.in_features)
    columns: Tensor = core(torch.eye(in_features, dtype=like.dtype, device=like.device))
    return columns.T
