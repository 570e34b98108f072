"""Tokens per second of two models, prefill and decode apart, measured in alternation so that a busy machine treats both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def compare_speed(
    original: PreTrainedModel,
    compressed: PreTrainedModel,
    *,
    batch: int = 8,
    tokens: int = 128,
    new_tokens: int = 16,
    rounds: int = 3,
    seed: int = 0,
    advance: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """Returns the `speed` section of `results.json`: medians in tokens per second, and the median of the ratios per round.

    Args:
        batch: sequences of the prefill measurement; decoding is measured with one.
        tokens: prompt length of both measurements.
        new_tokens: tokens decoded per round.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = original.get_input_embeddings().weight.shape[0]
    tokens = min(tokens, int(getattr(original.config, "max_position_embeddings", tokens + new_tokens)) - new_tokens)
    ids = torch.randint(0, vocabulary, (batch, tokens), generator=generator).to(original.device)
    models = (original, compressed)
    for model in models:
        time_prefill(model, ids[:1, :8])
    times: dict[str, list[tuple[float, float]]] = {"prefill": [], "decode": []}
    for done in range(rounds):
        times["prefill"].append((time_prefill(original, ids), time_prefill(compressed, ids)))
        times["decode"].append((_decode(original, ids[:1], new_tokens), _decode(compressed, ids[:1], new_tokens)))
        advance((done + 1) / rounds)
    return {
        "prefill": _row(times["prefill"], batch, tokens, batch * tokens),
        "decode": _row(times["decode"], 1, new_tokens, new_tokens),
    }


def _row(pairs: list[tuple[float, float]], batch: int, tokens: int, count: int) -> dict[str, Any]:
    return {
        "batch": batch,
        "tokens": tokens,
        "original": count / statistics.median(a for a, _ in pairs),
        "compressed": count / statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
        "rounds": len(pairs),
    }


@torch.no_grad()
def time_prefill(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Returns the seconds of one forward pass over `ids` (batch, tokens)."""
    _wait(model)
    start = time.perf_counter()
    model(input_ids=ids, use_cache=False)
    _wait(model)
    return time.perf_counter() - start


def _decode(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> float:
    out = model(input_ids=ids, use_cache=True)
    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    _wait(model)
    start = time.perf_counter()
    for _ in range(new_tokens):
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    _wait(model)
    return time.perf_counter() - start


def _wait(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
