"""Packed layers: what they multiply by, what they keep in memory, and their gradients."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from packed_layers import INT4, layer
from torch import nn
from torch.nn import functional as F  # noqa: N812

from bondsmith.nn import kernels
from bondsmith.nn.linear import MPOLinear
from bondsmith.nn.packed import PackedEmbedding, PackedHead, PackedLinear, PackedMatrix
from bondsmith.tensor.fit import sequential_svd
from bondsmith.tensor.rounding import Grid, round_to_nearest
from bondsmith.tensor.sites import parse_sites

GRIDS = [
    Grid(8, 0),
    Grid(8, 32, symmetric=False),
    Grid(4, 32),
    Grid(4, 64, symmetric=False),
    Grid(4, 64, codebook="nf4"),
    Grid(3, 40),
    Grid(2, 16, symmetric=False),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_it_multiplies_by_the_rounded_matrix(grid: Grid, tokens: int) -> None:
    packed, x = layer(grid), torch.randn(2, tokens, 192)
    with torch.no_grad():
        expected = F.linear(x, packed.to_rounded().dequantize(), packed.bias)
        assert torch.allclose(packed(x), expected, atol=1e-4)
        low = copy.deepcopy(packed).to(torch.bfloat16)
        out = low(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() < 0.01 * expected.norm()
    assert torch.equal(low.to_rounded().dequantize(), packed.to_rounded().dequantize())  # no cast, no reordering left


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_some_rows_at_a_time_are_the_same_as_all(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = layer(grid), torch.randn(100, 192)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):  # in bfloat16 four bits get into the order of the kernel
            monkeypatch.setattr(kernels, "CHUNK", 2**20)
            whole = packed(x.to(dtype))
            monkeypatch.setattr(kernels, "CHUNK", 96 * 192)  # rows are no multiple of it
            assert torch.allclose(packed(x.to(dtype)), whole, atol=1e-4 if dtype == torch.float32 else 0.1)


def test_double_precision_is_kept() -> None:
    packed, x = layer(Grid(8, 0), bias=False), torch.randn(2, 192, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(packed(x), x @ packed.to_matrix(torch.float64).T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_memory_is_that_of_the_packed_matrix(grid: Grid) -> None:
    packed = layer(grid, bias=False)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in (1, 100):
                packed(torch.randn(tokens, 192, dtype=dtype))
    tensors = [v for v in vars(packed).values() if isinstance(v, torch.Tensor)]
    held = sum(t.nbytes for t in [*packed.parameters(), *packed.buffers(), *tensors])
    assert held == grid.packed_bytes(128, 192)


def test_scales_that_change_reach_the_kernels() -> None:
    for grid in (Grid(8, 0), Grid(4, 64, symmetric=False)):
        packed, x = layer(grid, bias=False), torch.randn(1, 192, dtype=torch.bfloat16)
        with torch.no_grad():
            once = packed(x)
            packed.scales.mul_(2)
            if packed.centres is not None:
                packed.centres.mul_(2)
            assert torch.allclose(packed(x), 2 * once, rtol=0.02, atol=0.05)
        saved = io.BytesIO()
        state = {name: t.clone() for name, t in packed.state_dict().items()}
        torch.save(packed.state_dict(), saved)
        assert all(t.is_contiguous() for t in packed.state_dict().values())
        assert len({t.untyped_storage().data_ptr() for t in packed.state_dict().values()}) == len(state)
        other = layer(grid, bias=False)
        with torch.no_grad():
            other(x)
            other.load_state_dict(state)
            assert torch.equal(other(x), packed(x))


@pytest.mark.parametrize("grid", [Grid(4, 64, symmetric=False), Grid(8, 0), Grid(3, 32)], ids=str)
def test_processors_without_a_bfloat16_gemm_multiply_in_float32(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = layer(grid), torch.randn(100, 192, dtype=torch.bfloat16)
    expected = F.linear(x.float(), packed.to_matrix())
    errors = {}
    for there in (True, False):
        monkeypatch.setattr(kernels, "_SLOW", set() if there else {torch.bfloat16})
        with torch.no_grad():
            y = packed.multiply(x)
        assert y.dtype == torch.bfloat16
        errors[there] = float((y.float() - expected).norm() / expected.norm())
    assert errors[False] <= errors[True] < 0.01


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gradients_are_those_of_the_dense_layer(grid: Grid) -> None:
    packed = layer(grid, rows=12, columns=48)
    packed.train_scales()
    x = torch.randn(5, 48, requires_grad=True)
    packed(x).square().sum().backward()
    found = [x.grad, packed.scales.grad, None if packed.centres is None else packed.centres.grad, packed.bias.grad]
    x.grad = packed.bias.grad = packed.scales.grad = None
    if packed.centres is not None:
        packed.centres.grad = None
    F.linear(x, packed.to_matrix(), packed.bias).square().sum().backward()
    expected = [x.grad, packed.scales.grad, None if packed.centres is None else packed.centres.grad, packed.bias.grad]
    for mine, dense in zip(found, expected, strict=True):
        assert (mine is None) == (dense is None)
        if dense is not None:
            assert dense.abs().sum() > 0
            assert torch.allclose(mine, dense, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("grid", [Grid(8, 0), Grid(4, 32)], ids=str)
def test_gradients_in_bfloat16_go_around_the_kernels(grid: Grid) -> None:
    packed = layer(grid, rows=16, columns=64, bias=False)
    packed.train_scales()
    x = torch.randn(5, 64).bfloat16().requires_grad_()
    packed(x).float().square().sum().backward()
    dense = x.detach().float().requires_grad_()
    F.linear(dense, packed.to_matrix(torch.float32)).square().sum().backward()
    assert (x.grad.float() - dense.grad).norm() < 0.02 * dense.grad.norm()
    assert packed.scales.grad.abs().sum() > 0


@pytest.mark.parametrize("grid", [Grid(8, 0), Grid(4, 16, symmetric=False), Grid(3, 16)], ids=str)
@pytest.mark.parametrize("tokens", [5, 100])
def test_under_autocast_products_are_those_of_linear_layers(grid: Grid, tokens: int) -> None:
    packed, x = layer(grid, rows=48, columns=64), torch.randn(tokens, 64, requires_grad=True)
    packed.train_scales()
    dense, dtypes = packed.materialise(), []
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = packed(x), dense(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert (y - expected).norm() < 0.01 * expected.norm()
    y.register_hook(lambda gradient: dtypes.append(gradient.dtype))
    push = torch.randn_like(expected)
    (found,), (wanted,) = (torch.autograd.grad(out, x, push, retain_graph=True) for out in (y, expected))
    assert dtypes == [torch.bfloat16]
    assert (found - wanted).norm() < 0.01 * wanted.norm()
    y.backward(push)
    W = packed.to_matrix()
    (exact,) = torch.autograd.grad(x.detach() @ W.T, packed.scales, push.float())
    assert packed.scales.grad is not None
    assert (packed.scales.grad - exact).norm() < 0.02 * exact.norm()


def test_trained_scales_lower_a_loss_over_frozen_codes_and_go_back_to_bfloat16() -> None:
    packed = layer(Grid(3, 16), rows=12, columns=48, bias=False)
    x, target = torch.randn(64, 48), torch.randn(64, 12)
    codes = packed.codes.clone()
    packed.train_scales()
    assert [n for n, _ in packed.named_parameters()] == ["scales"]
    optimizer = torch.optim.Adam(packed.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (packed(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    packed.train_scales(False)
    assert packed.scales.dtype == torch.bfloat16
    assert not list(packed.parameters())
    assert torch.equal(packed.codes, codes)
    assert float((packed(x) - target).square().mean()) == pytest.approx(losses[-1], rel=0.05)


def test_casting_and_copying_leave_the_weights_alone() -> None:
    packed = layer(Grid(4, 64))
    W = packed.to_matrix()
    for same in (
        copy.deepcopy(packed).half(),
        copy.deepcopy(packed).double(),
        copy.deepcopy(packed).bfloat16().float(),
    ):
        assert torch.equal(same.to_matrix(), W)
    assert packed.bfloat16().bias.dtype == torch.bfloat16
    file = io.BytesIO()
    torch.save(packed.state_dict(), file)
    file.seek(0)
    other = PackedLinear(192, 128, Grid(4, 64), bias=True)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.to_matrix(), W)


def test_put_refuses_another_shape_or_grid() -> None:
    with pytest.raises(ValueError, match="does not fit into a packed one of 128 x 192 on int4-g64"):
        layer(Grid(4, 64)).put(round_to_nearest(torch.randn(4, 4), Grid(4, 64)))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_embedding_and_tied_head(grid: Grid) -> None:
    plain = nn.Embedding(50, 64)
    rounded = round_to_nearest(plain.weight.detach(), grid)
    embedding = PackedEmbedding(plain, grid)
    embedding.put(rounded)
    ids = torch.randint(0, 50, (2, 7))
    assert torch.equal(embedding(ids), rounded.dequantize()[ids])
    assert embedding.bfloat16()(ids).dtype == torch.bfloat16
    head = PackedHead(embedding)
    x = torch.randn(2, 7, 64)
    assert torch.allclose(head(x), x @ rounded.dequantize().T, atol=1e-4)
    both = nn.ModuleDict({"embedding": embedding, "head": head})
    assert sum(b.nbytes for b in both.state_dict().values()) == grid.packed_bytes(50, 64)
    copied = copy.deepcopy(both)
    assert copied["head"].embedding is copied["embedding"]
    assert torch.equal(embedding.materialise().weight, rounded.dequantize())


def test_looking_up_rows_of_an_embedding_whose_head_has_used_the_int4_kernel() -> None:
    grid = Grid(4, 64, symmetric=False)
    embedding = PackedEmbedding(nn.Embedding(128, 192), grid)
    embedding.put(round_to_nearest(torch.randn(128, 192), grid))
    ids = torch.tensor([[0, 31, 32, 63], [64, 100, 127, 5]])
    before = embedding(ids)
    with torch.no_grad():
        PackedHead(embedding)(torch.randn(1, 192, dtype=torch.bfloat16))
    assert torch.equal(embedding(ids), before)


def test_an_embedding_that_does_more_than_look_up_is_refused_or_scaled() -> None:
    class Shifted(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) + 1

    with pytest.raises(ValueError, match="class Shifted cannot be packed"):
        PackedEmbedding(Shifted(4, 8), Grid(8, 0))


@pytest.mark.parametrize(
    ("spec", "bonds", "gauge"),
    [("matrix", 8, True), ("matrix", 8, False), ("interleaved:3", 6, True), ("interleaved:3", 6, False)],
)
def test_cores_of_a_network_can_be_packed(spec: str, bonds: int, gauge: bool) -> None:
    torch.manual_seed(0)
    sites = parse_sites(spec, 48, 64)
    network = MPOLinear.from_mpo(sequential_svd(torch.randn(48, 64), sites, bonds), bias=torch.randn(48), gauge=gauge)
    for k, core in enumerate(network.cores):
        network.cores[k] = PackedLinear.from_rounded(round_to_nearest(core.weight.detach(), Grid(4, 16)))
    W = network.to_matrix()
    for tokens in (1, 7, 300):
        x = torch.randn(tokens, 64)
        expected = F.linear(x, W, network.bias)
        assert torch.allclose(network(x), expected, atol=1e-3 * float(expected.abs().max()))
        low = copy.deepcopy(network).bfloat16()(x.bfloat16())
        assert low.dtype == torch.bfloat16
        assert (low.float() - expected).norm() < 0.02 * expected.norm()
    assert torch.equal(network.materialise().weight, W)
    for core in network.cores:
        assert isinstance(core, PackedMatrix)
        core.train_scales()
    network(torch.randn(3, 64, requires_grad=True)).sum().backward()
    assert all(core.scales.grad.abs().sum() > 0 for core in network.cores)


@pytest.mark.parametrize("grid", [Grid(8, 0), Grid(4, 32)], ids=str)
def test_weights_and_activations_may_start_anywhere_in_memory(grid: Grid) -> None:
    """Files in memory align to 8 bytes, slices of activations to 2: torch's int8 kernel crashes on either (found the hard way)."""
    rounded = round_to_nearest(torch.randn(128, 256), grid)
    packed = PackedLinear.from_rounded(rounded)
    codes = packed.codes
    room = torch.empty(codes.numel() + 128, dtype=torch.uint8)
    shifted = room[(-room.data_ptr()) % 64 + 8 :][: codes.numel()].view(codes.shape)
    packed.codes = shifted.copy_(codes)
    for tokens in (1, 3, 24):
        wide = torch.randn(tokens, 300, dtype=torch.bfloat16)
        flat = torch.randn(tokens * 256 + 4, dtype=torch.bfloat16)[4:].view(tokens, 256)
        for x in (wide[:, 4:260], flat, wide[:, :256]):
            with torch.no_grad():
                y = packed(x).float()
            expected = x.float() @ rounded.dequantize().T
            assert (y - expected).norm() < 0.02 * expected.norm()


def test_scales_that_are_trained_are_not_cast() -> None:
    packed = layer(INT4, bias=False)
    W = packed.to_matrix()
    packed.train_scales()
    packed.to(torch.bfloat16)
    assert packed.scales.dtype == torch.float32
    assert torch.equal(packed.to_matrix(), W)


def test_an_embedding_keeps_no_float_copy() -> None:
    plain = nn.Embedding(64, 32)
    embedding = PackedEmbedding(plain, Grid(4, 32))
    assert embedding._plain[0].weight.is_meta
    assert not plain.weight.is_meta


def test_a_bias_of_another_dtype_does_not_change_that_of_the_output() -> None:
    packed = layer(Grid(3, 32))
    assert packed(torch.randn(2, 192, dtype=torch.bfloat16)).dtype == torch.bfloat16
