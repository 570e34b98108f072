"""Bad input ends in one clear sentence and a non-zero exit, before any long work; what is on disk stays as it is."""

from __future__ import annotations

import gzip
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_model, write_text
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, T5Config, ViTConfig

import bondsmith
from bondsmith import ModelError, Recipe, cli
from bondsmith.data import DataError
from bondsmith.recipe import RecipeError, parse_bytes
from bondsmith.rundir import RunError
from bondsmith.stages.matrix_plan import PlanError


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def compress(model: Any, tmp_path: Path, text: Path, **settings: Any) -> bondsmith.Compressed:
    shared = {"keep": 0.6, "calibration": [str(text)], "tokens": 512, "window": 32, "evaluate": False}
    return bondsmith.compress(model, tmp_path / "out", **(shared | settings))


def refuses(error: type[Exception], match: str, model: Any, tmp_path: Path, text: Path, **settings: Any) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(error, match=match) as caught:
        compress(model, tmp_path, text, **settings)
    assert "\n" not in str(caught.value).strip()
    assert sorted(p.name for p in tmp_path.iterdir()) == before, "something was left behind"


# models


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("no/such/dir", "no such directory, and not a hub id"),
        ("./nowhere", "no such directory"),
        ("missing.gguf", "no such file"),
        ("nobody/nothing", "no such directory, and the hub did not give it"),
    ],
)
def test_no_such_model(name: str, match: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuses(ModelError, match, name, tmp_path, text)


def test_a_file_that_is_not_a_model(tmp_path: Path, text: Path) -> None:
    refuses(ModelError, "is a file, not a model", str(text), tmp_path, text)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not at all")
    refuses(ModelError, "not a GGUF file", str(broken), tmp_path, text)
    broken.write_bytes(b"GGUF" + b"\0" * 100)
    refuses(ModelError, "not a model that transformers can open", str(broken), tmp_path, text)


def test_a_directory_without_config_or_weights(model: Path, tmp_path: Path, text: Path) -> None:
    weights = (model / "model.safetensors").rename(model / "other.txt")
    refuses(ModelError, "no .*safetensors", model, tmp_path, text)
    weights.rename(model / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0nonsense")
    refuses(ModelError, "not a readable safetensors file", model, tmp_path, text)
    (model / "config.json").unlink()
    refuses(ModelError, "has no config.json", model, tmp_path, text)


def test_encoders_and_vision_models(tmp_path: Path, text: Path) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(**small, vocab_size=64)).save_pretrained(tmp_path / "bert")
    refuses(ModelError, "not a causal language model .*BertForMaskedLM", tmp_path / "bert", tmp_path, text)
    for name, config, match in (
        ("t5", T5Config(), "encoder-decoder"),
        ("vit", ViTConfig(architectures=["ViTForImageClassification"]), "not a causal language model"),
    ):
        config.save_pretrained(tmp_path / name)
        refuses(ModelError, match, tmp_path / name, tmp_path, text)


def test_quantised_checkpoints(model: Path, compressed: Path, tmp_path: Path, text: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))
    refuses(
        ModelError,
        r"already quantised \(gptq\): load it with transformers, call model\.dequantize",
        model,
        tmp_path,
        text,
    )
    refuses(RecipeError, "a compressed model can only be rounded", compressed, tmp_path, text)


@pytest.mark.parametrize(
    ("name", "value"),
    [("model.layers.1.mlp.up_proj.weight", math.nan), ("model.embed_tokens.weight", math.inf)],
)
def test_nan_or_infinity_in_weights_names_the_matrix(
    name: str, value: float, model: Path, tmp_path: Path, text: Path
) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name][3, 4] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name}: 1 of \d+ weights are NaN"):
        compress(model, tmp_path, text)
    assert not (tmp_path / "out").exists()


def test_overflowing_moments_name_the_matrix(model: Path, tmp_path: Path, text: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e30
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj.*not finite"):
        compress(model, tmp_path, text, metric="input")


def test_no_tokenizer(tmp_path: Path, text: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "bare")
    refuses(ModelError, "has no tokenizer", tmp_path / "bare", tmp_path, text)


# settings


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"keep": 0}, r"keep: 0 is not in \(0, 1\]"),
        ({"keep": -0.5}, "keep: -0.5 is not in"),
        ({"keep": 1.5}, "keep: 1.5 is not in"),
        ({"keep": "much"}, "'much' is not a number"),
        ({"keep": None}, "give a budget: keep"),
        ({"bytes": "0.5", "uniform": True}, "give either keep"),
        ({"keep": None, "bytes": "38XB"}, "neither a share like 0.07 nor a size"),
        ({"keep": None, "bytes": "7"}, "write a unit for a size, e.g. 7MB"),
        ({"metric": "l2"}, "metric: 'l2' is not one of"),
        ({"sites": "round"}, "sites: 'round' is not auto"),
        ({"dtype": "int3"}, "dtype: 'int3'"),
        ({"tokens": 10}, "tokens: 10 do not fill one window of 32"),
        ({"tokens": 1.5}, "tokens: 1.5 is not a whole number"),
        ({"sites": 3}, "sites: 3 is not a text"),
        ({"damping": None}, "damping: None is not a number"),
        ({"propagation_strength": 2}, "propagation_strength: 2 is not in"),
        ({"propagation_parts": 0}, "propagation_parts: 0 is less than 1"),
        ({"damping": 0.0}, "damping: 0.0 is not in"),
        ({"calibration": []}, "at least one SPEC"),
        ({"kep": 0.5}, "unknown setting 'kep'; did you mean keep"),
        ({"keep_dense": ["*.nothing.*"]}, r"'\*\.nothing\.\*' matches no matrix; names look like 'model\.layers\.0"),
    ],
)
def test_settings(settings: dict[str, Any], match: str, model: Path, tmp_path: Path, text: Path) -> None:
    refuses(RecipeError, match, model, tmp_path, text, **settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"keep": 1e-5, "uniform": True}, r"model\.layers\.0\.self_attn\.q_proj: 32 x 32 at keep 1e-05: .* bond 1"),
        (
            {"keep": 1e-5},
            r"parameters: a budget of 0 is out of reach, the least with these bounds and budgets is 10,944",
        ),
        (
            {"keep": None, "bytes": "1kB", "uniform": True},
            r"bytes: 1kB is 0\.0 MB, but embedding, head and norms alone take",
        ),
        ({"keep": None, "bytes": "1kB"}, r"bytes: 1\.0 kB is out of reach, the smallest plan has \d+\.\d kB"),
        ({"sites": "(5,4)(7,8)", "metric": "frobenius"}, r"q_proj: 32 x 32 .*"),
        ({"sites": "thin:7"}, r"32 % 7 = 4"),
    ],
)
def test_impossible_plans(settings: dict[str, Any], match: str, model: Path, tmp_path: Path, text: Path) -> None:
    refuses(PlanError, match, model, tmp_path, text, **settings)


