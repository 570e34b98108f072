"""Other forms of a layer: free for training, rounded in passing, a network beside a rounded matrix, and what of them is saved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bondsmith.nn.free import free, free_all, pivot_all, pivoted
from bondsmith.nn.hybrid import HybridLinear
from bondsmith.nn.linear import MPOLinear
from bondsmith.nn.packed import PackedEmbedding, PackedLinear, saved_state, stored_scales, train_scales
from bondsmith.nn.simulated import SimulatedLinear, simulate_rounding
from bondsmith.tensor import Sites
from bondsmith.tensor.rounding import Grid, round_to_nearest

CUT, THREE = Sites((24, 1), (1, 18)), Sites((4, 3, 2), (3, 2, 3))


def network(sites: Sites, bonds: tuple[int, ...], gauge: bool = True, bias: bool = True) -> MPOLinear:
    torch.manual_seed(0)
    return MPOLinear.from_mpo(
        MPOLinear(sites, bonds, bias=False).to_mpo(), bias=torch.randn(24) if bias else None, gauge=gauge
    )


def packed(rows: int, columns: int, grid: Grid, bias: bool = False) -> PackedLinear:
    torch.manual_seed(1)
    rounded = round_to_nearest(torch.randn(rows, columns), grid)
    return PackedLinear.from_rounded(rounded, torch.randn(rows) if bias else None)


@pytest.mark.parametrize(("sites", "bonds"), [(CUT, (7,)), (THREE, (5, 4))])
def test_the_free_form_is_the_same_layer_with_balanced_cores(sites: Sites, bonds: tuple[int, ...]) -> None:
    layer, x = network(sites, bonds), torch.randn(5, 18)
    block = nn.Sequential(layer, nn.Linear(24, 3))
    assert free_all(block) == ["0"]
    loose = block[0]
    assert isinstance(loose, MPOLinear)
    assert not loose.gauge
    assert loose.bias is layer.bias
    assert sum(p.numel() for p in loose.parameters()) > sum(p.numel() for p in layer.parameters())
    assert torch.allclose(loose(x), layer(x), atol=1e-5)
    if sites is CUT:
        left, right = (core.weight for core in loose.cores)
        assert torch.allclose(left.T @ left, right @ right.T, atol=1e-4), "not balanced"
    loose.bias.requires_grad_(False)
    pivot_all(block, ["0"])
    assert block[0].gauge
    assert not block[0].bias.requires_grad
    assert {n: t.shape for n, t in block[0].state_dict().items()} == {n: t.shape for n, t in layer.state_dict().items()}
    assert torch.allclose(block[0](x), layer(x), atol=1e-5)
    assert pivoted(free(layer), torch.bfloat16).cores[0].weight.dtype == torch.bfloat16


def test_a_matrix_of_zeros_is_freed_too() -> None:
    zeros = MPOLinear(THREE, (12, 6), bias=False)
    for core in zeros.cores:
        nn.init.zeros_(core.weight)
    loose = free(MPOLinear.from_mpo(zeros.to_mpo(), gauge=True))
    assert not loose.gauge
    assert torch.equal(loose.to_matrix(), torch.zeros(24, 18))


def test_what_has_no_free_form_stays() -> None:
    plain = network(CUT, (7,), gauge=False)
    assert free(plain) is plain
    rounded = network(CUT, (7,))
    rounded.cores[0] = packed(7, 18, Grid(8, 0))
    assert free(rounded) is rounded


@pytest.mark.parametrize("bias", [True, False])
def test_a_hybrid_is_the_sum_of_both(bias: bool) -> None:
    rounded, beside = packed(24, 18, Grid(3, 6), bias), network(CUT, (4,), bias=False)
    layer, x = HybridLinear(rounded, beside), torch.randn(3, 5, 18, requires_grad=True)
    assert (layer.in_features, layer.out_features) == (18, 24)
    expected = x @ (rounded.to_matrix() + beside.to_matrix()).T + (rounded.bias if bias else 0)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.allclose(gradient, layer.to_matrix().sum(0).expand_as(x), atol=1e-5)
    dense = layer.materialise()
    assert type(dense) is nn.Linear
    assert torch.allclose(dense(x), expected, atol=1e-5)
    assert layer.materialise(torch.bfloat16).weight.dtype == torch.bfloat16


def test_rounding_in_passing_lets_the_gradient_through() -> None:
    layer = network(CUT, (6,), gauge=False)
    kept = {n: t.clone() for n, t in layer.state_dict().items()}
    grid = Grid(2, 6)
    simulate_rounding(layer, grid)
    assert all(isinstance(core, SimulatedLinear) for core in layer.cores)
    assert layer.state_dict().keys() == kept.keys()
    left, right = (round_to_nearest(core.weight.detach(), grid).dequantize(torch.float32) for core in layer.cores)
    x = torch.randn(4, 18)
    assert torch.allclose(layer.cores[1](x), x @ right.T)
    assert torch.allclose(layer(x), x @ right.T @ left.T + layer.bias, atol=1e-4)
    layer.cores[1](x).sum().backward()
    assert torch.allclose(layer.cores[1].weight.grad, x.sum(0).expand(6, 18), atol=1e-5)
    assert all(torch.equal(t, kept[n]) for n, t in layer.state_dict().items())


@pytest.mark.parametrize("keeps", [True, False])
def test_a_weight_that_has_moved_is_rounded_anew(keeps: bool) -> None:
    layer, x = network(CUT, (6,), gauge=False), torch.randn(4, 18)
    simulate_rounding(layer, Grid(2, 6), keeps)
    core = layer.cores[1]
    for move in (
        lambda: None,
        lambda: core.weight.mul_(2),
        lambda: setattr(core, "weight", nn.Parameter(-core.weight)),
    ):
        with torch.no_grad():
            move()
        core._kept = core._kept if keeps else None
        rounded = round_to_nearest(core.weight.detach(), Grid(2, 6)).dequantize(torch.float32)
        assert torch.allclose(core(x), x @ rounded.T, atol=1e-5)


def test_scales_in_training_are_saved_as_the_format_has_them() -> None:
    model = nn.Sequential(packed(24, 18, Grid(4, 6, symmetric=False), bias=True), packed(18, 24, Grid(8, 0)))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    train_scales(model)
    assert {n for n, _ in model.named_parameters()} == {"0.scales", "0.centres", "0.bias", "1.scales"}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    for state in (stored_scales(model, model.state_dict()), saved_state(model, torch.float32)):
        assert {n: t.dtype for n, t in state.items()} == {n: t.dtype for n, t in before.items()}
        assert all(torch.equal(t, before[n]) for n, t in state.items())
    assert saved_state(model[1], torch.float16)["scales"].dtype == torch.bfloat16
    assert saved_state(model, torch.float16)["0.bias"].dtype == torch.float16
    train_scales(model, False)
    assert not any(n.endswith("scales") for n, _ in model.named_parameters())


def test_an_embedding_is_given_back() -> None:
    table = nn.Embedding(50, 16, padding_idx=3)
    small = PackedEmbedding(table, Grid(8, 16))
    small.put(round_to_nearest(table.weight.detach(), Grid(8, 16)))
    ids = torch.arange(50)
    seen = small(ids)
    again = small.materialise()
    assert type(again) is nn.Embedding
    assert again.padding_idx == 3
    assert again is not small.materialise()  # nobody keeps it
    assert torch.equal(again(ids), seen)
