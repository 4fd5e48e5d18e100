"""The heap of a node's process: what an engine takes goes back to the system when it is closed."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3  # of mallopt(3)
_M_ARENA_MAX = -8
_LARGE = 256 << 10  # bytes


def steady_heap() -> None:
    """Map each large buffer on its own, so that its memory goes when it is freed, and keep one heap.

    glibc raises that limit to 32 MiB with use and keeps one heap a thread, where small things that live on
    split the room of a buffer that went: a node that opens and closes engines grew by 2 MiB in 150 times,
    and held 20 MiB more. Does nothing where the C library has no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_ARENA_MAX, 1)
