"""The ridge of a regression, chosen on parts that were left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bondsmith.tensor.regression import RIDGES, Choice, LeftOut

INPUTS, OUTPUTS, TOKENS = 24, 6, 40


def parts(noise: float, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Four parts of rows `x` and `e = A x + noise`."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(OUTPUTS, INPUTS, generator=generator) / INPUTS**0.5
    found = []
    for _ in range(4):
        x = torch.randn(TOKENS, INPUTS, generator=generator) * torch.linspace(0.2, 2.0, INPUTS)
        found.append((x, x @ A.T + noise * torch.randn(TOKENS, OUTPUTS, generator=generator)))
    return found


def choose(rows: list[tuple[Tensor, Tensor]], B: Tensor | None) -> tuple[float, float]:
    choice = Choice(B)
    for i, (x, e) in enumerate(rows):
        xs, es = (torch.cat([r[n] for j, r in enumerate(rows) if j != i]) for n in (0, 1))
        left_out = LeftOut.of(xs.T @ xs / len(xs), x.T @ x / len(x), float(len(x)))
        choice.see(left_out, es.T @ xs / len(xs), e.T @ x / len(x))
    return choice.best()


def left_out_loss(rows: list[tuple[Tensor, Tensor]], B: Tensor, ridge: float, strength: float) -> float:
    """The same, row by row: fitted to three parts, judged on the fourth."""
    total = 0.0
    for i, (x, e) in enumerate(rows):
        xs, es = (torch.cat([r[n] for j, r in enumerate(rows) if j != i]) for n in (0, 1))
        C = xs.T @ xs / len(xs)
        X = strength * torch.linalg.solve(C + ridge * C.diagonal().mean() * torch.eye(INPUTS), xs.T @ es / len(xs)).T
        error = e - x @ X.T
        total += float(((error @ B) * error).sum())
    return total


@pytest.mark.parametrize("noise", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("metric", [False, True])
def test_the_choice_is_the_best_of_all_on_rows_left_out(noise: float, metric: bool) -> None:
    rows = parts(noise)
    B = torch.diag(torch.linspace(0.1, 3.0, OUTPUTS)) if metric else torch.eye(OUTPUTS)
    ridge, strength = choose(rows, B if metric else None)
    table = {(r, s / 50): left_out_loss(rows, B, r, s / 50) for r in RIDGES for s in range(51)}
    assert left_out_loss(rows, B, ridge, strength) <= min(table.values()) * (1 + 1e-5)
    if noise == 0:
        assert (ridge, strength) == (RIDGES[0], pytest.approx(1.0, abs=0.01))


def test_noise_alone_asks_for_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = [
        (torch.randn(60, INPUTS, generator=generator), torch.randn(60, OUTPUTS, generator=generator)) for _ in range(4)
    ]
    ridge, strength = choose(rows, None)
    assert strength / (1 + ridge) < 0.2


def test_more_noise_asks_for_more_ridge_or_less_strength() -> None:
    found = [choose(parts(noise, seed=3), None) for noise in (0.0, 4.0)]
    assert found[1][0] > found[0][0] or found[1][1] < found[0][1]
