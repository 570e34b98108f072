import copy
import math

import peft
import pytest
import torch
from torch import nn

from bondsmith.nn import MPOLinear
from bondsmith.nn import linear as linear_module
from bondsmith.nn.free import free
from bondsmith.tensor import MPO, Sites, algebra, parse_sites, sequential_svd

CASES = [
    ("matrix", False),
    ("matrix", True),
    ("thin:2", False),
    ("thin:2", True),
    ("interleaved:2", False),
    ("interleaved:3", False),
    ("interleaved:3", True),
]


def layer_of(spec, gauge, bias=True, out_features=48, in_features=36, bonds=7, dtype=torch.float32):
    torch.manual_seed(0)
    sites = parse_sites(spec, out_features, in_features)
    mpo = sequential_svd(torch.randn(out_features, in_features), sites, bonds)
    return MPOLinear.from_mpo(mpo, bias=torch.randn(out_features) if bias else None, gauge=gauge, dtype=dtype), mpo


def both_ways(layer):
    """The layer as it contracts and as it builds its matrix."""
    contracting, building = copy.deepcopy(layer), copy.deepcopy(layer)
    contracting._gather_below = contracting._materialise_from = 2**62
    building._gather_below = building._materialise_from = 0
    return contracting, building


@pytest.mark.parametrize(("spec", "gauge"), CASES)
def test_forward_is_the_matrix_both_ways(spec, gauge):
    layer, mpo = layer_of(spec, gauge)
    torch.testing.assert_close(layer.to_matrix(), mpo.to_matrix(), atol=1e-5, rtol=1e-4)
    x = torch.randn(2, 5, 36)
    expected = nn.functional.linear(x, mpo.to_matrix(), layer.bias)
    for way in (layer, *both_ways(layer), layer.materialise()):
        torch.testing.assert_close(way(x), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer(x[0, 0]), expected[0, 0], atol=1e-4, rtol=1e-4)
    assert layer(x[:0]).shape == (0, 5, 48)


@pytest.mark.parametrize(("spec", "gauge"), CASES)
def test_gradients_are_exact_both_ways(spec, gauge):
    layer, _ = layer_of(spec, gauge, dtype=torch.float64)
    x = torch.randn(2, 3, 36, dtype=torch.float64)
    grads = []
    for way in both_ways(layer):
        inputs = x.clone().requires_grad_()
        way(inputs).square().sum().backward()
        grads.append([inputs.grad, *(p.grad for p in way.parameters())])
        assert all(grad is not None and grad.abs().sum() > 0 for grad in grads[-1])
    for contracted, built in zip(*grads, strict=True):
        torch.testing.assert_close(contracted, built)
    parameters = tuple(p.detach().requires_grad_() for p in layer.parameters())
    names = [name for name, _ in layer.named_parameters()]

    def call(inputs, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (inputs,))

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *parameters), fast_mode=True)


