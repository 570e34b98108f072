"""Make the fast profile of a model, block by block, from the moments of its matrices.

For the best matrix cut the whole curve of the predicted loss is one eigenvalue problem; for the channels of an MLP one elimination; for
rounding a sum over the groups that share a scale. See `profile.py` for what the numbers mean.

Legend: `O, I` out and in features, `W` the weight, `C` and `B` the moments of inputs and of loss gradients at outputs, `S` kept channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bondsmith.model.memory import fitting_memory
from bondsmith.model.tracing import HiddenBond
from bondsmith.recipe import GROUPS
from bondsmith.stages.moment_files import TableMoments
from bondsmith.stages.profile import BondProfile, MatrixProfile, Reduced, TableProfile
from bondsmith.tensor.channels import eliminate_channels, writer_spectra
from bondsmith.tensor.fit import cut_spectrum
from bondsmith.tensor.metric import Root, damped, moment_root

_GROUPS = (0, *GROUPS)  # 0 is a whole row


@dataclass(frozen=True, eq=False)
class Seen:
    """What the matrices of a block see, by full name: `C`, `B`, the bonds whose channels may be dropped, and what hybrids leave."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    bonds: Sequence[HiddenBond] = ()
    left: Mapping[str, Tensor] = field(default_factory=dict)


def fast_profile(
    shapes: Mapping[str, tuple[int, int, int]],
    weight: Callable[[str], Tensor],
    seen: Callable[[int], Seen],
    *,
    metric: str,
    damping: float,
    advance: Callable[[float], None] = lambda share: None,
) -> tuple[tuple[MatrixProfile, ...], tuple[BondProfile, ...]]:
    """Returns the curves of all matrices, in nats a token in the loss metric and as relative squared errors in others, and of the bonds.

    Args:
        shapes: matrix name -> (block, out features, in features), in depth order.
        weight: gives the (O, I) weight of a name.
        seen: gives what the matrices of a block see; one without `B` has the identity there, one without either is profiled by its
            weight alone.
    """
    found: list[MatrixProfile] = []
    bonds: list[BondProfile] = []
    for block in dict.fromkeys(own for own, _, _ in shapes.values()):
        names = [name for name, (own, _, _) in shapes.items() if own == block]
        profiler = _Profiler(block, seen(block), weight, damping, metric != "loss")
        found += [profiler.matrix(name, weight(name)) for name in names]
        bonds += [profiler.bond(bond) for bond in profiler.seen.bonds]
        advance(len(found) / len(shapes))
    return tuple(found), tuple(bonds)


@dataclass(eq=False)
class _Profiler:
    """Profiles the matrices of one block; keeps the root of every `C` that several share."""

    block: int
    seen: Seen
    weight: Callable[[str], Tensor]
    damping: float
    relative: bool
    roots: dict[int, tuple[Root, Tensor]] = field(default_factory=dict)
    units: dict[str, float] = field(default_factory=dict)

    def matrix(self, name: str, W: Tensor) -> MatrixProfile:
        """Returns the curves of a whole matrix."""
        found = self.curves(name, W, self.seen.inputs.get(name), self.seen.outputs.get(name))
        self.units[name] = 1 / max(float(found.cut_losses()[0]), 1e-300) if self.relative else 1.0
        return replace(found, unit=self.units[name])

    @fitting_memory()
    def curves(self, name: str, W: Tensor, C: Tensor | None, B: Tensor | None) -> MatrixProfile:
        """Returns the curves of a matrix that sees these moments."""
        variances = None
        try:
            if C is None:
                spectrum = cut_spectrum(W, output_moment=B, damping=self.damping)
            elif W.shape[0] <= W.shape[1] and id(C) not in self.roots:
                spectrum = cut_spectrum(W, input_moment=C, output_moment=B, damping=self.damping)
                variances = conditional_variances(damped(C, self.damping))
            else:
                root, variances = self.root(C)
                spectrum = cut_spectrum(W, input_root=root, output_moment=B, damping=self.damping)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return self.profile(name, W, spectrum, variances, None if B is None else B.diagonal())

    def profile(
        self, name: str, W: Tensor, spectrum: Tensor, variances: Tensor | None, weights: Tensor | None
    ) -> MatrixProfile:
        """Returns the curves of a matrix of this spectrum; `variances` of inputs and `weights` of outputs say what rounding costs."""
        rounding = {g: rounding_unit(W, variances, weights, g) for g in _GROUPS}
        left = tuple(self.seen.left[name].tolist()) if name in self.seen.left else ()
        rows, columns = W.shape
        return MatrixProfile(name, self.block, rows, columns, spectrum, self.units.get(name, 1.0), rounding, left)

    def root(self, C: Tensor) -> tuple[Root, Tensor]:
        """Returns a root of the damped moment `C`, and its conditional variances."""
        if id(C) in self.roots:
            return self.roots[id(C)]
        found = moment_root(C, self.damping), conditional_variances(damped(C, self.damping))
        if any(C is kept for kept in self.seen.inputs.values()):  # others die, and their id with them
            self.roots[id(C)] = found
        return found

    @fitting_memory()
    def bond(self, bond: HiddenBond) -> BondProfile:
        """Returns the sizes that a hidden bond may be reduced to, with the curves of what is left of its matrices."""
        C, B = self.seen.inputs[bond.reader], self.seen.outputs.get(bond.reader)
        counts = [n for n in channel_counts(bond.channels) if n < bond.channels]
        found = eliminate_channels(
            self.weight(bond.reader), counts, input_moment=C, output_moment=B, damping=self.damping
        )
        kept = sorted(found.items(), reverse=True)
        writers = {name: self.writer(name, bond, [channels.kept for _, channels in kept]) for name in bond.writers}
        levels = []
        for level, (number, channels) in enumerate(kept):
            S = channels.kept
            variances = conditional_variances(damped(C[S][:, S], self.damping))
            weights = None if B is None else B.diagonal()
            reader = self.profile(bond.reader, channels.weight, channels.spectrum(), variances, weights)
            curves = (*(writers[name][level] for name in bond.writers), reader)
            levels.append(Reduced(number, self.units[bond.reader] * channels.error / 2, curves))
        return BondProfile(bond.writers, bond.reader, bond.channels, tuple(levels))

    def writer(self, name: str, bond: HiddenBond, kept: Sequence[Tensor]) -> list[MatrixProfile]:
        """Returns the curves of a writer of a bond for every set of channels, each inside the one before."""
        W, C, B = self.weight(name), self.seen.inputs.get(name), self.seen.outputs.get(name)
        root, variances = (None, None) if C is None else self.root(C)
        rows = [bond.rows(S, len(W)) for S in kept]
        spectra = writer_spectra(W, rows, input_root=root, output_moment=B, damping=self.damping)
        weights = None if B is None else B.diagonal()
        return [
            self.profile(name, W[own], spectrum, variances, None if weights is None else weights[own])
            for own, spectrum in zip(rows, spectra, strict=True)
        ]


