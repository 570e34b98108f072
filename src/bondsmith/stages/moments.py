"""Second moments: of what a matrix reads (`C = E[x x^T]`) and of the loss gradient at what it gives (`B = E[g g^T]`).

Legend: `T` tokens, `I` in features, `O` out features. Hidden states stream from disk; one block of weights is resident.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bondsmith.model.blocks import (
    BlockRunner,
    Group,
    HiddenBond,
    capture_inputs,
    find_hidden_bonds,
    matrices,
    shape,
    trace_groups,
    weight,
)
from bondsmith.model.checkpoint import write_json, write_shard
from bondsmith.model.source import ModelError
from bondsmith.stages.streams import Stream
from bondsmith.tensor.hybrid import UnseenShares

_OVERFLOW = 1e18  # the square of an activation this large leaves float32 in a sum
_PANEL = 128  # narrower panels make slow products
_MIRROR = 512  # rows mirrored at a time


class Moment:
    """A weighted mean of outer products, summed in float32 on the device of its rows, divided when read."""

    def __init__(self, features: int, device: torch.device | str = "cpu", other: int | None = None):
        self._sum = torch.zeros(features, other or features, device=device)
        self._weight = 0.0
        self._rows = 0
        self._lower = True

    def add(self, rows_TI: Tensor, weights_T: Tensor | None = None, other_TI: Tensor | None = None) -> None:
        """Adds `sum_t w_t x_t y_t^T` for rows `x` and `other` rows `y` (`x` itself by default)."""
        weighted = rows_TI if weights_T is None else rows_TI * weights_T[:, None]
        if other_TI is None:
            self._add_symmetric(weighted, rows_TI)
        else:
            self._lower = False
            self._sum.addmm_(weighted.T, other_TI)
        self._rows += rows_TI.shape[0]
        self._weight += float(rows_TI.shape[0] if weights_T is None else weights_T.sum())

    def _add_symmetric(self, weighted_TI: Tensor, rows_TI: Tensor) -> None:
        """Adds to the blocks on and under the diagonal only: with eight of them 9/16 of the multiply-adds of the whole."""
        step = max(_PANEL, -(-rows_TI.shape[1] // 8))
        for first in range(0, rows_TI.shape[1], step):
            panel = slice(first, first + step)
            self._sum[panel, : panel.stop].addmm_(weighted_TI[:, panel].T, rows_TI[:, : panel.stop])

    @property
    def seen(self) -> bool:
        """True once there was a row."""
        return self._rows > 0

    def mean(self, name: str) -> Tensor:
        """Returns the (features, features) mean; ModelError names the matrix if it is not finite or has seen no token."""
        if not self.seen:
            raise ModelError(f"{name}: no calibration token reached this matrix; calibrate on more or other text")
        if self._lower:
            for first in range(0, len(self._sum), _MIRROR):  # in place: wide moments are what memory goes to
                panel = slice(first, min(first + _MIRROR, len(self._sum)))
                self._sum[panel, panel] = self._sum[panel, panel].tril() + self._sum[panel, panel].tril(-1).T
                self._sum[panel, panel.stop :] = self._sum[panel.stop :, panel].T
        mean = self._sum / self._weight if self._weight else torch.full_like(self._sum, torch.nan)
        if not math.isfinite(float(mean.sum())) and not torch.isfinite(mean).all():
            raise ModelError(f"{name}: the second moment of its input is not finite; an activation before it overflows")
        return mean


def token_weights(hidden_TI: Tensor) -> Tensor:
    """Returns `1 / mean(y_t^2)` per token, (tokens,).

    A few tokens of Llama-like models carry activations a thousand times the others'; the norm that reads the residual stream divides
    them away, and so must the error that is minimised.
    """
    return 1 / hidden_TI.square().mean(-1).clamp_min(1e-12)


def stream_weights(group: Group, before: Tensor, after: Tensor) -> Tensor | None:
    """Returns token weights for matrices that write into the residual stream, by the stream they write into; None for others."""
    if not (group.writes and group.every_token):
        return None
    return token_weights((after if group.last else before).flatten(0, 1))


def block_inputs(
    runner: BlockRunner,
    load: Callable[[int], nn.Module],
    ids: Tensor,
    streams: Sequence[Stream],
    batch: int,
    advance: Callable[[], None],
) -> None:
    """Fills `streams[k]` with the hidden states that enter block k (the last one: that leave the last block).

    Streams that are complete are not computed again.
    """

    def rows(k: int) -> Callable[[int], Tensor]:
        if k == 0:
            return lambda first: runner.enter(ids[first : first + batch])
        return lambda first: runner.block(
            k - 1, ids[first : first + batch], streams[k - 1].read(first, batch).to(ids.device)
        )

    for k, stream in enumerate(streams):
        if not stream.complete:
            block = load(k - 1) if k else None
            with torch.no_grad():
                stream.write(
                    _checked(rows(k), first, block, f"{runner.path}.{k - 1}") for first in range(0, len(ids), batch)
                )
        advance()


def _checked(rows: Callable[[int], Tensor], first: int, block: nn.Module | None, name: str) -> Tensor:
    """Returns the hidden states of a batch; ModelError names the matrix of `block` whose input overflows on the way to them."""
    out = rows(first)
    if block is None or float(out.abs().amax()) < _OVERFLOW:
        return out
    found: list[str] = []

    def watch(matrix: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not float(args[0].abs().amax()) < _OVERFLOW:
                found.append(matrix)

        return look

    handles = [m.register_forward_pre_hook(watch(n)) for n, m in matrices(block).items()]
    try:
        rows(first)
    finally:
        for handle in handles:
            handle.remove()
    what = f"{name}.{found[0]}: the second moment of its input" if found else f"{name}: what leaves it"
    raise ModelError(f"{what} is not finite; an activation before it overflows")


def output_moments(
    runner: BlockRunner,
    load: Callable[[int], nn.Module],
    ids: Tensor,
    streams: Sequence[Stream],
    folder: Path,
    *,
    batch: int,
    seed: int,
    hybrids: bool,
    advance: Callable[[], None],
) -> None:
    """Writes `folder/block-K.safetensors` with `B` and `C` of every matrix of block K, last block first.

    The loss is the cross entropy with labels sampled from the model's own distribution (the Fisher information), so no data label
    enters. Blocks that are written already are not computed again.

    Args:
        load: brings the weights of a block into the runner and returns it.
        ids: token windows, (windows, tokens).
        streams: hidden states at every block boundary, one more than there are blocks, complete.
        hybrids: learn too what a network beside a rounded matrix is worth.
    """
    folder.mkdir(parents=True, exist_ok=True)
    gradients = [Stream(folder / f"gradient-{k}", s.shape) for k, s in enumerate(streams)]
    if not gradients[-1].complete and not (folder / "block-0.safetensors").is_file():
        gradients[-1].write(_head_gradients(runner, ids, streams[-1], folder, seed))
    for k in reversed(range(len(runner))):
        if not (folder / f"block-{k}.safetensors").is_file():
            _block_moments(runner, load(k), k, ids, streams, gradients, folder, batch, hybrids)
        gradients[k + 1].remove()
        advance()
    if gradients[0].complete:
        entering = Moment(gradients[0].shape[-1])
        for first in range(0, len(ids), batch):
            entering.add(gradients[0].read(first, batch).flatten(0, 1))
        write_shard(folder / "embedding.safetensors", {"gradient": entering.mean("the gradient at the embedding")})
        gradients[0].remove()


@dataclass(frozen=True, eq=False)
class TableMoments:
    """What the embedding and the head see; `V` vocabulary, `width` of the hidden states.

    Attributes:
        head_input: second moment of the head's input, (width, width).
        head_weight: mean probability `E[p (1 - p)]` of every token, (V,): how much an error of its logit counts.
        embedding_gradient: second moment of the loss gradient at the embedding's output, (width, width).
        embedding_weight: share of the positions that hold each token, (V,).
    """

    head_input: Tensor
    head_weight: Tensor
    embedding_gradient: Tensor
    embedding_weight: Tensor


def load_table_moments(folder: Path, ids: Tensor) -> TableMoments:
    """Returns what embedding and head see, over the windows `ids` that gave the gradients."""
    head, embedding = load_file(folder / "head.safetensors"), load_file(folder / "embedding.safetensors")
    shares = torch.bincount(ids.flatten().cpu(), minlength=len(head["weight"])).float() / ids.numel()
    return TableMoments(head["input"], head["weight"], embedding["gradient"], shares)


def table_moment(folder: Path, name: str, tied: bool) -> Tensor | None:
    """Returns the metric in which errors of a row of embedding or head count, (width, width), or None where none was measured.

    For a head that is the moment of what it reads, for an embedding that of the loss gradient at its output, each times the mean weight
    of a row; for a matrix that is both, their sum.
    """
    found: Tensor | None = None
    head, embedding = folder / "head.safetensors", folder / "embedding.safetensors"
    if not (head.is_file() and embedding.is_file()):
        return None
    seen = load_file(head)
    as_head = seen["input"] * seen["weight"].mean()
    as_embedding = load_file(embedding)["gradient"] / len(seen["weight"])
    is_head = tied or "head" in name
    found = as_head + as_embedding if tied else as_head if is_head else as_embedding
    return found


def load_output_moments(folder: Path, block: int) -> dict[str, Tensor]:
    """Returns `B` by matrix name inside the block."""
    return _load(folder, block, "output.")


def load_shares_left(folder: Path, block: int) -> dict[str, Tensor]:
    """Returns, by matrix name inside the block, what a cut of bond 0, 1, ... beside a rounded matrix leaves of the loss of rounding."""
    return _load(folder, block, "left.")


def load_input_moments(folder: Path, block: int) -> dict[str, Tensor]:
    """Returns `C` by matrix name inside the block; matrices with one input share it, those that no token reached have none."""
    found = _load(folder, block, "input.")
    groups: dict[str, str] = json.loads((folder / f"structure-{block}.json").read_text())["inputs"]
    return {name: found[first] for name, first in groups.items() if first in found}


def load_hidden_bonds(folder: Path, block: int) -> list[HiddenBond]:
    """Returns the hidden bonds of a block, with names inside it."""
    rows = json.loads((folder / f"structure-{block}.json").read_text())["bonds"]
    return [HiddenBond(tuple(row["writers"]), row["reader"], row["channels"]) for row in rows]


def _load(folder: Path, block: int, kind: str) -> dict[str, Tensor]:
    tensors = load_file(folder / f"block-{block}.safetensors")
    return {name.removeprefix(kind): t for name, t in tensors.items() if name.startswith(kind)}


def _head_gradients(runner: BlockRunner, ids: Tensor, hidden: Stream, folder: Path, seed: int) -> Iterator[Tensor]:
    """Yields the gradient at the last hidden states, window by window; at the end writes the moments of the head."""
    generator = torch.Generator().manual_seed(seed)
    head = runner.model.get_output_embeddings()
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, -2)))
    C: Moment | None = None
    weight: Tensor | None = None
    try:
        for first in range(len(ids)):
            leaf = hidden.read(first, 1).to(ids.device).requires_grad_()
            gradient, spread = _head_gradient(runner, ids[first : first + 1], leaf, generator)
            rows = seen.pop()
            C = C or Moment(rows.shape[-1], rows.device)
            C.add(rows)
            weight = spread if weight is None else weight + spread
            yield gradient
    finally:
        handle.remove()
    assert C is not None
    assert weight is not None
    write_shard(folder / "head.safetensors", {"input": C.mean("the head"), "weight": weight / ids.numel()})


def _head_gradient(runner: BlockRunner, ids: Tensor, leaf: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns the gradient at `leaf`, and the sum of `p (1 - p)` over the tokens, (V,)."""
    logits = runner.logits(ids, leaf).flatten(0, 1).float()
    draws = torch.rand(len(logits), 1, generator=generator).to(logits.device)
    with torch.no_grad():
        # inverse of the cumulative distribution: one uniform number a token, the same on every device
        p = logits.softmax(-1)
        labels = (p.cumsum(-1) < draws).sum(-1).clamp_max(logits.shape[-1] - 1)
        spread = (p * (1 - p)).sum(0)
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    return torch.autograd.grad(loss, leaf)[0], spread


