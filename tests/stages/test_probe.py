"""Probes against plain full forward passes of the whole model with the matrix replaced, in every family."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, save_tiny
from torch import Tensor
from transformers import PreTrainedModel

from bondsmith.model.blocks import BlockRunner, matrices, replaced_weight, weight
from bondsmith.model.skeleton import skeleton
from bondsmith.model.source import ModelError, load_whole, open_source
from bondsmith.stages.probe import Probe, ProbeResult, measure_probes
from bondsmith.stages.streams import Stream

IDS = torch.randint(3, 500, (5, 12), generator=torch.Generator().manual_seed(0))


def halve(W: Tensor) -> Tensor:
    return W * torch.linspace(0.3, 1.0, W.shape[0])[:, None]


def expected(model: PreTrainedModel, name: str) -> dict[str, float]:
    """The four figures by the textbook, in float64, from two forward passes."""
    matrix = model.get_submodule(name)
    with torch.no_grad():
        before = model(input_ids=IDS).logits.double()[:, :-1].log_softmax(-1)
        with replaced_weight(matrix, halve(weight(matrix))):
            after = model(input_ids=IDS).logits.double()[:, :-1].log_softmax(-1)
    target = IDS[:, 1:, None]
    lost = (before - after).gather(-1, target)[..., 0].mean(1)
    kl = (before.exp() * (before - after)).sum(-1).mean(1)
    same = (before.argmax(-1) == after.argmax(-1)).double().mean(1)
    error = 1 / math.sqrt(len(IDS))
    return {
        "kl": kl.mean().item(),
        "kl_stderr": kl.std().item() * error,
        "nats_lost": lost.mean().item(),
        "nats_lost_stderr": lost.std().item() * error,
        "top1": same.mean().item(),
        "top1_stderr": same.std().item() * error,
        "loss": -after.gather(-1, target).mean().item(),
    }


def check(result: ProbeResult, model: PreTrainedModel) -> None:
    wanted = expected(model, result.name)
    assert wanted["kl"] > 1e-6
    assert (result.windows, result.tokens) == (5, 55)
    for key, value in wanted.items():
        absolute = 1e-9 if key.startswith("kl") else 1e-6
        assert getattr(result, key) == pytest.approx(value, rel=1e-3, abs=absolute), (result.name, key)


@pytest.mark.parametrize("family", FAMILIES)
def test_probes_are_full_passes(family: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", family)
    source = open_source(tmp_path / "model", tmp_path / "cache")
    runner = BlockRunner(skeleton(source.config))
    names = [f"{runner.path}.{k}.{n}" for k in (2, 0, 1) for n in list(matrices(runner.blocks[k]))[:: 2 if k else 1]]
    heard: list[float] = []
    found = measure_probes(
        source, runner, IDS, [Probe(n, halve, "halved") for n in names], tmp_path / "work", advance=heard.append
    )
    assert [r.name for r in found] == names
    for result in found:
        check(result, model)
    assert heard == sorted(heard)
    assert heard[-1] == pytest.approx(1.0)
    assert all(p.is_meta for p in runner.blocks.parameters())
    assert not list((tmp_path / "work").glob("probe-*"))


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head(tied: bool, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", tie_word_embeddings=tied)
    source = open_source(tmp_path / "model", tmp_path / "cache")
    runner = BlockRunner(skeleton(source.config))
    names = ["model.embed_tokens", "lm_head", "model.layers.1.mlp.up_proj"]
    for result in measure_probes(source, runner, IDS, [Probe(n, halve) for n in names], tmp_path / "work"):
        check(result, model)


def test_a_model_in_memory_and_ready_matrices(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    source = open_source(tmp_path / "model", tmp_path / "cache")
    runner = BlockRunner(load_whole(source))
    name = "model.layers.1.self_attn.o_proj"
    new = halve(weight(runner.model.get_submodule(name)))
    (found,) = measure_probes(source, runner, IDS, [Probe(name, new)], tmp_path / "work")
    check(found, model)
    assert not any(p.is_meta for p in runner.model.parameters())
    assert torch.equal(runner.model.get_submodule(name).weight, model.get_submodule(name).weight)


def test_small_changes_keep_their_digits(tmp_path: Path) -> None:
    """A change a thousandth as large costs a millionth of the KL: far below the rounding of a sum of log-probabilities."""
    save_tiny(tmp_path / "model")
    source = open_source(tmp_path / "model", tmp_path / "cache")
    runner = BlockRunner(skeleton(source.config))
    name = "model.layers.2.mlp.down_proj"
    noise = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))

    def add(scale: float) -> Probe:
        return Probe(name, lambda W: W + scale * noise)

    large, small = measure_probes(source, runner, IDS, [add(1e-2), add(1e-4)], tmp_path / "work")
    assert small.kl == pytest.approx(large.kl * 1e-4, rel=0.05)
    assert small.kl < 1e-7


def test_only_what_is_needed_runs_and_the_original_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny(tmp_path / "model")
    source = open_source(tmp_path / "model", tmp_path / "cache")
    runner = BlockRunner(skeleton(source.config))
    passes: list[int] = []
    block = BlockRunner.block

    def counted(self: BlockRunner, index: int, *args: object) -> Tensor:
        passes.append(index)
        return block(self, index, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(BlockRunner, "block", counted)
    deep, shallow = "model.layers.2.mlp.up_proj", "model.layers.0.mlp.up_proj"
    for name, wanted in ((deep, [0, 1, 2, 2]), (deep, [2]), (shallow, [0, 1, 2])):
        passes.clear()
        (found,) = measure_probes(source, runner, IDS, [Probe(name, halve)], tmp_path / "work")
        assert passes == wanted
        check(found, model)
    passes.clear()
    measure_probes(source, runner, IDS[:4], [Probe(deep, halve)], tmp_path / "work")
    assert passes == [0, 1, 2, 2], "other windows, other hidden states"


def test_bad_probes_are_named_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "model")
    source = open_source(tmp_path / "model", tmp_path / "cache")
    runner = BlockRunner(skeleton(source.config))
    name = "model.layers.1.self_attn.k_proj"
    monkeypatch.setattr(Stream, "write", lambda *_: pytest.fail("work was done"))
    for probe, message in (
        (Probe("model.layers.7.mlp.up_proj", halve), r"model\.layers\.7\.mlp\.up_proj.*named like model\.layers\.0\."),
        (
            Probe(name, torch.zeros(3, 4), "cut"),
            r"k_proj: the probe 'cut' gives a weight of 3 x 4, the matrix is 16 x 32",
        ),
    ):
        with pytest.raises(ModelError, match=message):
            measure_probes(source, runner, IDS, [Probe(name, halve), probe], tmp_path / "work")
    with pytest.raises(ModelError, match="two tokens"):
        measure_probes(source, runner, IDS[:, :1], [Probe(name, halve)], tmp_path / "work")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_that_resumes_is_the_whole_pass(family: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", family)
    runner = BlockRunner(model)
    ran: list[int] = []
    for k, block in enumerate(runner.blocks):
        block.register_forward_hook(lambda *_, k=k: ran.append(k))
    name, matrix = next(iter(matrices(runner.blocks[2]).items()))

    def logits(ids: Tensor) -> Tensor:
        ran.clear()
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    others = IDS[:2] + 1
    plain, plain_others = logits(IDS), logits(others)
    with replaced_weight(matrix, halve(weight(matrix))):
        wanted = logits(IDS)
    with runner.resuming(2, tmp_path):
        assert torch.equal(logits(IDS), plain)
        assert ran == [0, 1, 2]
        assert torch.equal(logits(others), plain_others)
        assert torch.allclose(logits(IDS), plain, atol=1e-6)
        assert ran == [2]
        with replaced_weight(matrix, halve(weight(matrix))):
            assert torch.allclose(logits(IDS), wanted, atol=1e-6), name
        assert torch.allclose(logits(others), plain_others, atol=1e-6)
        greedy = model.generate(IDS[:1], max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert torch.equal(greedy, model.generate(IDS[:1], max_new_tokens=3, do_sample=False, eos_token_id=None))
    assert torch.equal(logits(IDS), plain)
    assert not list(tmp_path.glob("*.pt"))
