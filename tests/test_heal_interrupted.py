"""A healing that is interrupted, at any moment: never half a model on disk, nothing of the user's lost, the same bytes in the end."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from heal_cases import SETTINGS, heal, make_home, weights
from killing import kill_when
from torch.distributed.checkpoint import FileSystemWriter

import bondsmith
from bondsmith import cli, rundir
from bondsmith.model.checkpoint import DiskFullError
from bondsmith.rundir import RunError
from bondsmith.stages.healing import loop
from bondsmith.stages.healing.settings import HealError


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("heal"))


def command(home: Path, out: Path, *more: str) -> list[str]:
    given = [f"--{k.replace('_', '-')}={v}" for k, v in SETTINGS.items()]
    return [
        "heal",
        str(home / "small"),
        "--data",
        str(home / "text.txt"),
        "--out",
        str(out),
        *given,
        "--no-evaluate",
        *more,
    ]


def run_cli(arguments: list[str], slow: float) -> None:
    torch.set_num_threads(1)
    sys.argv = ["bondsmith", *arguments]
    step = loop.Loop._train_step

    def slower(self: Any, due: bool) -> Any:
        time.sleep(slow)
        return step(self, due)

    loop.Loop._train_step = slower  # type: ignore[method-assign]
    with open(os.devnull, "w") as sys.stderr, open(os.devnull, "w") as sys.stdout:
        cli.main()


def test_killed_again_and_again_ends_with_the_same_bytes(home: Path, tmp_path: Path) -> None:
    whole = heal(home, tmp_path / "whole", evaluate=False)
    out, work = tmp_path / "out", tmp_path / "out.partial" / "work"

    def step() -> int:
        return json.loads((work / "latest.json").read_text())["step"] if (work / "latest.json").is_file() else -1

    moments: list[Callable[[], bool]] = [
        lambda: next(work.glob("teacher-*/*.safetensors"), None) is not None,
        lambda: step() == 2,
        lambda: (work / "state-00000004").is_dir(),
        lambda: step() == 6,
        lambda: (work / "state-00000008").is_dir(),
    ]
    killed = 0
    for reached in moments:
        killed += kill_when(run_cli, (command(home, out, "--resume"), 0.05), reached)
        assert not out.exists()
    assert killed == len(moments)
    again = heal(home, out, resume=True, evaluate=False)
    assert weights(out) == weights(whole.path)
    assert again.healing["curve"] == whole.healing["curve"]


def test_killed_between_the_renames_at_the_end(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place: for a moment the directory has another name. A process that dies then has lost nothing."""
    whole = heal(home, tmp_path / "whole", evaluate=False)
    place = tmp_path / "small"
    shutil.copytree(home / "small", place)
    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if Path(source).name == "small.partial":
            raise KeyboardInterrupt
        real(source, target)

    settings = {"data": str(home / "text.txt"), "evaluate": False} | SETTINGS
    with monkeypatch.context() as patch:
        patch.setattr("bondsmith.rundir.os.rename", rename)
        with pytest.raises(KeyboardInterrupt):
            bondsmith.heal(place, **settings)
    assert sorted(p.name for p in tmp_path.glob("small*")) == ["small.old", "small.partial"]
    bondsmith.heal(place, resume=True, **settings)
    assert [p.name for p in tmp_path.glob("small*")] == ["small"]
    assert weights(place) == weights(whole.path)


def stopped(home: Path, out: Path, monkeypatch: pytest.MonkeyPatch, at: int = 5) -> Path:
    """A healing that was interrupted in step `at`."""
    real = loop.Loop._train_step

    def step(self: Any, due: bool) -> Any:
        if self.step == at:
            raise KeyboardInterrupt
        return real(self, due)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_train_step", step)
        with pytest.raises(KeyboardInterrupt):
            heal(home, out, evaluate=False)
    return out.with_name(out.name + ".partial")


