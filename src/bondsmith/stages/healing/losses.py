"""What healing minimises: the divergence from the original's next-token distribution, and the cross entropy of the text.

Of the original only the `K` likeliest words of every token are kept, and what is left for all others together; the divergence is that
of these `K + 1` probabilities, a lower bound of the one over all words.

Legend: `N` tokens, `V` words, `K` kept words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LEAST = 1e-6  # probability of all other words together: below this, rounding of the kept ones decides
_AT_ONCE = 2**22  # numbers of the logits that are looked at together: they stay in the cache of a CPU


@dataclass(frozen=True)
class TopK:
    """The likeliest words of a distribution: `words` and their log-probabilities `logp`, float32, both (N, K)."""

    words: Tensor
    logp: Tensor

    @classmethod
    def of(cls, logits_NV: Tensor, k: int) -> TopK:
        """Returns the `k` likeliest words of logits.

        >>> top = TopK.of(torch.tensor([[0.0, 1.0, 0.0]]), 1)
        >>> top.words.tolist(), round(top.logp.exp().item(), 3)
        ([[1]], 0.576)
        """
        logits = logits_NV.float()
        values, words = logits.topk(min(k, logits.shape[-1]), -1)
        return cls(words, values - logits.logsumexp(-1, keepdim=True))


def divergence(student_NK: Tensor, teacher: TopK) -> Tensor:
    """Returns `KL(teacher || student)` per token over the kept words, of which the student's log-probabilities come in, and the rest.

    In nats, (N,).

    >>> top = TopK.of(torch.randn(5, 11), 3)
    >>> divergence(top.logp, top).abs().max() < 1e-5
    tensor(True)
    """
    p_NK = teacher.logp.exp()
    rest_N = (1 - p_NK.sum(-1)).clamp_min(_LEAST)
    student_rest_N = (1 - student_NK.exp().sum(-1)).clamp_min(_LEAST)
    kept_N = (p_NK * (teacher.logp - student_NK)).sum(-1)
    return kept_N + rest_N * (rest_N.log() - student_rest_N.log())


@dataclass(frozen=True)
class Sums:
    """Sums over tokens: of the divergence, of the cross entropy, and how many tokens there were."""

    kl: Tensor
    ce: Tensor
    tokens: int

    def loss(self, kl_weight: float, ce_weight: float) -> Tensor:
        """Returns the weighted sum that is trained on."""
        return kl_weight * self.kl + ce_weight * self.ce


def token_sums(logits_WTV: Tensor, ids_WT: Tensor, counts_WT: Tensor, teacher: TopK | None) -> Sums:
    """Returns the sums over the counted tokens of windows; `teacher` has one row per counted token, or is None."""
    places_N = (counts_WT[:, 1:].nonzero() * counts_WT.new_tensor([ids_WT.shape[1], 1], dtype=torch.int64)).sum(-1)
    words = ids_WT.flatten()[places_N + 1, None]
    if teacher is not None:
        words = torch.cat((words, teacher.words), -1)
    logp: Tensor = _LogProbabilities.apply(logits_WTV.flatten(0, 1), places_N, words)
    kl = divergence(logp[:, 1:], teacher).sum() if teacher is not None else logp.new_zeros(())
    return Sums(kl, -logp[:, 0].sum(), len(logp))


class _LogProbabilities(torch.autograd.Function):
    """The log-probabilities of some words at some places: `(logits - logsumexp)[places, words]`, float32.

    Autograd's own way, by `log_softmax`, an index and a gather, writes six arrays as large as the logits; this one their gradient alone.
    """

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, places_N: Tensor, words_NK: Tensor) -> Tensor:
        parts = places_N.split(max(1, _AT_ONCE // logits_MV.shape[-1]))
        sizes_N = torch.cat([logits_MV[part].float().logsumexp(-1) for part in parts])
        ctx.save_for_backward(logits_MV, places_N, words_NK, sizes_N)
        return logits_MV[places_N[:, None], words_NK].float() - sizes_N[:, None]

    @staticmethod
    def backward(ctx: Any, gradient_NK: Tensor) -> tuple[Tensor, None, None]:
        logits_MV, places_N, words_NK, sizes_N = ctx.saved_tensors
        total_N = gradient_NK.sum(-1)
        gradient_MV = torch.zeros_like(logits_MV)
        at_once = max(1, _AT_ONCE // logits_MV.shape[-1])
        for first in range(0, len(places_N), at_once):
            rows = slice(first, first + at_once)
            part = logits_MV[places_N[rows]].float().sub_(sizes_N[rows, None]).exp_().mul_(-total_N[rows, None])
            part.scatter_add_(-1, words_NK[rows], gradient_NK[rows])
            gradient_MV[places_N[rows]] = part.to(logits_MV.dtype)
        return gradient_MV, None, None
