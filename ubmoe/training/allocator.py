"""What C's allocator keeps of freed tensors.

glibc's heap grows with tensors of many shapes, and does not shrink by itself while anything above a
hole lives. Training leaves gigabytes of holes that scoring does not fit into, and the reverse.
"""

import ctypes
import sys


def return_freed_memory() -> None:
    """Give freed memory back to the system, where the allocator is glibc's; takes milliseconds.

    malloc_trim(3): whole free pages anywhere in the heap, since glibc 2.8.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
