"""Freed memory goes back to the system, which the heap alone does not do."""

import ctypes
import sys

import pytest
import torch
from psutil import Process

from ubmoe.training.allocator import return_freed_memory

COUNT, NUMBERS = 4000, 16_000  # 64 kB each: too small for a mapping of its own


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc"
)
def test_holes_below_what_lives_are_returned():
    process = Process()
    tensors = [torch.ones(NUMBERS) for _ in range(COUNT)]
    whole = process.memory_info().rss
    last = tensors.pop()  # on top of the heap
    tensors.clear()
    kept = process.memory_info().rss
    return_freed_memory()
    returned = process.memory_info().rss
    assert last.sum() == NUMBERS
    assert whole - kept < 100e6  # else the heap shrinks by itself, and nothing is to be done
    assert kept - returned > 200e6
