"""Hidden states of all windows on disk, written and read a few windows at a time: memory does not grow with the text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bondsmith.model.checkpoint import atomic


class Stream:
    """A tensor (windows, ...) of float32 in a file, read by rows; `durable` ones outlive a crash of the machine.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     stream = Stream(Path(folder) / "x", (3, 2))
    ...     stream.write([torch.zeros(2, 2), torch.ones(1, 2)])
    ...     stream.read(1, 2).tolist()
    [[0.0, 0.0], [1.0, 1.0]]
    """

    def __init__(self, path: Path, shape: tuple[int, ...], durable: bool = True):
        self.path = path
        self.shape = shape
        self.durable = durable
        self._row = math.prod(shape[1:])

    @property
    def complete(self) -> bool:
        """True once all rows are there: the file appears whole or not at all."""
        return self.path.is_file() and self.path.stat().st_size == 4 * self.shape[0] * self._row

    @contextmanager
    def writer(self) -> Iterator[Callable[[Tensor], object]]:
        """Yields a function that appends rows; the file appears when the body ends well.

        Plain writes, not a memory map: mapped pages would count as memory used.
        """
        with atomic(self.path, self.durable) as partial, partial.open("wb") as handle:
            yield lambda rows: handle.write(rows.detach().to("cpu", torch.float32).contiguous().numpy().data)
            handle.flush()

    def write(self, batches: Iterable[Tensor]) -> None:
        """Writes the rows of all batches."""
        with self.writer() as put:
            for batch in batches:
                put(batch)

    def read(self, first: int, count: int) -> Tensor:
        """Returns rows `first` to `first + count` as a fresh tensor."""
        values = np.fromfile(self.path, np.float32, count * self._row, offset=4 * first * self._row)
        return torch.from_numpy(values).view(-1, *self.shape[1:])

    def remove(self) -> None:
        """Deletes the file, if it is there."""
        self.path.unlink(missing_ok=True)
