"""The original's predictions on the training windows: asked while it is in memory, or once and for all and then read from disk.

The cache is a directory `teacher-<digest>`: the digest is that of the original's files, the windows, `K` and the precision, so a cache
that is there is the right one. One file holds the counted tokens of some windows; each appears whole or not at all, so an interrupted
run goes on. A token takes `K` half-precision log-probabilities and `K` word numbers of 16 bits (32 where the vocabulary needs them): at
K = 64, 256 bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from bondsmith.model.checkpoint import write_json, write_shard
from bondsmith.model.source import ModelError, Source, load_tokenizer, open_source
from bondsmith.stages.healing.losses import TopK
from bondsmith.stages.healing.samples import Windows
from bondsmith.stages.healing.settings import HealError

SHARD_WINDOWS = 16

Predict = Callable[[Tensor], TopK]


def logits_of(model: PreTrainedModel, ids: Tensor, positions: Tensor | None, half: bool = False) -> Tensor:
    """Returns the logits of windows, (windows, tokens, vocabulary); `half`: products in bfloat16."""
    places = {} if positions is None else {"position_ids": positions}
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=half):
        out: Tensor = model(input_ids=ids, use_cache=False, **places).logits
    return out


@torch.no_grad()
def ask(model: PreTrainedModel, windows: Windows, index: Tensor, k: int, apart: bool, half: bool = False) -> TopK:
    """Returns the likeliest words at the counted tokens of the windows at `index`, from a model in memory."""
    batch = windows.take(index)
    positions = batch.positions.to(model.device) if apart else None
    logits = logits_of(model, batch.ids.to(model.device), positions, half)
    return TopK.of(logits[:, :-1][batch.counts[:, 1:].to(model.device)], k)


@dataclass(frozen=True)
class Cache:
    """The kept predictions of one original on one set of windows."""

    folder: Path
    windows: Windows
    k: int
    small: bool

    @classmethod
    def at(
        cls,
        root: Path,
        windows: Windows,
        files: Mapping[str, str],
        k: int,
        vocabulary: int,
        apart: bool,
        half: bool = False,
    ) -> Cache:
        """Returns the cache below `root` of an original with these files (name -> digest), complete or not."""
        identity = {
            "files": sorted(files.values()),
            "windows": windows.sha256,
            "k": k,
            "vocabulary": vocabulary,
            "apart": apart,
        } | ({"precision": "bfloat16"} if half else {})
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        folder = root / f"teacher-{digest[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder, windows, k, vocabulary <= 2**16)

    @property
    def count(self) -> int:
        """Files in all."""
        return -(-len(self.windows) // SHARD_WINDOWS)

    @property
    def missing(self) -> list[int]:
        """The files that are not there yet."""
        return [i for i in range(self.count) if not self._file(i).is_file()]

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return sum(f.stat().st_size for f in self.folder.glob("*.safetensors"))

    def write(self, index: int, predict: Predict) -> None:
        """Writes file `index`; `predict` gives the likeliest words at the counted tokens of the windows it is handed."""
        places = self._places(index)
        parts = [predict(places[i : i + 1]) for i in range(len(places))]
        words = torch.cat([p.words for p in parts]).cpu()
        tensors = {
            "words": words.to(torch.uint16 if self.small else torch.int32),
            "logp": torch.cat([p.logp for p in parts]).cpu().to(torch.float16),
        }
        write_shard(self._file(index), tensors)

    def describe(self, teacher: str) -> None:
        """Writes what the directory holds, for people."""
        note = {"teacher": teacher, "k": self.k, "windows": len(self.windows), "tokens": self.windows.tokens}
        write_json(self.folder / "teacher.json", note | {"bytes": self.bytes})

    def read(self, index: Tensor) -> TopK:
        """Returns the predictions at the counted tokens of the windows at `index`, in their order."""
        parts = [self._window(int(i)) for i in index]
        return TopK(torch.cat([p.words for p in parts]), torch.cat([p.logp for p in parts]))

    def _window(self, index: int) -> TopK:
        shard = index // SHARD_WINDOWS
        counts = self.windows.counts[shard * SHARD_WINDOWS : index + 1].sum(-1)
        first, last = int(counts[:-1].sum()), int(counts.sum())
        with safe_open(self._file(shard), framework="pt") as handle:
            words, logp = (handle.get_slice(name)[first:last] for name in ("words", "logp"))
        return TopK(words.to(torch.int64), logp.float())

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    def _places(self, index: int) -> Tensor:
        return torch.arange(index * SHARD_WINDOWS, min((index + 1) * SHARD_WINDOWS, len(self.windows)))


def original_of(small: Path) -> str:
    """Returns what a compressed directory was made from; HealError where it does not say."""
    results = small / "results.json"
    if not results.is_file():
        raise HealError(f"{small} does not say what it was made from: give --teacher MODEL or --no-teacher")
    return str(json.loads(results.read_text())["model"]["name"])


def open_original(name: str | Path, cache: Path) -> Source:
    """Returns the original, opened; HealError says what to do where it cannot be."""
    try:
        return open_source(name, cache)
    except ModelError as error:
        raise HealError(
            f"the original cannot be opened ({error}): say where it is with --teacher MODEL, or train on the text alone "
            "with --no-teacher"
        ) from error


def check_vocabulary(name: str, original: Source, small: Source) -> None:
    """Raises HealError unless both have as many words and, where both have a tokenizer, the same ones."""
    words = [int(s.config.get_text_config().vocab_size) for s in (original, small)]
    if words[0] != words[1]:
        raise HealError(
            f"{name} has a vocabulary of {words[0]} words, {small.path} one of {words[1]}: a teacher must have the "
            "same tokenizer; give the original with --teacher, or --no-teacher"
        )
    try:
        theirs, ours = (load_tokenizer(s.path).get_vocab() for s in (original, small))
    except ModelError:  # one was written without
        return
    if theirs != ours:
        word = next(w for w in {**ours, **theirs} if ours.get(w) != theirs.get(w))
        raise HealError(
            f"{name} has another vocabulary than {small.path}: {word!r} is word {theirs.get(word)} there, {ours.get(word)} "
            "here; give the original with --teacher, or --no-teacher"
        )
