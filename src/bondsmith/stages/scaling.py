"""Correct the scale of a fast profile by measured probes: one for the attention and one for the MLP of every block.

The prediction ranks matrices well, but is second order: what an error early in the model does to all that follows is more than that. One
matrix of each part is cut so that the prediction is a hundredth of a nat, the divergence is measured, and all matrices of the part are
scaled by what was measured over what was predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from bondsmith.stages.probe import Probe, ProbeResult
from bondsmith.stages.profile import MatrixProfile, Profile
from bondsmith.tensor.fit import whitened_cut

TARGET = 0.01  # nats a token that a probe is predicted to cost
_LEAST, _MOST = 0.2, 50.0  # factors outside say that something else is wrong


@dataclass(frozen=True)
class Part:
    """Matrices that are scaled alike, the one that is probed, its bond and the predicted loss there."""

    members: tuple[str, ...]
    probed: str
    bond: int
    predicted: float


def parts(profile: Profile) -> list[Part]:
    """Returns the parts of the model that get a probe each: per block the matrices of its MLP, and the others."""
    inside = {name for b in profile.bonds for name in (*b.writers, b.reader)}
    groups: dict[tuple[int, bool], list[MatrixProfile]] = {}
    for m in profile.matrices:
        groups.setdefault((m.block, m.name in inside), []).append(m)
    return [_part(members) for members in groups.values()]


def _part(members: Sequence[MatrixProfile]) -> Part:
    probed = max(
        members, key=lambda m: float(m.cut_losses()[len(m.spectrum) // 2])
    )  # the one that half a cut hurts most
    losses = probed.cut_losses()
    bond = max(1, int((losses > TARGET).sum()))
    bond = min(bond, len(losses) - 2)
    return Part(tuple(m.name for m in members), probed.name, bond, float(losses[bond]))


def probe_of(part: Part, moments: Callable[[str], tuple[Tensor, Tensor]], damping: float) -> Probe:
    """Returns the probe of a part; `moments` gives `C` and `B` of a matrix by name, when its turn comes."""

    def cut(W: Tensor) -> Tensor:
        C, B = moments(part.probed)
        return whitened_cut(W, part.bond, input_moment=C, output_moment=B, damping=damping).to_matrix()

    return Probe(part.probed, cut)


def scaled(profile: Profile, found: Sequence[Part], results: Sequence[ProbeResult]) -> Profile:
    """Returns the profile with every part scaled by its probe."""
    factors: dict[str, float] = {}
    for part, result in zip(found, results, strict=True):
        ratio = result.kl / part.predicted if part.predicted > 0 else 1.0
        factors |= dict.fromkeys(part.members, min(_MOST, max(_LEAST, ratio)))
    return profile.rescaled(factors)
