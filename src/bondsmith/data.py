"""Token windows for calibration and evaluation, from files, hub data sets or the model's own samples.

A SPEC is one of
    self                        samples of the model itself; needs no data
    FILE.txt                    one document per blank-line separated paragraph group (the whole file when it has none)
    FILE.jsonl, FILE.jsonl.gz   one document a row: column `text`, `page` or `messages` (chat, through the model's own template)
    hf:DATASET[:CONFIG[:SPLIT]] the same columns of a hub data set (split `train` by default)

Documents are shuffled with the seed and tokenised. One piece of each, a window long at most, is taken before a second of any: windows of
one long document say much the same. Short pieces are joined. The documents used for calibration and for evaluation never overlap:
evaluation takes its windows first, calibration goes on with the documents that are left.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from jinja2 import TemplateError
from safetensors.torch import load_file
from torch import Tensor

from bondsmith.model.checkpoint import write_json, write_shard

COLUMNS = ("text", "page", "messages")
SELF = "self"
_SPARING = 5  # evaluation keeps to one document in so many
_HUB_ROWS = 10_000  # of a hub data set are streamed and shuffled; more would only cost download

T = TypeVar("T")


class DataError(ValueError):
    """A calibration or evaluation text cannot be used; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Windows:
    """Windows of tokens from one source.

    Attributes:
        spec: where they come from.
        ids: token ids, (windows, tokens), int64.
        documents: how many documents they were cut from.
        sha256: digest of the token ids.
    """

    spec: str
    ids: Tensor
    documents: int

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Returns the row of `results.json`: spec, documents, tokens, sha256."""
        return {"spec": self.spec, "documents": self.documents, "tokens": self.ids.numel(), "sha256": self.sha256}


def save_windows(folder: Path, calibration: Sequence[Windows], held_out: Sequence[Windows]) -> None:
    """Writes `folder/windows.safetensors` with the token ids, then `folder/windows.json`, which says what they are."""
    windows = [*calibration, *held_out]
    write_shard(folder / "windows.safetensors", {f"{i}": w.ids for i, w in enumerate(windows)})
    kinds = ["c"] * len(calibration) + ["h"] * len(held_out)
    write_json(folder / "windows.json", [[kind, w.spec, w.documents] for kind, w in zip(kinds, windows, strict=True)])


def saved_windows(folder: Path) -> tuple[list[Windows], list[Windows]]:
    """Returns the calibration and held-out windows that `save_windows` wrote."""
    ids = load_file(folder / "windows.safetensors")
    rows = json.loads((folder / "windows.json").read_text())
    found = [(kind, Windows(spec, ids[f"{i}"], documents)) for i, (kind, spec, documents) in enumerate(rows)]
    return [w for kind, w in found if kind == "c"], [w for kind, w in found if kind == "h"]


def fitted_sample(calibration: Sequence[Windows], count: int) -> list[Windows]:
    """Returns `count` of the windows that were calibrated on, from all texts in turn, as one text; none without calibration."""
    longest = max((len(w.ids) for w in calibration), default=0)
    rows = [w.ids[k] for k in range(longest) for w in calibration if k < len(w.ids)][:count]
    return [Windows("calibration", torch.stack(rows), len(rows))] if rows else []


def check_spec(spec: str) -> None:
    """Raises DataError if a SPEC can't be read: bad form, missing file, a column that is not there, no row."""
    if spec == SELF or spec.startswith("hf:"):
        if spec.startswith("hf:") and not spec[3:].split(":")[0]:
            raise DataError(f"{spec}: write hf:DATASET[:CONFIG[:SPLIT]]")
        return
    if next(documents(spec), None) is None:
        raise DataError(f"{spec} is empty: a calibration text needs at least one document")


