"""Rounding what was compressed, and maybe healed, before: networks stay, their cores are rounded, in depth order like everything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from heal_cases import SETTINGS, heal, make_home, weights

import bondsmith
from bondsmith.model.source import ModelError
from bondsmith.nn.linear import MPOLinear
from bondsmith.nn.packed import PackedLinear, PackedMatrix
from bondsmith.recipe import RecipeError
from bondsmith.stages.chat import Conversation

ROUNDED: dict[str, Any] = {"uniform": True, "keep": 1.0, "bits": 8, "group": 16, "tokens": 2048, "window": 64}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("round"))


def round_it(home: Path, small: Path, out: Path, **changes: Any) -> bondsmith.Compressed:
    settings = {"calibration": [str(home / "text.txt")], "evaluation_windows": 2} | ROUNDED | changes
    return bondsmith.compress(small, out, **settings)


@pytest.mark.parametrize("metric", ["input", "loss"])
def test_a_healed_model_is_rounded(home: Path, tmp_path: Path, metric: str) -> None:
    healed = heal(home, tmp_path / "healed", evaluate=False)
    done = round_it(home, healed.path, tmp_path / "rounded", metric=metric)
    before, after = bondsmith.load(healed.path, dtype=torch.float32), done.load(dtype=torch.float32)
    layers = dict(after.named_modules())
    for name, layer in before.named_modules():
        if isinstance(layer, MPOLinear):
            assert isinstance(layers[name], MPOLinear)
            assert all(isinstance(core, PackedLinear) for core in layers[name].cores)
            error = (layers[name].to_matrix() - layer.to_matrix()).norm() / layer.to_matrix().norm()
            assert error < 0.02
    assert isinstance(after.get_input_embeddings(), PackedMatrix)
    assert done.results["healing"]["settings"]["tokens"] == SETTINGS["tokens"]
    assert done.results["healing"]["before_rounding"]
    known = json.loads((home / "small" / "results.json").read_text())
    assert done.results["size"]["original"] == known["size"]["original"]
    assert done.results["model"]["name"] == known["model"]["name"]
    runs = ["prefill", "decode", "prefill in bfloat16", "decode in bfloat16"]
    assert list(done.results["speed"]) == runs
    assert "prefill in bfloat16" in (done.path / "report.html").read_text().lower()
    answer = Conversation(str(done.path), max_new_tokens=3)
    assert torch.cuda.is_available() or answer.model.dtype == torch.bfloat16
    assert answer.say("w5 w6", lambda piece: None) is not None
    assert done.results["size"]["compressed"]["bytes"] < 0.5 * sum(map(len, weights(healed.path).values()))


def test_rounding_in_depth_order_is_better_than_to_nearest(home: Path, tmp_path: Path) -> None:
    small = home / "small"
    original = bondsmith.load(home / "small", dtype=torch.float32)
    ids = torch.randint(3, 500, (8, 64), generator=torch.Generator().manual_seed(0))

    def divergence(done: bondsmith.Compressed) -> float:
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits.log_softmax(-1) for m in (original, done.load(dtype=torch.float32)))
        return float((p.exp() * (p - q)).sum(-1).mean())

    nearest = round_it(home, small, tmp_path / "nearest", bits=3, rounding="nearest", propagate=False, evaluate=False)
    ours = round_it(home, small, tmp_path / "ours", bits=3, metric="loss", evaluate=False)
    assert divergence(ours) < 0.9 * divergence(nearest)


def test_bits_are_chosen_core_by_core(home: Path, tmp_path: Path) -> None:
    budget = {"uniform": False, "keep": None, "bits": [8, 4, 3, 2], "group": 32, "bytes": "0.23", "metric": "loss"}
    done = round_it(home, home / "small", tmp_path / "planned", evaluate=False, **budget)
    widths = {m.grid.bits for m in done.load(dtype=torch.float32).modules() if isinstance(m, PackedMatrix)}
    assert len(widths) > 1
    size = done.results["size"]
    assert size["compressed"]["bytes"] <= 0.23 * size["original"]["bytes_fp32"]


def test_its_scales_can_be_healed(home: Path, tmp_path: Path) -> None:
    round_it(home, home / "small", tmp_path / "rounded", bits=2, evaluate=False)
    done = bondsmith.heal(
        tmp_path / "rounded", tmp_path / "healed", data=str(home / "text.txt"), evaluate=False, **SETTINGS
    )
    kl = [entry["kl"] for entry in done.healing["curve"]]
    assert min(kl) < kl[0]


def test_nothing_else_can_be_asked(home: Path, tmp_path: Path) -> None:
    for changes, match in (
        ({"bits": 16}, "can only be rounded: give bits"),
        ({"keep": 0.5}, "its networks stay"),
        ({"uniform": False, "keep": None, "group": 32, "multiply_adds": 0.5}, "its networks stay"),
    ):
        with pytest.raises(RecipeError, match=match):
            round_it(home, home / "small", tmp_path / "out", **changes)
    round_it(home, home / "small", tmp_path / "rounded", evaluate=False)
    with pytest.raises(ModelError, match="is rounded already"):
        round_it(home, tmp_path / "rounded", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
