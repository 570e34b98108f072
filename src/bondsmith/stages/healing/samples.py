"""Training windows: documents and chats as tokens, long ones split, short ones packed side by side, with what counts for the loss.

Every window is full of whole pieces; the positions of a piece start at 0, from which transformers keeps the pieces of a window apart
in attention. A token counts when it is to be predicted: never the first of a piece, never padding, of a chat with `answers` only what
the assistant says.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bondsmith import data
from bondsmith.data import SELF, DataError, documents
from bondsmith.model.checkpoint import write_json, write_shard

_PARTS = ("ids", "positions", "counts")
_LOOK_BACK = 64  # windows that are searched for room

Piece = tuple[list[int], list[bool]]


@dataclass(frozen=True)
class Windows:
    """Packed windows of tokens.

    Attributes:
        ids: token ids, (windows, tokens), int64.
        positions: place of each token in its piece, (windows, tokens), int64.
        counts: True where the token is to be predicted, (windows, tokens).
        documents: how many documents they come from.
        split: how many of those were longer than a window.
    """

    ids: Tensor
    positions: Tensor
    counts: Tensor
    documents: int
    split: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Tokens to be predicted."""
        return int(self.counts.sum())

    @property
    def sha256(self) -> str:
        """Digest of the three tensors."""
        digest = hashlib.sha256()
        for tensor in (self.ids, self.positions, self.counts):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def take(self, index: Tensor) -> Windows:
        """Returns the windows at these places."""
        return Windows(self.ids[index], self.positions[index], self.counts[index], self.documents, self.split)


def join(parts: Sequence[Windows]) -> Windows:
    """Returns all windows of several texts as one."""
    ids, positions, counts = (torch.cat([getattr(p, n) for p in parts]) for n in ("ids", "positions", "counts"))
    return Windows(ids, positions, counts, sum(p.documents for p in parts), sum(p.split for p in parts))


@dataclass(frozen=True)
class Samples:
    """Windows to train on, to validate on, and running text of the held-out documents, one entry a SPEC."""

    train: Windows
    held: Windows
    plain: tuple[data.Windows, ...]

    @staticmethod
    def saved(folder: Path) -> bool:
        """Whether `save` has been here."""
        return (folder / "windows.json").is_file()

    def save(self, folder: Path) -> None:
        """Writes the tokens to `folder/windows.safetensors`, then what they come from to `folder/windows.json`."""
        tensors = {f"plain.{i}": p.ids for i, p in enumerate(self.plain)}
        for name, windows in (("train", self.train), ("held", self.held)):
            tensors |= {f"{name}.{part}": getattr(windows, part) for part in _PARTS}
        write_shard(folder / "windows.safetensors", tensors)
        rows = [[w.documents, w.split] for w in (self.train, self.held)]
        write_json(folder / "windows.json", {"windows": rows, "plain": [[p.spec, p.documents] for p in self.plain]})

    @classmethod
    def load(cls, folder: Path) -> Samples:
        """Returns what `save` wrote."""
        tensors, notes = load_file(folder / "windows.safetensors"), json.loads((folder / "windows.json").read_text())
        train, held = (
            Windows(tensors[f"{name}.ids"], tensors[f"{name}.positions"], tensors[f"{name}.counts"], *row)
            for name, row in zip(("train", "held"), notes["windows"], strict=True)
        )
        plain = [data.Windows(spec, tensors[f"plain.{i}"], count) for i, (spec, count) in enumerate(notes["plain"])]
        return cls(train, held, tuple(plain))


