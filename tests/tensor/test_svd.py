import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from bondsmith.tensor import svd


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decaying(m, n, power):
    rank = min(m, n)
    left, right = (torch.linalg.qr(randn(size, rank, seed=size))[0] for size in (m, n))
    return left * (1.0 + torch.arange(rank, dtype=torch.float64)) ** -power @ right.T


@given(st.integers(1, 20), st.integers(1, 20), st.data())
def test_small_matrices_are_exact(m, n, data):
    rank = data.draw(st.integers(1, min(m, n)))
    matrix = randn(m, n, seed=m + 20 * n)
    U, s, Vh = svd.truncated_svd(matrix, rank)
    left, values, right = scipy.linalg.svd(matrix.numpy())
    torch.testing.assert_close(s, torch.as_tensor(values[:rank]))
    torch.testing.assert_close(U * s @ Vh, torch.as_tensor(left[:, :rank] * values[:rank] @ right[:rank]))


@pytest.mark.parametrize("shape", [(160, 240), (240, 160)])
@pytest.mark.parametrize("power", [0.3, 1.0])
def test_subspace_iteration_is_within_a_percent(shape, power, monkeypatch):
    monkeypatch.setattr(svd, "DENSE_UP_TO", 8)
    matrix = decaying(*shape, power)
    U, s, Vh = svd.truncated_svd(matrix, 40)
    best = torch.linalg.svdvals(matrix)[40:].norm()
    assert best <= (matrix - U * s @ Vh).norm() <= 1.01 * best
    torch.testing.assert_close(U.T @ U, torch.eye(40, dtype=torch.float64))
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(40, dtype=torch.float64))
    again = svd.truncated_svd(matrix, 40)
    assert all(torch.equal(a, b) for a, b in zip((U, s, Vh), again, strict=True))


def test_most_vectors_wanted_is_dense(monkeypatch):
    monkeypatch.setattr(svd, "DENSE_UP_TO", 8)
    gram = decaying(60, 60, 0.5) @ decaying(60, 60, 0.5).T
    vectors = svd.leading_eigenvectors(gram, 50)
    kept = (vectors.T @ gram @ vectors).trace()
    torch.testing.assert_close(kept, torch.linalg.eigvalsh(gram)[10:].sum())


def test_rank_deficient_and_float32():
    matrix = (randn(30, 3) @ randn(3, 20)).float()
    U, s, Vh = svd.truncated_svd(matrix, 5)
    assert (U.dtype, s.dtype, Vh.dtype) == (torch.float32,) * 3
    torch.testing.assert_close(U * s @ Vh, matrix, atol=1e-5, rtol=1e-5)


def test_a_matrix_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="matrix holds 1 NaN or infinite entries of 6"):
        svd.truncated_svd(torch.tensor([[1.0, torch.inf, 0.0], [0.0, 1.0, 2.0]]), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_that_are_not_there_stay_finite(dtype):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-3, 4, shape, generator=generator).to(dtype) for shape in ((20, 2), (2, 30)))
    M = left @ right
    U, s, Vh = svd.truncated_svd(M, 20)
    assert torch.allclose(U * s @ Vh, M, atol=1e-4)
    assert torch.allclose(Vh @ Vh.T, torch.eye(20, dtype=dtype), atol=1e-4)
    assert float(s[2:].max()) < 1e-5 * float(s[0])
    assert torch.equal(svd.fix_signs(U), U)


@pytest.mark.parametrize("rank", [0, -1, 2.5, True])
def test_a_rank_that_is_none(rank):
    with pytest.raises(ValueError, match=f"a rank of {rank!r} is no whole number from 1 on"):
        svd.truncated_svd(torch.eye(3), rank)
