"""The recipes that are shipped: each is valid, and gives a model of the size that it promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import save_tiny

import bondsmith
from bondsmith.recipe import Recipe, RecipeError, ready_recipes
from bondsmith.stages.plan import Plan

TWINS = ("original", "int8", "int8-nearest", "int4", "int4-nf4", "88-percent", "93-percent", "best-at-88", "best-at-93")
RECIPES = [Path(__file__).parent.parent / "recipes" / f"{name}.yaml" for name in TWINS]


PAPER = Path(__file__).parent.parent / "recipes" / "paper-rules.yaml"


@pytest.mark.parametrize("path", [*RECIPES, PAPER], ids=lambda p: p.stem)
def test_a_recipe_is_valid(path: Path) -> None:
    recipe = Recipe.read(path)
    assert Recipe.from_settings(recipe.to_dict()) == recipe


def test_paths_may_be_given_as_such(tmp_path: Path) -> None:
    recipe = Recipe(keep=0.5, profile=tmp_path)  # type: ignore[arg-type]
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.read(tmp_path / "recipe.yaml").profile == str(tmp_path)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model wide enough for scales and headers not to decide its size."""
    path = tmp_path_factory.mktemp("wide") / "llama"
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    save_tiny(path, tie_word_embeddings=True, num_hidden_layers=4, **sizes)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("original", 0.51),
        ("int8", 0.26),
        ("int8-nearest", 0.26),
        ("int4", 0.15),
        ("int4-nf4", 0.15),
        ("88-percent", 0.18),
        ("93-percent", 0.07),
        ("best-at-88", 0.12),
        ("best-at-93", 0.07),
    ],
)
def test_the_twins_have_the_size_they_promise(name: str, share: float, wide: Path, text: Path, tmp_path: Path) -> None:
    recipe = Recipe.read(Path(__file__).parent.parent / "recipes" / f"{name}.yaml")
    recipe = recipe.changed(calibration=(str(text),), tokens=2048, window=64)
    done = bondsmith.compress(wide, tmp_path / "out", recipe, evaluate=False)
    size = done.results["size"]
    assert size["compressed"]["bytes"] <= share * size["original"]["bytes_fp32"]
    planned = Plan.load(done.path / "plan.json").bytes(2)
    assert size["compressed"]["bytes"] == pytest.approx(planned, rel=0.02)
    assert torch.isfinite(done.load()(input_ids=torch.arange(3, 27)[None]).logits).all()


def test_a_ready_recipe_goes_by_its_name(tmp_path: Path) -> None:
    assert set(TWINS) < set(ready_recipes())
    assert Recipe.read(Path("int4")) == Recipe.read(Path(__file__).parent.parent / "recipes" / "int4.yaml")
    assert Recipe.read(Path("fast"), keep=0.6).gradient_share < 0.2
    with pytest.raises(RecipeError, match=r"int5: no such recipe file; the ready recipes are .*int4"):
        Recipe.read(Path("int5"))


@pytest.mark.slow
def test_the_rules_of_the_paper_are_kept(wide: Path, text: Path, tmp_path: Path) -> None:
    recipe = Recipe.read(PAPER).changed(keep=0.7, calibration=(str(text),), tokens=2048, window=64)
    plan = Plan.load(bondsmith.compress(wide, tmp_path / "out", recipe, evaluate=False).path / "plan.json")
    others = [m for m in plan.matrices if not m.name.endswith("down_proj")]
    assert sum(m.parameters for m in others) <= 0.7 * sum(m.dense_parameters for m in others)
    for m in plan.matrices:
        if m.name.endswith("down_proj"):
            assert m.parameters == m.dense_parameters
        assert m.parameters >= (0.5 if m.block < 3 else 0.1) * m.dense_parameters
    assert any(m.parameters < 0.5 * m.dense_parameters for m in plan.block(3))
