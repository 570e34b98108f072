"""Rounding that makes up for its own errors, in the metric of the inputs.

Legend: `W` `(O, I)`, `Q` its rounded form, `D = W - Q`, `C` `(I, I)` the input moment, `g` the columns of a group, `G` groups.

The error is `tr(D C D^T)`. Three steps, each of about `O I^2` multiply-adds:

1. Columns are rounded one after another, and what each gets wrong is made up for by those that follow (GPTQ,
   arXiv 2210.17323). With `C^-1 = U^T U`, `U` upper triangular, the error is then exactly `sum_j |e_j|^2 / U_jj^2`, `e_j`
   being the error of column j as it was when its turn came; so scales are searched with the weights `1 / U_jj^2`.
2. All scales (and centres) of a row are fitted at once to the codes found: the error is quadratic in them.
3. Every code is moved to its best value with all others fixed, column by column. The error only falls.

2 and 3 alternate a few times.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bondsmith.tensor.checks import check_moment
from bondsmith.tensor.metric import damped
from bondsmith.tensor.rounding import SCALE_DTYPE, Grid, Rounded, as_stored, check_weight, find_scale, inverse

DAMPING = 1e-2  # of the mean diagonal: the usual one of GPTQ
SWEEPS = 2
_BLOCK = 128
_FIT_NUMBERS = 2**25  # of an intermediate in the fit of scales: rows are taken in chunks


@torch.no_grad()
def gptq(
    weight: Tensor,
    grid: Grid,
    input_moment: Tensor,
    *,
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
) -> Rounded:
    """`weight` rounded to `grid` so that `tr(D C D^T)` is small; any rank of `C` will do, it is damped.

    Args:
        weight: `(O, I)`, finite; with error propagation the propagated target.
        input_moment: `C`, `(I, I)`.
        damping: share of the mean diagonal of `C` added to it.
        sweeps: rounds of fitting scales and moving codes after the first pass; 0 is plain GPTQ.

    Raises:
        ValueError: bad weight or moment, or an entry whose square is not finite.

    >>> W, x = torch.randn(8, 32), torch.randn(100, 32) @ torch.randn(32, 32)
    >>> C, grid = x.T @ x / 100, Grid(3, 16)
    >>> error = lambda Q: float(((W - Q.dequantize()) @ C @ (W - Q.dequantize()).T).trace())
    >>> from bondsmith.tensor.rounding import round_to_nearest
    >>> error(gptq(W, grid, C)) < error(gptq(W, grid, C, sweeps=0)) < error(round_to_nearest(W, grid))
    True
    """
    check_weight(weight)
    check_moment(input_moment, weight.shape[1], "input moment")
    H = damped(input_moment, damping)
    if float(H.diagonal().max()) <= 0:  # nothing was ever read: every direction alike
        H = torch.eye(len(H), dtype=H.dtype, device=H.device)
    H = H / H.diagonal().mean()
    rounded = _first_pass(weight.to(torch.float32), grid, _inverse_factor(H))
    C = H.to(torch.float32)
    for _ in range(sweeps):
        rounded = fit_scales(weight, rounded, C)
        rounded = _move_codes(weight.to(torch.float32), rounded, C)
    return rounded


def _inverse_factor(H: Tensor) -> Tensor:
    """`U`, upper triangular in float32, with `H^-1 = U^T U`; more damping where a Cholesky factorisation needs it."""
    for extra in (0.0, 1e-6, 1e-4, 1e-2, 1.0):
        shifted = H + extra * torch.eye(len(H), dtype=H.dtype, device=H.device)
        # H = R R^T with R upper triangular (Cholesky from the last row on), so that U = R^-1
        reverse, failed = torch.linalg.cholesky_ex(shifted.flip(0, 1))
        if int(failed) == 0:
            R = reverse.flip(0, 1)
            identity = torch.eye(len(H), dtype=H.dtype, device=H.device)
            factor: Tensor = torch.linalg.solve_triangular(R, identity, upper=True)
            return factor.to(torch.float32)
    values = torch.linalg.eigvalsh(H)
    raise ValueError(
        f"input moment is indefinite: eigenvalues from {float(values[0]):.3g} to {float(values[-1]):.3g} of the mean diagonal"
    )


def _first_pass(W: Tensor, grid: Grid, U: Tensor) -> Rounded:
    """GPTQ: columns in order, errors carried on to the columns that follow."""
    W = W.clone()
    rows, columns = W.shape
    weights = 1 / U.diagonal().square()
    slices = grid.slices(columns)
    starts = {group.start: group for group in slices}
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=W.device)
    scales: list[Tensor] = []
    centres: list[Tensor] = []
    for first, last in _blocks(slices):
        block = W[:, first:last].T.contiguous()  # columns as rows: each is read and written in one piece
        errors = torch.empty_like(block)
        for k in range(last - first):
            j = first + k
            if j in starts:
                group = starts[j]
                inside = (
                    group.stop <= last
                )  # the columns of a group that reaches beyond the block have all had their due
                part = block[k : k + group.stop - group.start].T if inside else W[:, group]
                scale, centre = find_scale(part.contiguous(), grid, weights[group])
                scales.append(scale)
                centres.append(centre)
                upturned = inverse(scale)
            column = block[k]
            code = grid.nearest((column if grid.symmetric else column - centre) * upturned)
            codes[j] = code.to(torch.uint8)
            value = grid.levels(code) * scale
            if not grid.symmetric:
                value += centre
            torch.sub(column, value, out=errors[k]).div_(U[j, j])
            block[k + 1 :].addr_(U[j, j + 1 : last], errors[k], alpha=-1)
        W[:, last:].addmm_(errors.T, U[first:last, last:], alpha=-1)
    return Rounded(grid, codes.T.contiguous(), as_stored(scales), None if grid.symmetric else as_stored(centres))


def _blocks(slices: list[slice]) -> list[tuple[int, int]]:
    """Runs of columns that are updated together: whole groups where they are short, parts of one where it is long."""
    blocks: list[tuple[int, int]] = []
    for group in slices:
        if blocks and group.stop - blocks[-1][0] <= _BLOCK:
            blocks[-1] = (blocks[-1][0], group.stop)
        else:
            blocks += [(first, min(first + _BLOCK, group.stop)) for first in range(group.start, group.stop, _BLOCK)]
    return blocks


@torch.no_grad()
def fit_scales(weight: Tensor, rounded: Rounded, moment: Tensor) -> Rounded:
    """The same codes with the scales and centres that minimise `tr(D C D^T)`: least squares, row by row, all groups at once."""
    grid, C = rounded.grid, moment.to(torch.float32)
    W, levels = weight.to(torch.float32), grid.levels(rounded.codes)
    slices = grid.slices(W.shape[1])
    chunk = max(1, _FIT_NUMBERS // (len(slices) * W.shape[1]))
    scales, centres = [], []
    for first in range(0, len(W), chunk):
        part = slice(first, first + chunk)
        old = rounded.scales[part].float(), None if rounded.centres is None else rounded.centres[part].float()
        scale, centre = _fit_rows(W[part], levels[part], slices, C, *old)
        scales.append(scale)
        centres.append(centre)
    return replace(
        rounded,
        scales=torch.cat(scales).to(SCALE_DTYPE),
        centres=None if rounded.centres is None else torch.cat(centres).to(SCALE_DTYPE),
    )


def _fit_rows(
    W: Tensor, levels: Tensor, slices: list[slice], C: Tensor, scales: Tensor, centres: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scales and centres `(R, G)` of a few rows; where the system is singular the old ones stay."""
    G = len(slices)
    weighted = torch.stack([levels[:, g] @ C[g] for g in slices], 1)  # (R, G, I): what one scale does, times C
    gram = torch.stack([(weighted[:, :, g] * levels[:, None, g]).sum(-1) for g in slices], -1)
    target = W @ C
    rhs = torch.stack([(target[:, g] * levels[:, g]).sum(-1) for g in slices], -1)
    start = scales
    if centres is not None:  # unknowns: scales, then centres
        cross = torch.stack([weighted[:, :, g].sum(-1) for g in slices], -1)
        sums = torch.stack([torch.stack([C[g, h].sum() for h in slices]) for g in slices])
        gram = torch.cat(
            (torch.cat((gram, cross), 2), torch.cat((cross.transpose(1, 2), sums.expand(len(W), -1, -1)), 2)), 1
        )
        rhs = torch.cat((rhs, torch.stack([target[:, g].sum(-1) for g in slices], -1)), 1)
        start = torch.cat((scales, centres), 1)
    solution = _solve(gram, rhs, start)
    return solution[:, :G], solution[:, G:]


