"""How glibc's malloc keeps house in a process that runs for months and holds a few large requests now and then."""

import ctypes
from contextlib import suppress

# As in <malloc.h>.
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

# What is at least so large (bytes) is mapped by itself, and goes back to the system when it is freed.
LARGE_BYTES = 128 * 1024
ARENAS = 2


def give_back_what_is_large() -> None:
    """Fix the size from which blocks are mapped by themselves, and keep threads to few arenas.

    By default glibc raises that size (to 32 MiB) with each such block that is freed: large prompts then come from the
    heap, small blocks that stay are put between them, and the memory never goes back. With another C library nothing
    happens.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(_M_ARENA_MAX, ARENAS)
