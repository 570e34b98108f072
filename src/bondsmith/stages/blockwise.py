"""Block-wise distillation: the networks of a block, just fitted, are trained to give what the original block gives.

The block reads what the compressed blocks before it produce, and has to give what leaves the original block: so it also learns to undo
their errors. A second view, the original's own inputs, keeps it from leaning on those errors. The loss is the squared error of every
token relative to the mean square of its hidden state: a few tokens of Llama-like models are a thousand times larger than the others.
What the next original blocks make of the error counts too: they show which of its directions matter. Some windows are neither fitted nor
trained on; the state that is best on them is kept, the untrained one included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bondsmith.model.blocks import BlockRunner
from bondsmith.nn.free import free_all, pivot_all
from bondsmith.nn.packed import train_scales
from bondsmith.recipe import Recipe
from bondsmith.stages.moment import token_weights
from bondsmith.stages.streams import Stream
from bondsmith.stages.training import Steps, cosine, trainable

BATCH_TOKENS = 2048
WARMUP = 0.1
AHEAD_WEIGHT = 2.0  # of the errors after all blocks looked through together; the block's own counts 1
NORM_RATE = 1e-3
PATIENCE = 2  # passes in a row without a gain


@dataclass(frozen=True)
class Lesson:
    """What one block learns from: windows, the two hidden states that enter it and the one that leaves the original.

    Attributes:
        runner: runs the block; `index` is its place.
        ids: token windows, (windows, tokens).
        compressed: what the compressed blocks before it give.
        original: what the original blocks before it give.
        target: what leaves the original block.
        ahead: the original blocks after it that are looked through, as functions of (ids, hidden states).
    """

    runner: BlockRunner
    index: int
    ids: Tensor
    compressed: Stream
    original: Stream
    target: Stream
    device: torch.device
    ahead: tuple[Callable[[Tensor, Tensor], Tensor], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """The loss on the held-out windows before and after, the epochs run, and whether the trained state was `kept`."""

    before: float
    after: float
    epochs: int
    kept: bool


@torch.enable_grad()
def distill(
    lesson: Lesson, block: nn.Module, recipe: Recipe, dtype: torch.dtype, dense: Collection[str] = ()
) -> tuple[nn.Module, Outcome]:
    """Returns the trained block, its numbers rounded to `dtype`, or `block` itself where that is better on held-out windows.

    Networks and norms are trained, and the linear layers named in `dense`. Needs two windows at least; with one, nothing is held out and
    nothing is trained.
    """
    count = len(lesson.ids)
    taught = count - recipe.held_out(count)
    held = list(range(taught, count))
    before = _error(lesson, block, held)
    if not held or not taught:
        return block, Outcome(before, before, 0, False)
    learner = _Learner(lesson, copy.deepcopy(block), recipe, taught, dense)
    best, best_error, gains, misses = learner.state(), before, 0, 0
    while gains < recipe.blockwise and misses < PATIENCE:
        learner.epoch()
        error = _error(lesson, learner.block, held)
        if error < best_error:
            best, best_error, gains, misses = learner.state(), error, gains + 1, 0
        else:
            misses += 1
            learner.restore(best)
    if best_error < before:
        learner.block.load_state_dict(best)
        trained = learner.finished(dtype)
        after = _error(lesson, trained, held)
        if after < before:
            return trained, Outcome(before, after, learner.epochs, True)
    return block, Outcome(before, before, learner.epochs, False)


class _Learner:
    """A block in training on the first `windows`; gauged networks are in their free form meanwhile, of packed ones the scales train."""

    def __init__(self, lesson: Lesson, block: nn.Module, recipe: Recipe, windows: int, dense: Collection[str]):
        self.lesson, self.block, self.recipe, self.windows = lesson, block, recipe, windows
        self.gauged = free_all(block)
        train_scales(block)
        self.optimizer = Steps(block, trainable(block, dense=dense), recipe.blockwise_rate, NORM_RATE)
        self.batch = max(1, BATCH_TOKENS // lesson.ids.shape[1])
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.epochs = self.step = self.first = 0
        self.damping = 1.0

    def epoch(self) -> None:
        """Trains once over all windows, in a new order."""
        total = self.recipe.blockwise * -(-self.windows // self.batch)
        self.first = self.step
        for index in torch.randperm(self.windows, generator=self.generator).split(self.batch):
            self.optimizer.scale = self.damping * cosine(self.step, total, WARMUP)
            self.optimizer.zero_grad()
            _backward(self.lesson, self.block, index, self.recipe)
            self.optimizer.step()
            self.step += 1
        self.epochs += 1

    def state(self) -> dict[str, Tensor]:
        """Returns a copy of all numbers."""
        return {name: tensor.detach().clone() for name, tensor in self.block.state_dict().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Goes back to a better state; the next pass is the last one again, with half the rate and nothing of its momentum."""
        self.block.load_state_dict(state)
        for kept in self.optimizer.state.values():
            for tensor in kept.values():
                tensor.zero_()
        self.damping /= 2
        self.step = self.first

    @torch.no_grad()
    def finished(self, dtype: torch.dtype) -> nn.Module:
        """Returns the block with its gauged networks put back and all numbers rounded to the dtype of the saved model."""
        pivot_all(self.block, self.gauged)
        train_scales(self.block, False)
        for parameter in self.block.parameters():
            parameter.requires_grad_(False).copy_(parameter.to(dtype))
        return self.block


def _backward(lesson: Lesson, block: nn.Module, index: Tensor, recipe: Recipe) -> None:
    """Adds the gradient of both views."""
    view = recipe.blockwise_view
    for stream, share in ((lesson.compressed, 1 - view), (lesson.original, view)):
        if share > 0:
            (share * _loss(lesson, block, stream, index)).backward()


def _loss(lesson: Lesson, block: nn.Module, stream: Stream, index: Tensor) -> Tensor:
    """Returns the mean relative squared error of the block's output, and of what the next original blocks make of it."""
    ids, target = lesson.ids[index].to(lesson.device), _rows(lesson, lesson.target, index)
    out = lesson.runner.block(lesson.index, ids, _rows(lesson, stream, index), block)
    loss = relative_errors(out, target).mean()
    for further in lesson.ahead:
        with torch.no_grad():
            target = further(ids, target)
        out = further(ids, out)
        loss = loss + AHEAD_WEIGHT / len(lesson.ahead) * relative_errors(out, target).mean()
    return loss


def relative_errors(out: Tensor, target: Tensor) -> Tensor:
    """Returns the squared error of every token relative to the mean square of its target, (windows, tokens)."""
    return (out - target).square().mean(-1) * token_weights(target)


@torch.no_grad()
def _error(lesson: Lesson, block: nn.Module, windows: list[int]) -> float:
    """Returns the loss behind the compressed prefix, mean over windows."""
    losses = [float(_loss(lesson, block, lesson.compressed, torch.tensor([window]))) for window in windows]
    return sum(losses) / max(1, len(losses))


def _rows(lesson: Lesson, stream: Stream, index: Tensor) -> Tensor:
    return torch.cat([stream.read(int(i), 1) for i in index]).to(lesson.device)
