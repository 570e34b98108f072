"""Runs a command in a child and kills it at a given moment, as a power cut would."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from typing import Any


def kill_when(run: Callable[..., None], arguments: tuple[Any, ...], reached: Callable[[], bool]) -> bool:
    """Calls `run` in a child; SIGKILL as soon as `reached`. Returns whether it was killed before it ended."""
    child = multiprocessing.get_context("fork").Process(target=run, args=arguments)
    child.start()
    assert child.pid is not None
    while child.is_alive():
        if reached():
            os.kill(child.pid, signal.SIGKILL)
            break
        time.sleep(0.0005)
    child.join()
    return child.exitcode == -signal.SIGKILL
