"""The processes that heal together: one, or those that `torchrun` starts; gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from bondsmith.stages.healing.settings import HealError

T = TypeVar("T")
_TIMEOUT = timedelta(minutes=30)  # the slowest thing others wait for is the original's predictions


class _Stopped(Exception):  # noqa: N818  an order, not an error
    """This process was told to stop: by torchrun as another one died, by a scheduler whose time is up."""


@dataclass
class Order:
    """The handler of SIGTERM: stops at once or, while it `waits`, has been `given` for the loop to end after the step at hand."""

    waits: bool = False
    given: bool = False

    def __call__(self, *_: Any) -> None:
        """Is called by the signal; a second one is obeyed at once."""
        if not self.waits or self.given:
            raise _Stopped("SIGTERM")
        self.given = True


@dataclass(frozen=True)
class Ranks:
    """This process among the others.

    >>> Ranks(0, 1, torch.device("cpu")).total([1.5, 2.0])
    [1.5, 2.0]
    """

    rank: int
    world: int
    device: torch.device
    order: Order = field(default_factory=Order)

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

    def make_alike(self, module: nn.Module) -> None:
        """Gives every process the main one's numbers: what each made by itself may differ where machines do."""
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), 0)

    def once(self, make: Callable[[], T]) -> T:
        """Returns in every process what the main one makes."""
        if not self.several:
            return make()
        box: list[Any] = [make() if self.main else None]
        dist.broadcast_object_list(box, src=0)
        found: T = box[0]
        return found


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Yields this process's place among those of `torchrun`, or the only one without it.

    Raises:
        HealError: another process died, or this one was told to stop; what the last checkpoint holds is kept.
    """
    world, rank, local = (int(os.environ.get(n, d)) for n, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    place, order = _device(device, local), Order()
    handled = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, order) if handled else None
    try:
        if world == 1:
            yield Ranks(0, 1, place, order)
            return
        if place.type == "cuda":
            torch.cuda.set_device(place)
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=_TIMEOUT)
        yield Ranks(rank, world, place, order)
        dist.destroy_process_group()
    except (_Stopped, dist.DistBackendError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not (world > 1 and _is_lost_peer(error)):
            raise
        told = isinstance(error, _Stopped) and world == 1
        why = "SIGTERM" if told else f"another process has ended ({_first_line(error)})"
        raise HealError(
            f"process {rank} of {world} stops: {why}; nothing is lost, the same command with --resume goes on from the last checkpoint"
        ) from error
    finally:
        if handled:
            signal.signal(signal.SIGTERM, before)


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
