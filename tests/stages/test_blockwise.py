"""Block-wise distillation: a block learns to give what the original gives, never does worse on held-out windows, and resumes by files."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny, tiny_model, write_text
from safetensors.torch import load_file

import bondsmith
from bondsmith.model.blocks import BlockRunner
from bondsmith.model.hub import replace_matrices
from bondsmith.nn.free import free_all
from bondsmith.recipe import Recipe, RecipeError
from bondsmith.stages import blockwise
from bondsmith.stages.blockwise import Lesson, distill
from bondsmith.stages.job import Job
from bondsmith.stages.streams import Stream
from bondsmith.stages.training import trainable


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("blockwise") / "model"
    save_tiny(path)
    write_text(path / "text.txt", 4000)
    return path


def compress(home: Path, out: Path, **settings: Any) -> bondsmith.Compressed:
    shared = {
        "keep": 0.5,
        "uniform": True,
        "calibration": [str(home / "text.txt")],
        "tokens": 4096,
        "window": 64,
        "evaluate": False,
    }
    return bondsmith.compress(home, out, **(shared | settings))


def test_training_brings_the_output_closer_and_the_file_keeps_its_form(home: Path, tmp_path: Path) -> None:
    settings = {"evaluate": True, "stream_strength": 0.0}  # which brings the output closer in closed form
    plain = compress(home, tmp_path / "plain", **settings)
    trained = compress(home, tmp_path / "trained", blockwise=3, blockwise_rate=0.01, **settings)
    rows = trained.results["blockwise"]
    assert [r["block"] for r in rows] == [0, 1, 2]
    assert all(r["after"] <= r["before"] for r in rows)
    assert rows[0]["kept"]
    assert rows[0]["after"] < 0.99 * rows[0]["before"]
    assert trained.results["quality"][0]["kl"] < plain.results["quality"][0]["kl"]
    files = [load_file(run.path / "bondsmith-00002-of-00004.safetensors") for run in (plain, trained)]
    assert {n: (t.shape, t.dtype) for n, t in files[0].items()} == {n: (t.shape, t.dtype) for n, t in files[1].items()}
    assert trained.load() is not None
    assert "blockwise" not in plain.results


def lesson(tmp_path: Path, windows: int = 8) -> tuple[Lesson, torch.nn.Module]:
    model = tiny_model("llama")
    runner = BlockRunner(model)
    ids = torch.randint(3, 500, (windows, 32), generator=torch.Generator().manual_seed(0))
    streams = [Stream(tmp_path / name, (windows, 32, 32)) for name in ("compressed", "original", "target")]
    with torch.no_grad():
        entering = runner.enter(ids)
        streams[0].write([entering + 0.1 * torch.randn_like(entering)])
        streams[1].write([entering])
        streams[2].write([runner.block(0, ids, entering)])
    block = tiny_model("llama", seed=1).model.layers[0]
    networks = {"mlp.up_proj": {"sites": [[64, 1], [1, 32]], "bonds": [6], "gauge": True}}
    replace_matrices(block, networks)
    return Lesson(runner, 0, ids, *streams, torch.device("cpu")), block


def recipe(**settings: Any) -> Recipe:
    return Recipe(keep=0.5, blockwise=3, **settings)


def test_a_training_that_hurts_is_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, block = lesson(tmp_path)
    before = {n: t.clone() for n, t in block.state_dict().items()}
    monkeypatch.setattr(blockwise, "_backward", _away)
    same, outcome = distill(task, block, recipe(), torch.float32)
    assert same is block
    assert not outcome.kept
    assert outcome.after == outcome.before
    assert outcome.epochs == blockwise.PATIENCE
    assert all(torch.equal(t, before[n]) for n, t in block.state_dict().items())


def _away(task: Lesson, block: torch.nn.Module, index: torch.Tensor, settings: Recipe) -> None:
    for parameter in trainable(block).values():
        parameter.grad = -parameter.detach()  # every step makes everything larger


@pytest.mark.parametrize("setting", [{}, {"blockwise_view": 0.5}, {"blockwise_ahead": 2}])
def test_every_view_learns_and_only_networks_and_norms_move(tmp_path: Path, setting: dict[str, float]) -> None:
    task, block = lesson(tmp_path)
    if "blockwise_ahead" in setting:
        runner = task.runner
        ahead = tuple(partial(runner.block, k) for k in (1, 2))
        task = replace(task, ahead=ahead)
    before = {n: t.clone() for n, t in block.state_dict().items()}
    trained, outcome = distill(task, block, recipe(**setting), torch.float32)
    assert outcome.kept
    assert outcome.after < outcome.before
    after = trained.state_dict()
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    assert moved <= {n for n in after if "up_proj.cores" in n or "up_proj.pivots" in n or "layernorm" in n}
    assert any("cores" in n for n in moved)
    assert not any(p.requires_grad for p in trained.parameters())


def test_windows_that_judge_are_not_fitted_to(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Job] = []
    fitted = Job.fitted
    monkeypatch.setattr(Job, "fitted", lambda job: (jobs.append(job), fitted(job))[1])
    compress(home, tmp_path / "small", blockwise=1)
    job = jobs[0]
    taught = len(job.ids) - job.recipe.held_out(len(job.ids))
    assert len(job.ids) == 64
    assert taught == 60
    assert [w for first, count in fitted(job) for w in range(first, first + count)] == list(range(taught))


def test_the_free_form_is_the_same_operator(tmp_path: Path) -> None:
    _, block = lesson(tmp_path)
    x = torch.randn(5, 32)
    expected = block.mlp.up_proj(x)
    assert free_all(block) == ["mlp.up_proj"]
    assert not block.mlp.up_proj.gauge
    assert torch.allclose(block.mlp.up_proj(x), expected, atol=1e-5)
    left, right = (core.weight for core in block.mlp.up_proj.cores)
    assert torch.allclose(left.T @ left, right @ right.T, atol=1e-4), "not balanced"


def test_a_killed_run_goes_on_with_the_same_bytes(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compress(home, tmp_path / "whole", blockwise=2)
    train = blockwise.distill
    calls: list[int] = []

    def dies(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*args)

    monkeypatch.setattr(blockwise, "distill", dies)
    with pytest.raises(KeyboardInterrupt):
        compress(home, tmp_path / "again", blockwise=2)
    monkeypatch.undo()
    again = compress(home, tmp_path / "again", blockwise=2, resume=True)
    for file in whole.path.glob("bondsmith-*"):
        assert (again.path / file.name).read_bytes() == file.read_bytes()
    assert json.dumps(again.results["blockwise"]) == json.dumps(whole.results["blockwise"])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"propagate": False}, "set propagate to true"),
        ({"metric": "frobenius"}, "set propagate to true and metric"),
        ({"tokens": 512}, "one to train on and one held out"),
        ({"blockwise": -1}, "negative"),
        ({"blockwise_rate": 0.0}, r"blockwise_rate: 0\.0 is not in"),
        ({"blockwise_view": 1.0}, r"blockwise_view: 1\.0 is not in"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        Recipe.from_settings({"keep": 0.5, "blockwise": 2} | settings)