def in_rounds(
    rows: Sequence[Any], cut: Callable[[Any], list[T]], seed: int, spare: bool = False
) -> Iterator[tuple[int, T]]:
    """Yields a piece of every document with the document's place, then a second one of those that have more, and so on.

    Args:
        spare: all of the first fifth of the documents comes before any other: where that is enough, others are left.

    >>> "".join(piece for _, piece in in_rounds(["aaa", "b", "cc"], list, 0))
    'abcaca'
    """
    draw = random.Random(seed)
    near = max(1, len(rows) // _SPARING) if spare else len(rows)
    for start, part in ((0, rows[:near]), (near, rows[near:])):
        left = []
        for place, row in enumerate(part, start):
            pieces = cut(row)
            draw.shuffle(pieces)
            left.append((place, pieces))
            if pieces:
                yield place, pieces.pop()
        while left := [(place, pieces) for place, pieces in left if pieces]:
            for place, pieces in left:
                yield place, pieces.pop()


def read_windows(
    spec: str,
    tokenizer: Any,
    *,
    count: int,
    window: int,
    seed: int = 0,
    skip: int = 0,
    at_least: int = 1,
    spare: bool = False,
) -> Windows:
    """Returns up to `count` windows of `window` tokens of a SPEC other than `self`, from the documents after the first `skip`.

    Args:
        at_least: fewer windows than this is an error.
        spare: as in `in_rounds`.

    Raises:
        DataError: the file, data set or column is missing, or the text is too short.
    """
    rows = list(documents(spec))
    random.Random(seed).shuffle(rows)
    rows = rows[skip:]
    windows: list[list[int]] = []
    short: list[int] = []
    used = 0

    def cut(document: str | list[dict[str, str]]) -> list[list[int]]:
        tokens = _tokenise(document, tokenizer, spec)
        return [tokens[first : first + window] for first in range(0, len(tokens), window)]

    for place, piece in in_rounds(rows, cut, seed, spare):
        if len(windows) >= count:
            break
        used = max(used, place + 1)
        if len(piece) == window:
            windows.append(piece)
        else:
            short += piece
        if len(short) >= window:
            windows.append(short[:window])
            short = short[window:]
    if len(windows) < at_least:
        raise DataError(
            f"{spec} is too short: {len(windows) * window + len(short)} tokens in {used} documents, {at_least * window} are needed "
            f"({at_least} windows of {window}); give more text, a smaller --tokens or --window"
        )
    return Windows(spec, torch.tensor(windows[:count], dtype=torch.int64).view(-1, window), used)


def split_windows(
    specs: Sequence[str], tokenizer: Any, *, tokens: int, held_out: int, window: int, seed: int
) -> tuple[list[Windows], list[Windows]]:
    """Returns (calibration, held-out) windows of file and hub specs: `tokens` calibration tokens in all, `held_out` windows each."""
    share = -(-tokens // window // len(specs)) if specs else 0
    calibration, evaluation = [], []
    for spec in specs:
        read = partial(read_windows, spec, tokenizer, window=window, seed=seed)
        held = read(count=held_out, spare=True) if held_out else None
        at_least = max(1, (tokens // window // len(specs)) // 2)
        calibration.append(read(count=share, skip=held.documents if held else 0, at_least=at_least))
        evaluation += [held] if held else []
    return calibration, evaluation


@torch.no_grad()
def sample_windows(
    model: Any,
    tokenizer: Any,
    *,
    count: int,
    window: int,
    seed: int,
    batch: int = 64,
    top_k: int = 100,
    advance: Callable[[float], None] = lambda share: None,
) -> Tensor:
    """Returns the model's own samples, (count, window) token ids; `advance` hears the share that is done.

    Half of them start from the beginning-of-text token; where the tokenizer has a chat template, the other half start inside a user's
    turn, so that the model writes the question and then its answer (after Xu et al. 2024, arXiv 2406.08464). Sampling goes on past the
    end-of-text token, as text does in a window: `generate` would stop there.
    """
    starts = [start[:window] for start in (_plain_start(model, tokenizer), _chat_start(tokenizer)) if start]
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for first in range(0, count, batch):
        rows = [starts[i % len(starts)] for i in range(first, min(first + batch, count))]
        ids = torch.tensor([start + [0] * (window - len(start)) for start in rows])
        given = torch.tensor([len(start) for start in rows])
        cache = None
        for t in range(window - 1):
            step = ids[:, t : t + 1].to(model.device)
            out = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            values, words = out.logits[:, -1].float().cpu().topk(min(top_k, out.logits.shape[-1]))
            drawn = words.gather(1, torch.multinomial(values.softmax(-1), 1, generator=generator))[:, 0]
            ids[:, t + 1] = torch.where(t + 1 < given, ids[:, t + 1], drawn)
            advance((first + len(rows) * (t + 2) / window) / count)
        batches.append(ids)
    return torch.cat(batches)


def _plain_start(model: Any, tokenizer: Any) -> list[int]:
    for token in (tokenizer.bos_token_id, model.config.bos_token_id, tokenizer.eos_token_id, model.config.eos_token_id):
        if isinstance(token, int):
            return [token]
    return [0]


def _chat_start(tokenizer: Any) -> list[int] | None:
    if not getattr(tokenizer, "chat_template", None):
        return None
    mark = "\u2402bondsmith\u2403"
    text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    head, found, _ = text.partition(mark)
    ids: list[int] = tokenizer(head, add_special_tokens=False)["input_ids"]
    return ids if found and ids else None


def _tokenise(document: str | list[dict[str, str]], tokenizer: Any, spec: str) -> list[int]:
    if isinstance(document, str):
        text_ids: list[int] = tokenizer(document, verbose=False)["input_ids"]
        end = tokenizer.eos_token_id
        return [*text_ids, end] if end is not None and text_ids[-1:] != [end] else text_ids
    if not getattr(tokenizer, "chat_template", None):
        text = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in document)
        return _tokenise(text, tokenizer, spec)
    ids: list[int] = tokenizer(rendered(document, tokenizer, spec), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    return ids


def rendered(turns: list[dict[str, str]], tokenizer: Any, spec: str, **options: Any) -> str:
    """Returns a chat as the model's template writes it; DataError where the template refuses it."""
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except (TemplateError, KeyError, TypeError, ValueError) as error:
        roles = ", ".join(turn["role"] for turn in turns[:6])
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{spec}: the model's chat template refuses a chat of the roles {roles} ({reason[:200]}): leave such rows out"
        ) from error
    return text


def documents(spec: str) -> Iterator[str | list[dict[str, str]]]:
    if spec.startswith("hf:"):
        yield from _hub_documents(spec)
        return
    path = Path(spec).expanduser()
    if not path.is_file():
        raise DataError(f"{spec}: no such file (a SPEC is self, a .txt, .jsonl or .jsonl.gz file, or hf:DATASET)")
    if path.suffix == ".txt":
        yield from _paragraphs(path.read_text(encoding="utf-8", errors="replace"))
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _rows(spec, path)
    else:
        raise DataError(f"{spec}: a calibration file ends in .txt, .jsonl or .jsonl.gz")


def _paragraphs(text: str, size: int = 4000) -> Iterator[str]:
    """Yields pieces of at least `size` characters, cut at blank lines, so that a held-out part can be kept apart."""
    piece = ""
    for paragraph in text.split("\n\n"):
        piece += paragraph + "\n\n"
        if len(piece) >= size:
            yield piece
            piece = ""
    if piece.strip():
        yield piece


def _rows(spec: str, path: Path) -> Iterator[str | list[dict[str, str]]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield from _document(json.loads(line), f"{spec}, line {number}")
    except (json.JSONDecodeError, UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{spec} is not JSON lines: {error}") from error


def _document(row: Any, where: str) -> Iterator[str | list[dict[str, str]]]:
    column = next((c for c in COLUMNS if isinstance(row, dict) and c in row), None)
    if column is None:
        columns = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{where}: none of the columns {', '.join(COLUMNS)} is there (found: {columns})")
    found = row[column]
    if found and column == "messages":
        whole = isinstance(found, list) and all(
            isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in found
        )
        if not whole:
            raise DataError(f"{where}: messages are not a list of turns with `role` and `content`")
    elif found and not isinstance(found, str):
        raise DataError(f"{where}: the column {column} holds a {type(found).__name__}, not text")
    if found:
        yield found


def _hub_documents(spec: str) -> Iterator[str | list[dict[str, str]]]:
    name, config, split = [*spec[3:].split(":"), "", ""][:3]
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"{spec}: hub data sets need the extra: pip install 'bondsmith[eval]'") from error
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows):
            if number == _HUB_ROWS:
                return
            yield from _document(row, f"{spec}, row {number}")
    except DataError:
        raise
    except Exception as error:  # datasets raises many types: no such data set, configuration or split, no network
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{spec} cannot be read: {reason[:300]}") from error
