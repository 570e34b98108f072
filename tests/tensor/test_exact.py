import pytest
import torch

from bondsmith.tensor import best_count, exact_cut, exact_spectrum, moment_root, relative_error, whitened_cut


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(n, seed):
    x = randn(n, 3 * n, seed=seed) * torch.linspace(0.05, 3, n, dtype=torch.float64)[:, None]
    x = x + 0.5 * randn(n, n, seed=seed + 1) @ x / n**0.5
    return x @ x.T / (3 * n)


@pytest.mark.parametrize("shape", [(12, 21), (21, 12)])
@pytest.mark.parametrize("side", ["columns", "rows"])
@pytest.mark.parametrize(("with_input", "with_output"), [(False, False), (True, False), (False, True), (True, True)])
def test_the_spectrum_is_the_error_and_no_move_lowers_it(shape, side, with_input, with_output):
    W, damping = randn(*shape), 1e-2
    C, B = (moment(shape[1], 1) if with_input else None), (moment(shape[0], 3) if with_output else None)
    options = {"side": side, "input_moment": C, "output_moment": B, "damping": damping}
    found = exact_cut(W, 4, 5, **options)
    full_c = torch.eye(shape[1], dtype=torch.float64) if C is None else moment_root(C, damping).moment
    full_b = torch.eye(shape[0], dtype=torch.float64) if B is None else moment_root(B, damping).moment

    def energy(matrix):
        D = W - matrix
        return (D * (full_b @ D @ full_c)).sum()

    values = exact_spectrum(W, 4, **options)
    torch.testing.assert_close(energy(found.to_matrix()), values[5:].square().sum())
    exact, factors = found.exact.clone().requires_grad_(), [c.clone().requires_grad_() for c in found.mpo.cores]
    moved = type(found)(exact, type(found.mpo)(tuple(factors)), found.order, side)
    gradients = torch.autograd.grad(energy(moved.to_matrix()), [exact, *factors])
    assert all(gradient.norm() < 1e-9 * W.norm() ** 2 for gradient in gradients)
    assert found.parameters == found.exact.numel() + 5 * (sum(shape) - 4 - 5)


def test_loud_channels_are_worth_it():
    W, loud = randn(24, 60), torch.ones(60, dtype=torch.float64)
    places = torch.arange(1, 60, 6)
    loud[places] = 10.0
    C = torch.diag(loud**2)
    found = exact_cut(W, 10, 8, input_moment=C)
    assert torch.equal(found.order[:10], places)
    bond = next(k for k in range(1, 24) if k * (24 + 60 - k) >= found.parameters)
    plain = whitened_cut(W, bond, input_moment=C).to_matrix()
    assert relative_error(W, found.to_matrix(), C) < 0.9 * relative_error(W, plain, C)


@pytest.mark.parametrize("side", ["columns", "rows"])
def test_the_best_count_keeps_the_budget_and_knows_its_error(side):
    W, loud = randn(40, 40), torch.ones(40, dtype=torch.float64)
    loud[::8] = 20.0
    moments = {"input_moment" if side == "columns" else "output_moment": torch.diag(loud**2)}
    budget = 900
    count, bond, error = best_count(W, budget, side=side, **moments, damping=0.0)
    found = exact_cut(W, count, bond, side=side, **moments, damping=0.0)
    assert found.parameters <= budget
    D = W - found.to_matrix()
    scaled = D * loud if side == "columns" else D * loud[:, None]
    torch.testing.assert_close(scaled.square().sum().item(), error)
    assert best_count(W, budget, side=side, **moments, damping=0.0, shares=())[2] > error
    assert best_count(W, budget, side=side, damping=0.0, shares=(0.9,))[0] == 0
    with pytest.raises(ValueError, match=r"need 79 parameters at bond 1"):
        best_count(W, 10)


def test_dtype_and_bad_counts():
    W = randn(6, 8).float()
    found = exact_cut(W, 2, 3, input_moment=moment(8, 1))
    assert found.to_matrix().dtype == found.exact.dtype == torch.float32
    for count in (0, 8):
        with pytest.raises(ValueError, match=rf"{count} exact ones of 8"):
            exact_cut(W, count, 3)
    with pytest.raises(ValueError, match=r"input moment has shape \(6, 6\)"):
        exact_cut(W, 2, 3, input_moment=moment(6, 1))
    with pytest.raises(ValueError, match=r"output moment has shape \(5, 5\)"):
        exact_spectrum(W, 2, output_moment=moment(5, 1))
    indefinite = torch.eye(8) + 3 * (torch.ones(8, 8) - torch.eye(8))
    with pytest.raises(ValueError, match=r"input moment is indefinite"):
        exact_cut(W, 2, 3, input_moment=indefinite)


def test_moments_of_few_tokens_and_large_budgets():
    X = randn(5, 16)
    cut = exact_cut(randn(10, 16), 8, 2, input_moment=X.T @ X / 5, damping=0.0)
    assert torch.isfinite(cut.to_matrix()).all()
    count, bond, _ = best_count(randn(10, 4), 200)
    assert 0 <= count < 4
    assert bond >= 1
