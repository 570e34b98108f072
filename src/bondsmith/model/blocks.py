"""Find the decoder blocks of any causal language model, and their matrices, by structure; run one block at a time.

A decoder block is an entry of the longest `ModuleList` of modules that contain linear layers; no architecture is named here.
The model's own `forward` stays the driver: `BlockRunner` lets it prepare masks and position tables, passes hidden states through
the blocks that are not wanted, and stops it after the one that is.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bondsmith.model.source import ModelError

log = logging.getLogger("bondsmith")
_multiplying: dict[type[nn.Module], bool] = {}


def find_blocks(model: nn.Module) -> str:
    """Returns the path of the `ModuleList` of decoder blocks: the longest outermost one whose entries hold linear layers."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inner = any(path.startswith(outer + ".") for outer in found)
        if isinstance(module, nn.ModuleList) and not inner and len(module) and all(matrices(m) for m in module):
            found[path] = module
    if not found:
        raise ModelError(f"{type(model).__name__}: no list of blocks with linear layers was found in it")
    return max(found, key=lambda path: (len(found[path]), sum(p.numel() for p in found[path].parameters())))


def matrices(block: nn.Module) -> dict[str, nn.Module]:
    """Returns the weight matrices of a block by their names inside it: its `nn.Linear` and `Conv1D` modules.

    Those that return something else than a product (routers of mixtures that choose, too) are left out.
    """
    return {
        name: m for name, m in block.named_modules() if name and isinstance(m, nn.Linear | Conv1D) and _multiplies(m)
    }


@torch.no_grad()
def _multiplies(matrix: nn.Module) -> bool:
    """Returns whether modules of this class give one row of outputs for one of inputs; tried once."""
    kind = type(matrix)
    if kind not in _multiplying:
        (rows, columns), stored = shape(matrix), _stored(matrix)
        try:
            out = kind.forward(matrix, torch.zeros(1, columns, dtype=stored.dtype, device=stored.device))
        except (TypeError, ValueError, IndexError, RuntimeError):  # it wants more than an input, or another kind of it
            out = None
        _multiplying[kind] = isinstance(out, Tensor) and out.shape == (1, rows)
    return _multiplying[kind]


def fused_experts(model: nn.Module, name: str) -> int:
    """Returns the numbers in tensors of three dimensions (experts of a mixture), which nothing here changes; warns of them."""
    fixed = [
        p for m in model.modules() if not isinstance(m, nn.modules.conv._ConvNd) for p in m.parameters(recurse=False)
    ]
    found = sum(p.numel() for p in fixed if p.dim() > 2)
    if found:
        log.warning(
            "%s: %.3g of its %.3g parameters are experts stored as tensors of three dimensions. They stay as they are: "
            "keep counts the other matrices only, and multiply-adds leave them out",
            name,
            found,
            sum(p.numel() for p in model.parameters()),
        )
    return found


def shape(matrix: nn.Module) -> tuple[int, int]:
    """Returns (out features, in features); transformers' `Conv1D` stores its weight the other way round."""
    rows, columns = _stored(matrix).shape
    return (columns, rows) if isinstance(matrix, Conv1D) else (rows, columns)


def weight(matrix: nn.Module) -> Tensor:
    """Returns the weight as (out features, in features)."""
    return _stored(matrix).T if isinstance(matrix, Conv1D) else _stored(matrix)


@contextmanager
def replaced_weight(matrix: nn.Module, new: Tensor) -> Iterator[None]:
    """Has `new`, (out features, in features), as the weight of `matrix` meanwhile; modules that share the parameter see it too."""
    parameter = matrix.weight
    assert isinstance(parameter, nn.Parameter)
    old = parameter.data
    parameter.data = new.T.contiguous() if isinstance(matrix, Conv1D) else new
    try:
        yield
    finally:
        parameter.data = old


def _stored(matrix: nn.Module) -> Tensor:
    stored = matrix.weight
    assert isinstance(stored, Tensor)
    return stored


class _StopError(Exception):
    """The hidden state that was wanted is there; the rest of the forward pass is not needed."""


class _Gate(nn.Module):
    """Stands in the block list for a block: calls `act` on the hidden state, and passes attribute look-ups on."""

    def __init__(self, block: nn.Module, act: Callable[[Tensor, Callable[[Tensor], Any]], Any]):
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a submodule: state dicts and .to() must not see it twice
        self._act = act

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        by_name = not args
        hidden = kwargs.pop("hidden_states") if by_name else args[0]

        def run(value: Tensor) -> Any:
            return self._block(hidden_states=value, **kwargs) if by_name else self._block(value, *args[1:], **kwargs)

        return self._act(hidden, run)