def input_moments(
    runner: BlockRunner,
    load: Callable[[int], nn.Module],
    ids: Tensor,
    streams: Sequence[Stream],
    folder: Path,
    *,
    batch: int,
    advance: Callable[[], None],
) -> None:
    """Writes what `output_moments` does without `B`, for the blocks that `streams` enter: no pass back is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(min(len(runner), len(streams))):
        if not (folder / f"block-{k}.safetensors").is_file():
            with torch.no_grad():
                seen = _BlockSeen.of(runner, load(k), k, ids, streams[k])
                for first in range(0, len(ids), batch):
                    seen.run(first, streams[k].read(first, batch))
            seen.write(folder, {})
        advance()


@dataclass(frozen=True, eq=False)
class _BlockSeen:
    """Runs a block over windows and keeps the moments of what its matrices read."""

    runner: BlockRunner
    block: nn.Module
    k: int
    ids: Tensor
    groups: list[Group]
    bonds: list[HiddenBond]
    C: list[Moment]

    @classmethod
    def of(cls, runner: BlockRunner, block: nn.Module, k: int, ids: Tensor, entering: Stream) -> _BlockSeen:
        device = block_device(block)
        with torch.no_grad():
            first_window = entering.read(0, 1).to(device)
            groups = trace_groups(block, lambda: runner.block(k, ids[:1], first_window))
            bonds = find_hidden_bonds(block, groups, lambda: runner.block(k, ids[:1], first_window))
        return cls(runner, block, k, ids, groups, bonds, [Moment(g.in_features, device) for g in groups])

    def run(self, first: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Runs some windows; returns what entered the block, on its device, and what leaves it."""
        leaf = rows.to(block_device(self.block))
        if torch.is_grad_enabled():
            leaf.requires_grad_()
        with capture_inputs(self.block, self.groups) as seen:
            out = self.runner.block(self.k, self.ids[first : first + len(rows)], leaf)
        for position, read in seen.items():
            self.C[position].add(read, stream_weights(self.groups[position], leaf.detach(), out.detach()))
        return leaf, out

    def write(self, folder: Path, found: dict[str, Tensor]) -> None:
        """Writes the moments, `found` among them, and the structure of the block."""
        pairs = zip(self.groups, self.C, strict=True)
        found |= {f"input.{g.names[0]}": m.mean(g.names[0]) for g, m in pairs if m.seen}
        inputs = {name: g.names[0] for g in self.groups for name in g.names}
        structure = {"inputs": inputs, "bonds": [asdict(b) for b in self.bonds]}
        write_json(folder / f"structure-{self.k}.json", structure)
        write_shard(folder / f"block-{self.k}.safetensors", found)


