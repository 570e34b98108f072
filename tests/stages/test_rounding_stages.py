"""Rounding inside the depth-order pass: files, sizes, errors, the embedding, and what `inspect` says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny
from safetensors.torch import load_file
from transformers import AutoTokenizer

import bondsmith
from bondsmith.model.checkpoint import open_compressed
from bondsmith.model.source import ModelError
from bondsmith.nn.linear import MPOLinear
from bondsmith.nn.packed import PackedEmbedding, PackedHead, PackedLinear, PackedMatrix
from bondsmith.recipe import Recipe, RecipeError
from bondsmith.stages.plan import Plan
from bondsmith.stages.quality import Streamed
from bondsmith.stages.report import headline
from bondsmith.tensor.rounding import Grid, round_to_nearest

IDS = torch.arange(3, 27).view(2, 12)
SETTINGS: dict[str, Any] = {"tokens": 1024, "window": 32, "evaluation_windows": 2, "evaluate": False, "uniform": True}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def compress(original: Path, text: Path, out: Path, **settings: Any) -> bondsmith.Compressed:
    return bondsmith.compress(original, out, calibration=[str(text)], **(SETTINGS | settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"keep": 1.0, "bits": 8},
        {"keep": 1.0, "bits": 4, "group": 16, "metric": "input"},
        {"keep": 0.7, "bits": 4, "group": 16},
        {"keep": 0.7, "bits": 3, "group": 16, "gauge": False, "propagate": False},
        {"keep": 0.6, "bits": 8, "sites": "interleaved:2"},
        {"keep": 0.7, "bits": 8, "metric": "frobenius"},
        {"keep": 0.7, "bits": 4, "group": 16, "blockwise": 2},
    ],
    ids=str,
)
def test_rounded_models_load_bit_identical_and_as_large_as_planned(
    settings: dict[str, Any], original: Path, text: Path, tmp_path: Path
) -> None:
    done = compress(original, text, tmp_path / "out", **settings)
    model = done.load()
    packed = [m for m in model.modules() if isinstance(m, PackedMatrix)]
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)
    assert isinstance(model.get_output_embeddings(), PackedHead)
    networks = sum(isinstance(m, MPOLinear) for m in model.modules())
    assert networks == (0 if settings["keep"] == 1.0 else 21)
    assert len(packed) == 1 + (21 if not networks else 42)
    stored = {n: t for f in done.path.glob("bondsmith-*.safetensors") for n, t in load_file(f).items()}
    state = model.state_dict()
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], state[name]) for name in stored)
    plan = Plan.load(done.path / "plan.json")
    assert sum(t.nbytes for t in stored.values()) <= plan.bytes(4)
    streamed = Streamed(open_compressed(done.path), torch.device("cpu"))
    with torch.no_grad():
        hidden = streamed.runner.enter(IDS)
        for k in range(len(streamed.runner)):
            hidden = streamed.pass_block(k, IDS, hidden)
        assert torch.equal(streamed.runner.logits(IDS, hidden), logits(model))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(bondsmith.load(tmp_path / "again")), logits(model))


def test_reported_errors_are_those_of_the_files(original: Path, text: Path, tmp_path: Path) -> None:
    done = compress(original, text, tmp_path / "out", keep=0.7, bits=4, group=16, metric="frobenius")
    plain, model = bondsmith.load(original), done.load()
    for row in done.results["networks"]:
        layer, W = model.get_submodule(row["name"]), plain.get_submodule(row["name"]).weight
        assert isinstance(layer, MPOLinear)
        assert row["error"] == pytest.approx(float((layer.to_matrix() - W).norm() / W.norm()), rel=1e-4)
        assert row["bytes"] == sum(b.nbytes for b in layer.state_dict().values())
        assert row["grid"] == "int4-g16-asym"


def test_later_blocks_see_the_rounded_embedding(original: Path, text: Path, tmp_path: Path) -> None:
    """With error propagation the first block is fitted to what the packed embedding gives."""
    moments = {}
    for bits in (8, 2):
        plan = compress(original, text, tmp_path / f"plan-{bits}", keep=1.0, bits=8).path / "plan.json"
        content = json.loads(plan.read_text())
        content["tables"][0]["grid"] = {"bits": bits, "group": 16, "symmetric": False, "codebook": "uniform"}
        changed = tmp_path / f"{bits}.json"
        changed.write_text(json.dumps(content))
        settings = {k: v for k, v in SETTINGS.items() if k != "uniform"}
        done = bondsmith.compress(
            original, tmp_path / f"out-{bits}", calibration=[str(text)], plan=str(changed), **settings
        )
        moments[bits] = done.load().model.layers[0].self_attn.q_proj.to_matrix()
    assert not torch.equal(moments[8], moments[2])


def test_a_weight_whose_square_overflows_is_an_error_that_names_the_matrix(text: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = 1e19
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj: an entry of 1e\+19 cannot be rounded"):
        compress(tmp_path / "model", text, tmp_path / "out", keep=1.0, bits=4, metric="frobenius")


@pytest.mark.parametrize("keep", [1.0, 0.7])
def test_rounding_to_nearest_is_what_plain_quantizers_do(
    keep: float, original: Path, text: Path, tmp_path: Path
) -> None:
    """No search, no compensation: the codes of `round_to_nearest`, of the matrices or of the cores of the unrounded networks."""
    how = {"keep": keep, "metric": "frobenius", "group": 0, "symmetric": True}
    done = compress(original, text, tmp_path / "out", bits=4, rounding="nearest", **how)
    model = done.load()
    plain = (
        compress(original, text, tmp_path / "plain", bits=16, **how).load() if keep < 1 else bondsmith.load(original)
    )
    checked = 0
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) and name.startswith("model.layers."):
            W = plain.get_submodule(name).weight.detach().float()
            expected = round_to_nearest(W, Grid(4, 0), search=False).dequantize()
            assert torch.equal(module.to_matrix(torch.float32), expected)
            checked += 1
    assert checked == (21 if keep == 1 else 42)
    searched = compress(original, text, tmp_path / "searched", bits=4, rounding="searched", **how)
    errors = [[row["error"] for row in one.results["networks"]] for one in (done, searched)]
    assert sum(errors[1]) < sum(errors[0])


def test_a_plan_predicts_compensated_rounding_only() -> None:
    with pytest.raises(RecipeError, match="a plan predicts what compensated rounding loses; nearest goes with uniform"):
        Recipe(keep=0.8, bits=4, rounding="nearest")
    with pytest.raises(RecipeError, match="rounding: 'up' is not one of compensated, searched, nearest"):
        Recipe(keep=1.0, uniform=True, bits=4, rounding="up")


def test_weights_that_lie_on_the_grid_are_said_to_be_repacked(
    original: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The trap of a model that was a four-bit file: the same grid again is lossless by construction."""
    first = compress(original, text, tmp_path / "first", keep=1.0, bits=4, group=16, metric="frobenius")
    assert "repacked" not in first.results
    first.load(dtype=torch.float32).dequantize().save_pretrained(tmp_path / "grid")
    AutoTokenizer.from_pretrained(original).save_pretrained(tmp_path / "grid")
    again = compress(tmp_path / "grid", text, tmp_path / "again", keep=1.0, bits=4, group=16, metric="frobenius")
    assert len(again.results["repacked"]) == 22  # embedding and head are one
    assert "22 rounded matrices lie on the grid of the source already: an exact re-packing" in headline(again.results)
    assert torch.allclose(logits(again.load()), logits(bondsmith.load(tmp_path / "grid")), atol=1e-3)
    assert "repacked" not in compress(tmp_path / "grid", text, tmp_path / "other", keep=1.0, bits=3, group=16).results


