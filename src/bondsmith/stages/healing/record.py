"""What is written of a healing, and how a finished one is known again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bondsmith.data import Windows
from bondsmith.model.checkpoint import open_compressed, write_json
from bondsmith.model.source import Source
from bondsmith.stages import quality, report
from bondsmith.stages.healing.output import REPORTS
from bondsmith.stages.healing.settings import HealSettings

_NO_LONGER = ("quality", "quality_fitted", "tasks", "chat")  # sections of the results that training changes


def finished(place: Path, settings: HealSettings) -> dict[str, Any] | None:
    """Returns the section `healing` of a directory that was healed with these settings and holds no unfinished run."""
    results = place / "results.json"
    if place.with_name(place.name + ".partial").is_dir() or not results.is_file():
        return None
    healing: dict[str, Any] = json.loads(results.read_text()).get("healing") or {}
    found, asked = healing.get("settings") or {}, settings.to_dict()
    if healing.get("before_rounding"):
        return None
    shorter = 0 < found.get("window", 0) <= settings.window  # windows are no longer than the model's context
    return healing if shorter and found == asked | {"window": found["window"]} else None


def record(
    small: Path,
    out: Path,
    healing: dict[str, Any],
    original: Source | None,
    texts: Sequence[Windows],
    device: torch.device,
    advance: Callable[[float], None],
) -> None:
    """Writes results and report: what was measured before the healing and no longer holds is left out or, given `original`, made anew."""
    file = small / REPORTS[0]
    if not file.is_file():
        return
    results = {k: v for k, v in json.loads(file.read_text()).items() if k not in _NO_LONGER}
    results["healing"] = healing
    if original is not None:
        results["quality"] = quality.compare(original, open_compressed(out), texts, device, advance)
    write_json(out / REPORTS[0], results)
    report.write_report(out, results)
