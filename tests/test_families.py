"""Every architecture goes through the same code: compress, save, load, generate; with everything kept nothing changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import IDS, logits, save_tiny
from transformers import PreTrainedModel

import bondsmith
from bondsmith.model.blocks import find_blocks, matrices
from bondsmith.nn.linear import MPOLinear
from bondsmith.stages.plan import Plan
from bondsmith.stages.uniform import uniform_plan


def compress(path: Path, text: Path, out: Path, **settings: object) -> bondsmith.Compressed:
    shared = {"calibration": [str(text)], "tokens": 1024, "window": 32, "evaluate": False}
    return bondsmith.compress(path, out, **(shared | settings))  # type: ignore[arg-type]


def test_compress_save_load_generate(family: tuple[PreTrainedModel, Path], text: Path, tmp_path: Path) -> None:
    model, path = family
    done = compress(path, text, tmp_path / "out", keep=0.7, uniform=True)
    small = done.load()
    blocks = model.get_submodule(find_blocks(model))
    assert sum(isinstance(m, MPOLinear) for m in small.modules()) == sum(len(matrices(b)) for b in blocks)
    before, after = (done.results["size"][m]["parameters"] for m in ("original", "compressed"))
    assert after == small.num_parameters() < before == model.num_parameters()
    assert 0 < (logits(small) - logits(model)).abs().max() < 20
    out = small.generate(IDS[:1], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 20)


def test_everything_kept_changes_nothing(family: tuple[PreTrainedModel, Path], text: Path, tmp_path: Path) -> None:
    model, path = family
    small = compress(path, text, tmp_path / "out", keep=1.0).load()
    assert torch.allclose(logits(small), logits(model), atol=1e-4)


@pytest.mark.parametrize("sites", ["matrix", "interleaved:2"])
def test_networks_with_full_bonds_change_nothing(
    family: tuple[PreTrainedModel, Path], text: Path, tmp_path: Path, sites: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """keep=1 leaves every matrix dense; here each becomes a network whose bonds cut nothing off."""
    model, path = family
    metric = "loss" if sites == "matrix" else "frobenius"

    def full(*args: object) -> Plan:
        plan = uniform_plan(*args)  # type: ignore[arg-type]
        matrices = tuple(
            m if m.sites is None else replace(m, bonds=m.sites.exact_bonds(), gauge=False) for m in plan.matrices
        )
        return replace(plan, matrices=matrices)

    monkeypatch.setattr("bondsmith.run.uniform_plan", full)
    done = compress(path, text, tmp_path / "out", keep=0.7, uniform=True, sites=sites, metric=metric, damping=1e-6)
    small = done.load()
    assert any(isinstance(m, MPOLinear) for m in small.modules())
    assert torch.allclose(logits(small), logits(model), atol=1e-4)


def test_the_metrics_of_the_loss_beat_plain_svd(
    family: tuple[PreTrainedModel, Path], text: Path, tmp_path: Path
) -> None:
    model, path = family
    reference = logits(model).log_softmax(-1)

    def divergence(**settings: object) -> float:
        small = compress(path, text, tmp_path / "out", keep=0.7, overwrite=True, **settings).load()
        return float((reference.exp() * (reference - logits(small).log_softmax(-1))).sum(-1).mean())

    assert divergence(metric="loss") < divergence(metric="frobenius", sites="interleaved:3")


@pytest.mark.parametrize(("name", "adds"), [("llama", True), ("gpt2", True), ("gemma3_text", False)])
def test_the_last_pass_is_saved_where_the_last_matrix_adds_to_the_output(
    name: str, adds: bool, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma normalises what its MLP gives; there the block has to run once more, and both ways lead to the same model."""
    from bondsmith.stages import propagation

    model = save_tiny(tmp_path / "model", name)
    finish, found = propagation._LastMatrix.finish, []

    def watched(last: propagation._LastMatrix, *args: Any) -> None:
        found.append(last.name)
        finish(last, *args)

    monkeypatch.setattr(propagation._LastMatrix, "finish", watched)
    settings = {"keep": 0.6, "stream_strength": 0.0}
    quick = compress(tmp_path / "model", text, tmp_path / "quick", **settings).load()
    assert len(found) == (2 if adds else 0)
    monkeypatch.setattr(propagation, "added_to_stream", lambda *args: set())
    slow = compress(tmp_path / "model", text, tmp_path / "slow", **settings).load()
    assert len(found) == (2 if adds else 0)
    assert torch.allclose(logits(quick), logits(slow), atol=1e-3)
    assert not torch.allclose(logits(quick), logits(model), atol=1e-3)
