"""Keep the memory of a process from growing with every block, though no tensor lives on.

glibc's allocator maps what is large from the system, and gives it back when it is freed; what is smaller lies in heaps, where it leaves
holes. It raises the size that counts as large to 32 MB on its own. Here it is fixed: low while matrices are fitted, which takes so long
that mapping costs nothing; high while tokens pass, where at 1 MB a forward pass takes a quarter longer.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_C_LIBRARY: Any = ctypes.CDLL(None) if os.name == "posix" else None
_M_MMAP_THRESHOLD = -3
_PASSING, _FITTING = 16 * 2**20, 2**20
_in_force = _PASSING


def return_free_memory() -> None:
    """Gives the holes that are left to the system; called before the weights of every block are read."""
    _map_from(_in_force)


@contextmanager
def fitting_memory() -> Iterator[None]:
    """While the body or the decorated function runs, whatever is larger than 1 MB leaves no hole."""
    before = _in_force
    _map_from(_FITTING)
    try:
        yield
    finally:
        _map_from(before)


def _map_from(size: int) -> None:
    global _in_force
    _in_force = size
    if hasattr(_C_LIBRARY, "malloc_trim"):
        _C_LIBRARY.mallopt(_M_MMAP_THRESHOLD, size)
        _C_LIBRARY.malloc_trim(0)
