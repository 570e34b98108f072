"""Drop hidden channels of a block's MLP, as the plan says: the matrices that write them lose rows, the one that reads them is refitted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from bondsmith.model.blocks import shape, weight
from bondsmith.model.memory import fitting_memory
from bondsmith.model.skeleton import empty
from bondsmith.model.source import ModelError
from bondsmith.model.tracing import HiddenBond, find_hidden_bonds, trace_groups
from bondsmith.stages.fast_profile import channel_counts
from bondsmith.stages.fitting import dense_layer
from bondsmith.stages.job import Job
from bondsmith.stages.matrix_plan import MatrixPlan
from bondsmith.stages.moment_files import load_hidden_bonds, load_input_moments
from bondsmith.stages.plan import Plan
from bondsmith.tensor.channels import Channels, eliminate_channels
from bondsmith.tensor.metric import energy

_A_FEW = 64  # tokens on which channels are told apart


@dataclass(frozen=True, eq=False)
class Reduced:
    """What a reader has been reduced to: the channels it still reads, and the relative error of that in the metric."""

    kept: Tensor
    error: float


@torch.no_grad()
@fitting_memory()
def drop_channels(
    block: nn.Module,
    plans: Mapping[str, MatrixPlan],
    moments: Path,
    k: int,
    outputs: dict[str, Tensor],
    damping: float,
) -> dict[str, Reduced]:
    """Returns the readers of the hidden bonds that were cut, by name in the block; `block` and `outputs` are changed in place.

    Args:
        plans: of the block's matrices, by name in the block.
        moments: directory of what the windows that gave gradients showed.
        outputs: `B` of the block's matrices; of the writers only the rows that stay are left.

    Raises:
        ModelError: the plan drops rows or columns that belong to no hidden bond, or not the same number on both sides.
    """
    if not _smaller(plans):
        return {}
    cut = _cut_bonds(load_hidden_bonds(moments, k), plans)
    return {b.reader: _drop(block, b, plans[b.reader].columns, moments, k, outputs, damping) for b in cut}


def check_channels(job: Job) -> None:
    """Raises ModelError where the plan drops rows or columns that belong to no hidden bond, or not the same number on both sides.

    The blocks concerned are read, each runs a few times on one window.
    """
    for k in range(len(job.runner)):
        prefix = f"{job.runner.path}.{k}."
        plans = {m.name.removeprefix(prefix): m for m in job.plan.block(k)}
        if not _smaller(plans):
            continue
        block, ids = job.load(k), job.ids[:1, :_A_FEW].to(job.device)
        run = partial(job.runner.block, k, ids, job.runner.enter(ids))
        try:
            _cut_bonds(find_hidden_bonds(block, trace_groups(block, run), run), plans)
        finally:
            empty(block)


def _smaller(plans: Mapping[str, MatrixPlan]) -> set[str]:
    return {name for name, m in plans.items() if m.kept_rows is not None or m.kept_columns is not None}


def _cut_bonds(bonds: Iterable[HiddenBond], plans: Mapping[str, MatrixPlan]) -> list[HiddenBond]:
    """Returns the bonds that lose channels; ModelError unless all their matrices lose the same, and no other one loses any."""
    smaller, found = _smaller(plans), []
    for bond in bonds:
        own = {*bond.writers, bond.reader}
        if own & smaller:
            _check(bond, plans)
            found.append(bond)
            smaller -= own
    if smaller:
        name = plans[min(smaller)].name
        raise ModelError(
            f"{name}: the plan drops rows or columns here, but no MLP of the block has this matrix at its hidden bond"
        )
    return found


def fused_copies(plan: Plan, moments: Path, path: str) -> dict[str, int]:
    """Returns, by name, how many matrices are fused in the rows of those that lost hidden channels, where it is more than one."""
    smaller = {m.name: m for m in plan.matrices if m.kept_rows is not None}
    found: dict[str, int] = {}
    for k in {m.block for m in smaller.values()}:
        for bond in load_hidden_bonds(moments, k):
            own = [f"{path}.{k}.{name}" for name in bond.writers]
            found |= {n: smaller[n].out_features // bond.channels for n in own if n in smaller}
    return {name: copies for name, copies in found.items() if copies > 1}


def _check(bond: HiddenBond, plans: Mapping[str, MatrixPlan]) -> None:
    stay = plans[bond.reader].columns
    for name in bond.writers:
        copies = plans[name].out_features // bond.channels
        if plans[name].rows != copies * stay:
            raise ModelError(
                f"{plans[name].name}: the plan keeps {plans[name].rows} rows, but {plans[bond.reader].name} reads {stay} channels, "
                f"which are {copies * stay} rows here"
            )


def _drop(
    block: nn.Module,
    bond: HiddenBond,
    stay: int,
    moments: Path,
    k: int,
    outputs: dict[str, Tensor],
    damping: float,
) -> Reduced:
    reader = block.get_submodule(bond.reader)
    W, C, B = weight(reader), load_input_moments(moments, k)[bond.reader], outputs.get(bond.reader)
    counts = [n for n in channel_counts(bond.channels) if n > stay] + [stay]  # the steps that the profile took
    found: Channels = eliminate_channels(W, counts, input_moment=C, output_moment=B, damping=damping)[stay]
    for name in bond.writers:
        writer = block.get_submodule(name)
        rows = bond.rows(found.kept, shape(writer)[0])
        bias = getattr(writer, "bias", None)
        block.set_submodule(name, dense_layer(weight(writer)[rows], None if bias is None else bias[rows]))
        if name in outputs:
            outputs[name] = outputs[name][rows][:, rows]
    block.set_submodule(bond.reader, dense_layer(found.weight, getattr(reader, "bias", None)))
    return Reduced(found.kept, (found.error / max(energy(W, C, B), 1e-300)) ** 0.5)
