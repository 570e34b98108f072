import pytest
import torch
from torch import nn

from bondsmith.nn import ExactLinear, MPOLinear
from bondsmith.tensor import exact_cut

SIDES = ["columns", "rows"]


def layer_of(side, gauge=True, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    W = torch.randn(20, 28)
    C = torch.diag(
        torch.linspace(0.1, 5, 28 if side == "columns" else 20)[torch.randperm(28 if side == "columns" else 20)]
    )
    moments = {"input_moment": C} if side == "columns" else {"output_moment": C}
    cut = exact_cut(W, 6, 5, side=side, **moments)
    return ExactLinear.from_cut(cut, bias=torch.randn(20) if bias else None, gauge=gauge, dtype=dtype), cut


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("gauge", [True, False])
def test_forward_is_the_matrix(side, gauge):
    layer, cut = layer_of(side, gauge)
    torch.testing.assert_close(layer.to_matrix(), cut.to_matrix(), atol=1e-5, rtol=1e-4)
    x = torch.randn(2, 3, 28)
    expected = nn.functional.linear(x, cut.to_matrix(), layer.bias)
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.materialise()(x), expected, atol=1e-4, rtol=1e-4)
    stored = sum(p.numel() for name, p in layer.named_parameters() if name != "bias")
    assert not gauge or stored == cut.parameters
    assert isinstance(layer.network, MPOLinear)
    assert f"6 exact {side}" in repr(layer)


@pytest.mark.parametrize("side", SIDES)
def test_gradients_are_exact(side):
    layer, _ = layer_of(side, dtype=torch.float64)
    x = torch.randn(4, 28, dtype=torch.float64)
    found = []
    for way in (
        lambda inputs: layer(inputs),
        lambda inputs: nn.functional.linear(inputs, layer.to_matrix(), layer.bias),
    ):
        inputs = x.clone().requires_grad_()
        found.append(torch.autograd.grad(way(inputs).square().sum(), (inputs, *layer.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("side", SIDES)
def test_state_dict_round_trip_through_meta_and_bfloat16(side):
    layer, cut = layer_of(side)
    mpo = cut.mpo
    empty = ExactLinear(6, mpo.sites, mpo.bonds, side=side, bias=True, device="meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, 28)
    assert torch.equal(empty(x), layer(x))
    assert layer.to(torch.bfloat16).order.dtype == torch.int32
    y = layer(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert (y - empty(x)).norm() < 0.03 * empty(x).norm()


@pytest.mark.parametrize("side", SIDES)
def test_compile_and_fresh_layers(side):
    torch.compiler.reset()
    layer, cut = layer_of(side, bias=False)
    x = torch.randn(3, 28)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
    fresh = ExactLinear(6, cut.mpo.sites, cut.mpo.bonds, side=side, bias=False)
    assert fresh.bias is None
    assert torch.isfinite(fresh(x)).all()
