"""The command `bondsmith`: options in, tables out; the work is done elsewhere."""

from __future__ import annotations

import logging
import sys
import warnings

from bondsmith.cli import making, planning, viewing
from bondsmith.cli.screen import app, err, out, progress_bars

__all__ = ["app", "err", "main", "making", "out", "planning", "progress_bars", "quiet", "viewing"]


def main() -> None:
    """Runs the command line: one clear sentence and a non-zero exit for what a person can put right."""
    quiet()
    from bondsmith.data import DataError
    from bondsmith.model.checkpoint import DiskFullError
    from bondsmith.model.source import ModelError
    from bondsmith.recipe import RecipeError
    from bondsmith.rundir import RunError
    from bondsmith.stages.healing.settings import HealError
    from bondsmith.stages.matrix_plan import PlanError
    from bondsmith.stages.rows import TaskError

    try:
        app()
    except (DataError, DiskFullError, HealError, ModelError, PlanError, RecipeError, RunError, TaskError) as error:
        err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("interrupted; what is finished is kept: the same command with --resume goes on")
        sys.exit(130)


def quiet() -> None:
    """Keeps the libraries' own bars and warnings off the screen; ours say what happens."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
