"""Mixtures of experts: tensors of three dimensions come apart, every expert is compressed like any other matrix, and go back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import IDS, MIXTURES, logits, save_tiny, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import bondsmith
from bondsmith.model.blocks import BlockRunner, matrices
from bondsmith.model.facts import read_facts
from bondsmith.model.source import load_whole, open_source
from bondsmith.model.tracing import find_hidden_bonds, trace_groups
from bondsmith.nn.experts import find_fused, merge_experts, split_experts, split_state
from bondsmith.nn.linear import MPOLinear
from bondsmith.nn.packed import PackedLinear


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    path = tmp_path_factory.mktemp(request.param) / "model"
    return save_tiny(path, request.param), path


def compress(path: Path | PreTrainedModel, text: Path, out: Path, **settings: object) -> bondsmith.Compressed:
    shared = {"calibration": [str(text)], "tokens": 2048, "window": 32, "evaluate": False}
    return bondsmith.compress(path, out, **(shared | settings))  # type: ignore[arg-type]


def in_experts(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(m, kind) for name, m in model.named_modules() if ".experts." in name)


def test_experts_come_apart_and_together(mixture: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, path = mixture
    whole = load_whole(open_source(path, tmp_path / "cache"))
    assert in_experts(whole, nn.Linear) == 12 * len(find_fused(model))
    assert torch.allclose(logits(whole), logits(model), atol=1e-5)
    merge_experts(whole)
    assert torch.allclose(logits(whole), logits(model), atol=1e-5)
    assert {name: type(m) for name, m in find_fused(whole).items()} == {
        n: type(m) for n, m in find_fused(model).items()
    }


def test_experts_are_compressed(mixture: tuple[PreTrainedModel, Path], text: Path, tmp_path: Path) -> None:
    model, path = mixture
    done = compress(path, text, tmp_path / "out", keep=0.6, evaluate=True)
    small = done.load()
    assert in_experts(small, MPOLinear) > 0
    size = done.results["size"]
    assert size["original"]["parameters"] == model.num_parameters()
    biases = sum(
        p.numel() for name, p in model.named_parameters() if name.endswith("_bias")
    )  # some go with dropped channels
    assert 0 <= size["compressed"]["parameters"] - small.num_parameters() <= biases
    assert small.num_parameters() < 0.85 * model.num_parameters()
    assert done.results["quality"][0]["kl"] > 0
    work = size["original"]["multiply_adds"]
    assert work == read_facts(str(path)).multiply_adds + 512 * 32
    assert size["compressed"]["multiply_adds"] < work
    entries = json.loads((tmp_path / "out" / "plan.json").read_text())["matrices"]
    assert {e.get("tokens", 1.0) for e in entries if ".experts." in e["name"]} == {0.5}
    assert {e.get("tokens", 1.0) for e in entries if ".experts." not in e["name"]} == {1.0}
    again = compress(path, text, tmp_path / "planned", plan=str(tmp_path / "out" / "plan.json"))
    assert again.results["size"]["compressed"]["multiply_adds"] == size["compressed"]["multiply_adds"]
    out = small.generate(IDS[:1], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 20)
    small.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(again), logits(small))
    before = logits(small)
    plain = small.dequantize()
    assert len(find_fused(plain)) == len(find_fused(model))
    assert torch.allclose(logits(plain), before, atol=1e-4)
    plain.save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert torch.allclose(logits(plain), before, atol=1e-4)


def test_everything_kept_changes_nothing(mixture: tuple[PreTrainedModel, Path], text: Path, tmp_path: Path) -> None:
    model, path = mixture
    small = compress(path, text, tmp_path / "out", keep=1.0).load()
    assert torch.allclose(logits(small), logits(model), atol=1e-4)


def test_a_model_in_memory_stays_as_it_is(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    before, fused = logits(model), list(find_fused(model))
    source = open_source(model, tmp_path / "cache")
    assert any(name.endswith("experts.3.down_proj.weight") for name in source.places)
    assert list(find_fused(model)) == fused
    assert torch.equal(logits(model), before)


def test_every_expert_has_hidden_channels_of_its_own() -> None:
    model = tiny_model("qwen3_moe")
    state = split_state(model)
    split_experts(model)
    model.load_state_dict(state, assign=True)
    runner, ids = BlockRunner(model), IDS[:1]
    with torch.no_grad():
        hidden = runner.block(0, ids, runner.enter(ids))

        def run() -> torch.Tensor:
            return runner.block(1, ids, hidden)

        groups = trace_groups(runner.blocks[1], run)
        bonds = find_hidden_bonds(runner.blocks[1], groups, run)
    experts = [f"mlp.experts.{number}." for number in range(4)]
    assert [g.expert for g in groups if g.expert] == [e for e in experts for _ in range(2)]
    assert not any(g.every_token for g in groups if g.expert)
    assert [(b.writers, b.reader, b.channels) for b in bonds] == [
        ((e + "gate_proj", e + "up_proj"), e + "down_proj", 24) for e in experts
    ]


@torch.no_grad()
def test_channels_are_tried_in_one_expert_for_all() -> None:
    passes = {}
    for number in (4, 8):
        model = tiny_model("qwen3_moe", num_experts=number)
        state = split_state(model)
        split_experts(model)
        model.load_state_dict(state, assign=True)
        runner, ids, runs = BlockRunner(model), IDS[:1], 0
        hidden = runner.block(0, ids, runner.enter(ids))

        def run(runner: BlockRunner = runner, ids: torch.Tensor = ids, hidden: torch.Tensor = hidden) -> torch.Tensor:
            nonlocal runs
            runs += 1
            return runner.block(1, ids, hidden)

        groups = trace_groups(runner.blocks[1], run)
        assert len(find_hidden_bonds(runner.blocks[1], groups, run)) == number
        passes[number] = runs
    assert passes[4] == passes[8]


@pytest.mark.parametrize(
    "settings",
    [{"keep": 0.6}, {"bytes": "0.3"}, {"keep": 0.6, "blockwise": 1}, {"keep": 0.6, "metric": "input"}],
    ids=str,
)
def test_an_expert_that_no_token_reaches(settings: dict[str, object], text: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "gpt_oss")
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.router.bias[3] = -1e4
    model.save_pretrained(tmp_path / "model")
    done = compress(tmp_path / "model", text, tmp_path / "out", **settings)
    small = done.load()
    assert torch.isfinite(logits(small)).all()
    unseen = [m for n, m in small.named_modules() if ".experts.3." in n and n.endswith("_proj")]
    assert len(unseen) == 9
    assert all(torch.isfinite(p).all() for m in unseen for p in m.state_dict().values() if p.is_floating_point())
    if "bytes" in settings:
        assert in_experts(small, PackedLinear) > 0


def test_healing_and_rounding_after_it(text: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "mixtral")
    compress(tmp_path / "model", text, tmp_path / "small", keep=0.5, uniform=True)
    healed = bondsmith.heal(
        tmp_path / "small", tmp_path / "healed", data=str(text), evaluate=False, tokens=4096, window=32, batch=8
    )
    kl = [entry["kl"] for entry in healed.healing["curve"]]
    assert kl[-1] < kl[0]
    rounded = compress(tmp_path / "healed", text, tmp_path / "rounded", uniform=True, keep=1.0, bits=8, group=16)
    assert torch.allclose(logits(rounded.load(dtype=torch.float32)), logits(healed.load(dtype=torch.float32)), atol=0.3)


def test_a_router_that_is_a_linear_layer_and_more_stays() -> None:
    class Router(nn.Linear):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return super().forward(x).topk(2)

    class Slow(nn.Linear):  # Falcon has such layers
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T + self.bias

    class Pair(nn.Linear):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return super().forward(x + y)

    block = nn.ModuleDict({"gate": Router(4, 3), "two": Pair(4, 4), "up": nn.Linear(4, 8), "down": Slow(8, 4)})
    assert list(matrices(block)) == ["up", "down"]


def test_the_estimate_counts_experts(mixture: tuple[PreTrainedModel, Path]) -> None:
    model, path = mixture
    facts = read_facts(str(path))
    assert facts.experts == 0
    assert set(facts.shares.values()) == {0.5}  # two of four
    dense = sum(o * i for name, (_, o, i) in facts.shapes.items() if ".experts." not in name)
    assert (
        facts.multiply_adds == dense + sum(o * i for name, (_, o, i) in facts.shapes.items() if ".experts." in name) / 2
    )
    assert sum(".experts." in name for name in facts.shapes) == 12 * len(find_fused(model))
