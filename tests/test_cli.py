"""The commands, run as a user would, on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import write_text

from bondsmith import cli


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, code: int = 0) -> None:
    monkeypatch.setattr(sys, "argv", ["bondsmith", *arguments])
    monkeypatch.setattr(cli.out, "width", 200)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert (end.value.code or 0) == code


@pytest.fixture(scope="module")
def done(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that `bondsmith compress` wrote with a recipe and options over it."""
    folder = tmp_path_factory.mktemp("cli")
    text = write_text(folder / "text.txt")
    rows = folder / "chat.jsonl"
    turns = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7 w8 w9"}]
    rows.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(200)))
    recipe = folder / "recipe.yaml"
    recipe.write_text("keep: 0.9\nwindow: 32\ntokens: 512\nevaluation_windows: 2\n")
    with pytest.MonkeyPatch.context() as patch:
        arguments = (
            "--recipe",
            str(recipe),
            "--keep",
            "0.6",
            "--uniform",
            "--seed",
            "3",
            "--keep-dense",
            "*.layers.0.*",
        )
        texts = ("--calibration", str(text), "--calibration", str(rows), "--calibration", "self")
        run(
            patch,
            "compress",
            str(original),
            "--out",
            str(folder / "out"),
            *arguments,
            *texts,
            "--evaluation",
            str(text),
        )
    return folder / "out"


def test_compress_writes_everything(done: Path) -> None:
    names = {p.name for p in done.iterdir()}
    documents = {"plan.json", "results.json", "log.txt", "report.html", "README.md", "recipe.yaml", "config.json"}
    assert documents | {"tokenizer.json", "generation_config.json", "modeling_bondsmith.py"} <= names
    assert not any(name.endswith((".partial", ".tmp")) or name == "work" for name in names)
    results = json.loads((done / "results.json").read_text())
    assert results["command"].startswith("bondsmith compress ")
    assert "--keep 0.6" in results["command"]
    assert results["settings"]["keep"] == 0.6
    assert results["seed"] == results["settings"]["seed"] == 3
    assert [s["spec"].rpartition("/")[2] for s in results["calibration"]["sources"]] == [
        "text.txt",
        "chat.jsonl",
        "self",
    ]
    assert results["calibration"]["tokens"] >= 512
    assert all(q["perplexity"]["compressed"] > 1 and q["kl"] > 0 for q in results["quality"])
    assert len(results["quality"]) == 3
    assert results["quality_fitted"]["text"] == "calibration"
    assert results["quality_fitted"]["kl"] > 0
    assert results["speed"]["prefill"]["ratio"] > 0
    dense = [n for n in results["networks"] if n["sites"] is None]
    assert len(dense) == 7
    assert all(".layers.0." in n["name"] for n in dense)
    weights = sum(f.stat().st_size for f in done.glob("bondsmith-*.safetensors"))
    assert results["size"]["compressed"]["bytes"] == weights
    log = (done / "log.txt").read_text()
    assert "decompose:" in log
    assert "plan: 21 matrices (7 stay dense)" in log
    assert "bondsmith compress" in (done / "README.md").read_text()


def test_inspect(done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "inspect", str(done))
    table = capsys.readouterr().out
    assert table.count("(32,1)(1,32) gauge") == 4
    assert "model.layers.2.mlp.down_proj" in table
    assert "error (loss)" in table
    assert "multiply-adds per token" in table


def test_inspect_of_a_users_save(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import bondsmith

    bondsmith.load(done).save_pretrained(tmp_path / "mine")
    run(monkeypatch, "inspect", str(tmp_path / "mine"))
    assert "model.layers.2.mlp.down_proj" in capsys.readouterr().out


def test_chat(done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "chat", str(done), "--prompt", "w5 w6", "--max-new-tokens", "5")
    assert capsys.readouterr().out.endswith("\n")
    lines = iter(["w5", ""])
    monkeypatch.setattr(cli.out, "input", lambda prompt: next(lines))
    run(monkeypatch, "chat", str(done), "--max-new-tokens", "3", "--temperature", "1")
    assert next(lines, None) is None


def test_eval_on_local_rows_updates_the_report(
    done: Path, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    row = {"question": "w3 w4", "choices": {"text": ["w5", "w6"], "label": ["A", "B"]}, "answerKey": "A", "id": "1"}
    rows = "".join(json.dumps(row | {"id": str(i)}) + "\n" for i in range(4))
    (tmp_path / "arc_easy_test.jsonl").write_text(rows)
    run(
        monkeypatch,
        *(
            "eval",
            str(done),
            "--tasks",
            "arc_easy",
            "--data",
            str(tmp_path),
            "--limit",
            "3",
            "--against",
            str(original),
        ),
    )
    table = capsys.readouterr().out
    assert "arc_easy" in table
    assert "original" in table
    tasks = json.loads((done / "results.json").read_text())["tasks"]
    assert [(t["task"], t["rows"]) for t in tasks] == [("arc_easy", 3)]
    assert 0 <= tasks[0]["compressed"] <= 1
    assert "arc_easy" in (done / "report.html").read_text()


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "version")
    assert "transformers" in capsys.readouterr().out


def test_the_same_command_gives_the_same_bytes(original: Path, text: Path, tmp_path: Path) -> None:
    import bondsmith

    settings = {"keep": 0.5, "tokens": 512, "window": 32, "evaluate": False, "calibration": ["self", str(text)]}
    first, second = (bondsmith.compress(original, tmp_path / n, **settings).path for n in "ab")
    files = sorted(first.glob("bondsmith-*"))
    assert len(files) == 4
    assert all(f.read_bytes() == (second / f.name).read_bytes() for f in files)
    other = bondsmith.compress(original, tmp_path / "c", **(settings | {"seed": 1})).path
    assert (other / files[1].name).read_bytes() != files[1].read_bytes()


def test_a_loaded_model_can_be_compressed(original: Path, text: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import bondsmith

    settings = {"keep": 0.5, "tokens": 512, "window": 32, "evaluate": False, "calibration": [str(text)]}
    model = AutoModelForCausalLM.from_pretrained(original)
    first = bondsmith.compress(model, tmp_path / "a", **settings)
    second = bondsmith.compress(original, tmp_path / "b", **settings)
    shard = "bondsmith-00002-of-00004.safetensors"
    assert (first.path / shard).read_bytes() == (second.path / shard).read_bytes()
    assert "parameter" in str(second).lower()


def test_a_size_in_bytes_is_kept(original: Path, text: Path, tmp_path: Path) -> None:
    import bondsmith

    settings = {"tokens": 512, "window": 32, "evaluate": False, "calibration": [str(text)]}
    whole = sum(f.stat().st_size for f in original.glob("*.safetensors"))
    done = bondsmith.compress(original, tmp_path / "a", bytes=f"{whole * 0.8 / 1000}kB", **settings)
    written = done.results["size"]["compressed"]["bytes"]
    assert 0.5 * whole < written <= 0.8 * whole
    half = bondsmith.compress(original, tmp_path / "b", bytes="0.8", dtype="bfloat16", **settings)
    assert half.results["size"]["compressed"]["dtype"] == "bfloat16"
