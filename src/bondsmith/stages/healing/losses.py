"""What healing minimises: the divergence from the original's next-token distribution, and the cross entropy of the text.

Of the original only the `K` likeliest words of every token are kept, and what is left for all others together; the divergence is that
of these `K + 1` probabilities, a lower bound of the one over all words.

Legend: `N` tokens, `V` words, `K` kept words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

_LEAST = 1e-6  # probability of all other words together: below this, rounding of the kept ones decides


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


def divergence(logp_NV: Tensor, teacher: TopK) -> Tensor:
    """Returns `KL(teacher || student)` per token over the kept words and the rest, in nats, (N,).

    >>> logits = torch.randn(5, 11)
    >>> divergence(logits.log_softmax(-1), TopK.of(logits, 3)).abs().max() < 1e-5
    tensor(True)
    """
    student_NK = logp_NV.gather(-1, teacher.words)
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
    chosen = counts_WT[:, 1:]
    logp_NV = logits_WTV[:, :-1][chosen].float().log_softmax(-1)
    ce = F.nll_loss(logp_NV, ids_WT[:, 1:][chosen], reduction="sum")
    kl = divergence(logp_NV, teacher).sum() if teacher is not None else torch.zeros_like(ce)
    return Sums(kl, ce, len(logp_NV))
