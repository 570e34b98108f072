"""The order of codes that int4 kernels want: what it multiplies by, who gets along with it, how it is learnt and undone."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import safetensors.torch
import torch
from packed_layers import INT4, layer
from torch import nn
from torch.nn import functional as F  # noqa: N812

from bondsmith.nn import code_order, cuda_int4, kernels
from bondsmith.nn.packed import PackedEmbedding, PackedHead, PackedLinear, widen
from bondsmith.nn.pairs import pairs
from bondsmith.tensor.rounding import Grid, round_to_nearest


def test_the_int4_kernel_is_used_where_there_is_one_and_its_order_is_undone() -> None:
    if not kernels.int4_block():
        pytest.skip("this torch has no int4 kernel for this processor")
    grid = Grid(4, 64, symmetric=False)
    packed = layer(grid)
    before, codes = packed.to_rounded(), packed.codes.clone()
    with torch.no_grad():
        packed(torch.randn(1, 192, dtype=torch.bfloat16))
        assert not torch.equal(packed.codes, codes)
        assert torch.equal(packed.state_dict()["codes"], codes)
        assert torch.equal(packed.to_rounded().codes, before.codes)
        many = torch.randn(100, 192, dtype=torch.bfloat16)
        expected = F.linear(many.float(), before.dequantize(), packed.bias)
        assert (packed(many).float() - expected).norm() < 0.01 * expected.norm()
        packed.load_state_dict(packed.state_dict())
        assert torch.equal(packed.codes, codes)
        again = copy.deepcopy(packed)
        packed(many[:1])
        assert torch.equal(copy.deepcopy(packed)(many), again(many))


def shuffled(order: torch.Tensor, rows: int, columns: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A conversion that lays the codes of every tile in `order`, tile after tile."""

    def convert(packed: torch.Tensor) -> torch.Tensor:
        codes = torch.stack((packed & 15, packed >> 4), -1).view(len(packed) // rows, rows, -1, columns)
        halves = codes.transpose(1, 2).reshape(-1, rows * columns)[:, order]
        return (halves[:, ::2] | halves[:, 1::2] << 4).reshape(packed.shape)

    return convert


@pytest.mark.parametrize(("rows", "columns"), [(8, 128), (8, 64), (8, 32), (2, 4)])
def test_the_order_of_a_kernel_is_learnt_from_its_own_conversion(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    convert = shuffled(torch.randperm(rows * columns, generator=generator), rows, columns)
    places = cuda_int4.learn_places(convert, rows, columns)
    packed = torch.randint(256, (5 * rows, 3 * columns // 2), dtype=torch.uint8, generator=generator)
    assert torch.equal(cuda_int4.from_tiles(convert(packed), places, rows, columns), packed)
    with pytest.raises(ValueError, match="not only moved"):
        cuda_int4.learn_places(lambda p: convert(p) ^ 1, rows, columns)


def test_the_order_of_the_kernel_of_this_processor_is_learnt_too() -> None:
    block = kernels.int4_block()
    if not block:
        pytest.skip("this torch has no int4 kernel for this processor")
    places = cuda_int4.learn_places(kernels.to_int4_order, block, 2)
    packed = torch.randint(256, (2 * block, 1), dtype=torch.uint8)
    assert torch.equal(cuda_int4.from_tiles(kernels.to_int4_order(packed).view(packed.shape), places, block, 2), packed)


def test_a_device_without_the_kernel_unpacks() -> None:
    grid = Grid(4, 64, symmetric=False)
    assert not cuda_int4.has_int4(grid, 128, 192, torch.device("cpu"))


def test_matrices_in_the_order_of_the_cuda_kernel_are_read_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    order = torch.randperm(8 * 64, generator=torch.Generator().manual_seed(0))
    places = cuda_int4.learn_places(shuffled(order, 8, 64), 8, 64)
    monkeypatch.setattr(cuda_int4, "_places", lambda inner: places)
    monkeypatch.setattr(cuda_int4, "to_order", shuffled(order, 8, 64))
    grid = Grid(4, 64, symmetric=False)
    embedding = PackedEmbedding(nn.Embedding(128, 192), grid)
    embedding.put(round_to_nearest(torch.randn(128, 192), grid))
    ids, codes = torch.tensor([[0, 7, 8, 63], [64, 100, 127, 5]]), embedding.codes.clone()
    before = embedding(ids)
    embedding._bring_into("cuda")
    assert not torch.equal(embedding.codes, codes)
    assert torch.equal(embedding(ids), before)
    assert torch.equal(embedding.state_dict()["codes"], codes)
    with torch.no_grad():  # on a CPU the codes come into the order of its own kernel
        PackedHead(embedding)(torch.randn(1, 192, dtype=torch.bfloat16))
    assert torch.equal(embedding.packed_codes(), codes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("grid", [Grid(4, 64), Grid(4, 32, symmetric=False), Grid(4, 64, symmetric=False)], ids=str)
def test_the_cuda_kernel_multiplies_by_the_rounded_matrix(grid: Grid) -> None:
    packed, x = layer(grid), torch.randn(3, 192)
    expected = F.linear(x, packed.to_rounded().dequantize(), packed.bias)
    there = copy.deepcopy(packed).to("cuda", torch.bfloat16)
    with torch.no_grad():
        y = there(x.to("cuda", torch.bfloat16))
    assert code_order.order(there.codes) == "cuda"
    assert (y.float().cpu() - expected).norm() < 0.01 * expected.norm()
    assert torch.equal(there.cpu().packed_codes(), packed.codes)


@pytest.mark.parametrize(
    "grid",
    [Grid(2, 32), Grid(3, 128), Grid(2, 128, symmetric=False), Grid(3, 32, symmetric=False), Grid(3, 0)],
    ids=str,
)
@pytest.mark.parametrize(("rows", "columns"), [(128, 192), (104, 192), (104, 200), (104, 176)])
def test_widened_codes_are_the_same_matrix_in_the_order_of_the_int4_kernel(grid: Grid, rows: int, columns: int) -> None:
    packed, x = layer(grid, rows, columns, bias=False), torch.randn(100, columns)
    codes, expected = packed.codes.clone(), F.linear(x, packed.to_matrix())
    if not kernels.int4_block():
        assert not packed.widen()
        return
    with torch.no_grad():
        assert packed.widen()
        assert packed.codes.nbytes == -(-rows // kernels.int4_block()) * kernels.int4_block() * -(-columns // 32) * 16
        assert torch.equal(packed.packed_codes(), codes)
        assert torch.equal(packed.state_dict()["codes"], codes)
        assert torch.allclose(packed(x), expected, atol=1e-4)
        for tokens in (1, 100):
            low = packed(x[:tokens].bfloat16()).float()
            assert (low - expected[:tokens]).norm() < 0.01 * expected[:tokens].norm()
    x.requires_grad_()
    packed(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad[0], packed.to_matrix().sum(0), atol=1e-3)


@pytest.mark.parametrize("grid", [Grid(4, 128), Grid(4, 128, symmetric=False), Grid(4, 0)], ids=str)
@pytest.mark.parametrize("columns", [192, 175])
def test_groups_made_of_several_of_the_kernel_s_and_rows_of_no_whole_block(grid: Grid, columns: int) -> None:
    packed = layer(grid, 104, columns, bias=False)
    W, ids = packed.to_matrix(), torch.tensor([71, 0, 33])
    for tokens in (1, 3, 100):
        x = torch.randn(tokens, columns, dtype=torch.bfloat16)
        with torch.no_grad():
            expected, y = F.linear(x.float(), W), packed(x)
        assert (y.float() - expected).norm() < 0.01 * expected.norm()
    assert (code_order.order(packed.codes) == "cpu") == (kernels.int4_block() > 0)
    assert torch.equal(packed.to_matrix(), W)
    assert torch.equal(code_order.packed_rows(packed.codes, ids, grid, columns), packed.packed_codes()[ids])


def test_what_no_kernel_takes_is_not_widened() -> None:
    model = nn.ModuleList([layer(Grid(3, 40)), layer(Grid(8, 0)), layer(Grid(4, 64)), layer(Grid(2, 64))])
    narrow = [m.codes.nbytes for m in model]
    assert widen(model) == (128 * 48 if kernels.int4_block() else 0)
    assert [m.codes.nbytes for m in model][:3] == narrow[:3]


def test_rows_of_a_widened_embedding_are_the_same() -> None:
    plain = nn.Embedding(128, 192)
    embedding = PackedEmbedding(plain, Grid(3, 64))
    embedding.put(round_to_nearest(plain.weight.detach(), Grid(3, 64)))
    ids = torch.tensor([[0, 5, 127, 64]])
    before = embedding(ids)
    embedding.widen()
    assert torch.equal(embedding(ids), before)


@pytest.mark.skipif(not kernels.int4_block(), reason="this torch has no int4 kernel for this processor")
class TestCodesInTheOrderOfTheKernel:
    """Whoever handles them without knowing of it gets the same weights."""

    def used(self, rows: int = 128, columns: int = 192) -> tuple[PackedLinear, torch.Tensor]:
        packed = layer(INT4, rows, columns, bias=False)
        W = packed.to_matrix()
        with torch.no_grad():
            packed(torch.randn(1, columns, dtype=torch.bfloat16))
        assert code_order.order(packed.codes) == "cpu"
        return packed, W

    def test_scales_and_centres_are_read_as_they_lie(self) -> None:
        packed, W = self.used()
        assert pairs(packed.scales, packed.centres, 128).data_ptr() == packed.scales.data_ptr()
        for other in (copy.deepcopy(packed), packed.to(torch.float32)):
            both = pairs(other.scales, other.centres, 128)
            assert both.data_ptr() == other.scales.data_ptr()
            assert torch.equal(both, torch.stack((other.scales.T, other.centres.T), -1))
        apart = pairs(packed.scales.clone(), packed.centres, 128)
        assert apart.data_ptr() != packed.scales.data_ptr()
        assert torch.equal(apart, both)
        assert torch.equal(packed.to_matrix(), W)

    def test_a_buffer_that_is_put_back_by_hand(self) -> None:
        packed, W = self.used()
        inside, before = packed.codes, layer(INT4, bias=False).codes
        packed._buffers["codes"] = before  # as offloading does
        assert torch.equal(packed.to_matrix(), W)
        packed._buffers["codes"] = inside.clone()
        assert torch.equal(packed.to_matrix(), W)

    def test_a_model_pickled_on_another_processor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        packed, W = self.used()
        file = io.BytesIO()
        torch.save(packed, file)
        file.seek(0)
        block = kernels.int4_block()
        monkeypatch.setattr(kernels, "int4_block", lambda: 96 - block)  # 64 and 32
        there = torch.load(file, weights_only=False)
        assert torch.equal(there.to_matrix(), W)
        there._bring_into("cpu")
        assert there.codes.shape[2] == (96 - block) // 2
        assert torch.equal(there.to_matrix(), W)

    def test_threads_that_meet_at_the_first_call(self) -> None:
        for _ in range(30):
            packed, x = layer(INT4, bias=False), torch.randn(1, 192, dtype=torch.bfloat16)
            W = packed.to_matrix()
            threads = [threading.Thread(target=packed.multiply, args=(x,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert torch.equal(packed.to_matrix(), W)

    def test_no_tokens(self) -> None:
        packed, _ = self.used()
        with torch.no_grad():
            assert packed(torch.empty(0, 192)).shape == (0, 128)
            assert packed(torch.empty(2, 0, 192, dtype=torch.bfloat16)).shape == (2, 0, 128)

    def test_inference_mode_leaves_ordinary_tensors(self) -> None:
        packed = layer(INT4, bias=False)
        state, W = {name: t.clone() for name, t in packed.state_dict().items()}, packed.to_matrix()
        with torch.inference_mode():
            packed(torch.randn(1, 192, dtype=torch.bfloat16))
        packed.load_state_dict(state)
        packed.scales.mul_(1)
        assert torch.equal(packed.to_matrix(), W)

    def test_what_was_filled_up_is_not_saved(self) -> None:
        packed, W = self.used(104, 176)
        state = packed.state_dict()
        assert state["codes"].untyped_storage().nbytes() == 104 * 88
        safetensors.torch.save(dict(state))
        other = layer(INT4, 104, 176, bias=False)
        other.load_state_dict(state)
        assert torch.equal(other.to_matrix(), W)

    def test_few_rows_are_not_filled_up_to_a_block(self) -> None:
        packed = layer(INT4, rows=5, bias=False)
        with torch.no_grad():
            packed(torch.randn(1, 192, dtype=torch.bfloat16))
        assert packed.codes.shape == (5, 96)

    def test_another_device_gets_the_order_of_the_file(self) -> None:
        packed, _ = self.used(104, 176)
        assert packed.to("meta").codes.shape == (104, 88)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_older_processors_multiply_by_the_same_weights(capability: str) -> None:
    """torch lays codes out differently for each; where the order is not known, matrices are unpacked."""
    code = """
import torch
from packed_layers import INT4, layer
packed, x = layer(INT4, bias=False), torch.randn(3, 192)
with torch.no_grad():
    expected = x @ packed.to_matrix().T
    found = packed(x.bfloat16()).float()
assert (found - expected).norm() < 0.01 * expected.norm(), (found - expected).norm() / expected.norm()
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
