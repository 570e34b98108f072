"""One training step of a model and of its compressed form: time, memory, bytes that a data-parallel step exchanges.

    python benchmarks/training.py MODEL --small DIR

DIR is what `bondsmith compress MODEL` wrote; `--keep 0.3` instead takes random cuts of every matrix. Both models take the same batch in
turn, in one process: forward, backward and the optimizer's step, the cross entropy taken at the head, embedding and head frozen, Adam for
the original, what `bondsmith heal` uses for the compressed one. The limit is the ratio of the multiply-adds of a step: trained matrices
three times (forward, gradient of the inputs, of the weights), frozen ones and the head twice, attention scores three and a half times
(they are computed once more on the way back, as Dao 2023 counts); a network in the form it is trained in, k (O + I). Matrix products are
timed by torch's profiler in a step of their own: what is left is attention, norms, activations and the softmax over the vocabulary, alike
in both, which no network makes less. Memory is the peak of a process of its own that takes two steps, less what it held before.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from bondsmith.model.blocks import find_blocks, matrices, shape
from bondsmith.model.hub import load, replace_matrices
from bondsmith.model.source import Source, load_whole, open_source
from bondsmith.nn.free import free_all
from bondsmith.stages.healing.head import head_sums
from bondsmith.stages.healing.teacher import logits_of
from bondsmith.stages.training import Steps, reduced_matrices, trainable
from bondsmith.tensor.sites import Sites


class Student:
    """A model with its optimizer."""

    def __init__(self, model: Any, networks: bool):
        self.model = model
        if networks:
            free_all(model)
            chosen = trainable(model, dense=reduced_matrices(getattr(model.config, "quantization_config", None) or {}))
            self.parameters = list(chosen.values())
            self.optimizer: torch.optim.Optimizer = Steps(model, chosen, 0.001, 0.001)
        else:
            self.parameters = [p for n, p in model.named_parameters() if n not in ends(model)]
            for parameter in model.parameters():
                parameter.requires_grad_(any(parameter is p for p in self.parameters))
            self.optimizer = torch.optim.Adam(self.parameters, lr=1e-5, foreach=True)

    @property
    def trained(self) -> int:
        return sum(p.numel() for p in self.parameters)

    @property
    def state_bytes(self) -> int:
        states = (t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
        return sum(t.numel() * t.element_size() for t in states)

    def step(self, ids: Tensor) -> tuple[float, float]:
        """Returns the seconds of forward and backward, and of the optimizer."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        counts = torch.ones_like(ids, dtype=torch.bool)
        sums = head_sums(self.model, partial(logits_of, self.model, ids, None), ids, counts, None, (0.0, 1.0))
        (sums.loss / sums.tokens).backward()
        middle = time.perf_counter()
        self.optimizer.step()
        return middle - start, time.perf_counter() - middle

    def products(self, ids: Tensor) -> float:
        """Returns the seconds of a step in matrix products, those of the optimizer left out."""
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            self.step(ids)
        events = seen.events() or ()
        optimizer = [e.time_range for e in events if e.name.startswith("Optimizer.step#")]
        products = [e for e in events if e.name in ("aten::mm", "aten::bmm", "aten::addmm")]
        outside = [e for e in products if not any(t.start <= e.time_range.start < t.end for t in optimizer)]
        return sum(e.self_cpu_time_total for e in outside) / 1e6