def test_recipe_files(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    with pytest.raises(RecipeError, match="no such recipe file"):
        Recipe.read(path)
    path.write_text("keep: [")
    with pytest.raises(RecipeError, match="not YAML"):
        Recipe.read(path)
    path.write_text("- keep")
    with pytest.raises(RecipeError, match="key: value"):
        Recipe.read(path)
    path.write_text("keep: 0.5\ntokens: 1024\ncalibration: [a.txt, self]\n")
    assert Recipe.read(path, bytes="38MB").keep is None
    recipe = Recipe.read(path, tokens=2048)
    assert (recipe.keep, recipe.tokens, recipe.calibration) == (0.5, 2048, ("a.txt", "self"))
    recipe.save(path)
    assert Recipe.read(path) == recipe


def test_sizes() -> None:
    assert [parse_bytes(t, 100) for t in ("0.07", "1", "38MB", "1.5GiB", "2 kb")] == [
        28,
        400,
        38_000_000,
        1610612736,
        2000,
    ]


# text


def test_texts(model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    refuses(DataError, "is empty", model, tmp_path, empty)
    refuses(DataError, "no such file", model, tmp_path, tmp_path / "gone.txt")
    short = write_text(tmp_path / "short.txt", 40)
    refuses(DataError, r"is too short: \d+ tokens .* 256 are needed \(8 windows of 32\)", model, tmp_path, short)
    table = tmp_path / "table.jsonl"
    table.write_text('{"story": "w3"}\n')
    refuses(DataError, r"none of the columns text, page, messages is there \(found: story\)", model, tmp_path, table)
    table.write_text("no json\n")
    refuses(DataError, "is not JSON lines", model, tmp_path, table)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(b"no gzip")
    refuses(DataError, "is not JSON lines", model, tmp_path, packed)
    packed.write_bytes(gzip.compress(b'{"text": "w3 w4"}\n' * 100)[:-20])
    refuses(DataError, "is not JSON lines", model, tmp_path, packed)
    other = tmp_path / "text.parquet"
    other.write_text("x")
    refuses(DataError, "ends in .txt, .jsonl or .jsonl.gz", model, tmp_path, other)
    refuses(DataError, "hf:DATASET", model, tmp_path, Path("hf:"))


def test_hub_data_sets_fail_clearly(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="hf:nobody/nothing cannot be read"):
        bondsmith.compress(model, tmp_path / "out", keep=0.5, calibration=["hf:nobody/nothing"], evaluate=False)


# directories


def test_an_output_directory_that_is_not_empty_is_kept(model: Path, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    refuses(RunError, "exists and is not empty", model, tmp_path, text)
    assert (out / "thesis.txt").read_text() == "years of work"
    shutil.rmtree(out)
    out.write_text("a file")
    refuses(RunError, "is a file", model, tmp_path, text)


# command line


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["bondsmith", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("compress", "no/such/model", "--out", "OUT", "--keep", "0.5"), "error: no/such/model: no such directory"),
        (("compress", "MODEL", "--out", "OUT", "--keep", "0"), "error: keep: 0.0 is not in"),
        (("compress", "MODEL", "--out", "OUT"), "error: give a budget: keep"),
        (
            ("compress", "MODEL", "--out", "OUT", "--keep", "0.5", "--calibration", "x.txt"),
            "error: x.txt: no such file",
        ),
        (("compress", "MODEL", "--out", "OUT", "--keep", "0.5", "--recipe", "x.yaml"), "error: x.yaml: no such recipe"),
        (("eval", "MODEL", "--tasks", "arc_eazy"), "error: "),
        (("eval", "MODEL", "--tasks", "arc_easy", "--limit", "0"), "error: limit 0"),
        (("eval", "no/such/model", "--tasks", "arc_easy"), "error: no/such/model: no such directory"),
        (("inspect", "MODEL"), "is not a compressed model"),
        (("inspect", "nowhere"), "nowhere is not a model"),
        (("chat", "nowhere/at/all"), "error: nowhere/at/all"),
    ],
)
def test_one_sentence_and_a_non_zero_exit(
    arguments: tuple[str, ...],
    match: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = {"MODEL": str(model), "OUT": str(tmp_path / "out")}
    code, message = run(capsys, monkeypatch, *(places.get(a, a) for a in arguments))
    assert code == 1
    assert match in message
    assert len(message.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
