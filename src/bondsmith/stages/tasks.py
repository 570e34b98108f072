"""Benchmark tasks of lm-evaluation-harness, on hub data sets or on a folder of local files.

Every task is lm-eval's own: its prompts, choices and metrics are never rewritten. A task is loaded through a one-file
YAML in a temporary directory that includes lm-eval's YAML of the same name, so that scores and groups (`mmlu`, `blimp`)
keep lm-eval's names. For local files that YAML also replaces the data set by `local_rows`, which reads JSON lines in
memory: no network, no data set cache and no environment variable is involved.
"""

import json
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from bondsmith.stages.rows import TaskError, find_rows, read_rows, select_subset

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

Spec = dict[str, Any]  # a task's YAML as lm-eval merged it, or what is laid over it

_NAME = re.compile(r"""^["']?(?:task|group)["']?:[ \t]+["']?([^\s"'\[\]{}#,]+)""", re.M)
_TAGS = re.compile(r"""^["']?tag["']?:([^\n]*(?:\n[ \t]*-[^\n]*)*)""", re.M)


def load_tasks(names: Sequence[str], data: Path | None = None, *, seed: int = 0) -> dict[str, Any]:
    """The named tasks, ready to score: name -> lm-eval's `TaskDict` (`tasks`, `groups`), in the order given.

    Every task has built the prompt of its first row once, few-shot examples included, so that missing columns show here
    and not in the middle of a run. `data` is a folder of `<dataset>_<split>.jsonl[.gz]` files; without it the data sets
    come from the hub. Raises `TaskError`.
    """
    _require_harness()
    from lm_eval.tasks import TaskManager

    names = _checked_names(names)
    with quiet(), tempfile.TemporaryDirectory(prefix="bondsmith-tasks-") as folder:
        manager = _manager(names)
        families = {name: _family(name, manager) for name in names}
        every = list(dict.fromkeys(member for family in families.values() for member in family))
        files = {name: _overlay(name, manager, data, Path(folder)) for name in every if _is_task(name, manager)}
        # A later folder wins over an earlier one, so the overlay comes last.
        folders = [*_folders(manager.task_index[name].yaml_path for name in every), Path(folder)]
        manager = TaskManager(include_defaults=False, include_path=folders)
        try:
            return {
                name: _load(name, manager, [file for n in families[name] for file in files.get(n, [])], seed)
                for name in names
            }
        finally:
            read_rows.cache_clear()


def check_tasks(tasks: Sequence[str], data: Path | None = None, *, limit: int | None = None) -> None:
    """Nothing, or `TaskError`: every task exists and, with `data`, its files and columns are there. Loads no model.

    Without `data` only the names and the limit are checked: nothing is downloaded.
    """
    if limit is not None and limit <= 0:
        raise TaskError(f"limit {limit}: at least one row per task has to be scored; leave it out to score all rows")
    _require_harness()
    _checked_names(tasks)
    if data is not None:
        load_tasks(tasks, data)


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval, datasets and transformers report errors only, and no tqdm bar is drawn, until the block ends."""
    from tqdm.std import tqdm

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]
    levels = [logger.level for logger in loggers]
    init = tqdm.__init__

    def hidden(self: Any, *args: Any, **settings: Any) -> None:
        init(self, *args, **{**settings, "disable": True})

    tqdm.__init__ = hidden  # lm-eval has no switch for the bar of build_all_requests
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        tqdm.__init__ = init
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def local_rows(*, local_files: Mapping[str, str], local_subset: str | None = None, **_: object) -> dict[str, Any]:
    """Split name -> `datasets.Dataset` of local JSON lines; lm-eval calls it through the key `custom_dataset`.

    `local_subset` keeps the rows of one subject where a file holds all of them (the configurations of a hub data set).
    """
    from datasets import Dataset

    tables = {split: read_rows(Path(file)) for split, file in local_files.items()}
    if local_subset:
        tables = {s: select_subset(rows, local_subset, Path(local_files[s])) for s, rows in tables.items()}
    return {split: Dataset.from_list(rows) for split, rows in tables.items()}


def _require_harness() -> None:
    for module in ("lm_eval", "datasets"):
        if find_spec(module) is None:
            raise TaskError(f"benchmark tasks need the package {module}: pip install 'bondsmith[eval]'")


def _checked_names(names: Sequence[str]) -> list[str]:
    """The names without repetitions; `TaskError` with the nearest names for one that lm-eval does not have."""
    if not names:
        raise TaskError("no task given; name at least one, for example arc_easy")
    files, tags = _catalogue()
    for name in names:
        if name not in files and name not in tags:
            near = get_close_matches(name, [*files, *tags], n=3) or ["arc_easy", "piqa", "hellaswag"]
            raise TaskError(f"lm-eval has no task {name!r}; did you mean {', '.join(near)}?")
    return list(dict.fromkeys(names))


@cache
def _catalogue() -> tuple[Mapping[str, Path], frozenset[str]]:
    """(task or group name -> its YAML, tags), read as text: under a second where lm-eval's full index takes ten."""
    spec = find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    files: dict[str, Path] = {}
    tags: set[str] = set()
    for path in sorted(Path(spec.submodule_search_locations[0], "tasks").rglob("*")):
        if path.suffix not in (".yaml", "") or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        for found in _TAGS.findall(text):
            tags.update(re.findall(r"[^\s\"'\[\],-][^\s\"'\[\],]*", found))
        if path.suffix == ".yaml":
            for name in _NAME.findall(text):
                files.setdefault(name, path)
    return MappingProxyType(files), frozenset(tags)


