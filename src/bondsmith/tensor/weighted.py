"""Networks of any sites, fitted to what a layer sees: alternating least squares in a metric.

Legend: `W` the `(O, I)` weight, `D = W - W'`, `C` the `(I, I)` input moment, `B` the `(O, O)` output moment, `a, b`
bonds, `o, i` legs, `L` `(rows, columns, a)` and `R` `(b, rows, columns)` the sites left and right of the one being
solved for.

The error `tr(B D C D^T)` is quadratic in any one core. Everything happens in coordinates in which the Kronecker product
nearest to each moment in partial traces is the identity: whitening leg by leg leaves bonds as they are, the SVDs of the
start then see most of the metric, and around an orthogonal centre the normal equations are near enough to the identity
for conjugate gradients to take twenty steps at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from bondsmith.tensor.algebra import move_center
from bondsmith.tensor.checks import check_matrix, check_moment
from bondsmith.tensor.fit import check_sites, sequential_svd, whitened_cut
from bondsmith.tensor.metric import DAMPING, Root, check_semidefinite, damped, moment_root, relative_error
from bondsmith.tensor.mpo import MPO, fold
from bondsmith.tensor.sites import Sites, clip_bonds

_LEG_DAMPING = 1e-3  # of a leg's moment; only steers the coordinates, never the objective
_SOLVED = 0.1  # a core is solved when its residual has come down to this share


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted network; `history` is its relative error in the metric at the start and after every sweep.

    `error` is the last of them in float64 with the moments as given; `converged` says whether sweeps ended because they
    gained little.
    """

    mpo: MPO
    error: float
    history: tuple[float, ...]
    converged: bool

    def __str__(self) -> str:
        end = "converged" if self.converged else "stopped"
        return (
            f"{self.mpo}: error {self.history[0]:.4f} -> {self.error:.4f}, {end} after {len(self.history) - 1} sweeps"
        )


@torch.no_grad()
def fit_mpo(
    weight: Tensor,
    sites: Sites,
    bonds: int | Sequence[int],
    *,
    input_moment: Tensor | None = None,
    output_moment: Tensor | None = None,
    damping: float = DAMPING,
    max_sweeps: int = 40,
    tolerance: float = 1e-3,
    solver_steps: int = 20,
) -> Fit:
    """The network over `sites` that minimises `tr(B D C D^T)`, in the dtype of `weight`, with its convergence.

    The matrix cut comes from the exact closed form. Others start from sequential SVDs in leg-whitened coordinates and
    are swept to and fro, each core solved by conjugate gradients (to a tenth of its residual, at most `solver_steps` of
    them), until a sweep improves the error by less than `tolerance` of it. The best state of all sweeps is what comes
    back. Works in float32, or in float64 for a float64 weight. ValueError for bad weights, moments, bonds.

    >>> weight = torch.eye(6) + torch.arange(36.0).reshape(6, 6) / 36
    >>> fit = fit_mpo(weight, Sites((2, 3), (3, 2)), 2, input_moment=torch.diag(torch.arange(1.0, 7.0)))
    >>> fit.mpo.bonds, fit.error <= fit.history[0]
    ((2,), True)
    """
    check_matrix(weight)
    check_sites(weight, sites)
    bonds = clip_bonds(sites, bonds)
    if sites.is_matrix_cut:
        mpo = whitened_cut(weight, bonds[0], input_moment=input_moment, output_moment=output_moment, damping=damping)
        error = relative_error(weight, mpo.to_matrix(), input_moment, output_moment)
        return Fit(mpo, error, (error,), converged=True)
    problem = _Problem.whiten(weight, sites, input_moment, output_moment, damping)
    cores = list(sequential_svd(problem.target, sites, bonds).cores)
    history, converged = [problem.error(cores)], False
    best = list(cores)
    while len(history) <= max_sweeps and not converged and sites.n > 1:
        for k in _path(sites.n):
            move_center(cores, k)
            cores[k] = problem.solve(cores, k, solver_steps, _SOLVED)
        history.append(problem.error(cores))
        if history[-1] <= min(history):
            best = list(cores)
        converged = history[-1] >= (1 - tolerance) * history[-2]
    mpo = problem.unwhiten(best).to(dtype=weight.dtype)
    error = relative_error(weight, mpo.to_matrix(), input_moment, output_moment)
    return Fit(mpo, error, tuple(history), converged or sites.n == 1)


