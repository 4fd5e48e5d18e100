"""What the processes of a node and of its engine's worker set for themselves when they start."""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD = -3  # of mallopt(3)
_M_ARENA_MAX = -8
_LARGE = 256 << 10  # bytes
# Until a thread that holds the interpreter is asked for it: Python's 5 ms are half of a 100 Hz timer's period
_SWITCH_SECONDS = 0.0002


def settle_process() -> None:
    """Threads hand over soon, and what an engine takes goes back to the system when it is closed."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    _steady_heap()


def _steady_heap() -> None:
    """Map each large buffer on its own, so that its memory goes when it is freed, and keep one heap.

    glibc raises that limit to 32 MiB with use and keeps one heap a thread, where small things that live on
    split the room of a buffer that went: a node that opens and closes engines grew by 2 MiB in 150 times,
    and held 20 MiB more. Does nothing where the C library has no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_ARENA_MAX, 1)