def test_later_blocks_make_up_for_the_rounding_of_earlier_ones(original: Path, text: Path, tmp_path: Path) -> None:
    """A two-bit first block, the others at eight: what leaves the model is nearer to the original's than without propagation."""
    plan = compress(original, text, tmp_path / "plan", keep=1.0, bits=8).path / "plan.json"
    content = json.loads(plan.read_text())
    for entry in content["matrices"]:
        if entry["block"] == 0:
            entry["grid"] = {"bits": 2, "group": 16, "symmetric": False, "codebook": "uniform"}
    (tmp_path / "two.json").write_text(json.dumps(content))
    settings = {k: v for k, v in SETTINGS.items() if k != "uniform"} | {
        "plan": str(tmp_path / "two.json"),
        "tokens": 4096,
    }
    ids = torch.tensor([[int(c) % 300 + 3 for c in range(k, k + 32)] for k in range(0, 64, 4)])
    found = {}
    with torch.no_grad():
        target = bondsmith.load(original)(input_ids=ids).logits
        for on in (True, False):
            out = tmp_path / f"propagate-{on}"
            done = bondsmith.compress(original, out, calibration=[str(text)], propagate=on, **settings)
            found[on] = done.load()
            row = found[on].model.layers[2].mlp.down_proj.to_matrix()
            found[on] = (float((found[on](input_ids=ids).logits - target).square().mean()), row)
    assert not torch.equal(found[True][1], found[False][1])
    assert found[True][0] < found[False][0]


