import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bondsmith.tensor import (
    Sites,
    fit_mpo,
    parse_sites,
    propagated_target,
    relative_error,
    sequential_svd,
    whitened_cut,
)
from bondsmith.tensor.algebra import move_center
from bondsmith.tensor.metric import DAMPING
from bondsmith.tensor.mpo import fold
from bondsmith.tensor.weighted import _Problem, fit_cores, left_block, leg_moments, put_in, right_block, take_out


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(n, seed):
    x = (
        randn(n, n, seed=seed)
        @ torch.diag(torch.linspace(0.1, 4, n, dtype=torch.float64))
        @ randn(n, 3 * n, seed=seed + 1)
    )
    return x @ x.T / (3 * n) + torch.eye(n)


WEIGHT, C, B = randn(24, 36), moment(36, 1), moment(24, 5)
SITES = [Sites((4, 6), (6, 6)), Sites((2, 3, 4), (3, 4, 3)), Sites((12, 2), (2, 18)), Sites((2, 2, 3, 2), (3, 2, 2, 3))]
METRICS = [{}, {"input_moment": C}, {"output_moment": B}, {"input_moment": C, "output_moment": B}]


@pytest.mark.parametrize("sites", SITES)
@pytest.mark.parametrize("metric", METRICS)
def test_sweeps_never_hurt_and_beat_the_plain_svd(sites, metric):
    fit = fit_mpo(WEIGHT, sites, 6, **metric, damping=0.0)
    assert all(after <= before * (1 + 1e-12) for before, after in zip(fit.history, fit.history[1:], strict=False))
    assert fit.error == pytest.approx(fit.history[-1], rel=1e-6)
    assert fit.error == pytest.approx(relative_error(WEIGHT, fit.mpo.to_matrix(), **metric))
    plain = relative_error(WEIGHT, sequential_svd(WEIGHT, sites, 6).to_matrix(), **metric)
    assert fit.error <= plain * (0.95 if metric else 1 + 1e-12)
    assert fit.mpo.bonds == sites.clip(6)


@pytest.mark.parametrize("sites", SITES[:2])
def test_converged_fit_is_stationary_in_every_core(sites):
    metric = {"input_moment": C, "output_moment": B}
    fit = fit_mpo(WEIGHT, sites, 5, **metric, damping=0.0, tolerance=1e-7, max_sweeps=1000)
    assert fit.converged
    cores = [core.clone().requires_grad_() for core in fit.mpo.cores]
    D = WEIGHT - fold(cores)
    loss = (D * (B @ D @ C)).sum() / (WEIGHT * (B @ WEIGHT @ C)).sum()
    loss.backward()
    for core in cores:
        assert (core.grad.norm() * core.norm() / loss).item() < 1e-2


def test_one_core_is_solved_as_least_squares():
    sites = SITES[1]
    problem = _Problem.whiten(WEIGHT, sites, C, B, 0.1)
    cores = list(sequential_svd(problem.target, sites, 6).cores)
    move_center(cores, 1)
    solved = problem.solve(cores, 1, 400)
    left, right = left_block(cores[:1], WEIGHT), right_block(cores[2:], WEIGHT)
    basis = torch.eye(solved.numel(), dtype=torch.float64).reshape(-1, *solved.shape)
    columns = torch.stack([put_in(left, unit, right) for unit in basis])
    gram = torch.einsum("kij,lij->kl", columns, torch.stack([problem.weigh(c) for c in columns]))
    rhs = torch.einsum("kij,ij->k", columns, problem.weigh(problem.target))
    torch.testing.assert_close(solved.flatten(), torch.linalg.solve(gram, rhs), atol=1e-6, rtol=1e-5)


@settings(max_examples=30)
@given(st.integers(0, 2), st.integers(0, 999))
def test_put_in_and_take_out_are_adjoint(k, seed):
    sites = Sites((2, 3, 4), (3, 1, 2))
    cores = list(sequential_svd(randn(24, 6, seed=seed), sites, 3).cores)
    left, right = left_block(cores[:k], cores[0]), right_block(cores[k + 1 :], cores[0])
    torch.testing.assert_close(put_in(left, cores[k], right), fold(cores))
    other = randn(24, 6, seed=seed + 1)
    inner = (take_out(other, left, right, cores[k].shape) * cores[k]).sum()
    torch.testing.assert_close(inner, (other * fold(cores)).sum())


def test_a_kronecker_metric_is_exact_at_the_start():
    legs = [moment(6, 1), moment(6, 3)]
    metric = {"input_moment": torch.kron(*legs), "output_moment": torch.kron(moment(4, 5), moment(6, 7))}
    fit = fit_mpo(WEIGHT, SITES[0], 8, **metric, damping=0.0)
    assert fit.error == pytest.approx(fit.history[0], rel=2e-2)
    assert len(fit.history) <= 4
    torch.testing.assert_close(torch.kron(*leg_moments(torch.kron(*legs), (6, 6))), torch.kron(*legs))


