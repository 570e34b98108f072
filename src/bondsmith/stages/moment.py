"""A second moment that rows are added to, and what tokens weigh in it.

Legend: `T` tokens, `I` in features.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bondsmith.model.source import ModelError
from bondsmith.model.tracing import Group

_LEAST_WEIGHT = 1e-15  # of a token without gradient
_PANEL = 128  # narrower panels make slow products
_MIRROR = 512  # rows mirrored at a time


class Moment:
    """A weighted mean of outer products, summed in float32 on the device of its rows, divided when read."""

    def __init__(self, features: int, device: torch.device | str = "cpu", other: int | None = None):
        self._sum = torch.zeros(features, other or features, device=device)
        self._weight = 0.0
        self._rows = 0
        self._lower = True

    def add(self, rows_TI: Tensor, weights_T: Tensor | None = None, other_TI: Tensor | None = None) -> None:
        """Adds `sum_t w_t x_t y_t^T` for rows `x` and `other` rows `y` (`x` itself by default)."""
        weighted = rows_TI if weights_T is None else rows_TI * weights_T[:, None]
        if other_TI is None:
            self._add_symmetric(weighted, rows_TI)
        else:
            self._lower = False
            self._sum.addmm_(weighted.T, other_TI)
        self._rows += rows_TI.shape[0]
        self._weight += float(rows_TI.shape[0] if weights_T is None else weights_T.sum())

    def _add_symmetric(self, weighted_TI: Tensor, rows_TI: Tensor) -> None:
        """Adds to the blocks on and under the diagonal only: with eight of them 9/16 of the multiply-adds of the whole."""
        step = max(_PANEL, -(-rows_TI.shape[1] // 8))
        for first in range(0, rows_TI.shape[1], step):
            panel = slice(first, first + step)
            self._sum[panel, : panel.stop].addmm_(weighted_TI[:, panel].T, rows_TI[:, : panel.stop])

    def plus(self, other: Moment, sign: float = 1.0) -> Moment:
        """Returns the moment of the rows of both; with sign -1 that without the rows of `other`, which are some of these."""
        found = copy.copy(self)
        found._sum = torch.add(self._sum, other._sum, alpha=sign)
        found._weight, found._rows = self._weight + sign * other._weight, self._rows + int(sign) * other._rows
        return found

    def nothing(self) -> Tensor:
        """The (features, features) identity: the moment of rows of which nothing is known."""
        return torch.eye(len(self._sum), device=self._sum.device)

    @property
    def features(self) -> int:
        """Of what is read."""
        return len(self._sum)

    @property
    def weight(self) -> float:
        """Of all rows together."""
        return self._weight

    @property
    def seen(self) -> bool:
        """True once there was a row."""
        return self._rows > 0

    def mean(self, name: str) -> Tensor:
        """Returns the (features, features) mean; ModelError names the matrix if it is not finite or has seen no token.

        Where all rows were zero it is the identity: nothing is known of such a matrix.
        """
        if not self.seen:
            raise ModelError(f"{name}: no calibration token reached this matrix; calibrate on more or other text")
        if self._lower:
            for first in range(0, len(self._sum), _MIRROR):  # in place: wide moments are what memory goes to
                panel = slice(first, min(first + _MIRROR, len(self._sum)))
                self._sum[panel, panel] = self._sum[panel, panel].tril() + self._sum[panel, panel].tril(-1).T
                self._sum[panel, panel.stop :] = self._sum[panel.stop :, panel].T
        mean = self._sum / self._weight if self._weight else torch.full_like(self._sum, torch.nan)
        if not math.isfinite(float(mean.sum())) and not torch.isfinite(mean).all():
            raise ModelError(f"{name}: the second moment of its input is not finite; an activation before it overflows")
        return self.nothing() if self._lower and not mean.diagonal().any() else mean


def means_of(groups: Sequence[Group], moments: Sequence[Moment]) -> list[Tensor | None]:
    """Returns the mean that each group has seen, None for one that saw no token.

    An expert to which none was sent has that of all experts which read as much together, or the identity.
    """
    means: list[Tensor | None] = []
    for group, moment in zip(groups, moments, strict=True):
        if moment.seen or not group.expert:
            means.append(moment.mean(group.names[0]) if moment.seen else None)
            continue
        peers = zip(groups, moments, strict=True)
        seen = [m for g, m in peers if m.seen and g.expert and m.features == moment.features]
        means.append(functools.reduce(Moment.plus, seen).mean(group.names[0]) if seen else moment.nothing())
    return means


def token_weights(hidden_TI: Tensor) -> Tensor:
    """Returns `1 / mean(y_t^2)` per token, (tokens,).

    A few tokens of Llama-like models carry activations a thousand times the others'; the norm that reads the residual stream divides
    them away, and so must the error that is minimised.
    """
    return 1 / hidden_TI.square().mean(-1).clamp_min(1e-12)


def stream_weights(group: Group, before: Tensor, after: Tensor) -> Tensor | None:
    """Returns token weights for matrices that write into the residual stream, by the stream they write into; None for others.

    For want of gradients, which say the same and more.
    """
    if not (group.writes and group.every_token):
        return None
    return token_weights((after if group.last else before).flatten(0, 1))


def gradient_weights(squares: Sequence[Tensor]) -> Tensor:
    """Returns token weights for matrices that read the same input: the norm of the loss gradient at all their outputs, (T,).

    What few tokens read decides much of the loss: all others attend to the first of a window, whose keys and values count as much as theirs
    together. `E[w x x^T]` and `E[g g^T / w]`, which share the square of the norm, then say more than two moments that know nothing of each
    other.
    """
    return torch.stack(list(squares)).sum(0).sqrt().clamp_min(_LEAST_WEIGHT)
