import math

import pytest
import tensorly
import tensorly.decomposition
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from network_strategies import mpos

from bondsmith.nn import MPOLinear
from bondsmith.tensor import MPO, Sites, algebra, sequential_svd
from bondsmith.tensor.fit import interleave


def same(mpo, matrix):
    torch.testing.assert_close(mpo.to_matrix(), matrix, atol=1e-9, rtol=1e-9)


@given(mpos(), st.data())
def test_canonical_is_the_same_operator_with_orthonormal_sides(mpo, data):
    center = data.draw(st.integers(-len(mpo.cores), len(mpo.cores) - 1))
    moved = algebra.canonical(mpo, center)
    same(moved, mpo.to_matrix())
    center %= len(mpo.cores)
    for k, core in enumerate(moved.cores):
        a, _, _, b = core.shape
        if k < center:
            gram = core.reshape(-1, b).T @ core.reshape(-1, b)
        elif k > center:
            gram = core.reshape(a, -1) @ core.reshape(a, -1).T
        else:
            assert core.norm().item() == pytest.approx(mpo.to_matrix().norm().item())
            continue
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64))
    assert all(bond <= exact for bond, exact in zip(moved.bonds, moved.sites.exact_bonds(), strict=True))


@given(mpos())
def test_schmidt_values_and_entropies_are_those_of_the_dense_matrix(mpo):
    tensor, left = interleave(mpo.to_matrix(), mpo.sites), 1
    for k, (values, entropy) in enumerate(zip(algebra.schmidt_values(mpo), algebra.entropies(mpo), strict=True)):
        left *= mpo.sites.out_legs[k] * mpo.sites.in_legs[k]
        dense = torch.linalg.svdvals(tensor.reshape(left, -1))
        torch.testing.assert_close(values, dense[: len(values)], atol=1e-9, rtol=1e-9)
        assert dense[len(values) :].norm() < 1e-9
        p = dense.square() / dense.square().sum()
        assert entropy.item() == pytest.approx(-sum(x * math.log(x) for x in p.tolist() if x > 0), abs=1e-9)


@given(mpos(), st.integers(1, 4))
def test_truncation_knows_its_error_exactly(mpo, bond):
    cut = algebra.truncate(mpo, bond)
    assert all(kept <= bond for kept in cut.mpo.bonds)
    error = (mpo.to_matrix() - cut.mpo.to_matrix()).norm().item()
    scale = mpo.to_matrix().norm().item()
    assert error == pytest.approx(cut.error.item(), rel=1e-10, abs=1e-12 * scale)
    spectra = algebra.schmidt_values(mpo)
    bound = sum(values[bond:].square().sum().item() for values in spectra)
    assert cut.error**2 <= bound * (1 + 1e-10) + 1e-20
    if len(mpo.bonds) == 1:
        assert cut.error.item() ** 2 == pytest.approx(bound, rel=1e-10, abs=1e-20)


@given(mpos(), st.floats(0.0, 0.9))
def test_truncation_to_a_discarded_weight(mpo, discard):
    cut = algebra.truncate(mpo, discard=discard)
    total = mpo.to_matrix().square().sum().item()
    assert cut.error**2 <= discard * total * (1 + 1e-9)
    smaller = algebra.truncate(mpo, discard=min(0.95, discard + 0.05)).mpo.parameters
    assert smaller <= cut.mpo.parameters


def test_truncation_is_that_of_tensorly():
    mpo = sequential_svd(torch.randn(24, 24, dtype=torch.float64), Sites((4, 3, 2), (2, 3, 4)), 99)
    cut = algebra.truncate(mpo, (5, 4))
    tensor = interleave(mpo.to_matrix(), mpo.sites).reshape(8, 9, 8)
    oracle = tensorly.decomposition.tensor_train(tensor.numpy(), rank=[1, 5, 4, 1]).to_tensor()
    torch.testing.assert_close(interleave(cut.mpo.to_matrix(), mpo.sites).reshape(8, 9, 8), torch.as_tensor(oracle))


