"""From a matrix to a network: the closed forms.

Legend: `W` the `(O, I)` weight, `D = W - W'` its error, `C = E[x x^T]` `(I, I)` the input moment, `B = E[g g^T]` `(O,
O)` the output moment, `k` a bond. The error of a layer is `tr(B D C D^T)`; `None` for a moment means the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bondsmith.tensor.checks import check_finite, check_matrix, check_moment
from bondsmith.tensor.metric import DAMPING, Root, check_not_indefinite, moment_root, quadratic
from bondsmith.tensor.metric import relative_error as relative_error
from bondsmith.tensor.mpo import MPO
from bondsmith.tensor.sites import Sites, clip_bonds
from bondsmith.tensor.svd import leading_eigenvectors, leading_left_vectors


@torch.no_grad()
def sequential_svd(weight: Tensor, sites: Sites, bonds: int | Sequence[int]) -> MPO:
    """The network of n - 1 truncated SVDs, in the dtype of `weight`: the method of arXiv 2401.14109.

    Left-canonical: every core but the last has orthonormal columns, so the squared Frobenius error is at most the sum
    of the discarded squared singular values, and equal to it for one cut. Bonds over the exact ones are clipped.

    >>> weight = torch.arange(24.0).reshape(4, 6)
    >>> mpo = sequential_svd(weight, Sites((2, 2), (2, 3)), 6)
    >>> bool(torch.allclose(mpo.to_matrix(), weight, atol=1e-4)), mpo.bonds
    (True, (4,))
    """
    check_matrix(weight)
    check_sites(weight, sites)
    rest, left, cores = interleave(weight.to(torch.float64), sites), 1, []
    for o, i, bond in zip(sites.out_legs, sites.in_legs, clip_bonds(sites, bonds), strict=False):
        matrix = rest.reshape(left * o * i, -1)
        basis = leading_left_vectors(matrix, bond)
        cores.append(basis.reshape(left, o, i, -1))
        rest, left = basis.T @ matrix, basis.shape[1]
    cores.append(rest.reshape(left, sites.out_legs[-1], sites.in_legs[-1], 1))
    return MPO(tuple(core.to(weight.dtype) for core in cores))


@torch.no_grad()
def whitened_cut(
    weight: Tensor,
    bond: int,
    *,
    input_moment: Tensor | None = None,
    output_moment: Tensor | None = None,
    input_root: Root | None = None,
    output_root: Root | None = None,
    damping: float = DAMPING,
) -> MPO:
    """The matrix cut `(O,1)(1,I)` at `bond` that minimises `tr(B D C D^T)`, in the dtype of `weight`.

    Exactly up to `svd.DENSE_UP_TO`, within 1 % of the least error beyond. `svd_k(B^1/2 W C^1/2)` with both roots undone,
    through the Gram matrix of the smaller side: only that side's root is ever needed, the other moment enters as it is. Give
    roots in place of moments where several matrices share them.

    >>> weight = torch.eye(3)
    >>> whitened_cut(weight, 1, input_moment=torch.diag(torch.tensor([1.0, 9.0, 4.0]))).to_matrix().diagonal().round()
    tensor([0., 1., 0.])
    """
    check_matrix(weight)
    out_features, in_features = weight.shape
    (bond,) = clip_bonds(Sites((out_features, 1), (1, in_features)), bond)
    sides = _Side("input", input_moment, input_root), _Side("output", output_moment, output_root)
    short, whitened, gram = _whiten_short_side(weight, *sides, damping)
    basis = leading_eigenvectors(gram, bond)
    left, right = basis if short is None else short.unwhiten(basis), basis.T @ whitened
    if out_features > in_features:
        left, right = right.T, left.T
    return MPO((left.to(weight.dtype)[None, :, None, :], right.to(weight.dtype)[:, None, :, None]))


@torch.no_grad()
def cut_spectrum(
    weight: Tensor,
    *,
    input_moment: Tensor | None = None,
    output_moment: Tensor | None = None,
    input_root: Root | None = None,
    output_root: Root | None = None,
    damping: float = DAMPING,
) -> Tensor:
    """All `min(O, I)` singular values of `B^1/2 W C^1/2`, descending, float64: the error of every matrix cut at once.

    The least `tr(B D C D^T)` at bond `k`, in the damped moments, is the sum of the squares from place `k` on.
    One symmetric eigenvalue problem of the smaller side. Give roots in place of moments where matrices share them.

    >>> cut_spectrum(torch.eye(3), input_moment=torch.diag(torch.tensor([1.0, 9.0, 4.0])), damping=0.0)
    tensor([3., 2., 1.], dtype=torch.float64)
    """
    check_matrix(weight)
    sides = _Side("input", input_moment, input_root), _Side("output", output_moment, output_root)
    gram = _whiten_short_side(weight, *sides, damping)[2]
    squares: Tensor = torch.linalg.eigvalsh(gram).flip(0)
    return squares.clamp_min(0).sqrt()


@torch.no_grad()
def propagated_target(
    weight: Tensor, difference: Tensor, input_moment: Tensor, alpha: float = 0.5, damping: float = 1e-2
) -> Tensor:
    """`W + alpha W E[(x - xh) xh^T] (E[xh xh^T] + damping * mean(diag))^-1`, in the dtype of `weight`.

    The weight to approximate in the norm of `input_moment = E[xh xh^T]` when the layer sees `xh`, from the compressed
    layers before it, in place of `x`: `alpha = 1` and no damping minimise `E|W x - W' xh|^2`; less of it guards against
    few tokens. `difference = E[(x - xh) xh^T]` comes summed as such: of two large moments the digits would cancel.
    """
    check_matrix(weight)
    check_moment(input_moment, weight.shape[1], "input moment")
    if difference.shape != input_moment.shape:
        raise ValueError(
            f"the difference of moments has shape {tuple(difference.shape)}, the input moment {tuple(input_moment.shape)}"
        )
    check_finite(difference, "difference of moments")
    return shifted_target(weight, output_difference(weight, difference), input_moment, alpha, damping)


@torch.no_grad()
def output_difference(weight: Tensor, difference: Tensor) -> Tensor:
    """`W E[(x - xh) xh^T]` in float64, `(O, I)`: how far the outputs are moved by another input."""
    W = weight.to(torch.float64)
    return torch.cat([W @ columns.to(torch.float64) for columns in torch.split(difference, 1024, 1)], 1)


@torch.no_grad()
def shifted_target(
    weight: Tensor, moved: Tensor, input_moment: Tensor, alpha: float = 0.5, damping: float = 1e-2
) -> Tensor:
    """`W + alpha M (E[xh xh^T] + damping * mean(diag))^-1` with `M = moved = E[(y - W xh) xh^T]`, in the dtype of `weight`.

    `propagated_target` for a layer that reads fewer channels than its original, which gave `y`: there `(O, h)` outputs are
    compared, where inputs of unlike width cannot be.
    """
    check_matrix(weight)
    if moved.shape != weight.shape:
        raise ValueError(f"the moment of outputs has shape {tuple(moved.shape)}, the weight {tuple(weight.shape)}")
    check_finite(moved, "moment of outputs")
    shift = moment_root(input_moment, damping, "input moment").solve(moved.to(torch.float64).T).T
    return torch.add(weight.to(torch.float64), shift, alpha=alpha).to(weight.dtype)


def interleave(weight: Tensor, sites: Sites) -> Tensor:
    """`(O, I)` as the tensor `(o_1, i_1, o_2, i_2, ...)`."""
    order = [axis for k in range(sites.n) for axis in (k, sites.n + k)]
    return weight.reshape(*sites.out_legs, *sites.in_legs).permute(order)


def check_sites(weight: Tensor, sites: Sites) -> None:
    """Nothing, or ValueError if the legs do not multiply to the shape of `weight`."""
    if tuple(weight.shape) != (sites.out_features, sites.in_features):
        raise ValueError(
            f"sites {sites} multiply to {sites.out_features} x {sites.in_features}, the weight is {tuple(weight.shape)}"
        )


@dataclass(frozen=True, eq=False)
class _Side:
    """What is known of one side of a weight: its moment, or a root of it, or nothing."""

    name: str
    moment: Tensor | None
    root: Root | None

    def to_root(self, size: int, damping: float) -> Root | None:
        """The root; None for the identity."""
        if self.root is None and self.moment is not None:
            check_moment(self.moment, size, f"{self.name} moment")
            return moment_root(self.moment, damping, f"{self.name} moment")
        return self.root

    def between(self, rows: Tensor, damping: float) -> Tensor:
        """`rows M rows^T` with the damped moment `M`; no root is taken."""
        if self.root is not None:
            return quadratic(rows @ self.root.root, None)
        if self.moment is not None:
            check_moment(self.moment, rows.shape[1], f"{self.name} moment")
        return quadratic(rows, self.moment, damping)


def _whiten_short_side(
    weight: Tensor, inputs: _Side, outputs: _Side, damping: float
) -> tuple[Root | None, Tensor, Tensor]:
    """Root of the smaller side, the weight times it with that side as rows, and its Gram matrix in the other moment."""
    W, short, long = weight.to(torch.float64), outputs, inputs
    if W.shape[0] > W.shape[1]:
        W, short, long = W.T, inputs, outputs
    root = short.to_root(W.shape[0], damping)
    whitened = W if root is None else root.whiten(W)
    gram = long.between(whitened, damping)
    if long.moment is not None:
        check_not_indefinite(gram, f"{long.name} moment")
    return root, whitened, gram
