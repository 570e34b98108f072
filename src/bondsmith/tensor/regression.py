"""Ridge and strength of a regression by its parts: each is fitted to all others, and judged where it was left out.

Legend: `x` what is read, (I,), `e` what is to be made up for, (O,), `C = E[x x^T]`, `M = E[e x^T]`, `B` `(O, O)` the metric of errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of the mean eigenvalue


@dataclass(frozen=True, eq=False)
class LeftOut:
    """What one part reads, in the eigenbasis of what all others read.

    Attributes:
        values: eigenvalues of the others' `C`, (I,).
        vectors: its eigenvectors, (I, I).
        moment: `C` of the part in this basis, (I, I).
        weight: of the part's tokens.
    """

    values: Tensor
    vectors: Tensor
    moment: Tensor
    weight: float

    @classmethod
    def of(cls, others: Tensor, own: Tensor, weight: float) -> LeftOut:
        """Returns the part with moment `own`; `others` is that of all other parts together, both (I, I)."""
        values, vectors = torch.linalg.eigh(others.to(torch.float64))
        values, vectors = values.clamp_min(0).float(), vectors.float()
        return cls(values, vectors, vectors.T @ own.float() @ vectors, weight)

    def solve(self, moved: Tensor, ridge: float) -> Tensor:
        """`M (C + ridge * mean(diag))^-1` for an (O, I) `M`, `C` that of all others; in the eigenbasis."""
        return moved.float() @ self.vectors / (self.values + ridge * self.values.mean()).clamp_min(1e-30)

    def shift(self, moved: Tensor, ridge: float) -> Tensor:
        """The same in the basis that `M` came in."""
        return self.solve(moved, ridge) @ self.vectors.T


def chosen_ridge(
    parts: Sequence[LeftOut],
    others: Sequence[Tensor],
    own: Sequence[Tensor],
    output_moment: Tensor | None = None,
    ridges: Sequence[float] = RIDGES,
) -> tuple[float, float]:
    """The ridge, and the strength in [0, 1], at which `X = strength * M (C + ridge * mean(diag))^-1` lowers `E |e - X x|_B^2` most.

    The error is that of every part under the `X` that all others ask for. Strength 0 says that no `X` lowers it.

    Args:
        others: `M` of all parts but one, for each.
        own: `M` of each part, (O, I).
        output_moment: `B`, or None for the identity.
    """
    best = (0.0, ridges[-1], 0.0)
    rotated = [M.float() @ part.vectors for part, M in zip(parts, own, strict=True)]
    for ridge in ridges:
        gain = cost = 0.0
        for part, rest, M in zip(parts, others, rotated, strict=True):
            X = part.solve(rest, ridge)
            BX = X if output_moment is None else output_moment.float() @ X
            gain += part.weight * float((BX * M).sum())
            cost += part.weight * float((BX * (X @ part.moment)).sum())
        strength = min(1.0, max(0.0, gain / cost)) if cost > 0 else 0.0
        lowered = 2 * strength * gain - strength**2 * cost
        if lowered > best[0]:
            best = (lowered, ridge, strength)
    return best[1], best[2]
