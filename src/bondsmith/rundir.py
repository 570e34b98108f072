"""The run directory: `OUT.partial` while a run works, its fingerprint, and the one rename that makes it `OUT`."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

from bondsmith.data import SELF
from bondsmith.model.hub import FORMAT
from bondsmith.model.source import Source, file_digest
from bondsmith.recipe import Recipe

FINGERPRINT = "fingerprint.json"
WORK = "work"
LOG = "log.txt"
log = logging.getLogger("bondsmith")


class RunError(ValueError):
    """The run cannot start or go on where it was told to; the message says why and which option helps."""


def fingerprint(source: Source, recipe: Recipe, evaluate: bool) -> dict[str, Any]:
    """Returns what must be the same for a run to go on: format, torch, settings, and the SHA-256 of every input file."""
    texts = [
        Path(s).expanduser() for s in (*recipe.calibration, *recipe.evaluation) if s != SELF and not s.startswith("hf:")
    ]
    return {
        "format": FORMAT,
        "torch": torch.__version__,
        "settings": recipe.to_dict() | {"evaluate": evaluate},
        "files": {str(f): file_digest(f) for f in (*source.files, *texts)},
    }


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns what differs between two fingerprints, as phrases."""
    found = [f"{k} was {before[k]}, is {now[k]}" for k in ("format", "torch") if before[k] != now[k]]
    old, new = before["settings"], now["settings"]
    found += [f"{k} was {old.get(k)}, is {new.get(k)}" for k in {**old, **new} if old.get(k) != new.get(k)]
    old, new = before["files"], now["files"]
    found += [f"{f} has changed" for f in old if f in new and old[f] != new[f]]
    found += [f"{f} was not used" for f in new if f not in old] + [f"{f} is not used" for f in old if f not in new]
    return found


def call_of(function: str, model: object, out: Path, settings: Mapping[str, Any]) -> str:
    """Returns the call from Python that makes `out` of `model`; of a loaded one the class stands for it."""
    name = str(model) if isinstance(model, str | Path) else type(model).__name__
    given = [repr(name), repr(str(out)), *(f"{key}={value!r}" for key, value in settings.items())]
    return f"bondsmith.{function}({', '.join(given)})"


def restore(out: Path) -> None:
    """Puts in order what a process left that was killed inside `move_into_place`.

    Between the two renames: `OUT.old` has its name again, and the run is still to be ended. After them: the run is done, and what was
    needed only meanwhile goes.
    """
    old, unfinished = _old(out), out.with_name(out.name + ".partial").is_dir()
    if old.is_dir() and unfinished and not out.exists():
        os.rename(old, out)
        log.warning("%s was left as %s by a run that was killed at its end: it has its name again", out, old.name)
    elif (
        (out / FINGERPRINT).is_file() and (out / "config.json").is_file() and not unfinished
    ):  # no profile, which has one, too
        _clear(out)


def _old(out: Path) -> Path:
    return out.with_name(out.name + ".old")


def open_directory(out: Path, resume: bool, overwrite: bool, replaces: bool = False) -> Path:
    """Returns `OUT.partial`, made or found again; RunError where `out` or an unfinished run is in the way.

    `replaces` is for commands whose result takes the place of what is in `out`.
    """
    partial = out.with_name(out.name + ".partial")
    restore(out)
    if out.is_file():
        raise RunError(f"{out} is a file: give a directory")
    if out.is_dir() and any(out.iterdir()) and not (overwrite or replaces):
        raise RunError(f"{out} exists and is not empty: choose another directory, or --overwrite to replace it")
    check_idle(partial)
    if partial.exists() and not resume:
        if not overwrite:
            raise RunError(f"{partial} holds an unfinished run: --resume goes on with it, --overwrite starts anew")
        shutil.rmtree(partial)
    (partial / WORK).mkdir(parents=True, exist_ok=True)
    return partial


def move_into_place(partial: Path, out: Path) -> None:
    """Gives the finished directory its name; what was there before, and what was needed only meanwhile, goes last."""
    old = _old(out)
    if out.exists():
        if old.exists():
            shutil.rmtree(old)
        os.rename(out, old)
    os.rename(partial, out)
    _clear(out)


def _clear(out: Path) -> None:
    """Deletes what was needed only meanwhile; the fingerprint last, by which a finished run that was killed here is known."""
    for rest in (_old(out), out / WORK):
        shutil.rmtree(rest, ignore_errors=True)
    (out / FINGERPRINT).unlink()


def check_apart(model: object, out: Path) -> None:
    """Nothing, or RunError if the model lies where the result is to go: it would be replaced."""
    place = Path(str(model)).expanduser().absolute() if isinstance(model, str | Path) else None
    if place is not None and place.exists() and out in (place, *place.parents):
        raise RunError(f"{out} is where the model lies: give another directory for the result")


def check_idle(directory: Path) -> None:
    """Nothing, or RunError if another process is writing the directory."""
    if (directory / LOG).is_file():
        with (directory / LOG).open("a") as handle:
            _lock(handle, directory)


def _lock(handle: TextIO, directory: Path) -> None:
    """Keeps the open log of a run for this process, until it is closed; RunError where another process has it."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(
            f"{directory} is being written by another process: wait for it, or choose another directory"
        ) from error
    except OSError:  # a file system without locks
        return


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Writes the log of a run into a file, from the first second; RunError if another process does so already."""
    handler = logging.FileHandler(path, encoding="utf-8")
    try:
        if handler.stream is not None:
            _lock(handler.stream, path.parent)
    except RunError:
        handler.close()
        raise
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        handler.close()
