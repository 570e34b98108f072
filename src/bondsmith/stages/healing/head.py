"""The loss computed at the head, some tokens at a time, so that the logits of all are never there.

Logits and their gradient are by far the largest arrays of a step: for two windows of 512 tokens and 49,152 words 200 MB each. Here the
head is given the counted tokens alone, some at a time; their logits become a loss, and that a gradient of what entered the head, at
once. It happens inside of the model's own forward pass, which ends in the loss in place of logits. Models that scale or cap what the head
returns do not `fit`.

Legend: `W` windows of `T` tokens, `N` counted tokens, `D` features, `K` kept words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from bondsmith.nn.kernels import gemm_dtype
from bondsmith.nn.packed import PackedHead, PackedLinear
from bondsmith.stages.healing.losses import Sums, TopK, place_sums, targets

_AT_ONCE = {"cpu": 2**24}  # logits that are looked at together; a few more or less cost time on a CPU
_AT_ONCE_ELSEWHERE = 2**26
_KEEPS_NOTHING = (nn.Linear, PackedHead, PackedLinear)  # heads that need their logits no longer once they are returned

Run = Callable[[], Tensor]  # the model on the windows, to its logits
Piece = Callable[[Tensor, slice], Sums]  # of some rows of what enters the head


def head_sums(
    model: PreTrainedModel,
    run: Run,
    ids_WT: Tensor,
    counts_WT: Tensor,
    teacher: TopK | None,
    weights: tuple[float, float],
) -> Sums:
    """Returns what `token_sums` returns of the logits of `run()`, for a model that `fits`."""
    head = model.get_output_embeddings()
    places_N, words_NK = targets(ids_WT, counts_WT, teacher)
    found: list[Sums] = []

    def part_sums(forward: Callable[[Tensor], Tensor], rows: Tensor, part: slice) -> Sums:
        logits = forward(rows)
        some = None if teacher is None else TopK(teacher.words[part], teacher.logp[part])
        places = torch.arange(len(rows), device=rows.device)
        return place_sums(logits, places, words_NK[part], some, weights, isinstance(head, _KEEPS_NOTHING))

    def instead(forward: Callable[[Tensor], Tensor], hidden_WTD: Tensor) -> Tensor:
        rows_ND = hidden_WTD.flatten(0, -2)[places_N]
        trained = [p for p in _parameters(model) if p.requires_grad]
        multiply = forward if trained else _prepared(head, forward, rows_ND)
        words = model.config.get_text_config().vocab_size
        step = max(1, _AT_ONCE.get(rows_ND.device.type, _AT_ONCE_ELSEWHERE) // words)
        loss, kl, ce = _AtHead.apply(rows_ND, partial(part_sums, multiply), step, *trained)
        found.append(Sums(loss, kl, ce, len(rows_ND)))
        return loss.reshape(1, 1, 1)

    with _forward(head, instead):
        out = run()
    (sums,) = found
    return replace(sums, loss=out.reshape(()))


@torch.no_grad()
def _prepared(head: nn.Module, forward: Callable[[Tensor], Tensor], rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns `forward`, or the same product with weights that are unpacked, or cast for autocast, once and not for every part."""
    if getattr(forward, "__func__", None) is not type(head).forward:  # hooked
        return forward
    kind = rows.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
    if isinstance(head, PackedHead | PackedLinear):
        packed = head.embedding if isinstance(head, PackedHead) else head
        weight = packed.to_matrix(gemm_dtype(rows.to(dtype)))
    elif type(head) is nn.Linear and head.weight.dtype != dtype:
        weight = head.weight.to(dtype)
    else:
        return forward
    bias = None if head.bias is None else head.bias.to(weight.dtype)
    return lambda x: functional.linear(x.to(weight.dtype), weight, bias)


def _parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """The parameters of embedding and head; a head may multiply by the embedding's without owning them."""
    ends = [end for end in (model.get_output_embeddings(), model.get_input_embeddings()) if end is not None]
    return list({id(p): p for end in ends for p in end.parameters()}.values())


@torch.no_grad()
def fits(model: PreTrainedModel, run: Run) -> bool:
    """Returns whether the logits of `run()` are what the head returns, untouched."""
    head = model.get_output_embeddings()
    if head is None:
        return False
    found: list[Tensor] = []

    def seen(forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        found.append(forward(hidden))
        return found[-1]

    with _forward(head, seen):
        out = run()
    return len(found) == 1 and out.shape == found[0].shape and torch.equal(out, found[0].to(out.dtype))


@contextmanager
def _forward(head: nn.Module, instead: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> Iterator[None]:
    """The head's `forward` replaced by `instead`, which is given the one that was there."""
    own = vars(head).get("forward")  # a hook's
    head.forward = partial(instead, head.forward)
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


class _AtHead(torch.autograd.Function):
    """Loss, divergence and cross entropy of rows of what enters the head; gradients are taken in the forward pass already."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, piece: Piece, step: int, *trained: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wanted = [rows_ND] * ctx.needs_input_grad[0] + list(trained) * any(ctx.needs_input_grad[3:])
        gradients = [torch.zeros_like(tensor) for tensor in wanted]
        totals = [torch.zeros((), device=rows_ND.device) for _ in range(3)]
        for first in range(0, len(rows_ND), step):
            part = slice(first, min(first + step, len(rows_ND)))
            with torch.set_grad_enabled(bool(wanted)):
                rows = rows_ND[part].detach().requires_grad_(ctx.needs_input_grad[0])
                sums = piece(rows, part)
            for total, value in zip(totals, (sums.loss.detach(), sums.kl, sums.ce), strict=True):
                total += value
            if wanted:
                _add_gradients(gradients, sums.loss, [rows, *trained][-len(wanted) :], part, ctx.needs_input_grad[0])
        ctx.save_for_backward(*gradients)
        return totals[0], totals[1], totals[2]

    @staticmethod
    def backward(ctx: Any, loss: Tensor, *rest: Tensor) -> tuple[Tensor | None, ...]:
        found = iter(ctx.saved_tensors)
        return tuple(next(found) * loss if needed else None for needed in ctx.needs_input_grad)


def _add_gradients(
    gradients: Sequence[Tensor], loss: Tensor, inputs: Sequence[Tensor], part: slice, rows_first: bool
) -> None:
    for k, gradient in enumerate(torch.autograd.grad(loss, inputs, allow_unused=True)):
        if gradient is not None:
            (gradients[k][part] if rows_first and k == 0 else gradients[k]).add_(gradient)
