"""Round what a plan rounds: dense matrices, the cores of networks, embedding and head, each in the metric of what it is used for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from bondsmith.model.skeleton import fill
from bondsmith.model.source import ModelError
from bondsmith.nn.hybrid import HybridLinear
from bondsmith.nn.linear import MPOLinear
from bondsmith.nn.packed import PackedEmbedding, PackedLinear
from bondsmith.stages.matrix_plan import MatrixPlan
from bondsmith.stages.moment_files import table_moment
from bondsmith.stages.plan import Plan
from bondsmith.tensor.gptq import gptq
from bondsmith.tensor.hybrid import fit_hybrid
from bondsmith.tensor.mpo import MPO
from bondsmith.tensor.rounded import RoundedNetwork, round_network
from bondsmith.tensor.rounding import Grid, Rounded, round_to_nearest

_ROWS = 4096  # of an embedding, compared at a time


def rounded_dense(
    target: Tensor, plan: MatrixPlan, C: Tensor | None, bias: Tensor | None, rounding: str = "compensated"
) -> PackedLinear:
    """Returns the packed layer of a matrix that stays dense; `rounding` as in a recipe."""
    assert plan.grid is not None
    return PackedLinear.from_rounded(_round(target, plan.grid, C, rounding), bias)


def _round(weight: Tensor, grid: Grid, C: Tensor | None, rounding: str) -> Rounded:
    if C is None or rounding != "compensated":
        return round_to_nearest(weight, grid, search=rounding != "nearest")
    return gptq(weight, grid, C)


def hybrid_layer(
    target: Tensor,
    plan: MatrixPlan,
    C: Tensor | None,
    B: Tensor | None,
    bias: Tensor | None,
    damping: float,
    dtype: torch.dtype,
) -> HybridLinear:
    """Returns the layer of a matrix rounded to `plan.base` and a matrix cut of what that gets wrong."""
    assert plan.base is not None
    hybrid = fit_hybrid(target, plan.base, plan.bonds[0], plan.grid, input_moment=C, output_moment=B, damping=damping)
    network = MPOLinear.from_mpo(hybrid.cut, dtype=dtype)
    if hybrid.network is not None:
        _put_cores(network, hybrid.network)
    return HybridLinear(PackedLinear.from_rounded(hybrid.rounded, bias), network)


def _put_cores(layer: MPOLinear, network: RoundedNetwork) -> None:
    for k, rounded in enumerate(network.weights):
        if rounded is not None:
            layer.cores[k] = PackedLinear.from_rounded(rounded)


def round_cores(
    layer: MPOLinear,
    target: Tensor,
    mpo: MPO,
    plan: MatrixPlan,
    C: Tensor | None,
    B: Tensor | None,
    damping: float,
    rounding: str = "compensated",
) -> MPOLinear:
    """Puts packed cores into the layer of a network `mpo` that stands for `target`; returns the layer."""
    assert plan.grid is not None
    if rounding != "compensated":
        for k, core in enumerate(layer.cores):
            numbers = core.weight
            assert isinstance(numbers, Tensor)
            if numbers.numel():
                rounded = _round(numbers.detach().to(torch.float32), plan.grid, None, rounding)
                layer.cores[k] = PackedLinear.from_rounded(rounded)
        return layer
    network = round_network(target, mpo, plan.grid, input_moment=C, output_moment=B, gauge=plan.gauge, damping=damping)
    layer.pivots = None if network.pivots is None else network.pivots.to(torch.int32)
    _put_cores(layer, network)
    return layer


def rounded_tables(
    plan: Plan, tensors: dict[str, Tensor], moments: Path | None, names: Sequence[str], rounding: str = "compensated"
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Takes the weights of embedding and head that a plan rounds out of `tensors`.

    Returns what a weight file holds of them instead, and the relative error of each, by name.

    Args:
        names: of embedding and head, of one where they are tied.
        moments: directory of the gradients stage: what the head reads, and the loss gradient at the embedding's output.
    """
    found: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    for table in plan.tables:
        if table.grid is not None:
            weight = tensors.pop(f"{table.name}.weight")
            roles = {"embeds": table.name == names[0], "predicts": table.name == names[-1]}
            rounded = round_table(weight, table, moments, **roles, rounding=rounding)
            found |= {f"{table.name}.{leaf}": t for leaf, t in rounded.tensors().items()}
            errors[table.name] = _relative_error(weight, rounded)
    return found, errors


def _relative_error(weight: Tensor, rounded: Rounded) -> float:
    """Returns that of the entries, some rows at a time: a vocabulary is long."""
    lost = whole = 0.0
    for first in range(0, len(weight), _ROWS):
        rows = slice(first, first + _ROWS)
        centres = None if rounded.centres is None else rounded.centres[rows]
        part = Rounded(rounded.grid, rounded.codes[rows], rounded.scales[rows], centres)
        lost += float((weight[rows].float() - part.dequantize()).square().sum())
        whole += float(weight[rows].float().square().sum())
    return (lost / whole) ** 0.5 if whole else 0.0


def round_table(
    weight: Tensor,
    table: MatrixPlan,
    moments: Path | None,
    *,
    embeds: bool,
    predicts: bool,
    rounding: str = "compensated",
) -> Rounded:
    """Returns an embedding or head, (vocabulary, width), rounded; a tied one is both."""
    assert table.grid is not None
    metric = table_moment(moments, embeds, predicts) if moments is not None else None
    try:
        return _round(weight, table.grid, metric, rounding)
    except ValueError as error:
        raise ModelError(f"{table.name}: {error}") from error


@contextmanager
def rounded_embedding(model: PreTrainedModel, plan: Plan, shard: Path, device: torch.device) -> Iterator[None]:
    """The embedding as it was saved in `shard` stands in the model meanwhile, where it is rounded: later blocks see its error."""
    plain = model.get_input_embeddings()
    name = next(n for n, m in model.named_modules() if m is plain)
    table = next((t for t in plan.tables if t.name == name and t.grid is not None), None)
    if table is None:
        yield
        return
    assert table.grid is not None
    packed = PackedEmbedding(plain, table.grid, dtype=torch.float32)
    stored = load_file(shard)
    fill(packed, {leaf: stored[f"{name}.{leaf}"] for leaf in packed.state_dict()}, device)
    try:
        model.set_submodule(name, packed)
        yield
    finally:
        model.set_submodule(name, plain)