def test_inspect_shows_bits(original: Path, text: Path, tmp_path: Path) -> None:
    from rich.console import Console

    from bondsmith.stages.inspect import network_table, read_networks

    done = compress(original, text, tmp_path / "out", keep=0.7, bits=4, group=16)
    done.load().save_pretrained(tmp_path / "user")
    for directory in (done.path, tmp_path / "user"):
        rows, metric = read_networks(directory)
        assert {r["grid"] for r in rows} == {"int4-g16-asym"}
        assert sum(r["bytes"] for r in rows) == sum(r["bytes"] for r in done.results["networks"])
        console = Console(width=200)
        with console.capture() as capture:
            console.print(*network_table(rows, metric))
        assert "int4-g16-asym" in capture.get()


def hybrid_plan(original: Path, text: Path, tmp_path: Path) -> Path:
    """A plan in which every other matrix is a hybrid, with cores of four bits or unrounded."""
    content = json.loads(
        (compress(original, text, tmp_path / "plan", keep=1.0, bits=4, group=16).path / "plan.json").read_text()
    )
    for i, entry in enumerate(content["matrices"]):
        rows, columns = entry["shape"]
        if i % 2 == 0:
            entry["base"] = {"bits": 3, "group": 16, "symmetric": False, "codebook": "uniform"}
            entry |= {"sites": [[rows, 1], [1, columns]], "bonds": [3], "gauge": False}
            if i % 4 == 0:
                del entry["grid"]
    path = tmp_path / "hybrid.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("metric", ["loss", "frobenius"])
def test_hybrids_are_written_loaded_inspected_and_undone(
    metric: str, original: Path, text: Path, tmp_path: Path
) -> None:
    from bondsmith.nn.hybrid import HybridLinear
    from bondsmith.stages.inspect import read_networks

    plan = hybrid_plan(original, text, tmp_path)
    settings = {k: v for k, v in SETTINGS.items() if k != "uniform"} | {"plan": str(plan), "metric": metric}
    done = bondsmith.compress(original, tmp_path / "out", calibration=[str(text)], **settings)
    model = done.load()
    hybrids = [m for m in model.modules() if isinstance(m, HybridLinear)]
    assert len(hybrids) == 11
    assert all(isinstance(m.rounded, PackedLinear) for m in hybrids)
    assert sum(isinstance(m.network.cores[0], PackedLinear) for m in hybrids) == 5
    stored = {n: t for f in done.path.glob("bondsmith-*.safetensors") for n, t in load_file(f).items()}
    assert sum(t.nbytes for t in stored.values()) <= Plan.load(done.path / "plan.json").bytes(4)
    model.save_pretrained(tmp_path / "user")
    again = bondsmith.load(tmp_path / "user")
    assert torch.equal(logits(again), logits(model))
    for directory in (done.path, tmp_path / "user"):
        rows, _ = read_networks(directory)
        by_name = {r["name"]: r for r in rows}
        for name, module in model.named_modules():
            if isinstance(module, HybridLinear | PackedLinear) and name in by_name:
                assert by_name[name]["bytes"] == sum(t.nbytes for t in module.state_dict().values())
        assert {r["grid"] for r in rows} == {"int4-g16-asym", "int3-g16-asym + int4-g16-asym", "int3-g16-asym"}
    plain = again.dequantize()
    assert not any(isinstance(m, HybridLinear | PackedMatrix) for m in plain.modules())
    assert torch.allclose(logits(plain), logits(model), atol=1e-3 * float(logits(model).abs().max()))


def test_a_base_with_a_gauge_or_without_a_network_is_refused(original: Path, text: Path, tmp_path: Path) -> None:
    path = hybrid_plan(original, text, tmp_path)
    content = json.loads(path.read_text())
    content["matrices"][0]["gauge"] = True
    path.write_text(json.dumps(content))
    settings = {k: v for k, v in SETTINGS.items() if k != "uniform"} | {"plan": str(path)}
    with pytest.raises(
        ValueError, match=r"layers.0.self_attn.q_proj: a base goes with a matrix cut without gauge only"
    ):
        bondsmith.compress(original, tmp_path / "out", calibration=[str(text)], **settings)