def kept_for_backward(layer, x):
    """Bytes that autograd holds for the backward pass besides parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in layer.state_dict().values()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    y.sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize(("spec", "gauge"), CASES)
def test_training_keeps_the_input_and_at_most_one_intermediate(spec, gauge):
    layer, _ = layer_of(spec, gauge, bias=False)
    x = torch.randn(200, 36, requires_grad=True)
    between = (
        200 * 7 * layer.sites.out_legs[1] * layer.sites.in_legs[0] * 4
    )  # what passes from the last site to the first
    built = 4 * sum(math.prod(shape) for shape in layer.sites.core_shapes(layer.bonds)[:-1]) if gauge else 0
    for way in both_ways(layer):
        chain = layer.sites.n > 2 or (spec != "matrix" and way._materialise_from == 0)
        allowed = x.untyped_storage().nbytes() + (0 if chain else between + built)
        assert kept_for_backward(way, x) <= allowed


def test_gauge_stores_fewer_numbers():
    for spec in ("matrix", "thin:2", "interleaved:3"):
        layer, mpo = layer_of(spec, True, bias=False)
        stored = sum(p.numel() for p in layer.parameters())
        assert stored == mpo.sites.parameters(mpo.bonds, gauge=True) == mpo.parameters - sum(b**2 for b in mpo.bonds)
    assert layer.pivots.dtype == torch.int32
    assert layer.to(torch.bfloat16).pivots.dtype == torch.int32


def test_full_bond_with_gauge_is_a_permuted_matrix():
    layer, mpo = layer_of("matrix", True, out_features=12, in_features=36, bonds=12)
    assert layer.cores[0].weight.shape == (0, 12)
    torch.testing.assert_close(layer(torch.eye(36)).T - layer.bias[:, None], mpo.to_matrix(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("spec", "gauge"), CASES)
def test_state_dict_round_trip_through_meta(spec, gauge):
    layer, _ = layer_of(spec, gauge)
    empty = MPOLinear(layer.sites, layer.bonds, bias=True, gauge=gauge, device="meta")
    assert all(value.is_meta for value in empty.state_dict().values())
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, 36)
    assert torch.equal(empty(x), layer(x))
    fresh = MPOLinear(layer.sites, layer.bonds, bias=True, gauge=gauge)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))


@pytest.mark.parametrize(("spec", "gauge"), CASES)
def test_fresh_layers_start_like_linear(spec, gauge):
    torch.manual_seed(0)
    layer = MPOLinear(parse_sites(spec, 512, 432), 16, bias=True, gauge=gauge)
    linear = nn.Linear(432, 512)
    assert layer.to_matrix().std().item() == pytest.approx(linear.weight.std().item(), rel=0.3)
    assert not layer.bias.any()


@pytest.mark.parametrize(("spec", "gauge"), CASES)
def test_lora_on_the_cores_counts_both_ways(spec, gauge):
    layer, _ = layer_of(spec, gauge)
    holder = nn.Sequential(layer)
    config = peft.LoraConfig(r=2, target_modules=r".*cores\.\d+", init_lora_weights=False)
    model = peft.get_peft_model(holder, config).eval()
    x = torch.randn(40, 36)
    adapted = model(x)
    with model.disable_adapter():
        base = model(x)
    assert (adapted - base).abs().max() > 0.1
    inner = model.base_model.model[0]
    torch.testing.assert_close(nn.functional.linear(x, inner.to_matrix(), inner.bias), adapted, atol=1e-4, rtol=1e-4)
    for way in both_ways(inner):
        torch.testing.assert_close(way(x), adapted, atol=1e-4, rtol=1e-4)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), adapted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("spec", "gauge"), CASES)
def test_hooks_on_the_cores_fire_both_ways(spec, gauge):
    layer, _ = layer_of(spec, gauge)
    for way in both_ways(layer):
        seen = []
        for core in way.cores:
            core.register_forward_hook(lambda module, *_, seen=seen: seen.append(module))
        way(torch.randn(4, 36))
        assert set(seen) == set(way.cores)


@pytest.mark.parametrize(("spec", "gauge"), CASES)
def test_bfloat16_and_autocast(spec, gauge):
    layer, _ = layer_of(spec, gauge)
    x = torch.randn(3, 36)
    for way in both_ways(layer):
        expected = way(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = way(x)
        assert (y - expected).norm() < 0.03 * expected.norm()
        y = copy.deepcopy(way).to(torch.bfloat16)(x.to(torch.bfloat16))
        assert y.dtype == torch.bfloat16
        assert (y - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(("spec", "gauge"), [("matrix", True), ("thin:2", True), ("interleaved:3", False)])
def test_compile_with_gradients_and_autocast(spec, gauge):
    for way in both_ways(layer_of(spec, gauge)[0]):
        x = torch.randn(3, 36, requires_grad=True)
        torch.compiler.reset()  # every layer counts against one limit of recompilations
        compiled = torch.compile(way, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), way(x))
        found = []
        for call in (compiled, way):
            with torch.autocast("cpu", torch.bfloat16):
                y = call(x)
            assert y.dtype == torch.bfloat16
            found.append(torch.autograd.grad(y.float().square().sum(), (x, *way.parameters())))
        for one, other in zip(*found, strict=True):
            assert (one - other).norm() <= 0.03 * other.norm()


def test_costs_choose_the_way():
    shallow, deep = (MPOLinear(parse_sites("interleaved:2", 256, 256), bond, bias=False) for bond in (2, 64))
    assert shallow._materialise_from > 2**50
    threshold = deep._materialise_from // 256
    sites, bonds = deep.sites, deep.bonds
    contract, dense = sites.sweep_cost(bonds, True), 256 * 256
    assert contract * threshold >= sites.materialise_cost(bonds) + dense * threshold
    assert contract * (threshold - 1) < sites.materialise_cost(bonds) + dense * (threshold - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_bonds_gather_their_outputs_however_many_tokens(dtype):
    layer, mpo = layer_of("matrix", True, out_features=96, in_features=120, bonds=80, dtype=dtype)
    assert layer._gathers_on_cpu
    assert not layer_of("matrix", True, out_features=96, in_features=120, bonds=60)[0]._gathers_on_cpu
    x = torch.randn(3, 100, 120).to(dtype)
    expected = nn.functional.linear(x.float(), mpo.to_matrix(), layer.bias.float())
    tolerance = {"atol": 1e-3, "rtol": 1e-3} if dtype == torch.float32 else {"atol": 1.0, "rtol": 0.1}
    with torch.no_grad():
        in_place = layer(x)
    assert in_place.shape == (3, 100, 96)
    torch.testing.assert_close(in_place.float(), expected, **tolerance)
    torch.testing.assert_close(layer(x).float(), expected, **tolerance)
    layer._gathers_on_cpu = False
    torch.testing.assert_close(layer(x).float(), expected, **tolerance)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer._gathers_on_cpu = True
        assert layer(x).dtype == torch.bfloat16
        assert layer(torch.randn(0, 120).to(dtype)).shape == (0, 96)


def test_description_and_errors():
    layer, _ = layer_of("matrix", True)
    assert "48x36 as (48,1)(1,36), bonds (7,), gauge, bias=True" in repr(layer)
    with pytest.raises(ValueError, match=r"bond 16 of \(1, 16\) has only 4 rows"):
        MPOLinear(Sites((2, 2, 4), (2, 2, 4)), (1, 16), bias=False, gauge=True)
    with pytest.raises(ValueError, match=r"at least 1"):
        MPOLinear(parse_sites("matrix", 8, 8), 0, bias=False)


def test_from_mpo_takes_no_random_numbers_and_shares_no_memory():
    mpo = MPO((torch.randn(1, 4, 1, 2), torch.randn(2, 1, 4, 1)))
    before = torch.get_rng_state()
    layer = MPOLinear.from_mpo(mpo)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        layer.cores[0].weight.zero_()
    assert mpo.cores[0].abs().sum() > 0
    assert layer.sites == Sites((4, 1), (1, 4))
    assert linear_module.GATHER_UP_TO >= 1


@pytest.mark.parametrize("gauge", [False, True])
def test_a_cut_of_large_bond_is_materialised_where_that_costs_less(gauge, monkeypatch):
    """14 (16 + 16) multiply-adds a token are more than 16 x 16: from 18 tokens on one product with the matrix is cheaper."""
    layer = MPOLinear(Sites((16, 1), (1, 16)), 14, bias=True, gauge=gauge)
    made = []
    real = MPOLinear.to_matrix
    monkeypatch.setattr(MPOLinear, "to_matrix", lambda self, dtype=None: made.append(1) or real(self, dtype))
    W, threshold = real(layer), -(-14 * 16 * 16 // (14 * 32 - 256))
    for tokens, expected in ((threshold - 1, 0), (threshold, 1)):
        made.clear()
        x = torch.randn(tokens, 16)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), x @ W.T + layer.bias, atol=1e-5, rtol=1e-4)
        assert len(made) == expected
    small = MPOLinear(Sites((16, 1), (1, 16)), 4, bias=True, gauge=gauge)
    made.clear()
    small(torch.randn(5000, 16))
    assert not made


@pytest.mark.parametrize("gauge", [True, False])
@pytest.mark.parametrize("legs", [((4, 2, 3), (3, 4, 2)), ((24, 1), (1, 24))])
def test_bonds_over_the_exact_ones_shrink(legs, gauge):
    sites = Sites(*legs)
    mpo = algebra.add(*(sequential_svd(torch.randn(24, 24), sites, 24) for _ in range(2)))
    layer = MPOLinear.from_mpo(mpo, gauge=gauge)
    assert layer.bonds == sites.exact_bonds()
    assert torch.allclose(layer(torch.eye(24)).T, mpo.to_matrix(), atol=1e-4)
    MPOLinear(layer.sites, layer.bonds, bias=False, gauge=gauge).load_state_dict(layer.state_dict())


def test_a_batch_is_no_layer():
    batch = MPO.stack([sequential_svd(torch.randn(8, 6), Sites((8, 1), (1, 6)), 1) for _ in range(2)])
    with pytest.raises(ValueError, match="a layer holds one network"):
        MPOLinear.from_mpo(batch)


def test_the_network_of_a_layer_with_adapters_is_that_without():
    layer = MPOLinear.from_mpo(sequential_svd(torch.randn(24, 18), Sites((24, 1), (1, 18)), 7), gauge=True)
    before = layer.to_mpo().to_matrix()
    config = peft.LoraConfig(r=2, target_modules=r".*cores\.\d+", init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(layer), config).eval()
    assert not torch.allclose(layer.to_matrix(), before, atol=1e-2)
    assert torch.allclose(layer.to_mpo().to_matrix(), before, atol=1e-5)
    assert free(layer) is layer
    assert model is not None


@pytest.mark.parametrize("tokens", [3, 400])
@pytest.mark.parametrize("gauge", [True, False])
def test_a_core_with_a_forward_of_its_own_is_called(gauge, tokens):
    layer = MPOLinear.from_mpo(sequential_svd(torch.randn(24, 18), Sites((24, 1), (1, 18)), 9), gauge=gauge)
    x, called = torch.randn(tokens, 18), []
    expected = layer(x)
    for core in layer.cores:
        core.forward = lambda z, core=core: called.append(1) or nn.functional.linear(z, core.weight)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert len(called) == 2


def test_function_transforms_work_with_a_gauge():
    layer = MPOLinear.from_mpo(sequential_svd(torch.randn(8, 6), Sites((8, 1), (1, 6)), 4), gauge=True)
    x = torch.randn(5, 6)
    jacobian = torch.func.vmap(torch.func.jacrev(layer))(x)
    assert torch.allclose(jacobian, layer.to_matrix().expand(5, 8, 6), atol=1e-5)
