"""The gauge of every bond, fixed so that the square of the bond's dimension need not be stored.

Legend: `A` the `(O, k)` left factor, `B` the `(k, I)` right one, `W = A B`. With `A = P [1; R] H` for a permutation
`P`, `W = P [1; R] (H B)`: `k` rows of `W` are rows of `H B` itself, the other `O - k` are `R` times them, and `k (O + I
- k)` numbers say it all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bondsmith.tensor.checks import check_finite
from bondsmith.tensor.mpo import MPO

LARGEST_COEFFICIENT = 2.0


@dataclass(frozen=True, eq=False)
class PivotedCut:
    """`W = [1; rest][order] @ right`: `rest` `(O - k, k)`, `right` `(k, I)`, `order` `(O,)` integers."""

    rest: Tensor
    right: Tensor
    order: Tensor

    def to_left(self) -> Tensor:
        """The whole `(O, k)` left factor."""
        return left_factor(self.rest, self.order)


def left_factor(rest: Tensor, order: Tensor) -> Tensor:
    """`[1; rest][order]`, the `(O, k)` left factor of a pivoted cut."""
    identity = torch.eye(rest.shape[1], dtype=rest.dtype, device=rest.device)
    return torch.cat((identity, rest)).index_select(0, order)


@dataclass(frozen=True, eq=False)
class Pivoted:
    """A network whose cores but the last are `[1; rest][order]` as `(a o i, b)` matrices; only the rest is stored."""

    rests: tuple[Tensor, ...]
    orders: tuple[Tensor, ...]
    last: Tensor

    @property
    def parameters(self) -> int:
        """Stored numbers: those of the network less the square of every bond."""
        return sum(rest.numel() for rest in self.rests) + self.last.numel()


def pivot(mpo: MPO) -> Pivoted:
    """The pivoted form of a network, lossless to rounding, in its dtype; computed in float64, bond by bond from the left.

    ValueError if a bond exceeds the rows `a o i` to its left (`algebra.canonical` shrinks such a bond without loss).
    """
    if mpo.batch:
        raise ValueError(f"{mpo}: networks of a batch are pivoted one by one")
    cores = [core.to(torch.float64) for core in mpo.cores]
    rests, orders = [], []
    for k in range(len(cores) - 1):
        a, o, i, b = cores[k].shape
        cut = pivot_cut(cores[k].reshape(a * o * i, b), cores[k + 1].reshape(b, -1))
        cores[k + 1] = cut.right.reshape(cores[k + 1].shape)
        rests.append(cut.rest.to(mpo.dtype))
        orders.append(cut.order)
    return Pivoted(tuple(rests), tuple(orders), cores[-1].to(mpo.dtype))


def pivot_cut(left: Tensor, right: Tensor, largest: float = LARGEST_COEFFICIENT) -> PivotedCut:
    """The pivoted form of `left @ right`, lossless to rounding, in their dtype; computed in float64.

    Row pivots by LU with partial pivoting, then exchanges of one row at a time (the maxvol rule of Goreinov et al.,
    "How to find a good submatrix") until no entry of `rest` exceeds `largest`. Works for factors of any rank.
    ValueError if `k > O`, or if an entry is not finite.

    >>> cut = pivot_cut(torch.tensor([[1.0], [4.0], [2.0]]), torch.ones(1, 2))
    >>> cut.rest.flatten(), cut.right, cut.order
    (tensor([0.2500, 0.5000]), tensor([[4., 4.]]), tensor([1, 0, 2]))
    """
    check_finite(left, "left factor")
    check_finite(right, "right factor")
    out_features, bond = left.shape
    if bond > out_features:
        raise ValueError(
            f"a left factor of {out_features} rows has no {bond} pivot rows; clip the bond to {out_features}"
        )
    factors, swaps, _ = torch.linalg.lu_factor_ex(left.to(torch.float64))
    places = list(range(out_features))
    for j, place in enumerate(swaps.tolist()):
        places[j], places[place - 1] = places[place - 1], places[j]
    rows = torch.tensor(places, device=left.device)  # rows[j] is the row of `left` at place j of the factorisation
    square = factors[:bond].tril(-1)
    square.diagonal().add_(1.0)
    rest = torch.linalg.solve_triangular(square, factors[bond:], upper=False, left=False, unitriangular=True)
    pivot_rows = square @ (factors[:bond].triu() @ right.to(torch.float64))
    rest, pivot_rows, rows = _exchange(rest, pivot_rows, rows, largest)
    order = torch.empty_like(rows)
    order[rows] = torch.arange(out_features, device=rows.device)
    return PivotedCut(rest.to(left.dtype), pivot_rows.to(right.dtype), order)


def _exchange(rest: Tensor, pivot_rows: Tensor, rows: Tensor, largest: float) -> tuple[Tensor, Tensor, Tensor]:
    """Swap the row with the largest coefficient into the pivots, while that coefficient exceeds `largest`.

    Each swap grows the pivot block's determinant by that factor, so it ends; the identity block becomes one again by a
    rank-one update.
    """
    bond, rows = rest.shape[1], rows.clone()
    while rest.numel():
        place = int(rest.abs().argmax())
        i, j = divmod(place, bond)
        pivot = float(rest[i, j])
        if abs(pivot) <= largest:
            break
        new_row, column = rest[i].clone(), rest[:, j].clone()
        pivot_rows[j] = new_row @ pivot_rows
        column[i] += 1.0
        new_row[j] -= 1.0
        rest.addr_(column, new_row, alpha=-1 / pivot)
        rows[[j, bond + i]] = rows[[bond + i, j]]
    return rest, pivot_rows, rows