@pytest.mark.parametrize("sites", [*SITES[:3], parse_sites("matrix", 24, 36)])
def test_propagated_target_is_what_compressed_inputs_ask_for(sites):
    x = randn(36, 200, seed=1)
    xh = x + 0.4 * randn(36, 36, seed=2) @ x / 6 + 0.3 * randn(36, 200, seed=3)
    seen = xh @ xh.T
    target = propagated_target(WEIGHT, (x - xh) @ xh.T, seen, alpha=1.0, damping=0.0)
    options = {"input_moment": seen, "damping": 0.0, "tolerance": 1e-6, "max_sweeps": 300}
    blind, aware = (fit_mpo(W, sites, 5, **options).mpo.to_matrix() for W in (WEIGHT, target))
    lost = [(WEIGHT @ x - matrix @ xh).square().sum() for matrix in (blind, aware, target)]
    assert lost[1] < 0.95 * lost[0]
    # what no matrix can reach, and the error of the fit, add up exactly: the fit needs nothing but target and moment
    torch.testing.assert_close(lost[1], lost[2] + ((target - aware) @ xh).square().sum())


@pytest.mark.parametrize("sites", [SITES[1], parse_sites("matrix", 24, 36)])
def test_single_cores_are_fitted_to_what_the_others_leave(sites):
    metric = {"input_moment": C, "output_moment": B, "damping": 1e-6}
    cores = [
        core + 0.05 * randn(*core.shape, seed=k) for k, core in enumerate(fit_mpo(WEIGHT, sites, 6, **metric).mpo.cores)
    ]

    def error(cores):
        return relative_error(WEIGHT, fold(cores), C, B)

    for which in ([0], [sites.n - 1], [0, 1]):
        found = fit_cores(WEIGHT, cores, which, **metric)
        assert error(found) < 0.9 * error(cores)
        assert all(torch.equal(found[k], cores[k]) for k in range(sites.n) if k not in which)
    (alone,) = (fit_cores(WEIGHT, cores, [0], solver_steps=100, **metric)[k] for k in [0])
    step = 1e-3 * randn(*alone.shape, seed=9)
    assert error([alone, *cores[1:]]) <= min(error([alone + step, *cores[1:]]), error([alone - step, *cores[1:]]))


def test_the_matrix_cut_is_the_closed_form():
    fit = fit_mpo(WEIGHT, parse_sites("matrix", 24, 36), 7, input_moment=C)
    assert torch.equal(fit.mpo.to_matrix(), whitened_cut(WEIGHT, 7, input_moment=C).to_matrix())
    assert fit.converged


@pytest.mark.parametrize("sites", [*SITES, Sites((24,), (36,))])
def test_full_bonds_give_the_weight_back(sites):
    fit = fit_mpo(WEIGHT, sites, 10**6, input_moment=C, output_moment=B)
    torch.testing.assert_close(fit.mpo.to_matrix(), WEIGHT)
    assert fit.converged


def test_dtype_report_and_determinism():
    weight = WEIGHT.to(torch.bfloat16)
    one, two = (fit_mpo(weight, SITES[0], 5, input_moment=C.float(), max_sweeps=2) for _ in range(2))
    assert one.mpo.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(one.mpo.cores, two.mpo.cores, strict=True))
    assert not one.converged
    assert "stopped after 2 sweeps" in str(one)


def test_zero_weight():
    assert fit_mpo(torch.zeros(24, 36), SITES[1], 3, input_moment=C).error == 0


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ({"input_moment": B}, r"input moment has shape \(24, 24\)"),
        ({"output_moment": -B}, r"output moment is not a second"),
    ],
)
def test_bad_moments(metric, message):
    with pytest.raises(ValueError, match=message):
        fit_mpo(WEIGHT, SITES[0], 3, **metric)


def test_a_moment_whose_partial_traces_hide_that_it_is_indefinite():
    """Pauli's x on both legs: symmetric, its partial traces are those of the identity, its eigenvalues go down to -1."""
    flip = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    moment = torch.eye(4, dtype=torch.float64) + 2 * torch.kron(flip, flip)
    for side in ("input_moment", "output_moment"):
        with pytest.raises(ValueError, match=r"put moment is indefinite: eigenvalues from -1 to 3"):
            fit_mpo(torch.randn(4, 4, dtype=torch.float64), Sites((2, 2), (2, 2)), 2, **{side: moment})


def test_the_best_of_all_sweeps_is_kept(monkeypatch):
    errors = iter([0.5, 0.3, 0.4, 0.4])
    kept = []
    monkeypatch.setattr(
        "bondsmith.tensor.weighted._Problem.error", lambda self, cores: kept.append(list(cores)) or next(errors)
    )
    fit = fit_mpo(WEIGHT, SITES[0], 3, input_moment=C, max_sweeps=3, tolerance=-1.0)
    monkeypatch.undo()
    problem = _Problem.whiten(WEIGHT, SITES[0], C, None, DAMPING)
    torch.testing.assert_close(fit.mpo.to_matrix(), problem.unwhiten(kept[1]).to_matrix())
    assert fit.history == (0.5, 0.3, 0.4, 0.4)
