import pytest
import torch

from bondsmith.tensor import Sites, fit_mpo, metric, moment_root, relative_error, whitened_cut


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


def test_a_moment_of_zeros_counts_every_direction_alike():
    W, zeros = randn(12, 6).float(), {6: torch.zeros(6, 6), 12: torch.zeros(12, 12)}
    plain = whitened_cut(W, 3).to_matrix()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for moments in ({"input_moment": zeros[6]}, {"output_moment": zeros[12]}):
            cut = whitened_cut(W.to(dtype), 3, **moments).to_matrix()
            assert torch.isfinite(cut).all()
    assert torch.equal(moment_root(zeros[6]).root, torch.eye(6, dtype=torch.float64))
    assert torch.allclose(whitened_cut(W, 3, input_root=moment_root(zeros[6])).to_matrix(), plain, atol=1e-5)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("negative", [-0.01, -0.3])
def test_a_negative_eigenvalue_is_seen_on_either_side(side, negative):
    W = torch.eye(60, 90, dtype=torch.float64)
    size = 60 if side == "output" else 90
    values = torch.ones(size, dtype=torch.float64)
    values[0] = negative
    Q = torch.eye(size, dtype=torch.float64)
    Q[:60, :60] = torch.linalg.qr(randn(60, 60, seed=1))[0]  # what the weight sees
    with pytest.raises(ValueError, match=f"{side} moment is indefinite"):
        fit_mpo(W, Sites((60, 1), (1, 90)), 10, **{f"{side}_moment": Q * values @ Q.T})


def test_errors_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 4\) stands for no \(3, 4\)"):
        relative_error(randn(3, 4), randn(1, 4))
    with pytest.raises(ValueError, match=r"input moment has shape \(1, 1\)"):
        relative_error(randn(3, 4), randn(3, 4), torch.ones(1, 1))


def test_weights_that_are_trained_are_fitted_without_a_graph():
    W, C, B = torch.nn.Parameter(randn(8, 12).float()), moment(12, 1), moment(8, 2)
    for cut in (
        whitened_cut(W, 3, input_moment=C, output_moment=B),
        fit_mpo(W, Sites((4, 2), (3, 4)), 3, input_moment=C).mpo,
    ):
        assert not any(core.requires_grad for core in cut.cores)
    assert relative_error(W, torch.zeros(8, 12), C, B) == pytest.approx(1)
