"""Keep the memory of a process from growing with every block, though no tensor lives on.

glibc's allocator maps what is large from the system, and gives it back as soon as it is freed; what is smaller lies in a heap, where it
leaves holes. It raises the size that counts as large to 32 MB on its own, and puts large things into holes that are large enough, where
they stay resident until the heap is trimmed. So the size is fixed here: high while tokens pass, where at 1 MB a forward pass takes a
quarter longer; low while matrices are fitted, where it costs small matrices some time, and there the holes are closed.
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
_LARGEST_HOLE = 2**30
_in_force = _PASSING


class _MallocInfo(ctypes.Structure):
    """`struct mallinfo2`: among others the free bytes of the heaps (`fordblks`)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


def return_free_memory() -> None:
    """Gives the holes that are left to the system; called before the weights of every block are read."""
    _map_from(_in_force)


@contextmanager
def fitting_memory() -> Iterator[None]:
    """While the body or the decorated function runs, whatever is larger than 1 MB is mapped, and its memory free as soon as it is."""
    before = _in_force
    _map_from(_FITTING)
    closed = _close_holes()
    try:
        yield
    finally:
        for hole in closed:
            _C_LIBRARY.free(hole)
        _map_from(before)


def _map_from(size: int) -> None:
    global _in_force
    _in_force = size
    if hasattr(_C_LIBRARY, "malloc_trim"):
        _C_LIBRARY.mallopt(_M_MMAP_THRESHOLD, size)
        _C_LIBRARY.malloc_trim(0)


def _close_holes() -> list[ctypes.c_void_p]:
    """Takes all holes of the heap that are as large as what is mapped; untouched, they cost no memory. Returns where they are.

    Never more than the heap says is free: of another allocator in glibc's place, which this knows nothing of, nothing is taken.
    """
    if not hasattr(_C_LIBRARY, "mallinfo2"):
        return []
    information, take = _C_LIBRARY.mallinfo2, _C_LIBRARY.malloc
    information.restype, take.restype = _MallocInfo, ctypes.c_void_p
    free, found, size = information().fordblks, [], _LARGEST_HOLE
    while size >= _FITTING:
        if size > free:
            size //= 2
            continue
        piece = ctypes.c_void_p(take(ctypes.c_size_t(size)))
        if not piece or _is_mapped(piece):  # no hole is so large
            _C_LIBRARY.free(piece)
            size //= 2
        else:
            found.append(piece)
            free -= size
    return found


def _is_mapped(piece: ctypes.c_void_p) -> bool:
    """Whether glibc has mapped a piece by itself: a bit of the size that it keeps before it. `mallinfo2` would walk all holes each time."""
    size = ctypes.c_size_t.from_address((piece.value or 0) - ctypes.sizeof(ctypes.c_size_t))
    return bool(size.value & 2)
