"""Corrections of what was lost before: ridge and strength are judged on windows left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny

import bondsmith
from bondsmith.recipe import Recipe
from bondsmith.stages import propagation
from bondsmith.tensor.regression import RIDGES, Choice


@pytest.fixture
def home(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model")
    words = torch.randint(0, 250, (9000,), generator=torch.Generator().manual_seed(2)).tolist()
    (tmp_path / "text.txt").write_text(" ".join(f"w{n}" for n in words))
    return tmp_path


def chosen(home: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[tuple[float, float]]:
    """Returns ridge and strength of all corrections of a compression."""
    found: list[tuple[float, float]] = []
    best = Choice.best

    def watched(choice: Choice) -> tuple[float, float]:
        found.append(best(choice))
        return found[-1]

    monkeypatch.setattr(Choice, "best", watched)
    shared: dict[str, Any] = {"keep": 0.5, "uniform": True, "metric": "input", "tokens": 8192, "window": 64}
    text = str(home / "text.txt")
    options = shared | {"calibration": text, "evaluate": False, "overwrite": True} | settings
    bondsmith.compress(home / "model", home / "out", **options)
    return found


def test_every_matrix_has_its_own_ridge_and_strength(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = chosen(home, monkeypatch)
    assert len(found) == 21
    assert {ridge for ridge, _ in found} <= set(RIDGES)
    assert all(0 <= strength <= 1 for _, strength in found)
    assert found[:3] == [(RIDGES[-1], 0.0)] * 3  # nothing is lost before the first matrices
    assert sum(strength > 0 for _, strength in found) > 10
    assert not list((home / "out").rglob("part-*"))


@pytest.mark.parametrize("settings", [{"tokens": 1024}, {"propagation_parts": 1}])
def test_where_no_part_is_left_out_nothing_is_judged(
    home: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    assert chosen(home, monkeypatch, **settings) == []


@pytest.mark.parametrize(("batches", "parts"), [(4, 4), (9, 4), (5, 1), (7, 3)])
def test_batches_are_dealt_out_whole(batches: int, parts: int) -> None:
    given = [(16 * i, 16) for i in range(batches)]
    dealt = propagation._dealt(given, parts)
    assert [batch for part in dealt for batch in part] == given
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_the_sums_of_all_parts_are_those_of_the_whole(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen(home, monkeypatch, propagation_parts=1)
    one = bondsmith.load(home / "out", dtype=torch.float32)
    monkeypatch.setattr(
        Choice, "best", lambda choice: (Recipe(keep=0.5).damping, propagation.FEW)
    )  # what one part takes
    chosen(home, monkeypatch, propagation_parts=4)
    four = bondsmith.load(home / "out", dtype=torch.float32)
    ids = torch.randint(3, 250, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(one(ids).logits, four(ids).logits, atol=2e-3, rtol=1e-2)