def _solve(gram: Tensor, rhs: Tensor, start: Tensor) -> Tensor:
    """The solution of each row's symmetric system, pulled a little towards `start`, or `start` where there is none."""
    gram, rhs, old = gram.double(), rhs.double(), start.double()
    ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2) + 1e-12
    rhs = rhs - (gram @ old[..., None])[..., 0]
    factor, failed = torch.linalg.cholesky_ex(gram + torch.diag_embed(ridge))
    step = torch.cholesky_solve(rhs[..., None], factor)[..., 0]
    found = (old + step).float()
    good = (failed == 0) & torch.isfinite(found).all(1)
    return torch.where(good[:, None], found, start)


def _move_codes(W: Tensor, rounded: Rounded, C: Tensor) -> Rounded:
    """Every code at its best value with the others fixed, once, from the first column to the last."""
    grid, columns = rounded.grid, W.shape[1]
    Q = rounded.dequantize()
    slope = (W - Q) @ C
    codes, Q = rounded.codes.T.contiguous(), Q.T.contiguous()
    slices = grid.slices(columns)
    group_of = [k for k, group in enumerate(slices) for _ in range(group.start, group.stop)]
    scales = rounded.scales.float().T.contiguous()
    centres = torch.zeros_like(scales) if rounded.centres is None else rounded.centres.float().T.contiguous()
    upturned = inverse(scales)
    diagonal = C.diagonal().clamp_min(torch.finfo(torch.float32).tiny)
    for first in range(0, columns, _BLOCK):
        last = min(first + _BLOCK, columns)
        local = slope[:, first:last].T.contiguous()
        moved = torch.empty_like(local)
        for k in range(last - first):
            j, group = first + k, group_of[first + k]
            ideal = torch.addcdiv(Q[j], local[k], diagonal[j])
            code = grid.nearest(ideal.sub_(centres[group]).mul_(upturned[group]))
            codes[j] = code.to(torch.uint8)
            value = torch.addcmul(centres[group], grid.levels(code), scales[group])
            torch.sub(value, Q[j], out=moved[k])
            local[k + 1 :].addr_(C[j, j + 1 : last], moved[k], alpha=-1)
        slope[:, last:].addmm_(moved.T, C[first:last, last:], alpha=-1)
    return replace(rounded, codes=codes.T.contiguous())
