"""The hidden bond of an MLP: which of its channels to keep, and what the reading matrix must become.

Between the matrices that write an MLP's hidden activations and the one that reads them lies a bond of the whole block. The non-linearity
acts on each channel alone, so the bond's gauge is fixed to permutations: it is cut by choosing channels, and the reader is refitted so that
the channels that stay stand in for those that go.

Legend: `W` the `(O, I)` reader, `I` channels, `S` the kept ones, `C = E[x x^T]` `(I, I)`, `B = E[g g^T]` `(O, O)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bondsmith.tensor.checks import check_matrix, check_moment
from bondsmith.tensor.metric import DAMPING, Root, damped, quadratic, ridge_of

BLOCK = 16  # channels dropped per step; one at a time gains under a hundredth and takes ten times as long


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels that stay, ascending `(h,)` int64; the refitted reader `(O, h)`; and `error = tr(B D C D^T)` of dropping the rest.

    `gram` is `R^T W C W^T R` of the refitted reader, `R R^T = B`, in the damped moments of all channels, float64.
    """

    kept: Tensor
    weight: Tensor
    error: float
    gram: Tensor

    def spectrum(self) -> Tensor:
        """All `min(O, h)` singular values of `B^1/2 W C^1/2` of the refitted reader, descending, as of `cut_spectrum`."""
        return _spectrum(self.gram, len(self.kept))


@torch.no_grad()
def eliminate_channels(
    weight: Tensor,
    counts: Sequence[int],
    *,
    input_moment: Tensor,
    output_moment: Tensor | None = None,
    damping: float = DAMPING,
    block: int = BLOCK,
) -> dict[int, Channels]:
    """The channels to keep of a reader, for every number in `counts`: backward elimination, each step with all others refitted.

    Dropping channels `d` costs `tr(W_d (P_dd)^-1 W_d^T B)` with `P` the inverse moment of the channels still there (optimal brain surgery,
    Hassibi and Stork 1993); each step drops the `block` cheapest. The moment is damped. ValueError for counts that do not exist.

    >>> weight = torch.tensor([[1.0, 0.1, 2.0]])
    >>> found = eliminate_channels(weight, [2], input_moment=torch.eye(3), damping=1e-9)[2]
    >>> found.kept.tolist(), round(found.error, 4)
    ([0, 2], 0.01)
    """
    check_matrix(weight)
    channels = weight.shape[1]
    check_moment(input_moment, channels, "input moment")
    for number in counts:
        if not 1 <= number <= channels:
            raise ValueError(f"{number} of {channels} channels cannot be kept")
    state = _State.start(weight, damped(input_moment, damping), output_moment, damping)
    found: dict[int, Channels] = {}
    for number in sorted(set(counts), reverse=True):
        while state.left > number:
            state.drop(min(block, state.left - number))
        state.compact()
        found[number] = Channels(state.kept, state.weight.to(weight.dtype, copy=True), state.error, state.gram.clone())
    return found


@torch.no_grad()
def writer_spectra(
    weight: Tensor,
    rows: Sequence[Tensor],
    *,
    input_root: Root | None = None,
    output_moment: Tensor | None = None,
    damping: float = DAMPING,
) -> list[Tensor]:
    """What `cut_spectrum` gives of a writer that is left with some of its rows, for sets of rows each of which is inside the one before.

    The Gram matrix of the input side loses what a set is short of: a fraction of the multiply-adds of making it anew.

    >>> writer_spectra(torch.diag(torch.tensor([1.0, 2.0, 3.0])), [torch.tensor([0, 2]), torch.tensor([0])])
    [tensor([3., 1.], dtype=torch.float64), tensor([1.], dtype=torch.float64)]
    """
    check_matrix(weight)
    Y = weight.to(torch.float64)
    if input_root is not None:
        Y = Y @ input_root.root
    ridge = 0.0 if output_moment is None else ridge_of(output_moment, damping)
    gram, left, found = quadratic(Y.T, output_moment, damping), torch.arange(len(Y), device=Y.device), []
    for stay in rows:
        gone = left[~torch.isin(left, stay)]
        lost, half = Y[gone], Y[gone] / 2
        if output_moment is not None:
            B = output_moment[gone]
            half = B[:, left].to(torch.float64) @ Y[left] - B[:, gone].to(torch.float64) @ lost / 2 + ridge * half
        change = lost.T @ half
        gram -= change + change.T
        left = stay
        found.append(_spectrum(gram, len(stay)))
    return found


def _spectrum(gram: Tensor, others: int) -> Tensor:
    """Returns the singular values of a matrix by its Gram matrix; its other side has `others` rows."""
    squares: Tensor = torch.linalg.eigvalsh(gram).flip(0)[:others]
    return squares.clamp_min(0).sqrt()


def _factor(moment: Tensor, name: str) -> Tensor:
    """Returns the Cholesky factor of a damped moment; ValueError where it has none."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(moment)
    if int(failed):
        values = torch.linalg.eigvalsh(moment)
        raise ValueError(
            f"{name} is singular or indefinite: eigenvalues from {float(values[0]):.3g} to {float(values[-1]):.3g} with its damping"
        )
    return factor


@dataclass(eq=False)
class _State:
    """Where elimination stands: channels kept, the reader refitted to them, it seen through the root of `B`, the Gram matrix of that in
    the moment, and `P`, all float64.

    Channels that are `gone` keep their place until `compact`: to close up after every step would cost more than the step.
    """

    kept: Tensor
    weight: Tensor
    seen: Tensor
    gram: Tensor
    inverse: Tensor
    gone: Tensor
    left: int
    error: float

    @classmethod
    def start(cls, weight: Tensor, moment: Tensor, output_moment: Tensor | None, damping: float) -> _State:
        W = weight.to(torch.float64, copy=True)
        seen = W.clone()
        if output_moment is not None:
            check_moment(output_moment, W.shape[0], "output moment")
            seen = _factor(damped(output_moment, damping), "output moment").T @ W
        inverse = torch.cholesky_inverse(_factor(moment, "input moment"))
        kept = torch.arange(W.shape[1], device=W.device)
        gone = torch.zeros_like(kept, dtype=torch.bool)
        return cls(kept, W, seen, quadratic(seen, moment), inverse, gone, len(kept), 0.0)

    def drop(self, number: int) -> None:
        """Drops the `number` channels that cost least each, and refits the rest."""
        costs = (self.seen.square().sum(0) / self.inverse.diagonal()).masked_fill_(self.gone, torch.inf)
        out = torch.topk(costs, number, largest=False).indices
        rows = self.inverse[out]
        corner = torch.linalg.cholesky(rows[:, out])
        share = torch.cholesky_solve(rows, corner)  # (number, all): how the rest makes up for each
        lost = self.seen[:, out]
        dropped = lost @ torch.cholesky_solve(lost.T, corner)
        self.error += float(dropped.trace())
        self.gram -= dropped
        self.seen.addmm_(lost, share, alpha=-1)
        self.weight.addmm_(self.weight[:, out], share, alpha=-1)
        self.inverse.addmm_(rows.T, share, alpha=-1)
        self.gone[out] = True
        self.left -= number

    def compact(self) -> None:
        """Closes up what is left."""
        stay = ~self.gone
        self.kept, self.gone = self.kept[stay], self.gone[stay]
        self.seen, self.weight = self.seen[:, stay], self.weight[:, stay]
        self.inverse = self.inverse[stay][:, stay]