def ends(model: Any) -> set[str]:
    """Returns the names of embedding and head weights."""
    weights = [m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    return {n for n, p in model.named_parameters() if any(p is w for w in weights)}


def multiply_adds(model: Any, tokens: int) -> int:
    """Returns the multiply-adds of a training step per token; frozen weights have no gradient of their own."""
    blocks = model.get_submodule(find_blocks(model))
    linear = [m for m in blocks.modules() if isinstance(m, torch.nn.Linear)]
    passes = sum((3 if m.weight.requires_grad else 2) * m.weight.numel() for m in linear)
    config = model.config
    scores = 2 * config.num_hidden_layers * config.hidden_size * tokens / 2
    return int(passes + 2 * config.vocab_size * config.hidden_size + 3.5 * scores)


def compressed(source: Source, keep: float) -> PreTrainedModel:
    """Returns the model with a matrix cut of random numbers in the place of every matrix of its blocks."""
    model = load_whole(source)
    path = find_blocks(model)
    networks = {}
    for k, block in enumerate(model.get_submodule(path)):  # type: ignore[arg-type]
        for name, matrix in matrices(block).items():
            rows, columns = shape(matrix)
            bonds = Sites((rows, 1), (1, columns)).bonds_within(int(keep * rows * columns), True)
            networks[f"{path}.{k}.{name}"] = {"sites": [[rows, 1], [1, columns]], "bonds": bonds, "gauge": True}
    replace_matrices(model, networks)
    return model


def student(source: Source, small: Path | float | None) -> Student:
    """Returns the original, the compressed directory, or random cuts that keep a share."""
    if small is None:
        return Student(load_whole(source), False)
    model = load(small, dtype=torch.float32) if isinstance(small, Path) else compressed(source, small)
    return Student(model.train(False), True)


def peak(model: str, small: Path | float | None, ids: Tensor, threads: int, answer: Connection) -> None:
    """Sends the peak memory of two steps, in bytes."""
    torch.set_num_threads(threads)
    process = psutil.Process()
    before = process.memory_info().rss
    one = student(open_source(model, Path("/nonexistent")), small)
    one.step(ids), one.step(ids)
    lines = Path("/proc/self/status").read_text().splitlines()
    most = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), process.memory_info().rss)
    answer.send(most - before)


def peak_memory(model: Path, small: Path | float | None, ids: Tensor) -> int:
    receive, send = multiprocessing.Pipe()
    arguments = (str(model), small, ids, torch.get_num_threads(), send)
    child = multiprocessing.get_context("spawn").Process(target=peak, args=arguments)
    child.start()
    found: int = receive.recv()
    child.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--small", type=Path)
    parser.add_argument("--keep", type=float, default=0.3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(options.model, Path(folder) / "source")
        ids = torch.randint(
            0, source.config.vocab_size, (options.batch, options.tokens), generator=torch.Generator().manual_seed(0)
        )
        small = options.small or options.keep
        memory = [0, 0]
        if not options.no_memory:
            memory = [peak_memory(source.path, which, ids) for which in (None, small)]
        students = [student(source, which) for which in (None, small)]
        work = [multiply_adds(s.model, options.tokens) for s in students]
        for one in students:
            one.step(ids)
        rounds = [[s.step(ids) for s in students] for _ in range(options.rounds)]
        products = [s.products(ids) for s in students]
    show(options, students, work, memory, rounds, products)


def show(
    options: argparse.Namespace,
    students: list[Student],
    work: list[int],
    memory: list[int],
    rounds: list[list[tuple[float, float]]],
    products: list[float],
) -> None:
    table = Table(
        "",
        "original",
        str(options.small or f"random cuts, keep {options.keep:g}"),
        "ratio",
        title=f"batch {options.batch} x {options.tokens} tokens",
    )

    def row(name: str, values: list[float], unit: str, digits: int = 1) -> None:
        table.add_row(
            name, *(f"{v:.{digits}f} {unit}" for v in values), f"{values[0] / values[1]:.2f}" if values[1] else ""
        )

    row("forward and backward", [1000 * statistics.median(r[i][0] for r in rounds) for i in (0, 1)], "ms")
    row("of it products of matrices", [1000 * seconds for seconds in products], "ms")
    row("optimizer", [1000 * statistics.median(r[i][1] for r in rounds) for i in (0, 1)], "ms")
    row("step", [1000 * statistics.median(sum(r[i]) for r in rounds) for i in (0, 1)], "ms")
    row("multiply-adds a token", [w / 1e6 for w in work], "M")
    row("trained parameters", [s.trained / 1e6 for s in students], "M", 2)
    row("bytes exchanged by data parallelism (gradients)", [4 * s.trained / 1e6 for s in students], "MB")
    row("optimizer state", [s.state_bytes / 1e6 for s in students], "MB")
    if any(memory):
        row("peak memory of two steps", [m / 1e6 for m in memory], "MB", 0)
    console = Console(width=120)
    console.print(table)
    speed = statistics.median(sum(r[0]) / sum(r[1]) for r in rounds)
    console.print(f"speed-up {speed:.2f} of a limit of {work[0] / work[1]:.2f}: {speed * work[1] / work[0]:.2f}")


if __name__ == "__main__":
    main()
