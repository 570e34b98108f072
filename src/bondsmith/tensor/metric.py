"""Second moments as metrics: damping, square roots, and products with them.

Legend: `M` an `(n, n)` moment, `R` a root of it, `R R^T = M`, `X` `(m, n)` rows, `D` an `(O, I)` error, `C` `(I, I)` the
input moment, `B` `(O, O)` the output moment; `None` for a moment means the identity.

Everything is float64. In products a large moment is read panel by panel and its lower triangle only: no float64 copy of it
is made, and they cost 9/16 of the multiply-adds. Roots and checks make copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bondsmith.tensor.checks import check_matrix, check_moment

DAMPING = 1e-4  # of the mean diagonal; keeps the inverse root of a moment from few tokens bounded
_INDEFINITE = 1e-3  # a negative eigenvalue this large, relative to the largest, is no rounding error
_PANEL = 256  # narrower panels make slow products


@dataclass(frozen=True, eq=False)
class Root:
    """A square root `R` of a damped moment, `R R^T = M`, `(n, n)` in float64: lower triangular, or any with its inverse."""

    root: Tensor
    general_inverse: Tensor | None = None

    @property
    def moment(self) -> Tensor:
        """The damped moment itself."""
        return self.root @ self.root.T

    @cached_property
    def inverse(self) -> Tensor:
        """`R^-1`."""
        return self.unwhiten(torch.eye(len(self.root), dtype=torch.float64, device=self.root.device)).T

    def whiten(self, columns: Tensor) -> Tensor:
        """`R^T columns`."""
        return self.root.T @ columns

    def unwhiten(self, columns: Tensor) -> Tensor:
        """`R^-T columns`."""
        if self.general_inverse is not None:
            return self.general_inverse.T @ columns
        found: Tensor = torch.linalg.solve_triangular(self.root.T, columns, upper=True)
        return found

    def solve(self, columns: Tensor) -> Tensor:
        """`M^-1 columns`."""
        if self.general_inverse is not None:
            return self.unwhiten(self.general_inverse @ columns)
        return self.unwhiten(torch.linalg.solve_triangular(self.root, columns, upper=False))


def moment_root(moment: Tensor, damping: float = DAMPING, name: str = "moment") -> Root:
    """A root of `moment + damping * mean(diag) * 1`; share it between matrices with one input.

    By Cholesky, thirty times cheaper than eigenvectors; by these where rounding has left the moment without a Cholesky
    factor; of zeros, the identity. ValueError if the moment is not square, finite, symmetric and non-negative.
    """
    check_moment(moment, moment.shape[0], name)
    if not float(moment.diagonal().max()):  # nothing was seen: every direction counts alike
        return Root(torch.eye(len(moment), dtype=torch.float64, device=moment.device))
    factor, failed = torch.linalg.cholesky_ex(damped(moment, damping))
    return _root_of_singular(moment, damping, name) if int(failed) else Root(factor)


def _root_of_singular(moment: Tensor, damping: float, name: str) -> Root:
    values, vectors = torch.linalg.eigh(damped(moment, damping))
    if float(values[0]) < -_INDEFINITE * float(values[-1].abs()):
        raise ValueError(f"{name} is indefinite: eigenvalues from {float(values[0]):.3g} to {float(values[-1]):.3g}")
    tiny = torch.finfo(torch.float64).eps * max(float(values[-1]), torch.finfo(torch.float64).tiny) * len(values)
    scales = values.clamp_min(tiny).sqrt()
    return Root(vectors * scales, (vectors / scales).T)


def check_not_indefinite(gram: Tensor, name: str) -> None:
    """Nothing, or ValueError if `X M X^T` shows that `M`, of which no root was taken, has a clearly negative eigenvalue."""
    shifted = gram.clone()
    shifted.diagonal().add_(_INDEFINITE * float(gram.diagonal().abs().max()) + torch.finfo(torch.float64).tiny)
    if int(torch.linalg.cholesky_ex(shifted)[1]):
        values = torch.linalg.eigvalsh(gram)
        raise ValueError(
            f"{name} is indefinite: what the weight sees has eigenvalues from {float(values[0]):.3g} to {float(values[-1]):.3g}"
        )


def check_semidefinite(moment: Tensor, name: str) -> None:
    """Nothing, or ValueError if a moment `(n, n)` has a clearly negative eigenvalue; a Cholesky factorisation says it."""
    shifted = damped(moment, 0.0)
    shifted.diagonal().add_(_INDEFINITE * float(moment.diagonal().max()) + torch.finfo(torch.float64).tiny)
    if int(torch.linalg.cholesky_ex(shifted)[1]):
        values = torch.linalg.eigvalsh(damped(moment, 0.0))
        raise ValueError(f"{name} is indefinite: eigenvalues from {float(values[0]):.3g} to {float(values[-1]):.3g}")


def damped(moment: Tensor, damping: float) -> Tensor:
    """`moment + damping * mean(diag) * 1`, symmetric, a float64 copy."""
    full = torch.empty(moment.shape, dtype=torch.float64, device=moment.device).copy_(moment)
    for panel, _ in _panels(len(full)):
        mean = (full[panel.start :, panel] + full[panel, panel.start :].T) / 2
        full[panel.start :, panel], full[panel, panel.start :] = mean, mean.T
    full.diagonal().add_(ridge_of(moment, damping))
    return full


def quadratic(rows: Tensor, moment: Tensor | None, damping: float = 0.0) -> Tensor:
    """`X M X^T` `(m, m)` for the damped moment.

    >>> quadratic(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
    tensor([[7., 4.],
            [4., 3.]], dtype=torch.float64)
    """
    X = rows.to(torch.float64)
    if moment is None:
        return X @ X.T
    half = _half_product(X, moment, damping) @ X.T
    return half + half.T


def energy(D: Tensor, input_moment: Tensor | None, output_moment: Tensor | None) -> float:
    """`tr(B D C D^T)`, not negative."""
    D, C, B = D.to(torch.float64), input_moment, output_moment
    if C is not None and B is not None:
        if D.shape[0] > D.shape[1]:
            D, C, B = D.T, B, C
        total = (quadratic(D, C) * B).sum()
    elif C is not None or B is not None:
        D, M = (D, C) if C is not None else (D.T, B)
        assert M is not None
        total = 2 * (_half_product(D, M, 0.0) * D).sum()
    else:
        total = D.square().sum()
    return float(total.clamp_min(0))


@torch.no_grad()
def relative_error(
    weight: Tensor, approximation: Tensor, input_moment: Tensor | None = None, output_moment: Tensor | None = None
) -> float:
    """`sqrt(tr(B D C D^T) / tr(B W C W^T))` with `D = weight - approximation`, in float64.

    ValueError for another shape, a moment of the wrong size or not finite ones.

    >>> relative_error(torch.eye(4), 0.5 * torch.eye(4))
    0.5
    """
    check_matrix(weight)
    check_matrix(approximation, "approximation")
    if weight.shape != approximation.shape:
        raise ValueError(f"an approximation of shape {tuple(approximation.shape)} stands for no {tuple(weight.shape)}")
    for moment, size, name in ((input_moment, weight.shape[1], "input"), (output_moment, weight.shape[0], "output")):
        if moment is not None:
            check_moment(moment, size, f"{name} moment")
    W = weight.to(torch.float64)
    whole = energy(W, input_moment, output_moment)
    lost = energy(W - approximation.to(torch.float64), input_moment, output_moment)
    return (lost / whole) ** 0.5 if whole > 0 else (0.0 if lost == 0 else float("inf"))


def _half_product(X: Tensor, moment: Tensor, damping: float) -> Tensor:
    """`X H` with `H + H^T = M`: `H` is the lower triangle of the damped `M` with its diagonal halved."""
    half = torch.empty_like(X)
    ridge = ridge_of(moment, damping)
    for panel, step in _panels(len(moment)):
        block = moment[panel.start :, panel].to(torch.float64, copy=True)
        square = block[:step].tril_()
        square.diagonal().add_(ridge).div_(2)
        torch.mm(X[:, panel.start :], block, out=half[:, panel])
    return half


def _panels(size: int) -> Iterator[tuple[slice, int]]:
    """Slices of columns that cover `size`, at most eight where they are wide, and how many columns each holds."""
    step = max(_PANEL, -(-size // 8))
    for first in range(0, size, step):
        yield slice(first, min(first + step, size)), min(step, size - first)


def ridge_of(moment: Tensor, damping: float) -> float:
    """What damping adds to the diagonal of a moment."""
    return damping * float(moment.diagonal().mean(dtype=torch.float64))
