"""Healing through the Trainer of transformers, and the optimizer's steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny
from torch import nn
from transformers import AutoModelForCausalLM, TrainingArguments

import bondsmith
from bondsmith.nn.linear import MPOLinear
from bondsmith.nn.packed import PackedLinear
from bondsmith.stages.healing.losses import TopK, token_sums
from bondsmith.stages.healing.trainer import HealTrainer
from bondsmith.stages.training import Steps, trainable
from bondsmith.tensor.rounding import Grid, round_to_nearest
from bondsmith.tensor.sites import Sites


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trainer")
    save_tiny(path / "model")
    settings: dict[str, Any] = {"keep": 0.3, "uniform": True, "metric": "frobenius", "evaluate": False}
    bondsmith.compress(path / "model", path / "small", **settings)
    return path


def divergence(model: Any, teacher: Any, ids: torch.Tensor) -> float:
    counts = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        top = TopK.of(teacher(input_ids=ids).logits[:, :-1].flatten(0, 1), 64)
        sums = token_sums(model(input_ids=ids).logits, ids, counts, top, (1.0, 0.0))
    return float(sums.kl) / sums.tokens


def test_the_trainer_heals_and_saves_a_model_that_loads(home: Path, tmp_path: Path) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32)
    model = bondsmith.load(home / "small", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 500, (64, 32), generator=generator)]
    test = torch.randint(3, 500, (8, 32), generator=generator)
    before = divergence(model, teacher, test)
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=20,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        lr_scheduler_type="cosine",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = HealTrainer(model, arguments, train_dataset=rows, teacher=teacher, learning_rate=0.01)
    trainer.train()
    healed = divergence(model, teacher, test)
    assert healed < 0.85 * before
    assert all(m.gauge for m in model.modules() if isinstance(m, MPOLinear))
    trainer.save_model(str(tmp_path / "healed"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "healed", dtype=torch.float32)
    assert divergence(again, teacher, test) == pytest.approx(healed, rel=1e-3)


def test_the_loss_of_several_processes_is_that_of_one(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer counts the tokens of all processes, and gradients are averaged over them."""
    arguments = TrainingArguments(str(tmp_path / "run"), report_to=[], use_cpu=True)
    trainer = HealTrainer(bondsmith.load(home / "small", dtype=torch.float32), arguments)
    ids = torch.randint(3, 500, (4, 32), generator=torch.Generator().manual_seed(0))
    inputs, tokens = {"input_ids": ids, "labels": ids}, 4 * 31
    alone = float(trainer.compute_loss(trainer.model, inputs, num_items_in_batch=tokens))
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    assert float(trainer.compute_loss(trainer.model, inputs, num_items_in_batch=2 * tokens)) == pytest.approx(alone)


def network() -> MPOLinear:
    return MPOLinear(Sites((8, 1), (1, 6)), (3,), bias=True)


def test_a_step_moves_every_tensor_by_its_share() -> None:
    module = nn.ModuleDict(
        {"net": network(), "norm": nn.LayerNorm(6), "dense": nn.Linear(6, 6), "words": nn.Embedding(5, 6)}
    )
    parameters = trainable(module)
    assert set(parameters) == {
        "net.cores.0.weight",
        "net.cores.1.weight",
        "net.bias",
        "norm.weight",
        "norm.bias",
        "dense.bias",
    }
    before = {n: p.detach().clone() for n, p in parameters.items()}
    steps = Steps(module, parameters, 0.1, 0.01)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    steps.scale = 0.5
    steps.step()
    for name, parameter in parameters.items():
        size = float(before[name].square().mean().sqrt()) or 1e-2
        moved = float((parameter.detach() - before[name]).square().mean().sqrt()) / size
        assert moved == pytest.approx(0.05 if "cores" in name else 0.005, rel=0.01)
    left = steps.state[parameters["net.cores.0.weight"]]
    assert set(left) == {"momentum", "step"}, "a core keeps one number a parameter"


def test_the_change_of_a_core_has_level_singular_values() -> None:
    module = nn.ModuleDict({"net": MPOLinear(Sites((40, 1), (1, 30)), (20,), bias=False)})
    parameters = trainable(module)
    core = parameters["net.cores.1.weight"]
    before = core.detach().clone()
    steps = Steps(module, parameters, 0.1, 0.1)
    core.grad = torch.diag(torch.logspace(0, -2, 20)) @ torch.linalg.qr(torch.randn(30, 20))[0].T
    steps.step()
    values = torch.linalg.svdvals(core.detach() - before)
    assert values.max() / values.min() < 3
    assert torch.linalg.svdvals(core.grad).max() / torch.linalg.svdvals(core.grad).min() > 90


def test_of_packed_matrices_the_scales_are_trained_and_the_integers_stay() -> None:
    layer = PackedLinear.from_rounded(round_to_nearest(torch.randn(8, 6), Grid(4, 2)))
    layer.train_scales()
    module = nn.ModuleDict({"packed": layer})
    parameters = trainable(module)
    assert set(parameters) == {"packed.scales"}
    codes, scales = layer.codes.clone(), layer.scales.detach().clone()
    target = layer(torch.eye(6)).detach() * 1.1
    steps = Steps(module, parameters, 0.01, 0.01)
    for _ in range(30):
        steps.zero_grad()
        (layer(torch.eye(6)) - target).square().mean().backward()
        steps.step()
    assert torch.equal(layer.codes, codes)
    assert (layer.scales.detach() / scales).mean() == pytest.approx(1.1, abs=0.02)


def test_scales_of_packed_matrices_are_trained(home: Path, tmp_path: Path) -> None:
    bondsmith.compress(
        home / "model",
        tmp_path / "packed",
        keep=1.0,
        uniform=True,
        bits=4,
        group=16,
        metric="frobenius",
        evaluate=False,
    )
    model = bondsmith.load(tmp_path / "packed", dtype=torch.float32)
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear) and ".layers." in n}
    before = {n: m.scales.detach().clone() for n, m in packed.items()}
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 500, (8, 16))]
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    HealTrainer(model, arguments, train_dataset=rows, learning_rate=0.01).train()
    assert len(before) == 21
    assert not any(torch.equal(model.get_submodule(n).scales, old) for n, old in before.items())