def read_samples(
    specs: Sequence[str],
    tokenizer: Any,
    *,
    tokens: int,
    held_out: int,
    window: int,
    answers: bool,
    seed: int,
    evaluation: Sequence[str] = (),
) -> Samples:
    """Returns the training windows, `tokens` tokens in all or what there is, and `held_out` windows of each SPEC.

    Training documents and held-out ones never overlap; the held-out ones come first, as they do in `bondsmith compress`. As many windows
    of each other SPEC for `evaluation` are added to those that quality is measured on.

    Raises:
        DataError: a text is missing, too short, or holds chats that the model has no template for.
    """
    share = max(1, -(-tokens // window // len(specs)))
    train, held, plain = [], [], []
    for spec in specs:
        if spec == SELF:
            raise DataError("self: healing needs a text; give a .txt, .jsonl or .jsonl.gz file or hf:DATASET")
        rows = list(documents(spec))
        random.Random(seed).shuffle(rows)
        how = (spec, tokenizer, window, answers, seed)
        first = _pack(rows, held_out, *how, spare=True)
        running = data.read_windows(spec, tokenizer, count=held_out, window=window, seed=seed, spare=True)
        rest = _pack(rows[max(first.documents, running.documents) :], share, *how)
        if len(first) < held_out or not len(rest):
            raise DataError(
                f"{spec} is too short: {len(rows)} documents fill {len(first) + len(rest)} windows of {window} tokens, "
                f"at least {held_out + 1} are needed ({held_out} to validate on, 1 to train on); give more text, "
                "a smaller --window or fewer --validation-windows"
            )
        train.append(rest)
        held.append(first)
        plain.append(running)
    for spec in evaluation:
        if spec not in specs:
            plain.append(data.read_windows(spec, tokenizer, count=held_out, window=window, seed=seed))
    return Samples(join(train), join(held), tuple(plain))


def _pack(
    rows: Sequence[Any],
    count: int,
    spec: str,
    tokenizer: Any,
    window: int,
    answers: bool,
    seed: int,
    spare: bool = False,
) -> Windows:
    """Returns up to `count` windows of pieces, in the order of `data.in_rounds`."""
    packer = _Packer(window, count, _padding(tokenizer))
    lengths: list[int] = []
    used: set[int] = set()

    def cut(row: Any) -> list[Piece]:
        pieces = list(_split(_tokenise(row, spec, tokenizer, answers), window))
        lengths.append(len(pieces))
        return pieces

    for place, piece in data.in_rounds(rows, cut, seed, spare):
        if not packer.add(piece):
            break
        used.add(place)
    ids, positions, counts = packer.tensors()
    return Windows(ids, positions, counts, max(used, default=-1) + 1, sum(lengths[place] > 1 for place in used))


class _Packer:
    """Puts pieces into the first of at most `count` windows with room for them (first fit)."""

    def __init__(self, window: int, count: int, padding: int):
        self.window, self.count, self.padding = window, count, padding
        self.windows: list[list[Piece]] = []
        self.room: list[int] = []

    def add(self, piece: Piece) -> bool:
        """Returns False, and does nothing, where no window has room; a piece with nothing to predict needs none."""
        size = len(piece[0])
        if size < 2 or not any(piece[1][1:]):
            return True
        behind = max(0, len(self.windows) - _LOOK_BACK)
        place = next((i for i in range(behind, len(self.windows)) if self.room[i] >= size), None)
        if place is None:
            if len(self.windows) == self.count:
                return False
            place = len(self.windows)
            self.windows.append([])
            self.room.append(self.window)
        self.windows[place].append(piece)
        self.room[place] -= size
        return True

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns ids, positions and counts of all windows."""
        shape = (len(self.windows), self.window)
        ids = torch.full(shape, self.padding)
        positions = torch.zeros(shape, dtype=torch.int64)
        counts = torch.zeros(shape, dtype=torch.bool)
        for row, pieces in enumerate(self.windows):
            first = 0
            for tokens, loss in pieces:
                last = first + len(tokens)
                ids[row, first:last] = torch.tensor(tokens)
                positions[row, first:last] = torch.arange(len(tokens))
                counts[row, first:last] = torch.tensor(loss)
                counts[row, first] = False
                first = last
            positions[row, first:] = torch.arange(self.window - first)
        return ids, positions, counts


def _split(piece: Piece, window: int) -> Iterator[Piece]:
    """Yields a document in pieces of a window; each starts with the last token of the one before, so that every token is predicted."""
    tokens, counts = piece
    for first in range(0, max(1, len(tokens) - 1), window - 1):
        yield tokens[first : first + window], counts[first : first + window]


def _tokenise(row: str | list[dict[str, str]], spec: str, tokenizer: Any, answers: bool) -> Piece:
    if isinstance(row, str):
        return _text(row, tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        if answers:
            raise DataError(
                f"{spec} holds chats and the model has no chat template, so what the assistant says cannot be told apart: "
                "put a chat_template.jinja into the model's directory, or train on all tokens with --loss-on all"
            )
        return _text("\n\n".join(f"{turn['role']}: {turn['content']}" for turn in row), tokenizer)
    how = {"add_special_tokens": False, "verbose": False}
    if not answers:
        tokens: list[int] = tokenizer(data.rendered(row, tokenizer, spec), **how)["input_ids"]
        return tokens, [True] * len(tokens)
    spans = list(_spans(row, spec, tokenizer))
    if not tokenizer.is_fast:  # knows no offsets
        pieces = [(tokenizer(text, **how)["input_ids"], counted) for text, counted in spans]
        return [t for found, _ in pieces for t in found], [counted for found, counted in pieces for _ in found]
    found = tokenizer("".join(text for text, _ in spans), return_offsets_mapping=True, **how)
    said = [counted for text, counted in spans for _ in text]  # by character
    return found["input_ids"], [last > first and said[last - 1] for first, last in found["offset_mapping"]]


def _text(text: str, tokenizer: Any) -> Piece:
    tokens: list[int] = tokenizer(text, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    if end is not None and tokens[-1:] != [end]:
        tokens = [*tokens, end]
    return tokens, [True] * len(tokens)


def _spans(turns: list[dict[str, str]], spec: str, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Yields the rendered chat in pieces, each with whether the assistant says it."""
    done = ""
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = data.rendered(turns[:i], tokenizer, spec, add_generation_prompt=True) if i else ""
        after = data.rendered(turns[: i + 1], tokenizer, spec)
        if not (before.startswith(done) and after.startswith(before)):
            raise DataError(
                f"{spec}: the model's chat template writes earlier turns anew at later ones, so answers cannot be told apart: "
                "train on all tokens with --loss-on all"
            )
        yield before[len(done) :], False
        yield after[len(before) :], True
        done = after
    rest = data.rendered(turns, tokenizer, spec)
    if rest.startswith(done) and len(rest) > len(done):
        yield rest[len(done) :], False


def _padding(tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0
