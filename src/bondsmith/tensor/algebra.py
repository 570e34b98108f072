"""Algebra of networks: canonical forms, Schmidt values, truncation, sums, gauges.

Legend: `n` sites, `o, i` legs, `a, b` bonds, `s` Schmidt values at a cut, `p = s^2 / sum s^2`. Everything is computed
in float64 and given back in the dtype that came in.

A network is in mixed canonical form around site `c` when every core left of it has orthonormal columns as an
`(a o i, b)` matrix and every core right of it orthonormal rows as an `(a, o i b)` one: then the norm of the matrix is
that of core `c`.

A batch of networks goes through all of this at once; figures are tensors with one number for each network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bondsmith.tensor.checks import check_finite
from bondsmith.tensor.mpo import MPO
from bondsmith.tensor.sites import clip_bonds
from bondsmith.tensor.svd import fix_signs


@dataclass(frozen=True, eq=False)
class Truncated:
    """A network with smaller bonds and what that cost.

    `discarded[k]` is the weight (the sum of squared Schmidt values) dropped at bond `k`, float64. Successive
    projections drop parts orthogonal to each other, so `error` is the Frobenius distance to what came in exactly, for
    any number of bonds.
    """

    mpo: MPO
    discarded: tuple[Tensor, ...]

    @property
    def error(self) -> Tensor:
        """The Frobenius norm of what was dropped."""
        zero = torch.zeros(self.mpo.batch, dtype=torch.float64, device=self.mpo.device)
        return sum(self.discarded, zero).sqrt()


def canonical(mpo: MPO, center: int) -> MPO:
    """The same operator in mixed canonical form around site `center` (from 0; `-1` is the last, left-canonical).

    Bonds over the exact ones shrink to them. ValueError if there is no such site.
    """
    n = len(mpo.cores)
    if not -n <= center < n:
        raise ValueError(f"site {center} does not exist in {mpo}")
    cores = [core.to(torch.float64) for core in mpo.cores]
    move_center(cores, n - 1)
    move_center(cores, 0)  # to and fro: bonds over the exact ones shrink from either side
    move_center(cores, center % n)
    return _as(cores, mpo)


def move_center(cores: list[Tensor], center: int) -> None:
    """Nothing; `cores` become canonical around site `center` in place, in their own dtype."""
    for k in range(center):
        shape = cores[k].shape
        q, r = torch.linalg.qr(_tall(cores[k]))
        cores[k] = q.reshape(*shape[:-1], -1)
        cores[k + 1] = _times_left(r, cores[k + 1])
    for k in range(len(cores) - 1, center, -1):
        shape = cores[k].shape
        q, r = torch.linalg.qr(_wide(cores[k]).mT)
        cores[k] = q.mT.reshape(*shape[:-4], -1, *shape[-3:])
        left = cores[k - 1]
        cores[k - 1] = (_tall(left) @ r.mT).reshape(*left.shape[:-1], -1)


def schmidt_values(mpo: MPO) -> tuple[Tensor, ...]:
    """The singular values of the operator across every bond, descending, float64.

    >>> bell = MPO((torch.eye(2).reshape(1, 2, 1, 2), torch.eye(2).reshape(2, 1, 2, 1)))
    >>> schmidt_values(bell)[0].tolist()
    [1.0, 1.0]
    """
    return _sweep(mpo, mpo.bonds, 0.0)[2]


def entropies(mpo: MPO) -> tuple[Tensor, ...]:
    """The entanglement entropy `-sum p log p` across every bond, in nats; 0 where all Schmidt values vanish.

    >>> bell = MPO((torch.eye(2).reshape(1, 2, 1, 2), torch.eye(2).reshape(2, 1, 2, 1)))
    >>> entropies(bell)
    (tensor(0.6931, dtype=torch.float64),)
    """
    return tuple(_entropy(values) for values in schmidt_values(mpo))


def entropy(values: Tensor) -> float:
    """`-sum p log p` of the Schmidt values of one cut, in nats; 0 when all vanish."""
    return float(_entropy(values))


def _entropy(values: Tensor) -> Tensor:
    weight = values.to(torch.float64) ** 2
    p = weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    total: Tensor = torch.special.entr(p).sum(-1)
    return total


def truncate(mpo: MPO, bonds: int | Sequence[int] | None = None, *, discard: float = 0.0) -> Truncated:
    """The network at no more than `bonds`, dropping besides up to the share `discard` of the squared norm.

    The norm's share is spread evenly over the bonds; a batch keeps what its most demanding network needs. Left-canonical.
    ValueError unless `0 <= discard < 1`.

    >>> mpo = MPO((torch.eye(3).reshape(1, 3, 1, 3), torch.diag(torch.tensor([3.0, 2.0, 1.0])).reshape(3, 1, 3, 1)))
    >>> cut = truncate(mpo, 2)
    >>> cut.mpo.bonds, round(cut.error.item(), 6), truncate(mpo, discard=0.4).mpo.bonds
    ((2,), 1.0, (1,))
    """
    if not 0 <= discard < 1:
        raise ValueError(f"discard is a share of the squared norm, at least 0 and below 1, not {discard}")
    kept = mpo.bonds if bonds is None else clip_bonds(mpo.sites, bonds)
    truncated, discarded, _ = _sweep(mpo, kept, discard)
    return Truncated(truncated, discarded)


def inner(left: MPO, right: MPO) -> Tensor:
    """`tr(left^T right)`, contracted core by core without either matrix; ValueError if legs or batches differ."""
    _check_same_legs(left, right)
    state = torch.ones(*left.batch, 1, 1, dtype=torch.float64, device=left.device)
    for one, other in zip(left.cores, right.cores, strict=True):
        half = _times_left(state, other.to(torch.float64))
        state = _tall(one.to(torch.float64)).mT @ _tall(half)
    return state[..., 0, 0]


def norm(mpo: MPO) -> Tensor:
    """The Frobenius norm of the matrix."""
    first = canonical(mpo.to(dtype=torch.float64), 0).cores[0]
    return first.flatten(-4).square().sum(-1).sqrt()


def add(left: MPO, right: MPO) -> MPO:
    """The network of the sum of both matrices, bonds added; `truncate` it to recompress. ValueError if the legs differ.

    >>> mpo = MPO((torch.ones(1, 2, 1, 1), torch.ones(1, 1, 2, 1)))
    >>> both = add(mpo, mpo)
    >>> both.bonds, truncate(both, discard=1e-12).mpo.bonds, both.to_matrix().tolist()
    ((2,), (1,), [[2.0, 2.0], [2.0, 2.0]])
    """
    _check_same_legs(left, right)
    n = len(left.cores)
    if n == 1:
        return MPO((left.cores[0] + right.cores[0],))
    cores = []
    for k, (one, other) in enumerate(zip(left.cores, right.cores, strict=True)):
        a, o, i, b = one.shape[-4:]
        a2, b2 = other.shape[-4], other.shape[-1]
        rows, columns = (1 if k == 0 else a + a2), (1 if k == n - 1 else b + b2)
        dtype = torch.promote_types(one.dtype, other.dtype)
        core = one.new_zeros(*left.batch, rows, o, i, columns, dtype=dtype)
        core[..., :a, :, :, :b] += one
        core[..., rows - a2 :, :, :, columns - b2 :] += other
        cores.append(core)
    return MPO(tuple(cores))


def scale(mpo: MPO, factor: float) -> MPO:
    """The network of `factor` times the matrix."""
    return MPO((mpo.cores[0] * factor, *mpo.cores[1:]))


def transpose(mpo: MPO) -> MPO:
    """The network of the transposed matrix: out and in legs change places."""
    return MPO(tuple(core.transpose(-3, -2) for core in mpo.cores))


def regauge(mpo: MPO, bond: int, matrix: Tensor) -> MPO:
    """The same operator with `G_k H` and `H^-1 G_k+1` on both sides of bond `bond` (from 0), `H = matrix` `(b, b)`.

    ValueError if there is no such bond, or `H` has another size, or no inverse in its dtype.
    """
    if not 0 <= bond < len(mpo.bonds):
        raise ValueError(f"bond {bond} does not exist in {mpo}")
    size = mpo.bonds[bond]
    if matrix.shape != (size, size):
        raise ValueError(f"bond {bond} has dimension {size}; a gauge of shape {tuple(matrix.shape)} does not fit")
    H = matrix.to(torch.float64)
    check_finite(H, f"the gauge at bond {bond}")
    condition = float(torch.linalg.cond(H))
    if not condition < 0.1 / torch.finfo(matrix.dtype).eps:  # what rounding leaves of a singular one
        raise ValueError(
            f"the gauge at bond {bond} is singular (rank {int(torch.linalg.matrix_rank(H))} of {size}, condition {condition:.2g})"
        )
    inverse = torch.linalg.inv(H)
    cores = [core.to(torch.float64) for core in mpo.cores]
    cores[bond] = (_tall(cores[bond]) @ H).reshape(cores[bond].shape)
    cores[bond + 1] = _times_left(inverse, cores[bond + 1])
    return _as(cores, mpo)


def _sweep(mpo: MPO, kept: Sequence[int], discard: float) -> tuple[MPO, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Truncated network, discarded weights and Schmidt values of one SVD sweep over a right-canonical network."""
    cores = list(canonical(mpo.to(dtype=torch.float64), 0).cores)
    allowed = discard * cores[0].square().flatten(-4).sum(-1) / max(1, len(kept))
    discarded, spectra = [], []
    for k in range(len(cores) - 1):
        shape, matrix = cores[k].shape, _tall(cores[k])
        u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
        bond = min(kept[k], smallest_bond(s, allowed))
        u = fix_signs(u[..., :bond])
        cores[k + 1] = _times_left(u.mT @ matrix, cores[k + 1])
        cores[k] = u.reshape(*shape[:-1], bond)
        discarded.append(s[..., bond:].square().sum(-1))
        spectra.append(s)
    return _as(cores, mpo), tuple(discarded), tuple(spectra)


