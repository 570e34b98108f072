"""What windows see of the compressed blocks before is what text that was never fitted would see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny
from torch import Tensor, nn

import bondsmith
from bondsmith import run
from bondsmith.data import Windows
from bondsmith.model.blocks import weight
from bondsmith.stages import propagation

NAME = "self_attn.q_proj"
WINDOW, COUNT = 128, 64  # four batches of 16 windows


def fitted(
    tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> dict[tuple[int, str], Tensor]:
    """Returns the weights of the copies of the first block, by part and name, of windows in their order."""
    found: dict[tuple[int, str], Tensor] = {}
    put = propagation._Copies.put

    def watched(copies: propagation._Copies, part: int, name: str, layer: nn.Module) -> None:
        found.setdefault((part, name), weight(layer).clone())
        put(copies, part, name, layer)

    with monkeypatch.context() as patch:
        patch.setattr(propagation._Copies, "put", watched)
        patch.setattr(run, "split_windows", lambda *args, **options: ([Windows("text", ids, 1)], []))
        patch.setattr(torch, "randperm", lambda count, generator: torch.arange(count))
        shared = {"keep": 0.5, "uniform": True, "metric": "input", "tokens": ids.numel(), "window": WINDOW}
        bondsmith.compress(
            tmp_path / "model",
            tmp_path / "out",
            calibration=str(tmp_path / "text.txt"),
            evaluate=False,
            overwrite=True,
            **(shared | settings),
        )
    return found


@pytest.fixture
def home(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model")
    (tmp_path / "text.txt").write_text("w1 w2 w3")
    return tmp_path


def test_no_copy_is_fitted_to_the_windows_that_run_through_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(3, 500, (COUNT, WINDOW), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0] = ids[1].flip(0)  # one window of the first part is another text
    was, now = (fitted(home, i, monkeypatch, stream_strength=0.0) for i in (ids, other))
    assert {part for part, _ in was} == {0, 1, 2, 3}
    moved = [float((was[part, NAME] - now[part, NAME]).norm() / was[part, NAME].norm()) for part in range(4)]
    assert moved[0] < 1e-4
    assert min(moved[1:]) > 10 * moved[0]


@pytest.mark.parametrize("sites", ["matrix", "interleaved:2"])
def test_parts_lead_to_a_model_of_the_same_form(home: Path, monkeypatch: pytest.MonkeyPatch, sites: str) -> None:
    ids = torch.randint(3, 500, (COUNT, WINDOW), generator=torch.Generator().manual_seed(0))
    sizes = []
    for parts in (1, 4):
        found = fitted(home, ids, monkeypatch, propagation_parts=parts, sites=sites)
        assert {part for part, _ in found} == set(range(parts))
        assert all(torch.isfinite(W).all() for W in found.values())
        sizes.append(bondsmith.load(home / "out").num_parameters())
        assert not list((home / "out").rglob("part-*"))
    assert sizes[0] == sizes[1]


def test_few_windows_are_no_parts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(3, 500, (COUNT // 4, WINDOW), generator=torch.Generator().manual_seed(0))
    assert {part for part, _ in fitted(home, ids, monkeypatch)} == {0}