def _manager(names: Sequence[str]) -> "TaskManager":
    """lm-eval's index of the folders with the named tasks, or of all folders where those do not complete a group."""
    from lm_eval.tasks import TaskManager

    files, _ = _catalogue()
    if all(name in files for name in names):
        manager = TaskManager(include_defaults=False, include_path=_folders(files[name] for name in names))
        if all(member in manager.task_index for name in names for member in _family(name, manager)):
            return manager
    return TaskManager()  # a tag, or a group with members in several folders


def _folders(files: Iterable[Path | None]) -> list[str | Path]:
    return list(dict.fromkeys(file.parent for file in files if file))


def _family(name: str, manager: "TaskManager") -> list[str]:
    """`name` and, for a group or a tag, all its members and theirs."""
    entry = manager.task_index.get(name)
    members: list[Any] = []
    if entry is not None and entry.kind.name == "TAG":
        members = sorted(entry.tags)
    elif entry is not None and entry.kind.name == "GROUP":
        members = (entry.cfg or {}).get("task") or []
    names = [m if isinstance(m, str) else m.get("group") or m["task"] for m in members]
    return [name, *(below for member in names for below in _family(member, manager))]


def _is_task(name: str, manager: "TaskManager") -> bool:
    return manager.task_index[name].kind.name not in ("GROUP", "TAG")


def _overlay(name: str, manager: "TaskManager", data: Path | None, folder: Path) -> list[Path]:
    """Writes the overlay YAML of one task into `folder`; returns the local files its rows come from."""
    entry = manager.task_index[name]
    config: Spec = entry.cfg or {}
    lines = [f"include: {json.dumps(str(entry.yaml_path))}", f"task: {json.dumps(name)}"]
    changes = _mean_metrics_only(config)
    files: list[Path] = []
    if data is not None:
        if "class" in config:
            raise TaskError(f"{name} is written in Python inside lm-eval and takes its rows from the hub only")
        local, files = _local_data(name, config, data)
        changes |= local
        lines.append("custom_dataset: !function bondsmith.stages.tasks.local_rows")
    if changes:
        lines += [f"{key}: {json.dumps(value)}" for key, value in changes.items()]
        Path(folder, f"{name}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def _mean_metrics_only(config: Spec) -> Spec:
    """A `metric_list` without perplexities and the like where the task also has a mean over rows such as accuracy.

    lm-eval bootstraps the standard error of every other aggregate 100,000 times, for figures that nobody asked for.
    """
    metrics = config.get("metric_list") or []
    plain = ("acc", "acc_norm", "exact_match")
    means = [m for m in metrics if m.get("aggregation", "mean" if m["metric"] in plain else None) == "mean"]
    has_code = any("/" in str(value) for metric in means for value in metric.values())
    return {} if not means or means == metrics or has_code or "process_results" in config else {"metric_list": means}


def _local_data(name: str, config: Spec, data: Path) -> tuple[Spec, list[Path]]:
    """(what replaces the hub data set in the task's YAML, the files read)."""
    scored = [config[role] for role in ("test_split", "validation_split") if config.get(role)]
    split, file, subset = find_rows(name, config, scored, data)
    files = {split: file}
    shots = config.get("fewshot_split") or config.get("training_split") if config.get("num_fewshot") else None
    if shots and shots != split:
        files[shots] = find_rows(name, config, [shots], data)[1]
    changes: Spec = {
        "dataset_kwargs": {"local_files": {split: str(file) for split, file in files.items()}, "local_subset": subset},
        "test_split": split if split == config.get("test_split") else None,
        "validation_split": split if split != config.get("test_split") else None,
        "training_split": None,
        "fewshot_split": shots,
    }
    return changes, list(files.values())


def _load(name: str, manager: "TaskManager", files: Sequence[Path], seed: int) -> Any:
    """lm-eval's `TaskDict` of one requested name, its first prompts built once; every failure becomes a `TaskError`."""
    try:
        loaded = manager.load([name])
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(seed)
            if files:
                _check_plain_columns(task)
            task.build_all_requests(limit=1, rank=0, world_size=1)
    except TaskError:
        raise
    except Exception as error:  # whatever a data set, a template or a task's own function raises
        raise TaskError(_explain(name, files, error)) from error
    return loaded


def _check_plain_columns(task: Any) -> None:
    # lm-eval takes a name that is no column for literal text: every row would be scored against the word "label".
    for field in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        value = task.get_config(field)
        if isinstance(value, str) and value.isidentifier() and value not in task.features:
            raise KeyError(value)


def _explain(name: str, files: Sequence[Path], error: Exception) -> str:
    if not files:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"{name}: the data set could not be loaded from the hub ({reason}); give local files with --data"
    undefined = re.search(r"'(\w+)' is undefined", str(error))
    column = error.args[0] if isinstance(error, KeyError) and error.args else undefined and undefined[1]
    for file in dict.fromkeys(files):
        columns = list(read_rows(file)[0])
        if column and column not in columns:
            return f"{name}: {file} has no column {column!r}; its columns are {', '.join(columns)}"
    return f"{name}: the rows of {files[0]} do not fit the task ({type(error).__name__}: {error})"
