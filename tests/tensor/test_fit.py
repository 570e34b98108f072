import pytest
import scipy.linalg
import tensorly.decomposition
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bondsmith.tensor import (
    Sites,
    cut_spectrum,
    moment_root,
    parse_sites,
    propagated_target,
    relative_error,
    sequential_svd,
    whitened_cut,
)
from bondsmith.tensor.fit import interleave, shifted_target


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(n, seed):
    x = randn(n, 2 * n, seed=seed) * torch.linspace(0.05, 3, n, dtype=torch.float64)[:, None]
    return x @ x.T / (2 * n)


sites_strategy = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4).map(
    lambda pairs: Sites(tuple(o for o, _ in pairs), tuple(i for _, i in pairs))
)


@given(sites_strategy, st.integers(0, 99))
def test_sequential_svd_is_exact_at_full_bonds(sites, seed):
    weight = randn(sites.out_features, sites.in_features, seed=seed)
    torch.testing.assert_close(sequential_svd(weight, sites, 10**6).to_matrix(), weight)


@given(sites_strategy, st.integers(1, 4), st.integers(0, 99))
def test_sequential_svd_error_is_bounded_by_the_discarded_weight(sites, bond, seed):
    weight = randn(sites.out_features, sites.in_features, seed=seed)
    mpo = sequential_svd(weight, sites, bond)
    tensor, left, bound = interleave(weight, sites), 1, 0.0
    for o, i, kept in zip(sites.out_legs, sites.in_legs, mpo.bonds, strict=False):
        left *= o * i
        bound += float((torch.linalg.svdvals(tensor.reshape(left, -1))[kept:] ** 2).sum())
    error = float(((weight - mpo.to_matrix()) ** 2).sum())
    assert error <= bound * (1 + 1e-10) + 1e-20
    if sites.n == 2 and bound > 1e-6:
        assert error == pytest.approx(bound, rel=1e-10)


def test_sequential_svd_is_that_of_tensorly():
    sites = Sites((3, 4, 2), (2, 3, 4))
    weight = randn(24, 24)
    oracle = tensorly.decomposition.tensor_train_matrix(
        weight.reshape(3, 4, 2, 2, 3, 4).numpy(), rank=[1, 5, 6, 1]
    ).to_matrix()
    torch.testing.assert_close(sequential_svd(weight, sites, (5, 6)).to_matrix(), torch.as_tensor(oracle))


def test_sequential_svd_is_deterministic_and_keeps_the_dtype():
    weight = randn(24, 24).float()
    first, second = (sequential_svd(weight, parse_sites("interleaved:3", 24, 24), 4) for _ in range(2))
    assert first.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(first.cores, second.cores, strict=True))


@pytest.mark.parametrize("shape", [(20, 31), (31, 20), (17, 17)])
@pytest.mark.parametrize(("with_input", "with_output"), [(False, False), (True, False), (False, True), (True, True)])
def test_whitened_cut_is_the_exact_minimiser(shape, with_input, with_output):
    weight, C, B = randn(*shape), moment(shape[1], 1), moment(shape[0], 2)
    given_moments = {"input_moment": C if with_input else None, "output_moment": B if with_output else None}
    mpo = whitened_cut(weight, 5, **given_moments, damping=0.0)
    root_c = torch.as_tensor(scipy.linalg.sqrtm(C.numpy())) if with_input else torch.eye(shape[1], dtype=torch.float64)
    root_b = torch.as_tensor(scipy.linalg.sqrtm(B.numpy())) if with_output else torch.eye(shape[0], dtype=torch.float64)
    u, s, vh = torch.linalg.svd(root_b @ weight @ root_c, full_matrices=False)
    best = torch.linalg.solve(root_b, u[:, :5] * s[:5]) @ torch.linalg.solve(root_c, vh[:5], left=False)
    torch.testing.assert_close(mpo.to_matrix(), best)
    predicted = float((s[5:] ** 2).sum() / (s**2).sum()) ** 0.5
    assert relative_error(weight, mpo.to_matrix(), **given_moments) == pytest.approx(predicted, rel=1e-10)


