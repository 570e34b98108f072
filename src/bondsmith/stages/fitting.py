"""Fit one matrix: from its weight, its plan and what it sees to the layer that replaces it."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from bondsmith.model.blocks import weight
from bondsmith.model.memory import fitting_memory
from bondsmith.model.source import ModelError
from bondsmith.nn.hybrid import HybridLinear
from bondsmith.nn.linear import MPOLinear
from bondsmith.nn.packed import PackedLinear
from bondsmith.recipe import Recipe
from bondsmith.stages.matrix_plan import MatrixPlan
from bondsmith.stages.rounding import hybrid_layer, round_cores, rounded_dense
from bondsmith.tensor.fit import sequential_svd, whitened_cut
from bondsmith.tensor.metric import relative_error
from bondsmith.tensor.mpo import MPO
from bondsmith.tensor.weighted import fit_mpo

log = logging.getLogger("bondsmith")
LEAST_DAMPING = 1e-3  # of what has to be as measured: predictions, and the errors that rounding compensates


@fitting_memory()
def fit_matrix(
    matrix: nn.Module,
    plan: MatrixPlan,
    C: Tensor | None,
    shift: Tensor | None,
    B: Tensor | None,
    recipe: Recipe,
    dtype: torch.dtype,
) -> tuple[nn.Module, float]:
    """Returns the layer that replaces `matrix`, with weights rounded to the saved dtype, and its relative error in the metric.

    Args:
        C: moment of the inputs that the layer will see, or None for the Frobenius metric.
        shift: what the weight should be more than it is, for what was lost before it, (O, I), or None.
        B: moment of the loss gradient at the output, or None.
    """
    W = weight(matrix)
    bias = getattr(matrix, "bias", None)
    try:
        target = W if shift is None else W + shift
        layer = _layer(target, bias, plan, C, B, recipe, dtype)
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"{plan.name}: {error}") from error
    layer.to(torch.float32).requires_grad_(False)
    if plan.sites is None and plan.grid is None:
        return layer, 0.0
    return layer, relative_error(W, matrix_of(layer), C, B)


def _layer(
    target: Tensor,
    bias: Tensor | None,
    plan: MatrixPlan,
    C: Tensor | None,
    B: Tensor | None,
    recipe: Recipe,
    dtype: torch.dtype,
) -> nn.Module:
    damping = recipe.damping if plan.grid is None else min(recipe.damping, LEAST_DAMPING)
    saved = None if bias is None else bias.to(dtype)
    if plan.sites is None and plan.grid is None:
        return dense_layer(target.to(dtype), saved)
    if plan.sites is None:
        return rounded_dense(target, plan, C, saved, recipe.rounding)
    if plan.base is not None:
        return hybrid_layer(target, plan, C, B, saved, damping, dtype)
    mpo = fit_network(target, plan, C, B, damping)
    layer = MPOLinear.from_mpo(mpo, bias=bias, gauge=plan.gauge, dtype=dtype)
    return layer if plan.grid is None else round_cores(layer, target, mpo, plan, C, B, damping, recipe.rounding)


def fit_network(W: Tensor, plan: MatrixPlan, C: Tensor | None, B: Tensor | None, damping: float) -> MPO:
    """Returns the network of a plan for `W`: the sequential SVD where there is no moment `C`, else the best fit in the metric."""
    assert plan.sites is not None
    if C is None:
        return sequential_svd(W, plan.sites, plan.bonds)
    if not plan.sites.is_matrix_cut:
        fit = fit_mpo(W, plan.sites, plan.bonds, input_moment=C, output_moment=B, damping=damping)
        log.info("%s: %s", plan.name, fit)
        return fit.mpo
    return whitened_cut(W, plan.bonds[0], input_moment=C, output_moment=B, damping=damping)


def matrix_of(layer: nn.Module) -> Tensor:
    """Returns the (O, I) matrix of a layer that `fit_matrix` gave."""
    if isinstance(layer, MPOLinear | PackedLinear | HybridLinear):
        return layer.to_matrix()
    return weight(layer)


def plain_form(layer: nn.Module) -> nn.Linear:
    """Returns the layer as one dense matrix, for passing many tokens."""
    if isinstance(layer, MPOLinear | PackedLinear | HybridLinear):
        return layer.materialise()
    assert isinstance(layer, nn.Linear)
    return layer


def dense_layer(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Returns an `nn.Linear` without gradients of a (O, I) weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False))
    return layer
