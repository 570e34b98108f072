"""How far a compressed model is from its original on text: perplexity, Kullback-Leibler divergence, agreement of the first choice.

Both models stream through memory block by block, so that models larger than memory can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bondsmith.data import Windows
from bondsmith.model.blocks import BlockRunner
from bondsmith.model.hub import replace_matrices
from bondsmith.model.skeleton import empty, fill, skeleton, stored_names
from bondsmith.model.source import Source


class Streamed:
    """A model opened for one pass block after block; embedding and head stay in memory."""

    def __init__(self, source: Source, device: torch.device):
        config = source.config.__class__.from_dict(source.config.to_dict())
        quantization = config.__dict__.pop("quantization_config", None)
        self.source, self.device = source, device
        model = skeleton(config, device)
        path = BlockRunner(model).path
        if quantization is not None:
            replace_matrices(model, quantization["networks"], quantization.get("packed"))
        self.runner = BlockRunner(model, path)
        outside = [n for n in stored_names(model) if not n.startswith(path + ".")]
        fill(model, source.read(outside), device)
        model.tie_weights()

    def pass_block(self, k: int, ids: Tensor, hidden: Tensor) -> Tensor:
        """Returns the hidden states after block k, (windows, tokens, width); its weights are in memory only meanwhile."""
        block, prefix = self.runner.blocks[k], f"{self.runner.path}.{k}."
        names = [n for n in self.source.places if n.startswith(prefix)]
        fill(block, {n.removeprefix(prefix): t for n, t in self.source.read(names).items()}, self.device)
        rows = [self.runner.block(k, ids[i : i + 1], hidden[i : i + 1]) for i in range(len(ids))]
        empty(block)
        return torch.cat(rows)


@torch.no_grad()
def compare(
    original: Source,
    compressed: Source,
    texts: Sequence[Windows],
    device: torch.device,
    advance: Callable[[float], None] = lambda share: None,
) -> list[dict[str, Any]]:
    """Returns one row of `results.json` per text: perplexities, KL in nats a token, share of equal first choices, standard errors.

    Standard errors are over windows, which are independent; tokens in a window are not.
    """
    models = [Streamed(original, device), Streamed(compressed, device)]
    ids = torch.cat([t.ids for t in texts]).to(device)
    hidden = [torch.cat([m.runner.enter(ids[i : i + 1]) for i in range(len(ids))]) for m in models]
    count = len(models[0].runner)
    for k in range(count):
        hidden = [m.pass_block(k, ids, h) for m, h in zip(models, hidden, strict=True)]
        advance((k + 1) / (count + 1))
    rows, first = [], 0
    for text in texts:
        windows = range(first, first + len(text.ids))
        rows.append(_row(text, [_window(models, ids[i : i + 1], [h[i : i + 1] for h in hidden]) for i in windows]))
        first += len(text.ids)
    advance(1.0)
    return rows


def _window(models: list[Streamed], ids: Tensor, hidden: list[Tensor]) -> tuple[float, float, float, float]:
    """Returns means over one window's predictions: both cross entropies, KL, agreement."""
    targets = ids[0, 1:]
    first, second = (
        m.runner.logits(ids, h)[0, :-1].float().log_softmax(-1) for m, h in zip(models, hidden, strict=True)
    )
    losses = [-p.gather(1, targets[:, None]).mean().item() for p in (first, second)]
    kl = (first.exp() * (first - second)).sum(-1).mean().item()
    same = (first.argmax(-1) == second.argmax(-1)).float().mean().item()
    return losses[0], losses[1], kl, same


def _row(text: Windows, windows: list[tuple[float, float, float, float]]) -> dict[str, Any]:
    values = torch.tensor(windows, dtype=torch.float64)
    mean = values.mean(0)
    error = values.std(0) / math.sqrt(len(windows)) if len(windows) > 1 else torch.full((4,), math.nan)
    difference = values[:, 1] - values[:, 0]
    return {
        "text": text.spec if text.spec.startswith("hf:") else Path(text.spec).name,
        "windows": len(windows),
        "tokens": text.ids.numel() - len(windows),
        "perplexity": {"original": _exp(mean[0]), "compressed": _exp(mean[1])},
        "nats_lost": difference.mean().item(),
        "nats_lost_stderr": _or_none(difference.std() / math.sqrt(len(windows)) if len(windows) > 1 else error[0]),
        "kl": mean[2].item(),
        "kl_stderr": _or_none(error[2]),
        "top1": mean[3].item(),
        "top1_stderr": _or_none(error[3]),
    }


def _exp(value: Tensor) -> float:
    return math.exp(min(value.item(), 700.0))


def _or_none(value: Tensor) -> float | None:
    return None if math.isnan(value.item()) else value.item()