@given(mpos(), st.floats(-3, 3), st.integers(0, 999))
def test_sum_scale_inner_norm_and_transpose(mpo, factor, seed):
    generator = torch.Generator().manual_seed(seed)
    other = MPO(tuple(torch.randn(core.shape, generator=generator, dtype=torch.float64) for core in mpo.cores))
    one, two = mpo.to_matrix(), other.to_matrix()
    total = algebra.add(mpo, algebra.scale(other, factor))
    same(total, one + factor * two)
    assert algebra.inner(mpo, other).item() == pytest.approx((one * two).sum().item(), rel=1e-9, abs=1e-9)
    assert algebra.norm(mpo).item() == pytest.approx(one.norm().item())
    same(algebra.transpose(mpo), one.T)
    recompressed = algebra.truncate(algebra.add(mpo, mpo), discard=1e-20).mpo
    same(recompressed, 2 * one)
    assert recompressed.parameters <= mpo.parameters


@given(mpos(), st.data())
def test_gauges_change_nothing(mpo, data):
    if not mpo.bonds:
        return
    bond = data.draw(st.integers(0, len(mpo.bonds) - 1))
    size = mpo.bonds[bond]
    gauge = torch.eye(size, dtype=torch.float64) * 2 + torch.ones(size, size).triu(1)
    moved = algebra.regauge(mpo, bond, gauge)
    same(moved, mpo.to_matrix())
    assert not torch.equal(moved.cores[bond], mpo.cores[bond])


