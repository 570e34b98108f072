"""Checkpoints of a healing: the state after some steps, which appears whole or not at all, from one process or many.

`state-N/` is written by torch.distributed.checkpoint, every process its part; `latest.json` names it afterwards, in one rename. What
nobody names any more is deleted last. So at any moment there is one whole state, and a process that is killed loses only the steps since.
"""

from __future__ import annotations

import errno
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from bondsmith.model.checkpoint import DiskFullError, write_json
from bondsmith.stages.healing.ranks import Ranks
from bondsmith.stages.training import Steps

LATEST = "latest.json"


@dataclass(frozen=True)
class States:
    """The checkpoints below a folder."""

    folder: Path
    ranks: Ranks

    @property
    def latest(self) -> dict[str, Any] | None:
        """What is known of the last whole state (`step`, `best`, `history`, `seconds`), or None."""
        file = self.folder / LATEST
        return json.loads(file.read_text()) if file.is_file() else None

    def save(self, parameters: dict[str, nn.Parameter], optimizer: Steps, note: dict[str, Any]) -> None:
        """Writes the state after `note["step"]` steps and names it; of older ones only the best stays."""
        place = self._place(note["step"])
        if self.ranks.main and place.exists():
            shutil.rmtree(place)  # left by a run that was killed before it named it
        self.ranks.wait()
        with _plainly(self.folder):
            state_dict_saver.save(_content(parameters, optimizer), checkpoint_id=place, no_dist=not self.ranks.several)
        self.ranks.wait()
        if not self.ranks.main:
            return
        write_json(self.folder / LATEST, note)
        kept = {self._place(note["step"]), self._place(note["best"])}
        for old in set(self.folder.glob("state-*")) - kept:
            shutil.rmtree(old)

    def load(self, step: int, parameters: dict[str, nn.Parameter], optimizer: Steps | None = None) -> None:
        """Brings the state after `step` steps into the parameters and the optimizer."""
        with _plainly(self.folder):
            content = _content(parameters, optimizer)
            state_dict_loader.load(content, checkpoint_id=self._place(step), no_dist=not self.ranks.several)
        if optimizer is not None:
            torch.set_rng_state(content["random"])

    def _place(self, step: int) -> Path:
        return self.folder / f"state-{step:08d}"


@contextmanager
def _plainly(folder: Path) -> Iterator[None]:
    """Without torch's warnings, and with the errors that it wraps: Ctrl-C stays Ctrl-C, a full disk says what helps."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointException as wrapped:
        error = next(failure[0] for failure in wrapped.failures.values())
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            free = shutil.disk_usage(folder).free
            raise DiskFullError(
                f"the disk of {folder} is full ({free / 1e6:.1f} MB left) while writing a checkpoint; the one before is untouched: "
                "make room and run the same command with --resume"
            ) from wrapped
        raise error from wrapped


def _content(parameters: dict[str, nn.Parameter], optimizer: Steps | None) -> dict[str, Tensor]:
    """Returns what a checkpoint holds, as one flat dictionary of the very tensors, so that loading fills them in place."""
    content: dict[str, Tensor] = {f"model.{name}": p.detach() for name, p in parameters.items()}
    if optimizer is not None:
        for name, parameter in parameters.items():
            for key, value in optimizer.state[parameter].items():
                content[f"optimizer.{name}.{key}"] = value
        content["random"] = torch.get_rng_state()
    return content
