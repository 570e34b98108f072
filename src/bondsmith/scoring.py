"""Benchmark scores of a model and its original, and the results of a directory brought up to date."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bondsmith.model.checkpoint import write_json
from bondsmith.model.hub import load
from bondsmith.model.source import load_tokenizer, load_whole, open_source
from bondsmith.stages import report


def score(
    model: str | Path,
    tasks: Sequence[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    against: str | Path | None = None,
    batch_size: int = 8,
    progress: Callable[[str, float], None] = lambda stage, share: None,
) -> list[dict[str, Any]]:
    """Returns benchmark scores of `model`, and of `against` on the same rows: task, metric, rows, model, score, stderr.

    Where `model` is a compressed directory, its results.json and report are brought up to date.

    Args:
        tasks: names of lm-evaluation-harness tasks.
        data: folder of local benchmark files; hub data sets without it.
        limit: rows per task.

    Raises:
        TaskError: a task, file or column does not exist; before any model is loaded.
        ModelError: a model cannot be opened.
    """
    from bondsmith.stages.benchmark import check_tasks, run_tasks  # needs the extra [eval]

    check_tasks(tasks, data, limit=limit)
    names = {"compressed": model} if against is None else {"original": against, "compressed": model}
    with opened(names) as loaded:
        scores = run_tasks(
            loaded,
            load_tokenizer(Path(model)),
            tasks,
            data=data,
            limit=limit,
            batch_size=batch_size,
            on_progress=lambda stage, done, total: progress(stage, done / max(1, total)),
        )
    rows = [asdict(s) for s in scores]
    results = Path(model) / "results.json"
    if results.is_file():
        content = json.loads(results.read_text())
        record(Path(model), {"tasks": merge_tasks(content.get("tasks", []), rows)})
    return rows


@contextmanager
def opened(names: Mapping[str, str | Path]) -> Iterator[dict[str, PreTrainedModel]]:
    """Yields models in memory, in float32, by label: compressed directories, or whatever `open_source` takes."""
    with tempfile.TemporaryDirectory() as folder:
        yield {label: _open_whole(name, Path(folder) / label) for label, name in names.items()}


def record(directory: Path, sections: Mapping[str, Any]) -> dict[str, Any]:
    """Puts sections into the results.json of a compressed directory and draws its report anew; returns the results."""
    results = json.loads((directory / "results.json").read_text()) | dict(sections)
    write_json(directory / "results.json", results)
    report.write_report(directory, results)
    return results


def merge_tasks(before: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the `tasks` section of `results.json`: new scores by task and metric, in the place of older ones."""
    merged = {(t["task"], t["metric"]): dict(t) for t in before}
    blank = {"original": None, "original_stderr": None, "compressed": None, "compressed_stderr": None}
    for row in rows:
        key = row["task"], row["metric"]
        found = merged.get(key)
        if found is None or found["rows"] != row["rows"]:
            found = merged[key] = {"task": row["task"], "metric": row["metric"], "rows": row["rows"], **blank}
        found[row["model"]], found[row["model"] + "_stderr"] = row["score"], row["stderr"]
    return list(merged.values())


def _open_whole(name: str | Path, cache: Path) -> PreTrainedModel:
    """Returns a model in memory in float32."""
    config = Path(name) / "config.json"
    if config.is_file() and '"quant_method": "bondsmith"' in config.read_text():
        return load(name, dtype=torch.float32)
    return load_whole(open_source(name, cache))