class BlockRunner:
    """Runs a causal language model block by block: `enter`, then `block(0)`, `block(1)`, ..., then `logits`.

    Only the embedding, the block that runs and the head need weights; the others may stay on the meta device.
    Hidden states are (windows, tokens, width); input ids (windows, tokens), without padding.
    """

    def __init__(self, model: PreTrainedModel, path: str | None = None):
        self.model = model
        self.path = path or find_blocks(model)
        self._returns = 0  # things in the tuple that a block returns; 0 where it returns the hidden state alone

    @property
    def blocks(self) -> nn.ModuleList:
        blocks: nn.ModuleList = self.model.get_submodule(self.path)
        return blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def enter(self, ids: Tensor) -> Tensor:
        """Returns the hidden state that goes into the first block; ModelError if it is not one row per token."""
        kept: list[Tensor] = []

        def act(hidden: Tensor, run: Callable[[Tensor], Any]) -> Any:
            kept.append(hidden)
            raise _StopError

        self._drive(ids, {0: act})
        if kept[0].dim() != 3:
            raise ModelError(
                f"{type(self.model).__name__}: its blocks pass on hidden states of shape {tuple(kept[0].shape)} for token ids of shape "
                f"{tuple(ids.shape)}; only one row per token, {(*ids.shape, kept[0].shape[-1])}, can be compressed"
            )
        return kept[0]

    def block(self, index: int, ids: Tensor, hidden: Tensor, module: nn.Module | None = None) -> Tensor:
        """Returns the hidden state after block `index`, or after `module` in its place, for `hidden` going in."""
        kept: list[Tensor] = []
        reached = False

        def act(arrived: Tensor, run: Callable[[Tensor], Any]) -> Any:
            nonlocal reached
            if arrived.shape != hidden.shape:
                raise _WrongReturnError
            reached = True
            out = run(hidden)
            kept.append(self._hidden(out))
            raise _StopError

        for returns in dict.fromkeys((self._returns, 0, 1, 2, 3)):  # which it is shows when a block has run
            self._returns = returns
            try:
                self._drive(ids, {index: act}, {index: module} if module is not None else {})
                return kept[0]
            except (_WrongReturnError, ValueError, TypeError):
                if reached or not index:
                    raise
        raise ModelError(
            f"{type(self.model).__name__}: what its blocks return is neither a hidden state nor a tuple that begins with one"
        )

    def _hidden(self, out: Any) -> Tensor:
        """The hidden state in what a block returned, which is remembered."""
        self._returns = len(out) if isinstance(out, tuple) else 0
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found

    def _returned(self, hidden: Tensor) -> Any:
        """What a block that does nothing would return."""
        return (hidden, *[None] * (self._returns - 1)) if self._returns else hidden

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Returns the logits (windows, tokens, vocabulary) for the hidden state after the last block."""

        def act(arrived: Tensor, run: Callable[[Tensor], Any]) -> Any:
            return self._returned(hidden)

        out: Tensor = self._drive(ids, {len(self) - 1: act}).logits
        return out

    def _drive(self, ids: Tensor, acts: dict[int, Any], modules: dict[int, nn.Module] | None = None) -> Any:
        with self._gates(acts, modules or {}):
            try:
                return self.model(input_ids=ids, use_cache=False)
            except _StopError:
                return None

    @contextmanager
    def resuming(self, index: int, folder: Path) -> Iterator[None]:
        """Lets the model's own forward passes start at block `index` meanwhile, for token ids that it has seen meanwhile.

        The hidden states that enter the block wait in `folder`. For a model in memory whose blocks before `index` do not change. Passes
        that keep keys and values (generation) or have a mask run from the start.
        """
        known: dict[bytes, Path] = {}
        key: bytes | None = None

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal key
            ids = args[0] if args else kwargs.get("input_ids")
            plain = kwargs.get("use_cache") is False and kwargs.get("attention_mask") is None
            known_by = (
                f"{tuple(ids.shape)}".encode() + ids.cpu().numpy().tobytes() if plain and ids is not None else None
            )
            key = known_by and hashlib.sha256(known_by).digest()

        def before(hidden: Tensor, run: Callable[[Tensor], Any]) -> Any:
            if key in known:
                return self._returned(hidden)
            out = run(hidden)
            self._hidden(out)
            return out

        def at(hidden: Tensor, run: Callable[[Tensor], Any]) -> Any:
            if key in known:
                return run(torch.load(known[key]).to(hidden.device))
            if key is not None and index:
                known[key] = folder / f"hidden-{len(known)}.pt"
                torch.save(hidden.cpu(), known[key])
            return run(hidden)

        acts: dict[int, Any] = {i: lambda hidden, run: run(hidden) for i in range(len(self))}
        acts |= dict.fromkeys(range(index), before) | {index: at}
        handle = self.model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            with self._gates(acts, {}):
                yield
        finally:
            handle.remove()
            for path in known.values():
                path.unlink(missing_ok=True)

    @contextmanager
    def _gates(self, acts: dict[int, Any], modules: dict[int, nn.Module]) -> Iterator[None]:
        blocks = self.blocks
        originals = list(blocks)

        def passing(hidden: Tensor, run: Callable[[Tensor], Any]) -> Any:
            return self._returned(hidden)

        try:
            for i, original in enumerate(originals):
                blocks[i] = _Gate(modules.get(i, original), acts.get(i, passing))
            yield
        finally:
            for i, original in enumerate(originals):
                blocks[i] = original


class _WrongReturnError(Exception):
    """A block's stand-in returned something else than the model expects, which took a part of it for the hidden state."""
