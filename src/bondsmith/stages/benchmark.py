"""Benchmark scores of one or several models on the same rows, by lm-evaluation-harness (extra `[eval]`)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bondsmith.stages.rows import TaskError
from bondsmith.stages.tasks import check_tasks, load_tasks, quiet

__all__ = ["TaskError", "TaskScore", "check_tasks", "headline", "run_tasks"]


@dataclass(frozen=True)
class TaskScore:
    """One model's score on one task.

    Attributes:
        task: lm-eval's name of the task or group.
        metric: lm-eval's name, with its filter where the task has one (`exact_match,strict-match`).
        rows: documents scored (a group: of all its tasks).
        model: the key under which the model was given.
        score: accuracies between 0 and 1, perplexities as they are.
        stderr: standard error over rows; None where the metric is no mean over rows, or a task had one row.
    """

    task: str
    metric: str
    rows: int
    model: str
    score: float
    stderr: float | None

    def __str__(self) -> str:
        error = f" +- {self.stderr:.4f}" if self.stderr is not None else ""
        return f"{self.task} {self.metric} {self.score:.4f}{error} ({self.rows} rows, {self.model})"


def run_tasks(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[TaskScore]:
    """Scores of every model on every task, task by task: all models see the same rows, prompts and batches.

    `tasks` are lm-eval's names of tasks, groups or tags; a group that lm-eval does not average is reported task by
    task. `data` is a folder of local files (`<dataset>_<split>.jsonl[.gz]`), else the data sets come from the hub.
    `limit` takes the first rows of every task (of each subject of `mmlu`), `seed` draws few-shot examples.
    `on_progress` is called with ("task, model", requests done, requests in all). Prompts are used as they are, without
    a chat template. Raises `TaskError` before the first forward pass.
    """
    if batch_size < 1:
        raise TaskError(f"batch size {batch_size}: at least one row has to go through the model at a time")
    check_tasks(tasks, limit=limit)
    with quiet():
        loaded = load_tasks(tasks, data, seed=seed)
        return [
            score
            for name, task_dict in loaded.items()
            for label, model in models.items()
            for score in _score(name, task_dict, label, model, tokenizer, limit, batch_size, seed, on_progress)
        ]


def headline(metrics: Sequence[str]) -> str:
    """The metric a task is quoted by: normalised accuracy, else accuracy, else the first that the task lists.

    >>> headline(["perplexity,none", "acc,none"])
    'acc,none'
    >>> headline(["exact_match,strict-match", "exact_match,flexible-extract"])
    'exact_match,strict-match'
    """
    for wanted in ("acc_norm", "acc"):
        for metric in metrics:
            if metric.split(",")[0] == wanted:
                return metric
    return metrics[0]


def _score(
    name: str,
    task_dict: dict[str, Any],
    label: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    batch_size: int,
    seed: int,
    on_progress: Callable[[str, int, int], None] | None,
) -> list[TaskScore]:
    from lm_eval import evaluate

    from bondsmith.stages.harness import Scorer

    def report(done: int, total: int) -> None:
        if on_progress:
            on_progress(f"{name}, {label}", done, total)

    for task in task_dict["tasks"].values():
        task.set_fewshot_seed(seed)  # the sampler has moved on with the model before
    training = model.training
    try:
        found = evaluate(
            Scorer(model, tokenizer, batch_size, report),
            task_dict,
            limit=limit,
            bootstrap_iters=_error_iterations(task_dict),
            log_samples=False,
        )["results"]
    finally:
        model.train(training)
    return [_task_score(n, found[n], label) for n in ([name] if _metrics(found.get(name, {})) else task_dict["tasks"])]


def _error_iterations(task_dict: dict[str, Any]) -> int:
    """1 where all metrics are means, whose standard error has a closed form, else 0: no bootstrap in a process pool."""
    from lm_eval.api.metrics import mean

    return int(all(fn is mean for task in task_dict["tasks"].values() for fn in task.aggregation().values()))


def _metrics(found: Mapping[str, Any]) -> list[str]:
    return [key for key in found if "," in key and "_stderr," not in key]


def _task_score(name: str, found: Mapping[str, Any], label: str) -> TaskScore:
    metric = headline(_metrics(found))
    stderr = found.get(metric.replace(",", "_stderr,", 1))
    return TaskScore(
        task=name,
        metric=metric.removesuffix(",none"),
        rows=found["sample_len"],
        model=label,
        score=float(found[metric]),
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
    )
