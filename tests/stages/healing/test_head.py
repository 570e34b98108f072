"""The loss computed at the head is that of the logits, with its gradients, wherever the logits are what the head returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import FAMILIES, VOCABULARY, tiny_model
from torch import Tensor

from bondsmith.nn.packed import PackedEmbedding, PackedHead, PackedLinear
from bondsmith.stages.healing import head
from bondsmith.stages.healing.losses import Sums, TopK, token_sums
from bondsmith.stages.healing.teacher import logits_of
from bondsmith.tensor.rounding import Grid, round_to_nearest

WEIGHTS = (0.7, 0.3)


def batch() -> tuple[Tensor, Tensor, TopK]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    counts = torch.rand(3, 9, generator=generator) < 0.7
    rows = int(counts[:, 1:].sum())
    return ids, counts, TopK.of(2 * torch.randn(rows, VOCABULARY, generator=generator), 7)


def gradients(model: Any, sums: Sums) -> list[Tensor]:
    model.zero_grad()
    (sums.loss / 5).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("trains_ends", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_family_that_fits(family: str, trains_ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head._AT_ONCE, "cpu", 5 * VOCABULARY)  # several parts, the last one smaller
    model = tiny_model(family)
    ids, counts, teacher = batch()
    for ends in (model.get_input_embeddings(), model.get_output_embeddings()):
        ends.requires_grad_(trains_ends)

    def run() -> Tensor:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    assert head.fits(model, run)
    plain = token_sums(run(), ids, counts, teacher, WEIGHTS)
    expected = gradients(model, plain)
    found = head.head_sums(model, run, ids, counts, teacher, WEIGHTS)
    assert found.tokens == plain.tokens
    for name in ("loss", "kl", "ce"):
        assert torch.allclose(getattr(found, name), getattr(plain, name), rtol=1e-5)
    for a, b in zip(gradients(model, found), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6 + 1e-5 * float(b.abs().max()))
    with torch.no_grad():
        assert torch.allclose(head.head_sums(model, run, ids, counts, teacher, WEIGHTS).ce, plain.ce, rtol=1e-5)
    assert run().shape == (3, 9, VOCABULARY)  # the head is as it was


@pytest.mark.parametrize(("family", "setting"), [("granite", {"logits_scaling": 3.0}), ("gemma2", {})])
def test_a_model_that_alters_its_logits_does_not_fit(family: str, setting: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(family, vocab_size=50, num_key_value_heads=1, head_dim=8, **sizes, **setting)
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.arange(8)[None]
    assert not head.fits(model, lambda: model(input_ids=ids).logits)


def test_a_hooked_head_is_called_and_left_hooked() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    ids, counts, teacher = batch()
    own, calls = model.lm_head.forward, []

    def hooked(hidden: Tensor) -> Tensor:
        calls.append(1)
        logits: Tensor = own(hidden)
        return logits

    model.lm_head.forward = hooked

    def run() -> Tensor:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    assert head.fits(model, run)
    plain = token_sums(run(), ids, counts, teacher, WEIGHTS).loss
    before = len(calls)
    assert torch.allclose(head.head_sums(model, run, ids, counts, teacher, WEIGHTS).loss, plain, rtol=1e-5)
    assert len(calls) > before
    assert model.lm_head.forward is hooked


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trains_scales", [False, True])
def test_a_packed_head(tied: bool, trains_scales: bool, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head._AT_ONCE, "cpu", 5 * VOCABULARY)
    model, grid = tiny_model("llama", tie_word_embeddings=False), Grid(4, 32, symmetric=False)
    rounded = round_to_nearest(model.lm_head.weight.detach(), grid)
    packed: PackedEmbedding | PackedLinear = PackedLinear.from_rounded(rounded)
    model.lm_head = packed
    if tied:
        packed = PackedEmbedding(model.get_input_embeddings(), grid)
        packed.put(rounded)
        model.set_input_embeddings(packed)
        model.lm_head = PackedHead(packed)
    model.requires_grad_(False)
    model.model.norm.requires_grad_(True)
    packed.train_scales(trains_scales)
    ids, counts, teacher = batch()

    def run() -> Tensor:
        return logits_of(model, ids, None, half)

    assert head.fits(model, run)
    plain = token_sums(run(), ids, counts, teacher, WEIGHTS)
    expected = gradients(model, plain)
    found = head.head_sums(model, run, ids, counts, teacher, WEIGHTS)
    assert torch.allclose(found.loss, plain.loss, rtol=1e-3 if half else 1e-5)
    for a, b in zip(gradients(model, found), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6 + (2e-2 if half else 1e-5) * float(b.abs().max()))
    assert len(expected) == (3 if trains_scales else 1)


@pytest.mark.parametrize("trains", [False, True])
def test_in_half_precision(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head._AT_ONCE, "cpu", 5 * VOCABULARY)
    model = tiny_model("gpt2")
    model.get_output_embeddings().requires_grad_(trains)
    ids, counts, teacher = batch()

    def run() -> Tensor:
        return logits_of(model, ids, None, half=True)

    plain = token_sums(run(), ids, counts, teacher, WEIGHTS)
    expected = gradients(model, plain)
    found = head.head_sums(model, run, ids, counts, teacher, WEIGHTS)
    assert torch.allclose(found.loss, plain.loss, rtol=1e-3)
    for a, b in zip(gradients(model, found), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6 + 2e-2 * float(b.abs().max()))


def test_windows_without_a_counted_token() -> None:
    model = tiny_model("llama")
    ids, counts, _ = batch()
    sums = head.head_sums(model, lambda: model(input_ids=ids).logits, ids, torch.zeros_like(counts), None, (0.0, 1.0))
    assert (float(sums.loss.detach()), sums.tokens) == (0.0, 0)
    assert all(not g.any() for g in gradients(model, sums))
