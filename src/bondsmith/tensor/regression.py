"""Ridge and strength of a regression by its parts: each is left out once, and judges what all others ask for.

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
        """Returns the part with moment `own`; `others` is that of all other parts together, both (I, I).

        In float32: the least ridge is a thousand times what rounding adds to an eigenvalue, and float64 takes 2.5 times as long.
        """
        values, vectors = torch.linalg.eigh(others.float())
        return cls(values.clamp_min(0), vectors, vectors.T @ own.float() @ vectors, weight)


class Choice:
    """Finds the ridge, and the strength in [0, 1], at which `X = strength * M (C + ridge * mean(diag))^-1` lowers `E |e - X x|_B^2` most.

    >>> C, M = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    >>> choice = Choice()
    >>> choice.see(LeftOut.of(C, C, 1.0), M, M)
    >>> choice.best()
    (0.003, 1.0)
    """

    def __init__(self, output_moment: Tensor | None = None, ridges: Sequence[float] = RIDGES):
        self.ridges = ridges
        self._B = None if output_moment is None else output_moment.float()
        self._gain, self._cost = [0.0] * len(ridges), [0.0] * len(ridges)

    def see(self, part: LeftOut, others: Tensor, own: Tensor) -> None:
        """Judges on one part, with its `M` and that of all others, (O, I).

        A ridge divides columns in the eigenbasis of `C`, `X = A / d`: the gain is linear in `1 / d`, the cost quadratic, for all alike.
        """
        A, given = others.float() @ part.vectors, own.float() @ part.vectors
        BA = A if self._B is None else self._B @ A
        gains = (BA * given).sum(0, dtype=torch.float64)
        costs = ((A.T @ BA) * part.moment).double()
        values = part.values.double()
        for i, ridge in enumerate(self.ridges):
            shrunk = 1 / (values + ridge * values.mean()).clamp_min(1e-30)
            self._gain[i] += part.weight * float(shrunk @ gains)
            self._cost[i] += part.weight * float(shrunk @ costs @ shrunk)

    def best(self) -> tuple[float, float]:
        """Returns ridge and strength; strength 0 where no `X` lowers the error."""
        found = (0.0, self.ridges[-1], 0.0)
        for ridge, gain, cost in zip(self.ridges, self._gain, self._cost, strict=True):
            strength = min(1.0, max(0.0, gain / cost)) if cost > 0 else 0.0
            found = max(found, (2 * strength * gain - strength**2 * cost, ridge, strength))
        return found[1:]