def smallest_bond(values: Tensor, allowed: float | Tensor) -> int:
    """How many of the descending `values` to keep so that the squares of the others sum to at most `allowed`.

    In a batch, as many as the most demanding needs.

    >>> smallest_bond(torch.tensor([3.0, 2.0, 1.0]), 1.0), smallest_bond(torch.tensor([3.0]), 100.0)
    (2, 1)
    """
    tails = values.square().flip(-1).cumsum(-1)
    droppable = (tails <= torch.as_tensor(allowed, device=tails.device)[..., None]).sum(-1)
    return max(1, values.shape[-1] - int(droppable.min()))


def _tall(core: Tensor) -> Tensor:
    """`(a o i, b)`."""
    return core.reshape(*core.shape[:-4], -1, core.shape[-1])


def _wide(core: Tensor) -> Tensor:
    """`(a, o i b)`."""
    return core.reshape(*core.shape[:-3], -1)


def _times_left(matrix: Tensor, core: Tensor) -> Tensor:
    """The core with `matrix` `(x, a)` multiplied into its left bond."""
    return (matrix @ _wide(core)).reshape(*core.shape[:-4], -1, *core.shape[-3:])


def _as(cores: Sequence[Tensor], like: MPO) -> MPO:
    return MPO(tuple(core.to(like.dtype) for core in cores))


def _check_same_legs(left: MPO, right: MPO) -> None:
    if left.sites != right.sites:
        raise ValueError(f"networks with sites {left.sites} and {right.sites} do not go together: other legs")
    if left.batch != right.batch:
        raise ValueError(f"batches of {tuple(left.batch)} and {tuple(right.batch)} networks do not go together")