@pytest.mark.parametrize("shape", [(20, 31), (31, 20), (17, 17)])
@pytest.mark.parametrize(("with_input", "with_output"), [(False, False), (True, False), (False, True), (True, True)])
def test_spectrum_gives_the_error_of_every_cut(shape, with_input, with_output):
    weight, damping = randn(*shape), 1e-2
    C, B = (moment(shape[1], 1) if with_input else None), (moment(shape[0], 2) if with_output else None)
    values = cut_spectrum(weight, input_moment=C, output_moment=B, damping=damping)
    assert values.shape == (min(shape),)
    assert torch.equal(values, values.sort(descending=True)[0])
    full_c = torch.eye(shape[1], dtype=torch.float64) if C is None else moment_root(C, damping).moment
    full_b = torch.eye(shape[0], dtype=torch.float64) if B is None else moment_root(B, damping).moment
    for bond in range(1, min(shape)):
        cut = whitened_cut(weight, bond, input_moment=C, output_moment=B, damping=damping)
        D = weight - cut.to_matrix()
        assert float((values[bond:] ** 2).sum()) == pytest.approx(float((D * (full_b @ D @ full_c)).sum()), rel=1e-10)
    roots = {"input_root": None if C is None else moment_root(C, damping)}
    torch.testing.assert_close(cut_spectrum(weight, **roots, output_moment=B, damping=damping), values)


@pytest.mark.parametrize("shape", [(20, 31), (31, 20)])
def test_roots_stand_in_for_moments(shape):
    weight, C, B = randn(*shape), moment(shape[1], 1), moment(shape[0], 2)
    by_moment = whitened_cut(weight, 5, input_moment=C, output_moment=B)
    by_root = whitened_cut(weight, 5, input_root=moment_root(C), output_root=moment_root(B))
    torch.testing.assert_close(by_moment.to_matrix(), by_root.to_matrix())


def test_whitened_cut_at_full_bond_is_the_weight(caplog):
    weight = randn(12, 30).float()
    with caplog.at_level("INFO", "bondsmith"):
        mpo = whitened_cut(weight, 99, input_moment=moment(30, 1))
    assert mpo.bonds == (12,)
    assert "exact at bonds (12,): bonds 99 are cut down" in caplog.text
    torch.testing.assert_close(mpo.to_matrix(), weight)


def test_propagated_target_minimises_the_propagated_error():
    weight, x, xh = randn(6, 8), randn(8, 50, seed=1), randn(8, 50, seed=2)
    xh = x + 0.3 * xh
    difference, seen = (x - xh) @ xh.T, xh @ xh.T
    target = propagated_target(weight, difference, seen, alpha=1.0, damping=0.0)
    best = scipy.linalg.lstsq(xh.T.numpy(), (weight @ x).T.numpy())[0].T
    torch.testing.assert_close(target, torch.as_tensor(best))
    torch.testing.assert_close(propagated_target(weight, difference, seen, alpha=0.0), weight)
    half = propagated_target(weight, difference, seen, alpha=0.5, damping=0.0)
    torch.testing.assert_close(half, (weight + target) / 2)


def test_propagated_target_of_a_singular_moment():
    weight, x = randn(6, 8), randn(8, 3, seed=1)
    target = propagated_target(weight, 0.1 * x @ x.T, x @ x.T, alpha=1.0, damping=0.0)
    torch.testing.assert_close(target @ x, 1.1 * weight @ x)


@settings(max_examples=20)
@given(st.integers(2, 9), st.integers(2, 9))
def test_relative_error_is_that_of_samples(out_features, in_features):
    weight, other = randn(out_features, in_features), randn(out_features, in_features, seed=1)
    x, g = randn(in_features, 40, seed=2), randn(out_features, 40, seed=3)
    expected = ((g.T @ (weight - other) @ x).norm() / (g.T @ weight @ x).norm()).item()
    assert relative_error(weight, other, x @ x.T, g @ g.T) == pytest.approx(expected)


