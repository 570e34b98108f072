import pytest
import tensorly.tt_matrix
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from network_strategies import mpos
from torch.utils.flop_counter import FlopCounterMode

from bondsmith.tensor import MPO, Sites
from bondsmith.tensor.contract import core_to_weight, weight_to_core


@given(mpos())
def test_to_matrix_is_that_of_tensorly(mpo):
    oracle = tensorly.tt_matrix.tt_matrix_to_matrix([core.numpy() for core in mpo.cores])
    torch.testing.assert_close(mpo.to_matrix(), torch.as_tensor(oracle))


@given(mpos(), st.integers(0, 3))
def test_apply_is_the_matrix(mpo, tokens):
    x = torch.randn(2, tokens, mpo.sites.in_features, dtype=torch.float64)
    torch.testing.assert_close(mpo.apply(x), x @ mpo.to_matrix().T)


@given(mpos(), st.booleans())
def test_cores_survive_as_weights(mpo, from_right):
    for core in mpo.cores:
        assert torch.equal(weight_to_core(core_to_weight(core, from_right), core.shape, from_right), core)


@settings(max_examples=100)
@given(mpos())
def test_apply_costs_what_the_sites_say(mpo):
    counter = FlopCounterMode(display=False)
    with counter:
        mpo.apply(torch.randn(1, mpo.sites.in_features, dtype=torch.float64))
    assert counter.get_total_flops() == 2 * mpo.sites.multiply_adds(mpo.bonds)


def test_description_and_casts():
    mpo = MPO((torch.ones(1, 2, 1, 3), torch.ones(3, 1, 4, 1)))
    assert (mpo.sites, mpo.bonds, mpo.parameters) == (Sites((2, 1), (1, 4)), (3,), 18)
    assert mpo.to(dtype=torch.bfloat16).dtype == torch.bfloat16
    assert mpo.device.type == "cpu"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 2, 2, 3), (2, 2, 2, 1)], r"do not meet"),
        ([(2, 2, 2, 1)], r"do not meet"),
        ([(1, 2, 2)], r"four legs"),
        ([], r"four legs"),
        ([(1, 0, 2, 1)], r"four legs"),
    ],
)
def test_bad_cores(shapes, message):
    with pytest.raises(ValueError, match=message):
        MPO(tuple(torch.zeros(shape) for shape in shapes))


def test_nan_and_wrong_input():
    with pytest.raises(ValueError, match=r"core 1 of 2 holds 3 NaN"):
        MPO((torch.ones(1, 2, 1, 3), torch.full((3, 1, 1, 1), float("nan"))))
    with pytest.raises(ValueError, match=r"take 4 features"):
        MPO((torch.ones(1, 2, 4, 1),)).apply(torch.ones(3))


def test_apply_takes_the_matrix_where_that_costs_less(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = Sites((4, 4, 4), (4, 4, 4))
    mpo = MPO(tuple(torch.randn(shape, dtype=torch.float64) for shape in sites.core_shapes((16, 16))))
    threshold, built = sites.materialise_from(mpo.bonds), []
    x, W = torch.randn(threshold, 64, dtype=torch.float64), mpo.to_matrix()
    monkeypatch.setattr(MPO, "to_matrix", lambda self: built.append(len(self.cores)) or W)
    for tokens in (threshold - 1, threshold):
        torch.testing.assert_close(mpo.apply(x[:tokens]), x[:tokens] @ W.T)
    assert len(built) == 1


def test_one_network_of_a_batch_is_saved_alone(tmp_path):
    batch = MPO.stack([MPO((torch.randn(1, 40, 1, 20), torch.randn(20, 1, 40, 1))) for _ in range(8)])
    batch[0].save(tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < 2 * 40 * 20 * 4 + 4096
    with pytest.raises(ValueError, match="do not make a batch"):
        MPO.stack([batch, batch])
