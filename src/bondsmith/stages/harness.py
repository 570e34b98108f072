"""lm-evaluation-harness's Hugging Face adapter with bounded memory, batches that depend on the rows only, and progress.

The log-likelihoods are lm-eval's; what differs is which logits are computed. Importing this module imports lm-eval.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROLLING_WINDOW = 2048  # tokens; the window of published perplexities, and 0.4 GB of logits for a 49k vocabulary
_LOGITS = 2**26  # most float32 logits of one batch (0.25 GB); lm-eval makes a copy of the same size

Request = tuple[Any, list[int], list[int]]  # (texts, context tokens, continuation tokens)
Answer = tuple[float, bool]  # (log-likelihood of the continuation, whether greedy decoding would give it)


class Scorer(HFLM):  # lm-eval is not typed
    """An lm-eval model around a loaded one; calls `on_progress(done, total)` after each batch of requests."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        # A copy, because lm-eval gives a tokenizer without a padding token one.
        super().__init__(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, softmax_dtype="float32"
        )
        self._on_progress = on_progress
        self._done = self._total = 0
        self._keep = 0
        self._can_keep = "logits_to_keep" in inspect.signature(model.forward).parameters

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        self._start(len(requests))
        answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        longest: int | None = self._max_length
        self._max_length: int | None = min(self.max_length, ROLLING_WINDOW)
        try:
            self._start(sum(-(-len(self.tok_encode(request.args[0])) // self.max_length) for request in requests))
            answers: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        finally:
            self._max_length = longest
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self._start(len(requests))
        order = sorted(range(len(requests)), key=lambda i: -len(self.tok_encode(requests[i].args[0])))
        answers = [""] * len(requests)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            texts = super().generate_until([requests[i] for i in batch], disable_tqdm=True)
            for i, text in zip(batch, texts, strict=True):
                answers[i] = text
            self._advance(len(batch))
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        answers: list[Answer] = [(0.0, False)] * len(requests)
        for batch, keep in self._batches(requests):
            self._keep = keep
            scored = super()._loglikelihood_tokens([requests[i] for i in batch], disable_tqdm=True)
            for i, answer in zip(batch, scored, strict=True):
                answers[i] = answer
            self._advance(len(batch))
        return answers

    def _batches(self, requests: Sequence[Request]) -> Iterator[tuple[list[int], int]]:
        """(request numbers, logits kept per row), longest inputs first; requests that share an input share a row."""
        inputs: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            inputs.setdefault((*context, *continuation[:-1]), []).append(i)
        batch: list[int] = []
        rows = keep = longest = 0
        for tokens, members in sorted(inputs.items(), key=lambda item: (-len(item[0]), item[0])):
            length = min(len(tokens), self.max_length)
            longest = longest or length
            needed = longest - length + max(len(requests[i][2]) for i in members)
            if rows == self.batch_size or (rows and (rows + 1) * max(keep, needed) * self._vocabulary > _LOGITS):
                yield batch, keep
                batch, rows, keep, longest = [], 0, 0, length
                needed = max(len(requests[i][2]) for i in members)
            batch, rows, keep = batch + members, rows + 1, max(keep, needed)
        if batch:
            yield batch, keep

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        # lm-eval finds the scored positions from the right end, so leading logits need not exist.
        with torch.no_grad():
            logits: Tensor = self.model(inps, use_cache=False, **self._last_logits(self._keep)).logits
        return logits

    def _last_logits(self, count: int) -> dict[str, int]:
        return {"logits_to_keep": count} if self._can_keep else {}

    @property
    def _vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    def _start(self, total: int) -> None:
        self._done, self._total = 0, total
        self._advance(0)

    def _advance(self, count: int) -> None:
        self._done += count
        if self._on_progress:
            self._on_progress(self._done, self._total)
