"""Healing in two processes (gloo, FSDP2): the losses of one process, checkpoints both can read, and a clear end when one dies."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import save_tiny, write_text

import bondsmith

SETTINGS: dict[str, Any] = {
    "tokens": 4096,
    "window": 64,
    "batch": 8,
    "micro_batch": 2,
    "learning_rate": 0.01,
    "validate_every": 2,
}
DIES = """
import os, signal, sys
from bondsmith import cli
from bondsmith.stages.healing import loop
step = loop.Loop._train_step
def mortal(self, due):
    if self.step == 5 and self.ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, due)
loop.Loop._train_step = mortal
sys.argv = ["bondsmith", *sys.argv[1:]]
cli.main()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("processes")
    save_tiny(path / "model", tie_word_embeddings=True)
    write_text(path / "text.txt", 8000)
    bondsmith.compress(
        path / "model", path / "small", keep=0.3, uniform=True, metric="frobenius", window=64, evaluate=False
    )
    for file in (path / "model").glob("*token*"):
        (path / "small" / file.name).write_bytes(file.read_bytes())
    (path / "dies.py").write_text(DIES)
    return path


def arguments(home: Path, out: Path, *more: str) -> list[str]:
    given = [f"--{k.replace('_', '-')}={v}" for k, v in SETTINGS.items()]
    shared = ["--data", str(home / "text.txt"), "--out", str(out), "--cache", str(home / "cache"), "--no-evaluate"]
    return ["heal", str(home / "small"), *shared, *given, *more]


def two_processes(program: list[str], given: list[str]) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    return subprocess.run(
        [*torchrun, *program, *given],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def losses(directory: Path) -> list[float]:
    return [float(v) for v in re.findall(r"loss (\d+\.\d+)", (directory / "log.txt").read_text())]


def curve(directory: Path) -> list[dict[str, float]]:
    found: list[dict[str, float]] = json.loads((directory / "results.json").read_text())["healing"]["curve"]
    return found


def test_two_processes_take_the_steps_of_one(home: Path, tmp_path: Path) -> None:
    one = bondsmith.heal(
        home / "small", tmp_path / "one", data=str(home / "text.txt"), cache=home / "cache", evaluate=False, **SETTINGS
    )
    run = two_processes(["-m", "bondsmith.cli"], arguments(home, tmp_path / "two"))
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("kept: step") == 1, "every process speaks"
    for a, b in zip(one.healing["curve"], curve(tmp_path / "two"), strict=True):
        assert b["kl"] == pytest.approx(a["kl"], abs=1e-4)
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-4)
    assert len(losses(tmp_path / "two")) == 8
    assert json.loads((tmp_path / "two" / "results.json").read_text())["healing"]["processes"] == 2
    assert bondsmith.load(tmp_path / "two") is not None


def test_when_one_dies_the_other_says_so_and_nothing_is_lost(home: Path, tmp_path: Path) -> None:
    whole = bondsmith.heal(
        home / "small",
        tmp_path / "whole",
        data=str(home / "text.txt"),
        cache=home / "cache",
        evaluate=False,
        **SETTINGS,
    )
    run = two_processes([str(home / "dies.py")], arguments(home, tmp_path / "out"))
    assert run.returncode != 0
    assert re.search(
        r"process 0 of 2 stops: another process has ended .* --resume goes on", run.stderr.replace("\n", " ")
    ), run.stderr
    note = json.loads((tmp_path / "out.partial" / "work" / "latest.json").read_text())
    assert note["step"] == 4
    assert not (tmp_path / "out").exists()
    resumed = bondsmith.heal(
        home / "small",
        tmp_path / "out",
        data=str(home / "text.txt"),
        cache=home / "cache",
        evaluate=False,
        resume=True,
        **SETTINGS,
    )
    for a, b in zip(whole.healing["curve"], resumed.healing["curve"], strict=True):
        assert b["kl"] == pytest.approx(a["kl"], abs=1e-4)
