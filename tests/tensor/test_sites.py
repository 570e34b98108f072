import pytest
from hypothesis import given
from hypothesis import strategies as st

from bondsmith.tensor.sites import Sites, balanced, divisors, factorisations, parse_sites

legs = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4)


def sites_of(pairs):
    return Sites(tuple(o for o, _ in pairs), tuple(i for _, i in pairs))


@given(legs)
def test_text_and_json_round_trip(pairs):
    sites = sites_of(pairs)
    assert parse_sites(str(sites), sites.out_features, sites.in_features) == sites
    assert Sites.from_json(sites.to_json()) == sites


@given(legs, st.integers(1, 40), st.integers(1, 4000))
def test_bonds_within_is_the_largest_that_fits(pairs, bond, budget):
    sites = sites_of(pairs)
    if sites.parameters(sites.clip(1)) > budget:
        with pytest.raises(ValueError, match=r"keep at least"):
            sites.bonds_within(budget)
        return
    bonds = sites.bonds_within(budget)
    assert sites.parameters(bonds) <= budget
    top = max(bonds, default=1)
    larger = sites.clip(top + (8 if top >= 64 else 1))
    assert larger == bonds or sites.parameters(larger) > budget


@given(st.integers(1, 60), st.integers(1, 60), st.data())
def test_gauge_never_costs_more_than_dense(out_features, in_features, data):
    sites = parse_sites("matrix", out_features, in_features)
    bond = data.draw(st.integers(1, min(out_features, in_features)))
    assert (
        sites.parameters((bond,), gauge=True)
        == bond * (out_features + in_features - bond)
        <= out_features * in_features
    )
    assert sites.multiply_adds((bond,), gauge=True) <= out_features * in_features


def test_large_bonds_are_multiples_of_eight_and_exact_ones_stay():
    assert parse_sites("matrix", 1000, 1000).bonds_within(250_000) == (120,)
    assert parse_sites("matrix", 100, 1000).bonds_within(10**9) == (100,)
    assert parse_sites("matrix", 100, 100).bonds_within(100 * 199) == (96,)


def test_costs_of_the_known_shapes():
    cut = parse_sites("matrix", 30, 40)
    assert cut.parameters((5,)) == cut.multiply_adds((5,)) == 5 * 70
    assert cut.multiply_adds((5,), gauge=True) == 5 * 65
    thin = parse_sites("thin:2", 30, 40)
    assert thin.parameters((5,)) == 5 * (15 * 2 + 2 * 20)
    assert thin.multiply_adds((5,)) == 5 * (40 * 2 + 2 * 30)
    assert parse_sites("interleaved:2", 2048, 2048).multiply_adds((512,)) > 2048 * 2048  # materialised for one token


@pytest.mark.parametrize(
    ("spec", "shape", "text"),
    [
        ("auto", (6, 4), "(6,1)(1,4)"),
        ("interleaved:2", (576, 1536), "(24,48)(24,32)"),
        ("interleaved:3", (576, 576), "(8,9)(8,8)(9,8)"),
        ("interleaved:2", (7, 11), "(1,11)(7,1)"),
        ("thin:4", (576, 1536), "(144,4)(4,384)"),
        ("interleaved:1", (5, 3), "(5,3)"),
        (" (2,3) (3,1) ", (6, 3), "(2,3)(3,1)"),
    ],
)
def test_specs(spec, shape, text):
    assert str(parse_sites(spec, *shape)) == text


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ("interleaved:3", (7, 11), r"7 x 11 has too few prime factors for 3 sites.*8 x 12 does"),
        ("thin:5", (577, 10), r"577 % 5 = 2; try thin:1$"),
        ("(2,3)(3,1)", (6, 4), r"multiply to 6 x 3, the matrix is 6 x 4; a split that fits: \(2,2\)\(3,2\)"),
        ("banana", (6, 4), r"'banana'.*not understood"),
        ("interleaved:0", (6, 4), r"not understood"),
        ("(0,2)(3,1)", (6, 4), r"at least 1"),
    ],
)
def test_bad_specs(spec, shape, message):
    with pytest.raises(ValueError, match=message):
        parse_sites(spec, *shape)


@pytest.mark.parametrize("bonds", [0, -1, 2.5, True, (1, 2)])
def test_bad_bonds(bonds):
    with pytest.raises((ValueError, TypeError)):
        parse_sites("matrix", 6, 4).clip(bonds if isinstance(bonds, (int, tuple)) and bonds is not True else (bonds,))


def test_bonds_are_clipped_to_exact():
    assert parse_sites("interleaved:3", 64, 64).clip(10**6) == (16, 16)


def test_legs_must_pair():
    with pytest.raises(ValueError, match=r"1 out legs and 2 in legs"):
        Sites((2,), (2, 3))


def test_gauge_saves_the_square_of_every_bond():
    sites = parse_sites("interleaved:3", 64, 64)
    assert sites.parameters((7, 9), gauge=True) == sites.parameters((7, 9)) - 49 - 81
    assert sites.multiply_adds((7, 9), gauge=True) == sites.multiply_adds((7, 9))
    with pytest.raises(ValueError, match=r"bond 200 of \(1, 200\) has only 16 rows to its left"):
        sites.parameters((1, 200), gauge=True)


@given(legs, st.integers(1, 40))
def test_uniform_bonds_always_leave_room_for_the_gauge(pairs, bond):
    sites = sites_of(pairs)
    bonds = sites.clip(bond)
    assert sites.parameters(bonds, gauge=True) == sites.parameters(bonds) - sum(b**2 for b in bonds) > 0


@given(st.integers(1, 2000), st.integers(1, 4))
def test_factorisations_are_all_and_ascending(number, n):
    found = list(factorisations(number, n))
    assert len(set(found)) == len(found)
    assert balanced(number, n) in found
    for factors in found:
        product = 1
        for factor in factors:
            product *= factor
        assert product == number
        assert list(factors) == sorted(factors)
    if n == 2:
        assert len(found) == (len(divisors(number)) + 1) // 2


def test_far_too_many_sites_are_refused_at_once():
    with pytest.raises(ValueError, match="too few prime factors for 60 sites"):
        parse_sites("interleaved:60", 576, 1536)
    with pytest.raises(ValueError, match="too few prime factors for 3000 sites"):
        parse_sites("interleaved:3000", 576, 1536)


def test_what_is_suggested_divides_both_sides():
    with pytest.raises(ValueError, match=r"try thin:1$"):
        parse_sites("thin:2", 577, 10)
    with pytest.raises(ValueError, match=r"try thin:3, thin:4, thin:6$"):
        parse_sites("thin:5", 12, 24)


def test_a_coarse_multiple_leaves_bond_one():
    assert Sites((96, 1), (1, 96)).bonds_within(96 * 2 * 80, multiple=128) == (1,)