@settings(max_examples=30)
@given(mpos(), st.integers(1, 4), st.integers(0, 999))
def test_a_batch_is_its_networks(mpo, bond, seed):
    generator = torch.Generator().manual_seed(seed)
    other = MPO(tuple(torch.randn(core.shape, generator=generator, dtype=torch.float64) for core in mpo.cores))
    pair, both = [mpo, other], MPO.stack([mpo, other])
    same(both, torch.stack([one.to_matrix() for one in pair]))
    x = torch.randn(2, 3, mpo.sites.in_features, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(both.apply(x), torch.stack([one.apply(part) for one, part in zip(pair, x, strict=True)]))
    cut, cuts = algebra.truncate(both, bond), [algebra.truncate(one, bond) for one in pair]
    torch.testing.assert_close(cut.error, torch.stack([one.error for one in cuts]), atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(algebra.norm(both), torch.stack([algebra.norm(one) for one in pair]))
    torch.testing.assert_close(algebra.inner(both, both), algebra.norm(both) ** 2)
    for k, values in enumerate(algebra.entropies(both)):
        torch.testing.assert_close(values, torch.stack([algebra.entropies(one)[k] for one in pair]))
    same(algebra.add(both, algebra.scale(both, 2.0)), 3 * both.to_matrix())
    same(algebra.transpose(both), both.to_matrix().mT)
    loose = algebra.truncate(both, discard=0.1)
    assert (loose.error**2 <= 0.1 * algebra.norm(both) ** 2 * (1 + 1e-9)).all()
    if mpo.bonds:
        size = both.bonds[0]
        same(algebra.regauge(both, 0, 2 * torch.eye(size, dtype=torch.float64)), both.to_matrix())
        one, two = algebra.canonical(both, 0), [algebra.canonical(each, 0) for each in pair]
        for n in range(2):
            torch.testing.assert_close(one[n].cores[0].norm(), two[n].cores[0].norm())


def test_a_batch_of_unequal_bonds_and_more_dimensions():
    one, two = (sequential_svd(torch.randn(6, 6, dtype=torch.float64), Sites((2, 3), (3, 2)), bond) for bond in (2, 4))
    both = MPO.stack([one, two])
    assert (both.bonds, both.batch, both.parameters) == ((4,), (2,), 96)
    same(both[0], one.to_matrix())
    grid = MPO(tuple(core.reshape(1, 2, *core.shape[1:]) for core in both.cores))
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(grid.apply(x), x @ grid.to_matrix().mT)
    assert str(grid).startswith("2 times MPO (2,3)(3,2) bonds (4,)")
    with pytest.raises(ValueError, match=r"do not make a batch"):
        MPO.stack([one, algebra.transpose(one)])
    with pytest.raises(ValueError, match=r"\(2,\) networks need as many parts"):
        both.apply(torch.randn(3, 6))
    with pytest.raises(ValueError, match=r"before \(a, o, i, b\) differ"):
        MPO((both.cores[0], two.cores[1]))
    with pytest.raises(ValueError, match=r"batches of \(2,\) and \(\) networks"):
        algebra.inner(both, one)
    with pytest.raises(IndexError, match=r"is one network"):
        one[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype_is_computed_in_float64(dtype):
    exact = sequential_svd(torch.randn(12, 12, dtype=torch.float64), Sites((3, 4), (4, 3)), 6)
    mpo = exact.to(dtype=dtype)
    for moved in (algebra.canonical(mpo, 0), algebra.truncate(mpo, 3).mpo, algebra.add(mpo, mpo)):
        assert moved.dtype == dtype
    assert algebra.truncate(mpo, 3).error.dtype == torch.float64
    cut = algebra.truncate(exact, 3).error
    torch.testing.assert_close(algebra.truncate(mpo, 3).error, cut, rtol=20 * torch.finfo(dtype).eps, atol=0)


@settings(max_examples=10)
@given(mpos())
def test_save_and_load(tmp_path_factory, mpo):
    path = tmp_path_factory.mktemp("mpo") / "network.pt"
    mpo.save(path)
    loaded = MPO.load(path)
    assert all(torch.equal(a, b) for a, b in zip(mpo.cores, loaded.cores, strict=True))


def test_load_of_something_else(tmp_path):
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt holds no network"):
        MPO.load(tmp_path / "other.pt")


def test_dtype_is_kept_and_zero_is_a_network():
    mpo = sequential_svd(torch.randn(8, 8), Sites((2, 4), (4, 2)), 5)
    for moved in (algebra.canonical(mpo, 0), algebra.truncate(mpo, 3).mpo, algebra.add(mpo, mpo)):
        assert moved.dtype == torch.float32
    zero = sequential_svd(torch.zeros(8, 8), Sites((2, 4), (4, 2)), 5)
    assert algebra.entropies(zero) == (0.0,)
    assert algebra.truncate(zero, discard=0.5).error == 0


def test_errors():
    mpo = sequential_svd(torch.randn(8, 8), Sites((2, 4), (4, 2)), 3)
    with pytest.raises(ValueError, match=r"site 2 does not exist"):
        algebra.canonical(mpo, 2)
    with pytest.raises(ValueError, match=r"below 1, not 1"):
        algebra.truncate(mpo, discard=1)
    with pytest.raises(ValueError, match=r"other legs"):
        algebra.add(mpo, algebra.transpose(mpo))
    with pytest.raises(ValueError, match=r"bond 1 does not exist"):
        algebra.regauge(mpo, 1, torch.eye(3))
    with pytest.raises(ValueError, match=r"has dimension 3; a gauge of shape \(2, 2\)"):
        algebra.regauge(mpo, 0, torch.eye(2))
    with pytest.raises(ValueError, match=r"singular \(rank 1 of 3, condition"):
        algebra.regauge(mpo, 0, torch.ones(3, 3))


def test_bonds_past_the_exact_ones_are_cut_down_with_a_note(caplog: pytest.LogCaptureFixture) -> None:
    mpo = sequential_svd(torch.randn(6, 6), Sites((2, 3), (2, 3)), 4)
    with caplog.at_level("INFO", logger="bondsmith"):
        assert algebra.truncate(mpo, 99).mpo.bonds == (4,)
        assert MPOLinear(mpo.sites, 99, bias=False).bonds == (4,)
    assert [record.getMessage() for record in caplog.records] == [
        "sites (2,2)(3,3) are exact at bonds (4,): bonds 99 are cut down to these"
    ] * 2


def test_a_gauge_that_rounding_makes_invertible_is_singular():
    mpo = sequential_svd(torch.randn(8, 6), Sites((8, 1), (1, 6)), 3)
    for seed in range(20):
        u, v = torch.randn(2, 3, 1, generator=torch.Generator().manual_seed(seed))
        with pytest.raises(ValueError, match="gauge at bond 0 is singular"):
            algebra.regauge(mpo, 0, u @ v.T)


def test_a_sum_has_the_wider_dtype():
    one = sequential_svd(torch.randn(8, 6), Sites((8, 1), (1, 6)), 3)
    other = sequential_svd(torch.randn(8, 6, dtype=torch.float64), Sites((8, 1), (1, 6)), 3)
    assert algebra.add(one, other).dtype == algebra.add(other, one).dtype == torch.float64
