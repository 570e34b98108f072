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
    """Sums over `tokens` tokens: of the divergence, of the cross entropy, and the weighted sum of both, which is trained on.

    All are scalars; only `loss` has a gradient.
    """

    loss: Tensor
    kl: Tensor
    ce: Tensor
    tokens: int


def token_sums(
    logits_WTV: Tensor, ids_WT: Tensor, counts_WT: Tensor, teacher: TopK | None, weights: tuple[float, float]
) -> Sums:
    """Returns the sums over the counted tokens of windows.

    Args:
        teacher: one row per counted token; without it the divergence is zero.
        weights: of divergence and cross entropy in the loss.
    """
    places_N, words_NK = targets(ids_WT, counts_WT, teacher)
    return place_sums(logits_WTV.flatten(0, 1), places_N, words_NK, teacher, weights)


def targets(ids_WT: Tensor, counts_WT: Tensor, teacher: TopK | None) -> tuple[Tensor, Tensor]:
    """Returns the places among all tokens, rising, that predict a counted token, and that with the teacher's words: (N,), (N, 1 + K)."""
    places_N = (counts_WT[:, 1:].nonzero() * counts_WT.new_tensor([ids_WT.shape[1], 1], dtype=torch.int64)).sum(-1)
    words_NK = ids_WT.flatten()[places_N + 1, None]
    return places_N, words_NK if teacher is None else torch.cat((words_NK, teacher.words), -1)


def place_sums(
    logits_MV: Tensor,
    places_N: Tensor,
    words_NK: Tensor,
    teacher: TopK | None,
    weights: tuple[float, float],
    consumes: bool = False,
) -> Sums:
    """Returns the sums over some places; words and teacher have a row for each.

    With `consumes` the logits are written over.
    """
    logp: Tensor = _LogProbabilities.apply(logits_MV, places_N, words_NK, consumes)
    kl = divergence(logp[:, 1:], teacher).sum() if teacher is not None else logp.new_zeros(())
    ce = -logp[:, 0].sum()
    return Sums(weights[0] * kl + weights[1] * ce, kl.detach(), ce.detach(), len(logp))


class _LogProbabilities(torch.autograd.Function):
    """The log-probabilities of some words at some places: `(logits - logsumexp)[places, words]`, float32; places rise.

    Autograd's own way, by `log_softmax`, an index and a gather, writes six arrays as large as the logits; this one their gradient alone.
    Logits in float32 that may be written over become their exponentials at once, and those the gradient: none is taken twice.
    """

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, places_N: Tensor, words_NK: Tensor, consumes: bool) -> Tensor:
        chosen_NK = logits_MV[places_N[:, None], words_NK].float()
        ctx.consumes = consumes and ctx.needs_input_grad[0] and logits_MV.is_contiguous()
        ctx.kept = ctx.consumes and logits_MV.dtype == torch.float32
        logits_MV = logits_MV.detach()  # of what may be a view that a custom function returned
        size_M = torch.zeros(len(logits_MV), device=logits_MV.device)
        sum_M = torch.ones_like(size_M)
        for rows, counted in _pieces(logits_MV, places_N):
            if counted.start == counted.stop:
                continue
            if ctx.kept:
                top_R = logits_MV[rows].amax(-1)
                sum_M[rows] = logits_MV[rows].sub_(top_R[:, None]).exp_().sum(-1)
                size_M[rows] = top_R + sum_M[rows].log()
            else:
                size_M[rows] = logits_MV[rows].float().logsumexp(-1)
        ctx.save_for_backward(logits_MV, places_N, words_NK, size_M, sum_M)
        return chosen_NK - size_M[places_N, None]

    @staticmethod
    def backward(ctx: Any, gradient_NK: Tensor) -> tuple[Tensor, None, None, None]:
        logits_MV, places_N, words_NK, size_M, sum_M = ctx.saved_tensors
        total_M = torch.zeros_like(size_M).index_copy_(0, places_N, -gradient_NK.sum(-1))
        gradient_MV = logits_MV if ctx.consumes else torch.empty_like(logits_MV, memory_format=torch.contiguous_format)
        wide = gradient_MV.dtype == torch.float32
        for rows, counted in _pieces(logits_MV, places_N):
            part = gradient_MV[rows]
            if counted.start == counted.stop:
                part.zero_()
                continue
            if ctx.kept:
                found = part.mul_((total_M[rows] / sum_M[rows])[:, None])
            else:
                found = torch.sub(logits_MV[rows], size_M[rows, None], out=part if wide else None)
                found.exp_().mul_(total_M[rows, None])
            flat = (places_N[counted, None] - rows.start) * found.shape[1] + words_NK[counted]
            found.view(-1).scatter_add_(0, flat.flatten(), gradient_NK[counted].flatten())
            if not wide:
                part.copy_(found)
        return gradient_MV, None, None, None


def _pieces(logits_MV: Tensor, places_N: Tensor) -> list[tuple[slice, slice]]:
    """Returns some rows of the logits at a time, and the rising places that lie among them."""
    at_once = max(1, _AT_ONCE // logits_MV.shape[-1])
    edges = [*range(0, len(logits_MV), at_once), len(logits_MV)]
    counts = torch.searchsorted(places_N, torch.tensor(edges, device=places_N.device)).tolist()
    bounds = zip(edges, edges[1:], counts, counts[1:], strict=False)
    return [(slice(first, last), slice(low, high)) for first, last, low, high in bounds]
