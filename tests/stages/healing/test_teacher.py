"""The divergence over kept words, and the cache of the original's predictions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, tiny_model
from torch import Tensor

from bondsmith.stages.healing import losses
from bondsmith.stages.healing.losses import TopK, divergence, token_sums
from bondsmith.stages.healing.samples import Windows
from bondsmith.stages.healing.teacher import SHARD_WINDOWS, Cache, ask


def windows(count: int = SHARD_WINDOWS + 3, tokens: int = 16) -> Windows:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (count, tokens), generator=generator)
    positions = torch.arange(tokens).repeat(count, 1)
    counts = torch.rand(count, tokens, generator=generator) < 0.7
    counts[:, 0] = False
    return Windows(ids, positions, counts, count, 0)


def loss(logits: Tensor, teacher: TopK) -> Tensor:
    return divergence(logits.log_softmax(-1).gather(-1, teacher.words), teacher)


def test_all_words_kept_is_the_divergence_itself() -> None:
    a, b = torch.randn(7, 30), torch.randn(7, 30)
    expected = torch.nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none").sum(
        -1
    )
    assert torch.allclose(loss(b, TopK.of(a, 30)), expected, atol=1e-4)


def test_few_words_kept_is_a_lower_bound_that_grows() -> None:
    a, b = 3 * torch.randn(200, 300), 3 * torch.randn(200, 300)
    values = [loss(b, TopK.of(a, k)).mean() for k in (1, 8, 64, 300)]
    assert values == sorted(values)
    assert values[0] > 0
    assert values[2] > 0.8 * values[3]


def test_its_gradient_is_that_of_the_lumped_distribution() -> None:
    a, b = torch.randn(4, 12, dtype=torch.float64), torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    teacher = TopK(*(t if i == 0 else t.double() for i, t in enumerate((TopK.of(a, 5).words, TopK.of(a, 5).logp))))
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), (b,), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_and_their_gradients_are_those_of_all_log_probabilities(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_AT_ONCE", 5 * 50)  # several parts, the last one smaller
    data = windows(3, 9)
    logits = (2 * torch.randn(3, 9, 50)).to(dtype).requires_grad_()
    ids, counts = data.ids % 50, data.counts
    teacher = TopK.of(2 * torch.randn(int(counts[:, 1:].sum()), 50), 7)
    sums = token_sums(logits, ids, counts, teacher, (0.7, 0.3))
    (found,) = torch.autograd.grad(sums.loss, logits)

    chosen = logits[:, :-1][counts[:, 1:]].float().log_softmax(-1)
    ce = torch.nn.functional.nll_loss(chosen, ids[:, 1:][counts[:, 1:]], reduction="sum")
    kl = divergence(chosen.gather(-1, teacher.words), teacher).sum()
    (expected,) = torch.autograd.grad(0.7 * kl + 0.3 * ce, logits)
    assert sums.tokens == len(chosen)
    assert torch.allclose(sums.kl, kl, rtol=1e-4)
    assert torch.allclose(sums.ce, ce, rtol=1e-4)
    assert torch.allclose(found.float(), expected.float(), atol=1e-5 if dtype == torch.float32 else 1e-2)


def test_a_cache_gives_back_what_the_original_says(tmp_path: Path) -> None:
    model, data = tiny_model("llama"), windows()
    cache = Cache.at(tmp_path, data, {"a": "1"}, 16, VOCABULARY, True)
    assert cache.missing == [0, 1]
    for i in cache.missing:
        cache.write(i, lambda places: ask(model, data, places, 16, True))
    assert cache.missing == []
    index = torch.tensor([18, 2, 16])
    kept, fresh = cache.read(index), ask(model, data, index, 16, True)
    assert kept.words.shape == (int(data.counts[index].sum()), 16)
    assert torch.equal(kept.words, fresh.words)
    assert torch.allclose(kept.logp, fresh.logp, atol=4e-3)
    with torch.no_grad():
        logits = model(input_ids=data.ids[index]).logits
    sums = token_sums(logits, data.ids[index], data.counts[index], kept, (1.0, 0.0))
    assert abs(float(sums.kl)) / sums.tokens < 1e-4, "the original diverges from itself"
    assert cache.bytes < (4 * 16 + 1) * data.tokens + 2000


def test_another_original_text_k_or_precision_has_another_place(tmp_path: Path) -> None:
    data = windows()
    places = {
        Cache.at(tmp_path, d, files, k, VOCABULARY, apart).folder
        for d, files, k, apart in (
            (data, {"a": "1"}, 16, True),
            (data, {"a": "2"}, 16, True),
            (data, {"a": "1"}, 8, True),
            (data, {"a": "1"}, 16, False),
            (windows(20), {"a": "1"}, 16, True),
        )
    }
    places.add(Cache.at(tmp_path, data, {"a": "1"}, 16, VOCABULARY, True, half=True).folder)
    assert len(places) == 6
    assert Cache.at(tmp_path, data, {"elsewhere": "1"}, 16, VOCABULARY, True).folder in places


@pytest.mark.parametrize(("vocabulary", "bytes_a_word"), [(2**16, 2), (2**16 + 1, 4)])
def test_300k_tokens_fit_into_150_megabytes(tmp_path: Path, vocabulary: int, bytes_a_word: int) -> None:
    data = windows(SHARD_WINDOWS)
    cache = Cache.at(tmp_path, data, {"a": "1"}, 64, vocabulary, True)
    cache.write(
        0,
        lambda places: TopK(
            *(torch.zeros(int(data.counts[places].sum()), 64, dtype=t) for t in (torch.int64, torch.float32))
        ),
    )
    token = (cache.bytes - 300) / data.tokens
    assert token <= 64 * (2 + bytes_a_word)
    assert 300_000 * token < 150e6
