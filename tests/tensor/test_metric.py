import pytest
import torch

from bondsmith.tensor import metric, moment_root


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(n, seed):
    x = randn(n, 2 * n, seed=seed)
    return x @ x.T / (2 * n)


@pytest.mark.parametrize("n", [5, 8, 21])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_quadratic_reads_panel_by_panel(n, damping, monkeypatch):
    monkeypatch.setattr(metric, "_PANEL", 3)
    X, M = randn(4, n), moment(n, 1)
    full = metric.damped(M, damping)
    torch.testing.assert_close(full, M + damping * M.diagonal().mean() * torch.eye(n))
    torch.testing.assert_close(metric.quadratic(X, M, damping), X @ full @ X.T)
    torch.testing.assert_close(metric.quadratic(X, None), X @ X.T)


def test_damped_is_symmetric_and_leaves_the_moment_alone(monkeypatch):
    monkeypatch.setattr(metric, "_PANEL", 3)
    M = moment(10, 1) + 1e-9 * randn(10, 10)
    before = M.clone()
    full = metric.damped(M, 0.0)
    assert torch.equal(full, full.T)
    torch.testing.assert_close(full, (M + M.T) / 2)
    assert torch.equal(M, before)


@pytest.mark.parametrize("shape", [(6, 11), (11, 6)])
def test_energy_in_every_metric(shape):
    D, C, B = randn(*shape), moment(shape[1], 1), moment(shape[0], 2)
    for input_moment, output_moment in [(None, None), (C, None), (None, B), (C, B)]:
        dense_c = torch.eye(shape[1], dtype=torch.float64) if input_moment is None else C
        dense_b = torch.eye(shape[0], dtype=torch.float64) if output_moment is None else B
        expected = (dense_b @ D @ dense_c @ D.T).trace().item()
        assert metric.energy(D, input_moment, output_moment) == pytest.approx(expected)


def test_root_of_a_singular_moment():
    x = randn(10, 3)
    root = moment_root(x @ x.T, damping=1e-6)
    torch.testing.assert_close(root.root @ root.inverse, torch.eye(10, dtype=torch.float64))
    torch.testing.assert_close(root.moment, metric.damped(x @ x.T, 1e-6))
    assert torch.isfinite(moment_root(torch.zeros(4, 4)).inverse).all()


@pytest.mark.parametrize("rounding", [0.0, -1e-12])
def test_roots_undo_themselves_with_and_without_a_cholesky_factor(rounding):
    M = moment(8, 1)
    vectors = torch.linalg.eigh(M)[1]
    values = torch.linspace(0.5, 2, 8, dtype=torch.float64)
    values[0] = rounding or 0.1
    M = (vectors * values) @ vectors.T
    root, x = moment_root(M, damping=0.0), randn(8, 3)
    assert (root.general_inverse is None) == (rounding == 0)
    torch.testing.assert_close(root.moment, M)
    torch.testing.assert_close(root.whiten(x), root.root.T @ x)
    torch.testing.assert_close(root.unwhiten(root.whiten(x)), x)
    torch.testing.assert_close(M @ root.solve(M @ x), M @ x)
