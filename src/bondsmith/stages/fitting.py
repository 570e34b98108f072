"""Fit one matrix: from its weight, its plan and what it sees to the layer that replaces it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bondsmith.model.blocks import weight
from bondsmith.model.source import ModelError
from bondsmith.nn.linear import MPOLinear
from bondsmith.recipe import Recipe
from bondsmith.stages.plan import MatrixPlan
from bondsmith.tensor.fit import propagated_target, sequential_svd, shifted_target, whitened_cut
from bondsmith.tensor.metric import relative_error
from bondsmith.tensor.mpo import MPO
from bondsmith.tensor.weighted import fit_mpo


@dataclass(frozen=True, eq=False)
class Difference:
    """How far what a layer reads is from the original's: `E[(x - xh) xh^T]`, or of its outputs, `E[(y - W xh) xh^T]`, if `moved`."""

    moment: Tensor
    moved: bool = False


def fit_matrix(
    matrix: nn.Module,
    plan: MatrixPlan,
    C: Tensor | None,
    D: Difference | None,
    B: Tensor | None,
    recipe: Recipe,
    dtype: torch.dtype,
) -> tuple[nn.Module, float]:
    """Returns the layer that replaces `matrix`, with weights rounded to the saved dtype, and its relative error in the metric.

    Args:
        C: moment of the inputs that the layer will see, or None for the Frobenius metric.
        D: how far those are from the original's, or None.
        B: moment of the loss gradient at the output, or None.
    """
    W = weight(matrix)
    bias = getattr(matrix, "bias", None)
    try:
        target = W
        if C is not None and D is not None:
            shift = shifted_target if D.moved else propagated_target
            target = shift(W, D.moment, C, 1.0 if D.moved else recipe.propagation_strength, recipe.damping)
        if plan.sites is None:
            return _dense(target, bias, dtype), 0.0
        mpo = fit_network(target, plan, C, B, recipe.damping)
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"{plan.name}: {error}") from error
    layer = MPOLinear.from_mpo(mpo, bias=bias, gauge=plan.gauge, dtype=dtype)
    layer.to(torch.float32).requires_grad_(False)
    return layer, relative_error(W, layer.to_matrix(), C, B)


def fit_network(W: Tensor, plan: MatrixPlan, C: Tensor | None, B: Tensor | None, damping: float) -> MPO:
    """Returns the network of a plan for `W`: the sequential SVD where there is no moment `C`, else the best fit in the metric."""
    assert plan.sites is not None
    if C is None:
        return sequential_svd(W, plan.sites, plan.bonds)
    if not plan.sites.is_matrix_cut:
        return fit_mpo(W, plan.sites, plan.bonds, input_moment=C, output_moment=B, damping=damping).mpo
    return whitened_cut(W, plan.bonds[0], input_moment=C, output_moment=B, damping=damping)


def plain_form(layer: nn.Module) -> nn.Linear:
    """Returns the layer as one dense matrix, for passing many tokens."""
    if isinstance(layer, MPOLinear):
        return layer.materialise()
    assert isinstance(layer, nn.Linear)
    return layer


def dense_layer(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Returns an `nn.Linear` without gradients of a (O, I) weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False))
    return layer


def _dense(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    return dense_layer(weight.to(dtype).to(torch.float32), None if bias is None else bias.to(dtype).to(torch.float32))
