"""Channels of an MLP: the error is exact, the reader is the best one, and the choice is near the best."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from bondsmith.tensor.channels import eliminate_channels, writer_spectra
from bondsmith.tensor.fit import cut_spectrum
from bondsmith.tensor.metric import moment_root


def moments(out: int, channels: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * channels, channels, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    g = torch.randn(4 * out, out, generator=generator, dtype=torch.float64)
    weight = torch.randn(out, channels, generator=generator, dtype=torch.float64)
    return weight, x.T @ x / len(x), g.T @ g / len(g)


def error_of(weight: torch.Tensor, kept: torch.Tensor, small: torch.Tensor, C: torch.Tensor, B: torch.Tensor) -> float:
    difference = weight.clone()
    difference[:, kept] -= small
    return float(torch.trace(B @ difference @ C @ difference.T))


@pytest.mark.parametrize("block", [1, 3, 16])
def test_the_error_is_that_of_the_refitted_reader_and_no_reader_is_better(block: int) -> None:
    weight, C, B = moments(5, 12)
    found = eliminate_channels(weight, [12, 7, 4], input_moment=C, output_moment=B, damping=1e-12, block=block)
    assert sorted(found) == [4, 7, 12]
    assert found[12].error == 0
    assert torch.equal(found[12].weight, weight)
    for number, channels in found.items():
        assert len(channels.kept) == number
        assert channels.kept.tolist() == sorted(channels.kept.tolist())
        measured = error_of(weight, channels.kept, channels.weight, C, B)
        assert channels.error == pytest.approx(measured, rel=1e-7, abs=1e-9)
        best = weight @ C[:, channels.kept] @ torch.linalg.inv(C[channels.kept][:, channels.kept])
        assert torch.allclose(channels.weight, best, rtol=1e-6, atol=1e-8)


def test_the_choice_is_near_the_best_of_all() -> None:
    ratios = []
    for seed in range(5):
        weight, C, B = moments(4, 9, seed)
        found = eliminate_channels(weight, [5], input_moment=C, output_moment=B, damping=1e-12, block=1)[5]
        errors = []
        for kept in combinations(range(9), 5):
            index = torch.tensor(kept)
            small = weight @ C[:, index] @ torch.linalg.inv(C[index][:, index])
            errors.append(error_of(weight, index, small, C, B))
        errors.sort()
        ratios.append(found.error / errors[0])
        assert found.error < errors[len(errors) // 2], (seed, found.error, errors[:8])
    assert sum(ratios) / len(ratios) < 1.5, ratios


@pytest.mark.parametrize("out", [5, 14])  # more and fewer than the channels that stay
def test_the_spectra_of_what_is_left_are_those_of_matrices_made_anew(out: int) -> None:
    weight, C, B = moments(out, 12)
    found = eliminate_channels(weight, [12, 9, 4], input_moment=C, output_moment=B, damping=1e-12, block=2)
    for channels in found.values():
        S = channels.kept
        anew = cut_spectrum(channels.weight, input_moment=C[S][:, S], output_moment=B, damping=1e-12)
        assert torch.allclose(channels.spectrum(), anew, rtol=1e-6, atol=1e-6 * float(anew[0]))
        lost = found[12].gram.trace() - channels.gram.trace()
        assert float(lost) == pytest.approx(channels.error, abs=1e-9 * float(found[12].gram.trace()))


@pytest.mark.parametrize("metric", [False, True])
def test_the_spectra_of_a_writer_are_those_of_its_rows(metric: bool) -> None:
    weight, C, B = moments(12, 7)
    rows = [torch.tensor([0, 1, 2, 4, 5, 6, 8, 9, 10, 11]), torch.tensor([1, 2, 5, 8, 9, 10, 11]), torch.tensor([2, 9])]
    root, damping = (moment_root(C, 1e-12), 1e-12) if metric else (None, 0.0)
    found = writer_spectra(weight, rows, input_root=root, output_moment=B if metric else None, damping=damping)
    for spectrum, own in zip(found, rows, strict=True):
        small = B[own][:, own] if metric else None
        anew = cut_spectrum(weight[own], input_root=root, output_moment=small, damping=damping)
        assert torch.allclose(spectrum, anew, rtol=1e-6, atol=1e-6 * float(anew[0]))


def test_numbers_that_do_not_exist_are_refused() -> None:
    weight, C, B = moments(3, 6)
    with pytest.raises(ValueError, match="7 of 6 channels"):
        eliminate_channels(weight, [7], input_moment=C, output_moment=B)
    with pytest.raises(ValueError, match="input moment has shape"):
        eliminate_channels(weight, [2], input_moment=B)


def test_moments_without_a_root_are_named() -> None:
    weight, C, B = moments(5, 12)
    worse = torch.eye(5, dtype=torch.float64) + 3 * (1 - torch.eye(5, dtype=torch.float64))
    assert float(torch.linalg.eigvalsh(worse)[0]) < 0
    with pytest.raises(ValueError, match="output moment is singular or indefinite: eigenvalues from -2 to 13"):
        eliminate_channels(weight, [6], input_moment=C, output_moment=worse, damping=0.0)
    with pytest.raises(ValueError, match="input moment is singular or indefinite"):
        eliminate_channels(weight, [6], input_moment=torch.zeros(12, 12), output_moment=B, damping=0.0)
