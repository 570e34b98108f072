import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bondsmith.tensor import MPO, Sites, sequential_svd
from bondsmith.tensor.gauge import left_factor, pivot, pivot_cut


@given(st.integers(1, 30), st.integers(1, 12), st.data(), st.integers(0, 999))
def test_lossless_bounded_and_smaller(out_features, in_features, data, seed):
    bond = data.draw(st.integers(1, out_features))
    rank = data.draw(st.integers(1, bond))
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(out_features, rank, generator=generator) @ torch.randn(rank, bond, generator=generator)
    right = torch.randn(bond, in_features, generator=generator)
    cut = pivot_cut(left.double(), right.double(), largest=1.01)
    torch.testing.assert_close(cut.to_left() @ cut.right, left.double() @ right.double())
    assert cut.rest.shape == (out_features - bond, bond)
    assert cut.rest.numel() == 0 or float(cut.rest.abs().max()) <= 1.01
    assert sorted(cut.order.tolist()) == list(range(out_features))


def test_exchange_bounds_what_partial_pivoting_leaves_large():
    left = torch.eye(12).tril() - torch.ones(12, 12).tril(-1)  # Wilkinson's matrix: growth 2 ** 11
    left = torch.cat((left, torch.ones(1, 12)))
    right = torch.eye(12)
    assert float(pivot_cut(left, right, largest=1e9).rest.abs().max()) > 100
    cut = pivot_cut(left, right)
    assert float(cut.rest.abs().max()) <= 2
    torch.testing.assert_close(cut.to_left() @ cut.right, left)


def test_too_wide():
    with pytest.raises(ValueError, match=r"2 rows has no 3 pivot rows"):
        pivot_cut(torch.ones(2, 3), torch.ones(3, 3))


@given(st.integers(0, 999), st.integers(1, 9))
def test_every_bond_of_a_network_can_be_pivoted(seed, bond):
    sites = Sites((2, 3, 2, 2), (3, 2, 2, 1))
    weight = torch.randn(24, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mpo = sequential_svd(weight, sites, bond)
    pivoted = pivot(mpo)
    shapes = sites.core_shapes(mpo.bonds)[:-1]
    cores = [
        left_factor(*part).reshape(shape) for *part, shape in zip(pivoted.rests, pivoted.orders, shapes, strict=True)
    ]
    torch.testing.assert_close(MPO((*cores, pivoted.last)).to_matrix(), mpo.to_matrix())
    assert pivoted.parameters == sites.parameters(mpo.bonds, gauge=True)
    assert all(rest.numel() == 0 or rest.abs().max() <= 2 for rest in pivoted.rests)


def test_what_is_not_finite_is_refused():
    """NaN would never be the largest coefficient, and the exchanges would not end."""
    bad = torch.ones(4, 2)
    bad[1, 1] = torch.nan
    with pytest.raises(ValueError, match="left factor holds 1 NaN or infinite entries of 8"):
        pivot_cut(bad, torch.ones(2, 3))
    with pytest.raises(ValueError, match="right factor holds 1 NaN or infinite entries of 8"):
        pivot_cut(torch.ones(4, 2), bad.T)


def test_a_batch_is_pivoted_one_by_one():
    batch = MPO.stack([sequential_svd(torch.randn(8, 6), Sites((8, 1), (1, 6)), 3) for _ in range(2)])
    with pytest.raises(ValueError, match="pivoted one by one"):
        pivot(batch)


def test_a_tall_factor_needs_no_square_of_its_rows():
    left, right = torch.randn(60_000, 4, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)  # squared: 29 GB
    cut = pivot_cut(left, right)
    assert torch.allclose(cut.to_left() @ cut.right, left @ right, atol=1e-9)