def channel_counts(channels: int) -> list[int]:
    """Returns the numbers of channels worth trying, largest first: tenths from all to three, in multiples of 16 where that is fine enough.

    >>> channel_counts(1536), channel_counts(64)
    ([1536, 1376, 1216, 1072, 912, 768, 608, 448], [64, 57, 51, 44, 38, 32, 25, 19])
    """
    step = 16 if channels >= 512 else 1
    tenths = [channels * tenth // 10 // step * step for tenth in range(9, 2, -1)]
    return [channels, *(n for n in dict.fromkeys(tenths) if 0 < n < channels)]


def conditional_variances(moment: Tensor) -> Tensor:
    """Returns, per input, the part of its second moment that the inputs after it do not explain, (I,).

    Error-compensated rounding lets later weights absorb the error of earlier ones; what is left of a step's variance is this.

    >>> conditional_variances(torch.tensor([[2.0, 1.0], [1.0, 1.0]]))
    tensor([1., 1.], dtype=torch.float64)
    """
    factor = torch.linalg.cholesky(moment.to(torch.float64).flip(0).flip(1))
    return factor.diagonal().square().flip(0)


def rounding_unit(W: Tensor, inputs: Tensor | None, outputs: Tensor | None, group: int) -> float:
    """Returns `1/2 sum_oi B_oo r_oi^2 v_i / 12`: the predicted loss of rounding `W`, times the squared steps in a group's range.

    Args:
        inputs: `v`, variance of every input that counts, (I,), or None for one.
        outputs: diagonal of `B`, (O,), or None for one.
        group: columns that share a range `r`; 0 is the whole row.
    """
    rows, columns = W.shape
    pieces = W.split(group or columns, 1)
    ranges = torch.stack([p.amax(1) - p.amin(1) for p in pieces], 1).to(torch.float64).square()
    v = torch.ones(columns, dtype=torch.float64, device=W.device) if inputs is None else inputs.to(torch.float64)
    sums = torch.stack([piece.sum() for piece in v.split(group or columns)])
    b = torch.ones(rows, dtype=torch.float64, device=W.device) if outputs is None else outputs.to(torch.float64)
    return float(0.5 * (b @ (ranges @ sums)) / 12)


def table_profile(name: str, W: Tensor, seen: TableMoments | None, *, embeds: bool, predicts: bool) -> TableProfile:
    """Returns what rounding an embedding, a head, or the one matrix that is both (V, width) would cost.

    In nats a token where it is known what they see; otherwise as a relative squared error, as of matrices in the other metrics.
    """
    if seen is None:
        whole = float(W.to(torch.float64).square().sum()) / 2
        return TableProfile(name, W.shape[0], W.shape[1], {g: rounding_unit(W, None, None, g) / whole for g in _GROUPS})
    rounding = dict.fromkeys(_GROUPS, 0.0)
    for group in _GROUPS:
        if predicts:
            left = conditional_variances(damped(seen.head_input, 1e-3))
            rounding[group] += rounding_unit(W, left, seen.head_weight, group)
        if embeds:
            rounding[group] += rounding_unit(W, seen.embedding_gradient.diagonal(), seen.embedding_weight, group)
    return TableProfile(name, W.shape[0], W.shape[1], rounding)