def test_relative_error_of_nothing():
    zero = torch.zeros(2, 2)
    assert relative_error(zero, zero) == 0.0
    assert relative_error(zero, zero + 1) == float("inf")


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        ({"input_moment": torch.eye(5)}, r"input moment has shape \(5, 5\); the weight needs \(6, 6\)"),
        ({"output_moment": torch.eye(5)}, r"output moment has shape"),
        ({"output_moment": torch.full((4, 4), float("nan"))}, r"output moment holds 16 NaN"),
        ({"output_moment": torch.ones(4, 4) - 2 * torch.eye(4)}, r"output moment is not a second moment"),
        ({"output_moment": torch.ones(4, 4).triu()}, r"not symmetric"),
        ({"output_moment": torch.eye(4) + 3 * (torch.ones(4, 4) - torch.eye(4))}, r"output moment is indefinite"),
    ],
)
def test_bad_moments(moments, message):
    with pytest.raises(ValueError, match=message):
        whitened_cut(torch.ones(4, 6), 2, **moments)
    with pytest.raises(ValueError, match=message):
        cut_spectrum(torch.ones(4, 6), **moments)


def test_an_indefinite_moment_of_the_longer_side():
    indefinite = torch.eye(6) + 3 * (torch.ones(6, 6) - torch.eye(6))
    for call in (whitened_cut, lambda *args, **moments: cut_spectrum(args[0], **moments)):
        with pytest.raises(
            ValueError, match=r"input moment is indefinite: what the weight sees has eigenvalues from -"
        ):
            call(randn(4, 6), 2, input_moment=indefinite)
        with pytest.raises(ValueError, match=r"output moment is indefinite"):
            call(randn(6, 4), 2, output_moment=indefinite)


@pytest.mark.parametrize("bond", [0, -1, 2.5, "3", True])
def test_bad_bonds(bond):
    sites = Sites((2, 3), (3, 2))
    for call in (
        lambda W: whitened_cut(W, bond),
        lambda W: sequential_svd(W, sites, bond),
        lambda W: sequential_svd(W, sites, [bond]),
    ):
        with pytest.raises(ValueError, match=rf"bonds are integers of at least 1, not {bond!r}"):
            call(randn(6, 6))


def test_bad_weights():
    with pytest.raises(ValueError, match=r"weight holds 1 NaN or infinite entries of 4"):
        whitened_cut(torch.tensor([[1.0, float("inf")], [0.0, 1.0]]), 1)
    with pytest.raises(ValueError, match=r"non-empty matrix"):
        sequential_svd(torch.ones(3), Sites((3,), (1,)), 1)
    with pytest.raises(ValueError, match=r"floating point"):
        whitened_cut(torch.ones(3, 3, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match=r"multiply to 4 x 4, the weight is \(4, 5\)"):
        sequential_svd(torch.ones(4, 5), Sites((2, 2), (2, 2)), 1)
    with pytest.raises(ValueError, match=r"at least 1, not 0"):
        whitened_cut(torch.ones(3, 3), 0)
    with pytest.raises(ValueError, match=r"difference of moments has shape \(2, 2\)"):
        propagated_target(torch.ones(3, 3), torch.eye(2), torch.eye(3))


def test_moments_of_differences_that_are_not_finite_are_refused():
    W, C = torch.randn(4, 6), torch.eye(6)
    bad = torch.zeros(6, 6)
    bad[0, 1] = torch.nan
    with pytest.raises(ValueError, match="difference of moments holds 1 NaN or infinite entries of 36"):
        propagated_target(W, bad, C)
    with pytest.raises(ValueError, match="moment of outputs holds 24 NaN or infinite entries of 24"):
        shifted_target(W, torch.full((4, 6), torch.inf), C)
