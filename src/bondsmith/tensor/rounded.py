"""Networks with rounded cores: input side first, each core in the moment of what it reads, later cores fitted to the rounded ones.

Legend: `W` the `(O, I)` weight, `C` `(I, I)` the input moment, `R` `(k, I)` and `L` `(O, k)` the factors of a matrix cut.

Rounding a core changes what the cores after it read, but not their numbers; so before its own turn every later core takes its best
value for the rounded ones before it. In a matrix cut that is `L = W C R^T (R C R^T)^-1`. Only the last rounding is paid in full.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from bondsmith.tensor.checks import check_moment
from bondsmith.tensor.contract import core_to_weight, weight_to_core
from bondsmith.tensor.gauge import pivot_cut
from bondsmith.tensor.gptq import gptq
from bondsmith.tensor.metric import DAMPING, damped
from bondsmith.tensor.mpo import MPO
from bondsmith.tensor.rounding import Grid, Rounded
from bondsmith.tensor.weighted import fit_cores, left_block, right_block

_RIDGE = 1e-6  # of the mean diagonal of `R C R^T`


@dataclass(frozen=True, eq=False)
class RoundedNetwork:
    """The rounded weights of the cores, as `MPOLinear` stores them, and the `pivots` of a gauged matrix cut.

    A gauged cut of full bond has no rest to store: its first entry is None.
    """

    weights: tuple[Rounded | None, ...]
    pivots: Tensor | None = None


@torch.no_grad()
def round_network(
    weight: Tensor,
    mpo: MPO,
    grid: Grid,
    *,
    input_moment: Tensor | None = None,
    output_moment: Tensor | None = None,
    gauge: bool = False,
    damping: float = DAMPING,
) -> RoundedNetwork:
    """The network `mpo`, fitted to `weight`, with cores on a grid so that `tr(B D C D^T)` stays small.

    Args:
        weight: `(O, I)`, what the network stands for; with error propagation the propagated target.
        mpo: its unrounded cores.
        input_moment: `C`; the identity by default.
        output_moment: `B`, in the fit of later cores of networks that are no matrix cut; the identity by default.
        gauge: store a matrix cut with one identity block fewer.
        damping: of the moments in those fits.

    Raises:
        ValueError: a gauge on a network of other shape, or an entry whose square is not finite.

    >>> mpo = MPO((torch.randn(1, 8, 1, 3), torch.randn(3, 1, 6, 1)))
    >>> rounded = round_network(mpo.to_matrix(), mpo, Grid(8, 0))
    >>> [r.shape for r in rounded.weights]
    [(8, 3), (3, 6)]
    """
    if gauge and not mpo.sites.is_matrix_cut:
        raise ValueError(f"sites {mpo.sites} with a gauge cannot be rounded; leave the gauge out")
    C = torch.eye(weight.shape[1], device=weight.device) if input_moment is None else input_moment
    check_moment(C, weight.shape[1], "input moment")
    if not C.any():
        C = torch.eye(len(C), device=C.device, dtype=C.dtype)  # no input was ever other than zero: all errors are alike
    if mpo.sites.is_matrix_cut:
        return _round_cut(weight, mpo, grid, C, gauge, damping)
    from_right = mpo.sites.sweeps_from_right(mpo.bonds)
    cores, found = list(mpo.cores), {}
    order = range(len(cores) - 1, -1, -1) if from_right else range(len(cores))
    waiting = list(order)
    for k in order:
        H = core_moment(cores, k, C, from_right)
        found[k] = gptq(core_to_weight(cores[k], from_right), grid, H)
        a, o, i, b = cores[k].shape
        cores[k] = weight_to_core(found[k].dequantize().to(cores[k].dtype), (a, o, i, b), from_right)
        waiting.remove(k)
        if waiting:
            cores = fit_cores(weight, cores, waiting, input_moment=C, output_moment=output_moment, damping=damping)
    return RoundedNetwork(tuple(found[k] for k in range(len(cores))))


def core_moment(cores: list[Tensor], k: int, C: Tensor, from_right: bool) -> Tensor:
    """The moment of what core `k` multiplies as a linear layer, summed over the legs that wait or are done."""
    legs = [core.shape[2] for core in cores]
    if from_right:
        behind = right_block(cores[k + 1 :], C)  # (b, rows, columns)
        w, i, c = prod(legs[:k]), legs[k], prod(legs[k + 1 :])
        traced = torch.einsum("wicwjd->icjd", C.reshape(w, i, c, w, i, c))
        half = torch.einsum("bsc,icjd->bsijd", behind, traced)
        H = torch.einsum("bsijd,esd->ibje", half, behind)
    else:
        behind = left_block(cores[:k], C)  # (rows, columns, a)
        c, i, w = prod(legs[:k]), legs[k], prod(legs[k + 1 :])
        traced = torch.einsum("ciwdjw->cidj", C.reshape(c, i, w, c, i, w))
        half = torch.einsum("sca,cidj->saidj", behind, traced)
        H = torch.einsum("saidj,sde->iaje", half, behind)
    size = H.shape[0] * H.shape[1]
    H = H.reshape(size, size)
    return (H + H.T) / 2


def _round_cut(weight: Tensor, mpo: MPO, grid: Grid, C: Tensor, gauge: bool, damping: float) -> RoundedNetwork:
    first, last = mpo.cores
    left, right = first[0, :, 0, :], last[:, 0, :, 0]
    order = None
    if gauge:
        cut = pivot_cut(left.double(), right.double())
        right, order = cut.right, cut.order
    else:
        right = spread(right, C)
    rounded = gptq(right.to(weight.dtype), grid, C)
    R = rounded.dequantize().double()
    H = damped(C, damping)
    RH = R @ H
    gram = damped(RH @ R.T, _RIDGE)
    L = torch.linalg.solve(gram, RH @ weight.double().T).T
    if order is None:
        return RoundedNetwork((gptq(L.float(), grid, gram.float()), rounded))
    rows = torch.empty_like(order)
    rows[order] = torch.arange(len(order), device=order.device)
    rest = L[rows[R.shape[0] :]].float()
    return RoundedNetwork((gptq(rest, grid, gram.float()) if len(rest) else None, rounded), order)


def spread(right: Tensor, C: Tensor, seed: int = 0) -> Tensor:
    """Other rows with the same span for a right factor `(k, I)`: balanced in the metric `C`, then turned by a random orthogonal matrix.

    Each row then holds a bit of everything and can be rounded like any other; without it the rows that matter most are rounded as coarsely
    as the rest (measured in docs/bits.md). The left factor follows from the fit to the rounded right one.
    """
    R = right.to(torch.float64)
    values, vectors = torch.linalg.eigh(R @ C.to(torch.float64) @ R.T)
    scales = values.clamp_min(float(values[-1]) * 1e-8).pow(-0.25)
    turn = torch.randn(len(R), len(R), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rotation: Tensor = torch.linalg.qr(turn)[0]
    balanced: Tensor = (vectors * scales).T @ R
    return rotation.to(R.device) @ balanced
