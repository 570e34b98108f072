"""From a matrix to a network: the closed forms.

Legend: `W` the `(O, I)` weight, `D = W - W'` its error, `C = E[x x^T]` `(I, I)` the input moment, `B = E[g g^T]` `(O,
O)` the output moment, `k` a bond. The error of a layer is `tr(B D C D^T)`; `None` for a moment means the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bondsmith.tensor.checks import check_matrix, check_moment
from bondsmith.tensor.mpo import MPO
from bondsmith.tensor.sites import Sites
from bondsmith.tensor.svd import leading_eigenvectors, leading_left_vectors

DAMPING = 1e-4  # of the mean diagonal; keeps the inverse root of a moment from few tokens bounded
_INDEFINITE = 1e-3  # a negative eigenvalue this large, relative to the largest, is no rounding error


@dataclass(frozen=True, eq=False)
class Root:
    """The symmetric square root of a damped moment, and its inverse, both `(n, n)` in float64."""

    root: Tensor
    inverse: Tensor

    @property
    def moment(self) -> Tensor:
        """The damped moment itself."""
        return self.root @ self.root


def moment_root(moment: Tensor, damping: float = DAMPING, name: str = "moment") -> Root:
    """The root of `moment + damping * mean(diag) * 1`, by `eigh` in float64; share it between matrices with one input.

    ValueError if the moment is not square, finite, symmetric and non-negative.
    """
    check_moment(moment, moment.shape[0], name)
    values, vectors = torch.linalg.eigh(damped(moment, damping))
    if float(values[0]) < -_INDEFINITE * float(values[-1].abs()):
        raise ValueError(f"{name} is indefinite: eigenvalues from {float(values[0]):.3g} to {float(values[-1]):.3g}")
    tiny = torch.finfo(torch.float64).eps * max(float(values[-1]), torch.finfo(torch.float64).tiny) * len(values)
    scales = values.clamp_min(tiny).sqrt()
    return Root((vectors * scales) @ vectors.T, (vectors / scales) @ vectors.T)


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
    for o, i, bond in zip(sites.out_legs, sites.in_legs, sites.clip(bonds), strict=False):
        matrix = rest.reshape(left * o * i, -1)
        basis = leading_left_vectors(matrix, bond)
        cores.append(basis.reshape(left, o, i, -1))
        rest, left = basis.T @ matrix, basis.shape[1]
    cores.append(rest.reshape(left, sites.out_legs[-1], sites.in_legs[-1], 1))
    return MPO(tuple(core.to(weight.dtype) for core in cores))


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
    """The matrix cut `(O,1)(1,I)` at `bond` that minimises `tr(B D C D^T)`, exactly, in the dtype of `weight`.

    `svd_k(B^1/2 W C^1/2)` with both roots undone, through the Gram matrix of the smaller side: only that side's root is
    ever needed, the other moment enters as it is. Give roots in place of moments where several matrices share them.

    >>> weight = torch.eye(3)
    >>> whitened_cut(weight, 1, input_moment=torch.diag(torch.tensor([1.0, 9.0, 4.0]))).to_matrix().diagonal().round()
    tensor([0., 1., 0.])
    """
    check_matrix(weight)
    out_features, in_features = weight.shape
    (bond,) = Sites((out_features, 1), (1, in_features)).clip(bond)
    W = weight.to(torch.float64)
    if out_features <= in_features:
        left, right = _cut_rows(
            W, bond, output_moment, output_root, input_moment, input_root, damping, "output", "input"
        )
    else:
        right_t, left_t = _cut_rows(
            W.T, bond, input_moment, input_root, output_moment, output_root, damping, "input", "output"
        )
        left, right = left_t.T, right_t.T
    return MPO((left.to(weight.dtype)[None, :, None, :], right.to(weight.dtype)[:, None, :, None]))


def relative_error(
    weight: Tensor, approximation: Tensor, input_moment: Tensor | None = None, output_moment: Tensor | None = None
) -> float:
    """`sqrt(tr(B D C D^T) / tr(B W C W^T))` with `D = weight - approximation`, in float64.

    >>> relative_error(torch.eye(4), 0.5 * torch.eye(4))
    0.5
    """
    W = weight.to(torch.float64)
    D = W - approximation.to(torch.float64)
    energy = _energy(W, input_moment, output_moment)
    lost = _energy(D, input_moment, output_moment)
    return (lost / energy) ** 0.5 if energy > 0 else (0.0 if lost == 0 else float("inf"))


def propagated_target(
    weight: Tensor, cross_moment: Tensor, input_moment: Tensor, alpha: float = 0.5, damping: float = 1e-2
) -> Tensor:
    """`W + alpha W (E[x xh^T] - E[xh xh^T]) (E[xh xh^T] + damping * mean(diag))^-1`, in the dtype of `weight`.

    The weight to approximate in the norm of `input_moment = E[xh xh^T]` when the layer sees `xh`, from the compressed
    layers before it, in place of `x`: `alpha = 1` and no damping minimise `E|W x - W' xh|^2`; less of it guards against
    few tokens.
    """
    check_matrix(weight)
    in_features = weight.shape[1]
    check_moment(input_moment, in_features, "input moment")
    if cross_moment.shape != input_moment.shape:
        raise ValueError(
            f"cross moment has shape {tuple(cross_moment.shape)}, the input moment {tuple(input_moment.shape)}"
        )
    W, moment = weight.to(torch.float64), input_moment.to(torch.float64)
    difference = W @ (cross_moment.to(torch.float64) - moment)
    shift: Tensor = torch.linalg.solve(damped(moment, damping), difference, left=False)
    return (W + alpha * shift).to(weight.dtype)


def damped(moment: Tensor, damping: float) -> Tensor:
    """`moment + damping * mean(diag) * 1`, symmetric, float64."""
    moment = moment.to(torch.float64)
    moment = (moment + moment.T) / 2
    moment.diagonal().add_(damping * moment.diagonal().mean())
    return moment


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


def _cut_rows(
    W: Tensor,
    bond: int,
    own_moment: Tensor | None,
    own_root: Root | None,
    far_moment: Tensor | None,
    far_root: Root | None,
    damping: float,
    own_name: str,
    far_name: str,
) -> tuple[Tensor, Tensor]:
    """Left `(O, k)` and right `(k, I)` factors for `O <= I`; "own" is the row side, "far" the column side."""
    root = own_root
    if root is None and own_moment is not None:
        check_moment(own_moment, W.shape[0], f"{own_name} moment")
        root = moment_root(own_moment, damping, f"{own_name} moment")
    whitened = W if root is None else root.root @ W
    gram = whitened @ whitened.T
    if far_root is not None:
        half = whitened @ far_root.root
        gram = half @ half.T
    elif far_moment is not None:
        check_moment(far_moment, W.shape[1], f"{far_name} moment")
        gram = whitened @ damped(far_moment, damping) @ whitened.T
    basis = leading_eigenvectors(gram, bond)
    return (basis if root is None else root.inverse @ basis), basis.T @ whitened


def _energy(D: Tensor, input_moment: Tensor | None, output_moment: Tensor | None) -> float:
    right = D if input_moment is None else D @ input_moment.to(torch.float64)
    left = D if output_moment is None else output_moment.to(torch.float64) @ D
    return float((left * right).sum().clamp_min(0))
