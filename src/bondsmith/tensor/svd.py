"""Leading singular and eigen-vectors of large matrices, without the rest of the decomposition.

Legend: `M` an `(m, n)` matrix, `G` a symmetric non-negative `(m, m)` one, `r` the rank wanted.

Up to `DENSE_UP_TO`, or where most vectors are wanted, LAPACK does all of it. Beyond, subspace iteration on the Gram
matrix of the smaller side: a step there is two power steps of the randomised SVD (Halko, Martinsson, Tropp 2011) and
costs less, for the larger side is gone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bondsmith.tensor.checks import check_matrix

DENSE_UP_TO = 1024
_STEPS = 5
_EXTRA = 0.15  # of the rank, carried along and dropped: what decides how fast the last wanted vectors converge


def leading_eigenvectors(gram: Tensor, rank: int, seed: int = 0) -> Tensor:
    """The `(m, r)` eigenvectors of the largest eigenvalues, descending, each with its largest entry positive; float64.

    >>> leading_eigenvectors(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2).T
    tensor([[0., 1., 0.],
            [0., 0., 1.]], dtype=torch.float64)
    """
    G = gram.to(torch.float64)
    size = len(G)
    width = rank + max(8, int(_EXTRA * rank))
    if size <= DENSE_UP_TO or 2 * width > size:
        return fix_signs(torch.linalg.eigh(G)[1].flip(1)[:, :rank])
    generator = torch.Generator().manual_seed(seed)
    Q = torch.randn(size, width, generator=generator, dtype=torch.float64).to(G.device)
    for _ in range(_STEPS):
        Q = torch.linalg.qr(G @ Q)[0]
    rotation = torch.linalg.eigh(Q.T @ (G @ Q))[1].flip(1)[:, :rank]
    return fix_signs(Q @ rotation)


def leading_left_vectors(matrix: Tensor, rank: int, seed: int = 0) -> Tensor:
    """The `(m, r)` left singular vectors of the largest singular values; float64, exact for small matrices."""
    M = matrix.to(torch.float64)
    rank = min(rank, *M.shape)
    if min(M.shape) <= DENSE_UP_TO:
        return fix_signs(torch.linalg.svd(M, full_matrices=False)[0][:, :rank])
    if M.shape[0] <= M.shape[1]:
        return leading_eigenvectors(M @ M.T, rank, seed)
    return fix_signs(torch.linalg.qr(M @ leading_eigenvectors(M.T @ M, rank, seed))[0])


@torch.no_grad()
def truncated_svd(matrix: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """`(U, s, Vh)` of the `rank` largest singular values, in the dtype of `matrix`.

    For large matrices the Frobenius error of `U s Vh` is within 1 % of the smallest possible, in a fraction of the
    time. At most `min(m, n)` of them; ValueError if `rank` is no whole number from 1 on.

    >>> U, s, Vh = truncated_svd(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2)
    >>> s
    tensor([3., 2.])
    """
    check_matrix(matrix, "matrix")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"a rank of {rank!r} is no whole number from 1 on")
    basis = leading_left_vectors(matrix, rank, seed)
    rotation, s, Vh = torch.linalg.svd(basis.T @ matrix.to(torch.float64), full_matrices=False)
    U = basis @ rotation
    signed = fix_signs(U)
    Vh = Vh * (signed * U).sum(0).sign()[:, None]
    return signed.to(matrix.dtype), s.to(matrix.dtype), Vh.to(matrix.dtype)


def fix_signs(vectors: Tensor) -> Tensor:
    """The columns of `(..., m, r)`, each with its largest entry positive: singular vectors come with a sign that differs by machine."""
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)