def _block_moments(
    runner: BlockRunner,
    block: nn.Module,
    k: int,
    ids: Tensor,
    streams: Sequence[Stream],
    gradients: list[Stream],
    folder: Path,
    batch: int,
    hybrids: bool,
) -> None:
    seen = _BlockSeen.of(runner, block, k, ids, streams[k])
    table = matrices(block)
    B = {name: _OutputMoment(m, block_device(block)) for name, m in table.items()}
    handles = [m.register_forward_hook(_watch_gradient(B[name])) for name, m in table.items()]

    def back() -> Iterator[Tensor]:
        batches = range(0, len(ids), batch)
        for first in batches:
            if hybrids and first and first == batches[len(batches) // 2]:
                for moment in B.values():
                    moment.split()
            leaf, out = seen.run(first, streams[k].read(first, batch))
            yield torch.autograd.grad(out, leaf, gradients[k + 1].read(first, batch).to(out.device))[0]

    try:
        gradients[k].write(back())
    finally:
        for handle in handles:
            handle.remove()
    found = {f"output.{name}": m.mean(name) for name, m in B.items() if m.seen}
    found |= {f"left.{name}": m.shares.left() for name, m in B.items() if m.shares is not None}
    seen.write(folder, found)


class _OutputMoment(Moment):
    """`B` of a matrix; once `split`, later rows also judge what the leading directions of the earlier ones are worth to a hybrid."""

    def __init__(self, matrix: nn.Module, device: torch.device):
        super().__init__(shape(matrix)[0], device)
        self.matrix = matrix
        self.shares: UnseenShares | None = None

    def split(self) -> None:
        """Chooses the directions."""
        if self.seen:
            W = weight(self.matrix)
            self.shares = UnseenShares(self.mean("gradients"), W.amax(1) - W.amin(1))

    def add(self, rows_TI: Tensor, weights_T: Tensor | None = None, other_TI: Tensor | None = None) -> None:
        super().add(rows_TI, weights_T, other_TI)
        if self.shares is not None:
            self.shares.see(rows_TI)


def _watch_gradient(moment: Moment) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda g: moment.add(g.reshape(-1, g.shape[-1])))

    return hook


def block_device(block: nn.Module) -> torch.device:
    """Returns the device that the weights of a block are on."""
    return next(block.parameters()).device
