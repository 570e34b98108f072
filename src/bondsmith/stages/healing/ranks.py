"""The processes that heal together: one, or those that `torchrun` starts; gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from bondsmith.stages.healing.settings import HealError

_TIMEOUT = timedelta(minutes=30)  # the slowest thing others wait for is the original's predictions


@dataclass(frozen=True)
class Ranks:
    """This process among the others.

    >>> Ranks(0, 1, torch.device("cpu")).total([1.5, 2.0])
    [1.5, 2.0]
    """

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """True in the process that writes and speaks."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.world > 1

    def total(self, values: Sequence[float]) -> list[float]:
        """Returns the sums of each value over all processes."""
        if not self.several:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        found: list[float] = tensor.tolist()
        return found

    def wait(self) -> None:
        """Returns when all processes are here."""
        if self.several:
            dist.barrier()

    def share(self, value: Any) -> Any:
        """Returns the main process's value in every process."""
        if not self.several:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


class _Stopped(Exception):  # noqa: N818  an order, not an error
    """torchrun has told this process to stop: another one died."""


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Yields this process's place among those of `torchrun`, or the only one without it.

    Raises:
        HealError: another process died; what the last checkpoint holds is kept.
    """
    world, rank, local = (int(os.environ.get(n, d)) for n, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    place = _device(device, local)
    if world == 1:
        yield Ranks(0, 1, place)
        return
    if place.type == "cuda":
        torch.cuda.set_device(place)
    handler = signal.signal(signal.SIGTERM, _stop)
    try:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=_TIMEOUT)
        yield Ranks(rank, world, place)
        dist.destroy_process_group()
    except (_Stopped, dist.DistBackendError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_lost_peer(error):
            raise
        raise HealError(
            f"process {rank} of {world} stops: another process has ended ({_first_line(error)}); nothing is lost, the same "
            "command with --resume goes on from the last checkpoint"
        ) from error
    finally:
        signal.signal(signal.SIGTERM, handler)


def _stop(*_: Any) -> None:
    raise _Stopped("SIGTERM")


def _is_lost_peer(error: RuntimeError) -> bool:
    text = str(error).lower()
    marks = ("connection closed by peer", "connection reset", "broken pipe", "gloo", "nccl", "socket", "timed out")
    return isinstance(error, dist.DistError) or any(mark in text for mark in marks)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _device(name: str, local: int) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
