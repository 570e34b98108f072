"""Estimates against real compressions of tiny models, and for a model that no test machine could hold."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import FAMILIES, save_tiny, tiny_config

import bondsmith
from bondsmith import cli
from bondsmith.model import facts
from bondsmith.model.facts import read_facts
from bondsmith.model.source import ModelError
from bondsmith.recipe import Recipe, RecipeError
from bondsmith.stages.estimate import estimate, smallest_plan
from bondsmith.stages.matrix_plan import PlanError
from bondsmith.stages.rates import Speed, measure_speed

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A directory with the configuration of a Llama of 70 billion parameters and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    return tmp_path


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_a_compression(family: str, text: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", family)
    found = estimate(read_facts(tmp_path / "model"), Recipe(keep=0.6))
    shared = {"calibration": [str(text)], "tokens": 1024, "window": 32, "evaluate": False}
    done = bondsmith.compress(tmp_path / "model", tmp_path / "out", keep=0.6, uniform=True, **shared)
    before, after = done.results["size"]["original"], done.results["size"]["compressed"]
    assert found.facts.parameters == before["parameters"] == model.num_parameters()
    assert found.facts.stored_bytes == before["bytes"]
    assert found.plan.parameters == after["parameters"]
    assert list(found.multiply_adds) == [before["multiply_adds"], after["multiply_adds"]]
    assert found.bytes == pytest.approx(after["bytes"], rel=0.03)  # headers of tiny files are estimated
    assert str(found.facts.dtype).removeprefix("torch.") == before["dtype"]
    with torch.no_grad():
        layers = model(input_ids=torch.zeros(1, 6, dtype=torch.int64), use_cache=True).past_key_values.layers
    assert found.facts.cache_per_token == sum(t.numel() for x in layers for t in (x.keys, x.values)) // 6


def test_a_large_model_takes_seconds(large: Path) -> None:
    start = time.perf_counter()
    facts = read_facts(large)
    found = estimate(facts, Recipe(keep=0.5), measure_speed())
    assert time.perf_counter() - start < 30
    assert facts.parameters == 70_553_706_496
    assert (facts.stored_bytes, facts.dtype) == (2 * facts.parameters, torch.bfloat16)
    assert facts.cache_per_token == 2 * 80 * 8 * 128
    assert found.plan.keep == pytest.approx(0.5, abs=0.01)
    assert found.needs.seconds is not None
    assert sum(found.needs.seconds.values()) > 3600
    printed = str(found)
    for piece in ("70.55 B", "282.21 GB", "141.11 GB", "327.7 MB", "memory at the peak", "its configuration"):
        assert piece in printed


def test_needs_grow_with_what_makes_them(large: Path) -> None:
    facts, speed = read_facts(large), Speed(1e11, 5e10, 0.3)

    def needs(**changes: Any) -> tuple[float, float, float]:
        found = estimate(facts, Recipe(**({"keep": 0.5, "calibration": ("a.txt",)} | changes)), speed).needs
        assert found.seconds is not None
        return found.peak, sum(found.disk.values()), sum(found.seconds.values())

    plain, more, own = needs(), needs(tokens=65536), needs(calibration=("self",))
    assert more[0] == plain[0]
    assert more[1] > plain[1]
    assert more[2] > plain[2]
    assert own[0] > 4 * facts.parameters > 4 * plain[0]
    weights_alone = needs(metric="frobenius")
    assert all(a < b for a, b in zip(weights_alone, needs(metric="input"), strict=True))
    assert needs(metric="input")[2] < plain[2]


def test_budgets_out_of_reach_say_what_holds_them_up(large: Path, original: Path) -> None:
    facts = read_facts(large)
    with pytest.raises(PlanError) as error:
        estimate(facts, Recipe(bytes="2GB", bits=16))
    said = str(error.value)
    least = smallest_plan(facts, Recipe(bytes="2GB", bits=16))[0].bytes(2)
    assert f"{least / 1e9:.2f} GB" in said
    assert "bytes: 2GB is 2.00 GB" in said
    assert "model.embed_tokens 2.10 GB, lm_head 2.10 GB" in said
    estimate(facts, Recipe(bytes=f"{int(1.001 * least)}b", bits=16))
    with pytest.raises(
        PlanError, match=r"keep: 0.0001, but .* At keep 0\.00.* model\.layers\.0\.self_attn\.k_proj is down to bond 1"
    ):
        estimate(facts, Recipe(keep=0.0001))
    with pytest.raises(PlanError, match=r"matrices kept dense .* GB"):
        estimate(facts, Recipe(bytes="2GB", bits=16, keep_dense=("*.mlp.*",)))
    with pytest.raises(PlanError, match=r"the smallest size in 2 bits is .* give a larger budget$"):
        estimate(read_facts(original), Recipe(bytes="0.01"))
    with pytest.raises(RecipeError, match="keep or bytes"):
        estimate(facts, Recipe(loss=0.1))
    small = estimate(facts, Recipe(bytes="0.1"))
    assert small.bits == 3
    assert small.bytes <= 0.1 * 4 * facts.parameters
    assert "→ 3 bits" in str(small)


def test_models_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        read_facts(tmp_path)
    with pytest.raises(ModelError, match="give a hub id"):
        read_facts(tmp_path / "missing")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    with pytest.raises(ModelError, match="not a causal language model"):
        read_facts(tmp_path)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_config("qwen3").save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bondsmith", "estimate", str(tmp_path), "--keep", "0.5", "--dtype", "float16"])
    monkeypatch.setattr(cli.out, "width", 200)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    printed = capsys.readouterr().out
    assert "time on this machine" in printed
    assert "checkpoint (float32) → float16" in printed


def test_sizes_of_a_hub_model_come_from_its_metadata(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub answers is stood in for: tests have no network. Files in folders and tensors of unknown dtype do not count."""
    files = [
        SimpleNamespace(rfilename=n, size=s) for n, s in (("a.safetensors", 7), ("x/b.safetensors", 9), ("c.bin", 3))
    ]
    answer = SimpleNamespace(siblings=files, safetensors=SimpleNamespace(parameters={"BF16": 5, "F32": 1, "I64": 9}))
    asked: list[str] = []

    def info(_: object, name: str, **__: object) -> SimpleNamespace:
        asked.append(name)
        return answer

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", info)
    assert facts._hub_weights("someone/model") == (torch.bfloat16, 7, "the hub")
    assert asked == ["someone/model"]
    answer.safetensors = None
    assert facts._hub_weights("someone/model") is None
