"""A few exact columns (or rows) of a weight and a cut of the others.

Legend: `W` the `(O, I)` weight, `S` the `p` exact columns, `R` the others, `C` the `(I, I)` input moment, `B` the `(O, O)`
output moment, `D = W - W'`, `k` the bond of the cut.

Exact columns are free to make up for what the cut of the others loses, as far as their inputs go together. What is left
of the error of the others is measured by the Schur complement `C_RR - C_RS C_SS^-1 C_SR`, so cut and columns have a
closed form once `S` is chosen: the columns with most energy `|B^1/2 W_j|^2 C_jj`. Together they store `p O + k (O + I -
p - k)` numbers. It pays where a side has a basis of its own: the hidden channels of an MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bondsmith.tensor.checks import check_matrix, check_moment
from bondsmith.tensor.fit import cut_spectrum, whitened_cut
from bondsmith.tensor.metric import DAMPING, Root, damped, moment_root
from bondsmith.tensor.mpo import MPO
from bondsmith.tensor.sites import Sites

Side = Literal["columns", "rows"]
SHARES = (0.1, 0.2, 0.35)  # of the budget in exact channels: what was best on real weights lies among them


@dataclass(frozen=True, eq=False)
class ExactCut:
    """`exact` `(O, p)` columns (or `(p, I)` rows), a cut of the others, and which is which.

    `order` `(I,)` (or `(O,)`) lists the places in `W` of the exact ones, ascending, then those of the others, ascending.
    """

    exact: Tensor
    mpo: MPO
    order: Tensor
    side: Side

    @property
    def parameters(self) -> int:
        """Numbers stored where the cut's gauge is fixed."""
        return self.exact.numel() + self.mpo.sites.parameters(self.mpo.bonds, gauge=True)

    def to_matrix(self) -> Tensor:
        """The `(O, I)` matrix."""
        axis = 1 if self.side == "columns" else 0
        return torch.cat((self.exact, self.mpo.to_matrix()), axis).index_select(axis, self.order.argsort())


@torch.no_grad()
def exact_cut(
    weight: Tensor,
    count: int,
    bond: int,
    *,
    side: Side = "columns",
    input_moment: Tensor | None = None,
    output_moment: Tensor | None = None,
    damping: float = DAMPING,
) -> ExactCut:
    """The `count` exact columns (or rows) with most energy and the best cut of the others at `bond`, in the metric.

    In the dtype of `weight`. ValueError unless `1 <= count` and at least one other is left, for bad moments or bonds.

    >>> weight = torch.diag(torch.tensor([1.0, 5.0, 2.0]))
    >>> exact_cut(weight, 1, 1).to_matrix().round()
    tensor([[0., 0., 0.],
            [0., 5., 0.],
            [0., 0., 2.]])
    """
    if side == "rows":
        found = exact_cut(
            weight.T, count, bond, input_moment=output_moment, output_moment=input_moment, damping=damping
        )
        cores = (core.permute(3, 2, 1, 0) for core in reversed(found.mpo.cores))
        return ExactCut(found.exact.T, MPO(tuple(cores)), found.order, "rows")
    parts = _Parts.of(weight, count, input_moment, output_moment, damping)
    mpo = whitened_cut(parts.others, bond, input_root=parts.left_over, output_moment=output_moment, damping=damping)
    exact = parts.chosen
    if parts.carried is not None:
        exact = exact + (parts.others - mpo.to_matrix()) @ parts.carried
    return ExactCut(exact.to(weight.dtype), mpo.to(dtype=weight.dtype), parts.order, "columns")


@torch.no_grad()
def exact_spectrum(
    weight: Tensor,
    count: int,
    *,
    side: Side = "columns",
    input_moment: Tensor | None = None,
    output_moment: Tensor | None = None,
    damping: float = DAMPING,
) -> Tensor:
    """All singular values of what `exact_cut` cuts, descending, float64: its error at every bond, as `cut_spectrum`."""
    if side == "rows":
        weight, input_moment, output_moment = weight.T, output_moment, input_moment
    parts = _Parts.of(weight, count, input_moment, output_moment, damping)
    return cut_spectrum(parts.others, input_root=parts.left_over, output_moment=output_moment, damping=damping)


