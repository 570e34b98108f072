"""Hidden channels of MLPs dropped end to end: every family, saved, loaded, dequantised; and planned only where it pays."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import IDS, logits, save_tiny, tiny_model, write_text
from transformers import AutoModelForCausalLM, PreTrainedModel

import bondsmith
from bondsmith.model.blocks import BlockRunner
from bondsmith.model.tracing import find_hidden_bonds, trace_groups
from bondsmith.stages.matrix_plan import PlanError
from bondsmith.stages.plan import Plan


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 4000)


def compress(path: Path, text: Path, out: Path, **settings: object) -> bondsmith.Compressed:
    shared = {"calibration": [str(text)], "tokens": 1024, "window": 32, "evaluate": False, "overwrite": True}
    return bondsmith.compress(path, out, **(shared | settings))  # type: ignore[arg-type]


def test_the_hidden_bond_is_found_and_attention_is_not(family: tuple[PreTrainedModel, Path]) -> None:
    model, _ = family
    runner = BlockRunner(model)
    with torch.no_grad():
        hidden = runner.enter(IDS)
        before = {n: p.clone() for n, p in model.named_parameters()}
        groups = trace_groups(runner.blocks[0], lambda: runner.block(0, IDS, hidden))
        (bond,) = find_hidden_bonds(runner.blocks[0], groups, lambda: runner.block(0, IDS, hidden))
    assert bond.channels == 64
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())  # trying it left no trace


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_an_odd_number_of_channels(family: str) -> None:
    model = tiny_model(family, **({"n_inner": 63} if family == "gpt2" else {"intermediate_size": 63}))
    runner = BlockRunner(model)
    run = partial(runner.block, 0, IDS, runner.enter(IDS))
    (bond,) = find_hidden_bonds(runner.blocks[0], trace_groups(runner.blocks[0], run), run)
    assert bond.channels == 63


@pytest.mark.parametrize("propagate", [True, False])
def test_dropped_channels_load_generate_and_dequantise(
    family: tuple[PreTrainedModel, Path], text: Path, tmp_path: Path, propagate: bool
) -> None:
    _, path = family
    done = compress(path, text, tmp_path / "out", keep=0.45, propagate=propagate)
    plan = Plan.load(tmp_path / "out" / "plan.json")
    assert plan.drops_channels
    small = done.load()
    before = logits(small)
    biases = sum(m.out_features - m.rows for m in plan.matrices)  # the plan counts those of dropped channels too
    planned = done.results["size"]["compressed"]["parameters"]
    assert planned == plan.parameters
    assert planned - biases <= small.num_parameters() <= planned
    small.generate(IDS[:1], max_new_tokens=3, do_sample=False, eos_token_id=None)
    small.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), before)
    plain = small.dequantize()
    assert torch.allclose(logits(plain), before, atol=1e-4)
    plain.config.__dict__.pop("quantization_config", None)
    plain.save_pretrained(tmp_path / "plain")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), before, atol=1e-4)


def test_a_plan_with_unlike_sides_names_the_matrix(tmp_path: Path, text: Path) -> None:
    save_tiny(tmp_path / "model")
    compress(tmp_path / "model", text, tmp_path / "out", keep=0.45)
    plan = Plan.load(tmp_path / "out" / "plan.json")
    smaller = next(m for m in plan.matrices if m.kept_rows is not None)
    wrong = replace(smaller, kept_rows=smaller.rows - 1, sites=None, bonds=(), gauge=False)
    replace(plan, matrices=tuple(wrong if m is smaller else m for m in plan.matrices)).save(tmp_path / "wrong.json")
    with pytest.raises(PlanError, match=f"{smaller.name}: the plan keeps {smaller.rows - 1} rows, but what reads them"):
        compress(tmp_path / "model", text, tmp_path / "second", plan=str(tmp_path / "wrong.json"))


def test_a_plan_carried_out_again_gives_the_same_weights(tmp_path: Path, text: Path) -> None:
    save_tiny(tmp_path / "model")
    first = compress(tmp_path / "model", text, tmp_path / "out", keep=0.5)
    again = compress(tmp_path / "model", text, tmp_path / "again", plan=str(tmp_path / "out" / "plan.json"))
    assert torch.equal(logits(first.load()), logits(again.load()))
    assert json.loads((tmp_path / "again" / "plan.json").read_text()) == json.loads(
        (tmp_path / "out" / "plan.json").read_text()
    )


def test_channels_can_be_left_alone(tmp_path: Path, text: Path) -> None:
    save_tiny(tmp_path / "model")
    compress(tmp_path / "model", text, tmp_path / "out", keep=0.5, channels=False)
    assert not Plan.load(tmp_path / "out" / "plan.json").drops_channels
