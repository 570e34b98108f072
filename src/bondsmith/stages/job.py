"""What the compression of one model works on: the model block by block, the calibration windows, the files on disk."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bondsmith.model.blocks import BlockRunner
from bondsmith.model.checkpoint import shard_name
from bondsmith.model.skeleton import fill
from bondsmith.model.source import Source
from bondsmith.model.tracing import Group
from bondsmith.recipe import Recipe
from bondsmith.stages.moment_files import load_token_weights
from bondsmith.stages.plan import Plan
from bondsmith.stages.rounding import rounded_embedding
from bondsmith.stages.streams import Stream


@dataclass(frozen=True)
class Job:
    """What the compression of one model needs: where it comes from, what becomes of it, and where things lie.

    Attributes:
        runner: the model's skeleton, with embedding and head in place.
        ids: calibration windows, (windows, tokens); empty for the Frobenius metric.
        out: directory of the weight files.
        work: directory of what is needed only until the end.
        fisher: directory of output moments, or None without the `loss` metric.
        moments: directory of what the windows that gave gradients showed: which channels of an MLP to drop follows from it.
        batch: windows per forward pass.
        width: of the hidden states.
        dtype: of the saved weights.
    """

    runner: BlockRunner
    source: Source
    plan: Plan
    recipe: Recipe
    ids: Tensor
    out: Path
    work: Path
    fisher: Path | None
    moments: Path
    batch: int
    width: int
    device: torch.device
    dtype: torch.dtype

    def shard(self, block: int) -> Path:
        """Returns the weight file of a block; -1 is all that is outside the blocks."""
        return self.out / shard_name(block + 1, len(self.runner) + 1)

    def load(self, block: int) -> nn.Module:
        """Brings the original weights of a block into the runner and returns it."""
        module = self.runner.blocks[block]
        prefix = f"{self.runner.path}.{block}."
        names = [name for name in self.source.places if name.startswith(prefix)]
        tensors = self.source.read(names)
        fill(module, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, self.device)
        return module

    def batches(self) -> range:
        """Returns the first window of every batch."""
        return range(0, len(self.ids), self.batch)

    def fitted(self) -> list[tuple[int, int]]:
        """Returns first window and number of windows of every batch that matrices are fitted to: all windows but those held out."""
        end = len(self.ids) - self.recipe.held_out(len(self.ids))
        return [(first, min(self.batch, end - first)) for first in range(0, end, self.batch)]

    def stream(self, name: str, k: int) -> Stream:
        """Returns the hidden states that enter block k; those of the first block are made here."""
        stream = Stream(self.work / f"{name}-{k}", (*self.ids.shape, self.width))
        if k == 0 and not stream.complete:
            saved = rounded_embedding(self.runner.model, self.plan, self.shard(-1), self.device)
            with torch.no_grad(), saved if name == "compressed" else nullcontext():
                stream.write(self.runner.enter(self.windows(first)) for first in self.batches())
        return stream

    def temporary(self, name: str, width: int) -> Stream:
        """Returns a stream that no resumed run looks for."""
        return Stream(self.work / name, (*self.ids.shape, width), durable=False)

    def windows(self, first: int, count: int | None = None) -> Tensor:
        """Returns the token ids of a batch, on the device."""
        return self.ids[first : first + (count or self.batch)].to(self.device)

    def rows(self, stream: Stream, first: int, count: int | None = None) -> Tensor:
        """Returns the rows of a stream for a batch, on the device."""
        return stream.read(first, count or self.batch).to(self.device)

    def full_name(self, k: int, name: str) -> str:
        """Returns the name in the model of a matrix of block k."""
        return f"{self.runner.path}.{k}.{name}"

    def token_weights(self, k: int, group: Group) -> Tensor | None:
        """Returns the weights that gradients gave to all tokens, (windows, tokens), or None if they gave none."""
        if self.fisher is None or not group.every_token:
            return None
        return load_token_weights(self.fisher, k, group.names[0], len(self.ids))

    def of_batch(self, weights: Tensor, first: int, count: int | None = None) -> Tensor:
        """Returns the weights of the tokens of a batch, (T,), on the device."""
        return weights[first : first + (count or self.batch)].flatten().to(self.device)
