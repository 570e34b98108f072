"""A few-bit matrix plus a small network on what it gets wrong.

Legend: `W` `(O, I)`, `Q` its rounded form, `N` a matrix cut of bond `k`, `C` `(I, I)` the input moment, `B` `(O, O)` the output moment.

The error of rounding is noise that knows nothing of `B`: error compensation balances columns, not rows. Where few directions of the
output carry most of the loss (queries and keys), a cut of `W - Q` in both metrics takes just those out. Given `N`, `Q` is rounded anew to
`W - N`, and so on in turn; the best pair is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bondsmith.tensor.fit import whitened_cut
from bondsmith.tensor.gptq import gptq
from bondsmith.tensor.metric import DAMPING, relative_error
from bondsmith.tensor.mpo import MPO
from bondsmith.tensor.rounded import RoundedNetwork, round_network
from bondsmith.tensor.rounding import Grid, Rounded

ROUNDS = 2
LARGEST_BOND = 64  # of a network beside a rounded matrix that a profile looks at


@dataclass(frozen=True, eq=False)
class Hybrid:
    """`Q + N`: the rounded matrix, the cut as fitted, and its rounded cores, where they are rounded."""

    rounded: Rounded
    cut: MPO
    network: RoundedNetwork | None

    def to_matrix(self) -> Tensor:
        """The `(O, I)` matrix."""
        return self.rounded.dequantize() + self._cut_matrix()

    def _cut_matrix(self) -> Tensor:
        if self.network is None:
            return self.cut.to_matrix()
        left, right = (core.dequantize() for core in self.network.weights if core is not None)
        return left @ right


@torch.no_grad()
def fit_hybrid(
    weight: Tensor,
    grid: Grid,
    bond: int,
    network_grid: Grid | None,
    *,
    input_moment: Tensor | None = None,
    output_moment: Tensor | None = None,
    damping: float = DAMPING,
    rounds: int = ROUNDS,
) -> Hybrid:
    """`weight` as a matrix on `grid` plus a matrix cut of `bond`, its cores on `network_grid` (None: unrounded).

    Args:
        weight: `(O, I)`; with error propagation the propagated target.
        input_moment, output_moment: `C` and `B`; the identity by default.
        damping: of the moments in the cut.
        rounds: of rounding the matrix anew with the cut subtracted.

    Raises:
        ValueError: bad weights, moments or bonds, or an entry whose square is not finite.

    >>> W, C = torch.randn(12, 16), torch.eye(16)
    >>> plain = gptq(W, Grid(2, 8), C)
    >>> hybrid = fit_hybrid(W, Grid(2, 8), 2, Grid(8, 0), input_moment=C)
    >>> relative_error(W, hybrid.to_matrix()) < relative_error(W, plain.dequantize())
    True
    """
    C = torch.eye(weight.shape[1], device=weight.device) if input_moment is None else input_moment
    B = output_moment
    found: list[tuple[float, Hybrid]] = []
    rounded = gptq(weight, grid, C)
    for left in range(rounds, -1, -1):
        rest = weight - rounded.dequantize()
        cut = whitened_cut(rest, bond, input_moment=C, output_moment=B, damping=damping)
        network = None
        if network_grid is not None:
            network = round_network(rest, cut, network_grid, input_moment=C, output_moment=B, damping=damping)
        hybrid = Hybrid(rounded, cut, network)
        found.append((relative_error(weight, hybrid.to_matrix(), C, B), hybrid))
        if left:
            rounded = gptq(weight - hybrid._cut_matrix(), grid, C)
    return min(found, key=lambda pair: pair[0])[1]


@torch.no_grad()
def shares_left(output_moment: Tensor, step_sizes: Tensor | None = None) -> Tensor:
    """The share of a rounding loss that is left when a cut of bond 0, 1, ... has taken the worst output directions out, `(O + 1,)`.

    After error compensation the errors of different rows are independent and alike but for the step of their scale, so the loss lies
    along the eigenvectors of `B` weighted by the steps. A prediction for plans; the fit finds a little more.

    Args:
        output_moment: `B`.
        step_sizes: `(O,)`, root mean square step of each row; all alike by default.

    >>> shares_left(torch.diag(torch.tensor([3.0, 1.0])))
    tensor([1.0000, 0.2500, 0.0000], dtype=torch.float64)
    """
    B = output_moment.to(torch.float64)
    if step_sizes is not None:
        steps = step_sizes.to(torch.float64)
        B = steps[:, None] * B * steps
    values = torch.linalg.eigvalsh(B).flip(0).clamp_min(0)
    tails = torch.cat((values.flip(0).cumsum(0).flip(0), values.new_zeros(1)))
    return tails / tails[0].clamp_min(torch.finfo(torch.float64).tiny)


class UnseenShares:
    """What `shares_left` promises, judged on rows that did not choose the directions.

    Where few rows decide a moment (values, above all) its own directions promise three times too much. So they are chosen from the moment
    of some rows, and `see` adds up what they take of others.

    Args:
        output_moment: `B` over the rows that choose.
        step_sizes: `(O,)`, root mean square step of each row of the matrix.

    >>> shares = UnseenShares(torch.diag(torch.tensor([3.0, 1.0])), torch.ones(2))
    >>> shares.see(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    >>> shares.left().round(decimals=3)
    tensor([1.0000, 0.5000, 0.0000], dtype=torch.float64)
    """

    def __init__(self, output_moment: Tensor, step_sizes: Tensor):
        self._steps = step_sizes.to(output_moment.dtype)
        chooses = self._steps[:, None] * output_moment * self._steps
        self._directions = _leading(chooses, min(LARGEST_BOND, len(chooses)))
        self._taken = torch.zeros(self._directions.shape[1], dtype=torch.float64, device=chooses.device)
        self._whole = self._taken.new_zeros(())

    def see(self, rows_TO: Tensor) -> None:
        """Adds rows `g`."""
        rows = rows_TO * self._steps
        self._taken += (rows @ self._directions).square().sum(0)
        self._whole += torch.linalg.vector_norm(rows) ** 2

    def left(self) -> Tensor:
        """The shares at bonds 0, 1, ... up to 64, float64; ones where no row was seen."""
        tiny = torch.finfo(torch.float64).tiny
        taken = torch.cat((self._taken.new_zeros(1), self._taken.cumsum(0) / self._whole.clamp_min(tiny)))
        return (1 - taken).clamp(0, 1)


def _leading(gram: Tensor, rank: int, steps: int = 3) -> Tensor:
    """About the `(O, r)` leading eigenvectors, descending, in a few subspace iterations in the dtype of `gram`: other rows judge them."""
    width = min(len(gram), rank + 8)
    Q = torch.randn(len(gram), width, generator=torch.Generator().manual_seed(0)).to(gram)
    for _ in range(steps):
        Q = torch.linalg.qr(gram @ Q)[0]
    rotation: Tensor = torch.linalg.eigh(Q.T @ gram @ Q)[1]
    return Q @ rotation.flip(1)[:, :rank]
