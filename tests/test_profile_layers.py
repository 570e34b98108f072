"""The layer profile from the command to the page, its figures against compressions made by hand, and resume."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny
from transformers import AutoModelForCausalLM

from bondsmith import cli, profiling
from bondsmith.model.blocks import replaced_weight
from bondsmith.profiling import LayerSettings, profile_layers
from bondsmith.recipe import RecipeError
from bondsmith.rundir import RunError
from bondsmith.stages.matrix_plan import PlanError
from bondsmith.stages.profile_layers import LayerProfile
from bondsmith.tensor.fit import sequential_svd

SMALL: dict[str, Any] = {"keeps": (0.3, 0.7), "tokens": 1024, "window": 32, "windows": 3}


@pytest.fixture(scope="module")
def plain(original: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LayerProfile, Path]:
    """The paper's profile: sequential SVD of three sites, no moments."""
    out = tmp_path_factory.mktemp("profile") / "plain"
    settings = SMALL | {"metric": "frobenius", "sites": "interleaved:3", "evaluation": [str(text)], "blocks": (2, 0)}
    return profile_layers(original, out, **settings), out


def test_points_are_full_passes_with_one_network_in_place(
    plain: tuple[LayerProfile, Path], original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile, _ = plain
    assert len(profile.points) == 2 * 7 * 2
    assert [p.plan.block for p in profile.points] == [0] * 14 + [2] * 14
    model = AutoModelForCausalLM.from_pretrained(original).eval()
    run = profiling._Run(str(original), Path("/nonexistent"), LayerSettings(**profile.settings), lambda *_: None)
    run.tokenizer = profiling.load_tokenizer(original)
    (windows,) = run.windows()[1]
    for p in (profile.points[3], profile.points[-1]):
        matrix = model.get_submodule(p.plan.name)
        new = sequential_svd(matrix.weight.data, p.plan.sites, p.plan.bonds).to_matrix()
        assert p.error == pytest.approx(float((new - matrix.weight.data).norm() / matrix.weight.data.norm()), rel=1e-3)
        with torch.no_grad(), replaced_weight(matrix, new):
            loss = model(input_ids=windows.ids, labels=windows.ids).loss.item()
        assert p.probe.perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    with torch.no_grad():
        loss = model(input_ids=windows.ids, labels=windows.ids).loss.item()
    assert profile.baseline["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)


def test_file_and_page(plain: tuple[LayerProfile, Path]) -> None:
    profile, out = plain
    assert LayerProfile.load(out).points == profile.points
    content = json.loads((out / "profile-layers.json").read_text())
    assert content["complete"] is True
    assert {p.name for p in out.iterdir()} == {"profile-layers.json", "profile-layers.html"}
    page = (out / "profile-layers.html").read_text()
    assert page.count('class="panel"') == 6
    assert "http" not in page.replace("http-equiv", "")
    assert "0.3" in str(profile.settings["keeps"])
    printed = str(profile)
    assert "KL to the original, nats a token" in printed
    assert "30 % kept" in printed


def test_the_metric_of_the_loss_does_better(original: Path, text: Path, tmp_path: Path) -> None:
    shared = SMALL | {"calibration": [str(text)], "blocks": (1,)}
    means = {}
    for metric in ("frobenius", "input", "loss"):
        found = profile_layers(original, tmp_path / metric, metric=metric, **(shared | {"evaluation": [str(text)]}))
        means[metric] = sum(p.probe.kl for p in found.points) / len(found.points)
    assert means["loss"] < means["frobenius"]
    assert means["input"] < means["frobenius"]


def test_a_killed_run_goes_on(
    original: Path, text: Path, tmp_path: Path, plain: tuple[LayerProfile, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SMALL | {"metric": "frobenius", "sites": "interleaved:3", "evaluation": [str(text)], "blocks": (2, 0)}
    measure, calls = profiling.measure_probes, []

    def dying(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return measure(*args)

    with monkeypatch.context() as patch:
        patch.setattr(profiling, "measure_probes", dying)
        with pytest.raises(KeyboardInterrupt):
            profile_layers(original, tmp_path / "out", **settings)
    kept = LayerProfile.load(tmp_path / "out")
    assert len(kept.points) == 6
    assert not kept.complete
    with pytest.raises(RunError, match="--resume"):
        profile_layers(original, tmp_path / "out", **settings)
    with pytest.raises(RunError, match=r"seed was 0, is 1"):
        profile_layers(original, tmp_path / "out", resume=True, **(settings | {"seed": 1}))
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(profiling, "measure_probes", lambda *args: calls.append(args) or measure(*args))
        done = profile_layers(original, tmp_path / "out", resume=True, **settings)
    assert len(calls) == 14 - 3
    assert done.points == plain[0].points


def test_a_model_that_does_not_fit_gives_the_same(
    original: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SMALL | {"calibration": [str(text)], "blocks": (1, 2)}
    whole = profile_layers(original, tmp_path / "whole", **settings)
    memory = profiling.psutil.virtual_memory()
    monkeypatch.setattr(profiling.psutil, "virtual_memory", lambda: memory._replace(available=1000))
    monkeypatch.setattr("bondsmith.limits.free_memory", lambda device: 1e12)  # the metric stays
    streamed = profile_layers(original, tmp_path / "streamed", **settings)
    for a, b in zip(whole.points, streamed.points, strict=True):
        assert b.probe.kl == pytest.approx(a.probe.kl, rel=1e-4)
    with pytest.raises(RunError, match="self"):
        profile_layers(original, tmp_path / "self", **(settings | {"calibration": ["self"]}))


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_other_families_and_own_samples(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", family)
    found = profile_layers(tmp_path / "model", tmp_path / "out", **SMALL)
    assert found.complete
    assert [t["spec"] for t in found.run["texts"]] == ["self"]
    assert all(p.probe.kl > 0 for p in found.points)


def test_bad_settings(original: Path, text: Path, tmp_path: Path) -> None:
    shared = SMALL | {"metric": "frobenius", "evaluation": [str(text)]}
    for changes, error, message in (
        ({"blocks": (7,)}, PlanError, r"blocks: 7 is not there; the model has blocks 0 to 2"),
        ({"keeps": (1.5,)}, RecipeError, r"shares between 0 and 1"),
        ({"keeps": (0.001,)}, PlanError, r"model\.layers\.0\.self_attn\.q_proj: 32 x 32 at keep 0.001"),
        ({"sites": "thin:7"}, PlanError, r"thin:7 does not divide"),
        ({"metric": "kl"}, RecipeError, r"metric: 'kl' is not one of"),
        ({"window": 1}, RecipeError, r"two tokens"),
    ):
        with pytest.raises(error, match=message):
            profile_layers(original, tmp_path / "out", **(shared | changes))


def test_the_command(original: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    out = tmp_path / "out"
    line = (
        f"bondsmith profile {original} --out {out} --layers --blocks 1 --keeps 0.5 --metric input --calibration {text}"
    )
    monkeypatch.setattr(sys, "argv", [*line.split(), "--tokens", "512", "--window", "32", "--windows", "2"])
    monkeypatch.setattr(cli.out, "width", 200)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert "50 % kept" in capsys.readouterr().out
    assert LayerProfile.load(out).settings["blocks"] == [1]


def test_tasks_are_scored_as_on_the_whole_model(
    original: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    from bondsmith.stages.benchmark import run_tasks

    rows = [{"goal": f"w{i} w{i + 9}", "sol1": f"w{i * 7 % 90} w{i}", "sol2": f"w{i * 5 % 80}"} for i in range(3, 43)]
    lines = (json.dumps(row | {"label": i % 2}) + "\n" for i, row in enumerate(rows))
    (tmp_path / "piqa_validation.jsonl").write_text("".join(lines))
    settings = SMALL | {"metric": "frobenius", "evaluation": [str(text)], "blocks": (2,), "keeps": (0.2,)}
    found = profile_layers(original, tmp_path / "out", tasks=("piqa",), data=str(tmp_path), **settings)
    model = AutoModelForCausalLM.from_pretrained(original).eval()
    tokenizer = profiling.load_tokenizer(original)

    def score() -> float:
        return run_tasks({"it": model}, tokenizer, ["piqa"], data=tmp_path)[0].score

    (before,) = found.baseline["scores"]
    assert (before["task"], before["rows"], before["score"]) == ("piqa", 40, score())
    for p in found.points:
        matrix = model.get_submodule(p.plan.name)
        with replaced_weight(matrix, sequential_svd(matrix.weight.data, p.plan.sites, p.plan.bonds).to_matrix()):
            assert p.scores[0].score == score()
    assert len({p.scores[0].score for p in found.points}) > 2
    assert "piqa, acc_norm, 40 rows" in str(found)
    assert (tmp_path / "out" / "profile-layers.html").read_text().count('class="panel"') == 4


def test_scored_and_calibration_text_are_apart(original: Path, text: Path, tmp_path: Path) -> None:
    settings = LayerSettings(calibration=(str(text),), evaluation=(str(text),), tokens=256, window=32, windows=3)
    run = profiling._Run(str(original), tmp_path, settings, lambda *_: None)
    run.tokenizer = profiling.load_tokenizer(original)
    calibration, scored = run.windows()
    known = {tuple(row.tolist()) for w in calibration for row in w.ids}
    assert sum(len(w.ids) for w in scored) == 3
    assert not known & {tuple(row.tolist()) for w in scored for row in w.ids}


def test_without_memory_for_gradients_the_input_metric_takes_over(
    original: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SMALL | {"calibration": [str(text)], "blocks": (1,), "keeps": (0.5,)}
    monkeypatch.setattr("bondsmith.limits.free_memory", lambda device: 1e5)
    with pytest.raises(RunError, match=r"loss metric needs .* of memory"):
        profile_layers(original, tmp_path / "forced", metric="loss", **settings)
    with pytest.warns(UserWarning, match="going on with the input metric; networks then minimise"):
        found = profile_layers(original, tmp_path / "out", **settings)
    assert found.settings["metric"] == "input"
    assert found.complete
