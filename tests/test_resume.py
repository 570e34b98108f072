"""Killed at any moment, the same command with --resume goes on and ends with the same bytes; nothing a user had is lost."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import save_tiny, write_text
from killing import kill_when

import bondsmith
from bondsmith import cli
from bondsmith.model import checkpoint
from bondsmith.model.checkpoint import DiskFullError
from bondsmith.rundir import RunError

BLOCKS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deep") / "model"
    save_tiny(path, num_hidden_layers=BLOCKS)
    write_text(path / "text.txt", 20_000)
    return path


def command(model: Path, out: Path, *more: str) -> list[str]:
    shared = ["--keep", "0.6", "--calibration", str(model / "text.txt"), "--tokens", "8192", "--no-evaluate"]
    return ["compress", str(model), "--out", str(out), *shared, *more]


def run_cli(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    sys.argv = ["bondsmith", *arguments]
    with open(os.devnull, "w") as sys.stderr:
        cli.main()


def weights(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(directory.glob("bondsmith*")) if f.suffix != ".partial"}


def test_killed_again_and_again_ends_with_the_same_bytes(model: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    run = multiprocessing.get_context("fork").Process(target=run_cli, args=(command(model, whole),))
    run.start()
    run.join()
    assert run.exitcode == 0
    partial = out.with_name("out.partial")
    moments: list[Callable[[], bool]] = [
        lambda: (partial / "work" / "fisher" / f"block-{BLOCKS - 2}.safetensors").is_file(),
        lambda: (partial / "work" / "original-1").is_file(),
        lambda: (partial / checkpoint.shard_name(2, BLOCKS + 1)).is_file(),
        lambda: (partial / checkpoint.shard_name(4, BLOCKS + 1)).is_file(),
        lambda: (partial / checkpoint.INDEX).is_file(),
    ]
    killed, finished_before = 0, 0.0
    for reached in moments:
        killed += kill_when(run_cli, (command(model, out, "--resume"),), reached)
        assert not out.exists()
        shards = [f.stat().st_mtime for f in sorted(partial.glob("bondsmith-*.safetensors"))][:2]
        if len(shards) == 2:
            finished_before = finished_before or shards[1]
            assert shards[1] == finished_before, "a finished block was computed again"
    assert killed >= 4
    run = multiprocessing.get_context("fork").Process(target=run_cli, args=(command(model, out, "--resume"),))
    run.start()
    run.join()
    assert run.exitcode == 0
    assert not partial.exists()
    assert weights(out) == weights(whole)
    assert len(weights(out)) == BLOCKS + 2


def interrupted(model: Path, out: Path) -> Path:
    kill_when(
        run_cli, (command(model, out),), lambda: (out.with_name("out.partial") / checkpoint.shard_name(1, 7)).is_file()
    )
    return out.with_name("out.partial")


def test_other_settings_or_files_are_noticed_and_named(model: Path, tmp_path: Path) -> None:
    partial = interrupted(model, tmp_path / "out")
    before = weights(partial)
    settings = {"keep": 0.6, "calibration": [str(model / "text.txt")], "tokens": 8192, "evaluate": False}
    with pytest.raises(RunError, match="--resume goes on"):
        bondsmith.compress(model, tmp_path / "out", **settings)
    with pytest.raises(RunError, match=r"keep was 0\.6, is 0\.5"):
        bondsmith.compress(model, tmp_path / "out", resume=True, **(settings | {"keep": 0.5}))
    text = model / "text.txt"
    content = text.read_text()
    text.write_text(content + " w9")
    try:
        with pytest.raises(RunError, match=r"text\.txt has changed"):
            bondsmith.compress(model, tmp_path / "out", resume=True, **settings)
    finally:
        text.write_text(content)
    assert weights(partial) == before
    done = bondsmith.compress(model, tmp_path / "out", resume=True, **settings)
    assert done.load() is not None


def test_overwrite_keeps_the_old_model_until_the_new_one_is_complete(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"calibration": [str(model / "text.txt")], "tokens": 1024, "evaluate": False}
    out = tmp_path / "out"
    bondsmith.compress(model, out, keep=0.6, **settings)
    before = weights(out)
    with pytest.raises(RunError, match="not empty"):
        bondsmith.compress(model, out, keep=0.5, **settings)
    written: list[Path] = []
    save = checkpoint.save_file

    def full(tensors: object, path: Path, **options: object) -> None:
        written.append(path)
        if len(written) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(DiskFullError, match="--resume"):
        bondsmith.compress(model, out, keep=0.5, overwrite=True, **settings)
    monkeypatch.undo()
    assert weights(out) == before
    assert bondsmith.load(out) is not None
    done = bondsmith.compress(model, out, keep=0.5, overwrite=True, resume=True, **settings)
    assert done.results["settings"]["keep"] == 0.5
    assert json.loads((out / "results.json").read_text())["settings"]["keep"] == 0.5
    assert not list(tmp_path.glob("out.*"))


def test_a_disk_that_is_too_small_is_noticed_before_the_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = checkpoint.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("bondsmith.pipeline.shutil.disk_usage", lambda path: free)
    with pytest.raises(RunError, match="are free: make room"):
        bondsmith.compress(model, tmp_path / "out", keep=0.5, calibration=[str(model / "text.txt")], tokens=1024)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_another_process_writes_is_left_alone(model: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    (partial / "work").mkdir(parents=True)
    (partial / "work" / "kept").write_text("")
    code = (
        f"from pathlib import Path; from bondsmith.rundir import logging_to\n"
        f"with logging_to(Path({str(partial / 'log.txt')!r})): print('there', flush=True); input()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"there\n"
        for way in ({"overwrite": True}, {"resume": True}):
            with pytest.raises(RunError, match=r"out\.partial is being written by another process"):
                bondsmith.compress(model, tmp_path / "out", keep=0.5, metric="frobenius", evaluate=False, **way)
        with pytest.raises(RunError, match="another process"):
            bondsmith.profile(model, partial, overwrite=True)
        assert (partial / "work" / "kept").is_file()
    finally:
        other.communicate(b"\n")
    done = bondsmith.compress(
        model, tmp_path / "out", keep=0.5, metric="frobenius", evaluate=False, overwrite=True, sites="matrix"
    )
    assert done.path.is_dir()
