"""Profile, plan, frontier and compression one after the other, as commands, on a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import save_tiny
from test_cli import run

import bondsmith
from bondsmith.model.source import ModelError
from bondsmith.pipeline import carry_out
from bondsmith.recipe import RecipeError
from bondsmith.rundir import RunError
from bondsmith.stages.matrix_plan import PlanError
from bondsmith.stages.plan import Plan
from bondsmith.stages.profile import Profile

SETTINGS = {"tokens": 4096, "window": 32}


@pytest.fixture(scope="module")
def profiled(original: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that `bondsmith profile` wrote, with probes."""
    folder = tmp_path_factory.mktemp("profiled") / "profile"
    with pytest.MonkeyPatch.context() as patch:
        options = ("--calibration", str(text), "--tokens", "4096", "--window", "32", "--probes", "2")
        run(patch, "profile", str(original), "--out", str(folder), *options)
    return folder


def test_a_profile_holds_curves_of_every_matrix_and_a_page(profiled: Path) -> None:
    profile = Profile.load(profiled)
    assert len(profile.matrices) == 21
    for matrix in profile.matrices:
        losses = matrix.cut_losses()
        assert float(losses[0]) > 0
        assert (losses.diff() <= 0).all()
        assert matrix.left[0] == 1.0
        assert list(matrix.left) == sorted(matrix.left, reverse=True)
    assert [b.reader for b in profile.bonds] == [f"model.layers.{k}.mlp.down_proj" for k in range(3)]
    page = (profiled / "profile.html").read_text()
    assert "<svg" in page
    assert f"bondsmith profile {profile.model}" in page