def fit_cores(
    weight: Tensor,
    cores: Sequence[Tensor],
    which: Sequence[int],
    *,
    input_moment: Tensor | None = None,
    output_moment: Tensor | None = None,
    damping: float = DAMPING,
    sweeps: int = 3,
    solver_steps: int = 12,
) -> list[Tensor]:
    """The cores of a network with those in `which` fitted anew to `weight` in the metric, one after another; the others stay."""
    check_matrix(weight)
    sites = MPO(tuple(cores)).sites
    problem = _Problem.whiten(weight, sites, input_moment, output_moment, damping)
    found = problem.whiten_cores(cores)
    for _ in range(sweeps if len(which) > 1 else 1):
        for k in which:
            found[k] = problem.solve(found, k, solver_steps if len(which) > 1 else 4 * solver_steps)
    plain = problem.unwhiten(found).cores
    return [plain[k].to(core.dtype) if k in which else core for k, core in enumerate(cores)]


@dataclass(frozen=True, eq=False)
class _Problem:
    """`tr(B D C D^T) / tr(B W C W^T)` in leg-whitened coordinates; a moment that is the identity there is None."""

    sites: Sites
    target: Tensor
    input_moment: Tensor | None
    output_moment: Tensor | None
    energy: float
    in_roots: list[Root] | None
    out_roots: list[Root] | None

    @classmethod
    def whiten(
        cls, weight: Tensor, sites: Sites, input_moment: Tensor | None, output_moment: Tensor | None, damping: float
    ) -> _Problem:
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        W = weight.to(torch.float64)
        C, in_roots = _whiten_moment(input_moment, sites.in_legs, damping, "input moment")
        B, out_roots = _whiten_moment(output_moment, sites.out_legs, damping, "output moment")
        if in_roots is not None:
            W = _kron_apply(W, [root.root for root in in_roots])
        if out_roots is not None:
            W = _kron_apply(W.T, [root.root for root in out_roots]).T
        weighted = _between(B, W, C)
        C, B = (None if moment is None else moment.to(dtype) for moment in (C, B))
        return cls(sites, W.to(dtype), C, B, float((W * weighted).sum()), in_roots, out_roots)

    def error(self, cores: Sequence[Tensor]) -> float:
        """The relative error."""
        D = self.target - fold(cores)
        lost = float((D * self.weigh(D)).sum(dtype=torch.float64).clamp_min(0))
        return (lost / self.energy) ** 0.5 if self.energy > 0 else 0.0

    def weigh(self, D: Tensor) -> Tensor:
        """`B D C`."""
        return _between(self.output_moment, D, self.input_moment)

    def solve(self, cores: Sequence[Tensor], k: int, steps: int, share: float = 0.0) -> Tensor:
        """Core `k`, the others fixed, after conjugate gradient steps that bring its residual to `share` of itself."""
        left, right = left_block(cores[:k], self.target), right_block(cores[k + 1 :], self.target)
        core = cores[k]
        residual = take_out(self.weigh(self.target - put_in(left, core, right)), left, right, core.shape)
        direction, size = residual, float(residual.square().sum())
        enough = max(share**2 * size, torch.finfo(core.dtype).tiny)
        for _ in range(steps):
            if size <= enough:
                break
            image = take_out(self.weigh(put_in(left, direction, right)), left, right, core.shape)
            step = size / float((direction * image).sum())
            core, residual = core + step * direction, residual - step * image
            last_size, size = size, float(residual.square().sum())
            direction = residual + (size / last_size) * direction
        return core

    def whiten_cores(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """Cores of the weight itself in leg-whitened coordinates."""
        found = [core.to(torch.float64) for core in cores]
        if self.out_roots is not None:
            found = [torch.einsum("aoib,op->apib", c, r.root) for c, r in zip(found, self.out_roots, strict=True)]
        if self.in_roots is not None:
            found = [torch.einsum("aoib,ij->aojb", c, r.root) for c, r in zip(found, self.in_roots, strict=True)]
        return [core.to(self.target.dtype) for core in found]

    def unwhiten(self, cores: Sequence[Tensor]) -> MPO:
        """The network of the weight itself."""
        plain = [core.to(torch.float64) for core in cores]
        if self.out_roots is not None:
            plain = [torch.einsum("aoib,op->apib", c, r.inverse) for c, r in zip(plain, self.out_roots, strict=True)]
        if self.in_roots is not None:
            plain = [torch.einsum("aoib,ij->aojb", c, r.inverse) for c, r in zip(plain, self.in_roots, strict=True)]
        return MPO(tuple(plain))


def left_block(cores: Sequence[Tensor], like: Tensor) -> Tensor:
    """The `(rows, columns, a)` block of the sites `cores`, the first of a network; `(1, 1, 1)` if there are none."""
    block = like.new_ones(1, 1, 1)
    for core in cores:
        rows, columns, _ = block.shape
        a, o, i, b = core.shape
        block = (block.reshape(rows * columns, a) @ core.reshape(a, o * i * b)).reshape(rows, columns, o, i, b)
        block = block.transpose(1, 2).reshape(rows * o, columns * i, b)
    return block


def right_block(cores: Sequence[Tensor], like: Tensor) -> Tensor:
    """The `(b, rows, columns)` block of the sites `cores`, the last of a network; `(1, 1, 1)` if there are none."""
    block = like.new_ones(1, 1, 1)
    for core in reversed(cores):
        _, rows, columns = block.shape
        a, o, i, b = core.shape
        block = (core.reshape(a * o * i, b) @ block.reshape(b, rows * columns)).reshape(a, o, i, rows, columns)
        block = block.transpose(2, 3).reshape(a, o * rows, i * columns)
    return block


def put_in(left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    """The `(O, I)` matrix of a core between two blocks."""
    (r, c, a), (_, o, i, b), (_, s, d) = left.shape, core.shape, right.shape
    matrix = (left.reshape(r * c, a) @ core.reshape(a, o * i * b)).reshape(r * c * o * i, b) @ right.reshape(b, s * d)
    return matrix.reshape(r, c, o, i, s, d).permute(0, 2, 4, 1, 3, 5).reshape(r * o * s, c * i * d)


def take_out(matrix: Tensor, left: Tensor, right: Tensor, shape: Sequence[int]) -> Tensor:
    """The adjoint of `put_in`: the `(a, o, i, b)` core with `<core, G> = <matrix, put_in(G)>` for any `G`."""
    (r, c, a), (b, s, d), (_, o, i, _) = left.shape, right.shape, shape
    split = matrix.reshape(r, o, s, c, i, d).permute(0, 3, 1, 4, 2, 5).reshape(r * c * o * i, s * d)
    half = (split @ right.reshape(b, s * d).T).reshape(r * c, o * i * b)
    return (left.reshape(r * c, a).T @ half).reshape(a, o, i, b)


def _path(n: int) -> list[int]:
    """One sweep, from the last site to the first and back to the last but one."""
    return [*range(n - 1, -1, -1), *range(1, n - 1)]


def _whiten_moment(
    moment: Tensor | None, legs: Sequence[int], damping: float, name: str
) -> tuple[Tensor | None, list[Root] | None]:
    """The damped moment in leg-whitened coordinates, float64, and the roots of its legs."""
    if moment is None:
        return None, None
    check_moment(moment, prod(legs), name)
    check_semidefinite(moment, name)
    full = damped(moment, damping)
    roots = [moment_root(leg, _LEG_DAMPING, name) for leg in leg_moments(full, legs)]
    inverses = [root.inverse.T for root in roots]
    return _kron_apply(_kron_apply(full, inverses).T, inverses), roots


def leg_moments(moment: Tensor, legs: Sequence[int]) -> list[Tensor]:
    """The partial trace onto every leg, scaled so that the Kronecker product of all has the trace of `moment`.

    >>> moments = leg_moments(torch.diag(torch.tensor([1.0, 3.0, 3.0, 9.0])), (2, 2))
    >>> torch.kron(*moments).diagonal().round()
    tensor([1., 3., 3., 9.])
    """
    n, trace = len(legs), float(moment.diagonal().sum())
    share = max(trace, torch.finfo(torch.float64).tiny) ** ((n - 1) / n)
    found = []
    for k, leg in enumerate(legs):
        before, after = prod(legs[:k]), prod(legs[k + 1 :])
        split = moment.reshape(before, leg, after, before, leg, after)
        found.append(torch.einsum("xiyxjy->ij", split) / share)
    return found


def _kron_apply(matrix: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """`matrix @ kron(factors)`, one leg at a time."""
    rows = matrix.shape[0]
    state = matrix.reshape(rows, *(len(factor) for factor in factors))
    for factor in factors:
        state = torch.tensordot(state, factor, ([1], [0]))
    return state.reshape(rows, -1)


def _between(B: Tensor | None, D: Tensor, C: Tensor | None) -> Tensor:
    """`B D C`, with None for the identity."""
    right = D if C is None else D @ C
    return right if B is None else B @ right