def test_a_resume_with_other_settings_says_which(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = stopped(home, tmp_path / "out", monkeypatch)
    with pytest.raises(RunError, match="--resume goes on"):
        heal(home, tmp_path / "out")
    with pytest.raises(
        RunError, match=r"learning_rate was 0\.01, is 0\.1; batch was 8, is 4|batch was 8, is 4; learning_rate was"
    ):
        heal(home, tmp_path / "out", resume=True, learning_rate=0.1, batch=4)
    with pytest.raises(RunError, match=r"teacher was .*model, is None"):
        heal(home, tmp_path / "out", resume=True, teacher=False)
    assert json.loads((partial / "work" / "latest.json").read_text())["step"] == 4
    assert heal(home, tmp_path / "out", resume=True, evaluate=False).healing["steps"] == 10


def test_finish_writes_the_best_so_far(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(home, tmp_path / "out", monkeypatch)
    done = heal(home, tmp_path / "out", finish=True, evaluate=False)
    assert done.healing["steps"] == 4
    assert done.healing["curve"][-1]["step"] == 4
    assert weights(done.path) != weights(home / "small")
    with pytest.raises(HealError, match="no checkpoint to finish with"):
        heal(home, tmp_path / "fresh", finish=True)
    assert not list(tmp_path.glob("fresh*"))


def test_a_checkpoint_is_written_every_ten_minutes_at_least(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    partial = stopped(home, tmp_path / "out", monkeypatch)
    assert json.loads((partial / "work" / "latest.json").read_text())["step"] == 5


def in_place(home: Path, place: Path, **changes: Any) -> bondsmith.Healed:
    settings = {"data": str(home / "text.txt"), "evaluate": False} | SETTINGS
    return bondsmith.heal(place, **(settings | changes))


def test_killed_after_the_renames_it_is_done(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = heal(home, tmp_path / "whole", evaluate=False)
    place = tmp_path / "small"
    shutil.copytree(home / "small", place)

    real = shutil.rmtree

    def rmtree(path: Path, **options: Any) -> None:
        if Path(path).name == "small.old":
            raise KeyboardInterrupt
        real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr("bondsmith.rundir.shutil.rmtree", rmtree)
        with pytest.raises(KeyboardInterrupt):
            in_place(home, place)
    assert (place / rundir.FINGERPRINT).is_file()
    again = in_place(home, place, resume=True)
    assert again.healing["curve"] == whole.healing["curve"]
    assert weights(place) == weights(whole.path)
    assert [p.name for p in tmp_path.glob("small*")] == ["small"]
    assert not any((place / name).exists() for name in (rundir.FINGERPRINT, rundir.WORK))


def test_resumed_when_it_is_done_it_stays_as_it_is(home: Path, tmp_path: Path) -> None:
    place = tmp_path / "small"
    shutil.copytree(home / "small", place)
    in_place(home, place)
    before = weights(place)
    in_place(home, place, resume=True)
    assert weights(place) == before
    in_place(home, place, resume=True, seed=1)  # another healing
    assert weights(place) != before


def test_in_place_keeps_what_else_lies_there(home: Path, tmp_path: Path) -> None:
    place = tmp_path / "small"
    shutil.copytree(home / "small", place)
    for name in ("notes.txt", "sub/notes.txt", "adapter.safetensors"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(name)
    log = (place / rundir.LOG).read_text()
    in_place(home, place)
    for name in ("notes.txt", "sub/notes.txt", "adapter.safetensors"):
        assert (place / name).read_text() == name
    assert (place / rundir.LOG).read_text().startswith(log)
    (place / "results.json").unlink()  # then nothing writes the pages anew
    (place / "README.md").write_text("mine")
    in_place(home, place, teacher=home / "model")
    assert (place / "README.md").read_text() == "mine"


def test_told_to_stop_it_saves_the_step_at_hand(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = heal(home, tmp_path / "whole", evaluate=False)
    real, before = loop.Loop._train_step, signal.getsignal(signal.SIGTERM)

    def step(self: Any, due: bool) -> Any:
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, due)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_train_step", step)
        with pytest.raises(HealError, match="the state of step 6 is kept"):
            heal(home, tmp_path / "out", evaluate=False)
    assert signal.getsignal(signal.SIGTERM) is before
    assert weights(heal(home, tmp_path / "out", evaluate=False, resume=True).path) == weights(whole.path)


@pytest.mark.parametrize(
    ("error", "seen"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "full"), DiskFullError)]
)
def test_a_checkpoint_that_cannot_be_written_says_why(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, seen: type[BaseException]
) -> None:
    whole = heal(home, tmp_path / "whole", evaluate=False)
    real, calls = FileSystemWriter.write_data, []

    def write_data(self: Any, *given: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return real(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(FileSystemWriter, "write_data", write_data)
        with pytest.raises(seen):
            heal(home, tmp_path / "out", evaluate=False)
    assert weights(heal(home, tmp_path / "out", evaluate=False, resume=True).path) == weights(whole.path)