def test_the_page_of_a_profile_and_its_plan_come_from_the_same_numbers(
    profiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    run(monkeypatch, "plan", str(profiled), "--keep", "0.6", "--out", str(file))
    shown = capsys.readouterr().out
    plan = Plan.load(file)
    assert plan.keep <= 0.6
    assert f"predicted loss {plan.loss:.4f}" in " ".join(shown.split())
    assert "takes about" in shown
    assert "of memory" in " ".join(shown.split())
    run(monkeypatch, "frontier", str(profiled), "--out", str(tmp_path / "page.html"))
    assert "of second order" in " ".join(capsys.readouterr().out.split())
    assert "<svg" in (tmp_path / "page.html").read_text()


def test_the_frontier_of_a_model_carries_points_out(
    monkeypatch: pytest.MonkeyPatch, original: Path, text: Path, tmp_path: Path
) -> None:
    """From a model to the page, and again without making anything twice."""
    home = tmp_path / "home"
    command = ["frontier", str(original), "--profile", str(home), "--calibration", str(text), "--tokens", "1024"]
    command += ["--window", "32"]
    command += ["--carry-out", "keep=0.7", "--carry-out", "0.2"]
    run(monkeypatch, *command)
    made = {name: home / "measured" / name / "results.json" for name in ("keep-0.7", "0.2")}
    assert all("quality" in json.loads(file.read_text()) for file in made.values())
    page = (home / "frontier.html").read_text()
    assert "keep=0.7" in page
    times = {name: file.stat().st_mtime_ns for name, file in made.items()}
    run(monkeypatch, *command)
    assert times == {name: file.stat().st_mtime_ns for name, file in made.items()}
    with pytest.raises(RecipeError, match=r"'loss=1' is no size: write 0.07, 38MB or keep=0.8"):
        carry_out(home, ["loss=1"])


def test_a_compression_is_judged_on_more_texts_than_its_profile_has(
    original: Path, profiled: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / ("other" + "".join(text.suffixes))
    shutil.copy(text, other)
    before = (profiled / "work" / "windows.safetensors").read_bytes()
    done = bondsmith.compress(
        original, tmp_path / "small", profile=str(profiled), keep=0.5, uniform=True, evaluation=[str(other), "self"]
    )
    assert [row["text"] for row in done.results["quality"]] == [text.name, other.name, "self"]
    assert "is not used" not in caplog.text
    assert (profiled / "work" / "windows.safetensors").read_bytes() == before


def test_a_measured_model_scales_what_the_frontier_expects(original: Path, profiled: Path, tmp_path: Path) -> None:
    done = bondsmith.compress(original, tmp_path / "small", profile=str(profiled), keep=0.5)
    plan = Plan.load(done.path / "plan.json")
    kl = sum(row["kl"] for row in done.results["quality"]) / len(done.results["quality"])
    plain = bondsmith.frontier(profiled)
    scaled = bondsmith.frontier(profiled, tmp_path / "page.html", measured={"half": done.path})
    assert [m.predicted for m in scaled.measured] == [plan.loss]
    for before, after in zip(plain.steps, scaled.steps, strict=True):
        assert after.loss == pytest.approx(before.loss * kl / plan.loss)
    assert "half (measured)" in (tmp_path / "page.html").read_text()
    for key, size in scaled.answers.items():
        before = plain.answers[key]
        assert size is None or before is None or (size - before) * (kl - plan.loss) >= 0


def test_a_compression_goes_on_from_a_profile_or_a_plan_to_the_same_weights(
    original: Path, text: Path, profiled: Path, tmp_path: Path
) -> None:
    outs = {
        "profile": {"profile": str(profiled), "keep": 0.6},
        "plan": {"plan": str(tmp_path / "plan.json"), "profile": str(profiled)},
        "alone": {"keep": 0.6, "calibration": [str(text)], "probe_windows": 2} | SETTINGS,
    }
    bondsmith.plan(profiled, tmp_path / "plan.json", keep=0.6)
    found = {}
    for name, settings in outs.items():
        evaluate = name == "alone"  # holds the same text out as the profile does
        done = bondsmith.compress(original, tmp_path / name, evaluate=evaluate, **settings)
        found[name] = done.load().state_dict()
        assert Plan.load(done.path / "plan.json").loss == pytest.approx(Plan.load(tmp_path / "plan.json").loss)
    for name in ("plan", "alone"):
        assert found[name].keys() == found["profile"].keys()
        assert all(torch.equal(t, found["profile"][key]) for key, t in found[name].items())


def test_a_profile_of_an_older_version_lacks_a_setting(original: Path, profiled: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    older.mkdir()
    for entry in profiled.iterdir():
        (older / entry.name).symlink_to(entry)
    (older / "recipe.yaml").unlink()
    settings = yaml.safe_load((profiled / "recipe.yaml").read_text())
    (older / "recipe.yaml").write_text(yaml.safe_dump({k: v for k, v in settings.items() if k != "probe_windows"}))
    done = bondsmith.compress(original, tmp_path / "out", evaluate=False, profile=str(older), keep=0.9)
    assert done.results["size"]["compressed"]["matrix_parameters"] > 0


def test_what_is_no_profile_of_this_model_is_refused(profiled: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="holds no profile"):
        bondsmith.plan(tmp_path, keep=0.5)
    save_tiny(tmp_path / "other", seed=5)
    with pytest.raises(RunError, match="profile of another model"):
        bondsmith.compress(tmp_path / "other", tmp_path / "out", profile=str(profiled), keep=0.5)
    with pytest.raises(RunError, match="holds no profile"):
        bondsmith.compress(tmp_path / "other", tmp_path / "out", profile=str(tmp_path), keep=0.5)
    assert not (tmp_path / "out").exists()


def test_without_memory_for_gradients_the_input_metric_takes_over(
    original: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"calibration": [str(text)], "bytes": "0.3"} | SETTINGS
    monkeypatch.setattr("bondsmith.limits.free_memory", lambda device: 1e5)
    with pytest.raises(RunError, match=r"loss metric needs .* of memory.*input, which needs no gradients"):
        bondsmith.compress(original, tmp_path / "forced", metric="loss", **settings)
    assert not (tmp_path / "forced.partial").exists()
    with pytest.raises(RunError, match="loss metric needs"):
        bondsmith.compress(original, tmp_path / "forced", loss=0.1, calibration=[str(text)])
    with pytest.warns(UserWarning, match="going on with the input metric"):
        done = bondsmith.compress(original, tmp_path / "out", evaluate=False, **settings)
    assert done.results["settings"]["metric"] == "input"
    assert "input metric" in (done.path / "log.txt").read_text()
    chosen = Plan.load(done.path / "plan.json")
    assert chosen.bytes(4) <= 0.3 * done.results["size"]["original"]["bytes_fp32"]
    assert chosen.loss is None
    monkeypatch.undo()
    asked = bondsmith.compress(original, tmp_path / "asked", evaluate=False, metric="input", **settings)
    weights = done.load().state_dict()
    assert all(torch.equal(t, weights[name]) for name, t in asked.load().state_dict().items())
    assert (
        bondsmith.compress(original, tmp_path / "free", evaluate=False, **settings).results["settings"]["metric"]
        == "loss"
    )


def test_a_frontier_is_that_of_the_model_named(
    profiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names that differ after a point (Llama-3.1, Llama-3.2) have profiles of their own, and another model's is refused."""
    for name in ("small-3.1-a", "small-3.2-b"):
        save_tiny(tmp_path / name)
    (tmp_path / "small-3.2-b-profile").symlink_to(profiled)
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "frontier", "small-3.2-b", code=1)
    assert "is the profile of" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "small-3-profile").exists()
    run(monkeypatch, "frontier", "small-3.1-a", "--profile", str(profiled), code=1)


def test_overwriting_deletes_nothing_before_the_model_is_open(profiled: Path, original: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(profiled, home)
    (home / "measured").mkdir()
    with pytest.raises(ModelError):
        bondsmith.profile(tmp_path / "mistyped", home, overwrite=True, metric="frobenius")
    assert (home / "measured").is_dir()
    assert not home.with_name("home.old").exists()
    with pytest.raises(RunError, match="is where the model lies"):
        bondsmith.profile(original, original, overwrite=True)
    with pytest.raises(RunError, match="is where the model lies"):
        bondsmith.compress(original, original.parent, overwrite=True, keep=0.5)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    with pytest.raises(RunError, match="holds something else than a profile"):
        bondsmith.profile(original, tmp_path / "other", overwrite=True)


def test_a_profile_in_the_way_of_a_compression_stays(profiled: Path, original: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(profiled, home)
    before = sorted(p.relative_to(home) for p in home.rglob("*"))
    with pytest.raises(RunError, match="exists and is not empty"):
        bondsmith.compress(original, home, keep=0.5)
    assert sorted(p.relative_to(home) for p in home.rglob("*")) == before


def test_a_profile_without_moments(original: Path, text: Path, tmp_path: Path) -> None:
    found = bondsmith.profile(original, tmp_path / "home", metric="frobenius", calibration=[str(text)], **SETTINGS)
    assert found.path.joinpath("profile.html").is_file()
    plan = bondsmith.plan(tmp_path / "home", bytes="0.55")
    assert plan.loss is None
    assert all(table.grid is not None for table in plan.tables)


def test_embedding_and_head_stay_where_a_pattern_says_so(profiled: Path) -> None:
    names = [table.name for table in Profile.load(profiled).tables]
    plan = bondsmith.plan(profiled, bytes="0.7", keep_dense=[names[-1]])
    assert {table.name: table.grid is None for table in plan.tables} == {name: name == names[-1] for name in names}
    with pytest.raises(RecipeError, match="matches no matrix"):
        bondsmith.plan(profiled, bytes="0.7", keep_dense=["*.no_head"])


def test_channels_that_are_dropped_on_one_side_only_are_seen_before_the_work(
    original: Path, profiled: Path, text: Path, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    bondsmith.plan(profiled, path, keep=0.9, channels=False)
    content = json.loads(path.read_text())
    for entry in content["matrices"]:
        inside = entry["name"].rpartition(".")[2]
        if entry["block"] == 1 and inside in ("gate_proj", "up_proj", "down_proj"):
            for key in ("sites", "bonds", "gauge"):
                entry.pop(key, None)
            if inside != "up_proj":  # forgotten
                entry["columns" if inside == "down_proj" else "rows"] = 40
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj: the plan keeps 64 rows, but .* reads 40 channels"):
        bondsmith.compress(original, tmp_path / "out", plan=str(path), calibration=[str(text)], **SETTINGS)
    assert not list((tmp_path / "out.partial" / "work").glob("fisher/*"))


def test_options_that_would_do_nothing_are_refused(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "profile", str(original), "--out", str(tmp_path / "out"), "--blocks", "0", code=2)
    assert "--blocks: only with --layers" in " ".join(capsys.readouterr().err.split())
    run(monkeypatch, "profile", str(original), "--out", str(tmp_path / "out"), "--layers", "--probes", "2", code=2)
