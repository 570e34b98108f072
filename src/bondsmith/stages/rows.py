"""Benchmark rows in local files: `<dataset>_<split>.jsonl[.gz]`, JSON lines with the columns of the hub data set."""

import gzip
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# Where the usual file name cannot be derived from the task's own YAML.
_STEMS = {"social_iqa": "social_i_qa", "triviaqa": "triviaqa_wikipedia", "wikitext": "wikitext2_raw"}


class TaskError(ValueError):
    """A benchmark that cannot be run as asked: the message is one sentence that says what to change."""


def find_rows(task: str, config: Mapping[str, Any], splits: Sequence[str], data: Path) -> tuple[str, Path, str | None]:
    """(split, file, subset): the file for the first of `splits` that has one in `data` or a folder directly in it.

    `config` is the task's YAML. The file is called after the task, its configuration or its data set: `arc_easy_test`
    (also for `ARC-Easy`), or `mmlu_test` for all subjects of `cais/mmlu`, and then `subset` is the subject to keep.
    A row count may follow the split (`piqa_train_2000`), and a file without a split (`blimp`) serves for any.
    Raises `TaskError` with the names expected.
    """
    here = _files_in(data)
    subset = config.get("dataset_name")
    whole = _slug(str(config.get("dataset_path", "")).rsplit("/", 1)[-1])
    own = [stem for stem in (task, _STEMS.get(task), _slug(subset or "")) if stem]
    stems = [(stem, None) for stem in own] + [(whole, subset)] * (whole != "" and whole not in own)
    for split in splits:
        for stem, part in stems:
            pattern = re.compile(rf"{re.escape(stem)}(_{re.escape(split)}(_\d+)?)?")
            if file := next((here[name] for name in here if pattern.fullmatch(name)), None):
                return split, file, part
    # The usual name: the table's, or that of the data set where it serves a whole group of tasks.
    stem = _STEMS.get(task) or (whole if subset and _slug(subset) not in (task, "main", "default") else task)
    wanted = " or ".join(f"{stem}_{split}.jsonl[.gz]" for split in splits)
    more = f" and {len(here) - 8} more" if len(here) > 8 else ""
    raise TaskError(f"{task}: {data} has no {wanted}; it has {', '.join(sorted(here)[:8])}{more}")


@lru_cache(maxsize=4)
def read_rows(file: Path) -> list[Row]:
    """The rows of a JSON-lines file, all with the columns of the first; `TaskError` names the line that is wrong."""
    rows: list[Row] = []
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(_parsed(line, f"{file}, line {number}"))
                    if missing := rows[0].keys() - rows[-1].keys():
                        raise TaskError(
                            f"{file}, line {number}: the column {min(missing)!r} of the first row is missing"
                        )
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise TaskError(f"{file} cannot be read ({error})") from error
    if not rows:
        raise TaskError(f"{file} is empty")
    return rows


def select_subset(rows: Sequence[Row], subset: str, file: Path) -> list[Row]:
    """The rows of one configuration (a subject, a paradigm): those that carry its name in some column."""
    for column in rows[0]:
        if chosen := [row for row in rows if row[column] == subset]:
            return chosen
    raise TaskError(f"{file} has no row marked {subset!r} in any column ({', '.join(rows[0])})")


def _files_in(folder: Path) -> dict[str, Path]:
    """File name without `.jsonl[.gz]` -> file."""
    if not folder.is_dir():
        raise TaskError(f"there is no folder {folder}")
    files = sorted([*folder.glob("*.jsonl*"), *folder.glob("*/*.jsonl*")], key=lambda file: (len(file.parts), file))
    found: dict[str, Path] = {}
    for file in files:
        if file.name.endswith((".jsonl", ".jsonl.gz")):
            found.setdefault(file.name.split(".jsonl")[0], file)
    if not found:
        raise TaskError(f"{folder} holds no .jsonl or .jsonl.gz file")
    return found


def _parsed(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise TaskError(f"{where}: not JSON ({error.msg})") from error
    if not isinstance(row, dict):
        raise TaskError(f"{where}: a JSON object with named columns is expected, not {type(row).__name__}")
    return row


def _slug(name: str) -> str:
    return name.lower().replace("-", "_")
