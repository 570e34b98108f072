"""Memory of a process: what fits leave behind."""

from __future__ import annotations

import psutil
import pytest
import torch

from bondsmith.model import memory


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def test_what_is_freed_while_fitting_goes_back_to_the_system() -> None:
    if not hasattr(memory._C_LIBRARY, "mallinfo2"):
        pytest.skip("this allocator is not glibc's, or an old one")
    memory.return_free_memory()
    holes = [torch.ones(2_000_000) for _ in range(40)]  # below what is mapped while tokens pass
    above = torch.ones(1000)
    del holes
    with memory.fitting_memory():
        before = resident()
        for _ in range(3):
            large = torch.ones(12_500_000)
            assert resident() > before + 40_000_000
            del large
            assert resident() < before + 5_000_000
    assert float(above.sum()) == 1000


def test_of_another_allocator_nothing_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Preloaded:  # answers every request without glibc's heap knowing of it
        malloc = staticmethod(lambda size: pytest.fail("memory was taken"))

        @staticmethod
        def mallinfo2() -> memory._MallocInfo:
            return memory._MallocInfo()

    monkeypatch.setattr(memory, "_C_LIBRARY", Preloaded)
    assert memory._close_holes() == []


def test_what_was_in_force_comes_back() -> None:
    found = []

    @memory.fitting_memory()
    def fit(deeper: bool) -> None:
        if deeper:
            fit(False)
        found.append(memory._in_force)
        if deeper:
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fit(True)
    assert found == [memory._FITTING] * 2
    assert memory._in_force == memory._PASSING
