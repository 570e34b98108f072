"""results.json in, the pages a person decides by out: a table, a report and a model card.

- One list of rows (`comparison`) feeds the terminal, `report.html` and `README.md`, so the three cannot disagree.
- What was not measured has no row: an absent section is left out, never printed as zero.
- The charts are SVG written by the templates in per cent of their width; nothing is drawn by a plotting library.

The schema of `results` is `docs/results.md`.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.table import Table
from rich.text import Text

from bondsmith.stages.charts import bars, heat_map
from bondsmith.stages.wording import count, duration, fenced, markdown, measured, number, percent, size, unbroken

FORMAT = 1
_OVERFIT = 1.5  # times the KL on fitted text from which on other text is a reason to calibrate on more
_REQUIRED = ("bondsmith", "created", "command", "seed", "versions", "machine", "model", "settings", "size", "networks")
_METRICS = {
    "frobenius": "every direction of the input counts alike, whatever the calibration text holds",
    "input": "measured on inputs as the calibration text produces them",
    "loss": "measured on inputs as the calibration text produces them, each output weighted by its effect on the loss",
}


@dataclass(frozen=True)
class Row:
    """One line of the comparison; `original` and `change` are empty where the figure exists for one model only."""

    section: str
    label: str
    original: str
    compressed: str
    change: str = ""


def write_report(out: Path, results: Mapping[str, Any]) -> None:
    """Nothing; `out` holds `report.html` and the model card `README.md` afterwards.

    Both pages are rendered before either is written, and each replaces its predecessor in one step.
    Raises ValueError if `results` is of another format or lacks a required section.
    """
    check_results(results)
    pages = {
        name: environment().get_template(name).render(**_view(out, results)) for name in ("report.html", "README.md")
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, page in pages.items():
        _replace_text(out / name, page)


def summary_table(results: Mapping[str, Any]) -> Table:
    """Original against compressed as a table for the terminal.

    Raises ValueError as `write_report` does.
    """
    check_results(results)
    table = Table(title=Text(results["model"]["name"]), caption="± one standard error", caption_justify="left")
    table.add_column("")
    for heading in ("original", "compressed", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for section, rows in groupby(comparison(results), key=lambda row: row.section):
        table.add_section()
        table.add_row(Text(section, style="bold"))
        for line in rows:
            table.add_row(*(Text(cell) for cell in (f"  {line.label}", line.original, line.compressed, line.change)))
    return table


def check_results(results: Mapping[str, Any]) -> None:
    """Nothing; raises ValueError that names what makes `results` unreadable for this version."""
    if results.get("format") != FORMAT:
        raise ValueError(
            f"results.json has format {results.get('format')!r}, this version of bondsmith reads format {FORMAT}: "
            "use the version that wrote it (field `bondsmith`), or run the command again with --overwrite"
        )
    missing = [name for name in _REQUIRED if name not in results]
    if missing:
        raise ValueError(f"results.json lacks {', '.join(missing)}; docs/results.md lists the required sections")


def comparison(results: Mapping[str, Any]) -> list[Row]:
    """The rows of original against compressed, in the order of size, quality, tasks, speed."""
    return [
        *_size_rows(results["size"]),
        *_healing_rows(results.get("healing")),
        *(row for text in results.get("quality", ()) for row in _quality_rows(text)),
        *(_quality_rows(fitted, "Text that was calibrated on") if (fitted := results.get("quality_fitted")) else ()),
        *(_task_row(task) for task in results.get("tasks", ())),
        *(_speed_row(name, run) for name, run in results.get("speed", {}).items()),
    ]


def headline(results: Mapping[str, Any]) -> str:
    """The outcome in plain sentences: size, then what it cost, then speed; only what was measured."""
    before, after = results["size"]["original"], results["size"]["compressed"]
    said = [
        f"{count(after['parameters'])} of {count(before['parameters'])} parameters are left "
        f"({percent(after['parameters'] / before['parameters'])}), in {size(after['bytes'])}: "
        f"{percent(after['bytes'] / before['bytes_fp32'])} of the original at 4 bytes per parameter, "
        f"{percent(after['bytes'] / before['bytes'])} of its {before['dtype']} checkpoint."
    ]
    if exact := results.get("repacked"):
        said.append(
            f"{len(exact)} rounded {'matrix lies' if len(exact) == 1 else 'matrices lie'} on the grid of the source already: an exact "
            "re-packing of the source, which says nothing about a method."
        )
    if quality := results.get("quality"):
        moves = [f"from {_ppl(text, 'original')} to {_ppl(text, 'compressed')} on {text['text']}" for text in quality]
        said.append(f"Perplexity goes {_listed(moves)}.")
        agreement = [f"{percent(text['top1'])} of cases on {text['text']}" for text in quality]
        said.append(f"Both models find the same next token most likely in {_listed(agreement)}.")
        said.extend(_overfit(quality, results.get("quality_fitted")))
    if speed := results.get("speed"):
        runs = [f"{name} runs at {number(run['ratio'])} times the original's speed" for name, run in speed.items()]
        said.append(f"{_listed(runs).capitalize()}.")
    return " ".join(said)


def _overfit(quality: Sequence[Mapping[str, Any]], fitted: Mapping[str, Any] | None) -> Iterator[str]:
    """What to do where a model is much closer to its original on text that it was calibrated on."""
    held_out = sum(text["kl"] for text in quality) / len(quality)
    if fitted and held_out > _OVERFIT * fitted["kl"]:
        yield (
            f"On text that it was calibrated on the KL is {number(fitted['kl'])}, on other text {number(held_out)}: "
            "more calibration tokens, and more kinds of text, would bring them closer."
        )


def _size_rows(sizes: Mapping[str, Any]) -> Iterator[Row]:
    before, after = sizes["original"], sizes["compressed"]
    for field, label in (("parameters", "Parameters"), ("matrix_parameters", "Parameters, tensorised matrices")):
        yield Row("Size", label, count(before[field]), count(after[field]), _times(after[field], before[field]))
    for field, label in (
        ("bytes_fp32", "Bytes, original at 4 per parameter"),
        ("bytes", f"Bytes, original in {before['dtype']}"),
    ):
        yield Row("Size", label, size(before[field]), size(after["bytes"]), _times(after["bytes"], before[field]))
    work = before["multiply_adds"], after["multiply_adds"]
    yield Row("Size", "Multiply-adds per token", count(work[0]), count(work[1]), _times(work[1], work[0]))


def _healing_rows(healing: Mapping[str, Any] | None) -> Iterator[Row]:
    if healing is None:
        return
    curve = {entry["step"]: entry for entry in healing["curve"]}
    before, after = curve[0], curve[healing["best_step"]]
    section = f"Healed with {count(after['tokens'])} tokens (fitted, healed; held-out text)"
    for field, label in (("kl", "KL to the original, nats/token"), ("perplexity", "Perplexity")):
        if field in after:
            change = _times(after[field], before[field])
            yield Row(section, label, number(before[field]), number(after[field]), change)


def _quality_rows(text: Mapping[str, Any], name: str | None = None) -> Iterator[Row]:
    section = f"{name or text['text']} ({text['windows']:,} windows, {text['tokens']:,} tokens)"
    before, after = text["perplexity"]["original"], text["perplexity"]["compressed"]
    yield Row(section, "Perplexity", number(before), number(after), _times(after, before))
    yield Row(section, "KL to the original, nats/token", "", measured(text["kl"], text["kl_stderr"]))
    error = text["top1_stderr"]
    agreement = measured(100 * text["top1"], None if error is None else 100 * error, " %")
    yield Row(section, "Top-1 agreement", "", agreement)


def _task_row(task: Mapping[str, Any]) -> Row:
    scores = [task[model] for model in ("original", "compressed")]
    before, after = (
        "" if task[model] is None else measured(task[model], task[f"{model}_stderr"])
        for model in ("original", "compressed")
    )
    change = "" if None in scores else f"{scores[1] - scores[0]:+.3f}".replace("-", "−")
    return Row("Tasks", f"{task['task']}, {task['metric']}, {task['rows']:,} rows", before, after, change)


def _speed_row(name: str, run: Mapping[str, Any]) -> Row:
    label = f"{name.capitalize()}, {run['batch']} × {run['tokens']} tokens"
    return Row(
        "Speed (tokens per second)",
        label,
        number(run["original"]),
        number(run["compressed"]),
        f"× {number(run['ratio'])}",
    )


def _times(after: float, before: float) -> str:
    return f"× {number(after / before)}" if before else ""


def _ppl(text: Mapping[str, Any], model: str) -> str:
    return number(text["perplexity"][model])


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _view(out: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """What the two templates see."""
    networks = results["networks"]
    return {
        "r": results,
        "directory": out.resolve().name,
        "headline": headline(results),
        "sections": [(name, list(rows)) for name, rows in groupby(comparison(results), key=lambda row: row.section)],
        "metric": _METRICS.get(results["settings"].get("metric"), _METRICS["input"]),
        "heat": heat_map(networks),
        "bars": bars(networks),
        "worst": sorted((n for n in networks if n["error"] is not None), key=lambda n: -n["error"])[:3],
        "front_matter": _front_matter(results["model"]),
    }


def _front_matter(model: Mapping[str, Any]) -> str:
    """The YAML head of the model card; fields that are not known are left out."""
    fields = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["bondsmith", "tensor-network"],
        "base_model": model.get("base_model"),
        "license": model.get("license"),
    }
    known = {name: value for name, value in fields.items() if value}
    return yaml.safe_dump(known, sort_keys=False, allow_unicode=True).strip()


def environment() -> Environment:
    """The templates of the pages, with the words and numbers of `wording` as filters."""
    found = Environment(
        loader=PackageLoader("bondsmith.stages"),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for function in (count, size, percent, number, duration, markdown, fenced, unbroken):
        found.filters[function.__name__] = function
    return found


def _replace_text(path: Path, text: str) -> None:
    """Write `path` in one step: readers see the old file or the new one, and a failed write leaves the old one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