@torch.no_grad()
def best_count(
    weight: Tensor,
    budget: int,
    *,
    side: Side = "columns",
    input_moment: Tensor | None = None,
    output_moment: Tensor | None = None,
    damping: float = DAMPING,
    shares: Sequence[float] = SHARES,
) -> tuple[int, int, float]:
    """`(count, bond, error)` with the smallest `tr(B D C D^T)` in at most `budget` stored numbers, gauge fixed.

    Tries these shares of the budget in exact columns (or rows), one eigenvalue problem each, and none (`count` 0).
    ValueError if not even a cut of bond 1 fits.
    """
    if side == "rows":
        weight, input_moment, output_moment = weight.T, output_moment, input_moment
    moments: dict[str, Any] = {"input_moment": input_moment, "output_moment": output_moment, "damping": damping}
    out_features, in_features = weight.shape
    found = []
    for count in sorted({0, *(int(share * budget / out_features) for share in shares)}):
        if count >= in_features:
            continue
        sites = Sites((out_features, 1), (1, in_features - count))
        left = budget - count * out_features
        if count and left < sites.parameters((1,), gauge=True):
            continue
        (bond,) = sites.bonds_within(left, gauge=True)
        values = exact_spectrum(weight, count, **moments) if count else cut_spectrum(weight, **moments)
        found.append((float(values[bond:].square().sum()), count, bond))
    error, count, bond = min(found)
    return count, bond, error


@dataclass(frozen=True, eq=False)
class _Parts:
    """`W_S`, `W_R`, the regression `C_RS C_SS^-1`, a root of the Schur complement, and `S` before `R`; float64.

    For `C = 1` there is nothing to carry and nothing to whiten: both are None.
    """

    chosen: Tensor
    others: Tensor
    carried: Tensor | None
    left_over: Root | None
    order: Tensor

    @classmethod
    def of(cls, weight: Tensor, count: int, C: Tensor | None, B: Tensor | None, damping: float) -> _Parts:
        check_matrix(weight)
        out_features, in_features = weight.shape
        if not 1 <= count < in_features:
            raise ValueError(f"{count} exact ones of {in_features} leave nothing to cut, or are none")
        W = weight.to(torch.float64)
        if B is not None:
            check_moment(B, out_features, "output moment")
        energy = (W * (W if B is None else B.to(torch.float64) @ W)).sum(0)
        if C is None:
            order = _ranked(energy, count)
            return cls(W[:, order[:count]], W[:, order[count:]], None, None, order)
        check_moment(C, in_features, "input moment")
        order = _ranked(energy * C.diagonal().to(torch.float64), count)
        moment = damped(C, damping).index_select(0, order).index_select(1, order)
        across = moment[count:, :count]
        carried = moment_root(moment[:count, :count], 0.0, "input moment").solve(across.T).T
        schur = moment[count:, count:] - across @ carried.T
        schur = (schur + schur.T) / 2
        rounding = len(moment) * torch.finfo(torch.float64).eps * float(moment.diagonal().max())
        schur.diagonal().add_(rounding)  # all that may be left of directions that the exact ones explain
        left_over = moment_root(schur, 0.0, "input moment")
        return cls(W[:, order[:count]], W[:, order[count:]], carried, left_over, order)


def _ranked(energy: Tensor, count: int) -> Tensor:
    """Places of the `count` largest, ascending, then of the others, ascending."""
    largest = torch.zeros_like(energy, dtype=torch.bool).index_fill_(0, energy.topk(count).indices, True)
    return torch.cat((largest.nonzero()[:, 0], (~largest).nonzero()[:, 0]))
