import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bondsmith.tensor import Sites, sequential_svd
from bondsmith.tensor.search import candidate_sites, search_sites


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(2, 200), st.integers(2, 200), st.integers(2, 4), st.integers(1, 30))
def test_candidates_are_different_fit_and_come_cheapest_first(out_features, in_features, most_sites, limit):
    found = candidate_sites(out_features, in_features, most_sites=most_sites, limit=limit)
    assert len(set(found)) == len(found) <= limit
    assert all((s.out_features, s.in_features) == (out_features, in_features) for s in found)
    assert all(s.n <= most_sites for s in found)
    half = max(1, out_features * in_features // 2)
    costs = [s.multiply_adds(s.bonds_within(half)) for s in found]
    assert costs == sorted(costs)


def test_families_are_there():
    found = candidate_sites(576, 1536)
    for sites in (Sites((576, 1), (1, 1536)), Sites((288, 2), (2, 768)), Sites((24, 24), (48, 32))):
        assert sites in found


@pytest.mark.parametrize("hidden", [Sites((24, 1), (1, 36)), Sites((4, 6), (6, 6)), Sites((12, 2), (2, 18))])
def test_search_finds_the_shape_a_weight_was_made_of(hidden):
    mpo = sequential_svd(randn(24, 36), hidden, 4)
    weight = mpo.to_matrix() + 1e-3 * randn(24, 36, seed=1)
    x = randn(36, 200, seed=2)
    fits = search_sites(weight, mpo.parameters, input_moment=x @ x.T / 200, gauge=False)
    assert fits[0].mpo.sites == hidden
    assert fits[0].error < 2e-3
    errors = [fit.error for fit in fits]
    assert errors == sorted(errors)
    assert len(fits) == 3
    assert any(fit.mpo.sites.is_matrix_cut for fit in fits)
    assert all(fit.mpo.parameters <= mpo.parameters for fit in fits)


def test_gauge_gives_the_cut_a_larger_bond():
    weight = randn(24, 36)
    plain, gauged = (search_sites(weight, 432, gauge=g, candidates=[Sites((24, 1), (1, 36))])[0] for g in (False, True))
    assert gauged.mpo.bonds > plain.mpo.bonds
    assert gauged.error < plain.error


def test_nothing_fits():
    with pytest.raises(ValueError, match=r"fits 5 numbers; the smallest needs"):
        search_sites(randn(24, 36), 5)
