"""Sampled gradients, token weights, and the correction of the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, IDS, save_tiny, tiny_model
from safetensors.torch import load_file

import bondsmith
from bondsmith.data import read_windows
from bondsmith.model.blocks import BlockRunner
from bondsmith.model.source import load_tokenizer
from bondsmith.model.tracing import added_to_stream, gradient_only, trace_groups
from bondsmith.recipe import Recipe, RecipeError
from bondsmith.stages import gradients, moment_files, moments
from bondsmith.stages.streams import Stream


def test_random_signs_sample_the_fisher_information() -> None:
    model = tiny_model("llama")
    runner, head = BlockRunner(model), model.lm_head.weight.detach()
    hidden = torch.randn(1, 3, 32)
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros(3, 32, 32)
    for _ in range(3000):
        gradient, _ = gradients._head_gradient(runner, IDS[:1, :3], hidden.clone().requires_grad_(), generator)
        found += torch.einsum("ti,tj->tij", gradient[0], gradient[0]) / 3000
    norm = model.model.norm
    logits = head @ norm(hidden).detach()[0].T
    p = logits.T.softmax(-1)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    jacobian = torch.autograd.functional.jacobian(lambda h: norm(h) @ head.T, hidden[0])
    for t in range(3):
        J = jacobian[t, :, t]
        exact = J.T @ fisher[t] @ J
        assert (found[t] - exact).norm() < 0.1 * exact.norm()


def run_moments(
    model: Any, folder: Path, ids: torch.Tensor, together: int = 0, advance: Callable[[], Any] = lambda: None
) -> BlockRunner:
    runner = BlockRunner(model.requires_grad_(False))

    def load(blocks: range) -> list[torch.nn.Module]:
        return [runner.blocks[k] for k in blocks]

    start = len(runner) - (together or gradients.blocks_together(runner, load, ids, 2))
    streams = [Stream(folder / f"hidden-{k}", (*ids.shape, 32)) for k in range(start + 1)]

    moments.block_inputs(runner, load, ids, streams, 2, lambda: None)
    options: dict[str, Any] = {"batch": 2, "seed": 0, "hybrids": False, "advance": advance}
    gradients.output_moments(runner, load, ids, streams, folder, **options)
    return runner


def test_token_weights_are_gradient_norms_and_output_moments_are_shrunk(tmp_path: Path) -> None:
    ids = torch.randint(3, 500, (6, 16), generator=torch.Generator().manual_seed(0))
    run_moments(tiny_model("llama"), tmp_path, ids)
    raw = load_file(tmp_path / "block-1.safetensors")
    weights = moment_files.load_token_weights(tmp_path, 1, "self_attn.q_proj", 6)
    assert weights is not None
    assert weights.shape == ids.shape
    assert (weights > 0).all()
    traces = sum(raw[f"output.self_attn.{n}_proj"].trace() for n in "qkv")  # as of means over tokens of g g^T
    assert float(weights.square().mean()) == pytest.approx(float(traces), rel=1e-3)
    down = moment_files.load_token_weights(tmp_path, 1, "mlp.down_proj", 6)
    assert float(down.square().mean()) == pytest.approx(float(raw["output.mlp.down_proj"].trace()), rel=1e-3)
    assert moment_files.load_token_weights(tmp_path, 1, "self_attn.q_proj", 7) is None  # some windows have none
    B, shrunk = raw["output.mlp.up_proj"], moment_files.load_output_moments(tmp_path, 1)["mlp.up_proj"]
    assert torch.allclose(shrunk, B + 0.3 * B.diagonal().mean() * torch.eye(64), atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_added_to_the_stream_is_found_by_running_the_block(family: str) -> None:
    runner = BlockRunner(tiny_model(family).requires_grad_(False))
    entering, block = runner.enter(IDS), runner.blocks[0]

    def run() -> torch.Tensor:
        return runner.block(0, IDS, entering)

    groups = trace_groups(block, run)
    found = added_to_stream(block, groups, entering, run)
    writers = {g.names[0] for g in groups if g.writes}
    assert len(writers) == 2
    assert found == (set() if family == "gemma3_text" else writers)  # after Gemma's matrices comes a norm


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_back_needs_no_output_that_is_only_added(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, left_out = tiny_model(family), []

    def noted(matrix: torch.nn.Module) -> Any:
        left_out.append(matrix)
        return gradient_only(matrix)

    for folder in ("short", "whole"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(gradients, "gradient_only", noted)
    run_moments(model, tmp_path / "short", IDS, together=1)
    assert len(left_out) == (0 if family == "gemma3_text" else 2)  # the head reads what the last block gives
    assert not any("forward" in vars(matrix) for matrix in left_out)
    run_moments(model, tmp_path / "whole", IDS, together=3)
    assert len(left_out) == (0 if family == "gemma3_text" else 2)
    for k in range(3):
        short, whole = (load_file(tmp_path / f / f"block-{k}.safetensors") for f in ("short", "whole"))
        assert short.keys() == whole.keys()
        for name, tensor in whole.items():
            assert torch.allclose(short[name], tensor, rtol=1e-4, atol=1e-6 * float(tensor.abs().max())), name


def test_blocks_go_together_as_far_as_memory_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = BlockRunner(tiny_model("llama").requires_grad_(False))

    def together() -> int:
        return gradients.blocks_together(runner, lambda blocks: [runner.blocks[k] for k in blocks], IDS, 2)

    assert together() == 3
    monkeypatch.setattr(gradients, "_TOGETHER", 0)
    assert together() == 1
    least = 4 * IDS.shape[1] * 2 * (32 + 64)  # what a pass back keeps of a batch: at the least what the matrices read
    monkeypatch.setattr(gradients, "_TOGETHER", 2 * least)
    assert together() == 1
    monkeypatch.setattr(gradients, "_TOGETHER", 4 * 2 * 2000**2)
    assert together() == 3
    runner.blocks[1].mlp.gate_proj = torch.nn.Linear(32, 2000)  # the first block may be the smallest
    assert together() == 1


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_pass_back_goes_on_with_more_or_less_memory(after: int, tmp_path: Path) -> None:
    for folder in ("whole", "resumed"):
        (tmp_path / folder).mkdir()
    run_moments(tiny_model("llama"), tmp_path / "whole", IDS, together=1)
    steps = iter(range(after - 1))
    with pytest.raises(StopIteration):
        run_moments(tiny_model("llama"), tmp_path / "resumed", IDS, together=1, advance=lambda: next(steps))
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "resumed").glob("block-*")}
    assert len(written) == after
    run_moments(tiny_model("llama"), tmp_path / "resumed", IDS, together=2 if after == 2 else 3)
    if after == 2:
        assert all(path.stat().st_mtime_ns == when for path, when in written.items())
    for name in ("block-0", "block-1", "block-2", "head", "embedding"):
        whole, resumed = (load_file(tmp_path / f / f"{name}.safetensors") for f in ("whole", "resumed"))
        assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.items()), name


def test_the_stream_is_brought_back_to_the_original(tmp_path: Path) -> None:
    original = save_tiny(tmp_path / "model")
    words = torch.randint(0, 250, (9000,), generator=torch.Generator().manual_seed(2)).tolist()
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"w{n}" for n in words))
    ids = read_windows(str(file), load_tokenizer(tmp_path / "model"), count=16, window=64, seed=5).ids
    settings: dict[str, Any] = {"tokens": 8192, "window": 64, "evaluate": False, "overwrite": True, "uniform": True}
    errors = []
    for strength in (0.0, 0.5, 1.0):
        settings |= {"stream_strength": strength, "metric": "input", "calibration": str(file), "propagation_parts": 1}
        bondsmith.compress(tmp_path / "model", tmp_path / "out", keep=0.9, **settings)
        small = bondsmith.load(tmp_path / "out", dtype=torch.float32)
        with torch.no_grad():
            was, now = (m.model(input_ids=ids).last_hidden_state for m in (original, small))
        errors.append(float((now - was).norm() / was.norm()))
    assert errors[1] < 0.99 * errors[0]
    assert errors[2] < 0.98 * errors[0]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"stream_strength": 1.5}, r"stream_strength: 1\.5 is not in \[0, 1\]"),
        ({"gradient_share": 0}, r"gradient_share: 0 is not in \(0, 1\]"),
        ({"gradient_share": "all"}, "gradient_share: 'all' is not a number"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        Recipe.from_settings({"keep": 0.5} | settings)
