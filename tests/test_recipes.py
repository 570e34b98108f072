"""The recipes that come with the repository: they are read, and those that need no training are carried out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from conftest import save_tiny, write_text

import bondsmith
from bondsmith.recipe import Recipe
from bondsmith.stages.healing.settings import read_settings
from bondsmith.stages.plan import Plan

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "model"
    save_tiny(path, hidden_size=128, intermediate_size=384, tie_word_embeddings=True)
    write_text(path / "text.txt", 6000)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_read_and_carried_out(path: Path, model: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load(path.read_text())
    if path.stem == "heal":
        assert read_settings(path)
        return
    changes = {"calibration": [str(model / "text.txt")], "tokens": 1024, "window": 32, "blockwise": 0}
    if not {"keep", "bytes"} & set(settings):
        changes["keep"] = 0.6
    if path.stem == "paper-rules":
        changes["keep"] = 0.8  # all three blocks of this model are early ones
    recipe = Recipe.read(path, **changes)
    done = bondsmith.compress(model, tmp_path / "out", recipe, evaluate=False)
    plan = Plan.load(tmp_path / "out" / "plan.json")
    loaded = done.load(dtype=torch.float32)
    assert torch.isfinite(loaded(torch.arange(5, 21).view(1, 16)).logits).all()
    if settings.get("bits") in ([8], [4]):
        assert all(m.grid is not None and m.grid.bits == settings["bits"][0] for m in (*plan.matrices, *plan.tables))
    if "bytes" in settings:
        full = 4 * done.results["size"]["original"]["parameters"]
        written = done.results["size"]["compressed"]["bytes"]
        assert written <= float(settings["bytes"]) * full * 1.02
    if path.stem == "paper-rules":
        for m in plan.matrices:
            share = m.parameters / m.dense_parameters
            assert share == 1 if m.name.endswith("down_proj") else share >= (0.5 if m.block <= 2 else 0.1)
