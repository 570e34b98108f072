"""Blocks with state spaces, convolutions, linear attention; blocks that return several things; matrices that nothing depends on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import HYBRIDS, IDS, logits, save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

import bondsmith
from bondsmith.model.blocks import BlockRunner
from bondsmith.model.tracing import find_hidden_bonds, trace_groups


@pytest.fixture(scope="module", params=HYBRIDS)
def hybrid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    path = tmp_path_factory.mktemp(request.param) / "model"
    return save_tiny(path, request.param), path


@torch.no_grad()
def test_any_block_can_be_the_first_that_runs(hybrid: tuple[PreTrainedModel, Path]) -> None:
    model, _ = hybrid
    states = [(first := BlockRunner(model)).enter(IDS)]
    for k in range(len(first)):
        states.append(first.block(k, IDS, states[-1]))
    assert torch.equal(first.logits(IDS, states[-1]), logits(model))
    for k in range(len(first)):
        assert torch.equal(BlockRunner(model).block(k, IDS, states[k]), states[k + 1])


@torch.no_grad()
def test_only_channels_of_mlps_can_be_dropped(hybrid: tuple[PreTrainedModel, Path]) -> None:
    """Convolutions, norms and scans between two matrices have parameters for every channel."""
    model, _ = hybrid
    runner = BlockRunner(model)
    hidden, readers = runner.enter(IDS), set()
    before = {n: p.clone() for n, p in model.named_parameters()}
    for k in range(len(runner)):
        run = partial(runner.block, k, IDS, hidden)
        bonds = find_hidden_bonds(runner.blocks[k], trace_groups(runner.blocks[k], run), run)
        readers |= {bond.reader for bond in bonds}
        hidden = runner.block(k, IDS, hidden)
    known = ("down_proj", "feed_forward.w2")
    assert all(name.endswith(known) for name in readers), readers
    assert bool(readers) == (model.config.model_type != "mamba")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())  # trying it left no trace


def test_compressed_loaded_healed_and_made_dense(
    hybrid: tuple[PreTrainedModel, Path], text: Path, tmp_path: Path
) -> None:
    _, path = hybrid
    shared = {"calibration": [str(text)], "tokens": 1024, "window": 32, "evaluate": False}
    done = bondsmith.compress(path, tmp_path / "out", keep=0.6, **shared)  # type: ignore[arg-type]
    small = done.load()
    sizes = done.results["size"]
    assert sizes["compressed"]["matrix_parameters"] <= 0.6 * sizes["original"]["matrix_parameters"]
    before = logits(small)
    out = small.generate(IDS[:1], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 20)
    settings = {"data": str(text), "tokens": 2048, "window": 32, "batch": 8, "validation_windows": 4}
    healed = bondsmith.heal(tmp_path / "out", tmp_path / "healed", evaluate=False, **settings)  # type: ignore[arg-type]
    assert healed.healing["steps"] > 0
    assert not torch.equal(logits(healed.load()), before)
    small.dequantize().save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert torch.allclose(logits(plain), before, atol=1e-4)


def test_a_matrix_without_gradients_is_kept(text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, model = tmp_path / "model", tiny_model("doge")
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.A.zero_()  # what `dt_proj` gives is multiplied by it
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    shared = {"calibration": [str(text)], "tokens": 1024, "window": 32, "evaluate": False}
    done = bondsmith.compress(path, tmp_path / "out", keep=0.5, **shared)  # type: ignore[arg-type]
    assert "dt_proj: no gradient reached it" in caplog.text
    networks = {entry["name"]: entry for entry in done.results["networks"]}
    silent = [e for name, e in networks.items() if name.endswith("dt_proj")]
    assert all(e["parameters"] == e["dense_parameters"] for e in silent)


def test_hidden_states_of_another_shape_are_refused_first(text: Path, tmp_path: Path) -> None:
    settings = {"num_key_value_heads": 2, "head_dim": 8, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    settings |= {"vocab_size_per_layer_input": 512, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 3}
    model = tiny_model("gemma3n_text", layer_types=["full_attention"] * 3, **settings)
    with pytest.raises(bondsmith.ModelError, match=r"hidden states of shape \(4, .*only one row per token"):
        BlockRunner(model).enter(IDS)
