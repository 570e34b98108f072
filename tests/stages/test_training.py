"""The steps that move cores: all directions of a gradient alike, whatever its size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bondsmith.nn import MPOLinear
from bondsmith.stages import training
from bondsmith.stages.training import Steps, trainable
from bondsmith.tensor import Sites


def step(gradients: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Returns how far one step moves the two cores of a matrix cut, each over the size of the core and the rate."""
    torch.manual_seed(0)
    layer = MPOLinear(Sites((40, 1), (1, 30)), 20, bias=False)
    cores = [core.weight for core in layer.cores]
    before = [core.detach().clone() for core in cores]
    module = nn.Sequential(layer)
    optimizer = Steps(module, trainable(module), 0.01, 0.01)
    for core, gradient in zip(cores, gradients, strict=True):
        core.grad = gradient.clone()
    optimizer.step()
    pairs = zip(cores, before, strict=True)
    return [(core.detach() - old) / (0.01 * old.square().mean().sqrt()) for core, old in pairs]


def uneven() -> tuple[Tensor, Tensor]:
    """Gradients whose singular values fall a hundredfold."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for rows, columns in ((40, 20), (20, 30)):
        u, _, vt = torch.linalg.svd(torch.randn(rows, columns, generator=generator), full_matrices=False)
        found.append(u * torch.logspace(0, -2, 20) @ vt)
    return found[0], found[1]


def test_a_step_moves_all_directions_alike() -> None:
    for moved, gradient in zip(step(uneven()), uneven(), strict=True):
        values = torch.linalg.svdvals(moved)
        assert values.max() / values.min() < 1.5
        assert float(moved.square().mean()) == pytest.approx(1, rel=1e-4)
        assert float((moved * gradient).sum()) < 0


@pytest.mark.parametrize("size", [1e-10, 1e-5, 1e5, 1e15])
def test_the_size_of_a_gradient_does_not_matter(size: float) -> None:
    large = step((size * uneven()[0], size * uneven()[1]))
    for moved, expected in zip(large, step(uneven()), strict=True):
        assert torch.allclose(moved, expected, atol=0.02)


def test_without_a_gradient_nothing_moves() -> None:
    assert all(
        torch.equal(moved, torch.zeros_like(moved)) for moved in step((torch.zeros(40, 20), torch.zeros(20, 30)))
    )


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
def test_strips_of_a_wide_core_are_level_by_themselves(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]) -> None:
    monkeypatch.setattr(training, "_STRIP", 8)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    level = torch.zeros(shape)
    training._add_levels([matrix], [level], [1.0])
    strips = (level if shape[0] < shape[1] else level.T).tensor_split(3)
    for strip in strips:
        values = torch.linalg.svdvals(strip)
        assert len(strip) <= 8
        assert values.max() / values.min() < 1.5
        assert float(strip.square().mean()) == pytest.approx(1, rel=1e-4)
